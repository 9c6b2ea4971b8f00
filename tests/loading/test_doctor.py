"""The check of a whole recipe: what it reports, and that it finds everything that is wrong at once."""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from proxytune import machine
from proxytune.commands.doctor import rendered
from proxytune.errors import (
    AdapterMismatch,
    CorruptModel,
    MissingExtra,
    ModelNotFound,
    NotEnoughMemory,
    PromptFormatError,
    UnsupportedModel,
    VocabularyMismatch,
)
from proxytune.loading.doctor import examine
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from tests.support.tiny import (
    MERGES,
    NUM_TOKENS,
    tiny_adapter,
    tiny_gguf,
    tiny_model,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_model(root / "large", "qwen2", width=NUM_TOKENS + 6, hidden_size=32)
    tiny_model(root / "small")
    tiny_model(root / "tuned", seed=1)
    tiny_model(root / "gpt2", "gpt2", tokenizer=tiny_tokenizer(shuffle_seed=3, chat_template=None))
    tiny_model(root / "other", tokenizer=tiny_tokenizer(merges=[*MERGES, ("h", "u")]))
    tiny_adapter(root / "small", root / "adapter")
    tiny_gguf(root / "tiny.gguf")
    return root


def recipe_of(models, *experts, **base):
    return Recipe(ModelSpec(**{"model": "large", **base}), tuple(experts), directory=models)


def pair(name="x", *, expert=None, anti_expert=None):
    return ExpertSpec(
        name, expert or ModelSpec(model="tuned"), anti_expert or ModelSpec(model="small")
    )


def printed(diagnosis, width=80):
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True).print(rendered(diagnosis))
    return stream.getvalue()


def classes(diagnosis):
    return [(problem.where, type(problem.error)) for problem in diagnosis.problems]


def test_a_healthy_recipe_is_reported_part_by_part(models):
    diagnosis = examine(recipe_of(models, pair(), prompt="chat", device="cpu"))
    diagnosis.raise_first()
    assert diagnosis.is_healthy
    base, expert, anti_expert = diagnosis.models
    assert (base.part, expert.part, anti_expert.part) == ("base", "x.expert", "x.anti_expert")
    assert base.architecture == "Qwen2ForCausalLM"
    assert (base.vocabulary, base.num_tokens, base.num_padding) == ("base", NUM_TOKENS, 6)
    assert (expert.vocabulary, expert.num_padding) == ("padded", 0)
    asked = "<|im_start|>user\nWhat is steering?<|im_end|>\n<|im_start|>assistant\n"
    assert "".join(base.text_tokens) == "".join(base.chat_tokens) == asked
    assert "".join(expert.text_tokens) == "What is steering?"
    assert "".join(expert.chat_tokens) == asked
    assert (base.running_dtype, base.device, base.max_context) == ("float32", "cpu", 128)


def test_memory_is_parameters_by_element_size_and_the_cache_by_a_thousand_tokens(models):
    half = ModelSpec(model="small", dtype="bfloat16", device="cpu")
    diagnosis = examine(recipe_of(models, pair(anti_expert=half), device="cpu"))
    base, _, anti_expert = diagnosis.models
    assert base.weight_bytes == 4 * base.num_parameters
    assert anti_expert.weight_bytes == 2 * anti_expert.num_parameters
    assert anti_expert.cache_bytes == 1000 * 2 * (
        2 * 2 * 2 * 4
    )  # layers, key and value, heads, size
    (device,) = diagnosis.devices
    assert device.weight_bytes == sum(model.weight_bytes for model in diagnosis.models)
    assert device.free_bytes > 0


def test_a_lora_pair_and_models_that_two_experts_share_are_counted_once(models):
    lora = pair("lora", expert=ModelSpec(adapter="adapter"))
    diagnosis = examine(recipe_of(models, lora, pair("full")))
    by_part = {model.part: model for model in diagnosis.models}
    small, adapter = (
        by_part["lora.expert"].num_parameters,
        by_part["lora.expert"].num_adapter_parameters,
    )
    assert by_part["lora.expert"].weight_bytes == 4 * (small + adapter)
    assert by_part["lora.anti_expert"].weight_bytes == 0
    assert by_part["lora.anti_expert"].shares == "lora.expert"
    assert by_part["full.anti_expert"].shares == "lora.expert"
    assert by_part["full.expert"].shares is None
    assert by_part["lora.anti_expert"].cache_bytes > 0  # its row has a cache of its own


def test_the_base_as_anti_expert_costs_nothing(models):
    diagnosis = examine(recipe_of(models, pair(anti_expert=ModelSpec(same_as="base"))))
    anti_expert = diagnosis.models[-1]
    assert (anti_expert.weight_bytes, anti_expert.cache_bytes, anti_expert.shares) == (0, 0, "base")


def test_the_same_tokens_under_other_ids_are_permuted(models):
    diagnosis = examine(recipe_of(models, pair(expert=ModelSpec(model="gpt2"))))
    assert diagnosis.is_healthy
    assert diagnosis.models[1].vocabulary == "permuted"


def test_a_gguf_base_is_checked_without_its_weights(models, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    diagnosis = examine(recipe_of(models, pair(), model="tiny.gguf"))
    diagnosis.raise_first()
    assert (diagnosis.models[0].kind, diagnosis.models[1].vocabulary) == ("gguf", "same")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_no_weights_are_read(models, monkeypatch):
    import safetensors.torch
    from transformers import AutoModelForCausalLM

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    for place, name in (
        (AutoModelForCausalLM, "from_pretrained"),
        (safetensors.torch, "load_file"),
        (safetensors, "safe_open"),
        (torch, "load"),
    ):
        monkeypatch.setattr(place, name, refuse)
    lora = pair("lora", expert=ModelSpec(adapter="adapter"))
    assert examine(recipe_of(models, lora)).is_healthy


def test_everything_that_is_wrong_is_found_at_once(models, tmp_path):
    damaged = shutil.copytree(models / "small", tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    diagnosis = examine(
        recipe_of(
            models,
            pair("missing", expert=ModelSpec(model="./nowhere")),
            pair("damaged", expert=ModelSpec(model=str(damaged))),
            pair("words", expert=ModelSpec(model="other")),
            pair(
                "stranger",
                expert=ModelSpec(model="gpt2", adapter="adapter"),
                anti_expert=ModelSpec(model="gpt2", prompt="chat"),
            ),
        )
    )
    assert classes(diagnosis) == [
        ("missing.expert", ModelNotFound),
        ("damaged.expert", CorruptModel),
        ("words.expert", VocabularyMismatch),
        ("stranger.expert", AdapterMismatch),
        ("stranger.anti_expert", PromptFormatError),
    ]
    with pytest.raises(ModelNotFound, match="nowhere"):
        diagnosis.raise_first()
    assert diagnosis.models[1].kind is None
    assert diagnosis.models[5].vocabulary == "differs"
    assert "5 problems." in printed(diagnosis)


def test_a_base_that_is_missing_is_one_problem(models):
    diagnosis = examine(recipe_of(models, pair(), model="./nowhere"))
    assert classes(diagnosis) == [("base", ModelNotFound)]


def test_a_model_that_is_used_twice_is_reported_once(models):
    wrong = ModelSpec(model="other")
    diagnosis = examine(
        recipe_of(models, pair("x", anti_expert=wrong), pair("y", anti_expert=wrong))
    )
    assert classes(diagnosis) == [("x.anti_expert", VocabularyMismatch)]


def test_a_malformed_template_is_a_problem_of_the_prompt(models):
    expert = ModelSpec(model="tuned", prompt="{% for %}")
    diagnosis = examine(recipe_of(models, pair(expert=expert)))
    assert classes(diagnosis) == [("x.expert", PromptFormatError)]


def test_templates_without_an_end_are_a_problem_and_stop_in_their_time_together(models):
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    many = [
        pair(str(i), expert=ModelSpec(model="tuned", prompt=endless + " " * i)) for i in range(9)
    ]
    start = time.monotonic()
    diagnosis = examine(recipe_of(models, *many))
    assert classes(diagnosis) == [("0.expert", PromptFormatError)]
    assert time.monotonic() - start < 5


def test_weights_that_do_not_fit_are_a_problem_with_both_numbers(models, monkeypatch):
    monkeypatch.setattr(machine, "_free_main_memory", lambda: 60_000)
    diagnosis = examine(recipe_of(models, pair(), device="cpu"))
    assert classes(diagnosis) == [("base", NotEnoughMemory)]
    with pytest.raises(NotEnoughMemory, match=r"60\.0 kB are free there(?s:.*)bfloat16"):
        diagnosis.raise_first()


def test_a_containers_limit_bounds_the_memory(tmp_path):
    assert machine._free_container_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert machine._free_container_memory(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._free_container_memory(tmp_path) is None


def test_a_device_that_is_not_there_is_a_problem(models, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    diagnosis = examine(recipe_of(models, pair(), device="cuda"))
    assert classes(diagnosis) == [("base", UnsupportedModel)]


def test_a_missing_package_of_a_quantiser_is_a_problem_with_its_install_line(models, monkeypatch):
    """What a quantised model needs is tested where the package is: `make test-quantized`."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    four_bits = {"load_in_4bit": True}
    diagnosis = examine(recipe_of(models, pair(), quantization=four_bits, device="cpu"))
    assert classes(diagnosis) == [("base", MissingExtra)]
    base = diagnosis.models[0]
    assert base.weight_bytes == 4 * base.num_parameters


def test_an_adapter_of_an_equal_model_with_another_name_is_noted(models):
    lora = pair(
        expert=ModelSpec(model="tuned", adapter="adapter"), anti_expert=ModelSpec(model="tuned")
    )
    diagnosis = examine(recipe_of(models, lora))
    assert diagnosis.is_healthy
    (note,) = diagnosis.notes
    assert "was trained on" in note
    assert "/small" in note
    assert not examine(recipe_of(models, pair(expert=ModelSpec(adapter="adapter")))).notes


def test_a_policy_of_its_own_is_told(models):
    diagnosis = examine(replace(recipe_of(models, pair()), policy=Policy("union", clip=4.0)))
    assert diagnosis.notes == ("it steers by the policy union, clip 4.0",)
    assert not examine(recipe_of(models, pair())).notes


def test_the_whole_diagnosis_is_json(models):
    lora = pair("lora", expert=ModelSpec(adapter="adapter"))
    diagnosis = examine(recipe_of(models, lora, pair("y", expert=ModelSpec(model="other"))))
    content = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert [model["part"] for model in content["models"]] == [
        "base", "lora.expert", "lora.anti_expert", "y.expert", "y.anti_expert",
    ]  # fmt: skip
    (problem,) = content["problems"]
    assert (problem["error"], problem["where"]) == ("VocabularyMismatch", "y.expert")
    assert content["is_healthy"] is False
    assert content["devices"][0]["weight_bytes"] > 0


def test_the_table_is_whole_in_eighty_columns_without_colour(models):
    lora = pair("lora", expert=ModelSpec(adapter="adapter"))
    text = printed(examine(recipe_of(models, lora, prompt="chat", device="cpu")))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for words in ("lora.anti_expert", "shared", "padded", "float32", "free:", "No problems."):
        assert words in text


def test_names_that_look_like_markup_are_printed_as_they_are(models):
    diagnosis = examine(recipe_of(models, pair(expert=ModelSpec(model="./[bold]nowhere[/]"))))
    assert "[bold]nowhere[/]" in printed(diagnosis, width=200)
