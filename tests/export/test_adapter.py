"""A LoRA adapter as GGUF adds what PEFT adds, and what cannot be written is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.errors import AdapterMismatch, InvalidRequest, UnsupportedModel
from proxytune.export.adapter import export_adapter
from tests.support.gguf import contents, export, llama, logits, lora
from tests.support.tiny import tiny_adapter, tiny_gguf


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
        ("lora_bias", {"lora_bias": True, "target_modules": ["q_proj"]}),
        ("modules_to_save", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
        ("factors of an embedding", {"target_modules": ["embed_tokens"]}),
        ("trainable_token_indices", {"trainable_token_indices": [3]}),
    ):
        other = lora(small, tmp_path / name.replace(" ", "_"), **settings)
        with pytest.raises(UnsupportedModel, match=rf"(?s){name}.*--merge"):
            exported_adapter(small, other, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_an_adapter_on_a_head_is_written_if_the_head_is_not_tied(tmp_path):
    small = llama(tmp_path / "small")
    adapter = lora(small, tmp_path / "adapter", target_modules=["lm_head"])
    _, tensors = exported_adapter(small, adapter, tmp_path / "adapter.gguf")
    assert sorted(tensors) == ["output.weight.lora_a", "output.weight.lora_b"]
    tied = llama(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UnsupportedModel, match="its embedding, too"):
        exported_adapter(tied, adapter, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["norm", "lm_head"], "target_modules": ["q_proj"]},
        {"trainable_token_indices": [3, 5], "target_modules": ["q_proj"]},
    ],
    ids=["dora", "embedding", "saved", "tokens"],
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_what_is_no_gguf_adapter_is_merged_into_its_model(tmp_path, settings, is_tied):
    small = llama(tmp_path / "small", tie_word_embeddings=is_tied)
    directory = lora(small, tmp_path / "adapter", **settings)
    adapter = find_adapter(str(directory), root=tmp_path)
    if is_tied and "lm_head" in str(settings):
        with pytest.raises(UnsupportedModel, match="a GGUF file holds one weight for both"):
            export(small, tmp_path / "merged.gguf", dtype="F32", adapter=adapter)
        return
    merged = export(small, tmp_path / "merged.gguf", dtype="F32", adapter=adapter)
    torch.testing.assert_close(logits(merged.path), logits(small, directory), rtol=0, atol=1e-4)


def test_an_adapter_on_a_gguf_model_is_written(tmp_path):
    tiny_gguf(tmp_path / "tiny.gguf")
    model = find_checkpoint("tiny.gguf", root=tmp_path)
    adapter = tiny_adapter(model.weights_path(), tmp_path / "adapter")
    written = export_adapter(
        find_adapter(str(adapter), root=tmp_path), model, tmp_path / "adapter.gguf"
    )
    assert written.num_tensors == 8
