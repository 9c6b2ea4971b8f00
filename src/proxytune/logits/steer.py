"""The formula: what steering does to logits.

    steered = base + alpha * (expert - anti_expert)

An expert may have *weights* for the three models and an *output bias*, a number added to each token's logit:

    steered = base + alpha * ((w_base - 1) * base + w_expert * expert - w_anti_expert * anti_expert + bias)

With all weights 1 and no bias this is the formula above. At strength 0 it is still the base, experts still
add up, and at strength 1 a base weight of w gives the base the temperature 1 / w.

Pure functions of tensors. Vocabularies are aligned before (`text/vocab.py`). Strengths that vary from token
to token and rules between experts build on it (`logits/rules.py`). Choosing a token comes after
(`logits/sample.py`).

Source: Liu et al. 2024, "Tuning Language Models by Proxy", arXiv:2401.08565, section 2. The sum over several
experts is the one of DExperts' ensembles (Liu et al. 2021, arXiv:2105.03023, equation 1), with a separate
strength for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.errors import VocabularyMismatch


class Weights(NamedTuple):
    """How strongly each model counts in an expert's contribution; a number, or `[batch]` for one per row.

    `base` is above 0, the others are at least 0.
    """

    base: float | Tensor = 1.0
    expert: float | Tensor = 1.0
    anti_expert: float | Tensor = 1.0


UNWEIGHTED = Weights()


class Contribution(NamedTuple):
    """One expert's part in a step: its logits, its anti-expert's, and how strongly they count.

    Where the expert has weights or a bias, `weighted` has applied them to the logits here.
    """

    expert_logits: Tensor  # [batch, vocab]
    anti_expert_logits: Tensor  # [batch, vocab]
    alpha: float | Tensor  # a number, or [batch] for a strength per row
    is_unshared: Tensor | None = None
    """`[vocab]` or `[batch, vocab]` bool: the base's tokens that one of the two lacks, and padding ids.
    None, or False throughout a row, where both have all tokens."""
    own_logits: Tensor | None = None
    """`[vocab]` or `[batch, vocab]` float32: `(w_base - 1) * base + bias`, which counts at every token,
    shared or not; None for 0."""

    def at(self, rows: Tensor) -> Contribution:
        """Return the part of some rows, which are indices `[num rows]`."""
        alpha = self.alpha
        if isinstance(alpha, Tensor) and alpha.dim():
            alpha = alpha.to(rows.device)[rows]
        is_unshared, own_logits = (
            part if part is None or part.dim() == 1 else part.to(rows.device)[rows]
            for part in (self.is_unshared, self.own_logits)
        )
        expert, anti_expert = self.expert_logits[rows], self.anti_expert_logits[rows]
        return Contribution(expert, anti_expert, alpha, is_unshared, own_logits)


def weighted(
    part: Contribution,
    base_logits: Tensor | None,
    *,
    weights: Weights = UNWEIGHTED,
    bias: Tensor | None = None,
    unmapped: float | Tensor | None = None,
) -> Contribution:
    """Apply an expert's weights and output bias to its contribution.

    A model whose weight is not 1 is *tempered*: its distribution to the power of the weight, normalised
    again where that matters, which is beside tokens that the pair has no offset for. So raising or lowering
    both weights moves no probability between those tokens and the others.

    Args:
        part: As the models give it.
        base_logits: `[batch, vocab]`, the base's; -inf where it gives none, and nothing is added there. None
            leaves the base's weight out, for a caller that scales the base itself.
        weights: How strongly each model counts.
        bias: `[vocab]` or `[batch, vocab]`, added at each token; None for none.
        unmapped: The logit of both models at tokens that they have no opinion of, which stays as it is. A
            number, or `[batch]` with NaN for rows whose models have one of every token.

    Returns:
        A contribution whose `offset` is `alpha * ((w_base - 1) * base + w_expert * expert -
        w_anti_expert * anti_expert + bias)`; with weights of 1 and no bias, the same tensors.
    """
    own = None if bias is None else bias.to(part.expert_logits.device, torch.float32)
    if base_logits is not None and not _is_one(weights.base):
        # A token that the base excludes stays excluded at any weight.
        base = torch.where(base_logits.isfinite(), base_logits.float(), 0.0)
        from_base = _scaled(base, _less_one(weights.base))
        own = from_base if own is None else from_base + own
    return part._replace(
        expert_logits=_tempered(part.expert_logits, weights.expert, unmapped),
        anti_expert_logits=_tempered(part.anti_expert_logits, weights.anti_expert, unmapped),
        own_logits=own,
    )


def _is_one(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 1


def _less_one(weight: float | Tensor) -> float | Tensor:
    # In float64, so that a row's number does not depend on whether its batch has several weights.
    return weight.double() - 1.0 if isinstance(weight, Tensor) else weight - 1.0


def _scaled(logits: Tensor, factor: float | Tensor) -> Tensor:
    """Return float32 logits times a number, or times one per row; 0 where that is 0."""
    logits = logits.float()
    if not isinstance(factor, Tensor):
        return torch.zeros_like(logits) if factor == 0 else logits * factor
    factor = factor.to(logits).reshape(-1, *[1] * (logits.dim() - 1))
    # Infinity times 0 would be NaN.
    return torch.where((factor == 0) & logits.isinf(), 0.0, logits) * factor


def _tempered(logits: Tensor, weight: float | Tensor, unmapped: float | Tensor | None) -> Tensor:
    """Return a model's logits to its weight; see `weighted`."""
    if _is_one(weight):
        return logits
    scaled = _scaled(logits, weight)
    if unmapped is None:
        return scaled
    if isinstance(unmapped, Tensor):
        unmapped = unmapped.to(scaled).reshape(-1, *[1] * (logits.dim() - 1))
    is_unmapped = logits == unmapped
    before, after = (
        each.float().masked_fill(is_unmapped, -torch.inf).logsumexp(-1, keepdim=True)
        for each in (logits, scaled)
    )
    tempered = scaled + (before - after)
    if isinstance(unmapped, Tensor):
        tempered = torch.where(unmapped.isnan(), scaled, tempered)
    return torch.where(is_unmapped, logits.float(), tempered)


def steer(
    base_logits: Tensor,
    *,
    expert_logits: Tensor,
    anti_expert_logits: Tensor,
    alpha: float | Tensor = 1.0,
) -> Tensor:
    """Shift the base model's logits by what tuning changed in the small model.

        steered = base + alpha * (expert - anti_expert)

    Args:
        base_logits: `[batch, vocab]`, or any shape that ends in `vocab`; any float dtype, not normalised.
        expert_logits: Same shape, from the tuned small model.
        anti_expert_logits: Same shape, from the same small model before tuning.
        alpha: Strength of the shift, no unit: 0 gives the base, 1 the published method. A number, or
            `[batch]` for a strength per row.

    Returns:
        Same shape, float32, not normalised. Where alpha is 0 it equals the base bit by bit.

    Raises:
        VocabularyMismatch: The three do not share one shape. `text/vocab.py` aligns them.
    """
    return combine(base_logits, [Contribution(expert_logits, anti_expert_logits, alpha)])


def combine(base_logits: Tensor, contributions: Sequence[Contribution]) -> Tensor:
    """Add the offsets of several experts to the base: `base + sum_i alpha_i (expert_i - anti_expert_i)`.

    Args:
        base_logits: `[batch, vocab]`, or any shape that ends in `vocab`; any float dtype.
        contributions: One per expert, each of the base's shape. An empty sequence gives the base.

    Returns:
        Same shape, float32, not normalised. It may share memory with `base_logits` if nothing is added.

    Raises:
        VocabularyMismatch: A contribution has another shape than the base.
    """
    check_shapes(base_logits, contributions)
    steered = base_logits.float()
    for part in contributions:
        if not isinstance(part.alpha, Tensor) and part.alpha == 0:
            continue
        steered = steered + offset(part)
    return steered


def check_shapes(base_logits: Tensor, contributions: Sequence[Contribution]) -> None:
    """Raise `VocabularyMismatch` if a contribution has another shape than the base."""
    for part in contributions:
        for name, logits in zip(("expert", "anti-expert"), part[:2], strict=True):
            if logits.shape != base_logits.shape:
                raise VocabularyMismatch(
                    f"the {name}'s logits have shape {list(logits.shape)} and the base's "
                    f"{list(base_logits.shape)}, so they cannot be added token by token.\n"
                    "hint: proxytune.text.vocab.align brings models with one set of tokens to one width"
                )


def offset(part: Contribution) -> Tensor:
    """Return `alpha * (expert - anti_expert)`, float32, of the contribution's shape, with `own_logits`.

    Exactly 0 in rows whose alpha is 0, whatever the small models say, and at tokens that are not shared
    unless the base's weight or the bias says something about them.
    """
    # Subtract in float32: bfloat16 keeps 8 significant bits, and alpha scales the rounding.
    expert, anti_expert = part.expert_logits.float(), part.anti_expert_logits.float()
    if part.is_unshared is not None:
        # Added tokens that one of the two lacks get no offset.
        missing = part.is_unshared.to(expert.device)
        expert = over_shared(expert, missing).masked_fill(missing, 0.0)
        anti_expert = over_shared(anti_expert, missing).masked_fill(missing, 0.0)
    difference = expert - anti_expert
    if part.own_logits is not None:
        difference = difference + part.own_logits
    if not isinstance(part.alpha, Tensor):
        return difference.mul_(part.alpha)
    alpha = part.alpha.to(difference)
    alpha = alpha.reshape(-1, *[1] * (difference.dim() - 1))
    # Infinite logits times 0 would be NaN and reach a row that asked for no steering.
    return torch.where(alpha == 0, 0.0, difference.mul_(alpha))


def over_shared(logits: Tensor, is_unshared: Tensor) -> Tensor:
    """Return a model's logprobs over the tokens that a pair shares, float32, -inf at the others.

    Where a pair shares all tokens, a constant added to a model's logits changes no probability. Beside tokens
    without an offset it would make all others likelier or less likely, so there the offset is the log-ratio.

    Args:
        logits: `[..., vocab]`, any float dtype, not normalised.
        is_unshared: `[vocab]` or of the shape of `logits`, bool. Rows that are False throughout stay as they
            are.
    """
    shared = logits.float().masked_fill(is_unshared, -torch.inf)
    return torch.where(is_unshared.any(-1, keepdim=True), shared.log_softmax(-1), shared)
