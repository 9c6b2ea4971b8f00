"""The recipe: read, checked, written, and its experts chosen."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.errors import (
    CorruptModel,
    InvalidRequest,
    OutputFileError,
    RecipeError,
    UnknownExpert,
)
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ExpertWeights, ModelSpec
from proxytune.request import Steering

SUPPORT = {
    "model_type": "proxytune",
    "architectures": ["ProxyTunedForCausalLM"],
    "base": {"model": "Qwen/Qwen2.5-72B", "dtype": "bfloat16"},
    "experts": [
        {
            "name": "support",
            "anti_expert": {"model": "Qwen/Qwen2.5-1.5B"},
            "expert": {"adapter": "adapters/support"},
            "alpha": 1.0,
        }
    ],
    "combine": "sum",
}
"""The example that the documentation shows."""


def changed(place, value, *, key=None):
    """Return SUPPORT with `value` at the path `place`; with `key` as a further key there."""
    content = json.loads(json.dumps(SUPPORT))
    *path, last = [*place, key] if key is not None else place
    target = content
    for step in path:
        target = target[step]
    target[last] = value
    return content


EXPERT = ("experts", 0)


def two_experts(**options):
    small = ModelSpec(model="small")
    return Recipe(
        base=ModelSpec(model="large"),
        experts=(
            ExpertSpec("law", ModelSpec(adapter="law"), small, alpha=0.5),
            ExpertSpec("verse", ModelSpec(model="verse"), small),
        ),
        **options,
    )


# Reading


def test_the_documented_example_is_read_and_written_back_as_it_is():
    assert Recipe.from_dict(SUPPORT).to_dict() == SUPPORT
    assert list(Recipe.from_dict(SUPPORT).to_dict()) == list(SUPPORT)


def test_an_expert_that_is_only_an_adapter_sits_on_the_anti_experts_model():
    content = changed(
        (*EXPERT, "anti_expert"), {"model": "small", "dtype": "float16", "device": "cpu"}
    )
    (expert,) = Recipe.from_dict(content).experts
    assert expert.expert.model == "small"
    assert expert.expert.adapter == "adapters/support"
    assert expert.expert.weights == expert.anti_expert.weights
    assert Recipe.from_dict(content).to_dict()["experts"][0]["expert"] == {
        "adapter": "adapters/support"
    }


def test_the_prompt_format_of_an_adapter_is_its_own():
    content = changed((*EXPERT, "expert"), "chat", key="prompt")
    (expert,) = Recipe.from_dict(content).experts
    assert (expert.expert.prompt, expert.anti_expert.prompt) == ("chat", "plain")
    assert Recipe.from_dict(content).to_dict() == content


def test_two_adapters_sit_on_one_copy_of_the_small_model():
    content = changed((*EXPERT, "anti_expert"), "adapters/opposite", key="adapter")
    (expert,) = Recipe.from_dict(content).experts
    assert expert.expert.weights == expert.anti_expert.weights
    assert Recipe.from_dict(content).to_dict() == content


def test_either_side_may_be_the_base_itself():
    for side, other in (("anti_expert", "expert"), ("expert", "anti_expert")):
        content = changed((*EXPERT, side), {"same_as": "base"})
        content["experts"][0][other] = {"model": "small"}
        assert Recipe.from_dict(content).to_dict() == content


def test_metadata_that_transformers_writes_is_ignored():
    content = {
        **SUPPORT,
        "transformers_version": "5.19.0",
        "dtype": "float32",
        "_name_or_path": "x",
    }
    assert Recipe.from_dict(content).to_dict() == SUPPORT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(("bse",), {}), "unknown key \"bse\".*(?s:.*)did you mean 'base'"),
        (changed(("base", "modle"), "x"), "base has the unknown key \"modle\".*(?s:.*)'model'"),
        (changed((*EXPERT, "weight"), 1), r"experts\[0\] has the unknown key"),
        (
            changed((*EXPERT, "expert", "adaptor"), "x"),
            r"experts\[0\]\.expert has the unknown key(?s:.*)'adapter'",
        ),
        ({k: v for k, v in SUPPORT.items() if k != "base"}, "lacks the key 'base'"),
        ({k: v for k, v in SUPPORT.items() if k != "experts"}, "lacks the key 'experts'"),
        ({k: v for k, v in SUPPORT.items() if k != "model_type"}, "model_type is null"),
        (changed(("model_type",), "llama"), "a model and not a recipe"),
        (changed(("experts",), []), "experts is empty"),
        (changed(("experts",), {}), "must be a list"),
        (changed(("experts",), [SUPPORT["experts"][0]] * 2), "two experts are called 'support'"),
        (changed(("experts",), [{}]), r"experts\[0\] lacks the key 'name'"),
        (changed((*EXPERT, "name"), "a b"), "letters, digits"),
        (changed((*EXPERT, "name"), ""), "name is"),
        (changed((*EXPERT, "alpha"), "1"), "alpha is"),
        (changed((*EXPERT, "alpha"), True), "alpha is"),
        (changed((*EXPERT, "alpha"), float("nan")), "alpha is"),
        (changed((*EXPERT, "alpha"), 10**400), "alpha is"),
        (changed((*EXPERT, "weights"), 1), r"experts\[0\]\.weights is 1, and must be an object"),
        (changed((*EXPERT, "weights"), []), r"experts\[0\]\.weights is \[\]"),
        (
            changed((*EXPERT, "weights"), {"anti-expert": 1}),
            r"experts\[0\]\.weights has the unknown key(?s:.*)'anti_expert'",
        ),
        (changed((*EXPERT, "weights"), {"base": 0}), r"weights: base is 0.*above 0"),
        (changed((*EXPERT, "weights"), {"expert": -0.5}), "weights: expert is -0.5.*0 to 10"),
        (changed((*EXPERT, "weights"), {"anti_expert": 11}), "anti_expert is 11.*0 to 10"),
        (changed((*EXPERT, "weights"), {"base": float("nan")}), "base is NaN"),
        (changed((*EXPERT, "weights"), {"base": True}), "base is true"),
        (changed((*EXPERT, "weights"), {"base": None}), "base is null"),
        (
            changed((*EXPERT, "bias"), "bias.bin"),
            r"bias is \"bias.bin\".*\.safetensors file(?s:.*)hint",
        ),
        (changed((*EXPERT, "bias"), 3), "bias is 3"),
        (changed((*EXPERT, "bias"), "a\n.safetensors"), "one line"),
        (changed((*EXPERT, "anti_expert"), {"adapter": "x"}), "no model to put it on"),
        (changed((*EXPERT, "anti_expert"), {"same_as": "base"}), "unclear which model"),
        (changed((*EXPERT, "anti_expert"), {"same_as": "expert"}), 'must be "base"'),
        (
            changed((*EXPERT, "anti_expert"), {"same_as": "base", "dtype": "auto"}),
            "same_as and dtype are both given",
        ),
        (changed((*EXPERT, "expert"), "float16", key="dtype"), "its dtype .* is not theirs"),
        (changed((*EXPERT, "expert"), {}), "neither model nor same_as"),
        (
            changed((*EXPERT, "expert"), "x"),
            r"experts\[0\]\.expert is \"x\", and must be an object",
        ),
        (changed(("base",), {"adapter": "x"}), "base has no model"),
        (changed(("base",), {"same_as": "base"}), "base has no model"),
        (changed(("base", "adapter"), "x"), "base has an adapter"),
        (changed(("base", "dtype"), "bfloat61"), "dtype is .*(?s:.*)'bfloat16'"),
        (changed(("base", "model"), 3), "base: model is 3"),
        (changed(("base", "model"), "a\0b"), "no text has"),
        (changed(("base", "prompt"), "chatt"), "prompt is .*(?s:.*)'chat'"),
        (changed(("base", "prompt"), None), "prompt is null"),
        (changed(("base", "trust_remote_code"), "yes"), "true or false"),
        (changed(("base", "quantization"), {}), "quantization is"),
        (changed(("base", "quantization"), [4]), "quantization is"),
        (changed(("combine",), "product"), "combine is"),
        (changed(("combine",), ["sum"]), "combine is"),
        (changed(("default_expert",), "suport"), "default_expert is .*(?s:.*)'support'"),
        ([], "must be an object"),
        (None, "must be an object"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_with_its_place(content, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(content)


def test_an_expert_and_anti_expert_that_are_both_the_base_are_refused():
    content = changed((*EXPERT, "anti_expert"), {"same_as": "base"})
    content["experts"][0]["expert"] = {"same_as": "base"}
    with pytest.raises(RecipeError, match="their difference is zero"):
        Recipe.from_dict(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"base": 1, "base": 2}', '"base" is given twice'),
        (b'{"a": ' + b"9" * 5000 + b"}", "number that cannot be read"),
        (
            b'{"model_type": "proxytune", "base": {"model": "\\ud800"}, "experts": []}',
            "no text has",
        ),
    ],
)
def test_content_that_is_not_proper_json_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json(text)


def test_ten_thousand_experts_are_read_and_chosen_quickly(tmp_path):
    content = {**SUPPORT, "experts": many_experts(10_000)}
    (tmp_path / "config.json").write_text(json.dumps(content))
    start = time.process_time()
    recipe = Recipe.read(tmp_path)
    assert len(recipe.strengths()) == 10_000
    assert len(recipe.only(recipe.named()).experts) == 10_000
    assert recipe.models["expert-9999.expert"].adapter == "adapters/9999"
    assert time.process_time() - start < 5
    with pytest.raises(UnknownExpert, match=r"it has expert-0, .*expert-19 and 9980 more"):
        recipe.named("expert-10000")


def many_experts(count):
    return [
        {"name": f"expert-{number}", "anti_expert": {"model": "small"},
         "expert": {"adapter": f"adapters/{number}"}}
        for number in range(count)
    ]  # fmt: skip


def test_a_recipe_of_more_experts_than_anybody_has_is_refused_before_they_are_built():
    with pytest.raises(RecipeError, match="20,001 experts, and a recipe may have 20,000"):
        Recipe.from_dict({**SUPPORT, "experts": [{}] * 20_001})


def test_a_recipe_of_more_than_64_mb_is_not_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b" " * (64 << 20) + json.dumps(SUPPORT).encode())
    with pytest.raises(RecipeError, match="more than 67,108,864 bytes"):
        Recipe.read(tmp_path)


@pytest.mark.parametrize("value", [10**200, 10**17, -(10**9)])
@pytest.mark.parametrize(
    ("settings", "model"),
    [
        (settings, model)
        for model, names in (
            ("a.gguf", ("threads", "gpu_layers", "context_size")),
            (
                "http://h/v1",
                ("top_logprobs", "lookahead", "max_concurrency", "timeout_s", "max_retries"),
            ),
        )
        for settings in names
    ],
)
def test_a_setting_beyond_what_is_sane_is_refused(settings, model, value):
    part = "api" if model.startswith("http") else "llama_cpp"
    with pytest.raises(RecipeError, match=f"{settings} is "):
        Recipe.from_dict(changed(("base",), {"model": model, part: {settings: value}}))


def test_a_reference_that_no_file_can_have_is_written_as_it_is(tmp_path):
    recipe = Recipe.from_dict(changed(("base", "model"), "a" * 5000))
    assert recipe.write(tmp_path / "r").base.model == "a" * 5000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
specs = st.dictionaries(
    st.sampled_from([*ModelSpec.__dataclass_fields__, "other"]),
    json_values | st.sampled_from(["base", "chat", "auto", "{{ prompt }}", "a/b"]),
    max_size=4,
)
recipes = st.fixed_dictionaries(
    {
        "model_type": st.just("proxytune"),
        "base": st.fixed_dictionaries({"model": st.text(min_size=1, max_size=8)}) | specs,
        "experts": st.lists(
            st.fixed_dictionaries(
                {
                    "name": st.text("ab.", min_size=1, max_size=3) | json_values,
                    "expert": specs,
                    "anti_expert": st.just({"model": "small"}) | specs,
                },
                optional={
                    "alpha": json_values,
                    "weights": st.dictionaries(
                        st.sampled_from(["base", "expert", "other"]), json_values, max_size=2
                    )
                    | json_values,
                    "bias": st.just("b.safetensors") | json_values,
                },
            ),
            max_size=3,
        ),
    },
    optional={"combine": json_values, "default_expert": json_values, "dtype": json_values},
)


@settings(max_examples=300, deadline=None)
@given(recipes | json_values)
def test_any_json_is_a_recipe_or_a_recipe_error(content):
    try:
        recipe = Recipe.from_json(json.dumps(content))
    except RecipeError as error:
        assert str(error)
    else:
        assert Recipe.from_json(json.dumps(recipe.to_dict())) == recipe
        assert recipe.model_card()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | recipes.map(lambda r: json.dumps(r).encode()[:-1]))
def test_any_bytes_are_a_recipe_or_a_recipe_error(content):
    with pytest.raises(RecipeError):
        Recipe.from_json(content)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_any_reference_leads_to_a_recipe_or_a_recipe_error(reference):
    # A name of the Hub's form would be looked up there; such names have a test of their own.
    with pytest.raises(RecipeError, match="no recipe"):
        Recipe.read("./" + reference.replace("/", "_") + "_")


def test_a_missing_directory_says_so_and_how_to_write_a_recipe(tmp_path):
    with pytest.raises(
        RecipeError, match=r"no recipe at .*nowhere: no such directory\.\nhint: .*new"
    ):
        Recipe.read(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="no recipe at nowhere: no such directory"):
        Recipe.read("nowhere")
    with pytest.raises(RecipeError, match=r"config\.json cannot be read"):
        Recipe.read(tmp_path)
    (tmp_path / "file.txt").touch()
    with pytest.raises(RecipeError, match="it is a file"):
        Recipe.read(tmp_path / "file.txt")


def test_a_malformed_recipe_is_refused_with_the_name_of_its_file(tmp_path):
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(
        RecipeError, match=r"the recipe .*config\.json cannot be used: it is not JSON"
    ):
        Recipe.read(tmp_path)


def test_a_recipe_is_read_from_disk_a_package_or_the_hubs_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    place = tmp_path / "recipe_package" / "recipes" / "one"
    written = Recipe.from_dict(SUPPORT, directory=tmp_path).write(place)
    (tmp_path / "recipe_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--owner--recipe" / "snapshots" / ("0" * 40)
    shutil.copytree(place, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    for reference, directory in (
        (place, place),
        (str(place / "config.json"), place),
        ("package:recipe_package/recipes/one", place),
        ("owner/recipe", snapshot),
    ):
        read = Recipe.read(reference)
        assert read == written
        assert read.directory == directory
    for missing in (
        "package:recipe_package/recipes/two",
        "package:no_such_package/x",
        "owner/other",
    ):
        with pytest.raises(RecipeError, match=f"no recipe at {missing}"):
            Recipe.read(missing)


def test_a_relative_recipe_keeps_its_place_in_another_directory(tmp_path, monkeypatch):
    Recipe.from_dict(SUPPORT, directory=tmp_path).write(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    assert Recipe.read("one").directory == tmp_path / "one"


# Writing


def test_a_written_recipe_has_a_model_card_that_names_its_models_on_the_hub(tmp_path):
    Recipe.from_dict(SUPPORT, directory=tmp_path).write(tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text()
    assert "base_model:\n- Qwen/Qwen2.5-72B\n- Qwen/Qwen2.5-1.5B\n" in card
    assert "library_name: proxytune" in card
    assert "tags:\n- proxytune\n- proxy-tuning\n" in card


def test_a_model_card_shows_transformers_only_where_it_takes_the_recipe():
    assert 'AutoModelForCausalLM.from_pretrained(".", ' in Recipe.from_dict(SUPPORT).model_card()
    other_prompt = changed((*EXPERT, "expert"), {"adapter": "a", "prompt": "chat"})
    behind_api = changed(("base",), {"model": "http://localhost:8000/v1"})
    for content in (other_prompt, behind_api):
        assert "AutoModelForCausalLM" not in Recipe.from_dict(content).model_card()


def test_a_model_card_that_is_there_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    Recipe.from_dict(SUPPORT, directory=tmp_path).write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_written_recipe_leads_transformers_to_this_package(tmp_path):
    """Whether transformers follows is tested in test_integration_transformers.py."""
    Recipe.from_dict(SUPPORT).write(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    loader = (tmp_path / "modeling_proxytune.py").read_text()
    for auto_class, name in content["auto_map"].items():
        module, _, class_name = name.rpartition(".")
        assert module == "modeling_proxytune" and class_name in loader, auto_class
    assert Recipe.read(tmp_path).to_dict() == SUPPORT


def test_a_loader_that_somebody_wrote_is_kept(tmp_path):
    (tmp_path / "modeling_proxytune.py").write_text("mine = 1\n")
    Recipe.from_dict(SUPPORT).write(tmp_path)
    assert (tmp_path / "modeling_proxytune.py").read_text() == "mine = 1\n"


def test_another_recipe_is_replaced_only_when_asked(tmp_path):
    recipe = Recipe.from_dict(SUPPORT, directory=tmp_path)
    recipe.write(tmp_path)
    recipe.write(tmp_path)
    other = replace(recipe, base=ModelSpec(model="other/base"))
    with pytest.raises(RecipeError, match="holds another recipe"):
        other.write(tmp_path)
    assert Recipe.read(tmp_path) == recipe
    other.write(tmp_path, overwrite=True)
    assert Recipe.read(tmp_path) == other


def test_a_model_is_never_replaced_by_a_recipe(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RecipeError, match="holds a model of type"):
        Recipe.from_dict(SUPPORT).write(tmp_path, overwrite=True)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_a_write_that_fails_leaves_the_old_recipe_and_no_rests(tmp_path, monkeypatch):
    recipe = Recipe.from_dict(SUPPORT, directory=tmp_path)
    recipe.write(tmp_path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputFileError, match="No space left on device"):
        replace(recipe, base=ModelSpec(model="other/base")).write(tmp_path, overwrite=True)
    assert Recipe.read(tmp_path) == recipe
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "config.json", "modeling_proxytune.py"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputFileError, match=r"one cannot be written: (?s:.*)hint: "):
        Recipe.from_dict(SUPPORT).write(tmp_path / "file" / "one")


def test_local_paths_lead_to_the_same_files_from_the_new_place(tmp_path):
    (tmp_path / "work" / "models" / "large").mkdir(parents=True)
    (tmp_path / "work" / "models" / "small").mkdir()
    recipe = Recipe(
        base=ModelSpec(model="models/large"),
        experts=(
            ExpertSpec("x", ModelSpec(model="/absolute"), ModelSpec(model="models/small")),
            ExpertSpec("y", ModelSpec(model="owner/tuned"), ModelSpec(same_as="base")),
        ),
        directory=tmp_path / "work",
    )
    moved = recipe.write(tmp_path / "work" / "out" / "one")
    assert moved.base.model == "../../models/large"
    assert moved.experts[0].anti_expert.model == "../../models/small"
    assert moved.experts[0].expert.model == "/absolute"
    assert moved.experts[1].expert.model == "owner/tuned"
    assert Recipe.read(tmp_path / "work" / "out" / "one") == moved


def test_adapters_of_the_recipe_travel_with_it(tmp_path):
    adapter = tmp_path / "one" / "adapters" / "support"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    recipe = Recipe.from_dict(SUPPORT, directory=tmp_path).write(tmp_path / "one")
    copy = recipe.write(tmp_path / "elsewhere" / "two")
    assert copy.experts[0].expert.adapter == "adapters/support"
    assert (copy.directory / "adapters/support/adapter_config.json").read_text() == "{}"
    assert copy == recipe


WEIGHED = {"weights": {"base": 0.95, "anti_expert": 0.0}, "bias": "biases/law.safetensors"}


def test_weights_and_a_bias_are_written_back_as_they_are_read():
    content = changed((*EXPERT,), SUPPORT["experts"][0] | WEIGHED)
    (expert,) = Recipe.from_dict(content).experts
    assert expert.weights == ExpertWeights(0.95, 1.0, 0.0)
    assert Recipe.from_dict(content).to_dict() == content
    assert "alpha * (expert - anti_expert)" in Recipe.from_dict(SUPPORT).model_card()
    assert "alpha * ((w_base - 1) * base + w_expert" in Recipe.from_dict(content).model_card()
    assert "support 1 (weights: base 0.95, expert 1, anti-expert 0; output bias: `biases/law" in (
        Recipe.from_dict(content).model_card()
    )


def test_weights_of_one_are_not_written():
    content = changed((*EXPERT, "weights"), {"base": 1, "expert": 1.0})
    assert Recipe.from_dict(content).to_dict() == SUPPORT


def test_the_bias_of_the_recipe_travels_with_it(tmp_path):
    for place in ("one/biases", "outside"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "law.safetensors").write_bytes(place.encode())
    content = changed((*EXPERT,), SUPPORT["experts"][0] | WEIGHED)
    recipe = Recipe.from_dict(content, directory=tmp_path / "one").write(tmp_path / "one")
    copy = recipe.write(tmp_path / "elsewhere" / "two")
    assert copy == recipe and Recipe.read(copy.directory) == recipe
    assert (copy.directory / "biases/law.safetensors").read_bytes() == b"one/biases"
    content["experts"][0]["bias"] = "../outside/law.safetensors"
    moved = Recipe.from_dict(content, directory=tmp_path / "one").write(tmp_path / "a" / "three")
    assert moved.experts[0].bias == "../../outside/law.safetensors"


def test_a_bias_that_is_a_link_out_of_the_recipe_does_not_travel(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "secret.safetensors").write_text("secret")
    (tmp_path / "one" / "law.safetensors").symlink_to(tmp_path / "secret.safetensors")
    content = changed((*EXPERT, "bias"), "law.safetensors")
    recipe = Recipe.from_dict(content, directory=tmp_path / "one")
    with pytest.raises(CorruptModel, match="a link that leads out"):
        recipe.write(tmp_path / "two")
    assert not (tmp_path / "two" / "law.safetensors").exists()


def test_a_single_file_adapter_of_the_recipe_travels_with_it(tmp_path):
    """Copied as a directory, it used to fail."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "law.gguf").write_bytes(b"GGUF")
    content = changed((*EXPERT, "anti_expert"), {"model": "small.gguf", "llama_cpp": {}})
    content["experts"][0]["expert"] = {"adapter": "law.gguf"}
    recipe = Recipe.from_dict(content, directory=tmp_path / "one")
    copy = recipe.write(tmp_path / "two")
    assert (copy.directory / "law.gguf").read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    "policy", [Policy("union"), Policy(clip=1.0), Policy(schedule=((0, 1.0),))]
)
def test_a_base_weight_under_a_policy_needs_all_logits_of_the_base(policy):
    content = changed(("base",), {"model": "http://localhost:1/v1"})
    content["experts"][0]["weights"] = {"base": 0.9}
    recipe = Recipe.from_dict(content)  # the published method scales what is shown
    with pytest.raises(RecipeError, match=r"behind an API, and expert 'support'(?s:.*)hint:"):
        replace(recipe, policy=policy)


# Choosing experts


def test_all_experts_steer_with_their_own_strength_where_there_is_no_default():
    assert two_experts().strengths() == {"law": 0.5, "verse": 1.0}


def test_the_default_expert_steers_alone():
    assert two_experts(default_expert="verse").strengths() == {"verse": 1.0}
    assert two_experts(default_expert="verse").strengths(Steering(0.2)) == {"verse": 0.2}


def test_experts_are_chosen_by_name_with_one_strength_or_their_own():
    assert two_experts().strengths(Steering(experts="law")) == {"law": 0.5}
    assert two_experts().strengths(Steering(2, ("verse", "law"))) == {"verse": 2.0, "law": 2.0}
    assert two_experts().strengths(Steering(experts={"verse": 0, "law": -1})) == {
        "verse": 0.0,
        "law": -1.0,
    }


def test_experts_may_bring_strengths_beside_others_that_take_alpha_or_the_recipes():
    mixed = two_experts().mixed
    assert mixed({"verse": 2.0, "law": None}, None) == Steering(experts={"verse": 2.0, "law": 0.5})
    assert mixed({"verse": 2.0, "law": None}, 0.1) == Steering(experts={"verse": 2.0, "law": 0.1})
    assert mixed({"law": None}, 0.1) == Steering(0.1, ("law",))
    with pytest.raises(InvalidRequest, match="so alpha would do nothing"):
        mixed({"verse": 2.0}, 0.1)


def test_a_recipe_with_some_of_its_experts_keeps_a_default_that_is_left():
    recipe = two_experts(default_expert="verse")
    assert recipe.only(None) == recipe
    assert recipe.only(["verse"]).default_expert == "verse"
    assert recipe.only(["law"]).default_expert is None
    assert [expert.name for expert in recipe.only(["law"]).experts] == ["law"]


def test_an_unknown_expert_is_answered_with_the_known_ones():
    with pytest.raises(UnknownExpert, match=r"has law, verse(?s:.*)did you mean 'verse'"):
        two_experts().strengths(Steering(experts="versed"))


def test_a_strength_that_is_not_finite_is_refused():
    with pytest.raises(InvalidRequest, match="alpha is nan"):
        two_experts().strengths(Steering(float("nan"), "law"))
    with pytest.raises(InvalidRequest, match="alpha of expert 'law'"):
        two_experts().strengths(Steering(experts={"law": float("inf")}))
    with pytest.raises(InvalidRequest, match="no expert is named"):
        two_experts().named(())


def test_a_spec_with_quantisation_can_be_a_key():
    spec = ModelSpec(model="x", quantization={"load_in_4bit": True})
    assert {spec: 1}[replace(spec)] == 1
    assert spec != replace(spec, quantization={"load_in_8bit": True})
    assert Path(two_experts().directory).is_absolute()


def test_a_model_card_nobody_edited_follows_the_recipe_and_an_edited_one_stays(tmp_path):
    first = Recipe(ModelSpec("a/b"), (ExpertSpec("x", ModelSpec("a/c"), ModelSpec("a/d")),))
    other = Recipe(ModelSpec("a/other"), first.experts)
    first.write(tmp_path)
    other.write(tmp_path, overwrite=True)
    assert (tmp_path / "README.md").read_text() == Recipe.read(tmp_path).model_card()
    assert "a/other" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    first.write(tmp_path, overwrite=True)
    assert (tmp_path / "README.md").read_text() == "mine"
