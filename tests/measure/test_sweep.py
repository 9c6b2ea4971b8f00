"""Sweeps: which point is picked, how it is tested, which work is shared, the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from proxytune.cli import app
from proxytune.data.passages import rows_of, task_rows
from proxytune.data.rows import read_rows
from proxytune.errors import InvalidRequest
from proxytune.measure.metrics import METRICS, Metric
from proxytune.measure.score import passage_of
from proxytune.measure.sweep import Grid, split, sweep_generations, sweep_likelihood
from proxytune.model import ProxyTuned
from proxytune.request import SamplingParams
from proxytune.tasks.gsm8k import Gsm8k
from proxytune.tasks.registry import TASKS
from proxytune.tasks.task import Item, asked
from proxytune.testing import toy_model, toy_recipe
from tests.support.toys import toy_load

TWO = {"first": 1.0, "second": 0.7}
TEXT = "the sea is a sea and a ship is a ship. a man at sea is a man. the end of it. " * 6


def passages(model, *texts):
    return [passage for text in texts for passage in model.text_passages(text, window=16)]


# Grids --------------------------------------------------------------------------------------------------


def test_one_list_of_strengths_is_for_all_experts_alike():
    assert Grid.of(("a", "b"), [0.5, 1]).points == ((0.5, 0.5), (1, 1))
    assert Grid.of(("a", "b"), [0.5, 1]).varied == [0]


def test_strengths_by_expert_are_combined_in_every_way():
    grid = Grid.of(("a", "b"), {"b": [0, 1], "a": [0.5]})
    assert grid.points == ((0.5, 0), (0.5, 1))
    assert grid.varied == [1]


def test_a_grid_without_points_or_for_other_experts_is_refused():
    with pytest.raises(InvalidRequest, match="0 points"):
        Grid.of(("a",), [])
    with pytest.raises(InvalidRequest, match=r"1,600 points"):
        Grid.of(("a", "b"), {"a": range(40), "b": range(40)})
    with pytest.raises(InvalidRequest, match=r"given for a, and the experts are a, b"):
        Grid.of(("a", "b"), {"a": [1.0]})
    with pytest.raises(InvalidRequest, match="nan"):
        Grid.of(("a",), [math.nan])


# Splitting ----------------------------------------------------------------------------------------------


def test_a_text_s_end_is_its_test_part_and_rows_are_drawn():
    assert split(range(10), 0.3, seed=0, in_order=True) == (list(range(7)), [7, 8, 9])
    valid, test = split(range(10), 0.3, seed=1, in_order=False)
    assert len(test) == 3
    assert sorted([*valid, *test]) == list(range(10))
    assert valid == sorted(valid)
    assert (valid, test) == split(range(10), 0.3, seed=1, in_order=False)


@pytest.mark.parametrize("share", [0, 1, -0.5, math.nan])
def test_a_share_that_leaves_a_part_empty_is_refused(share):
    with pytest.raises(InvalidRequest, match="test share"):
        split(range(4), share, seed=0, in_order=True)


# Likelihood ---------------------------------------------------------------------------------------------


def test_a_swept_perplexity_is_that_of_scoring():
    model = toy_model(experts=TWO, memory=0.5, eos_logit=-100.0)
    parts = passages(model, TEXT)
    grid = Grid.of(("first", "second"), {"first": [0.5, 1.0], "second": [0.0, 0.3]})
    report = sweep_likelihood(model.ensemble, grid, valid=parts, test=parts, own=(1.0, 0.7))
    scored = model.score(TEXT, [0.0, 1.0], experts="first", window=16)
    first = next(p for p in report.points if p.alphas == {"first": 1.0, "second": 0.0})
    assert first.value == pytest.approx(scored.row("steered", 1.0).perplexity, rel=1e-6)
    assert report.test["base"].value == pytest.approx(scored.row("base").perplexity, rel=1e-6)
    assert first.change == pytest.approx(scored.row("steered", 1.0).change, abs=1e-6)
    assert report.test["recipe"].alphas == TWO


def test_the_picked_point_is_best_on_the_validation_part_and_told_on_the_test_part():
    model = toy_model(memory=0.5, eos_logit=-100.0)
    valid, test = passages(model, TEXT[:200]), passages(model, TEXT[200:])
    grid = Grid.of(("first",), [-0.5, 0.1, 0.5])
    report = sweep_likelihood(model.ensemble, grid, valid=valid, test=test, own=(1.0,))
    assert report.best.value == min(point.value for point in report.points)
    alone = sweep_likelihood(
        model.ensemble,
        Grid.of(("first",), [report.best.alphas["first"]]),
        valid=test,
        test=test,
        own=(1.0,),
    )
    assert report.test["picked"] == alone.points[0]
    assert (report.num_valid, report.num_test) == (len(valid), len(test))


def test_every_model_reads_the_data_once_whatever_the_number_of_points(monkeypatch):
    model = toy_model(memory=0.5, eos_logit=-100.0)
    backend = model.ensemble.members[0].backend
    read = []
    plain = type(backend).extend

    def counted(self, state, token_ids):
        if self is backend:
            read.append(token_ids.shape[1])
        return plain(self, state, token_ids)

    monkeypatch.setattr(type(backend), "extend", counted)
    parts = passages(model, TEXT[:64])
    counts = []
    for num_points in (1, 9):
        read.clear()
        grid = Grid.of(("first",), [0.1 * n for n in range(1, num_points + 1)])
        sweep_likelihood(model.ensemble, grid, valid=parts, test=parts, own=(1.0,))
        counts.append(sum(read))
    assert counts[0] == counts[1] > 0


def test_a_best_strength_at_the_edge_of_the_grid_is_noted():
    """A base that the expert's gain favours more the stronger it is: the text is written by the expert."""
    model = toy_model(eos_logit=-100.0)
    written = model.generate(
        "a", SamplingParams(max_new_tokens=60, temperature=1.0, seed=0), alpha=2.0
    )
    parts = [
        passage_of(model.ensemble, written.token_ids[n : n + 1], written.token_ids[n + 1 : n + 12])
        for n in range(0, 48, 12)
    ]
    grid = Grid.of(("first",), [0.1, 0.2])
    report = sweep_likelihood(model.ensemble, grid, valid=parts, test=parts, own=(1.0,))
    assert report.picked == 1
    assert "edge of the grid" in report.notes[0]


def test_an_interval_holds_what_resampling_gives_for_units_that_are_alike():
    """Four windows of the same loss: every resample is the same, so the interval is a point."""
    model = toy_model(eos_logit=-100.0)
    parts = passages(model, "abab" * 4)[:1] * 4
    report = sweep_likelihood(
        model.ensemble, Grid.of(("first",), [1.0]), valid=parts, test=parts, own=(1.0,)
    )
    interval = report.points[0].interval
    np.testing.assert_allclose([interval.low, interval.high], report.points[0].value)


def test_a_single_unit_has_no_interval_and_no_unit_is_refused():
    model = toy_model()
    parts = passages(model, "abc")
    grid = Grid.of(("first",), [1.0])
    report = sweep_likelihood(model.ensemble, grid, valid=parts, test=parts, own=(1.0,))
    assert report.points[0].interval is None
    with pytest.raises(InvalidRequest, match=r"1 validation and 0 test"):
        sweep_likelihood(model.ensemble, grid, valid=parts, test=[], own=(1.0,))


# Generation ---------------------------------------------------------------------------------------------


def test_swept_texts_score_what_generated_ones_do():
    model = toy_model(memory=0.5, eos_logit=-100.0)
    sampling = SamplingParams(max_new_tokens=12)
    prompts = ["ab", "cd", "the sea", "no"]
    wanted = [model.generate(p, sampling, alpha=0.5).text for p in prompts]
    rows = rows_of(
        model,
        read_rows([{"prompt": p, "completion": w} for p, w in zip(prompts, wanted, strict=True)]),
    )
    grid = Grid.of(("first",), [0.25, 0.5, 1.0])
    report = sweep_generations(
        model.ensemble,
        grid,
        METRICS["exact_match"],
        valid=rows[:2],
        test=rows[2:],
        own=(1.0,),
        sampling=sampling,
    )
    assert report.best.alphas == {"first": 0.5}
    assert report.best.value == report.test["picked"].value == 1.0
    assert report.num_read < report.num_tokens


def test_any_metric_of_a_text_and_its_reference_can_be_swept():
    model = toy_model(memory=0.5, eos_logit=-100.0)
    rows = rows_of(model, read_rows([{"prompt": "a", "completion": "e"}] * 3))
    share = Metric("share", "share of e", False, lambda text, wanted: text.count(wanted) / 8)
    report = sweep_generations(
        model.ensemble,
        Grid.of(("first",), [1.0]),
        share,
        valid=rows,
        test=rows,
        own=(1.0,),
        sampling=SamplingParams(max_new_tokens=8),
    )
    text = model.generate("a", SamplingParams(max_new_tokens=8)).text
    assert report.points[0].value == pytest.approx(text.count("e") / 8)


def test_of_points_that_score_alike_the_weakest_is_picked():
    model = toy_model(eos_logit=-100.0)
    rows = rows_of(model, read_rows([{"prompt": "a", "completion": "never"}] * 2))
    report = sweep_generations(
        model.ensemble,
        Grid.of(("first",), [1.0, 0.5, -0.25]),
        METRICS["exact_match"],
        valid=rows,
        test=rows,
        own=(1.0,),
        sampling=SamplingParams(max_new_tokens=4),
    )
    assert report.best.alphas == {"first": -0.25}


# The command --------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(ProxyTuned, "load", toy_load)
    toy_recipe(TWO).write(tmp_path / "recipe")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "recipe"


def run(*arguments):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def test_the_command_prints_one_json_object(recipe, tmp_path):
    result = run(
        recipe, "--text-file", tmp_path / "text.txt", "--window", 16, "--expert", "first",
        "--alphas", "0.5,1", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [p["alphas"] for p in report["points"]] == [{"first": 0.5}, {"first": 1.0}]
    assert set(report["test"]) == {"base", "picked", "recipe"}
    assert report["test"]["recipe"]["alphas"] == {"first": 1.0}
    assert report["policy"] == "constant"


def test_the_command_shows_a_table_and_says_what_it_picked(recipe, tmp_path):
    result = run(
        recipe, "--text-file", tmp_path / "text.txt", "--window", 16, "--policy",
        '{"clip": 2}', "--combine", "union",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "validation, picked" in result.stdout
    assert "test, recipe" in result.stdout
    assert "picked first at alpha" in result.stderr


def test_the_command_generates_for_metrics_of_texts(recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "completion": "e"}) + "\n" for p in "abcdef"))
    result = run(
        recipe, "--data", rows, "--metric", "contains", "--alphas", "first=0,1", "--alphas",
        "second=0.5", "--max-new-tokens", 6, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["num_valid"] == report["num_test"] == 3
    assert report["num_read"] < report["num_tokens"]


class Letters(Gsm8k):
    """A benchmark that a toy can read: right is an answer with as many letters as the number says."""

    name = "letters"
    metric = "share_right"
    sampling = SamplingParams(max_new_tokens=9, stop=("e",))
    options: tuple[str, ...] = ()

    def items(self, data_dir):
        assert data_dir is not None
        names = (data_dir / "letters.txt").read_text().split()
        fields = [{"question": name, "answer": str(place)} for place, name in enumerate(names)]
        return [
            Item(name, asked(name, name), each, self.options)
            for name, each in zip(names, fields, strict=True)
        ]

    def score(self, row, place, rule):
        assert rule == "numeric"
        return float(len(row["model_output"]) == int(row["answer"]))


def test_a_benchmark_is_swept_in_its_own_settings(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "letters", Letters())
    (tmp_path / "letters.txt").write_text("ab cd ef gh ij kl mn op qr st")
    result = run(
        recipe, "--task", "letters", "--data-dir", tmp_path, "--expert", "first", "--alphas", "0.5,2",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["metric"], report["num_valid"], report["num_test"]) == ("share_right", 5, 5)

    model = toy_load(toy_recipe(TWO))
    rows, metric = task_rows(model, TASKS["letters"], tmp_path)
    right = [
        metric.score(
            model.generate(name, Letters.sampling, alpha=2.0, experts="first").text, row.reference
        )
        for name, row in zip(
            ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st"], rows, strict=True
        )
    ]
    valid, _ = split(right, 0.5, seed=0, in_order=False)
    assert report["points"][1]["value"] == sum(valid) / 5
    assert 0 < sum(right) < 10


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["--task", "lettres"], (), "letters"),
        (["--task", "humaneval"], (), "by their text alone"),
        (["--task", "letters"], ("a", "b"), "the likelihood of given answers"),
        (["--task", "letters", "--metric", "chrf"], (), "its own items and metric"),
        (["--text-file", "text.txt"], (), "--data-dir is for --task"),
        (["--task", "letters", "--max-new-tokens", "0"], (), "a whole number of at least 1"),
    ],
)
def test_a_benchmark_that_cannot_be_swept_is_refused(
    recipe, tmp_path, monkeypatch, arguments, options, message
):
    benchmark = Letters()
    benchmark.options = options
    monkeypatch.setitem(TASKS, "letters", benchmark)
    (tmp_path / "letters.txt").write_text("ab cd")
    result = run(recipe, *arguments, "--data-dir", tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of them is needed"),
        (["--text-file", "t", "--data", "d"], "one of them is needed"),
        (["--text-file", "missing.txt"], "missing.txt cannot be read"),
        (["--text-file", "t", "--metric", "bleu"], "must be one of perplexity"),
        (["--text-file", "t", "--metric", "chrf"], "plain text has none"),
        (["--text-file", "t", "--test-share", "1.5"], "between 0 and 1"),
        (["--text-file", "t", "--limit", "1"], "both parts"),
        (["--text-file", "t", "--alphas", "one"], "must be a number"),
        (["--text-file", "t", "--alphas", "1", "--alphas", "first=1"], "unclear which holds"),
        (["--text-file", "t", "--alphas", "frist=1"], "'first'"),
        (["--text-file", "t", "--alphas", "first=1", "--expert", "second"], "leave --expert out"),
        (["--text-file", "t", "--policy", "kl"], "must be one of constant"),
        (["--text-file", "t", "--policy", "{"], "not JSON"),
        (["--text-file", "t", "--combine", "sums"], "'sum'"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_exit_code_2(recipe, arguments, message):
    result = run(recipe, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
