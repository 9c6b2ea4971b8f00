"""Short forwards as CUDA graphs: a model's kernels are recorded once, then all launched in one call.

On a GPU, a small model computes a token in less time than Python takes to launch its kernels one by one. A
graph launches the same kernels in one call. It knows only fixed addresses, so whatever changes from token to
token is in tensors of fixed addresses and shapes: token ids, positions, the slots that the tokens go to,
which slots are gaps, and the keys and values themselves.

Keys and values therefore live in a *home*, memory of fixed address, while a state decodes. A state moves in
when its turn comes, and the one that was there moves out. To all other code its cache stays the same
`RoomyCache`. Rows, width (tokens per row) and slots are rounded up, so that a few graphs cover all shapes;
results beyond the real shape are ignored.

`backend.py` explains slots and gaps. A `Recorder` does the recording, so everything else runs, and is tested,
without a GPU.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from proxytune.backends.transformers.kv_cache import RoomyCache, RoomyLayer
from proxytune.backends.transformers.lora import PLAIN, RowAdapters
from proxytune.errors import ProxytuneError

MAX_WIDTH = 16
"""Maximum number of tokens per row of a graph; in wider forwards, launching kernels hardly counts."""
MIN_SLOTS = 256
"""Minimum number of slots of a graph."""
MAX_GRAPHS = 64
"""Maximum number of graphs of a model; the least recently used one goes first."""

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]
"""Takes a forward; returns what replays it, and the tensor that then holds its logits."""

Forward = Callable[[Tensor, Tensor, Tensor, Any, RowAdapters], Tensor]
"""Takes token ids, positions, mask `[rows, 1, width, slots]`, cache and adapters; returns logits."""


class Slots(Protocol):
    """What a graph needs of a batch: its cache, and which slots are gaps (`TransformersState`)."""

    cache: Any
    num_slots: int

    def attention_mask(self, num_new: int) -> Tensor | None:
        """Return `[rows, num_slots + num_new]`, 0 at gaps; None if there are no gaps."""

    def position_ids(self, num_new: int) -> Tensor:
        """Return `[rows, num_new]` or `[rows, 1]`: the positions of the next tokens."""


class CudaRecorder:
    """Records forwards of one model on a device; graphs that live at the same time share temporary memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """Record a forward; see `Recorder`.

        Raises:
            RuntimeError: The model waits for the device, or memory is short.
        """
        with torch.cuda.device(self._device):
            # The first call sets libraries up, which must not be recorded.
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                forward()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # PyTorch fails an internal assertion (use_count > 0) when it records into a memory pool whose
            # graphs have all been destroyed. So share the pool of a living graph, and hold on to that graph
            # while recording: garbage collection may be about to destroy it. Without one, make a new pool.
            shared = next(iter(self._graphs), None)
            pool = None if shared is None else shared.pool()
            # Meanwhile other threads may run other models.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = forward()
            self._graphs.add(graph)
        return graph.replay, logits


class _FixedLayer(DynamicLayer):
    """One layer's keys and values as a graph sees them: all slots, written to by index."""

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._slots = slots

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values of new tokens; return those of all slots."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self._slots, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self._slots, value_states.to(self.values.dtype))
        return self.keys, self.values


class _Graph:
    """A forward of fixed shape, and the tensors it reads.

    `layers` are keys and values `[rows, heads, slots, size]` of each layer, None for a layer without; `names`
    are PEFT's of each row's adapter; `dtype` is the attention mask's.
    """

    def __init__(
        self,
        forward: Forward,
        layers: Sequence[tuple[Tensor, Tensor] | None],
        *,
        width: int,
        names: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        keys = next(layer[0] for layer in layers if layer is not None)
        device, num_rows, num_slots = keys.device, keys.shape[0], keys.shape[2]
        self._forward, self._dtype = forward, dtype
        self._adapters = RowAdapters(names, device)
        self._token_ids = torch.zeros(num_rows, width, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._token_ids)
        self._offsets = torch.arange(width, device=device)
        self._slots = torch.zeros_like(self._offsets)
        self._columns = torch.arange(num_slots, device=device)
        self._counts = torch.ones(num_rows, num_slots, dtype=torch.bool, device=device)
        self._all_count = True
        self._cache = DynamicCache()
        self._cache.layers = [
            DynamicLayer() if layer is None else _FixedLayer(*layer, self._slots)  # type: ignore[no-untyped-call]
            for layer in layers
        ]
        self._again: tuple[Callable[[], Any], Tensor] | None = None
        self._was_run = False

    def load(
        self, token_ids: Tensor, positions: Tensor, mask: Tensor | None, first_slot: int
    ) -> None:
        """Write what changes to the tensors that the graph reads.

        Args:
            token_ids: `[rows, num_new]`, at most the graph's rows and width.
            positions: `[rows, width]`.
            mask: `[rows, first_slot + num_new]`, 0 at gaps; None if there are no gaps.
            first_slot: The slot of the first token.
        """
        num_rows, num_new = token_ids.shape
        self._token_ids[:num_rows, :num_new] = token_ids
        self._positions[:num_rows] = positions
        torch.add(self._offsets, first_slot, out=self._slots)
        if mask is not None:
            self._counts[:num_rows, : mask.shape[1]] = mask.bool()
            self._all_count = False
        elif not self._all_count:
            self._counts.fill_(True)
            self._all_count = True

    def run(self, record: Recorder) -> Tensor:
        """Return logits `[rows, width, vocab]`, which the next run overwrites."""
        if self._again is None:
            if not self._was_run:
                # Most shapes that occur once do not occur again.
                self._was_run = True
                return self._eagerly()
            self._again = record(self._eagerly)
        replay, logits = self._again
        replay()
        return logits

    def _eagerly(self) -> Tensor:
        may_see = self._columns <= self._slots[:, None]
        may_see = may_see & self._counts[:, None, None, :]
        mask = torch.zeros(may_see.shape, dtype=self._dtype, device=may_see.device)
        # Not -inf: a padding row that attends to nothing would become NaN.
        mask = mask.masked_fill(~may_see, torch.finfo(self._dtype).min)
        return self._forward(self._token_ids, self._positions, mask, self._cache, self._adapters)


class _Home:
    """Memory for the keys and values of one state at a time, of `num_places` rows times slots.

    `layers` are examples of the tensors that will live here, `[any, heads, any, size]`.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor] | None], num_places: int) -> None:
        self.num_places = num_places
        self._heads = [None if layer is None else layer[0].shape[1] for layer in layers]
        self._memory = [
            None
            if layer is None
            # Zeros, not uninitialised memory: a gap is multiplied by 0, which leaves NaN as NaN.
            else tuple(t.new_zeros(num_places * t.shape[1] * t.shape[3]) for t in layer)
            for layer in layers
        ]

    def layers(self, num_rows: int, num_slots: int) -> list[tuple[Tensor, Tensor] | None]:
        """Return each layer's keys and values, `[num_rows, heads, num_slots, size]`."""
        assert num_rows * num_slots <= self.num_places
        found: list[tuple[Tensor, Tensor] | None] = []
        for heads, memory in zip(self._heads, self._memory, strict=True):
            if memory is None or heads is None:
                found.append(None)
                continue
            keys, values = (
                flat[: len(flat) // self.num_places * num_rows * num_slots].view(
                    num_rows, heads, num_slots, -1
                )
                for flat in memory
            )
            found.append((keys, values))
        return found


class GraphRunner:
    """Runs a model's short forwards as graphs.

    Args:
        name: What warnings call the model.
        forward: The model.
        record: Makes graphs.
        dtype: The model's dtype.
        max_context: Maximum number of tokens of a row; None for no limit.
    """

    def __init__(
        self,
        name: str,
        forward: Forward,
        record: Recorder,
        *,
        dtype: torch.dtype,
        max_context: int | None,
    ) -> None:
        self._name, self._forward, self._record = name, forward, record
        self._dtype, self._max_context = dtype, max_context
        self._home: _Home | None = None
        self._tenant: weakref.ref[RoomyCache] | None = None
        self._graphs: dict[tuple[int, int, int, tuple[str, ...]], _Graph] = {}
        self._too_many_places = math.inf
        """This many rows times slots did not fit into memory."""
        self.failure: str | None = None
        """Why no forward of this model runs as a graph any more; None while they do."""

    def run(self, state: Slots, token_ids: Tensor, names: Sequence[str]) -> Tensor | None:
        """Append tokens to a state's cache and return logits; the caller updates the rest of the state.

        Args:
            state: A state with keys and values.
            token_ids: `[rows, num_new]`.
            names: PEFT's name of each row's adapter.

        Returns:
            `[rows, num_new, vocab]`, which the next call overwrites; None if no graph can run it.
        """
        num_rows, num_new = token_ids.shape
        if self.failure is not None or num_new > MAX_WIDTH or not num_rows:
            return None
        rows, width = padded_rows(num_rows), 1 << (num_new - 1).bit_length()
        num_places = rows * _padded_slots(state.num_slots + width)
        if num_places >= self._too_many_places:
            return None
        try:
            slots = self._settle(state.cache, rows, num_rows, state.num_slots + width)
            padded = (*names, *[PLAIN] * (rows - num_rows))
            graph = self._graph(rows, width, slots, padded)
            positions = state.position_ids(width)
            if self._max_context is not None:
                positions = positions.clamp(max=self._max_context - 1)
            graph.load(token_ids, positions, state.attention_mask(num_new), state.num_slots)
            logits = graph.run(self._record)
        except ProxytuneError:
            raise
        except torch.OutOfMemoryError as error:
            # Smaller batches may still fit, so only batches of this size and above go on without graphs.
            self._too_many_places = num_places
            self._drop(f"{rows} rows of {num_places // rows} slots and more", error)
            return None
        except Exception as error:
            # For good: what cannot be recorded at one shape (waiting for the device, a data-dependent branch)
            # cannot be recorded at the next one either, and after a broken recording PyTorch's allocator may
            # hold on to memory, a bit more each time. If the graphs were not at fault, the kernel-by-kernel
            # forward that follows raises the real error.
            self.failure = f"{type(error).__name__}: {error}"
            self._drop("this model", error)
            return None
        for layer in state.cache.filled():
            layer.grow(num_new)
        return logits[:num_rows, :num_new]

    def _graph(self, rows: int, width: int, slots: int, names: tuple[str, ...]) -> _Graph:
        assert self._home is not None
        key = (rows, width, slots, names)
        graph = self._graphs.pop(key, None)
        if graph is None:
            if len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            layers = self._home.layers(rows, slots)
            graph = _Graph(self._forward, layers, width=width, names=names, dtype=self._dtype)
        self._graphs[key] = graph  # the last used is the last to go
        return graph

    def _settle(self, cache: RoomyCache, rows: int, num_rows: int, num_slots: int) -> int:
        """Make sure that a cache is at home with room for `num_slots`; return how many slots it has there."""
        if self._tenant is not None and self._tenant() is cache:
            slots = self._slots_at_home(cache, rows, num_rows)
            if slots is not None and slots >= num_slots:
                return slots
        self._move_out()
        slots = _padded_slots(num_slots)
        if self._home is None or self._home.num_places < rows * slots:
            # Free the old memory, which the graphs hold on to, before asking for new.
            self._graphs.clear()
            self._home = None
            layers: list[Any] = cache.layers
            examples = [(x.keys, x.values) if x.is_initialized else None for x in layers]
            self._home = _Home(examples, rows * slots)
        homes = self._home.layers(rows, slots)
        self._tenant = weakref.ref(cache)
        for layer, home in zip(cache.layers, homes, strict=True):
            if home is not None:
                assert isinstance(layer, RoomyLayer)
                layer.move(home[0][:num_rows], home[1][:num_rows])
        return slots

    def _slots_at_home(self, cache: RoomyCache, rows: int, num_rows: int) -> int | None:
        """Return how many slots a cache has at home; None if it has left, as `select` makes it do."""
        assert self._home is not None
        layer = next(cache.filled())
        keys = layer.room
        if keys is None or keys.shape[0] != num_rows:
            return None
        slots = keys.shape[2]
        if rows * slots > self._home.num_places:
            return None
        own = next(home[0] for home in self._home.layers(rows, slots) if home is not None)
        return slots if keys.data_ptr() == own.data_ptr() else None

    def _move_out(self) -> None:
        """Move the state that is at home to memory of its own."""
        tenant = None if self._tenant is None else self._tenant()
        self._tenant = None
        for layer in () if tenant is None else tenant.filled():
            layer.leave()

    def _drop(self, what: str, error: Exception) -> None:
        """Forget the graphs and the home, and warn that `what` runs without graphs from now on.

        A state that is at home stays where it is: the memory is now its own, and moving out could need more
        than there is.
        """
        self._graphs.clear()
        self._home = self._tenant = None
        warnings.warn(
            f"{self._name}: from now on {what} runs without CUDA graphs, which is slower: "
            f"{type(error).__name__}: {error}",
            stacklevel=3,
        )


def _padded_slots(num_slots: int) -> int:
    """Return how many slots a graph for at least `num_slots` has: a power of two."""
    return max(MIN_SLOTS, 1 << (num_slots - 1).bit_length())


def padded_rows(num_rows: int) -> int:
    """Return how many rows a graph for `num_rows` has: a power of two, or from 8 on a multiple of 8."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8
