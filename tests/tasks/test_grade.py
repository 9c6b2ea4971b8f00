"""`proxytune grade`, and the published runs scored again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxytune.cli import app

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "paper_results"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the paper's published predictions are not here"
)
CHAT = "truthfulqa/llama2-chat-7B-helpful-prompt"
RUNS = (
    ("gsm8k", "gsm/dexperts-gsm-13B/predictions.jsonl.gz", "metrics.json"),
    ("gsm8k", "gsm/llama2-chat-7B/predictions.jsonl.gz", "metrics.json"),
    ("gsm8k", "gsm/llama2-gsm-7B/predictions.jsonl.gz", "metrics.json"),
    ("toxigen", "toxigen/llama2-70B/predictions.jsonl.gz", "metrics.json"),
    ("toxigen", "toxigen/llama2-chat-70B/predictions.jsonl.gz", "metrics.json"),
    ("truthfulqa_mc", f"{CHAT}/mc_results.jsonl.gz", "mc_metrics.json"),
    ("truthfulqa_open", f"{CHAT}/open_results.jsonl.gz", "open_metrics.json"),
    ("alpaca_eval", "alpaca_farm/llama2-chat-7B/annotations.json.gz", "metrics.json"),
    ("humaneval", "codex_humaneval/codellama-7B-t0.8/predictions_results.jsonl.gz", "metrics.json"),
)


def run(*arguments: object):
    return CliRunner().invoke(app, ["grade", *map(str, arguments)])


def graded(*arguments: object) -> dict:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@needs_published
@pytest.mark.parametrize(("task", "file", "metrics"), RUNS)
def test_every_metric_of_a_published_run_comes_out_as_published(task, file, metrics):
    published = json.loads((PUBLISHED / file).with_name(metrics).read_text("utf-8"))
    published.pop("mode", None)
    found = graded(task, PUBLISHED / file, "--rule", "paper", "--json")
    assert {name: found["metrics"][name] for name in published} == pytest.approx(
        published, abs=1e-9
    )
    assert found["metric"] == found["metrics"][found["name"]]
    assert (found["num_missing"], found["num_unscored"], found["notes"]) == (0, 0, [])


@needs_published
def test_the_numbers_on_the_docs_page_are_those_of_the_published_runs_that_are_here():
    page = json.loads((Path(__file__).parents[2] / "docs" / "reproduction.json").read_text("utf-8"))
    for task, file, _ in RUNS:
        (row,) = [r for r in page if (r["task"], r["run"]) == (task, Path(file).parent.name)]
        for rule, value in row["rules"].items():
            assert graded(task, PUBLISHED / file, "--rule", rule)["metric"] == pytest.approx(value)


def test_both_rules_on_one_file(tmp_path):
    path = tmp_path / "p.jsonl"
    outputs = [("18", "so $18.00"), ("72", "7.2 Mb"), ("-3", "it was -3"), ("5", "5")]
    rows = [
        {"question": f"{i}", "answer": a, "model_output": o} for i, (a, o) in enumerate(outputs)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert graded("gsm8k", path)["metric"] == 3 / 4
    assert graded("gsm8k", path, "--rule", "numeric")["metric"] == 3 / 4
    assert graded("gsm8k", path, "--rule", "numeric")["num_missing"] == 1315


def test_stdout_is_json_alone_and_notes_go_to_stderr(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a", "answer": "1", "prediction": "1"}')
    result = run("gsm8k", path, "--json")
    assert json.loads(result.stdout)["metric"] == 1.0
    assert len(result.stdout.splitlines()) == 1
    assert "note: the rows cover 1 of the 1,319 items" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gsm", "x"), "did you mean gsm8k"),
        (("gsm8k", "nowhere.jsonl"), "nowhere.jsonl cannot be read: No such file"),
        (("gsm8k", "nowhere.jsonl", "--rule", "papers"), "must be paper or numeric"),
    ],
)
def test_a_mistake_is_said_with_exit_code_2(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_rows_that_nobody_decided_leave_no_metric(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"instruction": "a", "output_1": "x", "output_2": "y"}')
    found = graded("alpaca_eval", path)
    assert found["metric"] is None
    assert found["num_unscored"] == 1
