"""The benchmark's arithmetic by hand, the published procedure against the library's, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from proxytune.cli import app
from proxytune.errors import InvalidRequest
from proxytune.evaluate.speed import (
    PlainModels,
    Shape,
    Spread,
    load_plain_models,
    measure,
    prompts_of,
    published_procedure,
    ratios_of,
)
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import SamplingParams
from proxytune.testing import toy_model
from tests.support.tiny import tiny_adapter, tiny_model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Return a recipe of tiny models whose expert is an adapter."""
    folder = tmp_path_factory.mktemp("bench")
    base = tiny_model(folder / "base", hidden_size=32, seed=1)
    small = tiny_model(folder / "small", seed=2)
    adapter = tiny_adapter(small, folder / "adapter", seed=3)
    expert = ExpertSpec(
        "tuned",
        ModelSpec(model=str(small), adapter=str(adapter)),
        ModelSpec(model=str(small)),
        alpha=0.8,
    )
    found = Recipe(ModelSpec(model=str(base)), (expert,))
    found.write(folder / "recipe")
    return Recipe.read(folder / "recipe")


def test_ratios_are_taken_within_rounds():
    seconds = {
        "base": [2.0, 4.0, 2.0],
        "pair": [1.0, 1.0, 2.0],
        "plain": [4.0, 5.0, 4.0],
        "speculative": [1.0, 4.0, 4.0],
    }
    ratios = ratios_of(seconds)
    assert ratios["plain / base"] == Spread(0.5, 0.5, 0.8)
    assert ratios["speculative / base"] == Spread(1.0, 0.5, 2.0)
    assert ratios["floor"] == Spread(pytest.approx(2 / 3), 0.5, 0.8)  # type: ignore[arg-type]
    assert ratios["plain / floor"] == Spread(1.0, 0.75, 1.0)
    assert not any("published" in name for name in ratios)


def test_every_row_has_a_prompt_of_the_wanted_length_from_its_own_place():
    model = toy_model()
    assert prompts_of(model, "abcde", Shape(3, 1, 2)) == [[0, 1, 2], [3, 4, 0]]
    with pytest.raises(InvalidRequest, match="no tokens"):
        prompts_of(model, "", Shape(3, 1))


def test_the_published_procedure_gives_the_tokens_of_plain_steering(recipe):
    model = ProxyTuned.load(recipe)
    plain = load_plain_models(recipe, "tuned")
    prompts = prompts_of(model, "the inner and the thin", Shape(6, 9, 3))
    expected = [
        list(model.generate(p, SamplingParams(max_new_tokens=9, ignore_eos=True)).token_ids)
        for p in prompts
    ]
    assert published_procedure(plain, torch.tensor(prompts), 9, 0.8).tolist() == expected


def test_an_adapter_is_merged_into_a_copy_of_its_own(recipe):
    plain = load_plain_models(recipe, "tuned")
    assert isinstance(plain, PlainModels)
    one, other = plain.expert.state_dict(), plain.anti_expert.state_dict()
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_measurement_compares_texts_and_counts_drafts(recipe, temperature):
    model = ProxyTuned.load(recipe)
    plain = load_plain_models(recipe, "tuned")
    said: list[str] = []
    measured = measure(
        model,
        Shape(4, 8, 2),
        expert="tuned",
        plain_models=plain,
        temperature=temperature,
        rounds=2,
        say=said.append,
    )
    assert measured.num_parted == 0
    assert len(said) == 3
    assert set(measured.seconds) == {
        "base", "pair", "plain", "speculative", "library", "published",
    }  # fmt: skip
    assert all(spread.low > 0 for spread in measured.seconds.values())
    assert measured.tokens_per_step >= 1
    assert json.loads(json.dumps(measured.to_dict()))["shape"]["num_new"] == 8


def test_the_command_prints_one_object_or_a_table(recipe):
    options = ["--shapes", "4:5", "--rounds", "1", "--no-compare"]
    result = CliRunner().invoke(app, ["bench", str(recipe.directory), "--json", *options])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["measured"][0]["expert"] == "tuned"
    assert answer["machine"]["torch"] == torch.__version__
    table = CliRunner().invoke(app, ["bench", str(recipe.directory), *options])
    assert "speculative / base" in table.stdout and "plain / floor" in table.stdout


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--shapes", "8"], "--shapes"),
        (["--shapes", "8:0"], "--shapes"),
        (["--batch-sizes", "two"], "--batch-sizes"),
        (["--temperature", "-1"], "temperature"),
        (["--expert", "nobody"], "nobody"),
    ],
)
def test_the_command_refuses_what_cannot_be_measured(recipe, options, word):
    result = CliRunner().invoke(app, ["bench", str(recipe.directory), *options])
    assert result.exit_code == 2
    assert word in result.stderr


def test_without_models_to_compare_with_nothing_is_said_of_them(tmp_path: Path):
    model = toy_model(eos_logit=-100.0)
    measured = measure(model, Shape(3, 6), expert="first", text="abc", rounds=1)
    assert set(measured.seconds) == {"base", "pair", "plain", "speculative"}
