"""`/tokenize` and `/detokenize` as clients of vLLM and of llama.cpp ask them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import pytest

from proxytune.text.prompts import prompt_ids
from proxytune.text.vocab import Vocabulary
from tests.server.test_app import fresh
from tests.server.test_faults import checked_error
from tests.support.served import Served, served
from tests.text.test_detokenize import BYTE_LEVEL

USER: Any = {"role": "user", "content": "abc"}
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(fresh(max_context=256)) as running:
        yield running


@pytest.fixture(scope="module")
def real() -> Iterator[Served]:
    """A server whose tokenizer has special tokens, and tokens that are parts of characters.

    Its models are toys that know fewer tokens: nothing is generated.
    """
    model = fresh()
    vocabulary = Vocabulary.from_tokenizer(BYTE_LEVEL, name="real", width=len(BYTE_LEVEL))
    model.ensemble = replace(model.ensemble, vocabulary=vocabulary, tokenizer=BYTE_LEVEL)
    model.formats = tuple(
        replace(each, tokenizer=BYTE_LEVEL, chat=CHATML) for each in model.formats
    )
    with served(model) as running:
        yield running


def post(running: Served, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{running.url}{path}", json=body, timeout=20)


def ask(running: Served, path: str, **body: Any) -> Any:
    answer = post(running, path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("path", ("/tokenize", "/v1/tokenize"))
def test_a_prompt_has_the_tokens_that_a_completion_reads(server, path):
    found = ask(server, path, model="toy", prompt="ab c")
    assert found == {
        "count": 4,
        "max_model_len": 256,
        "tokens": [0, 1, 26, 2],
        "token_strs": None,
    }
    assert ask(server, path, prompt="ab c") == found
    assert ask(server, path, model="toy:two", prompt="ab c") == found


def test_a_conversation_has_the_tokens_that_a_chat_reads(server):
    given = [USER, {"role": "assistant", "content": "ab"}, USER]
    answer = post(
        server, "/v1/chat/completions", {"model": "toy", "messages": given, "max_tokens": 1}
    )
    num_read = answer.json()["usage"]["prompt_tokens"]
    found = ask(server, "/tokenize", model="toy", messages=given, return_token_strs=True)
    text = "User: abc\n\nAssistant: ab\n\nUser: abc\n\nAssistant:"
    assert "".join(found["token_strs"]).startswith("User: abc")
    assert found["count"] == len(found["tokens"]) == num_read
    assert ask(server, "/detokenize", tokens=found["tokens"])["content"] == "".join(
        found["token_strs"]
    )
    assert len(text) >= num_read


def test_token_strings_are_the_vocabularys(real):
    found = ask(real, "/tokenize", prompt="é a", return_token_strs=True)
    assert found["token_strs"] == BYTE_LEVEL.convert_ids_to_tokens(found["tokens"])
    assert ask(real, "/tokenize", prompt="é a")["token_strs"] is None


@pytest.mark.parametrize("has_special", (False, True, None))
def test_special_tokens_stand_before_a_prompt_unless_they_are_not_wanted(real, has_special):
    options = {} if has_special is None else {"add_special_tokens": has_special}
    found = ask(real, "/tokenize", prompt="ab", **options)["tokens"]
    bare = BYTE_LEVEL.encode("ab", add_special_tokens=False)
    assert found == (bare if has_special is False else prompt_ids("ab", BYTE_LEVEL))


@pytest.mark.parametrize("begins", (False, True))
@pytest.mark.parametrize("has_special", (False, True))
def test_a_conversation_is_rendered_with_the_bases_template(real, begins, has_special):
    found = ask(
        real, "/tokenize", messages=[USER], add_generation_prompt=begins, add_special_tokens=has_special
    )  # fmt: skip
    text = "<s>user: abc\n" + ("assistant:" if begins else "")
    bare = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert found["tokens"] == (prompt_ids(text, BYTE_LEVEL) if has_special else bare)


def test_a_last_message_can_be_left_open(real):
    given = [USER, {"role": "assistant", "content": "ab"}]
    found = ask(
        real, "/tokenize", messages=given, continue_final_message=True, add_generation_prompt=False
    )
    text = ask(real, "/detokenize", model="toy", tokens=found["tokens"])["prompt"]
    assert text == "<s>user: abc\n<s>assistant: ab"


def test_llama_cpps_clients_get_ids_or_pieces_of_a_content(real):
    found = ask(real, "/tokenize", content="a😀", with_pieces=True)["tokens"]
    bare = BYTE_LEVEL.encode("a😀", add_special_tokens=False)
    assert [each["id"] for each in found] == bare
    assert ask(real, "/tokenize", content="a😀")["tokens"] == bare
    pieces = [each["piece"] for each in found]
    assert (
        b"".join(bytes(piece) if isinstance(piece, list) else piece.encode() for piece in pieces)
        == "a😀".encode()
    )
    assert any(isinstance(piece, list) for piece in pieces)
    special = ask(real, "/tokenize", content="a", add_special=True)["tokens"]
    assert special == prompt_ids("a", BYTE_LEVEL)


@pytest.mark.parametrize("path", ("/detokenize", "/v1/detokenize"))
def test_tokens_become_text_again_special_ones_too(real, path):
    token_ids = [BYTE_LEVEL.bos_token_id, *BYTE_LEVEL.encode("é😀", add_special_tokens=False)]
    text = "<s>é😀"
    assert ask(real, path, model="toy", tokens=token_ids) == {"prompt": text}
    # llama.cpp's clients name no model.
    assert ask(real, path, tokens=token_ids) == {"prompt": text, "content": text}
    assert ask(real, path, tokens=[]) == {"prompt": "", "content": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/tokenize", {}, 400, "prompt, messages and content"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, 400, "prompt and messages"),
        ("/tokenize", {"prompt": "a", "content": "a"}, 400, "prompt and content"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "with_pieces": True}, 400, "content"),
        ("/tokenize", {"content": "a", "add_special_tokens": False}, 400, "add_special_tokens"),
        ("/tokenize", {"content": "a", "parse_special": False}, 400, "parse_special"),
        ("/tokenize", {"model": "other", "prompt": "a"}, 404, "other"),
        ("/tokenize", {"messages": [USER], "continue_final_message": True,
                       "add_generation_prompt": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": [USER], "chat_template_kwargs": {"messages": 1}}, 400, "messages"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, 400, "nonsense"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [33]}, 400, "33"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
        ("/detokenize", {"tokens": [0], "model": "other"}, 404, "other"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(server, path, body, status, named):
    answer = post(server, path, body)
    assert answer.status_code == status
    assert named in checked_error(answer)["message"]
