"""Generated code: what it may do, and what it may not, by Python's own ways and by the kernel's."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import json
import os
import platform
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxytune.cli import app
from proxytune.errors import InvalidRequest, UnsupportedModel
from proxytune.evaluate.judges import CodeRunner
from proxytune.evaluate.plan import EvalOptions
from proxytune.tasks import guarded, sandbox
from proxytune.tasks.ds1000 import Ds1000
from proxytune.tasks.guarded import kernel_filter
from proxytune.tasks.humaneval import HumanEval
from proxytune.tasks.sandbox import PROMISES, Limits, missing_promises, run_program, run_programs
from proxytune.tasks.task import Item, asked
from tests.support.sandboxed import ran

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="programs are not run on Windows")
SHORT = Limits(timeout_s=1.0)
WRITING = Limits(timeout_s=3.0, may_write=True)


def kept(*promises: str) -> pytest.MarkDecorator:
    """Skip where the system cannot keep these promises, or any."""
    missing = [] if sys.platform == "win32" else missing_promises()
    lacking = [each for each in promises or PROMISES if each in missing]
    return pytest.mark.skipif(bool(lacking), reason=f"this system cannot promise: {lacking}")


needs_all = kept()
needs_calls = kept("calls")
needs_files = kept("files")


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests that need no promise run on any system."""
    if sys.platform != "win32" and missing_promises():
        monkeypatch.setitem(run_program.__kwdefaults__, "allow_weaker", True)
        monkeypatch.setitem(run_programs.__kwdefaults__, "allow_weaker", True)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import math, re, collections, typing, hashlib\nassert hashlib.md5(b'a').hexdigest()[0] == '0'",
        "print('x' * 10_000_000)",
        "import threading\nx = []\nt = threading.Thread(target=lambda: x.append(1))\nt.start()\nt.join()\n"
        "assert x",
        "import os\nopen(os.__file__).read()",
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


# Programs that have not run to their end and claim it. `stage` is the frame that waits for them, where they
# find all that it uses.
FIND = """
import atexit, builtins, gc, os, signal, sys, threading, time, types
try:
    attempt = sys._getframe().f_back
    stage = attempt.f_back
    write, read = stage.f_locals['write'], stage.f_locals['read']
    to_parent, gate = stage.f_locals['to_parent'], stage.f_locals['gate']
    own = stage.f_globals
except (AttributeError, KeyError) as error:
    raise SystemError('this test knows another runner') from error
def late(*_, **__):
    write(to_parent, b'\\0')
    read(gate, 1)
"""
JUMP = """
def trace(frame, event, _):
    if event == 'line':
        frame.f_lineno = LAST
    return trace
def jump():
    sys._getframe().f_back.f_trace = trace
    sys.settrace(trace)
jump()
assert sys is None
x = 1
x = 2
"""
CLAIMED = {
    "exit": "os._exit(0)",
    "exit by an exception": "raise SystemExit(0)",
    "write into everything": """
for fd in range(64):
    for text in (b'\\0', b'passed', b'{"result": "passed"}'):
        try:
            os.write(fd, text)
        except OSError:
            pass
os._exit(0)
""",
    "wait somewhere": "write(to_parent, b'\\0')\ntime.sleep(9)",
    "wait at the gate": "late()",
    "call the stage again": "own['_stage']({'program': ''}, to_parent, gate)",
    "wait in a thread": "threading.Thread(target=late).start()\nraise ValueError",
    "wait in a signal's handler": """
signal.signal(signal.SIGALRM, late)
signal.setitimer(signal.ITIMER_REAL, 0.00001, 0.00001)
raise ValueError
""",
    "wait in an exception's text": """
class Late(Exception):
    __str__ = __del__ = late
raise Late
""",
    "wait at exit": "atexit.register(late)\nsys.excepthook = sys.unraisablehook = late\nsys.exit(0)",
    "stand in for the runner's names": """
class Fake:
    _exit = write = suppress = __getattr__ = late
own['os'] = own['contextlib'] = Fake()
for name in ('BaseException', 'type', 'isinstance', 'AssertionError', 'next', 'map', 'str'):
    setattr(builtins, name, late)
for frame in (attempt, stage):
    for name in list(frame.f_locals):
        if name not in ('write', 'read', 'gate', 'to_parent'):
            frame.f_locals[name] = late
raise ValueError
""",
    "stand in for what reports": "builtins.isinstance = builtins.type = late\nraise ValueError",
    "take away the exit": """
os._exit = print
own['os'] = types.SimpleNamespace(_exit=print, write=print)
raise ValueError
""",
    "take away the name of all exceptions": "builtins.BaseException = int\nraise ValueError",
    "jump over the tests": "JUMP",
    "jump over the tests without the hook": """
for each in gc.get_objects():
    if isinstance(each, types.FunctionType) and each.__name__ == 'hook':
        each.__code__ = (lambda *_, **__: None).__code__
    if isinstance(each, types.CellType):
        try:
            if isinstance(each.cell_contents, tuple):
                each.cell_contents = ('nothing',)
        except ValueError:
            pass
JUMP""",
    "close every pipe": "os.closerange(0, 64)",
    "crash": "import ctypes\nctypes.string_at(0)",
}


@kept("verdict", "calls")
@pytest.mark.parametrize("claim", CLAIMED)
def test_a_program_that_did_not_run_to_its_end_has_not_passed(claim):
    """A program used to pass by writing a pass into a pipe whose number it was given."""
    program = FIND + CLAIMED[claim].replace("JUMP", JUMP)
    outcome = run_program(program.replace("LAST", str(program.count("\n"))), SHORT)
    assert re.match("failed|timed out", outcome.result)
    assert "this test knows another runner" not in outcome.result


@kept("verdict")
@pytest.mark.parametrize(
    "program",
    [
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'failed: no')\n    except OSError: pass",
        "import signal\nsignal.signal(signal.SIGALRM, print)\nsignal.setitimer(0, 1e-3, 1e-3)",
        "import sys\nsys.setrecursionlimit(10**5)\ndef f(n): return n and f(n - 1)\nf(9000)",
        "import ctypes, mmap\nmmap.mmap(-1, 2**20)\nctypes.CDLL(None).getpid()",
    ],
)  # fmt: skip
def test_a_program_that_ran_to_its_end_has_passed(program):
    assert run_program(program).result == "passed"


def test_a_program_that_has_not_begun_has_not_passed(monkeypatch):
    """Until it begins, it waits at the place that counts as its end."""
    place = ("0x1", "0x2")
    monkeypatch.setattr(guarded, "_place", lambda *_: place)
    child = object.__new__(guarded._Child)
    child._timeout_s, child._is_checked, child._process, child._gate = 0.05, True, -1, -1
    child._from_child, to_parent = os.pipe()
    try:
        assert child._watch(place) == "timed out"
        os.write(to_parent, b"\0")
        assert child._watch(place) == "passed"
    finally:
        os.close(child._from_child)
        os.close(to_parent)


@needs_all
def test_no_thread_is_left_that_gave_up_nothing():
    assert run_program("import os\nassert len(os.listdir('/proc/self/task')) == 1").passed


def test_a_program_sees_no_keys_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_API_KEY", "x")
    assert run_program("import os\nassert 'SECRET_API_KEY' not in os.environ").passed


@needs_calls
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


@needs_files
def test_a_program_that_may_write_writes_in_its_own_folder_only(tmp_path):
    inside = "open('f', 'w').write('x')\nassert open('f').read() == 'x'\nimport os\nos.remove('f')"
    assert run_program(inside, WRITING).result == "passed"
    outside = f"open({str(tmp_path / 'f')!r}, 'w')"
    assert re.match(
        "failed: (PermissionError|FileNotFoundError)", run_program(outside, WRITING).result
    )
    assert not list(tmp_path.iterdir())


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


@needs_files
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


# What programs try. Each program passes if it is refused everything, unless another end is named.
CALLS = """
import ctypes, errno, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
column = 0 if os.uname().machine == 'x86_64' else 1
def refused(numbers, *arguments):
    if numbers[column] >= 0:
        result = libc.syscall(numbers[column], *arguments)
        code = ctypes.get_errno()
        assert result == -1, f'done: {result}'
        assert code in (errno.EPERM, errno.ENOSYS), f'errno {code}'
def cannot(function, *arguments):
    try:
        result = function(*arguments)
    except OSError:
        return
    raise AssertionError(f'done: {result}')
"""
TRIED = {
    # The caller's secrets and files.
    "read the caller's environment": """
for process in {CALLER, VICTIM, os.getppid(), 1} - {os.getpid()}:
    for name in ('environ', 'cmdline', 'mem', 'maps', 'fd', 'root', 'root/etc'):
        cannot(open, f'/proc/{process}/{name}')
        cannot(os.listdir, f'/proc/{process}/{name}')
assert 'KEY' not in str(os.environ) + open('/proc/self/environ').read()
""",
    "read files": """
for path in (PRECIOUS, '/etc/passwd', '/etc/shadow', '/etc/hostname', os.path.expanduser('~root/.ssh/id_rsa'),
             '/proc/version', '/proc/sys', '/proc/keys', '/sys/kernel/mm', '/dev/mem', '/dev/kmsg',
             '/dev/tty', '/dev/shm', '/var/log', '/run', '/home', '/root', '/tmp/..', '/'):
    cannot(open, path)
    cannot(os.listdir, path)
cannot(os.link, PRECIOUS, 'linked')
if os.getppid() == 0:  # In namespaces of its own; elsewhere mounts and network are the system's.
    assert PRECIOUS not in open('/proc/self/mountinfo').read()
    assert len(open('/proc/self/net/dev').readlines()) <= 3
""",
    "change a file": """
for flags in (os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_CREAT):
    for path in (PRECIOUS, os.__file__, '/usr/new', '/dev/shm/new', '/new', '/etc/new', '/proc/self/exe',
                 '/proc/self/mem', '/proc/self/oom_score_adj', '/proc/self/root/etc/new'):
        cannot(os.open, path, flags)
        assert libc.open(path.encode(), flags, 0o644) == -1
for path in (PRECIOUS, os.__file__):
    cannot(os.chmod, path, 0o777); cannot(os.utime, path); cannot(os.remove, path)
    cannot(os.rename, path, path + '2'); cannot(os.truncate, path, 0); cannot(os.chown, path, 0, 0)
cannot(os.mkdir, '/usr/new')
""",
    "reach a file by its handle": """
handle = ctypes.create_string_buffer(struct.pack('I', 128), 136)
refused((303, 264), -100, PRECIOUS.encode(), handle, ctypes.byref(ctypes.c_int()), 0)
refused((304, 265), os.open('/usr', os.O_PATH), handle, os.O_WRONLY | os.O_TRUNC)
""",
    "lock or watch a file": """
file = os.open(os.__file__, os.O_RDONLY)
refused((73, 32), file, 2)
refused((253, -1)); refused((294, 26), 0); refused((300, 262), 0, 0)
for command, value in ((8, VICTIM), (10, 9), (15, 0), (1024, 1), (1026, 1), (1033, 1)):
    refused((72, 25), file, command, value)
""",
    # Other processes.
    "signal a process": """
for process in (VICTIM, CALLER, os.getpid(), 1, 0, -1):
    information = ctypes.create_string_buffer(struct.pack('iii', 9, 0, -1), 128)
    refused((62, 129), process, 9); refused((200, 130), process, 9); refused((234, 131), process, process, 9)
    refused((129, 138), process, 9, information); refused((297, 240), process, process, 9, information)
refused((434, 434), VICTIM, 0); refused((424, 424), 3, 9, 0, 0)
""",
    "set limits and priorities": """
import resource
cannot(resource.setrlimit, resource.RLIMIT_CORE, (0, 0))
for process in (VICTIM, CALLER, os.getpid(), 0):
    refused((302, 261), process, 7, struct.pack('QQ', 0, 0), None)
refused((302, 261), VICTIM, 7, None, ctypes.create_string_buffer(16))
refused((302, 261), 0, 7, ctypes.c_void_p(2**32), None)
refused((160, 164), 7, struct.pack('QQ', 0, 0))
refused((141, 140), 0, VICTIM, 19); refused((251, 30), 1, VICTIM, 0)
refused((144, 119), VICTIM, 3, bytes(4)); refused((142, 118), VICTIM, bytes(4))
refused((314, 274), VICTIM, bytes(48), 0); refused((203, 122), VICTIM, 8, bytes([1] + [0] * 7))
""",
    "look into a process": """
refused((101, 117), 16, VICTIM, 0, 0)
for numbers in ((310, 270), (311, 271)):
    refused(numbers, VICTIM, bytes(16), 1, bytes(16), 1, 0)
refused((438, 438), 3, 0, 0); refused((312, 272), VICTIM, CALLER, 0, 0, 0)
""",
    "share memory and messages": """
refused((29, 194), 0x51515151, 1 << 20, 0o1600); refused((68, 186), 0x51515151, 0o1600)
refused((64, 190), 0x51515151, 1, 0o1600); refused((240, 180), b'name', 0o102, 0o600, None)
refused((319, 279), b'name', 0); refused((447, 447), 0)
assert libc.shm_open(b'/proxytune', 0o102, 0o600) == -1
""",
    "start processes": """
cannot(os.fork); cannot(os.system, 'true')
import subprocess
cannot(subprocess.run, ['true'])
assert libc.fork() == -1 and libc.vfork() == -1 and libc.system(b'true') != 0
refused((56, 220), 17, 0, 0, 0, 0); refused((57, -1)); refused((58, -1))
for flags in (0x10000000, 0x20000000, 0x40000000, 0x20000, 0x10000 | 0x10000000):
    refused((56, 220), 17 | flags, 0, 0, 0, 0)
refused((435, 435), struct.pack('8Q', 0, 0, 0, 0, 17, 0, 0, 0), 64)
for path in ('/bin/true', sys.executable):
    refused((59, 221), path.encode(), None, None)
    refused((322, 281), os.open('/usr', os.O_PATH), b'bin/true', None, None, 0)
""",
    "reach the network and sockets": """
import socket
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16, 17, 38, 40):
    refused((41, 198), family, 1, 0); refused((53, 199), family, 1, 0, bytes(8))
for numbers in ((42, 203), (49, 200), (50, 201), (43, 202), (44, 206), (46, 211), (47, 212), (45, 207)):
    refused(numbers, 0, 0, 0)
cannot(socket.socket)
""",
    "change the system": """
for numbers in (
    (165, 40), (166, 39), (161, 51), (155, 41), (272, 97), (308, 268), (428, 428), (429, 429), (430, 430),
    (431, 431), (432, 432), (433, 433), (442, 442), (167, 224), (168, 225), (169, 142), (170, 161),
    (171, 162), (163, 89), (164, 170), (227, 112), (159, 171), (305, 266), (175, 105), (313, 273),
    (176, 106), (246, 104), (320, 294), (179, 60), (103, 116), (153, 58), (172, -1), (173, -1), (154, -1),
):
    refused(numbers, 0, 0, 0, 0, 0)
""",
    "use what kernels are attacked by": """
for numbers in (
    (425, 425), (426, 426), (427, 427), (321, 280), (298, 241), (250, 219), (248, 217), (249, 218),
    (323, 282), (317, 277), (444, 444), (445, 445), (446, 446), (135, 92), (206, 0), (216, 234),
    (237, 235), (256, 238), (279, 239), (329, 288), (275, 76), (278, 75), (276, 77), (425 + 2**30, -1),
):
    refused(numbers, 0, 0, 0, 0, 0)
for option in (1, 4, 22, 23, 24, 35, 36, 38, 47, 0x59616D61):
    refused((157, 167), option, 1, 0, 0, 0)
for request in (0x5412, 0x5401 | 2**31, 0x541C, 0x5603, 0xC0086601):
    refused((16, 29), 0, request, b'x')
""",
    "change its user": """
for numbers in ((105, 146), (106, 144), (113, 145), (114, 143), (117, 147), (119, 149), (122, 151)):
    refused(numbers, 0, 0, 0)
refused((126, 91), struct.pack('Ii', 0x20080522, 0), bytes(24)); refused((116, 159), 0, 0)
""",
}  # fmt: skip
# Any call that is not on the list, and those of another ABI.
EVERY_OTHER = """
allowed = ALLOWED
for number in [*range(1024), *range(2**30, 2**30 + 600)]:
    # uretprobe and uprobe pass filters by, and kill whoever calls them for nothing.
    if number not in allowed and number not in (335, 336):
        refused((number, number), 0, 0, 0, 0, 0, 0)
"""
VARIANTS = {
    "root": ("root",),
    "ordinary user": ("ordinary",),
    "root without namespaces": ("root", "namespaces", "user"),
    "ordinary user without namespaces": ("ordinary", "namespaces"),
}


def everything_tried() -> dict[str, dict[str, object]]:
    """The programs by name, those that may write included."""
    column = 0 if platform.machine() == "x86_64" else 1
    tables = (guarded._ALLOWED, guarded._WRITING)
    allowed = {numbers[column] for table in tables for numbers in table.values()}
    allowed |= {numbers[column] for numbers, _ in guarded._LIMITED.values()}
    every_other = EVERY_OTHER.replace("ALLOWED", repr(sorted(allowed)))
    programs = {**TRIED, "every other system call": every_other}
    return {
        f"{name}{', in a folder' * may_write}": {
            "source": CALLS + source,
            "timeout_s": 20.0,
            "may_write": may_write,
        }
        for name, source in programs.items()
        for may_write in (False, True)
    }


@functools.cache
def tried(variant: str) -> dict[str, object]:
    """What became of all programs and of what was around them."""
    return ran(VARIANTS[variant][0], list(everything_tried().values()), *VARIANTS[variant][1:])


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    needed = [each for each in PROMISES if each not in VARIANTS[request.param][1:]]
    lacking = [each for each in needed if each in missing_promises()]
    if lacking:
        pytest.skip(f"this system cannot promise {lacking}")
    if request.param.startswith("root") and os.geteuid() != 0:
        pytest.skip("this user is not root")
    yield request.param


@pytest.mark.parametrize("name", everything_tried())
def test_a_program_is_refused(variant, name):
    results = dict(zip(everything_tried(), tried(variant)["results"], strict=True))
    assert results[name] == "passed"


def test_programs_leave_alone_what_is_around_them(variant):
    done = tried(variant)
    assert done["user"] == (0 if variant.startswith("root") else done["user"])
    assert done["after"] == done["before"]
    assert done["before"]["victim"] is None


def test_a_program_runs_as_a_user_who_owns_nothing_and_alone(variant):
    source = (
        "import os\nassert 0 not in (*os.getresuid(), *os.getresgid())\nassert not os.getgroups()"
    )
    if "without" not in variant:
        source += "\nassert (os.getpid(), os.getppid()) == (1, 0)"
    elif variant.startswith("root"):
        pytest.skip("here nobody but root can read Python itself")
    done = ran(VARIANTS[variant][0], [{"source": source}], *VARIANTS[variant][1:])
    assert done["results"] == ["passed"]


# The filter ------------------------------------------------------------------------------------------------


def decided(machine: str, number: int, *arguments: int, may_write: bool = False) -> int:
    """What the filter answers to a call: 0 if it is allowed, otherwise an error number."""
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    call = struct.pack("IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    lines = list(struct.iter_unpack("HBBI", kernel_filter(machine, may_write=may_write)))
    place, value = 0, 0
    while True:
        kind, if_true, if_false, operand = lines[place]
        place += 1
        if kind == 0x20:
            value = struct.unpack_from("I", call, operand)[0]
        elif kind == 0x54:
            value &= operand
        elif kind in (0x15, 0x35):
            place += (
                if_true if (value == operand if kind == 0x15 else value >= operand) else if_false
            )
        else:
            assert kind == 0x06
            return 0 if operand == 0x7FFF0000 else operand & 0xFFFF


@pytest.mark.parametrize(
    ("machine", "header", "prefix"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "__NR_"),
        ("aarch64", "/usr/include/asm-generic/unistd.h", "__NR(?:3264)?_"),
    ],
)
def test_the_filter_knows_every_calls_number(machine, header, prefix):
    if not Path(header).is_file():
        pytest.skip("this system has no header of its kernel's")
    column = ("x86_64", "aarch64").index(machine)
    found = re.findall(rf"#define {prefix}(\\w+)\\s+(\\d+)", Path(header).read_text())
    theirs = {name: int(number) for name, number in found}
    # The generic table names two calls by what they are called where a word has 64 bits.
    theirs.setdefault("newfstatat", theirs.get("fstatat", -1))
    tables = (guarded._ALLOWED, guarded._WRITING)
    ours = {name: numbers[column] for table in tables for name, numbers in table.items()}
    ours |= {name: numbers[column] for name, (numbers, _) in guarded._LIMITED.items()}
    newest = max(theirs.values())
    for name, number in ours.items():
        if number <= newest:
            assert theirs.get(name, -1) == number, name


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("may_write", [False, True])
def test_the_filter_allows_only_some_uses_of_some_calls(machine, may_write):
    column = ("x86_64", "aarch64").index(machine)
    answer = functools.partial(decided, machine, may_write=may_write)
    clone, limits = (56, 220)[column], (302, 261)[column]
    thread = 0x3D0F00  # As the C library starts one.
    assert answer(clone, thread) == 0
    assert answer(clone, 17) == answer(clone, thread | 0x10000000) == errno.EPERM
    assert answer(limits, 0, 7, 0, 2**40) == 0
    assert answer(limits, 0, 7, 2**40) == answer(limits, 0, 7, 8) == errno.EPERM
    assert answer(limits, 1) == errno.EPERM
    assert answer(435) == answer(437) == answer(1000) == errno.ENOSYS
    assert answer(2**30) == answer(2**30 + 41) == errno.EPERM
    openat = (257, 56)[column]
    assert answer(openat, 2**32 - 100, 0, os.O_RDONLY | 0o2000000) == 0
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND):
        assert answer(openat, 2**32 - 100, 0, flags) == (0 if may_write else errno.EPERM)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("may_write", [False, True])
def test_the_filters_jumps_stay_within_it(machine, may_write):
    lines = list(struct.iter_unpack("HBBI", kernel_filter(machine, may_write=may_write)))
    assert len(lines) < 4096
    for place, (kind, if_true, if_false, _) in enumerate(lines):
        if kind in (0x15, 0x35):
            assert place + 1 + max(if_true, if_false) < len(lines)
    assert lines[-1] == (0x06, 0, 0, 0x00050000 | errno.EPERM)  # What is not named is refused.


# Limits ----------------------------------------------------------------------------------------------------


@needs_all
@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("for i in range(20):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(10**7))",
         "OSError: .*No space"),
        ("for i in range(5000): open(f'f{i}', 'w').close()", "OSError: .*No space"),
        ("open('f', 'wb').truncate(2**30)", "OSError: .*too large"),
        ("import threading, time\nfor _ in range(10000):\n"
         "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
         "RuntimeError: can't start"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("import mmap\nx = [mmap.mmap(-1, 2**26) for _ in range(64)]", "OSError: .*Cannot allocate"),
        ("import os\nx = [os.pipe() for _ in range(64)]", "OSError: .*Too many open files"),
    ],
)  # fmt: skip
def test_a_program_does_not_get_more_than_its_limits(program, result):
    limits = Limits(timeout_s=10.0, memory_bytes=2**31, may_write=True)
    assert re.match(f"failed: {result}", run_program(program, limits).result)


@needs_calls
def test_a_crash_leaves_no_core_dump():
    # With a limit of 0 bytes the kernel still hands the memory to a program that handles crashes.
    assert run_program(
        "import resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (1, 1)"
    ).passed


@needs_all
def test_a_program_with_threads_that_ignores_alarms_ends_with_all_of_them():
    program = (
        "import signal, threading\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
        "def spin():\n    while True: pass\n"
        "for _ in range(8): threading.Thread(target=spin).start()\nspin()"
    )
    before = _guards()
    assert run_program(program, SHORT).result == "timed out"
    assert not _guards() - before


def _guards() -> set[str]:
    """The processes that run programs."""
    found = set()
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(guarded.__file__) in each.read_bytes():
                found.add(each.parent.name)
    return found


@needs_all
def test_a_program_ends_with_its_caller_whenever_that_ends():
    before = _guards()
    for delay_s in (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5):
        caller = subprocess.Popen(
            [sys.executable, "-c", "from proxytune.tasks.sandbox import *\nprint(flush=True)\n"
             "while True: run_program('while True: pass', Limits(timeout_s=60))"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert caller.stdout is not None
        caller.stdout.readline()
        time.sleep(delay_s)
        caller.kill()
        caller.wait()
        caller.stdout.close()
    left = _guards() - before
    end = time.perf_counter() + 20
    while left and time.perf_counter() < end:
        time.sleep(0.05)
        left &= _guards()
    assert not left


@needs_all
@pytest.mark.parametrize(
    ("library", "program"),
    [
        ("numpy", "import numpy as np\na = np.random.rand(300, 300)\nassert (a @ a).shape == (300, 300)"),
        ("pandas", "import pandas as pd\npd.DataFrame({'a': [1, 2]}).to_csv('f')\n"
                   "assert len(pd.read_csv('f')) == 2\npd.Timestamp.now(tz='Europe/Berlin')"),
        ("matplotlib", "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.savefig('a.png')"),
        ("torch", "import torch\ntorch.set_num_threads(4)\nm = torch.nn.Linear(3, 3)\n"
                  "m(torch.ones(1, 3)).sum().backward()\ntorch.save(m.state_dict(), 'f')\ntorch.load('f')"),
        ("scipy", "import scipy.optimize\nscipy.optimize.minimize(lambda x: x**2, 1.0)"),
        ("sklearn", "from sklearn.linear_model import LinearRegression\n"
                    "LinearRegression().fit([[0], [1]], [0, 1])"),
        ("tensorflow", "import tensorflow as tf\nassert int(tf.reduce_sum([1, 2])) == 3"),
        ("sqlite3", "import sqlite3\nc = sqlite3.connect('f')\nc.execute('create table t(a)')\nc.commit()"),
        ("zoneinfo", "import zoneinfo, tempfile, shutil\nzoneinfo.ZoneInfo('Europe/Berlin')\n"
                     "d = tempfile.mkdtemp()\nopen(d + '/f', 'w').close()\nshutil.copyfile(d + '/f', 'g')\n"
                     "shutil.rmtree(d)\nopen('/dev/null', 'w').write('x')"),
    ],
)  # fmt: skip
def test_libraries_of_benchmarks_work(library, program):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    limits = Limits(timeout_s=120.0, memory_bytes=2**35, may_write=True)
    assert run_program(program, limits).result == "passed"


@needs_all
def test_python_itself_may_be_below_tmp(tmp_path, monkeypatch):
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "own")], check=True
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "own/bin/python"))
    program = (
        f"import sys\nassert sys.prefix == {str(tmp_path / 'own')!r}\n"
        "open(sys.prefix + '/pyvenv.cfg').close()\nopen('f', 'w').close()"
    )
    assert run_program(program, WRITING).result == "passed"


# Systems that cannot keep every promise --------------------------------------------------------------------


@pytest.fixture
def weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without namespaces and Landlock."""
    monkeypatch.setattr(sandbox, "missing_promises", lambda: ("namespaces", "files"))
    for function in (run_program, run_programs):
        monkeypatch.setitem(function.__kwdefaults__, "allow_weaker", False)


def test_what_a_system_cannot_promise_is_named_and_needs_consent(weaker):
    with pytest.raises(UnsupportedModel, match="--allow-weaker-sandbox") as refused:
        run_program("x = 1")
    for name, text in PROMISES.items():
        assert (text in str(refused.value)) == (name in ("namespaces", "files"))
    with pytest.raises(UnsupportedModel, match="--allow-weaker-sandbox"):
        run_programs(["x = 1"])
    with pytest.raises(UnsupportedModel, match="--allow-weaker-sandbox"):
        CodeRunner(HumanEval())
    judge = CodeRunner(HumanEval(), allow_weaker_sandbox=True)
    assert judge.name.endswith("in a sandbox without namespaces, files")


def test_a_program_that_may_write_anywhere_does_not_run_whatever_is_allowed(weaker):
    with pytest.raises(UnsupportedModel, match="one folder"):
        run_program("x = 1", WRITING, allow_weaker=True)


def test_missing_promises_are_found_by_trying(monkeypatch):
    asked_without = []

    def answer(program: str, limits: Limits, missing: tuple[str, ...]) -> dict[str, str]:
        asked_without.append(missing)
        lacking = [each for each in ("namespaces", "files") if each not in missing]
        if lacking:
            return {"missing": lacking[0], "why": "unshare: Operation not permitted"}
        return {"result": "passed" if "verdict" in missing else "timed out"}

    monkeypatch.setattr(sandbox, "_answer", answer)
    monkeypatch.setattr(sys, "platform", "linux")
    assert missing_promises.__wrapped__() == ("namespaces", "files", "verdict")
    assert asked_without[0] == ()
    monkeypatch.setattr(sandbox, "_answer", lambda *_: {"result": "failed: no"})
    with pytest.raises(UnsupportedModel, match="none can be judged"):
        missing_promises.__wrapped__()


@needs_all
@pytest.mark.parametrize("promise", PROMISES)
def test_a_program_runs_with_each_barrier_alone_missing(promise):
    without = {"namespaces": ("namespaces", "user")}.get(promise, (promise,))
    assert sandbox._answer("assert 1 + 1 == 2", Limits(), without) == {"result": "passed"}
    assert sandbox._answer("1 / 0", Limits(), without)["result"].startswith("failed: ZeroDivision")


def test_a_barrier_that_fails_this_time_is_reported_as_that(monkeypatch):
    monkeypatch.setattr(sandbox, "missing_promises", lambda: ())
    why = {"missing": "namespaces", "why": "unshare: No space left on device"}
    monkeypatch.setattr(sandbox, "_answer", lambda *_: why)
    with pytest.raises(UnsupportedModel, match="this time: unshare: No space left"):
        run_program("x = 1")


def test_the_commands_name_what_is_missing_before_anything_runs(weaker, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"task_id": "HumanEval/0", "completion": "", "passed": True}) + "\n")
    grade = ["grade", "humaneval", str(rows)]
    run = CliRunner().invoke(app, [*grade, "--run-code", "--data-dir", str(tmp_path)])
    assert run.exit_code == 2
    assert "What is missing" in run.stderr and "--allow-weaker-sandbox" in run.stderr
    run = CliRunner().invoke(app, [*grade, "--allow-weaker-sandbox"])
    assert run.exit_code == 2
    assert "is for --run-code" in run.stderr
    with pytest.raises(InvalidRequest, match="is for --run-code"):
        EvalOptions(("humaneval",), allow_weaker_sandbox=True)
