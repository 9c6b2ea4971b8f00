"""The row without any proxy: a temperature and an output bias of the base, fitted on training rows.

Much of what a small expert learns is how often each word occurs, which needs no model at all. The base's
states at the training rows are those that calibration kept; only its head runs here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.miniature.plan import Plan
from benchmarks.miniature.predict import NoProxy
from benchmarks.miniature.train import cpu_dtype, training_settings
from proxytune.data.rows import read_rows
from proxytune.model import ProxyTuned
from proxytune.tune.encode import IGNORED, Encoded, encode, limited
from proxytune.tune.fit import Chunk, Mix, fit_bias
from proxytune.tune.heads import head_of
from proxytune.tune.offsets import HEADER_NAME, Offsets

WEIGHTS = (0.8, 0.9, 1.0)
"""Inverse temperatures that are tried, each with a bias of its own and with none."""
ROWS = 128
"""Positions whose logits exist at once."""

Read = Callable[[], Iterable[Chunk]]


def encoded_rows(plan: Plan, name: str, split: str, tokenizer: Any) -> Encoded:
    """Return the rows as the smol pair's training read them."""
    asked = training_settings(plan, f"{name}.smol")
    part = encode(
        read_rows(asked["data" if split == "train" else "valid_data"]),
        tokenizer,
        prompt_format=asked["template"],
        max_length=asked["max_length"],
        name="the small model",
    )
    limit = asked["max_tokens" if split == "train" else "max_valid_tokens"]
    return limited(part, limit, asked["seed"])


def kept_states(directory: Path, split: str) -> Offsets:
    """Return the base's states that a pair's training kept."""
    directory = directory / f"base-{split}"
    header = json.loads((directory / HEADER_NAME).read_text("utf-8"))
    states = Offsets.open(directory, header["key"])
    assert states is not None, directory
    return states


def read_kept(directory: Path, split: str, part: Encoded, head: Tensor) -> Read:
    """Return a function that reads the base at a split's trained positions.

    Args:
        directory: Of the base's states.
        split: `train` or `valid`.
        part: The split's rows, as they were trained on.
        head: `[vocab, width]`, the base's.
    """
    labels = [label for e in part.examples for label in e.labels[1:] if label != IGNORED]
    states = kept_states(directory, split).rows(list(range(len(part.examples))))
    return reader(states, torch.tensor(labels), head)


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
    reads = (
        read_kept(
            plan.states_path(name), split, encoded_rows(plan, name, split, model.tokenizer), head
        )
        for split in ("train", "valid")
    )
    return choose(*reads)
