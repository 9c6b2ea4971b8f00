"""An engine ends with the process that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from proxytune.integrations.vllm.parent import VARIABLE, ending_with_this, watch_parent

CHILD = """
import time
from proxytune.integrations.vllm.parent import watch_parent
watch_parent()
print("watching", flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
from proxytune.integrations.vllm.parent import ending_with_this
with ending_with_this():
    child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="vLLM does not run on Windows")
def test_an_engine_whose_parent_was_killed_ends():
    """It used to keep the devices' memory, so that the command that went on found none."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    word, pid = parent.stdout.readline().split()
    assert word == "watching"
    os.kill(int(pid), 0)  # it runs
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(int(pid), signal.SIGKILL)
    pytest.fail("the child lives on")


def test_only_a_child_of_that_process_watches():
    """vLLM calls the plugin in every process, the parent among them."""
    with ending_with_this():
        assert os.environ[VARIABLE] == str(os.getpid())
        watch_parent()  # not a child of itself
        assert VARIABLE in os.environ
    assert VARIABLE not in os.environ
