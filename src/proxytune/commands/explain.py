"""`proxytune explain`: what steering did to each token of a text."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, NamedTuple

import typer

from proxytune.commands.app import (
    GREEDY,
    ContextSizeOption,
    DeviceOption,
    DtypeOption,
    ExpertOption,
    Experts,
    GpuLayersOption,
    JsonOption,
    LlamaCppOption,
    MaxCallsOption,
    MaxCostOption,
    MinPOption,
    StopOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    argument_text,
    command,
    json_line,
    load_models,
    number_of,
    read_recipe,
    stdin_text,
    stdout,
    steering_of,
    strengths_text,
)
from proxytune.commands.progress import status
from proxytune.errors import InvalidRequest, OutputFileError
from proxytune.request import Prompt, Request, SamplingParams

if TYPE_CHECKING:
    from rich.text import Text

    from proxytune.model import ProxyTuned
    from proxytune.recipe import Recipe
    from proxytune.report import Move, Report, Run
    from proxytune.trace import Trace

EXPLAINED_TOKENS = 64
"""New tokens unless said: what fits a screen."""
TABLE_ROWS = 10
BATCH_SIZE = 8

INK = "#1d1b18"
STYLES = {
    -3: f"{INK} on #79b2e2",
    -2: f"{INK} on #b0d2f0",
    -1: f"{INK} on #dfecf8",
    1: f"{INK} on #fdebd0",
    2: f"{INK} on #fbcb8d",
    3: f"{INK} on #f0a24a",
}
"""By `Move.level`: the page's colours; dark letters on them can be read on any terminal."""
CHANGED = "\u2039{}\u203a"
"""Angle brackets, which texts seldom have: colour does not carry the meaning alone."""
INVISIBLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\xa0\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)
"""What could move a terminal's cursor, or turn the letters around it."""

AlphasOption = Annotated[
    str | None,
    typer.Option(
        "--alpha",
        metavar="A,B,...",
        help="Strength of steering: 0 is the base alone, 1 the published method; several show where texts "
        "part, and the first is explained  [default: the recipe's]",
        show_default=False,
    ),
]
TopOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="How many of each model's likeliest tokens to keep; as many as the vocabulary has, up to 1,000",
    ),
]
TraceFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the whole traces there, as JSON lines that --trace and proxytune analyze read",
        show_default=False,
    ),
]


class _Question(NamedTuple):
    """What is asked of one prompt."""

    prompt: Prompt
    continuation: str | None
    sampling: SamplingParams
    alphas: tuple[float | None, ...]
    experts: Experts


@command('proxytune explain my-recipe "Once upon a time" --html report.html')
def explain(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe's directory, package:NAME/PATH, or its id on the Hugging Face Hub; none is needed "
            "with --trace",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue; - reads it from stdin, without its last line break",
            show_default=False,
        ),
    ] = None,
    continuation: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Explain this text after the prompt, instead of generating one",
            show_default=False,
        ),
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts as JSON lines, as in proxytune generate; a line may have a continuation",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Explain the saved traces in this file, instead of running models",
            show_default=False,
        ),
    ] = None,
    alpha: AlphasOption = None,
    expert: ExpertOption = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POSITION=TOKEN",
            help="Go on from another token at this position, counted from 0: a text, or #ID; repeat for more",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens to generate")
    ] = EXPLAINED_TOKENS,
    temperature: TemperatureOption = GREEDY.temperature,
    top_k: TopKOption = GREEDY.top_k,
    top_p: TopPOption = GREEDY.top_p,
    min_p: MinPOption = GREEDY.min_p,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Makes drawn text repeatable; all continuations share it  [default: another each time]",
            show_default=False,
        ),
    ] = None,
    stop: StopOption = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence tokens")
    ] = False,
    top: TopOption = 5,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a page that needs no network: the text coloured, each token's distributions, curves",
            show_default=False,
        ),
    ] = None,
    trace_file: TraceFileOption = None,
    rows: Annotated[
        int,
        typer.Option(metavar="N", help="Tokens in the table of those moved most; 0 for no table"),
    ] = TABLE_ROWS,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    llama_cpp: LlamaCppOption = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = None,
    context_size: ContextSizeOption = None,
    max_calls: MaxCallsOption = None,
    max_cost: MaxCostOption = None,
) -> None:
    """Show what steering did to each token.

    Tokens are coloured by how much likelier (orange) or less likely (blue) steering made them; those where
    base and steered model put different tokens first stand in angle brackets. Beside the text stands the
    base's own continuation. docs/guides/read-a-steering-report.md says how to read it.
    """
    _refuse_contradictions(
        {
            "PROMPT": prompt is not None,
            "--input-file": input_file is not None,
            "--trace": trace is not None,
            "--continuation": continuation is not None,
            "--what-if": bool(what_if),
            "--alpha": alpha is not None,
            "--expert": bool(expert),
            "RECIPE": recipe is not None,
        }
    )
    if rows < 0:
        raise InvalidRequest(f"--rows is {rows}, and must be at least 0")
    reports: Iterable[Report]
    if trace is not None:
        reports = _saved(trace)
        name = trace.name
    else:
        assert recipe is not None
        sampling = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=secrets.randbits(31) if seed is None and temperature > 0 else seed,
            stop=tuple(stop or ()),
            ignore_eos=ignore_eos,
        )
        forks = [_fork(text) for text in what_if or ()]
        strengths = strengths_of(alpha)
        Request("any", sampling, explain_top=top)  # refused before anything is read
        text = None
        if prompt is not None:
            text = stdin_text() if prompt == "-" else argument_text(prompt)
            Request(text, sampling)
        found = read_recipe(
            recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
        )
        name = recipe
        experts = steering_of(found, expert, strengths[0])[1]
        if isinstance(experts, Mapping):
            if len(strengths) > 1:
                raise InvalidRequest(
                    "--alpha has several strengths and an expert has one of its own, so it is unclear which "
                    "hold.\nhint: leave one of them out"
                )
            strengths = (None,)
        if text is not None:
            questions = [_Question(text, continuation, sampling, strengths, experts)]
        else:
            assert input_file is not None
            questions = _read_questions(input_file, found, sampling, strengths, experts)
        used: set[str] = set()
        for question in questions:
            for strength in question.alphas:
                used |= found.choose(question.experts, strength).keys()
        model = load_models(
            found, used, device=device, dtype=dtype, max_calls=max_calls, max_cost=max_cost
        )
        reports = _explained(model, questions, forks, top)
    with TraceWriter(trace_file) as writer:
        kept: list[Report] = []
        for number, report in enumerate(reports):
            writer.write(run.trace for run in report.runs)
            if html is not None or as_json:
                kept.append(report)
            if not as_json:
                _show(report, rows, is_first=number == 0)
    if as_json:
        typer.echo(json_line({"recipe": name, "reports": [r.to_dict() for r in kept]}))
    if html is not None:
        _write_page(html, kept, name)


# What is asked --------------------------------------------------------------------------------------


def _refuse_contradictions(given: Mapping[str, bool]) -> None:
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


def strengths_of(text: str | None) -> tuple[float | None, ...]:
    """Return the strengths of `--alpha`, each once; None for the recipe's.

    Raises:
        InvalidRequest: One is no number.
    """
    if text is None:
        return (None,)
    return tuple(dict.fromkeys(number_of(part, "--alpha") for part in text.split(",")))


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
    experts: Experts,
) -> list[_Question]:
    from proxytune.batch_file import read_lines

    questions = []
    for line in read_lines(path, recipe=recipe, sampling=sampling, experts=experts):
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
    from proxytune.report import Report, Run
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
    from proxytune.report import Report, Run

    for start in range(0, len(questions), BATCH_SIZE):
        block = questions[start : start + BATCH_SIZE]
        requests: list[Request] = []
        for question in block:
            requests += _requests(model, question, top)
        with status(f"explaining {len(block)} of {len(questions)} from {start + 1} on"):
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
        or any(model.recipe.choose(question.experts, alpha).values())
    ]
    return steered or list(question.alphas[:1])


def _requests(model: ProxyTuned, question: _Question, top: int) -> list[Request]:
    requests = []
    if question.continuation is None:
        requests = [
            Request(question.prompt, question.sampling, alpha, question.experts, True, top)
            for alpha in _steered(model, question)
        ]
    names = model.recipe.choose(question.experts, question.alphas[0])
    base = Request(question.prompt, question.sampling, None, dict.fromkeys(names, 0.0), True, top)
    return [*requests, base]


def _forked(
    model: ProxyTuned, question: _Question, trace: Trace, position: int, token: str, top: int
) -> Run:
    """Return the run that goes on from another token."""
    from proxytune.prompts import continuation_ids
    from proxytune.report import Run

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
                raise _unwritable(self._path, error) from error
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
            raise _unwritable(self._path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputFileError:
    return OutputFileError(
        f"{path} cannot be written: {error.strerror}.\n"
        "hint: give a file in a directory that is there, where you may write"
    )


def _write_page(path: Path, reports: Sequence[Report], name: str) -> None:
    from proxytune.report_page import page

    try:
        path.write_text(page(reports, recipe=name), encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error
    typer.echo(f"{path}: open it in a browser; it needs no network", err=True)


# On the terminal ------------------------------------------------------------------------------------


def _show(report: Report, num_rows: int, *, is_first: bool) -> None:
    from rich.text import Text

    from proxytune.report import moves, parting

    console = stdout()
    run = report.runs[0]
    told = moves(run.trace)
    if not is_first:
        console.print()
        console.rule(style="dim")
    title = "given text, " if run.trace.finish_reason == "given" else ""
    console.print(Text(title + strengths_text(run.trace.alphas), style="bold"))
    text = Text(safe(run.trace.prompt), style="dim")
    text.append_text(coloured(told))
    console.print(text)
    if num_rows:
        _show_moved(told, run.trace, num_rows)
    for other in report.runs[1:]:
        console.print()
        place = parting(other.trace, run.trace)
        where = "the same text" if place is None else f"parts at position {place}"
        label = "the base by itself" if other.is_base else other.name
        console.print(Text(f"{label}: {where}", style="bold"))
        shown = moves(other.trace)
        at = len(shown) if place is None else place
        body = Text(safe("".join(move.piece for move in shown[:at])), style="dim")
        body.append(safe("".join(move.piece for move in shown[at:])))
        console.print(body)
    console.print()
    console.print(Text(summary_line(told)))


def coloured(told: Sequence[Move]) -> Text:
    """Return a text with each token coloured by its shift, changed ones in angle brackets."""
    from rich.text import Text

    text = Text(end="")
    for move in told:
        piece = safe(move.piece)
        if move.is_special:
            piece += f"[{safe(move.label)}]"
        elif not piece:
            piece = "·"
        # The space before a word stays outside, as do line breaks, which a sign stands for.
        body = piece.strip(" \n")
        before, _, after = piece.partition(body) if body else ("", "", "")
        if not body:
            body = "↵" if "\n" in piece else piece
            after = piece if "\n" in piece else ""
        text.append(before)
        if move.is_changed:
            body = CHANGED.format(body)
        text.append(body, style=STYLES.get(move.level, ""))
        text.append(after)
    return text


def _show_moved(told: Sequence[Move], trace: Trace, num_rows: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from proxytune.report import label

    known = [
        move for move in told if move.prob_change is not None and move.base_logprob is not None
    ]
    most = sorted(known, key=lambda move: -abs(move.prob_change or 0.0))[:num_rows]
    if not most:
        return
    names = list(trace.alphas) if len(trace.alphas) > 1 else []
    table = Table(box=None, pad_edge=False, title="moved most", title_justify="left")
    table.add_column("position", justify="right")
    table.add_column("token")
    table.add_column("base would say")
    table.add_column("steered would say")
    for heading in ("rank in base", "base", "steered", "shift", "KL", *names):
        table.add_column(heading, justify="right")
    for move in sorted(most, key=lambda move: move.index):
        base_prob, steered_prob = probs(move)
        firsts = ["", ""]
        if move.is_changed:
            firsts = [
                "" if chosen is None else shown_token(label(trace.tokens.get(chosen), chosen))
                for chosen in (move.base_choice, move.steered_choice)
            ]
        table.add_row(
            str(move.index),
            Text(shown_token(move.label), style=STYLES.get(move.level, "")),
            *map(Text, firsts),
            "" if move.base_rank is None else str(move.base_rank),
            f"{base_prob:.1%}",
            f"{steered_prob:.1%}",
            f"{move.shift:+.2f}",
            "" if move.kl is None else f"{move.kl:.2f}",
            *(f"{move.offsets[name]:+.2f}" if name in move.offsets else "" for name in names),
        )
    console = stdout()
    console.print()
    console.print(table)


def probs(move: Move) -> tuple[float, float]:
    """Return a token's probability for the base and the steered model; both are known."""
    from math import exp

    assert move.base_logprob is not None and move.steered_logprob is not None
    return exp(move.base_logprob), exp(move.steered_logprob)


def summary_line(told: Sequence[Move]) -> str:
    """Return what steering did to a text in one line."""
    from proxytune.report import EARLY_TOKENS, summarise

    summary = summarise(told)
    tally = summary.tally
    parts = []
    if tally.share_changed is not None:
        parts.append(
            f"{tally.num_changed} of {tally.num_known} first choices changed ({tally.share_changed:.0%})"
        )
    if tally.mean_prob_change is not None and tally.mean_shift is not None:
        parts.append(
            f"on average {100 * tally.mean_prob_change:+.1f} points of probability, "
            f"{tally.mean_shift:+.2f} nats"
        )
    if tally.mean_kl is not None:
        parts.append(f"KL {tally.mean_kl:.2f} nats")
    if summary.early_share is not None and len(told) > EARLY_TOKENS:
        parts.append(
            f"{summary.early_share:.0%} of the log-odds change in the first {EARLY_TOKENS} tokens"
        )
    if len(summary.expert_shares) > 1:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.expert_shares.items())
        parts.append(f"of the offsets: {shares}")
    return " · ".join(parts) or "no tokens"


def safe(text: str) -> str:
    """Return a text without characters that a terminal obeys or that turn others around."""
    return INVISIBLE.sub(lambda found: "\t" if found[0] == "\t" else f"⟨{ord(found[0]):02X}⟩", text)


def shown_token(text: str) -> str:
    """Return a token as it stands in a table: spaces and line breaks can be seen."""
    return safe(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")) or "(nothing)"
