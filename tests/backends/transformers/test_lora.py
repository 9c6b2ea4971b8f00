"""Rows with LoRA adapters, side by side, against PEFT's own forward of each adapter alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.backends.transformers.lora import (
    PLAIN,
    ROW_ADAPTERS,
    RowAdapters,
    RowModule,
    _Affine,
    _changes,
)
from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.merge import LoadedProduct, ModuleWeights
from proxytune.errors import UnsupportedModel
from proxytune.recipe.spec import ModelSpec
from tests.support.tiny import tiny_model

# PEFT scales the product, here the second factor is scaled; logits are of the order of 10.
CLOSE = {"atol": 3e-5, "rtol": 1e-4}

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "mlp": {"r": 5, "lora_alpha": 3, "target_modules": ["up_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["v_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"layers.0.mlp.down_proj": 9},
    },
    "head": {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]},
}
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10], [11, 12, 13]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("lora")
    directory = tiny_model(root / "small", seed=3)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(root / name, save_embedding_layers=False)
    return directory


def load(small: Path, *names: str, **options: Any) -> TransformersBackend:
    spec = ModelSpec(model=str(small), **{"device": "cpu", **options})
    checkpoint = find_checkpoint(str(small), root=small)
    files = {name: find_adapter(str(small.parent / name), root=small) for name in names}
    return TransformersBackend.load(checkpoint, spec, files)


def by_peft(small: Path, name: str | None, token_ids: list[int]) -> torch.Tensor:
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    if name is not None:
        model = PeftModel.from_pretrained(model, small.parent / name)
    with torch.inference_mode():
        return model.eval()(torch.tensor([token_ids])).logits[0, -1]


@pytest.mark.parametrize(
    "rows",
    [
        ["attention", "mlp", "rslora", "patterns", "head"],
        ["patterns", None, "mlp", None, "patterns"],
        [None, "head", "head", "attention", None],
    ],
)
def test_rows_of_any_adapters_together_are_what_peft_gives_each_alone(small, rows):
    """Ranks, scales and target modules differ, and rows of one adapter lie side by side or apart."""
    backend = load(small, *ADAPTERS)
    assert backend.capabilities.adapters == tuple(ADAPTERS)
    state, logits = backend.prefill(PROMPTS, adapters=rows)
    next_logits = backend.decode(state, torch.tensor([1, 2, 3, 4, 5]))
    for row, (name, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        torch.testing.assert_close(logits[row], by_peft(small, name, prompt), **CLOSE)
        expected = by_peft(small, name, [*prompt, row + 1])
        torch.testing.assert_close(next_logits[row], expected, **CLOSE)


def test_a_plain_row_does_not_depend_on_the_adapters_beside_it(small):
    backend = load(small, *ADAPTERS)
    prompts = [[1, 2, 3]] * 3
    plain = backend.prefill(prompts).logits[1]
    for name in ADAPTERS:
        beside = backend.prefill(prompts, adapters=[name, None, name]).logits
        assert torch.equal(beside[1], plain)
        assert not torch.allclose(beside[0], plain)


def test_pefts_layers_are_replaced_in_a_loaded_model(small):
    adapted = load(small, "attention", "mlp")
    assert not any("lora_A" in name for name, _ in adapted.model.named_parameters())


def test_a_loaded_model_holds_one_copy_of_its_adapters_weights(small):
    plain, adapted = load(small), load(small, "attention", "mlp")

    def size(backend: TransformersBackend) -> int:
        return sum(parameter.numel() for parameter in backend.model.parameters())

    hidden, middle, low = 16, 32, 8  # q_proj is 16 x 16, v_proj 8 x 16
    of_attention = 2 * 2 * ((hidden + hidden) + (hidden + low))  # rank, layers, in and out
    of_mlp = 5 * 2 * 2 * (hidden + middle)
    assert size(adapted) - size(plain) == of_attention + of_mlp


def test_a_model_that_is_handed_over_keeps_pefts_layers(small):
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, small.parent / "mlp", adapter_name="mlp")
    backend = TransformersBackend(peft_model, name="small", adapters=["mlp"])
    assert any(isinstance(module, LoraLayer) for module in peft_model.modules())
    rows = ["mlp", None, "mlp", None, None]
    expected = load(small, "mlp").prefill(PROMPTS, adapters=rows).logits
    torch.testing.assert_close(backend.prefill(PROMPTS, adapters=rows).logits, expected, **CLOSE)


def handed_over(directory: Path, **adapters: dict[str, Any]) -> Any:
    """Return a PEFT model with adapters of random weights, the first of which is active."""
    from peft import LoraConfig, get_peft_model

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, options in adapters.items():
        config = LoraConfig(task_type="CAUSAL_LM", r=2, **options)
        if hasattr(model, "peft_config"):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("lora_", "modules_to_save", "tokens_delta")):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


SAVED: dict[str, dict[str, Any]] = {
    "norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "mlp": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    "embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [2, 6, 9]},
}


@pytest.mark.parametrize("active", ["saving", "other"])
@pytest.mark.parametrize("kind", SAVED)
def test_a_peft_models_saved_modules_are_run_by_row(small, kind, active):
    model = handed_over(small, saving=SAVED[kind], other={"target_modules": ["q_proj", "up_proj"]})
    expected = []
    rows = ["other", "saving", None, "saving", "other"]
    for prompt, name in zip(PROMPTS, rows, strict=True):
        with torch.inference_mode():
            model.set_adapter(name or "other")
            model.base_model.enable_adapter_layers()
            if name is None:
                model.base_model.disable_adapter_layers()
            expected.append(model(input_ids=torch.tensor([prompt])).logits[0, -1])
    model.base_model.enable_adapter_layers()
    model.set_adapter(active)
    backend = TransformersBackend(model, name="small", adapters=["saving", "other"])
    logits = backend.prefill(PROMPTS, adapters=rows).logits
    torch.testing.assert_close(logits, torch.stack(expected), **CLOSE)
    for row, name in enumerate(rows):  # all rows have the same
        alone = backend.prefill([PROMPTS[row]] * 2, adapters=[name] * 2).logits
        torch.testing.assert_close(alone, expected[row].expand(2, -1), **CLOSE)
    assert not torch.allclose(logits[2], backend.prefill([PROMPTS[2]], adapters=["saving"]).logits)


def test_a_saved_module_that_gets_more_than_one_tensor_is_refused_for_rows_that_differ(small):
    options = {"target_modules": ["up_proj"], "modules_to_save": ["self_attn"]}
    backend = TransformersBackend(handed_over(small, own=options), name="small", adapters=["own"])
    assert backend.prefill(PROMPTS[:2], adapters=["own", "own"]).logits.isfinite().all()
    with pytest.raises(UnsupportedModel, match="LlamaAttention, which gets more"):
        backend.prefill(PROMPTS[:2], adapters=["own", None])


def test_bfloat16_models_run_their_adapters_in_bfloat16(small):
    backend = load(small, "attention", dtype="bfloat16")
    assert {p.dtype for p in backend.model.parameters()} == {torch.bfloat16}
    logits = backend.prefill(PROMPTS[:2], adapters=["attention", None]).logits
    assert logits.dtype == torch.bfloat16
    exact = load(small, "attention").prefill(PROMPTS[:2], adapters=["attention", None]).logits
    # bfloat16 keeps 8 significant bits.
    torch.testing.assert_close(logits.float(), exact, atol=0.5, rtol=0.1)


def row_layer(base: nn.Linear, down: list[list[float]], up: list[list[float]]) -> RowModule:
    return RowModule(base, {"a": [_Affine(torch.tensor(down), torch.tensor(up))]})


def test_the_adapters_product_by_hand():
    base = nn.Linear(2, 1, bias=False)
    base.weight.data = torch.tensor([[1.0, 10.0]])
    layer = row_layer(base, [[1.0, 1.0]], [[6.0]])
    token = ROW_ADAPTERS.set(RowAdapters([PLAIN, "a"]))
    try:
        answer = layer(torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]]))
    finally:
        ROW_ADAPTERS.reset(token)
    # 1 + 20, and the same plus 6 * (1 + 2)
    assert answer.flatten().tolist() == [21.0, 39.0]


@pytest.mark.parametrize("num_tokens", [6, 2])
def test_a_layer_that_sees_other_rows_than_the_batchs_is_refused(num_tokens):
    """The experts of a mixture get the tokens of all rows in one list, which does not say whose they are.

    When an expert got as many tokens as the batch has rows, the adapter used to be added to the wrong ones.
    """
    layer = row_layer(nn.Linear(4, 1), [[1.0] * 4], [[1.0]])
    token = ROW_ADAPTERS.set(RowAdapters([PLAIN, "a"]))
    try:
        with pytest.raises(UnsupportedModel, match=f"{num_tokens} rows while the batch has 2"):
            layer(torch.ones(num_tokens, 4))
    finally:
        ROW_ADAPTERS.reset(token)


def test_a_layer_answers_for_its_base_layer():
    base = nn.Linear(4, 3)
    layer = row_layer(base, [[1.0] * 4], [[1.0]] * 3)
    assert layer.weight is base.weight and layer.out_features == 3
    with pytest.raises(AttributeError, match="nonsense"):
        _ = layer.nonsense


class Quantised(nn.Linear):
    """A layer whose weight is stored in eighths, as whole numbers."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.weight = nn.Parameter((8 * weight).to(torch.int8), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ (self.weight.float() / 8).t() + self.bias


def test_dora_on_a_quantised_layer_takes_the_norm_of_what_the_layer_multiplies_by():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-16, 16, (6, 4), generator=generator) / 8
    quantised, plain = Quantised(weight), nn.Linear(4, 6)
    plain.load_state_dict({"weight": weight, "bias": quantised.bias.detach()})
    draw = partial(torch.randn, generator=generator)
    own = ModuleWeights(product=LoadedProduct(draw(2, 4), draw(6, 2), 0.5), magnitude=draw(6).abs())
    input = draw(2, 3, 4)
    token = ROW_ADAPTERS.set(RowAdapters([PLAIN, "a"]))
    try:
        outputs = [
            RowModule(base, {"a": _changes("layer", base, own, torch.float32)})(input)
            for base in (quantised, plain)
        ]
    finally:
        ROW_ADAPTERS.reset(token)
    torch.testing.assert_close(outputs[0], outputs[1], **CLOSE)
    merged = nn.functional.linear(input[1], own.merged("weight", weight), plain.bias)
    torch.testing.assert_close(outputs[1][1], merged, **CLOSE)
    torch.testing.assert_close(outputs[1][0], plain(input[0]), **CLOSE)


def test_a_quantised_layer_that_an_adapter_replaces_is_refused():
    own = ModuleWeights(parameters={"weight": torch.zeros(6, 4)})
    with pytest.raises(UnsupportedModel, match="replaces weights of layer, which is quantised"):
        _changes("layer", Quantised(torch.zeros(6, 4)), own, torch.float32)
