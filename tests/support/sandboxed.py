"""Programs run by the sandbox as root or as an ordinary user, beside things that they must leave alone.

    python -m tests.support.sandboxed USER [PROMISE ...] < programs.json

`USER` is `root` or `ordinary`. For the second, root makes what Python needs reachable in a mount namespace
and changes its user. The promises named are not kept, as on a system that cannot.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NOBODY = 65534
KEY = "sk-the-callers-own"
ROOT = Path(__file__).parents[2]


def ran(user: str, programs: list[dict[str, Any]], *without: str) -> dict[str, Any]:
    """Return the results of programs, and what became of the things around them.

    Each program has `source`, in which VICTIM is the ID of a process, PRECIOUS the path of a file, CALLER the
    ID of the caller, and optionally `timeout_s` and `may_write`.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.sandboxed", user, *without],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OPENAI_API_KEY": KEY},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def become_ordinary() -> None:
    """Change the user to nobody, who can still reach this checkout and Python."""
    libc = ctypes.CDLL(None, use_errno=True)
    needed = {os.path.realpath(each) for each in (sys.prefix, sys.base_prefix, ROOT)}
    closed: dict[Path, list[str]] = {}
    for path in sorted(needed):
        above = [each for each in reversed(Path(path).parents) if not each.stat().st_mode & 0o001]
        if above:
            closed.setdefault(above[0], []).append(path)
    if closed and libc.unshare(0x20000) != 0:
        raise OSError(ctypes.get_errno(), "root cannot mount here")
    for folder, paths in closed.items():
        libc.mount(None, b"/", None, ctypes.c_ulong(0x44000), None)
        held = [os.open(path, os.O_PATH) for path in paths]
        assert libc.mount(b"t", bytes(folder), b"tmpfs", ctypes.c_ulong(0), b"mode=755") == 0
        for path, place in zip(paths, held, strict=True):
            os.makedirs(path)
            source = f"/proc/self/fd/{place}".encode()
            assert libc.mount(source, path.encode(), None, ctypes.c_ulong(0x5000), None) == 0
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(4, 1, 0, 0, 0)  # As after a login: its own processes may be looked at.


def _around(victim: subprocess.Popen[bytes], precious: Path) -> dict[str, Any]:
    """What a program could have changed."""
    limits = Path(f"/proc/{victim.pid}/limits").read_text()
    return {
        "victim": victim.poll(),
        "limits": limits,
        "affinity": sorted(os.sched_getaffinity(victim.pid)),
        "niceness": os.getpriority(os.PRIO_PROCESS, victim.pid),
        "precious": precious.read_text(),
        "mode": precious.stat().st_mode,
        "shared memory": sorted(os.listdir("/dev/shm")),
        "temporary files": sorted(os.listdir(precious.parent)),
        "in /tmp": sorted(x for x in os.listdir("/tmp") if x.startswith("proxytune-run-")),
        "system V": [
            len(Path(f"/proc/sysvipc/{each}").read_text().splitlines())
            for each in ("shm", "msg", "sem")
        ],
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
    }


def main() -> None:
    """Run the programs from stdin."""
    programs = json.load(sys.stdin)
    if sys.argv[1] == "ordinary" and os.geteuid() == 0:
        become_ordinary()
    from proxytune.tasks import sandbox

    if without := tuple(sys.argv[2:]):
        sandbox.missing_promises = lambda: without
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        precious = Path(folder) / "precious.txt"
        precious.write_text("precious\n")
        victim = subprocess.Popen(["sleep", "300"])
        try:
            before = _around(victim, precious)
            names = {"VICTIM": victim.pid, "PRECIOUS": repr(str(precious)), "CALLER": os.getpid()}
            results = []
            for each in programs:
                source = each.pop("source")
                for name, value in names.items():
                    source = source.replace(name, str(value))
                limits = sandbox.Limits(**each)
                ended = sandbox.run_program(source, limits, allow_weaker=bool(without))
                results.append(ended.result)
            after = _around(victim, precious)
        finally:
            victim.kill()
            victim.wait()
    print(json.dumps({"results": results, "before": before, "after": after, "user": os.geteuid()}))


if __name__ == "__main__":
    main()
