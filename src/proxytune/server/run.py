"""Runs the application with uvicorn: one process, one event loop, one engine.

A connection must send the head of a request within `HEAD_TIMEOUT_S`, and read what it is sent. When the
server is told to stop it takes no new connections, finishes what runs, and cancels what is left after a
while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from proxytune.server import answer
from proxytune.server.engine import Engine
from proxytune.server.settings import ServerSettings

HEAD_TIMEOUT_S = 20.0
"""Longest time from a connection to the head of its first request, and from one of its pieces to the rest."""
REFUSED_BODY_S = 2.0
"""How long the rest of a request is read that is answered 503 whatever it says."""
LAST_WORDS_S = 5
"""How long clients may take to read that their texts were cancelled because the server stops."""


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, without connections that are held for nothing.

    Those that never send a whole request, or that do not read, are closed. What uvicorn refuses by itself has
    the shape of every other error.
    """

    max_connections: int
    send_timeout_s: float
    _watch: asyncio.TimerHandle | None = None
    _reader_watch: asyncio.TimerHandle | None = None
    _num_unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        # Tell at once when bytes wait here: they have left the application, which may long be done.
        transport.set_write_buffer_limits(high=0)
        self._watch = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Take bytes; once they are a whole head, uvicorn's own keep-alive timeout takes over."""
        is_full = len(self.connections) > self.max_connections
        self.app = _too_many if is_full else self.config.loaded_app
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            if self._watch is None and not self.transport.is_closing():
                self._watch = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)
        elif self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._num_unread = self.transport.get_write_buffer_size()
        self._reader_watch = self.loop.call_later(self.send_timeout_s, self._look_at_reader)

    def resume_writing(self) -> None:
        """Stop waiting: all was read, as far as can be told here."""
        super().resume_writing()
        if self._reader_watch is not None:
            self._reader_watch.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        for watch in (self._watch, self._reader_watch):
            if watch is not None:
                watch.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        body = _error_body(msg)
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _give_up(self) -> None:
        self._watch = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _look_at_reader(self) -> None:
        num_unread = self.transport.get_write_buffer_size()
        if num_unread >= self._num_unread:
            self.transport.abort()
            return
        self._num_unread = num_unread
        self._reader_watch = self.loop.call_later(self.send_timeout_s, self._look_at_reader)


def _error_body(message: str, kind: str = "invalid_request_error") -> bytes:
    return json.dumps(answer.error(message, kind=kind)).encode()


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer where there are as many connections as may be.

    Most clients send a body after its head. If the connection were closed between the two, their system would
    throw the answer away and tell them of a broken connection instead.
    """
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), REFUSED_BODY_S)
    message = "too many connections are open.\nhint: try again later, or use fewer"
    headers = [
        (b"content-type", b"application/json"),
        (b"retry-after", b"5"),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": _error_body(message, "server_error")})


async def _drain(receive: Receive) -> None:
    """Read a request to its end, and forget it."""
    while (await receive()).get("more_body"):
        pass


class StoppingServer(uvicorn.Server):
    """uvicorn's server, whose texts are told when their time is over.

    By itself uvicorn would drop the connections of those that still run.

    Args:
        config: uvicorn's.
        engine: Runs the texts.
        timeout_s: How long they may take when the server is told to stop.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, timeout_s: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._timeout_s = timeout_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what runs."""
        # No thread of the loop's own pool: a second Ctrl-C would wait for it.
        threading.Thread(target=self._engine.close, args=(self._timeout_s,), daemon=True).start()
        await super().shutdown(sockets)


def make_server(
    app: FastAPI,
    *,
    host: str,
    port: int,
    max_connections: int = 1000,
    shutdown_timeout_s: int = 60,
    **options: Any,
) -> uvicorn.Server:
    """Return the server; `run` on it serves until it is told to stop.

    Args:
        app: From `app.make_app`.
        host: Where to listen.
        port: Likewise; 0 for a free one.
        max_connections: More are answered 503.
        shutdown_timeout_s: How long running texts may take when it is told to stop.
        options: Further ones of `uvicorn.Config`.
    """
    settings: ServerSettings = app.state.service.settings

    class Protocol(PatientProtocol):
        pass

    Protocol.max_connections = max_connections
    Protocol.send_timeout_s = settings.send_timeout_s
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=shutdown_timeout_s + LAST_WORDS_S,
        access_log=False,
        log_level="warning",
        server_header=False,
        **options,
    )
    return StoppingServer(config, app.state.service.engine, shutdown_timeout_s)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, so that a port that is taken shows before models are loaded.

    Raises:
        OSError: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(2048)
    except OSError:
        found.close()
        raise
    return found
