"""Training itself: models loaded, TRL's trainer set up and run, and the expert saved.

Rows arrive encoded and settings checked (`run.py`); what happens within a step is `trainer.py`'s.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from trl import DPOConfig, SFTConfig  # type: ignore[attr-defined]

from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import Checkpoint, find_checkpoint
from proxytune.checkpoints.placement import running_device
from proxytune.checkpoints.references import local_reference
from proxytune.data.rows import Rows
from proxytune.errors import BackendError
from proxytune.files import writing
from proxytune.machine import peak_memory
from proxytune.recipe.spec import ModelSpec
from proxytune.text.vocab import Alignment, align
from proxytune.tune import reward_trainer
from proxytune.tune import trainer as trainers
from proxytune.tune.encode import Encoded, Example
from proxytune.tune.heads import (
    Coefficients,
    FrozenHeads,
    align_base_head,
    check_head,
    form_coefficients,
    head_of,
)
from proxytune.tune.lora_places import lora_places
from proxytune.tune.offsets import Offsets, offsets_key
from proxytune.tune.rewards import Reward
from proxytune.tune.settings import (
    LOSS_LOG,
    Display,
    Interrupted,
    Method,
    TuneSettings,
    default_epochs,
    default_learning_rate,
    expert_path,
)


@dataclass(frozen=True)
class Training:
    """The training of one expert.

    Args:
        settings: The run's settings.
        method: How to train; see `TuneSettings.method`.
        small: The model to tune.
        base: The large model; `cpt` trains through it. None if there is none.
        encoded: Examples by `train` and, with validation, `valid`.
        has_answers: Whether they are answers to prompts, and not texts.
        max_length: Maximum number of tokens per example.
        display: Shows progress.
        reward: What answers are worth, for `grpo`.
        rows: For `grpo`, the rows that were encoded, by the same names.
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

    def run(self) -> dict[str, Any]:
        """Train, and leave the best state in the recipe's directory.

        Returns:
            The fields of `TuneResult` that training decides, and under `examples_read` the indices of the
            training examples that were read.

        Raises:
            Interrupted: The user stopped it; the state is saved.
            OutputFileError: A checkpoint or the expert cannot be written.
            BackendError: The loss or a gradient is not finite, or memory ran out.
        """
        settings = self.settings
        transformers.set_seed(settings.seed)
        # On a GPU a frozen model is kept in half precision; what is trained is always kept in float32.
        stored = "float32" if self._on_cpu or settings.full else self._dtype
        model = _load(settings.small, device=self._device, dtype=stored)
        width = model.config.get_text_config(decoder=True).hidden_size
        rate = default_learning_rate(self.method, full=settings.full, width=width)
        rate = settings.learning_rate or rate
        started = time.perf_counter()
        ensemble = None
        if self.method == "cpt":
            assert self.base is not None
            ensemble = self._ensemble(self.base, model)
        offsets_s = time.perf_counter() - started
        trainer = self._trainer(self._trainable(model), ensemble, rate)
        self._fit(trainer)
        self._load_adapter(trainer, trainer.state.best_model_checkpoint)
        self._save_expert(trainer.model)
        rows = trainers.read_losses(settings.training / LOSS_LOG)
        losses = [r["valid_loss"] for r in rows if r.get("valid_loss") is not None]
        return {
            "num_steps": trainer.state.global_step,
            "num_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "train_s": max((r["elapsed_s"] for r in rows), default=0.0),
            "offsets_s": round(offsets_s, 2),
            "peak_memory_bytes": peak_memory(self._device),
            "valid_loss": min(losses, default=None),
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

    # The frozen ensemble -----------------------------------------------------------------------

    def _ensemble(self, base: Checkpoint, anti_expert: Any) -> trainers.FrozenEnsemble:
        """Run the frozen models over all examples, or reuse what an earlier run computed."""
        settings, dtype = self.settings, self._dtype
        alignment = align(base.vocabulary, self.small.vocabulary)
        folder = Path(settings.offsets_dir or settings.training / "offsets")
        big = _load(settings.base or "", device=self._device, dtype=dtype)
        for model in (big, anti_expert):
            check_head(model, head_of(model))
        factors = form_coefficients(settings.cpt_form, settings.alpha or 1.0)
        heads = self._frozen_heads(big, anti_expert, alignment, factors)
        offsets = {}
        for name, part in self.encoded.items():
            examples = [e for e in part.examples if isinstance(e, Example)]
            key = offsets_key(examples, base.name, self.small.name, dtype)

            def advance(done: int, total: int, name: str = name) -> None:
                self.display.stage(f"base over {name} rows", done, total)

            offsets[name] = Offsets.open(folder / name, key) or Offsets.build(
                folder / name,
                examples,
                base=big,
                anti_expert=anti_expert,
                alignment=alignment,
                base_name=base.name,
                key=key,
                on_progress=advance,
            )
        del big
        gc.collect()
        parts = offsets["train"], offsets.get("valid")
        return trainers.FrozenEnsemble(heads, factors.expert, *parts)

    def _frozen_heads(
        self, base: Any, anti_expert: Any, alignment: Alignment, factors: Coefficients
    ) -> FrozenHeads:
        own = head_of(anti_expert)
        base_head = align_base_head(head_of(base), alignment, self.small.vocabulary)
        # Unless all weights are trained, expert and anti-expert share their head: one product gives both
        # models' logits.
        return FrozenHeads.of(
            base_head.to(self._device, torch.bfloat16 if self._dtype == "bfloat16" else None),
            own.copy() if self.settings.full else own,
            base_factor=factors.base,
            anti_expert_factor=factors.anti_expert,
        )

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
            started: Any = PeftModel.from_pretrained(model, path, config=own, is_trainable=True)
            reference = local_reference(settings.small, settings.directory)
            started.peft_config["default"].base_model_name_or_path = reference
            return started
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            lora_dropout=settings.lora_dropout,
            task_type="CAUSAL_LM",
            **lora_places(settings, self.small),
        )
        peft_model = get_peft_model(model, config)
        reference = local_reference(settings.small, settings.directory)
        peft_model.peft_config["default"].base_model_name_or_path = reference
        return peft_model

    @cached_property
    def _checkpoint(self) -> Path | None:
        return trainers.last_checkpoint(self.settings.training / "checkpoints")

    @cached_property
    def _num_steps(self) -> int:
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
        self, model: Any, ensemble: trainers.FrozenEnsemble | None, learning_rate: float
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
                ref_model=_load(settings.small, device=device, dtype="float32")
                if settings.full
                else None,
                **common,
            )
        else:
            trainer = trainers.ExpertTrainer(
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
                ensemble=ensemble,
                autocast=torch.bfloat16 if is_half else None,
                **common,
            )
        checkpoint = self._checkpoint
        self.display.say(
            f"{self._num_steps:,} steps of {settings.batch_size * settings.accumulate} rows, learning rate "
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
        settings, num_steps = self.settings, self._num_steps
        evaluates = "valid" in self.encoded
        eval_every = settings.eval_every or max(1, min(100, num_steps // 10))
        return {
            "output_dir": str(settings.training / "checkpoints"),
            "seed": settings.seed,
            "data_seed": settings.seed,
            "max_steps": num_steps,
            "max_length": self.max_length,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(1, round(0.03 * num_steps)),
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
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

        callbacks: list[Any] = [
            trainers.FiniteGradients(),
            trainers.LastEvaluation(),
            trainers.LossLog(self.settings.training / LOSS_LOG, on_row, on_step),
        ]
        if self.settings.patience and "valid" in self.encoded:
            by_reward = self.method == "grpo"
            callbacks.append(trainers.EarlyStop(self.settings.patience, reward=by_reward))
        return [*callbacks, self._stopper]

    @cached_property
    def _stopper(self) -> trainers.StopOnSignal:
        return trainers.StopOnSignal(
            lambda: self.display.say("stopping after this step; press Ctrl-C again to stop at once")
        )

    # Running it --------------------------------------------------------------------------------

    def _fit(self, trainer: Any) -> None:
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        self._load_adapter(trainer, self._checkpoint)
        try:
            with self._stopper.listening():
                checkpoint = self._checkpoint
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
            trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)

    def _save_expert(self, model: Any) -> None:
        settings = self.settings
        target = settings.directory / expert_path(settings)
        with writing(target, hint=trainers.RESUME_HINT):
            target.parent.mkdir(parents=True, exist_ok=True)
            # DPO keeps a reference adapter beside the expert's.
            chosen = {} if settings.full else {"selected_adapters": ["default"]}
            model.save_pretrained(target, **chosen)
            # PEFT writes a card without being asked; the recipe has its own.
            (target / "README.md").unlink(missing_ok=True)
            if settings.full:
                find_checkpoint(settings.small, root=Path.cwd()).tokenizer.save_pretrained(target)


def _load(reference: str, *, device: str | None, dtype: str) -> Any:
    """Return a model in evaluation mode with frozen weights."""
    checkpoint = find_checkpoint(reference, root=Path.cwd())
    spec = ModelSpec(model=reference, device=device, dtype=dtype)
    return TransformersBackend.load(checkpoint, spec).model
