"""Judges asked about answers, and their decisions kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from proxytune.errors import BackendError, InputFileError
from proxytune.evaluate.judges import ChatJudge, CodeRunner, Judge, ToxicityClassifier
from proxytune.evaluate.plan import EvalOptions, Work
from proxytune.evaluate.predictors import Predictor, file_name
from proxytune.files import append, writing
from proxytune.tasks.humaneval import CodeTask
from proxytune.tasks.rows import Row

DECIDED_AT_ONCE = 16
"""Number of samples that a judge decides on before its decisions are written to disk."""


def _judge(work: Work, options: EvalOptions) -> Judge | None:
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
    "code": "generated code runs only with --run-code",
    "toxicity": "--toxicity-model names a classifier",
    "judge": "--judge-url and --judge-model name a judge",
}


def decide(
    output: Path,
    work: Work,
    predictors: Sequence[Predictor],
    rows_of: dict[str, list[Row]],
    options: EvalOptions,
    say: Callable[[str], None],
) -> list[str]:
    """Add a judge's decisions to rows, and return notes about them for the report.

    The rows of each predictor in `rows_of` are replaced by rows with decisions, which `output` keeps.

    Raises:
        InputFileError: A kept decision cannot be read.
        OutputFileError: A decision cannot be written; what is kept stays, and the same call continues.
    """
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
        texts = [json.dumps(row, sort_keys=True) for row in rows]
        keys = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
        open_rows = [i for i, key in enumerate(keys) if key not in kept.by_row]
        # Equal answers to an item are decided once.
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
            failed = f"the judge failed on {predictor.name} ({message})"
            notes.append(f"{failed}; the same command continues")
        rows_of[predictor.name] = [
            {**row, **kept.by_row.get(key, {})} for row, key in zip(rows, keys, strict=True)
        ]
    return notes


class _Decisions:
    """A judge's decisions, appended one by one to a file; a line that a kill cut off is dropped."""

    def __init__(self, path: Path, judge: str) -> None:
        self._path, self._judge = path, judge
        self.by_row: dict[str, Row] = {}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(path, len(whole))
        for number, line in enumerate(whole.decode("utf-8", "replace").split("\n"), 1):
            if not line:
                continue
            try:
                entry = json.loads(line)
                if entry["judge"] == judge:
                    self.by_row[entry["row"]] = dict(entry["decision"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputFileError(
                    f"line {number} of {path} is not a decision: {error}.\nhint: remove the file"
                ) from error

    def append(self, key: str, decision: Row) -> None:
        """Keep a decision, and write it to disk."""
        self.by_row[key] = decision
        entry = {"row": key, "judge": self._judge, "decision": decision}
        append(self._path, json.dumps(entry, ensure_ascii=False) + "\n")
