"""Files that are there whole or not at all: one way to write them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxytune.errors import (
    OutputFileError,
)


def write_whole(path: Path, content: str) -> None:
    """Write a file that is never there in part.

    Raises:
        OutputFileError: It cannot be written.
    """
    part = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content.encode())
        part.replace(path)
    except OSError as error:
        raise OutputFileError(
            f"{path} cannot be written: {error.strerror}.\nhint: name a folder that can be written"
        ) from error


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Give a file to write beside the output, which takes its place once it is whole.

    Raises:
        OutputFileError: It cannot be written.
    """
    part: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
        os.close(descriptor)
        part = Path(name)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(output)
    except OSError as error:
        raise OutputFileError(
            f"{output} cannot be written: {error.strerror or error}.\n"
            "hint: make room there, or name another place"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def replace_file(path: Path, content: str) -> None:
    """Write a file so that a reader sees the old one or the new one, whole."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def copy_tree(source: Path, target: Path) -> None:
    """Copy a directory so that the copy is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        shutil.copytree(source, part, dirs_exist_ok=True)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    part = path.with_suffix(".partial")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)
