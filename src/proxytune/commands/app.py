"""The app: how commands register, how their help is laid out, and how errors end them.

Answers go to stdout, everything else to stderr. A user's mistake ends with its message and exit code 2, a
failure of the work itself with 1; a bug keeps its traceback. A reader that has enough, such as `head`, ends a
command without a message.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from proxytune.commands.console import json_line, print_text, say
from proxytune.commands.flags import flattened
from proxytune.commands.progress import sign_of_life
from proxytune.commands.streams import ReaderGone
from proxytune.errors import BackendError, UserError

READER_GONE = 141
"""Exit code when the reader of stdout is gone: what a shell reports for a program that SIGPIPE ended."""


class _Commands(TyperGroup):
    """Turns this package's errors into messages and exit codes."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line; its own output, such as help, can fail as well."""
        try:
            return super().main(*args, **options)
        except (UserError, BackendError) as error:
            say(f"error: {error}")
            sys.exit(2 if isinstance(error, UserError) else 1)
        except ReaderGone:
            sys.exit(READER_GONE)


class _Command(TyperCommand):
    """Shows options under headings, in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                heading = getattr(parameter, "rich_help_panel", None) or usual
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class _EndingCommand(_Command):
    """Says that it is running, where stderr is no terminal."""

    def invoke(self, ctx: Any) -> Any:
        with sign_of_life(str(self.name)):
            return super().invoke(ctx)


_HELP = """\b
  proxytune demo

Steer a large language model with a small tuned one, token by token.

The large model is the base, and its weights are not touched. The expert is a small model after tuning, and
the anti-expert is the same small model before. What tuning changed is added to the base at every token.

A recipe is a directory that names the three. One comes with proxytune, package:proxytune/smol. To talk to it:
proxytune chat package:proxytune/smol
"""
# Plain help, without boxes: its first line is there to be copied.
app = typer.Typer(
    cls=_Commands,
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


Function = TypeVar("Function", bound=Callable[..., None])


def command(
    example: str, *, name: str | None = None, is_endless: bool = False
) -> Callable[[Function], Function]:
    """Register a command whose help is a line to paste and then the function's docstring.

    Args:
        example: The line to paste.
        name: What the command is called. Default: the function's name.
        is_endless: Whether it runs until somebody ends it, so that there is no progress to report.
    """

    def register(function: Function) -> Function:
        text = inspect.cleandoc(function.__doc__ or "")
        whole = f"\b\n  {example}\n\n{text}"
        kind = _Command if is_endless else _EndingCommand
        first_line = text.split("\n")[0]
        app.command(name, cls=kind, help=whole, short_help=first_line)(flattened(function))
        return function

    return register


def print_result(result: Any, show: Callable[[Any], None], *, as_json: bool) -> None:
    """Print what a command found on stdout: as one JSON object, or as `show` does."""
    if as_json:
        print_text(json_line(result.to_dict()))
    else:
        show(result)
