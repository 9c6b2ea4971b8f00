"""How a request is steered, read from `extra_args`, and the row of a batch that this belongs to.

    SamplingParams(extra_args={"alpha": 0.5, "expert": "legal"})          in Python
    extra_body={"vllm_xargs": {"alpha": 0.5, "expert": ["a=0.5", "b"]}}   over HTTP

vLLM checks a request in its front end, which has no model, and batches rows in its workers. So every process
has a `Menu` of what the recipe offers, and each worker has `Rows`, which `processor.py` fills and the model
reads. The fields themselves are read in `recipe/fields.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from proxytune.errors import InvalidRequest, UserError, closest, did_you_mean
from proxytune.grants import NOTHING, Grants
from proxytune.policy import Policy
from proxytune.recipe.fields import KEYS, read_steering
from proxytune.recipe.recipe import Recipe
from proxytune.request import Steering


class RowSteering(NamedTuple):
    """How one row is steered."""

    strengths: tuple[float, ...]
    """Of each served expert, in the recipe's order; 0 where it does not steer."""
    policy: Policy


@dataclass(frozen=True)
class Menu:
    """What requests can choose from.

    Args:
        recipe: The recipe with only the served experts.
        is_fixed: Why requests may not choose; empty if they may.
        grants: What the caller allows.
    """

    recipe: Recipe
    is_fixed: str = ""
    grants: Grants = NOTHING

    @property
    def default(self) -> RowSteering:
        """How a request that asks for nothing is steered."""
        return self.row(Steering())

    def asked(self, extra_args: Mapping[str, Any] | None) -> RowSteering | None:
        """Return how a request asks to be steered; None if it leaves that to the recipe.

        Args:
            extra_args: The fields of `recipe/fields.py`, and others that may be another plugin's.

        Raises:
            InvalidRequest: A value cannot be used, or vLLM cannot honour it; the message names the field.
            UnknownExpert: The recipe has no expert of that name.
        """
        given = {key: value for key, value in (extra_args or {}).items() if value is not None}
        for key in given:
            if key not in KEYS and closest(key.lower(), KEYS, cutoff=0.7):
                raise InvalidRequest(
                    f"{key} is not a field of a request{did_you_mean(key.lower(), KEYS)}"
                )
        named = " and ".join(key for key in KEYS if key in given)
        if named and self.is_fixed:
            raise InvalidRequest(f"{named} cannot be set per request: {self.is_fixed}")
        steering = read_steering(self.recipe, given)
        return None if steering is None else self.row(steering)

    def row(self, steering: Steering) -> RowSteering:
        """Return how a row with this steering is steered.

        Raises:
            InvalidRequest: vLLM cannot honour its policy, or the recipe cannot.
            UnknownExpert: The recipe has no expert of that name.
        """
        policy = self.recipe.policy_for(steering)
        if policy.has_positions:
            raise InvalidRequest(
                "policy has a schedule, and vLLM does not tell a model where its prompt ended.\n"
                "hint: leave schedule out, or use `proxytune serve` without --engine vllm"
            )
        strengths = self.recipe.strengths(steering)
        in_order = tuple(strengths.get(expert.name, 0.0) for expert in self.recipe.experts)
        return RowSteering(in_order, policy)


_SCORES_PROMPT = {
    "prompt_logprobs": "echo with logprobs, over HTTP",
    "prompt_logprob_token_ids": "of vLLM's second model runner",
}
"""Fields of vLLM's `SamplingParams` that ask for a prompt's scores, and where they come from."""

MENU: Menu | None = None
"""The menu of the recipe that this process serves; None in a process that serves another model."""


def set_menu(menu: Menu) -> None:
    """Let requests of this process choose from `menu`."""
    global MENU
    MENU = menu


def check_request(params: Any) -> None:
    """Check what a request asks for.

    Args:
        params: vLLM's `SamplingParams`.

    Raises:
        ValueError: It cannot be honoured. vLLM answers it with status 400.
    """
    if MENU is None:
        return
    try:
        asked = MENU.asked(getattr(params, "extra_args", None))
    except UserError as error:
        raise ValueError(str(error)) from error
    scored = next((key for key in _SCORES_PROMPT if getattr(params, key, None) is not None), None)
    if asked is not None and scored is not None and asked != MENU.default:
        raise ValueError(
            f"{scored} ({_SCORES_PROMPT[scored]}) and other steering than the recipe's are both "
            "given, and a prompt is scored as the recipe says.\n"
            f"hint: leave {scored} out, or {', '.join(KEYS[:-1])} and {KEYS[-1]}"
        )


class Rows:
    """How the rows are steered whose logits a worker computes next.

    Args:
        default: How rows that ask for nothing are steered.
    """

    def __init__(self, default: RowSteering) -> None:
        self.default = default
        self.alone: int | None = None
        """The only member whose logits every row gets, unsteered; None for the steered base."""
        self._next: list[RowSteering] | None = None

    def expect(self, rows: Sequence[RowSteering | None] | None) -> None:
        """Set how the rows to be computed next are steered; None for rows that ask for nothing."""
        if rows is not None and all(row is None for row in rows):
            rows = None
        self._next = None if rows is None else [row or self.default for row in rows]

    def take(self, num_rows: int) -> list[RowSteering]:
        """Return how the rows being computed are steered.

        What was set is returned once: rows of a prompt that is scored may follow in the same step.
        """
        rows, self._next = self._next, None
        if rows is not None and len(rows) != num_rows:
            raise RuntimeError(
                f"vLLM computes logits of {num_rows} rows where its batch has {len(rows)}, so it is not "
                "known which row asks for what. This is a bug of proxytune's plugin with this vLLM."
            )
        return [self.default] * num_rows if rows is None else rows
