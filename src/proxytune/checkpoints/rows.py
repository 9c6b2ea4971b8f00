"""What adapters have to know of a model, found out without its weights: names, shapes, who gets whose rows.

Rows of one forward can have different adapters only in a module that sees each row of the batch as a row of
its input. Most layers do. Some do not: the experts of a mixture get the tokens of all rows in one list, and
some models flatten rows before a layer. So the model without values reads a batch of token ids on torch's
`meta` device, and each module's input is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from proxytune.checkpoints.changes import Layout

_NUM_ROWS, _NUM_TOKENS = 5, 7
"""Sizes that no other axis of a model has by chance."""


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of a causal language model."""
    from transformers.pytorch_utils import Conv1D

    names: dict[int, str] = {}
    parameters: dict[str, dict[str, tuple[int, ...]]] = {}
    linear, inputs_first, transposed = set(), set(), set()
    for name, module in model.named_modules():
        names[id(module)] = name
        own = dict(module.named_parameters(recurse=False))
        parameters[name] = {key: tuple(parameter.shape) for key, parameter in own.items()}
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            linear.add(name)
        if isinstance(module, (Conv1D, nn.Embedding)):
            inputs_first.add(name)
        if getattr(module, "is_transposed", False) is True:
            transposed.add(name)
    any_model: Any = model
    embedding, head = any_model.get_input_embeddings(), any_model.get_output_embeddings()
    return Layout(
        parameters,
        frozenset(linear),
        frozenset(inputs_first),
        names.get(id(embedding)),
        names.get(id(head)),
        bool(getattr(any_model.config.get_text_config(decoder=True), "tie_word_embeddings", False))
        and isinstance(head, nn.Linear),
        frozenset(transposed),
    )


class _AnyValue(TorchFunctionMode):
    """Lets tensors without values answer questions about these, such as whether all tokens count: they do."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return func(*args, **options)
        if func in _ANSWERS:
            return _ANSWERS[func]
        if func is Tensor.tolist:
            return torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu").tolist()
        if func in (torch.nonzero, Tensor.nonzero):
            places = _places(args[0])
            return places if options.get("as_tuple") else torch.stack(places, dim=-1)
        if func is torch.where and len(args) == 1 and not options:
            return _places(args[0])
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(args[0], _without_masks(args[1]), *args[2:])
        if func in (torch.split, Tensor.split) and len(args) > 1 and isinstance(args[1], list):
            dim = options.get("dim", args[2] if len(args) > 2 else 0)
            return func(args[0], _sizes(args[1], args[0].shape[dim]), dim)
        return func(*args, **options)


_ANSWERS: Mapping[Any, Any] = {
    Tensor.__bool__: True,
    Tensor.item: 1,
    Tensor.__int__: 1,
    Tensor.__index__: 1,
    Tensor.__contains__: False,  # transformers looks for padding among the token ids
}


def _places(mask: Tensor) -> tuple[Tensor, ...]:
    """Return where a mask holds, for each axis: everywhere but in one place, so that a choice is no batch."""
    num_places = max(mask.numel() - 1, 0)
    return (torch.empty(num_places, dtype=torch.long, device="meta"),) * mask.dim()


def _without_masks(index: Any) -> Any:
    """Return an index with the places of each mask instead of the mask."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts):
        return index
    found: list[Any] = []
    for part in parts:
        is_mask = isinstance(part, Tensor) and part.dtype == torch.bool
        found += _places(part) if is_mask else (part,)
    return tuple(found)


def _sizes(given: list[int], total: int) -> list[int]:
    """Return sizes that add up to a total: if they came from no values, the first is whatever is left."""
    rest = total - sum(given[1:])
    return [rest, *given[1:]] if given and rest >= 0 else given


def modules_of_rows(model: nn.Module) -> dict[str, bool]:
    """Return by name whether a module's one input and one output have the batch as their first axis.

    Args:
        model: A causal language model on the `meta` device; it is left as it was.

    Returns:
        Modules of which that is unknown are left out, and so are modules that never run. Nothing at all if
        the model cannot be run without values.
    """
    found: dict[str, bool | None] = {}

    def watch(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            is_failed = False
            try:
                output = forward(*args, **kwargs)
            except Exception:
                # Some kernels need values, such as which expert is chosen. The rest depends on shapes alone.
                if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
                    raise
                output, is_failed = torch.empty_like(args[0]), True
            is_simple = len(args) == 1 and not kwargs
            is_one: bool | None = is_simple and _has_rows(args[0]) and _has_rows(output)
            if is_failed and is_one:
                is_one = None  # the output is made up
            before = found.get(name, True)
            found[name] = False if False in (before, is_one) else before and is_one
            return output

        return watched

    modules = list(model.named_modules())
    trained = [module for _, module in modules if module.training]
    token_ids = torch.zeros(_NUM_ROWS, _NUM_TOKENS, dtype=torch.long, device="meta")
    try:
        for name, module in modules:
            module.forward = watch(name, module.forward)
        # Some hybrid models do not make their own cache.
        for options in ({}, {"use_cache": False}):
            found.clear()
            with suppress(Exception), torch.inference_mode(), _AnyValue():
                model.eval()(input_ids=token_ids, **options)
                return {name: is_one for name, is_one in found.items() if is_one is not None}
    finally:
        for _, module in modules:
            module.__dict__.pop("forward", None)
        for module in trained:
            module.training = True
    return {}


def _has_rows(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.shape[:1] != (_NUM_ROWS,):
        return False
    # Two axes are enough for token ids; hidden states without an axis for tokens may be flattened.
    return value.dim() >= (3 if value.is_floating_point() else 2)
