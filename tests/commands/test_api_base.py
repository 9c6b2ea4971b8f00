"""A base behind an API from the command line, on tiny models and a server over one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.cli import app
from proxytune.errors import RecipeError, UnsupportedModel
from proxytune.grants import Grants
from proxytune.loading.doctor import examine
from proxytune.loading.load import load_ensemble
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ApiSettings, ExpertSpec, ModelSpec
from proxytune.request import SamplingParams
from proxytune.server.settings import read_keys
from tests.support.completion_server import VLLM, CompletionServer
from tests.support.hostile_server import HostileServer, bomb, json_answer
from tests.support.tiny import NUM_TOKENS, tiny_adapter, tiny_model

TRAITS = replace(VLLM, max_top_logprobs=None)
PROMPT = "the otter and the rain"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch, tmp_path) -> None:
    """Leave no key and no settings file of this machine's user in reach."""
    monkeypatch.delenv("PROXYTUNE_API_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_model(root / "base", "llama", seed=1, hidden_size=24, max_context=512)
    tiny_model(root / "small", "llama", seed=2, max_context=512)
    tiny_adapter(root / "small", root / "adapter", seed=4)
    return root


@pytest.fixture(scope="module")
def server(models) -> Iterator[CompletionServer]:
    files = find_checkpoint("base", root=models)
    backend = TransformersBackend.load(files, ModelSpec(model="base"))
    with CompletionServer(
        backend, files.tokenizer, traits=TRAITS, eos_token_ids=list(files.eos_token_ids)
    ) as running:
        yield running
    assert not running.failures


@pytest.fixture
def recipe(models, server, tmp_path) -> Path:
    """Write what `proxytune new` writes for the server."""
    target = tmp_path / "recipe"
    run("new", target, "--base", server.url, "--anti-expert", models / "small", "--adapter",
        models / "adapter", "--name", "tuned")  # fmt: skip
    # Random models find all tokens about as likely, so that a part of them would prove little.
    content = json.loads((target / "config.json").read_text())
    content["base"]["api"]["top_logprobs"] = NUM_TOKENS
    (target / "config.json").write_text(json.dumps(content))
    return target


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Run a command and return what it wrote to stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.stderr)
    return result.stdout, result.stderr


def in_process(models: Path) -> ProxyTuned:
    return ProxyTuned.load(
        Recipe(
            base=ModelSpec(model="base"),
            experts=(ExpertSpec("tuned", ModelSpec(adapter="adapter"), ModelSpec(model="small")),),
            directory=models,
        )
    )


def test_new_writes_an_address_and_no_key(models, server, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    target = tmp_path / "recipe"
    run("new", target, "--base", server.url, "--base-name", "base", "--key-env", "SOME_KEY",
        "--anti-expert", models / "small", "--adapter", models / "adapter")  # fmt: skip
    content = (target / "config.json").read_text()
    assert json.loads(content)["base"]["api"] == {"model": "base", "key_env": "SOME_KEY"}
    assert "sk-secret" not in content
    _, error = run("new", tmp_path / "other", "--base", models / "base", "--key-env", "SOME_KEY",
                   "--anti-expert", models / "small", "--adapter", models / "adapter", code=2)  # fmt: skip
    assert "for an API" in error


def test_doctor_says_what_the_server_shows(recipe, server):
    text = " ".join(run("doctor", recipe)[0].split())
    assert "serves base at completions" in text
    assert "takes token ids" in text
    assert "scores a given text (prompt_logprobs)" in text
    report = json.loads(run("doctor", recipe, "--json")[0])
    assert report["is_healthy"]
    assert report["models"][0]["api"]["takes_token_ids"]


def asking_for(models: Path, url: str, key_env: str | None) -> Recipe:
    """Return a recipe as a stranger could write it."""
    settings = ApiSettings(model="base", key_env=key_env, max_retries=0)
    return Recipe(
        base=ModelSpec(model=url, api=settings),
        experts=(ExpertSpec("tuned", ModelSpec(adapter="adapter"), ModelSpec(model="small")),),
        directory=models,
    )


@pytest.fixture
def hostile() -> Iterator[HostileServer]:
    with HostileServer(json_answer({"error": {"message": "no"}}, 404)) as running:
        yield running


def test_a_recipe_that_asks_for_a_secret_gets_none(models, hostile, tmp_path, monkeypatch):
    """`doctor` used to send it, in the clear."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    asking_for(models, hostile.url, "AWS_SECRET_ACCESS_KEY").write(tmp_path / "recipe")
    text = " ".join(run("doctor", tmp_path / "recipe", code=2)[0].split())
    assert f"asks to send the key in AWS_SECRET_ACCESS_KEY to {hostile.host}" in text
    assert "--key-env AWS_SECRET_ACCESS_KEY" in text
    _, error = run("generate", tmp_path / "recipe", "hello", code=2)
    assert "AWS_SECRET_ACCESS_KEY" in error and "a-secret" not in error + text
    assert not hostile.requests


@pytest.mark.parametrize("way", ["flag", "settings"])
def test_what_the_refusal_says_to_type_sends_the_key(models, hostile, tmp_path, monkeypatch, way):
    monkeypatch.setenv("A_KEY", "a-secret")
    asking_for(models, hostile.url, "A_KEY").write(tmp_path / "recipe")
    _, error = run("generate", tmp_path / "recipe", "hello", code=2)
    hint = error[error.index("hint:") :]
    flags = hint[hint.index("--key-env") :].split()[:2]
    if way == "settings":
        line, path = hint[hint.index("{") :].rsplit(" in ", 1)
        Path(path.strip()).parent.mkdir(parents=True)
        Path(path.strip()).write_text(line)
        flags = []
    run("generate", tmp_path / "recipe", "hello", *flags, code=2)
    assert {head["Authorization"] for _, head in hostile.requests} == {"Bearer a-secret"}


def test_doctor_sends_no_key_without_consent(models, hostile, monkeypatch):
    monkeypatch.setenv("A_KEY", "a-secret")
    recipe = asking_for(models, hostile.url, "ANOTHER_KEY")
    found = examine(recipe, ask_server=True, key_env="A_KEY")
    assert found.is_healthy and not hostile.requests
    (note,) = (note for note in found.notes if "A_KEY" in note)
    assert note.startswith(f"base: the key in A_KEY is sent to {hostile.host} when the recipe runs")
    assert "the recipe asks for the one in ANOTHER_KEY, which is not sent" in note
    assert "--ask-server" in note
    found = examine(recipe, ask_server=True, send_key=True, key_env="A_KEY")
    assert [type(problem.error) for problem in found.problems] == [UnsupportedModel]
    assert {head["Authorization"] for _, head in hostile.requests} == {"Bearer a-secret"}


def test_doctor_asks_a_server_that_gets_no_key_and_says_so(models, hostile):
    found = examine(asking_for(models, hostile.url, None), ask_server=True)
    assert f"base: no key is sent to {hostile.host}." in found.notes
    assert hostile.requests and not found.is_healthy
    assert all("Authorization" not in head for _, head in hostile.requests)


def test_doctor_says_which_key_goes_where_though_a_tokenizer_is_missing(models, monkeypatch):
    recipe = replace(
        asking_for(models, "http://127.0.0.1:9/v1", "A_KEY"), directory=Path("/nowhere")
    )
    found = examine(recipe, ask_server=True)
    assert any("asks to send the key in A_KEY" in str(each.error) for each in found.problems)


def test_a_server_sends_its_clients_key_nowhere(models, hostile, monkeypatch):
    monkeypatch.setenv("PROXYTUNE_API_KEY", "the-key-of-the-clients")
    read_keys(None)
    with pytest.raises(UnsupportedModel):
        load_ensemble(asking_for(models, hostile.url, None))
    assert {head.get("Authorization") for _, head in hostile.requests} == {None}


def test_loading_sends_the_key_that_the_caller_names(models, hostile, monkeypatch):
    monkeypatch.setenv("A_KEY", "a-secret")
    with pytest.raises(UnsupportedModel):
        load_ensemble(asking_for(models, hostile.url, "A_KEY"), grants=Grants(key_env="A_KEY"))
    assert {head["Authorization"] for _, head in hostile.requests} == {"Bearer a-secret"}


@pytest.mark.parametrize("command", ["doctor", "generate"])
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (json_answer(b'{"data":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "lists and objects"),
        (json_answer(bomb(64 * 2**20), Content_Encoding="gzip"), "more than"),
        (json_answer({"usage": {"prompt_tokens": "lots"}, "choices": []}), "'lots'"),
        (json_answer({}, 503, Retry_After="300"), "another one in 300 s would pass the limit"),
        (json_answer({"error": "\x1b]0;title\x07"}, 400), r"\x1b]0;title\x07"),
    ],
    ids=["deep", "gzip", "usage", "retry", "esc"],
)
def test_a_hostile_server_ends_in_a_message(models, hostile, tmp_path, command, answer, error):
    hostile.respond = answer
    asking_for(models, hostile.url, None).write(tmp_path / "recipe")
    arguments = [command, tmp_path / "recipe", *(["hello"] if command == "generate" else [])]
    is_refused = "x1b" in error or command == "doctor"
    out, said = run(*arguments, code=2 if is_refused else 1)
    assert error in " ".join((out + said).split())
    assert "\x1b" not in out + said


def test_doctor_says_that_nothing_answers(models, tmp_path):
    target = tmp_path / "recipe"
    settings = ApiSettings(max_retries=0, timeout_s=1.0)
    Recipe(
        base=ModelSpec(model="http://127.0.0.1:9/v1", api=settings),
        experts=(ExpertSpec("tuned", ModelSpec(adapter="adapter"), ModelSpec(model="small")),),
        directory=models,
    ).write(target)
    text, _ = run("doctor", target, code=2)
    assert "ApiError" in text and "gave no answer in 1 tries" in text
    _, error = run("generate", target, "hello", code=1)
    assert "check that the server runs" in error


def test_generate_gives_the_text_of_a_base_that_runs_here(recipe, models):
    sampling = SamplingParams(max_new_tokens=20)
    wanted = in_process(models).generate(PROMPT, sampling)
    out, error = run("generate", recipe, PROMPT, "--max-new-tokens", 20, "--no-stream")
    assert out.rstrip("\n") == wanted.text.rstrip("\n")
    assert "calls" in error and "100 % certified" in error
    found = json.loads(run("generate", recipe, PROMPT, "--max-new-tokens", 20, "--json")[0])
    assert found["token_ids"] == list(wanted.token_ids)
    assert found["num_certified"] == 20
    assert 0 < found["num_calls"] < 20 and found["num_recut"] == 0


def test_a_spent_budget_keeps_the_text(recipe):
    out, error = run("generate", recipe, PROMPT, "--max-new-tokens", 200, "--ignore-eos",
                     "--max-calls", 9, "--json", code=1)  # fmt: skip
    kept = json.loads(out)
    assert kept["finish_reason"] == "failed" and kept["num_new_tokens"] > 0
    assert "budget of 9 calls" in error
    _, error = run("generate", recipe, PROMPT, "--max-cost", "1", code=2)
    assert "no prices" in error


def test_budgets_are_refused_for_a_base_that_runs_here(models, tmp_path):
    in_process(models).recipe.write(tmp_path / "local")
    _, error = run("generate", tmp_path / "local", "a", "--max-calls", 3, code=2)
    assert "runs here" in error


def test_a_choice_is_that_of_a_base_that_runs_here(recipe, models):
    options = (" a", " the", "in")
    wanted = in_process(models).choose(PROMPT, options)
    arguments = [part for option in options for part in ("--choice", option)]
    found = json.loads(run("generate", recipe, PROMPT, *arguments, "--json")[0])
    assert found["choice"] == wanted.option and found["is_certified"]
    assert list(found["probs"].values()) == pytest.approx(wanted.probs, abs=1e-4)
    _, error = run("generate", recipe, PROMPT, "--choice", "the", "--choice", "then", code=2)
    assert "begin with different tokens" in error


def test_scores_are_those_of_a_base_that_runs_here(recipe, models, tmp_path):
    text = "the otter ran into the rain and the rain again. " * 6
    (tmp_path / "text.txt").write_text(text)
    rows = json.loads(run("score", recipe, "--text-file", tmp_path / "text.txt", "--json")[0])[
        "rows"
    ]
    wanted = in_process(models).score(text).to_dict()["rows"]
    for row, other in zip(rows, wanted, strict=True):
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-3)


def test_a_chat_remembers(recipe, models):
    sampling = SamplingParams(max_new_tokens=8)
    one, other = (
        model.chat(sampling, alpha=0.5) for model in (ProxyTuned.load(recipe), in_process(models))
    )
    for text in ("the rain", "and again"):
        said = [[step.token_id for step in talk.say(text)] for talk in (one, other)]
        assert said[0] == said[1]


def test_what_a_server_decides_cannot_be_set_here(server):
    for setting in ({"dtype": "float32"}, {"device": "cpu"}, {"revision": "main"}):
        with pytest.raises(RecipeError, match="whose server decides"):
            ModelSpec(model=server.url, **setting)
    with pytest.raises(RecipeError, match="must hold no secrets"):
        ModelSpec(model="http://user:word@localhost/v1")
    with pytest.raises(RecipeError, match="must never hold the key itself"):
        ApiSettings(key_env="sk-12345-abc")
    with pytest.raises(RecipeError, match="only a base may be"):
        ExpertSpec("a", ModelSpec(model=server.url), ModelSpec(model="small"))


def test_training_against_an_api_is_refused(models, server):
    with pytest.raises((RecipeError, UnsupportedModel)):
        find_checkpoint(server.url, root=models)
