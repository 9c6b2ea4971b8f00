"""Calls to an OpenAI-compatible HTTP API that survive bad networks: retried, counted, within a budget.

JSON objects go in and out; what they say about tokens is read in `answers.py`. Every call can be repeated
without harm, because it asks what follows a text and changes nothing on the server. So whatever goes wrong on
the way is tried again, and an answer counts only when it is complete. All tries of a call and the pauses
between them have one time limit.

The key is read from the environment when the client is made, and goes into one header. It is in no message,
log or file of this package. Which key that is, `keys.py` decides.
"""

from __future__ import annotations

import email.utils
import json
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx2

from proxytune.backends.api.answers import (
    UnusableAnswer,
    in_one_line,
    parse_answer,
    read_usage,
)
from proxytune.backends.api.connections import Connections, Received
from proxytune.backends.api.keys import find_key
from proxytune.errors import ApiError, BudgetSpent, InvalidRequest, UnsupportedModel
from proxytune.recipe.address import parse_address
from proxytune.recipe.spec import ApiSettings
from proxytune.trace import Usage

FIRST_PAUSE_S = 0.5
"""Pause before the first retry; it doubles with each."""

LONGEST_PAUSE_S = 30.0

ANSWER_BYTES = 4 * 2**20
"""Maximum size of an answer to a question that asks for little."""

PROBE_RETRIES = 3
"""Number of retries after a 500 that may mean that the server does not know the question."""

_RETRIED = frozenset({408, 409, 425, 429})
"""Status codes below 500 after which another try may succeed."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What all calls together may cost.

    Args:
        max_calls: Maximum number of answered calls; None for no limit.
        max_cost: Maximum cost by the recipe's prices; None for no limit. No call begins once it is reached.

    Raises:
        InvalidRequest: A limit is not above 0.
    """

    max_calls: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_calls", "max_cost"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise InvalidRequest(f"{name} is {limit}, and must be above 0")


class ApiClient:
    """One server, one key, one budget. Several threads may call its methods.

    Args:
        url: Address of the API, `/v1` included.
        settings: Timeouts, retries, prices, the environment variable whose key the recipe asks for.
        budget: What calls may cost; None for no limit.
        key_env: The environment variable that the caller names; None for the one that is bound to the host.
        sleep: Waits between tries, given seconds. Default: wait until `give_up` at most.

    Raises:
        InvalidRequest: The address cannot be used, a cost is limited and no price is given, or as `find_key`
            raises it.
        InputFileError: The user's settings file cannot be used.
    """

    def __init__(
        self,
        url: str,
        settings: ApiSettings,
        *,
        budget: Budget | None = None,
        key_env: str | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        address = parse_address(url)
        self.url = str(address).rstrip("/")
        self._settings = settings
        self._budget = budget or Budget()
        self._sleep = sleep
        self._stop = threading.Event()
        self._jitter = random.Random()
        self._lock = threading.Lock()
        self._num_begun = 0
        self.usage = Usage()
        """What all calls so far have cost."""
        if self._budget.max_cost is not None and not (
            settings.prompt_price or settings.completion_price
        ):
            raise InvalidRequest(
                "max_cost is given, and the recipe gives no prices to count with.\n"
                'hint: add prices per million tokens: "api": {"prompt_price": …, "completion_price": …}'
            )
        self._key = find_key(self.url, asked=settings.key_env, key_env=key_env)
        headers = {"User-Agent": "proxytune"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.value}"
        self._connections = Connections(address, headers)
        self._seen: deque[int] = deque(maxlen=256)
        """Hashes of the ids of the last answers."""
        self._has_ids = True

    def _is_late(self, answer: Mapping[str, Any]) -> bool:
        """Return whether an answer has come before; if so, leave the connection, which is one answer behind.

        Otherwise a proxy that repeats an answer would give each question the answer to the one before.
        """
        own = _hash_of_id(answer)
        if own is None or not self._has_ids:
            return False
        with self._lock:
            if own in self._seen:
                self._connections.drop()
                return True
            self._seen.append(own)
        return False

    def close(self) -> None:
        """Close the connections, and stop retrying."""
        self.give_up()
        self._connections.drop()

    def give_up(self) -> None:
        """Stop retrying the calls that are under way in other threads."""
        stop, self._stop = self._stop, threading.Event()
        stop.set()

    def get(self, path: str, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Return the answer to a question that costs nothing; arguments and errors are those of `post`."""
        return self._call("GET", path, None, check)[0]

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        check: Callable[[dict[str, Any]], None],
        *,
        max_bytes: int = ANSWER_BYTES,
        is_probe: bool = False,
    ) -> tuple[dict[str, Any], Usage]:
        """Return the answer to a question about tokens, and what it cost.

        Args:
            path: Path below the API's address.
            body: The question.
            check: Raises ValueError or LookupError for an incomplete answer, which is then asked for again,
                and UnusableAnswer for one that asking again would not mend.
            max_bytes: Maximum size of the answer, decompressed.
            is_probe: Whether the server may not know the question. Some servers then answer 500, which is
                retried a few times and counts as a refusal.

        Raises:
            BudgetSpent: One more call would exceed the budget.
            UnsupportedModel: The server refuses the question (4xx); the message is the server's.
            ApiError: No try gave a good answer within `ApiSettings.longest_call_s`, or one cannot be used.
        """
        counts: list[tuple[int, int]] = []

        def check_usage(answer: dict[str, Any]) -> None:
            counts.append(read_usage(answer))
            check(answer)

        with self._lock:
            self._check_budget()
            self._num_begun += 1
        try:
            answer, num_retries = self._call(
                "POST", path, body, check_usage, max_bytes=max_bytes, is_probe=is_probe
            )
        except BaseException:
            with self._lock:
                self._num_begun -= 1
            raise
        num_prompt, num_completion = counts[-1]
        price = self._settings
        usage = Usage(
            num_calls=1,
            num_retries=num_retries,
            num_prompt_tokens=num_prompt,
            num_completion_tokens=num_completion,
            cost=(num_prompt * price.prompt_price + num_completion * price.completion_price) / 1e6,
        )
        with self._lock:
            self.usage += replace(usage, num_retries=0)  # counted when they happened
        return answer, usage

    def _check_budget(self) -> None:
        limits, used = self._budget, self.usage
        if limits.max_calls is not None and self._num_begun >= limits.max_calls:
            raise BudgetSpent(
                f"the budget of {limits.max_calls} calls to {self.url} is spent.\n"
                "hint: allow more with --max-calls, or ask for fewer new tokens"
            )
        if limits.max_cost is not None and used.cost >= limits.max_cost:
            raise BudgetSpent(
                f"{used.num_calls} calls to {self.url} have cost {used.cost:.4g}, and the limit is "
                f"{limits.max_cost:g}.\nhint: allow more with --max-cost, or ask for fewer new tokens"
            )

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        check: Callable[[dict[str, Any]], None],
        *,
        max_bytes: int = ANSWER_BYTES,
        is_probe: bool = False,
    ) -> tuple[dict[str, Any], int]:
        """Return the answer and the number of retries."""
        settings = self._settings
        stop = self._stop
        num_500 = num_retries = 0
        was_late = False
        deadline = time.monotonic() + settings.longest_call_s
        while True:
            asked_pause: float | None = None
            try:
                left = max(0.0, deadline - time.monotonic())
                response = self._connections.request(
                    method,
                    f"{self.url}{path}",
                    body,
                    timeout_s=min(settings.timeout_s, left),
                    max_bytes=max_bytes,
                )
                if response.status < 300:
                    answer = self._checked(response, check)
                    # A server that gives all its answers the same id is believed the second time.
                    if was_late or not self._is_late(answer):
                        if was_late and _hash_of_id(answer) in self._seen:
                            self._has_ids = False
                        return answer, num_retries
                    was_late = True
                    raise _Incomplete("it is the answer to an earlier question")
                if response.status < 500 and response.status not in _RETRIED:
                    raise self._refusal(path, response)
                num_500 += response.status == 500
                if is_probe and num_500 > PROBE_RETRIES:
                    raise self._refusal(path, response)
                problem = f"{response.status} {self._error_text(response)}"
                asked_pause = _retry_after(response)
            except httpx2.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            except _Incomplete as error:
                problem = f"its answer is incomplete: {error}"
            except UnusableAnswer as error:
                raise ApiError(
                    f"the answer of {self.url}{path} cannot be used: {self._shown(str(error))}\n"
                    "hint: check that the address is that of an OpenAI-compatible API"
                ) from error
            pause = self._pause(num_retries, asked_pause)
            is_over = time.monotonic() + pause >= deadline
            if is_over or num_retries == settings.max_retries or stop.is_set():
                break
            num_retries += 1
            with self._lock:
                self.usage += Usage(num_retries=1)
            (self._sleep or stop.wait)(pause)
            if stop.is_set():
                break
        raise self._no_answer(path, problem, num_retries + 1, pause if is_over else None)

    def _checked(
        self, response: Received, check: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        try:
            answer = parse_answer(response.content)
            if answer.get("error") and "choices" not in answer:
                raise ValueError(self._error_text(response))
            check(answer)
        except (LookupError, ValueError) as error:
            raise _Incomplete(str(error)) from error
        return answer

    def _no_answer(
        self, path: str, problem: str, num_tries: int, next_pause: float | None
    ) -> ApiError:
        """Return the error after the last try; `next_pause` is one that would have passed the time limit."""
        limit = self._settings.longest_call_s
        within = ""
        if next_pause is not None:
            within = f", and another one in {next_pause:.0f} s would pass the limit of {limit:g} s for a call"
        return ApiError(
            f"{self.url}{path} gave no answer in {num_tries} tries{within}; the last one: "
            f"{self._shown(problem)}\n"
            "hint: check that the server runs and is not overloaded; max_retries, timeout_s and "
            "total_timeout_s in the recipe's api set how long to try"
        )

    def _pause(self, num_retries: int, asked: float | None) -> float:
        """Return seconds to wait: what the server asks for, or twice as long each time, with jitter."""
        longest: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**num_retries)
        own = self._jitter.uniform(longest / 2, longest)
        if asked is not None:
            return max(own, asked + self._jitter.uniform(0, 0.1))
        return own

    def _refusal(self, path: str, response: Received) -> UnsupportedModel:
        if response.status in (401, 403):
            hint = (
                f"the key is taken from {self._key.variable}; check that it is the right one"
                if self._key is not None
                else "name the variable that holds the key: --key-env NAME, for a judge --judge-key-env NAME"
            )
        elif response.status < 400:
            place = self._shown(response.headers.get("location", "another address"))
            hint = f"it has moved to {place}; if that is right, use that address"
        elif response.status == 404:
            hint = "check that the address ends in /v1 and that the server lists the model's name"
        else:
            hint = "the message is the server's"
        return RefusedCall(
            f"{self.url}{path} refuses ({response.status}): {self._error_text(response)}\nhint: {hint}",
            response.status,
        )

    def _error_text(self, response: Received) -> str:
        """Return an error answer's message in one line, without the key, which servers may repeat in it."""
        try:
            content = parse_answer(response.content)
            error = content.get("error") or content.get("detail") or content
            found = error.get("message", error) if isinstance(error, dict) else error
            text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        except (UnusableAnswer, ValueError, RecursionError):
            page = self._redacted(response.content.decode("utf-8", "replace"))
            # Only the beginning, as looking for tags takes the square of the length.
            text = re.sub(r"<[^>]*>", " ", page[:2000])
        return self._shown(text) or self._shown(response.reason)

    def _shown(self, text: str) -> str:
        """Return a text from the server in one line and without the key, which servers may repeat in it."""
        return in_one_line(self._redacted(text))

    def _redacted(self, text: str) -> str:
        return text.replace(self._key.value, "…") if self._key is not None else text


class _Incomplete(Exception):
    """An answer that may be whole the next time."""


class RefusedCall(UnsupportedModel):
    """The server refuses a question."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _hash_of_id(answer: Mapping[str, Any]) -> int | None:
    """Return the hash of an answer's id, which may be long; None if it has none."""
    name = answer.get("id")
    return hash(name) if isinstance(name, str) else None


def _retry_after(response: Received) -> float | None:
    """Return the seconds that `Retry-After` asks for as a number or a date, or None."""
    value = response.headers.get("retry-after", "").strip()[:40]
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError):
        return None
