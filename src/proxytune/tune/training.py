"""Training itself: models loaded, TRL's trainer set up and run, and the expert saved.

Rows arrive encoded and settings checked (`run.py`); what happens within a step is `trainer.py`'s.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from trl import DPOConfig, SFTConfig  # type: ignore[attr-defined]

from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import Checkpoint, find_checkpoint
from proxytune.checkpoints.placement import running_device
from proxytune.checkpoints.references import local_reference
from proxytune.data.rows import Rows
from proxytune.errors import BackendError
from proxytune.files import writing
from proxytune.machine import peak_memory
from proxytune.recipe.spec import ModelSpec
from proxytune.tune import reward_trainer
from proxytune.tune import trainer as trainers
from proxytune.tune.encode import Encoded
from proxytune.tune.frozen import FrozenEnsemble, FrozenModels, load_frozen
from proxytune.tune.lora_places import lora_places
from proxytune.tune.pair import (
    ANTI_EXPERT,
    EXPERT,
    AntiExpertTrainer,
    Calibration,
    ClipEach,
    PairTrainer,
    activate,
    add_anti_expert,
    load_pair,
)
from proxytune.tune.rewards import Reward
from proxytune.tune.settings import (
    LOSS_LOG,
    Display,
    Interrupted,
    Method,
    TuneSettings,
    anti_expert_path,
    default_epochs,
    default_learning_rate,
    default_patience,
    stage_path,
)
from proxytune.tune.shown import ShownBase, ask_base

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Training:
    """The training of one expert.

    Args:
        settings: The run's settings.
        method: How to train; see `TuneSettings.method`.
        small: The model to tune.
        base: The large model; `cpt` trains through it, and an anti-expert is calibrated to it. None if there
            is none.
        calibrates: Whether expert and anti-expert are trained as a pair; see `pair.py`.
        given: The adapter of a calibrated anti-expert that is finished; only the expert is trained then.
        encoded: Examples by `train` and, with validation, `valid`.
        has_answers: Whether they are answers to prompts, and not texts.
        max_length: Maximum number of tokens per example.
        display: Shows progress.
        reward: What answers are worth, for `grpo`.
        rows: For `grpo`, the rows that were encoded, by the same names.
        remote: The base, if it is behind an API.
        start: An adapter that the expert starts from; None starts from the small model.
        stage: What a run of several trainings calls this one. `anti-expert` trains a single adapter on the
            base's distribution.
    """

    settings: TuneSettings
    method: Method
    small: Checkpoint
    base: Checkpoint | None
    encoded: Mapping[str, Encoded]
    has_answers: bool
    max_length: int
    display: Display
    reward: Reward | None = None
    rows: Mapping[str, Rows] = field(default_factory=dict)
    calibrates: bool = False
    given: Path | None = None
    remote: ModelSpec | None = None
    start: Path | None = None
    stage: Literal["", "cpt", "anti-expert"] = ""

    def run(self, target: Path) -> dict[str, Any]:
        """Train, and leave the best state of the expert, or of what is trained in its place, in `target`.

        Returns and raises what `stages.train` does.
        """
        settings = self.settings
        transformers.set_seed(settings.seed)
        # On a GPU a frozen model is kept in half precision; what is trained is always kept in float32.
        stored = "float32" if self._on_cpu or settings.full else self._dtype
        model = load_frozen(settings.small, device=self._device, dtype=stored)
        width = model.config.get_text_config(decoder=True).hidden_size
        rate = default_learning_rate(self.method, full=settings.full, width=width)
        rate = settings.learning_rate or rate
        started = time.perf_counter()
        ensemble = calibration = None
        if self.method == "cpt" and self.stage == "":
            ensemble = self._frozen.ensemble(model)
        elif self.calibrates:
            base = self._frozen.alone if self.remote is None else self._shown(self.remote)
            calibration = Calibration(base, settings.alpha or 1.0, is_given=self.given is not None)
        model = self._trainable(model)
        if self.stage == "cpt":
            ensemble = self._calibrated_ensemble(model)
        if self.start is not None:
            model.load_adapter(str(self.start), EXPERT, is_trainable=True)
        offsets_s = time.perf_counter() - started
        trainer = self._trainer(model, ensemble, calibration, rate)
        self._fit(trainer)
        self._load_adapter(trainer, trainer.state.best_model_checkpoint)
        self._save(trainer, target)
        rows = trainers.read_losses(self._log)
        losses = [r["valid_loss"] for r in rows if r.get("valid_loss") is not None]
        # Of the state before the first step there is no checkpoint.
        kept = [r["valid_loss"] for r in rows if r["step"] and r.get("valid_loss") is not None]
        return {
            "num_steps": trainer.state.global_step,
            "num_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "train_s": max((r["elapsed_s"] for r in rows), default=0.0),
            "offsets_s": round(offsets_s, 2),
            "peak_memory_bytes": peak_memory(self._device),
            "valid_loss": min(kept, default=None),
            "first_valid_loss": losses[0] if losses else None,
            "learning_rate": rate,
            "examples_read": frozenset(trainer.examples_read),
            "rewards": reward_trainer.logged_rewards(rows) if self.reward else None,
        }

    @cached_property
    def _device(self) -> str:
        return running_device(self.settings.device)

    @property
    def _on_cpu(self) -> bool:
        return self._device == "cpu"

    @property
    def _dtype(self) -> str:
        return self.settings.dtype or ("float32" if self._on_cpu else "bfloat16")

    @property
    def _checkpoints(self) -> Path:
        return self.settings.training / stage_path("checkpoints", self.stage)

    @property
    def _log(self) -> Path:
        return self.settings.training / stage_path(LOSS_LOG, self.stage)

    @cached_property
    def _frozen(self) -> FrozenModels:
        assert self.base is not None
        return FrozenModels(
            self.settings,
            self.small,
            self.base,
            self.encoded,
            self._device,
            self._dtype,
            self.display,
        )

    def _shown(self, base: ModelSpec) -> ShownBase:
        if self._is_pair:
            self.display.say(
                "the base is behind an API and shows a part of its distribution, so the state to keep is "
                "chosen by the expert's loss plus the anti-expert's divergence, and not by the steered loss"
            )
        return ask_base(self.settings, base, self.small, self.encoded, self.display)

    def _calibrated_ensemble(self, model: Any) -> FrozenEnsemble:
        """Return the ensemble of base and calibrated anti-expert, run in the given PEFT model."""
        own = self.settings.directory / anti_expert_path(self.settings)
        anti_expert = self.given or own
        model.load_adapter(str(anti_expert), ANTI_EXPERT)
        activate(model, ANTI_EXPERT, trained=())
        model.eval()
        ensemble = self._frozen.ensemble(model, anti_expert)
        activate(model, EXPERT, trained=(EXPERT,))
        model.delete_adapter(ANTI_EXPERT)
        return ensemble

    # The trainer -------------------------------------------------------------------------------

    def _trainable(self, model: Any) -> Any:
        """Return the model with what is trained: all weights, or a LoRA adapter."""
        from peft import LoraConfig, PeftModel, get_peft_model

        settings = self.settings
        if settings.full:
            return model.requires_grad_(True)
        if settings.start_from is not None:
            path = str(find_adapter(settings.start_from, root=Path.cwd()).path)
            own = LoraConfig.from_pretrained(path)
            own.lora_dropout, own.inference_mode = settings.lora_dropout, False
            peft_model: Any = PeftModel.from_pretrained(model, path, config=own, is_trainable=True)
        else:
            config = LoraConfig(
                r=settings.lora_rank,
                lora_alpha=2 * settings.lora_rank,
                lora_dropout=settings.lora_dropout,
                task_type="CAUSAL_LM",
                **lora_places(settings, self.small),
            )
            peft_model = get_peft_model(model, config)
        reference = local_reference(settings.small, settings.directory)
        peft_model.peft_config[EXPERT].base_model_name_or_path = reference
        if not self._is_pair:
            return peft_model
        if self.given is not None:
            peft_model.load_adapter(str(self.given), ANTI_EXPERT)
            activate(peft_model, EXPERT, trained=(EXPERT,))
        else:
            add_anti_expert(peft_model)
        return peft_model

    @cached_property
    def _checkpoint(self) -> Path | None:
        return trainers.last_checkpoint(self._checkpoints)

    @cached_property
    def num_steps(self) -> int:
        """Number of optimizer steps."""
        settings = self.settings
        num_batches = math.ceil(len(self.encoded["train"].examples) / settings.batch_size)
        per_epoch = math.ceil(num_batches / settings.accumulate)
        epochs = settings.epochs or default_epochs(
            settings.batch_size * settings.accumulate,
            len(self.encoded["train"].examples),
            are_answers=self.has_answers and self.method not in ("dpo", "grpo"),
        )
        return settings.max_steps or max(1, math.ceil(per_epoch * epochs))

    def _trainer(
        self,
        model: Any,
        ensemble: FrozenEnsemble | None,
        calibration: Calibration | None,
        learning_rate: float,
    ) -> Any:
        """Return TRL's trainer, ready to run."""
        settings = self.settings
        train, valid = self.encoded["train"].examples, self.encoded.get("valid")
        arguments = self._arguments(learning_rate)
        is_half = self._dtype == "bfloat16"
        common: dict[str, Any] = {
            "model": model,
            "processing_class": self.small.tokenizer,
            "callbacks": self._callbacks(),
            "continued_from": self._checkpoint,
        }
        pad_id = self.small.tokenizer.pad_token_id or 0
        trainer: Any
        if self.method == "grpo":
            trainer = self._reward_trainer({**arguments, "bf16": is_half}, common)
        elif self.method == "dpo":
            device = "cpu" if self._on_cpu else None
            trainer = trainers.PreferenceTrainer(
                args=DPOConfig(beta=settings.beta or 0.1, bf16=is_half, **arguments),
                train_dataset=trainers.preference_dataset(train),  # type: ignore[arg-type]
                eval_dataset=None if valid is None else trainers.preference_dataset(valid.examples),  # type: ignore[arg-type]
                data_collator=trainers.PaddedPairs(pad_id, max_length=self.max_length),
                ref_model=load_frozen(settings.small, device=device, dtype="float32")
                if settings.full
                else None,
                **common,
            )
        else:
            kind: Any = trainers.ExpertTrainer
            through: dict[str, Any] = {"ensemble": ensemble}
            if calibration is not None:
                kind = PairTrainer if self._is_pair else AntiExpertTrainer
                through = {"calibration": calibration}
            trainer = kind(
                args=SFTConfig(
                    bf16=False,  # `ExpertTrainer` handles mixed precision itself.
                    packing=False,
                    completion_only_loss=False,
                    dataset_kwargs={"skip_prepare_dataset": True},
                    **arguments,
                ),
                train_dataset=trainers.example_dataset(train),  # type: ignore[arg-type]
                eval_dataset=None if valid is None else trainers.example_dataset(valid.examples),  # type: ignore[arg-type]
                data_collator=trainers.Padded(pad_id),
                autocast=torch.bfloat16 if is_half else None,
                **through,
                **common,
            )
        checkpoint = self._checkpoint
        self.display.say(
            f"{self.num_steps:,} steps of {settings.batch_size * settings.accumulate} rows, learning rate "
            f"{learning_rate:g}"
            + (f", resumed after step {trainers.checkpoint_step(checkpoint)}" if checkpoint else "")
        )
        return trainer

    def _reward_trainer(self, arguments: dict[str, Any], common: dict[str, Any]) -> Any:
        assert self.reward is not None
        parts = {
            name: reward_trainer.Prompts.of(part, self.rows[name])
            for name, part in self.encoded.items()
        }
        own = {key: value for key, value in common.items() if key != "processing_class"}
        return reward_trainer.RewardTrainer(
            args=reward_trainer.reward_arguments(self.settings, arguments),
            reward=self.reward,
            train=parts["train"],
            valid=parts.get("valid"),
            tokenizer=self.small.tokenizer,
            ending_ids=reward_trainer.ending_ids(self.small, self.base),
            **own,
        )

    def _arguments(self, learning_rate: float) -> dict[str, Any]:
        """Return the arguments that both of TRL's trainers share."""
        settings, num_steps = self.settings, self.num_steps
        evaluates = "valid" in self.encoded
        eval_every = settings.eval_every or max(1, min(100, num_steps // 10))
        return {
            "output_dir": str(self._checkpoints),
            "seed": settings.seed,
            "data_seed": settings.seed,
            "max_steps": num_steps,
            "max_length": self.max_length,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(1, round(0.03 * num_steps)),
            "weight_decay": 0.0,
            "max_grad_norm": 0.0 if self._is_pair else MAX_GRAD_NORM,
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulate,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "eval_strategy": "steps" if evaluates else "no",
            "eval_steps": eval_every if evaluates else None,
            "eval_on_start": evaluates and self._checkpoint is None,
            "save_strategy": "steps",
            "save_steps": eval_every,
            "save_total_limit": 2,
            "load_best_model_at_end": evaluates,
            "metric_for_best_model": "eval_loss" if evaluates else None,
            "greater_is_better": False if evaluates else None,
            "logging_strategy": "steps",
            "logging_steps": max(1, min(10, num_steps // 50)),
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": not self._on_cpu,
            "use_cpu": self._on_cpu,
        }

    def _callbacks(self) -> list[Any]:
        latest: dict[str, float | None] = {}

        def on_row(row: Mapping[str, Any]) -> None:
            names = ("reward", "valid_reward") if self.method == "grpo" else ("loss", "valid_loss")
            latest.update({k: row[k] for k in names if k in row})

        def on_step(step: int, total: int) -> None:
            self.display.stage("training", step, total, **latest)

        callbacks: list[Any] = [ClipEach(MAX_GRAD_NORM)] if self._is_pair else []
        callbacks += [
            trainers.FiniteGradients(),
            trainers.LastEvaluation(),
            trainers.LossLog(self._log, on_row, on_step),
        ]
        if self._early_stop is not None:
            callbacks.append(self._early_stop)
        return [*callbacks, self._stopper]

    @cached_property
    def _early_stop(self) -> trainers.EarlyStop | None:
        """What ends training before its last step; None if nothing does."""
        patience = self.settings.patience
        if patience is None:
            patience = default_patience(is_calibrated=self.calibrates)
        return trainers.EarlyStop(patience, reward=self.method == "grpo") if patience else None

    @cached_property
    def _stopper(self) -> trainers.StopOnSignal:
        return trainers.StopOnSignal(
            lambda: self.display.say("stopping after this step; press Ctrl-C again to stop at once")
        )

    # Running it --------------------------------------------------------------------------------

    def _fit(self, trainer: Any) -> None:
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        checkpoint = self._checkpoint
        self._load_adapter(trainer, checkpoint)
        if checkpoint is not None:
            state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            is_stalled = self._early_stop is not None and self._early_stop.is_due(state)
            if state.global_step >= self.num_steps or is_stalled:
                # Training had ended, and nothing was saved yet; `train` would run another step.
                trainer.state = state
                return
        try:
            with self._stopper.listening():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except trainers.NonFiniteLoss as error:
            kept = trainers.last_checkpoint(Path(trainer.args.output_dir))
            where = "no checkpoint had been written yet"
            if kept:
                where = f"the state after step {trainers.checkpoint_step(kept)} is in {kept}"
            raise BackendError(
                f"{error}, so training stopped before it reached the weights; {where}.\n"
                "hint: start a new run with a lower --learning-rate"
            ) from error
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"memory ran out while training: {str(error).splitlines()[0]}\n"
                "hint: a smaller --batch-size with more --accumulate, or --gradient-checkpointing"
            ) from error
        if self._stopper.was_asked:
            raise Interrupted(
                f"stopped after step {trainer.state.global_step}; the state is saved.\n"
                "hint: the same command with --resume continues"
            )

    def _load_adapter(self, trainer: Any, checkpoint: str | Path | None) -> None:
        """Load the adapter of a checkpoint.

        transformers 5.19 does not load it into a model with several adapters, such as DPO's, which keeps its
        reference in one.
        """
        if checkpoint is not None and not self.settings.full:
            load_pair(trainer.model, Path(checkpoint), self._trained)

    @property
    def _trained(self) -> tuple[str, ...]:
        """The adapters that are trained."""
        return (EXPERT, ANTI_EXPERT) if self._is_pair and self.given is None else (EXPERT,)

    @property
    def _is_pair(self) -> bool:
        """Whether the model has the adapters of both expert and anti-expert."""
        return self.calibrates and self.stage == ""

    def _save(self, trainer: Any, target: Path) -> None:
        """Write the expert, and the anti-expert of a pair to its place in the recipe."""
        settings, model = self.settings, trainer.model
        with writing(target, hint=trainers.RESUME_HINT):
            target.parent.mkdir(parents=True, exist_ok=True)
            # DPO keeps a reference adapter beside the expert's.
            chosen = {} if settings.full else {"selected_adapters": list(self._trained)}
            model.save_pretrained(target, **chosen)
            if ANTI_EXPERT in self._trained:
                place = settings.directory / anti_expert_path(settings)
                # PEFT writes every adapter but the first into a folder of its name.
                shutil.rmtree(place, ignore_errors=True)
                place.parent.mkdir(parents=True, exist_ok=True)
                (target / ANTI_EXPERT).replace(place)
                (place / "README.md").unlink(missing_ok=True)
            # PEFT writes a card without being asked; the recipe has its own.
            (target / "README.md").unlink(missing_ok=True)
            if settings.full:
                find_checkpoint(settings.small, root=Path.cwd()).tokenizer.save_pretrained(target)
