"""GGUF files run by llama.cpp as they are: quantised, on a laptop's processor or a GPU.

Token ids only: text never reaches this file, and llama.cpp's own tokenizer is not used. The calls go to the
low-level interface of llama-cpp-python, one `llama_decode` for all rows of a step.

Words: a *context* is llama.cpp's: a KV cache with room for some tokens of some *sequences*, one per row. An
adapter belongs to a whole context, so rows with different adapters are in different contexts, which share the
weights. A context's room is fixed. When it is full, its sequences are copied into a larger one, up to a
maximum size.

If possible, the logits that `prefill` and `extend` return are in llama.cpp's own memory, and the next call on
the same state overwrites them (`Capabilities.reuses_logits`).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from proxytune.backends import checks
from proxytune.backends.base import Backend, Capabilities, Prefilled
from proxytune.errors import (
    AdapterMismatch,
    BackendError,
    CorruptModel,
    NotEnoughMemory,
    UnsupportedModel,
    VocabularyMismatch,
    missing_extra,
    pip_install,
)

if TYPE_CHECKING:
    from proxytune.checkpoints.adapter import AdapterFiles
    from proxytune.checkpoints.checkpoint import Checkpoint
    from proxytune.recipe.spec import LlamaCppSettings, ModelSpec

FIRST_ROOM = 512
"""Tokens per row that a context has room for at first: it takes long to make a large one."""

BATCH_TOKENS = 512
"""Maximum number of tokens of one `llama_decode`: llama.cpp's default."""

BATCH_OUTPUTS = 128
"""Maximum number of tokens of one `llama_decode` with logits: it limits llama.cpp's working memory."""

_CACHE_DTYPES = {"float32": "GGML_TYPE_F32", "float16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0"}


def library() -> Any:
    """Return llama-cpp-python's low-level interface.

    Raises:
        MissingExtra: It is not installed, or does not load.
    """
    is_first = "llama_cpp" not in sys.modules
    try:
        import llama_cpp.llama_cpp as api
    except (ImportError, OSError, RuntimeError) as error:
        raise missing_extra(
            f"a .gguf file is to be run by llama.cpp, and llama-cpp-python cannot be imported: {error}",
            "gguf",
            "which compiles for some minutes; or leave llama_cpp out of the recipe, and transformers unpacks "
            "the file",
        ) from error
    if is_first:
        # By default it prints whatever llama.cpp logs. A program that imported it before has made its choice.
        with contextlib.suppress(ImportError, AttributeError):
            from llama_cpp import _logger

            _logger.set_verbose(False)
    return api


class _Handle:
    """Owns a llama.cpp context for as long as anything uses its memory."""

    def __init__(self, api: Any, pointer: Any, model: _Model) -> None:
        self._api = api
        self.pointer = pointer
        self._model = model  # has to outlive the context

    def __del__(self) -> None:
        self._api.llama_free(self.pointer)


class _Context:
    """A llama.cpp context with one adapter or none, and room for `room` tokens of each sequence."""

    def __init__(
        self, backend: LlamaCppBackend, adapter: str | None, num_sequences: int, room: int
    ) -> None:
        self._api = api = library()
        self.backend = backend
        self.adapter = adapter
        self.num_sequences = num_sequences
        self._max_outputs = max(BATCH_OUTPUTS, num_sequences)
        settings = api.llama_context_default_params()
        settings.n_ctx = num_sequences * min(max(room, FIRST_ROOM), backend.context_size)
        settings.n_seq_max = num_sequences
        settings.n_batch = settings.n_ubatch = max(BATCH_TOKENS, self._max_outputs)
        settings.n_outputs_max = self._max_outputs
        settings.n_threads = settings.n_threads_batch = backend.num_threads
        settings.type_k = settings.type_v = getattr(api, _CACHE_DTYPES[backend.cache_dtype])
        if backend.cache_dtype == "float32":
            # llama.cpp's flash attention rounds to half precision internally.
            settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Every layer keeps all keys, even with a sliding window, so that any number can be taken back.
        settings.swa_full = True
        settings.no_perf = True
        with _messages(api) as messages:
            pointer = api.llama_init_from_model(backend.model.pointer, settings)
        if not pointer:
            raise NotEnoughMemory(
                f"llama.cpp has no room for {num_sequences} rows of "
                f"{settings.n_ctx // num_sequences} tokens of {backend.name}{_last_of(messages)}\n"
                "hint: set a smaller context_size or cache_dtype in llama_cpp, or a smaller batch"
            )
        self._handle = _Handle(api, pointer, backend.model)
        self.pointer = pointer
        self._view: tuple[tuple[int, int], Tensor] | None = None
        self.has_pending_copy = False
        """Whether `copy` was called since the last decode; llama.cpp copies only in the next one."""
        self._memory = api.llama_get_memory(pointer)
        self.room = int(api.llama_n_ctx_seq(pointer))
        if adapter is not None:
            adapters = (api.llama_adapter_lora_p_ctypes * 1)(backend.adapter_pointers[adapter])
            scales = (ctypes.c_float * 1)(1.0)
            if api.llama_set_adapters_lora(pointer, adapters, 1, scales):
                raise BackendError(f"{backend.name} does not take the adapter {adapter}")
        size = int(settings.n_batch)
        # The arrays that `llama_decode` reads; the pointers into them stay the same.
        self._token_ids = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._num_sequences_of = np.ones(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        addresses = self._sequences.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self._sequence_pointers = addresses.astype(np.uint64)
        self._wanted = np.zeros(size, np.int8)

        def pointer_to(array: Any, kind: Any) -> Any:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

        self._batch = api.llama_batch()
        self._batch.token = pointer_to(self._token_ids, api.llama_token)
        self._batch.pos = pointer_to(self._positions, api.llama_pos)
        self._batch.n_seq_id = pointer_to(self._num_sequences_of, ctypes.c_int32)
        self._batch.seq_id = pointer_to(self._sequence_pointers, ctypes.POINTER(api.llama_seq_id))
        self._batch.logits = pointer_to(self._wanted, ctypes.c_int8)

    def run(self, token_ids: Any, positions: Any, sequences: Any, wanted: Any) -> list[Tensor]:
        """Run tokens in as few decodes as possible, and return the logits after those that are wanted.

        All arguments are `[num_tokens]`: ids, positions and sequences are int32, `wanted` is bool. Returns
        `[num_wanted, vocab]` float32 in pieces, one per decode; a single piece is in llama.cpp's memory.
        """
        num_tokens = len(token_ids)
        if num_tokens <= self._max_outputs and wanted.all():
            self._decode(token_ids, positions, sequences, wanted)
            return [self._logits(num_tokens)]
        pieces = []
        start = 0
        counts = np.cumsum(wanted)
        while start < num_tokens:
            done = counts[start - 1] if start else 0
            stop = int(np.searchsorted(counts, done + self._max_outputs, side="right"))
            stop = min(stop, start + len(self._token_ids), num_tokens)
            is_whole = not start and stop == num_tokens
            num_wanted = int(counts[stop - 1] - done)
            part = slice(start, stop)
            self._decode(token_ids[part], positions[part], sequences[part], wanted[part])
            if num_wanted:
                logits = self._logits(num_wanted)
                pieces.append(logits if is_whole else logits.clone())
            start = stop
        return pieces

    def _decode(self, token_ids: Any, positions: Any, sequences: Any, wanted: Any) -> None:
        count = len(token_ids)
        self._token_ids[:count] = token_ids
        self._positions[:count] = positions
        self._sequences[:count] = sequences
        self._wanted[:count] = wanted
        self._batch.n_tokens = count
        self.has_pending_copy = False
        code = self._api.llama_decode(self.pointer, self._batch)
        if code:
            raise BackendError(
                f"{self.backend.name} failed: llama_decode returned {code} for {count} tokens of "
                f"{self.num_sequences} rows.\nhint: a smaller batch or context_size needs less memory"
            )

    def _logits(self, num_rows: int) -> Tensor:
        """Return `[num_rows, vocab]` of the last decode, in llama.cpp's memory."""
        pointer = self._api.llama_get_logits(self.pointer)
        place = ctypes.addressof(pointer.contents), num_rows
        if self._view is None or self._view[0] != place:
            size = num_rows * self.backend.vocab_size
            buffer: Any = (ctypes.c_float * size).from_address(place[0])
            buffer.handle = self._handle  # lives as long as a tensor uses its memory
            view = torch.frombuffer(buffer, dtype=torch.float32).view(num_rows, -1)
            self._view = place, view
        return self._view[1]

    def forget(self, sequence: int, length: int) -> None:
        """Drop all but the first `length` tokens of a sequence."""
        if not self._api.llama_memory_seq_rm(self._memory, sequence, length, -1):
            raise UnsupportedModel(f"{self.backend.name} cannot take back tokens")

    def copy(self, source: int, target: int) -> None:
        """Make one sequence a copy of another."""
        self._api.llama_memory_seq_rm(self._memory, target, -1, -1)
        self._api.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.has_pending_copy = True

    def enlarged(self, num_rows: int, room: int) -> _Context:
        """Return a context with more room that holds the first `num_rows` sequences.

        It has as many sequences as this one, because llama.cpp copies only between such contexts.
        """
        other = _Context(self.backend, self.adapter, self.num_sequences, room)
        for sequence in range(num_rows):
            size = self._api.llama_state_seq_get_size(self.pointer, sequence)
            buffer = (ctypes.c_uint8 * size)()
            size = self._api.llama_state_seq_get_data(self.pointer, buffer, size, sequence)
            if not size or not self._api.llama_state_seq_set_data(
                other.pointer, buffer, size, sequence
            ):
                raise BackendError(f"the KV cache of {self.backend.name} could not be copied")
        return other


@dataclass(slots=True)
class _ContextRows:
    """The rows of a state that share an adapter, and so a context: its sequence `i` is row `rows[i]`."""

    context: _Context
    rows: list[int]


@dataclass(slots=True)
class LlamaCppState:
    """What a batch has read: its rows by adapter, and the token ids of each row."""

    contexts: list[_ContextRows]
    rows: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return list(map(len, self.rows))


class _Model:
    """Weights in memory, freed when nothing uses them."""

    def __init__(self, path: Path, settings: LlamaCppSettings, name: str) -> None:
        self._api = api = library()
        api.llama_backend_init()
        options = api.llama_model_default_params()
        options.n_gpu_layers = settings.gpu_layers
        self.pointer: Any = None
        with _messages(api) as messages:
            pointer = api.llama_model_load_from_file(str(path).encode(), options)
        if not pointer:
            reason = _last_of(messages)
            if "allocate" in reason or "out of memory" in reason.lower():
                raise NotEnoughMemory(
                    f"the weights of {name} do not fit{reason}\n"
                    "hint: use a file with stronger quantisation, or set fewer gpu_layers"
                )
            if "unknown model architecture" in reason:
                raise UnsupportedModel(
                    f"the installed llama.cpp does not know {name}{reason}\n"
                    f"hint: {pip_install('--upgrade llama-cpp-python')}"
                )
            raise CorruptModel(
                f"llama.cpp cannot load {name}{reason}\nhint: copy or download {path} again"
            )
        self.pointer = pointer

    def __del__(self) -> None:
        if getattr(self, "pointer", None):
            self._api.llama_model_free(self.pointer)


class LlamaCppBackend(Backend[LlamaCppState]):
    """A GGUF file in llama.cpp.

    Args:
        path: The file.
        settings: How to run it.
        name: What errors call it.
        stored_dtype: Dtype of the file's weights; it decides the KV cache's dtype unless the settings do.
        adapters: LoRA adapters as GGUF files, by the names that rows will use.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        CorruptModel: llama.cpp cannot read the file.
        UnsupportedModel: llama.cpp does not know the model.
        NotEnoughMemory: The weights do not fit.
        AdapterMismatch: An adapter belongs to another model.
    """

    def __init__(
        self,
        path: Path,
        settings: LlamaCppSettings,
        *,
        name: str,
        stored_dtype: str = "",
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        self._api = api = library()
        self.name = name
        self.model = _Model(path, settings, name)
        pointer = self.model.pointer
        if api.llama_model_has_encoder(pointer):
            raise UnsupportedModel(f"{name} has an encoder, and only decoders can be steered")
        self._vocab = api.llama_model_get_vocab(pointer)
        self.vocab_size = int(api.llama_vocab_n_tokens(self._vocab))
        trained = int(api.llama_model_n_ctx_train(pointer))
        if settings.context_size is not None and settings.context_size > trained:
            raise UnsupportedModel(
                f"context_size is {settings.context_size}, and {name} was trained for {trained} tokens.\n"
                f"hint: set at most {trained}"
            )
        self.context_size = settings.context_of(trained)
        self.num_threads = settings.threads or torch.get_num_threads()
        self.cache_dtype = settings.cache_dtype_of(stored_dtype)
        self._can_rewind = not (
            api.llama_model_is_recurrent(pointer) or api.llama_model_is_hybrid(pointer)
        )
        self.adapter_pointers: dict[str, Any] = {}
        for key, file in (adapters or {}).items():
            with _messages(api) as messages:
                adapter = api.llama_adapter_lora_init(pointer, str(file).encode())
            if not adapter:
                raise AdapterMismatch(
                    f"llama.cpp cannot put the adapter {file} on {name}{_last_of(messages)}\n"
                    "hint: an adapter fits only the model it was trained on"
                )
            self.adapter_pointers[key] = adapter  # freed with the model

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        adapters: Mapping[str, AdapterFiles] | None = None,
    ) -> LlamaCppBackend:
        """Load a recipe's model, and check that llama.cpp gives its tokens the ids that this package does.

        Raises:
            VocabularyMismatch: It gives them other ids.
            UserError: As the constructor raises them.
        """
        assert checkpoint.gguf_path is not None and spec.llama_cpp is not None
        files = {}
        for name, adapter in (adapters or {}).items():
            if not adapter.is_gguf:
                raise UnsupportedModel(
                    f"{checkpoint.name} is run by llama.cpp, which takes adapters as .gguf files, and "
                    f"{adapter.name} is not one.\nhint: make one with `proxytune export-gguf`"
                )
            files[name] = adapter.path
        backend = cls(
            checkpoint.gguf_path,
            spec.llama_cpp,
            name=checkpoint.name,
            stored_dtype=checkpoint.stored_dtype,
            adapters=files,
        )
        backend._check_tokens(checkpoint)
        return backend

    def _check_tokens(self, checkpoint: Checkpoint) -> None:
        if self.vocab_size != checkpoint.width:
            raise VocabularyMismatch(
                f"llama.cpp sees {self.vocab_size} tokens in {self.name}, and its config has "
                f"{checkpoint.width}.\nhint: convert the file again with a current llama.cpp"
            )
        for token, token_id in checkpoint.vocabulary.token_to_id.items():
            text = self._api.llama_vocab_get_text(self._vocab, token_id)
            if text != token.encode("utf-8", "surrogateescape"):
                raise VocabularyMismatch(
                    f"token {token_id} of {self.name} is {text!r} in llama.cpp and {token!r} in its "
                    "tokenizer.\nhint: convert the file again with a current llama.cpp"
                )

    @property
    def capabilities(self) -> Capabilities:
        """What this model can do."""
        return Capabilities(
            max_context=self.context_size,
            can_rewind=self._can_rewind,
            adapters=tuple(self.adapter_pointers),
            reuses_logits=True,
        )

    def prefill(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None] | None = None
    ) -> Prefilled[LlamaCppState]:
        """Run whole prompts; see `Backend.prefill`."""
        checks.check_prompts(self.name, prompts)
        self._check_length(max(map(len, prompts)))
        names = checks.adapters_of(self.name, adapters, len(prompts), self.adapter_pointers)
        contexts: list[_ContextRows] = []
        answers: list[Tensor] = []
        for adapter in dict.fromkeys(names):
            rows = [row for row, name in enumerate(names) if name == adapter]
            context, logits = self._read([prompts[row] for row in rows], adapter)
            contexts.append(_ContextRows(context, rows))
            answers.append(logits)
        state = LlamaCppState(contexts, [list(prompt) for prompt in prompts])
        return Prefilled(state, _in_row_order(contexts, answers))

    def _read(
        self, rows: Sequence[Sequence[int]], adapter: str | None, *, room: int = 0
    ) -> tuple[_Context, Tensor]:
        """Return a new context that has read the rows, and the logits after each, `[rows, vocab]`."""
        lengths = [len(row) for row in rows]
        token_ids = np.concatenate([np.asarray(row, np.int64) for row in rows])
        self._check_token_ids(token_ids)
        context = _Context(self, adapter, len(rows), max(room, max(lengths) + 1))
        wanted = np.zeros(len(token_ids), bool)
        wanted[np.cumsum(lengths) - 1] = True
        pieces = context.run(
            token_ids,
            np.concatenate([np.arange(length) for length in lengths]),
            np.repeat(np.arange(len(rows)), lengths),
            wanted,
        )
        return context, _joined(pieces)

    def extend(self, state: LlamaCppState, token_ids: Tensor) -> Tensor:
        """Append tokens; see `Backend.extend`."""
        lengths = np.asarray(state.lengths)
        checks.check_shape(self.name, token_ids.shape, len(lengths))
        num_new = token_ids.shape[1]
        self._check_length(int(lengths.max()) + num_new)
        new = token_ids.cpu().numpy()
        self._check_token_ids(new)
        answers = []
        for held in state.contexts:
            own = lengths[held.rows]
            self._make_room(state, held, int(own.max()) + num_new)
            pieces = held.context.run(
                new[held.rows].reshape(-1),
                (own[:, None] + np.arange(num_new)).reshape(-1),
                np.repeat(np.arange(len(held.rows)), num_new),
                np.ones(new[held.rows].size, bool),
            )
            answers.append(_joined(pieces).view(len(held.rows), num_new, -1))
        for row, more in zip(state.rows, new.tolist(), strict=True):
            row.extend(more)
        return _in_row_order(state.contexts, answers)

    def rewind(self, state: LlamaCppState, num_tokens: Sequence[int]) -> None:
        """Forget the last tokens of each row; see `Backend.rewind`."""
        checks.check_rewind(self.name, num_tokens, state.lengths, can_rewind=self._can_rewind)
        for held in state.contexts:
            for sequence, row in enumerate(held.rows):
                if num_tokens[row]:
                    del state.rows[row][-num_tokens[row] :]
                    held.context.forget(sequence, len(state.rows[row]))

    def select(self, state: LlamaCppState, rows: Sequence[int]) -> LlamaCppState:
        """Return a state of the given rows, which may repeat; see `Backend.select`."""
        rows = list(rows)
        if rows == list(range(len(state.lengths))):
            return state
        contexts = []
        for held in state.contexts:
            sequence_of = {row: sequence for sequence, row in enumerate(held.rows)}
            places = [place for place, row in enumerate(rows) if row in sequence_of]
            place_of = {sequence_of[rows[place]]: place for place in places}
            context = held.context
            if len(place_of) < len(places):
                # A context has a fixed number of sequences and rarely one to spare, so read the rows again.
                context, _ = self._read([state.rows[rows[n]] for n in places], context.adapter)
            elif places:
                places = self._packed(context, len(held.rows), place_of)
            if places:
                contexts.append(_ContextRows(context, places))
        return LlamaCppState(contexts, [list(state.rows[row]) for row in rows])

    def _packed(self, context: _Context, num_rows: int, place_of: dict[int, int]) -> list[int]:
        """Drop the sequences without a place, and renumber the others from 0; return their places.

        llama.cpp runs sequences together only if their numbers are consecutive.
        """
        for sequence in set(range(num_rows)) - set(place_of):
            context.forget(sequence, 0)
        for target in range(len(place_of)):
            if target not in place_of:
                last = max(place_of)
                context.copy(last, target)
                context.forget(last, 0)
                place_of[target] = place_of.pop(last)
        return [place_of[sequence] for sequence in range(len(place_of))]

    def _make_room(self, state: LlamaCppState, held: _ContextRows, length: int) -> None:
        """Move the sequences into a larger context if a row of `length` tokens does not fit."""
        if length <= held.context.room:
            return
        room = min(max(length, 2 * held.context.room), self.context_size)
        if held.context.has_pending_copy:
            # The copied sequences are not there yet, so their keys and values cannot be read.
            rows = [state.rows[row] for row in held.rows]
            held.context = self._read(rows, held.context.adapter, room=room)[0]
        else:
            held.context = held.context.enlarged(len(held.rows), room)

    def _check_length(self, num_tokens: int) -> None:
        more = ", or set a larger context_size"
        checks.check_length(self.name, num_tokens, self.context_size, also=more)

    def _check_token_ids(self, token_ids: Any) -> None:
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        checks.check_token_ids(self.name, lowest, highest, self.vocab_size)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _in_row_order(contexts: Sequence[_ContextRows], answers: Sequence[Tensor]) -> Tensor:
    """Return the logits of all contexts as one tensor, by row."""
    rows = [row for held in contexts for row in held.rows]
    joined = _joined(answers)
    if rows == list(range(len(rows))):
        return joined
    place_of = {row: place for place, row in enumerate(rows)}
    return joined[[place_of[row] for row in range(len(rows))]]


@contextlib.contextmanager
def _messages(api: Any) -> Iterator[list[str]]:
    """Collect the errors that llama.cpp would print; they say best why something failed."""
    lines: list[str] = []

    def collect(level: int, text: bytes, _: Any) -> None:
        if level == 3:  # GGML_LOG_LEVEL_ERROR
            lines.append(text.decode("utf-8", "replace").strip())

    callback = api.llama_log_callback(collect)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        # Put back the callback that llama-cpp-python sets when it is imported.
        from llama_cpp import _logger

        api.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def _last_of(messages: Sequence[str]) -> str:
    """Return llama.cpp's last messages, for the end of an error's first line."""
    last = [line for line in messages if line][-3:]
    return f": {'; '.join(last)}" if last else ""
