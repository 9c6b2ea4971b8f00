"""Requests are checked when they are built, and say what is wrong."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.errors import InvalidRequest
from proxytune.request import Request, SamplingParams, Steering

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 200),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=3),
    st.tuples(st.text(max_size=2)),
)
fields = list(SamplingParams.__dataclass_fields__)


def test_the_default_is_greedy():
    assert SamplingParams().is_greedy
    assert not SamplingParams(temperature=0.7).is_greedy


@given(st.dictionaries(st.sampled_from(fields), anything, max_size=4))
def test_any_settings_are_either_taken_or_refused_by_name(settings):
    """Fuzz: nothing but InvalidRequest comes out, and what is taken is in range."""
    try:
        params = SamplingParams(**settings)
    except InvalidRequest as error:
        assert any(name in str(error) for name in fields)
        return
    assert params.max_new_tokens >= max(1, params.min_new_tokens)
    assert math.isfinite(params.temperature) and params.temperature >= 0
    assert 0 < params.top_p <= 1
    assert 0 <= params.min_p <= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"min_new_tokens": 5, "max_new_tokens": 4},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": "abc"},
        {"stop_token_ids": (-1,)},
        {"logprobs": 101},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
    ],
)
def test_impossible_or_contradictory_sampling_is_refused(settings):
    with pytest.raises(InvalidRequest, match=list(settings)[-1]):
        SamplingParams(**settings)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 1e38, 10**400, "1", True])
def test_an_alpha_that_is_not_a_finite_number_is_refused(alpha):
    with pytest.raises(InvalidRequest, match="alpha"):
        Request("x", alpha=alpha)
    with pytest.raises(InvalidRequest, match="alpha of expert 'a'"):
        Request("x", experts={"a": alpha})


@pytest.mark.parametrize("prompt", ["", [], (), [{"role": "user", "content": ""}]])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(InvalidRequest, match="empty"):
        Request(prompt)


@pytest.mark.parametrize(
    "prompt", [7, None, b"bytes", [{"role": "user"}], [1, "x"], [1, -1], [1.5]]
)
def test_a_prompt_of_no_known_kind_is_refused(prompt):
    with pytest.raises(InvalidRequest):
        Request(prompt)


def test_saying_the_strength_twice_is_refused():
    with pytest.raises(InvalidRequest, match="given twice"):
        Request("x", alpha=1.0, experts={"a": 0.5})


def test_steering_takes_what_it_leaves_open_from_a_default():
    own = {"a": 0.5, "b": 2.0}
    assert Steering().over(Steering(0.1, "a")) == Steering(0.1, "a")
    assert Steering(0.3).over(Steering(0.1, "a")) == Steering(0.3, "a")
    assert Steering(experts=("b",)).over(Steering(0.1, "a")) == Steering(0.1, ("b",))
    assert Steering(experts=own).over(Steering(0.1)) == Steering(experts=own)
    assert Steering(0.3).over(Steering(experts=own)) == Steering(0.3, ("a", "b"))
    assert Steering().over(Steering(experts=own)) == Steering(experts=own)


def test_text_messages_and_token_ids_are_told_apart():
    assert not Request("x").is_token_ids
    assert not Request([{"role": "user", "content": "x"}]).is_token_ids
    assert Request([1, 2]).is_token_ids


@pytest.mark.parametrize(
    "bias", [((1, float("nan")),), ((-1, 1.0),), ((1, 1.0), (1, 2.0)), {1: 1.0}, ((1, 1e5),)]
)
@pytest.mark.parametrize("name", ["logit_bias", "first_logit_bias"])
def test_a_bias_that_makes_no_sense_is_refused(name, bias):
    with pytest.raises(InvalidRequest, match=f"^{name}"):
        SamplingParams(**{name: bias})
