"""The KV caches of an ensemble's members as one cache of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune.errors import InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    from proxytune.backends.transformers.backend import TransformersBackend
    from proxytune.decode.ensemble import Member

CACHE_OPTION = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)
"""The name of the cache argument in this version of transformers: `cache` from 5.24 on."""


@dataclass(slots=True)
class CachedMembers:
    """The members that run on one backend, and the KV cache they share.

    The cache holds the rows of the first member, then those of the second, and so on.

    Args:
        backend: The backend.
        members: Its members by their index in the ensemble.
        cache: Their cache; None to keep nothing.
    """

    backend: TransformersBackend
    members: dict[int, Member]
    cache: Any = None

    def cache_rows(self, rows: Tensor, num_rows: int) -> Tensor:
        """Return where the given rows of a batch of `num_rows` lie in the cache, for every member."""
        return torch.cat([rows + k * num_rows for k in range(len(self.members))])

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        *,
        num_kept: int,
        num_logits: int,
    ) -> dict[int, Tensor]:
        """Run all members in one forward and return the logits of each, in the base's vocabulary.

        Args:
            input_ids: `[batch, num_tokens]`, of the base's vocabulary.
            attention_mask: `[batch, num_kept + num_tokens]`, 0 at padding; None without padding.
            position_ids: `[batch, num_tokens]`.
            num_kept: Number of tokens in the cache.
            num_logits: Number of last positions to return logits for; 0 for all.
        """
        members = list(self.members.values())
        device, num_new = self.backend.device, input_ids.shape[1]
        if attention_mask is not None:
            # Padding may have an id that only the tokenizer knows.
            input_ids = input_ids.masked_fill(attention_mask[:, -num_new:] == 0, 0)
        rows = torch.cat([member.alignment.ids_to_small(input_ids) for member in members])
        if not num_kept:
            self.backend.check_token_ids(rows)  # later token ids were chosen from these logits
        limit = self.backend.capabilities.max_context
        if limit is not None and num_kept + num_new > limit:
            self.backend.check_length(int(position_ids.max()) + 1)
        count = len(members)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat(count, 1).to(device)
        logits = self.backend.run(
            rows.to(device),
            cache=self.cache,
            attention_mask=attention_mask,
            position_ids=position_ids.repeat(count, 1).to(device),
            adapters=[member.adapter for member in members for _ in range(len(input_ids))],
            num_logits=num_logits,
        )
        return {
            index: member.alignment.logits_to_base(own)
            for (index, member), own in zip(self.members.items(), logits.chunk(count), strict=True)
        }


class ProxyTunedCache(Cache):
    """The KV caches of all members that run, in step with each other.

    Two adapters on one small model share a cache with twice the rows.

    Args:
        backends: The members by backend, each with an empty cache.
    """

    def __init__(self, backends: Sequence[CachedMembers]) -> None:
        super().__init__(layers=[])
        self.backends = list(backends)
        self.num_slots = 0
        self.num_rows = 0

    @property
    def members(self) -> list[int]:
        """Indices of the members whose keys and values are kept."""
        return sorted(index for each in self.backends for index in each.members)

    def __repr__(self) -> str:
        return f"ProxyTunedCache(members={self.members}, num_slots={self.num_slots})"

    def __len__(self) -> int:
        return sum(len(each.cache) for each in self.backends)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back in every member."""
        return all(each.backend.capabilities.can_rewind for each in self.backends)

    @property
    def is_linear(self) -> list[bool]:
        """One layer that is not linear: otherwise `generate` would run the kept tokens again."""
        return [False]

    @property
    def is_initialized(self) -> bool:
        """Whether anything is kept."""
        return self.num_slots > 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first forward."""
        return self.num_rows or -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens are kept, padding included; it is the same in all layers."""
        return self.num_slots

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the slot of the next token."""
        return self.num_slots

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1, because the cache grows without a limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length and offset of an attention mask."""
        return self.num_slots + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether anything is kept."""
        return self.num_slots > 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: the members' own layers write, each into its member's cache.

        Raises:
            UnsupportedModel: Always.
        """
        message = "a ProxyTunedCache belongs to a ProxyTunedForCausalLM, not to a single model"
        raise UnsupportedModel(message)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row; `tokens_to_remove` is negative, as in transformers.

        Raises:
            InvalidRequest: It is positive, or more tokens than are kept.
        """
        if not -self.num_slots <= tokens_to_remove <= 0:
            raise InvalidRequest(
                f"crop was given {tokens_to_remove}, but the cache keeps {self.num_slots} tokens.\n"
                f"hint: give a number from {-self.num_slots} to 0; -2 removes the last two tokens"
            )
        for each in self.backends:
            each.cache.crop(tokens_to_remove)
        self.num_slots += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Let the members keep what `crop` needs."""
        for each in self.backends:
            each.cache.activate_past_recording()

    def reset(self) -> None:
        """Forget everything."""
        for each in self.backends:
            each.cache = each.backend.new_cache()
        self.num_slots = self.num_rows = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows of the batch, in that order; rows may repeat."""
        for each in self.backends:
            each.cache.reorder_cache(each.cache_rows(beam_idx, self.num_rows))
        self.num_rows = len(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch; `indices` may be a boolean mask."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.num_rows:
            self.reorder_cache(torch.arange(self.num_rows).repeat_interleave(repeats))


def own_cache(given: Any) -> ProxyTunedCache:
    """Return the given cache, or a new one for None or an empty `DynamicCache`, which grows as well.

    Raises:
        InvalidRequest: It is a cache of another kind, or holds one model's tokens.
    """
    if isinstance(given, ProxyTunedCache):
        return given
    kind = type(given).__name__
    if isinstance(given, Cache) and given.get_seq_length():
        raise InvalidRequest(
            f"{CACHE_OPTION} is a {kind} that holds one model's tokens, and several models run here.\n"
            "hint: pass a cache that an earlier forward of this model returned"
        )
    grows = type(given) is DynamicCache and not given.offloading
    if given is not None and not grows:
        raise InvalidRequest(
            f"{CACHE_OPTION} is a {kind}, but each model of a recipe has a cache of its own that grows.\n"
            f"hint: leave {CACHE_OPTION} out"
        )
    return ProxyTunedCache([])
