"""Commands that write and check recipes: `new`, `doctor`, `export-gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import (
    CombineOption,
    JsonOption,
    PolicyOption,
    RecipeArgument,
    command,
    json_line,
    stdout,
    with_policy,
)
from proxytune.commands.progress import status
from proxytune.errors import (
    InvalidRequest,
)
from proxytune.request import check_alpha

if TYPE_CHECKING:
    from proxytune.export_gguf import ExportedFile
    from proxytune.recipe import ModelSpec


@command(
    "proxytune new my-recipe --base Qwen/Qwen2.5-7B --expert my-tuned-1.5b "
    "--anti-expert Qwen/Qwen2.5-1.5B"
)
def new(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write the recipe", show_default=False)
    ],
    anti_expert: Annotated[
        str,
        typer.Option(metavar="MODEL", help="The small model before tuning", show_default=False),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The large model, or the address of an API; needed unless --add",
            show_default=False,
        ),
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the API calls the base  [default: the only model it lists]",
            show_default=False,
        ),
    ] = None,
    key_env: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE",
            help="The environment variable that holds the API's key",
            show_default=False,
        ),
    ] = None,
    llama_cpp: Annotated[
        bool,
        typer.Option("--llama-cpp", help="Run every .gguf file with llama.cpp as it is"),
    ] = False,
    expert: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The small model after tuning; left out where --adapter sits on the anti-expert",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="A LoRA adapter that makes the expert", show_default=False
        ),
    ] = None,
    anti_expert_adapter: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A LoRA adapter on the anti-expert, tuned to the opposite",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            metavar="FLOAT",
            help="Strength of steering: 0 is the base alone, 1 the published method",
        ),
    ] = 1.0,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What requests call the expert  [default: the last part of its path]",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="How the base sees prompts: plain, chat, or a Jinja template"
        ),
    ] = "plain",
    expert_prompt: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="How the expert sees prompts: plain, chat, or a Jinja template"
        ),
    ] = "plain",
    anti_expert_prompt: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="How the anti-expert sees prompts: plain, chat, or a Jinja template",
        ),
    ] = "plain",
    policy: PolicyOption = None,
    combine: CombineOption = None,
    map_vocabulary: Annotated[
        bool,
        typer.Option(
            "--map-vocabulary",
            help="Take small models of another tokenizer than the base's: they steer the tokens both have",
        ),
    ] = False,
    add: Annotated[
        bool, typer.Option("--add", help="Add the expert to the recipe that is in DIR")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the recipe that is in DIR")
    ] = False,
) -> None:
    """Write a recipe.

    It is a directory that names the base and an expert with its anti-expert, and holds none of their
    weights.

    A model is a local directory, a .gguf file, package:NAME/PATH, or an id on the Hugging Face Hub; what is
    there under the given path counts as local. The base may also be the address of an OpenAI-compatible API,
    such as http://localhost:8000/v1. The word base, as expert or anti-expert, reuses the base itself.
    """
    from dataclasses import replace

    from proxytune.recipe import (
        ApiSettings,
        ExpertSpec,
        ModelSpec,
        Recipe,
        is_url,
        local_reference,
    )

    if expert is None and adapter is None:
        raise InvalidRequest(
            "neither --expert nor --adapter is given, so there is nothing that steers.\n"
            "hint: --expert takes a whole model, --adapter a LoRA adapter on the anti-expert"
        )
    if add and force:
        raise InvalidRequest(
            "--add keeps the recipe that is there and --force replaces it.\nhint: give one of them"
        )
    if add and (base is not None or prompt != "plain"):
        raise InvalidRequest(
            "--add takes base and its prompt format from the recipe that is there.\n"
            "hint: leave --base and --prompt out"
        )
    if base is None and not add:
        raise InvalidRequest(
            "--base is missing.\nhint: name the large model, or --add an expert to a recipe"
        )
    directory = directory.expanduser().absolute()
    spec = ExpertSpec(
        name=name if name is not None else _expert_name(adapter or expert or ""),
        expert=_small_model(expert, adapter, expert_prompt, directory, llama_cpp),
        anti_expert=_small_model(
            anti_expert, anti_expert_adapter, anti_expert_prompt, directory, llama_cpp
        ),
        alpha=check_alpha(alpha),
    )
    if add:
        there = Recipe.read(directory)
        recipe = replace(there, experts=(*there.experts, spec))
    else:
        api = None
        if is_url(base or ""):
            api = ApiSettings(model=base_name, key_env=key_env)
        elif base_name is not None or key_env is not None:
            raise InvalidRequest(
                f"--base-name and --key-env are for an API, and the base is {base}.\n"
                "hint: leave them out, or give the address of an API as --base"
            )
        recipe = Recipe(
            base=ModelSpec(model=local_reference(base or "", directory), prompt=prompt, api=api),
            experts=(spec,),
            directory=directory,
        )
    if llama_cpp:
        recipe = recipe.with_llama_cpp()
    recipe = with_policy(recipe, policy, combine)
    if map_vocabulary:
        recipe = replace(recipe, vocabulary="map")
    recipe.write(directory, overwrite=add or force)
    typer.echo(f"wrote {directory / 'config.json'}", err=True)
    typer.echo(f"next: proxytune doctor {directory}", err=True)


def _small_model(
    reference: str | None, adapter: str | None, prompt: str, directory: Path, llama_cpp: bool
) -> ModelSpec:
    from proxytune.recipe import LlamaCppSettings, ModelSpec, is_gguf, local_reference

    if reference == "base":
        if adapter is not None:
            raise InvalidRequest(
                "an adapter cannot sit on the base, whose logits are reused as they are.\n"
                "hint: name the model that the adapter belongs to"
            )
        return ModelSpec(same_as="base", prompt=prompt)
    return ModelSpec(
        model=None if reference is None else local_reference(reference, directory),
        adapter=None if adapter is None else local_reference(adapter, directory),
        prompt=prompt,
        llama_cpp=LlamaCppSettings() if llama_cpp and is_gguf(reference or "") else None,
    )


def _expert_name(reference: str) -> str:
    """Return the last part of a reference, with what a name cannot hold left out."""
    last = reference.rstrip("/\\").replace("\\", "/").rpartition("/")[2].removesuffix(".gguf")
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last)
    return kept.lstrip("._-") or "expert"


@command("proxytune doctor my-recipe")
def doctor(recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Check a recipe without loading weights.

    Shown are vocabularies, parameters, dtypes, prompt formats, and the memory needed and there. The exit
    code is 2 where something keeps the recipe from running.
    """
    from proxytune.recipe import Recipe

    found = Recipe.read(recipe)
    with status("looking at the models"):
        from proxytune.doctor import examine

        diagnosis = examine(found, ask_server=True)
    if as_json:
        typer.echo(json_line(diagnosis.to_dict()))
    else:
        stdout().print(diagnosis.render())
    if not diagnosis.is_healthy:
        typer.echo("error: the recipe cannot run as it is", err=True)
        raise typer.Exit(2)


@command("proxytune export-gguf my-recipe my-recipe-gguf --dtype Q8_0", name="export-gguf")
def export_gguf(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A recipe; or a small model: its directory, package:NAME/PATH, or its id on the Hugging "
            "Face Hub",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            help="Where to write: a directory for a recipe, else a .gguf file",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Store weights in it: F32, F16, BF16, Q8_0, Q4_0 or Q4_1; an adapter takes F32 or F16",
        ),
    ] = "F16",
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Write this LoRA adapter on the model instead of the model",
            show_default=False,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Write the model with the adapter merged into its weights"),
    ] = False,
    pre: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="llama.cpp's name for how the tokenizer cuts text, taken as given  "
            "[default: found by comparing rules]",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is at OUTPUT with another content")
    ] = False,
) -> None:
    """Write models and adapters as GGUF files, which llama.cpp runs.

    Of a recipe, every small model and adapter is written, and a recipe that names them; its base stays the
    file it is. Models are Llama-shaped, with a byte-level tokenizer; others are refused by name.
    """
    from proxytune import export_gguf as export
    from proxytune.checkpoint import find_adapter, find_checkpoint, holds_recipe
    from proxytune.recipe import Recipe

    root, dtype, output = Path.cwd(), dtype.upper(), output.expanduser()
    if merge and adapter is None:
        raise InvalidRequest(
            "--merge is given without --adapter, so there is nothing to merge.\n"
            "hint: name the adapter with --adapter"
        )
    if adapter is not None and not merge and pre is not None:
        raise InvalidRequest(
            "--pre says how text is cut, and the file of an adapter holds no tokenizer.\n"
            "hint: leave --pre out"
        )
    if holds_recipe(source, root=root):
        if adapter is not None:
            raise InvalidRequest(
                f"--adapter is given, and {source} is a recipe, whose adapters are all written.\n"
                "hint: leave --adapter out, or name the small model instead of the recipe"
            )
        with status("writing GGUF files"):
            written = export.export_recipe(
                Recipe.read(source), output, dtype=dtype, pre=pre, overwrite=force
            )
        for file in written.files:
            _say_exported(file)
        typer.echo(f"wrote {written.directory / 'config.json'}", err=True)
        typer.echo(written.directory)
        return
    model = find_checkpoint(source, root=root)
    with status("writing a GGUF file"):
        if adapter is None:
            file = export.export_model(model, output, dtype=dtype, pre=pre, overwrite=force)
        else:
            files = find_adapter(adapter, root=root)
            if merge:
                file = export.export_model(
                    model, output, dtype=dtype, adapter=files, pre=pre, overwrite=force
                )
            else:
                file = export.export_adapter(files, model, output, dtype=dtype, overwrite=force)
    _say_exported(file)
    typer.echo(file.path)


def _say_exported(file: ExportedFile) -> None:
    line = f"wrote {file.path} ({file.num_bytes / 1e6:.1f} MB, {file.num_tensors} tensors)"
    if file.num_unquantized:
        line += (
            f"; {file.num_unquantized} tensors in F16, because their rows do not divide into blocks"
        )
    typer.echo(line, err=True)
