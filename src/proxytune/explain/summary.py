"""What steering did to a whole text: counts, means, token types, and where two texts differ first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.explain.moves import Move
from proxytune.trace import Trace

EARLY_TOKENS = 10
"""Number of tokens that count as the beginning of a text."""
CONTEXT_TOKENS = 4
"""Length of the contexts in which token types are shown, in tokens, as in the paper's table 6."""


@dataclass(slots=True)
class Tally:
    """Counts and sums over tokens; a mean of no values is None.

    Args:
        num_tokens: All tokens.
        num_known: Tokens for which it is known whether they are changed.
        num_changed: Changed tokens.
        num_shifts: Tokens with a known shift.
        sum_shift: Sum of their shifts, nats.
        sum_prob_change: Sum of their changes in probability.
        num_kl: Tokens with a known KL divergence.
        sum_kl: Sum of KL(steered || base), nats.
    """

    num_tokens: int = 0
    num_known: int = 0
    num_changed: int = 0
    num_shifts: int = 0
    sum_shift: float = 0.0
    sum_prob_change: float = 0.0
    num_kl: int = 0
    sum_kl: float = 0.0

    def add(self, move: Move) -> None:
        """Count a token."""
        self.num_tokens += 1
        if move.is_changed is not None:
            self.num_known += 1
            self.num_changed += move.is_changed
        if move.shift is not None and move.prob_change is not None:
            self.num_shifts += 1
            self.sum_shift += move.shift
            self.sum_prob_change += move.prob_change
        if move.kl is not None:
            self.num_kl += 1
            self.sum_kl += move.kl

    @property
    def share_changed(self) -> float | None:
        """Share of changed tokens among those for which it is known."""
        return self.num_changed / self.num_known if self.num_known else None

    @property
    def mean_shift(self) -> float | None:
        """Mean shift, nats."""
        return self.sum_shift / self.num_shifts if self.num_shifts else None

    @property
    def mean_prob_change(self) -> float | None:
        """Mean change in the token's probability: the paper's Delta, section 6.1."""
        return self.sum_prob_change / self.num_shifts if self.num_shifts else None

    @property
    def mean_kl(self) -> float | None:
        """Mean KL(steered || base), nats."""
        return self.sum_kl / self.num_kl if self.num_kl else None

    def to_dict(self) -> dict[str, Any]:
        """Return counts and means for JSON."""
        return {
            "num_tokens": self.num_tokens,
            "num_known": self.num_known,
            "num_changed": self.num_changed,
            "share_changed": self.share_changed,
            "mean_prob_change": self.mean_prob_change,
            "mean_shift": self.mean_shift,
            "mean_kl": self.mean_kl,
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """What steering did to a text.

    Args:
        tally: All tokens, an end-of-sequence token included.
        early_share: Share of the total absolute change in log-odds that falls on the first `EARLY_TOKENS`
            tokens; None if nothing changed.
        early_uniform_share: What that share would be if every token contributed equally.
        expert_shares: Share of each expert in the total of all absolute offsets.
        conflict_rate: Share of tokens on which several experts disagreed; None if unknown.
    """

    tally: Tally
    early_share: float | None
    early_uniform_share: float | None
    expert_shares: Mapping[str, float]
    conflict_rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {
            **self.tally.to_dict(),
            "early_tokens": EARLY_TOKENS,
            "early_share_of_log_odds_change": self.early_share,
            "early_share_if_uniform": self.early_uniform_share,
            "expert_shares_of_offsets": dict(self.expert_shares),
            "conflict_rate": self.conflict_rate,
        }


@dataclass(frozen=True, slots=True)
class TokenType:
    """All occurrences of one token."""

    token_id: int
    label: str
    tally: Tally
    context: str  # the most common `CONTEXT_TOKENS` consecutive tokens that contain it
    num_context: int  # how often the context occurs

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {
            "token_id": self.token_id,
            "token": self.label,
            **self.tally.to_dict(),
            "context": self.context,
            "num_context": self.num_context,
        }


def summarise(token_moves: Sequence[Move]) -> Summary:
    """Return what steering did to a text."""
    tally = Tally()
    early = total = 0.0
    by_expert: Counter[str] = Counter()
    for move in token_moves:
        tally.add(move)
        size = abs(move.log_odds_change or 0.0)
        total += size
        early += size if move.index < EARLY_TOKENS else 0.0
        for name, offset in move.offsets.items():
            by_expert[name] += abs(offset)  # type: ignore[assignment]  # a Counter of floats
    all_offsets = sum(by_expert.values())
    conflicts = [move.has_conflict for move in token_moves if move.has_conflict is not None]
    return Summary(
        tally,
        early / total if total else None,
        min(1.0, EARLY_TOKENS / len(token_moves)) if token_moves else None,
        {name: size / all_offsets for name, size in by_expert.items()} if all_offsets else {},
        sum(conflicts) / len(conflicts) if conflicts else None,
    )


def token_types(token_moves: Sequence[Move]) -> list[TokenType]:
    """Return the token types of a text, those with the largest total change in probability first."""
    tallies: dict[int, Tally] = {}
    labels: dict[int, str] = {}
    for move in token_moves:
        tallies.setdefault(move.token_id, Tally()).add(move)
        labels[move.token_id] = move.label
    contexts = common_contexts([[move.token_id for move in token_moves]], tallies)
    starts: dict[tuple[int, ...], int] = {}
    for start in range(len(token_moves)):
        for length in range(1, CONTEXT_TOKENS + 1):
            window = token_moves[start : start + length]
            starts.setdefault(tuple(move.token_id for move in window), start)
    types = []
    for token_id, tally in tallies.items():
        context, count = contexts.get(token_id, ((token_id,), 1))
        start = starts[context]
        text = "".join(move.piece for move in token_moves[start : start + len(context)])
        types.append(TokenType(token_id, labels[token_id], tally, text, count))
    return sorted(types, key=lambda each: -abs(each.tally.sum_prob_change))


def common_contexts(
    texts: Iterable[Sequence[int]], token_ids: Iterable[int]
) -> dict[int, tuple[tuple[int, ...], int]]:
    """Return, for the given tokens, the most common `CONTEXT_TOKENS` consecutive tokens that contain them.

    A shorter text is one context. Of equally common contexts the first is returned, with its count.
    """
    wanted = set(token_ids)
    counts: dict[int, Counter[tuple[int, ...]]] = {token_id: Counter() for token_id in wanted}
    for ids in texts:
        for start in range(max(1, len(ids) - CONTEXT_TOKENS + 1)):
            window = tuple(ids[start : start + CONTEXT_TOKENS])
            for token_id in wanted.intersection(window):
                counts[token_id][window] += 1
    return {token_id: found.most_common(1)[0] for token_id, found in counts.items() if found}


def first_difference(one: Trace, other: Trace) -> int | None:
    """Return the first position at which two texts have different tokens; None if they are equal."""
    for index, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)):
        if a != b:
            return index
    shorter, longer = sorted((len(one.steps), len(other.steps)))
    return None if shorter == longer else shorter


RUNNING_TOKENS = 11
"""Width of the window of the running share of changed tokens, in tokens."""


def running_share(token_moves: Sequence[Move]) -> list[float | None]:
    """Return for each token the share of changed tokens among the `RUNNING_TOKENS` around it."""
    half = RUNNING_TOKENS // 2
    shares: list[float | None] = []
    for index in range(len(token_moves)):
        window = token_moves[max(0, index - half) : index + half + 1]
        known = [move.is_changed for move in window if move.is_changed is not None]
        shares.append(sum(known) / len(known) if known else None)
    return shares
