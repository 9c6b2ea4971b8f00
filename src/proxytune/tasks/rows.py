"""Rows of data and prediction files: JSON lines, a JSON array or CSV, packed with gzip or not.

What the fields of a row mean is each task's to know.
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
    """Return the text of a file, unpacked if it begins as gzip does, whatever it is called.

    Raises:
        InputFileError: It cannot be read, is no whole gzip file, or no UTF-8 text.
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
    """Return the rows of a file of JSON lines, of a JSON array of objects, or of a CSV file by its name.

    Raises:
        InputFileError: It cannot be read, has no rows, or one is no JSON object; the message names the
        line.
    """
    text = read_text(path)
    if path.name.removesuffix(".gz").endswith(".csv"):
        rows: list[Row] = [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        if any(None in row or None in row.values() for row in rows):
            raise InputFileError(f"{path} has rows with more or fewer fields than its first line")
    elif text.lstrip().startswith("["):
        rows = _array(text, path)
    else:
        # Not splitlines(), which would also cut at the odd separators that texts hold.
        lines = enumerate(text.split("\n"), 1)
        rows = [_object(line, f"line {n} of {path}") for n, line in lines if line.strip()]
    if not rows:
        raise InputFileError(f"{path} has no rows.\nhint: it holds one JSON object a line")
    return rows


def _array(text: str, path: Path) -> list[Row]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path} begins as a JSON array and is none: {error}") from error
    for place, item in enumerate(content):
        if not isinstance(item, dict):
            raise InputFileError(f"item {place} of the array in {path} is no JSON object")
    return list(content)


def _object(line: str, place: str) -> Row:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputFileError(f"{place} is no JSON object")
    return content


def field(row: Mapping[str, Any], place: int, *names: str, kind: type = str) -> Any:
    """Return the first of these fields that a row has.

    Args:
        row: Of a file.
        place: Its number, from 1, for the message.
        names: In the order of preference.
        kind: What it has to be.

    Raises:
        InputFileError: It has none of them, or one of another kind.
    """
    for name in names:
        if name in row:
            if not isinstance(row[name], kind):
                raise InputFileError(
                    f"row {place}: {name!r} is {json.dumps(row[name])[:60]}, and must be a "
                    f"{'list' if kind is list else 'text'}"
                )
            return row[name]
    wanted = " or ".join(map(repr, names))
    raise InputFileError(
        f"row {place} has no {wanted}; its fields are {', '.join(map(repr, row)) or 'none'}"
    )


def local_rows(data_dir: Path, names: Sequence[str]) -> list[Row]:
    """Return the rows of the first of these files that is there, packed or not.

    Raises:
        InputFileError: None is there, or it cannot be read.
    """
    for name in names:
        for path in (data_dir / name, data_dir / f"{name}.gz"):
            if path.is_file():
                return read_rows(path)
    raise InputFileError(
        f"{data_dir} has no {' and no '.join(names)}.\n"
        "hint: give the folder that holds it with --data-dir, or leave --data-dir out to take the data set "
        "from the Hugging Face Hub"
    )


def hub_rows(name: str, config: str | None, split: str) -> list[Row]:
    """Return the rows of a data set on the Hugging Face Hub.

    Raises:
        MissingExtra: The datasets library is not installed.
        InputFileError: The data set cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_extra(
            "data sets of the Hub need the datasets library",
            "eval",
            "or give local files with --data-dir",
        ) from error
    try:
        return [dict(row) for row in load_dataset(name, config, split=split)]
    except Exception as error:  # Whatever the network, the Hub or the data set's own loader raise.
        raise InputFileError(
            f"the data set {name} cannot be had from the Hub: {error}\n"
            "hint: give local files with --data-dir"
        ) from error


def hub_file_rows(name: str, file: str) -> list[Row]:
    """Return the rows of one file of a data set on the Hugging Face Hub.

    Raises:
        InputFileError: It cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, file, repo_type="dataset")
    except Exception as error:  # Whatever the network and the Hub raise.
        raise InputFileError(
            f"{file} of the data set {name} cannot be had from the Hub: {error}\n"
            "hint: give local files with --data-dir"
        ) from error
    return read_rows(Path(path))
