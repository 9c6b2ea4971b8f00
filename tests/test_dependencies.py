"""What the package imports is what pyproject.toml declares."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

IMPORTED_AS = {"llama_cpp_python": "llama_cpp"}
"""Packages whose import has another name."""

USED_UNSEEN = {
    "accelerate": "transformers places models on devices with it",
    "pyarrow": "data/rows.py imports it by its name, with a hint where it is missing",
}
"""Declared and imported by no statement, and why they are declared."""


def names(requirements: list[str]) -> set[str]:
    """Return what is imported of requirements; extras of this project itself bring nothing new."""
    found = {re.split(r"[^\w.-]", text)[0].replace("-", "_").lower() for text in requirements}
    return {IMPORTED_AS.get(name, name) for name in found - {"proxytune"}}


def imports(source: str) -> Iterator[str]:
    """Yield the packages that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def imported() -> dict[str, list[str]]:
    """Return the files below src that import each package, this one and Python's own left out."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for name in set(imports(path.read_text("utf-8"))) - sys.stdlib_module_names - {"proxytune"}:
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def declared() -> set[str]:
    """Return what a user can install with the package: without what developing it needs."""
    extras = PROJECT["optional-dependencies"]
    further = [extras[name] for name in extras if name not in {"dev", "docs"}]
    return names([*PROJECT["dependencies"], *(text for extra in further for text in extra)])


def test_imports_are_found_wherever_they_stand():
    source = "import a.b, c\nfrom . import d\ndef f():\n    from e.g import h\n"
    assert list(imports(source)) == ["a", "c", "e"]


def test_requirements_are_read_by_name():
    assert names(["A-b>=1", "c_d[extra]>=2,<3; python_version < '4'", "llama-cpp-python"]) == {
        "a_b",
        "c_d",
        "llama_cpp",
    }


def test_every_library_that_is_imported_is_declared():
    undeclared = {name: files for name, files in imported().items() if name not in declared()}
    assert undeclared == {}, "a dependency of a dependency may be gone with its next release"


def test_every_library_that_is_declared_is_imported_or_used_unseen():
    assert declared() - set(imported()) == set(USED_UNSEEN)


@pytest.mark.parametrize("extra", ["dev", "docs"])
def test_what_the_package_imports_does_not_come_with_development_alone(extra):
    assert not names(PROJECT["optional-dependencies"][extra]) & set(imported())
