"""`scripts/run_notebook.py` puts into a notebook what its cells show, as Jupyter would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_notebook.py"


def ran(path: Path, *cells: str) -> tuple[subprocess.CompletedProcess[str], list[Any]]:
    pytest.importorskip("nbclient", reason="the notebook runner is not installed")
    cell = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    notebook = {
        "cells": [
            {**cell, "id": f"cell-{number}", "source": [source]}
            for number, source in enumerate(cells)
        ],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.write_text(json.dumps(notebook), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=False
    )
    return done, json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_prints_and_last_values_are_kept_and_names_go_on_to_the_next_cell(tmp_path: Path):
    html = "class H:\n    def _repr_html_(self): return '<b>x</b>'\nH()"
    done, cells = ran(tmp_path / "n.ipynb", "x = 2\nprint(x)", "x + 1", "x + 1;", html)
    assert done.returncode == 0, done.stderr
    assert [cell["execution_count"] for cell in cells] == [1, 2, 3, 4]
    assert cells[0]["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["2\n"]}]
    assert cells[1]["outputs"][0]["data"] == {"text/plain": ["3"]}
    assert cells[2]["outputs"] == []
    assert cells[3]["outputs"][0]["data"]["text/html"] == ["<b>x</b>"]


def test_what_a_cell_draws_is_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    _, cells = ran(tmp_path / "n.ipynb", "from matplotlib import pyplot\npyplot.plot([1, 2])")
    (output,) = cells[0]["outputs"]
    assert output["data"]["image/png"].startswith("iVBOR")


def test_stderr_is_passed_on_and_a_long_plain_text_beside_html_is_shortened(tmp_path: Path):
    html = "class H:\n def _repr_html_(self): return 'x'\n def __repr__(self): return 'H(' + 'y' * 500\nH()"
    done, cells = ran(tmp_path / "n.ipynb", "import sys; print('careful', file=sys.stderr)", html)
    assert "careful" in done.stderr and cells[0]["outputs"] == []
    assert cells[1]["outputs"][0]["data"] == {"text/html": ["x"], "text/plain": ["<shown as HTML>"]}


def test_a_cell_that_fails_ends_the_run_and_leaves_the_notebook(tmp_path: Path):
    done, cells = ran(tmp_path / "n.ipynb", "print(1)", "1 / 0")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert cells[0]["outputs"] == []
