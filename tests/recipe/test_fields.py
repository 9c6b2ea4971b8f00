"""Steering in fields of text and numbers; `tests/integrations/vllm/test_request.py` has each value."""

from __future__ import annotations

import json

import pytest

from proxytune.errors import InvalidRequest
from proxytune.policy import MAX_JSON, Policy
from proxytune.recipe.fields import read_experts, read_steering, write_steering
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Steering

SMALL = ModelSpec(model="owner/small")


def recipe(policy: Policy | None = None) -> Recipe:
    experts = tuple(
        ExpertSpec(name, ModelSpec(model=f"owner/{name}"), SMALL, alpha)
        for name, alpha in (("legal", 0.9), ("medical", 0.5), ("v1.2", 1.0))
    )
    return Recipe(ModelSpec(model="owner/base"), experts, policy or Policy())


def test_null_is_absence():
    assert read_steering(recipe(), {"alpha": None, "policy": None, "other": 3}) is None
    asked = read_steering(recipe(), {"alpha": 0, "expert": None, "combine": "union"})
    assert asked == Steering(0, combine="union")


def test_names_keep_their_order_and_strengths():
    assert read_experts("b=0.5, a") == {"b": 0.5, "a": None}
    assert read_experts(["a", "b=-1"]) == {"a": None, "b": -1.0}


def test_what_does_not_go_together_with_the_recipe_is_refused():
    with pytest.raises(InvalidRequest, match="nudge and combine is union"):
        read_steering(recipe(Policy("union")), {"policy": "nudge"})


def test_a_long_text_is_not_parsed_as_a_policy():
    long = json.dumps({"clip": 1, "schedule": [[]] * MAX_JSON})
    with pytest.raises(InvalidRequest, match=r"policy has .* characters, and may have 65,536"):
        read_steering(recipe(), {"policy": long})


@pytest.mark.parametrize(
    "steering",
    [
        Steering(),
        Steering(0.25),
        Steering(experts="legal"),
        Steering(1e-5, ("legal", "v1.2")),
        Steering(experts={"legal": 1 / 3, "v1.2": -1e-5, "medical": 0}),
        Steering(policy="gate_sure", combine="union"),
        Steering(0.5, policy={"policy": "gate_sure", "threshold": 0.1, "clip": 3}),
    ],
    ids=str,
)
def test_steering_written_as_fields_is_read_back_as_it_was(steering):
    fields = write_steering(steering)
    for value in fields.values():  # what vllm_xargs can hold
        items = value if isinstance(value, list) else [value]
        assert all(isinstance(item, str | int | float) for item in items)
    asked = read_steering(recipe(), json.loads(json.dumps(fields))) or Steering()
    assert recipe().strengths(asked) == recipe().strengths(steering)
    assert recipe().policy_for(asked) == recipe().policy_for(steering)
