"""Rows as each model reads them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.data.rows import Rows
from proxytune.errors import (
    InvalidRequest,
)
from proxytune.measure.metrics import Metric
from proxytune.measure.score import (
    SCORE_WINDOW,
    Passage,
)
from proxytune.measure.sweep import Row
from proxytune.request import Prompt, Request, SamplingParams

if TYPE_CHECKING:
    from proxytune.data.rows import Rows
    from proxytune.measure.score import Passage
    from proxytune.measure.sweep import Row
    from proxytune.model import ProxyTuned
    from proxytune.request import Prompt
    from proxytune.tasks.task import Task


def window_of(model: ProxyTuned, window: int | None) -> int:
    """Return the window asked for, or the usual one as far as all contexts hold it."""
    contexts = [m.backend.capabilities.max_context for m in model.ensemble.members]
    return window or min([SCORE_WINDOW, *(c for c in contexts if c is not None)])


def passages_of(model: ProxyTuned, rows: Rows, *, window: int) -> list[Passage]:
    """Return what is to be predicted in rows: windows of texts, or answers after their prompts.

    Of a conversation the last answer counts, of a preference the chosen one. A text too short to hold
    anything to predict is left out.
    """
    if rows.kind != "text":
        pairs = [_answered(row) for row in rows.rows]
        return model.completion_passages(pairs)
    passages = []
    for row in rows.rows:
        with suppress(InvalidRequest):
            passages += model.text_passages(row["text"], window=window)
    return passages


def rows_of(model: ProxyTuned, rows: Rows) -> list[Row]:
    """Return prompts to write to, as each model sees them, and the answers given for them.

    Raises:
        InvalidRequest: The rows are plain texts.
    """
    if rows.kind == "text":
        raise InvalidRequest(
            f"{rows.source} holds plain texts, and this metric compares what is written with given answers.\n"
            'hint: give rows of {"prompt", "completion"}, or take the metric perplexity'
        )
    found = []
    for prompt, answer in map(_answered, rows.rows):
        job = model.job(Request(prompt, SamplingParams(max_new_tokens=1)))
        found.append(Row(job.prompts, answer))
    return found


def task_rows(
    model: ProxyTuned, task: Task, data_dir: Path | None, *, limit: int | None = None
) -> tuple[list[Row], Metric]:
    """Return a benchmark's items as rows, and its score by the `numeric` rule as a metric.

    Args:
        model: Who writes.
        task: One whose answers are generated and scored by their text.
        data_dir: As of `Task.items`.
        limit: Most items; None for all.

    Raises:
        InvalidRequest: Answers are chosen by likelihood, or something else than the text decides.
        InputFileError: The data cannot be had, or is malformed.
    """
    if task.decider != "rule":
        raise InvalidRequest(
            f"answers to {task.name} are decided by more than their text.\n"
            "hint: `proxytune eval` takes several --alphas, and who decides"
        )
    items = task.items(data_dir)[:limit]
    if any(item.options for item in items):
        raise InvalidRequest(
            f"answers to {task.name} are chosen by their likelihood, and a sweep writes them.\n"
            "hint: `proxytune eval` takes several --alphas"
        )

    def score(text: str, reference: str) -> float:
        place = int(reference)
        return task.score(task.row(items[place], text), place + 1, "numeric") or 0.0

    rows = []
    for place, item in enumerate(items):
        job = model.job(Request(item.prompt, SamplingParams(max_new_tokens=1)))
        rows.append(Row(job.prompts, str(place)))
    return rows, Metric(task.metric, task.title, task.lower_is_better, score)


def _answered(row: Mapping[str, Any]) -> tuple[Prompt, str]:
    """Return a row's prompt and the answer to it."""
    if "messages" in row:
        messages = list(row["messages"])
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        return messages[:-1], messages[-1]["content"]
    answer = row["completion"] if "completion" in row else row["chosen"]
    prompt: Prompt = row.get("prompt") or ""
    return prompt, answer if isinstance(answer, str) else answer[-1]["content"]


def prompt_and_answer(row: Mapping[str, Any]) -> tuple[Prompt, str]:
    """Return what precedes the last answer of a row, and that answer."""
    if "messages" in row:
        last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
        return row["messages"][:last], row["messages"][last]["content"]
    answer = row.get("completion", row.get("chosen"))
    if isinstance(answer, list):
        answer = "\n\n".join(m["content"] for m in answer if m["role"] == "assistant")
    return row["prompt"], str(answer)
