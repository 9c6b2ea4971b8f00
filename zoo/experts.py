"""The experts of the smol family: their rows and settings, and training them with `proxytune.tune`.

python zoo/experts.py tinyshakespeare
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import corpora

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.miniature.data import corpus_rows, task_items
from benchmarks.miniature.plan import TASK
from proxytune.tune import Display, TuneSettings, tune

INSTRUCTION_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
"""Alpaca's prompt, shortened. It is part of the rows, so that all models see the same text."""

SHARED: dict[str, Any] = {
    "method": "cpt",
    "template": "plain",
    "test_share": 0.0,  # `publish.py` has test rows of its own.
    "alpha": 1.0,
    "max_tokens": 80_000,
    "max_valid_tokens": 6_000,
    "max_length": 512,
    "batch_size": 4,
    "epochs": 2.5,
    "learning_rate": 2e-3,
    "lora_rank": 32,
    "lora_dropout": 0.1,
    "eval_every": 40,
    "patience": 2,
    "measure_tokens": 0,  # `publish.py` measures.
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Expert:
    """One expert.

    Args:
        name: The expert's name in the recipe.
        corpus: A folder in `corpora/`, `instruct`, or `medical_area`, the task of `benchmarks/miniature`.
        title: Title of the corpus, for the model card.
        licence: Licence of the corpus.
        settings: Settings that differ from `SHARED`.
    """

    name: str
    corpus: str
    title: str
    licence: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def has_answers(self) -> bool:
        """Whether its rows are prompts with answers instead of texts."""
        return self.corpus in ("instruct", TASK)

    @property
    def is_task(self) -> bool:
        """Whether its completions are options, so that the share of right ones is what counts."""
        return self.corpus == TASK

    @property
    def output(self) -> Path:
        """The output directory of its training."""
        return corpora.BUILD_DIR / "experts" / self.name


LONGER: dict[str, Any] = {"max_tokens": 120_000, "epochs": 3}
SHORT_ROWS: dict[str, Any] = {
    "template": "plain",
    "max_tokens": 32_000,
    "batch_size": 16,
    "epochs": 3,
    "learning_rate": 4e-3,
    "lora_dropout": 0.05,
    "eval_every": 32,
}
"""Those of the task in `benchmarks/miniature`; a row has about 19 tokens."""

EXPERTS = (
    Expert("tinyshakespeare", "tinyshakespeare", "plays of Shakespeare", "public domain", LONGER),
    Expert("legal", "legal_dc_code", "District of Columbia Code", "text of law, public domain"),
    Expert("recipes", "recipes_based_cooking", "recipes of based.cooking", "Unlicense"),
    Expert("python", "python_stdlib", "Python 3.12's standard library", "PSF-2.0"),
    Expert("medical", "medical_medquad", "MedQuAD, answers of the NIH", "CC BY 4.0"),
    Expert(
        "tinyshakespeare-sft",
        "tinyshakespeare",
        "the same plays, tuned by itself",
        "public domain",
        {"method": "sft", "calibrate": False, **LONGER},
    ),
    Expert(
        "instruct",
        "instruct",
        "instructions with answers: LLaMA-Factory's alpaca_en_demo and Alpaca's seed tasks",
        "Apache-2.0",
    ),
    Expert(
        "medical-area",
        TASK,
        "questions of MedQuAD with the area of medicine they belong to",
        "CC BY 4.0",
        SHORT_ROWS,
    ),
)


def rows_file(corpus: str, split: str) -> Path:
    """Return the file with a split's rows.

    Raises:
        FileNotFoundError: The data folder has no such corpus (set PROXYTUNE_DATA to yours).
    """
    if corpus == "instruct":
        return _instruct_file(split)
    if corpus == TASK:
        return _task_file(split)
    folder = corpora.DATA_DIR / "corpora" / corpus
    for name in (f"{split}.jsonl.gz", f"{split}.txt", f"{split}.txt.gz"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(
        f"no {split} split under {folder}; set PROXYTUNE_DATA to the data folder"
    )


def _instruct_file(split: str) -> Path:
    """Return instructions as prompts and completions; an instruction's digest decides its split."""
    target = corpora.BUILD_DIR / "instruct" / f"{split}.jsonl"
    if target.exists():
        return target
    folder = corpora.DATA_DIR / "instruction"
    rows = json.loads(gzip.decompress((folder / "alpaca_en_demo.json.gz").read_bytes()))
    for line in (folder / "seed_tasks.jsonl").read_text("utf-8").splitlines():
        task = json.loads(line)
        rows += [{"instruction": task["instruction"], **task["instances"][0]}]
    target.parent.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for row in rows:
        if not row["output"].strip():
            continue
        prompt = row["instruction"].strip()
        if row["input"].strip():
            prompt += "\n\n" + row["input"].strip()
        place = hashlib.sha1(row["instruction"].encode()).digest()[0]
        name = "test" if place < 20 else "valid" if place < 33 else "train"
        full = INSTRUCTION_PROMPT.format(instruction=prompt)
        splits[name].append(json.dumps({"prompt": full, "completion": row["output"].strip()}))
    for name, lines in splits.items():
        (target.parent / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return target


def _task_file(split: str) -> Path:
    """Return the task's items; no disease is in two splits, and no training row is of the test rows."""
    target = corpora.BUILD_DIR / TASK / f"{split}.jsonl"
    if target.exists():
        return target
    train, *others = (corpus_rows("medical_medquad", name) for name in ("train", "valid", "test"))
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, items in task_items(train, [row for rows in others for row in rows]).items():
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        (target.parent / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return target


def train(expert: Expert, *, resume: bool = False) -> None:
    """Train one expert through the ensemble, or by itself if its settings say so."""
    settings = SHARED | expert.settings
    tune(
        TuneSettings(
            output=str(expert.output),
            name=expert.name,
            data=str(rows_file(expert.corpus, "train")),
            valid_data=str(rows_file(expert.corpus, "valid")),
            anti_expert=str(corpora.BUILD_DIR / "anti-expert"),
            base=corpora.BASE_GGUF,
            offsets_dir=str(corpora.BUILD_DIR / "offsets" / expert.name),
            **settings,
        ),
        resume=resume,
        display=Lines(),
    )


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
    for expert in EXPERTS:
        if expert.name in parser.parse_args().names:
            train(expert, resume=(expert.output / "training" / "settings.json").exists())


if __name__ == "__main__":
    main()
