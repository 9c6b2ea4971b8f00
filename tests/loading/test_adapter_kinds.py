"""Adapters of every kind that PEFT makes, in a recipe, against PEFT itself.

Each is made by PEFT on a tiny model, with random weights. The recipe's base is the small model, so the text
steered by an expert at strength 1 is the expert's own. Rows with the adapter, with another one and without
any are in one batch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.backends.transformers.lora import put_rows_on
from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.merge import merge_into, read_adapter
from proxytune.errors import AdapterMismatch, UnsupportedModel
from proxytune.integrations.vllm.weights import merge
from proxytune.loading.doctor import examine
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ModelSpec
from proxytune.request import Request, SamplingParams
from tests.support.tiny import NUM_TOKENS, tiny_config, tiny_model, tiny_tokenizer

TOKENS = [72, 101, 250, 3, 9, 263, 80]
TEXT = "The rain"
NUM_NEW = 6

# PEFT scales the product and here the second factor is scaled; logits are of the order of 10.
CLOSE = {"atol": 1e-4, "rtol": 0}

BOTH = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Args:
        options: Of PEFT's `LoraConfig`.
        model: The small model; see `small`.
        num_rows: Rows to which the embeddings are resized before the adapter is made.
        is_merged: Whether it gets a copy of the small model.
        save: Options of PEFT's `save_pretrained`.
    """

    options: Mapping[str, Any]
    model: str = "llama"
    num_rows: int | None = None
    is_merged: bool = False
    save: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "attention": Kind({"target_modules": BOTH}),
    "all-linear": Kind({"target_modules": "all-linear"}),
    "rslora": Kind({"target_modules": BOTH, "use_rslora": True, "r": 4}),
    "patterns": Kind(
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {"layers.0.mlp.down_proj": 9},
        }
    ),
    "some layers": Kind({"target_modules": BOTH, "layers_to_transform": [1]}),
    "fan_in_fan_out": Kind({"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, "gpt2"),
    "head": Kind({"target_modules": ["q_proj", "lm_head"]}),
    "tied head": Kind({"target_modules": ["q_proj", "lm_head"]}, "tied"),
    "embedding": Kind({"target_modules": ["embed_tokens", "v_proj"]}),
    "tied embedding": Kind({"target_modules": ["embed_tokens", "v_proj"]}, "tied"),
    "ensured tie": Kind(
        {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True}, "tied"
    ),
    "scaled embedding": Kind({"target_modules": ["embed_tokens", "q_proj"]}, "gemma3"),
    "saved head": Kind({"target_modules": BOTH, "modules_to_save": ["lm_head"]}),
    "saved embedding and head": Kind(
        {"target_modules": BOTH, "modules_to_save": ["embed_tokens", "lm_head", "score"]}
    ),
    "saved tied embedding": Kind(
        {"target_modules": BOTH, "modules_to_save": ["embed_tokens"]}, "tied"
    ),
    "saved ensured tie": Kind(
        {
            "target_modules": BOTH,
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        "tied",
    ),
    "saved norms": Kind({"target_modules": BOTH, "modules_to_save": ["norm", "input_layernorm"]}),
    "saved layer": Kind({"target_modules": BOTH, "modules_to_save": ["mlp"]}),
    "dora": Kind({"target_modules": [*BOTH, "up_proj"], "use_dora": True}),
    "dora with biases": Kind({"target_modules": BOTH, "use_dora": True}, "qwen2"),
    "dora of embedding and head": Kind(
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}
    ),
    "dora transposed": Kind(
        {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}, "gpt2"
    ),
    "tokens": Kind({"target_modules": BOTH, "trainable_token_indices": [3, 9, 263]}),
    "tokens of the tied head": Kind(
        {"target_modules": BOTH, "trainable_token_indices": [3, 9, 263]}, "tied"
    ),
    "tokens of embedding and head": Kind(
        {
            "target_modules": BOTH,
            "trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [5, 6, 9]},
        }
    ),
    "scaled tokens": Kind(
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]}, "gemma3"
    ),
    "lora_bias": Kind({"target_modules": ["q_proj", "lm_head"], "lora_bias": True}),
    "biases of LoRA layers": Kind(
        {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}, "gpt2"
    ),
    "all biases": Kind(
        {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}, "gpt2"
    ),
    "more tokens": Kind({"target_modules": BOTH}, num_rows=NUM_TOKENS + 3),
    "fewer padding rows": Kind({"target_modules": BOTH}, "padded", num_rows=NUM_TOKENS + 1),
    "more tied tokens, trained": Kind(
        {"target_modules": BOTH, "trainable_token_indices": [9, NUM_TOKENS + 1]},
        "tied",
        num_rows=NUM_TOKENS + 3,
    ),
    "more tokens, saved": Kind(
        {"target_modules": BOTH, "modules_to_save": ["embed_tokens", "lm_head"]},
        num_rows=NUM_TOKENS + 3,
    ),
    "more tokens, embedding and head": Kind(
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
        num_rows=NUM_TOKENS + 3,
    ),
    "more tokens, without their rows": Kind(
        {"target_modules": ["embed_tokens", "lm_head"]},
        num_rows=NUM_TOKENS + 3,
        save={"save_embedding_layers": False},
    ),
    "experts": Kind(
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 3},
        },
        "mixtral",
        is_merged=True,
    ),
    "router": Kind(
        {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}, "mixtral", is_merged=True
    ),
    "flattened layers": Kind({"target_modules": ["q_proj", "fc1"]}, "opt", is_merged=True),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@cache
def small(root: Path, name: str) -> Path:
    """Write a tiny model and return its directory."""
    directory = root / name
    if name in ("llama", "gpt2", "qwen2"):
        return tiny_model(directory, name)  # type: ignore[arg-type]
    if name == "padded":
        return tiny_model(directory, width=NUM_TOKENS + 6)
    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": NUM_TOKENS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    if name == "tied":
        config = tiny_config(eos_token_id=tokenizer.eos_token_id)
        config.tie_word_embeddings = True
    elif name == "gemma3":
        config = transformers.Gemma3TextConfig(
            **sizes, intermediate_size=32, num_key_value_heads=2, head_dim=8, sliding_window=64
        )
    elif name == "mixtral":
        config = transformers.MixtralConfig(
            **sizes, intermediate_size=24, num_key_value_heads=2, num_local_experts=4
        )
    else:
        config = transformers.OPTConfig(
            **sizes, ffn_dim=32, word_embed_proj_dim=16, init_std=0.3, dropout=0.0
        )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def plain_model(directory: Path, num_rows: int | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if num_rows is not None:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model.resize_token_embeddings(num_rows, mean_resizing=False)
    return model.eval()


@cache
def made(root: Path, name: str) -> tuple[Path, Any]:
    """Make an adapter with PEFT; return its directory and PEFT's model with it."""
    from peft import LoraConfig, get_peft_model

    kind = KINDS[name]
    model = plain_model(small(root, kind.model), kind.num_rows)
    options = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **kind.options}
    adapted = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "lora_" in key and "magnitude" not in key:
                    parameter.copy_(0.4 * noise)
                else:
                    parameter.add_(0.2 * noise)
    directory = root / name.replace(" ", "_")
    adapted.save_pretrained(directory, **kind.save)
    return directory, adapted.eval()


def recipe_of(root: Path, *names: str) -> Recipe:
    model = str(small(root, KINDS[names[0]].model))
    return Recipe.from_dict(
        {
            "model_type": "proxytune",
            "base": {"model": model},
            "experts": [
                {
                    "name": f"e{index}",
                    "anti_expert": {"model": model},
                    "expert": {"adapter": str(made(root, name)[0])},
                }
                for index, name in enumerate(names)
            ],
        },
        directory=root,
    )


def other_on(model: str) -> str:
    """Return a plain adapter on the same model, for the rows beside."""
    return next(name for name, kind in KINDS.items() if kind.model == model and not kind.is_merged)


@torch.inference_mode()
def greedy(model: Any, token_ids: list[int]) -> list[int]:
    """Decode by the model's own forwards, without a cache, among the tokens of the small model."""
    read = list(token_ids)
    for _ in range(NUM_NEW):
        logits = model(torch.tensor([read]), use_cache=False).logits[0, -1, :NUM_TOKENS]
        read.append(int(logits.argmax()))
    return read[len(token_ids) :]


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_gives_the_logits_and_tokens_that_peft_gives(root, name):
    kind = KINDS[name]
    beside = other_on(kind.model) if kind.model != "mixtral" and kind.model != "opt" else name
    recipe = recipe_of(root, name, beside)
    assert examine(recipe).problems == ()
    model = ProxyTuned.load(recipe)
    ensemble = model.ensemble
    peft, other, plain = (
        made(root, name)[1],
        made(root, beside)[1],
        plain_model(small(root, kind.model)),
    )
    expert, anti_expert = (
        ensemble.members[i] for i in (ensemble.pairs[0].expert, ensemble.pairs[0].anti_expert)
    )
    assert (expert.backend is not anti_expert.backend) == kind.is_merged
    rows = [
        None,
        expert.adapter,
        ensemble.members[ensemble.pairs[1].expert].adapter,
        expert.adapter,
    ]
    if not kind.is_merged:
        assert expert.adapter is not None
        state, logits = expert.backend.prefill(
            [TOKENS, TOKENS, TOKENS[2:], TOKENS[1:]], adapters=rows
        )
        after = expert.backend.decode(state, torch.tensor([1, 2, 3, 4]))
        wanted = [
            (plain, TOKENS, 1),
            (peft, TOKENS, 2),
            (other, TOKENS[2:], 3),
            (peft, TOKENS[1:], 4),
        ]
        for row, (reference, read, token_id) in enumerate(wanted):
            with torch.inference_mode():
                expected = reference(torch.tensor([[*read, token_id]])).logits[0, -2:, :NUM_TOKENS]
            torch.testing.assert_close(logits[row, :NUM_TOKENS], expected[0], **CLOSE)
            torch.testing.assert_close(after[row, :NUM_TOKENS], expected[1], **CLOSE)
    else:
        _, logits = expert.backend.prefill([TOKENS])
        with torch.inference_mode():
            expected = peft(torch.tensor([TOKENS])).logits[0, -1]
        torch.testing.assert_close(logits[0], expected, **CLOSE)
    sampling = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)
    requests = [
        Request(TEXT, sampling, alpha=1, experts="e0"),
        Request(TEXT, sampling, alpha=1, experts="e1"),
        Request(TEXT, sampling, alpha=0),
    ]
    token_ids = ensemble.tokenizer.encode(TEXT, add_special_tokens=False)
    for trace, reference in zip(model.generate_batch(requests), (peft, other, plain), strict=True):
        assert list(trace.token_ids) == greedy(reference, token_ids)
    with torch.inference_mode():
        read = torch.tensor([TOKENS])
        change = (
            (peft(read).logits[..., :NUM_TOKENS] - plain(read).logits[..., :NUM_TOKENS]).abs().max()
        )
    assert change > 0.1


PISSA = {"target_modules": BOTH, "init_lora_weights": "pissa"}


def test_a_converted_pissa_adapter_is_plain_lora(root):
    """PiSSA changes the weights under the adapter; PEFT's conversion makes up for that."""
    from peft import LoraConfig, get_peft_model

    directory = small(root, "llama")
    options = {"r": 2, "lora_alpha": 2, "task_type": "CAUSAL_LM", **PISSA}
    adapted = get_peft_model(plain_model(directory), LoraConfig(**options))
    # As PEFT's documentation has it.
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(root / "pissa_before")
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    with torch.inference_mode():
        expected = adapted.eval()(torch.tensor([TOKENS])).logits[0, -1]
    adapted.save_pretrained(
        root / "pissa", path_initial_model_for_weight_conversion=str(root / "pissa_before")
    )
    found = find_adapter(str(root / "pissa"), root=root)
    checkpoint = find_checkpoint(str(directory), root=root)
    spec = ModelSpec(model=str(directory), device="cpu")
    backend = TransformersBackend.load(checkpoint, spec, {"a": found})
    logits = backend.prefill([TOKENS], adapters=["a"]).logits[0]
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "why", "hint"),
    [
        ({"peft_type": "IA3"}, "of type 'IA3'", "merge_and_unload"),
        ({"peft_type": "ADALORA"}, "of type 'ADALORA'", "merge_and_unload"),
        ({"peft_type": "LOHA"}, "of type 'LOHA'", "merge_and_unload"),
        ({"peft_type": "VERA"}, "of type 'VERA'", "merge_and_unload"),
        ({"peft_type": "OFT"}, "of type 'OFT'", "merge_and_unload"),
        ({"peft_type": "PREFIX_TUNING"}, "tokens before the text", "train the expert as LoRA"),
        ({"peft_type": "PROMPT_TUNING"}, "tokens before the text", "train the expert as LoRA"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "'pissa_niter_4', which changes the weights",
            "path_init",
        ),
        ({"init_lora_weights": "olora"}, "'olora', which changes the weights", "path_init"),
        (
            {"init_lora_weights": "loftq"},
            "'loftq', which changes the weights",
            "whose weights LoftQ changed",
        ),
        ({"alora_invocation_tokens": [1, 2]}, r"activated LoRA \(aLoRA\)", "as plain LoRA"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "repeating layers", "merge_and_unload"),
        ({"arrow_config": {"top_k": 2}}, "chooses among other adapters", "as plain LoRA"),
        ({"use_qalora": True}, "pools its inputs", "merge_and_unload"),
        ({"use_bdlora": {"nblocks": 2}}, "diagonal blocks", "merge_and_unload"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_another_method_is_refused_for_what_it_does(root, tmp_path, changes, why, hint):
    directory = shutil.copytree(made(root, "attention")[0], tmp_path / "adapter")
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    model = str(small(root, "llama"))
    recipe = Recipe.from_dict(
        {
            "model_type": "proxytune",
            "base": {"model": model},
            "experts": [
                {"name": "e", "anti_expert": {"model": model}, "expert": {"adapter": "adapter"}}
            ],
        },
        directory=tmp_path,
    )
    with pytest.raises(UnsupportedModel, match=rf"(?s){why}.*hint: .*{hint}"):
        ProxyTuned.load(recipe)


def test_doctor_says_what_becomes_of_an_adapter_and_counts_its_memory(root):
    diagnosis = examine(recipe_of(root, "experts", "experts"))
    by_part = {report.part: report for report in diagnosis.models}
    report = by_part["e0.expert"]
    assert report.weight_bytes == 4 * report.num_parameters
    assert report.shares is None
    assert by_part["e1.expert"].weight_bytes == 0
    assert by_part["e1.expert"].shares == "e0.expert"
    assert sum(
        "is merged into a copy of" in note
        and "gate_up_proj, which is one parameter for all" in note
        for note in diagnosis.notes
    )

    diagnosis = examine(recipe_of(root, "more tokens", "attention"))
    by_part = {report.part: report for report in diagnosis.models}
    # What PEFT saved of the frozen embeddings is not kept.
    assert by_part["e0.expert"].weight_bytes == by_part["e1.expert"].weight_bytes
    (note,) = (note for note in diagnosis.notes if note.startswith("e0.expert: the adapter"))
    assert (
        f"for {NUM_TOKENS + 3} tokens and" in note and "what it learned about added tokens" in note
    )


def test_an_adapter_with_another_tokenizers_embeddings_is_refused(root, tmp_path):
    """Rows beyond the small model's are dropped only if the others are those of its own tokens."""
    directory = shutil.copytree(made(root, "more tokens")[0], tmp_path / "adapter")
    recipe = recipe_of(root, "attention")
    one = {
        "name": "e",
        "anti_expert": {"model": str(small(root, "llama"))},
        "expert": {"adapter": str(directory)},
    }
    recipe = Recipe.from_dict({**recipe.to_dict(), "experts": [one]}, directory=tmp_path)
    tiny_tokenizer(extra_tokens=["<pad>", "<a>", "<b>"]).save_pretrained(directory)
    (note,) = (note for note in examine(recipe).notes if "learned about" in note)
    assert note.endswith("is dropped ('<pad>', '<a>', '<b>').")
    tiny_tokenizer(shuffle_seed=1, extra_tokens=["<pad>", "<a>", "<b>"]).save_pretrained(directory)
    with pytest.raises(AdapterMismatch, match="was trained with another tokenizer"):
        examine(recipe).raise_first()
    fewer = shutil.copytree(made(root, "attention")[0], tmp_path / "fewer")
    one["expert"] = {"adapter": str(fewer)}
    weights = load_file(fewer / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = torch.zeros(NUM_TOKENS - 1, 16)
    save_file(weights, fewer / "adapter_model.safetensors")
    recipe = Recipe.from_dict({**recipe.to_dict(), "experts": [one]}, directory=tmp_path)
    with pytest.raises(AdapterMismatch, match=f"lm_head has {NUM_TOKENS} rows instead of"):
        examine(recipe).raise_first()


def test_a_pickled_adapter_is_merged_or_switched_like_any_other(root, tmp_path):
    for name in ("experts", "dora"):
        directory = shutil.copytree(made(root, name)[0], tmp_path / name)
        torch.save(
            load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin"
        )
        (directory / "adapter_model.safetensors").unlink()
        model = str(small(root, KINDS[name].model))
        expert = {"adapter": str(directory), "allow_pickle": True}
        pair = {
            "name": "e",
            "anti_expert": {"model": model, "allow_pickle": True},
            "expert": expert,
        }
        recipe = Recipe.from_dict(
            {"model_type": "proxytune", "base": {"model": model}, "experts": [pair]},
            directory=tmp_path,
        )
        loaded = ProxyTuned.load(recipe, allow_pickle=True)
        member = loaded.ensemble.members[loaded.ensemble.pairs[0].expert]
        assert (member.adapter is None) == KINDS[name].is_merged
        logits = member.backend.prefill([TOKENS], adapters=[member.adapter]).logits[0]
        with torch.inference_mode():
            expected = made(root, name)[1](torch.tensor([TOKENS])).logits[0, -1]
        torch.testing.assert_close(logits, expected, **CLOSE)


MERGED = [name for name in KINDS if name != "experts"]


@pytest.mark.parametrize("name", MERGED)
def test_merging_into_files_gives_what_peft_gives_or_is_refused_for_tied_weights(root, name):
    """vLLM gets a model's weights like this."""
    kind = KINDS[name]
    directory = small(root, kind.model)
    found = find_adapter(str(made(root, name)[0]), root=root)
    checkpoint = find_checkpoint(str(directory), root=root)
    weights = load_file(directory / "model.safetensors")
    model = plain_model(directory)
    try:
        merged = dict(merge(weights.items(), found, checkpoint))
    except UnsupportedModel as error:
        assert "vLLM holds one weight for both" in str(error)
        assert name in UNTIED
        return
    except AdapterMismatch as error:
        assert "is not in the files of its model by itself" in str(error)
        assert name in ("lora_bias", "router")
        return
    assert name not in UNTIED
    model.load_state_dict(merged, strict=False)
    model.tie_weights()
    with torch.inference_mode():
        logits = model(torch.tensor([TOKENS])).logits[0, :, :NUM_TOKENS]
        expected = made(root, name)[1](torch.tensor([TOKENS])).logits[0, :, :NUM_TOKENS]
    torch.testing.assert_close(logits, expected, **CLOSE)


UNTIED = ("tied head", "tied embedding", "scaled embedding", "saved tied embedding")
"""Kinds that make two weights of one."""


def test_experts_are_not_merged_into_files(root):
    found = find_adapter(str(made(root, "experts")[0]), root=root)
    checkpoint = find_checkpoint(str(small(root, "mixtral")), root=root)
    with pytest.raises(UnsupportedModel, match=r"changes the experts of .* together, and vLLM"):
        dict(merge({}.items(), found, checkpoint))


def test_an_adapter_that_needs_a_copy_of_quantised_weights_is_refused(root):
    recipe = recipe_of(root, "experts")
    quantised = recipe.with_models(
        lambda spec: replace(spec, quantization={"quant_method": "torchao", "quant_type": "x"})
    )
    error = next(p.error for p in examine(quantised).problems if p.where == "e0.expert")
    assert "because they are quantised" in str(error)


@pytest.mark.parametrize("name", ["head", "saved head", "tokens"])
def test_a_model_that_is_handed_over_runs_the_rows_through_pefts_modules(root, name):
    adapted = made(root, name)[1]
    backend = TransformersBackend(adapted, name="handed over", adapters=["default"])
    logits = backend.prefill([TOKENS] * 3, adapters=["default", None, "default"]).logits
    with torch.inference_mode():
        plain = plain_model(small(root, KINDS[name].model))(torch.tensor([TOKENS])).logits[0, -1]
        expected = adapted(torch.tensor([TOKENS])).logits[0, -1]
    torch.testing.assert_close(logits[0], expected, **CLOSE)
    torch.testing.assert_close(logits[1], plain, **CLOSE)
    torch.testing.assert_close(logits[2], expected, **CLOSE)


@pytest.mark.parametrize("name", ["head", "saved norms", "dora", "tokens of the tied head"])
def test_adapters_run_on_weights_that_are_kept_elsewhere_until_they_are_needed(root, name):
    """As with `device: "auto"`, if a model is larger than its devices."""
    from accelerate import cpu_offload

    directory = small(root, KINDS[name].model)
    model = plain_model(directory)
    cpu_offload(model, execution_device=torch.device("cpu"))
    found = find_adapter(str(made(root, name)[0]), root=root)
    checkpoint = find_checkpoint(str(directory), root=root)
    put_rows_on(model, {"a": read_adapter(found, checkpoint)})
    backend = TransformersBackend(model, name="offloaded", adapters=["a"])
    logits = backend.prefill([TOKENS] * 2, adapters=["a", None]).logits
    for row, reference in enumerate((made(root, name)[1], plain_model(directory))):
        with torch.inference_mode():
            expected = reference(torch.tensor([TOKENS])).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, **CLOSE)


@pytest.mark.parametrize("name", ["attention", "tokens of the tied head"])
def test_merging_into_weights_that_are_kept_elsewhere_is_refused(root, name):
    from accelerate import cpu_offload

    directory = small(root, KINDS[name].model)
    model = plain_model(directory)
    cpu_offload(model, execution_device=torch.device("cpu"))
    found = find_adapter(str(made(root, name)[0]), root=root)
    with pytest.raises(
        UnsupportedModel, match=r"weights do not fit into memory.*\nhint: .*\"cpu\""
    ):
        merge_into(model, found, find_checkpoint(str(directory), root=root))


@pytest.mark.parametrize("name", ["attention", "tied head"])
def test_merging_where_only_the_embedding_is_kept_elsewhere_gives_what_peft_gives(root, name):
    from accelerate import cpu_offload
    from peft import LoraConfig, get_peft_model

    directory = small(root, "tied")
    target = {"attention": "q_proj", "tied head": "lm_head"}[name]
    adapted = get_peft_model(plain_model(directory), LoraConfig(r=2, target_modules=[target]))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.add_(0.2)
    adapted.save_pretrained(root / f"{name} on tied")
    model = plain_model(directory)
    cpu_offload(model.model.embed_tokens, execution_device=torch.device("cpu"))
    found = find_adapter(f"{name} on tied", root=root)
    merge_into(model, found, find_checkpoint(str(directory), root=root))
    assert model.config.tie_word_embeddings == (name == "attention")
    with torch.inference_mode():
        logits, expected = (each(torch.tensor([TOKENS])).logits for each in (model, adapted))
    torch.testing.assert_close(logits, expected, **CLOSE)
