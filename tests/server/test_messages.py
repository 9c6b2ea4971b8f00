"""`/v1/messages` as the Anthropic API has it: its blocks, its events, its errors, its own client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.server.test_app import fresh, text_of
from tests.server.test_faults import (
    BODY,
    KEYS,
    as_response,
    assert_it_works,
    head,
    post,
    read_all,
    read_until,
    wait_until,
)
from tests.support.clients import run_client
from tests.support.served import Served, served

USER: Any = {"role": "user", "content": "abc"}
PATHS = ("/v1/messages", "/messages", "/v1/messages/count_tokens", "/messages/count_tokens")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(fresh(max_context=256)) as running:
        yield running


def ask(running: Served, path: str = "/v1/messages", **changes: Any) -> httpx.Response:
    body = {"model": "toy", "max_tokens": 8, "temperature": 0, "messages": [USER]} | changes
    return httpx.post(f"{running.url}{path}", json=body, timeout=20)


def count(running: Served, **body: Any) -> httpx.Response:
    asked = {"model": "toy", "messages": [USER]} | body
    return httpx.post(f"{running.url}/v1/messages/count_tokens", json=asked, timeout=20)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error of an answer, after a look at its shape."""
    assert 400 <= answer.status_code < 600
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    error: dict[str, Any] = body["error"]
    assert set(error) == {"type", "message"}
    assert isinstance(error["message"], str) and error["message"]
    for told in ("Traceback", ".py", str(Path(__file__).parents[2]), "site-packages"):
        assert told not in answer.text
    return error


def streamed(running: Served, **changes: Any) -> list[dict[str, Any]]:
    answer = ask(running, stream=True, **changes)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = re.findall(r"event: (.*)\ndata: (.*)\n\n", answer.text)
    assert "".join(f"event: {name}\ndata: {data}\n\n" for name, data in found) == answer.text
    events = [json.loads(data) for _, data in found]
    assert [event["type"] for event in events] == [name for name, _ in found]
    return events


def test_a_message_answers_the_conversation(server):
    found = ask(server, temperature=0.8, seed=3).json()
    text = text_of([USER], temperature=0.8, seed=3, stop=("\n\nUser:",))
    assert found.pop("id").startswith("msg_")
    assert found == {
        "type": "message",
        "role": "assistant",
        "model": "toy",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 8,
        },
    }


def test_system_and_blocks_are_read_as_messages(server):
    turns = [USER, {"role": "assistant", "content": "ab"}, {"role": "user", "content": "cc"}]
    expected = text_of([{"role": "system", "content": "bab"}, *turns], stop=("\n\nUser:",))
    cache = {"type": "ephemeral", "ttl": "5m"}
    pieces = [{"type": "text", "text": "c", "cache_control": cache, "citations": None}] * 2
    given = [*turns[:2], {"role": "user", "content": pieces}]
    for system in ("bab", [{"type": "text", "text": "b"}, {"type": "text", "text": "ab"}]):
        found = ask(server, system=system, messages=given).json()
        assert found["content"][0]["text"] == expected


def test_a_stop_sequence_ends_the_text_and_is_named(server):
    text = text_of([USER], 12)
    found = ask(server, max_tokens=12, stop_sequences=["zzz", text[4:6]]).json()
    assert found["stop_reason"] == "stop_sequence" and found["stop_sequence"] == text[4:6]
    assert found["content"][0]["text"] == text[: text.index(text[4:6])]
    events = streamed(server, max_tokens=12, stop_sequences=["zzz", text[4:6]])
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": text[4:6]}


def test_a_text_that_ends_by_itself_ends_the_turn():
    from proxytune.testing import toy_model

    # At -100 no text ends, at 100 each at once.
    with served(toy_model(eos_logit=100.0)) as running:
        found = ask(running, stop_sequences=["a"]).json()
        events = streamed(running)
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    assert found["content"] == [{"type": "text", "text": ""}]
    assert [event["type"] for event in events if "delta" in event["type"]] == ["message_delta"]


def test_a_stream_has_the_events_of_the_api_and_the_text_of_the_whole(server):
    whole = ask(server, seed=5, temperature=1).json()
    events = streamed(server, seed=5, temperature=1)
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert len(deltas) > 3 and "".join(deltas) == whole["content"][0]["text"]
    assert [event["type"] for event in events] == [
        "message_start", "content_block_start", *["content_block_delta"] * len(deltas),
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None
    assert start["usage"]["input_tokens"] == 3 and start["usage"]["output_tokens"] == 0
    assert events[1]["content_block"] == {"type": "text", "text": ""}
    assert {event["index"] for event in events if event["type"].startswith("content")} == {0}
    assert events[-2]["usage"] == whole["usage"]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}


def test_what_was_reused_is_not_counted_as_input_again():
    long = {"role": "user", "content": "ab" * 40}
    with served(fresh()) as running:
        first = ask(running, messages=[long]).json()["usage"]
        second = ask(running, messages=[long]).json()["usage"]
    assert first["cache_read_input_tokens"] == 0 and first["input_tokens"] == 80
    assert second["cache_read_input_tokens"] > 32
    assert second["cache_read_input_tokens"] + second["input_tokens"] == 80


def test_a_message_is_steered_by_the_field_and_by_the_models_name(server):
    steering = {"expert": "two", "alpha": 2.0, "explain": True, "explain_top": 1}
    found = ask(server, proxytune=steering).json()
    text = text_of([USER], experts="two", alpha=2.0, stop=("\n\nUser:",))
    assert found["content"][0]["text"] == text
    assert found["proxytune"]["alphas"] == {"two": 2.0}
    events = streamed(server, proxytune=steering)
    tokens = [t for e in events if "proxytune" in e for t in e["proxytune"]["tokens"]]
    assert tokens == found["proxytune"]["tokens"] and len(tokens) == 8
    named = ask(server, model="toy:two").json()
    assert named["content"][0]["text"] == text_of([USER], experts="two", stop=("\n\nUser:",))


def test_tokens_are_counted_as_the_base_reads_them(server):
    for body in ({}, {"system": "ab"}, {"messages": [USER, USER]}, {"model": "toy:two"}):
        counted = count(server, **body)
        assert counted.status_code == 200, counted.text
        usage = ask(server, max_tokens=1, **body).json()["usage"]
        num_read = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert counted.json() == {"input_tokens": num_read}


REFUSED: dict[str, Any] = {
    "max_tokens": None,
    "messages": [],
    "model": 5,
    "tools": [{"name": "f", "input_schema": {}}],
    "tool_choice": {"type": "any"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "system": 5,
    "stop_sequences": "abc",
    "stop": "abc",
    "n": 2,
    "metadata": {"user": "a"},
    "container": "c",
    "output_config": {"format": {"type": "json_schema", "schema": {}}},
    "stream_options": {"include_usage": True},
    "nonsense": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(server, name):
    answer = ask(server, **{name: REFUSED[name]})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["type"] == "invalid_request_error" and name in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}],
        [{"type": "tool_result", "tool_use_id": "t", "content": "a"}],
        [{"type": "text"}], [{"type": "text", "text": "a", "thinking": "b"}], [5], [],
        [{"type": "thinking", "thinking": "a", "signature": ""}],
    ],
)  # fmt: skip
def test_blocks_that_are_no_text_are_refused(server, content):
    answer = ask(server, messages=[{"role": "user", "content": content}])
    assert answer.status_code == 400 and "messages" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": []}, {"tool_choice": {"type": "auto"}}, {"thinking": {"type": "adaptive"}},
        {"metadata": {"user_id": "a" * 256}}, {"service_tier": "auto"}, {"speed": "standard"},
        {"cache_control": {"type": "ephemeral"}}, {"stop_sequences": []}, {"stream": False},
        {"system": None, "metadata": None, "stop_sequences": None, "thinking": None, "tools": None},
    ],
)  # fmt: skip
def test_what_changes_nothing_is_accepted(server, changes):
    answer = ask(server, **changes)
    assert answer.status_code == 200, answer.text
    assert answer.json()["content"][0]["text"] == text_of([USER], stop=("\n\nUser:",))


def test_guards_refuse_in_the_same_form():
    def status_and_type(answer: httpx.Response) -> tuple[int, str]:
        assert answer.headers["request-id"] == answer.json()["request_id"]
        return answer.status_code, error_of(answer)["type"]

    with served(fresh(), api_keys=KEYS, max_body_bytes=4096, hosts=("127.0.0.1",)) as running:
        for path in PATHS:
            answer = ask(running, path)
            assert status_and_type(answer) == (401, "authentication_error")
            assert "x-api-key" in error_of(answer)["message"]
            headers = {"x-api-key": KEYS[0]}
            large = httpx.post(running.url + path, content=b" " * 5000, headers=headers)
            assert status_and_type(large) == (413, "request_too_large")
            other = httpx.post(running.url + path, headers=headers | {"Host": "evil.example"})
            assert status_and_type(other) == (421, "invalid_request_error")
            kind = httpx.post(running.url + path, content=b"{}", headers=headers)
            assert status_and_type(kind) == (400, "invalid_request_error")
            wrong = httpx.get(running.url + path, headers=headers)
            assert status_and_type(wrong) == (405, "invalid_request_error")
        missing = httpx.get(f"{running.url}/v1/messages/x", headers={"x-api-key": KEYS[0]})
        assert status_and_type(missing) == (404, "not_found_error")
        # The other doors keep their own form.
        assert "type" not in httpx.post(f"{running.url}/v1/completions", json=BODY).json()


def test_a_slow_body_a_full_room_and_a_broken_model_are_told_in_the_same_form(monkeypatch):
    with served(fresh(), body_timeout_s=0.3) as running, running.connect() as connection:
        connection.sendall(head("/v1/messages", length=100) + b"{")
        answer = as_response(read_all(connection))
        assert answer.status_code == 408 and error_of(answer)["type"] == "timeout_error"
        unknown = ask(running, model="other")
        assert unknown.status_code == 404 and error_of(unknown)["type"] == "not_found_error"

        def fail(*_: Any) -> None:
            raise RuntimeError(f"in {__file__}")

        monkeypatch.setattr(running.service, "orders", fail)
        broken = ask(running)
        assert broken.status_code == 500 and error_of(broken)["type"] == "api_error"


def test_a_stream_that_loses_its_place_ends_with_an_error_event():
    with (
        served(fresh(), max_rows=1, max_waiting=1, max_tokens=10_000) as running,
        running.connect() as first,
        running.connect() as second,
    ):
        first.sendall(post(BODY | {"max_tokens": 10_000}))
        wait_until(lambda: running.service.engine.num_running == 1)
        body = {"model": "toy", "messages": [USER], "max_tokens": 10_000, "stream": True}
        second.sendall(post(body, "/v1/messages"))
        wait_until(lambda: running.service.engine.num_waiting == 1)
        assert_it_works(running)
        found = read_until(second, b"\r\n0\r\n\r\n")
    (data,) = re.findall(rb"event: error\ndata: (.*)\n\n", found)
    assert json.loads(data)["error"]["type"] == "rate_limit_error"


def test_keys_come_in_either_header_and_a_wrong_one_beside_a_right_one_does_no_harm():
    with served(fresh(), api_keys=KEYS) as running:
        for headers, status in (
            ({"x-api-key": KEYS[1]}, 200),
            ({"Authorization": f"Bearer {KEYS[1]}"}, 200),
            ({"Authorization": "Bearer none", "x-api-key": KEYS[0]}, 200),
            ({"x-api-key": "none"}, 401),
            ({"x-api-key": f"Bearer {KEYS[0]}"}, 401),
            ({"x-api-key": ""}, 401),
        ):
            for path in ("/v1/models", "/models", "/v1/proxytune"):
                answer = httpx.get(running.url + path, headers=headers)
                assert answer.status_code == status, (headers, path)


# The API's own client -------------------------------------------------------------------------------

CLIENT = """
import json, sys
import anthropic
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

url, prompt, stop = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)

def unknown(found):
    if isinstance(found, list):
        return set().union(*map(unknown, found)) if found else set()
    if not isinstance(found, BaseModel):
        return set()
    names = set(found.__pydantic_extra__ or ())
    return names.union(*(unknown(getattr(found, name)) for name in type(found).model_fields))

options = dict(model="toy", max_tokens=12, messages=[{"role": "user", "content": prompt}])
extra = {"temperature": 0, "proxytune": {"explain": False}}
whole = client.messages.create(**options, extra_body=extra)
raw = client.messages.with_raw_response.create(**options, extra_body=extra)
assert raw.request_id
assert unknown(Message.model_validate(json.loads(raw.text()), strict=True)) <= {"proxytune"}
events = client.messages.create(**options, stream=True, extra_body=extra)
checked = [TypeAdapter(RawMessageStreamEvent).validate_python(e.to_dict()) for e in events]
assert not unknown(checked)
with client.messages.stream(**options, stop_sequences=[stop], extra_body=extra) as stream:
    pieces = list(stream.text_stream)
    final = stream.get_final_message()
assert "".join(pieces) == final.content[0].text
counted = client.messages.count_tokens(model="toy", system="ab", messages=options["messages"])
assert isinstance(counted, MessageTokensCount)
errors = []
for changes in ({"model": "other"}, {"max_tokens": 0}, {"tools": [{"name": "f", "input_schema": {}}]}):
    try:
        client.messages.create(**{**options, **changes})
    except anthropic.APIStatusError as error:
        errors.append([type(error).__name__, error.body["error"]["type"], bool(error.request_id)])
print(json.dumps({
    "whole": whole.to_dict(), "final": final.to_dict(), "kinds": [e.type for e in checked],
    "counted": counted.input_tokens, "errors": errors,
}))
"""


@pytest.mark.slow
def test_the_clients_own_types_hold_whatever_is_answered(server):
    text = text_of([USER], 12)
    found = json.loads(run_client(CLIENT, server.url, USER["content"], text[6]))
    assert found["whole"]["content"][0]["text"] == text
    assert found["final"]["content"][0]["text"] == text[: text.index(text[6])]
    assert found["final"]["stop_reason"] == "stop_sequence"
    assert found["final"]["stop_sequence"] == text[6]
    assert found["final"]["usage"]["output_tokens"] >= text.index(text[6])
    assert found["kinds"][0] == "message_start" and found["kinds"][-1] == "message_stop"
    assert found["counted"] == count(server, system="ab").json()["input_tokens"]
    assert found["errors"] == [
        ["NotFoundError", "not_found_error", True],
        ["BadRequestError", "invalid_request_error", True],
        ["BadRequestError", "invalid_request_error", True],
    ]
