"""`proxytune new`: a recipe, written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command
from proxytune.commands.console import say
from proxytune.commands.options import STRENGTH, PolicyOptions, argument
from proxytune.errors import InvalidRequest
from proxytune.request import check_alpha
from proxytune.settings import declared, option

if TYPE_CHECKING:
    from proxytune.recipe.recipe import Recipe
    from proxytune.recipe.spec import ExpertSpec, ModelSpec

FORMAT = "How the {} reads texts: plain, chat (its chat template), or a Jinja template"
CHAT = "How the {} reads messages, in the same three ways"


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The large model."""

    base: str | None = option(
        None,
        "The large model, or the address of an API; required unless --add is given",
        metavar="MODEL",
    )
    base_name: str | None = option(
        None, "Name of the base on the API", metavar="NAME", none_means="the only model it lists"
    )
    key_env: str | None = option(
        None,
        "Environment variable whose key the API needs; whoever runs the recipe decides what is sent",
        metavar="VARIABLE",
    )
    prompt: str = option("plain", FORMAT.format("base"), metavar="FORMAT")
    chat: str | None = option(
        None, CHAT.format("base"), metavar="FORMAT", none_means="its chat template, if it has one"
    )


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """The small model before and after tuning."""

    anti_expert: str = field(metadata=declared("The small model before tuning", metavar="MODEL"))
    expert: str | None = option(
        None,
        "The small model after tuning; not needed with --adapter on the anti-expert",
        metavar="MODEL",
    )
    adapter: str | None = option(None, "A LoRA adapter that makes the expert", metavar="PATH")
    anti_expert_adapter: str | None = option(
        None, "A LoRA adapter on the anti-expert, tuned to do the opposite", metavar="PATH"
    )
    alpha: float = option(1.0, STRENGTH)
    weights: tuple[float, ...] = option(
        (),
        "How strongly base, expert and anti-expert count",
        metavar="BASE,EXPERT,ANTI",
        separator=",",
        none_means="1,1,1",
    )
    bias: str | None = option(
        None,
        "A .safetensors file with token_ids and values to add to the logits",
        metavar="PATH",
    )
    name: str | None = option(
        None,
        "Name of the expert in requests",
        metavar="NAME",
        none_means="the last part of its path",
    )
    expert_prompt: str = option("plain", FORMAT.format("expert"), metavar="FORMAT")
    expert_chat: str | None = option(
        None,
        CHAT.format("expert"),
        metavar="FORMAT",
        none_means="as the docs' page on recipes describes",
    )
    anti_expert_prompt: str = option("plain", FORMAT.format("anti-expert"), metavar="FORMAT")
    anti_expert_chat: str | None = option(
        None,
        CHAT.format("anti-expert"),
        metavar="FORMAT",
        none_means="as the docs' page on recipes describes",
    )

    def spec(self, directory: Path, *, llama_cpp: bool) -> ExpertSpec:
        """Return the expert of a recipe in this directory."""
        from proxytune.checkpoints.references import local_reference
        from proxytune.recipe.spec import ExpertSpec, ExpertWeights

        if len(self.weights) not in (0, 3):
            raise InvalidRequest(
                f"--weights has {len(self.weights)} numbers, and needs three: for the base, the expert and "
                "the anti-expert.\nhint: --weights 0.95,0.92,0.9"
            )
        name = _expert_name(self.adapter or self.expert or "") if self.name is None else self.name
        small = partial(_small_model, directory=directory, llama_cpp=llama_cpp)
        return ExpertSpec(
            name=name,
            expert=small(self.expert, self.adapter, self.expert_prompt, self.expert_chat),
            anti_expert=small(
                self.anti_expert,
                self.anti_expert_adapter,
                self.anti_expert_prompt,
                self.anti_expert_chat,
            ),
            alpha=check_alpha(self.alpha),
            weights=ExpertWeights(*self.weights),
            bias=None if self.bias is None else local_reference(self.bias, directory),
        )


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What else the recipe says, and what becomes of one that is already there."""

    llama_cpp: bool = option(False, "Run every .gguf file directly with llama.cpp")
    map_vocabulary: bool = option(
        False,
        "Allow small models with another tokenizer than the base's; they steer the tokens that both have",
    )
    add: bool = option(False, "Add the expert to the recipe in DIR")
    force: bool = option(False, "Replace the recipe in DIR")


@command(
    "proxytune new my-recipe --base Qwen/Qwen2.5-7B --expert my-tuned-1.5b "
    "--anti-expert Qwen/Qwen2.5-1.5B"
)
def new(
    directory: Annotated[Path, argument("DIR", "Where to write the recipe")],
    base: BaseOptions,
    expert: ExpertOptions,
    options: RecipeOptions,
    policy: PolicyOptions,
) -> None:
    """Write a recipe: a directory that names the base, an expert and its anti-expert.

    It contains no model weights.

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
    recipe = policy.applied_to(recipe)
    if options.map_vocabulary:
        recipe = replace(recipe, vocabulary="map")
    recipe.write(directory, overwrite=options.add or options.force)
    say(f"wrote {directory / 'config.json'}")
    say(f"next: proxytune doctor {directory}, then proxytune chat {directory}")


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
    if options.add and base != BaseOptions():
        raise InvalidRequest(
            "--add takes the base and how it reads prompts from the existing recipe.\n"
            "hint: leave --base, --prompt and --chat out"
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
    model = ModelSpec(model=reference, prompt=base.prompt, chat=base.chat, api=api)
    return Recipe(base=model, experts=(spec,), directory=directory)


def _small_model(
    reference: str | None,
    adapter: str | None,
    prompt: str,
    chat: str | None,
    *,
    directory: Path,
    llama_cpp: bool,
) -> ModelSpec:
    from proxytune.checkpoints.references import is_gguf, local_reference
    from proxytune.recipe.spec import LlamaCppSettings, ModelSpec

    if reference == "base":
        if adapter is not None:
            raise InvalidRequest(
                "an adapter cannot sit on the base, whose logits are reused as they are.\n"
                "hint: name the model that the adapter belongs to"
            )
        return ModelSpec(same_as="base", prompt=prompt, chat=chat)
    return ModelSpec(
        model=None if reference is None else local_reference(reference, directory),
        adapter=None if adapter is None else local_reference(adapter, directory),
        prompt=prompt,
        chat=chat,
        llama_cpp=LlamaCppSettings() if llama_cpp and is_gguf(reference or "") else None,
    )


def _expert_name(reference: str) -> str:
    """Return the last part of a reference, with what a name cannot hold left out."""
    last = reference.rstrip("/\\").replace("\\", "/").rpartition("/")[2].removesuffix(".gguf")
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last)
    return kept.lstrip("._-") or "expert"
