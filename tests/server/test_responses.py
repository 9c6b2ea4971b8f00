"""`/v1/responses` as the official client meets it: its types, its events, its conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.server.test_app import MESSAGES, fresh, text_of
from tests.server.test_faults import (
    BODY,
    KEYS,
    assert_it_works,
    checked_error,
    post,
    read_until,
    wait_until,
)
from tests.support.served import Served, served

EVENTS: Any = TypeAdapter(ResponseStreamEvent)
OWN = {"proxytune", "store"}
"""What answers have beside the fields of the client's types: this project's, and one that the API has too."""


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(fresh(max_context=256)) as running:
        yield running


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return server.client()


def unknown_fields(found: Any) -> set[str]:
    """Return the fields that the client's types do not have, at any depth."""
    if isinstance(found, list):
        return set().union(*map(unknown_fields, found)) if found else set()
    if not isinstance(found, BaseModel):
        return set()
    names = set(found.__pydantic_extra__ or ())
    return names.union(*(unknown_fields(getattr(found, name)) for name in type(found).model_fields))


def strictly(found: Any) -> Response:
    """Return a response as the client's type, checked field by field, which the client itself does not do."""
    response = Response.model_validate(found)
    assert unknown_fields(response) <= OWN
    return response


def ask(server: Served, **changes: Any) -> httpx.Response:
    body = {"model": "toy", "input": "abc", "max_output_tokens": 8, "temperature": 0} | changes
    return httpx.post(f"{server.url}/v1/responses", json=body, timeout=20)


def streamed(server: Served, **changes: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, whose names, numbers and types are checked."""
    answer = ask(server, stream=True, **changes)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = re.findall(r"event: (.*)\ndata: (.*)\n\n", answer.text)
    assert "".join(f"event: {name}\ndata: {data}\n\n" for name, data in found) == answer.text
    events = [json.loads(data) for _, data in found]
    for number, ((name, _), event) in enumerate(zip(found, events, strict=True)):
        assert event["type"] == name and event["sequence_number"] == number
        assert unknown_fields(EVENTS.validate_python(event)) <= OWN
    return events


def test_a_response_is_the_chat_of_its_input(client, server):
    answer = client.responses.create(
        model="toy", input="abc", max_output_tokens=8, temperature=0.8, extra_body={"seed": 3}
    )
    expected = text_of(MESSAGES, temperature=0.8, seed=3, stop=("\nUser:",))
    assert answer.output_text == expected
    assert answer.status == "incomplete"
    assert answer.incomplete_details and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage and (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 8)
    assert answer.usage.total_tokens == 11
    assert answer.id.startswith("resp_") and answer.output[0].id.startswith("msg_")
    strictly(ask(server).json())


def test_a_text_that_ends_by_itself_is_completed(server):
    text = text_of("abc", 12)
    answer = strictly(ask(server, max_output_tokens=12, stop=text[4]).json())
    assert answer.status == "completed" and answer.incomplete_details is None
    assert answer.output_text == text[: text.index(text[4])]
    assert answer.completed_at and answer.completed_at >= answer.created_at


def test_what_was_asked_is_told_with_the_answer(server):
    asked = {
        "instructions": "ab", "metadata": {"a": "b"}, "top_p": 0.5, "truncation": "auto", "user": "u",
        "reasoning": {"effort": "low"}, "parallel_tool_calls": False, "tool_choice": "none",
        "prompt_cache_key": "k", "safety_identifier": "s",
    }  # fmt: skip
    found = ask(server, temperature=0.5, **asked).json()
    strictly(found)
    assert found["temperature"] == 0.5 and found["max_output_tokens"] == 8
    for name, value in asked.items():
        assert found[name] == (value if name != "reasoning" else value | {"summary": None}), name


INPUTS: list[tuple[Any, Any]] = [
    ("abc", [{"role": "user", "content": "abc"}]),
    ([{"role": "user", "content": "abc"}], [{"role": "user", "content": "abc"}]),
    (
        [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "b"}]},
         {"role": "user", "content": [
             {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "c"}]}],
        [{"role": "system", "content": "b"}, {"role": "user", "content": "ac"}],
    ),
    (
        [{"role": "user", "content": "a"},
         {"type": "reasoning", "id": "rs_1", "summary": [],
          "content": [{"type": "reasoning_text", "text": "b"}], "encrypted_content": None, "status": None},
         {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": None,
          "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}]},
         {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"},
         {"role": "user", "content": "b"}],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "messages"), INPUTS)
def test_each_form_of_input_is_read_as_messages(server, given, messages):
    found = strictly(ask(server, input=given).json())
    assert found.output_text == text_of(messages, stop=("\n\nUser:",))


def test_instructions_are_a_system_message_before_all_others(server):
    found = strictly(ask(server, instructions="ab").json())
    messages = [{"role": "system", "content": "ab"}, {"role": "user", "content": "abc"}]
    assert found.output_text == text_of(messages, stop=("\n\nUser:",))


def test_a_stream_has_the_events_of_the_api_and_the_text_of_the_whole(server):
    whole = ask(server, seed=5, temperature=1).json()
    events = streamed(server, seed=5, temperature=1)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [event["delta"] for event in events if event["type"].endswith(".delta")]
    assert len(deltas) > 3
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    (item,) = whole["output"]
    text = item["content"][0]["text"]
    assert "".join(deltas) == text == events[-4]["text"] == events[-3]["part"]["text"]
    first, last = events[0]["response"], events[-1]["response"]
    assert first["status"] == "in_progress" and first["output"] == [] and first["usage"] is None
    assert events[2]["item"]["content"] == [] and events[2]["item"]["status"] == "in_progress"
    assert last["output"] == [events[-2]["item"]] and first["id"] == last["id"]
    assert {event["item_id"] for event in events if "item_id" in event} == {events[2]["item"]["id"]}
    changing = {"id", "created_at", "completed_at", "output"}
    assert {k: v for k, v in last.items() if k not in changing} == {
        k: v for k, v in whole.items() if k not in changing
    }


def test_the_clients_own_stream_ends_with_the_whole_response(client):
    with client.responses.stream(
        model="toy", input="abc", temperature=0, extra_body={"stop": text_of("abc")[5]}
    ) as stream:
        kinds = [event.type for event in stream]
        found = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert found.output_text == text_of("abc")[: text_of("abc").index(text_of("abc")[5])]


@pytest.mark.parametrize("is_streamed", (False, True))
def test_a_conversation_goes_on_from_the_response_before(server, is_streamed):
    if is_streamed:
        first = streamed(server, instructions="c")[-1]["response"]
    else:
        first = ask(server, instructions="c").json()
    second = ask(server, input="b", previous_response_id=first["id"]).json()
    # Instructions belong to their own response alone.
    said = first["output"][0]["content"][0]["text"]
    messages = [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "b"},
    ]
    expected = text_of(messages, stop=("\n\nUser:",))
    assert strictly(second).output_text == expected
    third = ask(server, input="c", previous_response_id=second["id"], instructions="a").json()
    messages = [
        {"role": "system", "content": "a"},
        *messages,
        {"role": "assistant", "content": expected},
        {"role": "user", "content": "c"},
    ]
    assert strictly(third).output_text == text_of(messages, stop=("\n\nUser:",))


def test_a_response_can_be_read_and_deleted_again(client, server):
    found = client.responses.create(model="toy", input="abc", max_output_tokens=3)
    again = client.responses.retrieve(found.id)
    assert again.to_dict() == found.to_dict()
    raw = httpx.delete(f"{server.url}/v1/responses/{found.id}")
    assert raw.json() == {"id": found.id, "object": "response", "deleted": True}
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="not found"):
            call(found.id)
    answer = ask(server, previous_response_id=found.id)
    assert answer.status_code == 404
    assert checked_error(answer)["param"] == "previous_response_id"


def test_a_response_that_is_kept_is_whole_and_cannot_be_cancelled(client):
    found = client.responses.create(model="toy", input="abc", max_output_tokens=3)
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        client.responses.cancel(found.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_1")


def test_a_response_that_is_not_to_be_stored_is_not(client):
    found = client.responses.create(model="toy", input="abc", max_output_tokens=3, store=False)
    assert found.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)


def test_nobody_reads_deletes_or_goes_on_from_the_response_of_another_key():
    with served(fresh(), api_keys=KEYS) as running:
        one, two = (running.client(key) for key in KEYS)
        found = one.responses.create(model="toy", input="abc", max_output_tokens=3)
        for call in (two.responses.retrieve, two.responses.delete):
            with pytest.raises(openai.NotFoundError) as refused:
                call(found.id)
            # As for one that never was.
            with pytest.raises(openai.NotFoundError) as other:
                call("resp_" + "0" * 32)
            assert str(refused.value).replace(found.id, "") == str(other.value).replace(
                "resp_" + "0" * 32, ""
            )
        with pytest.raises(openai.NotFoundError):
            two.responses.create(model="toy", input="b", previous_response_id=found.id)
        assert one.responses.retrieve(found.id).id == found.id


def test_the_oldest_responses_are_forgotten():
    with served(fresh()) as running:
        running.server.config.app.state.kept._max_kept = 3
        names = [ask(running, max_output_tokens=1).json()["id"] for _ in range(5)]
        found = [httpx.get(f"{running.url}/v1/responses/{name}").status_code for name in names]
    assert found == [404, 404, 200, 200, 200]


def test_a_stored_response_is_only_whole(server):
    found = ask(server).json()["id"]
    for query, name in (("stream=true", "stream"), ("starting_after=3", "starting_after")):
        answer = httpx.get(f"{server.url}/v1/responses/{found}?{query}")
        assert answer.status_code == 400 and checked_error(answer)["param"] == name
    assert httpx.get(f"{server.url}/v1/responses/{found}?stream=false").status_code == 200


def test_logprobs_come_with_the_text_if_they_are_included(client, server):
    include: Any = ["message.output_text.logprobs"]
    options: Any = {"model": "toy", "max_tokens": 6, "temperature": 0}
    chat = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=2, **options
    )
    expected = [
        {"token": each.token, "logprob": each.logprob, "bytes": each.bytes,
         "top_logprobs": [top.to_dict() for top in each.top_logprobs]}
        for each in chat.choices[0].logprobs.content
    ]  # fmt: skip
    changes = {"include": include, "top_logprobs": 2, "max_output_tokens": 6}
    found = ask(server, **changes).json()
    strictly(found)
    assert found["output"][0]["content"][0]["logprobs"] == expected
    events = streamed(server, **changes)
    deltas = [event for event in events if event["type"].endswith(".delta")]
    assert events[-3]["part"]["logprobs"] == expected
    # Those of events have no bytes in the API.
    for each in expected:
        for token in (each, *each["top_logprobs"]):
            del token["bytes"]
    assert [each for event in deltas for each in event["logprobs"]] == expected
    assert events[-4]["logprobs"] == expected
    without = ask(server).json()["output"][0]["content"][0]["logprobs"]
    assert without == []


def test_a_response_is_steered_by_the_field_and_by_the_models_name(server):
    steering = {"expert": "two", "alpha": 2.0, "explain": True, "explain_top": 1}
    found = ask(server, proxytune=steering).json()
    strictly(found)
    assert found["proxytune"]["alphas"] == {"two": 2.0}
    assert len(found["proxytune"]["tokens"]) == 8
    expected = text_of(MESSAGES, experts="two", alpha=2.0, stop=("\n\nUser:",))
    assert found["output"][0]["content"][0]["text"] == expected
    events = streamed(server, proxytune=steering)
    tokens = [t for e in events if e["type"].endswith(".delta") for t in e["proxytune"]["tokens"]]
    assert tokens == found["proxytune"]["tokens"]
    named = ask(server, model="toy:two").json()
    assert strictly(named).output_text == text_of(MESSAGES, experts="two", stop=("\n\nUser:",))
    assert named["model"] == "toy:two"
    assert ask(server, model="toy:two", proxytune={"expert": "one"}).status_code == 400


def test_truncation_leaves_out_the_oldest_messages_that_do_not_fit():
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": "ab" * 5} for n in range(9)]
    given: Any = [{"role": "system", "content": "c"}, *turns]
    with served(fresh(max_context=100)) as running:
        refused = ask(running, input=given)
        assert refused.status_code == 400
        assert checked_error(refused)["code"] == "context_length_exceeded"
        found = ask(running, input=given, truncation="auto").json()
        # "User: …", "Assistant: …" and blank lines: three turns and the open one leave room for eight tokens.
        left = [given[0], *turns[-3:]]
        assert strictly(found).output_text == text_of(left, stop=("\n\nUser:",))
        # What was left out is not read again.
        second = ask(running, input="b", previous_response_id=found["id"], truncation="auto")
        assert second.status_code == 200
        kept = running.server.config.app.state.kept.get("127.0.0.1", found["id"])
        assert json.loads(kept.conversation)[:-1] == left
        alone = ask(running, input="a" * 200, truncation="auto")
        assert alone.status_code == 400
        assert checked_error(alone)["code"] == "context_length_exceeded"


REFUSED: dict[str, Any] = {
    "tools": [{"type": "function", "name": "f"}],
    "tool_choice": "required",
    "background": True,
    "conversation": "conv_1",
    "prompt": {"id": "p"},
    "text": {"format": {"type": "json_schema", "name": "a", "schema": {}}},
    "n": 2,
    "include": ["nonsense"],
    "reasoning": {"summary": "detailed"},
    "truncation": "middle",
    "max_tokens": 5,
    "messages": [],
    "store": "yes",
    "input": [{"type": "function_call_output", "call_id": "c", "output": "o"}],
    "metadata": {"a": 1},
    "max_output_tokens": 0,
    "previous_response_id": 5,
    "nonsense": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(server, name):
    answer = ask(server, **{name: REFUSED[name]})
    assert answer.status_code == 400
    error = checked_error(answer)
    assert (error["param"] or "").split(".")[0] == name or name in error["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": []}, {"tool_choice": "auto"}, {"background": False}, {"service_tier": "auto"},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {"reasoning": {"effort": None}},
        {"include": ["reasoning.encrypted_content"]}, {"store": True}, {"max_tool_calls": 3},
        {"prompt_cache_retention": "24h"}, {"stream_options": None}, {"reasoning": {"summary": "auto"}},
        {"stream": None}, {"instructions": None, "metadata": None, "truncation": None, "user": None},
    ],
)  # fmt: skip
def test_what_changes_nothing_is_accepted(server, changes):
    expected = ask(server).json()["output"][0]["content"]
    answer = ask(server, **changes)
    assert answer.status_code == 200, answer.text
    assert strictly(answer.json()) and answer.json()["output"][0]["content"] == expected


def test_a_stream_that_loses_its_place_ends_with_a_failed_response():
    with (
        served(fresh(), max_rows=1, max_waiting=1, max_tokens=10_000) as running,
        running.connect() as first,
        running.connect() as second,
    ):
        first.sendall(post(BODY | {"max_tokens": 10_000}))
        wait_until(lambda: running.service.engine.num_running == 1)
        body = {"model": "toy", "input": "a", "max_output_tokens": 10_000, "stream": True}
        second.sendall(post(body, "/v1/responses"))
        wait_until(lambda: running.service.engine.num_waiting == 1)
        assert_it_works(running)
        found = read_until(second, b"\r\n0\r\n\r\n")
    (data,) = re.findall(rb"event: response.failed\ndata: (.*)\n\n", found)
    event = EVENTS.validate_python(json.loads(data))
    assert event.response.status == "failed" and event.response.error.code == "rate_limit_exceeded"
