"""Spearman's rank correlation by hand."""

from __future__ import annotations

import math

import pytest

from benchmarks.rank_correlation import rank_correlation


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Ranks 0, 1, 2, 3 against 1, 0, 2, 3: 1 - 6 * (1 + 1) / (4 * 15) = 0.8.
    assert rank_correlation([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8)
    # A tie shares its ranks: 0, 0.5, 0.5 ... against 0, 1, 2.
    assert rank_correlation([1, 5, 5], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))
