"""stdout and stderr of a command: text stays text on a terminal, and a stream that fails says why.

A terminal obeys control characters: it sets titles, writes to the clipboard, moves the cursor, hides text.
Texts of models, recipes, servers and clients hold whatever their authors like. So every character passes
here on its way out, whoever prints it: a command, a library's warning, a log line, a traceback.

- stdout on a terminal shows control characters as escapes; in a file or a pipe every text is exact.
- stderr shows escapes always: what it holds is read by people, later perhaps with `cat` on a terminal.

Colours and progress bars of rich go past the escaping (`beneath`); `console.py` escapes the text in them.
"""

from __future__ import annotations

import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from proxytune.files import unwritable

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""C0 without tab and newline, DEL, C1, and what Unicode has of the kind: separators that end a line, and
embeddings, overrides and isolates, which show text in another order than it has. Marks of direction
(U+200E, U+200F) and joiners stay: Arabic, Hebrew, Persian and emoji need them, and move no other text."""

HINT = "make room where stdout goes, or send it to another file"


def escaped(text: str) -> str:
    r"""Return a text whose control characters are escapes: `\x1b`, and from U+007F on `\u009b`.

    JSON escapes the former by itself and takes the latter, so a JSON line on a terminal stays JSON.
    """
    return UNSAFE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}"


class ReaderGone(Exception):
    """Whoever read stdout has closed it, as `head` does; there is nobody to answer."""


class _Stream(ABC):
    """A text stream in the place of stdout or stderr."""

    def __init__(self, raw: TextIO, *, escapes: bool) -> None:
        self.raw = raw
        self._escapes = escapes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def write(self, text: str) -> int:
        """Write a text; return its length."""
        self._attempt(lambda: self.raw.write(escaped(text) if self._escapes else text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts as they are, without line ends of its own."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what is buffered."""
        self._attempt(self.raw.flush)

    @abstractmethod
    def _attempt(self, action: Callable[[], object]) -> None:
        """Write to the stream below, and deal with its errors."""

    def _silence(self) -> None:
        """Let the system discard what is still buffered, which Python would try to write at its end."""
        with suppress(OSError, ValueError):
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, self.raw.fileno())
            os.close(descriptor)


class _Answers(_Stream):
    """stdout: an answer that cannot be written ends the command."""

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            self._silence()
            raise ReaderGone from None
        except OSError as error:
            self._silence()
            raise unwritable(Path("stdout"), error, HINT) from error


class _Messages(_Stream):
    """stderr: the work goes on without messages that cannot be written."""

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:
            self._silence()


def guard_streams() -> None:
    """Put guarded streams in the place of stdout and stderr, unless they are there already."""
    if not isinstance(sys.stdout, _Stream):
        stdout = sys.stdout or _nowhere()
        sys.stdout = cast(TextIO, _Answers(stdout, escapes=stdout.isatty()))
    if not isinstance(sys.stderr, _Stream):
        sys.stderr = cast(TextIO, _Messages(sys.stderr or _nowhere(), escapes=True))


def _nowhere() -> TextIO:
    """Return a stream for a process that was started with stdout or stderr closed."""
    return open(os.devnull, "w", encoding="utf-8")  # open as long as the process


def beneath(stream: TextIO) -> TextIO:
    """Return the stream that escape sequences of rich's own go to: the same, but nothing is escaped."""
    kind = type(stream) if isinstance(stream, _Stream) else None
    while True:
        if isinstance(stream, _Stream):
            stream = stream.raw
        elif (inner := getattr(stream, "rich_proxied_file", None)) is not None:
            stream = inner
        else:
            break
    return stream if kind is None else cast(TextIO, kind(stream, escapes=False))


Display = TypeVar("Display")


@contextmanager
def live(display: AbstractContextManager[Display]) -> Iterator[Display]:
    """Show a live display of rich, such as a progress bar, with what is printed meanwhile above it.

    rich puts streams of its own in the place of stdout and stderr, which obey the escape sequences in what
    is printed. They are guarded here too. An answer on its way to a file does not go to the display.
    """
    stdout, stderr = sys.stdout, sys.stderr
    try:
        with display as shown:
            if not stdout.isatty():
                sys.stdout = stdout
            guard_streams()
            yield shown
    finally:
        sys.stdout, sys.stderr = stdout, stderr
