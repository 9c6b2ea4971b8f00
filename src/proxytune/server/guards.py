"""What a request passes before a route sees it: its host name, its key, its body; and how it is refused.

The order matters. A host name costs a comparison, a key a digest, and only who has a key may have a body
held in memory. The log and the counters see every request, whichever guard answers it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxytune.errors import Unavailable
from proxytune.server.answer import Json, anthropic_error, error_body
from proxytune.server.body import Held, InFlight
from proxytune.server.settings import ServerSettings

logger = logging.getLogger("proxytune.server")

DRAIN_FACTOR = 16
"""Of a refused body, up to this many times the limit is read and forgotten: clients that are still sending do
not see an answer."""
DRAIN_S = 2.0
"""Time limit for that."""
OPEN_PATHS = frozenset({"/", "/health", "/version", "/metrics", "/openapi.json"})
"""What can be read without a key; everything else needs one where there are some."""
MAX_MESSAGE = 2000
"""Maximum number of characters of an error's message, which may quote the request."""
REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
"""What a client may call its request; it is written to the log, and back to the client."""
ANTHROPIC_PATH = re.compile(r"(/v1)?/messages(/|$)")
"""Paths of the Anthropic API, whose errors have another form and whose request id has another header."""


@dataclass(slots=True)
class Arrival:
    """What the guards found out about a request; the routes find it in `request.state.arrival`.

    Args:
        at: Time on the monotonic clock at which its head had arrived.
        host: The address it came from.
        key: Index of its key; None where no keys are asked for.
        body: Its body.
        request_id: What the client calls it, or a name made here.
    """

    at: float
    host: str
    key: int | None = None
    body: Held | None = None
    request_id: str = ""

    @property
    def client(self) -> str:
        """Who shares places and turns with whom: the holder of a key, or without keys an address.

        Whoever has one address of IPv6 has the other 2**64 of its network, too.
        """
        if self.key is not None:
            return f"key {self.key}"
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return self.host
        if address.version == 6 and address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address.packed, 64), strict=False))
        return self.host


class Refusal(JSONResponse):
    """The response for an error, in the form of the API to which the path of its request belongs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}…"
        self.message = message
        self.code = code
        self.content = error_body(message, kind=kind, param=param, code=code)
        super().__init__(self.content, status, headers)

    def anthropic(self, request_id: str) -> Json:
        """Return its content as the Anthropic API has it."""
        return anthropic_error(self.message, self.status_code, request_id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        if ANTHROPIC_PATH.match(scope.get("path", "")):
            arrival: Arrival | None = scope.get("state", {}).get("arrival")
            self.body = self.render(self.anthropic(arrival.request_id if arrival else ""))
            self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


async def _close(response: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a response that ends its connection."""
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


async def _drain(scope: Scope, receive: Receive, max_bytes: int) -> None:
    """Read a body and forget it, so that a client which is still sending sees the answer."""
    if "expect" in Headers(scope=scope):  # It waits for an answer before it sends.
        return

    async def read() -> None:
        num_bytes = 0
        while num_bytes <= max_bytes:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if not message.get("more_body"):
                return

    try:
        await asyncio.wait_for(read(), DRAIN_S)
    except asyncio.TimeoutError:
        return


class KeyGuard:
    """Answers 401 to requests without a valid key, before anything of their body is kept."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], max_bytes: int) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request with a key pass."""
        if scope["type"] != "http" or not self._digests or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
        for key in [key for key in given if key] or [""]:
            own = hashlib.sha256(key.encode()).digest()
            # Compare all keys, each in constant time, so that the time taken reveals nothing.
            matches = [hmac.compare_digest(own, digest) for digest in self._digests]
            if any(matches):
                scope["state"]["arrival"].key = matches.index(True)
                await self._app(scope, receive, send)
                return
        await _drain(scope, receive, DRAIN_FACTOR * self._max_bytes)
        message = (
            "this server asks for a key; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
        )
        response = Refusal(401, message, headers={"WWW-Authenticate": "Bearer"})
        await _close(response, scope, receive, send)


class BodyGuard:
    """Reads bodies; refuses those that are too large, too slow, or too many at once.

    starlette's `RequestBodyLimitMiddleware` has no time limit and does not read the rest of a body that is
    too large: a client that is still sending would see a reset connection instead of the answer.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, in_flight: InFlight) -> None:
        self._app = app
        self._max_bytes = settings.max_body_bytes
        self._timeout_s = min(settings.body_timeout_s, settings.request_timeout_s)
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read a request's body and let it pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrival: Arrival = scope["state"]["arrival"]
        body = arrival.body = self._in_flight.open(arrival.client)
        try:
            response = await self._read(body, scope, receive)
            if response is None:
                await self._app(scope, receive, send)
            else:
                await _close(response, scope, receive, send)
        except _Gone:
            return
        finally:
            body.close()

    async def _read(self, body: Held, scope: Scope, receive: Receive) -> Refusal | None:
        """Read a body; return what it is refused with."""
        refusal: Refusal | None = None

        async def read() -> None:
            nonlocal refusal
            is_more = True
            while is_more and refusal is None:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                is_more = message.get("more_body", False)
                piece = message.get("body", b"")
                if len(body) + len(piece) > self._max_bytes:
                    why = (
                        f"the body is larger than this server's limit of {self._max_bytes:,} bytes"
                    )
                    refusal = Refusal(413, why)
                    break
                try:
                    body.add(piece)
                except Unavailable as error:
                    headers = {"Retry-After": "1"}
                    refusal = Refusal(503, str(error), kind="server_error", headers=headers)
            if refusal is not None and is_more:
                body.close()
                await _drain(scope, receive, DRAIN_FACTOR * self._max_bytes)

        try:
            await asyncio.wait_for(read(), self._timeout_s)
        except asyncio.TimeoutError:
            return refusal or Refusal(408, "the body did not arrive in time")
        return refusal


class _Gone(Exception):
    """The client has disconnected."""


class RequestLog:
    """Names, counts and logs requests, adds headers, and refuses requests to an unknown host name.

    starlette's `TrustedHostMiddleware` answers 400 in plain text and redirects to names with `www.`. Here the
    answer is 421 with an error object, as in every other refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        on_answer: Callable[[str, int], None],
        refusal: Callable[[Exception], Refusal],
    ) -> None:
        self._app = app
        self._hosts = settings.hosts
        self._on_answer = on_answer
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, and log how it was answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0
        request_id = _request_id(scope)
        name = b"request-id" if ANTHROPIC_PATH.match(scope["path"]) else b"x-request-id"

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY")]
                own += [(each, request_id.encode()) for each in {name, b"x-request-id"}]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        address: Any = scope.get("client") or ("",)
        arrival = Arrival(time.monotonic(), address[0], request_id=request_id)
        state = scope.get("state", {}) | {"arrival": arrival}
        # HEAD is GET without the content, which uvicorn leaves out.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        inner = {**scope, "state": state, "method": method}
        try:
            host = re.sub(r":\d*$", "", Headers(scope=scope).get("host", "")).strip("[]").lower()
            if self._hosts is not None and host not in self._hosts:
                # A page of another site may resolve its own host name to this machine (DNS rebinding).
                response = Refusal(421, "this server does not serve that host name")
                await _close(response, inner, receive, record_status)
            else:
                await self._app(inner, receive, record_status)
        except Exception as error:
            # An unforeseen error gets the same JSON body as any other.
            if status:
                raise
            await self._refusal(error)(inner, receive, record_status)
        finally:
            # One label for all unknown paths: otherwise a scanner could create any number of counters.
            path = getattr(inner.get("route"), "path", "other")
            self._on_answer(path, status)
            latency_ms = (time.perf_counter() - started) * 1000
            method = scope["method"][:20]
            logger.info("%s %s %d %.0f ms %s", method, path, status, latency_ms, request_id)


def _request_id(scope: Scope) -> str:
    """Return what a client calls its request, if that is safe to repeat, or a new name."""
    given: bytes = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
