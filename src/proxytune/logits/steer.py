"""The formula: what steering does to logits.

    steered = base + alpha * (expert - anti_expert)

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


class Contribution(NamedTuple):
    """One expert's part in a step: its logits, its anti-expert's, and how strongly they count."""

    expert_logits: Tensor  # [batch, vocab]
    anti_expert_logits: Tensor  # [batch, vocab]
    alpha: float | Tensor  # a number, or [batch] for a strength per row
    is_unshared: Tensor | None = None
    """`[vocab]` or `[batch, vocab]` bool: the base's tokens that one of the two lacks, and padding ids.
    None, or False throughout a row, where both have all tokens."""

    def at(self, rows: Tensor) -> Contribution:
        """Return the part of some rows, which are indices `[num rows]`."""
        alpha, is_unshared = self.alpha, self.is_unshared
        if isinstance(alpha, Tensor) and alpha.dim():
            alpha = alpha.to(rows.device)[rows]
        if is_unshared is not None and is_unshared.dim() > 1:
            is_unshared = is_unshared.to(rows.device)[rows]
        expert, anti_expert = self.expert_logits[rows], self.anti_expert_logits[rows]
        return Contribution(expert, anti_expert, alpha, is_unshared)


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
    """Return `alpha * (expert - anti_expert)`, float32, of the contribution's shape.

    Exactly 0 in rows whose alpha is 0, whatever the small models say, and at tokens that are not shared.
    """
    # Subtract in float32: bfloat16 keeps 8 significant bits, and alpha scales the rounding.
    expert, anti_expert = part.expert_logits.float(), part.anti_expert_logits.float()
    if part.is_unshared is not None:
        # Added tokens that one of the two lacks get no offset.
        missing = part.is_unshared.to(expert.device)
        expert = over_shared(expert, missing).masked_fill(missing, 0.0)
        anti_expert = over_shared(anti_expert, missing).masked_fill(missing, 0.0)
    difference = expert - anti_expert
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
