"""Run a notebook's code cells, in order, and put what they show into it.

    python scripts/run_notebook.py examples/explain.ipynb             run it and write its outputs
    python scripts/run_notebook.py examples/explain.ipynb --check     run it and write nothing

Cells run in one namespace in this process, without a Jupyter server: what a cell prints, the value of its
last expression and the pictures that it drew are its output, as in Jupyter. The first error ends the run.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def shown(value: Any) -> dict[str, Any]:
    """Return a value as a notebook keeps it, by MIME type."""
    data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)[:40]}
    as_html = getattr(value, "_repr_html_", None)
    html = as_html() if as_html is not None else None
    if html is not None:
        data["text/html"] = html.splitlines(keepends=True)
        if len("".join(data["text/plain"])) > 400:
            # Notebooks need some plain text; that of a trace would be longer than all the rest.
            data["text/plain"] = [f"<{type(value).__name__}>"]
    return data


def pictures() -> list[dict[str, Any]]:
    """Return what is drawn, as outputs, and forget it."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    outputs = []
    for number in pyplot.get_fignums():
        content = io.BytesIO()
        pyplot.figure(number).savefig(content, format="png", dpi=80)
        png = base64.b64encode(content.getvalue()).decode()
        data = {"image/png": png, "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    pyplot.close("all")
    return outputs


def run_cell(source: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Run a cell and return its outputs."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    name = f"<cell {number}>"
    stdout = io.StringIO()
    value = None
    with contextlib.redirect_stdout(stdout):
        exec(compile(tree, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if stdout.getvalue():
        lines = stdout.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    drawn = pictures()
    if value is not None and not drawn and not source.rstrip().endswith(";"):
        outputs.append(
            {
                "output_type": "execute_result",
                "execution_count": number,
                "data": shown(value),
                "metadata": {},
            }
        )
    return outputs + drawn


def run(notebook: dict[str, Any]) -> None:
    """Run all code cells and replace their outputs."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            cell["outputs"] = run_cell("".join(cell["source"]), namespace, number)
            cell["execution_count"] = number


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Run a notebook and keep what it shows.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
    notebook = json.loads(arguments.notebook.read_text(encoding="utf-8"))
    run(notebook)
    if not arguments.check:
        text = json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"
        arguments.notebook.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
