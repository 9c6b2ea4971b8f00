"""Runs programs that models wrote, each in a separate process, within limits.

A program may compute, read Python's own files and use threads. It may not exceed its time and memory, read or
write other files, start processes, reach other processes or the network, or say itself that it passed;
`guarded.py` enforces this. Where the system cannot, `missing_promises` says what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import marshal
import os
import signal
import subprocess
import sys
import tempfile
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

PROMISES = {
    "namespaces": "it has processes, shared memory, network, a view of files and a folder of limited size "
    "of its own (needs unprivileged user namespaces, or root's rights to mount)",
    "files": "it reads no files but Python's and the system's (needs mounts, or Landlock of Linux 6.2)",
    "user": "it does not have root's rights (needs the right to change the user)",
    "calls": "it makes only the system calls of a computation (needs Linux on x86_64 or aarch64)",
    "verdict": "it cannot say itself that it passed (needs the right to read /proc/PID/syscall)",
}
"""What a program is held to, by name, and what the system must allow for it."""

GRACE_S = 10.0
"""Seconds beyond its time limit after which a program is killed, which leaves time to start Python."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Args:
        timeout_s: Seconds that it may run.
        memory_bytes: Address space, which is more than the memory in use.
        may_write: Whether it may write files in an empty folder of limited size, which is deleted afterwards.
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
        """Whether the program ran to its end without an error."""
        return self.result == "passed"


@functools.lru_cache(maxsize=1)
def missing_promises() -> tuple[str, ...]:
    """Return the names in `PROMISES` that this system cannot keep, found by trying; empty if it keeps all.

    Raises:
        UnsupportedModel: No program can run here at all.
    """
    if sys.platform == "win32":
        raise UnsupportedModel(
            "generated code runs only within limits that Windows does not have.\n"
            "hint: run this in WSL, or leave the samples unscored"
        )
    # With a thread: a library that starts some must not change where a program ends.
    program = "import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()"
    missing: tuple[str, ...] = () if sys.platform == "linux" else tuple(PROMISES)
    while True:
        answer = _answer(program, Limits(timeout_s=30.0), missing)
        if answer.get("result") == "passed":
            return missing
        name = answer.get("missing", "verdict")
        if name in missing:
            raise UnsupportedModel(
                "a program that does nothing does not pass here "
                f"({answer.get('result') or answer['why']}), so none can be judged.\n"
                "hint: leave the samples unscored"
            )
        missing = (*missing, name)


def require_promises(*, allow_weaker: bool) -> tuple[str, ...]:
    """Return `missing_promises`, if the caller accepts that.

    Raises:
        UnsupportedModel: A promise cannot be kept here, and the caller does not accept that.
    """
    missing = missing_promises()
    if missing and not allow_weaker:
        listed = "".join(f"\n- {PROMISES[name]}" for name in missing)
        raise UnsupportedModel(
            "this system cannot hold a generated program to all of what the sandbox promises. What is "
            f"missing:{listed}\n"
            "hint: run this on a system that allows it, or accept the risk with --allow-weaker-sandbox "
            "(allow_weaker=True in Python), in a container with nothing to lose"
        )
    return missing


def run_program(
    program: str,
    limits: Limits = Limits(),  # frozen
    *,
    allow_weaker: bool = False,
) -> Outcome:
    """Run one program and return how it ended.

    Args:
        program: Python source.
        limits: What it may use.
        allow_weaker: Run it even if the system cannot keep every promise.

    Raises:
        UnsupportedModel: This system cannot enforce the limits.
    """
    missing = require_promises(allow_weaker=allow_weaker)
    if limits.may_write and "files" in missing:
        raise UnsupportedModel(
            f"this system cannot confine a program's files to one folder: {PROMISES['files']}. So programs "
            "that write files do not run, whatever is allowed.\n"
            "hint: use a newer kernel, or leave the samples unscored"
        )
    answer = _answer(program, limits, missing)
    if "missing" in answer:
        raise UnsupportedModel(
            f"the sandbox could not be set up this time: {answer['why']}. What could not be promised: "
            f"{PROMISES[answer['missing']]}.\n"
            "hint: try again with fewer other processes"
        )
    return Outcome(answer["result"])


def _answer(program: str, limits: Limits, missing: tuple[str, ...]) -> dict[str, str]:
    """Run a program with all barriers but the missing ones; return its result, or another missing one."""
    with contextlib.ExitStack() as stack:
        folder = "/proxytune-run"  # In its own view of files; Python itself may be below /tmp.
        if "namespaces" in missing:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="proxytune-run-"))
        task = {
            "caller": os.getpid(),
            "program": program,
            "folder": folder,
            "may_write": limits.may_write,
            "timeout_s": limits.timeout_s,
            "cpu_s": int(limits.timeout_s) + 2,
            "memory_bytes": limits.memory_bytes,
            "without": missing,
        }
        # Without the caller's environment, which may hold keys.
        places = dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), folder)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(Path(guarded.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": os.defpath, **places, **_ENVIRONMENT},
            start_new_session=True,
        )
        said = b""
        try:
            with suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(
                    marshal.dumps(task), timeout=limits.timeout_s + GRACE_S
                )
        finally:
            # Anything that it started ends with it.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if said:
        answer: dict[str, str] = marshal.loads(said)
        return answer
    if process.returncode == -signal.SIGKILL:
        return {"result": "timed out"}
    return {"result": f"failed: the process ended with {process.returncode}"}


def run_programs(
    programs: Sequence[str],
    limits: Limits = Limits(),  # frozen
    *,
    allow_weaker: bool = False,
) -> list[Outcome]:
    """Run programs, one per processor at once, and return how each ended, in their order; see `run_program`.

    Raises:
        UnsupportedModel: This system cannot enforce the limits.
    """
    require_promises(allow_weaker=allow_weaker)  # Once, before there are threads.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        run = functools.partial(run_program, limits=limits, allow_weaker=allow_weaker)
        return list(pool.map(run, programs))
