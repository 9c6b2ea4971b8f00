"""Drafts from the text itself."""

from __future__ import annotations

from collections.abc import Sequence

LOOKUP_SIZES = (4, 3, 2)
"""How many of the last tokens prompt lookup searches for; the longest match counts."""


class PromptLookup:
    """Guesses that the last tokens are followed by what followed them earlier, in the prompt or the output.

    Args:
        token_ids: The prompt.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._match: int | None = None
        for token_id in token_ids:
            self.push(token_id)

    def push(self, token_id: int) -> None:
        """Append a token of the text."""
        self._token_ids.append(token_id)
        end = len(self._token_ids)
        self._match = None
        for size in LOOKUP_SIZES:
            if size > end:
                continue
            last = tuple(self._token_ids[end - size :])
            if self._match is None:
                self._match = self._ends.get(last)
            self._ends[last] = end

    def propose(self, num_tokens: int) -> list[int]:
        """Return `num_tokens` guesses; none if the last tokens have not occurred before.

        A match near the end means that the text repeats itself, so the guess repeats it further.
        """
        if self._match is None:
            return []
        followed = self._token_ids[self._match : self._match + num_tokens]
        return [followed[i % len(followed)] for i in range(num_tokens)]
