"""`proxytune analyze`: what steering does over many texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import (
    GREEDY,
    ContextSizeOption,
    DataDirOption,
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
    command,
    json_line,
    load_models,
    read_recipe,
    stdout,
    steering_of,
)
from proxytune.commands.explain import (
    TraceFileOption,
    TraceWriter,
    shown_token,
    strengths_of,
)
from proxytune.commands.progress import bars, status
from proxytune.errors import InvalidRequest
from proxytune.request import Request, SamplingParams

if TYPE_CHECKING:
    from proxytune.analyze import Analysis, Group
    from proxytune.model import ProxyTuned
    from proxytune.trace import Trace

ANALYZED_TOKENS = 128
NUM_TOP = 2
"""Of each model's likeliest tokens: what changed needs the first, and a reader the second."""
NUM_SHOWN = 12
"""Token types in the table; the JSON has all."""


@command("proxytune analyze --traces traces.jsonl --picture analysis.png")
def analyze(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe's directory, package:NAME/PATH, or its id on the Hugging Face Hub; none is needed "
            "with --traces",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Generate from these prompts: JSON lines, as in proxytune generate",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Generate from this benchmark's prompts, as proxytune eval does; gsm8k has equations",
            show_default=False,
        ),
    ] = None,
    data_dir: DataDirOption = None,
    traces: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Analyze the saved traces in this file, also as .gz; repeat for more",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Strengths of steering; each makes a text from each prompt  [default: the recipe's]",
            show_default=False,
        ),
    ] = None,
    expert: ExpertOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Only the first N prompts  [default: all]", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens to generate")
    ] = ANALYZED_TOKENS,
    temperature: TemperatureOption = GREEDY.temperature,
    top_k: TopKOption = GREEDY.top_k,
    top_p: TopPOption = GREEDY.top_p,
    min_p: MinPOption = GREEDY.min_p,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Each line gets a seed from it and the line's number  [default: 0]",
            show_default=False,
        ),
    ] = None,
    stop: StopOption = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Texts generated together")] = 8,
    min_count: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Leave out token types that occur less often  [default: 100, or 1 in 2,000 tokens if that "
            "is less]",
            show_default=False,
        ),
    ] = None,
    trace_file: TraceFileOption = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw all of it there: .png, .svg or .pdf", show_default=False
        ),
    ] = None,
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
    """Sum up what steering did over many texts.

    Shown are the share of changed first choices against the position, the token types whose probability
    moved most, the two sides of equations, and with several strengths how much each changes. Traces are
    read one at a time, so that a file may be larger than memory.
    """
    from proxytune.analyze import analyze as analyze_traces
    from proxytune.batch_file import read_lines

    _refuse_contradictions(
        {
            "RECIPE": recipe is not None,
            "--prompts": prompts is not None,
            "--task": task is not None,
            "--data-dir": data_dir is not None,
            "--traces": bool(traces),
            "--alpha": alpha is not None,
            "--expert": bool(expert),
            "--limit": limit is not None,
            "--trace-file": trace_file is not None,
        }
    )
    for name, value, least in (("--limit", limit, 1), ("--min-count", min_count, 1)):
        if value is not None and value < least:
            raise InvalidRequest(f"{name} is {value}, and must be at least {least}")
    if batch_size < 1:
        raise InvalidRequest(f"--batch-size is {batch_size}, and must be at least 1")
    if traces:
        analysis = analyze_traces(_counted(_saved(traces)), min_count=min_count)
    else:
        assert recipe is not None
        sampling = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=tuple(stop or ()),
        )
        strengths = strengths_of(alpha)
        found = read_recipe(
            recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
        )
        experts = steering_of(found, expert, strengths[0])[1]
        if isinstance(experts, Mapping) and len(strengths) > 1:
            raise InvalidRequest(
                "--alpha has several strengths and an expert has one of its own, so it is unclear which "
                "hold.\nhint: leave one of them out"
            )
        if task is not None:
            asked = _task_requests(task, data_dir, sampling, experts)
        else:
            assert prompts is not None
            lines = read_lines(prompts, recipe=found, sampling=sampling, experts=experts)
            asked = [line.request for line in lines]
        requests = [request for own in asked[:limit] for request in _at_strengths(own, strengths)]
        used: set[str] = set()
        for request in requests:
            used |= found.choose(request.experts, request.alpha).keys()
        model = load_models(
            found, used, device=device, dtype=dtype, max_calls=max_calls, max_cost=max_cost
        )
        made = _generated(model, requests, batch_size, trace_file)
        analysis = analyze_traces(made, min_count=min_count)
    if picture is not None:
        from proxytune.pictures import draw_analysis

        draw_analysis(analysis, picture)
        typer.echo(f"{picture} written", err=True)
    if as_json:
        typer.echo(json_line(analysis.to_dict()))
    else:
        _show(analysis)


def _refuse_contradictions(given: Mapping[str, bool]) -> None:
    if given["--traces"]:
        for name in (
            "RECIPE",
            "--prompts",
            "--task",
            "--data-dir",
            "--alpha",
            "--expert",
            "--limit",
            "--trace-file",
        ):
            if given[name]:
                raise InvalidRequest(
                    f"--traces reads what is saved and runs no model, and {name} is given beside it.\n"
                    "hint: leave one of them out"
                )
        return
    if not given["RECIPE"] or not (given["--prompts"] or given["--task"]):
        raise InvalidRequest(
            "there is nothing to analyze.\n"
            "hint: give a recipe and --prompts prompts.jsonl or --task gsm8k, or --traces traces.jsonl"
        )
    if given["--prompts"] and given["--task"]:
        raise InvalidRequest(
            "--prompts and --task both say what to generate from.\nhint: leave one of them out"
        )
    if given["--data-dir"] and not given["--task"]:
        raise InvalidRequest(
            "--data-dir belongs to --task, which is not given.\nhint: leave it out"
        )


def _task_requests(
    name: str,
    data_dir: Path | None,
    sampling: SamplingParams,
    experts: Experts,
) -> list[Request]:
    """Return a request per item of a benchmark; its stop strings hold beside those that are given."""
    from proxytune.batch_file import line_seed
    from proxytune.tasks.registry import find_task

    task = find_task(name)
    sampling = replace(sampling, stop=(*sampling.stop, *task.sampling.stop))
    requests = []
    for number, item in enumerate(task.items(data_dir), 1):
        own = sampling
        if not sampling.is_greedy:
            own = replace(sampling, seed=line_seed(sampling.seed, number))
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
    """Yield traces as they are made, with a progress bar on stderr."""
    with (
        TraceWriter(trace_file) as writer,
        bars("{task.completed:,.0f} of {task.total:,.0f}") as shown,
    ):
        task = shown.add_task("generating", total=len(requests))
        rest = iter(requests)
        while block := list(islice(rest, batch_size)):
            made = model.generate_batch(block, batch_size=batch_size)
            writer.write(made)
            shown.advance(task, len(block))
            yield from made


def _saved(paths: Sequence[Path]) -> Iterator[Trace]:
    from proxytune.trace import read_traces

    for path in paths:
        yield from read_traces(path)


def _counted(traces: Iterator[Trace]) -> Iterator[Trace]:
    """Yield traces, with a sign of life on stderr."""
    num_tokens = 0
    with status("reading traces") as say:
        for number, trace in enumerate(traces, 1):
            num_tokens += trace.num_new_tokens
            if number % 50 == 0:
                say(f"reading traces: {number:,}, {num_tokens:,} tokens")
            yield trace


# The tables -----------------------------------------------------------------------------------------


def _show(analysis: Analysis) -> None:
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    console.print(Text("all tokens", style="italic"))
    table = Table(box=None, pad_edge=False)
    table.add_column("strengths")
    for heading in ("texts", "tokens", "changed", "mean Delta", "mean shift", "mean KL"):
        table.add_column(heading, justify="right")
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
    console.print(table)
    _show_positions(analysis)
    for group in analysis.groups:
        if any(group.alphas.values()) or len(analysis.groups) == 1:
            _show_types(group)
    _show_equations(analysis)
    typer.echo(
        "changed: base and steered model put different tokens first; Delta: steered minus base probability "
        "of the token",
        err=True,
    )


def _show_positions(analysis: Analysis) -> None:
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    console.print(Text("\nchanged, by position in the text", style="italic"))
    table = Table(box=None, pad_edge=False)
    table.add_column("position")
    for group in analysis.groups:
        table.add_column(group.name, justify="right")
    bins = [group.position_bins() for group in analysis.groups]
    longest = max(bins, key=len)
    for row, place in enumerate(longest):
        name = str(place.first) if place.first == place.last else f"{place.first} to {place.last}"
        table.add_row(
            name, *(_share(own[row].share_changed) if row < len(own) else "" for own in bins)
        )
    console.print(table)


def _show_types(group: Group) -> None:
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    least = group.min_count
    title = f"\ntoken types that moved most, {group.name} (at least {least:,} times)"
    if not group.types:
        console.print(Text(f"\nno token type occurs {least:,} times; --min-count lowers that"))
        return
    console.print(Text(title, style="italic"))
    table = Table(box=None, pad_edge=False)
    table.add_column("token")
    for heading in ("times", "changed", "mean Delta", "mean shift"):
        table.add_column(heading, justify="right")
    table.add_column("commonest context")
    for kind in group.types[:NUM_SHOWN]:
        table.add_row(
            Text(shown_token(kind.label)),
            f"{kind.tally.num_tokens:,}",
            _share(kind.tally.share_changed),
            _signed(kind.tally.mean_prob_change, 3),
            _signed(kind.tally.mean_shift, 2),
            Text(f"{shown_token(kind.context)} ({kind.num_context:,}x)"),
        )
    console.print(table)


def _show_equations(analysis: Analysis) -> None:
    from rich.table import Table
    from rich.text import Text

    from proxytune.analyze import welch

    groups = [group for group in analysis.groups if group.num_equations]
    if not groups:
        return
    console = stdout()
    console.print(Text("\nequations: mean Delta of their tokens", style="italic"))
    table = Table(box=None, pad_edge=False)
    table.add_column("strengths")
    for heading in ("equations", "left-hand", "right-hand", "Welch's t", "degrees", "p"):
        table.add_column(heading, justify="right")
    for group in groups:
        test = welch(group.left, group.right)
        table.add_row(
            group.name,
            f"{group.num_equations:,}",
            f"{group.left.mean:+.3f} (n={group.left.num_tokens:,})",
            f"{group.right.mean:+.3f} (n={group.right.num_tokens:,})",
            "" if test is None else f"{test.t:.2f}",
            "" if test is None else f"{test.degrees:,.0f}",
            "" if test is None else _p_text(test.log10_p),
        )
    console.print(table)


def _p_text(log10_p: float) -> str:
    return f"{10**log10_p:.2g}" if log10_p > -300 else f"1e{log10_p:.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _signed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:+.{digits}f}"
