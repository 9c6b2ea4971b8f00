"""Calibration to a base behind an API: what is asked, what is kept, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.errors import BudgetSpent, UnsupportedModel
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ModelSpec
from proxytune.tune import TuneSettings, tune
from tests.support.completion_server import OPENAI, VLLM, CompletionServer, ServerTraits
from tests.support.tiny import tiny_model
from tests.tune.test_pair import pair
from tests.tune.test_run import completions, read_log, texts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a `base` and a `small` model of one vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "base", seed=1, hidden_size=24, num_layers=3)
    tiny_model(folder / "small", seed=2)
    return folder


def serve(models: Path, traits: ServerTraits = VLLM) -> CompletionServer:
    checkpoint = find_checkpoint(str(models / "base"), root=models)
    spec = ModelSpec(model=str(models / "base"), device="cpu", dtype="float32")
    backend = TransformersBackend.load(checkpoint, spec)
    return CompletionServer(backend, checkpoint.tokenizer, traits=traits)


@pytest.fixture
def server(models: Path) -> Iterator[CompletionServer]:
    with serve(models) as server:
        yield server


def remote(
    models: Path, folder: Path, server: CompletionServer, rows: list[dict[str, Any]], **changes: Any
) -> TuneSettings:
    own: dict[str, Any] = {"base": server.url, "method": None, "measure_tokens": 0}
    return pair(models, folder, rows, **own | changes)


def divergences(run: TuneSettings) -> list[float]:
    return [row["divergence"] for row in read_log(run) if "divergence" in row]


def test_a_base_that_shows_most_of_its_tokens_calibrates_almost_as_one_that_runs_here(
    models: Path, tmp_path: Path
) -> None:
    """100 of 266 tokens are shown, which hold 90 % of the probability; the others count as one."""
    local = pair(models, tmp_path / "local", completions(), measure_tokens=0)
    tune(local)
    with serve(models, replace(VLLM, max_top_logprobs=None)) as server:
        there = remote(models, tmp_path / "there", server, completions(), max_steps=8)
        result = tune(there)
        assert not server.failures
    assert result.method == "sft" and result.is_calibrated
    for part, whole in zip(divergences(there), divergences(local), strict=True):
        assert 0.85 * whole < part < whole
    assert Recipe.read(there.directory).base.model == server.url


def test_a_base_that_shows_a_part_calibrates_too_and_is_asked_once_per_example(
    models: Path, server: CompletionServer, tmp_path: Path
) -> None:
    run = remote(models, tmp_path, server, texts(), offsets_dir=str(tmp_path / "offsets"))
    result = tune(run)
    assert not server.failures
    scored = [body for body in server.bodies if "prompt_logprobs" in body or body.get("echo")]
    examples = sum(part["num_examples"] for part in result.data.values())
    # And a few calls that find out what the server shows.
    assert examples <= len(scored) <= examples + 4
    found = divergences(run)
    assert found[-1] < found[0]
    before = server.num_requests
    again = remote(
        models, tmp_path, server, texts(), output=str(tmp_path / "again"),
        offsets_dir=str(tmp_path / "offsets"),
    )  # fmt: skip
    assert tune(again).valid_loss == result.valid_loss
    assert server.num_requests - before <= len(server.bodies) - len(scored) + 4


def test_the_strength_is_chosen_through_the_api(
    models: Path, server: CompletionServer, tmp_path: Path
) -> None:
    result = tune(remote(models, tmp_path, server, completions(), measure_tokens=500))
    assert result.valid is not None and result.tried


def test_what_a_budget_leaves_unasked_is_asked_by_the_next_run(
    models: Path, server: CompletionServer, tmp_path: Path
) -> None:
    offsets = tmp_path / "offsets"
    run = remote(models, tmp_path, server, completions(), max_calls=12, offsets_dir=str(offsets))
    with pytest.raises(BudgetSpent):
        tune(run)
    (shown,) = offsets.glob("shown-train-*/shown.jsonl")
    kept = shown.read_text().splitlines()
    assert len(kept) > 1
    # As a crash within a line leaves it.
    shown.write_text("\n".join(kept) + '\n{"example": 1')
    before = server.num_requests
    on = replace(run, output=str(tmp_path / "on"), max_calls=None)
    result = tune(on)
    asked = [
        body for body in server.bodies[before:] if "prompt_logprobs" in body or body.get("echo")
    ]
    examples = sum(part["num_examples"] for part in result.data.values())
    assert len(asked) <= examples - (len(kept) - 1) + 4
    lines = shown.read_text().splitlines()
    assert sorted(json.loads(line)["example"] for line in lines[1:]) == list(range(18))


def test_a_run_that_spent_its_budget_is_resumed_with_a_larger_one(
    models: Path, server: CompletionServer, tmp_path: Path
) -> None:
    run = remote(models, tmp_path, server, completions(), max_calls=12)
    with pytest.raises(BudgetSpent):
        tune(run)
    assert tune(replace(run, max_calls=1000), resume=True).is_calibrated


def test_a_server_that_scores_no_texts_is_refused(models: Path, tmp_path: Path) -> None:
    with serve(models, OPENAI) as server:
        run = remote(models, tmp_path, server, completions())
        with pytest.raises(UnsupportedModel, match="--no-calibrate"):
            tune(run)


def test_without_calibration_a_base_behind_an_api_is_not_asked(
    models: Path, server: CompletionServer, tmp_path: Path
) -> None:
    run = remote(models, tmp_path, server, completions(), calibrate=False)
    assert not tune(run).is_calibrated
    assert server.num_requests == 0
