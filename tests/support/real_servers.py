"""Other projects' OpenAI-compatible servers, started on loopback for a test."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str], port: int, log: Path, *, environment: Mapping[str, str], limit_s: float
) -> Iterator[str]:
    """Start a server and yield the address of its API once it lists its models.

    Args:
        command: The server's, which listens on `port`.
        port: On 127.0.0.1.
        log: Where its output goes; its end is shown if the server does not start.
        environment: Variables beside those of this process.
        limit_s: Seconds it may take to start.
    """
    url = f"http://127.0.0.1:{port}/v1"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        try:
            deadline = time.monotonic() + limit_s
            while True:
                with contextlib.suppress(OSError, urllib.error.URLError):
                    urllib.request.urlopen(f"{url}/models", timeout=2).close()
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{command[:3]} did not start:\n{tail}")
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
