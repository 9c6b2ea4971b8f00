"""Which expert will help: candidates ranked by how well they predict a text, without generating anything.

Each model reads the passages once. The logits give the steered loss of every candidate at every strength, and
these give its *benefit*: the nats per token that it saves the base. A strength picked on the passages that
also judge it would flatter every candidate, and a useless one most. So each half of the passages picks the
strength for the other half (two-fold cross-fitting). A candidate whose best strength is 0 has benefit 0.

Two cheaper estimates stand beside the benefit: *gain*, what tuning changed in the small model, which needs no
base; and *slope*, what the first bit of strength saves. `benchmarks/rank_experts.py` measures how well each
predicts, and `docs/guides/choose-a-pair.md` reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from proxytune.decode.ensemble import Ensemble
from proxytune.errors import InvalidRequest
from proxytune.measure.score import NUM_RESAMPLES, Interval, Passage, passage_losses

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Strengths tried for each candidate."""
SLOPE_ALPHA = 0.05
"""Small enough for the loss to be almost linear there: curvature changes the slope by a few percent."""
MEASURED_CORRELATION = 0.70
"""Mean rank correlation between the benefit on a sample and on other text of the same kind: seven experts of
the smol family, eight domains, samples of 1,016 tokens (`docs/performance/rank_experts.json`)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An expert and the help to expect from it.

    Args:
        name: The expert's name.
        benefit: Nats per token that it saves the base, cross-fitted; negative if it harms.
        interval: 95 % interval of the benefit.
        change: The same as a change of perplexity against the base's: -0.1 is a tenth lower.
        alpha: Recommended strength: the best one on all passages, 0 if none helps.
        chance_best: Share of bootstrap resamples in which it ranks first.
        gain: Nats per token that the expert saves the anti-expert.
        slope: Nats per token saved per unit of strength, at strength 0.
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
        candidates: Candidates in descending order of benefit.
        num_passages: Number of windows or answers read.
        num_tokens: Number of tokens predicted.
        base_nats: The base's loss, nats per token.
        notes: Warnings for the reader, one sentence each.
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
    """Rank an ensemble's pairs by what each by itself would save the base on passages.

    Args:
        ensemble: The base and the candidates.
        passages: At least two, of the kind of text that is to be generated.
        alphas: Strengths to try in addition to 0.
        seed: Random seed of the bootstrap over passages.
        on_progress: Called with the number of tokens done and the total.

    Raises:
        InvalidRequest: There are fewer than two passages, or no strengths.
        PromptTooLong: A passage exceeds a model's context.
    """
    if len(passages) < 2:
        raise InvalidRequest(
            f"there is {len(passages)} window or answer, and ranking needs at least two: each half picks the "
            "strength for the other.\nhint: give more data, or a smaller --window"
        )
    if not alphas:
        raise InvalidRequest(
            "no strength is given.\nhint: leave out alphas to try the default ones"
        )
    sums = candidate_sums(ensemble, passages, alphas, on_progress=on_progress)
    return summarise([pair.name for pair in ensemble.pairs], sums, alphas, seed=seed)


class Sums(NamedTuple):
    """Losses of passages, summed over their tokens, nats."""

    base: NDArray[np.float64]
    """`[passages]`."""
    experts: NDArray[np.float64]
    """`[candidates, passages]`, each expert by itself."""
    anti_experts: NDArray[np.float64]
    """`[candidates, passages]`, each anti-expert by itself."""
    steered: NDArray[np.float64]
    """`[candidates, 1 + alphas, passages]`: at `SLOPE_ALPHA`, then at each strength."""
    lengths: NDArray[np.float64]
    """`[passages]` tokens."""

    def take(self, passages: Sequence[int]) -> Sums:
        """Return the losses of some passages."""
        return Sums(*(each[..., list(passages)] for each in self))


def candidate_sums(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    alphas: Sequence[float],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Sums:
    """Let each model read the passages once, and return every pair's own losses at every strength."""
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
        names: Names of the candidates.
        sums: Their losses on the passages.
        alphas: The strengths tried.
        seed: Random seed of the bootstrap.
    """
    base, experts, anti_experts, steered, lengths = sums
    num_passages, num_tokens = len(lengths), lengths.sum()
    tried = np.array([0.0, *alphas])
    # Strength 0 comes first, so that argmin takes it in a tie.
    curves = np.concatenate(
        [np.broadcast_to(base, (len(names), 1, num_passages)), steered[:, 1:]], axis=1
    )
    # Neighbouring windows are alike, so the halves alternate.
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
            f"{candidates[0].name} ranks first in only {candidates[0].chance_best:.0%} of resamples; more "
            "text would make it clearer"
        )
    if candidates[0].interval is not None and candidates[0].interval.low <= 0:
        notes.append("no candidate is certain to help on this kind of text")
    edge = max(alphas)
    beyond = [c.name for c in candidates if c.alpha == edge]
    if beyond:
        notes.append(
            f"the best strength of {', '.join(beyond)} is the largest one tried, {edge:g}; try larger ones"
        )
    base_nats = float(base.sum() / num_tokens)
    return Ranking(tuple(candidates), num_passages, int(num_tokens), base_nats, tuple(notes))
