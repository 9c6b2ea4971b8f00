"""Whether a run calibrates its anti-expert, and where an anti-expert of an earlier run is."""

from __future__ import annotations

from pathlib import Path

from proxytune.checkpoints.references import local_path
from proxytune.errors import InvalidRequest
from proxytune.recipe.recipe import Recipe
from proxytune.tune.formats import Formats
from proxytune.tune.settings import Method, TuneSettings

FEWEST_TOKENS = 2_000
"""Fewer trained tokens teach the anti-expert too little: a pair of the smol family trained on 511 tokens of
plays raised the perplexity at alpha 1 from 30.2 to 32.4."""


def calibrates(settings: TuneSettings, method: Method, formats: Formats) -> bool:
    """Return whether a run trains a calibrated anti-expert, or uses a given one.

    Raises:
        InvalidRequest: It is asked for and cannot be done.
    """
    is_asked = settings.asks_to_calibrate
    if not settings.is_pair or settings.calibrate is False:
        return False
    if is_asked and method == "cpt":
        raise InvalidRequest(
            "method cpt trains the expert through the anti-expert that it starts from, and calibration "
            "trains another one.\nhint: --method sft, and --then-cpt for cpt afterwards"
        )
    if is_asked and method == "grpo":
        raise InvalidRequest(
            "method grpo trains on rewards for the expert's own answers, and calibration needs answers that "
            "the rows give.\nhint: leave out --calibrate, --calibrated and --then-cpt"
        )
    if is_asked and not formats.are_equal:
        raise InvalidRequest(
            "calibration compares base and anti-expert over one sequence of tokens, and they have different "
            "templates.\nhint: leave --base-template out, or use --no-calibrate"
        )
    if settings.then_cpt and method == "dpo":
        raise InvalidRequest(
            "then_cpt trains on text, completions or messages, and the rows are preference pairs.\n"
            "hint: leave --then-cpt out"
        )
    if is_asked and settings.full:
        raise InvalidRequest(
            "with --full, calibration would train and keep the small model twice.\n"
            "hint: leave --full out to train two adapters, or use --no-calibrate"
        )
    if settings.calibrated and method == "dpo":
        if settings.start_from is not None:
            raise InvalidRequest(
                f"with dpo the expert starts from the calibrated anti-expert {settings.calibrated}, and "
                f"start_from names {settings.start_from}.\nhint: leave one of the two out"
            )
        settings.check_keeps_adapter("calibrated")
    if method == "sft" and not settings.full and formats.are_equal:
        return True
    return is_asked


def few_tokens(num_trained: int) -> str | None:
    """Return what to say of too few tokens to calibrate on; None if they are enough."""
    if num_trained >= FEWEST_TOKENS:
        return None
    return (
        f"the rows have {num_trained:,} tokens to train on, and an anti-expert needs about {FEWEST_TOKENS:,} "
        "to learn what the base says on them; with fewer, text at alpha 1 may be worse than the base's. "
        "More rows help, or --calibrated with an anti-expert of similar rows"
    )


def find_calibrated(reference: str) -> Path:
    """Return the directory of a calibrated anti-expert's adapter.

    Args:
        reference: The adapter's directory, or a recipe whose first expert has it.

    Raises:
        InvalidRequest: It is neither.
        RecipeError: The recipe is malformed.
    """
    path = local_path(reference, root=Path.cwd())
    if path is not None and (path / "adapter_config.json").is_file():
        return path.absolute()
    recipe = Recipe.read(reference)
    adapter = recipe.experts[0].anti_expert.adapter
    assert recipe.directory is not None
    place = None if adapter is None else local_path(adapter, root=recipe.directory)
    if place is None:
        raise InvalidRequest(
            f"the anti-expert of {reference} has no adapter here, so it was not calibrated.\n"
            "hint: give a recipe that was tuned with --calibrate, or an adapter's directory"
        )
    return place.absolute()
