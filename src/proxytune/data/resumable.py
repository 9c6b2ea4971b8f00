"""An output file that a killed run can continue."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from proxytune.data.lines import Line
from proxytune.errors import OutputFileError
from proxytune.files import unwritable, write_json

HINT = (
    "give an output file in an existing, writable directory with free space; an interrupted "
    "run continues when it is started again"
)

FORMAT = 1
"""Version of the progress file. It counts up when lines change, so that no version continues another's."""


class ResumableOutput:
    """An output file, locked while it is open, and its progress file.

    Args:
        path: The file; created if it does not exist.
        settings: Everything that the content depends on. A file started with other settings is refused.
        continues: Whether these settings go on from those that the file was started with, as those of an
            input with more lines do. Then the file is continued with these.

    Raises:
        OutputFileError: The file cannot be written, is being written by another process, or was started with
            other settings.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        continues: Callable[[Mapping[str, Any]], bool] = lambda begun: False,
    ) -> None:
        self._path = path
        self._progress_path = path.with_name(path.name + ".progress.json")
        self._settings = settings
        self._continues = continues
        try:
            self._file = self._open()
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            self.finished = self._begin()
            """Number of lines written and numbers of lines left out, if an earlier run finished the file."""
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResumableOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()  # writes what a failed write has left
        except OSError as error:
            if kind is None:
                raise self._cannot_write(error) from error

    def _open(self) -> IO[bytes]:
        if self._path.exists() and not stat.S_ISREG(self._path.stat().st_mode):
            raise OutputFileError(
                f"{self._path} is not a regular file, so an interrupted run could not be continued.\n"
                "hint: give the path of a file"
            )
        file = os.fdopen(
            os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b"
        )
        if not _lock(file):
            file.close()
            raise OutputFileError(
                f"another process is writing {self._path}.\n"
                "hint: wait until it ends, or give another file"
            )
        return file

    def _begin(self) -> tuple[int, tuple[int, ...]] | None:
        """Compare the settings with those of an earlier run, or record them for a later one."""
        size = os.fstat(self._file.fileno()).st_size
        if size == 0:  # There is nothing to lose, whatever an earlier run's settings were.
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
                f"{self._path} is not empty, and {self._progress_path.name}, which should say how it was "
                "started, is missing or damaged; the file is left as it is.\n"
                "hint: give another output file, or remove this one"
            ) from error
        is_continued = begun != self._settings and self._continues(begun)
        if begun != self._settings and not is_continued:
            raise OutputFileError(
                f"{self._path} was started with other settings, and continuing would mix them: "
                f"{_differences(begun, self._settings)}.\n"
                "hint: use the settings it was started with, give another output file, or remove this one"
            )
        if finished is not None and finished_size != size:
            raise OutputFileError(
                f"{self._path} was finished with {finished_size:,} bytes and now has {size:,}, so something "
                "else has written to it.\nhint: give another output file, or remove this one"
            )
        if is_continued:
            self._write_progress({})
        if finished is None or is_continued:
            return None
        return num_lines, bad_lines

    def resume(self, lines: Iterator[Line], num_lines: int, batch_size: int) -> int:
        """Cut off an interrupted run's incomplete last block, and return the number of lines kept.

        Args:
            lines: The input lines.
            num_lines: Number of input lines.
            batch_size: Number of lines per block.

        Raises:
            OutputFileError: A kept line does not answer its input line.
        """
        self._file.seek(0)
        num_kept, size_kept, size = 0, 0, 0
        for num_whole, raw in enumerate(self._file, 1):
            if not raw.endswith(b"\n"):
                break
            line = next(lines, None)
            if line is None or not _answers(raw, line):
                raise OutputFileError(
                    f"line {num_whole} of {self._path} does not answer "
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
        """Write a block and flush it to disk."""
        text = "".join(json.dumps(a, ensure_ascii=False, allow_nan=False) + "\n" for a in answers)
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def finish(self, num_lines: int, bad_lines: Iterable[int]) -> None:
        """Record that the file is complete."""
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
    """Whether an output line has an answer and the fields of an input line."""
    try:
        content = json.loads(raw)
        return "output" in content and content == {**line.fields, "output": content["output"]}
    except (ValueError, TypeError):
        return False


def _lock(file: IO[bytes]) -> bool:
    """Lock the file against other processes until it is closed; return False if one holds the lock."""
    if sys.platform == "win32":
        return True  # Windows has no lock that ends with a killed process and lets others read.
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # Some network file systems do not support locks.
    return True


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the settings that differ, with both values."""
    parts = []
    for name in sorted(begun.keys() | now.keys()):
        before, after = (json.dumps(side.get(name)) for side in (begun, now))
        if before == after:
            continue
        if name == "input_sha256":
            parts.append("the content of the input file has changed")
        elif name == "recipe":
            parts.append("the recipe has changed")
        else:
            parts.append(f"{name} was {before} and is now {after}")
    return "; ".join(parts)


def number_list(numbers: Sequence[int], most: int = 20) -> str:
    """Return numbers as text: `3, 17, 42`, and how many more than `most` there are."""
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
