"""What steering did to each token, computed from a trace.

Definitions. A token's *shift* is its steered minus its base logprob, in nats. A token is *changed* if base
and steered model put different tokens first; a sampled or given token need not be the first choice of either.
An expert's *offset* is `alpha * (expert - anti_expert)` in logprobs of the token, times the weight of the
recipe's policy if it has one. If the expert has weights or an output bias, its offset has three *terms*: the
weighted pair's, the base's and the bias's. With the published method the shift is the sum of the offsets
minus a constant that all tokens share, because the steered distribution sums to 1 again. A token's *piece* is
what it adds to the text if each character is written by the token that completes it.

Pure functions of traces: no model, no terminal, no page.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from proxytune.errors import InvalidRequest
from proxytune.trace import Step, Terms, Trace, View

LEVELS = (math.log(1.25), math.log(2.0), math.log(8.0))
"""Shifts at which the colour changes, nats: the token became 1.25, 2 or 8 times more or less likely."""
MIN_LOG_ODDS_MISS = -24 * math.log(2)
"""Lower bound for `log(1 - p)`: in float32 a probability closer to 1 is 1, and its odds are infinite."""
COLOURS = {-3: "#79b2e2", -2: "#b0d2f0", -1: "#dfecf8", 1: "#fdebd0", 2: "#fbcb8d", 3: "#f0a24a"}
"""Colours by `Move.level`, as on the light pages. Colour-blind readers can tell blue from orange."""


@dataclass(frozen=True, slots=True)
class Move:
    """What steering did to one token. Unknown values are None.

    Args:
        index: Position among the new tokens, from 0.
        token_id: Token id in the base's vocabulary.
        label: The token on its own; bytes that are not whole characters appear as ⟨F0 9F⟩.
        piece: What it adds to the text.
        part_of: The character that it belongs to, if a later token completes that character.
        is_special: Whether it is a control token, such as the end of a text, and no part of the text.
        is_given: Whether it was given rather than chosen.
        is_changed: Whether base and steered model put different tokens first.
        base_choice: Id of the token that the base puts first.
        steered_choice: Id of the token that the steered model puts first.
        base_logprob: The base's logprob, nats.
        steered_logprob: The steered logprob, nats.
        base_rank: The token's rank in the base's distribution, 1 for the most likely.
        shift: Steered minus base logprob, nats.
        prob_change: Steered minus base probability.
        log_odds_change: Steered minus base log-odds, `log(p / (1 - p))`, nats.
        kl: KL(steered || base), nats.
        base_entropy: Entropy of the base's distribution, nats.
        steered_entropy: Entropy of the steered distribution, nats.
        offsets: Offset of each expert, nats.
        weights: The factor that the recipe's policy put on each expert's strength; None without a policy.
        terms: The terms of each offset whose expert has weights or an output bias, nats; None without any.
        has_conflict: Whether the experts, each alone, would have chosen different tokens.
    """

    index: int
    token_id: int
    label: str
    piece: str
    part_of: str | None
    is_special: bool
    is_given: bool
    is_changed: bool | None
    base_choice: int | None
    steered_choice: int | None
    base_logprob: float | None
    steered_logprob: float | None
    base_rank: int | None
    shift: float | None
    prob_change: float | None
    log_odds_change: float | None
    kl: float | None
    base_entropy: float | None
    steered_entropy: float | None
    offsets: Mapping[str, float]
    weights: Mapping[str, float] | None = None
    terms: Mapping[str, Terms] | None = None
    has_conflict: bool | None = None

    @property
    def level(self) -> int:
        """Depth of the token's colour: 1 to 3 if it became more likely, -1 to -3 if less, 0 for no colour."""
        if self.shift is None:
            return 0
        size = sum(abs(self.shift) >= level for level in LEVELS)
        return size if self.shift > 0 else -size


# One token ----------------------------------------------------------------------------------------------


def label(token: str | bytes | None, token_id: int) -> str:
    """Return how to show a token on its own; bytes that are not whole characters appear as ⟨F0 9F⟩."""
    if token is None:
        return f"⟨token {token_id}⟩"
    if isinstance(token, str):
        return token
    text = token.decode("utf-8", "surrogateescape")
    return re.sub(
        "[\udc80-\udcff]+",
        lambda part: "⟨" + " ".join(f"{ord(c) - 0xDC00:02X}" for c in part[0]) + "⟩",
        text,
    )


def pieces(trace: Trace) -> list[tuple[str, str | None]]:
    """Return what each token adds to the text, and the character that it begins or continues, if any.

    Bytes that never become a character turn into U+FFFD at the token that makes this certain. Special tokens
    add nothing. A token without a known text adds what its step added.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts: list[str] = []
    owners: list[int | None] = [None] * len(trace.steps)
    open_parts: list[int] = []
    for index, step in enumerate(trace.steps):
        token = trace.tokens.get(step.token_id)
        is_last = index == len(trace.steps) - 1
        if step.token_id in trace.special_ids:
            text = decoder.decode(b"", True)  # an incomplete character before it stays incomplete
            decoder.reset()
        elif token is None:
            text = decoder.decode(b"", True) + step.text
            decoder.reset()
        else:
            content = token if isinstance(token, bytes) else token.encode()
            text = decoder.decode(content, is_last)
        if text:
            for part in open_parts:
                owners[part] = index
            open_parts = []
        if decoder.getstate()[0]:
            open_parts.append(index)
        texts.append(text)
    return [
        (text, None if owner is None else texts[owner][:1])
        for text, owner in zip(texts, owners, strict=True)
    ]


def moves(trace: Trace) -> list[Move]:
    """Return what steering did to each token.

    Raises:
        InvalidRequest: The trace is not explained.
    """
    if trace.steps and trace.steps[0].views is None:
        raise InvalidRequest(
            "the trace does not record what each model predicted for its tokens.\n"
            "hint: generate it with explain=True, or with proxytune explain"
        )
    return [
        _move(trace, step, piece, part_of)
        for step, (piece, part_of) in zip(trace.steps, pieces(trace), strict=True)
    ]


def _move(trace: Trace, step: Step, piece: str, part_of: str | None) -> Move:
    views = step.views or {}
    base, steered = views.get("base"), views.get("steered")
    base_logprob = base.logprob if base else None
    steered_logprob = steered.logprob if steered else None
    shift = prob_change = log_odds_change = None
    if base_logprob is not None and steered_logprob is not None:
        shift = steered_logprob - base_logprob
        prob_change = math.exp(steered_logprob) - math.exp(base_logprob)
        log_odds_change = _log_odds(steered_logprob) - _log_odds(base_logprob)
    return Move(
        index=step.index,
        token_id=step.token_id,
        label=label(trace.tokens.get(step.token_id), step.token_id),
        piece=piece,
        part_of=part_of,
        is_special=step.token_id in trace.special_ids,
        is_given=step.index < trace.num_given,
        is_changed=_is_changed(base, steered),
        base_choice=base.top[0][0] if base and base.top else None,
        steered_choice=steered.top[0][0] if steered and steered.top else None,
        base_logprob=base_logprob,
        steered_logprob=steered_logprob,
        base_rank=base.rank if base else None,
        shift=shift,
        prob_change=prob_change,
        log_odds_change=log_odds_change,
        kl=step.kl,
        base_entropy=base.entropy if base else None,
        steered_entropy=steered.entropy if steered else None,
        offsets=offsets(step, trace.alphas),
        weights=step.weights,
        terms=_terms(step, trace.alphas) or None,
        has_conflict=step.has_conflict,
    )


def _is_changed(base: View | None, steered: View | None) -> bool | None:
    if base is None or steered is None:
        return None
    if base.top and steered.top:
        return base.top[0][0] != steered.top[0][0]
    # Without lists of top tokens, the ranks decide if the token is the first choice of either model.
    if base.rank is None or steered.rank is None or (base.rank != 1 and steered.rank != 1):
        return None
    return base.rank != steered.rank


def _log_odds(logprob: float) -> float:
    miss = math.log(-math.expm1(logprob)) if logprob < 0 else -math.inf
    return logprob - max(miss, MIN_LOG_ODDS_MISS)


def _terms(step: Step, alphas: Mapping[str, float]) -> dict[str, Terms]:
    """Return the terms of each offset that has them, times `alpha * weight`."""
    return {
        name: Terms(*(alphas[name] * _weight(step, name) * term for term in terms))
        for name, terms in (step.terms or {}).items()
        if name in alphas
    }


def _weight(step: Step, name: str) -> float:
    """Return what the recipe's policy multiplied an expert's strength with."""
    return 1.0 if step.weights is None else step.weights.get(name, 1.0)


def offsets(step: Step, alphas: Mapping[str, float]) -> dict[str, float]:
    """Return each expert's `alpha * weight * (expert - anti_expert)` in logprobs, nats, where known."""
    views, terms = step.views or {}, _terms(step, alphas)
    found = {}
    for name, alpha in alphas.items():
        if name in terms:
            found[name] = sum(terms[name])
            continue
        expert, anti_expert = views.get(f"{name}.expert"), views.get(f"{name}.anti_expert")
        if expert is None or anti_expert is None:
            continue
        if expert.logprob is not None and anti_expert.logprob is not None:
            found[name] = alpha * _weight(step, name) * (expert.logprob - anti_expert.logprob)
    return found
