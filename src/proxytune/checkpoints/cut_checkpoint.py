"""The files of a cut whose layers are taken from a model in memory: those of that model, and a bridge."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from proxytune.checkpoints.bridge_file import Bridge, check_bridge, read_bridge
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.cut import Keep, check_can_cut, cut_config
from proxytune.checkpoints.headers import read_safetensors_header
from proxytune.errors import UnsupportedModel
from proxytune.text.vocab import Vocabulary


@dataclass(eq=False)
class CutCheckpoint(Checkpoint):
    """What can be known of a cut without reading weights; tokenizer and vocabulary are the base's own.

    Args:
        base: The files of the model that it is cut from.
        keep: Which of its layers are kept.
        bridge_path: The file of the bridge's weights.
    """

    base: Checkpoint | None = None
    keep: Keep = field(default_factory=lambda: Keep(1, 1))
    bridge_path: Path = Path()

    @classmethod
    def of(cls, base: Checkpoint, keep: Keep, bridge_path: Path) -> CutCheckpoint:
        """Return the checkpoint of a cut, checked without its weights.

        Raises:
            UnsupportedModel: The base cannot be cut.
            InvalidRequest: The base does not have that many layers.
            CorruptModel: The bridge is for another model.
        """
        check_can_cut(base.config, keep, base.name)
        check_bridge(bridge_path, base.config)
        return cls(
            name=f"{base.name} cut to {keep}",
            kind="directory",
            directory=base.directory,
            trust_remote_code=base.trust_remote_code,
            base=base,
            keep=keep,
            bridge_path=bridge_path,
        )

    @property
    def _whole(self) -> Checkpoint:
        assert self.base is not None
        return self.base

    @cached_property
    def config(self) -> Any:
        """The transformers config of the cut."""
        return cut_config(self._whole.config, self.keep)

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._whole.tokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        """The base's vocabulary."""
        return self._whole.vocabulary

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The base's ids that end a text."""
        return self._whole.eos_token_ids

    @property
    def num_own_parameters(self) -> int:
        """Number of parameters that are not the base's: those of the bridge's layer."""
        bridge = self._empty_model.model.layers[self.keep.bridge]
        return sum(parameter.numel() for parameter in bridge.parameters())

    @property
    def stored_dtype(self) -> str:
        """The dtype of most weights of the bridge's file."""
        tensors = read_safetensors_header(self.bridge_path)
        return tensors["down"].dtype

    def weights_path(self) -> Path:
        """Refuse: the layers are those of the base in memory, whose files are another model's."""
        raise UnsupportedModel(
            f"{self.name} is made of the base's layers in memory, and has no files of its own.\n"
            "hint: `proxytune make-proxy BASE --output DIR` writes the cut as an ordinary model; name DIR"
        )

    def read_bridge(self) -> Bridge:
        """Return the bridge's weights."""
        return read_bridge(self.bridge_path)
