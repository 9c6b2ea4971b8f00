"""What every backend refuses, and the words it does so in."""

from __future__ import annotations

import pytest

from proxytune.backends import checks
from proxytune.errors import InvalidRequest, PromptTooLong, UnsupportedModel


def test_an_empty_prompt_is_refused_among_others_and_so_is_no_prompt():
    checks.check_prompts("toy", [[1], [2, 3]])
    for prompts in ([], [[1], []]):
        with pytest.raises(InvalidRequest, match="toy was given an empty prompt"):
            checks.check_prompts("toy", prompts)


def test_a_row_may_fill_the_context_and_no_more():
    checks.check_length("toy", 8, 8)
    checks.check_length("toy", 10**9, None)
    with pytest.raises(PromptTooLong, match=r"toy can hold 8 tokens, and was asked to hold 9\."):
        checks.check_length("toy", 9, 8)


def test_the_hint_for_a_long_row_is_a_sentence_with_or_without_a_third_way():
    with pytest.raises(PromptTooLong, match=r"shorten the prompt or ask for fewer new tokens$"):
        checks.check_length("toy", 9, 8)
    with pytest.raises(PromptTooLong, match=r"prompt, ask for fewer new tokens, or set more$"):
        checks.check_length("toy", 9, 8, also=", or set more")


@pytest.mark.parametrize(("lowest", "highest", "wrong"), [(-1, 3, -1), (0, 5, 5), (-2, 9, -2)])
def test_a_token_id_that_a_model_does_not_have_is_named(lowest, highest, wrong):
    checks.check_token_ids("toy", 0, 4, 5)
    with pytest.raises(InvalidRequest, match=f"no token {wrong}; its token ids go from 0 to 4"):
        checks.check_token_ids("toy", lowest, highest, 5)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (2, 0), (2, 1, 1)])
def test_appended_tokens_are_one_or_more_for_each_row(shape):
    checks.check_shape("toy", (2, 1), 2)
    with pytest.raises(InvalidRequest, match=r"needs \[2, num_tokens\]"):
        checks.check_shape("toy", shape, 2)


@pytest.mark.parametrize("num_tokens", [[1], [0, 4], [-1, 0]])
def test_a_row_takes_back_at_most_what_it_holds(num_tokens):
    checks.check_rewind("toy", [2, 0], [2, 3], can_rewind=True)
    with pytest.raises(InvalidRequest, match=r"cannot rewind rows of \[2, 3\] tokens"):
        checks.check_rewind("toy", num_tokens, [2, 3], can_rewind=True)


def test_a_model_that_cannot_rewind_says_why():
    with pytest.raises(UnsupportedModel, match="without a KV cache entry per token"):
        checks.check_rewind("toy", [0], [2], can_rewind=False)


def test_rows_without_adapters_are_plain():
    assert checks.adapters_of("toy", None, 2, ()) == [None, None]
    assert checks.adapters_of("toy", ["one", None], 2, {"one": 1}) == ["one", None]


def test_an_adapter_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(InvalidRequest, match="no adapter 'two'; it has: one"):
        checks.adapters_of("toy", ["two"], 1, ["one"])
    with pytest.raises(InvalidRequest, match="it has: none"):
        checks.adapters_of("toy", ["two"], 1, [])
    with pytest.raises(InvalidRequest, match="was given 1 adapters for 2 rows"):
        checks.adapters_of("toy", ["one"], 2, ["one"])
