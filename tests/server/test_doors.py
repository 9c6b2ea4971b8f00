"""What all doors share: paths with and without `/v1`, the names of requests, reasoning, prefilled answers."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from proxytune.server.habits import HABITS
from proxytune.server.schema import SAMPLING, Generation
from tests.server import test_messages, test_reasoning, test_responses
from tests.server.test_app import fresh, text_of
from tests.server.test_faults import KEYS, wait_until
from tests.server.test_reasoning import CONTENT, REASONING, thinking_model
from tests.support.served import Served, served

USER: Any = {"role": "user", "content": "abc"}
BODIES: dict[str, Any] = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 2},
    "/v1/responses": {"input": "abc", "max_output_tokens": 2},
    "/v1/messages": {"messages": [USER], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [USER]},
    "/v1/tokenize": {"prompt": "abc"},
    "/v1/detokenize": {"tokens": [1, 2]},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(fresh(max_context=256)) as running:
        yield running


@pytest.fixture(scope="module")
def thinker() -> Iterator[Served]:
    with served(thinking_model()) as running:
        yield running


def stable(found: Any) -> Any:
    """Return an answer without what is another one each time."""
    changing = {"id", "created", "created_at", "completed_at", "item_id"}
    if isinstance(found, dict):
        return {key: stable(value) for key, value in found.items() if key not in changing}
    return [stable(each) for each in found] if isinstance(found, list) else found


# Paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BODIES)
def test_every_door_is_there_without_v1_too(server, path):
    body = {"model": "toy", **BODIES[path]}
    body |= {"temperature": 0} if "max" in str(body) else {}
    answers = [
        httpx.post(f"{server.url}{each}", json=body, timeout=20)
        for each in (path, path.removeprefix("/v1"))
    ]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert stable(answers[0].json()) == stable(answers[1].json())


@pytest.mark.parametrize("prefix", ("", "/v1"))
def test_models_are_listed_and_found_by_name(prefix):
    with served(fresh(max_context=64), name="org/model") as running:
        url = f"{running.url}{prefix}/models"
        listed = httpx.get(url).json()["data"]
        assert [(each["id"], each["root"], each["parent"]) for each in listed] == [
            ("org/model", "org/model", None),
            ("org/model:one", "one", "org/model"),
            ("org/model:two", "two", "org/model"),
        ]
        assert {each["max_model_len"] for each in listed} == {64}
        for name in ("org/model", "org%2Fmodel", "org/model:two"):
            assert httpx.get(f"{url}/{name}").json() in listed
        assert httpx.get(f"{url}/other/model").status_code == 404


def test_the_documentation_has_the_bodies_of_all_doors(server):
    found = httpx.get(f"{server.url}/openapi.json").json()
    schemas = found["components"]["schemas"]
    for path in BODIES:
        content = found["paths"][path]["post"]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
        needed = set(schemas[name].get("required", ()))
        assert needed <= set(BODIES[path]) <= set(schemas[name]["properties"]), path
    assert {"get", "delete"} <= set(found["paths"]["/v1/responses/{response_id}"])
    named = set(
        re.findall(r'"#/components/schemas/(\w+)"', httpx.get(f"{server.url}/openapi.json").text)
    )
    assert named <= set(schemas)


HONOURED = {
    "model", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias",
    "stream", "stream_options", "user", "metadata", "proxytune", "top_k", "repeat_penalty", "repeat_last_n",
    "min_tokens", "stop_token_ids", "first_logit_bias",
}  # fmt: skip
"""The fields of all requests that responses honour; messages have other words for some of them."""


@pytest.mark.parametrize("path", ("/v1/responses", "/v1/messages"))
def test_each_field_of_a_chat_is_honoured_or_refused_by_name_at_the_other_doors(server, path):
    """A new field of all requests has to be thought of here, or it would be ignored."""
    own = {"chat_template_kwargs", "vllm_xargs"}  # as the request language of all doors has them
    fields = set(Generation.model_fields) - set(HABITS) - set(SAMPLING) - HONOURED - own
    values: dict[str, Any] = dict.fromkeys(fields, True) | {
        "n": 2,
        "n_predict": 1,
        "prompt_logprobs": 1,
    }
    assert {"n", "n_predict", "prompt_logprobs", "return_token_ids"} <= fields
    for field in fields:
        body = {"model": "toy", **BODIES[path], field: values[field]}
        answer = httpx.post(f"{server.url}{path}", json=body, timeout=20)
        assert answer.status_code == 400 and field in answer.text, (field, answer.text)


# Names of requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("a", "req-1.2_3:4", "A" * 128))
def test_a_clients_own_name_of_a_request_is_returned_and_logged(server, caplog, name):
    caplog.set_level(logging.INFO)
    answer = httpx.get(f"{server.url}/v1/models", headers={"x-request-id": name})
    assert answer.headers["x-request-id"] == name
    wait_until(lambda: f"200 {name}" in re.sub(r"\d+ ms ", "", caplog.text))


@pytest.mark.parametrize(
    "name", (b"", b"a" * 129, b"-a", b"a b", b"a\tb", b"\xff", b"a\x1b[31m", b"<script>", b"a,b")
)
def test_any_other_name_is_replaced(server, caplog, name):
    caplog.set_level(logging.INFO)
    try:
        answer = httpx.get(f"{server.url}/v1/models", headers=[(b"x-request-id", name)])
    except httpx.LocalProtocolError:  # not even a header
        return
    if answer.status_code != 400:  # the HTTP parser refuses some of them
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
        wait_until(lambda: answer.headers["x-request-id"] in caplog.text)


@pytest.mark.parametrize("path", (*BODIES, "/nowhere", "/"))
def test_every_answer_has_a_name_also_a_refusal(path):
    with served(fresh(), api_keys=KEYS) as running:
        names = []
        for headers in ({}, {"x-api-key": KEYS[0]}):
            for body in ({}, BODIES.get(path, {}), BODIES.get(path, {}) | {"stream": True}):
                answer = httpx.post(f"{running.url}{path}", json=body, headers=headers)
                names.append(answer.headers["x-request-id"])
                if "messages" in path:
                    assert answer.headers["request-id"] == names[-1]
        assert len(set(names)) == len(names)


# Prefilled answers ----------------------------------------------------------------------------------


def test_the_last_message_of_the_assistant_is_the_beginning_of_the_answer(server):
    """As with `continue_final_message` in a chat, which has tests of its own."""
    given = [USER, {"role": "assistant", "content": "ab"}]
    body = {"messages": given, "max_tokens": 6, "temperature": 0, "continue_final_message": True}
    chat = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=20).json()
    found = test_messages.ask(server, messages=given, max_tokens=6).json()
    assert found["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert found["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    counted = test_messages.count(server, messages=given).json()
    assert counted["input_tokens"] == chat["usage"]["prompt_tokens"]
    # Without it, the assistant begins another turn.
    other = text_of(given, 6, stop=("\n\nUser:",))
    assert found["content"][0]["text"] != other


# Reasoning ------------------------------------------------------------------------------------------


def thinking(server: Served, **changes: Any) -> Any:
    return test_messages.ask(
        server, model=None, max_tokens=20, messages=test_reasoning.MESSAGES, **changes
    )


def responding(server: Served, **changes: Any) -> Any:
    return test_responses.ask(server, model=None, max_output_tokens=20, input="q", **changes)


def test_reasoning_is_an_item_before_the_message_of_a_response(thinker):
    found = responding(thinker).json()
    test_responses.strictly(found)
    reasoning, message = found["output"]
    assert reasoning["type"] == "reasoning" and reasoning["id"].startswith("rs_")
    assert reasoning["content"] == [{"type": "reasoning_text", "text": REASONING}]
    assert message["content"][0]["text"] == CONTENT
    usage = found["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]


def test_a_streams_reasoning_has_events_of_its_own(thinker):
    whole = responding(thinker).json()
    events = test_responses.streamed(
        thinker, model=None, max_output_tokens=20, input="q", proxytune={"explain": True}
    )
    kinds = [event["type"].removeprefix("response.") for event in events]
    once = [kind for n, kind in enumerate(kinds) if not n or kind != kinds[n - 1]]
    assert once == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    for kind, text in (("reasoning_text", REASONING), ("output_text", CONTENT)):
        pieces = [e["delta"] for e in events if e["type"] == f"response.{kind}.delta"]
        assert "".join(pieces) == text
    assert stable(events[-1]["response"]["output"]) == stable(whole["output"])
    assert [e["output_index"] for e in events if e["type"].endswith("item.added")] == [0, 1]
    # Each token is shown with the piece that it belongs to.
    tokens = [t for e in events for t in e.get("proxytune", {}).get("tokens", ())]
    assert [token["index"] for token in tokens] == list(range(whole["usage"]["output_tokens"]))
    in_reasoning = [
        t for e in events if "reasoning" in e["type"] for t in e.get("proxytune", {}).get("tokens", ())
    ]  # fmt: skip
    assert len(in_reasoning) == whole["usage"]["output_tokens_details"]["reasoning_tokens"]


def test_reasoning_that_is_cut_off_is_all_there_is(thinker):
    found = test_responses.ask(thinker, model=None, max_output_tokens=2, input="q").json()
    test_responses.strictly(found)
    (item,) = found["output"]
    assert item["type"] == "reasoning" and item["status"] == found["status"] == "incomplete"
    events = test_responses.streamed(thinker, model=None, max_output_tokens=2, input="q")
    assert stable(events[-1]["response"]["output"]) == stable(found["output"])
    message = test_messages.ask(
        thinker, model=None, max_tokens=2, messages=test_reasoning.MESSAGES
    ).json()
    assert [block["type"] for block in message["content"]] == ["thinking"]
    assert message["stop_reason"] == "max_tokens"


def test_reasoning_is_a_block_before_the_text_of_a_message(thinker):
    found = thinking(thinker).json()
    assert found["content"] == [
        {"type": "thinking", "thinking": REASONING, "signature": ""},
        {"type": "text", "text": CONTENT},
    ]
    events = test_messages.streamed(
        thinker, model=None, max_tokens=20, messages=test_reasoning.MESSAGES
    )
    blocks = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    assert blocks == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
    ]
    kinds = [e["delta"]["type"] for e in events if e["type"] == "content_block_delta"]
    assert kinds.index("signature_delta") == kinds.count("thinking_delta")
    for index, kind, text in ((0, "thinking", REASONING), (1, "text", CONTENT)):
        pieces = [
            e["delta"][kind] for e in events
            if e["type"] == "content_block_delta" and e["delta"]["type"] == f"{kind}_delta"
        ]  # fmt: skip
        assert "".join(pieces) == text
        assert {"type": "content_block_stop", "index": index} in events


def test_thinking_can_be_switched_off_on_each_door(thinker):
    off = thinking(thinker, thinking={"type": "disabled"}).json()
    assert off["content"] == [{"type": "text", "text": CONTENT}]
    found = responding(thinker, reasoning={"effort": "none"}).json()
    assert [item["type"] for item in found["output"]] == ["message"]
    assert found["output"][0]["content"][0]["text"] == CONTENT


def test_reasoning_that_is_sent_back_reaches_the_template(thinker):
    """The toy's template shows it, so that its tokens count."""
    user: Any = {"role": "user", "content": "q"}

    def num_chat(*reasoning: str) -> int:
        said = [{"role": "assistant", "content": "yes", "reasoning_content": r} for r in reasoning]
        body = {"messages": [user, *said, user], "max_tokens": 1}
        answer = httpx.post(f"{thinker.url}/v1/chat/completions", json=body, timeout=20)
        found: int = answer.json()["usage"]["prompt_tokens"]
        return found

    expected = num_chat("abc")
    assert expected > num_chat("")
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "abc"}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "yes"}]}
    found = test_responses.ask(thinker, model=None, input=[user, thought, said, user]).json()
    assert found["usage"]["input_tokens"] == expected
    blocks = [
        {"type": "thinking", "thinking": "abc", "signature": "s"},
        {"type": "text", "text": "yes"},
    ]
    turns = [user, {"role": "assistant", "content": blocks}, user]
    assert test_messages.count(thinker, model=None, messages=turns).json() == {
        "input_tokens": expected
    }


def test_reasoning_is_kept_with_a_response(thinker):
    found = responding(thinker).json()
    kept = thinker.server.config.app.state.kept.get("127.0.0.1", found["id"])
    assert json.loads(kept.conversation)[-1] == {
        "role": "assistant",
        "content": CONTENT,
        "reasoning_content": REASONING,
    }
