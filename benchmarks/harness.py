"""Compare lm-eval's numbers for a plain model with those of a recipe at alpha 0, on tasks read from local
files.

    python benchmarks/harness.py --data-dir ../shared/data --limit 20

The base is that of the smol family. Three of the harness's own tasks run on the files in the folder:
TruthfulQA's mc1 (likelihoods), GSM8K (generation), and WikiText-2 (rolling likelihoods). Needs lm-eval.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = "package:proxytune/smol"


def tasks(data_dir: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the tasks, with their files written into a folder in the harness's format."""
    questions = json.loads((data_dir / "truthfulqa" / "mc_task.json").read_text("utf-8"))
    choice = [
        {
            "question": row["question"],
            "mc1_targets": {
                "choices": list(row["mc1_targets"]),
                "labels": list(row["mc1_targets"].values()),
            },
        }
        for row in questions
    ]
    gsm = [
        json.loads(line)
        for line in (data_dir / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
    ]
    text = gzip.decompress(
        (data_dir / "corpora" / "wikitext-2" / "test.txt.gz").read_bytes()
    ).decode()
    pages = [
        {"page": f"{part.strip()[:1500]}\n"}  # Cut, so that a page takes only seconds.
        for part in text.split("\n \n")
        if len(part.split()) > 80
    ]
    files = {}
    for name, rows in (("choice", choice), ("gsm", gsm), ("pages", pages)):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def source(name: str) -> dict[str, Any]:
        return {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(files[name])}},
            "test_split": "test",
        }

    return [
        {
            "task": "truthfulqa_mc1_local",
            **source("choice"),
            "output_type": "multiple_choice",
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_target": 0,
            "doc_to_choice": "{{mc1_targets.choices}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            "task": "gsm8k_local",
            **source("gsm"),
            "output_type": "generate_until",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{answer.split('####')[-1].strip()}}",
            "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 48},
            "metric_list": [
                {"metric": "exact_match", "ignore_punctuation": True},
                {"metric": "bleu"},
            ],
        },
        {
            "task": "wikitext_local",
            **source("pages"),
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "page",
            "metric_list": [
                {"metric": "word_perplexity"},
                {"metric": "byte_perplexity"},
                {"metric": "bits_per_byte"},
            ],
        },
    ]


def main() -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from proxytune.integrations.lm_eval import ProxyTunedLM
    from proxytune.model import ProxyTuned

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--only", help="one of the tasks")
    arguments = parser.parse_args()
    model = ProxyTuned.load(RECIPE, experts=("instruct",), dtype="float32")
    base: Any = model.ensemble.members[0].backend
    plain = HFLM(pretrained=base.model, tokenizer=model.tokenizer, batch_size=1, device="cpu")
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks(arguments.data_dir, Path(folder)):
            if arguments.only not in (None, task["task"]):
                continue
            found = []
            for each in (plain, ProxyTunedLM(model, alpha=0.0, batch_size=4)):
                started = time.perf_counter()
                result = simple_evaluate(
                    model=each, tasks=[dict(task)], limit=arguments.limit, bootstrap_iters=0
                )
                seconds = time.perf_counter() - started
                found.append(
                    (result["results"][task["task"]], result["samples"][task["task"]], seconds)
                )
            (theirs, their_samples, their_s), (ours, our_samples, our_s) = found
            for name, value in theirs.items():
                if isinstance(value, float):
                    shown = f"{value:.4f}", f"{ours[name]:.4f}"
                    worst += shown[0] != shown[1]
                    mark = "" if shown[0] == shown[1] else "DIFFERS"
                    print(f"{task['task']:<22} {name:<22} {' '.join(shown)} {mark}")
            same = sum(
                a["resps"] == b["resps"] for a, b in zip(their_samples, our_samples, strict=True)
            )
            print(
                f"{task['task']:<22} {len(our_samples)} items, {same} with equal answers to the last digit; "
                f"{their_s:.0f} s and {our_s:.0f} s"
            )
    raise SystemExit(worst)


if __name__ == "__main__":
    main()
