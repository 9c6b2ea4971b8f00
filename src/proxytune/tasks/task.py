"""What every benchmark defines: its items, the row that an output becomes, scores by rule, metrics of a file.

Words: an *item* is one question of a benchmark. A *row* is one answer to it in the layout that the paper's
authors published, so that their predictions and new ones are scored by the same code. A *rule* is a way to
score: `paper` scores exactly as published, quirks included, and trusts parsed answers in a file; `numeric`
scores what is actually right. A row that a judge or a run of the code has yet to decide is *unscored*: it
counts neither as right nor as wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from proxytune.errors import InputFileError
from proxytune.request import Message, SamplingParams
from proxytune.tasks.rows import Row, field

if TYPE_CHECKING:
    from proxytune.text.prompts import AskedPrompt

Rule = Literal["paper", "numeric"]
RULES: tuple[Rule, ...] = ("paper", "numeric")
Decider = Literal["rule", "code", "toxicity", "judge"]
"""What decides whether a row is right: its text alone, a run of its code, a classifier, or a language
model."""
Scores = Mapping[str, float | None]
"""Scores by item, from 0 to 1; None if unscored, or left out by the paper's rule."""
Metrics = dict[str, float | int | None]
"""Metrics under their published names."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark.

    Args:
        key: The item's name, unique in the benchmark.
        prompt: The prompt that models see.
        fields: Fields of every row about the item.
        options: Answers to choose from by likelihood; empty if the answer is generated.
    """

    key: str
    prompt: AskedPrompt
    fields: Row
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grade:
    """The grade of a set of rows.

    Args:
        task: Name of the benchmark.
        rule: The rule that rows were scored by.
        name: Name of the metric.
        metric: Value of the metric; None if nothing could be scored.
        error: Standard error of the metric over items; None for fewer than two items.
        metrics: All metrics.
        scores: The scores of all items.
        num_rows: Number of rows.
        num_unscored: Number of rows that are not decided yet.
        num_expected: Number of items in the published runs; None if unknown.
        notes: Warnings for the reader, one sentence each.
    """

    task: str
    rule: Rule
    name: str
    metric: float | None
    error: float | None
    metrics: Mapping[str, float | int | None]
    scores: Scores
    num_rows: int
    num_unscored: int
    num_expected: int | None
    notes: tuple[str, ...]

    @property
    def num_items(self) -> int:
        """Number of items that have rows."""
        return len(self.scores)

    @property
    def num_missing(self) -> int | None:
        """Number of items of the published runs without rows; None if unknown."""
        return None if self.num_expected is None else max(0, self.num_expected - self.num_items)

    def to_dict(self) -> dict[str, object]:
        """Return what `proxytune grade --json` prints."""
        return {
            "metric": self.metric,
            "name": self.name,
            "task": self.task,
            "rule": self.rule,
            "standard_error": self.error,
            "metrics": dict(self.metrics),
            "num_items": self.num_items,
            "num_rows": self.num_rows,
            "num_unscored": self.num_unscored,
            "num_expected": self.num_expected,
            "num_missing": self.num_missing,
            "notes": list(self.notes),
        }


class Task(ABC):
    """One benchmark."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    """The publication that introduced the benchmark."""
    metric: ClassVar[str]
    """The metric that tables show, under its published name."""
    scale: ClassVar[float] = 1.0
    """Factor from the mean of the scores to the metric."""
    lower_is_better: ClassVar[bool] = False
    key_fields: ClassVar[tuple[str, ...]] = ()
    """Names of the field of a row that holds its item's key, in order of preference."""
    num_items: ClassVar[int | None] = None
    """Number of items in the published runs; None if unknown."""
    decider: ClassVar[Decider] = "rule"
    sampling: ClassVar[SamplingParams] = SamplingParams()
    """The published sampling parameters."""
    num_samples: ClassVar[int] = 1
    """Number of answers per item in the published runs."""
    banned: ClassVar[tuple[str, ...]] = ()
    """Texts that models must not generate; a text is banned if a single token spells it."""
    banned_first: ClassVar[tuple[str, ...]] = ()
    """Texts that answers must not begin with, banned in the same way."""

    @abstractmethod
    def items(self, data_dir: Path | None) -> list[Item]:
        """Return the items of the published runs, in their order.

        Args:
            data_dir: A folder in the layout that `docs/guides/evaluate.md` describes; None for the Hub.

        Raises:
            InputFileError: The data is missing or malformed.
        """

    @abstractmethod
    def row(self, item: Item, output: str) -> Row:
        """Return the row that an output becomes, in the published layout, cleaned and parsed."""

    def spread(self, rows: Sequence[Row]) -> list[Row]:
        """Return one row per answer; a published row may hold several answers."""
        return list(rows)

    def key(self, row: Row, place: int) -> str:
        """Return the key of the item that a row of a predictions file is about; errors name its place.

        Raises:
            InputFileError: The row does not name its item.
        """
        assert self.key_fields, f"{self.name} declares neither key_fields nor a key of its own"
        return str(field(row, place, *self.key_fields))

    @abstractmethod
    def score(self, row: Row, place: int, rule: Rule) -> float | None:
        """Return a row's score by a rule, from 0 to 1; None if it is unscored or left out.

        Raises:
            InputFileError: The row lacks a field that scoring needs.
        """

    def is_unscored(self, row: Row) -> bool:
        """Whether a row is not decided yet."""
        return False

    def metric_name(self, rows: Sequence[Row]) -> str:
        """Return the name of the metric, which may depend on the number of samples."""
        return self.metric

    def item_score(self, scores: Sequence[float | None]) -> float | None:
        """Return an item's score from the scores of its rows."""
        (only,) = scores
        return only

    def metrics(self, rows: Sequence[Row], scores: Scores, rule: Rule) -> Metrics:
        """Return all metrics under their published names; `scores` are by item, scored by `rule`."""
        return {self.metric: self.mean(scores)}

    def mean(self, scores: Scores) -> float | None:
        """Return the metric of scores, ignoring None; None if no score is left."""
        known = [score for score in scores.values() if score is not None]
        return self.scale * sum(known) / len(known) if known else None

    def notes(self, rows: Sequence[Row], rule: Rule) -> list[str]:
        """Return warnings about rows, one sentence each."""
        return []

    def grade(self, rows: Sequence[Row], rule: Rule = "paper") -> Grade:
        """Score rows and return their grade.

        Raises:
            InputFileError: A row is malformed, or an item has too many or too few rows.
        """
        from proxytune.tasks.statistics import standard_error

        rows = self.spread(rows)
        by_item: dict[str, list[float | None]] = {}
        places: dict[str, list[int]] = {}
        num_unscored = 0
        for place, row in enumerate(rows, 1):
            key = self.key(row, place)
            by_item.setdefault(key, []).append(self.score(row, place, rule))
            places.setdefault(key, []).append(place)
            num_unscored += self.is_unscored(row)
        self._check_repeats(places)
        scores = {key: self.item_score(values) for key, values in by_item.items()}
        known = [score for score in scores.values() if score is not None]
        error = standard_error(known)
        notes = self.notes(rows, rule)
        if num_unscored:
            counts = f"{num_unscored:,} of {len(rows):,}"
            notes.insert(0, f"{counts} rows are unscored and left out of every metric")
        if self.num_items is not None and len(scores) != self.num_items:
            notes.append(
                f"the rows cover {len(scores):,} of the {self.num_items:,} items of the published runs"
            )
        return Grade(
            task=self.name,
            rule=rule,
            name=self.metric_name(rows),
            metric=self.mean(scores),
            error=None if error is None else self.scale * error,
            metrics=self.metrics(rows, scores, rule),
            scores=scores,
            num_rows=len(rows),
            num_unscored=num_unscored,
            num_expected=self.num_items,
            notes=tuple(notes),
        )

    def _check_repeats(self, places: Mapping[str, Sequence[int]]) -> None:
        if self.num_samples > 1:
            counts = Counter(len(where) for where in places.values())
            usual = counts.most_common(1)[0][0] if counts else 0
            bad = [key for key, where in places.items() if len(where) != usual]
            if bad:
                raise InputFileError(
                    f"{bad[0]!r} has {len(places[bad[0]])} rows and most items have {usual}; {len(bad) - 1} "
                    "more items differ, so some samples are missing or duplicated.\n"
                    "hint: give the same number of samples for every item"
                )
            return
        bad = [key for key, where in places.items() if len(where) > 1]
        if bad:
            where = ", ".join(map(str, places[bad[0]][:5]))
            more = f", and {len(bad) - 1} more items have several rows" if len(bad) > 1 else ""
            raise InputFileError(
                f"rows {where} are about the same item ({bad[0][:60]!r}){more}, so it would count more than "
                "once.\nhint: keep one row per item"
            )


def asked(
    text: str, question: str, answer_start: str = "", *, system: str | None = None
) -> AskedPrompt:
    """Return a prompt: `text` for plain models; for chat models, messages and the beginning of the answer."""
    from proxytune.text.prompts import AskedPrompt

    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return AskedPrompt(text, [*messages, {"role": "user", "content": question}], answer_start)
