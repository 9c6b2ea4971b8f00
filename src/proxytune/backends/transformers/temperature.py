"""Attention temperatures that grow with a token's position: Llama 4's, counted per row.

In its layers without rotary embeddings, Llama 4 scales queries by a function of their position (Nakanishi
2025, arXiv:2501.19399). transformers counts that position in slots of the cache, with padding and gaps, so
a row's logits would depend on its neighbours.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS: ContextVar[Tensor | None] = ContextVar("positions", default=None)
"""The positions of the current forward's tokens, `[batch, num_new]`; None leaves them to transformers."""


class _Unknown:
    """True where positions are unknown: then the layer scales its queries itself."""

    def __bool__(self) -> bool:
        return POSITIONS.get() is None


def scale_queries_by_position(model: nn.Module) -> None:
    """Make layers with an attention temperature take positions from `POSITIONS`."""
    for module in model.modules():
        layer: Any = module
        is_tuned = getattr(layer, "attn_temperature_tuning", None)
        if is_tuned is None or isinstance(is_tuned, _Unknown) or not is_tuned or layer.use_rope:
            continue
        layer.attn_temperature_tuning = _Unknown()
        layer.q_proj.register_forward_hook(_scaling(layer.floor_scale, layer.attn_scale))


def _scaling(floor_scale: float, attn_scale: float) -> Any:
    """Return a hook that scales queries, `[batch, num_new, heads * size]`."""

    def scale(module: nn.Module, inputs: Any, queries: Tensor) -> Tensor | None:
        positions = POSITIONS.get()
        if positions is None:
            return None
        steps = torch.floor((positions.to(queries.device).float() + 1.0) / floor_scale)
        scales = torch.log1p(steps) * attn_scale + 1.0
        return (queries * scales[..., None]).to(queries.dtype)

    return scale
