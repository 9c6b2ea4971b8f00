"""`proxytune explain`: what steering did to each token of a text."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, NamedTuple

import typer

from proxytune.commands.app import command
from proxytune.commands.console import (
    argument_text,
    json_line,
    stdin_text,
    unwritable,
    waiting,
    write_text,
)
from proxytune.commands.flags import Pick
from proxytune.commands.options import (
    AS_JSON,
    EXPERT,
    RECIPE_HELP,
    STRENGTH,
    ModelOptions,
    PromptArgument,
    steering_of,
)
from proxytune.commands.shown import TABLE_ROWS, print_moves
from proxytune.errors import InvalidRequest
from proxytune.request import MAX_EXPLAIN_TOP, Experts, Prompt, Request, SamplingParams, Steering
from proxytune.settings import Option

if TYPE_CHECKING:
    from proxytune.explain.report import Report, Run
    from proxytune.model import ProxyTuned
    from proxytune.recipe.recipe import Recipe
    from proxytune.trace import Trace

EXPLAINED_TOKENS = 64
"""The default number of new tokens: what fits a screen."""
BATCH_SIZE = 8
TRACE_FILE = Option(
    "Write the whole traces to this file, as JSON lines that --trace and proxytune analyze read",
    metavar="FILE",
)


@dataclass(frozen=True, kw_only=True)
class StrengthOptions:
    """Which experts steer, at one strength or several."""

    alphas: Annotated[
        tuple[float, ...],
        Option(
            f"{STRENGTH}; with several, one text for each",
            flag="--alpha",
            metavar="A,B,...",
            separator=",",
            default="the recipe's",
        ),
    ] = ()
    experts: Annotated[tuple[str, ...], EXPERT] = ()

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
                    "hold.\nhint: leave one of them out"
                )
            strengths = (None,)
        return strengths, experts


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """What is explained, and where the explanation goes."""

    continuation: Annotated[
        str | None, Option("Explain this text after the prompt, instead of generating one")
    ] = None
    input_file: Annotated[
        Path | None,
        Option(
            "Prompts as JSON lines, as in proxytune generate; a line may have a continuation",
            metavar="FILE",
        ),
    ] = None
    trace: Annotated[
        Path | None,
        Option("Explain the saved traces in this file, without running models", metavar="FILE"),
    ] = None
    what_if: Annotated[
        tuple[str, ...],
        Option(
            "Continue from another token at this position, counted from 0: its text, or #ID; repeat for more",
            metavar="POSITION=TOKEN",
        ),
    ] = ()
    top: Annotated[
        int,
        Option(
            "Number of each model's most likely tokens to keep", at_least=0, at_most=MAX_EXPLAIN_TOP
        ),
    ] = 5
    html: Annotated[
        Path | None,
        Option(
            "Write a page that works offline: the text in colours, each token's distributions, curves",
            metavar="FILE",
        ),
    ] = None
    trace_file: Annotated[Path | None, TRACE_FILE] = None
    rows: Annotated[
        int,
        Option("Number of rows in the table of tokens that moved most; 0 for no table", at_least=0),
    ] = TABLE_ROWS
    as_json: Annotated[bool, AS_JSON] = False


class _Question(NamedTuple):
    """What is asked of one prompt."""

    prompt: Prompt
    continuation: str | None
    sampling: SamplingParams
    alphas: tuple[float | None, ...]
    experts: Experts | None


@command('proxytune explain my-recipe "Once upon a time" --html report.html')
def explain(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help=f"{RECIPE_HELP}; not needed with --trace", show_default=False
        ),
    ] = None,
    prompt: PromptArgument = None,
    *,
    options: ExplainOptions,
    steering: StrengthOptions,
    sampling: Annotated[
        SamplingParams,
        Pick(
            leave_out=("logprobs",),
            defaults={"max_new_tokens": EXPLAINED_TOKENS},
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
    _refuse_contradictions(recipe, prompt, options, steering)
    if options.trace is not None:
        reports: Iterable[Report] = _saved(options.trace)
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
            questions = [_Question(prompt, options.continuation, sampling, strengths, experts)]
        else:
            assert options.input_file is not None
            questions = _read_questions(options.input_file, found, sampling, strengths, experts)
        used = {name for question in questions for name in found.named(question.experts)}
        reports = _explained(models.load(found, used), questions, forks, options.top)
    _show(reports, name, options)


def _show(reports: Iterable[Report], name: str, options: ExplainOptions) -> None:
    """Print reports as they come, and write the files that are asked for."""
    with TraceWriter(options.trace_file) as writer:
        kept: list[Report] = []
        for number, report in enumerate(reports):
            writer.write(run.trace for run in report.runs)
            if options.html is not None or options.as_json:
                kept.append(report)
            if not options.as_json:
                print_moves(report, options.rows, is_first=number == 0)
    if options.as_json:
        typer.echo(json_line({"recipe": name, "reports": [r.to_dict() for r in kept]}))
    if options.html is not None:
        from proxytune.explain.page import page

        write_text(options.html, page(kept, recipe=name))
        typer.echo(f"{options.html}: open it in a browser; it works offline", err=True)


# What is asked --------------------------------------------------------------------------------------


def _refuse_contradictions(
    recipe: str | None, prompt: str | None, options: ExplainOptions, steering: StrengthOptions
) -> None:
    given = {
        "PROMPT": prompt is not None,
        "--input-file": options.input_file is not None,
        "--trace": options.trace is not None,
        "--continuation": options.continuation is not None,
        "--what-if": bool(options.what_if),
        "--alpha": bool(steering.alphas),
        "--expert": bool(steering.experts),
        "RECIPE": recipe is not None,
    }
    if given["--trace"]:
        for name in (
            "PROMPT",
            "--input-file",
            "--continuation",
            "--what-if",
            "--alpha",
            "--expert",
        ):
            if given[name]:
                raise InvalidRequest(
                    f"--trace shows what is saved and runs no model, and {name} is given beside it.\n"
                    "hint: leave one of them out"
                )
        return
    if not given["RECIPE"]:
        raise InvalidRequest(
            "there is nothing to explain.\nhint: give a recipe and a prompt, or --trace traces.jsonl"
        )
    if given["PROMPT"] == given["--input-file"]:
        raise InvalidRequest(
            "PROMPT and --input-file are both given.\nhint: leave one of them out"
            if given["PROMPT"]
            else "there is no prompt.\nhint: give it as text, - for stdin, or --input-file prompts.jsonl"
        )
    if given["--input-file"]:
        for name in ("--continuation", "--what-if"):
            if given[name]:
                raise InvalidRequest(
                    f"{name} belongs to one prompt, and --input-file gives many.\nhint: "
                    + (
                        'put "continuation" into its lines'
                        if name == "--continuation"
                        else "leave it out"
                    )
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
) -> list[_Question]:
    from proxytune.data.lines import read_lines

    questions = []
    for line in read_lines(
        path, recipe=recipe, sampling=sampling, steering=Steering(experts=experts)
    ):
        given = line.fields.get("continuation")
        if given is not None and not isinstance(given, str):
            raise InvalidRequest(
                f'line {line.number} of {path}: "continuation" must be text.\nhint: mend the line'
            )
        request = line.request
        own = strengths if request.alpha is None else (request.alpha,)
        if isinstance(request.experts, Mapping):
            own = (None,)
        questions.append(_Question(request.prompt, given, request.sampling, own, request.experts))
    return questions


# What is answered -----------------------------------------------------------------------------------


def _saved(path: Path) -> Iterator[Report]:
    """Yield saved traces as reports; those of one prompt that follow each other are shown together."""
    from proxytune.explain.report import Report, Run
    from proxytune.trace import read_traces

    runs: list[Run] = []
    for trace in read_traces(path):
        is_base = not any(trace.alphas.values()) and trace.num_given == 0
        is_forked = 0 < trace.num_given < trace.num_new_tokens
        name = _run_name(trace)
        if is_forked:
            name = f"what if at {trace.num_given - 1}, {name}"
        elif trace.num_given:
            name = f"given, {name}"
        run = Run(name, trace, is_base, is_forked)
        if runs and (runs[0].trace.prompt != trace.prompt or not trace.prompt):
            yield Report(tuple(sorted(runs, key=lambda run: run.is_base)))
            runs = []
        runs.append(run)
    if not runs:
        raise InvalidRequest(f"{path} holds no traces")
    yield Report(tuple(sorted(runs, key=lambda run: run.is_base)))


def _run_name(trace: Trace) -> str:
    strengths = dict(trace.alphas)
    if not any(strengths.values()):
        return "base"
    values = set(strengths.values())
    if len(values) == 1:
        return f"alpha {values.pop():g}"
    return ", ".join(f"{name} {alpha:g}" for name, alpha in strengths.items())


def _explained(
    model: ProxyTuned, questions: Sequence[_Question], forks: Sequence[tuple[int, str]], top: int
) -> Iterator[Report]:
    """Yield a report per question, running several at once."""
    from proxytune.explain.report import Report, Run

    for start in range(0, len(questions), BATCH_SIZE):
        block = questions[start : start + BATCH_SIZE]
        requests: list[Request] = []
        for question in block:
            requests += _requests(model, question, top)
        with waiting(f"explaining prompts from {start + 1} on, {len(questions)} in all"):
            made = iter(model.generate_batch(requests, batch_size=BATCH_SIZE))
            for question in block:
                runs = []
                for strength in _steered(model, question):
                    if question.continuation is None:
                        trace = next(made)
                    else:
                        trace = model.explain(
                            question.prompt,
                            question.continuation,
                            alpha=strength,
                            experts=question.experts,
                            top=top,
                        )
                    is_given = question.continuation is not None
                    runs.append(Run("given, " * is_given + _run_name(trace), trace))
                runs += [
                    _forked(model, question, runs[0].trace, position, token, top)
                    for position, token in forks
                ]
                runs.append(Run("base", next(made), is_base=True))
                yield Report(tuple(runs))


def _steered(model: ProxyTuned, question: _Question) -> list[float | None]:
    """Return the strengths other than 0, which is the base; 0 too if there is no other or a text is given."""
    steered = [
        alpha
        for alpha in question.alphas
        if question.continuation is not None
        or any(model.recipe.strengths(Steering(alpha, question.experts)).values())
    ]
    return steered or list(question.alphas[:1])


def _requests(model: ProxyTuned, question: _Question, top: int) -> list[Request]:
    requests = []
    if question.continuation is None:
        requests = [
            Request(question.prompt, question.sampling, alpha, question.experts, True, top)
            for alpha in _steered(model, question)
        ]
    names = model.recipe.named(question.experts)
    base = Request(question.prompt, question.sampling, None, dict.fromkeys(names, 0.0), True, top)
    return [*requests, base]


def _forked(
    model: ProxyTuned, question: _Question, trace: Trace, position: int, token: str, top: int
) -> Run:
    """Return the run that goes on from another token."""
    from proxytune.explain.report import Run
    from proxytune.text.prompts import continuation_ids

    if position >= trace.num_new_tokens:
        raise InvalidRequest(
            f"--what-if names position {position}, and the text has {trace.num_new_tokens} tokens, from 0 to "
            f"{trace.num_new_tokens - 1}.\nhint: name one of them, or raise --max-new-tokens"
        )
    if re.fullmatch(r"#\d+", token):
        other = [int(token[1:])]
        model.ensemble.vocabulary.check_token_ids(other)
    else:
        other = continuation_ids(token, model.tokenizer)
    given = [*trace.token_ids[:position], *other]
    num_left = question.sampling.max_new_tokens - len(given)
    is_end = other[-1] in model.ensemble.eos_token_ids and not question.sampling.ignore_eos
    further = None
    if num_left > 0 and not is_end:
        further = replace(question.sampling, max_new_tokens=num_left)
    forked = model.explain(question.prompt, given, further, experts=dict(trace.alphas), top=top)
    return Run(f"what if {position} = {token!r}", forked, is_forked=True)


class TraceWriter:
    """The file that traces go to, if there is one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> TraceWriter:
        if self._path is not None:
            try:
                self._file = self._path.open("w", encoding="utf-8")
            except OSError as error:
                raise unwritable(self._path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, traces: Iterable[Trace]) -> None:
        """Write traces, one a line, and flush them."""
        if self._file is None or self._path is None:
            return
        try:
            for trace in traces:
                self._file.write(trace.to_json() + "\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self._path, error) from error
