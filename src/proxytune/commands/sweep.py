"""`proxytune sweep`: which strength is best for a text or for rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import (
    SCORE_WINDOW,
    CombineOption,
    ContextSizeOption,
    DataDirOption,
    DeviceOption,
    DtypeOption,
    GpuLayersOption,
    JsonOption,
    LlamaCppOption,
    PolicyOption,
    RecipeArgument,
    ThreadsOption,
    command,
    file_text,
    json_line,
    load_models,
    number_of,
    read_recipe,
    stdout,
    with_policy,
)
from proxytune.commands.progress import progress
from proxytune.errors import InvalidRequest
from proxytune.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxytune.model import ProxyTuned
    from proxytune.score import Interval, Passage
    from proxytune.sweep import Point, Row, SweepReport

METRIC_NAMES = "perplexity, exact_match, contains, last_number, chrf"

TextFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A plain text: UTF-8, also as .gz; cut into windows",
        show_default=False,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Rows, as `proxytune tune` takes them: a file, a directory or a Hub id; texts, prompts with "
        "completions, conversations",
        show_default=False,
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help=f"Tokens per window of a text  [default: {SCORE_WINDOW}, or the smallest context]",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Take only so many windows or rows, the first of them  [default: all]",
        show_default=False,
    ),
]


@command(
    "proxytune sweep my-recipe --text-file heldout.txt --alphas 0.25,0.5,0.75,1 --picture sweep.png"
)
def sweep(
    recipe: RecipeArgument,
    text_file: TextFileOption = None,
    data: DataOption = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A benchmark of `proxytune eval`, in its own settings: gsm8k, triviaqa, truthfulqa_mc",
            show_default=False,
        ),
    ] = None,
    data_dir: DataDirOption = None,
    test_data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The test part, of the same kind  [default: a share of the data]",
            show_default=False,
        ),
    ] = None,
    test_share: Annotated[
        float,
        typer.Option(
            metavar="FLOAT",
            help="Share of the data that is the test part: a text's end, rows drawn",
        ),
    ] = 0.5,
    metric: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"{METRIC_NAMES}; all but the first generate and compare with the rows' completions",
        ),
    ] = "perplexity",
    alphas: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]A,B,...",
            help="Strengths to try; with a name, of that expert: repeat it to try every combination  "
            "[default: 0.25,0.5,0.75,1,1.25,1.5]",
            show_default=False,
        ),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Steer with this expert; repeat for several, all of one strength  [default: those "
            "named in --alphas, or the recipe's]",
            show_default=False,
        ),
    ] = None,
    policy: PolicyOption = None,
    combine: CombineOption = None,
    window: WindowOption = None,
    limit: LimitOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most tokens of a generated text  [default: 64, or the benchmark's]",
            show_default=False,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End a generated text before this string; may be repeated",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Prompts that are written to together")
    ] = 8,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the split and the bootstrap")] = 0,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the curve there: .png, .svg or .pdf; needs proxytune[tune]",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    llama_cpp: LlamaCppOption = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = None,
    context_size: ContextSizeOption = None,
) -> None:
    """Try strengths against a metric: pick the best on one part of the data, and tell its worth on another.

    For perplexity each model reads the data once, for all strengths. Generated texts are greedy, and what
    several strengths write alike is written once.
    """
    from proxytune import sweep as sweeping

    if metric not in sweeping.METRICS:
        raise InvalidRequest(
            f"--metric is {metric!r}, and must be one of {', '.join(sweeping.METRICS)}.\n"
            "hint: perplexity needs no generation"
        )
    if sum(source is not None for source in (text_file, data, task)) != 1:
        raise InvalidRequest(
            "--text-file is a plain text, --data are rows, --task is a benchmark, and one of them is "
            "needed.\n"
            "hint: proxytune sweep DIR --text-file heldout.txt"
        )
    benchmark = None
    if task is not None:
        from proxytune.tasks.registry import find_task

        benchmark = find_task(task)
        if test_data is not None or metric != "perplexity":
            raise InvalidRequest(
                "--task brings its own items and metric.\nhint: leave --metric and --test-data out"
            )
    elif data_dir is not None:
        raise InvalidRequest("--data-dir is for --task.\nhint: leave it out")
    if text_file is not None and metric != "perplexity":
        raise InvalidRequest(
            f"--metric {metric} compares generated texts with given answers, and a plain text has none.\n"
            "hint: give rows of prompts and completions with --data"
        )
    if not 0 < test_share < 1:
        raise InvalidRequest(f"--test-share is {test_share}, and must lie between 0 and 1")
    if limit is not None and limit < 2:
        raise InvalidRequest(
            f"--limit is {limit}, and both parts need a window or row.\nhint: give 2 or more"
        )
    found = read_recipe(
        recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
    )
    found = with_policy(found, policy, combine)
    shared, own = _strengths(alphas)
    if own and expert:
        raise InvalidRequest(
            "--alphas names experts and --expert is given too.\nhint: leave --expert out"
        )
    chosen = tuple(found.choose(tuple(own or expert or ()) or None, None))
    usual_settings = SamplingParams(max_new_tokens=64) if benchmark is None else benchmark.sampling
    sampling = replace(
        usual_settings,
        max_new_tokens=(
            usual_settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        ),
        stop=tuple(stop or usual_settings.stop),
    )
    grid = sweeping.Grid.of(
        [e.name for e in found.experts if e.name in chosen], own if own else shared
    )
    model = load_models(found, chosen, device=device, dtype=dtype)
    ensemble = model.steered_by(chosen)
    strengths = found.choose(chosen, None)
    usual = [strengths[name] for name in grid.names]
    if metric == "perplexity" and benchmark is None:
        window = window_of(model, window)
        passages = passages_from(model, text_file, data, window)[:limit]
        if test_data is None:
            valid, test = sweeping.split(
                passages, test_share, seed=seed, in_order=text_file is not None
            )
        else:
            valid, test = passages, _test_passages(model, text_file, test_data, window)
        with progress("sweeping", "tokens") as advance:
            report = sweeping.sweep_likelihood(
                ensemble, grid, valid=valid, test=test, own=usual, seed=seed, on_progress=advance
            )
    else:
        judged = sweeping.METRICS[metric]
        if benchmark is None:
            rows = _rows(model, data or "")[:limit]
        else:
            rows, judged = sweeping.task_rows(model, benchmark, data_dir, limit=limit)
        valid_rows, test_rows = (
            sweeping.split(rows, test_share, seed=seed, in_order=False)
            if test_data is None
            else (rows, _rows(model, test_data))
        )
        with progress("sweeping", "prompts") as advance:
            report = sweeping.sweep_generations(
                ensemble,
                grid,
                judged,
                valid=valid_rows,
                test=test_rows,
                own=usual,
                sampling=sampling,
                batch_size=batch_size,
                seed=seed,
                on_progress=advance,
            )
    if picture is not None:
        sweeping.draw(report, grid, picture)
        typer.echo(f"drew {picture}", err=True)
    if as_json:
        typer.echo(json_line(report.to_dict()))
    else:
        _show(report)


def _strengths(given: Sequence[str] | None) -> tuple[list[float], dict[str, list[float]]]:
    """Return strengths for all experts, or those of each that is named."""
    shared: list[float] = []
    own: dict[str, list[float]] = {}
    for item in given or ["0.25,0.5,0.75,1,1.25,1.5"]:
        name, has_name, values = item.rpartition("=")
        numbers = [number_of(part, "--alphas") for part in values.split(",")]
        (own.setdefault(name, []) if has_name else shared).extend(numbers)
    if shared and own:
        raise InvalidRequest(
            "--alphas is given with and without an expert's name, so it is unclear which holds.\n"
            "hint: name an expert in each, or in none"
        )
    unique = {name: list(dict.fromkeys(numbers)) for name, numbers in own.items()}
    return list(dict.fromkeys(shared)), unique


def window_of(model: ProxyTuned, window: int | None) -> int:
    """Return the window asked for, or the usual one as far as all contexts hold it."""
    contexts = [m.backend.capabilities.max_context for m in model.ensemble.members]
    return window or min([SCORE_WINDOW, *(c for c in contexts if c is not None)])


def passages_from(
    model: ProxyTuned, text_file: Path | None, data: str | None, window: int
) -> list[Passage]:
    """Return the passages of a text file or of rows."""
    from proxytune.sweep import passages_of
    from proxytune.tune.data import read_rows

    if text_file is not None:
        return model.text_passages(file_text(text_file), window=window)
    assert data is not None
    return passages_of(model, read_rows(data), window=window)


def _test_passages(
    model: ProxyTuned, text_file: Path | None, test_data: str, window: int
) -> list[Passage]:
    if text_file is not None:
        return passages_from(model, Path(test_data), None, window)
    return passages_from(model, None, test_data, window)


def _rows(model: ProxyTuned, source: str) -> list[Row]:
    from proxytune.sweep import rows_of
    from proxytune.tune.data import read_rows

    return rows_of(model, read_rows(source))


def _show(report: SweepReport) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    names = list(report.points[0].alphas)
    table.add_column("")
    for name in names:
        table.add_column("alpha" if len(names) == 1 else name, justify="right")
    for heading in (report.metric, "95 % interval", "against base"):
        table.add_column(heading, justify="right")

    def add(label: str, point: Point) -> None:
        strengths = [f"{alpha:g}" for alpha in point.alphas.values()]
        is_ratio = report.metric == "perplexity"
        is_base = not any(point.alphas.values())
        table.add_row(
            label,
            *strengths,
            f"{point.value:.2f}" if is_ratio else f"{point.value:.3f}",
            between(point.interval, "{:.2f}" if is_ratio else "{:.3f}"),
            "" if is_base else change_text(point, is_ratio),
        )

    for number, point in enumerate(report.points):
        add("validation, picked" if number == report.picked else "validation", point)
    table.add_section()
    for name, point in report.test.items():
        add(f"test, {name}", point)
    stdout().print(table)
    told = report.test["picked"]
    verdict = ", ".join(f"{name} at alpha {alpha:g}" for name, alpha in told.alphas.items())
    typer.echo(
        f"picked {verdict} on {report.num_valid:,} validation windows or rows; told on {report.num_test:,}; "
        "intervals by bootstrap over them",
        err=True,
    )
    if report.num_read is not None:
        saved = 1 - report.num_read / max(1, report.num_tokens)
        typer.echo(
            f"{report.num_tokens:,} tokens of all texts, {report.num_read:,} read: {saved:.0%} saved by "
            "what they have in common",
            err=True,
        )
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)


def between(interval: Interval | None, form: str) -> str:
    """Return an interval as text."""
    if interval is None:
        return ""
    return f"{form.format(interval.low)} to {form.format(interval.high)}"


def change_text(point: Point, is_ratio: bool) -> str:
    """Return a change against the base, with its interval."""
    form = "{:+.1%}" if is_ratio else "{:+.3f}"
    text = form.format(point.change)
    interval = between(point.change_interval, form)
    return f"{text} ({interval})" if interval else text
