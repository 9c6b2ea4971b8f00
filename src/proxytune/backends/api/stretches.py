"""One row's calls: what to ask a server when a position is not known, and how far ahead.

Words: a *position* is a place in a row, and what the server shows of the token there: the logprobs of the
*seen* tokens, and bounds for the others. A *stretch* is the base's own greedy continuation with the positions
along it; one call brings many. As long as the tokens chosen agree with it, the next positions cost nothing.
Where they differ, the rest of the stretch is dropped and another one is asked for. A server that *scores*
shows the positions of a given text.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from proxytune.backends.api.answers import HIGHEST_LOGPROB, LOWEST_LOGPROB, ShownToken
from proxytune.backends.api.client import RefusedCall
from proxytune.backends.api.positions import (
    NOTHING,
    ROUNDING,
    UNPROVABLE,
    ApiRow,
    Position,
    position_of,
)
from proxytune.backends.api.server import FORCING_BIAS, ApiServer
from proxytune.backends.base import num_shared_tokens
from proxytune.errors import ApiError, UnsupportedModel
from proxytune.recipe.spec import ApiSettings
from proxytune.trace import Usage

MAX_LOOKAHEAD = 32
FIRST_LOOKAHEAD = 8

MAX_ENTRIES = 2**19
"""Maximum number of logprobs to ask for in one call: at 128 bytes each they fill the largest answer."""

RUN_MEMORY = 8
"""Number of stretches over which the running mean of their used length is taken."""

MAX_SINGLE_CALLS = 64
"""Maximum number of positions of a row to ask for one by one: enough for a draft, not for scoring a text."""


class StretchReader:
    """Asks a server for positions along rows. Several threads may use it, each for another row.

    Args:
        server: Whom to ask.
        settings: From the recipe.
        eos_token_ids: Tokens that end a text.
    """

    def __init__(
        self, server: ApiServer, settings: ApiSettings, *, eos_token_ids: Sequence[int]
    ) -> None:
        self._server = server
        self._settings = settings
        self._eos_token_ids = tuple(eos_token_ids)
        self._run_length = FIRST_LOOKAHEAD / 2
        """Running mean of how many tokens of a stretch were used."""
        self._lock = threading.Lock()

    def read(self, row: ApiRow, lengths: Sequence[int]) -> list[Position]:
        """Return the positions of a row at these lengths (-1 for none), asking for those not known.

        Raises:
            UnsupportedModel: The server refuses the question, or too many positions would cost a call each.
            ApiError: It gave no good answer.
            BudgetSpent: The calls or the cost allowed are spent.
        """
        begin = len(row.prompt)
        named = next(
            (n for n, i in enumerate(row.token_ids[begin:], begin) if not self._server.can_name(i)),
            len(row.token_ids),
        )
        # A draft may hold a token that no text names. It is never chosen, so nothing after it is asked for.
        lengths = [n if n <= named else -1 for n in lengths]
        # Each answer replaces the stretch, so look up first what the one before knew.
        found = {n: row.known(n) for n in lengths if n >= 0}
        missing = [n for n, position in found.items() if position is None]
        can_score = row.can_score and self._server.scoring is not None
        if len(missing) > 1 and can_score and self._fetch_scored(row, missing):
            found |= {n: row.known(n) for n in missing}
        elif len(missing) > MAX_SINGLE_CALLS:
            raise UnsupportedModel(
                f"{self._server.name} cuts the text into other tokens than the small models read, and asking "
                f"for each of {len(missing)} tokens would cost a call each.\n"
                "hint: use a server that takes token ids, such as vLLM; it does not cut text"
            )
        else:
            for n in missing:
                if row.known(n) is None:
                    self._fetch_stretch(row, n)
                found[n] = row.known(n)
        return [(found[n] if n >= 0 else None) or NOTHING for n in lengths]

    def reveal(self, row: ApiRow, length: int, token_ids: Sequence[int]) -> dict[int, float]:
        """Return logprobs of the given tokens after the first `length`, as far as `logit_bias` shows them.

        If the bias is hidden, a forced token comes with its own logprob, one per call. If it is shown,
        several tokens are raised by as much as one whose logprob is known, and theirs follow from the
        differences.
        """
        server = self._server
        if server.bias is None:
            return {}
        position = row.known(length)
        prompt = server.prompt_of(row.token_ids[:length], prompt=row.prompt)
        found: dict[int, float] = {}
        if server.bias == "hidden":
            for token_id in token_ids:
                shown = self._ask_biased(row, prompt, {token_id: FORCING_BIAS})
                if shown is None or shown.logprob is None:
                    continue
                if server.tokens.match(shown.token) == token_id:
                    found[token_id] = shown.logprob
            return found
        if position is None or not position.token_ids:
            return {}
        best = max(range(len(position.logprobs)), key=position.logprobs.__getitem__)
        anchor, anchor_logprob = position.token_ids[best], position.logprobs[best]
        room = max(1, server.top_logprobs - 1)
        for start in range(0, len(token_ids), room):
            asked = token_ids[start : start + room]
            shown = self._ask_biased(row, prompt, dict.fromkeys([anchor, *asked], FORCING_BIAS))
            if shown is None:
                continue
            logprobs = {server.tokens.match(name): logprob for name, logprob in shown.top}
            if anchor not in logprobs:
                continue
            for token_id in asked:
                if token_id in logprobs:
                    logprob = logprobs[token_id] - logprobs[anchor] + anchor_logprob
                    if LOWEST_LOGPROB <= logprob <= HIGHEST_LOGPROB:
                        found[token_id] = logprob
        return found

    def _ask_biased(self, row: ApiRow, prompt: Any, bias: dict[int, float]) -> ShownToken | None:
        """Return what is shown of the next token when `bias` is added to the logits."""
        answer = self._server.ask(prompt, max_tokens=1, bias=bias)
        row.usage += answer.usage
        return answer.first

    def _fetch_stretch(self, row: ApiRow, length: int) -> None:
        server = self._server
        prompt = server.prompt_of(row.token_ids[:length], prompt=row.prompt)
        if row.is_at_end(length):
            self._fetch_end(row, length, prompt)
            return
        self._learn(row)
        try:
            answer = server.ask(prompt, max_tokens=self._num_ahead(row, length))
        except RefusedCall as error:
            if error.status != 400:
                raise
            answer = server.ask(prompt, max_tokens=1)  # more may not have fitted into its context
        is_recut = self._count(row, answer.usage, length)
        if not answer.tokens and not answer.has_ended:
            raise ApiError(
                f"{server.name} gave no token after {length} tokens.\n"
                "hint: its context may be full; shorten the prompt, or ask for fewer new tokens"
            )
        self._keep(row, length, [], answer.tokens, has_ended=answer.has_ended, is_recut=is_recut)
        if row.known(length) is None:
            self._fetch_end(row, length, prompt)

    def _fetch_scored(self, row: ApiRow, lengths: Sequence[int]) -> bool:
        """Ask for all positions in one call; return whether the server's tokens were those of the row."""
        first, last = lengths[0], lengths[-1]
        self._learn(row)
        try:
            ahead = self._num_ahead(row, last)
            scored, answer = self._server.ask_scored(
                row.token_ids[:last], first, prompt=row.prompt, max_tokens=ahead
            )
        except RefusedCall as error:
            if error.status != 400:
                raise
            return False
        is_recut = self._count(row, answer.usage, last)
        if scored is None or any(shown is None for shown in scored[: last - first]):
            row.can_score = False  # the server cuts this text into other tokens, and will again
            return False
        given = row.token_ids[first:last]
        self._keep(row, first, given, scored, has_ended=answer.has_ended, is_recut=is_recut)
        return row.known(last) is not None

    def _keep(
        self,
        row: ApiRow,
        length: int,
        given: Sequence[int],
        shown: Sequence[ShownToken | None],
        *,
        has_ended: bool,
        is_recut: bool,
    ) -> None:
        """Keep the positions from `length` on; the first tokens are given, the others the server's."""
        positions: list[Position] = []
        token_ids = list(given)
        for place, one in enumerate(shown):
            if one is None:
                break
            positions.append(self._position(one, is_scored=row.is_scored))
            if is_recut:  # they hold for this text, but not for these tokens
                positions[-1].bounds = UNPROVABLE
            if place >= len(given):
                token_id = self._server.tokens.match(one.token)
                if token_id is None:
                    has_ended = False  # what follows a token without a local id cannot be used
                    break
                token_ids.append(token_id)
        is_open = not token_ids or token_ids[-1] not in self._eos_token_ids
        row.replace_stretch(length, positions, token_ids, has_ended=has_ended and is_open)

    def _fetch_end(self, row: ApiRow, length: int, prompt: Any) -> None:
        """Find out the position at which the base ends the text, which most servers do not show.

        The tokens that end it are forbidden, so that the others show. What those leave of the probability is
        taken for the end's. That is an estimate, so it proves nothing. If the server cannot be asked in this
        way, only the end is known to be likely.
        """
        ends = list(self._eos_token_ids)
        position = Position(ends[:1], [0.0] * len(ends[:1]), UNPROVABLE, 0.0)
        if self._server.bias == "hidden":
            shown = self._ask_biased(row, prompt, dict.fromkeys(ends, -FORCING_BIAS))
            if shown is not None:
                position = self._position(shown)
                if not set(ends) & set(position.token_ids):
                    left = 1.0 - sum(map(math.exp, position.logprobs))
                    position.token_ids.append(ends[0])
                    position.logprobs.append(math.log(max(left, ROUNDING)))
                    position.bounds = UNPROVABLE
        row.replace_stretch(length, [position], [], has_ended=False)

    def _position(self, shown: ShownToken, *, is_scored: bool = False) -> Position:
        server = self._server
        return position_of(
            shown, server.tokens, top_logprobs=server.top_logprobs, is_scored=is_scored
        )

    def _count(self, row: ApiRow, usage: Usage, length: int) -> bool:
        """Add a call's usage to its row; return whether the server has cut the text into other tokens."""
        is_recut = self._server.has_recut(usage, length)
        row.usage += replace(usage, num_recut=int(is_recut))
        return is_recut

    def _num_ahead(self, row: ApiRow, length: int) -> int:
        """Return how many tokens to ask for: somewhat more than were used of the last stretches."""
        most = self._settings.lookahead or MAX_LOOKAHEAD
        most = max(1, min(most, MAX_ENTRIES // self._server.top_logprobs))
        wanted = most if self._settings.lookahead else math.ceil(1.5 * self._run_length) + 2
        if row.num_left is not None:
            wanted = min(wanted, max(1, row.num_left + len(row.token_ids) - length))
        return max(1, min(wanted, most))

    def _learn(self, row: ApiRow) -> None:
        """Let the length of the next stretch follow what was used of the last one."""
        if row.stretch:
            with self._lock:
                num_used = num_shared_tokens(row.token_ids[row.start :], row.stretch_ids)
                self._run_length += (num_used - self._run_length) / RUN_MEMORY
