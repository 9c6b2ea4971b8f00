"""Generated code: what it may do, and what it may not, by Python's own ways and by the kernel's."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from proxytune.evaluate.judges import CodeRunner
from proxytune.tasks.ds1000 import Ds1000
from proxytune.tasks.guarded import guard_with_kernel, kernel_filter
from proxytune.tasks.humaneval import HumanEval
from proxytune.tasks.sandbox import Limits, run_program, run_programs
from proxytune.tasks.task import Item, asked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="programs are not run on Windows")
SHORT = Limits(timeout_s=1.0)
WRITING = Limits(timeout_s=3.0, may_write=True)


def held_by_the_kernel(folder: str | None = None) -> bool:
    """Whether this machine's kernel takes the filter; asked in a child, which keeps it for ever."""
    child = os.fork()
    if child == 0:
        os._exit(0 if guard_with_kernel(folder=folder) else 1)
    return os.waitpid(child, 0)[1] == 0


needs_kernel = pytest.mark.skipif(
    sys.platform != "linux" or not held_by_the_kernel(),
    reason="this kernel takes no seccomp filter here",
)
needs_landlock = pytest.mark.skipif(
    sys.platform != "linux" or not held_by_the_kernel("/tmp"), reason="this kernel has no Landlock"
)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import math, re, collections, typing, hashlib\nassert hashlib.md5(b'a').hexdigest()[0] == '0'",
        "print('x' * 10_000_000)",
        "import threading\nx = []\nt = threading.Thread(target=lambda: x.append(1))\nt.start()\nt.join()\n"
        "assert x",
        "open('/etc/hostname').read()",
    ],
)
def test_a_program_that_computes_passes(program):
    assert run_program(program).result == "passed"


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("assert 1 == 2, 'not equal'", "failed: not equal"),
        ("def f(:", "failed: SyntaxError"),
        ("import sys\nsys.exit(0)", "failed: SystemExit"),
        ("import os\nos._exit(0)", "failed: the process ended with 0"),
        ("def f(n): return f(n + 1)\nf(0)", "failed: RecursionError"),
        ("x = 'a' * 10**10", "failed: MemoryError"),
        ("import os\nos.fork()", "failed: PermissionError"),
        ("import subprocess\nsubprocess.run(['ls'])", "failed: PermissionError"),
        ("import socket\nsocket.socket()", "failed: PermissionError"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", "failed: PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "failed: PermissionError"),
        ("open('f', 'w')", "failed: PermissionError"),
        ("import os\nos.remove('/etc/hostname')", "failed: PermissionError"),
        ("import pathlib\npathlib.Path('f').mkdir()", "failed: PermissionError"),
        ("import tempfile\ntempfile.TemporaryFile()", "failed: "),
    ],
)  # fmt: skip
def test_a_program_that_fails_or_goes_too_far_fails(program, result):
    assert run_program(program).result.startswith(result)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import time\ntime.sleep(60)",
        "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0)\nsignal.signal(signal.SIGALRM, "
        "signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_a_program_that_does_not_end_is_stopped(program):
    started = time.perf_counter()
    assert run_program(program, SHORT).result == "timed out"
    assert time.perf_counter() - started < 30


def test_what_a_program_says_about_itself_is_not_believed():
    forged = (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\n"
        "raise ValueError"
    )
    assert run_program(forged).passed is False


def test_a_program_sees_no_keys_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_API_KEY", "x")
    assert run_program("import os\nassert 'SECRET_API_KEY' not in os.environ").passed


@needs_kernel
@pytest.mark.parametrize(
    "call",
    [
        "fork()", "socket(2, 1, 0)", "open(b'/tmp/proxytune-test', 0o101, 0o644)", "kill(1, 0)",
        "unlink(b'/etc/hostname')", "mkdir(b'd', 0o755)", "rename(b'/etc/hostname', b'x')",
        "chmod(b'/etc/hostname', 0o777)", "truncate(b'/etc/hostname', 0)", "system(b'true')",
    ],
)  # fmt: skip
def test_the_kernel_refuses_what_python_is_not_asked(call):
    program = f"import ctypes\nassert ctypes.CDLL(None).{call} == -1"
    if call.startswith("system"):
        program = program.replace("== -1", "!= 0")
    assert run_program(program).result == "passed"


@needs_landlock
def test_a_program_that_may_write_writes_in_its_own_folder_only(tmp_path):
    inside = "open('f', 'w').write('x')\nassert open('f').read() == 'x'\nimport os\nos.remove('f')"
    assert run_program(inside, WRITING).result == "passed"
    outside = f"open({str(tmp_path / 'f')!r}, 'w')"
    assert run_program(outside, WRITING).result.startswith("failed: PermissionError")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("may_write", [False, True])
def test_the_kernels_program_jumps_within_itself(machine, may_write):
    import struct

    code = kernel_filter(machine, may_write=may_write)
    lines = list(struct.iter_unpack("HBBI", code))
    assert len(lines) < 4096
    for place, (kind, if_true, if_false, _) in enumerate(lines):
        if kind in (0x15, 0x35):
            assert place + 1 + max(if_true, if_false) < len(lines)
    assert lines[-1] == (0x06, 0, 0, 0x7FFF0000)


def test_programs_run_side_by_side_and_come_back_in_order():
    programs = ["assert True", "assert False", "import time\ntime.sleep(0.3)", "1 / 0"]
    assert [each.passed for each in run_programs(programs)] == [True, False, True, False]


def test_a_humaneval_sample_passes_where_its_tests_do():
    task = HumanEval()
    prompt = "def add(a, b):\n"
    item = Item(
        "HumanEval/0",
        asked(prompt, prompt),
        {
            "task_id": "HumanEval/0",
            "prompt": prompt,
            "entry_point": "add",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        },
    )
    rows = [
        task.row(item, text) for text in ("    return a + b\n", "    return a - b", "    return")
    ]
    decisions = CodeRunner(task).decide([item] * 3, rows)
    assert [each["passed"] for each in decisions if each] == [True, False, False]
    assert task.grade([{**r, **(d or {})} for r, d in zip(rows, decisions, strict=True)]).metrics[
        "pass@1"
    ] == pytest.approx(1 / 3)


@needs_landlock
def test_a_ds1000_sample_passes_where_its_context_says_so():
    task = Ds1000()
    context = (
        "def test_execution(solution):\n    scope = {'a': 2}\n    exec(solution, scope)\n"
        "    assert scope['result'] == 4\n"
        "def test_string(solution):\n    assert 'for' not in solution\n"
    )
    item = Item(
        "Numpy/1",
        asked("p", "p"),
        {
            "lib": "Numpy",
            "problem_id": 1,
            "perturbation_type": "Origin",
            "prompt": "p",
            "code_context": context,
        },
    )
    rows = [task.row(item, t) for t in ("result = a * 2", "result = a", "for i in [4]: result = i")]
    limits = Limits(timeout_s=10.0, may_write=True)
    decisions = CodeRunner(task, limits).decide([item] * 3, rows)
    assert [each["passed"] for each in decisions if each] == [True, False, False]


def test_the_guard_is_found_where_it_is_started_from():
    from proxytune.tasks import guarded

    assert Path(guarded.__file__).is_file()
