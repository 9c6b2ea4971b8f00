"""Which model reads which row, where its logits are, and what steers each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune.backends.base import Backend, num_shared_tokens
from proxytune.decode.ensemble import (
    Ensemble,
    Job,
    Pair,
    members_of,
    pairs_of,
    policy_of,
    scale_of_base,
)
from proxytune.decode.speculative import PromptLookup, Rate, Source
from proxytune.logits.sample import BatchSampler
from proxytune.logits.steer import UNWEIGHTED, Contribution, Weights, weighted
from proxytune.policy import Policy
from proxytune.text.detokenize import TextStream
from proxytune.text.vocab import Alignment
from proxytune.trace import FinishReason


class Lane(NamedTuple):
    """One member reading one row."""

    member: int
    row: int  # `Row.index`


@dataclass(slots=True, eq=False)
class LaneGroup:
    """The lanes on one backend, in the order of its state's rows: by member, then by row."""

    backend: Backend[Any]
    lanes: list[Lane]
    state: Any = None
    places: list[int] = field(default_factory=list)
    """For each lane, the place of its row among the live ones."""
    order: Tensor | None = None
    """The same on the batch's device; None if the lanes are the live rows, one each, in their order."""
    alignment: Alignment | None = None
    """The alignment that all lanes share; None if they have several."""

    @property
    def members(self) -> list[int]:
        """The members of the lanes."""
        return list(dict.fromkeys(lane.member for lane in self.lanes))


LaneRef = tuple[LaneGroup, int]
"""A lane, by its group and its index there: where its logits are."""


@dataclass(slots=True)
class Row:
    """What the loop remembers of a row, apart from the models' states."""

    index: int
    job: Job
    text: TextStream
    ending_ids: frozenset[int]
    pairs: tuple[int, ...]
    """The pairs that have lanes."""
    policy: Policy
    """How strongly and by which of them it is steered at each token."""
    new_ids: list[int] = field(default_factory=list)
    has_pending: bool = True
    """Whether the last new token waits to be read; a row that ended without a token has none."""
    rates: dict[Source, Rate] = field(default_factory=dict)
    lookup: PromptLookup | None = None
    room: int | None = None
    """How many new tokens fit behind the prompt in every model's context; None for no limit."""
    num_drafted: int = 0
    num_accepted: int = 0

    @classmethod
    def begin(cls, ensemble: Ensemble, index: int, job: Job) -> Row:
        """Return a row without new tokens."""
        sampling = job.sampling
        prompt, least = job.prompts[0], sampling.min_new_tokens
        text = TextStream(
            ensemble.tokenizer, stop=sampling.stop, prompt_ids=prompt, min_tokens=least
        )
        eos_token_ids = () if sampling.ignore_eos else ensemble.eos_token_ids
        ending_ids = frozenset((*sampling.stop_token_ids, *eos_token_ids))
        return cls(index, job, text, ending_ids, pairs_of(job), policy_of(ensemble, job))

    @property
    def experts(self) -> tuple[int, ...]:
        """The pairs that steer."""
        return tuple(which for which in self.pairs if self.job.alphas[which])

    @property
    def num_left(self) -> int:
        """How many tokens may still be chosen."""
        return self.job.sampling.max_new_tokens - len(self.new_ids)

    def push(self, token_id: int) -> tuple[FinishReason | None, str]:
        """Append a token; return why the row ends, if it does, and the text that became safe to show."""
        self.new_ids.append(token_id)
        if token_id in self.ending_ids:
            return "stop", self.text.finish()
        text = self.text.push(token_id)
        if self.text.stopped:
            return "stop", text
        if self.num_left <= 0:
            text += self.text.finish()  # which may complete a stop string that was held back
            return "stop" if self.text.stopped else "length", text
        return None, text


@dataclass(slots=True)
class Block:
    """What the models read at once and what they say after each token: the pending one, then the draft.

    Args:
        pending: Every row's pending token, `[rows]`; None after the prompts.
        draft: For each drafted position, every row's token, `[rows]` each; NO_TOKEN where it has none.
        whole: Logits of groups that read the block at once, `[lanes, 1 + draft length, their vocab]`.
        stepwise: Logits of groups that read it token by token, `[lanes, their vocab]` for each token read.
        source: Who drafted.
        unused: What the source would have drafted next for every row, and did not because of its cost.
    """

    pending: Tensor | None = None
    draft: list[Tensor] = field(default_factory=list)
    whole: dict[LaneGroup, Tensor] = field(default_factory=dict)
    stepwise: dict[LaneGroup, list[Tensor]] = field(default_factory=dict)
    source: Source | None = None
    unused: Tensor | None = None

    def at(self, position: int) -> dict[LaneGroup, Tensor]:
        """Return every group's logits after the token at `position`, `[lanes, their vocab]`."""
        logits = {group: part[:, position] for group, part in self.whole.items()}
        for group, parts in self.stepwise.items():
            logits[group] = parts[position]
        return logits


@dataclass(slots=True, eq=False)
class Kept:
    """What the models have read of one row, for a later prompt that begins alike.

    Args:
        groups: The row's lanes, with their states.
        token_ids: What each member has read, in its own vocabulary.
    """

    groups: list[LaneGroup]
    token_ids: dict[int, list[int]]

    @property
    def num_tokens(self) -> int:
        """How many tokens the base has read."""
        return len(self.token_ids[0])

    def num_shared(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many tokens of a job's prompts the base would not have to read again."""
        return num_shared_tokens(self.token_ids[0], prompts[0])


def grouped(ensemble: Ensemble, jobs: Sequence[Job]) -> list[LaneGroup]:
    """Return the lanes of jobs, by backend; the base's come first."""
    needed = [members_of(ensemble, job) for job in jobs]
    groups: dict[int, LaneGroup] = {}
    for member in sorted({member for members in needed for member in members}):
        backend = ensemble.members[member].backend
        group = groups.setdefault(id(backend), LaneGroup(backend, []))
        group.lanes += [Lane(member, row) for row, own in enumerate(needed) if member in own]
    return list(groups.values())


class _Pick(NamedTuple):
    """Lanes of one group and one alignment, which one index takes."""

    group: LaneGroup
    lanes: list[int]
    alignment: Alignment

    def of(self, logits: Mapping[LaneGroup, Tensor]) -> Tensor:
        """Return the lanes' logits in the base's vocabulary, `[lanes, vocab]`."""
        part, start = logits[self.group], self.lanes[0]
        if self.lanes == list(range(start, start + len(self.lanes))):
            part = part[start : start + len(self.lanes)]  # a view: nothing is copied
        else:
            part = part[self.lanes]
        return self.alignment.logits_to_base(part)


class _Side(NamedTuple):
    """A lane for each live row, and how the logits of all of them are picked at once."""

    refs: list[LaneRef]
    picks: list[_Pick]


class _Weighting(NamedTuple):
    """Weights and output bias of each row's nth pair; see `weighted`."""

    weights: Weights
    """Each a number if all rows agree, otherwise `[rows]` float64 on the CPU."""
    bias: Tensor | None
    """`[vocab]` if all rows agree, otherwise `[rows, vocab]`."""
    unmapped: float | Tensor | None

    @classmethod
    def of(
        cls, pairs: Sequence[Pair | None], width: int, device: torch.device
    ) -> _Weighting | None:
        """Return what belongs to each row's pair, None for a row without one; None if there is nothing."""
        every = [UNWEIGHTED if pair is None else pair.weights for pair in pairs]
        biases = [None if pair is None else pair.bias for pair in pairs]
        has_bias = any(own is not None for own in biases)
        if all(own == UNWEIGHTED for own in every) and not has_bias:
            return None
        weights = Weights(*(_shared([float(own[n]) for own in every]) for n in range(3)))
        bias: Tensor | None = None
        if biases[0] is not None and all(own is biases[0] for own in biases):
            bias = biases[0].dense(width, device)
        elif has_bias:
            none = torch.zeros(width, device=device)
            rows = [none if own is None else own.dense(width, device) for own in biases]
            bias = torch.stack(rows)
        marks = [torch.nan if p is None or p.unmapped is None else p.unmapped for p in pairs]
        is_mapped = not all(mark != mark for mark in marks)
        return cls(weights, bias, _shared(marks) if is_mapped else None)

    def applied(
        self, part: Contribution, base: Tensor | None, places: Sequence[int] | None
    ) -> Contribution:
        """Return the contribution of the rows at `places`, or of all for None, with weights and bias."""
        weights, bias, unmapped = self
        if places is not None:
            own = list(places)
            weights = Weights(*(w[own] if isinstance(w, Tensor) else w for w in weights))
            bias = bias[own] if bias is not None and bias.dim() > 1 else bias
            unmapped = unmapped[own] if isinstance(unmapped, Tensor) else unmapped
        return weighted(part, base, weights=weights, bias=bias, unmapped=unmapped)


def _shared(values: Sequence[float]) -> float | Tensor:
    """Return a number that all rows share, or one for each."""
    return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=torch.float64)


class _NthPairs(NamedTuple):
    """The nth pair of each row, and how strongly it steers there."""

    nth: int
    alpha: float | Tensor
    """A number if all rows agree, otherwise `[rows]`."""
    expert: _Side
    anti_expert: _Side
    is_unshared: Tensor | None
    """`[rows, vocab]`, as in `Contribution`; None if no pair lacks tokens."""
    weighting: _Weighting | None
    """None if all rows have weights of 1 and no bias."""


class Lanes:
    """The live rows, the lanes that read them, and what steers them.

    Args:
        ensemble: The models.
        rows: In the order of the sampler's rows.
        groups: Their lanes, the base's first.
        sampler: Chooses their tokens.
        device: Where logits are brought together: the base's.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        rows: list[Row],
        groups: list[LaneGroup],
        sampler: BatchSampler,
        device: torch.device,
    ) -> None:
        self.ensemble = ensemble
        self.rows = rows
        self.groups = groups
        self.sampler = sampler
        self.device = device
        self.num_arranged = 0
        """How often rows have come or gone."""
        padding_ids = ensemble.vocabulary.padding_ids.to(device)
        self.padding_ids = padding_ids if len(padding_ids) else None
        self._arrange()

    @property
    def base(self) -> LaneGroup:
        """The lanes on the base's backend."""
        return self.groups[0]

    def guests(self, reading: Sequence[LaneGroup]) -> list[LaneGroup]:
        """Return which of the groups that read a block have their logits made by the base.

        None if the base does not read it with them.
        """
        if self.base not in reading:
            return []
        return [group for group in reading if group.backend.host is self.base.backend]

    def ref(self, member: int, row: Row) -> LaneRef:
        """Return the lane in which a member reads a row."""
        return self._refs[Lane(member, row.index)]

    # Logits ---------------------------------------------------------------------------------------------

    def base_logits(self, logits: Mapping[LaneGroup, Tensor], places: Sequence[int]) -> Tensor:
        """Return what the base says of the rows at `places`, `[rows, vocab]`."""
        return self._side_logits(self._base, logits, places)

    def contributions(
        self,
        logits: Mapping[LaneGroup, Tensor],
        places: Sequence[int],
        *,
        has_base: bool = True,
    ) -> list[Contribution]:
        """Return what steers the rows at `places`; in each contribution, every row has a pair of its own.

        Args:
            logits: Every lane's.
            places: Ascending.
            has_base: Whether to include what the base's weight adds; otherwise `base_scales` has it.
        """
        found = []
        for pairs in self._steering:
            alpha = pairs.alpha
            if isinstance(alpha, Tensor) and len(places) < len(self.rows):
                alpha = alpha[list(places)]
            expert = self._side_logits(pairs.expert, logits, places)
            anti_expert = self._side_logits(pairs.anti_expert, logits, places)
            is_unshared = pairs.is_unshared
            if is_unshared is not None and len(places) < len(self.rows):
                is_unshared = is_unshared[list(places)]
            part = Contribution(expert, anti_expert, alpha, is_unshared)
            if pairs.weighting is not None:
                base = self.base_logits(logits, places) if has_base else None
                some = places if len(places) < len(self.rows) else None
                part = pairs.weighting.applied(part, base, some)
            found.append(part)
        return found

    def base_scales(self, places: Sequence[int]) -> Tensor:
        """Return what steering multiplies the base's logits with, `[rows]` float32."""
        jobs = [self.rows[place].job for place in places]
        return torch.tensor([scale_of_base(self.ensemble, job) for job in jobs])

    def pick(self, logits: Mapping[LaneGroup, Tensor], refs: Sequence[LaneRef]) -> Tensor:
        """Return what lanes say, in the base's vocabulary and on its device, `[refs, vocab]`."""
        return self._gather(logits, self._picks(refs))

    def masked(self, logits: Tensor) -> Tensor:
        """Return logits with padding ids at -inf."""
        if self.padding_ids is None:
            return logits
        return logits.index_fill(-1, self.padding_ids, -torch.inf)

    def weights_by_name(self, row: Row, weights: Sequence[float]) -> dict[str, float]:
        """Name the pairs that a policy's weights for a row, one for each of `contributions`, belong to."""
        return {
            self.ensemble.pairs[row.pairs[pairs.nth]].name: weight
            for pairs, weight in zip(self._steering, weights, strict=True)
            if pairs.nth < len(row.pairs) and row.job.alphas[row.pairs[pairs.nth]]
        }

    def _side_logits(
        self, side: _Side, logits: Mapping[LaneGroup, Tensor], places: Sequence[int]
    ) -> Tensor:
        if len(places) == len(side.refs):
            return self._gather(logits, side.picks)
        return self.pick(logits, [side.refs[place] for place in places])

    def _gather(self, logits: Mapping[LaneGroup, Tensor], picks: Sequence[_Pick]) -> Tensor:
        parts = [pick.of(logits).to(self.device) for pick in picks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _picks(self, refs: Sequence[LaneRef]) -> list[_Pick]:
        """Return how to index the logits of some lanes, in their order, in as few pieces as possible."""
        picks: list[_Pick] = []
        members = self.ensemble.members
        for group, lane in refs:
            alignment = group.alignment or members[group.lanes[lane].member].alignment
            if not picks or picks[-1].group is not group or picks[-1].alignment is not alignment:
                picks.append(_Pick(group, [], alignment))
            picks[-1].lanes.append(lane)
        return picks

    # Rows that come and go ------------------------------------------------------------------------------

    def select(self, places: Sequence[int], block: Block | None = None) -> None:
        """Keep the rows at the given places, ascending, also in a block from which no token was chosen."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        if not places:
            return  # The states stay as they are: `Batch.kept` hands them on.
        self.sampler.select(places)
        live = {row.index for row in self.rows}
        for group in list(self.groups):
            lanes = [which for which, lane in enumerate(group.lanes) if lane.row in live]
            if block is not None:
                block.whole[group] = block.whole[group][lanes]
            if lanes:
                group.state = group.backend.select(group.state, lanes)
                group.lanes = [group.lanes[which] for which in lanes]
            else:
                self.groups.remove(group)
        self._arrange()

    def join(self, other: Lanes, offset: int) -> None:
        """Take over another batch's rows, after the own ones; `offset` is added to their numbers.

        The other lanes are of the same ensemble, on backends that can merge, and must not be used after.
        """
        for row in other.rows:
            row.index += offset
        for theirs in other.groups:
            theirs.lanes = [Lane(lane.member, lane.row + offset) for lane in theirs.lanes]
        if not self.rows:
            self.rows, self.groups, self.sampler = other.rows, other.groups, other.sampler
            self._arrange()
            return
        for theirs in other.groups:
            mine = next((g for g in self.groups if g.backend is theirs.backend), None)
            if mine is None:
                self.groups.append(theirs)
                continue
            lanes = [*mine.lanes, *theirs.lanes]
            # A stable sort: within a member the own rows come first, as they do in the batch.
            order = sorted(range(len(lanes)), key=lambda which: lanes[which].member)
            mine.state = mine.backend.merge(mine.state, theirs.state, order)
            mine.lanes = [lanes[which] for which in order]
        self.rows = [*self.rows, *other.rows]
        self.sampler.join(other.sampler)
        self._arrange()

    def copy_of(self, row: Row) -> Kept:
        """Return what the models have read of a row, in states of its own."""
        groups = []
        for group in self.groups:
            lanes = [which for which, lane in enumerate(group.lanes) if lane.row == row.index]
            if lanes:
                state = group.backend.copy(group.state, lanes)
                own = [group.lanes[which] for which in lanes]
                groups.append(LaneGroup(group.backend, own, state))
        return self.kept(row, groups)

    def kept(self, row: Row, groups: list[LaneGroup]) -> Kept:
        """Return what groups with the lanes of one row have read."""
        read = torch.tensor(row.new_ids[:-1], dtype=torch.long)  # the last one stays unread
        token_ids = {}
        for member in (member for group in groups for member in group.members):
            new_ids = self.ensemble.members[member].alignment.ids_to_small(read).tolist()
            token_ids[member] = [*row.job.prompts[member], *new_ids]
        return Kept(groups, token_ids)

    def _arrange(self) -> None:
        """Find the live rows' lanes, and what steers them how strongly."""
        self.num_arranged += 1
        places = {row.index: place for place, row in enumerate(self.rows)}
        self._refs: dict[Lane, LaneRef] = {}
        for group in self.groups:
            group.places = [places[lane.row] for lane in group.lanes]
            is_in_order = group.places == list(range(len(self.rows)))
            group.order = None if is_in_order else torch.tensor(group.places, device=self.device)
            alignments = [self.ensemble.members[member].alignment for member in group.members]
            is_shared = all(alignment is alignments[0] for alignment in alignments)
            group.alignment = alignments[0] if is_shared else None
            self._refs |= {lane: (group, which) for which, lane in enumerate(group.lanes)}
        self._base = self._side([(0, row) for row in self.rows])
        self._steering = [
            _NthPairs(nth, alpha, *self._sides(nth), self._unshared(nth), self._weighting(nth))
            for nth in range(max(len(row.pairs) for row in self.rows))
            if isinstance(alpha := self._alpha(nth), Tensor) or alpha
        ]

    def _alpha(self, nth: int) -> float | Tensor:
        """Return the strength of each row's nth pair, 0 in rows that have fewer pairs."""
        pairs = [row.pairs[nth : nth + 1] for row in self.rows]
        own = zip(self.rows, pairs, strict=True)
        alphas = [(row.job.alphas[pair[0]] or 0.0) if pair else 0.0 for row, pair in own]
        if len(set(alphas)) == 1:
            return alphas[0]
        return torch.tensor(alphas, dtype=torch.float32, device=self.device)

    def _sides(self, nth: int) -> tuple[_Side, _Side]:
        """Return the expert's and the anti-expert's lane of each row's nth pair."""
        # A row with fewer pairs has strength 0 here, so the logits of any row will do.
        stand_in = next(row for row in self.rows if nth < len(row.pairs))
        rows = [row if nth < len(row.pairs) else stand_in for row in self.rows]
        pairs = [(self.ensemble.pairs[row.pairs[nth]], row) for row in rows]
        experts = self._side([(pair.expert, row) for pair, row in pairs])
        return experts, self._side([(pair.anti_expert, row) for pair, row in pairs])

    def _unshared(self, nth: int) -> Tensor | None:
        """Return the tokens that each row's nth pair does not share; see `_NthPairs`."""
        masks = [None if pair is None else pair.is_unshared for pair in self._nth_pairs(nth)]
        if all(mask is None for mask in masks):
            return None
        none = torch.zeros(self.ensemble.vocabulary.width, dtype=torch.bool)
        return torch.stack([none if mask is None else mask for mask in masks]).to(self.device)

    def _weighting(self, nth: int) -> _Weighting | None:
        """Return weights and bias of each row's nth pair; see `_NthPairs`."""
        return _Weighting.of(self._nth_pairs(nth), self.ensemble.vocabulary.width, self.device)

    def _nth_pairs(self, nth: int) -> list[Pair | None]:
        """Return each row's nth pair; None in rows that have fewer."""
        pairs = self.ensemble.pairs
        return [pairs[row.pairs[nth]] if nth < len(row.pairs) else None for row in self.rows]

    def _side(self, lanes: Sequence[tuple[int, Row]]) -> _Side:
        refs = [self.ref(member, row) for member, row in lanes]
        return _Side(refs, self._picks(refs))
