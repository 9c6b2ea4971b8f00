"""Calls to an OpenAI-compatible HTTP API that survive bad networks: retried, counted, within a budget.

JSON objects go in and out; what they say about tokens is read in `answers.py`. Every call can be repeated
without harm, because it asks what follows a text and changes nothing on the server. So whatever goes wrong on
the way is tried again, and an answer counts only when it is complete.

The key is read from the environment when the client is made, and goes into one header. It is in no message,
log or file of this package.
"""

from __future__ import annotations

import email.utils
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx2

from proxytune.errors import ApiError, BudgetSpent, InvalidRequest, UnsupportedModel
from proxytune.recipe.spec import ApiSettings
from proxytune.trace import Usage

FIRST_PAUSE_S = 0.5
"""Pause before the first retry; it doubles with each."""

LONGEST_PAUSE_S = 30.0

LONGEST_WAIT_S = 300.0
"""The longest `Retry-After` that is honoured."""

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
        settings: Timeouts, retries, prices, the name of the key's environment variable.
        budget: What calls may cost; None for no limit.
        sleep: Waits between tries, given seconds. Default: wait until `give_up` at most.

    Raises:
        InvalidRequest: The key's variable is not set, or a cost is limited and no price is given.
    """

    def __init__(
        self,
        url: str,
        settings: ApiSettings,
        *,
        budget: Budget | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
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
        headers = {"User-Agent": "proxytune"}
        self._key = ""
        if settings.key_env is not None:
            key = os.environ.get(settings.key_env, "").strip()
            if not key:
                raise InvalidRequest(
                    f"the environment variable {settings.key_env} is not set, and the recipe takes the "
                    f"API key of {self.url} from it.\nhint: export {settings.key_env}=…"
                )
            if not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidRequest(
                    f"the environment variable {settings.key_env} holds a character that no API key has.\n"
                    "hint: check for a line break or a quotation mark that was copied along"
                )
            self._key = key
            headers["Authorization"] = f"Bearer {key}"
        self._headers = headers
        self._seen: deque[str] = deque(maxlen=256)
        self._has_ids = True
        self._http = self._connections()

    def _connections(self) -> httpx2.Client:
        timeout_s = self._settings.timeout_s
        return httpx2.Client(
            headers=self._headers,
            timeout=httpx2.Timeout(timeout_s, connect=min(10.0, timeout_s)),
            limits=httpx2.Limits(max_connections=self._settings.max_concurrency + 1),
        )

    def _is_late(self, answer: Mapping[str, Any]) -> bool:
        """Return whether an answer has come before; if so, leave the connection, which is one answer behind.

        Otherwise a proxy that repeats an answer would give each question the answer to the one before.
        """
        name = answer.get("id")
        if not isinstance(name, str) or not self._has_ids:
            return False
        with self._lock:
            if name in self._seen:
                self._http = self._connections()  # other threads finish on the old ones
                return True
            self._seen.append(name)
        return False

    def close(self) -> None:
        """Close the connections, and stop retrying."""
        self.give_up()
        self._http.close()

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
        is_probe: bool = False,
    ) -> tuple[dict[str, Any], Usage]:
        """Return the answer to a question about tokens, and what it cost.

        Args:
            path: Path below the API's address.
            body: The question.
            check: Raises ValueError for an incomplete answer, which is then asked for again.
            is_probe: Whether the server may not know the question. Some servers then answer 500, which is
                retried a few times and counts as a refusal.

        Raises:
            BudgetSpent: One more call would exceed the budget.
            UnsupportedModel: The server refuses the question (4xx); the message is the server's.
            ApiError: No try gave a good answer.
        """
        with self._lock:
            self._check_budget()
            self._num_begun += 1
        try:
            answer, num_retries = self._call("POST", path, body, check, is_probe=is_probe)
        except BaseException:
            with self._lock:
                self._num_begun -= 1
            raise
        counts = answer.get("usage") or {}
        num_prompt = int(counts.get("prompt_tokens") or 0)
        num_completion = int(counts.get("completion_tokens") or 0)
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
        is_probe: bool = False,
    ) -> tuple[dict[str, Any], int]:
        """Return the answer and the number of retries."""
        most = self._settings.max_retries
        num_500 = 0
        was_late = False
        stop = self._stop
        for num_retries in range(most + 1):
            asked_pause: float | None = None
            try:
                response = self._http.request(method, f"{self.url}{path}", json=body)
                if response.status_code < 300:
                    answer = response.json()
                    if not isinstance(answer, dict):
                        raise ValueError("it is not a JSON object")
                    if answer.get("error") and "choices" not in answer:
                        raise ValueError(self._error_text(response))
                    check(answer)
                    # A server that gives all its answers the same id is believed the second time.
                    if was_late or not self._is_late(answer):
                        if was_late and answer.get("id") in self._seen:
                            self._has_ids = False
                        return answer, num_retries
                    was_late = True
                    raise ValueError("it is the answer to an earlier question")
                if response.status_code < 500 and response.status_code not in _RETRIED:
                    raise self._refusal(path, response)
                num_500 += response.status_code == 500
                if is_probe and num_500 > PROBE_RETRIES:
                    raise self._refusal(path, response)
                problem = f"{response.status_code} {self._error_text(response)}"
                asked_pause = _retry_after(response)
            except httpx2.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                problem = f"its answer is incomplete: {error}"
            except httpx2.InvalidURL as error:
                raise InvalidRequest(f"{self.url} is not a valid address: {error}") from error
            if num_retries < most:
                with self._lock:
                    self.usage += Usage(num_retries=1)
                pause = self._pause(num_retries, asked_pause)
                (self._sleep or stop.wait)(pause)
            if stop.is_set():
                break
        raise ApiError(
            f"{self.url}{path} gave no answer in {num_retries + 1} tries; the last one: "
            f"{self._redacted(problem)}\n"
            "hint: check that the server runs and is not overloaded; max_retries and timeout_s in the "
            "recipe's api set how long to try"
        )

    def _pause(self, num_retries: int, asked: float | None) -> float:
        """Return seconds to wait: what the server asks for, or twice as long each time, with jitter."""
        longest: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**num_retries)
        own = self._jitter.uniform(longest / 2, longest)
        if asked is not None:
            return max(own, min(asked, LONGEST_WAIT_S) + self._jitter.uniform(0, 0.1))
        return own

    def _refusal(self, path: str, response: Any) -> UnsupportedModel:
        if response.status_code in (401, 403):
            variable = self._settings.key_env
            hint = (
                f"the key is taken from {variable}; check that it is the right one"
                if variable
                else 'name the variable that holds the key: "api": {"key_env": "OPENAI_API_KEY"}'
            )
        elif response.status_code < 400:
            hint = f"it has moved to {response.headers.get('location', 'another address')}; use that one"
        elif response.status_code == 404:
            hint = "check that the address ends in /v1 and that the server lists the model's name"
        else:
            hint = "the message is the server's"
        return RefusedCall(
            f"{self.url}{path} refuses ({response.status_code}): {self._error_text(response)}\nhint: {hint}",
            response.status_code,
        )

    def _error_text(self, response: Any) -> str:
        """Return an error answer's message in one line, without the key, which servers may repeat in it."""
        try:
            content = response.json()
            error = content.get("error", content.get("detail", content))
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            text = re.sub(r"<[^>]*>", " ", response.text)
        return " ".join(self._redacted(text).split())[:300] or str(response.reason_phrase)

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text


class RefusedCall(UnsupportedModel):
    """The server refuses a question."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _retry_after(response: Any) -> float | None:
    """Return the seconds that `Retry-After` asks for as a number or a date, or None."""
    value = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    return max(0.0, until.timestamp() - time.time())
