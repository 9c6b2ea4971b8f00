"""Lines of progress on stderr: at least one every ten seconds where there is no terminal.

They are those of the innermost work that runs, on one clock: work that follows other work does not begin to
count anew. Bars are in `bars.py`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

LINE_EVERY_S = 8.0
"""Time between two lines: a loaded machine may be late by a second or two, and ten are promised."""


class Lines:
    """Writes what the innermost running work says of itself, again and again while anything runs.

    Args:
        every_s: Time between two lines, in seconds.
        write: Takes a line.
    """

    def __init__(
        self, every_s: float = LINE_EVERY_S, write: Callable[[str], None] | None = None
    ) -> None:
        self._every_s = every_s
        self._write = write or _to_stderr
        self._running: list[Callable[[], str]] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, line: Callable[[], str]) -> None:
        """Let work say its lines from now on; what began before it is silent until it ends."""
        with self._lock:
            self._running.append(line)
            if self._thread is None:
                self._ended = threading.Event()
                self._thread = threading.Thread(
                    target=self._speak, args=(self._ended,), daemon=True
                )
                self._thread.start()

    def end(self, line: Callable[[], str]) -> None:
        """Let work say no more."""
        with self._lock:
            self._running.remove(line)
            if self._running or self._thread is None:
                return
            self._ended.set()
            self._thread = None

    def _speak(self, ended: threading.Event) -> None:
        while not ended.wait(self._every_s):
            with self._lock:
                if not ended.is_set():
                    self._write(self._running[-1]())


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


LINES = Lines()
"""The lines of this process."""


def duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds."""
    return str(timedelta(seconds=int(seconds)))


@contextmanager
def sign_of_life(doing: str, lines: Lines = LINES) -> Iterator[None]:
    """Report every few seconds that something still runs, unless stderr is a terminal or more is reported."""
    if sys.stderr.isatty():
        yield
        return
    started = time.monotonic()

    def line() -> str:
        return f"{doing}, {duration(time.monotonic() - started)} elapsed"

    lines.begin(line)
    try:
        yield
    finally:
        lines.end(line)
