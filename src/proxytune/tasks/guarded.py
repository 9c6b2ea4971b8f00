"""Runs one untrusted program within limits. `sandbox.py` starts this file as a separate process.

It reads the program and its limits from stdin as JSON, gives up the rights that the program must not have,
runs it, and writes how it ended into a pipe. There are three barriers, one behind the other: limits on
memory, time, file sizes and open files; an audit hook that refuses Python's ways to write, to start processes
and to reach the network; and on Linux a filter in the kernel (seccomp, and Landlock if files may be written
in one folder), which holds whatever the program tries. This file imports nothing from the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import struct
import sys
from typing import Any

LONGEST_MESSAGE = 300

# System calls that a program must not make, with their numbers on Linux for x86_64 and aarch64; -1 if there
# is none.
_NEVER = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269), "fork": (57, -1), "vfork": (58, -1),
    "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51), "pivot_root": (155, 41),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "io_uring_setup": (425, 425),
    "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217),
    "userfaultfd": (323, 282), "truncate": (76, 45), "chmod": (90, -1), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, -1), "fchown": (93, 55),
    "lchown": (94, -1), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "utime": (132, -1), "utimes": (235, -1), "utimensat": (280, 88),
    "mknod": (133, -1), "mknodat": (259, 33), "setrlimit": (160, 164), "msgget": (68, 186),
}  # fmt: skip
_WRITING = {
    "creat": (85, -1), "rename": (82, -1), "renameat": (264, 38), "renameat2": (316, 276),
    "mkdir": (83, -1), "mkdirat": (258, 34), "rmdir": (84, -1), "unlink": (87, -1),
    "unlinkat": (263, 35), "link": (86, -1), "linkat": (265, 37), "symlink": (88, -1),
    "symlinkat": (266, 36), "ftruncate": (77, 46), "fallocate": (285, 47),
}  # fmt: skip
_OPEN, _OPENAT, _OPENAT2 = (2, -1), (257, 56), (437, 437)
_CLONE, _CLONE3 = (56, 220), (435, 435)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE_THREAD = 0x10000
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000

# Every way to change a folder that Landlock's first version knows.
_CHANGES = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))


def kernel_filter(machine: str, *, may_write: bool) -> bytes:
    """Return the seccomp program for an architecture of `platform.machine`, in the kernel's format.

    Raises:
        KeyError: The architecture's system call numbers are not known here.
    """
    column, architecture = _ARCHITECTURES[machine]
    lines: list[tuple[int, int, int, int]] = []

    def refuse(code: int) -> tuple[int, int, int, int]:
        return (_RETURN, 0, 0, _ERROR | code)

    def when(number: int, *then: tuple[int, int, int, int]) -> None:
        """Run these instructions for this call; they return, or load its number again."""
        if number >= 0:
            lines.append((_JUMP_EQUAL, 0, len(then), number))
            lines.extend(then)

    def when_flags(number: int, argument: int, mask: int, *, refused_if_set: bool) -> None:
        masked = (_AND, 0, 0, mask)
        load = (_LOAD, 0, 0, 16 + 8 * argument)
        skip = (_JUMP_EQUAL, 1, 0, 0) if refused_if_set else (_JUMP_EQUAL, 0, 1, 0)
        when(number, load, masked, skip, refuse(errno.EPERM), (_RETURN, 0, 0, _ALLOW))

    lines += [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, architecture), refuse(errno.EPERM)]
    lines.append((_LOAD, 0, 0, 0))
    # Calls of another ABI (x32) have numbers from here on.
    lines += [(_JUMP_AT_LEAST, 0, 1, 0x40000000), refuse(errno.EPERM)]
    for numbers in (*_NEVER.values(), *(() if may_write else _WRITING.values())):
        when(numbers[column], refuse(errno.EPERM))
    # A filter cannot inspect the arguments of these. They are reported as unknown, so that callers use the
    # older calls.
    for numbers in (_CLONE3, _OPENAT2):
        when(numbers[column], refuse(errno.ENOSYS))
    when_flags(_CLONE[column], 0, _CLONE_THREAD, refused_if_set=False)
    if not may_write:
        when_flags(_OPEN[column], 1, _WRITE_FLAGS, refused_if_set=True)
        when_flags(_OPENAT[column], 2, _WRITE_FLAGS, refused_if_set=True)
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def guard_with_kernel(*, folder: str | None) -> bool:
    """Give up rights for good with the kernel's filters; return whether this kernel supports them.

    `folder` is the only one in which files may be written; None allows none.
    """
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) != 0:  # No new privileges, ever.
        return False
    if folder is not None and not _confine_writing(libc, folder):
        return False
    program = kernel_filter(platform.machine(), may_write=folder is not None)
    buffer = ctypes.create_string_buffer(program, len(program))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))

    filter_ = Filter(len(program) // 8, ctypes.addressof(buffer))
    return bool(libc.prctl(22, 2, ctypes.byref(filter_), 0, 0) == 0)


def _confine_writing(libc: Any, folder: str) -> bool:
    """Allow changes of files below one folder only, with Landlock."""
    handled = struct.pack("Q", _CHANGES)
    ruleset = libc.syscall(444, handled, ctypes.c_size_t(len(handled)), 0)
    if ruleset < 0:
        return False
    parent = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", _CHANGES, parent)
    added = libc.syscall(445, ruleset, 1, rule, 0)
    return bool(added == 0 and libc.syscall(446, ruleset, 0) == 0)


def guard_with_limits(memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Set the resource limits that every Unix has."""
    import resource

    wanted = [
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, memory_bytes),
    ]
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
)  # fmt: skip
_CHANGING = (
    "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.",
    "tempfile.",
)  # fmt: skip


def guard_with_hook(*, may_write: bool, is_held: bool) -> None:
    """Refuse Python's own ways to write, to start processes and to reach the network.

    `is_held` says whether the kernel refuses the same. Only then may foreign code be called with ctypes.
    """
    refused = (*_REFUSED, *(() if may_write else _CHANGING), *(() if is_held else ("ctypes.",)))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not may_write:
            mode, flags = arguments[1], arguments[2] or 0
            writes = isinstance(mode, str) and set(mode) & set("wax+")
            if writes or (mode is None and isinstance(flags, int) and flags & _WRITE_FLAGS):
                raise PermissionError("writing files is not allowed here")
        elif event.startswith(refused):
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(hook)


def main() -> None:
    """Run the program given on stdin."""
    import signal

    task = json.loads(sys.stdin.buffer.read())
    pipe, folder = int(sys.argv[1]), task["folder"]
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)

    def end(result: str) -> None:
        """Report how the program ended, and exit without running what it registered for exit."""
        message = result.encode("utf-8", "replace")[: 4 * LONGEST_MESSAGE]
        with contextlib.suppress(OSError):
            os.write(pipe, message)
        os._exit(0)

    guard_with_limits(task["memory_bytes"], task["cpu_s"], 2**24 if folder else 0)
    is_held = guard_with_kernel(folder=folder)
    if task["needs_kernel"] and not is_held:
        end("refused")
    guard_with_hook(may_write=folder is not None, is_held=is_held)
    signal.signal(signal.SIGALRM, lambda *_: end("timed out"))
    signal.setitimer(signal.ITIMER_REAL, task["timeout_s"])
    try:
        code = compile(task["program"], "<program>", "exec", dont_inherit=True)
        exec(code, {"__name__": "__main__"})
    except BaseException as error:  # The program's own exceptions, including SystemExit.
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        end(f"failed: {kind}{error}"[:LONGEST_MESSAGE])
    end("passed")


if __name__ == "__main__":
    main()
