"""What outsiders may ask of any backend, in place of its class."""

from __future__ import annotations

import torch

from proxytune.backends.base import num_shared_tokens
from proxytune.backends.toy import ToyBackend


def test_a_model_that_runs_here_shows_all_its_logits():
    assert ToyBackend(torch.zeros(3, 3)).partial is None


def test_a_model_with_the_bases_tokens_needs_no_translation():
    assert ToyBackend(torch.zeros(3, 3)).translation is None


def test_shared_tokens_end_with_the_first_difference():
    assert num_shared_tokens([1, 2, 3], [1, 2, 4, 3]) == 2
    assert num_shared_tokens([1, 2], [1, 2, 3]) == 2
    assert num_shared_tokens([], [1]) == 0
