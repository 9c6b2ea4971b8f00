"""Output that a killed run goes on with."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from proxytune.data.lines import Line
from proxytune.errors import OutputFileError
from proxytune.files import unwritable, write_json

HINT = (
    "give an output file in a directory that is there, where you may write and space is left; "
    "a run that was interrupted continues when it is started again"
)

FORMAT = 1
"""Of the progress file. A version that writes other lines counts up, so that none continues the other's."""


class ResumableOutput:
    """An output file, locked while it is open, and its progress file.

    Args:
        path: The file, made where it is not there.
        settings: Everything that its content depends on; a file begun with others is refused.

    Raises:
        OutputFileError: It cannot be written, is being written by another process, or was begun with other
            settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._progress_path = path.with_name(path.name + ".progress.json")
        self._settings = settings
        try:
            self._file = self._open()
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            self.finished = self._begin()
            """Lines written and lines left out, if an earlier run finished the file."""
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResumableOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._file.close()

    def _open(self) -> IO[bytes]:
        if self._path.exists() and not stat.S_ISREG(self._path.stat().st_mode):
            raise OutputFileError(
                f"{self._path} is not a regular file, and a run could not be continued in it.\n"
                "hint: give the path of a file"
            )
        file = os.fdopen(
            os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b"
        )
        if not _lock(file):
            file.close()
            raise OutputFileError(
                f"another process is writing {self._path}.\n"
                "hint: wait until it has ended, or give another file"
            )
        return file

    def _begin(self) -> tuple[int, tuple[int, ...]] | None:
        """Compare settings with those of an earlier run, or write them down for a later one."""
        size = os.fstat(self._file.fileno()).st_size
        if size == 0:  # Nothing to lose, whatever an earlier run had in mind.
            self._write_progress({})
            return None
        try:
            progress = json.loads(self._progress_path.read_bytes())
            begun, finished = progress["settings"], progress.get("finished")
            if progress["format"] != FORMAT:
                begun = {}
            if finished is not None:
                num_lines, bad_lines = int(finished["num_lines"]), tuple(finished["bad_lines"])
                finished_size = int(finished["num_bytes"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputFileError(
                f"{self._path} is there and not empty, and {self._progress_path.name}, which would say "
                "how it was begun, is missing or damaged; the file is left as it is.\n"
                "hint: give another output file, or remove this one"
            ) from error
        if begun != self._settings:
            raise OutputFileError(
                f"{self._path} was begun with other settings, and continuing would mix them: "
                f"{_differences(begun, self._settings)}.\n"
                "hint: give the settings it was begun with, give another output file, or remove this one"
            )
        if finished is None:
            return None
        if finished_size != size:
            raise OutputFileError(
                f"{self._path} was finished with {finished_size:,} bytes and has {size:,} now, so something "
                "else has written to it.\nhint: give another output file, or remove this one"
            )
        return num_lines, bad_lines

    def resume(self, lines: Iterator[Line], num_lines: int, batch_size: int) -> int:
        """Cut off what an interrupted run left of its last block, and return the number of lines kept.

        Raises:
            OutputFileError: A line that is kept is not an answer to its line of the input.
        """
        self._file.seek(0)
        num_kept, size_kept, size = 0, 0, 0
        for num_whole, raw in enumerate(self._file, 1):
            if not raw.endswith(b"\n"):
                break
            line = next(lines, None)
            if line is None or not _answers(raw, line):
                raise OutputFileError(
                    f"line {num_whole} of {self._path} is no answer to "
                    + ("any line" if line is None else f"line {line.number}")
                    + " of the input, so something else has written to it.\n"
                    "hint: give another output file, or remove this one"
                )
            size += len(raw)
            if num_whole % batch_size == 0 or num_whole == num_lines:
                num_kept, size_kept = num_whole, size
        try:
            self._file.truncate(size_kept)
            self._file.seek(size_kept)
        except OSError as error:
            raise self._cannot_write(error) from error
        return num_kept

    def append(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Write a block and flush it to the disk."""
        text = "".join(json.dumps(a, ensure_ascii=False, allow_nan=False) + "\n" for a in answers)
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def finish(self, num_lines: int, bad_lines: Iterable[int]) -> None:
        """Write down that nothing is left to do."""
        finished = {
            "num_lines": num_lines,
            "num_bytes": os.fstat(self._file.fileno()).st_size,
            "bad_lines": sorted(bad_lines),
        }
        self._write_progress({"finished": finished})

    def _write_progress(self, further: Mapping[str, Any]) -> None:
        content = {"format": FORMAT, "settings": self._settings, **further}
        write_json(self._progress_path, content, hint=HINT)

    def _cannot_write(self, error: OSError) -> OutputFileError:
        return unwritable(Path(error.filename or self._path), error, HINT)


def _answers(raw: bytes, line: Line) -> bool:
    """Whether a line of the output has an answer and the fields of a line of the input."""
    try:
        content = json.loads(raw)
        return "output" in content and content == {**line.fields, "output": content["output"]}
    except (ValueError, TypeError):
        return False


def _lock(file: IO[bytes]) -> bool:
    """Keep other processes from the file until it is closed; False if one has it."""
    if sys.platform == "win32":
        return True  # There is no lock here that ends with a killed process and lets others read.
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # Some network file systems have no locks.
    return True


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the settings that differ, with both values where they are short."""
    parts = []
    for name in sorted(begun.keys() | now.keys()):
        before, after = (json.dumps(side.get(name)) for side in (begun, now))
        if before == after:
            continue
        if name == "input_sha256":
            parts.append("the input file's content has changed")
        elif name == "recipe":
            parts.append("the recipe has changed")
        else:
            parts.append(f"{name} was {before} and is now {after}")
    return "; ".join(parts)


def number_list(numbers: Sequence[int], most: int = 20) -> str:
    """Return numbers as text: `3, 17, 42`, and how many more there are beyond `most`."""
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
