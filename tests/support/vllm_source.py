"""vLLM's Python files, read without importing them: what a version offers, whichever is installed."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

UNPACKED = Path(__file__).parents[2] / "build" / "vllm-0.33.0"
"""Where `make test-vllm` unpacks the newest version."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class VllmSource:
    """One version of vLLM.

    Args:
        root: The folder `vllm` with its files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, ast.Module | None] = {}

    @classmethod
    def installed(cls) -> VllmSource | None:
        """Return the version of this environment, if any."""
        spec = importlib.util.find_spec("vllm")
        return None if spec is None or spec.origin is None else cls(Path(spec.origin).parent)

    @classmethod
    def newest(cls) -> VllmSource | None:
        """Return the newest version, if it is unpacked."""
        return cls(UNPACKED / "vllm") if (UNPACKED / ".unpacked").is_file() else None

    @property
    def version(self) -> str:
        """The version, such as 0.32.0."""
        text = (self.root / "_version.py").read_text("utf-8")
        found = re.search(r"^__version__ = version = '([^']+)'", text, re.MULTILINE)
        assert found is not None, text
        return found[1]

    def find(self, name: str) -> ast.AST | None:
        """Return where a name is defined or imported; None if this version does not have it.

        Args:
            name: `module:name`, or with dots for members: `module:Class.member`. A member is anything in the
                body of the class or of a base in the same module, or assigned to `self` in a method.
        """
        module, _, path = name.partition(":")
        tree = self._module(module)
        if tree is None or not path:
            return tree
        first, *others = path.split(".")
        found = _defined(tree.body, first)
        for member in others:
            found = _member(tree, found, member)
        return found

    def without(self, module: str, pattern: str) -> VllmSource:
        """Return this version with other words in a module where a regular expression finds some."""
        changed = VllmSource(self.root)
        text = re.sub(pattern, "other", self._path(module).read_text("utf-8"))  # type: ignore[union-attr]
        changed._modules[module] = ast.parse(text)
        return changed

    def _path(self, module: str) -> Path | None:
        place = self.root.parent.joinpath(*module.split("."))
        paths = (place.with_suffix(".py"), place / "__init__.py")
        return next((path for path in paths if path.is_file()), None)

    def _module(self, name: str) -> ast.Module | None:
        if name not in self._modules:
            path = self._path(name)
            self._modules[name] = None if path is None else ast.parse(path.read_text("utf-8"))
        return self._modules[name]


def parameters(node: ast.AST) -> tuple[list[str], list[str]]:
    """Return the names of a function's parameters without `self` and `cls`, and those that must be given."""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), ast.dump(node)[:80]
    positional = node.args.posonlyargs + node.args.args
    names = [argument.arg for argument in positional]
    needed = names[: len(names) - len(node.args.defaults)]
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        names.append(argument.arg)
        if default is None:
            needed.append(argument.arg)
    own = ("self", "cls")
    return [n for n in names if n not in own], [n for n in needed if n not in own]


def code(node: ast.AST) -> set[str]:
    """Return the calls and assignments within a definition, as code without line breaks."""
    return {ast.unparse(n) for n in ast.walk(node) if isinstance(n, ast.Call | ast.Assign)}


def strings(node: ast.AST) -> set[str]:
    """Return the strings within a definition or module."""
    constants = (each.value for each in ast.walk(node) if isinstance(each, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, also those that a condition or an error decides on."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements(statement.body)
            yield from _statements(statement.orelse)
        if isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from _statements(handler.body)


def _defined(body: list[ast.stmt], name: str) -> ast.AST | None:
    for statement in _statements(body):
        if isinstance(statement, Definition) and statement.name == name:
            return statement
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return statement
        if isinstance(statement, ast.ImportFrom) and any(
            (alias.asname or alias.name) == name for alias in statement.names
        ):
            return statement
    return None


def _member(tree: ast.Module, found: ast.AST | None, name: str) -> ast.AST | None:
    if not isinstance(found, ast.ClassDef):
        return None
    own = _defined(found.body, name)
    if own is not None:
        return own
    for node in ast.walk(found):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(ast.unparse(target) == f"self.{name}" for target in targets):
                return node
    for base in found.bases:
        if isinstance(base, ast.Name) and base.id != found.name:
            inherited = _member(tree, _defined(tree.body, base.id), name)
            if inherited is not None:
                return inherited
    return None


def runnable_newest(place: Path) -> Path:
    """Return a folder with the newest version's Python files and the installed one's compiled kernels.

    Before all others on `sys.path`, it is a CPU build of the newest version, as far as the kernels that are
    called have kept their interfaces.
    """
    installed, newest = VllmSource.installed(), VllmSource.newest()
    assert installed is not None and newest is not None
    shutil.copytree(UNPACKED, place)
    for kernels in installed.root.glob("*.so"):
        (place / "vllm" / kernels.name).symlink_to(kernels)
    (metadata,) = place.glob("vllm-*.dist-info/METADATA")
    text = metadata.read_text("utf-8")
    # vLLM takes its platform from the version.
    metadata.write_text(
        text.replace(f"Version: {newest.version}", f"Version: {newest.version}+cpu")
    )
    return place
