"""Models whose small files were changed at random: a result or an error of this project, in bounded time.

Each mutant is read by `examine`, and some are loaded and asked for two tokens, in a child process with limits
on time and memory (`support/mutations.py`). The seeds decide everything.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GemmaConfig, GPTNeoXConfig

from proxytune import ProxyTuned, Recipe, SamplingParams
from proxytune.errors import BackendError
from proxytune.loading.doctor import examine

from ..support.mutations import mutate_bytes, mutate_json, read_mutants
from ..support.tiny import tiny_model, tiny_tokenizer

ARCHITECTURES = ("llama", "gpt2", "qwen2", "gemma", "gpt_neox")
SMALL_FILES = (
    "generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer_config.json", "tokenizer.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models with random weights, each with every file that a tokenizer may have."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    for kind in ("llama", "gpt2", "qwen2"):
        tiny_model(directory / kind, kind, tokenizer=tokenizer)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "eos_token_id": tokenizer.eos_token_id,
    }
    for kind, config in (
        ("gemma", GemmaConfig(**sizes, num_key_value_heads=2, head_dim=4)),
        ("gpt_neox", GPTNeoXConfig(**sizes)),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(directory / kind)
        tokenizer.save_pretrained(directory / kind)
    for kind in ARCHITECTURES:
        rules = json.loads((directory / kind / "tokenizer.json").read_text())
        vocabulary, merges = rules["model"]["vocab"], rules["model"]["merges"]
        (directory / kind / "vocab.json").write_text(json.dumps(vocabulary))
        (directory / kind / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges))
        added = {token["content"]: token["id"] for token in rules["added_tokens"]}
        (directory / kind / "added_tokens.json").write_text(json.dumps(added))
        special = {"eos_token": "<|endoftext|>", "pad_token": {"content": "<|endoftext|>"}}
        (directory / kind / "special_tokens_map.json").write_text(json.dumps(special))
    return directory


@pytest.fixture
def recipe(models, tmp_path):
    """A recipe whose base is a copy that can be changed."""
    shutil.copytree(models / "llama", tmp_path / "base")
    sides = {
        "expert": {"model": str(models / "llama")},
        "anti_expert": {"model": str(models / "qwen2")},
    }
    content = {
        "model_type": "proxytune",
        "base": {"model": "base"},
        "experts": [{"name": "e", **sides}],
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


def read(recipe: Path, file: str, is_generated: bool, mutant: str | bytes) -> None:
    """Put a mutant in place of a file of the base, examine the recipe, and perhaps generate."""
    content = mutant if isinstance(mutant, bytes) else mutant.encode(errors="surrogatepass")
    (recipe / "base" / file).write_bytes(content)
    diagnosis = examine(Recipe.read(recipe))
    if not is_generated:
        diagnosis.raise_first()
        return
    try:
        model = ProxyTuned.load(str(recipe))
        assert isinstance(model.generate("the sea", SamplingParams(max_new_tokens=2)).text, str)
    except BackendError:  # such as activations that are no numbers
        return


def read_all(recipe: Path, file: str, seeds: range) -> Counter[str]:
    """Read mutants of one file of the base; every fifth is loaded and generates."""
    valid = (recipe / "base" / file).read_bytes()

    def mutant(random: Random) -> str | bytes:
        if not file.endswith(".json"):
            return mutate_bytes(valid, random)
        return mutate_json(json.loads(valid), random)

    generated = [seed for seed in seeds if seed % 5 == 0]
    examined = [seed for seed in seeds if seed % 5]
    counts = read_mutants(examined, mutant, partial(read, recipe, file, False))
    counts += read_mutants(generated, mutant, partial(read, recipe, file, True))
    (recipe / "base" / file).write_bytes(valid)
    return counts


def check_configs(models: Path, recipe: Path, seeds: range) -> None:
    for kind in ARCHITECTURES:
        shutil.rmtree(recipe / "base")
        shutil.copytree(models / kind, recipe / "base")
        counts = read_all(recipe, "config.json", seeds)
        assert sum(counts.values()) == len(seeds)
        # A mutator that spoils every file at its first bytes, or none, would show nothing.
        assert counts["accepted"] and counts["CorruptModel"], counts


def check_tokenizers(recipe: Path, seeds: range) -> None:
    total: Counter[str] = Counter()
    for file in SMALL_FILES:
        if file in ("vocab.json", "merges.txt"):
            # They are read only if there is no tokenizer.json.
            (recipe / "base" / "tokenizer.json").rename(recipe / "kept.json")
        # tokenizer.json is mutated more often than all the others.
        weight = 4 if file == "tokenizer.json" else 1
        total += read_all(recipe, file, range(seeds.start, seeds.start + weight * len(seeds)))
        if (recipe / "kept.json").exists():
            (recipe / "kept.json").rename(recipe / "base" / "tokenizer.json")
    assert sum(total.values()) == 10 * len(seeds)
    assert total["accepted"] and total["CorruptModel"], total


def test_a_hundred_mutated_configs_end_in_a_result_or_an_error_of_this_project(models, recipe):
    check_configs(models, recipe, range(20))


def test_a_hundred_mutated_tokenizers_end_in_a_result_or_an_error_of_this_project(recipe):
    check_tokenizers(recipe, range(10))


@pytest.mark.slow
def test_two_thousand_mutated_configs_end_in_a_result_or_an_error_of_this_project(models, recipe):
    check_configs(models, recipe, range(1000, 1400))


@pytest.mark.slow
def test_two_thousand_mutated_tokenizers_end_in_a_result_or_an_error_of_this_project(recipe):
    check_tokenizers(recipe, range(1000, 1200))


# Cases that once hung, aborted or ended in a traceback ---------------------------------------------------


CASES: dict[str, tuple[str, Any]] = {
    "a billion layers": ("config.json", {"num_hidden_layers": 10**9}),
    "architectures that are an object": ("config.json", {"architectures": {"a": 1}}),
    "no hidden size": ("config.json", {"hidden_size": 0}),
    "an end token of 10**30": ("config.json", {"eos_token_id": 10**30}),
    "an end token that is an object": ("config.json", {"eos_token_id": {"a": 1}}),
    "positions that are a text": ("config.json", {"max_position_embeddings": "x"}),
    "a window that is a text": ("config.json", {"sliding_window": "x"}),
    "a vocabulary of half a token": ("config.json", {"vocab_size": 266.5}),
    "a generation config with an end token that is none": (
        "generation_config.json",
        {"eos_token_id": {"a": 1}},
    ),
    "a maximum length that is a text": ("tokenizer_config.json", {"model_max_length": "x"}),
    "a normalizer that multiplies": (
        "tokenizer.json",
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
                ]
                * 4,
            }
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_doctor_and_loading_refuse_alike_and_name_the_file(recipe, case):
    file, changes = CASES[case]
    path = recipe / "base" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def both(_: object) -> None:
        diagnosis = examine(Recipe.read(recipe))
        (problem,) = diagnosis.problems
        assert problem.where == "base"
        assert file in str(problem.error) or "tokenizer of base" in str(problem.error)
        with pytest.raises(type(problem.error)) as caught:
            ProxyTuned.load(str(recipe))
        assert str(caught.value) == str(problem.error)
        raise problem.error

    (outcome,) = read_mutants([0], lambda random: None, both)
    assert outcome in ("CorruptModel", "UnsupportedModel")


def test_a_token_id_of_four_billion_is_refused_before_a_table_is_made(recipe):
    path = recipe / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zz"] = 4_000_000_000
    path.write_text(json.dumps(content))
    counts = read_mutants([0], lambda _: path.read_text(), partial(read, recipe, path.name, True))
    assert counts == {"CorruptModel": 1}
