"""rich's console, for texts of anybody: nothing in them is markup, an emoji's name, or a control character.

What is laid out is made for the eye, so control characters are escaped in a file too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from proxytune.commands.streams import ReaderGone, escaped


class PlainConsole(Console):
    """A console that takes text literally."""

    def __init__(self, *, file: IO[str], width: int | None = None) -> None:
        super().__init__(file=file, width=width, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape a string before it is measured: rich drops some control characters."""
        return super().render_str(escaped(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Escape what no string was; control segments are rich's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escaped(segment.text), segment.style)

    def on_broken_pipe(self) -> NoReturn:
        """End as every command does whose reader is gone."""
        raise ReaderGone
