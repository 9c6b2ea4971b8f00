"""The logits that weights are fitted to, read from an ensemble: base, expert and negated anti-expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from proxytune.decode.ensemble import Ensemble, Pair
from proxytune.errors import UnsupportedModel
from proxytune.machine import return_free_memory
from proxytune.measure.score import Passage, passage_logits
from proxytune.tune.fit import NEVER, Chunk, Read

ROWS = 32
"""Positions of a chunk: with 152,064 tokens, three float32 features of it are 58 MB."""


def reader(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    *,
    with_pair: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Read:
    """Return a function that reads passages as chunks for `fit.fit`.

    Args:
        ensemble: The models, with one pair; its policy is left out of account.
        passages: The rows, as `ProxyTuned.text_passages` or `completion_passages` give them.
        with_pair: Whether the pair's two models are read too; otherwise the base is the only feature.
        on_progress: Called after each chunk with the number of tokens done in this reading and the total.

    Raises:
        UnsupportedModel: Some logits are not shown (by an engine, or an API), a small model lacks some of the
            base's tokens, or the ensemble has several pairs.
    """
    if ensemble.engine is not None:
        raise UnsupportedModel(
            "the models run in an engine that shows no logits, and fitting weights needs them.\n"
            "hint: fit with the transformers or llama.cpp backend; the recipe then runs on either"
        )
    if with_pair and len(ensemble.pairs) != 1:
        raise UnsupportedModel(
            f"weights are fitted for one expert at a time, and {len(ensemble.pairs)} are chosen.\n"
            "hint: name one of them"
        )
    if ensemble.members[0].backend.partial is not None:
        raise UnsupportedModel(
            f"{ensemble.members[0].name} is behind an API, which shows the logits of a few tokens, and a fit "
            "compares whole distributions.\n"
            "hint: choose a strength with `proxytune sweep`, or fit with a copy of the base that runs here"
        )
    pair = ensemble.pairs[0] if with_pair else None
    if pair is not None and (pair.is_unshared is not None or pair.unmapped is not None):
        raise UnsupportedModel(
            f"expert {pair.name!r} lacks some of the base's tokens, and what weights do beside those is not "
            "convex.\nhint: choose a strength with `proxytune sweep`"
        )
    total = sum(len(passage.token_ids) for passage in passages)

    def read() -> Iterator[Chunk]:
        done = 0
        needed = [0] if pair is None else sorted({0, pair.expert, pair.anti_expert})
        for passage in passages:
            ids = torch.tensor(passage.token_ids)
            for where, logits in passage_logits(ensemble, passage, needed):
                for first in range(0, len(logits[0]), ROWS):
                    part = {i: each[first : first + ROWS] for i, each in logits.items()}
                    place = where + first
                    targets = ids[place : place + len(part[0])].to(part[0].device)
                    yield Chunk(_features(ensemble, pair, part), targets)
                done += len(logits[0])
                if on_progress is not None:
                    on_progress(done, total)
            return_free_memory()

    return read


def _features(ensemble: Ensemble, pair: Pair | None, logits: dict[int, Tensor]) -> Tensor:
    """Return `[features, positions, vocab]` float32 with `NEVER` at padding ids of the base."""
    padding_ids = ensemble.vocabulary.padding_ids.to(logits[0].device)
    parts = [logits[0].float()]
    if pair is not None:
        expert, anti_expert = logits[pair.expert].float(), logits[pair.anti_expert].float()
        parts += [expert, -anti_expert]
    features = torch.stack(parts).clamp_(NEVER, -NEVER)
    features[1:, :, padding_ids] = 0.0
    features[0, :, padding_ids] = NEVER
    return features
