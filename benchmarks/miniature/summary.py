"""The arithmetic: means with their intervals, shares of a gap, totals of cost.

Numbers in, numbers out: no model, no file, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.miniature.plan import Stale

NUM_RESAMPLES = 10_000
UNSHARED = ("base", "direct", "expert", "anti_expert")
"""Predictors without a share of the gap: its two ends, and the small models by themselves."""
COSTS = {
    "num_parameters": max,
    "num_steps": sum,
    "train_s": sum,
    "offsets_s": sum,
    "peak_memory_bytes": max,
}
"""The costs of a training, or of several together."""


def gap_closed(base: Any, steered: Any, direct: Any) -> Any:
    """Return the share of direct tuning's gain that steering has: 0 is the base, 1 the tuned base.

    Takes numbers or arrays, in nats or in accuracy: the signs cancel.
    """
    return (base - steered) / (base - direct)


def resample(
    sums: Mapping[str, Sequence[float]], sizes: Sequence[int], *, seed: int
) -> dict[str, np.ndarray]:
    """Return every predictor's mean in each bootstrap resample; all predictors share the drawn blocks.

    Args:
        sums: By predictor, each block's sum of the averaged quantity, `[num_blocks]`.
        sizes: Number of tokens or items per block, `[num_blocks]`.
        seed: Random seed of the bootstrap.

    Source: Efron and Tibshirani 1993, sections 8.6 and 25.4, as in `score.py`.
    """
    shape = (NUM_RESAMPLES, len(sizes))
    picks = np.random.default_rng(seed).integers(0, len(sizes), size=shape)
    counts = np.asarray(sizes)[picks].sum(1)
    return {name: np.asarray(row)[picks].sum(1) / counts for name, row in sums.items()}


def interval(values: np.ndarray) -> list[float]:
    """Return the middle 95 % of resamples."""
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def summarise_set(measured: Mapping[str, Any], *, seed: int = 0) -> tuple[dict, dict]:
    """Return the rows of one data set, and the resampled gaps by predictor.

    A row's `gain` is what it is better than the base by, in nats or in accuracy. A gap is None, without
    resamples, unless direct tuning is better than the base in 97.5 % of resamples: a share of no gain means
    nothing.
    """
    sums, sizes = measured["sums"], measured["sizes"]
    is_text = measured["measure"] == "perplexity"
    sign = 1 if is_text else -1
    means = {name: sum(row) / sum(sizes) for name, row in sums.items()}
    drawn = resample(sums, sizes, seed=seed)
    has_gap = bool((sign * (drawn["base"] - drawn["direct"]) > 0).mean() >= 0.975)
    rows = {}
    gaps = {}
    for name, mean in means.items():
        low, high = interval(drawn[name])
        rows[name] = {
            "mean": mean,
            "value": math.exp(mean) if is_text else mean,
            "interval": [math.exp(low), math.exp(high)] if is_text else [low, high],
            "alpha": measured["alphas"].get(name),
            "gain": sign * (means["base"] - mean),
            "gain_interval": interval(sign * (drawn["base"] - drawn[name])),
        }
        if "expert" in drawn:
            rows[name]["over_expert"] = sign * (means["expert"] - mean)
            rows[name]["over_expert_interval"] = interval(sign * (drawn["expert"] - drawn[name]))
        if name in UNSHARED:
            continue
        rows[name] |= {"gap": None, "gap_interval": None}
        if has_gap:
            gaps[name] = gap_closed(drawn["base"], drawn[name], drawn["direct"])
            rows[name] |= {
                "gap": gap_closed(means["base"], mean, means["direct"]),
                "gap_interval": interval(gaps[name]),
            }
    return rows, gaps


def mean_gaps(
    rows: Mapping[str, Mapping[str, Any]], gaps: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """Return the gap that each predictor closes, mean over data sets, with its interval.

    Data sets are independent, so resample i of the mean combines resample i of each. Predictors that a data
    set does not have get no mean.
    """
    sets = [name for name in rows if gaps[name]]
    shared = [p for p in gaps[sets[0]] if all(p in gaps[name] for name in sets)] if sets else []
    return {
        "data_sets": sets,
        "gaps": {
            predictor: {
                "gap": float(np.mean([rows[name][predictor]["gap"] for name in sets])),
                "gap_interval": interval(np.mean([gaps[name][predictor] for name in sets], axis=0)),
            }
            for predictor in shared
        },
    }


def over_seeds(rows: Mapping[str, Any], predictor: str) -> dict[str, Any] | None:
    """Return mean and range of a predictor over the seeds that it was trained with; None for one seed."""
    names = [name for name in rows if name == predictor or name.startswith(f"{predictor}.seed")]
    if len(names) < 2:
        return None
    values = [rows[name]["value"] for name in names]
    shares = [rows[name]["gap"] for name in names]
    return {
        "num_seeds": len(names),
        "value": float(np.mean(values)),
        "range": [min(values), max(values)],
        "gap": None if None in shares else float(np.mean(shares)),
        "gap_range": None if None in shares else [min(shares), max(shares)],
    }


def summarise(
    measured: Mapping[str, Mapping[str, Any]],
    trained: Mapping[str, Mapping[str, Mapping[str, Any]]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything the report says.

    Args:
        measured: Results of `measure`, by data set.
        trained: Results of `tune`, by data set and kind.
        about: Models, data, machine, commits and durations.
    """
    rows, gaps = {}, {}
    for seed, (name, part) in enumerate(measured.items()):
        rows[name], gaps[name] = summarise_set(part, seed=seed)
    cost = {
        name: {kind: {key: result[key] for key in COSTS} for kind, result in kinds.items()}
        for name, kinds in trained.items()
    }
    totals: dict[str, dict[str, dict[str, float]]] = {}
    measures = {name: part["measure"] for name, part in measured.items()}
    means = {}
    for form, measure in (("tasks", "accuracy"), ("texts", "perplexity")):
        names = [name for name in measured if measures[name] == measure]
        means[form] = mean_gaps({name: rows[name] for name in names}, gaps)
        kinds = {kind for name in names for kind in cost[name]}
        totals[form] = {
            kind: {
                key: total(cost[name][kind][key] for name in names if kind in cost[name])
                for key, total in COSTS.items()
            }
            for kind in sorted(kinds)
        }
    return {
        "about": dict(about),
        "data_sets": {
            name: {
                "measure": part["measure"],
                "num_measured": sum(part["sizes"]),
                "num_blocks": len(part["sizes"]),
                "details": {
                    k: v for k, v in part.items() if k not in ("measure", "sizes", "sums", "alphas")
                },
                "training": trained[name]["direct"]["data"]["train"],
                "rows": rows[name],
                "seeds": over_seeds(rows[name], "smol"),
                "cost": cost[name],
            }
            for name, part in measured.items()
        },
        "mean_gap": means,
        "cost": totals,
    }


def check_same_rows(trained: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Check that the trainings of a data set that are compared read the same rows.

    Raises:
        Stale: Two of them read different rows.
    """
    for name, kinds in trained.items():
        seen = {
            (part["digest"], part["num_tokens"], part["num_trained"])
            for part in (
                result["data"]["train"]
                for kind, result in kinds.items()
                if "." not in kind and not kind.endswith("_short")
            )
        }
        if len(seen) != 1:
            raise Stale(
                f"the trainings of {name} did not read the same rows, so they cannot be compared: {seen}.\n"
                f"hint: remove the stages of {name} below benchmarks/build and run again"
            )
