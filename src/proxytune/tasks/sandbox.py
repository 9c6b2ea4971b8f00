"""Runs programs that models wrote, each in a process of its own, within limits.

A program may compute, read files and use threads. It may not run longer, use more memory, write files, start
processes, signal others or reach the network; what holds it is in `guarded.py`. This is no jail for an
attacker who studies it: run it as a user, or in a container, that has nothing to lose.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
"""How much longer than its time limit a program may take with starting Python, before it is killed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Args:
        timeout_s: Seconds it may run.
        memory_bytes: Of addresses, which is more than of memory in use.
        may_write: Whether it may write files in an empty folder, which is deleted afterwards. Only a kernel
        with
            Landlock (Linux 5.13 or later) can hold it there; elsewhere such a program is not run.
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
        """Whether it ran to its end."""
        return self.result == "passed"


def run_program(program: str, limits: Limits = Limits()) -> Outcome:  # frozen
    """Run one program and say how it ended.

    Raises:
        UnsupportedModel: This system cannot hold a program within the limits.
    """
    if sys.platform == "win32":
        raise UnsupportedModel(
            "Windows has none of the limits that generated code is run with, so it is not run.\n"
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
    # Nothing of the caller's environment, where keys may be.
    environment = {
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "MPLCONFIGDIR": folder,
        **_ENVIRONMENT,
    }
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
        # Whatever it has started goes with it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if is_late:
            return Outcome("timed out")
        said = _read_all(reading)
    finally:
        os.close(reading)
    if said == "refused":
        raise UnsupportedModel(
            "this system's kernel cannot keep a program's files in one folder (Landlock, Linux 5.13 on), so "
            "no program that writes files is run.\nhint: run this where it can, or leave the samples unscored"
        )
    if said:
        return Outcome(said)
    # The limit on processor time stands behind that on time, for programs that ignore the alarm.
    was_long = time.perf_counter() - started >= limits.timeout_s
    if was_long and process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome("timed out")
    return Outcome(f"failed: the process ended with {process.returncode}")


def _read_all(pipe: int) -> str:
    """Return what lies in a pipe, without waiting for more."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        return os.read(pipe, 2**16).decode("utf-8", "replace")
    return ""


def run_programs(
    programs: Sequence[str],
    limits: Limits = Limits(),  # frozen
    *,
    num_workers: int | None = None,
    on_outcome: Callable[[int, Outcome], None] | None = None,
) -> list[Outcome]:
    """Run programs side by side and return how each ended, in their order.

    Args:
        programs: What to run.
        limits: Of each.
        num_workers: How many at once; None for one per processor.
        on_outcome: Called in this thread with a program's index and its outcome, in their order.
    """
    outcomes = []
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        for index, outcome in enumerate(pool.map(lambda p: run_program(p, limits), programs)):
            outcomes.append(outcome)
            if on_outcome is not None:
                on_outcome(index, outcome)
    return outcomes
