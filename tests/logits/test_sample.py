"""From logits to tokens: each filter by hand, the draw, and independence of rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.logits.sample import BatchSampler, draw, gumbel, penalise, warp
from proxytune.request import SamplingParams

ONE = torch.ones(1)
HALVES = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


def sampler(params: list[SamplingParams], vocab_size: int = 4, prompts=None, ending=None):
    prompts = prompts or [[0]] * len(params)
    return BatchSampler(params, prompts, ending or [[]] * len(params), vocab_size=vocab_size)


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def test_temperature_divides_the_logits():
    assert warp(torch.tensor([[2.0, 4.0]]), temperature=torch.tensor([2.0])).tolist() == [[1, 2]]


def test_top_k_keeps_the_k_most_likely():
    assert kept(warp(HALVES, temperature=ONE, top_k=torch.tensor([2]))) == [[0, 1]]
    assert kept(warp(HALVES, temperature=ONE, top_k=torch.tensor([0]))) == [[0, 1, 2, 3]]
    assert kept(warp(HALVES, temperature=ONE, top_k=torch.tensor([99]))) == [[0, 1, 2, 3]]


def test_top_k_keeps_exactly_k_of_equal_tokens():
    assert kept(warp(torch.zeros(1, 4), temperature=ONE, top_k=torch.tensor([2]))) == [[0, 1]]


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.4, [0]), (0.6, [0, 1]), (0.8, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p, expected):
    assert kept(warp(HALVES, temperature=ONE, top_p=torch.tensor([top_p]))) == [expected]


def test_top_p_works_on_what_top_k_left():
    # Of the two kept tokens the first holds 2/3, so a mass of 0.6 needs only that one.
    warped = warp(HALVES, temperature=ONE, top_k=torch.tensor([2]), top_p=torch.tensor([0.6]))
    assert kept(warped) == [[0]]


@pytest.mark.parametrize(
    ("min_p", "expected"), [(0.4, [0, 1]), (0.6, [0]), (0.2, [0, 1, 2, 3]), (1.0, [0])]
)
def test_min_p_keeps_tokens_at_least_that_fraction_as_likely_as_the_first(min_p, expected):
    assert kept(warp(HALVES, temperature=ONE, min_p=torch.tensor([min_p]))) == [expected]


def test_min_p_of_zero_keeps_every_token_of_a_row_beside_one_that_filters():
    warped = warp(HALVES.repeat(2, 1), temperature=torch.ones(2), min_p=torch.tensor([0.0, 0.6]))
    assert kept(warped) == [[0, 1, 2, 3], [0]]


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12),
    st.floats(0.05, 5),
    st.integers(0, 14),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_the_most_likely_token_survives_every_filter(values, temperature, top_k, top_p, min_p):
    logits = torch.tensor([values])
    warped = warp(
        logits,
        temperature=torch.tensor([temperature]),
        top_k=torch.tensor([top_k]),
        top_p=torch.tensor([top_p]),
        min_p=torch.tensor([min_p]),
    )
    best = logits[0] == logits[0].max()
    assert warped[0][best].isfinite().any()
    assert not warped.isnan().any()


@given(st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=10), st.floats(0.05, 0.99))
def test_top_p_agrees_with_a_search_by_hand(values, top_p):
    probs = torch.tensor(values).softmax(0)
    order = sorted(range(len(values)), key=lambda i: -values[i])
    mass, expected = 0.0, set()
    for i in order:
        if expected and mass >= top_p - 1e-6:
            break
        expected.add(i)
        mass += float(probs[i])
    got = set(kept(warp(torch.tensor([values]), temperature=ONE, top_p=torch.tensor([top_p])))[0])
    # At the edge of the mass one token may fall to either side by rounding.
    assert abs(float(probs[list(got)].sum()) - float(probs[list(expected)].sum())) <= max(
        1e-4, float(probs[list(got ^ expected)].sum()) if len(got ^ expected) <= 1 else 0
    )


def test_a_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = penalise(
        torch.tensor([[2.0, -2.0, 2.0]]),
        seen=torch.tensor([[True, True, False]]),
        counts=torch.zeros(1, 3),
        repetition=torch.tensor([2.0]),
        presence=torch.zeros(1),
        frequency=torch.zeros(1),
    )
    assert logits.tolist() == [[1, -4, 2]]


def test_presence_counts_once_and_frequency_each_time():
    logits = penalise(
        torch.zeros(1, 3),
        seen=torch.zeros(1, 3, dtype=torch.bool),
        counts=torch.tensor([[0.0, 1.0, 3.0]]),
        repetition=ONE,
        presence=torch.tensor([0.5]),
        frequency=torch.tensor([0.25]),
    )
    assert logits.tolist() == [[0, -0.75, -1.25]]


def test_the_filters_agree_with_those_of_transformers():
    from transformers.generation import logits_process as theirs

    torch.manual_seed(0)
    logits = torch.randn(16, 50) * 3
    ids = torch.randint(0, 50, (16, 6))
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    expected = theirs.TemperatureLogitsWarper(0.7)(ids, expected)
    expected = theirs.TopKLogitsWarper(20)(ids, expected)
    expected = theirs.TopPLogitsWarper(0.8)(ids, expected)
    expected = theirs.MinPLogitsWarper(0.05)(ids, expected)
    params = SamplingParams(
        temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3
    )
    ours = sampler([params] * 16, 50, prompts=ids.tolist()).probs(logits)
    torch.testing.assert_close(ours, expected.softmax(-1), atol=1e-6, rtol=1e-5)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return gumbel(torch.rand(shape, dtype=torch.float64, generator=generator))


def test_the_draw_follows_the_distribution():
    """A chi-square test; a false alarm has odds of one in a million, and the seed is fixed."""
    probs = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0])
    num = 20_000
    token_ids = draw(probs.log().expand(num, 5), noise(num, 5))
    counts = torch.bincount(token_ids, minlength=5).double()
    expected = probs.double() * num
    statistic = float(((counts - expected)[:4] ** 2 / expected[:4]).sum())
    assert counts[4] == 0
    assert statistic < 30.66  # chi-square, 3 degrees of freedom, upper 1e-6


def test_rare_tokens_of_a_wide_vocabulary_are_drawn_as_often_as_they_should_be():
    """Half of the mass on one of 50,001 tokens, the rest at 1e-5 each; 2,000 draws.

    The count of the one is binomial (standard deviation 22); 110 away has odds under one in a million.
    """
    logits = torch.full((1, 50_001), math.log(1e-5))
    logits[0, 0] = math.log(0.5)
    hits = sum(int(draw(logits, noise(1, 50_001, seed=seed))) == 0 for seed in range(2_000))
    assert abs(hits - 1_000) < 110


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    logits = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log()
    uniforms = torch.tensor([[0.9, uniform, 0.9, 0.5, 0.9]], dtype=torch.float64)
    assert draw(logits, gumbel(uniforms)).item() in (1, 3)


def test_two_distributions_with_the_same_noise_agree_as_often_as_promised():
    """At distance 0.3 the promise is 0.7 / 1.3 = 0.538, and 0.7 the most there is.

    Over 20,000 draws a standard deviation is 0.0036, so the bounds lie six of them outside.
    """
    one, other = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.4, 0.4])
    shared = noise(20_000, 3)
    agree = draw(one.log().expand(20_000, 3), shared) == draw(other.log().expand(20_000, 3), shared)
    assert 0.538 - 0.021 < float(agree.float().mean()) < 0.7 + 0.021


def test_greedy_takes_the_most_likely_token_and_its_logprob():
    choice = sampler([SamplingParams()]).sample(HALVES)
    assert choice.token_ids.tolist() == [0]
    assert choice.logprobs.item() == pytest.approx(math.log(0.5))


def test_the_logprob_is_that_of_the_steered_distribution_before_filters():
    params = SamplingParams(temperature=0.01, top_k=1, seed=0)
    assert sampler([params]).sample(HALVES).logprobs.item() == pytest.approx(math.log(0.5))


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 5), st.integers(0, 4))
def test_a_seeded_row_does_not_depend_on_its_neighbours(seed, num_rows, where):
    where = min(where, num_rows - 1)
    logits = torch.randn(8, 1, 6, generator=torch.Generator().manual_seed(3))
    mine = SamplingParams(temperature=1.0, top_p=0.9, seed=seed)
    alone = sampler([mine], 6)
    others: list[SamplingParams] = [
        SamplingParams(temperature=0.5, top_k=3, frequency_penalty=0.5) for _ in range(num_rows)
    ]
    others[where] = mine
    together = sampler(others, 6)
    for step in logits:
        expected = alone.sample(step).token_ids.item()
        assert together.sample(step.expand(num_rows, 6)).token_ids[where].item() == expected


def test_a_row_goes_on_unchanged_when_others_leave():
    logits = torch.randn(6, 1, 8, generator=torch.Generator().manual_seed(5))
    params = [SamplingParams(temperature=1.0, seed=s, presence_penalty=0.4) for s in range(3)]
    whole, shrinking = sampler(params, 8), sampler(params, 8)
    for number, step in enumerate(logits):
        expected = whole.sample(step.expand(3, 8)).token_ids[2].item()
        if number == 2:
            shrinking.select([2])
        width = 3 if number < 2 else 1
        assert shrinking.sample(step.expand(width, 8)).token_ids[-1].item() == expected


def test_a_seed_is_drawn_and_kept_where_none_is_given():
    first = sampler([SamplingParams(temperature=1.0)])
    again = sampler([SamplingParams(temperature=1.0, seed=first.seeds[0])])
    tokens = [[s.sample(HALVES).token_ids.item() for _ in range(20)] for s in (first, again)]
    assert tokens[0] == tokens[1]
    assert sampler([SamplingParams()]).seeds == [None]


def test_an_ending_token_is_not_chosen_before_the_minimum():
    logits = torch.tensor([[5.0, 1.0, 0.0, 0.0]])
    rows = sampler([SamplingParams(min_new_tokens=2)], ending=[[0]])
    assert [rows.sample(logits).token_ids.item() for _ in range(3)] == [1, 1, 0]
    assert logits[0, 0] == 5.0


def test_greedy_and_sampled_rows_share_a_batch():
    params = [SamplingParams(), SamplingParams(temperature=1.0, seed=3)]
    probs = sampler(params).probs(HALVES.repeat(2, 1))
    assert probs[0].tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(probs[1], HALVES[0].exp())


def test_rows_chosen_apart_are_those_chosen_together():
    logits = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(7))
    params = [
        SamplingParams(temperature=1.0, seed=4, frequency_penalty=0.5),
        SamplingParams(min_new_tokens=2),
        SamplingParams(temperature=0.7, top_p=0.8, seed=5),
    ]
    together, apart = (sampler(params, 8, ending=[[], [1], []]) for _ in range(2))
    for step in logits:
        expected = together.sample(step).token_ids.tolist()
        first = apart.sample(step[[0, 2]], [0, 2]).token_ids.tolist()
        assert [first[0], *apart.sample(step[[1]], [1]).token_ids.tolist(), first[1]] == expected


@given(st.integers(0, 2**63 - 1), st.integers(0, 4))
@settings(deadline=None, max_examples=30)
def test_a_guess_from_the_logits_that_will_be_chosen_from_is_right(seed, ahead):
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(8))
    rows = sampler([SamplingParams(temperature=1.3, seed=seed)], 8)
    guess = rows.propose(logits, ahead=ahead).item()
    tokens = [rows.sample(logits).token_ids.item() for _ in range(ahead + 1)]
    assert tokens[ahead] == guess


def test_a_bias_is_added_to_the_logits_of_its_own_row_only():
    params = [SamplingParams(logit_bias=((3, 9.0), (0, -9.0))), SamplingParams()]
    steered = torch.tensor([[2.0, 1.0, 0.5, 0.0]] * 2)
    choice = sampler(params).sample(steered)
    assert choice.token_ids.tolist() == [3, 0]
    # The logprob is that of the steered distribution, as for filters and penalties.
    assert choice.logprobs.tolist() == pytest.approx(
        [float(steered[0].log_softmax(0)[3]), float(steered[0].log_softmax(0)[0])]
    )
    assert steered.tolist() == [[2.0, 1.0, 0.5, 0.0]] * 2


def test_the_first_token_may_have_a_bias_of_its_own():
    params = [
        SamplingParams(logit_bias=((3, 9.0),), first_logit_bias=((3, -9.0), (2, 1.0))),
        SamplingParams(),
    ]
    steered = torch.tensor([[1.2, 1.0, 0.5, 0.0]] * 2)
    rows = sampler(params)
    assert [rows.sample(steered).token_ids.tolist() for _ in range(3)] == [[2, 0], [3, 0], [3, 0]]
