"""What steering does over many texts of the smol family: docs/analysis.json and a picture beside the guide.

    python benchmarks/steering.py --data-dir data

`--data-dir` holds `corpora/medical_medquad/test.jsonl.gz` (questions of the NIH, held out in the expert's
training) and `gsm8k/test.jsonl`. Both runs are `proxytune analyze` with the arguments below. They take about
twenty minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = "package:proxytune/smol"
NUM_MEDICAL = 32
NUM_GSM = 24
RUNS = {
    "medical": ["--expert", "medical", "--alpha", "0.45,0.9,1.8", "--max-new-tokens", "96"],
    "gsm8k": ["--expert", "instruct", "--alpha", "0.9", "--max-new-tokens", "80"],
}


def medical_prompts(data_dir: Path) -> list[str]:
    """Return questions spread evenly over the test split."""
    path = data_dir / "corpora" / "medical_medquad" / "test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [
        text.split("\nAnswer:")[0] + "\nAnswer:" for text in texts[:: len(texts) // NUM_MEDICAL]
    ][:NUM_MEDICAL]


def gsm_prompts(data_dir: Path) -> list[str]:
    """Return the first questions, each with an answer started so that a small model calculates."""
    with (data_dir / "gsm8k" / "test.jsonl").open(encoding="utf-8") as file:
        questions = [json.loads(line)["question"].strip() for line in file]
    return [
        f"Answer the following question.\n\nQuestion: {question}\nAnswer: Let us calculate step by step."
        for question in questions[:NUM_GSM]
    ]


def analyze(name: str, prompts: list[str], picture: Path | None) -> dict[str, Any]:
    """Run the command and return its JSON answer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), "utf-8")
        command = ["analyze", RECIPE, "--prompts", str(path), *RUNS[name], "--json"]
        if picture is not None:
            command += ["--picture", str(picture)]
        code = "from proxytune.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True, check=True
        )
    return {"arguments": RUNS[name], "num_prompts": len(prompts), **json.loads(done.stdout)}


def main() -> None:
    """Run both and write their results."""
    parser = argparse.ArgumentParser(description="Analyze what steering does on the smol family.")
    parser.add_argument("--data-dir", type=Path, required=True)
    data_dir = parser.parse_args().data_dir
    picture = ROOT / "docs" / "images" / "explain-analysis.png"
    answers = {
        "medical": analyze("medical", medical_prompts(data_dir), picture),
        "gsm8k": analyze("gsm8k", gsm_prompts(data_dir), None),
    }
    path = ROOT / "docs" / "analysis.json"
    path.write_text(
        json.dumps(answers, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
