"""How many tokens a model holds, from its config."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.context import gguf_angles, max_context
from proxytune.errors import CorruptModel, UnsupportedModel
from tests.checkpoints.test_checkpoint import edit_json
from tests.support.tiny import tiny_gguf, tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def context(kind: str = "llama", **settings: Any) -> int | None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, **settings)
    return max_context(config.get_text_config(decoder=True))


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("positions", "scaling", "expected"),
    [
        (64, {"rope_type": "default"}, 64),
        (64, YARN, 256),  # as the instructions for Qwen2.5 have it
        (256, YARN, 256),  # as gpt-oss has it
        (64, {"rope_type": "yarn", "factor": 4.0}, 256),  # transformers takes 64 for the original
        (64, {"rope_type": "linear", "factor": 4.0}, 256),
        (64, {"rope_type": "dynamic", "factor": 4.0}, 256),
        # Llama 3.2 has 131,072 positions and the factor 32, of 8,192.
        (
            1024,
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            1024,
        ),
        # Models with longrope state the length they hold.
        (
            256,
            {"rope_type": "longrope", "original_max_position_embeddings": 64, **FACTORS},
            256,
        ),
        (
            64,
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                **FACTORS,
            },
            64,
        ),
    ],
)
def test_a_scaled_model_holds_factor_times_its_original_positions(
    name, positions, scaling, expected
):
    """Only `max_position_embeddings` used to count."""
    own = {name: {"rope_theta": 10000.0, **scaling}}
    assert context(max_position_embeddings=positions, **own) == expected


def test_phi3_names_its_original_positions_outside_of_the_scaling():
    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}
    own = {"max_position_embeddings": 512, "original_max_position_embeddings": 64}
    assert context("phi3", rope_parameters=scaling, **own) == 512


@pytest.mark.parametrize(
    ("full", "expected"), [({"rope_type": "linear", "factor": 8.0}, 64), (YARN, 256)]
)
def test_layers_may_be_scaled_by_type(full, expected):
    """Gemma 3 has a factor of 8 in some layers, and names the positions that this gives."""
    both = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_theta": 10000.0, **full},
    }
    types = ["sliding_attention", "full_attention"]
    found = context(
        "gemma3_text", max_position_embeddings=64, rope_parameters=both, layer_types=types
    )
    assert found == expected


def test_gemma_3s_old_form_is_not_scaled_twice():
    scaling = {"type": "linear", "factor": 8.0}
    assert context("gemma3_text", max_position_embeddings=64, rope_scaling=scaling) == 64


def test_a_config_of_a_models_own_code_may_have_the_old_form():
    config = SimpleNamespace(
        max_position_embeddings=64, rope_scaling={"type": "linear", "factor": 2}
    )
    assert max_context(config) == 128


@pytest.mark.parametrize("positions", [None, -1, "many"])
def test_without_positions_there_is_no_limit(positions):
    assert max_context(SimpleNamespace(max_position_embeddings=positions)) is None


def test_a_checkpoint_with_yarn_added_to_its_config_holds_more(tmp_path):
    directory = tiny_model(tmp_path / "model", "qwen2", max_context=128)
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    edit_json(directory / "config.json", rope_scaling=old, rope_parameters=None, rope_theta=1e4)
    assert find_checkpoint("model", root=tmp_path).max_context == 512


def gguf(kind: str = "llama", **scaling: Any) -> dict[str, Any]:
    """Return a GGUF file's metadata with these fields of scaling."""
    fields = {f"{kind}.rope.scaling.{name}": value for name, value in scaling.items()}
    return {"general.architecture": kind, f"{kind}.rope.freq_base": 500000.0, **fields}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (gguf(), {}),
        (gguf(type="none"), {}),
        (gguf("gpt-oss", type="yarn", factor=32.0), {}),  # which transformers does read
        (gguf(type="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            gguf(type="linear", factor=4.0, finetuned=False, original_context_length=64),
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            gguf("qwen2", type="yarn", factor=4.0, original_context_length=64, finetuned=True),
            YARN,
        ),
    ],
)
def test_scaled_angles_of_a_gguf_file_are_those_of_transformers(metadata, expected):
    assert gguf_angles(metadata, None, ("output.weight",), "model.gguf") == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_rule_is_found_by_what_it_divides_frequencies_by(factor):
    rule = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=1 << 17,
        rope_parameters={**rule, "rope_theta": 500000.0},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    factors = (plain / scaled).tolist()
    assert len({round(each, 3) for each in factors}) > 3
    assert gguf_angles(gguf(), factors, (), "model.gguf") == rule


@pytest.mark.parametrize(
    ("metadata", "factors", "tensors"),
    [
        (gguf(type="yarn", factor=4.0), None, ()),
        (gguf("gemma3", type="linear", factor=8.0), None, ()),  # of some layers only
        (gguf("deepseek2", type="yarn", factor=4.0, original_context_length=64), None, ()),
        (gguf(type="linear", factor=8.0, attn_factor=2.0), None, ()),
        (gguf(type=["linear"], factor=8.0), None, ()),
        (gguf("phi3"), None, ("rope_factors_long.weight", "rope_factors_short.weight")),
        (gguf(), [1.0, 3.0, 2.0, 8.0], ()),
        (gguf(type="yarn", factor=4.0, original_context_length=64), [8.0] * 4, ()),
        (gguf(), [1.0, float("inf")], ()),
        (gguf(), [], ()),
        (gguf("chatglm"), [1.0], ()),
    ],
)
def test_other_scaling_of_a_gguf_file_is_refused(metadata, factors, tensors):
    """It used to be left out, unnoticed."""
    with pytest.raises(UnsupportedModel, match="run it in llama"):
        gguf_angles(metadata, factors, tensors, "model.gguf")


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": "x"},
        {"type": "linear", "factor": 0.0},
        {"type": "linear", "factor": float("nan")},
        {"type": "yarn", "factor": 4.0, "original_context_length": "abc"},
    ],
)
def test_scaling_of_a_gguf_file_by_what_is_no_number_is_refused(scaling):
    with pytest.raises(CorruptModel, match="must be a number above 0"):
        gguf_angles(gguf(**scaling), None, (), "model.gguf")


def test_a_gguf_file_with_factors_and_no_base_of_frequencies_is_refused():
    broken = {**gguf(), "llama.rope.freq_base": "x"}
    with pytest.raises(CorruptModel, match="freq_base"):
        gguf_angles(broken, [1.0], (), "model.gguf")


def test_a_gguf_file_is_refused_before_its_weights_are_read(tmp_path):
    """In llama.cpp it runs; only what transformers would build is checked."""
    found = find_checkpoint(str(tiny_gguf(tmp_path / "model.gguf")), root=tmp_path)
    found.check_buildable()
    assert found.gguf is not None and found.gguf_header is not None
    scaled = {**found.gguf_header.metadata, "llama.rope.scaling.type": "yarn"}
    header = replace(found.gguf_header, metadata=scaled)
    found = replace(found, gguf=replace(found.gguf, header=header))
    with pytest.raises(UnsupportedModel, match="yarn"):
        found.check_buildable()
