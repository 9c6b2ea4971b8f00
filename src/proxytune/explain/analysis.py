"""What steering does over many texts: the paper's figure 3, table 6 and section 6.1, one trace at a time.

Memory holds one trace, and sums by position and by token type. Token ids go to a temporary file, from which
the most common contexts are counted for the few token types that are shown.

Definitions. *Delta* is the paper's change in the probability of the token in the text, steered minus base
(section 6.1). A token is *changed* if base and steered model put different tokens first (appendix C.2).
`equations.py` defines the two sides of an equation.

Source: Liu et al. 2024, arXiv:2401.08565, sections 6.1 and 6.2, appendix C.2.
"""

from __future__ import annotations

import array
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from proxytune.errors import InvalidRequest
from proxytune.explain.equations import equation_sides
from proxytune.explain.moves import Move, label, moves
from proxytune.explain.summary import Tally, TokenType, common_contexts
from proxytune.explain.welch import Moments, welch
from proxytune.files import writing
from proxytune.trace import Trace

MIN_COUNT = 100
"""Minimum number of occurrences of a token type that is shown: the paper's number."""
TOKENS_PER_OCCURRENCE = 2000
"""With fewer than `MIN_COUNT` times as many tokens, the minimum is one occurrence per this many tokens."""
NUM_TYPES = 30
"""Number of token types that are kept: those with the highest mean Delta."""
END_OF_TEXT = -1
"""Separates texts in the temporary file."""
CHUNK_IDS = 1 << 16
"""Number of token ids read from the temporary file at once."""


class PositionBin(NamedTuple):
    """The tokens from position `first` up to and including `last`."""

    first: int
    last: int
    num_tokens: int
    share_changed: float | None
    mean_prob_change: float | None


@dataclass(slots=True)
class TraceGroup:
    """The traces that were generated with the same strengths.

    Args:
        name: The strengths in words.
        alphas: Strength of each expert.
        num_texts: Number of traces.
        tally: All their tokens.
        positions: A tally of the tokens at each position.
        left: Delta of the tokens on left-hand sides of equations.
        right: Delta of the tokens on right-hand sides of equations.
        num_equations: Number of equations.
        types: The token types that moved most, highest mean Delta first; empty until all traces are read.
        min_count: Minimum number of occurrences of a token type in `types`.
    """

    name: str
    alphas: Mapping[str, float]
    num_texts: int = 0
    tally: Tally = field(default_factory=Tally)
    positions: list[Tally] = field(default_factory=list)
    left: Moments = field(default_factory=Moments)
    right: Moments = field(default_factory=Moments)
    num_equations: int = 0
    types: list[TokenType] = field(default_factory=list)
    min_count: int = MIN_COUNT

    @property
    def strength(self) -> float | None:
        """The alpha that all its experts share; None if they differ."""
        values = set(self.alphas.values())
        return values.pop() if len(values) == 1 else None

    def position_bins(self) -> list[PositionBin]:
        """Return single positions up to 9, then bins that are a fifth as wide as what precedes them."""
        bins = []
        first = 0
        while first < len(self.positions):
            width = max(1, first // 5) if first >= 10 else 1
            part = self.positions[first : first + width]
            whole = Tally(*map(sum, zip(*map(astuple, part), strict=True)))
            means = whole.share_changed, whole.mean_prob_change
            bins.append(PositionBin(first, first + len(part) - 1, whole.num_tokens, *means))
            first += width
        return bins

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers for JSON."""
        test = welch(self.left, self.right)
        return {
            "name": self.name,
            "alphas": dict(self.alphas),
            "num_texts": self.num_texts,
            **self.tally.to_dict(),
            "positions": [
                {
                    "position": position,
                    "num_tokens": tally.num_tokens,
                    "share_changed": tally.share_changed,
                    "mean_prob_change": tally.mean_prob_change,
                }
                for position, tally in enumerate(self.positions)
            ],
            "min_count": self.min_count,
            "token_types": [each.to_dict() for each in self.types],
            "equations": {
                "num_equations": self.num_equations,
                "left": self.left.to_dict(),
                "right": self.right.to_dict(),
                "welch": None if test is None else test._asdict(),
            },
        }


@dataclass(frozen=True, slots=True)
class Analysis:
    """What steering did over many texts: a group per set of strengths, weakest first."""

    groups: tuple[TraceGroup, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers for JSON."""
        return {"groups": [group.to_dict() for group in self.groups]}


def analyze(
    traces: Iterable[Trace], *, min_count: int | None = None, num_types: int = NUM_TYPES
) -> Analysis:
    """Sum up explained traces, reading each once and keeping none.

    Args:
        traces: The traces; at least one must have a token.
        min_count: Minimum number of occurrences of a token type; None for `MIN_COUNT`, or fewer if there are
            few tokens.
        num_types: Maximum number of token types to keep.

    Raises:
        InvalidRequest: No trace has tokens, or a trace is not explained.
        OutputFileError: The directory for temporary files is full.
    """
    builders: dict[tuple[tuple[str, float], ...], _GroupBuilder] = {}
    for trace in traces:
        key = tuple(sorted(trace.alphas.items()))
        if key not in builders:
            builders[key] = _GroupBuilder(trace.alphas)
        builders[key].add(trace)
    if not any(builder.group.tally.num_tokens for builder in builders.values()):
        raise InvalidRequest("no trace contains any tokens, so there is nothing to analyze")
    order = sorted(builders, key=lambda key: [alpha for _, alpha in key])
    groups = [builders[key].finish(min_count, num_types) for key in order]
    return Analysis(tuple(groups))


def _writing_temporarily() -> AbstractContextManager[None]:
    hint = "make room there, or name another directory in the variable TMPDIR"
    return writing(Path(tempfile.gettempdir()), hint=hint)


class _GroupBuilder:
    """Sums up the traces of one group."""

    def __init__(self, alphas: Mapping[str, float]) -> None:
        name = ", ".join(f"{name} at alpha {alpha:g}" for name, alpha in alphas.items())
        self.group = TraceGroup(name or "no expert", dict(alphas))
        self._types: dict[int, Tally] = {}
        self._texts: dict[int, str | bytes] = {}
        with _writing_temporarily():
            self._ids = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `finish`

    def add(self, trace: Trace) -> None:
        """Add a trace."""
        group = self.group
        group.num_texts += 1
        token_moves = moves(trace)
        while len(group.positions) < len(token_moves):
            group.positions.append(Tally())
        for position, move in enumerate(token_moves):
            group.tally.add(move)
            group.positions[position].add(move)
            if move.token_id not in self._types:
                self._types[move.token_id] = Tally()
                if move.token_id in trace.tokens:
                    self._texts[move.token_id] = trace.tokens[move.token_id]
            self._types[move.token_id].add(move)
        self._add_equations(token_moves)
        with _writing_temporarily():
            array.array("i", [*trace.token_ids, END_OF_TEXT]).tofile(self._ids)

    def _add_equations(self, token_moves: Sequence[Move]) -> None:
        text = "".join(move.piece for move in token_moves)
        if "=" not in text:
            return
        sides = list(equation_sides(text))
        self.group.num_equations += len(sides) // 2
        next_side = end = 0
        for move in token_moves:
            start, end = end, end + len(move.piece)
            while next_side < len(sides) and sides[next_side].end <= start:
                next_side += 1
            # Spaces around a token do not count, and an equals sign belongs to neither side.
            written = move.piece.strip()
            if not written or written == "=" or move.prob_change is None:
                continue
            first = start + move.piece.index(written[0])
            last = first + len(written)
            for side in sides[next_side : next_side + 2]:
                if side.start <= first and last <= side.end:
                    (self.group.left if side.is_left else self.group.right).add(move.prob_change)

    def finish(self, min_count: int | None, num_types: int) -> TraceGroup:
        """Return the group, with the token types that moved most and their contexts."""
        if min_count is None:
            min_count = max(2, min(MIN_COUNT, self.group.tally.num_tokens // TOKENS_PER_OCCURRENCE))
        self.group.min_count = min_count
        types = [
            (token_id, tally)
            for token_id, tally in self._types.items()
            if tally.num_tokens >= min_count and tally.mean_prob_change is not None
        ]
        types.sort(key=lambda each: -(each[1].mean_prob_change or 0.0))
        types = types[:num_types]
        with _writing_temporarily(), self._ids:
            contexts = common_contexts(self._saved_texts(), [token_id for token_id, _ in types])
        for token_id, tally in types:
            window, count = contexts[token_id]
            found = TokenType(token_id, self._label(token_id), tally, self._text(window), count)
            self.group.types.append(found)
        return self.group

    def _saved_texts(self) -> Iterator[list[int]]:
        self._ids.seek(0)
        text: list[int] = []
        while raw := self._ids.read(CHUNK_IDS * array.array("i").itemsize):
            ids = array.array("i")
            ids.frombytes(raw)
            for token_id in ids:
                if token_id == END_OF_TEXT:
                    yield text
                    text = []
                else:
                    text.append(token_id)

    def _label(self, token_id: int) -> str:
        return label(self._texts.get(token_id), token_id)

    def _text(self, token_ids: Sequence[int]) -> str:
        parts = [self._texts.get(token_id) for token_id in token_ids]
        if any(part is None for part in parts):
            return "".join(map(self._label, token_ids))
        raw = (part if isinstance(part, bytes) else (part or "").encode() for part in parts)
        return label(b"".join(raw), -1)
