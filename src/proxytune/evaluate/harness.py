"""Tasks of lm-eval as benchmarks of `proxytune eval`: found by name, run for one predictor, scores by item.

How a recipe answers the harness is `integrations/lm_eval.py`'s; what is compared is `evaluate/run.py`'s. The
harness keeps every likelihood and every greedy answer in a cache of its own, so that a killed run goes on;
answers it draws at random are drawn again.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.errors import InputFileError
from proxytune.tasks.statistics import standard_error
from proxytune.tasks.task import Grade, Rule

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned


def is_installed() -> bool:
    """Whether lm-eval can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def known_names() -> list[str]:
    """Return the names of all tasks and groups that the harness has."""
    from lm_eval.tasks import TaskManager

    return sorted(TaskManager(verbosity="ERROR").all_tasks)


@dataclass(frozen=True, slots=True)
class HarnessRun:
    """How one predictor did on one of the harness's tasks.

    Args:
        grade: The first metric of the task that every item has a number of; all numbers are in `metrics`.
        lower_is_better: Of that metric.
        samples: The harness's own records, by item.
        seconds: What this run took; answers from the cache cost nothing.
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
    """Run a task or a group of the harness.

    Args:
        task: Its name, or its configuration.
        model: The models.
        alpha: Strength of steering.
        experts: Which experts steer.
        limit: Most items of each task.
        batch_size: Rows side by side.
        seed: Of drawn answers.
        cache: Where answers are kept; the harness adds to the name.
        rule: What the grade says it was scored by; the harness has rules of its own.

    Raises:
        InputFileError: The task's data cannot be had.
        BackendError: A model failed.
    """
    from lm_eval import simple_evaluate

    from proxytune.integrations.lm_eval import ProxyTunedLM

    name = task if isinstance(task, str) else str(task["task"])
    started = time.perf_counter()
    lm = ProxyTunedLM(model, alpha=alpha, expert=experts, batch_size=batch_size, seed=seed)
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
    except (OSError, ValueError) as error:
        # Data sets come from the Hub, whose library raises these.
        raise InputFileError(
            f"the task {name} of lm-eval cannot be run: {error}\n"
            "hint: its data set has to be on the Hub, or where its configuration says"
        ) from error
    seconds = time.perf_counter() - started
    return HarnessRun(*_grade(name, found, rule), seconds)


def _grade(name: str, found: Mapping[str, Any], rule: Rule) -> tuple[Grade, bool, dict[str, Any]]:
    """Return the grade, whether less is better, and the samples by item."""
    samples: dict[str, Any] = {}
    scores: dict[str, float | None] = {}
    metric, lower_is_better = "", False
    for task, records in found["samples"].items():
        for record in records:
            key = f"{task}/{record['doc_id']}"
            if key in samples:
                continue  # the same item, as another filter reads the answer
            samples[key] = record
            numbers = [
                each for each in record["metrics"] if isinstance(record.get(each), int | float)
            ]
            metric = metric or (numbers[0] if numbers else "")
            value = record.get(metric)
            scores[key] = float(value) if isinstance(value, int | float) else None
    for better in found.get("higher_is_better", {}).values():
        lower_is_better = lower_is_better or better.get(metric) is False
    all_numbers = {
        f"{task}/{each.removesuffix(',none')}"
        if task != name
        else each.removesuffix(",none"): value
        for task, values in found["results"].items()
        for each, value in values.items()
        if isinstance(value, float)
    }
    known = [score for score in scores.values() if score is not None]
    if not known and all_numbers:
        metric = next(iter(all_numbers))  # such as a perplexity, which no single item has
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
    """Return a sample as a line of JSON: the harness's record, with its item and predictor."""
    content = {"item": key, "predictor": predictor, **record}
    return json.dumps(content, ensure_ascii=False, default=str)
