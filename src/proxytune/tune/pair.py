"""Training an expert and a calibrated anti-expert together: two adapters on one small model.

The expert learns from the rows. The anti-expert learns, from the same start and at the same positions, what
the base would have said there, by KL(base || anti-expert). Both then know the manner and the words of the
rows, and what remains of the difference is what the base lacks.

The two adapters see the same batches in the same order with the same dropout, and their gradients are clipped
apart. So the expert is, step for step, the one that training by itself gives. Together they are stopped: the
validation loss is that of the steered base, `base + alpha * (expert - anti_expert)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from proxytune.tune.encode import IGNORED
from proxytune.tune.frozen import FrozenBase
from proxytune.tune.heads import BasePart, FrozenHeads, FrozenPart, head_of, run_body
from proxytune.tune.loss import cross_entropy, divergence
from proxytune.tune.trainer import ExpertTrainer

EXPERT, ANTI_EXPERT = "default", "anti_expert"
"""Names of the adapters in PEFT; the first is the name that PEFT gives to the only one."""


def add_anti_expert(model: Any) -> None:
    """Give a PEFT model a second adapter that starts where the expert's does."""
    model.add_adapter(ANTI_EXPERT, model.peft_config[EXPERT])
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if f".{EXPERT}." in name:
                weights[name.replace(f".{EXPERT}.", f".{ANTI_EXPERT}.")].copy_(weight)
    activate(model, EXPERT)


def activate(model: Any, adapter: str, *, trained: Iterable[str] = (EXPERT, ANTI_EXPERT)) -> None:
    """Let a PEFT model compute with one adapter, while several can be trained."""
    model.set_adapter(adapter)
    # PEFT freezes all adapters but the active one.
    for each in trained:
        for parameter in parameters_of(model, each):
            parameter.requires_grad_(True)


def parameters_of(model: Any, adapter: str) -> list[Any]:
    """Return the weights of one adapter."""
    return [p for name, p in model.named_parameters() if f".{adapter}." in name]


def load_pair(model: Any, checkpoint: Path, adapters: Iterable[str]) -> None:
    """Load adapters of a checkpoint into a PEFT model that has them."""
    for adapter in adapters:
        folder = checkpoint if adapter == EXPERT else checkpoint / adapter
        model.load_adapter(str(folder), adapter, is_trainable=True)
    activate(model, EXPERT, trained=adapters)


class ClipEach(TrainerCallback):
    """Clips the gradients of each adapter by itself, as if it were trained alone."""

    def __init__(self, max_norm: float) -> None:
        self._max_norm = max_norm

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip every adapter's gradients."""
        for adapter in (EXPERT, ANTI_EXPERT):
            torch.nn.utils.clip_grad_norm_(parameters_of(kwargs["model"], adapter), self._max_norm)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a pair is trained against.

    Args:
        base: The frozen base.
        alpha: Strength of steering at which training is stopped.
        is_given: Whether the anti-expert is a finished one, and only the expert is trained.
    """

    base: FrozenBase
    alpha: float
    is_given: bool = False

    @property
    def trained(self) -> tuple[str, ...]:
        """The adapters that are trained."""
        return (EXPERT,) if self.is_given else (EXPERT, ANTI_EXPERT)


class PairTrainer(ExpertTrainer):
    """Trains expert and anti-expert, and evaluates the base that they steer."""

    def __init__(self, *, calibration: Calibration, **kwargs: Any) -> None:
        super().__init__(ensemble=None, **kwargs)
        self._calibration = calibration
        self._divergences: list[float] = []
        own = head_of(self.model)
        self._heads = FrozenHeads.of(
            calibration.base.head, own, anti_expert_factor=calibration.alpha
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer of all adapters that are trained."""
        activate(self.model, EXPERT, trained=self._calibration.trained)
        return super().create_optimizer(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_pair(model or self.model, Path(resume_from_checkpoint), self._calibration.trained)

    def training_step(
        self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run forward and backward passes of one batch, and return the expert's loss."""
        if not self._calibration.is_given:
            device = self.args.device
            devices = [device] if device.type == "cuda" else []
            # The same random numbers again for the expert, so that dropout leaves out the same.
            with torch.random.fork_rng(devices), self._using(ANTI_EXPERT):
                loss = super().training_step(model, inputs, *args, **kwargs)
                self._divergences.append(float(loss))
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log losses, with the mean divergence since the last ones."""
        if "loss" in logs and self._divergences:
            # A step may have several batches, each with its share of the step's loss.
            accumulate = self.args.gradient_accumulation_steps
            mean = accumulate * sum(self._divergences) / len(self._divergences)
            logs = {**logs, "divergence": mean}
            self._divergences.clear()
        super().log(logs, *args, **kwargs)

    @contextmanager
    def _using(self, adapter: str) -> Iterator[None]:
        trained = self._calibration.trained
        activate(self.model, adapter, trained=trained)
        try:
            yield
        finally:
            activate(self.model, EXPERT, trained=trained)

    def _nats(self, model: Any, inputs: Mapping[str, Any], *, training: bool) -> tuple[Tensor, int]:
        if training and self.model.active_adapter == EXPERT:  # type: ignore[union-attr]
            return super()._nats(model, inputs, training=True)
        base = self._calibration.base
        labels = inputs["labels"][:, 1:]
        trained = labels != IGNORED
        indices = inputs["row"].tolist()
        with self._mixed_precision(inputs):
            own = self._hidden(model, inputs)[trained]
            if training:
                states = base.train.rows(indices).to(own.device)
                total = divergence(own, head_of(model), BasePart(states, base.head))
            else:
                assert base.valid is not None
                states = base.valid.rows(indices).to(own.device)
                with self._using(ANTI_EXPERT):
                    others = self._hidden(model, inputs)[trained]
                part = FrozenPart(torch.cat([states, others], 1), self._heads)
                total = cross_entropy(
                    own,
                    head_of(model),
                    labels[trained],
                    frozen=part,
                    expert_factor=self._calibration.alpha,
                )
        return total, int(trained.sum())

    def _hidden(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return `[batch, length - 1, width]`, the states that predict the next token."""
        return run_body(model, inputs["input_ids"], inputs["attention_mask"])[:, :-1]
