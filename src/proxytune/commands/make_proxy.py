"""`proxytune make-proxy`: a small model cut out of a large one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from proxytune.commands.app import command
from proxytune.commands.console import json_line, print_text, say
from proxytune.commands.flags import Pick
from proxytune.commands.options import AS_JSON, GrantOptions, argument
from proxytune.cut.settings import CutSettings
from proxytune.settings import option


@dataclass(frozen=True, kw_only=True)
class PrintOptions:
    """How the result is printed."""

    as_json: bool = option(False, AS_JSON)


@command(
    "proxytune make-proxy large-model --keep 3+3 --output my-proxy",
    name="make-proxy",
)
def make_proxy(
    base: Annotated[
        str,
        argument(
            "BASE",
            "The large model: its directory, a .gguf file, package:NAME/PATH, or its id on the Hugging Face "
            "Hub",
        ),
    ],
    settings: CutSettings,
    options: PrintOptions,
    rights: Annotated[GrantOptions, Pick(leave_out=("key_env",))],
) -> None:
    """Cut a small model out of a large one, for families without a small sibling.

    The small model has the first and last layers of the large one, and between them a bridge: a layer that
    predicts linearly, fitted to text in closed form, what the layers left out would have added. It is an
    ordinary model of the same architecture, to be tuned with `proxytune tune --anti-expert`.

    Llama, Mistral, Qwen2, Qwen3 and Gemma (1) models can be cut; others are refused by name.
    """
    from proxytune.cut.run import make_proxy as run

    result = run(base, settings, grants=rights.grants(), say=say)
    if options.as_json:
        print_text(json_line(result.to_dict()))
        return
    scores = ", ".join(f"{name} {value:.1f}" for name, value in result.perplexity.items())
    say(f"perplexity on {result.num_test_tokens:,} held-out tokens: {scores}")
    print_text(result.directory)
