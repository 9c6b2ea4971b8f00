"""Which strength is best: a grid measured by a metric, picked on one part of the data, tested on another.

Words: a *point* is a strength for each expert. *Units* are what is split and resampled: windows of a text, or
answers. The *validation* units pick a point. The *test* units never take part in picking: they measure the
picked point, the base and the recipe's own strengths. Intervals are 95 % percentile bootstraps over units;
differences from the base are resampled in pairs.

With a likelihood metric, each model reads each unit once for all points (`measure/score.py`). With a metric
of generated texts, what several points write alike is read once (`measure/branch.py`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from proxytune.decode.ensemble import Ensemble
from proxytune.errors import InvalidRequest
from proxytune.measure.branch import branch
from proxytune.measure.metrics import METRICS, Metric
from proxytune.measure.score import NUM_RESAMPLES, Interval, Passage, passage_losses
from proxytune.request import SamplingParams, check_alpha

MAX_POINTS = 1000
"""Maximum number of points. Each costs a softmax over the vocabulary at every validation token."""

Unit = TypeVar("Unit")
Points = Sequence[tuple[float, ...]]
Advance = Callable[[int, int], None]
"""Called with how much is done, and how much there is."""


def split(
    units: Sequence[Unit], test_share: float, *, seed: int, in_order: bool
) -> tuple[list[Unit], list[Unit]]:
    """Return validation and test units.

    Args:
        units: The units to split.
        test_share: Share of the test part, above 0 and below 1.
        seed: Random seed.
        in_order: Take the test part from the end instead of drawing it. Neighbouring windows of a text are
            alike, so a draw would put near copies into both parts.

    Raises:
        InvalidRequest: The share is out of range.
    """
    if not 0 < test_share < 1:
        raise InvalidRequest(f"the test share is {test_share}, and must be between 0 and 1")
    order = list(range(len(units)))
    if not in_order:
        random.Random(seed).shuffle(order)
    num_test = round(test_share * len(units))
    cut = len(units) - num_test
    return [units[i] for i in sorted(order[:cut])], [units[i] for i in sorted(order[cut:])]


# Grids and reports --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grid:
    """The points to try.

    Args:
        names: The experts, in the ensemble's order.
        points: For each point, the strength of each expert. Strength 0 of all experts is always measured too.

    Raises:
        InvalidRequest: There are no points or too many, or a strength is not a finite number.
    """

    names: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.points or len(self.points) > MAX_POINTS:
            raise InvalidRequest(
                f"the grid has {len(self.points):,} points, and must have 1 to {MAX_POINTS:,}.\n"
                "hint: try fewer strengths, or fewer experts at once"
            )
        for point in self.points:
            for alpha in point:
                check_alpha(alpha)

    @classmethod
    def of(
        cls, names: Sequence[str], alphas: Sequence[float] | Mapping[str, Sequence[float]]
    ) -> Grid:
        """Return a grid.

        Args:
            names: The experts.
            alphas: Strengths that all experts share, or strengths by expert, every combination of which
                becomes a point.

        Raises:
            InvalidRequest: Strengths are given for other experts than `names`.
        """
        if not isinstance(alphas, Mapping):
            return cls(tuple(names), tuple((alpha,) * len(names) for alpha in alphas))
        missing = set(names) ^ set(alphas)
        if missing:
            raise InvalidRequest(
                f"strengths are given for {', '.join(alphas)}, and the experts are {', '.join(names)}.\n"
                "hint: give strengths for each expert, or one list for all of them"
            )
        return cls(tuple(names), tuple(itertools.product(*(alphas[name] for name in names))))

    @property
    def varied(self) -> list[int]:
        """Indices of the experts whose strengths vary; only the first if all share their strengths."""
        if all(len(set(point)) == 1 for point in self.points):
            return [0] if len(self.points) > 1 else []
        return [i for i in range(len(self.names)) if len({point[i] for point in self.points}) > 1]


class PromptWithReference(NamedTuple):
    """A prompt in the token ids of each member, and the answer that generated ones are compared with."""

    prompts: tuple[Sequence[int], ...]
    reference: str


@dataclass(frozen=True, slots=True)
class Point:
    """One point, measured.

    Args:
        alphas: Strength by expert.
        value: The metric's value.
        interval: Interval of the value; None with fewer than two units.
        change: Change against the base: relative for a perplexity (-0.1 is a tenth lower), a difference for
            scores.
        change_interval: Interval of the change, resampled in pairs.
    """

    alphas: Mapping[str, float]
    value: float
    interval: Interval | None
    change: float
    change_interval: Interval | None


@dataclass(frozen=True, slots=True)
class SweepReport:
    """A sweep.

    Args:
        metric: Name of the metric.
        is_lower_better: Whether lower values are better.
        policy: Description of the recipe's policy.
        points: The grid's points on the validation units, in the grid's order.
        picked: Index of the best point.
        test: On the test units: `base`, `picked`, and `recipe` with the recipe's own strengths.
        num_valid: Number of validation units.
        num_test: Number of test units.
        num_tokens: Number of tokens predicted in both parts, or generated at all points.
        num_read: Number of new tokens that the base read to generate them; None for a likelihood.
        notes: Warnings for the reader, one sentence each.
    """

    metric: str
    is_lower_better: bool
    policy: str
    points: tuple[Point, ...]
    picked: int
    test: Mapping[str, Point]
    num_valid: int
    num_test: int
    num_tokens: int
    num_read: int | None
    notes: tuple[str, ...]

    @property
    def best(self) -> Point:
        """The picked point, on the validation units."""
        return self.points[self.picked]

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)


# Sweeping -----------------------------------------------------------------------------------------------


def sweep_likelihood(
    ensemble: Ensemble,
    grid: Grid,
    *,
    valid: Sequence[Passage],
    test: Sequence[Passage],
    own: Sequence[float],
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> SweepReport:
    """Sweep perplexity: each model reads the passages once.

    Args:
        ensemble: The base and the grid's experts, in the grid's order.
        grid: The points to try.
        valid: Validation passages, which pick a point.
        test: Test passages, which measure it.
        own: The recipe's own strengths.
        seed: Random seed of the bootstrap.
        on_progress: Called with the number of tokens done and the total.

    Raises:
        InvalidRequest: A part is empty, or the ensemble's policy gives a token no probability.
        PromptTooLong: A passage exceeds a model's context.
    """

    def measure(part: Sequence[Passage], points: Points, advance: Advance) -> NDArray[np.float64]:
        """Return losses by unit, `[points, units, 2]`: sums of nats, and tokens."""
        steered = passage_losses(ensemble, part, points, with_models=False, on_progress=advance)
        if not np.isfinite(steered).all():
            raise InvalidRequest(
                "at one point, some tokens of the text have no probability, so the perplexity is infinite.\n"
                'hint: "implausible": "leave" in the recipe keeps the base\'s odds for them'
            )
        lengths = [len(p.token_ids) for p in part]
        sums = np.add.reduceat(steered, np.cumsum([0, *lengths[:-1]]), axis=1)
        return np.stack([sums, np.broadcast_to(np.array(lengths, float), sums.shape)], axis=-1)

    sizes = [sum(len(p.token_ids) for p in part) for part in (valid, test)]
    metric, policy = METRICS["perplexity"], ensemble.policy.describe()
    found = _swept(metric, policy, grid, measure, (valid, test), sizes, own, seed, on_progress)
    return replace(found, num_tokens=sum(sizes))


def sweep_generations(
    ensemble: Ensemble,
    grid: Grid,
    metric: Metric,
    *,
    valid: Sequence[PromptWithReference],
    test: Sequence[PromptWithReference],
    own: Sequence[float],
    sampling: SamplingParams,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> SweepReport:
    """Sweep a metric of greedy texts: beginnings that points have in common are generated once.

    Args:
        ensemble: The base and the grid's experts, in the grid's order.
        grid: The points to try.
        metric: A metric with a `score`.
        valid: Validation prompts, which pick a point.
        test: Test prompts, which measure it.
        own: The recipe's own strengths.
        sampling: Greedy sampling parameters; see `branch`.
        batch_size: Number of prompts answered together.
        seed: Random seed of the bootstrap.
        on_progress: Called with the number of prompts done and the total.

    Raises:
        InvalidRequest: A part is empty, or texts cannot share their beginnings; see `branch`.
        PromptTooLong: Prompt and new tokens exceed a model's context.
    """
    assert metric.score is not None
    score = metric.score
    num_chosen = num_read = 0

    def measure(
        part: Sequence[PromptWithReference], points: Points, advance: Advance
    ) -> NDArray[np.float64]:
        """Return scores by unit, `[points, units, 2]`: scores, and ones."""
        nonlocal num_chosen, num_read
        prompts = [row.prompts for row in part]
        texts = branch(
            ensemble, prompts, points, sampling, batch_size=batch_size, on_progress=advance
        )
        num_chosen += texts.num_chosen
        num_read += texts.num_read
        rows = zip(part, texts.texts, strict=True)
        scores = np.array(
            [[score(text, row.reference) for text in written] for row, written in rows]
        ).T
        return np.stack([scores, np.ones_like(scores)], axis=-1)

    sizes, policy = [len(valid), len(test)], ensemble.policy.describe()
    found = _swept(metric, policy, grid, measure, (valid, test), sizes, own, seed, on_progress)
    return replace(found, num_tokens=num_chosen, num_read=num_read)


def _swept(
    metric: Metric,
    policy: str,
    grid: Grid,
    measure: Callable[[Sequence[Unit], Points, Advance], NDArray[np.float64]],
    parts: tuple[Sequence[Unit], Sequence[Unit]],
    sizes: Sequence[int],
    own: Sequence[float],
    seed: int,
    on_progress: Advance | None,
) -> SweepReport:
    """Pick a point on the validation units and measure it on the test units.

    `measure` returns sums and counts by point and unit, `[points, units, 2]`; `sizes` are the amounts of the
    two `parts` as its progress counts them.
    """
    valid, test = parts
    if not valid or not test:
        raise InvalidRequest(
            f"there are {len(valid)} validation and {len(test)} test windows or answers, and each part "
            "needs at least one.\n"
            "hint: give more data, a smaller --window, or separate --test-data"
        )

    def advance(done: int, _: int, before: int = 0) -> None:
        if on_progress is not None:
            on_progress(before + done, sum(sizes))

    none = (0.0,) * len(grid.names)
    sums = measure(valid, [none, *grid.points], advance)
    points = [
        _point(metric, grid.names, point, sums[n], sums[0], seed)
        for n, point in enumerate(grid.points, start=1)
    ]
    sign = 1.0 if metric.is_lower_better else -1.0
    # Of equally good points, the weakest.
    picked = min(
        range(len(points)), key=lambda n: (sign * points[n].value, sum(map(abs, grid.points[n])))
    )
    best = grid.points[picked]
    wanted = {"base": none, "picked": best, "recipe": tuple(own)}
    distinct = list(dict.fromkeys(wanted.values()))
    tested = measure(test, distinct, partial(advance, before=sizes[0]))
    measured = {
        name: _point(metric, grid.names, p, tested[distinct.index(p)], tested[0], seed)
        for name, p in wanted.items()
    }
    notes = []
    tried = list(zip(*grid.points, strict=True))
    edges = [
        grid.names[i]
        for i in grid.varied
        if best[i] != 0 and best[i] in (min(tried[i]), max(tried[i]))
    ]
    if edges:
        notes.append(
            f"the best strength of {', '.join(edges)} is at the edge of the grid; try values beyond it"
        )
    gain = measured["picked"].change_interval
    if gain is not None and gain.low <= 0 <= gain.high and best != none:
        notes.append(
            "on the test part, the picked strength does not differ significantly from the base"
        )
    return SweepReport(
        metric=metric.name,
        is_lower_better=metric.is_lower_better,
        policy=policy,
        points=tuple(points),
        picked=picked,
        test=measured,
        num_valid=sums.shape[1],
        num_test=tested.shape[1],
        num_tokens=0,
        num_read=None,
        notes=tuple(notes),
    )


def _point(
    metric: Metric,
    names: Sequence[str],
    point: Sequence[float],
    sums: NDArray[np.float64],
    base_sums: NDArray[np.float64],
    seed: int,
) -> Point:
    """Return a point measured from sums and counts by unit, `[units, 2]` for the point and for the base."""
    is_ratio = metric.score is None

    def value(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        means = totals[..., 0] / totals[..., 1]
        return np.exp(means) if is_ratio else means

    def change(totals: NDArray[np.float64], base: NDArray[np.float64]) -> NDArray[np.float64]:
        return value(totals) / value(base) - 1 if is_ratio else value(totals) - value(base)

    interval = change_interval = None
    num_units = len(sums)
    if num_units >= 2:
        picks = np.random.default_rng(seed).integers(0, num_units, size=(NUM_RESAMPLES, num_units))
        totals, base_totals = sums[picks].sum(1), base_sums[picks].sum(1)
        bounds = np.percentile(value(totals), [2.5, 97.5])
        change_bounds = np.percentile(change(totals, base_totals), [2.5, 97.5])
        interval, change_interval = Interval(*bounds.tolist()), Interval(*change_bounds.tolist())
    whole, base_whole = sums.sum(0), base_sums.sum(0)
    return Point(
        dict(zip(names, point, strict=True)),
        float(value(whole)),
        interval,
        float(change(whole, base_whole)),
        change_interval,
    )
