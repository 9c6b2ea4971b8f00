"""`/tokenize` and `/detokenize` as clients of vLLM and of llama.cpp ask them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import pytest

from proxytune.model import ProxyTuned
from tests.server.test_app import fresh
from tests.server.test_faults import checked_error
from tests.support.served import Served, served
from tests.support.tokenizers import byte_level

USER: Any = {"role": "user", "content": "abc"}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(fresh(max_context=256)) as running:
        yield running


@pytest.fixture(scope="module")
def real() -> Iterator[Served]:
    """A server whose tokenizer has special tokens, and tokens of parts of characters."""
    with served(with_tokenizer(fresh(max_context=256), byte_level())) as running:
        yield running


def ask(running: Served, path: str, body: Any) -> Any:
    answer = httpx.post(f"{running.url}{path}", json=body, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.json()
