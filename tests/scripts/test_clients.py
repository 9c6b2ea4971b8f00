"""Clients of the server's APIs do what they can, each in the Python that it is installed in.

The scripts in `clients/` list the things. OpenAI's client belongs to this project's environment, the others
run in Pythons of their own (`tests/support/clients.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from proxytune.model import ProxyTuned
from proxytune.server.settings import ServerSettings
from tests.support.clients import clients_python
from tests.support.served import served

SCRIPTS = Path(__file__).parent / "clients"
NUM_THINGS = {
    "with_openai": 33,
    "with_anthropic": 10,
    "with_dspy": 4,
    "with_langchain": 11,
    "with_litellm": 11,
    "with_llama_index": 6,
    "with_llm": 3,
    "with_pydantic_ai": 5,
}
"""How many things each client is seen to do."""
MAX_TOKENS = 64
KEY = "a-key-for-this-test"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """Serve one model three times: as it is, with a key, and with room for few texts."""
    model = ProxyTuned.load("package:proxytune/smol")
    settings = ServerSettings(name="smol", max_tokens=MAX_TOKENS)
    with ExitStack() as stack:
        plain = stack.enter_context(served(model, settings))
        with_key = stack.enter_context(served(model, settings, api_keys=(KEY,)))
        busy = stack.enter_context(served(model, settings, max_rows=1, max_waiting=1))
        yield {
            "ADDRESS": plain.url,
            "ADDRESS_WITH_KEY": with_key.url,
            "KEY": KEY,
            "BUSY_ADDRESS": busy.url,
        }


def test_each_script_is_run():
    assert {path.stem for path in SCRIPTS.glob("with_*.py")} == set(NUM_THINGS)


@pytest.mark.parametrize("client", NUM_THINGS)
def test_a_client_does_what_it_can(client, addresses, tmp_path):
    if client == "with_openai":
        python = sys.executable
    else:
        is_llama_index = client == "with_llama_index"
        python = clients_python("LLAMA_INDEX_PYTHON" if is_llama_index else "CLIENTS_PYTHON")
    done = subprocess.run(
        [python, SCRIPTS / f"{client}.py", addresses["ADDRESS"]],
        cwd=tmp_path,
        env={
            **os.environ,
            **addresses,
            "HF_HUB_OFFLINE": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("works: ") == NUM_THINGS[client]
