"""An HTTP server on 127.0.0.1 that runs in a thread and can drop the connections its clients keep open."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackServer(ThreadingHTTPServer):
    """Serves from `start` to `stop`, one thread a connection.

    Args:
        handler: Of a connection; it finds `owner` at `self.server.owner`.
        owner: What the handler works for.
        port: 0 for a free one.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler], owner: Any, *, port: int = 0) -> None:
        self.owner = owner
        self.num_connections = 0
        self.is_stopped = False
        self._open: set[socket.socket] = set()
        self._to_reset: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        super().__init__(("127.0.0.1", port), handler)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    def start(self) -> None:
        """Begin to accept connections."""
        self._thread.start()

    def stop(self) -> None:
        """Stop to listen and drop every connection; not for the thread that accepts them."""
        self.is_stopped = True
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def end_with_reset(self, connection: socket.socket) -> None:
        """Let a connection end with RST instead of FIN, once its handler is done."""
        with self._lock:
            self._to_reset.add(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection."""
        with self._lock:
            self._open.add(request)
            self.num_connections += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection, and end it."""
        with self._lock:
            self._open.discard(request)
            is_reset = request in self._to_reset
            self._to_reset.discard(request)
        if is_reset:
            with contextlib.suppress(OSError):
                request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that goes away is no failure of the server."""


class QuietHandler(BaseHTTPRequestHandler):
    """HTTP/1.1 with keep-alive; what is written leaves in large packets and is not logged."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 65536
    server: LoopbackServer

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""

    def parse_request(self) -> bool:
        """Let a request that comes after the server's end go unheard."""
        if self.server.is_stopped:
            self.close_connection = True
            return False
        return super().parse_request()

    def read_body(self) -> bytes:
        """Return the body of the request."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, body: bytes, **headers: str) -> None:
        """Answer with a whole body; underscores in header names stand for hyphens."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_chunk(self, data: bytes) -> None:
        """Send one chunk of a chunked answer at once; an empty one ends it."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()
