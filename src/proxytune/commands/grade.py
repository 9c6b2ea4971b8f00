"""`proxytune grade`: what a file of predictions amounts to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import command
from proxytune.commands.console import json_line
from proxytune.commands.options import JsonOption
from proxytune.errors import InputFileError, InvalidRequest

if TYPE_CHECKING:
    from proxytune.tasks.rows import Row
    from proxytune.tasks.task import Task


@command("proxytune grade gsm8k predictions.jsonl.gz --rule numeric")
def grade(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="gsm8k, humaneval, toxigen, truthfulqa_mc, truthfulqa_open, alpaca_eval, ds1000, triviaqa "
            "or realtimeqa",
            show_default=False,
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Predictions in the layout that the paper's authors published, or that `proxytune eval` "
            "writes: JSON lines or a JSON array, packed with gzip or not",
            show_default=False,
        ),
    ],
    rule: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="paper: exactly as published, quirks included; numeric: what is right",
        ),
    ] = "paper",
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Run the programs of humaneval and ds1000, each in a process with limits of time, memory, "
            "files and network, instead of believing what the file says",
        ),
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the benchmark's tests are, for --run-code  [default: from the Hugging Face Hub]",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a file of predictions.

    Prints a JSON object: "metric" is the value, "name" what it is called, "metrics" all that were published
    for this benchmark. Rows that no judge and no run of code has decided are counted and left out.
    """
    from proxytune.tasks.registry import find_task
    from proxytune.tasks.rows import read_rows
    from proxytune.tasks.task import RULES

    benchmark = find_task(task)
    chosen = next((name for name in RULES if name == rule), None)
    if chosen is None:
        raise InvalidRequest(f"--rule is {rule!r}, and must be one of {', '.join(RULES)}")
    if data_dir is not None and not run_code:
        raise InvalidRequest(
            "--data-dir is for --run-code, which is not given.\nhint: leave it out"
        )
    rows = benchmark.spread(read_rows(file))
    notes: list[str] = []
    if run_code:
        rows, notes = _run_again(benchmark, rows, data_dir)
    found = benchmark.grade(rows, chosen)
    found = replace(found, notes=(*found.notes, *notes))
    content = found.to_dict()
    typer.echo(
        json_line(content)
        if as_json
        else json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    )
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)


def _run_again(task: Task, rows: list[Row], data_dir: Path | None) -> tuple[list[Row], list[str]]:
    """Return rows as a run of their programs decides, and how that differs from what they say."""
    from proxytune.evaluate.judges import CodeRunner
    from proxytune.tasks.humaneval import CodeTask

    if not isinstance(task, CodeTask):
        raise InvalidRequest(
            f"--run-code is given, and answers to {task.name} are no programs.\nhint: leave it out"
        )
    items = {item.key: item for item in task.items(data_dir)}
    keys = [task.key(row, place) for place, row in enumerate(rows, 1)]
    unknown = next((key for key in keys if key not in items), None)
    if unknown is not None:
        raise InputFileError(
            f"{unknown!r} is no item of {task.name}, so there are no tests for it.\n"
            "hint: look whether the file and --data-dir belong together"
        )
    decisions = CodeRunner(task).decide([items[key] for key in keys], rows)
    decided = [{**row, **(decision or {})} for row, decision in zip(rows, decisions, strict=True)]
    stored = sum(isinstance(row.get("passed"), bool) for row in rows)
    if not stored:
        return decided, []
    others = [
        f"row {place} ({key}): {row['passed']} in the file, {new['result']!r} now"
        for place, (key, row, new) in enumerate(zip(keys, rows, decided, strict=True), 1)
        if isinstance(row.get("passed"), bool) and row["passed"] != new["passed"]
    ]
    summary = f"{len(others):,} of {stored:,} programs ended otherwise than the file says"
    return decided, [summary, *others]
