"""The trainings of a run, one after the other.

Most runs have a single one. With `then_cpt` a pair is trained first, and its expert goes on through the
ensemble. With `dpo` and calibration the anti-expert is trained first, and the expert starts from it. What
preferences teach is measured against the model that the expert starts from, so the difference of the two is
the preference alone, as it is without calibration, on a small model that speaks more like the base. An
expert that started from the untuned model would lack what the anti-expert learned, and steering would take
that away from the base.

What a first training returned is kept until the run is done, so that a resumed run does not repeat it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from proxytune.files import write_json
from proxytune.tune.encode import Encoded, PreferenceExample
from proxytune.tune.settings import anti_expert_path, expert_path
from proxytune.tune.training import Training

CPT_RATE, CPT_STEPS = 0.5, 0.5
"""Learning rate and steps of training a pair on through the ensemble, as shares of the pair's."""
CPT_DROPOUT = 0.1
"""Lowest dropout of the expert where it is trained on through the ensemble: it overfits sooner there."""
FIRST_DIR = "pair"
"""Name of the folder with a first training's adapters and result, in `TuneSettings.training`."""
RESULT_NAME = "result.json"


def train(training: Training) -> dict[str, Any]:
    """Run all trainings, and leave the best state in the recipe's directory.

    Returns:
        The fields of `TuneResult` that training decides, and under `examples_read` the indices of the
        training examples that were read.

    Raises:
        Interrupted: The user stopped it; the state is saved.
        OutputFileError: A checkpoint or the expert cannot be written.
        BackendError: The loss or a gradient is not finite, or memory ran out.
    """
    settings = training.settings
    target = settings.directory / expert_path(settings)
    if training.method == "dpo" and training.calibrates:
        return _preferences(training, target)
    if settings.then_cpt:
        return _pair_then_cpt(training, target)
    return training.run(target)


def _pair_then_cpt(training: Training, target: Path) -> dict[str, Any]:
    """Train a pair, then its expert through the ensemble, and keep the better expert."""
    settings = training.settings
    folder = settings.training / FIRST_DIR
    pair = _once(folder, lambda: training.run(folder))
    on = replace(
        settings,
        learning_rate=CPT_RATE * pair["learning_rate"],
        max_steps=max(1, round(CPT_STEPS * training.num_steps)),
        lora_dropout=max(settings.lora_dropout, CPT_DROPOUT),
    )
    training.display.say("training the expert on through base and calibrated anti-expert")
    second = replace(
        training, settings=on, method="cpt", calibrates=False, start=folder, stage="cpt"
    )
    outcome = second.run(target)
    losses = pair["valid_loss"], outcome["valid_loss"]
    if None not in losses and losses[1] >= losses[0]:
        training.display.say(
            f"the pair alone has the lower validation loss ({losses[0]:.4f}, then {losses[1]:.4f}), so its "
            "expert is kept"
        )
        for path in target.iterdir():
            shutil.copy2(folder / path.name, path)
    return {
        **outcome,
        **_together(pair, outcome),
        "num_parameters": pair["num_parameters"],
        "valid_loss": min((loss for loss in losses if loss is not None), default=None),
        "first_valid_loss": pair["first_valid_loss"],
        "learning_rate": pair["learning_rate"],
    }


def _preferences(training: Training, target: Path) -> dict[str, Any]:
    """Calibrate the anti-expert on the chosen answers, then train the expert from there on the pairs."""
    settings = training.settings
    if training.given is not None:
        # As from `start_from`: the adapter has a rank and layers of its own.
        on = replace(settings, start_from=str(training.given))
        return replace(training, settings=on, calibrates=False).run(target)
    start = settings.directory / anti_expert_path(settings)
    rate = settings.learning_rate
    first = replace(
        training,
        # Texts take ten times the rate of pairs; see `default_learning_rate`.
        settings=settings if rate is None else replace(settings, learning_rate=10 * rate),
        method="sft",
        encoded={name: _chosen(part) for name, part in training.encoded.items()},
        stage="anti-expert",
    )
    training.display.say("calibrating the anti-expert on the chosen answers")
    folder = settings.training / FIRST_DIR
    anti_expert = _once(folder, lambda: first.run(start))
    outcome = replace(training, calibrates=False, start=start).run(target)
    return outcome | _together(anti_expert, outcome)


def _once(folder: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a first training returned, running it unless it is done."""
    path = folder / RESULT_NAME
    if not path.exists():
        outcome = run()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, outcome | {"examples_read": sorted(outcome["examples_read"])})
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _together(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two trainings took together."""
    return {
        "num_steps": first["num_steps"] + second["num_steps"],
        "train_s": round(first["train_s"] + second["train_s"], 2),
        "offsets_s": round(first["offsets_s"] + second["offsets_s"], 2),
        "examples_read": second["examples_read"] | frozenset(first["examples_read"]),
    }


def _chosen(part: Encoded) -> Encoded:
    """Return preference pairs as examples of their chosen answers."""
    return replace(
        part, examples=[e.chosen for e in part.examples if isinstance(e, PreferenceExample)]
    )
