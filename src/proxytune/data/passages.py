"""Rows of data and items of benchmarks as the models read them: passages to predict, prompts to answer."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from proxytune.data.rows import Rows, answers_of
from proxytune.errors import InvalidRequest
from proxytune.measure.metrics import Metric
from proxytune.measure.score import Passage
from proxytune.measure.sweep import PromptWithReference
from proxytune.request import Request, SamplingParams

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned
    from proxytune.request import Prompt
    from proxytune.tasks.task import Task


def passages_of(model: ProxyTuned, rows: Rows, *, window: int) -> list[Passage]:
    """Return what is to be predicted in rows: windows of texts, or answers after their prompts.

    Every answer that training would take its loss on is a passage; see `answers_of`. Texts and answers with
    nothing to predict are left out.

    Args:
        model: Its base's tokenizer cuts texts; each member's prompt format renders prompts.
        rows: Of any format.
        window: Tokens per window of a text.
    """
    if rows.kind != "text":
        return model.completion_passages(list(_answers(rows)))
    passages = []
    for row in rows.rows:
        with suppress(InvalidRequest):
            passages += model.text_passages(row["text"], window=window)
    return passages


def rows_of(model: ProxyTuned, rows: Rows) -> list[PromptWithReference]:
    """Return the prompts of rows as each model sees them, each with the answer that the row gives.

    Raises:
        InvalidRequest: The rows are plain texts.
    """
    if rows.kind == "text":
        raise InvalidRequest(
            f"{rows.source} holds plain texts, and this metric compares generated answers with given ones.\n"
            'hint: give rows of {"prompt", "completion"}, or use the metric perplexity'
        )
    return [_prompted(model, prompt, answer) for prompt, answer in _answers(rows)]


def task_rows(
    model: ProxyTuned, task: Task, data_dir: Path | None, *, limit: int | None = None
) -> tuple[list[PromptWithReference], Metric]:
    """Return a benchmark's prompts, and its score by the `numeric` rule as a metric.

    Args:
        model: The models that answer.
        task: A benchmark whose answers are generated and scored by their text alone.
        data_dir: Where its files are; see `Task.items`.
        limit: Maximum number of items; None takes all.

    Returns:
        The prompts, each with its item's index as its reference, and a metric that looks the item up by it.

    Raises:
        InvalidRequest: The benchmark compares likelihoods, or needs a judge.
        InputFileError: The data is missing or malformed.
    """
    if task.decider != "rule":
        raise InvalidRequest(
            f"answers to {task.name} cannot be scored by their text alone.\n"
            "hint: `proxytune eval` takes several --alphas, with --run-code, --toxicity-model or a judge"
        )
    items = task.items(data_dir)[:limit]
    if any(item.options for item in items):
        raise InvalidRequest(
            f"{task.name} compares the likelihood of given answers, and a sweep generates answers.\n"
            "hint: `proxytune eval` takes several --alphas"
        )

    def score(text: str, reference: str) -> float:
        place = int(reference)
        return task.score(task.row(items[place], text), place + 1, "numeric") or 0.0

    prompts = [_prompted(model, item.prompt, str(place)) for place, item in enumerate(items)]
    return prompts, Metric(task.metric, task.title, task.lower_is_better, score)


def _answers(rows: Rows) -> itertools.chain[tuple[Prompt, str]]:
    return itertools.chain.from_iterable(map(answers_of, rows.rows))


def _prompted(model: ProxyTuned, prompt: Prompt, reference: str) -> PromptWithReference:
    job = model.job(Request(prompt, SamplingParams(max_new_tokens=1)))
    return PromptWithReference(job.prompts, reference)
