"""The loop: a batch of rows is prefilled, steered, sampled and extended until each row ends.

Words: a *member* is one model as requests see it: a backend, perhaps an adapter on it, and the alignment
of its vocabulary with the base's. An *ensemble* is the base (member 0) with its steering pairs. Members
that share a backend run as rows of one forward. A *job* is a request, its prompt rendered per member.

A row's last token is *pending*: chosen, and read by no model yet. A *block* is what the models read at once:
the pending token, then a draft, which is empty in plain decoding (`speculative.py` says who drafts). Tokens
are chosen position by position as long as the draft had guessed them; what was read beyond is taken back.

Rows do not influence each other: each has its own prompt, strength, seed, stop rules and length. Text appears
here only through `TextStream`; formats, recipes and files never do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune.backends.base import NO_TOKEN, Backend, Bounds, PartialBackend
from proxytune.certificate import max_lost_prob, upper_logits
from proxytune.detokenize import TextStream
from proxytune.errors import BackendError, InvalidRequest, PromptTooLong
from proxytune.prompts import Tokenizer
from proxytune.request import SamplingParams
from proxytune.sample import BatchSampler
from proxytune.speculative import (
    RATE_MEMORY,
    SOURCES,
    Plan,
    PromptLookup,
    Rate,
    Source,
    Speculator,
    best_plan,
    is_worth_drafting,
)
from proxytune.steer import Contribution, combine
from proxytune.trace import FinishReason, Step, Usage
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
    """The new token; None when the row ended without one."""
    finish_reason: FinishReason | None
    tail: str
    """Text that was held back and belongs to no step; only when the row ended without a token."""


@dataclass(slots=True)
class _Group:
    """Members on one backend, whose rows lie one member after the other in one state."""

    backend: Backend[Any]
    members: list[int]
    state: Any = None

    def cost_key(self, num_rows: int) -> Hashable:
        """What its forwards cost depends on: which weights, and how many rows."""
        return id(self.backend), num_rows * len(self.members)


@dataclass(slots=True)
class _Row:
    """What the loop remembers of a row beside the models' states."""

    index: int
    job: Job
    text: TextStream
    ending_ids: frozenset[int]
    lookup: PromptLookup | None
    rates: dict[Source, Rate]
    experts: tuple[int, ...]
    new_ids: list[int] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0
    has_pending: bool = True

    @property
    def num_left(self) -> int:
        """How many tokens may still be chosen."""
        return self.job.sampling.max_new_tokens - len(self.new_ids)


@dataclass(slots=True)
class _Block:
    """What the models say after each token of a block: the pending one, then the draft.

    Args:
        draft: For each drafted position, every row's token, `[rows]` each.
        whole: Logits of members that read the block at once, `[rows, 1 + draft length, vocab]`.
        stepwise: Logits of members that read it token by token, a `[rows, vocab]` for each token read.
        source: Who drafted.
        bounds: Of what a partial base did not show, by row and position.
    """

    draft: list[Tensor]
    whole: dict[int, Tensor]
    stepwise: dict[int, list[Tensor]]
    source: Source | None = None
    bounds: list[list[Bounds]] = field(default_factory=list)

    def at(self, position: int, rows: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Return every member's logits after the token at `position`, `[rows, vocab]`."""
        logits = {index: part[:, position] for index, part in self.whole.items()}
        logits |= {index: parts[position] for index, parts in self.stepwise.items()}
        if rows is None:
            return logits
        return {index: part[list(rows)] for index, part in logits.items()}


@dataclass(slots=True)
class Kept:
    """What the models have read in a batch of one row, for a prompt that begins alike.

    Args:
        groups: With their states.
        token_ids: What each member has read, in its own vocabulary.
    """

    groups: list[_Group]
    token_ids: dict[int, list[int]]


class _Proof(NamedTuple):
    """What is known of a token chosen from a part of the base's logits; see `trace.Step`."""

    is_certified: bool
    max_lost_prob: float


class DraftCount(NamedTuple):
    """How many tokens were drafted for a row, and how many of them were what was chosen."""

    proposed: int
    accepted: int


REUSE_TOKENS = 64
"""Tokens that are read at once after a reused prefix: every one gives a whole row of logits."""
AHEAD_TOKENS = 16
"""Most tokens of a partial base's known continuation that the small models read at once."""
MAX_REVEALED = 4
"""Most tokens that a partial base is asked about one by one, to certify one choice: each may cost a call."""
SYNC_EVERY = 16
"""On an accelerator the clock is read for one block in so many, since reading it waits for the device."""


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
    is_partial = isinstance(ensemble.members[0].backend, PartialBackend)
    if is_partial and job.sampling.repetition_penalty != 1.0:
        raise InvalidRequest(
            "repetition_penalty depends on where logits have their zero, and a base behind an API shows "
            "logprobs only.\nhint: use presence_penalty or frequency_penalty"
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
    """Rows that decode together. Build it, then call `step` until `is_done`.

    Args:
        ensemble: The models.
        jobs: What to generate.
        speculator: Says who drafts and how far; None for plain decoding. What is generated is the same.
        kept: What an earlier batch of one row left; used where this one's only prompt begins alike, and
            not to be used again after.

    Raises:
        PromptTooLong: A row would exceed a member's context.
        InvalidRequest: A token id outside a vocabulary.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        jobs: Sequence[Job],
        *,
        speculator: Speculator | None = None,
        kept: Kept | None = None,
    ) -> None:
        self._ensemble = ensemble
        for job in jobs:
            check_job(ensemble, job)
        needed = _members_needed(ensemble, jobs)
        self._groups: list[_Group] = []
        for index in needed:
            backend = ensemble.members[index].backend
            for group in self._groups:
                if group.backend is backend:
                    group.members.append(index)
                    break
            else:
                self._groups.append(_Group(backend, [index]))
        can_rewind = all(group.backend.capabilities.can_rewind for group in self._groups)
        # Without rewinding a wrong draft could not be taken back.
        self._speculator = speculator if can_rewind else None
        base = ensemble.members[0].backend
        self._partial = base if isinstance(base, PartialBackend) else None
        self._can_draft = can_rewind
        self._rows = [self._row(index, job) for index, job in enumerate(jobs)]
        self._first: _Block | None = _Block([], {}, {})
        for group in self._groups:
            logits = None
            if kept is not None and len(jobs) == 1:
                logits = self._reuse(group, kept, jobs[0])
            if logits is None:
                prompts = [job.prompts[index] for index in group.members for job in jobs]
                adapters = [
                    ensemble.members[index].adapter for index in group.members for _ in jobs
                ]
                if isinstance(group.backend, PartialBackend):
                    group.state, logits = group.backend.prefill(
                        prompts, num_new_tokens=[job.sampling.max_new_tokens for job in jobs]
                    )
                    self._first.bounds = group.backend.bounds(group.state)
                else:
                    group.state, logits = group.backend.prefill(prompts, adapters=adapters)
            for index, part in self._by_member(group, logits[:, None]):
                self._first.whole[index] = part
        device = self._device
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
        self.draft_counts = [DraftCount(0, 0)] * len(jobs)
        """By job; final when the row has ended."""
        self._usages: list[Usage | None] = [None] * len(jobs)
        self._num_blocks = 0
        self._confidences: dict[Source, float] = {}
        self._ended: _Row | None = None
        self._set_alphas()

    def _row(self, index: int, job: Job) -> _Row:
        speculator = self._speculator
        experts = tuple(which for which, alpha in enumerate(job.alphas) if alpha)
        has_lookup = speculator is not None and speculator.drafting.allows("lookup")
        return _Row(
            index,
            job,
            TextStream(
                self._ensemble.tokenizer,
                stop=job.sampling.stop,
                prompt_ids=job.prompts[0],
                min_tokens=job.sampling.min_new_tokens,
            ),
            frozenset(job.sampling.stop_token_ids)
            | (frozenset() if job.sampling.ignore_eos else frozenset(self._ensemble.eos_token_ids)),
            PromptLookup(job.prompts[0]) if has_lookup else None,
            {} if speculator is None else speculator.begin_rates(experts),
            experts,
        )

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return not self._rows

    def usages(self) -> list[Usage | None]:
        """Return what calls to a base behind an API have cost so far, by job; None if it runs here."""
        if self._partial is not None:
            for place, row in enumerate(self._rows):
                self._usages[row.index] = self._partial.usage(self._groups[0].state, place)
        return list(self._usages)

    def kept(self) -> Kept | None:
        """Return what a finished batch of one row leaves for a prompt that begins alike; None of others."""
        row = self._ended
        if row is None or self._rows:
            return None
        read = torch.tensor(row.new_ids[:-1], dtype=torch.long)  # the last one is pending for ever
        members = [index for group in self._groups for index in group.members]
        return Kept(
            self._groups,
            {
                index: [
                    *row.job.prompts[index],
                    *self._ensemble.members[index].alignment.ids_to_small(read).tolist(),
                ]
                for index in members
            },
        )

    # One block ------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Read one block, choose at least one token for each live row, and return what happened."""
        events, live = self._drop_cancelled()
        self._select(live)
        if not live:
            return events
        block = self._first or self._read()
        is_first, self._first = self._first is not None, None
        num_rows = len(self._rows)
        num_kept = [0] * num_rows  # drafted tokens that stay
        ended: set[int] = set()
        alive = list(range(num_rows))
        for position in range(len(block.draft) + 1):
            if position == len(block.draft):
                self._complete(block)
                events += self._choose(block, position, alive, None, ended)
                break
            drafted: list[int] = block.draft[position].tolist()
            events += self._choose(block, position, alive, drafted, ended)
            alive = [
                row
                for row in alive
                if row not in ended and self._rows[row].new_ids[-1] == drafted[row]
            ]
            for row in alive:
                num_kept[row] += 1
            if not alive:
                break
        if not is_first:
            self._take_back(block, num_kept)
        for place in ended:
            self._end(place)
        self._select([place for place in range(num_rows) if place not in ended])
        return events

    def _choose(
        self,
        block: _Block,
        position: int,
        alive: Sequence[int],
        drafted: Sequence[int] | None,
        ended: set[int],
    ) -> list[Event]:
        """Choose a token for the rows whose draft was right so far; add those that end to `ended`."""
        rows = None if len(alive) == len(self._rows) else alive
        logits = block.at(position, rows)
        steered = self._steer(logits, rows)
        proofs: list[_Proof] = []
        if self._partial is not None:
            steered, proofs = self._certified(block, position, alive, logits)
        guesses = self._guesses(block, alive, drafted, logits)
        choice = self._sampler.choose(steered, rows)
        token_ids: list[int] = choice.token_ids.tolist()
        logprobs: list[float] = choice.logprobs.tolist()
        tops = self._top(steered, alive)
        events = []
        for place, which in enumerate(alive):
            row, token_id = self._rows[which], token_ids[place]
            if proofs and row.job.sampling.require_certified and not proofs[place].is_certified:
                events.append(Event(row.index, None, "uncertified", row.text.finish()))
                row.has_pending = False
                ended.add(which)
                continue
            if logprobs[place] != logprobs[place]:
                if proofs:
                    raise BackendError(
                        f"none of the tokens that the base showed after {len(row.new_ids)} new ones may be "
                        "chosen.\nhint: a larger top_logprobs shows more"
                    )
                raise BackendError(
                    f"the logits of row {row.index} are not numbers (NaN) after {len(row.new_ids)} new "
                    "tokens.\n"
                    "hint: run the models in float32 or bfloat16; float16 overflows in some of them"
                )
            for source, guessed in guesses.items():
                if guessed[place] is not None:
                    row.rates[source].observe(guessed[place] == token_id)
            if drafted is not None and drafted[which] != NO_TOKEN:
                row.num_drafted += 1
                row.num_accepted += drafted[which] == token_id
            reason, text = self._advance(row, token_id)
            step = Step(
                index=len(row.new_ids) - 1,
                token_id=token_id,
                text=text,
                logprob=logprobs[place],
                top=tops[place],
                parts=self._parts(logits, place, token_id) if row.job.explain else None,
                finish_reason=reason,
                is_certified=proofs[place].is_certified if proofs else None,
                max_lost_prob=proofs[place].max_lost_prob if proofs else None,
            )
            events.append(Event(row.index, step, reason, ""))
            if reason is not None:
                ended.add(which)
        return events

    def _take_back(self, block: _Block, num_kept: Sequence[int]) -> None:
        """Make every model forget what it read of a draft beyond the tokens that stay."""
        for group in self._groups:
            steps = block.stepwise.get(group.members[0])
            num_read = len(block.draft) + 1 if steps is None else len(steps)
            surplus = [num_read - 1 - kept for kept in num_kept]
            if any(surplus):
                group.backend.rewind(group.state, surplus * len(group.members))

    def _drop_cancelled(self) -> tuple[list[Event], list[int]]:
        events, live = [], []
        for place, row in enumerate(self._rows):
            if row.job.cancelled is not None and row.job.cancelled():
                events.append(Event(row.index, None, "cancelled", row.text.finish()))
                self._end(place)
            else:
                live.append(place)
        return events, live

    def _end(self, place: int) -> None:
        row = self._rows[place]
        if self._partial is not None:
            self._usages[row.index] = self._partial.usage(self._groups[0].state, place)
        self.draft_counts[row.index] = DraftCount(row.num_drafted, row.num_accepted)
        if self._speculator is not None:
            self._speculator.end_rates(row.experts, row.rates)
        # A row that was cancelled before its first token has nothing pending.
        is_kept = len(self.draft_counts) == 1 and bool(row.new_ids) and row.has_pending
        self._ended = row if is_kept else None

    def _advance(self, row: _Row, token_id: int) -> tuple[FinishReason | None, str]:
        """Count a token, and return why the row ends, if it does, and the text that became safe."""
        row.new_ids.append(token_id)
        if row.lookup is not None:
            row.lookup.push(token_id)
        if token_id in row.ending_ids:
            return "stop", row.text.finish()
        text = row.text.push(token_id)
        if row.text.stopped:
            return "stop", text
        if row.num_left <= 0:
            text += row.text.finish()  # which may complete a stop string that was held back
            return "stop" if row.text.stopped else "length", text
        return None, text

    # Arithmetic -----------------------------------------------------------------------------------------

    def _steer(self, logits: Mapping[int, Tensor], rows: Sequence[int] | None) -> Tensor:
        return self._masked(combine(logits[0], self._contributions(logits, rows)))

    def _contributions(
        self, logits: Mapping[int, Tensor], rows: Sequence[int] | None
    ) -> list[Contribution]:
        def strength(alpha: float | Tensor) -> float | Tensor:
            return alpha[list(rows)] if rows is not None and isinstance(alpha, Tensor) else alpha

        return [
            Contribution(
                logits[pair.expert], logits[pair.anti_expert], strength(self._alphas[which])
            )
            for which, pair in enumerate(self._ensemble.pairs)
            if which in self._alphas
        ]

    def _certified(
        self, block: _Block, position: int, alive: Sequence[int], logits: dict[int, Tensor]
    ) -> tuple[Tensor, list[_Proof]]:
        """Return steered logits of seen tokens, and what they prove; ask about others where that may help.

        What is found out is entered into `logits`.
        """
        assert self._partial is not None
        rows = None if len(alive) == len(self._rows) else alive
        offsets = combine(torch.zeros_like(logits[0]), self._contributions(logits, rows))
        bounds = [block.bounds[row][position] for row in alive]
        ceilings = torch.tensor([each.ceiling for each in bounds])
        temperatures = torch.tensor(
            [self._rows[row].job.sampling.temperature or 1.0 for row in alive]
        )
        asked = [0] * len(alive)
        while True:
            is_seen = ~torch.isneginf(logits[0])
            steered = self._masked(logits[0] + offsets)
            upper = self._masked(upper_logits(logits[0], offsets, ceilings=ceilings))
            chosen = self._sampler.peek(steered, rows)
            highest = self._sampler.peek(upper, rows)
            doubtful = [
                place
                for place in (chosen != highest).nonzero().flatten().tolist()
                if asked[place] < MAX_REVEALED
                and ceilings[place] < torch.inf
                and self._may_reveal(upper[place], steered[place], is_seen[place], alive[place])
            ]
            found = {}
            for place in doubtful:
                asked[place] += 1
                token_id = int(highest[place])
                num_back = len(block.draft) - position
                group = self._groups[0]
                answer = self._partial.reveal(group.state, alive[place], num_back, [token_id])
                if token_id in answer:
                    found[place, token_id] = answer[token_id]
                else:
                    asked[place] = MAX_REVEALED
            if not found:
                break
            logits[0] = logits[0].clone()
            for (place, token_id), logprob in found.items():
                logits[0][place, token_id] = logprob
        rests = torch.tensor([each.rest for each in bounds])
        lost = max_lost_prob(upper, is_seen, offsets, rests=rests, temperatures=temperatures)
        lost[torch.isinf(ceilings) & (ceilings > 0)] = 1.0
        # What filters keep of a draw depends on all tokens, and bounds do not tell.
        is_provable = [not self._rows[row].job.sampling.has_filters for row in alive]
        return steered, [
            _Proof(same and provable, loss)
            for same, provable, loss in zip(
                (chosen == highest).tolist(), is_provable, lost.tolist(), strict=True
            )
        ]

    def _may_reveal(self, upper: Tensor, steered: Tensor, is_seen: Tensor, row: int) -> bool:
        """Whether few enough tokens are in the way of a proof for asking about each."""
        if not self._rows[row].job.sampling.is_greedy:
            return True
        return int((upper.masked_fill(is_seen, -torch.inf) > steered.max()).sum()) <= MAX_REVEALED

    def _masked(self, logits: Tensor) -> Tensor:
        """Return logits with padding ids at -inf."""
        if not len(self._padding_ids):
            return logits
        return logits.index_fill(-1, self._padding_ids, -torch.inf)

    def _top(self, steered: Tensor, rows: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
        """Return each row's most likely tokens and their steered logprobs, best first."""
        wanted = [self._rows[row].job.sampling.logprobs or 0 for row in rows]
        if not any(wanted):
            return [()] * len(wanted)
        best = steered.log_softmax(-1).topk(min(max(wanted), steered.shape[1]))
        return [
            tuple(zip(ids[:count], values[:count], strict=True))
            for ids, values, count in zip(
                best.indices.tolist(), best.values.tolist(), wanted, strict=True
            )
        ]

    def _parts(self, logits: Mapping[int, Tensor], place: int, token_id: int) -> dict[str, float]:
        """Return the logprob that each member gave the token of the row at `place`."""

        def logprob(member: int) -> float:
            row = self._masked(logits[member][place].float())
            if member == 0 and self._partial is not None:
                # A logprob already, and not all that make it one are here.
                return float(row[token_id])
            return float(row[token_id] - row.logsumexp(-1))

        parts = {"base": logprob(0)}
        for pair in self._ensemble.pairs:
            parts[f"{pair.name}.expert"] = logprob(pair.expert)
            parts[f"{pair.name}.anti_expert"] = logprob(pair.anti_expert)
        return parts

    def first_logits(self, token_ids: Sequence[int]) -> tuple[Tensor, bool]:
        """Return the steered logits of certain tokens as the only row's first, and if the best is certain.

        Call it before `step`. A partial base is asked about those it did not show; what stays unknown is
        -inf.

        Args:
            token_ids: Of the base's vocabulary.

        Returns:
            `[num token_ids]` float32, and whether no unknown one of them can be higher than the highest.
        """
        block = self._first
        assert block is not None and len(self._rows) == 1
        logits = block.at(0)
        wanted = torch.tensor(list(token_ids), device=logits[0].device)
        offsets = combine(torch.zeros_like(logits[0]), self._contributions(logits, None))
        base = logits[0].clone()
        if self._partial is None:
            return self._masked(base + offsets)[0, wanted], True
        missing = [i for i in token_ids if base[0, i] == -torch.inf]
        if missing:
            state = self._groups[0].state
            for token_id, logprob in self._partial.reveal(state, 0, 0, missing).items():
                base[0, token_id] = logprob
        ceilings = torch.tensor([block.bounds[0][0].ceiling])
        upper = self._masked(upper_logits(base, offsets, ceilings=ceilings))[0, wanted]
        steered = self._masked(base + offsets)[0, wanted]
        return steered, bool((upper[steered == -torch.inf] < steered.max()).all())

    # Reading --------------------------------------------------------------------------------------------

    def _read(self) -> _Block:
        """Run the models over the pending tokens and a draft."""
        device = self._device
        pending = torch.tensor([row.new_ids[-1] for row in self._rows], device=device)
        block = _Block([], {}, {})
        self._num_blocks += 1
        if self._partial is not None and self._draft_ahead(block):
            limit, plan = 0, None
        else:
            limit, plan = self._plan()
        drafter = self._drafter(plan.source) if plan is not None else None
        if drafter is not None:
            assert plan is not None
            block.source = plan.source
            self._draft(block, pending, drafter, plan, limit)
        elif plan is not None and plan.source == "lookup":
            block.source = "lookup"
            block.draft = self._looked_up(plan.length, device)
        tokens = torch.stack([pending, *block.draft], dim=1)
        for group in self._groups:
            if group.members[0] not in block.stepwise:
                is_partial = group.backend is self._partial
                for index, part in self._run(group, tokens if is_partial else tokens.clamp(min=0)):
                    block.whole[index] = part
                if is_partial and self._partial is not None:
                    block.bounds = self._partial.bounds(group.state)
        return block

    def _draft_ahead(self, block: _Block) -> bool:
        """Take what a partial base is known to go on with as the draft; whether there was any.

        It costs no call, and the small models read it in one forward. Rows that have less are filled up.
        """
        assert self._partial is not None
        if not self._can_draft:
            return False
        limit = self._most_drafted(AHEAD_TOKENS)
        pending = [row.new_ids[-1] for row in self._rows]
        ahead = [ids[:limit] for ids in self._partial.lookahead(self._groups[0].state, pending)]
        longest = max(map(len, ahead))
        if longest <= 0:
            return False
        padded = [ids + [NO_TOKEN] * (longest - len(ids)) for ids in ahead]
        block.draft = list(torch.tensor(padded).t())
        block.source = "base"
        return True

    def _draft(self, block: _Block, pending: Tensor, drafter: int, plan: Plan, limit: int) -> None:
        """Let one group read token by token, and guess the next one after each, as far as that pays."""
        speculator = self._speculator
        assert speculator is not None and plan.source is not None
        group = self._group_of(drafter)
        block.stepwise = {index: [] for index in group.members}
        is_adaptive = speculator.drafting.is_adaptive and self._partial is None
        rates = [row.rates[plan.source].value for row in self._rows]
        chances = [1.0] * len(self._rows)
        token_ids = pending
        while True:
            for index, part in self._run(group, token_ids[:, None]):
                logits = part[:, 0]
                if group.backend.capabilities.reuses_logits:
                    logits = logits.clone()  # needed until the whole draft is verified
                block.stepwise[index].append(logits)
            length = len(block.draft)
            if length >= limit:
                return
            logits = self._masked(block.stepwise[drafter][-1])
            token_ids = self._sampler.propose(logits, ahead=length)
            if is_adaptive:
                sure = self._confidence(logits, token_ids)
                mean = max(self._mean_confidence(plan.source, sure), 1e-3)
                ahead = [
                    chance * min(1.0, rate * confidence / mean)
                    for chance, rate, confidence in zip(chances, rates, sure, strict=True)
                ]
                if not self._is_worth(plan, group, ahead, chances, length):
                    return
                chances = ahead
            block.draft.append(token_ids)
            if len(block.draft) >= limit:
                return  # what follows the last guess is asked for only where it was right
            if is_adaptive:
                following = [c * rate for c, rate in zip(chances, rates, strict=True)]
                if not self._is_worth(plan, group, following, chances, len(block.draft)):
                    return

    def _complete(self, block: _Block) -> None:
        """Let the drafting models read the last guess: some row needs what follows it."""
        for index, parts in block.stepwise.items():
            if len(parts) > len(block.draft):
                return
            group = self._group_of(index)
            for member, part in self._run(group, block.draft[-1][:, None]):
                block.stepwise[member].append(part[:, 0])
            return

    def _looked_up(self, length: int, device: torch.device) -> list[Tensor]:
        drafts = []
        for row in self._rows:
            assert row.lookup is not None
            # A row without a match guesses its last token again, so that rows stay as long as each other.
            drafts.append(row.lookup.propose(length) or [row.new_ids[-1]] * length)
        return list(torch.tensor(drafts, device=device).t())

    def _run(self, group: _Group, token_ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Append `[rows, num_tokens]` of the base's token ids to a group's rows; yield members' logits."""
        rows = [
            self._ensemble.members[index].alignment.ids_to_small(token_ids)
            for index in group.members
        ]
        speculator = self._speculator
        wait = _synchronise(token_ids.device) if self._is_timed(token_ids.device) else None
        started = time.perf_counter()
        logits = group.backend.extend(group.state, torch.cat(rows))
        if speculator is not None and wait is not None:
            wait()
            seconds = time.perf_counter() - started
            speculator.costs.observe(group.cost_key(len(self._rows)), token_ids.shape[1], seconds)
        yield from self._by_member(group, logits)

    def _is_timed(self, device: torch.device) -> bool:
        if self._speculator is None or not self._speculator.drafting.is_adaptive:
            return False
        return device.type == "cpu" or self._num_blocks % SYNC_EVERY == 1

    def _by_member(self, group: _Group, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield a group's logits by member, in the base's vocabulary and on the base's device."""
        for index, part in zip(group.members, logits.chunk(len(group.members)), strict=True):
            aligned = self._ensemble.members[index].alignment.logits_to_base(part)
            if index == 0:  # the base is the first of the first group
                self._device = aligned.device
            yield index, aligned.to(self._device)

    def _reuse(self, group: _Group, kept: Kept, job: Job) -> Tensor | None:
        """Go on from an earlier state as far as the prompts begin alike; return logits `[members, vocab]`.

        None where nothing can be reused. Rows that have less to read than others read their last token
        again, and forget it.
        """
        earlier = next((g for g in kept.groups if g.backend is group.backend), None)
        if earlier is None or earlier.members != group.members:
            return None
        capabilities = group.backend.capabilities
        if not capabilities.can_rewind or capabilities.is_partial:
            return None  # a server keeps what it has read by itself
        prompts = [list(job.prompts[index]) for index in group.members]
        read = [kept.token_ids[index] for index in group.members]
        shared = [
            min(_num_shared(prompt, tokens), len(prompt) - 1)
            for prompt, tokens in zip(prompts, read, strict=True)
        ]
        rests = [prompt[n:] for prompt, n in zip(prompts, shared, strict=True)]
        longest = max(map(len, rests))
        limit = group.backend.capabilities.max_context
        if not all(shared) or (limit is not None and max(shared) + longest > limit):
            return None
        group.state = earlier.state
        group.backend.rewind(
            group.state, [len(tokens) - n for tokens, n in zip(read, shared, strict=True)]
        )
        padded = torch.tensor([rest + [rest[-1]] * (longest - len(rest)) for rest in rests])
        ends: dict[int, Tensor] = {}
        for start in range(0, longest, REUSE_TOKENS):
            logits = group.backend.extend(group.state, padded[:, start : start + REUSE_TOKENS])
            for row, rest in enumerate(rests):
                if start < len(rest) <= start + REUSE_TOKENS:
                    ends[row] = logits[row, len(rest) - 1 - start].clone()
        surplus = [longest - len(rest) for rest in rests]
        if any(surplus):
            group.backend.rewind(group.state, surplus)
        return torch.stack([ends[row] for row in range(len(rests))])

    # What pays ------------------------------------------------------------------------------------------

    def _plan(self) -> tuple[int, Plan | None]:
        """Return the longest draft that fits, and what to do; None for plain decoding."""
        speculator = self._speculator
        if speculator is None:
            return 0, None
        drafting = speculator.drafting
        if self._partial is not None:
            return self._plan_for_calls(speculator)
        limit = self._most_drafted(drafting.max_tokens)
        if limit <= 0:
            return 0, None
        if not drafting.is_adaptive:
            assert drafting.source != "auto"
            if drafting.source != "lookup" and self._drafter(drafting.source) is None:
                return 0, None
            return limit, Plan(drafting.source, limit, 0.0)
        able: list[Source] = [
            source
            for source in ("expert", "base")
            if drafting.allows(source) and self._drafter(source) is not None
        ]
        rates = {source: [row.rates[source].value for row in self._rows] for source in able}
        if drafting.allows("lookup") and any(
            row.lookup is not None and row.lookup.propose(1) for row in self._rows
        ):
            rates["lookup"] = [
                row.rates["lookup"].value if row.lookup and row.lookup.propose(1) else 0.0
                for row in self._rows
            ]
        plan = best_plan(rates, self._block_seconds, limit)
        if plan is None:
            return 0, None
        if plan.source is None and able:
            # None pays on average; where the source is sure of a token, that one may.
            return limit, plan._replace(source=able[0])
        return limit, plan

    def _most_drafted(self, limit: int) -> int:
        """Return how many tokens a draft may have: what is still wanted, and what every context holds."""
        limit = min(limit, max(row.num_left for row in self._rows) - 1)
        for group in self._groups:
            context = group.backend.capabilities.max_context
            if context is None:
                continue
            for row in self._rows:
                for index in group.members:
                    held = len(row.job.prompts[index]) + len(row.new_ids)
                    limit = min(limit, context - held)
        return limit

    def _plan_for_calls(self, speculator: Speculator) -> tuple[int, Plan | None]:
        """Return what saves calls to a partial base, beside which the small models' time is nothing.

        Without a draft, one call brings the base's own continuation, which is good for as long as steering
        agrees with it. With one, it tells the base's view of what the expert would say. Whoever was right
        more often lately is followed.
        """
        assert self._partial is not None
        drafting = speculator.drafting
        limit = self._most_drafted(drafting.max_tokens)
        can_draft = self._drafter("expert") is not None and drafting.allows("expert")
        if limit <= 0 or not can_draft or not self._partial.can_score:
            return 0, None
        if drafting.is_adaptive:
            mean = {
                source: sum(row.rates[source].value for row in self._rows)
                for source in ("expert", "base")
            }
            if mean["expert"] <= mean["base"]:
                return 0, None
        return limit, Plan("expert", limit, 0.0)

    def _block_seconds(
        self, source: Source | None, length: int, whole_chance: float
    ) -> float | None:
        """Return what a block costs: see `best_plan`."""
        assert self._speculator is not None
        drafter = None if source is None else self._drafter(source)
        total = 0.0
        for group in self._groups:
            key = group.cost_key(len(self._rows))
            is_drafting = drafter is not None and drafter in group.members
            seconds = self._speculator.costs.estimate(key, 1 if is_drafting else length + 1)
            if seconds is None:
                return None
            total += seconds * (length + whole_chance) if is_drafting else seconds
        return total

    def _is_worth(
        self,
        plan: Plan,
        group: _Group,
        ahead: Sequence[float],
        chances: Sequence[float],
        length: int,
    ) -> bool:
        """Whether to draft one token more than `length`; see `is_worth_drafting`."""
        assert self._speculator is not None
        costs, num_rows = self._speculator.costs, len(self._rows)
        step = costs.estimate(group.cost_key(num_rows), 1)
        if step is None:
            return False
        widening = 0.0
        for other in self._groups:
            if other is not group:
                key = other.cost_key(num_rows)
                now, then = costs.estimate(key, length + 1), costs.estimate(key, length + 2)
                widening += max(0.0, (then or 0.0) - (now or 0.0))
        # A forward of the drafting model is needed anyway where its guess proves right.
        in_vain = 1 - sum(chances) / num_rows + sum(ahead) / num_rows if length else max(ahead)
        return is_worth_drafting(
            ahead,
            seconds_per_token=plan.seconds_per_token,
            draft_seconds=step * in_vain,
            widening_seconds=widening,
        )

    def _confidence(self, logits: Tensor, token_ids: Tensor) -> list[float]:
        """Return the probability that the drafting model gives its guesses, by row."""
        chosen = logits.gather(1, token_ids[:, None])[:, 0]
        probs: list[float] = (chosen - logits.logsumexp(-1)).float().exp().tolist()
        return probs

    def _mean_confidence(self, source: Source, confidences: Sequence[float]) -> float:
        """Return the running mean of a source's confidence, which `_draft` sets its rate against."""
        for confidence in confidences:
            mean = self._confidences.get(source, confidence)
            self._confidences[source] = mean + (confidence - mean) / RATE_MEMORY
        return self._confidences[source]

    def _guesses(
        self,
        block: _Block,
        alive: Sequence[int],
        drafted: Sequence[int] | None,
        logits: Mapping[int, Tensor],
    ) -> dict[Source, list[int | None]]:
        """Return what each source would guess for the tokens about to be chosen, to keep its rate current."""
        speculator = self._speculator
        if speculator is None or not speculator.drafting.is_adaptive:
            return {}
        guesses: dict[Source, list[int | None]] = {}
        for source in SOURCES:
            if not speculator.drafting.allows(source):
                continue
            if source == "lookup":
                found = [self._rows[row].lookup for row in alive]
                proposed = [lookup.propose(1) if lookup else [] for lookup in found]
                guesses[source] = [ids[0] if ids else None for ids in proposed]
            elif source == block.source and drafted is not None:
                guesses[source] = [
                    None if drafted[row] == NO_TOKEN else drafted[row] for row in alive
                ]
            else:
                drafter = self._drafter(source)
                if drafter is not None:
                    rows = None if len(alive) == len(self._rows) else alive
                    proposal = self._sampler.propose(
                        self._masked(logits[drafter]), ahead=0, rows=rows
                    )
                    guesses[source] = proposal.tolist()
        return guesses

    def _drafter(self, source: Source | None) -> int | None:
        """Return the member that drafts for a source; None where none can, or nothing could be gained."""
        if source == "base":
            return 0 if len(self._groups) > 1 else None
        if source != "expert":
            return None
        strongest = max(
            self._alphas,
            key=lambda which: abs(sum(row.job.alphas[which] for row in self._rows)),
            default=None,
        )
        if strongest is None:
            return None
        member = self._ensemble.pairs[strongest].expert
        # An expert on the base's own weights costs what the base costs.
        return member if 0 not in self._group_of(member).members else None

    def _group_of(self, member: int) -> _Group:
        return next(group for group in self._groups if member in group.members)

    # Books ----------------------------------------------------------------------------------------------

    def _select(self, places: list[int]) -> None:
        """Keep the rows at the given places."""
        num_rows = len(self._rows)
        if places == list(range(num_rows)):
            return
        self._rows = [self._rows[place] for place in places]
        if not places:
            return  # states stay as they are, for `kept`
        self._sampler.select(places)
        if self._first is not None:
            self._first.bounds = [self._first.bounds[p] for p in places if self._first.bounds]
            self._first.whole = {i: logits[places] for i, logits in self._first.whole.items()}
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
                self._alphas[which] = torch.tensor(values, dtype=torch.float32, device=self._device)
            elif values and values[0] != 0:
                self._alphas[which] = values[0]


def _synchronise(device: torch.device) -> Callable[[], None]:
    """Return what waits until a device has done all it was given."""
    if device.type == "cpu":
        return lambda: None
    wait: Callable[[], None] = getattr(torch, device.type).synchronize
    wait()
    return wait


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
