"""Spearman's rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rank_correlation(values: Sequence[float], others: Sequence[float]) -> float:
    """Return Spearman's rank correlation; ties share their mean rank. NaN if one side is constant."""
    ranks = [_ranks(np.asarray(each, float)) for each in (values, others)]
    one, other = (each - each.mean() for each in ranks)
    scale = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / scale) if scale else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    order = values.argsort(kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    for value in np.unique(values):
        ranks[values == value] = ranks[values == value].mean()
    return ranks
