"""`proxytune rank-experts`: which of a recipe's experts will help with a kind of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import (
    ContextSizeOption,
    DeviceOption,
    DtypeOption,
    GpuLayersOption,
    JsonOption,
    LlamaCppOption,
    RecipeArgument,
    ThreadsOption,
    command,
    json_line,
    load_models,
    number_of,
    read_recipe,
    stdout,
)
from proxytune.commands.progress import progress
from proxytune.commands.sweep import (
    DataOption,
    LimitOption,
    TextFileOption,
    WindowOption,
    between,
    passages_from,
    window_of,
)
from proxytune.errors import InvalidRequest

if TYPE_CHECKING:
    from proxytune.rank import Ranking


@command("proxytune rank-experts my-recipe --text-file sample.txt", name="rank-experts")
def rank_experts(
    recipe: RecipeArgument,
    text_file: TextFileOption = None,
    data: DataOption = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Rank this expert; repeat for several  [default: all of the recipe's]",
            show_default=False,
        ),
    ] = None,
    alphas: Annotated[
        str, typer.Option(metavar="A,B,...", help="Strengths to try for each expert")
    ] = "0.25,0.5,0.75,1,1.25,1.5",
    window: WindowOption = None,
    limit: LimitOption = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the bootstrap")] = 0,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    llama_cpp: LlamaCppOption = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = None,
    context_size: ContextSizeOption = None,
) -> None:
    """Rank experts by how much each alone would help with text of a kind, without generating.

    Each model reads a sample of that text once; a few thousand tokens do. Each expert is judged at strengths
    picked on the other half of the sample.
    """
    if (text_file is None) == (data is None):
        raise InvalidRequest(
            "--text-file is a plain text and --data are rows, and one of them is needed.\n"
            "hint: proxytune rank-experts DIR --text-file sample.txt"
        )
    tried = tuple(dict.fromkeys(number_of(part, "--alphas") for part in alphas.split(",")))
    found = read_recipe(
        recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
    )
    names = tuple(expert or (e.name for e in found.experts))
    chosen = tuple(found.choose(names, None))
    model = load_models(found, chosen, device=device, dtype=dtype)
    passages = passages_from(model, text_file, data, window_of(model, window))[:limit]
    from proxytune.rank import rank_experts as ranked

    with progress("reading", "tokens") as advance:
        ranking = ranked(
            model.steered_by(chosen), passages, alphas=tried, seed=seed, on_progress=advance
        )
    if as_json:
        typer.echo(json_line(ranking.to_dict()))
    else:
        _show(ranking)


def _show(ranking: Ranking) -> None:
    from rich.table import Table

    from proxytune.rank import MEASURED_CORRELATION

    table = Table(box=None, pad_edge=False)
    table.add_column("expert")
    headings = ("alpha", "nats saved", "95 % interval", "perplexity", "first in", "gain", "slope")
    for heading in headings:
        table.add_column(heading, justify="right")
    for each in ranking.candidates:
        table.add_row(
            each.name,
            f"{each.alpha:g}",
            f"{each.benefit:+.4f}",
            between(each.interval, "{:+.4f}"),
            f"{each.change:+.1%}",
            f"{each.chance_best:.0%}",
            f"{each.gain:+.3f}",
            f"{each.slope:+.3f}",
        )
    stdout().print(table)
    typer.echo(
        f"{ranking.num_tokens:,} tokens in {ranking.num_passages:,} windows or rows, {ranking.base_nats:.3f} "
        "nats per token under the base; nats saved per token, at strengths picked on the other half",
        err=True,
    )
    typer.echo(
        f"how far to trust it: on the smol family such rankings had a rank correlation of "
        f"{MEASURED_CORRELATION:.2f} with the benefit on other text of the kind",
        err=True,
    )
    for note in ranking.notes:
        typer.echo(f"note: {note}", err=True)
