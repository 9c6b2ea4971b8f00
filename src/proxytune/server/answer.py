"""Steps as the OpenAI API writes them: texts, logprobs, and under `proxytune` what each model gave.

Pure functions of steps and of the tokens' bytes; nothing of HTTP is known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxytune.trace import Step, View

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The bytes of each token, by id."""

    bytes_by_id: Mapping[int, bytes]

    def text(self, token_id: int) -> str:
        """Return a token alone; half a character is U+FFFD."""
        return self.bytes_by_id.get(token_id, b"").decode("utf-8", "replace")

    def named(self, token_id: int, logprob: float) -> Json:
        """Return a token as a chat's logprobs name it."""
        return {
            "token": self.text(token_id),
            "logprob": logprob,
            "bytes": list(self.bytes_by_id.get(token_id, b"")),
        }


def chat_logprobs(steps: Sequence[Step], tokens: Tokens) -> Json:
    """Return `choices[].logprobs` of a chat."""
    return {
        "content": [
            {
                **tokens.named(step.token_id, step.logprob),
                "top_logprobs": [tokens.named(*pair) for pair in _possible(step.top)],
            }
            for step in steps
        ],
        "refusal": None,
    }


def completion_logprobs(
    steps: Sequence[Step], tokens: Tokens, *, offset: int, has_top: bool
) -> Json:
    """Return `choices[].logprobs` of a completion.

    Args:
        steps: Of one choice.
        tokens: Their bytes.
        offset: How many characters of text come before the first step.
        has_top: Whether the likeliest tokens were asked for.
    """
    offsets = []
    for step in steps:
        offsets.append(offset)
        offset += len(step.text)
    return {
        "tokens": [tokens.text(step.token_id) for step in steps],
        "token_logprobs": [step.logprob for step in steps],
        "top_logprobs": [_by_text(step, tokens) for step in steps] if has_top else None,
        "text_offset": offsets,
    }


def explained(step: Step, tokens: Tokens) -> Json:
    """Return what every model gave a token."""
    return {
        "index": step.index,
        "token_id": step.token_id,
        "token": tokens.text(step.token_id),
        "text": step.text,
        "logprob": step.logprob,
        "kl": step.kl if step.kl is not None and step.kl < float("inf") else None,
        "views": {name: _view(view, tokens) for name, view in (step.views or {}).items()},
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


def usage(num_prompt_tokens: int, num_new_tokens: int, num_reused: int) -> Json:
    """Return `usage`; the prompt is counted as the base reads it, also what was not read again."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
        "prompt_tokens_details": {"cached_tokens": num_reused},
    }


def error(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Json]:
    """Return an error as the API writes it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _by_text(step: Step, tokens: Tokens) -> dict[str, float]:
    """Return the likeliest tokens, best first; of those with one text (half characters) the best stays."""
    found: dict[str, float] = {}
    for token_id, logprob in _possible(step.top):
        found.setdefault(tokens.text(token_id), logprob)
    return found


def _possible(top: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    # Padding ids stand at -inf, which JSON does not have.
    return [(token_id, logprob) for token_id, logprob in top if logprob > float("-inf")]
