"""A recipe as a transformers model stays as it is: what would train or change it is refused beforehand."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Trainer,
    TrainingArguments,
)

import proxytune  # noqa: F401  its import is what makes the Trainer and PEFT ask
from proxytune.errors import UnsupportedModel
from proxytune.integrations.transformers import ProxyTunedForCausalLM
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from tests.support.tiny import tiny_adapter, tiny_model

TUNE = "`proxytune tune` trains"
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose base has dropout, which only GPT-2 has."""
    directory = tmp_path_factory.mktemp("recipe")
    tiny_model(directory / "base", "gpt2", seed=1, hidden_size=32)
    tiny_model(directory / "small", seed=2)
    tiny_adapter(directory / "small", directory / "adapters" / "good", seed=4)
    expert = ExpertSpec("e", ModelSpec(adapter="adapters/good"), ModelSpec(model="small"))
    Recipe(ModelSpec(model="base"), (expert,), directory=directory).write(directory)
    return directory


@pytest.fixture
def model(recipe: Path) -> ProxyTunedForCausalLM:
    return AutoModelForCausalLM.from_pretrained(recipe)


@contextmanager
def unchanged(model: ProxyTunedForCausalLM) -> Iterator[None]:
    """Check that a model has the modules, weights and settings that it had before."""

    def state() -> list[Any]:
        modules = [(name, type(module)) for name, module in model.named_modules()]
        frozen = [(name, weight.requires_grad) for name, weight in model.named_parameters()]
        return [
            modules,
            frozen,
            model.training,
            model.generation_config.to_dict(),
            vars(model.config),
        ]

    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = repr(state())
    yield
    assert repr(state()) == before
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def rows() -> Any:
    from datasets import Dataset

    ids = [[5, 6, 7, 8]] * 4
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def trainer(model: Any, place: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(place), report_to=[], max_steps=1, use_cpu=True, **options
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "saving"])
def test_a_trainer_refuses_to_train_a_recipe(model, tmp_path, options):
    training = trainer(model, tmp_path / "out", **options)
    with unchanged(model), pytest.raises(UnsupportedModel, match=f"(?s)is a recipe.*{TUNE}"):
        training.train()
    assert training.optimizer is None and not training.state.log_history


def test_a_trainer_evaluates_a_recipe(model, tmp_path):
    found = trainer(model, tmp_path / "out").evaluate()
    expected = float(model(IDS, labels=IDS).loss)
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_trainer_trains_other_models(recipe, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(recipe / "base")
    before = other.get_input_embeddings().weight.clone()
    trainer(other, tmp_path / "out").train()
    assert not torch.equal(other.get_input_embeddings().weight, before)


def test_a_trainer_of_trl_refuses_to_train_a_recipe(model, recipe, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed; the extra is proxytune[tune]")
    from datasets import Dataset

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), report_to=[], max_steps=1, use_cpu=True, bf16=False, max_length=32
    )
    training = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": ["the rain"] * 4}),
        processing_class=AutoTokenizer.from_pretrained(recipe),
    )
    with unchanged(model), pytest.raises(UnsupportedModel, match=TUNE):
        training.train()


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")


def prompt_tuning() -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def get_peft_model(model: Any, _: Path) -> Any:
    import peft

    return peft.get_peft_model(model, lora())


def get_peft_model_by_keyword(model: Any, _: Path) -> Any:
    import peft

    return peft.get_peft_model(model=model, peft_config=prompt_tuning())


def get_mixed_model(model: Any, _: Path) -> Any:
    import peft

    return peft.get_peft_model(model, lora(), mixed=True)


def peft_model_from_files(model: Any, recipe: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(model, recipe / "adapters" / "good")


def injected(model: Any, _: Path) -> Any:
    import peft

    return peft.inject_adapter_in_model(lora(), model)


@pytest.mark.parametrize(
    "adapt",
    [get_peft_model, get_peft_model_by_keyword, get_mixed_model, peft_model_from_files, injected],
)
def test_peft_refuses_a_recipe(model, recipe, adapt: Callable[..., Any]):
    """`get_peft_model` used to put adapters on every linear layer of base and experts."""
    with unchanged(model), pytest.raises(UnsupportedModel, match=f"(?s)nor adapted.*{TUNE}"):
        adapt(model, recipe)


def test_peft_adapts_other_models(recipe):
    import peft

    other = AutoModelForCausalLM.from_pretrained(recipe / "small")
    adapted = peft.get_peft_model(other, lora())
    assert any(weight.requires_grad for weight in adapted.parameters())


@pytest.mark.parametrize(
    "imports",
    [
        "import proxytune\nfrom transformers import Trainer\nfrom peft import get_peft_model, LoraConfig",
        "from transformers import Trainer\nfrom peft import get_peft_model, LoraConfig\nimport proxytune",
    ],
    ids=["proxytune first", "proxytune last"],
)
def test_trainer_and_peft_ask_whichever_is_imported_first(recipe, tmp_path, imports):
    program = f"""{imports}
from transformers import AutoModelForCausalLM, TrainingArguments
model = AutoModelForCausalLM.from_pretrained({str(recipe)!r})
for begin in (
    lambda: Trainer(model=model, args=TrainingArguments(output_dir={str(tmp_path)!r})).train(),
    lambda: get_peft_model(model, LoraConfig(target_modules="all-linear")),
):
    try:
        begin()
    except proxytune.errors.UnsupportedModel:
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["refused", "refused"], done.stderr


CHANGES: dict[str, Callable[[Any], Any]] = {
    "gradients": lambda model: model.requires_grad_(True),
    "gradients of inputs": lambda model: model.enable_input_require_grads(),
    "activation checkpointing": lambda model: model.activation_checkpointing_enable(),
    "gradient checkpointing": lambda model: model.gradient_checkpointing_enable(),
    "an adapter": lambda model: model.add_adapter(lora()),
    "an adapter's files": lambda model: model.load_adapter("adapters/good"),
    "a wider vocabulary": lambda model: model.resize_token_embeddings(300),
    "other embeddings": lambda model: model.set_input_embeddings(torch.nn.Embedding(266, 32)),
    "another head": lambda model: model.set_output_embeddings(torch.nn.Linear(32, 266)),
    "new weights": lambda model: model.init_weights(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_models_is_refused_with_what_to_do_instead(model, change):
    with unchanged(model), pytest.raises(UnsupportedModel, match=r"a recipe.*\nhint: "):
        change(model)


def test_training_mode_leaves_the_logits_as_they_are(model):
    """The base's dropout used to be applied, so that each forward gave other logits."""
    before = model(IDS).logits
    assert model.train() is model and model.training
    assert torch.equal(model(IDS).logits, before)
    wrapper = torch.nn.Sequential(model).train()
    assert torch.equal(model(IDS).logits, before)
    wrapper.eval()
    assert not model.training
    assert model.requires_grad_(False) is model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_runs_in_the_dtype_that_it_is_moved_to(recipe, model, dtype):
    moved = model.to(dtype)
    assert {weight.dtype for weight in moved.parameters()} == {dtype}
    whole = AutoModelForCausalLM.from_pretrained(recipe)(IDS).logits
    logits = moved(IDS).logits
    assert logits.dtype == torch.float32
    # Eleven bits of float16, eight of bfloat16, and logits of the order of 10.
    torch.testing.assert_close(logits, whole, atol=0.3 if dtype == torch.bfloat16 else 0.04, rtol=0)


def test_copies_generate_the_same(model):
    options: Any = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = model.generate(IDS, **options)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(IDS, **options), expected)


# Generation settings --------------------------------------------------------------------------------


def test_generation_settings_are_saved_with_the_recipe_once_they_are_changed(model, tmp_path):
    """They used to be lost when a recipe was saved."""
    model.save_pretrained(tmp_path / "as loaded")
    assert not (tmp_path / "as loaded" / "generation_config.json").exists()
    default = model.generation_config.max_new_tokens
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "changed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "changed")
    assert again.generation_config.max_new_tokens == 3
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    again.generation_config.max_new_tokens = default
    again.save_pretrained(tmp_path / "changed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "changed")
    assert again.generation_config.max_new_tokens == default


def test_from_pretrained_takes_generation_settings(recipe):
    given = GenerationConfig(max_new_tokens=3, do_sample=False)
    model = AutoModelForCausalLM.from_pretrained(recipe, generation_config=given)
    ids = model.generate(IDS, attention_mask=torch.ones_like(IDS))
    assert ids.shape[1] == IDS.shape[1] + 3


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states"])
def test_output_that_only_one_model_has_cannot_be_asked_of_from_pretrained(recipe, option):
    """`AutoConfig` took the option, and no output had what it asked for."""
    with pytest.raises(UnsupportedModel, match=f"{option} is true"):
        AutoModelForCausalLM.from_pretrained(recipe, **{option: True})
