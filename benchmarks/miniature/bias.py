"""The row without any proxy: a temperature and an output bias of the base, fitted on training rows.

Much of what a small expert learns is how often each word occurs, which needs no model at all. The base's
states at the training rows are those that calibration kept; only its head runs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.miniature.plan import Plan
from benchmarks.miniature.predict import NoProxy
from benchmarks.miniature.train import cpu_dtype, training_settings
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.data.rows import read_rows
from proxytune.model import ProxyTuned
from proxytune.tune import Display, TuneSettings
from proxytune.tune.encode import IGNORED, Encoded, encode, limited
from proxytune.tune.fit import Chunk, Mix, fit_bias
from proxytune.tune.frozen import FrozenModels
from proxytune.tune.heads import head_of

WEIGHTS = (0.8, 0.9, 1.0)
"""Inverse temperatures that are tried, each with a bias of its own and with none."""
ROWS = 128
"""Positions whose logits exist at once."""

Read = Callable[[], Iterable[Chunk]]


def read_kept(settings: TuneSettings, head: Tensor) -> tuple[Read, Read]:
    """Return functions that read the base at the trained positions of a pair's training and validation rows.

    The states are those that the pair's training kept in `offsets_dir`; missing ones are computed.

    Args:
        settings: The pair's.
        head: `[vocab, width]`, the base's.
    """
    small = find_checkpoint(settings.small, root=Path.cwd())
    base = find_checkpoint(settings.base or "", root=Path.cwd())
    encoded = {}
    for split, source, limit in (
        ("train", settings.data, settings.max_tokens),
        ("valid", settings.valid_data or "", settings.max_valid_tokens),
    ):
        part = encode(
            read_rows(source),
            small.tokenizer,
            prompt_format=settings.template or "plain",
            max_length=settings.max_length or 1024,
            name=small.name,
        )
        encoded[split] = limited(part, limit, settings.seed)
    dtype = settings.dtype or "float32"
    frozen = FrozenModels(settings, small, base, encoded, "cpu", dtype, Display()).alone
    assert frozen.valid is not None
    train, valid = (
        reader(kept.rows(list(range(len(part.examples)))), targets_of(part), head)
        for kept, part in ((frozen.train, encoded["train"]), (frozen.valid, encoded["valid"]))
    )
    return train, valid


def targets_of(part: Encoded) -> Tensor:
    """Return the token ids that are trained on, in the order of the states that predict them."""
    return torch.tensor(
        [label for e in part.examples for label in e.labels[1:] if label != IGNORED]
    )


def reader(states: Tensor, targets: Tensor, weight: Tensor) -> Read:
    """Return a function that reads positions as chunks of the base's logits.

    Args:
        states: `[positions, width]`, before the head.
        targets: `[positions]` token ids.
        weight: `[vocab, width]`, the base's head, in the dtype of the product.
    """

    def read() -> Iterator[Chunk]:
        for first in range(0, len(states), ROWS):
            part = slice(first, first + ROWS)
            yield Chunk((states[part].to(weight.dtype) @ weight.t()).float()[None], targets[part])

    return read


def choose(train: Read, valid: Read, weights: Sequence[float] = WEIGHTS) -> NoProxy:
    """Return the temperature and bias with the lowest loss on validation rows."""
    tried = [Mix((weight,)) for weight in weights]
    tried += [Mix((weight,), bias) for weight in weights if (bias := fit_bias(train, (weight,)))]
    sums = [0.0] * len(tried)
    size = 0
    for chunk in valid():
        size = chunk.logits.shape[-1]
        for place, mix in enumerate(tried):
            sums[place] += float(mix.losses(chunk).sum())
    best = tried[sums.index(min(sums))]
    dense = None if best.bias is None else best.bias.dense(size, torch.device("cpu"))
    return NoProxy(best.weights[0], dense)


def fit_no_proxy(plan: Plan, name: str, model: ProxyTuned) -> NoProxy:
    """Fit a data set's temperature and bias."""
    base: Any = model.ensemble.members[0].backend
    # In the dtype of the trainings, which compute the same logits.
    head = head_of(base.model).weight.detach().to("cpu", getattr(torch, cpu_dtype()))
    return choose(*read_kept(TuneSettings(**training_settings(plan, f"{name}.smol")), head))
