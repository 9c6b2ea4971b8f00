"""A cut of a model that is in memory: layers, embedding and head are the model's own, the bridge is new."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from proxytune.checkpoints.cut import Keep, base_names


def cut_model(base: Any, config: Any, keep: Keep) -> Any:
    """Return a cut of a loaded model that shares its modules, so that no weight is copied.

    What is shared are the modules without children of their own: linear layers, norms and embeddings. So an
    adapter on the cut changes nothing in `base`, and weights that are packed later are packed once. The
    attention modules are new, because each knows its place in the KV cache.

    Args:
        base: A causal language model of transformers, of a kind in `ARCHITECTURES`.
        config: The config of the cut (`cut_config`).
        keep: Which layers are kept.

    Returns:
        A model in evaluation mode. The bridge's weights are zero, in the dtype and on the device of the
        layer before it.
    """
    with torch.device("meta"), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=base.config._attn_implementation
        )
    leaves = [name for name, module in model.named_modules() if not any(module.children())]
    places = base_names(leaves, keep, len(base.model.layers))
    for name in leaves:
        if name in places:
            parent, _, child = name.rpartition(".")
            own: nn.Module = base.get_submodule(places[name])
            # What has no weights may keep state of its own, such as rotary angles.
            own = own if any(True for _ in own.parameters()) else copy.deepcopy(own)
            setattr(model.get_submodule(parent), child, own)
    before = base.model.layers[keep.first - 1]
    like = next(p for p in before.parameters() if p.is_floating_point())
    bridge = model.model.layers[keep.bridge]
    bridge.to_empty(device=like.device).to(like.dtype)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.zero_()
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, left
    model.requires_grad_(False)
    return model.eval()


def bridge_state(model: Any, keep: Keep) -> dict[str, torch.Tensor]:
    """Return the bridge's weights by their names in the cut, without those that are zero everywhere."""
    prefix = f"model.layers.{keep.bridge}."
    layer: nn.Module = model.model.layers[keep.bridge]
    return {
        prefix + name: value.detach()
        for name, value in layer.state_dict().items()
        if bool((value != 0).any())
    }
