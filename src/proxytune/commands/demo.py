"""`proxytune demo`: the main job on real models, offline."""

from __future__ import annotations

from typing import Annotated

import typer

from proxytune.commands.app import JsonOption, command, json_line, stdout
from proxytune.commands.progress import bars
from proxytune.request import SamplingParams


@command("proxytune demo")
def demo(
    as_json: JsonOption = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the continuations")] = 1,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Length of each continuation, in tokens")
    ] = 48,
) -> None:
    """Steer a real model offline, and show base and steered side by side.

    What is shown is the perplexity of held-out text under base, expert and steered base, and what base and
    steered base write. All numbers are measured now.
    """
    SamplingParams(max_new_tokens=new_tokens, seed=seed)  # refused before models load
    from proxytune.demo import run

    answer = run(
        console=stdout(),
        progress=bars("{task.percentage:.0f}%", transient=True),
        json_output=as_json,
        seed=seed,
        new_tokens=new_tokens,
    )
    if as_json:
        typer.echo(json_line(answer))
