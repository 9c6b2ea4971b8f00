"""Forwards of models whose rotary angles depend on a row's length (`rotary.py`).

All tokens of a prompt get the angles for the whole prompt's length, in whatever pieces it is read. A later
token gets those for the length that the row has with it. In models with longrope, keys and queries must be of
one kind: a row that passes the switch, in either direction, has its keys and values computed again from its
tokens, and a block of drafts is split where a row passes. So these models' caches remember token ids, in one
more layer, which follows whatever happens to the others: rows selected, merged and copied, slots dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from proxytune.backends.transformers.kv_cache import RoomyCache, RoomyLayer
from proxytune.backends.transformers.rotary import ROW_LENGTHS, AngleRule


@dataclass(frozen=True, slots=True)
class Tokens:
    """The arguments of one forward; see `TransformersBackend.run`."""

    token_ids: Tensor
    cache: Any
    attention_mask: Tensor | None
    position_ids: Tensor | None
    adapters: Sequence[str | None] | None
    num_logits: int

    def piece(self, start: int, stop: int, num_kept: int) -> Tokens:
        """Return some of the tokens, which come after `num_kept` slots and those before `start`."""
        mask, positions = self.attention_mask, self.position_ids
        return replace(
            self,
            token_ids=self.token_ids[:, start:stop],
            attention_mask=None if mask is None else mask[:, : num_kept + stop],
            position_ids=None if positions is None else positions[:, start:stop],
        )


class TokenLayer(RoomyLayer):  # type: ignore[no-untyped-call]
    """Token ids as keys, `[batch, 1, slots, 1]`; as values the lengths for which the row was read."""


class LengthwiseReader:
    """Runs a model's forwards, each row with the angles of its own length.

    Args:
        rule: How angles depend on lengths.
        forward: Runs a forward and returns logits.
        piece_size: Returns how many tokens per row to run at once for a number of rows.
    """

    def __init__(
        self,
        rule: AngleRule,
        forward: Callable[[Tokens], Tensor],
        piece_size: Callable[[int], int],
    ) -> None:
        self._rule, self._forward, self._piece_size = rule, forward, piece_size

    def new_cache(self) -> RoomyCache:
        """Return an empty cache."""
        return RoomyCache()

    @property
    def reuses_prompts(self) -> bool:
        """Whether a prompt may go on from an earlier one of another length."""
        return not self._rule.is_stepped

    def run(self, tokens: Tokens, prompt_lengths: Sequence[int] | None = None) -> Tensor:
        """Return logits `[batch, num_logits or num_tokens, vocab]`.

        Args:
            tokens: What to run.
            prompt_lengths: For a piece of prompts, the length of each whole prompt. Without it, the first
                tokens in a cache are whole prompts, and others come one after another.
        """
        cache, positions = tokens.cache, tokens.position_ids
        num_kept = 0 if cache is None else cache.get_seq_length()
        if positions is None:
            num_rows, num_new = tokens.token_ids.shape
            steps = torch.arange(num_kept, num_kept + num_new, device=tokens.token_ids.device)
            positions = steps.expand(num_rows, -1)
            tokens = replace(tokens, position_ids=positions)
        if prompt_lengths is None and not num_kept:
            prompt_lengths = [position + 1 for position in positions.amax(1).tolist()]
        if prompt_lengths is not None:
            return self._run(tokens, [[length] for length in prompt_lengths])
        lengths = [[position + 1 for position in row] for row in positions.tolist()]
        read = _tokens_of(cache).values
        assert read is not None
        read_for: list[int] = read[:, 0, -1, 0].tolist()
        if self._rule.is_stepped:
            # At least the prompt's length: a token in a prompt's place, after a rewind, counts as its own.
            lengths = [
                [max(length, own) for length in row]
                for row, own in zip(lengths, read_for, strict=True)
            ]
            return self._run(tokens, lengths, read_for)
        return self._append(tokens, lengths, read_for, num_kept)

    def _append(
        self, tokens: Tokens, lengths: list[list[int]], read_for: list[int], num_kept: int
    ) -> Tensor:
        """Run appended tokens in pieces in which no row passes the switch; read again those that passed."""
        is_long = self._rule.is_long
        num_new = tokens.token_ids.shape[1]
        passes = {
            next((column for column, length in enumerate(row) if is_long(length)), num_new)
            for row in lengths
        }
        bounds = [0, *sorted(passes - {0, num_new}), num_new]
        pieces = []
        for start, stop in pairwise(bounds):
            now = [row[start] for row in lengths]
            rows = [i for i, length in enumerate(now) if is_long(length) != is_long(read_for[i])]
            if rows:
                self._read_again(tokens, rows, now, num_kept + start)
            piece = tokens.piece(start, stop, num_kept)
            if len(bounds) > 2:
                piece = replace(piece, num_logits=0)
            pieces.append(self._run(piece, [[length] for length in now]))
            read_for = now
        logits = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return logits[:, -tokens.num_logits :]

    def _read_again(
        self, tokens: Tokens, rows: list[int], lengths: Sequence[int], num_kept: int
    ) -> None:
        """Compute the keys and values of some rows again, for new lengths."""
        cache, mask, adapters = tokens.cache, tokens.attention_mask, tokens.adapters
        keys = _tokens_of(cache).keys
        assert keys is not None
        index = torch.tensor(rows, device=keys.device)
        token_ids = keys[index, 0, :num_kept, 0]
        counts = torch.ones_like(token_ids)
        if mask is not None:
            counts = mask[index, :num_kept].to(counts.dtype)
        again = Tokens(
            token_ids,
            RoomyCache(),
            None if mask is None else mask[index, :num_kept],
            (counts.cumsum(1) - 1).clamp(min=0),
            None if adapters is None else [adapters[row] for row in rows],
            num_logits=1,
        )
        size = self._piece_size(len(rows))
        for start in range(0, num_kept, size):
            piece = again.piece(start, min(start + size, num_kept), 0)
            self._run(piece, [[lengths[row]] for row in rows])
        cache.overwrite(index, again.cache)

    def _run(
        self,
        tokens: Tokens,
        lengths: Sequence[Sequence[int]],
        read_for: Sequence[int] | None = None,
    ) -> Tensor:
        """Run tokens with the angles for these lengths, `[batch][1 or num_new]`, and remember them."""
        token = ROW_LENGTHS.set(lengths)
        try:
            logits = self._forward(tokens)
        finally:
            ROW_LENGTHS.reset(token)
        if tokens.cache is not None:
            ids = tokens.token_ids[:, None, :, None]
            if read_for is None:
                read_for = [row[0] for row in lengths]
            own = torch.tensor(read_for, device=ids.device)[:, None, None, None]
            _tokens_of(tokens.cache).update(ids, own.expand_as(ids))
        return logits


def _tokens_of(cache: Any) -> TokenLayer:
    """Return a cache's layer of token ids, made after its first forward, behind the layers of the model."""
    layer = cache.layers[-1]
    if not isinstance(layer, TokenLayer):
        layer = TokenLayer()
        cache.layers.append(layer)
    return layer
