"""A base behind an OpenAI-compatible HTTP API that shows the logprobs of its most likely tokens.

This is the one backend that text passes through, since most servers take text. Here are the batch and its
rows; `stretches.py` decides what to ask about a row, `server.py` puts the question, and `client.py` makes
sure that an answer arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proxytune.backends.api.client import ApiClient, Budget
from proxytune.backends.api.positions import ApiRow, ApiState, Position
from proxytune.backends.api.server import ApiServer, ApiTraits
from proxytune.backends.api.stretches import StretchReader
from proxytune.backends.api.tokens import ApiTokens
from proxytune.backends.base import NO_TOKEN, Bounds, Capabilities, PartialBackend, Prefilled
from proxytune.backends.checks import check_prompts
from proxytune.errors import InvalidRequest
from proxytune.recipe.spec import ApiSettings
from proxytune.text.prompts import Tokenizer
from proxytune.text.vocab import Vocabulary
from proxytune.trace import Usage

if TYPE_CHECKING:
    from proxytune.checkpoints.checkpoint import Checkpoint
    from proxytune.recipe.spec import ModelSpec


class ApiBackend(PartialBackend[ApiState]):
    """A base behind HTTP.

    Args:
        client: How to reach it.
        settings: From the recipe.
        name: What errors call it.
        tokenizer: The local tokenizer that stands for the base's; tokens are matched by their text.
        vocabulary: The tokenizer's vocabulary.
        eos_token_ids: Tokens that end a text.

    Raises:
        ApiError: The server cannot be reached.
        UnsupportedModel: It shows no logprobs, or serves several models and none is named.
    """

    def __init__(
        self,
        client: ApiClient,
        settings: ApiSettings,
        *,
        name: str,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        eos_token_ids: Sequence[int],
    ) -> None:
        self.name = name
        self.client = client
        self.vocab_size = vocabulary.width
        tokens = ApiTokens(tokenizer, vocabulary, name=name)
        self.server = ApiServer(client, settings, tokens, name=name)
        self._reader = StretchReader(self.server, settings, eos_token_ids=eos_token_ids)
        self._pool = ThreadPoolExecutor(
            settings.max_concurrency, thread_name_prefix="proxytune-api"
        )

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        tokens: Checkpoint,
        *,
        budget: Budget | None = None,
        key_env: str | None = None,
    ) -> ApiBackend:
        """Connect to a recipe's server.

        Args:
            spec: The recipe's base.
            tokens: A model whose tokenizer stands for the base's.
            budget: What calls may cost; None for no limit.
            key_env: The environment variable that the caller names; see `ApiClient`.

        Raises:
            UserError: As the constructor and `ApiClient` raise them.
            ApiError: The server cannot be reached.
        """
        assert spec.model is not None and spec.api is not None
        return cls(
            ApiClient(spec.model, spec.api, budget=budget, key_env=key_env),
            spec.api,
            name=spec.model,
            tokenizer=tokens.tokenizer,
            vocabulary=tokens.vocabulary,
            eos_token_ids=tokens.eos_token_ids,
        )

    def close(self) -> None:
        """Stop background calls, and close the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.client.close()

    @property
    def capabilities(self) -> Capabilities:
        """What this backend can do; servers do not say how long their context is."""
        return Capabilities(max_context=None)

    @property
    def traits(self) -> ApiTraits:
        """Everything the server shows and takes; what is not known yet is asked for."""
        return self.server.traits

    @property
    def can_score(self) -> bool:
        """Whether several tokens appended at once cost one call."""
        return self.server.scoring is not None

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        adapters: Sequence[str | None] | None = None,
        num_new_tokens: Sequence[int] | None = None,
        is_scored: bool = False,
    ) -> Prefilled[ApiState]:
        """Ask for the first stretch of each row; see `PartialBackend.prefill`.

        Raises:
            InvalidRequest: A prompt is empty or ends within a character, or an adapter is named.
            UnsupportedModel, ApiError, BudgetSpent: As `StretchReader.read` raises them.
        """
        if any(adapters or ()):
            raise InvalidRequest(f"{self.name} is behind an API, which takes no adapters")
        check_prompts(self.name, prompts)
        most: Sequence[int | None] = num_new_tokens or [None] * len(prompts)
        rows = [
            ApiRow(prompt, list(prompt), num_left=n, is_scored=is_scored)
            for prompt, n in zip(prompts, most, strict=True)
        ]
        state = ApiState(rows)
        logits = self._positions(state, [[len(row.token_ids)] for row in rows])
        return Prefilled(state, logits[:, 0])

    def extend(self, state: ApiState, token_ids: Tensor) -> Tensor:
        """Append tokens and return logprobs after each; see `Backend.extend`.

        Calls are made for rows whose stretch does not cover the tokens. `NO_TOKEN` pads shorter rows, and
        nothing is asked about it.

        Raises:
            UnsupportedModel, ApiError, BudgetSpent: As `StretchReader.read` raises them.
        """
        lengths = []
        for row, new in zip(state.rows, token_ids.tolist(), strict=True):
            begin = len(row.token_ids)
            row.token_ids.extend(new)
            num_real = next((n for n, i in enumerate(new) if i == NO_TOKEN), len(new))
            lengths.append([begin + n + 1 if n < num_real else -1 for n in range(len(new))])
            if row.num_left is not None:
                row.num_left -= len(new)
        return self._positions(state, lengths)

    def rewind(self, state: ApiState, num_tokens: Sequence[int]) -> None:
        """Forget the last tokens of each row."""
        for row, count in zip(state.rows, num_tokens, strict=True):
            row.rewind(count)

    def select(self, state: ApiState, rows: Sequence[int]) -> ApiState:
        """Return a state of the given rows in the given order."""
        bounds = [state.bounds[row] for row in rows] if state.bounds else []
        kept = [replace(state.rows[r], token_ids=list(state.rows[r].token_ids)) for r in rows]
        return ApiState(kept, bounds)

    def bounds(self, state: ApiState) -> list[list[Bounds]]:
        """Return the bounds of the positions asked for last; see `PartialBackend.bounds`."""
        return state.bounds

    def lookahead(self, state: ApiState, token_ids: Sequence[int]) -> list[list[int]]:
        """Return the tokens of each row's stretch after this one; see `PartialBackend.lookahead`."""
        return [row.ahead(token_id) for row, token_id in zip(state.rows, token_ids, strict=True)]

    def usage(self, state: ApiState, row: int) -> Usage:
        """Return what a row's calls have cost."""
        return state.rows[row].usage

    def reveal(
        self, state: ApiState, row: int, num_back: int, token_ids: Sequence[int]
    ) -> dict[int, float]:
        """Ask for the logprobs of certain tokens; see `PartialBackend.reveal`."""
        own = state.rows[row]
        return self._reader.reveal(own, len(own.token_ids) - num_back, token_ids)

    def _positions(self, state: ApiState, lengths: Sequence[Sequence[int]]) -> Tensor:
        """Return `[rows, num_positions, vocab]` for rows of these lengths; ask for what is not known."""
        jobs = list(zip(state.rows, lengths, strict=True))
        found: list[list[Position]]
        if sum(any(n >= 0 and row.known(n) is None for n in wanted) for row, wanted in jobs) > 1:
            _ = self.server.takes_token_ids  # found out once, not by each thread
            futures = [self._pool.submit(self._reader.read, *job) for job in jobs]
            try:
                found = [future.result() for future in futures]
            except BaseException:
                # The first failure ends the batch; answers to the other rows are lost unused.
                for future in futures:
                    future.cancel()
                self.client.give_up()
                raise
        else:
            found = [self._reader.read(*job) for job in jobs]
        state.bounds = [[position.bounds for position in positions] for positions in found]
        width = self.vocab_size
        return torch.stack([torch.stack([p.dense(width) for p in each]) for each in found])
