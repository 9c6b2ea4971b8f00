"""The door of the OpenAI Responses API: `POST /v1/responses`, with its own items, events and usage.

A response is a chat: its instructions, the conversation of the response before it, and its input are the
messages. Only text goes in and out. What a client may go on from is in `stored.py`.
"""

from __future__ import annotations

import json
import time
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

from proxytune.errors import InvalidRequest, PromptTooLong
from proxytune.measure.score import smallest_context
from proxytune.model import ProxyTuned
from proxytune.server.answer import Json, chat_logprobs
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
from proxytune.server.habits import Habit, NotHonoured
from proxytune.server.schema import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_PARTS,
    ChatMessage,
    ChatRequest,
    Fields,
    Generation,
    InvalidField,
    StreamOptions,
    Text,
    option_field,
)
from proxytune.server.service import Answer, AnswerPart, Order, Service
from proxytune.server.stored import Kept, KeptAnswers
from proxytune.trace import Step

MAX_INCLUDED = 16
LOGPROBS = "message.output_text.logprobs"
Id = Annotated[str, StringConstraints(max_length=200)]
Anything = Annotated[list[Any], Field(max_length=MAX_PARTS)]
Status = Literal["in_progress", "completed", "incomplete"]


def _check_part(kind: Any) -> Any:
    if isinstance(kind, str) and kind not in ("input_text", "output_text", "reasoning_text"):
        raise NotHonoured(
            "the models here read text alone: input_text, output_text and reasoning_text"
        )
    return kind


def _check_item(kind: Any) -> Any:
    if isinstance(kind, str) and kind not in ("message", "reasoning"):
        raise NotHonoured("items here are messages and reasoning: tools cannot be called")
    return kind


def _check_format(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise NotHonoured(
            "an answer cannot be held to a schema here: it is the text that the model writes"
        )
    return kind


class InputPart(Fields):
    """A piece of an input item."""

    type: Annotated[
        Literal["input_text", "output_text", "reasoning_text"], BeforeValidator(_check_part)
    ]
    text: Text
    # What clients send back with an answer; none of it changes what the models read.
    annotations: Anything | None = None
    logprobs: Anything | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class SummaryPart(Fields):
    """A piece of the summary of a reasoning item."""

    type: Literal["summary_text"]
    text: Text


class InputItem(Fields):
    """A message, or the reasoning before one."""

    type: Annotated[Literal["message", "reasoning"], BeforeValidator(_check_item)] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: (
        Text | Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None
    ) = None
    summary: Annotated[list[SummaryPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    encrypted_content: None = None
    id: Id | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    @model_validator(mode="after")
    def _check(self) -> InputItem:
        if not self.is_reasoning and (self.role is None or self.content is None):
            raise ValueError("a message needs a role and content")
        if self.is_reasoning and self.role is not None:
            raise ValueError("reasoning has no role")
        if not self.is_reasoning and self.summary:
            raise ValueError("a message has no summary")
        return self

    @property
    def is_reasoning(self) -> bool:
        """Whether it is no message."""
        return self.type == "reasoning"

    @property
    def text(self) -> str:
        """Its text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or [])


class ReasoningOptions(Fields):
    """How much a model that reasons is to reason."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Given to chat templates as `reasoning_effort`"
    )
    # There is no summary: the reasoning itself is in the answer.
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class TextFormat(Fields):
    """The only format that can be promised: text as the model writes it."""

    type: Annotated[Literal["text"], BeforeValidator(_check_format)]


class TextOptions(Fields):
    """What form the text has."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(StreamOptions):
    """What a stream holds beside the text; the usage is always in its last event."""

    continuous_usage_stats: Literal[False] = False


_HABITS = PLAIN_ONLY | {
    "n_predict": Habit("integer", (), "max_output_tokens is the field for that here"),
    "background": Habit("boolean", (False,), "a response is written while its client waits"),
    "conversation": Habit("string", (), "previous_response_id is the field for that here"),
    "prompt": Habit("object", (), "there are no stored prompts here"),
    "max_tool_calls": Habit("integer"),
    "moderation": Habit("object", (), "nothing is moderated here"),
    "context_management": Habit("array", ([],), "conversations are not compacted here"),
    "prompt_cache_options": Habit("object"),
}
"""Fields of responses that are accepted with the values that change nothing."""
_Habits: Any = create_model("_Habits", __base__=Generation, **as_fields(_HABITS))


class ResponsesRequest(_Habits):
    """`POST /v1/responses`."""

    input: (
        Text
        | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    )
    instructions: Text | None = Field(None, description="A system message before all others")
    max_output_tokens: int | None = option_field("max_new_tokens", default=None, le=2**31)
    previous_response_id: Id | None = Field(
        None, description="Go on from this response of the same client, if it is still kept"
    )
    store: StrictBool | None = Field(None, description="Keep the response; the default is true")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="`auto` leaves out the oldest messages of a conversation that is too long"
    )
    include: (
        Annotated[
            list[
                Literal[
                    "message.output_text.logprobs",
                    "reasoning.encrypted_content",
                    "file_search_call.results",
                    "web_search_call.results",
                    "web_search_call.action.sources",
                    "message.input_image.image_url",
                    "computer_call_output.output.image_url",
                    "code_interpreter_call.outputs",
                ]
            ],
            Field(max_length=MAX_INCLUDED, fail_fast=True),
        ]
        | None
    ) = Field(None, description="Of these, only logprobs add something here")
    top_logprobs: int | None = option_field("logprobs", le=MAX_LOGPROBS)
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[Text, StringConstraints(max_length=64)],
                Annotated[Text, StringConstraints(max_length=512)],
            ],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = None
    stream_options: ResponseStreamOptions | None = None

    @property
    def has_logprobs(self) -> bool:
        """Whether the text comes with its logprobs."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def messages(self) -> list[Json]:
        """Return the input as messages."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        found: list[Json] = []
        reasoning = ""
        for item in self.input:
            if item.is_reasoning:
                reasoning += item.text
                continue
            message: Json = {"role": item.role, "content": item.text}
            if reasoning and item.role == "assistant":
                message["reasoning_content"] = reasoning
            reasoning = ""
            found.append(message)
        return found


class ResponsesDoor(Door):
    """Reads responses, and keeps them.

    Args:
        service: What answers.
        kept: The responses that are kept.
    """

    kind = ResponsesRequest

    def __init__(self, service: Service, kept: KeptAnswers) -> None:
        super().__init__(service)
        self.kept = kept

    def read(
        self, body: bytes | bytearray, desk: ProxyTuned, client: str
    ) -> tuple[Writer, Generation, list[Order]]:
        """Return who writes a response, the chat that it is, and its order."""
        asked = read_body(self.service, ResponsesRequest, body)
        conversation = [*self._before(asked, client), *asked.messages()]
        if not conversation:
            raise InvalidField("input: there is no message, so there is nothing to answer", "input")
        if asked.truncation == "auto":
            conversation, wanted, orders = self._truncated(asked, conversation, desk)
        else:
            wanted = _chat(asked, conversation)
            orders = self.service.orders(wanted, desk)
        return _ResponseWriter(self, asked, conversation, client), wanted, orders

    def _before(self, asked: ResponsesRequest, client: str) -> list[Json]:
        """Return the conversation that a request goes on from."""
        name = asked.previous_response_id
        if name is None:
            return []
        kept = self.kept.get(client, name)
        if kept is None:
            raise UnknownResponse(name, "previous_response_id")
        found: list[Json] = json.loads(kept.conversation)
        return found

    def _truncated(
        self, asked: ResponsesRequest, conversation: list[Json], desk: ProxyTuned
    ) -> tuple[list[Json], ChatRequest, list[Order]]:
        """Return a conversation without as many of its oldest messages as leave no room, and its orders.

        Room is needed for the new tokens that are asked for, up to half of what the models hold. System
        messages stay, and so does the last message.

        Raises:
            PromptTooLong: Even those do not fit.
        """
        droppable = [
            at
            for at, message in enumerate(conversation[:-1])
            if message["role"] not in ("system", "developer")
        ]
        context = smallest_context(self.service.model.ensemble.members)
        needed = min(asked.max_output_tokens or 1, self.service.settings.max_tokens)
        needed = needed if context is None else max(1, min(needed, context // 2))

        def without(num_dropped: int) -> tuple[list[Json], ChatRequest, list[Order]]:
            dropped = set(droppable[:num_dropped])
            left = [each for at, each in enumerate(conversation) if at not in dropped]
            wanted = _chat(asked, left)
            return left, wanted, self.service.orders(wanted, desk)

        found = None
        low, high = 0, len(droppable)
        while low < high:
            # Most conversations fit, and are rendered once.
            num_dropped = (low + high) // 2 if low or found else 0
            try:
                tried = without(num_dropped)
                has_room = tried[2][0].max_tokens >= needed
            except PromptTooLong:
                has_room = False
            if has_room:
                found, high = tried, num_dropped
            else:
                low = num_dropped + 1
        return found or without(len(droppable))


class UnknownResponse(InvalidRequest):
    """A request names a response that its client has not, or no longer; `field` is where it does."""

    def __init__(self, name: str, field: str | None = None) -> None:
        super().__init__(
            f"Response with id {name[:100]!r} not found. It was not stored, was deleted, or has made room "
            "for newer ones.\nhint: send the whole conversation as `input`"
        )
        self.field = field


def _chat(asked: ResponsesRequest, conversation: Sequence[Json]) -> ChatRequest:
    """Return the chat that a response is."""
    values = common_fields(asked)
    if asked.instructions is not None:
        conversation = [{"role": "system", "content": asked.instructions}, *conversation]
    values["messages"] = [ChatMessage.model_construct(**message) for message in conversation]
    values["max_completion_tokens"] = asked.max_output_tokens
    if asked.has_logprobs:
        values |= {"logprobs": True, "top_logprobs": asked.top_logprobs}
    if asked.reasoning is not None and asked.reasoning.effort is not None:
        values["reasoning_effort"] = asked.reasoning.effort
    return ChatRequest.model_construct(**values)


_TOLD: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "store": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
"""What a response repeats of its request, with the values of fields that the request does not have."""


class _ResponseWriter(Writer):
    """Writes one response, and keeps it when it is whole."""

    def __init__(
        self, door: ResponsesDoor, asked: ResponsesRequest, conversation: list[Json], client: str
    ) -> None:
        self._door = door
        self._service = door.service
        self._asked = asked
        self._conversation = conversation
        self._client = client
        self._gathered = Gathered()
        self._number = 0
        self._place: Json | None = None
        """Where the stream's present item is; None before the first one."""

    # Whole ----------------------------------------------------------------------------------------------

    def whole(self, answer: Answer, parts: Sequence[AnswerPart]) -> Json:
        """Return the response."""
        for part in parts:
            list(self._gathered.take(part))
        list(self._gathered.end())
        return self._keep(answer)

    def _keep(self, answer: Answer) -> Json:
        """Return the finished response, which is now kept if it may be."""
        response = self._finished(answer)
        if not response["store"]:
            return response
        turn = {"role": "assistant", "content": self._gathered.text}
        if self._gathered.reasoning:
            turn["reasoning_content"] = self._gathered.reasoning
        kept = Kept(json_bytes(response), json_bytes([*self._conversation, turn]))
        if self._door.kept.has_room(kept):
            self._door.kept.add(self._client, response["id"], kept)
        else:
            response["store"] = False
        return response

    def _finished(self, answer: Answer) -> Json:
        (text,) = answer.texts
        is_whole = text.finish_reason == "stop"
        status = "completed" if is_whole else "incomplete"
        why = "max_output_tokens" if text.finish_reason == "length" else None
        response = self._response(answer, status, self._output(answer, status)) | {
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": why},
            "usage": self._usage(answer),
        }
        if self._asked.proxytune is not None:
            response["proxytune"] = self._service.steered(answer, text, self._gathered.steps)
        return response

    def _response(self, answer: Answer, status: str, output: list[Json]) -> Json:
        asked = self._asked
        told = {name: getattr(asked, name) for name in _TOLD}
        effort = None if asked.reasoning is None else asked.reasoning.effort
        return {
            "id": f"resp_{answer.id}",
            "object": "response",
            "created_at": answer.created,
            "status": status,
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": asked.model or self._service.settings.name,
            "output": output,
            "reasoning": {"effort": effort, "summary": None},
            "service_tier": "default",
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "tools": [],
            "usage": None,
        } | {name: _TOLD[name] if value is None else value for name, value in told.items()}

    def _output(self, answer: Answer, status: str) -> list[Json]:
        """Return the items: the reasoning, if there is any, and the message."""
        kinds = [True] if self._gathered.reasoning else []
        kinds += [False] if self._gathered.has_text else []
        return [
            self._item(answer, each, status if each is kinds[-1] else "completed") for each in kinds
        ]

    def _item(
        self, answer: Answer, is_reasoning: bool, status: str, *, is_begun: bool = False
    ) -> Json:
        content = [] if is_begun else [self._content(is_reasoning)]
        if is_reasoning:
            item = {"id": f"rs_{answer.id}", "type": "reasoning", "summary": []}
            return item | {"content": content, "encrypted_content": None, "status": status}
        item = {"id": f"msg_{answer.id}", "type": "message", "role": "assistant"}
        return item | {"content": content, "status": status}

    def _content(self, is_reasoning: bool, *, is_begun: bool = False) -> Json:
        gathered = self._gathered
        if is_reasoning:
            return {"type": "reasoning_text", "text": "" if is_begun else gathered.reasoning}
        return {
            "type": "output_text",
            "text": "" if is_begun else gathered.text,
            "annotations": [],
            "logprobs": [] if is_begun else self._logprobs(gathered.text_steps),
        }

    def _logprobs(self, steps: Sequence[Step]) -> list[Json]:
        if not self._asked.has_logprobs:
            return []
        found: list[Json] = chat_logprobs(steps, self._service.tokens)["content"]
        return found

    def _brief_logprobs(self, steps: Sequence[Step]) -> list[Json]:
        """Return logprobs as events have them: without bytes."""

        def brief(each: Json) -> Json:
            return {"token": each["token"], "logprob": each["logprob"]}

        return [
            brief(each) | {"top_logprobs": [brief(top) for top in each["top_logprobs"]]}
            for each in self._logprobs(steps)
        ]

    def _usage(self, answer: Answer) -> Json:
        usage = answer.usage
        num_reused = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": num_reused, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._gathered.num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }

    # Streamed -------------------------------------------------------------------------------------------

    def _event(self, kind: str, content: Json) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number} | content, kind)

    def begin(self, answer: Answer) -> Iterator[bytes]:
        """Return what announces the response."""
        response = self._response(answer, "in_progress", [])
        yield self._event("response.created", {"response": response})
        yield self._event("response.in_progress", {"response": response})

    def add(self, answer: Answer, part: AnswerPart) -> Iterator[bytes]:
        """Return the deltas of a part."""
        for piece in self._gathered.take(part):
            yield from self._deltas(answer, piece)

    def _deltas(self, answer: Answer, piece: Piece) -> Iterator[bytes]:
        tokens = self._service.explained(answer, piece.steps)
        logprobs = [] if piece.is_reasoning else self._brief_logprobs(piece.steps)
        if not (piece.text or tokens or logprobs):
            return
        yield from self._open(answer, piece.is_reasoning)
        assert self._place is not None
        delta = self._place | {"delta": piece.text}
        delta |= {"proxytune": {"tokens": tokens}} if tokens else {}
        if piece.is_reasoning:
            yield self._event("response.reasoning_text.delta", delta)
        else:
            yield self._event("response.output_text.delta", delta | {"logprobs": logprobs})

    def _open(self, answer: Answer, is_reasoning: bool) -> Iterator[bytes]:
        """Begin an item if it has not begun; the reasoning before it is then complete."""
        item = self._item(answer, is_reasoning, "in_progress", is_begun=True)
        if self._place is not None:
            if self._place["item_id"] == item["id"]:
                return
            yield from self._close(self._item(answer, not is_reasoning, "completed"))
        index = 0 if self._place is None else 1
        self._place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        yield self._event("response.output_item.added", {"output_index": index, "item": item})
        part = self._content(is_reasoning, is_begun=True)
        yield self._event("response.content_part.added", self._place | {"part": part})

    def _close(self, item: Json) -> Iterator[bytes]:
        assert self._place is not None
        (part,) = item["content"]
        done = self._place | {"text": part["text"]}
        if item["type"] == "reasoning":
            yield self._event("response.reasoning_text.done", done)
        else:
            done["logprobs"] = self._brief_logprobs(self._gathered.text_steps)
            yield self._event("response.output_text.done", done)
        yield self._event("response.content_part.done", self._place | {"part": part})
        index = self._place["output_index"]
        yield self._event("response.output_item.done", {"output_index": index, "item": item})

    def end(self, answer: Answer) -> Iterator[bytes]:
        """Return what closes the last item and the response."""
        for piece in self._gathered.end():
            yield from self._deltas(answer, piece)
        yield from self._open(answer, not self._gathered.has_text)
        response = self._keep(answer)
        yield from self._close(response["output"][-1])
        yield self._event(f"response.{response['status']}", {"response": response})

    def fail(self, answer: Answer, refusal: Refusal, request_id: str) -> Iterable[bytes]:
        """Return the failed response."""
        code = "rate_limit_exceeded" if refusal.status_code == 429 else "server_error"
        output = [] if self._place is None else self._output(answer, "incomplete")
        response = self._response(answer, "failed", output) | {
            "error": {"code": code, "message": refusal.message},
            "store": False,
            "usage": self._usage(answer),
        }
        yield self._event("response.failed", {"response": response})
