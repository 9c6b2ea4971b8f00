"""LoRA adapters as rows of one forward: each row of a batch has its own adapter, or none.

A `RowModule` stands in for each module that an adapter changes. It runs the module for all rows, and then
changes the output of the rows with adapters, in one of these ways:

- most change the output of a linear layer or embedding a little (`_Affine`): LoRA, DoRA, biases;
- trained tokens replace some rows of the embedding or some logits (`_Tokens`);
- whatever replaces whole parameters is a module of its own (`_Own`).

PEFT's layers can do most of this too, but with a dozen small steps per layer and call, which take longer than
the products for a small model's token. They stay in a model that is handed over with them, and are told the
rows (`give_rows_to_peft`). What adapters make of weights is in `checkpoints/merge.py`.
"""

from __future__ import annotations

import copy
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from proxytune.checkpoints.merge import ModuleWeights, from_hook, value_of
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


class RowModule(nn.Module):
    """A module whose rows may each have an adapter.

    Args:
        base_layer: The module for rows without one. Models may ask this module for its attributes.
        changes: What each adapter that changes it does, by PEFT's names.
    """

    def __init__(self, base_layer: nn.Module, changes: Mapping[str, Sequence[_Change]]) -> None:
        super().__init__()
        self.base_layer = base_layer
        # A list, so that `model.to` finds them; not by name, because names may contain dots.
        self.changes = nn.ModuleList(
            steps[0] if len(steps) == 1 else _InTurn(steps) for steps in changes.values()
        )
        self._changes: dict[str, Any] = dict(zip(changes, self.changes, strict=True))

    def __getattr__(self, name: str) -> Any:
        """Return the module's attribute: models ask a linear layer for its `weight` or `out_features`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, input: Tensor) -> Tensor:
        """Return the module's output, changed by each row's adapter, `[batch, ..., outputs]`."""
        base: Any = self._modules["base_layer"]  # looked up by name, it would cost a search
        output: Tensor = base(input)
        adapters = ROW_ADAPTERS.get()
        if adapters is None or not adapters.groups:
            return output
        num_axes = input.dim()
        if input.shape[0] != len(adapters.names) or (
            num_axes < 3 and (num_axes < 2 or input.is_floating_point())
        ):
            raise _other_rows(input, adapters)
        if "_hf_hook" in base.__dict__:  # layers may be spread over devices
            input = input.to(output.device)
        changes = self._changes
        for name, rows in adapters.groups:
            change = changes.get(name)
            if change is None:
                continue
            if isinstance(rows, slice):
                change.apply_to(output[rows], input[rows])
            else:
                rows = rows.to(output.device)
                part, own = output.index_select(0, rows), input.index_select(0, rows)
                change.apply_to(part, own)
                output.index_copy_(0, rows, part)
        return output


def _other_rows(input: Tensor, adapters: RowAdapters) -> UnsupportedModel:
    return UnsupportedModel(
        f"a LoRA adapter changes a layer that sees {input.shape[0]} rows while the batch has "
        f"{len(adapters.names)}, so it is unknown which row has which adapter\n"
        "hint: merge the adapter into a copy of its model and give that as the expert's model"
    )


class _Change(nn.Module, ABC):
    """What an adapter does to the rows of a module's output."""

    @abstractmethod
    def apply_to(self, output: Tensor, input: Tensor) -> None:
        """Change `output`, `[rows, ..., outputs]`, in place; `input` is what the module got for it."""


class _InTurn(_Change):
    """Several changes, one after another."""

    def __init__(self, steps: Sequence[_Change]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def apply_to(self, output: Tensor, input: Tensor) -> None:
        steps: Any = self.steps
        for step in steps:
            step.apply_to(output, input)


class _Affine(_Change):
    """`output * gain + input @ down.T @ up.T + shift`; an embedding looks its input up in `down`.

    Args:
        down: `[rank, inputs]`, of an embedding `[tokens, rank]`; None together with `up` for no product.
        up: `[outputs, rank]`, with the scale.
        gain: `[outputs]`, of DoRA.
        shift: `[outputs]`, of biases.
    """

    def __init__(
        self,
        down: Tensor | None,
        up: Tensor | None,
        *,
        is_lookup: bool = False,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("down", down), ("up", up), ("gain", gain), ("shift", shift)):
            fixed = None if value is None else nn.Parameter(value, requires_grad=False)
            self.register_parameter(name, fixed)
        self._is_lookup = is_lookup

    def apply_to(self, output: Tensor, input: Tensor) -> None:
        own = self._parameters  # looked up by name, each would cost a search
        down, up, gain, shift = own["down"], own["up"], own["gain"], own["shift"]
        if gain is not None:
            output.mul_(gain)
        if down is not None and up is not None:
            if self._is_lookup:
                low = functional.embedding(input, down).flatten(0, -2)
            else:
                low = input.reshape(-1, input.shape[-1])
                if low.dtype != down.dtype:
                    low = low.to(down.dtype)
                low = torch.mm(low, down.t())
            flat = output.view(-1, output.shape[-1])
            if output.dtype == up.dtype:
                flat.addmm_(low, up.t())
            else:
                flat += torch.mm(low, up.t()).to(output.dtype)
        if shift is not None:
            output.add_(shift)


class _Tokens(_Change):
    """Trained rows of an embedding, or of an output head.

    Args:
        token_ids: `[tokens]`.
        rows: `[tokens, hidden]`.
        num_tokens: Number of tokens of an embedding; None for a head.
        bias: The head's, `[vocab]`.
    """

    def __init__(
        self, token_ids: Tensor, rows: Tensor, *, num_tokens: int | None, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows, requires_grad=False)
        places = token_ids
        if num_tokens is not None:
            places = torch.full((num_tokens,), -1, device=rows.device)
            places[token_ids] = torch.arange(len(token_ids), device=rows.device)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("bias", None if bias is None else bias[token_ids], persistent=False)
        self._is_lookup = num_tokens is not None

    def apply_to(self, output: Tensor, input: Tensor) -> None:
        places: Any = self.places
        bias: Any = self.bias
        if self._is_lookup:
            found = places[input]
            own = functional.embedding(found.clamp(min=0), self.rows).to(output.dtype)
            output.copy_(torch.where((found >= 0)[..., None], own, output))
            return
        logits = functional.linear(input.to(self.rows.dtype), self.rows, bias)
        output.index_copy_(-1, places, logits.to(output.dtype))


class _Own(_Change):
    """A module of the adapter's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def apply_to(self, output: Tensor, input: Tensor) -> None:
        output.copy_(self.module(input))


# Adapters onto modules -------------------------------------------------------------------------------


def put_rows_on(model: Any, adapters: Mapping[str, Mapping[str, ModuleWeights]]) -> None:
    """Put a `RowModule` in the place of each module that an adapter changes.

    Args:
        model: A model of transformers, with its weights.
        adapters: What each adapter makes of each module, by the names that rows will have.

    Raises:
        UnsupportedModel: Weights that have to be known are quantised, or not in memory.
    """
    names = dict.fromkeys(name for modules in adapters.values() for name in modules)
    for name in names:
        base = model.get_submodule(name)
        changes = {
            key: _changes(name, base, own[name], model.dtype)
            for key, own in adapters.items()
            if name in own
        }
        changes = {key: steps for key, steps in changes.items() if steps}
        if changes:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, RowModule(base, changes))


def _changes(name: str, base: Any, own: ModuleWeights, dtype: torch.dtype) -> list[_Change]:
    """Return what an adapter does to the output of a module."""
    replaced = set(own.parameters)
    if own.is_weight_copied and _is_same(_value(name, base, "weight"), own.parameters["weight"]):
        replaced.remove("weight")
    scale = _embedding_scale(base)
    if replaced - {"bias"} or own.stacked or not own.is_linear or scale is None:
        return [_Own(_own_module(name, base, own))]
    steps: list[_Change] = []
    is_lookup = isinstance(base, nn.Embedding)
    has_bias = getattr(base, "bias", None) is not None
    bias = _value(name, base, "bias") if has_bias else None
    like = _like(base, dtype)
    down = up = gain = None
    if own.product is not None:
        down, up = own.product.down, own.product.up * (own.product.scale * scale)
        if own.magnitude is not None:
            gain = own.gain(_weight(base, own.is_inputs_first))
            assert gain is not None
            up = up * gain[:, None]
        if is_lookup:
            down = _with_rows(down.t(), base.num_embeddings)
        else:
            num_outputs = _num_outputs(base)
            up = _with_rows(up, num_outputs)
            gain = None if gain is None else _with_rows(gain, num_outputs, 1.0)
    shift = None
    if (
        "bias" in replaced
        or own.product_bias is not None
        or (gain is not None and bias is not None)
    ):
        own_bias = 0.0 if bias is None else bias.detach().to("cpu", torch.float32)
        shift = own.merged("bias", bias) - own_bias * (1.0 if gain is None else gain)
    parts = [
        None if part is None else part.to(like).contiguous() for part in (down, up, gain, shift)
    ]
    if any(part is not None for part in parts):
        steps.append(_Affine(*parts[:2], is_lookup=is_lookup, gain=parts[2], shift=parts[3]))
    if own.token_ids is not None and own.token_rows is not None and len(own.token_ids):
        num_tokens = base.num_embeddings if is_lookup else None
        ids, rows = own.token_ids.to(like.device), (own.token_rows * scale).to(like)
        bias = None if bias is None else bias.to(like)
        steps.append(_Tokens(ids, rows, num_tokens=num_tokens, bias=bias))
    return steps


def _is_same(own: Tensor, copied: Tensor) -> bool:
    """Return whether a weight is the one that an adapter has a copy of, but for added rows."""
    num_rows = min(len(own), len(copied))
    return torch.equal(own[:num_rows].cpu(), copied[:num_rows].to(own.dtype))


def _value(name: str, base: Any, parameter: str) -> Tensor:
    """Return a module's parameter, also if it is kept elsewhere until it is needed.

    Raises:
        UnsupportedModel: It is quantised.
    """
    value = value_of(base, parameter)
    if type(value.data) is not Tensor or not value.is_floating_point():
        raise UnsupportedModel(
            f"an adapter replaces weights of {name}, which is quantised\n"
            "hint: leave the quantization of the small model out"
        )
    return value


def _own_module(name: str, base: Any, own: ModuleWeights) -> nn.Module:
    """Return a copy of a module with an adapter's weights, which shares all others."""
    shared = {id(parameter): parameter for parameter in base.parameters()}
    hook: Any = getattr(base, "_hf_hook", None)
    if hook is not None:
        shared[id(hook)] = hook  # with all weights that are kept elsewhere
    module: Any = copy.deepcopy(base, shared)
    if hook is not None:
        importlib.import_module("accelerate.hooks").remove_hook_from_module(module)
    given = {key: _value(name, base, key) for key, _ in base.named_parameters(recurse=False)}
    for parameter in own.names:
        like = _like(base, next(iter(given.values())).dtype)
        value = own.merged(parameter, given.get(parameter)).to(like).contiguous()
        setattr(module, parameter, nn.Parameter(value, requires_grad=False))
    own_module: nn.Module = module
    return own_module


def _embedding_scale(base: nn.Module) -> float | None:
    """Return by what a module multiplies what it looks up; None if that is unknown."""
    if not isinstance(base, nn.Embedding) or type(base) is nn.Embedding:
        return 1.0
    scale: Any = getattr(base, "embed_scale", None)  # PEFT looks for it by this name, too
    return None if scale is None else float(scale)


def _num_outputs(base: Any) -> int:
    return int(base.nf if hasattr(base, "nf") else base.out_features)  # `nf` of GPT-2's Conv1D


def _like(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor of the dtype and on the device in which a module computes."""
    weight: Any = getattr(base, "weight", None)
    device = None if weight is None else weight.device
    if device is None or device.type == "meta":
        device = from_hook(base, "execution_device")
    if weight is not None and weight.is_floating_point():
        dtype = weight.dtype
    return torch.empty(0, dtype=dtype, device=device)


@torch.no_grad()
def _weight(base: Any, is_inputs_first: bool) -> Tensor:
    """Return a linear layer's or embedding's weight, float32; of a quantised one, what it multiplies by."""
    if type(base.weight.data) is Tensor and base.weight.is_floating_point():
        return _value("", base, "weight").detach().to("cpu", torch.float32)
    like = _like(base, torch.float32)
    found: Tensor = base(torch.eye(base.in_features, dtype=like.dtype, device=like.device))
    if base.bias is not None:
        found = found - base.bias
    found = found.to("cpu", torch.float32)
    return found if is_inputs_first else found.t()


def _with_rows(value: Tensor, num_rows: int, filling: float = 0.0) -> Tensor:
    """Return the first rows of a tensor, or all of them and more filled with a number."""
    missing = num_rows - len(value)
    if missing <= 0:
        return value[:num_rows]
    return torch.cat((value, value.new_full((missing, *value.shape[1:]), filling)))


# Models that are handed over with PEFT's layers ------------------------------------------------------


def give_rows_to_peft(model: nn.Module) -> bool:
    """Make PEFT's layers take their rows' adapters from `ROW_ADAPTERS`; return whether a model has any."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return False
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for layer in model.modules():
        module: Any = layer
        if getattr(module, "_proxytune_rows", False):
            continue
        if isinstance(layer, LoraLayer):
            module.register_forward_pre_hook(_add_rows, with_kwargs=True)
            module._proxytune_rows = True
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            module._proxytune_forward = module.forward
            module.forward = MethodType(_forward_saved, module)
            module._proxytune_rows = True
    return True


def _add_rows(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    rows = ROW_ADAPTERS.get()
    return None if rows is None else (args, {**kwargs, "adapter_names": rows.names})


def _forward_saved(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Run PEFT's wrapper of a module that adapters have copies of (`modules_to_save`), or tokens of.

    PEFT cannot run rows with different adapters in each kind of module, nor if only some have a copy.
    """
    adapters = ROW_ADAPTERS.get()
    if adapters is None or wrapper.disable_adapters:
        return wrapper._proxytune_forward(*args, **kwargs)

    def run(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == PLAIN:
            return wrapper.original_module(*args, **kwargs)
        if "modules_to_save" in wrapper._modules:
            return wrapper.modules_to_save[name](*args, **kwargs)
        return wrapper.token_adapter.forward_adapters(*args, active_adapters=[name], **kwargs)

    known = wrapper._get_available_adapters()
    names = {name if name in known else PLAIN for name in adapters.names}
    if len(names) == 1:
        return run(names.pop(), *args, **kwargs)
    output = run(PLAIN, *args, **kwargs) if len(args) == 1 and not kwargs else None
    if not isinstance(output, Tensor):
        raise UnsupportedModel(
            f"an adapter has its own copy of a {type(wrapper.original_module).__name__}, which gets more "
            "than the rows of one tensor, so rows with different adapters cannot run together\n"
            "hint: give the adapter's files instead of a PEFT model"
        )
    (input,) = args
    if input.shape[0] != len(adapters.names):
        raise _other_rows(input, adapters)
    for name, rows in adapters.groups:
        if name in known:
            part = input[rows]
            token = ROW_ADAPTERS.set(RowAdapters([name] * len(part), part.device))
            try:
                output[rows] = run(name, part).to(output)
            finally:
                ROW_ADAPTERS.reset(token)
    return output
