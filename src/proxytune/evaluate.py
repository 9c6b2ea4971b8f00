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
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from proxytune.batch_file import Line, ResumableOutput, line_seed
from proxytune.errors import BackendError, InputFileError, InvalidRequest, OutputFileError
from proxytune.eval_harness import HarnessRun, is_installed, known_names, run_task, sample_line
from proxytune.prompts import continuation_ids
from proxytune.recipe import ExpertSpec, ModelSpec, Recipe
from proxytune.request import MAX_PENALTY, Request, SamplingParams, check_alpha
from proxytune.tasks.humaneval import CodeTask
from proxytune.tasks.judges import ChatJudge, CodeRunner, Judge, JudgeSettings, ToxicityClassifier
from proxytune.tasks.registry import TASKS, find_task
from proxytune.tasks.rows import Row
from proxytune.tasks.statistics import Gap, mean_gap, paired_p_value, resampled_gap
from proxytune.tasks.task import RULES, Grade, Item, Rule, Task

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned

Role = Literal["base", "expert", "steered", "tuned", "nudged"]
DECIDED_AT_ONCE = 16
"""Samples that a judge decides on before what it said is written down."""


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What is compared, and how.

    Args:
        tasks: Names of benchmarks, or of tasks of lm-eval.
        data_dir: Where their files are; None for the Hub.
        limit: Most items of each; None for all.
        alphas: Strengths of the steered base.
        experts: Which experts steer; None for the recipe's default.
        rule: By which the tables score; samples carry both scores.
        tuned: A directly tuned model, by reference; None for none.
        tuned_adapter: An adapter on the base, in its place; None for none.
        tuned_prompt: The prompt format of the tuned model; None for the expert's.
        nudge_below: The threshold of nudging (the policy `nudge` of `policy.py`); None leaves it out.
        batch_size: Answers generated together.
        num_samples: Answers to each item of a benchmark that draws them; None for the published number.
        max_new_tokens: Most tokens of an answer, where the published number is larger; None for that.
        seed: Of drawn answers.
        run_code: Run generated programs.
        judge: Whom to ask about open answers; None leaves them unscored.
        toxicity_model: A classifier of toxic text; None leaves ToxiGen unscored.
        dtype: Of the models, where it is not the recipe's.
        device: Likewise.
        speculative: Draft tokens.

    Raises:
        InvalidRequest: A value cannot be used, or two exclude each other.
    """

    tasks: tuple[str, ...]
    data_dir: Path | None = None
    limit: int | None = None
    alphas: tuple[float, ...] = (1.0,)
    experts: tuple[str, ...] | None = None
    rule: Rule = "paper"
    tuned: str | None = None
    tuned_adapter: str | None = None
    tuned_prompt: str | None = None
    nudge_below: float | None = None
    batch_size: int = 8
    num_samples: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    run_code: bool = False
    judge: JudgeSettings | None = None
    toxicity_model: str | None = None
    dtype: str | None = None
    device: str | None = None
    speculative: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InvalidRequest(f"no benchmark is named.\nhint: some of {', '.join(TASKS)}")
        if len(set(self.tasks)) < len(self.tasks):
            raise InvalidRequest("a benchmark is named twice.\nhint: name each once")
        for name in ("limit", "batch_size", "num_samples", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} is {value}, and must be at least 1")
        for alpha in self.alphas:
            check_alpha(alpha)
        if self.rule not in RULES:
            raise InvalidRequest(f"rule is {self.rule!r}, and must be one of {', '.join(RULES)}")
        if self.tuned is not None and self.tuned_adapter is not None:
            raise InvalidRequest(
                "a tuned model and an adapter on the base are both given, and only one can be compared.\n"
                "hint: leave one of them out"
            )
        if self.tuned_prompt is not None and self.tuned is None and self.tuned_adapter is None:
            raise InvalidRequest("tuned_prompt is given and no tuned model.\nhint: leave it out")
        if self.nudge_below is not None and not 0 < self.nudge_below <= 1:
            raise InvalidRequest(
                f"nudge_below is {self.nudge_below:g}, and must be a probability above 0"
            )

    @property
    def has_tuned(self) -> bool:
        """Whether a directly tuned model is compared."""
        return self.tuned is not None or self.tuned_adapter is not None


class Output(NamedTuple):
    """An answer as a model gave it."""

    text: str
    num_new_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Predictor:
    """A way to answer.

    Args:
        name: What tables and files call it.
        role: What it is.
        alpha: Strength, for a steered base.
        expert: The expert that is alone, or nudges.
    """

    name: str
    role: Role
    alpha: float | None = None
    expert: str | None = None


def predictors_of(recipe: Recipe, options: EvalOptions) -> list[Predictor]:
    """Return what is compared, the base first.

    Raises:
        UnknownExpert: The recipe has no expert of a name.
        InvalidRequest: Nudging was asked for with several experts.
    """
    chosen = list(recipe.choose(options.experts, None))
    found = [Predictor("base", "base", alpha=0.0)]
    for name in chosen:
        label = "expert" if len(chosen) == 1 else f"expert {name}"
        found.append(Predictor(label, "expert", expert=name))
    for alpha in dict.fromkeys(options.alphas):
        if alpha != 0:
            found.append(Predictor(f"steered {alpha:g}", "steered", alpha=alpha))
    if options.has_tuned:
        found.append(Predictor("tuned", "tuned"))
    if options.nudge_below is not None:
        if len(chosen) > 1:
            raise InvalidRequest(
                f"nudging is by one expert, and {len(chosen)} steer.\nhint: name one with --expert"
            )
        found.append(Predictor(f"nudged {options.nudge_below:g}", "nudged", expert=chosen[0]))
    return found


def tuned_recipe(recipe: Recipe, options: EvalOptions) -> Recipe:
    """Return the recipe that holds the directly tuned model; `Speaker` takes it out of it."""
    first = recipe.experts[0]
    if options.experts:
        first = next(e for e in recipe.experts if e.name == options.experts[0])
    prompt = options.tuned_prompt or (first.expert.prompt if first.expert.model else "plain")
    same = ModelSpec(same_as="base")
    if options.tuned_adapter is not None:
        spec = replace(recipe.base, adapter=options.tuned_adapter, prompt=prompt)
        return replace(recipe, experts=(ExpertSpec("tuned", spec, same),), default_expert=None)
    spec = ModelSpec(
        model=options.tuned,
        dtype=recipe.base.dtype,
        device=recipe.base.device,
        prompt=prompt,
    )
    # Its own base and its own expert: one model, loaded once.
    return replace(
        recipe, base=spec, experts=(ExpertSpec("tuned", spec, same),), default_expert=None
    )


def nudged(model: ProxyTuned, expert: str, threshold: float) -> ProxyTuned:
    """Return the base that an expert nudges, whatever policy the recipe has; the anti-expert is not run.

    Raises:
        InvalidRequest: The threshold cannot be used.
    """
    from proxytune.decode import Pair
    from proxytune.model import ProxyTuned
    from proxytune.policy import Policy

    found = next(pair for pair in model.ensemble.pairs if pair.name == expert)
    ensemble = replace(
        model.ensemble,
        pairs=(Pair(expert, found.expert, anti_expert=0),),
        policy=Policy(name="nudge", threshold=threshold),
    )
    return ProxyTuned(ensemble, model.formats, model.recipe)


class Speaker:
    """A predictor with its models loaded."""

    def __init__(self, predictor: Predictor, model: ProxyTuned, options: EvalOptions) -> None:
        self._options = options
        self.alpha = 0.0
        self.experts = options.experts
        if predictor.role == "tuned":
            self.experts = None
            (pair,) = model.ensemble.pairs
            model = model.alone(pair.expert)
        elif predictor.role == "expert":
            pair = next(p for p in model.ensemble.pairs if p.name == predictor.expert)
            model = model.alone(pair.expert)
        elif predictor.role == "steered":
            assert predictor.alpha is not None
            self.alpha = predictor.alpha
        elif predictor.role == "nudged":
            assert predictor.expert is not None and options.nudge_below is not None
            model = nudged(model, predictor.expert, options.nudge_below)
            self.alpha, self.experts = 1.0, (predictor.expert,)
        self.model = model

    def request(self, item: Item, sampling: SamplingParams) -> Request:
        """Return what is asked."""
        return Request(item.prompt, sampling, self.alpha, self.experts)

    def bias(self, banned: Sequence[str]) -> tuple[tuple[int, float], ...]:
        """Return what keeps a model from writing these, as far as single tokens spell them."""
        tokenizer = self.model.tokenizer
        found: dict[int, float] = {}
        for text in banned:
            for form in (text, f" {text}"):
                token_ids = tokenizer.encode(form, add_special_tokens=False)
                if len(token_ids) == 1:
                    found[token_ids[0]] = -MAX_PENALTY
        return tuple(sorted(found.items()))

    def check(self, requests: Sequence[Request]) -> None:
        """Check that every prompt fits the models.

        Raises:
            UserError: One does not.
        """
        for request in requests:
            self.model.job(request)

    def answer(self, items: Sequence[Item], requests: Sequence[Request]) -> list[Output]:
        """Answer items, side by side.

        Raises:
            BackendError: A model failed.
        """
        if items[0].options:
            return [self._choose(item) for item in items]
        traces = self.model.generate_batch(
            requests, batch_size=len(requests), speculative=self._options.speculative
        )
        return [Output(t.text, t.num_new_tokens, t.finish_reason) for t in traces]

    def _choose(self, item: Item) -> Output:
        options = item.options
        first = {tuple(continuation_ids(option, self.model.tokenizer)[:1]) for option in options}
        if len(first) < len(options):
            # A tokenizer whose space is a token of its own tells only the letters apart.
            options = tuple(option.strip() for option in options)
        index = self.model.choose(
            item.prompt, options, alpha=self.alpha, experts=self.experts
        ).index
        return Output(item.options[index], 1, "length")


@dataclass(frozen=True, slots=True)
class Work:
    """One benchmark with its items and settings."""

    task: Task
    items: list[Item]
    sampling: SamplingParams
    num_samples: int

    @classmethod
    def prepare(cls, name: str, options: EvalOptions) -> Work:
        """Read a benchmark.

        Raises:
            InputFileError: Its data cannot be had.
        """
        task = TASKS[name]
        items = task.items(options.data_dir)[: options.limit]
        sampling = task.sampling
        if options.max_new_tokens is not None and options.max_new_tokens < sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=options.max_new_tokens)
        num_samples = 1 if sampling.is_greedy else options.num_samples or task.num_samples
        return cls(task, items, sampling, num_samples)

    def samples(self, seed: int) -> Iterator[tuple[Item, int, SamplingParams]]:
        """Yield every sample with its settings; drawn ones have a seed each."""
        number = 0
        for item in self.items:
            for which in range(self.num_samples):
                number += 1
                sampling = self.sampling
                if not sampling.is_greedy:
                    sampling = replace(sampling, seed=line_seed(seed, number))
                yield item, which, sampling

    def deviations(self) -> list[str]:
        """Say where the settings are not the published ones."""
        found = []
        if self.sampling.max_new_tokens != self.task.sampling.max_new_tokens:
            found.append(
                f"at most {self.sampling.max_new_tokens} new tokens, published "
                f"{self.task.sampling.max_new_tokens}"
            )
        if self.num_samples != self.task.num_samples:
            found.append(f"{self.num_samples} samples an item, published {self.task.num_samples}")
        return found


@dataclass(frozen=True, slots=True)
class Result:
    """How one predictor did on one benchmark.

    Args:
        predictor: Who.
        grade: By the rule of the tables.
        other: By the other rule.
        p_base: How likely so large a difference to the base is by chance; None for the base.
        p_expert: The same against the expert; None for the expert, or with several.
        difference: To the base, in the metric's unit, over the items that both have a score of.
        gap: Which share of the tuned model's gain it has.
        num_new_tokens: Generated in all.
        seconds: Of generating, models loaded.
    """

    predictor: Predictor
    grade: Grade
    other: Grade
    num_new_tokens: int
    seconds: float
    p_base: float | None = None
    p_expert: float | None = None
    difference: float | None = None
    gap: Gap = field(default_factory=lambda: Gap(None, None))

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens a second, all rows of a batch together."""
        return self.num_new_tokens / self.seconds if self.seconds and self.num_new_tokens else None


@dataclass(frozen=True, slots=True)
class TaskReport:
    """How all predictors did on one benchmark."""

    name: str
    title: str
    metric: str
    scale: float
    lower_is_better: bool
    num_items: int
    results: tuple[Result, ...]
    notes: tuple[str, ...]
    gaps: dict[str, tuple[Gap, Any]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class EvalReport:
    """What a whole run amounts to.

    Args:
        recipe: As given.
        options: As given.
        tasks: One report each.
        mean_gaps: By predictor, the mean over the benchmarks of the gap closed.
        environment: Versions and hardware.
        num_resumed: Samples that an earlier run had generated.
        num_generated: Samples that this run generated.
    """

    recipe: str
    options: EvalOptions
    tasks: tuple[TaskReport, ...]
    mean_gaps: Mapping[str, Gap]
    environment: Mapping[str, str]
    num_resumed: int
    num_generated: int

    def to_dict(self) -> dict[str, Any]:
        """Return the content of eval.json."""
        return {
            "recipe": self.recipe,
            "options": json.loads(json.dumps(asdict(self.options), default=str)),
            "environment": dict(self.environment),
            "tasks": [
                {
                    "name": task.name,
                    "metric": task.metric,
                    "lower_is_better": task.lower_is_better,
                    "num_items": task.num_items,
                    "notes": list(task.notes),
                    "results": [_result_dict(result) for result in task.results],
                }
                for task in self.tasks
            ],
            "mean_gaps": {name: asdict(gap) for name, gap in self.mean_gaps.items()},
        }


def _result_dict(result: Result) -> dict[str, Any]:
    return {
        "predictor": result.predictor.name,
        "role": result.predictor.role,
        "alpha": result.predictor.alpha if result.predictor.role == "steered" else None,
        "metric": result.grade.metric,
        "standard_error": result.grade.error,
        "num_items": sum(score is not None for score in result.grade.scores.values()),
        "num_unscored": result.grade.num_unscored,
        "difference": result.difference,
        "p_base": result.p_base,
        "p_expert": result.p_expert,
        "gap": asdict(result.gap),
        "num_new_tokens": result.num_new_tokens,
        "seconds": round(result.seconds, 3),
        "tokens_per_s": result.tokens_per_s,
        "metrics": dict(result.grade.metrics),
        "rules": {g.rule: g.metric for g in (result.grade, result.other)},
    }


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
        chosen = None if is_tuned else tuple(recipe.choose(options.experts, None))
        source = tuned_recipe(recipe, options) if is_tuned else recipe
        lazy = _Lazy(partial(load, source, chosen))
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
        notes = _decide(output, work, predictors, rows_of, options, say)
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
                f"{error}; for tasks of lm-eval, pip install 'proxytune[eval]'"
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
    lazy: _Lazy,
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


class _Lazy:
    """Models that are loaded when they are first needed."""

    def __init__(self, load: Callable[[], ProxyTuned]) -> None:
        self._load = load
        self._model: ProxyTuned | None = None

    @property
    def model(self) -> ProxyTuned:
        if self._model is None:
            self._model = self._load()
        return self._model


def file_name(predictor: str) -> str:
    """Return a predictor's name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", predictor)


def _generate(
    output: Path,
    work: Work,
    predictor: Predictor,
    recipe: Recipe,
    options: EvalOptions,
    lazy: _Lazy,
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


def _decide(
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
        journal = _Journal(path, judge.name)
        keys = [_digest(row) for row in rows]
        open_rows = [i for i, key in enumerate(keys) if key not in journal.decisions]
        # Equal answers to one item are decided once.
        first = list({keys[i]: i for i in reversed(open_rows)}.values())[::-1]
        try:
            for start in range(0, len(first), DECIDED_AT_ONCE):
                block = first[start : start + DECIDED_AT_ONCE]
                decisions = judge.decide([items[i] for i in block], [rows[i] for i in block])
                for i, decision in zip(block, decisions, strict=True):
                    if decision is not None:
                        journal.append(keys[i], decision)
        except BackendError as error:
            message = str(error).split("\n")[0]
            say(f"{task.name}, {predictor.name}: the judge failed: {message}")
            notes.append(
                f"the judge failed on {predictor.name} ({message}); the same command goes on"
            )
        rows_of[predictor.name] = [
            {**row, **journal.decisions.get(key, {})} for row, key in zip(rows, keys, strict=True)
        ]
    return notes


def _digest(row: Row) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:32]


class _Journal:
    """Decisions, appended one by one to a file; a line that was cut off by a kill is dropped."""

    def __init__(self, path: Path, judge: str) -> None:
        self._path, self._judge = path, judge
        self.decisions: dict[str, Row] = {}
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
                    self.decisions[entry["row"]] = dict(entry["decision"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputFileError(
                    f"line {number} of {path} is no decision: {error}.\nhint: remove the file"
                ) from error

    def append(self, key: str, decision: Row) -> None:
        """Keep a decision, and write it to the disk."""
        self.decisions[key] = decision
        entry = {"row": key, "judge": self._judge, "decision": decision}
        with self._path.open("ab") as file:
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


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


class Measured(NamedTuple):
    """What a comparison has to know of a benchmark."""

    name: str
    title: str
    scale: float
    lower_is_better: bool


def compared(
    task: Task | Measured, results: Sequence[Result], notes: Sequence[str], *, num_items: int
) -> TaskReport:
    """Return the report of a benchmark: every predictor against the base, the expert and the tuned model.

    Differences are over the items of which both have a score, and so is the gap closed over those that all
    three have.
    """
    base = results[0].grade.scores
    experts = [r.grade.scores for r in results if r.predictor.role == "expert"]
    tuned = next((r.grade.scores for r in results if r.predictor.role == "tuned"), None)
    gaps: dict[str, tuple[Gap, Any]] = {}
    full = []
    for result in results:
        role, scores = result.predictor.role, result.grade.scores
        changes: dict[str, Any] = {}
        if role != "base":
            own, others = paired(scores, base)
            if own:
                changes["p_base"] = paired_p_value(own, others)
                changes["difference"] = task.scale * (sum(own) - sum(others)) / len(own)
        if role != "expert" and len(experts) == 1:
            own, others = paired(scores, experts[0])
            if own:
                changes["p_expert"] = paired_p_value(own, others)
        if role not in ("base", "tuned") and tuned is not None:
            three = paired(base, scores, tuned)
            gap, drawn = resampled_gap(*three) if three[0] else (Gap(None, None), None)
            changes["gap"] = gap
            gaps[result.predictor.name] = (gap, drawn)
        full.append(replace(result, **changes))
    grades = [result.grade for result in results]
    unscored = [
        f"{r.predictor.name}: {r.grade.num_unscored:,} of {r.grade.num_rows:,} samples unscored"
        for r in results
        if 0 < r.grade.num_unscored < r.grade.num_rows
    ]
    return TaskReport(
        task.name,
        task.title,
        grades[0].name,
        task.scale,
        task.lower_is_better,
        num_items,
        tuple(full),
        (*notes, *unscored),
        gaps,
    )


def paired(*scores: Mapping[str, float | None]) -> list[list[float]]:
    """Return the scores of the items that all have one for, in one order."""
    lists: list[list[float]] = [[] for _ in scores]
    for key in scores[0]:
        values = [each.get(key) for each in scores]
        if None not in values:
            for column, value in zip(lists, values, strict=True):
                assert value is not None
                column.append(value)
    return lists


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


def write_whole(path: Path, content: str) -> None:
    """Write a file that is never there in part.

    Raises:
        OutputFileError: It cannot be written.
    """
    part = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content.encode())
        part.replace(path)
    except OSError as error:
        raise OutputFileError(
            f"{path} cannot be written: {error.strerror}.\nhint: name a folder that can be written"
        ) from error


def environment() -> dict[str, str]:
    """Return versions and hardware, as far as they can be found out."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": platform.python_version()}
    for package in ("proxytune", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    found["threads"] = str(torch.get_num_threads())
    found["machine"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    )
    return found
