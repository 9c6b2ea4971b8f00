"""The toy model of `proxytune.testing` as a stand-in for `ProxyTuned.load`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.testing import toy_model


def toy_load(
    recipe: Recipe,
    *,
    device: str | None = None,
    dtype: str | None = None,
    experts: Sequence[str] | None = None,
    budget: None = None,
    cuda_graphs: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    key_env: None = None,
    exact: bool = False,
) -> ProxyTuned:
    """Stand in for `ProxyTuned.load`: endless texts, in which every earlier token matters a little."""
    if experts is not None:
        recipe = replace(
            recipe,
            experts=tuple(e for e in recipe.experts if e.name in experts),
            default_expert=recipe.default_expert if recipe.default_expert in experts else None,
        )
    return toy_model(recipe=recipe, memory=0.5, eos_logit=-100.0, max_context=256)
