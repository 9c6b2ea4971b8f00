"""Options that several commands take, in bundles."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.commands.console import file_text
from proxytune.commands.flags import Flag, number_of
from proxytune.commands.progress import waiting
from proxytune.errors import InvalidRequest, UserError
from proxytune.grants import Grants
from proxytune.policy import settings_in
from proxytune.request import Steering
from proxytune.settings import Option, option

if TYPE_CHECKING:
    from proxytune.measure.score import Passage
    from proxytune.model import ProxyTuned
    from proxytune.recipe.recipe import Recipe


def argument(metavar: str, help: str) -> Any:
    """Return an argument of a command, which the help shows without a default."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


RECIPE_HELP = (
    "A recipe: its directory, its id on the Hugging Face Hub, or package:NAME/PATH; the one that comes with "
    "proxytune is package:proxytune/smol"
)
RecipeArgument = Annotated[str, argument("RECIPE", RECIPE_HELP)]
OptionalRecipe = Annotated[
    str | None, argument("RECIPE", f"{RECIPE_HELP}; not needed for saved traces")
]
PromptArgument = Annotated[
    str | None,
    argument("PROMPT", "The text to continue; - reads it from stdin, without its last line break"),
]
AS_JSON = Option("Print one JSON object on one line", flag="--json")
KEY_ENV = Option(
    "Environment variable whose key is sent to the API of the recipe's base",
    metavar="VARIABLE",
    none_means="the one bound to that host",
)
STRENGTH = "Strength of steering: 0 is the base alone, 1 the published method"
PICTURE = Option("Draw a picture to this file: .png, .svg or .pdf", metavar="FILE")


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


EXPERT = Flag(
    "Steer with this expert, with =ALPHA at a strength of its own; repeat to combine several",
    flag="--expert",
    metavar="NAME[=ALPHA]",
    none_means="the recipe's",
    complete=_experts_to_complete,
)


@dataclass(frozen=True, kw_only=True)
class SteeringOptions:
    """Which experts steer, and how strongly."""

    alpha: float | None = option(None, STRENGTH, none_means="the recipe's")
    experts: tuple[str, ...] = option((), EXPERT)

    def of(self, recipe: Recipe) -> Steering:
        """Return what `--alpha` and `--expert` ask for; see `steering_of`."""
        return steering_of(recipe, self.experts, self.alpha)


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """By which rule experts steer, in place of the recipe's."""

    policy: str | None = option(
        None,
        "Steering policy: a name, or JSON as in the steering of a recipe",
        metavar="NAME|JSON",
        none_means="the recipe's",
    )
    combine: str | None = option(
        None,
        "How several experts are combined: sum, union, majority, …",
        metavar="NAME",
        none_means="the recipe's",
    )

    def applied_to(self, recipe: Recipe) -> Recipe:
        """Return the recipe with this policy.

        Raises:
            InvalidRequest: A policy is unknown, or cannot be used.
            RecipeError: It is not for this recipe.
        """
        if self.policy is None and self.combine is None:
            return recipe
        settings = None if self.policy is None else settings_in(self.policy, "--policy")
        return replace(recipe, policy=recipe.policy.changed(settings, self.combine))


@dataclass(frozen=True, kw_only=True)
class GrantOptions:
    """Rights that a recipe asks for and that only you can grant."""

    trust_remote_code: bool = option(
        False, "Run Python code that comes with the recipe's models, where the recipe asks for it"
    )
    allow_pickle: bool = option(
        False,
        "Read pickled weights, which can run any code, where the recipe asks for it",
    )
    key_env: str | None = option(None, KEY_ENV)

    def grants(self) -> Grants:
        """Return these rights."""
        return Grants(self.trust_remote_code, self.allow_pickle, self.key_env)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(GrantOptions):
    """Where and how a recipe's models run."""

    device: str | None = option(
        None,
        "Device for every model: cpu, cuda, cuda:1, or auto to spread each over several",
        metavar="NAME",
        none_means="the recipe's",
    )
    dtype: str | None = option(
        None,
        "Dtype for every model: float32, bfloat16, float16, or auto for the stored one",
        metavar="NAME",
        none_means="the recipe's",
    )
    cuda_graphs: bool = option(
        False,
        "Launch all kernels of a token at once on a CUDA device; for small models, uses more memory",
    )
    exact: bool = option(
        False,
        "Run each text in forwards of its own, so that no other text, draft or cache changes a bit of it in "
        "any dtype; slower in batches and with drafts",
    )
    llama_cpp: bool = option(
        False,
        "Run every .gguf file directly with llama.cpp, whatever the recipe says; transformers would "
        "unpack it",
    )
    threads: int | None = option(
        None, "Number of processor threads for llama.cpp", none_means="the recipe's"
    )
    gpu_layers: int | None = option(
        None, "Number of layers that llama.cpp puts on a GPU; -1 for all", none_means="the recipe's"
    )
    context_size: int | None = option(
        None,
        "Maximum number of tokens of prompt and text together in llama.cpp",
        none_means="the recipe's",
    )
    max_calls: int | None = option(
        None, "Maximum number of calls to a base behind an API", none_means="no limit"
    )
    max_cost: float | None = option(
        None,
        "Stop once calls to a base behind an API have cost this much, by the recipe's prices",
        none_means="no limit",
    )

    def read(self, reference: str) -> Recipe:
        """Read a recipe, with what these options say of llama.cpp.

        Raises:
            RecipeError: There is none, or it is malformed.
            InvalidRequest: They say something of llama.cpp, which the recipe does not use.
        """
        from proxytune.recipe.recipe import Recipe

        recipe = Recipe.read(reference)
        settings = {
            "threads": self.threads,
            "gpu_layers": self.gpu_layers,
            "context_size": self.context_size,
        }
        given = [name for name, value in settings.items() if value is not None]
        models = recipe.models.values()
        if given and not self.llama_cpp and all(model.llama_cpp is None for model in models):
            raise InvalidRequest(
                f"--{given[0].replace('_', '-')} is for llama.cpp, which the recipe does not use.\n"
                "hint: add --llama-cpp to run its .gguf files that way"
            )
        if not self.llama_cpp and not given:
            return recipe
        return recipe.with_llama_cpp(only_where_set=not self.llama_cpp, **settings)

    def load(self, recipe: Recipe, experts: Collection[str] | None) -> ProxyTuned:
        """Load a recipe's models, with a sign of life on stderr.

        Args:
            recipe: What to load.
            experts: The only experts to load; None for all.

        Raises:
            InvalidRequest: A limit is for a base behind an API, and this one runs here.
        """
        limits = {"--max-calls": self.max_calls, "--max-cost": self.max_cost}
        given = [name for name, limit in limits.items() if limit is not None]
        for_api = [*given, *(["--key-env"] if self.key_env is not None else [])]
        if for_api and recipe.base.api is None:
            raise InvalidRequest(
                f"{for_api[0]} is for a base behind an API, and this one runs here.\nhint: leave it out"
            )
        with waiting("loading models"):
            from proxytune.backends.api.client import Budget
            from proxytune.model import ProxyTuned

            return ProxyTuned.load(
                recipe,
                device=self.device,
                dtype=self.dtype,
                cuda_graphs=self.cuda_graphs,
                experts=None if experts is None else tuple(experts),
                budget=Budget(self.max_calls, self.max_cost) if given else None,
                trust_remote_code=self.trust_remote_code,
                allow_pickle=self.allow_pickle,
                key_env=self.key_env,
                exact=self.exact,
            )


WINDOW = Option(
    "Tokens per window of a text", at_least=2, none_means="512, or the smallest context"
)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """A text or rows that models are measured on."""

    text_file: Path | None = option(None, "Plain text: UTF-8, also as .gz; it is cut into windows")
    data: str | None = option(
        None,
        "Rows, as `proxytune tune` takes them: a file, a directory or a Hub id; texts, prompts with "
        "completions, conversations",
        metavar="SOURCE",
    )
    window: int | None = option(None, WINDOW)
    limit: int | None = option(
        None, "Use only the first N windows or rows", at_least=1, none_means="all"
    )

    def passages(self, model: ProxyTuned, window: int) -> list[Passage]:
        """Return the passages of the text or of the rows."""
        from proxytune.data.passages import passages_of
        from proxytune.data.rows import read_rows

        if self.text_file is not None:
            return model.text_passages(file_text(self.text_file), window=window)
        assert self.data is not None
        return passages_of(model, read_rows(self.data), window=window)

    def of(self, source: str) -> DataOptions:
        """Return other data of the same kind."""
        is_text = self.text_file is not None
        return DataOptions(text_file=Path(source)) if is_text else DataOptions(data=source)


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
