"""Rows that share no forward, so that no row's logits depend on its company, in any dtype.

Kernels are chosen by the shapes they get: a matrix product of eight rows adds in another order than one of a
single row, attention splits the keys by their number and that of the queries, and experts of a mixture get as
many tokens as the batch sends them. In bfloat16 such differences change one greedy text in a few. Here the
shapes of a row's forwards follow from the row alone:

- every row is a state of its own of the backend inside, without gaps and padding;
- a prompt is read in *pieces* of `PIECE_TOKENS`, counted from its start, and its last token by itself;
- everything after the prompt is read one token at a time, whether it was chosen, drafted or given.

So a row gets the same logits bit for bit alone and beside others, in a batch that it joined, with and without
drafts, and after tokens were taken back. The price is that of forwards that are not shared:
docs/design/0008-exact-in-every-dtype.md has the measurements, and says what else was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from proxytune.backends import checks
from proxytune.backends.base import Backend, Capabilities, Prefilled, Resumed
from proxytune.errors import UnsupportedModel

PIECE_TOKENS = 128
"""Tokens of a whole piece of a prompt: wide enough that weights are read once for many tokens. Longer pieces
would let a longer part of a prompt be read again where an earlier text begins alike."""


@dataclass(slots=True)
class _Row:
    """One sequence.

    Args:
        state: The inner backend's, of this row alone.
        adapter: Its adapter.
        token_ids: What it holds, `[num_tokens]`, on the backend's device.
        num_prompt: How many of them were read as a prompt: in pieces, and the last one by itself.
    """

    state: Any
    adapter: str | None
    token_ids: Tensor
    num_prompt: int = 0


ExactState = list[_Row]


class ExactBackend(Backend[ExactState]):
    """A backend that runs every row in forwards of its own, whose shapes depend on nothing but the row.

    Args:
        inner: What runs them. Its logits must be a function of the forwards that led to them.

    Raises:
        UnsupportedModel: Its keys depend on the length of their row, so tokens that are taken back may have
            made it read the others again, in other forwards.
    """

    def __init__(self, inner: Backend[Any]) -> None:
        if inner.capabilities.depends_on_length:
            raise UnsupportedModel(
                f"exact is set, and the rotary angles of {inner.name} depend on a text's length, so its keys "
                "may be computed again, in other forwards\nhint: leave exact out"
            )
        self.inner = inner
        self.name = inner.name
        self.vocab_size = inner.vocab_size

    @property
    def capabilities(self) -> Capabilities:
        """What the inner backend can do."""
        return replace(self.inner.capabilities, is_exact=True, reuses_logits=False)

    @property
    def device(self) -> torch.device:
        """The inner backend's."""
        return self.inner.device

    @property
    def num_prompt_ids(self) -> int:
        """The inner backend's."""
        return self.inner.num_prompt_ids

    def prefill(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None] | None = None
    ) -> Prefilled[ExactState]:
        """Run whole prompts, one after the other; see `Backend.prefill`."""
        checks.check_prompts(self.name, prompts)
        known = self.inner.capabilities
        names = checks.adapters_of(self.name, adapters, len(prompts), known.adapters)
        checks.check_length(self.name, max(map(len, prompts)), known.max_context)
        read = [self._prefilled(prompt, name) for prompt, name in zip(prompts, names, strict=True)]
        return Prefilled([row for row, _ in read], torch.cat([logits for _, logits in read]))

    def extend(self, state: ExactState, token_ids: Tensor) -> Tensor:
        """Append tokens, each in a forward of its own; see `Backend.extend`."""
        checks.check_shape(self.name, token_ids.shape, len(state))
        num_new = token_ids.shape[1]
        longest = max(len(row.token_ids) for row in state)
        checks.check_length(self.name, longest + num_new, self.inner.capabilities.max_context)
        logits = [
            torch.cat([self._append(row, ids[None, i : i + 1]) for i in range(num_new)], dim=1)
            for row, ids in zip(state, token_ids, strict=True)
        ]
        return torch.cat(logits)

    def rewind(self, state: ExactState, num_tokens: Sequence[int]) -> None:
        """Forget the last tokens of each row; see `Backend.rewind`.

        What is left of a prompt stays as it was read.
        """
        can_rewind = self.inner.capabilities.can_rewind
        lengths = [len(row.token_ids) for row in state]
        checks.check_rewind(self.name, num_tokens, lengths, can_rewind=can_rewind)
        for row, count in zip(state, num_tokens, strict=True):
            if count:
                self.inner.rewind(row.state, [count])
                row.token_ids = row.token_ids[:-count]
                row.num_prompt = min(row.num_prompt, len(row.token_ids))

    def select(self, state: ExactState, rows: Sequence[int]) -> ExactState:
        """Return a state of the given rows, which may repeat; see `Backend.select`."""
        is_repeated = [row in rows[:place] for place, row in enumerate(rows)]
        return [
            self._copied(state[row]) if repeats else state[row]
            for row, repeats in zip(rows, is_repeated, strict=True)
        ]

    def copy(self, state: ExactState, rows: Sequence[int]) -> ExactState:
        """Return a separate state of the given rows; see `Backend.copy`."""
        return [self._copied(state[row]) for row in rows]

    def merge(self, state: ExactState, other: ExactState, rows: Sequence[int]) -> ExactState:
        """Return a state of the rows of two; see `Backend.merge`."""
        return self.select([*state, *other], rows)

    def resume(
        self,
        state: ExactState,
        prompts: Sequence[Sequence[int]],
        *,
        num_held: Sequence[int],
        num_shared: Sequence[int],
    ) -> Resumed[ExactState]:
        """Read prompts on from the whole pieces that the rows hold of them; see `Backend.resume`.

        Other tokens of the prompts are read again: they were read in other forwards than a prompt's are.
        """
        rows, answers, kept = [], [], []
        for row, prompt, count in zip(state, prompts, num_shared, strict=True):
            num_kept = min(count, max(row.num_prompt - 1, 0)) // PIECE_TOKENS * PIECE_TOKENS
            if num_kept:
                self.rewind([row], [len(row.token_ids) - num_kept])
                logits = self._read_on(row, prompt)
            else:
                row, logits = self._prefilled(prompt, row.adapter)
            rows.append(row)
            answers.append(logits)
            kept.append(num_kept)
        return Resumed(rows, torch.cat(answers), kept)

    def _prefilled(self, prompt: Sequence[int], adapter: str | None) -> tuple[_Row, Tensor]:
        """Return a row that has read a prompt, and `[1, vocab]` after it."""
        is_in_pieces = self.inner.capabilities.can_rewind
        # A state-space model reads several tokens at once only at the beginning, where nothing is reused.
        piece = PIECE_TOKENS if is_in_pieces else len(prompt)
        first = list(prompt[: max(1, min(piece, len(prompt) - 1))])
        state, logits = self.inner.prefill([first], adapters=[adapter])
        row = _Row(state, adapter, torch.tensor(first, device=self.device), len(first))
        return row, logits if len(first) == len(prompt) else self._read_on(row, prompt)

    def _read_on(self, row: _Row, prompt: Sequence[int]) -> Tensor:
        """Let a row that holds whole pieces of a prompt read the rest, and return `[1, vocab]` after it."""
        num_before_last = len(prompt) - 1
        start = len(row.token_ids)
        for begin in range(start, num_before_last, PIECE_TOKENS):
            end = min(begin + PIECE_TOKENS, num_before_last)
            self._append(row, torch.tensor([list(prompt[begin:end])]))
        logits = self._append(row, torch.tensor([list(prompt[-1:])]))
        row.num_prompt = len(prompt)
        return logits[:, -1]

    def _append(self, row: _Row, token_ids: Tensor) -> Tensor:
        """Append `[1, num_tokens]` in one forward, and return `[1, num_tokens, vocab]`."""
        logits = self.inner.extend(row.state, token_ids)
        row.token_ids = torch.cat((row.token_ids, token_ids[0].to(row.token_ids.device)))
        return logits.clone() if self.inner.capabilities.reuses_logits else logits

    def _copied(self, row: _Row) -> _Row:
        if self.inner.capabilities.can_merge:
            return replace(row, state=self.inner.copy(row.state, [0]))
        # Read again, in the same forwards.
        token_ids: list[int] = row.token_ids.tolist()
        copied, _ = self._prefilled(token_ids[: row.num_prompt], row.adapter)
        for token_id in token_ids[row.num_prompt :]:
            self._append(copied, torch.tensor([[token_id]]))
        return copied
