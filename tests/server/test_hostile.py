"""Requests made to stop the server: bodies that cost more than they weigh, places and memory for nobody else.

Sizes and counts are checked where they are cheap to check; what an ordinary client meets is in `test_app.py`,
broken networks and models are in `test_faults.py`.
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from proxytune.backends.toy import ToyTokenizer
from proxytune.errors import InvalidRequest, PromptTooLong, Unavailable
from proxytune.model import ProxyTuned
from proxytune.server.app import make_app
from proxytune.server.body import (
    BODIES_HELD,
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_STRINGS,
    InFlight,
    check_shape,
)
from proxytune.server.guards import MAX_MESSAGE, OPEN_PATHS, Arrival
from proxytune.server.rendering import CUT_TOKENS, NUM_DESKS, PIECE_CHARS, Measured
from proxytune.server.schema import ChatRequest, CompletionRequest, read_request
from proxytune.testing import toy_tokenizer
from tests.server.test_faults import (
    BODY,
    KEYS,
    as_response,
    assert_it_works,
    checked_error,
    complete,
    fresh,
    head,
    post,
    read_all,
    read_answer,
    read_until,
    text_of,
    wait_until,
)
from tests.support.served import SETTINGS, Served, served

LIMIT = 2 * 2**20
MAX_WAIT_S = 0.5
"""Time in which any body is refused, and /health answers meanwhile."""
MAX_GROWTH = 100 * 2**20


# Bodies ---------------------------------------------------------------------------------------------


def many(item: str, separator: str = ",") -> str:
    """Return as many items as a body holds beside its other fields."""
    return separator.join([item] * ((LIMIT - 200) // (len(item.encode()) + len(separator))))


def numbered(form: str, num: int) -> str:
    return ",".join(form % number for number in range(num))


def with_object(name: str, entries: str) -> str:
    return with_field(f'"{name}":{{{entries}}}')


def completion(prompt: str) -> str:
    return f'{{"model":"toy","max_tokens":1,"prompt":{prompt}}}'


def with_field(field: str) -> str:
    return f'{{"model":"toy","max_tokens":1,"prompt":"a",{field}}}'


def chat(messages: str, field: str = "") -> str:
    return f'{{"model":"toy","max_tokens":1,"messages":{messages}{field}}}'


MESSAGE = '{"role":"user","content":"a"}'
EMPTY = '"%d":{}'
PART = '{"type":"text","text":"a"}'


def parts(*items: str) -> str:
    return f'[{{"role":"user","content":[{",".join(items)}]}}]'


def with_metadata(entries: str) -> str:
    return chat(f"[{MESSAGE}]", f',"metadata":{{{entries}}}')


BODIES = {
    "empty lists": completion(f"[{many('[]')}]"),
    "empty objects": completion(f"[{many('{}')}]"),
    "negative ids": completion(f"[[{many('-1')}]]"),
    "half a million ids": completion(f"[{','.join(['12'] * 500_000)}]"),
    "a million ids": completion(f"[{many('1')}]"),
    "a million ids and a text": completion(f'[{many("1")},"a"]'),
    "lists of ids": completion(f"[[{many('1')}],[1]]"),
    "fractions": completion(f"[{many('1.5')}]"),
    "infinities": completion(f"[{many('1e400')}]"),
    "numbers of four thousand digits": completion(f"[{many('9' * 4000)}]"),
    "a number of two million digits": completion("9" * (LIMIT - 100)),
    "a long fraction": with_field(f'"temperature":-0.{"1" * (LIMIT - 100)}'),
    "unknown fields": with_field(numbered('"%d":0', 180_000)),
    "fewer unknown fields": with_field(numbered('"%d":0', 16_000)),
    "unknown fields below": with_object("proxytune", numbered('"%d":0', 16_000)),
    "one field again and again": with_field(many('"n":1')),
    "biases": with_object("logit_bias", numbered('"x%d":0', 150_000)),
    "fewer biases": with_object("logit_bias", numbered('"x%d":0', 16_000)),
    "experts": with_object("proxytune", f'"experts":{{{numbered(EMPTY, 8_000)}}}'),
    "stops": with_field(f'"stop":[{many(chr(34) + "a" + chr(34))}]'),
    "fewer stops": with_field(f'"stop":[{numbered(chr(34) + "%d" + chr(34), 16_000)}]'),
    "stop ids": with_field(f'"stop_token_ids":[{many("1")}]'),
    "a field with a long name": with_field(f'"{"a" * (LIMIT - 100)}":1'),
    "a bias for a long number": with_field(f'"logit_bias":{{"{"9" * (LIMIT - 100)}":1}}'),
    "a model with a long name": f'{{"prompt":"a","model":"{"a" * (LIMIT - 100)}"}}',
    "deep lists": completion("[" * (LIMIT // 2 - 100) + "]" * (LIMIT // 2 - 100)),
    "deep lists without an end": completion("[" * (LIMIT - 100)),
    "lists somewhat deep": completion("[" * 8_000 + "]" * 8_000),
    "deep objects": completion('{"a":' * 8_000 + "1" + "}" * 8_000),
    "nothing but quotation marks": '"' * LIMIT,
    "a text that is too long": completion(f'"{"a" * (LIMIT - 100)}"'),
    "a text of escapes": completion(f'"{many(chr(92) + "u0061", "")}"'),
    "a text of backslashes": completion(f'"{chr(92) * 2 * (LIMIT // 2 - 100)}"'),
    "a text of quotation marks": completion(f'"{many(chr(92) + chr(34), "")}"'),
    "a text of halves": completion(f'"{many(chr(92) + "ud800", "")}"'),
    "texts": completion(f"[{many(chr(34) * 2)}]"),
    "white space": completion(" " * (LIMIT - 100) + '""'),
    "parts": chat(parts(many("{}"))),
    "fewer parts": chat(parts(*["{}"] * 8_000)),
    "good parts": chat(parts(*[PART] * 3_000)),
    "messages": chat(f"[{many(MESSAGE)}]"),
    "fewer messages": chat(f"[{','.join([MESSAGE] * 4_000)}]"),
    "a long message": chat('[{"role":"user","content":"%s"}]' % ("a b " * (LIMIT // 4 - 100))),
    "tools": chat(f"[{MESSAGE}]", f',"tools":[{many("1")}]'),
    "metadata": with_metadata(numbered('"%d":0', 16_000)),
    "modalities": chat(f"[{MESSAGE}]", f',"modalities":[{many(chr(34) * 2)}]'),
}  # fmt: skip
"""Each was a request, or is a relative of one, that stopped the server for seconds or took a gigabyte."""

NO_TEXT = {
    "no UTF-8": b'{"model":"toy","prompt":"' + b"\xff" * (LIMIT - 100) + b'"}',
    "UTF-16": completion('"a"').encode("utf-16"),
    "half of a pair in UTF-8": completion('"a"').encode().replace(b'"a"', b'"\xed\xa0\x80"'),
}

PROGRAM = """
import os, sys
from proxytune.testing import toy_model
from tests.support.served import served
with served(toy_model(memory=0.5, eos_logit=-100.0, max_context=256)) as running:
    print(running.port, os.getpid(), flush=True)
    sys.stdin.read()
"""


@contextmanager
def own_process() -> Iterator[tuple[int, int]]:
    """Run a server in a process of its own, so that its time and memory can be seen."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None and process.stdout is not None
        port, pid = map(int, process.stdout.readline().split())
        yield port, pid
        process.stdin.close()
        process.wait(20)
    finally:
        process.kill()
        process.wait()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, float]:
    """Return the status and the content of an answer, and the seconds that it took."""
    started = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = answer.status, answer.read(), time.monotonic() - started
    connection.close()
    return found


def peak_memory(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_body_stops_the_server_or_fills_its_memory():
    """Some were answered after 43 seconds, in which nobody else was, and took 1.3 GB.

    Each is sent up to three times, because other processes may be busy.
    """
    bodies = {name: body.encode() for name, body in BODIES.items()} | NO_TEXT
    waits: list[float] = []
    with own_process() as (port, pid):
        is_over = threading.Event()

        def ask_health() -> None:
            while not is_over.is_set():
                waits.append(ask(port, "GET", "/health")[2])
                time.sleep(0.02)

        asking = threading.Thread(target=ask_health)
        asking.start()
        try:
            wait_until(lambda: len(waits) > 10)
            before = peak_memory(pid)
            for name, body in bodies.items():
                assert len(body) <= LIMIT, name
                path = "/v1/chat/completions" if b'"messages"' in body[:60] else "/v1/completions"
                for _ in range(3):
                    waits.clear()
                    status, content, seconds = ask(port, "POST", path, body)
                    assert status == 400 and len(content) < 1000, (name, status, content[:300])
                    assert set(json.loads(content)) == {"error"}
                    waits.append(ask(port, "GET", "/health")[2])
                    if seconds < MAX_WAIT_S and max(waits) < MAX_WAIT_S:
                        break
                else:
                    pytest.fail(
                        f"{name}: answered after {seconds:.1f} s, /health {max(waits):.1f} s"
                    )
            grown = peak_memory(pid) - before
        finally:
            is_over.set()
            asking.join()
    assert grown < MAX_GROWTH


@pytest.mark.parametrize("name", BODIES)
def test_no_body_is_read_in_more_than_an_instant(name):
    """Before prompts are rendered; what is refused is refused for its size or its first bad item."""
    body = BODIES[name].encode()
    kind = ChatRequest if b'"messages"' in body[:60] else CompletionRequest
    seconds = []
    for _ in range(3):
        started = time.thread_time()
        try:
            read_request(kind, body)
        except InvalidRequest as error:
            assert len(str(error)) < 1000
        seconds.append(time.thread_time() - started)
    assert min(seconds) < MAX_WAIT_S


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, None),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nests lists and objects 33 deep"),
        (b"[" + b",".join([b'"[{"'] * MAX_STRINGS) + b"]", None),
        (b"[" + b",".join([b'""'] * (MAX_STRINGS + 1)) + b"]", "16,385 strings"),
        (b"[" + b",".join([b"{}"] * (MAX_CONTAINERS - 1)) + b"]", None),
        (b"[" + b",".join([b"{}"] * MAX_CONTAINERS) + b"]", "8,193 lists and objects"),
        (b'["' + b'\\"[\\\\\\"{' * 10_000 + b'"]', None),  # one text with \" and \\ in it
        (b'["\\\\",' + b"[]," * MAX_CONTAINERS + b"0]", "8,193"),  # a text that ends with a backslash
        (b'"' + b"[{" * 100_000 + b'"', None),
    ],
)  # fmt: skip
def test_lists_objects_and_strings_are_counted_outside_of_texts(body, told):
    if told is None:
        check_shape(body)
    else:
        with pytest.raises(InvalidRequest, match=told):
            check_shape(body)


def test_a_request_of_the_largest_shape_that_the_api_allows_is_read():
    parts = [{"type": "text", "text": '"[{'}] * 3
    messages = [{"role": "user", "content": parts}] * 1000
    body = {"model": "toy", "messages": messages, "logit_bias": {str(n): 1 for n in range(500)}}
    assert len(read_request(ChatRequest, json.dumps(body).encode()).messages) == 1000


@pytest.mark.parametrize(
    ("kind", "body", "told", "field"),
    [
        (CompletionRequest, completion('["a"' + ',"a"' * 64 + "]"), "more than 64 items", "prompt"),
        (CompletionRequest, completion("[1,1,1,-1,-2]"), "must be at least 0", "prompt.3"),
        (CompletionRequest, completion("[[1],[]]"), "must have at least 1", "prompt.1"),
        (CompletionRequest, with_field('"beams":1,"more":2'), "'beams' is not a field", "beams"),
        (CompletionRequest, with_field('"n":1,"n":99'), "must be at most 8", "n"),
        (CompletionRequest, with_field(f'"{"a" * 500}":1'), "a" * 100 + "'", "a" * 100),
        (ChatRequest, chat(f"[{','.join([MESSAGE] * 1001)}]"), "more than 1000 items", "messages"),
        (ChatRequest, chat(parts(*[PART] * 1001)), "more than 1000 items", "messages.0.content"),
        (ChatRequest, with_metadata(numbered('"%d":"a"', 17)), "more than 16 items", "metadata"),
    ],
)  # fmt: skip
def test_the_first_wrong_item_is_named(kind, body, told, field):
    with pytest.raises(InvalidRequest, match=re.escape(told)) as refused:
        read_request(kind, body.encode())
    assert refused.value.field == field


def test_a_body_that_is_no_text_is_refused(server):
    for body in NO_TEXT.values():
        status, content, _ = ask(server.port, "POST", "/v1/completions", body[:60_000])
        assert status == 400 and b"JSON" in content


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(fresh(max_context=64), max_body_bytes=65536) as running:
        yield running


# Long prompts ---------------------------------------------------------------------------------------


class Counting(ToyTokenizer):
    """A tokenizer that remembers how many characters it was given."""

    num_chars = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.num_chars += len(text)
        return [0] * (len(text) // 4)


def counting() -> Counting:
    made = Counting.__new__(Counting)
    made.__dict__.update(toy_tokenizer().__dict__)
    made._ids = made._ids | {"a" * 100: 99}
    return made


def test_of_a_text_that_is_far_too_long_only_a_beginning_is_tokenised():
    """Two mebibytes took a tokenizer three seconds and 300 MB."""
    tokenizer = counting()
    with pytest.raises(PromptTooLong, match="more than 20000 tokens"):
        Measured(tokenizer, 20_000).encode("a" * 1_900_000)
    assert tokenizer.num_chars <= 4 * 20_000 + 6 * (PIECE_CHARS + 4 * CUT_TOKENS)


def test_of_a_text_with_more_characters_than_its_tokens_can_have_nothing_is_tokenised():
    measured = Measured(tokenizer := counting(), 20_000)
    tokenizer.num_chars = 0
    with pytest.raises(PromptTooLong):
        measured.encode("a" * 2_000_101)
    assert tokenizer.num_chars == 0


def test_a_text_that_may_fit_is_tokenised_whole():
    tokenizer = counting()
    for max_tokens in (30_000, None):
        assert len(Measured(tokenizer, max_tokens).encode("a" * 120_000)) == 30_000
    assert tokenizer.num_chars < 3 * 120_000
    # So is one of ordinary length: the models' own limits are exact.
    assert len(Measured(tokenizer, 10).encode("a" * 4000)) == 1000


def test_the_pieces_of_a_text_have_nearly_as_many_tokens_as_the_whole(real_tokenizer):
    """Otherwise a prompt that fits would be refused."""
    samples = (
        "The quick brown fox jumps. ",
        "a",
        " ",
        "\n",
        "12345",
        "word, ",
        "中文",
        "é😀 ",
        "ab" * 50,
    )
    for sample in samples:
        text = (sample * (4 * PIECE_CHARS))[: 4 * PIECE_CHARS + 77]
        whole = len(real_tokenizer.encode(text, add_special_tokens=False))
        pieces = [text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]
        parts = sum(len(real_tokenizer.encode(p, add_special_tokens=False)) for p in pieces)
        assert parts - whole <= CUT_TOKENS * len(pieces)


@pytest.fixture(scope="module")
def real_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    source = Path(__file__).read_text() + "The quick brown fox jumps over the lazy dog. " * 50
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([source, " " * 500, "ab" * 500, "\n" * 100], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


# Time -----------------------------------------------------------------------------------------------


class Slow(ToyTokenizer):
    """A tokenizer that takes its time over a text with an x."""

    seconds = 1.5

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if "x" in text:
            time.sleep(self.seconds)
        return super().encode(text, add_special_tokens=add_special_tokens)


def slow_model() -> ProxyTuned:
    model = fresh()
    made = Slow.__new__(Slow)
    made.__dict__.update(model.tokenizer.__dict__)
    model.formats = tuple(replace(each, tokenizer=made) for each in model.formats)
    return model


def test_a_prompt_that_takes_long_to_render_holds_up_nobody_and_ends_with_its_time():
    """With a limit of eight seconds, all requests waited for one that took twenty, which was answered."""
    answers: list[tuple[httpx.Response, float]] = []

    def ask_slowly(running: Served) -> None:
        started = time.monotonic()
        answer = complete(running, prompt="axb")
        answers.append((answer, time.monotonic() - started))

    with served(slow_model(), request_timeout_s=0.7) as running:
        asking = threading.Thread(target=ask_slowly, args=(running,))
        asking.start()
        time.sleep(0.1)
        for _ in range(5):
            started = time.monotonic()
            assert_it_works(running)
            assert time.monotonic() - started < MAX_WAIT_S
        asking.join()
        (answer, seconds), engine = answers[0], running.service.engine
        assert answer.status_code == 504 and checked_error(answer)["code"] == "timeout"
        assert 0.6 < seconds < 1.2
        assert engine.num_running == engine.num_waiting == 0


def test_the_time_limit_counts_from_arrival_over_rendering_and_waiting():
    with served(slow_model(), request_timeout_s=1.8, max_tokens=100_000) as running:
        started = time.monotonic()
        answer = complete(running, prompt="axb", max_tokens=100_000)
        assert answer.status_code == 504
        assert time.monotonic() - started < 1.8 + 0.6  # not 1.5 for rendering and 1.8 more


def test_slow_prompts_of_one_client_leave_a_desk_to_others_and_their_turn_comes():
    loop_results: list[str] = []

    async def check() -> None:
        import asyncio

        from proxytune.server.rendering import Rendering

        models = [fresh() for _ in range(NUM_DESKS)]
        rendering = Rendering(models)
        gate = threading.Event()

        def wait(name: str) -> Any:
            def work(desk: ProxyTuned) -> None:
                assert desk in models and gate.wait(10)
                loop_results.append(name)

            return work

        greedy = [
            asyncio.create_task(rendering.run("greedy", 10, wait(f"greedy {n}"))) for n in range(6)
        ]
        await asyncio.sleep(0.01)
        assert await asyncio.wait_for(rendering.run("other", 10, lambda desk: "done"), 5) == "done"
        # A caller that gives up while it waits leaves the line; one whose work runs keeps its desk.
        greedy[5].cancel()
        greedy[0].cancel()
        await asyncio.sleep(0.01)
        assert len(rendering._free) == 1 and len(rendering._waiting) == 2
        gate.set()
        await asyncio.gather(*greedy[1:5])
        assert len(rendering._free) == NUM_DESKS and not rendering._taken
        rendering.close()

    import asyncio

    asyncio.run(check())
    assert sorted(loop_results) == [f"greedy {n}" for n in range(5)]


def test_a_caller_that_goes_just_as_a_desk_is_free_does_not_take_the_desk_with_it():
    """The desk was lost, and after four such callers nobody was answered any more."""
    import asyncio

    from proxytune.server.rendering import Rendering

    async def check() -> None:
        rendering = Rendering([fresh()])
        gate = threading.Event()
        first = asyncio.create_task(rendering.run("one", 10, lambda desk: gate.wait(10)))
        second = asyncio.create_task(rendering.run("two", 10, lambda desk: 2))
        third = asyncio.create_task(rendering.run("three", 10, lambda desk: 3))
        await asyncio.sleep(0.01)
        gate.set()
        time.sleep(0.1)  # the first one's end is the loop's next event
        second.cancel()
        assert await asyncio.wait_for(third, 5) == 3
        assert await first and second.cancelled()
        rendering.close()

    asyncio.run(check())


def test_large_bodies_have_half_of_the_desks():
    import asyncio

    from proxytune.server.rendering import LARGE_BYTES, Rendering

    async def check() -> None:
        rendering = Rendering([fresh() for _ in range(NUM_DESKS)])
        gate = threading.Event()
        large = [
            asyncio.create_task(
                rendering.run(f"client {n}", LARGE_BYTES + 1, lambda desk: gate.wait(10))
            )
            for n in range(NUM_DESKS)
        ]
        await asyncio.sleep(0.01)
        assert len(rendering._free) == NUM_DESKS // 2
        assert await asyncio.wait_for(rendering.run("small", 10, lambda desk: 1), 5) == 1
        gate.set()
        assert all(await asyncio.gather(*large))
        rendering.close()

    asyncio.run(check())


def test_a_client_that_goes_while_its_prompt_is_rendered_never_gets_a_place(caplog):
    caplog.set_level(logging.INFO)
    with served(slow_model()) as running:
        submitted = running.service.engine.submit
        tickets: list[Any] = []
        running.service.engine.submit = lambda made: tickets.extend(made) or submitted(made)  # type: ignore
        with running.connect() as connection:
            connection.sendall(post(BODY | {"prompt": "axb"}))
            time.sleep(0.3)
        wait_until(lambda: "POST /v1/completions 499" in caplog.text)
        time.sleep(1.5)
        assert not tickets
        assert_it_works(running)


def test_a_tokenizer_that_cannot_be_copied_renders_one_prompt_at_a_time():
    from proxytune.server.rendering import desk_models

    model = slow_model()
    assert len(desk_models(model, None)) == NUM_DESKS
    for each in model.formats:
        each.tokenizer.lock = threading.Lock()  # type: ignore[attr-defined]
    assert len(desk_models(model, None)) == 1


def test_texts_in_many_threads_get_the_tokens_that_they_get_alone(real_tokenizer):
    """Tokenizers in Rust are shared by all desks."""
    from concurrent.futures import ThreadPoolExecutor

    from proxytune.server.rendering import desk_models

    model = fresh()
    model.formats = tuple(replace(each, tokenizer=real_tokenizer) for each in model.formats)
    desks = desk_models(model, 100_000)
    assert len(desks) == NUM_DESKS
    assert len({id(each.formats[0].tokenizer._tokenizer) for each in desks}) == 1  # type: ignore
    texts = [f"The {n} quick brown foxes " * (n % 50 + 1) for n in range(400)]
    expected = [real_tokenizer.encode(text) for text in texts]

    def encode(n: int) -> Any:
        return desks[n % NUM_DESKS].formats[0].tokenizer.encode(texts[n])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(encode, range(400))) == expected


# Memory and keys ------------------------------------------------------------------------------------


def test_a_client_cannot_hold_the_memory_of_other_clients_bodies():
    whole = InFlight(1000)
    bodies = [whole.open("greedy") for _ in range(10)]
    for body in bodies:
        with pytest.raises(Unavailable, match="too many large requests"):
            while True:
                body.add(b"x")
    assert sum(map(len, bodies)) == whole.num_bytes <= 500
    (other := whole.open("other")).add(b"x" * 150)
    assert len(other) == 150 and whole.num_bytes <= 1000
    for body in [*bodies, other]:
        body.close()
        body.close()
    assert whole.num_bytes == 0 and not whole._held
    whole.open("greedy").add(b"x" * 333)


@pytest.mark.parametrize("num", (1, 3, 10, 100))
def test_any_number_of_growing_bodies_leave_room_for_a_small_one_of_the_same_client(num):
    whole = InFlight(10_000)
    bodies = [whole.open("address") for _ in range(num)]
    is_growing = [True] * num
    while any(is_growing):
        for index, body in enumerate(bodies):
            try:
                body.add(b"x")
            except Unavailable:
                is_growing[index] = False
    assert max(map(len, bodies)) == pytest.approx(10_000 / (2 * num + 1), abs=2)
    whole.open("address").add(b"x" * (10_000 // (2 * num + 1) // 3 - 2))


def held(running: Served) -> InFlight:
    found: InFlight = running.server.config.app.state.in_flight
    return found


def test_bodies_without_an_end_take_bounded_memory_and_stop_no_small_request():
    """A thousand connections could each hold two mebibytes."""
    size = 2**16
    with served(fresh(), max_body_bytes=size, body_timeout_s=2) as running:
        connections = [running.connect() for _ in range(60)]
        for connection in connections:
            connection.sendall(head(length=size) + b" " * (size // 2))
        wait_until(lambda: held(running).num_bytes > 4 * size)
        for connection in connections:
            connection.settimeout(0.5)
            with suppress(OSError):  # it has been refused
                connection.sendall(b" " * (size // 2 - 1))
        for _ in range(5):
            assert held(running).num_bytes <= BODIES_HELD * size
            assert_it_works(running)
        statuses = Counter(as_response(read_all(each)).status_code for each in connections)
        assert statuses[503] > 20 and set(statuses) <= {503, 408}
        wait_until(lambda: held(running).num_bytes == 0)


def test_the_bytes_of_a_body_count_until_it_is_rendered_and_no_longer():
    with served(slow_model(), max_tokens=100_000) as running, running.connect() as connection:
        connection.sendall(post(BODY | {"prompt": "axb", "max_tokens": 100_000}))
        wait_until(lambda: held(running).num_bytes > 50)
        wait_until(lambda: running.service.engine.num_running == 1)
        assert held(running).num_bytes == 0


def test_who_has_no_key_has_no_byte_of_a_body_kept_or_read_as_json(monkeypatch):
    def fail(*_: Any) -> None:
        raise AssertionError("it was kept")

    with served(fresh(), api_keys=KEYS) as running:
        monkeypatch.setattr(InFlight, "open", fail)
        for header in ("Authorization: Bearer wrong", "X: y"):
            with running.connect() as connection:
                connection.sendall(head("/v1/completions", header, length=10**6) + b"[" * 10**5)
                started = time.monotonic()
                answer = as_response(read_all(connection))
                assert answer.status_code == 401 and time.monotonic() - started < 5
            # A client that asks before it sends is answered at once.
            with running.connect() as connection:
                connection.sendall(head("/v1/x", header, "Expect: 100-continue", length=10**6))
                started = time.monotonic()
                assert as_response(read_all(connection)).status_code == 401
                assert time.monotonic() - started < 1


def test_every_route_needs_a_key_but_those_that_are_open():
    app = make_app(fresh(), replace(SETTINGS, api_keys=KEYS))
    paths = {re.sub("{.*}", "toy", route.path) for route in app.routes}  # type: ignore[attr-defined]
    assert paths > OPEN_PATHS and len(paths - OPEN_PATHS) >= 5
    with served(fresh(), api_keys=KEYS) as running:
        for path in (
            *paths,
            "/nowhere",
            "/v1",
            "//v1/models",
            "/v1/models/",
            "/V1/models",
            "/health/",
        ):
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                status = ask(running.port, method, path)[0]
                assert (status != 401) == (path in OPEN_PATHS), (method, path, status)


@pytest.mark.parametrize(
    ("host", "key", "client"),
    [
        ("192.0.2.7", None, "192.0.2.7"),
        ("192.0.2.7", 1, "key 1"),
        ("2001:db8:1:2:3:4:5:6", None, "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", None, "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", None, "::ffff:192.0.2.7"),
        ("", None, ""),
        ("testclient", None, "testclient"),
    ],
)
def test_a_client_is_a_key_or_an_address(host, key, client):
    assert Arrival(0.0, host, key).client == client


# Places ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_users", (False, True))
def test_a_second_clients_small_requests_are_answered_while_a_first_keeps_many_long_ones_open(
    has_users,
):
    """None of twelve was accepted; both come from one address, and no keys are asked for."""
    is_over = threading.Event()
    statuses: Counter[int] = Counter()

    def keep_asking(running: Served, number: int) -> None:
        user = {"user": f"user {number}"} if has_users else {}
        while not is_over.is_set():
            status = complete(running, max_tokens=400, **user).status_code
            statuses[status] += 1
            if status == 429:
                time.sleep(0.05)

    with served(fresh(), max_rows=2, max_waiting=8) as running:
        greedy = [threading.Thread(target=keep_asking, args=(running, n)) for n in range(12)]
        for thread in greedy:
            thread.start()
        wait_until(lambda: statuses[429] > 5)
        answers = [complete(running, prompt="c", user="other") for _ in range(12)]
        is_over.set()
        for thread in greedy:
            thread.join()
    assert [answer.status_code for answer in answers] == [200] * 12
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {text_of("c")}
    assert set(statuses) == {200, 429} and statuses[200] > 0


def test_a_stream_that_loses_its_place_is_told_so():
    with (
        served(fresh(), max_rows=1, max_waiting=1, max_tokens=10_000) as running,
        running.connect() as first,
        running.connect() as second,
    ):
        first.sendall(post(BODY | {"max_tokens": 10_000}))
        wait_until(lambda: running.service.engine.num_running == 1)
        second.sendall(post(BODY | {"max_tokens": 10_000, "stream": True}))
        wait_until(lambda: running.service.engine.num_waiting == 1)
        assert_it_works(running)
        assert b"queue_full" in read_until(second, b"[DONE]")


# What else strangers send ---------------------------------------------------------------------------


def test_head_is_get_without_the_content(server):
    for path in (
        "/",
        "/health",
        "/version",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/v1/proxytune",
    ):
        with httpx.Client(base_url=server.url) as client:
            answer, whole = client.head(path), client.get(path)
            assert answer.status_code == whole.status_code == 200
            assert (
                answer.content == b""
                and answer.headers["content-type"] == whole.headers["content-type"]
            )
            assert (
                abs(int(answer.headers["content-length"]) - len(whole.content)) < 200
            )  # counters count
            assert client.head("/v1/completions").status_code == 405
            assert client.head("/nowhere").status_code == 404


@pytest.mark.parametrize(
    "lines",
    [
        ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
        tuple(f"X-{number}: y" for number in range(4000)),
        ("Cookie: " + "a" * 30_000,),
    ],
)  # fmt: skip
def test_upgrades_and_many_headers_change_nothing(server, lines):
    with server.connect() as connection:
        connection.sendall(head("/health", *lines))
        assert read_answer(connection).status_code == 200
    assert_it_works(server)


def test_a_long_query_is_refused_and_a_shorter_one_changes_nothing(server):
    with server.connect() as connection:
        connection.sendall(head("/health?" + "a=%00&" * 5000))
        assert read_answer(connection).status_code == 200
    with server.connect() as connection:
        connection.sendall(head("/health?" + "a" * 200_000))
        assert as_response(read_all(connection)).status_code == 400


def test_a_chunked_body_without_an_end_is_refused_for_its_size_or_its_time():
    top = head("/v1/completions", "Transfer-Encoding: chunked", "Content-Type: application/json")
    top = top.replace(b"GET", b"POST", 1)
    with served(fresh(), max_body_bytes=2**16, body_timeout_s=0.5) as running:
        for piece, status in ((b"a" * 2**15, 413), (b"a", 408)):
            with running.connect() as connection:
                connection.sendall(top)
                for _ in range(4):
                    connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
                assert as_response(read_all(connection)).status_code == status
        assert held(running).num_bytes == 0
        assert_it_works(running)


def test_a_length_that_is_not_the_bodys_harms_only_its_own_connection():
    with served(fresh(), body_timeout_s=0.5) as running:
        body = json.dumps(BODY).encode()
        for length, status in ((len(body) + 5, 408), (len(body) - 5, 400)):
            with running.connect() as connection:
                connection.sendall(head(length=length) + body)
                assert read_answer(connection).status_code == status
            assert_it_works(running)


def test_errors_repeat_no_more_than_a_page_of_what_was_sent(server, monkeypatch):
    for path in ("/v1/models/" + "a" * 50_000, "/" + "b" * 50_000):
        status, content, _ = ask(server.port, "GET", path)
        assert status == 404 and len(content) < 1000

    def quote(self: Any, wanted: Any, desk: Any) -> None:
        raise InvalidRequest(wanted.prompt)

    monkeypatch.setattr("proxytune.server.service.Service.orders", quote)
    answer = complete(server, prompt="a" * 50_000)
    assert answer.status_code == 400
    assert len(checked_error(answer)["message"]) == MAX_MESSAGE + 1


def test_strangers_can_neither_make_counters_nor_write_lines_of_their_own(server, caplog):
    caplog.set_level(logging.INFO)
    for number in range(20):
        with server.connect() as connection:
            top = f"{'M' * (number + 1) * 50} /p{number} HTTP/1.1\r\nHost: localhost\r\n"
            connection.sendall(f"{top}Connection: close\r\n\r\n".encode())
            read_all(connection)
        ask(server.port, "GET", f"/v1/models/m{number}")
    text = httpx.get(f"{server.url}/metrics").text
    paths = set(re.findall(r'requests_total\{path="([^"]*)"', text))
    assert len(paths) < 20 and not [p for p in paths if re.search(r"/p\d|m\d", p)]
    lines = [r.getMessage() for r in caplog.records if r.name == "proxytune.server"]
    assert len(lines) >= 40 and max(map(len, lines)) < 200


def test_a_logged_prompt_cannot_address_the_terminal(caplog):
    caplog.set_level(logging.INFO)
    prompt = "a\x1b]0;x\x07\x9b31m\u202e\u2028b\x7f"
    with served(fresh(), log_prompts=True) as running:
        complete(running, prompt=prompt)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("request ")]
    assert line.isprintable()
    assert json.loads(line.removeprefix("request "))["prompt"] == prompt


def test_the_number_of_texts_of_a_request_is_bounded(server):
    answer = complete(server, prompt=["a"] * 64, n=8)
    assert answer.status_code == 400 and "512 texts" in checked_error(answer)["message"]
    for changes in ({"n": 9}, {"best_of": 9}, {"prompt": ["a"] * 65}, {"logprobs": 21}):
        assert complete(server, **changes).status_code == 400
