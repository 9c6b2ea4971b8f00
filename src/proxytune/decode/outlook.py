"""What the models say of the next token, combined: the steered logits that a token is chosen from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxytune.backends.base import Bounds
from proxytune.decode.lanes import Block, LaneGroup, Lanes, Row
from proxytune.errors import BackendError
from proxytune.logits.certificate import Proof
from proxytune.logits.rules import Steered, apply_policies
from proxytune.logits.steer import Contribution
from proxytune.trace import Usage


@dataclass(slots=True)
class Outlook:
    """What is known of the next token of some rows before it is chosen.

    Args:
        block: What was read.
        places: The rows' places among the live ones.
        logits: Every lane's logits, in its member's vocabulary.
        base: The base's logits, `[rows, vocab]`.
        contributions: What steers the base.
        steered: The logits that tokens are chosen from, `[rows, vocab]` float32, padding ids at -inf.
        weights: What the policy multiplied the strengths with, `[contributions, rows]`.
        bounds: What is known of the tokens that a partial base did not show, by row.
        proofs: What a partial base's logits prove about the choice, by row.
    """

    block: Block
    places: Sequence[int]
    logits: Mapping[LaneGroup, Tensor]
    base: Tensor
    contributions: list[Contribution]
    steered: Tensor
    weights: Tensor
    bounds: Sequence[Bounds] = ()
    proofs: Sequence[Proof] = ()

    def refuses(self, at: int, row: Row) -> bool:
        """Whether a row wants only tokens that are proved, and its next one is not."""
        is_strict = bool(self.proofs) and row.job.sampling.require_certified
        return is_strict and not self.proofs[at].is_certified


class Steerer:
    """Steers a base that shows all its logits."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def outlook(self, block: Block, position: int, places: Sequence[int]) -> Outlook:
        """Return what is known of the next token of the rows at `places`, after a block's `position`."""
        lanes = self._lanes
        logits = block.at(position)
        base = lanes.base_logits(logits, places)
        contributions = lanes.contributions(logits, places)
        found = self._steer(base, contributions, places)
        steered = lanes.masked(found.logits)
        return Outlook(block, places, logits, base, contributions, steered, found.weights)

    def first_logits(self, block: Block, token_ids: Sequence[int]) -> tuple[Tensor, bool]:
        """Return the steered logits of certain tokens; see `Batch.first_logits`."""
        return self.outlook(block, 0, [0]).steered[0, list(token_ids)], True

    def usage(self, place: int) -> Usage | None:
        """Return what the calls for a row have cost; None without calls."""
        return None

    def no_choice(self, row: Row) -> BackendError:
        """Say why no token could be chosen."""
        return BackendError(
            f"the logits of row {row.index} are not numbers (NaN) after {len(row.new_ids)} new tokens.\n"
            "hint: run the models in float32 or bfloat16; float16 overflows in some of them"
        )

    def _steer(
        self, base: Tensor, contributions: Sequence[Contribution], places: Sequence[int]
    ) -> Steered:
        lanes = self._lanes
        rows = [lanes.rows[place] for place in places]
        policies = [row.policy for row in rows]
        positions = None
        if any(policy.has_positions for policy in policies):
            counts = [len(row.new_ids) for row in rows]
            positions = torch.tensor(counts, device=lanes.device)
        return apply_policies(
            policies, base, contributions, positions=positions, padding_ids=lanes.padding_ids
        )
