"""How likely the steered base finds given continuations, many short ones at a time.

This is what multiple choice asks: for each of many prompts, the log-probability of a whole continuation, and
whether greedy decoding would write it. `measure/score.py` measures long texts at several strengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from proxytune.decode.ensemble import Ensemble
from proxytune.measure.score import Passage, batch_logits, needed_members, steered_rows

CHUNK_TOKENS = 256
"""Number of positions, over all rows, whose logits are in memory at once."""


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Args:
        logprob: Log-probability of all its tokens together, nats.
        is_greedy: Whether each of its tokens is the likeliest at its position.
    """

    logprob: float
    is_greedy: bool


def likelihoods(
    ensemble: Ensemble, passages: Sequence[Passage], alphas: Sequence[float], *, batch_size: int = 8
) -> Iterator[tuple[int, Likelihood]]:
    """Yield every passage's index and likelihood.

    The longest continuations come first, so that the rows of a batch have similar lengths.

    Args:
        ensemble: The models.
        passages: Prompts and continuations that fit into every model's context.
        alphas: Strength of each of the ensemble's pairs.
        batch_size: Maximum number of passages per batch.

    Raises:
        UnsupportedModel: The base is behind an API that does not score a given text.
        BackendError: A model failed.
    """
    used = [alpha or None for alpha in alphas]
    needed = needed_members(pair for pair, alpha in zip(ensemble.pairs, used, strict=True) if alpha)
    lengths = [(len(passage.token_ids), len(passage.prompts[0])) for passage in passages]
    order = sorted(range(len(passages)), key=lambda i: tuple(-n for n in lengths[i]))
    is_partial = ensemble.members[0].backend.partial is not None
    while order:
        batch = _batch(ensemble, passages, order, 1 if is_partial else batch_size, needed)
        del order[: len(batch)]
        rows = [passages[i] for i in batch]
        chunk_tokens = max(1, CHUNK_TOKENS // len(rows))
        totals, greedy = [0.0] * len(rows), [True] * len(rows)
        for start, logits in batch_logits(ensemble, rows, needed, chunk_tokens=chunk_tokens):
            flat = {i: part.flatten(0, 1).float() for i, part in logits.items()}
            num_positions = len(flat[0]) // len(rows)
            padding_ids = ensemble.vocabulary.padding_ids.to(flat[0].device)
            positions = torch.arange(start, start + num_positions).repeat(len(rows))
            steered = steered_rows(
                ensemble, flat, used, positions=positions, padding_ids=padding_ids
            ).logits
            steered = steered.reshape(len(rows), num_positions, -1)
            logprobs = steered.index_fill(-1, padding_ids, -torch.inf).log_softmax(-1)
            for row, passage in enumerate(rows):
                targets = torch.tensor(
                    passage.token_ids[start : start + logprobs.shape[1]], device=logprobs.device
                )
                if len(targets):
                    own = logprobs[row, : len(targets)]
                    totals[row] += float(own.gather(-1, targets[:, None]).double().sum())
                    greedy[row] = greedy[row] and bool((own.argmax(-1) == targets).all())
        for i, total, is_greedy in zip(batch, totals, greedy, strict=True):
            yield i, Likelihood(total, is_greedy)


def _batch(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    order: Sequence[int],
    batch_size: int,
    needed: Sequence[int],
) -> list[int]:
    """Return the next passages that fit into one batch: rows are padded to the longest continuation."""
    batch: list[int] = []
    for i in order[:batch_size]:
        longest = max(len(passages[j].token_ids) for j in (*batch, i))
        fits = all(
            limit is None or len(passages[j].prompts[m]) + longest <= limit
            for j in (*batch, i)
            for m in needed
            for limit in [ensemble.members[m].backend.capabilities.max_context]
        )
        if batch and not fits:
            break
        batch.append(i)
    return batch
