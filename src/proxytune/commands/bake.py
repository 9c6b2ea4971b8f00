"""`proxytune bake`: steering distilled into an adapter of the base."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import typer

from proxytune.commands.app import command
from proxytune.commands.console import json_line, print_text, say
from proxytune.commands.options import AS_JSON, RecipeArgument
from proxytune.commands.progress import ProgressBars
from proxytune.commands.tune import Stages
from proxytune.errors import missing_extra
from proxytune.settings import option
from proxytune.tune.baked import BakeSettings, summary
from proxytune.tune.settings import Interrupted


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the run goes on, and how its result is printed."""

    resume: bool = option(False, "Continue the run in --output")
    as_json: bool = option(False, AS_JSON)


@command("proxytune bake my-recipe --data rows.jsonl --output baked")
def bake(recipe: RecipeArgument, *, settings: BakeSettings, options: RunOptions) -> None:
    """Distil a steered base into a LoRA adapter of the base, for those who may tune it after all.

    The adapter needs no small model: PEFT, transformers and vLLM load it as any other. It learns the steered
    base's distribution at the tokens of your rows, or of answers that the steered base writes to your
    prompts. At the end, base, steered base and base with the adapter are compared on held-out rows: how much
    of what steering gains is kept.

    Ctrl-C saves the state, and --resume continues.
    """
    for library in ("trl", "datasets", "peft"):
        if importlib.util.find_spec(library) is None:
            message = f"baking needs the library {library}, which is not installed"
            raise missing_extra(message, "tune")
    from proxytune.tune.bake import bake as run

    try:
        with ProgressBars(shows_ends=True) as bars:
            result = run(recipe, settings, resume=options.resume, display=Stages(bars))
    except Interrupted as error:
        say(str(error))
        raise typer.Exit(130) from None
    if options.as_json:
        print_text(json_line(result.to_dict()))
        return
    say(f"wrote {settings.directory}")
    for line in summary(result):
        say(line)
