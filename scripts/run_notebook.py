"""Run a notebook's cells, in order, and put what they show into it.

    python scripts/run_notebook.py examples/explain.ipynb             run it and write its outputs
    python scripts/run_notebook.py examples/explain.ipynb --check     run it and write nothing

Cells run in a Jupyter kernel of this Python. The first error ends the run and leaves the notebook as it was.
What cells write to stderr goes to stderr, not into the notebook.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

MAX_PLAIN = 400
"""Characters of plain text that an output with HTML may have: a trace's would be longer than all the rest."""


def kept(outputs: list[Any]) -> list[Any]:
    """Return a cell's outputs as they are kept, and pass on what it wrote to stderr."""
    is_drawn = any("image/png" in output.get("data", {}) for output in outputs)
    found = []
    for output in outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr":
            sys.stderr.write(output.text)
            continue
        if is_drawn and set(data) == {"text/plain"}:
            continue  # What a cell drew says more than the name of what it drew on.
        if "text/html" in data and len(data.get("text/plain", "")) > MAX_PLAIN:
            data["text/plain"] = "<shown as HTML>"
        found.append(output)
    return found


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Run a notebook and keep what it shows.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    notebook = nbformat.read(arguments.notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # Sockets in a folder of our own: no other user of this machine can listen.
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        # Timing would make every run another notebook.
        NotebookClient(notebook, km=kernel, timeout=None, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    if not arguments.check:
        nbformat.write(notebook, arguments.notebook)
    return 0


if __name__ == "__main__":
    sys.exit(main())
