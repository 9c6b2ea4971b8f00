"""Which model reads which row, and where its logits are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from proxytune.backends.base import (
    Backend,
    Bounds,
    num_shared_tokens,
)
from proxytune.decode.ensemble import Ensemble, Job, members_of
from proxytune.decode.lookup import PromptLookup
from proxytune.decode.speculative import (
    Rate,
    Source,
)
from proxytune.text.detokenize import TextStream


class Lane(NamedTuple):
    """One member reading one row."""

    member: int
    row: int  # `Row.index`


@dataclass(slots=True, eq=False)
class Group:
    """The lanes on one backend, in the order of its state's rows: by member, then by row."""

    backend: Backend[Any]
    lanes: list[Lane]
    state: Any = None
    places: list[int] = field(default_factory=list)
    """Of the lanes' rows in the batch."""

    @property
    def members(self) -> list[int]:
        """The members of the lanes."""
        return list(dict.fromkeys(lane.member for lane in self.lanes))


LanePlace = tuple[Group, int]
"""Where a lane's logits are: its group, and its place there."""


@dataclass(slots=True)
class Row:
    """What the loop remembers of a row beside the models' states."""

    index: int
    job: Job
    text: TextStream
    ending_ids: frozenset[int]
    lookup: PromptLookup | None
    rates: dict[Source, Rate]
    slots: tuple[int, ...]
    """The pairs that have lanes."""
    new_ids: list[int] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0
    has_pending: bool = True

    @property
    def experts(self) -> tuple[int, ...]:
        """The pairs that steer."""
        return tuple(which for which in self.slots if self.job.alphas[which])

    @property
    def num_left(self) -> int:
        """How many tokens may still be chosen."""
        return self.job.sampling.max_new_tokens - len(self.new_ids)


@dataclass(slots=True)
class Block:
    """What the models say after each token of a block: the pending one, then the draft.

    Args:
        draft: For each drafted position, every row's token, `[rows]` each; NO_TOKEN where it has none.
        whole: Logits of groups that read the block at once, `[lanes, 1 + draft length, their vocab]`.
        stepwise: Logits of groups that read it token by token, `[lanes, their vocab]` for each token read.
        source: Who drafted.
        unused: What the source would have drafted next, every row's token, and did not for its cost.
        bounds: Of what a partial base did not show, by row and position.
    """

    draft: list[Tensor]
    whole: dict[Group, Tensor]
    stepwise: dict[Group, list[Tensor]]
    source: Source | None = None
    unused: Tensor | None = None
    bounds: list[list[Bounds]] = field(default_factory=list)

    def at(self, position: int) -> dict[Group, Tensor]:
        """Return every group's logits after the token at `position`, `[lanes, their vocab]`."""
        logits = {group: part[:, position] for group, part in self.whole.items()}
        return logits | {group: parts[position] for group, parts in self.stepwise.items()}


@dataclass(slots=True, eq=False)
class Kept:
    """What the models have read of one row, for a prompt that begins alike.

    Args:
        groups: With their states.
        token_ids: What each member has read, in its own vocabulary.
    """

    groups: list[Group]
    token_ids: dict[int, list[int]]

    @property
    def num_tokens(self) -> int:
        """How many tokens the base has read."""
        return len(self.token_ids[0])

    def num_shared(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many tokens the base would not have to read again of a job's prompts."""
        return num_shared_tokens(self.token_ids[0], prompts[0])


def grouped(ensemble: Ensemble, jobs: Sequence[Job]) -> list[Group]:
    """Return the lanes of jobs, by backend; the base's come first."""
    needed = [members_of(ensemble, job) for job in jobs]
    groups: dict[int, Group] = {}
    for member in sorted({member for members in needed for member in members}):
        backend = ensemble.members[member].backend
        group = groups.setdefault(id(backend), Group(backend, []))
        group.lanes += [Lane(member, row) for row, own in enumerate(needed) if member in own]
    return list(groups.values())
