"""What a request to a recipe inside vLLM may ask for. vLLM itself is not needed here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from proxytune.errors import InvalidRequest, UnknownExpert
from proxytune.integrations.vllm import request as module
from proxytune.integrations.vllm.request import Menu, Rows, RowSteering, check_request
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec

SMALL = ModelSpec(model="owner/small")


def recipe(default: str | None = "legal") -> Recipe:
    experts = tuple(
        ExpertSpec(name, ModelSpec(model=f"owner/{name}"), SMALL, alpha)
        for name, alpha in (("legal", 0.9), ("medical", 0.5), ("v1.2", 1.0))
    )
    return Recipe(ModelSpec(model="owner/base"), experts, default_expert=default)


MENU = Menu(recipe())


@pytest.mark.parametrize(
    ("asked", "strengths"),
    [
        ({"alpha": 0}, (0, 0, 0)),
        ({"alpha": 0.3}, (0.3, 0, 0)),
        ({"expert": "medical"}, (0, 0.5, 0)),
        ({"expert": "v1.2", "alpha": 2}, (0, 0, 2)),
        ({"expert": ["legal", "medical"]}, (0.9, 0.5, 0)),
        ({"expert": "legal, medical"}, (0.9, 0.5, 0)),
        ({"expert": ["legal", "medical"], "alpha": 0.25}, (0.25, 0.25, 0)),
        ({"expert": "legal=0.5,medical=-1"}, (0.5, -1, 0)),
        ({"expert": ["legal=0.5", "medical"]}, (0.5, 0.5, 0)),
        ({"expert": ["legal=0.5", "medical"], "alpha": 2}, (0.5, 2, 0)),
        ({"expert": {"legal": 0.5, "v1.2": 1}}, (0.5, 0, 1)),
        ({"expert": {"legal": 0}}, (0, 0, 0)),
    ],
)
def test_a_request_names_strengths_and_experts(asked, strengths):
    assert MENU.asked(asked) == RowSteering(strengths, Policy())


@pytest.mark.parametrize(
    ("asked", "policy"),
    [
        ({"policy": "gate_agree"}, Policy("union", "gate_agree")),
        ({"policy": '{"clip": 2}'}, Policy("union", clip=2.0)),
        ({"policy": {"clip": 2, "policy": None}}, Policy("union", clip=2.0)),
        ({"combine": "majority"}, Policy("majority", clip=1.5)),
        ({"policy": "constant", "combine": "sum", "expert": "medical"}, Policy()),
        ({"alpha": 1}, Policy("union", clip=1.5)),
    ],
)
def test_a_request_names_its_policy(asked, policy):
    menu = Menu(replace(recipe(), policy=Policy("union", clip=1.5)))
    assert menu.asked(asked).policy == policy


@pytest.mark.parametrize(
    "asked", [None, {}, {"alpha": None, "expert": None}, {"kv_transfer_params": {}}]
)
def test_a_request_that_asks_for_nothing_is_left_to_the_recipe(asked):
    assert MENU.asked(asked) is None
    assert MENU.default == RowSteering((0.9, 0, 0), Policy())
    assert Menu(recipe(default=None)).default.strengths == (0.9, 0.5, 1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"alpha": "0.5"}, "alpha is '0.5'"),
        ({"alpha": True}, "alpha is True"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": [0.5]}, "alpha is"),
        ({"expert": "nonsense"}, "no expert 'nonsense'; it has legal, medical, v1.2"),
        ({"expert": 3}, "expert is 3"),
        ({"expert": ["legal", 0.5]}, "expert is"),
        ({"expert": ""}, "expert is ''"),
        ({"expert": []}, "expert is empty"),
        ({"expert": ["legal", "legal=1"]}, "expert names 'legal' twice"),
        ({"expert": "legal=much"}, "expert 'legal' is 'much'"),
        ({"expert": "legal=inf"}, "expert 'legal' is inf"),
        ({"expert": "=1"}, "expert is '=1'"),
        ({"expert": "legal=0.5", "alpha": 1}, "alpha is given, and every expert brings its own"),
        ({"policy": "kl_mtch"}, "policy is 'kl_mtch'"),
        ({"policy": "{"}, "policy is not JSON"),
        ({"policy": '{"clip": -1}'}, "clip is -1"),
        ({"policy": 3}, "policy is 3"),
        ({"policy": ["gate_sure"]}, "policy is"),
        (
            {"policy": '{"schedule": [[0, 1], [9, 0]]}'},
            "policy has a schedule.*\n.*proxytune serve",
        ),
        ({"combine": "product"}, "combine is 'product'"),
        ({"combine": ["sum"]}, "combine is"),
        ({"policies": "nudge"}, "policies is not a field.*\n.*policy"),
        ({"experts": "legal"}, "experts is not a field.*\n.*expert"),
        ({"Alpha": 1}, "Alpha is not a field.*\n.*alpha"),
    ],
)
def test_a_wrong_value_is_refused_with_the_name_of_its_field(asked, said):
    with pytest.raises((InvalidRequest, UnknownExpert), match=said):
        MENU.asked(asked)


def test_where_requests_cannot_choose_they_are_told_why():
    menu = Menu(recipe(), is_fixed="the reason")
    assert menu.asked({}) is None
    with pytest.raises(
        InvalidRequest, match="alpha and expert cannot be set per request: the reason"
    ):
        menu.asked({"alpha": 1, "expert": "legal"})
    with pytest.raises(InvalidRequest, match="policy cannot be set per request: the reason"):
        menu.asked({"policy": "nudge"})


def params(**values: object) -> SimpleNamespace:
    return SimpleNamespace(**{"extra_args": None, "prompt_logprobs": None, **values})


def test_a_prompt_is_scored_with_the_recipes_strengths_alone(monkeypatch):
    monkeypatch.setattr(module, "MENU", MENU)
    check_request(params(prompt_logprobs=0))
    check_request(params(prompt_logprobs=0, extra_args={"alpha": 0.9}))
    check_request(params(prompt_logprobs=0, extra_args={"policy": "constant"}))
    check_request(params(extra_args={"alpha": 0.1}))
    with pytest.raises(ValueError, match="prompt_logprobs"):
        check_request(params(prompt_logprobs=0, extra_args={"alpha": 0.1}))
    with pytest.raises(ValueError, match="prompt_logprobs"):
        check_request(params(prompt_logprobs=0, extra_args={"policy": "gate_agree"}))
    check_request(params(prompt_logprob_token_ids=[[1]]))
    with pytest.raises(ValueError, match="leave prompt_logprob_token_ids out"):
        check_request(params(prompt_logprob_token_ids=[[1]], extra_args={"alpha": 0.1}))


def test_a_process_that_serves_another_model_checks_nothing(monkeypatch):
    monkeypatch.setattr(module, "MENU", None)
    check_request(params(extra_args={"alpha": "its own meaning"}))


def row(*strengths: float, policy: Policy | None = None) -> RowSteering:
    return RowSteering(strengths, policy or Policy())


def test_rows_have_what_they_ask_for_and_the_default_elsewhere():
    default, zero, gated = row(0.9, 0.0), row(0.0, 0.0), row(0.9, 0.0, policy=Policy("union"))
    rows = Rows(default)
    assert rows.take(3) == [default] * 3
    rows.expect([None, zero, gated])
    assert rows.take(3) == [default, zero, gated]
    assert rows.take(3) == [default] * 3  # a prompt that is scored, in the same step
    rows.expect([None, None])
    assert rows.take(5) == [default] * 5


def test_rows_that_are_not_those_expected_are_no_guess():
    rows = Rows(row(0.9))
    rows.expect([None, row(0.5)])
    with pytest.raises(RuntimeError, match="3 rows where its batch has 2"):
        rows.take(3)
