"""Models of the Hugging Face Hub, run by transformers on CPU or GPU; LoRA adapters as rows of one forward.

Token ids only: text never reaches this file. `checkpoints/checkpoint.py` knows where a model's files are, and
`recipe/recipe.py` what a recipe asks for.

Words: a *slot* is one column of the KV cache. A row's tokens fill some slots, in order. The row's other slots
are *gaps*, which no token attends to: padding on the left of a short prompt, and tokens that the row took
back while other rows kept theirs. Positions are counted per row, so a gap changes nothing, and a rewind is
only bookkeeping. *Compacting* moves the gaps of all rows to the left, and drops the slots that are gaps in
every row. It happens when there are many gaps, and at once in models whose attention depends on distances
between slots (sliding windows).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from proxytune.backends import checks
from proxytune.backends.base import Capabilities, Prefilled
from proxytune.backends.transformers.attention import eager_attention, share_keys
from proxytune.backends.transformers.cuda_graphs import CudaRecorder, GraphRunner, Recorder
from proxytune.backends.transformers.cut import cut_with_bridge
from proxytune.backends.transformers.kv_cache import RoomyCache
from proxytune.backends.transformers.lengthwise import LengthwiseReader, Tokens
from proxytune.backends.transformers.linear import pack_linear_layers, speed_up_linear_layers
from proxytune.backends.transformers.lora import (
    PLAIN,
    ROW_ADAPTERS,
    RowAdapters,
    RowModule,
    give_rows_to_peft,
    put_rows_on,
)
from proxytune.backends.transformers.output import OutputSharer
from proxytune.backends.transformers.rotary import run_rows_through_lengths
from proxytune.backends.transformers.rows import (
    OwnCache,
    ReadAgain,
    RowsReader,
    SeparateState,
    keeps_state_in_modules,
    own_cache_class,
    pads_positions,
    reads_one_by_one,
)
from proxytune.backends.transformers.state import TransformersState
from proxytune.backends.transformers.temperature import POSITIONS, scale_queries_by_position
from proxytune.backends.transformers.weights import load_model, quietly
from proxytune.checkpoints.causal import check_causal
from proxytune.checkpoints.context import max_context
from proxytune.checkpoints.faults import faults_as
from proxytune.checkpoints.merge import merge_into, read_adapter
from proxytune.errors import BackendError, ProxytuneError, UnsupportedModel

if TYPE_CHECKING:
    from proxytune.checkpoints.adapter import AdapterFiles
    from proxytune.checkpoints.checkpoint import Checkpoint
    from proxytune.checkpoints.cut_checkpoint import CutCheckpoint
    from proxytune.recipe.spec import ModelSpec

PREFILL_TOKENS = 4096
"""Maximum number of tokens, over all rows, of one forward of a prefill: it limits memory for activations."""

GRAPH_ATTENTION = ("sdpa", "eager")
"""Implementations of attention that add the mask to the scores."""

MIN_CHUNK = 16
"""Minimum number of tokens per row of such a forward, however many rows there are."""


class TransformersBackend(OutputSharer):
    """A causal language model of transformers.

    `prefill`, `extend`, `rewind` and `select` keep a batch's state. `run` and `new_cache` are the layer
    below, for an engine that keeps its own state (`integrations/transformers.py`).

    Args:
        model: A causal language model, or a PEFT model around one. It is put into evaluation mode.
        name: What errors call it.
        adapters: Adapters that rows may be given, by the names that the model's layers have for them, or a
            mapping from other names to those.
        recorder: Makes CUDA graphs of short forwards; None launches every kernel by itself.
        owns_model: Whether nobody else uses the model. Then at the first forward the weights of large layers
            are packed.
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
        self._layer_names = dict(
            adapters if isinstance(adapters, Mapping) else {name: name for name in adapters}
        )
        speed_up_linear_layers(self.model)
        has_rows = any(isinstance(module, RowModule) for module in self.model.modules())
        self._has_lora = give_rows_to_peft(self.model) or has_rows
        self._may_pack = owns_model
        scale_queries_by_position(self.model)
        if owns_model:
            share_keys(self.model)
        check_causal(self.model.config, name)
        config = self.model.config.get_text_config(decoder=True)
        head = self.model.get_output_embeddings()
        self.vocab_size = int(getattr(head, "out_features", None) or config.vocab_size)
        self._num_embeddings = int(
            getattr(self.model.get_input_embeddings(), "num_embeddings", None) or config.vocab_size
        )
        self._options = frozenset(inspect.signature(self.model.forward).parameters)
        self._cache_option = cache_option(self.model)
        has_cache = self._cache_option is not None and not keeps_state_in_modules(self.model)
        has_own = has_cache and own_cache_class(self.model) is not None
        layers = _cache_layers(config, name) if has_cache and not has_own else []
        # Whether the model goes on with several tokens at once, and can take tokens back.
        has_blocks = not has_own and not reads_one_by_one(self.model)
        self._is_pure_attention = _is_pure_attention(layers) and has_blocks
        self._reader: LengthwiseReader | RowsReader | None = None
        if not has_cache or has_own or pads_positions(self.model, layers, self._options):
            make = self._model_cache if layers else OwnCache if has_own else ReadAgain
            self._reader = RowsReader(self._run, make)
        # Whether a layer caches token by token, so that an attention mask covers earlier tokens, too.
        self._has_slots = not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)
        self._allows_gaps = "position_ids" in self._options and _allows_gaps(self.model, layers)
        self._max_context = max_context(config)
        self._read_by_length()
        self._graphs = None if recorder is None else self._graph_runner(recorder)

    def _read_by_length(self) -> None:
        """Give each row the angles of its own length, if angles depend on that."""
        rule = run_rows_through_lengths(self.model, self.name)
        if rule is None:
            return
        if not self._is_pure_attention or self._reader is not None:
            raise UnsupportedModel(
                f"{self.name} is a {type(self.model).__name__} whose rotary angles depend on a sequence's "
                "length, which is supported with position ids and a KV cache entry per token in every layer"
            )
        self._reader = LengthwiseReader(rule, self._run, _piece_size)

    def _graph_runner(self, recorder: Recorder) -> GraphRunner:
        """Return what runs this model's short forwards as graphs."""
        attention = self.model.config._attn_implementation
        if not (self._is_pure_attention and self._allows_gaps) or attention not in GRAPH_ATTENTION:
            raise UnsupportedModel(
                f"{self.name} is a {type(self.model).__name__} with {attention} attention, and CUDA graphs "
                f"need plain attention in every layer ({' or '.join(GRAPH_ATTENTION)})\n"
                "hint: leave cuda_graphs out"
            )
        if isinstance(self._reader, RowsReader):
            raise UnsupportedModel(
                f"{self.name} is a {type(self.model).__name__}, whose rows run one by one, and a CUDA graph "
                "runs them together\nhint: leave cuda_graphs out"
            )
        if self._reader is not None:
            raise UnsupportedModel(
                f"the rotary angles of {self.name} depend on a row's length, and a CUDA graph has the same "
                "angles for all rows\nhint: leave cuda_graphs out"
            )

        def forward(
            token_ids: Tensor, positions: Tensor, mask: Tensor, cache: Any, adapters: RowAdapters
        ) -> Tensor:
            options = {"attention_mask": mask, "position_ids": positions}
            return self._forward(token_ids, cache, options, adapters)

        return GraphRunner(
            self.name, forward, recorder, dtype=self.model.dtype, max_context=self._max_context
        )

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        adapters: Mapping[str, AdapterFiles] | None = None,
        merged: AdapterFiles | None = None,
    ) -> TransformersBackend:
        """Load a model's weights, and adapters onto the same copy of them.

        Args:
            checkpoint: The model's files.
            spec: What the recipe asks for: dtype, device, quantisation, attention implementation.
            adapters: LoRA adapters by the names that rows will use.
            merged: An adapter that all rows have, merged into the weights.

        Raises:
            CorruptModel: The weights cannot be read or do not match the config.
            UnsupportedModel: transformers does not know the model, or an adapter is of an unknown kind, or
                rows cannot each have their own.
            AdapterMismatch: An adapter's weights do not fit the model.
            MissingExtra: A quantisation or attention library is not installed.
            NotEnoughMemory: The weights did not fit.
        """
        with quietly():
            model = load_model(checkpoint, spec)
            if merged is not None:
                merge_into(model, merged, checkpoint)
            put_rows_on(
                model,
                {name: read_adapter(own, checkpoint) for name, own in (adapters or {}).items()},
            )
        model.requires_grad_(False)
        recorder = CudaRecorder(_graph_device(model, checkpoint.name)) if spec.cuda_graphs else None
        return cls(
            model,
            name=checkpoint.name,
            adapters=tuple(adapters or ()),
            recorder=recorder,
            owns_model=True,
        )

    @classmethod
    def cut_out_of(
        cls,
        base: TransformersBackend,
        checkpoint: CutCheckpoint,
        adapters: Mapping[str, AdapterFiles],
    ) -> TransformersBackend:
        """Make a cut of a model that is loaded, sharing its weights.

        Args:
            base: The model, without the adapters that its own rows may have.
            checkpoint: Which layers are kept, and the bridge.
            adapters: LoRA adapters on the cut, by the names that rows will use.

        Raises:
            CorruptModel: The bridge cannot be read.
            AdapterMismatch: An adapter's weights do not fit the cut.
        """
        with quietly():
            model = cut_with_bridge(base.model, checkpoint)
            put_rows_on(
                model, {name: read_adapter(own, checkpoint) for name, own in adapters.items()}
            )
        model.requires_grad_(False)
        # Its attention is its own, and what it shares with the base is packed once for both.
        return cls(model, name=checkpoint.name, adapters=tuple(adapters), owns_model=True)

    @property
    def device(self) -> torch.device:
        """The device that token ids have to be on."""
        weight: Any = getattr(self.model.get_input_embeddings(), "weight", None)
        # Asked at every step, so search all the weights only if this one is offloaded.
        if weight is None or weight.device.type == "meta":
            weight = next(w for w in self.model.parameters() if w.device.type != "meta")
        device: torch.device = weight.device
        return device

    @property
    def capabilities(self) -> Capabilities:
        """What this model can do."""
        return Capabilities(
            max_context=self._max_context,
            can_rewind=self._is_pure_attention,
            can_merge=self._can_merge,
            adapters=tuple(self._layer_names),
            reuses_logits=self._graphs is not None,
            reuses_prompts=self._reader is None or self._reader.reuses_prompts,
            depends_on_length=isinstance(self._reader, LengthwiseReader),
        )

    @property
    def _can_share_output(self) -> bool:
        return self._is_pure_attention and self._reader is None and self._graphs is None

    @property
    def _can_merge(self) -> bool:
        return self._is_pure_attention or isinstance(self._reader, RowsReader)

    def new_cache(self) -> Any:
        """Return an empty KV cache of this model."""
        return self._reader.new_cache() if self._reader is not None else self._model_cache()

    def _model_cache(self) -> Any:
        """Return an empty cache that the model takes."""
        if self._is_pure_attention:
            # Every layer keeps all keys, so that any number of tokens can be taken back. The attention mask
            # takes care of sliding windows.
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
        prompt_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Run tokens through the model, append them to the cache and return logits.

        Args:
            token_ids: `[batch, num_tokens]`, on this model's device.
            cache: From `new_cache`; None to keep nothing.
            attention_mask: `[batch, slots + num_tokens]`, 0 at padding; None without padding.
            position_ids: `[batch, num_tokens]`; None for consecutive ones from the first slot on.
            adapters: The adapter of each row, None for the plain weights.
            num_logits: Number of last tokens to return logits for; 0 for all.
            prompt_lengths: The length of each row's whole prompt, if `token_ids` is a piece of prompts. None
                if tokens without any before them are whole prompts.

        Returns:
            `[batch, num_logits or num_tokens, vocab]` in the model's dtype.

        Raises:
            InvalidRequest: An adapter has an unknown name.
            BackendError: The model failed. The cache may hold half of a forward: drop it.
        """
        tokens = Tokens(token_ids, cache, attention_mask, position_ids, adapters, num_logits)
        if self._reader is None:
            return self._run(tokens)
        return self._reader.run(tokens, prompt_lengths)

    def _run(self, tokens: Tokens) -> Tensor:
        """Run one forward; see `run`."""
        num_rows, num_new = tokens.token_ids.shape
        mask, device = tokens.attention_mask, tokens.token_ids.device
        if mask is not None and not self._has_slots:
            # A pure state-space model has no slots; its state has left padding out already.
            mask = mask if mask.shape[1] == num_new else None
        options = {
            "attention_mask": mask,
            "position_ids": tokens.position_ids,
            "logits_to_keep": tokens.num_logits,
        }
        if self._may_pack:
            # Not when it is loaded, because a model that has not run yet may still be trained.
            self._may_pack = False
            pack_linear_layers(self.model, apart_from=self._borrowed)
        names = self._rows(tokens.adapters, num_rows)
        rows = RowAdapters(names, device) if self._has_lora else None
        try:
            with eager_attention(device):
                logits = self._forward(tokens.token_ids, tokens.cache, options, rows)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{self.name} ran out of memory on {num_rows} rows of {num_new} tokens\n"
                "hint: use a smaller batch, a shorter prompt, or a smaller dtype"
            ) from error
        except ProxytuneError:
            raise
        except Exception as error:
            raise BackendError(f"{self.name} failed: {type(error).__name__}: {error}") from error
        return logits[:, -tokens.num_logits :]

    def _forward(
        self, token_ids: Tensor, cache: Any, options: Mapping[str, Any], rows: RowAdapters | None
    ) -> Tensor:
        """Call the model with the options that it knows."""
        given: dict[Any, Any] = {**options, "use_cache": cache is not None}
        given[self._cache_option] = cache.made if isinstance(cache, OwnCache) else cache
        known: dict[str, Any] = {key: given[key] for key in given if key in self._options}
        adapters, positions = ROW_ADAPTERS.set(rows), POSITIONS.set(options["position_ids"])
        try:
            output: Any = self.model(input_ids=token_ids, **known)
        finally:
            ROW_ADAPTERS.reset(adapters)
            POSITIONS.reset(positions)
        if isinstance(cache, OwnCache):
            cache.made = getattr(output, str(self._cache_option))
        logits: Tensor = output.logits
        return logits

    def check_length(self, num_tokens: int) -> None:
        """Raise `PromptTooLong` if a row of `num_tokens` exceeds the model's context."""
        checks.check_length(self.name, num_tokens, self._max_context)

    def check_token_ids(self, token_ids: Tensor) -> None:
        """Raise `InvalidRequest` if the model has no embedding for a token id."""
        lowest, highest = (int(bound) for bound in torch.aminmax(token_ids))
        checks.check_token_ids(self.name, lowest, highest, self._num_embeddings)

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None] | None = None
    ) -> Prefilled[TransformersState]:
        """Run whole prompts, padded on the left; see `Backend.prefill`.

        Long prompts are run in chunks, so that memory for activations stays bounded.
        """
        checks.check_prompts(self.name, prompts)
        lengths = [len(prompt) for prompt in prompts]
        self.check_length(max(lengths))
        width = max(lengths)
        padded = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        self.check_token_ids(padded)
        device = self.device
        rows = tuple(adapters) if adapters is not None else (None,) * len(prompts)
        kind = SeparateState if isinstance(self._reader, RowsReader) else TransformersState
        state = kind(self.new_cache(), lengths, rows, device)
        mask = state.attention_mask(0)
        positions = (torch.arange(-width, 0) + torch.tensor(lengths)[:, None]).clamp(min=0)
        padded, positions = padded.to(device), positions.to(device)
        chunk = width
        if self._is_pure_attention:
            chunk = _piece_size(len(prompts))
        for start in range(0, width, chunk):
            logits = self.run(
                padded[:, start : start + chunk],
                cache=state.cache,
                attention_mask=None if mask is None else mask[:, : start + chunk],
                position_ids=positions[:, start : start + chunk],
                adapters=rows,
                num_logits=1,
                prompt_lengths=lengths,
            )
        return Prefilled(state, logits[:, -1])

    @torch.inference_mode()
    def extend(self, state: TransformersState, token_ids: Tensor) -> Tensor:
        """Append tokens; see `Backend.extend`."""
        checks.check_shape(self.name, token_ids.shape, len(state.lengths))
        num_new = token_ids.shape[1]
        self.check_length(max(state.lengths) + num_new)
        if token_ids.device.type == "cpu":  # elsewhere, a check would wait for the device
            self.check_token_ids(token_ids)
        token_ids = token_ids.to(self.device)
        if self._is_pure_attention:
            return self._append(state, token_ids)
        # Not every state-space model continues from its state when it is given several tokens at once.
        parts = [self._append(state, token_ids[:, i : i + 1]) for i in range(num_new)]
        return torch.cat(parts, dim=1)

    @torch.inference_mode()
    def rewind(self, state: TransformersState, num_tokens: Sequence[int]) -> None:
        """Forget the last tokens of each row; see `Backend.rewind`."""
        checks.check_rewind(
            self.name, num_tokens, state.lengths, can_rewind=self._is_pure_attention
        )
        state.rewind(num_tokens)
        self._compact_if_due(state)

    @torch.inference_mode()
    def select(self, state: TransformersState, rows: Sequence[int]) -> TransformersState:
        """Return a state of the given rows, which may repeat; see `Backend.select`."""
        rows = list(rows)
        if rows != list(range(len(state.lengths))):
            state.select(rows)
            if self._is_pure_attention and rows:
                self._compact_if_due(state)
        return state

    @torch.inference_mode()
    def copy(self, state: TransformersState, rows: Sequence[int]) -> TransformersState:
        """Return a separate state of the given rows; see `Backend.copy`."""
        if not self._can_merge:
            return super().copy(state, rows)
        return state.copy(list(rows))

    @torch.inference_mode()
    def merge(
        self, state: TransformersState, other: TransformersState, rows: Sequence[int]
    ) -> TransformersState:
        """Return a state of the rows of two; see `Backend.merge`."""
        if not self._can_merge:
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
        # Gaps cost attention, and compacting copies everything. An eighth of gaps balances the two.
        spare = longest // 8 + 16 if self._allows_gaps else 0
        if state.num_slots > longest + spare or not (self._allows_gaps or state.is_aligned):
            state.compact()

    def _rows(self, adapters: Sequence[str | None] | None, num_rows: int) -> list[str]:
        """Return the layers' name for each row's adapter."""
        names = checks.adapters_of(self.name, adapters, num_rows, self._layer_names)
        return [PLAIN if name is None else self._layer_names[name] for name in names]


def _piece_size(num_rows: int) -> int:
    """Return how many tokens per row of long prompts run at once."""
    return max(PREFILL_TOKENS // num_rows, MIN_CHUNK)


def cache_option(model: nn.Module) -> str | None:
    """Return the name of the cache among the arguments of a model's forward, or None if it takes none."""
    options = inspect.signature(model.forward).parameters
    # transformers 5.24 renamed it to `cache`; a model that brings its own code may still use the old names.
    names = ("cache", "past_key_values", "cache_params")
    return next((name for name in names if name in options), None)


def _cache_layers(config: Any, name: str) -> list[Any]:
    """Return a layer of a cache for each layer of a model; none for a model that keeps its own cache."""

    def error(why: str) -> UnsupportedModel:
        return UnsupportedModel(f"transformers cannot make a KV cache for {name}: {why}")

    with faults_as(error):
        return list(transformers.DynamicCache(config=config).layers)


def _is_pure_attention(layers: Sequence[Any]) -> bool:
    """Return whether every layer caches keys and values token by token, so that tokens can be taken back."""
    # By name: transformers 5.19 has no DummyLayer, for layers that use another layer's keys.
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        or type(layer).__name__ == "DummyLayer"
        for layer in layers
    )


def _allows_gaps(model: Any, layers: Sequence[Any]) -> bool:
    """Return whether attention depends on `position_ids` and mask alone, not on distances between slots."""
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        return False
    # Models that compute distances themselves (ALiBi, local attention) do not use the shared attention.
    return bool(getattr(model, "_supports_attention_backend", False))


def _graph_device(model: Any, name: str) -> torch.device:
    """Return the CUDA device that the whole model is on."""
    places = {weight.device for weight in model.parameters()}
    device: torch.device = min(places, key=str)
    if len(places) > 1 or device.type != "cuda":
        where = ", ".join(sorted(map(str, places)))
        raise UnsupportedModel(
            f"cuda_graphs is set and {name} is on {where}, but CUDA graphs need a model on one CUDA device.\n"
            "hint: leave cuda_graphs out, or give the model a device such as cuda:0"
        )
    return device
