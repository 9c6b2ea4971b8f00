"""Means and variances of numbers that come one at a time, and Welch's test of two means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple


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
        """Variance of the sample, divided by one less than the count; 0 for fewer than two numbers."""
        return self._sum_squares / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0

    @property
    def standard_error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(self.variance / self.num_tokens) if self.num_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {
            "num_tokens": self.num_tokens,
            "mean_prob_change": self.mean if self.num_tokens else None,
            "standard_deviation": math.sqrt(self.variance),
        }


class Welch(NamedTuple):
    """Welch's two-sided test of whether two means differ.

    `log10_p` is exact even where `p` is too small for a float.
    """

    t: float
    degrees: float
    p: float
    log10_p: float


def welch(one: Moments, other: Moments) -> Welch | None:
    """Return Welch's t-test (1947); None if a sample has fewer than two numbers or neither sample varies."""
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
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = front + a * math.log(x) + b * math.log1p(-x) - math.log(a)
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
