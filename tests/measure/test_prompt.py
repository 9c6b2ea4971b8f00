"""Scored prompts: each token's logprob and rank, as `explain` has them, and what the text after reuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from proxytune.backends.toy import ToyBackend
from proxytune.decode.batch import Batch
from proxytune.errors import InvalidRequest
from proxytune.measure.prompt import PromptToken, check_scored, score_prompt
from proxytune.measure.score import CHUNK_TOKENS
from proxytune.model import ProxyTuned
from proxytune.policy import Policy
from proxytune.request import Request, SamplingParams
from proxytune.testing import toy_model


def scored(model: ProxyTuned, request: Request, *, num_top: int = 2) -> list[PromptToken]:
    job = model.job(request)
    check_scored(model.ensemble, job)
    return [each for part in score_prompt(model.ensemble, job, num_top=num_top) for each in part]


def test_a_tokens_logprob_is_the_formulas():
    """By hand: the base gives b after a 1/2, the expert doubled its odds against c from 1:1 to 2:1."""
    model = toy_model()
    tables = {0: {1: 0.5, 2: 0.5}, 1: {1: 0.5, 2: 0.5}, 2: {1: 2 / 3, 2: 1 / 3}}
    members = []
    for index, member in enumerate(model.ensemble.members):
        table = torch.full((33, 33), -torch.inf)
        for token_id, prob in tables[index].items():
            table[:, token_id] = math.log(prob)
        # Elsewhere all three agree, so that no difference of infinities arises.
        table[table == -torch.inf] = -1e4
        members.append(replace(member, backend=ToyBackend(table, name=member.name)))
    model.ensemble = replace(model.ensemble, members=tuple(members))
    (found,) = scored(model, Request("ab"))
    assert found.token_id == 1 and found.rank == 1
    assert found.logprob == pytest.approx(math.log(2 / 3), abs=1e-5)
    assert [token_id for token_id, _ in found.top] == [1, 2]
    (found,) = scored(model, Request("ac"))
    assert found.rank == 2 and found.logprob == pytest.approx(math.log(1 / 3), abs=1e-5)


@pytest.mark.parametrize("alpha", (0.0, 1.5))
def test_scores_are_those_of_explain(alpha: float):
    model = toy_model(memory=0.5, experts={"one": 1.0, "two": 0.5})
    text = "the quick brown fox jumps over the lazy dog. " * (2 * CHUNK_TOKENS // 45 + 1)
    found = scored(model, Request(text, alpha=alpha), num_top=3)
    steps = model.explain(text[0], text[1:], alpha=alpha, top=3).steps
    assert len(found) == len(text) - 1 > CHUNK_TOKENS
    assert [each.token_id for each in found] == [step.token_id for step in steps]
    assert [each.logprob for each in found] == [step.logprob for step in steps]
    views = [(step.views or {})["steered"] for step in steps]
    assert [(each.rank, each.top) for each in found] == [(view.rank, view.top) for view in views]


def test_a_text_goes_on_from_what_was_read_for_the_scores():
    model = toy_model(memory=0.5, eos_logit=-100.0)
    job = model.job(Request("abcdefgh" * 10, SamplingParams(max_new_tokens=9)))
    reading = score_prompt(model.ensemble, job, num_top=0)
    with pytest.raises(StopIteration) as ended:
        while True:
            next(reading)
    batch = Batch(model.ensemble, [job], kept=ended.value.value)
    assert batch.num_reused == 79
    new_ids = []
    while not batch.is_done:
        new_ids += [event.step.token_id for event in batch.step() if event.step is not None]
    assert new_ids == list(model.generate("abcdefgh" * 10, job.sampling).token_ids)


def test_a_prompt_of_one_token_has_no_scores():
    assert scored(toy_model(), Request("a")) == []


def test_what_cannot_be_scored_is_refused():
    model = toy_model()
    job = model.job(Request("ab"))
    other = replace(job, prompts=(job.prompts[0], job.prompts[1], (0, 0, 1)))
    with pytest.raises(InvalidRequest, match="reads this prompt in a format of its own"):
        check_scored(model.ensemble, other)
    # The base alone is scored, whatever an expert would read.
    check_scored(model.ensemble, replace(other, alphas=(0.0,)))
    schedule = Policy(schedule=((0, 1.0), (5, 0.0)))
    with pytest.raises(InvalidRequest, match="schedule"):
        check_scored(model.ensemble, replace(job, policy=schedule))
    with pytest.raises(InvalidRequest, match="schedule"):  # the ensemble's, where the job has none
        check_scored(replace(model.ensemble, policy=schedule), replace(job, policy=None))
