"""A server that means no good: each fault ends as an error of this project, in bounded time and memory."""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import math
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from proxytune.backends.api.answers import (
    UnusableAnswer,
    in_one_line,
    parse_answer,
    read_chat,
    read_completion,
    read_models,
    read_usage,
)
from proxytune.backends.api.client import ANSWER_BYTES, ApiClient, RefusedCall
from proxytune.backends.api.connections import Received
from proxytune.backends.api.positions import position_of
from proxytune.errors import ApiError, BackendError, ProxytuneError, RecipeError, UnsupportedModel
from proxytune.recipe.spec import ApiSettings
from tests.backends.api.test_backend import (
    ALL,
    PROMPTS,
    TRAITS,
    _short_sleep,
    behind,
    greedy,
    in_process,
    local_request,
)
from tests.support.hostile_server import HostileServer, Respond, bomb, json_answer
from tests.support.loopback import QuietHandler

KEY = "sk-very-secret-0123456789"


@contextlib.contextmanager
def facing(respond: Respond, **arguments: Any) -> Iterator[tuple[ApiClient, HostileServer]]:
    """Yield a client of a hostile server; it does not wait between tries."""
    settings = {"timeout_s": 5.0, "max_retries": 2, "total_timeout_s": 10.0}
    key_env = arguments.pop("key_env", None)
    with HostileServer(respond) as server:
        client = ApiClient(
            server.url,
            ApiSettings(**{**settings, **arguments}),
            key_env=key_env,
            sleep=_short_sleep,
        )
        with contextlib.closing(client):
            yield client, server


def ask(client: ApiClient, **arguments: Any) -> None:
    client.post("/completions", {}, lambda answer: read_completion(answer, None), **arguments)


# Time --------------------------------------------------------------------------------------------------


def drip(data: bytes, pause_s: float) -> Respond:
    def respond(handler: QuietHandler) -> None:
        for byte in data:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(pause_s)

    return respond


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"X-Padding: " + b"x" * 10_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
    ],
    ids=["header", "informational"],
)
def test_a_server_that_drips_its_headers_is_left_when_the_time_is_up(data):
    """Each byte used to begin the waiting anew."""
    with facing(drip(data, 0.02), timeout_s=0.5, max_retries=1) as (client, server):
        started = time.monotonic()
        with pytest.raises(ApiError, match=r"2 tries.*not whole after"):
            ask(client)
        assert 0.9 < time.monotonic() - started < 3
        assert len(server.requests) == 2


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_server_that_drips_its_body_is_left_when_the_time_is_up(is_chunked):
    length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: 10000"
    body = b"1\r\nx\r\n" * 5000 if is_chunked else b"x" * 10_000

    def respond(handler: QuietHandler) -> None:
        handler.wfile.write(HEAD + length + b"\r\n\r\n")
        drip(body, 0.02)(handler)

    with facing(respond, timeout_s=0.5, max_retries=1) as (client, _):
        started = time.monotonic()
        with pytest.raises(ApiError, match=r"2 tries.*not whole after"):
            ask(client)
        assert 0.9 < time.monotonic() - started < 3


def test_all_tries_of_a_call_have_one_time_limit():
    """Each of 101 tries would take half a second."""
    limits = {"timeout_s": 0.5, "total_timeout_s": 1.2, "max_retries": 100}
    with facing(lambda handler: time.sleep(2), **limits) as (client, server):
        client._sleep = None  # as outside of tests
        started = time.monotonic()
        with pytest.raises(ApiError, match=r"would pass the limit of 1\.2 s"):
            ask(client)
        assert time.monotonic() - started < 2.5
        assert len(server.requests) <= 3


@pytest.mark.parametrize(
    "pause",
    ["300", "9" * 400, "86400.5", "Fri, 31 Dec 9999 23:59:59 GMT"],
    ids=["300", "huge", "fraction", "date"],
)
def test_a_pause_beyond_the_time_limit_is_not_waited_for(pause):
    """`Retry-After: 300` used to be waited for eight times."""
    respond = json_answer({"error": {"message": "busy"}}, 503, Retry_After=pause)
    with facing(respond, max_retries=8) as (client, server):
        started = time.monotonic()
        with pytest.raises(ApiError, match=r"in 1 tries, and another one in .* the limit of 10 s"):
            ask(client)
        assert time.monotonic() - started < 2
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "pause", ["", "soon", "-5", "1e9", "inf", "nan", "Mon, 99 Foo", "x" * 9999]
)
def test_a_pause_that_cannot_be_read_is_none(pause):
    respond = json_answer({"error": {"message": "busy"}}, 503, Retry_After=pause)
    with facing(respond) as (client, server):
        with pytest.raises(ApiError, match="3 tries"):
            ask(client)
        assert len(server.requests) == 3


def test_the_time_limit_follows_the_settings_and_is_a_few_minutes_by_default():
    assert ApiSettings().longest_call_s == 180
    assert ApiSettings(timeout_s=600).longest_call_s == 1800
    assert ApiSettings(timeout_s=1, total_timeout_s=7).longest_call_s == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout_s", 601),
        ("total_timeout_s", 1801),
        ("max_retries", 101),
        ("max_concurrency", 65),
        ("top_logprobs", 2**20 + 1),
        ("lookahead", 1025),
        ("prompt_price", 1e300),
        ("completion_price", 1e300),
    ],
)
def test_a_recipe_cannot_ask_for_more_than_is_sane(name, value):
    with pytest.raises(RecipeError, match=name):
        ApiSettings(**{name: value})


# Size --------------------------------------------------------------------------------------------------


def test_a_compressed_answer_never_unfolds_beyond_its_limit():
    """600 MB used to be unpacked, and then parsed."""
    body = bomb(200 * 2**20)
    with facing(json_answer(body, Content_Encoding="gzip")) as (client, server):
        tracemalloc.start()
        try:
            with pytest.raises(ApiError, match=f"more than {ANSWER_BYTES:,} bytes"):
                ask(client)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4 * ANSWER_BYTES
        assert len(server.requests) == 1  # asking again would mend nothing


def endless(handler: QuietHandler) -> None:
    handler.wfile.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        handler.send_chunk(b" " * 65536)


def test_an_endless_answer_is_left_at_its_limit():
    with facing(endless) as (client, server):
        with pytest.raises(ApiError, match="more than 100,000 bytes"):
            ask(client, max_bytes=100_000)
        assert len(server.requests) == 1


def test_data_after_the_end_of_a_compressed_answer_counts_too():
    body = gzip.compress(b"{}") + b"x" * 200_000
    with (
        facing(json_answer(body, Content_Encoding="gzip")) as (client, _),
        pytest.raises(ApiError, match="more than 100,000 bytes"),
    ):
        ask(client, max_bytes=100_000)


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip", "x" * 5000])
def test_an_encoding_that_was_not_asked_for_is_refused(encoding):
    respond = json_answer(b"x", Content_Encoding=encoding)
    with (
        facing(respond) as (client, _),
        pytest.raises(ApiError, match="was not asked for") as failure,
    ):
        ask(client)
    assert len(str(failure.value)) < 1000


@pytest.mark.parametrize("cut", [0.5, 0.99])
def test_a_compressed_answer_that_ends_early_is_asked_for_again(cut):
    whole = gzip.compress(json.dumps(completion()).encode())
    respond = json_answer(whole[: int(cut * len(whole))], Content_Encoding="gzip")
    with facing(respond) as (client, server):
        with pytest.raises(ApiError, match="3 tries"):
            ask(client)
        server.respond = json_answer(whole, Content_Encoding="gzip")
        ask(client)


def test_headers_have_a_limit():
    respond = drip_free(HEAD + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 100) for n in range(20_000)))
    with facing(respond) as (client, _), pytest.raises(ApiError, match="3 tries"):
        ask(client)


def drip_free(data: bytes) -> Respond:
    return lambda handler: handler.wfile.write(data) and None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    "content",
    [
        b'{"data":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"data":' + b"[" * 9_000 + b"]" * 9_000 + b"}",
        b'{"a":' * 9_000 + b"1" + b"}" * 9_000,
        b'{"data":[' + b"[]," * 1_000_000 + b"[]]}",
        b'{"data":[' + b"{}," * 1_000_000 + b"{}]}",
    ],
    ids=["200,000 deep", "9,000 deep", "objects", "many lists", "many objects"],
)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_nested_answers_end_in_an_error(content, status):
    with facing(json_answer(content, status), max_retries=0) as (client, _):
        tracemalloc.start()
        try:
            with pytest.raises((ApiError, UnsupportedModel)):
                ask(client)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 40 * 2**20


def test_a_long_error_page_is_read_in_linear_time():
    """Looking for tags in a page of `<` took the square of its length."""
    started = time.monotonic()
    with facing(json_answer(b"<" * 3_000_000, 400)) as (client, _), pytest.raises(RefusedCall):
        ask(client)
    assert time.monotonic() - started < 2


# Redirects, cookies, passwords ------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_no_redirect_is_followed(monkeypatch, status, is_elsewhere):
    monkeypatch.setenv("A_KEY", KEY)
    with HostileServer(json_answer({"data": []})) as other:
        place = other.url if is_elsewhere else "/v1/other"
        with facing(json_answer({}, status, Location=place), key_env="A_KEY") as (client, server):
            for call in (ask, lambda client: client.get("/models", read_models)):
                with pytest.raises(RefusedCall, match=f"refuses \\({status}\\)") as refusal:
                    call(client)
                assert place in str(refusal.value)
        assert not other.requests
        assert [path for path, _ in server.requests] == ["/v1/completions", "/v1/models"]


def test_no_cookie_is_kept():
    respond = json_answer({"data": []}, Set_Cookie="session=1; Path=/")
    with facing(respond) as (client, server):
        for _ in range(2):
            client.get("/models", read_models)
    assert all("cookie" not in {name.lower() for name in head} for _, head in server.requests)


def test_no_password_is_taken_from_netrc(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text(
        "default login a password b\nmachine 127.0.0.1 login a password b"
    )
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with facing(json_answer({"data": []})) as (client, server):
        client.get("/models", read_models)
    assert "Authorization" not in server.requests[0][1]


def test_plain_http_to_this_machine_uses_no_proxy(monkeypatch):
    """A proxy's localhost is another machine, and the key would go there in the clear."""
    monkeypatch.setenv("A_KEY", KEY)
    with HostileServer(json_answer({"data": []})) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with facing(json_answer({"data": []}), key_env="A_KEY") as (client, server):
            client.get("/models", read_models)
        assert not proxy.requests
        assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
        # Another machine is reached through it, without a key.
        client = ApiClient("http://api.invalid/v1", ApiSettings(max_retries=0))
        client.get("/models", read_models)
        client.close()
        ((path, head),) = proxy.requests
        assert path == "http://api.invalid/v1/models" and "Authorization" not in head


# What messages show -----------------------------------------------------------------------------------


ESCAPES = "\x1b]0;a title\x07\x1b[2J\x1b[1;31mYour session has ended\x1b[0m\x9b\u202e\r\x00"


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
def test_control_characters_in_a_servers_words_are_written_out(status, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    text = ESCAPES + f" your key is {KEY} " + "x" * 100_000
    answers = [
        {"error": {"message": text}},
        {"error": text},
        {"detail": [{"loc": ["a"], "msg": text}]},
        {"message": {"text": text}},
        {"usage": {"prompt_tokens": text}},
        text,
        (" " * 1980 + f"{KEY} {ESCAPES}").encode(),  # cut in its middle
    ]
    for answer in answers:
        with (
            facing(json_answer(answer, status), max_retries=0, key_env="A_KEY") as (client, _),
            pytest.raises((ApiError, UnsupportedModel)) as failure,
        ):
            ask(client)
        said = str(failure.value)
        assert all(character.isprintable() or character == "\n" for character in said)
        assert KEY[:12] not in said and len(said) < 1500


def test_a_reason_and_a_location_are_a_servers_words_too():
    for head in (
        b"HTTP/1.1 400 \xff\xfe\x80\r\n",
        b"HTTP/1.1 302 No\r\nLocation: /\xff" + b"x" * 9999 + b"\r\n",
    ):
        respond = drip_free(head + b"Content-Length: 0\r\n\r\n")
        with facing(respond) as (client, _), pytest.raises(UnsupportedModel) as refusal:
            ask(client)
        said = str(refusal.value)
        assert all(character.isprintable() or character == "\n" for character in said)
        assert len(said) < 1000


def test_a_line_stays_readable():
    assert in_one_line("a\n b\tc") == "a b c"
    assert in_one_line("\x1b[31m\x7f\ud800é") == r"\x1b[31m\x7f\ud800é"
    assert in_one_line("a" * 500) == "a" * 300


def test_the_name_of_a_model_is_text(monkeypatch):
    for name in ("m\x1b[2J", "m\n", "\ud800", "", "m" * 501):
        with pytest.raises(UnusableAnswer, match="under the name"):
            read_models({"data": [{"id": name}]})
    assert read_models({"data": [{"id": "Qwen/Qwen2.5-7B (é)"}]}) == ["Qwen/Qwen2.5-7B (é)"]


# Types and numbers -------------------------------------------------------------------------------------


def completion() -> dict[str, Any]:
    logprobs = {
        "tokens": ["a", "token_id:3"],
        "token_logprobs": [-1.0, -0.5],
        "top_logprobs": [{"a": -1.0, "b": -2.0}, {"token_id:3": -0.5, "bytes:\\xff": -3}],
        "text_offset": [0, 1],
    }
    prompt = [None, {"5": {"logprob": -0.5, "rank": 1}, "7": {"logprob": -1.5, "rank": 2}}]
    choice = {
        "text": "ab", "finish_reason": "length", "logprobs": logprobs, "prompt_logprobs": prompt
    }  # fmt: skip
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return {"id": "x", "usage": usage, "choices": [choice]}


def chat() -> dict[str, Any]:
    top = [
        {"token": "a", "bytes": [97], "logprob": -0.5},
        {"token": "b", "bytes": None, "logprob": -1.5},
    ]
    content = [{"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": top}]
    choice = {
        "message": {"content": "a"}, "finish_reason": "stop", "logprobs": {"content": content}
    }  # fmt: skip
    return {"id": "y", "usage": {"prompt_tokens": 3, "completion_tokens": 1}, "choices": [choice]}


def test_offsets_that_a_server_does_not_know_are_none():
    answer = completion()
    answer["choices"][0]["logprobs"]["text_offset"] = [-1, None]
    assert len(read_completion(answer, None).tokens) == 2
    answer["choices"][0]["logprobs"]["text_offset"] = None
    assert read_completion(answer, None).offsets is None


HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 5.0, 0.5, 2**31 + 1, 10**300, -(10**300), 10**400, 1e308, -1e308,
    math.nan, math.inf, -math.inf, "", "lots", "5", "token_id:" + "9" * 5000, "bytes:\\x",
    "bytes:\\N{DIGIT", ESCAPES, "\ud800", [], [None], [[]], [300, -1], ["a"], [1e9], {}, {"a": None},
    {"": math.nan}, {"a": "b"}, {"-1": {"logprob": 5}}, {"logprob": "x"},
]  # fmt: skip


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every part of a JSON value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(part, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], part: Any) -> Any:
    """Return a copy of a JSON value with another part."""
    whole = copy.deepcopy(value)
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = part
    return whole


def renamed(value: Any, path: tuple[Any, ...], name: str) -> Any:
    """Return a copy of a JSON value in which a part has another key."""
    whole = copy.deepcopy(value)
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    if isinstance(holder, dict):
        holder[name] = holder.pop(path[-1])
    return whole


def mutations(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in paths(answer):
        for part in HOSTILE:
            yield replaced(answer, path, part)
        for name in ("", "token_id:99999999999", "bytes:\\xzz", "lots", "\ud800"):
            yield renamed(answer, path, name)


def test_whatever_an_answer_holds_is_read_or_refused():
    """Every part of an answer in turn is missing, of another type, or no number that can be."""
    with behind(in_process()) as (_, _, backend):
        tokens = backend.server.tokens
        readers = [
            (completion(), lambda answer: read_completion(answer, None)),
            (completion(), lambda answer: read_completion(answer, "prompt_logprobs")),
            (chat(), read_chat),
        ]
        num_read = num_refused = 0
        for whole, read in readers:
            assert read(whole).tokens
            for answer in mutations(whole):
                try:
                    answer = parse_answer(json.dumps(answer).encode())
                    found = read(answer)
                    usage = read_usage(answer)
                except (ValueError, LookupError, UnusableAnswer):
                    num_refused += 1
                    continue
                num_read += 1
                assert all(isinstance(n, int) and 0 <= n <= 2**31 for n in usage)
                for shown in filter(None, found.tokens):
                    position = position_of(shown, tokens, top_logprobs=5)
                    bounds = position.bounds.ceiling, position.bounds.rest
                    numbers = (*position.logprobs, *bounds, position.unmatched)
                    assert not any(math.isnan(number) for number in numbers)
                    assert position.dense(tokens.width).isnan().sum() == 0
        assert num_read > 300 and num_refused > 1000


@pytest.mark.parametrize("count", ["lots", "5", -1, 1.5, 10**400, math.nan, math.inf, True, [], {}])
def test_a_usage_that_cannot_be_is_an_error_and_not_a_traceback(count):
    for name in ("prompt_tokens", "completion_tokens"):
        answer = replaced(completion(), ("usage", name), count)
        with facing(json_answer(answer)) as (client, server):
            with pytest.raises(ApiError, match=name):
                ask(client)
            assert client.usage.num_calls == 0
            assert len(server.requests) == 1


def test_bytes_of_a_token_are_never_taken_for_a_length():
    """`bytes(10**12)` would allocate a terabyte."""
    for content in (10**12, [10**12], "abc", {"length": 5}):
        path = ("choices", 0, "logprobs", "content", 0, "bytes")
        with pytest.raises(UnusableAnswer):
            read_chat(replaced(chat(), path, content))


@pytest.mark.parametrize("name", [None, [], {}, 5, "y", math.nan])
def test_an_id_may_be_anything(name):
    """The first two answers have the same id; the third is asked for because the second looks late."""
    names = iter(["x", "x", name, name, name])

    def respond(handler: QuietHandler) -> None:
        json_answer({**completion(), "id": next(names)})(handler)

    with facing(respond) as (client, server):
        ask(client)
        ask(client)
    assert len(server.requests) == 3


def test_long_ids_of_answers_are_not_kept():
    numbers = iter(range(1000))

    def respond(handler: QuietHandler) -> None:
        answer = {**completion(), "id": f"{next(numbers)}" + "x" * 100_000}
        json_answer(answer)(handler)

    with facing(respond) as (client, _):
        ask(client)
        tracemalloc.start()
        try:
            for _ in range(30):
                ask(client)
            kept = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    assert kept < 1_000_000


def spoiled(backend: Any, spoil: Callable[[bytes], bytes]) -> None:
    """Let every answer to a backend pass through `spoil`."""
    connections = backend.client._connections
    real = connections.request

    def request(*arguments: Any, **options: Any) -> Received:
        response = real(*arguments, **options)
        return response._replace(content=spoil(response.content))

    connections.request = request


@pytest.mark.parametrize(
    "content",
    [
        b'{"usage":{"prompt_tokens":"lots"},"choices":[]}',
        b'{"choices":' + b"[" * 50_000,
        b'{"choices":[{"finish_reason":"length","logprobs":{"tokens":5}}]}',
    ],
    ids=["usage", "deep", "types"],
)
def test_the_text_so_far_is_kept_when_a_server_turns_hostile(content):
    local = in_process()
    wanted = local.generate("the cat", greedy(40)).token_ids
    with behind(local, ALL, ApiSettings(lookahead=4)) as (remote, _, backend):

        def turn_hostile(_: int, event: Any) -> None:
            if event.step is not None and event.step.index == 7:
                spoiled(backend, lambda _: content)

        with pytest.raises(ApiError, match="cannot be used") as failure:
            remote.generate_batch([local_request("the cat", greedy(40))], on_event=turn_hostile)
    (trace,) = failure.value.traces
    assert trace.finish_reason == "failed"
    assert 8 <= trace.num_new_tokens < 40
    assert trace.token_ids == wanted[: trace.num_new_tokens]


@pytest.mark.parametrize("name", TRAITS)
def test_answers_that_are_spoiled_at_random_end_in_a_text_or_an_error(name):
    """One part of one answer in five is replaced, in all that a generation asks for."""
    rng = random.Random(5)
    local = in_process()

    def spoil(content: bytes) -> bytes:
        answer = json.loads(content)
        if rng.random() < 0.8 or "choices" not in answer:
            return content
        part = rng.choice(HOSTILE)
        return json.dumps(replaced(answer, rng.choice(list(paths(answer))), part)).encode()

    num_failed = 0
    settings = ApiSettings(max_retries=1, lookahead=2)
    with behind(local, TRAITS[name], settings) as (remote, _, backend):
        _ = backend.traits
        spoiled(backend, spoil)
        for prompt in PROMPTS * 4:
            try:
                trace = remote.generate(prompt, greedy(8, temperature=0.5, seed=1), alpha=0.7)
                assert trace.num_new_tokens
            except ProxytuneError as error:
                num_failed += 1
                assert isinstance(error, BackendError | UnsupportedModel)
    assert num_failed
