"""`proxytune score`: perplexities of a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import (
    SCORE_WINDOW,
    CombineOption,
    ContextSizeOption,
    DeviceOption,
    DtypeOption,
    GpuLayersOption,
    JsonOption,
    LlamaCppOption,
    MaxCallsOption,
    MaxCostOption,
    PolicyOption,
    RecipeArgument,
    ThreadsOption,
    command,
    file_text,
    json_line,
    load_models,
    number_of,
    read_recipe,
    stdin_text,
    stdout,
    with_policy,
)
from proxytune.commands.progress import progress

if TYPE_CHECKING:
    from proxytune.score import ScoreReport


@command("proxytune score my-recipe --text-file heldout.txt --alphas 0,0.5,1")
def score(
    recipe: RecipeArgument,
    text_file: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="The text: UTF-8, also as .gz; - reads stdin",
            show_default=False,
        ),
    ],
    alphas: Annotated[
        str, typer.Option(metavar="A,B,...", help="Strengths of the steered rows")
    ] = "0,0.5,1",
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Score this expert; repeat to add up several  [default: the recipe's]",
            show_default=False,
        ),
    ] = None,
    policy: PolicyOption = None,
    combine: CombineOption = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Tokens per window, predicted from those before in it  [default: {SCORE_WINDOW}, or the "
            "smallest context]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the bootstrap")] = 0,
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
    """Measure how well base, expert and steered base predict a text.

    Each model runs once over it, for all strengths. Every model sees the plain text.
    """
    strengths = list(dict.fromkeys(number_of(part, "--alphas") for part in alphas.split(",")))
    text = stdin_text() if text_file == "-" else file_text(Path(text_file))
    found = read_recipe(
        recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
    )
    found = with_policy(found, policy, combine)
    experts = tuple(expert) if expert else None
    model = load_models(
        found,
        found.choose(experts, None),
        device=device,
        dtype=dtype,
        max_calls=max_calls,
        max_cost=max_cost,
    )
    contexts = [m.backend.capabilities.max_context for m in model.ensemble.members]
    if window is None:
        window = min([SCORE_WINDOW, *(c for c in contexts if c is not None)])
    with progress("scoring", "tokens") as advance:
        report = model.score(
            text, strengths, experts=experts, window=window, seed=seed, on_progress=advance
        )
    if as_json:
        typer.echo(json_line(report.to_dict()))
    else:
        _show_scores(report)


def _show_scores(report: ScoreReport) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for heading in ("alpha", "nats/token", "perplexity", "95 % interval", "against base"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        interval = (
            "" if row.interval is None else f"{row.interval.low:.2f} to {row.interval.high:.2f}"
        )
        change = "" if row.name == "base" else f"{row.change:+.1%}"
        if change and row.change_interval is not None:
            change += f" ({row.change_interval.low:+.1%} to {row.change_interval.high:+.1%})"
        alpha = "" if row.alpha is None else f"{row.alpha:g}"
        table.add_row(row.name, alpha, f"{row.nats:.4f}", f"{row.perplexity:.2f}", interval, change)
    stdout().print(table)
    for own in report.mapped:
        typer.echo(
            f"{own.name} has {own.share:.0%} of the base's tokens; the base gives them {own.base:.1%} of its "
            f"probability, and {own.name} gives the base's {own.small:.1%} of its own",
            err=True,
        )
    typer.echo(
        f"{report.num_tokens:,} tokens in {report.num_windows:,} windows of up to {report.window}; "
        "perplexity against base, intervals by block bootstrap",
        err=True,
    )
