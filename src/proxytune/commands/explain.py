"""`proxytune explain`: what steering did to each token of a text."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command
from proxytune.commands.console import (
    argument_text,
    json_line,
    print_text,
    say,
    stdin_text,
    write_text,
)
from proxytune.commands.flags import Pick, given_flags
from proxytune.commands.options import (
    AS_JSON,
    EXPERT,
    STRENGTH,
    ModelOptions,
    OptionalRecipe,
    PromptArgument,
    steering_of,
)
from proxytune.commands.progress import waiting
from proxytune.commands.shown import TABLE_ROWS, print_moves
from proxytune.errors import InvalidRequest
from proxytune.request import MAX_EXPLAIN_TOP, Experts, Request, SamplingParams, Steering
from proxytune.settings import Option, option

if TYPE_CHECKING:
    from proxytune.explain.report import Report
    from proxytune.explain.runs import Question
    from proxytune.recipe.recipe import Recipe

TRACE_FILE = Option(
    "Write the whole traces to this file, as JSON lines that --trace and proxytune analyze read",
    metavar="FILE",
)

FOR_MODELS = frozenset((
    "PROMPT", "--input-file", "--continuation", "--what-if", "--alpha", "--expert",
))  # fmt: skip
"""What runs models, or is for them, and does nothing beside saved traces."""


@dataclass(frozen=True, kw_only=True)
class StrengthOptions:
    """Which experts steer, at one strength or several."""

    alphas: tuple[float, ...] = option(
        (),
        f"{STRENGTH}; with several, one text for each",
        flag="--alpha",
        metavar="A,B,...",
        separator=",",
        none_means="the recipe's",
    )
    experts: tuple[str, ...] = option((), EXPERT)

    def of(self, recipe: Recipe) -> tuple[tuple[float | None, ...], Experts | None]:
        """Return the strengths, each once, with None for the recipe's, and the experts.

        Raises:
            UnknownExpert: The recipe has no expert of that name.
            InvalidRequest: Strengths contradict each other.
        """
        strengths: tuple[float | None, ...] = tuple(dict.fromkeys(self.alphas)) or (None,)
        is_one = len(strengths) == 1
        experts = steering_of(recipe, self.experts, strengths[0] if is_one else None).experts
        if isinstance(experts, Mapping):
            if not is_one:
                raise InvalidRequest(
                    "--alpha has several strengths and an expert has one of its own, so it is unclear which "
                    "apply.\nhint: leave one of them out"
                )
            strengths = (None,)
        return strengths, experts


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """What is explained, and where the explanation goes."""

    continuation: str | None = option(
        None, "Explain this text after the prompt, instead of generating one"
    )
    input_file: Path | None = option(
        None, "Prompts as JSON lines, as in proxytune generate; a line may have a continuation"
    )
    trace: Path | None = option(
        None, "Explain the saved traces in this file, without running models"
    )
    what_if: tuple[str, ...] = option(
        (),
        "Continue from another token at this position, counted from 0: its text, or #ID; repeat for more",
        metavar="POSITION=TOKEN",
    )
    top: int = option(
        5, "Number of each model's most likely tokens to keep", at_least=0, at_most=MAX_EXPLAIN_TOP
    )
    html: Path | None = option(
        None,
        "Write a page that works offline: the text in colours, each token's distributions, curves",
    )
    trace_file: Path | None = option(None, TRACE_FILE)
    rows: int = option(
        TABLE_ROWS,
        "Number of rows in the table of tokens that moved most; 0 for no table",
        at_least=0,
    )
    as_json: bool = option(False, AS_JSON)


@command('proxytune explain my-recipe "Once upon a time" --html report.html')
def explain(
    recipe: OptionalRecipe = None,
    prompt: PromptArgument = None,
    *,
    options: ExplainOptions,
    steering: StrengthOptions,
    sampling: Annotated[
        SamplingParams,
        Pick(
            leave_out=("logprobs",),
            defaults={"max_new_tokens": 64},  # what fits a screen
            help={"seed": "Random seed, shared by all continuations"},
        ),
    ],
    models: Annotated[ModelOptions, Pick(leave_out=("cuda_graphs",))],
) -> None:
    """Show what steering did to each token.

    Tokens are coloured by how much more (orange) or less likely (blue) steering made them; angle brackets
    mark those where base and steered model rank different tokens first. The base's own continuation is
    printed beside the text. docs/guides/read-a-steering-report.md explains how to read it.
    """
    from proxytune.explain.runs import Question, explained, saved_reports

    _refuse_contradictions(
        given_flags(RECIPE=recipe, PROMPT=prompt, options=options, steering=steering)
    )
    if options.trace is not None:
        reports = saved_reports(options.trace)
        name = options.trace.name
    else:
        assert recipe is not None
        name = recipe
        if sampling.seed is None and not sampling.is_greedy:
            sampling = replace(sampling, seed=secrets.randbits(31))
        forks = [_fork(text) for text in options.what_if]
        if prompt is not None:
            prompt = stdin_text() if prompt == "-" else argument_text(prompt)
            Request(prompt, sampling)  # An empty prompt needs no recipe to be refused.
        found = models.read(recipe)
        strengths, experts = steering.of(found)
        if prompt is not None:
            questions = [Question(prompt, options.continuation, sampling, strengths, experts)]
        else:
            assert options.input_file is not None
            questions = _read_questions(options.input_file, found, sampling, strengths, experts)
        used = {name for question in questions for name in found.named(question.experts)}
        made = explained(models.load(found, used), questions, forks=forks, top=options.top)
        reports = _awaited(made)
    _show(reports, name, options)


def _awaited(reports: Iterator[Report]) -> Iterator[Report]:
    """Yield reports, with a sign of life on stderr before each."""
    while True:
        with waiting("explaining"):
            report = next(reports, None)
        if report is None:
            return
        yield report


def _show(reports: Iterable[Report], name: str, options: ExplainOptions) -> None:
    from proxytune.trace import trace_writer

    with trace_writer(options.trace_file) as write:
        kept: list[Report] = []
        for number, report in enumerate(reports):
            if options.html is not None or options.as_json:
                kept.append(report)
            if not options.as_json:
                print_moves(report, options.rows, is_first=number == 0)
            write(run.trace for run in report.runs)
    if options.as_json:
        print_text(json_line({"recipe": name, "reports": [r.to_dict() for r in kept]}))
    if options.html is not None:
        from proxytune.explain.page import page

        write_text(options.html, page(kept, recipe=name))
        say(f"{options.html}: open it in a browser; it works offline")


def _refuse_contradictions(given: set[str]) -> None:
    if "--trace" in given:
        for name in sorted(given & FOR_MODELS):
            raise InvalidRequest(
                f"--trace shows saved traces and runs no model, so {name} cannot be given as well.\n"
                "hint: leave one of them out"
            )
        return
    if "RECIPE" not in given:
        raise InvalidRequest(
            "there is nothing to explain.\nhint: give a recipe and a prompt, or --trace traces.jsonl"
        )
    if "PROMPT" in given and "--input-file" in given:
        raise InvalidRequest("PROMPT and --input-file are both given.\nhint: leave one of them out")
    if not given & {"PROMPT", "--input-file"}:
        raise InvalidRequest(
            "there is no prompt.\nhint: give it as text, - for stdin, or --input-file prompts.jsonl"
        )
    hints = {"--continuation": 'put "continuation" into its lines', "--what-if": "leave it out"}
    for name, hint in hints.items():
        if {"--input-file", name} <= given:
            raise InvalidRequest(
                f"{name} belongs to one prompt, and --input-file gives many.\nhint: {hint}"
            )


def _fork(text: str) -> tuple[int, str]:
    """Return the position and the token of a `--what-if`."""
    position, has_token, token = text.partition("=")
    if not has_token or not position.strip().isdecimal() or not token:
        raise InvalidRequest(
            f"--what-if is {text!r}, and must be a position, an equals sign and a token.\n"
            "hint: --what-if '3= sea' puts \" sea\" at position 3, counted from 0; '3=#42' the token 42"
        )
    return int(position), token


def _read_questions(
    path: Path,
    recipe: Recipe,
    sampling: SamplingParams,
    strengths: tuple[float | None, ...],
    experts: Experts | None,
) -> list[Question]:
    from proxytune.data.lines import read_lines
    from proxytune.explain.runs import Question

    questions = []
    steering = Steering(experts=experts)
    for line in read_lines(path, recipe=recipe, sampling=sampling, steering=steering):
        given = line.fields.get("continuation")
        if given is not None and not isinstance(given, str):
            raise InvalidRequest(
                f'line {line.number} of {path}: "continuation" must be text.\nhint: fix the line'
            )
        request = line.request
        own = strengths if request.alpha is None else (request.alpha,)
        if isinstance(request.experts, Mapping):
            own = (None,)
        questions.append(Question(request.prompt, given, request.sampling, own, request.experts))
    return questions
