"""What the commands share: the app they register with, options that several take, and how they speak.

Answers go to stdout, everything else to stderr. A user's mistake ends with its message and exit code 2, a
failure of the work itself with 1; a bug keeps its traceback.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from proxytune.commands.lines import sign_of_life
from proxytune.commands.progress import status
from proxytune.errors import (
    BackendError,
    InputFileError,
    InvalidRequest,
    UserError,
)
from proxytune.request import SamplingParams, check_alpha

if TYPE_CHECKING:
    from rich.console import Console

    from proxytune.model import ProxyTuned
    from proxytune.recipe import Recipe

Experts = str | tuple[str, ...] | Mapping[str, float] | None


GREEDY = SamplingParams()
CHAT_TOKENS = 256
SCORE_WINDOW = 512


class _Commands(TyperGroup):
    """Turns this package's errors into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except BackendError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


class _Command(TyperCommand):
    """A command that reports every few seconds that it is still running, where stderr is not a terminal."""

    def invoke(self, ctx: Any) -> Any:
        with sign_of_life(str(self.name)):
            return super().invoke(ctx)


# Plain help, without boxes: its first line is there to be copied.
app = typer.Typer(
    cls=_Commands,
    help="\b\n  proxytune demo\n\nSteer a large language model with a small tuned one, token by token.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


Function = TypeVar("Function", bound=Callable[..., None])


def command(
    example: str, *, name: str | None = None, is_endless: bool = False
) -> Callable[[Function], Function]:
    """Register a command whose help is a line to paste and then the function's docstring.

    Args:
        example: The line to paste.
        name: What it is called; the function's name if left out.
        is_endless: Whether it runs until somebody ends it, so that there is no progress to report.
    """

    def register(function: Function) -> Function:
        text = inspect.cleandoc(function.__doc__ or "")
        help_text = f"\b\n  {example}\n\n{text}"
        kind = TyperCommand if is_endless else _Command
        register_as = app.command(name, cls=kind, help=help_text, short_help=text.split("\n")[0])
        register_as(function)
        return function

    return register


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
    from proxytune.recipe import Recipe

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


def steering_of(
    recipe: Recipe, names: Sequence[str] | None, alpha: float | None
) -> tuple[float | None, Experts]:
    """Return alpha and experts of a request from `--alpha` and the values of `--expert`.

    Raises:
        UnknownExpert: The recipe has no expert of that name.
        InvalidRequest: A strength is no finite number or said twice, or an expert is named twice.
    """
    if not names:
        recipe.choose(None, alpha)
        return alpha, None
    own: dict[str, float | None] = {}
    for item in names:
        name, has_own, value = item.partition("=")
        if name in own:
            raise InvalidRequest(f"expert {name!r} is named twice.\nhint: name it once")
        own[name] = number_of(value, f"the strength of expert {name!r}") if has_own else None
    chosen = recipe.choose(tuple(own), alpha)
    if all(value is None for value in own.values()):
        return alpha, tuple(own)
    if alpha is not None and all(value is not None for value in own.values()):
        raise InvalidRequest(
            "--alpha is given and each expert has a strength of its own, so --alpha would do nothing.\n"
            "hint: leave --alpha out"
        )
    return None, {name: chosen[name] if value is None else value for name, value in own.items()}


def with_policy(recipe: Recipe, policy: str | None, combine: str | None) -> Recipe:
    """Return the recipe with what `--policy` and `--combine` say.

    Raises:
        InvalidRequest: A policy is unknown, or cannot be used.
        RecipeError: It is not for this recipe.
    """
    from dataclasses import replace

    from proxytune.policy import Policy

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
    from proxytune.recipe import Recipe

    recipe = Recipe.read(reference)
    settings = {"threads": threads, "gpu_layers": gpu_layers, "context_size": context_size}
    given = [name for name, value in settings.items() if value is not None]
    models = [recipe.base, *(m for e in recipe.experts for m in (e.expert, e.anti_expert))]
    if given and not llama_cpp and all(model.llama_cpp is None for model in models):
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
    with status("loading models"):
        from proxytune.backends.api_client import Budget
        from proxytune.model import ProxyTuned

        return ProxyTuned.load(
            recipe,
            device=device,
            dtype=dtype,
            cuda_graphs=cuda_graphs,
            experts=None if experts is None else tuple(experts),
            budget=Budget(max_calls, max_cost) if given else None,
        )


def stdout() -> Console:
    """Return the console of answers."""
    from rich.console import Console

    # A table in a file has no width to keep to.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def stderr() -> Console:
    """Return the console of everything that is not an answer."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def json_line(content: Mapping[str, Any]) -> str:
    """Return one JSON object on one line."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def rate_text(num_tokens: int, seconds: float) -> str:
    """Say how many tokens took how long."""
    rate = f" ({num_tokens / seconds:,.1f} tokens/s)" if seconds > 0 else ""
    return f"{num_tokens:,} tokens in {seconds:,.1f} s{rate}"


def strengths_text(alphas: Mapping[str, float]) -> str:
    """Say which experts steer how strongly."""
    if not any(alphas.values()):
        return "the base alone (alpha 0)"
    return "steered by " + ", ".join(f"{name} at alpha {alpha:g}" for name, alpha in alphas.items())


def argument_text(text: str) -> str:
    """Return a prompt given as an argument.

    Raises:
        InvalidRequest: It is no UTF-8 text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the prompt is not UTF-8 text (character {error.start + 1}).\nhint: give it in UTF-8"
        ) from error
    return text


def stdin_text() -> str:
    """Return what stdin holds, without the line's end.

    Raises:
        InputFileError: It is no UTF-8 text.
    """
    content = typer.get_binary_stream("stdin").read()
    return _decoded(content, "stdin").removesuffix("\n").removesuffix("\r")


def file_text(path: Path) -> str:
    """Return the text of a file, unpacked if it is called .gz.

    Raises:
        InputFileError: It cannot be read, or is no UTF-8 text.
    """
    import gzip
    import zlib

    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputFileError(
            f"{path} cannot be read: {why}.\n"
            "hint: --text-file takes a text file, also packed with gzip as .gz"
        ) from error
    return _decoded(content, str(path))


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{name} is not UTF-8 text (byte {error.start + 1}).\nhint: convert it to UTF-8"
        ) from error


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
