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
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from proxytune.errors import InvalidRequest
from proxytune.report import Move, Tally, TokenType, common_contexts, label, moves
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

# The minus and times signs of typography too, x and of for times, as models write them; Markdown escapes *.
_OPERATORS = {"+", "-", "\u2212", "*", "\\*", "/", "x", "\u00d7", "÷", "·", "of"}
_NUMBER = re.compile(
    r"[\d.,$€£%()\[\]+*/x\u00d7÷·^\\\u2212-]*\d[\d.,$€£%()\[\]+*/x\u00d7÷·^\\\u2212-]*"
)
_OPERATION = re.compile(r"[+*/x\u00d7÷·^\u2212-]")
_WORD = re.compile(r"[^\s=]+")
_END_OF_CLAUSE = tuple(".,;:!?")
MAX_UNIT_WORDS = 4
"""Words in a row that may stand between numbers and operators, such as `meters per second`."""


@dataclass(slots=True)
class Moments:
    """Count, mean and variance of numbers that come one at a time (Welford 1962)."""

    num_tokens: int = 0
    mean: float = 0.0
    _sum_squares: float = 0.0

    def add(self, value: float) -> None:
        """Count a number."""
        self.num_tokens += 1
        step = value - self.mean
        self.mean += step / self.num_tokens
        self._sum_squares += step * (value - self.mean)

    @property
    def variance(self) -> float:
        """Of a sample: divided by one less than the count. 0 for fewer than two numbers."""
        return self._sum_squares / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return math.sqrt(self.variance / self.num_tokens) if self.num_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {
            "num_tokens": self.num_tokens,
            "mean_prob_change": self.mean if self.num_tokens else None,
            "standard_deviation": math.sqrt(self.variance),
        }


class Welch(NamedTuple):
    """Welch's test of whether two means differ, two-sided.

    `log10_p` holds where `p` is too small for a float.
    """

    t: float
    degrees: float
    p: float
    log10_p: float


def welch(one: Moments, other: Moments) -> Welch | None:
    """Return Welch's t-test (1947) of two samples; None with fewer than two numbers, or if none varies."""
    if one.num_tokens < 2 or other.num_tokens < 2:
        return None
    parts = [m.variance / m.num_tokens for m in (one, other)]
    if not sum(parts):
        return None
    t = (one.mean - other.mean) / math.sqrt(sum(parts))
    shares = [part**2 / (m.num_tokens - 1) for part, m in zip(parts, (one, other), strict=True)]
    degrees = sum(parts) ** 2 / sum(shares)
    log_p = _log_incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))
    return Welch(t, degrees, math.exp(log_p), log_p / math.log(10))


def _log_incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the log of the regularised incomplete beta function (continued fraction, modified Lentz)."""
    if x >= 1:
        return 0.0
    if x > (a + 1) / (a + b + 2):
        return math.log(-math.expm1(_log_incomplete_beta(b, a, 1 - x)))
    front = (
        math.lgamma(a + b)
        - math.lgamma(a)
        - math.lgamma(b)
        + a * math.log(x)
        + b * math.log1p(-x)
        - math.log(a)
    )
    tiny = 1e-300
    c, d = 1.0, 1.0 / max(tiny, 1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d or tiny)
            c = 1 + numerator / c or tiny
            total *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front + math.log(total)


class Span(NamedTuple):
    """Characters of a text that are one side of an equation."""

    start: int
    end: int
    is_left: bool


def equation_spans(text: str) -> Iterator[Span]:
    """Yield the sides of the equations in a text, the left one first; see the module's docstring."""
    start = 0
    for line in text.split("\n"):
        if "=" in line:
            yield from _line_spans(line, start)
        start += len(line) + 1


def _line_spans(line: str, offset: int) -> Iterator[Span]:
    edges = [-1, *(place for place, c in enumerate(line) if c == "="), len(line)]
    parts = [
        [(m.start(), m.end()) for m in _WORD.finditer(line, first + 1, last)]
        for first, last in pairwise(edges)
    ]
    place = 0
    while place + 1 < len(parts):
        left, right = _left_side(line, parts[place]), _right_side(line, parts[place + 1])
        place += 1
        if left is None or right is None:
            continue
        start, end, is_whole = right
        # What is equal to it again belongs to the right-hand side.
        while is_whole and place + 1 < len(parts):
            further = _right_side(line, parts[place + 1])
            if further is None:
                break
            _, end, is_whole = further
            place += 1
        yield Span(offset + left[0], offset + left[1], True)
        yield Span(offset + start, offset + end, False)


def _left_side(line: str, words: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return where the arithmetic at the end of these words begins and ends; None if there is none."""
    begin: int | None = None
    num_operations = num_units = 0
    has_operator = True  # before the first number from the right none is needed
    for start, end in reversed(words):
        word = line[start:end]
        if word.endswith(_END_OF_CLAUSE):
            break
        if _NUMBER.fullmatch(word):
            if not has_operator:
                break
            num_operations += (begin is not None) + _has_operation(word)
            begin, has_operator, num_units = start, False, 0
        elif word in _OPERATORS:
            has_operator, num_units = True, 0
        else:
            num_units += 1
            if num_units > MAX_UNIT_WORDS:
                break
    return (begin, words[-1][1]) if begin is not None and num_operations else None


def _has_operation(word: str) -> bool:
    """Whether an operator stands between digits of a word."""
    digits = [place for place, c in enumerate(word) if c.isdecimal()]
    return bool(_OPERATION.search(word, digits[0], digits[-1]))


def _right_side(line: str, words: Sequence[tuple[int, int]]) -> tuple[int, int, bool] | None:
    """Return where the arithmetic at the start of these words begins and ends, and if it is all of them."""
    first: int | None = None
    last = num_units = 0
    has_operator = True
    for start, end in words:
        word = line[start:end]
        bare = word.rstrip("".join(_END_OF_CLAUSE))
        if _NUMBER.fullmatch(bare):
            if not has_operator:
                return (first, last, False) if first is not None else None
            first = start if first is None else first
            last, has_operator, num_units = start + len(bare), False, 0
        elif word in _OPERATORS:
            has_operator, num_units = True, 0
        else:
            num_units += 1
        if num_units > MAX_UNIT_WORDS or (first is None and num_units) or bare != word:
            return (first, last, False) if first is not None else None
    return (first, last, True) if first is not None else None


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
