"""Between HTTP and the engine: turns a request's fields into jobs, and events into parts of an answer.

`schema.py` defines what clients may send, `answer.py` how steps are written as JSON, and `engine.py` runs the
jobs. Connections, keys and status codes belong to `app.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from proxytune.decode.batch import Event
from proxytune.decode.ensemble import Job
from proxytune.errors import InvalidRequest, PromptTooLong, ShuttingDown
from proxytune.measure.score import smallest_context
from proxytune.model import ProxyTuned
from proxytune.request import Request, SamplingParams, Steering
from proxytune.server.answer import Json, Tokens, chat_logprobs, completion_logprobs, explained
from proxytune.server.engine import Engine
from proxytune.server.metrics import Metrics
from proxytune.server.rendering import Rendering, desk_models, prompt_limits
from proxytune.server.schema import (
    MAX_EXPLAIN_TOP,
    MAX_LOGPROBS,
    ChatRequest,
    CompletionRequest,
    Generation,
    read_request,
)
from proxytune.server.settings import ServerSettings
from proxytune.server.turns import Ticket
from proxytune.text.prompts import PLAIN_USER_TURN
from proxytune.text.vocab import token_bytes
from proxytune.trace import Step

logger = logging.getLogger("proxytune.server")


class UnknownModel(InvalidRequest):
    """A request names a model that is not served."""


class TimeIsUp(Exception):
    """A text was not finished within the time limit of a request."""


@dataclass(slots=True, eq=False)
class AnswerText:
    """One text of an answer, while it grows; in JSON an element of `choices`."""

    index: int
    ticket: Ticket
    num_steps: int = 0
    num_chars: int = 0
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """What one event adds to a text."""

    owner: AnswerText
    text: str
    steps: tuple[Step, ...]


@dataclass(slots=True, eq=False)
class Answer:
    """The texts of one request, while they grow.

    Args:
        wanted: The request.
        texts: Its texts.
        events: What happened to each text; the engine fills this queue.
        prompts: The prompt that `echo` puts before each text.
    """

    wanted: Generation
    texts: list[AnswerText]
    events: asyncio.Queue[tuple[AnswerText, Event | Exception]]
    prompts: Sequence[str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        """Whether it answers a chat."""
        return isinstance(self.wanted, ChatRequest)

    def cancel(self) -> None:
        """End the texts that are still running, within one step."""
        for text in self.texts:
            text.ticket.cancel()

    @property
    def usage(self) -> Json:
        """The `usage` field, counting what was generated so far; prompts are as the base reads them."""
        # A prompt with several answers counts once.
        num_prompt = sum(len(text.ticket.job.prompts[0]) for text in self.texts[:: self.wanted.n])
        num_new = sum(text.num_steps for text in self.texts)
        num_reused = sum(text.ticket.num_reused for text in self.texts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": num_reused},
        }


class Service:
    """What the server does, without HTTP."""

    def __init__(self, model: ProxyTuned, settings: ServerSettings) -> None:
        self.model = model
        self.settings = settings
        self.engine = Engine(
            model,
            max_rows=settings.max_rows,
            max_waiting=settings.max_waiting,
            kept_tokens=settings.kept_tokens,
            speculative=settings.speculative,
            on_step=lambda *step: self.metrics.count_step(*step),
        )
        self.metrics = Metrics(lambda: self.engine.num_running, lambda: self.engine.num_waiting)
        self.tokens = Tokens(token_bytes(model.ensemble.vocabulary))
        self._max_prompt = prompt_limits(model, settings.max_prompt_tokens)[0]
        self._rendering = Rendering(desk_models(model, settings.max_prompt_tokens))

    def close(self) -> None:
        """Stop the engine, and what is still running in it; end the threads."""
        self.engine.close(0)
        self._rendering.close()

    # What is served -------------------------------------------------------------------------------------

    @property
    def model_names(self) -> dict[str, str | None]:
        """Valid values of `model`, each with the expert it stands for; None is the recipe's default."""
        name = self.settings.name
        return {name: None} | {f"{name}:{e.name}": e.name for e in self.model.recipe.experts}

    def about(self) -> Json:
        """Return a description of the recipe and of what a request may ask for."""
        recipe = self.model.recipe
        context = smallest_context(self.model.ensemble.members)
        longest = self.settings.max_prompt_tokens or (None if context is None else context - 1)
        base = recipe.base
        # Only the last part: a path would reveal where files are on the server.
        name = base.api.model if base.api is not None else (base.model or "").rsplit("/", 1)[-1]
        return {
            "name": self.settings.name,
            "base": name,
            # A base without a chat format reads conversations as plain text, and few such models answer well.
            "has_chat": not self.model.formats[0].joins_messages,
            "default_experts": list(recipe.named()),
            "experts": [{"name": e.name, "alpha": e.alpha} for e in recipe.experts],
            "limits": {
                "max_tokens": self.settings.max_tokens,
                "max_prompt_tokens": longest,
                "max_context": context,
                "max_logprobs": MAX_LOGPROBS,
                "max_explain_top": MAX_EXPLAIN_TOP,
            },
            "version": version("proxytune"),
        }

    # Requests -------------------------------------------------------------------------------------------

    async def read(
        self, kind: type[Generation], body: bytes | bytearray, *, client: str, deadline: float
    ) -> tuple[Generation, list[Job]]:
        """Return the request that a body holds, and a job for each text that it asks for.

        Args:
            kind: The class of the request.
            body: Its JSON.
            client: As in `turns.py`.
            deadline: Time on the monotonic clock at which to give up.

        Raises:
            UserError: A field cannot be honoured.
            TimeIsUp: The deadline has passed.
        """

        def work(desk: ProxyTuned) -> tuple[Generation, list[Job]]:
            wanted = read_request(kind, body)
            if self.settings.log_prompts:
                asked = wanted.model_dump_json(exclude_defaults=True)
                logger.info("request %s", _one_line(asked))
            return wanted, self._jobs(wanted, desk)

        rendering = self._rendering.run(client, len(body), work)
        try:
            return await asyncio.wait_for(rendering, deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise TimeIsUp from None

    def _jobs(self, wanted: Generation, desk: ProxyTuned) -> list[Job]:
        """Return a job for each text that a request asks for; `desk` renders its prompts."""
        steering = self._steering(wanted)
        prompts: list[Any]
        if isinstance(wanted, ChatRequest):
            prompts = [[message.as_message() for message in wanted.messages]]
            asked = wanted.max_completion_tokens or wanted.max_tokens
        else:
            assert isinstance(wanted, CompletionRequest)
            prompts, asked = list(wanted.prompts), wanted.max_tokens or 16
        if asked is not None and asked > self.settings.max_tokens:
            raise InvalidRequest(
                f"max_tokens is {asked}, and this server allows {self.settings.max_tokens}"
            )
        num_texts = len(prompts) * wanted.n
        max_texts = self.settings.max_waiting + self.settings.max_rows
        if num_texts > max_texts:
            raise InvalidRequest(
                f"the request asks for {num_texts} texts at once, and this server allows {max_texts}"
            )
        jobs = []
        for prompt in prompts:
            if not isinstance(prompt, str) and isinstance(prompt[0], int):
                self._check_length(len(prompt), self._max_prompt)
            # Without a limit, a chat answer may be as long as the models and the server allow.
            sampling = self._sampling(wanted, 1 if asked is None else asked)
            explain = wanted.steering.explain, wanted.steering.explain_top
            request = Request(prompt, sampling, steering.alpha, steering.experts, *explain)
            job = desk.job(request)
            self._check_length(len(job.prompts[0]), self.settings.max_prompt_tokens)
            if asked is None:
                job = replace(job, sampling=replace(sampling, max_new_tokens=self._room(job)))
            for number in range(wanted.n):
                jobs.append(replace(job, sampling=_seeded(job.sampling, number)))
        return jobs

    @staticmethod
    def _check_length(num_tokens: int, longest: int | None) -> None:
        if longest is not None and num_tokens > longest:
            raise PromptTooLong(
                f"the prompt has {num_tokens} tokens, and this server allows {longest}.\n"
                "hint: shorten the prompt"
            )

    def begin(
        self, wanted: Generation, jobs: Sequence[Job], *, client: str, host: str, deadline: float
    ) -> Answer:
        """Queue a request's jobs and return its answer. Call it in the event loop that reads the answer.

        Args:
            wanted: The request.
            jobs: Its jobs.
            client: As in `turns.py`.
            host: The address it came from: those that share a key take turns as users do.
            deadline: Time on the monotonic clock at which its texts end.

        Raises:
            Unavailable: Too many requests are waiting, or the server is shutting down.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[AnswerText, Event | Exception]] = asyncio.Queue()
        user = json.dumps([host, wanted.user])
        texts: list[AnswerText] = []
        for index, job in enumerate(jobs):
            ticket = Ticket(job, lambda event: None, client, deadline, user)
            ticket.job = replace(job, cancelled=ticket.is_unwanted)
            text = AnswerText(index, ticket)

            def forward(event: Event | Exception, text: AnswerText = text) -> None:
                # Counted here, because nobody reads the parts once the client has gone.
                if isinstance(event, Exception):
                    self.metrics.count_text(text.ticket, "failed")
                elif event.finish_reason is not None:
                    self.metrics.count_text(text.ticket, event.finish_reason)
                loop.call_soon_threadsafe(events.put_nowait, (text, event))

            ticket.on_event = forward
            texts.append(text)
        prompts: Sequence[str] = [""] * len(texts)
        if isinstance(wanted, CompletionRequest) and wanted.echo:
            decode = self.model.tokenizer.decode
            shown = [p if isinstance(p, str) else decode(p) for p in wanted.prompts]
            prompts = [text for text in shown for _ in range(wanted.n)]
        self.engine.submit([text.ticket for text in texts])
        return Answer(wanted, texts, events, prompts)

    def _steering(self, wanted: Generation) -> Steering:
        names = self.model_names
        if wanted.model not in names:
            raise UnknownModel(
                f"there is no model {wanted.model!r} here; the models are: {', '.join(names)}"
            )
        asked, named = wanted.steering, names[wanted.model]
        if asked.experts is not None:
            if named is not None:
                raise InvalidRequest(
                    f"the model {wanted.model!r} names an expert, and proxytune.experts names others.\n"
                    f"hint: use the model {self.settings.name!r}"
                )
            return Steering(experts=asked.experts)
        if named is not None and asked.expert not in (None, named):
            raise InvalidRequest(
                f"the model {wanted.model!r} names an expert, and proxytune.expert names another.\n"
                f"hint: use the model {self.settings.name!r}"
            )
        return Steering(asked.alpha, asked.expert or named)

    def _sampling(self, wanted: Generation, max_new_tokens: int) -> SamplingParams:
        """Return the library's settings for the API's fields; its defaults are the API's."""
        num_top: int | None
        stops = wanted.stops
        if isinstance(wanted, ChatRequest):
            num_top = wanted.top_logprobs
            if self.model.formats[0].joins_messages:
                # Unless stopped, a base without a chat format goes on to write the user's next turn.
                stops = (*stops, PLAIN_USER_TURN)
        else:
            assert isinstance(wanted, CompletionRequest)
            num_top = wanted.logprobs
        return wanted.sampling(max_new_tokens, stops=stops, logprobs=num_top or None)

    def _room(self, job: Job) -> int:
        """Return how many new tokens fit after a prompt."""
        room = self.settings.max_tokens
        for member, prompt in zip(self.model.ensemble.members, job.prompts, strict=True):
            context = member.backend.capabilities.max_context
            if context is not None:
                room = min(room, context - len(prompt))
        return max(1, room)

    # Answers --------------------------------------------------------------------------------------------

    async def parts(self, answer: Answer) -> AsyncIterator[AnswerPart]:
        """Yield the parts of an answer as they arrive, until all its texts have ended.

        Raises:
            TimeIsUp: A text was not finished within the time limit.
            ShuttingDown: A text was not finished when the server had to stop.
            Exception: The error that ended a text.
        """
        num_open = len(answer.texts)
        while num_open:
            owner, event = await answer.events.get()
            if isinstance(event, Exception):
                raise event
            if event.finish_reason is not None:
                num_open -= 1
                if event.finish_reason == "cancelled":
                    if owner.ticket.is_late:
                        raise TimeIsUp
                    if not self.engine.is_alive:
                        message = "the server is stopping, and the text was not finished in time"
                        raise ShuttingDown(message)
                owner.finish_reason = event.finish_reason
            text = event.tail if event.step is None else event.step.text
            yield AnswerPart(owner, text, () if event.step is None else (event.step,))
            owner.num_chars += len(text)
            owner.num_steps += event.step is not None

    def whole(self, answer: Answer, parts: Sequence[AnswerPart]) -> Json:
        """Return the JSON of an answer that is not streamed."""
        choices = []
        for text, prompt in zip(answer.texts, answer.prompts, strict=True):
            own = [part for part in parts if part.owner is text]
            content = "".join(part.text for part in own)
            steps = tuple(step for part in own for step in part.steps)
            choice: Json = {"index": text.index, "finish_reason": text.finish_reason}
            if answer.is_chat:
                choice["message"] = {"role": "assistant", "content": content, "refusal": None}
            else:
                choice["text"] = prompt + content
            choice["logprobs"] = self._logprobs(answer.wanted, steps, 0)
            if answer.wanted.proxytune is not None:
                choice["proxytune"] = {
                    "alphas": dict(text.ticket.job.strengths),
                    "seed": text.ticket.job.sampling.seed,
                    "tokens": self._explained(answer, steps),
                }
            choices.append(choice)
        return self._envelope(answer) | {"choices": choices, "usage": answer.usage}

    def first_chunks(self, answer: Answer) -> list[Json]:
        """Return the first chunks of a stream: the roles of a chat, or the prompts that `echo` asks for."""
        chunks = []
        for text, prompt in zip(answer.texts, answer.prompts, strict=True):
            if answer.is_chat:
                delta = {"role": "assistant", "content": ""}
                chunks.append(self._chunk(answer, {"index": text.index, "delta": delta}))
            elif prompt:
                chunks.append(self._chunk(answer, {"index": text.index, "text": prompt}))
        return chunks

    def chunk(self, answer: Answer, part: AnswerPart) -> Json | None:
        """Return the chunk that a part adds to a stream; None if it adds nothing."""
        text = part.owner
        logprobs = self._logprobs(answer.wanted, part.steps, text.num_chars)
        tokens = self._explained(answer, part.steps)
        if not (part.text or text.finish_reason or logprobs or tokens):
            return None
        choice: Json = {"index": text.index}
        if answer.is_chat:
            choice["delta"] = {"content": part.text} if part.text else {}
        else:
            choice["text"] = part.text
        choice["logprobs"] = logprobs
        if tokens:
            choice["proxytune"] = {"tokens": tokens}
        return self._chunk(answer, choice, text.finish_reason)

    def usage_chunk(self, answer: Answer) -> Json:
        """Return the last chunk of a stream whose request asked for `usage`."""
        return self._envelope(answer, ".chunk") | {"choices": [], "usage": answer.usage}

    def _chunk(self, answer: Answer, choice: Json, finish_reason: str | None = None) -> Json:
        whole = {"logprobs": None} | choice | {"finish_reason": finish_reason}
        return self._envelope(answer, ".chunk") | {"choices": [whole]}

    def _envelope(self, answer: Answer, ending: str = "") -> Json:
        return {
            "id": f"{'chatcmpl' if answer.is_chat else 'cmpl'}-{answer.id}",
            "object": f"chat.completion{ending}" if answer.is_chat else "text_completion",
            "created": answer.created,
            "model": answer.wanted.model,
            "system_fingerprint": f"proxytune-{version('proxytune')}",
        }

    def _explained(self, answer: Answer, steps: Sequence[Step]) -> list[Json]:
        if answer.wanted.proxytune is None or not answer.wanted.proxytune.explain:
            return []
        return [explained(step, self.tokens) for step in steps]

    def _logprobs(self, wanted: Generation, steps: Sequence[Step], offset: int) -> Json | None:
        if isinstance(wanted, ChatRequest):
            if not wanted.logprobs:
                return None
            return chat_logprobs(steps, self.tokens) if steps else None
        assert isinstance(wanted, CompletionRequest)
        if wanted.logprobs is None or not steps:
            return None
        return completion_logprobs(steps, self.tokens, offset=offset, has_top=wanted.logprobs > 0)


def _one_line(text: str) -> str:
    """Return JSON with characters that a terminal may obey, or does not show, as escapes."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _seeded(sampling: SamplingParams, number: int) -> SamplingParams:
    """Return the settings for answer `number` to a prompt: each answer has a seed of its own.

    If no seed was given, one is drawn, so that a text can be generated again if its batch fails.
    """
    if sampling.is_greedy:
        return sampling
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return replace(sampling, seed=(seed + number) % 2**63)
