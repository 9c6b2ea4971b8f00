"""Todo."""

from __future__ import annotations

import typer

from proxytune.commands.app import command
from proxytune.commands.console import json_line, stderr, stdout
from proxytune.commands.options import JsonOption, RecipeArgument


@command("proxytune doctor my-recipe")
def doctor(recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Check a recipe without loading weights.

    Shown are vocabularies, parameters, dtypes, prompt formats, and the memory needed and there. The exit
    code is 2 where something keeps the recipe from running.
    """
    from proxytune.recipe.recipe import Recipe

    found = Recipe.read(recipe)
    with stderr().status("looking at the models"):
        from proxytune.loading.doctor import examine

        diagnosis = examine(found, ask_server=True)
    if as_json:
        typer.echo(json_line(diagnosis.to_dict()))
    else:
        stdout().print(diagnosis.render())
    if not diagnosis.is_healthy:
        typer.echo("error: the recipe cannot run as it is", err=True)
        raise typer.Exit(2)
