"""Valid recipes, adapters and headers, changed at random: a result or a user's error, in bounded time.

The quick tests read 100 mutants of each kind, the slow ones 2,000 others.
"""

from __future__ import annotations

import json
import shutil
from random import Random

import pytest

from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.headers import read_gguf_header, read_safetensors_header
from proxytune.checkpoints.merge import read_adapter
from proxytune.recipe.recipe import Recipe
from tests.support.mutations import mutate_gguf, mutate_json, mutate_safetensors, read_mutants
from tests.support.tiny import tiny_adapter, tiny_gguf, tiny_model

MUTANTS = pytest.mark.parametrize(
    "seeds",
    [range(100), pytest.param(range(100, 2100), marks=pytest.mark.slow)],
    ids=["quick", "slow"],
)

RECIPE = {
    "$schema": "recipe.schema.json",
    "model_type": "proxytune",
    "architectures": ["ProxyTunedForCausalLM"],
    "auto_map": {"AutoConfig": "modeling_proxytune.ProxyTunedConfig"},
    "base": {"model": "http://localhost:8000/v1", "api": {"model": "m", "top_logprobs": 20}},
    "experts": [
        {
            "name": "law",
            "anti_expert": {"model": "small", "revision": "main", "dtype": "bfloat16"},
            "expert": {"adapter": "adapters/law", "prompt": "chat"},
            "alpha": 0.5,
        },
        {
            "name": "verse",
            "anti_expert": {"model": "a.gguf", "llama_cpp": {"threads": 2, "context_size": 512}},
            "expert": {"model": "b.gguf", "llama_cpp": {"threads": 2, "context_size": 512}},
        },
        {
            "name": "code",
            "anti_expert": {"model": "small", "quantization": {"load_in_4bit": True}},
            "expert": {"model": "code", "trust_remote_code": False, "prompt": "{{ prompt }}"},
        },
    ],
    "combine": "sum",
    "steering": {"clip": 2.0},
    "default_expert": "law",
    "vocabulary": "map",
}
"""A recipe with every kind of part."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_model(root / "small")
    tiny_adapter(root / "small", root / "adapter")
    tiny_gguf(root / "tiny.gguf")
    return root


def assert_some_of_both(counts, *, at_least=0.01):
    """Check that the mutator neither spared all files nor broke all of them at once."""
    num = counts.total()
    assert at_least * num <= counts["accepted"] <= 0.95 * num, counts


@MUTANTS
def test_a_changed_recipe_is_a_recipe_or_a_users_error(tmp_path, seeds):
    assert Recipe.from_dict(RECIPE).experts

    def read(text):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", errors="surrogatepass"))
        recipe = Recipe.read(tmp_path)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert recipe.model_card()
        assert recipe.models

    counts = read_mutants(seeds, lambda random: mutate_json(RECIPE, random), read)
    assert_some_of_both(counts)


@MUTANTS
def test_a_changed_adapter_config_gives_an_adapter_or_a_users_error(models, tmp_path, seeds):
    directory = shutil.copytree(models / "adapter", tmp_path / "adapter")
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r".*\.v_proj": 3},
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
    }
    small = find_checkpoint("small", root=models)
    assert small.linear_shapes

    def read(mutant):
        text, is_loaded = mutant
        content = text.encode("utf-8", errors="surrogatepass")
        (directory / "adapter_config.json").write_bytes(content)
        adapter = find_adapter("adapter", root=tmp_path)
        adapter.check_fits(small)
        if is_loaded:
            read_adapter(adapter, small)

    def make(random: Random):
        return mutate_json(config, random), random.random() < 0.1

    assert_some_of_both(read_mutants(seeds, make, read))


@MUTANTS
def test_a_changed_safetensors_header_is_read_or_a_users_error(models, tmp_path, seeds):
    path = tmp_path / "adapter_model.safetensors"
    content = (models / "adapter" / "adapter_model.safetensors").read_bytes()

    def read(mutant):
        path.write_bytes(mutant)
        for tensor in read_safetensors_header(path).values():
            assert tensor.num_elements <= len(mutant)

    counts = read_mutants(seeds, lambda random: mutate_safetensors(content, random), read)
    assert_some_of_both(counts)


@MUTANTS
def test_a_changed_gguf_header_is_read_or_a_users_error(models, tmp_path, seeds):
    path = tmp_path / "model.gguf"
    content = (models / "tiny.gguf").read_bytes()

    def read(mutant):
        path.write_bytes(mutant)
        header = read_gguf_header(path)
        assert len(header.token_to_id()) <= len(mutant)
        for tensor in header.tensors.values():
            assert tensor.num_elements <= 8 * len(mutant)

    assert_some_of_both(read_mutants(seeds, lambda random: mutate_gguf(content, random), read))


@pytest.mark.parametrize(
    "seeds",
    [range(30), pytest.param(range(30, 330), marks=pytest.mark.slow)],
    ids=["quick", "slow"],
)
def test_a_changed_gguf_file_is_converted_or_a_users_error(models, tmp_path, monkeypatch, seeds):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    content = (models / "tiny.gguf").read_bytes()
    path.write_bytes(content)
    assert find_checkpoint("model.gguf", root=tmp_path).vocabulary  # imports what a child needs

    def read(mutant):
        path.write_bytes(mutant)
        found = find_checkpoint("model.gguf", root=tmp_path)
        assert found.vocabulary.token_to_id
        assert found.num_parameters
        assert found.eos_token_ids is not None

    assert_some_of_both(read_mutants(seeds, lambda random: mutate_gguf(content, random), read))
