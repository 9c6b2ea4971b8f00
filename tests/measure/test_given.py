"""What the models give a few options after many prompts."""

from __future__ import annotations

import pytest
import torch

from proxytune.measure.given import are_written, option_logits
from proxytune.measure.score import passage_of
from tests.measure.test_score import ANTI, BASE, EXPERT, IDS, MEMORY, TOKENS, ensemble

OPTIONS = [5, 0, 3]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_models_logits_of_the_options_are_those_after_the_prompt(batch_size):
    models = ensemble()
    prompts = [IDS[:2], IDS[2:9], IDS[9:10], IDS[10:14]]
    passages = [passage_of(models, prompt, OPTIONS[:1]) for prompt in prompts]
    found = option_logits(models, passages, OPTIONS, batch_size=batch_size)
    assert sorted(found) == [0, 1, 2]
    for member, matrix in enumerate((BASE, EXPERT, ANTI)):
        by_hand = [matrix[seen[-1]] + MEMORY * matrix[seen].mean(0) for seen in prompts]
        wanted = torch.stack(by_hand)[:, OPTIONS]
        torch.testing.assert_close(found[member], wanted, atol=1e-5, rtol=0)


def test_progress_reaches_the_number_of_prompts():
    models = ensemble()
    seen: list[tuple[int, int]] = []
    passages = [passage_of(models, IDS[i : i + 2], OPTIONS[:1]) for i in range(5)]
    option_logits(
        models, passages, OPTIONS, batch_size=2, on_progress=lambda *done: seen.append(done)
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_answer_is_written_if_each_token_is_the_likeliest_after_the_right_ones(batch_size):
    models = ensemble()
    strengths = [(0.0,), (1.0,), (2.5,)]

    def greedy(matrix_of, prompt, length):
        seen = list(prompt)
        for _ in range(length):
            seen.append(int(matrix_of(seen)[: len(TOKENS)].argmax()))
        return seen[len(prompt) :]

    def logits(matrix, seen):
        return matrix[seen[-1]] + MEMORY * matrix[seen].mean(0)

    def steered(alpha):
        return lambda seen: logits(BASE, seen) + alpha * (logits(EXPERT, seen) - logits(ANTI, seen))

    prompts = [IDS[i : i + 2] for i in range(6)]
    predictors = {
        "base": lambda seen: logits(BASE, seen),
        "expert": lambda seen: logits(EXPERT, seen),
        **{str(alpha): steered(alpha) for (alpha,) in strengths},
    }
    answers = [
        greedy(predictors[name], prompt, 3)
        for prompt, name in zip(
            prompts, ["base", "expert", "1.0", "2.5", "base", "1.0"], strict=True
        )
    ]
    answers[4] = [*answers[4][:2], (answers[4][2] + 1) % len(TOKENS)]
    passages = [passage_of(models, p, a) for p, a in zip(prompts, answers, strict=True)]
    found = are_written(models, passages, strengths, judges_end=True, batch_size=batch_size)
    for name, right in [
        ("base", found.models[0]),
        ("expert", found.models[1]),
        *zip(["0.0", "1.0", "2.5"], found.steered, strict=True),
    ]:
        wanted = [
            greedy(predictors[name], prompt, 3) == answer
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        assert right == wanted, name
    assert found.models[0] == found.steered[0]
    assert found.models[0][0]
    assert not found.models[0][4]
