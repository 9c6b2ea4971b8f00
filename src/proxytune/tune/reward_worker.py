"""The child process that runs a reward, which may raise, hang or end it: JSON lines in, JSON lines out.

It runs as a script (`rewards.py` starts it) and imports the standard library alone. The first line names what
to run, and every further line is a call:

    {"file": PATH, "function": NAME, "limit_s": 10}    or    {"pattern": PATTERN, "limit_s": 10}
    {"prompt": ..., "answer": ..., "row": {...}}

Each is answered by `{"value": NUMBER}` or `{"failed": WHY}`, the first one by `{"ready": true}`. What the
function prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[Any, str, Mapping[str, Any]], Any]

_FIELD = re.compile(r"(?<!\\)\{([A-Za-z_]\w*)\}")
"""A field of the row in a pattern. Repetitions such as `{2,3}` begin with a digit or a comma."""


class NoNumber(Exception):
    """A reward returned something other than a finite number."""


def fields_of(pattern: str) -> set[str]:
    """Return the fields of the row that a pattern names."""
    return set(_FIELD.findall(pattern))


def filled(pattern: str, row: Mapping[str, Any]) -> str:
    """Return a pattern with the row's fields in place of their names, each to be matched literally."""
    return _FIELD.sub(lambda found: re.escape(str(row[found[1]])), pattern)


def number_of(value: Any) -> float:
    """Return what a reward returned as a number.

    Raises:
        NoNumber: It is not a finite number.
    """
    number = math.nan
    if not isinstance(value, (str, bytes)):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise NoNumber(
            f"returned {value!r:.80} of type {type(value).__name__}, and must return a finite number"
        )
    return number


def why(error: BaseException, path: str = "") -> str:
    """Return what a reward did instead of returning a number, and the last line of its file that ran."""
    if isinstance(error, NoNumber):
        return str(error)
    text = f"raised {type(error).__name__}: {error!s:.300}".rstrip(": ")
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f"{text} (line {lines[-1]} of {os.path.basename(path)})" if lines else text


def _loaded(path: str, name: str) -> Call:
    sys.path.insert(0, os.path.dirname(path))
    spec = importlib.util.spec_from_file_location("proxytune_reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    call = getattr(module, name, None)
    if not callable(call):
        known = [n for n, value in vars(module).items() if callable(value) and n[:1] != "_"]
        raise LookupError(f"it has no function {name!r}; it has {', '.join(known) or 'none'}")
    found: Call = call
    return found


def main() -> None:
    """Answer the calls that arrive on standard input, until it ends."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the run, which then ends this process.
    # This file's own folder, whose modules would hide others of the same names.
    del sys.path[0]
    calls, answers = sys.stdin, os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115

    def give(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    what = json.loads(calls.readline())
    path = what.get("file", "")
    call: Call
    try:
        if path:
            call = _loaded(path, what["function"])
        else:
            pattern = what["pattern"]

            def call(prompt: Any, answer: str, row: Mapping[str, Any]) -> Any:
                return re.search(filled(pattern, row), answer.strip()) is not None

    except BaseException as error:
        give({"failed": why(error, path)})
        return
    give({"ready": True})
    # Should the run be killed, nobody else would end a function that hangs.
    alarm = getattr(signal, "alarm", lambda seconds: None)
    for line in calls:
        asked = json.loads(line)
        alarm(math.ceil(what["limit_s"]) + 5)
        try:
            given: dict[str, Any] = {
                "value": number_of(call(asked["prompt"], asked["answer"], asked["row"]))
            }
        except BaseException as error:
            given = {"failed": why(error, path)}
        alarm(0)
        give(given)


if __name__ == "__main__":
    main()
