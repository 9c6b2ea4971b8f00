"""An expert and a calibrated anti-expert, trained together: what each learns, resume, what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from proxytune.errors import InvalidRequest
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.request import SamplingParams
from proxytune.tune import Interrupted, TuneResult, TuneSettings, tune
from proxytune.tune.calibrated import few_tokens
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.tune.test_run import (
    Listening,
    StopAt,
    completions,
    preferences,
    read_log,
    settings,
    texts,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a `base` and a `small` model of one vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "base", seed=1, hidden_size=24, num_layers=3)
    tiny_model(folder / "small", seed=2)
    return folder


def pair(models: Path, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> TuneSettings:
    folder.mkdir(exist_ok=True)
    return settings(models, folder, rows, **{"method": "sft", **changes})


def weights(run: TuneSettings, name: str = "out") -> dict[str, torch.Tensor]:
    return load_file(run.directory / "adapters" / name / "adapter_model.safetensors")


def steered_nats(result: TuneResult, alpha: float) -> float:
    assert result.valid is not None
    (row,) = [r for r in result.valid["rows"] if (r["name"], r["alpha"]) == ("steered", alpha)]
    return float(row["nats"])


def test_sft_with_a_base_calibrates_the_anti_expert(models: Path, tmp_path: Path) -> None:
    run = pair(models, tmp_path, texts())
    result = tune(run)
    assert result.is_calibrated
    expert = Recipe.read(run.directory).experts[0]
    assert expert.expert.adapter == "adapters/out"
    assert expert.anti_expert.adapter == "adapters/out-anti-expert"
    files = {path.name for path in (run.directory / "adapters" / "out-anti-expert").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    divergences = [row["divergence"] for row in read_log(run) if "divergence" in row]
    assert divergences[-1] < divergences[0], "the anti-expert has not come closer to the base"
    assert result.first_valid_loss is not None and result.valid_loss is not None
    assert result.valid_loss < result.first_valid_loss
    short = SamplingParams(max_new_tokens=4)
    assert ProxyTuned.load(run.directory).generate("the", short, alpha=1.0).steps


def test_the_validation_loss_is_that_of_the_steered_base(models: Path, tmp_path: Path) -> None:
    run = pair(models, tmp_path, completions(), alpha=0.7)
    result = tune(run)
    assert steered_nats(result, 0.7) == pytest.approx(result.valid_loss, abs=1e-4)
    # Before training expert and anti-expert are equal, so that the base is unchanged.
    assert result.valid is not None
    (base,) = [row["nats"] for row in result.valid["rows"] if row["name"] == "base"]
    assert result.first_valid_loss == pytest.approx(base, abs=1e-4)


def test_the_expert_of_a_pair_is_the_one_that_training_alone_gives(
    models: Path, tmp_path: Path
) -> None:
    """Same start, batches, dropout, clipping and schedule; without validation the last state is kept."""
    changes: dict[str, Any] = {"valid_share": 0.0, "measure_tokens": 0, "accumulate": 2}
    together = pair(models, tmp_path / "a", completions(32), **changes)
    alone = pair(models, tmp_path / "b", completions(32), calibrate=False, **changes)
    assert tune(together).is_calibrated and not tune(alone).is_calibrated
    assert Recipe.read(alone.directory).experts[0].anti_expert.adapter is None
    own, expected = weights(together), weights(alone)
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
    other = weights(together, "out-anti-expert")
    assert any(not torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("then_cpt", [False, True], ids=["pair", "then cpt"])
def test_a_stopped_pair_goes_on_to_the_result_of_a_whole_one(
    then_cpt: bool, models: Path, tmp_path: Path
) -> None:
    rows = texts(60)
    changes: dict[str, Any] = {"then_cpt": then_cpt, "measure_tokens": 0}
    whole, parts = (pair(models, tmp_path / name, rows, **changes) for name in ("whole", "parts"))
    expected = tune(whole)
    assert (expected.num_steps == 12) == then_cpt
    with pytest.raises(Interrupted, match="step 3"):
        tune(parts, display=StopAt(3))
    if then_cpt:
        with pytest.raises(Interrupted, match="step 8"):
            tune(parts, resume=True, display=StopAt(8))
        assert not (parts.directory / "adapters" / "out").exists()
        with pytest.raises(Interrupted, match="step 2"):
            tune(parts, resume=True, display=StopAt(2))
    result = tune(parts, resume=True)
    assert (result.valid_loss, result.num_steps) == (expected.valid_loss, expected.num_steps)
    for name in ("out", "out-anti-expert"):
        own, other = weights(whole, name), weights(parts, name)
        assert all(torch.equal(own[key], other[key]) for key in own)
    kept = {path.name for path in parts.training.iterdir()}
    more = {"log-cpt.jsonl", "pair"} if then_cpt else set()
    assert kept == {"settings.json", "loss.png", "result.json", "log.jsonl"} | more


def test_a_run_stopped_at_its_last_step_is_not_trained_again(models: Path, tmp_path: Path) -> None:
    """It used to run one step more after a resume."""
    run = pair(models, tmp_path, completions(), measure_tokens=0, calibrate=False)
    with pytest.raises(Interrupted, match="step 8"):
        tune(run, display=StopAt(8))
    assert tune(run, resume=True).num_steps == 8


def test_cpt_after_a_pair_goes_on_from_it_with_its_anti_expert(
    models: Path, tmp_path: Path
) -> None:
    run = pair(models, tmp_path, completions(60), then_cpt=True, alpha=1.0, max_steps=20)
    result = tune(run)
    first = [row["valid_loss"] for row in read_log(run) if "valid_loss" in row]
    lines = (run.training / "log-cpt.jsonl").read_text().splitlines()
    second = [row for row in map(json.loads, lines) if "valid_loss" in row]
    assert second[0]["valid_loss"] == pytest.approx(min(first), abs=1e-5)
    assert result.valid_loss == pytest.approx(min(row["valid_loss"] for row in second))
    assert result.valid_loss < min(first)
    assert steered_nats(result, 1.0) == pytest.approx(result.valid_loss, abs=1e-4)


def test_a_pair_that_cpt_makes_worse_is_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxytune.tune import stages

    monkeypatch.setattr(stages, "CPT_RATE", 300.0)
    run = pair(models, tmp_path, completions(60), then_cpt=True, alpha=1.0)
    result = tune(run)
    assert result.valid_loss == min(r["valid_loss"] for r in read_log(run) if "valid_loss" in r)
    assert steered_nats(result, 1.0) == pytest.approx(result.valid_loss, abs=1e-4)


def test_gradient_checkpointing_changes_no_number_of_a_pair(models: Path, tmp_path: Path) -> None:
    """What is computed again must be computed with the adapter that it was computed with."""
    losses = []
    for on in (False, True):
        run = pair(models, tmp_path / str(on), texts(), gradient_checkpointing=on, measure_tokens=0)
        losses.append(tune(run).valid_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_permuted_vocabulary_is_calibrated_like_an_equal_one(
    models: Path, tmp_path: Path
) -> None:
    shuffled = tiny_model(tmp_path / "shuffled", seed=2, tokenizer=tiny_tokenizer(shuffle_seed=5))
    result = tune(pair(models, tmp_path, completions(), anti_expert=str(shuffled), alpha=1.0))
    assert steered_nats(result, 1.0) == pytest.approx(result.valid_loss, abs=1e-4)


def test_a_calibrated_anti_expert_is_used_again(models: Path, tmp_path: Path) -> None:
    first = pair(models, tmp_path / "a", completions(32), valid_share=0.0, measure_tokens=0)
    tune(first)
    adapter = first.directory / "adapters" / "out-anti-expert"
    given = weights(first, "out-anti-expert")
    # A recipe, and an adapter by itself.
    for index, name in enumerate((first.output, str(adapter))):
        changes = {"valid_share": 0.0, "measure_tokens": 0} if index == 0 else {"alpha": 0.8}
        run = pair(models, tmp_path / f"b{index}", completions(32), calibrated=name, **changes)
        result = tune(run)
        assert result.is_calibrated
        assert Recipe.read(run.directory).experts[0].anti_expert.adapter == str(adapter)
        assert not (run.directory / "adapters" / "out-anti-expert").exists()
        if index == 0:
            own, again = weights(first), weights(run)
            assert all(torch.equal(own[key], again[key]) for key in own)
        else:
            assert steered_nats(result, 0.8) == pytest.approx(result.valid_loss, abs=1e-4)
    after = weights(first, "out-anti-expert")
    assert all(torch.equal(given[key], after[key]) for key in given)


def test_preferences_are_learned_from_a_calibrated_start(models: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"method": "dpo", "calibrate": True, "measure_tokens": 0}
    run = pair(models, tmp_path / "a", preferences(40), **changes)
    result = tune(run)
    assert result.is_calibrated and result.num_steps == 16
    expert = Recipe.read(run.directory).experts[0]
    assert expert.anti_expert.adapter == "adapters/out-anti-expert"
    # The expert starts as its own reference, which is the anti-expert.
    assert result.first_valid_loss == pytest.approx(math.log(2), abs=1e-5)
    assert result.valid_loss is not None and result.valid_loss < result.first_valid_loss
    lines = (run.training / "log-anti-expert.jsonl").read_text().splitlines()
    losses = [row["valid_loss"] for row in map(json.loads, lines) if "valid_loss" in row]
    assert min(losses) < losses[0], "the anti-expert has not come closer to the base"
    own, anti_expert = weights(run), weights(run, "out-anti-expert")
    start = {name: tensor for name, tensor in own.items() if "lora_B" in name}
    # Much nearer to the anti-expert than to zero, where an untuned start would be.
    assert all((t - anti_expert[n]).norm() < t.norm() for n, t in start.items())

    parts = pair(models, tmp_path / "b", preferences(40), **changes)
    # In the first training, and in the second.
    with pytest.raises(Interrupted, match="step 3"):
        tune(parts, display=StopAt(3))
    with pytest.raises(Interrupted, match="step 2"):
        tune(parts, resume=True, display=StopAt(2))
    again = tune(parts, resume=True)
    assert again.valid_loss == pytest.approx(result.valid_loss, abs=1e-6)


def test_preferences_start_from_a_given_anti_expert_of_another_rank(
    models: Path, tmp_path: Path
) -> None:
    first = pair(models, tmp_path / "a", completions(), lora_rank=2, measure_tokens=0)
    tune(first)
    run = pair(
        models, tmp_path / "b", preferences(), method="dpo", calibrated=str(first.directory),
        lora_rank=TuneSettings.lora_rank, measure_tokens=0,
    )  # fmt: skip
    result = tune(run)
    assert result.first_valid_loss == pytest.approx(math.log(2), abs=1e-5)
    own, start = weights(run), weights(first, "out-anti-expert")
    assert {name: t.shape for name, t in own.items()} == {n: t.shape for n, t in start.items()}
    for changes, said in (
        ({"lora_rank": 4}, "leave lora_rank or calibrated out"),
        ({"start_from": str(first.directory / "adapters" / "out")}, "leave one of the two out"),
    ):
        other = replace(run, output=str(tmp_path / "c"), **changes)
        with pytest.raises(InvalidRequest, match=said):
            tune(other)


def test_a_calibrated_pair_is_trained_to_the_end_by_default(models: Path, tmp_path: Path) -> None:
    """Both get worse from the start; only the expert by itself ends after three evaluations."""
    changes: dict[str, Any] = {
        "learning_rate": 3.0, "patience": None, "eval_every": 1, "measure_tokens": 0,
    }  # fmt: skip
    rows = completions()
    assert tune(pair(models, tmp_path / "a", rows, **changes)).num_steps == 8
    assert tune(pair(models, tmp_path / "b", rows, **changes | {"patience": 2})).num_steps < 8
    assert tune(pair(models, tmp_path / "c", rows, **changes, calibrate=False)).num_steps < 8


def test_asking_to_calibrate_chooses_sft(models: Path, tmp_path: Path) -> None:
    run = pair(models, tmp_path, completions(), method=None, calibrate=True, measure_tokens=0)
    result = tune(run)
    assert (result.method, result.is_calibrated) == ("sft", True)


def test_too_few_tokens_to_calibrate_on_are_counted_in_a_message(
    models: Path, tmp_path: Path
) -> None:
    display = Listening()
    result = tune(pair(models, tmp_path, completions(), measure_tokens=0), display=display)
    count = result.data["train"]["num_trained"]
    (said,) = [line for line in display.said if "an anti-expert needs about 2,000" in line]
    assert said.startswith(f"the rows have {count:,} tokens to train on")
    assert few_tokens(2_000) is None


def test_a_pair_that_is_never_better_than_the_base_reports_the_loss_of_what_it_kept(
    models: Path, tmp_path: Path
) -> None:
    """The loss before the first step used to be reported as the lowest, of which nothing is kept."""
    run = pair(models, tmp_path, completions(), learning_rate=3.0, alpha=1.0)
    result = tune(run)
    assert result.valid_loss is not None and result.first_valid_loss is not None
    assert result.valid_loss > result.first_valid_loss
    assert steered_nats(result, 1.0) == pytest.approx(result.valid_loss, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibrate": True, "base": None}, "--anti-expert and --base"),
        ({"calibrate": True, "anti_expert": None}, "--anti-expert and --base"),
        ({"then_cpt": True, "calibrate": False}, "leave --no-calibrate out"),
        ({"calibrate": True, "method": "cpt"}, "--then-cpt"),
        ({"then_cpt": True, "cpt_form": "paper"}, "by the steered loss"),
        ({"calibrate": True, "full": True}, "leave --full out"),
        ({"calibrate": True, "method": "grpo", "reward": "exact"}, "method grpo"),
        (
            {"calibrate": True, "template": "plain", "base_template": "Q: {{ prompt }}"},
            "--no-calibrate",
        ),
        ({"calibrated": "models"}, "no recipe|no directory"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_by_name(
    changes: dict[str, Any], message: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        tune(pair(models, tmp_path, completions(), **changes))
    assert caught.type.__module__ == InvalidRequest.__module__
    assert not (tmp_path / "out").exists(), "a refused run leaves nothing behind"


def test_where_base_and_small_model_read_different_tokens_nothing_is_calibrated(
    models: Path, tmp_path: Path
) -> None:
    other = {"template": "plain", "base_template": "Q: {{ prompt }}", "measure_tokens": 0}
    result = tune(pair(models, tmp_path, completions(), max_steps=1, **other))
    assert not result.is_calibrated
