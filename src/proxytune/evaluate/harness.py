"""Tasks of lm-eval as benchmarks of `proxytune eval`: found by name, run for one predictor, scored by item.

How a recipe answers the harness is in `integrations/lm_eval.py`, and what is compared in `evaluate/run.py`.
The harness caches every likelihood and every greedy answer, so a killed run continues; sampled answers are
drawn again.
"""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.errors import InputFileError, OutputFileError
from proxytune.files import HINT, writing
from proxytune.tasks.statistics import standard_error
from proxytune.tasks.task import Grade, Rule

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned


def is_installed() -> bool:
    """Whether lm-eval can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def known_names() -> list[str]:
    """Return the names of all tasks and groups of the harness."""
    from lm_eval.tasks import TaskManager

    return sorted(TaskManager(verbosity="ERROR").all_tasks)


@dataclass(frozen=True, slots=True)
class HarnessRun:
    """One predictor's result on one of the harness's tasks.

    Args:
        grade: The task's first metric that items have a number for; `metrics` has all numbers.
        lower_is_better: Whether lower values of that metric are better.
        samples: The harness's own records by item.
        seconds: Seconds that this run took; answers from the cache cost nothing.
    """

    grade: Grade
    lower_is_better: bool
    samples: Mapping[str, Any]
    seconds: float


def run_task(
    task: str | Mapping[str, Any],
    model: ProxyTuned,
    *,
    alpha: float,
    experts: tuple[str, ...] | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    cache: Path,
    rule: Rule,
) -> HarnessRun:
    """Run a task or a group of the harness, which scores by rules of its own.

    Args:
        task: Name or configuration of the task.
        model: The models.
        alpha: Strength of steering.
        experts: Which experts steer.
        limit: Maximum number of items per task; None takes all.
        batch_size: Maximum number of rows per batch.
        seed: Random seed of sampled answers.
        cache: Path of the cache; the harness appends to the name.
        rule: The rule that the grade names.

    Raises:
        InputFileError: The task's data is missing.
        OutputFileError: The cache cannot be written.
        BackendError: A model failed.
    """
    from lm_eval import simple_evaluate

    from proxytune.integrations.lm_eval import ProxyTunedLM

    name = task if isinstance(task, str) else str(task["task"])
    started = time.perf_counter()
    lm = ProxyTunedLM(model, alpha=alpha, expert=experts, batch_size=batch_size, seed=seed)
    with writing(cache):
        cache.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = simple_evaluate(
            model=lm,
            tasks=[task if isinstance(task, str) else dict(task)],
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            use_cache=str(cache),
        )
    except sqlite3.Error as error:
        raise OutputFileError(
            f"lm-eval's cache {cache} cannot be written: {error}.\nhint: {HINT}"
        ) from error
    except (OSError, ValueError) as error:
        # Data sets come from the Hub, whose library raises these.
        raise InputFileError(
            f"the task {name} of lm-eval cannot be run: {error}\n"
            "hint: its data set must be on the Hub, or where its configuration says"
        ) from error
    seconds = time.perf_counter() - started
    return HarnessRun(*_grade(name, found, rule), seconds)


def _grade(name: str, found: Mapping[str, Any], rule: Rule) -> tuple[Grade, bool, dict[str, Any]]:
    """Return the grade, whether lower values are better, and the samples by item."""
    samples: dict[str, Any] = {}
    scores: dict[str, float | None] = {}
    metric, lower_is_better = "", False
    for task, records in found["samples"].items():
        for record in records:
            key = f"{task}/{record['doc_id']}"
            if key in samples:
                continue  # the same item, its answer read by another filter
            samples[key] = record
            numbers = (m for m in record["metrics"] if isinstance(record.get(m), int | float))
            metric = metric or next(numbers, "")
            value = record.get(metric)
            scores[key] = float(value) if isinstance(value, int | float) else None
    for better in found.get("higher_is_better", {}).values():
        lower_is_better = lower_is_better or better.get(metric) is False
    all_numbers = {
        ("" if task == name else f"{task}/") + each.removesuffix(",none"): value
        for task, values in found["results"].items()
        for each, value in values.items()
        if isinstance(value, float)
    }
    known = [score for score in scores.values() if score is not None]
    if not known and all_numbers:
        metric = next(iter(all_numbers))  # such as a perplexity, which a single item does not have
    grade = Grade(
        task=name,
        rule=rule,
        name=metric,
        metric=sum(known) / len(known) if known else all_numbers.get(metric),
        error=standard_error(known),
        metrics=all_numbers,
        scores=scores,
        num_rows=len(samples),
        num_unscored=0,
        num_expected=None,
        notes=(),
    )
    return grade, lower_is_better, samples


def sample_line(key: str, record: Mapping[str, Any], predictor: str) -> str:
    """Return a sample as a JSON line: the harness's record with its item and predictor."""
    content = {"item": key, "predictor": predictor, **record}
    return json.dumps(content, ensure_ascii=False, default=str)
