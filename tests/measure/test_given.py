"""What the models give a few options after many prompts."""

from __future__ import annotations

import pytest
import torch

from proxytune.measure.given import option_logits
from proxytune.measure.score import passage_of
from tests.measure.test_score import ANTI, BASE, EXPERT, IDS, MEMORY, ensemble

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
