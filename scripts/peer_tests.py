"""Run the server tests of llama.cpp or vLLM against `proxytune serve`.

    python scripts/peer_tests.py llama.cpp llama_cpp_python-0.3.36.tar.gz --python PEER/bin/python
    python scripts/peer_tests.py vllm vllm-0.32.0.tar.gz --python PEER/bin/python --json numbers.json

The second argument is a checkout of the peer or an sdist with its tests; nothing is fetched. `--python` is an
environment with what the tests import, which the script names if it is missing; for vLLM that is vLLM itself.
Each test is reported as passed, failed, or left out with the reason that scripts/peer_tests.toml has for it.
The exit code is 1 if a test fails, or if the table names one that there is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import tomllib

HERE = Path(__file__).parent
TABLE = HERE / "peer_tests.toml"


class Unusable(Exception):
    """The source or the environment does not have what the tests need."""


# The peer's tests ---------------------------------------------------------------------------------------


def is_needed(path: PurePosixPath, peer: str) -> bool:
    """Whether a file, relative to the root of the peer's tests, takes part."""
    if peer == "vllm":
        return path.parts[:2] == ("tests", "entrypoints") or str(path) == "tests/__init__.py"
    return True


def copy_tests(source: Path, peer: str, root: str, target: Path) -> None:
    """Copy the tests from a checkout or an sdist, so that it stays as it is."""
    marker = "conftest.py" if peer == "llama.cpp" else "tests/entrypoints/conftest.py"
    if source.is_dir():
        found = [source / root, *source.glob(f"vendor/llama.cpp/{root}"), source]
        folder = next((each for each in found if (each / marker).is_file()), None)
        if folder is None:
            raise Unusable(f"{source} has no {root}/{marker}")
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if path.is_file() and is_needed(PurePosixPath(relative.as_posix()), peer):
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / relative)
        return
    with tarfile.open(source) as archive:
        names = archive.getnames()
        end = "/" + str(PurePosixPath(root) / marker)
        start = next((name.removesuffix(marker) for name in names if name.endswith(end)), None)
        if start is None:
            raise Unusable(f"{source} has no {root}/{marker}")
        for member in archive.getmembers():
            if not member.isfile() or not member.name.startswith(start):
                continue
            relative = PurePosixPath(member.name.removeprefix(start))
            if is_needed(relative, peer) and ".." not in relative.parts:
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                (target / relative).write_bytes(content.read())


def check_environment(python: Path, needs: Iterable[str]) -> None:
    code = (
        "import sys\nfrom importlib.util import find_spec\n"
        "print(*(name for name in sys.argv[1:] if find_spec(name) is None))"
    )
    done = subprocess.run([python, "-c", code, *needs], capture_output=True, text=True, check=True)
    if done.stdout.strip():
        missing = done.stdout.strip().replace("_", "-")
        raise Unusable(
            f"{python} lacks what the tests import.\nhint: {python} -m pip install {missing}"
        )


# Running ------------------------------------------------------------------------------------------------


def run_tests(arguments: argparse.Namespace, peer: dict[str, Any], folder: Path) -> list[Any]:
    """Run the tests and return what the plugin reported of each."""
    report = folder / "report.jsonl"
    report.touch()
    command = [sys.executable, "-m", "proxytune", "serve", arguments.recipe]
    settings = {
        "peer": arguments.peer,
        "serve": [*command, "--max-tokens", str(arguments.max_tokens)],
        "environment": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        "port": arguments.port or free_port(),
        "timeout": arguments.timeout,
        "tokenizer": str(save_tokenizer(arguments.recipe, folder))
        if arguments.peer == "vllm"
        else "",
        "reasons": peer["reasons"],
        "all": arguments.all,
        "prefix": peer["prefix"],
        "folder": str(folder / "tests"),
        "report": str(report),
        "log": str(arguments.log.resolve()),
    }
    environment = {
        **os.environ,
        "PROXYTUNE_PEER_TESTS": json.dumps(settings),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(folder / "tests")]),
        "HF_HUB_OFFLINE": "1",
    }
    pytest = [arguments.python, "-m", "pytest", "-p", "peer_tests_plugin", "-p", "no:cacheprovider"]
    options = ["--quiet", "--tb=short", "--no-header", "--continue-on-collection-errors"]
    if arguments.peer == "vllm":
        # Above lies what the tests of the models need, GPUs included.
        options += ["--confcutdir=tests/entrypoints", "--rootdir=.", "-o", "asyncio_mode=auto"]
    with open(arguments.output, "w", encoding="utf-8") as output:
        done = subprocess.run(
            [*pytest, *options, *(arguments.only or peer["tests"])],
            cwd=folder / "tests",
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode not in (0, 1, 5):  # Beside tests that pass, fail, or are all left out.
        last = arguments.output.read_text("utf-8").splitlines()[-1]
        raise Unusable(f"the tests did not run to their end: {last}")
    return [json.loads(line) for line in report.read_text("utf-8").splitlines()]


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def save_tokenizer(recipe: str, folder: Path) -> Path:
    """Write the recipe's tokenizer to a folder, from which the peer's transformers can load it."""
    from proxytune.checkpoints.references import resolve_package
    from proxytune.model import ProxyTuned

    place = folder / "tokenizer"
    ProxyTuned.load(resolve_package(recipe)).tokenizer.save_pretrained(place)
    return place


def outcomes(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return one outcome for each test: of several (a call, then its teardown) the worst."""
    rank = {"passed": 0, "left out": 1, "failed": 2}
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        known = found.get(line["test"])
        if known is None or rank[line["outcome"]] > rank[known["outcome"]]:
            found[line["test"]] = line
    return found


def unknown_tests(reasons: dict[str, Any], tests: Iterable[str]) -> list[str]:
    """Return the entries of the table that fit no test."""
    names = list(tests)

    def fits(pattern: str) -> bool:
        begin = pattern.removesuffix("*")
        return any(name.startswith(begin) for name in names)

    return [each for entry in reasons.values() for each in entry["tests"] if not fits(each)]


# Telling ------------------------------------------------------------------------------------------------


def summary(
    arguments: argparse.Namespace, reasons: dict[str, Any], found: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the numbers, and how they were made."""
    passed = [test for test, each in found.items() if each["outcome"] == "passed"]
    failed = [test for test, each in found.items() if each["outcome"] == "failed"]
    left_out = Counter(each["reason"] for each in found.values() if each["outcome"] == "left out")
    return {
        "peer": arguments.peer,
        "source": arguments.source.name.removesuffix(".tar.gz"),
        "recipe": arguments.recipe,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": f"python scripts/peer_tests.py {arguments.peer} {arguments.source.name} --python PYTHON"
        f" --max-tokens {arguments.max_tokens}",
        "collected": len(found),
        "passed": len(passed),
        "failed": sorted(failed),
        "left_out": {
            reason: {"why": reasons[reason]["why"], "tests": number}
            for reason, number in left_out.most_common()
        },
    }


def commit() -> str:
    """Return the checkout's commit, marked if it was changed."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=12", "--dirty=-changed"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def table(found: dict[str, Any]) -> str:
    """Return a summary as a table of Markdown."""
    rows = [("passed", found["passed"]), ("failed", len(found["failed"]))]
    rows += [(f"left out: {each['why']}", each["tests"]) for each in found["left_out"].values()]
    head = f"| {found['source']}: {found['collected']:,} tests | |\n| --- | ---: |\n"
    return head + "\n".join(f"| {what} | {number:,} |" for what, number in rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("peer", choices=("llama.cpp", "vllm"))
    parser.add_argument(
        "source", type=Path, help="a checkout of the peer, or an sdist with its tests"
    )
    parser.add_argument(
        "--python", type=Path, required=True, help="Python with what the tests import"
    )
    parser.add_argument("--recipe", default="package:proxytune/smol")
    parser.add_argument(
        "--port", type=int, default=0, help="port of our server; 0 picks a free one"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TEST", help="run these files or tests, as pytest names them"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also run tests that are left out, where that is possible",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="limit for a text, as CPUs are slow"
    )
    parser.add_argument("--timeout", type=int, default=180, help="seconds for one test")
    parser.add_argument(
        "--table", type=Path, default=TABLE, help="which tests are left out, and why"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--log", type=Path, default=Path("peer_tests.server.log"))
    parser.add_argument("--output", type=Path, default=Path("peer_tests.pytest.log"))
    arguments = parser.parse_args()
    arguments.python = arguments.python.absolute()
    return arguments


def main() -> int:
    """Run the command; returns its exit code."""
    arguments = parse()
    peer = tomllib.loads(arguments.table.read_text("utf-8"))[arguments.peer]
    reasons = peer["reasons"]
    try:
        check_environment(arguments.python, peer["needs"])
        with tempfile.TemporaryDirectory() as folder:
            copy_tests(arguments.source, arguments.peer, peer["root"], Path(folder) / "tests")
            found = outcomes(run_tests(arguments, peer, Path(folder)))
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    if not found:
        print(f"no test was collected; {arguments.output} says why", file=sys.stderr)
        return 2
    for test, each in sorted(found.items()):
        if each["outcome"] == "failed" or (each["outcome"] == "passed" and each["reason"]):
            detail = each.get("detail", "").replace("\n", "\n    ")
            print(f"{each['outcome']}: {test}" + (f" ({each['reason']})" if each["reason"] else ""))
            print(f"    {detail}" if detail else "", end="\n" if detail else "")
    numbers = summary(arguments, reasons, found)
    print(table(numbers))
    if arguments.json and not arguments.only:
        text = json.dumps(numbers, indent=2, ensure_ascii=False)
        arguments.json.write_text(f"{text}\n", "utf-8")
    unknown = [] if arguments.only else unknown_tests(reasons, found)
    for each in unknown:
        print(f"{arguments.table.name} names {each}, and there is no such test", file=sys.stderr)
    return 1 if numbers["failed"] or unknown else 0


if __name__ == "__main__":
    sys.exit(main())
