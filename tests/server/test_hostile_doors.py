"""Requests that no client sends, at the doors beside completions and chats: each door answers in its form.

Values come from the application's own documentation, and junk is put in at every depth.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.server.guards import MAX_MESSAGE
from tests.server.test_app import fresh
from tests.server.test_faults import (
    BROKEN,
    JUNK,
    KEYS,
    KINDS,
    Documented,
    assert_it_works,
    checked_error,
    no_json,
)
from tests.server.test_messages import error_of
from tests.support.served import Served, served

USER: Any = {"role": "user", "content": [{"type": "text", "text": "ab"}]}
STEERING: Any = {"experts": {"one": 0.5}, "explain": True, "explain_top": 1}
GOOD: dict[str, tuple[str, Any]] = {
    "/v1/responses": (
        "ResponsesRequest",
        {
            "model": "toy", "max_output_tokens": 3, "instructions": "a", "stream": False,
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "ab"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}], "content": []},
                {"type": "message", "role": "assistant", "content": [
                    {"type": "output_text", "text": "a", "annotations": [], "logprobs": []}]},
                {"role": "user", "content": "b"},
            ],
            "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}, "metadata": {"a": "b"},
            "include": ["message.output_text.logprobs"], "top_logprobs": 1, "proxytune": STEERING,
        },
    ),
    "/v1/messages": (
        "MessagesRequest",
        {
            "model": "toy", "max_tokens": 3, "stop_sequences": ["zz"], "stream": True,
            "metadata": {"user_id": "u"},
            "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "a", "signature": "b"},
                                                  {"type": "text", "text": "a"}]},
                {"role": "user", "content": "b"},
            ],
            "thinking": {"type": "disabled"}, "output_config": {"effort": "low"},
            "tool_choice": {"type": "none"},
            "proxytune": STEERING,
        },
    ),
    "/v1/messages/count_tokens": (
        "CountTokensRequest",
        {"model": "toy", "messages": [USER], "system": "a", "thinking": {"type": "adaptive"}},
    ),
    "/v1/tokenize": (
        "TokenizeRequest",
        {"model": "toy", "messages": [USER], "chat_template_kwargs": {"a": 1}, "add_special_tokens": True},
    ),
    "/v1/detokenize": ("DetokenizeRequest", {"model": "toy", "tokens": [1, 2, 3]}),
}  # fmt: skip
"""A kind of body for each door, and a body that it takes."""


class Fitting(Documented):
    """Values that mostly fit together: short texts, known models, no responses of others."""

    def value(self, schema: Any, name: str = "") -> st.SearchStrategy[Any]:
        if schema is True:  # any value
            return JUNK
        if schema.get("enum") == []:
            return st.none()
        if name in ("max_output_tokens", "max_tokens"):
            return st.integers(1, 6)
        if name == "previous_response_id":
            return st.sampled_from((None, None, "resp_1"))
        if name == "proxytune":
            return st.sampled_from((None, {}, STEERING, {"alpha": 2.0}, {"expert": "two"}))
        return super().value(schema, name)

    def _array(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        return super()._array({"items": {}, **schema})


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(fresh(max_context=128), max_body_bytes=65536, max_tokens=64) as running:
        yield running


@pytest.fixture(scope="module")
def stranger(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def fitting(server: Served) -> Fitting:
    return Fitting(httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"])


def check_refused(path: str, answer: httpx.Response) -> str:
    """Assert that a refusal has the form of its door; return its message."""
    assert answer.status_code in (400, 404, 405, 413), (answer.status_code, answer.text[:500])
    error = (error_of if "/messages" in path else checked_error)(answer)
    message = str(error["message"])
    assert len(message) <= MAX_MESSAGE + 1 and "pydantic" not in message
    return f"{message} {error.get('param')}"


def check_taken(path: str, body: Any, answer: httpx.Response) -> None:
    """Assert that an answer is whole."""
    if not (isinstance(body, dict) and body.get("stream")):
        found = json.loads(answer.content, parse_constant=no_json)
        kinds = {
            "/v1/responses": "object", "/v1/messages": "content", "/v1/messages/count_tokens": "input_tokens",
            "/v1/tokenize": "tokens", "/v1/detokenize": "prompt",
        }  # fmt: skip
        assert kinds[path] in found
        return
    events = [
        json.loads(data, parse_constant=no_json)
        for data in re.findall(r"^data: (.*)$", answer.text, re.M)
    ]
    ends = ("response.completed", "response.incomplete", "message_stop")
    assert events[-1]["type"] in ends and [e["type"] in ends for e in events].count(True) == 1


def send(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    answer = client.post(path, content=json.dumps(body), headers=headers)
    if answer.status_code == 200:
        check_taken(path, body, answer)
    else:
        check_refused(path, answer)
    return answer


@pytest.mark.parametrize("path", GOOD)
def test_what_the_documentation_allows_is_answered_or_refused_with_a_reason(
    path, fitting, stranger
):
    statuses = []

    @settings(max_examples=50)
    @given(fitting.body(GOOD[path][0]))
    def ask(body: Any) -> None:
        statuses.append(send(stranger, path, body).status_code)

    assert send(stranger, path, GOOD[path][1]).status_code == 200
    ask()
    # Most fields of `/tokenize` exclude each other.
    assert len(statuses) >= 50 and (statuses.count(200) > 5 or path == "/v1/tokenize")


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where each value within a JSON value is."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*place, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*place, key))


def changed(body: Any, place: tuple[Any, ...], junk: Any, *, is_added: bool) -> Any:
    """Return a body with junk at a place, or with a further entry beside it."""
    body = copy.deepcopy(body)
    *outer, last = place
    inner = body
    for key in outer:
        inner = inner[key]
    if not is_added:
        inner[last] = junk
    elif isinstance(inner, list):
        inner.insert(last, junk)
    else:
        inner["unknown"] = junk
    return body


@pytest.mark.parametrize("path", GOOD)
def test_junk_at_any_depth_is_honoured_or_named(path, stranger):
    good = GOOD[path][1]
    statuses = []

    @settings(max_examples=80)
    @given(st.sampled_from([*places(good)]), JUNK, st.booleans())
    def ask(place: tuple[Any, ...], junk: Any, is_added: bool) -> None:
        answer = send(stranger, path, changed(good, place, junk, is_added=is_added))
        statuses.append(answer.status_code)

    ask()
    assert len(statuses) >= 80 and 400 in statuses


@pytest.mark.parametrize("path", GOOD)
def test_null_anywhere_is_absence_or_named(path, stranger):
    """Null in place of what a request needs is refused by name; anything else is as if it were left out."""
    good = GOOD[path][1]
    for place in places(good):
        answer = send(stranger, path, changed(good, place, None, is_added=False))
        if answer.status_code != 200:
            told = check_refused(path, answer)
            assert str(place[0]) in told or "model" in told, (place, told)
    answer = send(stranger, path, dict.fromkeys(good) | {"unknown": None})
    assert answer.status_code == 400
    told = check_refused(path, answer)
    assert "is missing" in told or "is needed" in told


EXTREMES: list[Any] = [
    10**400, -(10**400), 2**63, -(2**63), 2**31, 1e308, -0.0, True, "1", "", "\ud800", "\x00", "a" * 3000,
    [], {}, [[]], [None], {"": None}, [[[[[[[[1]]]]]]]],
]  # fmt: skip


@pytest.mark.parametrize("path", GOOD)
def test_extreme_values_of_every_field_are_honoured_or_refused(path, stranger, fitting):
    name, good = GOOD[path]
    for field in fitting._schemas[name]["properties"]:
        # A few for each field; another few for the next one.
        start = len(field) % 8
        for junk in EXTREMES[start::8]:
            answer = send(stranger, path, good | {field: junk})
            if answer.status_code != 200:
                told = check_refused(path, answer)
                # Half a character is refused before fields are looked at, and the toy reads few characters.
                assert field in told or "surrogate" in told or "token" in told, field


@pytest.mark.parametrize("path", GOOD)
def test_bodies_that_are_no_requests_are_refused(path, stranger):
    @settings(max_examples=40)
    @given(BROKEN, KINDS)
    def ask(body: bytes, kind: str | None) -> None:
        headers = {} if kind is None else {"Content-Type": kind}
        check_refused(path, stranger.post(path, content=body, headers=headers))

    ask()


@pytest.mark.parametrize("path", GOOD)
def test_no_method_but_its_own_opens_a_door(path, stranger):
    for method in ("GET", "PUT", "PATCH", "DELETE", "TRACE"):
        for each in (path, path.removeprefix("/v1")):
            answer = stranger.request(method, each)
            assert answer.status_code == 405
            check_refused(each, answer)


NAMES = [
    "resp_" + "0" * 32, "resp_", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "%2e%2e%2fetc", "%00", "a" * 5000, "%ff",
    "'; drop", "\u202e", "resp_*", "[]", "{}", "null",
]  # fmt: skip


@pytest.mark.parametrize("method", ("GET", "DELETE"))
@pytest.mark.parametrize("prefix", ("/v1", ""))
def test_no_name_leads_to_what_is_not_ones_own(method, prefix, stranger):
    found = stranger.post("/v1/responses", json={"input": "ab", "max_output_tokens": 1}).json()
    for name in (
        *NAMES,
        found["id"].upper(),
        found["id"][:-1],
        found["id"] + "%20",
        f"{found['id']}/x",
    ):
        answer = stranger.request(method, f"{prefix}/responses/{name}")
        assert answer.status_code in (404, 405, 400), name
        if answer.status_code == 404:
            assert len(answer.text) < 1000
    assert stranger.get(f"/v1/responses/{found['id']}").json() == found


def test_a_hundred_names_of_others_open_nothing():
    with served(fresh(), api_keys=KEYS) as running:
        one, two = ({"x-api-key": key} for key in KEYS)
        body = {"input": "ab", "max_output_tokens": 1}
        names = [
            httpx.post(f"{running.url}/v1/responses", json=body, headers=one).json()["id"]
            for _ in range(25)
        ]
        for name in names:
            for answer in (
                httpx.get(f"{running.url}/v1/responses/{name}", headers=two),
                httpx.delete(f"{running.url}/v1/responses/{name}", headers=two),
                httpx.post(f"{running.url}/v1/responses/{name}/cancel", headers=two),
                httpx.post(
                    f"{running.url}/v1/responses",
                    json=body | {"previous_response_id": name},
                    headers=two,
                ),
            ):
                assert answer.status_code == 404
                assert KEYS[0] not in answer.text and KEYS[1] not in answer.text
                checked_error(answer)
            assert httpx.get(f"{running.url}/v1/responses/{name}", headers=one).status_code == 200
        assert_it_works_with_key(running)


def assert_it_works_with_key(running: Served) -> None:
    client = running.client(KEYS[0])
    assert client.responses.create(model="toy", input="ab", max_output_tokens=1).status


def test_after_all_that_the_server_works(server):
    assert_it_works(server)
    assert server.service.engine.num_running == server.service.engine.num_waiting == 0
