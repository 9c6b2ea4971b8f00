"""What LiteLLM does, through its providers of OpenAI's and Anthropic's APIs and of vLLM."""

from __future__ import annotations

import litellm
from things import ADDRESS, EXPERT, MODEL, TEXT, raised, run

_MESSAGES = [{"role": "user", "content": "Who are you?"}]
_WHERE = {"api_base": f"{ADDRESS}/v1", "api_key": "none", "timeout": 120, "num_retries": 0}


def _ask(model=f"openai/{MODEL}", **options):
    asked = {"messages": _MESSAGES, "max_tokens": 6, "temperature": 0, **_WHERE}
    return litellm.completion(model=model, **asked | options)


def chat():
    answer = _ask()
    assert answer.choices[0].message.content and answer.usage.completion_tokens <= 6


def streamed_chat():
    text = "".join(chunk.choices[0].delta.content or "" for chunk in _ask(stream=True))
    assert text == _ask().choices[0].message.content


async def chat_in_asyncio():
    answer = await litellm.acompletion(
        model=f"openai/{MODEL}", messages=_MESSAGES, max_tokens=4, **_WHERE
    )
    assert answer.choices[0].message.role == "assistant"


def second_turn_with_the_message_as_it_was_dumped():
    first = _ask().choices[0].message.model_dump()
    assert _ask(messages=[*_MESSAGES, first, {"role": "user", "content": "Go on."}]).choices


def logprobs():
    found = _ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 for token in found)


def completion():
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt=TEXT, max_tokens=6, temperature=0, **_WHERE
    )
    assert answer.choices[0].text


def as_a_server_of_vllm():
    assert _ask(f"hosted_vllm/{MODEL}", top_k=5, seed=1, temperature=1).choices[0].message.content


def messages_of_anthropics_api():
    answer = _ask(f"anthropic/{MODEL}", api_base=ADDRESS)
    assert answer.choices[0].message.content == _ask().choices[0].message.content


def responses():
    answer = litellm.responses(
        model=f"openai/{MODEL}", input="Who are you?", max_output_tokens=16, **_WHERE
    )
    assert answer.output[0].content[0].text


def steering():
    asked = {"messages": [{"role": "user", "content": "Good morrow!"}]}
    base, steered = (
        _ask(f"openai/{EXPERT}", extra_body={"proxytune": {"alpha": alpha}}, **asked)
        for alpha in (0, 1.5)
    )
    assert base.choices[0].message.content != steered.choices[0].message.content


def errors_have_their_classes():
    raised(litellm.NotFoundError, lambda: _ask("openai/nobody"))
    raised(litellm.BadRequestError, lambda: _ask(temperature=-1))


if __name__ == "__main__":
    run(globals())
