"""Steps as JSON of the OpenAI API: texts, logprobs, and in the field `proxytune` what each model predicted.

Pure functions of steps and of the tokens' bytes; HTTP never reaches this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.measure.prompt import PromptToken
from proxytune.server.echo import Echo
from proxytune.trace import Step, View

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The bytes of each token, by id; `shows_ids` writes a token's number in place of its text."""

    bytes_by_id: Mapping[int, bytes]
    shows_ids: bool = False

    def text(self, token_id: int) -> str:
        """Return the text of a token on its own; an incomplete character becomes U+FFFD."""
        if self.shows_ids:
            return f"token_id:{token_id}"
        return self.bytes_by_id.get(token_id, b"").decode("utf-8", "replace")

    def with_logprob(self, token_id: int, logprob: float) -> Json:
        """Return a token and its logprob as an entry of a chat's `logprobs`."""
        raw = list(self.bytes_by_id.get(token_id, b""))
        return {"token": self.text(token_id), "logprob": logprob, "bytes": raw}


def chat_logprobs(steps: Sequence[Step], tokens: Tokens) -> Json:
    """Return `choices[].logprobs` of a chat."""
    return {
        "content": [
            {
                **tokens.with_logprob(step.token_id, step.logprob),
                "top_logprobs": [tokens.with_logprob(*pair) for pair in _possible(step.top)],
            }
            for step in steps
        ],
        "refusal": None,
    }


def completion_logprobs(steps: Sequence[Step], tokens: Tokens, *, offset: int) -> Json:
    """Return `choices[].logprobs` of a completion; `offset` characters of the text come before the steps."""
    offsets = []
    for step in steps:
        offsets.append(offset)
        offset += len(step.text)
    return {
        "tokens": [tokens.text(step.token_id) for step in steps],
        "token_logprobs": [step.logprob for step in steps],
        "top_logprobs": [_best(step, step.top, tokens) for step in steps],
        "text_offset": offsets,
    }


def echoed_logprobs(
    echo: Echo, scored: Sequence[PromptToken], tokens: Tokens, *, num_top: int
) -> Json:
    """Return `choices[].logprobs` for the tokens of a prompt; nothing comes before the first one."""
    top = [None, *(_best(each, each.top[:num_top], tokens) for each in scored)]
    return {
        "tokens": [tokens.text(token_id) for token_id in echo.token_ids],
        "token_logprobs": [None, *(_finite(each.logprob) for each in scored)],
        "top_logprobs": top,
        "text_offset": list(echo.offsets),
    }


def joined_logprobs(first: Json, second: Json | None) -> Json:
    """Return `choices[].logprobs` of a prompt and of the text after it."""
    if second is None:
        return first
    return {key: [*value, *second[key]] for key, value in first.items()}


def prompt_logprobs(
    scored: Sequence[PromptToken], tokens: Tokens, *, num_top: int
) -> list[Json | None]:
    """Return `prompt_logprobs` as vLLM writes it: for each token, itself and the likeliest ones, by id."""
    found: list[Json | None] = [None]
    for each in scored:
        entries = [(each.token_id, _finite(each.logprob), each.rank)]
        best = _possible(each.top[:num_top])
        entries += [(*pair, rank) for rank, pair in enumerate(best, start=1)]
        found.append(
            {
                str(token_id): {
                    "logprob": logprob,
                    "rank": rank,
                    "decoded_token": tokens.text(token_id),
                }
                for token_id, logprob, rank in entries
            }
        )
    return found


def explained(step: Step, tokens: Tokens) -> Json:
    """Return what each model predicted for a token."""
    return {
        "index": step.index,
        "token_id": step.token_id,
        "token": tokens.text(step.token_id),
        "text": step.text,
        "logprob": step.logprob,
        "kl": step.kl if step.kl is not None and step.kl < float("inf") else None,
        "views": {name: _view(view, tokens) for name, view in (step.views or {}).items()},
        "terms": step.terms and {name: each._asdict() for name, each in step.terms.items()},
    }


def _view(view: View, tokens: Tokens) -> Json:
    return {
        "logprob": view.logprob,
        "rank": view.rank,
        "entropy": view.entropy,
        "top": [
            {"token_id": token_id, "token": tokens.text(token_id), "logprob": logprob}
            for token_id, logprob in view.top
        ],
    }


def error_body(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Json]:
    """Return the body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""The Anthropic API's types of errors, by status; others are `invalid_request_error` or `api_error`."""


def anthropic_error(message: str, status: int, request_id: str) -> Json:
    """Return the body of an error as the Anthropic API has it."""
    other = "api_error" if status >= 500 else "invalid_request_error"
    error = {"type": ANTHROPIC_KINDS.get(status, other), "message": message}
    return {"type": "error", "error": error, "request_id": request_id}


def _best(
    chosen: Step | PromptToken, top: Sequence[tuple[int, float]], tokens: Tokens
) -> dict[str, float]:
    """Return the most likely tokens, best first, and the chosen one, which may be none of them.

    Where incomplete characters share a text, the best one stands for them.
    """
    found: dict[str, float] = {}
    for token_id, logprob in [*_possible(top), (chosen.token_id, _finite(chosen.logprob))]:
        found.setdefault(tokens.text(token_id), logprob)
    return found


def _finite(logprob: float) -> float:
    # A policy can make a token impossible. JSON has no -inf, and the API writes it so.
    return max(logprob, -9999.0)


def _possible(top: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    # Padding ids have -inf, which JSON cannot represent.
    return [(token_id, logprob) for token_id, logprob in top if logprob > float("-inf")]
