"""An OpenAI-compatible completion server over any backend, for tests that must know the logits behind it.

Plain standard library, one thread a connection, HTTP/1.1 with keep-alive. What it shows and what it refuses
is said by `ServerTraits`, so that one test can meet it as vLLM, as llama.cpp or as OpenAI; `VLLM`,
`VLLM_CHAT`, `LLAMA_CPP`, `OPENAI` and `OPENAI_CHAT` are such servers. What it cannot do (top-p, penalties,
several choices) it refuses.

    with CompletionServer(ToyBackend(table), toy_tokenizer(), traits=VLLM) as server:
        client = Client(server.url)
    assert server.bodies[0]["logprobs"] == 5

Logprobs are float32 `log_softmax` of the backend's logits, whatever the temperature.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from proxytune.backends.base import Backend
from tests.support.loopback import LoopbackServer, QuietHandler

Json = dict[str, Any]

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""

DEFAULT_MAX_TOKENS = 16
"""As in the OpenAI API; a chat may go on to the end of the context, where there is one."""


@dataclass(frozen=True, slots=True)
class ServerTraits:
    """What a server shows, accepts and refuses. The defaults hide nothing and refuse little.

    Args:
        endpoint: Which of `/v1/completions` and `/v1/chat/completions` are there.
        dialect: Whose error messages, and which of their shapes: `{"error": {"message": ...}}`, or vLLM's
            older `{"object": "error", "message": ...}` ("flat").
        max_top_logprobs: Most top logprobs a request may ask for; None for the whole vocabulary, which -1
            asks for.
        completions_logprobs: The shape of logprobs at `/v1/completions`: lists, as in the OpenAI API, or the
            `content` of a chat, as llama.cpp has it.
        sampled_in_top: Where the sampled token is if it is not among the top ones: added to them (vLLM's and
            OpenAI's completions), in the place of the last of them (vLLM's chat), or only as the entry's own
            token.
        token_format: How tokens are written: as text, or, if a request says `return_tokens_as_token_ids`, as
            "token_id:123".
        half_characters: A token that is not whole characters: "replaced" by U+FFFD, or "cut" from the text.
        has_bytes: Whether entries in chat style have `bytes`; they are null otherwise.
        exact_bytes: Whether those are the token's own bytes, or only those of its shown text.
        shows_ids: Whether entries in chat style have the token's `id`, as llama.cpp's do.
        accepts_token_ids: Whether a prompt may be a list of token ids.
        accepts_batches: Whether a request may hold several prompts; each has its own choice.
        returns_token_ids: Whether `return_token_ids` is honoured: `token_ids` and `prompt_token_ids`.
        has_echo: Whether `echo` is honoured: the prompt is in the text and scored in the logprobs.
        has_prompt_logprobs: Whether `prompt_logprobs` is honoured.
        has_ignore_eos: Whether `ignore_eos` is honoured.
        refuses_unknown: Whether a field that is unknown or not honoured is answered 400 or silently ignored.
        logit_bias: "none" answers 400, "ignored" drops it, "shown" has it in the reported logprobs, "hidden"
            applies it to what is sampled and reports the logprobs of the model without it.
        max_logit_bias: Most tokens in `logit_bias`.
        shows_eos: Whether the end-of-sequence token has entries in the logprobs and in `token_ids`, as in
            vLLM. The text never has it, the usage always counts it.
        max_context: Most tokens, prompt and new ones together; the backend's own limit holds as well.
    """

    endpoint: Literal["completions", "chat", "both"] = "both"
    dialect: Literal["openai", "vllm", "flat"] = "vllm"
    max_top_logprobs: int | None = None
    completions_logprobs: Literal["lists", "content"] = "lists"
    sampled_in_top: Literal["added", "displaces", "apart"] = "added"
    token_format: Literal["text", "token_id"] = "text"
    half_characters: Literal["replaced", "cut"] = "replaced"
    has_bytes: bool = True
    exact_bytes: bool = True
    shows_ids: bool = False
    accepts_token_ids: bool = True
    accepts_batches: bool = True
    returns_token_ids: bool = False
    has_echo: bool = False
    has_prompt_logprobs: bool = False
    has_ignore_eos: bool = False
    refuses_unknown: bool = True
    logit_bias: Literal["none", "ignored", "shown", "hidden"] = "hidden"
    max_logit_bias: int | None = None
    shows_eos: bool = True
    max_context: int | None = None

    def __post_init__(self) -> None:
        if self.has_echo and self.completions_logprobs == "content":
            raise ValueError("echo has no logprob for the first token, which `content` cannot say")


VLLM = ServerTraits(
    endpoint="completions",
    max_top_logprobs=20,
    token_format="token_id",
    returns_token_ids=True,
    has_echo=True,
    has_prompt_logprobs=True,
    has_ignore_eos=True,
    refuses_unknown=False,
)
"""vLLM as it starts by default, `/v1/completions`."""

VLLM_CHAT = replace(VLLM, endpoint="chat", sampled_in_top="displaces", exact_bytes=False)
"""The same server's `/v1/chat/completions`."""

LLAMA_CPP = ServerTraits(
    dialect="openai",
    completions_logprobs="content",
    sampled_in_top="apart",
    half_characters="cut",
    shows_ids=True,
    accepts_batches=False,
    has_ignore_eos=True,
    refuses_unknown=False,
)
"""llama.cpp's server."""

OPENAI = ServerTraits(
    endpoint="completions",
    dialect="openai",
    max_top_logprobs=5,
    logit_bias="shown",
    max_logit_bias=300,
    shows_eos=False,
)
"""OpenAI's legacy `/v1/completions`."""

OPENAI_CHAT = replace(OPENAI, endpoint="chat", max_top_logprobs=20, sampled_in_top="apart")
"""OpenAI's `/v1/chat/completions`."""


class Received(NamedTuple):
    """One request as it arrived."""

    path: str
    headers: dict[str, str]  # names in lower case
    body: Json


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Return "User: ...", "Assistant: ..." lines; a last message of the assistant is left to be continued."""
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    if messages[-1]["role"] != "assistant":
        lines.append("Assistant:")
    return "\n".join(lines)


class CompletionServer:
    """A completion server on a free port of 127.0.0.1, from `__enter__` to `__exit__`.

    Args:
        backend: The model; one request at a time runs in it.
        tokenizer: Of the model: `encode`, `decode`, `convert_ids_to_tokens`, `eos_token_id`.
        traits: What the server shows.
        model: The name it goes by; a request for another one is answered 404.
        api_key: Ask for this bearer token; others are answered 401.
        chat_template: Turns messages into the prompt's text.
        eos_token_ids: What ends a text; None for the tokenizer's one.
        token_bytes: The bytes of a token id; None reads them from the tokenizer.
        port: 0 for a free one.
    """

    def __init__(
        self,
        backend: Backend[Any],
        tokenizer: Any,
        *,
        traits: ServerTraits | None = None,
        model: str = "base",
        api_key: str | None = None,
        chat_template: Callable[[Sequence[Mapping[str, str]]], str] = plain_chat,
        eos_token_ids: Sequence[int] | None = None,
        token_bytes: Callable[[int], bytes] | None = None,
        port: int = 0,
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.traits = traits or ServerTraits()
        self.model = model
        self.api_key = api_key
        self.chat_template = chat_template
        if eos_token_ids is None:
            eos = tokenizer.eos_token_id
            eos_token_ids = () if eos is None else (eos,)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.token_bytes = token_bytes or _bytes_of(tokenizer)
        limits = (self.traits.max_context, backend.capabilities.max_context)
        self.max_context = min((limit for limit in limits if limit is not None), default=None)
        self.lock = threading.Lock()
        """Held while the backend runs and while counts change."""
        self.received: list[Received] = []
        """Every POST of a JSON object to an endpoint that is there, refused ones included."""
        self.statuses: list[int] = []
        """The status of every answer, GET included, in the order in which they were decided."""
        self.num_prompt_tokens = 0
        """Of requests that were served."""
        self.num_completion_tokens = 0
        """All that were generated, also for clients that went away."""
        self.failures: list[str] = []
        """Tracebacks of what went wrong in the server itself; a test may want this empty."""
        self._port = port
        self._http: LoopbackServer | None = None

    @property
    def bodies(self) -> list[Json]:
        """The bodies of the received requests."""
        return [request.body for request in self.received]

    @property
    def num_requests(self) -> int:
        """How many POSTs arrived."""
        return len(self.received)

    @property
    def num_connections(self) -> int:
        """How many connections clients opened."""
        assert self._http is not None, "the server was never started"
        return self._http.num_connections

    @property
    def port(self) -> int:
        """Where it listens, or did."""
        assert self._http is not None, "the server was never started"
        return self._http.port

    @property
    def url(self) -> str:
        """What clients call the base URL: "http://127.0.0.1:<port>/v1"."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._http = LoopbackServer(_Handler, self, port=self._port)
        self._http.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._http is not None
        self._http.stop()


@dataclass(eq=False)
class _Refusal(Exception):
    """An answer that is an error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    kind: str = "invalid_request_error"

    def body(self, dialect: str) -> Json:
        if dialect == "openai":
            names = {"type": self.kind, "param": self.param, "code": self.code}
            return {"error": {"message": self.message, **names}}
        kinds = {400: "BadRequestError", 401: "Unauthorized", 404: "NotFoundError"}
        kind = kinds.get(self.status, "InternalServerError")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        return {"object": "error", **error} if dialect == "flat" else {"error": error}


@dataclass(frozen=True, slots=True)
class _Request:
    """A request that can be served."""

    is_chat: bool
    prompts: list[list[int]]
    max_tokens: int | None  # None: to the end of the context
    temperature: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    num_top: int | None = None  # None: no logprobs
    echo: bool = False
    num_prompt_top: int | None = None
    as_token_ids: bool = False
    return_token_ids: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    ignore_eos: bool = False


class _Entry(NamedTuple):
    """One token of the logprobs."""

    token_id: int
    logprobs: Tensor | None  # [vocab], None at the first token of a prompt


class _Delta(NamedTuple):
    """What one step adds to a choice."""

    text: str
    entries: list[_Entry]
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | None = None


class _Parser:
    """Turns a body into a `_Request`, or refuses it.

    Fields are taken one by one; what is left at the end is unknown.
    """

    def __init__(self, server: CompletionServer, body: Json, *, is_chat: bool) -> None:
        self.server = server
        self.traits = server.traits
        self.is_chat = is_chat
        self.left = dict(body)

    def take(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.left.pop(name, None)
        if value is None:
            return default
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise _Refusal(400, f"Invalid type for '{name}': {value!r}", name, "invalid_type")
        return value

    def option(self, name: str, kinds: type | tuple[type, ...], *, honoured: bool) -> Any:
        """Take a field that not every server honours."""
        if honoured:
            return self.take(name, kinds)
        if not self.left.get(name):
            self.left.pop(name, None)  # asks for nothing
        return None

    def parse(self) -> _Request:
        model = self.take("model", str)
        if model is not None and model != self.server.model:
            message = f"The model `{model}` does not exist."
            raise _Refusal(404, message, "model", "model_not_found")
        prompts = [self.chat()] if self.is_chat else self.prompts()
        num_top = self.chat_logprobs() if self.is_chat else self.take("logprobs", int)
        self.check_top(num_top, "top_logprobs" if self.is_chat else "logprobs", "sample")
        traits = self.traits
        echo = self.option("echo", bool, honoured=traits.has_echo and not self.is_chat)
        num_prompt_top = self.option("prompt_logprobs", int, honoured=traits.has_prompt_logprobs)
        self.check_top(num_prompt_top, "prompt_logprobs", "prompt")
        can_name_ids = traits.token_format == "token_id"
        stream_options = self.take("stream_options", dict, {})
        request = _Request(
            is_chat=self.is_chat,
            prompts=prompts,
            max_tokens=self.max_tokens(prompts, may_be_zero=bool(echo)),
            temperature=float(self.take("temperature", (int, float), 1.0)),
            seed=self.take("seed", int),
            stop=self.stop(),
            stream=self.take("stream", bool, False),
            include_usage=bool(stream_options.get("include_usage")),
            num_top=num_top,
            echo=bool(echo),
            num_prompt_top=num_prompt_top,
            as_token_ids=bool(
                self.option("return_tokens_as_token_ids", bool, honoured=can_name_ids)
            ),
            return_token_ids=bool(
                self.option("return_token_ids", bool, honoured=traits.returns_token_ids)
            ),
            logit_bias=self.logit_bias(),
            ignore_eos=bool(self.option("ignore_eos", bool, honoured=traits.has_ignore_eos)),
        )
        if not 0 <= request.temperature < float("inf"):
            raise _Refusal(400, "temperature must be non-negative", "temperature")
        if stream_options and not request.stream:
            message = "Stream options can only be defined when `stream=True`."
            raise _Refusal(400, message, "stream_options")
        if num_prompt_top is not None and request.stream:
            message = "`prompt_logprobs` are not available when `stream=True`."
            raise _Refusal(400, message, "prompt_logprobs")
        self.refuse_rest()
        return request

    def refuse_rest(self) -> None:
        neutral = {"n": 1, "best_of": 1, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
        neutral |= {"frequency_penalty": 0, "presence_penalty": 0}
        for name, value in neutral.items():
            if self.take(name, (int, float), value) != value:
                raise _Refusal(400, f"This server serves '{name}' only at {value}.", name)
        if self.take("top_k", int, 0) not in (0, -1):
            raise _Refusal(400, "This server serves no 'top_k'.", "top_k")
        self.take("user", str)
        if self.left and self.traits.refuses_unknown:
            names = ", ".join(sorted(self.left))
            message = f"Unrecognized request argument supplied: {names}"
            raise _Refusal(400, message, sorted(self.left)[0], "unknown_parameter")

    def chat(self) -> list[int]:
        messages = self.take("messages", list)
        if not messages:
            raise _Refusal(400, "Missing required parameter: 'messages'.", "messages")
        try:
            text = self.server.chat_template(messages)
        except (KeyError, TypeError, AttributeError) as error:
            message = f"Invalid value for 'messages': {error!r}"
            raise _Refusal(400, message, "messages") from error
        return self.encode(text, "messages", add_special_tokens=False)

    def prompts(self) -> list[list[int]]:
        prompt = self.take("prompt", (str, list))
        add_special_tokens = self.take("add_special_tokens", bool, True)
        if not prompt:
            raise _Refusal(400, "The prompt cannot be empty.", "prompt")
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        if not (is_one or self.traits.accepts_batches):
            raise _Refusal(400, "Only one prompt a request is served.", "prompt")
        return [
            self.encode(each, "prompt", add_special_tokens=add_special_tokens)
            for each in ([prompt] if is_one else prompt)
        ]

    def encode(self, prompt: Any, param: str, *, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            try:
                prompt = list(
                    self.server.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
                )
            except Exception as error:
                raise _Refusal(400, f"Invalid value for '{param}': {error}", param) from error
        elif not self.traits.accepts_token_ids:
            raise _Refusal(400, f"Invalid type for '{param}': expected a string.", param)
        if not prompt:
            raise _Refusal(400, "The prompt cannot be empty.", param)
        size = self.server.backend.vocab_size
        for token_id in prompt if isinstance(prompt, list) else [None]:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise _Refusal(400, f"Invalid type for '{param}': expected token ids.", param)
            if not 0 <= token_id < size:
                raise _Refusal(400, f"Token id {token_id} is out of vocabulary", param)
        return list(prompt)

    def max_tokens(self, prompts: list[list[int]], *, may_be_zero: bool) -> int | None:
        limit = self.server.max_context
        max_tokens: int | None = self.take("max_tokens", int)
        if self.is_chat:
            max_tokens = self.take("max_completion_tokens", int, max_tokens)
        if max_tokens is None and (not self.is_chat or limit is None):
            max_tokens = DEFAULT_MAX_TOKENS
        if max_tokens is not None and max_tokens < (0 if may_be_zero else 1):
            raise _Refusal(400, f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens")
        new = 1 if max_tokens is None else max_tokens
        longest = max(map(len, prompts))
        if limit is not None and longest + new > limit:
            message = (
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{longest + new} tokens ({longest} in the prompt, {new} in the completion). "
                "Please reduce the length of the prompt or completion."
            )
            raise _Refusal(400, message, "prompt", "context_length_exceeded")
        return max_tokens

    def chat_logprobs(self) -> int | None:
        logprobs = self.take("logprobs", bool, False)
        num_top: int | None = self.take("top_logprobs", int)
        if logprobs:
            return num_top or 0
        if num_top is not None:
            message = "when using `top_logprobs`, `logprobs` must be set to true."
            raise _Refusal(400, message, "top_logprobs")
        return None

    def check_top(self, number: int | None, name: str, what: str) -> None:
        limit = self.traits.max_top_logprobs
        if number is None or (limit is None and number == -1):
            return
        if number < 0:
            raise _Refusal(400, f"`{name}` must be a positive value.", name)
        if limit is not None and number > limit:
            if self.traits.dialect == "openai":
                message = f"Invalid value for '{name}': must be less than or equal to {limit}."
            else:
                message = (
                    f"Requested {what} logprobs of {number}, which is greater than max allowed: "
                    f"{limit}"
                )
            raise _Refusal(400, message, name, "invalid_value")

    def stop(self) -> tuple[str, ...]:
        stop = self.take("stop", (str, list), [])
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(each, str) and each for each in stop):
            raise _Refusal(400, "stop cannot contain an empty string.", "stop")
        return stop

    def logit_bias(self) -> dict[int, float]:
        given = self.take("logit_bias", dict, {})
        traits = self.traits
        if given and traits.logit_bias == "none":
            raise _Refusal(400, "logit_bias is not supported.", "logit_bias")
        if traits.max_logit_bias is not None and len(given) > traits.max_logit_bias:
            message = f"logit_bias may have at most {traits.max_logit_bias} tokens."
            raise _Refusal(400, message, "logit_bias")
        bias = {}
        for key, value in given.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (key.isdecimal() and is_number and -100 <= value <= 100):
                message = f"Invalid value for 'logit_bias': {key!r}: {value!r}"
                raise _Refusal(400, message, "logit_bias")
            if int(key) >= self.server.backend.vocab_size:
                message = f"token_id {key} in logit_bias is out of vocabulary"
                raise _Refusal(400, message, "logit_bias")
            bias[int(key)] = float(value)
        return {} if traits.logit_bias == "ignored" else bias


class _Generation:
    """One prompt and what follows it: the steps of a choice."""

    def __init__(self, server: CompletionServer, request: _Request, prompt: list[int]) -> None:
        self.server = server
        self.request = request
        self.prompt = prompt
        self.num_tokens = 0
        """New tokens so far."""
        self.prompt_logprobs: list[Tensor | None] = []
        """`[vocab]` at each token of the prompt; empty if nobody asks."""
        self.random = random.Random(request.seed)
        self.needs_scores = (
            request.echo and request.num_top is not None
        ) or request.num_prompt_top is not None

    def prefill(self) -> None:
        """Run the prompt."""
        backend, prompt = self.server.backend, self.prompt
        with self.server.lock:
            self.server.num_prompt_tokens += len(prompt)
            self.state, logits = backend.prefill([prompt[:1] if self.needs_scores else prompt])
            if self.needs_scores:
                self.prompt_logprobs = [None]
                if len(prompt) > 1:
                    after = backend.extend(self.state, torch.tensor([prompt[1:]]))[0]
                    logits = torch.cat([logits, after])
                self.prompt_logprobs += list(logits[:-1].float().cpu().log_softmax(-1))
        self.logits = logits[-1].float().cpu()

    def deltas(self) -> Iterator[_Delta]:
        """Yield what each step adds; `prefill` comes first."""
        request, eos = self.request, self.server.eos_token_ids
        if request.echo:
            # No logprobs asked for means no scores; the text is echoed all the same.
            scores = self.prompt_logprobs or [None] * len(self.prompt)
            entries = [_Entry(i, s) for i, s in zip(self.prompt, scores, strict=True)]
            text = self.server.tokenizer.decode(self.prompt, skip_special_tokens=True)
            ends = "length" if request.max_tokens == 0 else None
            yield _Delta(text, entries, [], ends)
        budget = request.max_tokens
        if budget is None:
            assert self.server.max_context is not None
            budget = self.server.max_context - len(self.prompt)
        new: list[int] = []
        emitted = 0
        while len(new) < budget:
            token_id, logprobs = self.sample()
            new.append(token_id)
            self.num_tokens += 1
            is_eos = token_id in eos and not request.ignore_eos
            text = self.text(new[:-1] if is_eos else new)
            settled = text.rstrip("\N{REPLACEMENT CHARACTER}")
            stop = _first_stop(settled, request.stop)
            reason: str | None = None
            if stop is not None:
                text, reason = text[: stop[0]], "stop"
            elif is_eos or len(new) == budget:
                reason = "stop" if is_eos else "length"
            else:
                held = max(map(len, request.stop), default=1) - 1
                text = settled[: max(len(settled) - held, 0)]
            is_shown = self.server.traits.shows_eos or not is_eos
            entries = [_Entry(token_id, logprobs)] if is_shown else []
            shown_ids = [token_id] if is_shown else []
            yield _Delta(text[emitted:], entries, shown_ids, reason, stop[1] if stop else None)
            emitted = max(emitted, len(text))
            if reason is not None:
                return
            with self.server.lock:
                self.logits = self.server.backend.decode(self.state, torch.tensor([token_id]))[0]
            self.logits = self.logits.float().cpu()

    def sample(self) -> tuple[int, Tensor]:
        """Return the next token and the reported logprobs."""
        request = self.request
        biased = self.logits
        if request.logit_bias:
            biased = biased.clone()
            biased[list(request.logit_bias)] += torch.tensor(list(request.logit_bias.values()))
        reported = biased if self.server.traits.logit_bias == "shown" else self.logits
        if request.temperature == 0:
            token_id = int(biased.argmax())
        else:
            weights = (biased.double() / request.temperature).softmax(-1).cumsum(-1)
            drawn = torch.tensor(self.random.random() * float(weights[-1]), dtype=torch.float64)
            token_id = min(int(torch.searchsorted(weights, drawn, right=True)), biased.shape[0] - 1)
        with self.server.lock:
            self.server.num_completion_tokens += 1
        return token_id, reported.log_softmax(-1)

    def text(self, new: list[int]) -> str:
        """Return what `new` adds to the prompt's text, special tokens left out."""
        context = self.prompt[-8:]
        before = self.server.tokenizer.decode(context, skip_special_tokens=True)
        after = self.server.tokenizer.decode(context + new, skip_special_tokens=True)
        pairs = zip(before, after, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
        return str(after[same:])


def _first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Return where the stop string begins that completes first, and that string."""
    found = [(text.find(each) + len(each), -len(each), each) for each in stop if each in text]
    if not found:
        return None
    end, _, which = min(found)
    return end - len(which), which


class _Writer:
    """Writes logprobs and choices in the shape the traits ask for.

    Text offsets go on from one delta to the next, for each choice.
    """

    def __init__(self, server: CompletionServer, request: _Request) -> None:
        self.server = server
        self.traits = server.traits
        self.request = request
        self.name = f"{'chatcmpl' if request.is_chat else 'cmpl'}-{random.randrange(16**12):012x}"
        self.created = int(time.time())
        self.offsets = [0] * len(request.prompts)

    def shown(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.request.as_token_ids else self.token_text(token_id)

    def token_text(self, token_id: int) -> str:
        if self.traits.half_characters == "cut":
            return self.server.token_bytes(token_id).decode("utf-8", "ignore")
        return str(self.server.tokenizer.decode([token_id], skip_special_tokens=False))

    def top(self, logprobs: Tensor, number: int, token_id: int) -> list[int]:
        """Return the ids of the top tokens, with the one that was sampled where the traits put it."""
        if number == -1:
            number = logprobs.shape[0]
        ranked = logprobs.sort(descending=True, stable=True).indices[:number].tolist()
        if self.traits.sampled_in_top == "apart":
            return ranked
        with_sampled = [token_id, *(i for i in ranked if i != token_id)]
        return with_sampled if self.traits.sampled_in_top == "added" else with_sampled[:number]

    def logprobs(self, index: int, entries: Sequence[_Entry]) -> Json | None:
        if self.request.num_top is None:
            return None
        if self.request.is_chat or self.traits.completions_logprobs == "content":
            return {"content": [self.content(entry) for entry in entries]}
        return self.lists(index, entries)

    def lists(self, index: int, entries: Sequence[_Entry]) -> Json:
        assert self.request.num_top is not None
        answer: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, logprobs in entries:
            shown = self.shown(token_id)
            answer["tokens"].append(shown)
            answer["text_offset"].append(self.offsets[index])
            # Like vLLM, which also counts the letters of "token_id:5" here.
            self.offsets[index] += len(shown)
            if logprobs is None:
                answer["token_logprobs"].append(None)
                answer["top_logprobs"].append(None)
                continue
            answer["token_logprobs"].append(_number(logprobs[token_id]))
            # Of tokens with the same text the last one stays, as in vLLM.
            answer["top_logprobs"].append(
                {
                    self.shown(i): _number(logprobs[i])
                    for i in self.top(logprobs, self.request.num_top, token_id)
                }
            )
        return answer

    def content(self, entry: _Entry) -> Json:
        assert self.request.num_top is not None and entry.logprobs is not None
        top = self.top(entry.logprobs, self.request.num_top, entry.token_id)
        if not self.request.num_top:
            top = []
        return {
            **self.token(entry.token_id, entry.logprobs),
            "top_logprobs": [self.token(i, entry.logprobs) for i in top],
        }

    def token(self, token_id: int, logprobs: Tensor) -> Json:
        token_bytes: list[int] | None = None
        if self.traits.has_bytes:
            exact = self.traits.exact_bytes
            token_bytes = list(
                self.server.token_bytes(token_id) if exact else self.shown(token_id).encode()
            )
        named = {"id": token_id} if self.traits.shows_ids else {}
        logprob = _number(logprobs[token_id])
        return {**named, "token": self.shown(token_id), "logprob": logprob, "bytes": token_bytes}

    def prompt_logprobs(self, generation: _Generation) -> list[Json | None]:
        number = self.request.num_prompt_top
        assert number is not None
        answer: list[Json | None] = []
        for token_id, logprobs in zip(generation.prompt, generation.prompt_logprobs, strict=True):
            if logprobs is None:
                answer.append(None)
                continue
            ranked = logprobs.sort(descending=True, stable=True).indices.tolist()
            rank = {other: place for place, other in enumerate(ranked, 1)}
            top = ranked if number == -1 else ranked[:number]
            answer.append(
                {
                    str(i): {
                        "logprob": _number(logprobs[i]),
                        "rank": rank[i],
                        "decoded_token": self.token_text(i),
                    }
                    for i in dict.fromkeys([token_id, *top])
                }
            )
        return answer

    def envelope(self, choices: list[Json], *, is_chunk: bool) -> Json:
        kind = "text_completion"
        if self.request.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        head = {"id": self.name, "object": kind, "created": self.created}
        return {**head, "model": self.server.model, "choices": choices}

    def usage(self, generations: Sequence[_Generation]) -> Json:
        prompt = sum(len(each.prompt) for each in generations)
        new = sum(each.num_tokens for each in generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
        }

    def answer(self, generations: Sequence[_Generation]) -> Json:
        """Return the whole answer."""
        request = self.request
        choices = []
        extras: Json = {}
        for index, generation in enumerate(generations):
            deltas = list(generation.deltas())
            text = "".join(delta.text for delta in deltas)
            entries = [entry for delta in deltas for entry in delta.entries]
            content = (
                {"message": {"role": "assistant", "content": text}}
                if request.is_chat
                else {"text": text}
            )
            choice: Json = {"index": index, **content, "logprobs": self.logprobs(index, entries)}
            choice["finish_reason"] = deltas[-1].finish_reason
            choice["stop_reason"] = deltas[-1].stop_reason
            # vLLM has what belongs to the prompt in the choice of a completion and beside those of a chat.
            about_prompt = extras if request.is_chat else choice
            if request.return_token_ids:
                choice["token_ids"] = [i for delta in deltas for i in delta.token_ids]
                about_prompt["prompt_token_ids"] = generation.prompt
            if request.num_prompt_top is not None:
                about_prompt["prompt_logprobs"] = self.prompt_logprobs(generation)
            choices.append(choice)
        answer = self.envelope(choices, is_chunk=False)
        return {**answer, **extras, "usage": self.usage(generations)}

    def chunks(self, generations: Sequence[_Generation]) -> Iterator[Json]:
        """Yield the answer in pieces, one a token."""
        request = self.request
        for index, generation in enumerate(generations):
            extras: Json = {}
            if request.return_token_ids:
                extras = {"prompt_token_ids": generation.prompt}
            if request.is_chat:
                opening = {"index": index, "delta": {"role": "assistant", "content": ""}}
                opening |= {"logprobs": None, "finish_reason": None}
                yield {**self.envelope([opening], is_chunk=True), **extras}
                extras = {}
            for delta in generation.deltas():
                content = (
                    {"delta": {"content": delta.text}} if request.is_chat else {"text": delta.text}
                )
                choice: Json = {"index": index, **content, **extras}
                choice["logprobs"] = self.logprobs(index, delta.entries)
                choice["finish_reason"] = delta.finish_reason
                choice["stop_reason"] = delta.stop_reason
                if request.return_token_ids:
                    choice["token_ids"] = delta.token_ids
                extras = {}
                yield self.envelope([choice], is_chunk=True)
        if request.include_usage:
            yield {**self.envelope([], is_chunk=True), "usage": self.usage(generations)}


class _Handler(QuietHandler):
    """One connection."""

    def do_GET(self) -> None:
        owner = self.server.owner
        try:
            self.check_key()
            if self.path != "/v1/models":
                raise _Refusal(404, f"Not found: {self.path}")
        except _Refusal as refusal:
            self.refuse(refusal)
            return
        card = {"id": owner.model, "object": "model", "created": 0, "owned_by": "tests"}
        if owner.traits.dialect != "openai":
            card["max_model_len"] = owner.max_context
        self.answer(200, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        owner = self.server.owner
        raw = self.read_body()
        try:
            request = self.parse(raw)
            generations = [_Generation(owner, request, prompt) for prompt in request.prompts]
            for generation in generations:
                generation.prefill()
            writer = _Writer(owner, request)
            answer = None if request.stream else writer.answer(generations)
        except _Refusal as refusal:
            self.refuse(refusal)
            return
        except Exception as error:
            owner.failures.append(traceback.format_exc())
            self.refuse(_Refusal(500, f"{type(error).__name__}: {error}", kind="server_error"))
            return
        if answer is not None:
            self.answer(200, answer)
            return
        try:
            self.stream(writer.chunks(generations))
        except OSError:
            self.close_connection = True  # the client went away
        except Exception:
            owner.failures.append(traceback.format_exc())
            self.close_connection = True

    def parse(self, raw: bytes) -> _Request:
        owner = self.server.owner
        self.check_key()
        endpoints = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
        endpoint = endpoints.get(self.path)
        if endpoint is None or owner.traits.endpoint not in (endpoint, "both"):
            raise _Refusal(404, f"Not found: {self.path}")
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise _Refusal(400, f"The body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise _Refusal(400, "The body is not a JSON object.")
        headers = {name.lower(): value for name, value in self.headers.items()}
        with owner.lock:
            owner.received.append(Received(self.path, headers, body))
        return _Parser(owner, body, is_chat=endpoint == "chat").parse()

    def check_key(self) -> None:
        key = self.server.owner.api_key
        if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
            raise _Refusal(401, "Incorrect API key provided.", code="invalid_api_key")

    def refuse(self, refusal: _Refusal) -> None:
        self.answer(refusal.status, refusal.body(self.server.owner.traits.dialect))

    def answer(self, status: int, body: Json) -> None:
        self.server.owner.statuses.append(status)
        self.send(status, json.dumps(body).encode(), Content_Type="application/json")

    def stream(self, chunks: Iterator[Json]) -> None:
        self.server.owner.statuses.append(200)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self.send_chunk(f"data: {json.dumps(chunk)}\n\n".encode())
        self.send_chunk(b"data: [DONE]\n\n")
        self.send_chunk(b"")


def _number(logprob: Tensor) -> float:
    return max(float(logprob), LOWEST_LOGPROB)


def _bytes_of(tokenizer: Any) -> Callable[[int], bytes]:
    """Return what reads the bytes of a token id: byte-level BPE, SentencePiece, or plain strings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda token_id: str(tokenizer.decode([token_id])).encode()
    special = set(tokenizer.get_added_vocab().values())
    byte_level = "ByteLevel" in json.dumps(json.loads(backend.to_str())["decoder"])
    # GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + place): byte for place, byte in enumerate(others)}

    def read(token_id: int) -> bytes:
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a padding id of the head
            return b""
        if token_id in special:
            return str(token).encode()
        if byte_level:
            return bytes(alphabet[letter] for letter in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("\u2581", " ").encode()

    return read
