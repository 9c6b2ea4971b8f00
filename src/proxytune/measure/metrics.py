"""Metrics that compare a generated text with a reference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


def exact_match(text: str, reference: str) -> float:
    """Return 1 if a text is the reference, ignoring white space at both ends."""
    return float(text.strip() == reference.strip())


def contains(text: str, reference: str) -> float:
    """Return 1 if the reference occurs in the text, ignoring letter case."""
    return float(reference.strip().casefold() in text.casefold())


def last_number(text: str, reference: str) -> float:
    """Return 1 if the last number of a text equals the last one of the reference; see `number_value`."""
    found, wanted = number_value(text), number_value(reference)
    return float(found is not None and found == wanted)


def number_value(text: str) -> float | None:
    """Return the last number of a text; None if it has none.

    A minus sign counts unless it subtracts or joins: after a digit, a letter or a closing bracket it is none
    (`10-3` ends with 3, `pages 3-5` with 5). A comma counts where three digits follow it (`1,000` is 1000). A
    decimal may begin with its point (`.5`).
    """
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.replace("\N{MINUS SIGN}", "-"))
    found = re.findall(r"(?:(?<![\w)\].%])-\$?)?(?:\d+(?:\.\d+)?|\.\d+)", text)
    return float(found[-1].replace("$", "")) if found else None


def published_number(text: str) -> str:
    """Return the last number of a text as the paper's GSM8K runs extract it; the text itself if it has none.

    A string: `18.00` stays as it is, and a whole number loses its minus sign.

    Source: Liu et al. 2024, arXiv:2401.08565; `eval/gsm` of its repository.
    """
    text = without_commas(text)
    found = re.findall(r"[-+]?\d*\.\d+|\d+", text)
    return str(found[-1]) if found else text


def without_commas(text: str) -> str:
    """Return a text without commas between digits, of which the published pattern sees every other one."""
    return re.sub(r"(\d),(\d)", r"\1\2", text)


def chrf(text: str, reference: str) -> float:
    """Return how similar two texts are by their characters: chrF, from 0 to 1.

    The F-score of character n-grams without white space, with recall twice as important as precision,
    averaged over lengths from 1 to 6 that the reference has.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    one, other = ("".join(each.split()) for each in (text, reference))
    scores = []
    for length in range(1, 7):
        ours, theirs = (
            Counter(each[i : i + length] for i in range(len(each) - length + 1))
            for each in (one, other)
        )
        if not theirs:
            continue
        shared = (ours & theirs).total()
        precision = shared / ours.total() if ours else 0.0
        recall = shared / theirs.total()
        weighted = 4 * precision + recall
        scores.append(5 * precision * recall / weighted if weighted else 0.0)
    return sum(scores) / len(scores) if scores else float(not one)


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of how good a strength is.

    Args:
        name: Name on the command line.
        title: Name in pictures.
        is_lower_better: Whether lower values are better.
        score: Scores a generated text against its reference, from 0 to 1. None for a likelihood.
    """

    name: str
    title: str
    is_lower_better: bool
    score: Callable[[str, str], float] | None = None


METRICS = {
    metric.name: metric
    for metric in (
        Metric("perplexity", "perplexity", True),
        Metric("exact_match", "exact match", False, exact_match),
        Metric("contains", "reference contained", False, contains),
        Metric("last_number", "last number right", False, last_number),
        Metric("chrf", "chrF", False, chrf),
    )
}
"""Metrics by name; `measure/sweep.py` takes any other `Metric` too."""
