"""Files and directories that are there whole or not at all: the one way to write them.

New content is written beside its place and renamed. A reader, also after the writing process was killed,
finds the old content or the new, never a part of it. A file is flushed to the disk first, so this holds after
a power failure too; a directory's files are not. Files that grow line by line (answers, decisions) are not
written here, but by `append` and what keeps them open.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.errors import OutputFileError, ProxytuneError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HINT = "make room there, or name another place"


@contextlib.contextmanager
def writing(path: Path, *, hint: str = HINT) -> Iterator[None]:
    """Turn an error of the disk in a block that writes into one that names the file or directory.

    Raises:
        OutputFileError: It cannot be written.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ProxytuneError) or not is_disk_error(error):
            raise
        raise unwritable(path, error, hint) from error


def is_disk_error(error: Exception) -> bool:
    """Whether an error is one of writing to a disk, for which safetensors and torch have no class."""
    words = ("Error while serializing", "PytorchStreamWriter", "inline_container.cc")
    return isinstance(error, OSError) or any(word in str(error) for word in words)


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
        with writing(path, hint=hint):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(descriptor)
            part = Path(name)
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.chmod(0o666 & ~_umask())
            part.replace(path)
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


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a picture in the format that its suffix names; see `replacing`.

    Args:
        figure: What matplotlib has drawn.
        path: Output file, in a directory that is there.
        **options: Those of `Figure.savefig`.

    Raises:
        OutputFileError: It cannot be written, or matplotlib does not know the format.
    """
    hint = "give a .png, .svg or .pdf file in a place with free space"
    if not path.parent.is_dir():
        raise OutputFileError(f"{path} cannot be written: there is no {path.parent}.\nhint: {hint}")
    with replacing(path, hint=hint) as part:
        try:
            figure.savefig(part, format=path.suffix[1:].lower() or "png", **options)
        except ValueError as error:
            raise OutputFileError(f"{path} cannot be written: {error}.\nhint: {hint}") from error


def append(path: Path, text: str, *, hint: str = HINT) -> None:
    """Append to a file in UTF-8, and flush it to the disk. A crash may leave a part of the text.

    Raises:
        OutputFileError: It cannot be written.
    """
    with writing(path, hint=hint), path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


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
        with writing(target, hint=hint):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=_part_prefix(target), dir=target.parent))
            yield part
            part.chmod(0o777 & ~_umask())
            part.rename(target)
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def remove_unfinished(target: Path) -> None:
    """Remove what killed processes began for `target` with `building`; nobody else may be building it."""
    for part in target.parent.glob(f"{_part_prefix(target)}*"):
        shutil.rmtree(part, ignore_errors=True)


def _part_prefix(target: Path) -> str:
    return f"{target.name}.part-"


def unwritable(path: Path, error: Exception, hint: str = HINT) -> OutputFileError:
    """Return the error for a file or directory that the system does not let us write."""
    why = getattr(error, "strerror", None) or str(error)
    culprit = getattr(error, "filename", None)
    if isinstance(culprit, str) and Path(culprit) != path:
        why += f" ({culprit})"
    return OutputFileError(f"{path} cannot be written: {why}.\nhint: {hint}")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
