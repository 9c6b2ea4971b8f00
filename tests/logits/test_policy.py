"""Policies: each on two to five tokens, worked out by hand; what all of them keep; what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from proxytune.errors import InvalidRequest, VocabularyMismatch
from proxytune.logits.rules import (
    apply_policy,
    entropy,
    has_conflict,
    intersection,
    inverse_entropy_weights,
    is_contested,
    is_plausible,
    is_unsure,
    kl_match,
    log_ratio,
    majority_weights,
    route_by_base,
    route_by_entropy,
    scheduled,
    sign_agreement,
    union,
)
from proxytune.logits.steer import Contribution, combine, steer
from proxytune.policy import COMBINATIONS, IMPLAUSIBLE, POLICIES, Policy

# Every combination, every policy, every further setting at least once.
EVERY = [
    *(Policy(combine=name) for name in COMBINATIONS),
    *(Policy(name=name) for name in POLICIES),
    Policy(clip=0.5),
    Policy(plausibility=0.3),
    Policy(plausibility=0.3, implausible="leave"),
    Policy(schedule=((0, 0.25), (10, 1.0))),
    Policy("union", "gate_sure", threshold=0.6, clip=1.0, plausibility=0.2, implausible="leave"),
    Policy("majority", "gate_agree", schedule=((2, 1.0), (4, 0.0))),
]
# "exclude" takes tokens away even where experts change nothing, which is what it is for.
KEEPING = [p for p in EVERY if p.plausibility is None or p.implausible == "leave"]


def probs(*rows: list[float]) -> Tensor:
    """Return logprobs of the given probabilities, `[rows, vocab]`."""
    return torch.tensor(rows).log()


def noise(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_experts(rows: int = 6, vocab: int = 5) -> tuple[Tensor, list[Contribution]]:
    """Return random logits: two experts, one of them at strength 0 in some rows, both in the last."""
    first = torch.tensor([1.0, 0.5, 0.0, 1.0, -0.7, 0.0])[:rows]
    second = torch.tensor([0.0, 1.2, 0.8, 1.0, 0.3, 0.0])[:rows]
    return noise(0, rows, vocab), [
        Contribution(noise(1, rows, vocab), noise(2, rows, vocab), first),
        Contribution(noise(3, rows, vocab), noise(4, rows, vocab), second),
    ]


# What all policies keep ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EVERY, ids=Policy.describe)
def test_at_strength_zero_every_policy_is_the_base_bit_by_bit(policy):
    base, parts = two_experts()
    positions = torch.arange(6)
    none = [part._replace(alpha=0.0) for part in parts]
    assert torch.equal(apply_policy(policy, base, none, positions=positions).logits, base)
    # The last row asks for no steering, among rows that do.
    assert torch.equal(apply_policy(policy, base, parts, positions=positions).logits[-1], base[-1])


@pytest.mark.parametrize("policy", KEEPING, ids=Policy.describe)
def test_experts_equal_to_their_anti_experts_leave_the_base(policy):
    if policy.name == "nudge":
        pytest.skip("nudging puts the expert in the base's place, whatever the anti-expert says")
    base, parts = two_experts()
    same = [part._replace(anti_expert_logits=part.expert_logits) for part in parts]
    steered = apply_policy(policy, base, same, positions=torch.arange(6)).logits
    assert torch.equal(steered, base)


@pytest.mark.parametrize("policy", EVERY, ids=Policy.describe)
def test_a_rows_result_does_not_depend_on_other_rows(policy):
    base, parts = two_experts()
    positions = torch.tensor([0, 1, 2, 3, 7, 90])
    whole = apply_policy(policy, base, parts, positions=positions)
    for row in range(len(base)):
        own = [
            Contribution(p.expert_logits[[row]], p.anti_expert_logits[[row]], float(p.alpha[row]))
            for p in parts
        ]
        alone = apply_policy(policy, base[[row]], own, positions=positions[[row]])
        # Sums over five tokens in another order of loops: a few roundings of numbers below 10.
        torch.testing.assert_close(alone.logits[0], whole.logits[row], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.weights[:, 0], whole.weights[:, row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", EVERY, ids=Policy.describe)
def test_an_expert_at_strength_zero_has_no_say_however_odd_its_logits(policy):
    base, (first, second) = two_experts()
    odd = second._replace(alpha=0.0, expert_logits=torch.full_like(base, 3.0))
    odd.anti_expert_logits[:, 0] = 50.0
    positions = torch.arange(6)
    alone = apply_policy(policy, base, [first], positions=positions)
    beside = apply_policy(policy, base, [first, odd], positions=positions)
    torch.testing.assert_close(beside.logits, alone.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_with_one_expert_every_combination_is_the_published_method(combination):
    base, (part, _) = two_experts()
    steered = apply_policy(Policy(combination), base, [part]).logits
    expected = steer(
        base,
        expert_logits=part.expert_logits,
        anti_expert_logits=part.anti_expert_logits,
        alpha=part.alpha,
    )
    # The same probabilities: log-ratios differ from differences of logits by a constant per row.
    torch.testing.assert_close(steered.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", EVERY, ids=Policy.describe)
def test_padding_ids_do_not_change_what_tokens_get(policy):
    base, parts = two_experts()
    positions = torch.arange(6)
    plain = apply_policy(policy, base, parts, positions=positions).logits

    def pad(logits: Tensor, value: float) -> Tensor:
        return torch.cat([logits, torch.full((len(logits), 2), value)], dim=1)

    padded = [
        p._replace(
            expert_logits=pad(p.expert_logits, 9.0),
            anti_expert_logits=pad(p.anti_expert_logits, -3.0),
        )
        for p in parts
    ]
    steered = apply_policy(
        policy, pad(base, 40.0), padded, positions=positions, padding_ids=torch.tensor([5, 6])
    ).logits[:, :5]
    torch.testing.assert_close(steered, plain, atol=1e-5, rtol=0)


def test_the_published_policy_is_the_sum_of_the_formula_bit_by_bit():
    base, parts = two_experts()
    assert Policy().is_plain
    assert torch.equal(apply_policy(Policy(), base, parts).logits, combine(base, parts))


@pytest.mark.parametrize("policy", EVERY, ids=Policy.describe)
def test_logits_of_another_width_are_refused(policy):
    base, parts = two_experts()
    with pytest.raises(VocabularyMismatch, match=r"\[6, 4\].*\[6, 5\]"):
        apply_policy(
            policy,
            base,
            [parts[0]._replace(expert_logits=torch.zeros(6, 4))],
            positions=torch.arange(6),
        )


@pytest.mark.parametrize("policy", EVERY, ids=Policy.describe)
def test_inputs_are_left_as_they_were(policy):
    base, parts = two_experts()
    apply_policy(policy, base, parts, positions=torch.arange(6))
    again, others = two_experts()
    assert torch.equal(base, again)
    for part, other in zip(parts, others, strict=True):
        assert torch.equal(part.expert_logits, other.expert_logits)
        assert torch.equal(part.anti_expert_logits, other.anti_expert_logits)
        assert torch.equal(part.alpha, other.alpha)


def test_a_model_that_says_nan_is_not_hidden_by_kl_matching():
    base, (part, _) = two_experts()
    part.expert_logits[0, 0] = torch.nan
    assert apply_policy(Policy(name="kl_match"), base, [part]).logits[0].isnan().any()


# Strength -----------------------------------------------------------------------------------------------


def test_kl_matching_finds_strength_one_where_the_base_is_the_anti_expert():
    """With P = A and a = 1, P' is Q: both divergences are then exactly the wanted ones."""
    anti_expert = probs([0.7, 0.2, 0.1])
    expert = probs([0.2, 0.3, 0.5])
    found = kl_match(anti_expert, expert[None], anti_expert[None], torch.ones(1, 1, dtype=bool))
    assert found.tolist() == [[1.0]]


def test_kl_matching_steers_further_where_the_base_resists():
    """A base that is surer than the anti-expert moves less at strength 1, so more is needed.

    Two tokens, whose log-ratios differ by ln(9/5) - ln(1/5) = ln 9. The wanted KL(Q || A) is
    0.9 ln 1.8 + 0.1 ln 0.2 = 0.368, KL(A || Q) = 0.5 ln(5/9) + 0.5 ln 5 = 0.511. The base has odds 1:99;
    at strength a its odds are 9^a : 99. At a = 2 they are 81:99, P' = (0.45, 0.55), and
    KL(P' || P) = 0.45 ln 45 + 0.55 ln(0.5556) = 1.390, too far; at a = 1, (1/12, 11/12) gives
    0.0833 ln 8.333 + 0.9167 ln 0.9259 = 0.106, too little.
    """
    pair = probs([0.9, 0.1]), probs([0.5, 0.5])
    active = torch.ones(1, 1, dtype=bool)
    (found,) = kl_match(probs([0.01, 0.99]), pair[0][None], pair[1][None], active).flatten()
    assert 1.0 < found < 2.0


def test_kl_matching_does_not_steer_where_tuning_changed_nothing():
    same = probs([0.4, 0.6])
    found = kl_match(probs([0.5, 0.5]), same[None], same[None], torch.ones(1, 1, dtype=bool))
    assert found.tolist() == [[0.0]]


def test_kl_matching_stays_within_the_largest_strength():
    """Tuning moved the pair far; a base that is nearly certain would need a strength above 0.5."""
    expert, anti_expert = probs([0.9, 0.1]), probs([0.1, 0.9])
    active = torch.ones(1, 1, dtype=bool)
    base = probs([0.001, 0.999])
    found = kl_match(base, expert[None], anti_expert[None], active, max_alpha=0.5)
    assert found.tolist() == [[0.5]]


def test_kl_matching_of_several_experts_lets_one_steer():
    base, parts = two_experts()
    weights = apply_policy(Policy(name="kl_match"), base, parts).weights
    assert ((weights != 0).sum(0) <= 1).all()
    assert (weights != 0).any()


def test_kl_matching_takes_the_expert_whose_divergences_can_be_met():
    """The second expert changed nothing, so strength 1 of the first misses its wants by KL(Q || A) of the
    first, as strength 0 misses the first's: in sum the least is between, with the first expert."""
    anti_expert = probs([0.5, 0.5])
    experts = torch.stack([probs([0.8, 0.2]), anti_expert])
    found = kl_match(
        anti_expert,
        experts,
        anti_expert[None].expand(2, 1, 2),
        torch.ones(2, 1, dtype=bool),
    )
    assert 0 < found[0] < 1
    assert found[1] == 0


def test_the_strength_that_was_asked_for_scales_what_kl_matching_finds():
    anti_expert = probs([0.7, 0.2, 0.1])
    expert = probs([0.2, 0.3, 0.5])
    half = apply_policy(
        Policy(name="kl_match"), anti_expert, [Contribution(expert, anti_expert, 0.5)]
    )
    assert half.weights.tolist() == [[1.0]]
    expected = anti_expert + 0.5 * (expert - anti_expert)
    torch.testing.assert_close(half.logits, expected)


def test_the_sure_gate_steers_only_where_no_token_reaches_the_threshold():
    base = probs([0.39, 0.31, 0.3], [0.41, 0.3, 0.29])
    assert is_unsure(base, 0.4).tolist() == [True, False]
    part = Contribution(probs([0.2, 0.2, 0.6]).expand(2, 3), base, 1.0)
    steered = apply_policy(Policy(name="gate_sure"), base, [part])
    assert steered.weights.tolist() == [[1.0, 0.0]]
    assert torch.equal(steered.logits[1], base[1])
    torch.testing.assert_close(steered.logits[0].softmax(-1), torch.tensor([0.2, 0.2, 0.6]))


def test_the_agreement_gate_steers_only_where_one_of_the_three_prefers_another_token():
    base = probs([0.6, 0.4], [0.6, 0.4], [0.6, 0.4])
    expert = probs([0.9, 0.1], [0.1, 0.9], [0.9, 0.1])
    anti_expert = probs([0.8, 0.2], [0.8, 0.2], [0.2, 0.8])
    active = torch.ones(1, 3, dtype=bool)
    assert is_contested(base, expert[None], anti_expert[None], active).tolist() == [0, 1, 1]
    part = Contribution(expert, anti_expert, 1.0)
    assert apply_policy(Policy(name="gate_agree"), base, [part]).weights.tolist() == [[0, 1, 1]]


def test_nudging_puts_the_expert_in_the_base_s_place_where_the_base_is_unsure():
    base = probs([0.35, 0.35, 0.3], [0.8, 0.1, 0.1])
    expert = probs([0.1, 0.1, 0.8], [0.1, 0.1, 0.8])
    part = Contribution(expert, torch.full_like(base, 7.0), 1.0)
    steered = apply_policy(Policy(name="nudge"), base, [part]).logits.softmax(-1)
    torch.testing.assert_close(steered, torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]]))


def test_a_schedule_is_linear_between_its_points_and_constant_outside():
    schedule = ((2, 0.0), (6, 1.0), (8, 0.5))
    positions = torch.tensor([0, 2, 3, 6, 7, 8, 100])
    assert scheduled(schedule, positions).tolist() == [0, 0, 0.25, 1, 0.75, 0.5, 0.5]


def test_a_warm_up_of_a_hundred_tokens_steers_from_the_next_one_on():
    assert scheduled(((99, 0.0), (100, 1.0)), torch.tensor([0, 98, 99, 100])).tolist() == [
        0,
        0,
        0,
        1,
    ]


def test_a_schedule_multiplies_the_strength_at_each_position():
    base = torch.zeros(3, 2)
    part = Contribution(torch.tensor([[2.0, 0.0]]).expand(3, 2), base, 0.5)
    policy = Policy(schedule=((0, 1.0), (2, 0.0)))
    steered = apply_policy(policy, base, [part], positions=torch.tensor([0, 1, 5]))
    assert steered.logits.tolist() == [[1.0, 0], [0.5, 0], [0, 0]]


def test_clipping_bounds_what_any_token_gains_or_loses():
    """Log-ratios are ln(0.8/0.25) = 1.163, ln(0.1/0.25) = -0.916 and ln(0.1/0.5) = -1.609."""
    base = torch.zeros(1, 3)
    part = Contribution(probs([0.8, 0.1, 0.1]), probs([0.25, 0.25, 0.5]), 1.0)
    steered = apply_policy(Policy(clip=1.0), base, [part]).logits
    torch.testing.assert_close(steered, torch.tensor([[1.0, math.log(0.4), -1.0]]))


def test_clipping_does_not_depend_on_the_zero_point_of_logits():
    base, (part, _) = two_experts()
    moved = part._replace(expert_logits=part.expert_logits + 100)
    one, other = (apply_policy(Policy(clip=0.7), base, [p]).logits for p in (part, moved))
    # Float32 keeps 100 + x to 8e-6.
    torch.testing.assert_close(one, other, atol=5e-5, rtol=0)


def test_implausible_tokens_are_those_far_below_the_likeliest():
    base = probs([0.5, 0.25, 0.2, 0.05])
    assert is_plausible(base, 0.3).tolist() == [[True, True, True, False]]
    assert is_plausible(base, 0.45).tolist() == [[True, True, False, False]]


def test_excluded_tokens_get_no_probability_and_left_ones_the_odds_of_the_base():
    base = probs([0.6, 0.3, 0.1])
    part = Contribution(probs([0.1, 0.1, 0.8]), probs([0.2, 0.4, 0.4]), 1.0)
    # Plausible at 0.3: the first two, whose ratios are 1/2 and 1/4; the third's would be 2.
    excluded = apply_policy(Policy(plausibility=0.3), base, [part]).logits.exp()
    left = apply_policy(Policy(plausibility=0.3, implausible="leave"), base, [part]).logits.exp()
    torch.testing.assert_close(excluded, torch.tensor([[0.3, 0.075, 0.0]]))
    torch.testing.assert_close(left, torch.tensor([[0.3, 0.075, 0.1]]))


# Several experts ----------------------------------------------------------------------------------------


def test_the_ratio_of_two_impossible_tokens_is_one():
    one = torch.tensor([-torch.inf, 0.0])
    assert log_ratio(one, one.clone()).tolist() == [0, 0]


def test_entropy_is_that_of_a_coin_and_of_certainty():
    found = entropy(probs([0.5, 0.5], [1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([math.log(2), 0.0]))


def test_inverse_entropy_weighs_an_expert_of_half_the_entropy_twice():
    """Entropies ln 2 and ln 4 = 2 ln 2: weights 2/3 and 1/3."""
    experts = torch.stack([probs([0.5, 0.5, 0.0, 0.0]), probs([0.25, 0.25, 0.25, 0.25])])
    weights = inverse_entropy_weights(experts, torch.ones(2, 1, dtype=bool))
    torch.testing.assert_close(weights, torch.tensor([[2 / 3], [1 / 3]]))


def test_routing_by_entropy_lets_the_surest_active_expert_steer():
    experts = torch.stack([probs([0.5, 0.5]), probs([0.9, 0.1])])
    both, first = torch.tensor([[True], [True]]), torch.tensor([[True], [False]])
    assert route_by_entropy(experts, both).tolist() == [[0], [1]]
    assert route_by_entropy(experts, first).tolist() == [[1], [0]]


def test_routing_by_the_base_lets_the_expert_steer_that_predicts_alike():
    base = probs([0.2, 0.8])
    experts = torch.stack([probs([0.9, 0.1]), probs([0.3, 0.7])])
    assert route_by_base(base, experts, torch.ones(2, 1, dtype=bool)).tolist() == [[0], [1]]


def test_the_majority_shares_the_weight():
    base = torch.zeros(1, 3)
    for_first, for_last = torch.tensor([[2.0, 0, 0]]), torch.tensor([[0.0, 0, 9]])
    offsets = torch.stack([for_first, for_last, for_first * 2])
    weights = majority_weights(base.log_softmax(-1), offsets, torch.ones(3, 1, dtype=bool))
    assert weights.tolist() == [[0.5], [0], [0.5]]


def test_of_equally_many_votes_those_count_that_change_the_base_least():
    base = torch.zeros(1, 3)
    offsets = torch.stack([torch.tensor([[5.0, 0, 0]]), torch.tensor([[0.0, 1, 0]])])
    weights = majority_weights(base.log_softmax(-1), offsets, torch.ones(2, 1, dtype=bool))
    assert weights.tolist() == [[0], [1]]


def test_signs_that_disagree_leave_a_token_alone():
    offsets = torch.tensor([[[1.0, 1.0, -1.0, 0.0]], [[2.0, -2.0, -2.0, 3.0]]])
    both = torch.ones(2, 1, dtype=bool)
    assert sign_agreement(offsets, both).tolist() == [[3.0, 0, -3.0, 0]]


def test_union_takes_the_largest_offset_and_intersection_the_smallest():
    offsets = torch.tensor([[[1.0, -3.0]], [[0.5, 2.0]]])
    both = torch.ones(2, 1, dtype=bool)
    assert union(offsets, both).tolist() == [[1.0, 2.0]]
    assert intersection(offsets, both).tolist() == [[0.5, -3.0]]
    first = torch.tensor([[True], [False]])
    assert union(offsets, first).tolist() == intersection(offsets, first).tolist() == [[1.0, -3.0]]


def test_experts_conflict_where_each_alone_would_choose_another_token():
    base = torch.zeros(3, 2)
    first = Contribution(torch.tensor([[1.0, 0]]).expand(3, 2), base, 1.0)
    second = Contribution(
        torch.tensor([[0.0, 1], [1, 0], [0, 1]]), base, torch.tensor([1.0, 1.0, 0.0])
    )
    assert has_conflict(base, [first, second]).tolist() == [True, False, False]
    assert has_conflict(base, [first]).tolist() == [False] * 3
    assert has_conflict(base, []).tolist() == [False] * 3


# Named --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EVERY, ids=Policy.describe)
def test_what_a_recipe_writes_reads_back(policy):
    assert Policy.from_dict(policy.to_dict(), combine=policy.combine) == policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "kl_mach"}, r"must be one of constant, kl_match.*\n.*mean 'kl_match'"),
        ({"polic": "kl_match"}, r"'polic' is not a setting.*policy, max_alpha"),
        ({"name": "kl_match"}, r"'name' is not a setting"),
        ({"policy": 3}, "policy is 3"),
        ({"max_alpha": 2}, r"max_alpha has no effect with policy constant.*kl_match"),
        ({"policy": "kl_match", "max_alpha": 0}, "max_alpha is 0"),
        ({"policy": "kl_match", "max_alpha": True}, "max_alpha is True"),
        ({"policy": "gate_agree", "threshold": 0.5}, r"threshold.*gate_sure and nudge"),
        ({"policy": "gate_sure", "threshold": 1.5}, r"threshold is 1.5.*at most 1"),
        ({"clip": -1}, "clip is -1"),
        ({"clip": math.nan}, "clip is nan"),
        ({"plausibility": "0.1"}, "plausibility is '0.1'"),
        ({"implausible": "leave"}, "without plausibility"),
        ({"plausibility": 0.1, "implausible": "drop"}, "must be one of exclude, leave"),
        ({"schedule": [[5, 1], [5, 0]]}, r"schedule is .*rise"),
        ({"schedule": [[-1, 1]]}, "schedule is"),
        ({"schedule": [[0.5, 1]]}, "schedule is"),
        ({"schedule": [[0, "1"]]}, "schedule is"),
        ({"schedule": [3]}, "schedule is"),
        ({"schedule": "fade"}, "schedule is"),
        ({"schedule": [[0, 1, 2]]}, "schedule is"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(settings, message):
    with pytest.raises(InvalidRequest, match=message):
        Policy.from_dict(settings)


def test_a_combination_is_refused_where_the_policy_decides_which_expert_counts():
    for name in ("kl_match", "nudge"):
        with pytest.raises(InvalidRequest, match=f"policy is {name} and combine is union"):
            Policy("union", name)


def test_an_unknown_combination_names_the_known_ones():
    with pytest.raises(InvalidRequest, match=r"'unions'.*sum, inverse_entropy.*\n.*'union'"):
        Policy("unions")


def test_a_policy_says_what_it_needs():
    assert [p.name for p in map(lambda n: Policy(name=n), POLICIES) if not p.reads_base] == [
        "constant"
    ]
    assert {c for c in COMBINATIONS if Policy(c).reads_base} == {"majority", "route_base"}
    assert not Policy(clip=1.0).reads_base
    assert Policy(plausibility=0.1).reads_base
    assert Policy(schedule=((0, 1.0),)).has_positions
    assert IMPLAUSIBLE == ("exclude", "leave")


# Tokens that a pair does not share --------------------------------------------------------------------------


def unshared(rows: int = 6, vocab: int = 5) -> tuple[Tensor, list[Contribution]]:
    """Return `two_experts` with a last token that the first pair lacks, and the second on one side."""
    base, (first, second) = two_experts(rows, vocab)
    mask = torch.arange(vocab) == vocab - 1
    lost = torch.full((rows, 1), -torch.inf)
    first = Contribution(
        torch.cat([first.expert_logits[:, :-1], lost], 1),
        torch.cat([first.anti_expert_logits[:, :-1], lost], 1),
        first.alpha,
        mask,
    )
    anti_expert = torch.cat([second.anti_expert_logits[:, :-1], lost], 1)
    return base, [first, second._replace(anti_expert_logits=anti_expert, is_unshared=mask)]


@pytest.mark.parametrize("policy", KEEPING, ids=Policy.describe)
def test_every_policy_leaves_tokens_that_are_not_shared_as_they_are(policy):
    base, contributions = unshared()
    found = apply_policy(policy, base, contributions, positions=torch.full((6,), 4))
    assert torch.equal(found.logits[:, -1], base[:, -1])
    assert found.logits.isfinite().all() and found.weights.isfinite().all()


def test_a_nudge_leaves_the_base_its_token_and_shares_out_the_rest_as_the_expert_does():
    base = probs([0.3, 0.3, 0.4])
    expert, anti_expert = probs([0.9, 0.1, 0.0]), probs([0.5, 0.5, 0.0])
    part = Contribution(expert, anti_expert, 1.0, torch.tensor([False, False, True]))
    found = apply_policy(Policy(name="nudge", threshold=0.5), base, [part]).logits.softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[0.54, 0.06, 0.4]]))


def test_an_expert_is_not_routed_past_for_a_token_that_it_lacks():
    base = probs([0.2, 0.2, 0.6])
    near = Contribution(
        probs([0.5, 0.5, 0.0]), probs([0.4, 0.6, 0.0]), 1.0, torch.tensor([False, False, True])
    )
    far = Contribution(probs([0.8, 0.1, 0.1]), probs([0.4, 0.4, 0.2]), 1.0)
    found = apply_policy(Policy(combine="route_base"), base, [near, far])
    # Over the first two tokens, the base and the first expert agree.
    assert found.weights.tolist() == [[1.0], [0.0]]
