"""Recipes whose small model is a cut of the base in memory: the logits of the exported cut, no copies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.cut import Keep
from proxytune.checkpoints.cut_checkpoint import CutCheckpoint
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
from proxytune.evaluate.plan import EvalOptions
from proxytune.evaluate.predictors import tuned_recipe
from proxytune.evaluate.speed import load_plain_models
from proxytune.export.recipe import export_recipe
from proxytune.integrations.vllm.config import find_ensemble
from proxytune.loading.doctor import examine
from proxytune.loading.load import load_ensemble
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ModelSpec
from proxytune.request import Request, SamplingParams
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
    assert ModelSpec(**KEEP) == recipe.experts[0].anti_expert  # a list, as in JSON
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


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bool", "float64", "complex64"])
def test_a_bridge_of_numbers_that_no_bridge_has_is_refused(dtype: str, place: Path) -> None:
    from safetensors.torch import load_file, save_file

    recipe = recipe_of(place, "numbers", KEEP)
    path = recipe.directory / "bridge.safetensors"
    kind = getattr(torch, dtype)
    save_file({name: value.to(kind) for name, value in load_file(path).items()}, path)
    found = first_error(recipe)
    assert isinstance(found, CorruptModel)
    assert f"gate {dtype} [1, 32]" in str(found)


def test_adapters_of_the_base_and_of_two_cuts_are_each_on_their_own(place: Path) -> None:
    """A calibrated pair on one cut, an expert on another, and one on the base's own weights."""
    base = str(place / "base")
    text = str(text_file(place))
    for on, keep in (("cut 1+2", "1+2"), ("small 1+2", "1+2")):
        options = {"keep": keep, "data": text, "tokens": 600, "bridge_only": on[0] == "s"}
        make_proxy(base, CutSettings(output=str(place / on), **options))  # type: ignore[arg-type]
    for seed, (on, name) in enumerate((("cut", "calibrated"), ("cut 1+2", "y"), ("base", "z"))):
        tiny_adapter(place / on, place / name, seed=seed + 1)
    bridge = str(place / "small 1+2" / BRIDGE_FILE)
    other = {"cut_of": "base", "keep": [1, 2], "bridge": bridge}
    found = []
    for name, one, two in (
        ("inside many", KEEP, other),
        ("outside many", {"model": str(place / "cut")}, {"model": str(place / "cut 1+2")}),
    ):
        recipe = recipe_of(place, name, {**one, "adapter": str(place / "calibrated")})
        config = json.loads((recipe.directory / "config.json").read_text())
        config["experts"][0] |= {"weights": {"base": 0.9, "anti_expert": 0.7}, "alpha": 1.5}
        on_base = {"model": base, "adapter": str(place / "z")}
        config["experts"] += [
            {"name": "y", "anti_expert": two, "expert": {"adapter": str(place / "y")}},
            {"name": "z", "anti_expert": {"same_as": "base"}, "expert": on_base},
            {"name": "c", "anti_expert": one, "expert": {"same_as": "base"}, "alpha": 0.3},
        ]
        (recipe.directory / "config.json").write_text(json.dumps(config))
        model = ProxyTuned.load(recipe.directory)
        sampling = SamplingParams(max_new_tokens=8)
        chosen = ("x", "y", "z", "c", ("x", "y", "z"))
        asked = [Request("the rain", sampling, experts=names) for names in chosen]
        found.append([trace.token_ids for trace in model.generate_batch(asked, batch_size=3)])
    assert found[0] == found[1]
    assert len(set(found[0])) > 1


def test_the_models_that_a_benchmark_loads_by_themselves_include_the_cut(place: Path) -> None:
    tokens = torch.tensor([[5, 17, 99]])
    found = [
        load_plain_models(recipe_of(place, name, small), "x")
        for name, small in (("inside", KEEP), ("outside", {"model": str(place / "cut")}))
    ]
    with torch.no_grad():
        for one, model in zip(*found, strict=True):
            # Sums of float32 in another order.
            torch.testing.assert_close(
                one(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4
            )
    with pytest.raises(UnsupportedModel, match="no files of its own"):
        base, bridge = (
            find_checkpoint(str(place / "base"), root=place),
            place / "small" / BRIDGE_FILE,
        )
        CutCheckpoint.of(base, Keep(2, 1), bridge).weights_path()


def test_a_tuned_base_is_asked_in_the_format_of_an_expert_that_is_a_cut(place: Path) -> None:
    recipe = recipe_of(place, "format", KEEP)
    first = recipe.experts[0]
    expert = replace(first, expert=replace(first.expert, prompt="chat"))
    found = tuned_recipe(
        replace(recipe, experts=(expert,)),
        EvalOptions(("gsm8k",), tuned_adapter=str(place / "adapter")),
    )
    assert found.experts[0].expert.prompt == "chat"


def test_a_bridge_travels_with_its_recipe_and_is_never_an_older_one(
    place: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(place, "travels", KEEP)
    recipe.write(tmp_path)
    copied = tmp_path / "bridge.safetensors"
    assert copied.read_bytes() == (recipe.directory / "bridge.safetensors").read_bytes()
    recipe.write(tmp_path)
    copied.write_bytes(b"another")
    with pytest.raises(RecipeError, match=r"bridge\.safetensors is there already, and differs"):
        recipe.write(tmp_path)
    assert copied.read_bytes() == b"another"
    recipe.write(tmp_path, overwrite=True)
    assert copied.read_bytes() == (recipe.directory / "bridge.safetensors").read_bytes()


def test_engines_that_cannot_share_layers_say_what_to_do(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, "inside", KEEP)
    for run in (lambda: find_ensemble(recipe), lambda: export_recipe(recipe, tmp_path / "gguf")):
        with pytest.raises(UnsupportedModel, match=r"(?s)in memory.*proxytune make-proxy"):
            run()


@pytest.mark.parametrize(
    ("model", "asked", "layers"),
    [
        ("cut", None, None),
        ("cut", "all", None),
        ("cut", "3", [3]),
        ("cut", "1-2", [1, 2]),
        ("base", None, None),
        ("base", "5", [5]),
    ],
)
def test_adapters_are_put_on_all_layers_unless_some_are_named(
    model: str, asked: str | None, layers: list[int] | None, place: Path
) -> None:
    settings = TuneSettings(data="rows", output="out", anti_expert="small", lora_layers=asked)
    small = find_checkpoint(str(place / model), root=place)
    found = lora_places(settings, small)
    assert found.get("layers_to_transform") == layers
    idle = [f"model.layers.2.self_attn.{name}_proj" for name in "qkvo"]
    assert sorted(found.get("exclude_modules", [])) == sorted(idle if model == "cut" else [])
    if layers is not None:
        assert {"q_proj", "down_proj"} < set(found["target_modules"])
        assert "lm_head" not in found["target_modules"]


def test_an_adapter_on_a_cut_is_everywhere_but_where_no_gradient_would_come(place: Path) -> None:
    import peft
    import transformers

    small = find_checkpoint(str(place / "cut"), root=place)
    places = lora_places(TuneSettings(data="rows", output="out", anti_expert="small"), small)
    trained = {}
    for name, own in (("ours", places), ("all", {"target_modules": "all-linear"})):
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(place / "cut")
        model = peft.get_peft_model(network, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **own))
        ids = torch.tensor([[5, 17, 99, 250, 3, 40]])
        for _ in range(2):  # the gradient of `down` is 0 until `up` has moved
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data -= parameter.grad
        named = [(n.rpartition(".lora_")[0], p.grad) for n, p in model.named_parameters()]
        sizes = {n: float(grad.abs().sum()) for n, grad in named if grad is not None}
        trained[name] = {n.removeprefix("base_model.model.") for n in sizes if sizes[n] > 0}
        idle = {n.removeprefix("base_model.model.") for n in sizes} - trained[name]
        expected = set(places["exclude_modules"]) if name == "all" else set()
        assert idle == expected
    assert trained["ours"] == trained["all"]


def test_adapters_on_the_bridges_attention_alone_are_refused(place: Path) -> None:
    small = find_checkpoint(str(place / "cut"), root=place)
    options = {"lora_layers": "2", "lora_targets": ("q_proj", "v_proj")}
    settings = TuneSettings(data="rows", output="out", anti_expert="small", **options)  # type: ignore[arg-type]
    with pytest.raises(AdapterMismatch, match="whose attention is zero"):
        lora_places(settings, small)


def test_layers_that_a_model_lacks_get_no_adapter(place: Path) -> None:
    small = find_checkpoint(str(place / "cut"), root=place)
    settings = TuneSettings(data="rows", output="out", anti_expert="small", lora_layers="3-4")
    with pytest.raises(AdapterMismatch, match="has the layers 0 to 3"):
        lora_places(settings, small)
    with pytest.raises(InvalidRequest, match="lora_layers"):
        TuneSettings(data="rows", output="out", anti_expert="small", lora_layers="last")
