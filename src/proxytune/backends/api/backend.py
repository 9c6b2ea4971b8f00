"""A base behind an OpenAI-compatible HTTP API, which shows the logprobs of its likeliest tokens.

This is the one backend that text passes through: most servers take a prompt as text and name tokens by
theirs. Both ways are here, with the differences between servers; `api_client.py` sees that answers arrive.

Words: a *position* is a place in a row, and what the server says of the token there: the logprobs of the
*seen* tokens, and bounds for the others. A *stretch* is the base's own greedy continuation, with the
positions along it: one call brings many. As long as what is chosen agrees with it, the next positions cost
nothing; where it differs, the rest of the stretch is dropped and a new one asked for. A server that *scores*
tells the positions of a given text.

What differs between servers is found out by asking (`ApiTraits`), each thing when it is needed first.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from proxytune.backends.api.answers import (
    Answer,
    Said,
    is_alike,
    read_chat,
    read_completion,
)
from proxytune.backends.api.client import ApiClient, Budget, RefusedCall
from proxytune.backends.api.positions import (
    NOTHING,
    UNPROVABLE,
    ApiState,
    Position,
    Row,
    usage_of,
)
from proxytune.backends.api.server import (
    FORCING_BIAS,
    LADDER,
    MOST_TOP_LOGPROBS,
    PROBES,
    ApiTraits,
)
from proxytune.backends.api.tokens import ids_by_bytes
from proxytune.backends.base import (
    NO_TOKEN,
    Bounds,
    Capabilities,
    PartialBackend,
    Prefilled,
)
from proxytune.errors import ApiError, InvalidRequest, UnsupportedModel
from proxytune.recipe.spec import ApiSettings
from proxytune.request import Message
from proxytune.text.prompts import ChatPrompt, Tokenizer
from proxytune.text.vocab import Vocabulary, token_bytes
from proxytune.trace import Usage

if TYPE_CHECKING:
    from proxytune.checkpoints.checkpoint import Checkpoint
    from proxytune.recipe.spec import ModelSpec

MAX_LOOKAHEAD = 32
FIRST_LOOKAHEAD = 8

RUN_MEMORY = 8
"""Stretches that the running mean of their used length goes back."""

MAX_SINGLE_CALLS = 64
"""Most positions of one row that are asked for one by one: a draft has as many, a text to score has more."""

ROUNDING = 1e-5
"""What logprobs are rounded by on their way, as a probability."""


class ApiBackend(PartialBackend[ApiState]):
    """A base behind HTTP.

    Args:
        client: How to reach it.
        settings: Of the recipe.
        name: How errors call it.
        tokenizer: Whose tokens stand for the base's, as text.
        vocabulary: The same one's.
        eos_token_ids: Which of them end a text.

    Raises:
        ApiError: The server cannot be reached.
        UnsupportedModel: It shows no logprobs, or has several models and none is named.
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
        self._settings = settings
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self.vocab_size = vocabulary.width
        self._eos_token_ids = tuple(eos_token_ids)
        self._bytes_of = token_bytes(vocabulary)
        self._id_of = ids_by_bytes(vocabulary, self._bytes_of)
        self._run_length = FIRST_LOOKAHEAD / 2
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(
            settings.max_concurrency, thread_name_prefix="proxytune-api"
        )
        self._num_added = 0
        """Tokens that the server puts before a text, a beginning-of-sequence token for one."""
        self._probe = PROBES[0]
        self._served_model = settings.model or self._only_model()
        self._endpoint, self._top_logprobs, self._is_limited = self._find_limits()

    @classmethod
    def load(
        cls, spec: ModelSpec, tokens: Checkpoint, *, budget: Budget | None = None
    ) -> ApiBackend:
        """Reach a recipe's server.

        Args:
            spec: The recipe's base.
            tokens: A model whose tokenizer speaks for it.
            budget: What calls may cost; None for no limit.

        Raises:
            UserError: As the constructor and `ApiClient` raise them.
            ApiError: The server cannot be reached.
        """
        assert spec.model is not None and spec.api is not None
        return cls(
            ApiClient(spec.model, spec.api, budget=budget),
            spec.api,
            name=spec.model,
            tokenizer=tokens.tokenizer,
            vocabulary=tokens.vocabulary,
            eos_token_ids=tokens.eos_token_ids,
        )

    def close(self) -> None:
        """End what runs in the background, and close the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.client.close()

    # What the server is like -----------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """Say what this backend can do; how long its context is, a server keeps to itself."""
        return Capabilities(max_context=None)

    @cached_property
    def traits(self) -> ApiTraits:
        """What the server shows and takes, all of it; some of it has to be asked for."""
        return ApiTraits(
            served_model=self._served_model,
            endpoint=self._endpoint,
            top_logprobs=self._top_logprobs,
            is_limited=self._is_limited,
            takes_token_ids=self._takes_token_ids,
            scoring=self._scoring,
            bias=self._bias,
            continues=self._continues if self._endpoint == "chat" else None,
        )

    @property
    def can_score(self) -> bool:
        """Whether several tokens appended at once cost one call."""
        return self._scoring is not None

    def _only_model(self) -> str:
        def names_of(answer: Mapping[str, Any]) -> list[str]:
            return [str(model["id"]) for model in answer["data"]]

        def check(answer: dict[str, Any]) -> None:
            names_of(answer)

        try:
            names = names_of(self.client.get("/models", check))
        except RefusedCall as error:
            raise UnsupportedModel(
                f"{self.name} does not list its models: {error}\n"
                'hint: name it in the recipe: "api": {"model": …}'
            ) from error
        if len(names) != 1:
            raise UnsupportedModel(
                f"{self.name} serves {len(names)} models ({', '.join(names[:8])}), and the recipe names "
                "none.\n"
                'hint: "api": {"model": …}'
            )
        return names[0]

    def _find_limits(self) -> tuple[Literal["completions", "chat"], int, bool]:
        """Return the endpoint, how many tokens it shows at a position, and whether more were asked for."""
        asked = min(self._settings.top_logprobs or MOST_TOP_LOGPROBS, self.vocab_size)
        endpoints: list[Any] = [self._settings.endpoint or "completions"]
        if self._settings.endpoint is None:
            endpoints.append("chat")
        problem: Exception | None = None
        for endpoint in endpoints:
            self._endpoint = endpoint
            for wanted in (asked, *(n for n in LADDER if n < asked)):
                self._top_logprobs = wanted
                try:
                    for self._probe in PROBES:
                        answer = self._ask(self._text_probe(), max_tokens=1, is_probe=True)
                        if answer.tokens:
                            break
                except RefusedCall as error:
                    problem = error
                    if error.status in (401, 403):
                        raise
                    if error.status in (404, 405):
                        break
                    continue
                if not answer.tokens and answer.has_ended:
                    # It ends every text at once, and refuses nothing.
                    return endpoint, wanted, wanted < asked
                said = answer.tokens[0] if answer.tokens else None
                if said is None or not said.top:
                    problem = UnsupportedModel("its answers have no logprobs")
                    break
                self._num_added = answer.usage.num_prompt_tokens - len(self._encode(self._probe))
                # A greedy answer's token is one of the likeliest; some servers list it once more.
                shown = wanted if said.is_by_text else min(len(said.top), wanted)
                return endpoint, shown, shown < asked
        raise UnsupportedModel(
            f"{self.name} cannot be steered, since it shows no logprobs: {problem}\n"
            "hint: a server has to answer `logprobs` (completions) or `top_logprobs` (chat); that of "
            "llama-cpp-python needs --logits_all true, vLLM shows 20 unless it is started with --max-logprobs"
        )

    @cached_property
    def _takes_token_ids(self) -> bool:
        """Whether token ids mean here what they mean to the local tokenizer."""
        if self._endpoint != "completions":
            return False
        token_ids = self._encode(self._probe)
        try:
            by_text = self._ask(self._text_of(token_ids), max_tokens=1, is_probe=True)
            by_ids = self._ask(token_ids, max_tokens=1, is_probe=True)
        except RefusedCall:
            return False
        one, other = by_text.tokens[:1], by_ids.tokens[:1]
        if not one or not other or one[0] is None or other[0] is None:
            return False
        if not isinstance(other[0].token, int):
            return False
        # The same distribution under names that the local vocabulary turns into the same text.
        texts = {self._key_bytes(key): logprob for key, logprob in one[0].top}
        return all(
            isinstance(key, int)
            and key in self._bytes_of
            and abs(texts.get(self._bytes_of[key], logprob) - logprob) < 0.05
            for key, logprob in other[0].top
        ) and any(self._bytes_of.get(int(key), b"?") in texts for key, _ in other[0].top)

    @cached_property
    def _scoring(self) -> Literal["prompt_logprobs", "echo", "echo_shifted"] | None:
        if self._endpoint != "completions":
            return None
        token_ids = self._encode(self._probe)
        prompt = self._prompt_of(token_ids)
        first = self._ask(prompt, max_tokens=1, is_probe=True)
        if not first.tokens or first.tokens[0] is None:
            return None
        said = first.tokens[0]
        token_id = self._match(said.token)
        if token_id is None:
            return None
        whole = self._prompt_of([*token_ids, token_id])
        for way in ("prompt_logprobs", "echo", "echo_shifted"):
            if way == "prompt_logprobs" and not self._takes_token_ids:
                continue  # it names tokens by the server's ids
            try:
                answer = self._ask(whole, max_tokens=1, scoring=way, is_probe=True)
            except RefusedCall:
                continue
            found = self._scored(answer, [*token_ids, token_id], len(token_ids), way)
            if found and found[0] is not None and is_alike(found[0], said):
                return way
        return None

    @cached_property
    def _bias(self) -> Literal["shown", "hidden"] | None:
        """Whether and how `logit_bias` works: a token that is unlikely here is forced, and looked at."""
        prompt = self._text_probe()
        plain = self._ask(prompt, max_tokens=1, is_probe=True)
        said = plain.tokens[0] if plain.tokens else None
        if said is None or len(said.top) < 2:
            return None
        matched = [(self._match(key), logprob) for key, logprob in said.top]
        known = [(i, logprob) for i, logprob in matched if i is not None]
        if len(known) < 2:
            return None
        token_id, logprob = min(known, key=lambda pair: pair[1])
        try:
            answer = self._ask(prompt, max_tokens=1, bias={token_id: FORCING_BIAS}, is_probe=True)
        except RefusedCall:
            return None
        forced = answer.tokens[0] if answer.tokens else None
        if forced is None or forced.logprob is None or self._match(forced.token) != token_id:
            return None
        return "hidden" if abs(forced.logprob - logprob) < 0.05 else "shown"

    @cached_property
    def _continues(self) -> bool:
        """Whether a chat answer that was begun is continued, as it would have gone on by itself."""
        prompt = self._text_probe()
        whole = self._ask(prompt, max_tokens=6, is_probe=True)
        ids = [None if said is None else self._match(said.token) for said in whole.tokens]
        if len(ids) < 6 or None in ids:
            return False
        begun = [i for i in ids[:3] if i is not None]
        try:
            answer = self._ask((prompt[0], self._plain_text(begun)), max_tokens=3, is_probe=True)
        except RefusedCall:
            return False
        return [None if s is None else self._match(s.token) for s in answer.tokens] == ids[3:6]

    # The backend's questions ------------------------------------------------------------------------------

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
            UnsupportedModel: The server refuses the question.
            ApiError: It gave no good answer.
            BudgetSpent: The calls or the cost allowed are spent.
        """
        if any(adapters or ()):
            raise InvalidRequest(f"{self.name} is behind an API, where it takes no adapters")
        if not prompts or not all(prompts):
            raise InvalidRequest(
                f"{self.name} was given an empty prompt, so there is nothing to continue"
            )
        most: Sequence[int | None] = num_new_tokens or [None] * len(prompts)
        state = ApiState(
            [
                Row(prompt, list(prompt), num_left=n, is_scored=is_scored)
                for prompt, n in zip(prompts, most, strict=True)
            ]
        )
        logits = self._positions(state, [[len(row.token_ids)] for row in state.rows])
        return Prefilled(state, logits[:, 0])

    def extend(self, state: ApiState, token_ids: Tensor) -> Tensor:
        """Append tokens and tell what follows each; see `Backend.extend`.

        Calls are made for rows whose stretch does not cover the tokens. `NO_TOKEN` fills up shorter rows, and
        nothing is asked about it.

        Raises:
            UnsupportedModel: The server refuses the question.
            ApiError: It gave no good answer.
            BudgetSpent: The calls or the cost allowed are spent.
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
            if count:
                del row.token_ids[-count:]
                if len(row.token_ids) < row.start:
                    # Other tokens may come before the stretch now.
                    row.stretch, row.tokens, row.has_ended = [], [], False
                if row.num_left is not None:
                    row.num_left += count

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
        found = []
        for row, token_id in zip(state.rows, token_ids, strict=True):
            place = len(row.token_ids) - row.start
            is_on_the_way = (
                row.tokens[: place + 1] == [*row.token_ids[row.start :], token_id] and place >= 0
            )
            ahead = row.tokens[place + 1 : len(row.stretch) - 1] if is_on_the_way else []
            found.append(list(ahead))
        return found

    def usage(self, state: ApiState, row: int) -> Usage:
        """Return what a row's calls have cost."""
        return state.rows[row].usage

    def reveal(
        self, state: ApiState, row: int, num_back: int, token_ids: Sequence[int]
    ) -> dict[int, float]:
        """Ask for certain tokens with `logit_bias`; see `PartialBackend.reveal`.

        Where the bias is hidden, a forced token comes with its own logprob, one a call. Where it is shown,
        several are raised by as much as a token whose logprob is known, which tells theirs.
        """
        if self._bias is None:
            return {}
        its = state.rows[row]
        length = len(its.token_ids) - num_back
        position = its.known(length)
        prompt = self._prompt_of(its.token_ids[:length], prompt=its.prompt)
        found: dict[int, float] = {}
        if self._bias == "hidden":
            for token_id in token_ids:
                answer = self._ask(prompt, max_tokens=1, bias={token_id: FORCING_BIAS})
                its.usage += answer.usage
                said = answer.tokens[0] if answer.tokens else None
                if (
                    said is not None
                    and said.logprob is not None
                    and self._match(said.token) == token_id
                ):
                    found[token_id] = said.logprob
            return found
        if position is None or not position.token_ids:
            return {}
        anchor, anchor_logprob = max(
            zip(position.token_ids, position.logprobs, strict=True), key=lambda pair: pair[1]
        )
        room = max(1, self._top_logprobs - 1)
        for start in range(0, len(token_ids), room):
            asked = token_ids[start : start + room]
            bias = dict.fromkeys([anchor, *asked], FORCING_BIAS)
            answer = self._ask(prompt, max_tokens=1, bias=bias)
            its.usage += answer.usage
            said = answer.tokens[0] if answer.tokens else None
            if said is None:
                continue
            shown = {self._match(key): logprob for key, logprob in said.top}
            if anchor not in shown:
                continue
            for token_id in asked:
                if token_id in shown:
                    found[token_id] = shown[token_id] - shown[anchor] + anchor_logprob
        return found

    # Positions ---------------------------------------------------------------------------------------------

    def _positions(self, state: ApiState, lengths: Sequence[Sequence[int]]) -> Tensor:
        """Return `[rows, num_positions, vocab]` for rows of these lengths; ask for what is not known."""
        jobs = list(zip(state.rows, lengths, strict=True))
        if sum(any(n >= 0 and row.known(n) is None for n in wanted) for row, wanted in jobs) > 1:
            # The first failure ends the batch; what the others asked for is then lost, and was not used.
            _ = (
                self._endpoint == "completions" and self._takes_token_ids
            )  # found out once, not by each
            futures = [self._pool.submit(self._row_positions, *job) for job in jobs]
            try:
                found = [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                self.client.give_up()
                raise
        else:
            found = [self._row_positions(*job) for job in jobs]
        state.bounds = [[position.bounds for position in positions] for positions in found]
        return torch.stack(
            [torch.stack([p.dense(self.vocab_size) for p in positions]) for positions in found]
        )

    def _row_positions(self, row: Row, lengths: Sequence[int]) -> list[Position]:
        """Return one row's positions at these lengths, -1 for none, asking for what is not known.

        Each answer takes the place of the stretch before, so what that knew is looked up first.
        """
        begin = len(row.prompt)
        named = next(
            (n for n, i in enumerate(row.token_ids[begin:], begin) if not self._can_name(i)),
            len(row.token_ids),
        )
        # A draft may hold what no text names, which is never chosen: nothing after it is asked about.
        lengths = [n if n <= named else -1 for n in lengths]
        found = {n: row.known(n) for n in lengths if n >= 0}
        missing = [n for n, position in found.items() if position is None]
        can_score = row.can_score and self._scoring is not None
        if len(missing) > 1 and can_score and self._fetch_scored(row, missing):
            found |= {n: row.known(n) for n in missing}
        elif len(missing) > MAX_SINGLE_CALLS:
            raise UnsupportedModel(
                f"{self.name} cuts the text into other tokens than the small models read, and asking for "
                f"each of {len(missing)} tokens would cost a call each.\n"
                "hint: a server that takes token ids, such as vLLM, cuts nothing"
            )
        else:
            for n in missing:
                if row.known(n) is None:
                    self._fetch_stretch(row, n)
                found[n] = row.known(n)
        return [(found[n] if n >= 0 else None) or NOTHING for n in lengths]

    def _fetch_stretch(self, row: Row, length: int) -> None:
        prompt = self._prompt_of(row.token_ids[:length], prompt=row.prompt)
        if row.is_at_end(length):
            self._fetch_end(row, length, prompt)
            return
        self._learn(row)
        try:
            answer = self._ask(prompt, max_tokens=self._num_ahead(row, length))
        except RefusedCall as error:
            if error.status != 400:
                raise
            answer = self._ask(prompt, max_tokens=1)  # more may not have fitted into its context
        row.usage += self._cut(answer.usage, length)
        if not answer.tokens and not answer.has_ended:
            raise ApiError(
                f"{self.name} gave no token after {length} tokens.\n"
                "hint: its context may be full; shorten the prompt, or ask for fewer new tokens"
            )
        is_recut = self._is_recut(answer.usage, length)
        self._enter(row, length, [], answer.tokens, has_ended=answer.has_ended, is_recut=is_recut)
        if row.known(length) is None:
            self._fetch_end(row, length, prompt)

    def _fetch_scored(self, row: Row, lengths: Sequence[int]) -> bool:
        """Ask for all positions in one call; whether the server's tokens were those of the row."""
        first, last = lengths[0], lengths[-1]
        way = self._scoring
        assert way is not None
        prompt = self._prompt_of(row.token_ids[:last], prompt=row.prompt)
        self._learn(row)
        try:
            answer = self._ask(prompt, max_tokens=self._num_ahead(row, last), scoring=way)
        except RefusedCall as error:
            if error.status != 400:
                raise
            return False
        row.usage += self._cut(answer.usage, last)
        scored = self._scored(answer, row.token_ids[:last], first, way)
        if scored is None or any(said is None for said in scored[: last - first]):
            row.can_score = False  # the server cuts this text otherwise, and will again
            return False
        given = row.token_ids[first:last]
        is_recut = self._is_recut(answer.usage, last)
        self._enter(row, first, given, scored, has_ended=answer.has_ended, is_recut=is_recut)
        return row.known(last) is not None

    def _enter(
        self,
        row: Row,
        length: int,
        given: Sequence[int],
        said: Sequence[Said | None],
        *,
        has_ended: bool,
        is_recut: bool,
    ) -> None:
        """Keep the positions from `length` on; the first tokens are given, the others the server's."""
        positions: list[Position] = []
        tokens: list[int] = list(given)
        for place, one in enumerate(said):
            if one is None:
                break
            positions.append(self._position(one, is_scored=row.is_scored))
            if is_recut:
                positions[-1].bounds = UNPROVABLE  # of this text, and not of these tokens
            if place >= len(given):
                token_id = self._match(one.token)
                if token_id is None:
                    has_ended = False  # what follows a token without a name here cannot be used
                    break
                tokens.append(token_id)
        row.usage += usage_of(positions)
        row.start, row.stretch, row.tokens = length, positions, tokens
        row.has_ended = has_ended and bool(not tokens or tokens[-1] not in self._eos_token_ids)

    def _fetch_end(self, row: Row, length: int, prompt: Any) -> None:
        """Find out the position where the base ends the text, which most servers do not tell.

        The token that ends it is forbidden to see the others, and is taken to have what they leave of the
        probability. That is an estimate, so nothing is proved here. Where it cannot be done, nothing else is
        known of the position.
        """
        ends = list(self._eos_token_ids)
        position = Position(ends[:1], [0.0] * len(ends[:1]), UNPROVABLE, 0.0)
        if self._bias == "hidden":
            answer = self._ask(prompt, max_tokens=1, bias=dict.fromkeys(ends, -FORCING_BIAS))
            row.usage += answer.usage
            if answer.tokens and answer.tokens[0] is not None:
                position = self._position(answer.tokens[0])
                if not set(ends) & set(position.token_ids):
                    left = 1.0 - sum(map(math.exp, position.logprobs))
                    position.token_ids.append(ends[0])
                    position.logprobs.append(math.log(max(left, ROUNDING)))
                    position.bounds = UNPROVABLE
        row.usage += usage_of([position])
        row.start, row.stretch, row.tokens, row.has_ended = length, [position], [], False

    def _position(self, said: Said, *, is_scored: bool = False) -> Position:
        """Match what the server shows at a position with the local vocabulary.

        A token that is listed because it was guessed, and not because it is likely, does not count as seen:
        what is chosen must not depend on what was guessed.
        """
        found: dict[int, float] = {}
        unknown: list[float] = []
        shown = sorted(said.top, key=lambda item: item[1], reverse=True)[: self._top_logprobs]
        if is_scored and said.logprob is not None and said.token not in dict(shown):
            shown.append((said.token, said.logprob))
        for key, logprob in shown:
            token_id = self._match(key)
            if token_id is None:
                unknown.append(logprob)
            else:
                found[token_id] = max(logprob, found.get(token_id, -math.inf))
        total = min(1.0, sum(math.exp(logprob) for _, logprob in shown))
        # A token that is listed in any case says nothing about how likely those are that are not.
        likeliest = [logprob for key, logprob in said.top if key != said.listed]
        lowest = min(likeliest, default=max((logprob for _, logprob in said.top), default=0.0))
        if said.is_by_text and len(likeliest) < self._top_logprobs:
            own_logprob = dict(said.top).get(said.listed or "", -math.inf)
            if len(likeliest) < self._top_logprobs - 1 or own_logprob < lowest:
                # Tokens of one text have fallen together, and the one left may be the least likely.
                lowest = 0.0
        is_all = len(found) >= len(self._bytes_of)
        left = max(0.0, 1.0 - total) + ROUNDING
        ceiling = -math.inf if is_all else max([min(lowest, math.log(left)), *unknown])
        rest = (
            0.0
            if is_all
            else min(1.0, max(0.0, 1.0 - sum(map(math.exp, found.values()))) + ROUNDING)
        )
        unmatched = min(1.0, sum(math.exp(logprob) for logprob in set(unknown)))
        return Position(list(found), list(found.values()), Bounds(ceiling, rest), unmatched)

    def _match(self, key: int | bytes | str) -> int | None:
        """Return the local id of a token that the server names; None where there is none.

        Where text is sent, a token that ends within a character has none: nothing could be asked about what
        follows it.
        """
        if isinstance(key, int):
            return key if key in self._bytes_of else None
        content = self._key_bytes(key)
        try:
            content.decode()
        except UnicodeDecodeError:
            return None
        return self._id_of.get(content)

    def _can_name(self, token_id: int) -> bool:
        """Whether a server knows the row when this token ends it."""
        if token_id == NO_TOKEN:
            return False
        if self._endpoint == "completions" and self._takes_token_ids:
            return True
        return self._match(self._bytes_of.get(token_id, b"\xff")) is not None

    @staticmethod
    def _key_bytes(key: int | bytes | str) -> bytes:
        return key if isinstance(key, bytes) else str(key).encode("utf-8", "surrogatepass")

    def _cut(self, usage: Usage, length: int) -> Usage:
        """Return a call's usage with a note if its text was cut anew."""
        return replace(usage, num_recut=int(self._is_recut(usage, length)))

    def _is_recut(self, usage: Usage, length: int) -> bool:
        """Whether the server read another number of tokens than `length`."""
        if self._endpoint == "chat" or self._takes_token_ids or not usage.num_prompt_tokens:
            return False
        return usage.num_prompt_tokens != length + self._num_added

    def _num_ahead(self, row: Row, length: int) -> int:
        """Return how many tokens to ask for: somewhat more than stretches were good for lately."""
        most = self._settings.lookahead or MAX_LOOKAHEAD
        wanted = most if self._settings.lookahead else math.ceil(1.5 * self._run_length) + 2
        if row.num_left is not None:
            wanted = min(wanted, max(1, row.num_left + len(row.token_ids) - length))
        return max(1, min(wanted, most))

    def _learn(self, row: Row) -> None:
        """Let the length of the next stretch follow what was used of the last one."""
        if row.stretch:
            with self._lock:
                self._run_length += (row.num_used() - self._run_length) / RUN_MEMORY

    # Texts and tokens ---------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=True))

    def _plain_text(self, token_ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _text_of(self, token_ids: Sequence[int]) -> str:
        """Return a row as text, without the token that begins every text: servers add it themselves."""
        bos = self._tokenizer.bos_token
        ids = list(token_ids)
        if bos is not None and ids and ids[0] == self._vocabulary.token_to_id.get(bos):
            with_start = self._tokenizer.encode("a", add_special_tokens=True)
            if with_start[:1] == ids[:1]:
                ids = ids[1:]
        text = self._plain_text(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            raise InvalidRequest(
                f"the prompt ends within a character, and {self.name} takes text only.\n"
                "hint: end the prompt after a whole character"
            )
        return text

    def _text_probe(self) -> Any:
        """Return a short prompt as every server takes it."""
        if self._endpoint == "completions":
            return self._probe
        return [{"role": "user", "content": self._probe}], ""

    def _prompt_of(self, token_ids: Sequence[int], *, prompt: Sequence[int] | None = None) -> Any:
        """Return what is sent for a row: token ids, text, or messages with the answer's beginning."""
        if self._endpoint == "completions":
            return list(token_ids) if self._takes_token_ids else self._text_of(token_ids)
        assert prompt is not None
        new = token_ids[len(prompt) :]
        if new and not self._continues:
            raise UnsupportedModel(
                f"{self.name} does not continue an answer that was begun, so after the first token that "
                "steering changes it cannot be asked any more.\n"
                "hint: use a server with /v1/completions, or have one of a few answers chosen with --choice"
            )
        if isinstance(prompt, ChatPrompt):
            messages: list[Message] = list(prompt.messages)
        else:
            messages = [{"role": "user", "content": self._text_of(prompt)}]
        return messages, self._plain_text(new) if new else ""

    # One call -----------------------------------------------------------------------------------------------

    def _ask(
        self,
        prompt: Any,
        *,
        max_tokens: int,
        bias: Mapping[int, float] | None = None,
        scoring: str | None = None,
        is_probe: bool = False,
    ) -> Answer:
        """Ask for a greedy continuation with logprobs."""
        body: dict[str, Any] = {
            "model": self._served_model,
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        if bias is not None:
            body["logit_bias"] = {str(token_id): value for token_id, value in bias.items()}
        if self._endpoint == "chat":
            return self._ask_chat(body, prompt, is_probe)
        body |= {"prompt": prompt, "logprobs": self._top_logprobs}
        if not isinstance(prompt, str):
            body["return_tokens_as_token_ids"] = True
        if scoring == "prompt_logprobs":
            body["prompt_logprobs"] = self._top_logprobs
        elif scoring is not None:
            body["echo"] = True

        read: list[Answer] = []
        _, usage = self.client.post(
            "/completions",
            body,
            lambda answer: read.append(read_completion(answer, scoring)),
            is_probe=is_probe,
        )
        return replace(read[-1], usage=usage)

    def _ask_chat(self, body: dict[str, Any], prompt: Any, is_probe: bool) -> Answer:
        messages, begun = prompt
        if begun:
            messages = [*messages, {"role": "assistant", "content": begun}]
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        body |= {"messages": messages, "logprobs": True, "top_logprobs": self._top_logprobs}
        read: list[Answer] = []
        _, usage = self.client.post(
            "/chat/completions",
            body,
            lambda answer: read.append(read_chat(answer)),
            is_probe=is_probe,
        )
        return replace(read[-1], usage=usage)

    def _scored(
        self, answer: Answer, token_ids: Sequence[int], first: int, way: str
    ) -> list[Said | None] | None:
        """Return what an answer with a scored prompt says of the positions from `first` on.

        None where the server cut the text into other tokens.
        """
        said = answer.tokens
        if way == "prompt_logprobs":
            told = [None if one is None else one.token for one in said[first : len(token_ids)]]
            return said[first:] if told == list(token_ids[first:]) else None
        if answer.offsets is None or len(answer.offsets) != len(said):
            return None
        begin = len(self._text_of(token_ids[:first])) if first else 0
        places = [n for n, offset in enumerate(answer.offsets) if offset == begin]
        if not places:
            return None
        place = places[-1]
        for n, token_id in enumerate(token_ids[first:]):
            there = said[place + n] if place + n < len(said) else None
            if there is None or self._match(there.token) != token_id:
                return None
        if way == "echo":
            return said[place:]
        # One place late: an entry's token stands there, and its logprobs are those of the next token.
        if place == 0:
            return None
        before = said[place - 1 : -1]
        return [
            None
            if one is None or other is None
            else Said(other.token, None, one.top, listed=one.token, is_by_text=one.is_by_text)
            for one, other in zip(before, said[place:], strict=True)
        ]
