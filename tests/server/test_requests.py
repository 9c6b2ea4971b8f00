"""What requests may hold: nulls, values that change nothing, limits, and what is said of the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from proxytune.errors import InvalidRequest
from proxytune.request import Request, SamplingParams
from proxytune.server.habits import HABITS
from proxytune.server.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Generation,
    InvalidField,
    SteeringFields,
    StreamOptions,
    TextPart,
    read_request,
)
from proxytune.testing import toy_model
from tests.support.served import Served, served

MESSAGES: Any = [{"role": "user", "content": "abc"}]
BODIES: dict[type[Generation], dict[str, Any]] = {
    CompletionRequest: {"prompt": "ab"},
    ChatRequest: {"messages": MESSAGES},
}
PYDANTICS_WORDS = re.compile(
    r"Input should|valid (string|integer|number|list|dictionary|boolean)|Field required|Value error|"
    r"Extra inputs|at (least|most) \d+ (item|character)s? after validation|union|pydantic",
    re.IGNORECASE,
)


def fresh(**options: Any) -> Any:
    return toy_model(memory=0.5, eos_logit=-100.0, experts={"one": 1.0, "two": 0.5}, **options)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(fresh(max_context=128), max_tokens=40) as running:
        yield running


def post(server: Served, path: str = "completions", **body: Any) -> httpx.Response:
    needed: dict[str, Any] = {"messages": MESSAGES} if "chat" in path else {"prompt": "ab"}
    return httpx.post(f"{server.url}/v1/{path}", json=needed | body, timeout=60)


def text_of(prompt: Any, num_new: int, **sampling: Any) -> str:
    params = SamplingParams(max_new_tokens=num_new, **sampling)
    return fresh().generate(Request(prompt, params)).text


def read(kind: type[Generation], **body: Any) -> Generation:
    return read_request(kind, json.dumps(BODIES[kind] | body).encode())


def refusal(kind: type[Generation], **body: Any) -> InvalidField:
    with pytest.raises(InvalidField) as caught:
        read(kind, **body)
    return caught.value


# Nulls -----------------------------------------------------------------------------------------


def optional_fields(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize("kind", BODIES)
def test_every_optional_field_that_is_null_is_as_if_it_were_left_out(kind: type[Generation]):
    """`"n": null`, `"stream": null` and others were refused; clients send what they do not set as null."""
    for name in optional_fields(kind):
        assert read(kind, **{name: None}) == read(kind)
    assert read(kind, **dict.fromkeys(optional_fields(kind))) == read(kind)
    assert read(kind, unknown=None) == read(kind)


@pytest.mark.parametrize("role", ("assistant", "user"))
def test_every_optional_field_of_what_a_request_holds_may_be_null(role: str):
    """A second turn was refused because of the `"tool_calls": null` that clients send back."""
    message = {"role": role, "content": [{"type": "text", "text": "ab"}]}
    plain = read(ChatRequest, messages=[message])
    part = {"type": "text", "text": "ab"} | dict.fromkeys(optional_fields(TextPart))
    nulls = dict.fromkeys(optional_fields(ChatMessage)) | {"role": role, "content": [part]}
    assert read(ChatRequest, messages=[nulls]) == plain
    for model, name in ((SteeringFields, "proxytune"), (StreamOptions, "stream_options")):
        found = read(ChatRequest, stream=True, **{name: dict.fromkeys(optional_fields(model))})
        assert found == read(ChatRequest, stream=True, **{name: {}})
    odd = {"logit_bias": {"1": None}, "metadata": {"a": None}, "first_logit_bias": {"2": None}}
    assert all(not value for value in (getattr(read(ChatRequest, **odd), name) for name in odd))
    assert read(ChatRequest, proxytune={"experts": {"one": 1, "two": None}}).steering.experts == {
        "one": 1
    }


def test_what_is_needed_and_null_is_missing():
    assert (
        str(refusal(CompletionRequest, prompt=None)) == "prompt is missing, and a request needs it"
    )
    assert refusal(ChatRequest, messages=None).field == "messages"
    nobodys = [{"role": "user", "content": None}]
    assert refusal(ChatRequest, messages=nobodys).field == "messages.0.content"
    silent = [*MESSAGES, {"role": "assistant", "content": None}]
    assert read(ChatRequest, messages=silent).messages[1].as_message()["content"] == ""


@pytest.mark.parametrize("path", ("completions", "chat/completions"))
def test_nulls_change_nothing_over_http(server: Served, path: str):
    nulls = [
        "n",
        "stream",
        "echo",
        "top_k",
        "min_p",
        "repetition_penalty",
        "min_tokens",
        "ignore_eos",
        "stop",
    ]
    plain = post(server, path, temperature=0, max_tokens=4).json()["choices"]
    found = post(server, path, temperature=0, max_tokens=4, **dict.fromkeys(nulls))
    assert found.status_code == 200 and found.json()["choices"] == plain


def test_an_answer_can_be_sent_back_as_the_client_has_it(server: Served):
    answer = {
        "role": "assistant",
        "content": "green.",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning_content": None,
        "provider_specific_fields": {"refusal": None},
    }
    bare = [*MESSAGES, {"role": "assistant", "content": "green."}, *MESSAGES]
    plain = post(server, "chat/completions", messages=bare, max_tokens=4, temperature=0)
    found = post(
        server,
        "chat/completions",
        messages=[*MESSAGES, answer, *MESSAGES],
        max_tokens=4,
        temperature=0,
    )
    assert found.status_code == 200 and found.json()["choices"] == plain.json()["choices"]


# Values that change nothing ----------------------------------------------------------------------

EXAMPLES = {
    "boolean": (True, False),
    "integer": (0, 7),
    "number": (0, 1.5),
    "string": ("", "text"),
    "array": ([], [1]),
    "object": ({}, {"a": 1}),
}


@pytest.mark.parametrize("kind", BODIES)
def test_habits_of_clients_are_taken_with_what_changes_nothing(kind: type[Generation]):
    plain = read(kind).sampling(5, stops=(), logprobs=None)
    for name, habit in HABITS.items():
        for value in EXAMPLES[habit.kind] if habit.neutral is None else habit.neutral:
            found = read(kind, **{name: value})
            assert found.sampling(5, stops=(), logprobs=None) == plain


@pytest.mark.parametrize("kind", BODIES)
def test_habits_with_an_effect_that_is_not_here_are_refused_with_a_reason(kind: type[Generation]):
    for name, habit in HABITS.items():
        if habit.neutral is None:
            others = EXAMPLES["array" if habit.kind == "object" else "object"]
        else:
            neutral = [json.dumps(value) for value in habit.neutral]
            values = (True, False, 1, 0.25, "other", [1], {"a": 1})
            others = tuple(value for value in values if json.dumps(value) not in neutral)
        for value in others:
            error = refusal(kind, **{name: value})
            assert str(error).startswith(name) and error.field == name


def test_a_true_is_no_one():
    assert "typical_p" in str(refusal(CompletionRequest, typical_p=True))
    assert "mirostat" in str(refusal(CompletionRequest, mirostat=False))


@pytest.mark.parametrize(
    ("body", "sampling"),
    [
        ({"temperature": 0.7, "top_p": 0, "seed": 3}, {}),
        ({"temperature": 0.7, "top_p": 0.0, "top_k": 5}, {}),
        ({"temperature": 0, "stop": ""}, {}),
        ({"temperature": 0, "stop": []}, {}),
        ({"temperature": 0, "stop": ["", "b"]}, {"stop": ("b",)}),
        ({"temperature": 3, "seed": 4}, {"temperature": 3.0, "seed": 4}),
        ({"temperature": 0, "repeat_penalty": 1.3}, {"repetition_penalty": 1.3}),
        (
            {"temperature": 0, "repeat_penalty": 1.3, "repeat_last_n": -1},
            {"repetition_penalty": 1.3},
        ),
        ({"temperature": 0, "repeat_last_n": 64, "top_k": -1}, {}),
        ({"temperature": 0, "n": 1, "best_of": 1, "suffix": "", "logit_bias": {}}, {}),
    ],
)
def test_values_mean_what_they_mean_elsewhere(server: Served, body, sampling):
    """`top_p: 0` and empty stop strings were refused, and temperatures above 2."""
    answer = post(server, max_tokens=12, **body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == text_of("ab", 12, **sampling)


def test_a_seed_of_minus_one_is_a_new_one_each_time(server: Served):
    seeds = {
        post(server, max_tokens=1, seed=-1, proxytune={}).json()["choices"][0]["proxytune"]["seed"]
        for _ in range(4)
    }
    assert len(seeds) == 4


def test_the_model_may_be_left_out(server: Served):
    assert post(server, max_tokens=2).json()["model"] == "toy"


def test_top_logprobs_of_zero_list_the_chosen_token_alone(server: Served):
    body = {"max_tokens": 2, "top_logprobs": 0}
    entries = post(server, "chat/completions", logprobs=True, **body).json()["choices"][0][
        "logprobs"
    ]
    assert [entry["top_logprobs"] for entry in entries["content"]] == [[], []]
    assert post(server, "chat/completions", **body).json()["choices"][0]["logprobs"] is None


# How many tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ("completions", "chat/completions"))
@pytest.mark.parametrize("is_streamed", (False, True))
def test_more_tokens_than_are_allowed_are_cut_to_the_limit_and_a_header_says_so(
    server: Served, path: str, is_streamed: bool
):
    """They were a 400. Clients send the largest number that they know."""
    answer = post(server, path, max_tokens=100_000, stream=is_streamed)
    assert answer.status_code == 200 and answer.headers["x-proxytune-max-tokens"] == "40"
    assert '"length"' in answer.text
    assert "x-proxytune-max-tokens" not in post(server, path, max_tokens=40).headers


def test_more_tokens_than_fit_into_the_context_are_cut_to_its_room(server: Served):
    answer = post(server, prompt=["a" * 114, "a" * 124], max_tokens=30)
    assert answer.headers["x-proxytune-max-tokens"] == "4"
    assert answer.json()["usage"]["completion_tokens"] == 14 + 4
    assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["length"] * 2


@pytest.mark.parametrize(
    ("body", "num_new"),
    [
        ({}, 16),
        ({"max_tokens": None}, 16),
        ({"max_tokens": -1}, 40),
        ({"n_predict": -1}, 40),
        ({"n_predict": 3}, 3),
        ({"max_tokens": 3, "n_predict": 3}, 3),
        ({"max_tokens": 0}, 0),
    ],
)
def test_each_way_to_say_how_many_tokens(server: Served, body, num_new):
    answer = post(server, **body)
    assert answer.json()["usage"]["completion_tokens"] == num_new
    assert "x-proxytune-max-tokens" not in answer.headers
    assert answer.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", ("completions", "chat/completions"))
@pytest.mark.parametrize("is_streamed", (False, True))
def test_no_tokens_are_an_empty_text(server: Served, path: str, is_streamed: bool):
    answer = post(server, path, max_tokens=0, n=2, stream=is_streamed)
    if not is_streamed:
        choices = answer.json()["choices"]
        texts = [c["message"]["content"] if "message" in c else c["text"] for c in choices]
        assert texts == ["", ""]
    assert answer.status_code == 200 and answer.text.count('"length"') == 2


def test_fields_that_mean_the_same_may_not_contradict_each_other():
    assert "contradict" in str(refusal(CompletionRequest, max_tokens=3, n_predict=4))
    assert "contradict" in str(refusal(ChatRequest, max_tokens=3, max_completion_tokens=4))
    body = {"repeat_penalty": 1.1, "repetition_penalty": 1.2}
    assert "contradict" in str(refusal(CompletionRequest, **body))
    assert "repeat_last_n" in str(refusal(CompletionRequest, repeat_penalty=1.1, repeat_last_n=64))


def test_a_stream_reports_its_usage_in_every_piece_if_asked(server: Served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"stream": True, "max_tokens": 3, "temperature": 0}
    lines = post(server, stream_options=options, **body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]
    assert chunks[-1]["choices"] == []
    lines = post(server, stream_options={"include_usage": True}, **body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    assert [chunk["usage"] is None for chunk in chunks] == [True, True, True, False]


@pytest.mark.parametrize("name", ("prediction", "chat_template_kwargs", "prompt_cache_key"))
def test_half_a_character_is_refused_also_where_nothing_reads_it(name: str):
    half = "\ud800" if name == "prompt_cache_key" else {"a": ["\ud800"]}
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        read(ChatRequest, **{name: half})
    whole = "\U0001f600" if name == "prompt_cache_key" else {"a": ["\U0001f600"]}
    assert getattr(read(ChatRequest, **{name: whole}), name) == whole


# What is said of the rest ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        (CompletionRequest, {"temperature": "x"}, 'temperature is "x", and must be a number'),
        (CompletionRequest, {"n": 2.5}, "n is 2.5, and must be a whole number"),
        (CompletionRequest, {"stream": 1}, "stream is 1, and must be true or false"),
        (CompletionRequest, {"n": 99}, "n is 99, and must be at most 8"),
        (CompletionRequest, {"user": 5}, "user is 5, and must be text"),
        (CompletionRequest, {"stop": 5}, "stop is 5, and must be text or a list of texts"),
        (
            CompletionRequest,
            {"prompt": {}},
            "prompt is an object, and must be text, a list of token ids, or a list of either",
        ),
        (CompletionRequest, {"prompt": []}, "prompt has no items, and must have at least 1"),
        (
            CompletionRequest,
            {"stop": ["a"] * 17},
            "stop has more than 16 items, which is all that it may have",
        ),
        (
            CompletionRequest,
            {"logit_bias": {"x": 1}},
            'logit_bias: its keys must be token ids, unlike "x"',
        ),
        (
            CompletionRequest,
            {"use_beam_search": True},
            "use_beam_search is true, and there is no beam search here",
        ),
        (
            CompletionRequest,
            {"suffix": "."},
            'suffix is ".", and there is no infilling here: texts go on at their end',
        ),
        (CompletionRequest, {"beams": 4}, "'beams' is not a field that can be honoured here"),
        (
            CompletionRequest,
            {"proxytune": {"strength": 1}},
            "'proxytune.strength' is not a field that can be honoured here",
        ),
        (
            ChatRequest,
            {"tools": [{"type": "function"}]},
            "tools: tools cannot be called here: every answer is text",
        ),
        (ChatRequest, {"messages": "a"}, 'messages is "a", and must be a list'),
        (
            ChatRequest,
            {"messages": [{"role": "someone", "content": "a"}]},
            "messages.0.role is \"someone\", and must be one of 'system', 'developer', 'user', "
            "'assistant'",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "tool", "content": "a"}]},
            'messages.0.role is "tool", and tools cannot be called here, so their results are not read; '
            "roles are system, developer, user and assistant",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'messages.0.content.0.type is "image_url", and the models here read text alone, so its parts '
            'are of the type "text"',
        ),
    ],
)
def test_a_fault_is_said_in_one_sentence_that_names_the_field(kind, body, said):
    assert str(refusal(kind, **body)) == said


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["text", "user", "assistant", "tool", "auto", "none", "1", "image_url"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "alpha", "experts", "1", "x", "include_usage"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", BODIES)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_words_of_the_validator_reach_a_client(kind: type[Generation], data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(kind.model_fields)))
    try:
        read(kind, **{name: data.draw(VALUES)})
    except InvalidRequest as error:
        assert not PYDANTICS_WORDS.search(str(error)), str(error)
        assert len(str(error)) < 400


@pytest.mark.parametrize("kind", BODIES)
def test_every_kind_of_fault_has_a_sentence_of_its_own(kind: type[Generation]):
    for name in kind.model_fields:
        for value in ("x", 1.5, 1, -(10**9), True, [], [[]], [5], ["x"] * 2000, {}, {"x": 5}):
            try:
                read(kind, **{name: value})
            except InvalidRequest as error:
                assert "cannot be read" not in str(error), (name, value)
