"""What this machine is: its memory, devices and versions; and what this process keeps of its memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Memory --------------------------------------------------------------------------------------------


def device_memory(device: str) -> tuple[str, int]:
    """Return what a device is and its free bytes.

    `auto` counts all CUDA devices and the CPU together, since it fills one after another.
    """
    import torch

    if device == "auto":
        places = [f"cuda:{index}" for index in range(torch.cuda.device_count())] + ["cpu"]
        return f"{len(places)} devices", sum(device_memory(place)[1] for place in places)
    if device.startswith("cuda"):
        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
        return torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)[0]
    return f"{os.cpu_count()} cores" if device == "cpu" else device, _free_main_memory()


def _free_main_memory() -> int:
    """Return free bytes of main memory: what the system has free, or what a container's limit leaves."""
    import psutil

    free = int(psutil.virtual_memory().available)
    left = _free_container_memory()
    return free if left is None else min(free, left)


def _free_container_memory(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a control group's limit leaves, counting file pages that can be dropped as free."""
    try:
        limit = int((group / "memory.max").read_text())  # "max", no number, where there is no limit
        current = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - current + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def peak_memory(device: str) -> int:
    """Return the peak memory so far, in bytes: of the CUDA device, or of this process."""
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


def return_free_memory() -> None:
    """Return free heap memory to the system, where the C library offers that.

    Blocks in use between free ones keep glibc's heap from shrinking. Scoring 60,000 tokens of a
    vocabulary of 49,152 in windows of 128 grew a process by 5 GB (logits below 32 MiB come from the heap),
    and reading two vocabularies of that size leaves 27 MB.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def settle() -> None:
    """Take all current objects out of garbage collection, in a process that keeps them until it ends.

    A loaded recipe has hundreds of thousands of objects, most of them in vocabularies. Scanning them took
    200 ms with the smol family, in the middle of an answer.
    """
    gc.collect()
    gc.freeze()


# What figures depend on ----------------------------------------------------------------------------


def processor() -> str:
    """Return the processor's name, or its architecture where the system does not name it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def summary() -> str:
    """Return processor and number of cores in a line."""
    return f"{processor()}, {os.cpu_count()} cores"


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def accelerator() -> str | None:
    """Return the name of the CUDA device that is used unless another is named; None if there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def description() -> dict[str, Any]:
    """Return what measured speeds depend on besides the code: processor, cores, accelerator, versions."""
    import torch

    return {
        "processor": processor(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "accelerator": accelerator(),
        "python": platform.python_version(),
        **versions("torch", "transformers"),
    }


def environment() -> dict[str, str]:
    """Return what generated texts and scores depend on besides the code: versions, threads, device."""
    import torch

    return {
        "python": platform.python_version(),
        **versions("proxytune", "torch", "transformers"),
        "threads": str(torch.get_num_threads()),
        "machine": accelerator() or platform.machine(),
    }
