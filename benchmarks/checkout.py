"""The commit that a measurement belongs to."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """Return the commit that is checked out, marked if tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
