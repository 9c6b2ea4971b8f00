"""The Python of an environment with other tools' clients, which are not among this project's dependencies.

`make test-fit` installs them and names that Python in CLIENTS_PYTHON, and one with LlamaIndex, which needs an
older client of OpenAI's than the others, in LLAMA_INDEX_PYTHON. Without these their tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


def clients_python(variable: str = "CLIENTS_PYTHON") -> str:
    """Return the path of that Python, or skip the test that asks."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python with other tools' clients: make test-fit")
    return str(Path(python).absolute())


def run_client(code: str, *arguments: str) -> str:
    """Return what a program prints in that Python, away from this project's code."""
    done = subprocess.run(
        [clients_python(), "-I", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
