"""Every example runs, as a new user would run it: offline, from another directory, on the smol family.

The notebook's cells are run in their order, and what the committed ones said is compared with what they say.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))

SAYS = {
    "quickstart": ("--- alpha 0\n", "--- alpha 2\n", "tinyshakespeare.expert"),
    "many_experts": (
        "--- the base alone\n",
        "--- legal 0.9\n",
        "0.45, legal 0.45",
        "10 texts, 218 tokens",
    ),
    "openai_client": ("models: steered, steered:tinyshakespeare", "--- alpha 1.5\n", "--- a chat"),
    "black_box": ("--- the base behind an API\n", " of 24 tokens are proved"),
    "own_backend": ("--- alpha 0\n", "--- alpha 2\n"),
    "tune_expert": ("the best strength is", "Germany, alpha 0:", "England, alpha 1:"),
}
"""What each example prints, among other things."""


def test_every_example_is_run():
    assert sorted(SAYS) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_the_readme_of_the_examples_lists_them():
    listed = re.findall(
        r"^\| \[`([\w.]+)`\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(
        path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")
    )


def check_what_it_left(name: str, said: str, place: Path) -> None:
    for part in SAYS[name]:
        assert part in said
    assert not list(place.iterdir())


@pytest.mark.slow
def test_the_quickstart_runs_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_what_it_left("quickstart", done.stdout, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SAYS if name != "quickstart"])
def test_an_example_runs_and_leaves_nothing_behind(name, tmp_path, monkeypatch, capsys):
    """In this process, which has imported the libraries already: that is half of a small example's time."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    check_what_it_left(name, said, tmp_path)
    if name == "black_box":
        _, behind_api, in_process = re.split(r"^--- .*$", said, flags=re.MULTILINE)
        assert behind_api.strip() == in_process.rpartition("\n\n")[0].strip()


def words_and_numbers(text: str) -> tuple[list[str], list[float]]:
    number = r"[-+]?\d+\.?\d*"
    return re.sub(number, "#", text).split(), [float(n) for n in re.findall(number, text)]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_it_said_when_it_was_committed(path, monkeypatch):
    """Numbers may differ in their last digit: other processors round differently.

    Sampled text, in cells with the tag `varies`, is only run.
    """
    pytest.importorskip("matplotlib", reason="the notebooks draw; the extra is proxytune[tune]")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    variables: dict[str, Any] = {}
    num_compared = 0
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), variables)
        committed = "".join(
            "".join(output["text"])
            for output in cell["outputs"]
            if output["output_type"] == "stream"
        )
        if "varies" in cell["metadata"].get("tags", ()) or not committed + said.getvalue():
            continue
        words, numbers = words_and_numbers(said.getvalue())
        committed_words, committed_numbers = words_and_numbers(committed)
        assert words == committed_words
        assert numbers == pytest.approx(committed_numbers, rel=0.02, abs=0.02)
        num_compared += 1
    assert num_compared


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_was_run_without_error(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert path.stat().st_size < 400_000
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "error" not in kinds
