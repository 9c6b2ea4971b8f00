"""What Anthropic's own client does: messages, streams, token counts, errors."""

from __future__ import annotations

import anthropic
from anthropic import Anthropic, AsyncAnthropic
from things import ADDRESS, EXPERT, MODEL, raised, run

_client = Anthropic(base_url=ADDRESS, api_key="none", max_retries=0, timeout=120)
_MESSAGES = [{"role": "user", "content": "Who are you?"}]


_FEW = {"model": MODEL, "max_tokens": 6}


def _ask(*, body=None, **options):
    """Ask for a greedy answer; the client has no argument for the temperature, and the API has the field."""
    asked = {**_FEW, "messages": _MESSAGES, "extra_body": {"temperature": 0, **(body or {})}}
    return _client.messages.create(**asked | options)


def message():
    answer = _ask()
    assert answer.role == "assistant" and answer.model == MODEL and answer.content[0].text
    assert answer.stop_reason in ("end_turn", "max_tokens") and answer.usage.input_tokens > 0


def streamed_message():
    with _client.messages.stream(
        **_FEW, messages=_MESSAGES, extra_body={"temperature": 0}
    ) as stream:
        text = "".join(stream.text_stream)
        whole = stream.get_final_message()
    assert text == whole.content[0].text == _ask().content[0].text
    assert whole.usage.output_tokens <= 6


async def message_in_asyncio():
    async with AsyncAnthropic(base_url=ADDRESS, api_key="none", timeout=120) as client:
        answer = await client.messages.create(model=MODEL, messages=_MESSAGES, max_tokens=4)
    assert answer.content[0].type == "text"


def system_text_whole_and_in_parts():
    whole = _ask(system="Be brief.")
    parts = _ask(
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    )
    assert whole.content[0].text == parts.content[0].text


def second_turn_with_the_content_sent_back():
    first = _ask()
    for sent_back in (first.content, [block.model_dump() for block in first.content]):
        turns = [*_MESSAGES, {"role": "assistant", "content": sent_back}]
        assert _ask(messages=[*turns, {"role": "user", "content": "Go on."}]).content


def stop_sequence():
    text = _ask(max_tokens=12).content[0].text
    mark = text[len(text) // 2 :][:3]
    stopped = _ask(max_tokens=12, stop_sequences=[mark])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == mark
    assert stopped.content[0].text == text[: text.index(mark)]


def count_of_tokens():
    count = _client.messages.count_tokens(model=MODEL, messages=_MESSAGES).input_tokens
    usage = _ask().usage
    read = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    assert count == usage.input_tokens + read


def sampling_and_metadata():
    sampling = {"temperature": 1, "top_p": 0.9, "top_k": 5}
    assert _ask(body=sampling, metadata={"user_id": "someone"}).content


def steering_in_the_body_and_in_the_name():
    base = _ask(body={"proxytune": {"alpha": 0}}).content[0].text
    assert _ask(model=EXPERT, body={"proxytune": {"alpha": 1.5}}).content[0].text != base


def errors_have_their_classes():
    unknown = raised(anthropic.NotFoundError, lambda: _ask(model="nobody"))
    assert unknown.body["type"] == "error" and unknown.body["error"]["type"] == "not_found_error"
    wrong = raised(anthropic.BadRequestError, lambda: _ask(body={"temperature": -1}))
    assert wrong.body["error"]["type"] == "invalid_request_error"


if __name__ == "__main__":
    run(globals())
