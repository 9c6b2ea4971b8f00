"""Ranking experts: by hand from losses, from a toy's logits, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from proxytune.cli import app
from proxytune.errors import InvalidRequest
from proxytune.measure.rank import Sums, candidate_sums, rank_experts, summarise
from proxytune.measure.score import passage_of
from proxytune.model import ProxyTuned
from proxytune.request import SamplingParams
from proxytune.testing import toy_model, toy_recipe
from tests.support.toys import toy_load

THREE = {"first": 1.0, "second": 0.7, "third": 1.0}
TEXT = "the sea is a sea and a ship is a ship. a man at sea is a man. the end of it. " * 6


def sums_of(steered, base, *, lengths=None):
    """Return sums for one strength: `steered` by candidate, slopes and small models left at the base."""
    base = np.array(base, float)
    rows = np.array(steered, float)
    return Sums(
        base,
        np.broadcast_to(base, rows.shape),
        np.broadcast_to(base, rows.shape),
        np.stack([np.broadcast_to(base, rows.shape), rows], axis=1),
        np.full(len(base), 10.0) if lengths is None else np.array(lengths, float),
    )


def test_the_benefit_is_the_nats_saved_at_the_strength_that_the_other_half_picks():
    """Two passages of 10 tokens. "good" saves 2 and 4 nats: each half picks strength 1 for the other, 6 / 20.
    "bad" costs 1 each: each half picks 0. "odd" saves 3 in one and costs 3 in the other: the half where it
    saves picks strength 1 for the one where it costs, and the other picks 0: -3 / 20.
    """
    found = summarise(
        ["bad", "odd", "good"],
        sums_of([[31, 31], [27, 33], [28, 26]], [30, 30]),
        [1.0],
    )
    assert [c.name for c in found.candidates] == ["good", "bad", "odd"]
    assert [c.benefit for c in found.candidates] == pytest.approx([0.3, 0.0, -0.15])
    assert [c.alpha for c in found.candidates] == [1.0, 0.0, 0.0]
    assert found.candidates[0].change == pytest.approx(math.exp(-0.3) - 1)
    assert found.base_nats == 3.0


def test_gain_and_slope_are_per_token():
    base = np.array([30.0, 30.0])
    sums = Sums(
        base,
        np.array([[40.0, 44.0]]),
        np.array([[50.0, 46.0]]),
        np.array([[[29.5, 29.5], [25.0, 25.0]]]),
        np.array([10.0, 10.0]),
    )
    (found,) = summarise(["only"], sums, [1.0]).candidates
    assert found.gain == pytest.approx((10 + 2) / 20)
    assert found.slope == pytest.approx(1.0 / 20 / 0.05)


def test_chances_of_being_first_sum_to_one_and_a_close_race_is_noted():
    rng = np.random.default_rng(0)
    base = np.full(12, 30.0)
    close = 28 + rng.normal(0, 2, (2, 12))
    found = summarise(["a", "b"], sums_of(close, base), [1.0])
    assert sum(c.chance_best for c in found.candidates) == pytest.approx(1.0)
    assert "first in" in found.notes[0]


def test_where_nothing_helps_the_ranking_says_so():
    found = summarise(["a"], sums_of([[31, 32, 31, 32]], [30, 30, 30, 30]), [1.0])
    assert found.candidates[0].benefit == 0
    assert "no candidate is certain to help" in found.notes[0]


def test_the_expert_that_helped_write_a_text_is_ranked_first():
    model = toy_model(experts=THREE, eos_logit=-100.0)
    sampling = SamplingParams(max_new_tokens=120, temperature=1.0, seed=0)
    written = model.generate("a", sampling, experts={"second": 1.0}).token_ids
    parts = [
        passage_of(model.ensemble, written[n : n + 1], written[n + 1 : n + 12])
        for n in range(0, 108, 12)
    ]
    found = rank_experts(model.ensemble, parts)
    assert found.candidates[0].name == "second"
    assert 0.5 <= found.candidates[0].alpha <= 1.5
    assert found.num_tokens == 9 * 11


def test_a_candidates_losses_are_those_of_steering_by_it_alone():
    model = toy_model(experts=THREE, memory=0.5, eos_logit=-100.0)
    parts = model.text_passages(TEXT, window=16)
    sums = candidate_sums(model.ensemble, parts, [1.0])
    report = model.score(TEXT, [1.0], experts="second", window=16)
    nats = sums.steered[1, 1].sum() / sums.lengths.sum()
    assert nats == pytest.approx(report.row("steered", 1.0).nats, rel=1e-6)
    assert sums.experts[1].sum() / sums.lengths.sum() == pytest.approx(
        report.row("second.expert").nats, rel=1e-6
    )
    taken = sums.take([0, 2])
    assert taken.steered.shape == (3, 2, 2)


def test_one_passage_is_too_few():
    model = toy_model()
    with pytest.raises(InvalidRequest, match="ranking needs at least two"):
        rank_experts(model.ensemble, model.text_passages("abc"))


# The command --------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(ProxyTuned, "load", toy_load)
    toy_recipe(THREE).write(tmp_path / "recipe")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "recipe"


def run(*arguments):
    return CliRunner().invoke(app, ["rank-experts", *map(str, arguments)])


def test_the_command_prints_one_json_object(recipe, tmp_path):
    result = run(recipe, "--text-file", tmp_path / "text.txt", "--window", 16, "--json")
    assert result.exit_code == 0, result.stderr
    ranking = json.loads(result.stdout)
    assert {c["name"] for c in ranking["candidates"]} == set(THREE)
    benefits = [c["benefit"] for c in ranking["candidates"]]
    assert benefits == sorted(benefits, reverse=True)


def test_the_command_shows_a_table_of_the_experts_that_were_named(recipe, tmp_path):
    result = run(
        recipe, "--text-file", tmp_path / "text.txt", "--window", 16, "--expert", "first",
        "--expert", "third", "--alphas", "0.5,1",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "first" in result.stdout
    assert "third" in result.stdout
    assert "second" not in result.stdout
    assert "nats per token under the base" in result.stderr
    assert "rank correlation" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of them is needed"),
        (["--text-file", "t", "--data", "d"], "one of them is needed"),
        (["--text-file", "t", "--expert", "frist"], "'first'"),
        (["--text-file", "t", "--alphas", "strong"], "must be a number"),
        (["--text-file", "missing.txt"], "missing.txt cannot be read"),
    ],
)
def test_what_cannot_be_ranked_is_refused_with_exit_code_2(recipe, arguments, message):
    result = run(recipe, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
