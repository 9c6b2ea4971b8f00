"""`ProxyTuned`: a recipe brought to life. Text goes in, steps and traces come out.

    model = ProxyTuned.load("my-recipe")
    print(model.generate("Once upon a time").text)

It renders prompts for each model, hands rows to `decode/batch.py`, and puts the events together again.
Files are `checkpoints/checkpoint.py`'s, arithmetic is `logits/steer.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from proxytune.backends.api.client import Budget
from proxytune.decode.batch import Batch, DraftCount, Event
from proxytune.decode.ensemble import Ensemble, Job, check_job
from proxytune.decode.lanes import Kept
from proxytune.decode.speculative import Drafting, Speculator
from proxytune.errors import (
    BackendError,
    InvalidRequest,
    ProxytuneError,
    UnsupportedModel,
)
from proxytune.loading.load import load_ensemble
from proxytune.measure.score import (
    SCORE_WINDOW,
    Passage,
    ScoreReport,
    explain_passage,
    score_passages,
    score_tokens,
    windows,
)
from proxytune.recipe.recipe import Recipe
from proxytune.request import Experts, Message, Prompt, Request, SamplingParams, Steering
from proxytune.text.detokenize import TextStream
from proxytune.text.prompts import (
    PLAIN_USER_TURN,
    ChatPrompt,
    PromptFormat,
    Tokenizer,
    continuation_ids,
    render,
)
from proxytune.text.vocab import align, token_bytes
from proxytune.trace import Step, Trace, Usage


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of a few answers a steered base prefers.

    Args:
        option: The likeliest.
        index: Its place among the options.
        probs: Of all options, in their order; they sum to 1. 0 for one that the base did not show.
        alphas: Strength of steering by expert.
        is_certified: Whether the base's full logits are proved to prefer the same; None where they were seen.
        usage: What calls to a base behind an API have cost.
    """

    option: str
    index: int
    probs: tuple[float, ...]
    alphas: Mapping[str, float]
    is_certified: bool | None = None
    usage: Usage | None = None


class ProxyTuned:
    """A base steered by experts.

    Most callers use `load`. The constructor takes ready parts, for instance toy backends in a test.

    Args:
        ensemble: The models.
        formats: How each of the ensemble's members wants its prompts, in the same order.
        recipe: Where experts are named and given their default strength.
    """

    def __init__(self, ensemble: Ensemble, formats: Sequence[PromptFormat], recipe: Recipe) -> None:
        self.ensemble = ensemble
        self.recipe = recipe
        self._formats = tuple(formats)
        self._speculators: dict[Drafting, Speculator] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer."""
        return self.ensemble.tokenizer

    @classmethod
    def load(
        cls,
        recipe: str | Path | Recipe,
        *,
        device: str | None = None,
        dtype: str | None = None,
        cuda_graphs: bool = False,
        experts: Sequence[str] | None = None,
        budget: Budget | None = None,
    ) -> ProxyTuned:
        """Check a recipe whole, then load its models.

        A small model that several experts share is loaded once, with all their adapters on it.

        Args:
            recipe: A directory, `package:NAME/PATH`, a Hub id, or a recipe already read.
            device: Runs every model there, whatever the recipe says.
            dtype: Runs every model in it, whatever the recipe says.
            cuda_graphs: Runs every model's short forwards as CUDA graphs, whatever the recipe says.
            experts: Load only these; None loads all.
            budget: What calls to a base behind an API may cost; None for no limit.

        Raises:
            RecipeError: The recipe is missing or malformed.
            UserError: A model is missing, unsafe, corrupt or does not match; see `errors.py`.
            ApiError: The API of the base cannot be reached.
        """
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
        recipe = recipe.with_settings(device=device, dtype=dtype, cuda_graphs=cuda_graphs or None)
        recipe = recipe.only(experts)
        return cls(*load_ensemble(recipe, budget), recipe)

    def job(self, request: Request, cancelled: Callable[[], bool] | None = None) -> Job:
        """Render a request for every model.

        Raises:
            UnknownExpert: It names an expert the recipe does not have.
            InvalidRequest: A prompt renders to nothing, or a token id does not exist.
            PromptTooLong: Prompt and new tokens exceed a model's context.
        """
        strengths = self.recipe.strengths(request.steering)
        if request.is_token_ids:
            token_ids = [i for i in request.prompt if isinstance(i, int)]
            self.ensemble.vocabulary.check_token_ids(token_ids)
            prompts: tuple[Sequence[int], ...] = tuple(
                m.own_ids(token_ids, is_start=True) for m in self.ensemble.members
            )
        else:
            # Experts on one small model read the same; a long prompt takes a while to tokenise.
            known: dict[tuple[str, int], Sequence[int]] = {}
            rendered = []
            for member, own in zip(self.ensemble.members, self._formats, strict=True):
                key = own.prompt_format, id(own.tokenizer)
                if key not in known:
                    known[key] = render(
                        request.prompt,
                        prompt_format=own.prompt_format,
                        tokenizer=own.tokenizer,
                        name=member.name,
                    )
                rendered.append(known[key])
            if self.recipe.base.api is not None:
                rendered[0] = ChatPrompt.of(rendered[0], request.prompt)
            prompts = tuple(rendered)
        alphas = tuple(strengths.get(pair.name) for pair in self.ensemble.pairs)
        job = Job(
            request.sampling,
            prompts,
            alphas,
            request.explain,
            request.explain_top,
            cancelled,
            strengths,
        )
        check_job(self.ensemble, job)
        return job

    def generate(
        self,
        prompt: Prompt | Request,
        sampling: SamplingParams | None = None,
        *,
        alpha: float | None = None,
        experts: Experts | None = None,
        explain: bool = False,
        cancelled: Callable[[], bool] | None = None,
        speculative: bool | Drafting = False,
    ) -> Trace:
        """Generate one answer and return its trace.

        Args:
            prompt: Text, messages or token ids; or a whole `Request`, which then says everything.
            sampling: How tokens are chosen; greedy, 128 tokens, unless said.
            alpha: Strength of steering; None takes the recipe's.
            experts: A name, names, or names with strengths; None takes the recipe's default.
            explain: Record what each model gave each token.
            cancelled: Asked once a step; True ends the generation with what is there.
            speculative: Draft tokens and verify several at once: the same text, sooner where it pays. True
                for `Drafting()`, which adapts to measured costs.

        Raises:
            UserError: The request cannot be honoured; see `job`.
            BackendError: A model failed.
        """
        request = as_request(prompt, sampling, Steering(alpha, experts), explain=explain)
        return self.generate_batch([request], cancelled=cancelled, speculative=speculative)[0]

    def generate_batch(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 8,
        on_event: Callable[[int, Event], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        speculative: bool | Drafting = False,
    ) -> list[Trace]:
        """Generate many answers, up to `batch_size` at a time, in the order of the requests.

        Every request is checked before the first is run. A result does not depend on its neighbours.

        Args:
            requests: What to generate.
            batch_size: Rows per forward.
            on_event: Called with the request's index and each event as it happens.
            cancelled: Asked once a step; True ends all that still runs.
            speculative: As in `generate`.

        Raises:
            UserError: A request cannot be honoured; see `job`.
            BackendError: A model failed.
        """
        if batch_size < 1:
            raise InvalidRequest(f"batch_size is {batch_size}, and must be at least 1")
        jobs = [self.job(request, cancelled) for request in requests]
        traces: list[Trace] = []
        for start in range(0, len(jobs), batch_size):
            block = jobs[start : start + batch_size]
            collectors = [_Collector(job) for job in block]
            try:
                for event in self._run(block, collectors, self._speculator(speculative)):
                    collectors[event.row].add(event)
                    if on_event is not None:
                        on_event(start + event.row, event)
            except ProxytuneError as error:
                told = (
                    self._told(collector.trace(), job)
                    for collector, job in zip(collectors, block, strict=True)
                )
                error.traces = (*traces, *told)
                raise
            traces += [
                self._told(collector.trace(), job)
                for collector, job in zip(collectors, block, strict=True)
            ]
        return traces

    def explain(
        self,
        prompt: Prompt,
        continuation: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        alpha: float | None = None,
        experts: Experts | None = None,
        top: int = 5,
    ) -> Trace:
        """Say what each model gives each token of a given continuation, and perhaps go on from there.

        Every model reads the continuation at once, in the format that the recipe gives its prompt.

        Args:
            prompt: Text, messages or token ids.
            continuation: Text that follows the prompt as it is, or token ids of the base's vocabulary.
            sampling: How to go on after it; None ends there. Penalties and a seed's draws begin anew.
            alpha: Strength of steering; None takes the recipe's.
            experts: A name, names, or names with strengths; None takes the recipe's default.
            top: How many of each model's likeliest tokens to record.

        Returns:
            A trace whose first `num_given` steps are the continuation's.

        Raises:
            InvalidRequest: The continuation has no tokens, or unknown ones.
            UnsupportedModel: The base is behind an API, which does not show what this needs.
            UserError: The request cannot be honoured; see `job`.
        """
        if isinstance(continuation, str):
            given = continuation_ids(continuation, self.tokenizer)
        else:
            given = list(continuation)
            self.ensemble.vocabulary.check_token_ids(given)
        if not given:
            raise InvalidRequest("the continuation has no tokens, so there is nothing to explain")
        if self.recipe.base.api is not None:
            raise UnsupportedModel(
                "a given text is explained from all the base's logits, and a base behind an API shows few.\n"
                "hint: let it generate the text: leave the continuation out"
            )
        if sampling is not None and self.ensemble.policy.has_positions:
            raise InvalidRequest(
                "the recipe's strength follows a schedule of positions, which would begin anew after the "
                "given tokens.\nhint: explain the continuation alone, or a recipe without a schedule"
            )
        num_new = 0 if sampling is None else sampling.max_new_tokens
        limits = SamplingParams(max_new_tokens=len(given) + num_new)
        job = self.job(Request(prompt, limits, alpha, experts, True, top))
        started = time.perf_counter()
        text = TextStream(self.tokenizer, prompt_ids=job.prompts[0])
        passage = Passage(tuple(tuple(ids) for ids in job.prompts), tuple(given))
        explained = explain_passage(self.ensemble, passage, alphas=job.alphas, num_top=job.num_top)
        steps = [replace(step, text=text.push(step.token_id)) for step in explained]
        if sampling is None:
            trace = Trace(
                "".join(step.text for step in steps) + text.finish(),
                "given",
                tuple(steps),
                len(job.prompts[0]),
                alphas=job.strengths,
            )
        else:
            prompts = tuple(
                [*prompt_ids, *member.own_ids(given)]
                for member, prompt_ids in zip(self.ensemble.members, job.prompts, strict=True)
            )
            further = replace(job, prompts=prompts, sampling=sampling)
            collector = _Collector(further)
            for event in self._run([further], [collector], None):
                collector.add(event)
            trace = collector.trace()
            # A character that was given by half is completed by the text that follows.
            trace = replace(
                trace,
                text="".join(step.text for step in steps) + trace.text,
                steps=(*steps, *(replace(s, index=s.index + len(steps)) for s in trace.steps)),
                num_prompt_tokens=len(job.prompts[0]),
            )
        trace = replace(trace, num_given=len(steps), latency_s=time.perf_counter() - started)
        return self._told(trace, job)

    def _told(self, trace: Trace, job: Job) -> Trace:
        """Return a trace with what its tokens stand for, if it is explained."""
        if not job.records_views:
            return trace
        named = {step.token_id for step in trace.steps}
        for step in trace.steps:
            named |= {token_id for token_id, _ in step.top}
            for view in (step.views or {}).values():
                named |= {token_id for token_id, _ in view.top}
        contents = self._token_bytes
        tokens = {i: _text_or_bytes(contents[i]) for i in sorted(named) if i in contents}
        special = {*self.tokenizer.all_special_ids, *self.ensemble.eos_token_ids}
        return replace(
            trace,
            prompt=self.tokenizer.decode(
                list(job.prompts[0]), skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
            tokens=tokens,
            special_ids=tuple(i for i in tokens if i in special),
        )

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        return token_bytes(self.ensemble.vocabulary)

    def choose(
        self,
        prompt: Prompt,
        options: Sequence[str],
        *,
        alpha: float | None = None,
        experts: Experts | None = None,
    ) -> Choice:
        """Say which of a few answers the steered base would begin with.

        Only the first token of each answer counts, and each must begin with another: letters of a
        multiple-choice question do, as in the experiment with GPT-3.5 (Liu et al. 2024, section 5). A base
        behind an API is asked once, and about answers that it does not show.

        Args:
            prompt: Text, messages or token ids.
            options: The answers, as they would follow the prompt: " A" where a space comes before it.
            alpha: Strength of steering; None takes the recipe's.
            experts: A name, names, or names with strengths; None takes the recipe's default.

        Raises:
            InvalidRequest: There are fewer than two options, or two begin with the same token.
            UserError: The request cannot be honoured; see `job`.
            BackendError: A model failed.
        """
        token_ids = [continuation_ids(option, self.tokenizer)[:1] for option in options]
        first = [ids[0] for ids in token_ids if ids]
        if len(options) < 2 or len(set(first)) < len(options):
            raise InvalidRequest(
                f"the options {', '.join(map(repr, options))} are not two or more that begin with different "
                "tokens.\nhint: let them begin with letters, and list in the prompt what these stand for"
            )
        job = self.job(Request(prompt, SamplingParams(max_new_tokens=1), alpha, experts))
        batch = Batch(self.ensemble, [job])
        logits, is_certified = batch.first_logits(first)
        if bool(torch.isneginf(logits).all()):
            raise BackendError(
                "none of the options is among the tokens that the base shows, and it cannot be asked about "
                "them.\nhint: a larger top_logprobs shows more; say in the prompt which answers are wanted"
            )
        probs: list[float] = logits.softmax(-1).tolist()
        best = max(range(len(options)), key=probs.__getitem__)
        has_all = self.recipe.base.api is None
        return Choice(
            options[best],
            best,
            tuple(probs),
            job.strengths,
            None if has_all else is_certified,
            batch.usage(0),
        )

    def stream(
        self,
        prompt: Prompt | Request,
        sampling: SamplingParams | None = None,
        *,
        alpha: float | None = None,
        experts: Experts | None = None,
        explain: bool = False,
        speculative: bool | Drafting = False,
    ) -> Iterator[Step]:
        """Generate one answer and yield its steps as they are made; close the iterator to stop.

        The steps' texts joined are the text that `generate` gives. Arguments and errors are those of
        `generate`; they are checked before this returns.
        """
        request = as_request(prompt, sampling, Steering(alpha, experts), explain=explain)
        return self._steps(self.job(request), self._speculator(speculative), _Memory())

    def _steps(self, job: Job, speculator: Speculator | None, memory: _Memory) -> Iterator[Step]:
        """Yield a job's steps, going on from what `memory` holds, and leave there what the models read."""
        kept, memory.kept = memory.kept, None
        batch = Batch(self.ensemble, [job], speculator=speculator, kept=kept)
        while not batch.is_done:
            yield from (event.step for event in batch.step() if event.step is not None)
        memory.kept = batch.kept()

    def chat(
        self,
        sampling: SamplingParams | None = None,
        *,
        system: str | None = None,
        alpha: float | None = None,
        experts: Experts | None = None,
        speculative: bool | Drafting = False,
    ) -> Conversation:
        """Begin a conversation that remembers its turns; what the models have read is not read again."""
        sampling = sampling or SamplingParams()
        return Conversation(self, sampling, system, Steering(alpha, experts), speculative)

    def score(
        self,
        text: str,
        alphas: Sequence[float] = (0.0, 0.5, 1.0),
        *,
        experts: str | tuple[str, ...] | None = None,
        window: int = SCORE_WINDOW,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> ScoreReport:
        """Measure how well base, expert, anti-expert and steered base predict a text.

        Every model sees the plain text, whatever prompt format the recipe gives it. Each runs once for
        all strengths.

        Args:
            text: What to predict.
            alphas: Strengths of the steered rows; each is given to every chosen expert.
            experts: Which experts steer; None takes the recipe's default.
            window: Tokens per window.
            seed: Of the bootstrap.
            on_progress: Called with tokens done and tokens in all.

        Raises:
            InvalidRequest: The text has nothing to predict, or a strength is not finite.
            UnknownExpert: It names an expert the recipe does not have.
            PromptTooLong: The window exceeds a model's context.
        """
        ensemble = self.steered_by(experts)
        return score_tokens(
            ensemble,
            self._text_ids(text),
            strengths=[(alpha, (alpha,) * len(ensemble.pairs)) for alpha in alphas],
            window=window,
            start_id=self._start_id,
            seed=seed,
            on_progress=on_progress,
        )

    def steered_by(self, experts: str | Sequence[str] | None) -> Ensemble:
        """Return the ensemble with these experts only; None takes the recipe's default.

        Raises:
            UnknownExpert: It names an expert the recipe does not have.
        """
        names = self.recipe.named(experts)
        pairs = tuple(p for p in self.ensemble.pairs if p.name in names)
        return replace(self.ensemble, pairs=pairs)

    def text_passages(self, text: str, *, window: int = SCORE_WINDOW) -> list[Passage]:
        """Cut a plain text into windows, as `score` does.

        Raises:
            InvalidRequest: The text has nothing to predict.
        """
        return windows(self.ensemble, self._text_ids(text), window=window, start_id=self._start_id)

    def _text_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    @property
    def _start_id(self) -> int | None:
        """The token that the base's tokenizer puts before a text, if it does."""
        with_start = self.tokenizer.encode("a", add_special_tokens=True)
        return with_start[0] if with_start[0] == _bos_id(self.tokenizer) else None

    def score_completions(
        self,
        pairs: Sequence[tuple[Prompt, str]],
        alphas: Sequence[float] = (0.0, 0.5, 1.0),
        *,
        experts: str | tuple[str, ...] | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> ScoreReport:
        """Measure how well base, expert, anti-expert and steered base predict given answers to prompts.

        Every model sees the prompts in its own format, as `generate` would show them; the token that ends a
        text is part of each answer.

        Args:
            pairs: Prompts and their answers. What exceeds a context or `max_tokens` is cut off an answer's
                end; a pair with nothing left is skipped.
            alphas: Strengths of the steered rows; each is given to every chosen expert.
            experts: Which experts steer; None takes the recipe's default.
            max_tokens: Longest prompt and answer together; None for the smallest context.
            seed: Of the bootstrap.
            on_progress: Called with tokens done and tokens in all.

        Raises:
            InvalidRequest: No pair has anything to predict, or a strength is not finite.
            UnknownExpert: It names an expert the recipe does not have.
            PromptFormatError: A prompt cannot be rendered.
        """
        ensemble = self.steered_by(experts)
        return score_passages(
            ensemble,
            self.completion_passages(pairs, max_tokens=max_tokens),
            strengths=[(alpha, (alpha,) * len(ensemble.pairs)) for alpha in alphas],
            seed=seed,
            on_progress=on_progress,
        )

    def completion_passages(
        self, pairs: Sequence[tuple[Prompt, str]], *, max_tokens: int | None = None
    ) -> list[Passage]:
        """Return prompts with given answers as each model sees them; see `score_completions`."""
        contexts = [m.backend.capabilities.max_context for m in self.ensemble.members]
        limit = min([n for n in (*contexts, max_tokens) if n is not None], default=None)
        passages = []
        for prompt, answer in pairs:
            prompts = tuple(
                tuple(
                    render(
                        prompt, prompt_format=f.prompt_format, tokenizer=f.tokenizer, name=m.name
                    )
                )
                for m, f in zip(self.ensemble.members, self._formats, strict=True)
            )
            token_ids = continuation_ids(answer, self.tokenizer)
            if self.tokenizer.eos_token_id is not None:
                token_ids.append(self.tokenizer.eos_token_id)
            if limit is not None:
                token_ids = token_ids[: max(0, limit - max(map(len, prompts)))]
            if token_ids:
                passages.append(Passage(prompts, tuple(token_ids)))
        return passages

    @property
    def formats(self) -> tuple[PromptFormat, ...]:
        """How each of the ensemble's members wants its prompts, in the same order."""
        return self._formats

    def alone(self, member: int) -> ProxyTuned:
        """Return one of the ensemble's models by itself: what it writes, in its own prompt format, unsteered.

        Its weights are shared with this one. It speaks the base's vocabulary, or another one of its own.
        """
        alone = self.ensemble.members[member]
        ensemble = replace(self.ensemble, members=(alone,), pairs=())
        if (translation := alone.backend.translation) is not None:
            own = translation.own
            ensemble = replace(
                ensemble,
                members=(
                    replace(
                        alone,
                        backend=translation.inner,
                        alignment=align(own.vocabulary, own.vocabulary),
                    ),
                ),
                vocabulary=own.vocabulary,
                eos_token_ids=tuple(own.eos_token_ids),
                tokenizer=own.tokenizer,
            )
        return ProxyTuned(ensemble, (self._formats[member],), self.recipe)

    def _speculator(self, speculative: bool | Drafting) -> Speculator | None:
        """Return what remembers measured costs for these settings; None for plain decoding."""
        if speculative is False:
            return None
        drafting = Drafting() if speculative is True else speculative
        return self._speculators.setdefault(drafting, Speculator(drafting))

    def _run(
        self,
        jobs: Sequence[Job],
        collectors: Sequence[_Collector],
        speculator: Speculator | None,
    ) -> Iterator[Event]:
        batch = Batch(self.ensemble, jobs, speculator=speculator)
        for collector, seed in zip(collectors, batch.seeds, strict=True):
            collector.seed = seed
        try:
            while not batch.is_done:
                yield from batch.step()
        finally:
            for row, collector in enumerate(collectors):
                counts = batch.draft_counts.get(row, DraftCount(0, 0))
                collector.num_drafted, collector.num_accepted = counts
                collector.usage = batch.usage(row)


def _text_or_bytes(content: bytes) -> str | bytes:
    try:
        return content.decode()
    except UnicodeDecodeError:  # half a character
        return content


@dataclass(slots=True)
class _Memory:
    """What the models of a conversation have read."""

    kept: Kept | None = None


class _Collector:
    """Gathers the events of one row into a trace."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._started = self._ended = time.perf_counter()
        self._steps: list[Step] = []
        self._tail = ""
        self._event: Event | None = None
        self.seed: int | None = None
        self.num_drafted = 0
        self.num_accepted = 0
        self.usage: Usage | None = None

    def add(self, event: Event) -> None:
        if event.step is not None:
            self._steps.append(event.step)
        self._tail = event.tail
        self._event = event
        self._ended = time.perf_counter()

    def trace(self) -> Trace:
        """Return the trace of what was added; without an end to it, something failed."""
        return Trace(
            text="".join(step.text for step in self._steps) + self._tail,
            finish_reason=(self._event and self._event.finish_reason) or "failed",
            steps=tuple(self._steps),
            num_prompt_tokens=len(self._job.prompts[0]),
            alphas=self._job.strengths,
            seed=self.seed,
            latency_s=self._ended - self._started,
            num_drafted=self.num_drafted,
            num_accepted=self.num_accepted,
            usage=self.usage,
        )


class Conversation:
    """A chat with a steered model: `say` answers and remembers.

    `alpha`, `experts` and `sampling` may be changed between turns.
    """

    def __init__(
        self,
        model: ProxyTuned,
        sampling: SamplingParams,
        system: str | None,
        steering: Steering,
        speculative: bool | Drafting = False,
    ) -> None:
        self._model = model
        self._speculative = speculative
        self._memory = _Memory()
        self.sampling = sampling
        self.alpha, self.experts = steering.alpha, steering.experts
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> Iterator[Step]:
        """Yield the steps of the answer to `text`; what was answered until then is remembered.

        Raises:
            UserError: The request cannot be honoured; the turn is then not remembered.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        sampling = self.sampling
        if self._model.recipe.base.prompt == "plain":
            # A base without a chat format writes the user's next turn too, if it is let.
            sampling = replace(sampling, stop=(*sampling.stop, PLAIN_USER_TURN))
        model = self._model
        request = Request(messages, sampling, self.alpha, self.experts)
        speculator = model._speculator(self._speculative)
        steps = model._steps(model.job(request), speculator, self._memory)
        return self._answer(messages, steps)

    def _answer(self, messages: list[Message], steps: Iterator[Step]) -> Iterator[Step]:
        answer = ""
        try:
            for step in steps:
                answer += step.text
                yield step
        finally:
            self.messages = [*messages, {"role": "assistant", "content": answer.strip()}]


def as_request(
    prompt: Prompt | Request,
    sampling: SamplingParams | None,
    steering: Steering,
    *,
    explain: bool,
) -> Request:
    """Return the request that the arguments describe.

    Raises:
        InvalidRequest: A whole request and further settings were both given.
    """
    if not isinstance(prompt, Request):
        return Request(
            prompt, sampling or SamplingParams(), steering.alpha, steering.experts, explain
        )
    if sampling is not None or steering != Steering() or explain:
        raise InvalidRequest(
            "a whole Request was given and settings beside it, so it is unclear which of them hold.\n"
            "hint: put the settings into the Request"
        )
    return prompt


def _bos_id(tokenizer: Tokenizer) -> int | None:
    bos = getattr(tokenizer, "bos_token", None)
    return None if bos is None else tokenizer.get_vocab().get(bos)
