"""The formula, checked by hand and by its identities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune.errors import VocabularyMismatch
from proxytune.logits.steer import Contribution, combine, steer

logit = st.floats(-50, 50, width=32)
rows = st.lists(st.tuples(logit, logit, logit), min_size=2, max_size=8)


def columns(values: list[tuple[float, float, float]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([[v[i] for v in values]]) for i in range(3))


def test_a_token_whose_odds_the_expert_doubled_has_its_odds_doubled():
    even = torch.tensor([[0.5, 0.5]]).log()
    expert = torch.tensor([[2 / 3, 1 / 3]]).log()  # odds 2:1, where the anti-expert has 1:1
    probs = steer(even, expert_logits=expert, anti_expert_logits=even).softmax(-1)
    torch.testing.assert_close(probs, torch.tensor([[2 / 3, 1 / 3]]))


def test_alpha_one_half_takes_the_square_root_of_the_change_in_odds():
    even = torch.zeros(1, 2)
    expert = torch.tensor([[4.0, 1.0]]).log()
    probs = steer(even, expert_logits=expert, anti_expert_logits=even, alpha=0.5).softmax(-1)
    torch.testing.assert_close(probs, torch.tensor([[2 / 3, 1 / 3]]))


@given(rows)
def test_alpha_zero_is_the_base_bit_by_bit(values):
    base, expert, anti_expert = columns(values)
    steered = steer(base, expert_logits=expert, anti_expert_logits=anti_expert, alpha=0)
    assert torch.equal(steered, base)


@given(rows, st.floats(-4, 4))
def test_an_expert_equal_to_its_anti_expert_leaves_the_base(values, alpha):
    base, expert, _ = columns(values)
    steered = steer(base, expert_logits=expert, anti_expert_logits=expert, alpha=alpha)
    assert torch.equal(steered, base)


@given(rows)
def test_a_base_equal_to_the_anti_expert_gives_the_expert_at_alpha_one(values):
    base, expert, _ = columns(values)
    steered = steer(base, expert_logits=expert, anti_expert_logits=base, alpha=1)
    # Two roundings of numbers up to 100: float32 has 24 bits, so 100 * 2**-23 each.
    torch.testing.assert_close(steered, expert, atol=3e-5, rtol=0)


def test_each_row_of_a_batch_has_its_own_strength():
    base = torch.zeros(3, 2)
    expert = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    alphas = torch.tensor([0.0, 1.0, -2.0])
    steered = steer(base, expert_logits=expert, anti_expert_logits=base, alpha=alphas)
    assert steered.tolist() == [[0, 0], [1, 0], [-2, 0]]


def test_a_strength_per_row_reaches_every_position_of_that_row():
    base = torch.zeros(2, 3, 2)
    steered = steer(
        base,
        expert_logits=base + 1,
        anti_expert_logits=base,
        alpha=torch.tensor([1.0, 3.0]),
    )
    assert steered[0].unique().tolist() == [1]
    assert steered[1].unique().tolist() == [3]


def test_a_row_at_alpha_zero_does_not_see_infinite_logits_of_the_small_models():
    base = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    expert = torch.tensor([[-torch.inf, 0.0], [0.0, 0.0]])
    steered = steer(
        base, expert_logits=expert, anti_expert_logits=base, alpha=torch.tensor([0.0, 1.0])
    )
    assert torch.equal(steered[0], base[0])


def test_several_experts_add_up():
    base = torch.tensor([[0.0, 0.0, 0.0]])
    first = Contribution(torch.tensor([[1.0, 0, 0]]), base, 2.0)
    second = Contribution(torch.tensor([[0.0, 1, 0]]), torch.tensor([[0.0, 0, 1]]), 0.5)
    assert combine(base, [first, second]).tolist() == [[2.0, 0.5, -0.5]]


def test_no_expert_at_all_is_the_base():
    base = torch.tensor([[0.5, -1.0]])
    assert torch.equal(combine(base, []), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_combined_in_float32(dtype):
    base = torch.tensor([[256.0]], dtype=dtype)
    expert = torch.tensor([[1.0]], dtype=dtype)
    steered = steer(base, expert_logits=expert, anti_expert_logits=torch.zeros_like(expert))
    assert steered.dtype == torch.float32
    assert steered.item() == 257.0  # bfloat16 would round it to 256


def test_inputs_are_left_as_they_were():
    base, expert, anti_expert = torch.ones(1, 2), torch.ones(1, 2) * 2, torch.ones(1, 2) * 3
    steer(base, expert_logits=expert, anti_expert_logits=anti_expert, alpha=5)
    assert (base.sum(), expert.sum(), anti_expert.sum()) == (2, 4, 6)


def test_logits_of_another_width_are_refused_with_both_shapes():
    with pytest.raises(VocabularyMismatch, match=r"anti-expert.*\[1, 3\].*\[1, 2\]"):
        steer(
            torch.zeros(1, 2),
            expert_logits=torch.zeros(1, 2),
            anti_expert_logits=torch.zeros(1, 3),
        )


THIRD = torch.tensor([False, False, True])


def test_a_token_that_the_pair_does_not_share_keeps_the_bases_logit():
    base = torch.tensor([[1.0, 0.0, 0.5]])
    # Odds 3:1 where the anti-expert has 1:1; what one side says of the third token does not count.
    expert = torch.tensor([[math.log(3.0), 0.0, 7.0]])
    anti_expert = torch.tensor([[0.0, 0.0, -torch.inf]])
    steered = combine(base, [Contribution(expert, anti_expert, 1.0, THIRD)])
    # log-ratios of 3/4 and 1/4 against 1/2 each
    expected = torch.tensor([[1.0 + math.log(1.5), math.log(0.5), 0.5]])
    torch.testing.assert_close(steered, expected)
    assert steered[0, 2] == base[0, 2]


def test_a_token_without_an_offset_keeps_its_probability_if_base_and_anti_expert_agree():
    base = torch.tensor([[0.3, -1.0, 0.9]])
    anti_expert, expert = base.clone(), torch.tensor([[2.0, 5.0, 0.0]])
    steered = combine(base, [Contribution(expert, anti_expert, 1.0, THIRD)]).softmax(-1)[0]
    torch.testing.assert_close(steered[2], base.softmax(-1)[0, 2])
    torch.testing.assert_close(steered[:2] / steered[:2].sum(), expert[0, :2].softmax(-1))


def test_beside_tokens_without_an_offset_a_constant_in_the_experts_logits_changes_nothing():
    base, expert, anti_expert = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(1))
    parts = [Contribution(expert + c, anti_expert, 0.7, THIRD) for c in (0.0, 40.0)]
    one, other = (combine(base, [part]) for part in parts)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_rows_whose_pairs_share_all_tokens_are_steered_as_without_others():
    base, expert, anti_expert = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.stack([torch.zeros(3, dtype=torch.bool), THIRD])
    mixed = combine(base, [Contribution(expert, anti_expert, 0.7, mask)])
    alone = combine(base[:1], [Contribution(expert[:1], anti_expert[:1], 0.7)])
    assert torch.equal(mixed[:1], alone)
    part = Contribution(expert, anti_expert, 0.7, mask).at(torch.tensor([1]))
    assert torch.equal(combine(base[1:], [part]), mixed[1:])
