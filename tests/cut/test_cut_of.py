"""Recipes whose small model is a cut of the base in memory: the logits of the exported cut, no copies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.cut.run import make_proxy
from proxytune.cut.settings import BRIDGE_FILE, CutSettings
from proxytune.errors import (
    AdapterMismatch,
    CorruptModel,
    InvalidRequest,
    ModelNotFound,
    RecipeError,
    UnsupportedModel,
    UserError,
)
from proxytune.export.recipe import export_recipe
from proxytune.integrations.vllm.config import find_ensemble
from proxytune.loading.doctor import examine
from proxytune.loading.load import load_ensemble
from proxytune.recipe.recipe import Recipe
from proxytune.tune.lora_places import lora_places
from proxytune.tune.settings import TuneSettings
from tests.architectures.models import save
from tests.cut.test_cut import network, text_file
from tests.support.tiny import tiny_adapter

KEEP = {"cut_of": "base", "keep": [2, 1], "bridge": "bridge.safetensors"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base, its cut as a model and as a bridge, and an adapter trained on the first."""
    place = tmp_path_factory.mktemp("cut")
    save(network("qwen2"), place / "base")
    options = {"keep": "2+1", "data": str(text_file(place)), "tokens": 600}
    base = str(place / "base")
    make_proxy(base, CutSettings(output=str(place / "cut"), **options))
    make_proxy(base, CutSettings(output=str(place / "small"), bridge_only=True, **options))
    tiny_adapter(place / "cut", place / "adapter")
    yield place


def recipe_of(place: Path, name: str, small: dict[str, Any], **base: Any) -> Recipe:
    directory = place / name
    directory.mkdir(exist_ok=True)
    (directory / "bridge.safetensors").write_bytes((place / "small" / BRIDGE_FILE).read_bytes())
    config = {
        "model_type": "proxytune",
        "base": {"model": str(place / "base"), **base},
        "experts": [
            {"name": "x", "anti_expert": small, "expert": {"adapter": str(place / "adapter")}}
        ],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return Recipe.read(directory)


def test_a_cut_in_memory_has_the_logits_of_the_exported_one_with_adapters_too(place: Path) -> None:
    inside, _ = load_ensemble(recipe_of(place, "inside", KEEP))
    outside, _ = load_ensemble(recipe_of(place, "outside", {"model": str(place / "cut")}))
    prompt = [5, 17, 99, 250, 3, 40]
    for one, other in zip(inside.members, outside.members, strict=True):
        first, second = (
            member.backend.prefill([prompt, prompt[:3]], adapters=[member.adapter] * 2).logits
            for member in (one, other)
        )
        # Sums of float32 in another order.
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    plain, tuned = (
        inside.members[i].backend.prefill([prompt], adapters=[inside.members[i].adapter])
        for i in (inside.pairs[0].expert, inside.pairs[0].anti_expert)
    )
    assert not torch.allclose(plain.logits, tuned.logits, atol=1e-2)


def test_a_cut_in_memory_copies_no_weight_of_the_base(place: Path) -> None:
    ensemble, _ = load_ensemble(recipe_of(place, "inside", KEEP))
    base, cut = ensemble.members[0].backend, ensemble.members[1].backend
    own: Any = {p.data_ptr() for p in base.model.parameters()}  # type: ignore[attr-defined]
    named = cut.model.named_parameters()  # type: ignore[attr-defined]
    new = [n for n, p in named if p.data_ptr() not in own and p.numel() and "changes" not in n]
    assert {name.split(".")[2] for name in new if name.startswith("model.layers.")} == {"2"}
    assert all(name.startswith("model.layers.2.") for name in new), new
    assert cut.model.model.layers[3].self_attn.layer_idx == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("small", [KEEP, None])
def test_a_cut_has_its_logits_made_in_the_bases_product(place: Path, small: Any) -> None:
    small = small or {"model": str(place / "cut")}
    ensemble, _ = load_ensemble(recipe_of(place, "inside" if small is KEEP else "outside", small))
    base, cut = ensemble.members[0].backend, ensemble.members[1].backend
    assert cut.host is base
    prompts, adapters = [[5, 17, 99], [3]], [ensemble.members[1].adapter] * 2
    tokens = torch.tensor([[7, 8], [9, 10]])
    expected = [
        backend.extend(backend.prefill(prompts, adapters=own).state, tokens)
        for backend, own in ((base, None), (cut, adapters))
    ]
    states = cut.final_states(cut.prefill(prompts, adapters=adapters).state, tokens)
    found = base.extend_with(base.prefill(prompts).state, tokens, states)
    for logits, own in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, own, atol=1e-5, rtol=1e-5)  # sums in another order


def test_doctor_names_the_output_matrix_that_a_cut_shares(place: Path) -> None:
    for name, small in (("inside", KEEP), ("outside", {"model": str(place / "cut")})):
        recipe = recipe_of(place, name, small)
        plain, found = examine(recipe), examine(recipe, compares_outputs=True)
        assert [model.shares_output for model in found.models] == [False, True, True]
        saved = plain.devices[0].weight_bytes - found.devices[0].weight_bytes
        assert bool(saved) == (name == "outside")  # a cut in memory has none that could be freed


def test_the_base_is_unchanged_by_a_cut_of_it(place: Path) -> None:
    ensemble, _ = load_ensemble(recipe_of(place, "inside", KEEP))
    prompt = torch.tensor([[5, 17, 99, 250, 3, 40]])
    found = ensemble.members[0].backend.prefill(prompt.tolist()).logits
    with torch.no_grad():
        expected = network("qwen2")(prompt).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_doctor_counts_only_the_bridge_and_reads_the_bases_vocabulary(place: Path) -> None:
    diagnosis = examine(recipe_of(place, "inside", KEEP))
    diagnosis.raise_first()
    base, _, small = diagnosis.models
    assert small.part == "x.anti_expert" or diagnosis.models[1].part == "x.anti_expert"
    cut = next(model for model in diagnosis.models if model.part == "x.anti_expert")
    assert cut.vocabulary == "same"
    assert cut.reference == "the base, cut to 2+1 layers"
    assert cut.num_parameters is not None
    assert base.num_parameters is not None
    assert cut.num_parameters < base.num_parameters
    shares = [model.weight_bytes for model in diagnosis.models if model.part != "base"]
    assert sum(size or 0 for size in shares) < 4 * cut.num_parameters / 2
    assert any("the bridge is its own" in note for note in diagnosis.notes)


def test_a_recipe_with_a_cut_is_written_and_read_back(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, "inside", KEEP)
    assert recipe.experts[0].to_dict()["anti_expert"]["keep"] == (2, 1)
    assert Recipe.from_dict(recipe.to_dict(), directory=recipe.directory).experts == recipe.experts


@pytest.mark.parametrize(
    ("small", "why"),
    [
        ({"cut_of": "base"}, "needs keep"),
        ({"cut_of": "base", "keep": [3], "bridge": "b.safetensors"}, "needs keep"),
        (
            {"cut_of": "base", "keep": [2, 0], "bridge": "b.safetensors"},
            "numbers of layers from 1 on",
        ),
        ({"cut_of": "base", "keep": "2+1", "bridge": "b.safetensors"}, "two numbers of layers"),
        ({"cut_of": "base", "keep": [2, 1], "bridge": "b.bin"}, "safetensors file"),
        ({**KEEP, "dtype": "bfloat16"}, "cut_of and dtype"),
        ({**KEEP, "model": "other"}, "cut_of and model"),
        ({"cut_of": "expert", "keep": [2, 1], "bridge": "b.safetensors"}, '"base"'),
        ({"model": "small", "keep": [2, 1]}, "cut_of is not given"),
    ],
)
def test_a_cut_that_is_not_described_whole_is_refused(
    small: dict[str, Any], why: str, place: Path
) -> None:
    with pytest.raises(RecipeError, match=why):
        recipe_of(place, "wrong", small)


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ({"model": "http://localhost:1/v1"}, "behind an API"),
        ({"model": "base.gguf", "llama_cpp": {}}, "llama.cpp runs the base"),
        ({"quantization": {"load_in_4bit": True}}, "is quantised"),
        ({"device": "auto"}, "spread over devices"),
    ],
)
def test_a_base_whose_layers_cannot_be_shared_is_refused_with_what_to_do(
    base: dict[str, Any], why: str, place: Path
) -> None:
    with pytest.raises(RecipeError, match=f"(?s){why}.*proxytune make-proxy"):
        recipe_of(place, "wrong", KEEP, **base)


def first_error(recipe: Recipe) -> UserError:
    with pytest.raises(UserError) as caught:
        load_ensemble(recipe)
    return caught.value


def test_what_the_base_does_not_have_is_refused(place: Path) -> None:
    too_many = first_error(recipe_of(place, "many", {**KEEP, "keep": [4, 2]}))
    assert isinstance(too_many, InvalidRequest)
    assert "has only 6" in str(too_many)
    missing = first_error(recipe_of(place, "none", {**KEEP, "bridge": "other.safetensors"}))
    assert isinstance(missing, ModelNotFound)
    assert "no bridge at" in str(missing)
    recipe = recipe_of(place, "corrupt", KEEP)
    from safetensors.torch import save_file

    save_file({"down": torch.zeros(3, 3)}, recipe.directory / "bridge.safetensors")
    wrong = first_error(recipe)
    assert isinstance(wrong, CorruptModel)
    assert "is no bridge for a model of hidden size" in str(wrong)


def test_engines_that_cannot_share_layers_say_what_to_do(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, "inside", KEEP)
    for run in (lambda: find_ensemble(recipe), lambda: export_recipe(recipe, tmp_path / "gguf")):
        with pytest.raises(UnsupportedModel, match=r"(?s)in memory.*proxytune make-proxy"):
            run()


@pytest.mark.parametrize(
    ("model", "asked", "layers"),
    [
        ("cut", None, [3]),
        ("cut", "all", None),
        ("cut", "1-2", [1, 2]),
        ("base", None, None),
        ("base", "5", [5]),
    ],
)
def test_an_adapter_of_a_cut_is_put_behind_the_bridge_unless_others_are_named(
    model: str, asked: str | None, layers: list[int] | None, place: Path
) -> None:
    settings = TuneSettings(data="rows", output="out", anti_expert="small", lora_layers=asked)
    small = find_checkpoint(str(place / model), root=place)
    found = lora_places(settings, small)
    assert found.get("layers_to_transform") == layers
    if layers is not None:
        assert {"q_proj", "down_proj"} < set(found["target_modules"])
        assert "lm_head" not in found["target_modules"]


def test_layers_that_a_model_lacks_get_no_adapter(place: Path) -> None:
    small = find_checkpoint(str(place / "cut"), root=place)
    settings = TuneSettings(data="rows", output="out", anti_expert="small", lora_layers="3-4")
    with pytest.raises(AdapterMismatch, match="has the layers 0 to 3"):
        lora_places(settings, small)
    with pytest.raises(InvalidRequest, match="lora_layers"):
        TuneSettings(data="rows", output="out", anti_expert="small", lora_layers="last")
