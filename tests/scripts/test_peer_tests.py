"""scripts/peer_tests.py runs a peer's tests against `proxytune serve`; here a small peer of our own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

tomllib = pytest.importorskip(
    "tomllib", reason="Python 3.10 reads no TOML, and the script needs it"
)

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
TABLE = tomllib.loads((SCRIPTS / "peer_tests.toml").read_text("utf-8"))

UTILS = """
import os, requests

class ServerProcess:
    model_alias = "their-model"
    api_key = None
    def start(self):
        raise RuntimeError("the peer's own server was started")

class ServerPreset:
    @staticmethod
    def load_all():
        raise RuntimeError("models were downloaded")
"""
TESTS = """
import requests
from utils import ServerPreset, ServerProcess

def ask(**more):
    server = ServerProcess()
    server.start()
    ServerPreset.load_all()
    body = {"model": "gpt-4.1", "prompt": "Good morrow,", "max_tokens": 4, **more}
    return requests.post(f"http://127.0.0.1:{server.server_port}/v1/completions", json=body)

def test_passes():
    assert ask().status_code == 200

def test_expects_another_text():
    assert ask().json()["choices"][0]["text"] == "another text"

def test_expects_another_text_and_cannot_ask_for_it():
    answer = ask(no_such_field=1)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == "another text"

def test_is_left_out():
    raise AssertionError("it ran")

def test_fails():
    assert ask().status_code == 404
"""


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setenv("PROXYTUNE_PEER_TESTS", json.dumps({"reasons": TABLE["vllm"]["reasons"]}))
    return load("peer_tests_plugin")


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "peer" / "tools" / "server" / "tests"
    (folder / "unit").mkdir(parents=True)
    (folder / "conftest.py").write_text("")
    (folder / "utils.py").write_text(UTILS)
    (folder / "unit" / "test_all.py").write_text(TESTS)
    return tmp_path / "peer"


SMALL_TABLE = """
["llama.cpp"]
root = "tools/server/tests"
tests = ["unit"]
prefix = "unit/"
needs = ["pytest", "requests"]
["llama.cpp".reasons.text]
why = "expects the words of another model"
fails_at = '== "another text"'
tests = [
    "test_all.py::test_expects_another_text",
    "test_all.py::test_expects_another_text_and_cannot_ask_for_it",
]
["llama.cpp".reasons.own]
why = "asks for its own fields"
tests = ["test_all.py::test_is_left_out", "test_all.py::test_is_no_more"]
"""


@pytest.mark.slow
def test_each_test_passes_fails_or_is_left_out_for_its_reason(checkout, tmp_path):
    table = tmp_path / "table.toml"
    table.write_text(SMALL_TABLE)
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, SCRIPTS / "peer_tests.py", "llama.cpp", checkout]
    options = ["--python", sys.executable, "--table", table, "--json", numbers, "--port", "0"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr + (tmp_path / "peer_tests.pytest.log").read_text()
    found = json.loads(numbers.read_text())
    assert found["passed"] == 1
    assert found["failed"] == [
        "test_all.py::test_expects_another_text_and_cannot_ask_for_it",
        "test_all.py::test_fails",
    ]
    assert {reason: each["tests"] for reason, each in found["left_out"].items()} == {
        "text": 1,
        "own": 1,
    }
    assert "test_is_no_more, and there is no such test" in done.stderr
    assert "| passed | 1 |" in done.stdout


def test_an_sdist_gives_the_same_files_as_a_checkout(checkout, tmp_path):
    peer_tests = load("peer_tests")
    sdist = tmp_path / "peer-1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(checkout, "peer-1.0/vendor/llama.cpp")
    files = {}
    for source in (checkout, sdist):
        target = tmp_path / f"copy of {source.name}"
        peer_tests.copy_tests(source, "llama.cpp", "tools/server/tests", target)
        files[source] = {p.relative_to(target): p.read_text() for p in target.rglob("*.py")}
    assert files[checkout] == files[sdist] and len(files[sdist]) == 3


def test_a_python_without_what_the_tests_import_is_refused_with_the_command_to_install_it():
    peer_tests = load("peer_tests")
    with pytest.raises(peer_tests.Unusable, match="pip install no-such-module"):
        peer_tests.check_environment(Path(sys.executable), ["json", "no_such_module"])


def test_the_most_exact_entry_of_the_table_counts(plugin):
    file = "openai/chat_completion/test_root_path.py::test_chat_session_root_path_with_api_key"
    assert plugin.reason_of(f"{file}[test_case1]") == "own"
    assert plugin.reason_of(f"{file}[test_case2]") == "text"
    assert plugin.reason_of(f"{file}[test_case0]") is None
    assert plugin.reason_of("openai/responses/test_basic.py::test_chat") == "text"


@pytest.mark.parametrize("peer", TABLE)
def test_each_reason_is_a_sentence_and_no_test_has_two(peer):
    reasons = TABLE[peer]["reasons"]
    assert all(entry["why"] for entry in reasons.values())
    entries = [test for entry in reasons.values() for test in entry["tests"]]
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize("name", ["llama_cpp_tests", "vllm_tests"])
def test_the_guides_table_is_that_of_the_run(name):
    numbers = json.loads((ROOT / "docs" / "performance" / f"{name}.json").read_text("utf-8"))
    page = (ROOT / "docs" / "guides" / "fit.md").read_text("utf-8")
    assert load("peer_tests").table(numbers) in page
    assert numbers["failed"] == []
