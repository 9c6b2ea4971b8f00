"""What generation leaves behind: one `Step` per token, gathered in a `Trace`, written as JSON lines.

Every front end (terminal, batch files, later HTTP and reports) consumes the same steps. How a token was
chosen is decided in `sample.py`; here it is only recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "uncertified", "failed"]
"""Why generation ended: an end-of-sequence token or stop string, the token limit, the caller, a token that
was not certified though that was required, or a model that failed."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What calls to a base behind an API have cost.

    Args:
        num_calls: Answered ones.
        num_retries: Tries that failed and were repeated.
        num_prompt_tokens: As the server counts them.
        num_completion_tokens: As the server counts them.
        cost: By the prices that the recipe gives, in their currency.
        num_recut: Calls whose text the server cut into another number of tokens than the small models read,
            so that what it said is of other tokens with the same text.
        num_positions: Places of which the server said what may stand there.
        unmatched_prob: Probability of tokens that it showed and the local vocabulary lacks, summed over them.
    """

    num_calls: int = 0
    num_retries: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    cost: float = 0.0
    num_recut: int = 0
    num_positions: int = 0
    unmatched_prob: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.num_calls + other.num_calls,
            self.num_retries + other.num_retries,
            self.num_prompt_tokens + other.num_prompt_tokens,
            self.num_completion_tokens + other.num_completion_tokens,
            self.cost + other.cost,
            self.num_recut + other.num_recut,
            self.num_positions + other.num_positions,
            self.unmatched_prob + other.unmatched_prob,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token.

    Args:
        index: Position among the new tokens, from 0.
        token_id: In the base's vocabulary.
        text: What this step adds to the text. May be empty (half a character, or held back because it could
            begin a stop string) and may belong to earlier tokens.
        logprob: Steered log-probability of the token, nats, before temperature, filters and penalties.
        top: The most likely tokens and their steered logprobs, best first, if asked for.
        parts: What `base` and, per expert, `NAME.expert` and `NAME.anti_expert` gave the token, as
            logprobs in nats, if asked for.
        finish_reason: Set on the last step only.
        is_certified: Whether the base's full logits are proved to give this token; None where they were seen.
        max_lost_prob: Most steered probability that tokens have that the base did not show; None likewise.
    """

    index: int
    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    parts: Mapping[str, float] | None = None
    finish_reason: FinishReason | None = None
    is_certified: bool | None = None
    max_lost_prob: float | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole generation.

    Args:
        text: The new text, without the prompt, without special tokens, cut before a stop string.
        finish_reason: Why it ended.
        steps: One per new token.
        num_prompt_tokens: Length of the base's prompt.
        alphas: Strength of steering by expert, as used.
        seed: The seed of a sampled generation, drawn if none was given; None when greedy.
        latency_s: From the start of the batch to this row's last token, seconds.
        num_drafted: Tokens that speculative decoding guessed for this text, as far as they were looked at.
        num_accepted: How many of them were what was chosen; their share is the acceptance rate.
        usage: What calls to a base behind an API have cost; None for a base that runs here.
    """

    text: str
    finish_reason: FinishReason
    steps: tuple[Step, ...]
    num_prompt_tokens: int
    alphas: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    latency_s: float = 0.0
    num_drafted: int = 0
    num_accepted: int = 0
    usage: Usage | None = None

    @property
    def num_certified(self) -> int | None:
        """How many tokens the base's full logits are proved to give; None where they were seen."""
        proofs = [step.is_certified for step in self.steps]
        return None if None in proofs else sum(map(bool, proofs))

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The new token ids, an end-of-sequence token included."""
        return tuple(step.token_id for step in self.steps)

    @property
    def num_new_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.steps)

    def summary(self, *, logprobs: bool = False) -> dict[str, Any]:
        """Return the answer of `proxytune generate --json` as a dictionary.

        Args:
            logprobs: Add the logprob of each token, and the most likely ones if they were asked for.
        """
        names = list(self.alphas)
        summary: dict[str, Any] = {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_new_tokens": self.num_new_tokens,
            "alpha": self.alphas[names[0]] if len(names) == 1 else dict(self.alphas),
            "expert": names[0] if len(names) == 1 else names,
            "latency_s": round(self.latency_s, 4),
        }
        if self.usage is not None:
            summary |= asdict(self.usage) | {"num_certified": self.num_certified}
        if logprobs:
            summary["logprobs"] = [
                {
                    "token_id": step.token_id,
                    "logprob": step.logprob,
                    # Padding ids stand at -inf, which JSON does not have.
                    "top": [[i, logprob] for i, logprob in step.top if logprob > float("-inf")],
                }
                for step in self.steps
            ]
        return summary

    def to_json(self) -> str:
        """Return the whole trace as one JSON line; `from_json` reads it back."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Trace:
        """Read a line that `to_json` wrote."""
        fields = json.loads(line)
        steps = tuple(
            Step(**{**step, "top": tuple((int(i), float(p)) for i, p in step["top"])})
            for step in fields.pop("steps")
        )
        if fields.get("usage") is not None:
            fields["usage"] = Usage(**fields["usage"])
        return cls(steps=steps, **fields)
