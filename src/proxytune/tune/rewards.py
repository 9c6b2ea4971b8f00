"""Rewards: which answers are good, as a number that can be checked without a judge.

A reward is named in one of three ways, or is a Python function of the caller's own:

    exact               1 if the answer equals the row's, otherwise 0
    regex:PATTERN       1 if the pattern is found in the answer, otherwise 0
    FILE.py:FUNCTION    what the function returns for (prompt, answer, row)

*Exact* compares in Unicode's form NFC, without white space at the ends, and with one space for any other
white space; case counts. The row's answer is text or a number under "answer", otherwise under "completion".
A *pattern* is searched in the answer without white space at its ends; `{name}` in it stands for the row's
field of this name, literally. A *function* gets the row's prompt as it is given (text or messages), the
answer's text as `generate` shows it, and the whole row, and returns a finite number.

A file's code runs because the caller named the file: no recipe, data set or saved setting names one. It runs
in a child process of its own, and so do patterns, which can take for ever, too. A call that takes longer than
its limit ends that process. A function of the caller's own runs in a thread of this process, which cannot
be ended: the call counts as failed, and the thread is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple, Protocol

from proxytune.data.rows import Rows, given_answer
from proxytune.errors import InputFileError, InvalidRequest, RewardError
from proxytune.request import Prompt
from proxytune.tune import reward_worker
from proxytune.tune.reward_worker import fields_of, filled, number_of, why

RewardFunction = Callable[[Prompt, str, Mapping[str, Any]], float]
"""A reward of the caller's own: of the row's prompt, an answer's text and the whole row."""

LOADING_S = 60.0
"""Seconds that a reward's file may take to load, imports included."""


class _Failed(Exception):
    """Why a call gave no number, as a clause without its subject."""


class _Runner(Protocol):
    """What calls a reward."""

    def __call__(self, prompt: Prompt, answer: str, row: Mapping[str, Any]) -> float: ...

    def close(self) -> None: ...


class NamedReward(NamedTuple):
    """A reward's name, taken apart.

    Args:
        kind: `exact`, `regex` or `file`.
        value: The pattern, or the file's path.
        function: The function's name in the file.
    """

    kind: str
    value: str = ""
    function: str = ""


def parse_reward(name: str) -> NamedReward:
    """Return a reward's name, taken apart.

    Raises:
        InvalidRequest: There is no such reward, the pattern is no regular expression, or the file is missing.
    """
    if name == "exact":
        return NamedReward("exact")
    if name.startswith("regex:"):
        pattern = name.removeprefix("regex:")
        try:
            # A field's value is matched literally; any one shows whether the rest is a pattern.
            re.compile(filled(pattern, dict.fromkeys(fields_of(pattern), "x")))
        except re.error as error:
            raise InvalidRequest(
                f"the reward's pattern {pattern!r} is no regular expression: {error}.\n"
                r"hint: a backslash takes a character literally, as in regex:\(\d+\)"
            ) from error
        if not pattern:
            raise InvalidRequest("the reward's pattern is empty, so every answer would match it")
        return NamedReward("regex", pattern)
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py") or not function.isidentifier():
        raise InvalidRequest(
            f"the reward is {name!r}, and must be exact, regex:PATTERN or FILE.py:FUNCTION.\n"
            "hint: --reward exact compares with the row's answer"
        )
    whole = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(whole):
        raise InvalidRequest(
            f"the reward's file {path} does not exist.\nhint: name it as FILE.py:FUNCTION"
        )
    return NamedReward("file", whole, function)


def is_exact(answer: str, given: str) -> bool:
    """Whether two answers are the same text, apart from white space and Unicode's ways to write a letter."""
    one, other = (" ".join(unicodedata.normalize("NFC", text).split()) for text in (answer, given))
    return one == other


class Reward:
    """A reward that is ready to be called, and checked: it returns finite numbers, or raises.

    Args:
        reward: Its name, or a function.
        limit_s: Seconds that one call may take.

    Raises:
        InvalidRequest: There is no such reward.
        RewardError: Its file cannot be loaded.
    """

    def __init__(self, reward: str | RewardFunction, *, limit_s: float) -> None:
        self._named: NamedReward | None = None
        self._run: _Runner
        if not isinstance(reward, str):
            self.name = str(getattr(reward, "__qualname__", type(reward).__name__))
            self._run = _Thread(reward, limit_s)
            return
        self.name = reward
        self._named = parse_reward(reward)
        self._run = _exact if self._named.kind == "exact" else _Child(self._named, limit_s)

    def check(self, rows: Rows) -> None:
        """Refuse rows without what the reward reads.

        Raises:
            InputFileError: A row lacks it; names the line.
        """
        if self._named is None or self._named.kind == "file":
            return
        fields = fields_of(self._named.value) if self._named.kind == "regex" else set()
        for index, each in enumerate(rows.rows):
            row = each["row"]
            if self._named.kind == "exact" and not (given_answer(row) or "").strip():
                raise InputFileError(
                    f"{rows.where(index)} has no answer, which the reward exact compares with; it has "
                    f"{', '.join(map(repr, row))}.\n"
                    'hint: put the answer under "answer", as text or a number'
                )
            missing = sorted(field for field in fields if row.get(field) is None)
            if missing:
                raise InputFileError(
                    f"{rows.where(index)} has no {missing[0]!r}, which the reward's pattern names; it has "
                    f"{', '.join(map(repr, row))}.\n"
                    r"hint: write \{name\} in the pattern for braces that are meant literally"
                )

    def __call__(self, prompt: Prompt, answer: str, row: Mapping[str, Any], where: str) -> float:
        """Return the reward of one answer.

        Args:
            prompt: The row's prompt.
            answer: The answer's text.
            row: The whole row.
            where: The row's name in errors.

        Raises:
            RewardError: It raised, took too long, or returned no finite number.
        """
        try:
            return self._run(prompt, answer, row)
        except _Failed as failed:
            raise RewardError(
                f"the reward {self.name} {failed}, for {where} and the answer {answer[:200]!r}, so the run "
                "cannot go on.\nhint: mend it; the same command with --resume continues from the last state "
                "that was saved"
            ) from failed.__cause__

    def close(self) -> None:
        """End the process that runs it, if there is one."""
        self._run.close()


class _Exact:
    def __call__(self, prompt: Prompt, answer: str, row: Mapping[str, Any]) -> float:
        return float(is_exact(answer, given_answer(row) or ""))

    def close(self) -> None: ...


_exact = _Exact()


class _Child:
    """Calls a reward in a child process, and ends the process if a call takes too long."""

    def __init__(self, named: NamedReward, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process = subprocess.Popen(
            [sys.executable, "-u", reward_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        what = {"file": named.value, "function": named.function}
        if named.kind == "regex":
            what = {"pattern": named.value}
        try:
            self._ask({**what, "limit_s": limit_s}, max(LOADING_S, limit_s))
        except _Failed as failed:
            self.close()
            raise RewardError(
                f"the reward's file {named.value} cannot be loaded: it {failed}.\n"
                "hint: run the file by itself with Python to see more"
            ) from failed

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put("")

    def _ask(self, asked: Mapping[str, Any], limit_s: float) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=limit_s)
        except (queue.Empty, OSError) as error:
            line = ""
            if isinstance(error, queue.Empty):
                self.close()
                raise _Failed(f"did not return within {limit_s:g} s") from None
        if not line:
            raise _Failed(f"ended its process (exit code {self._process.wait()})")
        answer = json.loads(line)
        if "failed" in answer:
            raise _Failed(answer["failed"])
        return answer.get("value")

    def __call__(self, prompt: Prompt, answer: str, row: Mapping[str, Any]) -> float:
        asked = {"prompt": prompt, "answer": answer, "row": row}
        return float(self._ask(asked, self._limit_s))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(
                    OSError
                ):  # Something was left to write to a process that ended.
                    stream.close()


class _Thread:
    """Calls the caller's own function in a thread, and leaves the thread behind if it takes too long."""

    def __init__(self, function: RewardFunction, limit_s: float) -> None:
        self._function = function
        self._limit_s = limit_s

    def __call__(self, prompt: Prompt, answer: str, row: Mapping[str, Any]) -> float:
        outcome: list[float | BaseException] = []

        def call() -> None:
            try:
                outcome.append(number_of(self._function(prompt, answer, row)))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self._limit_s)
        if not outcome:
            raise _Failed(f"did not return within {self._limit_s:g} s")
        if isinstance(outcome[0], BaseException):
            path = getattr(getattr(self._function, "__code__", None), "co_filename", "")
            raise _Failed(why(outcome[0], path)) from outcome[0]
        return outcome[0]

    def close(self) -> None: ...
