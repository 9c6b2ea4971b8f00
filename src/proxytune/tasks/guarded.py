"""Runs one untrusted program within limits. `sandbox.py` starts this file as a separate process.

It reads the program and its limits from stdin and writes to stdout how the program ended, both in
the format of `marshal`, which takes no time to import. The program runs in a child; this process stays
outside, watches the clock and decides.

The child gives up what the program must not have, one barrier behind the other: namespaces of its own with a
read-only view of Python and the system's libraries; a user ID of its own if this process is root; Landlock;
limits on memory, time, threads, file sizes and open files; an audit hook that refuses Python's ways to write,
to start processes and to reach the network; and a filter (seccomp) that allows the system calls of a
computation and refuses all others. This file imports nothing from the package.

The verdict does not come from the program, which could write anything. Before and after the program, the
child's main thread waits in a call that the same frame makes, so at the same depth of the stack. The kernel
reports in `/proc/PID/syscall` where a thread waits. A program has passed when its main thread is back at the
very place where it was before. The program's own Python code always runs deeper; only native code, with
ctypes for instance, could build such a stack.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import marshal
import os
import select
import signal
import struct
import sys
import time
import types

TYPE_CHECKING = False
if TYPE_CHECKING:  # Each import takes time before every program.
    from collections.abc import Iterator
    from typing import Any

LONGEST_MESSAGE = 300
FOLDER_BYTES, FOLDER_FILES = 2**26, 4096
"""What a program that may write can keep in its folder."""
MAX_THREADS = 512
_OWN_USERS = 1_900_000_000
"""User IDs from here on belong to no one (systemd's list of ranges); each run as root takes one."""

# What Python and the system's libraries need to read.
_READABLE = (
    "/usr", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives",
    "/etc/localtime", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu",
    "/sys/devices/system/node", "/sys/bus/cpu", "/sys/bus/node", "/dev/null", "/dev/zero", "/dev/random",
    "/dev/urandom",
)  # fmt: skip

# The system calls that a program may make, with their numbers on Linux for x86_64 and aarch64; -1 if there
# is none.
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80),
    "lstat": (6, -1), "poll": (7, -1), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "access": (21, -1), "pipe": (22, -1), "select": (23, -1),
    "sched_yield": (24, 124), "mremap": (25, 216), "msync": (26, 227), "mincore": (27, 232),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, -1), "pause": (34, -1), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, -1), "setitimer": (38, 103), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160), "fsync": (74, 82), "fdatasync": (75, 83), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "readlink": (89, -1), "umask": (95, 166),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, -1), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    "statfs": (137, 43), "fstatfs": (138, 44), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "gettid": (186, 178), "time": (201, -1), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "epoll_create": (213, -1), "getdents64": (217, 61),
    "set_tid_address": (218, 96), "restart_syscall": (219, 128), "fadvise64": (221, 223),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "exit_group": (231, 94), "epoll_wait": (232, -1), "epoll_ctl": (233, 21), "newfstatat": (262, 79),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "epoll_pwait": (281, 22), "eventfd": (284, -1), "eventfd2": (290, 19),
    "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59), "preadv": (295, 69),
    "pwritev": (296, 70), "getcpu": (309, 168), "getrandom": (318, 278), "membarrier": (324, 283),
    "statx": (332, 291), "rseq": (334, 293), "close_range": (436, 436), "faccessat2": (439, 439),
    "epoll_pwait2": (441, 441), "futex_waitv": (449, 449),
}  # fmt: skip
_WRITING = {
    "open": (2, -1), "ftruncate": (77, 46), "rename": (82, -1), "mkdir": (83, -1), "rmdir": (84, -1),
    "creat": (85, -1), "link": (86, -1), "unlink": (87, -1), "symlink": (88, -1), "openat": (257, 56),
    "mkdirat": (258, 34), "unlinkat": (263, 35), "renameat": (264, 38), "linkat": (265, 37),
    "symlinkat": (266, 36), "fallocate": (285, 47), "renameat2": (316, 276),
}  # fmt: skip
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Calls of which only some uses are allowed: tests of 32-bit words of the arguments (number of the word, mask,
# allowed values). A thread but no process and no namespace; this process's own limits, and only to read them.
_THREAD, _NEW_NAMESPACES, _ALL = 0x10000, 0x7E020000, 0xFFFFFFFF
_Test = tuple[int, int, tuple[int, ...]]
_LIMITED: dict[str, tuple[tuple[int, int], tuple[_Test, ...]]] = {
    "clone": ((56, 220), ((0, _THREAD | _NEW_NAMESPACES, (_THREAD,)),)),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
    "ioctl": ((16, 29), ((2, _ALL, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),)),
    # Duplicates, flags and locks, but no owner, who would get signals.
    "fcntl": ((72, 25), ((2, _ALL, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)),)),
    # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA.
    "prctl": ((157, 167), ((0, _ALL, (15, 16, 0x53564D41)),)),
    "prlimit64": ((302, 261), ((0, _ALL, (0,)), (4, _ALL, (0,)), (5, _ALL, (0,)))),
    "sched_setaffinity": ((203, 122), ((0, _ALL, (0,)),)),
}
_READING: dict[str, tuple[tuple[int, int], tuple[_Test, ...]]] = {
    "open": (_WRITING["open"], ((2, _WRITE_FLAGS, (0,)),)),
    "openat": (_WRITING["openat"], ((4, _WRITE_FLAGS, (0,)),)),
}
# Calls from here on are newer than what libraries take for granted. Where they are unknown, callers use older
# ones; the arguments of some (clone3, openat2) a filter cannot inspect.
_FIRST_NEW = 424
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000

_END = "os._exit"
"""Stands in the code of `_stage` for the function, as a constant that the program cannot replace."""

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
# Control groups, host name, System V and POSIX message queues, processes, network.
_NAMESPACES = 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000


class MissingPromise(Exception):
    """This machine cannot put up a barrier.

    Args:
        promise: Its name, a key of `sandbox.PROMISES`.
        why: What went wrong.
    """

    def __init__(self, promise: str, why: object) -> None:
        super().__init__(promise, str(why))


@contextlib.contextmanager
def _promised(promise: str) -> Iterator[None]:
    try:
        yield
    except (OSError, AttributeError, KeyError) as error:
        raise MissingPromise(promise, error) from error


def _end_with(caller: int) -> None:
    """Let the end of the caller end this process, where the system can."""
    if sys.platform == "linux":
        _call(ctypes.CDLL(None, use_errno=True).prctl, 1, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != caller:  # It had ended before.
            os._exit(1)


def _call(function: Any, *arguments: Any) -> int:
    ctypes.set_errno(0)
    result: int = function(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}: {os.strerror(code)}")
    return result


def kernel_filter(machine: str, *, may_write: bool) -> bytes:
    """Return the seccomp program for an architecture of `os.uname`, in the kernel's format.

    Raises:
        KeyError: The architecture's system call numbers are not known here.
    """
    column, architecture = _ARCHITECTURES[machine]
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERROR | errno.EPERM)
    lines = [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, architecture), refuse, (_LOAD, 0, 0, 0)]
    # Calls of another ABI (x32) have numbers from here on.
    lines += [(_JUMP_AT_LEAST, 0, 1, 0x40000000), refuse]

    def when(number: int, *then: tuple[int, int, int, int]) -> None:
        """Run these instructions for this call; the last of them returns."""
        if number >= 0:
            lines.append((_JUMP_EQUAL, 0, len(then), number))
            lines.extend(then)

    for numbers in (*_ALLOWED.values(), *(_WRITING.values() if may_write else ())):
        when(numbers[column], allow)
    for numbers, tests in (*_LIMITED.values(), *(() if may_write else _READING.values())):
        then: list[tuple[int, int, int, int]] = []
        for word, mask, values in tests:
            then += [(_LOAD, 0, 0, 16 + 4 * word), (_AND, 0, 0, mask)]
            then += [(_JUMP_EQUAL, len(values) - at, 0, v) for at, v in enumerate(values)]
            then.append(refuse)
        when(numbers[column], *then, allow)
    lines += [(_JUMP_AT_LEAST, 0, 1, _FIRST_NEW), (_RETURN, 0, 0, _ERROR | errno.ENOSYS), refuse]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def enter_namespaces() -> None:
    """Leave the namespaces of the caller, except that of mounts; the next child is alone with its threads.

    Raises:
        MissingPromise: The system does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    with _promised("namespaces"):
        libc = ctypes.CDLL(None, use_errno=True)
        _call(libc.unshare, _NAMESPACES | (_NEW_USER if user else 0))
        if user:
            for name, content in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(content)


def readable() -> tuple[list[str], list[tuple[str, str]]]:
    """Return the files and folders that a program may read, and symbolic links that lead to them."""
    prefixes = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    wanted = sorted({each for each in (*_READABLE, *prefixes) if os.path.exists(each)})
    roots: list[str] = []
    for real in sorted({os.path.realpath(each) for each in wanted}):
        if not any(real.startswith(root + "/") for root in roots):
            roots.append(real)
    links = [(each, os.path.realpath(each)) for each in wanted if os.path.realpath(each) != each]
    return roots, links


def make_view(folder: str, *, may_write: bool) -> None:
    """Replace the view of files: read-only, only what `readable` names, and one empty folder.

    Raises:
        OSError: The system does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    roots, links = readable()

    def mount(
        source: str | None, target: str, kind: str | None, flags: int, data: str = ""
    ) -> None:
        texts = (None if text is None else text.encode() for text in (source, target, kind))
        _call(libc.mount, *texts, ctypes.c_ulong(flags), data.encode())

    _call(libc.unshare, _NEW_MOUNTS)
    recursive, private, bind = 0x4000, 0x40000, 0x1000
    no_set_user, no_devices, no_execution, detached = 2, 4, 8, 2
    mount(None, "/", None, recursive | private)
    mount("tmpfs", "/tmp", "tmpfs", no_set_user, "mode=755,size=1m")
    os.chdir("/tmp")
    os.mkdir("old")
    # The old root stays reachable, without the mount on its /tmp, until everything is bound.
    _call(libc.syscall, 155 if os.uname().machine == "x86_64" else 41, b".", b"old")
    os.chdir("/")
    for root in roots:
        if os.path.isdir("/old" + root):
            os.makedirs(root, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(root), exist_ok=True)
            os.close(os.open(root, os.O_CREAT, 0o644))
        mount("/old" + root, root, None, bind | recursive)
    for link, target in links:
        if not os.path.lexists(link):
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink(target, link)
    with contextlib.suppress(OSError):  # Refused where parts of the system's /proc are hidden.
        # Of its own /proc, in which it has the ID 1, the process sees itself. Tensorflow cannot do without.
        os.makedirs("/proc/1")
        os.symlink("1", "/proc/self")
        mount("proc", "/old", "proc", no_set_user | no_devices | no_execution)
        mount("/old/1", "/proc/1", None, bind)
        _call(libc.umount2, b"/old", detached)
    _call(libc.umount2, b"/old", detached)
    os.rmdir("/old")
    os.makedirs(folder, exist_ok=True)
    attributes = struct.pack("QQQQ", 1 | no_set_user, 0, 0, 0)  # 1: read-only.
    _call(libc.syscall, 442, -100, b"/", 0x8000, attributes, ctypes.c_size_t(len(attributes)))
    if may_write:
        most = f"mode=777,size={FOLDER_BYTES},nr_inodes={FOLDER_FILES}"
        mount("tmpfs", folder, "tmpfs", no_set_user | no_devices | no_execution, most)


def confine_files(folder: str, *, may_write: bool) -> int:
    """Allow reading what `readable` names and changes below one folder only, with Landlock.

    Returns:
        The version of Landlock. Before 3, files outside could still be truncated.

    Raises:
        OSError: This kernel has no Landlock.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = _call(libc.syscall, 444, None, ctypes.c_size_t(0), 1)
    everything = (1 << (13, 14, 15, 15)[min(version, 4) - 1]) - 1 if version < 5 else 2**16 - 1
    reading, of_a_file = 0b1100, 0b0100
    # TCP from version 4 on, abstract sockets and signals from version 6 on.
    words = (everything, 0b11, 0b11)[: 1 if version < 4 else 2 if version < 6 else 3]
    handled = struct.pack(f"{len(words)}Q", *words)
    ruleset = _call(libc.syscall, 444, handled, ctypes.c_size_t(len(handled)), 0)
    for path in (*readable()[0], os.path.realpath("/proc/self"), folder):
        allowed = reading if os.path.isdir(path) else of_a_file
        if path == folder and may_write:
            allowed = everything & ~0b1  # No execution.
        elif path == os.devnull and may_write:
            allowed |= 0b10  # Some libraries open it for writing when they are imported.
        if not os.path.exists(path):
            continue
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _call(libc.syscall, 445, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    _call(libc.syscall, 446, ruleset, 0)
    os.close(ruleset)
    return version


def _free_user() -> int:
    user = _OWN_USERS + os.getpid()
    try:
        os.setegid(user)
    except OSError:  # In a container that knows fewer users.
        return 65534
    os.setegid(0)
    return user


def drop_root(user: int) -> None:
    """Become a user who owns nothing.

    Raises:
        OSError: The system does not allow it, or Python's own files cannot be read afterwards.
    """
    os.setgroups([])
    os.setresgid(user, user, user)
    saved = os.getresuid()
    os.setresuid(user, user, saved[2])
    if not os.access(os.__file__, os.R_OK, effective_ids=True):
        os.setresuid(*saved)
        raise PermissionError(errno.EACCES, f"user {user} cannot read {os.__file__}")
    os.setresuid(user, user, user)


def filter_calls(*, may_write: bool) -> None:
    """Refuse system calls that a program must not make, for good.

    Raises:
        OSError: This kernel takes no filter.
        KeyError: This architecture's calls are not known here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    program = kernel_filter(os.uname().machine, may_write=may_write)
    buffer = ctypes.create_string_buffer(program, len(program))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))

    filter_ = Filter(len(program) // 8, ctypes.addressof(buffer))
    _call(libc.prctl, 22, 2, ctypes.byref(filter_), 0, 0)


def guard_with_limits(
    memory_bytes: int, cpu_s: int, file_bytes: int, max_threads: int | None
) -> None:
    """Set the resource limits that every Unix has; None for no limit on threads."""
    import resource

    wanted = [
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        # Not 0, with which Linux still hands a core dump to a program of the system's.
        (resource.RLIMIT_CORE, 1),
        (resource.RLIMIT_AS, memory_bytes),
    ]
    if max_threads is not None:
        wanted.append((resource.RLIMIT_NPROC, max_threads))
    for which, most in wanted:
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on address space.
            resource.setrlimit(which, (most, most))


_REFUSED = (
    "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn",
    "os.system", "os.startfile", "subprocess.Popen", "pty.spawn", "socket.", "os.chmod", "os.chown",
    "signal.pthread_kill", "syslog.", "ftplib.", "smtplib.", "imaplib.", "poplib.", "telnetlib.",
    "urllib.Request", "http.client.", "resource.setrlimit", "resource.prlimit",
    # A debugger can move a frame past the tests.
    "sys.settrace", "sys.setprofile", "sys.monitoring.",
)  # fmt: skip
_CHANGING = (
    "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.",
    "tempfile.",
)  # fmt: skip


def guard_with_hook(*, may_write: bool, is_held: bool) -> None:
    """Refuse Python's own ways to write, to start processes and to reach the network.

    `is_held` says whether the kernel refuses the same. Only then may foreign code be called with ctypes.
    """
    names = (*_REFUSED, *(() if may_write else _CHANGING), *(() if is_held else ("ctypes.",)))

    def hook(
        event: str,
        arguments: tuple[Any, ...],
        refused: tuple[str, ...] = names,
        may_write: bool = may_write,
    ) -> None:
        if event.startswith(refused):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and not may_write:
            mode, flags = arguments[1], arguments[2] or 0
            writes = isinstance(mode, str) and set(mode) & set("wax+")
            if writes or (mode is None and isinstance(flags, int) and flags & _WRITE_FLAGS):
                raise PermissionError("writing files is not allowed here")

    # Out of the sight of the `gc` module, or a program could give it other code.
    ctypes.pythonapi.PyObject_GC_UnTrack(ctypes.py_object(hook))
    sys.addaudithook(hook)


def _give_up_rights(task: dict[str, Any], user: int) -> None:
    """Put up every barrier except those that the task leaves out."""
    without, folder, may_write = task["without"], task["folder"], task["may_write"]
    is_linux = sys.platform == "linux"
    libc = ctypes.CDLL(None, use_errno=True)
    # The system counts all threads of a user, who is this program alone only in these cases.
    is_alone = bool(user) or "namespaces" not in without
    file_bytes = 2**24 if may_write else 0
    guard_with_limits(
        task["memory_bytes"], task["cpu_s"], file_bytes, MAX_THREADS if is_alone else None
    )
    if is_linux:
        _call(libc.prctl, 38, 1, 0, 0, 0)  # No new privileges, ever.
    if "namespaces" not in without:
        with _promised("namespaces"):
            make_view(folder, may_write=may_write)
    os.chdir(folder)
    if user:
        with _promised("user"):
            drop_root(user)
    if is_linux:
        # No capabilities, whoever this is: a header, and two times three sets.
        _call(libc.capset, struct.pack("Ii", 0x20080522, 0), bytes(24))
        _call(libc.prctl, 1, signal.SIGKILL, 0, 0, 0)  # The end of the parent ends this process.
        _call(libc.prctl, 4, 1, 0, 0, 0)  # The parent may look, as the same user.
    if "files" not in without:
        version = 0
        with contextlib.suppress(OSError):
            version = confine_files(folder, may_write=may_write)
        if "namespaces" in without and version < 3:
            raise MissingPromise("files", "this kernel has no Landlock of version 3 or later")
    if "calls" not in without:
        with _promised("calls"):
            filter_calls(may_write=may_write)
    guard_with_hook(may_write=may_write, is_held="calls" not in without)


def _have_had_a_thread() -> None:
    """Start and end a thread: from then on, the C library calls the kernel from another place."""
    import _thread

    _thread.start_new_thread(int, ())
    end = time.monotonic() + 5
    with _promised("verdict"):
        # What this process gives up next, it gives up for its own thread alone.
        while len(os.listdir("/proc/self/task")) > 1:
            if time.monotonic() > end:
                raise OSError("a thread that does nothing does not end")
            time.sleep(0.0001)


def _run(task: dict[str, Any], user: int, to_parent: int, gate: int) -> None:
    """Run the program in this process, the child; never returns."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    first, last = sorted((to_parent, gate))
    os.closerange(3, first)
    os.closerange(first + 1, last)
    os.closerange(last + 1, 2**12)
    try:
        if "verdict" not in task["without"]:
            _have_had_a_thread()
        _give_up_rights(task, user)
    except MissingPromise as error:
        os.write(to_parent, b"!" + marshal.dumps(error.args))
        os._exit(1)
    stage = _stage.__code__
    constants = tuple(os._exit if each == _END else each for each in stage.co_consts)
    types.FunctionType(stage.replace(co_consts=constants), globals())(task, to_parent, gate)


def _stage(task: dict[str, Any], to_parent: int, gate: int) -> None:
    """Wait, run the program and wait again, if it got there; never returns.

    The program can change every variable that this frame can see. What decides is out of its reach: the order
    of these lines and a constant of their code. `map` keeps the program from running in this function's own
    frame of the C stack.
    """
    write, read = os.write, os.read
    write(to_parent, b"\0")
    if not read(gate, 1):  # The parent ended before its end would have ended this process.
        os._exit(1)
    try:
        next(map(_attempt, (task["program"],), (to_parent,)))
    except:  # noqa: E722, a name could have been changed
        end: Any = "os._exit"
        end(1)
    write(to_parent, b"\0")
    read(gate, 1)


def _attempt(program: str, to_parent: int) -> None:
    """Run the program, and report how it failed."""
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), {"__name__": "__main__"})
    except BaseException as error:  # The program's own exceptions, including SystemExit.
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        message = f"\0failed: {kind}{error}"[: LONGEST_MESSAGE + 1]
        os.write(to_parent, message.encode("utf-8", "replace"))
        raise


def _place(process: int, gate: int) -> tuple[str, str] | None:
    """Return stack pointer and program counter of a main thread that waits at the gate; None otherwise."""
    read = str(_ALLOWED["read"][_ARCHITECTURES[os.uname().machine][0]])
    with open(f"/proc/{process}/syscall") as file:
        words = file.read().split()
    if len(words) != 9 or words[0] != read or int(words[1], 16) != gate:
        return None
    return words[7], words[8]


class _Child:
    """The process that runs the program, as its parent sees it."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._timeout_s = task["timeout_s"]
        self._is_checked = "verdict" not in task["without"]
        self._is_over = False
        self._from_child, to_parent = os.pipe()
        self._gate, open_gate = os.pipe()
        user = 0
        if os.geteuid() == 0 and "user" not in task["without"]:
            user = _free_user()
            if "namespaces" in task["without"]:
                with _promised("user"):
                    os.chown(task["folder"], user, user)
        self._process = os.fork()
        if self._process == 0:
            try:
                _run(task, user, to_parent, self._gate)
            finally:
                os._exit(1)
        os.close(to_parent)
        self._open_gate = open_gate
        if user:  # Root in a container may not be allowed to look at other users' processes.
            with contextlib.suppress(OSError):
                os.setegid(user)
                os.seteuid(user)
        _end_with(task["caller"])  # Now, because a change of user would undo it.

    def result(self) -> str:
        """Let the program run, and return how it ended.

        Raises:
            MissingPromise: The program did not run, because a barrier could not be put up.
        """
        try:
            said = os.read(self._from_child, 2**12)
            if said.startswith(b"!"):
                raise MissingPromise(*marshal.loads(said[1:]))
            if said != b"\0":
                raise MissingPromise("verdict", "the process ended before its program began")
            start = None
            if self._is_checked:
                with _promised("verdict"):
                    start = self._first_place()
            os.write(self._open_gate, b"\0")
            return self._watch(start)
        finally:
            if not self._is_over:
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)

    def _first_place(self) -> tuple[str, str]:
        end = time.monotonic() + 5  # It is on its way there.
        while time.monotonic() < end:
            time.sleep(0.0002)
            if (place := _place(self._process, self._gate)) is not None:
                return place
        raise OSError("the kernel does not report that a thread waits")

    def _watch(self, start: tuple[str, str] | None) -> str:
        end, pause_s, said = time.monotonic() + self._timeout_s, 0.0002, b""
        while (left_s := end - time.monotonic()) > 0:
            # Once the program has said something, it may be at its end at any moment. Before, it may not even
            # have left the place where it waited to begin.
            wait_s = min(left_s, pause_s) if said else left_s
            if select.select([self._from_child], [], [], wait_s)[0]:
                more = os.read(self._from_child, 2**12)
                if not more:
                    return self._ended(said)
                said = (said + more)[-(2**12) :]
            else:
                pause_s = min(2 * pause_s, 0.02)
            if said and self._is_back(start, said):
                return "passed"
        return "timed out"

    def _is_back(self, start: tuple[str, str] | None, said: bytes) -> bool:
        if not self._is_checked:
            return said == b"\0"
        with contextlib.suppress(OSError):
            return _place(self._process, self._gate) == start
        return False

    def _ended(self, said: bytes) -> str:
        """Return how a process ended that has closed its pipe, and what it said of itself: failures only."""
        message = said.rpartition(b"\0")[2].decode("utf-8", "replace")
        end = time.monotonic() + self._timeout_s
        while time.monotonic() < end:
            process, status = os.waitpid(self._process, os.WNOHANG)
            if process:
                self._is_over = True
                if message.startswith("failed: "):
                    return message[:LONGEST_MESSAGE]
                return f"failed: the process ended with {os.waitstatus_to_exitcode(status)}"
            time.sleep(0.0005)
        return "timed out"


def main() -> None:
    """Run the program given on stdin, and write to stdout how it ended."""
    task = marshal.loads(sys.stdin.buffer.read())
    try:
        if "namespaces" not in task["without"]:
            enter_namespaces()
        answer = {"result": _Child(task).result()}
    except MissingPromise as error:
        answer = dict(zip(("missing", "why"), error.args, strict=True))
    os.write(1, marshal.dumps(answer))
    os._exit(0)


if __name__ == "__main__":
    main()
