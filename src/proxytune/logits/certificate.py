"""What the likeliest tokens of a base prove about all of them.

A base behind an API shows the logprobs of some tokens. Every other token has a logprob of at most the
*ceiling*, and all the others together have at most the *rest* of the probability. The offset is known for
every token, since the small models run here. So the steered logit of each token has an upper bound, and often
these bounds prove that the full logits would have led to the same choice.

Pure functions of tensors. Unseen tokens are at -inf in the base's logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Proof(NamedTuple):
    """What is known of a token chosen from a part of the base's logits; see `trace.Step`."""

    is_certified: bool
    max_lost_prob: float


def upper_logits(
    base_logprobs: Tensor, offsets: Tensor, *, ceilings: Tensor, scales: Tensor
) -> Tensor:
    """Return upper bounds of the steered logits, which are exact for seen tokens.

    The base's logprob of an unseen token is at most `l_k`, the lowest of the k seen ones, so its steered
    logit is at most `l_k + offset`.

    Args:
        base_logprobs: `[rows, vocab]`, nats, -inf for unseen tokens.
        offsets: `[rows, vocab]`, `alpha * (expert - anti_expert)`.
        ceilings: `[rows]`, the highest logprob that an unseen token can have; -inf if there is none.
        scales: `[rows, 1]`, above 0: what the base's logprobs are multiplied with where experts give it a
            weight, and so their bounds; 1 elsewhere.

    Returns:
        `[rows, vocab]` float32. If the token chosen from these bounds is a seen one and is also the one
        chosen from the seen tokens alone, the full logits give the same token, since no other token exceeds
        its bound. That holds for greedy choices and for draws with the same noise.
    """
    bounds = torch.where(torch.isneginf(base_logprobs), ceilings[:, None], base_logprobs)
    return scales * bounds + offsets


def spread_rest(base_logprobs: Tensor, rests: Tensor, padding_ids: Tensor) -> Tensor:
    """Return logprobs in which unseen tokens share the rest of the probability evenly.

    For scoring a given text. The text's own tokens are always seen, so the base's losses stay exact; steered
    losses are an estimate that is the better the smaller the rest is.

    Args:
        base_logprobs: `[rows, vocab]`, nats, -inf for unseen tokens.
        rests: `[rows]`, the probability of all unseen tokens together.
        padding_ids: Ids that no token has; they stay at -inf.
    """
    is_unseen = torch.isneginf(base_logprobs)
    is_unseen[:, padding_ids] = False
    share = rests.clamp(min=1e-12).log() - is_unseen.sum(-1).clamp(min=1).log()
    return torch.where(is_unseen, share[:, None], base_logprobs)


def max_lost_prob(
    upper: Tensor,
    is_seen: Tensor,
    offsets: Tensor,
    *,
    rests: Tensor,
    temperatures: Tensor,
    scales: Tensor,
    ceilings: Tensor,
) -> Tensor:
    """Bound the steered probability of all tokens that were not seen: `B / (B + S)`.

    `S` is the sum of `exp(steered / T)` over seen tokens. `B` bounds the same sum over unseen ones: it is the
    sum of their upper bounds or, at T = 1, the largest `exp(offset)` times a bound of the sum of `p^s` over
    unseen tokens, where p is the base's probability and s its scale. That sum is the rest R at s = 1. Above,
    it is at most `R exp((s - 1) ceiling)`; below, at most `R^s N^(1 - s)` for N tokens (Jensen's inequality).

    Args:
        upper: `[rows, vocab]` from `upper_logits`, padding ids at -inf.
        is_seen: `[rows, vocab]` bool.
        offsets: `[rows, vocab]`.
        rests: `[rows]`, the most probability that the base gives to unseen tokens.
        temperatures: `[rows]`; 1 for greedy rows.
        scales: `[rows, 1]`, as in `upper_logits`.
        ceilings: `[rows]`, as there.

    Returns:
        `[rows]`, between 0 and 1.
    """
    scaled = upper / temperatures[:, None]
    seen = scaled.masked_fill(~is_seen, -torch.inf).logsumexp(-1)
    unseen = scaled.masked_fill(is_seen, -torch.inf).logsumexp(-1)
    is_possible = ~is_seen & ~torch.isneginf(upper)
    largest = offsets.masked_fill(~is_possible, -torch.inf).amax(-1)
    power, num_possible = scales[:, 0], is_possible.sum(-1).clamp(min=1)
    total = torch.where(
        power < 1,
        power * rests.log() + (1 - power) * num_possible.log(),
        rests.log() + (power - 1) * ceilings,
    )
    total = torch.where(power == 1, rests.log(), total)  # 0 times an infinite ceiling is no number
    by_rest = torch.where(temperatures == 1, total + largest, torch.inf)
    return torch.sigmoid(torch.minimum(unseen, by_rest) - seen)
