"""How files are read that somebody else wrote: recipes, configs, tokenizers, headers of weights.

Whoever wrote a file decides what it says, and nothing else. Only regular files are opened, because a device
or a pipe has no end. No file is read beyond the size that its kind may have, and JSON whose values would take
too much memory is refused before it is parsed. Names inside a file, and links, lead to no other directory.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from proxytune.errors import CorruptModel

CONFIG_BYTES = 4 << 20
"""Maximum size of a config; those with the labels of 21,000 classes have 1 MB."""

LIST_BYTES = 64 << 20
"""Maximum size of a file that lists tensors, tokens or experts; the largest tokenizers have 40 MB."""

_MAX_VALUES, _MAX_STRICT_VALUES = 3_000_000, 1_500_000
"""Maximum number of values in a JSON file; the largest tokenizers have 2 million. One takes up to 220 bytes,
and 340 where keys are compared."""

_MAX_DEPTH = 64
_MAX_DIGITS = 300
"""Maximum length of a number: any of 300 digits fits into a float. Python needs 0.1 ms for one of 4,000."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, if it is a regular one.

    Raises:
        CorruptModel: It is something else (a device, a pipe, a directory), or the system does not open it.
    """
    try:
        # Opening a device can do something already, and opening a pipe waits for its other end.
        if stat.S_ISREG(os.stat(path).st_mode):
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            file = os.fdopen(os.open(path, flags), "rb")
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            file.close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise CorruptModel(f"{path} cannot be read: {why}") from error
    raise CorruptModel(
        f"{path} is not a regular file, so it is not read.\nhint: put a copy of the file there"
    )


def read_regular(path: Path, *, at_most: int) -> bytes:
    """Return the content of a regular file of at most `at_most` bytes.

    Raises:
        CorruptModel: It is longer, is no regular file, or the system does not let us read it.
    """
    with open_regular(path) as file:
        try:
            content = file.read(at_most + 1)
        except OSError as error:
            raise CorruptModel(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > at_most:
        raise CorruptModel(
            f"{path} has more than {at_most:,} bytes, which no file of its kind needs.\n"
            "hint: copy or download it again"
        )
    return content


def parse_json(content: bytes | str, *, is_strict: bool) -> Any:
    """Return what a JSON text holds, if it can be built in reasonable memory and time.

    Args:
        content: In UTF-8 if bytes.
        is_strict: Whether to refuse NaN, infinity, and a key that is given twice.

    Raises:
        ValueError: It is not JSON or beyond these limits; the message says what "it" is or holds.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error}") from error
    num_values = text.count(",") + text.count("[") + text.count("{")
    limit = _MAX_STRICT_VALUES if is_strict else _MAX_VALUES
    if num_values > limit:
        raise ValueError(f"it holds {num_values:,} values, and may hold {limit:,}")
    options: dict[str, Any] = {}
    if is_strict:
        options = {"parse_constant": _refuse_constant, "object_pairs_hook": _without_doubles}
    try:
        value = json.loads(
            text, parse_int=_int, parse_float=_finite_float if is_strict else _float, **options
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(v for v in item.values() if isinstance(v, dict | list))
            elif isinstance(item, list):
                inner.extend(v for v in item if isinstance(v, dict | list))
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested too deeply: by more than {_MAX_DEPTH} levels")


def _check_digits(text: str) -> None:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it holds a number that cannot be read: it has {len(text)} digits")


def _int(text: str) -> int:
    _check_digits(text)
    return int(text)


def _float(text: str) -> float:
    _check_digits(text)
    return float(text)


def _finite_float(text: str) -> float:
    value = _float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:40]}, but every number must be finite")
    return value


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, but every number must be finite")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        doubled = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {json.dumps(doubled[:80])} is given twice in one object")
    return content


def read_json_file(path: Path, *, at_most: int = CONFIG_BYTES) -> dict[str, Any]:
    """Return the object in a model's JSON file.

    Raises:
        CorruptModel: It cannot be read, or holds no object.
    """
    content = read_regular(path, at_most=at_most)
    hint = "hint: copy or download the model again"
    try:
        value = parse_json(content, is_strict=False)
    except ValueError as error:
        raise CorruptModel(f"{path} is not JSON that can be read: {error}.\n{hint}") from error
    if not isinstance(value, dict):
        raise CorruptModel(f"{path} holds no JSON object.\n{hint}")
    return value


# Names and links -------------------------------------------------------------------------------------


def named_inside(directory: Path, name: str, *, source: str) -> Path:
    """Return the file that a name in another file means, below `directory`.

    Args:
        directory: Where names start.
        name: As the other file has it.
        source: What the other file is, for errors.

    Raises:
        CorruptModel: The name is empty or no plain relative path, so it could lead anywhere.
    """
    # A colon may be a drive or a stream on Windows; no weight file has one in its name.
    parts = PurePosixPath(name).parts
    is_odd = not parts or len(name) > 1000 or any(c in "\\:" or not c.isprintable() for c in name)
    if is_odd or ".." in parts or name.startswith("/"):
        raise CorruptModel(
            f"{source} names {name[:80]!r}, which is not a file inside {directory}.\n"
            "hint: get the files from a source that you trust"
        )
    return directory / name


def check_links(directory: Path, *, root: Path | None = None) -> None:
    """Check a directory whose files are going to be read: each is regular, and no link leads elsewhere.

    Args:
        directory: Of a model or an adapter.
        root: Where links may lead too if `directory` is inside, such as the recipe's directory.

    Raises:
        CorruptModel: A file is something else, or leads out of the directory.
    """
    try:
        with os.scandir(directory) as entries:
            odd = [entry for entry in entries if not entry.is_file(follow_symlinks=False)]
    except OSError as error:
        raise CorruptModel(f"{directory} cannot be read: {error.strerror}") from error
    for entry in odd:
        path = Path(entry.path)
        if path.is_dir() and entry.name != _TEMPLATES:
            continue  # nothing in it is read, whatever it leads to
        check_link(path, directory, root=root)
        if path.is_dir():
            check_links(path, root=directory if root is None else root)
        elif path.exists() and not path.is_file():
            raise CorruptModel(
                f"{path} is not a regular file, so nothing in {directory} is read.\nhint: remove it"
            )


_TEMPLATES = "additional_chat_templates"
"""The one directory in a model's that transformers looks into."""


def check_link(path: Path, directory: Path, *, root: Path | None = None) -> None:
    """Check that a path stays where it seems to be; see `check_links`.

    Raises:
        CorruptModel: It leads out of the directory.
    """
    place = os.path.realpath(directory)
    roots = [place]
    if root is not None and Path(place).is_relative_to(os.path.realpath(root)):
        roots.append(os.path.realpath(root))
    # In the Hub's cache the files of a snapshot are links to blobs beside it.
    roots += [
        str(parent.parent / "blobs")
        for parent in Path(place).parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise CorruptModel(
            f"{path} is a link that leads out of {directory}, to {target}, and such links are not followed.\n"
            "hint: put a copy of the file there, or name the directory that it leads to"
        )
