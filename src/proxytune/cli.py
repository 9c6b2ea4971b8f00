"""The `proxytune` command: gathers the commands and runs them.

What each command takes and prints is in `commands/`, what it does elsewhere; models and the libraries that
run them are imported only by the commands that need them. Ctrl-C ends with exit code 130.
"""

from __future__ import annotations

import io
import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

# Their order here is that of the help.
# isort: off
from proxytune.commands import (  # noqa: F401
    new,
    doctor,
    make_proxy,
    export_gguf,
    generate,
    chat,
    serve,
    tune,
    fit,
    bake,
    score,
    evaluate,
    grade,
    sweep,
    rank,
    explain,
    analyze,
    bench,
    demo,
)

# isort: on
from proxytune.commands.app import app
from proxytune.commands.streams import guard_streams


def main() -> NoReturn:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A model writes any character, whatever the terminal's locale has.
            stream.reconfigure(encoding="utf-8", errors="replace")
    guard_streams()
    # Colours in a traceback would be shown as the escape sequences they are.
    os.environ.setdefault("PYTHON_COLORS", "0")
    # Libraries' own progress bars say nothing about the command's work and clutter a log file.
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"proxytune {version('proxytune')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit"
        ),
    ] = False,
) -> None:
    pass
