"""How fast steering is: the base alone, plain and speculative steering, and the published procedure.

Everything compared alternates within each round, so that a machine's changing load meets all alike. Reported
are medians over rounds of ratios within a round. The *floor* is the speed, relative to the base, at which the
three models can run without drafts: `t_base / (t_base + t_pair)`, each timed alone in the same round.

The published procedure runs three transformers models one after another for every token, each with its own
cache. It is written here after the paper (Liu et al. 2024, arXiv:2401.08565, section 2 and appendix C.1) and
shares only the formula with this project's loop.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from proxytune.backends.transformers.backend import cache_option
from proxytune.backends.transformers.weights import quietly
from proxytune.decode.batch import Batch
from proxytune.decode.ensemble import Job
from proxytune.decode.speculative import Drafting
from proxytune.errors import InvalidRequest
from proxytune.grants import NOTHING, Grants
from proxytune.logits.steer import steer
from proxytune.measure.score import by_backend, needed_members
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.trace import Trace

PROMPT = "The first thing that a visitor to the old town sees is"
"""Repeated if a longer prompt is needed."""

MAX_TURNS = 6
"""Maximum number of measurements of the first token per round."""
TURNS_S = 2.0
"""Seconds per round after which the first token is not measured again."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How much is read and generated, in tokens per row."""

    num_prompt: int
    num_new: int
    batch_size: int = 1

    def __str__(self) -> str:
        return f"{self.num_prompt} in, {self.num_new} out, batch {self.batch_size}"


class PlainModels(NamedTuple):
    """Base, expert and anti-expert as transformers loads them, to compare this project with."""

    base: Any
    expert: Any
    anti_expert: Any


def load_plain_models(recipe: Recipe, expert: str, grants: Grants = NOTHING) -> PlainModels:
    """Load three whole models; each adapter is merged into a separate copy of its model.

    Raises:
        UnsafeModel: The recipe asks for a right that the caller does not grant.
        UserError: A model is missing or cannot be read; see `ProxyTuned.load`.
    """
    from proxytune.backends.transformers.cut import cut_with_bridge
    from proxytune.backends.transformers.weights import load_model
    from proxytune.checkpoints.cut_checkpoint import CutCheckpoint
    from proxytune.checkpoints.merge import merge_into
    from proxytune.recipe.files import RecipeFiles

    files = RecipeFiles(recipe, grants)
    files.check_grants()

    def load(spec: ModelSpec, base: Any = None) -> Any:
        checkpoint = files.checkpoint(spec)
        if isinstance(checkpoint, CutCheckpoint):
            model = copy.deepcopy(cut_with_bridge(base, checkpoint))
        else:
            model = load_model(checkpoint, spec)
        adapter = files.adapter(spec)
        if adapter is not None:
            merge_into(model, adapter, checkpoint)
        return model.eval()

    chosen = next(e for e in recipe.experts if e.name == expert)
    with quietly():
        base = load(recipe.base)
        return PlainModels(
            base,
            *(base if s.same_as else load(s, base) for s in (chosen.expert, chosen.anti_expert)),
        )


@torch.inference_mode()
def published_procedure(
    models: PlainModels, token_ids: Tensor, num_new: int, alpha: float = 1.0
) -> Tensor:
    """Return greedy tokens `[batch, num_new]`, with three sequential forwards per token.

    Args:
        models: The three models.
        token_ids: `[batch, num_prompt]`, prompts of equal length.
        num_new: Number of tokens to generate.
        alpha: Strength of steering.

    Source: Liu et al. 2024, arXiv:2401.08565, section 2.
    """
    caches = [{cache_option(model) or "": transformers.DynamicCache()} for model in models]
    chosen: list[Tensor] = []
    inputs = token_ids
    for _ in range(num_new):
        base, expert, anti_expert = (
            model(input_ids=inputs, use_cache=True, logits_to_keep=1, **cache).logits[:, -1]
            for model, cache in zip(models, caches, strict=True)
        )
        steered = steer(base, expert_logits=expert, anti_expert_logits=anti_expert, alpha=alpha)
        chosen.append(steered.argmax(-1))
        inputs = chosen[-1][:, None]
    return torch.stack(chosen, dim=1)


@torch.inference_mode()
def _library_generate(model: Any, token_ids: Tensor, num_new: int) -> None:
    with quietly():  # It warns about an end-of-sequence token that cannot occur.
        model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
        )


# One shape ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """A median over rounds, and the lowest and highest round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of a value over rounds."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Speeds:
    """Measurements of one shape.

    Args:
        shape: How much was read and generated.
        expert: The expert that steered.
        temperature: Sampling temperature; 0 is greedy.
        seconds: Seconds per generation, by what ran.
        ratios: Ratios of speeds; see `ratios_of`.
        acceptance_rate: Accepted / proposed draft tokens; None if nothing was drafted.
        tokens_per_step: New tokens per block and row in speculative decoding.
        num_parted: Number of rows whose speculative text differs from the plain one. Only ties allow that.
        first_token_s: Seconds to the first token of plain steering.
        prefill_s: Seconds for the models' prompts alone, one after another.
    """

    shape: Shape
    expert: str
    temperature: float
    seconds: Mapping[str, Spread]
    ratios: Mapping[str, Spread]
    acceptance_rate: float | None
    tokens_per_step: float
    num_parted: int
    first_token_s: Spread
    prefill_s: Spread

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements for JSON."""
        return asdict(self)


RATIOS = {
    "plain / base": ("base", "plain"),
    "speculative / base": ("base", "speculative"),
    "speculative / plain": ("plain", "speculative"),
    "plain / published": ("published", "plain"),
    "speculative / published": ("published", "speculative"),
    "plain / library's base": ("library", "plain"),
    "speculative / library's base": ("library", "speculative"),
}
"""Ratios of speeds by name: whose time is the numerator, and whose the denominator."""


def ratios_of(seconds: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Return the ratios of speeds for everything that was timed, from each round's seconds by what ran."""
    ratios = {
        name: Spread.of([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])
        for name, (above, below) in RATIOS.items()
        if above in seconds and below in seconds
    }
    if "pair" in seconds:
        rounds = list(zip(seconds["base"], seconds["pair"], seconds["plain"], strict=True))
        ratios["floor"] = Spread.of([base / (base + pair) for base, pair, _ in rounds])
        ratios["plain / floor"] = Spread.of([(base + pair) / plain for base, pair, plain in rounds])
    return ratios


def prompts_of(model: ProxyTuned, text: str, shape: Shape) -> list[list[int]]:
    """Return one prompt per row, each of exactly the shape's length, from consecutive parts of a text.

    Raises:
        InvalidRequest: The text has no tokens.
    """
    token_ids = list(model.tokenizer.encode(text, add_special_tokens=False))
    if not token_ids:
        raise InvalidRequest("the prompt has no tokens.\nhint: give a text")
    wanted = shape.num_prompt * shape.batch_size
    repeated = token_ids * -(-wanted // len(token_ids))
    size = shape.num_prompt
    return [repeated[row * size : (row + 1) * size] for row in range(shape.batch_size)]


def measure(
    model: ProxyTuned,
    shape: Shape,
    *,
    expert: str,
    alpha: float | None = None,
    text: str = PROMPT,
    plain_models: PlainModels | None = None,
    temperature: float = 0.0,
    drafting: Drafting | None = None,
    rounds: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> Speeds:
    """Time one shape. A first round, which is not counted, warms up and lets drafting learn its costs.

    Args:
        model: The models to measure.
        shape: How much is read and generated.
        expert: The expert that steers.
        alpha: Strength of steering; None takes the recipe's.
        text: The text that prompts are cut from.
        plain_models: Models to compare with; None leaves out the published procedure and the library's own
            generation with the base.
        temperature: Temperature of plain and speculative steering; 0 is greedy. Everything else is greedy.
        drafting: How drafts are made.
        rounds: Number of counted rounds.
        say: Called after each round.
    """
    sampling = SamplingParams(
        max_new_tokens=shape.num_new,
        ignore_eos=True,
        temperature=temperature,
        seed=1 if temperature else None,
    )
    prompts = prompts_of(model, text, shape)
    steered = [Request(p, sampling, alpha, expert) for p in prompts]
    greedy = SamplingParams(max_new_tokens=shape.num_new, ignore_eos=True)
    alone = [Request(p, greedy, 0.0, expert) for p in prompts]
    jobs = [model.job(request) for request in steered]
    strength = jobs[0].alphas[[pair.name for pair in model.ensemble.pairs].index(expert)] or 0.0
    plain: list[Trace] = []
    drafted: list[Trace] = []

    def run(
        requests: Sequence[Request], traces: list[Trace], speculative: bool | Drafting = False
    ) -> None:
        traces[:] = model.generate_batch(
            requests, batch_size=shape.batch_size, speculative=speculative
        )

    work: dict[str, Callable[[], object]] = {
        "base": lambda: run(alone, []),
        "plain": lambda: run(steered, plain),
        "speculative": lambda: run(steered, drafted, drafting or Drafting()),
    }
    if plain_models is not None:
        work |= _plain_work(plain_models, prompts, shape.num_new, strength)
    seconds: dict[str, list[float]] = {}
    for round_ in range(rounds + 1):
        took = {name: _timed(what) for name, what in work.items()}
        took["pair"] = _pair_seconds(model, jobs, [list(trace.token_ids) for trace in plain])
        took["first token"], took["prefill"] = _first_token(model, jobs)
        if round_:
            for name, value in took.items():
                seconds.setdefault(name, []).append(value)
        say(f"{shape}: round {round_} of {rounds}" + ("" if round_ else " (warm-up)"))
    first_token, prefill = seconds.pop("first token"), seconds.pop("prefill")
    acceptance_rate, tokens_per_step = _acceptance(drafted)
    return Speeds(
        shape=shape,
        expert=expert,
        temperature=temperature,
        seconds={name: Spread.of(values) for name, values in seconds.items()},
        ratios=ratios_of(seconds),
        acceptance_rate=acceptance_rate,
        tokens_per_step=tokens_per_step,
        num_parted=sum(a.token_ids != b.token_ids for a, b in zip(plain, drafted, strict=True)),
        first_token_s=Spread.of(first_token),
        prefill_s=Spread.of(prefill),
    )


def _acceptance(drafted: Sequence[Trace]) -> tuple[float | None, float]:
    """Return the acceptance rate, None without drafts, and the new tokens per block and row."""
    proposed = sum(trace.num_drafted for trace in drafted)
    accepted = sum(trace.num_accepted for trace in drafted)
    num_new = sum(trace.num_new_tokens for trace in drafted)
    return accepted / proposed if proposed else None, num_new / max(1, num_new - accepted)


def _plain_work(
    models: PlainModels, prompts: Sequence[Sequence[int]], num_new: int, alpha: float
) -> dict[str, Callable[[], object]]:
    """Return the comparisons to time: transformers' own generation, and the published procedure."""
    token_ids = torch.tensor(prompts, device=models.base.device)
    return {
        "library": lambda: _library_generate(models.base, token_ids, num_new),
        "published": lambda: published_procedure(models, token_ids, num_new, alpha),
    }


def _timed(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    """Wait until the accelerator has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _groups(model: ProxyTuned, jobs: Sequence[Job]) -> list[tuple[Any, list[int]]]:
    """Return the backends that the jobs need, each with its members; the base's comes first."""
    pairs = model.ensemble.pairs
    used = (pair for pair, alpha in zip(pairs, jobs[0].alphas, strict=True) if alpha)
    return by_backend(model.ensemble, needed_members(used))


def _prefill(model: ProxyTuned, backend: Any, members: Sequence[int], jobs: Sequence[Job]) -> Any:
    prompts = [job.prompts[index] for index in members for job in jobs]
    adapters = [model.ensemble.members[index].adapter for index in members for _ in jobs]
    return backend.prefill(prompts, adapters=adapters).state


def _pair_seconds(model: ProxyTuned, jobs: Sequence[Job], texts: Sequence[Sequence[int]]) -> float:
    """Return the seconds that the small models alone need for the same prompts and tokens."""
    groups = _groups(model, jobs)[1:]
    columns = torch.tensor(texts).t()
    started = time.perf_counter()
    for backend, members in groups:
        state = _prefill(model, backend, members, jobs)
        for column in columns[:-1]:
            rows = [model.ensemble.members[i].alignment.ids_to_small(column) for i in members]
            backend.decode(state, torch.cat(rows))
    _wait()
    return time.perf_counter() - started


def _first_token(model: ProxyTuned, jobs: Sequence[Job]) -> tuple[float, float]:
    """Return the seconds to the first token, and for the models' prompts alone: medians of a few turns.

    A full garbage collection, which takes 100 ms and more with models in memory, runs before and so not by
    chance within.
    """
    ending = [
        replace(job, sampling=replace(job.sampling, max_new_tokens=1, min_new_tokens=0))
        for job in jobs
    ]
    groups = _groups(model, jobs)

    def read_prompts() -> None:
        for backend, members in groups:
            _prefill(model, backend, members, jobs)
            _wait()

    first: list[float] = []
    prompts: list[float] = []
    gc.collect()
    # What runs right after other work is slower, so the two take turns at coming first.
    while len(first) < MAX_TURNS and sum(first) < TURNS_S:
        turns = [(first, lambda: Batch(model.ensemble, ending).step()), (prompts, read_prompts)]
        for took, what in reversed(turns) if len(first) % 2 else turns:
            took.append(_timed(what))
    return statistics.median(first), statistics.median(prompts)
