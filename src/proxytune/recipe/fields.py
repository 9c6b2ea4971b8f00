"""Steering in fields that hold text and numbers alone, such as `vllm_xargs`: read, and written.

    {"alpha": 0.3, "expert": ["legal=0.7", "medical"], "policy": "gate_sure", "combine": "union"}

vLLM's plugin and the local server read the same fields here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.errors import InvalidRequest
from proxytune.policy import settings_in
from proxytune.recipe.recipe import Recipe
from proxytune.request import Steering

KEYS = ("alpha", "expert", "policy", "combine")
"""The fields."""


def read_steering(recipe: Recipe, fields: Mapping[str, Any]) -> Steering | None:
    """Return the steering that fields ask for; None if they leave everything to the recipe.

    Args:
        recipe: Has the experts and their strengths.
        fields: `alpha` is a number. `expert` is a name, several in a list or separated by commas, each with
            or without its own strength (`legal=0.5`), or an object of strengths by name. `policy` is a name,
            or settings as an object or as its JSON. `combine` is a name. Null is absence; other keys are not
            looked at.

    Raises:
        InvalidRequest: A value cannot be used; the message names the field.
        UnknownExpert: The recipe has no expert of that name.
    """
    given = {key: fields[key] for key in KEYS if fields.get(key) is not None}
    if not given:
        return None
    alpha, policy, combine = (given.get(key) for key in ("alpha", "policy", "combine"))
    if isinstance(policy, str):
        policy = settings_in(policy)
    steering = Steering(alpha, None, policy, combine)
    if "expert" in given:
        chosen = recipe.mixed(read_experts(given["expert"]), alpha)
        steering = Steering(chosen.alpha, chosen.experts, policy, combine)
    recipe.policy_for(steering)
    return steering


def read_experts(value: Any) -> dict[str, float | None]:
    """Return the names in the field `expert` with their own strengths, None for those without.

    Raises:
        InvalidRequest: It holds no names, or one twice. Strengths are not checked.
    """
    if isinstance(value, Mapping):
        items: Sequence[Any] = list(value.items())
    elif isinstance(value, str):
        items = [part.strip() for part in value.split(",")]
    elif isinstance(value, Sequence):
        items = list(value)
    else:
        items = [value]
    experts: dict[str, float | None] = {}
    for item in items:
        name, strength = item if isinstance(item, tuple) else (item, None)
        if isinstance(name, str) and not isinstance(item, tuple) and "=" in name:
            name, _, text = (part.strip() for part in name.partition("="))
            try:
                strength = float(text)
            except ValueError:
                strength = text
        if not isinstance(name, str) or not name:
            raise InvalidRequest(
                f"expert is {value!r}, and must be a name or names.\n"
                'hint: "legal", ["legal", "medical"], or with strengths "legal=0.5,medical=1"'
            )
        if name in experts:
            raise InvalidRequest(f"expert names {name!r} twice.\nhint: name each once")
        experts[name] = strength
    if not experts:
        raise InvalidRequest("expert is empty.\nhint: leave it out for the recipe's default")
    return experts


def write_steering(steering: Steering) -> dict[str, Any]:
    """Return the fields for a steering; `read_steering` makes the same of them."""
    fields: dict[str, Any] = {}
    if steering.alpha is not None:
        fields["alpha"] = steering.alpha
    experts = steering.experts
    if isinstance(experts, Mapping):
        fields["expert"] = [f"{name}={float(alpha)!r}" for name, alpha in experts.items()]
    elif experts is not None:
        fields["expert"] = [experts] if isinstance(experts, str) else list(experts)
    if steering.policy is not None:
        policy = steering.policy
        fields["policy"] = policy if isinstance(policy, str) else json.dumps(dict(policy))
    if steering.combine is not None:
        fields["combine"] = steering.combine
    return fields
