"""Texts and conversations as token ids, and back: `POST /tokenize` and `POST /detokenize`.

Requests and answers are those of vLLM's server, and with `content` in place of `prompt` those of llama.cpp's.
The tokens are the base's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, model_validator

from proxytune.measure.score import smallest_context
from proxytune.model import ProxyTuned
from proxytune.request import ChatOptions
from proxytune.server.answer import Json
from proxytune.server.doors import json_bytes, read_body
from proxytune.server.habits import HABITS
from proxytune.server.schema import (
    MAX_MESSAGES,
    MAX_TEMPLATE_KWARGS,
    ChatMessage,
    Fields,
    InvalidField,
    Name,
    Text,
    TokenId,
)
from proxytune.server.service import Service
from proxytune.text.prompts import prompt_ids, render_text, text_ids

MAX_TOKENS = 2**18
"""Maximum number of token ids in a request."""


class TokenizeRequest(Fields):
    """`POST /tokenize`: one of `prompt`, `messages` and `content`."""

    model: Name | None = None
    prompt: Text | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    add_special_tokens: StrictBool | None = Field(
        None, description="Default: true for a prompt; for messages, as the base reads chats"
    )
    return_token_strs: StrictBool | None = None
    add_generation_prompt: StrictBool | None = Field(None, description="Default: true")
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=MAX_TEMPLATE_KWARGS)
    tools: Annotated[Any, AfterValidator(HABITS["tools"].check)] = Field(
        None, description="Cannot be honoured unless empty"
    )
    # As llama.cpp's server has it.
    content: Text | None = Field(None, description="A text, without special tokens unless asked")
    add_special: StrictBool | None = Field(None, description="As `add_special_tokens`, for content")
    parse_special: Literal[True] | None = None
    with_pieces: StrictBool | None = Field(
        None, description="Return each token of content with its text"
    )

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        given = [
            name for name in ("prompt", "messages", "content") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"one of prompt, messages and content is needed, and {found} is there")
        for name, owner in _OWNERS.items():
            if getattr(self, name) is not None and not set(given) & set(owner.split(" or ")):
                raise ValueError(f"{name} belongs to {owner}, and {given[0]} is there")
        return self


_OWNERS = {
    "add_special_tokens": "prompt or messages",
    "add_generation_prompt": "messages",
    "continue_final_message": "messages",
    "chat_template_kwargs": "messages",
    "add_special": "content",
    "with_pieces": "content",
}


class DetokenizeRequest(Fields):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]


def tokenize(service: Service, body: bytes | bytearray, desk: ProxyTuned) -> bytes:
    """Return the JSON of a text's or a conversation's tokens.

    Raises:
        UserError: A field cannot be honoured.
    """
    asked = read_body(service, TokenizeRequest, body)
    if asked.model is not None:
        service.check_model(asked.model)
    token_ids = _token_ids(asked, desk)
    found: Json = {
        "count": len(token_ids),
        "max_model_len": smallest_context(service.model.ensemble.members),
        "tokens": token_ids,
        "token_strs": None,
    }
    if asked.with_pieces:
        found["tokens"] = [{"id": each, "piece": _piece(service, each)} for each in token_ids]
    if asked.return_token_strs:
        found["token_strs"] = list(service.model.tokenizer.convert_ids_to_tokens(token_ids))
    return json_bytes(found)


def _token_ids(asked: TokenizeRequest, desk: ProxyTuned) -> list[int]:
    base = desk.formats[0]
    if asked.content is not None:
        return (prompt_ids if asked.add_special else text_ids)(asked.content, base.tokenizer)
    if asked.prompt is not None:
        has_special = asked.add_special_tokens is not False
        return (prompt_ids if has_special else text_ids)(asked.prompt, base.tokenizer)
    assert asked.messages is not None
    options = ChatOptions(
        add_generation_prompt=asked.add_generation_prompt,
        continue_final_message=bool(asked.continue_final_message),
        template_kwargs=asked.chat_template_kwargs or {},
    )
    messages: Any = [message.as_message() for message in asked.messages]
    if asked.add_special_tokens is None:
        return base.render(messages, "the base", options)
    text = render_text(
        messages,
        prompt_format=base.chat,
        tokenizer=base.tokenizer,
        name="the base",
        chat_template=base.template,
        options=options,
    )
    return (prompt_ids if asked.add_special_tokens else text_ids)(text, base.tokenizer)


def _piece(service: Service, token_id: int) -> str | list[int]:
    """Return a token's text, or its bytes where they are no text."""
    raw = service.tokens.bytes_by_id.get(token_id, b"")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def detokenize(service: Service, body: bytes | bytearray, desk: ProxyTuned) -> bytes:
    """Return the JSON of the text of tokens.

    Raises:
        UserError: A field cannot be honoured.
    """
    asked = read_body(service, DetokenizeRequest, body)
    if asked.model is not None:
        service.check_model(asked.model)
    width = service.model.ensemble.vocabulary.width
    high = max(asked.tokens, default=0)
    if high >= width:
        raise InvalidField(f"tokens: holds {high}, and the base has {width} token ids", "tokens")
    text = desk.formats[0].tokenizer.decode(
        asked.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    # llama.cpp's server calls it `content`; its clients name no model.
    return json_bytes({"prompt": text} | ({} if asked.model is not None else {"content": text}))
