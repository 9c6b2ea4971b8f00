"""A cut of a model that is in memory: layers, embedding and head are the model's own, the bridge is new."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from proxytune.backends.transformers.lora import RowModule
from proxytune.checkpoints.bridge_file import Bridge
from proxytune.checkpoints.cut import Keep, base_names
from proxytune.checkpoints.cut_checkpoint import CutCheckpoint


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
            if isinstance(own, RowModule):  # experts on the base's own weights have adapters there
                own = own.base_layer
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


def cut_with_bridge(base: Any, checkpoint: CutCheckpoint) -> Any:
    """Return the cut of a loaded model that a recipe asks for; see `cut_model`.

    Raises:
        CorruptModel: The bridge cannot be read.
    """
    model = cut_model(base, checkpoint.config, checkpoint.keep)
    put_bridge(model.model.layers[checkpoint.keep.bridge], checkpoint.read_bridge())
    return model


def put_bridge(layer: Any, bridge: Bridge) -> None:
    """Write a bridge into a decoder layer, in place; its attention becomes zero and its norms neutral."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            _neutralise(norm)
        for name in ("q_norm", "k_norm"):
            if getattr(layer.self_attn, name, None) is not None:
                _neutralise(getattr(layer.self_attn, name))
        rank = len(bridge.up)
        layer.mlp.gate_proj.weight[:rank] = bridge.gate
        layer.mlp.up_proj.weight[:rank] = bridge.up
        layer.mlp.down_proj.weight[:, :rank] = bridge.down


def bridge_of(layer: Any, rank: int) -> Bridge:
    """Return the bridge that is in a decoder layer, where its first `rank` units are not zero."""
    mlp = layer.mlp
    return Bridge(
        mlp.gate_proj.weight[:rank], mlp.up_proj.weight[:rank], mlp.down_proj.weight[:, :rank]
    )


def _neutralise(norm: Any) -> None:
    """Set a norm's weight so that it only divides by the root mean square."""
    weight = norm.weight
    with torch.no_grad():
        weight.zero_()
        # Gemma's norms multiply by 1 + weight.
        is_offset = float(norm(torch.ones(1, len(weight)).to(weight))[0, 0]) > 0.5
        weight.fill_(0.0 if is_offset else 1.0)
