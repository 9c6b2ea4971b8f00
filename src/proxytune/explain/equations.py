"""Finds the two sides of the equations in a text.

An *equation* lies within one clause of one line. Before its equals sign are numbers with operators between
them, perhaps with units (`3 boxes x 4 eggs`). After it is a number, more arithmetic, or more equals signs.
The left-hand side runs from the first number to the first equals sign, the right-hand side from there to the
last number. The paper does not say how it found equations; this is our choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

# Models also write the typographic minus and times signs, and x or "of" for times; Markdown escapes *.
_OPERATORS = {"+", "-", "\u2212", "*", "\\*", "/", "x", "\u00d7", "÷", "·", "of"}
_NUMBER = re.compile(
    r"[\d.,$€£%()\[\]+*/x\u00d7÷·^\\\u2212-]*\d[\d.,$€£%()\[\]+*/x\u00d7÷·^\\\u2212-]*"
)
_OPERATION = re.compile(r"[+*/x\u00d7÷·^\u2212-]")
_WORD = re.compile(r"[^\s=]+")
_END_OF_CLAUSE = tuple(".,;:!?")
MAX_UNIT_WORDS = 4
"""Maximum number of consecutive words between numbers and operators, such as `meters per second`."""


class EquationSide(NamedTuple):
    """One side of an equation: the characters of the text from `start` up to `end`."""

    start: int
    end: int
    is_left: bool


def equation_sides(text: str) -> Iterator[EquationSide]:
    """Yield the sides of the equations in a text, in order: left, right, left, right, ..."""
    start = 0
    for line in text.split("\n"):
        if "=" in line:
            yield from _line_sides(line, start)
        start += len(line) + 1


def _line_sides(line: str, offset: int) -> Iterator[EquationSide]:
    edges = [-1, *(index for index, c in enumerate(line) if c == "="), len(line)]
    parts = [
        [(m.start(), m.end()) for m in _WORD.finditer(line, first + 1, last)]
        for first, last in pairwise(edges)
    ]
    part = 0
    while part + 1 < len(parts):
        left, right = _left_side(line, parts[part]), _right_side(line, parts[part + 1])
        part += 1
        if left is None or right is None:
            continue
        start, end, is_whole = right
        # After further equals signs the right-hand side goes on.
        while is_whole and part + 1 < len(parts):
            further = _right_side(line, parts[part + 1])
            if further is None:
                break
            _, end, is_whole = further
            part += 1
        yield EquationSide(offset + left[0], offset + left[1], True)
        yield EquationSide(offset + start, offset + end, False)


def _left_side(line: str, words: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return start and end of the arithmetic with which these words end; None if there is none."""
    begin: int | None = None
    num_operations = num_units = 0
    has_operator = True  # the rightmost number needs no operator after it
    for start, end in reversed(words):
        word = line[start:end]
        if word.endswith(_END_OF_CLAUSE):
            break
        if _NUMBER.fullmatch(word):
            if not has_operator:
                break
            digits = [index for index, c in enumerate(word) if c.isdecimal()]
            has_operation = _OPERATION.search(word, digits[0], digits[-1]) is not None
            num_operations += (begin is not None) + has_operation
            begin, has_operator, num_units = start, False, 0
        elif word in _OPERATORS:
            has_operator, num_units = True, 0
        else:
            num_units += 1
            if num_units > MAX_UNIT_WORDS:
                break
    return (begin, words[-1][1]) if begin is not None and num_operations else None


def _right_side(line: str, words: Sequence[tuple[int, int]]) -> tuple[int, int, bool] | None:
    """Return start and end of the arithmetic with which these words begin, and whether it is all of them."""
    first: int | None = None
    last = num_units = 0
    has_operator = True
    for start, end in words:
        word = line[start:end]
        bare = word.rstrip("".join(_END_OF_CLAUSE))
        if _NUMBER.fullmatch(bare):
            if not has_operator:
                break
            first = start if first is None else first
            last, has_operator, num_units = start + len(bare), False, 0
        elif word in _OPERATORS:
            has_operator, num_units = True, 0
        else:
            num_units += 1
        if num_units > MAX_UNIT_WORDS or (first is None and num_units) or bare != word:
            break
    else:
        return None if first is None else (first, last, True)
    return None if first is None else (first, last, False)
