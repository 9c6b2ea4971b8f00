"""How attention is computed: without copies of keys that query heads share, and by which kernels.

Words: with grouped queries, a key head serves a *group* of query heads (Ainslie et al. 2023,
arXiv:2305.13245).

If there is a mask, transformers copies keys and values for every query head of a group before torch's
`scaled_dot_product_attention`. That copies the whole cache, several times over, in each layer and forward. A
block of drafted tokens always has a mask, and so does a batch of prompts of different lengths. The queries of
a group read the same keys under the same mask, so here they count as further tokens of one head, and nothing
is copied. docs/design/0005-shared-keys.md has the measurements.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MAX_PACKED = 64
"""Maximum number of new tokens per row whose queries are packed: packing repeats the mask for each."""

_MARK = "_proxytune_group_size"


def share_keys(model: nn.Module) -> None:
    """Let those layers of a model that use torch's attention (`sdpa`) attend without copying shared keys.

    The model must be loaded for this package alone, because sums are rounded differently than elsewhere.
    """
    for layer in model.modules():
        size = getattr(layer, "num_key_value_groups", 1)
        if isinstance(size, int) and size > 1:
            setattr(layer, _MARK, size)


_registered: Any = ALL_ATTENTION_FUNCTIONS
_attend_as_transformers: Callable[..., tuple[Tensor, Tensor | None]] = _registered["sdpa"]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' `sdpa` does, but without copies in layers that `share_keys` has marked.

    `query` is `[batch, heads, num_new, size]`, `key` and `value` are `[batch, heads // group size, slots,
    size]`. The mask is `[batch or 1, 1, num_new, slots]`, numbers to add or whether to attend. Returns
    `[batch, num_new, heads, size]`, and None for the attention weights.
    """
    size = getattr(module, _MARK, 1)
    num_new = query.shape[2]
    is_on_cpu = query.device.type == "cpu"
    if (
        size == 1
        or query.shape[1] != size * key.shape[1]
        or any(options.get(name) for name in ("dropout", "softcap"))
        or options.get("position_bias") is not None
        or (attention_mask is not None and attention_mask.shape[1] != 1)
        # Without a mask, accelerators' kernels read shared keys as they are.
        or (attention_mask is None and (num_new > 1 or not is_on_cpu))
        or (num_new > MAX_PACKED and not is_on_cpu)
    ):
        return _attend_as_transformers(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    if num_new > MAX_PACKED:
        # Torch reads shared keys as they are, too, but packing is faster for few tokens.
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=True
        )
    else:
        mask = attention_mask
        if mask is not None and num_new > 1:
            mask = mask.repeat(1, 1, size, 1)
        packed = query.reshape(query.shape[0], key.shape[1], size * num_new, query.shape[3])
        attended = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
        attended = attended.reshape(*query.shape[:3], value.shape[3])
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register("sdpa", _attend)


class _WithoutCudnn:
    """Turns cuDNN's attention off while at least one thread is inside.

    PyTorch has one switch for the whole process. Threads are counted, so that the first to enter turns it off
    and the last to leave puts it back; saving and restoring it in each thread could leave it off for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._was_on = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._was_on = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                torch.backends.cuda.enable_cudnn_sdp(self._was_on)


_WITHOUT_CUDNN = _WithoutCudnn()
_AS_IT_IS = contextlib.nullcontext()


def eager_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a forward that is not recorded as a graph runs.

    On CUDA it turns cuDNN's attention off. cuDNN plans its kernels again for each number of keys, which grows
    with every token: 25 ms and more of CPU time per model and step on an H200. Without it, eager steps were
    1.07 to 1.5 times faster. Graphs have few sizes and plan once, and were 1.03 times faster with it. (The
    switch is the process's, so a graph recorded in another thread meanwhile also goes without.)
    """
    return _WITHOUT_CUDNN if device.type == "cuda" else _AS_IT_IS
