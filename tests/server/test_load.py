"""Thousands of requests from many clients, a third of which go away: none is lost, mixed up or kept."""

from __future__ import annotations

import gc
import json
import queue
import random
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from proxytune.model import ProxyTuned
from proxytune.request import Request, SamplingParams
from proxytune.server.engine import Engine, _Running
from proxytune.server.turns import LONG, Ticket
from proxytune.testing import toy_model
from tests.server.test_faults import post
from tests.support.served import Served, served

MAX_GROWTH = 24 * 2**20
"""Of a process that lives on; the allocator keeps some for itself."""


def fresh() -> ProxyTuned:
    experts = {"one": 1.0, "two": 0.5, "three": 2.0}
    return toy_model(memory=0.5, eos_logit=-2.0, experts=experts)


@dataclass(frozen=True)
class Wanted:
    """A request, and what the library generates for it alone."""

    body: dict[str, Any]
    text: str
    finish_reason: str


def drawn(rng: random.Random, model: ProxyTuned, *, is_long: bool = False) -> Wanted:
    """Return a request of any kind that repeats; a long one has short ones run beside it."""
    prompt = "".join(rng.choices("abcdef .", k=rng.randint(1, 12)))
    experts: Any = rng.choice((None, "one", "two", "three", {"one": 0.3, "three": -0.4}))
    alpha = None if isinstance(experts, dict) else rng.choice((None, 0.0, 0.5, 1.0, -1.0, 2.5))
    num_new = LONG if is_long else rng.randint(1, 40)
    fields: dict[str, Any] = {}
    if rng.random() < 0.7:
        fields = {"temperature": rng.choice((0.5, 1.0, 1.5)), "seed": rng.randrange(2**40)}
        fields |= rng.choice(({}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}))
    fields |= rng.choice(({}, {"repetition_penalty": 1.2}, {"presence_penalty": 0.7}))
    stop = rng.choice(((), (), ("a",), ("ed", "q")))
    sampling = SamplingParams(max_new_tokens=num_new, stop=stop, **fields)
    trace = model.generate(Request(prompt, sampling, alpha, experts))
    body = {"model": "toy", "prompt": prompt, "max_tokens": num_new, "temperature": 0} | fields
    if stop:
        body["stop"] = list(stop)
    if alpha is not None:
        body["proxytune"] = {"alpha": alpha}
    if isinstance(experts, dict):
        body["proxytune"] = {"experts": experts}
    elif experts is not None:
        body["proxytune"] = body.get("proxytune", {}) | {"expert": experts}
    return Wanted(body, trace.text, trace.finish_reason)


@dataclass
class Latencies:
    """How many turns the engine began between a cancellation and the end of its text.

    In a turn, rows join and every batch takes a step.
    """

    num_turns: int = 0
    cancelled_at: dict[int, int] = field(default_factory=dict)
    found: list[int] = field(default_factory=list)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cancel, notify, turn = Ticket.cancel, Ticket.notify, Engine._turn

        def watched_cancel(ticket: Ticket) -> None:
            if ticket.ended is None and not ticket.is_cancelled:
                self.cancelled_at[id(ticket)] = self.num_turns
            cancel(ticket)

        def watched_notify(ticket: Ticket, event: Any) -> None:
            notify(ticket, event)
            at = self.cancelled_at.pop(id(ticket), None) if ticket.ended is not None else None
            if at is not None and getattr(event, "finish_reason", None) == "cancelled":
                self.found.append(self.num_turns - at)

        def watched_turn(engine: Engine) -> None:
            self.num_turns += 1
            turn(engine)

        monkeypatch.setattr(Ticket, "cancel", watched_cancel)
        monkeypatch.setattr(Ticket, "notify", watched_notify)
        monkeypatch.setattr(Engine, "_turn", watched_turn)


class TurnedAway(Exception):
    """The server was full and refused the request."""


def ask(client: httpx.Client, wanted: Wanted, is_streamed: bool) -> tuple[str, str]:
    """Return a text and why it ended."""
    answer = client.post("/v1/completions", json=wanted.body | {"stream": is_streamed})
    if answer.status_code == 429 or '"code":"queue_full"' in answer.text.replace(" ", ""):
        raise TurnedAway(answer.text)
    assert answer.status_code == 200, answer.text
    if not is_streamed:
        choice = answer.json()["choices"][0]
        return choice["text"], choice["finish_reason"]
    *events, last = re.findall(r"data: (.*)\n\n", answer.text)
    assert last == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


def ask_again(
    client: httpx.Client, wanted: Wanted, is_streamed: bool, may_be_full: bool
) -> tuple[str, str]:
    """Return what `ask` does; where the server may be full, ask until it has a place.

    It has as many places as there are clients. Those who went away have one too until it notices.
    """
    deadline = time.monotonic() + 30
    while True:
        try:
            return ask(client, wanted, is_streamed)
        except TurnedAway:
            if not may_be_full or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def ask_and_go(running: Served, wanted: Wanted, is_streamed: bool, after_s: float) -> None:
    """Go away while the text is generated; what had come of a stream must be its beginning."""
    with running.connect() as connection:
        connection.sendall(post(wanted.body | {"stream": is_streamed}))
        time.sleep(after_s)
        if not is_streamed:
            return
        connection.settimeout(0.001)
        try:
            found = connection.recv(65536)
        except TimeoutError:
            return
    events = [e for e in re.findall(rb"data: (\{.*\})\n\n", found)]
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert wanted.text.startswith(text)


def memory() -> int | None:
    """Return the bytes that the process holds, where the system tells."""
    if sys.platform != "linux":
        return None
    gc.collect()
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def num_objects(*kinds: type) -> int:
    gc.collect()
    return sum(type(found) in kinds for found in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_clients", "num_requests", "num_long", "changes"),
    [
        (16, 2000, 0, {}),
        (16, 500, 0, {"speculative": True}),
        (32, 1000, 4, {}),
        (32, 200, 20, {"max_rows": 4, "max_waiting": 28}),
    ],
)
def test_no_request_of_many_clients_is_lost_mixed_up_or_kept(
    monkeypatch, num_clients, num_requests, num_long, changes
):
    rng = random.Random(0)
    pool = [drawn(rng, fresh(), is_long=number < num_long) for number in range(200)]
    todo: queue.SimpleQueue[tuple[Wanted, bool, float | None]] = queue.SimpleQueue()
    for _ in range(num_requests):
        leaves = rng.random() < 0.3
        todo.put((rng.choice(pool), rng.random() < 0.5, rng.uniform(0, 0.05) if leaves else None))
    latencies = Latencies()
    latencies.watch(monkeypatch)
    done: Counter[str] = Counter()
    wrong: list[Any] = []
    levels: dict[int, int | None] = {}
    lock = threading.Lock()

    def work(running: Served) -> None:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            while True:
                try:
                    wanted, is_streamed, after_s = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    if after_s is not None:
                        ask_and_go(running, wanted, is_streamed, after_s)
                        kind = "gone"
                    else:
                        found = ask_again(client, wanted, is_streamed, "max_waiting" in changes)
                        if found != (wanted.text, wanted.finish_reason):
                            wrong.append((wanted, found))
                        kind = "whole"
                except Exception as error:
                    wrong.append((wanted, error))
                    kind = "failed"
                with lock:
                    done[kind] += 1
                    number = sum(done.values())
                    if number in (num_requests // 4, num_requests):
                        levels[number] = memory()

    with served(fresh(), **changes) as running:
        threads = [threading.Thread(target=work, args=(running,)) for _ in range(num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine = running.service.engine
        deadline = time.monotonic() + 5
        while engine.num_running + engine.num_waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (engine.num_running, engine.num_waiting) == (0, 0)
        assert not (engine._running or len(engine._waiting) or engine._suspects or engine._arriving)
        text = httpx.get(f"{running.url}/metrics").text
        counted = dict(re.findall(r'proxytune_texts_total\{reason="(\w+)"\} ([\d.]+)', text))
    assert not wrong, wrong[:3]
    assert done["whole"] + done["gone"] == num_requests and done["gone"] > num_requests / 5
    # One that went before its request was read never became a text.
    assert done["whole"] <= sum(map(float, counted.values())) <= num_requests
    num_unread = num_requests - sum(map(float, counted.values()))
    assert float(counted["cancelled"]) + num_unread > num_requests / 20
    assert latencies.found and max(latencies.found) < 2
    assert num_objects(Ticket, _Running) == 0
    before, after = levels[num_requests // 4], levels[num_requests]
    if before is not None and after is not None:
        assert after - before < MAX_GROWTH
