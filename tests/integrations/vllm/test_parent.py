"""An engine ends with the process that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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
    child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
child.wait()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="vLLM does not run on Windows")
def test_an_engine_whose_parent_was_killed_ends():
    """It used to keep the devices' memory, so that the command that went on found none."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "watching\n"
    parent.send_signal(signal.SIGKILL)
    # The child holds the pipe open for as long as it lives.
    parent.communicate(timeout=20)


def test_only_a_child_of_that_process_watches():
    """vLLM calls the plugin in every process, the parent among them."""
    with ending_with_this():
        assert os.environ[VARIABLE] == str(os.getpid())
        watch_parent()  # not a child of itself
        assert VARIABLE in os.environ
    assert VARIABLE not in os.environ
