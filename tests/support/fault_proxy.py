"""An HTTP proxy on 127.0.0.1 that hurts the answers of a server on purpose, one fault a request at most.

Which request meets which fault is a plan: a list, or `random_faults`, one element a request in the order in
which requests arrive, None for a request that passes. After the end of the plan everything passes.

    with CompletionServer(...) as server, FaultProxy(server.url, [Fault("429"), None]) as proxy:
        client = Client(proxy.url)
    assert proxy.faults_injected == 1

Requests are forwarded as they are, each over a connection of its own, and answers come back unchanged,
streams piece by piece. Requests whose fault needs no answer ("close", "429" and the like) do not reach the
server.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from types import TracebackType
from typing import Literal, get_args
from urllib.parse import urlsplit

from typing_extensions import Self

from tests.support.loopback import LoopbackServer, QuietHandler

Kind = Literal[
    "delay",
    "stall",
    "duplicate",
    "close",
    "reset",
    "restart",
    "head_cut",
    "body_cut",
    "body_short",
    "event_cut",
    "done_missing",
    "429",
    "429_date",
    "500",
    "502",
    "503",
    "empty",
    "garbage",
    "wrong_json",
]

KINDS: tuple[Kind, ...] = get_args(Kind)

STREAM_KINDS: tuple[Kind, ...] = ("event_cut", "done_missing")
"""Those that only a streamed answer can have; a request that does not ask for a stream passes instead."""

HARMLESS_KINDS: tuple[Kind, ...] = ("delay", "stall", "duplicate")
"""Those after which a client that waits has the right answer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing to go wrong.

    - Right, but slow: "delay" before the answer, "stall" in the middle of its body, "duplicate": after a
      delay the answer comes twice in one go, and the connection is closed.
    - No answer: "close" ends the connection in order, "reset" with RST. "restart" drops every connection and
      refuses new ones for a while; other requests that are under way are lost with it.
    - Part of an answer: "head_cut" ends the connection in the middle of the headers, "body_cut" in the middle
      of the body, of which Content-Length or chunks have promised more. "body_short" is as long as it says,
      and still only the first part of the right one.
    - Part of a stream that ends in order: "event_cut" in the middle of an event, "done_missing" between two
      events, or after the last one, without [DONE].
    - An error: "429" with Retry-After in seconds, "429_date" with a date, "500" with JSON, "502" with HTML,
      "503" with plain text.
    - A wrong 200: "empty" body, "garbage" that is neither JSON nor UTF-8, "wrong_json" that is JSON without
      choices.

    Args:
        kind: What goes wrong.
        seconds: How long "delay", "stall", "duplicate" and "restart" take, and what Retry-After says, which
            knows whole seconds only and is rounded up.
        at: Where to cut or to stall, as a share of the body or of the events, from 0 to 1.
    """

    kind: Kind
    seconds: float = 0.0
    at: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no fault; there are {', '.join(KINDS)}")
        if self.seconds < 0 or not 0 <= self.at <= 1:
            raise ValueError(f"seconds from 0 and a share from 0 to 1 are possible, not {self}")


def random_faults(
    seed: int, *, rate: float, kinds: Sequence[Kind] = KINDS, seconds: float = 0.05
) -> Iterator[Fault | None]:
    """Yield an endless plan.

    Args:
        seed: The same one gives the same plan.
        rate: The share of requests that meet a fault.
        kinds: Which, each as likely as the others.
        seconds: Longest delay, stall or restart. Retry-After is always 0, or now as a date.
    """
    numbers = random.Random(seed)
    while True:
        is_fault = numbers.random() < rate
        kind = kinds[numbers.randrange(len(kinds))]
        length, at = numbers.uniform(0, seconds), numbers.uniform(0, 1)
        length = 0.0 if kind.startswith("429") else length
        yield Fault(kind, seconds=length, at=at) if is_fault else None


class FaultProxy:
    """A proxy on a free port of 127.0.0.1, from `__enter__` to `__exit__`.

    Args:
        upstream: The server's base URL, "http://127.0.0.1:<port>/v1"; only host and port count.
        plan: The fault of each request, None to let it pass.
        max_consecutive: After so many faults in a row the next request passes, and so does a request that has
            met so many without passing once in between: a client that tries again `max_consecutive` times has
            its answer. (Requests that a restart of another one drops or refuses come on top.) The plan waits
            meanwhile. None for no such limit.
        num_passes: How many requests in a row pass then.
    """

    def __init__(
        self,
        upstream: str,
        plan: Iterable[Fault | None] = (),
        *,
        max_consecutive: int | None = None,
        num_passes: int = 1,
    ) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname is not None and parts.port is not None, upstream
        self.upstream = (parts.hostname, parts.port)
        self.max_consecutive = max_consecutive
        self.num_passes = num_passes
        self.counts: Counter[Kind] = Counter()
        """Injected faults by kind."""
        self.log: list[Fault | None] = []
        """What each request met, in the order of arrival."""
        self.failures: list[str] = []
        """Requests that were lost without a fault because the server did not answer."""
        self.stopping = threading.Event()
        self._plan = iter(plan)
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._passes_left = 0
        self._in_a_row_of: Counter[tuple[str, bytes]] = Counter()
        self._http: LoopbackServer | None = None
        self._port = 0
        self._relisten: threading.Thread | None = None

    @property
    def faults_injected(self) -> int:
        """How many requests met a fault."""
        return sum(self.counts.values())

    @property
    def num_requests(self) -> int:
        """How many requests arrived; connections refused during a restart are not among them."""
        return len(self.log)

    @property
    def port(self) -> int:
        """Where it listens; a restart keeps the port."""
        return self._port

    @property
    def url(self) -> str:
        """What clients call the base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopping.set()
        if self._relisten is not None:
            self._relisten.join()
        if self._http is not None:
            self._http.stop()

    def _listen(self) -> None:
        self._http = LoopbackServer(_Handler, self, port=self._port)
        self._port = self._http.port
        self._http.start()

    def decide(self, path: str, body: bytes) -> tuple[int, Fault | None]:
        """Return the next request's place in the log, and its fault."""
        with self._lock:
            fault = self._next(path, body)
            self.log.append(fault)
            if fault is None:
                self._in_a_row = 0
                self._in_a_row_of.pop((path, body), None)
            else:
                self.counts[fault.kind] += 1
                self._in_a_row += 1
                self._in_a_row_of[path, body] += 1
            return len(self.log) - 1, fault

    def withdraw(self, place: int, path: str, body: bytes) -> None:
        """Take a fault back that could not be injected."""
        with self._lock:
            fault = self.log[place]
            if fault is not None:
                self.log[place] = None
                self.counts[fault.kind] -= 1
                self._in_a_row = 0
                self._in_a_row_of.pop((path, body), None)

    def _next(self, path: str, body: bytes) -> Fault | None:
        if self._passes_left:
            self._passes_left -= 1
            return None
        if self.max_consecutive is not None:
            if self._in_a_row >= self.max_consecutive:
                self._passes_left = self.num_passes - 1
                return None
            if self._in_a_row_of[path, body] >= self.max_consecutive:
                return None
        fault = next(self._plan, None)
        if fault is not None and fault.kind in STREAM_KINDS and not _asks_for_stream(body):
            return None
        return fault

    def restart(self, seconds: float) -> bool:
        """Drop every connection and listen again after a while; False if that is going on already."""
        with self._lock:
            http_server, self._http = self._http, None
        if http_server is None or self.stopping.is_set():
            return False
        http_server.stop()

        def listen_again() -> None:
            self.stopping.wait(seconds)
            if not self.stopping.is_set():
                self._listen()

        thread = threading.Thread(target=listen_again, daemon=True)
        thread.start()
        self._relisten = thread
        return True


def _asks_for_stream(body: bytes) -> bool:
    try:
        fields = json.loads(body)
    except ValueError:
        return False
    return isinstance(fields, dict) and fields.get("stream") is True


class _ServerLost(Exception):
    """The server did not answer; the cause says how."""


class _Handler(QuietHandler):
    """One connection of a client."""

    def do_GET(self) -> None:
        self.handle_request()

    def do_POST(self) -> None:
        self.handle_request()

    def handle_request(self) -> None:
        proxy: FaultProxy = self.server.owner
        self.body = self.read_body()
        self.place, fault = proxy.decide(self.path, self.body)
        if fault is not None and self.answer_without_server(fault):
            return
        connection = http.client.HTTPConnection(*proxy.upstream)
        try:
            answer = self.ask_server(connection)
            if fault is None:
                self.forward(answer)
            else:
                self.forward_hurt(answer, fault)
        except _ServerLost as error:
            proxy.failures.append(repr(error.__cause__))
            self.withdraw()
            self.close_connection = True
        except (OSError, http.client.HTTPException):
            self.close_connection = (
                True  # the client went away, or the server did within its answer
            )
        finally:
            connection.close()

    def ask_server(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        """Forward the request and return the answer, of which the head has been read."""
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("connection", "host")
        }
        try:
            connection.request(self.command, self.path, self.body or None, headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise _ServerLost from error

    def withdraw(self) -> None:
        """Take this request's fault back."""
        self.server.owner.withdraw(self.place, self.path, self.body)

    def answer_without_server(self, fault: Fault) -> bool:
        """Inject a fault that needs no answer; False for the others."""
        proxy: FaultProxy = self.server.owner
        kind = fault.kind
        retry_after = str(math.ceil(fault.seconds))
        if kind == "close":
            self.close_connection = True
        elif kind == "reset":
            self.server.end_with_reset(self.connection)
            self.close_connection = True
        elif kind == "restart":
            if not proxy.restart(fault.seconds):
                self.withdraw()
            self.close_connection = True
        elif kind == "head_cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: applicati")
            self.close_connection = True
        elif kind == "429":
            self.send_error_json(429, "Rate limit reached.", Retry_After=retry_after)
        elif kind == "429_date":
            date = formatdate(time.time() + fault.seconds, usegmt=True)
            self.send_error_json(429, "Rate limit reached.", Retry_After=date)
        elif kind == "500":
            self.send_error_json(500, "The server had an error while processing your request.")
        elif kind == "502":
            page = b"<html>\r\n<body><h1>502 Bad Gateway</h1></body>\r\n</html>\r\n"
            self.send(502, page, Content_Type="text/html")
        elif kind == "503":
            self.send(503, b"no healthy upstream", Content_Type="text/plain")
        elif kind == "empty":
            self.send(200, b"", Content_Type="application/json")
        elif kind == "garbage":
            self.send(200, b"\x00\xff\xfe{]garbage\xc3", Content_Type="application/json")
        elif kind == "wrong_json":
            self.send(200, b'{"status": "ok"}', Content_Type="application/json")
        else:
            return False
        return True

    def send_error_json(self, status: int, message: str, **headers: str) -> None:
        error = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
        self.send(status, json.dumps(error).encode(), Content_Type="application/json", **headers)

    def forward(self, answer: http.client.HTTPResponse) -> None:
        """Pass an answer on as it comes."""
        if not answer.chunked:
            self.forward_head(answer)
            self.wfile.write(answer.read())
            return
        self.forward_head(answer)
        while data := answer.read1(65536):
            self.send_chunk(data)
        self.send_chunk(b"")

    def forward_head(self, answer: http.client.HTTPResponse, *, length: int | None = None) -> None:
        """Write the status line and the headers.

        Args:
            answer: The server's.
            length: Say this in Content-Length, if it is there.
        """
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() == "content-length" and length is not None:
                value = str(length)
            if name.lower() not in ("connection", "keep-alive"):
                self.send_header(name, value)
        self.end_headers()

    def forward_hurt(self, answer: http.client.HTTPResponse, fault: Fault) -> None:
        """Pass an answer on with a fault in it."""
        proxy: FaultProxy = self.server.owner
        body = answer.read()
        kind = fault.kind
        cut = min(int(len(body) * fault.at), len(body) - 1)
        if kind in STREAM_KINDS and not answer.chunked:  # refused, so not a stream
            self.withdraw()
            self.send_parts(answer, [body])
        elif kind == "delay":
            proxy.stopping.wait(fault.seconds)
            self.send_parts(answer, [body])
        elif kind == "duplicate":
            proxy.stopping.wait(fault.seconds)
            self.send_parts(answer, [body])
            self.send_parts(answer, [body])
            self.close_connection = True
        elif kind == "stall":
            self.send_parts(answer, [body[:cut], body[cut:]], pause_s=fault.seconds)
        elif kind == "body_short":
            self.send_parts(answer, [body[:cut]])
        elif kind == "body_cut":
            self.forward_head(answer)
            if answer.chunked:
                self.wfile.write(b"%x\r\n" % len(body))
            self.wfile.write(body[:cut])
            self.close_connection = True
        else:
            events = [event + b"\n\n" for event in body.split(b"\n\n") if event]
            kept = int((len(events) - 1) * fault.at)
            half = events[kept][: len(events[kept]) // 2] if kind == "event_cut" else b""
            self.send_parts(answer, [*events[:kept], half])

    def send_parts(
        self,
        answer: http.client.HTTPResponse,
        parts: Sequence[bytes],
        *,
        pause_s: float = 0.0,
    ) -> None:
        """Answer with a whole body of the given parts, in the server's framing.

        Args:
            answer: The server's, for status and headers.
            parts: Of the body.
            pause_s: How long to wait after each part but the last.
        """
        self.forward_head(answer, length=sum(map(len, parts)))
        for place, part in enumerate(parts):
            if place and pause_s:
                self.wfile.flush()
                self.server.owner.stopping.wait(pause_s)
            if not answer.chunked:
                self.wfile.write(part)
            elif part:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        if answer.chunked:
            self.wfile.write(b"0\r\n\r\n")
