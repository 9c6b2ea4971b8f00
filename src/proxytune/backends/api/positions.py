"""What is known along a row: the logprobs a server showed at each position, and bounds for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from proxytune.backends.api.answers import ShownToken
from proxytune.backends.api.tokens import ApiTokens
from proxytune.backends.base import Bounds
from proxytune.trace import Usage

ROUNDING = 1e-5
"""How much the rounding of logprobs on their way may change a probability."""

UNPROVABLE = Bounds(math.inf, 1.0)
"""Bounds where what is known is an estimate."""


@dataclass(slots=True)
class Position:
    """What a server shows of the token at one place.

    Args:
        token_ids: Seen tokens that the local vocabulary has.
        logprobs: Their logprobs, in nats.
        bounds: For all other tokens.
        unmatched: Probability of the seen tokens that the local vocabulary does not have.
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


NOTHING = Position([], [], UNPROVABLE, 0.0)
"""A position that was not asked about."""


def position_of(
    shown: ShownToken, tokens: ApiTokens, *, top_logprobs: int, is_scored: bool = False
) -> Position:
    """Match what a server shows at a position with the local vocabulary.

    A token that is listed because it was guessed, and not because it is likely, does not count as seen: the
    choice must not depend on what was guessed.

    Args:
        shown: What the server shows.
        tokens: The local vocabulary.
        top_logprobs: How many tokens the server was asked for.
        is_scored: Whether the row is a given text, whose own tokens count as seen.
    """
    found: dict[int, float] = {}
    unknown: list[float] = []
    seen = sorted(shown.top, key=lambda item: item[1], reverse=True)[:top_logprobs]
    if is_scored and shown.logprob is not None and shown.token not in dict(seen):
        seen.append((shown.token, shown.logprob))
    for name, logprob in seen:
        token_id = tokens.match(name)
        if token_id is None:
            unknown.append(logprob)
        else:
            found[token_id] = max(logprob, found.get(token_id, -math.inf))
    total = min(1.0, sum(math.exp(logprob) for _, logprob in seen))
    # A token that is listed in any case does not limit how likely the tokens are that are not.
    likeliest = [logprob for name, logprob in shown.top if name != shown.listed]
    lowest = min(likeliest, default=max((logprob for _, logprob in shown.top), default=0.0))
    if shown.is_by_text and len(likeliest) < top_logprobs:
        own_logprob = dict(shown.top).get(shown.listed or "", -math.inf)
        if len(likeliest) < top_logprobs - 1 or own_logprob < lowest:
            # Tokens of one text have become one entry, which may hold the logprob of the least likely.
            lowest = 0.0
    unmatched = min(1.0, sum(math.exp(logprob) for logprob in set(unknown)))
    if len(found) >= len(tokens.bytes_of):
        bounds = Bounds(-math.inf, 0.0)  # the whole vocabulary is there
    else:
        ceiling = max([min(lowest, math.log(max(0.0, 1.0 - total) + ROUNDING)), *unknown])
        rest = max(0.0, 1.0 - sum(map(math.exp, found.values()))) + ROUNDING
        bounds = Bounds(ceiling, min(1.0, rest))
    return Position(list(found), list(found.values()), bounds, unmatched)


@dataclass(slots=True)
class ApiRow:
    """One row: its tokens, and the stretch of known positions along them.

    Args:
        prompt: As it was given.
        token_ids: The prompt's tokens and the new ones.
        start: Length of the row before `stretch[0]`.
        stretch: Known positions, from there on.
        stretch_ids: Tokens at these positions, for which the stretch holds: one fewer, or as many.
        has_ended: Whether the base ends the text after the stretch.
        num_left: How many more tokens may come; None if that is not known.
        can_score: Whether the server's tokens of the row's text have matched the row's so far.
        is_scored: Whether the row is a given text, whose own tokens count as seen.
        usage: What the row's calls have cost.
    """

    prompt: Sequence[int]
    token_ids: list[int]
    start: int = 0
    stretch: list[Position] = field(default_factory=list)
    stretch_ids: list[int] = field(default_factory=list)
    has_ended: bool = False
    num_left: int | None = None
    can_score: bool = True
    is_scored: bool = False
    usage: Usage = field(default_factory=Usage)

    def known(self, length: int) -> Position | None:
        """Return the position after the first `length` tokens, or None if it is not known."""
        place = length - self.start
        if not 0 <= place < len(self.stretch):
            return None
        if self.token_ids[self.start : length] != self.stretch_ids[:place]:
            return None
        return self.stretch[place]

    def is_at_end(self, length: int) -> bool:
        """Return whether the first `length` tokens are the whole stretch, after which the text ends."""
        return self.has_ended and self.token_ids[self.start : length] == self.stretch_ids

    def ahead(self, token_id: int) -> list[int]:
        """Return the tokens of the stretch after the row and this token; none if they leave the stretch."""
        place = len(self.token_ids) - self.start
        if place < 0 or self.stretch_ids[: place + 1] != [*self.token_ids[self.start :], token_id]:
            return []
        return self.stretch_ids[place + 1 : len(self.stretch) - 1]

    def replace_stretch(
        self, start: int, positions: list[Position], token_ids: list[int], *, has_ended: bool
    ) -> None:
        """Forget the stretch and keep another one, whose positions are counted in `usage`."""
        self.start, self.stretch, self.stretch_ids = start, positions, token_ids
        self.has_ended = has_ended
        unmatched = sum(position.unmatched for position in positions)
        self.usage += Usage(num_positions=len(positions), unmatched_prob=unmatched)

    def rewind(self, num_tokens: int) -> None:
        """Forget the last tokens, and the stretch if other tokens may now come before it."""
        if not num_tokens:
            return
        del self.token_ids[-num_tokens:]
        if len(self.token_ids) < self.start:
            self.stretch, self.stretch_ids, self.has_ended = [], [], False
        if self.num_left is not None:
            self.num_left += num_tokens


@dataclass(slots=True)
class ApiState:
    """A batch: its rows, and the bounds of the positions that were asked for last."""

    rows: list[ApiRow]
    bounds: list[list[Bounds]] = field(default_factory=list)
