"""Weights and an output bias, fitted to rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from proxytune.checkpoints.output_bias import OutputBias
from proxytune.errors import InvalidRequest
from proxytune.tune import fit as fitting
from proxytune.tune.fit import Chunk, Mix, Read

NUM_TOKENS = fitting.LEAST_TOKENS
CPU = torch.device("cpu")


def reader(logits: Tensor, targets: Tensor) -> Read:
    """Read `[features, positions, vocab]` in chunks of 100 positions."""

    def read() -> Iterator[Chunk]:
        for first in range(0, len(targets), 100):
            yield Chunk(logits[:, first : first + 100], targets[first : first + 100])

    return read


def features(num_positions: int, *, vocab: int = 20, num: int = 3, seed: int = 0) -> Tensor:
    """Return `[num, positions, vocab]` logits; expert and anti-expert are alike, as in a pair."""
    generator = torch.Generator().manual_seed(seed)
    base, small, change = 2 * torch.randn(3, num_positions, vocab, generator=generator)
    return torch.stack([base, small + change, -small])[:num]


def drawn(logits: Tensor, weights: tuple[float, ...], bias: Tensor | float = 0.0) -> Tensor:
    """Return targets drawn from a mix of the features."""
    probs = (torch.tensordot(torch.tensor(weights), logits, dims=1) + bias).softmax(-1)
    return probs.multinomial(1, generator=torch.Generator().manual_seed(1))[:, 0]


# Weights


def test_the_weights_that_drew_the_targets_are_found_again() -> None:
    """With 6,000 targets, the standard error of each weight is about 0.02."""
    logits = features(6_000)
    targets = drawn(logits, (0.8, 0.5, 0.3))
    sample = fitting.thin(
        reader(logits, targets)(), (1.0, 1.0, 1.0), generator=torch.Generator().manual_seed(0)
    )
    weights = fitting.fit_weights(sample, (1.0, 1.0, 1.0))
    np.testing.assert_allclose(weights, (0.8, 0.5, 0.3), atol=0.08)


def test_at_the_fitted_weights_every_feature_has_the_mean_it_has_at_the_targets() -> None:
    """The condition of an optimum, of the whole vocabulary; the ridge's pull is below 0.001."""
    logits = features(1_000)
    targets = drawn(logits, (0.8, 0.5, 0.3))
    sample = fitting.thin(reader(logits, targets)(), (1.0,) * 3, generator=torch.Generator())
    weights = fitting.fit_weights(sample, (1.0, 1.0, 1.0))
    probs = Mix(weights).logits(Chunk(logits, targets)).softmax(-1)
    expected = (probs * logits).sum(-1).mean(-1)
    seen = logits.gather(2, targets.expand(3, -1)[..., None])[..., 0].mean(-1)
    torch.testing.assert_close(expected, seen, atol=2e-3, rtol=0)


def test_a_thinned_position_estimates_the_loss_of_the_whole_vocabulary() -> None:
    """The draw misses each log-normaliser by about 0.02, the mean of 200 by about 0.002."""
    logits = features(200, vocab=3_000)
    targets = drawn(logits, (1.0, 1.0, 1.0))
    sample = fitting.thin(reader(logits, targets)(), (1.0,) * 3, generator=torch.Generator())
    for weights in ((1.0, 1.0, 1.0), (0.8, 0.6, 0.7), (1.1, 1.2, 1.0)):
        exact = Mix(weights).losses(Chunk(logits, targets))
        found = sample.losses(torch.tensor(weights))
        assert abs(float((found - exact).mean())) < 0.01
        assert float((found - exact).abs().max()) < 0.3


def test_an_expert_that_is_of_no_use_gets_the_weight_0_and_not_a_negative_one() -> None:
    logits = features(3_000)
    targets = drawn(logits, (1.0, -0.3, -0.3))
    sample = fitting.thin(reader(logits, targets)(), (1.0,) * 3, generator=torch.Generator())
    weights = fitting.fit_weights(sample, (1.0, 1.0, 1.0))
    assert weights[1] == 0.0 and weights[0] > 0.5


def test_an_expert_that_says_what_the_anti_expert_says_has_a_solution() -> None:
    logits = features(1_000)
    logits[1] = -logits[2]
    targets = drawn(logits, (1.0, 0.0, 0.0))
    sample = fitting.thin(reader(logits, targets)(), (1.0,) * 3, generator=torch.Generator())
    weights = fitting.fit_weights(sample, (1.0, 1.0, 1.0))
    assert all(map(math.isfinite, weights))
    assert weights[1] == pytest.approx(weights[2], abs=0.1)


def test_a_token_that_is_none_takes_no_part() -> None:
    logits = features(2_000)
    targets = drawn(logits, (0.7, 0.5, 0.5))
    padded = torch.cat([logits, torch.zeros(3, 2_000, 1)], -1)
    padded[0, :, -1] = fitting.NEVER
    found = [
        fitting.fit_weights(
            fitting.thin(reader(each, targets)(), (1.0,) * 3, generator=torch.Generator()),
            (1.0, 1.0, 1.0),
        )
        for each in (logits, padded)
    ]
    np.testing.assert_allclose(*found, atol=1e-4)


# The bias


def test_without_context_a_bias_gives_each_token_the_share_it_has_in_the_rows() -> None:
    """A base that finds three tokens equally likely, and rows of 60, 30 and 10 percent."""
    logits = torch.zeros(1, 1_000, 3)
    targets = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    bias = fitting.fit_bias(reader(logits, targets), (1.0,), prior=1e-3)
    probs = bias.dense(3, CPU).softmax(-1)
    torch.testing.assert_close(probs, torch.tensor([0.6, 0.3, 0.1]), atol=1e-3, rtol=0)


def test_a_prior_pulls_a_bias_towards_0() -> None:
    logits = torch.zeros(1, 10, 3)
    targets = torch.tensor([0] * 8 + [1] * 2)
    loose, tight = (
        fitting.fit_bias(reader(logits, targets), (1.0,), prior=prior).dense(3, CPU).abs().sum()
        for prior in (0.1, 10.0)
    )
    assert tight < loose / 2


def test_a_bias_takes_the_tokens_that_are_most_out_of_place() -> None:
    """Tokens 3 and 7 occur four times as often as the base expects, the others about as often."""
    logits = features(5_000, num=1, vocab=12)
    true = torch.zeros(12)
    true[[3, 7]] = math.log(4)
    targets = drawn(logits, (1.0,), true)
    bias = fitting.fit_bias(reader(logits, targets), (1.0,), num_ids=2)
    assert bias.token_ids.tolist() == [3, 7]
    torch.testing.assert_close(bias.values, true[[3, 7]], atol=0.12, rtol=0)


def test_a_bias_reads_no_more_positions_than_it_is_given() -> None:
    logits, targets = torch.zeros(1, 300, 3), torch.tensor([0] * 150 + [1] * 150)
    bias = fitting.fit_bias(reader(logits, targets), (1.0,), prior=1e-2, max_positions=150)
    assert bias.dense(3, CPU).softmax(-1)[0] > 0.99


def test_the_largest_values_of_a_bias_stay_in_the_order_of_their_ids() -> None:
    bias = OutputBias(torch.tensor([2, 5, 9]), torch.tensor([-3.0, 0.1, 1.0]))
    kept = fitting.largest(bias, 2)
    assert (kept.token_ids.tolist(), kept.values.tolist()) == ([2, 9], [-3.0, 1.0])
    assert fitting.largest(bias, 3) is bias


# What is kept


def test_weights_that_the_rows_need_are_kept() -> None:
    logits = features(NUM_TOKENS)
    found = fitting.fit(
        reader(logits, drawn(logits, (0.6, 0.9, 0.4))), None, alphas=(0.5, 1.0), seed=0
    )
    assert found.gain.is_clear
    assert found.chosen is not None and found.chosen.weights == found.weights
    assert found.to_dict()["kept"] == "weights"


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_rows_that_a_strength_fits_keep_weights_of_1(alpha: float) -> None:
    logits = features(NUM_TOKENS)
    targets = drawn(logits, (1.0, alpha, alpha))
    found = fitting.fit(reader(logits, targets), None, alphas=(0.5, 1.0), seed=0)
    assert found.alpha == alpha
    assert found.chosen is None, found.gain


def test_what_a_temperature_of_the_base_does_is_not_credited_to_weights() -> None:
    logits = features(NUM_TOKENS)
    found = fitting.fit(reader(logits, drawn(logits, (0.5, 0.0, 0.0))), None, alphas=(0.5, 1.0))
    assert found.weights[0] == pytest.approx(0.5, abs=0.08)
    assert found.chosen is None


def test_a_bias_that_validation_rows_do_not_need_is_not_kept() -> None:
    """The training rows are full of token 3, the validation rows are not."""
    train, valid = features(2_000, seed=1), features(NUM_TOKENS, seed=2)
    odd = torch.zeros(20)
    odd[3] = 3.0
    found = fitting.fit(
        reader(valid, drawn(valid, (1.0, 1.0, 1.0))),
        reader(train, drawn(train, (1.0, 1.0, 1.0), odd)),
        alphas=(0.5, 1.0),
    )
    assert found.bias_gain is not None and not found.bias_gain.is_clear
    assert found.chosen is None


def test_a_bias_that_validation_rows_need_is_kept_at_the_strength_they_need() -> None:
    """The training rows are half as far from the models as the validation rows are, as after training."""
    train, valid = features(6_000, seed=1), features(NUM_TOKENS, seed=2)
    true = torch.zeros(20)
    true[:5] = 1.5
    found = fitting.fit(
        reader(valid, drawn(valid, (1.0, 1.0, 1.0), true)),
        reader(train, drawn(train, (1.0, 1.0, 1.0), true / 2)),
        alphas=(0.5, 1.0),
    )
    assert found.chosen is not None and found.chosen.bias is not None
    values = found.chosen.bias.dense(20, CPU)
    # A constant added to all logits changes nothing, so only the difference can be compared.
    assert float(values[:5].mean() - values[5:].mean()) == pytest.approx(1.5, abs=0.15)


def test_without_a_small_model_temperature_and_bias_are_fitted() -> None:
    train, valid = features(6_000, num=1, seed=1), features(NUM_TOKENS, num=1, seed=2)
    true = torch.zeros(20)
    true[:5] = 1.5
    found = fitting.fit_without_proxy(
        reader(train, drawn(train, (0.7,), true)), reader(valid, drawn(valid, (0.7,), true))
    )
    assert found.chosen is not None and found.chosen.bias is not None
    assert found.chosen.weights[0] == pytest.approx(0.7, abs=0.05)


def test_the_same_seed_finds_the_same() -> None:
    logits = features(NUM_TOKENS, vocab=600)
    read = reader(logits, drawn(logits, (0.6, 0.9, 0.4)))
    one, other = (fitting.fit(read, None, alphas=(1.0,), seed=3) for _ in range(2))
    assert one.to_dict() == other.to_dict()


def test_too_few_validation_tokens_are_refused() -> None:
    logits = features(100)
    read = reader(logits, drawn(logits, (1.0, 1.0, 1.0)))
    with pytest.raises(InvalidRequest, match=r"100 validation tokens.*at least 2,048"):
        fitting.fit(read, None, alphas=(1.0,))


def test_a_gain_with_noise_around_0_is_not_clear() -> None:
    """The odds that an interval of pure noise lies above 0 and its mean above 0.01 are 1 in 40."""
    generator = np.random.default_rng(0)
    before = generator.normal(3, 1, 4_096)
    after = before + generator.normal(0, 0.2, 4_096)
    assert not fitting.gain_of(before, after, seed=0).is_clear
    assert fitting.gain_of(before, after - 0.05, seed=0).is_clear


def test_a_certain_gain_below_the_least_is_not_clear() -> None:
    before = np.full(1_000, 3.0)
    gain = fitting.gain_of(before, before - 0.009, seed=0)
    assert gain.interval is not None and gain.interval.low > 0
    assert not gain.is_clear
