"""The two sides of equations in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

# The minus and times signs of typography too, x and of for times, as models write them; Markdown escapes *.
_OPERATORS = {"+", "-", "\u2212", "*", "\\*", "/", "x", "\u00d7", "÷", "·", "of"}
_NUMBER = re.compile(
    r"[\d.,$€£%()\[\]+*/x\u00d7÷·^\\\u2212-]*\d[\d.,$€£%()\[\]+*/x\u00d7÷·^\\\u2212-]*"
)
_OPERATION = re.compile(r"[+*/x\u00d7÷·^\u2212-]")
_WORD = re.compile(r"[^\s=]+")
_END_OF_CLAUSE = tuple(".,;:!?")
MAX_UNIT_WORDS = 4
"""Words in a row that may stand between numbers and operators, such as `meters per second`."""


class Span(NamedTuple):
    """Characters of a text that are one side of an equation."""

    start: int
    end: int
    is_left: bool


def equation_spans(text: str) -> Iterator[Span]:
    """Yield the sides of the equations in a text, the left one first; see the module's docstring."""
    start = 0
    for line in text.split("\n"):
        if "=" in line:
            yield from _line_spans(line, start)
        start += len(line) + 1


def _line_spans(line: str, offset: int) -> Iterator[Span]:
    edges = [-1, *(place for place, c in enumerate(line) if c == "="), len(line)]
    parts = [
        [(m.start(), m.end()) for m in _WORD.finditer(line, first + 1, last)]
        for first, last in pairwise(edges)
    ]
    place = 0
    while place + 1 < len(parts):
        left, right = _left_side(line, parts[place]), _right_side(line, parts[place + 1])
        place += 1
        if left is None or right is None:
            continue
        start, end, is_whole = right
        # What is equal to it again belongs to the right-hand side.
        while is_whole and place + 1 < len(parts):
            further = _right_side(line, parts[place + 1])
            if further is None:
                break
            _, end, is_whole = further
            place += 1
        yield Span(offset + left[0], offset + left[1], True)
        yield Span(offset + start, offset + end, False)


def _left_side(line: str, words: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return where the arithmetic at the end of these words begins and ends; None if there is none."""
    begin: int | None = None
    num_operations = num_units = 0
    has_operator = True  # before the first number from the right none is needed
    for start, end in reversed(words):
        word = line[start:end]
        if word.endswith(_END_OF_CLAUSE):
            break
        if _NUMBER.fullmatch(word):
            if not has_operator:
                break
            num_operations += (begin is not None) + _has_operation(word)
            begin, has_operator, num_units = start, False, 0
        elif word in _OPERATORS:
            has_operator, num_units = True, 0
        else:
            num_units += 1
            if num_units > MAX_UNIT_WORDS:
                break
    return (begin, words[-1][1]) if begin is not None and num_operations else None


def _has_operation(word: str) -> bool:
    """Whether an operator stands between digits of a word."""
    digits = [place for place, c in enumerate(word) if c.isdecimal()]
    return bool(_OPERATION.search(word, digits[0], digits[-1]))


def _right_side(line: str, words: Sequence[tuple[int, int]]) -> tuple[int, int, bool] | None:
    """Return where the arithmetic at the start of these words begins and ends, and if it is all of them."""
    first: int | None = None
    last = num_units = 0
    has_operator = True
    for start, end in words:
        word = line[start:end]
        bare = word.rstrip("".join(_END_OF_CLAUSE))
        if _NUMBER.fullmatch(bare):
            if not has_operator:
                return (first, last, False) if first is not None else None
            first = start if first is None else first
            last, has_operator, num_units = start + len(bare), False, 0
        elif word in _OPERATORS:
            has_operator, num_units = True, 0
        else:
            num_units += 1
        if num_units > MAX_UNIT_WORDS or (first is None and num_units) or bare != word:
            return (first, last, False) if first is not None else None
    return (first, last, True) if first is not None else None
