"""Progress bars of rich that become lines of text where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from proxytune.commands.lines import LINES, Lines, duration


class Bars(Progress):
    """A rich `Progress` with a bar, figures and times for each task.

    Args:
        figures: Texts in rich's format, left out while a task's total is unknown.
        doing: What to report while no task is running.
        console: Where it is shown. Default: stderr.
        lines: What to report to if the console is not a terminal.
        settings: Further arguments of rich's `Progress`.
    """

    def __init__(
        self,
        *figures: str,
        doing: str = "working",
        console: Console | None = None,
        lines: Lines = LINES,
        **settings: Any,
    ) -> None:
        console = console or Console(stderr=True, highlight=False)
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *(_Figure(figure, markup=False) for figure in figures),
            _Elapsed(),
            _Left(),
            console=console,
            disable=not console.is_terminal,
            **settings,
        )
        self._lines = lines
        self._doing = doing
        self._started = time.monotonic()

    def start(self) -> None:
        """Start showing the bars."""
        if self.disable:
            self._lines.begin(self.line)
        else:
            super().start()

    def stop(self) -> None:
        """Stop showing the bars."""
        if self.disable:
            self._lines.end(self.line)
        else:
            super().stop()

    def line(self) -> str:
        """Return the latest unfinished task as text; without one, how long the whole has been running."""
        tasks = [task for task in self.tasks if not task.finished]
        if not tasks:
            return f"{self._doing}, {duration(time.monotonic() - self._started)} elapsed"
        texts = [
            str(column(tasks[-1]))
            for column in self.columns
            if isinstance(column, ProgressColumn) and not isinstance(column, BarColumn)
        ]
        return ", ".join(text for text in texts if text)


class _Figure(TextColumn):
    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _Elapsed(ProgressColumn):
    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text("" if seconds is None else f"{duration(seconds)} elapsed")


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        seconds = task.time_remaining
        known = task.total is not None and seconds is not None and not task.finished
        return Text(f"{duration(seconds)} left" if known and seconds is not None else "")
