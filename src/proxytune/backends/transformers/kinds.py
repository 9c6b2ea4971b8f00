"""What kind of cache a model has."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn


def cache_option(model: nn.Module) -> str | None:
    """Return what a model's forward calls its cache, or None where it takes none."""
    options = inspect.signature(model.forward).parameters
    # transformers 5.24 renamed it to `cache`; code that comes with a model may not have followed.
    names = ("cache", "past_key_values", "cache_params")
    return next((name for name in names if name in options), None)


def is_pure_attention(config: Any) -> bool:
    """Whether every layer's cache is keys and values of single tokens, so that tokens can be taken back."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = transformers.DynamicCache(config=config).layers
    # By name: transformers 5.19 has no DummyLayer, for layers that use another layer's keys.
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        or type(layer).__name__ == "DummyLayer"
        for layer in layers
    )


def has_slots(config: Any) -> bool:
    """Whether a layer keeps tokens one by one, so that an attention mask tells of those before, too."""
    from transformers.cache_utils import CacheLayerMixin

    layers = transformers.DynamicCache(config=config).layers
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def allows_gaps(model: Any, config: Any) -> bool:
    """Whether attention knows tokens by `position_ids` and mask alone, not by the distance of their slots."""
    layers = transformers.DynamicCache(config=config).layers
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        return False
    # Models with distances of their own (ALiBi, local attention) do not run on the attention others share.
    return bool(getattr(model, "_supports_attention_backend", False))
