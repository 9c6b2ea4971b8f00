"""The command line in a process of its own, with streams of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def _started(code: str, arguments: Sequence[str | Path], **streams: Any) -> subprocess.Popen[bytes]:
    """Start the command line after some code, from this checkout."""
    own = {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
        "COLUMNS": "160",
        "PYTHONUNBUFFERED": "",
    }
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}\nfrom proxytune.cli import main\nmain()", *map(str, arguments)],
        env={**os.environ, **own},
        **streams,
    )  # fmt: skip


def in_pipes(code: str, *arguments: str | Path, **streams: Any) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr; streams that are given are not read."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with _started(code, arguments, **{**pipes, **streams}) as process:
        stdout, stderr = process.communicate(timeout=120)
    return process.returncode, (stdout or b"").decode(), (stderr or b"").decode()


def on_terminal(code: str, *arguments: str | Path, keys: str = "") -> tuple[int, str]:
    """Return the exit code, and all that a terminal was sent; its own line ends are taken back."""
    import pty

    ours, theirs = pty.openpty()
    with _started(code, arguments, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, keys.encode())
        sent = b""
        try:
            while piece := os.read(ours, 65536):
                sent += piece
        except OSError:  # Linux's end of a terminal
            pass
        os.close(ours)
        process.wait(timeout=120)
    return process.returncode, sent.decode().replace("\r\n", "\n")
