"""How far work is, on stderr: bars on a terminal, a line at least every ten seconds elsewhere.

    with progress("scoring", "tokens") as advance:
        advance(256, 1024)

rich is imported where bars begin, not by every command that could show some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxytune.commands.bars import Bars


@contextmanager
def progress(doing: str, units: str) -> Iterator[Callable[[int, int], None]]:
    """Show how much of something is done while it runs; give it how much that is, of how much in all."""
    with bars(
        "{task.percentage:.0f}%", f"{{task.completed:,.0f}} of {{task.total:,.0f}} {units}"
    ) as shown:
        task = shown.add_task(doing, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def status(doing: str) -> Iterator[Callable[[str], None]]:
    """Show that something runs whose end cannot be foreseen; give it what to say instead."""
    with bars(transient=True) as shown:
        task = shown.add_task(doing, total=None)
        yield lambda text: shown.update(task, description=text)


def bars(*figures: str, doing: str = "working", **settings: Any) -> Bars:
    """Return bars on stderr, one for each task: a rich `Progress`.

    Args:
        figures: What is said of a task besides its description and times, in rich's format.
        doing: What runs while there is no task.
        settings: Further ones of rich.
    """
    from proxytune.commands.bars import Bars

    return Bars(*figures, doing=doing, **settings)
