"""The rows of every data set: which text, which questions, in which split.

A domain's training rows are whole documents, its validation rows pieces of text, and its test split is one
text. Most tasks are in `tasks.py`; here is the one that is answered by choosing: to name the area of medicine
that a question of MedQuAD belongs to. No model reaches this file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.miniature.plan import MORE_TEXT, ROOT, SEED, TASK, Plan
from benchmarks.miniature.tasks import TASKS, split_items
from proxytune.errors import InputFileError
from proxytune.files import write_whole

DATA_DIR = Path(os.environ.get("PROXYTUNE_DATA", ROOT.parent / "shared" / "data"))
PIECE_CHARACTERS = 4_000
"""Six pieces are 5,000 to 8,000 tokens of validation text from all over the split."""
CHARACTERS_PER_TOKEN = 6
"""More than any domain has on average (3.1 to 4.9), so that picked documents suffice for `max_tokens`."""

INSTRUCTION_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
"""Alpaca's prompt, shortened. It is part of the rows, so that all models see the same text."""
PREPARED = "prepared.json"
GENERAL = ("english_digitalgov", "english_fiction")
GENERAL_SIZE = 60_000
"""Characters of each: together they are more than the 16,384 tokens that the bridge is computed on."""

AREAS = {
    "CancerGov": " cancer",
    "NIDDK": " kidneys and digestion",
    "NINDS": " nerves",
    "NHLBI": " heart and lungs",
    "NIHSeniorHealth": " old age",
    "CDC": " infections",
}
"""The institute that answers a question, as the area it is responsible for. MedlinePlus covers all areas, so
its rows are left out."""
ROWS_PER_AREA = 400
"""The nerves alone have 966 questions for training, infections 234."""
VALID_SHARE = 0.12


def corpus_rows(corpus: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of one split, each with at least a `text`.

    Raises:
        InputFileError: The split is not in the data folder.
    """
    folder = DATA_DIR / "corpora" / corpus
    text, lines = folder / f"{split}.txt", folder / f"{split}.jsonl.gz"
    try:
        if text.exists():
            return [{"text": text.read_text("utf-8")}]
        return [json.loads(line) for line in gzip.decompress(lines.read_bytes()).splitlines()]
    except OSError as error:
        raise InputFileError(
            f"{lines} cannot be read: {error.strerror}.\n"
            "hint: set PROXYTUNE_DATA to the folder that holds corpora/"
        ) from error


def alpaca_rows() -> list[dict[str, str]]:
    """Return LLaMA-Factory's alpaca_en_demo: rows of `instruction`, `input` and `output`."""
    path = DATA_DIR / "instruction" / "alpaca_en_demo.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def instruction_of(row: Mapping[str, str]) -> str:
    """Return a row's instruction with its input, if there is one."""
    parts = (row["instruction"].strip(), row["input"].strip())
    return "\n\n".join(part for part in parts if part)


def pick_documents(rows: Sequence[Mapping[str, Any]], num_characters: int) -> list[dict[str, str]]:
    """Return whole documents in random order until they have this many characters together."""
    picked = []
    size = 0
    for row in random.Random(SEED).sample(rows, len(rows)):
        if size >= num_characters:
            break
        picked.append({"text": row["text"]})
        size += len(row["text"])
    return picked


def pick_pieces(text: str, num_pieces: int) -> list[dict[str, str]]:
    """Return pieces evenly spaced over a text, each starting at the beginning of a line."""
    last = max(0, len(text) - PIECE_CHARACTERS)
    pieces = []
    for start in np.linspace(0, last, min(num_pieces, 1 + last // PIECE_CHARACTERS)).astype(int):
        begin = text.rfind("\n", 0, start) + 1
        pieces.append({"text": text[begin : begin + PIECE_CHARACTERS]})
    return pieces


def task_item(row: Mapping[str, Any]) -> dict[str, str] | None:
    """Return one question of MedQuAD as a prompt with its area; None if the row names no area."""
    if row["source"] not in AREAS or not row["focus"].strip():
        return None
    question = row["text"].partition("\n")[0].removeprefix("Question: ").strip()
    return {
        "prompt": f"Question: {question}\nArea:",
        "completion": AREAS[row["source"]],
        "focus": " ".join(row["focus"].casefold().split()),
        "wording": re.sub(re.escape(row["focus"]), "…", question, flags=re.IGNORECASE),
    }


def task_items(
    train_rows: Iterable[Mapping[str, Any]], test_rows: Iterable[Mapping[str, Any]]
) -> dict[str, list[dict[str, str]]]:
    """Return the task's items by split; no disease is in two of them.

    Args:
        train_rows: Rows of MedQuAD. Rows about a disease of the test rows and repeated questions are left
            out. Validation items are held out from them by disease.
        test_rows: Rows of MedQuAD. Every row that names an area becomes a test item.
    """
    test = [item for item in map(task_item, test_rows) if item]
    unseen = {item["focus"] for item in test}
    known = {
        (item["prompt"], item["completion"]): item
        for item in map(task_item, train_rows)
        if item and item["focus"] not in unseen
    }
    rng = random.Random(SEED)
    items = rng.sample(list(known.values()), len(known))
    diseases = sorted({item["focus"] for item in items})
    held_out = set(rng.sample(diseases, round(VALID_SHARE * len(diseases))))
    train = [item for item in items if item["focus"] not in held_out]
    valid = [item for item in items if item["focus"] in held_out]
    return {
        "train": _capped(train, ROWS_PER_AREA),
        "valid": _capped(valid, round(VALID_SHARE * ROWS_PER_AREA)),
        "test": test,
    }


def _capped(items: Iterable[dict[str, str]], most: int) -> list[dict[str, str]]:
    counts: Counter[str] = Counter()
    kept = []
    for item in items:
        counts[item["completion"]] += 1
        if counts[item["completion"]] <= most:
            kept.append(item)
    return kept


def guesses(items: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, float]:
    """Return the test accuracies of guesses that need no model.

    `majority` always gives the answer that is most frequent in the test items. `wording`, where items have
    one, gives the answer that a question's wording, without the disease, had most often in training. Both
    use what a model cannot know or does not need.
    """
    test = items["test"]
    answers = Counter(item["completion"] for item in test)
    found = {"majority": max(answers.values()) / len(test)}
    if "wording" not in test[0]:
        return found
    by_wording: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items["train"]:
        by_wording[item["wording"]][item["completion"]] += 1
        by_wording[""][item["completion"]] += 1
    right = 0
    for item in test:
        seen = by_wording.get(item["wording"], by_wording[""])
        right += seen.most_common(1)[0][0] == item["completion"]
    return found | {"wording": right / len(test)}


def prepare(plan: Plan) -> dict[str, dict[str, Any]]:
    """Write each data set's rows and return their digests and counts by data set.

    They are also kept in a file, for the stages' own processes.
    """
    prepared: dict[str, dict[str, Any]] = {"proxy": {}}
    rows = {"train": general_text()}
    prepared["proxy"] |= {s: _write_rows(plan.rows_path("general", s), r) for s, r in rows.items()}
    for name in plan.domains:
        rows = text_rows(plan, name)
        prepared[name] = {s: _write_rows(plan.rows_path(name, s), r) for s, r in rows.items()}
    for name in plan.tasks:
        items = items_of(name)
        items |= {split: items[split][: plan.max_items] for split in ("valid", "test")}
        prepared[name] = {s: _write_rows(plan.rows_path(name, s), r) for s, r in items.items()}
        prepared[name]["guesses"] = guesses(items)
    write_whole(plan.build / "data" / PREPARED, json.dumps(prepared))
    return prepared


def read_prepared(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return what `prepare` returned when the rows were written last; writes those that never were."""
    path = plan.build / "data" / PREPARED
    prepared = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return prepared if prepared.keys() >= {*plan.data_sets} else prepare(plan)


def text_rows(plan: Plan, name: str) -> dict[str, list[dict[str, str]]]:
    """Return a domain's rows by split; `more` has those of `train` and others."""
    valid, test = (
        "\n\n".join(row["text"].strip() for row in corpus_rows(name, split))
        for split in ("valid", "test")
    )
    size = CHARACTERS_PER_TOKEN * plan.max_tokens["text"]
    documents = corpus_rows(name, "train")
    return {
        "train": pick_documents(documents, size),
        "more": pick_documents(documents, MORE_TEXT * size),
        "valid": pick_pieces(valid, plan.num_pieces),
        "test": [{"text": test}],
    }


def general_text() -> list[dict[str, str]]:
    """Return text that belongs to no data set, for the cut's bridge."""
    return [
        row for name in GENERAL for row in pick_documents(corpus_rows(name, "train"), GENERAL_SIZE)
    ]


def items_of(name: str) -> dict[str, list[dict[str, str]]]:
    """Return a task's items by split."""
    if name == TASK:
        train, *others = (
            corpus_rows("medical_medquad", split) for split in ("train", "valid", "test")
        )
        return task_items(train, [row for rows in others for row in rows])
    task = next(task for task in TASKS if task.name == name)
    return split_items(
        task.items(corpus_rows),
        task.held_out(corpus_rows),
        num_train=task.num_train,
        num_valid=task.num_valid,
    )


def _write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, content)
    return {"rows": len(rows), "sha256": hashlib.sha256(content.encode()).hexdigest()}


def read_rows(plan: Plan, name: str, split: str) -> list[dict[str, str]]:
    """Return rows that `prepare` wrote."""
    # Not splitlines(), which would also cut at rare separators inside texts.
    lines = plan.rows_path(name, split).read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
