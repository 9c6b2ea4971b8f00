"""The engine: rows of many clients in one batch, turns, limits, failures. Toys; HTTP does not appear."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from proxytune.backends.toy import ToyBackend
from proxytune.decode.batch import Event
from proxytune.errors import BackendError, QueueFull, ShuttingDown
from proxytune.model import ProxyTuned
from proxytune.request import Request, SamplingParams
from proxytune.server.engine import Engine
from proxytune.server.turns import Ticket
from proxytune.testing import toy_model

LETTERS = "abcdefgh"


@dataclass
class Listener:
    """What one ticket is told."""

    events: queue.Queue[Event | Exception] = field(default_factory=queue.Queue)
    log: list[str] = field(default_factory=list)

    def wait(self, timeout: float = 10) -> str:
        """Return the whole text; raise what ended it, if something did."""
        text = ""
        while True:
            event = self.events.get(timeout=timeout)
            if isinstance(event, Exception):
                raise event
            text += event.tail if event.step is None else event.step.text
            if event.finish_reason is not None:
                self.log.append(event.finish_reason)
                return text


class Gate(ToyBackend):
    """A toy base whose forwards wait until they are let through."""

    def __init__(self, inner: ToyBackend) -> None:
        self.__dict__.update(inner.__dict__)
        self.permits = threading.Semaphore(0)
        self.is_open = False
        self.poison: int | None = None
        self.forwards: list[int] = []

    def _pass(self, num_rows: int) -> None:
        if not self.is_open:
            assert self.permits.acquire(timeout=10)
        self.forwards.append(num_rows)

    def prefill(self, prompts: Any, **options: Any) -> Any:
        self._pass(len(prompts))
        return super().prefill(prompts, **options)

    def extend(self, state: Any, token_ids: torch.Tensor) -> torch.Tensor:
        self._pass(len(token_ids))
        if self.poison is not None and bool((token_ids == self.poison).any()):
            raise BackendError("the model choked")
        return super().extend(state, token_ids)


def gated(**options: Any) -> tuple[ProxyTuned, Gate]:
    model = toy_model(memory=0.5, eos_logit=-100.0, experts={"one": 1.0, "two": 0.5}, **options)
    base = model.ensemble.members[0]
    gate = Gate(base.backend)  # type: ignore[arg-type]
    members = (replace(base, backend=gate), *model.ensemble.members[1:])
    model.ensemble = replace(model.ensemble, members=members)
    return model, gate


def ticket(
    model: ProxyTuned, prompt: str, client: str = "", num_new: int = 6, **options: Any
) -> tuple[Ticket, Listener]:
    listener = Listener()
    experts = options.pop("experts", None)
    request = Request(prompt, SamplingParams(max_new_tokens=num_new, **options), experts=experts)
    made = Ticket(model.job(request), listener.events.put, client)
    made.job = replace(made.job, cancelled=made.is_unwanted)
    return made, listener


def test_rows_that_come_one_after_another_share_forwards_and_get_their_own_texts():
    model, gate = gated()
    expected = [model_text(prompt) for prompt in LETTERS]
    made = [ticket(model, prompt) for prompt in LETTERS]
    with Engine(model) as engine:
        for one, _ in made:
            engine.submit([one])
            gate.permits.release(2)  # some have begun when others come
        gate.is_open = True
        gate.permits.release(100)
        assert [listener.wait() for _, listener in made] == expected
    assert max(gate.forwards) > 1


def model_text(prompt: str, num_new: int = 6, **options: Any) -> str:
    model = toy_model(memory=0.5, eos_logit=-100.0, experts={"one": 1.0, "two": 0.5})
    experts = options.pop("experts", None)
    sampling = SamplingParams(max_new_tokens=num_new, **options)
    return model.generate(Request(prompt, sampling, experts=experts)).text


def test_no_more_rows_run_than_allowed():
    model, gate = gated()
    gate.is_open = True
    made = [ticket(model, prompt) for prompt in LETTERS]
    with Engine(model, max_rows=3) as engine:
        engine.submit([one for one, _ in made])
        assert [listener.wait() for _, listener in made] == [model_text(p) for p in LETTERS]
    assert max(gate.forwards) == 3


def test_clients_take_turns():
    """One client's many requests do not keep another's first one waiting."""
    model, gate = gated()
    order: list[str] = []
    many = [ticket(model, prompt, "greedy", num_new=1) for prompt in "abcd"]
    other = ticket(model, "e", "modest", num_new=1)
    for name, (one, _) in zip([*"abcd", "other"], [*many, other], strict=True):
        one.on_event = lambda event, name=name: order.append(name)
    with Engine(model, max_rows=1) as engine:
        engine.submit([one for one, _ in many])
        engine.submit([other[0]])
        gate.is_open = True
        gate.permits.release(100)
        wait_until(lambda: len(order) == 5)
    # The first of the greedy client's may have begun before the other came.
    assert order.index("other") <= 1


@pytest.mark.parametrize("num_users", (1, 90))
def test_a_small_request_is_taken_and_answered_while_large_ones_fill_rows_and_places(num_users):
    """All waiting places were taken, whatever the small one's name: it was refused with 429."""
    model, gate = gated()
    flood = [ticket(model, "a", "address", num_new=400) for _ in range(8)]
    for number, (one, _) in enumerate(flood):
        one.user = f"user {number % num_users}"
    with Engine(model, max_rows=2, max_waiting=6) as engine:
        engine.submit([one for one, _ in flood[:2]])
        wait_until(lambda: engine.num_running == 2)
        for one, _ in flood[2:]:
            engine.submit([one])
        large, _ = ticket(model, "a", "address", num_new=400)
        large.user = "user 0" if num_users == 1 else "user 90"
        with pytest.raises(QueueFull):
            engine.submit([large])
        small, listener = ticket(model, "b", "address", num_new=5)
        small.user = "small"
        engine.submit([small])
        # The youngest of the large ones is told when to come back.
        with pytest.raises(QueueFull, match="6 requests are waiting") as refused:
            flood[-1][1].wait()
        assert 1 <= refused.value.retry_after_s <= 60
        gate.permits.release(30)
        assert listener.wait() == model_text("b", 5)
        assert max(gate.forwards) == 3 and engine.num_running == 2
        gate.is_open = True
        gate.permits.release(1)
        expected = model_text("a", 400)
        assert [listener.wait(60) for _, listener in flood[:-1]] == [expected] * 7
    assert max(gate.forwards) == 3


def test_one_short_text_at_a_time_runs_beside_long_ones_and_none_beside_others():
    model, gate = gated()
    long = [ticket(model, "a", num_new=300) for _ in range(2)]
    short = [ticket(model, "b", num_new=5) for _ in range(4)]
    with Engine(model, max_rows=2) as engine:
        engine.submit([one for one, _ in long])
        wait_until(lambda: engine.num_running == 2)
        engine.submit([one for one, _ in short])
        gate.is_open = True
        gate.permits.release(1)
        assert [listener.wait(60) for _, listener in short] == [model_text("b", 5)] * 4
        assert [listener.wait(60) for _, listener in long] == [model_text("a", 300)] * 2
        assert max(gate.forwards) == 3
        gate.forwards.clear()
        middle = [ticket(model, "a", num_new=100) for _ in range(2)]
        more = [ticket(model, "b", num_new=5) for _ in range(4)]
        engine.submit([one for one, _ in middle])
        wait_until(lambda: engine.num_running == 2)
        engine.submit([one for one, _ in more])
        for _, listener in (*middle, *more):
            listener.wait(60)
        assert max(gate.forwards) == 2


def test_a_client_that_has_gone_gives_its_place_up_at_once():
    """Not only at the engine's next step, which a long prompt may delay."""
    model, gate = gated()
    with Engine(model, max_rows=1, max_waiting=1) as engine:
        engine.submit([ticket(model, "a")[0]])
        wait_until(lambda: engine.num_running == 1 and engine.num_waiting == 0)
        engine.submit([(gone := ticket(model, "a"))[0]])
        with pytest.raises(QueueFull):
            engine.submit([ticket(model, "a")[0]])
        gone[0].cancel()
        made, listener = ticket(model, "b")
        engine.submit([made])
        gate.is_open = True
        gate.permits.release(100)
        assert listener.wait() == model_text("b")


def wait_until(condition: Any, timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_beyond_the_queue_requests_are_refused_with_a_time_to_come_back():
    model, gate = gated()
    with Engine(model, max_rows=1, max_waiting=2) as engine:
        made = [ticket(model, "a") for _ in range(3)]
        engine.submit([made[0][0]])
        wait_until(lambda: engine.num_running == 1 or gate.permits._value == 0)
        wait_until(lambda: engine.num_waiting == 0)
        engine.submit([made[1][0], made[2][0]])
        with pytest.raises(QueueFull, match="2 requests are waiting") as refused:
            engine.submit([ticket(model, "b")[0]])
        assert 1 <= refused.value.retry_after_s <= 60
        gate.is_open = True
        gate.permits.release(100)
        assert [listener.wait() for _, listener in made] == [model_text("a")] * 3


def test_a_cancelled_row_is_gone_within_one_step_and_its_place_is_taken():
    model, gate = gated()
    first, second = ticket(model, "a", num_new=50), ticket(model, "b")
    with Engine(model, max_rows=1) as engine:
        engine.submit([first[0], second[0]])
        gate.permits.release(3)
        wait_until(lambda: len(gate.forwards) == 3)
        first[0].cancel()
        gate.is_open = True
        gate.permits.release(100)
        assert second[1].wait() == model_text("b")
        first[1].wait()
        assert first[1].log == ["cancelled"]
    # Its forward that was running, at most one more, then the other's six.
    assert len(gate.forwards) <= 3 + 1 + 6


def test_a_ticket_cancelled_while_it_waits_never_runs():
    model, gate = gated()
    first, second = ticket(model, "a"), ticket(model, "b")
    with Engine(model, max_rows=1) as engine:
        engine.submit([first[0], second[0]])
        second[0].cancel()
        gate.is_open = True
        gate.permits.release(100)
        assert first[1].wait() == model_text("a")
        assert second[1].wait() == ""
    assert second[0].started is None


def test_a_row_whose_time_is_up_ends():
    model, gate = gated()
    late, listener = ticket(model, "a", num_new=50)
    late.deadline = time.monotonic() + 0.05
    with Engine(model) as engine:
        engine.submit([late])
        time.sleep(0.06)
        gate.is_open = True
        gate.permits.release(100)
        listener.wait()
    assert listener.log == ["cancelled"] and late.is_late


def test_a_row_that_breaks_the_model_fails_alone_and_its_neighbours_lose_nothing():
    model, gate = gated()
    gate.is_open = True
    prompts = "abcdef"
    options = {"temperature": 1.0, "seed": 3}
    texts = [model_text(prompt, 12, **options) for prompt in prompts]
    # A token that only some of the texts hold.
    tokenizer = model.tokenizer
    poison = next(c for c in texts[0] if sum(c in t for t in texts) <= 3 and c in texts[0][:-1])
    gate.poison = tokenizer.encode(poison)[0]
    made = [ticket(model, prompt, num_new=12, **options) for prompt in prompts]
    with Engine(model, max_rows=6) as engine:
        engine.submit([one for one, _ in made])
        for (_, listener), text in zip(made, texts, strict=True):
            if poison in text[:-1]:
                with pytest.raises(BackendError, match="choked"):
                    listener.wait()
            else:
                assert listener.wait() == text


def test_a_listener_that_fails_ends_its_own_row_only():
    model, gate = gated()
    gate.is_open = True
    bad, good = ticket(model, "a", num_new=50), ticket(model, "b")

    def fail(event: Any) -> None:
        raise ValueError("nobody listens")

    bad[0].on_event = fail
    with Engine(model) as engine:
        engine.submit([bad[0], good[0]])
        assert good[1].wait() == model_text("b")
        wait_until(lambda: engine.num_running == 0)


def test_closing_finishes_what_runs_and_refuses_what_comes():
    model, gate = gated()
    one, listener = ticket(model, "a")
    engine = Engine(model)
    engine.start()
    engine.submit([one])
    closing = threading.Thread(target=engine.close, args=(10,))
    closing.start()
    wait_until(lambda: not engine.is_alive)
    with pytest.raises(ShuttingDown):
        engine.submit([ticket(model, "b")[0]])
    gate.is_open = True
    gate.permits.release(100)
    assert listener.wait() == model_text("a")
    closing.join(10)


def test_closing_cancels_what_takes_too_long():
    model, gate = gated()
    one, listener = ticket(model, "a", num_new=200)
    engine = Engine(model)
    engine.start()
    engine.submit([one])
    gate.permits.release(3)
    wait_until(lambda: len(gate.forwards) == 3)
    threading.Timer(0.2, gate.permits.release, (10,)).start()
    engine.close(0.05)
    listener.wait()
    assert listener.log == ["cancelled"]


def test_models_whose_rows_cannot_join_run_in_turns():
    model, gate = gated()
    gate._capabilities = replace(gate._capabilities, can_merge=False)
    gate.is_open = True
    made = [ticket(model, prompt) for prompt in LETTERS[:4]]
    with Engine(model) as engine:
        for one, _ in made:
            engine.submit([one])
        assert [listener.wait() for _, listener in made] == [model_text(p) for p in LETTERS[:4]]


def test_rows_with_other_experts_share_a_batch():
    model, gate = gated()
    gate.is_open = True
    wanted = [None, "one", {"two": 2.0}, {"one": 0.3, "two": 0.4}, {"one": 0.0}]
    made = [ticket(model, "a", experts=experts, num_new=9) for experts in wanted]
    with Engine(model) as engine:
        engine.submit([one for one, _ in made])
        assert [listener.wait() for _, listener in made] == [
            model_text("a", 9, experts=experts) for experts in wanted
        ]


@pytest.mark.parametrize("speculative", (False, True))
def test_drafts_change_no_text(speculative):
    model, gate = gated()
    gate.is_open = True
    made = [ticket(model, prompt, num_new=12) for prompt in LETTERS]
    with Engine(model, speculative=speculative) as engine:
        for one, _ in made:
            engine.submit([one])
            time.sleep(0.001)
        assert [listener.wait() for _, listener in made] == [model_text(p, 12) for p in LETTERS]


def test_a_prompt_that_begins_like_an_ended_text_is_read_from_there_on():
    model, gate = gated()
    gate.is_open = True
    first, listener = ticket(model, "ab" * 20, num_new=6)
    with Engine(model, kept_tokens=1000) as engine:
        engine.submit([first])
        text = listener.wait()
        before = gate.num_rows_run
        longer = "ab" * 20 + text + "cd"
        second, other = ticket(model, longer, num_new=6)
        neighbour, third = ticket(model, "ba", num_new=6)
        engine.submit([second, neighbour])
        assert (other.wait(), third.wait()) == (model_text(longer), model_text("ba"))
    # All but the last new token, which no model had read when the first text ended.
    assert second.num_reused == 40 + 5
    # What was new of the longer prompt; the neighbour's prompt counts once; then six tokens each.
    assert gate.num_rows_run - before == (len(longer) - 45) + 1 + 2 * 5


def test_only_so_many_tokens_of_ended_texts_are_remembered():
    model, gate = gated()
    gate.is_open = True
    with Engine(model, kept_tokens=90) as engine:
        for letter in "abc":
            one, listener = ticket(model, letter * 40, num_new=2)
            engine.submit([one])
            listener.wait()
        wait_until(lambda: engine.num_running == 0)
        assert [kept.num_tokens for _, kept in engine._kept] == [41, 41]
        again, listener = ticket(model, "a" * 40, num_new=2)
        engine.submit([again])
        assert listener.wait() == model_text("a" * 40, 2)
        assert again.num_reused == 0


def test_what_one_client_left_is_not_another_ones():
    """Otherwise the time of an answer would tell whether somebody else had asked the same."""
    model, gate = gated()
    gate.is_open = True
    with Engine(model, kept_tokens=1000) as engine:
        for client in ("one", "other"):
            made, listener = ticket(model, "ab" * 20, client)
            engine.submit([made])
            assert listener.wait() == model_text("ab" * 20)
            assert made.num_reused == 0
