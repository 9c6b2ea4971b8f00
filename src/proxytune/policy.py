"""How strongly, and by which experts, a base is steered at each token, as recipes and requests say it.

Names, settings and their checks; `logits/rules.py` has what they do to logits. Nothing here needs torch:
recipes are also read, checked and written on machines without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Annotated, Any

from proxytune.errors import InvalidRequest, did_you_mean
from proxytune.settings import Declared, Option, option, options_of

POLICIES = ("constant", "kl_match", "gate_sure", "gate_agree", "nudge")
"""How strongly to steer at a token."""

COMBINATIONS = (
    "sum", "inverse_entropy", "sign_agreement", "majority", "route_entropy", "route_base", "union",
    "intersection",
)  # fmt: skip
"""How several experts steer one base. With one expert they are all the same."""

IMPLAUSIBLE = ("exclude", "leave")
"""What happens to tokens that the base finds implausible."""

USERS = {"max_alpha": ("kl_match",), "threshold": ("gate_sure", "nudge")}
"""Settings that only some policies have, and those policies."""

PICKING = ("kl_match", "nudge")
"""Policies that decide themselves which expert counts, so that experts cannot be combined otherwise."""

DEFAULT_MAX_ALPHA = 2.0
DEFAULT_THRESHOLD = 0.4

MAX_POINTS = 1000
"""Maximum number of points of a schedule."""
MAX_JSON = 2**16
"""Maximum number of characters of a policy as JSON text, which nothing bounds before it is parsed."""

PolicySettings = str | Mapping[str, Any]
"""What a caller says of a policy: its name, or an object of settings, as the `steering` of a recipe."""

Position = Annotated[int, Option(at_least=0, at_most=2**31 - 1)]
Weight = Annotated[float, Option(at_least=-100, at_most=100)]


@dataclass(frozen=True, slots=True)
class Policy:
    """How strongly and by which experts a base is steered at each token.

    Args:
        combine: How several experts steer: one of `COMBINATIONS`; `logits/rules.py` has each and its source.
        name: One of `POLICIES`. `constant` is the published method. `kl_match` finds a weight for each token,
            and picks a single expert; see that function. `gate_sure` steers only if the base gives every
            token less than `threshold`. `gate_agree` steers only if base, expert and anti-expert disagree
            about the likeliest token. `nudge` replaces the base by the expert itself if the base gives every
            token less than `threshold` (at strength 1; between 0 and 1 it mixes logprobs). This is Nudging's
            rule, applied token by token, without its switch back after a whole word.
        max_alpha: Largest strength of `kl_match`; None is 2, as published.
        threshold: A probability, for `gate_sure` and `nudge`; None is 0.4, as published.
        clip: Maximum size of any token's offset in either direction, as a log-ratio in nats.
        plausibility: Tokens that the base gives less than this fraction of its likeliest token's probability
            are *implausible*; see `is_plausible`.
        implausible: What happens to implausible tokens where experts steer. `exclude` gives them no
            probability, as published; `leave` keeps the base's logit. None is `exclude`.
        schedule: Positions in the new text, from 0, and the weight of all strengths there; linear between
            them, constant before and after. `((99, 0), (100, 1))` steers from the 101st token on,
            `((0, 1), (200, 0))` fades out. In scored texts, positions count from a window's first token.

    Raises:
        InvalidRequest: A value cannot be used, or would have no effect.

    Source: the functions in `logits/rules.py` name theirs. Clipping is this project's; warm-up over 100
    tokens is ThinkLogit's (Zhang et al. 2025, arXiv:2507.12759).
    """

    combine: str = option("sum", "", choices=COMBINATIONS)
    name: str = option("constant", "", choices=POLICIES)
    max_alpha: float | None = option(None, "", above=0, at_most=100)
    threshold: float | None = option(None, "", above=0, at_most=1)
    clip: float | None = option(None, "", above=0)
    plausibility: float | None = option(None, "", above=0, at_most=1)
    implausible: str | None = option(None, "", choices=IMPLAUSIBLE)
    schedule: tuple[tuple[Position, Weight], ...] = option((), "")

    def __post_init__(self) -> None:
        for declared in options_of(Policy).values():
            value = getattr(self, declared.name)
            if declared.name == "schedule":
                self._check_schedule(declared)
                continue
            declared.check(value, "policy" if declared.name == "name" else declared.name)
            if declared.type is float and value is not None:
                object.__setattr__(self, declared.name, float(value))
        for key, users in USERS.items():
            if getattr(self, key) is not None and self.name not in users:
                raise InvalidRequest(
                    f"{key} has no effect with policy {self.name}; it belongs to "
                    f"{' and '.join(users)}.\nhint: leave {key} out"
                )
        if self.implausible is not None and self.plausibility is None:
            raise InvalidRequest(
                'implausible has no effect without plausibility.\nhint: add "plausibility": 0.1'
            )
        if self.name in PICKING and self.combine != "sum":
            raise InvalidRequest(
                f"policy is {self.name} and combine is {self.combine}, and both decide which expert counts.\n"
                'hint: "combine": "sum"'
            )

    def _check_schedule(self, declared: Declared) -> None:
        schedule = self.schedule
        try:
            points = tuple((position, weight) for position, weight in schedule)
        except (TypeError, ValueError):
            points = ((-1, 0.0),)
        positions = [position for position, _ in points]
        is_usable = len(points) <= MAX_POINTS and declared.holds(points)
        if not is_usable or any(a >= b for a, b in pairwise(positions)):
            shown = repr(schedule)
            raise InvalidRequest(
                f"schedule is {shown if len(shown) <= 200 else shown[:197] + '...'}, and must be at most "
                f"{MAX_POINTS:,} pairs of a position, whole numbers from 0 that rise, and a weight from -100 "
                "to 100.\n"
                'hint: "schedule": [[0, 1], [200, 0]] fades out over 200 tokens'
            )
        object.__setattr__(self, "schedule", tuple((p, float(weight)) for p, weight in points))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], *, combine: str = "sum") -> Policy:
        """Build a policy from a recipe's `steering`, and its `combine`.

        Raises:
            InvalidRequest: A key is unknown, or a value cannot be used.
        """
        known = ["policy", *(field.name for field in fields(cls)[2:])]
        for key in settings:
            if key not in known:
                raise InvalidRequest(
                    f"{key!r} is not a setting of steering; the settings are {', '.join(known)}"
                    f"{did_you_mean(str(key), known)}"
                )
        given = {key: value for key, value in settings.items() if value is not None}
        name = given.pop("policy", "constant")
        schedule = given.pop("schedule", ())
        if isinstance(schedule, list) and all(isinstance(point, list) for point in schedule):
            schedule = tuple(map(tuple, schedule))
        return cls(combine, name, schedule=schedule, **given)

    def changed(self, settings: PolicySettings | None, combine: str | None) -> Policy:
        """Return the policy with other settings, another combination, or both.

        Args:
            settings: In place of all of this policy's own; None keeps them.
            combine: In place of this policy's own; None keeps it.

        Raises:
            InvalidRequest: A key is unknown, or a value cannot be used.
        """
        if settings is None and combine is None:
            return self
        if settings is None:
            settings = self.to_dict()
        elif isinstance(settings, str):
            settings = {"policy": settings}
        elif not isinstance(settings, Mapping):
            raise InvalidRequest(
                f"policy is {settings!r}, and must be a name or an object of settings.\n"
                'hint: "gate_sure", or {"policy": "gate_sure", "threshold": 0.9}'
            )
        return Policy.from_dict(settings, combine=self.combine if combine is None else combine)

    def to_dict(self) -> dict[str, Any]:
        """Return a recipe's `steering` without values at their defaults; `combine` is not part of it."""
        content: dict[str, Any] = {} if self.name == "constant" else {"policy": self.name}
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default:
                is_list = field.name == "schedule"
                content[field.name] = list(map(list, value)) if is_list else value
        return content

    def describe(self) -> str:
        """Describe the policy in one line: `union, clip 4`."""
        parts = [] if self.combine == "sum" else [self.combine]
        if self.name != "constant" or not parts:
            parts.append(self.name)
        settings = {key: value for key, value in self.to_dict().items() if key != "policy"}
        return ", ".join([*parts, *(f"{key} {value}" for key, value in settings.items())])

    @property
    def is_plain(self) -> bool:
        """Whether it is the published method: offsets of constant strength, added up."""
        settings = (self.combine, self.name, self.clip, self.plausibility, self.schedule)
        return settings == ("sum", "constant", None, None, ())

    @property
    def reads_base(self) -> bool:
        """Whether it needs the base's whole distribution, which a base behind an API does not show."""
        is_gated = self.name != "constant" or self.plausibility is not None
        return is_gated or self.combine in ("majority", "route_base")

    @property
    def has_positions(self) -> bool:
        """Whether it depends on how many new tokens came before."""
        return bool(self.schedule)


def settings_in(text: str, name: str = "policy") -> PolicySettings:
    """Return the settings in a text that is a policy's name, or JSON with the settings.

    Args:
        text: What a command line, or another place without objects, can hold.
        name: What the caller calls it in errors.

    Raises:
        InvalidRequest: It begins as a JSON object and is none, or is too long.
    """
    if not text.lstrip().startswith("{"):
        return text
    if len(text) > MAX_JSON:
        raise InvalidRequest(f"{name} has {len(text):,} characters, and may have {MAX_JSON:,}")
    try:
        settings: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is not JSON: {error}") from error
    return settings


def needs_all_logits(policy: Policy) -> str:
    """Say that a policy is not for a base behind an API, and which ones are."""
    return (
        f"the base is behind an API, which shows only some logits, and the policy ({policy.describe()}) "
        "needs all of them.\n"
        "hint: leave it out, or use clip, a schedule, or the combinations "
        f"{', '.join(c for c in COMBINATIONS if not Policy(c).reads_base)}"
    )
