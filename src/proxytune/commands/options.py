"""Options that several commands take, in bundles."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.console import stderr
from proxytune.errors import InvalidRequest, UserError
from proxytune.request import SamplingParams, Steering, check_alpha

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned
    from proxytune.recipe.recipe import Recipe


GREEDY = SamplingParams()
CHAT_TOKENS = 256


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe's directory, package:NAME/PATH, or its id on the Hugging Face Hub",
        show_default=False,
    ),
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        metavar="FLOAT",
        help="Strength of steering: 0 is the base alone, 1 the published method  [default: the recipe's]",
        show_default=False,
    ),
]


def _experts_to_complete(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the experts that the shell may complete: of a recipe that is here, never of one to fetch."""
    # An option without its value keeps the line from being parsed; what stands before it is left in args.
    reference = ctx.params.get("recipe") or next(iter(ctx.args), "")
    if not (reference.startswith("package:") or Path(reference).expanduser().is_dir()):
        return []
    from proxytune.recipe.recipe import Recipe

    try:
        names = [expert.name for expert in Recipe.read(reference).experts]
    except UserError:
        return []
    return [name for name in names if name.startswith(incomplete)]


ExpertOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=ALPHA]",
        autocompletion=_experts_to_complete,
        help="Steer with this expert, at a strength of its own where one is given; repeat to add up several  "
        "[default: the recipe's]",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Run every model there: cpu, cuda, cuda:1, or auto to spread each  [default: the recipe's]",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Run every model in it: float32, bfloat16, float16, or auto for the stored one  "
        "[default: the recipe's]",
        show_default=False,
    ),
]
CudaGraphsOption = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs",
        help="Launch all kernels of a token at once, on a CUDA device; meant for small models, takes memory",
    ),
]
LlamaCppOption = Annotated[
    bool,
    typer.Option(
        "--llama-cpp",
        help="Run every .gguf file with llama.cpp as it is, whatever the recipe says, where transformers "
        "would unpack it",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Processor threads of llama.cpp  [default: the recipe's]",
        show_default=False,
    ),
]
GpuLayersOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Layers that llama.cpp puts on a GPU, -1 for all  [default: the recipe's]",
        show_default=False,
    ),
]
ContextSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Most tokens of prompt and text in llama.cpp  [default: the recipe's]",
        show_default=False,
    ),
]
MaxCallsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Stop before calls to a base behind an API exceed this  [default: no limit]",
        show_default=False,
    ),
]
MaxCostOption = Annotated[
    float | None,
    typer.Option(
        metavar="FLOAT",
        help="Stop once calls to a base behind an API have cost this, by the recipe's prices  "
        "[default: no limit]",
        show_default=False,
    ),
]
MinNewTokensOption = Annotated[
    int, typer.Option(metavar="N", help="Let nothing end the text before it has so many tokens")
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT",
        help="0 takes the likeliest token; above 0 draws, more evenly the higher it is",
    ),
]
TopKOption = Annotated[
    int, typer.Option(metavar="K", help="Draw from the K likeliest tokens; 0 keeps all")
]
TopPOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT",
        help="Draw from the fewest tokens that together have this probability; 1 keeps all",
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT",
        help="Draw from tokens at least this fraction as likely as the likeliest; 0 keeps all",
    ),
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT", help="Make tokens of the prompt and the text less likely above 1; 1 is off"
    ),
]
PresencePenaltyOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT", help="Take this from the logits of tokens that the new text has; 0 is off"
    ),
]
FrequencyPenaltyOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT",
        help="Take this from the logits once per occurrence in the new text; 0 is off",
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help="End before this string; may be repeated", show_default=False
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|JSON",
        help="Steer by this policy: its name, or what a recipe's steering may hold, as JSON  "
        "[default: the recipe's]",
        show_default=False,
    ),
]
CombineOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How several experts steer together: sum, union, majority, …  [default: the recipe's]",
        show_default=False,
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The benchmarks' files, a folder each  [default: from the Hugging Face Hub]",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on one line")]
SpeculativeOption = Annotated[
    bool,
    typer.Option(
        "--speculative/--no-speculative",
        help="Guess tokens ahead where that is faster; the text stays the same",
    ),
]


def steering_of(recipe: Recipe, names: Sequence[str] | None, alpha: float | None) -> Steering:
    """Return what `--alpha` and the values of `--expert` ask for.

    Raises:
        UnknownExpert: The recipe has no expert of that name.
        InvalidRequest: A strength is no finite number or said twice, or an expert is named twice.
    """
    if not names:
        return Steering(alpha)
    own: dict[str, float | None] = {}
    for item in names:
        name, has_own, value = item.partition("=")
        if name in own:
            raise InvalidRequest(f"expert {name!r} is named twice.\nhint: name it once")
        own[name] = number_of(value, f"the strength of expert {name!r}") if has_own else None
    return recipe.mixed(own, alpha, name="--alpha")


def with_policy(recipe: Recipe, policy: str | None, combine: str | None) -> Recipe:
    """Return the recipe with what `--policy` and `--combine` say.

    Raises:
        InvalidRequest: A policy is unknown, or cannot be used.
        RecipeError: It is not for this recipe.
    """
    from dataclasses import replace

    from proxytune.logits.policy import Policy

    if policy is None and combine is None:
        return recipe
    settings: object = recipe.policy.to_dict()
    if policy is not None:
        settings = {"policy": policy}
        if policy.lstrip().startswith("{"):
            try:
                settings = json.loads(policy)
            except json.JSONDecodeError as error:
                raise InvalidRequest(f"--policy is no JSON: {error}") from error
    assert isinstance(settings, dict)
    own = recipe.policy.combine if combine is None else combine
    return replace(recipe, policy=Policy.from_dict(settings, combine=own))


def number_of(text: str, name: str) -> float:
    """Return a strength typed as text.

    Raises:
        InvalidRequest: It is no number, or too large.
    """
    try:
        value = float(text)
    except ValueError:
        raise InvalidRequest(
            f"{name} is {text.strip()!r}, and must be a number.\n"
            "hint: 0 is the base alone, 1 the published method"
        ) from None
    return check_alpha(value, name)


def read_recipe(
    reference: str,
    llama_cpp: bool,
    *,
    threads: int | None,
    gpu_layers: int | None,
    context_size: int | None,
) -> Recipe:
    """Read a recipe, with what the command line says about llama.cpp."""
    from proxytune.recipe.recipe import Recipe

    recipe = Recipe.read(reference)
    settings = {"threads": threads, "gpu_layers": gpu_layers, "context_size": context_size}
    given = [name for name, value in settings.items() if value is not None]
    if given and not llama_cpp and all(m.llama_cpp is None for m in recipe.models.values()):
        raise InvalidRequest(
            f"--{given[0].replace('_', '-')} is for llama.cpp, and the recipe runs nothing with it.\n"
            "hint: add --llama-cpp to run its .gguf files that way"
        )
    if not llama_cpp and not given:
        return recipe
    return recipe.with_llama_cpp(only_where_set=not llama_cpp, **settings)


def load_models(
    recipe: Recipe,
    experts: Collection[str] | None,
    *,
    device: str | None,
    dtype: str | None,
    cuda_graphs: bool = False,
    max_calls: int | None = None,
    max_cost: float | None = None,
) -> ProxyTuned:
    """Load a recipe's models, only these experts', with a sign of life on stderr."""
    limits = {"max_calls": max_calls, "max_cost": max_cost}
    given = [name for name, limit in limits.items() if limit is not None]
    if given and recipe.base.api is None:
        raise InvalidRequest(
            f"--{given[0].replace('_', '-')} is for a base behind an API, and this one runs here.\n"
            "hint: leave it out"
        )
    with stderr().status("loading models"):
        from proxytune.backends.api.client import Budget
        from proxytune.model import ProxyTuned

        return ProxyTuned.load(
            recipe,
            device=device,
            dtype=dtype,
            cuda_graphs=cuda_graphs,
            experts=None if experts is None else tuple(experts),
            budget=Budget(max_calls, max_cost) if given else None,
        )


def whole_numbers(text: str, name: str, separator: str, count: int | None = None) -> list[int]:
    """Return the whole numbers above 0 in a text.

    Raises:
        InvalidRequest: One is not, or there are not `count` of them.
    """
    parts = text.split(separator)
    if all(part.strip().isdecimal() and int(part) > 0 for part in parts) and (
        count is None or len(parts) == count
    ):
        return [int(part) for part in parts]
    example = separator.join(["8"] * (count or 2))
    raise InvalidRequest(
        f"{name} holds {text!r}, and must hold whole numbers above 0, such as {example}"
    )
