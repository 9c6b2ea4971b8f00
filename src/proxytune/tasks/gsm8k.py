"""GSM8K: grade-school mathematics, answered with a number.

The prompt, the clean-up and the rule are those of the paper's runs (`eval/gsm` of its repository). The
paper's rule compares the last number of the text with the target as strings without punctuation. So `18.00`
is wrong for `18` and `7.2` is right for `72`, and a whole number loses its minus sign. The numeric rule
compares numbers. `measure/metrics.py` has both ways to find the last number.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from proxytune.errors import InputFileError
from proxytune.measure.metrics import number_value, published_number, without_commas
from proxytune.request import SamplingParams
from proxytune.tasks.rows import Row, data_rows, field
from proxytune.tasks.task import Item, Rule, Task, asked

INSTRUCTION = "Answer the following question."
ENDS = ("Answer the following question", "Question:", "Comment:")
"""Where a model starts something else; the text is cut before these."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_same_text(prediction: str, target: str) -> bool:
    """Whether two texts are equal, ignoring case and punctuation."""
    one, other = (text.lower().translate(_NO_PUNCTUATION) for text in (prediction, target))
    return one == other


class Gsm8k(Task):
    """GSM8K, zero-shot."""

    name = "gsm8k"
    title = "GSM8K"
    source = "Cobbe et al. 2021, arXiv:2110.14168"
    metric = "exact_match"
    key_fields = ("question",)
    num_items = 1319
    # Cutting a text while it is generated leaves the same as cutting it afterwards.
    sampling = SamplingParams(max_new_tokens=512, stop=ENDS)

    @override
    def items(self, data_dir: Path | None) -> list[Item]:
        rows = data_rows(data_dir, ("gsm8k/test.jsonl",), "openai/gsm8k", "main", "test")
        return [self._item(row, place) for place, row in enumerate(rows, 1)]

    def _item(self, row: Row, place: int) -> Item:
        question = field(row, place, "question")
        _, mark, target = field(row, place, "answer").rpartition("####")
        if not mark:
            raise InputFileError(
                f"row {place}: the answer has no ####, which should precede its number"
            )
        body = f"{INSTRUCTION}\n\nQuestion: {question.strip()}"
        return Item(
            key=question,
            prompt=asked(f"{body}\nAnswer:", body, "Answer:"),
            fields={"question": question, "answer": without_commas(target.strip())},
        )

    @override
    def row(self, item: Item, output: str) -> Row:
        for end in ENDS:
            output = output.split(end)[0]
        return {**item.fields, "model_output": output, "prediction": published_number(output)}

    @override
    def score(self, row: Row, place: int, rule: Rule) -> float | None:
        target = field(row, place, "answer")
        if rule == "paper":
            prediction = row.get("prediction")
            if not isinstance(prediction, str):
                prediction = published_number(field(row, place, "model_output"))
            return float(is_same_text(prediction, target))
        value = number_value(field(row, place, "model_output", "prediction"))
        wanted = number_value(target)
        if wanted is None:
            raise InputFileError(f"row {place}: the answer {target!r} is not a number")
        return float(value == wanted)

    @override
    def notes(self, rows: Sequence[Row], rule: Rule) -> list[str]:
        others = sum(
            "model_output" in row
            and isinstance(row.get("prediction"), str)
            and published_number(str(row["model_output"])) != row["prediction"]
            for row in rows
        )
        if not others:
            return []
        return [
            f"in {others:,} rows the stored prediction is not what the published pattern extracts"
        ]
