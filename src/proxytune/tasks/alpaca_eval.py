"""AlpacaEval: instructions, scored by how often a judge prefers the answer to text-davinci-003's.

The metric is a win rate in percent; a draw is half a win. The published runs asked GPT-4
(`alpaca_eval_gpt4_0314`). Another judge can be asked through an API (see `evaluate/judges.py`); its win rates
are not comparable with the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from proxytune.errors import InputFileError
from proxytune.request import SamplingParams
from proxytune.tasks.rows import Row, field, hub_file_rows, local_rows
from proxytune.tasks.statistics import standard_error
from proxytune.tasks.task import Item, Metrics, Rule, Scores, Task, asked

_SCORES = {0: 0.5, 1: 0.0, 1.5: 0.5, 2: 1.0}
"""Scores by preference: 1 is the reference, 2 the model; a draw is 0 in the published files and 1.5 in later
ones."""


class AlpacaEval(Task):
    """The 805 instructions that AlpacaFarm is evaluated on."""

    name = "alpaca_eval"
    title = "AlpacaEval"
    source = (
        "Dubois et al. 2023, arXiv:2305.14387; Li et al. 2023, github.com/tatsu-lab/alpaca_eval"
    )
    metric = "win_rate"
    scale = 100.0
    key_fields = ("instruction",)
    num_items = 805
    decider = "judge"
    sampling = SamplingParams(max_new_tokens=2048, stop=("\n\nComment:",))

    @override
    def items(self, data_dir: Path | None) -> list[Item]:
        rows = (
            hub_file_rows("tatsu-lab/alpaca_eval", "alpaca_eval.json")
            if data_dir is None
            else local_rows(data_dir, ("alpaca_eval/text_davinci_003_outputs.json",))
        )
        items = []
        for place, row in enumerate(rows, 1):
            instruction = field(row, place, "instruction")
            fields = {
                "instruction": instruction,
                "dataset": row.get("dataset"),
                "output_1": field(row, place, "output"),
                "generator_1": row.get("generator", "text_davinci_003"),
            }
            items.append(Item(instruction, asked(instruction, instruction), fields))
        return items

    @override
    def row(self, item: Item, output: str) -> Row:
        return {**item.fields, "output_2": output.strip()}

    @override
    def is_unscored(self, row: Row) -> bool:
        return row.get("preference") is None

    @override
    def score(self, row: Row, place: int, rule: Rule) -> float | None:
        preference = row.get("preference")
        if preference is None:
            return None
        if preference not in _SCORES:
            raise InputFileError(
                f"row {place}: preference is {preference!r}, and must be 1, 2, or 0 for a draw"
            )
        return _SCORES[preference]

    @override
    def metrics(self, rows: Sequence[Row], scores: Scores, rule: Rule) -> Metrics:
        known = [score for score in scores.values() if score is not None]
        lengths = [len(row["output_2"]) for row in rows if isinstance(row.get("output_2"), str)]
        error = standard_error(known)
        return {
            "win_rate": self.mean(scores),
            "standard_error": None if error is None else self.scale * error,
            "n_wins": known.count(1.0),
            "n_wins_base": known.count(0.0),
            "n_draws": known.count(0.5),
            "n_total": len(known),
            "avg_length": sum(lengths) // len(lengths) if lengths else None,
        }
