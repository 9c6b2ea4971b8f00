"""The server that stands in for others in tests shows what its backend says, as far as its traits let it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from proxytune.backends.toy import ToyBackend
from proxytune.testing import EOS, TOKENS, toy_table, toy_tokenizer
from tests.support.completion_server import (
    LLAMA_CPP,
    OPENAI,
    OPENAI_CHAT,
    VLLM,
    VLLM_CHAT,
    CompletionServer,
    ServerTraits,
)
from tests.support.tiny import tiny_model, tiny_tokenizer

TABLE = toy_table(3, eos_logit=-100.0)
EOS_ID = TOKENS.index(EOS)
CLOSE = {"rel": 1e-6, "abs": 1e-6}
"""JSON writes float32 numbers exactly; batched and single rows may be added up in another order."""


def toy_server(
    traits: ServerTraits | None = None, *, table: torch.Tensor = TABLE, **options: Any
) -> CompletionServer:
    backend = ToyBackend(table, memory=0.5)
    return CompletionServer(backend, toy_tokenizer(), traits=traits, **options)


def ask(
    server: CompletionServer, path: str = "/completions", *, key: str | None = None, **body: Any
) -> tuple[int, Any]:
    """Return status and parsed answer; of a stream the parsed events, after checking that [DONE] ends it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    connection.request("POST", f"/v1{path}", json.dumps(body), headers)
    answer = connection.getresponse()
    data = answer.read().decode()
    connection.close()
    if answer.headers["Content-Type"].startswith("text/event-stream"):
        *events, done, rest = data.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return answer.status, [json.loads(event.removeprefix("data: ")) for event in events]
    return answer.status, json.loads(data)


def choice(server: CompletionServer, path: str = "/completions", **body: Any) -> Any:
    status, answer = ask(server, path, **body)
    assert status == 200, answer
    return answer["choices"][0]


def refusal(server: CompletionServer, path: str = "/completions", **body: Any) -> str:
    status, answer = ask(server, path, **body)
    assert status == 400, answer
    return str(answer["error"]["message"])


def expected(token_ids: Sequence[int], *, table: torch.Tensor = TABLE) -> torch.Tensor:
    """Return the `[vocab]` logprobs after a text."""
    return ToyBackend(table, memory=0.5).prefill([token_ids]).logits[0].log_softmax(-1)


def ids(text: str) -> list[int]:
    return toy_tokenizer().encode(text)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def joined(events: list[Any], *, chat: bool) -> dict[str, Any]:
    """Return what the events of a streamed answer say together."""
    text, reason = "", None
    logprobs: dict[str, list[Any]] = {}
    for event in events:
        for piece in event["choices"]:
            text += piece["delta"].get("content", "") if chat else piece["text"]
            reason = piece["finish_reason"] or reason
            for name, values in (piece["logprobs"] or {}).items():
                logprobs.setdefault(name, []).extend(values)
    return {"text": text, "logprobs": logprobs, "finish_reason": reason}


def test_shown_logprobs_are_the_log_softmax_of_the_backends_logits():
    with toy_server() as server:
        logprobs = choice(server, prompt="abc", max_tokens=4, logprobs=-1, temperature=0)[
            "logprobs"
        ]
    text = ids("abc")
    for place, token in enumerate(logprobs["tokens"]):
        row = expected(text)
        assert logprobs["top_logprobs"][place] == pytest.approx(
            dict(zip(TOKENS, row.tolist(), strict=True)), **CLOSE
        )
        assert token == TOKENS[int(row.argmax())]
        assert logprobs["token_logprobs"][place] == pytest.approx(float(row.max()), **CLOSE)
        text += ids(token)
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert not server.failures


def test_a_transformers_model_can_be_behind_it(tmp_path):
    from transformers import AutoModelForCausalLM

    from proxytune.backends.transformers.backend import TransformersBackend

    tokenizer = tiny_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path))
    backend = TransformersBackend(model, name="tiny")
    with CompletionServer(backend, tokenizer, traits=VLLM) as server:
        answer = choice(
            server,
            prompt="the é",
            max_tokens=3,
            echo=True,
            logprobs=0,
            temperature=0,
            return_token_ids=True,
            ignore_eos=True,
        )
    token_ids = answer["prompt_token_ids"] + answer["token_ids"]
    with torch.no_grad():
        rows = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    scores = [float(row[i]) for row, i in zip(rows[:-1], token_ids[1:], strict=True)]
    # One forward adds up in another order than several.
    assert answer["logprobs"]["token_logprobs"][1:] == pytest.approx(scores, rel=1e-4, abs=1e-5)
    assert answer["text"].startswith("the é")
    assert not server.failures


def test_a_chat_is_the_template_completed():
    with toy_server() as server:
        plain = choice(
            server, prompt="User: hi\nAssistant:", max_tokens=3, temperature=0, logprobs=2
        )
        chat = choice(
            server,
            "/chat/completions",
            messages=user("hi"),
            max_completion_tokens=3,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
        )
    assert chat["message"] == {"role": "assistant", "content": plain["text"]}
    content = chat["logprobs"]["content"]
    assert [entry["token"] for entry in content] == plain["logprobs"]["tokens"]
    assert [entry["logprob"] for entry in content] == plain["logprobs"]["token_logprobs"]
    for entry, top in zip(content, plain["logprobs"]["top_logprobs"], strict=True):
        assert {each["token"]: each["logprob"] for each in entry["top_logprobs"]} == top
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_a_last_message_of_the_assistant_is_continued():
    with toy_server() as server:
        messages = [*user("hi"), {"role": "assistant", "content": "ho"}]
        chat = choice(server, "/chat/completions", messages=messages, temperature=0, max_tokens=4)
        plain = choice(
            server, prompt="User: hi\nAssistant: ho", temperature=0, max_tokens=4, logprobs=0
        )
    assert chat["message"]["content"] == plain["text"]


@pytest.mark.parametrize(
    ("traits", "limit"), [(OPENAI, 5), (VLLM, 20), (OPENAI_CHAT, 20), (VLLM_CHAT, 20)]
)
def test_more_top_logprobs_than_a_server_shows_are_refused_with_the_limit(traits, limit):
    chat = traits.endpoint == "chat"
    path = "/chat/completions" if chat else "/completions"

    def body(number: int) -> dict[str, Any]:
        if chat:
            return {"messages": user("a"), "logprobs": True, "top_logprobs": number}
        return {"prompt": "a", "logprobs": number}

    with toy_server(traits) as server:
        assert ask(server, path, **body(limit))[0] == 200
        message = refusal(server, path, **body(limit + 1))
    if traits.dialect == "vllm":
        assert message == (
            f"Requested sample logprobs of {limit + 1}, which is greater than max allowed: {limit}"
        )
    else:
        name = "top_logprobs" if chat else "logprobs"
        assert message == f"Invalid value for '{name}': must be less than or equal to {limit}."


def test_an_endpoint_that_is_not_there_answers_404():
    with toy_server(VLLM) as server:
        assert ask(server, "/chat/completions", messages=user("a"))[0] == 404
    with toy_server(VLLM_CHAT) as server:
        assert ask(server, "/completions", prompt="a")[0] == 404
        assert ask(server, "/embeddings", input="a")[0] == 404
    assert server.num_requests == 0


def test_the_model_is_listed_and_another_one_is_not_there():
    with toy_server(replace(VLLM, max_context=64), model="big") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/v1/models")
        listed = json.loads(connection.getresponse().read())
        assert ask(server, model="big", prompt="a")[0] == 200
        assert ask(server, model="small", prompt="a")[0] == 404
    assert [(each["id"], each["max_model_len"]) for each in listed["data"]] == [("big", 64)]


def test_tokens_are_named_by_id_only_if_the_request_asks_and_the_server_can():
    with toy_server(VLLM) as server:
        plain = choice(server, prompt="a", max_tokens=1, logprobs=3, temperature=0)
        named = choice(
            server,
            prompt="a",
            max_tokens=1,
            logprobs=3,
            temperature=0,
            return_tokens_as_token_ids=True,
        )
    assert plain["logprobs"]["tokens"] == [plain["text"]]
    assert named["logprobs"]["tokens"] == [f"token_id:{TOKENS.index(plain['text'])}"]
    assert named["logprobs"]["top_logprobs"] == [
        {
            f"token_id:{TOKENS.index(token)}": logprob
            for token, logprob in plain["logprobs"]["top_logprobs"][0].items()
        }
    ]
    with toy_server() as server:
        message = refusal(server, prompt="a", return_tokens_as_token_ids=True)
        assert "return_tokens_as_token_ids" in message
        assert ask(server, prompt="a", return_tokens_as_token_ids=False)[0] == 200


@pytest.mark.parametrize(
    ("changes", "token", "its_bytes"),
    [
        ({}, "\ufffd", [0xC3]),
        ({"exact_bytes": False}, "\ufffd", [0xEF, 0xBF, 0xBD]),
        ({"has_bytes": False}, "\ufffd", None),
        ({"half_characters": "cut", "shows_ids": True}, "", [0xC3]),
    ],
)
def test_half_a_character_is_shown_as_the_servers_traits_say(changes, token, its_bytes):
    tokenizer = tiny_tokenizer()
    e_acute = tokenizer.encode("é")  # two tokens, C3 and A9
    assert len(e_acute) == 2
    table = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
    table[:, e_acute[0]] = 5
    table[e_acute[0], e_acute[1]] = 9
    traits = replace(ServerTraits(), **changes)
    with CompletionServer(ToyBackend(table), tokenizer, traits=traits) as server:
        answer = choice(
            server,
            "/chat/completions",
            messages=user("a"),
            max_tokens=2,
            temperature=0,
            logprobs=True,
            top_logprobs=1,
        )
    assert answer["message"]["content"] == "é"
    first, _ = answer["logprobs"]["content"]
    assert first["top_logprobs"][0] == {k: v for k, v in first.items() if k != "top_logprobs"}
    assert (first["token"], first["bytes"]) == (token, its_bytes)
    assert first.get("id") == (e_acute[0] if traits.shows_ids else None)


def test_bytes_are_those_of_byte_level_tokens_spaces_and_special_tokens_included():
    tokenizer = tiny_tokenizer()
    token_ids = tokenizer.encode(" the Ã\n") + tokenizer.encode("<|im_end|>")
    server = CompletionServer(ToyBackend(torch.zeros(300, 300)), tokenizer)
    assert b"".join(map(server.token_bytes, token_ids)) == " the Ã\n<|im_end|>".encode()
    assert server.token_bytes(299) == b""  # padding of the head


def test_token_ids_are_a_prompt_unless_the_server_reads_text_only():
    with toy_server() as server:
        by_text = choice(server, prompt="abc", temperature=0, logprobs=1)
        assert choice(server, prompt=ids("abc"), temperature=0, logprobs=1) == by_text
        assert "out of vocabulary" in refusal(server, prompt=[0, len(TOKENS)])
    with toy_server(ServerTraits(accepts_token_ids=False)) as server:
        assert "expected a string" in refusal(server, prompt=ids("abc"))


def test_several_prompts_have_a_choice_each():
    with toy_server() as server:
        _, answer = ask(server, prompt=["ab", ids("c")], temperature=0, logprobs=1)
        alone = [choice(server, prompt=text, temperature=0, logprobs=1) for text in ("ab", "c")]
    assert answer["choices"] == [alone[0], alone[1] | {"index": 1}]
    with toy_server(LLAMA_CPP) as server:
        assert refusal(server, prompt=["ab", "c"])


def test_returned_token_ids_are_those_of_prompt_and_answer():
    with toy_server(VLLM) as server:
        answer = choice(server, prompt="abc", max_tokens=5, return_token_ids=True)
        _, events = ask(
            server, prompt="abc", max_tokens=5, return_token_ids=True, stream=True, temperature=0
        )
    assert answer["prompt_token_ids"] == ids("abc")
    assert answer["token_ids"] == ids(answer["text"])
    assert events[0]["choices"][0]["prompt_token_ids"] == ids("abc")
    streamed = [i for event in events for i in event["choices"][0]["token_ids"]]
    assert streamed == ids(joined(events, chat=False)["text"])
    with toy_server(VLLM_CHAT) as server:
        _, whole = ask(
            server,
            "/chat/completions",
            messages=user("a"),
            return_token_ids=True,
            prompt_logprobs=0,
        )
    assert whole["prompt_token_ids"] == ids("User: a\nAssistant:")
    assert len(whole["prompt_logprobs"]) == len(whole["prompt_token_ids"])
    assert whole["choices"][0]["token_ids"] == ids(whole["choices"][0]["message"]["content"])


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_echo_scores_the_prompt(max_tokens):
    with toy_server(VLLM) as server:
        answer = choice(
            server, prompt="abca", echo=True, max_tokens=max_tokens, logprobs=2, temperature=0
        )
        alone = choice(
            server, prompt="abca", max_tokens=max(max_tokens, 1), logprobs=2, temperature=0
        )
        _, events = ask(
            server,
            prompt="abca",
            echo=True,
            max_tokens=max_tokens,
            logprobs=2,
            temperature=0,
            stream=True,
        )
    text = answer["text"]
    assert text == "abca" + alone["text"][:max_tokens]
    logprobs = answer["logprobs"]
    assert logprobs["tokens"] == list(text)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for place in range(1, len(text)):
        row = expected(ids(text[:place]))
        token_id = ids(text)[place]
        assert logprobs["token_logprobs"][place] == pytest.approx(float(row[token_id]), **CLOSE)
        top = {int(i) for i in row.topk(2).indices} | {token_id}
        assert logprobs["top_logprobs"][place] == pytest.approx(
            {TOKENS[i]: float(row[i]) for i in top}, **CLOSE
        )
    assert answer["finish_reason"] == "length"
    assert joined(events, chat=False) == {
        name: answer[name] for name in ("text", "logprobs", "finish_reason")
    }


def test_prompt_logprobs_name_each_prompt_token_its_rank_and_the_top_ones():
    with toy_server(VLLM) as server:
        scores = choice(server, prompt="abca", max_tokens=1, prompt_logprobs=2)["prompt_logprobs"]
        message = refusal(server, prompt="abca", prompt_logprobs=21)
        assert refusal(server, prompt="a", prompt_logprobs=1, stream=True)
    assert message == "Requested prompt logprobs of 21, which is greater than max allowed: 20"
    assert scores[0] is None and len(scores) == 4
    for place in range(1, 4):
        row = expected(ids("abca"[:place]))
        shown = {ids("abca")[place]} | {int(i) for i in row.topk(2).indices}
        assert {int(key) for key in scores[place]} == shown
        for key, value in scores[place].items():
            assert value["logprob"] == pytest.approx(float(row[int(key)]), **CLOSE)
            assert value["rank"] == 1 + int((row > row[int(key)]).sum())
            assert value["decoded_token"] == TOKENS[int(key)]


def test_what_a_server_does_not_know_it_refuses_or_ignores_as_its_traits_say():
    with toy_server(ServerTraits()) as server:
        for name in ("echo", "prompt_logprobs", "return_token_ids", "ignore_eos", "colour"):
            assert refusal(server, prompt="a", **{name: 1}).endswith(f"supplied: {name}")
        # Of an option that exists elsewhere, saying no is fine.
        assert ask(server, prompt="a", echo=False, return_token_ids=None)[0] == 200
    with toy_server(ServerTraits(refuses_unknown=False)) as server:
        answer = choice(server, prompt="ab", echo=True, prompt_logprobs=1, colour=1)
        assert len(answer["text"]) == 16 and "prompt_logprobs" not in answer
        # What would change the answer is refused all the same.
        for name, value in {"n": 2, "top_p": 0.5, "top_k": 3, "presence_penalty": 1}.items():
            assert name in refusal(server, prompt="a", **{name: value})
        assert ask(server, prompt="a", n=1, top_p=1.0, top_k=-1, user="me")[0] == 200


@pytest.mark.parametrize("kind", ["none", "ignored", "shown", "hidden"])
def test_a_logit_bias_is_refused_or_sampled_and_shown_or_hidden(kind):
    row = expected(ids("ab"))
    favourite, worst = int(row.argmax()), int(row[:EOS_ID].argmin())
    body = {"prompt": "ab", "logit_bias": {str(worst): 100}, "max_tokens": 1, "logprobs": 1}
    with toy_server(ServerTraits(logit_bias=kind)) as server:
        if kind == "none":
            assert "logit_bias" in refusal(server, **body)
            return
        answer = choice(server, **body, temperature=0)
    logprobs = answer["logprobs"]
    if kind == "ignored":
        assert answer["text"] == TOKENS[favourite]
        return
    assert answer["text"] == TOKENS[worst]
    if kind == "hidden":
        shown = {TOKENS[worst]: float(row[worst]), TOKENS[favourite]: float(row[favourite])}
    else:
        biased = row.clone()
        biased[worst] += 100
        shown = {TOKENS[worst]: float(biased.log_softmax(-1)[worst])}
    assert logprobs["top_logprobs"] == [pytest.approx(shown, rel=1e-5, abs=1e-5)]
    assert logprobs["token_logprobs"] == [pytest.approx(shown[TOKENS[worst]], rel=1e-5, abs=1e-5)]


def test_a_bias_that_makes_no_sense_is_refused():
    with toy_server(ServerTraits(max_logit_bias=2)) as server:
        for bias in ({"a": 1}, {"0": 101}, {"0": "1"}, {"99": 1}, {"0": 1, "1": 1, "2": 1}):
            assert "logit_bias" in refusal(server, prompt="a", logit_bias=bias)


@pytest.mark.parametrize(
    ("place", "shown"), [("added", "wab"), ("displaces", "wa"), ("apart", "ab")]
)
def test_a_sampled_token_outside_the_top_ones_stands_where_the_traits_say(place, shown):
    table = torch.zeros(len(TOKENS), len(TOKENS))
    table[:, :2] = torch.tensor([3.0, 2.0])  # a and b are the top two, w is sampled
    traits = ServerTraits(sampled_in_top=place)
    bias = {str(TOKENS.index("w")): 50}
    with toy_server(traits, table=table) as server:
        chat = choice(
            server,
            "/chat/completions",
            messages=user("c"),
            max_tokens=1,
            logprobs=True,
            top_logprobs=2,
            logit_bias=bias,
        )
        plain = choice(server, prompt="c", max_tokens=1, logprobs=2, logit_bias=bias)
    (entry,) = chat["logprobs"]["content"]
    assert entry["token"] == "w"
    assert "".join(each["token"] for each in entry["top_logprobs"]) == shown
    assert "".join(plain["logprobs"]["top_logprobs"][0]) == shown


def test_of_tokens_that_share_a_text_the_less_likely_one_is_shown():
    tokenizer = tiny_tokenizer()
    halves = [tokenizer.encode("é")[0], tokenizer.encode("Ā")[0]]  # bytes C3 and C4
    table = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
    table[:, halves] = torch.tensor([9.0, 8.0])
    with CompletionServer(ToyBackend(table), tokenizer) as server:
        answer = choice(server, prompt="a", max_tokens=1, logprobs=2, temperature=0)
    (top,) = answer["logprobs"]["top_logprobs"]
    row = table[0].log_softmax(-1)
    assert top == {"\ufffd": pytest.approx(float(row[halves[1]]), **CLOSE)}


def test_llama_cpp_shows_completions_in_chat_style_with_ids():
    with toy_server(LLAMA_CPP) as server:
        answer = choice(server, prompt="a", max_tokens=1, logprobs=2, temperature=0)
    (entry,) = answer["logprobs"]["content"]
    assert entry["id"] == TOKENS.index(answer["text"])
    assert len(entry["top_logprobs"]) == 2
    with pytest.raises(ValueError, match="echo"):
        replace(LLAMA_CPP, has_echo=True)


def test_sampling_follows_the_seed_and_the_distribution():
    """The odds of a false alarm are below one in a million: five standard deviations."""
    body = {"prompt": "ab", "max_tokens": 400, "temperature": 2.0}
    table = TABLE[:1].expand_as(TABLE)  # every step has one distribution
    with toy_server(table=table) as server:
        text = choice(server, **body, seed=1)["text"]
        assert choice(server, **body, seed=1)["text"] == text
        assert choice(server, **body, seed=2)["text"] != text
    # With `memory=0.5` every row is 1.5 times the table's; the temperature divides it by 2.
    probs = (table[0] * 1.5 / 2.0).softmax(-1)
    for token, prob in zip(TOKENS, probs.tolist(), strict=True):
        assert abs(text.count(token) - 400 * prob) <= 5 * (400 * prob * (1 - prob)) ** 0.5 + 1


def test_a_stop_string_ends_the_text_and_is_left_out():
    with toy_server() as server:
        whole = choice(server, prompt="a", max_tokens=12, seed=3)["text"]
        stop = whole[5:7]
        body = {"prompt": "a", "max_tokens": 12, "seed": 3, "stop": ["unseen", stop]}
        cut = choice(server, **body, logprobs=0)
        _, events = ask(server, **body, stream=True)
        assert refusal(server, prompt="a", stop=[""])
    assert cut["text"] == whole[: whole.index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert len(cut["logprobs"]["tokens"]) == whole.index(stop) + 2  # the stop's tokens were sampled
    assert joined(events, chat=False)["text"] == cut["text"]


@pytest.mark.parametrize("shows_eos", [True, False])
def test_the_end_of_a_text_is_counted_and_left_out_of_the_text(shows_eos):
    table = TABLE.clone()
    table[:, EOS_ID] = 50.0
    traits = replace(VLLM, shows_eos=shows_eos)
    body = {"prompt": "ab", "temperature": 0, "logprobs": 0, "return_token_ids": True}
    with toy_server(traits, table=table) as server:
        status, answer = ask(server, **body)
        going_on = choice(server, **body, ignore_eos=True, max_tokens=3)
    (ended,) = answer["choices"]
    assert (status, ended["text"], ended["finish_reason"]) == (200, "", "stop")
    assert answer["usage"]["completion_tokens"] == 1
    assert ended["logprobs"]["tokens"] == ([EOS] if shows_eos else [])
    assert ended["token_ids"] == ([EOS_ID] if shows_eos else [])
    assert going_on["token_ids"] == [EOS_ID] * 3 and going_on["finish_reason"] == "length"


@pytest.mark.parametrize("chat", [False, True])
def test_a_streamed_answer_joined_is_the_whole_one(chat):
    tokenizer = tiny_tokenizer()  # random bytes, so that characters are split and broken
    table = 2 * torch.randn(266, 266, generator=torch.Generator().manual_seed(1))
    body: dict[str, Any] = {"max_tokens": 60, "seed": 5, "stop": "\x00\x01\x02"}
    path = "/completions"
    if chat:
        path = "/chat/completions"
        body |= {"messages": user("hé"), "logprobs": True, "top_logprobs": 2}
    else:
        body |= {"prompt": "hé", "logprobs": 2}
    with CompletionServer(ToyBackend(table), tokenizer) as server:
        status, whole = ask(server, path, **body)
        _, events = ask(server, path, **body, stream=True, stream_options={"include_usage": True})
        assert refusal(server, path, **body, stream_options={"include_usage": True})
    assert status == 200
    only = whole["choices"][0]
    assert joined(events, chat=chat) == {
        "text": only["message"]["content"] if chat else only["text"],
        "logprobs": only["logprobs"],
        "finish_reason": only["finish_reason"],
    }
    assert len(events) == 60 + 1 + chat  # one a token, the usage, and the opening of a chat
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]


def test_requests_and_tokens_are_counted_and_bodies_kept():
    with toy_server(VLLM) as server:
        _, answer = ask(server, prompt="abc", max_tokens=4)
        ask(server, prompt="ab", max_tokens=2, stream=True)
        ask(server, prompt="", max_tokens=2)
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert server.bodies == [
        {"prompt": "abc", "max_tokens": 4},
        {"prompt": "ab", "max_tokens": 2, "stream": True},
        {"prompt": "", "max_tokens": 2},
    ]
    assert (server.num_requests, server.num_prompt_tokens, server.num_completion_tokens) == (
        3,
        5,
        6,
    )
    assert server.statuses == [200, 200, 400]
    assert server.received[0].path == "/v1/completions"
    assert server.received[0].headers["host"] == f"127.0.0.1:{server.port}"


def test_a_wrong_key_is_answered_401():
    with toy_server(api_key="sesame") as server:
        assert ask(server, prompt="a")[0] == 401
        assert ask(server, prompt="a", key="Sesame")[0] == 401
        assert ask(server, prompt="a", key="sesame")[0] == 200
    assert server.num_requests == 1


def test_texts_beyond_the_context_are_refused_and_a_chat_goes_on_to_its_end():
    with toy_server(ServerTraits(max_context=24)) as server:
        assert ask(server, prompt="abcdefgh", max_tokens=16)[0] == 200
        message = refusal(server, prompt="abcdefghi", max_tokens=16)
        answer = choice(server, "/chat/completions", messages=user("a"))
    assert message.startswith("This model's maximum context length is 24 tokens.")
    assert "requested 25 tokens" in message
    prompt = "User: a\nAssistant:"
    assert len(prompt) + len(answer["message"]["content"]) == 24
    backend = ToyBackend(TABLE, max_context=8)
    with CompletionServer(backend, toy_tokenizer(), traits=ServerTraits(max_context=9)) as server:
        assert "is 8 tokens" in refusal(server, prompt="ab", max_tokens=7)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "a", "max_tokens": "1"}', b"{}"]
)
def test_a_body_that_is_no_request_is_answered_400(body):
    with toy_server() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/v1/completions", body)
        answer = connection.getresponse()
        assert (answer.status, "message" in json.loads(answer.read())["error"]) == (400, True)
    assert not server.failures


@pytest.mark.parametrize("dialect", ["openai", "vllm", "flat"])
def test_errors_have_the_shape_of_the_dialect(dialect):
    with toy_server(ServerTraits(dialect=dialect)) as server:
        _, answer = ask(server, prompt="a", max_tokens=0)
    error = answer if dialect == "flat" else answer["error"]
    assert error["message"] == "max_tokens must be at least 1, got 0."
    assert error["param"] == "max_tokens"
    assert error["type"] == ("invalid_request_error" if dialect == "openai" else "BadRequestError")
    assert error["code"] == (None if dialect == "openai" else 400)


def test_a_connection_is_kept_for_the_next_request_also_after_a_refusal_and_a_stream():
    with toy_server() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        for body in ({"prompt": "a"}, {"prompt": ""}, {"prompt": "a", "stream": True}):
            connection.request("POST", "/v1/completions", json.dumps(body))
            connection.getresponse().read()
        assert server.num_connections == 1
        assert server.statuses == [200, 400, 200]
    with pytest.raises((http.client.RemoteDisconnected, OSError)):
        connection.request("POST", "/v1/completions", b"{}")
        connection.getresponse()


def test_a_fault_of_the_server_itself_is_answered_500_and_kept():
    class Broken(ToyBackend):
        def extend(self, state, token_ids):
            raise RuntimeError("out of order")

    with CompletionServer(Broken(TABLE), toy_tokenizer()) as server:
        status, answer = ask(server, prompt="a", max_tokens=2)
    assert status == 500 and "out of order" in answer["error"]["message"]
    assert len(server.failures) == 1
