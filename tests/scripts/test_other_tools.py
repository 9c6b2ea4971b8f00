"""The snippets of docs/guides/fit.md run: transformers in this process's Python, clients against a server.

LangChain, LiteLLM and Anthropic's client run in a Python of their own (`tests/support/clients.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxytune.checkpoints.references import resolve_package
from proxytune.model import ProxyTuned
from tests.support.clients import clients_python
from tests.support.served import served

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "fit.md"
SMOL = "package:proxytune/smol"

pytestmark = pytest.mark.slow


def snippet(heading: str) -> str:
    """Return the Python block below a heading of the guide."""
    section = GUIDE.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def run(code: str, directory: Path, python: str = sys.executable) -> str:
    done = subprocess.run(
        [python, "-c", code],
        cwd=directory,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "hub")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(ProxyTuned.load(SMOL), name="smol") as server:
        yield f"{server.url}/v1"


def with_recipe(code: str) -> str:
    assert code.count('"my-recipe"') == 1
    return code.replace('"my-recipe"', repr(str(resolve_package(SMOL))))


def test_transformers_generates_at_each_strength(tmp_path):
    base, steered = run(with_recipe(snippet("transformers")), tmp_path).split("1.5 ")
    assert base.startswith("0.0 Good morrow,") and steered.startswith("Good morrow,")
    assert base.removeprefix("0.0 ").strip() != steered.strip()


def test_a_pipeline_writes_what_the_library_writes(tmp_path):
    from proxytune import SamplingParams

    said = run(with_recipe(snippet("A pipeline")), tmp_path)
    library, sampling = ProxyTuned.load(SMOL), SamplingParams(max_new_tokens=16)
    text = library.generate("Good morrow,", sampling).text
    answer = library.generate([{"role": "user", "content": "Who wrote Hamlet?"}], sampling).text
    assert said.strip() == f"Good morrow,{text}\n{answer}".strip()


def at(address: str, heading: str) -> str:
    code = snippet(heading)
    assert code.count("http://127.0.0.1:8000/v1") == 1
    return code.replace("http://127.0.0.1:8000/v1", address)


def test_openais_client_gets_an_answer(address, tmp_path):
    assert run(at(address, "OpenAI's client"), tmp_path).strip()


def test_langchain_gets_an_answer_and_a_stream(address, tmp_path):
    said = run(at(address, "LangChain"), tmp_path, clients_python())
    assert said.count("|") > 3


def test_litellm_gets_an_answer(address, tmp_path):
    assert run(at(address, "LiteLLM"), tmp_path, clients_python()).strip()


def test_anthropics_client_gets_an_answer(address, tmp_path):
    guide = (ROOT / "docs" / "guides" / "serve.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(from anthropic.*?)```", guide, re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", address.removesuffix("/v1"))
    assert run(code, tmp_path, clients_python()).strip()
