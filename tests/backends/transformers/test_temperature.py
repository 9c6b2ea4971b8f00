"""Llama 4's attention temperature, which grows with positions; test_backend.py runs the whole model."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers

from proxytune.backends.transformers.backend import TransformersBackend

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
PROMPT = list(range(5, 26))


def make() -> Any:
    config = transformers.Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        no_rope_layers=[1, 0],
        attn_scale=0.5,
        floor_scale=4,
        initializer_range=0.3,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def alone(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]


def test_the_temperature_is_felt():
    """Otherwise the other tests would say nothing."""
    model = make()
    with_it = alone(model)
    for layer in model.model.layers:
        layer.self_attn.attn_temperature_tuning = False
    assert float((alone(model) - with_it).abs().max()) > 0.01


def test_the_owner_of_a_model_finds_it_as_it_was():
    model = make()
    expected = alone(model)
    for name in ("once", "twice"):
        backend = TransformersBackend(model, name=name)
        torch.testing.assert_close(backend.prefill([[1, 2], PROMPT]).logits[1], expected, **CLOSE)
        torch.testing.assert_close(alone(model), expected, **CLOSE)
        torch.testing.assert_close(alone(copy.deepcopy(model)), expected, **CLOSE)


@pytest.mark.parametrize("owns_model", [False, True])
def test_an_adapters_queries_are_scaled_too(owns_model):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped: Any = peft.get_peft_model(make(), config).eval()
    expected = alone(wrapped)
    backend = TransformersBackend(
        wrapped, name="llama4", adapters=["default"], owns_model=owns_model
    )
    logits = backend.prefill([PROMPT, [1, 2], PROMPT], adapters=["default", None, None]).logits
    torch.testing.assert_close(logits[0], expected, **CLOSE)
    torch.testing.assert_close(logits[2], alone(make()), **CLOSE)
