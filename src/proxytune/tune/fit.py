"""Weights and an output bias, fitted to rows: pure functions of logits, no model and no file.

    steered = w_base * base + w_expert * expert - w_anti_expert * anti_expert + bias

With one row of weights for all positions, the loss is convex in weights and bias together. At weights of 1
and no bias this is the published method at alpha 1; the base's temperature is 1 / w_base. Without a small
model the same arithmetic fits a temperature and a bias of the base alone (`fit_without_proxy`).

Words: a *feature* is a logit that has a weight: the base's, the expert's, the negated anti-expert's. A
*chunk* is some positions with all their logits. A position is *thinned* by keeping its likeliest tokens and
a weighted draw of the others, which estimate its normaliser; so weights are fitted without reading the rows
again. Whether a fit is *kept* is never decided on thinned positions.

- Weights: Newton's method on three parameters.
- Bias: the *n* tokens whose counts differ most from what the models expect, by Poisson deviance; then
  L-BFGS on their values with a Gaussian prior (Chen and Rosenfeld 2000, "A survey of smoothing techniques for
  maximum entropy models"), which is exact, since the other tokens' mass is known from one more reading.
- Choice: weights and bias are kept only where they win *clearly* on validation rows. The rows are cut into
  `NUM_FOLDS` stretches, each judged by what was fitted on the others, so that a fit never judges itself.
  Weights have two rivals, fitted in the same way: the best of a list of strengths, and a temperature of the
  base without any small model, lest an expert be credited with what needs none. A win is clear if the 95 %
  interval of the gain in nats per token, resampled in pairs over blocks of tokens, leaves out zero, and the
  gain is at least `LEAST_GAIN`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proxytune.checkpoints.output_bias import OutputBias
from proxytune.errors import InvalidRequest
from proxytune.measure.score import BLOCK_TOKENS, NUM_RESAMPLES, Interval

NEVER = -1e9
"""Stands for -inf: it has no probability either, and 0 * NEVER is a number."""
NUM_TOP, NUM_DRAWN = 256, 256
"""Tokens of a thinned position: the likeliest, and those drawn from the others."""
DRAW_FLATNESS = 0.7
"""Power of the probabilities that tokens are drawn by. Below 1, so that weights below those that thinned the
positions, which give unlikely tokens more, still find them drawn."""
NUM_FOLDS = 4
LEAST_GAIN = 0.01
"""Nats per token that a fit must gain, a perplexity lower by one percent: less is not worth another number in
a recipe."""
LEAST_TOKENS = 4 * BLOCK_TOKENS * NUM_FOLDS
"""Fewer validation tokens decide nothing: a fold needs a few blocks."""
RIDGE = 1e-3
"""Pull of the weights towards where they start, so that two models that say the same have one solution."""
LEAST_BASE_WEIGHT = 0.05
BIAS_IDS = 4000
"""Default number of tokens with a bias."""
BIAS_POSITIONS = 40_000
"""Maximum number of positions that a bias is fitted on: 4,000 tokens at each take 320 MB."""
PRIOR = 4.0
"""Precision of a bias value's prior: a token's count says as much as this many observed tokens."""
LEAST_VALUE = 1e-4
"""A smaller value of a bias changes no probability that anyone could measure."""
NEWTON_STEPS = 25


class Chunk(NamedTuple):
    """Some positions of the rows."""

    logits: Tensor  # [features, positions, vocab] float32, no infinities (`NEVER`)
    targets: Tensor  # [positions] token ids


Read = Callable[[], Iterable[Chunk]]
"""Reads rows from the first position on; called once for each reading."""


def largest(bias: OutputBias, num_ids: int) -> OutputBias:
    """Return the values of the `num_ids` tokens with the largest ones, in the order of their ids."""
    if num_ids >= len(bias):
        return bias
    kept = bias.values.abs().topk(num_ids).indices.sort().values
    return OutputBias(bias.token_ids[kept], bias.values[kept])


def scaled(bias: OutputBias, factor: float) -> OutputBias:
    """Return a bias times a factor."""
    return OutputBias(bias.token_ids, bias.values * factor)


class Mix(NamedTuple):
    """A way to combine the features: a weight for each, and perhaps a bias."""

    weights: tuple[float, ...]
    bias: OutputBias | None = None

    def logits(self, chunk: Chunk) -> Tensor:
        """Return `[positions, vocab]` float32."""
        weights = torch.tensor(self.weights, device=chunk.logits.device)
        mixed: Tensor = torch.tensordot(weights, chunk.logits, dims=1)
        if self.bias is not None:
            mixed += self.bias.dense(mixed.shape[-1], mixed.device)
        return mixed

    def losses(self, chunk: Chunk) -> Tensor:
        """Return `[positions]` negative log-likelihoods of the targets, nats."""
        logits = self.logits(chunk)
        return logits.logsumexp(-1) - logits.gather(-1, chunk.targets[:, None])[:, 0]


# Thinned positions ---------------------------------------------------------------------------------


class Thinned(NamedTuple):
    """Positions with a part of their tokens; `sum exp(w . features + log_weight)` is the normaliser."""

    features: Tensor  # [positions, kept, features] float32
    log_weights: (
        Tensor  # [positions, kept]: 0 at the likeliest tokens, those drawn stand for others too
    )
    token_ids: Tensor  # [positions, kept]
    target_features: Tensor  # [positions, features]
    targets: Tensor  # [positions]

    def at(self, rows: Tensor) -> Thinned:
        """Return some positions, by index or mask."""
        return Thinned(*(part[rows] for part in self))

    def with_bias(self, bias: OutputBias) -> Thinned:
        """Return the positions with the bias as one more feature."""
        width = 1 + max(int(ids.max()) for ids in (self.token_ids, self.targets, bias.token_ids))
        full = bias.dense(width, torch.device("cpu"))
        features = torch.cat([self.features, full[self.token_ids][..., None]], -1)
        targets = torch.cat([self.target_features, full[self.targets][:, None]], -1)
        return self._replace(features=features, target_features=targets)

    def losses(self, weights: Tensor) -> Tensor:
        """Return estimates of `[positions]` losses, nats."""
        return self._scores(weights).logsumexp(-1) - self.target_features @ weights

    def _scores(self, weights: Tensor) -> Tensor:
        return self.features @ weights + self.log_weights


def thin(
    chunks: Iterable[Chunk], weights: Sequence[float], *, generator: torch.Generator
) -> Thinned:
    """Keep `NUM_TOP` tokens of each position and draw `NUM_DRAWN` of the others.

    Args:
        chunks: The positions.
        weights: Those that decide which tokens are likely: about what will be fitted.
        generator: Source of the draw.

    Raises:
        InvalidRequest: There are no positions.
    """
    parts: list[Thinned] = []
    for chunk in chunks:
        logits = chunk.logits.cpu()
        mixed = Mix(tuple(weights)).logits(Chunk(logits, chunk.targets))
        vocab = mixed.shape[-1]
        kept = mixed.topk(min(NUM_TOP, vocab)).indices
        log_weights = torch.zeros(kept.shape)
        if vocab > NUM_TOP:
            rest = (mixed * DRAW_FLATNESS).scatter(1, kept, NEVER).softmax(-1)
            drawn = rest.multinomial(NUM_DRAWN, replacement=True, generator=generator)
            share = rest.gather(1, drawn).clamp_min(1e-30)
            kept = torch.cat([kept, drawn], 1)
            log_weights = torch.cat([log_weights, -(NUM_DRAWN * share).log()], 1)
        wide = kept.expand(len(logits), *kept.shape)
        targets = chunk.targets.cpu()
        at_target = logits.gather(2, targets.expand(len(logits), -1)[..., None])[..., 0]
        parts.append(
            Thinned(
                logits.gather(2, wide).permute(1, 2, 0).contiguous(),
                log_weights,
                kept,
                at_target.T.contiguous(),
                targets,
            )
        )
    if not parts:
        raise InvalidRequest("there are no rows to fit weights on.\nhint: give validation rows")
    return Thinned(*(torch.cat(part) for part in zip(*parts, strict=True)))


def fit_weights(sample: Thinned, start: Sequence[float]) -> tuple[float, ...]:
    """Return the weights with the lowest loss: Newton's method from `start`, halved where it overshoots.

    No weight goes below 0, nor the base's, the first, below `LEAST_BASE_WEIGHT`: one that would is held
    there and the others are fitted again.

    Args:
        sample: The positions.
        start: A weight for each feature, towards which `RIDGE` pulls.
    """
    begin = torch.tensor(start, dtype=torch.float32)
    floor = torch.zeros_like(begin)
    floor[0] = LEAST_BASE_WEIGHT
    weights, free = begin.clone(), torch.ones_like(begin, dtype=torch.bool)
    while True:
        weights = _newton(sample, weights, begin, free)
        below = free & (weights < floor)
        if not below.any():
            return tuple(weights.tolist())
        weights = torch.where(below, floor, weights)
        free &= ~below


def _newton(sample: Thinned, weights: Tensor, begin: Tensor, free: Tensor) -> Tensor:
    if not free.any():
        return weights

    def objective(at: Tensor) -> float:
        return float(sample.losses(at).double().mean() + RIDGE / 2 * ((at - begin) ** 2).sum())

    value = objective(weights)
    for _ in range(NEWTON_STEPS):
        gradient, curvature = _derivatives(sample, weights)
        gradient += RIDGE * (weights - begin)
        curvature += RIDGE * torch.eye(len(weights))
        step = torch.zeros_like(weights)
        step[free] = torch.linalg.solve(curvature[free][:, free], gradient[free])
        for halving in range(20):
            tried = weights - step / 2**halving
            after = objective(tried)
            if after <= value:
                break
        else:
            return weights
        weights, gain, value = tried, value - after, after
        if gain < 1e-7:
            break
    return weights


def _derivatives(sample: Thinned, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradient and matrix of second derivatives of the mean loss."""
    num = len(weights)
    gradient, curvature = torch.zeros(num), torch.zeros(num, num)
    for first in range(0, len(sample.targets), 2048):
        part = Thinned(*(each[first : first + 2048] for each in sample))
        probs = part._scores(weights).softmax(-1)
        mean = torch.einsum("ik,ikf->if", probs, part.features)
        # Centred first: `NEVER` squared would swallow the digits of the others.
        centred = (part.features - mean[:, None]).masked_fill(probs[..., None] == 0, 0.0)
        curvature += torch.einsum("ik,ikf,ikg->fg", probs, centred, centred)
        gradient += (mean - part.target_features).sum(0)
    return gradient / len(sample.targets), curvature / len(sample.targets)


# The bias ------------------------------------------------------------------------------------------


def fit_bias(
    read: Read,
    weights: Sequence[float],
    *,
    num_ids: int = BIAS_IDS,
    prior: float = PRIOR,
    max_positions: int = BIAS_POSITIONS,
) -> OutputBias | None:
    """Return the bias that fits rows best beside the given weights; reads the rows twice.

    Args:
        read: Reads the training rows.
        weights: A weight for each feature.
        num_ids: Maximum number of tokens with a bias.
        prior: Precision of the values' Gaussian prior; larger pulls them to 0.
        max_positions: Positions after this many are left out.

    Returns:
        None if every token occurs as often as expected.
    """
    mix = Mix(tuple(weights))
    counts = expected = torch.zeros(0)
    for chunk in _first(read(), max_positions):
        probs = mix.logits(chunk).softmax(-1)
        if not len(counts):
            counts = torch.zeros(probs.shape[-1])
            expected = torch.zeros_like(counts)
        expected += probs.sum(0).cpu()
        counts += torch.bincount(chunk.targets.cpu(), minlength=len(counts))
    if not counts.sum():
        raise InvalidRequest("there are no rows to fit a bias on.\nhint: give training rows")
    smooth = (counts + prior) * ((counts + prior) / (expected + prior)).log() - (counts - expected)
    token_ids = smooth.topk(min(num_ids, len(smooth))).indices.sort().values
    place = torch.full((len(counts),), -1)
    place[token_ids] = torch.arange(len(token_ids))
    parts: list[tuple[Tensor, Tensor]] = []
    observed = torch.zeros(len(token_ids))
    for chunk in _first(read(), max_positions):
        logits = mix.logits(chunk)
        shares = logits.index_select(-1, token_ids.to(logits.device))
        shares = (shares - logits.logsumexp(-1, keepdim=True)).exp().cpu()
        # bfloat16 halves the memory; its rounding averages out over the positions.
        parts.append((shares.bfloat16(), (1 - shares.sum(-1)).clamp_min(0)))
        seen = place[chunk.targets.cpu()]
        observed += torch.bincount(seen[seen >= 0], minlength=len(token_ids))
    values = _fit_values(parts, observed, prior)
    kept = values.abs() > LEAST_VALUE
    return OutputBias(token_ids[kept], values[kept]) if kept.any() else None


def _fit_values(parts: Sequence[tuple[Tensor, Tensor]], observed: Tensor, prior: float) -> Tensor:
    """Return the values that minimise the loss over all positions plus `prior / 2 * |values|^2`.

    Args:
        parts: For some positions each, the tokens' probabilities `[n, ids]` and that of all others `[n]`.
            The others keep their odds, so a position's normaliser is `others + sum p exp(b)`.
        observed: `[ids]`, how often each token is a target.
        prior: See `fit_bias`.
    """
    values = torch.zeros(len(observed), requires_grad=True)
    total = sum(len(others) for _, others in parts)
    optimizer = torch.optim.LBFGS([values], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        at = values.detach()
        grown = at.exp()
        loss = torch.zeros((), dtype=torch.float64)
        expected = torch.zeros_like(at)
        for shares, others in parts:
            share = shares.float()
            sums = (others + share @ grown).clamp_min(1e-30)
            loss += sums.log().double().sum()
            expected += (1 / sums) @ share
        loss = (loss - (observed * at).sum() + prior / 2 * (at**2).sum()) / total
        values.grad = (expected * grown - observed + prior * at) / total
        return loss.float()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return values.detach()


def _first(chunks: Iterable[Chunk], max_positions: int) -> Iterator[Chunk]:
    for chunk in chunks:
        if max_positions <= 0:
            return
        yield Chunk(chunk.logits[:, :max_positions], chunk.targets[:max_positions])
        max_positions -= len(chunk.targets)


# What is kept --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gain:
    """Losses of two ways to combine, on the same positions, each by what was fitted on other positions.

    Args:
        before: Nats per token without it.
        after: Nats per token with it.
        interval: 95 % interval of `before - after`; None with too few tokens.
    """

    before: float
    after: float
    interval: Interval | None

    @property
    def nats(self) -> float:
        """What it gains, nats per token."""
        return self.before - self.after

    @property
    def is_clear(self) -> bool:
        """Whether it wins clearly, as this file defines."""
        return self.interval is not None and self.interval.low > 0 and self.nats >= LEAST_GAIN


@dataclass(frozen=True, slots=True)
class Fitted:
    """What was fitted, and whether it wins.

    Args:
        alpha: The best of the strengths tried, 0 among them: what weights of 1 are judged at.
        weights: The fitted weights, in the features' order, whether they are kept or not.
        bias: The bias as it would be kept; None if none was fitted.
        weights_with_bias: The weights beside that bias.
        gain: The weights against the better of their rivals, a strength and a temperature of the base.
        bias_gain: Weights and bias against the weights if these win clearly, otherwise against their rival.
        by_num_ids: What the bias gains with fewer tokens.
        num_tokens: Number of validation tokens.
    """

    alpha: float
    weights: tuple[float, ...]
    bias: OutputBias | None
    weights_with_bias: tuple[float, ...] | None
    gain: Gain
    bias_gain: Gain | None
    by_num_ids: dict[int, float]
    num_tokens: int

    @property
    def chosen(self) -> Mix | None:
        """What wins clearly; None where a strength alone is as good."""
        if self.bias_gain is not None and self.bias_gain.is_clear:
            assert self.weights_with_bias is not None
            return Mix(self.weights_with_bias, self.bias)
        return Mix(self.weights) if self.gain.is_clear else None

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON, without the bias's values."""
        mix = self.chosen
        return {
            "alpha": self.alpha,
            "weights": list(self.weights),
            "weights_with_bias": self.weights_with_bias and list(self.weights_with_bias),
            "gain": asdict(self.gain) | {"is_clear": self.gain.is_clear},
            "bias_gain": self.bias_gain
            and asdict(self.bias_gain) | {"is_clear": self.bias_gain.is_clear},
            "by_num_ids": self.by_num_ids,
            "num_tokens": self.num_tokens,
            "num_ids": 0 if self.bias is None else len(self.bias),
            "kept": "none"
            if mix is None
            else "weights"
            if mix.bias is None
            else "weights and bias",
        }


def fit(
    valid: Read,
    train: Read | None,
    *,
    num_features: int = 3,
    alphas: Sequence[float] = (),
    num_ids: int = BIAS_IDS,
    prior: float = PRIOR,
    seed: int = 0,
) -> Fitted:
    """Fit weights on validation rows and, with training rows, a bias; say what wins clearly.

    Validation and training rows are read twice each. The bias is fitted on the training rows at
    the fitted weights, and how strongly it counts on the validation rows: an expert knows its training
    rows, and what it lacks there is less than what it lacks elsewhere.

    Args:
        valid: Reads the validation rows.
        train: Reads the training rows; None fits no bias.
        num_features: 3 for base, expert and negated anti-expert; 1 for a base alone.
        alphas: The strengths that weights of 1 are tried at, beside 0; none for a base alone.
        num_ids: Maximum number of tokens with a bias.
        prior: See `fit_bias`.
        seed: Random seed of draws and bootstrap.

    Raises:
        InvalidRequest: There are too few validation tokens to decide on.
    """
    generator = torch.Generator().manual_seed(seed)
    start = (1.0,) * num_features
    sample = thin(valid(), start, generator=generator)
    num_tokens = len(sample.targets)
    if num_tokens < LEAST_TOKENS:
        raise InvalidRequest(
            f"there are {num_tokens:,} validation tokens, and fitting needs at least {LEAST_TOKENS:,} to say "
            "whether it helps.\nhint: give more validation rows, or leave the fit out"
        )
    strengths = [(1.0,) + (alpha,) * (num_features - 1) for alpha in (0.0, *alphas)]

    def best(part: Thinned) -> tuple[float, ...]:
        losses = [float(part.losses(torch.tensor(each)).mean()) for each in strengths]
        return strengths[int(np.argmin(losses))]

    weights = fit_weights(sample, start)
    ways: dict[Any, list[Mix]] = {
        "strength": [Mix(each) for each in _crossed(sample, best)],
        "weights": [Mix(each) for each in _crossed(sample, lambda part: fit_weights(part, start))],
    }
    if num_features > 1:
        alone = sample._replace(
            features=sample.features[..., :1], target_features=sample.target_features[:, :1]
        )
        none = (0.0,) * (num_features - 1)
        tempered = _crossed(alone, lambda part: fit_weights(part, (1.0,)))
        ways["temperature"] = [Mix(each + none) for each in tempered]
    bias = with_bias = None
    counts: list[int] = []
    begin = (*weights, 1.0)
    if train is not None:
        bias = fit_bias(train, weights, num_ids=num_ids, prior=prior)
    if bias is not None:
        counts = [n for n in (250, 1000) if n < len(bias)] + [len(bias)]
        for count in counts:
            fewer = largest(bias, count)
            joint = sample.with_bias(fewer)
            ways[count] = [
                Mix(each[:-1], scaled(fewer, each[-1]))
                for each in _crossed(joint, lambda part: fit_weights(part, begin))
            ]
        *with_bias, scale = fit_weights(joint, begin)
        bias = scaled(bias, scale)
    losses = _crossed_losses(valid(), ways, num_tokens)
    rivals = [losses[name] for name in ("strength", "temperature") if name in losses]
    rival = min(rivals, key=lambda each: float(each.mean()))
    gain = gain_of(rival, losses["weights"], seed=seed)
    by_num_ids = {n: gain.after - float(losses[n].mean()) for n in counts}
    bias_gain = None
    if counts:
        bias_gain = gain_of(
            losses["weights"] if gain.is_clear else rival, losses[counts[-1]], seed=seed
        )
    return Fitted(
        alpha=best(sample)[-1] if num_features > 1 else 0.0,
        weights=weights,
        bias=bias,
        weights_with_bias=None if with_bias is None else tuple(with_bias),
        gain=gain,
        bias_gain=bias_gain,
        by_num_ids=by_num_ids,
        num_tokens=num_tokens,
    )


def _folds(num_tokens: int) -> Tensor:
    """Return `[num_tokens]`, the stretch of the rows that each token belongs to."""
    return torch.arange(num_tokens) * NUM_FOLDS // num_tokens


def _crossed(
    sample: Thinned, of: Callable[[Thinned], tuple[float, ...]]
) -> list[tuple[float, ...]]:
    """Return for each stretch what is fitted on all others."""
    fold_of = _folds(len(sample.targets))
    return [of(sample.at(fold_of != fold)) for fold in range(NUM_FOLDS)]


def _crossed_losses(
    chunks: Iterable[Chunk], ways: dict[Any, list[Mix]], num_tokens: int
) -> dict[Any, NDArray[np.float64]]:
    """Return `[num_tokens]` exact losses of each way, each fold by its own mix."""
    found: dict[Any, list[Tensor]] = {name: [] for name in ways}
    first, fold_of = 0, _folds(num_tokens)
    for chunk in chunks:
        count = len(chunk.targets)
        folds = fold_of[first : first + count]
        for name, mixes in ways.items():
            losses = torch.zeros(count)
            for fold in sorted(set(folds.tolist())):
                rows = folds == fold
                part = Chunk(chunk.logits[:, rows], chunk.targets[rows])
                losses[rows] = mixes[fold].losses(part).cpu()
            found[name].append(losses)
        first += count
    return {name: torch.cat(parts).double().numpy() for name, parts in found.items()}


def gain_of(before: NDArray[np.float64], after: NDArray[np.float64], *, seed: int) -> Gain:
    """Return what one way gains over another on the same positions.

    Args:
        before: `[num_tokens]` losses, nats, in text order.
        after: `[num_tokens]`, on the same tokens.
        seed: Random seed of the bootstrap over blocks of `BLOCK_TOKENS` tokens.
    """
    interval = None
    num_blocks = len(before) // BLOCK_TOKENS
    if num_blocks >= 2:
        blocks = np.array_split(before - after, num_blocks)
        sums = np.array([block.sum() for block in blocks])
        sizes = np.array([len(block) for block in blocks])
        picks = np.random.default_rng(seed).integers(
            0, num_blocks, size=(NUM_RESAMPLES, num_blocks)
        )
        bounds = np.percentile(sums[picks].sum(1) / sizes[picks].sum(1), [2.5, 97.5])
        interval = Interval(*bounds.tolist())
    return Gain(float(before.mean()), float(after.mean()), interval)


# Without a small model -----------------------------------------------------------------------------


def fit_without_proxy(
    train: Read, valid: Read, *, num_ids: int = BIAS_IDS, prior: float = PRIOR, seed: int = 0
) -> Fitted:
    """Fit a temperature and an output bias of the base alone: what any small model has to beat.

    Much of what a small expert learns from running text is how often each word occurs. That needs no model:
    `weights_with_bias[0]` is 1 / temperature, and `bias` what to add to the base's logits. The row belongs
    beside every perplexity of a steered base.

    Args:
        train: Reads the training rows, with the base's logits as the only feature.
        valid: Reads the validation rows in the same way.
        num_ids: Maximum number of tokens with a bias.
        prior: See `fit_bias`.
        seed: Random seed.

    Raises:
        InvalidRequest: There are too few validation tokens.
    """
    return fit(valid, train, num_features=1, num_ids=num_ids, prior=prior, seed=seed)


def perplexity(chunks: Iterable[Chunk], mix: Mix) -> float:
    """Return the exponential of the mean loss of a way to combine, for example on test rows."""
    losses = torch.cat([mix.losses(chunk).double().cpu() for chunk in chunks])
    return math.exp(float(losses.mean()))
