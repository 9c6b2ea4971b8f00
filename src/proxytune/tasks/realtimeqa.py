"""RealTimeQA: questions about a week's news, each with up to five answers to choose from.

The answer is the letter that is most likely to come next (Liu et al. 2024, section 7: the argmax over the
letters). Neither code nor prompt of that experiment is published, so the prompt here is that of TruthfulQA's
multiple choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from proxytune.errors import InputFileError
from proxytune.request import SamplingParams
from proxytune.tasks.rows import Row, field, local_rows
from proxytune.tasks.task import Item, Rule, Task, asked

LETTERS = "ABCDE"
FIRST_DATE, LAST_DATE = "2022/06/13", "2023/12/01"
"""The weeks of the paper's experiment."""


def answer_index(row: Row, place: int) -> int | None:
    """Return the index of the right choice; None if the row does not give it.

    Raises:
        InputFileError: The row's answer is not one of its choices.
    """
    answer: Any = row.get("answer")
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    if answer is None or answer == "":
        return None
    if not str(answer).isdecimal() or int(answer) >= len(row["choices"]):
        raise InputFileError(f"row {place}: the answer {answer!r} is not one of its choices")
    return int(answer)


class RealTimeQa(Task):
    """RealTimeQA, multiple choice without documents."""

    name = "realtimeqa"
    title = "RealTimeQA"
    source = "Kasai et al. 2023, arXiv:2207.13332"
    metric = "accuracy"
    sampling = SamplingParams(max_new_tokens=1)

    @override
    def items(self, data_dir: Path | None) -> list[Item]:
        if data_dir is None:
            raise InputFileError(
                "RealTimeQA has no data set on the Hub.\nhint: concatenate the weeks of "
                "github.com/realtimeqa/realtimeqa_public into realtimeqa/past.jsonl, and give the folder "
                "that contains realtimeqa/ with --data-dir"
            )
        items: dict[str, Item] = {}
        for place, row in enumerate(local_rows(data_dir, ("realtimeqa/past.jsonl",)), 1):
            choices = field(row, place, "choices", kind=list)
            right = answer_index(row, place)
            date = str(row.get("question_date", FIRST_DATE))
            key = f"{field(row, place, 'question_id')} {field(row, place, 'question_sentence')}"
            if right is None or key in items or not FIRST_DATE <= date <= LAST_DATE:
                continue
            if len(choices) > len(LETTERS):
                raise InputFileError(f"row {place} has {len(choices)} choices")
            items[key] = self._item(key, row, choices, right)
        return list(items.values())

    @staticmethod
    def _item(key: str, row: Row, choices: list[str], right: int) -> Item:
        listed = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
        question = "\n".join([row["question_sentence"], *listed])
        fields: Row = {
            name: row[name]
            for name in ("question_id", "question_date", "question_sentence", "choices")
            if name in row
        }
        return Item(
            key,
            asked(f"{question}\n\nThe answer is:", question, "The answer is:"),
            {**fields, "answer": [str(right)]},
            tuple(f" {letter}" for letter in LETTERS[: len(choices)]),
        )

    @override
    def row(self, item: Item, output: str) -> Row:
        letter = output.strip()
        found = LETTERS.find(letter) if letter else -1
        return {**item.fields, "prediction": str(found) if found >= 0 else letter}

    @override
    def key(self, row: Row, place: int) -> str:
        return f"{field(row, place, 'question_id')} {row.get('question_sentence', '')}"

    @override
    def score(self, row: Row, place: int, rule: Rule) -> float | None:
        right = answer_index({**row, "choices": field(row, place, "choices", kind=list)}, place)
        if right is None:
            raise InputFileError(f"row {place} does not say which choice is right")
        prediction = row.get("prediction")
        if isinstance(prediction, list):
            prediction = prediction[0] if prediction else ""
        if isinstance(prediction, int):
            prediction = str(prediction)
        if not isinstance(prediction, str):
            raise InputFileError(f"row {place} has no prediction")
        text = prediction.strip()
        if text.upper() in LETTERS and len(text) == 1:
            text = str(LETTERS.index(text.upper()))
        return float(text == str(right))
