"""How well each model, and the base steered at several strengths, predicts a given text, token by token.

A text is cut into windows; within a window each token is predicted from the tokens before it. Every model
runs once: the logits of a chunk serve all strengths and are then dropped. Memory is therefore bounded by
`members x chunk x vocab`, whatever the length of the text. The ensemble's policy steers the base, and its
positions count from a window's first predicted token.

Words: *nats* is the mean negative natural-log probability per token, and *perplexity* its exponential.
Confidence intervals are percentile bootstraps over blocks of consecutive tokens, because neighbouring tokens
are not independent (Efron and Tibshirani 1993, section 8.6). The change against the base is resampled in
pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proxytune.backends.base import Backend, PartialBackend
from proxytune.decode.ensemble import Ensemble, Member, Pair, alone
from proxytune.errors import InvalidRequest, PromptTooLong, UnsupportedModel
from proxytune.logits.certificate import spread_rest
from proxytune.logits.rules import Steered, apply_policy, has_conflict
from proxytune.logits.steer import Contribution
from proxytune.logits.views import kl_divergence, view
from proxytune.machine import return_free_memory
from proxytune.request import check_alpha
from proxytune.trace import Step

SCORE_WINDOW = 512
"""Default number of tokens in a window of text."""
CHUNK_TOKENS = 128
"""Positions whose logits are in memory at once: 128 x 152,064 float32 values are 78 MB per model."""
SLICE_TOKENS = 8
"""Number of positions whose losses are computed at once. A whole chunk's temporary tensors have tens of
megabytes, and with them the C library's heap grew by 100 MB per chunk, to 10 GB over 50,000 tokens."""
BLOCK_TOKENS = 128
"""Tokens per bootstrap block: longer than a sentence, short enough for a hundred blocks in 13,000 tokens."""
NUM_RESAMPLES = 2000
MASS_TOKENS = 1000
"""Number of tokens on which the probability of shared tokens is measured."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens to predict, and the prompt before them.

    Args:
        prompts: Each member's prompt in its own token ids and format, at least one token each.
        token_ids: The continuation in ids of the base's vocabulary, at least one.
    """

    prompts: tuple[tuple[int, ...], ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MappedMass:
    """How much probability falls on tokens that the base shares with a small model of another tokenizer.

    Args:
        name: The small model's name.
        share: Share of the base's tokens that the small model also has, from 0 to 1.
        base: Probability that the base gives to shared tokens, mean over the text.
        small: Probability that the small model gives to shared tokens, mean over the text.
    """

    name: str
    share: float
    base: float
    small: float


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """How well one model, or the steered base at one strength, predicts a text.

    Args:
        name: `base`, `NAME.expert`, `NAME.anti_expert` or `steered`.
        alpha: Strength; None except for `steered`.
        nats: Mean negative log-likelihood per token.
        perplexity: Exponential of `nats`.
        interval: Interval of the perplexity; None if the text has fewer than two blocks.
        change: Perplexity divided by the base's, minus 1: -0.2 is a fifth lower.
        change_interval: Interval of the change, with this row and the base resampled together.
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
        num_tokens: Number of tokens scored. A text's first token has nothing before it and is left out,
            unless the tokenizer puts a start token there.
        num_windows: Number of windows, or of answers.
        window: Maximum number of tokens per window.
        rows: Base, experts and anti-experts, then the steered base at each strength. Small models of another
            tokenizer predict other tokens and have no row, and neither have those that lack a token of the
            text.
        mapped: What those models share with the base.
    """

    num_tokens: int
    num_windows: int
    window: int
    rows: tuple[ScoreRow, ...]
    mapped: tuple[MappedMass, ...] = ()

    def row(self, name: str, alpha: float | None = None) -> ScoreRow:
        """Return the row of one model, or of the steered base at one strength."""
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
        base_losses: `[num_tokens]`, the base's on the same tokens.
        seed: Random seed. Equal seeds draw equal blocks for every row of a report.

    Returns:
        The interval of the perplexity and that of its change; None for both with fewer than two blocks.
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
    bounds = np.exp(np.percentile(nats, [2.5, 97.5]))
    change_bounds = np.expm1(np.percentile(nats - base_nats, [2.5, 97.5]))
    return Interval(*bounds.tolist()), Interval(*change_bounds.tolist())


def token_losses(logits: Tensor, targets: Tensor, padding_ids: Tensor) -> NDArray[np.float64]:
    """Return negative log-likelihoods, `[num_tokens]` nats.

    Args:
        logits: `[num_tokens, vocab]` float32, not normalised.
        targets: `[num_tokens]` token ids.
        padding_ids: `[num_padding]` ids that are no token; they get no probability.
    """
    if len(padding_ids):
        logits = logits.index_fill(-1, padding_ids, -torch.inf)
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    return (logits.logsumexp(-1) - chosen).double().cpu().numpy()


def smallest_context(members: Iterable[Member]) -> int | None:
    """Return the smallest context of some models, in tokens; None if no context is limited."""
    contexts = (member.backend.capabilities.max_context for member in members)
    return min((context for context in contexts if context is not None), default=None)


def scoring_window(ensemble: Ensemble, window: int | None = None) -> int:
    """Return the window to score with: the given one, or `SCORE_WINDOW` shortened to the smallest context."""
    if window is not None:
        return window
    return min(SCORE_WINDOW, smallest_context(ensemble.members) or SCORE_WINDOW)


def windows(
    ensemble: Ensemble, token_ids: Sequence[int], *, window: int, start_id: int | None
) -> list[Passage]:
    """Cut a text into passages.

    Args:
        ensemble: The models.
        token_ids: The text in ids of the base's vocabulary.
        window: Tokens per window, at least 2 and at most the smallest context.
        start_id: The token that begins every window, if the base's tokenizer puts one before a text. None
            begins each window with the last token of the window before.

    Raises:
        InvalidRequest: There is nothing to predict, or the window is below 2.
    """
    if window < 2:
        raise InvalidRequest(f"window is {window}, and must be at least 2 tokens")
    if start_id is not None:
        fresh = window - 1
        cut = [[start_id, *token_ids[i : i + fresh]] for i in range(0, len(token_ids), fresh)]
    else:
        cut = [list(token_ids[i : i + window]) for i in range(0, len(token_ids) - 1, window - 1)]
    if sum(len(ids) - 1 for ids in cut) < 1:
        raise InvalidRequest(
            f"the text has {len(token_ids)} token(s), and scoring needs at least two: one to start from and "
            "one to predict.\nhint: give a longer text"
        )
    return [passage_of(ensemble, ids[:1], ids[1:]) for ids in cut if len(ids) > 1]


def passage_of(ensemble: Ensemble, prompt: Sequence[int], token_ids: Sequence[int]) -> Passage:
    """Return a passage with one prompt for all members, given in ids of the base's vocabulary."""
    prompts = tuple(tuple(m.own_ids(prompt, is_start=True)) for m in ensemble.members)
    return Passage(prompts, tuple(token_ids))


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
        passages: At least one passage.
        strengths: For each steered row, its label and the strength of each of the ensemble's pairs.
        seed: Random seed of the bootstrap, whose blocks run over all passages in their order.
        on_progress: Called after each chunk with the number of tokens done and the total.

    Raises:
        InvalidRequest: There is no passage, a prompt or a continuation is empty, or the ensemble's policy
            gives some tokens no probability.
        PromptTooLong: A passage exceeds a model's context.
    """
    for label, _ in strengths:
        check_alpha(label)
    policy = ensemble.policy
    if policy.plausibility is not None and policy.implausible != "leave":
        raise InvalidRequest(
            "the recipe's policy gives implausible tokens no probability, and a text that contains one has "
            'an infinite perplexity.\nhint: "implausible": "leave" keeps the base\'s odds for them'
        )
    losses = passage_losses(
        ensemble, passages, [alphas for _, alphas in strengths], on_progress=on_progress
    )
    sides = sides_of(ensemble.pairs)
    rows: list[ScoreRow] = []

    def add(name: str, alpha: float | None, column: NDArray[np.float64]) -> None:
        nats, change = float(column.mean()), float(np.expm1(column.mean() - losses[0].mean()))
        interval, change_interval = bootstrap(column, losses[0], seed=seed)
        perplexity = float(np.exp(nats))
        rows.append(ScoreRow(name, alpha, nats, perplexity, interval, change, change_interval))

    for (name, member), column in zip(sides.items(), losses, strict=False):
        model = ensemble.members[member]
        lacks_tokens = model.alignment.kind == "added"
        lacks_a_token = lacks_tokens and bool(np.isposinf(column).any())
        if model.backend.translation is None and not lacks_a_token:
            add(name, None, column)
    for (label, _), column in zip(strengths, losses[len(sides) :], strict=True):
        add("steered", label, column)
    longest = max(len(p.prompts[0]) + len(p.token_ids) for p in passages)
    mapped = mapped_mass(ensemble, passages)
    return ScoreReport(len(losses[0]), len(passages), longest, tuple(rows), mapped)


def mapped_mass(ensemble: Ensemble, passages: Sequence[Passage]) -> tuple[MappedMass, ...]:
    """Return what small models of another tokenizer share with the base; empty if there is none.

    Measured on the first passages, about `MASS_TOKENS` tokens.
    """
    mapped = {
        index: translation.token_map
        for index in needed_members(ensemble.pairs)
        if (translation := ensemble.members[index].backend.translation) is not None
    }
    if not mapped:
        return ()
    sums = dict.fromkeys(mapped, (0.0, 0.0))
    count = 0
    for passage in passages:
        for _, logits in passage_logits(ensemble, passage, [0, *mapped]):
            padding_ids = ensemble.vocabulary.padding_ids.to(logits[0].device)
            base = logits[0].float().index_fill(-1, padding_ids, -torch.inf).softmax(-1)
            for index, token_map in mapped.items():
                of_base, of_small = sums[index]
                of_base += float(base[:, token_map.small_ids >= 0].sum())
                of_small += float(logits[index][:, token_map.distinct].exp().sum())
                sums[index] = of_base, of_small
            count += len(base)
        if count >= MASS_TOKENS:
            break
    return tuple(
        MappedMass(ensemble.members[i].name, found.share, *(total / count for total in sums[i]))
        for i, found in mapped.items()
    )


def passage_losses(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    strengths: Sequence[tuple[float, ...]],
    *,
    with_models: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Return each token's loss under every model and under the base steered at every strength.

    Each model runs once over the passages. An engine that shows no logits reads them once for each row.

    Args:
        ensemble: The models.
        passages: At least one passage.
        strengths: For each steered row, the strength of each of the ensemble's pairs.
        with_models: Whether the models by themselves have rows.
        on_progress: Called after each chunk with the number of tokens done and the total.

    Returns:
        `[1 + 2 * num_pairs + num_strengths, num_tokens]` nats, in the order of the passages: the base, expert
        and anti-expert of each pair (if `with_models`), then the steered base.

    Raises:
        InvalidRequest: There is no passage, a prompt or a continuation is empty, or a strength is not finite.
        PromptTooLong: A passage exceeds a model's context.
    """
    if not passages or not all(p.token_ids and all(p.prompts) for p in passages):
        raise InvalidRequest(
            "scoring needs passages, each with a prompt and with tokens to predict"
        )
    total = sum(len(passage.token_ids) for passage in passages)
    for alphas in strengths:
        for alpha in alphas:
            check_alpha(alpha)
    needed = needed_members(ensemble.pairs)
    for index in needed:
        member = ensemble.members[index]
        limit = member.backend.capabilities.max_context
        longest = max(len(p.prompts[index]) + len(p.token_ids) for p in passages)
        if limit is not None and longest > limit:
            raise PromptTooLong(
                f"the window has {longest} tokens, and {member.name} has a context of {limit}.\n"
                f"hint: score with a window of at most {limit}"
            )
    sides = list(sides_of(ensemble.pairs).values()) if with_models else []
    if ensemble.engine is not None:
        for passage in passages:
            ensemble.engine.check_prompts(ensemble, needed, passage.prompts)
        return _engine_losses(ensemble, passages, sides, strengths, on_progress)
    num_sides = len(sides)
    collected: list[list[NDArray[np.float64]]] = [[] for _ in range(num_sides + len(strengths))]
    done = 0
    for passage in passages:
        ids = torch.tensor(passage.token_ids)
        for where, logits in passage_logits(ensemble, passage, needed):
            num_positions, device = len(logits[0]), logits[0].device
            padding_ids = ensemble.vocabulary.padding_ids.to(device)
            for first in range(0, num_positions, SLICE_TOKENS):
                rows = {i: part[first : first + SLICE_TOKENS] for i, part in logits.items()}
                positions = torch.arange(where + first, where + first + len(rows[0]))
                targets = ids[positions].to(device)
                for column, side in enumerate(sides):
                    losses = token_losses(rows[side].float(), targets, padding_ids)
                    collected[column].append(losses)
                for column, alphas in enumerate(strengths, start=num_sides):
                    steered = steered_rows(
                        ensemble, rows, alphas, positions=positions, padding_ids=padding_ids
                    ).logits
                    collected[column].append(token_losses(steered, targets, padding_ids))
            done += num_positions
            if on_progress is not None:
                on_progress(done, total)
        return_free_memory()
    return np.stack([np.concatenate(column) for column in collected])


def _engine_losses(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    sides: Sequence[int],
    strengths: Sequence[tuple[float, ...]],
    on_progress: Callable[[int, int], None] | None,
) -> NDArray[np.float64]:
    """Return the rows of `passage_losses` from the ensemble's engine, which reads the passages for each."""
    engine = ensemble.engine
    assert engine is not None
    texts = [(passage.prompts[0], passage.token_ids) for passage in passages]
    # A member by itself, or None and strengths. What is asked twice is read once.
    is_base = ensemble.policy.is_plain
    wanted: list[tuple[int | None, tuple[float, ...]]] = [(side, ()) for side in sides]
    wanted += [(None, own) if any(own) or not is_base else (0, ()) for own in strengths]
    distinct = list(dict.fromkeys(wanted))
    found: dict[Any, NDArray[np.float64]] = {}
    total, done = sum(len(token_ids) for _, token_ids in texts), 0

    def advance(index: int) -> None:
        nonlocal done
        done += len(texts[index][1])
        if on_progress is not None:
            on_progress(done // len(distinct), total)

    for member, alphas in distinct:
        own = ensemble if member is None else alone(ensemble, member)
        losses = engine.losses(own, texts, alphas, advance)
        found[member, alphas] = np.concatenate([np.array(each, float) for each in losses])
    return np.stack([found[each] for each in wanted])


def explain_passage(
    ensemble: Ensemble, passage: Passage, *, alphas: Sequence[float | None], num_top: int
) -> Iterator[Step]:
    """Yield a step, without text, for each token of a passage: what every model gave that token.

    Args:
        ensemble: The models. The base must show all its logits.
        passage: The text.
        alphas: Strength of each of the ensemble's pairs; None leaves a pair out, 0 only shows it.
        num_top: Number of each model's likeliest tokens to list.
    """
    used = [p for p, alpha in zip(ensemble.pairs, alphas, strict=True) if alpha is not None]
    sides = sides_of(used)
    for first, logits in passage_logits(ensemble, passage, needed_members(used)):
        padding_ids = ensemble.vocabulary.padding_ids.to(logits[0].device)
        for place in range(logits[0].shape[0]):
            index = first + place
            token_id = passage.token_ids[index]
            batch = {member: part[place : place + 1] for member, part in logits.items()}
            found = steered_rows(
                ensemble, batch, alphas, positions=torch.tensor([index]), padding_ids=padding_ids
            )
            steered = found.logits[0].index_fill(-1, padding_ids, -torch.inf)
            rows = {m: row[0].index_fill(-1, padding_ids, -torch.inf) for m, row in batch.items()}
            shown = {"base": rows[0], "steered": steered}
            shown |= {name: rows[member] for name, member in sides.items()}
            weights = None
            if not ensemble.policy.is_plain:
                names = [pair.name for pair in used]
                weights = dict(zip(names, found.weights[:, 0].tolist(), strict=True))
            terms = {
                pair.name: pair.terms(
                    token_id,
                    base_logits=rows[0],
                    expert_logits=rows[pair.expert],
                    anti_expert_logits=rows[pair.anti_expert],
                )
                for pair in used
                if pair.is_weighted
            }
            disagree = None
            if len(used) > 1:
                parts = contributions(ensemble, batch, alphas)
                disagree = bool(has_conflict(rows[0][None], parts)[0])
            yield Step(
                index,
                token_id,
                "",
                float(steered.log_softmax(-1)[token_id]),
                views={n: view(row, token_id, num_top=num_top) for n, row in shown.items()},
                kl=kl_divergence(steered, rows[0]),
                weights=weights,
                terms=terms or None,
                has_conflict=disagree,
            )


def sides_of(pairs: Iterable[Pair]) -> dict[str, int]:
    """Return the members that pairs need, by name: `base`, and `NAME.expert`, `NAME.anti_expert` of each."""
    sides = {"base": 0}
    for pair in pairs:
        sides |= {f"{pair.name}.expert": pair.expert, f"{pair.name}.anti_expert": pair.anti_expert}
    return sides


def needed_members(pairs: Iterable[Pair]) -> list[int]:
    """Return the members that pairs need: the base, and the pairs' experts and anti-experts."""
    return sorted(set(sides_of(pairs).values()))


def by_backend(ensemble: Ensemble, members: Iterable[int]) -> list[tuple[Backend[Any], list[int]]]:
    """Return the backends of members, each with its members; these are rows of the same forwards."""
    groups: dict[int, list[int]] = {}
    for member in members:
        groups.setdefault(id(ensemble.members[member].backend), []).append(member)
    return [(ensemble.members[group[0]].backend, group) for group in groups.values()]


def contributions(
    ensemble: Ensemble, logits: Mapping[int, Tensor], alphas: Sequence[float | None]
) -> list[Contribution]:
    """Return what each pair contributes; a pair whose strength is None contributes nothing."""
    return [
        pair.contribution(
            logits[pair.expert], logits[pair.anti_expert], alpha, base_logits=logits[0]
        )
        for pair, alpha in zip(ensemble.pairs, alphas, strict=True)
        if alpha is not None
    ]


def steered_rows(
    ensemble: Ensemble,
    logits: Mapping[int, Tensor],
    alphas: Sequence[float | None],
    *,
    positions: Tensor,
    padding_ids: Tensor,
) -> Steered:
    """Steer the base by the ensemble's policy.

    Args:
        ensemble: The models.
        logits: Each needed member's logits, `[rows, vocab]`, on one device.
        alphas: Strength of each of the ensemble's pairs; None leaves a pair out.
        positions: `[rows]`, number of new tokens before each row's.
        padding_ids: `[num_padding]`, the base's, on the same device.
    """
    return apply_policy(
        ensemble.policy,
        logits[0],
        contributions(ensemble, logits, alphas),
        positions=positions,
        padding_ids=padding_ids,
    )


def passage_logits(
    ensemble: Ensemble, passage: Passage, needed: Sequence[int]
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Yield as `batch_logits` does for one passage, logits `[chunk, base vocab]`."""
    for start, logits in batch_logits(ensemble, [passage], needed, chunk_tokens=CHUNK_TOKENS):
        yield start, {i: part[0] for i, part in logits.items()}


def batch_logits(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    needed: Sequence[int],
    *,
    chunk_tokens: int,
    states: list[Any] | None = None,
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Yield, chunk by chunk, the index of the chunk's first predicted token and each member's logits.

    Shorter passages are padded on the right with any token, which no earlier position sees.

    Args:
        ensemble: The models.
        passages: The texts; only one if the base is behind an API.
        needed: Indices of the members to run.
        chunk_tokens: Positions per chunk.
        states: Filled with the state of each backend of `by_backend`, for callers that go on from there.

    Yields:
        The index, and logits `[passages, chunk, base vocab]` by member, not normalised.

    Raises:
        UnsupportedModel: The base is behind an API that does not score a given text.
    """
    groups = by_backend(ensemble, needed)
    states = [] if states is None else states
    pieces: dict[int, Tensor] = {}

    def enter(indices: Sequence[int], state: Any, logits: Tensor) -> None:
        for i, part in zip(indices, logits.chunk(len(indices)), strict=True):
            pieces[i] = _whole(ensemble, i, state, part)

    for backend, indices in groups:
        prompts = [passage.prompts[i] for i in indices for passage in passages]
        if (partial := backend.partial) is not None:
            if not partial.can_score:
                raise UnsupportedModel(
                    f"{ensemble.members[0].name} does not score a given text, and each of its tokens would "
                    "cost a call.\nhint: the servers of vLLM and llama-cpp-python score texts"
                )
            state, logits = partial.prefill(prompts, num_new_tokens=[1], is_scored=True)
            logits = _with_first_token(partial, state, logits, passages[0].token_ids[0])
        else:
            adapters = [ensemble.members[i].adapter for i in indices for _ in passages]
            state, logits = backend.prefill(prompts, adapters=adapters)
        states.append(state)
        enter(indices, state, logits[:, None])
    yield 0, {i: p.to(pieces[0].device) for i, p in pieces.items()}
    longest = max(len(passage.token_ids) for passage in passages)
    rows = [[*p.token_ids, *p.token_ids[:1] * (longest - len(p.token_ids))] for p in passages]
    # The logits after the last token predict nothing, so it is not run.
    ids = torch.tensor(rows)[:, :-1]
    for start in range(0, longest - 1, chunk_tokens):
        chunk = ids[:, start : start + chunk_tokens]
        for (backend, indices), state in zip(groups, states, strict=True):
            tokens = torch.cat([ensemble.members[i].alignment.ids_to_small(chunk) for i in indices])
            enter(indices, state, backend.extend(state, tokens))
        yield start + 1, {i: p.to(pieces[0].device) for i, p in pieces.items()}


def _whole(ensemble: Ensemble, index: int, state: Any, logits: Tensor) -> Tensor:
    """Return a member's logits `[passages, chunk, vocab]` in the base's vocabulary, none of them missing."""
    member = ensemble.members[index]
    if (partial := member.backend.partial) is not None:
        (bounds,) = partial.bounds(state)
        rests = torch.tensor([each.rest for each in bounds])
        return spread_rest(logits[0], rests, ensemble.vocabulary.padding_ids)[None]
    return member.alignment.logits_to_base(logits)


def _with_first_token(
    backend: PartialBackend[Any], state: Any, logits: Tensor, token_id: int
) -> Tensor:
    """Return the logits after the prompt, with the text's first token's if the server reveals it."""
    if logits[0, token_id] == -torch.inf:
        logits = logits.clone()
        for found, logprob in backend.reveal(state, 0, 0, [token_id]).items():
            logits[0, found] = logprob
    return logits
