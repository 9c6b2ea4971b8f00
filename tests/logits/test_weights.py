"""Weights and output biases of experts, checked by hand and by their identities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from proxytune.backends.retokenised import UNMAPPED
from proxytune.logits.certificate import max_lost_prob, upper_logits
from proxytune.logits.rules import apply_policy
from proxytune.logits.steer import (
    UNWEIGHTED,
    Contribution,
    Weights,
    combine,
    offset,
    steer,
    weighted,
)
from proxytune.policy import Policy
from tests.logits.test_policy import EVERY, noise, two_experts

WEIGHTS = Weights(base=0.8, expert=0.9, anti_expert=0.7)
BIAS = torch.tensor([0.0, 1.5, 0.0, -0.5, 0.0])


def test_the_formula_on_two_tokens_worked_out_on_paper():
    base, expert, anti_expert = (
        torch.tensor([row]) for row in ([2.0, 4.0], [1.0, 5.0], [3.0, -2.0])
    )
    part = weighted(
        Contribution(expert, anti_expert, 0.5),
        base,
        weights=Weights(base=0.5, expert=2.0, anti_expert=0.25),
        bias=torch.tensor([0.5, -1.0]),
    )
    # 0.5 * (-0.5 * 2 + 2 * 1 - 0.25 * 3 + 0.5) = 0.375; 0.5 * (-0.5 * 4 + 2 * 5 + 0.25 * 2 - 1) = 3.75
    assert combine(base, [part]).tolist() == [[2.375, 7.75]]


def test_weights_of_one_without_a_bias_leave_the_same_tensors():
    base, (part, _) = two_experts()
    same = weighted(part, base)
    assert all(one is other for one, other in zip(same, part, strict=True))


def test_a_row_at_strength_zero_is_the_base_whatever_the_small_models_say():
    base, (part, _) = two_experts()
    part.expert_logits[-1, 0] = torch.inf
    own = weighted(part, base, weights=WEIGHTS, bias=BIAS)
    assert torch.equal(combine(base, [own])[-1], base[-1])


def test_a_pair_without_weight_leaves_the_temperature_and_the_bias():
    base, (part, _) = two_experts()
    part = part._replace(alpha=1.0, expert_logits=part.expert_logits.fill_(torch.inf))
    alone = weighted(part, base, weights=Weights(0.5, 0.0, 0.0), bias=BIAS)
    torch.testing.assert_close(
        combine(base, [alone]).softmax(-1), (base / 2 + BIAS).softmax(-1), atol=1e-6, rtol=0
    )


def test_experts_with_weights_still_add_up():
    base, parts = two_experts()
    parts = [weighted(part, base, weights=WEIGHTS, bias=BIAS) for part in parts]
    together = combine(base, parts) - base
    torch.testing.assert_close(together, sum(map(offset, parts)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", EVERY, ids=Policy.describe)
def test_at_strength_zero_a_weighted_expert_leaves_the_base_bit_by_bit(policy):
    base, parts = two_experts()
    own = [weighted(part, base, weights=WEIGHTS, bias=BIAS) for part in parts]
    positions = torch.arange(6)
    none = [part._replace(alpha=0.0) for part in own]
    assert torch.equal(apply_policy(policy, base, none, positions=positions).logits, base)
    # The last row asks for no steering, among rows that do.
    assert torch.equal(apply_policy(policy, base, own, positions=positions).logits[-1], base[-1])


@pytest.mark.parametrize("policy", EVERY, ids=Policy.describe)
def test_a_policy_sees_the_pair_whose_log_ratio_is_what_the_formula_adds(policy):
    base, parts = two_experts()
    positions = torch.tensor([0, 1, 2, 3, 7, 90])
    own = [weighted(part, base, weights=WEIGHTS, bias=BIAS) for part in parts]
    whole = [
        part._replace(
            expert_logits=0.9 * part.expert_logits - 0.2 * base + BIAS,
            anti_expert_logits=0.7 * part.anti_expert_logits,
        )
        for part in parts
    ]
    found = apply_policy(policy, base, own, positions=positions)
    wanted = apply_policy(policy, base, whole, positions=positions)
    torch.testing.assert_close(found.weights, wanted.weights, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits, wanted.logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_weights_of_their_own_get_what_each_gets_alone_bit_by_bit(dtype):
    base, parts = two_experts()
    base, part = base.to(dtype), parts[0]
    part = Contribution(part.expert_logits.to(dtype), part.anti_expert_logits.to(dtype), part.alpha)
    every = [UNWEIGHTED, WEIGHTS, Weights(0.95, 0.92, 0.9), Weights(1.3, 0.0, 1.0)]
    every += [Weights(base=0.7), UNWEIGHTED]
    biases = [None, BIAS, None, BIAS / 3, None, BIAS]
    mixed = Weights(*(torch.tensor([w[n] for w in every], dtype=torch.float64) for n in range(3)))
    none = torch.zeros(5)
    bias = torch.stack([none if own is None else own for own in biases])
    together = combine(base, [weighted(part, base, weights=mixed, bias=bias)])
    for row in range(6):
        own = part.at(torch.tensor([row]))
        own = own._replace(alpha=float(part.alpha[row]))
        alone = weighted(own, base[[row]], weights=every[row], bias=biases[row])
        assert torch.equal(combine(base[[row]], [alone])[0], together[row])
        # Also if they are taken from a weighted contribution.
        some = weighted(part, base, weights=mixed, bias=bias).at(torch.tensor([row]))
        assert torch.equal(combine(base[[row]], [some])[0], together[row])


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_a_token_that_the_base_excludes_stays_excluded(weight):
    base, (part, _) = two_experts()
    base[:, 2] = -torch.inf
    steered = combine(base, [weighted(part, base, weights=Weights(base=weight))])
    assert (steered[:, 2] == -torch.inf).all() and not steered.isnan().any()


MISSING = torch.tensor([False, False, False, True, False])


def test_temperature_and_bias_count_at_tokens_that_a_pair_lacks():
    base, (part, _) = two_experts()
    part = part._replace(alpha=1.0, is_unshared=MISSING)
    found = offset(weighted(part, base, weights=Weights(base=0.8), bias=BIAS))
    torch.testing.assert_close(found[:, 3], -0.2 * base[:, 3] - 0.5)


def test_the_zero_point_of_small_models_does_not_move_tokens_that_a_pair_lacks():
    base, (part, _) = two_experts()
    parts = [
        part._replace(expert_logits=part.expert_logits + c, is_unshared=MISSING)
        for c in (0.0, 40.0)
    ]
    one, other = (combine(base, [weighted(p, base, weights=WEIGHTS)]) for p in parts)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_tokens_of_another_tokenizer_get_no_offset_and_keep_their_share():
    """Tempering both models raises nothing against the tokens that neither has an opinion of."""
    base = torch.zeros(3, 5)
    logprobs = noise(1, 3, 3).log_softmax(-1)
    own = torch.full((3, 5), UNMAPPED)
    own[:2, 1:4] = logprobs[:2]  # the last row is in the middle of a character
    part = Contribution(own, own.clone(), 1.0)
    for weights in (Weights(1.0, 0.9, 0.9), Weights(1.0, 0.5, 2.0)):
        found = offset(weighted(part, base, weights=weights, unmapped=UNMAPPED))
        assert (found[:, [0, 4]] == 0).all() and (found[2] == 0).all()
        tempered = weighted(part, base, weights=weights, unmapped=UNMAPPED).expert_logits[:2]
        torch.testing.assert_close(tempered[:, 1:4].exp().sum(-1), torch.ones(2))
    mixed = torch.tensor([UNMAPPED, torch.nan, UNMAPPED], dtype=torch.float64)
    found = weighted(part, base, weights=Weights(1.0, 0.5, 2.0), unmapped=mixed)
    alone = weighted(part, base, weights=Weights(1.0, 0.5, 2.0)).expert_logits
    assert torch.equal(found.expert_logits[1], alone[1])


def test_gradients_reach_the_weights_and_the_bias():
    """What fits them computes with this formula."""
    base, (part, _) = two_experts()
    numbers = torch.ones(3, requires_grad=True)
    bias = torch.zeros(5, requires_grad=True)
    own = weighted(part, base, weights=Weights(*numbers.unbind()), bias=bias)
    combine(base, [own]).log_softmax(-1)[:, 1].sum().backward()
    assert numbers.grad is not None and numbers.grad.abs().min() > 0
    assert bias.grad is not None and bias.grad.abs().max() > 0


def test_a_weighted_expert_at_weights_of_one_is_the_published_method():
    base, (part, _) = two_experts()
    ones = Weights(*(torch.ones(6, dtype=torch.float64) for _ in range(3)))
    expected: Tensor = steer(
        base,
        expert_logits=part.expert_logits,
        anti_expert_logits=part.anti_expert_logits,
        alpha=part.alpha,
    )
    found = combine(base, [weighted(part, base, weights=ones, bias=torch.zeros(5))])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("scale", "num_likely"), [(0.5, 0), (1.0, 0), (2.0, 4)])
def test_the_bound_of_unseen_probability_is_reached_in_the_worst_case(scale, num_likely):
    """Below a scale of 1 the worst is a rest spread evenly, above 1 one on tokens at the ceiling."""
    num_seen, num_unseen, rest = 4, 400, 0.01
    unseen = torch.zeros(num_unseen)
    unseen[: num_likely or None] = rest / (num_likely or num_unseen)
    probs = torch.cat([torch.full((num_seen,), (1 - rest) / num_seen), unseen])
    is_seen = torch.arange(num_seen + num_unseen) < num_seen
    base = probs.log().masked_fill(~is_seen, -torch.inf)[None]
    ceiling = float(unseen.max().log()) + (0.0 if num_likely else 4.0)
    given = {"ceilings": torch.tensor([ceiling]), "scales": torch.tensor([[scale]])}
    offsets = torch.zeros(1, len(probs))
    upper = upper_logits(base, offsets, **given)
    bound = max_lost_prob(
        upper,
        is_seen[None],
        offsets,
        rests=torch.tensor([rest]),
        temperatures=torch.ones(1),
        **given,
    )
    powers = probs**scale
    lost = powers[~is_seen].sum() / powers.sum()
    torch.testing.assert_close(bound[0], lost, rtol=1e-4, atol=0)
