"""Linear layers in float32 on a CPU: which matrix product is fastest for few rows.

Decoding multiplies every weight by one or a few rows of activations. Torch's linear layer computes
`x @ W.T`, which is slow for few rows. `W @ x.T` gives the same numbers, to rounding, from the same weights in
as little as a third of the time. For large layers, oneDNN's product with weights laid out in blocks
(*packed*) is faster still; the packed weights replace the plain ones. The choice follows from a layer's shape
and the number of rows, never from a timing, so results do not differ between runs.
docs/design/0001-few-row-linear-layers.md has the measurements.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_ROWS = 8
"""Largest number of rows for which `W @ x.T` was faster, summed over the layers of a model."""

MIN_PACKED_SIDE = 1024
"""A layer is faster packed if it has at least this many inputs and outputs."""


class FewRowsLinear(nn.Linear):
    """`nn.Linear` that computes `W @ x.T` for few rows.

    Weights and names are those of `nn.Linear`, and so are results, to rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`, `[..., out_features]`."""
        num_rows = input.numel() // self.in_features
        if not 0 < num_rows <= MAX_ROWS:
            # Contiguous: torch would multiply the last tokens of many prompts one row at a time.
            return functional.linear(input.contiguous(), self.weight, self.bias)
        rows = input.reshape(num_rows, self.in_features)
        if num_rows == 1:
            # With one column this would be a matrix-vector product, whose kernel is slower than that for two.
            rows = torch.cat((rows, rows))
        bias: Tensor | None = self.bias
        if bias is None:
            product = torch.mm(self.weight, rows.t())
        else:
            product = torch.addmm(bias[:, None], self.weight, rows.t())
        # Contiguous, because what follows (norms, views of heads, softmax) reads row by row.
        rows = product[:, :num_rows].t().contiguous()
        return rows.view(*input.shape[:-1], self.out_features)


class PackedLinear(FewRowsLinear):
    """`nn.Linear` whose weights are laid out for oneDNN; made by `pack_linear_layers`.

    It has no parameter `weight`; the attribute and the state dict give an unpacked copy. Moving or casting
    the layer, or loading a state dict into it, makes it a `FewRowsLinear` again.
    """

    _packed: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`[out_features, in_features]`, a copy."""
        return self._packed.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`, `[..., out_features]`."""
        if input.dtype != torch.float32 or not input.numel():
            return functional.linear(input, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self._packed, self.bias, "none", [], ""
        )
        return product

    def _unpack(self) -> Any:
        layer: Any = self
        dense = layer.weight
        del layer._packed
        layer.__class__ = FewRowsLinear
        layer.weight = nn.Parameter(dense, requires_grad=False)
        return layer

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        return self._unpack()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Packed tensors cannot be copied or pickled.
        return {**self.__dict__, "_packed": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._packed = _pack(self._packed)


def _pack(weight: Tensor) -> Tensor:
    # Not in inference mode, because its tensors cannot be used everywhere.
    with torch.inference_mode(False), torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
    return packed


def speed_up_linear_layers(model: nn.Module) -> None:
    """Turn the plain float32 linear layers of a model on a CPU into `FewRowsLinear`.

    Parameters, hooks and tied weights stay as they are. Quantised layers keep their own forward, whether the
    layer's class is another (bitsandbytes) or its weight's (torchao).
    """
    for module in model.modules():
        if (
            type(module) is nn.Linear
            and type(module.weight) is nn.Parameter
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
        ):
            module.__class__ = FewRowsLinear


def pack_linear_layers(model: nn.Module, *, apart_from: nn.Module | None = None) -> None:
    """Pack the weights of large frozen layers, replacing the plain ones, where that is faster.

    Weights that two layers share, such as tied heads, stay plain: packing them would add a copy.

    Args:
        model: The model.
        apart_from: A layer of another model, which packs it itself.
    """
    if not _can_pack():
        return
    users = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    for module in model.modules():
        if (
            type(module) is not FewRowsLinear
            or module is apart_from
            or min(module.in_features, module.out_features) < MIN_PACKED_SIDE
            or users[id(module.weight)] > 1
            or module.weight.requires_grad
        ):
            continue
        layer: Any = module
        layer._packed = _pack(layer.weight)
        release_file_pages(layer.weight)
        del layer.weight
        layer.__class__ = PackedLinear


def release_file_pages(weight: Tensor) -> None:
    """Let the system drop the pages of a weight that is mapped from a file and no longer needed.

    Otherwise the file's other weights keep the whole mapping in memory, the packed layers' plain weights
    included, until the system needs the memory. If this does not work, nothing else is lost.
    """
    storage = weight.untyped_storage()
    is_mapped = not storage.resizable()  # torch's own memory is resizable
    if not sys.platform.startswith("linux") or not is_mapped:
        return
    # Page out rather than discard: if anything still reads the pages, they come back from the file.
    madv_pageout = 21
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(stop - start), madv_pageout
            )


def _can_pack() -> bool:
    """Return whether this is a kind of processor that was measured, and torch has the operators."""
    return (
        torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
