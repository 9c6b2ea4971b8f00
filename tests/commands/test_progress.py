"""How commands show how far they are: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from proxytune.commands import progress as module
from proxytune.commands.progress import LINE_EVERY_S, Lines, ProgressBars, sign_of_life

QUICK_S = 0.01
PATIENCE_S = 30.0


def wait_for(is_there: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not is_there():
        assert time.monotonic() < ends, "nothing was written"
        time.sleep(QUICK_S)


def test_two_lines_are_at_most_ten_seconds_apart_on_a_late_machine():
    assert 5 <= LINE_EVERY_S <= 8


def test_a_line_comes_again_and_again_while_work_says_nothing_and_none_after_it():
    written: list[str] = []
    with ProgressBars("tuning", lines=Lines(QUICK_S, written.append)) as bars:
        wait_for(lambda: len(written) >= 3)
        assert written[0] == "tuning, 0:00:00 elapsed"
        bars.show("[scoring]", 1024, 4096, "tokens")
        wait_for(lambda: written[-1].startswith("[scoring]"))
    pattern = r"\[scoring\]: 1,024 of 4,096 tokens, 0:00:\d\d elapsed"
    assert re.fullmatch(pattern, written[-1])
    num_lines = len(written)
    time.sleep(10 * QUICK_S)
    assert len(written) == num_lines


def test_only_the_innermost_work_speaks_and_the_clock_goes_on_when_it_ends():
    """With a clock for each, a series of short jobs inside a long one would be silent."""
    written: list[str] = []
    lines = Lines(QUICK_S, written.append)

    def hears_only(work: str) -> None:
        written.clear()
        wait_for(lambda: len(written) >= 3)
        assert {line.partition(",")[0] for line in written} == {work}

    with lines.about(lambda: "outer"):
        clock = lines._ended
        hears_only("outer")
        with lines.about(lambda: "inner"):
            hears_only("inner")
        assert lines._ended is clock
        hears_only("outer")
    with lines.about(lambda: "inner"):
        hears_only("inner")


def test_work_that_fails_ends_its_lines():
    lines = Lines(QUICK_S, lambda line: None)
    with pytest.raises(ZeroDivisionError), sign_of_life("dividing", lines):
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError), ProgressBars(lines=lines):
        1 / 0  # noqa: B018
    assert lines._running == [] and lines._ended is None


def test_on_a_terminal_there_is_a_bar_and_no_line(monkeypatch):
    written: list[str] = []
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(module, "stderr_is_terminal", lambda: True)
    monkeypatch.setattr(module, "stderr", lambda: console)
    with ProgressBars(lines=Lines(QUICK_S, written.append)) as bars:
        bars.show("scoring", 3, 4, "tokens")
        time.sleep(5 * QUICK_S)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "scoring" in shown and "3 of 4 tokens" in shown and "━" in shown
    assert written == []


def test_a_command_without_a_bar_of_its_own_speaks_too_where_stderr_is_a_file():
    code = """
import sys, time
from proxytune.commands import progress
from proxytune.commands.app import app, command
progress.LINES._every_s = 0.05

@command("proxytune slow")
def slow() -> None:
    "Be slow."
    time.sleep(0.5)

@command("proxytune endless", is_endless=True)
def endless() -> None:
    "Be slower."
    time.sleep(0.5)

sys.argv[1:] = [sys.argv[1]]
app()
"""
    for name, is_heard in (("slow", True), ("endless", False)):
        done = subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, check=True
        )
        assert done.stdout == ""
        assert ("slow, 0:00:00 elapsed\n" in done.stderr) == is_heard
        assert is_heard or done.stderr == ""


def test_only_the_command_line_turns_the_bars_of_libraries_off():
    code = """
import os
import proxytune.cli as cli
names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
assert not any(name in os.environ for name in names)
cli.app = lambda: None
try:
    cli.main()
except SystemExit:
    pass
assert [os.environ[name] for name in names] == ["1", "1"]
from tqdm.auto import tqdm
list(tqdm([1, 2, 3], desc="Converting"))
"""
    given = {k: v for k, v in os.environ.items() if "TQDM" not in k and "HF_HUB" not in k}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
