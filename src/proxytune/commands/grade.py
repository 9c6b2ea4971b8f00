"""`proxytune grade`: what a file of predictions amounts to."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from proxytune.commands.app import command
from proxytune.commands.console import json_line, print_text, say
from proxytune.commands.options import AS_JSON, argument
from proxytune.errors import InvalidRequest
from proxytune.evaluate.plan import ALLOW_WEAKER_SANDBOX, DATA_DIR, NO_PROGRAMS, EvalOptions
from proxytune.settings import option, options_of
from proxytune.tasks.task import Rule


@dataclass(frozen=True, kw_only=True)
class GradeOptions:
    """How predictions are scored."""

    rule: Rule = option(
        "paper",
        replace(
            options_of(EvalOptions)["rule"].option,
            help="Scoring rule: paper scores exactly as published, quirks included; numeric by what is right",
        ),
    )
    run_code: bool = option(
        False,
        "Run the programs of humaneval and ds1000, each in a process with limited time, memory, files "
        "and network, instead of trusting the results in the file",
    )
    allow_weaker_sandbox: bool = option(False, ALLOW_WEAKER_SANDBOX)
    data_dir: Path | None = option(
        None, replace(DATA_DIR, help="Directory with the benchmark's tests, for --run-code")
    )
    as_json: bool = option(False, AS_JSON)


@command("proxytune grade gsm8k predictions.jsonl.gz --rule numeric")
def grade(
    task: Annotated[
        str,
        argument(
            "TASK",
            "gsm8k, humaneval, toxigen, truthfulqa_mc, truthfulqa_open, alpaca_eval, ds1000, triviaqa "
            "or realtimeqa",
        ),
    ],
    file: Annotated[
        Path,
        argument(
            "FILE",
            "Predictions in the layout that the paper's authors published, or that `proxytune eval` "
            "writes: JSON lines or a JSON array, packed with gzip or not",
        ),
    ],
    options: GradeOptions,
) -> None:
    """Score a file of a benchmark's predictions.

    Prints a JSON object: "metric" is the value, "name" its name, "metrics" all metrics that were published
    for this benchmark. Rows that neither a judge nor a run of code has decided are counted and left out.
    """
    from proxytune.tasks.registry import find_task
    from proxytune.tasks.rows import read_rows

    benchmark = find_task(task)
    if options.data_dir is not None and not options.run_code:
        raise InvalidRequest(
            "--data-dir is for --run-code, which is not given.\nhint: leave it out"
        )
    if options.allow_weaker_sandbox and not options.run_code:
        raise InvalidRequest(NO_PROGRAMS)
    rows = benchmark.spread(read_rows(file))
    notes: list[str] = []
    if options.run_code:
        from proxytune.evaluate.judges import run_again

        rows, notes = run_again(
            benchmark,
            rows,
            options.data_dir,
            allow_weaker_sandbox=options.allow_weaker_sandbox,
        )
    found = benchmark.grade(rows, options.rule)
    found = replace(found, notes=(*found.notes, *notes))
    content = found.to_dict()
    print_text(
        json_line(content)
        if options.as_json
        else json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    )
    for note in found.notes:
        say(f"note: {note}")
