"""How far work is, on stderr: bars on a terminal, a line at least every ten seconds elsewhere.

    with progress("scoring", "tokens") as advance:
        advance(256, 1024)

rich is imported when a bar is shown, since `proxytune --help` needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxytune.commands.bars import Bars


@contextmanager
def progress(doing: str, units: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is; call what is yielded with the amount done and the total."""
    with bars(
        "{task.percentage:.0f}%", f"{{task.completed:,.0f}} of {{task.total:,.0f}} {units}"
    ) as shown:
        task = shown.add_task(doing, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def status(doing: str) -> Iterator[Callable[[str], None]]:
    """Show that something of unknown length is running; call what is yielded to change the text."""
    with bars(transient=True) as shown:
        task = shown.add_task(doing, total=None)
        yield lambda text: shown.update(task, description=text)


def bars(*figures: str, doing: str = "working", **settings: Any) -> Bars:
    """Return a rich `Progress` on stderr, with a bar for each task.

    Args:
        figures: Texts in rich's format, shown between the bar and the times.
        doing: What to report while no task is running.
        settings: Further arguments of rich's `Progress`.
    """
    from proxytune.commands.bars import Bars

    return Bars(*figures, doing=doing, **settings)
