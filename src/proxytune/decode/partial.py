"""Choices proved from a part of the base's logits."""

from __future__ import annotations

from typing import NamedTuple


class Proof(NamedTuple):
    """What is known of a token chosen from a part of the base's logits; see `trace.Step`."""

    is_certified: bool
    max_lost_prob: float


MAX_REVEALED = 4
"""Most tokens that a partial base is asked about one by one, to certify one choice: each may cost a call."""
