"""`bake`: what steering does, distilled into an adapter of the base, for those who may tune it after all.

    result = bake("my-recipe", BakeSettings(data="rows.jsonl", output="baked"))

The output directory is a LoRA adapter in PEFT's format with a card; no small model is needed any more. The
run's own files are in `training/`, as `tune` has them, and a run resumes in the same way. What is trained on
is either given rows, at whose tokens the student learns the steered base's whole distribution, or prompts,
which the steered base answers first. The loss is `distil.py`'s.

Baking loses something. The result says how much of the gain is kept on rows that training did not see: the
share of the steered base's gain in log-likelihood over the base that the base with the adapter has, too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from proxytune.errors import InvalidRequest, OutputFileError, UnsupportedModel
from proxytune.files import write_json, write_whole
from proxytune.grants import NOTHING, Grants
from proxytune.measure.score import BLOCK_TOKENS, NUM_RESAMPLES, Interval, Passage
from proxytune.tune.baked import BakeResult, BakeSettings, card
from proxytune.tune.settings import LOSS_LOG, Display

if TYPE_CHECKING:
    from proxytune.checkpoints.checkpoint import Checkpoint
    from proxytune.model import ProxyTuned

WRITTEN = "written.jsonl"
"""The steered base's answers to prompts, in `training/`, so that a resumed run does not write them again."""
RESULT_NAME, DATA_NAME = "result.json", "data.json"
FEWEST_PASSAGES = 8


def bake(
    recipe: str | Path,
    settings: BakeSettings,
    *,
    resume: bool = False,
    display: Display | None = None,
    grants: Grants = NOTHING,
) -> BakeResult:
    """Train an adapter of the recipe's base towards the steered base.

    The base is in memory twice: once as the steered one, once with the adapter.

    Args:
        recipe: The recipe's directory, its id on the Hub, or `package:NAME/PATH`.
        settings: The run's settings.
        resume: Continue the run in the output directory.
        display: Shows progress; None shows nothing.
        grants: Rights that the recipe asks for.

    Raises:
        UnsafeModel: The recipe asks for a right that is not granted.
        UnsupportedModel: The base's weights are not at hand: it is behind an API, or llama.cpp runs it.
        InputFileError: The data cannot be read or used; names the line.
        OutputFileError: The output directory holds something else, or cannot be written.
        Interrupted: The user pressed Ctrl-C; the state is saved.
        UserError: A model is missing, unsafe or does not match; see `errors.py`.
        BackendError: Training failed, for example because the loss is not a number.
    """
    from proxytune.model import ProxyTuned
    from proxytune.recipe.files import RecipeFiles
    from proxytune.recipe.recipe import Recipe

    display = display or Display()
    found = Recipe.read(recipe)
    what = None
    if found.base.api is not None:
        what = f"the base is behind the API {found.base.model}"
    elif found.base.llama_cpp is not None:
        what = f"llama.cpp runs the base {found.base.model}"
    if what is not None:
        raise UnsupportedModel(
            f"{what}, and an adapter can only be trained on weights that transformers runs.\n"
            "hint: name the base as transformers loads it, in a recipe of its own"
        )
    files = RecipeFiles(found, grants)
    files.check_grants()
    _claim(recipe, settings, resume=resume)
    done = settings.training / RESULT_NAME
    if done.exists():
        display.say("this run is already finished")
        display.close()
        return _read_result(done)
    try:
        model = ProxyTuned.load(
            found,
            device=settings.device,
            trust_remote_code=grants.trust_remote_code,
            allow_pickle=grants.allow_pickle,
        )
        checkpoint = files.checkpoint(found.base)
        train, valid, test = _passages(settings, model, display)
        _claim_data(settings, (train, valid, test))
        return _Baking(settings, model, checkpoint, (train, valid, test), display).result()
    finally:
        display.close()


def _claim(recipe: str | Path, settings: BakeSettings, *, resume: bool) -> None:
    """Record the run in its directory, or compare it with the recorded one."""
    directory, path = settings.directory, settings.training / "settings.json"
    asked = {k: v for k, v in asdict(settings).items() if k not in ("output", "device")}
    asked |= {"recipe": str(recipe), "prompts": settings.prompts and str(settings.prompts)}
    if resume:
        if not path.exists():
            raise OutputFileError(
                f"{directory} holds no run to resume.\nhint: leave out --resume to start one"
            )
        begun = json.loads(path.read_text("utf-8"))
        for key, value in asked.items():
            if begun.get(key) != value:
                raise OutputFileError(
                    f"the run in {directory} was started with {key} {begun.get(key)!r}, and {key} is now "
                    f"{value!r}.\nhint: resume with the settings it was started with"
                )
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputFileError(f"{directory} already exists.\nhint: name a new directory")
    write_json(path, asked)


def _claim_data(settings: BakeSettings, parts: tuple[list[Passage], ...]) -> None:
    """Record what is trained and measured on, or compare it with what was recorded."""
    digest = hashlib.sha256()
    for part in parts:
        lines = [[passage.prompts, passage.token_ids] for passage in part]
        digest.update(json.dumps(lines).encode())
    path = settings.training / DATA_NAME
    if not path.exists():
        write_json(path, {"digest": digest.hexdigest()})
    elif json.loads(path.read_text("utf-8"))["digest"] != digest.hexdigest():
        raise OutputFileError(
            f"the run in {settings.directory} was started with other data than these files hold now.\n"
            "hint: restore the old files, or start a new run in another directory"
        )


def _read_result(path: Path) -> BakeResult:
    with suppress(OSError, ValueError, TypeError):
        found = json.loads(path.read_text("utf-8"))
        interval = found.pop("kept_interval")
        return BakeResult(**found, kept_interval=interval and Interval(**interval))
    raise OutputFileError(
        f"{path} cannot be read, so the result of the finished run is lost.\n"
        "hint: start a new run in another directory"
    )


# Data ----------------------------------------------------------------------------------------------


def _passages(
    settings: BakeSettings, model: ProxyTuned, display: Display
) -> tuple[list[Passage], list[Passage], list[Passage]]:
    """Return the passages to train on, to stop on and to measure on."""
    from proxytune.data.passages import passages_of
    from proxytune.data.rows import read_rows
    from proxytune.measure.score import scoring_window
    from proxytune.measure.sweep import split

    window = scoring_window(model.ensemble)
    if settings.prompts is not None:
        train, is_text = _written(settings, model, display), False
    else:
        rows = read_rows(settings.data or "")
        train, is_text = passages_of(model, rows, window=window), rows.kind == "text"
    if len(train) < FEWEST_PASSAGES:
        raise InvalidRequest(
            f"there are {len(train)} windows or answers, and baking needs at least {FEWEST_PASSAGES}, some "
            "of them to measure on.\nhint: give more data"
        )
    if settings.test_data is not None:
        test = passages_of(model, read_rows(settings.test_data), window=window)
    else:
        train, test = split(train, 0.1, seed=settings.seed, in_order=is_text)
        test = test or [train.pop()]
    train, valid = split(train, 0.05, seed=settings.seed, in_order=is_text)
    return train, valid or [train.pop()], test


def _written(settings: BakeSettings, model: ProxyTuned, display: Display) -> list[Passage]:
    """Return the prompts with the steered base's sampled answers, written once for a run."""
    from proxytune.data.lines import read_lines
    from proxytune.request import SamplingParams, Steering

    path = settings.training / WRITTEN
    if path.exists():
        kept = map(json.loads, path.read_text("utf-8").splitlines())
        return [Passage(tuple(map(tuple, prompts)), tuple(ids)) for prompts, ids in kept]
    assert settings.prompts is not None
    # At temperature 1 the answers are drawn from the very distribution that is to be learned.
    sampling = SamplingParams(
        max_new_tokens=settings.max_new_tokens, temperature=1.0, seed=settings.seed
    )
    lines = read_lines(
        settings.prompts,
        recipe=model.recipe,
        sampling=sampling,
        steering=Steering(settings.alpha),
    )
    requests = [line.request for line in lines]
    passages: list[Passage] = []
    for first in range(0, len(requests), settings.batch_size):
        some = requests[first : first + settings.batch_size]
        for request, trace in zip(some, model.generate_batch(some), strict=True):
            if trace.token_ids:
                prompts = tuple(tuple(each) for each in model.job(request).prompts)
                passages.append(Passage(prompts, tuple(trace.token_ids)))
        display.stage("steered base answering prompts", first + len(some), len(requests))
    content = "".join(json.dumps([each.prompts, each.token_ids]) + "\n" for each in passages)
    write_whole(path, content)
    return passages


# The run -------------------------------------------------------------------------------------------


class _Baking:
    """The stages of one run after its data is there."""

    def __init__(
        self,
        settings: BakeSettings,
        model: ProxyTuned,
        checkpoint: Checkpoint,
        parts: tuple[list[Passage], list[Passage], list[Passage]],
        display: Display,
    ) -> None:
        from proxytune.request import Steering

        self._settings = settings
        self._model = model
        self._ensemble = model.steered_by(None)
        strengths = model.recipe.strengths(Steering(settings.alpha))
        self._alphas = tuple(strengths[pair.name] for pair in self._ensemble.pairs)
        self._checkpoint = checkpoint
        self._train, self._valid, self._test = parts
        self._display = display

    def result(self) -> BakeResult:
        settings = self._settings
        trainer = self._trained()
        from proxytune.tune.trainer import read_losses

        base, steered, baked = self._losses(trainer.model)
        kept, interval = gain_kept(base, steered, baked, seed=settings.seed)
        rows = read_losses(settings.training / LOSS_LOG)
        divergences = [r["valid_loss"] for r in rows if r.get("valid_loss") is not None]
        # Of the state before the first step there is no checkpoint.
        later = [r["valid_loss"] for r in rows if r["step"] and r.get("valid_loss") is not None]
        result = BakeResult(
            directory=settings.output,
            base=float(np.exp(base.mean())),
            steered=float(np.exp(steered.mean())),
            baked=float(np.exp(baked.mean())),
            kept=kept,
            kept_interval=interval,
            divergence=min(later, default=None),
            first_divergence=divergences[0] if divergences else None,
            num_tokens=len(base),
            num_trained=sum(len(self._train[i].token_ids) for i in trainer.examples_read),
            num_steps=trainer.state.global_step,
            train_s=max((r["elapsed_s"] for r in rows), default=0.0),
        )
        self._save(trainer.model)
        recipe = self._model.recipe
        content = card(settings, result, base=recipe.base.model or "", experts=recipe.named(None))
        write_whole(settings.directory / "README.md", content)
        write_json(settings.training / RESULT_NAME, result.to_dict())
        shutil.rmtree(settings.training / "checkpoints", ignore_errors=True)
        return result

    def _trained(self) -> Any:
        """Return TRL's trainer after training, with its best adapter."""
        import transformers

        from proxytune.backends.transformers.backend import TransformersBackend
        from proxytune.tune import trainer as trainers
        from proxytune.tune.heads import check_head, head_of

        settings, base = self._settings, self._model.recipe.base
        transformers.set_seed(settings.seed)
        spec = replace(base, device=settings.device or base.device)
        student = TransformersBackend.load(self._checkpoint, spec).model
        check_head(student, head_of(student))
        continued = trainers.last_checkpoint(settings.training / "checkpoints")
        trainer = self._trainer(student, continued)
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        train(trainer, continued)
        return trainer

    def _trainer(self, student: Any, continued: Path | None) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model
        from trl import SFTConfig  # type: ignore[attr-defined]

        from proxytune.tune import distil
        from proxytune.tune import trainer as trainers

        settings, rate = self._settings, self._settings.learning_rate
        width = student.config.get_text_config(decoder=True).hidden_size
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        is_half = student.dtype in (torch.bfloat16, torch.float16)
        parts = [
            trainers.example_dataset([distil.example_of(each) for each in part])
            for part in (self._train, self._valid)
        ]
        return distil.Distillation(
            teacher=distil.teacher_of(self._ensemble, self._alphas),
            passages=(self._train, self._valid),
            autocast=torch.bfloat16 if is_half else None,
            model=get_peft_model(student, config),
            processing_class=self._model.tokenizer,
            args=SFTConfig(
                **self._arguments(rate or default_rate(width), is_resumed=continued is not None)
            ),
            train_dataset=parts[0],
            eval_dataset=parts[1],
            data_collator=trainers.Padded(pad_id=0),
            callbacks=self._callbacks(),
            continued_from=continued,
        )

    def _arguments(self, rate: float, *, is_resumed: bool) -> dict[str, Any]:
        settings = self._settings
        num_steps = max(1, round(settings.epochs * len(self._train) / settings.batch_size))
        every = max(1, min(100, num_steps // 5))
        return {
            "output_dir": str(settings.training / "checkpoints"),
            "seed": settings.seed,
            "data_seed": settings.seed,
            "max_steps": num_steps,
            "learning_rate": rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(1, round(0.03 * num_steps)),
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": settings.batch_size,
            "eval_strategy": "steps",
            "eval_steps": every,
            "eval_on_start": not is_resumed,
            "save_strategy": "steps",
            "save_steps": every,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "logging_steps": max(1, num_steps // 50),
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "bf16": False,
            "packing": False,
            "completion_only_loss": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "use_cpu": self._ensemble.members[0].backend.device.type == "cpu",
        }

    def _callbacks(self) -> list[Any]:
        from proxytune.tune import trainer as trainers

        latest: dict[str, float | None] = {}

        def on_row(row: Any) -> None:
            latest.update({k: row[k] for k in ("loss", "valid_loss") if k in row})

        def on_step(step: int, total: int) -> None:
            self._display.stage("baking", step, total, **latest)

        log = trainers.LossLog(self._settings.training / LOSS_LOG, on_row, on_step)
        stopper = trainers.StopOnSignal(
            lambda: self._display.say(
                "stopping after this step; press Ctrl-C again to stop at once"
            )
        )
        return [trainers.FiniteGradients(), trainers.LastEvaluation(), log, stopper]

    def _losses(self, student: Any) -> tuple[NDArray[np.float64], ...]:
        """Return `[num_tokens]` losses of base, steered base and student on the held-out part, nats."""
        import torch

        from proxytune.measure.score import passage_losses, token_losses
        from proxytune.tune.distil import CHUNK_ROWS, example_of
        from proxytune.tune.heads import head_of, run_body

        none = (0.0,) * len(self._alphas)
        base, steered = passage_losses(
            self._ensemble, self._test, [none, self._alphas], with_models=False
        )
        student.eval()
        head = head_of(student).detach()
        padding_ids = self._ensemble.vocabulary.padding_ids.to(head.weight.device)
        found = []
        for done, passage in enumerate(self._test):
            ids = torch.tensor([example_of(passage).token_ids], device=head.weight.device)
            with torch.no_grad():
                hidden = run_body(student, ids)[0, len(passage.prompts[0]) - 1 : -1]
                for first in range(0, len(hidden), CHUNK_ROWS):
                    targets = ids[0, len(passage.prompts[0]) + first :][:CHUNK_ROWS]
                    logits = head.logits(hidden[first : first + CHUNK_ROWS])
                    found.append(token_losses(logits, targets, padding_ids))
            self._display.stage("measuring on held-out rows", done + 1, len(self._test))
        return base, steered, np.concatenate(found)

    def _save(self, student: Any) -> None:
        from proxytune.checkpoints.references import local_reference
        from proxytune.files import writing

        directory, recipe = self._settings.directory, self._model.recipe
        place = recipe.reference_from(recipe.base.model or "", Path.cwd())
        reference = local_reference(place, directory)
        student.peft_config["default"].base_model_name_or_path = reference
        with writing(directory):
            student.save_pretrained(directory, selected_adapters=["default"])


def train(trainer: Any, continued: Path | None) -> None:
    """Run TRL's trainer, from a checkpoint if there is one.

    Raises:
        Interrupted: The user stopped it; the state is saved.
        BackendError: The loss or a gradient is not finite.
    """
    from transformers import TrainerState

    from proxytune.errors import BackendError
    from proxytune.tune import trainer as trainers
    from proxytune.tune.pair import EXPERT, load_pair
    from proxytune.tune.settings import Interrupted

    if continued is not None:
        state = TrainerState.load_from_json(str(continued / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            # Training had ended, and nothing was saved yet; `train` would run another step.
            trainer.state = state
            load_pair(trainer.model, Path(state.best_model_checkpoint or continued), (EXPERT,))
            return
    (stopper,) = (
        each
        for each in trainer.callback_handler.callbacks
        if isinstance(each, trainers.StopOnSignal)
    )
    try:
        with stopper.listening():
            trainer.train(resume_from_checkpoint=str(continued) if continued else None)
    except trainers.NonFiniteLoss as error:
        raise BackendError(
            f"{error}, so training stopped before it reached the weights.\n"
            "hint: start a new run with a lower --learning-rate"
        ) from error
    if stopper.was_asked:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step}; the state is saved.\n"
            "hint: the same command with --resume continues"
        )


def default_rate(width: int) -> float:
    """Return the default peak learning rate for a base of this hidden size, which is that of `tune`."""
    from proxytune.tune.settings import default_learning_rate

    return default_learning_rate("sft", full=False, width=width)


def gain_kept(
    base: NDArray[np.float64],
    steered: NDArray[np.float64],
    baked: NDArray[np.float64],
    *,
    seed: int,
) -> tuple[float | None, Interval | None]:
    """Return the share of the steered base's gain that the baked base has, and its 95 % interval.

    Args:
        base: `[num_tokens]` losses, nats, in the order of the text.
        steered: `[num_tokens]`, on the same tokens.
        baked: `[num_tokens]`, on the same tokens.
        seed: Random seed of the bootstrap over blocks of `BLOCK_TOKENS` tokens, drawn for all three together.

    Returns:
        None for both where the gain itself is not above 0 with its whole interval. None for the interval
        with fewer than two blocks.
    """
    gain, own = base - steered, base - baked
    num_blocks = len(base) // BLOCK_TOKENS
    if num_blocks < 2:
        return (float(own.sum() / gain.sum()), None) if gain.sum() > 0 else (None, None)
    sums = np.array(
        [[block.sum() for block in np.array_split(each, num_blocks)] for each in (gain, own)]
    )
    picks = np.random.default_rng(seed).integers(0, num_blocks, size=(NUM_RESAMPLES, num_blocks))
    gains, owns = sums[:, picks].sum(-1)
    if np.percentile(gains, 2.5) <= 0:
        return None, None
    bounds = np.percentile(owns / gains, [2.5, 97.5])
    return float(own.sum() / gain.sum()), Interval(*bounds.tolist())
