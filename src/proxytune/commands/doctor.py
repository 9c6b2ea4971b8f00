"""`proxytune doctor`: what is known of a recipe's models, and what keeps it from running."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from proxytune.commands.app import command, print_result
from proxytune.commands.console import say, stdout, styled
from proxytune.commands.options import AS_JSON, KEY_ENV, RecipeArgument
from proxytune.commands.progress import waiting
from proxytune.errors import InvalidRequest
from proxytune.settings import option

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from proxytune.loading.doctor import Diagnosis, ModelReport


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """What a base behind an API may be asked, and with which key."""

    ask_server: bool = option(
        False,
        "Ask the API of the recipe's base what it shows and accepts, also if that sends a key to it",
    )
    key_env: str | None = option(None, KEY_ENV)
    as_json: bool = option(False, AS_JSON)


@command("proxytune doctor my-recipe")
def doctor(recipe: RecipeArgument, options: AskOptions) -> None:
    """Check a recipe without loading its models.

    Shows vocabularies, parameters, dtypes, prompt formats, the memory that is needed and available, and the
    rights that the recipe asks for; none of its code runs. The exit code is 2 if something keeps the recipe
    from running, also if that is only a right that you have to grant. An API is asked nothing that needs a
    key, unless you say --ask-server.
    """
    from proxytune.recipe.recipe import Recipe

    found = Recipe.read(recipe)
    if options.key_env is not None and found.base.api is None:
        raise InvalidRequest(
            "--key-env is for a base behind an API, and this one runs here.\nhint: leave it out"
        )
    with waiting("examining the models"):
        from proxytune.loading.doctor import examine

        diagnosis = examine(
            found,
            ask_server=True,
            send_key=options.ask_server,
            key_env=options.key_env,
            compares_outputs=True,
        )
    print_result(diagnosis, lambda found: stdout().print(rendered(found)), as_json=options.as_json)
    if not diagnosis.is_healthy:
        flags = " ".join(dict.fromkeys(one.flag for one in diagnosis.asked))
        others = len(diagnosis.problems) - len(diagnosis.asked)
        if others:
            say("error: the recipe cannot run as it is")
        if flags:
            say(f"error: the recipe asks for rights that only you can grant: {flags}")
        raise typer.Exit(2)


def rendered(diagnosis: Diagnosis) -> RenderableType:
    """Return tables and paragraphs for a terminal of 80 columns or more."""
    from rich.console import Group
    from rich.padding import Padding

    from proxytune.loading.doctor import bytes_text

    def paragraph(text: str, style: str = "") -> RenderableType:
        return Padding(styled(text, style), (1, 0, 0, 0))

    parts: list[RenderableType] = [_table(diagnosis.models), _legend(diagnosis.models)]
    for device in diagnosis.devices:
        free = "unknown" if device.free_bytes is None else bytes_text(device.free_bytes)
        parts.append(
            paragraph(
                f"{device.device} ({device.name}): {bytes_text(device.weight_bytes)} of weights and "
                f"{bytes_text(device.cache_bytes)} per 1,000 tokens of each sequence; free: {free}"
            )
        )
    seen = {(model.text_tokens, model.chat_tokens) for model in diagnosis.models}
    if len(seen) == 1 and None not in seen.pop():
        parts.append(paragraph("All models see the same tokens."))
    parts += [paragraph(f"note: {note}") for note in diagnosis.notes]
    for problem in diagnosis.problems:
        line = f"{problem.where}: {type(problem.error).__name__}: {problem.error}"
        parts.append(paragraph(line, "red"))
    num = len(diagnosis.problems)
    verdict = f"{num or 'No'} problem{'' if num == 1 else 's'}."
    return Group(*parts, paragraph(verdict, "bold"))


def _table(models: tuple[ModelReport, ...]) -> Table:
    """Return what is known of each model, a row each."""
    from rich import box
    from rich.table import Table

    from proxytune.loading.doctor import bytes_text

    def cell(*lines: str | None) -> str:
        return "\n".join(line for line in lines if line) or "?"

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=False)
    for heading in (
        "part", "parameters", "dtype", "context", "text", "messages", "vocabulary", "memory",
    ):  # fmt: skip
        is_number = heading in ("parameters", "context", "memory")
        justify = "right" if is_number else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=is_number)  # type: ignore[arg-type]
    for model in models:
        adapter = model.num_adapter_parameters
        is_stored = model.stored_dtype == model.running_dtype
        dtypes = (model.stored_dtype, None if is_stored else f"runs {model.running_dtype}")
        is_shared = model.kind and model.shares and not model.weight_bytes
        table.add_row(
            styled(model.part, "bold"),
            cell(_count(model.num_parameters), f"+ {_count(adapter)}" if adapter else None),
            cell(*dtypes if model.stored_dtype else ()),
            cell(f"{model.max_context:,}" if model.max_context else None),
            cell(_format(model.prompt_format)),
            cell(_format(model.chat_format)),
            cell(model.vocabulary, f"{model.num_tokens:,}" if model.num_tokens else None),
            cell("shared" if is_shared else bytes_text(model.weight_bytes)),
        )
    return table


def _legend(models: tuple[ModelReport, ...]) -> Table:
    """Return what each model is, and how it sees prompts where that is not as the model before it does."""
    from rich.table import Table

    legend = Table.grid(padding=(0, 2, 0, 0))
    legend.add_column(no_wrap=True)
    legend.add_column(overflow="fold")
    seen: tuple[tuple[str, ...] | None, ...] | None = None
    for model in models:
        what = model.reference + (f" + {model.adapter}" if model.adapter else "")
        kind = ", ".join(filter(None, (model.architecture, model.kind))) or "not usable"
        if model.kind and model.shares:
            kind += f", shares the weights of {model.shares}"
        if model.shares_output:
            kind += ", shares the base's output matrix"
        lines = [f"{what} ({kind})"]
        if (model.text_tokens, model.chat_tokens) != seen:
            seen = model.text_tokens, model.chat_tokens
            for what, tokens in (("a text", model.text_tokens), ("a message", model.chat_tokens)):
                if tokens is not None:
                    lines.append(f"sees {what} as {_tokens_text(tokens)}")
        lines += _api_lines(model.api)
        if model.num_padding:
            lines.append(f"{model.num_padding:,} padding ids, which are never sampled")
        for number, line in enumerate(lines):
            legend.add_row("" if number else model.part, line)
    return legend


def _format(prompt_format: str | None) -> str | None:
    return "template" if prompt_format not in (None, "plain", "chat") else prompt_format


def _tokens_text(tokens: Sequence[str]) -> str:
    """Return tokens with a bar between them, on one line."""
    return "|".join(repr(token)[1:-1] for token in tokens)


def _count(number: int | None) -> str | None:
    """Return a number of parameters with one decimal: 134.5 M."""
    if number is None:
        return None
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _api_lines(traits: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what a server shows and takes, in words."""
    if traits is None:
        return
    shown = f"{traits['top_logprobs']:,} logprobs at each position"
    shown += "" if traits["is_limited"] else ", as many as were requested"
    named = "token ids" if traits["takes_token_ids"] else "text"
    yield f"serves {traits['served_model']} at {traits['endpoint']}: shows {shown}, takes {named}"
    scoring = {
        None: "does not score a given text",
        "echo_shifted": "scores a given text (echo, one place late)",
    }.get(traits["scoring"], f"scores a given text ({traits['scoring']})")
    bias = {
        None: "takes no logit_bias",
        "hidden": "takes logit_bias, and shows logprobs without it",
        "shown": "takes logit_bias, and shows logprobs with it",
    }[traits["bias"]]
    yield f"{scoring}; {bias}"
    if traits["continues"] is not None:
        yield (
            "continues a partial answer"
            if traits["continues"]
            else "does not continue a partial answer, so only its first token can be steered"
        )
