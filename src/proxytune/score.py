"""How well each model, and the steered base at several strengths, predicts a given text.

The text is cut into windows; within a window each token is predicted from those before it. Every model runs
once; the logits of a chunk serve all strengths and are then dropped, so that memory is bounded by
`members x chunk x vocab`, whatever the length of the text.

Words: *nats* is the mean negative natural-log probability per token; *perplexity* is its exponential. A
confidence interval is a percentile bootstrap over blocks of consecutive tokens, since neighbouring tokens are
not independent (Efron and Tibshirani 1993, section 8.6); the change against the base is resampled in pairs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proxytune.backends.base import PartialBackend
from proxytune.certificate import spread_rest
from proxytune.decode import Ensemble
from proxytune.errors import InvalidRequest, PromptTooLong, UnsupportedModel
from proxytune.request import check_alpha
from proxytune.steer import Contribution, combine

CHUNK_TOKENS = 128
"""Positions whose logits are held at once: 128 x 152,064 float32 values are 78 MB per model."""
SLICE_TOKENS = 8
"""Positions whose losses are computed at once. Temporary tensors of a whole chunk come and go by tens of
megabytes, and the C library's heap then grew by 100 MB a chunk, to 10 GB over 50,000 tokens."""
BLOCK_TOKENS = 128
"""Length of a bootstrap block: longer than a sentence, short enough for a hundred blocks in 13,000 tokens."""
NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens to predict, and what comes before them.

    Args:
        prompts: Each member's prompt, in its own token ids and format, at least one token.
        token_ids: The continuation, ids of the base's vocabulary, at least one.
    """

    prompts: tuple[tuple[int, ...], ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """How well one predictor does.

    Args:
        name: `base`, `NAME.expert`, `NAME.anti_expert` or `steered`.
        alpha: Strength, for steered rows.
        nats: Mean negative log-likelihood per token.
        perplexity: Its exponential.
        interval: Of the perplexity; None where the text has fewer than two blocks.
        change: Perplexity relative to the base's, minus 1: -0.2 is a fifth lower.
        change_interval: Of the change, base and steered resampled together.
    """

    name: str
    alpha: float | None
    nats: float
    perplexity: float
    interval: Interval | None
    change: float
    change_interval: Interval | None


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """Scores of one text.

    Args:
        num_tokens: Tokens scored. A text's first token has nothing before it and is left out, unless the
            tokenizer puts a start token there.
        num_windows: How many windows the text was cut into.
        window: Their length in tokens.
        rows: Base, experts and anti-experts, then the steered base at each strength.
    """

    num_tokens: int
    num_windows: int
    window: int
    rows: tuple[ScoreRow, ...]

    def row(self, name: str, alpha: float | None = None) -> ScoreRow:
        """Return the row of one predictor."""
        return next(r for r in self.rows if r.name == name and r.alpha == alpha)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)


def bootstrap(
    losses: NDArray[np.float64], base_losses: NDArray[np.float64], *, seed: int
) -> tuple[Interval | None, Interval | None]:
    """Return intervals of the perplexity and of its change against the base.

    Args:
        losses: `[num_tokens]` negative log-likelihoods in text order, nats.
        base_losses: The base's, of the same tokens.
        seed: Of the resampling; equal seeds draw equal blocks for every row of a report.
    """
    num_blocks = len(losses) // BLOCK_TOKENS
    if num_blocks < 2:
        return None, None
    starts = np.linspace(0, len(losses), num_blocks + 1).astype(int)[:-1]
    sizes = np.diff([*starts, len(losses)])
    sums = np.add.reduceat(losses, starts)
    base_sums = np.add.reduceat(base_losses, starts)
    picks = np.random.default_rng(seed).integers(0, num_blocks, size=(NUM_RESAMPLES, num_blocks))
    counts = sizes[picks].sum(1)
    nats = sums[picks].sum(1) / counts
    base_nats = base_sums[picks].sum(1) / counts
    low, high = np.exp(np.percentile(nats, [2.5, 97.5]))
    change_low, change_high = np.expm1(np.percentile(nats - base_nats, [2.5, 97.5]))
    return Interval(float(low), float(high)), Interval(float(change_low), float(change_high))


def token_losses(logits: Tensor, targets: Tensor, padding_ids: Tensor) -> NDArray[np.float64]:
    """Return negative log-likelihoods, `[num_tokens]` nats.

    Args:
        logits: `[num_tokens, vocab]`, float32.
        targets: `[num_tokens]`.
        padding_ids: `[num_padding]`, ids that no token has; they get no probability.
    """
    if len(padding_ids):
        logits = logits.index_fill(-1, padding_ids, -torch.inf)
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    return (logits.logsumexp(-1) - chosen).double().cpu().numpy()


def score_tokens(
    ensemble: Ensemble,
    token_ids: Sequence[int],
    *,
    strengths: Sequence[tuple[float, tuple[float, ...]]],
    window: int = 512,
    start_id: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> ScoreReport:
    """Score a text given as token ids of the base's vocabulary.

    Args:
        ensemble: The models.
        token_ids: At least two.
        strengths: The steered rows: a label, and the strength of each of the ensemble's pairs.
        window: Tokens per window, at least 2 and at most the smallest context.
        start_id: A token to begin every window with (the one the base's tokenizer puts before a text);
            None begins each window with the last token of the one before.
        seed: Of the bootstrap.
        on_progress: Called with tokens done and tokens in all after each chunk.

    Raises:
        InvalidRequest: Fewer than two tokens, or a window below 2.
        PromptTooLong: The window exceeds a model's context.
    """
    if window < 2:
        raise InvalidRequest(f"window is {window}, and must be at least 2 tokens")
    if start_id is not None:
        fresh = window - 1
        windows = [[start_id, *token_ids[i : i + fresh]] for i in range(0, len(token_ids), fresh)]
    else:
        windows = [
            list(token_ids[i : i + window]) for i in range(0, len(token_ids) - 1, window - 1)
        ]
    if sum(len(ids) - 1 for ids in windows) < 1:
        raise InvalidRequest(
            f"the text has {len(token_ids)} token(s), and scoring needs one to start from and one to "
            "predict.\nhint: give a longer text"
        )
    passages = [passage_of(ensemble, ids[:1], ids[1:]) for ids in windows if len(ids) > 1]
    report = score_passages(
        ensemble, passages, strengths=strengths, seed=seed, on_progress=on_progress
    )
    return replace(report, window=window)


def passage_of(ensemble: Ensemble, prompt: Sequence[int], token_ids: Sequence[int]) -> Passage:
    """Return a passage whose prompt, ids of the base's vocabulary, every member sees alike."""
    ids = torch.tensor(list(prompt))
    return Passage(
        tuple(tuple(m.alignment.ids_to_small(ids).tolist()) for m in ensemble.members),
        tuple(token_ids),
    )


def score_passages(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    *,
    strengths: Sequence[tuple[float, tuple[float, ...]]],
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> ScoreReport:
    """Score passages, each by itself.

    Args:
        ensemble: The models.
        passages: At least one.
        strengths: The steered rows: a label, and the strength of each of the ensemble's pairs.
        seed: Of the bootstrap, whose blocks run over all passages in their order.
        on_progress: Called with tokens done and tokens in all after each chunk.

    Raises:
        InvalidRequest: No passage, or one whose prompt or continuation is empty.
        PromptTooLong: A passage exceeds a model's context.
    """
    if not passages or not all(p.token_ids and all(p.prompts) for p in passages):
        raise InvalidRequest("scoring needs passages, each with a prompt and tokens to predict")
    total = sum(len(passage.token_ids) for passage in passages)
    for label, alphas in strengths:
        check_alpha(label)
        for alpha in alphas:
            check_alpha(alpha)
    needed = sorted({0} | {i for pair in ensemble.pairs for i in (pair.expert, pair.anti_expert)})
    for index in needed:
        member = ensemble.members[index]
        limit = member.backend.capabilities.max_context
        longest = max(len(p.prompts[index]) + len(p.token_ids) for p in passages)
        if limit is not None and longest > limit:
            raise PromptTooLong(
                f"the window has {longest} tokens and {member.name} has a context of {limit}.\n"
                f"hint: score with a window of at most {limit}"
            )
    names = ["base"]
    sides: list[int] = [0]
    for pair in ensemble.pairs:
        names += [f"{pair.name}.expert", f"{pair.name}.anti_expert"]
        sides += [pair.expert, pair.anti_expert]
    collected: list[list[NDArray[np.float64]]] = [[] for _ in range(len(names) + len(strengths))]
    done = 0
    for passage in passages:
        ids = torch.tensor(passage.token_ids)
        for where, logits in passage_logits(ensemble, passage, needed):
            base = logits[0]
            targets = ids[where : where + base.shape[0]].to(base.device)
            padding_ids = ensemble.vocabulary.padding_ids.to(base.device)
            for first in range(0, len(targets), SLICE_TOKENS):
                part = slice(first, first + SLICE_TOKENS)
                for column, side in enumerate(sides):
                    collected[column].append(
                        token_losses(logits[side][part].float(), targets[part], padding_ids)
                    )
                for column, (_, alphas) in enumerate(strengths, start=len(names)):
                    parts = [
                        Contribution(
                            logits[pair.expert][part], logits[pair.anti_expert][part], alpha
                        )
                        for pair, alpha in zip(ensemble.pairs, alphas, strict=True)
                    ]
                    steered = combine(base[part], parts)
                    collected[column].append(token_losses(steered, targets[part], padding_ids))
            done += len(targets)
            if on_progress is not None:
                on_progress(done, total)
        _return_free_memory()
    losses = [np.concatenate(column) for column in collected]
    labels: list[float | None] = [*[None] * len(names), *[label for label, _ in strengths]]
    rows = [
        _row(name, label, column, losses[0], seed)
        for name, label, column in zip(
            [*names, *["steered"] * len(strengths)], labels, losses, strict=True
        )
    ]
    longest = max(len(p.prompts[0]) + len(p.token_ids) for p in passages)
    return ScoreReport(
        num_tokens=total, num_windows=len(passages), window=longest, rows=tuple(rows)
    )


def _return_free_memory() -> None:
    """Give what the C library's heap holds free back to the system, where that can be asked for.

    Logits below 32 MiB come from glibc's heap, and what lies between them keeps it from shrinking: scoring
    60,000 tokens of a vocabulary of 49,152 in windows of 128 grew a process by 5 GB.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _row(
    name: str,
    alpha: float | None,
    losses: NDArray[np.float64],
    base_losses: NDArray[np.float64],
    seed: int,
) -> ScoreRow:
    interval, change_interval = bootstrap(losses, base_losses, seed=seed)
    nats = float(losses.mean())
    return ScoreRow(
        name=name,
        alpha=alpha,
        nats=nats,
        perplexity=float(np.exp(nats)),
        interval=interval,
        change=float(np.expm1(nats - base_losses.mean())),
        change_interval=change_interval,
    )


def passage_logits(
    ensemble: Ensemble, passage: Passage, needed: Sequence[int]
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Yield, chunk by chunk, the index of the first token predicted and each member's logits for it.

    Logits are `[chunk, base vocab]` by member.
    """
    groups: dict[int, list[int]] = {}
    for index in needed:
        groups.setdefault(id(ensemble.members[index].backend), []).append(index)
    states = {}
    pieces: dict[int, Tensor] = {}
    for key, indices in groups.items():
        backend = ensemble.members[indices[0]].backend
        prompts = [passage.prompts[i] for i in indices]
        if isinstance(backend, PartialBackend):
            if not backend.can_score:
                raise UnsupportedModel(
                    f"{ensemble.members[0].name} does not score a given text, and asking for every token of "
                    "it would cost a call each.\nhint: vLLM and llama-cpp-python's server do"
                )
            states[key], logits = backend.prefill(prompts, num_new_tokens=[1], is_scored=True)
            logits = _with_first_token(backend, states[key], logits, passage.token_ids[0])
        else:
            states[key], logits = backend.prefill(
                prompts, adapters=[ensemble.members[i].adapter for i in indices]
            )
        for i, row in zip(indices, logits, strict=True):
            pieces[i] = _whole(ensemble, i, states[key], row[None])
    yield 0, {i: p.to(pieces[0].device) for i, p in pieces.items()}
    # The logits after the last token predict nothing, so it is not run.
    ids = torch.tensor(passage.token_ids[:-1], dtype=torch.long)
    for start in range(0, len(ids), CHUNK_TOKENS):
        chunk = ids[start : start + CHUNK_TOKENS]
        for key, indices in groups.items():
            backend = ensemble.members[indices[0]].backend
            rows = torch.stack([ensemble.members[i].alignment.ids_to_small(chunk) for i in indices])
            for i, row in zip(indices, backend.extend(states[key], rows), strict=True):
                pieces[i] = _whole(ensemble, i, states[key], row)
        yield start + 1, {i: p.to(pieces[0].device) for i, p in pieces.items()}


def _whole(ensemble: Ensemble, index: int, state: Any, logits: Tensor) -> Tensor:
    """Return a member's logits `[chunk, vocab]` in the base's vocabulary, without holes."""
    member = ensemble.members[index]
    if isinstance(member.backend, PartialBackend):
        (bounds,) = member.backend.bounds(state)
        rests = torch.tensor([each.rest for each in bounds])
        return spread_rest(logits, rests, ensemble.vocabulary.padding_ids)
    return member.alignment.logits_to_base(logits)


def _with_first_token(
    backend: PartialBackend[Any], state: Any, logits: Tensor, token_id: int
) -> Tensor:
    """Return the logits after the prompt with those of the text's first token, if it can be asked for."""
    if logits[0, token_id] == -torch.inf:
        logits = logits.clone()
        for found, logprob in backend.reveal(state, 0, 0, [token_id]).items():
            logits[0, found] = logprob
    return logits
