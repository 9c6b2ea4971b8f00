"""Rights that a recipe asks for, on the command line: refused without their flag, by every command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from proxytune import cli
from tests.support.foreign_code import model_with_code
from tests.support.tiny import tiny_model

TEXT = "the rain in Spain stays mainly in the plain\n" * 3


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)


@pytest.fixture
def asking(tmp_path: Path) -> Path:
    """A recipe that asks to run its base's code, which makes the file `ran` beside the recipe."""
    model_with_code(tmp_path / "base", tmp_path / "ran")
    tiny_model(tmp_path / "small", seed=1)
    small = {"model": "small"}
    content = {
        "model_type": "proxytune",
        "base": {"model": "base", "trust_remote_code": True},
        "experts": [{"name": "e", "expert": small, "anti_expert": small}],
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' * 4)
    return tmp_path


COMMANDS = {
    "generate": ("generate", "{}", "ab", "--max-new-tokens", "4"),
    "chat": ("chat", "{}"),
    "serve": ("serve", "{}", "--port", "0"),
    "score": ("score", "{}", "--text-file", "{}/text.txt", "--window", "16"),
    "sweep": ("sweep", "{}", "--text-file", "{}/text.txt", "--window", "16"),
    "rank-experts": ("rank-experts", "{}", "--text-file", "{}/text.txt", "--window", "16"),
    "explain": ("explain", "{}", "ab"),
    "analyze": ("analyze", "{}", "--prompts", "{}/rows.jsonl"),
    "bench": ("bench", "{}", "--shapes", "4:2", "--rounds", "1"),
    "export-gguf": ("export-gguf", "{}", "{}/out"),
    "fit": ("fit", "{}", "--text-file", "{}/text.txt", "--window", "16"),
    "bake": ("bake", "{}", "--data", "{}/rows.jsonl", "--output", "{}/out"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_without_the_flag_a_recipe_that_asks_for_a_right_is_refused(asking, name):
    result = run(*(part.format(asking) for part in COMMANDS[name]), stdin="hello\n")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "base (base: own_code.py)" in result.stderr
    assert "add --trust-remote-code" in result.stderr
    assert not (asking / "ran").exists()


@pytest.mark.parametrize("name", [*COMMANDS, "eval"])
def test_the_command_has_the_flags_that_its_refusal_names(name):
    shown = run(name, "--help").stdout
    assert "--trust-remote-code" in shown and "--allow-pickle" in shown


@pytest.mark.parametrize("name", ["generate", "score"])
def test_with_the_flag_the_code_runs(asking, name):
    arguments = (part.format(asking) for part in COMMANDS[name])
    result = run(*arguments, "--trust-remote-code")
    assert result.exit_code == 0, result.output
    assert (asking / "ran").exists()


def test_doctor_says_what_is_asked_for_in_its_last_line_and_its_exit_code(asking):
    result = run("doctor", asking)
    assert result.exit_code == 2
    assert "own_code.py" in result.stdout
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        "error: the recipe asks for rights that only you can grant: --trust-remote-code"
    )
    assert not (asking / "ran").exists()


def test_doctor_gives_no_right_itself(asking):
    result = run("doctor", asking, "--trust-remote-code")
    assert result.exit_code == 2 and "No such option" in result.stderr


def test_the_name_of_a_key_is_refused_where_no_server_is_asked(asking):
    result = run("generate", asking, "ab", "--trust-remote-code", "--key-env", "SOME_KEY")
    assert result.exit_code == 2
    assert "--key-env is for a base behind an API" in result.stderr


def test_no_option_of_serve_takes_a_key():
    """Options show in the list of processes; a file's or a variable's name tells nothing."""
    shown = run("serve", "--help").stdout
    options = set(re.findall(r"--[a-z-]*key[a-z-]*", shown))
    assert options == {"--api-key-file", "--no-key", "--key-env"}
