"""Export to GGUF: what is written reads back as the same model, and what cannot be written is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from proxytune import cli
from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint, holds_recipe
from proxytune.errors import (
    AdapterMismatch,
    CorruptModel,
    InvalidRequest,
    OutputFileError,
    RecipeError,
    UnsafeModel,
    UnsupportedModel,
)
from proxytune.export import write
from proxytune.export.adapter import export_adapter
from proxytune.export.model import export_model
from proxytune.export.recipe import export_recipe
from proxytune.recipe.recipe import AUTO_MAP, Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from tests.support.tiny import NUM_TOKENS, tiny_adapter, tiny_gguf, tiny_model, tiny_tokenizer

SMOL = "package:proxytune/smol"
PROMPT = [5, 17, 80, 3, 250, 80, 41]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep converted copies of GGUF files where the test's other files are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def llama(directory: Path, *, tokenizer: Any = None, seed: int = 0, **settings: Any) -> Path:
    """Write a random Llama whose heads are wider than hidden size / heads, and share keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 3e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        **settings,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # initialised to one, which would hide norms that change places
                    parameter.normal_(1, 0.2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def logits(reference: Path, adapter: Path | None = None) -> torch.Tensor:
    """Return `[seq, vocab]`, read through this project's backend."""
    found = find_checkpoint(str(reference), root=Path("/"))
    files = None if adapter is None else {"a": find_adapter(str(adapter), root=Path("/"))}
    spec = ModelSpec(model=str(reference), device="cpu", dtype="float32")
    backend = TransformersBackend.load(found, spec, files)
    names = None if adapter is None else ["a"]
    state, first = backend.prefill([PROMPT[:1]], adapters=names)
    rest = backend.extend(state, torch.tensor([PROMPT[1:]]))
    return torch.cat([first[:, None], rest], dim=1)[0].float()


def export(directory: Path, output: Path, **settings: Any) -> write.ExportedFile:
    return export_model(find_checkpoint(str(directory), root=Path("/")), output, **settings)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a GGUF file's fields and tensors, by their names."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


# Models


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_float32_export_reads_back_with_the_same_logits_and_vocabulary(tmp_path, is_tied):
    small = llama(tmp_path / "small", tie_word_embeddings=is_tied)
    written = export(small, tmp_path / "small.gguf", dtype="F32")
    assert written.path == tmp_path / "small.gguf"
    assert written.num_bytes == written.path.stat().st_size
    # Both paths run the same kernels on the same float32 weights.
    torch.testing.assert_close(logits(written.path), logits(small), rtol=0, atol=1e-5)
    original = find_checkpoint(str(small), root=tmp_path)
    found = find_checkpoint(str(written.path), root=tmp_path)
    assert found.vocabulary.token_to_id == original.vocabulary.token_to_id
    assert found.eos_token_ids == original.eos_token_ids
    assert found.max_context == 128
    assert found.tokenizer.chat_template == original.tokenizer.chat_template
    text = "then the häus<|im_end|>\n 123"
    assert found.tokenizer.encode(text) == original.tokenizer.encode(text)


@pytest.mark.parametrize(
    ("dtype", "bits"), [("F16", 11), ("BF16", 8), ("Q8_0", 8), ("Q4_0", 4), ("Q4_1", 4)]
)
def test_every_dtype_reads_back_as_close_as_its_bits_are(tmp_path, dtype, bits):
    small = llama(tmp_path / "small")
    written = export(small, tmp_path / "small.gguf", dtype=dtype)
    assert written.num_unquantized == 0
    converted = find_checkpoint(str(written.path), root=tmp_path).weights_path()
    stored = load_file(converted / "model.safetensors")
    for name, original in load_file(small / "model.safetensors").items():
        # A step of a block is at most its largest number divided by 2 ** (bits - 1).
        tolerance = float(original.abs().max()) / 2 ** (bits - 1)
        torch.testing.assert_close(stored[name], original, rtol=0, atol=tolerance, msg=name)


def test_vectors_stay_in_float32_and_the_embedding_has_8_bits_beside_4(tmp_path):
    small = llama(tmp_path / "small")
    export(small, tmp_path / "small.gguf", dtype="Q4_0")
    _, tensors = contents(tmp_path / "small.gguf")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == kinds["blk.1.ffn_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_down.weight"] == "Q4_0"


def test_rows_that_do_not_divide_into_blocks_are_stored_in_float16_and_counted(tmp_path):
    # Rows of 16 and 32 numbers; a block has 32. Only the 2 down projections have rows of 32.
    small = tiny_model(tmp_path / "small", hidden_size=16)
    written = export(small, tmp_path / "small.gguf", dtype="Q8_0")
    _, tensors = contents(written.path)
    in_half = [name for name, tensor in tensors.items() if tensor.tensor_type.name == "F16"]
    assert written.num_unquantized == len(in_half) == 2 * 6 + 2
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"
    assert logits(written.path).isfinite().all()


def test_rows_that_no_token_has_are_padding_before_and_after(tmp_path):
    small = llama(tmp_path / "small", vocab_size=NUM_TOKENS + 6)
    export(small, tmp_path / "small.gguf", dtype="F32")
    fields, _ = contents(tmp_path / "small.gguf")
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{NUM_TOKENS + 5}]"
    assert fields["tokenizer.ggml.token_type"][-6:] == [5] * 6  # UNUSED
    found = find_checkpoint("small.gguf", root=tmp_path)
    assert found.width == NUM_TOKENS + 6
    assert found.vocabulary.token_to_id == tiny_tokenizer().get_vocab()
    assert found.vocabulary.padding_ids.tolist() == list(range(NUM_TOKENS, NUM_TOKENS + 6))
    torch.testing.assert_close(logits(tmp_path / "small.gguf"), logits(small), rtol=0, atol=1e-5)


def test_queries_are_interleaved_by_hand(tmp_path):
    """One head of 4 rows: row 0 is rotated with row 2, and llama.cpp wants them side by side."""
    config = llama(tmp_path / "small", num_attention_heads=1, num_key_value_heads=1, head_dim=4)
    export(config, tmp_path / "small.gguf", dtype="F32")
    _, tensors = contents(tmp_path / "small.gguf")
    original = load_file(config / "model.safetensors")
    for ours, theirs in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj")):
        rows = original[f"model.layers.0.{theirs}.weight"]
        stored = torch.from_numpy(tensors[f"blk.0.{ours}.weight"].data.copy())
        assert torch.equal(stored, rows[[0, 2, 1, 3]])


def test_the_fields_that_llama_cpp_reads_are_those_of_the_config(tmp_path):
    small = llama(tmp_path / "small")
    export(small, tmp_path / "small.gguf", dtype="Q8_0")
    fields, _ = contents(tmp_path / "small.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == 7
    assert fields["llama.block_count"] == 2
    assert fields["llama.context_length"] == 128
    assert fields["llama.attention.head_count"] == 4
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.attention.key_length"] == fields["llama.attention.value_length"] == 16
    assert fields["llama.rope.dimension_count"] == 16
    assert fields["llama.rope.freq_base"] == 5000.0
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-5)
    assert "llama.rope.scaling.type" not in fields


def test_linear_scaling_of_rope_is_a_field(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    small = llama(tmp_path / "small", rope_parameters=rope)
    export(small, tmp_path / "small.gguf")
    fields, tensors = contents(tmp_path / "small.gguf")
    assert fields["llama.rope.scaling.type"] == "linear"
    assert fields["llama.rope.scaling.factor"] == 4.0
    assert "rope_freqs.weight" not in tensors


def test_llama_3_scaling_of_rope_is_a_tensor_of_divisors(tmp_path):
    """Wavelengths below 32 / 4 stay, those above 32 / 1 are 8 times as long, those between lie between."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    small = llama(tmp_path / "small", rope_parameters=rope)
    export(small, tmp_path / "small.gguf")
    _, tensors = contents(tmp_path / "small.gguf")
    divisors = tensors["rope_freqs.weight"].data.tolist()
    waves = [2 * math.pi * 10000 ** (i / 8) for i in range(8)]
    assert waves[0] < 8 < waves[1] < 32 < waves[2]
    smooth = (32 / waves[1] - 1) / (4 - 1)
    between = 1 / ((1 - smooth) / 8 + smooth)
    assert divisors == pytest.approx([1.0, between] + [8.0] * 6, rel=1e-5)


@pytest.mark.slow
def test_the_shipped_anti_expert_reads_back_as_it_was(tmp_path):
    original = find_checkpoint(f"{SMOL}/anti-expert", root=tmp_path)
    written = export_model(original, tmp_path / "small.gguf", dtype="F32")
    found = find_checkpoint(str(written.path), root=tmp_path)
    assert found.vocabulary.token_to_id == original.vocabulary.token_to_id
    assert found.eos_token_ids == original.eos_token_ids
    text = "It's 1,024 o'clock,\n\n  naïve 漢字 <|im_end|>\n\tdef f(x):  "
    assert found.tokenizer.encode(text) == original.tokenizer.encode(text)
    torch.testing.assert_close(logits(written.path), logits(original.directory), rtol=0, atol=1e-4)


# What is refused


def test_other_architectures_are_refused_with_what_can_write_them(tmp_path):
    for architecture in ("qwen2", "gpt2"):
        other = tiny_model(tmp_path / architecture, architecture)
        with pytest.raises(
            UnsupportedModel, match=r"(?s)only LlamaForCausalLM.*convert_hf_to_gguf"
        ):
            export(other, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out.gguf*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
    ],
)
def test_a_llama_that_computes_something_else_is_refused_by_name(tmp_path, settings, words):
    small = llama(tmp_path / "small", **settings)
    with pytest.raises(UnsupportedModel, match=words):
        export(small, tmp_path / "out.gguf")


def test_a_gguf_file_and_an_unknown_dtype_are_refused(tmp_path):
    tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(UnsupportedModel, match="a GGUF file already"):
        export(tmp_path / "tiny.gguf", tmp_path / "out.gguf")
    small = llama(tmp_path / "small")
    with pytest.raises(InvalidRequest, match=r"'Q6_K'.*F32, F16"):
        export(small, tmp_path / "out.gguf", dtype="Q6_K")
    with pytest.raises(InvalidRequest, match=r"out\.bin\.gguf"):
        export(small, tmp_path / "out.bin")


def test_pickled_weights_are_not_exported(tmp_path):
    small = llama(tmp_path / "small")
    torch.save(load_file(small / "model.safetensors"), small / "pytorch_model.bin")
    (small / "model.safetensors").unlink()
    found = find_checkpoint("small", root=tmp_path, allow_pickle=True)
    with pytest.raises(UnsafeModel, match="pickled"):
        export_model(found, tmp_path / "out.gguf")


def test_missing_extra_and_infinite_weights_are_named(tmp_path):
    small = llama(tmp_path / "small")
    path = small / "model.safetensors"
    weights = load_file(path)
    key = "model.layers.1.mlp.up_proj.weight"

    def with_weights(changes: dict[str, torch.Tensor], without: str | None = None) -> None:
        kept = {name: tensor for name, tensor in weights.items() if name != without}
        save_file({**kept, **changes}, path, {"format": "pt"})

    with_weights({}, without=key)
    with pytest.raises(CorruptModel, match=f"{key} has the shape .* missing"):
        export(small, tmp_path / "out.gguf")
    with_weights({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(UnsupportedModel, match="q_norm"):
        export(small, tmp_path / "out.gguf")
    with_weights({key: torch.full((64, 32), math.inf)})
    with pytest.raises(CorruptModel, match=r"blk\.1\.ffn_up\.weight .*not finite"):
        export(small, tmp_path / "out.gguf")
    with_weights({key: torch.full((64, 32), 7e4)})
    with pytest.raises(UnsupportedModel, match=r"(?s)70000, which float16 cannot.*BF16"):
        export(small, tmp_path / "out.gguf")
    export(small, tmp_path / "out.gguf", dtype="BF16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "small"]


# Tokenizers


def tokenizer_with(pre_tokenizer: Any, **changes: Any) -> Any:
    from tokenizers import Tokenizer

    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizer
    if "ignore_merges" in changes:
        content = json.loads(backend.to_str())
        content["model"]["ignore_merges"] = changes["ignore_merges"]
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>"
        )
    if "normalizer" in changes:
        backend.normalizer = changes["normalizer"]
    return tokenizer


def split(expression: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_the_rule_that_cuts_text_is_found_by_what_it_does(tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    qwen = split(LLAMA_3.replace("{1,3}", ""))
    for index, (tokenizer, name) in enumerate(
        [
            (tokenizer_with(words), "gpt-2"),
            (tokenizer_with(digits), "smollm"),
            (tokenizer_with(split(LLAMA_3), ignore_merges=True), "llama-bpe"),
            (tokenizer_with(split(LLAMA_3)), "smaug-bpe"),
            (tokenizer_with(qwen, normalizer=normalizers.NFC()), "qwen2"),
        ]
    ):
        small = llama(tmp_path / str(index), tokenizer=tokenizer)
        export(small, tmp_path / f"{index}.gguf")
        fields, _ = contents(tmp_path / f"{index}.gguf")
        assert fields["tokenizer.ggml.model"] == "gpt2"
        assert fields["tokenizer.ggml.pre"] == name


def test_a_rule_without_a_name_is_refused_unless_the_caller_names_it(tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for index, (tokenizer, why) in enumerate(
        [
            (tokenizer_with(split(r"\w+|\W+")), r"without a known name in llama\.cpp.*\\w\+"),
            (tokenizer_with(words, ignore_merges=True), "keeping words that are tokens whole"),
            (tokenizer_with(words, normalizer=normalizers.Lowercase()), "Lowercase"),
        ]
    ):
        small = llama(tmp_path / str(index), tokenizer=tokenizer)
        with pytest.raises(UnsupportedModel, match=rf"(?s){why}.*--pre"):
            export(small, tmp_path / "out.gguf")
        export(small, tmp_path / f"{index}.gguf", pre="mine")
        assert contents(tmp_path / f"{index}.gguf")[0]["tokenizer.ggml.pre"] == "mine"


def test_a_token_that_swallows_spaces_is_refused(tmp_path):
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    small = llama(tmp_path / "small", tokenizer=tokenizer)
    with pytest.raises(UnsupportedModel, match=r"swallows .*'<mask>'"):
        export(small, tmp_path / "out.gguf")


def test_a_tokenizer_in_the_manner_of_sentencepiece_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    backend = Tokenizer(
        models.BPE(vocab=pieces, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    small = llama(tmp_path / "small", tokenizer=tokenizer)
    with pytest.raises(UnsupportedModel, match=r"(?s)SentencePiece.*convert_hf_to_gguf"):
        export(small, tmp_path / "out.gguf")


def test_tokens_beyond_the_embedding_are_refused(tmp_path):
    small = llama(tmp_path / "small", vocab_size=NUM_TOKENS - 1)
    with pytest.raises(UnsupportedModel, match=f"1 tokens beyond the {NUM_TOKENS - 1} rows"):
        export(small, tmp_path / "out.gguf")


def test_special_and_added_tokens_keep_their_kind_and_a_first_token_is_said(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(extra_tokens=["<think>"])
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    small = llama(tmp_path / "small", tokenizer=tokenizer)
    (small / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.eos_token_id, start]})
    )
    export(small, tmp_path / "small.gguf")
    fields, _ = contents(tmp_path / "small.gguf")
    types = fields["tokenizer.ggml.token_type"]
    assert types[tokenizer.eos_token_id] == types[start] == 3  # CONTROL
    assert types[tokenizer.convert_tokens_to_ids("<think>")] == 4  # USER_DEFINED
    assert types[0] == 1  # NORMAL
    assert fields["tokenizer.ggml.bos_token_id"] == start
    assert fields["tokenizer.ggml.add_bos_token"]
    assert not fields["tokenizer.ggml.add_eos_token"]
    # What else ends a text is called end of turn.
    assert fields["tokenizer.ggml.eot_token_id"] == start
    found = find_checkpoint("small.gguf", root=tmp_path)
    original = find_checkpoint("small", root=tmp_path)
    assert found.eos_token_ids == original.eos_token_ids
    one, other = (
        files.tokenizer.encode("the <think>", add_special_tokens=False)
        for files in (found, original)
    )
    assert one == other
    # The reader of transformers 5.19 does not put the first token before a text, whatever the file says.
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):
        assert found.tokenizer.encode("the <think>") == original.tokenizer.encode("the <think>")


# Adapters


def lora(model: Path, directory: Path, **settings: Any) -> Path:
    """Write a random LoRA adapter on all linear layers and return its directory."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **settings}
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **config),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return directory


def exported_adapter(
    model: Path, adapter: Path, output: Path, dtype: str = "F32"
) -> tuple[dict[str, Any], dict[str, Any]]:
    export_adapter(
        find_adapter(str(adapter), root=Path("/")),
        find_checkpoint(str(model), root=Path("/")),
        output,
        dtype=dtype,
    )
    return contents(output)


def added(fields: dict[str, Any], tensors: dict[str, Any], name: str) -> torch.Tensor:
    """Return what llama.cpp adds to a weight: alpha / rank * b @ a, rank being b's inner dimension."""
    a = torch.from_numpy(tensors[f"{name}.lora_a"].data.copy()).float()
    b = torch.from_numpy(tensors[f"{name}.lora_b"].data.copy()).float()
    return fields["adapter.lora.alpha"] / b.shape[1] * (b @ a)


def test_an_adapter_has_two_tensors_for_each_layer_and_one_alpha(tmp_path):
    small = llama(tmp_path / "small")
    adapter = tiny_adapter(small, tmp_path / "adapter", rank=2, alpha=4)
    fields, tensors = exported_adapter(small, adapter, tmp_path / "adapter.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 4.0
    assert sorted(tensors) == sorted(
        f"blk.{layer}.attn_{part}.weight.lora_{side}"
        for layer in range(2)
        for part in "qv"
        for side in "ab"
    )
    # GGUF's axes are the other way round: inputs first.
    assert tensors["blk.0.attn_q.weight.lora_a"].shape.tolist() == [32, 2]
    assert tensors["blk.0.attn_q.weight.lora_b"].shape.tolist() == [2, 4 * 16]
    assert tensors["blk.0.attn_v.weight.lora_b"].shape.tolist() == [2, 2 * 16]
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32"}
    _, halves = exported_adapter(small, adapter, tmp_path / "half.gguf", "F16")
    assert {tensor.tensor_type.name for tensor in halves.values()} == {"F16"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 0}},
        {"rank_pattern": {"k_proj": 2}, "use_rslora": True},
        {"lora_alpha": 0},
    ],
    ids=["plain", "rslora", "alphas", "ranks", "nothing"],
)
def test_model_plus_adapter_is_the_merged_model_and_what_peft_computes(tmp_path, settings):
    small = llama(tmp_path / "small")
    adapter = lora(small, tmp_path / "adapter", **settings)
    plain = export(small, tmp_path / "small.gguf", dtype="F32")
    merged = export(
        small,
        tmp_path / "merged.gguf",
        dtype="F32",
        adapter=find_adapter(str(adapter), root=tmp_path),
    )
    fields, tensors = exported_adapter(small, adapter, tmp_path / "adapter.gguf")
    _, before = contents(plain.path)
    _, after = contents(merged.path)
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    assert len(layers) == 2 * 7
    for name in before:
        expected = torch.from_numpy(before[name].data.copy())
        if name in layers:
            expected = expected + added(fields, tensors, name)
        there = torch.from_numpy(after[name].data.copy())
        torch.testing.assert_close(there, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(merged.path), logits(small, adapter), rtol=0, atol=1e-4)


def test_an_adapter_of_another_model_or_of_another_kind_is_refused(tmp_path):
    small = llama(tmp_path / "small")
    wide = llama(tmp_path / "wide", hidden_size=64)
    adapter = tiny_adapter(small, tmp_path / "adapter")
    with pytest.raises(AdapterMismatch, match="has 64 inputs instead of 32"):
        exported_adapter(wide, adapter, tmp_path / "out.gguf")
    with pytest.raises(InvalidRequest, match=r"'Q8_0' cannot be written for an adapter"):
        exported_adapter(small, adapter, tmp_path / "out.gguf", "Q8_0")
    for name, settings in (
        ("use_dora", {"use_dora": True}),
        ("bias", {"bias": "lora_only"}),
        ("modules_to_save", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
        ("lora_embedding_A", {"target_modules": ["embed_tokens"]}),
    ):
        other = lora(small, tmp_path / name, **settings)
        with pytest.raises(UnsupportedModel, match=rf"(?s){name}.*merge_and_unload"):
            exported_adapter(small, other, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_an_adapter_on_a_head_is_written_where_the_head_stands_alone(tmp_path):
    small = llama(tmp_path / "small")
    adapter = lora(small, tmp_path / "adapter", target_modules=["lm_head"])
    _, tensors = exported_adapter(small, adapter, tmp_path / "adapter.gguf")
    assert sorted(tensors) == ["output.weight.lora_a", "output.weight.lora_b"]
    tied = llama(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UnsupportedModel, match="its embedding, too"):
        exported_adapter(tied, adapter, tmp_path / "out.gguf")


def test_an_adapter_on_a_gguf_model_is_written(tmp_path):
    tiny_gguf(tmp_path / "tiny.gguf")
    model = find_checkpoint("tiny.gguf", root=tmp_path)
    adapter = tiny_adapter(model.weights_path(), tmp_path / "adapter")
    written = export_adapter(
        find_adapter(str(adapter), root=tmp_path), model, tmp_path / "adapter.gguf"
    )
    assert written.num_tensors == 8


# Files


def test_another_file_is_kept_unless_it_is_to_be_replaced(tmp_path):
    small = llama(tmp_path / "small")
    output = tmp_path / "deep" / "out.gguf"
    first = export(small, output, dtype="F32")
    assert export(small, output, dtype="F32") == first
    with pytest.raises(OutputFileError, match=r"(?s)other content.*--force"):
        export(small, output, dtype="F16")
    assert output.stat().st_size == first.num_bytes
    export(small, output, dtype="F16", overwrite=True)
    assert output.stat().st_size < first.num_bytes
    assert [path.name for path in output.parent.iterdir()] == ["out.gguf"]
    with pytest.raises(OutputFileError, match="is a directory"):
        (tmp_path / "folder.gguf").mkdir()
        export(small, tmp_path / "folder.gguf")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_export_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    small = llama(tmp_path / "small")
    output = tmp_path / "out" / "out.gguf"
    export(small, output, dtype="F32")
    content = output.read_bytes()
    stored = write._stored

    def interrupt(tensor: Any, source: str) -> Any:
        if tensor.name == "blk.1.attn_q.weight":
            raise error("no space left")
        return stored(tensor, source)

    monkeypatch.setattr(write, "_stored", interrupt)
    with pytest.raises(OutputFileError if error is OSError else error):
        export(small, output, dtype="F16", overwrite=True)
    assert output.read_bytes() == content
    assert [path.name for path in output.parent.iterdir()] == ["out.gguf"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    small = llama(tmp_path / "small")
    (tmp_path / "file").touch()
    with pytest.raises(OutputFileError, match=r"file/out\.gguf cannot be written"):
        export(small, tmp_path / "file" / "out.gguf")


# Recipes


@pytest.fixture
def recipe(tmp_path):
    """A recipe with two adapters on one anti-expert, one expert of its own weights, and a local base."""
    root = tmp_path / "recipe"
    llama(root / "small")
    llama(root / "tuned" / "small", seed=1)
    llama(tmp_path / "base", seed=2)
    lora(root / "small", root / "adapters" / "law", target_modules=["q_proj"])
    lora(root / "small", root / "adapters" / "tales", target_modules=["up_proj"])
    small = ModelSpec(model="small", dtype="float32", prompt="chat")
    return Recipe(
        base=ModelSpec(model="../base", dtype="float32"),
        experts=(
            ExpertSpec("law", ModelSpec(adapter="adapters/law"), small, 0.5),
            ExpertSpec("tales", ModelSpec(adapter="adapters/tales", prompt="chat"), small),
            ExpertSpec("own", ModelSpec(model="tuned/small"), small),
            ExpertSpec("bare", small, ModelSpec(same_as="base")),
        ),
        default_expert="law",
        directory=root,
    )


def test_a_recipe_becomes_a_directory_of_gguf_files_with_shared_weights_once(recipe, tmp_path):
    recipe.write(recipe.directory)
    written = export_recipe(recipe, tmp_path / "out" / "gguf", dtype="Q8_0")
    directory = tmp_path / "out" / "gguf"
    assert written.directory == directory
    there = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*.gguf"))
    assert there == [
        "adapters/law.gguf",
        "adapters/tales.gguf",
        "models/small-2.gguf",
        "models/small.gguf",
    ]
    assert sorted(str(file.path.relative_to(directory)) for file in written.files) == there
    content = json.loads((directory / "config.json").read_text())
    small = {"model": "models/small.gguf", "prompt": "chat", "llama_cpp": {}}
    assert content == {
        "model_type": "proxytune",
        "architectures": ["ProxyTunedForCausalLM"],
        # The base is the same directory from the new place, and runs as it did.
        "base": {"model": "../../base", "dtype": "float32"},
        "experts": [
            {
                "name": "law",
                "anti_expert": small,
                "expert": {"adapter": "adapters/law.gguf"},
                "alpha": 0.5,
            },
            {
                "name": "tales",
                "anti_expert": small,
                "expert": {"adapter": "adapters/tales.gguf", "prompt": "chat"},
                "alpha": 1.0,
            },
            {
                "name": "own",
                "anti_expert": small,
                "expert": {"model": "models/small-2.gguf", "llama_cpp": {}},
                "alpha": 1.0,
            },
            {"name": "bare", "anti_expert": {"same_as": "base"}, "expert": small, "alpha": 1.0},
        ],
        "combine": "sum",
        "default_expert": "law",
        "auto_map": AUTO_MAP,
    }
    assert "models/small.gguf" in (directory / "README.md").read_text()
    torch.testing.assert_close(
        logits(directory / "models/small-2.gguf"),
        logits(recipe.directory / "tuned/small"),
        rtol=0,
        atol=0.3,  # 8 bits; the logits have a standard deviation of 1.7
    )
    others = logits(directory / "models/small.gguf") - logits(directory / "models/small-2.gguf")
    assert others.std() > 1


def test_a_gguf_base_is_run_by_llama_cpp_and_gguf_models_stay_where_they_are(recipe, tmp_path):
    from dataclasses import replace

    tiny_gguf(tmp_path / "base.gguf")
    tiny_gguf(recipe.directory / "tiny.gguf")
    expert = ExpertSpec("own", ModelSpec(model="small"), ModelSpec(model="tiny.gguf"))
    changed = replace(
        recipe,
        base=ModelSpec(model="../base.gguf", prompt="chat", dtype="bfloat16"),
        experts=(expert,),
        default_expert=None,
    )
    written = export_recipe(changed, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["base"] == {"model": "../base.gguf", "prompt": "chat", "llama_cpp": {}}
    assert content["experts"][0]["anti_expert"] == {
        "model": "../recipe/tiny.gguf",
        "llama_cpp": {},
    }
    assert [file.path.name for file in written.files] == ["small.gguf"]


def test_another_recipe_is_kept_unless_it_is_to_be_replaced(recipe, tmp_path):
    from dataclasses import replace

    export_recipe(recipe, tmp_path / "out")
    export_recipe(recipe, tmp_path / "out")  # the same one
    other = replace(recipe, default_expert="own")
    with pytest.raises(RecipeError, match="another recipe"):
        export_recipe(other, tmp_path / "out")
    export_recipe(other, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["default_expert"] == "own"
    with pytest.raises(RecipeError, match='"llama"'):
        export_recipe(recipe, tmp_path / "base", overwrite=True)
    with pytest.raises(RecipeError, match="that is to be exported"):
        export_recipe(recipe, recipe.directory, overwrite=True)


def test_a_recipe_with_a_model_that_cannot_be_written_leaves_nothing(recipe, tmp_path):
    from dataclasses import replace

    tiny_model(recipe.directory / "gpt2", "gpt2")
    expert = ExpertSpec("odd", ModelSpec(model="small"), ModelSpec(model="gpt2"))
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel"):
        export_recipe(replace(recipe, experts=(*recipe.experts, expert)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The command


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, ["export-gguf", *map(str, arguments)])


def test_the_command_prints_the_path_and_says_what_it_wrote(recipe, tmp_path):
    small = recipe.directory / "small"
    done = run(small, tmp_path / "small.gguf", "--dtype", "q8_0")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'small.gguf'}\n"
    assert "MB, 21 tensors" in done.stderr
    adapter = recipe.directory / "adapters" / "law"
    done = run(small, tmp_path / "law.gguf", "--adapter", adapter)
    assert done.stdout == f"{tmp_path / 'law.gguf'}\n"
    assert contents(tmp_path / "law.gguf")[0]["general.type"] == "adapter"
    done = run(small, tmp_path / "merged.gguf", "--adapter", adapter, "--merge", "--dtype", "F32")
    assert done.exit_code == 0, done.output
    torch.testing.assert_close(
        logits(tmp_path / "merged.gguf"), logits(small, adapter), rtol=0, atol=1e-4
    )


def test_the_command_writes_a_recipe_to_a_directory(recipe, tmp_path):
    recipe.write(recipe.directory)
    done = run(recipe.directory, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'out'}\n"
    for name in ("models/small.gguf", "adapters/tales.gguf", "config.json"):
        assert str(tmp_path / "out" / name) in done.stderr
        assert (tmp_path / "out" / name).is_file()


def test_a_users_mistake_ends_with_code_2_and_a_message(recipe, tmp_path):
    recipe.write(recipe.directory)
    small, out = recipe.directory / "small", tmp_path / "out.gguf"
    adapter = recipe.directory / "adapters" / "law"
    for arguments, words in (
        ((small, out, "--merge"), "--merge is given without --adapter"),
        ((small, out, "--adapter", adapter, "--pre", "gpt-2"), "holds no tokenizer"),
        ((recipe.directory, out, "--adapter", adapter), "is a recipe"),
        ((small, out, "--dtype", "Q5_K"), "'Q5_K'"),
        ((small, tmp_path / "out"), "must end in .gguf"),
        ((tmp_path / "nowhere" / "at" / "all", out), "no directory at"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert not done.stdout
        assert not out.exists()
    run(small, out)
    done = run(small, out, "--dtype", "F32")
    assert done.exit_code == 2
    assert "--force" in done.stderr
    assert run(small, out, "--dtype", "F32", "--force").exit_code == 0


def test_a_reference_tells_whether_it_is_a_recipe(recipe, tmp_path):
    recipe.write(recipe.directory)
    assert holds_recipe("recipe", root=tmp_path)
    assert holds_recipe(SMOL, root=tmp_path)
    assert not holds_recipe("recipe/small", root=tmp_path)
    assert not holds_recipe("recipe/adapters/law", root=tmp_path)
    assert not holds_recipe(f"{SMOL}/anti-expert", root=tmp_path)
