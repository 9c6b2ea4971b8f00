"""What is checked of a request's body before it is parsed: how much of it memory may hold, and its shape.

Two mebibytes of `[],[],…` become a hundred megabytes of Python objects, and take a parser and a validator
seconds that no other request gets. Both are bounded here by counting: bytes while they arrive, lists,
objects and strings before they are parsed. The meaning of a body belongs to `schema.py`.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

from proxytune.errors import InvalidRequest, Unavailable

BODIES_HELD = 16
"""Bodies that are arriving or waiting to be read hold at most this many times the limit of one body."""
MAX_STRINGS = 16_384
"""Maximum number of strings in a body, keys included; a thousand messages of three parts have 15,000."""
MAX_CONTAINERS = 8_192
"""Maximum number of lists and objects in a body; a thousand messages of three parts have 5,000."""
MAX_DEPTH = 32
"""Maximum depth of nesting; a request's own fields nest five deep."""

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class InFlight:
    """Counts the bytes of the bodies in memory, and shares the allowance between clients.

    A body may grow while twice its size and all else that its client has in flight are no more than what is
    free. However much a client sends, over however many connections, this leaves room for the bodies of
    others, and for a small one of its own: n bodies that grow as far as they can have 1 / (2 n + 1) each.

    Args:
        max_bytes: Maximum number of bytes of all bodies together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._held: Counter[str] = Counter()

    def open(self, client: str) -> Held:
        """Return an empty body of a client, for which bytes can be taken."""
        return Held(self, client)

    def _add(self, client: str, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._held[client] += num_bytes
        if not self._held[client]:
            del self._held[client]


class Held:
    """A body in memory, and the bytes that are counted for it until it is taken or dropped."""

    def __init__(self, whole: InFlight, client: str) -> None:
        self._whole = whole
        self._client = client
        self._data = bytearray()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._data)

    def add(self, piece: bytes) -> None:
        """Append bytes.

        Raises:
            Unavailable: The bodies of all clients, or of this one, take too much memory.
        """
        whole, size = self._whole, self._num_bytes + len(piece)
        others = whole.num_bytes - self._num_bytes
        own = whole._held[self._client] - self._num_bytes
        if 2 * size + own > whole.max_bytes - (others + size):
            raise Unavailable(
                "too many large requests are arriving at once.\nhint: try again in a few seconds"
            )
        self._data += piece
        whole._add(self._client, len(piece))
        self._num_bytes = size

    def take(self) -> bytearray:
        """Return the body and forget it here; its bytes still count until `close`."""
        data, self._data = self._data, bytearray()
        return data

    def close(self) -> None:
        """Count its bytes no longer."""
        self._data = bytearray()
        self._whole._add(self._client, -self._num_bytes)
        self._num_bytes = 0


def check_shape(body: bytes | bytearray) -> None:
    """Refuse JSON with more strings, lists and objects than any request needs, without parsing it.

    Numbers are not counted: a body cannot hold enough of them to matter.

    Raises:
        InvalidRequest: There are too many, or they are nested too deeply.
    """
    if b"\\" in body:
        # Afterwards each quotation mark begins or ends a string.
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_strings = body.count(b'"') // 2
    if num_strings > MAX_STRINGS:
        raise _too_many("strings", num_strings, MAX_STRINGS)
    brackets = b"".join(body.split(b'"')[::2]).translate(None, _NOT_BRACKETS)
    num_containers = brackets.count(b"[") + brackets.count(b"{")
    if num_containers > MAX_CONTAINERS:
        raise _too_many("lists and objects", num_containers, MAX_CONTAINERS)
    depth = max(accumulate(_STEP[bracket] for bracket in brackets), default=0)
    if depth > MAX_DEPTH:
        raise InvalidRequest(
            f"the body nests lists and objects {depth:,} deep, and this server reads at most {MAX_DEPTH}"
        )


def _too_many(what: str, found: int, allowed: int) -> InvalidRequest:
    return InvalidRequest(
        f"the body has {found:,} {what}, and this server reads at most {allowed:,} in one request.\n"
        "hint: send several requests"
    )
