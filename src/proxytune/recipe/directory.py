"""Where a recipe's files are: found by reference, and led to from another place.

config.json              what `recipe.py` reads and writes
README.md                a model card
modeling_proxytune.py    where transformers finds this package, with `trust_remote_code=True`
adapters/…               LoRA adapters, if they travel with the recipe
….safetensors            output biases of experts and bridges of cuts, if they do
"""

from __future__ import annotations

import filecmp
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from proxytune.checkpoints.hub import hub_recipe
from proxytune.checkpoints.references import HUB_ID, is_there, is_url, resolve_package
from proxytune.checkpoints.untrusted import (
    CONFIG_BYTES,
    LIST_BYTES,
    check_link,
    parse_json,
    read_regular,
)
from proxytune.errors import CorruptModel, ModelNotFound, RecipeError
from proxytune.files import building, replacing
from proxytune.recipe.spec import ModelSpec

LOADER_NAME = "modeling_proxytune.py"
LOADER = '''\
"""Leads transformers to the package `proxytune`, which reads this recipe and has to be installed."""

from proxytune.integrations.auto import ProxyTunedConfig
from proxytune.integrations.transformers import ProxyTunedForCausalLM

__all__ = ["ProxyTunedConfig", "ProxyTunedForCausalLM"]
'''
"""A file beside config.json that transformers runs with `trust_remote_code=True`, and proxytune never."""
_LOADER_START = '"""Leads transformers to the package `proxytune`, which reads this recipe'


def find_recipe(reference: str) -> Path:
    """Return the directory of a recipe: local, `package:NAME/PATH`, or fetched from the Hub.

    Raises:
        RecipeError: Nothing is there.
    """
    hint = "hint: write a recipe with `proxytune new`, or check the spelling"
    if reference.startswith("package:"):
        try:
            return resolve_package(reference)
        except ModelNotFound as error:
            raise RecipeError(f"no recipe at {reference}: {error}") from error
    path = Path(os.path.expanduser(reference))
    try:
        if path.is_dir():
            return path.absolute()
        if path.is_file():
            if path.name == "config.json":
                return path.absolute().parent
            raise RecipeError(
                f"no recipe at {reference}: it is a file, and a recipe is a directory.\n{hint}"
            )
    except (OSError, ValueError) as error:
        raise RecipeError(f"no recipe at {reference!r}: {error}.\n{hint}") from error
    # A recipe on the Hub always has an owner; a bare word is a directory that is not there.
    if HUB_ID.fullmatch(reference) and "/" in reference and ".." not in reference:
        try:
            return hub_recipe(reference)
        except ModelNotFound as error:
            raise RecipeError(f"no recipe at {reference}: {error}") from error
    raise RecipeError(f"no recipe at {reference}: no such directory.\n{hint}")


def read_config(directory: Path) -> Any:
    """Return what config.json of a directory holds; None if it is missing or no JSON."""
    try:
        content = read_regular(directory / "config.json", at_most=LIST_BYTES)
        return parse_json(content, is_strict=False)
    except (CorruptModel, ValueError):
        return None


def reference_from(source: Path, reference: str, target: Path) -> str:
    """Return a reference that leads from `target` to what `reference` leads to from `source`."""
    path = Path(os.path.expanduser(reference))
    is_elsewhere = reference.startswith("package:") or is_url(reference)
    if is_elsewhere or path.is_absolute() or not is_there(source / path):
        return reference
    return Path(os.path.relpath(os.path.normpath(source / path), target)).as_posix()


class Mover:
    """Makes the references of a recipe in `source` lead to the same files from `target`.

    Adapters, bridges and output biases inside `source` keep their reference, and `copy` takes them along.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self._source, self._target = source, target
        self._inside: dict[str, Path] = {}

    def model(self, spec: ModelSpec) -> ModelSpec:
        """Return a model as a recipe in `target` names it."""
        api = spec.api and replace(spec.api, tokenizer=self._moved(spec.api.tokenizer))
        return replace(
            spec,
            model=self._moved(spec.model),
            adapter=self.small(spec.adapter),
            bridge=self.small(spec.bridge),
            api=api,
        )

    def small(self, reference: str | None) -> str | None:
        """Return the reference of an adapter, a bridge or an output bias, which travels with its recipe."""
        source = self._source
        if reference is None or (moved := self._moved(reference)) == reference:
            return reference  # it does not lead to a local file
        place = Path(os.path.normpath(source / os.path.expanduser(reference)))
        if place == source or not place.is_relative_to(source):
            return moved
        kept = place.relative_to(source).as_posix()
        self._inside[kept] = place
        return kept

    def check_free(self, *, overwrite: bool) -> None:
        """Check that nothing else is where `copy` puts files; with `overwrite` it replaces single files.

        Raises:
            RecipeError: Another adapter, bridge or bias is there, which the recipe would silently take.
        """
        for reference, place in self._inside.items():
            there = self._target / reference
            if not os.path.lexists(there) or _is_same(place, there):
                continue
            if not (overwrite and place.is_file() and there.is_file()):
                raise RecipeError(
                    f"{there} is there already, and differs from {place}, which belongs to the recipe.\n"
                    "hint: name another directory, or delete it first"
                )

    def copy(self) -> None:
        """Copy what is inside the source and not yet in the target, links as their files.

        Raises:
            CorruptModel: Something leads out of the recipe, or is neither a file nor a directory.
            OutputFileError: It cannot be written.
        """
        for reference, place in self._inside.items():
            if not _is_same(place, self._target / reference):
                _copy_inside(place, self._target / reference, root=self._source)

    def _moved(self, reference: str | None) -> str | None:
        return reference and reference_from(self._source, reference, self._target)


def _is_same(place: Path, there: Path) -> bool:
    """Whether all files of an adapter, or a single file, are in another place, too."""
    if not place.is_dir():
        return there.is_file() and filecmp.cmp(place, there, shallow=False)
    files = [Path(folder, name) for folder, _, names in os.walk(place) for name in names]
    return there.is_dir() and all(
        (other := there / file.relative_to(place)).is_file()
        and filecmp.cmp(file, other, shallow=False)
        for file in files
    )


def _copy_inside(place: Path, target: Path, *, root: Path) -> None:
    check_link(place, root)
    if place.is_file():
        with replacing(target) as part:
            shutil.copyfile(place, part)
        return
    with building(target) as part:
        _copy_adapter(place, part, root=root)


def _copy_adapter(adapter: Path, target: Path, *, root: Path) -> None:
    for folder, directories, files in os.walk(adapter):
        for path in (Path(folder, name) for name in (*directories, *files)):
            check_link(path, root)
            # A link to a directory could lead to one that holds it.
            if not (path.is_file() or (path.is_dir() and not path.is_symlink())):
                raise CorruptModel(
                    f"{path} is neither a file nor a directory, so the adapter is not copied.\n"
                    "hint: remove it"
                )
    shutil.copytree(adapter, target, dirs_exist_ok=True)


def may_write_loader(target: Path) -> bool:
    """Whether the directory has no loader, or one that a version of this package wrote."""
    try:
        there = read_regular(target / LOADER_NAME, at_most=CONFIG_BYTES).decode()
    except (CorruptModel, UnicodeDecodeError):
        return not os.path.lexists(target / LOADER_NAME)
    return there.startswith(_LOADER_START)
