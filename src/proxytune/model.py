"""`ProxyTuned`: a recipe brought to life. Text goes in, steps and traces come out.

    model = ProxyTuned.load("my-recipe")
    print(model.generate("Once upon a time").text)

It renders prompts for each model, hands rows to `decode.py`, and puts the events together again. Files are
`checkpoint.py`'s, arithmetic is `steer.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from proxytune.backends.api_client import Budget
from proxytune.backends.base import Backend
from proxytune.decode import Batch, Ensemble, Event, Job, Kept, Member, Pair, check_job
from proxytune.errors import BackendError, InvalidRequest, ProxytuneError
from proxytune.prompts import PLAIN_USER_TURN, ChatPrompt, Tokenizer, continuation_ids, render
from proxytune.recipe import ModelSpec, Recipe
from proxytune.request import Message, Prompt, Request, SamplingParams
from proxytune.score import Passage, ScoreReport, score_passages, score_tokens
from proxytune.speculative import Drafting, Speculator
from proxytune.trace import Step, Trace, Usage
from proxytune.vocab import align


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How one member wants its prompts."""

    prompt_format: str
    tokenizer: Tokenizer


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
        experts: Sequence[str] | None = None,
        budget: Budget | None = None,
    ) -> ProxyTuned:
        """Check a recipe whole, then load its models.

        A small model that several experts share is loaded once, with all their adapters on it.

        Args:
            recipe: A directory, `package:NAME/PATH`, a Hub id, or a recipe already read.
            device: Runs every model there, whatever the recipe says.
            dtype: Runs every model in it, whatever the recipe says.
            experts: Load only these; None loads all.
            budget: What calls to a base behind an API may cost; None for no limit.

        Raises:
            RecipeError: The recipe is missing or malformed.
            UserError: A model is missing, unsafe, corrupt or does not match; see `errors.py`.
            ApiError: The API of the base cannot be reached.
        """
        from proxytune.backends.api import ApiBackend
        from proxytune.backends.llama_cpp import LlamaCppBackend
        from proxytune.backends.transformers import TransformersBackend
        from proxytune.checkpoint import AdapterFiles, Checkpoint, find_adapter, find_checkpoint
        from proxytune.doctor import examine

        recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
        recipe = recipe.with_settings(device=device, dtype=dtype)
        if experts is not None:
            recipe.choose(tuple(experts), None)
            kept = tuple(e for e in recipe.experts if e.name in experts)
            default = recipe.default_expert if recipe.default_expert in experts else None
            recipe = replace(recipe, experts=kept, default_expert=default)
        examine(recipe).raise_first()

        checkpoints: dict[ModelSpec, Checkpoint] = {}
        adapters: dict[ModelSpec, dict[str, AdapterFiles]] = {}
        slots: list[tuple[str, ModelSpec, str | None, str]] = []

        def slot(name: str, spec: ModelSpec) -> int:
            """Return the index of the member that runs `spec`, a new one unless an equal one is there."""
            if spec.same_as is not None:
                return 0
            weights = spec.weights
            if weights not in checkpoints:
                # Of a base behind an API nothing is here but a tokenizer that speaks for it.
                local = weights if spec.api is None else recipe.base_tokenizer
                checkpoints[weights] = find_checkpoint(
                    local.model or "",
                    root=recipe.directory,
                    revision=local.revision,
                    trust_remote_code=local.trust_remote_code,
                    allow_pickle=local.allow_pickle,
                )
                adapters[weights] = {}
            adapter: str | None = None
            if spec.adapter is not None:
                files = find_adapter(
                    spec.adapter, root=recipe.directory, allow_pickle=spec.allow_pickle
                )
                known = adapters[weights]
                adapter = next((k for k, v in known.items() if v.path == files.path), None)
                if adapter is None:
                    # The number keeps experts "a.b" and "a_b" apart: adapters' names hold no dots.
                    adapter = f"{name.replace('.', '_')}_{len(known)}"
                    known[adapter] = files
            for index, (_, other, other_adapter, prompt) in enumerate(slots):
                if (other, other_adapter, prompt) == (weights, adapter, spec.prompt):
                    return index
            slots.append((name, weights, adapter, spec.prompt))
            return len(slots) - 1

        slot("base", recipe.base)
        pairs = tuple(
            Pair(
                e.name,
                slot(f"{e.name}.expert", e.expert),
                slot(f"{e.name}.anti_expert", e.anti_expert),
            )
            for e in recipe.experts
        )
        backends: dict[ModelSpec, Backend[Any]] = {}
        for spec, checkpoint in checkpoints.items():
            if spec.api is not None:
                backends[spec] = ApiBackend.load(spec, checkpoint, budget=budget)
                continue
            kind = TransformersBackend if spec.llama_cpp is None else LlamaCppBackend
            backends[spec] = kind.load(checkpoint, spec, adapters[spec])
        base = checkpoints[slots[0][1]]
        members, formats = [], []
        for name, weights, adapter, prompt in slots:
            checkpoint = checkpoints[weights]
            members.append(
                Member(
                    name if weights.model == name else f"{name} ({weights.model})",
                    backends[weights],
                    align(base.vocabulary, checkpoint.vocabulary),
                    adapter,
                )
            )
            formats.append(PromptFormat(prompt, checkpoint.tokenizer))
        ensemble = Ensemble(
            tuple(members), pairs, base.vocabulary, tuple(base.eos_token_ids), base.tokenizer
        )
        return cls(ensemble, formats, recipe)

    def job(self, request: Request, cancelled: Callable[[], bool] | None = None) -> Job:
        """Render a request for every model.

        Raises:
            UnknownExpert: It names an expert the recipe does not have.
            InvalidRequest: A prompt renders to nothing, or a token id does not exist.
            PromptTooLong: Prompt and new tokens exceed a model's context.
        """
        chosen = self.recipe.choose(request.experts, request.alpha)
        if request.is_token_ids:
            token_ids = [i for i in request.prompt if isinstance(i, int)]
            self.ensemble.vocabulary.check_token_ids(token_ids)
            ids = torch.tensor(token_ids)
            prompts: tuple[Sequence[int], ...] = tuple(
                m.alignment.ids_to_small(ids).tolist() for m in self.ensemble.members
            )
        else:
            rendered: list[Sequence[int]] = [
                render(
                    request.prompt,
                    prompt_format=f.prompt_format,
                    tokenizer=f.tokenizer,
                    name=m.name,
                )
                for m, f in zip(self.ensemble.members, self._formats, strict=True)
            ]
            if self.recipe.base.api is not None:
                rendered[0] = ChatPrompt.of(rendered[0], request.prompt)
            prompts = tuple(rendered)
        alphas = tuple(chosen.get(pair.name, 0.0) for pair in self.ensemble.pairs)
        job = Job(request.sampling, prompts, alphas, request.explain, cancelled)
        check_job(self.ensemble, job)
        return job

    def generate(
        self,
        prompt: Prompt | Request,
        sampling: SamplingParams | None = None,
        *,
        alpha: float | None = None,
        experts: str | tuple[str, ...] | Mapping[str, float] | None = None,
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
        request = as_request(prompt, sampling, alpha=alpha, experts=experts, explain=explain)
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
            collectors = [
                _Collector(job, self.recipe.choose(request.experts, request.alpha))
                for job, request in zip(block, requests[start:], strict=False)
            ]
            try:
                for event in self._run(block, collectors, self._speculator(speculative)):
                    collectors[event.row].add(event)
                    if on_event is not None:
                        on_event(start + event.row, event)
            except ProxytuneError as error:
                error.traces = (*traces, *(collector.trace() for collector in collectors))
                raise
            traces += [collector.trace() for collector in collectors]
        return traces

    def choose(
        self,
        prompt: Prompt,
        options: Sequence[str],
        *,
        alpha: float | None = None,
        experts: str | tuple[str, ...] | Mapping[str, float] | None = None,
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
            self.recipe.choose(experts, alpha),
            None if has_all else is_certified,
            batch.usages()[0],
        )

    def stream(
        self,
        prompt: Prompt | Request,
        sampling: SamplingParams | None = None,
        *,
        alpha: float | None = None,
        experts: str | tuple[str, ...] | Mapping[str, float] | None = None,
        explain: bool = False,
        speculative: bool | Drafting = False,
    ) -> Iterator[Step]:
        """Generate one answer and yield its steps as they are made; close the iterator to stop.

        The steps' texts joined are the text that `generate` gives. Arguments and errors are those of
        `generate`; they are checked before this returns.
        """
        request = as_request(prompt, sampling, alpha=alpha, experts=experts, explain=explain)
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
        experts: str | tuple[str, ...] | Mapping[str, float] | None = None,
        speculative: bool | Drafting = False,
    ) -> Conversation:
        """Begin a conversation that remembers its turns; what the models have read is not read again."""
        sampling = sampling or SamplingParams()
        return Conversation(self, sampling, system, alpha, experts, speculative)

    def score(
        self,
        text: str,
        alphas: Sequence[float] = (0.0, 0.5, 1.0),
        *,
        experts: str | tuple[str, ...] | None = None,
        window: int = 512,
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
        chosen = self.recipe.choose(experts, None)
        pairs = tuple(p for p in self.ensemble.pairs if p.name in chosen)
        ensemble = replace(self.ensemble, pairs=pairs)
        token_ids = list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []
        with_start = self.tokenizer.encode("a", add_special_tokens=True)
        start_id = with_start[0] if with_start[0] == _bos_id(self.tokenizer) else None
        return score_tokens(
            ensemble,
            token_ids,
            strengths=[(alpha, (alpha,) * len(pairs)) for alpha in alphas],
            window=window,
            start_id=start_id,
            seed=seed,
            on_progress=on_progress,
        )

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
        chosen = self.recipe.choose(experts, None)
        kept = tuple(p for p in self.ensemble.pairs if p.name in chosen)
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
        return score_passages(
            replace(self.ensemble, pairs=kept),
            passages,
            strengths=[(alpha, (alpha,) * len(kept)) for alpha in alphas],
            seed=seed,
            on_progress=on_progress,
        )

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
            for collector, counts, usage in zip(
                collectors, batch.draft_counts, batch.usages(), strict=True
            ):
                collector.num_drafted, collector.num_accepted = counts
                collector.usage = usage


@dataclass(slots=True)
class _Memory:
    """What the models of a conversation have read."""

    kept: Kept | None = None


class _Collector:
    """Gathers the events of one row into a trace."""

    def __init__(self, job: Job, chosen: Mapping[str, float]) -> None:
        self._job = job
        self._chosen = chosen
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
            alphas=self._chosen,
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
        alpha: float | None,
        experts: str | tuple[str, ...] | Mapping[str, float] | None,
        speculative: bool | Drafting = False,
    ) -> None:
        self._model = model
        self._speculative = speculative
        self._memory = _Memory()
        self.sampling = sampling
        self.alpha = alpha
        self.experts = experts
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
    *,
    alpha: float | None,
    experts: str | tuple[str, ...] | Mapping[str, float] | None,
    explain: bool,
) -> Request:
    """Return the request that the arguments describe.

    Raises:
        InvalidRequest: A whole request and further settings were both given.
    """
    if not isinstance(prompt, Request):
        return Request(prompt, sampling or SamplingParams(), alpha, experts, explain)
    if sampling is not None or alpha is not None or experts is not None or explain:
        raise InvalidRequest(
            "a whole Request was given and settings beside it, so it is unclear which of them hold.\n"
            "hint: put the settings into the Request"
        )
    return prompt


def _bos_id(tokenizer: Tokenizer) -> int | None:
    bos = getattr(tokenizer, "bos_token", None)
    return None if bos is None else tokenizer.get_vocab().get(bos)
