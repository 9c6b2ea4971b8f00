"""`--engine vllm`: what vLLM cannot do is refused by name, before anything loads, installed or not."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxytune.cli import app
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ApiSettings, ExpertSpec, LlamaCppSettings, ModelSpec
from tests.support.tiny import tiny_model

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, a file of prompts and a text."""
    folder = tmp_path_factory.mktemp("recipe")
    for seed, name in enumerate(("base", "expert", "anti")):
        tiny_model(folder / name, seed=seed)
    recipe_of(folder).write(folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "text.txt").write_text("the law is the law " * 20)
    return folder


def recipe_of(folder: Path) -> Recipe:
    expert = ExpertSpec("tiny", ModelSpec(model="expert"), ModelSpec(model="anti"))
    return Recipe(ModelSpec(model="base"), (expert,), directory=folder)


def commands(place: Path, recipe: Path, output: Path) -> dict[str, list[str]]:
    """Return a whole command line of each command."""
    text = ["--text-file", str(place / "text.txt")]
    files = ["--input-file", str(place / "prompts.jsonl"), "--output-file", str(output / "out")]
    data = ["--data-dir", str(place), "--output", str(output)]
    there = str(recipe)
    return {
        "generate": ["generate", there, "--engine", "vllm", *files],
        "score": ["score", there, "--engine", "vllm", *text],
        "sweep": ["sweep", there, "--engine", "vllm", *text],
        "eval": ["eval", there, "--engine", "vllm", "--tasks", "gsm8k", *data],
    }


def refusal(command: list[str]) -> str:
    """Return the message that a command ends with."""
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert "hint:" in result.stderr, result.stderr
    return result.stderr


NAMES = ("generate", "score", "sweep", "eval")


@pytest.fixture
def gsm8k(place: Path) -> None:
    (place / "gsm8k").mkdir(exist_ok=True)
    row = {"question": "Tom has 3?", "answer": "#### 3"}
    (place / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--device", "cuda"], "--device"),
        (["--threads", "4"], "--threads"),
        (["--llama-cpp"], "--llama-cpp"),
        (["--key-env", "KEY"], "--key-env"),
    ],
)
def test_options_of_the_engine_here_are_refused(place, tmp_path, name, option, named):
    assert f"{named} is for models that run here" in refusal(
        commands(place, place, tmp_path)[name] + option
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"policy": Policy(schedule=((0, 1.0), (9, 0.0)))}, "schedule"),
        ({"vocabulary": "map"}, '"vocabulary": "map"'),
        ("prompt", "tiny.expert reads texts as"),
        ("api", "the base is behind an API"),
        ("llama_cpp", "tiny.expert is to be run by llama.cpp"),
    ],
)
def test_recipes_that_vllm_cannot_run_are_refused(place, tmp_path, gsm8k, name, changes, named):
    recipe = recipe_of(place)
    (pair,) = recipe.experts
    if changes == "prompt":
        own = replace(pair.expert, prompt="[INST] {{ prompt }} [/INST]")
        changes = {"experts": (replace(pair, expert=own),)}
    elif changes == "llama_cpp":
        own = replace(pair.expert, model="expert.gguf", llama_cpp=LlamaCppSettings())
        changes = {"experts": (replace(pair, expert=own),)}
    elif changes == "api":
        api = ApiSettings(tokenizer="base")
        changes = {"base": ModelSpec(model="http://127.0.0.1:9/v1", api=api)}
    written = replace(recipe, **changes).write(tmp_path / "recipe")
    message = refusal(commands(place, written.directory, tmp_path)[name])
    assert named in message


@pytest.mark.parametrize("name", ["generate", "score", "sweep"])
def test_a_schedule_on_the_command_line_is_refused(place, tmp_path, name):
    policy = ["--policy", '{"schedule": [[0, 1], [9, 0]]}']
    assert "schedule" in refusal(commands(place, place, tmp_path)[name] + policy)


@pytest.mark.parametrize(
    ("name", "option", "named"),
    [
        ("generate", ["--speculative"], "--speculative is for models that run here"),
        ("generate", ["--cuda-graphs"], "--cuda-graphs is for models that run here"),
        ("eval", ["--speculative"], "--speculative is for models that run here"),
        ("eval", ["--nudge-below", "0.4"], "--nudge-below leaves out the anti-expert"),
        ("eval", ["--tuned-adapter", "adapter"], "--tuned-adapter is for models that run here"),
        ("eval", ["--tasks", "ds1000"], "answers to ds1000 must not begin with"),
        ("eval", ["--tasks", "arc_easy"], "arc_easy is not a benchmark of this package"),
    ],
)
def test_what_one_command_cannot_do_in_vllm_is_refused(place, tmp_path, name, option, named):
    assert named in refusal(commands(place, place, tmp_path)[name] + option)


def test_one_prompt_is_answered_here(place):
    message = refusal(["generate", str(place), "a prompt", "--engine", "vllm"])
    assert "--engine vllm answers files of prompts" in message


def test_options_after_the_dashes_are_vllms_alone(place, tmp_path):
    local = [word for word in commands(place, place, tmp_path)["score"] if word != "vllm"]
    local.remove("--engine")
    assert "'--tensor-parallel-size' follows" in refusal([*local, "--", "--tensor-parallel-size"])
    assert "'time' follows" in refusal(["generate", str(place), "once", "time"])


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
@pytest.mark.parametrize("name", NAMES)
def test_without_vllm_the_extra_is_named(place, tmp_path, gsm8k, name):
    message = refusal(commands(place, place, tmp_path)[name])
    assert "vLLM is not installed" in message and "vllm" in message.split("hint:")[1]
