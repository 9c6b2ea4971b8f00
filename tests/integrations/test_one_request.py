"""One recipe, one conversation, five ways to ask: every model reads the same tokens and writes the same text.

`make test` asks the library, the terminal's chat, the local server and transformers' pipeline. `make
test-vllm` asks vLLM as well.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from proxytune.commands.chat import _Chat
from proxytune.model import ProxyTuned
from proxytune.request import ChatOptions, Request, SamplingParams
from tests.support.real_servers import free_port, running
from tests.support.served import served

RECIPE = "package:proxytune/smol"
HAS_VLLM = importlib.util.find_spec("vllm") is not None
SAMPLING = SamplingParams(max_new_tokens=12)
QUESTION: dict[str, str] = {"role": "user", "content": "Who wrote Hamlet?"}
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "question": [QUESTION],
    "system": [{"role": "system", "content": "Answer in one word."}, QUESTION],
    "turns": [
        QUESTION,
        {"role": "assistant", "content": "William Shakespeare."},
        {"role": "user", "content": "And Faust?"},
    ],
}
Answer = tuple[int, str]
"""The number of tokens of the base's prompt, and the text."""


@pytest.fixture(scope="module")
def library() -> ProxyTuned:
    return ProxyTuned.load(RECIPE)


@pytest.fixture(scope="module")
def expected(library: ProxyTuned) -> dict[str, Answer]:
    found = {}
    for name, messages in CONVERSATIONS.items():
        job = library.job(Request(messages, SAMPLING))
        assert len({tuple(prompt) for prompt in job.prompts}) == 1  # every model reads the same
        found[name] = len(job.prompts[0]), library.generate(messages, SAMPLING).text
    assert len({text for _, text in found.values()}) == len(found)
    return found


def test_the_library_renders_as_the_tokenizer_itself(library, expected):
    tokenizer: Any = library.tokenizer
    for name, messages in CONVERSATIONS.items():
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert len(tokenizer.encode(rendered, add_special_tokens=False)) == expected[name][0]


def test_the_terminals_chat_gives_the_librarys_text(library, expected, monkeypatch, capsys):
    for name, messages in CONVERSATIONS.items():
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        conversation = library.chat(SAMPLING, system=system)
        if name == "turns":
            conversation.messages = list(messages[:-1])
        monkeypatch.setattr("sys.stdin", io.StringIO(messages[-1]["content"] + "\n"))
        _Chat(conversation, library.recipe).run()
        assert capsys.readouterr().out == expected[name][1] + "\n"


def _ask(url: str, messages: Sequence[dict[str, str]], model: str) -> Answer:
    body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    return answer["usage"]["prompt_tokens"], answer["choices"][0]["message"]["content"]


@contextlib.contextmanager
def _local(library: ProxyTuned, place: Path) -> Iterator[Callable[[Any], Answer]]:
    with served(library) as server:
        yield lambda messages: _ask(server.url, messages, "toy")


@contextlib.contextmanager
def _vllm(library: ProxyTuned, place: Path) -> Iterator[Callable[[Any], Answer]]:
    port = free_port()
    command = ["-m", "proxytune", "serve", RECIPE, "--engine", "vllm", "--port", str(port)]
    command += ["--dtype", "float32", "--", "--max-model-len", "256", "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with running(command, port, place / "log", environment=environment, limit_s=300) as url:
        yield lambda messages: _ask(url.removesuffix("/v1"), messages, "smol")


@contextlib.contextmanager
def _pipeline(library: ProxyTuned, place: Path) -> Iterator[Callable[[Any], Answer]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    import proxytune  # noqa: F401  # registers recipes

    tokenizer = AutoTokenizer.from_pretrained(str(library.recipe.directory))
    model = AutoModelForCausalLM.from_pretrained(str(library.recipe.directory))
    generate: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)

    def ask(messages: Any) -> Answer:
        (answer,) = generate(messages, max_new_tokens=12, do_sample=False, return_full_text=False)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        return len(ids), answer["generated_text"]

    yield ask


WAYS = {"server": _local, "pipeline": _pipeline, "vLLM": _vllm}


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_to_ask_gives_the_librarys_text(way, library, expected, tmp_path):
    if way == "vLLM" and not HAS_VLLM:
        pytest.skip("vLLM is not installed here; `make test-vllm` has it")
    with WAYS[way](library, tmp_path) as ask:
        for name, messages in CONVERSATIONS.items():
            assert ask(messages) == expected[name], name


def test_an_answer_that_was_begun_is_continued(library):
    tokenizer: Any = library.tokenizer
    messages = [QUESTION, {"role": "assistant", "content": "The play was written by"}]
    options = ChatOptions(continue_final_message=True)
    job = library.job(Request(messages, SAMPLING, chat=options))
    rendered = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert list(job.prompts[0]) == tokenizer.encode(rendered, add_special_tokens=False)
