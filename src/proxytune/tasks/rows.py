"""Rows of benchmark data and of prediction files: JSON lines, a JSON array or CSV, also compressed with gzip.

Each task knows what the fields of its rows mean.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.errors import InputFileError, missing_extra

Row = dict[str, Any]


def read_text(path: Path) -> str:
    """Return the text of a file, decompressed if it begins like a gzip file, whatever its name.

    Raises:
        InputFileError: The file cannot be read, is a truncated gzip file, or is not UTF-8 text.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputFileError(f"{path} cannot be read: {why}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path} is not UTF-8 text (byte {error.start + 1})") from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file, if its name says so, otherwise of JSON lines or a JSON array of objects.

    Raises:
        InputFileError: The file cannot be read or has no rows, or a row is not an object; names the line.
    """
    text = read_text(path)
    if path.name.removesuffix(".gz").endswith(".csv"):
        rows: list[Row] = [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        if any(None in row or None in row.values() for row in rows):
            raise InputFileError(f"{path} has rows with more or fewer fields than its first line")
    elif text.lstrip().startswith("["):
        rows = _array(text, path)
    else:
        # Not splitlines(), which would also cut at rare separators inside texts.
        lines = enumerate(text.split("\n"), 1)
        rows = [_object(line, f"line {n} of {path}") for n, line in lines if line.strip()]
    if not rows:
        raise InputFileError(f"{path} has no rows.\nhint: give one JSON object per line")
    return rows


def _array(text: str, path: Path) -> list[Row]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputFileError(
            f"{path} begins like a JSON array but is not valid JSON: {error}"
        ) from error
    for place, item in enumerate(content):
        if not isinstance(item, dict):
            raise InputFileError(f"item {place} of the array in {path} is not an object")
    return list(content)


def _object(line: str, place: str) -> Row:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputFileError(f"{place} is not a JSON object")
    return content


def field(row: Mapping[str, Any], place: int, *names: str, kind: type = str) -> Any:
    """Return the first of these fields that a row has.

    Args:
        row: A row of a file.
        place: The row's number, from 1, for errors.
        names: Names of the field, in order of preference.
        kind: The type that the value must have.

    Raises:
        InputFileError: The row has none of the fields, or its value has another type.
    """
    for name in names:
        if name in row:
            if not isinstance(row[name], kind):
                raise InputFileError(
                    f"row {place}: {name!r} is {json.dumps(row[name])[:60]}, and must be "
                    f"{'a list' if kind is list else 'a whole number' if kind is int else 'text'}"
                )
            return row[name]
    wanted = " or ".join(map(repr, names))
    raise InputFileError(
        f"row {place} has no {wanted}; its fields are {', '.join(map(repr, row)) or 'none'}"
    )


def local_rows(data_dir: Path, names: Sequence[str]) -> list[Row]:
    """Return the rows of the first of these files that exists, compressed or not.

    Raises:
        InputFileError: None of them exists, or the file cannot be read.
    """
    for name in names:
        for path in (data_dir / name, data_dir / f"{name}.gz"):
            if path.is_file():
                return read_rows(path)
    raise InputFileError(
        f"{data_dir} has no {' and no '.join(names)}.\n"
        "hint: give the folder that contains it with --data-dir, or leave out --data-dir to use the data set "
        "on the Hugging Face Hub"
    )


def data_rows(
    data_dir: Path | None, names: Sequence[str], name: str, config: str | None, split: str
) -> list[Row]:
    """Return the rows of the first of these local files that exists; without a folder, of the Hub's data set.

    Raises:
        MissingExtra: The datasets library is not installed.
        InputFileError: The data is missing, or cannot be read.
    """
    return hub_rows(name, config, split) if data_dir is None else local_rows(data_dir, names)


def hub_rows(name: str, config: str | None, split: str) -> list[Row]:
    """Return the rows of a data set on the Hugging Face Hub.

    Raises:
        MissingExtra: The datasets library is not installed.
        InputFileError: The data set cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_extra(
            "data sets on the Hub need the library datasets",
            "eval",
            "or give local files with --data-dir",
        ) from error
    try:
        return [dict(row) for row in load_dataset(name, config, split=split)]
    except Exception as error:  # The network, the Hub and the data set have errors of their own.
        raise InputFileError(
            f"the data set {name} cannot be read from the Hub: {error}\n"
            "hint: give local files with --data-dir"
        ) from error


def hub_file_rows(name: str, file: str) -> list[Row]:
    """Return the rows of one file of a data set on the Hugging Face Hub.

    Raises:
        InputFileError: The file cannot be read.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, file, repo_type="dataset")
    except Exception as error:  # The network and the Hub each raise errors of their own.
        raise InputFileError(
            f"{file} of the data set {name} cannot be read from the Hub: {error}\n"
            "hint: give local files with --data-dir"
        ) from error
    return read_rows(Path(path))
