"""What is read and printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from proxytune.commands.streams import beneath, escaped
from proxytune.errors import InputFileError, InvalidRequest
from proxytune.files import writing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from proxytune.measure.score import Interval, ScoreRow
    from proxytune.measure.sweep import Point


EMPTY_ANSWER = (
    "note: the answer is empty: the first token ended it.\n"
    "hint: --min-new-tokens 1 makes it go on, a smaller --alpha steers less, and `proxytune doctor` shows "
    "what each model reads"
)


def stdout() -> Console:
    """Return the console of answers that are laid out: tables, coloured texts."""
    from proxytune.commands.layout import PlainConsole

    # A table in a file has no width to keep to.
    width = None if sys.stdout.isatty() else 120
    return PlainConsole(file=beneath(sys.stdout), width=width)


def stderr() -> Console:
    """Return the console of everything that is not an answer."""
    from proxytune.commands.layout import PlainConsole

    return PlainConsole(file=beneath(sys.stderr))


def styled(text: str, style: str = "") -> Text:
    """Return a text for a console, control characters escaped; rich itself would drop some."""
    from rich.text import Text

    return Text(escaped(text), style=style)


def print_text(text: str = "", *, end: str = "\n") -> None:
    """Print an answer on stdout, where a file or a pipe gets it exactly.

    `typer.echo` would leave out what looks like a terminal's escape sequence.
    """
    sys.stdout.write(text + end)
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def plain_table(*words: str, numbers: Sequence[str], title: str | None = None) -> Table:
    """Return a table without lines: columns of words, then columns of numbers, set right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for heading in words:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


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


def between(interval: Interval | None, form: str) -> str:
    """Return an interval as text."""
    if interval is None:
        return ""
    return f"{form.format(interval.low)} to {form.format(interval.high)}"


def change_text(point: Point | ScoreRow, is_ratio: bool) -> str:
    """Return a change against the base, with its interval."""
    form = "{:+.1%}" if is_ratio else "{:+.3f}"
    interval = between(point.change_interval, form)
    return form.format(point.change) + (f" ({interval})" if interval else "")


def write_text(path: Path, text: str) -> None:
    """Write a file that the command line names.

    Raises:
        OutputFileError: It cannot be written.
    """
    with writing(path):
        path.write_text(text, encoding="utf-8")


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
            "hint: give a text file, which may be packed with gzip as .gz"
        ) from error
    return _decoded(content, str(path))


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{name} is not UTF-8 text (byte {error.start + 1}).\nhint: convert it to UTF-8"
        ) from error
