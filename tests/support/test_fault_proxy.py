"""The proxy that hurts answers does what each fault says, as often as it says, and lets the others pass."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, NamedTuple

import pytest

from proxytune.backends.toy import ToyBackend
from proxytune.testing import toy_table, toy_tokenizer
from tests.support.completion_server import CompletionServer
from tests.support.fault_proxy import (
    HARMLESS_KINDS,
    KINDS,
    STREAM_KINDS,
    Fault,
    FaultProxy,
    random_faults,
)

BODY: dict[str, Any] = {"prompt": "abc", "max_tokens": 4, "temperature": 0, "logprobs": 1}
STREAM = BODY | {"stream": True}


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


@contextlib.contextmanager
def proxied(
    plan: Iterable[Fault | None] = (), **options: Any
) -> Iterator[tuple[CompletionServer, FaultProxy]]:
    """Yield a toy's server and a proxy before it, which is checked at the end."""
    backend = ToyBackend(toy_table(0, eos_logit=-100.0))
    with (
        CompletionServer(backend, toy_tokenizer()) as server,
        FaultProxy(server.url, plan, **options) as proxy,
    ):
        yield server, proxy
        assert not server.failures and not proxy.failures
        assert proxy.faults_injected == sum(fault is not None for fault in proxy.log)
        assert proxy.counts == Counter(fault.kind for fault in proxy.log if fault is not None)


def connect(proxy: FaultProxy, *, timeout_s: float = 10.0) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=timeout_s)


def ask(connection: http.client.HTTPConnection, body: dict[str, Any] = BODY) -> Answer:
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse()
    return Answer(answer.status, answer.headers, answer.read())


def essence(answer: Answer) -> Any:
    """Return what two answers to one request have in common."""
    return json.loads(answer.body)["choices"] if answer.status == 200 else answer


def right_answer(body: dict[str, Any] = BODY) -> Any:
    with proxied() as (_, proxy):
        return essence(ask(connect(proxy), body))


def events(body: bytes) -> list[bytes]:
    return [event for event in body.split(b"\n\n") if event]


def test_without_faults_answers_pass_unchanged_over_one_kept_connection():
    with proxied() as (server, proxy):
        direct = http.client.HTTPConnection("127.0.0.1", server.port)
        connection = connect(proxy)
        for _ in range(2):
            expected, answer = ask(direct), ask(connection)
            assert essence(answer) == essence(expected)
            assert answer.headers["Content-Type"] == expected.headers["Content-Type"]
        connection.request("GET", "/v1/models")
        direct.request("GET", "/v1/models")
        assert connection.getresponse().read() == direct.getresponse().read()
        refused = ask(connection, {"prompt": ""})
        assert refused.status == 400
        assert server.bodies == [BODY, BODY, BODY, BODY, {"prompt": ""}]
        assert (proxy.num_requests, proxy.faults_injected) == (4, 0)


def test_without_faults_a_stream_passes_piece_by_piece():
    """The server waits within its answer until the client has read the first event."""
    may_go_on = threading.Event()

    class Patient(ToyBackend):
        def extend(self, state, token_ids):
            assert may_go_on.wait(10)
            return super().extend(state, token_ids)

    backend = Patient(toy_table(0, eos_logit=-100.0))
    with CompletionServer(backend, toy_tokenizer()) as server, FaultProxy(server.url) as proxy:
        connection = connect(proxy)
        connection.request("POST", "/v1/completions", json.dumps(STREAM))
        answer = connection.getresponse()
        first = answer.readline()
        may_go_on.set()
        rest = answer.read()
    assert len(events(first + rest)) == 5 and rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("kind", ["delay", "stall", "duplicate"])
@pytest.mark.parametrize("body", [BODY, STREAM])
def test_a_slow_answer_is_the_right_one(kind, body):
    with proxied([Fault(kind, seconds=0.1)]) as (server, proxy):
        connection = connect(proxy)
        start = time.monotonic()
        slow = ask(connection, body)
        assert time.monotonic() - start >= 0.1
        assert proxy.counts == {kind: 1}
        quick = ask(connect(proxy), body)
        assert server.num_requests == 2
    if body is BODY:
        assert essence(slow) == essence(quick)
    else:
        assert len(events(slow.body)) == len(events(quick.body)) == 5
        assert slow.body.endswith(b"data: [DONE]\n\n")


def test_a_stall_shows_the_first_part_at_once():
    with proxied([Fault("stall", seconds=5.0)]) as (_, proxy):
        connection = connect(proxy)
        connection.request("POST", "/v1/completions", json.dumps(BODY))
        assert connection.sock is not None
        answer = connection.getresponse()
        assert answer.read(int(answer.headers["Content-Length"]) // 2)
        connection.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            answer.read()


def test_a_client_that_does_not_wait_has_no_answer_and_may_try_again():
    with proxied([Fault("delay", seconds=5.0)]) as (server, proxy):
        with pytest.raises(TimeoutError):
            ask(connect(proxy, timeout_s=0.3))
        assert ask(connect(proxy)).status == 200
        assert server.num_requests == 2  # the server had done the work


def test_a_duplicate_is_left_in_the_connection():
    with proxied([Fault("duplicate")]) as (_, proxy):
        connection = connect(proxy)
        connection.connect()
        assert connection.sock is not None
        data = json.dumps(BODY).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sock.sendall(head.encode() + data)
        received = b""
        while piece := connection.sock.recv(65536):
            received += piece
        assert received[: len(received) // 2] == received[len(received) // 2 :]
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_closed_connection_has_no_answer_and_the_server_no_request():
    with proxied([Fault("close"), Fault("reset")]) as (server, proxy):
        with pytest.raises(http.client.RemoteDisconnected):
            ask(connect(proxy))
        with pytest.raises(ConnectionResetError) as caught:
            ask(connect(proxy))
        assert not isinstance(caught.value, http.client.RemoteDisconnected)
        assert ask(connect(proxy)).status == 200
        assert server.num_requests == 1
        assert proxy.counts == {"close": 1, "reset": 1}


def test_a_restart_refuses_connections_for_a_while_and_drops_the_open_ones():
    with proxied([None, Fault("restart", seconds=0.3)]) as (_, proxy):
        kept, other = connect(proxy), connect(proxy)
        assert ask(kept).status == 200
        start = time.monotonic()
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            ask(other)
        with pytest.raises(ConnectionRefusedError):
            ask(connect(proxy))
        with pytest.raises((http.client.RemoteDisconnected, OSError)):
            ask(kept)
        while True:
            try:
                answer = ask(connect(proxy))
                break
            except ConnectionRefusedError:
                assert time.monotonic() - start < 5
                time.sleep(0.01)
        assert time.monotonic() - start >= 0.3
        assert answer.status == 200
        assert (proxy.num_requests, proxy.counts) == (3, {"restart": 1})


def test_headers_that_end_early_leave_no_body():
    with proxied([Fault("head_cut")]) as (_, proxy):
        connection = connect(proxy)
        connection.connect()
        assert connection.sock is not None
        connection.sock.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
        received = connection.sock.recv(65536) + connection.sock.recv(65536)
        assert received.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\n\r\n" not in received


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_a_cut_body_breaks_off_before_its_promised_end(body):
    with proxied([Fault("body_cut", at=0.5)]) as (_, proxy):
        with pytest.raises(http.client.IncompleteRead) as caught:
            ask(connect(proxy), body)
        whole = ask(connect(proxy), body).body
        if body is BODY:
            assert len(caught.value.partial) == len(whole) // 2
            assert caught.value.expected == len(whole) - len(whole) // 2


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_a_short_body_is_as_long_as_it_says_and_no_json(at):
    with proxied([Fault("body_short", at=at), None]) as (_, proxy):
        connection = connect(proxy)
        short = ask(connection)
        whole = ask(connection)
        assert int(short.headers["Content-Length"]) == len(short.body)
        assert len(short.body) == min(int(len(whole.body) * at), len(whole.body) - 1)
        assert short.status == 200
        with pytest.raises(ValueError):
            json.loads(short.body)


@pytest.mark.parametrize(("at", "kept"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_a_stream_is_cut_in_an_event_or_between_two_and_ends_in_order(at, kept):
    plan = [Fault("event_cut", at=at), Fault("done_missing", at=at), None]
    with proxied(plan) as (_, proxy):
        connection = connect(proxy)
        in_event, between, whole = (ask(connection, STREAM) for _ in plan)
    assert len(events(whole.body)) == 5
    assert between.body == b"" if kept == 0 else between.body.endswith(b"\n\n")
    assert len(events(between.body)) == kept
    assert b"[DONE]" not in between.body + in_event.body
    assert len(events(in_event.body)) == kept + 1
    assert not in_event.body.endswith(b"\n\n")


def test_a_fault_of_streams_spares_answers_that_are_none():
    plan = [Fault("event_cut"), Fault("done_missing")]
    with proxied(plan) as (_, proxy):
        assert ask(connect(proxy)).status == 200
        # This one asks for a stream, and is refused without one.
        assert ask(connect(proxy), STREAM | {"prompt": ""}).status == 400
        assert proxy.log == [None, None]


def test_errors_look_like_those_of_servers_and_of_proxies_before_them():
    kinds = ("429", "429_date", "500", "502", "503")
    plan = [Fault(kind, seconds=1.5) for kind in kinds]
    with proxied(plan) as (server, proxy):
        connection = connect(proxy)
        limited, dated, failed, gateway, unavailable = (ask(connection) for _ in plan)
        assert ask(connection).status == 200  # the connection is kept
        assert server.num_requests == 1
    assert [a.status for a in (limited, dated, failed, gateway, unavailable)] == [
        429,
        429,
        500,
        502,
        503,
    ]
    assert limited.headers["Retry-After"] == "2"
    assert -10 <= parsedate_to_datetime(dated.headers["Retry-After"]).timestamp() - time.time() <= 2
    assert "message" in json.loads(failed.body)["error"]
    assert gateway.headers["Content-Type"] == "text/html" and b"<html>" in gateway.body
    assert unavailable.headers["Content-Type"] == "text/plain"


def test_a_wrong_200_is_empty_or_garbage_or_other_json():
    with proxied([Fault("empty"), Fault("garbage"), Fault("wrong_json")]) as (_, proxy):
        connection = connect(proxy)
        empty, garbage, other = (ask(connection) for _ in range(3))
    assert [a.status for a in (empty, garbage, other)] == [200, 200, 200]
    assert empty.body == b""
    with pytest.raises(ValueError):
        json.loads(garbage.body)
    assert "choices" not in json.loads(other.body)


def test_faults_follow_the_script_and_then_everything_passes():
    plan = [None, Fault("503"), Fault("500"), None]
    with proxied(plan) as (_, proxy):
        connection = connect(proxy)
        assert [ask(connection).status for _ in range(6)] == [200, 503, 500, 200, 200, 200]
        assert proxy.log == [*plan, None, None]
        assert (proxy.faults_injected, proxy.counts) == (2, {"503": 1, "500": 1})


def test_after_so_many_faults_in_a_row_so_many_requests_pass_and_no_fault_is_lost():
    plan = [Fault("503")] * 5
    with proxied(plan, max_consecutive=2, num_passes=3) as (_, proxy):
        connection = connect(proxy)
        statuses = [ask(connection).status for _ in range(13)]
    assert statuses == [503, 503, 200, 200, 200, 503, 503, 200, 200, 200, 503, 200, 200]


def test_random_faults_repeat_with_the_seed_and_have_the_rate():
    """The odds of a false alarm are nil: the seed is fixed."""
    plan = list(islice(random_faults(1, rate=0.25), 4000))
    assert plan == list(islice(random_faults(1, rate=0.25), 4000))
    assert plan != list(islice(random_faults(2, rate=0.25), 4000))
    faults = [fault for fault in plan if fault is not None]
    assert 0.22 < len(faults) / len(plan) < 0.28
    assert {fault.kind for fault in faults} == set(KINDS)


def test_clients_that_try_again_all_have_their_answers_through_any_faults():
    """A client of few lines: any trouble, and anything but a whole answer, is tried again."""
    kinds = [kind for kind in KINDS if kind not in STREAM_KINDS]
    plan = random_faults(0, rate=0.6, kinds=kinds, seconds=0.02)
    bodies = [BODY | {"prompt": text} for text in "abcdefghijklmnopqrstuvwxyz"] * 2
    with proxied(plan, max_consecutive=3) as (server, proxy):

        def insist(body: dict[str, Any]) -> Any:
            for _ in range(200):
                try:
                    answer = ask(connect(proxy), body)
                    if answer.status == 200:
                        return essence(answer)
                except (OSError, http.client.HTTPException, ValueError, KeyError):
                    time.sleep(0.005)
            raise AssertionError(f"no answer to {body} in 200 tries")

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(insist, bodies))
        direct = http.client.HTTPConnection("127.0.0.1", server.port)
        assert answers == [essence(ask(direct, body)) for body in bodies]
        assert proxy.faults_injected > 20
        assert set(HARMLESS_KINDS) < set(proxy.counts)


def test_one_request_meets_no_more_faults_in_a_row_than_allowed_whatever_others_meet():
    """Requests take turns, and each second one is hurt: without the rule one of them would never pass."""
    plan = [Fault("503"), None] * 20
    with proxied(plan, max_consecutive=3) as (_, proxy):
        connection = connect(proxy)
        unlucky = []
        for _ in range(8):
            unlucky.append(ask(connection).status)
            ask(connection, BODY | {"prompt": "b"})
    assert unlucky[:4] == [503, 503, 503, 200]


def test_a_server_that_is_gone_is_no_fault():
    with CompletionServer(ToyBackend(toy_table(0)), toy_tokenizer()) as server:
        url = server.url
    with FaultProxy(url, [Fault("delay"), None]) as proxy:
        for _ in range(2):
            with pytest.raises(http.client.RemoteDisconnected):
                ask(connect(proxy))
    assert (proxy.faults_injected, len(proxy.failures)) == (0, 2)


def test_a_fault_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="there are delay"):
        Fault("earthquake")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share"):
        Fault("body_cut", at=2.0)
