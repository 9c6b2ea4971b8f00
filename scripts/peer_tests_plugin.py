"""A pytest plugin that points the server tests of llama.cpp or vLLM to `proxytune serve`.

`peer_tests.py` loads it into the peer's own environment, which has nothing of this project. It replaces how
the tests start a server (llama.cpp: `utils.ServerProcess`; vLLM: `tests.utils.RemoteOpenAIServer`), and the
names of models and tokenizers. Requests and assertions stay the peer's own.
"""

from __future__ import annotations

import ast
import atexit
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SETTINGS = json.loads(os.environ["PROXYTUNE_PEER_TESTS"])
"""What `peer_tests.py` decided: the peer, our command, the port, the table of reasons, where to report."""
START_TIMEOUT_S = 180
MIN_KEY_LENGTH = 16
"""Of a key that our server takes."""

# Our server ---------------------------------------------------------------------------------------------


class Server:
    """One `proxytune serve`; another one takes its place where a test wants another key."""

    running: Server | None = None

    def __init__(self, key: str | None) -> None:
        self.key = key
        self.port = SETTINGS["port"]
        command = [*SETTINGS["serve"], "--port", str(self.port)]
        if key is not None:
            file = Path(SETTINGS["report"]).with_name("key.txt")
            file.write_text(f"{key}\n", "utf-8")
            command += ["--api-key-file", str(file)]
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.log = open(SETTINGS["log"], "a", encoding="utf-8")  # noqa: SIM115
        print("$", " ".join(command), file=self.log, flush=True)
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env=own | SETTINGS["environment"]
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._get("/health") is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.exit(f"proxytune serve did not start; {SETTINGS['log']} says why", 3)
            time.sleep(0.2)

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        request.add_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.urlopen(request, timeout=5) as found:
                return json.load(found)
        except (OSError, ValueError):
            return None

    def model_names(self) -> list[str]:
        """Return the name of the recipe, and of each of its experts."""
        return [model["id"] for model in self._get("/v1/models")["data"]]

    def stop(self) -> None:
        """Stop the process."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    @classmethod
    def with_key(cls, key: str | None) -> Server:
        """Return a running server that requires a key, or none."""
        if key is not None:
            long_key = key.ljust(MIN_KEY_LENGTH, "-")
            new_keys[f"Bearer {key}"] = f"Bearer {long_key}"
            key = long_key
        if cls.running is None or cls.running.key != key:
            cls.stop_running()
            cls.running = cls(key)
        return cls.running

    @classmethod
    def stop_running(cls) -> None:
        """Stop the server if one runs."""
        if cls.running is not None:
            cls.running.stop()
            cls.running = None


atexit.register(Server.stop_running)
new_names: dict[str, str] = {}
"""Names of models in the peer's requests, and the names under which our server has them."""
new_keys: dict[str, str] = {}
"""Headers with keys that are too short for our server, and those with a longer one."""


def rename_models() -> None:
    """Rename models in what the HTTP clients of the tests send."""
    import requests

    def renamed(body: Any) -> Any:
        if isinstance(body, dict) and body.get("model") in new_names:
            return {**body, "model": new_names[body["model"]]}
        return body

    def with_new_keys(headers: Any) -> Any:
        if not headers:
            return headers
        return {name: new_keys.get(value, value) for name, value in dict(headers).items()}

    send = requests.Session.request

    def request(
        self: Any, *given: Any, json: Any = None, headers: Any = None, **options: Any
    ) -> Any:
        return send(self, *given, json=renamed(json), headers=with_new_keys(headers), **options)

    def builder(build: Callable[..., Any]) -> Callable[..., Any]:
        def build_request(self: Any, *given: Any, **options: Any) -> Any:
            if isinstance(options.get("content"), bytes):
                body = renamed(json.loads(options["content"]))
                options["content"] = json.dumps(body).encode()
            elif "json" in options:
                options["json"] = renamed(options["json"])
            options["headers"] = with_new_keys(options.get("headers"))
            return build(self, *given, **options)

        return build_request

    requests.Session.request = request
    for name in ("httpx", "httpx2"):  # Official clients of different ages use one or the other.
        if importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            for client in (module.Client, module.AsyncClient):
                client.build_request = builder(client.build_request)


# llama.cpp ----------------------------------------------------------------------------------------------

UNREAD_NAMES = (
    "codellama70b",
    "davinci-002",
    "gpt-3.5-turbo",
    "gpt-3.5-turbo-instruct",
    "gpt-4.1",
    "test",
)
"""Names in the tests' requests. llama.cpp's server reads none; ours refuses those that it does not have."""


def use_llama_cpp() -> None:
    """Replace how llama.cpp's tests start a server."""
    import utils

    def start(self: Any, timeout_seconds: float = 0) -> None:
        server = Server.with_key(self.api_key)
        names = server.model_names()
        new_names.update(dict.fromkeys((*UNREAD_NAMES, self.model_alias), names[0]))
        self.server_port = server.port
        self.ready = True

    utils.ServerProcess.start = start
    utils.ServerProcess.stop = lambda self: None
    utils.ServerPreset.load_all = staticmethod(lambda: None)


# vLLM ---------------------------------------------------------------------------------------------------


class RemoteOpenAIServer:
    """What vLLM's class of this name offers, with our server behind it."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(
        self,
        model: str,
        vllm_serve_args: list[str],
        *,
        env_dict: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        given = {
            name: value
            for name, value in zip(vllm_serve_args, [*vllm_serve_args[1:], ""], strict=True)
            if name.startswith("--")
        }
        name = given.get("--served-model-name", model)
        key = given.get("--api-key", (env_dict or {}).get("VLLM_API_KEY"))
        server = Server.with_key(key)
        names = server.model_names()
        new_names[name] = names[0]
        # An adapter that is asked for under a name of its own is what an expert is here.
        adapter = given.get("--lora-modules", "").partition("=")[0]
        if adapter:
            new_names[adapter] = names[1]
        self.host, self.port = "127.0.0.1", server.port
        self.url_root = f"http://{self.host}:{self.port}"

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the server for the next module, which often asks for the same."""

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *(part.strip("/") for part in parts if part)])

    def get_client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(**self._options("v1", options))

    def get_async_client(self, **options: Any) -> Any:
        import openai

        return openai.AsyncOpenAI(**self._options("v1", options))

    def get_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.Anthropic(**self._options("", options))

    def get_async_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.AsyncAnthropic(**self._options("", options))

    def _options(self, path: str, options: dict[str, Any]) -> dict[str, Any]:
        own = {"base_url": self.url_for(path), "api_key": self.DUMMY_API_KEY, "max_retries": 0}
        return {**own, "timeout": SETTINGS["timeout"], **options}


class TestUtilities(types.ModuleType):
    """`tests.utils` with the server alone; the rest concerns GPUs, and its decorators do nothing here."""

    def __getattr__(self, name: str) -> Any:
        if name == "VLLM_PATH":
            return Path(SETTINGS["folder"])
        if name.startswith("__"):
            raise AttributeError(name)
        if name.isupper():
            return []

        def unchanged(*given: Any, **options: Any) -> Any:
            return given[0] if given and callable(given[0]) else unchanged

        return unchanged


def use_vllm() -> None:
    """Replace how vLLM's tests start a server, and give them the recipe's tokenizer."""
    module = TestUtilities("tests.utils")
    module.RemoteOpenAIServer = RemoteOpenAIServer  # type: ignore[attr-defined]
    sys.modules["tests.utils"] = module
    import transformers
    import vllm.tokenizers
    import vllm.transformers_utils.repo_utils as repo_utils

    tokenizer = transformers.AutoTokenizer.from_pretrained(SETTINGS["tokenizer"])

    class Hub:
        """Adapters are named only to start a server, so that none has to be downloaded."""

        def snapshot_download(self, *given: Any, **options: Any) -> str:
            return "an-adapter"

    global vocab_size
    vocab_size = len(tokenizer)
    transformers.AutoTokenizer.from_pretrained = lambda *given, **options: tokenizer
    vllm.tokenizers.get_tokenizer = lambda *given, **options: tokenizer
    repo_utils.hf_api = Hub


vocab_size = 0
"""Of the recipe's tokenizer, once it is loaded."""


def asks_a_server(item: pytest.Item) -> bool:
    """Whether a test of vLLM, or a fixture that it uses, starts a server.

    The others call vLLM's Python in this process, and would pass whatever our server does.
    """
    fixtures = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    functions = [each.func for found in fixtures.values() for each in found]
    for function in [item.obj, *functions]:  # type: ignore[attr-defined]
        try:
            if "RemoteOpenAIServer" in inspect.getsource(inspect.unwrap(function)):
                return True
        except (OSError, TypeError):
            pass
    return False


# Choosing and reporting ---------------------------------------------------------------------------------


def name_of(nodeid: str) -> str:
    return nodeid.removeprefix(SETTINGS["prefix"])


def reason_of(test: str) -> str | None:
    """Return the reason that the table has for a test; the most exact entry counts."""
    found: dict[int, str] = {}
    for reason, entry in SETTINGS["reasons"].items():
        for pattern in entry["tests"]:
            is_part = test.startswith((f"{pattern}::", f"{pattern}[", f"{pattern}/"))
            is_begun = pattern.endswith("*") and test.startswith(pattern[:-1])
            if test == pattern or is_part or is_begun:
                found[len(pattern)] = reason
    return found[max(found)] if found else None


def report(test: str, outcome: str, **more: Any) -> None:
    with open(SETTINGS["report"], "a", encoding="utf-8") as file:
        print(json.dumps({"test": test, "outcome": outcome, **more}), file=file)


def pytest_configure(config: pytest.Config) -> None:
    rename_models()
    {"llama.cpp": use_llama_cpp, "vllm": use_vllm}[SETTINGS["peer"]]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    kept = []
    for item in items:
        if hasattr(item.module, "get_vocab_size"):  # type: ignore[attr-defined]
            # It would read the configuration of the model whose name is replaced.
            item.module.get_vocab_size = lambda name: vocab_size  # type: ignore[attr-defined]
        test = name_of(item.nodeid)
        reason = reason_of(test)
        if reason == "run":
            reason = None
        elif reason is None and SETTINGS["peer"] == "vllm" and not asks_a_server(item):
            reason = "in_process"
        entry = SETTINGS["reasons"].get(reason, {})
        if reason is None or "fails_at" in entry or (SETTINGS["all"] and entry.get("can_run")):
            item.stash[REASON] = reason
            kept.append(item)
        else:
            report(test, "left out", reason=reason)
    items[:] = kept


REASON = pytest.StashKey[str | None]()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        test = name_of(report.nodeid)
        reason = reason_of(test)
        outcome = "failed" if reason is None else "left out"
        globals()["report"](test, outcome, reason=reason, detail=str(report.longrepr)[-1000:])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    def give_up(signum: int, frame: Any) -> None:
        raise TimeoutError(f"not done within {SETTINGS['timeout']} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SETTINGS["timeout"])
    yield
    signal.alarm(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    found = outcome.get_result()  # type: ignore[attr-defined]
    test, reason = name_of(item.nodeid), item.stash[REASON]
    if found.skipped:
        why = found.longrepr[2] if isinstance(found.longrepr, tuple) else str(found.longrepr)
        report(test, "left out", reason=reason or "skipped", detail=why)
    elif found.failed:
        crash = getattr(found.longrepr, "reprcrash", None)
        detail = str(found.longrepr) if crash is None else crash.message
        if crash is not None:
            detail = f"{statement_at(crash.path, crash.lineno)}\n{detail}"
        fails_at = SETTINGS["reasons"].get(reason, {}).get("fails_at")
        as_listed = fails_at is not None and re.search(fails_at, detail)
        left_out = reason is not None and (fails_at is None or as_listed)
        report(test, "left out" if left_out else "failed", reason=reason, detail=detail[:2000])
    elif found.when == "call":
        report(test, "passed", reason=reason, seconds=round(found.duration, 2))


def statement_at(path: str, number: int) -> str:
    """Return the statement of a test at a line, and nothing of those around it."""
    source = Path(path).read_text("utf-8")
    at_line = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and node.lineno <= number <= (node.end_lineno or 0)
    ]
    shortest = min(at_line, key=lambda node: (node.end_lineno or 0) - node.lineno, default=None)
    return "" if shortest is None else ast.get_source_segment(source, shortest) or ""
