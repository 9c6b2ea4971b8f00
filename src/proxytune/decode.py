"""The loop: a batch of rows is prefilled, steered, sampled and extended until each row ends.

Words: a *member* is one model as requests see it: a backend, perhaps an adapter on it, and the alignment
of its vocabulary with the base's. An *ensemble* is the base (member 0) with its steering pairs. Members
that share a backend run as rows of one forward. A *job* is a request, its prompt rendered per member.

Rows do not influence each other: each has its own prompt, strength, seed, stop rules and length. Text appears
here only through `TextStream`; formats, recipes and files never do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune.backends.base import Backend
from proxytune.detokenize import TextStream
from proxytune.errors import BackendError, InvalidRequest, PromptTooLong
from proxytune.prompts import Tokenizer
from proxytune.request import SamplingParams
from proxytune.sample import BatchSampler
from proxytune.steer import Contribution, combine
from proxytune.trace import FinishReason, Step
from proxytune.vocab import Alignment, Vocabulary


@dataclass(frozen=True, slots=True)
class Member:
    """One model of an ensemble: its weights, the adapter its rows run with, and its vocabulary's place."""

    name: str
    backend: Backend[Any]
    alignment: Alignment
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """One expert: which members are the tuned and the untuned side."""

    name: str
    expert: int
    anti_expert: int


@dataclass(frozen=True, slots=True)
class Ensemble:
    """The base and the pairs that can steer it.

    Args:
        members: Member 0 is the base; its alignment is the identity.
        pairs: The experts, by index into `members`. Index 0 reuses the base's logits.
        vocabulary: The base's.
        eos_token_ids: Ids of the base's vocabulary that end a text.
        tokenizer: The base's; it turns the shared new tokens into text.
    """

    members: tuple[Member, ...]
    pairs: tuple[Pair, ...]
    vocabulary: Vocabulary
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Job:
    """One row to generate.

    Args:
        sampling: How tokens are chosen and when to stop.
        prompts: Token ids for each member, in that member's own vocabulary.
        alphas: Strength of each of the ensemble's pairs; 0 leaves a pair out.
        explain: Record what each member gave the chosen token.
        cancelled: Asked once a step; True ends the row.
    """

    sampling: SamplingParams
    prompts: tuple[Sequence[int], ...]
    alphas: tuple[float, ...]
    explain: bool = False
    cancelled: Callable[[], bool] | None = None


class Event(NamedTuple):
    """What happened to one row in one step."""

    row: int
    """Index into the jobs."""
    step: Step | None
    """The new token; None when the row was cancelled instead."""
    finish_reason: FinishReason | None
    tail: str
    """Text that was held back and belongs to no step; only when the row was cancelled."""


@dataclass(slots=True)
class _Group:
    """Members on one backend, whose rows lie one member after the other in one state."""

    backend: Backend[Any]
    members: list[int]
    state: Any = None


@dataclass(slots=True)
class _Row:
    """What the loop remembers of a row beside the models' states."""

    index: int
    job: Job
    text: TextStream
    ending_ids: frozenset[int]
    num_new: int = 0


def check_job(ensemble: Ensemble, job: Job) -> None:
    """Refuse a job that cannot be run to its end.

    Raises:
        PromptTooLong: Prompt and new tokens exceed a member's context.
        InvalidRequest: A token id outside the vocabulary.
    """
    for stop_id in job.sampling.stop_token_ids:
        if stop_id >= ensemble.vocabulary.width:
            raise InvalidRequest(
                f"stop_token_ids holds {stop_id}, and {ensemble.vocabulary.name} has "
                f"{ensemble.vocabulary.width} token ids"
            )
    for index in _members_needed(ensemble, [job]):
        member, prompt = ensemble.members[index], job.prompts[index]
        for token_id in prompt:
            if not 0 <= token_id < member.backend.vocab_size:
                raise InvalidRequest(
                    f"the prompt holds token id {token_id}, and {member.name} has "
                    f"{member.backend.vocab_size} token ids"
                )
        limit = member.backend.capabilities.max_context
        if limit is None:
            continue
        wanted = len(prompt) + job.sampling.max_new_tokens
        if len(prompt) >= limit:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and {member.name} has a context of {limit}, so "
                "nothing can be added to it.\nhint: shorten the prompt"
            )
        if wanted > limit:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, {job.sampling.max_new_tokens} new ones were asked "
                f"for, and {member.name} has a context of {limit}.\n"
                f"hint: shorten the prompt or ask for at most {limit - len(prompt)} new tokens"
            )


def _members_needed(ensemble: Ensemble, jobs: Sequence[Job]) -> list[int]:
    """List the members that any of the jobs uses; a pair at strength 0 is not run."""
    needed = {0}
    for which, pair in enumerate(ensemble.pairs):
        if any(job.alphas[which] != 0 for job in jobs):
            needed |= {pair.expert, pair.anti_expert}
    if any(job.explain for job in jobs):
        for pair in ensemble.pairs:
            needed |= {pair.expert, pair.anti_expert}
    return sorted(needed)


class Batch:
    """Rows that decode together. Build it, then call `step` until `is_done`."""

    def __init__(self, ensemble: Ensemble, jobs: Sequence[Job]) -> None:
        """Check the jobs and prefill every model.

        Raises:
            PromptTooLong: A row would exceed a member's context.
            InvalidRequest: A token id outside a vocabulary.
        """
        self._ensemble = ensemble
        for job in jobs:
            check_job(ensemble, job)
        self._rows = [
            _Row(
                index,
                job,
                TextStream(
                    ensemble.tokenizer,
                    stop=job.sampling.stop,
                    prompt_ids=job.prompts[0],
                    min_tokens=job.sampling.min_new_tokens,
                ),
                frozenset(job.sampling.stop_token_ids)
                | (frozenset() if job.sampling.ignore_eos else frozenset(ensemble.eos_token_ids)),
            )
            for index, job in enumerate(jobs)
        ]
        self._groups: list[_Group] = []
        for index in _members_needed(ensemble, jobs):
            backend = ensemble.members[index].backend
            for group in self._groups:
                if group.backend is backend:
                    group.members.append(index)
                    break
            else:
                self._groups.append(_Group(backend, [index]))
        self._logits: dict[int, Tensor] = {}
        for group in self._groups:
            prompts = [job.prompts[index] for index in group.members for job in jobs]
            adapters = [ensemble.members[index].adapter for index in group.members for _ in jobs]
            group.state, logits = group.backend.prefill(prompts, adapters=adapters)
            self._keep(group, logits)
        device = self._logits[0].device
        self._padding_ids = ensemble.vocabulary.padding_ids.to(device)
        self._sampler = BatchSampler(
            [job.sampling for job in jobs],
            [job.prompts[0] for job in jobs],
            [sorted(row.ending_ids) for row in self._rows],
            vocab_size=ensemble.members[0].backend.vocab_size,
            device=device,
        )
        self.seeds = list(self._sampler.seeds)
        """The seed of each job, drawn where none was given; None for greedy ones."""
        self._set_alphas()

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return not self._rows

    def step(self) -> list[Event]:
        """Choose one token for each live row and return what happened."""
        events, live = self._drop_cancelled()
        if not live:
            self._rows = []
            return events
        self._select(live)
        steered = self._steer()
        choice = self._sampler.choose(steered)
        token_ids: list[int] = choice.token_ids.tolist()
        logprobs: list[float] = choice.logprobs.tolist()
        tops = self._top(steered)
        live = []
        for place, row in enumerate(self._rows):
            if logprobs[place] != logprobs[place]:
                raise BackendError(
                    f"the logits of row {row.index} are not numbers (NaN) after {row.num_new} new tokens.\n"
                    "hint: run the models in float32 or bfloat16; float16 overflows in some of them"
                )
            reason, text = self._advance(row, token_ids[place])
            step = Step(
                index=row.num_new - 1,
                token_id=token_ids[place],
                text=text,
                logprob=logprobs[place],
                top=tops[place],
                parts=self._parts(place, token_ids[place]) if row.job.explain else None,
                finish_reason=reason,
            )
            events.append(Event(row.index, step, reason, ""))
            if reason is None:
                live.append(place)
        if not live:
            self._rows = []
            return events
        self._select(live)
        self._extend(choice.token_ids[live] if len(live) < len(token_ids) else choice.token_ids)
        return events

    def _drop_cancelled(self) -> tuple[list[Event], list[int]]:
        events, live = [], []
        for place, row in enumerate(self._rows):
            if row.job.cancelled is not None and row.job.cancelled():
                events.append(Event(row.index, None, "cancelled", row.text.finish()))
            else:
                live.append(place)
        return events, live

    def _advance(self, row: _Row, token_id: int) -> tuple[FinishReason | None, str]:
        """Count a token, and return why the row ends, if it does, and the text that became safe."""
        row.num_new += 1
        if token_id in row.ending_ids:
            return "stop", row.text.finish()
        text = row.text.push(token_id)
        if row.text.stopped:
            return "stop", text
        if row.num_new >= row.job.sampling.max_new_tokens:
            text += row.text.finish()  # which may complete a stop string that was held back
            return "stop" if row.text.stopped else "length", text
        return None, text

    def _steer(self) -> Tensor:
        contributions = [
            Contribution(
                self._logits[pair.expert], self._logits[pair.anti_expert], self._alphas[which]
            )
            for which, pair in enumerate(self._ensemble.pairs)
            if which in self._alphas
        ]
        steered = combine(self._logits[0], contributions)
        if len(self._padding_ids):
            steered = steered.index_fill(1, self._padding_ids, -torch.inf)
        return steered

    def _top(self, steered: Tensor) -> list[tuple[tuple[int, float], ...]]:
        """Return each row's most likely tokens and their steered logprobs, best first."""
        wanted = [row.job.sampling.logprobs or 0 for row in self._rows]
        if not any(wanted):
            return [()] * len(wanted)
        best = steered.log_softmax(-1).topk(min(max(wanted), steered.shape[1]))
        return [
            tuple(zip(ids[:count], values[:count], strict=True))
            for ids, values, count in zip(
                best.indices.tolist(), best.values.tolist(), wanted, strict=True
            )
        ]

    def _parts(self, place: int, token_id: int) -> dict[str, float]:
        """Return the logprob that each member gave the token of the row at `place`."""

        def logprob(member: int) -> float:
            logits = self._logits[member][place].float()
            if len(self._padding_ids):
                logits = logits.index_fill(0, self._padding_ids, -torch.inf)
            return float(logits[token_id] - logits.logsumexp(-1))

        parts = {"base": logprob(0)}
        for pair in self._ensemble.pairs:
            parts[f"{pair.name}.expert"] = logprob(pair.expert)
            parts[f"{pair.name}.anti_expert"] = logprob(pair.anti_expert)
        return parts

    def _extend(self, token_ids: Tensor) -> None:
        """Run the chosen tokens through every model."""
        for group in self._groups:
            rows = [
                self._ensemble.members[index].alignment.ids_to_small(token_ids)
                for index in group.members
            ]
            self._keep(group, group.backend.decode(group.state, torch.cat(rows)))

    def _keep(self, group: _Group, logits: Tensor) -> None:
        """Store a group's logits by member, in the base's vocabulary and on the base's device."""
        for index, part in zip(group.members, logits.chunk(len(group.members)), strict=True):
            aligned = self._ensemble.members[index].alignment.logits_to_base(part)
            self._logits[index] = aligned.to(self._logits[0].device) if index else aligned

    def _select(self, places: list[int]) -> None:
        """Keep the rows at the given places."""
        num_rows = len(self._rows)
        if places == list(range(num_rows)):
            return
        self._rows = [self._rows[place] for place in places]
        self._sampler.select(places)
        self._logits = {index: logits[places] for index, logits in self._logits.items()}
        for group in self._groups:
            rows = [k * num_rows + place for k in range(len(group.members)) for place in places]
            group.state = group.backend.select(group.state, rows)
        self._set_alphas()

    def _set_alphas(self) -> None:
        """Collect the strengths of the live rows: a number where all agree, else `[batch]`."""
        self._alphas: dict[int, float | Tensor] = {}
        for which in range(len(self._ensemble.pairs)):
            values = [row.job.alphas[which] for row in self._rows]
            if len(set(values)) > 1:
                self._alphas[which] = torch.tensor(
                    values, dtype=torch.float32, device=self._logits[0].device
                )
            elif values and values[0] != 0:
                self._alphas[which] = values[0]


def decode(ensemble: Ensemble, jobs: Sequence[Job]) -> Iterator[Event]:
    """Generate all jobs in one batch and yield what happens as it happens.

    Closing the iterator stops the work before the next step.
    """
    batch = Batch(ensemble, jobs)
    while not batch.is_done:
        yield from batch.step()
