"""Base, expert, steered base, directly tuned base and nudged base on benchmarks, side by side.

Words: a *predictor* is a way to answer: the base alone, an expert alone, the base steered at one strength,
a directly tuned model, the base nudged by the expert. Every predictor answers the same items with the same
settings and, where answers are drawn, the same seeds. A *sample* is one answer to one item.

A run lives in one folder and can be killed at any time: answers are written block by block, and the
decisions of judges one by one. Started again with the same settings it goes on; nothing is asked twice or
lost.

    generated/TASK/PREDICTOR.jsonl      answers as they come, with a progress file beside each
    decided/TASK/PREDICTOR.jsonl        what judges and runs of code have decided
    samples/TASK/PREDICTOR.jsonl        at the end: prompt, output, both scores of every sample
    eval.json, eval.md, eval.png        what it amounts to
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from proxytune.data.lines import Line
from proxytune.data.resumable import ResumableOutput
from proxytune.errors import InvalidRequest, OutputFileError, install_command
from proxytune.evaluate.compare import (
    EvalReport,
    Measured,
    Result,
    TaskReport,
    compared,
)
from proxytune.evaluate.decide import decide
from proxytune.evaluate.harness import (
    HarnessRun,
    is_installed,
    known_names,
    run_task,
    sample_line,
)
from proxytune.evaluate.plan import EvalOptions, Work
from proxytune.evaluate.predictors import (
    LazyModel,
    Predictor,
    Speaker,
    file_name,
    predictors_of,
    tuned_recipe,
)
from proxytune.files import write_whole
from proxytune.machine import environment
from proxytune.recipe.recipe import Recipe
from proxytune.request import Request, SamplingParams
from proxytune.tasks.registry import TASKS, find_task
from proxytune.tasks.rows import Row
from proxytune.tasks.statistics import (
    mean_gap,
)
from proxytune.tasks.task import RULES, Item, Rule, Task

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned


class Progress(NamedTuple):
    """How far a run is."""

    task: str
    predictor: str
    num_done: int
    num_samples: int


def evaluate(
    recipe: Recipe,
    output: Path,
    options: EvalOptions,
    *,
    load: Callable[[Recipe, tuple[str, ...] | None], ProxyTuned],
    name: str = "",
    on_progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> EvalReport:
    """Compare predictors on benchmarks, going on with what an earlier run has left in `output`.

    Args:
        recipe: Base and experts.
        output: A folder of its own.
        options: What is compared.
        load: Loads a recipe, with these of its experts.
        name: What the report calls the recipe.
        on_progress: Called after each block.
        say: Called with what a user should know, a sentence each.

    Raises:
        InputFileError: Data cannot be had.
        OutputFileError: The folder cannot be written, or was begun with other settings.
        UserError: A model or a request cannot be used.
        BackendError: A model failed; what is written stays, and the same call goes on.
    """
    _check_names(options.tasks)
    predictors = predictors_of(recipe, options)
    works = [Work.prepare(task, options) for task in options.tasks if task in TASKS]
    foreign = [task for task in options.tasks if task not in TASKS]
    runs: dict[tuple[str, str], HarnessRun] = {}
    counts = {"resumed": 0, "generated": 0}
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for is_tuned in (False, True):
        group = [p for p in predictors if (p.role == "tuned") == is_tuned]
        if not group:
            continue
        chosen = None if is_tuned else recipe.named(options.experts)
        source = tuned_recipe(recipe, options) if is_tuned else recipe
        lazy = LazyModel(partial(load, source, chosen))
        for work in works:
            for predictor in group:
                answers[work.task.name, predictor.name] = _generate(
                    output, work, predictor, source, options, lazy, counts, on_progress
                )
        for task in foreign:
            for predictor in group:
                runs[task, predictor.name] = _run_foreign(
                    output, task, predictor, source, options, lazy
                )
        del lazy  # its models, before the next are loaded
    reports = []
    for work in works:
        rows_of = {
            p.name: [
                work.task.row(item, answer["output"]["text"])
                for (item, _, _), answer in zip(
                    work.samples(options.seed), answers[work.task.name, p.name], strict=True
                )
            ]
            for p in predictors
        }
        notes = decide(output, work, predictors, rows_of, options, say)
        reports.append(_report(output, work, predictors, answers, rows_of, notes, options))
    reports += [_foreign_report(task, predictors, runs) for task in foreign]
    reports.sort(key=lambda report: options.tasks.index(report.name))
    means = {
        p.name: mean_gap([r.gaps[p.name] for r in reports if p.name in r.gaps])
        for p in predictors
        if p.role != "base"
    }
    return EvalReport(
        name or str(recipe.directory),
        options,
        tuple(reports),
        {key: gap for key, gap in means.items() if gap.share is not None},
        environment(),
        counts["resumed"],
        counts["generated"],
    )


def _check_names(names: Sequence[str]) -> None:
    """Check that every name is a benchmark's here or a task's of lm-eval.

    Raises:
        InvalidRequest: One is neither; names like it are listed.
    """
    unknown = [name for name in names if name not in TASKS]
    if not unknown:
        return
    if not is_installed():
        try:
            find_task(unknown[0])
        except InvalidRequest as error:
            raise InvalidRequest(
                f"{error}; for tasks of lm-eval, {install_command('eval')}"
            ) from None
    foreign = known_names()
    for name in unknown:
        if name not in foreign:
            find_task(name, also=foreign)


def _run_foreign(
    output: Path,
    task: str,
    predictor: Predictor,
    recipe: Recipe,
    options: EvalOptions,
    lazy: LazyModel,
) -> HarnessRun:
    """Run a task of lm-eval for one predictor, and write its samples."""
    speaker = Speaker(predictor, lazy.model, options)
    settings = json.dumps(
        [
            recipe.to_dict(),
            str(recipe.directory.resolve()),
            asdict(predictor),
            options.dtype,
            options.seed,
        ],
        sort_keys=True,
        default=str,
    )
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    name = file_name(predictor.name)
    run = run_task(
        task,
        speaker.model,
        alpha=speaker.alpha,
        experts=speaker.experts,
        limit=options.limit,
        batch_size=options.batch_size,
        seed=options.seed,
        cache=output / "generated" / task / f"{name}.{digest}",
        rule=options.rule,
    )
    lines = [sample_line(key, record, predictor.name) for key, record in run.samples.items()]
    write_whole(output / "samples" / task / f"{name}.jsonl", "\n".join(lines) + "\n")
    return run


def _foreign_report(
    task: str, predictors: Sequence[Predictor], runs: Mapping[tuple[str, str], HarnessRun]
) -> TaskReport:
    results = [
        Result(p, run.grade, run.grade, num_new_tokens=0, seconds=run.seconds)
        for p in predictors
        for run in [runs[task, p.name]]
    ]
    first = runs[task, predictors[0].name]
    return compared(
        Measured(task, f"{task} (lm-eval)", 1.0, first.lower_is_better),
        results,
        ["scored by lm-eval's own rules"],
        num_items=first.grade.num_items,
    )


def _generate(
    output: Path,
    work: Work,
    predictor: Predictor,
    recipe: Recipe,
    options: EvalOptions,
    lazy: LazyModel,
    counts: dict[str, int],
    on_progress: Callable[[Progress], None] | None,
) -> list[dict[str, Any]]:
    """Return every sample's answer, as its line in the file has it."""
    folder = output / "generated" / work.task.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFileError(
            f"{folder} cannot be made: {error.strerror}.\nhint: name a folder that can be written"
        ) from error
    path = folder / f"{file_name(predictor.name)}.jsonl"
    samples = list(work.samples(options.seed))
    settings = {
        "task": work.task.name,
        "predictor": asdict(predictor),
        "recipe": recipe.to_dict(),
        "recipe_directory": str(recipe.directory.resolve()),
        "experts": options.experts,
        "threshold": options.nudge_below if predictor.role == "nudged" else None,
        "num_samples": work.num_samples,
        "seed": options.seed if not work.sampling.is_greedy else None,
        "dtype": options.dtype,
        "sampling": asdict(work.sampling),
        "banned": work.task.banned,
        "banned_first": work.task.banned_first,
    }
    with ResumableOutput(path, json.loads(json.dumps(settings))) as file:
        lines = [_line(number, *sample) for number, sample in enumerate(samples, 1)]
        num_done = file.resume(iter(lines), len(lines), options.batch_size)
        counts["resumed"] += num_done

        def report() -> None:
            if on_progress is not None:
                on_progress(Progress(work.task.name, predictor.name, num_done, len(lines)))

        report()
        if num_done < len(lines):
            speaker = Speaker(predictor, lazy.model, options)
            bias = speaker.bias(work.task.banned)
            first = speaker.bias(work.task.banned_first)
            requests = [
                speaker.request(item, replace(sampling, logit_bias=bias, first_logit_bias=first))
                for item, _, sampling in samples
            ]
            speaker.check(requests[num_done:])
        while num_done < len(lines):
            block = slice(num_done, num_done + options.batch_size)
            started = time.perf_counter()
            outputs = speaker.answer([item for item, _, _ in samples[block]], requests[block])
            seconds = (time.perf_counter() - started) / len(outputs)
            file.append(
                {**line.fields, "output": {**found._asdict(), "seconds": round(seconds, 6)}}
                for line, found in zip(lines[block], outputs, strict=True)
            )
            num_done += len(outputs)
            counts["generated"] += len(outputs)
            report()
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def _line(number: int, item: Item, which: int, sampling: SamplingParams) -> Line:
    fields = {"item": item.key, "sample": which, "prompt": str(item.prompt)}
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    return Line(number, fields, Request("any"))


# Reporting -------------------------------------------------------------------------------------------------


def _report(
    output: Path,
    work: Work,
    predictors: Sequence[Predictor],
    answers: Mapping[tuple[str, str], list[dict[str, Any]]],
    rows_of: Mapping[str, list[Row]],
    notes: Sequence[str],
    options: EvalOptions,
) -> TaskReport:
    task = work.task
    other: Rule = "numeric" if options.rule == "paper" else "paper"
    results = []
    for predictor in predictors:
        rows, given = rows_of[predictor.name], answers[task.name, predictor.name]
        _write_samples(output, task, predictor, rows, given)
        outputs = [answer["output"] for answer in given]
        num_new_tokens = sum(o["num_new_tokens"] for o in outputs)
        has_text = not work.items[0].options
        results.append(
            Result(
                predictor,
                task.grade(rows, options.rule),
                task.grade(rows, other),
                num_new_tokens=num_new_tokens if has_text else 0,
                seconds=sum(o["seconds"] for o in outputs),
            )
        )
    return compared(task, results, [*work.deviations(), *notes], num_items=len(work.items))


def _write_samples(
    output: Path,
    task: Task,
    predictor: Predictor,
    rows: Sequence[Row],
    given: Sequence[Mapping[str, Any]],
) -> None:
    """Write every sample whole: prompt, output, the row that is scored, and its score by both rules."""
    path = output / "samples" / task.name / f"{file_name(predictor.name)}.jsonl"
    lines = []
    for place, (row, answer) in enumerate(zip(rows, given, strict=True), 1):
        lines.append(
            json.dumps(
                {
                    **row,
                    "item": answer["item"],
                    "sample": answer["sample"],
                    "predictor": predictor.name,
                    "prompt": answer["prompt"],
                    "generated": answer["output"],
                    "scores": {rule: task.score(row, place, rule) for rule in RULES},
                },
                ensure_ascii=False,
            )
        )
    write_whole(path, "\n".join(lines) + "\n")
