"""One server: what it shows and takes, and one question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MOST_TOP_LOGPROBS = 100
"""Seen tokens per position where the recipe does not say; more make answers long and certify little more."""

LADDER = (20, 5, 1)
"""What is tried where a server shows fewer: most have one of these limits."""

PROBES = ("the quick brown fox jumps over the lazy", "once upon a time", "a b c d e f g")
"""Short prompts to find out what a server shows; several, since a base may end a text at once."""

FORCING_BIAS = 100.0
"""Most that the API allows; it leaves nothing else to choose."""


@dataclass(frozen=True, slots=True)
class ApiTraits:
    """What a server shows and takes.

    Args:
        served_model: What it calls the model.
        endpoint: `completions` or `chat`.
        top_logprobs: Tokens that it shows at each position, of those asked for.
        is_limited: Whether more were asked for.
        takes_token_ids: Whether a prompt may be token ids, and tokens are named by them.
        scoring: How it tells the positions of a given text; `echo_shifted` is one place late.
        bias: Whether `logit_bias` changes the logprobs that are reported, or only what is chosen.
        continues: Whether a chat answer that was begun is continued; None for completions.
    """

    served_model: str
    endpoint: Literal["completions", "chat"]
    top_logprobs: int
    is_limited: bool
    takes_token_ids: bool
    scoring: Literal["prompt_logprobs", "echo", "echo_shifted"] | None
    bias: Literal["shown", "hidden"] | None
    continues: bool | None
