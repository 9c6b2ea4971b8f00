"""The middleware before vLLM's server, with a stand-in for vLLM that answers with the body it gets.

`tests/integrations/vllm/test_plugin.py` has the same before vLLM itself.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.testclient import TestClient

from proxytune.integrations.vllm import request as plugin
from proxytune.integrations.vllm.request import Menu
from proxytune.model import ProxyTuned
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request as LibraryRequest
from proxytune.request import SamplingParams
from proxytune.server.vllm import CHATS, MAX_BODY_BYTES, TEXTS, UNSTEERED, RequestLanguage
from proxytune.text.prompts import PLAIN_USER_TURN
from tests.support.tiny import tiny_adapter, tiny_model, tiny_tokenizer

STEERED = (*TEXTS, *CHATS)
OTHERS = ("/inference/v1/generate", "/cohere/v2/chat")
TEMPLATE = "Q: {{ prompt }}\nA:"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    tiny_model(directory / "base", seed=1)
    tiny_model(directory / "small", seed=2)
    for seed, name in enumerate(("one", "two"), start=3):
        tiny_adapter(directory / "small", directory / name, seed=seed)
    return directory


def recipe_of(place: Path, *, policy: Policy | None = None, **formats: str) -> Recipe:
    small = ModelSpec(model="small", **formats)
    experts = tuple(
        ExpertSpec(name, ModelSpec(adapter=name, **formats), small, alpha)
        for name, alpha in (("one", 1.0), ("two", 0.5))
    )
    base = ModelSpec(model="base", **formats)
    return Recipe(base, experts, policy or Policy(), directory=place)


def client_of(menu: Menu | None, monkeypatch: pytest.MonkeyPatch, *, key: str = "") -> TestClient:
    """Return a client of a stand-in for vLLM, which asks for a key as vLLM does: inside the middleware."""
    monkeypatch.setattr(plugin, "MENU", menu)
    app = FastAPI()

    async def echo(request: Request) -> Any:
        try:
            return json.loads(await request.body())
        except (ValueError, RecursionError):
            raise HTTPException(422, "vLLM: not JSON") from None
        except Exception as error:  # as FastAPI does where a route's body is declared
            raise HTTPException(400, "There was an error parsing the body") from error

    for path in (*STEERED, *UNSTEERED, *OTHERS, "/invocations"):
        app.add_api_route(path, echo, methods=["POST"])

    if key:

        @app.middleware("http")
        async def check_key(request: Request, call_next: Any) -> Any:
            if request.headers.get("Authorization") != f"Bearer {key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await call_next(request)

    app.state.args = SimpleNamespace(served_model_name=["r", "r:one", "r:two"], model="x")
    config = SimpleNamespace(max_model_len=192, max_logprobs=20)
    app.state.vllm_config = SimpleNamespace(model_config=config)
    app.add_middleware(RequestLanguage)
    return TestClient(app)


@pytest.fixture
def client(place, monkeypatch):
    with client_of(Menu(recipe_of(place)), monkeypatch) as started:
        yield started


CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"proxytune": {"alpha": 0.5}}, {"vllm_xargs": {"alpha": 0.5}}),
    ({"proxytune": {"expert": "two"}}, {"vllm_xargs": {"expert": ["two"]}}),
    (
        {"proxytune": {"experts": {"one": 0.25, "two": 1}}},
        {"vllm_xargs": {"expert": ["one=0.25", "two=1.0"]}},
    ),
    (
        {"proxytune": {"policy": "gate_sure", "combine": "union"}},
        {"vllm_xargs": {"policy": "gate_sure", "combine": "union"}},
    ),
    ({"proxytune": {"policy": {"clip": 2}}}, {"vllm_xargs": {"policy": '{"clip": 2}'}}),
    (
        {"proxytune": {"alpha": 1}, "vllm_xargs": {"session_id": "s"}},
        {"vllm_xargs": {"session_id": "s", "alpha": 1.0}},
    ),
    (
        {"proxytune": {"alpha": 1, "explain": False, "explain_top": 3}},
        {"vllm_xargs": {"alpha": 1.0}},
    ),
    ({"proxytune": None}, {"vllm_xargs": None}),
    ({"proxytune": {"alpha": None, "expert": None, "policy": None}}, {"vllm_xargs": None}),
    ({"vllm_xargs": {"alpha": None, "session_id": "s"}}, {"vllm_xargs": {"session_id": "s"}}),
    ({"model": "r:two"}, {"model": "r", "vllm_xargs": {"expert": ["two"]}}),
    (
        {"model": "r:two", "proxytune": {"alpha": 2, "expert": "two"}},
        {"model": "r", "vllm_xargs": {"alpha": 2.0, "expert": ["two"]}},
    ),
]
KEPT: list[dict[str, Any]] = [
    {},
    {"model": "r"},
    {"model": None},
    {"model": "another"},  # vLLM knows other names, and which there are
    {"vllm_xargs": None},
    {"vllm_xargs": {"alpha": 0.5, "expert": ["two"], "session_id": "s"}},
    {"vllm_xargs": 3},
    {"prompt": 3, "stop": 4, "unknown": [1]},
]


@pytest.mark.parametrize("path", [*STEERED, "/invocations"])
@pytest.mark.parametrize(("asked", "told"), CHANGES, ids=lambda each: json.dumps(each)[:60])
def test_a_request_tells_vllm_how_it_is_steered(client, path, asked, told):
    body = {"model": "r", "n": 1} | asked
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    wanted = {"model": "r", "n": 1} | told
    assert {key: answer.json()[key] for key in wanted} == wanted
    assert "proxytune" not in answer.json()


@pytest.mark.parametrize("path", STEERED)
@pytest.mark.parametrize("body", KEPT, ids=lambda each: json.dumps(each)[:60])
def test_what_is_not_ours_stays_as_it_is(client, path, body):
    answer = client.post(path, json=body)
    assert (answer.status_code, answer.json()) == (200, body)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"proxytune"', b"\xff", b'{"proxytune": ' * 3000, b"1" * 5000, b"null"],
    ids=lambda each: repr(each[:20]),
)
def test_what_is_no_json_object_is_left_for_vllm_to_refuse(client, body):
    answer = client.post("/v1/completions", content=body)
    assert answer.status_code in (200, 422)
    assert "proxytune" not in answer.text or answer.json() == "proxytune"


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"proxytune": 3}, "proxytune", "an object"),
    ({"proxytune": []}, "proxytune", "an object"),
    ({"proxytune": {"alpha": "x"}}, "proxytune.alpha", "alpha"),
    ({"proxytune": {"alpha": 1e9}}, "proxytune.alpha", "alpha"),
    ({"proxytune": {"strength": 1}}, "proxytune.strength", "strength"),
    ({"proxytune": {"policy": "x"}}, "proxytune.policy", "policy is 'x'"),
    (
        {"proxytune": {"policy": {"schedule": [[0, 1], [9, 0]]}}},
        "proxytune",
        "policy has a schedule",
    ),
    ({"proxytune": {"combine": 3}}, "proxytune.combine", "combine is 3"),
    ({"proxytune": {"expert": "three"}}, "proxytune", "no expert 'three'"),
    ({"proxytune": {"experts": {"one": 1}, "alpha": 1}}, "proxytune", "strengths of their own"),
    ({"proxytune": {"explain": True}}, "proxytune.explain", "explain cannot be honoured by vLLM"),
    ({"proxytune": {"alpha": 1}, "vllm_xargs": {"alpha": 2}}, "vllm_xargs", "one strength"),
    ({"proxytune": {"alpha": 1}, "vllm_xargs": 3}, "vllm_xargs", "an object"),
    ({"vllm_xargs": {"alpha": "x"}}, "vllm_xargs", "alpha is 'x'"),
    ({"vllm_xargs": {"experts": "one"}}, "vllm_xargs", "experts is not a field"),
    ({"vllm_xargs": {"policy": "{"}}, "vllm_xargs", "not JSON"),
    ({"model": "r:two", "proxytune": {"expert": "one"}}, "proxytune", "one expert"),
    ({"model": "r:two", "use_beam_search": True}, "use_beam_search", "use_beam_search"),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(("asked", "param", "said"), WRONG, ids=lambda each: json.dumps(each)[:60])
def test_a_wrong_steering_is_answered_with_the_name_of_its_field(client, path, asked, param, said):
    answer = client.post(path, json={"model": "r"} | asked)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"]


def test_a_refusal_on_the_anthropic_route_is_in_its_form(client):
    answer = client.post("/v1/messages", json={"model": "r", "proxytune": {"alpha": "x"}})
    assert answer.status_code == 400
    error = answer.json()
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert "alpha" in error["error"]["message"]


def test_a_name_of_an_expert_that_is_not_served_is_not_found(client):
    answer = client.post("/v1/completions", json={"model": "r:three"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


@pytest.mark.parametrize("path", OTHERS)
@pytest.mark.parametrize("body", [{"proxytune": {"alpha": 1}}, {"model": "r:one"}], ids=str)
def test_a_route_that_cannot_be_steered_says_so(client, path, body):
    answer = client.post(path, json={"model": "r"} | body)
    assert answer.status_code == 400 and path in answer.json()["error"]["message"]
    assert client.post(path, json={"model": "r"}).status_code == 200


@pytest.mark.parametrize("path", UNSTEERED)
def test_where_steering_changes_nothing_every_name_is_taken(client, path):
    assert client.post(path, json={"model": "r:one"}).json() == {"model": "r:one"}


def test_a_body_beyond_the_limit_is_not_kept(client):
    answer = client.post("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413


def test_a_process_that_serves_another_model_changes_nothing(monkeypatch):
    with client_of(None, monkeypatch) as client:
        body = {"model": "x", "proxytune": 3}
        assert client.post("/v1/completions", json=body).json() == body
        assert client.get("/v1/proxytune").status_code == 404


def test_where_requests_cannot_choose_they_are_told_why(place, monkeypatch):
    menu = Menu(recipe_of(place), is_fixed="the reason")
    with client_of(menu, monkeypatch) as client:
        answer = client.post("/v1/completions", json={"proxytune": {"alpha": 1}})
        assert answer.status_code == 400 and "the reason" in answer.json()["error"]["message"]
        assert client.post("/v1/completions", json={"proxytune": {}}).status_code == 200
        assert client.get("/v1/proxytune").json()["fixed"] == "the reason"


def test_the_recipe_is_described_as_the_local_server_does(client):
    about = client.get("/v1/proxytune").json()
    assert about["name"] == "r" and about["base"] == "base"
    assert about["experts"] == [{"name": "one", "alpha": 1.0}, {"name": "two", "alpha": 0.5}]
    assert about["default_experts"] == ["one", "two"]
    assert about["limits"]["max_context"] == 192
    assert about["has_chat"] and "fixed" not in about


def test_what_needs_a_key_still_does(place, monkeypatch):
    """vLLM checks the key inside this middleware, so nothing may be answered or refused before that."""
    with client_of(Menu(recipe_of(place)), monkeypatch, key="k" * 16) as client:
        wrong = {"proxytune": {"alpha": "x"}}
        assert client.post("/v1/completions", json=wrong).status_code == 401
        assert client.get("/v1/proxytune").status_code == 401
        headers = {"Authorization": "Bearer " + "k" * 16}
        assert client.post("/v1/completions", json=wrong, headers=headers).status_code == 400
        assert client.get("/v1/proxytune", headers=headers).status_code == 200


# Texts and chats ----------------------------------------------------------------------------------------


def test_a_text_is_left_to_vllm_where_it_reads_it_as_the_library_does(client):
    assert client.post("/v1/completions", json={"prompt": "ab"}).json() == {"prompt": "ab"}


@pytest.mark.parametrize("text", [TEMPLATE, "chat"])
def test_a_text_is_sent_as_the_tokens_that_the_library_sends(place, monkeypatch, text):
    recipe = recipe_of(place, prompt=text)
    library = ProxyTuned.load(recipe)

    def ids(prompt: str) -> list[int]:
        return list(
            library.job(LibraryRequest(prompt, SamplingParams(max_new_tokens=1))).prompts[0]
        )

    with client_of(Menu(recipe), monkeypatch) as client:
        for path in TEXTS:
            assert client.post(path, json={"prompt": "ab"}).json()["prompt"] == ids("ab")
            several = client.post(path, json={"prompt": ["ab", "c é"]}).json()["prompt"]
            assert several == [ids("ab"), ids("c é")]
            for given in ([1, 2], [[1, 2], [3]], [], 3, ["a", 1], None):
                assert client.post(path, json={"prompt": given}).json() == {"prompt": given}
            echo = client.post(path, json={"prompt": "ab", "echo": True})
            assert echo.status_code == 400 and echo.json()["error"]["param"] == "echo"
        chat = {"messages": [{"role": "user", "content": "ab"}]}
        assert client.post("/v1/chat/completions", json=chat).json() == chat


def test_a_tokenizer_that_ends_every_text_ends_no_prompt(place, tmp_path, monkeypatch):
    """Models that have read the end of a text do not go on; the library leaves it out, and vLLM does not."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    end = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.convert_tokens_to_ids(end))]
    )
    tiny_model(tmp_path / "base", seed=1, tokenizer=tokenizer)
    recipe = replace(recipe_of(place), base=ModelSpec(model=str(tmp_path / "base")))
    with client_of(Menu(recipe), monkeypatch) as client:
        found = client.post("/v1/completions", json={"prompt": "ab"}).json()["prompt"]
        assert found == tokenizer.encode("ab", add_special_tokens=False)
        body = {"prompt": "ab", "add_special_tokens": False}
        assert client.post("/v1/completions", json=body).json() == body


def test_a_base_without_a_chat_format_is_stopped_before_the_users_next_turn(place, monkeypatch):
    recipe = recipe_of(place, chat="plain")
    with client_of(Menu(recipe), monkeypatch) as client:
        for path, key in CHATS.items():
            for given, stops in (
                ({}, [PLAIN_USER_TURN]),
                ({key: None}, [PLAIN_USER_TURN]),
                ({key: "."}, [".", PLAIN_USER_TURN]),
                ({key: ["a", "b"]}, ["a", "b", PLAIN_USER_TURN]),
            ):
                body = {"messages": []} | given
                assert client.post(path, json=body).json()[key] == stops
            assert client.post(path, json={key: 3}).json() == {key: 3}
        assert client.post("/v1/completions", json={"prompt": "a"}).json() == {"prompt": "a"}
        assert not client.get("/v1/proxytune").json()["has_chat"]


# A body in pieces, and clients that go away ---------------------------------------------------------------


def test_a_body_in_pieces_is_put_together_and_the_connection_is_passed_on(place, monkeypatch):
    monkeypatch.setattr(plugin, "MENU", Menu(recipe_of(place)))
    pieces = [b'{"proxy', b'tune": {"alpha":', b" 1}}"]
    sent: list[Any] = [
        {"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]}
        for piece in pieces
    ]
    sent.append({"type": "http.disconnect"})
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    async def receive() -> Any:
        return sent.pop(0)

    args = SimpleNamespace(served_model_name=None, model="r")
    stand_in = SimpleNamespace(state=SimpleNamespace(args=args))
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "app": stand_in}
    asyncio.run(RequestLanguage(app)(scope, receive, receive))
    assert json.loads(seen[0]["body"]) == {"vllm_xargs": {"alpha": 1.0}}
    assert not seen[0]["more_body"] and seen[1] == {"type": "http.disconnect"}


def test_a_client_that_goes_away_in_the_middle_of_its_body_is_reported(place, monkeypatch):
    monkeypatch.setattr(plugin, "MENU", Menu(recipe_of(place)))
    sent: list[Any] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())

    async def receive() -> Any:
        return sent.pop(0)

    args = SimpleNamespace(served_model_name=None, model="r")
    stand_in = SimpleNamespace(state=SimpleNamespace(args=args))
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "app": stand_in}
    asyncio.run(RequestLanguage(app)(scope, receive, receive))
    assert seen == [{"type": "http.disconnect"}]


def test_a_route_that_ends_with_an_error_of_its_own_gives_way_to_the_refusal(place, monkeypatch):
    monkeypatch.setattr(plugin, "MENU", Menu(recipe_of(place)))
    app = FastAPI()
    app.state.args = SimpleNamespace(served_model_name=["r"], model="x")

    @app.post("/v1/completions")
    async def unguarded(request: Request) -> Any:
        return json.loads(await request.body())

    app.add_middleware(RequestLanguage)
    client = TestClient(app)
    answer = client.post("/v1/completions", json={"proxytune": {"alpha": "x"}})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "proxytune.alpha"
    with pytest.raises(ValueError, match="Expecting"):
        client.post("/v1/completions", content=b"{")
