"""Steer a large language model with a small tuned one, token by token, without touching its weights.

    from proxytune import ProxyTuned, SamplingParams

    model = ProxyTuned.load("my-recipe")
    print(model.generate("Once upon a time", SamplingParams(max_new_tokens=64)).text)

The formula is `proxytune.steer`; `docs/architecture.md` lists the modules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from proxytune.integrations import register_with_transformers

if TYPE_CHECKING:
    from proxytune.backends.api_client import Budget
    from proxytune.model import Choice, Conversation, ProxyTuned
    from proxytune.recipe import ApiSettings, ExpertSpec, LlamaCppSettings, ModelSpec, Recipe
    from proxytune.request import Message, Request, SamplingParams
    from proxytune.score import ScoreReport
    from proxytune.speculative import Drafting
    from proxytune.trace import Step, Trace, Usage

__all__ = [
    "ApiSettings",
    "Budget",
    "Choice",
    "Conversation",
    "Drafting",
    "ExpertSpec",
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
    "ApiSettings": "recipe",
    "Budget": "backends.api_client",
    "Choice": "model",
    "Conversation": "model",
    "Drafting": "speculative",
    "ExpertSpec": "recipe",
    "LlamaCppSettings": "recipe",
    "Message": "request",
    "ModelSpec": "recipe",
    "ProxyTuned": "model",
    "Recipe": "recipe",
    "Request": "request",
    "SamplingParams": "request",
    "ScoreReport": "score",
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
