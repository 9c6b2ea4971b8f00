"""The record of a generation: one `Step` per token, gathered in a `Trace`, written as JSON lines.

Every front end (terminal, batch files, HTTP, reports) reads the same steps. `logits/sample.py` chooses each
token; here the choice is only recorded.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, field
from operator import add
from pathlib import Path
from typing import Any, Literal, NamedTuple

from proxytune.errors import InputFileError
from proxytune.files import writing

FinishReason = Literal["stop", "length", "cancelled", "uncertified", "failed", "given"]
"""Why generation ended: an end-of-sequence token or a stop string; the token limit; the caller cancelled it;
a token could not be certified although that was required; a model failed. `given` marks a given text."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the calls to a base behind an API have cost.

    Args:
        num_calls: Calls that were answered.
        num_retries: Failed calls that were repeated.
        num_prompt_tokens: Prompt tokens, as the server counts them.
        num_completion_tokens: Generated tokens, as the server counts them.
        cost: Cost at the prices given in the recipe, in their currency.
        num_recut: Calls whose text the server split into a different number of tokens than the small models
            read, so that its logprobs are those of other tokens with the same text.
        num_positions: Positions for which the server gave logprobs.
        unmatched_prob: Total probability of tokens that it showed and the local vocabulary lacks.
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
        return Usage(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class View:
    """What one model predicted at one position, before temperature, filters and penalties.

    A base behind an API shows only part of its distribution; what that leaves unknown is None.

    Args:
        logprob: Log-probability of the chosen token, nats.
        rank: Rank of the chosen token in the vocabulary, 1 for the most likely.
        entropy: Entropy of the distribution, nats.
        top: The most likely tokens and their logprobs, best first.
    """

    logprob: float | None
    rank: int | None
    entropy: float | None
    top: tuple[tuple[int, float], ...] = ()


class Terms(NamedTuple):
    """What an expert with weights or an output bias adds to a token's logit at strength 1, apart."""

    pair: float
    """The log-ratio of expert and anti-expert, each to its weight, nats."""
    base: float
    """What the base's weight adds: `(weight - 1)` times the base's logprob, nats."""
    bias: float
    """The token's value in the output bias."""


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token.

    Args:
        index: Position among the new tokens, from 0.
        token_id: Token id in the base's vocabulary.
        text: What this step adds to the text. It may be empty (an incomplete character, or text held back
            because it could begin a stop string), and it may include text of earlier tokens.
        logprob: Steered log-probability of the token, nats, before temperature, filters and penalties; NaN if
            vLLM generated it and was not asked for logprobs.
        top: The most likely tokens and their steered logprobs, best first, if requested.
        views: What `base`, `steered` and, per expert, `NAME.expert` and `NAME.anti_expert` predicted, if
            requested.
        kl: KL(steered || base), nats, if requested and known.
        weights: The factor that the recipe's policy put on each expert's strength, if requested; None for the
            published method.
        terms: What each expert with weights or an output bias adds to this token, if requested; None where no
            expert has any.
        has_conflict: Whether the experts, each alone, would have chosen different tokens, if requested and if
            there are several.
        finish_reason: Set on the last step only.
        is_certified: Whether this token is proved to be the one that the base's full logits give; None where
            the full logits were seen.
        max_lost_prob: Upper bound on the steered probability of all tokens that the base did not show; None
            where it showed all.
    """

    index: int
    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    views: Mapping[str, View] | None = None
    kl: float | None = None
    weights: Mapping[str, float] | None = None
    terms: Mapping[str, Terms] | None = None
    has_conflict: bool | None = None
    finish_reason: FinishReason | None = None
    is_certified: bool | None = None
    max_lost_prob: float | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole generation.

    Args:
        text: The new text, without the prompt and without special tokens, cut before a stop string.
        finish_reason: Why generation ended.
        steps: One per new token.
        num_prompt_tokens: Length of the base's prompt, in tokens.
        alphas: Strength of steering by expert, as used.
        seed: The seed of a sampled generation, drawn if none was given; None when greedy.
        latency_s: Seconds from the start of the batch to this row's last token.
        num_drafted: Draft tokens of speculative decoding that were checked.
        num_accepted: How many of them were chosen; `num_accepted / num_drafted` is the acceptance rate.
        usage: What the calls to a base behind an API have cost; None for a base that runs here.
        prompt: What the base read before the new text, if the trace is explained.
        tokens: The text of each token id in an explained trace; bytes where it is not whole characters.
        special_ids: The ids among `tokens` that are control tokens, such as the end of a text, and no part of
            the text.
        num_given: How many steps, counted from the first, were given rather than chosen.
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
    prompt: str = ""
    tokens: Mapping[int, str | bytes] = field(default_factory=dict)
    special_ids: tuple[int, ...] = ()
    num_given: int = 0

    @property
    def num_certified(self) -> int | None:
        """How many tokens are proved to be those of the base's full logits; None where these were seen."""
        proofs = [step.is_certified for step in self.steps]
        return None if None in proofs else sum(map(bool, proofs))

    @property
    def conflict_rate(self) -> float | None:
        """Share of tokens on which several experts disagreed; None if not requested."""
        found = [step.has_conflict for step in self.steps if step.has_conflict is not None]
        return sum(found) / len(found) if found else None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The new token ids, an end-of-sequence token included."""
        return tuple(step.token_id for step in self.steps)

    @property
    def num_new_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.steps)

    def summary(self, *, logprobs: bool = False) -> dict[str, Any]:
        """Return what `proxytune generate --json` prints, as a dictionary.

        Args:
            logprobs: Add each token's logprob, and the most likely tokens if they were requested.
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
                    # Padding ids have -inf, which JSON cannot represent.
                    "top": [[i, logprob] for i, logprob in step.top if logprob > float("-inf")],
                }
                for step in self.steps
            ]
        return summary

    def to_json(self) -> str:
        """Return the whole trace as one JSON line; `from_json` reads it back."""
        fields = asdict(self)
        # JSON has no bytes, so they are written as lists of numbers.
        fields["tokens"] = {
            token_id: list(token) if isinstance(token, bytes) else token
            for token_id, token in self.tokens.items()
        }
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Trace:
        """Read a line that `to_json` wrote."""
        fields = json.loads(line)
        steps = tuple(
            Step(
                **{
                    **step,
                    "top": _top(step["top"]),
                    "views": _views(step["views"]),
                    "terms": _terms(step.get("terms")),
                }
            )
            for step in fields.pop("steps")
        )
        if fields.get("usage") is not None:
            fields["usage"] = Usage(**fields["usage"])
        fields["tokens"] = {
            int(token_id): bytes(token) if isinstance(token, list) else token
            for token_id, token in fields.get("tokens", {}).items()
        }
        fields["special_ids"] = tuple(fields.get("special_ids", ()))
        return cls(steps=steps, **fields)


def read_traces(path: Path) -> Iterator[Trace]:
    """Yield the traces in a file of JSON lines, one at a time; `.gz` files are decompressed on the fly.

    Raises:
        InputFileError: The file cannot be read, or a line is not a trace.
    """
    hint = "hint: `proxytune explain --trace-file` and `proxytune generate --trace-file` write such files"
    line_number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                line_number += 1
                if line.strip():
                    yield Trace.from_json(line)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputFileError(f"{path} cannot be read: {reason}.\n{hint}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputFileError(
            f"line {line_number} of {path} is not a trace ({error}).\n{hint}"
        ) from error


@contextmanager
def trace_writer(path: Path | None) -> Iterator[Callable[[Iterable[Trace]], None]]:
    """Open a file of JSON lines, and yield what writes traces to it; without a path, it writes nothing.

    Raises:
        OutputFileError: The file cannot be written.
    """
    if path is None:
        yield lambda traces: None
        return
    with writing(path):
        file = path.open("w", encoding="utf-8")

    def write(traces: Iterable[Trace]) -> None:
        lines = "".join(trace.to_json() + "\n" for trace in traces)
        with writing(path):
            file.write(lines)
            file.flush()

    try:
        yield write
    except BaseException:
        with suppress(OSError):  # It writes what a failed write has left.
            file.close()
        raise
    with writing(path):
        file.close()


def _top(pairs: Sequence[Sequence[float]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(token_id), float(logprob)) for token_id, logprob in pairs)


def _terms(fields: Mapping[str, Sequence[float]] | None) -> dict[str, Terms] | None:
    return None if fields is None else {name: Terms(*map(float, f)) for name, f in fields.items()}


def _views(fields: Mapping[str, Any] | None) -> dict[str, View] | None:
    if fields is None:
        return None
    return {name: View(**{**view, "top": _top(view["top"])}) for name, view in fields.items()}
