"""What every backend offers: prefill, extend, rewind, select, and its capabilities.

A backend holds one model's weights and runs token ids through it. It hides devices, KV caches, padding and
adapters. Text, sampling and other models never reach it.

Words: a *row* is one sequence in a batch. A *state* is what a backend remembers of a batch (its KV caches);
callers keep it and pass it back. A row may run with an *adapter*, so that an expert and its anti-expert on
one small model are two rows of one forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # typing's own can be generic only from Python 3.11 on

from proxytune.errors import UnsupportedModel
from proxytune.text.prompts import Tokenizer
from proxytune.text.vocab import TokenMap, Vocabulary
from proxytune.trace import Usage

State = TypeVar("State")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do.

    Args:
        max_context: Maximum number of tokens in a row, prompt and new ones together; None for no limit.
        can_rewind: Whether `rewind` works (state-space models, for one, cannot forget).
        adapters: Names that rows may be given.
        can_merge: Whether `merge` and `copy` work.
        reuses_logits: Whether the next call on the same state overwrites the memory of the logits; callers
            that keep them must clone them.
        reuses_prompts: Whether a prompt may go on from an earlier one that begins alike, which is rewound and
            extended (dynamic NTK turns a prompt's keys by angles for its length).
        depends_on_length: Whether keys depend on the length of their row, so that rows may be read again.
        is_exact: Whether a row's logits are the same bit by bit whatever rows and drafts are beside it.
    """

    max_context: int | None
    can_rewind: bool = True
    can_merge: bool = False
    adapters: tuple[str, ...] = ()
    reuses_logits: bool = False
    reuses_prompts: bool = True
    depends_on_length: bool = False
    is_exact: bool = False


class Prefilled(NamedTuple, Generic[State]):
    """What `prefill` returns."""

    state: State
    logits: Tensor  # [batch, vocab], of the token after each prompt


class Resumed(NamedTuple, Generic[State]):
    """What `resume` returns."""

    state: State
    logits: Tensor  # [batch, vocab], of the token after each prompt
    num_kept: list[int]  # how many tokens of each prompt were not read again


RESUME_TOKENS = 64
"""How many tokens are read at once after a kept beginning: each of them gives a whole row of logits."""


class Spelling(Protocol):
    """How a model spells text; a `Checkpoint` knows it."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What cuts text into them."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """The tokens that end a text."""


class Translation(NamedTuple):
    """How a small model of another tokenizer stands in for one that shares the base's tokens."""

    inner: Backend[Any]
    """The model itself, which reads and predicts its own tokens."""
    own: Spelling
    """How it spells text."""
    token_map: TokenMap
    """Which of the base's tokens it has too."""


class Backend(ABC, Generic[State]):
    """One model's weights and the ways to run them."""

    name: str
    """The model's name in errors and reports."""

    vocab_size: int
    """Width of the logits, padding ids included."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can do."""

    @property
    def partial(self) -> PartialBackend[State] | None:
        """This backend, if it shows only a part of its logits; None if it shows them all."""
        return None

    @property
    def translation(self) -> Translation | None:
        """How a model of another tokenizer speaks the base's tokens; None for a model that shares them."""
        return None

    @property
    def host(self) -> Backend[Any] | None:
        """The backend that can make this one's logits with its own, as both have one output matrix.

        `host.extend_with` takes this backend's `final_states`. None for a backend that reads by itself.
        """
        return None

    @property
    def device(self) -> torch.device:
        """Where `extend` expects token ids; callers move them there."""
        return torch.device("cpu")

    @property
    def num_prompt_ids(self) -> int:
        """The number of token ids that prompts may use, counted from 0."""
        return self.vocab_size

    def own_ids(self, token_ids: Sequence[int], *, is_start: bool = False) -> list[int]:
        """Return a text in the tokens that prompts are made of.

        Args:
            token_ids: The text in the tokens that `extend` takes.
            is_start: Whether the text stands at the beginning rather than after a prompt.
        """
        return list(token_ids)

    @abstractmethod
    def prefill(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None] | None = None
    ) -> Prefilled[State]:
        """Run whole prompts and return the state and the logits after each.

        Args:
            prompts: Token ids of this model, one sequence per row, each at least one token long.
            adapters: The adapter of each row, or None for the plain weights. None instead of a sequence means
                plain weights for all rows.

        Raises:
            InvalidRequest: A prompt is empty or has a token id the model does not have, or an adapter has
                an unknown name.
            PromptTooLong: A prompt exceeds `capabilities.max_context`.
            BackendError: The model failed.
        """

    @abstractmethod
    def extend(self, state: State, token_ids: Tensor) -> Tensor:
        """Append `[batch, num_tokens]` token ids and return logits `[batch, num_tokens, vocab]`.

        The logits at position i are those after token i. Any float dtype; `logits/steer.py` works in float32.

        Raises:
            InvalidRequest: The model does not have a token id, or the rows are not the state's.
            PromptTooLong: A row would exceed `capabilities.max_context`.
            BackendError: The model failed. The state cannot be used again.
        """

    def decode(self, state: State, token_ids: Tensor) -> Tensor:
        """Append one token per row, `[batch]`, and return logits `[batch, vocab]`."""
        return self.extend(state, token_ids[:, None])[:, 0]

    def share_output(self, base: Backend[Any]) -> bool:
        """Use another model's output matrix in place of an equal one, and return whether that was done.

        Call it before the first forward. From then on `base` is the `host`, if both can read together.
        """
        return False

    def final_states(self, state: State, token_ids: Tensor) -> Tensor:
        """Append tokens as `extend` does, and return what logits are made of.

        Returns:
            `[batch, num_tokens, hidden]`: what the output matrix is multiplied with, for `host.extend_with`.

        Raises:
            UnsupportedModel: The backend has no `host`.
        """
        raise UnsupportedModel(f"{self.name} does not share another model's output matrix")

    def extend_with(self, state: State, token_ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Append tokens as `extend` does, and make the logits of others' final states in the same product.

        Reading the output matrix takes most of the time of a product of few rows, so others cost little.

        Args:
            state: The rows.
            token_ids: `[batch, num_tokens]`.
            others: `[others, num_tokens, hidden]`, from `final_states` of backends whose `host` this is.

        Returns:
            Logits `[batch, num_tokens, vocab]` of the rows, and `[others, num_tokens, vocab]`.

        Raises:
            UnsupportedModel: The backend cannot be a `host`.
        """
        raise UnsupportedModel(f"{self.name} does not share its output matrix")

    @abstractmethod
    def rewind(self, state: State, num_tokens: Sequence[int]) -> None:
        """Forget the last `num_tokens[row]` tokens of each row.

        Raises:
            UnsupportedModel: The backend cannot rewind (`capabilities.can_rewind`).
            InvalidRequest: A row does not hold that many tokens.
        """

    @abstractmethod
    def select(self, state: State, rows: Sequence[int]) -> State:
        """Return a state of the given rows in the given order; the old state must not be used any more."""

    def copy(self, state: State, rows: Sequence[int]) -> State:
        """Return a separate state of the given rows; the old one stays as it is.

        Raises:
            UnsupportedModel: The backend cannot copy (`capabilities.can_merge`).
        """
        raise UnsupportedModel(f"{self.name} cannot copy the rows of a batch")

    def merge(self, state: State, other: State, rows: Sequence[int]) -> State:
        """Return a state of rows from two states, in the given order; neither must be used any more.

        Args:
            state: Its rows come first in the numbering.
            other: Its rows are numbered on from there.
            rows: Which rows, in which order.

        Raises:
            UnsupportedModel: The backend cannot merge (`capabilities.can_merge`).
        """
        raise UnsupportedModel(f"{self.name} cannot merge the rows of two batches")

    def resume(
        self,
        state: State,
        prompts: Sequence[Sequence[int]],
        *,
        num_held: Sequence[int],
        num_shared: Sequence[int],
    ) -> Resumed[State] | None:
        """Read prompts of which a state's rows hold the first tokens; the rows forget all others.

        Rows that have less to read than others read their last token again, and forget it.

        Args:
            state: A row for each prompt; it must not be used any more.
            prompts: Token ids, as in `prefill`.
            num_held: How many tokens each row holds.
            num_shared: How many of them, from the first on, are its prompt's: at least 1, and never the last
                token of the prompt.

        Returns:
            The rows after their prompts; None if that would exceed the context.

        Raises:
            UnsupportedModel: The backend cannot rewind.
            BackendError: The model failed.
        """
        rests = [list(prompt[n:]) for prompt, n in zip(prompts, num_shared, strict=True)]
        longest = max(map(len, rests))
        limit = self.capabilities.max_context
        if limit is not None and max(num_shared) + longest > limit:
            return None
        self.rewind(state, [held - n for held, n in zip(num_held, num_shared, strict=True)])
        padded = torch.tensor([rest + [rest[-1]] * (longest - len(rest)) for rest in rests])
        ends: dict[int, Tensor] = {}
        for start in range(0, longest, RESUME_TOKENS):
            logits = self.extend(state, padded[:, start : start + RESUME_TOKENS])
            for row, rest in enumerate(rests):
                if start < len(rest) <= start + RESUME_TOKENS:
                    ends[row] = logits[row, len(rest) - 1 - start].clone()
        surplus = [longest - len(rest) for rest in rests]
        if any(surplus):
            self.rewind(state, surplus)
        logits = torch.stack([ends[row] for row in range(len(rests))])
        return Resumed(state, logits, list(num_shared))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is known of the tokens that a partial backend did not show at a position.

    Args:
        ceiling: Upper bound of these tokens' logprobs; -inf if all tokens were shown.
        rest: Upper bound of the probability of all of them together.
    """

    ceiling: float
    rest: float


NO_TOKEN = -1
"""Fills up rows whose draft is shorter than others'."""


class PartialBackend(Backend[State]):
    """A model that shows the logprobs of a few tokens at each position: a base behind an API.

    Its logits are logprobs, with -inf for tokens that were not shown. Calls are expensive, so what an answer
    says about later positions is kept: `extend` costs nothing if that covers the appended tokens.
    """

    @property
    def partial(self) -> PartialBackend[State]:
        """This backend."""
        return self

    @property
    @abstractmethod
    def can_score(self) -> bool:
        """Whether one call returns the logits of several appended tokens; otherwise each costs a call."""

    @abstractmethod
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        adapters: Sequence[str | None] | None = None,
        num_new_tokens: Sequence[int] | None = None,
        is_scored: bool = False,
    ) -> Prefilled[State]:
        """Run whole prompts; see `Backend.prefill`.

        Args:
            prompts: Token ids, one sequence per row.
            adapters: None, or None for every row.
            num_new_tokens: Maximum number of new tokens per row, so that no more are requested.
            is_scored: Whether a given text follows, whose own tokens count as seen even if they are unlikely.
        """

    @abstractmethod
    def usage(self, state: State, row: int) -> Usage:
        """Return what a row's calls have cost so far."""

    @abstractmethod
    def bounds(self, state: State) -> list[list[Bounds]]:
        """Return the bounds for each row and position of the last `prefill` or `extend`."""

    @abstractmethod
    def lookahead(self, state: State, token_ids: Sequence[int]) -> list[list[int]]:
        """Return each row's continuation after the given token as far as it is known."""

    @abstractmethod
    def reveal(
        self, state: State, row: int, num_back: int, token_ids: Sequence[int]
    ) -> dict[int, float]:
        """Request the logprobs of certain tokens, and return those that could be obtained.

        Args:
            state: The rows.
            row: The row to ask about.
            num_back: How many of the row's last tokens come after the position.
            token_ids: The tokens to ask for.
        """


def num_shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common beginning of two sequences."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
