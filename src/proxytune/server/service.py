"""Between HTTP and the engine: a request's fields become jobs, events become parts of an answer.

What clients may send is `schema.py`'s, how parts look `answer.py`'s, what runs `engine.py`'s. Connections,
keys and status lines are `app.py`'s.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from proxytune.decode.batch import Event
from proxytune.decode.ensemble import Job
from proxytune.decode.speculative import Drafting
from proxytune.errors import InvalidRequest, PromptTooLong, ShuttingDown
from proxytune.model import ProxyTuned
from proxytune.request import MIN_TEMPERATURE, Request, SamplingParams, Steering
from proxytune.server import answer
from proxytune.server.answer import Json, Tokens
from proxytune.server.engine import Engine, Ticket
from proxytune.server.metrics import Metrics
from proxytune.server.schema import (
    MAX_EXPLAIN_TOP,
    MAX_LOGPROBS,
    ChatRequest,
    CompletionRequest,
    Generation,
)
from proxytune.text.prompts import PLAIN_USER_TURN
from proxytune.text.vocab import token_bytes
from proxytune.trace import Step


class UnknownModel(InvalidRequest):
    """A request names a model that is not served."""


class TimeIsUp(Exception):
    """A text took longer than a request may."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server allows.

    Args:
        name: What clients call the recipe.
        api_keys: One of them must come with a request to `/v1`; none asks for nothing.
        hosts: Names under which it may be called, so that no web page on another name can; None for any.
        cors_origins: Web pages of these origins may call it; `*` for all.
        max_rows: Most texts at once.
        max_waiting: Most texts that wait.
        kept_tokens: How many tokens of ended texts the models remember; see `Engine`.
        max_tokens: Most new tokens of a text.
        max_prompt_tokens: Longest prompt, in the base's tokens; None for what the models hold.
        max_body_bytes: Largest body of a request.
        body_timeout_s: Longest time that a request may take to arrive.
        send_timeout_s: Longest time that a client may take to read a piece of its stream.
        request_timeout_s: Longest time from a request to the end of its text.
        speculative: Draft tokens; see `ProxyTuned.generate`.
        log_prompts: Write requests to the log with their prompts.
    """

    name: str
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    cors_origins: tuple[str, ...] = ()
    max_rows: int = 8
    max_waiting: int = 64
    kept_tokens: int = 4096
    max_tokens: int = 2048
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 2 * 2**20
    body_timeout_s: float = 20.0
    send_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    speculative: bool | Drafting = False
    log_prompts: bool = False


@dataclass(slots=True, eq=False)
class Choice:
    """One text of an answer as it grows."""

    index: int
    ticket: Ticket
    num_steps: int = 0
    num_chars: int = 0
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What one event adds to a choice."""

    choice: Choice
    text: str
    steps: tuple[Step, ...]


@dataclass(slots=True, eq=False)
class Answer:
    """The texts of one request while they grow.

    Args:
        wanted: The request.
        choices: Its texts.
        events: What happened to them, filled by the engine.
        prompts: What `echo` puts before each text.
    """

    wanted: Generation
    choices: list[Choice]
    events: asyncio.Queue[tuple[Choice, Event | Exception]]
    prompts: Sequence[str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat's."""
        return isinstance(self.wanted, ChatRequest)

    def cancel(self) -> None:
        """End what still runs, within one step."""
        for choice in self.choices:
            choice.ticket.cancel()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts as the base reads them; a prompt with several answers counts once."""
        prompts = self.choices[:: self.wanted.n]
        return sum(len(choice.ticket.job.prompts[0]) for choice in prompts)

    @property
    def num_reused_tokens(self) -> int:
        """Tokens of the prompts that earlier texts had left."""
        return sum(choice.ticket.num_reused for choice in self.choices)

    @property
    def usage(self) -> Json:
        """What it has cost so far."""
        return answer.usage(self.num_prompt_tokens, self.num_new_tokens, self.num_reused_tokens)

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(choice.num_steps for choice in self.choices)


class Service:
    """What the server does, without HTTP.

    Args:
        model: What runs.
        settings: What is allowed.
    """

    def __init__(self, model: ProxyTuned, settings: ServerSettings) -> None:
        self.model = model
        self.settings = settings
        self.engine = Engine(
            model,
            max_rows=settings.max_rows,
            max_waiting=settings.max_waiting,
            kept_tokens=settings.kept_tokens,
            speculative=settings.speculative,
            on_step=lambda *step: self.metrics.stepped(*step),
        )
        self.metrics = Metrics(lambda: self.engine.num_running, lambda: self.engine.num_waiting)
        self.tokens = Tokens(token_bytes(model.ensemble.vocabulary))
        # A tokenizer may change settings of its own while it encodes.
        self._rendering = threading.Lock()

    # What is served -------------------------------------------------------------------------------------

    @property
    def model_names(self) -> dict[str, str | None]:
        """What `model` may be, and the expert it stands for; None for the recipe's default."""
        name = self.settings.name
        return {name: None} | {f"{name}:{e.name}": e.name for e in self.model.recipe.experts}

    def about(self) -> Json:
        """Return what the recipe is and what a request may ask for."""
        recipe = self.model.recipe
        contexts = [m.backend.capabilities.max_context for m in self.model.ensemble.members]
        context = min((limit for limit in contexts if limit is not None), default=None)
        longest = self.settings.max_prompt_tokens or (None if context is None else context - 1)
        base = recipe.base
        return {
            "name": self.settings.name,
            # A path says where files are on the server; a reference to a package or the Hub says nothing.
            "base": base.api.model
            if base.api is not None
            else (base.model or "").rsplit("/", 1)[-1],
            # A plain base takes conversations as text, and few models answer that well.
            "has_chat": base.prompt != "plain",
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

    def jobs(self, wanted: Generation) -> list[Job]:
        """Return what a request asks for, a job for each text. It tokenises: not quick.

        Raises:
            UserError: A field cannot be honoured.
        """
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
        most = self.settings.max_waiting + self.settings.max_rows
        if len(prompts) * wanted.n > most:
            raise InvalidRequest(
                f"{len(prompts) * wanted.n} texts were asked for at once, and this server takes {most}"
            )
        jobs = []
        for prompt in prompts:
            # With nothing said, a chat may go on as far as the models and the server allow.
            sampling = self._sampling(wanted, 1 if asked is None else asked)
            request = Request(
                prompt,
                sampling,
                steering.alpha,
                steering.experts,
                wanted.steering.explain,
                wanted.steering.explain_top,
            )
            with self._rendering:
                job = self.model.job(request)
            longest = self.settings.max_prompt_tokens
            if longest is not None and len(job.prompts[0]) > longest:
                raise PromptTooLong(
                    f"the prompt has {len(job.prompts[0])} tokens, and this server allows {longest}.\n"
                    "hint: shorten the prompt"
                )
            if asked is None:
                job = replace(job, sampling=replace(sampling, max_new_tokens=self._room(job)))
            for number in range(wanted.n):
                jobs.append(replace(job, sampling=_seeded(job.sampling, number)))
        return jobs

    def begin(self, wanted: Generation, jobs: Sequence[Job], client: str) -> Answer:
        """Queue a request's jobs; called in the event loop, whose queue the engine fills.

        Raises:
            Unavailable: Too many wait, or the server shuts down.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[Choice, Event | Exception]] = asyncio.Queue()
        deadline = time.monotonic() + self.settings.request_timeout_s
        choices: list[Choice] = []
        for index, job in enumerate(jobs):
            ticket = Ticket(job, lambda event: None, client, deadline)
            ticket.job = replace(job, cancelled=ticket.is_unwanted)
            choice = Choice(index, ticket)

            def tell(event: Event | Exception, choice: Choice = choice) -> None:
                # Counted here, since a client that has gone asks for no parts.
                if isinstance(event, Exception):
                    self.metrics.ended(choice.ticket, "failed")
                elif event.finish_reason is not None:
                    self.metrics.ended(choice.ticket, event.finish_reason)
                loop.call_soon_threadsafe(events.put_nowait, (choice, event))

            ticket.on_event = tell
            choices.append(choice)
        prompts: Sequence[str] = [""] * len(choices)
        if isinstance(wanted, CompletionRequest) and wanted.echo:
            prompts = [self._prompt_text(p) for p in wanted.prompts for _ in range(wanted.n)]
        self.engine.submit([choice.ticket for choice in choices])
        return Answer(wanted, choices, events, prompts)

    def _prompt_text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)

    def _steering(self, wanted: Generation) -> Steering:
        names = self.model_names
        if wanted.model not in names:
            raise UnknownModel(
                f"there is no model {wanted.model!r} here; there are: {', '.join(names)}"
            )
        asked, named = wanted.steering, names[wanted.model]
        if asked.experts is not None:
            if named is not None:
                raise InvalidRequest(
                    f"the model {wanted.model!r} names an expert, and proxytune.experts names others.\n"
                    f"hint: ask for the model {self.settings.name!r}"
                )
            return Steering(experts=asked.experts)
        if named is not None and asked.expert not in (None, named):
            raise InvalidRequest(
                f"the model {wanted.model!r} names an expert, and proxytune.expert another.\n"
                f"hint: ask for the model {self.settings.name!r}"
            )
        return Steering(asked.alpha, asked.expert or named)

    def _sampling(self, wanted: Generation, max_new_tokens: int) -> SamplingParams:
        """Return the library's settings for the API's fields; its defaults are the API's."""
        temperature = 1.0 if wanted.temperature is None else wanted.temperature
        is_greedy = temperature < MIN_TEMPERATURE
        num_top: int | None
        stops = wanted.stops
        if isinstance(wanted, ChatRequest):
            num_top = wanted.top_logprobs
            if self.model.recipe.base.prompt == "plain":
                # A base without a chat format writes the user's next turn too, if it is let.
                stops = (*stops, PLAIN_USER_TURN)
        else:
            assert isinstance(wanted, CompletionRequest)
            num_top = wanted.logprobs
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(wanted.min_tokens, max_new_tokens),
            temperature=0.0 if is_greedy else temperature,
            # At temperature 0 the API takes filters, and they change nothing.
            top_k=0 if is_greedy else max(0, wanted.top_k),
            top_p=1.0 if is_greedy or wanted.top_p is None else wanted.top_p,
            min_p=0.0 if is_greedy else wanted.min_p,
            repetition_penalty=wanted.repetition_penalty,
            presence_penalty=wanted.presence_penalty or 0.0,
            frequency_penalty=wanted.frequency_penalty or 0.0,
            logit_bias=tuple(
                {int(key): value for key, value in (wanted.logit_bias or {}).items()}.items()
            ),
            seed=None if wanted.seed is None else wanted.seed % 2**63,
            stop=stops,
            stop_token_ids=tuple(wanted.stop_token_ids or ()),
            ignore_eos=wanted.ignore_eos,
            logprobs=num_top or None,
        )

    def _room(self, job: Job) -> int:
        """Return how many tokens fit behind a prompt."""
        room = self.settings.max_tokens
        for member, prompt in zip(self.model.ensemble.members, job.prompts, strict=True):
            context = member.backend.capabilities.max_context
            if context is not None:
                room = min(room, context - len(prompt))
        return max(1, room)

    # Answers --------------------------------------------------------------------------------------------

    async def parts(self, given: Answer) -> AsyncIterator[Part]:
        """Yield what happens to an answer's texts until all have ended.

        Raises:
            TimeIsUp: A text was not finished in time.
            ShuttingDown: A text was not finished when the server had to stop.
            Exception: What ended a text, if something did.
        """
        open_choices = len(given.choices)
        while open_choices:
            choice, event = await given.events.get()
            if isinstance(event, Exception):
                raise event
            if event.finish_reason is not None:
                open_choices -= 1
                if event.finish_reason == "cancelled":
                    if choice.ticket.is_late:
                        raise TimeIsUp
                    if not self.engine.is_alive:
                        raise ShuttingDown("the server stops, and the text took too long to finish")
                choice.finish_reason = event.finish_reason
            text = event.tail if event.step is None else event.step.text
            yield Part(choice, text, () if event.step is None else (event.step,))
            choice.num_chars += len(text)
            choice.num_steps += event.step is not None

    def whole(self, given: Answer, parts: Sequence[Part]) -> Json:
        """Return the answer of a request that is not streamed."""
        choices = []
        for choice, prompt in zip(given.choices, given.prompts, strict=True):
            own = [part for part in parts if part.choice is choice]
            text = "".join(part.text for part in own)
            steps = tuple(step for part in own for step in part.steps)
            found: Json = {"index": choice.index, "finish_reason": choice.finish_reason}
            if given.is_chat:
                found["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                found["text"] = prompt + text
            found["logprobs"] = self._logprobs(given.wanted, steps, 0)
            if given.wanted.proxytune is not None:
                found["proxytune"] = {
                    "alphas": dict(choice.ticket.job.strengths),
                    "seed": choice.ticket.job.sampling.seed,
                    "tokens": self._explained(given, steps),
                }
            choices.append(found)
        return self._envelope(given, "chat.completion" if given.is_chat else "text_completion") | {
            "choices": choices,
            "usage": given.usage,
        }

    def first_chunks(self, given: Answer) -> list[Json]:
        """Return what a stream begins with: a chat's roles, the prompts that are echoed."""
        chunks = []
        for choice, prompt in zip(given.choices, given.prompts, strict=True):
            if given.is_chat:
                delta = {"role": "assistant", "content": ""}
                chunks.append(self._chunk(given, {"index": choice.index, "delta": delta}))
            elif prompt:
                chunks.append(self._chunk(given, {"index": choice.index, "text": prompt}))
        return chunks

    def chunk(self, given: Answer, part: Part) -> Json | None:
        """Return what a part adds to a stream; None where that is nothing."""
        wanted, choice = given.wanted, part.choice
        logprobs = self._logprobs(wanted, part.steps, choice.num_chars)
        tokens = self._explained(given, part.steps)
        if not (part.text or choice.finish_reason or logprobs or tokens):
            return None
        found: Json = {"index": choice.index}
        if given.is_chat:
            found["delta"] = {"content": part.text} if part.text else {}
        else:
            found["text"] = part.text
        found["logprobs"] = logprobs
        if tokens:
            found["proxytune"] = {"tokens": tokens}
        return self._chunk(given, found, choice.finish_reason)

    def usage_chunk(self, given: Answer) -> Json:
        """Return the last chunk of a stream that was asked for its usage."""
        return self._chunk(given, None) | {
            "choices": [],
            "usage": given.usage,
        }

    def _chunk(self, given: Answer, choice: Json | None, finish_reason: str | None = None) -> Json:
        kind = "chat.completion.chunk" if given.is_chat else "text_completion"
        envelope = self._envelope(given, kind)
        if choice is not None:
            envelope["choices"] = [{"logprobs": None} | choice | {"finish_reason": finish_reason}]
        return envelope

    def _envelope(self, given: Answer, kind: str) -> Json:
        prefix = "chatcmpl" if given.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{given.id}",
            "object": kind,
            "created": given.created,
            "model": given.wanted.model,
            "system_fingerprint": f"proxytune-{version('proxytune')}",
        }

    def _explained(self, given: Answer, steps: Sequence[Step]) -> list[Json]:
        if given.wanted.proxytune is None or not given.wanted.proxytune.explain:
            return []
        return [answer.explained(step, self.tokens) for step in steps]

    def _logprobs(self, wanted: Generation, steps: Sequence[Step], offset: int) -> Json | None:
        if isinstance(wanted, ChatRequest):
            if not wanted.logprobs:
                return None
            return answer.chat_logprobs(steps, self.tokens) if steps else None
        assert isinstance(wanted, CompletionRequest)
        if wanted.logprobs is None or not steps:
            return None
        return answer.completion_logprobs(
            steps, self.tokens, offset=offset, has_top=wanted.logprobs > 0
        )


def _seeded(sampling: SamplingParams, number: int) -> SamplingParams:
    """Return the settings of the answer `number` to one prompt: each has noise of its own.

    A seed is drawn where none was given, so that a text can be generated again if its batch fails.
    """
    if sampling.is_greedy:
        return sampling
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return replace(sampling, seed=(seed + number) % 2**63)
