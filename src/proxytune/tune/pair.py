"""Training an expert and a calibrated anti-expert together: two adapters on one small model.

The expert learns from the rows. The anti-expert learns, from the same start and at the same positions, what
the base would have said there, by KL(base || anti-expert). Both then know the manner and the words of the
rows, and what remains of the difference is what the base lacks.

The two adapters see the same batches in the same order with the same dropout, and their gradients are clipped
apart. So the expert is, step for step, the one that training by itself gives. They are evaluated together:
the validation loss is that of the steered base, `base + alpha * (expert - anti_expert)`. For a base that
shows only a part of its distribution it is the expert's loss plus the anti-expert's divergence.
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
from proxytune.tune.heads import (
    BasePart,
    FrozenHeads,
    FrozenPart,
    ShownPart,
    head_of,
    run_body,
)
from proxytune.tune.loss import cross_entropy, divergence
from proxytune.tune.shown import ShownBase
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
        base: The frozen base, or what a base behind an API shows.
        alpha: Strength of steering at which the pair is evaluated.
        is_given: Whether the anti-expert is a finished one, and only the expert is trained.
    """

    base: FrozenBase | ShownBase
    alpha: float
    is_given: bool = False

    @property
    def trained(self) -> tuple[str, ...]:
        """The adapters that are trained."""
        return (EXPERT,) if self.is_given else (EXPERT, ANTI_EXPERT)


class AntiExpertTrainer(ExpertTrainer):
    """Trains one adapter on the base's distribution."""

    def __init__(self, *, calibration: Calibration, **kwargs: Any) -> None:
        super().__init__(ensemble=None, **kwargs)
        self._base = calibration.base

    def _nats(self, model: Any, inputs: Mapping[str, Any], *, training: bool) -> tuple[Tensor, int]:
        trained = inputs["labels"][:, 1:] != IGNORED
        with self._mixed_precision(inputs):
            own = run_body(model, inputs["input_ids"], inputs["attention_mask"])[:, :-1][trained]
            base = self._base.part(inputs["row"].tolist(), own.device, training=training)
            total = divergence(own, head_of(model), base)
        return total, int(trained.sum())


class PairTrainer(ExpertTrainer):
    """Trains expert and anti-expert, and evaluates the base that they steer."""

    def __init__(self, *, calibration: Calibration, **kwargs: Any) -> None:
        super().__init__(ensemble=None, **kwargs)
        self._calibration = calibration
        self._divergences: list[float] = []

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
        labels = inputs["labels"][:, 1:]
        trained = labels != IGNORED
        with self._mixed_precision(inputs):
            own = self._hidden(model, inputs)[trained]
            base = self._calibration.base.part(
                inputs["row"].tolist(), own.device, training=training
            )
            if training:
                total = divergence(own, head_of(model), base)
            else:
                with self._using(ANTI_EXPERT):
                    others = self._hidden(model, inputs)[trained]
                total = self._steered(model, base, own, others, labels[trained])
        return total, int(trained.sum())

    def _steered(
        self, model: Any, base: BasePart | ShownPart, own: Tensor, others: Tensor, targets: Tensor
    ) -> Tensor:
        """Return the loss of the steered base, or of a base that shows a part what stands for it."""
        head = head_of(model)
        if isinstance(base, ShownPart):
            # The sum over all tokens that steering divides by is not known.
            return cross_entropy(own, head, targets) + divergence(others, head, base)
        alpha = self._calibration.alpha
        heads = FrozenHeads.of(base.head, head, anti_expert_factor=alpha)
        part = FrozenPart(torch.cat([base.hidden, others], 1), heads)
        return cross_entropy(own, head, targets, frozen=part, expert_factor=alpha)

    def _hidden(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return `[batch, length - 1, width]`, the states that predict the next token."""
        return run_body(model, inputs["input_ids"], inputs["attention_mask"])[:, :-1]
