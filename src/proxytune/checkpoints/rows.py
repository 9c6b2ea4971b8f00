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
        if func in _ASKING and args[0].is_meta:
            return True if func is Tensor.__bool__ else 1
        return func(*args, **(kwargs or {}))


_ASKING = (Tensor.__bool__, Tensor.item, Tensor.__int__, Tensor.__index__)


def modules_of_rows(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules whose one input and one output have the batch as their first axis.

    Args:
        model: A causal language model on the `meta` device; it is left as it was.

    Returns:
        No names at all if the model cannot be run without values.
    """
    found: dict[str, bool] = {}

    def watch(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                output = forward(*args, **kwargs)
            except Exception:
                # Some kernels need values, such as which expert is chosen. The rest depends on shapes alone.
                if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
                    raise
                output = torch.empty_like(args[0])
                found[name] = False
            is_simple = len(args) == 1 and not kwargs
            is_one = is_simple and _has_rows(args[0]) and _has_rows(output)
            found[name] = found.get(name, True) and is_one
            return output

        return watched

    modules = list(model.named_modules())
    token_ids = torch.zeros(_NUM_ROWS, _NUM_TOKENS, dtype=torch.long, device="meta")
    try:
        for name, module in modules:
            module.forward = watch(name, module.forward)
        # Some hybrid models do not make their own cache.
        for options in ({}, {"use_cache": False}):
            found.clear()
            with suppress(Exception), torch.inference_mode(), _AnyValue():
                model.eval()(input_ids=token_ids, **options)
                return frozenset(name for name, is_one in found.items() if is_one)
    finally:
        for _, module in modules:
            module.__dict__.pop("forward", None)
    return frozenset()


def _has_rows(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.shape[:1] != (_NUM_ROWS,):
        return False
    # Two axes are enough for token ids; hidden states without an axis for tokens may be flattened.
    return value.dim() >= (3 if value.is_floating_point() else 2)
