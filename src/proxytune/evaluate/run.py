"""Base, expert, steered base, directly tuned base and nudged base on benchmarks, side by side.

Words: a *predictor* is a way to answer: the base alone, an expert alone, the base steered at one strength,
a directly tuned model, the base nudged by the expert. Every predictor answers the same items with the same
settings and, if answers are sampled, the same seeds. A *sample* is one answer to one item.

A run has a folder of its own and can be killed at any time: answers are written block by block, and the
decisions of judges one by one. Started again with the same settings it continues. Nothing is lost or asked
twice.

    generated/TASK/PREDICTOR.jsonl      answers as they come, with a progress file beside each
    decided/TASK/PREDICTOR.jsonl        decisions of judges and of code that was run
    samples/TASK/PREDICTOR.jsonl        in the end: prompt, output and both scores of every sample
    eval.json, eval.md, eval.png        the results
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from proxytune.data.lines import Line
from proxytune.data.resumable import ResumableOutput
from proxytune.errors import InvalidRequest, install_command
from proxytune.evaluate.compare import EvalReport, Measured, Result, TaskReport, compared
from proxytune.evaluate.decide import decide
from proxytune.evaluate.harness import HarnessRun, is_installed, known_names, run_task, sample_line
from proxytune.evaluate.plan import EvalOptions, Work
from proxytune.evaluate.predictors import (
    Predictor,
    Speaker,
    file_name,
    predictors_of,
    tuned_recipe,
)
from proxytune.files import write_whole, writing
from proxytune.machine import environment
from proxytune.recipe.recipe import Recipe
from proxytune.request import Request, SamplingParams
from proxytune.tasks.registry import TASKS, find_task
from proxytune.tasks.rows import Row
from proxytune.tasks.sandbox import require_promises
from proxytune.tasks.statistics import mean_gap
from proxytune.tasks.task import RULES, Item, Rule, Task

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned


class EvalProgress(NamedTuple):
    """How far one predictor is with one benchmark."""

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
    on_progress: Callable[[EvalProgress], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> EvalReport:
    """Compare predictors on benchmarks, continuing what an earlier run left in `output`.

    Args:
        recipe: Base and experts.
        output: A folder for this evaluation alone.
        options: What is compared.
        load: Loads a recipe with some of its experts; None loads all of them.
        name: The recipe's name in the report.
        on_progress: Called after each block of answers.
        say: Called with notes for the user, one sentence each.

    Raises:
        InputFileError: Data is missing.
        OutputFileError: The folder cannot be written, or was started with other settings.
        UserError: A model or a request cannot be used.
        BackendError: A model failed; what is written stays, and the same call continues.
    """
    _check_names(options.tasks)
    predictors = predictors_of(recipe, options)
    works = [Work.prepare(task, options) for task in options.tasks if task in TASKS]
    foreign = [task for task in options.tasks if task not in TASKS]
    if options.run_code and any(work.task.decider == "code" for work in works):
        # Before the models answer, which may take hours.
        require_promises(allow_weaker=options.allow_weaker_sandbox)
    answering = _Answering(output, options, on_progress)
    steerable = [p for p in predictors if p.role != "tuned"]
    chosen = recipe.named(options.experts)
    answering.ask(steerable, works, foreign, recipe, partial(load, recipe, chosen))
    if options.has_tuned:
        # After the models of the others are gone: the tuned one may be as large as the base.
        tuned = [p for p in predictors if p.role == "tuned"]
        source = tuned_recipe(recipe, options)
        answering.ask(tuned, works, foreign, source, partial(load, source, None))
    reports = [
        _task_report(output, work, predictors, answering.answers, options, say) for work in works
    ]
    reports += [_foreign_report(task, predictors, answering.runs) for task in foreign]
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
        answering.num_resumed,
        answering.num_generated,
    )


def _check_names(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in TASKS]
    if not unknown:
        return
    if not is_installed():
        try:
            find_task(unknown[0])
        except InvalidRequest as error:
            more = f"for tasks of lm-eval, {install_command('eval')}"
            raise InvalidRequest(f"{error}; {more}") from None
    foreign = known_names()
    for name in unknown:
        if name not in foreign:
            find_task(name, also=foreign)


# Answering -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Answering:
    """Answers of all predictors, generated now or by an earlier run; keys are benchmark and predictor."""

    output: Path
    options: EvalOptions
    on_progress: Callable[[EvalProgress], None] | None
    answers: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    runs: dict[tuple[str, str], HarnessRun] = field(default_factory=dict)
    num_resumed: int = 0
    num_generated: int = 0

    def ask(
        self,
        predictors: Sequence[Predictor],
        works: Sequence[Work],
        foreign: Sequence[str],
        recipe: Recipe,
        load: Callable[[], ProxyTuned],
    ) -> None:
        """Let predictors that share loaded models answer every benchmark and every task of lm-eval."""
        model = cache(load)  # on first use: an earlier run may have answered everything
        if self.options.engine != "local":  # whose weights are read at the first answer
            for work in works:
                samples = list(work.samples(self.options.seed))
                for predictor in predictors:
                    speaker = Speaker(predictor, model(), self.options)
                    speaker.check(speaker.requests(work.task, samples))
        for work in works:
            for predictor in predictors:
                key = work.task.name, predictor.name
                self.answers[key] = self._generate(work, predictor, recipe, model)
        for task in foreign:
            for predictor in predictors:
                self.runs[task, predictor.name] = self._run_foreign(task, predictor, recipe, model)
        if model.cache_info().currsize and (engine := model().ensemble.engine) is not None:
            engine.close()  # The next models, or a classifier, may need its memory.

    def _run_foreign(
        self, task: str, predictor: Predictor, recipe: Recipe, model: Callable[[], ProxyTuned]
    ) -> HarnessRun:
        """Run a task of lm-eval for one predictor, and write its samples."""
        options = self.options
        speaker = Speaker(predictor, model(), options)
        where = str(recipe.directory.resolve())
        content = [recipe.to_dict(), where, asdict(predictor), options.dtype, options.seed]
        content += ["exact"] if options.exact else []
        settings = json.dumps(content, sort_keys=True, default=str)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        name = file_name(predictor.name)
        run = run_task(
            task,
            speaker.model,
            alpha=speaker.alpha,
            experts=speaker.experts,
            limit=options.limit,
            batch_size=options.num_together,
            seed=options.seed,
            cache=self.output / "generated" / task / f"{name}.{digest}",
            rule=options.rule,
        )
        lines = [sample_line(key, record, predictor.name) for key, record in run.samples.items()]
        write_whole(self.output / "samples" / task / f"{name}.jsonl", "\n".join(lines) + "\n")
        return run

    def _generate(
        self, work: Work, predictor: Predictor, recipe: Recipe, model: Callable[[], ProxyTuned]
    ) -> list[dict[str, Any]]:
        """Return the answer to every sample, as a line of the predictor's file each."""
        options, name = self.options, predictor.name
        folder = self.output / "generated" / work.task.name
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{file_name(name)}.jsonl"
        samples = list(work.samples(options.seed))
        settings = _settings(work, predictor, recipe, options)
        with ResumableOutput(path, settings) as file:
            lines = [_line(number, *sample) for number, sample in enumerate(samples, 1)]
            num_done = file.resume(iter(lines), len(lines), options.num_together)
            self.num_resumed += num_done
            self._report(EvalProgress(work.task.name, name, num_done, len(lines)))
            if num_done < len(lines):
                speaker = Speaker(predictor, model(), options)
                requests = speaker.requests(work.task, samples)
                speaker.check(requests[num_done:])
                if (engine := speaker.model.ensemble.engine) is not None:
                    engine.start()
            while num_done < len(lines):
                block = slice(num_done, num_done + options.num_together)
                started = time.perf_counter()
                outputs = speaker.answer([item for item, _, _ in samples[block]], requests[block])
                seconds = (time.perf_counter() - started) / len(outputs)
                file.append(
                    {**line.fields, "output": {**found._asdict(), "seconds": round(seconds, 6)}}
                    for line, found in zip(lines[block], outputs, strict=True)
                )
                num_done += len(outputs)
                self.num_generated += len(outputs)
                self._report(EvalProgress(work.task.name, name, num_done, len(lines)))
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]

    def _report(self, progress: EvalProgress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)


def _settings(
    work: Work, predictor: Predictor, recipe: Recipe, options: EvalOptions
) -> dict[str, Any]:
    """Return everything that answers depend on, as JSON keeps it."""
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
    settings |= {"exact": True} if options.exact else {}
    if options.engine != "local":
        settings["engine"] = options.engine
    return dict(json.loads(json.dumps(settings)))


def _line(number: int, item: Item, which: int, sampling: SamplingParams) -> Line:
    fields = {"item": item.key, "sample": which, "prompt": str(item.prompt)}
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    return Line(number, fields, Request("any"))


# Reporting -------------------------------------------------------------------------------------------------


def _foreign_report(
    task: str, predictors: Sequence[Predictor], runs: Mapping[tuple[str, str], HarnessRun]
) -> TaskReport:
    own = [runs[task, p.name] for p in predictors]
    pairs = zip(predictors, own, strict=True)
    results = [Result(p, run.grade, run.grade, 0, run.seconds) for p, run in pairs]
    measured = Measured(task, f"{task} (lm-eval)", 1.0, own[0].lower_is_better)
    notes = ["scored by lm-eval's own rules"]
    return compared(measured, results, notes, num_items=own[0].grade.num_items)


def _task_report(
    output: Path,
    work: Work,
    predictors: Sequence[Predictor],
    answers: Mapping[tuple[str, str], list[dict[str, Any]]],
    options: EvalOptions,
    say: Callable[[str], None],
) -> TaskReport:
    """Let judges decide, write every sample, and compare the predictors on one benchmark."""
    task = work.task
    given = {p.name: answers[task.name, p.name] for p in predictors}
    rows_of = {
        name: [
            task.row(item, answer["output"]["text"])
            for (item, _, _), answer in zip(work.samples(options.seed), lines, strict=True)
        ]
        for name, lines in given.items()
    }
    notes = decide(output, work, predictors, rows_of, options, say)
    other: Rule = "numeric" if options.rule == "paper" else "paper"
    # An answer chosen by its likelihood has no text whose tokens could be counted.
    has_text = not work.items[0].options
    results = []
    for predictor in predictors:
        rows = rows_of[predictor.name]
        _write_samples(output, task, predictor, rows, given[predictor.name])
        outputs = [answer["output"] for answer in given[predictor.name]]
        grades = task.grade(rows, options.rule), task.grade(rows, other)
        num_new_tokens = sum(o["num_new_tokens"] for o in outputs) if has_text else 0
        seconds = sum(o["seconds"] for o in outputs)
        results.append(Result(predictor, *grades, num_new_tokens, seconds))
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
        sample = {
            **row,
            "item": answer["item"],
            "sample": answer["sample"],
            "predictor": predictor.name,
            "prompt": answer["prompt"],
            "generated": answer["output"],
            "scores": {rule: task.score(row, place, rule) for rule in RULES},
        }
        lines.append(json.dumps(sample, ensure_ascii=False))
    write_whole(path, "\n".join(lines) + "\n")
