"""The loop: a batch of rows is prefilled, steered, sampled and extended until each row ends.

Words: a *member* is one model as requests see it: a backend, perhaps an adapter on it, and the alignment
of its vocabulary with the base's. An *ensemble* is the base (member 0) with its steering pairs. A *job* is a
request, its prompt rendered per member; it becomes a *row*. A *lane* is one member reading one row: a row has
lanes for the base and for the pairs that steer it, and for no others. Lanes on one backend are rows of one
forward, whichever members and rows they belong to.

A row's last token is *pending*: chosen, and read by no model yet. A *block* is what the models read at once:
the pending token, then a draft, which is empty in plain decoding (`decode/speculative.py` says who drafts).
Tokens are chosen position by position as long as the draft had guessed them; what was read beyond is taken
back.

Rows do not influence each other: each has its own prompt, experts, strengths, seed, stop rules and length. A
batch can take over the rows of another one between two steps. Text appears here only through `TextStream`;
formats, recipes and files never do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.backends.base import (
    NO_TOKEN,
    Bounds,
    num_shared_tokens,
)
from proxytune.decode.drafting import AHEAD_TOKENS, Drafter
from proxytune.decode.ensemble import Ensemble, Job, check_job, slots_of
from proxytune.decode.lanes import (
    Block,
    Group,
    Kept,
    Lane,
    LanePlace,
    Row,
    grouped,
)
from proxytune.decode.lookup import PromptLookup
from proxytune.decode.partial import MAX_REVEALED, Proof
from proxytune.decode.reading import REUSE_TOKENS, SYNC_EVERY, synchronise
from proxytune.decode.speculative import (
    FREE_TOKENS,
    FREE_TOKENS_ON_CPU,
    RATE_MEMORY,
    REST,
    SOURCES,
    Plan,
    Source,
    Speculator,
    best_plan,
    is_time_to_look,
    is_worth_drafting,
)
from proxytune.errors import BackendError
from proxytune.logits.certificate import max_lost_prob, upper_logits
from proxytune.logits.rules import Steered, apply_policy, has_conflict
from proxytune.logits.sample import BatchSampler
from proxytune.logits.steer import Contribution
from proxytune.logits.views import kl_divergence, partial_view, view
from proxytune.text.detokenize import TextStream
from proxytune.trace import FinishReason, Step, Usage, View


class Event(NamedTuple):
    """What happened to one row in one step."""

    row: int
    """Index into the jobs; of rows that joined, what `Batch.join` said."""
    step: Step | None
    """The new token; None when the row ended without one."""
    finish_reason: FinishReason | None
    tail: str
    """Text that was held back and belongs to no step; only when the row ended without a token."""


class DraftCount(NamedTuple):
    """How many tokens were drafted for a row, and how many of them were what was chosen."""

    proposed: int
    accepted: int


class Batch:
    """Rows that decode together. Build it, then call `step` until `is_done`.

    Args:
        ensemble: The models.
        jobs: What to generate.
        speculator: Says who drafts and how far; None for plain decoding. What is generated is the same.
        kept: What an earlier row left; used where this batch's only prompt begins alike, and not to be used
            again after.
        keeps: Leave in `left` what the models have read of each row that ends, where they can copy it.

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
        keeps: bool = False,
    ) -> None:
        self._ensemble = ensemble
        for job in jobs:
            check_job(ensemble, job)
        self._groups = grouped(ensemble, jobs)
        can_rewind = all(group.backend.capabilities.can_rewind for group in self._groups)
        # Without rewinding a wrong draft could not be taken back.
        self._speculator = speculator if can_rewind else None
        self._partial = ensemble.members[0].backend.partial
        self._can_draft = can_rewind
        self._rows = [self._row(index, job) for index, job in enumerate(jobs)]
        self._first: Block | None = Block([], {}, {})
        self.num_reused = 0
        """How many tokens of the base's prompt were not read again."""
        for group in self._groups:
            logits = None
            if kept is not None and len(jobs) == 1:
                logits = self._reuse(group, kept, jobs[0])
            if logits is None:
                prompts = [jobs[lane.row].prompts[lane.member] for lane in group.lanes]
                adapters = [ensemble.members[lane.member].adapter for lane in group.lanes]
                if (partial := group.backend.partial) is not None:
                    group.state, logits = partial.prefill(
                        prompts, num_new_tokens=[job.sampling.max_new_tokens for job in jobs]
                    )
                    self._first.bounds = partial.bounds(group.state)
                else:
                    group.state, logits = group.backend.prefill(prompts, adapters=adapters)
            self._first.whole[group] = logits[:, None]
        device = self._device = self._first.whole[self._groups[0]].device
        # Where models run elsewhere, time beside their forwards holds what nobody waited for.
        self._runs_on_cpu = all(group.backend.device.type == "cpu" for group in self._groups)
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
        self.draft_counts: dict[int, DraftCount] = {}
        """Of rows that have ended, by their numbers."""
        self._usages: dict[int, Usage] = {}
        self.left: dict[int, Kept] = {}
        """What rows that have ended leave, by their numbers."""
        self._keeps = keeps and self.can_join
        self._next_index = len(jobs)
        self._num_blocks = 0
        self._num_undrafted = 0
        self._forwards_s = 0.0
        self._is_looking = True
        self._confidences: dict[Source, float] = {}
        self._ended: Row | None = None
        self._arrange()

    def _row(self, index: int, job: Job) -> Row:
        speculator = self._speculator
        slots = slots_of(job)
        experts = tuple(which for which in slots if job.alphas[which])
        has_lookup = speculator is not None and speculator.drafting.allows("lookup")
        return Row(
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
            slots,
        )

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return not self._rows

    @property
    def num_rows(self) -> int:
        """How many rows have not ended."""
        return len(self._rows)

    @property
    def can_join(self) -> bool:
        """Whether rows of other batches can be taken over, and these by another one."""
        return all(group.backend.capabilities.can_merge for group in self._groups)

    def join(self, other: Batch) -> int:
        """Take over the rows of another batch of the same ensemble, which must not be used after.

        What they generate stays the same. Both batches must have taken a step, and `can_join`.

        Returns:
            What is added to the numbers that the other's rows had.
        """
        assert self._ensemble is other._ensemble and self.can_join and other.can_join
        assert self._first is None and other._first is None
        offset = self._next_index
        self._next_index += other._next_index
        self._runs_on_cpu &= other._runs_on_cpu
        if not other._rows:
            return offset
        for row in other._rows:
            row.index += offset
        for theirs in other._groups:
            theirs.lanes = [Lane(lane.member, lane.row + offset) for lane in theirs.lanes]
        if not self._rows:
            self._rows, self._groups, self._sampler = other._rows, other._groups, other._sampler
            self._arrange()
            return offset
        for theirs in other._groups:
            mine = next((g for g in self._groups if g.backend is theirs.backend), None)
            if mine is None:
                self._groups.append(theirs)
                continue
            lanes = [*mine.lanes, *theirs.lanes]
            # A stable sort: within a member, my rows come first, as they do in the batch.
            order = sorted(range(len(lanes)), key=lambda lane: lanes[lane].member)
            mine.state = mine.backend.merge(mine.state, theirs.state, order)
            mine.lanes = [lanes[lane] for lane in order]
        self._rows += other._rows
        self._sampler.join(other._sampler)
        self._arrange()
        return offset

    def drop_cancelled(self) -> list[Event]:
        """End the rows that were cancelled, as the next step would."""
        events, live = [], []
        for place, row in enumerate(self._rows):
            if row.job.cancelled is not None and row.job.cancelled():
                events.append(Event(row.index, None, "cancelled", row.text.finish()))
                self._end(place)
            else:
                live.append(place)
        self._select(live)
        return events

    def forget(self, row: int) -> None:
        """Forget what is known of a row that has ended, in a batch that others keep joining."""
        self.draft_counts.pop(row, None)
        self.left.pop(row, None)
        self._usages.pop(row, None)

    def usage(self, row: int) -> Usage | None:
        """Return what a row's calls to a base behind an API have cost so far; None if it runs here."""
        if self._partial is not None:
            for place, live in enumerate(self._rows):
                if live.index == row:
                    return self._partial.usage(self._groups[0].state, place)
        return self._usages.get(row)

    def kept(self) -> Kept | None:
        """Return what a finished batch of one row leaves for a prompt that begins alike; None of others."""
        row = self._ended
        return None if row is None or self._rows else self._kept(row, self._groups)

    def _kept(self, row: Row, groups: list[Group]) -> Kept:
        """Return what groups of one row's lanes have read."""
        read = torch.tensor(row.new_ids[:-1], dtype=torch.long)  # the last one is pending for ever
        members = [index for group in groups for index in group.members]
        return Kept(
            groups,
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
        events = self.drop_cancelled()
        if self.is_done:
            return events
        started, self._forwards_s = time.perf_counter(), 0.0
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
        if not is_first and self._runs_on_cpu and self._is_timed(self._device):
            assert self._speculator is not None
            seconds = time.perf_counter() - started - self._forwards_s
            self._speculator.costs.observe(REST, num_rows, len(block.draft) + 1, seconds)
        return events

    def _choose(
        self,
        block: Block,
        position: int,
        alive: Sequence[int],
        drafted: Sequence[int] | None,
        ended: set[int],
    ) -> list[Event]:
        """Choose a token for the rows whose draft was right so far; add those that end to `ended`."""
        rows = None if len(alive) == len(self._rows) else alive
        logits = block.at(position)
        base = self._member_logits(logits, 0, alive)
        contributions = self._contributions(logits, alive)
        proofs: list[Proof] = []
        found = self._steered(base, contributions, alive)
        if self._partial is None:
            steered = self._masked(found.logits)
        else:
            base, steered, proofs = self._certified(block, position, alive, base, found.logits)
        conflicts = self._conflicts(base, contributions, alive)
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
            views, kl, weights = None, None, None
            if row.job.explain:
                weights = self._weights(row, found.weights[:, place])
                views, kl = self._views(
                    logits,
                    row,
                    token_id,
                    base=base[place],
                    steered=steered[place],
                    bounds=block.bounds[which][position] if block.bounds else None,
                )
            reason, text = self._advance(row, token_id)
            step = Step(
                index=len(row.new_ids) - 1,
                token_id=token_id,
                text=text,
                logprob=logprobs[place],
                top=tops[place],
                views=views,
                kl=kl,
                weights=weights,
                has_conflict=conflicts[place] if row.job.explain and conflicts else None,
                finish_reason=reason,
                is_certified=proofs[place].is_certified if proofs else None,
                max_lost_prob=proofs[place].max_lost_prob if proofs else None,
            )
            events.append(Event(row.index, step, reason, ""))
            if reason is not None:
                ended.add(which)
        return events

    def _take_back(self, block: Block, num_kept: Sequence[int]) -> None:
        """Make every model forget what it read of a draft beyond the tokens that stay."""
        for group in self._groups:
            steps = block.stepwise.get(group)
            num_read = len(block.draft) + 1 if steps is None else len(steps)
            surplus = [num_read - 1 - num_kept[place] for place in group.places]
            if any(surplus):
                group.backend.rewind(group.state, surplus)

    def _end(self, place: int) -> None:
        row = self._rows[place]
        if self._partial is not None:
            self._usages[row.index] = self._partial.usage(self._groups[0].state, place)
        self.draft_counts[row.index] = DraftCount(row.num_drafted, row.num_accepted)
        if self._speculator is not None:
            self._speculator.end_rates(row.experts, row.rates)
        # A row that was cancelled before its first token has nothing pending.
        can_keep = bool(row.new_ids) and row.has_pending
        self._ended = row if can_keep and self._next_index == 1 else None
        if can_keep and self._keeps:
            groups = []
            for group in self._groups:
                lanes = [place for place, lane in enumerate(group.lanes) if lane.row == row.index]
                if lanes:
                    copied = group.backend.copy(group.state, lanes)
                    own = [group.lanes[lane] for lane in lanes]
                    groups.append(Group(group.backend, own, copied))
            self.left[row.index] = self._kept(row, groups)

    def _advance(self, row: Row, token_id: int) -> tuple[FinishReason | None, str]:
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

    def _pick(self, logits: Mapping[Group, Tensor], sources: Sequence[LanePlace]) -> Tensor:
        """Return what lanes say, in the base's vocabulary and on its device, `[sources, vocab]`."""
        members = self._ensemble.members
        alignments = {id(members[g.lanes[lane].member].alignment) for g, lane in sources}
        first, start = sources[0]
        if any(group is not first for group, _ in sources) or len(alignments) > 1:
            return torch.cat([self._pick(logits, [source]) for source in sources])
        lanes = [lane for _, lane in sources]
        part = logits[first]
        if lanes == list(range(start, start + len(lanes))):
            part = part[start : start + len(lanes)]  # a view: nothing is copied
        else:
            part = part[lanes]
        aligned = members[first.lanes[start].member].alignment.logits_to_base(part)
        return aligned.to(self._device)

    def _member_logits(
        self, logits: Mapping[Group, Tensor], member: int, places: Sequence[int]
    ) -> Tensor:
        """Return what a member says of rows that it reads, `[rows, vocab]`."""
        lanes = [Lane(member, self._rows[place].index) for place in places]
        return self._pick(logits, [self._sources[lane] for lane in lanes])

    def _contributions(
        self, logits: Mapping[Group, Tensor], places: Sequence[int]
    ) -> list[Contribution]:
        """Return what steers the rows at `places`: in a slot, each row has a pair of its own."""
        contributions = []
        for slot in self._steering_slots:
            alpha = self._alphas[slot]
            # A row without a pair in this slot has strength 0 there, and any row's logits will do.
            stand_in = next(row for row in self._rows if slot < len(row.slots))
            rows = [self._rows[place] for place in places]
            rows = [row if slot < len(row.slots) else stand_in for row in rows]
            pairs = [self._ensemble.pairs[row.slots[slot]] for row in rows]
            expert, anti_expert = (
                self._pick(
                    logits,
                    [self._sources[Lane(m, r.index)] for m, r in zip(side, rows, strict=True)],
                )
                for side in ([p.expert for p in pairs], [p.anti_expert for p in pairs])
            )
            strength = alpha
            if isinstance(alpha, Tensor) and len(places) < len(self._rows):
                strength = alpha[list(places)]
            contributions.append(Contribution(expert, anti_expert, strength))
        return contributions

    def _steered(
        self, base: Tensor, contributions: Sequence[Contribution], places: Sequence[int]
    ) -> Steered:
        """Return what the policy makes of the rows at `places`; of a partial base, the offsets alone."""
        policy = self._ensemble.policy
        positions = None
        if policy.has_positions:
            counts = [len(self._rows[place].new_ids) for place in places]
            positions = torch.tensor(counts, device=self._device)
        # Offsets that do not depend on the base are what they add to 0.
        start = base if self._partial is None else torch.zeros_like(base)
        return apply_policy(
            policy, start, contributions, positions=positions, padding_ids=self._padding_ids
        )

    def _conflicts(
        self, base: Tensor, contributions: Sequence[Contribution], places: Sequence[int]
    ) -> list[bool]:
        """Return in which rows the experts would choose different tokens; nothing where no row asks."""
        if len(contributions) < 2 or not any(self._rows[place].job.explain for place in places):
            return []
        conflicts: list[bool] = has_conflict(self._masked(base), contributions).tolist()
        return conflicts

    def _weights(self, row: Row, weights: Tensor) -> dict[str, float] | None:
        """Return what the policy multiplied a row's strengths with; None of the published method."""
        if self._ensemble.policy.is_plain:
            return None
        values = dict(zip(self._steering_slots, weights.tolist(), strict=True))
        return {
            self._ensemble.pairs[which].name: values[slot]
            for slot, which in enumerate(row.slots)
            if slot in values
        }

    def _certified(
        self,
        block: Block,
        position: int,
        alive: Sequence[int],
        base: Tensor,
        offsets: Tensor,
    ) -> tuple[Tensor, Tensor, list[Proof]]:
        """Return seen tokens' logits, base and steered, and what they prove; ask where that may help."""
        assert self._partial is not None
        rows = None if len(alive) == len(self._rows) else alive
        bounds = [block.bounds[row][position] for row in alive]
        ceilings = torch.tensor([each.ceiling for each in bounds])
        temperatures = torch.tensor(
            [self._rows[row].job.sampling.temperature or 1.0 for row in alive]
        )
        asked = [0] * len(alive)
        while True:
            is_seen = ~torch.isneginf(base)
            steered = self._masked(base + offsets)
            upper = self._masked(upper_logits(base, offsets, ceilings=ceilings))
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
            base = base.clone()
            for (place, token_id), logprob in found.items():
                base[place, token_id] = logprob
        rests = torch.tensor([each.rest for each in bounds])
        lost = max_lost_prob(upper, is_seen, offsets, rests=rests, temperatures=temperatures)
        lost[torch.isinf(ceilings) & (ceilings > 0)] = 1.0
        # What filters keep of a draw depends on all tokens, and bounds do not tell.
        is_provable = [not self._rows[row].job.sampling.has_filters for row in alive]
        proofs = [
            Proof(same and provable, loss)
            for same, provable, loss in zip(
                (chosen == highest).tolist(), is_provable, lost.tolist(), strict=True
            )
        ]
        return base, steered, proofs

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

    def _views(
        self,
        logits: Mapping[Group, Tensor],
        row: Row,
        token_id: int,
        *,
        base: Tensor,
        steered: Tensor,
        bounds: Bounds | None,
    ) -> tuple[dict[str, View], float | None]:
        """Return what each member that reads a row gave a token, and KL(steered || base).

        Args:
            logits: Of the lanes.
            row: The row.
            token_id: The token.
            base: The row's logits, `[vocab]`.
            steered: The row's logits, `[vocab]`.
            bounds: Of what a partial base did not show.
        """
        num_top = row.job.explain_top
        base = self._masked(base)
        if bounds is None:
            seen = view(base, token_id, num_top=num_top)
            kl: float | None = kl_divergence(steered, base)
        else:
            seen = partial_view(base, token_id, ceiling=bounds.ceiling, num_top=num_top)
            kl = None
        # Of a partial base, normalised over what it showed, as the choice is.
        views = {"base": seen, "steered": view(steered, token_id, num_top=num_top)}
        for which in row.slots:
            pair = self._ensemble.pairs[which]
            for side, member in (("expert", pair.expert), ("anti_expert", pair.anti_expert)):
                name = f"{pair.name}.{side}"
                if member == 0:
                    views[name] = seen
                    continue
                own = self._pick(logits, [self._sources[Lane(member, row.index)]])[0]
                views[name] = view(self._masked(own), token_id, num_top=num_top)
        return views, kl

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
        base = self._member_logits(logits, 0, [0]).clone()
        wanted = torch.tensor(list(token_ids), device=base.device)
        found = self._steered(base, self._contributions(logits, [0]), [0]).logits
        if self._partial is None:
            return self._masked(found)[0, wanted], True
        offsets = found
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

    def _read(self) -> Block:
        """Run the models over the pending tokens and a draft."""
        device = self._device
        pending = torch.tensor([row.new_ids[-1] for row in self._rows], device=device)
        block = Block([], {}, {})
        self._num_blocks += 1
        self._is_looking = self._partial is not None or is_time_to_look(
            self._num_undrafted, len(self._rows)
        )
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
        self._num_undrafted = 0 if block.draft else self._num_undrafted + 1
        tokens = torch.stack([pending, *block.draft], dim=1)
        waiting = [group for group in self._groups if group not in block.stepwise]
        # All of them before the first forward: what moves from a device waits for what runs there. So models
        # on several devices run at the same time, and one on the CPU while those on accelerators do.
        inputs = [(group, self._inputs(group, tokens)) for group in waiting]
        for group, token_ids in sorted(
            inputs, key=lambda item: item[0].backend.device.type == "cpu"
        ):
            block.whole[group] = self._extend(group, token_ids)
            if self._partial is not None and group.backend is self._partial:
                block.bounds = self._partial.bounds(group.state)
        return block

    def _draft_ahead(self, block: Block) -> bool:
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

    def _draft(
        self, block: Block, pending: Tensor, drafter: Drafter, plan: Plan, limit: int
    ) -> None:
        """Let one group read token by token, and guess the next one after each, as far as that pays."""
        speculator = self._speculator
        assert speculator is not None and plan.source is not None
        group, covered = drafter.group, drafter.covered
        sources = [source for source in drafter.sources if source is not None]
        rows = None if len(covered) == len(self._rows) else covered
        steps = block.stepwise[group] = []
        is_adaptive = speculator.drafting.is_adaptive and self._partial is None
        rates = [row.rates[plan.source].value for row in self._rows]
        chances = [0.0 if source is None else 1.0 for source in drafter.sources]
        token_ids = pending
        while True:
            logits = self._run(group, token_ids[:, None])[:, 0]
            if group.backend.capabilities.reuses_logits:
                logits = logits.clone()  # needed until the whole draft is verified
            steps.append(logits)
            length = len(block.draft)
            if length >= limit:
                return
            guessing = self._masked(self._pick({group: logits}, sources))
            guesses = self._sampler.propose(guessing, ahead=length, rows=rows)
            if rows is None:
                token_ids = guesses
            else:
                token_ids = torch.full_like(pending, NO_TOKEN)
                token_ids[covered] = guesses
            if is_adaptive:
                sure = [0.0] * len(self._rows)
                for place, confidence in zip(
                    covered, self._confidence(guessing, guesses), strict=True
                ):
                    sure[place] = confidence
                mean = self._mean_confidence(plan.source, [sure[place] for place in covered])
                ahead = [
                    chance * min(1.0, rate * confidence / max(mean, 1e-3))
                    for chance, rate, confidence in zip(chances, rates, sure, strict=True)
                ]
                if not self._is_worth(plan, group, ahead, chances, length):
                    block.unused = token_ids
                    return
                chances = ahead
            block.draft.append(token_ids)
            if len(block.draft) >= limit:
                return  # what follows the last guess is asked for only where it was right
            if is_adaptive:
                following = [c * rate for c, rate in zip(chances, rates, strict=True)]
                if not self._is_worth(plan, group, following, chances, len(block.draft)):
                    return

    def _complete(self, block: Block) -> None:
        """Let the drafting models read the last guess: some row needs what follows it."""
        for group, steps in block.stepwise.items():
            if len(steps) <= len(block.draft):
                steps.append(self._run(group, block.draft[-1][:, None])[:, 0])

    def _looked_up(self, length: int, device: torch.device) -> list[Tensor]:
        drafts = []
        for row in self._rows:
            assert row.lookup is not None
            # A row without a match guesses its last token again, so that rows stay as long as each other.
            drafts.append(row.lookup.propose(length) or [row.new_ids[-1]] * length)
        return list(torch.tensor(drafts, device=device).t())

    def _run(self, group: Group, token_ids: Tensor) -> Tensor:
        """Append `[rows, num_tokens]` of the base's token ids; return `[lanes, num_tokens, their vocab]`."""
        return self._extend(group, self._inputs(group, token_ids))

    def _inputs(self, group: Group, token_ids: Tensor) -> Tensor:
        """Return `[rows, num_tokens]` of the base's token ids as `[lanes, num_tokens]` of a group's own."""
        if group.backend is not self._partial:
            token_ids = token_ids.clamp(
                min=0
            )  # a row without a guess reads any token, and forgets it
        if group.places != list(range(len(token_ids))):
            token_ids = token_ids[group.places]
        members = [self._ensemble.members[lane.member] for lane in group.lanes]
        if all(member.alignment is members[0].alignment for member in members):
            token_ids = members[0].alignment.ids_to_small(token_ids)
        else:
            rows = zip(members, token_ids, strict=True)
            token_ids = torch.stack([member.alignment.ids_to_small(row) for member, row in rows])
        return token_ids.to(group.backend.device)

    def _extend(self, group: Group, token_ids: Tensor) -> Tensor:
        """Append `[lanes, num_tokens]` of a group's own token ids, and note how long that takes."""
        speculator = self._speculator
        wait = synchronise(token_ids.device) if self._is_timed(token_ids.device) else None
        started = time.perf_counter()
        logits = group.backend.extend(group.state, token_ids)
        if speculator is not None and wait is not None:
            wait()
            seconds = time.perf_counter() - started
            self._forwards_s += seconds
            speculator.costs.observe(
                id(group.backend), len(group.lanes), token_ids.shape[1], seconds
            )
        return logits

    def _is_timed(self, device: torch.device) -> bool:
        if self._speculator is None or not self._speculator.drafting.is_adaptive:
            return False
        return device.type == "cpu" or self._num_blocks % SYNC_EVERY == 1

    def _reuse(self, group: Group, kept: Kept, job: Job) -> Tensor | None:
        """Go on from an earlier state as far as the prompts begin alike; return logits `[members, vocab]`.

        None where nothing can be reused. Rows that have less to read than others read their last token
        again, and forget it.
        """
        earlier = next((g for g in kept.groups if g.backend is group.backend), None)
        if earlier is None or earlier.members != group.members:
            return None
        backend = group.backend
        # A server keeps what it has read by itself; other tokens than the prompt's do not compare.
        if not backend.capabilities.can_rewind or backend.partial or backend.translation:
            return None
        prompts = [list(job.prompts[lane.member]) for lane in group.lanes]
        read = [kept.token_ids[lane.member] for lane in group.lanes]
        shared = [
            min(num_shared_tokens(prompt, tokens), len(prompt) - 1)
            for prompt, tokens in zip(prompts, read, strict=True)
        ]
        rests = [prompt[n:] for prompt, n in zip(prompts, shared, strict=True)]
        longest = max(map(len, rests))
        limit = group.backend.capabilities.max_context
        if not all(shared) or (limit is not None and max(shared) + longest > limit):
            return None
        group.state = earlier.state
        if group is self._groups[0]:
            self.num_reused = shared[0]
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
        if drafting.is_adaptive and not self._is_looking:
            return 0, None
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
            for lane, place in zip(group.lanes, group.places, strict=True):
                row = self._rows[place]
                held = len(row.job.prompts[lane.member]) + len(row.new_ids)
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
        drafter = None if source is None else self._drafter(source)
        total = self._rest_seconds(length + 1)
        for group in self._groups:
            is_drafting = drafter is not None and drafter.group is group
            width = 1 if is_drafting else length + 1
            seconds = self._forward_seconds(group, width)
            if seconds is None:
                return None
            total += seconds * (length + whole_chance) if is_drafting else seconds
        return total

    def _forward_seconds(self, group: Group, width: int) -> float | None:
        """Return what a forward of so many tokens a row costs; None before that is known."""
        assert self._speculator is not None
        is_on_cpu = group.backend.device.type == "cpu"
        return self._speculator.costs.estimate(
            id(group.backend),
            len(group.lanes),
            width,
            free_tokens=FREE_TOKENS_ON_CPU if is_on_cpu else FREE_TOKENS,
        )

    def _rest_seconds(self, width: int) -> float:
        """Return what a block costs beside its forwards; 0 before that is known."""
        assert self._speculator is not None
        return self._speculator.costs.estimate(REST, len(self._rows), width) or 0.0

    def _is_worth(
        self,
        plan: Plan,
        group: Group,
        ahead: Sequence[float],
        chances: Sequence[float],
        length: int,
    ) -> bool:
        """Whether to draft one token more than `length`; see `is_worth_drafting`."""
        num_rows = len(self._rows)
        step = self._forward_seconds(group, 1)
        if step is None:
            return False
        widening = self._rest_seconds(length + 2) - self._rest_seconds(length + 1)
        for other in self._groups:
            if other is not group:
                now, then = (self._forward_seconds(other, length + n) for n in (1, 2))
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
        block: Block,
        alive: Sequence[int],
        drafted: Sequence[int] | None,
        logits: Mapping[Group, Tensor],
    ) -> dict[Source, list[int | None]]:
        """Return what each source would guess for the tokens about to be chosen, to keep its rate current."""
        speculator = self._speculator
        if speculator is None or not speculator.drafting.is_adaptive or not self._is_looking:
            return {}
        guesses: dict[Source, list[int | None]] = {}
        for source in SOURCES:
            if not speculator.drafting.allows(source):
                continue
            if source == "lookup":
                found = [self._rows[row].lookup for row in alive]
                proposed = [lookup.propose(1) if lookup else [] for lookup in found]
                guesses[source] = [ids[0] if ids else None for ids in proposed]
            elif source == block.source and (drafted is not None or block.unused is not None):
                known = drafted
                if known is None:
                    assert block.unused is not None
                    known = block.unused.tolist()
                guesses[source] = [None if known[row] == NO_TOKEN else known[row] for row in alive]
            else:
                drafter = self._drafter(source)
                if drafter is None:
                    continue
                guessed = {
                    place: lane for place in alive if (lane := drafter.sources[place]) is not None
                }
                if not guessed:
                    continue
                proposal = self._sampler.propose(
                    self._masked(self._pick(logits, list(guessed.values()))),
                    ahead=0,
                    rows=None if len(guessed) == len(self._rows) else list(guessed),
                )
                ids = dict(zip(guessed, proposal.tolist(), strict=True))
                guesses[source] = [ids.get(place) for place in alive]
        return guesses

    def _drafter(self, source: Source | None) -> Drafter | None:
        """Return who drafts for a source; None where nobody can, or nothing could be gained."""
        base = self._groups[0]
        if source == "base":
            lanes = [Lane(0, row.index) for row in self._rows]
            own: list[LanePlace | None] = [self._sources[lane] for lane in lanes]
            return Drafter(base, own) if len(self._groups) > 1 else None
        if source != "expert":
            return None
        strongest: list[LanePlace | None] = []
        for row in self._rows:
            which = max(row.experts, key=lambda pair: abs(row.job.alphas[pair] or 0), default=None)
            found = None
            if which is not None:
                found = self._sources[Lane(self._ensemble.pairs[which].expert, row.index)]
            # An expert on the base's own weights costs what the base costs.
            strongest.append(None if found is None or found[0] is base else found)
        groups = [found[0] for found in strongest if found is not None]
        if not groups:
            return None
        # One group drafts, the one with most experts; rows whose expert is elsewhere go without.
        busiest = max(groups, key=groups.count)
        return Drafter(
            busiest,
            [found if found is not None and found[0] is busiest else None for found in strongest],
        )

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
        live = {row.index for row in self._rows}
        if self._first is not None:
            self._first.bounds = [self._first.bounds[p] for p in places if self._first.bounds]
        for group in list(self._groups):
            lanes = [place for place, lane in enumerate(group.lanes) if lane.row in live]
            if self._first is not None:
                self._first.whole[group] = self._first.whole[group][lanes]
            if lanes:
                group.state = group.backend.select(group.state, lanes)
                group.lanes = [group.lanes[lane] for lane in lanes]
            else:
                self._groups.remove(group)
        self._arrange()

    def _arrange(self) -> None:
        """Find the lanes of the live rows, and their strengths: a number where all agree, else `[rows]`."""
        places = {row.index: place for place, row in enumerate(self._rows)}
        self._sources: dict[Lane, LanePlace] = {}
        for group in self._groups:
            group.places = [places[lane.row] for lane in group.lanes]
            self._sources |= {lane: (group, place) for place, lane in enumerate(group.lanes)}
        self._alphas: list[float | Tensor] = []
        for slot in range(max(len(row.slots) for row in self._rows)):
            values = [
                (row.job.alphas[row.slots[slot]] or 0.0) if slot < len(row.slots) else 0.0
                for row in self._rows
            ]
            self._alphas.append(
                values[0]
                if len(set(values)) == 1
                else torch.tensor(values, dtype=torch.float32, device=self._device)
            )
        self._steering_slots = [
            slot for slot, alpha in enumerate(self._alphas) if isinstance(alpha, Tensor) or alpha
        ]
