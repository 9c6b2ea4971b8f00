"""Ways to predict, as functions of logits: the predictors of the page.

A *predictor* is a way to predict the next token: the base, an expert by itself, the base steered in several
ways, the base tuned directly, and methods of others. Whatever has a strength is tried at `ALPHAS` on
validation rows. No model, no file and no text reaches this file.

Two predictors need more than one position's logits. *Few-shot* is the base after examples in its prompt
(`measure.py`). *Weak-to-strong decoding* (Song et al. 2025, arXiv:2506.07434): the small tuned model writes
the beginning, and the base goes on alone once it gives the last drafted tokens a high probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proxytune.logits.steer import steer
from proxytune.policy import DEFAULT_THRESHOLD

ALPHAS = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)
STEERED = {
    "sft": ("smol", "untuned"),
    "cpt": ("cpt", "untuned"),
    "smol": ("smol", "calibrated"),
    "smol_cpt": ("smol_cpt", "calibrated"),
    "cut": ("cut", "calibrated"),
    "cut_cpt": ("cut_cpt", "calibrated"),
}
"""The steered predictors at alpha 1, with their expert and which anti-expert. The suffix `_best` is the same
at the strength chosen on validation rows."""
DRAFTED = 3
"""Number of last drafted tokens that weak-to-strong decoding judges. The paper judges more; most answers here
are shorter than its window."""
SWITCHES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Geometric means of the base's probabilities above which the base goes on; the best on validation rows."""


class NoProxy(NamedTuple):
    """A temperature and an output bias of the base, fitted on training rows."""

    weight: float  # 1 / temperature
    bias: Tensor | None  # [vocab] float32

    def logits(self, base: Tensor) -> Tensor:
        """Return `[rows, vocab]` float32."""
        scaled = base.float() * self.weight
        return scaled if self.bias is None else scaled + self.bias


def nudged(base: Tensor, expert: Tensor, threshold: float = DEFAULT_THRESHOLD) -> Tensor:
    """Return the base's log-probabilities, or the expert's where the base gives no token the threshold.

    Source: Nudging (Fei et al. 2024, arXiv:2410.09300), token by token, as the policy `nudge`.
    """
    base_logprobs, expert_logprobs = base.log_softmax(-1), expert.log_softmax(-1)
    is_unsure = base_logprobs.amax(-1, keepdim=True).exp() < threshold
    return torch.where(is_unsure, expert_logprobs, base_logprobs)


def predictions(
    logits: Mapping[str, Tensor], alphas: Mapping[str, float], no_proxy: NoProxy
) -> Iterator[tuple[str, Tensor]]:
    """Yield every predictor's name and logits, `[rows, vocab]` float32, one after the other.

    Args:
        logits: By member: `base`, `PAIR.expert`, `PAIR.calibrated`, `PAIR.untuned`, and tuned bases, `direct`
            and perhaps `direct_short`.
        alphas: For each predictor of `STEERED`, the chosen strength.
        no_proxy: What `base` needs to predict without a proxy.
    """
    base = logits["base"].float()
    yield "base", base
    yield "no_proxy", no_proxy.logits(base)
    yield "expert", logits["smol.expert"].float()
    yield "anti_expert", logits["smol.untuned"].float()
    yield "nudge", nudged(base, logits["smol.expert"].float())
    for name in ("direct", "direct_short"):
        if name in logits:
            yield name, logits[name].float()
    for name in STEERED:
        yield name, steered(logits, name, 1.0)
        if name in alphas:
            alpha = alphas[name]
            yield f"{name}_best", steered(logits, name, alpha)
    for name in sorted({key.rpartition(".")[0] for key in logits} - {""}):
        if name not in dict(STEERED.values()):
            yield name, _steered(logits, name, "calibrated", 1.0)


def steered(logits: Mapping[str, Tensor], name: str, alpha: float) -> Tensor:
    """Return the logits of a predictor of `STEERED` at some strength."""
    return _steered(logits, *STEERED[name], alpha)


def _steered(logits: Mapping[str, Tensor], pair: str, anti_expert: str, alpha: float) -> Tensor:
    return steer(
        logits["base"],
        expert_logits=logits[f"{pair}.expert"],
        anti_expert_logits=logits[f"{pair}.{anti_expert}"],
        alpha=alpha,
    )


def is_written(
    drafted: NDArray[np.bool_],
    base: NDArray[np.bool_],
    logprobs: NDArray[np.float64],
    switch: float,
) -> bool:
    """Return whether weak-to-strong decoding writes the right answer, greedily.

    Everything is given after the right tokens so far, which is all that counts: one wrong token ends it.

    Args:
        drafted: `[tokens]`, whether the small model's likeliest token is the right one.
        base: `[tokens]`, the same of the base.
        logprobs: `[tokens]`, what the base gives the right tokens, nats.
        switch: Geometric mean of the last `DRAFTED` probabilities above which the base goes on.
    """
    for place in range(len(drafted)):
        last = logprobs[max(0, place - DRAFTED) : place]
        if len(last) and np.exp(last.mean()) >= switch:
            return bool(base[place:].all())
        if not drafted[place]:
            return False
    return True


def best_switch(
    items: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]],
) -> float:
    """Return the switch with the most right answers; ties go to the lowest."""
    return max(SWITCHES, key=lambda switch: sum(is_written(*item, switch) for item in items))
