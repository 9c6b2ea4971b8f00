"""Logits that weights are fitted to, read from an ensemble."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proxytune.errors import UnsupportedModel
from proxytune.measure.score import passage_losses
from proxytune.testing import toy_model
from proxytune.tune.features import reader
from proxytune.tune.fit import Mix

TEXT = "the quick brown fox jumps over the lazy dog and runs off into the dark wood beyond"


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_equal_weights_are_what_scoring_calls_a_strength(alpha: float) -> None:
    model = toy_model()
    passages = model.text_passages(TEXT, window=40)
    mix = Mix((1.0, alpha, alpha))
    found = torch.cat([mix.losses(chunk) for chunk in reader(model.ensemble, passages)()])
    scored = passage_losses(model.ensemble, passages, [(alpha,)], with_models=False)[0]
    np.testing.assert_allclose(found.double().numpy(), scored, atol=1e-5)


def test_the_base_alone_is_one_feature() -> None:
    model = toy_model()
    passages = model.text_passages(TEXT, window=40)
    chunks = list(reader(model.ensemble, passages, with_pair=False)())
    assert {chunk.logits.shape[0] for chunk in chunks} == {1}
    assert sum(len(chunk.targets) for chunk in chunks) == len(TEXT) - 1


def test_rows_are_read_again_from_their_first_token() -> None:
    model = toy_model()
    counts: list[tuple[int, int]] = []
    passages = model.text_passages(TEXT, window=40)
    read = reader(
        model.ensemble, passages, on_progress=lambda done, total: counts.append((done, total))
    )
    one, other = (torch.cat([chunk.targets for chunk in read()]) for _ in range(2))
    assert one.tolist() == other.tolist()
    assert counts[-1] == (len(TEXT) - 1, len(TEXT) - 1)


def test_several_experts_at_once_are_refused() -> None:
    model = toy_model(experts={"one": 1.0, "two": 1.0})
    with pytest.raises(UnsupportedModel, match="one expert at a time, and 2 are chosen"):
        reader(model.ensemble, model.text_passages(TEXT))
