"""Metrics of written texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

# Metrics ------------------------------------------------------------------------------------------------


def exact_match(text: str, reference: str) -> float:
    """Return 1 if a text is the reference, white space at both ends aside."""
    return float(text.strip() == reference.strip())


def contains(text: str, reference: str) -> float:
    """Return 1 if the reference stands somewhere in the text, letter case aside."""
    return float(reference.strip().casefold() in text.casefold())


def last_number(text: str, reference: str) -> float:
    """Return 1 if the last number of a text equals the last one of the reference, as numbers."""
    found, wanted = (_numbers(each) for each in (text, reference))
    return float(bool(found) and bool(wanted) and found[-1] == wanted[-1])


def _numbers(text: str) -> list[float]:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return [float(number.replace(",", "")) for number in found]


def chrf(text: str, reference: str) -> float:
    """Return how alike two texts are by their characters: chrF, from 0 to 1.

    F-score (recall twice as important) of character n-grams up to 6, white space left out, averaged over
    the lengths that both texts have.

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
    """What a point is judged by.

    Args:
        name: As it is asked for.
        title: As a picture calls it.
        is_lower_better: Whether less is better.
        score: Of a generated text and its reference, from 0 to 1; None for a likelihood.
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
"""By name. Beside these, `sweep` takes any `Metric`."""
