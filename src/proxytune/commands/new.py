"""`proxytune new`: a recipe, written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import command
from proxytune.commands.options import COMBINE, POLICY, STRENGTH, with_policy
from proxytune.errors import InvalidRequest
from proxytune.request import check_alpha
from proxytune.settings import Option

if TYPE_CHECKING:
    from proxytune.recipe.recipe import Recipe
    from proxytune.recipe.spec import ExpertSpec, ModelSpec

FORMAT = "Prompt format of the {}: plain, chat, or a Jinja template"


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The large model."""

    base: Annotated[
        str | None,
        Option(
            "The large model, or the address of an API; required unless --add is given",
            metavar="MODEL",
        ),
    ] = None
    base_name: Annotated[
        str | None,
        Option("Name of the base on the API", metavar="NAME", default="the only model it lists"),
    ] = None
    key_env: Annotated[
        str | None, Option("Environment variable that holds the API's key", metavar="VARIABLE")
    ] = None
    prompt: Annotated[str, Option(FORMAT.format("base"), metavar="FORMAT")] = "plain"


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """The small model before and after tuning."""

    anti_expert: Annotated[str, Option("The small model before tuning", metavar="MODEL")]
    expert: Annotated[
        str | None,
        Option(
            "The small model after tuning; not needed with --adapter on the anti-expert",
            metavar="MODEL",
        ),
    ] = None
    adapter: Annotated[
        str | None, Option("A LoRA adapter that makes the expert", metavar="PATH")
    ] = None
    anti_expert_adapter: Annotated[
        str | None,
        Option("A LoRA adapter on the anti-expert, tuned to do the opposite", metavar="PATH"),
    ] = None
    alpha: Annotated[float, Option(STRENGTH)] = 1.0
    name: Annotated[
        str | None,
        Option(
            "Name of the expert in requests", metavar="NAME", default="the last part of its path"
        ),
    ] = None
    expert_prompt: Annotated[str, Option(FORMAT.format("expert"), metavar="FORMAT")] = "plain"
    anti_expert_prompt: Annotated[str, Option(FORMAT.format("anti-expert"), metavar="FORMAT")] = (
        "plain"
    )

    def spec(self, directory: Path, *, llama_cpp: bool) -> ExpertSpec:
        """Return the expert of a recipe in this directory."""
        from proxytune.recipe.spec import ExpertSpec

        name = _expert_name(self.adapter or self.expert or "") if self.name is None else self.name
        return ExpertSpec(
            name=name,
            expert=_small_model(
                self.expert, self.adapter, self.expert_prompt, directory, llama_cpp
            ),
            anti_expert=_small_model(
                self.anti_expert,
                self.anti_expert_adapter,
                self.anti_expert_prompt,
                directory,
                llama_cpp,
            ),
            alpha=check_alpha(self.alpha),
        )


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What else the recipe says, and what becomes of one that is already there."""

    llama_cpp: Annotated[bool, Option("Run every .gguf file directly with llama.cpp")] = False
    policy: Annotated[str | None, POLICY] = None
    combine: Annotated[str | None, COMBINE] = None
    map_vocabulary: Annotated[
        bool,
        Option(
            "Allow small models with another tokenizer than the base's; they steer the tokens that both have"
        ),
    ] = False
    add: Annotated[bool, Option("Add the expert to the recipe in DIR")] = False
    force: Annotated[bool, Option("Replace the recipe in DIR")] = False


@command(
    "proxytune new my-recipe --base Qwen/Qwen2.5-7B --expert my-tuned-1.5b "
    "--anti-expert Qwen/Qwen2.5-1.5B"
)
def new(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write the recipe", show_default=False)
    ],
    base: BaseOptions,
    expert: ExpertOptions,
    options: RecipeOptions,
) -> None:
    """Write a recipe.

    A recipe is a directory that names the base and an expert with its anti-expert; it contains no model
    weights.

    A model is a local directory, a .gguf file, package:NAME/PATH, or an id on the Hugging Face Hub; an
    existing path counts as local. The base may also be the address of an OpenAI-compatible API, such as
    http://localhost:8000/v1. The word base, as expert or anti-expert, reuses the base itself.
    """
    from proxytune.recipe.recipe import Recipe

    _refuse_contradictions(base, expert, options)
    directory = directory.expanduser().absolute()
    spec = expert.spec(directory, llama_cpp=options.llama_cpp)
    if options.add:
        there = Recipe.read(directory)
        recipe = replace(there, experts=(*there.experts, spec))
    else:
        recipe = _new_recipe(base, spec, directory)
    if options.llama_cpp:
        recipe = recipe.with_llama_cpp()
    recipe = with_policy(recipe, options.policy, options.combine)
    if options.map_vocabulary:
        recipe = replace(recipe, vocabulary="map")
    recipe.write(directory, overwrite=options.add or options.force)
    typer.echo(f"wrote {directory / 'config.json'}", err=True)
    typer.echo(f"next: proxytune doctor {directory}", err=True)


def _refuse_contradictions(
    base: BaseOptions, expert: ExpertOptions, options: RecipeOptions
) -> None:
    if expert.expert is None and expert.adapter is None:
        raise InvalidRequest(
            "neither --expert nor --adapter is given, and a recipe needs an expert.\n"
            "hint: --expert takes a whole model, --adapter a LoRA adapter on the anti-expert"
        )
    if options.add and options.force:
        raise InvalidRequest(
            "--add keeps the existing recipe and --force replaces it.\nhint: give one of them"
        )
    if options.add and (base.base is not None or base.prompt != "plain"):
        raise InvalidRequest(
            "--add takes the base and its prompt format from the existing recipe.\n"
            "hint: leave --base and --prompt out"
        )
    if base.base is None and not options.add:
        raise InvalidRequest(
            "--base is missing.\nhint: name the large model, or --add an expert to a recipe"
        )


def _new_recipe(base: BaseOptions, spec: ExpertSpec, directory: Path) -> Recipe:
    from proxytune.checkpoints.references import is_url, local_reference
    from proxytune.recipe.recipe import Recipe
    from proxytune.recipe.spec import ApiSettings, ModelSpec

    api = None
    if is_url(base.base or ""):
        api = ApiSettings(model=base.base_name, key_env=base.key_env)
    elif base.base_name is not None or base.key_env is not None:
        raise InvalidRequest(
            f"--base-name and --key-env are for an API, and the base is {base.base}.\n"
            "hint: leave them out, or give the address of an API as --base"
        )
    reference = local_reference(base.base or "", directory)
    return Recipe(
        base=ModelSpec(model=reference, prompt=base.prompt, api=api),
        experts=(spec,),
        directory=directory,
    )


def _small_model(
    reference: str | None, adapter: str | None, prompt: str, directory: Path, llama_cpp: bool
) -> ModelSpec:
    from proxytune.checkpoints.references import is_gguf, local_reference
    from proxytune.recipe.spec import LlamaCppSettings, ModelSpec

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
