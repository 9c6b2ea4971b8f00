"""Metrics of generated texts, by hand."""

from __future__ import annotations

import pytest

from proxytune.measure.metrics import chrf, contains, exact_match, last_number


def test_metrics_of_a_few_texts_by_hand():
    assert exact_match(" yes\n", "yes") == 1
    assert exact_match("yes.", "yes") == 0
    assert contains("It is Paris, of course", "paris") == 1
    assert contains("It is Rome", "paris") == 0
    assert last_number("3 and 4 make 7.00", "#### 7") == 1
    assert last_number("1,000 in all", "1000") == 1
    assert last_number("none", "7") == 0
    assert last_number("seven", "seven") == 0  # no number is not the right number


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("10-3", "3"),
        ("between 3-5", "5"),
        ("the years 1914\N{EN DASH}1918", "1918"),
        ("x-7", "7"),
        ("(20)-7", "7"),
        ("it is -7", "-7"),
        ("a loss of -$5", "-5"),
        ("0.5", ".5"),
        ("-.5", "-0.5"),
        ("It costs $1,250.00.", "1250"),
        ("12,500", "12,500"),
        ("40%", "40"),
        ("that is 1/2", "2"),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text, reference):
    """A hyphen between numbers used to be a minus sign, and `.5` used to be 5."""
    assert last_number(text, reference) == 1


@pytest.mark.parametrize(("text", "reference"), [("-3", "3"), ("10-3", "-3"), (".5", "5")])
def test_numbers_that_differ_in_sign_or_point_are_different(text, reference):
    assert last_number(text, reference) == 0


def test_chrf_of_two_texts_by_hand():
    """ "ab" against "ac": of single characters one of two is shared, F2 = 0.5; of pairs none."""
    assert chrf("ab", "ac") == pytest.approx((0.5 + 0) / 2)
    assert chrf("a b", "ab") == 1
    assert chrf("", "ab") == 0
    # All of the reference and as much again: precision 1/2, recall 1, F2 = 5 * 0.5 / (4 * 0.5 + 1).
    assert chrf("ax", "a") == pytest.approx(5 / 6)
