"""Files and directories that are there whole or not at all: the one way to write them.

New content is written beside its place and renamed. A reader, also after the writing process was killed,
finds the old content or the new, never a part of it. A file is flushed to the disk first, so this holds after
a power failure too; a directory's files are not. Files that grow line by line (answers, decisions) are not
written here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxytune.errors import OutputFileError

HINT = "make room there, or name another place"


@contextlib.contextmanager
def replacing(path: Path, *, hint: str = HINT) -> Iterator[Path]:
    """Yield an empty file beside `path`, which takes its place once the block has written it.

    Args:
        path: Its directory is made if it is missing.
        hint: What the error advises.

    Raises:
        OutputFileError: It cannot be written.
    """
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        part = Path(name)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except OSError as error:
        raise unwritable(path, error, hint) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def write_whole(path: Path, content: str, *, hint: str = HINT) -> None:
    """Write a text in UTF-8, line ends as they are; see `replacing`.

    Raises:
        OutputFileError: It cannot be written.
    """
    with replacing(path, hint=hint) as part:
        part.write_bytes(content.encode())


def write_json(path: Path, content: Any, *, hint: str = HINT) -> None:
    """Write a JSON file; see `replacing`.

    Raises:
        OutputFileError: It cannot be written.
    """
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", hint=hint)


@contextlib.contextmanager
def building(target: Path, *, hint: str = HINT) -> Iterator[Path]:
    """Yield an empty directory beside `target`, which gets that name once the block has filled it.

    Args:
        target: Not there yet. Its parent is made if it is missing.
        hint: What the error advises.

    Raises:
        OutputFileError: It cannot be written.
    """
    part: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=_part_prefix(target), dir=target.parent))
        yield part
        part.chmod(0o777 & ~_umask())
        part.rename(target)
    except OSError as error:
        raise unwritable(target, error, hint) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def remove_unfinished(target: Path) -> None:
    """Remove what killed processes began for `target` with `building`; nobody else may be building it."""
    for part in target.parent.glob(f"{_part_prefix(target)}*"):
        shutil.rmtree(part, ignore_errors=True)


def _part_prefix(target: Path) -> str:
    return f"{target.name}.part-"


def unwritable(path: Path, error: OSError, hint: str = HINT) -> OutputFileError:
    """Return the error for a file or directory that the system does not let us write."""
    why = error.strerror or str(error)
    if isinstance(error.filename, str) and Path(error.filename) != path:
        why += f" ({error.filename})"
    return OutputFileError(f"{path} cannot be written: {why}.\nhint: {hint}")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
