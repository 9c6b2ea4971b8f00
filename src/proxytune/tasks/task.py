"""What every benchmark answers: its items, the row an output becomes, scores by rule, metrics of a file.

Words: an *item* is one question of a benchmark; a *row* is one answer to it in the layout that the paper's
authors published, so that what is made here and what they made are scored by the same code. A *rule* is a
way to score: `paper` exactly as published, quirks included, believing what a file says was parsed;
`numeric` what is right. A row that a judge or a run of code has yet to decide is *unscored*: it counts
neither as right nor as wrong.
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
from proxytune.tasks.rows import Row

if TYPE_CHECKING:
    from proxytune.text.prompts import AskedPrompt

Rule = Literal["paper", "numeric"]
RULES: tuple[Rule, ...] = ("paper", "numeric")
Decider = Literal["rule", "code", "toxicity", "judge"]
"""What decides whether a row is right: its text alone, a run of its code, a classifier, or a language
model."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark.

    Args:
        key: Its name, unique in the benchmark.
        prompt: What the models see.
        fields: What goes into every row about it.
        options: Answers to choose from by their likelihood; none where an answer is generated.
    """

    key: str
    prompt: AskedPrompt
    fields: Row
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grade:
    """What a set of rows amounts to.

    Args:
        task: The benchmark.
        rule: How rows were scored.
        name: Of the metric.
        metric: Its value; None where nothing could be scored.
        error: Its standard error over items; None below two items.
        metrics: All of them, under the names that were published.
        scores: By item, from 0 to 1; None for one that is unscored or, by a rule of the paper, left out.
        num_rows: How many rows there are.
        num_unscored: How many of them nobody has decided yet.
        num_expected: How many items the published runs have.
        notes: What a reader must know, in sentences.
    """

    task: str
    rule: Rule
    name: str
    metric: float | None
    error: float | None
    metrics: Mapping[str, float | int | None]
    scores: Mapping[str, float | None]
    num_rows: int
    num_unscored: int
    num_expected: int | None
    notes: tuple[str, ...]

    @property
    def num_items(self) -> int:
        """How many items have rows."""
        return len(self.scores)

    @property
    def num_missing(self) -> int | None:
        """How many items of the published runs have none."""
        return None if self.num_expected is None else max(0, self.num_expected - self.num_items)

    def to_dict(self) -> dict[str, object]:
        """Return the answer of `proxytune grade`."""
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
    """Where the benchmark is from."""
    metric: ClassVar[str]
    """The metric that tables show, under its published name."""
    scale: ClassVar[float] = 1.0
    """What the mean of the scores is multiplied by to give the metric."""
    lower_is_better: ClassVar[bool] = False
    num_items: ClassVar[int | None] = None
    """How many items the published runs have."""
    decider: ClassVar[Decider] = "rule"
    sampling: ClassVar[SamplingParams] = SamplingParams()
    """The published settings."""
    num_samples: ClassVar[int] = 1
    """Answers to each item, in the published settings."""
    banned: ClassVar[tuple[str, ...]] = ()
    """What a model may not write, as far as a token spells it."""
    banned_first: ClassVar[tuple[str, ...]] = ()
    """What it may not begin with, likewise."""

    @abstractmethod
    def items(self, data_dir: Path | None) -> list[Item]:
        """Return the items of the published runs, in their order.

        Args:
            data_dir: A folder in the layout that `docs/guides/evaluate.md` describes; None for the Hub.

        Raises:
            InputFileError: The data cannot be had, or is malformed.
        """

    @abstractmethod
    def row(self, item: Item, output: str) -> Row:
        """Return the row that an output becomes, in the published layout, cleaned and parsed."""

    def spread(self, rows: Sequence[Row]) -> list[Row]:
        """Return one row an answer, where a published row holds several."""
        return list(rows)

    @abstractmethod
    def key(self, row: Row, place: int) -> str:
        """Return which item a row is about.

        Args:
            row: Of a predictions file.
            place: Its number, from 1, for messages.

        Raises:
            InputFileError: The row does not say.
        """

    @abstractmethod
    def score(self, row: Row, place: int, rule: Rule) -> float | None:
        """Return 1 for right and 0 for wrong, by a rule; None for unscored or left out.

        Raises:
            InputFileError: The row lacks what has to be scored.
        """

    def is_unscored(self, row: Row) -> bool:
        """Whether nobody has decided the row yet."""
        return False

    def metric_name(self, rows: Sequence[Row]) -> str:
        """Return the name of the metric, which may depend on how many samples there are."""
        return self.metric

    def item_score(self, scores: Sequence[float | None]) -> float | None:
        """Return the score of an item from those of its rows; one row has one score."""
        (only,) = scores
        return only

    def metrics(
        self, rows: Sequence[Row], scores: Mapping[str, float | None], rule: Rule
    ) -> dict[str, float | int | None]:
        """Return all metrics under their published names.

        Args:
            rows: All rows.
            scores: By item.
            rule: How they were scored.
        """
        return {self.metric: self.mean(scores)}

    def mean(self, scores: Mapping[str, float | None]) -> float | None:
        """Return the metric of these scores, those that are None left out."""
        known = [score for score in scores.values() if score is not None]
        return self.scale * sum(known) / len(known) if known else None

    def notes(self, rows: Sequence[Row], rule: Rule) -> list[str]:
        """Return what a reader must know of these rows."""
        return []

    def grade(self, rows: Sequence[Row], rule: Rule = "paper") -> Grade:
        """Score rows and return what they amount to.

        Raises:
            InputFileError: A row is malformed, or an item is there more often than it can be.
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
            notes.insert(
                0,
                f"{num_unscored:,} of {len(rows):,} rows are unscored, and left out of every metric",
            )
        if self.num_items is not None and len(scores) != self.num_items:
            notes.append(
                f"{len(scores):,} of the {self.num_items:,} items of the published runs are there"
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
                    f"{bad[0]!r} has {len(places[bad[0]])} rows where most items have {usual}, and so do "
                    f"{len(bad) - 1} others, so some are missing or there twice.\n"
                    "hint: give the same number of samples for every item"
                )
            return
        bad = [key for key, where in places.items() if len(where) > 1]
        if bad:
            where = ", ".join(map(str, places[bad[0]][:5]))
            more = f", and {len(bad) - 1} other items are there twice" if len(bad) > 1 else ""
            raise InputFileError(
                f"rows {where} are about one item ({bad[0][:60]!r}){more}, which would count it more than "
                "once.\nhint: keep one row an item"
            )


def asked(
    text: str, question: str, answer_start: str = "", *, system: str | None = None
) -> AskedPrompt:
    """Return a prompt: what plain models see, and the question that others are asked.

    Args:
        text: For plain models.
        question: The user's message to models that chat.
        answer_start: How their answer has begun.
        system: The system message to them.
    """
    from proxytune.text.prompts import AskedPrompt

    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return AskedPrompt(text, [*messages, {"role": "user", "content": question}], answer_start)
