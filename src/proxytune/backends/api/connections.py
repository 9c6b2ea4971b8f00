"""HTTP requests to a server that is not trusted: an answer has a time in which it must be there, and a size.

The time is that of the whole answer. The timeouts of the HTTP library count for each read, so a server that
sends a byte a second would never meet them. Every call has a connection of its own, which is cut when the
time is up; that also ends a read that waits. The size is that of the decompressed answer, counted before it
is kept.

No redirect is followed, no cookie is kept, and no password is looked for in `.netrc`. The proxies that the
environment names are used, except for plain HTTP to this machine: a proxy's `localhost` is another machine.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any, NamedTuple

import httpx2

from proxytune.backends.api.answers import UnusableAnswer
from proxytune.backends.api.keys import is_this_machine

LONGEST_CONNECT_S = 10.0


class Received(NamedTuple):
    """An answer as it came, decompressed."""

    status: int
    reason: str
    headers: Mapping[str, str]
    content: bytes


class Connections:
    """Connections to one server, kept open between calls. Several threads may use them.

    Args:
        address: Of the API.
        headers: Sent with every request.
    """

    def __init__(self, address: httpx2.URL, headers: Mapping[str, str]) -> None:
        # Nothing else is asked for, as other encodings cannot be decompressed in bounded steps.
        self._headers = {**headers, "Accept-Encoding": "gzip"}
        self._uses_proxies = address.scheme == "https" or not is_this_machine(address)
        self._ssl = httpx2.create_ssl_context(trust_env=self._uses_proxies)
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()

    def request(
        self, method: str, url: str, body: Any, *, timeout_s: float, max_bytes: int
    ) -> Received:
        """Send a request and return the whole answer.

        Args:
            method: `GET` or `POST`.
            url: Below the address.
            body: Sent as JSON; None for none.
            timeout_s: Maximum time from now to the end of the answer.
            max_bytes: Maximum size of its body.

        Raises:
            UnusableAnswer: It is too large, or in an encoding that was not asked for.
            httpx2.HTTPError: The network or the time failed, or it is not whole.
        """
        with self._connection(timeout_s) as connection:
            timeout = httpx2.Timeout(timeout_s, connect=min(LONGEST_CONNECT_S, timeout_s))
            with connection.client.stream(
                method,
                url,
                json=body,
                timeout=timeout,
                extensions={"trace": connection.trace},
            ) as response:
                content = _read(response, max_bytes)
            return Received(response.status_code, response.reason_phrase, response.headers, content)

    @contextlib.contextmanager
    def _connection(self, timeout_s: float) -> Iterator[_Connection]:
        """Yield a connection for one call, and keep it if the call goes well."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = _Connection(self._headers, self._ssl, trust_env=self._uses_proxies)
        timer = threading.Timer(timeout_s, connection.cut)
        timer.daemon = True
        began = time.monotonic()
        timer.start()
        try:
            yield connection
        except BaseException as error:
            connection.client.close()
            if connection.is_cut and isinstance(error, Exception):
                raise httpx2.ReadTimeout(
                    f"the answer was not whole after {time.monotonic() - began:.0f} s"
                ) from error
            raise
        finally:
            timer.cancel()
        with self._lock:
            if not connection.is_cut:
                self._idle.append(connection)
                return
        connection.client.close()

    def drop(self) -> None:
        """Close the connections that no call uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.client.close()


class _Connection:
    """A client with a single connection, which can be cut while another thread reads from it."""

    def __init__(self, headers: Mapping[str, str], ssl: Any, *, trust_env: bool) -> None:
        self.client = httpx2.Client(
            headers=headers,
            verify=ssl,
            trust_env=trust_env,
            limits=httpx2.Limits(max_connections=1),
            follow_redirects=False,
        )
        self.client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.is_cut = False
        self._stream: Any = None

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Note the network stream that the HTTP library opens."""
        stream = info.get("return_value")
        if hasattr(stream, "get_extra_info"):
            self._stream = stream
            if self.is_cut:
                self.cut()

    def cut(self) -> None:
        """End the connection, and with it a read that waits for the server."""
        self.is_cut = True
        if self._stream is not None:
            with contextlib.suppress(OSError):
                # The plain socket's method: TLS would wait for the other side.
                socket.socket.shutdown(self._stream.get_extra_info("socket"), socket.SHUT_RDWR)


def _read(response: httpx2.Response, max_bytes: int) -> bytes:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise UnusableAnswer(f"it is encoded as {encoding[:40]!r}, which was not asked for")
    unzip = zlib.decompressobj(wbits=31) if encoding == "gzip" else None
    content = bytearray()
    num_raw = 0
    for piece in response.iter_raw():
        num_raw += len(piece)
        if unzip is not None:
            try:
                piece = unzip.decompress(piece, max_bytes + 1 - len(content))
            except zlib.error as error:
                raise httpx2.DecodingError(f"it cannot be decompressed: {error}") from error
        content += piece
        if max(len(content), num_raw) > max_bytes:
            raise UnusableAnswer(
                f"it has more than {max_bytes:,} bytes, which is more than what was asked for needs"
            )
    if unzip is not None and num_raw and not unzip.eof:
        raise httpx2.DecodingError("its compressed body ends too early")
    return bytes(content)
