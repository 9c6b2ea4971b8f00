"""Results: every predictor compared with the base, the expert and the tuned model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from proxytune.evaluate.plan import EvalOptions
from proxytune.evaluate.predictors import Predictor
from proxytune.tasks.statistics import Gap, paired_p_value, resampled_gap
from proxytune.tasks.task import Grade, Task


@dataclass(frozen=True, slots=True)
class Result:
    """One predictor's result on one benchmark.

    Args:
        predictor: The predictor.
        grade: Its grade by the rule that the tables use.
        other: Its grade by the other rule.
        num_new_tokens: Number of tokens generated in total.
        seconds: Seconds spent generating, without loading models.
        p_base: Probability of a difference this large from the base if both were equally good; None for the
            base.
        p_expert: The same against the expert; None for the expert, or with several experts.
        difference: Difference from the base in the metric's unit, over the items that both have a score for.
        gap: Share of the tuned model's gain that it reaches.
    """

    predictor: Predictor
    grade: Grade
    other: Grade
    num_new_tokens: int
    seconds: float
    p_base: float | None = None
    p_expert: float | None = None
    difference: float | None = None
    gap: Gap = field(default_factory=lambda: Gap(None, None))

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens per second, over all rows of a batch."""
        return self.num_new_tokens / self.seconds if self.seconds and self.num_new_tokens else None


@dataclass(frozen=True, slots=True)
class TaskReport:
    """All predictors' results on one benchmark."""

    name: str
    title: str
    metric: str
    scale: float
    lower_is_better: bool
    num_items: int
    results: tuple[Result, ...]
    notes: tuple[str, ...]
    gaps: dict[str, tuple[Gap, Any]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class EvalReport:
    """The results of a whole run.

    Args:
        recipe: The recipe's name.
        options: The run's options.
        tasks: One report per benchmark.
        mean_gaps: By predictor, the gap closed, mean over the benchmarks.
        environment: Versions and hardware.
        num_resumed: Number of samples that an earlier run had generated.
        num_generated: Number of samples that this run generated.
    """

    recipe: str
    options: EvalOptions
    tasks: tuple[TaskReport, ...]
    mean_gaps: Mapping[str, Gap]
    environment: Mapping[str, str]
    num_resumed: int
    num_generated: int

    def to_dict(self) -> dict[str, Any]:
        """Return the content of eval.json."""
        return {
            "recipe": self.recipe,
            "options": json.loads(json.dumps(asdict(self.options), default=str)),
            "environment": dict(self.environment),
            "tasks": [
                {
                    "name": task.name,
                    "metric": task.metric,
                    "lower_is_better": task.lower_is_better,
                    "num_items": task.num_items,
                    "notes": list(task.notes),
                    "results": [_result_dict(result) for result in task.results],
                }
                for task in self.tasks
            ],
            "mean_gaps": {name: asdict(gap) for name, gap in self.mean_gaps.items()},
        }


def _result_dict(result: Result) -> dict[str, Any]:
    return {
        "predictor": result.predictor.name,
        "role": result.predictor.role,
        "alpha": result.predictor.alpha if result.predictor.role == "steered" else None,
        "metric": result.grade.metric,
        "standard_error": result.grade.error,
        "num_items": sum(score is not None for score in result.grade.scores.values()),
        "num_unscored": result.grade.num_unscored,
        "difference": result.difference,
        "p_base": result.p_base,
        "p_expert": result.p_expert,
        "gap": asdict(result.gap),
        "num_new_tokens": result.num_new_tokens,
        "seconds": round(result.seconds, 3),
        "tokens_per_s": result.tokens_per_s,
        "metrics": dict(result.grade.metrics),
        "rules": {g.rule: g.metric for g in (result.grade, result.other)},
    }


class Measured(NamedTuple):
    """What a comparison needs to know about a benchmark."""

    name: str
    title: str
    scale: float
    lower_is_better: bool


def compared(
    task: Task | Measured, results: Sequence[Result], notes: Sequence[str], *, num_items: int
) -> TaskReport:
    """Return a benchmark's report: every predictor compared with the base, the expert and the tuned model.

    A difference is over the items that both predictors have a score for, and the gap closed over those that
    all three have.
    """
    base = results[0].grade.scores
    experts = [r.grade.scores for r in results if r.predictor.role == "expert"]
    tuned = next((r.grade.scores for r in results if r.predictor.role == "tuned"), None)
    gaps: dict[str, tuple[Gap, Any]] = {}
    full = []
    for result in results:
        role, scores = result.predictor.role, result.grade.scores
        changes: dict[str, Any] = {}
        if role != "base":
            own, others = paired(scores, base)
            if own:
                changes["p_base"] = paired_p_value(own, others)
                changes["difference"] = task.scale * (sum(own) - sum(others)) / len(own)
        if role != "expert" and len(experts) == 1:
            own, others = paired(scores, experts[0])
            if own:
                changes["p_expert"] = paired_p_value(own, others)
        if role not in ("base", "tuned") and tuned is not None:
            three = paired(base, scores, tuned)
            found = resampled_gap(*three) if three[0] else (Gap(None, None), None)
            gaps[result.predictor.name], changes["gap"] = found, found[0]
        full.append(replace(result, **changes))
    unscored = [
        f"{r.predictor.name}: {r.grade.num_unscored:,} of {r.grade.num_rows:,} samples unscored"
        for r in results
        if 0 < r.grade.num_unscored < r.grade.num_rows
    ]
    about = task.name, task.title, results[0].grade.name, task.scale, task.lower_is_better
    return TaskReport(*about, num_items, tuple(full), (*notes, *unscored), gaps)


def paired(*scores: Mapping[str, float | None]) -> list[list[float]]:
    """Return the scores of the items that all predictors have one for, in the same order."""
    keys = [key for key in scores[0] if all(each.get(key) is not None for each in scores)]
    return [[each[key] or 0.0 for key in keys] for each in scores]
