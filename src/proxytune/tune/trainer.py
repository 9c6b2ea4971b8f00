"""TRL's trainers with this project's loss, durable checkpoints, and a log of losses.

What is trained on which data is decided in `run.py`; rows come encoded from `encode.py`. A checkpoint is
whole or absent: a marker is written last, and `last_checkpoint` ignores checkpoints without one.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOTrainer, SFTTrainer  # type: ignore[attr-defined]
from trl.trainer.dpo_trainer import DataCollatorForPreference

from proxytune.errors import BackendError, OutputFileError
from proxytune.files import append, is_disk_error, write_whole
from proxytune.tune.encode import IGNORED, Example, PreferenceExample
from proxytune.tune.frozen import FrozenEnsemble
from proxytune.tune.heads import head_of, run_body
from proxytune.tune.loss import cross_entropy

RESUME_HINT = "free some disk space, then continue with --resume"

MARKER = "whole"
"""Name of the empty file that marks a complete checkpoint."""
_READ = "examples_read.json"
"""Name of the file in a checkpoint with the indices of the examples that were read before it."""


REWARD_LOG = {
    "reward": "reward",
    "kl": "kl",
    "completions/mean_length": "length",
    "frac_reward_zero_std": "share_alike",
    "eval_reward": "valid_reward",
    "eval_length": "valid_length",
}
"""What training by reward logs beside the loss: TRL's names, and the log's.

Rewards are means, of sampled answers and, on the validation rows, of greedy ones. The KL divergence is in
nats per token, from the model that training began with. Lengths are in tokens, and `share_alike` is the share
of prompts whose answers all had one reward."""


class NonFiniteLoss(BackendError):
    """The loss or a gradient became NaN or infinite; the weights are still those of the step before."""


# Checkpoints ---------------------------------------------------------------------------------------


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest whole checkpoint, and delete incomplete ones."""
    whole = []
    for folder in directory.glob("checkpoint-*"):
        if not re.fullmatch(r"checkpoint-\d+", folder.name):
            continue
        if (folder / MARKER).exists():
            whole.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return max(whole, key=checkpoint_step, default=None)


class _DurableCheckpoints:
    """Keeps checkpoints whole or absent, and stops before a non-finite loss reaches the weights.

    It also counts which examples were trained on, since a run may end within its first pass over them.
    """

    args: Any
    state: TrainerState
    examples_read: set[int]
    """Indices of the examples that training steps have read."""

    def __init__(self, *, continued_from: Path | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.examples_read = set()
        if continued_from is not None:
            self.examples_read |= set(json.loads((continued_from / _READ).read_text("utf-8")))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: a checkpoint is not a release, and the recipe has its own card."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if (folder / MARKER).exists():
            return
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            # A pickle that nothing reads.
            (folder / "training_args.bin").unlink(missing_ok=True)
            write_whole(folder / _READ, json.dumps(sorted(self.examples_read)))
            (folder / MARKER).touch()
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            if not is_disk_error(error):
                raise
            kept = last_checkpoint(folder.parent)
            state = "there is no earlier one"
            if kept:
                state = f"that of step {checkpoint_step(kept)} is whole"
            raise OutputFileError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {folder.parent}: "
                f"{getattr(error, 'strerror', None) or error}; {state}.\n"
                f"hint: {RESUME_HINT}"
            ) from error

    def training_step(
        self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run forward and backward passes of one batch, and return its loss.

        Raises:
            NonFiniteLoss: The loss is NaN or infinite.
        """
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise NonFiniteLoss(f"the loss of step {self.state.global_step + 1} is {float(loss)}")
        self.examples_read.update(self._rows_of(inputs))
        return loss

    def _rows_of(self, inputs: Any) -> list[int]:
        """Return the indices of a batch's examples."""
        rows: list[int] = inputs["row"].tolist()
        return rows


# Trainers ------------------------------------------------------------------------------------------


class ExpertTrainer(_DurableCheckpoints, SFTTrainer):
    """TRL's SFT trainer on encoded examples, with the chunked loss of `loss.py`.

    With an `ensemble` it trains the expert through the frozen base and anti-expert, otherwise by itself. The
    validation loss is the mean over all trained tokens and so does not depend on the batch size.
    """

    def __init__(
        self, *, ensemble: FrozenEnsemble | None, autocast: torch.dtype | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._ensemble = ensemble
        self._autocast = autocast

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the batch's loss in nats, divided by the trained tokens of its whole optimizer step."""
        total, count = self._nats(model, inputs, training=True)
        return total / (count if num_items_in_batch is None else num_items_in_batch)

    def _nats(self, model: Any, inputs: Mapping[str, Any], *, training: bool) -> tuple[Tensor, int]:
        labels = inputs["labels"][:, 1:]
        trained = labels != IGNORED
        with self._mixed_precision(inputs):
            hidden = run_body(model, inputs["input_ids"], inputs["attention_mask"])
            frozen = None
            if self._ensemble is not None:
                offsets = self._ensemble.train if training else self._ensemble.valid
                assert offsets is not None
                frozen = offsets.frozen(inputs["row"].tolist(), self._ensemble.heads, hidden.device)
            total = cross_entropy(
                hidden[:, :-1][trained],
                head_of(model),
                labels[trained],
                frozen=frozen,
                expert_factor=1.0 if self._ensemble is None else self._ensemble.expert_factor,
            )
        return total, int(trained.sum())

    def _mixed_precision(self, inputs: Mapping[str, Any]) -> torch.autocast:
        kind = inputs["input_ids"].device.type
        return torch.autocast(kind, self._autocast, enabled=self._autocast is not None)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """Return the mean loss over every trained token of the validation examples."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        nats = 0.0
        num_tokens = num_rows = 0
        for inputs in dataloader:
            total, count = self._nats(model, self._prepare_inputs(inputs), training=False)
            nats += float(total)
            num_tokens += count
            num_rows += len(inputs["input_ids"])
        model.train(was_training)
        prefix = kwargs.get("metric_key_prefix", "eval")
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{prefix}_loss": nats / max(num_tokens, 1)},
            num_samples=num_rows,
        )


class PreferenceTrainer(_DurableCheckpoints, DPOTrainer):
    """TRL's DPO trainer on encoded preference pairs."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def example_dataset(examples: Sequence[Example]) -> Dataset:
    """Return examples as the trainer expects them; `row` is the index of their offsets."""
    return Dataset.from_dict(
        {
            "input_ids": [e.token_ids for e in examples],
            "labels": [e.labels for e in examples],
            "row": list(range(len(examples))),
        }
    )


def preference_dataset(examples: Sequence[PreferenceExample]) -> Dataset:
    """Return preference pairs as the trainer expects them."""
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns = {key: [getattr(e, key) for e in examples] for key in keys}
    return Dataset.from_dict({**columns, "row": list(range(len(examples)))})


class PaddedPairs(DataCollatorForPreference):
    """TRL's collator of preference pairs, which also passes on the examples' indices."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's tensors, and `[pairs]` row indices."""
        rows = torch.tensor([example["row"] for example in examples])
        return {**super().torch_call(examples), "row": rows}


class Padded:
    """Collates examples, padded on the right to the longest one."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input ids, labels and attention mask, `[batch, length]` each, and `[batch]` row indices."""
        width = max(len(e["input_ids"]) for e in examples)

        def padded(key: str, filler: int) -> Tensor:
            return torch.tensor([e[key] + [filler] * (width - len(e[key])) for e in examples])

        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        return {
            "input_ids": padded("input_ids", self._pad_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "row": torch.tensor([e["row"] for e in examples]),
        }


# Callbacks -----------------------------------------------------------------------------------------


class FiniteGradients(TrainerCallback):
    """Stops training before a NaN or infinite gradient reaches the weights."""

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check every gradient.

        Raises:
            NonFiniteLoss: A gradient is not finite.
        """
        for parameter in kwargs["model"].parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise NonFiniteLoss(f"the gradients of step {state.global_step + 1} are not finite")


class StopOnSignal(TrainerCallback):
    """Turns the first Ctrl-C into a checkpoint and an orderly end; a second Ctrl-C stops at once."""

    def __init__(self, on_stop: Callable[[], None]) -> None:
        self._on_stop = on_stop
        self.was_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals while training runs."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {}
        with suppress(ValueError):  # Only the main thread may set handlers.
            before = {s: signal.signal(s, self._ask) for s in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.was_asked:
            raise KeyboardInterrupt
        self.was_asked = True
        self._on_stop()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and the end of training after the current step."""
        if self.was_asked:
            control.should_save = True
            control.should_training_stop = True


class EarlyStop(TrainerCallback):
    """Stops when a number of evaluations have not lowered the validation loss.

    It reads the history that checkpoints carry, so it decides the same after a resume.

    Args:
        patience: That number.
        reward: Whether a validation reward is to be raised instead.
    """

    def __init__(self, patience: int, *, reward: bool = False) -> None:
        self._patience = patience
        self._key, self._sign = ("eval_reward", -1) if reward else ("eval_loss", 1)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the last evaluations with the best one before them."""
        if self.is_due(state):
            control.should_training_stop = True

    def is_due(self, state: TrainerState) -> bool:
        """Whether the last evaluations have not lowered the loss."""
        losses = [self._sign * row[self._key] for row in state.log_history if self._key in row]
        last, before = losses[-self._patience :], losses[: -self._patience]
        return bool(before) and min(last) >= min(before)


class LastEvaluation(TrainerCallback):
    """Evaluates and saves after the last step, whatever its number."""

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for an evaluation and a checkpoint after the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True


class LossLog(TrainerCallback):
    """Writes losses as JSON lines, and passes them on.

    After a resume it first drops the rows of steps that will be trained again.

    Args:
        path: The file.
        on_row: Called with each row: `step`, `epoch`, `elapsed_s`, and `loss`, `valid_loss` or
            `valid_reward`.
        on_step: Called after each step with its number and the total number of steps.
    """

    def __init__(
        self,
        path: Path,
        on_row: Callable[[dict[str, Any]], None],
        on_step: Callable[[int, int], None],
    ) -> None:
        self._path = path
        self._on_row = on_row
        self._on_step = on_step
        self._started = time.perf_counter()
        self._before_s = 0.0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop rows after the resumed step."""
        rows = [row for row in read_losses(self._path) if row["step"] <= state.global_step]
        if not state.global_step:
            rows = []
        self._before_s = max((row["elapsed_s"] for row in rows), default=0.0)
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._started = time.perf_counter()
        self._on_step(state.global_step, state.max_steps)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass on the step."""
        self._on_step(state.global_step, state.max_steps)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one row, if it has a loss."""
        names = {
            "loss": "loss",
            "divergence": "divergence",
            "eval_loss": "valid_loss",
            "eval_rewards/accuracies": "valid_accuracy",
            "eval_rewards/margins": "valid_margin",
            "learning_rate": "learning_rate",
            "grad_norm": "grad_norm",
            **REWARD_LOG,
        }
        kept = {names[key]: value for key, value in (logs or {}).items() if key in names}
        if not kept.keys() & {"loss", "valid_loss", "valid_reward"}:
            return
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "elapsed_s": round(self._before_s + time.perf_counter() - self._started, 2),
            **{k: float(v) if math.isfinite(v) else None for k, v in kept.items()},
        }
        append(self._path, json.dumps(row) + "\n", hint=RESUME_HINT)
        self._on_row(row)


def read_losses(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `LossLog`, up to a line that a crash cut off."""
    rows = []
    with suppress(FileNotFoundError, ValueError):
        for line in path.read_text("utf-8").splitlines():
            rows.append(json.loads(line))
    return rows
