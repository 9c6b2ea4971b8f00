"""Answers of an OpenAI-compatible server, read: the tokens it shows, by the names it gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxytune.trace import Usage

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


def read_completion(answer: Mapping[str, Any], scoring: str | None) -> ServerAnswer:
    """Read an answer of `/completions`, which may hold the scores of its prompt before the new tokens.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError: It is incomplete.
    """
    choice, has_ended = _choice(answer)
    logprobs = choice.get("logprobs") or {}
    if logprobs.get("content") is not None:  # llama.cpp answers here as at the chat endpoint
        return read_chat(answer)
    tokens: list[ShownToken | None] = []
    if scoring == "prompt_logprobs":
        entries = choice.get("prompt_logprobs") or answer.get("prompt_logprobs") or []
        tokens += [_shown_by_ids(entry) for entry in entries]
    lists = [logprobs.get(key) or [] for key in ("tokens", "token_logprobs", "top_logprobs")]
    if all(lists):
        for token, logprob, top in zip(*lists, strict=True):
            if logprob is None or top is None:
                tokens.append(None)
                continue
            name = _name(token)
            likeliest = tuple((_name(key), float(value)) for key, value in top.items())
            is_by_text = not isinstance(name, int)
            tokens.append(ShownToken(name, float(logprob), likeliest, name, is_by_text=is_by_text))
    return ServerAnswer(tokens, has_ended, Usage(), logprobs.get("text_offset"))


def read_chat(answer: Mapping[str, Any]) -> ServerAnswer:
    """Read an answer of `/chat/completions`; raises what `read_completion` does."""
    choice, has_ended = _choice(answer)
    content = (choice.get("logprobs") or {}).get("content") or []
    return ServerAnswer([_shown_in_chat(entry) for entry in content], has_ended, Usage())


def _choice(answer: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return the one choice of an answer, and whether the server ended its text by itself."""
    choice = answer["choices"][0]
    if choice.get("finish_reason") is None:
        raise ValueError("it has no finish_reason")
    return choice, choice["finish_reason"] == "stop"


def _name(key: str) -> TokenName:
    """Read a token's name: an id, bytes that are not text, or text."""
    if match := re.fullmatch(r"token_id:(\d+)", key):
        return int(match[1])
    if key.startswith("bytes:"):
        try:
            return key[6:].encode("latin-1").decode("unicode_escape").encode("latin-1")
        except (UnicodeDecodeError, UnicodeEncodeError):
            return key
    return key


def _chat_name(entry: Mapping[str, Any]) -> TokenName:
    content = entry.get("bytes")
    return bytes(content) if content else _name(str(entry["token"]))


def _shown_in_chat(entry: Mapping[str, Any]) -> ShownToken:
    name = _chat_name(entry)
    top = tuple((_chat_name(top), float(top["logprob"])) for top in entry["top_logprobs"])
    return ShownToken(name, float(entry["logprob"]), top, listed=name)


def _shown_by_ids(entry: Mapping[str, Any] | None) -> ShownToken | None:
    """Read an entry of vLLM's `prompt_logprobs`: the prompt's own token, then the most likely ones."""
    if not entry:
        return None
    top = tuple((int(key), float(value["logprob"])) for key, value in entry.items())
    return ShownToken(top[0][0], top[0][1], top, listed=top[0][0])


def is_alike(one: ShownToken, other: ShownToken) -> bool:
    """Return whether the most likely tokens have the same logprobs in both, whatever their names."""
    highest = [sorted((p for _, p in shown.top), reverse=True)[:3] for shown in (one, other)]
    return all(abs(a - b) < 0.05 for a, b in zip(*highest, strict=False))
