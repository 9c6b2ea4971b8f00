"""The loop: a batch of rows is prefilled, steered, sampled and extended until each row ends.

Words: a *member* is one model as requests see it: a backend, perhaps an adapter on it, and the alignment
of its vocabulary with the base's. An *ensemble* is the base (member 0) with its steering pairs. A *job* is a
request, its prompt rendered per member; it becomes a *row*. A *lane* is one member reading one row: a row has
lanes for the base and for the pairs that steer it, and for no others. Lanes on one backend are rows of one
forward, whichever members and rows they belong to (`decode/lanes.py`).

A row's last token is *pending*: chosen, and not read by any model yet. A *block* is what the models read at
once: the pending token, then a draft, which is empty in plain decoding. Each step *plans* (a drafter fills in
the draft, `decode/drafting.py`), *reads* (the models run, `decode/reading.py`), *chooses* tokens position by
position for as long as the draft had guessed them (`decode/outlook.py`), and *takes back* what was read
beyond.

Rows do not influence each other: each has its own prompt, experts, strengths, seed, stop rules and length. A
batch can take over the rows of another one between two steps. Text appears here only through `TextStream`;
formats, recipes and files never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.decode.drafting import drafter_of
from proxytune.decode.ensemble import Ensemble, Job, check_job
from proxytune.decode.lanes import Block, Kept, Lanes, Row, grouped
from proxytune.decode.outlook import Steerer
from proxytune.decode.partial import PartialSteerer
from proxytune.decode.reading import prefill
from proxytune.decode.record import Recorder
from proxytune.decode.speculative import Speculator
from proxytune.logits.sample import BatchSampler
from proxytune.trace import FinishReason, Step, Usage


class Event(NamedTuple):
    """What happened to one row in one step."""

    row: int
    """Index into the jobs; for rows that joined, see `Batch.join`."""
    step: Step | None
    """The new token; None when the row ended without one."""
    finish_reason: FinishReason | None
    tail: str
    """Text that was held back and belongs to no step; only when the row ended without a token."""
    stopped_by: str | None = None
    """The stop string that ended the row."""


class DraftCount(NamedTuple):
    """How many tokens were drafted for a row, and how many of them were the ones chosen."""

    proposed: int
    accepted: int


class Batch:
    """Rows that decode together. Build it, then call `step` until `is_done`.

    Args:
        ensemble: The models.
        jobs: What to generate.
        speculator: Says who drafts and how far; None for plain decoding. What is generated is the same.
        kept: What an earlier row left; used if this batch's only prompt begins alike, and not to be used
            again after that.
        keeps: Leave in `left` what the models have read of each row that ends, if they can copy it.

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
        for job in jobs:
            check_job(ensemble, job)
        groups = grouped(ensemble, jobs)
        prompts, num_reused = prefill(ensemble, jobs, groups, kept)
        self._first: Block | None = prompts
        """The block of the prompts, until tokens were chosen after it."""
        self.num_reused = num_reused
        """How many tokens of the base's prompt were not read again."""
        rows = [Row.begin(ensemble, index, job) for index, job in enumerate(jobs)]
        device = prompts.whole[groups[0]].device
        sampler = BatchSampler(
            [job.sampling for job in jobs],
            [job.prompts[0] for job in jobs],
            [sorted(row.ending_ids) for row in rows],
            vocab_size=groups[0].backend.vocab_size,
            device=device,
        )
        self.seeds = list(sampler.seeds)
        """The seed of each job, drawn if it has none; None for greedy ones."""
        self._lanes = Lanes(ensemble, rows, groups, sampler, device)
        self._drafter = drafter_of(self._lanes, speculator)
        self._reader = self._drafter.reader
        for row in rows:
            self._drafter.begin(row)
        partial = groups[0].backend.partial
        lanes = self._lanes
        self._steerer = Steerer(lanes) if partial is None else PartialSteerer(lanes, partial)
        self.draft_counts: dict[int, DraftCount] = {}
        """How many tokens were drafted for rows that have ended, by their numbers."""
        self._usages: dict[int, Usage | None] = {}
        self.left: dict[int, Kept] = {}
        """What the models have read of rows that have ended, by their numbers."""
        self._keeps = keeps and self.can_join
        self._is_exact = groups[0].backend.capabilities.is_exact
        self._num_begun = len(jobs)
        self._last_ended: Row | None = None

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return not self._lanes.rows

    @property
    def num_rows(self) -> int:
        """How many rows have not ended."""
        return len(self._lanes.rows)

    # One block ------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Read one block, choose at least one token for each live row, and return what happened."""
        events = self.drop_cancelled()
        if self.is_done:
            return events
        block, self._first = self._first, None
        if block is None:
            block = self._reader.begin()
            self._drafter.draft(block)
            self._reader.read(block)
        rows = self._lanes.rows
        num_kept = [0] * len(rows)  # drafted tokens that stay
        alive = list(range(len(rows)))  # the rows whose draft was right so far
        ended: set[int] = set()
        drafts = torch.stack(block.draft).tolist() if block.draft else []
        for position, drafted in enumerate(drafts):
            events += self._choose(block, position, alive, drafted, ended)
            alive = [at for at in alive if at not in ended and rows[at].new_ids[-1] == drafted[at]]
            if not alive:
                break
            for place in alive:
                num_kept[place] += 1
        else:
            self._reader.complete(block)
            events += self._choose(block, len(drafts), alive, None, ended)
        self._reader.take_back(block, num_kept)
        if ended:
            for place in ended:
                self._end(place)
            self._lanes.select([place for place in range(len(rows)) if place not in ended])
        self._reader.finish(block)
        return events

    def _choose(
        self,
        block: Block,
        position: int,
        alive: Sequence[int],
        drafted: Sequence[int] | None,
        ended: set[int],
    ) -> list[Event]:
        """Choose the token that follows a position, for the rows whose draft was right so far.

        `drafted` is every row's drafted token, None after the draft's end. Rows that end go into `ended`.
        """
        if self._is_exact and len(alive) > 1:
            # A policy's sums over the vocabulary are rounded otherwise for several rows than for one.
            each = [self._choose(block, position, [row], drafted, ended) for row in alive]
            return [event for events in each for event in events]
        lanes, drafter = self._lanes, self._drafter
        rows = lanes.rows
        outlook = self._steerer.outlook(block, position, alive)
        guesses = drafter.guess(outlook, drafted)
        token_ids, logprobs = lanes.sampler.sample(outlook.steered, alive).as_lists()
        recorder = Recorder(lanes, outlook)
        events = []
        for at, place in enumerate(alive):
            row, token_id, logprob = rows[place], token_ids[at], logprobs[at]
            if outlook.refuses(at, row):
                events.append(Event(row.index, None, "uncertified", row.text.finish()))
                row.has_pending = False
                ended.add(place)
                continue
            if logprob != logprob:  # not a number
                raise self._steerer.no_choice(row)
            drafter.observe(row, token_id, at, guesses)
            reason, text = row.push(token_id)
            step = recorder.step(at, row, token_id, logprob, reason, text)
            events.append(Event(row.index, step, reason, "", row.text.stopped_by))
            if reason is not None:
                ended.add(place)
        return events

    def _end(self, place: int) -> None:
        """Take note of a row's counts and costs, and keep what the models have read of it."""
        row = self._lanes.rows[place]
        self._usages[row.index] = self._steerer.usage(place)
        self.draft_counts[row.index] = DraftCount(row.num_drafted, row.num_accepted)
        self._drafter.end(row)
        # A row that was cancelled before its first token has nothing pending.
        can_keep = bool(row.new_ids) and row.has_pending
        self._last_ended = row if can_keep else None
        if can_keep and self._keeps:
            self.left[row.index] = self._lanes.copy_of(row)

    # Rows that come and go ------------------------------------------------------------------------------

    @property
    def can_join(self) -> bool:
        """Whether rows of other batches can be taken over, and these by another one."""
        return all(group.backend.capabilities.can_merge for group in self._lanes.groups)

    def join(self, other: Batch) -> int:
        """Take over the rows of another batch of the same ensemble, which must not be used any more.

        What they generate stays the same. Both batches must have taken a step, and `can_join`.

        Returns:
            What is added to the numbers of the other's rows.
        """
        assert self._lanes.ensemble is other._lanes.ensemble and self.can_join and other.can_join
        assert self._first is None and other._first is None
        offset = self._num_begun
        self._num_begun += other._num_begun
        if not other.is_done:
            self._lanes.join(other._lanes, offset)
        return offset

    def drop_cancelled(self) -> list[Event]:
        """End the rows that were cancelled, as the next step would do."""
        events, live = [], []
        for place, row in enumerate(self._lanes.rows):
            if row.job.cancelled is not None and row.job.cancelled():
                events.append(Event(row.index, None, "cancelled", row.text.finish()))
                self._end(place)
            else:
                live.append(place)
        if events:
            self._lanes.select(live, self._first)
        return events

    def forget(self, row: int) -> None:
        """Forget what is known of a row that has ended, in a batch that others keep joining."""
        self.draft_counts.pop(row, None)
        self.left.pop(row, None)
        self._usages.pop(row, None)

    def usage(self, row: int) -> Usage | None:
        """Return what a row's calls to an API have cost so far; None if the base runs here."""
        for place, live in enumerate(self._lanes.rows):
            if live.index == row:
                return self._steerer.usage(place)
        return self._usages.get(row)

    def kept(self) -> Kept | None:
        """Return what a finished batch of one row leaves for a prompt that begins alike; None for others."""
        row = self._last_ended
        if row is None or not self.is_done or self._num_begun != 1:
            return None
        return self._lanes.kept(row, self._lanes.groups)

    def first_logits(self, token_ids: Sequence[int]) -> tuple[Tensor, bool]:
        """Return the steered logits of some tokens as the only row's first token, and if the best is certain.

        Call it before `step`. A partial base is asked about tokens that it did not show; logits that stay
        unknown are -inf.

        Args:
            token_ids: The tokens, in the base's vocabulary.

        Returns:
            `[num token_ids]` float32, and whether no unknown one of them can exceed the highest known one.
        """
        assert self._first is not None and self.num_rows == 1
        return self._steerer.first_logits(self._first, token_ids)
