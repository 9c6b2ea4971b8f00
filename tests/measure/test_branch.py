"""Texts at several strengths at once: the same as each by itself, with less to read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proxytune.errors import InvalidRequest, PromptTooLong
from proxytune.measure.branch import branch
from proxytune.model import ProxyTuned
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.testing import toy_model, toy_recipe
from tests.support.tiny import tiny_adapter, tiny_model

TWO = {"first": 1.0, "second": 0.7}
PROMPTS = ["ab", "the sea", "c"]
POINTS = [(0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.0, 0.3), (1.0, 0.5), (-0.5, 2.0)]


def prompts_of(model, texts):
    return [model.job(Request(text, SamplingParams(max_new_tokens=1))).prompts for text in texts]


@pytest.mark.parametrize(
    "policy", [Policy(), Policy("majority"), Policy(schedule=((0, 0.0), (6, 1.0)))], ids=str
)
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_new_tokens=20),
        SamplingParams(max_new_tokens=20, ignore_eos=True),
        SamplingParams(max_new_tokens=20, stop=("e", "xy")),
        SamplingParams(max_new_tokens=1),
    ],
    ids=["plain", "ignore_eos", "stop", "one token"],
)
def test_each_text_is_what_its_strengths_give_alone(policy, sampling):
    model = toy_model(recipe=replace(toy_recipe(TWO), policy=policy), memory=0.5)
    found = branch(model.ensemble, prompts_of(model, PROMPTS), POINTS, sampling, batch_size=2)
    for prompt, texts, token_ids in zip(PROMPTS, found.texts, found.token_ids, strict=True):
        for (first, second), text, ids in zip(POINTS, texts, token_ids, strict=True):
            alone = model.generate(prompt, sampling, experts={"first": first, "second": second})
            assert text == alone.text
            assert ids == alone.token_ids


def test_what_points_agree_on_is_read_once():
    """Strengths this close never part, so that five of them read what one does."""
    model = toy_model(eos_logit=-100.0, memory=0.5)
    points = [(0.5 + n * 1e-6,) for n in range(5)]
    sampling = SamplingParams(max_new_tokens=16)
    found = branch(model.ensemble, prompts_of(model, ["a"]), points, sampling)
    assert found.num_chosen == 5 * 16
    assert found.num_read == 15  # the last token is read by nobody


def test_points_that_part_are_read_apart_from_there_on():
    model = toy_model(eos_logit=-100.0, memory=0.5)
    sampling = SamplingParams(max_new_tokens=16)
    found = branch(model.ensemble, prompts_of(model, ["a"]), [(0.0,), (2.0,)], sampling)
    one, other = found.token_ids[0]
    shared = next(n for n in range(16) if one[n] != other[n])
    assert found.num_read == shared + 2 * (15 - shared)


def test_progress_counts_prompts():
    model = toy_model()
    seen = []
    branch(
        model.ensemble,
        prompts_of(model, PROMPTS),
        [(1.0,)],
        SamplingParams(max_new_tokens=2),
        batch_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(repetition_penalty=1.1),
        SamplingParams(logit_bias=((1, 2.0),)),
        SamplingParams(min_new_tokens=2),
    ],
)
def test_settings_under_which_texts_do_not_share_are_refused(sampling):
    model = toy_model()
    with pytest.raises(InvalidRequest, match="only if they are greedy"):
        branch(model.ensemble, prompts_of(model, ["a"]), [(1.0,)], sampling)


def test_a_text_that_would_not_fit_is_refused_before_anything_is_read():
    model = toy_model(max_context=8)
    with pytest.raises(PromptTooLong):
        branch(
            model.ensemble,
            prompts_of(model, ["abcd"]),
            [(1.0,)],
            SamplingParams(max_new_tokens=5),
        )


def test_texts_of_real_layers_are_those_of_each_point_alone(tmp_path):
    """Ragged prompts, two adapters on one small model, and copies of KV caches where texts part."""
    tiny_model(tmp_path / "base", seed=1)
    tiny_model(tmp_path / "small", seed=2)
    for seed, name in enumerate(TWO, start=3):
        tiny_adapter(tmp_path / "small", tmp_path / name, seed=seed)
    small = ModelSpec(model=str(tmp_path / "small"))
    model = ProxyTuned.load(
        Recipe(
            ModelSpec(model=str(tmp_path / "base")),
            tuple(ExpertSpec(n, ModelSpec(adapter=str(tmp_path / n)), small) for n in TWO),
        )
    )
    prompts = ["the rain in Spain", "a", "stays mainly in the plain"]
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    found = branch(model.ensemble, prompts_of(model, prompts), POINTS, sampling)
    parted = 0
    for prompt, token_ids in zip(prompts, found.token_ids, strict=True):
        for (first, second), ids in zip(POINTS, token_ids, strict=True):
            alone = model.generate(prompt, sampling, experts={"first": first, "second": second})
            assert ids == alone.token_ids
        parted += len(set(token_ids)) > 1
    assert parted  # something was there to be parted
