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
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, TypeVar

from proxytune.decode.batch import Event
from proxytune.decode.ensemble import Job
from proxytune.errors import InvalidRequest, PromptTooLong, ShuttingDown
from proxytune.measure.prompt import check_scored
from proxytune.measure.score import smallest_context
from proxytune.model import ProxyTuned
from proxytune.request import Request, SamplingParams, Steering
from proxytune.server.answer import (
    Json,
    Tokens,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    explained,
    joined_logprobs,
    prompt_logprobs,
)
from proxytune.server.echo import Echo, token_offsets
from proxytune.server.engine import Engine
from proxytune.server.metrics import Metrics
from proxytune.server.reasoning import ReasoningSplitter, has_reasoning, opens_reasoning
from proxytune.server.rendering import Rendering, desk_models, prompt_limits
from proxytune.server.schema import (
    MAX_EXPLAIN_TOP,
    MAX_LOGPROBS,
    ChatRequest,
    CompletionRequest,
    Generation,
)
from proxytune.server.settings import ServerSettings
from proxytune.server.steering import (
    about_recipe,
    check_keys,
    expert_named,
    model_names,
    steering_of,
)
from proxytune.server.turns import PromptScores, Ticket
from proxytune.text.prompts import PromptFormat
from proxytune.text.vocab import token_bytes
from proxytune.trace import Step

logger = logging.getLogger("proxytune.server")

Result = TypeVar("Result")

MAX_PROMPT_LOGPROBS = 2**17
"""Maximum number of logprobs of prompt tokens in one answer; each takes about 100 bytes until it is sent."""


class TimeIsUp(Exception):
    """A text was not finished within the time limit of a request."""


@dataclass(frozen=True, slots=True)
class Order:
    """A text that a request asks for.

    Args:
        job: What to generate.
        echo: What its answer shows of the prompt.
        scores: What becomes the scores of the prompt; None if nobody wants them.
        max_tokens: Maximum number of new tokens, which may be none.
        is_cut: Whether the request asked for more than that.
        splitter: Tells its reasoning from the rest; None for text as it is.
    """

    job: Job
    echo: Echo
    scores: PromptScores | None
    max_tokens: int
    is_cut: bool
    splitter: ReasoningSplitter | None = None


@dataclass(slots=True, eq=False)
class AnswerText:
    """One text of an answer, while it grows; in JSON an element of `choices`."""

    index: int
    ticket: Ticket
    order: Order
    num_steps: int = 0
    num_reasoning: int = 0
    num_chars: int = 0
    has_begun: bool = False
    finish_reason: str | None = None
    stopped_by: str | None = None
    """The stop string that ended it."""


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """What one event adds to a text.

    Args:
        owner: The text.
        text: What it adds to the answer.
        steps: The steps that it comes from.
        offset: How many characters of the text come before; None for the text's first part.
        reasoning: What it adds to the reasoning, if that is kept apart.
    """

    owner: AnswerText
    text: str
    steps: tuple[Step, ...]
    offset: int | None
    reasoning: str = ""


@dataclass(slots=True, eq=False)
class Answer:
    """The texts of one request, while they grow.

    Args:
        wanted: The request.
        texts: Its texts.
        events: What happened to each text; the engine fills this queue.
    """

    wanted: Generation
    texts: list[AnswerText]
    events: asyncio.Queue[tuple[AnswerText, Event | Exception]]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        """Whether it answers a chat."""
        return isinstance(self.wanted, ChatRequest)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response: the number of new tokens, where it is below what was asked for."""
        cut = [text.order.max_tokens for text in self.texts if text.order.is_cut]
        return {"x-proxytune-max-tokens": str(min(cut))} if cut else {}

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
        num_reasoning = sum(text.num_reasoning for text in self.texts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": num_reused},
            "completion_tokens_details": {"reasoning_tokens": num_reasoning},
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
        self._named_by_id = replace(self.tokens, shows_ids=True)
        self._has_reasoning = has_reasoning(model.formats[0])
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
        return model_names(self.model.recipe, self.settings.name)

    def about(self) -> Json:
        """Return a description of the recipe and of what a request may ask for."""
        context = smallest_context(self.model.ensemble.members)
        longest = self.settings.max_prompt_tokens or (None if context is None else context - 1)
        limits = {
            "max_tokens": self.settings.max_tokens,
            "max_prompt_tokens": longest,
            "max_context": context,
            "max_logprobs": MAX_LOGPROBS,
            "max_explain_top": MAX_EXPLAIN_TOP,
        }
        base = self.model.formats[0]
        return about_recipe(self.model.recipe, self.settings.name, base=base, limits=limits)

    # Requests -------------------------------------------------------------------------------------------

    async def render(
        self,
        work: Callable[[ProxyTuned], Result],
        *,
        client: str,
        num_bytes: int,
        deadline: float,
    ) -> Result:
        """Return what `work` returns, which reads or renders in a thread of its own; see `rendering.py`.

        Args:
            work: What to do with a model that renders.
            client: As in `turns.py`.
            num_bytes: Size of the body that is read.
            deadline: Time on the monotonic clock at which to give up.

        Raises:
            TimeIsUp: The deadline has passed.
            Exception: What `work` raises.
        """
        rendering = self._rendering.run(client, num_bytes, work)
        try:
            return await asyncio.wait_for(rendering, deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise TimeIsUp from None

    def check_model(self, name: str) -> None:
        """Refuse a name that is not a model's.

        Raises:
            UnknownModel: There is no such model.
        """
        expert_named(self.model.recipe, self.settings.name, name)

    def orders(self, wanted: Generation, desk: ProxyTuned) -> list[Order]:
        """Return an order for each text that a request asks for; `desk` renders its prompts.

        Raises:
            UserError: A field cannot be honoured.
        """
        steering = self._steering(wanted)
        prompts: list[Any]
        if isinstance(wanted, ChatRequest):
            prompts = [[message.as_message() for message in wanted.messages]]
        else:
            assert isinstance(wanted, CompletionRequest)
            prompts = list(wanted.prompts)
        num_texts = len(prompts) * wanted.n
        max_texts = self.settings.max_waiting + self.settings.max_rows
        if num_texts > max_texts:
            raise InvalidRequest(
                f"the request asks for {num_texts} texts at once, and this server allows {max_texts}"
            )
        orders: list[Order] = []
        num_listed = 0
        for prompt in prompts:
            if not isinstance(prompt, str) and isinstance(prompt[0], int):
                self._check_length(len(prompt), self._max_prompt)
            request = Request(
                prompt,
                self._sampling(wanted, 1),
                explain=wanted.steering.explain,
                explain_top=wanted.steering.explain_top,
                chat=wanted.chat_options,
                **steering.as_options(),
            )
            job = desk.job(request)
            self._check_length(len(job.prompts[0]), self.settings.max_prompt_tokens)
            # Without a limit, an answer may be as long as the models and the server allow.
            room, asked = self._room(job), wanted.num_new
            limit = room if asked is None else min(asked, room)
            sampling = self._sampling(wanted, max(1, limit))
            job = replace(job, sampling=replace(sampling, stop=job.sampling.stop))
            scores = None
            if wanted.num_scored is not None:
                check_scored(desk.ensemble, job)
                scores = PromptScores(wanted.num_scored)
                num_listed += len(job.prompts[0]) * (1 + wanted.num_scored) * wanted.n
                _check_listed(num_listed)
            echo = _echo(wanted, prompt, job, desk.formats[0])
            for number in range(wanted.n):
                own = replace(job, sampling=_seeded(job.sampling, number))
                is_cut = asked is not None and asked > limit
                orders.append(
                    Order(
                        own,
                        echo,
                        scores,
                        limit,
                        is_cut,
                        self._splitter(wanted, job, desk.formats[0]),
                    )
                )
        return orders

    @staticmethod
    def _check_length(num_tokens: int, longest: int | None) -> None:
        if longest is not None and num_tokens > longest:
            raise PromptTooLong(
                f"the prompt has {num_tokens} tokens, and this server allows {longest}.\n"
                "hint: shorten the prompt"
            )

    def begin(
        self,
        wanted: Generation,
        orders: Sequence[Order],
        *,
        client: str,
        host: str,
        deadline: float,
    ) -> Answer:
        """Queue a request's jobs and return its answer. Call it in the event loop that reads the answer.

        Args:
            wanted: The request.
            orders: Its texts.
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
        for index, order in enumerate(orders):
            ticket = Ticket(order.job, lambda event: None, client, deadline, user)
            ticket.job = replace(order.job, cancelled=ticket.is_unwanted)
            ticket.scores, ticket.generates = order.scores, order.max_tokens > 0
            text = AnswerText(index, ticket, order)

            def forward(event: Event | Exception, text: AnswerText = text) -> None:
                # Counted here, because nobody reads the parts once the client has gone.
                if isinstance(event, Exception):
                    self.metrics.count_text(text.ticket, "failed")
                elif event.finish_reason is not None:
                    self.metrics.count_text(text.ticket, event.finish_reason)
                loop.call_soon_threadsafe(events.put_nowait, (text, event))

            ticket.on_event = forward
            texts.append(text)
        self.engine.submit([text.ticket for text in texts])
        return Answer(wanted, texts, events)

    def _steering(self, wanted: Generation) -> Steering:
        recipe, xargs = self.model.recipe, wanted.vllm_xargs
        expert = expert_named(recipe, self.settings.name, wanted.model or self.settings.name)
        if xargs is not None:
            check_keys(xargs)
        return steering_of(recipe, expert=expert, fields=wanted.proxytune, xargs=xargs)

    def _sampling(self, wanted: Generation, max_new_tokens: int) -> SamplingParams:
        """Return the library's settings for the API's fields; its defaults are the API's."""
        num_top: int | None
        if isinstance(wanted, ChatRequest):
            num_top = wanted.top_logprobs
        else:
            assert isinstance(wanted, CompletionRequest)
            num_top = wanted.logprobs
        return wanted.sampling(max_new_tokens, stops=wanted.stops, logprobs=num_top or None)

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
                owner.stopped_by = event.stopped_by
            text = event.tail if event.step is None else event.step.text
            steps = () if event.step is None else (event.step,)
            reasoning, splitter = "", owner.order.splitter
            if splitter is not None:
                is_last = event.finish_reason is not None
                owner.num_reasoning += splitter.is_inside and bool(steps)
                reasoning, text = splitter.push(text, is_last=is_last)
            offset = owner.num_chars if owner.has_begun else None
            owner.has_begun = True
            owner.num_chars += len(text)
            owner.num_steps += len(steps)
            yield AnswerPart(owner, text, steps, offset, reasoning)

    def whole(self, answer: Answer, parts: Sequence[AnswerPart]) -> Json:
        """Return the JSON of an answer that is not streamed."""
        choices = []
        for text in answer.texts:
            own = [part for part in parts if part.owner is text]
            content = text.order.echo.text + "".join(part.text for part in own)
            steps = tuple(step for part in own for step in part.steps)
            choice: Json = {"index": text.index, "finish_reason": text.finish_reason}
            if answer.is_chat:
                choice["message"] = {"role": "assistant", "content": content, "refusal": None}
                reasoning = "".join(part.reasoning for part in own)
                if reasoning and shows_reasoning(answer.wanted):
                    choice["message"]["reasoning_content"] = reasoning
            else:
                choice["text"] = content
                choice["prompt_logprobs"] = self._prompt_logprobs(answer.wanted, text)
                choice["prompt_token_ids"] = _prompt_ids(answer, text)
            choice["token_ids"] = _token_ids(answer, steps)
            choice["logprobs"] = self._logprobs(answer.wanted, text, steps, None)
            if answer.wanted.proxytune is not None:
                choice["proxytune"] = self.steered(answer, text, steps)
            choices.append(choice)
        whole = self._envelope(answer) | {"choices": choices, "usage": answer.usage}
        if answer.is_chat:
            whole["prompt_logprobs"] = self._prompt_logprobs(answer.wanted, answer.texts[0])
            whole["prompt_token_ids"] = _prompt_ids(answer, answer.texts[0])
        return whole

    def steered(self, answer: Answer, text: AnswerText, steps: Sequence[Step]) -> Json:
        """Return the field `proxytune` of a text: how it was steered, and its tokens if asked."""
        return {
            "alphas": dict(text.ticket.job.strengths),
            "seed": text.ticket.job.sampling.seed,
            "tokens": self.explained(answer, steps),
        }

    def first_chunks(self, answer: Answer) -> list[Json]:
        """Return the first chunks of a stream: the roles of a chat."""
        if not answer.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        chunks = [self._chunk(answer, {"index": t.index, "delta": delta}) for t in answer.texts]
        if answer.wanted.return_token_ids:
            chunks[0]["prompt_token_ids"] = _prompt_ids(answer, answer.texts[0])
        return chunks

    def chunk(self, answer: Answer, part: AnswerPart) -> Json | None:
        """Return the chunk that a part adds to a stream; None if it adds nothing."""
        text, content = part.owner, part.text
        if part.offset is None:
            content = text.order.echo.text + content
        reasoning = part.reasoning if shows_reasoning(answer.wanted) else ""
        logprobs = self._logprobs(answer.wanted, text, part.steps, part.offset)
        tokens = self.explained(answer, part.steps)
        token_ids = _token_ids(answer, part.steps)
        if not (content or reasoning or text.finish_reason or logprobs or tokens or token_ids):
            return None
        choice: Json = {"index": text.index}
        if answer.is_chat:
            delta = {"reasoning_content": reasoning, "content": content}
            choice["delta"] = {name: added for name, added in delta.items() if added}
        else:
            choice["text"] = content
        choice["logprobs"] = logprobs
        if tokens:
            choice["proxytune"] = {"tokens": tokens}
        if answer.wanted.return_token_ids:
            choice["token_ids"] = token_ids
            if part.offset is None and not answer.is_chat:
                choice["prompt_token_ids"] = _prompt_ids(answer, text)
        return self._chunk(answer, choice, text.finish_reason)

    def usage_chunk(self, answer: Answer) -> Json:
        """Return the last chunk of a stream whose request asked for `usage`."""
        return self._envelope(answer, ".chunk") | {"choices": [], "usage": answer.usage}

    def _chunk(self, answer: Answer, choice: Json, finish_reason: str | None = None) -> Json:
        whole = {"logprobs": None} | choice | {"finish_reason": finish_reason}
        chunk = self._envelope(answer, ".chunk") | {"choices": [whole]}
        options = answer.wanted.stream_options
        if options is not None and options.include_usage:
            chunk["usage"] = answer.usage if options.continuous_usage_stats else None
        return chunk

    def _envelope(self, answer: Answer, ending: str = "") -> Json:
        return {
            "id": f"{'chatcmpl' if answer.is_chat else 'cmpl'}-{answer.id}",
            "object": f"chat.completion{ending}" if answer.is_chat else "text_completion",
            "created": answer.created,
            "model": answer.wanted.model or self.settings.name,
            "system_fingerprint": f"proxytune-{version('proxytune')}",
        }

    def explained(self, answer: Answer, steps: Sequence[Step]) -> list[Json]:
        """Return what each model predicted for each token, if the request asked for it."""
        if answer.wanted.proxytune is None or not answer.wanted.proxytune.explain:
            return []
        return [explained(step, self.tokens) for step in steps]

    def _logprobs(
        self, wanted: Generation, text: AnswerText, steps: Sequence[Step], offset: int | None
    ) -> Json | None:
        """Return the `logprobs` of steps; those of the prompt come before them if `offset` is None."""
        tokens = self._named_by_id if wanted.return_tokens_as_token_ids else self.tokens
        if isinstance(wanted, ChatRequest):
            return chat_logprobs(steps, tokens) if wanted.logprobs and steps else None
        assert isinstance(wanted, CompletionRequest)
        if wanted.logprobs is None:
            return None
        echo, scores, found = text.order.echo, text.ticket.scores, None
        if steps:
            start = len(echo.text) + (offset or 0)
            found = completion_logprobs(steps, tokens, offset=start)
        if offset is None and wanted.echo and scores is not None:
            first = echoed_logprobs(echo, scores.tokens, tokens, num_top=wanted.logprobs)
            return joined_logprobs(first, found)
        return found

    def _prompt_logprobs(self, wanted: Generation, text: AnswerText) -> list[Json | None] | None:
        if wanted.prompt_logprobs is None:
            return None
        assert text.ticket.scores is not None
        scored = text.ticket.scores.tokens
        return prompt_logprobs(scored, self.tokens, num_top=wanted.prompt_logprobs)

    def _splitter(
        self, wanted: Generation, job: Job, base: PromptFormat
    ) -> ReasoningSplitter | None:
        """Return what tells the reasoning of a chat's answer apart; None if the base writes none."""
        if not (
            self._has_reasoning and isinstance(wanted, ChatRequest) and wanted.splits_reasoning
        ):
            return None
        begun = wanted.messages[-1].as_message()["content"] if wanted.continue_final_message else ""
        return ReasoningSplitter(opens_reasoning(job.prompts[0], base.tokenizer, begun=begun))


def _token_ids(answer: Answer, steps: Sequence[Step]) -> list[int] | None:
    """Return the token ids of steps, if the request asks for them."""
    return [step.token_id for step in steps] if answer.wanted.return_token_ids else None


def _prompt_ids(answer: Answer, text: AnswerText) -> list[int] | None:
    """Return the token ids of a text's prompt as the base reads it, if the request asks for them."""
    return list(text.ticket.job.prompts[0]) if answer.wanted.return_token_ids else None


def _check_listed(num_logprobs: int) -> None:
    """Refuse an answer with too many logprobs of prompt tokens."""
    if num_logprobs > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"the request asks for {num_logprobs:,} logprobs of prompt tokens or more, and this server lists "
            f"{MAX_PROMPT_LOGPROBS:,} in one answer.\nhint: send fewer prompts at once, or list fewer tokens"
        )


def shows_reasoning(wanted: Generation) -> bool:
    """Whether an answer reports the reasoning that is kept apart from its content."""
    return isinstance(wanted, ChatRequest) and wanted.include_reasoning


def _echo(wanted: Generation, prompt: Any, job: Job, base: PromptFormat) -> Echo:
    """Return what an answer shows of a prompt; `base` is how the base reads it."""
    text, is_scored = "", wanted.num_scored is not None
    if isinstance(wanted, ChatRequest):
        last = wanted.messages[-1]
        if wanted.echo and last.role == "assistant":
            text = last.as_message()["content"]
    elif isinstance(wanted, CompletionRequest) and wanted.echo:
        # The tokens that are scored are those of the prompt as the recipe's template writes it.
        is_as_sent = isinstance(prompt, str) and (base.text == "plain" or not is_scored)
        text = prompt if is_as_sent else base.tokenizer.decode(list(job.prompts[0]))
    if not is_scored:
        return Echo(text)
    token_ids = tuple(job.prompts[0])
    offsets = token_offsets(text, token_ids, base.tokenizer) if text else ()
    return Echo(text, token_ids, offsets)


def _seeded(sampling: SamplingParams, number: int) -> SamplingParams:
    """Return the settings for answer `number` to a prompt: each answer has a seed of its own.

    If no seed was given, one is drawn, so that a text can be generated again if its batch fails.
    """
    if sampling.is_greedy:
        return sampling
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return replace(sampling, seed=(seed + number) % 2**63)
