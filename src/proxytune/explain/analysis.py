"""What steering does over many texts: the paper's figure 3, table 6 and section 6.1, one trace at a time.

Memory holds sums by position and by token type, and one trace; token ids wait in a temporary file for the
commonest contexts of the few types that are shown.

Words: *Delta* is the paper's change of probability, steered minus base, of the token that stands there
(section 6.1). A token is *changed* if base and steered model put different tokens first (appendix C.2). An
*equation* stands within one clause of one line: before an equals sign numbers with operators between them and
perhaps their units (`3 boxes x 4 eggs`), behind it a number, or more arithmetic, or more equals signs. Its
left-hand side is what comes before the first equals sign, from the first number on; its right-hand side ends
with the last number. The paper does not say how it found equations; this is a choice.

Source: Liu et al. 2024, arXiv:2401.08565, sections 6.1 and 6.2, appendix C.2.
"""

from __future__ import annotations

import array
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from proxytune.errors import InvalidRequest
from proxytune.explain.equations import equation_spans
from proxytune.explain.moves import Move, label, moves
from proxytune.explain.summary import Tally, TokenType, common_contexts
from proxytune.explain.welch import Moments, welch
from proxytune.trace import Trace

MIN_COUNT = 100
"""Occurrences below which a token type is left out: the paper's number."""
RARE = 2000
"""Of fewer than `MIN_COUNT * RARE` tokens, types that make up less than one in so many are left out."""
NUM_TYPES = 30
"""Token types that are kept, those with the highest mean Delta."""
END_OF_TEXT = -1
"""Between texts in the temporary file."""
CHUNK_IDS = 1 << 16


class PositionBin(NamedTuple):
    """Positions that are shown together."""

    first: int
    last: int
    num_tokens: int
    share_changed: float | None
    mean_prob_change: float | None


@dataclass(slots=True)
class Group:
    """The texts that were made with the same strengths.

    Args:
        name: The strengths in words.
        alphas: By expert.
        num_texts: How many.
        tally: All their tokens.
        positions: Tokens by position.
        left: Delta of tokens on the left-hand sides of equations.
        right: Of those on right-hand sides.
        num_equations: How many there are.
        types: The token types that moved most, best first; empty until all is read.
        min_count: Occurrences below which a type was left out.
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
        """The alpha that all its experts have; None if they differ."""
        values = set(self.alphas.values())
        return values.pop() if len(values) == 1 else None

    def position_bins(self) -> list[PositionBin]:
        """Return the positions, singly up to 9 and then in bins that grow by a fifth of what came before."""
        bins = []
        first = 0
        while first < len(self.positions):
            width = max(1, first // 5) if first >= 10 else 1
            part = self.positions[first : first + width]
            whole = Tally()
            for tally in part:
                whole.num_tokens += tally.num_tokens
                whole.num_known += tally.num_known
                whole.num_changed += tally.num_changed
                whole.num_shifts += tally.num_shifts
                whole.sum_prob_change += tally.sum_prob_change
            bins.append(
                PositionBin(
                    first,
                    first + len(part) - 1,
                    whole.num_tokens,
                    whole.share_changed,
                    whole.mean_prob_change,
                )
            )
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
                    "position": place,
                    "num_tokens": tally.num_tokens,
                    "share_changed": tally.share_changed,
                    "mean_prob_change": tally.mean_prob_change,
                }
                for place, tally in enumerate(self.positions)
            ],
            "min_count": self.min_count,
            "token_types": [kind.to_dict() for kind in self.types],
            "equations": {
                "num_equations": self.num_equations,
                "left": self.left.to_dict(),
                "right": self.right.to_dict(),
                "welch": None if test is None else test._asdict(),
            },
        }


@dataclass(frozen=True, slots=True)
class Analysis:
    """What steering did over many texts.

    Args:
        groups: One per set of strengths, weakest first.
    """

    groups: tuple[Group, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers for JSON."""
        return {"groups": [group.to_dict() for group in self.groups]}


def analyze(
    traces: Iterable[Trace], *, min_count: int | None = None, num_types: int = NUM_TYPES
) -> Analysis:
    """Sum up explained traces, which are read once and not kept.

    Args:
        traces: At least one, each with at least one token.
        min_count: Leave out token types that occur less often; None for `MIN_COUNT`, less where there are few
            tokens.
        num_types: Keep so many of them.

    Raises:
        InvalidRequest: There is no trace, or one is not explained.
    """
    builders: dict[tuple[tuple[str, float], ...], _Builder] = {}
    for trace in traces:
        key = tuple(sorted(trace.alphas.items()))
        builder = builders.get(key)
        if builder is None:
            builder = builders[key] = _Builder(trace.alphas)
        builder.add(trace)
    if not any(builder.group.tally.num_tokens for builder in builders.values()):
        raise InvalidRequest(
            "there are no traces with tokens in them, so there is nothing to analyze"
        )
    order = sorted(builders, key=lambda key: [alpha for _, alpha in key])
    groups = [builders[key].finish(min_count, num_types) for key in order]
    return Analysis(tuple(groups))


class _Builder:
    """Sums up the traces of one group."""

    def __init__(self, alphas: Mapping[str, float]) -> None:
        name = ", ".join(f"{name} at alpha {alpha:g}" for name, alpha in alphas.items())
        self.group = Group(name or "no expert", dict(alphas))
        self._types: dict[int, Tally] = {}
        self._texts: dict[int, str | bytes] = {}
        self._ids = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `finish`

    def add(self, trace: Trace) -> None:
        """Count a text."""
        group = self.group
        group.num_texts += 1
        told = moves(trace)
        while len(group.positions) < len(told):
            group.positions.append(Tally())
        for place, move in enumerate(told):
            group.tally.add(move)
            group.positions[place].add(move)
            tally = self._types.get(move.token_id)
            if tally is None:
                tally = self._types[move.token_id] = Tally()
                token = trace.tokens.get(move.token_id)
                if token is not None:
                    self._texts[move.token_id] = token
            tally.add(move)
        self._add_equations(told)
        array.array("i", [*trace.token_ids, END_OF_TEXT]).tofile(self._ids)

    def _add_equations(self, told: Sequence[Move]) -> None:
        text = "".join(move.piece for move in told)
        if "=" not in text:
            return
        sides = [(span.start, span.end, span.is_left) for span in equation_spans(text)]
        self.group.num_equations += len(sides) // 2
        if not sides:
            return
        place, at = 0, 0
        for move in told:
            start, end = at, at + len(move.piece)
            at = end
            while place < len(sides) and sides[place][1] <= start:
                place += 1
            # A token's place is that of what it writes: the space before it does not count, an equals sign
            # belongs to neither side.
            written = move.piece.strip()
            if not written or written == "=" or move.prob_change is None:
                continue
            first = start + move.piece.index(written[0])
            last = first + len(written)
            for span_start, span_end, is_left in sides[place : place + 2]:
                if span_start <= first and last <= span_end:
                    (self.group.left if is_left else self.group.right).add(move.prob_change)

    def finish(self, min_count: int | None, num_types: int) -> Group:
        """Find the token types that moved most, and their contexts."""
        if min_count is None:
            min_count = max(2, min(MIN_COUNT, self.group.tally.num_tokens // RARE))
        self.group.min_count = min_count
        kinds = [
            (token_id, tally)
            for token_id, tally in self._types.items()
            if tally.num_tokens >= min_count and tally.mean_prob_change is not None
        ]
        kinds.sort(key=lambda kind: -(kind[1].mean_prob_change or 0.0))
        kinds = kinds[:num_types]
        with self._ids:
            contexts = common_contexts(self._saved_texts(), [token_id for token_id, _ in kinds])
        for token_id, tally in kinds:
            window, count = contexts[token_id]
            self.group.types.append(
                TokenType(token_id, self._label(token_id), tally, self._text(window), count)
            )
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
        content = b"".join(
            part if isinstance(part, bytes) else (part or "").encode() for part in parts
        )
        return label(content, -1)
