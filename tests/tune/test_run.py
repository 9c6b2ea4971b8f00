"""A tuning run from rows to a recipe: methods, resume, what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainerControl, TrainerState
from typer.testing import CliRunner

from proxytune.errors import (
    AdapterMismatch,
    BackendError,
    InputFileError,
    InvalidRequest,
    OutputFileError,
)
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.request import Request, SamplingParams
from proxytune.tune import Display, Interrupted, TuneResult, TuneSettings, tune
from proxytune.tune.card import last_word
from proxytune.tune.trainer import LossLog
from tests.support.tiny import MERGES, tiny_model, tiny_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
WORDS = ["the", "an", "a", "tin", "thin", "rather", "tea", "in", "eat", "ran"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a `base` and a `small` model of one vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "base", seed=1, hidden_size=24, num_layers=3)
    tiny_model(folder / "small", seed=2)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sentence(seed: int, length: int = 8) -> str:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
    return " ".join(WORDS[i] for i in picks)


def texts(count: int = 24) -> list[dict[str, Any]]:
    return [{"text": sentence(i)} for i in range(count)]


def completions(count: int = 24) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Q: {sentence(i, 3)}\nA:", "completion": f" {sentence(i, 3)}"}
        for i in range(count)
    ]


def messages(count: int = 24) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(i, 2)},
                {"role": "assistant", "content": sentence(i, 3)},
            ]
        }
        for i in range(count)
    ]


def preferences(count: int = 24) -> list[dict[str, Any]]:
    return [
        {"prompt": sentence(i, 2), "chosen": " the tin", "rejected": " rather"}
        for i in range(count)
    ]


def settings(
    models: Path, folder: Path, rows: list[dict[str, Any]], **changes: Any
) -> TuneSettings:
    data = write_rows(folder / "rows.jsonl", rows)
    own: dict[str, Any] = {
        "output": str(folder / "out"),
        "data": data,
        "anti_expert": str(models / "small"),
        "base": str(models / "base"),
        "max_length": 64,
        "batch_size": 4,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "valid_share": 0.25,
        "patience": 0,
        "max_steps": 8,
        "eval_every": 2,
    }
    return TuneSettings(**own | changes)


def read_log(run: TuneSettings) -> list[dict[str, Any]]:
    lines = (run.training / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# What comes out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("sft", texts()),
        ("sft", completions()),
        ("sft", messages()),
        ("cpt", texts()),
        ("cpt", completions()),
        ("dpo", preferences()),
    ],
    ids=["sft text", "sft completion", "sft messages", "cpt text", "cpt completion", "dpo"],
)
def test_each_method_and_format_ends_with_a_recipe_that_generates(
    method: str, rows: list[dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    run = settings(models, tmp_path, rows, method=method)
    result = tune(run)
    assert result.valid_loss is not None and result.first_valid_loss is not None
    assert result.valid_loss < result.first_valid_loss, "training taught nothing"
    assert result.num_steps == 8
    recipe = Recipe.read(run.directory)
    assert [e.name for e in recipe.experts] == ["out"]
    assert recipe.experts[0].alpha == result.alpha
    model = ProxyTuned.load(run.directory)
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    prompt = "the"
    base = model.generate(prompt, sampling, alpha=0.0)
    steered = model.generate(prompt, sampling, alpha=4.0)
    assert base.token_ids != steered.token_ids, "the expert changes nothing"
    kept = {path.name for path in run.training.iterdir()}
    assert kept == {"settings.json", "log.jsonl", "loss.png", "result.json"}
    expert = {path.name for path in (run.directory / "adapters" / "out").iterdir()}
    assert expert == {"adapter_config.json", "adapter_model.safetensors"}
    card = (run.directory / "README.md").read_text()
    assert "## Training" in card and "rows.jsonl" in card and f"{result.valid_loss:.4f}" in card


def test_the_strength_is_the_best_one_on_the_validation_rows(models: Path, tmp_path: Path) -> None:
    result = tune(settings(models, tmp_path, texts()))
    assert result.valid is not None
    steered = [row for row in result.valid["rows"] if row["name"] == "steered"]
    best = min(steered, key=lambda row: row["nats"])
    assert len(steered) == 15 and result.alpha == best["alpha"]


def test_a_given_strength_is_kept(models: Path, tmp_path: Path) -> None:
    result = tune(settings(models, tmp_path, texts(), alpha=0.35))
    assert result.alpha == 0.35
    assert Recipe.read(tmp_path / "out").experts[0].alpha == 0.35


def test_nothing_is_measured_where_that_is_not_wanted(models: Path, tmp_path: Path) -> None:
    result = tune(settings(models, tmp_path, texts(), measure_tokens=0))
    assert result.valid is None and result.alpha == 1.0


def test_full_weights_make_a_model_of_their_own(models: Path, tmp_path: Path) -> None:
    run = settings(models, tmp_path, texts(), full=True, method="cpt")
    result = tune(run)
    spec = Recipe.read(run.directory).experts[0].expert
    assert spec.model == "expert" and spec.adapter is None
    assert result.valid_loss is not None and result.first_valid_loss is not None
    assert result.valid_loss < result.first_valid_loss
    assert ProxyTuned.load(run.directory).generate("the", SamplingParams(max_new_tokens=2)).text


def test_without_an_anti_expert_the_base_itself_is_tuned(models: Path, tmp_path: Path) -> None:
    run = settings(models, tmp_path, texts(), anti_expert=None)
    result = tune(run)
    recipe = Recipe.read(run.directory)
    assert recipe.experts[0].anti_expert.same_as == "base"
    assert recipe.experts[0].expert.model == recipe.base.model
    assert result.valid is not None and result.alpha == 1.0
    rows = {(row["name"], row["alpha"]): row["nats"] for row in result.valid["rows"]}
    assert rows["steered", 1.0] == pytest.approx(rows["out.expert", None], abs=1e-5)
    assert rows["steered", 1.0] < rows["base", None]


def test_without_a_base_the_recipe_is_the_tuned_small_model(models: Path, tmp_path: Path) -> None:
    run = settings(models, tmp_path, completions(), base=None)
    tune(run)
    model = ProxyTuned.load(run.directory)
    trace = model.generate("Q: tea\nA:", SamplingParams(max_new_tokens=3), explain=True)
    assert trace.steps, "nothing was generated"
    assert Recipe.read(run.directory).base.model == str(models / "small")


def test_test_rows_are_measured_at_the_chosen_strength(models: Path, tmp_path: Path) -> None:
    test_data = write_rows(tmp_path / "test.jsonl", texts(40)[24:])
    result = tune(settings(models, tmp_path, texts(), test_data=test_data))
    assert result.test is not None
    assert {row["alpha"] for row in result.test["rows"]} == {None, 1.0, result.alpha}
    assert "## Measured on test rows" in (tmp_path / "out" / "README.md").read_text()


def test_cpt_lowers_the_loss_of_the_ensemble_more_than_sft_does(
    models: Path, tmp_path: Path
) -> None:
    losses = {}
    for method in ("sft", "cpt"):
        folder = tmp_path / method
        folder.mkdir()
        alone = {"max_steps": 30, "alpha": 1.0, "calibrate": None if method == "cpt" else False}
        result = tune(settings(models, folder, texts(), method=method, **alone))
        assert result.valid is not None
        losses[method] = result.valid["rows"][-1]["nats"]
    assert losses["cpt"] < losses["sft"]


def test_the_validation_loss_of_cpt_is_what_scoring_measures(models: Path, tmp_path: Path) -> None:
    run = settings(models, tmp_path, completions(), method="cpt", alpha=0.7)
    result = tune(run)
    assert result.valid is not None
    steered = next(row for row in result.valid["rows"] if row["name"] == "steered")
    assert steered["alpha"] == 0.7
    assert steered["nats"] == pytest.approx(result.valid_loss, abs=1e-4)


def test_the_two_forms_of_cpt_agree_at_strength_one_and_differ_elsewhere(
    models: Path, tmp_path: Path
) -> None:
    losses = {}
    for form in ("steered", "paper"):
        for alpha in (1.0, 0.5):
            folder = tmp_path / f"{form}{alpha}"
            folder.mkdir()
            run = settings(models, folder, texts(), method="cpt", cpt_form=form, alpha=alpha)
            losses[form, alpha] = tune(run).valid_loss
    assert losses["steered", 1.0] == pytest.approx(losses["paper", 1.0], abs=1e-6)
    assert losses["steered", 0.5] != pytest.approx(losses["paper", 0.5], abs=1e-4)


def test_runs_on_other_rows_leave_each_others_offsets_alone(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed draws other rows, and used to replace the files of a run that was still going on."""
    changes: dict[str, Any] = {
        "method": "cpt", "offsets_dir": str(tmp_path / "offsets"), "max_tokens": 300, "measure_tokens": 0,
    }  # fmt: skip
    results = {
        seed: tune(
            settings(models, tmp_path, texts(), **changes, seed=seed, output=f"{tmp_path}/{seed}")
        )
        for seed in (0, 1)
    }
    from proxytune.tune.offsets import Offsets

    monkeypatch.setattr(Offsets, "build", lambda *a, **k: pytest.fail("the base ran again"))
    again = tune(settings(models, tmp_path, texts(), **changes, output=f"{tmp_path}/again"))
    assert again.valid_loss == results[0].valid_loss


def test_offsets_are_used_again_by_another_run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets = str(tmp_path / "offsets")
    first = tune(settings(models, tmp_path, texts(), method="cpt", offsets_dir=offsets))
    second_run = settings(
        models, tmp_path, texts(), method="cpt", offsets_dir=offsets, output=str(tmp_path / "two")
    )
    from proxytune.tune.offsets import Offsets

    monkeypatch.setattr(Offsets, "build", lambda *a, **k: pytest.fail("the base ran again"))
    assert tune(second_run).valid_loss == pytest.approx(first.valid_loss, abs=1e-6)


def test_a_limit_on_tokens_takes_a_sample_of_the_rows(models: Path, tmp_path: Path) -> None:
    result = tune(settings(models, tmp_path, completions(), max_tokens=200))
    assert 100 < result.data["train"]["num_tokens"] <= 200


def test_gradient_accumulation_gives_the_same_training(models: Path, tmp_path: Path) -> None:
    losses = []
    for folder, sizes in (("a", (8, 1)), ("b", (2, 4))):
        (tmp_path / folder).mkdir()
        run = settings(
            models, tmp_path / folder, completions(32), lora_dropout=0.0,
            batch_size=sizes[0], accumulate=sizes[1], max_steps=4,
        )  # fmt: skip
        losses.append(tune(run).valid_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_gradient_checkpointing_changes_no_number(models: Path, tmp_path: Path) -> None:
    losses = []
    for folder, on in (("a", False), ("b", True)):
        (tmp_path / folder).mkdir()
        run = settings(models, tmp_path / folder, texts(), gradient_checkpointing=on)
        losses.append(tune(run).valid_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# Stopping and going on -----------------------------------------------------------------------------


class StopAt(Display):
    """Presses Ctrl-C when a step is done."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stage(self, name: str, done: float, total: float, **numbers: float | None) -> None:
        if name == "training" and done == self._step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("method", "rows"),
    [("sft", completions(40)), ("cpt", texts(60)), ("dpo", preferences(40))],
    ids=["sft", "cpt", "dpo"],
)
def test_a_stopped_run_goes_on_to_the_result_of_a_whole_one(
    method: str, rows: list[dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    whole_dir, parts_dir = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole_dir, parts_dir):
        folder.mkdir()
    whole = settings(models, whole_dir, rows, method=method)
    parts = settings(models, parts_dir, rows, method=method)
    expected = tune(whole)
    with pytest.raises(Interrupted, match="step 3"):
        tune(parts, display=StopAt(3))
    assert (parts.training / "checkpoints" / "checkpoint-3").is_dir()
    result = tune(parts, resume=True)
    assert result.valid_loss == pytest.approx(expected.valid_loss, abs=1e-6)
    assert result.num_steps == expected.num_steps
    by_step = {
        run: {row["step"]: row["valid_loss"] for row in read_log(run) if "valid_loss" in row}
        for run in (whole, parts)
    }
    assert by_step[parts] == pytest.approx(by_step[whole], abs=1e-6)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_result_of_a_whole_one(models: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", completions(60))

    def command(output: str, *more: str) -> list[str]:
        return [
            sys.executable, "-c", "from proxytune.cli import main; main()", "tune",
            "--anti-expert", str(models / "small"),
            "--data", rows, "--output", str(tmp_path / output), "--max-steps", "60",
            "--eval-every", "3", "--batch-size", "4", "--lora-rank", "4", "--patience", "0",
            "--learning-rate", "0.01", "--max-length", "64", "--json", *more,
        ]  # fmt: skip

    whole = subprocess.run(command("whole"), capture_output=True, text=True, check=True)
    killed = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    marker = tmp_path / "killed" / "training" / "checkpoints" / "checkpoint-9" / "whole"
    deadline = time.monotonic() + 120
    while not marker.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert killed.poll() is None, "the run ended before it could be killed"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    if killed.stderr is not None:
        killed.stderr.close()
    resumed = subprocess.run(
        command("killed", "--resume"), capture_output=True, text=True, check=True
    )
    losses = [json.loads(answer.stdout)["valid_loss"] for answer in (whole, resumed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_training_ends_early_when_the_validation_loss_rises(models: Path, tmp_path: Path) -> None:
    run = settings(
        models, tmp_path, texts(), learning_rate=0.3, patience=2, max_steps=200, eval_every=2
    )
    result = tune(run)
    losses = [row["valid_loss"] for row in read_log(run) if "valid_loss" in row]
    assert result.num_steps < 200
    assert min(losses[-2:]) >= min(losses[:-2])
    assert result.valid_loss == min(losses)


def test_a_finished_run_is_not_run_again(models: Path, tmp_path: Path) -> None:
    run = settings(models, tmp_path, texts())
    result = tune(run)
    assert tune(run, resume=True) == TuneResult(**json.loads(json.dumps(result.to_dict())))


def test_a_directory_with_another_run_is_refused(models: Path, tmp_path: Path) -> None:
    run = settings(models, tmp_path, texts())
    tune(run)
    with pytest.raises(OutputFileError, match="holds another run"):
        tune(run)


def test_a_directory_with_other_files_is_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("keep me")
    with pytest.raises(OutputFileError, match="not a tuning run"):
        tune(settings(models, tmp_path, texts()))


def test_resuming_with_other_settings_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        tune(settings(models, tmp_path, texts()), display=StopAt(2))
    with pytest.raises(OutputFileError, match="learning_rate"):
        tune(settings(models, tmp_path, texts(), learning_rate=1e-3), resume=True)


def test_resuming_with_other_rows_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        tune(settings(models, tmp_path, texts()), display=StopAt(2))
    with pytest.raises(OutputFileError, match="other data"):
        tune(settings(models, tmp_path, texts(25)), resume=True)


def test_resuming_where_nothing_was_begun_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputFileError, match="no run to resume"):
        tune(settings(models, tmp_path, texts()), resume=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(models, tmp_path, completions(40))
    expected_dir = tmp_path / "expected"
    expected_dir.mkdir()
    expected = tune(settings(models, expected_dir, completions(40)))
    save = torch.save

    def fail(content: Any, place: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(place):
            Path(place).write_bytes(b"half of a file")
            raise OSError(28, "No space left on device")
        save(content, place, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OutputFileError, match=r"(?s)checkpoint of step 4.*that of step 2 is whole"):
        tune(run)
    monkeypatch.setattr(torch, "save", save)
    checkpoints = run.training / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    assert tune(run, resume=True).valid_loss == pytest.approx(expected.valid_loss, abs=1e-6)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_row_of_losses_that_the_disk_does_not_take_is_a_message_with_a_hint() -> None:
    log = LossLog(Path("/dev/full"), on_row=print, on_step=print)
    with pytest.raises(OutputFileError, match=r"No space left(.|\n)*hint: .*--resume"):
        log.on_log(None, TrainerState(global_step=1), TrainerControl(), {"loss": 0.5})


def test_an_expert_that_the_disk_does_not_take_is_a_message_with_a_hint(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors has a class of its own for a full disk, which used to be a traceback."""

    save = PeftModel.save_pretrained

    def fail(self: PeftModel, place: Any, *args: Any, **kwargs: Any) -> None:
        if "adapters" in str(place):
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        save(self, place, *args, **kwargs)

    monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    run = settings(models, tmp_path, completions(10))
    with pytest.raises(OutputFileError, match=r"adapters.* cannot be written(.|\n)*--resume"):
        tune(run)


def test_a_checkpoint_that_was_cut_off_is_not_used(models: Path, tmp_path: Path) -> None:
    run = settings(models, tmp_path, completions(40))
    with pytest.raises(Interrupted):
        tune(run, display=StopAt(3))
    torn = run.training / "checkpoints" / "checkpoint-5"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    assert tune(run, resume=True).num_steps == 8
    assert not torn.exists()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxytune.tune import trainer

    calls = 0

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        total = real(*args, **kwargs)
        calls += torch.is_grad_enabled()
        return total * float("nan") if calls == 6 else total

    real = trainer.cross_entropy
    monkeypatch.setattr(trainer, "cross_entropy", poisoned)
    run = settings(models, tmp_path, completions(40))
    with pytest.raises(BackendError, match=r"loss of step 6 is nan.*state after step 4"):
        tune(run)
    from safetensors.torch import load_file

    kept = run.training / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept).values())


# Templates, methods, and the last word -------------------------------------------------------------


class Listening(Display):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def questions(count: int = 24) -> list[dict[str, Any]]:
    return [{"prompt": sentence(i, 3), "completion": sentence(i, 3)} for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "changes", "method"),
    [
        (texts(), {}, "cpt"),
        (questions(), {}, "cpt"),
        (messages(), {}, "cpt"),
        (questions(), {"base": None}, "sft"),
        (questions(), {"anti_expert": None}, "sft"),
        (questions(), {"template": "plain", "base_template": "chat"}, "sft"),
        (preferences(), {}, "dpo"),
    ],
)
def test_the_method_is_cpt_where_it_can_be(
    rows: list[dict[str, Any]],
    changes: dict[str, Any],
    method: str,
    models: Path,
    tmp_path: Path,
) -> None:
    run = settings(models, tmp_path, rows, measure_tokens=0, max_steps=1, **changes)
    assert tune(run).method == method


def test_cpt_is_refused_where_base_and_expert_would_read_different_chats(
    models: Path, tmp_path: Path
) -> None:
    """`chat` stood for the small model's template in training, and for the base's own afterwards."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    other = tiny_model(tmp_path / "other", tokenizer=tokenizer)
    chats = {"template": "chat", "base_template": "chat", "base": str(other)}
    with pytest.raises(InvalidRequest, match="--base-template"):
        tune(settings(models, tmp_path, questions(), method="cpt", **chats))


def test_generation_sends_what_was_trained(models: Path, tmp_path: Path) -> None:
    run = settings(models, tmp_path, questions(), template="Q: {{ prompt }}\nA:", max_steps=1)
    result = tune(run)
    assert result.template == result.base_template == run.template
    model = ProxyTuned.load(run.directory)
    tokenizer = model.tokenizer
    short = SamplingParams(max_new_tokens=2)
    text = model.job(Request("tea", short)).prompts
    message = model.job(Request([{"role": "user", "content": "tea"}], short)).prompts
    assert {tokenizer.decode(ids) for ids in (*text, *message)} == {"Q: tea\nA:"}
    passage = model.completion_passages([("tea", "rather")])[0]
    assert tokenizer.decode(passage.token_ids) == f" rather{tokenizer.eos_token}"


def test_the_last_word_comes_from_rows_that_nothing_was_chosen_on(
    models: Path, tmp_path: Path
) -> None:
    run = settings(models, tmp_path, questions(60), valid_share=0.1)
    result = tune(run)
    assert {name: part["rows"] for name, part in result.data.items()} == {
        "train": 48,
        "valid": 6,
        "test": 6,
    }
    verdict = result.verdict
    assert verdict is not None and result.test is not None
    assert verdict["rows"] == "test" and verdict["num_rows"] == 6
    assert verdict["answers"]["measure"] == "chrf" and verdict["answers"]["num_answers"] == 6
    assert len(verdict["samples"]) == 2
    assert verdict["word"] in ("helps", "helps wording only", "does not help")
    card = (run.directory / "README.md").read_text()
    assert f"## Steering {verdict['word']}" in card
    stored = json.loads((run.training / "result.json").read_text())
    assert stored["verdict"] == json.loads(json.dumps(verdict))


def test_too_few_rows_are_not_held_back_and_the_run_says_so(models: Path, tmp_path: Path) -> None:
    display = Listening()
    result = tune(settings(models, tmp_path, questions(24), max_steps=2), display=display)
    assert any(line.startswith("there are too few rows (24)") for line in display.said)
    assert "test" not in result.data
    assert result.verdict is not None and result.verdict["rows"] == "valid"
    assert "new rows may look worse" in result.verdict["reason"]


def test_a_single_text_is_cut_in_three(models: Path, tmp_path: Path) -> None:
    text = "\n".join(sentence(i, 20) for i in range(300))
    result = tune(settings(models, tmp_path, [{"text": text}], valid_share=0.1, max_steps=1))
    assert result.data.keys() == {"train", "valid", "test"}
    assert result.verdict is not None and result.verdict["answers"] is None


def test_a_strength_that_helps_nowhere_is_zero(models: Path, tmp_path: Path) -> None:
    """Trained on one thing and validated on another, every strength makes the base worse."""
    good = [{"prompt": "the", "completion": "ran tin eat rather " * 8}] * 40
    bad = [{"prompt": "the", "completion": "0123456789 " * 8}] * 40
    valid_data = write_rows(tmp_path / "valid.jsonl", bad)
    run = settings(
        models, tmp_path, good, method="sft", valid_data=valid_data, test_share=0.0, max_steps=12,
        template="plain", max_length=128, calibrate=False,
    )  # fmt: skip
    result = tune(run)
    assert result.alpha == 0
    assert result.best_alpha == result.tried[0] and result.edge == "lowest"
    assert Recipe.read(run.directory).experts[0].alpha == 0
    assert result.verdict is not None and result.verdict["word"] == "does not help"
    assert any("--method cpt" in hint for hint in result.verdict["hints"])
    assert "the recipe is the base alone" in "\n".join(last_word(run, result))


def test_only_rows_that_were_read_are_counted(models: Path, tmp_path: Path) -> None:
    display = Listening()
    rows = questions(60)
    result = tune(
        settings(models, tmp_path, rows, max_steps=2, batch_size=3, measure_tokens=0),
        display=display,
    )
    assert (result.data["train"]["rows"], result.data["train"]["rows_read"]) == (39, 6)
    assert result.data["train"]["num_examples"] == 6
    assert any(
        "trained on 6 of 39 rows" in line
        for line in last_word(settings(models, tmp_path, rows), result)
    )


@pytest.mark.parametrize(
    ("method", "rows"), [("sft", questions(40)), ("dpo", preferences(40))], ids=["sft", "dpo"]
)
def test_rows_read_before_a_stop_are_counted_after_it(
    method: str, rows: list[dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    run = settings(models, tmp_path, rows, method=method, max_steps=5, measure_tokens=0)
    with pytest.raises(Interrupted):
        tune(run, display=StopAt(2))
    assert tune(run, resume=True).data["train"]["rows_read"] == 20


def test_a_limit_on_tokens_says_how_many_rows_it_leaves(models: Path, tmp_path: Path) -> None:
    display = Listening()
    result = tune(
        settings(models, tmp_path, completions(), max_tokens=200, measure_tokens=0), display=display
    )
    read = result.data["train"]["rows_read"]
    assert 0 < read < 18
    assert any(
        f"18 rows of rows.jsonl (completion), of which {read} are read" in t for t in display.said
    )


def test_pairs_are_judged_by_which_answer_is_likelier(models: Path, tmp_path: Path) -> None:
    result = tune(settings(models, tmp_path, preferences(60), max_steps=20))
    assert result.verdict is not None and result.alpha == 1.0
    answers = result.verdict["answers"]
    assert answers["measure"] == "preferred"
    assert answers["steered"] >= answers["base"]


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "changes", "error", "message"),
    [
        ([], {}, InputFileError, "no rows"),
        (completions(1), {}, InputFileError, "one row"),
        ([*texts(3), *completions(3)], {}, InputFileError, "line 4"),
        (preferences(), {"method": "sft"}, InputFileError, "--method dpo"),
        (texts(), {"method": "dpo"}, InputFileError, "--method sft"),
        (texts(), {"lora_targets": ("q_proj", "w_proj")}, AdapterMismatch, "'w_proj'"),
        (texts(), {"lora_targets": ("w_proj",), "base": None}, AdapterMismatch, "'w_proj'"),
        (texts(), {"max_length": 4096}, InvalidRequest, "context has 128"),
        (
            [{"prompt": "the", "completion": ""}, *completions(4)],
            {},
            InputFileError,
            "line 1",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_training(
    rows: list[dict[str, Any]],
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    models: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        tune(settings(models, tmp_path, rows, **changes))
    assert not (tmp_path / "out").exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize(
    "changes",
    [
        {"anti_expert": None, "base": None},
        {"method": "cpt", "base": None},
        {"method": "cpt", "base": "http://localhost:9/v1"},
        {"then_cpt": True, "base": "http://localhost:9/v1"},
        {"anti_expert": None, "base": "http://localhost:9/v1"},
        {"max_calls": 4},
        {"method": "rlhf"},
        {"learning_rate": float("nan")},
        {"epochs": 0},
        {"valid_share": 1.0},
        {"lora_rank": 0},
        {"dtype": "float64"},
        {"method": "cpt", "template": "plain", "base_template": "chat"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    changes: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest):
        settings(models, tmp_path, texts(1), **changes)


def test_models_of_different_vocabularies_are_refused_before_training(
    models: Path, tmp_path: Path
) -> None:
    from proxytune.errors import VocabularyMismatch

    other = tiny_model(tmp_path / "other", tokenizer=tiny_tokenizer(merges=[*MERGES, ("h", "u")]))
    with pytest.raises(VocabularyMismatch):
        tune(settings(models, tmp_path, texts(), anti_expert=str(other)))
    assert not (tmp_path / "out").exists(), "a refused run leaves nothing behind"


def test_long_rows_are_cut_and_counted(models: Path, tmp_path: Path) -> None:
    rows = completions(20)
    rows[3]["completion"] = " tea" * 200
    said: list[str] = []

    class Listening(Display):
        def say(self, text: str) -> None:
            said.append(text)

    result = tune(settings(models, tmp_path, rows, valid_share=0.0), display=Listening())
    assert result.data["train"]["num_truncated"] == 1
    assert any("1 rows cut to 64 tokens" in line for line in said)


def test_a_permuted_vocabulary_is_tuned_through_like_an_equal_one(
    models: Path, tmp_path: Path
) -> None:
    shuffled = tiny_model(tmp_path / "shuffled", seed=2, tokenizer=tiny_tokenizer(shuffle_seed=5))
    run = settings(
        models, tmp_path, completions(), method="cpt", anti_expert=str(shuffled), alpha=1.0
    )
    result = tune(run)
    assert result.valid is not None
    assert result.valid["rows"][-1]["nats"] == pytest.approx(result.valid_loss, abs=1e-4)


# The command ---------------------------------------------------------------------------------------


def test_the_command_trains_and_prints_one_json_object(models: Path, tmp_path: Path) -> None:
    from proxytune.cli import app

    rows = write_rows(tmp_path / "rows.jsonl", texts())
    answer = CliRunner().invoke(
        app,
        [
            "tune", "--anti-expert", str(models / "small"), "--base", str(models / "base"),
            "--data", rows, "--output", str(tmp_path / "out"), "--max-steps", "2",
            "--max-length", "64", "--lora-rank", "2", "--json",
        ],
    )  # fmt: skip
    assert answer.exit_code == 0, answer.stderr
    assert json.loads(answer.stdout)["num_steps"] == 2
    assert "train: " in answer.stderr


def test_the_command_takes_a_line_break_as_it_is_typed(models: Path, tmp_path: Path) -> None:
    from proxytune.cli import app

    rows = write_rows(tmp_path / "rows.jsonl", questions())
    answer = CliRunner().invoke(
        app,
        [
            "tune", "--anti-expert", str(models / "small"), "--base", str(models / "base"),
            "--data", rows, "--output", str(tmp_path / "out"), "--max-steps", "1",
            "--max-length", "64", "--lora-rank", "2", "--template", r"Q: {{ prompt }}\nA:",
        ],
    )  # fmt: skip
    assert answer.exit_code == 0, answer.stderr
    assert Recipe.read(tmp_path / "out").base.prompt == "Q: {{ prompt }}\nA:"
    assert "\nsteering " in answer.stderr and "  prompt: " in answer.stderr
    assert "base: " in answer.stderr and "steered: " in answer.stderr


def test_the_command_names_the_bad_line(models: Path, tmp_path: Path) -> None:
    from proxytune.cli import app

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "tea"}\n{"text": \n')
    answer = CliRunner().invoke(
        app,
        ["tune", "--anti-expert", str(models / "small"), "--data", str(path), "--output", "out"],
    )
    assert answer.exit_code == 2
    assert "line 2" in answer.stderr and "Traceback" not in answer.stderr
