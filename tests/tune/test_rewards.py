"""Rewards: what they return, and what happens when they do not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from proxytune.data.rows import answers_of, read_rows
from proxytune.errors import InputFileError, InvalidRequest, RewardError
from proxytune.tune.reward_worker import NoNumber, number_of
from proxytune.tune.rewards import Reward, is_exact, parse_reward


def reward_of(reward: Any, answer: str, row: dict[str, Any], limit_s: float = 5.0) -> float:
    opened = Reward(reward, limit_s=limit_s)
    try:
        return opened("a prompt", answer, row, "line 7 of rows.jsonl")
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("answer", "given", "is_equal"),
    [
        (" tea\n", "tea", True),
        ("two  cups\tof tea", "two cups of tea", True),
        ("cafe\u0301", "caf\u00e9", True),  # e and an accent are one letter in NFC
        ("Tea", "tea", False),
        ("tea.", "tea", False),
        ("", "tea", False),
    ],
)
def test_exact_counts_everything_but_white_space(answer: str, given: str, is_equal: bool) -> None:
    assert is_exact(answer, given) is is_equal
    assert reward_of("exact", answer, {"answer": given}) == float(is_equal)


def test_the_given_answer_is_text_or_a_number_or_a_completion() -> None:
    assert reward_of("exact", " 42", {"answer": 42}) == 1.0
    assert reward_of("exact", "tea", {"completion": "tea"}) == 1.0
    turns = [{"role": "assistant", "content": "tea"}]
    assert reward_of("exact", "tea", {"completion": turns}) == 1.0
    assert reward_of("exact", "tea", {"answer": "rice", "completion": "tea"}) == 0.0


@pytest.mark.parametrize(
    ("pattern", "answer", "found"),
    [
        (r"#### {answer}$", "It is 4.\n#### 4.5 ", 1.0),
        (r"#### {answer}$", "#### 425", 0.0),  # the field's dot is a dot
        (r"^x{2}$", " xx", 1.0),  # a repetition is no field
        (r"\{answer\}", "{answer}", 1.0),
        (r"\{answer\}", "4.5", 0.0),
    ],
)
def test_a_pattern_is_searched_and_fields_stand_for_themselves(
    pattern: str, answer: str, found: float
) -> None:
    assert reward_of(f"regex:{pattern}", answer, {"answer": 4.5}) == found


FILE = """
import os, time
from fractions import Fraction

def share(prompt, answer, row):
    print("this is not the reward")
    return Fraction(answer.count(row["letter"]), len(answer))

def raises(prompt, answer, row):
    return answer.index("z")

def hangs(prompt, answer, row):
    while True:
        pass

def leaves(prompt, answer, row):
    os._exit(3)

def says(prompt, answer, row):
    return "good"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.py"  # a name that a module beside the worker has, too
    path.write_text(FILE, encoding="utf-8")
    return path


def test_a_function_of_a_file_gets_prompt_answer_and_row(file: Path, capfd: Any) -> None:
    assert reward_of(f"{file}:share", "abba", {"letter": "b"}) == 0.5
    assert "this is not the reward" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raises", r"raised ValueError: substring not found \(line 10 of settings.py\)"),
        ("hangs", "did not return within 0.5 s"),
        ("leaves", r"ended its process \(exit code 3\)"),
        ("says", "returned 'good' of type str, and must return a finite number"),
    ],
)
def test_a_function_that_gives_no_number_is_named_with_row_and_answer(
    function: str, said: str, file: Path
) -> None:
    with pytest.raises(RewardError, match=said) as failure:
        reward_of(f"{file}:{function}", "abba", {}, limit_s=0.5)
    assert "line 7 of rows.jsonl" in str(failure.value) and "'abba'" in str(failure.value)
    assert "--resume" in str(failure.value)


def test_a_pattern_that_backtracks_for_ever_is_stopped() -> None:
    with pytest.raises(RewardError, match=r"did not return within 0\.5 s"):
        reward_of("regex:(a+)+$", "a" * 40 + "b", {}, limit_s=0.5)


def test_a_function_of_the_callers_own_is_called_and_limited() -> None:
    assert reward_of(lambda prompt, answer, row: len(prompt) + row["n"], "x", {"n": 1}) == 9.0
    with pytest.raises(RewardError, match=r"did not return within 0\.2 s"):
        reward_of(lambda prompt, answer, row: time.sleep(3), "x", {}, limit_s=0.2)

    def raises(prompt: Any, answer: str, row: Any) -> float:
        raise KeyError("letter")

    with pytest.raises(RewardError, match=r"raises raised KeyError: 'letter' \(line \d+ of test_"):
        reward_of(raises, "x", {})


def test_a_reward_is_a_finite_number() -> None:
    assert number_of(True) == 1.0
    for value in (None, float("nan"), float("inf"), "1", [1.0]):
        with pytest.raises(NoNumber):
            number_of(value)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("exakt", "must be exact, regex:PATTERN or FILE.py:FUNCTION"),
        ("regex:(", "is no regular expression"),
        ("regex:", "is empty"),
        ("nowhere.py:score", "does not exist"),
    ],
)
def test_a_reward_that_does_not_exist_is_refused(reward: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        parse_reward(reward)


def test_a_file_that_cannot_be_loaded_is_refused_with_its_line(file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\nraise OSError('no licence')\n", encoding="utf-8")
    with pytest.raises(RewardError, match=r"raised OSError: no licence \(line 2 of broken.py\)"):
        Reward(f"{broken}:score", limit_s=5)
    with pytest.raises(RewardError, match=r"it has no function 'score'; it has .*share, raises"):
        Reward(f"{file}:score", limit_s=5)


# Rows ----------------------------------------------------------------------------------------------


def test_rows_for_a_reward_keep_what_it_reads() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    given = [{"prompt": "Q", "answer": 4, "unit": None}, {"prompt": "R", "messages": [1]}]
    rows = read_rows(given, for_reward=True)
    assert rows.kind == "prompt"
    assert [row["row"] for row in rows.rows] == given
    assert [answers_of(row) for row in rows.rows] == [[("Q", "4")], [("R", "")]]
    assert read_rows([{"prompt": chat}], for_reward=True).rows[0]["prompt"] == chat


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Q"}, "has no \"prompt\" .its keys are 'question'"),
        ({"prompt": 3}, "a number, and must be text"),
        ({"prompt": "Q", "when": object()}, "'when' cannot be written as JSON"),
        ({"prompt": [{"role": "assistant", "content": "Hi"}]}, "ends with a message of the assis"),
        ("Q", "must be an object"),
    ],
)
def test_rows_that_no_reward_can_read_are_refused(row: Any, said: str) -> None:
    with pytest.raises(InputFileError, match=said):
        read_rows([row], for_reward=True)


def test_rows_without_what_the_reward_reads_are_refused_before_training() -> None:
    rows = read_rows([{"prompt": "Q", "answer": "A"}, {"prompt": "R"}], for_reward=True)
    for reward, said in (
        ("exact", "row 2 of the given rows has no answer"),
        ("regex:{answer}", "row 2 of the given rows has no 'answer'"),
    ):
        opened = Reward(reward, limit_s=5)
        with pytest.raises(InputFileError, match=said):
            opened.check(rows)
        opened.close()
