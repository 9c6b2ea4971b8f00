"""`proxytune bench`: speed, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import command
from proxytune.commands.console import json_line, stdout
from proxytune.commands.options import (
    GREEDY,
    AlphaOption,
    ContextSizeOption,
    CudaGraphsOption,
    DeviceOption,
    DtypeOption,
    GpuLayersOption,
    JsonOption,
    LlamaCppOption,
    RecipeArgument,
    TemperatureOption,
    ThreadsOption,
    load_models,
    read_recipe,
    whole_numbers,
)
from proxytune.errors import InvalidRequest
from proxytune.request import SamplingParams

if TYPE_CHECKING:
    from proxytune.evaluate.speed import Measured


@command("proxytune bench my-recipe --batch-sizes 1,8")
def bench(
    recipe: RecipeArgument,
    alpha: AlphaOption = None,
    expert: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which expert steers  [default: the recipe's]", show_default=False
        ),
    ] = None,
    shapes: Annotated[
        str, typer.Option(metavar="IN:OUT,...", help="Prompt tokens and new tokens of a row")
    ] = "64:64",
    batch_sizes: Annotated[str, typer.Option(metavar="N,...", help="Rows at once")] = "1",
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Counted rounds; one before them warms up")
    ] = 3,
    temperature: TemperatureOption = GREEDY.temperature,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Where prompts are cut from; how often drafts are right depends on it",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare/--no-compare",
            help="Also load the models as transformers does, a second time, and measure the published "
            "procedure and the library's own generation with the base",
        ),
    ] = True,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    cuda_graphs: CudaGraphsOption = False,
    llama_cpp: LlamaCppOption = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = None,
    context_size: ContextSizeOption = None,
) -> None:
    """Measure the speed of steering against the base alone.

    Everything alternates in every round; what is shown are medians of ratios within rounds.
    """
    from proxytune.evaluate import speed
    from proxytune.machine import description

    if rounds < 1:
        raise InvalidRequest(f"--rounds is {rounds}, and must be at least 1")
    sizes = []
    for size in whole_numbers(batch_sizes, "--batch-sizes", ","):
        for shape in shapes.split(","):
            num_prompt, num_new = whole_numbers(shape, "--shapes", ":", 2)
            sizes.append(speed.Shape(num_prompt, num_new, size))
    SamplingParams(temperature=temperature)
    found = read_recipe(
        recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
    )
    found = found.with_settings(device=device, dtype=dtype, cuda_graphs=cuda_graphs or None)
    chosen = found.named(expert)
    if len(chosen) != 1:
        raise InvalidRequest(
            f"the recipe steers with {len(chosen)} experts at once, and one is measured at a time.\n"
            "hint: name it with --expert"
        )
    (name,) = chosen
    model = load_models(found, chosen, device=None, dtype=None)
    plain = speed.load_plain_models(found, name) if compare else None
    measured = [
        speed.measure(
            model,
            shape,
            expert=name,
            alpha=alpha,
            text=prompt or speed.PROMPT,
            plain_models=plain,
            temperature=temperature,
            rounds=rounds,
            say=lambda text: typer.echo(text, err=True),
        )
        for shape in sizes
    ]
    if as_json:
        answer = {
            "recipe": recipe,
            "rounds": rounds,
            "machine": description(),
            "measured": [one.to_dict() for one in measured],
        }
        typer.echo(json_line(answer))
    else:
        _show_speeds(measured, rounds)


def _show_speeds(measured: Sequence[Measured], rounds: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("speeds")
    for one in measured:
        table.add_column(str(one.shape), justify="right")
    for name in dict.fromkeys(name for one in measured for name in one.ratios):
        cells = [one.ratios.get(name) for one in measured]
        table.add_row(
            name,
            *("" if c is None else f"{c.median:.2f} ({c.low:.2f} to {c.high:.2f})" for c in cells),
        )
    rows: list[tuple[str, list[str]]] = [
        (
            "plain, tokens/s",
            [f"{_speed(one, 'plain'):.1f}" for one in measured],
        ),
        ("speculative, tokens/s", [f"{_speed(one, 'speculative'):.1f}" for one in measured]),
        (
            "drafts accepted",
            [
                "none made" if one.acceptance_rate is None else f"{one.acceptance_rate:.0%}"
                for one in measured
            ],
        ),
        ("tokens per block", [f"{one.tokens_per_step:.2f}" for one in measured]),
        ("first token, ms", [f"{1e3 * one.first_token_s.median:.0f}" for one in measured]),
        ("prompts alone, ms", [f"{1e3 * one.prefill_s.median:.0f}" for one in measured]),
        ("texts that parted", [str(one.num_parted) for one in measured]),
    ]
    for heading, cells_ in rows:
        table.add_row(heading, *cells_)
    stdout().print(table)
    typer.echo(f"medians of {rounds} rounds, in brackets the lowest and the highest", err=True)


def _speed(one: Measured, name: str) -> float:
    return one.shape.batch_size * one.shape.num_new / one.seconds[name].median
