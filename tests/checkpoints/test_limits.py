"""Configs and tokenizers that say what no real one says are refused before anything is made of it.

Whatever might hang or take all memory runs in a child process with limits (`support/mutations.py`).
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.checkpoints import tokenizer_limits
from proxytune.checkpoints.checkpoint import Checkpoint, find_checkpoint
from proxytune.checkpoints.config_limits import (
    check_config,
    check_empty_model,
    check_gguf_metadata,
    check_raw_config,
)
from proxytune.checkpoints.faults import faults_as
from proxytune.checkpoints.headers import StoredTensor
from proxytune.errors import CorruptModel, UnsafeModel, UnsupportedModel, UserError

from ..support.mutations import read_mutants
from ..support.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def copied(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "model"))


def find(directory: Path) -> Checkpoint:
    return find_checkpoint(str(directory), root=directory.parent)


def read_whole(directory: Path) -> Checkpoint:
    """Read everything that `doctor` reads of a model."""
    checkpoint = find(directory)
    checkpoint.check_buildable()
    assert checkpoint.architecture and checkpoint.cache_elements_per_token > 0
    assert checkpoint.eos_token_ids is not None and checkpoint.vocabulary.token_to_id
    text = checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("She is in the sea. 12 é\n"))
    assert isinstance(text, str)
    return checkpoint


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def ends_in(directory: Path) -> str:
    """Return which error a model ends in, read in a child with little time and memory; `accepted` if none."""
    (outcome,) = read_mutants([0], lambda random: directory, read_whole)
    return outcome


# Configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_hidden_layers", value) for value in (10**9, 10_001, 0, -1, "x", 2.5, None, [2], {}, True)),
        *(("hidden_size", value) for value in (0, -1, "x", 1e308, 2**25, [16], {"a": 1})),
        *(("vocab_size", value) for value in (0, -5, 2**40, 266.5, "266", None)),
        *(("num_attention_heads", value) for value in (0, 10**9, "4", 3)),
        *(("num_key_value_heads", value) for value in (10**9, -1, "2")),
        *(("head_dim", value) for value in (-4, 10**9, "x", 1e30)),
        *(("max_position_embeddings", value) for value in ("x", 10**30, -7, {"a": 1}, 1.5)),
        *(("sliding_window", value) for value in ("x", 10**30, {})),
        *(("eos_token_id", value) for value in (10**30, {"a": 1}, "x", 1.5, [[1]], [10**30], True)),
        *(("bos_token_id", value) for value in (10**30, {"a": 1})),
        ("num_labels", 10**9),
        *(("architectures", value) for value in ({"a": 1}, "LlamaForCausalLM", [1], 5)),
        *(("dtype", value) for value in (5, ["float32"], "save", "no_such_dtype")),
        *(("rope_parameters", value) for value in ("x", [1], 5)),
        ("rope_parameters", {"rope_type": "no_such_kind"}),
        ("rope_parameters", {"rope_type": "linear", "factor": "x", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
        *(("quantization_config", value) for value in ("x", 5, [1])),
        ("layer_types", ["full_attention"] * 1000),
        ("layer_types", "x"),
        ("get_text_config", 5),
        ("__class__", "x"),
        ("configuration_files", ["config.4.0.0.json"]),
        ("per_layer_config", {"0": {"hidden_size": 10**9}}),
        ("hidden_act", "no_such_function"),
        ("text_config", "x"),
        ("unknown", 10**30),
    ],
)  # fmt: skip
def test_a_config_that_says_what_cannot_be_is_refused(copied, key, value):
    edit(copied / "config.json", lambda config: config.update({key: value}))
    assert ends_in(copied) in ("CorruptModel", "UnsupportedModel")


@pytest.mark.parametrize("quantization", [{}, {"quant_method": 5}, {"quant_method": "x"}])
def test_a_quantisation_that_is_not_known_is_no_traceback(copied, quantization):
    """`doctor` builds a model whose stored weights may be packed, to count its parameters."""
    edit(copied / "config.json", lambda config: config.update(quantization_config=quantization))
    assert ends_in(copied) in ("accepted", "CorruptModel", "UnsupportedModel")


def test_a_config_nested_beyond_reason_is_refused(copied):
    nested: Any = 1
    for _ in range(50):
        nested = {"a": [nested]}
    with pytest.raises(CorruptModel, match="nested"):
        check_raw_config({"model_type": "llama", "x": nested}, "m")


def test_a_message_names_file_key_value_and_limit(copied):
    edit(copied / "config.json", lambda config: config.update(num_hidden_layers=10**9))
    with pytest.raises(CorruptModel) as caught:
        find(copied)
    for part in ("config.json", "num_hidden_layers", "1000000000", "10000", "hint:"):
        assert part in str(caught.value)


def test_more_layers_than_the_tensors_belong_to_are_refused_before_the_model_is_built(
    copied, monkeypatch
):
    edit(copied / "config.json", lambda config: config.update(num_hidden_layers=9000))
    monkeypatch.setattr(
        Checkpoint, "_empty_model", property(lambda self: pytest.fail("it was built"))
    )
    with pytest.raises(CorruptModel, match="says 9000 layers, and its tensors belong to 2"):
        find(copied)


def test_a_model_far_larger_than_its_tensors_is_refused_before_its_weights_are_read(copied):
    """transformers makes random weights for what the files lack before it says that they do: 9 GB here."""
    edit(copied / "config.json", lambda config: config.update(intermediate_size=2**24))
    checkpoint = find(copied)
    with pytest.raises(CorruptModel, match=r"describes a model of .* numbers"):
        checkpoint.check_buildable()


def test_buffers_count_too():
    class WithMask(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(4, 2)
            self.register_buffer("mask", torch.empty(2**14, 2**14, device="meta"))

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return self.embedding

    stored = {"embedding.weight": StoredTensor((4, 2), "float32")}
    with pytest.raises(CorruptModel, match="numbers"):
        check_empty_model(WithMask(), stored, "m", is_packed=False)


def test_an_embedding_of_another_shape_is_found_without_reading_weights(copied):
    edit(copied / "config.json", lambda config: config.update(hidden_size=32))
    with pytest.raises(CorruptModel, match=r"an embedding of \[266, 32\].*\[266, 16\]"):
        find(copied).check_buildable()


def test_an_attention_kernel_from_the_hub_is_code_and_refused(copied):
    edit(
        copied / "config.json",
        lambda config: config.update(attn_implementation="kernels-community/flash-attn2"),
    )
    with pytest.raises(UnsafeModel, match="kernels-community"):
        find(copied)


def test_an_attention_kernel_for_one_part_of_a_model_is_code_too(copied):
    kernels = {"": "someone/kernel"}
    edit(copied / "config.json", lambda config: config.update(attn_implementation=kernels))
    with pytest.raises(UnsafeModel, match="someone/kernel"):
        find(copied)


def test_a_vocabulary_under_the_name_of_xlm_is_one():
    check_raw_config({"model_type": "flaubert", "n_words": 68_729}, "m")


@pytest.mark.parametrize("kind", ["marian", "pegasus", "roformer", "xlm"])
def test_position_tables_made_number_by_number_are_short(kind):
    with pytest.raises(CorruptModel, match="at most 16384"):
        check_raw_config({"model_type": kind, "max_position_embeddings": 10**6}, "m")


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", 10**9), ("block_count", 3), ("vocab_size", 2**40), ("context_length", 2**60)],
)
def test_a_gguf_header_is_checked_before_it_is_converted(key, value):
    metadata = {"general.architecture": "llama", "llama.block_count": 2, f"llama.{key}": value}
    tensors = {f"blk.{i}.attn_q.weight": StoredTensor((8, 8), "float32") for i in range(2)}
    with pytest.raises(CorruptModel, match=key if value != 3 else "3 layers"):
        check_gguf_metadata(metadata, tensors, "m.gguf")


@pytest.mark.parametrize("value", [{"a": 1}, "x", 10**30, [1, "x"], 1.5, [[1]]])
def test_a_generation_config_whose_end_tokens_are_none_is_refused(copied, value):
    edit(copied / "generation_config.json", lambda config: config.update(eos_token_id=value))
    with pytest.raises(CorruptModel, match=r"generation_config\.json"):
        _ = find(copied).eos_token_ids


def test_end_tokens_beyond_the_head_are_left_out(copied):
    edit(
        copied / "generation_config.json", lambda config: config.update(eos_token_id=[5, 9000, -1])
    )
    assert 5 in find(copied).eos_token_ids
    assert not {9000, -1} & set(find(copied).eos_token_ids)


def test_the_default_config_of_every_model_that_transformers_has_is_within_the_limits():
    """Most defaults are those of a published model, so a limit that one meets is too low."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    num_checked = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:  # a few have no usable defaults
            continue
        check_raw_config(json.loads(config.to_json_string(use_diff=False)), kind)
        check_config(config, kind)
        num_checked += 1
    assert num_checked > 100


def test_a_cache_whose_layers_have_different_heads_is_counted_layer_by_layer(model):
    """Gemma 4: transformers refuses to give out the general value of what differs between layers."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers does not have Gemma 4")
    checkpoint = Checkpoint("m", "directory", model)
    checkpoint.__dict__["config"] = transformers.Gemma4TextConfig(
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
    )
    # Five layers of size 8 and one of 16, each with the keys and values of two heads.
    assert checkpoint.cache_elements_per_token == 2 * 2 * (5 * 8 + 16)


# Faults ----------------------------------------------------------------------------------------------


class PanicException(BaseException):
    """Like pyo3's, which is made anew in each extension module."""


@pytest.mark.parametrize(
    "fault",
    [KeyError("x"), RecursionError(), MemoryError(), OverflowError("y"), PanicException("in Rust")],
)
def test_whatever_a_library_raises_becomes_an_error_of_this_project(fault):
    in_words = faults_as(lambda why: CorruptModel(f"m: {why}"))
    with pytest.raises(CorruptModel, match=f"m: .*{fault}") as caught, in_words:
        raise fault
    assert caught.value.__cause__ is fault


@pytest.mark.parametrize("request_to_stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_request_to_stop_passes_through(request_to_stop):
    with pytest.raises(request_to_stop), faults_as(CorruptModel):
        raise request_to_stop


def test_an_error_of_this_project_passes_through():
    with pytest.raises(UnsafeModel), faults_as(CorruptModel):
        raise UnsafeModel("x")


# Tokenizers ------------------------------------------------------------------------------------------


def rule(directory: Path, **rules: Any) -> None:
    edit(directory / "tokenizer.json", lambda tokenizer: tokenizer.update(rules))


def replace(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def in_sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def table(*texts: str) -> str:
    """Return a table of characters with an empty trie, in SentencePiece's format."""
    return base64.b64encode(bytes(4) + b"".join(t.encode() + b"\0" for t in texts)).decode()


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
SINGLE = {"Sequence": {"id": "A", "type_id": 0}}


def template(single: list[Any], num_ids: int = 1) -> dict[str, Any]:
    special = {"id": "<e>", "ids": [0] * num_ids, "tokens": ["!"] * num_ids}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [SINGLE, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<e>": special},
    }


MULTIPLY = [
    {"normalizer": in_sequence(*[replace({"String": "a"}, "a" * 1000)] * 4)},
    {"normalizer": in_sequence(in_sequence(*[replace({"String": "a"}, "aa")] * 40))},
    {"normalizer": in_sequence(*[replace({"Regex": ""}, "aaaa")] * 8)},
    {"normalizer": replace({"Regex": "."}, "b" * 5000)},
    {"normalizer": replace({"String": ""}, "b" * 5000)},
    {"normalizer": {"type": "Prepend", "prepend": "b" * 5000}},
    {"normalizer": in_sequence(*[{"type": "ByteLevel"}] * 30)},
    {"normalizer": in_sequence(*[{"type": "Lowercase"}] * 101)},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table("x" * 5000)}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 12}},
    {"post_processor": template([SINGLE] * 2)},
    {"post_processor": template([SINGLE] + [{"SpecialToken": {"id": "<e>", "type_id": 0}}] * 5000)},
    {"post_processor": template([SINGLE, {"SpecialToken": {"id": "<e>", "type_id": 0}}], 10**5)},
    {"post_processor": {"type": "Sequence", "processors": [template([SINGLE] * 1000)]}},
    {"decoder": replace({"String": "a"}, "a" * 1000)},
    {"decoder": {"type": "Sequence", "decoders": [replace({"Regex": "e"}, "ee")] * 20}},
]  # fmt: skip


@pytest.mark.parametrize("rules", MULTIPLY, ids=lambda rules: json.dumps(rules)[:60])
def test_a_tokenizer_whose_rules_multiply_text_is_refused(copied, rules):
    rule(copied, **rules)
    assert ends_in(copied) == "UnsupportedModel"


WRONG = {
    "a token id of 4e9": lambda t: t["model"]["vocab"].update({"zz": 4_000_000_000}),
    "a token id of 2**22": lambda t: t["model"]["vocab"].update({"zz": 2**22}),
    "a token id below zero": lambda t: t["model"]["vocab"].update({"zz": -1}),
    "a token id that is a text": lambda t: t["model"]["vocab"].update({"zz": "1"}),
    "an added token id of 4e9": lambda t: t["added_tokens"][0].update(id=4_000_000_000),
    "a special token of a million characters": lambda t: t["added_tokens"][0].update(
        content="x" * 10**6
    ),
    "a token of a million characters": lambda t: t["model"]["vocab"].update({"z" * 10**6: 300}),
    "padding to 10**12": lambda t: t.update(
        padding={
            "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "!",
        }
    ),
    "no model": lambda t: t.pop("model"),
    "no vocabulary": lambda t: t["model"].pop("vocab"),
    "a vocabulary of numbers": lambda t: t["model"].update(vocab=[1, 2, 3]),
    "a rule without a type": lambda t: t.update(
        normalizer={"pattern": {"String": "a"}, "content": "a" * 9999}
    ),
    "a rule that is a text": lambda t: t.update(normalizer="x"),
    "a table that is no base64": lambda t: t.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "%%"}
    ),
    "a table that is cut off": lambda t: t.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    ),
    "an unknown rule": lambda t: t.update(normalizer={"type": "x"}),
    "a pattern that is none": lambda t: t.update(normalizer=replace({"Regex": "("}, "")),
    "a merge of unknown tokens": lambda t: t["model"].update(merges=[["q", "no such token"]]),
    "a post-processor with an unknown token": lambda t: t.update(
        post_processor={**template([SINGLE]), "single": [{"SpecialToken": {"id": "?", "type_id": 0}}]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_malformed_tokenizer_file_is_corrupt(copied, change):
    edit(copied / "tokenizer.json", change)
    assert ends_in(copied) == "CorruptModel"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_max_length", "x"),
        ("model_max_length", {}),
        ("model_max_length", True),
        ("extra_ids", 10**9),
        ("vocab", {"a": 0}),
        ("vocab", "/etc/passwd"),
        ("merges", []),
        ("merges", [["a", "b"]]),
        ("tokenizer_object", "x"),
        ("init_inputs", [5]),
        ("fast_tokenizer_files", ["tokenizer.1.0.json"]),
        ("tokenizer_class", 5),
        ("added_tokens_decoder", {"4000000000": {"content": "x"}}),
        ("added_tokens_decoder", {"x": {"content": "x"}}),
        ("added_tokens_decoder", {"5": 7}),
        ("added_tokens_decoder", [1]),
        ("extra_special_tokens", ["x" * 10**6]),
        ("chat_template", 5),
        ("chat_template", {"default": 5}),
        ("eos_token", 5),
        ("eos_token", ["x"]),
        ("padding_side", 5),
    ],
)
def test_a_tokenizer_config_that_says_what_cannot_be_is_refused(copied, key, value):
    edit(copied / "tokenizer_config.json", lambda config: config.update({key: value}))
    if (key, value) == ("merges", []):  # old versions wrote it
        assert ends_in(copied) == "accepted"
    else:
        if key == "chat_template":
            (copied / "chat_template.jinja").unlink()  # it would take the place of this one
        assert ends_in(copied) == "CorruptModel"


@pytest.mark.parametrize("file", ["added_tokens.json", "special_tokens_map.json", "vocab.json"])
def test_the_other_files_of_a_tokenizer_have_limits_too(copied, file):
    (copied / file).write_text(json.dumps({"x" * 10**6: 5}))
    assert ends_in(copied) == "CorruptModel"
    if file != "special_tokens_map.json":
        (copied / file).write_text(json.dumps({"zz": 4_000_000_000}))
        assert ends_in(copied) == "CorruptModel"


def split(*patterns: str) -> dict[str, Any]:
    steps = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, {**BYTES, "add_prefix_space": False}]}


def test_a_pattern_that_gives_up_on_a_run_of_letters_is_found_before_a_prompt_meets_it(copied):
    """Oniguruma stops after ten million steps, and tokenizers panics: not an `Exception`."""
    rule(copied, pre_tokenizer=split("(a+)+$"))
    assert ends_in(copied) == "CorruptModel"


@pytest.mark.slow
def test_a_pattern_whose_time_grows_with_the_cube_of_a_run_is_refused(copied):
    rule(copied, pre_tokenizer=split("[a-z]+[a-y]+[0-9]"))
    assert ends_in(copied) == "UnsupportedModel"


def test_a_panic_on_a_text_is_an_error_of_the_tokenizer(copied):
    """The pattern gives up only on a run of z, which no probe has."""
    rule(copied, pre_tokenizer=split("(z+)+$"))
    tokenizer = find(copied).tokenizer
    assert tokenizer.decode(tokenizer.encode("the sea")) == "the sea"
    for cut in (tokenizer.encode, tokenizer):
        with pytest.raises(CorruptModel, match=r"fails on a text.*retry-limit"):
            cut("z" * 60 + "!")


def test_a_guarded_tokenizer_can_be_copied_pickled_and_saved(model, tmp_path):
    import copy
    import pickle

    from transformers import AutoTokenizer

    tokenizer = find(model).tokenizer
    tokenizer.save_pretrained(tmp_path / "saved")
    others = (
        copy.deepcopy(tokenizer),
        pickle.loads(pickle.dumps(tokenizer)),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    for other in others:
        assert type(other) is type(tokenizer)
        assert other.encode("the sea") == tokenizer.encode("the sea")


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
# The longest text of SentencePiece's table for NFKC has 33 bytes (U+FDFA).
NFKC_TABLE = {"type": "Precompiled", "precompiled_charsmap": table("صلى الله عليه وسلم", "ffi")}
SPACES = replace({"Regex": " {2,}"}, " ")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama 2": {
        "normalizer": in_sequence(
            {"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")
        ),
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    },
    "gemma": {
        "normalizer": replace({"String": " "}, "▁"),
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
    },
    "mistral": {"pre_tokenizer": METASPACE, "decoder": METASPACE},
    "llama 3": {"pre_tokenizer": split(LLAMA_3)},
    "qwen 2": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": split(LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")),
    },
    "gpt-4o": {"pre_tokenizer": split(O200K)},
    "deepseek v3": {"pre_tokenizer": split(*DEEPSEEK_V3)},
    "bloom": {"pre_tokenizer": split(" ?[^(\\s|[.,!?…。\uff0c、।\u06d4،])]+")},
    "superbpe": {"pre_tokenizer": split(r"(?=(\d{3})+(?!\d))")},
    "indic": {"pre_tokenizer": split(r"(?:\p{L}\p{M}*)+|\s+")},
    "gpt-2": {"pre_tokenizer": {**BYTES, "use_regex": True}},
    "smollm": {
        "pre_tokenizer": {
            "type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES],
        }
    },
    "xlnet": {
        "normalizer": in_sequence(
            replace({"String": "``"}, '"'), replace({"String": "''"}, '"'), {"type": "NFKD"},
            {"type": "StripAccents"}, {"type": "Lowercase"}, NFKC_TABLE, SPACES,
        ),
        "pre_tokenizer": METASPACE,
    },
    "t5": {
        "normalizer": in_sequence(
            NFKC_TABLE, {"type": "Strip", "strip_left": False, "strip_right": True}, SPACES
        ),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]},
        "post_processor": template([SINGLE, {"SpecialToken": {"id": "<e>", "type_id": 0}}]),
    },
    "clip": {
        "normalizer": in_sequence(
            {"type": "NFC"}, replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"}
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_of_real_families_are_within_the_limits(copied, family):
    path = copied / "tokenizer.json"
    edit(path, lambda tokenizer: tokenizer.update(FAMILIES[family]))
    # Only the rules are real; so the file is checked, and its patterns are run, but no table is.
    if "Precompiled" in path.read_text():
        assert tokenizer_limits.check_tokenizer_files(copied, family)
        return
    assert ends_in(copied) == "accepted"
    assert ("Regex" in path.read_text()) == tokenizer_limits.check_tokenizer_files(copied, family)


def test_the_models_of_a_recipe_that_share_a_tokenizer_have_it_checked_once(copied, monkeypatch):
    rule(copied, version="1.0 of this test")
    assert not tokenizer_limits.check_tokenizer_files(copied, "one")
    monkeypatch.setattr(tokenizer_limits, "parse_json", lambda *_, **__: pytest.fail("read again"))
    assert not tokenizer_limits.check_tokenizer_files(copied, "other")


def test_a_refused_tokenizer_is_refused_again(copied):
    rule(copied, **MULTIPLY[0])
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="times as long"):
            tokenizer_limits.check_tokenizer_files(copied, "m")


def test_a_tokenizer_of_words_and_code_points_is_read(copied):
    """WordPiece, WordLevel and Unigram beside BPE: lists and objects of tokens."""
    models = (
        {"type": "WordLevel", "vocab": {"the": 0, "?": 1}, "unk_token": "?"},
        {
            "type": "WordPiece", "vocab": {"the": 0, "?": 1}, "unk_token": "?",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        },
        {"type": "Unigram", "vocab": [["?", 0.0], ["the", -1.0]], "unk_id": 0, "byte_fallback": False},
    )  # fmt: skip
    for own in models:
        rule(copied, model=own, added_tokens=[])
        assert not tokenizer_limits.check_tokenizer_files(copied, "m")
    rule(copied, model={**models[1], "max_input_chars_per_word": 10**9})
    with pytest.raises(UserError, match="10,000"):
        tokenizer_limits.check_tokenizer_files(copied, "m")
