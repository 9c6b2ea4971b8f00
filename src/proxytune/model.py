"""`ProxyTuned`: a loaded recipe. Prompts go in, steps and traces come out.

    model = ProxyTuned.load("my-recipe")
    print(model.generate("Once upon a time").text)

It checks requests and renders their prompts for each model. Models are loaded in `loading/load.py`, tokens
are generated in `decode/batch.py`, and the formula is `logits/steer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from proxytune.backends.api.client import Budget
from proxytune.decode.batch import Batch, Event
from proxytune.decode.collect import Collector, run, with_token_texts
from proxytune.decode.ensemble import Ensemble, Job, alone, check_job
from proxytune.decode.lanes import Kept
from proxytune.decode.speculative import Drafting, Speculator
from proxytune.errors import InvalidRequest, ProxytuneError, UnsupportedModel
from proxytune.grants import Grants
from proxytune.loading.load import load_ensemble
from proxytune.measure.given import Choice, choose, first_tokens, trace_given
from proxytune.measure.score import (
    SCORE_WINDOW,
    Passage,
    ScoreReport,
    score_passages,
    smallest_context,
    windows,
)
from proxytune.policy import Policy, PolicySettings
from proxytune.recipe.recipe import Recipe
from proxytune.request import (
    ChatOptions,
    Experts,
    Message,
    Prompt,
    Request,
    SamplingParams,
    Steering,
)
from proxytune.text.prompts import (
    PLAIN_USER_TURN,
    ChatPrompt,
    PromptFormat,
    Tokenizer,
    continuation_ids,
    render_each,
    start_id,
    text_ids,
)
from proxytune.text.turns import Turns
from proxytune.text.vocab import token_bytes
from proxytune.trace import Step, Trace


class ProxyTuned:
    """A base steered by experts.

    Most callers use `load`. The constructor takes ready parts, such as toy backends in a test.

    Args:
        ensemble: The models.
        formats: How each of the ensemble's members reads prompts, in the same order.
        recipe: The names of the experts and their default strengths.
    """

    def __init__(self, ensemble: Ensemble, formats: Sequence[PromptFormat], recipe: Recipe) -> None:
        self.ensemble = ensemble
        self.recipe = recipe
        self.formats = tuple(formats)
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
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        key_env: str | None = None,
        exact: bool = False,
    ) -> ProxyTuned:
        """Check a whole recipe, then load its models, each once, with the adapters of all experts on it.

        Args:
            recipe: A directory, `package:NAME/PATH`, a Hub id, or a recipe already read.
            device: Device for every model, in place of the recipe's.
            dtype: Dtype for every model, in place of the recipe's.
            cuda_graphs: Run short forwards of every model as CUDA graphs, whatever the recipe says.
            experts: Load only these; None loads all.
            budget: Limit on calls to a base behind an API; None for no limit.
            trust_remote_code: Grant what the recipe asks for: run Python code that comes with its models.
            allow_pickle: Grant what the recipe asks for: read pickled weights, which can run any code.
            key_env: The variable whose key goes to the base's API; None for the one bound to that host.
            exact: Give each row the same logits, bit by bit, whatever runs beside it; slower in batches.

        Raises:
            RecipeError: The recipe is missing or malformed.
            UserError: A model is missing, unsafe, corrupt or does not match, or a right is not granted.
            ApiError: The API of the base cannot be reached.
        """
        recipe = (recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)).only(experts)
        recipe = recipe.with_settings(device=device, dtype=dtype, cuda_graphs=cuda_graphs or None)
        grants = Grants(trust_remote_code, allow_pickle, key_env)
        return cls(*load_ensemble(recipe, budget, grants, is_exact=exact), recipe)

    def job(self, request: Request, cancelled: Callable[[], bool] | None = None) -> Job:
        """Render a request for every model.

        Raises:
            UnknownExpert: It names an expert the recipe does not have.
            InvalidRequest: A prompt renders to nothing, a token id does not exist, or the policy does not fit
                the recipe.
            PromptTooLong: Prompt and new tokens exceed a model's context.
        """
        strengths = self.recipe.strengths(request.steering)
        policy = request.steering.policy_over(self.ensemble.policy)
        alphas = tuple(strengths.get(pair.name) for pair in self.ensemble.pairs)
        views = request.explain, request.explain_top
        prompts, sampling = tuple(_prompts(self, request)), _sampling(self, request)
        job = Job(sampling, prompts, alphas, *views, cancelled, strengths, policy)
        check_job(self.ensemble, job)
        return job

    def generate(
        self,
        prompt: Prompt | Request,
        sampling: SamplingParams | None = None,
        *,
        alpha: float | None = None,
        experts: Experts | None = None,
        policy: PolicySettings | None = None,
        combine: str | None = None,
        explain: bool = False,
        cancelled: Callable[[], bool] | None = None,
        speculative: bool | Drafting = False,
    ) -> Trace:
        """Generate one answer and return its trace.

        Args:
            prompt: Text, messages or token ids; or a whole `Request`, with nothing beside it.
            sampling: How tokens are chosen. Default: greedy, 128 tokens.
            alpha: Strength of steering; None takes the recipe's.
            experts: A name, names, or names with strengths; None takes the recipe's default.
            policy: A policy's name, or an object as the `steering` of a recipe, in place of the recipe's.
            combine: How several experts steer, in place of the recipe's.
            explain: Record what each model gave each token.
            cancelled: Called once a step; True ends the generation with the text so far.
            speculative: Draft tokens and verify several at once: the same text, faster where drafting pays.
                True means `Drafting()`, which adapts to measured costs.

        Raises:
            UserError: The request cannot be honoured; see `job`.
            BackendError: A model failed.
        """
        steering = Steering(alpha, experts, policy, combine)
        request = as_request(prompt, sampling, steering, explain=explain)
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

        Every request is checked before the first runs. A result depends on its neighbours by rounding alone,
        and not even so with `exact`; see docs/concepts/exactness.md.

        Args:
            requests: What to generate.
            batch_size: Rows per forward.
            on_event: Called with the request's index and each event as it happens.
            cancelled: Called once a step; True ends every row that still runs.
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
            collectors = [Collector(job) for job in block]
            try:
                for event in run(self.ensemble, collectors, self._speculator(speculative)):
                    if on_event is not None:
                        on_event(start + event.row, event)
            except ProxytuneError as error:
                error.traces = (*traces, *map(self._trace, collectors))
                raise
            traces += map(self._trace, collectors)
        return traces

    def _trace(self, collector: Collector) -> Trace:
        return self._with_token_texts(collector.trace(), collector.job)

    def explain(
        self,
        prompt: Prompt,
        continuation: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        alpha: float | None = None,
        experts: Experts | None = None,
        policy: PolicySettings | None = None,
        combine: str | None = None,
        top: int = 5,
    ) -> Trace:
        """Show what each model gives each token of a given continuation, and optionally go on from there.

        Every model reads the continuation at once, in the format that the recipe gives its prompt. The first
        `num_given` steps of the trace are the continuation's.

        Args:
            prompt: Text, messages or token ids.
            continuation: Text that follows the prompt as it is, or token ids of the base's vocabulary.
            sampling: How to go on after it; None ends there. Penalties and the seed's draws start afresh.
            alpha: Strength of steering; None takes the recipe's.
            experts: A name, names, or names with strengths; None takes the recipe's default.
            policy: A policy's name, or an object as the `steering` of a recipe, in place of the recipe's.
            combine: How several experts steer, in place of the recipe's.
            top: How many of each model's likeliest tokens to record.

        Raises:
            InvalidRequest: The continuation has no tokens, or unknown ones.
            UnsupportedModel: The base is behind an API, which shows too few logits.
            UserError: The request cannot be honoured; see `job`.
        """
        given = _given_ids(self, continuation)
        steering = Steering(alpha, experts, policy, combine)
        if sampling is not None:
            _check_continuable(steering.policy_over(self.ensemble.policy))
        num_new = 0 if sampling is None else sampling.max_new_tokens
        limits = SamplingParams(max_new_tokens=len(given) + num_new)
        asked = Request(prompt, limits, explain=True, explain_top=top, **steering.as_options())
        job = self.job(asked)
        return self._with_token_texts(trace_given(self.ensemble, job, given, sampling), job)

    def _with_token_texts(self, trace: Trace, job: Job) -> Trace:
        texts = self._token_bytes if job.records_views else {}
        return with_token_texts(trace, job, self.ensemble, texts)

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
        policy: PolicySettings | None = None,
        combine: str | None = None,
    ) -> Choice:
        """Return which of a few answers the steered base would begin with.

        Only the first token of each answer counts, and no two may begin with the same one. The letters of a
        multiple-choice question fit, as in the experiment with GPT-3.5 (Liu et al. 2024, section 5). A base
        behind an API is called once, and again for answers that it does not show.

        Args:
            prompt: Text, messages or token ids.
            options: The answers as they would follow the prompt: " A" if a space comes first.
            alpha: Strength of steering; None takes the recipe's.
            experts: A name, names, or names with strengths; None takes the recipe's default.
            policy: A policy's name, or an object as the `steering` of a recipe, in place of the recipe's.
            combine: How several experts steer, in place of the recipe's.

        Raises:
            InvalidRequest: There are fewer than two options, or two begin with the same token.
            UserError: The request cannot be honoured; see `job`.
            BackendError: A model failed.
        """
        first_tokens(options, self.tokenizer)  # refused before the prompt is looked at
        steering = Steering(alpha, experts, policy, combine)
        job = self.job(Request(prompt, SamplingParams(max_new_tokens=1), **steering.as_options()))
        return choose(self.ensemble, job, options, shows_all=self.recipe.base.api is None)

    def stream(
        self,
        prompt: Prompt | Request,
        sampling: SamplingParams | None = None,
        *,
        alpha: float | None = None,
        experts: Experts | None = None,
        policy: PolicySettings | None = None,
        combine: str | None = None,
        explain: bool = False,
        speculative: bool | Drafting = False,
    ) -> Iterator[Step]:
        """Generate one answer and yield its steps as they are made; close the iterator to stop.

        The texts of the steps, joined, are the text of `generate`. Arguments and errors are the same, and
        the request is checked before this returns.
        """
        steering = Steering(alpha, experts, policy, combine)
        request = as_request(prompt, sampling, steering, explain=explain)
        return self._steps(self.job(request), self._speculator(speculative), _Memory())

    def _steps(self, job: Job, speculator: Speculator | None, memory: _Memory) -> Iterator[Step]:
        """Yield a job's steps, starting from `memory`, and keep there what the models have read."""
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
        policy: PolicySettings | None = None,
        combine: str | None = None,
        speculative: bool | Drafting = False,
    ) -> Conversation:
        """Begin a conversation that remembers its turns. The models read only what is new."""
        steering = Steering(alpha, experts, policy, combine)
        return Conversation(self, sampling or SamplingParams(), system, steering, speculative)

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

        Every model sees the plain text, whatever its prompt format, and runs once for all strengths.

        Args:
            text: What to predict.
            alphas: Strengths of the steered rows, each for all chosen experts alike.
            experts: Which experts steer; None takes the recipe's default.
            window: Tokens per window.
            seed: Random seed of the bootstrap.
            on_progress: Called with the tokens done and the total.

        Raises:
            InvalidRequest: The text has nothing to predict, or a strength is not finite.
            UnknownExpert: It names an expert the recipe does not have.
            PromptTooLong: The window exceeds a model's context.
        """
        ensemble = self.steered_by(experts)
        report = score_passages(
            ensemble,
            self.text_passages(text, window=window),
            strengths=[(alpha, (alpha,) * len(ensemble.pairs)) for alpha in alphas],
            seed=seed,
            on_progress=on_progress,
        )
        return replace(report, window=window)

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
        token_ids, start = text_ids(text, self.tokenizer), start_id(self.tokenizer)
        return windows(self.ensemble, token_ids, window=window, start_id=start)

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

        Every model sees the prompts in its own format, as in `generate`. What the base's format writes
        between prompt and answer, and the token that ends it, are part of each answer.

        Args:
            pairs: Prompts and their answers. What exceeds a context or `max_tokens` is cut off an answer's
                end; a pair with nothing left is skipped.
            alphas: Strengths of the steered rows, each for all chosen experts alike.
            experts: Which experts steer; None takes the recipe's default.
            max_tokens: Maximum length of prompt and answer together; None for the smallest context.
            seed: Random seed of the bootstrap.
            on_progress: Called with the tokens done and the total.

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
        return _completion_passages(self.ensemble, self.formats, pairs, max_tokens)

    def alone(self, member: int) -> ProxyTuned:
        """Return one of the models by itself, unsteered and with its own prompt format; weights are shared.

        It uses the base's vocabulary, or its own if that is another.
        """
        return ProxyTuned(alone(self.ensemble, member), (self.formats[member],), self.recipe)

    def _speculator(self, speculative: bool | Drafting) -> Speculator | None:
        """Return the speculator that keeps measured costs for these settings; None for plain decoding."""
        if speculative is False:
            return None
        drafting = Drafting() if speculative is True else speculative
        return self._speculators.setdefault(drafting, Speculator(drafting))


@dataclass(slots=True)
class _Memory:
    """The caches of a conversation: what its models have read."""

    kept: Kept | None = None


class Conversation:
    """A chat with a steered model: `say` answers and remembers.

    `alpha`, `experts`, `policy`, `combine`, `sampling` and `options` (how the conversation is rendered) may
    change between turns.
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
        self.options = ChatOptions()
        self.alpha, self.experts = steering.alpha, steering.experts
        self.policy, self.combine = steering.policy, steering.combine
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    @property
    def joins_messages(self) -> bool:
        """Whether the base has no chat format, so that messages are joined as text."""
        return self._model.formats[0].joins_messages

    def say(self, text: str) -> Iterator[Step]:
        """Yield the steps of the answer to `text`; one that is cut short stays in the conversation as it is.

        Raises:
            UserError: The request cannot be honoured; the turn is not remembered.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        model = self._model
        steering = Steering(self.alpha, self.experts, self.policy, self.combine)
        request = Request(messages, self.sampling, chat=self.options, **steering.as_options())
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


def _prompts(model: ProxyTuned, request: Request) -> list[Sequence[int]]:
    """Return the token ids that each member reads of a request's prompt."""
    members = model.ensemble.members
    if request.is_token_ids:
        token_ids = [i for i in request.prompt if isinstance(i, int)]
        model.ensemble.vocabulary.check_token_ids(token_ids)
        return [member.own_ids(token_ids, is_start=True) for member in members]
    names = [member.name for member in members]
    prompts = render_each(request.prompt, model.formats, names, request.chat)
    if model.recipe.base.api is not None:
        prompts[0] = ChatPrompt.of(prompts[0], request.prompt, request.chat)
    return prompts


def _sampling(model: ProxyTuned, request: Request) -> SamplingParams:
    """Return how a request's tokens are chosen, and where its text ends."""
    sampling = request.sampling
    if request.is_chat and model.formats[0].joins_messages:
        # A base without a chat format would go on to write the user's next turn.
        sampling = replace(sampling, stop=(*sampling.stop, PLAIN_USER_TURN))
    return sampling


def _check_continuable(policy: Policy) -> None:
    """Refuse to go on after given tokens with a strength that depends on the position."""
    if policy.has_positions:
        raise InvalidRequest(
            "the strength follows a schedule of positions, which would start again after the "
            "given tokens.\nhint: explain the continuation alone, or leave the schedule out"
        )


def _given_ids(model: ProxyTuned, continuation: str | Sequence[int]) -> list[int]:
    """Return the token ids of a continuation that is to be explained; see `ProxyTuned.explain`."""
    if isinstance(continuation, str):
        given = continuation_ids(continuation, model.tokenizer)
    else:
        given = list(continuation)
        model.ensemble.vocabulary.check_token_ids(given)
    if not given:
        raise InvalidRequest("the continuation has no tokens, so there is nothing to explain")
    if model.recipe.base.api is not None:
        raise UnsupportedModel(
            "explaining a given text needs all of the base's logits, and an API shows few of them.\n"
            "hint: let it generate the text: leave the continuation out, or in Python call "
            "generate(..., explain=True)"
        )
    return given


def _completion_passages(
    ensemble: Ensemble,
    formats: Sequence[PromptFormat],
    pairs: Sequence[tuple[Prompt, str]],
    max_tokens: int | None,
) -> list[Passage]:
    tokenizer, names = ensemble.tokenizer, [member.name for member in ensemble.members]
    limits = [smallest_context(ensemble.members), max_tokens]
    limit = min([n for n in limits if n is not None], default=None)
    turns: dict[str, Turns] = {}
    passages = []
    for prompt, answer in pairs:
        prompts = tuple(map(tuple, render_each(prompt, formats, names)))
        own = formats[0].of(prompt)
        if own not in turns:
            turns[own] = Turns(own, tokenizer, names[0], formats[0].template)
        token_ids = turns[own].answer_ids(prompt, answer)
        if limit is not None:
            token_ids = token_ids[: max(0, limit - max(map(len, prompts)))]
        if token_ids:
            passages.append(Passage(prompts, tuple(token_ids)))
    return passages


def as_request(
    prompt: Prompt | Request, sampling: SamplingParams | None, steering: Steering, *, explain: bool
) -> Request:
    """Return the request that the arguments describe.

    Raises:
        InvalidRequest: A whole request and further settings were both given.
    """
    if not isinstance(prompt, Request):
        sampling = sampling or SamplingParams()
        return Request(prompt, sampling, explain=explain, **steering.as_options())
    if sampling is not None or steering != Steering() or explain:
        raise InvalidRequest(
            "a whole Request and settings beside it were given, so it is unclear which apply.\n"
            "hint: put the settings into the Request"
        )
    return prompt
