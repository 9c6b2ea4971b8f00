"""Steer a large language model with a small tuned one, token by token, without touching its weights.

    from proxytune import ProxyTuned, SamplingParams

    model = ProxyTuned.load("my-recipe")
    print(model.generate("Once upon a time", SamplingParams(max_new_tokens=64)).text)

The formula is `proxytune.logits.steer`; `docs/architecture.md` lists the modules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from proxytune.integrations import register_with_transformers

if TYPE_CHECKING:
    from proxytune.backends.api.client import Budget
    from proxytune.decode.speculative import Drafting
    from proxytune.measure.given import Choice
    from proxytune.measure.score import ScoreReport
    from proxytune.model import Conversation, ProxyTuned
    from proxytune.recipe.recipe import Recipe
    from proxytune.recipe.spec import (
        ApiSettings,
        ExpertSpec,
        ExpertWeights,
        LlamaCppSettings,
        ModelSpec,
    )
    from proxytune.request import Message, Request, SamplingParams
    from proxytune.trace import Step, Trace, Usage

__all__ = [
    "ApiSettings",
    "Budget",
    "Choice",
    "Conversation",
    "Drafting",
    "ExpertSpec",
    "ExpertWeights",
    "LlamaCppSettings",
    "Message",
    "ModelSpec",
    "ProxyTuned",
    "Recipe",
    "Request",
    "SamplingParams",
    "ScoreReport",
    "Step",
    "Trace",
    "Usage",
]

_HOMES = {
    "ApiSettings": "recipe.spec",
    "Budget": "backends.api.client",
    "Choice": "measure.given",
    "Conversation": "model",
    "Drafting": "decode.speculative",
    "ExpertSpec": "recipe.spec",
    "ExpertWeights": "recipe.spec",
    "LlamaCppSettings": "recipe.spec",
    "Message": "request",
    "ModelSpec": "recipe.spec",
    "ProxyTuned": "model",
    "Recipe": "recipe.recipe",
    "Request": "request",
    "SamplingParams": "request",
    "ScoreReport": "measure.score",
    "Step": "trace",
    "Trace": "trace",
    "Usage": "trace",
}

register_with_transformers()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'proxytune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"proxytune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
