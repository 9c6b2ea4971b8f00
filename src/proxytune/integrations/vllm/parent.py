"""Ends vLLM's engine when the process that started it is gone.

vLLM's engine is a process of its own, and lives on with all its memory if its parent is killed. Then the
command that continues the work would find the devices occupied. vLLM's workers end with their engine.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "PROXYTUNE_VLLM_PARENT"
"""Names, to processes that are started meanwhile, the one to end with."""
EVERY_S = 1.0
"""Time between two looks at the parent."""
GRACE_S = 5.0
"""Time that the engine gets to end by itself."""


@contextmanager
def ending_with_this() -> Iterator[None]:
    """Let an engine that is started meanwhile end with this process."""
    os.environ[VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def watch_parent() -> None:
    """In an engine that is to end with its parent, begin to watch it; elsewhere do nothing."""
    if os.environ.get(VARIABLE) == str(os.getppid()):
        del os.environ[VARIABLE]
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
