"""How the text of a GGUF file is cut: by the rule that the file names, or not at all.

tests/backends/test_llama_cpp.py compares the rules with llama.cpp's own.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.pre_tokenizers import CUTTING_RULES, cut_by, cutting_rule, rule_name
from proxytune.errors import UnsupportedModel
from proxytune.loading.doctor import examine
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from tests.support.cutting import TEXTS, crossing_bpe
from tests.support.gguf import export, llama
from tests.support.tiny import tiny_gguf, tiny_tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def crossing_tokenizer(name: str):
    """Return a byte-level BPE of the tokenizers library that cuts by the rule of that name."""
    from tokenizers import Tokenizer, models

    tokens, merges = crossing_bpe()
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=list(merges)))
    cut_by(tokenizer, CUTTING_RULES[name])
    return tokenizer


def pieces(name: str, text: str) -> list[str]:
    return [text[slice(*place)] for _, place in _cut(name, text)]


def _cut(name: str, text: str):
    return crossing_tokenizer(name).pre_tokenizer.pre_tokenize_str(text)


def test_rules_cut_numbers_as_their_models_do():
    assert pieces("gpt-2", "a   123456") == ["a", "  ", " 123456"]
    # SmolLM's digits stand alone, and the spaces before them stay together.
    assert pieces("smollm", "a   123456") == ["a", "   ", "1", "2", "3", "4", "5", "6"]
    assert pieces("llama-bpe", "a   123456") == ["a", "  ", " ", "123", "456"]
    assert pieces("qwen2", "a   123456") == ["a", "  ", " ", "1", "2", "3", "4", "5", "6"]
    assert pieces("deepseek-v3", "a   1234567") == ["a", "   ", "123", "456", "7"]
    assert pieces("falcon", "a   123456") == ["a", "  ", " ", "123", "456"]
    assert pieces("tekken", "ÉCOLE Été") == ["ÉCOLE", " Été"]


def test_every_rule_keeps_every_character():
    from tokenizers import pre_tokenizers

    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name in CUTTING_RULES:
        for text in TEXTS:
            whole = "".join(part for part, _ in spelling.pre_tokenize_str(text))
            assert "".join(part for part, _ in _cut(name, text)) == whole


def test_a_word_that_is_a_token_is_kept_whole_where_the_rule_says_so():
    from tokenizers import Tokenizer, models

    for name, expected in (("llama-bpe", ["ab"]), ("qwen2", ["a", "b"])):
        tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[]))
        cut_by(tokenizer, CUTTING_RULES[name])
        again = Tokenizer.from_str(tokenizer.to_str())
        assert again.encode("ab").tokens == expected


def test_a_rule_is_written_under_its_first_name():
    for name, rule in CUTTING_RULES.items():
        first = rule_name(rule)
        assert CUTTING_RULES[first] == rule
        assert list(CUTTING_RULES).index(first) <= list(CUTTING_RULES).index(name)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "deepseek-llm", "tekken"])
def test_a_files_text_is_cut_as_before_it_was_exported(tmp_path, name):
    tokens, _ = crossing_bpe()
    tokenizer = tiny_tokenizer(merges=())
    backend = crossing_tokenizer(name)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"] = json.loads(backend.to_str())["model"]
    content["pre_tokenizer"] = json.loads(backend.to_str())["pre_tokenizer"]
    special = tokenizer.all_special_tokens
    content["added_tokens"] = [
        {**token, "id": len(tokens) + special.index(token["content"])}
        for token in content["added_tokens"]
    ]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>"
    )
    model = llama(tmp_path / "model", tokenizer=whole)
    export(model, tmp_path / "model.gguf")
    found = find_checkpoint("model.gguf", root=tmp_path)
    original = find_checkpoint("model", root=tmp_path)
    assert found.gguf_header.metadata["tokenizer.ggml.pre"] == name
    for text in TEXTS:
        ids = found.tokenizer.encode(text, add_special_tokens=False)
        assert ids == original.tokenizer.encode(text, add_special_tokens=False), text


def test_a_rule_that_is_not_known_is_refused_and_not_replaced(tmp_path):
    """transformers used to cut by GPT-2's rule whatever the file said."""
    tiny_gguf(tmp_path / "a.gguf", pre="of-tomorrow")
    with pytest.raises(UnsupportedModel, match=r"'of-tomorrow' \(tokenizer\.ggml\.pre\)") as caught:
        find_checkpoint("a.gguf", root=tmp_path)
    assert "other tokens" in str(caught.value)
    with pytest.raises(UnsupportedModel, match="pre-tokenizer 7"):
        cutting_rule(7, "a file")


def test_a_file_that_names_no_rule_is_cut_as_llama_cpp_cuts_it_and_doctor_says_so(tmp_path):
    tiny_gguf(tmp_path / "base.gguf", pre=None)
    tiny_gguf(tmp_path / "small.gguf", pre="gpt-2")
    assert cutting_rule(None, "a file") == CUTTING_RULES["default"]
    found = find_checkpoint("base.gguf", root=tmp_path).tokenizer.backend_tokenizer
    assert [part for part, _ in found.pre_tokenizer.pre_tokenize_str("a 1234")] == [
        "a", "Ġ", "123", "4",
    ]  # fmt: skip
    small = ModelSpec(model="small.gguf", device="cpu")
    recipe = Recipe(
        base=ModelSpec(model="base.gguf", device="cpu"),
        experts=(ExpertSpec("one", small, small),),
        directory=tmp_path,
    )
    notes = [note for note in examine(recipe).notes if "pre-tokenizer" in note]
    assert len(notes) == 1 and notes[0].startswith("base: base.gguf names no pre-tokenizer")
    named = replace(recipe, base=small)
    assert not [note for note in examine(named).notes if "pre-tokenizer" in note]
