"""Choices proved from a part of the base's logits, as a base behind an API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune.backends.base import Bounds, PartialBackend
from proxytune.decode.lanes import Block, Lanes, Row
from proxytune.decode.outlook import Outlook, Steerer
from proxytune.errors import BackendError
from proxytune.logits.certificate import Proof, max_lost_prob, upper_logits
from proxytune.trace import Usage

MAX_REVEALED = 4
"""How many tokens a partial base is asked about to certify one choice, at most: each may cost a call."""


class PartialSteerer(Steerer):
    """Steers a base that shows the logprobs of a few tokens.

    A token is chosen from those that are known. If what is known does not prove that the full logits give
    the same token, the base is asked about the token that stands in the way.
    """

    def __init__(self, lanes: Lanes, backend: PartialBackend[Any]) -> None:
        super().__init__(lanes)
        self._backend = backend

    def outlook(self, block: Block, position: int, places: Sequence[int]) -> Outlook:
        """Return what is known of the next token of rows, and what it proves."""
        lanes = self._lanes
        rows = [lanes.rows[place] for place in places]
        logits = block.at(position)
        base = lanes.base_logits(logits, places)
        # Policies that work with a partial base give offsets that do not depend on it. What the base's
        # weight adds does, so the base, and the bounds of what it does not show, are scaled instead.
        contributions = lanes.contributions(logits, places, has_base=False)
        scales = lanes.base_scales(places)[:, None]
        found = self._steer(torch.zeros_like(base), contributions, places)
        offsets = found.logits
        every = self._backend.bounds(lanes.base.state)
        bounds = [every[place][position] for place in places]
        ceilings = torch.tensor([each.ceiling for each in bounds])
        num_asked = [0] * len(places)
        while True:
            is_seen = ~torch.isneginf(base)
            steered = lanes.masked(scales * base + offsets)
            upper = lanes.masked(upper_logits(base, offsets, ceilings=ceilings, scales=scales))
            chosen = lanes.sampler.peek(steered, places)
            highest = lanes.sampler.peek(upper, places)
            doubtful = [
                at
                for at in (chosen != highest).nonzero().flatten().tolist()
                if num_asked[at] < MAX_REVEALED
                and ceilings[at] < torch.inf
                and _may_help(rows[at], upper[at], steered[at], is_seen[at])
            ]
            revealed = {}
            for at in doubtful:
                num_asked[at] += 1
                token_id = int(highest[at])
                answer = self._reveal(places[at], len(block.draft) - position, [token_id])
                if token_id in answer:
                    revealed[at, token_id] = answer[token_id]
                else:
                    num_asked[at] = MAX_REVEALED
            if not revealed:
                break
            base = base.clone()
            for (at, token_id), logprob in revealed.items():
                base[at, token_id] = logprob
        lost = _lost_probs(rows, bounds, upper, is_seen, offsets, scales)
        # What filters keep depends on the logits of all tokens, which bounds do not determine.
        is_proved = [
            same and not row.job.sampling.has_filters
            for row, same in zip(rows, (chosen == highest).tolist(), strict=True)
        ]
        proofs = [Proof(*each) for each in zip(is_proved, lost.tolist(), strict=True)]
        weights = found.weights
        if any(pair.reads_base for pair in lanes.ensemble.pairs):
            contributions = lanes.contributions(logits, places)
        return Outlook(block, places, logits, base, contributions, steered, weights, bounds, proofs)

    def first_logits(self, block: Block, token_ids: Sequence[int]) -> tuple[Tensor, bool]:
        """Return the steered logits of certain tokens; those that were not shown are asked for."""
        lanes = self._lanes
        logits = block.at(0)
        base = lanes.base_logits(logits, [0]).clone()
        contributions = lanes.contributions(logits, [0], has_base=False)
        scales = lanes.base_scales([0])[:, None]
        offsets = self._steer(torch.zeros_like(base), contributions, [0]).logits
        wanted = list(token_ids)
        missing = [token_id for token_id in wanted if base[0, token_id] == -torch.inf]
        for token_id, logprob in (self._reveal(0, 0, missing) if missing else {}).items():
            base[0, token_id] = logprob
        ceilings = torch.tensor([self._backend.bounds(lanes.base.state)[0][0].ceiling])
        upper = upper_logits(base, offsets, ceilings=ceilings, scales=scales)
        upper = lanes.masked(upper)[0, wanted]
        steered = lanes.masked(scales * base + offsets)[0, wanted]
        return steered, bool((upper[steered == -torch.inf] < steered.max()).all())

    def usage(self, place: int) -> Usage:
        """Return what the calls for a row have cost."""
        return self._backend.usage(self._lanes.base.state, place)

    def no_choice(self, row: Row) -> BackendError:
        """Say why no token could be chosen."""
        return BackendError(
            f"none of the tokens that the base showed after {len(row.new_ids)} new ones may be chosen.\n"
            "hint: a larger top_logprobs shows more"
        )

    def _reveal(self, place: int, num_back: int, token_ids: Sequence[int]) -> dict[int, float]:
        return self._backend.reveal(self._lanes.base.state, place, num_back, token_ids)


def _may_help(row: Row, upper: Tensor, steered: Tensor, is_seen: Tensor) -> bool:
    """Whether few enough tokens are in the way of a proof to ask about each; arguments are one row's."""
    if not row.job.sampling.is_greedy:
        return True
    return int((upper.masked_fill(is_seen, -torch.inf) > steered.max()).sum()) <= MAX_REVEALED


def _lost_probs(
    rows: Sequence[Row],
    bounds: Sequence[Bounds],
    upper: Tensor,
    is_seen: Tensor,
    offsets: Tensor,
    scales: Tensor,
) -> Tensor:
    """Bound the steered probability of the tokens that were not shown, `[rows]`."""
    rests = torch.tensor([each.rest for each in bounds])
    temperatures = torch.tensor([row.job.sampling.temperature or 1.0 for row in rows])
    ceilings = torch.tensor([each.ceiling for each in bounds])
    lost = max_lost_prob(
        upper,
        is_seen,
        offsets,
        rests=rests,
        temperatures=temperatures,
        scales=scales,
        ceilings=ceilings,
    )
    # Where what is known is an estimate, nothing is proved.
    lost[ceilings == torch.inf] = 1.0
    return lost
