"""The HTTP server over a model of a test, on a free port of 127.0.0.1.

with served(toy_model()) as server:
    server.client().completions.create(model="toy", prompt="a")
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import openai

from proxytune.model import ProxyTuned
from proxytune.server.app import make_app
from proxytune.server.run import listen, make_server
from proxytune.server.service import Service
from proxytune.server.settings import ServerSettings

SETTINGS = ServerSettings(name="toy")


@dataclass(frozen=True)
class Served:
    """A running server."""

    service: Service
    port: int
    server: Any
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """Return the official client, which by itself would repeat what failed."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def connect(self) -> socket.socket:
        """Return a connection on which nothing was said yet."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


@contextmanager
def served(
    model: ProxyTuned,
    settings: ServerSettings = SETTINGS,
    *,
    max_connections: int = 1000,
    shutdown_timeout_s: int = 5,
    **changes: Any,
) -> Iterator[Served]:
    """Run the server in a thread; `changes` are to the settings."""
    app = make_app(model, replace(settings, **changes))
    listening = listen("127.0.0.1", 0)
    server = make_server(
        app,
        host="127.0.0.1",
        port=0,
        max_connections=max_connections,
        shutdown_timeout_s=shutdown_timeout_s,
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    try:
        yield Served(app.state.service, listening.getsockname()[1], server, thread)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
