"""Models stored in quantised form: run, or refused for the reason that holds on this machine."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from proxytune.backends.transformers import quantized
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.errors import MissingExtra, UnsupportedModel
from proxytune.loading.doctor import examine
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import SamplingParams
from tests.support.tiny import tiny_model, tiny_tokenizer

GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)


def with_settings(directory: Path, settings: dict) -> Path:
    """Write into a tiny model's config that its weights are quantised."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    return directory


def recipe_of(root: Path, base: str = "base") -> Recipe:
    small = ModelSpec(model="small", device="cpu")
    return Recipe(
        base=ModelSpec(model=base, device="cpu"),
        experts=(ExpertSpec("one", small, small),),
        directory=root,
    )


@pytest.fixture
def root(tmp_path) -> Path:
    tiny_model(tmp_path / "base", seed=1, hidden_size=128)
    tiny_model(tmp_path / "small", seed=2)
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"\(gptq\).*(optimum|gptqmodel)"),
        ({"quant_method": "awq", "bits": 4}, r"\(awq\).*gptqmodel"),
        ({"quant_method": "compressed-tensors"}, r"\(compressed-tensors\).*compressed.tensors"),
        ({"quant_method": "eetq"}, r"\(eetq\)"),
        (
            {"quant_method": "of-tomorrow"},
            r"\(of-tomorrow\), which the installed transformers does",
        ),
        ({"bits": 4}, r"\(None\), which the installed transformers does not know"),
    ],
)
def test_a_method_that_does_not_run_here_is_refused_before_any_weight_is_read(root, settings, why):
    with_settings(root / "base", settings)
    (problem,) = examine(recipe_of(root)).problems
    assert problem.where == "base"
    with pytest.raises(UnsupportedModel, match=why) as caught:
        raise problem.error
    assert "hint: name a copy of the model that is not quantised" in str(caught.value)
    with pytest.raises(UnsupportedModel, match=why):
        ProxyTuned.load(recipe_of(root))


def test_a_package_that_is_missing_gives_its_install_line(root, monkeypatch):
    for settings in ({"quant_method": "torchao"}, {"load_in_4bit": True}):
        with_settings(root / "base", settings)
        for package in ("torchao", "bitsandbytes"):
            monkeypatch.setitem(sys.modules, package, None)
        (problem,) = examine(recipe_of(root)).problems
        with pytest.raises(MissingExtra, match=r"pip install .*\[quantize\]'"):
            raise problem.error


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it as it is")
def test_fp8_is_unpacked_on_a_cpu_and_counted_so(root):
    """Blocks of 128 by 128 in float8, with a scale each, as fine-grained fp8 checkpoints have them."""
    tensors = load_file(root / "base" / "model.safetensors")
    unpacked, packed = {}, {}
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            packed[name] = unpacked[name] = weight.to(torch.bfloat16)
            continue
        scales = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
        small = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scales[i, j] = weight[block].abs().max() / 448
                small[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
                weight[block] = small[block].float() * scales[i, j]
        packed[name], packed[f"{name}_scale_inv"] = small, scales
        unpacked[name] = weight.to(torch.bfloat16)
    tiny_model(root / "plain", seed=1, hidden_size=128)
    save_file(unpacked, root / "plain" / "model.safetensors", {"format": "pt"})
    save_file(packed, root / "base" / "model.safetensors", {"format": "pt"})
    settings = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    with_settings(root / "base", settings)
    report = examine(recipe_of(root))
    assert report.is_healthy
    assert report.models[0].weight_bytes == 4 * report.models[0].num_parameters
    assert [note for note in report.notes if "(fp8), and are unpacked here" in note]
    stored, plain = (ProxyTuned.load(recipe_of(root, name)) for name in ("base", "plain"))
    for prompt in ("the", "in the end there was"):
        expected = plain.generate(prompt, GREEDY).token_ids
        assert stored.generate(prompt, GREEDY).token_ids == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it as it is")
def test_the_mxfp4_experts_of_gpt_oss_are_unpacked_on_a_cpu(tmp_path, capfd):
    """Blocks of 32 values of 4 bits, two in a byte, each block with an exponent."""
    tiny_model(tmp_path / "small", seed=2)
    plain = tiny_gpt_oss(tmp_path / "plain")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    generator = torch.Generator().manual_seed(1)
    unpacked = load_file(plain / "model.safetensors")
    packed = dict(unpacked)
    for name, weight in unpacked.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        num_experts, num_inputs, num_outputs = weight.shape
        shape = num_experts, num_outputs, num_inputs // 32
        codes = torch.randint(0, 16, (*shape, 32), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
        packed[f"{name}_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
        packed[f"{name}_scales"] = exponents
        del packed[name]
        whole = values[codes.long()] * torch.exp2(exponents.float() - 127)[..., None]
        unpacked[name] = whole.flatten(2).transpose(1, 2).contiguous().to(weight.dtype)
    shutil.copytree(plain, tmp_path / "base")
    save_file(unpacked, plain / "model.safetensors", {"format": "pt"})
    save_file(packed, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    kept = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    with_settings(tmp_path / "base", {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    report = examine(recipe_of(tmp_path))
    assert report.is_healthy
    assert report.models[0].weight_bytes == 4 * report.models[0].num_parameters
    stored, whole = (ProxyTuned.load(recipe_of(tmp_path, name)) for name in ("base", "plain"))
    for prompt in ("the", "in the end there was"):
        expected = whole.generate(prompt, GREEDY).token_ids
        assert stored.generate(prompt, GREEDY).token_ids == expected
    assert "Triton" not in capfd.readouterr().err


def tiny_gpt_oss(directory: Path) -> Path:
    from transformers import GptOssConfig, GptOssForCausalLM

    tokenizer = tiny_tokenizer()
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        sliding_window=16,
        initializer_range=0.3,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GptOssForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_the_first_layer_with_the_most_outputs_is_tried_for_each_number_of_inputs(
    root, monkeypatch
):
    tried = []

    def of_16_bits(config, shape, dtype, device, layer, name):
        tried.append((layer, shape))
        return 16.0

    monkeypatch.setattr(quantized, "_tried", of_16_bits)
    monkeypatch.setattr(quantized, "quantization_config", lambda quantization, name: None)
    checkpoint = find_checkpoint("small", root=root)
    num_bytes = quantized.try_quantization(checkpoint, {}, dtype="float16", device="cpu")
    shapes = checkpoint.linear_shapes
    up, down = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj")
    assert tried == [(up, shapes[up]), (down, shapes[down])]
    assert num_bytes == 2 * checkpoint.num_parameters
