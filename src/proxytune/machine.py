"""Memory that is kept: by the C library's heap without need, by Python's garbage collector for good."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

# Memory --------------------------------------------------------------------------------------------


def device_memory(device: str) -> tuple[str, int | None]:
    """Return what a device is, and its free bytes, None where that cannot be found out.

    `auto` counts all CUDA devices and the CPU together, since it fills one after another.
    """
    import torch

    if device == "auto":
        places = [f"cuda:{index}" for index in range(torch.cuda.device_count())] + ["cpu"]
        known = [free for _, free in map(device_memory, places) if free is not None]
        return f"{len(places)} devices", sum(known) if known else None
    if device.startswith("cuda"):
        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
        return torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)[0]
    return f"{os.cpu_count()} cores" if device == "cpu" else device, _free_main_memory()


def _free_main_memory() -> int | None:
    """Return free bytes of main memory: what the system has, or what a container's limit leaves."""
    bounds = [
        bound for bound in (_free_system_memory(), _free_container_memory()) if bound is not None
    ]
    return min(bounds) if bounds else None


def _free_system_memory() -> int | None:
    try:
        import psutil
    except ImportError:
        pass
    else:
        return int(psutil.virtual_memory().available)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _free_container_memory(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a control group's limit leaves, with file pages that it can drop counted as free."""
    try:
        limit = int((group / "memory.max").read_text())  # "max", no number, where there is no limit
        current = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - current + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def environment() -> dict[str, str]:
    """Return versions and hardware, as far as they can be found out."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": platform.python_version()}
    for package in ("proxytune", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    found["threads"] = str(torch.get_num_threads())
    found["machine"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    )
    return found


def return_free_memory() -> None:
    """Give what the heap holds free back to the system, where that can be asked for.

    What is in use between free pieces keeps glibc's heap from shrinking. Scoring 60,000 tokens of a
    vocabulary of 49,152 in windows of 128 grew a process by 5 GB (logits below 32 MiB come from the heap),
    and reading two vocabularies of that size leaves 27 MB.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def settle() -> None:
    """Let the garbage collector pass over all there is, in a process that keeps it until it ends.

    A loaded recipe is hundreds of thousands of objects, vocabularies above all. Looking through them took
    200 ms with the smol family, in the middle of some answer.
    """
    gc.collect()
    gc.freeze()


def peak_memory(device: str) -> int:
    """Return the most memory used so far, in bytes: of the CUDA device, or of this process."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
