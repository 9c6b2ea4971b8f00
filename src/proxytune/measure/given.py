"""Given answers: what the models give each of their tokens, and which of a few they prefer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.decode.batch import Batch
from proxytune.decode.collect import Collector, run
from proxytune.decode.ensemble import Ensemble, Job, policy_of
from proxytune.errors import BackendError, InvalidRequest
from proxytune.measure.score import (
    Passage,
    batch_logits,
    explain_passage,
    needed_members,
    steered_rows,
)
from proxytune.request import SamplingParams
from proxytune.text.detokenize import TextStream
from proxytune.text.prompts import Tokenizer, continuation_ids
from proxytune.trace import Trace, Usage


@dataclass(frozen=True, slots=True)
class Choice:
    """The answer that a steered base prefers among a few.

    Args:
        option: The likeliest option.
        index: Its index among the options.
        probs: Probability of each option, in order; the sum is 1. 0 for an option that the base did not
            show.
        alphas: Strength of steering by expert.
        is_certified: Whether the full logits provably prefer the same option; None if all of them were seen.
        usage: The cost of calls to a base behind an API.
    """

    option: str
    index: int
    probs: tuple[float, ...]
    alphas: Mapping[str, float]
    is_certified: bool | None = None
    usage: Usage | None = None


def first_tokens(options: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Return the token that each option begins with.

    Raises:
        InvalidRequest: There are fewer than two options, or two begin with the same token.
    """
    token_ids = [continuation_ids(option, tokenizer)[:1] for option in options]
    first = [ids[0] for ids in token_ids if ids]
    if len(options) < 2 or len(set(first)) < len(options):
        raise InvalidRequest(
            f"the options {', '.join(map(repr, options))} must be at least two, and begin with different "
            "tokens.\nhint: start each option with a letter, and explain the letters in the prompt"
        )
    return first


def choose(ensemble: Ensemble, job: Job, options: Sequence[str], *, shows_all: bool) -> Choice:
    """Return the option that the steered base prefers, judged by the first token of each.

    Args:
        ensemble: The models.
        job: The prompt and the strengths.
        options: The answers, as they would follow the prompt.
        shows_all: Whether the base shows all its logits, so that nothing needs a proof.

    Raises:
        InvalidRequest: The options do not begin with different tokens.
        BackendError: A model failed, or the base shows none of the options.
    """
    token_ids = first_tokens(options, ensemble.tokenizer)
    usage = None
    if ensemble.engine is not None:
        logits = torch.tensor(ensemble.engine.first_logprobs(ensemble, job, token_ids))
        is_certified = True
    else:
        batch = Batch(ensemble, [job])
        logits, is_certified = batch.first_logits(token_ids)
        usage = batch.usage(0)
    if bool(torch.isneginf(logits).all()):
        raise BackendError(
            "none of the options is among the tokens that the base shows, and it cannot be asked for "
            "others.\nhint: raise top_logprobs, or name the possible answers in the prompt"
        )
    probs: list[float] = logits.softmax(-1).tolist()
    best = max(range(len(options)), key=probs.__getitem__)
    certified = None if shows_all else is_certified
    return Choice(options[best], best, tuple(probs), job.strengths, certified, usage)


def option_logits(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    token_ids: Sequence[int],
    *,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[int, Tensor]:
    """Return each model's logits of a few tokens at the end of each prompt, for many prompts.

    `choose` answers one prompt as the policy says; this is for comparing the models by themselves.

    Args:
        ensemble: The models. The base must show all its logits.
        passages: The prompts. What follows them is not read.
        token_ids: The first token of each option.
        batch_size: Maximum number of prompts per forward pass.
        on_progress: Called with the prompts done and the total.

    Returns:
        `[passages, options]` float32 by index of the base and the pairs' members, not normalised.

    Raises:
        BackendError: A model failed.
    """
    needed = needed_members(ensemble.pairs)
    columns = list(token_ids)
    parts: dict[int, list[Tensor]] = {member: [] for member in needed}
    for first in range(0, len(passages), batch_size):
        rows = passages[first : first + batch_size]
        _, logits = next(batch_logits(ensemble, rows, needed, chunk_tokens=1))
        for member in needed:
            parts[member].append(logits[member][:, 0, columns].float().cpu())
        if on_progress is not None:
            on_progress(first + len(rows), len(passages))
    return {member: torch.cat(part) for member, part in parts.items()}


class Written(NamedTuple):
    """Which of some given answers greedy decoding writes, token by token."""

    models: dict[int, list[bool]]  # by index of the base and the pairs' members
    steered: list[list[bool]]  # the steered base, one list for each strength


def are_written(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    strengths: Sequence[tuple[float, ...]],
    *,
    judges_end: bool = False,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Return which given answers the models, each by itself, and the steered base would write greedily.

    Nothing is generated: greedy decoding writes an answer if each of its tokens is the likeliest one after
    those before it, and one forward shows that for all of them and for all strengths.

    Args:
        ensemble: The models. The base must show all its logits.
        passages: Prompts with their answers.
        strengths: Strengths of the ensemble's pairs to steer at.
        judges_end: Whether a token that ends the text counts, if an answer ends with one.
        batch_size: Maximum number of passages per forward pass.
        on_progress: Called with the passages done and the total.

    Raises:
        BackendError: A model failed.
    """
    needed = needed_members(ensemble.pairs)
    found = Written({member: [] for member in needed}, [[] for _ in strengths])
    for first in range(0, len(passages), batch_size):
        batch = passages[first : first + batch_size]
        longest = max(len(passage.token_ids) for passage in batch)
        chunks = [part for _, part in batch_logits(ensemble, batch, needed, chunk_tokens=longest)]
        logits = {member: torch.cat([part[member] for part in chunks], 1) for member in needed}
        padding_ids = ensemble.vocabulary.padding_ids.to(logits[0].device)
        for row, passage in enumerate(batch):
            answer = passage.token_ids
            if not judges_end and answer[-1] in ensemble.eos_token_ids:
                answer = answer[:-1]
            own = {member: part[row, : len(answer)] for member, part in logits.items()}
            targets = torch.tensor(answer, device=own[0].device)
            positions = torch.arange(len(answer), device=own[0].device)

            for member in needed:
                found.models[member].append(_writes(own[member].float(), targets, padding_ids))
            for column, alphas in zip(found.steered, strengths, strict=True):
                rows = steered_rows(
                    ensemble, own, alphas, positions=positions, padding_ids=padding_ids
                ).logits
                column.append(_writes(rows, targets, padding_ids))
        if on_progress is not None:
            on_progress(first + len(batch), len(passages))
    return found


def _writes(logits: Tensor, targets: Tensor, padding_ids: Tensor) -> bool:
    """Whether each target is the likeliest token, by logits `[tokens, vocab]`."""
    best = logits.index_fill(-1, padding_ids, -torch.inf).argmax(-1)
    return bool((best == targets).all())


def trace_given(
    ensemble: Ensemble, job: Job, given: Sequence[int], sampling: SamplingParams | None
) -> Trace:
    """Return what each model gives each token of a given continuation, and generate more if asked to.

    Args:
        ensemble: The models. The base must show all its logits.
        job: The prompt, the strengths, and how much to record.
        given: Token ids of the base's vocabulary that follow the prompt.
        sampling: How to continue after them; None ends there.

    Returns:
        A trace whose first `num_given` steps are the continuation's.
    """
    started = time.perf_counter()
    text = TextStream(ensemble.tokenizer, prompt_ids=job.prompts[0])
    passage = Passage(tuple(tuple(ids) for ids in job.prompts), tuple(given))
    steered = replace(ensemble, policy=policy_of(ensemble, job))
    found = explain_passage(steered, passage, alphas=job.alphas, num_top=job.num_top)
    steps = tuple(replace(step, text=text.push(step.token_id)) for step in found)
    content = "".join(step.text for step in steps)
    num_prompt_tokens = len(job.prompts[0])
    if sampling is None:
        trace = Trace(
            content + text.finish(), "given", steps, num_prompt_tokens, alphas=job.strengths
        )
    else:
        prompts = tuple(
            [*prompt_ids, *member.own_ids(given)]
            for member, prompt_ids in zip(ensemble.members, job.prompts, strict=True)
        )
        collector = Collector(replace(job, prompts=prompts, sampling=sampling))
        for _ in run(ensemble, [collector]):
            pass
        trace = collector.trace()
        # The generated text completes a character of which only a part was given.
        trace = replace(
            trace,
            text=content + trace.text,
            steps=(*steps, *(replace(s, index=s.index + len(steps)) for s in trace.steps)),
            num_prompt_tokens=num_prompt_tokens,
        )
    return replace(trace, num_given=len(steps), latency_s=time.perf_counter() - started)
