"""TriviaQA: short questions without documents, right if the answer is one of the accepted ones.

By the paper's rule the output must equal one of them, ignoring case and white space around it. By the numeric
rule both are first normalised as in TriviaQA's own evaluation: without case, articles, punctuation and
repeated spaces.
"""

from __future__ import annotations

import re
import string
from pathlib import Path

from typing_extensions import override

from proxytune.request import SamplingParams
from proxytune.tasks.rows import Row, data_rows, field
from proxytune.tasks.task import Item, Rule, Task, asked

_TO_SPACES = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4", " "))


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and repeated spaces.

    Source: Joshi et al. 2017, arXiv:1705.03551, and the evaluation script published with it.
    """
    text = text.lower().translate(_TO_SPACES)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


class TriviaQa(Task):
    """TriviaQA, closed book."""

    name = "triviaqa"
    title = "TriviaQA"
    source = "Joshi et al. 2017, arXiv:1705.03551"
    metric = "exact_match"
    key_fields = ("question_id", "question")
    num_items = 11313
    # The published stop token is the last one of a blank line, which is a line break.
    sampling = SamplingParams(max_new_tokens=20, stop=("\n",))

    @override
    def items(self, data_dir: Path | None) -> list[Item]:
        names = ("triviaqa/dev.jsonl", "triviaqa/eval_sampled_dev.jsonl")
        hub = ("mandarjoshi/trivia_qa", "unfiltered.nocontext", "validation")
        rows = data_rows(data_dir, names, *hub)
        items = []
        for place, row in enumerate(rows, 1):
            question = field(row, place, "question")
            answer = row.get("answer")
            if isinstance(answer, dict):
                answers = [answer["value"], *answer["aliases"]]
            elif "answers" in row:
                answers = field(row, place, "answers", kind=list)
            else:
                aliases = field(row, place, "aliases", kind=list)
                answers = [field(row, place, "answer"), *aliases]
            body = f"Question: {question}"
            key = str(row.get("question_id", question))
            fields = {"question": question, "question_id": key, "answers": answers}
            items.append(Item(key, asked(f"{body}\nAnswer:", body, "Answer:"), fields))
        return items

    @override
    def row(self, item: Item, output: str) -> Row:
        return {**item.fields, "prediction": output}

    @override
    def score(self, row: Row, place: int, rule: Rule) -> float | None:
        prediction = field(row, place, "prediction", "output", "model_output")
        answers = [str(answer) for answer in field(row, place, "answers", kind=list)]
        if rule == "paper":
            return float(prediction.strip().lower() in {a.strip().lower() for a in answers})
        return float(normalised(prediction) in {normalised(answer) for answer in answers})
