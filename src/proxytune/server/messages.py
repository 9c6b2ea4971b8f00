"""The door of the Anthropic API: `POST /v1/messages`, with its own blocks, events and usage.

A request is a chat: `system` is its first message, and an assistant's message at the end is the beginning of
the answer. Only text goes in and out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    StringConstraints,
    create_model,
    model_validator,
)

from proxytune.model import ProxyTuned
from proxytune.server.answer import Json
from proxytune.server.doors import (
    PLAIN_ONLY,
    Door,
    Gathered,
    Piece,
    Writer,
    as_fields,
    common_fields,
    event,
    json_bytes,
    read_body,
)
from proxytune.server.guards import Refusal
from proxytune.server.habits import HABITS, Habit, NotHonoured
from proxytune.server.schema import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    ChatMessage,
    ChatRequest,
    Fields,
    Generation,
    Name,
    SteeringFields,
    Stop,
    Text,
    option_field,
)
from proxytune.server.service import Answer, AnswerPart, Order, Service


class CacheControl(Fields):
    """Where a prompt may be cached. Here it always is, so this changes nothing."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


def _check_block(kind: Any) -> Any:
    if isinstance(kind, str) and kind not in ("text", "thinking"):
        raise NotHonoured("the models here read text alone: blocks are text, or thinking before it")
    return kind


class Block(Fields):
    """A piece of a message: text, or the thinking before it."""

    type: Annotated[Literal["text", "thinking"], BeforeValidator(_check_block)]
    text: Text | None = None
    thinking: Text | None = None
    signature: Annotated[str, StringConstraints(max_length=10_000)] | None = None
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Block:
        if getattr(self, self.type) is None:
            raise ValueError(f"a block of the type {self.type!r} needs the field {self.type!r}")
        other = self.thinking if self.type == "text" else self.text
        if other is not None:
            raise ValueError(f"a block of the type {self.type!r} has no other text")
        return self


class TextBlock(Fields):
    """A piece of the system message."""

    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(Fields):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: (
        Text | Annotated[list[Block], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    )

    @model_validator(mode="after")
    def _check(self) -> InputMessage:
        if self.role != "assistant" and self.thinking:
            raise ValueError("only the assistant's messages have blocks of the type 'thinking'")
        return self

    @property
    def thinking(self) -> str:
        """What the assistant thought before."""
        if isinstance(self.content, str):
            return ""
        return "".join(block.thinking or "" for block in self.content)

    @property
    def text(self) -> str:
        """Its text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(block.text or "" for block in self.content)


class Metadata(Fields):
    """Who asks."""

    user_id: Annotated[str, StringConstraints(max_length=256)] | None = Field(
        None, description="As `user` in the other APIs"
    )


def _check_thinking(kind: Any) -> Any:
    if kind in ("enabled", "between_tools"):
        raise NotHonoured("thinking has no budget here; it can be adaptive or disabled")
    return kind


class Thinking(Fields):
    """Whether a model that reasons is to reason."""

    type: Annotated[Literal["disabled", "adaptive"], BeforeValidator(_check_thinking)] = Field(
        description="`disabled` is given to chat templates as `enable_thinking`"
    )
    budget_tokens: None = None
    display: Literal["summarized"] | None = None


class OutputConfig(Fields):
    """How much a model that reasons is to reason."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Given to chat templates as `reasoning_effort`"
    )
    format: None = None


class ToolChoice(Fields):
    """There are no tools, so each choice that allows none is the same."""

    type: Literal["none", "auto"]
    disable_parallel_tool_use: StrictBool | None = None


_HABITS = {
    "tools": HABITS["tools"],
    "speed": Habit("string", ("standard",), "there is one speed here"),
    "mcp_servers": Habit("array", ([],), "there are no such servers here"),
}
"""Fields of conversations that are accepted with the values that change nothing."""
_MESSAGE_HABITS = PLAIN_ONLY | {
    "n_predict": Habit("integer", (), "max_tokens is the field for that here"),
    "stop": Habit("string", (), "stop_sequences is the field for that here"),
    "stream_options": Habit("object", ({},), "the usage is always part of a stream of messages"),
    "require_certified": Habit("boolean", (False,), "a message cannot say why it ended then"),
    "service_tier": Habit("string", ("auto", "standard_only"), "there is one tier here"),
    "container": Habit("string", (), "there are no containers here"),
    "inference_geo": Habit("string", (), "the models run where this server runs"),
}
"""Those of messages."""
_Conversation: Any = create_model("_Conversation", __base__=Fields, **as_fields(_HABITS))
_Message: Any = create_model("_Message", __base__=Generation, **as_fields(_MESSAGE_HABITS))


class Conversation(_Conversation):
    """What is asked, without how it is answered."""

    messages: list[InputMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    system: (
        Text | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None
    ) = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = Field(None, description="Accepted; changes nothing here")
    tool_choice: ToolChoice | None = None

    def chat(self) -> dict[str, Any]:
        """Return the fields of the chat that this is."""
        messages: list[Json] = []
        if self.system is not None:
            system = self.system
            if not isinstance(system, str):
                system = "".join(block.text for block in system)
            messages.append({"role": "system", "content": system})
        for each in self.messages:
            message: Json = {"role": each.role, "content": each.text}
            if each.thinking:
                message["reasoning_content"] = each.thinking
            messages.append(message)
        values: dict[str, Any] = {
            "messages": [ChatMessage.model_construct(**message) for message in messages]
        }
        if self.messages[-1].role == "assistant":
            values["continue_final_message"] = True
        if self.thinking is not None and self.thinking.type == "disabled":
            values["chat_template_kwargs"] = {"enable_thinking": False}
        if self.output_config is not None and self.output_config.effort is not None:
            values["reasoning_effort"] = self.output_config.effort
        return values


class MessagesRequest(Conversation, _Message):
    """`POST /v1/messages`."""

    max_tokens: int = option_field("max_new_tokens", default=..., le=2**31)
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    metadata: Metadata | None = None  # type: ignore[assignment]


class CountTokensRequest(Conversation):
    """`POST /v1/messages/count_tokens`."""

    model: Name | None = None
    proxytune: SteeringFields | None = Field(
        None, description="Does not change what the base reads"
    )


class MessagesDoor(Door):
    """Reads messages."""

    kind = MessagesRequest

    def read(
        self, body: bytes | bytearray, desk: ProxyTuned, client: str
    ) -> tuple[Writer, Generation, list[Order]]:
        """Return who writes a message, the chat that it answers, and its order."""
        asked = read_body(self.service, MessagesRequest, body)
        values = common_fields(asked) | asked.chat()
        values["max_completion_tokens"] = asked.max_tokens
        values["stop"] = asked.stop_sequences
        if asked.metadata is not None:
            values["user"] = asked.metadata.user_id or asked.user
        wanted = ChatRequest.model_construct(**values)
        return _MessageWriter(self.service, asked), wanted, self.service.orders(wanted, desk)


def count_tokens(service: Service, body: bytes | bytearray, desk: ProxyTuned) -> bytes:
    """Return the JSON that says how many tokens the base reads of a conversation.

    Raises:
        UserError: A field cannot be honoured.
    """
    asked = read_body(service, CountTokensRequest, body)
    if asked.model is not None:
        service.check_model(asked.model)
    wanted = ChatRequest.model_construct(**asked.chat())
    messages: Any = [message.as_message() for message in wanted.messages]
    token_ids = desk.formats[0].render(messages, "the base", wanted.chat_options)
    return json_bytes({"input_tokens": len(token_ids)})


class _MessageWriter(Writer):
    """Writes one message."""

    def __init__(self, service: Service, asked: MessagesRequest) -> None:
        self._service = service
        self._asked = asked
        self._gathered = Gathered()
        self._blocks: list[str] = []
        """The types of the blocks that the stream has begun."""

    def whole(self, answer: Answer, parts: Sequence[AnswerPart]) -> Json:
        """Return the message."""
        gathered = self._gathered
        for part in parts:
            list(gathered.take(part))
        content: list[Json] = []
        if gathered.reasoning:
            content.append({"type": "thinking", "thinking": gathered.reasoning, "signature": ""})
        if gathered.has_text:
            content.append({"type": "text", "text": gathered.text})
        message = self._message(answer, content) | self._stop(answer)
        message["usage"] = _usage(answer)
        if self._asked.proxytune is not None:
            message["proxytune"] = self._service.steered(answer, answer.texts[0], gathered.steps)
        return message

    def _message(self, answer: Answer, content: list[Json]) -> Json:
        return {
            "id": f"msg_{answer.id}",
            "type": "message",
            "role": "assistant",
            "model": self._asked.model or self._service.settings.name,
            "content": content,
        }

    def _stop(self, answer: Answer) -> Json:
        """Return why the text ended."""
        (text,) = answer.texts
        if text.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        # A chat that is written as plain text has a stop string of its own.
        if text.stopped_by is not None and text.stopped_by in (self._asked.stop_sequences or ()):
            return {"stop_reason": "stop_sequence", "stop_sequence": text.stopped_by}
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def begin(self, answer: Answer) -> Iterator[bytes]:
        """Return what announces the message."""
        message = self._message(answer, []) | {"stop_reason": None, "stop_sequence": None}
        yield _event("message_start", message=message | {"usage": _usage(answer)})

    def add(self, answer: Answer, part: AnswerPart) -> Iterator[bytes]:
        """Return the deltas of a part."""
        for piece in self._gathered.take(part):
            yield from self._deltas(answer, piece)

    def _deltas(self, answer: Answer, piece: Piece) -> Iterator[bytes]:
        tokens = self._service.explained(answer, piece.steps)
        if piece.text or tokens:
            kind = "thinking" if piece.is_reasoning else "text"
            yield from self._open(kind)
            own = {"proxytune": {"tokens": tokens}} if tokens else {}
            delta = {"type": f"{kind}_delta", kind: piece.text}
            index = len(self._blocks) - 1
            yield _event("content_block_delta", index=index, delta=delta, **own)

    def _open(self, kind: str) -> Iterator[bytes]:
        """Begin a block if it has not begun; the one before it is then complete."""
        if kind in self._blocks:
            return
        yield from self._close()
        block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
        yield _event("content_block_start", index=len(self._blocks), content_block=block)
        self._blocks.append(kind)

    def _close(self) -> Iterator[bytes]:
        if not self._blocks:
            return
        index = len(self._blocks) - 1
        if self._blocks[-1] == "thinking":
            # Clients wait for one; there is nothing here to sign.
            delta = {"type": "signature_delta", "signature": ""}
            yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)

    def end(self, answer: Answer) -> Iterator[bytes]:
        """Return what closes the last block and the message."""
        for piece in self._gathered.end():
            yield from self._deltas(answer, piece)
        yield from self._open("text" if self._gathered.has_text else "thinking")
        yield from self._close()
        yield _event("message_delta", delta=self._stop(answer), usage=_usage(answer))
        yield _event("message_stop")

    def fail(self, answer: Answer, refusal: Refusal, request_id: str) -> Iterable[bytes]:
        """Return the error that ends the stream."""
        return [event(refusal.anthropic(request_id), "error")]


def _event(kind: str, **content: Any) -> bytes:
    return event({"type": kind} | content, kind)


def _usage(answer: Answer) -> Json:
    usage = answer.usage
    num_reused = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        # As in the API, these do not count what was reused.
        "input_tokens": usage["prompt_tokens"] - num_reused,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_reused,
        "output_tokens": usage["completion_tokens"],
    }
