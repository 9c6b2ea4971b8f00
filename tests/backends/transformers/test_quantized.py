"""Quantised models on a CPU: the identities of exactness, within what the quantiser made of the weights.

Needs torchao and bitsandbytes: `make test-quantized` installs them into an environment of its own.
torchao's weight-only quantisers leave activations alone, so two paths part only at a tie of 1e-3, as without
them; no test here meets one. bitsandbytes rounds activations: to bfloat16 for some numbers of rows with 4
bits, where the processor multiplies that, and to 8 bits with 8. There a difference of 1e-6 can grow to a step
of that rounding (benchmarks/quantized.py measures 0.06 and 0.2).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("torchao", reason="needs torchao; `make test-quantized` installs it")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes; `make test-quantized` installs it")

from proxytune.backends.transformers.quantized import (
    is_quantised,
    quantization_config,
    try_quantization,
)
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.decode.speculative import Drafting
from proxytune.errors import UnsupportedModel
from proxytune.loading.doctor import examine
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.trace import Trace
from tests.support.tiny import tiny_adapter, tiny_model

INT8 = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
INT4 = {"quant_method": "torchao", "quant_type": "PrototypeInt4WeightOnlyConfig", "group_size": 32}
INT4_UNPACKED = {
    "quant_method": "torchao",
    "quant_type": "IntxWeightOnlyConfig",
    "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
    "granularity": {"_type": "PerGroup", "_data": {"group_size": 32}},
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# With a threshold, bitsandbytes looks for outliers in all rows of a batch together.
EIGHT_BITS = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
KINDS = {
    "int8": INT8,
    "int4": INT4,
    "int4-unpacked": INT4_UNPACKED,
    "nf4": NF4,
    "bnb-8bit": EIGHT_BITS,
}

PROMPTS = ("the", "in the end there was", "Zoë 🙂", "an otter ran into the rain again")
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=2, temperature=0.9, seed=5)
TIE = {"int8": 1e-3, "int4": 1e-3, "int4-unpacked": 1e-3, "nf4": 0.1, "bnb-8bit": 0.5}
"""How far apart two candidates may be, in nats, where two paths part. The logits reach 15."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    # bitsandbytes packs blocks of 64 values.
    tiny_model(root / "base", seed=1, hidden_size=128)
    tiny_model(root / "small", "qwen2", seed=2, hidden_size=64)
    tiny_model(root / "tuned", "qwen2", seed=3, hidden_size=64)
    tiny_adapter(root / "small", root / "adapter", seed=4)
    return root


def recipe_of(root: Path, quantization: dict[str, Any], **settings: Any) -> Recipe:
    def spec(model: str, adapter: str | None = None) -> ModelSpec:
        return ModelSpec(
            model=model, adapter=adapter, device="cpu", quantization=quantization, **settings
        )

    return Recipe(
        base=spec("base"),
        experts=(
            ExpertSpec("full", spec("tuned"), spec("small"), alpha=0.7),
            ExpertSpec("lora", spec("small", "adapter"), spec("small")),
            ExpertSpec("same", spec("small"), spec("small")),
        ),
        directory=root,
    )


@pytest.fixture(scope="module")
def models(root) -> dict[str, ProxyTuned]:
    return {name: ProxyTuned.load(recipe_of(root, kind)) for name, kind in KINDS.items()}


def loaded(path: Path, quantization: dict[str, Any] | None) -> Any:
    """Return a model as transformers alone loads it."""
    config = None if quantization is None else quantization_config(quantization, "the test")
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config
    ).eval()


def continued(model: Any, ids: list[int], **options: Any) -> tuple[int, ...]:
    """Return the tokens that transformers' own `generate` appends."""
    prompt = torch.tensor([ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=GREEDY.max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return tuple(output[0, len(ids) :].tolist())


def agree(one: Trace, other: Trace, tie: float) -> bool:
    """Whether two texts are the same; False if they part where both paths' two best are close."""
    for a, b in zip(one.steps, other.steps, strict=True):
        if a.token_id != b.token_id:
            assert all(step.top[0][1] - step.top[1][1] < tie for step in (a, b)), (a, b)
            return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_what_transformers_generates_with_the_same_quantisation(models, root, kind):
    model, base = models[kind], loaded(root / "base", KINDS[kind])
    assert is_quantised(base)
    for prompt in PROMPTS:
        expected = continued(base, model.tokenizer.encode(prompt))
        assert model.generate(prompt, GREEDY, alpha=0.0).token_ids == expected
        assert model.generate(prompt, GREEDY, alpha=1.0, experts="same").token_ids == expected


@pytest.mark.parametrize(
    ("kind", "sampling"),
    # A drawn token says nothing about how close another was, so only greedy texts show what rounding does.
    [*((kind, "greedy") for kind in KINDS), *((kind, "sampled") for kind in ("int8", "int4"))],
)
def test_batches_and_drafts_change_nothing_but_ties(models, kind, sampling):
    sampling = {"greedy": GREEDY, "sampled": SAMPLED}[sampling]
    experts = ["lora", "full", ("lora", "full"), "full"]
    requests = [
        Request(prompt, sampling, 0.8, names)
        for prompt, names in zip(PROMPTS, experts, strict=True)
    ]
    model = models[kind]
    alone = [model.generate(request) for request in requests]
    parted = 0
    for options in (
        {"batch_size": 4},
        {"batch_size": 3, "speculative": Drafting(3, "expert", is_adaptive=False)},
        {"batch_size": 1, "speculative": Drafting(3, "lookup", is_adaptive=False)},
    ):
        together = model.generate_batch(requests, **options)
        pairs = zip(alone, together, strict=True)
        parted += [agree(one, other, TIE[kind]) for one, other in pairs].count(False)
    assert parted <= (1 if kind in ("nf4", "bnb-8bit") else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_a_quantised_model_are_those_of_peft(models, root, kind):
    from peft import PeftModel

    small = loaded(root / "small", KINDS[kind])
    backend = models[kind].ensemble.members[-1].backend
    lora = next(m for m in models[kind].ensemble.members if m.adapter is not None)
    rows = [[1, 2, 3, 40], [5, 6], [7, 8, 9]]
    names = [lora.adapter, None, lora.adapter]
    found = lora.backend.prefill(rows, adapters=names).logits
    assert backend.model is not small
    tuned = PeftModel.from_pretrained(small, root / "adapter", autocast_adapter_dtype=False).eval()
    for row, name, logits in zip(rows, names, found, strict=True):
        with torch.inference_mode():
            if name is None:
                with tuned.disable_adapter():
                    expected = tuned(torch.tensor([row])).logits[0, -1]
            else:
                expected = tuned(torch.tensor([row])).logits[0, -1]
        # With 8-bit activations, the kernel's step is as large as the tolerance.
        torch.testing.assert_close(logits, expected, atol=TIE[kind], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_doctor_knows_the_memory_of_quantised_weights(root, kind, dtype):
    from proxytune.backends.transformers.quantized import _num_bytes

    recipe = recipe_of(root, KINDS[kind], dtype=dtype)
    diagnosis = examine(recipe)
    assert diagnosis.is_healthy
    backend = ProxyTuned.load(recipe).ensemble.members[0].backend
    backend.prefill([[1, 2, 3]])  # bitsandbytes lays weights out anew at the first forward
    model = backend.model
    needed = sum(_num_bytes(parameter) for parameter in model.parameters())
    assert diagnosis.models[0].weight_bytes == needed
    element = {"float32": 4, "bfloat16": 2}[dtype]
    assert needed < 0.7 * element * diagnosis.models[0].num_parameters


def test_doctor_says_that_rows_depend_on_each_other_where_outliers_are_sought(root):
    for kind, count in ((EIGHT_BITS, 0), ({"load_in_8bit": True}, 3), (NF4, 0)):
        notes = [
            note for note in examine(recipe_of(root, kind)).notes if "llm_int8_threshold" in note
        ]
        assert len(notes) == count


# What cannot be run ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it")
def test_a_quantiser_that_needs_a_gpu_is_refused_by_doctor_and_when_it_is_loaded(root):
    kind = {"quant_method": "torchao", "quant_type": "Int4WeightOnlyConfig", "group_size": 32}
    recipe = recipe_of(root, kind)
    problems = examine(recipe).problems
    assert problems[0].where == "base"
    assert "mslk" in str(problems[0].error)
    with pytest.raises(
        UnsupportedModel, match=r"gate_proj \(128 inputs\) of base cannot be quantised"
    ):
        ProxyTuned.load(recipe)


def test_layers_that_a_quantiser_would_leave_as_they_are_are_named(root):
    with pytest.raises(UnsupportedModel, match=r"leaves .* \(64 inputs\).*\n.*group_size"):
        try_quantization(
            find_checkpoint("small", root=root),
            {**INT4, "group_size": 128},
            dtype="float32",
            device="cpu",
        )


def test_a_model_without_layers_of_the_quantisers_kind_is_refused(tmp_path, root):
    """GPT-2's layers are of another class, which torchao passes over without a word."""
    tiny_model(tmp_path / "base", "gpt2", hidden_size=64)
    spec = ModelSpec(model="base", device="cpu", quantization=INT8)
    recipe = Recipe(base=spec, experts=(ExpertSpec("a", spec, spec),), directory=tmp_path)
    with pytest.raises(UnsupportedModel, match=r"GPT2LMHeadModel.*nothing would be quantised"):
        ProxyTuned.load(recipe)


def test_values_that_torchao_refuses_are_named(root):
    checkpoint = find_checkpoint("small", root=root)
    for change, why in (
        ({"weight_dtype": "int4"}, "weight_dtype must be torch.intx"),
        ({"granularity": {"_type": "PerGroups", "_data": {}}}, "PerGroups"),
        ({"quant_type": "Int3Config"}, "quant_type 'Int3Config'.*PrototypeInt4WeightOnlyConfig"),
        ({"group_sizes": 3}, "'group_sizes'"),
    ):
        with pytest.raises(UnsupportedModel, match=why):
            quantization_config({**INT4_UNPACKED, **change}, checkpoint.name)


# Stored in quantised form ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "nf4", "bnb-8bit"])
def test_a_model_stored_in_quantised_form_runs_as_it_is(models, root, tmp_path, kind):
    for name in ("base", "small", "tuned"):
        loaded(root / name, KINDS[kind]).save_pretrained(tmp_path / name)
        for file in (root / name).glob("*token*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    spec = {name: ModelSpec(model=name, device="cpu") for name in ("base", "small", "tuned")}
    recipe = Recipe(
        base=spec["base"],
        experts=(ExpertSpec("full", spec["tuned"], spec["small"], alpha=0.7),),
        directory=tmp_path,
    )
    report = examine(recipe)
    assert report.is_healthy, report.problems
    assert report.models[0].weight_bytes < 0.5 * 4 * report.models[0].num_parameters
    stored = ProxyTuned.load(recipe)
    for prompt in PROMPTS:
        expected = models[kind].generate(prompt, GREEDY, experts="full").token_ids
        assert stored.generate(prompt, GREEDY).token_ids == expected
    again = ModelSpec(model="base", device="cpu", quantization=INT8)
    with pytest.raises(
        UnsupportedModel, match=r"stored in quantised form.*\n.*leave its quantization"
    ):
        ProxyTuned.load(Recipe(base=again, experts=recipe.experts, directory=tmp_path))
