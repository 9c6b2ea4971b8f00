"""What strangers, bad networks and broken models do to the server: it answers, forgets them, and goes on.

Everything runs on real sockets against toys; what clients rightly expect is in `test_server.py`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2 as httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from proxytune.backends.toy import ToyBackend
from proxytune.model import ProxyTuned
from proxytune.request import SamplingParams
from proxytune.server import run
from proxytune.server.engine import Engine
from proxytune.server.schema import ChatRequest, CompletionRequest
from proxytune.server.service import Service
from proxytune.testing import TOKENS, toy_model
from tests.server.test_engine import gated, ticket
from tests.support.served import Served, served

EXPERTS = {"one": 1.0, "two": 0.5}
BODY = {"model": "toy", "prompt": "ab", "max_tokens": 6, "temperature": 0}


def fresh(**options: Any) -> ProxyTuned:
    return toy_model(memory=0.5, eos_logit=-100.0, experts=EXPERTS, **options)


def text_of(prompt: str, num_new: int = 6, **sampling: Any) -> str:
    return fresh().generate(prompt, SamplingParams(max_new_tokens=num_new, **sampling)).text


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def checked_error(answer: httpx.Response) -> dict[str, Any]:
    """Return the error of an answer that has to have one, after a look at its shape."""
    assert 400 <= answer.status_code < 600
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["type"]
    assert all(isinstance(error[name], str | None) for name in ("param", "code"))
    for told in ("Traceback", ".py", str(Path(__file__).parents[2]), "site-packages"):
        assert told not in answer.text
    return error


# Connections ----------------------------------------------------------------------------------------


def head(path: str = "/v1/completions", *lines: str, length: int | None = None) -> bytes:
    """Return the head of a POST, or of a GET where there is no length."""
    method = "GET" if length is None else "POST"
    fields = ["Host: localhost", *lines]
    if length is not None:
        fields += ["Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""]).encode()


def post(body: Any, path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    return head(path, length=len(data)) + data


def read_all(connection: socket.socket, timeout_s: float = 10) -> bytes:
    """Return what comes until the server closes."""
    connection.settimeout(timeout_s)
    found = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return found
        if not piece:
            return found
        found += piece


def read_until(connection: socket.socket, end: bytes, timeout_s: float = 10) -> bytes:
    connection.settimeout(timeout_s)
    found = b""
    while end not in found:
        piece = connection.recv(65536)
        assert piece, f"the server closed after {found!r}"
        found += piece
    return found


def read_answer(connection: socket.socket) -> httpx.Response:
    """Return the next answer on a connection that goes on."""
    top = b""
    while not top.endswith(b"\r\n\r\n"):
        top += connection.recv(1)
    found = re.search(rb"content-length: (\d+)", top)
    assert found is not None, top
    return as_response(top + connection.recv(int(found[1]), socket.MSG_WAITALL))


def as_response(data: bytes) -> httpx.Response:
    """Return the first answer in what came over a connection."""
    top, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines]
    length = next((int(v) for k, v in headers if k.lower() == "content-length"), len(rest))
    return httpx.Response(int(first.split()[1]), content=rest[:length])


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(fresh(max_context=64), max_body_bytes=65536) as running:
        yield running


def complete(running: Served, **changes: Any) -> httpx.Response:
    return httpx.post(f"{running.url}/v1/completions", json=BODY | changes, timeout=20)


def assert_it_works(running: Served) -> None:
    assert complete(running).json()["choices"][0]["text"] == text_of("ab")


def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    monkeypatch.setattr(run, "HEAD_TIMEOUT_S", 0.3)
    with served(fresh()) as running, running.connect() as connection:
        started = time.monotonic()
        assert read_all(connection) == b""
        assert 0.2 < time.monotonic() - started < 5


def test_a_head_that_comes_in_drips_does_not_keep_its_connection_open(monkeypatch):
    monkeypatch.setattr(run, "HEAD_TIMEOUT_S", 0.5)
    with served(fresh()) as running, running.connect() as connection:
        started = time.monotonic()
        for byte in head()[:40]:
            try:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
            except OSError:
                break
        else:
            pytest.fail("the connection stayed open")
        assert time.monotonic() - started < 5


def test_a_second_head_that_never_ends_does_not_keep_its_connection_open(monkeypatch):
    monkeypatch.setattr(run, "HEAD_TIMEOUT_S", 0.3)
    with served(fresh()) as running, running.connect() as connection:
        connection.sendall(head("/health"))
        read_until(connection, b"}")
        time.sleep(0.5)  # between requests a connection may rest
        connection.sendall(head("/health")[:20])
        started = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - started < 5


def test_a_long_answer_outlives_the_time_for_a_head(monkeypatch):
    monkeypatch.setattr(run, "HEAD_TIMEOUT_S", 0.2)
    model, gate = gated()
    with served(model) as running, running.connect() as connection:
        connection.sendall(post(BODY))
        time.sleep(0.6)
        gate.is_open = True
        gate.permits.release(100)
        assert text_of("ab").encode() in read_until(connection, b"}}")


def test_a_body_that_comes_slowly_is_given_up():
    with served(fresh(), body_timeout_s=0.4) as running, running.connect() as connection:
        connection.sendall(head(length=1000))
        for _ in range(3):
            connection.sendall(b" " * 10)
            time.sleep(0.05)
        answer = as_response(read_all(connection))
        assert answer.status_code == 408 and "in time" in checked_error(answer)["message"]
        assert_it_works(running)


def test_the_answer_to_a_body_that_is_too_large_arrives(server):
    for size in (70_000, 900_000):
        answer = httpx.post(f"{server.url}/v1/completions", content=b"x" * size, timeout=20)
        assert answer.status_code == 413
        assert "65,536" in checked_error(answer)["message"]


def test_requests_that_come_at_once_on_one_connection_are_answered_in_their_order(server):
    with server.connect() as connection:
        prompts = ("ab", "c", "ad", "x")
        connection.sendall(b"".join(post(BODY | {"prompt": p}) for p in prompts))
        answers = [read_answer(connection) for _ in prompts]
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert texts == [text_of(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS, as to https://
        b"\x00" * 5000,
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA B: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_garbage_is_refused_and_ends_its_connection_alone(server, garbage):
    with server.connect() as connection:
        connection.sendall(garbage)
        answer = as_response(read_all(connection))
    assert answer.status_code in (400, 404)  # HTTP/2's first words are a request for "*"
    checked_error(answer)
    assert_it_works(server)


def test_more_connections_than_allowed_are_told_so():
    with served(fresh(), max_connections=4) as running:
        idle = [running.connect() for _ in range(10)]
        time.sleep(0.1)
        answer = complete(running)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.headers["connection"] == "close"
        checked_error(answer)
        for connection in idle:
            connection.close()
        wait_until(lambda: not running.server.server_state.connections)
        assert_it_works(running)


def test_one_connection_too_many_is_told_so_after_its_body():
    """Closed with a body unread, one in a hundred clients on a busy machine saw a reset and no answer."""
    pieces = [
        {"type": "http.request", "body": b"{}", "more_body": more} for more in (True, True, False)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        assert not sent, "it answered before it had read"
        return pieces.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(run._answer_too_many({"type": "http"}, receive, send))
    assert not pieces and sent[0]["status"] == 503


def test_one_connection_too_many_is_not_waited_for():
    with served(fresh(), max_connections=0) as running, running.connect() as connection:
        connection.sendall(head(length=16))
        found = read_all(connection, 2 * run.REFUSED_BODY_S)
        assert as_response(found).status_code == 503


# Readers that are slow, or gone ---------------------------------------------------------------------


def slow_connection(running: Served) -> socket.socket:
    """Return a connection whose end here takes next to nothing before it is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", running.port))
    return connection


WORDY = BODY | {"proxytune": {"explain": True, "explain_top": 20}, "stream": True}
"""Every token is some ten thousand bytes."""


def test_a_reader_that_does_not_read_slows_nobody_and_loses_its_rows():
    with (
        served(fresh(), send_timeout_s=1, max_tokens=100_000, max_rows=3) as running,
        slow_connection(running) as slow,
    ):
        slow.sendall(post(WORDY | {"max_tokens": 100_000}))
        wait_until(lambda: running.service.engine.num_running == 1)
        for _ in range(5):
            assert_it_works(running)
        wait_until(lambda: running.service.engine.num_running == 0, 20)
        wait_until(lambda: not running.server.server_state.connections, 20)
        assert_it_works(running)


@pytest.mark.parametrize("is_streamed", (True, False))
def test_a_reader_that_does_not_read_a_finished_answer_does_not_keep_its_connection(is_streamed):
    with (
        served(fresh(), send_timeout_s=1) as running,
        slow_connection(running) as slow,
    ):
        # More than the system takes for a client that does not read.
        slow.sendall(post(WORDY | {"max_tokens": 600, "stream": is_streamed}))
        wait_until(lambda: bool(running.server.server_state.tasks))
        wait_until(lambda: running.service.engine.num_running == 0, 60)
        wait_until(lambda: not running.server.server_state.connections, 20)


def test_a_slow_reader_gets_its_whole_stream():
    expected = text_of("ab", 200)
    with served(fresh(), send_timeout_s=2) as running, slow_connection(running) as slow:
        slow.sendall(post(WORDY | {"max_tokens": 200}))
        found = b""
        while b"[DONE]" not in found:
            time.sleep(0.001)
            found += slow.recv(16384)
    body = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", found.partition(b"\r\n\r\n")[2])
    events = [e for e in body.split(b"data: ")[1:] if e.startswith(b"{")]
    pieces = [json.loads(event)["choices"][0]["text"] for event in events]
    assert "".join(pieces) == expected


@pytest.mark.parametrize("is_streamed", (False, True))
@pytest.mark.parametrize("is_reset", (False, True))
def test_the_row_of_a_client_that_vanished_is_free_within_two_steps(is_streamed, is_reset):
    model, gate = gated()
    answers: list[httpx.Response] = []
    with served(model, max_tokens=1000) as running, running.connect() as connection:
        connection.sendall(post(BODY | {"max_tokens": 1000, "stream": is_streamed}))
        wait_until(lambda: running.service.engine.num_running == 1)
        other = threading.Thread(
            target=lambda: answers.append(complete(running, prompt="c", max_tokens=30))
        )
        other.start()
        wait_until(lambda: running.service.engine.num_waiting == 1)
        gate.permits.release(6)
        wait_until(lambda: len(gate.forwards) == 6)
        assert gate.forwards[-1] == 2 and running.service.engine.num_running == 2
        if is_reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        wait_until(lambda: len(running.server.server_state.connections) == 1)
        time.sleep(0.05)
        # The engine may have begun a step before the client went; the next one has a row less.
        gate.permits.release(2)
        wait_until(lambda: len(gate.forwards) == 8)
        assert gate.forwards[-1] == 1
        wait_until(lambda: running.service.engine.num_running == 1)
        gate.is_open = True
        gate.permits.release(1000)
        other.join(10)
    assert answers[0].json()["choices"][0]["text"] == text_of("c", 30)


def test_a_client_that_vanishes_while_it_waits_leaves_the_queue():
    model, gate = gated()
    with served(model, max_rows=1) as running, running.connect() as first:
        first.sendall(post(BODY | {"max_tokens": 100}))
        wait_until(lambda: running.service.engine.num_running == 1)
        with running.connect() as second:
            second.sendall(post(BODY))
            wait_until(lambda: running.service.engine.num_waiting == 1)
        waiting = running.service.engine._waiting
        wait_until(lambda: all(each.is_cancelled for each in waiting))
        gate.permits.release(2)
        wait_until(lambda: running.service.engine.num_waiting == 0)
        gate.is_open = True
        gate.permits.release(1000)
        read_until(first, b"}}")
        assert max(gate.forwards) == 1


def test_texts_of_clients_that_vanished_are_counted():
    model, gate = gated()
    with served(model) as running:
        for is_streamed in (False, True):
            with running.connect() as connection:
                connection.sendall(post(BODY | {"max_tokens": 100, "stream": is_streamed}))
                wait_until(lambda: running.service.engine.num_running == 1)
                gate.permits.release(3)
            gate.permits.release(50)
            wait_until(lambda: running.service.engine.num_running == 0)
            gate.permits = threading.Semaphore(0)
        wait_until(
            lambda: (
                'proxytune_texts_total{reason="cancelled"} 2.0'
                in httpx.get(f"{running.url}/metrics").text
            )
        )


# Stopping -------------------------------------------------------------------------------------------


def test_a_server_told_to_stop_finishes_its_streams_and_takes_nothing_new():
    model, gate = gated()
    with served(model) as running, running.connect() as stream, running.connect() as idle:
        stream.sendall(post(BODY | {"stream": True}))
        gate.permits.release(2)
        read_until(stream, b"data: ")
        running.server.should_exit = True
        wait_until(lambda: not running.service.engine.is_alive)
        assert read_all(idle) == b""
        with pytest.raises(OSError):
            running.connect()
        gate.is_open = True
        gate.permits.release(100)
        assert read_until(stream, b"[DONE]")
        running.thread.join(10)
        assert not running.thread.is_alive()


@pytest.mark.parametrize("is_streamed", (False, True))
def test_what_takes_too_long_to_finish_is_told_that_the_server_stops(is_streamed, caplog):
    model, gate = gated()
    with served(model, shutdown_timeout_s=1) as running, running.connect() as connection:
        connection.sendall(post(BODY | {"max_tokens": 1000, "stream": is_streamed}))
        wait_until(lambda: running.service.engine.num_running == 1)

        def go_on() -> None:
            while running.thread.is_alive():
                gate.permits.release()
                time.sleep(0.02)

        threading.Thread(target=go_on, daemon=True).start()
        running.server.should_exit = True
        started = time.monotonic()
        found = read_all(connection)
        running.thread.join(10)
        assert time.monotonic() - started < 6 and not running.thread.is_alive()
    if is_streamed:
        events = re.findall(rb"data: (\{.*\})\n", found)
        assert json.loads(events[-1])["error"]["code"] == "shutting_down"
        assert b"[DONE]" in found
    else:
        answer = as_response(found)
        assert answer.status_code == 503
        assert checked_error(answer)["code"] == "shutting_down"
    assert "Traceback" not in caplog.text


# Failures inside ------------------------------------------------------------------------------------


class Fragile(ToyBackend):
    """A toy that fails, in no way that anybody foresaw, wherever a certain token is read."""

    def __init__(self, inner: ToyBackend) -> None:
        self.__dict__.update(inner.__dict__)
        self.poison: int | None = None

    def extend(self, state: Any, token_ids: torch.Tensor) -> torch.Tensor:
        if self.poison is not None and bool((token_ids == self.poison).any()):
            raise RuntimeError(f"index {self.poison} is out of bounds in {__file__}")
        time.sleep(0.001)
        return super().extend(state, token_ids)


@contextmanager
def fragile(**changes: Any) -> Iterator[tuple[Served, Fragile]]:
    model = fresh()
    base = model.ensemble.members[0]
    backend = Fragile(base.backend)  # type: ignore[arg-type]
    members = (replace(base, backend=backend), *model.ensemble.members[1:])
    model.ensemble = replace(model.ensemble, members=members)
    with served(model, **changes) as running:
        yield running, backend


@pytest.mark.parametrize("is_streamed", (False, True))
def test_a_model_that_breaks_on_one_text_harms_no_other(is_streamed):
    prompts = "abcdefgh"
    sampling = {"temperature": 1.0, "seed": 3}
    texts = {prompt: text_of(prompt, 24, **sampling) for prompt in prompts}
    poison = min(TOKENS, key=lambda t: abs(2.5 - sum(t in text[:-1] for text in texts.values())))
    hit = {prompt for prompt in prompts if poison in texts[prompt][:-1]}
    assert 1 <= len(hit) <= 5
    found: dict[str, Any] = {}
    with fragile() as (running, backend):
        backend.poison = TOKENS.index(poison)

        def ask(prompt: str) -> None:
            body = BODY | sampling | {"prompt": prompt, "max_tokens": 24, "stream": is_streamed}
            found[prompt] = httpx.post(f"{running.url}/v1/completions", json=body, timeout=20)

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for prompt, answer in found.items():
            if is_streamed:
                *events, last = re.findall(r"data: (.*)\n", answer.text)
                assert last == "[DONE]"
                chunks = [json.loads(event) for event in events]
                error = chunks.pop()["error"] if "error" in chunks[-1] else None
                text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            elif answer.status_code == 200:
                error, text = None, answer.json()["choices"][0]["text"]
            else:
                error, text = checked_error(answer), ""
            if prompt in hit:
                assert error is not None and error["type"] == "server_error"
                assert "bounds" not in error["message"] and __file__ not in error["message"]
                assert texts[prompt].startswith(text)
            else:
                assert error is None and text == texts[prompt]
        backend.poison = None
        assert_it_works(running)


def test_a_bug_of_the_engine_is_told_to_who_waits_and_the_next_request_works():
    model, gate = gated()
    with served(model) as running:
        engine = running.service.engine
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(complete(running))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: engine.num_running + engine.num_waiting == 3)
        found = engine._step

        def fail(*_: Any) -> bool:
            engine._step = found  # type: ignore[method-assign]
            raise IndexError(f"list index out of range in {__file__}")

        engine._step = fail  # type: ignore[method-assign]
        gate.is_open = True
        gate.permits.release(1000)
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {500}
        assert "index" not in checked_error(answers[0])["message"]
        assert (engine.num_running, engine.num_waiting) == (0, 0)
        assert_it_works(running)


def test_a_bug_in_the_books_of_steps_harms_no_text(monkeypatch):
    def fail(*_: Any) -> None:
        raise ValueError("no such counter")

    with served(fresh()) as running:
        monkeypatch.setattr(running.service.metrics, "count_step", fail)
        assert_it_works(running)


def test_a_bug_in_a_route_is_answered_as_an_error(server, monkeypatch):
    def fail(self: Service) -> None:
        raise KeyError(__file__)

    monkeypatch.setattr(Service, "about", fail)
    answer = httpx.get(f"{server.url}/v1/proxytune")
    assert answer.status_code == 500
    assert checked_error(answer)["type"] == "server_error"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_text_whose_batch_fails_while_the_server_gives_up_is_cancelled_too():
    """Between two lists, such a text used to be overlooked, and the server waited for its end."""
    model, gate = gated()
    engine = Engine(model)
    is_giving_up, found, extend = threading.Event(), engine._fail, gate.extend

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("once")

    def fail(tickets: Any, error: Exception) -> None:
        is_giving_up.wait(10)
        time.sleep(0.1)
        gate.extend = extend  # type: ignore[method-assign]
        found(tickets, error)

    engine._fail = fail  # type: ignore[method-assign]
    made = [ticket(model, prompt, num_new=5000) for prompt in "ab"]
    engine.start()
    engine.submit([one for one, _ in made])
    gate.permits.release(4)
    wait_until(lambda: len(gate.forwards) == 4)
    gate.extend = broken  # type: ignore[method-assign]
    gate.is_open = True
    gate.permits.release(5000)
    closing = threading.Thread(target=engine.close, args=(0.1,))
    closing.start()
    time.sleep(0.3)
    is_giving_up.set()
    started = time.monotonic()
    closing.join(20)
    for _, listener in made:
        listener.wait()
        assert listener.log == ["cancelled"]
    assert time.monotonic() - started < 2


# Generated requests ---------------------------------------------------------------------------------

NAMES = ("toy", "toy:one", "toy:two")
PATHS = ("/v1/completions", "/v1/chat/completions")
MODELS = {"/v1/completions": "CompletionRequest", "/v1/chat/completions": "ChatRequest"}
PLAIN = "ab .\n:U"
"""Characters that the toy has tokens for."""
JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.sampled_from((10**400, -(10**400), 2**31, -1, 0)),
        st.floats(),
        st.text(st.characters(codec=None), max_size=20),
        st.sampled_from(("\ud800", "\x00", "\u202e", "a" * 5000, "NaN", "1", "")),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(st.characters(codec=None), max_size=8), inner, max_size=4),
        inner.map(lambda value: [[[[[[value]]]]]]),
    ),
    max_leaves=6,
)
"""Any JSON, and what Python's parser takes beyond it: NaN, infinities, halves of surrogate pairs."""


class Documented:
    """Values as the application's own OpenAPI documents them.

    Args:
        schemas: Of its components.
    """

    def __init__(self, schemas: dict[str, Any]) -> None:
        self._schemas = schemas

    def body(self, name: str) -> st.SearchStrategy[dict[str, Any]]:
        """Return bodies with some of their fields, the needed ones among them; texts are short."""
        schema = self._schemas[name]
        fields = {key: self.value(value, key) for key, value in schema["properties"].items()}
        needed = schema.get("required", ())
        others = [key for key in fields if key not in needed]
        # A few at a time: all at once, they would contradict each other.
        return st.lists(st.sampled_from(others or [""]), max_size=4, unique=True).flatmap(
            lambda chosen: st.fixed_dictionaries(
                {key: fields[key] for key in (*needed, *chosen) if key}
            )
        )

    def value(self, schema: dict[str, Any], name: str = "") -> st.SearchStrategy[Any]:
        """Return values of a schema; some fields are mostly what this server knows."""
        if name == "model":
            return st.sampled_from((*NAMES * 6, "other"))
        if name == "expert":
            return st.sampled_from(("one", "two", "one", "two", "three", None))
        if name in ("max_tokens", "max_completion_tokens", "n_predict"):
            return st.integers(1, 12)
        if "$ref" in schema:
            return self.body(schema["$ref"].rsplit("/", 1)[-1])
        if "anyOf" in schema:
            return st.one_of([self.value(each, name) for each in schema["anyOf"]])
        if "const" in schema:
            return st.just(schema["const"])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        return getattr(self, f"_{schema['type']}")(schema) if "type" in schema else JUNK

    def _null(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        return st.none()

    def _boolean(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        return st.booleans()

    def _integer(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        low = schema.get("minimum", -(2**80))
        high = schema.get("maximum", schema.get("exclusiveMaximum", 2**80 + 1) - 1)
        small = st.integers(low, min(high, low + 30))
        return st.one_of(small, small, small, small, st.integers(low, high))

    def _number(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        return st.floats(
            schema.get("minimum", schema.get("exclusiveMinimum")),
            schema.get("maximum"),
            exclude_min="exclusiveMinimum" in schema,
            allow_nan=False,
        )

    def _string(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        if "pattern" in schema:
            return st.integers(0, 40).map(str)
        low, high = schema.get("minLength", 0), min(schema.get("maxLength", 12), 12)
        plain = st.text(PLAIN, min_size=max(1, low), max_size=high)
        return st.one_of(plain, plain, plain, plain, st.text(min_size=low, max_size=high))

    def _array(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        low, high = schema.get("minItems", 0), min(schema.get("maxItems", 3), 3)
        return st.lists(self.value(schema["items"]), min_size=low, max_size=high)

    def _object(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        keys = st.one_of(st.sampled_from(("one", "two")), st.text(min_size=1, max_size=8))
        if "pattern" in schema.get("propertyNames", {}):
            keys = self._string(schema["propertyNames"])
        own = schema.get("additionalProperties", {})
        values = self.value({} if own is True else own)
        return st.dictionaries(keys, values, min_size=schema.get("minProperties", 0), max_size=3)


@pytest.fixture(scope="module")
def documented(server: Served) -> Documented:
    return Documented(httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"])


@pytest.fixture(scope="module")
def stranger(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


def no_json(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def check_generated(body: Any, path: str, answer: httpx.Response) -> None:
    """Assert that an answer to a request that was taken is whole."""
    is_chat = "chat" in path
    num_choices = body.get("n", 1)
    if not is_chat and isinstance(body["prompt"], list) and not isinstance(body["prompt"][0], int):
        num_choices *= len(body["prompt"])
    if not body.get("stream"):
        found = json.loads(answer.content, parse_constant=no_json)
        assert [choice["index"] for choice in found["choices"]] == list(range(num_choices))
        for choice in found["choices"]:
            assert choice["finish_reason"] in ("stop", "length")
            assert isinstance(choice["message"]["content"] if is_chat else choice["text"], str)
        usage = found["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        return
    *events, last = re.findall(r"data: (.*)\n\n", answer.text)
    assert last == "[DONE]"
    chunks = [json.loads(event, parse_constant=no_json) for event in events]
    ends = [c for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(end["index"] for end in ends) == list(range(num_choices))


def send(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    answer = client.post(
        path, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    if answer.status_code == 200:
        check_generated(body, path, answer)
    else:
        assert answer.status_code in (400, 404)
        checked_error(answer)
    return answer


@pytest.mark.parametrize("path", PATHS)
def test_documented_requests_get_whole_answers_or_are_told_why_not(path, documented, stranger):
    statuses = []

    @settings(max_examples=80)
    @given(documented.body(MODELS[path]))
    def ask(body: Any) -> None:
        statuses.append(send(stranger, path, body).status_code)

    ask()
    assert len(statuses) >= 80 and statuses.count(200) > 20


@pytest.mark.parametrize("path", PATHS)
def test_a_field_with_any_junk_in_it_is_honoured_or_named(path, documented, stranger):
    good: dict[str, Any] = {"model": "toy", "max_tokens": 3}
    if "chat" in path:
        good["messages"] = [{"role": "user", "content": "ab"}]
    else:
        good["prompt"] = "ab"
    fields = list(documented._schemas[MODELS[path]]["properties"])
    statuses = []

    @settings(max_examples=60)
    @given(st.sampled_from((*fields, *fields, "unknown", "proxytune.alpha", "proxytune.x")), JUNK)
    def ask(field: str, junk: Any) -> None:
        first, _, second = field.partition(".")
        answer = send(stranger, path, good | {first: {second: junk} if second else junk})
        statuses.append(answer.status_code)
        if answer.status_code != 200:
            error = checked_error(answer)
            told = f"{error['message']} {error['param']}"
            # The toy's tokenizer stands for one that reads any text.
            assert first in told or "tokenizer" in told or f"{junk!r}"[1:-1] in told

    ask()
    assert len(statuses) >= 60 and 0 < statuses.count(200) < 40


BROKEN = st.one_of(
    st.binary(max_size=200),
    st.integers(0, 60).map(lambda cut: json.dumps(BODY).encode()[:cut]),
    st.tuples(st.integers(0, 60), st.binary(min_size=1, max_size=3)).map(
        lambda at: json.dumps(BODY).encode()[: at[0]] + at[1] + json.dumps(BODY).encode()[at[0] :]
    ),
    st.sampled_from((b"[", b'{"a":', b"[[1,", b'{"prompt":{"a":')).map(lambda piece: piece * 9000),
    st.sampled_from(
        (b"[]", b"0", b'"x"', b"null", b"NaN", b"{}", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}")
    ),
    st.integers(4000, 6000).map(
        lambda size: b'{"model": "toy", "prompt": "a", "seed": ' + b"9" * size + b"}"
    ),
    st.integers(60_000, 70_000).map(
        lambda size: json.dumps(BODY | {"prompt": "a" * size}).encode()
    ),
)
KINDS = st.sampled_from(
    (
        "application/json",
        "application/json; charset=utf-16",
        "application/json; charset=nonsense",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain",
        "image/png",
        "nonsense",
        "",
        None,
    )
)


def test_bodies_that_are_no_requests_are_refused(stranger):
    statuses = []

    @settings(max_examples=60)
    @given(st.sampled_from(PATHS), BROKEN, KINDS)
    def ask(path: str, body: bytes, kind: str | None) -> None:
        headers = {} if kind is None else {"Content-Type": kind}
        answer = stranger.post(path, content=body, headers=headers)
        statuses.append(answer.status_code)
        # One byte more may still be a request, such as a space between two fields.
        assert answer.status_code in (200, 400, 404, 413)
        if answer.status_code != 200:
            checked_error(answer)

    ask()
    assert len(statuses) >= 60 and statuses.count(200) < 10 and statuses.count(413) > 2


HEADER_NAMES = (
    *("Authorization", "Accept", "Accept-Encoding", "Cookie", "Origin", "Range", "Expect", "Te"),
    *("X-Forwarded-For", "X-Http-Method-Override", "If-Modified-Since", "Upgrade"),
)


def test_any_path_method_and_header_is_answered(server, stranger):
    statuses = []
    path = st.one_of(
        st.sampled_from(("/", "/health", "/version", "/metrics", "/v1/models", "/v1/proxytune")),
        st.text(st.characters(codec="utf-8"), max_size=20).map(lambda t: f"/v1/models/{t}"),
        st.text(st.characters(codec="utf-8"), max_size=20).map(lambda t: f"/{t}"),
        st.sampled_from(
            ("/../../etc/passwd", "/v1/models/%2e%2e%2fx", "/%ff", "//", "/v1//models", "/?a=%00")
        ),
    )
    method = st.sampled_from(
        ("GET", "GET", "GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND")
    )
    value = st.text(st.characters(min_codepoint=33, max_codepoint=255), min_size=1, max_size=40)
    headers = st.dictionaries(st.sampled_from(HEADER_NAMES), value, max_size=4)

    @settings(max_examples=60)
    @given(method, path, headers)
    def ask(method: str, path: str, headers: dict[str, str]) -> None:
        answer = stranger.request(
            method,
            httpx.URL(server.url).copy_with(raw_path=quote(path, safe="/%?=").encode()),
            headers=[(name.encode(), text.encode("latin-1")) for name, text in headers.items()],
        )
        statuses.append(answer.status_code)
        assert answer.status_code in (200, 307, 404, 405, 417)
        if answer.status_code >= 400 and method != "HEAD":
            checked_error(answer)

    ask()
    assert len(statuses) >= 60


def test_real_tokenizers_never_meet_what_is_no_text():
    """One half of a surrogate pair used to reach the tokenizer, whose error was a 500."""
    for prompt in ("a\ud800", ["a", "\udfff"]):
        with pytest.raises(ValidationError, match="surrogate"):
            CompletionRequest.model_validate(BODY | {"prompt": prompt})
    message = {"role": "user", "content": [{"type": "text", "text": "\ud800"}]}
    with pytest.raises(ValidationError, match="surrogate"):
        ChatRequest.model_validate({"model": "toy", "messages": [message]})


def test_numbers_are_not_read_out_of_texts_and_truths(server):
    for changes, name in (
        ({"temperature": "1"}, "temperature"),
        ({"min_p": True}, "min_p"),
        ({"logit_bias": {"1": "3"}}, "logit_bias"),
        ({"proxytune": {"alpha": True}}, "proxytune.alpha"),
        ({"proxytune": {"experts": {"one": "1"}}}, "proxytune.experts"),
        ({"stream_options": {}}, "stream_options"),
    ):
        answer = complete(server, **changes)
        assert answer.status_code == 400 and name in checked_error(answer)["message"]


# Strangers ------------------------------------------------------------------------------------------

KEYS = ("first-key-of-a-customer", "second-key-of-another")


def test_wrong_keys_are_refused_after_comparing_all_in_constant_time(monkeypatch):
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    wrong: list[bytes] = [
        b"",
        b"Bearer",
        b"Bearer wrong",
        b"Bearer \xff\xfe",
        b"Basic Og==",
    ]
    wrong += [
        KEYS[0].encode(),
        f"Bearer {KEYS[0][:-1]}".encode(),
        f"Bearer {KEYS[0]} ".encode() + b"x",
    ]
    wrong += [f"Bearer {KEYS[0].upper()}".encode(), f"Bearer {','.join(KEYS)}".encode()]
    with served(fresh(), api_keys=KEYS) as running:
        for header in wrong:
            for path in ("/v1/models", "/v1/models/toy", "/v1/proxytune"):
                compared.clear()
                answer = httpx.get(running.url + path, headers=[(b"Authorization", header)])
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                error = checked_error(answer)
                assert not any(key in answer.text for key in KEYS) and "key" in error["message"]
                # Digests of one length, and no end at the first that fits.
                assert len(compared) == len(KEYS)
                assert {len(each) for pair in compared for each in pair} == {32}
            for path in PATHS:
                answer = httpx.post(
                    running.url + path, json=BODY, headers=[(b"Authorization", header)]
                )
                assert answer.status_code == 401
        compared.clear()
        right = {"Authorization": f"Bearer {KEYS[0]}"}
        assert httpx.get(f"{running.url}/v1/models", headers=right).status_code == 200
        assert len(compared) == len(KEYS)
        answer = httpx.post(f"{running.url}/v1/completions", json={"model": 5}, headers=right)
        assert answer.status_code == 400 and KEYS[0] not in answer.text


def test_nobody_without_a_key_learns_what_a_field_should_be():
    with served(fresh(), api_keys=KEYS) as running:
        answer = httpx.post(f"{running.url}/v1/completions", json={"model": 5})
        assert answer.status_code == 401


@pytest.mark.parametrize(
    ("name", "status"),
    [
        (b"localhost", 200), (b"LOCALHOST:8000", 200), (b"127.0.0.1:1", 200), (b"[::1]:8000", 200),
        (b"evil.example", 421), (b"localhost.evil.example", 421), (b"127.0.0.1.evil.example:8000", 421),
        (b"evil.example:8000", 421), (b"", 421), (b"0.0.0.0", 421), (b"local\xe9", 421),
    ],
)  # fmt: skip
def test_on_loopback_only_names_of_this_machine_are_answered(name, status):
    """A page of another site may have had its name resolved to this machine (DNS rebinding)."""
    hosts = ("localhost", "127.0.0.1", "::1")
    with served(fresh(), hosts=hosts) as running:
        for path in ("/", "/health", "/metrics", "/v1/models", "/nowhere"):
            with running.connect() as connection:
                connection.sendall(
                    b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n"
                    % (path.encode(), name)
                )
                answer = as_response(read_all(connection))
            assert answer.status_code == (404 if (path, status) == ("/nowhere", 200) else status)
            if status == 421:
                checked_error(answer)


def test_pages_of_other_sites_can_neither_read_nor_ask_unless_allowed():
    origin = "https://page.example"
    asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    with served(fresh()) as running:
        for answer in (
            httpx.options(f"{running.url}/v1/completions", headers=asks),
            httpx.get(f"{running.url}/v1/models", headers={"Origin": origin}),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control")]
        # What a page may send without asking first is no JSON to a browser.
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/x-www-form-urlencoded;a=+json",
            "multipart/form-data",
            "",
        ):
            headers = {"Origin": origin} | ({"Content-Type": kind} if kind else {})
            answer = httpx.post(
                f"{running.url}/v1/completions", content=json.dumps(BODY), headers=headers
            )
            assert answer.status_code == 400
            assert "application/json" in checked_error(answer)["message"]
    with served(fresh(), cors_origins=(origin,)) as running:
        answer = httpx.options(f"{running.url}/v1/completions", headers=asks)
        assert answer.headers["access-control-allow-origin"] == origin
        for method in ("GET", "DELETE"):
            asked = asks | {"Access-Control-Request-Method": method}
            asked["Access-Control-Request-Headers"] = "x-api-key, anthropic-version, x-request-id"
            answer = httpx.options(f"{running.url}/v1/responses/a", headers=asked)
            assert (
                answer.status_code == 200
                and method in answer.headers["access-control-allow-methods"]
            )
        other = httpx.get(f"{running.url}/v1/models", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("log_prompts", (False, True))
def test_prompts_and_keys_are_in_the_log_only_if_asked(log_prompts, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "abacadabab"
    with served(fresh(), api_keys=KEYS, log_prompts=log_prompts) as running:
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        for changes in ({}, {"stream": True}, {"temperature": -1}, {"max_tokens": -2}):
            body = BODY | {"prompt": secret} | changes
            httpx.post(f"{running.url}/v1/completions", json=body, headers=headers)
        body = {"model": "toy", "messages": [{"role": "user", "content": secret}], "max_tokens": 2}
        httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=headers)
    own = [r.getMessage() for r in caplog.records if r.name.startswith(("proxytune", "uvicorn"))]
    assert any("POST /v1/completions 200" in line for line in own)
    assert (secret in "\n".join(own)) == log_prompts
    assert KEYS[0] not in caplog.text


def test_a_line_of_the_log_is_one_line_whatever_was_asked(caplog):
    caplog.set_level(logging.INFO)
    with served(fresh(), log_prompts=True) as running:
        complete(running, prompt="a\nb", user="x\r\nINFO forged")
        httpx.get(f"{running.url}/nowhere%0aINFO%20forged")
    lines = [r.getMessage() for r in caplog.records if r.name == "proxytune.server"]
    assert len(lines) == 3 and not any("\n" in line or "\r" in line for line in lines)


def test_the_page_may_run_its_own_script_and_talk_to_its_own_server_only(server):
    answer = httpx.get(server.url)
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for name in ("script", "style"):
        assert "unsafe" not in policy[f"{name}-src"] and "http" not in policy[f"{name}-src"]
        found = re.findall(rf"<{name}>(.*?)</{name}>", answer.text, re.DOTALL)
        assert len(found) == 1 and len(re.findall(rf"<{name}\b", answer.text)) == 1
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"(src|href)=[\"']?https?:", answer.text)


def test_the_place_of_a_cancelled_row_is_taken_before_the_next_step():
    """It used to be free only after that step, in which the others ran with a place empty."""
    model, gate = gated()
    made = [ticket(model, prompt, num_new=20) for prompt in "abc"]
    entered, found = [], gate._pass

    def enter(num_rows: int) -> None:
        entered.append(num_rows)
        found(num_rows)

    gate._pass = enter  # type: ignore[method-assign]
    with Engine(model, max_rows=2) as engine:
        engine.submit([one for one, _ in made[:2]])
        engine.submit([made[2][0]])
        gate.permits.release(3)
        wait_until(lambda: len(entered) == 4)
        made[0][0].cancel()  # while the fourth forward waits
        gate.permits.release(3)
        wait_until(lambda: len(gate.forwards) == 6)
        assert gate.forwards[:4] == [2, 2, 2, 2]
        assert gate.forwards[4:] == [1, 2]  # the third one's prompt, then two rows as before
        gate.is_open = True
        gate.permits.release(100)
        expected = [fresh().generate(p, SamplingParams(max_new_tokens=20)).text for p in "abc"]
        texts = [listener.wait() for _, listener in made]
        assert texts[1:] == expected[1:] and expected[0].startswith(texts[0])


@pytest.mark.parametrize("fails_late", (False, True))
def test_a_text_that_fails_on_what_an_earlier_one_left_begins_anew(fails_late):
    """Only what was kept is to blame; the request used to be told that the models failed."""
    model, gate = gated()
    gate.is_open = True
    prompt = "abcd" * 20
    with Engine(model, kept_tokens=1000) as engine:
        first = ticket(model, prompt)
        engine.submit([first[0]])
        first[1].wait()
        second = ticket(model, prompt + "ef")
        rewind, extend, num_left = gate.rewind, gate.extend, 2

        def broken_rewind(*arguments: Any) -> None:
            nonlocal num_left
            if not fails_late:
                gate.rewind = rewind  # type: ignore[method-assign]
                raise RuntimeError("the positions do not fit")
            rewind(*arguments)

        def broken_extend(*arguments: Any) -> torch.Tensor:
            nonlocal num_left
            num_left -= 1
            if fails_late and num_left < 0:
                gate.extend = extend  # type: ignore[method-assign]
                raise RuntimeError("the positions do not fit")
            return extend(*arguments)

        gate.rewind, gate.extend = broken_rewind, broken_extend  # type: ignore[method-assign]
        engine.submit([second[0]])
        expected = fresh().generate(prompt + "ef", SamplingParams(max_new_tokens=6)).text
        assert second[1].wait() == expected
        assert second[0].num_reused == 0
        assert gate.rewind == rewind if not fails_late else gate.extend == extend
