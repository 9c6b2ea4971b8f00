"""A request's strengths, read from `extra_args`, and the row of a batch that they belong to.

    SamplingParams(extra_args={"alpha": 0.5, "expert": "legal"})          in Python
    extra_body={"vllm_xargs": {"alpha": 0.5, "expert": ["a=0.5", "b"]}}   over HTTP

vLLM checks a request in its front end, which has no model, and batches rows in its workers. So every process
has a `Menu` of what the recipe offers, and each worker `RowStrengths`, which `processor.py` fills and the
model reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxytune.errors import InvalidRequest, UserError, closest, did_you_mean
from proxytune.request import Steering

if TYPE_CHECKING:
    from proxytune.recipe.recipe import Recipe

KEYS = ("alpha", "expert")
"""Keys of a request's `extra_args` that this plugin reads."""

Strengths = tuple[float, ...]
"""The strength of each served expert, in the recipe's order; 0 where it does not steer."""


@dataclass(frozen=True)
class Menu:
    """What requests can choose from.

    Args:
        recipe: The recipe with only the served experts.
        is_fixed: Why requests may not choose; empty if they may.
    """

    recipe: Recipe
    is_fixed: str = ""

    @property
    def default(self) -> Strengths:
        """The strengths of a request that asks for nothing."""
        return self._in_order(self.recipe.strengths())

    def strengths(self, extra_args: Mapping[str, Any] | None) -> Strengths | None:
        """Return the strengths that a request asks for; None if it leaves them to the recipe.

        Args:
            extra_args: `alpha` is a number. `expert` is a name, several in a list or separated by commas,
                each with or without its own strength (`legal=0.5`), or an object of strengths by name.

        Raises:
            InvalidRequest: A value cannot be used; the message names the field.
            UnknownExpert: The recipe has no expert of that name.
        """
        given = {key: value for key, value in (extra_args or {}).items() if value is not None}
        for key in given:
            # Other keys may be another plugin's.
            if key not in KEYS and closest(key.lower(), KEYS, cutoff=0.7):
                raise InvalidRequest(
                    f"{key} is not a field of a request{did_you_mean(key.lower(), KEYS)}"
                )
        if not any(key in given for key in KEYS):
            return None
        if self.is_fixed:
            named = " and ".join(key for key in KEYS if key in given)
            raise InvalidRequest(f"{named} cannot be set per request: {self.is_fixed}")
        alpha = given.get("alpha")
        own = _named(given["expert"]) if "expert" in given else None
        steering = Steering(alpha) if own is None else self.recipe.mixed(own, alpha)
        return self._in_order(self.recipe.strengths(steering))

    def _in_order(self, strengths: Mapping[str, float]) -> Strengths:
        return tuple(strengths.get(expert.name, 0.0) for expert in self.recipe.experts)


def _named(value: Any) -> dict[str, float | None]:
    """Return names with their own strengths, None for those without."""
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
        asked = MENU.strengths(getattr(params, "extra_args", None))
    except UserError as error:
        raise ValueError(str(error)) from error
    has_prompt = getattr(params, "prompt_logprobs", None) is not None
    if asked is not None and has_prompt and asked != MENU.default:
        raise ValueError(
            "prompt_logprobs (echo with logprobs, over HTTP) and alpha or expert are both given, and a "
            "prompt is scored with the recipe's own strengths.\nhint: leave one of them out"
        )


class RowStrengths:
    """The strengths of the rows whose logits a worker computes next.

    Args:
        default: Strengths of rows that ask for nothing.
    """

    def __init__(self, default: Strengths) -> None:
        self.default = default
        self._next: list[Strengths] | None = None

    def expect(self, rows: Sequence[Strengths | None] | None) -> None:
        """Set the strengths of the rows to be computed next; None for rows that ask for nothing."""
        if rows is not None and all(row is None for row in rows):
            rows = None
        self._next = None if rows is None else [row or self.default for row in rows]

    def take(self, num_rows: int) -> list[Strengths] | None:
        """Return the strengths of the rows being computed; None for the default in all of them.

        They are returned once: rows of a prompt that is scored may follow in the same step.
        """
        rows, self._next = self._next, None
        if rows is not None and len(rows) != num_rows:
            raise RuntimeError(
                f"vLLM computes logits of {num_rows} rows where its batch has {len(rows)}, so it is not "
                "known which row asks for which strength. This is a bug of proxytune's plugin with this vLLM."
            )
        return rows
