"""A model small enough to check by hand: logits from a table, and a tokenizer to go with it.

It comes with the package so that users' tests can run without weights, too. Every answer can be worked out on
paper: the logits after a text are the table's row of its last token, plus `memory` times the mean of the rows
of all tokens. The latter makes a wrong rewind or a mixed-up batch show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxytune.backends.base import Backend, Capabilities, Prefilled
from proxytune.backends.checks import check_length, check_prompts, check_token_ids
from proxytune.errors import InvalidRequest


@dataclass(slots=True)
class ToyState:
    """The rows' token ids so far, and each row's adapter."""

    rows: list[list[int]]
    adapters: list[str | None]


class ToyBackend(Backend[ToyState]):
    """A table as a language model.

    Args:
        table: `[vocab, vocab]` logits of the next token given the last one.
        name: What errors and reports call it.
        memory: Weight of the mean row of all tokens so far.
        adapters: Tables by adapter name, each added to `table` in rows that run with that adapter.
        max_context: Maximum number of tokens of a row; None for no limit.
    """

    def __init__(
        self,
        table: Tensor,
        *,
        name: str = "toy",
        memory: float = 0.0,
        adapters: Mapping[str, Tensor] | None = None,
        max_context: int | None = None,
    ) -> None:
        self.name = name
        self.vocab_size = table.shape[1]
        self._memory = memory
        self._tables = {None: table.float()} | {
            key: table.float() + extra.float() for key, extra in (adapters or {}).items()
        }
        self._capabilities = Capabilities(
            max_context=max_context, can_merge=True, adapters=tuple(adapters or ())
        )
        self.num_rows_run = 0
        """Number of token positions computed, for tests that nothing is computed twice."""

    @property
    def capabilities(self) -> Capabilities:
        """What this backend can do."""
        return self._capabilities

    def _logits(self, token_ids: Sequence[int], adapter: str | None) -> Tensor:
        table = self._tables[adapter]
        self.num_rows_run += 1
        return table[token_ids[-1]] + self._memory * table[list(token_ids)].mean(0)

    def _check(self, token_ids: Sequence[int]) -> None:
        check_length(self.name, len(token_ids), self._capabilities.max_context)
        check_token_ids(self.name, min(token_ids), max(token_ids), self.vocab_size)

    def prefill(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None] | None = None
    ) -> Prefilled[ToyState]:
        """Run whole prompts; see `Backend.prefill`."""
        check_prompts(self.name, prompts)
        state = ToyState([list(p) for p in prompts], list(adapters or [None] * len(prompts)))
        for row in state.rows:
            self._check(row)
        answers = [self._logits(r, a) for r, a in zip(state.rows, state.adapters, strict=True)]
        return Prefilled(state, torch.stack(answers))

    def extend(self, state: ToyState, token_ids: Tensor) -> Tensor:
        """Append tokens; see `Backend.extend`."""
        answers = []
        for row, adapter, new in zip(state.rows, state.adapters, token_ids.tolist(), strict=True):
            self._check([*row, *new])
            after_each = ([*row, *new[: i + 1]] for i in range(len(new)))
            answers.append(torch.stack([self._logits(ids, adapter) for ids in after_each]))
            row.extend(new)
        return torch.stack(answers)

    def rewind(self, state: ToyState, num_tokens: Sequence[int]) -> None:
        """Forget the last tokens of each row."""
        for row, count in zip(state.rows, num_tokens, strict=True):
            if count:
                del row[-count:]

    def select(self, state: ToyState, rows: Sequence[int]) -> ToyState:
        """Return a state of the given rows."""
        adapters = [state.adapters[row] for row in rows]
        return ToyState([list(state.rows[row]) for row in rows], adapters)

    def copy(self, state: ToyState, rows: Sequence[int]) -> ToyState:
        """Return a separate state of the given rows; see `Backend.copy`."""
        return self.select(state, rows)

    def merge(self, state: ToyState, other: ToyState, rows: Sequence[int]) -> ToyState:
        """Return a state of the rows of two; see `Backend.merge`."""
        both = ToyState([*state.rows, *other.rows], [*state.adapters, *other.adapters])
        return self.select(both, rows)


class ToyTokenizer:
    """Characters, or other short strings, as tokens; the longest match wins.

    Args:
        tokens: The token of each id.
        eos_token: The one that ends a text. It is special: decoding can leave it out.
    """

    chat_template: str | None = None

    def __init__(self, tokens: Sequence[str], *, eos_token: str | None = None) -> None:
        self._tokens = list(tokens)
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        self.eos_token = eos_token
        self.bos_token: str | None = None
        self.eos_token_id = None if eos_token is None else self._ids[eos_token]
        self.all_special_ids = [] if self.eos_token_id is None else [self.eos_token_id]

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        return dict(self._ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`.

        Raises:
            InvalidRequest: No token matches at some place.
        """
        token_ids = []
        while text:
            matches = [t for t in self._tokens if t and text.startswith(t)]
            if not matches:
                raise InvalidRequest(f"the toy tokenizer has no token for {text[:10]!r}")
            longest = max(matches, key=len)
            token_ids.append(self._ids[longest])
            text = text[len(longest) :]
        return token_ids

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Return the text of `token_ids`."""
        skipped = self.all_special_ids if skip_special_tokens else ()
        return "".join(self._tokens[i] for i in token_ids if i not in skipped)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the token strings of token ids."""
        return [self._tokens[i] for i in ids]
