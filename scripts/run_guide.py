"""Run a page's commands as they stand, in order, in an empty directory, and say how long each step takes.

    python scripts/run_guide.py docs/first-steps.md              with the proxytune of this Python
    python scripts/run_guide.py docs/first-steps.md --install    with one that the page itself installs

Every block of bash and Python is run, in one shell. A comment in the line above a block changes that:
`<!-- installs -->` has it run with `--install` alone, and `<!-- not run: WHY -->` never. What a person at
the terminal does is done for them: `proxytune chat` is asked a question, and `proxytune serve` goes on in the
background until the page ends. The directory is beside the checkout, which is called `proxytune` there.
With `--install`, ADDRESS in the page's commands is the address of this checkout's repository, and caches of
packages and models are empty.

The table of times goes to stdout, what the commands print to `--log`.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from check_docs import ROOT, split

QUESTION = "Who wrote Hamlet?"
PORT = 8000
"""The port in the pages' commands; a free one takes its place."""
SHELL = """\
set -eo pipefail
proxytune() {
  case "$1" in
    chat) printf '%s\\n' "$QUESTION" | command proxytune "$@" ;;
    serve)
      command proxytune "$@" --port "$PORT" &
      server=$!
      trap 'kill $server; wait $server || true' EXIT
      until curl -sfo /dev/null "http://127.0.0.1:$PORT/health"; do
        kill -0 $server
        sleep 0.2
      done ;;
    *) command proxytune "$@" ;;
  esac
}
begin() { echo "$1 $EPOCHREALTIME" >> "$FOLDER/times"; }
"""


@dataclass(frozen=True)
class Step:
    """A block of a page: the heading it is under, its language, its first line's number, and text."""

    heading: str
    language: str
    line: int
    text: str


@dataclass(frozen=True)
class Ran:
    """A step that was run: what it printed, and how long it took."""

    step: Step
    output: str
    seconds: float


class GuideFailed(Exception):
    """A step ended with an error."""


def steps_of(page: Path, *, installs: bool = False) -> list[Step]:
    """Return the blocks of a page that are to be run."""
    text = page.read_text(encoding="utf-8")
    lines = text.splitlines()
    steps = []
    for block in split(text)[1]:
        mark = lines[block.line - 3] if block.line > 2 else ""
        if block.language not in ("bash", "python") or mark.startswith("<!-- not run: "):
            continue
        if mark == "<!-- installs -->" and not installs:
            continue
        headings = [line for line in lines[: block.line] if re.match(r"#+ ", line)]
        steps.append(
            Step(
                headings[-1].strip("# ") if headings else "", block.language, block.line, block.text
            )
        )
    return steps


def run(
    steps: Sequence[Step], directory: Path, *, environment: dict[str, str], address: str = ""
) -> list[Ran]:
    """Run steps in one shell, beginning in `directory`.

    Raises:
        GuideFailed: One of them ended with an error; those after it were not run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = [SHELL]
        for i, step in enumerate(steps):
            text = re.sub(r"\bADDRESS\b", address, step.text) if address else step.text
            file = folder / f"{i}.{'py' if step.language == 'python' else 'sh'}"
            file.write_text(text.replace(f":{PORT}", f":{port}") + "\n", encoding="utf-8")
            reader = "python" if step.language == "python" else "."
            place = shlex.quote(str(file))
            script.append(f"begin {i}; {{ {reader} {place}; }} > {folder / f'{i}.out'} 2>&1")
        script.append("begin end")
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=directory,
            env={**environment, "FOLDER": name, "PORT": port, "QUESTION": QUESTION},
            stdin=subprocess.DEVNULL,
        )
        times = [line.split() for line in (folder / "times").read_text().splitlines()]
        begun = len(steps) if done.returncode == 0 else len(times)
        outputs = [
            (folder / f"{i}.out").read_text(encoding="utf-8", errors="replace")
            for i in range(begun)
        ]
    if done.returncode != 0:
        step = steps[len(times) - 1]
        raise GuideFailed(
            f"line {step.line} ended with exit code {done.returncode}:\n{step.text}\n{outputs[-1]}"
        )
    starts = [float(seconds) for _, seconds in times]
    return [
        Ran(step, output, end - start)
        for step, output, start, end in zip(steps, outputs, starts[:-1], starts[1:], strict=True)
    ]


def new_environment(home: Path) -> dict[str, str]:
    """Return the environment of a machine on which nothing is cached and no environment is active."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VIRTUAL_ENV", "XDG_", "HF_", "UV_"))
    }
    own = str(Path(sys.prefix) / "bin")
    path = [part for part in kept.get("PATH", "").split(os.pathsep) if part != own]
    return {
        **kept,
        "HOME": str(home),
        "PATH": os.pathsep.join(path),
        "XDG_CACHE_HOME": str(home / "cache"),
    }


def own_environment() -> dict[str, str]:
    """Return this process's environment, with this Python's commands first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}


def beside_checkout(folder: Path) -> Path:
    """Return an empty directory in `folder`, where `../proxytune` is this checkout."""
    (folder / "proxytune").symlink_to(ROOT, target_is_directory=True)
    directory = folder / "empty"
    directory.mkdir()
    return directory


def table(ran: Sequence[Ran]) -> str:
    """Return the time of each heading's steps, and of all, as a Markdown table."""
    totals: dict[str, float] = {}
    for each in ran:
        totals[each.step.heading] = totals.get(each.step.heading, 0.0) + each.seconds
    lines = ["| step | time |", "| --- | ---: |"]
    totals["all"] = sum(totals.values())
    for heading, seconds in totals.items():
        lines.append(f"| {heading} | {int(seconds // 60)} min {seconds % 60:.0f} s |")
    return "\n".join(lines)


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Run a page's commands as they stand.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--install", action="store_true", help="begin with nothing but Python")
    parser.add_argument("--log", type=Path, help="where to write what the commands print")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="proxytune-guide-") as name:
        home = Path(name) / "home"
        home.mkdir()
        try:
            ran = run(
                steps_of(arguments.page, installs=arguments.install),
                Path(name) if arguments.install else beside_checkout(Path(name)),
                environment=new_environment(home) if arguments.install else own_environment(),
                address=ROOT.as_uri() if arguments.install else "",
            )
        except GuideFailed as failure:
            print(f"{arguments.page}, {failure}", file=sys.stderr)
            return 1
    if arguments.log is not None:
        parts = [f"$ {each.step.text}\n{each.output}\n[{each.seconds:.1f} s]\n" for each in ran]
        arguments.log.write_text("\n".join(parts), encoding="utf-8")
    print(table(ran))
    return 0


if __name__ == "__main__":
    sys.exit(main())
