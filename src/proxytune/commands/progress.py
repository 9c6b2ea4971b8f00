"""How far work has come, on stderr: bars on a terminal, elsewhere a line at least every ten seconds.

A command and the work inside it share one clock, and only the innermost running work reports. With a clock
for each, a series of short jobs would never print anything. rich is imported when a bar is shown.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from proxytune.commands.console import say, stderr

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 8.0
"""Seconds between two lines: users are promised ten, and a loaded machine may be late by one or two."""


class Lines:
    """Writes a line about the innermost running work, at regular intervals while anything is running.

    Args:
        every_s: Time between two lines, in seconds.
        write: Called with each line. Default: print it to stderr.
    """

    def __init__(self, every_s: float = LINE_EVERY_S, write: Callable[[str], None] = say) -> None:
        self._every_s = every_s
        self._write = write
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


LINES = Lines()
"""What commands report to; tests make their own."""


@contextmanager
def sign_of_life(doing: str, lines: Lines = LINES) -> Iterator[None]:
    """Report that something is still running, unless stderr is a terminal or inner work reports more."""
    if stderr_is_terminal():
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


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """Show a sign of life while something runs that does not report how far it has come."""
    if stderr_is_terminal():
        with stderr().status(doing):
            yield
    else:
        with sign_of_life(doing):
            yield


class ProgressBars:
    """How far the stages of some work have come. Use it as a context manager.

    Args:
        doing: What to report before the first stage.
        shows_ends: Without a terminal, print a line at the end of every stage too.
        lines: What to report to without a terminal.
    """

    def __init__(
        self, doing: str = "working", *, shows_ends: bool = False, lines: Lines = LINES
    ) -> None:
        self._shows_ends = shows_ends
        self._lines = lines
        self._bars = _bars() if stderr_is_terminal() else None
        self._stages: dict[str, TaskID] = {}
        self._latest = doing
        self._started = time.monotonic()

    def __enter__(self) -> ProgressBars:
        if self._bars is None:
            self._lines.begin(self._line)
        else:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is None:
            self._lines.end(self._line)
        else:
            self._bars.stop()

    def show(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Show how much of a stage is done.

        Args:
            stage: What is being done; each has a bar of its own.
            done: How much of it.
            total: Of how much in all.
            note: What follows these two numbers: their unit, a rate, losses.
        """
        count = f"{done:,.0f} of {total:,.0f} {note}".rstrip()
        self._latest = f"{stage}: {count}"
        if self._bars is not None:
            if stage not in self._stages:
                self._stages[stage] = self._bars.add_task(stage, total=total, count="")
            self._bars.update(self._stages[stage], completed=done, total=total, count=count)
        elif self._shows_ends and done >= total:
            say(self._latest)

    def _line(self) -> str:
        return f"{self._latest}, {duration(time.monotonic() - self._started)} elapsed"


def _bars() -> Progress:
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]},", markup=False),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=stderr(),
        speed_estimate_period=600,  # A block of long texts may take minutes, and ends all at once.
    )


@contextmanager
def progress(doing: str, units: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far one stage has come; give it how much is done, of how much in all."""
    with ProgressBars(doing) as bars:
        yield lambda done, total: bars.show(doing, done, total, units)


def stderr_is_terminal() -> bool:
    """Return whether stderr is a terminal, where bars can be drawn."""
    return sys.stderr.isatty()


def duration(seconds: float) -> str:
    """Return a time as `H:MM:SS`."""
    return str(timedelta(seconds=int(seconds)))
