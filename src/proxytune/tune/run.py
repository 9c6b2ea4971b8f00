"""One tuning run, from rows to a recipe that is ready to generate.

    result = tune(TuneSettings(output="my-recipe", data="rows.jsonl", anti_expert="small", base="large"))

The output directory is a recipe; the run's own files are in `training/`:

    config.json, README.md       the recipe and its model card
    adapters/NAME or expert/     the expert: a LoRA adapter, or full weights
    training/settings.json       the settings, and digests of the data
    training/log.jsonl           losses, and rewards if there are any, a row per logged step
    training/loss.png            the same as a picture
    training/result.json         the measurements
    training/pair/               with `then_cpt`, the pair's expert before it was trained on

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
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from proxytune.checkpoints.references import local_reference
from proxytune.data.rows import Rows, answers_of, read_rows, split_rows
from proxytune.errors import (
    InputFileError,
    InvalidRequest,
    OutputFileError,
    RewardError,
    UnsupportedModel,
    UserError,
    missing_extra,
)
from proxytune.files import write_json
from proxytune.machine import versions
from proxytune.measure.score import scoring_window
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ApiSettings, ExpertSpec, ModelSpec
from proxytune.tune.calibrated import calibrates, few_tokens, find_calibrated
from proxytune.tune.encode import Encoded, encode, limited
from proxytune.tune.formats import Formats, formats_of
from proxytune.tune.lora_places import lora_places
from proxytune.tune.reward_scores import measured_by_reward
from proxytune.tune.rewards import Reward, RewardFunction
from proxytune.tune.settings import (
    ALPHAS,
    LOSS_LOG,
    STAGES,
    Display,
    Method,
    TuneResult,
    TuneSettings,
    anti_expert_path,
    check_used,
    expert_path,
    stage_path,
)
from proxytune.tune.verdict import hints_for, is_lower, judge

if TYPE_CHECKING:
    from proxytune.checkpoints.checkpoint import Checkpoint
    from proxytune.measure.score import ScoreReport
    from proxytune.model import ProxyTuned
    from proxytune.request import Prompt

MOST_VALID_ROWS = 500
"""Maximum number of rows taken from the training rows for validation, and for the last word."""
FEWEST_TEST_ROWS = 5
FEWEST_TEST_TOKENS = 512
"""Fewer rows, or tokens of text, would say little, and would be missed in training."""
CHARACTERS_PER_TOKEN = 4
"""Roughly, for English; the amount of text that is measured need not be exact."""


def tune(
    settings: TuneSettings,
    *,
    resume: bool = False,
    display: Display | None = None,
    reward: RewardFunction | None = None,
) -> TuneResult:
    """Train an expert and write its recipe.

    Args:
        settings: The run's settings.
        resume: Continue the run in the output directory.
        display: Shows progress; None shows nothing.
        reward: For `grpo`, a function instead of the reward that the settings name. It gets the row's prompt,
            an answer's text and the whole row, and returns a number. It is called in another thread.

    Raises:
        RewardError: The reward raised, hung or returned no number. The state is saved; resume it once the
            reward is mended.
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

    if reward is not None and settings.method is None:
        settings = replace(settings, method="grpo")
    opened = _opened(settings, reward)
    try:
        with quietly():
            return _Run(settings, display, opened).result(resume=resume)
    finally:
        display.close()
        if opened is not None:
            opened.close()


def _opened(settings: TuneSettings, function: RewardFunction | None) -> Reward | None:
    """Return the run's reward, ready to be called; None for methods without one."""
    if function is not None and (settings.reward is not None or settings.method != "grpo"):
        other = (
            f"the reward {settings.reward!r}" if settings.reward else f"method {settings.method}"
        )
        raise InvalidRequest(f"a reward function and {other} are given, and only one can be used")
    chosen = function or settings.reward
    if chosen is not None:
        return Reward(chosen, limit_s=settings.reward_limit_s)
    if settings.is_by_reward:
        raise InvalidRequest(
            "method grpo trains by a reward, and none is given.\n"
            "hint: --reward exact compares with the row's answer"
        )
    return None


class _Run:
    """The stages of one run, in order."""

    def __init__(self, settings: TuneSettings, display: Display, reward: Reward | None) -> None:
        self._settings = settings
        self._display = display
        self._reward = reward

    def result(self, *, resume: bool) -> TuneResult:
        settings, display = self._settings, self._display
        self._check_directory(resume=resume)
        small, base = self._check_models()
        train, valid, test = self._read_rows()
        formats = formats_of(settings, train, small, base)
        method = self._method(train, formats)
        check_used(settings, method)
        is_calibrated = calibrates(settings, method, formats)
        if formats.reason is not None:
            display.say(formats.reason)
        data: dict[str, dict[str, Any]] = {
            name: {"source": r.source, "kind": r.kind, "rows": len(r), "digest": r.digest}
            for name, r in (("train", train), ("valid", valid), ("test", test))
            if r is not None
        }
        max_length = _max_length(settings, small, base)
        parts = {"train": train} if valid is None else {"train": train, "valid": valid}
        encoded = _encoded(parts, small, formats, max_length)
        if self._claim(resume=resume, data=data):
            display.say("this run is already finished")
            return _read_result(settings.training / "result.json")
        limits = {"train": settings.max_tokens, "valid": settings.max_valid_tokens}
        encoded = {k: limited(part, limits[k], settings.seed) for k, part in encoded.items()}
        for name, part in encoded.items():
            data[name] |= _counts(part)
            display.say(f"{name}: {_shown_counts(data[name], max_length)}")
        if is_calibrated and self._given is None:
            warning = few_tokens(data["train"]["num_trained"])
            if warning is not None:
                display.say(warning)
        if test is not None:
            display.say(f"test: {len(test):,} rows of {test.source}, kept for the last word")
        # Here, since TRL takes seconds to import and everything above can refuse the run.
        from proxytune.tune.stages import train as run_training
        from proxytune.tune.training import Training

        training = Training(
            settings,
            method,
            small,
            base,
            encoded,
            has_answers=train.kind != "text",
            max_length=max_length,
            display=display,
            reward=self._reward,
            rows=parts,
            calibrates=is_calibrated,
            given=self._given,
            remote=_base_spec(settings) if settings.is_remote else None,
        )
        outcome = run_training(training)
        data["train"] |= _counts(encoded["train"].only(outcome.pop("examples_read")))
        display.say("writing the recipe")
        recipe = self._recipe(small, formats, is_calibrated=is_calibrated)
        result = TuneResult(
            directory=settings.output,
            expert=settings.expert_name,
            alpha=recipe.experts[0].alpha,
            method=method,
            template=formats.small,
            base_template=formats.base,
            is_calibrated=is_calibrated,
            data=data,
            environment={
                "torch": torch.__version__,
                "num_threads": torch.get_num_threads(),
                **versions("proxytune", "transformers", "peft", "trl"),
            },
            **outcome,
        )
        self._publish(recipe, result)
        recipe, result = self._measured(recipe, result, formats, train, valid, test)
        recipe = replace(recipe, experts=(replace(recipe.experts[0], alpha=result.alpha),))
        self._publish(recipe, result)
        write_json(settings.training / "result.json", result.to_dict())
        # `stages.FIRST_DIR` stays: it has the expert of a pair as it was before it was trained on.
        for leftover in ("offsets", *(stage_path("checkpoints", stage) for stage in STAGES)):
            shutil.rmtree(settings.training / leftover, ignore_errors=True)
        return result

    @cached_property
    def _given(self) -> Path | None:
        """The adapter of a given calibrated anti-expert."""
        given = self._settings.calibrated
        return None if given is None else find_calibrated(given)

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
        if not settings.full:
            lora_places(settings, small)
        if settings.start_from is not None:
            _check_start(settings.start_from, small)
        if not settings.is_pair or settings.anti_expert is None:
            return small, None
        whole = ModelSpec(model=settings.anti_expert)
        anti_expert = whole if self._given is None else replace(whole, adapter=str(self._given))
        experts = (ExpertSpec(settings.expert_name, whole, anti_expert),)
        recipe = Recipe(base=_base_spec(settings), experts=experts)
        recipe = recipe.with_settings(device=settings.device)
        examine(recipe, key_env=settings.key_env).raise_first()
        if settings.is_remote:
            return small, None
        return small, find_checkpoint(settings.base or "", root=Path.cwd())

    def _read_rows(self) -> tuple[Rows, Rows | None, Rows | None]:
        settings = self._settings
        read = partial(read_rows, for_reward=self._reward is not None)
        train = read(settings.data, split=settings.split)
        valid: Rows | None
        if settings.valid_data is not None:
            valid = read(settings.valid_data, split=settings.split)
        else:
            share = settings.valid_share
            if len(train) > 1:
                share = min(share, MOST_VALID_ROWS / len(train))
            train, valid = split_rows(train, share, settings.seed)
        if settings.test_data is not None:
            test: Rows | None = read(settings.test_data)
        else:
            train, test = self._held_back(train, valid)
        for other in (valid, test):
            if other is not None and other.kind != train.kind:
                raise InputFileError(
                    f"the rows of {other.source} have the format {other.kind}, and those of {train.source} "
                    f"have the format {train.kind}.\nhint: convert both to one format"
                )
        for part in (train, valid, test):
            if self._reward is not None and part is not None:
                self._reward.check(part)
        return train, valid, test

    def _held_back(self, train: Rows, valid: Rows | None) -> tuple[Rows, Rows | None]:
        """Return the training rows without a part for the last word, and that part."""
        settings = self._settings
        num_rows = len(train) + (0 if valid is None or settings.valid_data else len(valid))
        num_test = min(round(settings.test_share * num_rows), MOST_VALID_ROWS)
        is_enough = num_test >= FEWEST_TEST_ROWS
        share = num_test / len(train)
        if train.kind == "text":
            size = sum(len(row["text"]) for row in train.rows)
            is_enough = settings.test_share * size >= CHARACTERS_PER_TOKEN * FEWEST_TEST_TOKENS
            share = settings.test_share if len(train) == 1 else max(1, num_test) / len(train)
        if settings.test_share == 0:
            return train, None
        if is_enough and share < 1:
            with suppress(InputFileError):  # A single text without a place to cut it.
                return split_rows(train, share, settings.seed)
        self._display.say(
            f"there are too few rows ({num_rows:,}) to hold some back for the last word, so it comes from "
            "the validation rows, on which the strength is chosen; --test-data gives others"
        )
        return train, None

    def _method(self, rows: Rows, formats: Formats) -> Method:
        """Return the method asked for, or the one that is best for these rows and models."""
        settings, asked = self._settings, self._settings.method
        if self._reward is not None:
            return "grpo"
        is_preference = rows.kind == "preference"
        if asked is None:
            can_train_through = settings.is_pair and formats.are_equal and not settings.is_remote
            # Calibration is of sft, and through the base the expert is then trained afterwards.
            can_train_through &= not settings.asks_to_calibrate
            method: Method = "cpt" if can_train_through else "sft"
            return "dpo" if is_preference else method
        if is_preference != (asked == "dpo"):
            wanted = "preference pairs" if asked == "dpo" else "text, completions or messages"
            raise InputFileError(
                f"method {asked} trains on {wanted}, and the rows of {rows.source} have the "
                f"format {rows.kind}.\nhint: give another file, or "
                f"--method {'dpo' if is_preference else 'sft'}"
            )
        if asked == "cpt" and not formats.are_equal:
            raise InvalidRequest(
                "method cpt adds logits over one sequence of tokens, and base and expert have different "
                "templates.\nhint: leave --base-template out, or use --method sft"
            )
        return asked

    def _claim(self, *, resume: bool, data: Mapping[str, Any]) -> bool:
        """Record the run in its directory, or compare it with the recorded one; return if it is done."""
        settings = self._settings
        path = settings.training / "settings.json"
        # The location of files does not change a run; data are compared by their content.
        asked = {
            key: value
            for key, value in json.loads(json.dumps(asdict(settings))).items()
            if key not in ("output", "device", "offsets_dir", "data", "valid_data", "test_data")
            # A reward that was too slow may be given more time, and a budget that was spent more calls.
            and key not in ("reward_limit_s", "max_calls")
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

    # After training ----------------------------------------------------------------------------

    def _recipe(self, small: Checkpoint, formats: Formats, *, is_calibrated: bool) -> Recipe:
        settings = self._settings
        directory = settings.directory
        reference = local_reference(settings.small, directory)
        path = expert_path(settings)
        anti_expert = ModelSpec(model=reference, prompt=formats.small, chat=formats.chat)
        expert = replace(anti_expert, model=path)
        if not settings.full:
            expert = replace(anti_expert, adapter=path)
        if self._given is not None:
            anti_expert = replace(anti_expert, adapter=local_reference(str(self._given), directory))
        elif is_calibrated:
            anti_expert = replace(anti_expert, adapter=anti_expert_path(settings))
        if not settings.is_pair:
            # The tuned model by itself: small + 1 * (tuned - small).
            same = ModelSpec(same_as="base")
            pair = ExpertSpec(settings.expert_name, expert, same, settings.alpha or 1.0)
            return Recipe(base=anti_expert, experts=(pair,), directory=directory)
        large = replace(_base_spec(settings), prompt=formats.base, chat=formats.chat)
        if not settings.is_remote:
            large = replace(large, model=local_reference(settings.base or "", directory))
        pair = ExpertSpec(settings.expert_name, expert, anti_expert, settings.alpha or 1.0)
        return Recipe(base=large, experts=(pair,), directory=directory)

    def _measured(
        self,
        recipe: Recipe,
        result: TuneResult,
        formats: Formats,
        train: Rows,
        valid: Rows | None,
        test: Rows | None,
    ) -> tuple[Recipe, TuneResult]:
        """Choose the strength if none was given, fit weights, and say whether steering helps."""
        from proxytune.backends.api.client import Budget
        from proxytune.model import ProxyTuned
        from proxytune.tune.fitted import tuned_fit

        settings = self._settings
        if (valid is None and test is None) or settings.measure_tokens == 0:
            return recipe, result
        try:
            load = partial(
                ProxyTuned.load,
                device=settings.device,
                budget=Budget(settings.max_calls, None),
                key_env=settings.key_env,
            )
            model = load(recipe)
            if self._reward is not None:
                parts = valid, test
                return recipe, measured_by_reward(
                    model, result, settings, self._reward, parts, self._display
                )
            if valid is not None:
                result = self._chosen(model, result, valid)
                spec, result = tuned_fit(
                    settings, model, recipe.experts[0], result, train, valid, self._display
                )
                if spec != recipe.experts[0]:
                    recipe = replace(recipe, experts=(spec,))
                    model = load(recipe)
                    report = self._score(model, valid, (spec.alpha,), "measuring with weights")
                    result = replace(result, valid=report.to_dict())
            return recipe, self._judged(model, result, formats, valid, test)
        except RewardError:
            raise
        except UserError as error:
            self._display.say(f"not measured: {error}")
            return recipe, result

    def _chosen(self, model: ProxyTuned, result: TuneResult, valid: Rows) -> TuneResult:
        """Measure on the validation rows, and choose the strength if none was given."""
        settings, alpha = self._settings, result.alpha
        # Of preference pairs only the chosen answer would be measured, and not that it is preferred.
        chooses = settings.is_pair and settings.alpha is None and result.method != "dpo"
        alphas = ALPHAS if chooses else (alpha,)
        report = self._score(model, valid, alphas, "measuring on validation rows")
        result = replace(result, valid=report.to_dict())
        if not chooses:
            return result
        best = min((row for row in report.rows if row.name == "steered"), key=lambda row: row.nats)
        assert best.alpha is not None
        edges: dict[float, Any] = {ALPHAS[0]: "lowest", ALPHAS[-1]: "highest"}
        return replace(
            result,
            alpha=best.alpha if is_lower(best) else 0.0,
            tried=ALPHAS,
            best_alpha=best.alpha,
            edge=edges.get(best.alpha),
        )

    def _judged(
        self,
        model: ProxyTuned,
        result: TuneResult,
        formats: Formats,
        valid: Rows | None,
        test: Rows | None,
    ) -> TuneResult:
        """Say whether steering helps, on the test rows if there are any."""
        settings = self._settings
        alpha = result.alpha if result.best_alpha is None else result.best_alpha
        if test is not None:
            report = self._score(model, test, sorted({alpha, 1.0}), "measuring on test rows")
            result = replace(result, test=report.to_dict())
        rows, scores = (valid, result.valid) if test is None else (test, result.test)
        assert rows is not None and scores is not None
        verdict = judge(
            model,
            rows,
            scores,
            alpha,
            is_test=test is not None,
            num_tokens=settings.measure_tokens,
            seed=settings.seed,
            on_progress=partial(self._display.stage, "answering prompts"),
        )
        hints = hints_for(
            verdict.word,
            result,
            could_be_cpt=settings.is_pair
            and not settings.is_remote
            and formats.are_equal
            and result.method == "sft"
            and not settings.then_cpt,
            is_still_falling=self._is_still_falling(),
        )
        return replace(result, verdict={**verdict.to_dict(), "hints": hints})

    def _is_still_falling(self) -> bool:
        """Whether the last evaluation had the lowest loss."""
        from proxytune.tune.trainer import read_losses

        name = stage_path(LOSS_LOG, "cpt" if self._settings.then_cpt else "")
        rows = read_losses(self._settings.training / name)
        losses = [row["valid_loss"] for row in rows if row.get("valid_loss") is not None]
        return len(losses) > 1 and losses[-1] < min(losses[:-1])

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

    def _publish(self, recipe: Recipe, result: TuneResult) -> None:
        from proxytune.tune.card import loss_plot, model_card
        from proxytune.tune.trainer import read_losses

        settings = self._settings
        losses = read_losses(settings.training / LOSS_LOG)
        if settings.then_cpt:
            before = losses[-1]["step"] if losses else 0
            later = read_losses(settings.training / stage_path(LOSS_LOG, "cpt"))
            losses += [row | {"step": before + row["step"]} for row in later]
        recipe.write(settings.directory, overwrite=True, card=model_card(recipe, settings, result))
        loss_plot(losses, settings.training / "loss.png", result.first_valid_loss)


def _base_spec(settings: TuneSettings) -> ModelSpec:
    """Return the base as a recipe names it, without its prompt format."""
    api = None
    if settings.is_remote:
        api = ApiSettings(model=settings.base_name, key_env=settings.key_env)
    return ModelSpec(model=settings.base, api=api)


def _max_length(settings: TuneSettings, small: Checkpoint, base: Checkpoint | None) -> int:
    contexts = [c.max_context for c in (small, base) if c is not None]
    limit = min((n for n in contexts if n is not None), default=None)
    asked = settings.max_length
    if asked is not None and limit is not None and asked > limit:
        raise InvalidRequest(
            f"max_length is {asked}, and the smallest context has {limit} tokens.\n"
            f"hint: --max-length {limit}"
        )
    length = asked or min(1024, limit or 1024)
    if not settings.is_by_reward:
        return length
    # Prompts leave room for the answers, which are generated.
    room = length - settings.max_new_tokens
    if room < 2:
        raise InvalidRequest(
            f"max_new_tokens is {settings.max_new_tokens}, which leaves no room for a prompt within {length} "
            "tokens.\nhint: a smaller --max-new-tokens"
        )
    return room


def _encoded(
    parts: Mapping[str, Rows], small: Checkpoint, formats: Formats, max_length: int
) -> dict[str, Encoded]:
    return {
        name: encode(
            rows,
            small.tokenizer,
            prompt_format=formats.small,
            max_length=max_length,
            name=small.name,
        )
        for name, rows in parts.items()
    }


def _counts(part: Encoded) -> dict[str, int]:
    """Return the counts of what is read of a part."""
    return {
        "rows_read": len(part.rows_read),
        "num_examples": len(part.examples),
        "num_tokens": part.num_tokens,
        "num_trained": part.num_trained,
        "num_truncated": part.num_truncated,
        "num_dropped": part.num_dropped,
    }


def _check_start(reference: str, small: Checkpoint) -> None:
    """Refuse an adapter that cannot be trained on."""
    from proxytune.checkpoints.adapter import find_adapter

    adapter = find_adapter(reference, root=Path.cwd())
    if adapter.is_gguf:
        raise UnsupportedModel(
            f"the adapter {reference} is a file for llama.cpp, which cannot be trained on.\n"
            "hint: give the adapter's directory, as PEFT wrote it"
        )
    adapter.check_fits(small)


def _shown_counts(part: Mapping[str, Any], max_length: int) -> str:
    read = ""
    if part["rows_read"] < part["rows"]:
        read = f", of which {part['rows_read']:,} are read:"
    text = (
        f"{part['rows']:,} rows of {part['source']} ({part['kind']}){read or ','} "
        f"{part['num_tokens']:,} tokens"
    )
    if part["kind"] != "prompt":
        text += f", {part['num_trained']:,} trained on"
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
