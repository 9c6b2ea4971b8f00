"""A recipe in an engine of vLLM in this process's hands: files of requests answered, given texts scored.

    model = load_in_vllm(Recipe.read("my-recipe"), options=["--tensor-parallel-size", "4"])
    model.generate_batch(requests)

What comes back is a `ProxyTuned` whose ensemble has an `Engine` in place of models. Prompts are rendered, and
new tokens turned into text, as for models that run here; vLLM takes and returns token ids. It is started when
the first job has been checked and is to be run, so that nothing is loaded for what would be refused.

Requests say themselves how they are steered (`request.py`). Given texts are scored by `prompt_logprobs`, for
which vLLM tells a model nothing about the request, so all workers are told beforehand how to steer
(`worker.py`): one reading of the texts for each strength. The same makes one member answer by itself.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from proxytune.backends.base import Backend, Capabilities, Prefilled
from proxytune.decode.ensemble import Answer, Ensemble, Job, Member, Pair, members_of, policy_of
from proxytune.errors import (
    BackendError,
    InvalidRequest,
    RecipeError,
    UnsupportedModel,
    UserError,
    missing_extra,
)
from proxytune.grants import NOTHING, Grants
from proxytune.integrations.vllm.config import (
    BATCH_INVARIANT,
    ServedEnsemble,
    ServedMember,
    check_batch_invariance,
    find_ensemble,
)
from proxytune.integrations.vllm.parent import ending_with_this
from proxytune.integrations.vllm.request import Menu, set_menu
from proxytune.model import ProxyTuned
from proxytune.policy import Policy
from proxytune.recipe.fields import write_steering
from proxytune.recipe.recipe import Recipe
from proxytune.request import SamplingParams, Steering
from proxytune.text.prompts import behave_alike

MAX_WAITING = 2048
"""Maximum number of requests that vLLM holds; it runs as many at a time as fit."""
WORKER = "proxytune.integrations.vllm.worker.SteeringWorker"
_LOCAL = "leave --engine vllm out to run it here"


def load_in_vllm(
    recipe: Recipe,
    *,
    experts: Sequence[str] | None = None,
    dtype: str | None = None,
    grants: Grants = NOTHING,
    options: Sequence[str] = (),
    is_exact: bool = False,
) -> ProxyTuned:
    """Check a recipe and vLLM's options, and return the recipe's models as vLLM will run them.

    vLLM starts, and reads the weights, when the first job is run. What the result cannot do is refused by
    name: a stream or a conversation, what each model gave, drafts, schedules of strength.

    Args:
        recipe: What to load. Its directory must hold it for every node that vLLM runs on.
        experts: Load only these; None loads all.
        dtype: Dtype of all models; None leaves it to vLLM.
        grants: What the caller allows.
        options: Further options of vLLM's engine, as its command line takes them.
        is_exact: Whether vLLM is to use its batch-invariant kernels, from now on in this process.

    Raises:
        UnsafeModel: The recipe asks for a right that the caller does not grant.
        UnsupportedModel: vLLM cannot run the recipe, or has no such kernels here; the message says why.
        MissingExtra: vLLM is not installed.
        InvalidRequest: vLLM has no such option, or the option is not for here.
        UserError: A model is missing, unsafe, corrupt or does not match; see `errors.py`.
    """
    recipe = recipe.only(experts)
    served = find_ensemble(recipe, grants)
    if importlib.util.find_spec("vllm") is None:
        raise missing_extra("vLLM is not installed", "vllm")
    if is_exact:
        check_batch_invariance()
        os.environ[BATCH_INVARIANT] = "1"  # vLLM's processes inherit it
    engine = VllmEngine(recipe, served, dtype=dtype, grants=grants, options=options)
    limits = [n for n in (served.max_context, engine.max_model_len) if n is not None]
    shared = _shared_tokenizers(served.members)
    members = tuple(
        Member(each.title, _Elsewhere(each, index, min(limits, default=None)), each.alignment)
        for index, each in enumerate(served.members)
    )
    base = served.base
    eos_token_ids = tuple(base.eos_token_ids)
    ensemble = Ensemble(
        members, served.pairs, base.vocabulary, eos_token_ids, base.tokenizer, recipe.policy, engine
    )
    formats = [replace(m.format, tokenizer=t) for m, t in zip(served.members, shared, strict=True)]
    return ProxyTuned(ensemble, formats, recipe)


def _shared_tokenizers(members: Sequence[ServedMember]) -> list[Any]:
    """Return each member's tokenizer, the same one for all that cut text alike; see `loading/load.py`."""
    found: list[Any] = []
    for member in members:
        own = member.format.tokenizer
        found.append(next((other for other in found if behave_alike(other, own)), own))
    return found


class _Elsewhere(Backend[None]):
    """A member that vLLM runs: its width and its context, and no logits.

    Args:
        member: The member.
        index: Its place among those that vLLM runs.
        max_context: Maximum number of tokens of a row.
    """

    def __init__(self, member: ServedMember, index: int, max_context: int | None) -> None:
        self.name = member.title
        self.vocab_size = member.alignment.small_width
        self.index = index
        self._max_context = max_context

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(self._max_context, can_rewind=False)

    def prefill(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None] | None = None
    ) -> Prefilled[None]:
        self._refuse()

    def extend(self, state: None, token_ids: Tensor) -> Tensor:
        self._refuse()

    def rewind(self, state: None, num_tokens: Sequence[int]) -> None:
        self._refuse()

    def select(self, state: None, rows: Sequence[int]) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedModel(
            f"{self.name} runs in vLLM, which answers whole requests and scores given texts, and does not "
            f"show the logits of each model.\nhint: {_LOCAL}"
        )


class VllmEngine:
    """vLLM with a recipe, started on first use; an `Engine` of `decode/ensemble.py`.

    Args:
        recipe: The recipe with only the served experts.
        served: Its models, found.
        dtype: Dtype of all models; None leaves it to vLLM.
        grants: What the caller allows.
        options: Further options of vLLM's engine.

    Raises:
        InvalidRequest: vLLM has no such option, or the option is not for here.
    """

    def __init__(
        self,
        recipe: Recipe,
        served: ServedEnsemble,
        *,
        dtype: str | None,
        grants: Grants,
        options: Sequence[str],
    ) -> None:
        self._served = served
        self._menu = Menu(recipe, grants=grants)
        self._place, directory = _place_of(recipe)
        # What it prints belongs to stderr; it reads this when it is imported.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        self._args = _engine_args(recipe, directory, dtype, grants, options)
        self._llm: Any = None
        self._end: Callable[[], object] = lambda: None
        self._told: tuple[Mapping[str, Any] | None, int | None] = None, None
        self._numbers = count()

    @property
    def max_model_len(self) -> int | None:
        """Maximum number of tokens of a row, if vLLM's options set it."""
        given = self._args.max_model_len
        return given if given is not None and given > 0 else None

    def start(self) -> None:
        """Start vLLM, if it is not running."""
        self._started()

    def close(self) -> None:
        """End vLLM's processes, which otherwise end with this object; the next job would start it again."""
        self._end()
        self._llm, self._told = None, (None, None)

    # What is asked ---------------------------------------------------------------------------------------

    def check(self, ensemble: Ensemble, job: Job) -> None:
        """Refuse a job that vLLM cannot run, as `Engine.check` says."""
        if policy_of(ensemble, job).has_positions:
            raise InvalidRequest(
                "policy has a schedule, and vLLM does not tell a model where its prompt ended.\n"
                f"hint: leave schedule out, or {_LOCAL}"
            )
        if job.records_views:
            raise InvalidRequest(
                f"vLLM's answers do not hold what each model gave.\nhint: leave explain out, or {_LOCAL}"
            )
        if job.cancelled is not None:
            raise InvalidRequest(f"vLLM's answers here cannot be cancelled.\nhint: {_LOCAL}")
        _check_sampling(job.sampling)
        first = ensemble.members[0]
        if not ensemble.pairs and first.alignment.kind == "added":
            raise UnsupportedModel(
                f"{first.name} has other added tokens than the base, and vLLM's rows hold the base's tokens, "
                f"so {first.name} cannot answer by itself.\nhint: {_LOCAL}"
            )
        self.check_prompts(ensemble, members_of(ensemble, job), job.prompts)

    def check_prompts(
        self, ensemble: Ensemble, members: Sequence[int], prompts: Sequence[Sequence[int]]
    ) -> None:
        """Refuse prompts that the members read differently, as `Engine.check_prompts` says."""
        first = ensemble.members[0]
        for index in members:
            member, own = ensemble.members[index], prompts[index]
            if index and list(own) != member.own_ids(_base_ids(first, prompts[0])):
                raise UnsupportedModel(
                    f"{member.name} reads the prompt in another format than {first.name}, and vLLM has one "
                    f"stream of tokens for all models.\nhint: {_LOCAL}, which renders a prompt for each model"
                )

    def answers(self, ensemble: Ensemble, jobs: Sequence[Job]) -> Iterator[Answer]:
        """Yield answers as they end, as `Engine.answers` says."""
        for job in jobs:
            self.check(ensemble, job)
        self._tell(None, None if ensemble.pairs else self._index(ensemble))
        for row, output in self._serve([self._request(ensemble, job) for job in jobs]):
            (completion,) = output.outputs
            asked = jobs[row].sampling.logprobs
            tops: tuple[Any, ...] = ()
            if asked is not None:
                places = zip(completion.token_ids, completion.logprobs, strict=True)
                tops = tuple(_top(token_id, shown, asked) for token_id, shown in places)
            yield Answer(row, tuple(completion.token_ids), tops)

    def first_logprobs(self, ensemble: Ensemble, job: Job, token_ids: Sequence[int]) -> list[float]:
        """Return logprobs of a job's first token, as `Engine.first_logprobs` says."""
        self.check(ensemble, job)
        self._tell(None, None if ensemble.pairs else self._index(ensemble))
        prompt, params = self._request(ensemble, job)
        params.max_tokens, params.logprob_token_ids = 1, list(token_ids)
        ((_, output),) = self._serve([(prompt, params)])
        shown = output.outputs[0].logprobs[0]
        return [shown[token_id].logprob for token_id in token_ids]

    def losses(
        self,
        ensemble: Ensemble,
        texts: Sequence[tuple[Sequence[int], Sequence[int]]],
        alphas: Sequence[float],
        on_text: Callable[[int], None],
    ) -> list[list[float]]:
        """Return the losses of given tokens, as `Engine.losses` says."""
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        fields = self._fields(ensemble, ensemble.policy, alphas)
        self._tell(fields, None if fields is not None else self._index(ensemble))

        def asked(prompt: Sequence[int], token_ids: Sequence[int]) -> tuple[list[int], Any]:
            # The last token is scored where vLLM would go on, so that a text may fill the whole context.
            params = VllmParams(
                temperature=0,
                max_tokens=1,
                prompt_logprobs=0 if len(token_ids) > 1 else None,
                logprob_token_ids=[token_ids[-1]],
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            return [*prompt, *token_ids[:-1]], params

        found: dict[int, list[float]] = {}
        for index, output in self._serve([asked(*text) for text in texts]):
            prompt, token_ids = texts[index]
            places = [*(output.prompt_logprobs or ())[len(prompt) :], output.outputs[0].logprobs[0]]
            pairs = zip(token_ids, places, strict=True)
            found[index] = [-shown[token_id].logprob for token_id, shown in pairs]
            on_text(index)
        return [found[index] for index in range(len(texts))]

    def _request(self, ensemble: Ensemble, job: Job) -> tuple[list[int], Any]:
        """Return a job as vLLM takes it: its prompt and `SamplingParams`."""
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        own = job.sampling
        params = VllmParams(
            max_tokens=own.max_new_tokens,
            min_tokens=own.min_new_tokens,
            temperature=own.temperature,
            top_k=own.top_k,
            top_p=own.top_p,
            min_p=own.min_p,
            repetition_penalty=own.repetition_penalty,
            presence_penalty=own.presence_penalty,
            frequency_penalty=own.frequency_penalty,
            logit_bias={token_id: bias for token_id, bias in own.logit_bias} or None,
            seed=own.seed,
            stop=list(own.stop),
            stop_token_ids=list(own.stop_token_ids),
            ignore_eos=own.ignore_eos,
            logprobs=own.logprobs,
            detokenize=bool(own.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=self._fields(ensemble, policy_of(ensemble, job), job.alphas),
        )
        return _base_ids(ensemble.members[0], job.prompts[0]), params

    def _fields(
        self, ensemble: Ensemble, policy: Policy, alphas: Sequence[float | None]
    ) -> dict[str, Any] | None:
        """Return how to steer in a request's fields; None for a member by itself."""
        if not ensemble.pairs:
            return None
        places = [member.backend for member in ensemble.members]
        for pair in ensemble.pairs:
            own = _index(places[pair.expert]), _index(places[pair.anti_expert])
            served = next((p for p in self._served.pairs if p == Pair(pair.name, *own)), None)
            is_same = served is not None and _is_weighted_alike(served, pair)
            if not is_same:
                what = "models" if served is None else "weights or another bias"
                raise UnsupportedModel(
                    f"{pair.name} is to be steered by other {what} than the recipe's, and vLLM runs these.\n"
                    f"hint: {_LOCAL}"
                )
        given = zip(ensemble.pairs, alphas, strict=True)
        strengths = {pair.name: alpha for pair, alpha in given if alpha is not None}
        settings = policy.to_dict() or policy.name
        return write_steering(Steering(None, strengths or None, settings, policy.combine))

    @staticmethod
    def _index(ensemble: Ensemble) -> int:
        """Return the place of an ensemble's first member among those that vLLM runs."""
        return _index(ensemble.members[0].backend)

    # vLLM ------------------------------------------------------------------------------------------------

    def _tell(self, fields: dict[str, Any] | None, alone: int | None) -> None:
        """Set on all workers how rows are steered that do not say it."""
        if self._told != (fields, alone):
            with _translated():
                self._started().collective_rpc("proxytune_steer", args=(fields, alone))
            self._told = fields, alone

    def _serve(self, requests: Sequence[tuple[list[int], Any]]) -> Iterator[tuple[int, Any]]:
        """Yield the index and vLLM's output of each request as it ends."""
        from vllm.inputs import tokens_input

        llm = self._started()
        set_menu(self._menu)  # Another recipe may have been started in this process since.
        running: dict[str, int] = {}
        waiting = iter(enumerate(requests))
        try:
            while True:
                with _translated():
                    while len(running) < MAX_WAITING and (each := next(waiting, None)) is not None:
                        index, (prompt, params) = each
                        name = str(next(self._numbers))
                        llm.add_request(name, tokens_input(prompt), params)
                        running[name] = index
                    outputs = llm.step() if running else []
                for output in outputs:
                    if output.finished:
                        yield running.pop(output.request_id), output
                if not running:
                    return
        finally:
            if running:
                llm.abort_request(list(running))

    def _started(self) -> Any:
        """Return vLLM, started if it is not running."""
        if self._llm is None:
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.llm_engine import LLMEngine

            with ending_with_this(), _stdout_on_stderr(), _translated():
                self._llm = LLMEngine.from_engine_args(self._args, UsageContext.LLM_CLASS)
            # Its processes hold the devices' memory, which the next models may need.
            self._end = weakref.finalize(self, self._llm.engine_core.shutdown)
        return self._llm


def _index(backend: Backend[Any]) -> int:
    assert isinstance(backend, _Elsewhere)
    return backend.index


def _is_weighted_alike(one: Pair, other: Pair) -> bool:
    """Whether two pairs have the same weights and the same output bias."""
    return one.weights == other.weights and one.bias is other.bias


def _base_ids(member: Member, token_ids: Sequence[int]) -> list[int]:
    """Return a member's token ids in those of the base, which vLLM reads."""
    small_ids = member.alignment.small_ids
    if small_ids is None:
        return list(token_ids)
    base_ids = {small: base for base, small in enumerate(small_ids.tolist())}
    return [base_ids[token_id] for token_id in token_ids]


def _top(
    token_id: int, shown: Mapping[int, Any], num: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the logprob of a token, and the likeliest tokens with theirs, best first."""
    best = sorted(shown.items(), key=lambda item: -item[1].logprob)
    return shown[token_id].logprob, tuple((i, each.logprob) for i, each in best[:num])


def _check_sampling(sampling: SamplingParams) -> None:
    """Refuse what vLLM's sampling cannot do, or would change without a word."""
    if sampling.first_logit_bias:
        raise InvalidRequest(
            "first_logit_bias is given, and vLLM has no bias for the first token alone.\n"
            f"hint: leave first_logit_bias out, or {_LOCAL}"
        )
    for name, value, low, high in (
        ("temperature", sampling.temperature or 1.0, 0.01, 2),
        ("presence_penalty", sampling.presence_penalty, -2, 2),
        ("frequency_penalty", sampling.frequency_penalty, -2, 2),
    ):
        if not low <= value <= high:
            zero = "0, or " if name == "temperature" else ""
            raise InvalidRequest(
                f"{name} is {value:g}, and in vLLM it is {zero}from {low:g} to {high:g}.\n"
                f"hint: stay within these, or {_LOCAL}"
            )


def _place_of(recipe: Recipe) -> tuple[tempfile.TemporaryDirectory[str] | None, Path]:
    """Return the directory of a recipe; one that no directory holds is written into a temporary one."""
    with suppress(RecipeError):  # There is none yet.
        there = Recipe.read(recipe.directory)
        is_there = there.base == recipe.base and all(e in there.experts for e in recipe.experts)
        # How to steer, requests say themselves. With a schedule vLLM would not start.
        if is_there and not there.policy.has_positions:
            return None, recipe.directory
    place = tempfile.TemporaryDirectory(prefix="proxytune-")
    return place, recipe.write(Path(place.name) / "recipe").directory


def _engine_args(
    recipe: Recipe, directory: Path, dtype: str | None, grants: Grants, options: Sequence[str]
) -> Any:
    """Return vLLM's `EngineArgs` for a recipe and further options of its command line."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise InvalidRequest(
                f"vLLM cannot read its options: {message}.\n"
                "hint: they follow --, as in: -- --tensor-parallel-size 4"
            )

    own = ["--model", str(directory), "--dtype", dtype or "auto", "--max-logprobs", "100"]
    own += ["--worker-extension-cls", WORKER, "--disable-log-stats"]
    own += ["--trust-remote-code"] if grants.trust_remote_code else []
    parser = EngineArgs.add_cli_args(Parser(prog="vLLM", add_help=False))
    usual, given = parser.parse_args(own), parser.parse_args([*own, *options])
    for key, hint in (
        ("model", "the recipe is the model"),
        ("dtype", "--dtype is an option of this command and stands before --"),
        ("trust_remote_code", "--trust-remote-code is an option of this command"),
        ("worker_extension_cls", "the workers are proxytune's"),
        ("speculative_config", f"leave it out, or {_LOCAL} with --speculative"),
        ("data_parallel_size", "start the command once for each part of the input"),
    ):
        if getattr(given, key) != getattr(usual, key):
            flag = "--" + key.replace("_", "-")
            raise InvalidRequest(f"{flag} cannot be among vLLM's options here.\nhint: {hint}")
    args = EngineArgs.from_cli_args(given)
    further = dict(args.additional_config or {})
    if "proxytune" in further:
        raise InvalidRequest(
            '"proxytune" cannot be in --additional-config here.\nhint: this command has options for it'
        )
    served: dict[str, Any] = {"experts": [e.name for e in recipe.experts]}
    if grants.allow_pickle:
        served["allow_pickle"] = True
    if recipe.base.prompt != "plain":
        served["renders_texts"] = True  # here
    args.additional_config = further | {"proxytune": served}
    return args


@contextmanager
def _translated() -> Iterator[None]:
    """Raise what vLLM refuses, and what fails in it, as errors of this package."""
    try:
        yield
    except (BackendError, UserError):
        raise
    except ValueError as error:
        raise InvalidRequest(f"vLLM refuses this: {error}") from error
    except Exception as error:
        raise BackendError(
            f"vLLM failed: {type(error).__name__}: {error}.\nhint: its own messages are above"
        ) from error


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Let processes that are started here print on stderr: stdout is for the command's answer."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
