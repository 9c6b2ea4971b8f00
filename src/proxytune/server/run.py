"""Runs the application with uvicorn: one process, one event loop, one engine.

A connection must send the head of a request within `HEAD_TIMEOUT_S`, and it must read what it is sent. When
the server is stopped it accepts no new connections, finishes the running texts, and after a time limit
cancels the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from proxytune.server.answer import error_body
from proxytune.server.engine import Engine
from proxytune.server.guards import Refusal
from proxytune.server.settings import ServerSettings

HEAD_TIMEOUT_S = 20.0
"""Time limit for the head of a request: from the connection or, on an open one, from its first bytes."""
REFUSED_BODY_S = 2.0
"""Time limit for reading the body of a request before it is answered 503."""
LAST_WORDS_S = 5
"""Time for clients to read that the stopping server has cancelled their texts."""


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which also closes stalled connections.

    A connection that does not complete a request's head, or does not read its answer, is closed. Errors that
    uvicorn itself answers have the same JSON body as all others.
    """

    max_connections: int
    send_timeout_s: float
    _head_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None
    _num_unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first request."""
        super().connection_made(transport)
        # Report waiting bytes at once: they have left the application, which may be long finished.
        transport.set_write_buffer_limits(high=0)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Receive bytes; after a complete head, uvicorn's own keep-alive timeout takes over."""
        is_full = len(self.connections) > self.max_connections
        self.app = _answer_too_many if is_full else self.config.loaded_app
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            if self._head_timer is None and not self.transport.is_closing():
                self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        """Start to wait for the client to read."""
        super().pause_writing()
        self._num_unread = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(self.send_timeout_s, self._check_reader)

    def resume_writing(self) -> None:
        """Stop waiting: as far as can be seen here, the client has read everything."""
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        for timer in (self._head_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not valid HTTP."""
        body = json.dumps(error_body(msg, kind="invalid_request_error")).encode()
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
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _check_reader(self) -> None:
        num_unread = self.transport.get_write_buffer_size()
        if num_unread >= self._num_unread:
            self.transport.abort()
            return
        self._num_unread = num_unread
        self._reader_timer = self.loop.call_later(self.send_timeout_s, self._check_reader)


async def _answer_too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 503 because there are too many connections.

    Most clients send the head first and then the body. If the connection were closed in between, the client's
    system would discard the answer and report a broken connection instead.
    """
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), REFUSED_BODY_S)
    message = "too many connections are open.\nhint: try again later, or open fewer connections"
    headers = {"Retry-After": "5", "Connection": "close"}
    await Refusal(503, message, kind="server_error", headers=headers)(scope, receive, send)


async def _drain(receive: Receive) -> None:
    """Read a request to its end and discard it."""
    while (await receive()).get("more_body"):
        pass


class StoppingServer(uvicorn.Server):
    """uvicorn's server, which at shutdown gives the engine `timeout_s` to finish its texts.

    uvicorn alone would drop the connections whose texts are still running.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, timeout_s: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._timeout_s = timeout_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the running texts within the time limit, then stop."""
        # Not in the event loop's thread pool: a second Ctrl-C would wait for it.
        threading.Thread(target=self._engine.close, args=(self._timeout_s,), daemon=True).start()
        await super().shutdown(sockets)


def make_server(
    app: FastAPI,
    *,
    host: str,
    port: int,
    max_connections: int = 1000,
    shutdown_timeout_s: int = 60,
) -> uvicorn.Server:
    """Return the server; its method `run` serves until the server is stopped.

    Args:
        app: The application, from `app.make_app`.
        host: Address to listen on.
        port: Port to listen on; 0 for a free one.
        max_connections: Maximum number of open connections; requests on further ones are answered 503.
        shutdown_timeout_s: How long running texts may take after the server is stopped.
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
        use_colors=False,  # `proxytune serve` shows escape sequences on stderr as text.
        server_header=False,
    )
    return StoppingServer(config, app.state.service.engine, shutdown_timeout_s)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, so that a port in use is noticed before models are loaded.

    Raises:
        OSError: The address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener
