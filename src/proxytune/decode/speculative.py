"""Speculative decoding: who guesses tokens ahead of the ensemble, how many, and when guessing pays.

Words: a *draft* is a sequence of guessed tokens. The *source* of a draft is the expert, the base, or the
text itself (prompt lookup). The models that did not draft read the whole draft in one forward, which
*verifies* it: at each position the token is chosen from the steered distribution exactly as plain decoding
would choose it, and the draft counts for as long as it had guessed that token. So the text is that of plain
decoding, token for token, whatever was guessed: greedy texts because of argmax, sampled ones because guess
and choice share the Gumbel noise of their position (`logits/sample.py`).

The published rule accepts with `min(1, p / q)` and draws from the residual otherwise (Leviathan et al. 2023,
arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). It keeps the distribution too, but a seed's text would
depend on the draft's length, which here depends on measured times.
`docs/design/0002-drafts-that-share-noise.md` says what the difference costs.

With the expert as source the base reads several tokens at once, which helps if the base is much larger. With
the base as source the small models read several tokens at once, which helps if they are not so small (Fu et
al. 2025, "Speculative Ensemble", arXiv:2502.01662, alternates in this way). Prompt lookup guesses what
followed the last few tokens when they occurred before.

Numbers in, numbers out: no tensor, no model, no clock. `decode/drafting.py` puts the decisions into effect.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

from proxytune.errors import InvalidRequest

REST = "rest"
"""Stands for a model in `Costs`: what a block costs beside its forwards, to choose tokens and to rewind."""

Source = Literal["expert", "base", "lookup"]
SOURCES: tuple[Source, ...] = ("expert", "base", "lookup")
LOOKUP_SIZES = (4, 3, 2)
"""How many of the last tokens prompt lookup searches for; the longest match counts."""
NUM_SAMPLES = 9
"""A width's cost is the median of this many forwards."""
TRUSTED_SAMPLES = 2
"""With fewer samples, a width is not believed to cost more than estimated: one slow forward must not rule it
out for ever."""
FREE_TOKENS_ON_CPU, FREE_TOKENS = 20, 300
"""How many tokens take as long to compute as the weights take to read, on a CPU and on an accelerator.

Until it is measured, a forward is assumed to cost in proportion to these and its own tokens together. 20 was
measured with a model of 135M parameters on two cores at 1, 8, 32 and 64 tokens; 300 is the order of magnitude
in accelerators' data sheets.
"""
PRIOR_RATE = 0.6
"""Acceptance rate before anything was observed: high, so that drafts are tried."""
RATE_MEMORY = 16
"""How many observations the running acceptance rate remembers."""
HESITATION = 1.5
"""One more drafted token must be expected to save this many times what it costs. At 1, batches of 8 on two
cores lost 10 %: wider forwards are expensive there, chances are estimates, and what should break even loses.
"""
PATIENCE = 4
"""After this many draft-free blocks, a batch of several rows probes for drafts less often."""
LOOK_EVERY = 8
"""Maximum number of blocks from one probe to the next."""
MARGIN = 0.03
"""A draft must promise this much speed-up over none: estimates are noisy, and plain decoding is safe."""
MARGIN_OF_ROWS = 0.1
"""The same for several rows: rows that get ahead end early, and leave a smaller batch for the same forwards.
At 0.03, 32 rows on two cores lost 3 to 15 % with drafts that promised a speed-up of 5 %."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """How drafts are made.

    Args:
        max_tokens: Maximum length of a draft; 0 turns drafts off.
        source: Who drafts; `auto` picks the fastest.
        is_adaptive: Whether to draft only as far as it pays, by measured costs and acceptance. If not, drafts
            always have `max_tokens` tokens, and `source` must be named.

    Raises:
        InvalidRequest: A value is out of range or contradicts another.
    """

    max_tokens: int = 8
    source: Source | Literal["auto"] = "auto"
    is_adaptive: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or not 0 <= self.max_tokens <= 64:
            raise InvalidRequest(
                f"max_tokens of a draft is {self.max_tokens!r}, and must be a whole number from 0 to 64"
            )
        if self.source not in (*SOURCES, "auto"):
            raise InvalidRequest(
                f"the source of drafts is {self.source!r}, and must be one of: auto, {', '.join(SOURCES)}"
            )
        if self.source == "auto" and not self.is_adaptive:
            raise InvalidRequest(
                "drafts of a fixed length need a source, and it is auto, which is chosen by measuring.\n"
                f"hint: name one of: {', '.join(SOURCES)}"
            )

    def allows(self, source: Source) -> bool:
        """Whether this source may be used."""
        return self.max_tokens > 0 and self.source in (source, "auto")


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


# What was observed ------------------------------------------------------------------------------------


class Rate:
    """A running acceptance rate: how often a source's guess was the token that was chosen.

    Args:
        prior: Counts as two observations.
    """

    def __init__(self, prior: float = PRIOR_RATE) -> None:
        self.value = prior
        self._weight = 2

    def observe(self, is_right: bool) -> None:
        """Count one guess."""
        self._weight = min(self._weight + 1, RATE_MEMORY)
        self.value += (is_right - self.value) / self._weight


class Costs:
    """Measured seconds of forwards, by model, number of *lanes* (their rows) and *width* (tokens of each).

    Rows come and go, and the cost of a width must not be measured anew for each number of rows: it depends
    mostly on the number of tokens. So an unmeasured number of lanes is estimated from the others.
    """

    def __init__(self) -> None:
        self._samples: dict[tuple[Hashable, int, int], deque[float]] = {}
        self._by_width: dict[tuple[Hashable, int], dict[int, float]] = {}
        self._by_tokens: dict[Hashable, dict[int, float]] = {}
        """The key of the inner dict is lanes times width."""

    def observe(self, model: Hashable, lanes: int, width: int, seconds: float) -> None:
        """Count one forward."""
        samples = self._samples.setdefault((model, lanes, width), deque(maxlen=NUM_SAMPLES))
        samples.append(seconds)
        if len(samples) >= TRUSTED_SAMPLES:
            value = median(samples)
            self._by_width.setdefault((model, lanes), {})[width] = value
            self._by_tokens.setdefault(model, {})[lanes * width] = value

    def estimate(
        self, model: Hashable, lanes: int, width: int, *, free_tokens: int = FREE_TOKENS_ON_CPU
    ) -> float | None:
        """Return the seconds of a forward; None until something comparable was measured.

        Between measured widths it is interpolated. Outside them it grows as the model's forwards grow with
        the number of tokens, whatever the number of rows.

        Args:
            model: Which model.
            lanes: Number of rows.
            width: Tokens per row.
            free_tokens: Where growth was not measured, the number of tokens that cost as much as the weights.
        """
        known = self._by_width.get((model, lanes), {})
        if width in known:
            return known[width]
        by_tokens = self._by_tokens.get(model, {})
        guess = math.inf
        if known and min(known) < width < max(known):
            guess = _interpolated(known, width, free_tokens)
        elif known:
            nearest = min(known, key=lambda w: abs(w - width))
            grown = _interpolated(by_tokens, lanes * width, free_tokens)
            guess = known[nearest] * grown / by_tokens[lanes * nearest]
        elif by_tokens:
            guess = _interpolated(by_tokens, lanes * width, free_tokens)
        guess = min(guess, *self._samples.get((model, lanes, width), ()), math.inf)
        return None if guess == math.inf else guess


def _interpolated(known: Mapping[int, float], size: int, free_tokens: int) -> float:
    """Return the value at `size`, which may be outside the known sizes."""
    sizes = sorted(known)
    below = max((s for s in sizes if s <= size), default=None)
    above = min((s for s in sizes if s >= size), default=None)
    if below is not None and above is not None:
        share = (size - below) / (above - below) if below < above else 0.0
        return known[below] + share * (known[above] - known[below])
    # Not by the slope at the end: kernels change with the number of rows, and a step at the last measured
    # size would rule out all larger ones, which then would never be measured.
    nearest = sizes[0] if below is None else below
    return known[nearest] * (free_tokens + size) / (free_tokens + nearest)


class Speculator:
    """What is remembered between generations: costs of forwards, and acceptance rates to start from.

    Args:
        drafting: What is allowed.
    """

    def __init__(self, drafting: Drafting) -> None:
        self.drafting = drafting
        self.costs = Costs()
        self._rates: dict[tuple[Source, tuple[int, ...]], Rate] = {}

    def begin_rates(self, experts: tuple[int, ...]) -> dict[Source, Rate]:
        """Return the rates a new row starts from: what the last row with the same experts ended with."""
        return {
            source: Rate(self._rates[source, experts].value)
            if (source, experts) in self._rates
            else Rate()
            for source in SOURCES
        }

    def end_rates(self, experts: tuple[int, ...], rates: Mapping[Source, Rate]) -> None:
        """Remember a row's rates."""
        for source, rate in rates.items():
            self._rates[source, experts] = rate


# What follows from it ---------------------------------------------------------------------------------


def expected_tokens(rate: float, length: int) -> float:
    """Return the expected tokens of a block whose draft has `length` tokens, each right with chance `rate`.

        1 + rate + ... + rate ** length

    The 1 is the token that is chosen after the accepted part. Source: Leviathan et al. 2023, equation 1.
    """
    return sum(rate**count for count in range(length + 1))


class Plan(NamedTuple):
    """Who drafts how many tokens of the next block."""

    source: Source | None
    length: int
    seconds_per_token: float
    """Expected, over all rows of the batch together."""


def best_plan(
    rates: Mapping[Source, Sequence[float]],
    seconds: Callable[[Source | None, int, float], float | None],
    max_length: int,
) -> Plan | None:
    """Return the plan with the fewest expected seconds per token.

    Args:
        rates: For each source that can draft, every row's acceptance rate.
        seconds: Returns the cost of a block from source, length and the chance that some row accepts the
            whole draft; None if nothing was measured yet. A source of None means no draft.
        max_length: Maximum length of the draft.

    Returns:
        None until costs were measured.
    """
    plain = seconds(None, 0, 0.0)
    if plain is None:
        return None
    num_rows = max((len(values) for values in rates.values()), default=1)
    best = Plan(None, 0, plain / num_rows)
    threshold = best.seconds_per_token * (1 - (MARGIN if num_rows == 1 else MARGIN_OF_ROWS))
    for source, values in rates.items():
        for length in range(1, max_length + 1):
            whole = 1 - math.prod(1 - rate**length for rate in values)
            cost = seconds(source, length, whole)
            if cost is None:
                continue
            per_token = cost / sum(expected_tokens(rate, length) for rate in values)
            if per_token < min(threshold, best.seconds_per_token):
                best = Plan(source, length, per_token)
    return best


def is_worth_drafting(
    chances: Iterable[float],
    *,
    seconds_per_token: float,
    draft_seconds: float,
    widening_seconds: float,
) -> bool:
    """Whether one more drafted token is expected to save clearly more time than it costs (`HESITATION`).

    Args:
        chances: For each row, the chance that the draft is right up to and including the next token.
        seconds_per_token: What a token costs at the best plan: the value of one more.
        draft_seconds: Expected cost of the drafting model's forwards that turn out useless.
        widening_seconds: Cost of verifying a draft that is one token longer.
    """
    total = sum(chances)
    return total * seconds_per_token > HESITATION * (draft_seconds + widening_seconds)


def is_time_to_look(num_undrafted: int, num_rows: int) -> bool:
    """Whether to find out if a draft would pay now.

    Guesses that nobody uses cost time for every row: 5 % of a sampled step of eight rows on two cores. So
    after `PATIENCE` blocks without a draft, they are made only once in `min(num_rows, LOOK_EVERY)` blocks.

    Args:
        num_undrafted: Number of blocks since the last draft.
        num_rows: Number of rows in the batch.
    """
    return num_undrafted < PATIENCE or num_undrafted % min(num_rows, LOOK_EVERY) == 0
