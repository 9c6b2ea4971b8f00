"""Keys and values of a batch in buffers with room to grow: tokens are written in place.

transformers' own layers concatenate all keys and values again for each token. Here a layer's `keys` and
`values`, which transformers reads, are the first slots of larger buffers. What a slot holds, and in which
rows it is a gap, is not known here.

Words: a *slot* is one column of the cache; *room* is the slots behind the last one in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

MIN_ROOM = 32
"""Minimum number of slots added to a full buffer; a long one grows by an eighth."""


def _with_room(num_slots: int) -> int:
    # An eighth: each key is copied about eight times in all, and at most 12.5 % of the memory is unused.
    return num_slots + max(MIN_ROOM, num_slots // 8)


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, `[batch, heads, slots, size]`, with room behind them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, and return all of them; see transformers' `DynamicLayer`."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # A backward pass needs the keys as they were.
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_old = self.get_seq_length()
        num_slots = num_old + key_states.shape[2]
        if not self._has_room(num_slots):
            self._move_to_new_buffers(num_old, key_states, value_states)
        assert self._buffers is not None
        keys, values = self._buffers
        keys[:, :, num_old:num_slots] = key_states
        values[:, :, num_old:num_slots] = value_states
        self.keys, self.values = keys[:, :, :num_slots], values[:, :, :num_slots]
        return self.keys, self.values

    def _has_room(self, num_slots: int) -> bool:
        if self._buffers is None or self._buffers[0].shape[2] < num_slots:
            return False
        # Tensors made in inference mode cannot be written to outside of it.
        return torch.is_inference_mode_enabled() or not self._buffers[0].is_inference()

    def _move_to_new_buffers(self, num_old: int, keys: Tensor, values: Tensor) -> None:
        """Make room for the slots in use and for those of `keys` and `values`, and copy the former."""
        capacity = _with_room(num_old + keys.shape[2])
        if any(new.shape[3] * new.element_size() % 16 for new in (keys, values)):
            # 16 slots put each head's first key on 16 bytes. Kernels that find it elsewhere
            # add in another order, so that logits would depend on how often a buffer had grown.
            capacity = -(-capacity // 16) * 16
        room = [new.new_empty((*new.shape[:2], capacity, new.shape[3])) for new in (keys, values)]
        if num_old:
            assert self.keys is not None and self.values is not None
            for buffer, old in zip(room, (self.keys, self.values), strict=True):
                buffer[:, :, :num_old] = old
        self._buffers = (room[0], room[1])

    @property
    def room(self) -> Tensor | None:
        """The keys with the room behind them; None without room."""
        return None if self._buffers is None else self._buffers[0]

    def move(self, keys: Tensor, values: Tensor) -> None:
        """Move to the first slots of other memory, and use that from now on."""
        num_slots = self.get_seq_length()
        assert self.keys is not None and self.values is not None
        keys[:, :, :num_slots], values[:, :, :num_slots] = self.keys, self.values
        self._buffers = (keys, values)
        self._use(num_slots)

    def leave(self) -> None:
        """Move to memory of the layer's own."""
        assert self.keys is not None and self.values is not None
        num_slots = self.get_seq_length()
        self._move_to_new_buffers(num_slots, self.keys[:, :, :0], self.values[:, :, :0])
        self._use(num_slots)

    def grow(self, num_new: int) -> None:
        """Count slots that have been written to behind the last one in use."""
        self._use(self.get_seq_length() + num_new)

    def _use(self, num_slots: int) -> None:
        """Take the first slots of the buffers for the keys and values."""
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :num_slots] for buffer in self._buffers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` slots of every row; nothing is copied."""
        if self.is_initialized:
            super().crop(tokens_to_remove)

    def select(self, rows: Tensor, first_slot: int = 0) -> None:
        """Keep the given rows, in that order, and the slots from `first_slot` on."""
        num_slots = self.get_seq_length() - first_slot
        if self.keys is None or self.values is None or num_slots <= 0:
            self._buffers = None  # they have as many rows as before
            return
        source = self._buffers or (self.keys, self.values)
        rows = rows.to(source[0].device)
        stop = first_slot + _with_room(num_slots)  # copies room too, but no more than needed
        keys, values = (tensor[:, :, first_slot:stop].index_select(0, rows) for tensor in source)
        self._buffers = (keys, values)
        self._use(num_slots)

    def copy(self, rows: Tensor, first_slot: int) -> RoomyLayer:
        """Return a separate layer of the given rows and the slots from `first_slot` on, without room."""
        assert self.keys is not None and self.values is not None
        copied = type(self)()
        copied.lazy_initialization(self.keys, self.values)
        copied.keys, copied.values = (
            tensor[:, :, first_slot:].index_select(0, rows.to(tensor.device))
            for tensor in (self.keys, self.values)
        )
        return copied

    def merge(self, other: RoomyLayer, rows: Sequence[int]) -> None:
        """Keep the given rows of this layer and of another, numbered after; short ones get zeros in front."""
        assert self.keys is not None and self.values is not None
        assert other.keys is not None and other.values is not None
        num_rows = self.keys.shape[0]
        num_slots = max(self.keys.shape[2], other.keys.shape[2])
        buffers = []
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            shape = (len(rows), mine.shape[1], _with_room(num_slots), mine.shape[3])
            buffer = mine.new_empty(shape)
            # NaN in uninitialised memory would survive masked attention.
            buffer[:, :, : num_slots - min(mine.shape[2], theirs.shape[2])] = 0
            for place, row in enumerate(rows):
                keys = mine[row] if row < num_rows else theirs[row - num_rows]
                buffer[place, :, num_slots - keys.shape[1] : num_slots] = keys
            buffers.append(buffer)
        self._buffers = (buffers[0], buffers[1])
        self._use(num_slots)

    def keep_slots(self, slots: Tensor) -> None:
        """Keep the given slots of each row, `[batch, num_kept]`, in that order."""
        assert self.keys is not None and self.values is not None
        num_kept = slots.shape[1]
        index = slots.to(self.keys.device)[:, None, :, None]
        kept = [
            tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
            for tensor in (self.keys, self.values)
        ]
        if not self._has_room(num_kept):
            self._buffers = None
        if self._buffers is None or self._buffers[0].shape[2] > 2 * _with_room(num_kept):
            self._move_to_new_buffers(0, *kept)
        assert self._buffers is not None
        for buffer, tensor in zip(self._buffers, kept, strict=True):
            buffer[:, :, :num_kept] = tensor
        self._use(num_kept)

    def reset(self) -> None:
        """Forget everything, and give the memory back."""
        self._buffers = None
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows, in that order; rows may repeat."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows; `indices` may also be a mask of rows."""
        self.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.keys is not None and self.get_seq_length():
            self.select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self._buffers = None
        super().offload()  # type: ignore[no-untyped-call]


class RoomyCache(DynamicCache):
    """A `DynamicCache` of layers with room; it keeps all tokens, even beyond a sliding window."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = RoomyLayer

    def filled(self) -> Iterator[RoomyLayer]:
        """Return the layers that hold keys; layers that use another layer's keys stay empty."""
        layers: Any = self.layers
        return (layer for layer in layers if layer.is_initialized)

    def select(self, rows: Tensor, first_slot: int = 0) -> None:
        """Keep the given rows, in that order, and the slots from `first_slot` on; rows may repeat."""
        for layer in self.filled():
            layer.select(rows, first_slot)

    def copy(self, rows: Tensor, first_slot: int) -> RoomyCache:
        """Return a separate cache of the given rows and the slots from `first_slot` on."""
        copied = RoomyCache()
        layers: Any = self.layers
        for layer in layers:  # those that use another layer's keys stay empty
            is_filled = layer.is_initialized
            copied.layers.append(layer.copy(rows, first_slot) if is_filled else RoomyLayer())
        return copied

    def merge(self, other: RoomyCache, rows: Sequence[int]) -> None:
        """Add another cache's rows; see `RoomyLayer.merge`."""
        for layer, theirs in zip(self.filled(), other.filled(), strict=True):
            layer.merge(theirs, rows)

    def overwrite(self, rows: Tensor, other: RoomyCache) -> None:
        """Take another cache's keys and values, as many slots, for the given rows."""
        for layer, theirs in zip(self.filled(), other.filled(), strict=True):
            assert layer.keys is not None and layer.values is not None
            assert theirs.keys is not None and theirs.values is not None
            layer.keys[rows.to(layer.keys.device)] = theirs.keys
            layer.values[rows.to(layer.values.device)] = theirs.values

    def keep_slots(self, slots: Tensor) -> None:
        """Keep the given slots of each row, `[batch, num_kept]`, in that order."""
        for layer in self.filled():
            layer.keep_slots(slots)
