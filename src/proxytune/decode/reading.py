"""Models run over prompts and blocks; what was read of a wrong draft is taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from proxytune.backends.base import num_shared_tokens
from proxytune.decode.ensemble import Ensemble, Job
from proxytune.decode.lanes import Block, Kept, LaneGroup, Lanes
from proxytune.decode.speculative import FREE_TOKENS, FREE_TOKENS_ON_CPU, REST, Costs

Read = TypeVar("Read")

SYNC_EVERY = 16
"""On an accelerator one block in this many is timed, since reading the clock waits for the device."""


def prefill(
    ensemble: Ensemble, jobs: Sequence[Job], groups: Sequence[LaneGroup], kept: Kept | None
) -> tuple[Block, int]:
    """Let every model read its prompts, filling in the groups' states.

    What an earlier row left is used where the only prompt begins alike. Returns the logits after the prompts,
    and how many tokens of the base's prompt were not read again.
    """
    block = Block()
    num_reused = 0
    for group in groups:
        reused = _reuse(group, kept, jobs[0]) if kept is not None and len(jobs) == 1 else None
        if reused is not None:
            logits, num_shared = reused
            block.whole[group] = logits[:, None]
            num_reused = num_shared if group is groups[0] else num_reused
            continue
        prompts = [jobs[lane.row].prompts[lane.member] for lane in group.lanes]
        if (partial := group.backend.partial) is not None:
            num_new = [job.sampling.max_new_tokens for job in jobs]
            group.state, logits = partial.prefill(prompts, num_new_tokens=num_new)
        else:
            adapters = [ensemble.members[lane.member].adapter for lane in group.lanes]
            group.state, logits = group.backend.prefill(prompts, adapters=adapters)
        block.whole[group] = logits[:, None]
    return block, num_reused


def _reuse(group: LaneGroup, kept: Kept, job: Job) -> tuple[Tensor, int] | None:
    """Go on from an earlier state as far as the prompts begin alike.

    Returns logits `[members, vocab]`, and how many tokens the first member does not read again; None if
    nothing is reused.
    """
    backend = group.backend
    earlier = next((g for g in kept.groups if g.backend is backend), None)
    if earlier is None or earlier.members != group.members:
        return None
    # A server keeps what it has read by itself; tokens that are not the prompt's cannot be compared with it.
    if not backend.capabilities.can_rewind or backend.partial or backend.translation:
        return None
    if not backend.capabilities.reuses_prompts:
        return None
    prompts = [list(job.prompts[lane.member]) for lane in group.lanes]
    read = [kept.token_ids[lane.member] for lane in group.lanes]
    shared = [
        min(num_shared_tokens(prompt, tokens), len(prompt) - 1)
        for prompt, tokens in zip(prompts, read, strict=True)
    ]
    if not all(shared):
        return None
    held = list(map(len, read))
    resumed = backend.resume(earlier.state, prompts, num_held=held, num_shared=shared)
    if resumed is None:
        return None
    group.state, logits, num_kept = resumed
    return logits, num_kept[0]


class Reader:
    """Runs the models of a batch over its blocks."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def begin(self) -> Block:
        """Return a block of the pending tokens, which nobody has read yet."""
        return Block(self.upload([row.new_ids[-1] for row in self._lanes.rows]))

    def upload(self, token_ids: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Return token ids as a tensor where the batch's logits are: the way of all tokens to a device."""
        return torch.tensor(token_ids, device=self._lanes.device)

    def read(self, block: Block) -> None:
        """Let the models that have not drafted read the pending tokens and the draft."""
        assert block.pending is not None
        tokens = torch.stack([block.pending, *block.draft], dim=1)
        # A row without a guess reads any token, and forgets it; a partial base wants to know where rows end.
        filled = tokens.clamp(min=0) if block.draft else tokens
        # All inputs before the first forward: what moves from a device waits for what runs there. So models
        # on several devices run at the same time, and one on the CPU while those on accelerators do.
        inputs = [
            (group, self._inputs(group, filled if group.backend.partial is None else tokens))
            for group in self._lanes.groups
            if group not in block.stepwise
        ]
        if len(inputs) > 1:
            inputs.sort(key=lambda item: item[0].backend.device.type == "cpu")
        guests = self._lanes.guests([group for group, _ in inputs])
        for group, token_ids in inputs:
            if group not in guests and not (guests and group is self._lanes.base):
                block.whole[group] = self._extend(group, token_ids)
        if guests:
            self._read_together(block, guests, dict(inputs))

    def _read_together(
        self, block: Block, guests: Sequence[LaneGroup], inputs: Mapping[LaneGroup, Tensor]
    ) -> None:
        """Let the base and models with its output matrix read, with one product of that for all of them."""
        states = [self._final_states(group, inputs[group]) for group in guests]
        base = self._lanes.base
        others = states[0] if len(states) == 1 else torch.cat(states)
        block.whole[base], logits = self._extend_with(base, inputs[base], others)
        parts = torch.split(logits, [len(part) for part in states])
        block.whole.update(zip(guests, parts, strict=True))

    def run(self, group: LaneGroup, token_ids: Tensor) -> Tensor:
        """Let one group read a token of the base's for each row, `[rows]`; return `[lanes, their vocab]`."""
        return self._extend(group, self._inputs(group, token_ids.clamp(min=0)[:, None]))[:, 0]

    def complete(self, block: Block) -> None:
        """Let the drafting models read the last guess: some row needs what follows it."""
        for group, steps in block.stepwise.items():
            if len(steps) <= len(block.draft):
                steps.append(self.run(group, block.draft[-1]))

    def take_back(self, block: Block, num_kept: Sequence[int]) -> None:
        """Make every model forget what it read of a draft beyond the first `num_kept[row]` tokens."""
        if not block.draft:
            return
        for group in self._lanes.groups:
            steps = block.stepwise.get(group)
            num_read = len(block.draft) if steps is None else len(steps) - 1
            surplus = [num_read - num_kept[place] for place in group.places]
            if any(surplus):
                group.backend.rewind(group.state, surplus)

    def finish(self, block: Block) -> None:
        """Take note that a block's tokens are chosen."""

    def _inputs(self, group: LaneGroup, token_ids: Tensor) -> Tensor:
        """Return `[rows, num_tokens]` of the base's token ids as `[lanes, num_tokens]` of a group's own."""
        if group.order is not None:
            token_ids = token_ids[group.order]
        if group.alignment is not None:
            token_ids = group.alignment.ids_to_small(token_ids)
        else:
            members = [self._lanes.ensemble.members[lane.member] for lane in group.lanes]
            rows = zip(members, token_ids, strict=True)
            token_ids = torch.stack([member.alignment.ids_to_small(row) for member, row in rows])
        return token_ids.to(group.backend.device)

    def _extend(self, group: LaneGroup, token_ids: Tensor) -> Tensor:
        """Append `[lanes, num_tokens]` of a group's own token ids."""
        return group.backend.extend(group.state, token_ids)

    def _final_states(self, group: LaneGroup, token_ids: Tensor) -> Tensor:
        """Append a guest's tokens, leaving its logits to the base."""
        return group.backend.final_states(group.state, token_ids)

    def _extend_with(
        self, group: LaneGroup, token_ids: Tensor, others: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append the base's tokens, and make its guests' logits."""
        return group.backend.extend_with(group.state, token_ids, others)


class TimedReader(Reader):
    """Measures what blocks cost, and says what the next one would."""

    def __init__(self, lanes: Lanes, costs: Costs) -> None:
        super().__init__(lanes)
        self._costs = costs
        self._num_blocks = 0
        self._num_rows = 0
        self._is_on_cpu = False
        self._started = self._forwards_s = 0.0

    def begin(self) -> Block:
        """Return a block of the pending tokens, and start the clock."""
        self._started, self._forwards_s = time.perf_counter(), 0.0
        self._num_blocks += 1
        self._num_rows = len(self._lanes.rows)
        # Where a model runs elsewhere, time beside the forwards holds what nobody waited for.
        groups = self._lanes.groups
        self._is_on_cpu = all(group.backend.device.type == "cpu" for group in groups)
        return super().begin()

    def finish(self, block: Block) -> None:
        """Count what the block took beside its forwards."""
        if block.pending is not None and self._is_on_cpu:
            seconds = time.perf_counter() - self._started - self._forwards_s
            self._costs.observe(REST, self._num_rows, len(block.draft) + 1, seconds)

    def forward_seconds(
        self, group: LaneGroup, width: int, *, ahead: LaneGroup | None = None
    ) -> float | None:
        """Return what a forward of `width` tokens per row costs; None before that is known.

        Args:
            group: What reads.
            width: How many tokens.
            ahead: The group that drafts, and so reads by itself; the others read together.
        """
        free = FREE_TOKENS_ON_CPU if group.backend.device.type == "cpu" else FREE_TOKENS
        lanes = self._lanes
        guests = lanes.guests([other for other in lanes.groups if other is not ahead])
        is_together = group in guests or (bool(guests) and group is lanes.base)
        # What was not measured yet is taken to cost what it does in the other way.
        for way in (is_together, not is_together):
            key = id(group.backend), way
            seconds = self._costs.estimate(key, len(group.lanes), width, free_tokens=free)
            if seconds is not None:
                return seconds
        return None

    def rest_seconds(self, width: int) -> float:
        """Return what a block of `width` tokens costs beside its forwards; 0 before that is known."""
        return self._costs.estimate(REST, len(self._lanes.rows), width) or 0.0

    def _extend(self, group: LaneGroup, token_ids: Tensor) -> Tensor:
        run = super()._extend
        return self._timed(group, token_ids, lambda: run(group, token_ids), is_together=False)

    def _final_states(self, group: LaneGroup, token_ids: Tensor) -> Tensor:
        run = super()._final_states
        return self._timed(group, token_ids, lambda: run(group, token_ids), is_together=True)

    def _extend_with(
        self, group: LaneGroup, token_ids: Tensor, others: Tensor
    ) -> tuple[Tensor, Tensor]:
        run = super()._extend_with
        return self._timed(
            group, token_ids, lambda: run(group, token_ids, others), is_together=True
        )

    def _timed(
        self, group: LaneGroup, token_ids: Tensor, run: Callable[[], Read], *, is_together: bool
    ) -> Read:
        """Run a forward and take note of its time."""
        if token_ids.device.type != "cpu" and self._num_blocks % SYNC_EVERY != 1:
            return run()
        wait = _synchronise(token_ids.device)
        started = time.perf_counter()
        answer = run()
        wait()
        seconds = time.perf_counter() - started
        self._forwards_s += seconds
        key = id(group.backend), is_together
        self._costs.observe(key, len(group.lanes), token_ids.shape[1], seconds)
        return answer


def _synchronise(device: torch.device) -> Callable[[], None]:
    """Wait until a device has done all it was given, and return what waits for it again."""
    if device.type == "cpu":
        return lambda: None
    wait: Callable[[], None] = getattr(torch, device.type).synchronize
    wait()
    return wait
