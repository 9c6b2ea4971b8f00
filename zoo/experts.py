"""The experts of the smol family: their rows and settings, and training them with `proxytune.tune`.

python zoo/experts.py tinyshakespeare
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import corpora

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.miniature.data import (
    INSTRUCTION_PROMPT,
    alpaca_rows,
    corpus_rows,
    instruction_of,
    items_of,
    pick_pieces,
)
from benchmarks.miniature.plan import TASK, TASKS
from proxytune.tune import Display, TuneSettings, tune

SHARED: dict[str, Any] = {
    "template": "plain",
    "test_share": 0.0,  # `publish.py` has test rows of its own.
    "alpha": 1.0,
    "max_length": 512,
    "measure_tokens": 0,  # `publish.py` measures.
    "dtype": "bfloat16",
}
TEXT: dict[str, Any] = {
    "method": "cpt",
    "batch_size": 4,
    "epochs": 2.5,
    "learning_rate": 2e-3,
    "lora_rank": 32,
    "lora_dropout": 0.1,
    "eval_every": 20,
}
"""Texts and instructions: through the base, with the untuned small model as the anti-expert of all."""
ANSWERS: dict[str, Any] = {
    "method": "sft",
    "calibrate": True,
    "then_cpt": True,
    "max_tokens": 12_000,
    "max_valid_tokens": 4_000,
    "batch_size": 16,
    "epochs": 6,
    "learning_rate": 4e-3,
    "lora_rank": 16,
    "eval_every": 16,
}
"""Tasks, as in `benchmarks/miniature`: calibrated pairs, trained on through the base. A row has 12 to 45
tokens."""
NUM_PIECES = {"train": 96, "valid": 6}
"""Pieces of 4,000 characters that are taken of a text: 78,000 to 117,000 tokens to train on. All seeds read
the same ones; of instructions and tasks, each seed draws rows of its own."""

SEEDS = (0, 1, 2)
"""Random seeds of the trainings. The first one's experts are shipped; the others show what chance does."""


@dataclass(frozen=True)
class Expert:
    """One expert.

    Args:
        name: The expert's name in the recipe.
        corpus: A folder in `corpora/`, `instruct`, or a task of `benchmarks/miniature`.
        title: Title of the corpus, for the model card.
        licence: Licence of the corpus.
        settings: Settings that differ from `TEXT` or, of a task, from `ANSWERS`.
    """

    name: str
    corpus: str
    title: str
    licence: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def has_answers(self) -> bool:
        """Whether its rows are prompts with answers instead of texts."""
        return self.corpus == "instruct" or self.is_task

    @property
    def is_task(self) -> bool:
        """Whether an answer is right or wrong, so that the share of right ones is what counts."""
        return self.corpus in TASKS

    @property
    def is_calibrated(self) -> bool:
        """Whether it has an anti-expert of its own."""
        return self.is_task

    @property
    def has_options(self) -> bool:
        """Whether an answer is one of a few options, told apart by its first token."""
        return self.corpus == TASK

    def output(self, seed: int = SEEDS[0]) -> Path:
        """Return the output directory of its training with a seed."""
        return corpora.BUILD_DIR / "experts" / f"{self.name}.{seed}"

    @property
    def states(self) -> Path:
        """Where the base's states on its rows are kept, for all seeds."""
        return corpora.BUILD_DIR / "states" / self.name


EXPERTS = (
    Expert("tinyshakespeare", "tinyshakespeare", "plays of Shakespeare", "public domain"),
    Expert("legal", "legal_dc_code", "District of Columbia Code", "text of law, public domain"),
    Expert("recipes", "recipes_based_cooking", "recipes of based.cooking", "Unlicense"),
    Expert("python", "python_stdlib", "Python 3.12's standard library", "PSF-2.0"),
    Expert("medical", "medical_medquad", "MedQuAD, answers of the NIH", "CC BY 4.0"),
    Expert(
        "instruct",
        "instruct",
        "instructions with answers: LLaMA-Factory's alpaca_en_demo and Alpaca's seed tasks",
        "Apache-2.0",
        {"max_tokens": 40_000, "max_valid_tokens": 6_000, "lora_rank": 8},
    ),
    Expert(
        "record",
        "record",
        "notes about payments as records with three fields, generated",
        "Apache-2.0",
    ),
    Expert(
        "medical-area",
        TASK,
        "questions of MedQuAD with the area of medicine they belong to",
        "CC BY 4.0",
    ),
)


def rows_file(corpus: str, split: str) -> Path:
    """Return the file with a split's rows; those of a text are pieces, evenly spaced over its split.

    Raises:
        InputFileError: The data folder has no such corpus (set PROXYTUNE_DATA to yours).
    """
    if corpus == "instruct":
        return _instruct_file(split)
    if corpus in TASKS:
        return _task_file(corpus, split)
    target = corpora.BUILD_DIR / "rows" / f"{corpus}.{split}.jsonl"
    if not target.exists():
        text = "\n\n".join(row["text"].strip() for row in corpus_rows(corpus, split))
        rows = pick_pieces(text, NUM_PIECES[split])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return target


def _instruct_file(split: str) -> Path:
    """Return instructions as prompts and completions; an instruction's digest decides its split."""
    target = corpora.BUILD_DIR / "instruct" / f"{split}.jsonl"
    if target.exists():
        return target
    rows = alpaca_rows()
    seed_tasks = corpora.DATA_DIR / "instruction" / "seed_tasks.jsonl"
    for line in seed_tasks.read_text("utf-8").splitlines():
        task = json.loads(line)
        rows += [{"instruction": task["instruction"], **task["instances"][0]}]
    target.parent.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for row in rows:
        if not row["output"].strip():
            continue
        place = hashlib.sha1(row["instruction"].encode()).digest()[0]
        name = "test" if place < 20 else "valid" if place < 33 else "train"
        prompt = INSTRUCTION_PROMPT.format(instruction=instruction_of(row))
        splits[name].append(json.dumps({"prompt": prompt, "completion": row["output"].strip()}))
    for name, lines in splits.items():
        (target.parent / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return target


def _task_file(name: str, split: str) -> Path:
    """Return a task's items; nothing that an item is about is in two splits."""
    target = corpora.BUILD_DIR / "rows" / f"{name}.{split}.jsonl"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    for part, items in items_of(name).items():
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        (target.parent / f"{name}.{part}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return target


def settings_of(expert: Expert, seed: int) -> TuneSettings:
    """Return the settings of an expert's training."""
    return TuneSettings(
        output=str(expert.output(seed)),
        name=expert.name,
        data=str(rows_file(expert.corpus, "train")),
        valid_data=str(rows_file(expert.corpus, "valid")),
        anti_expert=str(corpora.BUILD_DIR / "anti-expert"),
        base=corpora.BASE_GGUF,
        offsets_dir=str(expert.states),
        seed=seed,
        **(SHARED | (ANSWERS if expert.is_task else TEXT) | expert.settings),
    )


def train(expert: Expert, seed: int) -> None:
    """Train one expert, or go on with a training that was stopped."""
    settings = settings_of(expert, seed)
    tune(settings, resume=(settings.training / "settings.json").exists(), display=Lines())


class Lines(Display):
    """Prints a line after each tenth of a stage."""

    def __init__(self) -> None:
        self._shown: dict[str, int] = {}

    def say(self, text: str) -> None:
        print(text, flush=True)

    def stage(self, name: str, done: float, total: float, **numbers: float | None) -> None:
        tenth = int(10 * done / max(total, 1))
        if self._shown.get(name) != tenth:
            self._shown[name] = tenth
            shown = ", ".join(f"{k} {v:.4f}" for k, v in numbers.items() if v is not None)
            print(f"{name}: {done:,.0f} of {total:,.0f} {shown}".rstrip(), flush=True)


def main() -> None:
    """Train the named experts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[e.name for e in EXPERTS])
    parser.add_argument("--seed", type=int, default=SEEDS[0], choices=SEEDS)
    arguments = parser.parse_args()
    for expert in EXPERTS:
        if expert.name in arguments.names:
            train(expert, arguments.seed)


if __name__ == "__main__":
    main()
