"""Weights and a bias fitted with a recipe's models, and what becomes of them in the recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from proxytune.checkpoints.output_bias import OutputBias, read_output_bias
from proxytune.cli import app
from proxytune.errors import InvalidRequest, UnsupportedModel
from proxytune.measure.score import Interval, passage_losses
from proxytune.model import ProxyTuned
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ExpertWeights, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.testing import toy_model
from proxytune.tune import TuneSettings, tune
from proxytune.tune.card import last_word
from proxytune.tune.features import reader
from proxytune.tune.fit import LEAST_TOKENS, Fitted, Gain
from proxytune.tune.fitted import first_of, fit_expert, fitted_spec, words_of
from tests.support.tiny import tiny_model
from tests.support.toys import toy_load

SPEC = ExpertSpec("odd", ModelSpec(model="expert"), ModelSpec(model="small"), 0.4)
CLEAR = Gain(3.0, 2.9, Interval(0.08, 0.12))
UNCLEAR = Gain(3.0, 2.995, Interval(-0.01, 0.02))


def fitted(gain: Gain, bias_gain: Gain | None = None) -> Fitted:
    bias = OutputBias(torch.tensor([3, 7]), torch.tensor([1.0, -0.5]))
    return Fitted(
        alpha=0.4,
        weights=(0.9, 0.8, 0.7),
        bias=bias if bias_gain else None,
        weights_with_bias=(0.95, 0.85, 0.75) if bias_gain else None,
        gain=gain,
        bias_gain=bias_gain,
        by_num_ids={},
        num_tokens=5_000,
    )


# Keys of the recipe


def test_weights_that_win_become_keys_at_strength_1(tmp_path: Path) -> None:
    found = fitted_spec(SPEC, fitted(CLEAR), tmp_path)
    assert (found.alpha, found.weights) == (1.0, ExpertWeights(0.9, 0.8, 0.7))
    assert found.bias is None


def test_a_bias_that_wins_is_written_beside_the_recipe(tmp_path: Path) -> None:
    found = fitted_spec(SPEC, fitted(CLEAR, CLEAR), tmp_path)
    assert found.weights == ExpertWeights(0.95, 0.85, 0.75)
    assert found.bias == "biases/odd.safetensors"
    bias = read_output_bias(found.bias, root=tmp_path)
    assert (bias.token_ids.tolist(), bias.values.tolist()) == ([3, 7], [1.0, -0.5])


def test_what_does_not_win_leaves_the_expert_as_it_is(tmp_path: Path) -> None:
    assert fitted_spec(SPEC, fitted(UNCLEAR, UNCLEAR), tmp_path) is SPEC
    assert not any(tmp_path.iterdir())


def test_the_words_say_what_is_kept_and_why() -> None:
    assert "(base 0.90, expert 0.80, anti-expert 0.70)" in words_of(fitted(UNCLEAR))
    assert "no clear win, so the recipe's stay" in words_of(fitted(UNCLEAR))
    words = words_of(fitted(CLEAR, CLEAR))
    assert words.startswith("weights and output bias fitted (base 0.95, expert 0.85")
    assert "2 tokens with a bias): they gain 0.100 nats per token (+0.080 to +0.120)" in words


# The recipe's models


def test_what_was_fitted_is_what_the_recipe_then_does(tmp_path: Path) -> None:
    """The losses of the loaded recipe at alpha 1 are those of the fitted mix."""
    for seed, name in enumerate(("base", "small", "expert")):
        tiny_model(tmp_path / name, seed=seed)
    base = ModelSpec(model="base")
    spec = ExpertSpec("odd", ModelSpec(model="expert"), ModelSpec(model="small"))
    found = fitted(CLEAR, CLEAR)
    plain = Recipe(base=base, experts=(spec,), directory=tmp_path)
    steered = Recipe(base=base, experts=(fitted_spec(spec, found, tmp_path),), directory=tmp_path)
    model, weighted = ProxyTuned.load(plain), ProxyTuned.load(steered)
    passages = model.text_passages("the tin in the thin tea ran rather an hour", window=20)
    assert found.chosen is not None
    read = reader(model.ensemble, passages)
    mixed = torch.cat([found.chosen.losses(chunk) for chunk in read()])
    scored = passage_losses(weighted.ensemble, passages, [(1.0,)], with_models=False)[0]
    torch.testing.assert_close(mixed.double(), torch.tensor(scored), atol=1e-4, rtol=0)


def written(model: ProxyTuned, num_texts: int, *, alpha: float = 0.0, **sampling: Any) -> str:
    """Return texts of 200 tokens that the model writes, joined."""
    requests = [
        Request("a", SamplingParams(max_new_tokens=200, seed=seed, **sampling), alpha=alpha)
        for seed in range(num_texts)
    ]
    return "".join(trace.text for trace in model.generate_batch(requests))


@pytest.fixture(scope="module")
def endless() -> ProxyTuned:
    return toy_model(eos_logit=-100.0)


def test_text_that_the_steered_base_wrote_needs_no_weights(endless: ProxyTuned) -> None:
    passages = endless.text_passages(written(endless, 20, alpha=0.6, temperature=1.0), window=100)
    found = fit_expert(
        endless, "first", valid=passages, train=None, alphas=(0.2, 0.4, 0.6, 0.8, 1.0)
    )
    assert found.alpha == 0.6
    assert found.chosen is None, found.gain


def test_text_that_was_steered_and_hotter_gets_smaller_weights(endless: ProxyTuned) -> None:
    """At temperature 2 all three weights are halved."""
    text = written(endless, 20, alpha=1.0, temperature=2.0)
    passages = endless.text_passages(text, window=100)
    found = fit_expert(endless, "first", valid=passages, train=None, alphas=(0.5, 1.0))
    assert found.chosen is not None
    assert found.weights == pytest.approx((0.5, 0.5, 0.5), abs=0.08)


def test_the_first_passages_are_taken_up_to_a_number_of_tokens(endless: ProxyTuned) -> None:
    passages = endless.text_passages("abcdefghij" * 10, window=11)
    kept = first_of(passages, 25)
    assert [len(p.token_ids) for p in kept] == [10, 10, 10]


def test_a_policy_is_refused_by_name() -> None:
    model = toy_model()
    policy = Policy.from_dict({"plausibility": 0.1, "implausible": "leave"})
    model = ProxyTuned(replace(model.ensemble, policy=policy), model.formats, model.recipe)
    with pytest.raises(UnsupportedModel, match="fitted to plain steering"):
        fit_expert(model, "first", valid=[], train=None, alphas=())


def test_a_pair_that_lacks_some_tokens_is_refused_by_name() -> None:
    ensemble = toy_model().ensemble
    lacking = torch.zeros(ensemble.vocabulary.width, dtype=torch.bool)
    pair = replace(ensemble.pairs[0], is_unshared=lacking)
    with pytest.raises(UnsupportedModel, match="expert 'first' lacks some of the base's tokens"):
        reader(replace(ensemble, pairs=(pair,)), [])


# The command


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxytune.model.ProxyTuned.load", toy_load)


@pytest.fixture
def toy_recipe(tmp_path: Path) -> str:
    Recipe(
        base=ModelSpec(model="toy/base"),
        experts=(
            ExpertSpec("first", ModelSpec(model="toy/first"), ModelSpec(model="toy/small"), 0.5),
        ),
    ).write(tmp_path / "recipe")
    return str(tmp_path / "recipe")


@pytest.mark.usefixtures("toys")
def test_the_command_writes_a_recipe_with_what_wins(toy_recipe: str, tmp_path: Path) -> None:
    """The text is the steered base's at temperature 2, with far more of the letter q."""
    model = toy_load(Recipe.read(toy_recipe))
    text = written(model, 30, alpha=1.0, temperature=2.0, logit_bias=((16, 4.0),))
    (tmp_path / "text.txt").write_text(text)
    output = tmp_path / "fitted"
    command = ["fit", toy_recipe, "--text-file", str(tmp_path / "text.txt"), "--window", "100"]
    found = CliRunner().invoke(app, [*command, "--bias", "--output", str(output)])
    assert found.exit_code == 0, found.output
    assert "weights and output bias fitted" in found.stderr
    spec = Recipe.read(output).experts[0]
    assert spec.alpha == 1.0 and spec.bias == "biases/first.safetensors"
    bias = read_output_bias(spec.bias, root=output)
    assert bias.token_ids[bias.values.argmax()] == 16


@pytest.mark.usefixtures("toys")
def test_the_command_refuses_what_it_cannot_do(toy_recipe: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc" * 50)
    text = ["--text-file", str(tmp_path / "text.txt")]
    for arguments, message in (
        ([], "one of them is needed"),
        ([*text, "--bias"], "add --output DIR"),
        (text, f"fitting needs at least {LEAST_TOKENS:,}"),
        ([*text, "--expert", "other"], "other"),
        ([*text, "--num-ids", "100"], "num_ids is 100, and no bias is fitted"),
        ([*text, "--seed", "-1"], "seed"),
    ):
        found = CliRunner().invoke(app, ["fit", toy_recipe, *arguments])
        assert found.exit_code == 2 or isinstance(found.exception, SystemExit), found.output
        assert message in found.stderr, found.stderr


# A tuning run


def test_a_run_keeps_a_bias_that_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random base is far from any text, so that a bias wins by a nat and more."""
    monkeypatch.setattr("proxytune.tune.fit.LEAST_TOKENS", 256)
    for seed, name in enumerate(("base", "small")):
        tiny_model(tmp_path / name, seed=seed)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the tin in the thin tea ran rather an hour in a"}\n' * 60)
    run = TuneSettings(
        data=str(rows),
        output=str(tmp_path / "out"),
        anti_expert=str(tmp_path / "small"),
        base=str(tmp_path / "base"),
        method="sft",
        calibrate=False,
        fit="bias",
        max_steps=2,
        max_length=32,
        valid_share=0.4,
    )
    result = tune(run)
    spec = Recipe.read(tmp_path / "out").experts[0]
    assert spec.bias is not None
    assert result.fit is not None and result.fit["kept"] == "weights and bias"
    assert (result.alpha, spec.alpha) == (1.0, 1.0)
    assert result.valid is not None
    nats = {(row["name"], row["alpha"]): row["nats"] for row in result.valid["rows"]}
    assert nats["steered", 1.0] < nats["base", None] - 1
    assert "Weights and output bias fitted" in (tmp_path / "out" / "README.md").read_text()
    assert "alpha 1, with fitted weights and bias" in last_word(run, result)[0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"alpha": 0.5}, "alpha is 0.5"),
        ({"method": "dpo"}, "method dpo is not judged"),
        ({"base": None}, "no pair"),
        ({"measure_tokens": 0}, "measure_tokens is 0"),
        ({"valid_share": 0.0}, "valid_share is 0"),
        ({"reward": "exact"}, "method grpo is not judged"),
        ({"base": "http://localhost:1/v1"}, "is behind an API"),
    ],
)
def test_a_bias_that_could_not_be_fitted_is_refused(changes: dict[str, Any], why: str) -> None:
    given: dict[str, Any] = {
        "data": "rows",
        "output": "out",
        "anti_expert": "small",
        "base": "large",
    }
    with pytest.raises(InvalidRequest, match=why):
        TuneSettings(**given | changes, fit="bias")
    TuneSettings(**given | changes)
