"""Steering distilled into an adapter of the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from proxytune.errors import InvalidRequest, OutputFileError, UnsupportedModel
from proxytune.measure.score import passage_losses
from proxytune.model import ProxyTuned
from proxytune.tune import Interrupted
from proxytune.tune.bake import bake, gain_kept
from proxytune.tune.baked import BakeResult, BakeSettings
from proxytune.tune.distil import example_of, kl_divergence, teacher_of
from proxytune.tune.encode import IGNORED
from proxytune.tune.heads import Head
from tests.support.tiny import tiny_model

WORDS = ["the", "an", "a", "tin", "thin", "rather", "tea", "in", "eat", "ran"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe that an adapter can reproduce: its expert is the base with other weights."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "base", seed=1, hidden_size=24, num_layers=2)
    expert = AutoModelForCausalLM.from_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in expert.model.layers:
            weight = layer.mlp.down_proj.weight
            change = torch.randn(len(weight), 2, generator=generator) @ torch.randn(
                2, weight.shape[1], generator=generator
            )
            weight += change * weight.norm() / change.norm()
    expert.save_pretrained(folder / "expert")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "expert")
    config = {
        "model_type": "proxytune",
        "base": {"model": "../base"},
        "experts": [
            {
                "name": "odd",
                "expert": {"model": "../expert"},
                "anti_expert": {"same_as": "base"},
                "alpha": 0.7,
            }
        ],
    }
    (folder / "recipe").mkdir()
    (folder / "recipe" / "config.json").write_text(json.dumps(config))
    return folder / "recipe"


def sentence(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))


def settings(folder: Path, **changes: Any) -> BakeSettings:
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": sentence(i, 3), "completion": " " + sentence(100 + i, 9)}) + "\n"
            for i in range(40)
        )
    )
    own: dict[str, Any] = {
        "output": str(folder / "baked"),
        "data": str(rows),
        "lora_rank": 8,
        "learning_rate": 2e-2,
        "epochs": 4.0,
    }
    return BakeSettings(**own | changes)


# The loss


def test_the_divergence_is_that_of_the_formula() -> None:
    """A teacher that gives 1/2 and 1/2, a student that gives 1/4 and 3/4: 1/2 ln 2 + 1/2 ln 2/3."""
    teacher = torch.tensor([[0.5, 0.5]]).log()
    head = Head(torch.eye(2))
    hidden = torch.tensor([[0.25, 0.75]]).log()
    found = kl_divergence(iter([teacher]), hidden, head)
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    torch.testing.assert_close(float(found), float(expected), atol=1e-6, rtol=0)


def test_its_gradient_is_the_students_probabilities_less_the_teachers() -> None:
    """By the head's transpose, over several chunks; d KL / d logits = q - p."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, 7, generator=generator)
    teacher[:, 3] = -torch.inf
    weight = torch.randn(7, 4, generator=generator)
    weight[3] = 0
    head = Head(weight, torch.zeros(7).index_fill(0, torch.tensor([3]), -torch.inf))
    hidden = torch.randn(5, 4, generator=generator, requires_grad=True)
    (2 * kl_divergence(iter([teacher[:2], teacher[2:]]), hidden, head)).backward()
    gap = head.logits(hidden.detach()).softmax(-1) - teacher.softmax(-1)
    torch.testing.assert_close(hidden.grad, 2 * gap @ weight, atol=1e-5, rtol=0)


def test_the_teacher_is_the_steered_base(recipe: Path) -> None:
    model = ProxyTuned.load(recipe)
    passages = model.text_passages(sentence(0, 60), window=50)
    logits = torch.cat([torch.cat(list(teacher_of(model.ensemble, (0.7,))(p))) for p in passages])
    ids = torch.tensor([i for p in passages for i in p.token_ids])
    losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    scored = passage_losses(model.ensemble, passages, [(0.7,)], with_models=False)[0]
    np.testing.assert_allclose(losses.numpy(), scored, atol=1e-4)


def test_the_student_reads_the_bases_prompt_and_learns_only_the_rest(recipe: Path) -> None:
    model = ProxyTuned.load(recipe)
    (passage,) = model.completion_passages([("the tin", " ran")])
    example = example_of(passage)
    assert example.token_ids == [*passage.prompts[0], *passage.token_ids]
    assert example.labels[: len(passage.prompts[0])] == [IGNORED] * len(passage.prompts[0])
    assert example.labels[len(passage.prompts[0]) :] == list(passage.token_ids)


# What is kept


def test_the_gain_kept_is_the_share_of_the_steered_bases() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(3.0, 1.0, 4_096)
    gain = 0.4 + generator.normal(0, 0.1, 4_096)
    kept, interval = gain_kept(base, base - gain, base - 0.75 * gain, seed=0)
    assert kept == pytest.approx(0.75)
    assert interval is not None
    # Every block keeps the same share, so that every resample does.
    assert (interval.low, interval.high) == pytest.approx((0.75, 0.75))


def test_without_a_gain_nothing_can_be_kept() -> None:
    base = np.full(1_024, 3.0)
    assert gain_kept(base, base + 0.1, base, seed=0) == (None, None)


# A run


def test_a_run_leaves_an_adapter_that_is_nearer_to_the_steered_base(
    recipe: Path, tmp_path: Path
) -> None:
    run = settings(tmp_path)
    result = bake(recipe, run)
    assert result.divergence is not None and result.first_divergence is not None
    assert result.divergence < 0.6 * result.first_divergence
    base = AutoModelForCausalLM.from_pretrained(recipe.parent / "base")
    student = PeftModel.from_pretrained(base, run.directory).eval()
    model = ProxyTuned.load(recipe)
    passage = model.completion_passages([(sentence(500, 3), " " + sentence(501, 9))])[0]
    ids = torch.tensor([example_of(passage).token_ids])
    steered = torch.cat(list(teacher_of(model.ensemble, (0.7,))(passage)))
    rows = slice(len(passage.prompts[0]) - 1, -1)

    def divergence(logits: torch.Tensor) -> float:
        difference = steered.log_softmax(-1) - logits.log_softmax(-1)
        return float((steered.softmax(-1) * difference).sum())

    with torch.no_grad():
        after = divergence(student(ids).logits[0, rows])
        with student.disable_adapter():
            before = divergence(student(ids).logits[0, rows])
    assert after < 0.8 * before
    card = (run.directory / "README.md").read_text()
    assert "2607.26246" in card and "A partial reproduction of it found no gain" in card
    assert sorted(path.name for path in run.training.iterdir()) == [
        "data.json", "log.jsonl", "result.json", "settings.json",
    ]  # fmt: skip
    assert json.loads((run.training / "result.json").read_text())["num_tokens"] > 0


def test_prompts_are_answered_by_the_steered_base_first(recipe: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": sentence(i, 3)}) + "\n" for i in range(12)))
    run = settings(tmp_path, data=None, prompts=prompts, max_new_tokens=6, epochs=1.0)
    result = bake(recipe, run)
    written = [json.loads(line) for line in (run.training / "written.jsonl").open()]
    assert len(written) == 12
    other = settings(tmp_path, data=None, prompts=prompts, max_new_tokens=6, epochs=0.2, seed=1,
                     output=str(tmp_path / "other"))  # fmt: skip
    bake(recipe, other)
    assert [json.loads(line) for line in (other.training / "written.jsonl").open()] != written
    assert all(1 <= len(ids) <= 6 for _, ids in written)
    assert result.num_tokens + result.num_trained < sum(len(ids) for _, ids in written) + 1


def test_a_stopped_run_resumes_and_ends_with_the_same_adapter(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxytune.tune import trainer as trainers

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    bake(recipe, settings(whole, epochs=1.5))
    plain = trainers.StopOnSignal.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.was_asked = state.global_step == 5
        plain(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 5"):
        patch.setattr(trainers.StopOnSignal, "on_step_end", stop)
        bake(recipe, settings(parts, epochs=1.5))
    run = settings(parts, epochs=1.5, data=str(parts / "rows.jsonl"))
    bake(recipe, run, resume=True)
    one, other = (
        (folder / "baked" / "adapter_model.safetensors").read_bytes() for folder in (whole, parts)
    )
    assert one == other


def test_a_finished_run_is_not_run_again(recipe: Path, tmp_path: Path) -> None:
    """Its checkpoints are gone, and it used to be trained anew."""
    run = settings(tmp_path, epochs=0.2)
    result = bake(recipe, run)
    weights = run.directory / "adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert bake(recipe, run, resume=True) == result
    assert weights.stat().st_mtime_ns == written


def test_a_run_that_ended_before_it_was_measured_is_not_trained_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (settings(tmp_path, output=f"{tmp_path}/{n}", epochs=0.5) for n in ("a", "b"))
    expected = bake(recipe, whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "proxytune.tune.bake.gain_kept",
            lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        bake(recipe, parts)
    rows = tmp_path / "rows.jsonl"
    kept = rows.read_text()
    rows.write_text(kept.replace("tin", "tea"))
    with pytest.raises(OutputFileError, match="other data"):
        bake(recipe, parts, resume=True)
    rows.write_text(kept)
    result = bake(recipe, parts, resume=True)
    assert (result.num_steps, result.divergence) == (expected.num_steps, expected.divergence)
    assert result.baked == expected.baked
    one, other = ((r.directory / "adapter_model.safetensors").read_bytes() for r in (whole, parts))
    assert one == other


# What is refused


def test_neither_or_both_kinds_of_data_are_refused(tmp_path: Path) -> None:
    for given in ({}, {"data": "rows.jsonl", "prompts": tmp_path / "prompts.jsonl"}):
        with pytest.raises(InvalidRequest, match="one of them is needed"):
            BakeSettings(output="baked", **given)


def test_a_base_behind_an_api_is_refused(tmp_path: Path) -> None:
    config = {
        "model_type": "proxytune",
        "base": {"model": "http://localhost:9/v1", "api": {"model": "large", "tokenizer": "t"}},
        "experts": [
            {"name": "a", "expert": {"model": "b"}, "anti_expert": {"model": "c"}},
        ],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="behind the API http://localhost:9/v1"):
        bake(tmp_path, BakeSettings(output=str(tmp_path / "out"), data="rows.jsonl"))
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_is_refused(recipe: Path, tmp_path: Path) -> None:
    run = settings(tmp_path)
    run.directory.mkdir()
    (run.directory / "mine.txt").touch()
    with pytest.raises(OutputFileError, match="already exists"):
        bake(recipe, run)


def test_a_run_is_resumed_only_with_its_own_settings(recipe: Path, tmp_path: Path) -> None:
    run = settings(tmp_path)
    with pytest.raises(OutputFileError, match="no run to resume"):
        bake(recipe, run, resume=True)
    run.training.mkdir(parents=True)
    (run.training / "settings.json").write_text(json.dumps({"lora_rank": 4}))
    with pytest.raises(OutputFileError, match="was started with"):
        bake(recipe, run, resume=True)


def test_too_few_rows_are_refused(recipe: Path, tmp_path: Path) -> None:
    rows = tmp_path / "few.jsonl"
    rows.write_text('{"prompt": "the", "completion": " tin"}\n' * 3)
    with pytest.raises(InvalidRequest, match="3 windows or answers, and baking needs at least 8"):
        bake(recipe, settings(tmp_path, data=str(rows)))


def test_the_command_says_how_much_is_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxytune.cli import app
    from proxytune.measure.score import Interval

    result = BakeResult(
        "out", 30.0, 20.0, 22.0, 0.75, Interval(0.7, 0.8), 0.1, 0.4, 900, 9_000, 40, 9.0
    )
    monkeypatch.setattr("proxytune.tune.bake.bake", lambda *args, **kwargs: result)
    command = ["bake", str(recipe), "--data", "rows.jsonl", "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "kept 75% of what steering gains (95 % interval 70% to 80%)" in found.stderr
    assert "base 30.00, steered 20.00, baked 22.00" in found.stderr
