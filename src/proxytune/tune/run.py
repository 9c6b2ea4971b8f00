"""One tuning run, from rows to a recipe that is ready to generate.

    result = tune(TuneSettings(output="my-recipe", data="rows.jsonl", anti_expert="small", base="large"))

The output directory is a recipe; the run's own files are in `training/`:

    config.json, README.md       the recipe and its model card
    adapters/NAME or expert/     the expert: a LoRA adapter, or full weights
    training/settings.json       the settings, and digests of the data
    training/log.jsonl           losses, a row per logged step
    training/loss.png            the same as a picture
    training/result.json         the measurements

Checkpoints and offsets stand in `training/` too until the run is done. A run resumes from its last whole
checkpoint, provided that settings and data are those it began with. Training itself is `training.py`'s.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from proxytune.checkpoints.references import local_reference
from proxytune.data.rows import Rows, answers_of, read_rows, split_rows
from proxytune.errors import (
    AdapterMismatch,
    InputFileError,
    InvalidRequest,
    OutputFileError,
    UserError,
    missing_extra,
)
from proxytune.files import write_json
from proxytune.machine import versions
from proxytune.measure.score import scoring_window
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.tune.encode import encode, is_conversation, limited
from proxytune.tune.settings import LOSS_LOG, Display, TuneResult, TuneSettings, expert_path

if TYPE_CHECKING:
    from proxytune.checkpoints.checkpoint import Checkpoint
    from proxytune.measure.score import ScoreReport
    from proxytune.model import ProxyTuned
    from proxytune.request import Prompt

ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 16))
"""Strengths tried on the validation rows."""
MOST_VALID_ROWS = 500
"""Maximum number of validation rows taken from the training rows: every evaluation reads all of them."""
CHARACTERS_PER_TOKEN = 4
"""Roughly, for English; the amount of text that is measured need not be exact."""


def tune(
    settings: TuneSettings, *, resume: bool = False, display: Display | None = None
) -> TuneResult:
    """Train an expert and write its recipe.

    Args:
        settings: The run's settings.
        resume: Continue the run in the output directory.
        display: Shows progress; None shows nothing.

    Raises:
        MissingExtra: A library that tuning needs is not installed.
        InputFileError: The data cannot be read or used; names the line.
        OutputFileError: The output directory holds something else, or cannot be written.
        UserError: A model is missing, unsafe, does not match, or does not fit; see `errors.py`.
        Interrupted: The user pressed Ctrl-C; the state is saved.
        BackendError: Training failed, for example because the loss is not a number.
    """
    display = display or Display()
    for library in ("trl", "datasets", "matplotlib"):
        if importlib.util.find_spec(library) is None:
            message = f"tuning needs the library {library}, which is not installed"
            raise missing_extra(message, "tune")
    from proxytune.backends.transformers.weights import quietly

    run = _Run(settings, display)
    try:
        with quietly():
            return run.result(resume=resume)
    finally:
        display.close()


class _Run:
    """The stages of one run, in order."""

    def __init__(self, settings: TuneSettings, display: Display) -> None:
        self._settings = settings
        self._display = display

    def result(self, *, resume: bool) -> TuneResult:
        settings, display = self._settings, self._display
        self._check_directory(resume=resume)
        small, base = self._check_models()
        train, valid, test = self._read_rows()
        prompt = settings.prompt or ("chat" if is_conversation(train) else "plain")
        data: dict[str, dict[str, Any]] = {
            name: {"source": r.source, "kind": r.kind, "rows": len(r), "digest": r.digest}
            for name, r in (("train", train), ("valid", valid), ("test", test))
            if r is not None
        }
        max_length = self._max_length(small, base)
        encoded = {
            name: encode(
                rows, small.tokenizer, prompt_format=prompt, max_length=max_length, name=small.name
            )
            for name, rows in (("train", train), ("valid", valid))
            if rows is not None
        }
        if self._claim(resume=resume, data=data):
            display.say("this run is already finished")
            return _read_result(settings.training / "result.json")
        limits = {"train": settings.max_tokens, "valid": settings.max_valid_tokens}
        encoded = {k: limited(part, limits[k], settings.seed) for k, part in encoded.items()}
        for name, part in encoded.items():
            for key in ("num_truncated", "num_dropped", "num_tokens", "num_trained"):
                data[name][key] = getattr(part, key)
            data[name]["num_examples"] = len(part.examples)
            display.say(f"{name}: {_shown_counts(data[name], max_length)}")
        # Here, since TRL takes seconds to import and everything above can refuse the run.
        from proxytune.tune.training import Training

        outcome = Training(settings, small, base, encoded, max_length, display).run()
        display.say("writing the recipe")
        recipe = self._recipe(small, base, prompt)
        result = TuneResult(
            directory=settings.output,
            expert=settings.expert_name,
            alpha=recipe.experts[0].alpha,
            data=data,
            environment={
                "torch": torch.__version__,
                "num_threads": torch.get_num_threads(),
                **versions("proxytune", "transformers", "peft", "trl"),
            },
            **outcome,
        )
        self._publish(recipe, result, prompt)
        result = self._measured(recipe, result, valid, test)
        recipe = replace(recipe, experts=(replace(recipe.experts[0], alpha=result.alpha),))
        self._publish(recipe, result, prompt)
        write_json(settings.training / "result.json", result.to_dict())
        for leftover in ("checkpoints", "offsets"):
            shutil.rmtree(settings.training / leftover, ignore_errors=True)
        return result

    # Before training ---------------------------------------------------------------------------

    def _check_directory(self, *, resume: bool) -> None:
        directory, training = self._settings.directory, self._settings.training
        there = (training / "settings.json").exists()
        if resume and not there:
            raise OutputFileError(
                f"{directory} holds no run to resume.\nhint: leave out --resume to start one"
            )
        if there and not resume:
            raise OutputFileError(
                f"{directory} holds another run, which this one would overwrite.\n"
                "hint: continue it with --resume, or name another directory"
            )
        is_used = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
        if is_used and not there:
            raise OutputFileError(
                f"{directory} already exists and is not a tuning run.\nhint: name a new directory"
            )

    def _check_models(self) -> tuple[Checkpoint, Checkpoint | None]:
        """Find the models, and check that they fit together in a recipe, as `proxytune doctor` does."""
        from proxytune.checkpoints.checkpoint import find_checkpoint
        from proxytune.loading.doctor import examine

        settings = self._settings
        small = find_checkpoint(settings.small, root=Path.cwd())
        self._check_targets(small)
        if settings.anti_expert is None or settings.base is None:
            return small, None
        whole = ModelSpec(model=settings.anti_expert)
        experts = (ExpertSpec(settings.expert_name, whole, whole),)
        recipe = Recipe(base=ModelSpec(model=settings.base), experts=experts)
        examine(recipe.with_settings(device=settings.device)).raise_first()
        return small, find_checkpoint(settings.base, root=Path.cwd())

    def _check_targets(self, small: Checkpoint) -> None:
        known = {name.rpartition(".")[2] for name in small.linear_shapes}
        for target in self._settings.lora_targets:
            if target not in known:
                raise AdapterMismatch(
                    f"{small.name} has no linear layer {target!r} to put an adapter on; it has "
                    f"{', '.join(sorted(known))}.\nhint: leave out --lora-targets to adapt all of them"
                )

    def _read_rows(self) -> tuple[Rows, Rows | None, Rows | None]:
        settings = self._settings
        train = read_rows(settings.data, split=settings.split)
        valid: Rows | None
        if settings.valid_data is not None:
            valid = read_rows(settings.valid_data, split=settings.split)
        else:
            share = settings.valid_share
            if len(train) > 1:
                share = min(share, MOST_VALID_ROWS / len(train))
            train, valid = split_rows(train, share, settings.seed)
        test = None if settings.test_data is None else read_rows(settings.test_data)
        for other in (valid, test):
            if other is not None and other.kind != train.kind:
                raise InputFileError(
                    f"the rows of {other.source} have the format {other.kind}, and those of {train.source} "
                    f"have the format {train.kind}.\nhint: convert both to one format"
                )
        if (train.kind == "preference") != (settings.method == "dpo"):
            is_dpo = settings.method == "dpo"
            wanted = "preference pairs" if is_dpo else "text, completions or messages"
            raise InputFileError(
                f"method {settings.method} trains on {wanted}, and the rows of {train.source} have the "
                f"format {train.kind}.\nhint: give another file, or "
                f"--method {'sft' if is_dpo else 'dpo'}"
            )
        return train, valid, test

    def _claim(self, *, resume: bool, data: Mapping[str, Any]) -> bool:
        """Record the run in its directory, or compare it with the recorded one; return if it is done."""
        settings = self._settings
        path = settings.training / "settings.json"
        # The location of files does not change a run; data are compared by their content.
        asked = {
            key: value
            for key, value in json.loads(json.dumps(asdict(settings))).items()
            if key not in ("output", "device", "offsets_dir", "data", "valid_data", "test_data")
        }
        content = {"settings": asked, "data": {name: part["digest"] for name, part in data.items()}}
        if not resume:
            write_json(path, content)
            return False
        there = json.loads(path.read_text("utf-8"))
        for key, value in asked.items():
            if there["settings"].get(key) != value:
                raise OutputFileError(
                    f"the run in {settings.directory} was started with {key} "
                    f"{there['settings'].get(key)!r}, and {key} is now {value!r}.\n"
                    "hint: resume with the settings it was started with"
                )
        if there["data"] != content["data"]:
            raise OutputFileError(
                f"the run in {settings.directory} was started with other data than these files hold now.\n"
                "hint: restore the old files, or start a new run in another directory"
            )
        return (settings.training / "result.json").exists()

    def _max_length(self, small: Checkpoint, base: Checkpoint | None) -> int:
        contexts = [c.max_context for c in (small, base) if c is not None]
        limit = min((n for n in contexts if n is not None), default=None)
        asked = self._settings.max_length
        if asked is not None and limit is not None and asked > limit:
            raise InvalidRequest(
                f"max_length is {asked}, and the smallest context has {limit} tokens.\n"
                f"hint: --max-length {limit}"
            )
        return asked or min(1024, limit or 1024)

    # After training ----------------------------------------------------------------------------

    def _recipe(self, small: Checkpoint, base: Checkpoint | None, prompt: str) -> Recipe:
        settings = self._settings
        directory = settings.directory
        reference = local_reference(settings.small, directory)
        path = expert_path(settings)
        if settings.full:
            expert = ModelSpec(model=path, prompt=prompt)
        else:
            expert = ModelSpec(model=reference, adapter=path, prompt=prompt)
        anti_expert = ModelSpec(model=reference, prompt=prompt)
        if base is None:
            # The tuned model by itself: small + 1 * (tuned - small).
            same = ModelSpec(same_as="base")
            pair = ExpertSpec(settings.expert_name, expert, same, settings.alpha or 1.0)
            return Recipe(base=anti_expert, experts=(pair,), directory=directory)
        base_prompt = settings.base_prompt or prompt
        if settings.base_prompt is None and prompt == "chat":
            template = small.tokenizer.chat_template
            if isinstance(template, str) and base.tokenizer.chat_template != template:
                base_prompt = template  # so that base and expert see the same text
        large = ModelSpec(model=local_reference(settings.base or "", directory), prompt=base_prompt)
        pair = ExpertSpec(settings.expert_name, expert, anti_expert, settings.alpha or 1.0)
        return Recipe(base=large, experts=(pair,), directory=directory)

    def _measured(
        self, recipe: Recipe, result: TuneResult, valid: Rows | None, test: Rows | None
    ) -> TuneResult:
        """Measure base, expert and steered base, and choose the strength if none was given."""
        from proxytune.model import ProxyTuned

        settings = self._settings
        if (valid is None and test is None) or settings.measure_tokens == 0:
            return result
        try:
            model = ProxyTuned.load(recipe, device=settings.device)
        except UserError as error:
            self._display.say(f"not measured: {error}")
            return result
        alpha = result.alpha
        steers = recipe.experts[0].anti_expert.same_as is None
        if valid is not None:
            # If a strength is given, there is nothing to choose.
            alphas = list(ALPHAS) if steers and settings.alpha is None else [alpha]
            report = self._score(model, valid, alphas, "measuring on validation rows")
            if settings.alpha is None and steers and settings.method != "dpo":
                rows = [row for row in report.rows if row.name == "steered"]
                alpha = float(min(rows, key=lambda row: row.nats).alpha or alpha)
            result = replace(result, alpha=alpha, valid=report.to_dict())
        if test is not None:
            report = self._score(model, test, sorted({alpha, 1.0}), "measuring on test rows")
            result = replace(result, test=report.to_dict())
        return result

    def _score(
        self, model: ProxyTuned, rows: Rows, alphas: Sequence[float], name: str
    ) -> ScoreReport:
        advance = partial(self._display.stage, name)
        num_characters = CHARACTERS_PER_TOKEN * self._settings.measure_tokens
        if rows.kind == "text":
            text = "\n\n".join(row["text"].strip() for row in rows.rows)[:num_characters]
            window = scoring_window(model.ensemble)
            return model.score(text, alphas, window=window, on_progress=advance)
        pairs: list[tuple[Prompt, str]] = []
        size = 0
        for prompt, answer in itertools.chain.from_iterable(map(answers_of, rows.rows)):
            if size > num_characters:
                break
            pairs.append((prompt, answer))
            size += len(answer) + len(str(prompt))
        return model.score_completions(pairs, alphas, on_progress=advance)

    def _publish(self, recipe: Recipe, result: TuneResult, prompt: str) -> None:
        from proxytune.tune.card import loss_plot, model_card
        from proxytune.tune.trainer import read_losses

        settings = self._settings
        losses = read_losses(settings.training / LOSS_LOG)
        recipe.write(
            settings.directory, overwrite=True, card=model_card(recipe, settings, result, prompt)
        )
        loss_plot(losses, settings.training / "loss.png", result.first_valid_loss)


def _shown_counts(part: Mapping[str, Any], max_length: int) -> str:
    text = (
        f"{part['rows']:,} rows of {part['source']} ({part['kind']}), {part['num_tokens']:,} tokens, "
        f"{part['num_trained']:,} trained on"
    )
    if part["num_truncated"]:
        text += f"; {part['num_truncated']:,} rows cut to {max_length} tokens"
    if part["num_dropped"]:
        text += f"; {part['num_dropped']:,} rows left out because their prompt alone is longer"
    return text


def _read_result(path: Path) -> TuneResult:
    with suppress(OSError, ValueError, TypeError):
        return TuneResult(**json.loads(path.read_text("utf-8")))
    raise OutputFileError(
        f"{path} cannot be read, so the result of the finished run is lost.\n"
        "hint: start a new run in another directory"
    )
