"""Each name that the package takes from transformers, PEFT and TRL exists in the installed release.

Those packages do not promise many of these names, which is why pyproject.toml has upper limits. With a newer
release this says at once, and by name, what has moved; the other tests say what behaves otherwise.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "proxytune"
PACKAGES = ("transformers", "peft", "trl")


def names_used(text: str) -> set[str]:
    """Return the dotted names of foreign packages that a file imports, or reads from an imported package."""
    tree = ast.parse(text)
    found: set[str] = set()
    packages: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module.partition(".")[0] in PACKAGES:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in PACKAGES:
                    found.add(alias.name)
                    packages[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in packages
        ):
            found.add(f"{packages[node.value.id]}.{node.attr}")
    return found


def is_there(name: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    module, _, last = name.rpartition(".")
    if not module:
        return importlib.util.find_spec(name) is not None
    try:
        owner = importlib.import_module(module)
    except ImportError:
        return False
    if hasattr(owner, last):
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def test_names_of_a_file_are_found_however_they_are_imported():
    text = (
        "import transformers.utils.logging\nimport trl as t\nfrom peft.tuners import lora\n"
        "from os import path\ndef f():\n    t.SFTTrainer(transformers.AutoConfig, path.join)\n"
    )
    assert names_used(text) == {
        "transformers.utils.logging", "transformers.AutoConfig", "trl", "trl.SFTTrainer", "peft.tuners.lora",
    }  # fmt: skip


def test_a_name_that_moved_is_noticed():
    assert is_there("transformers.cache_utils.DynamicCache")
    assert not is_there("transformers.cache_utils.DynamicCash")
    assert not is_there("transformers.no_such_module.DynamicCache")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_that_is_used_exists(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed here")
    used = {name for file in SOURCE.rglob("*.py") for name in names_used(file.read_text())}
    own = {name for name in used if name.partition(".")[0] == package}
    assert len(own) > 3, own
    missing = sorted(name for name in own if not is_there(name))
    assert not missing, f"{package} {importlib.import_module(package).__version__} lacks {missing}"
