"""Who drafts the next block, and how far."""

from __future__ import annotations

from typing import NamedTuple

from proxytune.decode.lanes import Group, LanePlace


class Drafter(NamedTuple):
    """Whose guesses become the draft: a group, and in it a lane for each row, None for a row without."""

    group: Group
    sources: list[LanePlace | None]

    @property
    def covered(self) -> list[int]:
        """The rows that are guessed for."""
        return [place for place, source in enumerate(self.sources) if source is not None]


AHEAD_TOKENS = 16
"""Most tokens of a partial base's known continuation that the small models read at once."""
