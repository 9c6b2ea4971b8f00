"""The identities of docs/concepts/exactness.md, checked on one recipe of tiny models.

A token may differ only where the two candidates are nearly tied (`TIE`); such ties are counted. Beside the
tokens, the steered logprob of each is compared. So a text that repeats itself proves as much as a varied one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from proxytune.backends.transformers import backend as transformers_backend
from proxytune.decode.batch import Batch
from proxytune.decode.speculative import Drafting, Source, Speculator
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.trace import Step

TIE = 1e-3
"""Logits: where the best two lie closer than this on both paths, tokens may differ."""
SAME_LOGPROB = 1e-3
"""Nats: how far the logprobs of a token may lie apart on two paths, which round differently."""

PROMPTS = (
    [5, 6, 7],
    [40 + 9 * i % 200 for i in range(21)],
    [200],
    [17, 90, 33, 17, 90, 33, 17, 90, 35, 61, 2, 8],
)
"""Of 3, 21, 1 and 12 tokens: shorter and longer than a window, and one that repeats itself."""
LENGTHS = (12, 8, 3, 10)
"""New tokens of each row, so that rows end while others go on; the longest cross the window."""
GREEDY = SamplingParams(ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(ignore_eos=True, logprobs=2, temperature=0.9)

Steps = Sequence[Step]


def recipe_of(base: Path, tuned: Path, small: Path) -> Recipe:
    """Return a recipe of three models, with one pair for each identity.

    `pair` steers the base, `same` has one model as expert and anti-expert, `turn` the base as anti-expert.
    """
    big, expert, anti_expert = (ModelSpec(model=str(path)) for path in (base, tuned, small))
    pairs = {
        "pair": (expert, anti_expert),
        "same": (expert, expert),
        "turn": (expert, ModelSpec(same_as="base")),
    }
    experts = tuple(ExpertSpec(name, *models) for name, models in pairs.items())
    return Recipe(big, experts)


@dataclass
class Check:
    """One recipe, the networks behind it as transformers runs them, and what was found."""

    model: ProxyTuned
    networks: dict[str, Any]
    """`base`, `tuned` and `small`, loaded by transformers."""
    faults: dict[str, str] = field(default_factory=dict)
    """The identities that do not hold, and how."""
    num_ties: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    rows_at_once: int = 0
    """The most rows of one forward of the base."""
    _identity: str = ""
    _generated: dict[str, list[Steps]] = field(default_factory=dict)
    _is_consistent: bool | None = None
    _alone: dict[Any, list[Steps]] = field(default_factory=dict)

    @property
    def can_rewind(self) -> bool:
        """Whether every model can take tokens back, so that drafts are used."""
        return all(m.backend.capabilities.can_rewind for m in self.model.ensemble.members)

    @property
    def can_join(self) -> bool:
        """Whether rows can join a running batch."""
        return all(m.backend.capabilities.can_merge for m in self.model.ensemble.members)

    # Running ------------------------------------------------------------------------------------------

    def requests(self, sampling: SamplingParams, strength: dict[str, float]) -> list[Request]:
        """Return a request for each prompt; sampled ones have a seed each."""
        rows = enumerate(zip(PROMPTS, LENGTHS, strict=True))
        return [
            Request(
                prompt,
                replace(sampling, max_new_tokens=length, seed=i if sampling.temperature else None),
                experts=strength,
            )
            for i, (prompt, length) in rows
        ]

    def alone(self, sampling: SamplingParams, strength: dict[str, float]) -> list[Steps]:
        """Generate each row by itself; once, since nothing about it changes."""
        key = (sampling, *strength.items())
        if key not in self._alone:
            requests = self.requests(sampling, strength)
            self._alone[key] = [self.model.generate(request).steps for request in requests]
        return self._alone[key]

    def together(
        self,
        sampling: SamplingParams,
        strength: dict[str, float],
        speculative: bool | Drafting = False,
    ) -> list[Steps]:
        """Generate all rows as one batch."""
        requests = self.requests(sampling, strength)
        traces = self.model.generate_batch(requests, speculative=speculative)
        self.num_drafted += sum(trace.num_drafted for trace in traces)
        self.num_accepted += sum(trace.num_accepted for trace in traces)
        return [trace.steps for trace in traces]

    def generated(self, name: str) -> list[Steps]:
        """Return what transformers' `generate` says with one of the networks; once, too."""
        if name not in self._generated:
            self._generated[name] = generated(self.networks[name])
        return self._generated[name]

    def joined(self, strength: dict[str, float], speculator: Speculator | None) -> list[Steps]:
        """Generate with two rows that join two that have run for some steps, greedy."""
        jobs = [self.model.job(request) for request in self.requests(GREEDY, strength)]
        found: list[list[Step]] = [[] for _ in jobs]
        running = Batch(self.model.ensemble, jobs[:2], speculator=speculator)
        coming = Batch(self.model.ensemble, jobs[2:], speculator=speculator)

        def step(batch: Batch, offset: int) -> None:
            for event in batch.step():
                if event.step is not None:
                    found[event.row + offset].append(event.step)

        for _ in range(3):
            step(running, 0)
        step(coming, 2)
        assert running.join(coming) == 2
        while not running.is_done:
            step(running, 0)
        return found

    def is_varied(self) -> bool:
        """Whether texts depend on the whole prompt and on the models, and few tokens are nearly tied."""
        base, steered = self.alone(GREEDY, {"pair": 0.0}), self.alone(GREEDY, {"pair": 0.7})
        sampled = self.alone(SAMPLED, {"pair": 0.7})
        gaps = sorted(gap(step) for steps in (*base, *steered) for step in steps)
        network = self.networks["base"]
        one, other = ([first, *PROMPTS[0], *PROMPTS[0]] for first in (9, 99))
        change = whole_logits(network, [*one, 0], 1) - whole_logits(network, [*other, 0], 1)
        return (
            len({step.token_id for steps in sampled for step in steps}) > 10
            and len({steps[0].token_id for steps in base}) > 1
            and [s.token_id for steps in base for s in steps]
            != [s.token_id for steps in steered for s in steps]
            and gaps[len(gaps) // 2] > 20 * TIE
            and float(change.abs().max()) > 20 * TIE
        )

    @property
    def is_consistent(self) -> bool:
        """Whether transformers' `generate`, with its cache, agrees with its own forward without one."""
        if self._is_consistent is None:
            self._is_consistent = not any(
                difference(steps, whole_steps(self.networks[name], prompt, steps))
                not in (None, TIED)
                for name in ("base", "tuned")
                for prompt, steps in zip(PROMPTS, self.generated(name), strict=True)
            )
        return self._is_consistent

    # Comparing ----------------------------------------------------------------------------------------

    def run(self, name: str) -> None:
        """Check one of `IDENTITIES`, and note an error as a fault of it."""
        self._identity = name
        try:
            IDENTITIES[name](self)
        except Exception as error:  # whatever a model raises
            self.fault(f"{type(error).__name__}: {str(error).splitlines()[0]}")

    def fault(self, how: str) -> None:
        """Note how the identity that is being checked fails; the first time counts."""
        self.faults.setdefault(self._identity, how)

    def compare(self, found: Sequence[Steps], expected: Sequence[Steps], where: str = "") -> None:
        """Note where rows differ from those expected."""
        for row, (own, other) in enumerate(zip(found, expected, strict=True)):
            found_difference = difference(own, other)
            if found_difference == TIED:
                self.num_ties += 1
            elif found_difference:
                self.fault(f"{where}row {row}: {found_difference}")

    def compare_with_transformers(self, found: Sequence[Steps], name: str) -> None:
        """Note where rows differ from `generate`; from the whole forward where those two differ."""
        network, expected = self.networks[name], self.generated(name)
        if any(map(difference, found, expected)) and not self.is_consistent:
            expected = [
                whole_steps(network, prompt, steps)
                for prompt, steps in zip(PROMPTS, found, strict=True)
            ]
        self.compare(found, expected)


TIED = "nearly tied"


def difference(own: Steps, other: Steps) -> str | None:
    """Return how two texts differ; `TIED` if they part where two tokens are nearly tied, None if nowhere."""
    if len(own) != len(other):
        return f"{len(own)} tokens and not {len(other)}"
    for at, (mine, theirs) in enumerate(zip(own, other, strict=True)):
        if mine.token_id != theirs.token_id:
            if gap(mine) < TIE and gap(theirs) < TIE:
                return TIED  # what follows has another context
            return f"token {at} is {mine.token_id} and not {theirs.token_id}"
        if not abs(mine.logprob - theirs.logprob) < SAME_LOGPROB:
            return f"the logprob of token {at} is {mine.logprob:.4f} and not {theirs.logprob:.4f}"
    return None


def gap(step: Step) -> float:
    """Return how far the best two tokens lie apart, nats."""
    (_, first), (_, second) = step.top[:2]
    return first - second


# By transformers --------------------------------------------------------------------------------------------


def generated(network: Any) -> list[Steps]:
    """Return what transformers' `generate` says after each prompt, greedy."""
    found = []
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        ids = torch.tensor([prompt])
        answer = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        chosen = answer.sequences[0, len(prompt) :].tolist()
        found.append(as_steps(chosen, torch.cat(answer.logits)))
    return found


def as_steps(token_ids: Sequence[int], logits: Tensor) -> list[Step]:
    """Return chosen tokens with the logits, `[tokens, vocab]`, that they were chosen from."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(2)
    return [
        Step(
            at,
            token_id,
            "",
            float(logprobs[at, token_id]),
            tuple(zip(ids[at].tolist(), values[at].tolist(), strict=True)),
        )
        for at, token_id in enumerate(token_ids)
    ]


@torch.inference_mode()
def whole_logits(network: Any, token_ids: Sequence[int], num_last: int) -> Tensor:
    """Return the logits that choose a text's last tokens, `[num_last, vocab]`: one forward, no cache."""
    ids = torch.tensor([token_ids])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    if "position_ids" in inspect.signature(network.forward).parameters:
        # As `generate` does: some models (RoBERTa's kin) would otherwise count from their padding token on.
        options["position_ids"] = torch.arange(len(token_ids))[None]
    logits = network(input_ids=ids, **options).logits[0]
    return logits[-num_last - 1 : -1].float()


def whole_steps(network: Any, prompt: Sequence[int], steps: Steps) -> list[Step]:
    """Return what one forward without a cache chooses where a text chose its tokens."""
    logits = whole_logits(network, [*prompt, *(step.token_id for step in steps)], len(steps))
    return as_steps(logits.argmax(-1).tolist(), logits)


# The identities ---------------------------------------------------------------------------------------------


def base_is_generate(check: Check) -> None:
    """Alpha 0 is the base, as transformers' `generate` runs it."""
    check.compare_with_transformers(check.alone(GREEDY, {"pair": 0.0}), "base")


def same_pair_is_base(check: Check) -> None:
    """An expert equal to its anti-expert gives the base."""
    check.compare(check.alone(GREEDY, {"same": 1.0}), check.alone(GREEDY, {"pair": 0.0}))


def turned_is_expert(check: Check) -> None:
    """A base equal to the anti-expert gives the expert at alpha 1."""
    check.compare_with_transformers(check.alone(GREEDY, {"turn": 1.0}), "tuned")


def cached_is_whole(check: Check) -> None:
    """Steered tokens with caches are those of three whole forwards."""
    if not check.is_consistent:
        return  # not in transformers either
    own = check.alone(GREEDY, {"pair": 0.7})
    expected = []
    for prompt, steps in zip(PROMPTS, own, strict=True):
        text = [*prompt, *(step.token_id for step in steps)]
        base, tuned, small = (
            whole_logits(check.networks[name], text, len(steps))
            for name in ("base", "tuned", "small")
        )
        steered = base + 0.7 * (tuned - small)
        expected.append(as_steps(steered.argmax(-1).tolist(), steered))
    check.compare(own, expected)


def batch_is_alone(check: Check) -> None:
    """Rows of a batch, padded on the left and of different lengths, are what each is alone."""
    backend: Any = check.model.ensemble.members[0].backend

    def count(network: Any, _: Any, inputs: dict[str, Any]) -> None:
        check.rows_at_once = max(check.rows_at_once, inputs["input_ids"].shape[0])

    counter = backend.model.register_forward_pre_hook(count, with_kwargs=True)
    for sampling in (GREEDY, SAMPLED):
        check.compare(check.together(sampling, {"pair": 0.7}), check.alone(sampling, {"pair": 0.7}))
    counter.remove()


def joined_is_alone(check: Check) -> None:
    """Rows that join a running batch, and those that they join, are what each is alone."""
    if not check.can_join:
        return  # a capability that says no, which callers ask first
    expected = check.alone(GREEDY, {"pair": 0.7})
    speculators = (None, Speculator(Drafting(3, "expert", is_adaptive=False)))
    for speculator in speculators:
        check.compare(check.joined({"pair": 0.7}, speculator), expected)


def pieces_are_whole(check: Check) -> None:
    """Prompts that are read in pieces, alone and padded in a batch, give the same text."""
    expected = check.alone(GREEDY, {"pair": 0.7})
    with (
        patch.object(transformers_backend, "PREFILL_TOKENS", 5),
        patch.object(transformers_backend, "MIN_CHUNK", 3),
    ):
        requests = check.requests(GREEDY, {"pair": 0.7})
        alone = [check.model.generate(request).steps for request in requests]
        check.compare(alone, expected)
        check.compare(check.together(GREEDY, {"pair": 0.7}), expected)


SOURCES: tuple[tuple[Source, dict[str, float]], ...] = (
    (
        "expert",
        {"turn": 0.9},
    ),  # steered nearly like the expert, so that most of its drafts are right
    ("base", {"pair": 0.1}),
    ("lookup", {"pair": 0.7}),
)


def drafted_is_plain(check: Check) -> None:
    """Drafts of every source, greedy and sampled, alone and in a batch, change nothing."""
    for source, strength in SOURCES:
        drafting = Drafting(3, source, is_adaptive=False)
        for sampling in (GREEDY, SAMPLED):
            drafted = check.together(sampling, strength, drafting)
            check.compare(drafted, check.together(sampling, strength), f"drafts of {source}: ")
        # A single row is read without padding, by other kernels.
        request = check.requests(GREEDY, strength)[0]
        one, plain = (check.model.generate(request, speculative=d).steps for d in (drafting, False))
        check.compare([one], [plain], f"drafts of {source}: ")


def streamed_is_whole(check: Check) -> None:
    """Streamed pieces joined are the text."""
    sampling = replace(SAMPLED, max_new_tokens=16, temperature=1.5, seed=3)
    pieces = [step.text for step in check.model.stream(PROMPTS[3], sampling, experts={"pair": 0.7})]
    whole = check.model.generate(PROMPTS[3], sampling, experts={"pair": 0.7})
    if "".join(pieces) != whole.text:
        check.fault(f"{''.join(pieces)!r} and not {whole.text!r}")


def continued_is_fresh(check: Check) -> None:
    """A prompt that goes on from an earlier answer gives the same with and without what was kept of it."""
    first = check.model.job(check.requests(GREEDY, {"pair": 0.7})[3])
    batch = Batch(check.model.ensemble, [first], keeps=True)
    said = []
    while not batch.is_done:
        said += [event.step.token_id for event in batch.step() if event.step is not None]
    request = Request(
        [*PROMPTS[3], *said, 9, 8, 7], replace(GREEDY, max_new_tokens=8), experts={"pair": 0.7}
    )
    again = Batch(check.model.ensemble, [check.model.job(request)], kept=batch.kept())
    found: list[Step] = []
    while not again.is_done:
        found += [event.step for event in again.step() if event.step is not None]
    check.compare([found], [check.model.generate(request).steps])


IDENTITIES: dict[str, Callable[[Check], None]] = {
    "alpha 0 = base": base_is_generate,
    "expert = anti-expert": same_pair_is_base,
    "base = anti-expert": turned_is_expert,
    "cached = whole forward": cached_is_whole,
    "batch = alone": batch_is_alone,
    "joined = alone": joined_is_alone,
    "pieces = whole prompt": pieces_are_whole,
    "drafted = plain": drafted_is_plain,
    "streamed = whole text": streamed_is_whole,
    "continued = fresh": continued_is_fresh,
}
