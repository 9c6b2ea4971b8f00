"""CUDA graphs without CUDA: forwards are recorded kernel by kernel, and run again on the same memory.

`Tape` is a graph as CUDA has it: it knows kernels and places, no Python, and refuses to look at a number.
Tested here is all but the recording itself, for which there is a test with the marker gpu at the end.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import proxytune.backends.transformers.backend as transformers_backend
import proxytune.backends.transformers.cuda_graphs as cuda_graphs
from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.backends.transformers.cuda_graphs import MIN_SLOTS, CudaRecorder, padded_rows
from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.decode.speculative import Drafting
from proxytune.errors import RecipeError, UnsupportedModel
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from tests.backends.transformers.test_backend import ARCHITECTURES, CLOSE, draw, make, random_model
from tests.support.tiny import tiny_adapter, tiny_config, tiny_model


class Tape(TorchDispatchMode):
    """Remembers each kernel with the tensors it was given and the one it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(
        self, kernel: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str(kernel) in ("aten._local_scalar_dense.default", "aten.item.default"):
            raise RuntimeError("operation not permitted when stream is capturing")
        found = kernel(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        fresh = [t for t in _tensors(found) if t.untyped_storage().data_ptr() not in given]
        if fresh or kernel._schema.is_mutable:  # a view is the same place under another name
            self.kernels.append((kernel, args, kwargs or {}, fresh))
        return found

    def replay(self) -> None:
        for kernel, args, kwargs, fresh in self.kernels:
            found = kernel(*args, **kwargs)
            if fresh:
                for place, tensor in zip(fresh, _tensors(found), strict=True):
                    place.copy_(tensor)


def _tensors(found: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(found)[0] if isinstance(leaf, Tensor)]


class Recorder:
    """Counts what was recorded."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        self.num_graphs += 1
        with Tape() as tape:
            logits = forward()
        # So that nothing is right but what a replay computes.
        for *_, fresh in tape.kernels:
            for tensor in fresh:
                if tensor.is_floating_point():
                    tensor.fill_(7)
        return tape.replay, logits


def recorded(architecture: str, **options: Any) -> tuple[TransformersBackend, Recorder]:
    config = tiny_config(architecture, width=64)  # type: ignore[arg-type]
    recorder = Recorder()
    model = random_model(config)
    return TransformersBackend(model, name=architecture, recorder=recorder, **options), recorder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(4))
def test_random_calls_give_the_logits_that_forwards_by_themselves_give(architecture, seed):
    """Rows join, leave, rewind and are copied; several states take turns."""
    backend, recorder = recorded(architecture)
    plain = make(architecture)
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def pair(prompts: list[list[int]]) -> tuple[Any, Any]:
        return backend.prefill(prompts).state, plain.prefill(prompts).state

    states = [pair(draw(3, 11, 7, seed=seed)), pair(draw(5, seed=seed))]
    for step in range(60):
        which = number(0, len(states))
        ours, theirs = states[which]
        num_rows = len(ours.lengths)
        doing = number(0, 12)
        if doing < 7:
            # Mostly one token, as in decoding, so that shapes come again.
            width = (1, 1, 1, 1, 2, 3, 5)[doing]
            if max(ours.lengths) + width > 120:
                states[which] = pair(draw(4, 9, seed=step))
                continue
            ids = torch.randint(0, 64, (num_rows, width), generator=generator)
            found, expected = backend.extend(ours, ids), plain.extend(theirs, ids)
            torch.testing.assert_close(found, expected, **CLOSE)
        elif doing == 7:
            counts = [number(0, min(4, length)) for length in ours.lengths]
            backend.rewind(ours, counts)
            plain.rewind(theirs, counts)
        elif doing == 8 and num_rows > 1:
            rows = torch.randperm(num_rows, generator=generator)[:-1].tolist()
            states[which] = backend.select(ours, rows), plain.select(theirs, rows)
        elif doing == 9 and len(states) < 3:
            rows = [number(0, num_rows)]
            states.append((backend.copy(ours, rows), plain.copy(theirs, rows)))
        elif doing == 10 and len(states) > 1:
            other = states[which - 1]
            rows = list(range(num_rows + len(other[0].lengths)))[:6]
            states[which] = (
                backend.merge(ours, other[0], rows),
                plain.merge(theirs, other[1], rows),
            )
            del states[which - 1]
    assert recorder.num_graphs >= 2
    assert backend._graphs is not None and backend._graphs.failure is None


def test_a_text_that_outgrows_its_slots_goes_on(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MIN_SLOTS", 8)
    backend, recorder = recorded("llama")
    plain = make("llama")
    prompts = draw(3, 5)
    ours, theirs = backend.prefill(prompts).state, plain.prefill(prompts).state
    for ids in draw(*[2] * 70):
        column = torch.tensor(ids)[:, None]
        torch.testing.assert_close(
            backend.extend(ours, column), plain.extend(theirs, column), **CLOSE
        )
    assert recorder.num_graphs == 5  # for 8, 16, 32, 64 and 128 slots


def test_rows_and_widths_are_rounded_up_so_that_few_graphs_serve_all():
    assert [padded_rows(n) for n in (1, 2, 3, 5, 8, 9, 17)] == [1, 2, 4, 8, 8, 16, 24]
    backend, recorder = recorded("llama")
    for num_rows in (3, 4, 3, 4):
        state = backend.prefill(draw(*[4] * num_rows)).state
        for width in (5, 6, 7, 8):
            logits = backend.extend(state, torch.tensor(draw(*[width] * num_rows)))
            assert logits.shape == (num_rows, width, 64)
    assert recorder.num_graphs == 1
    assert backend.capabilities.reuses_logits


def test_old_graphs_make_room_for_new_ones(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    backend, recorder = recorded("llama")
    state = backend.prefill(draw(4)).state
    for width in (1, 1, 2, 2, 4, 4, 1, 1):
        backend.extend(state, torch.tensor(draw(width)))
    assert recorder.num_graphs == 4 and len(backend._graphs._graphs) == 2


def test_wide_forwards_run_without_graphs():
    backend, recorder = recorded("llama")
    state = backend.prefill(draw(4)).state
    for _ in range(3):
        backend.extend(state, torch.tensor(draw(17)))
    assert recorder.num_graphs == 0 and state.cache.layers[0].room.shape[2] < MIN_SLOTS


def test_a_learned_position_beyond_the_context_is_never_asked_for():
    """Rounding five tokens up to eight would ask GPT-2 for position 130 of 128."""
    backend, recorder = recorded("gpt2")
    plain = make("gpt2")
    prompts = draw(113)
    ours, theirs = backend.prefill(prompts).state, plain.prefill(prompts).state
    for ids in draw(5, 5, 5):
        found = backend.extend(ours, torch.tensor([ids]))
        torch.testing.assert_close(found, plain.extend(theirs, torch.tensor([ids])), **CLOSE)
    assert recorder.num_graphs == 1


def test_adapters_of_rows_are_part_of_a_graph(tmp_path: Path):
    """Rows of two adapters and none, in an order that is no slice; then in another order."""
    checkpoint = find_checkpoint(str(tiny_model(tmp_path / "model")), root=tmp_path)
    adapters = {
        name: find_adapter(
            str(tiny_adapter(tmp_path / "model", tmp_path / name, seed=seed)), root=tmp_path
        )
        for name, seed in (("one", 1), ("two", 2))
    }
    plain = TransformersBackend.load(checkpoint, ModelSpec("x"), adapters)
    ours = TransformersBackend.load(checkpoint, ModelSpec("x"), adapters)
    recorder = Recorder()
    ours._graphs = ours._graph_runner(recorder)
    for rows in (["one", None, "two", None, "one"], [None, "two", "one", "one", None]):
        prompts = draw(3, 6, 4, 2, 5)
        states = [backend.prefill(prompts, adapters=rows).state for backend in (ours, plain)]
        for ids in draw(*[5] * 5, seed=9):
            column = torch.tensor(ids)[:, None]
            found, expected = (
                backend.extend(state, column)
                for backend, state in zip((ours, plain), states, strict=True)
            )
            torch.testing.assert_close(found, expected, **CLOSE)
    assert recorder.num_graphs == 2


def test_a_model_that_waits_for_the_device_goes_on_without_graphs():
    backend, recorder = recorded("llama")
    plain = make("llama")
    original = backend.model.forward

    def waits(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        assert float(found.logits.sum()) == float(found.logits.sum())
        return found

    backend.model.forward = waits
    prompts = draw(3, 6)
    ours, theirs = backend.prefill(prompts).state, plain.prefill(prompts).state
    with pytest.warns(UserWarning, match="llama: from now on this model runs without CUDA graphs"):
        for ids in draw(*[2] * 6):
            column = torch.tensor(ids)[:, None]
            torch.testing.assert_close(
                backend.extend(ours, column), plain.extend(theirs, column), **CLOSE
            )
    assert recorder.num_graphs == 1


def test_forwards_that_a_graph_may_record_use_pytorchs_own_attention(monkeypatch):
    inside: list[torch.device] = []
    calls: list[bool] = []

    @contextlib.contextmanager
    def eager_attention(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    monkeypatch.setattr(transformers_backend, "eager_attention", eager_attention)
    backend, recorder = recorded("llama")
    forward = backend.model.forward

    def seen(*args: Any, **kwargs: Any) -> Any:
        calls.append(inside == [torch.device("cpu")])
        return forward(*args, **kwargs)

    backend.model.forward = seen
    state = backend.prefill(draw(4)).state
    for width in (1, 1, 1, 17):
        backend.extend(state, torch.tensor(draw(width)))
    # The prompt; one token twice, the second time recorded; and more tokens than a graph takes.
    assert calls == [True, False, False, True] and recorder.num_graphs == 1


def test_only_batches_that_do_not_fit_into_memory_go_on_without_graphs():
    """One batch without room used to end the graphs of its model for good."""
    backend, recorder = recorded("llama")
    plain = make("llama")
    record = backend._graphs._record

    def record_small(forward: Callable[[], Tensor]) -> Any:
        logits = forward()
        if logits.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(forward)

    backend._graphs._record = record_small

    def decode(num_rows: int) -> None:
        prompts = draw(*[4] * num_rows)
        ours, theirs = backend.prefill(prompts).state, plain.prefill(prompts).state
        for ids in draw(*[num_rows] * 5):
            column = torch.tensor(ids)[:, None]
            found, expected = backend.extend(ours, column), plain.extend(theirs, column)
            torch.testing.assert_close(found, expected, **CLOSE)

    decode(1)
    with pytest.warns(UserWarning, match="from now on 8 rows of 256 slots and more"):
        decode(8)
    assert recorder.num_graphs == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(16)
        decode(2)
    assert recorder.num_graphs == 2 and backend._graphs.failure is None


class FakeCuda:
    """Stands in for the parts of `torch.cuda` that record a graph, and refuses what PyTorch refuses.

    A pool lives from the first recording into it until the last of its graphs is destroyed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_pools = 0
        self.users: dict[int, int] = {}
        cuda = self

        class Graph:
            number: int | None = None

            def pool(self) -> int:
                assert self.number is not None, "nothing has been recorded"
                return self.number

            def replay(self) -> None: ...

            def __del__(self) -> None:
                if self.number is not None:
                    cuda.users[self.number] -= 1

        @contextlib.contextmanager
        def record(graph: Graph, *, pool: int | None, capture_error_mode: str) -> Iterator[None]:
            gc.collect()
            if pool is None:
                pool, cuda.num_pools = cuda.num_pools, cuda.num_pools + 1
                cuda.users[pool] = 0
            elif not cuda.users[pool]:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            yield
            graph.number = pool
            cuda.users[pool] += 1

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, fake in {
            "CUDAGraph": Graph,
            "graph": record,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": contextlib.nullcontext,
            "device": contextlib.nullcontext,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_graphs_that_live_at_once_share_their_memory(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    record = CudaRecorder(torch.device("cuda"))
    first = record(lambda: torch.zeros(1))
    second = record(lambda: torch.zeros(1))
    assert cuda.users == {0: 2}
    del first
    third = record(lambda: torch.zeros(1))
    assert cuda.users == {0: 2} and second and third


def test_a_forward_is_recorded_after_all_graphs_before_it_are_gone(monkeypatch):
    """PyTorch refuses the pool of destroyed graphs; the model then ran without graphs from there on."""
    cuda = FakeCuda(monkeypatch)
    record = CudaRecorder(torch.device("cuda"))
    replay = record(lambda: torch.zeros(1))
    del replay
    assert record(lambda: torch.zeros(1)) and cuda.users == {0: 0, 1: 1}


def test_a_graph_that_only_garbage_holds_outlives_the_recording_into_its_pool(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    record = CudaRecorder(torch.device("cuda"))
    garbage: list[Any] = [record(lambda: torch.zeros(1))]
    garbage.append(garbage)
    gc.disable()
    try:
        del garbage
        kept = record(lambda: torch.zeros(1))
    finally:
        gc.enable()
    assert kept and cuda.num_pools == 1


def test_a_failed_recording_leaves_no_pool_to_share(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    record = CudaRecorder(torch.device("cuda"))
    calls = iter([None, RuntimeError("it waits for the device"), None, None])

    def forward() -> Tensor:
        if error := next(calls):
            raise error
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="waits"):
        record(forward)
    assert record(forward) and cuda.users == {0: 0, 1: 1}


@pytest.mark.parametrize("architecture", ["qwen2", "bloom", "gemma3_text", "lfm2", "mamba"])
def test_models_that_look_at_more_than_a_mask_are_refused(architecture):
    model = make(architecture, windowed=True).model
    with pytest.raises(UnsupportedModel, match="plain attention in every layer"):
        TransformersBackend(model, name=architecture, recorder=Recorder())


PROMPTS = ("the", "in the end there was", "a", "an otter ran into the rain again")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A base, and an expert that is an adapter on the small model."""
    root = tmp_path_factory.mktemp("recipe")
    tiny_model(root / "base", seed=1, hidden_size=24)
    tiny_model(root / "small", seed=2)
    tiny_adapter(root / "small", root / "adapter", seed=4)
    expert = ModelSpec(str(root / "small"), adapter=str(root / "adapter"))
    pair = ExpertSpec("one", expert, ModelSpec(str(root / "small")), 1.0)
    return Recipe(ModelSpec(str(root / "base")), (pair,))


def texts(model: ProxyTuned, sampling: SamplingParams, **options: Any) -> list[list[int]]:
    traces = model.generate_batch([Request(prompt, sampling) for prompt in PROMPTS], **options)
    return [list(trace.token_ids) for trace in traces]


@pytest.mark.parametrize("choice", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}])
@pytest.mark.parametrize("drafting", [False, *(Drafting(n, "expert", False) for n in (1, 3, 6))])
def test_a_recipe_gives_the_same_texts_with_graphs_as_without(recipe, choice, drafting):
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True, **choice)
    expected = texts(ProxyTuned.load(recipe), sampling)
    ours = ProxyTuned.load(recipe)
    recorders = []
    for member in ours.ensemble.members:
        if member.backend._graphs is None:
            recorders.append(Recorder())
            member.backend._graphs = member.backend._graph_runner(recorders[-1])
    assert texts(ours, sampling, speculative=drafting) == expected
    assert [recorder.num_graphs > 0 for recorder in recorders] == [True, True]


def test_graphs_are_for_one_cuda_device(recipe):
    with pytest.raises(UnsupportedModel, match="is on cpu"):
        ProxyTuned.load(recipe.with_settings(cuda_graphs=True, device="cpu"))


def test_a_recipe_says_which_models_run_as_graphs():
    assert ModelSpec("x", cuda_graphs=True).to_dict() == {"model": "x", "cuda_graphs": True}
    with pytest.raises(RecipeError, match="cuda_graphs"):
        ModelSpec("x", cuda_graphs="yes")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_a_gpu_graphs_give_the_texts_that_launches_one_by_one_give(recipe):
    sampling = SamplingParams(max_new_tokens=64, ignore_eos=True)
    graphs = ProxyTuned.load(recipe.with_settings(cuda_graphs=True), device="cuda")
    expected = texts(ProxyTuned.load(recipe, device="cuda"), sampling)
    assert texts(graphs, sampling) == expected
    assert all(m.backend._graphs.failure is None for m in graphs.ensemble.members)
