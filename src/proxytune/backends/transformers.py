"""Models of the Hugging Face Hub, run by transformers on CPU or GPU; LoRA adapters as rows of one forward.

Token ids only: text never reaches this file. Where a model's files are is known to `checkpoint.py`, what a
recipe asks for to `recipe.py`.

Words: a *slot* is one column of the KV cache. Each row fills the slots of its own tokens, in their order; the
others are *gaps*, which no token attends to: padding on the left of a short prompt, and what a row took back
while others kept theirs. Positions are counted per row, so a gap changes nothing, and a rewind is only
bookkeeping. *Compacting* moves the gaps of all rows to the left, where slots without any token are dropped.
That happens when gaps become many, and at once in models whose attention looks at distances between slots
(sliding windows).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from proxytune.backends.attention import share_keys
from proxytune.backends.base import Backend, Capabilities, Prefilled
from proxytune.backends.cuda_graphs import CudaRecorder, GraphRunner, Recorder
from proxytune.backends.kv_cache import RoomyCache
from proxytune.backends.linear import pack_linear_layers, speed_up_linear_layers
from proxytune.backends.lora import PLAIN, ROW_ADAPTERS, RowAdapters, run_rows_through_adapters
from proxytune.checkpoint import max_context, running_device, running_dtype
from proxytune.errors import (
    AdapterMismatch,
    BackendError,
    CorruptModel,
    InvalidRequest,
    MissingExtra,
    ModelNotFound,
    NotEnoughMemory,
    PromptTooLong,
    ProxytuneError,
    UnsafeModel,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from proxytune.checkpoint import AdapterFiles, Checkpoint
    from proxytune.recipe import ModelSpec

PREFILL_TOKENS = 4096
"""Most tokens, over all rows, of one forward of a prompt: its activations bound the memory of a prefill."""

GRAPH_ATTENTION = ("sdpa", "eager")
"""Implementations of attention that take a mask of numbers."""

MIN_CHUNK = 16
"""Fewest tokens per row of such a forward, however many rows there are."""


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


class TransformersBackend(Backend[TransformersState]):
    """A causal language model of transformers.

    `prefill`, `extend`, `rewind` and `select` keep the books of a batch. `run` and `new_cache` are the layer
    below, for an engine that keeps its own (`integrations/transformers.py`).

    Args:
        model: A causal language model, or a PEFT model around one. It is put into evaluation mode.
        name: How errors call it.
        adapters: Adapters that rows may be given, by their PEFT names, or a mapping from other names to
            those.
        recorder: Makes CUDA graphs of short forwards; None launches every kernel by itself.
        owns_model: Whether nobody else wants the model as it is. Then faster layers take the place of PEFT's,
            which PEFT could not train, switch or save, and at the first forward the weights of large layers
            are laid out anew.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        adapters: Sequence[str] | Mapping[str, str] = (),
        recorder: Recorder | None = None,
        owns_model: bool = False,
    ) -> None:
        self.name = name
        wrapped: Any = model
        self.model: Any = wrapped.get_base_model() if hasattr(wrapped, "peft_config") else wrapped
        self.model.eval()
        self._peft_names = dict(
            adapters if isinstance(adapters, Mapping) else {name: name for name in adapters}
        )
        speed_up_linear_layers(self.model)
        self._has_lora = run_rows_through_adapters(self.model, replace=owns_model)
        self._may_pack = owns_model
        if owns_model:
            share_keys(self.model)
        config = self.model.config.get_text_config(decoder=True)
        head = self.model.get_output_embeddings()
        self.vocab_size = int(getattr(head, "out_features", None) or config.vocab_size)
        self._num_embeddings = int(
            getattr(self.model.get_input_embeddings(), "num_embeddings", None) or config.vocab_size
        )
        self._options = frozenset(inspect.signature(self.model.forward).parameters)
        self._cache_option = cache_option(self.model)
        if self._cache_option is None:
            raise UnsupportedModel(
                f"{name} is a {type(self.model).__name__}, which takes no KV cache, so it cannot decode "
                "one token at a time"
            )
        self._is_pure_attention = _is_pure_attention(config)
        self._has_slots = _has_slots(config)
        self._allows_gaps = "position_ids" in self._options and _allows_gaps(self.model, config)
        self._max_context = max_context(config)
        self._graphs = None
        if recorder is not None:
            self._graphs = self._graph_runner(recorder)

    def _graph_runner(self, recorder: Recorder) -> GraphRunner:
        """Return what runs this model's short forwards as graphs.

        Raises:
            UnsupportedModel: The model looks at something else than a mask and positions.
        """
        attention = self.model.config._attn_implementation
        if not (self._is_pure_attention and self._allows_gaps) or attention not in GRAPH_ATTENTION:
            raise UnsupportedModel(
                f"{self.name} is a {type(self.model).__name__} with {attention} attention, and CUDA graphs "
                f"need plain attention in every layer ({' or '.join(GRAPH_ATTENTION)})\n"
                "hint: leave cuda_graphs out"
            )

        def forward(
            token_ids: Tensor, positions: Tensor, mask: Tensor, cache: Any, adapters: RowAdapters
        ) -> Tensor:
            options = {"attention_mask": mask, "position_ids": positions}
            return self._forward(token_ids, cache, options, adapters)

        return GraphRunner(
            self.name,
            forward,
            recorder,
            dtype=self.model.dtype,
            max_context=self._max_context,
        )

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        adapters: Mapping[str, AdapterFiles] | None = None,
    ) -> TransformersBackend:
        """Load a model's weights, and adapters onto the same copy of them.

        Args:
            checkpoint: The model's files.
            spec: What the recipe asks for: dtype, device, quantisation, attention implementation.
            adapters: LoRA adapters by the names that rows will use.

        Raises:
            CorruptModel: The weights cannot be read or do not belong to the config.
            UnsafeModel: There are only pickled weights and `allow_pickle` is not set.
            UnsupportedModel: transformers does not know the model, or an adapter changes more than LoRA
                layers.
            AdapterMismatch: An adapter's weights do not fit the model.
            MissingExtra: A quantisation or attention library is not installed.
            NotEnoughMemory: The weights did not fit.
        """
        with quietly():
            model = load_model(checkpoint, spec)
            names: dict[str, str] = {}
            if adapters:
                model, names = _add_adapters(model, checkpoint.name, adapters, spec.allow_pickle)
        model.requires_grad_(False)
        recorder = CudaRecorder(_graph_device(model, checkpoint.name)) if spec.cuda_graphs else None
        return cls(model, name=checkpoint.name, adapters=names, recorder=recorder, owns_model=True)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        weight: Any = getattr(self.model.get_input_embeddings(), "weight", None)
        # Only a weight that is offloaded makes it look through all: this is asked at every step.
        if weight is None or weight.device.type == "meta":
            weight = next(w for w in self.model.parameters() if w.device.type != "meta")
        device: torch.device = weight.device
        return device

    @property
    def capabilities(self) -> Capabilities:
        """Say what this model can do."""
        return Capabilities(
            max_context=self._max_context,
            can_rewind=self._is_pure_attention,
            can_merge=self._is_pure_attention,
            adapters=tuple(self._peft_names),
            reuses_logits=self._graphs is not None,
        )

    def new_cache(self) -> Any:
        """Return an empty KV cache of this model."""
        if self._is_pure_attention:
            # Every layer keeps all keys, so that any number of tokens can be taken back. A sliding window is
            # then up to the attention mask.
            return RoomyCache()
        return transformers.DynamicCache(config=self.model.config)

    def run(
        self,
        token_ids: Tensor,
        *,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        adapters: Sequence[str | None] | None = None,
        num_logits: int = 0,
    ) -> Tensor:
        """Run tokens through the model, append them to the cache and return logits.

        Args:
            token_ids: `[batch, num_tokens]`, on this model's device.
            cache: From `new_cache`; None to keep nothing.
            attention_mask: `[batch, slots + num_tokens]`, 0 at padding; None where there is none.
            position_ids: `[batch, num_tokens]`; None for consecutive ones from the first slot on.
            adapters: The adapter of each row, None for the plain weights.
            num_logits: Return logits of the last so many tokens only; 0 for all.

        Returns:
            `[batch, num_logits or num_tokens, vocab]` in the model's dtype.

        Raises:
            InvalidRequest: An adapter has an unknown name.
            BackendError: The model failed. The cache may hold half of a forward: drop it.
        """
        if (
            not self._has_slots
            and attention_mask is not None
            and attention_mask.shape[1] != token_ids.shape[1]
        ):
            attention_mask = (
                None  # a pure state-space model has no slots: its state has left padding out
            )
        options = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "logits_to_keep": num_logits,
        }
        if self._may_pack:
            # Here, not when it is loaded: a model that is only loaded may be trained.
            self._may_pack = False
            pack_linear_layers(self.model)
        rows = None
        if self._has_lora:
            rows = RowAdapters(self._rows(adapters, token_ids.shape[0]), token_ids.device)
        try:
            logits = self._forward(token_ids, cache, options, rows)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{self.name} ran out of memory on {token_ids.shape[0]} rows of {token_ids.shape[1]} tokens\n"
                "hint: use a smaller batch, a shorter prompt, or a smaller dtype"
            ) from error
        except ProxytuneError:
            raise
        except Exception as error:
            raise BackendError(f"{self.name} failed: {type(error).__name__}: {error}") from error
        return logits[:, -num_logits:]

    def _forward(
        self, token_ids: Tensor, cache: Any, options: Mapping[str, Any], rows: RowAdapters | None
    ) -> Tensor:
        """Call the model with those of the options that it knows."""
        known: dict[str, Any] = {key: options[key] for key in options if key in self._options}
        if "use_cache" in self._options:
            known["use_cache"] = cache is not None
        token = ROW_ADAPTERS.set(rows)
        try:
            logits: Tensor = self.model(
                input_ids=token_ids, **{self._cache_option or "": cache}, **known
            ).logits
        finally:
            ROW_ADAPTERS.reset(token)
        return logits

    def check_length(self, num_tokens: int) -> None:
        """Raise `PromptTooLong` if a row of so many tokens exceeds the model's context."""
        if self._max_context is not None and num_tokens > self._max_context:
            raise PromptTooLong(
                f"{self.name} can hold {self._max_context} tokens, and was asked to hold {num_tokens}.\n"
                "hint: shorten the prompt, or ask for fewer new tokens"
            )

    def check_token_ids(self, token_ids: Tensor) -> None:
        """Raise `InvalidRequest` if the model has no embedding for a token id."""
        lowest, highest = (int(bound) for bound in torch.aminmax(token_ids))
        if lowest < 0 or highest >= self._num_embeddings:
            wrong = lowest if lowest < 0 else highest
            raise InvalidRequest(
                f"{self.name} has no token {wrong}; its token ids go from 0 to {self._num_embeddings - 1}"
            )

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None] | None = None
    ) -> Prefilled[TransformersState]:
        """Run whole prompts, padded on the left, and return the state and the logits after each.

        Long prompts are run in chunks, so that memory for activations stays bounded.

        Raises:
            InvalidRequest: A prompt is empty or has a token id the model does not have, or an adapter has
                an unknown name.
            PromptTooLong: A prompt exceeds the model's context.
            BackendError: The model failed.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or not min(lengths):
            raise InvalidRequest(
                f"{self.name} was given an empty prompt, so there is nothing to continue"
            )
        self.check_length(max(lengths))
        width = max(lengths)
        padded = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        self.check_token_ids(padded)
        device = self.device
        rows = tuple(adapters) if adapters is not None else (None,) * len(prompts)
        state = TransformersState(self.new_cache(), lengths, rows, device)
        mask = state.attention_mask(0)
        positions = (torch.arange(-width, 0) + torch.tensor(lengths)[:, None]).clamp(min=0)
        padded, positions = padded.to(device), positions.to(device)
        chunk = width
        if self._is_pure_attention:
            chunk = max(PREFILL_TOKENS // len(prompts), MIN_CHUNK)
        for start in range(0, width, chunk):
            logits = self.run(
                padded[:, start : start + chunk],
                cache=state.cache,
                attention_mask=None if mask is None else mask[:, : start + chunk],
                position_ids=positions[:, start : start + chunk],
                adapters=rows,
                num_logits=1,
            )
        return Prefilled(state, logits[:, -1])

    @torch.inference_mode()
    def extend(self, state: TransformersState, token_ids: Tensor) -> Tensor:
        """Append `[batch, num_tokens]` token ids and return logits `[batch, num_tokens, vocab]`.

        Raises:
            InvalidRequest: The model does not have a token id (looked at where they are on the CPU), or the
                rows are not the state's.
            PromptTooLong: A row would exceed the model's context.
            BackendError: The model failed. The state cannot be used again.
        """
        if (
            token_ids.dim() != 2
            or token_ids.shape[0] != len(state.lengths)
            or not token_ids.shape[1]
        ):
            raise InvalidRequest(
                f"{self.name} was given token ids of shape {list(token_ids.shape)}, and needs "
                f"[{len(state.lengths)}, num_tokens] with at least one token"
            )
        num_new = token_ids.shape[1]
        self.check_length(max(state.lengths) + num_new)
        if token_ids.device.type == "cpu":  # elsewhere, looking at them would wait for the device
            self.check_token_ids(token_ids)
        token_ids = token_ids.to(self.device)
        if self._is_pure_attention:
            return self._append(state, token_ids)
        # Not every state-space model goes on from its state when it is given several tokens at once.
        return torch.cat(
            [self._append(state, token_ids[:, i : i + 1]) for i in range(num_new)], dim=1
        )

    @torch.inference_mode()
    def rewind(self, state: TransformersState, num_tokens: Sequence[int]) -> None:
        """Forget the last `num_tokens[row]` tokens of each row.

        Raises:
            UnsupportedModel: The model has layers that cannot forget.
            InvalidRequest: A row does not hold that many tokens.
        """
        if not self._is_pure_attention:
            raise UnsupportedModel(
                f"{self.name} has layers without a KV cache of their own for each token, so tokens cannot be "
                "taken back"
            )
        if len(num_tokens) != len(state.lengths) or any(
            not 0 <= n <= length for n, length in zip(num_tokens, state.lengths, strict=True)
        ):
            raise InvalidRequest(
                f"{self.name} cannot rewind rows of {state.lengths} tokens by {list(num_tokens)}"
            )
        state.rewind(num_tokens)
        self._compact_if_due(state)

    @torch.inference_mode()
    def select(self, state: TransformersState, rows: Sequence[int]) -> TransformersState:
        """Return a state of the given rows in the given order; rows may repeat.

        The old state must not be used after.
        """
        rows = list(rows)
        if rows != list(range(len(state.lengths))):
            state.select(rows)
            if self._is_pure_attention and rows:
                self._compact_if_due(state)
        return state

    @torch.inference_mode()
    def copy(self, state: TransformersState, rows: Sequence[int]) -> TransformersState:
        """Return a state of its own of the given rows; see `Backend.copy`.

        Raises:
            UnsupportedModel: The model has layers without a KV cache of their own for each token.
        """
        if not self._is_pure_attention:
            return super().copy(state, rows)
        return state.copy(list(rows))

    @torch.inference_mode()
    def merge(
        self, state: TransformersState, other: TransformersState, rows: Sequence[int]
    ) -> TransformersState:
        """Return a state of the rows of two; see `Backend.merge`.

        Raises:
            UnsupportedModel: The model has layers without a KV cache of their own for each token.
        """
        if not self._is_pure_attention:
            return super().merge(state, other, rows)
        state.merge(other, list(rows))
        self._compact_if_due(state)
        return state

    def _append(self, state: TransformersState, token_ids: Tensor) -> Tensor:
        num_new = token_ids.shape[1]
        logits = None
        if self._graphs is not None:
            names = self._rows(state.adapters, len(state.lengths))
            logits = self._graphs.run(state, token_ids, names)
        if logits is None:
            logits = self.run(
                token_ids,
                cache=state.cache,
                attention_mask=state.attention_mask(num_new),
                position_ids=state.position_ids(num_new),
                adapters=state.adapters,
            )
        state.append(num_new)
        return logits

    def _compact_if_due(self, state: TransformersState) -> None:
        longest = max(state.lengths)
        # Allowed gaps are attended to for nothing, and compacting copies everything: an eighth balances them.
        spare = longest // 8 + 16 if self._allows_gaps else 0
        if state.num_slots > longest + spare or not (self._allows_gaps or state.is_aligned):
            state.compact()

    def _rows(self, adapters: Sequence[str | None] | None, num_rows: int) -> list[str]:
        """Return PEFT's name for the adapter of each row."""
        if adapters is None:
            return [PLAIN] * num_rows
        if len(adapters) != num_rows:
            raise InvalidRequest(
                f"{self.name} was given {len(adapters)} adapters for {num_rows} rows"
            )
        try:
            return [PLAIN if name is None else self._peft_names[name] for name in adapters]
        except KeyError as error:
            known = ", ".join(self._peft_names) or "none"
            raise InvalidRequest(
                f"{self.name} has no adapter {error.args[0]!r}; it has: {known}"
            ) from None


def _graph_device(model: Any, name: str) -> torch.device:
    """Return the one CUDA device that all of a model is on."""
    places = {weight.device for weight in model.parameters()}
    device: torch.device = min(places, key=str)
    if len(places) > 1 or device.type != "cuda":
        where = ", ".join(sorted(map(str, places)))
        raise UnsupportedModel(
            f"cuda_graphs is set and {name} is on {where}, and a CUDA graph is made on one CUDA device.\n"
            "hint: leave cuda_graphs out, or give the model a device such as cuda:0"
        )
    return device


def cache_option(model: nn.Module) -> str | None:
    """Return what a model's forward calls its cache, or None where it takes none."""
    options = inspect.signature(model.forward).parameters
    # transformers 5.24 renamed it to `cache`; code that comes with a model may not have followed.
    names = ("cache", "past_key_values", "cache_params")
    return next((name for name in names if name in options), None)


def _is_pure_attention(config: Any) -> bool:
    """Whether every layer's cache is keys and values of single tokens, so that tokens can be taken back."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = transformers.DynamicCache(config=config).layers
    # By name: transformers 5.19 has no DummyLayer, for layers that use another layer's keys.
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        or type(layer).__name__ == "DummyLayer"
        for layer in layers
    )


def _has_slots(config: Any) -> bool:
    """Whether a layer keeps tokens one by one, so that an attention mask tells of those before, too."""
    from transformers.cache_utils import CacheLayerMixin

    layers = transformers.DynamicCache(config=config).layers
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def _allows_gaps(model: Any, config: Any) -> bool:
    """Whether attention knows tokens by `position_ids` and mask alone, not by the distance of their slots."""
    layers = transformers.DynamicCache(config=config).layers
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        return False
    # Models with distances of their own (ALiBi, local attention) do not run on the attention others share.
    return bool(getattr(model, "_supports_attention_backend", False))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence progress bars, log lines and warnings of transformers and PEFT, and put all back after."""
    import huggingface_hub.utils
    import transformers.utils.logging

    hub: Any = huggingface_hub.utils
    logging: Any = transformers.utils.logging
    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    had_hub_bars = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
        # transformers switches the hub's bars with its own.
        if had_hub_bars:
            hub.enable_progress_bars()
        else:
            hub.disable_progress_bars()


def load_model(checkpoint: Checkpoint, spec: ModelSpec) -> Any:
    """Load the weights with transformers and translate what goes wrong."""
    from safetensors import SafetensorError

    name = checkpoint.name
    device = running_device(spec.device)
    options: dict[str, Any] = {
        "dtype": getattr(
            torch, running_dtype(spec.dtype, stored_dtype=checkpoint.stored_dtype, device=device)
        ),
        "use_safetensors": None if spec.allow_pickle else True,
        "trust_remote_code": spec.trust_remote_code,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization is not None:
        options["quantization_config"] = _quantization_config(spec.quantization, name)
    if device != "cpu" or spec.quantization is not None:
        options["device_map"] = device if device == "auto" else {"": device}
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.weights_path(), **options
        )
    except ProxytuneError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NotEnoughMemory(
            f"the weights of {name} do not fit into the memory of {device}: {error}\n"
            'hint: choose a smaller dtype, a quantization, or device "auto" to spread them'
        ) from error
    except ImportError as error:
        raise MissingExtra(
            f"{name} needs a package that is not installed: {error}\n"
            "hint: pip install 'proxytune[quantize]' for quantization; leave attn_implementation out to use "
            "the one that torch brings"
        ) from error
    except (SafetensorError, json.JSONDecodeError, EOFError) as error:
        raise CorruptModel(f"the files of {name} cannot be read: {error}") from error
    except RuntimeError as error:
        raise CorruptModel(f"the weights of {name} do not fit its config: {error}") from error
    except OSError as error:
        raise ModelNotFound(f"the weights of {name} cannot be opened: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"transformers cannot load {name} as asked: {error}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CorruptModel(
            f"the files of {name} lack {len(missing)} weights, which would be random: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )
    return model


def _quantization_config(quantization: Mapping[str, Any], name: str) -> Any:
    """Return transformers' config for `{"quant_method": …, options}`; `method` is the same.

    `{"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig", …}` names a class of
    `torchao.quantization` and its options. Without a method, `load_in_4bit` and `load_in_8bit` are
    bitsandbytes'.
    """
    options = dict(quantization)
    method = options.pop("quant_method", None) or options.pop("method", None)
    if method is None and ("load_in_4bit" in options or "load_in_8bit" in options):
        method = "bitsandbytes"
    if method == "bitsandbytes":
        _require("bitsandbytes", name)
        return _build(transformers.BitsAndBytesConfig, options, "bitsandbytes", name)
    if method == "torchao":
        torchao = _require("torchao.quantization", name)
        kind = options.pop("quant_type", None)
        known = sorted(key for key in vars(torchao) if key.endswith("Config"))
        if kind not in known:
            raise UnsupportedModel(
                f"the quantization of {name} has quant_type {kind!r}; torchao knows: {', '.join(known)}"
            )
        own = {key: options.pop(key) for key in ("modules_to_not_convert",) if key in options}
        quant_type = _build(getattr(torchao, kind), options, f"torchao's {kind}", name)
        return transformers.TorchAoConfig(quant_type, **own)
    raise UnsupportedModel(
        f"the quantization of {name} has method {method!r}; this backend knows bitsandbytes and torchao"
    )


def _build(kind: Any, options: Mapping[str, Any], what: str, name: str) -> Any:
    """Call a config class, refusing options it would ignore."""
    known = inspect.signature(kind).parameters
    unknown = [key for key in options if key not in known or key == "kwargs"]
    if unknown:
        raise UnsupportedModel(
            f"the quantization of {name} has the option {unknown[0]!r}, which {what} does not know; it "
            f"knows: {', '.join(key for key in known if key != 'kwargs')}"
        )
    try:
        return kind(**options)
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModel(
            f"the quantization of {name} is not one of {what}: {error}"
        ) from error


def _require(module: str, name: str) -> Any:
    """Import a quantisation library."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(
            f"{name} is to be quantised with {package}, which cannot be imported: {error}\n"
            "hint: pip install 'proxytune[quantize]'"
        ) from error


_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the weights under an adapter as they are."""


def _add_adapters(
    model: Any, model_name: str, adapters: Mapping[str, AdapterFiles], allow_pickle: bool
) -> tuple[Any, dict[str, str]]:
    """Put LoRA adapters onto a model; return it and PEFT's names for them."""
    from peft import PeftModel, set_peft_model_state_dict

    names = {name: f"adapter_{index}" for index, name in enumerate(adapters)}  # PEFT allows no dots
    wrapped: Any = None
    for name, files in adapters.items():
        config, weights = read_adapter(files, allow_pickle=allow_pickle)
        config.inference_mode = True
        misfit = f"adapter {files.name} does not fit {model_name}"
        hint = "\nhint: an adapter fits only the model it was trained on"
        try:
            if wrapped is None:
                wrapped = PeftModel(model, config, names[name], autocast_adapter_dtype=False)
            else:
                wrapped.add_adapter(names[name], config, autocast_adapter_dtype=False)
            result: Any = set_peft_model_state_dict(wrapped, weights, names[name])
        except (ValueError, RuntimeError, KeyError) as error:
            raise AdapterMismatch(f"{misfit}: {error}{hint}") from error
        missing = [key for key in result.missing_keys if f".{names[name]}." in key]
        wrong = list(result.unexpected_keys) or missing
        if wrong:
            what = (
                "has weights the model has no place for"
                if result.unexpected_keys
                else "lacks weights"
            )
            raise AdapterMismatch(
                f"{misfit}: it {what}, {wrong[0]} and {len(wrong) - 1} more{hint}"
            )
    return wrapped, names


def read_adapter(files: AdapterFiles, *, allow_pickle: bool) -> tuple[Any, dict[str, Tensor]]:
    """Return a LoRA adapter's config, as PEFT reads it, and its weights on the CPU.

    Raises:
        CorruptModel: It cannot be read.
        UnsafeModel: It has only pickled weights, and those are not allowed.
        ModelNotFound: It has no weights.
        UnsupportedModel: It is more than products of two matrices beside linear layers.
    """
    from peft import PeftConfig

    try:
        config: Any = PeftConfig.from_pretrained(str(files.path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CorruptModel(f"the config of adapter {files.name} cannot be read: {error}") from error
    weights = _adapter_weights(files, allow_pickle)
    _check_adapter_kind(config, weights, files.name)
    return config, weights


def _adapter_weights(files: AdapterFiles, allow_pickle: bool) -> dict[str, Tensor]:
    """Read an adapter's weights on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = files.path / "adapter_model.safetensors"
    pickled = files.path / "adapter_model.bin"
    try:
        if path.is_file():
            return load_file(path)
        if allow_pickle and pickled.is_file():
            weights: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
            return weights
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise CorruptModel(
            f"the weights of adapter {files.name} cannot be read: {error}"
        ) from error
    if pickled.is_file():
        raise UnsafeModel(
            f"adapter {files.name} has only pickled weights, and unpickling can run code.\n"
            "hint: save it as safetensors, or set allow_pickle if you trust it"
        )
    raise ModelNotFound(f"adapter {files.name} has no adapter_model.safetensors in {files.path}")


def _check_adapter_kind(config: Any, weights: Mapping[str, Tensor], name: str) -> None:
    """Refuse an adapter that cannot share one forward with plain rows."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UnsupportedModel(
            f"adapter {name} is of kind {kind}, and only LORA adapters can share a forward with plain rows\n"
            "hint: merge the adapter into a copy of its model and give that as the expert's model"
        )
    changes = [
        key
        for key in (
            "modules_to_save",
            "trainable_token_indices",
            "target_parameters",
            "layer_replication",
            "use_dora",
            "alora_invocation_tokens",
        )
        if getattr(config, key, None)
    ]
    if getattr(config, "bias", "none") != "none":
        changes.append(f"bias {config.bias!r}")
    if getattr(config, "init_lora_weights", True) not in _INITIALISATIONS:
        changes.append(f"init_lora_weights {config.init_lora_weights!r}")
    changes += [key for key in weights if ".lora_A." not in key and ".lora_B." not in key][:1]
    if changes:
        raise UnsupportedModel(
            f"adapter {name} changes more than what can be switched for each row: {', '.join(changes)}\n"
            "hint: merge the adapter into a copy of its model and give that as the expert's model"
        )
