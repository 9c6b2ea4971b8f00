"""Rows that run one by one, each with a cache of its own: exact where a batch would change them, and slower.

That is so for models that count a padded row's positions from its padding, that keep what they have read in a
cache of their own kind, in their modules, or not at all.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from proxytune.backends.transformers.kv_cache import RoomyCache
from proxytune.backends.transformers.lengthwise import Tokens
from proxytune.backends.transformers.state import TransformersState


@dataclass(slots=True)
class OwnCache:
    """The cache that a model makes in its first forward; None before."""

    made: Any = None


@dataclass(slots=True)
class ReadAgain:
    """For a model without a cache: what a row has read, `[1, num_tokens]`, which each forward reads again."""

    token_ids: Tensor | None = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        if self.token_ids is not None and tokens_to_remove:
            self.token_ids = self.token_ids[:, :tokens_to_remove]


class RowCaches:
    """The caches of a batch's rows, and how many tokens each has read; empty before the first forward."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.rows: list[Any] = []
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def fill(self, num_rows: int) -> None:
        """Make the caches of the rows, if this is the first forward."""
        if not self.rows:
            self.rows = [self.make() for _ in range(num_rows)]
            self.lengths = [0] * num_rows

    def rewind(self, num_tokens: Sequence[int]) -> None:
        """Forget the last tokens of each row."""
        for row, count in enumerate(num_tokens):
            if count:
                self.rows[row].crop(-count)
                self.lengths[row] -= count

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of every row."""
        self.rewind([-tokens_to_remove] * len(self.rows))

    def copy(self, rows: Sequence[int]) -> RowCaches:
        """Return separate caches of the given rows."""
        copied = RowCaches(self.make)
        copied.rows = [_copy(self.rows[row]) for row in rows]
        copied.lengths = [self.lengths[row] for row in rows]
        return copied

    def reorder_cache(self, rows: Tensor) -> None:
        """Keep the given rows, in that order; rows may repeat."""
        order: list[int] = rows.tolist()
        repeated = [row in order[:place] for place, row in enumerate(order)]
        self.rows = [
            _copy(self.rows[row]) if again else self.rows[row]
            for row, again in zip(order, repeated, strict=True)
        ]
        self.lengths = [self.lengths[row] for row in order]

    def merge(self, other: RowCaches, rows: Sequence[int]) -> None:
        """Add another batch's rows, numbered after these, and keep the given rows."""
        self.rows += other.rows
        self.lengths += other.lengths
        self.reorder_cache(torch.tensor(rows, dtype=torch.long))

    def activate_past_recording(self) -> None:
        """Do nothing: what `crop` needs is kept."""


def _copy(cache: Any) -> Any:
    if isinstance(cache, RoomyCache):
        return cache.copy(torch.tensor([0]), 0)
    return copy.deepcopy(cache)


class SeparateState(TransformersState):
    """What a batch has read whose rows run one by one: there are no slots, so no gaps come to be."""

    __slots__ = ()

    def rewind(self, num_tokens: Sequence[int]) -> None:
        """Forget the last tokens of each row."""
        self.cache.rewind(num_tokens)
        lengths = [length - n for length, n in zip(self.lengths, num_tokens, strict=True)]
        self._align(lengths, self._positions.device)

    def compact(self) -> None:
        """Do nothing."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in that order."""
        self.cache.reorder_cache(torch.tensor(rows, dtype=torch.long))
        self._take(self.lengths, self.adapters, rows)

    def copy(self, rows: Sequence[int]) -> SeparateState:
        """Return a separate state of the given rows."""
        return SeparateState(
            self.cache.copy(rows),
            [self.lengths[row] for row in rows],
            [self.adapters[row] for row in rows],
            self._positions.device,
        )

    def merge(self, other: TransformersState, rows: Sequence[int]) -> None:
        """Add another state's rows, numbered after this one's, and keep the given rows in that order."""
        self.cache.merge(other.cache, rows)
        self._take([*self.lengths, *other.lengths], [*self.adapters, *other.adapters], rows)

    def _take(
        self, lengths: Sequence[int], adapters: Sequence[str | None], rows: Sequence[int]
    ) -> None:
        self.adapters = tuple(adapters[row] for row in rows)
        self._align([lengths[row] for row in rows], self._positions.device)


class RowsReader:
    """Runs a batch's rows one by one, without padding and attention mask.

    Args:
        forward: Runs a forward and returns logits.
        make: Makes one row's cache: a cache that the model takes, an `OwnCache`, or a `ReadAgain`.
    """

    def __init__(self, forward: Callable[[Tokens], Tensor], make: Callable[[], Any]) -> None:
        self._forward, self._make = forward, make

    reuses_prompts = True

    def new_cache(self) -> RowCaches:
        """Return an empty cache."""
        return RowCaches(self._make)

    def run(self, tokens: Tokens, prompt_lengths: Sequence[int] | None = None) -> Tensor:
        """Return logits `[batch, num_logits or num_tokens, vocab]`, 0 at padding.

        Args:
            tokens: What to run.
            prompt_lengths: Makes no difference.
        """
        num_rows, num_new = tokens.token_ids.shape
        if tokens.cache is not None:
            tokens.cache.fill(num_rows)
        found: list[Tensor | None] = []
        for row in range(num_rows):
            if tokens.attention_mask is None:
                found.append(self._run_row(tokens, row, tokens.token_ids[row], tokens.num_logits))
                continue
            is_token = tokens.attention_mask[row, -num_new:].bool()
            own = tokens.token_ids[row, is_token]
            num_shown = tokens.num_logits or num_new
            is_shown = is_token[-num_shown:]
            num_own = int(is_shown.sum())
            logits = None
            if len(own):
                # At least one: a model that is asked for none returns those of all tokens.
                logits = self._run_row(tokens, row, own, max(num_own, 1))
            if logits is not None and num_own < num_shown:
                padded = logits.new_zeros(1, num_shown, logits.shape[-1])
                padded[:, is_shown] = logits[:, logits.shape[1] - num_own :]
                logits = padded
            found.append(logits)
        shown = next(logits for logits in found if logits is not None)
        return torch.cat([torch.zeros_like(shown) if each is None else each for each in found])

    def _run_row(self, tokens: Tokens, row: int, token_ids: Tensor, num_logits: int) -> Tensor:
        """Return the logits of one row, `[1, num_logits or num_tokens, vocab]`."""
        caches, adapters = tokens.cache, tokens.adapters
        num_kept = 0 if caches is None else caches.lengths[row]
        cache = None if caches is None else caches.rows[row]
        num_new = len(token_ids)
        token_ids = token_ids[None]
        if isinstance(cache, ReadAgain):
            if cache.token_ids is not None:
                token_ids = torch.cat((cache.token_ids, token_ids), dim=1)
            cache.token_ids = token_ids
            num_kept, num_logits = 0, num_logits or num_new
        positions = torch.arange(num_kept, num_kept + token_ids.shape[1], device=token_ids.device)
        own = replace(
            tokens,
            token_ids=token_ids,
            cache=None if isinstance(cache, ReadAgain) else cache,
            attention_mask=None,
            position_ids=positions[None],
            adapters=None if adapters is None else adapters[row : row + 1],
            num_logits=num_logits,
        )
        logits = self._forward(own)
        if caches is not None:
            caches.lengths[row] += num_new
        return logits


def own_cache_class(model: nn.Module) -> type | None:
    """Return the class of the cache that only this kind of model makes; None if it takes transformers' own.

    The module of such a model names the class as the type of its forward's cache.
    """
    for module in {type(module): module for module in model.modules()}.values():
        options = inspect.signature(module.forward).parameters
        for name in ("cache", "past_key_values", "cache_params"):
            annotation = options[name].annotation if name in options else None
            for kind in (annotation, *get_args(annotation)):
                if isinstance(kind, type) and kind.__module__ == type(module).__module__:
                    return kind
    return None


def reads_one_by_one(model: nn.Module) -> bool:
    """Return whether several tokens at once, after others, are read in another way than one by one.

    ProphetNet refuses them. Where only the last loop's keys are cached, Dory's earlier loops find those of
    tokens before, and their own of tokens in the same forward.
    """
    text = _text_config(model)
    is_loop = getattr(text, "recurrent_kv_cache_mode", None) == "last_loop"
    return text.model_type == "prophetnet" or is_loop


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def keeps_state_in_modules(model: nn.Module) -> bool:
    """Return whether what was read stays in the modules, where the next batch overwrites it."""
    return any(
        value is None and name.endswith(("_state", "_states"))
        for module in model.modules()
        for name, value in vars(module).items()
    )


def pads_positions(model: nn.Module, layers: Sequence[Any], options: Collection[str]) -> bool:
    """Return whether left padding changes what a row gives.

    Args:
        model: A causal language model.
        layers: A layer of a cache for each of its layers.
        options: The names of its forward's arguments.
    """
    text = _text_config(model)
    if text.model_type == "inkling_text" and text.log_scaling_n_floor is not None:
        return True  # the logarithm is that of a slot
    # Layers of caches that a model brings are made for one sequence (compressed keys of DeepSeek-V4).
    if any(type(layer).__module__ != "transformers.cache_utils" for layer in layers):
        return True
    if "position_ids" in options:
        # With a cache, GIT puts a mask for an image's tokens in front of the text's, even without an image.
        return any(getattr(module, "image_patch_tokens", 0) for module in model.modules())
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return False  # a state-space model has no positions
    # Positions are slots, then, unless attention counts distances alone (ALiBi).
    return not any(
        "alibi" in name for kind in set(map(type, model.modules())) for name in dir(kind)
    )
