"""Runs programs that models wrote, each in a separate process, within limits.

A program may compute, read files and use threads. It may not exceed its time and memory, write files, start
processes, signal others or reach the network; `guarded.py` enforces this. It is not a jail for a determined
attacker: run it as a user, or in a container, with nothing to lose.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from proxytune.errors import UnsupportedModel
from proxytune.tasks import guarded

_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

GRACE_S = 10.0
"""Seconds beyond its time limit after which a program is killed, which leaves time to start Python."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Args:
        timeout_s: Seconds that it may run.
        memory_bytes: Address space, which is more than the memory in use.
        may_write: Whether it may write files in an empty folder, which is deleted afterwards. Only a kernel
            with Landlock (Linux 5.13 or later) can confine it to that folder; elsewhere it does not run.
    """

    timeout_s: float = 3.0
    memory_bytes: int = 2**30
    may_write: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    Args:
        result: `passed`, `timed out`, or `failed: …`.
    """

    result: str

    @property
    def passed(self) -> bool:
        """Whether the program ended without an error."""
        return self.result == "passed"


def run_program(program: str, limits: Limits = Limits()) -> Outcome:  # frozen
    """Run one program and return how it ended.

    Raises:
        UnsupportedModel: This system cannot enforce the limits.
    """
    if sys.platform == "win32":
        raise UnsupportedModel(
            "generated code runs only within limits that Windows does not have.\n"
            "hint: run this in WSL, or leave the samples unscored"
        )
    with tempfile.TemporaryDirectory(prefix="proxytune-run-") as folder:
        task: dict[str, object] = {
            "program": program,
            "folder": folder if limits.may_write else None,
            "timeout_s": limits.timeout_s,
            "cpu_s": int(limits.timeout_s) + 2,
            "memory_bytes": limits.memory_bytes,
            "needs_kernel": limits.may_write,
        }
        return _run(task, folder, limits)


def _run(task: dict[str, object], folder: str, limits: Limits) -> Outcome:
    started = time.perf_counter()
    reading, writing = os.pipe()
    # Without the caller's environment, which may hold keys.
    places = dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), folder)
    environment = {"PATH": os.defpath, **places, **_ENVIRONMENT}
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(Path(guarded.__file__)), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            pass_fds=(writing,),
            start_new_session=True,
        )
    finally:
        os.close(writing)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.communicate(json.dumps(task).encode(), timeout=limits.timeout_s + GRACE_S)
        is_late = process.poll() is None
        # Anything that it started ends with it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if is_late:
            return Outcome("timed out")
        os.set_blocking(reading, False)
        said = ""
        with suppress(BlockingIOError):  # It wrote nothing.
            said = os.read(reading, 2**16).decode("utf-8", "replace")
    finally:
        os.close(reading)
    if said == "refused":
        raise UnsupportedModel(
            "this system's kernel cannot confine a program's files to one folder (that needs Landlock, Linux "
            "5.13 or later), so programs that write files do not run.\n"
            "hint: use a newer kernel, or leave the samples unscored"
        )
    if said:
        return Outcome(said)
    # The limit on processor time backs up the one on time, for programs that ignore the alarm.
    was_long = time.perf_counter() - started >= limits.timeout_s
    if was_long and process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome("timed out")
    return Outcome(f"failed: the process ended with {process.returncode}")


def run_programs(programs: Sequence[str], limits: Limits = Limits()) -> list[Outcome]:  # frozen
    """Run programs, one per processor at once, and return how each ended, in their order.

    Raises:
        UnsupportedModel: This system cannot enforce the limits.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))
