"""Which expert will help: candidates ranked from what the models say of a text, without generating.

Each model reads the passages once. From the logits follow the steered losses of every candidate at every
strength, and from these its *benefit*: the nats per token that it saves the base. A strength that was picked
on the passages it is judged by would flatter every candidate, and a useless one most; so each half of the
passages picks the strength for the other (two-fold cross-fitting). A candidate whose best strength is 0 has
benefit 0.

Beside the benefit stand two cheaper guesses: *gain*, what tuning changed in the small model, which needs no
base; and *slope*, what the first bit of strength saves. How well each predicts is measured by
`benchmarks/rank_experts.py`, and told in `docs/guides/choose-a-pair.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from proxytune.decode.ensemble import Ensemble
from proxytune.errors import InvalidRequest
from proxytune.measure.score import (
    NUM_RESAMPLES,
    Interval,
    Passage,
    passage_losses,
)

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Strengths tried for each candidate."""
SLOPE_ALPHA = 0.05
"""Small enough for the loss to be a line there: its curvature changes the slope by a few hundredths."""


MEASURED_CORRELATION = 0.70
"""Mean rank correlation of the benefit with that on other text of the kind: seven experts of the smol family,
eight domains, samples of 1,016 tokens (`docs/performance/rank_experts.json`)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is expected of an expert.

    Args:
        name: The expert.
        benefit: Nats per token that it saves the base, cross-fitted; below 0 it harms.
        interval: Of the benefit, 95 %.
        change: Perplexity against the base's that the benefit amounts to: -0.1 is a tenth lower.
        alpha: The strength to take: the best one on all passages, 0 where none helps.
        chance_best: Share of bootstrap resamples in which it is first.
        gain: Nats per token that the expert saves the anti-expert.
        slope: Nats per token that a strength saves per unit, where it begins.
    """

    name: str
    benefit: float
    interval: Interval | None
    change: float
    alpha: float
    chance_best: float
    gain: float
    slope: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """Candidates, the most promising first.

    Args:
        candidates: By benefit.
        num_passages: Windows or answers that were read.
        num_tokens: Tokens that were predicted.
        base_nats: The base's loss, nats per token.
        notes: What a reader must know, in sentences.
    """

    candidates: tuple[Candidate, ...]
    num_passages: int
    num_tokens: int
    base_nats: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking for JSON."""
        return asdict(self)


def rank_experts(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    *,
    alphas: Sequence[float] = ALPHAS,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Rank an ensemble's pairs by what each alone would save the base on passages.

    Args:
        ensemble: Base and candidates.
        passages: Of the kind of text that is to be written; at least two.
        alphas: Strengths to try, beside 0.
        seed: Of the bootstrap over passages.
        on_progress: Called with tokens done and tokens in all.

    Raises:
        InvalidRequest: Fewer than two passages, or no strength.
        PromptTooLong: A passage exceeds a model's context.
    """
    if len(passages) < 2:
        raise InvalidRequest(
            f"there is {len(passages)} window or row, and ranking needs two: each half picks the strength "
            "for the other.\nhint: give more data, or a smaller --window"
        )
    if not alphas:
        raise InvalidRequest("no strength is given.\nhint: leave alphas out for the usual ones")
    sums = candidate_sums(ensemble, passages, alphas, on_progress=on_progress)
    return summarise([pair.name for pair in ensemble.pairs], sums, alphas, seed=seed)


class Sums(NamedTuple):
    """Losses of passages, summed over their tokens, nats."""

    base: NDArray[np.float64]
    """`[passages]`."""
    experts: NDArray[np.float64]
    """`[candidates, passages]`, each expert alone."""
    anti_experts: NDArray[np.float64]
    """Likewise."""
    steered: NDArray[np.float64]
    """`[candidates, 1 + alphas, passages]`: at `SLOPE_ALPHA`, then at each strength."""
    lengths: NDArray[np.float64]
    """`[passages]` tokens."""

    def take(self, passages: Sequence[int]) -> Sums:
        """Return those of some passages."""
        return Sums(*(each[..., list(passages)] for each in self))


def candidate_sums(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    alphas: Sequence[float],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Sums:
    """Let each model read passages once, and return what every pair alone makes of them at every strength."""
    tried = (SLOPE_ALPHA, *alphas)
    num_pairs = len(ensemble.pairs)
    strengths = [
        tuple(alpha if pair == which else 0.0 for pair in range(num_pairs))
        for which in range(num_pairs)
        for alpha in tried
    ]
    losses = passage_losses(ensemble, passages, strengths, on_progress=on_progress)
    lengths = np.array([len(passage.token_ids) for passage in passages], float)
    starts = np.cumsum([0, *lengths[:-1]]).astype(int)
    sums = np.add.reduceat(losses, starts, axis=1)  # [columns, passages]
    return Sums(
        sums[0],
        sums[1 : 1 + 2 * num_pairs : 2],
        sums[2 : 1 + 2 * num_pairs : 2],
        sums[1 + 2 * num_pairs :].reshape(num_pairs, len(tried), -1),
        lengths,
    )


def summarise(
    names: Sequence[str], sums: Sums, alphas: Sequence[float], *, seed: int = 0
) -> Ranking:
    """Rank candidates from their losses.

    Args:
        names: Of the candidates.
        sums: What they make of passages.
        alphas: The strengths.
        seed: Of the bootstrap.
    """
    base, experts, anti_experts, steered, lengths = sums
    num_passages, num_tokens = len(lengths), lengths.sum()
    tried = np.array([0.0, *alphas])
    # Strength 0 first, so that of equal ones it is taken.
    curves = np.concatenate(
        [np.broadcast_to(base, (len(names), 1, num_passages)), steered[:, 1:]], axis=1
    )
    # Neighbouring windows are alike; every other one belongs to the same half.
    halves = np.arange(num_passages) % 2
    saved = np.zeros((len(names), num_passages))
    for half in (0, 1):
        chosen = curves[:, :, halves != half].sum(-1).argmin(1)  # [candidates]
        picked = curves[np.arange(len(names)), chosen]
        saved[:, halves == half] = (base - picked)[:, halves == half]
    benefits = saved.sum(-1) / num_tokens
    picks = np.random.default_rng(seed).integers(0, num_passages, (NUM_RESAMPLES, num_passages))
    resampled = saved[:, picks].sum(-1) / lengths[picks].sum(-1)  # [candidates, resamples]
    first = resampled.argmax(0)
    best_alphas = tried[curves.sum(-1).argmin(1)]
    candidates = [
        Candidate(
            name=name,
            benefit=float(benefits[n]),
            interval=Interval(*map(float, np.percentile(resampled[n], [2.5, 97.5]))),
            change=float(np.expm1(-benefits[n])) + 0.0,
            alpha=float(best_alphas[n]),
            chance_best=float((first == n).mean()),
            gain=float((anti_experts[n] - experts[n]).sum() / num_tokens),
            slope=float((base - steered[n, 0]).sum() / num_tokens / SLOPE_ALPHA),
        )
        for n, name in enumerate(names)
    ]
    candidates.sort(key=lambda candidate: -candidate.benefit)
    notes = []
    if len(candidates) > 1 and candidates[0].chance_best < 0.95:
        notes.append(
            f"{candidates[0].name} is first in {candidates[0].chance_best:.0%} of resamples only; more text "
            "would tell"
        )
    if candidates[0].interval is not None and candidates[0].interval.low <= 0:
        notes.append("no candidate is sure to help on this kind of text")
    edge = max(alphas)
    beyond = [c.name for c in candidates if c.alpha == edge]
    if beyond:
        notes.append(f"the best strength of {', '.join(beyond)} is the largest tried, {edge:g}")
    return Ranking(
        tuple(candidates),
        num_passages,
        int(num_tokens),
        float(base.sum() / num_tokens),
        tuple(notes),
    )


def rank_correlation(values: Sequence[float], others: Sequence[float]) -> float:
    """Return Spearman's rank correlation; ties share their mean rank. NaN where one side is constant."""
    ranks = [_ranks(np.asarray(each, float)) for each in (values, others)]
    one, other = (each - each.mean() for each in ranks)
    scale = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / scale) if scale else float("nan")


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    order = values.argsort(kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values))
    for value in np.unique(values):
        ranks[values == value] = ranks[values == value].mean()
    return ranks
