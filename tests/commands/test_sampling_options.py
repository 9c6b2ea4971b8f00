"""Every sampling option arrives from every door, and is refused alike: flags, lines of a file, HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import httpx2 as httpx
import pytest
from typer.testing import CliRunner, Result

from proxytune import cli
from proxytune.errors import InvalidRequest
from proxytune.evaluate.plan import EvalOptions
from proxytune.model import ProxyTuned
from proxytune.request import FILTERS, Request, SamplingParams
from proxytune.server.engine import Engine
from proxytune.server.schema import API_OPTIONS, ChatRequest, CompletionRequest
from proxytune.server.settings import ServerSettings
from proxytune.server.turns import Ticket
from proxytune.settings import Declared, options_of
from proxytune.testing import toy_model, toy_recipe
from proxytune.tune.settings import TuneSettings
from tests.support.served import Served, served
from tests.support.toys import toy_load

OPTIONS = options_of(SamplingParams)
HTTP_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
TAKEN_BY_THE_API = {
    ("top_k", -1),
    ("seed", -1),
    ("top_p", 0.0),
    ("stop", ("",)),
    ("max_new_tokens", 0),
}
"""What the API takes beyond the library's limits: -1 for "keep all", any 64-bit seed, and what clients send
where they mean the likeliest token, no stop string, or no new text."""


def inside(declared: Declared) -> Any:
    """Return a value other than the default that every door takes."""
    kind = declared.type
    if kind is bool:
        return not declared.default
    if get_origin(kind) is not tuple:
        return 3 if kind is int else 0.5
    item = get_args(get_args(kind)[0])
    if item[0] is str:
        return ("q", "xy")
    return ((2, 0.5), (3, -1.5)) if len(item) == 2 and get_origin(item[0]) else (2, 3)


def outside(declared: Declared) -> list[Any]:
    """Return values just beyond each limit."""
    kind, option = declared.type, declared.option
    if get_origin(kind) is tuple:
        value = inside(declared)[0]
        if isinstance(value, str):
            return [("",)]
        return [((2, 1e5),), ((-1, 0.5),)] if isinstance(value, tuple) else [(-1,)]
    found = [option.above, option.below]
    found += [None if option.at_least is None else option.at_least - 1]
    found += [None if option.at_most is None else option.at_most + 1]
    return [kind(value) for value in found if value is not None]


def flags(name: str, value: Any) -> list[str]:
    """Return an option as the command line takes it."""
    flag = OPTIONS[name].option.flag or "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag]
    values = value if isinstance(value, tuple) else [value]
    texts = ["=".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]
    return [word for text in texts for word in (flag, text)]


def as_json(value: Any) -> Any:
    """Return an option as JSON holds it."""
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        return {str(token_id): bias for token_id, bias in value}
    return list(value) if isinstance(value, tuple) else value


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """Return what reaches the model, in the order in which it does."""
    found: list[SamplingParams] = []
    job = ProxyTuned.job

    def record(self: ProxyTuned, request: Request, *more: Any) -> Any:
        found.append(request.sampling)
        return job(self, request, *more)

    monkeypatch.setattr(ProxyTuned, "job", record)
    monkeypatch.setattr(ProxyTuned, "load", staticmethod(toy_load))
    return found


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    toy_recipe({"first": 1.0}).write(tmp_path / "recipe")
    return tmp_path / "recipe"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(toy_model(memory=0.5, eos_logit=-100.0, max_context=256)) as running:
        yield running


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run_line(recipe: Path, options: dict[str, Any]) -> Result:
    """Answer a file of one line with these options."""
    source, output = recipe.parent / "in.jsonl", recipe.parent / "out.jsonl"
    source.write_text(json.dumps({"prompt": "ab", "options": options}) + "\n")
    return run("generate", recipe, "--input-file", source, "--output-file", output)


def post(server: Served, options: dict[str, Any]) -> httpx.Response:
    fields = {HTTP_NAMES.get(name, name): as_json(value) for name, value in options.items()}
    body = {"model": "toy", "prompt": "ab", "max_tokens": 4} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def beside(name: str) -> dict[str, Any]:
    """Return the options without which this one would contradict another, and few tokens."""
    needed = {"temperature": 1.0} if name in (*FILTERS, "seed") else {}
    return needed if name == "max_new_tokens" else needed | {"max_new_tokens": 4}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_sampling_option_arrives_from_the_command_line(name, recipe, seen):
    value = inside(OPTIONS[name])
    own = [word for item in beside(name).items() for word in flags(*item)]
    result = run("generate", recipe, "ab", "--json", *own, *flags(name, value))
    assert result.exit_code == 0, result.output
    assert seen and all(getattr(sampling, name) == value for sampling in seen)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_sampling_option_arrives_from_a_line_of_a_file(name, recipe, seen):
    value = inside(OPTIONS[name])
    result = run_line(recipe, beside(name) | {name: as_json(value)})
    assert result.exit_code == 0, result.output
    assert seen and all(getattr(sampling, name) == value for sampling in seen)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_sampling_option_arrives_over_http(name, server, monkeypatch):
    value = inside(OPTIONS[name])
    found: list[SamplingParams] = []
    submit = Engine.submit

    def record(self: Engine, tickets: Sequence[Ticket]) -> None:
        found.extend(ticket.job.sampling for ticket in tickets)
        submit(self, tickets)

    monkeypatch.setattr(Engine, "submit", record)
    answer = post(server, beside(name) | {name: value})
    assert answer.status_code == 200, answer.text
    assert [getattr(sampling, name) for sampling in found] == [value]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in OPTIONS for value in outside(OPTIONS[name])]
)
def test_a_value_beyond_its_limits_is_refused_at_every_door(name, value, recipe, server, seen):
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**{name: value})
    assert str(refusal.value).startswith(f"{name} is {value!r}, and must be ")
    on_command_line = run("generate", recipe, "ab", "--json", *flags(name, value))
    assert on_command_line.exit_code == 2
    in_line = run_line(recipe, {name: as_json(value)})
    assert in_line.exit_code == 2
    for result in (on_command_line, in_line):
        assert str(refusal.value) in result.stderr and "Traceback" not in result.stderr
    if (name, value) not in TAKEN_BY_THE_API:
        answer = post(server, {name: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(HTTP_NAMES.get(name, name))
    assert not seen or (name, value) in TAKEN_BY_THE_API


@pytest.mark.parametrize("name", [name for name in OPTIONS if OPTIONS[name].type is bool])
def test_a_switch_is_true_or_false_and_nothing_that_looks_like_it(name, recipe, server, seen):
    for value in (1, "yes"):
        assert (
            f"{name} is {value!r}, and must be true or false"
            in run_line(recipe, {name: value}).stderr
        )
        assert post(server, {name: value}).status_code == 400
    assert not seen


def test_an_option_that_the_api_does_not_know_is_a_field_of_both_requests():
    for request in (CompletionRequest, ChatRequest):
        assert request.model_fields.keys() >= OPTIONS.keys() - API_OPTIONS
        for name in OPTIONS.keys() - API_OPTIONS:
            assert request.model_fields[name].description == OPTIONS[name].option.help


@pytest.mark.parametrize("settings", [SamplingParams, TuneSettings, EvalOptions, ServerSettings])
def test_a_default_is_within_its_own_limits(settings):
    """`check` passes over defaults, so that a request costs little."""
    for declared in options_of(settings).values():
        assert declared.option.help and not declared.option.help.endswith(".")
        if declared.default is MISSING or (declared.default is None and declared.is_optional):
            continue
        value = declared.default
        fresh = Declared(
            declared.name, declared.type, declared.is_optional, MISSING, declared.option
        )
        fresh.check(value)


@pytest.mark.parametrize(
    ("command", "settings"),
    [("tune", TuneSettings), ("eval", EvalOptions), ("serve", ServerSettings)],
)
def test_a_command_has_a_flag_for_every_option_of_its_settings(command, settings):
    text = run(command, "--help").stdout
    for name, declared in options_of(settings).items():
        flag = declared.option.flag or "--" + name.replace("_", "-")
        assert f"  {flag.split('/')[0]}" in text
        if get_origin(declared.type) is Literal:
            assert all(value in text for value in get_args(declared.type))
