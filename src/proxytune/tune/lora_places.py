"""Where in a small model a LoRA adapter is put: which layers, and which linear modules in them."""

from __future__ import annotations

from typing import Any

from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.cut import cut_keep
from proxytune.errors import AdapterMismatch
from proxytune.tune.settings import TuneSettings


def lora_places(settings: TuneSettings, small: Checkpoint) -> dict[str, Any]:
    """Return the options of PEFT's `LoraConfig` that say where an adapter is put.

    A cut gets its adapter behind the bridge: trained there it steered best (docs/design/0010).

    Args:
        settings: The run's settings.
        small: The model to tune.

    Raises:
        AdapterMismatch: The model does not have the layers or the modules named.
    """
    known = {name.rpartition(".")[2] for name in small.linear_shapes}
    for target in settings.lora_targets:
        if target not in known:
            raise AdapterMismatch(
                f"{small.name} has no linear layer {target!r} to put an adapter on; it has "
                f"{', '.join(sorted(known))}.\nhint: leave out --lora-targets to adapt all of them"
            )
    layers = _layers(settings, small)
    if layers is None:
        return {"target_modules": list(settings.lora_targets) or "all-linear"}
    # PEFT takes no "all-linear" beside numbers of layers.
    inner = {name.rpartition(".")[2] for name in small.linear_shapes if ".layers." in name}
    return {
        "target_modules": list(settings.lora_targets) or sorted(inner),
        "layers_to_transform": layers,
    }


def _layers(settings: TuneSettings, small: Checkpoint) -> list[int] | None:
    """Return the indices of the layers that get an adapter; None for all."""
    if settings.lora_layers is None:
        keep = cut_keep(small.config)
        return None if keep is None else list(keep.suffix)
    if settings.lora_layers == "all":
        return None
    first, _, last = settings.lora_layers.partition("-")
    start, stop = int(first), int(last or first)
    num_layers = int(small.config.get_text_config(decoder=True).num_hidden_layers)
    if not start <= stop < num_layers:
        raise AdapterMismatch(
            f"--lora-layers is {settings.lora_layers}, and {small.name} has the layers 0 to "
            f"{num_layers - 1}.\nhint: give the first and the last layer, such as 0-{num_layers - 1}"
        )
    return list(range(start, stop + 1))
