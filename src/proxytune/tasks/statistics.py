"""The arithmetic of comparing models: means with errors, pass@k, paired tests, the gap closed.

Numbers in, numbers out: no model, no file, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, from the sample's spread; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(np.asarray(values, dtype=float), ddof=1) / math.sqrt(len(values)))


def grouped_interval(
    values: Sequence[float], groups: Sequence[str], *, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the mean; items of one group are drawn together.

    Several questions about one thing are not independent, so whole groups are resampled.

    Args:
        values: A number for each item.
        groups: Each item's group, in the same order.
        seed: Random seed. Equal seeds draw equal groups.

    Returns:
        Lower and upper end; None for fewer than two groups.

    Source: Efron and Tibshirani 1993, section 8.6.
    """
    names, places = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.bincount(places, weights=np.asarray(values, dtype=float))
    sizes = np.bincount(places)
    picks = np.random.default_rng(seed).integers(0, len(names), size=(NUM_RESAMPLES, len(names)))
    low, high = np.percentile(sums[picks].sum(1) / sizes[picks].sum(1), [2.5, 97.5])
    return float(low), float(high)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that at least one of `k` samples, drawn without replacement, is right.

        1 - C(n - c, k) / C(n, k)

    Source: Chen et al. 2021, arXiv:2107.03374, section 2.1.
    """
    assert 0 < k <= num_samples, (num_samples, k)
    if num_samples - num_right < k:
        return 1.0
    places = np.arange(num_samples - num_right + 1, num_samples + 1)
    return float(1.0 - np.prod(1.0 - k / places))


def paired_p_value(values: Sequence[float], others: Sequence[float], *, seed: int = 0) -> float:
    """Return the probability of a difference of means at least this large if both are equally good.

    The test is two-sided and paired: entry i of both is about the same item. If every item differs by the
    same amount or not at all (right or wrong), it is the exact sign test on the items that differ (McNemar's
    exact test). Otherwise the signs of the differences are flipped at random 10,000 times, and the value is
    never below 1 in 10,001.

    Args:
        values: Scores by item.
        others: The other scores, of the same items in the same order.
        seed: Random seed of the flips.

    Source: Edgington and Onghena 2007, Randomization Tests, chapter 5; McNemar 1947.
    """
    differences = np.asarray(values, dtype=float) - np.asarray(others, dtype=float)
    differences = differences[differences != 0]
    if len(differences) == 0:
        return 1.0
    if len(set(np.abs(differences).tolist())) == 1:
        ups = int((differences > 0).sum())
        return sign_test(ups, len(differences) - ups)
    seen = abs(differences.sum())
    rng = np.random.default_rng(seed)
    count = 1
    for _ in range(10):  # In parts, to keep memory small.
        signs = rng.integers(0, 2, size=(NUM_RESAMPLES // 10, len(differences))) * 2 - 1
        count += int((np.abs(signs @ differences) >= seen * (1 - 1e-12)).sum())
    return count / (NUM_RESAMPLES + 1)


def sign_test(num_up: int, num_down: int) -> float:
    """Return the two-sided probability of a split at least this uneven, if both sides are equally likely."""
    total, least = num_up + num_down, min(num_up, num_down)
    tail = sum(math.comb(total, i) for i in range(least + 1))
    return min(1.0, float(2 * tail / 2**total))


@dataclass(frozen=True, slots=True)
class Gap:
    """The gap closed: a predictor's gain over the base as a share of the directly tuned model's gain.

    Args:
        share: 0 is the base, 1 the directly tuned model; None if the tuned model's gain is uncertain.
        interval: Its 95 % interval, lower and upper end; None if `share` is.
    """

    share: float | None
    interval: tuple[float, float] | None


def resampled_gap(
    base: Sequence[float], steered: Sequence[float], tuned: Sequence[float], *, seed: int = 0
) -> tuple[Gap, NDArray[np.float64] | None]:
    """Return the gap closed, and its value in each bootstrap resample of the items.

        (steered - base) / (tuned - base)

    All three are resampled together: entry i of each is about the same item. The share is None unless the
    tuned model is better than the base (or worse, if lower is better: signs cancel) in 97.5 % of resamples,
    because a share of no gain means nothing.

    Returns:
        The gap, and its value in each resample, `[10_000]`; None if the share is None.

    Source: Liu et al. 2024, arXiv:2401.08565, section 3; Efron and Tibshirani 1993, section 8.6.
    """
    rows = np.asarray([base, steered, tuned], dtype=float)
    num_items = rows.shape[1]
    if num_items < 2:
        return Gap(None, None), None
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(10):
        picks = rng.integers(0, num_items, size=(NUM_RESAMPLES // 10, num_items))
        parts.append(rows[:, picks].mean(-1))
    drawn = np.concatenate(parts, axis=1)
    means = rows.mean(1)
    gain = means[2] - means[0]
    if gain == 0 or float((np.sign(drawn[2] - drawn[0]) == np.sign(gain)).mean()) < 0.975:
        return Gap(None, None), None
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (drawn[1] - drawn[0]) / (drawn[2] - drawn[0])
    shares[~np.isfinite(shares)] = np.nan  # In some resamples the tuned model gains nothing.
    low, high = np.nanpercentile(shares, [2.5, 97.5])
    return Gap(float((means[1] - means[0]) / gain), (float(low), float(high))), shares


def mean_gap(gaps: Sequence[tuple[Gap, NDArray[np.float64] | None]]) -> Gap:
    """Return the gap closed, mean over tasks, with its interval; tasks without a gap are left out.

    Tasks are independent, so resample i of the mean combines resample i of each.
    """
    known = [
        (gap.share, drawn) for gap, drawn in gaps if gap.share is not None and drawn is not None
    ]
    if not known:
        return Gap(None, None)
    low, high = np.nanpercentile(np.mean([drawn for _, drawn in known], axis=0), [2.5, 97.5])
    share = float(np.mean([share for share, _ in known]))
    return Gap(share, (float(low), float(high)))
