"""What a server's process does once, when all is loaded."""

from __future__ import annotations

import subprocess
import sys


def test_the_collector_does_not_look_at_what_stays_for_good():
    # In a process of its own: it cannot be undone for a part of what is there.
    code = (
        "import gc\nfrom proxytune.machine import return_free_memory, settle\n"
        "return_free_memory()\nkept = [[] for _ in range(10_000)]\nsettle()\n"
        "assert gc.get_freeze_count() >= 10_000 and len(gc.get_objects()) < 1_000\n"
        "kept.append([kept])\nassert gc.collect() == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
