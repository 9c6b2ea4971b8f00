"""Slots and gaps of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune.backends.transformers.kv_cache import RoomyCache


class TransformersState:
    """What a batch has seen: keys and values, and which slots belong to which row.

    Args:
        cache: From `TransformersBackend.new_cache`.
        lengths: Tokens of each row; they fill the last slots, as many slots as the longest row needs.
        adapters: The adapter of each row.
        device: Where masks and positions go.
    """

    __slots__ = ("_mask", "_positions", "_runs", "adapters", "cache", "lengths", "num_slots")

    def __init__(
        self,
        cache: Any,
        lengths: Sequence[int],
        adapters: Sequence[str | None],
        device: torch.device,
    ) -> None:
        self.cache = cache
        self.adapters = tuple(adapters)
        self._align(lengths, device)

    def _align(self, lengths: Sequence[int], device: torch.device) -> None:
        """Let each row fill the last slots."""
        self.lengths = list(lengths)
        self.num_slots = max(self.lengths, default=0)
        # Where each row's tokens are: slots from a start to before a stop, in order.
        self._runs = [
            [(self.num_slots - length, self.num_slots)] if length else [] for length in self.lengths
        ]
        self._positions = torch.tensor(self.lengths, device=device)[:, None]
        # [batch, slots and room], 1 at tokens; made when the first gap appears, kept in step from then on.
        self._mask: Tensor | None = None

    @property
    def has_gaps(self) -> bool:
        """Whether a slot does not count for some row."""
        return any(length != self.num_slots for length in self.lengths)

    @property
    def is_aligned(self) -> bool:
        """Whether each row fills the last slots, without gaps between its tokens."""
        return all(
            runs == ([(self.num_slots - length, self.num_slots)] if length else [])
            for runs, length in zip(self._runs, self.lengths, strict=True)
        )

    def attention_mask(self, num_new: int) -> Tensor | None:
        """Return `[batch, num_slots + num_new]`, 0 at gaps; None where there is none."""
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
        """Return `[batch, num_new]`: the positions of the next tokens in their own rows."""
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
        """Forget the last tokens of each row; slots at the end that no row uses are dropped."""
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
        """Drop the last slots that no row uses, and mark those that some row does not."""
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
        """Move every row's tokens to the last slots and drop the slots that no row needs."""
        if not self.has_gaps:
            return
        longest = max(self.lengths)
        mask = self.attention_mask(0)
        assert mask is not None
        # Gaps first, tokens after them in their order: the sort is stable.
        self.cache.keep_slots(mask.argsort(dim=1, stable=True)[:, self.num_slots - longest :])
        self._align(self.lengths, mask.device)

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in that order, and the slots from the first to the last in use."""
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
        """Return a state of its own of the given rows, without slots that none of them uses."""
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
        """Take over another state's rows, counted on from this one's, and keep the given ones in that order.

        Both states' last slots become the last of the merged one: the shorter one's tokens move, with gaps
        before them.
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
        self._mask = None  # drawn anew from the runs
