"""What is read and printed."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from proxytune.errors import InputFileError, InvalidRequest, OutputFileError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table


def stdout() -> Console:
    """Return the console of answers."""
    from rich.console import Console

    # A table in a file has no width to keep to.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def stderr() -> Console:
    """Return the console of everything that is not an answer."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print a line on stderr."""
    typer.echo(text, err=True)


def plain_table(*words: str, numbers: Sequence[str], title: str | None = None) -> Table:
    """Return a table without lines: columns of words, then columns of numbers, set right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for heading in words:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


SILENCE_S = 10.0
"""Where stderr is no terminal: seconds of work from one line to the next."""


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """Show a sign of life on stderr while something runs that does not report how far it has come."""
    console = stderr()
    if console.is_terminal:
        with console.status(doing):
            yield
        return
    started, ended = time.monotonic(), threading.Event()

    def speak() -> None:
        while not ended.wait(SILENCE_S):
            say(f"{doing}: {time.monotonic() - started:.0f} s")

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


class ProgressBars:
    """How far the stages of some work have come: bars on a terminal, now and then a line elsewhere.

    Args:
        shows_ends: Without a terminal, print a line at the end of every stage too.
    """

    def __init__(self, *, shows_ends: bool = False) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = stderr()
        self._shows_ends = shows_ends
        self._stages: dict[str, TaskID] = {}
        self._spoke_at = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=600,  # A block of long texts may take minutes, and ends all at once.
        )

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
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
        if stage not in self._stages:
            self._stages[stage] = self._bars.add_task(stage, total=total, count="")
        self._bars.update(self._stages[stage], completed=done, total=total, count=count)
        now = time.monotonic()
        is_due = now - self._spoke_at >= SILENCE_S or (self._shows_ends and done >= total)
        if is_due and not self._console.is_terminal:
            self._spoke_at = now
            say(f"{stage}: {count}")


@contextmanager
def progress(doing: str, units: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far one stage has come; give it how much is done, of how much in all."""
    with ProgressBars() as bars:
        yield lambda done, total: bars.show(doing, done, total, units)


def json_line(content: Mapping[str, Any]) -> str:
    """Return one JSON object on one line."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def rate_text(num_tokens: int, seconds: float) -> str:
    """Return how many tokens took how long, in words."""
    rate = f" ({num_tokens / seconds:,.1f} tokens/s)" if seconds > 0 else ""
    return f"{num_tokens:,} tokens in {seconds:,.1f} s{rate}"


def strengths_text(alphas: Mapping[str, float]) -> str:
    """Return which experts steer how strongly, in words."""
    if not any(alphas.values()):
        return "the base alone (alpha 0)"
    return "steered by " + ", ".join(f"{name} at alpha {alpha:g}" for name, alpha in alphas.items())


def write_text(path: Path, text: str) -> None:
    """Write a file that the command line names.

    Raises:
        OutputFileError: It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> OutputFileError:
    """Return the error for a file that cannot be written."""
    return OutputFileError(
        f"{path} cannot be written: {error.strerror}.\n"
        "hint: give a file in an existing directory that you can write to"
    )


def argument_text(text: str) -> str:
    """Return a prompt given as an argument.

    Raises:
        InvalidRequest: It is not UTF-8 text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the prompt is not UTF-8 text (character {error.start + 1}).\nhint: give it in UTF-8"
        ) from error
    return text


def stdin_text() -> str:
    """Return what stdin holds, without the line's end.

    Raises:
        InputFileError: It is not UTF-8 text.
    """
    content = typer.get_binary_stream("stdin").read()
    return _decoded(content, "stdin").removesuffix("\n").removesuffix("\r")


def file_text(path: Path) -> str:
    """Return the text of a file; one named .gz is unpacked.

    Raises:
        InputFileError: It cannot be read, or is not UTF-8 text.
    """
    import gzip
    import zlib

    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputFileError(
            f"{path} cannot be read: {why}.\n"
            "hint: --text-file takes a text file, which may be packed with gzip as .gz"
        ) from error
    return _decoded(content, str(path))


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{name} is not UTF-8 text (byte {error.start + 1}).\nhint: convert it to UTF-8"
        ) from error
