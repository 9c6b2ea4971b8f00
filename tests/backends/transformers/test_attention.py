"""Attention without copies of shared keys, against transformers' own on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from proxytune.backends.transformers import attention
from proxytune.backends.transformers.attention import MAX_PACKED, eager_attention, share_keys
from proxytune.backends.transformers.backend import TransformersBackend

# Sums over other numbers of keys at a time round differently; logits here are of the order of 10.
CLOSE = {"atol": 5e-5, "rtol": 1e-4}

WIDTH = 64
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "a key head for each": ("llama", {"num_key_value_heads": 4}),
    "windows": ("mistral", {"sliding_window": 5}),
    "windows in some layers": (
        "gemma3_text",
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "head_dim": 8,
            "query_pre_attn_scalar": 5,  # another scale than 1 / sqrt(8)
        },
    ),
    "norms of keys": ("qwen3", {"head_dim": 8}),
    "experts": ("mixtral", {"num_local_experts": 2}),
    "soft caps": ("gemma2", {"head_dim": 8, "attn_logit_softcapping": 2.0}),
}


def model_of(name: str) -> Any:
    architecture, options = MODELS[name]
    shared = {
        "vocab_size": WIDTH,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    config = transformers.AutoConfig.for_model(architecture, **(shared | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def story(backend: TransformersBackend) -> list[Tensor]:
    """Return the logits of a batch with padding, gaps, and blocks of all kinds of lengths."""
    generator = torch.Generator().manual_seed(1)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(0, WIDTH, shape, generator=generator)

    found = []
    state, logits = backend.prefill([tokens(n).tolist() for n in (3, 11, 90)])
    found.append(logits)
    for num_new, taken_back in (
        (1, [0, 0, 0]),
        (4, [3, 0, 2]),
        (1, [0, 0, 0]),
        (MAX_PACKED, [60, 1, 9]),
        (MAX_PACKED + 1, [2, 2, 2]),
        (2, [0, 1, 0]),
    ):
        found.append(backend.extend(state, tokens(3, num_new)))
        backend.rewind(state, taken_back)
    state = backend.select(state, [1])
    found += [backend.extend(state, tokens(1, num_new)) for num_new in (1, 3, 1)]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_logits_that_transformers_gives(name: str):
    expected = story(TransformersBackend(model_of(name), name=name))
    model = model_of(name)
    share_keys(model)
    for logits, wanted in zip(story(TransformersBackend(model, name=name)), expected, strict=True):
        torch.testing.assert_close(logits, wanted, **CLOSE)


def test_no_keys_are_copied_in_a_model_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[int, bool]] = []
    asked = attention._attend_as_transformers

    def counting(module: nn.Module, query: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((query.shape[2], args[2] is not None))
        return asked(module, query, *args, **options)

    monkeypatch.setattr(attention, "_attend_as_transformers", counting)
    story(TransformersBackend(model_of("llama"), name="theirs"))
    assert len({num_new for num_new, has_mask in calls if has_mask}) > 4
    calls.clear()
    story(TransformersBackend(model_of("llama"), name="own", owns_model=True))
    assert calls == []


@pytest.mark.parametrize("num_new", [1, 3, MAX_PACKED, MAX_PACKED + 1])
@pytest.mark.parametrize("is_added", [False, True])
def test_masks_of_numbers_and_of_truths_may_be_shared_by_rows(num_new: int, is_added: bool):
    """CUDA graphs give numbers to add; some models one mask for all rows."""
    generator = torch.Generator().manual_seed(num_new)
    layer = nn.Module()
    layer.num_key_value_groups = 3  # type: ignore[assignment]
    query = torch.randn(2, 6, num_new, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, num_new + 20, 8, generator=generator)
    mask: Tensor = torch.rand(1, 1, num_new, num_new + 20, generator=generator) > 0.3
    if is_added:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    options = {"scaling": 0.7, "dropout": 0.0, "sliding_window": None}
    expected, _ = attention._attend(layer, query, key, value, mask, **options)
    share_keys(layer)
    found, weights = attention._attend(layer, query, key, value, mask, **options)
    assert weights is None and found.shape == (2, num_new, 6, 8) and found.is_contiguous()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({"dropout": 0.1}, torch.ones(1, 1, 2, 9, dtype=torch.bool)),
        ({"softcap": 2.0}, torch.ones(1, 1, 2, 9, dtype=torch.bool)),
        ({"position_bias": torch.zeros(1, 6, 2, 9)}, torch.ones(1, 1, 2, 9, dtype=torch.bool)),
        ({}, torch.ones(1, 6, 2, 9, dtype=torch.bool)),
        ({}, None),
    ],
)
def test_what_packed_queries_cannot_say_is_left_to_transformers(
    options: dict[str, Any], mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
):
    calls: list[Any] = []
    monkeypatch.setattr(
        attention, "_attend_as_transformers", lambda *args, **options: calls.append(options)
    )
    layer = nn.Module()
    layer.num_key_value_groups = 3  # type: ignore[assignment]
    share_keys(layer)
    attention._attend(
        layer, torch.ones(1, 6, 2, 8), *torch.ones(2, 1, 2, 9, 8), mask, scaling=1.0, **options
    )
    assert calls == [{"scaling": 1.0, **options}]


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What PyTorch's switch for cuDNN's attention was set to, the setting from before the test first."""
    settings = [True]
    cuda = torch.backends.cuda
    monkeypatch.setattr(cuda, "cudnn_sdp_enabled", lambda: settings[-1])
    monkeypatch.setattr(cuda, "enable_cudnn_sdp", settings.append)
    return settings


def test_eager_forwards_on_cuda_run_without_cudnns_attention(switch):
    with eager_attention(torch.device("cuda", 1)):
        assert switch == [True, False]
    assert switch == [True, False, True]


def test_on_other_devices_the_switch_is_left_alone(switch):
    with eager_attention(torch.device("cpu")):
        pass
    assert switch == [True]


def test_cudnns_attention_comes_back_when_the_last_thread_is_done(switch):
    one, other = (eager_attention(torch.device("cuda")) for _ in range(2))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert switch[-1] is False
    other.__exit__(None, None, None)
    assert switch == [True, False, True]


def test_a_failed_forward_puts_the_switch_back_to_what_the_caller_chose(switch):
    switch[:] = [False]
    with pytest.raises(RuntimeError), eager_attention(torch.device("cuda")):
        raise RuntimeError
    assert switch == [False, False, False]
