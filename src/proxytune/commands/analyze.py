"""`proxytune analyze`: what steering does over many texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command, print_result
from proxytune.commands.console import plain_table, say, stderr, stdout
from proxytune.commands.explain import TRACE_FILE, StrengthOptions
from proxytune.commands.flags import Pick, given_flags
from proxytune.commands.options import AS_JSON, PICTURE, ModelOptions, OptionalRecipe
from proxytune.commands.progress import ProgressBars
from proxytune.commands.shown import shown_token
from proxytune.commands.streams import live
from proxytune.errors import InvalidRequest
from proxytune.evaluate.plan import DATA_DIR
from proxytune.request import Experts, Request, SamplingParams, Steering
from proxytune.settings import option

if TYPE_CHECKING:
    from rich.table import Table

    from proxytune.explain.analysis import Analysis, TraceGroup
    from proxytune.model import ProxyTuned
    from proxytune.trace import Trace

NUM_TOP = 2
"""Of each model's likeliest tokens: what changed needs the first, and a reader the second."""
NUM_SHOWN = 12
"""Token types in the table; the JSON has all."""
FOR_MODELS = frozenset((
    "RECIPE", "--prompts", "--task", "--data-dir", "--alpha", "--expert", "--limit", "--trace-file",
))  # fmt: skip
"""What runs models, or is for them, and does nothing beside saved traces."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """What is analyzed, and where the analysis goes."""

    prompts: Path | None = option(
        None, "Generate from these prompts: JSON lines, as in proxytune generate"
    )
    task: str | None = option(
        None,
        "Generate from this benchmark's prompts, as proxytune eval does; gsm8k has equations",
        metavar="NAME",
    )
    data_dir: Path | None = option(None, DATA_DIR)
    traces: tuple[Path, ...] = option((), "Analyze the saved traces in this file, also as .gz")
    limit: int | None = option(None, "Use only the first N prompts", at_least=1, none_means="all")
    batch_size: int = option(8, "Number of texts that are generated together", at_least=1)
    min_count: int | None = option(
        None,
        "Leave out token types that occur less often",
        at_least=1,
        none_means="100, or 1 in 2,000 tokens if that is less",
    )
    trace_file: Path | None = option(None, TRACE_FILE)
    picture: Path | None = option(None, PICTURE)
    as_json: bool = option(False, AS_JSON)


@command("proxytune analyze --traces traces.jsonl --picture analysis.png")
def analyze(
    recipe: OptionalRecipe = None,
    *,
    options: AnalyzeOptions,
    steering: StrengthOptions,
    sampling: Annotated[
        SamplingParams,
        Pick(
            leave_out=("logprobs",),
            help={"seed": "Random seed: each line gets its own, made from this one and its number"},
            none_means={"seed": "0"},
        ),
    ],
    models: Annotated[ModelOptions, Pick(leave_out=("cuda_graphs",))],
) -> None:
    """Summarise what steering did over many texts.

    Shows the share of changed first choices by position, the token types whose probability moved most, the
    two sides of equations, and, with several strengths, how much each changes. Traces are read one at a time,
    so a file may be larger than memory.
    """
    from proxytune.explain.analysis import analyze as analyze_traces

    _refuse_contradictions(given_flags(RECIPE=recipe, options=options, steering=steering))
    if options.traces:
        from proxytune.trace import read_traces

        traces = _counted(chain.from_iterable(map(read_traces, options.traces)))
    else:
        assert recipe is not None
        traces = _asked(recipe, options, steering, sampling, models)
    analysis = analyze_traces(traces, min_count=options.min_count)
    print_result(analysis, _show, as_json=options.as_json)
    if options.picture is not None:
        from proxytune.explain.pictures import draw_analysis

        draw_analysis(analysis, options.picture)
        say(f"wrote {options.picture}")


def _asked(
    recipe: str,
    options: AnalyzeOptions,
    steering: StrengthOptions,
    sampling: SamplingParams,
    models: ModelOptions,
) -> Iterator[Trace]:
    """Yield the traces of prompts or of a benchmark's items, at each strength."""
    from proxytune.data.lines import read_lines

    found = models.read(recipe)
    strengths, experts = steering.of(found)
    if options.task is not None:
        asked = _task_requests(options.task, options.data_dir, sampling, experts)
    else:
        assert options.prompts is not None
        given = Steering(experts=experts)
        lines = read_lines(options.prompts, recipe=found, sampling=sampling, steering=given)
        asked = [line.request for line in lines]
    requests = [r for own in asked[: options.limit] for r in _at_strengths(own, strengths)]
    used = {name for request in requests for name in found.named(request.experts)}
    model = models.load(found, used)
    return _generated(model, requests, options.batch_size, options.trace_file)


def _refuse_contradictions(given: set[str]) -> None:
    if "--traces" in given:
        for name in sorted(given & FOR_MODELS):
            raise InvalidRequest(
                f"--traces reads saved traces and runs no model, so {name} cannot be given as well.\n"
                "hint: leave one of them out"
            )
        return
    if "RECIPE" not in given or not given & {"--prompts", "--task"}:
        raise InvalidRequest(
            "there is nothing to analyze.\n"
            "hint: give a recipe and --prompts prompts.jsonl or --task gsm8k, or --traces traces.jsonl"
        )
    if {"--prompts", "--task"} <= given:
        raise InvalidRequest(
            "--prompts and --task both say what to generate from.\nhint: leave one of them out"
        )
    if "--data-dir" in given and "--task" not in given:
        raise InvalidRequest(
            "--data-dir belongs to --task, which is not given.\nhint: leave it out"
        )


def _task_requests(
    name: str, data_dir: Path | None, sampling: SamplingParams, experts: Experts | None
) -> list[Request]:
    """Return a request per item of a benchmark; its stop strings hold beside those that are given."""
    from proxytune.data.lines import line_seed
    from proxytune.tasks.registry import find_task

    task = find_task(name)
    sampling = replace(sampling, stop=(*sampling.stop, *task.sampling.stop))
    requests = []
    for number, item in enumerate(task.items(data_dir), 1):
        seed = sampling.seed if sampling.is_greedy else line_seed(sampling.seed, number)
        own = replace(sampling, seed=seed)
        requests.append(Request(item.prompt, own, None, experts))
    return requests


def _at_strengths(own: Request, strengths: Sequence[float | None]) -> Iterator[Request]:
    """Yield a request at each strength, explained; a strength of its own holds alone."""
    if own.alpha is not None or isinstance(own.experts, Mapping):
        strengths = (own.alpha,)
    for strength in strengths:
        yield replace(own, alpha=strength, explain=True, explain_top=NUM_TOP)


def _generated(
    model: ProxyTuned, requests: Sequence[Request], batch_size: int, trace_file: Path | None
) -> Iterator[Trace]:
    from proxytune.trace import trace_writer

    with trace_writer(trace_file) as write, ProgressBars() as bars:
        bars.show("generating", 0, len(requests), "texts")
        for start in range(0, len(requests), batch_size):
            made = model.generate_batch(requests[start : start + batch_size], batch_size=batch_size)
            write(made)
            bars.show("generating", start + len(made), len(requests), "texts")
            yield from made


def _counted(traces: Iterator[Trace]) -> Iterator[Trace]:
    """Yield traces, with a sign of life on stderr."""
    num_tokens = 0
    with live(stderr().status("reading traces")) as status:
        for number, trace in enumerate(traces, 1):
            num_tokens += trace.num_new_tokens
            if number % 50 == 0:
                status.update(f"reading traces: {number:,}, {num_tokens:,} tokens")
            yield trace


def _show(analysis: Analysis) -> None:
    headings = ("texts", "tokens", "changed", "mean Delta", "mean shift", "mean KL")
    table = plain_table("strengths", numbers=headings)
    for group in analysis.groups:
        tally = group.tally
        table.add_row(
            group.name,
            f"{group.num_texts:,}",
            f"{tally.num_tokens:,}",
            _share(tally.share_changed),
            _signed(tally.mean_prob_change, 3),
            _signed(tally.mean_shift, 2),
            "" if tally.mean_kl is None else f"{tally.mean_kl:.3f}",
        )
    _print_table("all tokens", table)
    _show_positions(analysis)
    for group in analysis.groups:
        if any(group.alphas.values()) or len(analysis.groups) == 1:
            _show_types(group)
    _show_equations(analysis)
    say(
        "changed: base and steered model put different tokens first; Delta: steered minus base probability "
        "of the token"
    )


def _print_table(title: str, table: Table) -> None:
    console = stdout()
    console.print(title, style="italic")
    console.print(table)


def _show_positions(analysis: Analysis) -> None:
    table = plain_table("position", numbers=[group.name for group in analysis.groups])
    bins = [group.position_bins() for group in analysis.groups]
    longest = max(bins, key=len)
    for row, place in enumerate(longest):
        name = str(place.first) if place.first == place.last else f"{place.first} to {place.last}"
        table.add_row(
            name, *(_share(own[row].share_changed) if row < len(own) else "" for own in bins)
        )
    _print_table("\nchanged, by position in the text", table)


def _show_types(group: TraceGroup) -> None:
    least = f"{group.min_count:,} times"
    if not group.types:
        stdout().print(f"\nno token type occurs {least}; --min-count lowers that")
        return
    table = plain_table("token", numbers=("times", "changed", "mean Delta", "mean shift"))
    table.add_column("commonest context")
    for kind in group.types[:NUM_SHOWN]:
        table.add_row(
            shown_token(kind.label),
            f"{kind.tally.num_tokens:,}",
            _share(kind.tally.share_changed),
            _signed(kind.tally.mean_prob_change, 3),
            _signed(kind.tally.mean_shift, 2),
            f"{shown_token(kind.context)} ({kind.num_context:,}x)",
        )
    _print_table(f"\ntoken types that moved most, {group.name} (at least {least})", table)


def _show_equations(analysis: Analysis) -> None:
    from proxytune.explain.welch import welch

    groups = [group for group in analysis.groups if group.num_equations]
    if not groups:
        return
    headings = ("equations", "left-hand", "right-hand", "Welch's t", "degrees", "p")
    table = plain_table("strengths", numbers=headings)
    for group in groups:
        cells = ["", "", ""]
        if (test := welch(group.left, group.right)) is not None:
            log10_p = test.log10_p
            p_value = f"{10**log10_p:.2g}" if log10_p > -300 else f"1e{log10_p:.0f}"
            cells = [f"{test.t:.2f}", f"{test.degrees:,.0f}", p_value]
        table.add_row(
            group.name,
            f"{group.num_equations:,}",
            f"{group.left.mean:+.3f} (n={group.left.num_tokens:,})",
            f"{group.right.mean:+.3f} (n={group.right.num_tokens:,})",
            *cells,
        )
    _print_table("\nequations: mean Delta of their tokens", table)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _signed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:+.{digits}f}"
