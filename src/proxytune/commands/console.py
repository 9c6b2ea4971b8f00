"""What is read and printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from proxytune.errors import InputFileError, InvalidRequest

if TYPE_CHECKING:
    from rich.console import Console


def stdout() -> Console:
    """Return the console of answers."""
    from rich.console import Console

    # A table in a file has no width to keep to.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def stderr() -> Console:
    """Return the console of everything that is not an answer."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def progress(doing: str, units: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while something runs; give it how much is done, of how much in all."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = stderr()
    with Progress(
        TextColumn(doing),
        BarColumn(),
        TextColumn(
            f"{{task.percentage:>3.0f}}%, {{task.completed:,.0f}} of {{task.total:,.0f}} {units},"
        ),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(doing, total=1, start=False)

        def advance(done: int, total: int) -> None:
            bar.start_task(task)
            bar.update(task, completed=done, total=total)

        yield advance


def json_line(content: Mapping[str, Any]) -> str:
    """Return one JSON object on one line."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def rate_text(num_tokens: int, seconds: float) -> str:
    """Say how many tokens took how long."""
    rate = f" ({num_tokens / seconds:,.1f} tokens/s)" if seconds > 0 else ""
    return f"{num_tokens:,} tokens in {seconds:,.1f} s{rate}"


def strengths_text(alphas: Mapping[str, float]) -> str:
    """Say which experts steer how strongly."""
    if not any(alphas.values()):
        return "the base alone (alpha 0)"
    return "steered by " + ", ".join(f"{name} at alpha {alpha:g}" for name, alpha in alphas.items())


def argument_text(text: str) -> str:
    """Return a prompt given as an argument.

    Raises:
        InvalidRequest: It is no UTF-8 text.
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
        InputFileError: It is no UTF-8 text.
    """
    content = typer.get_binary_stream("stdin").read()
    return _decoded(content, "stdin").removesuffix("\n").removesuffix("\r")


def file_text(path: Path) -> str:
    """Return the text of a file, unpacked if it is called .gz.

    Raises:
        InputFileError: It cannot be read, or is no UTF-8 text.
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
            "hint: --text-file takes a text file, also packed with gzip as .gz"
        ) from error
    return _decoded(content, str(path))


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{name} is not UTF-8 text (byte {error.start + 1}).\nhint: convert it to UTF-8"
        ) from error
