"""What is known along a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from proxytune.backends.base import (
    Bounds,
)
from proxytune.trace import Usage


@dataclass(slots=True)
class Position:
    """What the server says of the token at one place.

    Args:
        token_ids: The seen tokens that could be matched.
        logprobs: Theirs, in nats.
        bounds: For all other tokens.
        unmatched: Probability of seen tokens that are none of the local vocabulary.
    """

    token_ids: list[int]
    logprobs: list[float]
    bounds: Bounds
    unmatched: float

    def dense(self, width: int) -> Tensor:
        """Return `[width]` logprobs, -inf where nothing is known."""
        logits = torch.full((width,), -torch.inf)
        if self.token_ids:
            logits[self.token_ids] = torch.tensor(self.logprobs)
        return logits


UNPROVABLE = Bounds(math.inf, 1.0)
"""Where what is known is an estimate."""

NOTHING = Position([], [], UNPROVABLE, 0.0)
"""Where nothing was asked."""


@dataclass(slots=True)
class Row:
    """One row: its tokens, and what is known of positions along them.

    Args:
        prompt: As it was given.
        token_ids: The prompt's and the new ones.
        start: Length of the row before `stretch[0]`.
        stretch: Known positions, from there on.
        tokens: What stands at these positions where they hold; one less, or as many.
        has_ended: Whether the base ends the text after the stretch.
        num_left: How many tokens may still come.
        can_score: Whether the server's tokens of the row's text were the row's so far.
        is_scored: Whether the row is a given text, whose own tokens count as seen.
        usage: Of this row's calls.
    """

    prompt: Sequence[int]
    token_ids: list[int]
    start: int = 0
    stretch: list[Position] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    has_ended: bool = False
    num_left: int | None = None
    can_score: bool = True
    is_scored: bool = False
    usage: Usage = field(default_factory=Usage)

    def known(self, length: int) -> Position | None:
        """Return the position after the first `length` tokens, if it is known."""
        place = length - self.start
        if not 0 <= place < len(self.stretch):
            return None
        if self.token_ids[self.start : length] != self.tokens[:place]:
            return None
        return self.stretch[place]

    def is_at_end(self, length: int) -> bool:
        """Whether the first `length` tokens are the whole stretch, after which the base ends the text."""
        return self.has_ended and self.token_ids[self.start : length] == self.tokens

    def num_used(self) -> int:
        """Return how many of the stretch's tokens the row has."""
        count = 0
        for one, other in zip(self.token_ids[self.start :], self.tokens, strict=False):
            if one != other:
                break
            count += 1
        return count


@dataclass(slots=True)
class ApiState:
    """A batch: its rows, and the bounds of the positions asked for last."""

    rows: list[Row]
    bounds: list[list[Bounds]] = field(default_factory=list)


def usage_of(positions: Sequence[Position]) -> Usage:
    """Return what is counted of positions that the server told."""
    unmatched = sum(position.unmatched for position in positions)
    return Usage(num_positions=len(positions), unmatched_prob=unmatched)
