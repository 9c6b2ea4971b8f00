"""What the commands share: the app they register with, options that several take, and how they speak.

Answers go to stdout, everything else to stderr. A user's mistake ends with its message and exit code 2, a
failure of the work itself with 1; a bug keeps its traceback.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from proxytune.errors import BackendError, UserError


class _Commands(TyperGroup):
    """Turns this package's errors into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except BackendError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


# Plain help, without boxes: its first line is there to be copied.
app = typer.Typer(
    cls=_Commands,
    help="\b\n  proxytune demo\n\nSteer a large language model with a small tuned one, token by token.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


Function = TypeVar("Function", bound=Callable[..., None])


def command(example: str, *, name: str | None = None) -> Callable[[Function], Function]:
    """Register a command whose help is a line to paste and then the function's docstring."""

    def register(function: Function) -> Function:
        text = inspect.cleandoc(function.__doc__ or "")
        help_text = f"\b\n  {example}\n\n{text}"
        app.command(name, help=help_text, short_help=text.split("\n")[0])(function)
        return function

    return register
