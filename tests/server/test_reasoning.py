"""Chat options over HTTP, and the answers of models that think aloud before they answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proxytune.backends.toy import ToyBackend, ToyTokenizer
from proxytune.decode.ensemble import Ensemble, Member
from proxytune.model import ProxyTuned
from proxytune.server.reasoning import ReasoningSplitter
from proxytune.testing import toy_recipe
from proxytune.text.prompts import PromptFormat
from proxytune.text.vocab import Vocabulary, align
from tests.support.served import Served, served

WRITTEN = ["<think>", "\nhm", ", so\n", "\n</th", "ink>", "\n\n", "yes", ".", "<eos>"]
TOKENS = [*WRITTEN, *"abcdefghijklmnopqrstuvwxyz", ":", "\n", "</think>", "no"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}a:"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>no"
    "{% elif opened %}<think>{% endif %}{% endif %}"
)
MESSAGES: Any = [{"role": "user", "content": "q"}]
REASONING, CONTENT = "hm, so", "yes."


def thinking_model() -> ProxyTuned:
    """Return a model that thinks after `a:`, and then writes its script, token by token."""
    table = torch.full((len(TOKENS), len(TOKENS)), -30.0)
    table[:, TOKENS.index("<eos>")] = 0
    table[TOKENS.index(":"), 0] = 9
    table[TOKENS.index("no"), TOKENS.index("yes")] = 9
    for token_id in range(len(WRITTEN) - 1):
        table[token_id, token_id + 1] = 9
    tokenizer = ToyTokenizer(TOKENS, eos_token="<eos>")
    vocabulary = Vocabulary.from_tokenizer(tokenizer, name="thinker", width=len(TOKENS))
    base = Member("base", ToyBackend(table, name="base"), align(vocabulary, vocabulary))
    ensemble = Ensemble((base,), (), vocabulary, (TOKENS.index("<eos>"),), tokenizer)
    return ProxyTuned(ensemble, [PromptFormat("plain", TEMPLATE, None, tokenizer)], toy_recipe())


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(thinking_model()) as running:
        yield running


def post(server: Served, **body: Any) -> httpx.Response:
    whole = {"messages": MESSAGES, "temperature": 0} | body
    return httpx.post(f"{server.url}/v1/chat/completions", json=whole, timeout=60)


def message(server: Served, **body: Any) -> dict[str, Any]:
    answer = post(server, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["choices"][0]["message"]
    return found


def deltas(server: Served, **body: Any) -> list[dict[str, Any]]:
    lines = post(server, stream=True, **body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    return [chunk["choices"][0]["delta"] for chunk in chunks]


# The splitter ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_inside", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nyes", False, "hm", "yes"),
        ("\n <think>hm</think>yes", False, "hm", "yes"),
        ("hm\n\n</think>\nyes\n", True, "hm", "yes\n"),
        ("yes, <think>hm</think>", False, "", "yes, <think>hm</think>"),
        ("  yes", False, "", "  yes"),
        ("<thin", False, "", "<thin"),
        ("\n\n", False, "", "\n\n"),
        ("<think>hm", False, "hm", ""),
        ("hm </thin", True, "hm </thin", ""),
        ("h\n\nm\n", True, "h\n\nm\n", ""),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("<think></think>", False, "", ""),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_what_stands_in_the_first_tag(text, is_inside, reasoning, content):
    whole = ReasoningSplitter(is_inside).push(text, is_last=True)
    assert whole == (reasoning, content)


@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", "think>", "\n", "a", " ", "<"])
    ),
    is_inside=st.booleans(),
)
def test_pieces_of_a_text_are_split_as_the_whole_text_is(pieces: list[str], is_inside: bool):
    splitter = ReasoningSplitter(is_inside)
    found = [splitter.push(piece) for piece in pieces] + [splitter.push("", is_last=True)]
    joined = ("".join(r for r, _ in found), "".join(c for _, c in found))
    assert joined == ReasoningSplitter(is_inside).push("".join(pieces), is_last=True)


# Answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_opened", (False, True))
def test_reasoning_and_content_are_told_apart(server: Served, is_opened: bool):
    body: dict[str, Any] = {"chat_template_kwargs": {"opened": is_opened}}
    found = message(server, **body)
    assert (found["reasoning_content"], found["content"]) == (REASONING, CONTENT)
    parts = deltas(server, **body)
    assert "".join(each.get("reasoning_content") or "" for each in parts) == REASONING
    assert "".join(each.get("content") or "" for each in parts) == CONTENT
    assert not any(each.get("reasoning_content") and each.get("content") for each in parts)


def test_reasoning_can_be_left_out_or_left_in(server: Served):
    left_out = message(server, include_reasoning=False)
    assert "reasoning_content" not in left_out and left_out["content"] == CONTENT
    parts = deltas(server, include_reasoning=False)
    assert not any("reasoning_content" in each for each in parts)
    whole = "".join(WRITTEN[:-1])
    for body in ({"separate_reasoning": False}, {"reasoning_format": "none"}):
        left_in = message(server, **body)
        assert "reasoning_content" not in left_in and left_in["content"] == whole
        assert "".join(each.get("content") or "" for each in deltas(server, **body)) == whole


def test_an_answer_that_ends_within_its_reasoning_has_no_content(server: Served):
    found = message(server, max_tokens=2)
    assert (found["reasoning_content"], found["content"]) == ("hm", "")


def test_tokens_of_the_reasoning_are_counted(server: Served):
    usage = post(server, chat_template_kwargs={"opened": True}).json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}
    usage = post(server, reasoning_effort="none").json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_the_server_says_whether_its_base_thinks_aloud(server: Served):
    about = httpx.get(f"{server.url}/v1/proxytune").json()
    assert about["has_chat"] and about["has_turns"] and about["has_reasoning"]


@pytest.mark.parametrize(
    "body", ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"})
)
def test_thinking_can_be_switched_off_where_the_template_knows_the_switch(server: Served, body):
    found = message(server, **body)
    assert found["content"] == CONTENT and "reasoning_content" not in found


def test_a_templates_own_variables_win_over_the_effort(server: Served):
    body = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
    assert message(server, **body)["reasoning_content"] == REASONING


def num_prompt(server: Served, **body: Any) -> int:
    count: int = post(server, max_tokens=0, **body).json()["usage"]["prompt_tokens"]
    return count


@pytest.mark.parametrize("name", ("reasoning_content", "reasoning"))
def test_reasoning_that_is_sent_back_reaches_the_template(server: Served, name: str):
    turns = [*MESSAGES, {"role": "assistant", "content": "yes"}, *MESSAGES]
    plain = num_prompt(server, messages=turns)
    thought = [turns[0], turns[1] | {name: "abc"}, turns[2]]
    assert num_prompt(server, messages=thought) == plain + len(["<think>", *"abc", "</think>"])


# Chat options -------------------------------------------------------------------------------------


def test_a_final_message_is_continued(server: Served):
    turns = [*MESSAGES, {"role": "assistant", "content": "<think>\nhm"}]
    body: dict[str, Any] = {"messages": turns, "continue_final_message": True}
    for options in (body, body | {"add_generation_prompt": False}):
        found = message(server, **options)
        assert (found["reasoning_content"], found["content"]) == (", so", CONTENT)
    echoed = message(server, separate_reasoning=False, echo=True, **body)
    assert echoed["content"] == "".join(WRITTEN[:-1])
    parts = deltas(server, separate_reasoning=False, echo=True, **body)
    assert "".join(each.get("content") or "" for each in parts) == "".join(WRITTEN[:-1])


def test_the_generation_prompt_can_be_left_out(server: Served):
    with_prompt = num_prompt(server)
    assert num_prompt(server, add_generation_prompt=False) == with_prompt - len("a:")
    turns = [*MESSAGES, {"role": "assistant", "content": "yes"}]
    body = {"messages": turns, "add_generation_prompt": True, "continue_final_message": True}
    answer = post(server, **body)
    assert answer.status_code == 400 and "continue_final_message" in answer.text


def test_variables_of_templates_are_bounded_and_cannot_replace_its_own(server: Served):
    many = {f"x{number}": 1 for number in range(33)}
    for kwargs in (many, {"messages": []}, {"add_generation_prompt": False}, [1]):
        answer = post(server, chat_template_kwargs=kwargs)
        assert answer.status_code == 400 and "template_kwargs" in answer.text


def test_a_chat_whose_last_message_is_the_users_has_nothing_to_echo(server: Served):
    assert message(server, echo=True)["content"] == CONTENT
