"""The rights that a recipe asks for: only the caller grants them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from proxytune import ProxyTuned, SamplingParams
from proxytune.errors import InvalidRequest, ModelNotFound, RecipeError, UnsafeModel
from proxytune.evaluate.speed import load_plain_models
from proxytune.export.recipe import export_recipe
from proxytune.grants import Grants
from proxytune.loading.doctor import examine
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.recipe import Recipe
from tests.support.foreign_code import model_with_code
from tests.support.tiny import tiny_adapter, tiny_model

GREEDY = SamplingParams(max_new_tokens=4, temperature=0)


def write_recipe(directory: Path, base: dict, expert: dict, anti_expert: dict) -> Path:
    experts = [{"name": "e", "expert": expert, "anti_expert": anti_expert}]
    content = {"model_type": "proxytune", "base": base, "experts": experts}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that foreign code makes when it runs."""
    return tmp_path / "the-code-ran"


@pytest.fixture
def with_code(tmp_path: Path, mark: Path) -> Path:
    """A recipe whose base needs code of its own."""
    model_with_code(tmp_path / "base", mark)
    tiny_model(tmp_path / "small", seed=1)
    small = {"model": "small"}
    return write_recipe(tmp_path, {"model": "base", "trust_remote_code": True}, small, small)


@pytest.fixture
def with_pickle(tmp_path: Path) -> Path:
    """A recipe whose expert is pickled."""
    tiny_model(tmp_path / "base")
    tiny_model(tmp_path / "small", seed=1)
    tiny_model(tmp_path / "expert", seed=2)
    pickle_weights(tmp_path / "expert" / "model.safetensors", "pytorch_model.bin")
    expert = {"model": "expert", "allow_pickle": True}
    return write_recipe(tmp_path, {"model": "base"}, expert, {"model": "small"})


def pickle_weights(path: Path, name: str) -> None:
    torch.save(load_file(path), path.with_name(name))
    path.unlink()


def test_a_recipe_that_asks_to_run_code_is_refused_and_nothing_runs(with_code, mark):
    with pytest.raises(UnsafeModel) as refused:
        ProxyTuned.load(with_code)
    said = str(refused.value)
    assert "base (base: own_code.py)" in said
    assert "--trust-remote-code" in said and "trust_remote_code=True" in said
    assert not mark.exists()


def test_the_callers_grant_runs_the_code_that_the_recipe_asks_for(with_code, mark):
    model = ProxyTuned.load(with_code, trust_remote_code=True)
    assert mark.exists()
    assert model.generate("the rain", GREEDY).num_new_tokens == 4


def test_code_that_transformers_has_itself_is_not_run_without_a_grant_either(tmp_path, mark):
    model_with_code(tmp_path / "base", mark, model_type="llama")
    tiny_model(tmp_path / "small")
    asks = {"model": "base", "trust_remote_code": True}
    recipe = write_recipe(tmp_path, asks, {"model": "small"}, {"model": "small"})
    with pytest.raises(UnsafeModel, match="own_code"):
        ProxyTuned.load(recipe)
    assert not mark.exists()


def test_a_grant_alone_runs_no_code_that_the_recipe_does_not_ask_for(tmp_path, mark):
    model_with_code(tmp_path / "base", mark)
    tiny_model(tmp_path / "small")
    small = {"model": "small"}
    recipe = write_recipe(tmp_path, {"model": "base"}, small, small)
    with pytest.raises(UnsafeModel, match='set "trust_remote_code": true for it in the recipe'):
        ProxyTuned.load(recipe, trust_remote_code=True)
    assert not mark.exists()


def test_pickled_weights_are_read_only_with_the_callers_grant(with_pickle):
    with pytest.raises(UnsafeModel) as refused:
        ProxyTuned.load(with_pickle)
    said = str(refused.value)
    assert "e.expert (expert: pytorch_model.bin)" in said and "--allow-pickle" in said
    model = ProxyTuned.load(with_pickle, allow_pickle=True)
    assert model.generate("the rain", GREEDY).num_new_tokens == 4


def test_a_pickled_adapter_is_read_only_with_the_callers_grant(tmp_path):
    tiny_model(tmp_path / "base")
    small = tiny_model(tmp_path / "small", seed=1)
    tiny_adapter(small, tmp_path / "adapter")
    pickle_weights(tmp_path / "adapter" / "adapter_model.safetensors", "adapter_model.bin")
    asks = {"model": "small", "allow_pickle": True}
    expert = {"adapter": "adapter", "allow_pickle": True}
    recipe = write_recipe(tmp_path, {"model": "base"}, expert, asks)
    with pytest.raises(UnsafeModel, match=r"small \+ adapter: adapter_model\.bin"):
        ProxyTuned.load(recipe)
    model = ProxyTuned.load(recipe, allow_pickle=True)
    assert model.generate("the rain", GREEDY).num_new_tokens == 4


def test_all_rights_that_are_missing_are_named_at_once(tmp_path, mark):
    model_with_code(tmp_path / "base", mark)
    tiny_model(tmp_path / "small")
    base = {"model": "base", "trust_remote_code": True}
    expert = {"model": "small", "allow_pickle": True, "prompt": "chat"}
    recipe = write_recipe(tmp_path, base, expert, {"model": "small"})
    with pytest.raises(UnsafeModel) as refused:
        ProxyTuned.load(recipe)
    assert "add --trust-remote-code --allow-pickle" in str(refused.value)
    with pytest.raises(UnsafeModel, match="add --allow-pickle,"):
        ProxyTuned.load(recipe, trust_remote_code=True)
    assert not mark.exists()


def test_an_expert_that_is_not_loaded_asks_for_nothing(with_pickle):
    recipe = Recipe.read(with_pickle)
    other = recipe.experts[0].anti_expert
    plain = type(recipe.experts[0])("plain", other, other)
    both = type(recipe)(recipe.base, (*recipe.experts, plain), directory=recipe.directory)
    assert ProxyTuned.load(both, experts=["plain"]).recipe.named() == ("plain",)


def test_doctor_lists_what_a_recipe_asks_for_and_runs_nothing(with_code, mark):
    diagnosis = examine(Recipe.read(with_code))
    assert not mark.exists()
    assert not diagnosis.is_healthy
    assert [(a.part, a.right, a.files) for a in diagnosis.asked] == [
        ("base", "trust_remote_code", ("own_code.py",))
    ]
    assert [type(problem.error) for problem in diagnosis.problems] == [UnsafeModel]
    assert diagnosis.to_dict()["asked"][0]["references"] == ("base",)


def test_doctor_looks_at_models_with_pickled_weights_without_reading_those(with_pickle):
    (with_pickle / "expert" / "pytorch_model.bin").write_bytes(b"no pickle at all")
    diagnosis = examine(Recipe.read(with_pickle))
    expert = next(m for m in diagnosis.models if m.part == "e.expert")
    assert expert.vocabulary == "same"
    assert [(p.where, type(p.error)) for p in diagnosis.problems] == [("e.expert", UnsafeModel)]


def test_comparing_speeds_and_exporting_need_the_same_grant(with_code, mark, tmp_path):
    recipe = Recipe.read(with_code)
    with pytest.raises(UnsafeModel):
        load_plain_models(recipe, "e")
    with pytest.raises(UnsafeModel):
        export_recipe(recipe, tmp_path / "exported")
    assert not mark.exists()
    load_plain_models(recipe, "e", Grants(trust_remote_code=True))
    assert mark.exists()


def test_kernels_from_the_hub_are_code(tmp_path):
    tiny_model(tmp_path / "base")
    small = {"model": "base"}
    kernels = {"model": "base", "attn_implementation": "someone/attention"}
    with pytest.raises(RecipeError, match="whose code would run"):
        Recipe.read(write_recipe(tmp_path, kernels, small, small))
    asks = {**kernels, "trust_remote_code": True}
    with pytest.raises(UnsafeModel, match="--trust-remote-code"):
        ProxyTuned.load(write_recipe(tmp_path, asks, small, small))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_that_a_models_config_names_are_code_too(tmp_path, key):
    tiny_model(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "someone/attention"}))
    small = {"model": "base"}
    with pytest.raises(UnsafeModel, match="someone/attention"):
        ProxyTuned.load(write_recipe(tmp_path, small, small, small))


def test_the_files_that_need_a_grant_are_found_without_loading_anything(with_code, mark):
    files = RecipeFiles(Recipe.read(with_code))
    assert [a.describe() for a in files.ungranted()] == ["base (base: own_code.py)"]
    assert RecipeFiles(files.recipe, Grants(trust_remote_code=True)).ungranted() == ()
    assert not mark.exists()


def test_the_names_of_files_write_no_lines_of_their_own_and_are_not_without_end(with_code):
    (with_code / "base" / "a\nNo problems.py").touch()
    for number in range(30):
        (with_code / "base" / f"m{number}.py").touch()
    with pytest.raises(UnsafeModel) as refused:
        ProxyTuned.load(with_code)
    said = str(refused.value)
    assert r"'a\nNo problems.py'" in said and "and 12 more)" in said
    assert said.count("\n") == 1


def test_the_files_of_a_model_in_the_hubs_cache_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--model"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "own_code.py"):
        (snapshot / name).touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    asks = {"model": "someone/model", "trust_remote_code": True}
    with pytest.raises(UnsafeModel, match=r"base \(someone/model: own_code\.py\)"):
        ProxyTuned.load(write_recipe(tmp_path, asks, {"model": "small"}, {"model": "small"}))


def test_no_revision_leads_out_of_the_hubs_cache_while_files_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--a--b" / "refs").mkdir(parents=True)
    (tmp_path / "hub" / "bad").write_bytes(b"\xff")
    asks = {"model": "a/b", "revision": "../../bad", "allow_pickle": True}
    with pytest.raises(UnsafeModel, match="files not on this machine"):
        ProxyTuned.load(write_recipe(tmp_path, asks, {"model": "c"}, {"model": "c"}))


@pytest.mark.parametrize("name", ["a--b/c", "a.git", "a" * 200])
def test_a_name_that_the_hub_allows_for_no_model_is_not_found(tmp_path, name):
    small = {"model": "small"}
    tiny_model(tmp_path / "small")
    with pytest.raises(ModelNotFound):
        ProxyTuned.load(write_recipe(tmp_path, {"model": name}, small, small))


@pytest.mark.parametrize("name", ["trust_remote_code", "allow_pickle"])
def test_a_grant_is_true_or_false_and_nothing_that_counts_as_true(name):
    with pytest.raises(InvalidRequest, match=f"{name} is 'false'"):
        Grants(**{name: "false"})


@pytest.mark.parametrize("control", ["\n", "\x1b[2J", "\u2028", "\x85"])
@pytest.mark.parametrize("key", ["model", "adapter", "revision", "device"])
def test_no_name_in_a_recipe_writes_lines_of_its_own_into_messages(tmp_path, key, control):
    spec = {"model": "small", key: f"small{control}No problems."}
    with pytest.raises(RecipeError, match=f"{key} is .* and must be one line of text"):
        Recipe.read(write_recipe(tmp_path, {"model": "base"}, spec, {"model": "small"}))
