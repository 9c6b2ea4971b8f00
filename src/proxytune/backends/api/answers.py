"""Answers of servers, read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from proxytune.trace import Usage


@dataclass(frozen=True, slots=True)
class Said:
    """One token of an answer, as the server names things: an id, bytes or text.

    Args:
        token: What stands there.
        logprob: Its own; None where the server does not tell.
        top: The likeliest tokens, and `listed`.
        listed: A token that is among them whether it is likely or not.
        is_by_text: Whether tokens of one text fall together in `top`.
    """

    token: int | bytes | str
    logprob: float | None
    top: tuple[tuple[int | bytes | str, float], ...]
    listed: int | bytes | str | None = None
    is_by_text: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What one answer of a server says of tokens."""

    tokens: list[Said | None]
    has_ended: bool
    usage: Usage
    offsets: list[int] | None = None


def read_completion(answer: Mapping[str, Any], scoring: str | None) -> Answer:
    """Read an answer of `/completions`, which may hold the scores of its prompt before the new tokens.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError: It is not whole.
    """
    choice = answer["choices"][0]
    logprobs = choice.get("logprobs") or {}
    if logprobs.get("content") is not None:  # llama.cpp answers here as at the chat endpoint
        return read_chat(answer)
    if choice.get("finish_reason") is None:
        raise ValueError("it has no finish_reason")
    tokens: list[Said | None] = []
    if scoring == "prompt_logprobs":
        told = choice.get("prompt_logprobs") or answer.get("prompt_logprobs") or []
        tokens += [_said_of_ids(entry) for entry in told]
    lists = [logprobs.get(key) or [] for key in ("tokens", "token_logprobs", "top_logprobs")]
    if all(lists):
        for token, logprob, top in zip(*lists, strict=True):
            if logprob is None or top is None:
                tokens.append(None)
                continue
            name = _named(token)
            likeliest = tuple((_named(key), float(value)) for key, value in top.items())
            is_by_text = not isinstance(name, int)
            tokens.append(Said(name, float(logprob), likeliest, listed=name, is_by_text=is_by_text))
    has_ended = choice["finish_reason"] == "stop"
    return Answer(tokens, has_ended, Usage(), logprobs.get("text_offset"))


def read_chat(answer: Mapping[str, Any]) -> Answer:
    """Read an answer of `/chat/completions`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError: It is not whole.
    """
    choice = answer["choices"][0]
    if choice.get("finish_reason") is None:
        raise ValueError("it has no finish_reason")
    content = (choice.get("logprobs") or {}).get("content") or []
    tokens: list[Said | None] = [_said_in_chat(said) for said in content]
    return Answer(tokens, choice["finish_reason"] == "stop", Usage())


def _named(key: str) -> int | bytes | str:
    """Read a token's name: an id, bytes that are no text, or text."""
    if match := re.fullmatch(r"token_id:(\d+)", key):
        return int(match[1])
    if key.startswith("bytes:"):
        try:
            return key[6:].encode("latin-1").decode("unicode_escape").encode("latin-1")
        except (UnicodeDecodeError, UnicodeEncodeError):
            return key
    return key


def _chat_name(said: Mapping[str, Any]) -> int | bytes | str:
    content = said.get("bytes")
    return bytes(content) if content else _named(str(said["token"]))


def _said_in_chat(said: Mapping[str, Any]) -> Said:
    """Read an entry of a chat answer's logprobs."""
    return Said(
        _chat_name(said),
        float(said["logprob"]),
        tuple((_chat_name(top), float(top["logprob"])) for top in said["top_logprobs"]),
        listed=_chat_name(said),
    )


def _said_of_ids(entry: Mapping[str, Any] | None) -> Said | None:
    """Read an entry of vLLM's `prompt_logprobs`, which may hold the text's own token beside the likeliest."""
    if not entry:
        return None
    top = tuple((int(key), float(value["logprob"])) for key, value in entry.items())
    # The text's own token comes first.
    return Said(top[0][0], top[0][1], top, listed=top[0][0])


def is_alike(one: Said, other: Said) -> bool:
    """Whether two answers give the likeliest tokens the same logprobs, whatever they call them."""

    def highest(said: Said) -> Iterable[float]:
        return sorted((logprob for _, logprob in said.top), reverse=True)[:3]

    return all(abs(a - b) < 0.05 for a, b in zip(highest(one), highest(other), strict=False))
