"""How a request over HTTP is steered: its model's name, `proxytune` and `vllm_xargs`, read together.

Both servers read them here: the local one, and vLLM's behind `vllm.py`. A request may use any of the three;
where two of them contradict each other, it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from proxytune.errors import InvalidRequest, UserError, did_you_mean
from proxytune.policy import COMBINATIONS, POLICIES, Policy
from proxytune.recipe.fields import KEYS, read_steering
from proxytune.recipe.recipe import Recipe
from proxytune.request import Steering
from proxytune.server.reasoning import has_reasoning
from proxytune.server.schema import MAX_EXPERTS, InvalidField, SteeringFields
from proxytune.text.prompts import PromptFormat

Json = dict[str, Any]

MAX_NAMES_SHOWN = 20
"""Maximum number of models that an error lists."""


class UnknownModel(InvalidRequest):
    """A request names a model that is not served."""


def model_names(recipe: Recipe, name: str) -> dict[str, str | None]:
    """Return valid values of `model`, each with the expert it stands for; None is the recipe's default."""
    return {name: None} | {f"{name}:{expert.name}": expert.name for expert in recipe.experts}


def expert_named(recipe: Recipe, name: str, model: str) -> str | None:
    """Return the expert that a model's name stands for; None is the recipe's default.

    Raises:
        UnknownModel: There is no such model.
    """
    names = model_names(recipe, name)
    if model not in names:
        shown = list(names)[:MAX_NAMES_SHOWN]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        raise UnknownModel(
            f"there is no model {model[:200]!r} here; the models are: {', '.join(shown)}{more}"
        )
    return names[model]


def about_recipe(recipe: Recipe, name: str, *, base: PromptFormat, limits: Json) -> Json:
    """Return a description of a recipe and of what a request may ask for.

    Args:
        recipe: What is served.
        name: What it is called.
        base: How its base reads prompts.
        limits: The server's own.
    """
    model = recipe.base

    def honoured(policies: Mapping[str, Policy]) -> list[str]:
        return [key for key, each in policies.items() if model.api is None or not each.reads_base]

    return {
        "name": name,
        # Only the last part: a path would reveal where files are on the server.
        "base": model.api.model if model.api else (model.model or "").rsplit("/", 1)[-1],
        # A base without a chat format reads conversations as plain text, and few such models answer well.
        "has_chat": not base.joins_messages,
        # A template may stand around one question, without the turns before it.
        "has_turns": not base.is_single_turn,
        "has_reasoning": has_reasoning(base),
        "default_experts": list(recipe.named()),
        "experts": [{"name": e.name, "alpha": e.alpha} for e in recipe.experts],
        "steering": recipe.policy.to_dict(),
        "combine": recipe.policy.combine,
        "policies": honoured({each: Policy(name=each) for each in POLICIES}),
        "combinations": honoured({each: Policy(combine=each) for each in COMBINATIONS}),
        "limits": limits,
        "version": version("proxytune"),
    }


def steering_of(
    recipe: Recipe, *, expert: str | None, fields: SteeringFields | None, xargs: Any
) -> Steering:
    """Return how a request is steered.

    Args:
        recipe: What is served.
        expert: The expert that its model's name stands for.
        fields: Its field `proxytune`.
        xargs: Its field `vllm_xargs`, of which other keys than those of `recipe/fields.py` are not looked at.

    Raises:
        UnknownExpert: The recipe has no expert of that name.
        InvalidRequest: A value cannot be used, or two contradict each other; an `InvalidField` names where.
    """
    found, source = Steering(experts=expert), "model"
    if fields is not None:
        try:
            asked = fields.as_steering()
        except InvalidRequest as error:
            raise InvalidField(f"proxytune: {error}", "proxytune") from error
        found = _joined(found, source, asked, "proxytune", recipe)
        source = "proxytune" if expert is None else "model or proxytune"
    if xargs is not None:
        if not isinstance(xargs, Mapping):
            raise InvalidField("vllm_xargs must be an object", "vllm_xargs")
        try:
            read = read_steering(recipe, xargs)
        except UserError as error:
            raise InvalidField(f"vllm_xargs: {error}", "vllm_xargs") from error
        if read is not None:
            found = _joined(found, source, read, "vllm_xargs", recipe)
    if len(_names(found)) > MAX_EXPERTS:
        raise InvalidField(
            f"vllm_xargs: expert names {len(_names(found)):,} experts, and {MAX_EXPERTS} may steer one text",
            "vllm_xargs",
        )
    recipe.strengths(found)
    try:
        recipe.policy_for(found)
    except InvalidRequest as error:
        raise InvalidField(
            str(error), "proxytune" if fields is not None else "vllm_xargs"
        ) from error
    return found


def check_keys(xargs: Mapping[str, Any]) -> None:
    """Refuse what `vllm_xargs` says to other plugins of vLLM, for a server that has none.

    Raises:
        InvalidField: It has a key that is none of ours.
    """
    for key, value in xargs.items():
        if key not in KEYS and value is not None:
            raise InvalidField(
                f"vllm_xargs has {key[:100]!r}, and only {', '.join(KEYS)} can be honoured here"
                f"{did_you_mean(key[:100], KEYS)}",
                "vllm_xargs",
            )


def _joined(one: Steering, source: str, other: Steering, place: str, recipe: Recipe) -> Steering:
    """Return what two parts of a request say together.

    Raises:
        InvalidField: They contradict each other.
    """

    def refuse(what: str) -> InvalidField:
        return InvalidField(
            f"{source} asks for one {what} and {place} for another.\nhint: give it in one of them",
            place,
        )

    names, own = _names(one), _names(other)
    if names and own and names != own:
        raise refuse("expert")
    experts = other.experts if isinstance(other.experts, Mapping) or not names else one.experts
    for each in (one.experts, other.experts):
        if (
            isinstance(each, Mapping)
            and isinstance(experts, Mapping)
            and dict(each) != dict(experts)
        ):
            raise refuse("strength")
    if None not in (one.alpha, other.alpha) and one.alpha != other.alpha:
        raise refuse("strength")
    if None not in (one.policy, other.policy) and (
        recipe.policy.changed(one.policy, "sum") != recipe.policy.changed(other.policy, "sum")
    ):
        raise refuse("policy")
    if None not in (one.combine, other.combine) and one.combine != other.combine:
        raise refuse("combination")
    alpha = one.alpha if other.alpha is None else other.alpha
    policy = one.policy if other.policy is None else other.policy
    combine = one.combine if other.combine is None else other.combine
    try:
        return Steering(alpha, experts, policy, combine)
    except InvalidRequest as error:
        raise InvalidField(str(error), place) from error


def _names(steering: Steering) -> frozenset[str]:
    experts = steering.experts
    return frozenset((experts,) if isinstance(experts, str) else experts or ())
