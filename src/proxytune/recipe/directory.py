"""Where a recipe's files are: found by reference, and led to from another place.

config.json              what `recipe.py` reads and writes
README.md                a model card
modeling_proxytune.py    where transformers finds this package, with `trust_remote_code=True`
adapters/…               LoRA adapters, if they travel with the recipe
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
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


def mover(source: Path, target: Path) -> tuple[Callable[[ModelSpec], ModelSpec], dict[str, Path]]:
    """Return a function that makes a model's references lead to the same files from `target`.

    Adapters inside `source` keep their reference. The function enters them into the dict, by reference, so
    that they can be copied along.
    """
    inside: dict[str, Path] = {}

    def move(reference: str | None) -> str | None:
        return None if reference is None else reference_from(source, reference, target)

    def move_adapter(reference: str | None) -> str | None:
        if reference is None or (moved := reference_from(source, reference, target)) == reference:
            return reference  # it does not lead to a local file
        place = Path(os.path.normpath(source / os.path.expanduser(reference)))
        if place == source or not place.is_relative_to(source):
            return moved
        kept = place.relative_to(source).as_posix()
        inside[kept] = place
        return kept

    def move_spec(spec: ModelSpec) -> ModelSpec:
        api = spec.api and replace(spec.api, tokenizer=move(spec.api.tokenizer))
        return replace(spec, model=move(spec.model), adapter=move_adapter(spec.adapter), api=api)

    return move_spec, inside


def copy_adapter(adapter: Path, target: Path, *, root: Path) -> None:
    """Copy an adapter that is inside the recipe `root` into the directory `target`, links as their files.

    Raises:
        CorruptModel: Something in it leads out of the recipe, or is neither a file nor a directory.
    """
    check_link(adapter, root)
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
