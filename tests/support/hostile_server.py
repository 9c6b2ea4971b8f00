"""An HTTP server on 127.0.0.1 that answers whatever a test wants and records the requests."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable
from typing import Any

from typing_extensions import Self

from tests.support.loopback import LoopbackServer, QuietHandler

Respond = Callable[[QuietHandler], None]


class HostileServer:
    """Answers every request as `respond` does, from `__enter__` to `__exit__`.

    Args:
        respond: Writes the answer of a request whose body has been read.
    """

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.requests: list[tuple[str, dict[str, str]]] = []
        """The path and the headers of each request."""

    def __enter__(self) -> Self:
        self._http = LoopbackServer(_Handler, self)
        self._http.start()
        self.host = f"127.0.0.1:{self._http.port}"
        self.url = f"http://{self.host}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._http.stop()


class _Handler(QuietHandler):
    def do_GET(self) -> None:
        self.read_body()
        self.server.owner.requests.append((self.path, dict(self.headers)))
        with contextlib.suppress(OSError):
            self.server.owner.respond(self)

    do_POST = do_GET


def json_answer(content: Any, status: int = 200, **headers: str) -> Respond:
    """Return what answers every request with this content; bytes are sent as they are."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda handler: handler.send(status, body, **headers)


def bomb(num_bytes: int) -> bytes:
    """Return that many spaces, compressed with gzip to a thousandth."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    pieces = [packer.compress(b" " * 2**20) for _ in range(num_bytes // 2**20)]
    return b"".join(pieces) + packer.flush()
