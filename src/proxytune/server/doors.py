"""Doors: how an API reads a body, and how it writes the answer, whole or as events.

A *door* reads a body of its own form into the request of a chat or a completion, which `service.py` turns
into jobs. Its *writer* writes the parts of the answer in that form again. Queueing, limits, steering and
errors are the same behind every door. This file has the doors of completions and chats; `responses.py` and
`messages.py` have others.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from proxytune.model import ProxyTuned
from proxytune.server.answer import Json
from proxytune.server.guards import Refusal
from proxytune.server.habits import Habit
from proxytune.server.schema import Asked, ChatRequest, CompletionRequest, Generation, read_request
from proxytune.server.service import Answer, AnswerPart, Order, Service
from proxytune.trace import Step


def json_bytes(content: Json | list[Json]) -> bytes:
    """Return JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()


def event(content: Json, name: str | None = None) -> bytes:
    """Return a server-sent event, with a name if it has one."""
    data = b"data: " + json_bytes(content) + b"\n\n"
    return data if name is None else f"event: {name}\n".encode() + data


def read_body(service: Service, kind: type[Asked], body: bytes | bytearray) -> Asked:
    """Return the request that a body holds, and log it if prompts are to be logged.

    Raises:
        InvalidRequest: It holds none.
    """
    asked = read_request(kind, body)
    if service.settings.log_prompts:
        logger.info("request %s", _one_line(asked.model_dump_json(exclude_defaults=True)))
    return asked


def _one_line(text: str) -> str:
    """Return JSON with characters that a terminal may obey, or does not show, as escapes."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def common_fields(asked: Generation) -> dict[str, Any]:
    """Return those fields of a request that it gives and that every request has."""
    return {
        name: getattr(asked, name) for name in asked.model_fields_set & set(Generation.model_fields)
    }


logger = logging.getLogger("proxytune.server")

_WHERE = "/v1/completions and /v1/chat/completions"
PLAIN_ONLY = {
    "n": Habit("integer", (1,), f"there is one answer here; several are given by {_WHERE}"),
    "prompt_logprobs": Habit("integer", (), f"prompts are scored by {_WHERE} alone"),
    "return_token_ids": Habit("boolean", (False,), f"token ids are listed by {_WHERE} alone"),
    "return_tokens_as_token_ids": Habit("boolean", (False,), f"that is done by {_WHERE} alone"),
}
"""Fields of completions and chats that other doors take with the values that change nothing."""


def as_fields(habits: Mapping[str, Habit]) -> dict[str, Any]:
    """Return what pydantic's `create_model` takes for fields that are taken with some values alone."""
    return {name: habit.as_field() for name, habit in habits.items()}


class Piece(NamedTuple):
    """What a part adds to the reasoning or to the text of an answer; `steps` are the tokens of it."""

    is_reasoning: bool
    text: str
    steps: tuple[Step, ...]


class Gathered:
    """The reasoning and the text of an answer with one text, and which tokens belong to which."""

    def __init__(self) -> None:
        self.reasoning = ""
        self.text = ""
        self.steps: list[Step] = []
        self.text_steps: list[Step] = []
        self._open: list[Step] = []  # it is not known yet what they belong to

    @property
    def has_text(self) -> bool:
        """Whether there is a text, which may be empty: there is none if the reasoning was cut off."""
        return bool(self.text) or not self.reasoning

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of tokens of the reasoning."""
        return len(self.steps) - len(self.text_steps)

    def take(self, part: AnswerPart) -> Iterator[Piece]:
        """Add a part, and return it in pieces of one kind each."""
        self.steps += part.steps
        self._open += part.steps
        if part.reasoning:
            self.reasoning += part.reasoning
            yield Piece(True, part.reasoning, () if part.text else self._close())
        if part.text or part.owner.order.splitter is None:
            self.text += part.text
            yield self._text_piece(part.text)

    def end(self) -> Iterator[Piece]:
        """Return the piece of the tokens whose text never came, if there are any."""
        if self._open:
            yield self._text_piece("") if self.has_text else Piece(True, "", self._close())

    def _text_piece(self, text: str) -> Piece:
        steps = self._close()
        self.text_steps += steps
        return Piece(False, text, steps)

    def _close(self) -> tuple[Step, ...]:
        steps, self._open = tuple(self._open), []
        return steps


class Writer(ABC):
    """Writes one answer in a door's form: `whole`, or `begin`, `add` for each part, and `end` or `fail`."""

    @abstractmethod
    def whole(self, answer: Answer, parts: Sequence[AnswerPart]) -> Json:
        """Return the JSON of an answer that is not streamed."""

    @abstractmethod
    def begin(self, answer: Answer) -> Iterable[bytes]:
        """Return the first events of a stream."""

    @abstractmethod
    def add(self, answer: Answer, part: AnswerPart) -> Iterable[bytes]:
        """Return the events that a part adds to a stream."""

    @abstractmethod
    def end(self, answer: Answer) -> Iterable[bytes]:
        """Return the last events of a stream that has all its texts."""

    @abstractmethod
    def fail(self, answer: Answer, refusal: Refusal, request_id: str) -> Iterable[bytes]:
        """Return the last events of a stream that cannot go on."""


class Door(ABC):
    """One API's way in.

    Args:
        service: What answers.
    """

    kind: type[Generation]
    """What a body holds."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @abstractmethod
    def read(
        self, body: bytes | bytearray, desk: ProxyTuned, client: str
    ) -> tuple[Writer, Generation, list[Order]]:
        """Return who writes the answer to a body, the request in it, and an order for each of its texts.

        Args:
            body: The JSON.
            desk: Renders its prompts. The call is made in that desk's thread.
            client: As in `turns.py`.

        Raises:
            UserError: A field cannot be honoured.
        """


class _Chunks(Writer):
    """Writes completions and chats."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def whole(self, answer: Answer, parts: Sequence[AnswerPart]) -> Json:
        return self._service.whole(answer, parts)

    def begin(self, answer: Answer) -> Iterable[bytes]:
        return map(event, self._service.first_chunks(answer))

    def add(self, answer: Answer, part: AnswerPart) -> Iterable[bytes]:
        found = self._service.chunk(answer, part)
        return [] if found is None else [event(found)]

    def end(self, answer: Answer) -> Iterable[bytes]:
        options = answer.wanted.stream_options
        if options is not None and options.include_usage:
            yield event(self._service.usage_chunk(answer))
        yield b"data: [DONE]\n\n"

    def fail(self, answer: Answer, refusal: Refusal, request_id: str) -> Iterable[bytes]:
        return [event(refusal.content), b"data: [DONE]\n\n"]


class _OwnDoor(Door):
    """A door whose bodies are read as they are."""

    def read(
        self, body: bytes | bytearray, desk: ProxyTuned, client: str
    ) -> tuple[Writer, Generation, list[Order]]:
        wanted = read_body(self.service, self.kind, body)
        return _Chunks(self.service), wanted, self.service.orders(wanted, desk)


class CompletionDoor(_OwnDoor):
    """`POST /v1/completions`."""

    kind = CompletionRequest


class ChatDoor(_OwnDoor):
    """`POST /v1/chat/completions`."""

    kind = ChatRequest
