"""Lines of progress on stderr: at least one every ten seconds where there is no terminal.

A command and the work inside it share one clock, and only the innermost running work reports. With a clock
for each, a series of short jobs would never print anything. Bars are in `bars.py`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

LINE_EVERY_S = 8.0
"""Seconds between two lines: users are promised ten, and a loaded machine may be late by one or two."""


class Lines:
    """Writes a line about the innermost running work, at regular intervals while anything is running.

    Args:
        every_s: Time between two lines, in seconds.
        write: Called with each line. Default: print it to stderr.
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
        """Report on this work from now on; work that is already running is silent until it ends.

        Args:
            line: Returns the current line.
        """
        with self._lock:
            self._running.append(line)
            if self._thread is None:
                self._ended = threading.Event()
                self._thread = threading.Thread(
                    target=self._speak, args=(self._ended,), daemon=True
                )
                self._thread.start()

    def end(self, line: Callable[[], str]) -> None:
        """Stop reporting on this work."""
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
"""What commands report to; tests make their own."""


def duration(seconds: float) -> str:
    """Return a time as `H:MM:SS`."""
    return str(timedelta(seconds=int(seconds)))


@contextmanager
def sign_of_life(doing: str, lines: Lines = LINES) -> Iterator[None]:
    """Report that something is still running, unless stderr is a terminal or inner work reports more."""
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
