"""What judges have decided, kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from proxytune.errors import (
    BackendError,
    InputFileError,
)
from proxytune.evaluate.judges import (
    ChatJudge,
    CodeRunner,
    Judge,
    ToxicityClassifier,
)
from proxytune.evaluate.plan import EvalOptions, Work
from proxytune.evaluate.predictors import Predictor, file_name
from proxytune.tasks.humaneval import CodeTask
from proxytune.tasks.rows import Row

DECIDED_AT_ONCE = 16
"""Samples that a judge decides on before what it said is written down."""


# Deciding --------------------------------------------------------------------------------------------------


def _judge(work: Work, options: EvalOptions) -> Judge | None:
    """Return who decides about a benchmark's rows; None for nobody."""
    task = work.task
    if task.decider == "code" and options.run_code:
        assert isinstance(task, CodeTask)
        return CodeRunner(task)
    if task.decider == "toxicity" and options.toxicity_model is not None:
        return ToxicityClassifier(options.toxicity_model, device=options.device)
    if task.decider == "judge" and options.judge is not None:
        return ChatJudge(options.judge, task.name)
    return None


_WAYS = {
    "code": "generated code is run only with --run-code",
    "toxicity": "a classifier is named with --toxicity-model",
    "judge": "a judge is named with --judge-url and --judge-model",
}


def decide(
    output: Path,
    work: Work,
    predictors: Sequence[Predictor],
    rows_of: dict[str, list[Row]],
    options: EvalOptions,
    say: Callable[[str], None],
) -> list[str]:
    """Complete rows with what a judge decides, and return what the report must say about it."""
    task = work.task
    if task.decider == "rule":
        return []
    judge = _judge(work, options)
    if judge is None:
        return [f"unscored: {_WAYS[task.decider]}"]
    items = [item for item, _, _ in work.samples(options.seed)]
    notes = [f"decided by {judge.name}"]
    for predictor in predictors:
        rows = rows_of[predictor.name]
        path = output / "decided" / task.name / f"{file_name(predictor.name)}.jsonl"
        kept = _Decisions(path, judge.name)
        keys = [_digest(row) for row in rows]
        open_rows = [i for i, key in enumerate(keys) if key not in kept.by_row]
        # Equal answers to one item are decided once.
        first = list({keys[i]: i for i in reversed(open_rows)}.values())[::-1]
        try:
            for start in range(0, len(first), DECIDED_AT_ONCE):
                block = first[start : start + DECIDED_AT_ONCE]
                decisions = judge.decide([items[i] for i in block], [rows[i] for i in block])
                for i, decision in zip(block, decisions, strict=True):
                    if decision is not None:
                        kept.append(keys[i], decision)
        except BackendError as error:
            message = str(error).split("\n")[0]
            say(f"{task.name}, {predictor.name}: the judge failed: {message}")
            notes.append(
                f"the judge failed on {predictor.name} ({message}); the same command goes on"
            )
        rows_of[predictor.name] = [
            {**row, **kept.by_row.get(key, {})} for row, key in zip(rows, keys, strict=True)
        ]
    return notes


def _digest(row: Row) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:32]


class _Decisions:
    """Decisions, appended one by one to a file; a line that was cut off by a kill is dropped."""

    def __init__(self, path: Path, judge: str) -> None:
        self._path, self._judge = path, judge
        self.by_row: dict[str, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)
        for number, line in enumerate(whole.decode("utf-8", "replace").split("\n"), 1):
            if not line:
                continue
            try:
                entry = json.loads(line)
                if entry["judge"] == judge:
                    self.by_row[entry["row"]] = dict(entry["decision"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputFileError(
                    f"line {number} of {path} is no decision: {error}.\nhint: remove the file"
                ) from error

    def append(self, key: str, decision: Row) -> None:
        """Keep a decision, and write it to the disk."""
        self.by_row[key] = decision
        entry = {"row": key, "judge": self._judge, "decision": decision}
        with self._path.open("ab") as file:
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
