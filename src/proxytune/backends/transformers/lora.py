"""LoRA adapters as rows of one forward: each row of a batch has its own adapter, or none.

PEFT's layers can do this too, but with a dozen small steps per layer and call, which take longer than the
products for a small model's token. `RowLora` replaces PEFT's layer if it knows the layer underneath.
Otherwise (quantised layers, layers that are moved between devices) PEFT's own forward is given the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from proxytune.backends.transformers.linear import FewRowsLinear, PackedLinear
from proxytune.errors import UnsupportedModel

PLAIN = "__base__"
"""PEFT's name for a row without an adapter."""


class RowAdapters:
    """Which rows of a batch run with which adapter.

    Args:
        names: PEFT's name of the adapter of each row, `PLAIN` for none.
        device: The device of the rows.
    """

    def __init__(self, names: Sequence[str], device: torch.device | None = None) -> None:
        self.names = list(names)
        places: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            if name != PLAIN:
                places.setdefault(name, []).append(row)
        self.groups: list[tuple[str, slice | Tensor]] = [
            (name, _as_slice(rows, device)) for name, rows in places.items()
        ]


def _as_slice(rows: list[int], device: torch.device | None) -> slice | Tensor:
    """Return adjacent rows as a slice, to which a product can be added in place."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


ROW_ADAPTERS: ContextVar[RowAdapters | None] = ContextVar("row_adapters", default=None)
"""The adapters of the rows of the current forward; None for no adapters at all."""


class RowLora(nn.Module):
    """A linear layer whose rows may each have an adapter.

    Args:
        layer: PEFT's layer to replace; its base layer and weights become this module's.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer = layer.base_layer
        # Lists, so that `model.to` finds them; not by name, because names may contain dots.
        self.lora_down = nn.ParameterList(
            nn.Parameter(down.weight.detach(), requires_grad=False)
            for down in layer.lora_A.values()
        )
        self.lora_up = nn.ParameterList(
            nn.Parameter(up.weight.detach() * layer.scaling[name], requires_grad=False)
            for name, up in layer.lora_B.items()
        )
        self._adapters = dict(
            zip(layer.lora_A, zip(self.lora_down, self.lora_up, strict=True), strict=True)
        )

    def __getattr__(self, name: str) -> Any:
        """Return the base layer's attribute: models ask a linear layer for its `weight` or `out_features`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, input: Tensor) -> Tensor:
        """Return the base layer's output plus that of each row's adapter, `[batch, ..., out_features]`."""
        output: Tensor = self.base_layer(input)
        adapters = ROW_ADAPTERS.get()
        if adapters is None or not adapters.groups:
            return output
        if input.shape[0] != len(adapters.names):
            raise UnsupportedModel(
                f"a LoRA adapter changes a layer that sees {input.shape[0]} rows while the batch has "
                f"{len(adapters.names)}, so it is unknown which row has which adapter\n"
                "hint: merge the adapter into a copy of its model and give that as the expert's model"
            )
        for name, rows in adapters.groups:
            if name not in self._adapters:
                continue
            down, up = self._adapters[name]
            if isinstance(rows, slice):
                _add_product(output[rows], input[rows], down, up)
            else:
                rows = rows.to(input.device)  # layers may be spread over devices
                part = torch.zeros_like(output[: len(rows)])
                _add_product(part, input.index_select(0, rows), down, up)
                output.index_add_(0, rows, part)
        return output


def _add_product(output: Tensor, input: Tensor, down: Tensor, up: Tensor) -> None:
    """Add `input @ down.T @ up.T` to `output` in place."""
    low = torch.mm(input.reshape(-1, input.shape[-1]).to(down.dtype), down.t())
    flat = output.view(-1, output.shape[-1])
    if output.dtype == up.dtype:
        flat.addmm_(low, up.t())
    else:
        flat += torch.mm(low, up.t()).to(output.dtype)


def run_rows_through_adapters(model: nn.Module, *, replace: bool) -> bool:
    """Make each LoRA layer take its rows' adapters from `ROW_ADAPTERS`; return whether there are any.

    Args:
        model: The model inside PEFT's wrapper.
        replace: Whether PEFT's layers may be replaced; the model's owner may still need them.
    """
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return False
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        if replace and _is_plain(layer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, RowLora(layer))
        elif not getattr(layer, "_proxytune_rows", False):
            module: Any = layer
            module.register_forward_pre_hook(_add_rows, with_kwargs=True)
            module._proxytune_rows = True
    return True


def _is_plain(layer: Any) -> bool:
    """Return whether a LoRA layer is two products beside a layer of ordinary weights that stay in place."""
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    base = layer.base_layer
    return (
        type(layer) is Linear
        and type(base) in (nn.Linear, FewRowsLinear, PackedLinear, Conv1D)
        and base.weight.device.type != "meta"
        and not hasattr(layer, "_hf_hook")
        and not layer.merged
        and not layer.lora_variant
        and all(up.bias is None for up in layer.lora_B.values())
    )


def _add_rows(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    rows = ROW_ADAPTERS.get()
    return None if rows is None else (args, {**kwargs, "adapter_names": rows.names})
