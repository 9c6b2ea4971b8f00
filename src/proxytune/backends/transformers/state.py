"""A batch's KV cache, and which of its slots belong to which row; `backend.py` explains slots and gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune.backends.transformers.kv_cache import RoomyCache


class TransformersState:
    """What a batch has read: keys and values, and which slots belong to which row.

    Args:
        cache: From `TransformersBackend.new_cache`.
        lengths: Number of tokens of each row. They fill the last slots; there are as many slots as tokens in
            the longest row.
        adapters: The adapter of each row.
        device: The device for masks and positions.
    """

    __slots__ = ("_mask", "_positions", "_runs", "adapters", "cache", "lengths", "num_slots")

    def __init__(
        self,
        cache: Any,
        lengths: Sequence[int],
        adapters: Sequence[str | None],
        device: torch.device,
    ) -> None:
        self.cache, self.adapters = cache, tuple(adapters)
        self._align(lengths, device)

    def _align(self, lengths: Sequence[int], device: torch.device) -> None:
        """Start over with each row filling the last slots."""
        self.lengths = list(lengths)
        self.num_slots = max(self.lengths, default=0)
        # The slots of each row's tokens, in order, as ranges from start to before stop.
        self._runs = [
            [(self.num_slots - length, self.num_slots)] if length else [] for length in self.lengths
        ]
        self._positions = torch.tensor(self.lengths, device=device)[:, None]
        # [batch, slots and room], 1 at tokens; made when the first gap appears, and kept up to date then.
        self._mask: Tensor | None = None

    @property
    def has_gaps(self) -> bool:
        """Whether a slot is a gap in some row."""
        return any(length != self.num_slots for length in self.lengths)

    @property
    def is_aligned(self) -> bool:
        """Whether each row fills the last slots, with no gap between its tokens."""
        return all(
            runs == ([(self.num_slots - length, self.num_slots)] if length else [])
            for runs, length in zip(self._runs, self.lengths, strict=True)
        )

    def attention_mask(self, num_new: int) -> Tensor | None:
        """Return `[batch, num_slots + num_new]`, 0 at gaps; None if there are no gaps."""
        if not self.has_gaps:
            self._mask = None
            return None
        stop = self.num_slots + num_new
        if self._mask is None or self._mask.shape[1] < stop:
            mask = self._positions.new_zeros(len(self.lengths), stop + stop // 8 + 32)
            if self._mask is not None:
                mask[:, : self.num_slots] = self._mask[:, : self.num_slots]
            else:
                self._draw_runs(mask)
            self._mask = mask
        self._mask[:, self.num_slots : stop] = 1
        return self._mask[:, :stop]

    def _draw_runs(self, mask: Tensor) -> None:
        slots = torch.arange(self.num_slots, device=mask.device)
        for place in range(max(map(len, self._runs))):
            runs = [runs[place] if place < len(runs) else (0, 0) for runs in self._runs]
            starts, stops = torch.tensor(runs, device=mask.device).T[:, :, None]
            mask[:, : self.num_slots] |= ((slots >= starts) & (slots < stops)).to(mask.dtype)

    def position_ids(self, num_new: int) -> Tensor:
        """Return `[batch, num_new]`: the positions of the next tokens, counted per row."""
        if num_new == 1:
            return self._positions
        return self._positions + torch.arange(num_new, device=self._positions.device)

    def append(self, num_new: int) -> None:
        """Count new tokens in every row."""
        stop = self.num_slots + num_new
        for runs in self._runs:
            if runs and runs[-1][1] == self.num_slots:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((self.num_slots, stop))
        self.num_slots = stop
        self.lengths = [length + num_new for length in self.lengths]
        self._positions = self._positions + num_new

    def rewind(self, num_tokens: Sequence[int]) -> None:
        """Forget the last tokens of each row, and drop the last slots that no row uses any more."""
        for runs, count in zip(self._runs, num_tokens, strict=True):
            while count:
                start, stop = runs.pop()
                kept = max(stop - start - count, 0)
                count -= stop - start - kept
                if kept:
                    runs.append((start, start + kept))
        self.lengths = [length - n for length, n in zip(self.lengths, num_tokens, strict=True)]
        if len(set(num_tokens)) == 1:
            self._positions = self._positions - num_tokens[0]
        else:
            self._positions = torch.tensor(self.lengths, device=self._positions.device)[:, None]
        self._drop_tail()

    def _drop_tail(self) -> None:
        """Drop the last slots that no row uses, and mask those that some rows do not use."""
        stops = [runs[-1][1] if runs else 0 for runs in self._runs]
        num_slots = max(stops)
        if num_slots < self.num_slots:
            self.cache.crop(num_slots - self.num_slots)
            self.num_slots = num_slots
        first = min(stops)
        if self._mask is not None and first < num_slots:
            ends = torch.tensor(stops, device=self._mask.device)[:, None]
            slots = torch.arange(first, num_slots, device=self._mask.device)
            self._mask[:, first:num_slots] *= slots < ends

    def compact(self) -> None:
        """Move every row's tokens to the last slots, and drop the slots that no row needs."""
        if not self.has_gaps:
            return
        longest = max(self.lengths)
        mask = self.attention_mask(0)
        assert mask is not None
        # Gaps first, then tokens in their order, because the sort is stable.
        self.cache.keep_slots(mask.argsort(dim=1, stable=True)[:, self.num_slots - longest :])
        self._align(self.lengths, mask.device)

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in that order, and the slots from the first in use to the last."""
        first = 0
        index = torch.tensor(rows, dtype=torch.long, device=self._positions.device)
        if isinstance(self.cache, RoomyCache):
            first = min((self._runs[row][0][0] for row in rows if self._runs[row]), default=0)
            self.cache.select(index, first)
        else:
            self.cache.reorder_cache(index)
        self.num_slots -= first
        self._runs = [
            [(start - first, stop - first) for start, stop in self._runs[row]] for row in rows
        ]
        self.lengths = [self.lengths[row] for row in rows]
        self.adapters = tuple(self.adapters[row] for row in rows)
        self._positions = self._positions[index]
        if self._mask is not None:
            self._mask = self._mask[index, first:]
        if isinstance(self.cache, RoomyCache) and rows:
            self._drop_tail()

    def copy(self, rows: Sequence[int]) -> TransformersState:
        """Return a separate state of the given rows, without the slots that none of them uses."""
        first = min((self._runs[row][0][0] for row in rows if self._runs[row]), default=0)
        device = self._positions.device
        copied = TransformersState(
            self.cache.copy(torch.tensor(rows, dtype=torch.long), first),
            [self.lengths[row] for row in rows],
            [self.adapters[row] for row in rows],
            device,
        )
        copied.num_slots = self.num_slots - first
        copied._runs = [
            [(start - first, stop - first) for start, stop in self._runs[row]] for row in rows
        ]
        copied._drop_tail()
        return copied

    def merge(self, other: TransformersState, rows: Sequence[int]) -> None:
        """Add another state's rows, numbered after this one's, and keep the given rows in that order.

        The last slots of both states become the last of the merged one, so the state with fewer slots gets
        gaps in front.
        """
        self.cache.merge(other.cache, rows)
        num_slots = max(self.num_slots, other.num_slots)
        runs: list[list[tuple[int, int]]] = []
        lengths: list[int] = []
        adapters: list[str | None] = []
        for state in (self, other):
            shift = num_slots - state.num_slots
            runs += [[(start + shift, stop + shift) for start, stop in row] for row in state._runs]
            lengths += state.lengths
            adapters += state.adapters
        self.num_slots = num_slots
        self._runs = [runs[row] for row in rows]
        self.lengths = [lengths[row] for row in rows]
        self.adapters = tuple(adapters[row] for row in rows)
        self._positions = torch.tensor(self.lengths, device=self._positions.device)[:, None]
        self._mask = None  # made again from the runs
