"""How many tokens a model holds, from its config."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.context import check_gguf_angles, max_context
from proxytune.errors import UnsupportedModel
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
            256,
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


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [({"llama.rope.scaling.type": "linear"}, ()), ({}, ("rope_freqs.weight",))],
)
def test_scaled_angles_of_a_gguf_file_are_refused_where_transformers_leaves_them_out(
    metadata, tensors
):
    """They used to be computed without the scaling, unnoticed."""
    with pytest.raises(UnsupportedModel, match="run it in llama"):
        check_gguf_angles({"general.architecture": "llama", **metadata}, tensors, "model.gguf")


def test_other_gguf_files_are_read():
    check_gguf_angles({"general.architecture": "llama"}, ("output.weight",), "model.gguf")
    none = {"general.architecture": "llama", "llama.rope.scaling.type": "none"}
    check_gguf_angles(none, (), "model.gguf")
    own = {"general.architecture": "gpt-oss", "gpt-oss.rope.scaling.type": "yarn"}
    check_gguf_angles(own, (), "model.gguf")  # which transformers does read


def test_a_gguf_file_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    """In llama.cpp it runs; only what transformers would build is checked."""
    found = find_checkpoint(str(tiny_gguf(tmp_path / "model.gguf")), root=tmp_path)
    found.check_buildable()
    assert found.gguf_header is not None
    scaled = {**found.gguf_header.metadata, "llama.rope.scaling.type": "yarn"}
    header = replace(found.gguf_header, metadata=scaled)
    monkeypatch.setattr(type(found), "gguf_header", header)
    with pytest.raises(UnsupportedModel, match="yarn"):
        found.check_buildable()
