"""What kind of cache a model has, which decides what its rows can do (see `backend.py`)."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn


def cache_option(model: nn.Module) -> str | None:
    """Return the name of the cache among the arguments of a model's forward, or None if it takes none."""
    options = inspect.signature(model.forward).parameters
    # transformers 5.24 renamed it to `cache`; a model that brings its own code may still use the old names.
    names = ("cache", "past_key_values", "cache_params")
    return next((name for name in names if name in options), None)


def is_pure_attention(config: Any) -> bool:
    """Return whether every layer caches keys and values token by token, so that tokens can be taken back."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = transformers.DynamicCache(config=config).layers
    # By name: transformers 5.19 has no DummyLayer, for layers that use another layer's keys.
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        or type(layer).__name__ == "DummyLayer"
        for layer in layers
    )


def has_slots(config: Any) -> bool:
    """Return whether a layer caches token by token, so that an attention mask covers earlier tokens, too."""
    from transformers.cache_utils import CacheLayerMixin

    layers = transformers.DynamicCache(config=config).layers
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def allows_gaps(model: Any, config: Any) -> bool:
    """Return whether attention depends on `position_ids` and mask alone, not on distances between slots."""
    layers = transformers.DynamicCache(config=config).layers
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        return False
    # Models that compute distances themselves (ALiBi, local attention) do not use the shared attention.
    return bool(getattr(model, "_supports_attention_backend", False))
