"""Training the bridge of a cut to predict as the base does (distillation); all other weights stay.

The loss is KL(base || cut) over the whole vocabulary at each position of the text, in chunks of positions.
Only the bridge is trained: everything else is shared with the base, and stays so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from proxytune.errors import BackendError

LEARNING_RATE = 3e-4
WARM_UP = 5
"""Peak learning rate of AdamW, and the number of steps until it is reached; then it falls linearly."""

WINDOWS_PER_STEP = 4
CHUNK = 128
"""Number of positions whose logits are in memory at once."""


def heal(
    base: Any,
    cut: Any,
    bridge: Any,
    windows: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    seed: int,
    progress: Callable[[int, float], None],
    learning_rate: float = LEARNING_RATE,
) -> int:
    """Train the bridge of a cut, in place, and return how many tokens it was trained on.

    Args:
        base: The model that it was cut from.
        cut: It shares its weights with `base`, apart from the bridge's.
        bridge: The bridge's layer.
        windows: Token ids of text; they are read again if there are too few.
        num_tokens: Number of tokens to train on.
        seed: Of the order of windows.
        progress: Called after each step with the tokens so far and the step's loss, nats per token.
        learning_rate: Peak learning rate of AdamW.

    Raises:
        BackendError: The loss is not finite.
    """
    # Not the biases that some MLPs have: the bridge's file has none, nor have most architectures.
    parameters = [p.requires_grad_() for p in bridge.mlp.parameters() if p.dim() == 2]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    order = random.Random(seed)
    queue: list[Sequence[int]] = []
    done = step = 0
    while done < num_tokens:
        loss, count = 0.0, 0
        for _ in range(WINDOWS_PER_STEP):
            if not queue:
                queue = list(windows)
                order.shuffle(queue)
            token_ids = torch.tensor([list(queue.pop())], device=cut.device)
            loss += _backward(base, cut, token_ids)
            count += token_ids.shape[1]
        if not loss < float("inf"):
            raise BackendError("the loss is not finite\nhint: leave --heal out")
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= count
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        left = max(0.05, 1 - done / num_tokens)
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / WARM_UP, left)
        optimizer.step()
        optimizer.zero_grad()
        done, step = done + count, step + 1
        progress(done, loss / count)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return done


def _backward(base: Any, cut: Any, token_ids: Tensor) -> float:
    """Add the gradient of one window's loss, summed over its positions; return the loss."""
    with torch.no_grad():
        wanted = base.model(token_ids, use_cache=False).last_hidden_state[0]
    states = cut.model(token_ids, use_cache=False).last_hidden_state[0]
    inner = states.detach().requires_grad_()
    total = 0.0
    for start in range(0, len(inner), CHUNK):
        chunk = slice(start, start + CHUNK)
        with torch.no_grad():
            target = base.lm_head(wanted[chunk]).float().log_softmax(-1)
        own = cut.lm_head(inner[chunk]).float().log_softmax(-1)
        loss = functional.kl_div(own, target, reduction="sum", log_target=True)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    states.backward(inner.grad)
    return total
