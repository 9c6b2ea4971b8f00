"""Who drafts the next block, and how far; `decode/speculative.py` has the numbers behind it.

A drafter fills in a block's draft before the models that did not draft read it, guesses each token before it
is chosen, and observes what was chosen. There are four: `Drafter` itself, which never drafts; drafts of a
fixed length; drafts that last as long as they pay; and drafts that save calls to a base behind an API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune.backends.base import NO_TOKEN, PartialBackend
from proxytune.decode.ensemble import members_of
from proxytune.decode.lanes import Block, LaneGroup, LaneRef, Lanes, Row
from proxytune.decode.outlook import Outlook
from proxytune.decode.reading import Reader, TimedReader
from proxytune.decode.speculative import (
    RATE_MEMORY,
    SOURCES,
    Drafting,
    Plan,
    PromptLookup,
    Source,
    Speculator,
    best_plan,
    is_time_to_look,
    is_worth_drafting,
)

AHEAD_TOKENS = 16
"""How many tokens of a partial base's known continuation the small models read at once, at most."""


class Guesser(NamedTuple):
    """Whose guesses become the draft."""

    group: LaneGroup
    refs: list[LaneRef | None]
    """The group's lane for each row, None for a row without."""
    covered: list[int]
    """The places of the rows that have one."""
    covered_refs: list[LaneRef]
    """Their lanes."""

    @classmethod
    def of(cls, group: LaneGroup, refs: Sequence[LaneRef | None]) -> Guesser:
        """Return the guesser that uses those of the lanes that belong to the group."""
        own = [ref if ref is not None and ref[0] is group else None for ref in refs]
        covered = [place for place, ref in enumerate(own) if ref is not None]
        return cls(group, own, covered, [ref for ref in own if ref is not None])


class Guesses(NamedTuple):
    """What was guessed for the next token of some rows, before it is chosen."""

    drafted: Sequence[int]
    """The draft's token for each row, NO_TOKEN where it has none; empty without a draft."""
    by_source: Mapping[Source, Sequence[int | None]]
    """What each source would guess for each row, None where it cannot."""


NO_GUESSES = Guesses((), {})


@dataclass(slots=True)
class _Ahead:
    """A draft on its way."""

    plan: Plan
    guesser: Guesser
    chances: list[float]
    """By row, that the draft is right so far."""
    length: int = 0


class Drafter:
    """Never drafts: plain decoding."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        """Runs the models."""

    def begin(self, row: Row) -> None:
        """Prepare a new row."""

    def draft(self, block: Block) -> None:
        """Fill in a block's draft, and what the drafting models have read for it."""

    def guess(self, outlook: Outlook, drafted: Sequence[int] | None) -> Guesses:
        """Return what is guessed for the tokens about to be chosen.

        `drafted` is every row's drafted token; None after the draft's end.
        """
        return NO_GUESSES

    def observe(self, row: Row, token_id: int, at: int, guesses: Guesses) -> None:
        """Compare the token chosen for a row, which does not have it yet, with its guess at index `at`."""

    def end(self, row: Row) -> None:
        """Keep what a row has taught for later ones."""


class FixedDrafter(Drafter):
    """Drafts of one source, as long as the speculator allows."""

    def __init__(self, lanes: Lanes, reader: Reader, speculator: Speculator) -> None:
        super().__init__(reader)
        self._lanes = lanes
        self._speculator = speculator
        self._drafting = speculator.drafting
        self._is_learning = False
        """Whether rates of acceptance matter, so that sources are asked what they would guess."""
        self._guessers: dict[Source, Guesser | None] = {}
        self._num_arranged = 0

    def begin(self, row: Row) -> None:
        """Prepare a new row."""
        row.rates = self._speculator.begin_rates(row.experts)
        if self._drafting.allows("lookup"):
            row.lookup = PromptLookup(row.job.prompts[0])
        ensemble, prompts = self._lanes.ensemble, row.job.prompts
        rooms = [
            limit - len(prompts[index])
            for index in members_of(ensemble, row.job)
            if (limit := ensemble.members[index].backend.capabilities.max_context) is not None
        ]
        row.room = min(rooms, default=None)

    def draft(self, block: Block) -> None:
        """Fill in a block's draft, and what the drafting models have read for it."""
        plan = self._plan()
        if plan is None or plan.source is None:
            return
        block.source = plan.source
        if plan.source == "lookup":
            block.draft = self._look_up(plan.length)
        else:
            self._run_ahead(block, plan)

    def guess(self, outlook: Outlook, drafted: Sequence[int] | None) -> Guesses:
        """Return the draft's tokens, and what every source would guess if that is to be learned."""
        own = () if drafted is None else [drafted[place] for place in outlook.places]
        return Guesses(own, self._guess_all(outlook, drafted) if self._is_learning else {})

    def observe(self, row: Row, token_id: int, at: int, guesses: Guesses) -> None:
        """Count what was drafted and accepted, and keep acceptance rates current."""
        if guesses.drafted and guesses.drafted[at] != NO_TOKEN:
            row.num_drafted += 1
            row.num_accepted += guesses.drafted[at] == token_id
        for source, guessed in guesses.by_source.items():
            if guessed[at] is not None:
                row.rates[source].observe(guessed[at] == token_id)
        if row.lookup is not None:
            row.lookup.push(token_id)

    def end(self, row: Row) -> None:
        """Keep the row's rates for later rows with the same experts."""
        self._speculator.end_rates(row.experts, row.rates)

    def _guess_all(
        self, outlook: Outlook, drafted: Sequence[int] | None
    ) -> dict[Source, Sequence[int | None]]:
        """Return what each allowed source would guess for the outlook's rows."""
        lanes, block, places = self._lanes, outlook.block, outlook.places
        guesses: dict[Source, Sequence[int | None]] = {}
        for source in SOURCES:
            if not self._drafting.allows(source):
                continue
            if source == "lookup":
                lookups = [lanes.rows[place].lookup for place in places]
                proposed = [lookup.propose(1) if lookup else [] for lookup in lookups]
                guesses[source] = [ids[0] if ids else None for ids in proposed]
            elif source == block.source and (known := _drafted(block, drafted)) is not None:
                own = [known[place] for place in places]
                guesses[source] = [None if token_id == NO_TOKEN else token_id for token_id in own]
            elif (guesser := self._guesser(source)) is not None:
                refs = {p: ref for p in places if (ref := guesser.refs[p]) is not None}
                if refs:
                    guessing = lanes.masked(lanes.pick(outlook.logits, list(refs.values())))
                    found = lanes.sampler.propose(guessing, ahead=0, rows=list(refs))
                    ids = dict(zip(refs, found.tolist(), strict=True))
                    guesses[source] = [ids.get(place) for place in places]
        return guesses

    # How far --------------------------------------------------------------------------------------------

    def _plan(self) -> Plan | None:
        """Return who drafts how many tokens; None for nobody."""
        source = self._drafting.source
        assert source != "auto"
        length = self._longest(self._drafting.max_tokens)
        if length <= 0 or (source != "lookup" and self._guesser(source) is None):
            return None
        return Plan(source, length, 0.0)

    def _longest(self, limit: int) -> int:
        """Return how long a draft may be: what is still wanted, and what every context holds."""
        rows = self._lanes.rows
        limit = min(limit, max(row.num_left for row in rows) - 1)
        rooms = [row.room - len(row.new_ids) for row in rows if row.room is not None]
        return min(limit, *rooms) if rooms else limit

    # Who ------------------------------------------------------------------------------------------------

    def _guesser(self, source: Source) -> Guesser | None:
        """Return who drafts for a source; None if nobody can, or nothing could be gained."""
        if self._num_arranged != self._lanes.num_arranged:
            self._num_arranged = self._lanes.num_arranged
            self._guessers = {"expert": self._strongest(), "base": self._base()}
        return self._guessers[source]

    def _base(self) -> Guesser | None:
        lanes = self._lanes
        refs = [lanes.ref(0, row) for row in lanes.rows]
        return Guesser.of(lanes.base, refs) if len(lanes.groups) > 1 else None

    def _strongest(self) -> Guesser | None:
        """Return each row's expert of greatest strength, as far as they are on one backend."""
        lanes = self._lanes
        refs: list[LaneRef | None] = []
        for row in lanes.rows:
            alphas = row.job.alphas
            which = max(row.experts, key=lambda pair: abs(alphas[pair] or 0), default=None)
            ref = None if which is None else lanes.ref(lanes.ensemble.pairs[which].expert, row)
            # An expert on the base's own weights costs what the base costs.
            refs.append(None if ref is None or ref[0] is lanes.base else ref)
        groups = [ref[0] for ref in refs if ref is not None]
        if not groups:
            return None
        # One group drafts, the one with most experts; rows whose expert is elsewhere go without.
        return Guesser.of(max(groups, key=groups.count), refs)

    # Drafts ---------------------------------------------------------------------------------------------

    def _look_up(self, length: int) -> list[Tensor]:
        """Return what prompt lookup guesses for every row, `[rows]` for each position."""
        drafts = []
        for row in self._lanes.rows:
            assert row.lookup is not None
            # A row without a match guesses its last token again, so that rows stay as long as each other.
            drafts.append(row.lookup.propose(length) or [row.new_ids[-1]] * length)
        return list(self.reader.upload(drafts).t())

    def _run_ahead(self, block: Block, plan: Plan) -> None:
        """Let one group read token by token, and guess the next one after each."""
        assert plan.source is not None and block.pending is not None
        guesser = self._guesser(plan.source)
        assert guesser is not None
        lanes, group, covered = self._lanes, guesser.group, guesser.covered
        is_overwritten = group.backend.capabilities.reuses_logits
        steps = block.stepwise[group] = []
        token_ids = block.pending
        ahead = _Ahead(plan, guesser, [0.0 if ref is None else 1.0 for ref in guesser.refs])
        while True:
            logits = self.reader.run(group, token_ids)
            if is_overwritten:
                logits = logits.clone()  # needed until the whole draft is verified
            steps.append(logits)
            logits = lanes.masked(lanes.pick({group: logits}, guesser.covered_refs))
            guessed = lanes.sampler.propose(logits, ahead=len(block.draft), rows=covered)
            token_ids = guessed
            if len(covered) < len(lanes.rows):
                token_ids = torch.full_like(block.pending, NO_TOKEN)
                token_ids[covered] = guessed
            if not self._admits(ahead, logits, guessed):
                block.unused = token_ids
                return
            block.draft.append(token_ids)
            # What follows the last guess is asked for only if that was right.
            if len(block.draft) >= plan.length or not self._goes_on(ahead):
                return

    def _admits(self, ahead: _Ahead, logits: Tensor, guessed: Tensor) -> bool:
        """Whether to draft guesses, `[covered rows]`, made from logits, `[covered rows, vocab]`."""
        return True

    def _goes_on(self, ahead: _Ahead) -> bool:
        """Whether to run the drafting model for another guess."""
        return True


def _drafted(block: Block, drafted: Sequence[int] | None) -> Sequence[int] | None:
    """Return every row's drafted token, or the one that the source would have drafted next."""
    return block.unused.tolist() if drafted is None and block.unused is not None else drafted


class AdaptiveDrafter(FixedDrafter):
    """Drafts as far as it pays, by measured costs and acceptance rates, down to not at all."""

    def __init__(self, lanes: Lanes, reader: TimedReader, speculator: Speculator) -> None:
        super().__init__(lanes, reader, speculator)
        self._clock = reader
        self._num_undrafted = 0
        self._is_learning = True
        self._confidences: dict[Source, float] = {}
        """How probable each source lately found its own guesses."""

    def draft(self, block: Block) -> None:
        """Draft if it pays; without recent drafts, find out less often whether it does."""
        self._is_learning = is_time_to_look(self._num_undrafted, len(self._lanes.rows))
        if self._is_learning:
            super().draft(block)
        self._num_undrafted = 0 if block.draft else self._num_undrafted + 1

    def _plan(self) -> Plan | None:
        limit = self._longest(self._drafting.max_tokens)
        if limit <= 0:
            return None
        rows = self._lanes.rows
        able: list[Source] = [
            source
            for source in ("expert", "base")
            if self._drafting.allows(source) and self._guesser(source) is not None
        ]
        rates = {source: self._rates(source) for source in able}
        has_match = [row.lookup is not None and bool(row.lookup.propose(1)) for row in rows]
        if self._drafting.allows("lookup") and any(has_match):
            own = zip(self._rates("lookup"), has_match, strict=True)
            rates["lookup"] = [rate if found else 0.0 for rate, found in own]
        plan = best_plan(rates, self._block_seconds, limit)
        if plan is None or plan.source == "lookup":
            return plan
        if plan.source is None:
            # None pays on average; where a source is sure of a token, that token may.
            return plan._replace(source=able[0], length=limit) if able else None
        return plan._replace(length=limit)

    def _block_seconds(self, source: Source | None, length: int, whole: float) -> float | None:
        """Return what a block costs; see `best_plan`."""
        guesser = None if source is None or source == "lookup" else self._guesser(source)
        total = self._clock.rest_seconds(length + 1)
        for group in self._lanes.groups:
            is_drafting = guesser is not None and guesser.group is group
            seconds = self._clock.forward_seconds(
                group,
                1 if is_drafting else length + 1,
                ahead=None if guesser is None else guesser.group,
            )
            if seconds is None:
                return None
            total += seconds * (length + whole) if is_drafting else seconds
        return total

    def _admits(self, ahead: _Ahead, logits: Tensor, guessed: Tensor) -> bool:
        assert ahead.plan.source is not None
        chosen = logits.gather(1, guessed[:, None])[:, 0]
        probs: list[float] = (chosen - logits.logsumexp(-1)).float().exp().tolist()
        mean = max(self._mean_confidence(ahead.plan.source, probs), 1e-3)
        rates = self._rates(ahead.plan.source)
        chances = [0.0] * len(rates)
        for place, prob in zip(ahead.guesser.covered, probs, strict=True):
            # The rate is right on average; guesses that the model is surer of are right more often.
            chances[place] = ahead.chances[place] * min(1.0, rates[place] * prob / mean)
        if not self._is_worth(ahead, chances):
            return False
        ahead.chances = chances
        ahead.length += 1
        return True

    def _goes_on(self, ahead: _Ahead) -> bool:
        assert ahead.plan.source is not None
        rates = self._rates(ahead.plan.source)
        return self._is_worth(ahead, [c * r for c, r in zip(ahead.chances, rates, strict=True)])

    def _rates(self, source: Source) -> list[float]:
        return [row.rates[source].value for row in self._lanes.rows]

    def _mean_confidence(self, source: Source, probs: Sequence[float]) -> float:
        """Return the running mean of the probability that a source gives its guesses."""
        for prob in probs:
            mean = self._confidences.get(source, prob)
            self._confidences[source] = mean + (prob - mean) / RATE_MEMORY
        return self._confidences[source]

    def _is_worth(self, ahead: _Ahead, chances: Sequence[float]) -> bool:
        """Whether to draft one token more, with which the draft is right with these chances by row."""
        clock, length, num_rows = self._clock, ahead.length, len(chances)
        drafting = ahead.guesser.group
        step = clock.forward_seconds(drafting, 1, ahead=drafting)
        if step is None:
            return False
        widening = clock.rest_seconds(length + 2) - clock.rest_seconds(length + 1)
        for group in self._lanes.groups:
            if group is not drafting:
                now, then = (
                    clock.forward_seconds(group, length + n, ahead=drafting) for n in (1, 2)
                )
                widening += max(0.0, (then or 0.0) - (now or 0.0))
        # A forward of the drafting model is needed anyway if its guess proves right.
        in_vain = max(chances)
        if length:
            in_vain = 1 - sum(ahead.chances) / num_rows + sum(chances) / num_rows
        return is_worth_drafting(
            chances,
            seconds_per_token=ahead.plan.seconds_per_token,
            draft_seconds=step * in_vain,
            widening_seconds=widening,
        )


class CallDrafter(FixedDrafter):
    """Drafts that save calls to a partial base, beside which the small models' time is nothing.

    If the base's continuation is known from an earlier answer, it is drafted: that costs no call. Otherwise
    the next call returns either the base's own continuation, which serves for as long as steering agrees with
    it, or the base's logprobs along a draft of the expert: whichever was right more often lately.
    """

    def __init__(self, lanes: Lanes, speculator: Speculator, backend: PartialBackend[Any]) -> None:
        super().__init__(lanes, Reader(lanes), speculator)
        self._is_learning = self._drafting.is_adaptive
        self._backend = backend

    def draft(self, block: Block) -> None:
        """Draft what is known of the base's continuation; if nothing is, go on as other drafters do."""
        if known := self._known_continuation():
            block.source, block.draft = "base", known
        else:
            super().draft(block)

    def _known_continuation(self) -> list[Tensor]:
        """Return the base's continuation as far as it is known, `[rows]` for each position."""
        limit = self._longest(AHEAD_TOKENS)
        rows = self._lanes.rows
        pending = [row.new_ids[-1] for row in rows]
        known = self._backend.lookahead(self._lanes.base.state, pending)
        ahead = [ids[:limit] for ids in known]
        longest = max(map(len, ahead))
        if not longest:
            return []
        filled = [ids + [NO_TOKEN] * (longest - len(ids)) for ids in ahead]
        return list(self.reader.upload(filled).t())

    def _plan(self) -> Plan | None:
        length = self._longest(self._drafting.max_tokens)
        can_draft = self._drafting.allows("expert") and self._guesser("expert") is not None
        if length <= 0 or not can_draft or not self._backend.can_score:
            return None
        rates = [row.rates for row in self._lanes.rows]
        gain = sum(own["expert"].value for own in rates) - sum(own["base"].value for own in rates)
        return None if self._drafting.is_adaptive and gain <= 0 else Plan("expert", length, 0.0)


def drafter_of(lanes: Lanes, speculator: Speculator | None) -> Drafter:
    """Return who drafts for a batch; without a speculator, plain decoding."""
    partial = lanes.base.backend.partial
    if not all(group.backend.capabilities.can_rewind for group in lanes.groups):
        return Drafter(Reader(lanes))  # A wrong draft could not be taken back.
    if partial is not None:
        # Plain decoding of a partial base also drafts, but only the base's known continuation.
        return CallDrafter(lanes, speculator or Speculator(Drafting(max_tokens=0)), partial)
    if speculator is None:
        return Drafter(Reader(lanes))
    if speculator.drafting.is_adaptive:
        return AdaptiveDrafter(lanes, TimedReader(lanes, speculator.costs), speculator)
    return FixedDrafter(lanes, Reader(lanes), speculator)
