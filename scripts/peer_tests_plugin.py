"""A pytest plugin that points the server tests of llama.cpp or vLLM to `proxytune serve`.

`peer_tests.py` loads it into the peer's environment, which has nothing of this project. It replaces only how
the tests start a server (llama.cpp: `utils.ServerProcess`; vLLM: `tests.utils.RemoteOpenAIServer`) and the
names of models and tokenizers; requests and assertions stay the peer's own.
"""

from __future__ import annotations

import atexit
import fnmatch
import inspect
import json
import os
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

SETTINGS = json.loads(os.environ["PROXYTUNE_PEER_TESTS"])
"""What `peer_tests.py` decided: the peer, our command, the tokenizer, ports, reasons, and where to report."""
START_TIMEOUT_S = 120


class Server:
    """One `proxytune serve`, started with what a test asks for."""

    running: Server | None = None

    def __init__(self, options: Sequence[str], port: int) -> None:
        self.options = tuple(options)
        self.port = port
        command = [*SETTINGS["serve"], "--port", str(port), *options]
        self.log = open(SETTINGS["log"], "a", encoding="utf-8")  # noqa: SIM115
        print("$", " ".join(command), file=self.log, flush=True)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH",)
        } | SETTINGS["environment"]
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env=environment
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"proxytune serve did not start; see {SETTINGS['log']}")
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as found:
                return bool(found.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    @classmethod
    def with_options(cls, options: Sequence[str]) -> Server:
        """Return the running server, or another one if it was started with other options."""
        if cls.running is None or cls.running.options != tuple(options):
            cls.stop_running()
            cls.running = cls(options, SETTINGS["port"])
        return cls.running

    @classmethod
    def stop_running(cls) -> None:
        if cls.running is not None:
            cls.running.stop()
            cls.running = None


atexit.register(Server.stop_running)


def key_file(key: str) -> str:
    """Return a file with the key that a test expects the server to require."""
    path = Path(SETTINGS["log"]).with_name("key")
    path.write_text(key + "\n", "utf-8")
    return str(path)


# llama.cpp ----------------------------------------------------------------------------------------------

LLAMA_NAMES = (
    "davinci-002", "gpt-3.5-turbo", "gpt-3.5-turbo-instruct", "gpt-4.1", "test", "codellama70b",
)  # fmt: skip
"""Names in llama.cpp's requests, which its server does not read."""


def use_llama_cpp() -> None:
    """Replace how llama.cpp's tests start a server.

    Its server answers whatever name a request has. Ours refuses unknown names, so that the names in the tests
    become that of the recipe.
    """
    import httpx
    import httpx2
    import requests
    import utils

    def start(self: Any, timeout_seconds: float = 60) -> None:
        options = ["--name", self.model_alias or "tinyllama-2"]
        if self.api_key:
            options += ["--api-key-file", key_file(self.api_key)]
        self.server_port = Server.with_options(options).port
        self.ready = True

    utils.ServerProcess.start = start
    utils.ServerProcess.stop = lambda self: None
    utils.ServerPreset.load_all = staticmethod(lambda: None)

    def renamed(body: Any) -> Any:
        if isinstance(body, dict) and (body.get("model") or "test") in LLAMA_NAMES:
            assert Server.running is not None
            return {**body, "model": Server.running.options[1]}
        return body

    original = requests.Session.request

    def request(self: Any, *given: Any, json: Any = None, **options: Any) -> Any:
        return original(self, *given, json=renamed(json), **options)

    requests.Session.request = request
    for module in (httpx, httpx2):
        for client in (module.Client, module.AsyncClient):
            rename_in(client, renamed)


def rename_in(client: Any, renamed: Callable[[Any], Any]) -> None:
    """Rename models in what the official client sends."""
    original = client.build_request

    def build_request(self: Any, *given: Any, **options: Any) -> Any:
        if "json" in options:
            options["json"] = renamed(options["json"])
        elif isinstance(options.get("content"), (bytes, str)):
            options["content"] = json.dumps(renamed(json.loads(options["content"]))).encode()
        return original(self, *given, **options)

    client.build_request = build_request


# vLLM ---------------------------------------------------------------------------------------------------


class RemoteOpenAIServer:
    """Stands where vLLM's class does: the same methods, and our server behind them."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(self, model: str, vllm_serve_args: list[str], **options: Any) -> None:
        arguments = vllm_serve_args
        name = model
        if "--served-model-name" in arguments:
            name = arguments[arguments.index("--served-model-name") + 1]
        own = ["--name", name]
        if "--api-key" in arguments:
            own += ["--api-key-file", key_file(arguments[arguments.index("--api-key") + 1])]
        self.host = "127.0.0.1"
        self.port = Server.with_options(own).port

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def url_root(self) -> str:
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        return self.url_root + "/" + "/".join(part.strip("/") for part in parts if part)

    def get_client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(**self._openai(options))

    def get_async_client(self, **options: Any) -> Any:
        import openai

        return openai.AsyncOpenAI(**self._openai(options))

    def get_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.Anthropic(**self._anthropic(options))

    def get_async_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.AsyncAnthropic(**self._anthropic(options))

    def _openai(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": self.url_for("v1"), **self._anthropic({}), **options} | (
            {"base_url": self.url_for("v1")} if "base_url" not in options else {}
        )

    def _anthropic(self, options: dict[str, Any]) -> dict[str, Any]:
        fixed = {"base_url": self.url_root, "api_key": self.DUMMY_API_KEY}
        return {**fixed, "max_retries": 0, "timeout": 120, **options}


class _Absent(types.ModuleType):
    """`tests.utils` without what its import needs; everything but the server is a stand-in."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "VLLM_PATH":
            return Path(SETTINGS["root"])
        if name.isupper():
            return []
        return lambda *given, **options: given[0] if given and callable(given[0]) else _unchanged


def _unchanged(function: Any) -> Any:
    return function


def use_vllm() -> None:
    """Replace how vLLM's tests start a server, and give them the tokenizer of the recipe."""
    module = _Absent("tests.utils")
    module.RemoteOpenAIServer = RemoteOpenAIServer  # type: ignore[attr-defined]
    sys.modules["tests.utils"] = module
    from transformers import AutoTokenizer
    from vllm import tokenizers

    load = AutoTokenizer.from_pretrained
    own = load(SETTINGS["tokenizer"])
    AutoTokenizer.from_pretrained = lambda *given, **options: own
    tokenizers.get_tokenizer = lambda *given, **options: own
    from vllm.transformers_utils import repo_utils

    # Adapters that tests name only to start the server.
    class Hub:
        def snapshot_download(self, *given: Any, **options: Any) -> str:
            return "not-downloaded"

    repo_utils.hf_api = Hub


# pytest -------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    {"llama.cpp": use_llama_cpp, "vllm": use_vllm}[SETTINGS["peer"]]()


def short_name(item: pytest.Item) -> str:
    return item.nodeid.removeprefix(SETTINGS["prefix"])


def reason_of(name: str) -> str | None:
    """Return why a test is left out, by the table."""
    for pattern, reason in SETTINGS["left_out"].items():
        if name == pattern or fnmatch.fnmatchcase(name, pattern.replace("[", "[[]")):
            return str(reason)
    return None


def reaches_server(item: pytest.Item) -> bool:
    """Whether a test of vLLM asks a server: it, or a fixture that it uses, starts one."""
    functions: list[Any] = [getattr(item, "obj", None)]
    fixtures = getattr(item, "_fixtureinfo", None)
    if fixtures is not None:
        functions += [each.func for found in fixtures.name2fixturedefs.values() for each in found]
    for function in functions:
        try:
            if "RemoteOpenAIServer" in inspect.getsource(inspect.unwrap(function)):
                return True
        except (OSError, TypeError):
            pass
    return False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = []
    for item in items:
        reason = reason_of(short_name(item))
        if reason is None and SETTINGS["peer"] == "vllm" and not reaches_server(item):
            reason = "in-process"
        if reason is not None and not SETTINGS["run_left_out"]:
            report(short_name(item), "left out", reason)
        else:
            kept.append(item)
    items[:] = kept


def report(test: str, outcome: str, detail: str, **more: Any) -> None:
    with open(SETTINGS["report"], "a", encoding="utf-8") as file:
        print(json.dumps({"test": test, "outcome": outcome, "detail": detail, **more}), file=file)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    found = outcome.get_result()  # type: ignore[attr-defined]
    name = short_name(item)
    if found.skipped:
        why = found.longrepr[2] if isinstance(found.longrepr, tuple) else str(found.longrepr)
        report(name, "skipped", why)
    elif found.failed:
        crash = getattr(found.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(found.longrepr)
        report(name, "failed", message[:2000], when=found.when)
    elif found.when == "call":
        report(name, "passed", "", seconds=round(found.duration, 2))


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        with open(SETTINGS["report"], "a", encoding="utf-8") as file:
            test = report.nodeid.removeprefix(SETTINGS["prefix"])
            detail = str(report.longrepr)[-1500:]
            print(json.dumps({"test": test, "outcome": "error", "detail": detail}), file=file)
