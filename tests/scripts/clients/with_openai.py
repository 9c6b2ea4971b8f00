"""What OpenAI's own client does: chats, completions, responses, models, errors, streams, retries."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor

import openai
from openai import AsyncOpenAI, OpenAI
from things import ADDRESS, EXPERT, MODEL, TEXT, raised, run

_client = OpenAI(base_url=f"{ADDRESS}/v1", api_key="none", max_retries=0, timeout=120)
_USER = {"role": "user", "content": "Who are you?"}


def _ask(**options):
    return _client.chat.completions.create(
        **{"model": MODEL, "messages": [_USER], "max_tokens": 6, "temperature": 0, **options}
    )


def _complete(**options):
    return _client.completions.create(
        **{"model": MODEL, "prompt": TEXT, "max_tokens": 6, "temperature": 0, **options}
    )


def _respond(**options):
    return _client.responses.create(
        **{"model": MODEL, "input": "Who are you?", "max_output_tokens": 16, "temperature": 0}
        | options
    )


# Chats --------------------------------------------------------------------------------------------------


def chat():
    answer = _ask()
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def streamed_chat():
    chunks = list(_ask(stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks].count(None) == len(chunks) - 1
    assert text == _ask().choices[0].message.content


def chat_stream_of_the_clients_own_making():
    with _client.chat.completions.stream(
        model=MODEL, messages=[_USER], max_tokens=6, temperature=0
    ) as events:
        deltas = [event.delta for event in events if event.type == "content.delta"]
    assert "".join(deltas) == _ask().choices[0].message.content


async def chats_at_once():
    async with AsyncOpenAI(base_url=f"{ADDRESS}/v1", api_key="none", timeout=120) as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model=MODEL, messages=[_USER], max_tokens=4, temperature=0
                )
                for _ in range(4)
            )
        )
    assert len({answer.choices[0].message.content for answer in answers}) == 1


async def streamed_chat_in_asyncio():
    async with AsyncOpenAI(base_url=f"{ADDRESS}/v1", api_key="none", timeout=120) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[_USER], max_tokens=4, stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def second_turn_with_the_message_sent_back():
    first = _ask().choices[0].message
    for sent_back in (first, first.model_dump()):
        answer = _ask(messages=[_USER, sent_back, {"role": "user", "content": "Go on."}])
        assert answer.choices[0].message.role == "assistant"


def developer_and_system_are_one_role():
    asked = [{"role": role, "content": "Be brief."} for role in ("developer", "system")]
    texts = {_ask(messages=[first, _USER]).choices[0].message.content for first in asked}
    assert len(texts) == 1


def content_in_parts():
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    answer = _ask(messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == _ask().choices[0].message.content


def null_fields():
    nothing = dict.fromkeys(
        ("stop", "seed", "logit_bias", "logprobs", "top_logprobs", "n", "tools", "user", "store"),
        None,
    )
    nothing |= {"response_format": None, "stream_options": None, "presence_penalty": None}
    assert _ask(**nothing).choices[0].message.content == _ask().choices[0].message.content


def max_completion_tokens():
    answer = _ask(max_tokens=openai.omit, max_completion_tokens=3)
    assert answer.usage.completion_tokens <= 3


def metadata_store_and_service_tier():
    answer = _ask(
        metadata={"ticket": "7"},
        store=True,
        service_tier="auto",
        user="someone",
        safety_identifier="someone",
        prompt_cache_key="a",
    )
    assert answer.choices[0].message.content == _ask().choices[0].message.content


def logprobs_of_a_chat():
    found = _ask(logprobs=True, top_logprobs=3).choices[0]
    assert "".join(token.token for token in found.logprobs.content) == found.message.content
    assert all(len(token.top_logprobs) == 3 for token in found.logprobs.content)
    assert all(
        token.logprob == token.top_logprobs[0].logprob <= 0 for token in found.logprobs.content
    )


# Completions --------------------------------------------------------------------------------------------


def completion():
    answer = _complete()
    assert answer.object == "text_completion" and answer.choices[0].text
    assert answer.usage.completion_tokens == 6 and answer.choices[0].finish_reason == "length"


def streamed_completion():
    text = "".join(chunk.choices[0].text for chunk in _complete(stream=True))
    assert text == _complete().choices[0].text


def several_answers_and_several_prompts():
    choices = _complete(n=3, temperature=1.0, seed=3, max_tokens=12).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.text for choice in choices}) > 1
    first, second = _complete(prompt=[TEXT, TEXT], max_tokens=4).choices
    assert first.text == second.text


def stop():
    text = _complete(max_tokens=12).choices[0].text
    mark = text[len(text) // 2 :][:3]
    stopped = _complete(max_tokens=12, stop=[mark]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == text[: text.index(mark)]


def seed():
    texts = {_complete(temperature=1.0, seed=5, max_tokens=12).choices[0].text for _ in range(2)}
    assert len(texts) == 1


def logprobs_of_a_completion():
    found = _complete(logprobs=2).choices[0]
    assert "".join(found.logprobs.tokens) == found.text
    assert found.logprobs.text_offset[0] == 0 and len(found.logprobs.top_logprobs) == 6


def logit_bias():
    # Raised so far, one token comes alone. Ids below 1,000 are single characters or short pieces.
    text = _complete(logit_bias={"500": 100}, max_tokens=3).choices[0].text
    assert len(set(text[i : i + len(text) // 3] for i in range(0, len(text), len(text) // 3))) == 1
    assert text != _complete(max_tokens=3).choices[0].text


def echo():
    assert _complete(echo=True).choices[0].text == TEXT + _complete().choices[0].text


def scored_prompt():
    found = _complete(echo=True, logprobs=0, max_tokens=0).choices[0]
    assert found.text == TEXT and "".join(found.logprobs.tokens) == TEXT
    assert found.logprobs.token_logprobs[0] is None
    assert all(each < 0 for each in found.logprobs.token_logprobs[1:])


def usage_at_the_end_of_a_stream():
    chunks = list(_complete(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])


# Models and steering ------------------------------------------------------------------------------------


def models():
    names = [model.id for model in _client.models.list()]
    assert names[0] == MODEL and EXPERT in names
    assert _client.models.retrieve(EXPERT).id == EXPERT


def steering_in_the_body_and_in_the_name():
    base = _complete(extra_body={"proxytune": {"alpha": 0}}).choices[0].text
    by_name = _complete(model=EXPERT, extra_body={"proxytune": {"alpha": 1.5}}).choices[0].text
    by_body = _complete(
        extra_body={"proxytune": {"experts": {"tinyshakespeare": 1.5}}}, max_tokens=6
    )
    assert by_name == by_body.choices[0].text != base


# Responses ----------------------------------------------------------------------------------------------


def response():
    answer = _respond()
    assert answer.id.startswith("resp_") and answer.output_text
    assert answer.output[0].role == "assistant" and answer.usage.output_tokens <= 16


def streamed_response():
    events = list(_respond(stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert text == events[-1].response.output_text == _respond().output_text


def response_to_a_response():
    first = _respond()
    second = _respond(input="Go on.", previous_response_id=first.id)
    turns = [_USER, {"role": "assistant", "content": first.output_text}]
    by_hand = _respond(input=[*turns, {"role": "user", "content": "Go on."}])
    assert second.previous_response_id == first.id
    assert second.output_text == by_hand.output_text
    assert _client.responses.retrieve(first.id).output_text == first.output_text


# Connections and errors ---------------------------------------------------------------------------------


def raw_and_streaming_responses():
    raw = _client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[_USER], max_tokens=4, temperature=0
    )
    assert raw.status_code == 200 and raw.headers["x-request-id"]
    assert raw.parse().id == raw.parse().id
    with _client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=[_USER], max_tokens=4, temperature=0
    ) as streaming:
        assert "chat.completion" in "".join(streaming.iter_lines())


def a_limit_beyond_the_servers_is_cut_and_reported():
    raw = _client.completions.with_raw_response.create(
        model=MODEL, prompt=TEXT, max_tokens=10_000_000, stop=[" ", "\n"]
    )
    assert int(raw.headers["x-proxytune-max-tokens"]) == 64


def errors_have_their_classes():
    unknown = raised(openai.NotFoundError, lambda: _ask(model="nobody"))
    assert unknown.code == "model_not_found" and unknown.param == "model"
    wrong = raised(openai.BadRequestError, lambda: _ask(temperature=-1))
    assert wrong.param == "temperature" and wrong.type == "invalid_request_error"
    long = raised(openai.BadRequestError, lambda: _complete(prompt="word " * 60_000))
    assert long.code == "context_length_exceeded"
    client = _client.with_options(base_url=os.environ["ADDRESS_WITH_KEY"] + "/v1")
    raised(openai.AuthenticationError, client.models.list)
    key = os.environ["KEY"]
    assert client.with_options(api_key=key).models.list().data[0].id == MODEL


def timeouts():
    raised(openai.APITimeoutError, lambda: _complete(timeout=0.01, max_tokens=60))


def retries():
    # A server with room for one text and few that wait refuses one more, with a time to come back.
    busy = _client.with_options(base_url=os.environ["BUSY_ADDRESS"] + "/v1")
    asked = {"model": MODEL, "prompt": TEXT, "max_tokens": 64}
    streams = []

    def fill():
        while len(streams) < 8:
            streams.append(busy.completions.create(**asked, stream=True))

    refused = raised(openai.RateLimitError, fill)
    assert int(refused.response.headers["retry-after"]) > 0
    with ThreadPoolExecutor() as pool:
        patient = pool.submit(busy.with_options(max_retries=5).completions.create, **asked)
        time.sleep(0.2)
        for stream in streams:
            stream.close()
        assert patient.result().choices[0].text


def closing_a_stream_cancels_its_text():
    stream = _complete(max_tokens=64, stream=True)
    next(stream)
    stream.close()
    assert _complete(max_tokens=2).usage.completion_tokens == 2


if __name__ == "__main__":
    run(globals())
