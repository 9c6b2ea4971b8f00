"""The rules behind policies: how strongly, and by which experts, a base is steered at each token.

`logits/steer.py` has the formula. A policy decides what goes into it at each token, from the models' logits
and the token's position alone. It has no memory, and a row's result does not depend on other rows, so
batches, drafts and resumed runs give the same as one row alone.

Words: the *log-ratio* of an expert is `log p_expert - log p_anti_expert`. It differs from the difference of
logits by a constant per row, which no probability depends on; only a log-ratio has a meaningful sign and
size. An expert is *active* in a row if its strength there is not 0. A *weight* is what a policy multiplies a
requested strength with: 1 keeps it, 0 leaves the expert out. At strength 0 every policy gives the base, bit
by bit.

If an expert has weights of its own or an output bias (`logits/steer.py`), `p_expert` is the distribution of
the logits `w_expert * expert + (w_base - 1) * base + bias`, and `p_anti_expert` that of
`w_anti_expert * anti_expert`. Their log-ratio is what the formula adds, so a policy judges what would be
added. At tokens that a pair does not share, rules for single tokens (clipping, signs, union) add nothing.

No policy here saves forwards of the small models: they read every token, so that their KV caches have no
holes. A gate changes what is generated, not what it costs.

Pure functions of tensors; `policy.py` names them as a recipe writes them, and checks their settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.logits.steer import Contribution, check_shapes, combine, over_shared
from proxytune.policy import DEFAULT_MAX_ALPHA, DEFAULT_THRESHOLD, Policy

NUM_ALPHAS = 20
"""How many strengths above 0 `kl_match` tries: steps of 0.1 up to 2. Its minimum is flat."""
MAX_RATIO = 1e4
"""Log-ratios are clamped to this before sums over the vocabulary: 0 times infinity would be NaN."""


class Steered(NamedTuple):
    """What a policy made of one position."""

    logits: Tensor
    """`[rows, vocab]` float32, not normalised."""
    weights: Tensor
    """`[contributions, rows]`: what each strength was multiplied with. Policies that decide for each token of
    the vocabulary (signs, union, intersection, clipping) do so after these weights."""


def apply_policy(
    policy: Policy,
    base_logits: Tensor,
    contributions: Sequence[Contribution],
    *,
    positions: Tensor | None = None,
    padding_ids: Tensor | None = None,
) -> Steered:
    """Steer the base's logits as a policy says.

    Args:
        policy: The rules and their settings.
        base_logits: `[rows, vocab]`, any float dtype, not normalised.
        contributions: One per expert, of the base's shape; strength 0 in rows that the expert does not steer.
        positions: `[rows]`, how many new tokens came before; needed if `policy.has_positions`.
        padding_ids: Ids that no token has; their logits are ignored.

    Raises:
        VocabularyMismatch: A contribution has another shape than the base.
    """
    rows, device = len(base_logits), base_logits.device
    # The usual case. Nothing on this path reads a tensor's values, so it waits for no device.
    if policy.is_plain:
        weights = torch.ones(len(contributions), rows, device=device)
        return Steered(combine(base_logits, contributions), weights)
    is_active = _is_active(contributions, rows, device)
    if not bool(is_active.any()):
        return Steered(combine(base_logits, contributions), is_active.float())
    check_shapes(base_logits, contributions)
    base = _logprobs(base_logits, padding_ids)
    experts, anti_experts = (
        torch.stack([_logprobs(logits, padding_ids, mask) for logits, mask in side])
        for side in (
            [(_with_own(part), part.is_unshared) for part in contributions],
            [(part.anti_expert_logits, part.is_unshared) for part in contributions],
        )
    )
    alphas = torch.stack([_alphas(part, rows, device) for part in contributions])
    bases = _bases(base, contributions)
    weights = _weights(policy, base, bases, experts, anti_experts, alphas, positions)
    strengths = alphas * weights
    is_left = None
    if policy.plausibility is not None:
        is_left = is_plausible(base, policy.plausibility) | (strengths == 0).all(0)[:, None]
    if _is_weighted(policy):
        pairs = zip(contributions, strengths, strict=True)
        logits = combine(base_logits, [part._replace(alpha=own) for part, own in pairs])
    else:
        offset = _offset(policy, bases, experts, anti_experts, strengths)
        if is_left is not None:
            offset = torch.where(is_left, offset, 0.0)
        logits = base_logits.float() + offset
    if is_left is not None and policy.implausible != "leave":
        logits = logits.masked_fill(~is_left, -torch.inf)
    return Steered(logits, weights)


def apply_policies(
    policies: Sequence[Policy],
    base_logits: Tensor,
    contributions: Sequence[Contribution],
    *,
    positions: Tensor | None = None,
    padding_ids: Tensor | None = None,
) -> Steered:
    """Steer each row of the base's logits as its own policy says.

    Rows that share a policy are steered at once. What a row gets does not depend on the policies of others.

    Args:
        policies: One for each row.
        base_logits: As in `apply_policy`, like the other arguments.
        contributions: One per expert.
        positions: `[rows]`; needed if a policy has positions.
        padding_ids: Ids that no token has.

    Raises:
        VocabularyMismatch: A contribution has another shape than the base.
    """
    rows_of: dict[Policy, list[int]] = {}
    for row, policy in enumerate(policies):
        rows_of.setdefault(policy, []).append(row)
    if len(rows_of) == 1:
        return apply_policy(
            policies[0], base_logits, contributions, positions=positions, padding_ids=padding_ids
        )
    check_shapes(base_logits, contributions)
    device, num_rows = base_logits.device, len(policies)
    logits = torch.empty(base_logits.shape, dtype=torch.float32, device=device)
    weights = torch.ones(len(contributions), num_rows, device=device)
    for policy, rows in rows_of.items():
        own = torch.tensor(rows, device=device)
        found = apply_policy(
            policy,
            base_logits[own],
            [part.at(own) for part in contributions],
            positions=None if positions is None else positions[own],
            padding_ids=padding_ids,
        )
        logits[own] = found.logits
        weights[:, own] = found.weights
    return Steered(logits, weights)


def _with_own(part: Contribution) -> Tensor:
    """Return an expert's logits with what the base's weight and the bias add to them."""
    own, logits = part.own_logits, part.expert_logits
    return logits if own is None else logits.float() + own


def _is_weighted(policy: Policy) -> bool:
    """Whether a policy does nothing but give each expert a weight."""
    return (
        policy.clip is None
        and policy.name != "nudge"
        and policy.implausible != "leave"  # only log-ratios can stand beside unsteered logits
        and policy.combine not in ("sign_agreement", "union", "intersection")
    )


def _weights(
    policy: Policy,
    base: Tensor,
    bases: Tensor,
    experts: Tensor,
    anti_experts: Tensor,
    alphas: Tensor,
    positions: Tensor | None,
) -> Tensor:
    """Return what strengths are multiplied with, `[experts, rows]`; arguments are logprobs.

    `bases` is the base as each pair sees it, over the tokens that both of its sides have.
    """
    is_active = alphas != 0
    weights = is_active.float()
    if policy.combine == "inverse_entropy":
        weights = inverse_entropy_weights(experts, is_active)
    elif policy.combine == "route_entropy":
        weights = route_by_entropy(experts, is_active)
    elif policy.combine == "route_base":
        weights = route_by_base(bases, experts, is_active)
    elif policy.combine == "majority":
        offsets = _offsets(experts, anti_experts, alphas)
        weights = majority_weights(base, offsets, is_active)
    if policy.name == "kl_match":
        weights = kl_match(
            base,
            experts,
            anti_experts,
            is_active,
            max_alpha=policy.max_alpha or DEFAULT_MAX_ALPHA,
        )
    elif policy.name in ("gate_sure", "nudge"):
        weights = weights * is_unsure(base, policy.threshold or DEFAULT_THRESHOLD)
    elif policy.name == "gate_agree":
        weights = weights * is_contested(base, experts, anti_experts, is_active)
    if policy.schedule:
        assert positions is not None, "a schedule needs positions"
        weights = weights * scheduled(policy.schedule, positions.to(weights.device))
    return weights


def _offset(
    policy: Policy, bases: Tensor, experts: Tensor, anti_experts: Tensor, strengths: Tensor
) -> Tensor:
    """Return what is added to the base, `[rows, vocab]`; all arguments but the strengths are logprobs."""
    if policy.name == "nudge":
        anti_experts = bases
    offsets = _offsets(experts, anti_experts, strengths)
    is_active = strengths != 0
    if policy.combine == "sign_agreement":
        offset = sign_agreement(offsets, is_active)
    elif policy.combine == "union":
        offset = union(offsets, is_active)
    elif policy.combine == "intersection":
        offset = intersection(offsets, is_active)
    else:
        offset = offsets.sum(0)
    return offset if policy.clip is None else offset.clamp(-policy.clip, policy.clip)


# Rules, each with its source ----------------------------------------------------------------------------


def log_ratio(expert_logprobs: Tensor, anti_expert_logprobs: Tensor) -> Tensor:
    """Return `log p_expert - log p_anti_expert`; 0 where both are -inf.

    Args:
        expert_logprobs: Any shape that ends in `vocab`, nats.
        anti_expert_logprobs: The same shape.
    """
    return torch.where(
        expert_logprobs == anti_expert_logprobs, 0.0, expert_logprobs - anti_expert_logprobs
    )


def entropy(logprobs: Tensor) -> Tensor:
    """Return the entropy of distributions over the last axis, nats."""
    probs = logprobs.exp()
    # 0 log 0 is 0, but the product of 0 and -inf is not.
    return -(probs * logprobs.masked_fill(probs == 0, 0.0)).sum(-1)


def inverse_entropy_weights(expert_logprobs: Tensor, is_active: Tensor) -> Tensor:
    """Weight experts by how certain they are: `w_i = (1 / H_i) / sum_j (1 / H_j)`, H the entropy.

    The weights of a row sum to 1, so that the offsets are averaged: several experts at strength 1 steer as
    strongly as one.

    Args:
        expert_logprobs: `[experts, rows, vocab]`, of the tuned models.
        is_active: `[experts, rows]` bool.

    Returns:
        `[experts, rows]`.

    Source: the repository taltalw/distributed-proxy-tuning, which divides by the sum of the entropies, so
    that its weights do not sum to 1; here they are normalised.
    """
    # A distribution on one token has entropy 0; it then takes all the weight.
    inverse = entropy(expert_logprobs).clamp(min=1e-6).reciprocal() * is_active
    return inverse / inverse.sum(0).clamp(min=1e-30)


def route_by_entropy(expert_logprobs: Tensor, is_active: Tensor) -> Tensor:
    """Let only the most certain expert steer: weight 1 for the lowest entropy, 0 for the others.

    Args:
        expert_logprobs: `[experts, rows, vocab]`.
        is_active: `[experts, rows]` bool.

    Returns:
        `[experts, rows]`.

    Source: the limit of `inverse_entropy_weights`. Fan et al. 2024 (arXiv:2406.15480) observe that their
    search chooses one expert per token.
    """
    return _one_hot(entropy(expert_logprobs), is_active)


def route_by_base(base_logprobs: Tensor, expert_logprobs: Tensor, is_active: Tensor) -> Tensor:
    """Let only the expert steer that predicts most like the base: the one with the lowest KL(base || expert).

    Args:
        base_logprobs: `[rows, vocab]`, or `[experts, rows, vocab]` if experts lack some of its tokens.
        expert_logprobs: `[experts, rows, vocab]`.
        is_active: `[experts, rows]` bool.

    Returns:
        `[experts, rows]`, 1 for the chosen one and 0 for the others.

    Source: this project. The base has read the text; an expert that predicts alike is assumed to know its
    domain.
    """
    return _one_hot(_kl(base_logprobs, expert_logprobs), is_active)


def majority_weights(base_logprobs: Tensor, offsets: Tensor, is_active: Tensor) -> Tensor:
    """Average the experts that agree with the majority about the next token.

    Each active expert votes for the likeliest token of the base steered by it alone. The voters for the token
    with most votes share the weight evenly. A tie goes to the token whose nearest voter changes the base
    least, by KL(steered || base); that also decides between two experts that disagree.

    Args:
        base_logprobs: `[rows, vocab]`.
        offsets: `[experts, rows, vocab]`, with their strengths.
        is_active: `[experts, rows]` bool.

    Returns:
        `[experts, rows]`; a row's weights sum to 1.

    Source: majority voting over top-1 tokens, as tried in taltalw/distributed-proxy-tuning; the tie-break is
    this project's choice.
    """
    steered = (base_logprobs + offsets).log_softmax(-1)
    votes = steered.argmax(-1).masked_fill(~is_active, -1)  # [experts, rows]
    agrees = (votes[:, None] == votes[None]) & is_active[:, None] & is_active[None]
    counts = agrees.sum(1)  # [experts, rows]
    change = _kl(steered, base_logprobs).masked_fill(~is_active, torch.inf)
    most = counts.amax(0)
    leader = change.masked_fill(counts < most, torch.inf).argmin(0)  # [rows]
    voted = votes.gather(0, leader[None])[0]
    kept = (votes == voted) & is_active
    return kept / kept.sum(0).clamp(min=1)


def sign_agreement(offsets: Tensor, is_active: Tensor) -> Tensor:
    """Add up the offsets of tokens that all active experts make likelier, or all less likely; 0 elsewhere.

    Args:
        offsets: `[experts, rows, vocab]`, log-ratios times their strengths, 0 in rows that are not active.
        is_active: `[experts, rows]` bool.

    Returns:
        `[rows, vocab]`.

    Source: after TIES-merging (Yadav et al. 2023, arXiv:2306.01708, section 3), which does this with weights
    and lets the larger side win if signs differ; here such a token keeps the base's logit.
    """
    inactive = ~is_active[..., None]
    is_agreed = ((offsets > 0) | inactive).all(0) | ((offsets < 0) | inactive).all(0)
    return torch.where(is_agreed, offsets.sum(0), 0.0)


def union(offsets: Tensor, is_active: Tensor) -> Tensor:
    """Return the largest of the active experts' offsets at each token: one expert in favour is enough.

    Args:
        offsets: `[experts, rows, vocab]`, log-ratios times their strengths.
        is_active: `[experts, rows]` bool.

    Returns:
        `[rows, vocab]`; 0 in rows without an active expert.

    Source: the union operator of model arithmetic (Dekoninck et al. 2024, arXiv:2311.14479), applied to
    log-ratios rather than to logprobs.
    """
    highest = offsets.masked_fill(~is_active[..., None], -torch.inf).amax(0)
    return torch.where(is_active.any(0)[:, None], highest, 0.0)


def intersection(offsets: Tensor, is_active: Tensor) -> Tensor:
    """Return the smallest of the active experts' offsets at each token: all experts must be in favour.

    Arguments, result and source are those of `union`.
    """
    lowest = offsets.masked_fill(~is_active[..., None], torch.inf).amin(0)
    return torch.where(is_active.any(0)[:, None], lowest, 0.0)


def kl_match(
    base_logprobs: Tensor,
    expert_logprobs: Tensor,
    anti_expert_logprobs: Tensor,
    is_active: Tensor,
    *,
    max_alpha: float = DEFAULT_MAX_ALPHA,
) -> Tensor:
    """Find the strength at which steering changes the base as much as tuning changed the small model.

    For one expert, with P the base, Q the expert, A the anti-expert and P' = P steered at strength a:

        minimise over a in [0, max_alpha]:
            (KL(P' || P) - KL(Q || A))^2 + (KL(P || P') - KL(A || Q))^2

    on a grid of 0 and `NUM_ALPHAS` steps. For several experts, the terms of all active ones are summed, and
    only one strength differs from 0: the paper finds that its search ends with such a solution.

    Args:
        base_logprobs: `[rows, vocab]`.
        expert_logprobs: `[experts, rows, vocab]`.
        anti_expert_logprobs: `[experts, rows, vocab]`.
        is_active: `[experts, rows]` bool.
        max_alpha: The largest strength to try.

    Returns:
        `[experts, rows]` strengths, 0 for all experts but one.

    Source: Dynamic Logits Fusion (Fan et al. 2024, arXiv:2406.15480, equation 7 and its form for several
    experts).
    """
    probs = base_logprobs.exp()
    wanted_forward = _kl(expert_logprobs, anti_expert_logprobs)  # [experts, rows]
    wanted_back = _kl(anti_expert_logprobs, expert_logprobs)
    ratios = log_ratio(expert_logprobs, anti_expert_logprobs).clamp(-MAX_RATIO, MAX_RATIO)
    values = []
    for ratio in ratios:
        mean = (probs * ratio).sum(-1)
        for step in range(NUM_ALPHAS + 1):
            # P' is proportional to P e^(a ratio), and both divergences follow from its normaliser.
            alpha = max_alpha * step / NUM_ALPHAS
            unnormalised = base_logprobs + alpha * ratio
            log_total = unnormalised.logsumexp(-1)
            steered_mean = ((unnormalised - log_total[:, None]).exp() * ratio).sum(-1)
            forward = alpha * steered_mean - log_total
            back = log_total - alpha * mean
            errors = (forward - wanted_forward) ** 2 + (back - wanted_back) ** 2
            values.append((errors * is_active).sum(0))
    table = torch.stack(values).reshape(len(ratios), NUM_ALPHAS + 1, -1)
    table = table.masked_fill(~is_active[:, None], torch.inf).flatten(0, 1)
    best = table.argmin(0)  # [rows]
    alphas = max_alpha * (best % (NUM_ALPHAS + 1)) / NUM_ALPHAS
    # A NaN must not pass for strength 0: it shows that a model failed.
    alphas = torch.where(table.isnan().any(0), torch.nan, alphas)
    experts = torch.arange(len(ratios), device=best.device)
    return torch.where(experts[:, None] == best // (NUM_ALPHAS + 1), alphas, 0.0)


def is_unsure(base_logprobs: Tensor, threshold: float) -> Tensor:
    """Whether the base gives its likeliest token less than `threshold`, `[rows]` bool.

    Source: Nudging (Fei et al. 2024, arXiv:2410.09300, section 3), threshold 0.4 in its experiments.
    """
    return base_logprobs.amax(-1) < math.log(threshold)


def is_contested(
    base_logprobs: Tensor, expert_logprobs: Tensor, anti_expert_logprobs: Tensor, is_active: Tensor
) -> Tensor:
    """Whether base, active experts and anti-experts disagree about the likeliest token, `[rows]` bool.

    Arguments are those of `kl_match`.

    Source: this project, after the share of tokens that steering changes (Liu et al. 2024, appendix C.2).
    """
    best = base_logprobs.argmax(-1)
    differs = (expert_logprobs.argmax(-1) != best) | (anti_expert_logprobs.argmax(-1) != best)
    return (differs & is_active).any(0)


def is_plausible(base_logprobs: Tensor, plausibility: float) -> Tensor:
    """Whether the base gives a token at least `plausibility` times the probability of its likeliest token.

    Returns:
        `[rows, vocab]` bool.

    Source: Contrastive Decoding (Li et al. 2022, arXiv:2210.15097, section 3.3), 0.1 there.
    """
    return base_logprobs >= base_logprobs.amax(-1, keepdim=True) + math.log(plausibility)


def scheduled(schedule: Sequence[tuple[int, float]], positions: Tensor) -> Tensor:
    """Return the weights at positions of the new text: linear between a schedule's points, constant outside.

    Args:
        schedule: Pairs of position and weight, by ascending position.
        positions: `[rows]`, 0 for the first new token.

    Returns:
        `[rows]` float32.
    """
    place = positions.to(torch.float32)
    if len(schedule) == 1:
        return torch.full_like(place, schedule[0][1])
    # One lookup, however many points there are: a request may bring its own.
    spans = [
        (start, stop - start, low, high - low) for (start, low), (stop, high) in pairwise(schedule)
    ]
    starts, lengths, lows, rises = torch.tensor(spans, dtype=place.dtype, device=place.device).T
    span = torch.searchsorted(starts.contiguous(), place).sub_(1).clamp_(min=0)
    share = ((place - starts[span]) / lengths[span]).clamp(0, 1)
    found: Tensor = lows[span] + rises[span] * share
    return found


def has_conflict(base_logits: Tensor, contributions: Sequence[Contribution]) -> Tensor:
    """Whether a row's experts, each steering alone, would choose different tokens.

    The share of tokens for which they would is the *conflict rate*.

    Args:
        base_logits: `[rows, vocab]`, -inf at ids that no token has.
        contributions: One per expert.

    Returns:
        `[rows]` bool; False where fewer than two are active.
    """
    is_active = _is_active(contributions, len(base_logits), base_logits.device)
    if len(contributions) < 2:
        return torch.zeros(len(base_logits), dtype=torch.bool, device=base_logits.device)
    votes = torch.stack([combine(base_logits, [part]).argmax(-1) for part in contributions])
    highest = votes.masked_fill(~is_active, -1).amax(0)
    lowest = votes.masked_fill(~is_active, base_logits.shape[-1]).amin(0)
    return (highest != lowest) & is_active.any(0)


def _kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return KL(p || q) over the last axis, nats; 0 where p is 0."""
    probs = logprobs.exp()
    ratio = log_ratio(logprobs, reference_logprobs).clamp(-MAX_RATIO, MAX_RATIO)
    return (probs * ratio).sum(-1)


def _one_hot(costs: Tensor, is_active: Tensor) -> Tensor:
    """Return 1 for the active expert with the lowest cost and 0 for the others, `[experts, rows]`."""
    best = costs.masked_fill(~is_active, torch.inf).argmin(0)
    experts = torch.arange(len(costs), device=costs.device)
    return ((experts[:, None] == best) & is_active).float()


def _is_active(contributions: Sequence[Contribution], rows: int, device: torch.device) -> Tensor:
    """Return whether strengths differ from 0, `[experts, rows]` bool."""
    if not contributions:
        return torch.zeros(0, rows, dtype=torch.bool, device=device)
    return torch.stack([_alphas(part, rows, device) != 0 for part in contributions])


def _alphas(part: Contribution, rows: int, device: torch.device) -> Tensor:
    """Return a contribution's strength in each row, `[rows]` float32."""
    return torch.as_tensor(part.alpha, dtype=torch.float32, device=device).expand(rows)


def _offsets(experts: Tensor, anti_experts: Tensor, strengths: Tensor) -> Tensor:
    """Return log-ratios times strengths, `[experts, rows, vocab]`; 0 where a strength is 0."""
    offsets = log_ratio(experts, anti_experts).mul_(strengths[..., None])
    return offsets.masked_fill_((strengths == 0)[..., None], 0.0)


def _bases(base: Tensor, contributions: Sequence[Contribution]) -> Tensor:
    """Return the base's logprobs over the tokens that each pair shares, `[experts, rows, vocab]`."""
    masks = [part.is_unshared for part in contributions]
    if all(mask is None for mask in masks):
        return base.expand(len(masks), *base.shape)
    over = [base if mask is None else over_shared(base, mask.to(base.device)) for mask in masks]
    return torch.stack(over)


def _logprobs(
    logits: Tensor, padding_ids: Tensor | None, is_unshared: Tensor | None = None
) -> Tensor:
    """Return logprobs, float32, with no probability on padding and on tokens that are not shared."""
    logits = logits.float()
    if is_unshared is not None:
        logits = logits.masked_fill(is_unshared.to(logits.device), -torch.inf)
    if padding_ids is not None and len(padding_ids):
        logits = logits.index_fill(-1, padding_ids.to(logits.device), -torch.inf)
    return logits.log_softmax(-1)
