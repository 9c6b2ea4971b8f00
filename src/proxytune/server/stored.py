"""Answers that are kept so that a later request can go on from them: each client's own, in bounded memory.

An answer is kept with the conversation that led to it, both as JSON, so that its size is known. What was used
least recently is forgotten first: of a client that keeps more than its share, or, when all of them together
keep too much, of the client that keeps most. HTTP never reaches this file.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

MAX_KEPT = 256
"""Maximum number of answers of one client."""
MAX_KEPT_BYTES = 8 * 2**20
"""Maximum number of bytes of one client's answers."""
MAX_TOTAL_BYTES = 64 * 2**20
"""Maximum number of bytes of all answers."""
OVERHEAD_BYTES = 1024
"""What an answer counts beside its JSON, so that many small ones are bounded as well."""


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer.

    Args:
        answer: The JSON that its client got.
        conversation: JSON of the messages up to and with this answer, without instructions.
    """

    answer: bytes
    conversation: bytes

    @property
    def num_bytes(self) -> int:
        """What it counts."""
        return len(self.answer) + len(self.conversation) + OVERHEAD_BYTES


class KeptAnswers:
    """The answers of all clients, by client and id. Any thread may call it.

    Args:
        max_kept: Maximum number of answers of one client.
        max_kept_bytes: Maximum number of bytes of one client's answers.
        max_total_bytes: Maximum number of bytes of all answers.
    """

    def __init__(
        self,
        *,
        max_kept: int = MAX_KEPT,
        max_kept_bytes: int = MAX_KEPT_BYTES,
        max_total_bytes: int = MAX_TOTAL_BYTES,
    ) -> None:
        self._max_kept = max_kept
        self._max_kept_bytes = max_kept_bytes
        self._max_total_bytes = max_total_bytes
        self._kept: dict[str, OrderedDict[str, Kept]] = {}  # what was used last is at the end
        self._num_bytes: dict[str, int] = {}
        self._total = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """What all answers count."""
        with self._lock:
            return self._total

    def has_room(self, kept: Kept) -> bool:
        """Whether an answer is small enough to be kept at all."""
        return kept.num_bytes <= min(self._max_kept_bytes, self._max_total_bytes)

    def add(self, client: str, name: str, kept: Kept) -> None:
        """Keep an answer for which there is room, and forget others for it."""
        assert self.has_room(kept)
        with self._lock:
            own = self._kept.setdefault(client, OrderedDict())
            own[name] = kept
            self._num_bytes[client] = self._num_bytes.get(client, 0) + kept.num_bytes
            self._total += kept.num_bytes
            while len(own) > self._max_kept or self._num_bytes[client] > self._max_kept_bytes:
                self._drop(client, next(iter(own)))
            while self._total > self._max_total_bytes:
                most = max(self._num_bytes, key=lambda each: self._num_bytes[each])
                self._drop(most, next(iter(self._kept[most])))

    def get(self, client: str, name: str) -> Kept | None:
        """Return a client's answer; None if it has none of that name, or no longer."""
        with self._lock:
            own = self._kept.get(client)
            if own is None or name not in own:
                return None
            own.move_to_end(name)
            return own[name]

    def remove(self, client: str, name: str) -> bool:
        """Forget a client's answer; return whether there was one."""
        with self._lock:
            if name not in self._kept.get(client, ()):
                return False
            self._drop(client, name)
            return True

    def _drop(self, client: str, name: str) -> None:
        own = self._kept[client]
        num_bytes = own.pop(name).num_bytes
        self._num_bytes[client] -= num_bytes
        self._total -= num_bytes
        if not own:
            del self._kept[client], self._num_bytes[client]
