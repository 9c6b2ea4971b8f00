"""Models run over blocks; what was wrong is taken back."""

from __future__ import annotations

from collections.abc import Callable

import torch

REUSE_TOKENS = 64
"""Tokens that are read at once after a reused prefix: every one gives a whole row of logits."""
SYNC_EVERY = 16
"""On an accelerator the clock is read for one block in so many, since reading it waits for the device."""


def synchronise(device: torch.device) -> Callable[[], None]:
    """Return what waits until a device has done all it was given."""
    if device.type == "cpu":
        return lambda: None
    wait: Callable[[], None] = getattr(torch, device.type).synchronize
    wait()
    return wait
