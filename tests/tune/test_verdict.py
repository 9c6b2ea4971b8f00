"""The last word of a run: what counts as help."""

from __future__ import annotations

import numpy as np
import pytest

from proxytune.measure.score import Interval
from proxytune.tune.verdict import Change, Compared, _compared, _continued, is_lower, word_of

LOWER = Change(-0.5, Interval(-0.6, -0.4))
UNSURE = Change(-0.1, Interval(-0.3, 0.1))
HIGHER = Change(0.5, Interval(0.4, 0.6))


def answers(change: float, low: float, high: float) -> Compared:
    return Compared("chrf", 20, 0.2, 0.2 + change, change, Interval(low, high))


BETTER, SAME, WORSE = answers(0.3, 0.2, 0.4), answers(0.01, -0.1, 0.1), answers(-0.3, -0.4, -0.2)


@pytest.mark.parametrize(
    ("change", "compared", "word"),
    [
        (LOWER, BETTER, "helps"),
        (UNSURE, BETTER, "helps"),
        (LOWER, SAME, "helps wording only"),
        (LOWER, WORSE, "helps wording only"),
        (UNSURE, SAME, "does not help"),
        (HIGHER, SAME, "does not help"),
        (LOWER, None, "helps"),
        (UNSURE, None, "does not help"),
    ],
)
def test_the_word_follows_from_the_perplexity_and_the_answers(change, compared, word):
    assert word_of(change, compared) == word


def test_without_an_interval_the_sign_counts():
    assert is_lower(Change(-0.1, None))
    assert not is_lower(Change(0.1, None))


def test_answers_are_compared_in_pairs():
    scores = np.array([[0.1, 0.4], [0.5, 0.8], [0.0, 0.3]])
    found = _compared("chrf", scores, seed=0)
    assert (found.base, found.steered, found.change) == pytest.approx((0.2, 0.5, 0.3))
    # Every pair differs by the same, so that every resample does, too.
    interval = found.change_interval
    assert interval is not None and (interval.low, interval.high) == pytest.approx((0.3, 0.3))


def test_a_single_answer_has_no_interval():
    assert _compared("chrf", np.array([[0.1, 0.4]]), seed=0).change_interval is None


def test_a_text_is_cut_at_a_space_within_its_first_half():
    assert _continued("one two three four") == ("one two", " three four")
    assert "".join(_continued("unbroken")) == "unbroken"
