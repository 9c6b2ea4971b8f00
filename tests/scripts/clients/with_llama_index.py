"""What LlamaIndex's OpenAILike does: completions and chats, whole, streamed and in asyncio."""

from __future__ import annotations

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from things import ADDRESS, EXPERT, MODEL, TEXT, run


def _model(name=MODEL, *, is_chat_model=True, **options):
    return OpenAILike(
        model=name,
        api_base=f"{ADDRESS}/v1",
        api_key="none",
        is_chat_model=is_chat_model,
        max_tokens=6,
        temperature=0,
        timeout=120,
        max_retries=0,
        **options,
    )


_ASKED = [ChatMessage(role="user", content="Who are you?")]


def chat():
    assert _model().chat(_ASKED).message.content


def streamed_chat():
    deltas = [piece.delta or "" for piece in _model().stream_chat(_ASKED)]
    assert "".join(deltas) == _model().chat(_ASKED).message.content


async def chat_in_asyncio():
    assert (await _model().achat(_ASKED)).message.content


def second_turn():
    first = _model().chat(_ASKED).message
    turns = [*_ASKED, first, ChatMessage(role="user", content="Go on.")]
    assert _model().chat(turns).message is not None


def completion():
    model = _model(is_chat_model=False)
    deltas = [piece.delta or "" for piece in model.stream_complete(TEXT)]
    assert model.complete(TEXT).text == "".join(deltas) != ""


def steering():
    base, steered = (
        _model(EXPERT, additional_kwargs={"extra_body": {"proxytune": {"alpha": alpha}}})
        .chat(_ASKED)
        .message.content
        for alpha in (0, 1.5)
    )
    assert base != steered


if __name__ == "__main__":
    run(globals())
