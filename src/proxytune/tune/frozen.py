"""The frozen models of a run: run once over its examples, then only their output heads are kept.

What is kept on disk is `offsets.py`'s, and what a loss makes of it `loss.py`'s.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.checkpoints.checkpoint import Checkpoint, find_checkpoint
from proxytune.recipe.spec import ModelSpec
from proxytune.text.vocab import Alignment, align
from proxytune.tune.encode import Encoded, Example
from proxytune.tune.heads import (
    BasePart,
    FrozenHeads,
    FrozenPart,
    Head,
    align_base_head,
    base_ids,
    check_head,
    form_coefficients,
    head_of,
)
from proxytune.tune.offsets import Offsets, kept_directory, offsets_key
from proxytune.tune.settings import Display, TuneSettings

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Kept:
    """Hidden states of one part of the data, of the base and perhaps of the anti-expert."""

    base: Offsets
    anti_expert: Offsets | None = None

    def rows(self, indices: list[int]) -> torch.Tensor:
        """Return `[positions, width]` of some examples, in the order given, on the CPU."""
        rows = self.base.rows(indices)
        if self.anti_expert is None:
            return rows
        return torch.cat([rows, self.anti_expert.rows(indices)], dim=1)

    def frozen(
        self, indices: list[int], heads: FrozenHeads, device: torch.device | str
    ) -> FrozenPart:
        """Return what `loss.cross_entropy` needs at the trained positions of some examples, in order."""
        return FrozenPart(self.rows(indices).to(device), heads)


@dataclass(frozen=True, slots=True)
class FrozenEnsemble:
    """What Consistent Proxy Tuning adds to the loss: frozen heads, and hidden states of both models."""

    heads: FrozenHeads
    expert_factor: float
    train: Kept
    valid: Kept | None


@dataclass(frozen=True, slots=True)
class FrozenBase:
    """What calibration adds to the loss: the base's head in the small model's order, and its states."""

    head: Head
    train: Kept
    valid: Kept | None

    def part(self, indices: list[int], device: torch.device | str, *, training: bool) -> BasePart:
        """Return the base at the trained positions of some examples, in order."""
        kept = self.train if training else self.valid
        assert kept is not None
        return BasePart(kept.rows(indices).to(device), self.head)


@dataclass(frozen=True)
class FrozenModels:
    """The frozen models of a run.

    Args:
        settings: The run's settings.
        small: The model that is tuned.
        base: The large model.
        encoded: Examples by `train` and, with validation, `valid`.
        device: Where the models run.
        dtype: `float32` or `bfloat16`, of the base and of stored states.
        display: Shows progress.
    """

    settings: TuneSettings
    small: Checkpoint
    base: Checkpoint
    encoded: Mapping[str, Encoded]
    device: str
    dtype: str
    display: Display

    @cached_property
    def alone(self) -> FrozenBase:
        """The base alone, run over all examples, or reused from an earlier run."""
        big = load_frozen(self.settings.base or "", device=self.device, dtype=self.dtype)
        check_head(big, head_of(big))
        head = self._base_head(big)
        # What the small model's token ids are in the base, and not its name: small models of one vocabulary
        # share these states.
        ids = base_ids(self._alignment).numpy().astype("<i8").tobytes()
        names = self.base.name, hashlib.sha256(ids).hexdigest()
        kept = {name: Kept(self._states(name, "base-", names, base=big)) for name in self.encoded}
        del big
        gc.collect()
        return FrozenBase(head, kept["train"], kept.get("valid"))

    def ensemble(self, anti_expert: Any, adapter: Path | None = None) -> FrozenEnsemble:
        """Run an anti-expert over all examples, and join it with the base's states.

        Args:
            anti_expert: The small model in evaluation mode, with its adapter if it is a calibrated one.
            adapter: The adapter's directory, whose weights the kept states belong to; None if there is none.
        """
        # Before the base runs, which can take hours.
        check_head(anti_expert, head_of(anti_expert))
        alone = self.alone
        heads, factor = self._heads(alone.head, anti_expert)
        names, folder = ("", self.small.name), None
        if adapter is not None:
            digest = hashlib.sha256((adapter / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
            # No other run has this one's calibrated anti-expert.
            names, folder = ("", f"{self.small.name} {digest}"), self.settings.training / "offsets"
        kept = {}
        for name, base in (("train", alone.train), ("valid", alone.valid)):
            if base is not None:
                states = self._states(
                    name, "anti-expert-", names, anti_expert=anti_expert, folder=folder
                )
                kept[name] = Kept(base.base, states)
        return FrozenEnsemble(heads, factor, kept["train"], kept.get("valid"))

    @cached_property
    def _alignment(self) -> Alignment:
        return align(self.base.vocabulary, self.small.vocabulary)

    def _base_head(self, base: Any) -> Head:
        head = align_base_head(head_of(base), self._alignment, self.small.vocabulary)
        return head.to(self.device, torch.bfloat16 if self.dtype == "bfloat16" else None)

    def _heads(self, base_head: Head, anti_expert: Any) -> tuple[FrozenHeads, float]:
        """Return the frozen heads of an ensemble, and the factor on the expert's logits."""
        factors = form_coefficients(self.settings.cpt_form, self.settings.alpha or 1.0)
        own = head_of(anti_expert)
        # Unless all weights are trained, expert and anti-expert share their head: one product gives both
        # models' logits.
        heads = FrozenHeads.of(
            base_head,
            own.copy() if self.settings.full else own,
            base_factor=factors.base,
            anti_expert_factor=factors.anti_expert,
        )
        return heads, factors.expert

    def _states(
        self,
        name: str,
        prefix: str,
        names: tuple[str, str],
        *,
        base: Any = None,
        anti_expert: Any = None,
        folder: Path | str | None = None,
    ) -> Offsets:
        """Return a model's hidden states for one part of the data; see `Offsets.build`.

        Args:
            name: `train` or `valid`.
            prefix: Distinguishes the directories of several models.
            names: What stands for base and anti-expert in the key; empty for the one that is left out.
            base: The base; None to run the anti-expert.
            anti_expert: The anti-expert; None to run the base.
            folder: Where they are kept; None takes `offsets_dir`, which runs share, or the run's own.
        """
        settings = self.settings
        examples = [e for e in self.encoded[name].examples if isinstance(e, Example)]
        key = offsets_key(examples, *names, self.dtype)
        folder = folder or settings.offsets_dir or settings.training / "offsets"
        directory = kept_directory(folder, f"{prefix}{name}", key)
        who = "anti-expert" if base is None else "base"
        return Offsets.open(directory, key) or Offsets.build(
            directory,
            examples,
            base=base,
            anti_expert=anti_expert,
            alignment=self._alignment,
            base_name=self.base.name,
            key=key,
            on_progress=lambda done, total: self.display.stage(
                f"{who} over {name} rows", done, total
            ),
        )


def load_frozen(reference: str, *, device: str | None, dtype: str) -> Any:
    """Return a model in evaluation mode with frozen weights."""
    checkpoint = find_checkpoint(reference, root=Path.cwd())
    spec = ModelSpec(model=reference, device=device, dtype=dtype)
    return TransformersBackend.load(checkpoint, spec).model
