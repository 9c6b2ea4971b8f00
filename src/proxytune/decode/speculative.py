"""Speculative decoding: who guesses tokens ahead of the ensemble, how many, and when guessing pays.

Words: a *draft* is a sequence of guessed tokens. The *source* of a draft is the expert, the base, or the
text itself (prompt lookup). The models that did not draft read the whole draft in one forward, which
*verifies* it: at each position the steered distribution is known, the token is chosen from it exactly as
plain decoding would choose, and the draft goes on as long as it had guessed that token. So the text is that
of plain decoding, token for token, whatever was guessed: greedy by argmax, sampled because the guess and the
choice share the Gumbel noise of their position (`logits/sample.py`).

The published rule accepts with `min(1, p / q)` and draws from the residual otherwise (Leviathan et al. 2023,
arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). It keeps the distribution too, but a seed's text would
depend on the draft's length, and here that length follows the clock.
`docs/design/0002-drafts-that-share-noise.md` says what the difference costs.

With the expert as source the base reads several tokens at once, which is the gain where the base is much
larger. With the base as source the small models read several tokens at once, which is the gain where they
are not small (Fu et al. 2025, "Speculative Ensemble", arXiv:2502.01662, alternates in this way). Prompt
lookup guesses what followed the last few tokens where they stood before.

This file decides; `decode/batch.py` runs the models. Numbers in, numbers out: no tensor, no model, no clock.
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
"""What a block costs beside forwards: choosing tokens, and taking back what was wrong."""

Source = Literal["expert", "base", "lookup"]
SOURCES: tuple[Source, ...] = ("expert", "base", "lookup")
NUM_SAMPLES = 9
"""Forwards of one width whose median is its cost."""
TRUSTED_SAMPLES = 2
"""With fewer, a width is taken for no dearer than it should be: one slow forward must not bar it for ever."""
FREE_TOKENS_ON_CPU, FREE_TOKENS = 20, 300
"""How many tokens take as long to compute as the weights to read, on a CPU and on an accelerator.

Before it was measured, a forward is taken to cost as these and its own tokens together. 20 is what a model of
135M shows on two cores at 1, 8, 32 and 64 tokens; 300 is the order that accelerators' data sheets give.
"""
PRIOR_RATE = 0.6
"""Acceptance rate before anything was observed. High, so that drafts are tried."""
RATE_MEMORY = 16
"""How many observations the running acceptance rate remembers."""
HESITATION = 1.5
"""One more drafted token has to be expected to save so many times what it costs. At 1, batches of 8 on two
cores lost 10 %: a wider forward is dear there, chances are estimates, and what should break even loses."""
PATIENCE = 4
"""Blocks without a draft after which drafts are looked for less often, where there are several rows."""
LOOK_EVERY = 8
"""Most blocks from one look to the next."""
MARGIN = 0.03
"""A draft must promise so much more speed than none: estimates are noisy, and nothing lost is sure."""
MARGIN_OF_ROWS = 0.1
"""The same where there are several rows: those that get ahead end early, and leave a batch that is less worth
its forwards. At 0.03, 32 rows on two cores lost 3 to 15 % by drafts that promised 5 % more."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """How drafts are made.

    Args:
        max_tokens: Longest draft; 0 never drafts.
        source: Who drafts; `auto` takes whichever is the fastest.
        is_adaptive: Draft as far as it pays by measured costs and acceptance, down to not at all; otherwise
            always `max_tokens`, which needs a `source`.

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


# What was observed ----------------------------------------------------------------------------------


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

    Rows come and go, and what a width costs must not be found out anew for each number of them: most of it
    is a matter of tokens. So what some numbers of lanes have shown says how the cost of another grows.
    """

    def __init__(self) -> None:
        self._samples: dict[tuple[Hashable, int, int], deque[float]] = {}
        self._by_width: dict[tuple[Hashable, int], dict[int, float]] = {}
        self._by_tokens: dict[Hashable, dict[int, float]] = {}
        """Of lanes times width."""

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
        """Return the seconds of a forward; None before anything like it was measured.

        Between measured widths it is interpolated. Outside them it grows as the model's forwards of so many
        tokens do, whatever their rows.

        Args:
            model: Which.
            lanes: How many rows.
            width: Tokens of each.
            free_tokens: What growth is guessed from where it was not measured.
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
    """Return the value at `size`, which may lie outside the known ones."""
    sizes = sorted(known)
    below = max((s for s in sizes if s <= size), default=None)
    above = min((s for s in sizes if s >= size), default=None)
    if below is not None and above is not None:
        share = (size - below) / (above - below) if below < above else 0.0
        return known[below] + share * (known[above] - known[below])
    # Not by the slope at the end: kernels change with the number of rows, and a step at the last measured
    # size would bar all larger ones, so that nobody found out.
    nearest = sizes[0] if below is None else below
    return known[nearest] * (free_tokens + size) / (free_tokens + nearest)


class Speculator:
    """What is remembered between generations: costs of forwards and rates to begin with.

    Args:
        drafting: What is allowed.
    """

    def __init__(self, drafting: Drafting) -> None:
        self.drafting = drafting
        self.costs = Costs()
        self._rates: dict[tuple[Source, tuple[int, ...]], Rate] = {}

    def begin_rates(self, experts: tuple[int, ...]) -> dict[Source, Rate]:
        """Return the rates a new row begins with: those an earlier row with the same experts ended with."""
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


# What follows from it -------------------------------------------------------------------------------


def expected_tokens(rate: float, length: int) -> float:
    """Return how many tokens a block yields whose draft has `length` tokens, each right with chance `rate`.

        1 + rate + ... + rate ** length

    The last one is the choice that follows the accepted part. Source: Leviathan et al. 2023, equation 1.
    """
    return sum(rate**count for count in range(length + 1))


class Plan(NamedTuple):
    """What the next block should do."""

    source: Source | None
    length: int
    seconds_per_token: float
    """Expected; over all rows of the batch together."""


def best_plan(
    rates: Mapping[Source, Sequence[float]],
    seconds: Callable[[Source | None, int, float], float | None],
    max_length: int,
) -> Plan | None:
    """Return the plan with the fewest expected seconds per token.

    Args:
        rates: For each source that can draft, every row's acceptance rate.
        seconds: Of a block, from source, length and the chance that a whole draft is accepted by some row.
            A source of None stands for no draft. None where nothing was measured yet.
        max_length: Longest draft.

    Returns:
        None before costs were measured.
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
        chances: For each row, that the draft is right up to and including the next token.
        seconds_per_token: What a token costs at the best plan: the value of one more.
        draft_seconds: Of the forward that the next token may cost in vain.
        widening_seconds: Of verifying a draft that is one token longer.
    """
    total = sum(chances)
    return total * seconds_per_token > HESITATION * (draft_seconds + widening_seconds)


def is_time_to_look(num_undrafted: int, num_rows: int) -> bool:
    """Whether to find out if a draft would pay now.

    Guesses that nobody uses cost each row the same: 5 % of a step of eight rows, sampled, on two cores. Where
    there was no draft for a while, so much is spent on one row of a step on average.

    Args:
        num_undrafted: Blocks since the last draft.
        num_rows: Of the batch.
    """
    return num_undrafted < PATIENCE or num_undrafted % min(num_rows, LOOK_EVERY) == 0
