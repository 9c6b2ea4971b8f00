"""Explained traces made by hand: tokens as they come, and the figures that a test wants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from proxytune.trace import Step, Trace, View

SPECIAL = "<end>"
"""A token that controls."""


def told_trace(
    tokens: Sequence[str | bytes],
    *,
    base: Sequence[float] | None = None,
    steered: Sequence[float] | None = None,
    changed: Sequence[bool] | None = None,
    prompt: str = "A prompt:",
    alphas: Mapping[str, float] | None = None,
    views: Mapping[str, Sequence[float]] | None = None,
    num_given: int = 0,
) -> Trace:
    """Return a trace of these tokens; equal tokens have equal ids.

    Args:
        tokens: Text, or bytes for parts of characters; `SPECIAL` ends a text.
        base: The base's probability of each token; 0.25 unless said.
        steered: The steered model's; 0.5 unless said.
        changed: Where the base puts the token " other" first; nowhere unless said.
        prompt: What came before.
        alphas: Strengths; an expert `first` at 1 unless said.
        views: Further models' probabilities of each token.
        num_given: As in `Trace`.
    """
    ids: dict[str | bytes, int] = {" other": 0}
    for token in tokens:
        ids.setdefault(token, len(ids))
    count = len(tokens)
    probs = {
        "base": base or [0.25] * count,
        "steered": steered or [0.5] * count,
        **(views or {"first.expert": [0.6] * count, "first.anti_expert": [0.3] * count}),
    }
    is_changed = changed or [False] * count
    steps = []
    for index, token in enumerate(tokens):
        token_id = ids[token]
        step_views = {}
        for name, each in probs.items():
            own, other = (token_id, math.log(each[index])), (0, math.log(0.1))
            order = (other, own) if name == "base" and is_changed[index] else (own, other)
            rank = 2 if order[0] is other else 1
            step_views[name] = View(math.log(each[index]), rank, 1.5, order)
        steps.append(
            Step(
                index,
                token_id,
                "",
                math.log(probs["steered"][index]),
                views=step_views,
                kl=0.25,
                finish_reason="length" if index == count - 1 else None,
            )
        )
    content = b"".join(t if isinstance(t, bytes) else t.encode() for t in tokens if t != SPECIAL)
    return Trace(
        content.decode(errors="replace"),
        "length",
        tuple(steps),
        3,
        alphas={"first": 1.0} if alphas is None else alphas,
        prompt=prompt,
        tokens={token_id: token for token, token_id in ids.items()},
        special_ids=(ids[SPECIAL],) if SPECIAL in ids else (),
        num_given=num_given,
    )
