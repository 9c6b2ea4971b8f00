"""`proxytune bench`: speed, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command
from proxytune.commands.console import json_line, plain_table, print_text, say, stdout
from proxytune.commands.flags import Pick
from proxytune.commands.options import (
    AS_JSON,
    STRENGTH,
    ModelOptions,
    RecipeArgument,
    whole_numbers,
)
from proxytune.errors import InvalidRequest
from proxytune.request import SamplingParams
from proxytune.settings import option

if TYPE_CHECKING:
    from proxytune.evaluate.speed import Speeds


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and how often."""

    alpha: float | None = option(None, STRENGTH, none_means="the recipe's")
    expert: str | None = option(
        None, "Expert that steers", metavar="NAME", none_means="the recipe's"
    )
    shapes: str = option(
        "64:64", "Number of prompt tokens and of new tokens in a row", metavar="IN:OUT,..."
    )
    batch_sizes: str = option("1", "Number of rows that are generated together", metavar="N,...")
    rounds: int = option(3, "Number of measured rounds, after one that warms up", at_least=1)
    prompt: str | None = option(
        None, "Text that prompts are cut from; how many drafts are accepted depends on it"
    )
    compare: bool = option(
        True,
        "Also load the models as transformers does, a second time, and measure the published procedure "
        "and the library's own generation with the base",
        flag="--compare/--no-compare",
    )
    as_json: bool = option(False, AS_JSON)


@command("proxytune bench my-recipe --batch-sizes 1,8")
def bench(
    recipe: RecipeArgument,
    *,
    options: BenchOptions,
    sampling: Annotated[SamplingParams, Pick(only=("temperature",))],
    models: Annotated[ModelOptions, Pick(leave_out=("max_calls", "max_cost"))],
) -> None:
    """Measure the speed of steering against the base alone.

    Everything alternates in every round; the table shows medians of ratios within rounds.
    """
    from proxytune.evaluate import speed
    from proxytune.machine import description

    sizes = []
    for size in whole_numbers(options.batch_sizes, "--batch-sizes", ","):
        for shape in options.shapes.split(","):
            num_prompt, num_new = whole_numbers(shape, "--shapes", ":", 2)
            sizes.append(speed.Shape(num_prompt, num_new, size))
    found = models.read(recipe).with_settings(
        device=models.device, dtype=models.dtype, cuda_graphs=models.cuda_graphs or None
    )
    chosen = found.named(options.expert)
    if len(chosen) != 1:
        raise InvalidRequest(
            f"the recipe steers with {len(chosen)} experts at once, and one is measured at a time.\n"
            "hint: name it with --expert"
        )
    (name,) = chosen
    # Where its models run is in the recipe by now; the rights are not.
    own = replace(models, device=None, dtype=None, cuda_graphs=False)
    model = own.load(found, chosen)
    plain = speed.load_plain_models(found, name, models.grants()) if options.compare else None
    measured = [
        speed.measure(
            model,
            shape,
            expert=name,
            alpha=options.alpha,
            text=options.prompt or speed.PROMPT,
            plain_models=plain,
            temperature=sampling.temperature,
            rounds=options.rounds,
            say=say,
        )
        for shape in sizes
    ]
    if options.as_json:
        answer = {
            "recipe": recipe,
            "rounds": options.rounds,
            "machine": description(),
            "measured": [one.to_dict() for one in measured],
        }
        print_text(json_line(answer))
    else:
        _show_speeds(measured, options.rounds)


def _show_speeds(measured: Sequence[Speeds], rounds: int) -> None:
    table = plain_table("speeds", numbers=[str(one.shape) for one in measured])
    for name in dict.fromkeys(name for one in measured for name in one.ratios):
        cells = [one.ratios.get(name) for one in measured]
        table.add_row(
            name,
            *("" if c is None else f"{c.median:.2f} ({c.low:.2f} to {c.high:.2f})" for c in cells),
        )
    rates = [one.acceptance_rate for one in measured]
    rows = {
        "plain, tokens/s": [f"{_speed(one, 'plain'):.1f}" for one in measured],
        "speculative, tokens/s": [f"{_speed(one, 'speculative'):.1f}" for one in measured],
        "drafts accepted": ["none made" if rate is None else f"{rate:.0%}" for rate in rates],
        "tokens per block": [f"{one.tokens_per_step:.2f}" for one in measured],
        "first token, ms": [f"{1e3 * one.first_token_s.median:.0f}" for one in measured],
        "prompts alone, ms": [f"{1e3 * one.prefill_s.median:.0f}" for one in measured],
        "texts that parted": [str(one.num_parted) for one in measured],
    }
    for heading, own in rows.items():
        table.add_row(heading, *own)
    stdout().print(table)
    say(f"medians of {rounds} rounds, with the lowest and the highest in brackets")


def _speed(one: Speeds, name: str) -> float:
    return one.shape.batch_size * one.shape.num_new / one.seconds[name].median
