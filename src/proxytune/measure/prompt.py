"""How likely the steered base finds each token of a prompt, before it goes on from there.

`measure/score.py` reads the tokens, so the numbers are those of `ProxyTuned.explain` with the prompt's first
token as the prompt. What the models have read is kept for the text that follows.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune.decode.ensemble import Ensemble, Job, members_of, pairs_of, policy_of
from proxytune.decode.lanes import Kept, grouped
from proxytune.errors import BackendError, InvalidRequest, UnsupportedModel
from proxytune.measure.score import (
    CHUNK_TOKENS,
    SLICE_TOKENS,
    batch_logits,
    passage_of,
    steered_rows,
)


class PromptToken(NamedTuple):
    """What the steered base gave a token of a prompt.

    Args:
        token_id: The token, in the base's vocabulary.
        logprob: Its log-probability, nats.
        rank: Its rank in the vocabulary, 1 for the most likely.
        top: The most likely tokens and their logprobs, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def check_scored(ensemble: Ensemble, job: Job) -> None:
    """Refuse a job whose prompt cannot be scored.

    Raises:
        UnsupportedModel: The base is behind an API.
        InvalidRequest: The models read different prompts, or the strength depends on a token's position.
    """
    if ensemble.members[0].backend.partial is not None:
        raise UnsupportedModel(
            "the base is behind an API, which shows few of its logits, so prompts are not scored here.\n"
            "hint: leave out prompt_logprobs, or echo with logprobs"
        )
    policy = policy_of(ensemble, job)
    if policy.has_positions and pairs_of(job):
        raise InvalidRequest(
            "the strength follows a schedule of new tokens, and a prompt has none, so it cannot be "
            "scored.\nhint: leave out prompt_logprobs, or echo with logprobs"
        )
    for index in members_of(ensemble, job):
        member = ensemble.members[index]
        if list(job.prompts[index]) != member.own_ids(job.prompts[0], is_start=True):
            raise InvalidRequest(
                f"{member.name} reads this prompt in a format of its own, so its tokens are not the base's "
                "and cannot be scored with them.\n"
                "hint: send the prompt as token ids, which every model reads as they are"
            )


def score_prompt(
    ensemble: Ensemble, job: Job, *, num_top: int
) -> Generator[list[PromptToken], None, Kept | None]:
    """Yield what the steered base gave a prompt's tokens from the second on, chunk by chunk.

    Args:
        ensemble: The models.
        job: A job that `check_scored` accepts.
        num_top: Number of likeliest tokens to list at each position.

    Returns:
        What the models have read: all of the prompt but its last token; None if that is nothing.

    Raises:
        BackendError: A model failed.
    """
    prompt = list(job.prompts[0])
    if len(prompt) < 2:
        return None
    steering = replace(ensemble, policy=policy_of(ensemble, job))
    alphas = [a if which in pairs_of(job) else None for which, a in enumerate(job.alphas)]
    passage = passage_of(ensemble, prompt[:1], prompt[1:])
    states: list[Any] = []
    reading = batch_logits(
        ensemble,
        [passage],
        members_of(ensemble, job),
        chunk_tokens=CHUNK_TOKENS,
        states=states,
    )
    for first, logits in reading:
        found: list[PromptToken] = []
        for start in range(0, logits[0].shape[1], SLICE_TOKENS):
            rows = {
                member: part[0, start : start + SLICE_TOKENS] for member, part in logits.items()
            }
            padding_ids = ensemble.vocabulary.padding_ids.to(rows[0].device)
            place = first + start
            positions = torch.arange(place, place + len(rows[0]))
            steered = steered_rows(
                steering, rows, alphas, positions=positions, padding_ids=padding_ids
            ).logits
            logprobs = steered.index_fill(-1, padding_ids, -torch.inf).log_softmax(-1)
            found += _tokens(logprobs, passage.token_ids[place : place + len(rows[0])], num_top)
        yield found
    groups = grouped(ensemble, [job])
    for group, state in zip(groups, states, strict=True):
        group.state = state
    read = {member: list(job.prompts[member][:-1]) for member in members_of(ensemble, job)}
    return Kept(groups, read)


def _tokens(logprobs: Tensor, token_ids: tuple[int, ...], num_top: int) -> list[PromptToken]:
    """Return what `[tokens, vocab]` logprobs give each token."""
    targets = torch.tensor(token_ids, device=logprobs.device)[:, None]
    own = logprobs.gather(-1, targets)
    if bool(own.isnan().any()):
        raise BackendError(
            "the logits of a prompt's tokens are not numbers (NaN).\n"
            "hint: run the models in float32 or bfloat16; float16 overflows in some of them"
        )
    ids = torch.arange(logprobs.shape[1], device=logprobs.device)
    # Equal logits count in the order of their ids, as in the choice.
    is_above = (logprobs > own) | ((logprobs == own) & (ids < targets))
    best = logprobs.topk(num_top)
    columns = (own[:, 0], is_above.sum(-1) + 1, best.indices, best.values)
    rows = zip(token_ids, *(column.tolist() for column in columns), strict=True)
    return [
        PromptToken(token_id, logprob, rank, tuple(zip(tops, values, strict=True)))
        for token_id, logprob, rank, tops, values in rows
    ]
