"""Prompts that are scored: echo with logprobs, `prompt_logprobs`, and answers without new tokens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import pytest

from proxytune.decode.batch import Event
from proxytune.errors import BackendError
from proxytune.measure.score import CHUNK_TOKENS
from proxytune.model import ProxyTuned
from proxytune.request import Request, SamplingParams
from proxytune.server.engine import Engine
from proxytune.server.service import MAX_PROMPT_LOGPROBS
from proxytune.server.turns import PromptScores, Ticket
from proxytune.testing import toy_model
from tests.server.test_engine import Gate, Listener, gated
from tests.support.served import Served, served

EXPERTS = {"one": 1.0, "two": 0.5}


def fresh(**options: Any) -> ProxyTuned:
    return toy_model(memory=0.5, eos_logit=-100.0, experts=EXPERTS, **options)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(fresh()) as running:
        yield running


def post(server: Served, path: str = "completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)


def logprobs_of(text: str, **steering: Any) -> list[float]:
    return [step.logprob for step in fresh().explain(text[0], text[1:], **steering).steps]


def text_of(prompt: Any, num_new: int, **steering: Any) -> str:
    params = SamplingParams(max_new_tokens=num_new)
    return fresh().generate(Request(prompt, params, **steering)).text


# Over HTTP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ("abcd", [0, 1, 2, 3]))
@pytest.mark.parametrize("num_new", (0, 1, 5))
def test_echo_with_logprobs_lists_the_prompts_tokens_before_the_new_ones(server, prompt, num_new):
    """It was refused, and so were the clients that score texts this way."""
    found = post(server, prompt=prompt, max_tokens=num_new, temperature=0, logprobs=2, echo=True)
    choice = found.json()["choices"][0]
    text = "abcd" + (text_of("abcd", num_new) if num_new else "")
    assert choice["text"] == text and choice["finish_reason"] == "length"
    listed = choice["logprobs"]
    assert listed["tokens"] == list(text) and listed["text_offset"] == list(range(len(text)))
    assert listed["token_logprobs"][0] is None and listed["top_logprobs"][0] is None
    assert listed["token_logprobs"][1:4] == logprobs_of("abcd")
    assert listed["token_logprobs"][1:] == pytest.approx(logprobs_of(text), abs=1e-5)
    assert all(2 <= len(top) <= 3 for top in listed["top_logprobs"][1:])
    assert found.json()["usage"]["completion_tokens"] == num_new
    assert found.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_logprobs_of_zero_list_the_token_itself_alone(server):
    """`top_logprobs` was null, and in the API and in vLLM it always has the chosen token."""
    choice = post(server, prompt="ab", max_tokens=1, logprobs=0, echo=True).json()["choices"][0]
    scores = choice["logprobs"]["token_logprobs"]
    assert scores[:2] == [None, *logprobs_of("ab")]
    new = choice["text"][2]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": scores[1]}, {new: scores[2]}]


def test_the_token_itself_is_listed_beside_the_likeliest_ones(server):
    body = {"prompt": "abcdefgh", "max_tokens": 0, "echo": True}
    listed = post(server, logprobs=1, **body).json()["choices"][0]["logprobs"]
    tokens = zip("bcdefgh", listed["token_logprobs"][1:], listed["top_logprobs"][1:], strict=True)
    for token, logprob, top in tokens:
        assert top[token] == logprob <= max(top.values()) and 1 <= len(top) <= 2
    assert any(len(top) == 2 for top in listed["top_logprobs"][1:])


@pytest.mark.parametrize("steering", ({"alpha": 0}, {"alpha": 2.5, "experts": "two"}))
def test_a_prompt_is_scored_with_the_requests_own_steering(server, steering):
    own = {("expert" if name == "experts" else name): value for name, value in steering.items()}
    body = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1, "proxytune": own}
    listed = post(server, **body).json()["choices"][0]["logprobs"]
    assert listed["token_logprobs"][1:] == logprobs_of("abc", **steering)


def test_several_prompts_and_answers_have_each_prompts_scores(server):
    body = {"prompt": ["abc", "zy", "a"], "n": 2, "max_tokens": 3, "logprobs": 1, "echo": True}
    choices = post(server, seed=1, **body).json()["choices"]
    for choice, prompt in zip(choices, ("abc", "abc", "zy", "zy", "a", "a"), strict=True):
        assert choice["text"].startswith(prompt) and len(choice["text"]) == len(prompt) + 3
        scores = choice["logprobs"]["token_logprobs"]
        expected = logprobs_of(prompt) if len(prompt) > 1 else []
        assert scores[: len(prompt)] == [None, *expected]
        assert len(scores) == len(choice["text"]) and None not in scores[1:]
    plain = post(server, seed=1, **(body | {"logprobs": None})).json()["choices"]
    assert [choice["text"] for choice in choices] == [choice["text"] for choice in plain]


@pytest.mark.parametrize("num_new", (0, 6))
def test_a_streams_pieces_joined_are_the_whole_scored_text(server, num_new):
    body = {"prompt": ["abcd", "zy"], "max_tokens": num_new, "logprobs": 1, "echo": True}
    whole = post(server, temperature=0, **body).json()["choices"]
    lines = post(server, temperature=0, stream=True, **body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    for index, choice in enumerate(whole):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(each["text"] for each in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            parts = [each["logprobs"][name] for each in own if each["logprobs"]]
            assert [value for part in parts for value in part] == values


@pytest.mark.parametrize("path", ("completions", "chat/completions"))
def test_prompt_logprobs_have_vllms_form(server, path):
    is_chat = path.startswith("chat")
    prompt = {"messages": [{"role": "user", "content": "abc"}]} if is_chat else {"prompt": "abc"}
    answer = post(server, path, prompt_logprobs=2, max_tokens=1, **prompt).json()
    found = answer["prompt_logprobs"] if is_chat else answer["choices"][0]["prompt_logprobs"]
    steps = fresh().explain("a", "bc", top=2).steps
    assert found[0] is None and len(found) == 3
    for entry, step in zip(found[1:], steps, strict=True):
        view = step.views["steered"]
        own = entry[str(step.token_id)]
        assert (own["logprob"], own["rank"]) == (step.logprob, view.rank)
        assert own["decoded_token"] == "abcdefghijklmnopqrstuvwxyz"[step.token_id]
        others = {token_id: logprob for token_id, logprob in view.top}
        assert {int(i): e["logprob"] for i, e in entry.items()} == others | {
            step.token_id: step.logprob
        }
    alone = post(server, path, prompt_logprobs=0, max_tokens=0, **prompt).json()
    found = alone["prompt_logprobs"] if is_chat else alone["choices"][0]["prompt_logprobs"]
    assert [len(entry) for entry in found[1:]] == [1, 1]


@pytest.mark.parametrize("path", ("completions", "chat/completions"))
def test_token_ids_are_listed_if_asked(server, path):
    is_chat = path.startswith("chat")
    prompt = {"messages": [{"role": "user", "content": "abc"}]} if is_chat else {"prompt": "abc"}
    body = prompt | {"max_tokens": 3, "temperature": 0, "return_token_ids": True}
    whole = post(server, path, **body).json()
    choice = whole["choices"][0]
    assert (whole if is_chat else choice)["prompt_token_ids"] == [0, 1, 2]
    new_ids = fresh().generate("abc", SamplingParams(max_new_tokens=3)).token_ids
    assert choice["token_ids"] == list(new_ids)
    lines = post(server, path, stream=True, **body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    choices = [chunk["choices"][0] for chunk in chunks]
    streamed = [token_id for each in choices for token_id in each.get("token_ids") or []]
    assert streamed == list(new_ids)
    assert (chunks if is_chat else choices)[0]["prompt_token_ids"] == [0, 1, 2]
    plain = post(server, path, **(body | {"return_token_ids": None})).json()
    assert plain["choices"][0]["token_ids"] is None
    assert (plain if is_chat else plain["choices"][0])["prompt_token_ids"] is None


def test_tokens_can_be_written_as_their_ids(server):
    body = {"prompt": "abc", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    plain = post(server, **body).json()["choices"][0]
    found = post(server, return_tokens_as_token_ids=True, **body).json()["choices"][0]
    assert found["text"] == plain["text"]
    assert found["logprobs"]["tokens"][:3] == ["token_id:0", "token_id:1", "token_id:2"]
    assert found["logprobs"]["text_offset"] == plain["logprobs"]["text_offset"]
    assert "token_id:1" in found["logprobs"]["top_logprobs"][1]


def test_what_cannot_be_scored_is_refused_by_name(server):
    answer = post(server, prompt="ab", prompt_logprobs=1, stream=True)
    assert answer.status_code == 400 and "prompt_logprobs" in answer.json()["error"]["message"]
    answer = post(server, prompt="ab", prompt_logprobs=21)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt_logprobs"
    num_prompts = MAX_PROMPT_LOGPROBS // (21 * 500) + 1
    answer = post(server, prompt=["ab" * 250] * num_prompts, max_tokens=0, prompt_logprobs=20)
    assert answer.status_code == 400 and "131,072" in answer.json()["error"]["message"]


def test_models_with_other_prompts_score_token_ids_alone():
    model = fresh()
    other = replace(model.formats[2], text="Say {{ prompt }}".lower())
    model.formats = (*model.formats[:2], other, *model.formats[3:])
    with served(model) as running:
        body = {"max_tokens": 0, "echo": True, "logprobs": 1}
        answer = post(running, prompt="abc", **body)
        assert answer.status_code == 400 and "token ids" in answer.json()["error"]["message"]
        listed = post(running, prompt=[0, 1, 2], **body).json()["choices"][0]["logprobs"]
        assert listed["token_logprobs"][1:] == logprobs_of("abc")


def test_a_template_of_the_recipe_is_part_of_what_is_scored():
    model = fresh()
    model.formats = tuple(replace(each, text="q: {{ prompt }}") for each in model.formats)
    with served(model) as running:
        body = {"prompt": "ab", "max_tokens": 0, "echo": True}
        choice = post(running, logprobs=1, **body).json()["choices"][0]
        assert choice["text"] == "q: ab" and choice["logprobs"]["tokens"] == list("q: ab")
        assert choice["logprobs"]["token_logprobs"][1:] == logprobs_of("q: ab")
        assert post(running, **body).json()["choices"][0]["text"] == "ab"


def test_a_base_behind_an_api_is_refused_by_name():
    class Partial(type(fresh().ensemble.members[0].backend)):  # type: ignore[misc]
        partial = True

    model = fresh()
    base = model.ensemble.members[0]
    backend = Partial.__new__(Partial)
    backend.__dict__.update(base.backend.__dict__)
    members = (replace(base, backend=backend), *model.ensemble.members[1:])
    model.ensemble = replace(model.ensemble, members=members)
    with served(model) as running:
        answer = post(running, prompt="ab", echo=True, logprobs=1)
        assert answer.status_code == 400 and "behind an API" in answer.json()["error"]["message"]


def test_the_official_client_reads_scored_prompts(server):
    answer = server.client().completions.create(
        model="toy", prompt="abc", max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    assert answer.choices[0].logprobs.token_logprobs[1:3] == logprobs_of("abc")


# In the engine -----------------------------------------------------------------------------------


def submit(
    engine: Engine, prompt: str, *, num_new: int = 4, generates: bool = True, **ticket: Any
) -> tuple[Ticket, Listener]:
    listener = Listener()
    job = engine.model.job(Request(prompt, SamplingParams(max_new_tokens=num_new)))
    made = Ticket(job, listener.events.put, scores=PromptScores(1), generates=generates, **ticket)
    made.job = replace(job, cancelled=made.is_unwanted)
    engine.submit([made])
    return made, listener


def opened() -> tuple[ProxyTuned, Gate]:
    model, gate = gated()
    gate.is_open = True
    return model, gate


def test_other_rows_go_on_while_a_long_prompt_is_scored():
    """Between two chunks of the prompt each other row gets a token."""
    model, gate = gated()
    with Engine(model) as engine:
        first = Listener()
        job = model.job(Request("ab", SamplingParams(max_new_tokens=50)))
        engine.submit([Ticket(job, first.events.put)])
        gate.permits.release(2)
        while first.events.empty():
            time.sleep(0.005)
        long, listener = submit(engine, "abcdefgh" * (CHUNK_TOKENS // 2), generates=False)
        gate.is_open = True
        gate.permits.release(50)
        assert listener.wait() == "" and listener.log == ["length"]
        seen = first.events.qsize()
        assert first.wait() == text_of("ab", 50) and 4 <= seen < 50
        assert long.scores is not None and len(long.scores.tokens) == 4 * CHUNK_TOKENS - 1
        # Both count as work, so that larger tickets are not overtaken without end.
        assert engine._work == 50 + len(long.scores.tokens)


def test_scored_rows_and_others_are_the_same_texts_as_alone():
    model, _ = opened()
    with Engine(model, max_rows=4, kept_tokens=1000) as engine:
        made = [submit(engine, "abcdefgh"[i:] * 20, num_new=12) for i in range(6)]
        for number, (ticket, listener) in enumerate(made):
            prompt = "abcdefgh"[number:] * 20
            assert listener.wait() == text_of(prompt, 12)
            assert ticket.scores is not None and ticket.num_reused == 0
            assert [each.logprob for each in ticket.scores.tokens] == logprobs_of(prompt)


def test_a_prompt_that_is_being_scored_counts_as_a_running_row_and_can_be_cancelled():
    model, gate = gated()
    with Engine(model, max_rows=1) as engine:
        ticket, listener = submit(engine, "abcdefgh" * (CHUNK_TOKENS // 2))
        waiting, other = submit(engine, "ab", num_new=2)
        gate.permits.release(1)
        while not gate.forwards:
            time.sleep(0.005)
        assert (engine.num_running, engine.num_waiting) == (1, 1)
        ticket.cancel()
        gate.is_open = True
        gate.permits.release(10)
        assert listener.wait() == "" and listener.log == ["cancelled"]
        assert other.wait() == text_of("ab", 2)
        assert not waiting.is_cancelled and len(gate.forwards) < 8


def test_models_that_fail_on_a_prompt_end_its_ticket_alone():
    model, gate = opened()
    gate.poison = 25
    with Engine(model) as engine:
        _, bad = submit(engine, "ab" * 80 + "zz")
        _, good = submit(engine, "ab" * 80)
        with pytest.raises(BackendError, match="choked"):
            bad.wait()
        assert good.wait() == text_of("ab" * 80, 4)


def test_a_stopped_engine_cancels_prompts_that_are_being_scored():
    model, gate = gated()
    engine = Engine(model)
    engine.start()
    _, listener = submit(engine, "abcdefgh" * 200)
    closing = threading.Thread(target=engine.close, args=(0,))
    closing.start()
    gate.is_open = True
    gate.permits.release(50)
    closing.join(10)
    event = listener.events.get(timeout=10)
    assert isinstance(event, Event) and event.finish_reason == "cancelled"
    assert engine.num_running == 0
