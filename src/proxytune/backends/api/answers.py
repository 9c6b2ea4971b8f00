"""Answers of an OpenAI-compatible server, read: the tokens it shows, by the names it gives them.

Servers are not trusted. What is missing is a `ValueError`, and may be there the next time. What is of the
wrong type, or a number that cannot be, is an `UnusableAnswer`, which asking again does not mend.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from proxytune.settings import is_number
from proxytune.trace import Usage

Kind = TypeVar("Kind")

HIGHEST_LOGPROB = 0.05
"""What rounding may make of a logprob of 0."""

LOWEST_LOGPROB = -1e4
"""Lower logprobs are taken for this one, so that no sum of them leaves the range of float32."""

MAX_COUNT = 2**31
"""The largest number of tokens that an answer may give as its cost."""

_JSON_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "text"}

TokenName = int | bytes | str
"""How a server names a token: by its id, its bytes or its text."""


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token of an answer, and the alternatives that the server shows at its place.

    Args:
        token: The token there.
        logprob: Its logprob; None if the server does not show it.
        top: The most likely tokens with their logprobs, and `listed`.
        listed: The token that `top` holds whether it is likely or not.
        is_by_text: Whether tokens that share a text are a single entry of `top`.
    """

    token: TokenName
    logprob: float | None
    top: tuple[tuple[TokenName, float], ...]
    listed: TokenName | None = None
    is_by_text: bool = False


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """One answer, as far as it is about tokens.

    Args:
        tokens: A scored prompt's tokens first, if any, then the new ones; None where nothing is shown.
        has_ended: Whether the server ended the text by itself.
        usage: What the call cost.
        offsets: Where each token begins in the text; None if the server does not say.
    """

    tokens: list[ShownToken | None]
    has_ended: bool
    usage: Usage
    offsets: list[int] | None = None

    @property
    def first(self) -> ShownToken | None:
        """Its first token; None if it has none, or nothing is shown of it."""
        return self.tokens[0] if self.tokens else None


class UnusableAnswer(Exception):
    """An answer that cannot be used, and that asking again would not mend."""


def parse_answer(content: bytes) -> dict[str, Any]:
    """Return the JSON object in an answer.

    Raises:
        ValueError: It is none.
        UnusableAnswer: It is nested too deeply, or has far more parts than answers about tokens have.
    """
    # Objects and lists take about 30 times as much memory as their text.
    num_parts = content.count(b"[") + content.count(b"{")
    if num_parts > 10_000 + len(content) // 8:
        raise UnusableAnswer(f"it has {num_parts:,} lists and objects in {len(content):,} bytes")
    try:
        answer = json.loads(content)
    except RecursionError as error:
        raise UnusableAnswer("it is nested too deeply") from error
    if not isinstance(answer, dict):
        raise ValueError("it is not a JSON object")
    return answer


def in_one_line(text: str, length: int = 300) -> str:
    """Return a server's text for a message: shortened, and with its control characters written out."""
    words = " ".join(text[: 10 * length].split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)[:length]


def read_completion(answer: Mapping[str, Any], scoring: str | None) -> ServerAnswer:
    """Read an answer of `/completions`, which may hold the scores of its prompt before the new tokens.

    Raises:
        ValueError, LookupError: It is incomplete.
        UnusableAnswer: It holds what cannot be.
    """
    choice, has_ended = _choice(answer)
    logprobs = _optional(choice, "logprobs", dict)
    if logprobs.get("content") is not None:  # llama.cpp answers here as at the chat endpoint
        return read_chat(answer)
    tokens: list[ShownToken | None] = []
    if scoring == "prompt_logprobs":
        holder = choice if choice.get("prompt_logprobs") else answer
        tokens += [_shown_by_ids(entry) for entry in _optional(holder, "prompt_logprobs", list)]
    lists = [_optional(logprobs, key, list) for key in ("tokens", "token_logprobs", "top_logprobs")]
    if all(lists):
        for token, logprob, top in zip(*lists, strict=True):
            if logprob is None or top is None:
                tokens.append(None)
                continue
            name = _name(required(token, "token", str))
            likeliest = tuple(
                (_name(key), _logprob(value))
                for key, value in required(top, "top_logprobs", dict).items()
            )
            is_by_text = not isinstance(name, int)
            tokens.append(
                ShownToken(name, _logprob(logprob), likeliest, name, is_by_text=is_by_text)
            )
    # Offsets are only compared. Some servers give -1 or null where they do not know them.
    offsets = [n if is_number(n) else -1 for n in _optional(logprobs, "text_offset", list)]
    return ServerAnswer(tokens, has_ended, Usage(), offsets or None)


def read_chat(answer: Mapping[str, Any]) -> ServerAnswer:
    """Read an answer of `/chat/completions`; raises what `read_completion` does."""
    choice, has_ended = _choice(answer)
    content = _optional(_optional(choice, "logprobs", dict), "content", list)
    return ServerAnswer([_shown_in_chat(entry) for entry in content], has_ended, Usage())


def read_message(answer: Mapping[str, Any]) -> str:
    """Return the text of a chat's answer; raises what `read_completion` does."""
    choice = first_choice(answer)
    message = required(choice.get("message"), "message", dict)
    return required(message.get("content"), "text", str)


def read_models(answer: Mapping[str, Any]) -> list[str]:
    """Return the names of the models that a server lists; raises what `read_completion` does."""
    listed = required(answer.get("data"), "list of models", list)
    names = [required(required(one, "model", dict).get("id"), "name", str) for one in listed]
    for name in names:
        if not name.isprintable() or not 0 < len(name) <= 500:
            raise UnusableAnswer(f"it lists a model under the name {in_one_line(name, 80)!r}")
    return names


def read_usage(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of tokens of the prompt and of the new ones, 0 where the server does not say."""
    counts = _optional(answer, "usage", dict)
    names = "prompt_tokens", "completion_tokens"
    prompt, completion = (
        0 if counts.get(name) is None else _count(counts[name], name) for name in names
    )
    return prompt, completion


def first_choice(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the one choice of an answer."""
    return required(required(answer.get("choices"), "choices", list)[0], "choice", dict)


def required(value: Any, what: str, kind: type[Kind]) -> Kind:
    """Return a value that must be of a type.

    Raises:
        ValueError: It is missing.
        UnusableAnswer: It is of another type.
    """
    if isinstance(value, kind):
        return value
    if value is None:
        raise ValueError(f"it has no {what}")
    raise UnusableAnswer(
        f"its {what} is {_shown(value)}, and must be {_JSON_NAMES.get(kind, kind)}"
    )


def _optional(holder: Mapping[str, Any], key: str, kind: type[Kind]) -> Kind:
    """Return a value of a type, an empty one if it is missing."""
    value = holder.get(key)
    return kind() if value is None else required(value, key, kind)


def _shown(value: Any) -> str:
    """Return a JSON value for a message."""
    if isinstance(value, dict | list):
        return _JSON_NAMES[type(value)]
    return repr(in_one_line(str(value), 40)) if isinstance(value, str) else str(value)[:40]


def _count(value: Any, what: str) -> int:
    if not is_number(value) or value != int(value) or not 0 <= value <= MAX_COUNT:
        raise UnusableAnswer(f"its {what} is {_shown(value)}, and must be a number of tokens")
    return int(value)


def _logprob(value: Any) -> float:
    if value is None:
        raise ValueError("it lacks a logprob")
    if not is_number(value) or value > HIGHEST_LOGPROB:
        raise UnusableAnswer(f"one of its logprobs is {_shown(value)}")
    return max(float(value), LOWEST_LOGPROB)


def _choice(answer: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the one choice of an answer, and whether the server ended its text by itself."""
    choice = first_choice(answer)
    return choice, required(choice.get("finish_reason"), "finish_reason", str) == "stop"


def _name(key: str) -> TokenName:
    """Read a token's name: an id, bytes that are not text, or text."""
    if match := re.fullmatch(r"token_id:([0-9]{1,10})", key):
        return int(match[1])
    if key.startswith("bytes:"):
        try:
            return key[6:].encode("latin-1").decode("unicode_escape").encode("latin-1")
        except (UnicodeDecodeError, UnicodeEncodeError):
            return key
    return key


def _chat_name(entry: Mapping[str, Any]) -> TokenName:
    content = _optional(entry, "bytes", list)
    if not content:
        return _name(required(entry.get("token"), "token", str))
    try:
        return bytes(content)
    except (TypeError, ValueError) as error:
        raise UnusableAnswer(f"the bytes of a token are none: {error}") from error


def _shown_in_chat(entry: Any) -> ShownToken:
    entry = required(entry, "logprobs of a token", dict)
    name = _chat_name(entry)
    likeliest = [
        required(one, "top_logprobs", dict)
        for one in required(entry.get("top_logprobs"), "top_logprobs", list)
    ]
    top = tuple((_chat_name(one), _logprob(one.get("logprob"))) for one in likeliest)
    return ShownToken(name, _logprob(entry.get("logprob")), top, listed=name)


def _shown_by_ids(entry: Any) -> ShownToken | None:
    """Read an entry of vLLM's `prompt_logprobs`: the prompt's own token, then the most likely ones."""
    if not entry:
        return None
    top = []
    for key, value in required(entry, "prompt_logprobs", dict).items():
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise UnusableAnswer(f"a token id of its prompt_logprobs is {_shown(key)}")
        top.append((int(key), _logprob(required(value, "prompt_logprobs", dict).get("logprob"))))
    return ShownToken(top[0][0], top[0][1], tuple(top), listed=top[0][0])


def is_alike(one: ShownToken, other: ShownToken) -> bool:
    """Return whether the most likely tokens have the same logprobs in both, whatever their names."""
    highest = [sorted((p for _, p in shown.top), reverse=True)[:3] for shown in (one, other)]
    return all(abs(a - b) < 0.05 for a, b in zip(*highest, strict=False))
