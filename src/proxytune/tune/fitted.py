"""The weights and the output bias of a recipe's expert, fitted to rows with the loaded models.

The arithmetic is `fit.py`'s. Here a recipe's models read the rows, what cannot be fitted is refused, and what
wins clearly becomes keys of the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from proxytune.checkpoints.output_bias import write_output_bias
from proxytune.data.passages import passages_of
from proxytune.data.rows import Rows
from proxytune.errors import UnsupportedModel, UserError
from proxytune.measure.score import Passage, scoring_window
from proxytune.recipe.spec import ExpertSpec, ExpertWeights
from proxytune.tune.features import reader
from proxytune.tune.fit import BIAS_IDS, BIAS_POSITIONS, Fitted, fit
from proxytune.tune.settings import ALPHAS, Display, TuneResult, TuneSettings

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned

Advance = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done of it, and the total."""


def fit_expert(
    model: ProxyTuned,
    name: str,
    *,
    valid: Sequence[Passage],
    train: Sequence[Passage] | None,
    alphas: Sequence[float],
    num_ids: int = BIAS_IDS,
    seed: int = 0,
    on_progress: Advance | None = None,
) -> Fitted:
    """Fit an expert's weights and, with training passages, an output bias.

    Weights and a bias that the recipe has are left out of account: what is fitted replaces them.

    Args:
        model: The recipe, loaded.
        name: The expert.
        valid: Passages to fit weights on, and to decide on.
        train: Passages to fit a bias on; those after `BIAS_POSITIONS` tokens are left out. None fits none.
        alphas: Strengths that weights have to beat.
        num_ids: Maximum number of tokens with a bias.
        seed: Random seed.
        on_progress: Shows progress.

    Raises:
        UnsupportedModel: The logits of some tokens are unknown, or steering follows a policy.
        InvalidRequest: There are too few validation tokens.
    """
    ensemble = model.steered_by(name)
    if not ensemble.policy.is_plain:
        raise UnsupportedModel(
            f"the recipe steers by the policy {ensemble.policy.describe()}, and weights are fitted to plain "
            "steering.\nhint: leave the policy out, or choose a strength with `proxytune sweep`"
        )

    return fit(
        reader(ensemble, valid, on_progress=_staged(on_progress, "fitting on validation rows")),
        None
        if train is None
        else reader(
            ensemble,
            first_of(train, BIAS_POSITIONS),
            on_progress=_staged(on_progress, "fitting a bias on training rows"),
        ),
        alphas=alphas,
        num_ids=num_ids,
        seed=seed,
    )


def _staged(on_progress: Advance | None, stage: str) -> Callable[[int, int], None] | None:
    return None if on_progress is None else partial(on_progress, stage)


def first_of(passages: Sequence[Passage], num_tokens: int) -> list[Passage]:
    """Return the first passages that have this many tokens together, or all."""
    kept, size = [], 0
    for passage in passages:
        if size >= num_tokens:
            break
        kept.append(passage)
        size += len(passage.token_ids)
    return kept


def fitted_spec(spec: ExpertSpec, fitted: Fitted, directory: Path) -> ExpertSpec:
    """Return an expert with what wins clearly, at strength 1, and write its bias.

    If nothing wins clearly, the expert is returned as it is.

    Args:
        spec: The expert as the recipe has it.
        fitted: What was fitted.
        directory: The recipe's directory, which the bias is written into.

    Raises:
        OutputFileError: The bias cannot be written.
    """
    mix = fitted.chosen
    if mix is None:
        return spec
    path = None
    if mix.bias is not None:
        path = f"biases/{spec.name}.safetensors"
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        write_output_bias(directory / path, mix.bias)
    return replace(spec, alpha=1.0, weights=ExpertWeights(*mix.weights), bias=path)


def words_of(fitted: Fitted) -> str:
    """Return in a sentence what was fitted, what it gains, and whether it is kept."""
    mix = fitted.chosen
    gain = fitted.gain if mix is None or mix.bias is None else fitted.bias_gain
    assert gain is not None
    named = "weights" if mix is None or mix.bias is None else "weights and output bias"
    weights = fitted.weights if mix is None else mix.weights
    shown = ", ".join(
        f"{name} {weight:.2f}"
        for name, weight in zip(("base", "expert", "anti-expert"), weights, strict=True)
    )
    interval = ""
    if gain.interval is not None:
        interval = f" ({gain.interval.low:+.3f} to {gain.interval.high:+.3f})"
    if mix is None:
        return (
            f"fitted weights ({shown}) gain {gain.nats:+.3f} nats per token{interval} over a strength or a "
            "temperature of the base alone, which is no clear win, so the recipe's stay"
        )
    tokens = "" if mix.bias is None else f", {len(mix.bias):,} tokens with a bias"
    return (
        f"{named} fitted ({shown}{tokens}): they gain {gain.nats:.3f} nats per token{interval} on "
        f"{fitted.num_tokens:,} validation tokens, each judged by a fit on others, so alpha is 1"
    )


def tuned_fit(
    settings: TuneSettings,
    model: ProxyTuned,
    spec: ExpertSpec,
    result: TuneResult,
    train: Rows,
    valid: Rows,
    display: Display,
) -> tuple[ExpertSpec, TuneResult]:
    """Fit what `TuneSettings.fit` asks for, at the end of a run that chose a strength.

    Args:
        settings: The run's settings.
        model: The run's recipe, loaded.
        spec: Its expert.
        result: The run's result so far.
        train: The training rows, for a bias.
        valid: The validation rows.
        display: Shows what is kept, or why nothing was fitted.

    Returns:
        The expert with what wins clearly, its bias written, and the result with what was fitted; both as they
        were if nothing was.
    """
    if settings.fit == "none" or not result.tried:
        return spec, result
    window = scoring_window(model.ensemble)
    try:
        fitted = fit_expert(
            model,
            spec.name,
            valid=first_of(passages_of(model, valid, window=window), settings.measure_tokens),
            train=passages_of(model, train, window=window) if settings.fit == "bias" else None,
            alphas=ALPHAS,
            seed=settings.seed,
            on_progress=display.stage,
        )
    except UserError as error:
        display.say(f"weights are not fitted: {error}")
        return spec, result
    words = words_of(fitted)
    display.say(words)
    result = replace(result, fit={**fitted.to_dict(), "words": words})
    found = fitted_spec(spec, fitted, settings.directory)
    if found != spec:
        result = replace(result, alpha=found.alpha, tried=(), best_alpha=None, edge=None)
    return found, result
