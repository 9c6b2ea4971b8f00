"""The HTTP server as clients of the OpenAI API meet it: their own library, their own fields, their errors."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import openai
import pytest

from proxytune.request import Request, SamplingParams, Steering
from proxytune.server.schema import ChatRequest, CompletionRequest
from proxytune.testing import toy_model
from tests.support.served import Served, served

EXPERTS = {"one": 1.0, "two": 0.5}
MESSAGES: Any = [{"role": "user", "content": "abc"}]


def fresh(**options: Any) -> Any:
    return toy_model(memory=0.5, eos_logit=-100.0, experts=EXPERTS, **options)


@pytest.fixture(scope="module")
def server():
    with served(fresh(max_context=256)) as running:
        yield running


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return server.client()


def text_of(
    prompt: Any, num_new: int = 8, *, alpha: Any = None, experts: Any = None, **sampling: Any
) -> str:
    params = SamplingParams(max_new_tokens=num_new, **sampling)
    return fresh().generate(Request(prompt, params, alpha, experts)).text


def test_a_completion_is_what_the_library_generates(client):
    answer = client.completions.create(model="toy", prompt="ab", max_tokens=8, temperature=0)
    assert answer.choices[0].text == text_of("ab")
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 8)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")


def test_a_chat_is_what_the_library_generates(client):
    answer = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=8, temperature=0.8, seed=3
    )
    # A base without a chat format is stopped where the user's next turn begins.
    assert answer.choices[0].message.content == text_of(
        MESSAGES, temperature=0.8, seed=3, stop=("\nUser:",)
    )
    assert answer.choices[0].message.role == "assistant"


@pytest.mark.parametrize("is_chat", (False, True))
def test_a_streams_pieces_joined_are_the_whole_text(client, is_chat):
    options: Any = {"model": "toy", "max_tokens": 20, "temperature": 1, "seed": 5}
    if is_chat:
        whole = client.chat.completions.create(messages=MESSAGES, **options)
        stream = client.chat.completions.create(messages=MESSAGES, stream=True, **options)
        chunks = [chunk.choices[0] for chunk in stream]
        pieces = [chunk.delta.content or "" for chunk in chunks]
        assert chunks[0].delta.role == "assistant"
        assert "".join(pieces) == whole.choices[0].message.content
    else:
        whole = client.completions.create(prompt="ab", **options)
        stream = client.completions.create(prompt="ab", stream=True, **options)
        chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == whole.choices[0].text
    assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 3


def test_a_stream_tells_its_usage_at_the_end_if_asked(client):
    stream = client.completions.create(
        model="toy", prompt="ab", max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    *_, last = stream
    assert last.choices == [] and last.usage.total_tokens == 6


def test_several_answers_have_noise_of_their_own_and_are_repeatable(client):
    def ask() -> list[str]:
        answer = client.completions.create(
            model="toy", prompt=["ab", "c"], n=3, max_tokens=9, temperature=1, seed=11
        )
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert answer.usage.prompt_tokens == 3
        return [choice.text for choice in answer.choices]

    texts = ask()
    assert texts == ask() and len(set(texts)) == 6
    assert texts[1] == text_of("ab", 9, temperature=1.0, seed=12)


def test_streams_of_several_answers_are_told_apart(client):
    options: Any = {"model": "toy", "prompt": "ab", "n": 3, "max_tokens": 9, "seed": 1}
    whole = [choice.text for choice in client.completions.create(**options).choices]
    texts = ["", "", ""]
    for chunk in client.completions.create(stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == whole


def test_temperature_is_one_unless_said_and_zero_takes_no_filters(client):
    answer = client.completions.create(model="toy", prompt="ab", max_tokens=8, seed=4)
    assert answer.choices[0].text == text_of("ab", temperature=1.0, seed=4)
    answer = client.completions.create(
        model="toy", prompt="ab", max_tokens=8, temperature=0, top_p=0.5
    )
    assert answer.choices[0].text == text_of("ab")


def test_filters_penalties_biases_and_stops_mean_what_they_mean_in_the_library(client):
    answer = client.completions.create(
        model="toy",
        prompt="ab",
        max_tokens=30,
        temperature=1.2,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias={"4": 3},
        seed=9,
        stop=["ee", "q"],
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2},
    )
    assert answer.choices[0].text == text_of(
        "ab",
        30,
        temperature=1.2,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias=((4, 3.0),),
        seed=9,
        stop=("ee", "q"),
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.1,
        min_new_tokens=2,
    )


def test_token_ids_are_prompts(client):
    answer = client.completions.create(model="toy", prompt=[0, 1], max_tokens=8, temperature=0)
    assert answer.choices[0].text == text_of("ab")
    answer = client.completions.create(
        model="toy", prompt=[[0, 1], [2]], max_tokens=8, temperature=0, echo=True
    )
    assert [c.text for c in answer.choices] == ["ab" + text_of("ab"), "c" + text_of("c")]


def test_logprobs_of_a_completion_are_the_steered_ones(client):
    answer = client.completions.create(
        model="toy", prompt="ab", max_tokens=5, temperature=0, logprobs=3
    )
    found = answer.choices[0].logprobs
    steps = fresh().generate("ab", SamplingParams(max_new_tokens=5, logprobs=3)).steps
    assert found.token_logprobs == pytest.approx([step.logprob for step in steps], abs=1e-5)
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset == [0, 1, 2, 3, 4]
    for place, step in enumerate(steps):
        best = list(found.top_logprobs[place].values())
        assert best == pytest.approx([logprob for _, logprob in step.top], abs=1e-5)


def test_logprobs_of_a_chat_name_bytes_and_alternatives_also_in_a_stream(client):
    options: Any = {
        "model": "toy", "messages": MESSAGES, "max_tokens": 5, "temperature": 0,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    entries = whole.logprobs.content
    assert "".join(entry.token for entry in entries) == whole.message.content
    assert [bytes(entry.bytes).decode() for entry in entries] == [e.token for e in entries]
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    streamed = [
        entry
        for chunk in client.chat.completions.create(stream=True, **options)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries


# Steering ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "steering", "alpha", "experts"),
    [
        ("toy", {"alpha": 0}, 0.0, None),
        ("toy", {"alpha": 2.5, "expert": "two"}, 2.5, "two"),
        ("toy:one", {}, None, "one"),
        ("toy:two", {"alpha": -0.5}, -0.5, "two"),
        ("toy:two", {"expert": "two"}, None, "two"),
        ("toy", {"experts": {"one": 0.3, "two": 0.9}}, None, {"one": 0.3, "two": 0.9}),
    ],
)
def test_each_request_has_its_own_strength_and_experts(client, model, steering, alpha, experts):
    answer = client.completions.create(
        model=model, prompt="ab", max_tokens=12, temperature=0, extra_body={"proxytune": steering}
    )
    assert answer.choices[0].text == text_of("ab", 12, alpha=alpha, experts=experts)
    told = answer.choices[0].model_extra["proxytune"]["alphas"]
    assert told == fresh().recipe.strengths(Steering(alpha, experts))


def test_requests_with_other_strengths_and_experts_run_at_once_and_keep_apart(server, client):
    wanted = [
        (
            {"alpha": number / 4, "expert": "one" if number % 2 else "two"},
            f"{'abcdef'[number % 6]}b",
        )
        for number in range(16)
    ]

    def ask(item: Any) -> str:
        steering, prompt = item
        answer = client.completions.create(
            model="toy", prompt=prompt, max_tokens=30, temperature=0,
            extra_body={"proxytune": steering},
        )  # fmt: skip
        return answer.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, wanted))
    assert found == [
        text_of(prompt, 30, alpha=steering["alpha"], experts=steering["expert"])
        for steering, prompt in wanted
    ]


@pytest.mark.parametrize("is_streamed", (False, True))
def test_an_explained_answer_tells_what_each_model_gave_each_token(client, is_streamed):
    answer = client.completions.create(
        model="toy", prompt="ab", max_tokens=4, temperature=0, stream=is_streamed,
        extra_body={"proxytune": {"expert": "two", "explain": True, "explain_top": 3}},
    )  # fmt: skip
    choices = [c.choices[0] for c in answer] if is_streamed else [answer.choices[0]]
    tokens = [t for c in choices for t in (c.model_extra.get("proxytune") or {}).get("tokens", [])]
    request = Request(
        "ab", SamplingParams(max_new_tokens=4), experts="two", explain=True, explain_top=3
    )
    steps = fresh().generate(request).steps
    assert [t["token_id"] for t in tokens] == [step.token_id for step in steps]
    for token, step in zip(tokens, steps, strict=True):
        assert token["kl"] == pytest.approx(step.kl, abs=1e-5)
        assert set(token["views"]) == {"base", "steered", "two.expert", "two.anti_expert"}
        for name, view in token["views"].items():
            own = step.views[name]
            assert view["logprob"] == pytest.approx(own.logprob, abs=1e-5)
            assert (view["rank"], view["entropy"]) == (
                own.rank,
                pytest.approx(own.entropy, abs=1e-5),
            )
            assert [(t["token_id"], t["token"]) for t in view["top"]] == [
                (i, "abcdefghijklmnopqrstuvwxyz .\n:UA"[i]) for i, _ in own.top
            ]


def test_an_explained_base_alone_still_shows_the_expert_that_was_named(client):
    answer = client.completions.create(
        model="toy:two", prompt="ab", max_tokens=2, temperature=0,
        extra_body={"proxytune": {"alpha": 0, "explain": True}},
    )  # fmt: skip
    token = answer.choices[0].model_extra["proxytune"]["tokens"][0]
    assert set(token["views"]) == {"base", "steered", "two.expert", "two.anti_expert"}
    assert token["kl"] == 0 and token["views"]["base"] == token["views"]["steered"]


# What else is served ----------------------------------------------------------------------------------


def test_the_recipe_and_each_expert_are_models(client):
    assert [model.id for model in client.models.list()] == ["toy", "toy:one", "toy:two"]
    assert client.models.retrieve("toy:one").owned_by == "proxytune"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("toy:three")


def test_the_recipe_describes_itself(server):
    about = httpx.get(f"{server.url}/v1/proxytune").json()
    assert about["name"] == "toy" and about["limits"]["max_context"] == 256
    assert about["experts"] == [{"name": "one", "alpha": 1.0}, {"name": "two", "alpha": 0.5}]
    assert about["default_experts"] == ["one", "two"]
    assert (about["has_chat"], about["has_turns"], about["has_reasoning"]) == (False, True, False)


def test_health_version_and_metrics(server, client):
    client.completions.create(model="toy", prompt="ab", max_tokens=3)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert set(httpx.get(f"{server.url}/version").json()) == {"version"}
    text = httpx.get(f"{server.url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["proxytune_generated_tokens_total"]) >= 3
    assert float(lines['proxytune_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(lines["proxytune_running"]) == 0


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "gpt-4"}, "gpt-4"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"n": 99}, "n"),
        ({"stop": [5]}, "stop.0"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99": 1}}, "logit_bias"),
        ({"logprobs": 99}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "."}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [99]}, "99"),
        ({"prompt": "a" * 256}, "context"),
        ({"stream_options": {}}, "stream_options"),
        ({"beams": 4}, "beams"),
        ({"proxytune": {"alpha": 1e9}}, "proxytune.alpha"),
        ({"proxytune": {"expert": "three"}}, "three"),
        ({"proxytune": {"strength": 1}}, "proxytune.strength"),
        ({"proxytune": {"expert": "one", "experts": {"two": 1}}}, "experts"),
        ({"proxytune": {"explain_top": 999}}, "explain_top"),
        ({"model": "toy:one", "proxytune": {"expert": "two"}}, "another"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server, changes, named):
    body = {"model": "toy", "prompt": "ab", "max_tokens": 4} | changes
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == (404 if changes.get("model") == "gpt-4" else 400)
    error = answer.json()["error"]
    assert named in f"{error['message']} {error['param']}"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
    ],
)
def test_what_a_chat_cannot_honour_is_refused_by_name(server, changes, named):
    body = {"model": "toy", "messages": MESSAGES} | changes
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert named in f"{error['message']} {error['param']}"


def test_habits_of_clients_that_change_nothing_are_taken(client):
    answer = client.chat.completions.create(
        model="toy", messages=[{"role": "user", "content": [{"type": "text", "text": "abc"}]}],
        max_completion_tokens=3, temperature=0, store=False, tools=[], metadata={"a": "b"},
        response_format={"type": "text"}, user="someone", parallel_tool_calls=True,
    )  # fmt: skip
    assert answer.choices[0].message.content == text_of(MESSAGES, 3)


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(client):
    answer = client.chat.completions.create(model="toy", messages=MESSAGES, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 256


# Keys, queues, time ----------------------------------------------------------------------------------


def test_a_key_is_asked_for_where_there_are_some():
    with served(fresh(), api_keys=("first-key-of-a-customer", "second-key")) as running:
        for key in ("first-key-of-a-customer", "second-key"):
            assert running.client(key).models.list().data
        with pytest.raises(openai.AuthenticationError, match="asks for a key"):
            running.client("wrong").models.list()
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert httpx.get(running.url).status_code == 200


def test_too_many_requests_are_told_when_to_come_back():
    with served(fresh(), max_rows=1, max_waiting=1) as running:
        body = {"model": "toy", "prompt": "a", "max_tokens": 200}
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{running.url}/v1/completions", json=body, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and len(refused) + sum(a.status_code == 200 for a in answers) == 12
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
        assert refused[0].json()["error"]["code"] == "queue_full"


def test_a_text_that_takes_too_long_is_given_up():
    with served(fresh(), request_timeout_s=0.05, max_tokens=100_000) as running:
        body = {"model": "toy", "prompt": "a", "max_tokens": 50_000}
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json=body | {"stream": True}, timeout=60
        ) as stream:
            events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert json.loads(events[-2])["error"]["code"] == "timeout" and events[-1] == "[DONE]"
        deadline = time.monotonic() + 5
        while running.service.engine.num_running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.service.engine.num_running == 0


def test_the_fields_of_requests_are_those_that_the_api_documents(server):
    schema = httpx.get(f"{server.url}/openapi.json").json()
    for model, path in ((CompletionRequest, "completions"), (ChatRequest, "chat/completions")):
        body = schema["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"]["$ref"].rsplit("/", 1)[-1]
        assert set(schema["components"]["schemas"][name]["properties"]) == set(model.model_fields)
