"""Weights and output biases in the loop: by hand, in mixed batches, and with drafts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from proxytune.checkpoints.output_bias import OutputBias
from proxytune.decode.batch import Batch
from proxytune.decode.ensemble import Ensemble, Job
from proxytune.decode.speculative import Drafting, Speculator
from proxytune.logits.steer import Weights
from proxytune.request import SamplingParams
from tests.decode.test_batch import ANTI, BASE, EXPERT, OTHER, by_hand, ensemble, job, run, tokens

BIAS = OutputBias(torch.tensor([1, 4, 8]), torch.tensor([1.5, -2.0, 0.75]))
WEIGHTS = Weights(0.8, 0.9, 0.6)


def models_with(*options: dict) -> Ensemble:
    """Return two experts, each with its weights and bias."""
    plain = ensemble((EXPERT, ANTI), (OTHER, ANTI))
    pairs = [replace(pair, **own) for pair, own in zip(plain.pairs, options, strict=True)]
    return replace(plain, pairs=tuple(pairs))


def test_decoding_is_the_weighted_formula_token_by_token():
    models = models_with({"weights": WEIGHTS, "bias": BIAS}, {"weights": Weights(anti_expert=0.0)})
    bias = BIAS.dense(len(BASE), torch.device("cpu"))

    def steered(f):
        first = -0.2 * f(BASE) + 0.9 * f(EXPERT) - 0.6 * f(ANTI) + bias
        return f(BASE) + 0.7 * first + 0.4 * f(OTHER)

    expected = by_hand("ab", 20, steered)
    assert tokens(models, job(models, "ab", (0.7, 0.4), max_new_tokens=20)) == [expected]


def test_at_strength_zero_weights_and_bias_leave_the_base():
    models = models_with({"weights": WEIGHTS, "bias": BIAS}, {})
    expected = by_hand("ab", 20, lambda f: f(BASE))
    assert tokens(models, job(models, "ab", (0.0, 0.0), max_new_tokens=20)) == [expected]


def mixed_jobs(models: Ensemble) -> list[Job]:
    alphas = [(1.0, None), (None, 0.8), (0.6, 0.6), (0.0, 0.0), (None, 1.0), (1.4, 0.3)]
    prompt = [0, 1]
    return [
        Job(
            SamplingParams(max_new_tokens=n, temperature=t, seed=n, logprobs=2, ignore_eos=True),
            (prompt,) * 5,
            own,
        )
        for n, (own, t) in enumerate(zip(alphas, (0.0, 1.0, 0.7) * 2, strict=True), start=7)
    ]


@pytest.mark.parametrize("second", [{}, {"weights": Weights(base=1.2), "bias": BIAS}])
def test_rows_of_a_batch_get_the_bits_that_they_get_alone(second):
    models = models_with({"weights": WEIGHTS, "bias": BIAS}, second)
    jobs = mixed_jobs(models)
    together = run(models, *jobs)
    alone = [run(models, one)[0] for one in jobs]
    for left, right in zip(together, alone, strict=True):
        assert [(s.token_id, s.logprob, s.top) for s in left] == [
            (s.token_id, s.logprob, s.top) for s in right
        ]


def test_weights_of_one_and_no_bias_beside_others_change_no_bit():
    models = models_with({}, {"weights": WEIGHTS, "bias": BIAS})
    jobs = mixed_jobs(models)
    plain = ensemble((EXPERT, ANTI), (OTHER, ANTI))
    (first, *_), (alone,) = run(models, *jobs), run(plain, jobs[0])
    assert [(s.token_id, s.logprob) for s in first] == [(s.token_id, s.logprob) for s in alone]


@pytest.mark.parametrize("source", ["expert", "lookup"])
def test_drafts_change_no_token(source):
    models = models_with({"weights": WEIGHTS, "bias": BIAS}, {"weights": Weights(1.1, 0.5, 0.5)})
    jobs = mixed_jobs(models)
    expected = tokens(models, *jobs)
    drafting = Drafting(3, source, is_adaptive=False)
    batch = Batch(models, jobs, speculator=Speculator(drafting))
    found: list[list[int]] = [[] for _ in jobs]
    while not batch.is_done:
        for event in batch.step():
            if event.step is not None:
                found[event.row].append(event.step.token_id)
    assert found == expected
