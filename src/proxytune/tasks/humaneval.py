"""HumanEval: functions to write from their docstrings, right if their tests pass.

The published runs draw 20 samples per problem at temperature 0.8. Lines that begin with `assert` or `print`
are deleted. Programs run only if the caller allows it; see `sandbox.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from proxytune.request import SamplingParams
from proxytune.tasks.rows import Row, data_rows, field
from proxytune.tasks.sandbox import Limits
from proxytune.tasks.statistics import pass_at_k
from proxytune.tasks.task import Item, Metrics, Rule, Scores, Task, asked

TIMEOUT_S = 3.0
"""Seconds that a program may run, as published."""
BANNED = ("pass", "...")
"""The published runs ban these: a function body that does nothing."""


def clean_code(completion: str) -> str:
    """Return code without lines that begin with assert or print, and without trailing white space."""
    lines = completion.split("\n")
    return "\n".join(x for x in lines if not x.strip().startswith(("assert", "print"))).rstrip()


class CodeTask(Task):
    """A benchmark whose answers are programs, several per problem."""

    decider = "code"
    num_samples = 20
    metric = "pass@10"
    banned = BANNED
    limits: ClassVar[Limits] = Limits(timeout_s=TIMEOUT_S)
    """Limits of each program."""

    @abstractmethod
    def program(self, item: Item, row: Row) -> str:
        """Return a program that ends without an error if the sample is right."""

    @override
    def is_unscored(self, row: Row) -> bool:
        return not isinstance(row.get("passed"), bool)

    @override
    def score(self, row: Row, place: int, rule: Rule) -> float | None:
        passed = row.get("passed")
        return float(passed) if isinstance(passed, bool) else None

    @override
    def metric_name(self, rows: Sequence[Row]) -> str:
        return f"pass@{self.num_drawn(rows)}"

    def num_drawn(self, rows: Sequence[Row]) -> int:
        """Return the k of pass@k: 10, or the number of samples per problem if there are fewer."""
        return min([10, *map(len, self.samples_by_item(rows).values())])

    @override
    def item_score(self, scores: Sequence[float | None]) -> float | None:
        return self.pass_at(scores, min(10, len(scores)))

    @staticmethod
    def pass_at(scores: Sequence[float | None], k: int) -> float | None:
        """Return a problem's pass@k; None while a sample is unscored."""
        known = [score for score in scores if score is not None]
        return pass_at_k(len(known), round(sum(known)), k) if len(known) == len(scores) else None

    def samples_by_item(self, rows: Sequence[Row]) -> dict[str, list[float | None]]:
        """Return the scores of each problem's samples."""
        samples: dict[str, list[float | None]] = {}
        for place, row in enumerate(rows, 1):
            samples.setdefault(self.key(row, place), []).append(self.score(row, place, "paper"))
        return samples

    @override
    def metrics(self, rows: Sequence[Row], scores: Scores, rule: Rule) -> Metrics:
        samples = self.samples_by_item(rows)
        return {
            f"pass@{k}": self.mean({key: self.pass_at(s, k) for key, s in samples.items()})
            for k in sorted({1, self.num_drawn(rows)})
        }

    @override
    def notes(self, rows: Sequence[Row], rule: Rule) -> list[str]:
        most = self.num_drawn(rows)
        if most == 10:
            return []
        return [f"there are {most} samples per problem, so the metric is pass@{most}, not pass@10"]


class HumanEval(CodeTask):
    """HumanEval, in the settings of the paper's section 4."""

    name = "humaneval"
    title = "HumanEval"
    source = "Chen et al. 2021, arXiv:2107.03374"
    key_fields = ("task_id",)
    num_items = 164
    sampling = SamplingParams(
        max_new_tokens=512,
        temperature=0.8,
        top_p=0.95,
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    )

    @override
    def items(self, data_dir: Path | None) -> list[Item]:
        files = ("humaneval/HumanEval.jsonl",)
        rows = data_rows(data_dir, files, "openai/openai_humaneval", None, "test")
        items = []
        for place, row in enumerate(rows, 1):
            name, prompt = field(row, place, "task_id"), field(row, place, "prompt")
            tests = {key: field(row, place, key) for key in ("test", "entry_point")}
            fields = {"task_id": name, "prompt": prompt, **tests}
            items.append(Item(name, asked(prompt, prompt), fields))
        return items

    @override
    def row(self, item: Item, output: str) -> Row:
        kept = {key: item.fields[key] for key in ("task_id", "prompt")}
        return {**kept, "completion": clean_code(output)}

    @override
    def program(self, item: Item, row: Row) -> str:
        fields = item.fields
        return f"{fields['prompt']}{row['completion']}\n{fields['test']}\ncheck({fields['entry_point']})"
