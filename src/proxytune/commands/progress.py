"""How far work has come, on stderr: bars on a terminal, elsewhere a line at least every ten seconds.

A command and the work inside it share one clock, and only the innermost running work reports. With a clock
for each, a series of short jobs would never print anything. rich is imported when a bar is shown.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from proxytune.commands.console import say, stderr, styled
from proxytune.commands.streams import escaped, live

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 8.0
"""Seconds between two lines: users are promised ten, and a loaded machine may be late by one or two."""


class Lines:
    """Writes a line about the innermost running work, every `every_s` seconds while anything is running."""

    def __init__(self, every_s: float = LINE_EVERY_S, write: Callable[[str], None] = say) -> None:
        self._every_s = every_s
        self._write = write
        self._running: list[tuple[Callable[[], str], float]] = []
        self._lock = threading.Lock()
        self._ended: threading.Event | None = None

    @contextmanager
    def about(self, latest: Callable[[], str]) -> Iterator[None]:
        """Report how far this work is, and the time since its start; outer work is silent meanwhile."""
        work = latest, time.monotonic()
        with self._lock:
            self._running.append(work)
            if self._ended is None:
                self._ended = threading.Event()
                threading.Thread(target=self._speak, args=(self._ended,), daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(work)
                if not self._running:
                    self._ended.set()
                    self._ended = None

    def _speak(self, ended: threading.Event) -> None:
        while not ended.wait(self._every_s):
            with self._lock:
                if not ended.is_set():
                    latest, started = self._running[-1]
                    elapsed = timedelta(seconds=int(time.monotonic() - started))
                    self._write(f"{latest()}, {elapsed} elapsed")


LINES = Lines()
"""What commands report to; tests make their own."""


def sign_of_life(doing: str, lines: Lines = LINES) -> AbstractContextManager[None]:
    """Report that something is still running, unless stderr is a terminal or inner work reports more."""
    return nullcontext() if stderr_is_terminal() else lines.about(lambda: doing)


def waiting(doing: str) -> AbstractContextManager[object]:
    """Show a sign of life while something runs that does not report how far it has come."""
    if stderr_is_terminal():
        return live(stderr().status(styled(doing)))
    return sign_of_life(doing)


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
        self._latest = doing
        self._bars = _bars() if stderr_is_terminal() else None
        self._stages: dict[str, TaskID] = {}
        self._shown: AbstractContextManager[object] = (
            lines.about(lambda: self._latest) if self._bars is None else live(self._bars)
        )

    def __enter__(self) -> ProgressBars:
        self._shown.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._shown.__exit__(*error)

    def show(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Show how much of a stage is done.

        Args:
            stage: What is being done; each has a bar of its own.
            done: How much of it.
            total: Of how much in all.
            note: What follows these two numbers: their unit, a rate, losses.
        """
        stage, note = escaped(stage), escaped(note)  # The columns of a bar are no strings to rich.
        count = f"{done:,.0f} of {total:,.0f} {note}".rstrip()
        self._latest = f"{stage}: {count}"
        if self._bars is not None:
            if stage not in self._stages:
                self._stages[stage] = self._bars.add_task(stage, total=total, count="")
            self._bars.update(self._stages[stage], completed=done, total=total, count=count)
        elif self._shows_ends and done >= total:
            say(self._latest)


def _bars() -> Progress:
    from rich import progress as rich

    return rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.TextColumn("{task.fields[count]},", markup=False),
        rich.TimeElapsedColumn(),
        rich.TextColumn("elapsed,"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("left"),
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
