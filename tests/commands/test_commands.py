"""The commands: what they print where, and how they end."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from proxytune import cli
from proxytune.errors import BackendError
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.request import Request, SamplingParams
from proxytune.testing import toy_recipe
from tests.support.tiny import tiny_adapter, tiny_model
from tests.support.toys import toy_load

COMMANDS = (
    "new",
    "doctor",
    "export-gguf",
    "generate",
    "chat",
    "score",
    "explain",
    "analyze",
    "bench",
    "demo",
)


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)


def refused(result: Result, *words: str) -> None:
    """Check that a command ended with a message for the user: exit code 2, no traceback, no answer."""
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert not result.stdout
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a recipe with the experts `first` and `second`, whose models are toys."""
    monkeypatch.setattr(ProxyTuned, "load", staticmethod(toy_load))
    toy_recipe({"first": 1.0, "second": 0.5}).write(tmp_path / "recipe")
    return tmp_path / "recipe"


@pytest.fixture
def unloadable(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the recipe, with models whose loading would fail the test."""

    def load(*_: object, **__: object) -> ProxyTuned:
        raise AssertionError("loaded")

    monkeypatch.setattr(ProxyTuned, "load", staticmethod(load))
    return recipe


MODEL = toy_load(toy_recipe({"first": 1.0, "second": 0.5}))


# The command as a whole ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_begins_with_a_line_to_paste(command: str):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    usage, blank, example = result.stdout.splitlines()[:3]
    assert usage.startswith("Usage:") and not blank
    assert example.strip().startswith(f"proxytune {command or 'demo'}".strip())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_line_to_paste_has_only_options_that_there_are(command: str):
    text = run(command, "--help").stdout
    options = [word for word in text.splitlines()[2].split() if word.startswith("--")]
    for option in options:
        assert option in text.partition("Options:")[2]


def test_help_is_quick_because_no_model_library_is_imported():
    code = (
        "import sys; sys.argv = ['proxytune', '--help']\n"
        "from proxytune.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'rich', 'jinja2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_recipes_are_read_and_written_without_torch(tmp_path):
    """`new` and `doctor` also run where torch has no build; an import of it is refused here."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['proxytune', 'new', {str(tmp_path / 'recipe')!r}, '--base', 'owner/large', "
        "'--anti-expert', 'owner/small', '--expert', 'owner/tuned', '--policy', 'gate_sure']\n"
        "from proxytune.cli import main\n"
        "main()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert "gate_sure" in (tmp_path / "recipe" / "config.json").read_text(encoding="utf-8")


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert run("--version").stdout == f"proxytune {version('proxytune')}\n"


def test_unknown_commands_and_options_end_with_2():
    for arguments in (["steer"], ["generate", "x", "y", "--heat", "1"], ["score", "x"]):
        refused(run(*arguments), "Usage:")


def test_a_failure_of_the_work_ends_with_1_and_a_message(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(*_: object, **__: object) -> ProxyTuned:
        raise BackendError("the device went away")

    monkeypatch.setattr(ProxyTuned, "load", staticmethod(load))
    result = run("generate", recipe, "ab")
    assert result.exit_code == 1
    assert result.stderr.endswith("error: the device went away\n")
    assert "Traceback" not in result.output


def test_a_bug_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    def load(*_: object, **__: object) -> ProxyTuned:
        raise ZeroDivisionError

    monkeypatch.setattr(ProxyTuned, "load", staticmethod(load))
    assert isinstance(run("generate", recipe, "ab").exception, ZeroDivisionError)


def test_control_c_ends_with_130_and_no_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    def load(*_: object, **__: object) -> ProxyTuned:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProxyTuned, "load", staticmethod(load))
    result = run("generate", recipe, "ab")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


# new -----------------------------------------------------------------------------------------------


def new(directory: Path, *options: str | Path) -> Result:
    return run("new", directory, "--base", "owner/large", "--anti-expert", "owner/small", *options)


def test_new_writes_a_recipe_that_reads_back(tmp_path: Path):
    result = new(tmp_path / "r", "--expert", "owner/small-tuned", "--alpha", "0.7")
    assert result.exit_code == 0 and result.stdout == ""
    assert "next: proxytune doctor" in result.stderr
    recipe = Recipe.read(tmp_path / "r")
    assert recipe.base.model == "owner/large"
    (expert,) = recipe.experts
    assert (expert.name, expert.alpha) == ("small-tuned", 0.7)
    assert (expert.expert.model, expert.anti_expert.model) == ("owner/small-tuned", "owner/small")


def test_new_takes_prompt_formats_and_adapters(tmp_path: Path):
    new(
        tmp_path / "r", "--adapter", "owner/lora", "--anti-expert-adapter", "owner/opposite",
        "--name", "support", "--prompt", "chat", "--expert-prompt", "[INST] {{ prompt }} [/INST]",
    )  # fmt: skip
    content = json.loads((tmp_path / "r" / "config.json").read_text())
    assert content["base"]["prompt"] == "chat"
    (expert,) = content["experts"]
    assert expert["name"] == "support"
    assert expert["anti_expert"] == {"model": "owner/small", "adapter": "owner/opposite"}
    assert expert["expert"]["adapter"] == "owner/lora"
    assert expert["expert"]["prompt"] == "[INST] {{ prompt }} [/INST]"


def test_new_reuses_the_base_where_the_word_base_stands(tmp_path: Path):
    run(
        "new", tmp_path / "r", "--base", "owner/large", "--expert", "base",
        "--anti-expert", "owner/small",
    )  # fmt: skip
    content = json.loads((tmp_path / "r" / "config.json").read_text())
    assert content["experts"][0]["expert"] == {"same_as": "base"}


def test_local_paths_given_to_new_lead_to_the_same_files_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for place in ("work/models/small", "work/recipe/adapters/support", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    run(
        "new", "recipe", "--base", "owner/large", "--anti-expert", "models/small",
        "--adapter", "recipe/adapters/support",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = Recipe.read(tmp_path / "work" / "recipe")
    (expert,) = recipe.experts
    assert Path(expert.anti_expert.model or "") == tmp_path / "work" / "models" / "small"
    assert expert.expert.adapter == "adapters/support"


def test_new_adds_an_expert_to_a_recipe(tmp_path: Path):
    new(tmp_path / "r", "--expert", "owner/one")
    added = run(
        "new", tmp_path / "r", "--add", "--expert", "owner/two", "--anti-expert", "owner/small"
    )
    assert added.exit_code == 0, added.output
    assert [e.name for e in Recipe.read(tmp_path / "r").experts] == ["one", "two"]
    doubled = run(
        "new", tmp_path / "r", "--add", "--expert", "owner/two", "--anti-expert", "owner/small"
    )
    refused(doubled, "two experts are called 'two'")


def test_new_replaces_a_recipe_only_when_forced(tmp_path: Path):
    new(tmp_path / "r", "--expert", "owner/one")
    refused(new(tmp_path / "r", "--expert", "owner/two"), "another recipe")
    assert Recipe.read(tmp_path / "r").experts[0].name == "one"
    assert new(tmp_path / "r", "--expert", "owner/two", "--force").exit_code == 0
    assert Recipe.read(tmp_path / "r").experts[0].name == "two"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "neither --expert nor --adapter"),
        (["--expert", "a/b", "--alpha", "nan"], "alpha is nan"),
        (["--expert", "a/b", "--alpha", "-inf"], "alpha is -inf"),
        (["--expert", "a/b", "--alpha", "much"], "'--alpha'"),
        (["--expert", "a/b", "--name", "two words"], "two words"),
        (["--expert", "a/b", "--prompt", "chta"], "chat"),
        (["--expert", "./missing"], "nothing is at ./missing"),
        (["--expert", "missing.gguf"], "nothing is at missing.gguf"),
        (["--expert", "a/b", "--add"], "--add"),
        (["--expert", "a/b", "--add", "--force"], "--force"),
        (["--expert", "base", "--adapter", "a/b"], "cannot sit on the base"),
    ],
)
def test_new_refuses_what_makes_no_recipe(tmp_path: Path, options: list[str], words: str):
    refused(new(tmp_path / "r", *options), words)
    assert not (tmp_path / "r" / "config.json").exists()


# generate ------------------------------------------------------------------------------------------


def test_generate_prints_the_new_text_and_nothing_else_on_stdout(recipe: Path):
    result = run("generate", recipe, "hello", "--max-new-tokens", "9", "--alpha", "0.5")
    assert result.exit_code == 0
    expected = MODEL.generate("hello", SamplingParams(max_new_tokens=9), alpha=0.5)
    assert result.stdout == expected.text + "\n"
    assert "9 tokens" in result.stderr and "tokens/s" in result.stderr
    assert "first at alpha 0.5" in result.stderr


def test_streamed_text_joined_is_the_whole_text(recipe: Path):
    options = ["generate", recipe, "hello", "--max-new-tokens", "20"]
    assert run(*options, "--stream").stdout == run(*options, "--no-stream").stdout


def test_generate_reads_the_prompt_from_stdin_without_its_last_line_break(recipe: Path):
    from_stdin = run("generate", recipe, "-", "--max-new-tokens", "9", stdin="hello\n")
    assert from_stdin.stdout == run("generate", recipe, "hello", "--max-new-tokens", "9").stdout


def test_json_is_one_object_on_one_line_with_the_agreed_fields(recipe: Path):
    result = run("generate", recipe, "hello", "--json", "--expert", "first", "--logprobs", "3")
    (line,) = result.stdout.splitlines()
    answer = json.loads(line)
    assert list(answer) == [
        "text", "token_ids", "finish_reason", "num_prompt_tokens", "num_new_tokens", "alpha", "expert",
        "latency_s", "logprobs",
    ]  # fmt: skip
    assert (answer["alpha"], answer["expert"]) == (1.0, "first")
    assert answer["num_prompt_tokens"] == 5
    assert len(answer["logprobs"]) == answer["num_new_tokens"] == 128
    assert len(answer["logprobs"][0]["top"]) == 3
    assert not result.stderr


def test_drafts_leave_the_text_as_it_is_and_are_counted(recipe: Path):
    command = ("generate", recipe, "hello", "--json", "--temperature", "0.8", "--seed", "3")
    plain, drafted = (run(*command, *option) for option in ((), ("--speculative",)))
    assert plain.exit_code == drafted.exit_code == 0
    before, after = json.loads(plain.stdout), json.loads(drafted.stdout)
    assert after.pop("num_accepted") <= after.pop("num_drafted")
    for answer in (before, after):
        del answer["latency_s"]
    assert after == before


def test_a_seed_makes_drawn_text_repeatable(recipe: Path):
    options = ["generate", recipe, "hello", "--temperature", "1", "--max-new-tokens", "20"]
    drawn = [run(*options, "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0].stdout == drawn[1].stdout != drawn[2].stdout
    assert "seed 1" in drawn[0].stderr
    assert "seed " in run(*options).stderr  # one that was drawn can be asked for again


def test_every_sampling_option_arrives(recipe: Path):
    result = run(
        "generate", recipe, "hello", "--json", "--temperature", "0.8", "--top-k", "9", "--top-p", "0.9",
        "--min-p", "0.01", "--repetition-penalty", "1.2", "--presence-penalty", "0.1",
        "--frequency-penalty", "0.2", "--seed", "3", "--min-new-tokens", "4", "--max-new-tokens", "30",
        "--stop", "q", "--stop", "xy", "--ignore-eos",
    )  # fmt: skip
    sampling = SamplingParams(
        max_new_tokens=30, min_new_tokens=4, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01,
        repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.2, seed=3, stop=("q", "xy"),
        ignore_eos=True,
    )  # fmt: skip
    expected = MODEL.generate("hello", sampling)
    assert json.loads(result.stdout)["token_ids"] == list(expected.token_ids)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([], {"first": 1.0, "second": 0.5}),
        (["--alpha", "2"], {"first": 2.0, "second": 2.0}),
        (["--expert", "second"], {"second": 0.5}),
        (["--expert", "second=0.25"], {"second": 0.25}),
        (["--expert", "first=2", "--expert", "second"], {"first": 2.0, "second": 0.5}),
        (
            ["--expert", "first=2", "--expert", "second", "--alpha", "3"],
            {"first": 2.0, "second": 3.0},
        ),
    ],
)
def test_experts_are_chosen_with_their_strengths(
    recipe: Path, options: list[str], chosen: dict[str, float]
):
    result = run("generate", recipe, "ab", "--json", "--max-new-tokens", "2", *options)
    alpha = json.loads(result.stdout)["alpha"]
    assert (alpha if isinstance(alpha, dict) else {next(iter(chosen)): alpha}) == chosen


def test_only_the_chosen_experts_are_loaded(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = []

    def load(recipe: Recipe, *, experts: Any = None, **options: Any) -> ProxyTuned:
        loaded.append((experts, options))
        return toy_load(recipe, experts=experts)

    monkeypatch.setattr(ProxyTuned, "load", staticmethod(load))
    models = ["--device", "cpu", "--dtype", "bfloat16", "--exact"]
    run("generate", recipe, "ab", "--expert", "second", *models)
    options = {"device": "cpu", "dtype": "bfloat16", "cuda_graphs": False, "budget": None}
    options |= {"exact": True}
    options |= {"trust_remote_code": False, "allow_pickle": False, "key_env": None}
    assert loaded == [(("second",), options)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["there is no prompt"]),
        ([""], ["the prompt is empty"]),
        (["ab", "--alpha", "nan"], ["nan", "finite"]),
        (["ab", "--alpha", "inf"], ["inf", "finite"]),
        (["ab", "--expert", "first=nan"], ["nan", "finite"]),
        (["ab", "--expert", "first=x"], ["'x'", "number"]),
        (["ab", "--expert", "frist"], ["no expert 'frist'", "first, second"]),
        (["ab", "--expert", "first", "--expert", "first=1"], ["named twice"]),
        (["ab", "--expert", "first=1", "--alpha", "1"], ["--alpha would do nothing"]),
        (["ab", "--temperature", "-1"], ["temperature"]),
        (["ab", "--top-k", "5"], ["top_k", "temperature is 0"]),
        (["ab", "--temperature", "1", "--top-p", "0"], ["top_p"]),
        (["ab", "--max-new-tokens", "0"], ["max_new_tokens"]),
        (["ab", "--min-new-tokens", "9", "--max-new-tokens", "3"], ["min_new_tokens"]),
        (["ab", "--stop", ""], ["stop"]),
        (["ab", "--seed", "-1"], ["seed"]),
        (["ab", "--logprobs", "101", "--json"], ["logprobs"]),
        (["ab", "--logit-bias", "x"], ["--logit-bias is 'x'", "a token id, an equals sign"]),
        (["ab", "--json", "--stream"], ["--json", "--stream"]),
        (["ab", "--logprobs", "2"], ["--json"]),
        (["ab", "--batch-size", "2"], ["--batch-size belongs to --input-file"]),
        (["ab", "--skip-bad-lines"], ["--skip-bad-lines belongs to --input-file"]),
        (["ab", "--output-file", "o"], ["--output-file belongs to --input-file"]),
        (["ab", "--input-file", "i", "--output-file", "o"], ["PROMPT and --input-file"]),
        (["--input-file", "i"], ["--output-file is not"]),
        (["--input-file", "i", "--output-file", "o", "--stream"], ["--stream"]),
        (["--input-file", "missing", "--output-file", "o"], ["missing cannot be read"]),
        (["--input-file", __file__, "--output-file", "o", "--batch-size", "0"], ["--batch-size"]),
    ],
)
def test_generate_refuses_what_cannot_be_meant_before_models_load(
    unloadable: Path, options: list[str], words: list[str]
):
    refused(run("generate", unloadable, *options), *words)


def test_an_empty_prompt_from_stdin_is_refused(unloadable: Path):
    for stdin in ("", "\n"):
        refused(run("generate", unloadable, "-", stdin=stdin), "the prompt is empty")
    refused(run("generate", unloadable, "-", stdin=b"\xff"), "stdin is not UTF-8")


def test_a_prompt_longer_than_a_context_names_the_model_and_both_lengths(recipe: Path):
    refused(run("generate", recipe, "a" * 300), "300 tokens", "base", "256")
    refused(run("generate", recipe, "a" * 200), "200 tokens", "128 new", "256")


@pytest.mark.parametrize("command", [["doctor"], ["generate", "ab"], ["chat"], ["score"]])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no recipe at"),
        ("", "JSON"),
        ("{", "JSON"),
        ('{"model_type": "llama"}', "llama"),
        ('{"model_type": "proxytune"}', "base"),
        ('{"model_type": "proxytune", "base": {"model": "a/b"}, "expert": []}', "expert"),
        ('{"model_type": "proxytune", "base": {"model": "a/b"}, "experts": []}', "experts"),
    ],
)
def test_a_recipe_that_is_missing_or_malformed_is_refused(
    tmp_path: Path, command: list[str], content: str | None, words: str
):
    directory = tmp_path / "broken"
    if content is not None:
        directory.mkdir()
        (directory / "config.json").write_text(content)
    if command == ["score"]:
        (tmp_path / "text").write_text("hello")
        command = ["score", "--text-file", str(tmp_path / "text")]
    refused(run(command[0], directory, *command[1:]), words)


# generate --input-file -----------------------------------------------------------------------------


@pytest.fixture
def input_file(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "prompt": "ab" * (1 + i)}) + "\n" for i in range(5))
    )
    return path


def test_a_file_of_prompts_becomes_a_file_of_answers(
    recipe: Path, input_file: Path, tmp_path: Path
):
    arguments = ["generate", recipe, "--input-file", input_file, "--output-file", tmp_path / "out",
                 "--max-new-tokens", "5", "--batch-size", "2"]  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0 and result.stdout == ""
    assert "5 lines; 25 tokens" in result.stderr and "tokens/s" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["id"] for line in lines] == [0, 1, 2, 3, 4]
    again = run(*arguments, "--json", "--speculative")
    assert "already complete" in again.stderr
    assert json.loads(again.stdout)["num_resumed"] == 5


def test_an_interrupted_file_is_continued_by_the_same_command(
    recipe: Path, input_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["generate", recipe, "--input-file", input_file, "--output-file", tmp_path / "out",
                 "--max-new-tokens", "5", "--batch-size", "2"]  # fmt: skip
    generate_batch = ProxyTuned.generate_batch
    calls = []

    def interrupted(self: ProxyTuned, *args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate_batch(self, *args, **options)

    monkeypatch.setattr(ProxyTuned, "generate_batch", interrupted)
    result = run(*arguments)
    assert result.exit_code == 130
    assert "the same command continues it" in result.stderr
    result = run(*arguments)
    assert result.exit_code == 0
    assert "5 lines (2 of them by an earlier run); 15 tokens" in result.stderr
    refused(run(*arguments, "--alpha", "0.5"), "started with other settings", "alpha")


def test_lines_added_to_the_input_during_a_run_are_noted(
    recipe: Path, input_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(*arguments: Any, **options: Any) -> ProxyTuned:
        with input_file.open("a") as file:
            file.write('{"prompt": "added"}\n')
        return toy_load(*arguments, **options)

    monkeypatch.setattr(ProxyTuned, "load", staticmethod(load))
    arguments = ["generate", recipe, "--input-file", input_file, "--output-file", tmp_path / "out",
                 "--max-new-tokens", "2"]  # fmt: skip
    num_lines = len(input_file.read_text().splitlines())
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    note = json.loads(result.stdout)["input_change"]
    assert note.startswith(f"{input_file} has grown") and f"note: {note}\n" in result.stderr
    assert len((tmp_path / "out").read_text().splitlines()) == num_lines
    monkeypatch.setattr(ProxyTuned, "load", staticmethod(toy_load))
    again = run(*arguments, "--json")
    assert json.loads(again.stdout)["input_change"] is None and "note:" not in again.stderr
    assert len((tmp_path / "out").read_text().splitlines()) == num_lines + 1


def test_a_malformed_line_is_named_or_left_out(recipe: Path, input_file: Path, tmp_path: Path):
    with input_file.open("a") as file:
        file.write("nonsense\n")
    arguments = ["generate", recipe, "--input-file", input_file, "--output-file", tmp_path / "out",
                 "--max-new-tokens", "5"]  # fmt: skip
    refused(run(*arguments), "line 6 of", "--skip-bad-lines")
    result = run(*arguments, "--skip-bad-lines")
    assert result.exit_code == 0
    assert "left out 1 bad line(s): 6" in result.stderr
    assert len((tmp_path / "out").read_text().splitlines()) == 5


def test_an_output_file_that_cannot_be_written_is_refused(
    unloadable: Path, input_file: Path, tmp_path: Path
):
    result = run(
        "generate", unloadable, "--input-file", input_file, "--output-file", tmp_path / "no" / "out"
    )
    refused(result, "cannot be written", "hint:")


# chat ----------------------------------------------------------------------------------------------


def talk(recipe: Path, *lines: str, options: tuple[str, ...] = ()) -> Result:
    return run(
        "chat", recipe, "--max-new-tokens", "8", *options, stdin="".join(f"{x}\n" for x in lines)
    )


def test_chat_answers_each_line_and_remembers_the_conversation(recipe: Path):
    result = talk(recipe, "hi", "", "and")
    assert result.exit_code == 0, result.output
    conversation = MODEL.chat(SamplingParams(max_new_tokens=8))
    expected = ["".join(s.text for s in conversation.say(text)) for text in ("hi", "and")]
    assert result.stdout == "".join(f"{answer}\n" for answer in expected)


def test_a_chat_says_how_messages_are_joined_where_the_base_has_no_chat_template(recipe: Path):
    assert "messages are joined as `User: …`" in talk(recipe, "hi").stderr


def test_variables_of_a_chat_template_must_be_an_object(recipe: Path):
    for given in ("[1]", "{", '{"messages": []}'):
        result = talk(recipe, "hi", options=("--chat-template-kwargs", given))
        assert result.exit_code == 2
        assert "template_kwargs" in result.stderr.replace("-", "_")
    options = ("--chat-template-kwargs", '{"enable_thinking": false}')
    assert talk(recipe, "hi", options=options).stdout == talk(recipe, "hi").stdout


def test_a_chat_with_drafts_is_the_chat_without(recipe: Path):
    lines = ("hi", "and", "/alpha 0.5", "so")
    plain = talk(recipe, *lines)
    assert talk(recipe, *lines, options=("--speculative",)).stdout == plain.stdout


def test_reset_forgets_all_but_the_system_message(recipe: Path):
    drawn = ("--temperature", "0.5", "--seed", "3")
    system = ("--system", "be brief", *drawn)
    once = talk(recipe, "hi", options=system).stdout
    assert talk(recipe, "hi", "/reset", "hi", options=system).stdout == 2 * once
    assert talk(recipe, "hi", "hi", options=system).stdout != 2 * once
    assert talk(recipe, "hi", options=drawn).stdout != once


def test_strength_and_expert_change_while_talking(recipe: Path):
    result = talk(
        recipe, "/alpha 0.25", "/expert second", "/expert second=2", "/expert none", "/expert first",
        "/alpha default", "/expert default", "/expert", "/alpha",
    )  # fmt: skip
    assert result.stderr.splitlines()[2:] == [
        "steered by first at alpha 0.25, second at alpha 0.25",
        "steered by second at alpha 0.25",
        "steered by second at alpha 2",
        "the base alone (alpha 0)",
        "steered by first at alpha 1",
        "steered by first at alpha 1",
        "steered by first at alpha 1, second at alpha 0.5",
        "experts: first, second; now steered by first at alpha 1, second at alpha 0.5",
        "steered by first at alpha 1, second at alpha 0.5",
    ]


def test_the_strength_that_is_set_is_the_one_that_answers(recipe: Path):
    result = talk(recipe, "/expert none", "hi")
    base = "".join(
        s.text for s in MODEL.chat(SamplingParams(max_new_tokens=8), alpha=0.0).say("hi")
    )
    assert result.stdout == base + "\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/alhpa 1", "/alhpa is not a command; the commands are"),
        ("/alpha x", "must be a number"),
        ("/alpha nan", "finite"),
        ("/alpha 1 2", "takes one number"),
        ("/expert third", "first, second"),
        ("/reset now", "takes no arguments"),
        ("/help", "/quit"),
        ("é", "no token"),
        ("a" * 300, "/reset forgets"),
    ],
)
def test_a_mistake_in_a_chat_is_answered_and_the_chat_goes_on(recipe: Path, line: str, words: str):
    result = talk(recipe, line, "hi")
    assert result.exit_code == 0, result.output
    assert words in result.stderr
    assert result.stdout == talk(recipe, "hi").stdout


def test_quit_ends_a_chat(recipe: Path):
    assert talk(recipe, "/quit", "hi").stdout == ""


def test_control_c_stops_the_answer_and_not_the_chat(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    job, steps_of = ProxyTuned.job, ProxyTuned._steps
    calls: list[Any] = []

    def asked(self: ProxyTuned, request: Request) -> Any:
        calls.append(request.prompt)
        return job(self, request)

    def interrupted(self: ProxyTuned, *args: Any) -> Any:
        steps = steps_of(self, *args)
        yield next(steps)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from steps

    monkeypatch.setattr(ProxyTuned, "job", asked)
    monkeypatch.setattr(ProxyTuned, "_steps", interrupted)
    result = talk(recipe, "hi", "and")
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert len(first) == 1 and len(second) == 8
    assert "stopped" in result.stderr
    assert calls[1][1] == {"role": "assistant", "content": first.strip()}


# score ---------------------------------------------------------------------------------------------

TEXT = "the quick brown fox jumps over the lazy dog. " * 12


def test_score_prints_a_row_for_each_model_and_strength(recipe: Path, tmp_path: Path):
    (tmp_path / "text").write_text(TEXT)
    result = run(
        "score", recipe, "--text-file", tmp_path / "text", "--alphas", "0,0.5", "--expert", "first"
    )
    assert result.exit_code == 0, result.output
    rows = [line.split()[0] for line in result.stdout.splitlines()]
    assert rows == ["model", "base", "first.expert", "first.anti_expert", "steered", "steered"]
    assert "tokens in" in result.stderr


def test_scores_as_json_are_the_librarys(recipe: Path, tmp_path: Path):
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT.encode()))
    result = run("score", recipe, "--text-file", tmp_path / "text.gz", "--json", "--window", "64")
    answer = json.loads(result.stdout)
    assert answer == json.loads(json.dumps(MODEL.score(TEXT, window=64).to_dict()))
    from_stdin = run("score", recipe, "--text-file", "-", "--json", "--window", "64", stdin=TEXT)
    assert json.loads(from_stdin.stdout) == answer


def test_a_window_is_at_most_the_smallest_context(recipe: Path, tmp_path: Path):
    (tmp_path / "text").write_text(TEXT)
    answer = json.loads(run("score", recipe, "--text-file", tmp_path / "text", "--json").stdout)
    assert answer["window"] == 256
    refused(run("score", recipe, "--text-file", tmp_path / "text", "--window", "257"), "256")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", [], "0 token"),
        (b"a", [], "longer text"),
        (b"\xff\xfe", [], "not UTF-8"),
        (TEXT.encode(), ["--alphas", "0,,1"], "must be a number"),
        (TEXT.encode(), ["--alphas", "nan"], "finite"),
        (TEXT.encode(), ["--window", "1"], "window is 1"),
        (TEXT.encode(), ["--expert", "third"], "first, second"),
        (None, [], "cannot be read"),
    ],
)
def test_score_refuses_what_cannot_be_scored(
    recipe: Path, tmp_path: Path, content: bytes | None, options: list[str], words: str
):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    refused(run("score", recipe, "--text-file", tmp_path / "text", *options), words)


def test_a_damaged_gz_file_is_refused(recipe: Path, tmp_path: Path):
    for content in (b"plain", gzip.compress(TEXT.encode())[:-20]):
        (tmp_path / "text.gz").write_bytes(content)
        refused(run("score", recipe, "--text-file", tmp_path / "text.gz"), "cannot be read")


# On real files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a base, a small model and an adapter on it, all random."""
    directory = tmp_path_factory.mktemp("models")
    tiny_model(directory / "base", seed=1, hidden_size=32)
    tiny_model(directory / "small", seed=2)
    tiny_adapter(directory / "small", directory / "adapter", seed=3)
    tiny_model(directory / "other", "gpt2", seed=4, hidden_size=24)
    return directory


def real(models: Path, directory: Path, **changes: Path) -> Path:
    parts = {
        "base": models / "base",
        "anti-expert": models / "small",
        "adapter": models / "adapter",
    }
    parts |= changes
    options = [x for name, path in parts.items() for x in (f"--{name}", path)]
    result = run("new", directory, *options, "--name", "e")
    assert result.exit_code == 0, result.output
    return directory


def test_new_then_doctor_then_generate_works_on_local_directories(models: Path, tmp_path: Path):
    recipe = real(models, tmp_path / "r")
    diagnosis = run("doctor", recipe, "--json")
    assert diagnosis.exit_code == 0, diagnosis.output
    report = json.loads(diagnosis.stdout)
    assert [m["part"] for m in report["models"]] == ["base", "e.expert", "e.anti_expert"]
    assert report["is_healthy"] and report["problems"] == []
    assert "No problems" in run("doctor", recipe).stdout
    result = run("generate", recipe, "the", "--max-new-tokens", "5", "--json", "--ignore-eos")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_new_tokens"] == 5


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda d: cut_off(d / "small" / "model.safetensors"), "CorruptModel"),
        (lambda d: (d / "small" / "model.safetensors").write_bytes(b"\xff" * 64), "CorruptModel"),
        (lambda d: (d / "small" / "model.safetensors").unlink(), "ModelNotFound"),
        (lambda d: cut_off(d / "adapter" / "adapter_model.safetensors"), "CorruptModel"),
    ],
    ids=["cut off", "overwritten", "without weights", "adapter cut off"],
)
def test_broken_models_are_refused_by_doctor_and_generate(
    models: Path, tmp_path: Path, break_it: Any, words: str
):
    import shutil

    shutil.copytree(models, tmp_path / "models")
    recipe = real(tmp_path / "models", tmp_path / "r")
    break_it(tmp_path / "models")
    diagnosis = run("doctor", recipe, "--json")
    assert diagnosis.exit_code == 2
    assert words in {p["error"] for p in json.loads(diagnosis.stdout)["problems"]}
    refused(run("generate", recipe, "the"), "error:")


def test_an_adapter_of_another_model_is_refused(models: Path, tmp_path: Path):
    recipe = real(models, tmp_path / "r", **{"anti-expert": models / "other"})
    diagnosis = run("doctor", recipe, "--json")
    assert diagnosis.exit_code == 2
    assert "AdapterMismatch" in {p["error"] for p in json.loads(diagnosis.stdout)["problems"]}
    refused(run("generate", recipe, "the"), "adapter")


def test_a_gguf_file_that_is_cut_off_is_refused(models: Path, tmp_path: Path):
    (tmp_path / "base.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 7)
    recipe = real(models, tmp_path / "r", base=tmp_path / "base.gguf")
    assert run("doctor", recipe).exit_code == 2
    refused(run("generate", recipe, "the"), "base.gguf")


def test_an_unknown_device_or_dtype_is_refused(models: Path, tmp_path: Path):
    recipe = real(models, tmp_path / "r")
    refused(run("generate", recipe, "the", "--dtype", "float23"), "float23", "float32")
    refused(run("generate", recipe, "the", "--device", "toaster"), "toaster")


# As a process --------------------------------------------------------------------------------------


def process(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a process of its own, after some code."""
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", f"{code}\nfrom proxytune.cli import main\nmain()", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "LC_ALL": "C",
             "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )  # fmt: skip


def test_a_mistake_ends_the_process_with_2_and_a_bug_with_a_traceback(tmp_path: Path):
    result = process("", "generate", tmp_path / "missing", "ab")
    assert result.returncode == 2
    assert result.stderr.startswith(b"error: no recipe at") and b"Traceback" not in result.stderr
    bug = "import proxytune.recipe.recipe\nproxytune.recipe.recipe.Recipe.read = None"
    result = process(bug, "generate", tmp_path / "missing", "ab")
    assert result.returncode == 1 and b"Traceback" in result.stderr


def test_text_that_the_locale_does_not_have_is_printed_all_the_same(tmp_path: Path):
    toy_recipe().write(tmp_path / "r")
    code = (
        "from proxytune.model import ProxyTuned\nfrom tests.support.toys import toy_load\n"
        "from proxytune.trace import Trace\n"
        "ProxyTuned.load = staticmethod(toy_load)\n"
        "ProxyTuned.generate_batch = lambda *a, **k: [Trace('\\u00e9\\U0001f600', 'stop', (), 1)]"
    )
    result = process(code, "generate", tmp_path / "r", "ab")
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode() == "é😀\n"


def test_help_takes_less_than_0_3_seconds_of_the_processor():
    """The processor's time, the least of three: the clock's depends on what else runs on the machine."""
    code = "import atexit, resource; atexit.register(lambda: print(sum(resource.getrusage(0)[:2])))"
    assert min(float(process(code, "--help").stdout.split()[-1]) for _ in range(3)) < 0.3


def completions(words: str, tmp_path: Path) -> list[str]:
    """Return what bash would offer for the last word."""
    completed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'proxytune'; from proxytune.cli import main; main()",
        ],
        env={
            **os.environ,
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
            "_PROXYTUNE_COMPLETE": "complete_bash",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stderr == ""
    return completed.stdout.split()


def test_the_shell_completes_commands_options_and_the_recipes_experts(tmp_path):
    toy_recipe({"first": 1.0, "second": 0.5}).write(tmp_path / "r")
    assert completions("proxytune sc", tmp_path) == ["score"]
    assert completions("proxytune chat --llama", tmp_path) == ["--llama-cpp"]
    assert completions("proxytune generate r hello --expert ", tmp_path) == ["first", "second"]
    assert completions("proxytune generate r hello --expert s", tmp_path) == ["second"]
    assert completions("proxytune generate missing hello --expert s", tmp_path) == []


def test_the_help_lists_the_commands_in_their_usual_order():
    """A command that imports another one's module registers it first, as tests do that import one alone."""
    program = [sys.executable, "-m", "proxytune", "--help"]
    output = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^  ([a-z][a-z-]*)  ", output.split("Commands:")[1], re.MULTILINE)
    assert listed == [
        "new", "doctor", "make-proxy", "export-gguf", "generate", "chat", "serve", "tune", "fit", "bake",
        "score", "eval", "grade", "sweep", "rank-experts", "explain", "analyze", "bench", "demo",
    ]  # fmt: skip
