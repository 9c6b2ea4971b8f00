"""Where in a small model a LoRA adapter is put: which layers, and which linear modules in them."""

from __future__ import annotations

from typing import Any

from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.cut import cut_keep
from proxytune.errors import AdapterMismatch
from proxytune.tune.settings import TuneSettings


def lora_places(settings: TuneSettings, small: Checkpoint) -> dict[str, Any]:
    """Return the options of PEFT's `LoraConfig` that say where an adapter is put.

    All layers of a cut get one, the bridge too, for that steered best (docs/design/0010). Only the bridge's
    attention gets none: its values and its output are zero, and so are an adapter's `up` matrices at the
    start, so no gradient would ever reach it.

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
    keep = cut_keep(small.config)
    idle = [] if keep is None else [n for n in small.linear_shapes if keep.is_idle(n)]
    if keep is not None and layers == [keep.bridge]:
        idle_targets = {name.rpartition(".")[2] for name in idle}
        if settings.lora_targets and idle_targets.issuperset(settings.lora_targets):
            raise AdapterMismatch(
                f"--lora-layers is {settings.lora_layers}, the bridge of {small.name}, whose attention is "
                f"zero, so adapters on {', '.join(settings.lora_targets)} could not be trained there.\n"
                "hint: leave --lora-layers or --lora-targets out"
            )
    places: dict[str, Any] = {"exclude_modules": idle} if idle else {}
    if layers is None:
        return {"target_modules": list(settings.lora_targets) or "all-linear", **places}
    # PEFT takes no "all-linear" beside numbers of layers.
    inner = {name.rpartition(".")[2] for name in small.linear_shapes if ".layers." in name}
    return {
        "target_modules": list(settings.lora_targets) or sorted(inner),
        "layers_to_transform": layers,
        **places,
    }


def _layers(settings: TuneSettings, small: Checkpoint) -> list[int] | None:
    """Return the indices of the layers that get an adapter; None for all."""
    if settings.lora_layers in (None, "all"):
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
