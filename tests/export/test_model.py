"""A model as GGUF reads back as the same model, and what cannot be written is refused."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.errors import CorruptModel, InvalidRequest, UnsafeModel, UnsupportedModel
from proxytune.export.model import export_model
from tests.support.gguf import contents, export, llama, logits
from tests.support.tiny import NUM_TOKENS, tiny_gguf, tiny_model, tiny_tokenizer

SMOL = "package:proxytune/smol"


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
    assert fields["llama.context_length"] == 4 * 128
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


SCALED = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_angles_read_back_with_the_same_logits(tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    longest = 1 << 14
    small = llama(tmp_path / "small", rope_parameters=rope, max_position_embeddings=longest)
    unscaled = {"rope_type": "default", "rope_theta": 10000.0}
    plain = llama(tmp_path / "plain", rope_parameters=unscaled, max_position_embeddings=longest)
    written = export(small, tmp_path / "small.gguf", dtype="F32")
    assert (logits(small) - logits(plain)).abs().max() > 1e-3
    torch.testing.assert_close(logits(written.path), logits(small), rtol=0, atol=1e-5)
    found = find_checkpoint(str(written.path), root=tmp_path)
    found.check_buildable()
    assert found.config.rope_parameters == rope


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
