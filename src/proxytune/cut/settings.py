"""What cutting a model is asked for, and what it returns."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from proxytune.checkpoints.cut import Keep
from proxytune.settings import check, declared, option

BRIDGE_FILE = "bridge.safetensors"
"""The name of a bridge's weights in the directory of a cut that holds nothing else."""


@dataclass(frozen=True, kw_only=True)
class CutSettings:
    """What is cut out of which model, and on which text the bridge is computed.

    Raises:
        InvalidRequest: A setting cannot be used.
    """

    output: str = field(metadata=declared("Directory to write the model to", metavar="DIR"))
    data: str | None = option(
        None,
        "Text to compute the bridge on: JSON lines, text, or any rows that `tune` takes; best some of each "
        "kind of text that will be generated",
        metavar="FILE",
        none_means="text that the base writes by itself, which takes longer",
    )
    keep: str = option(
        "3+3", "Number of first and last layers to keep, with a bridge between them", metavar="K+M"
    )
    tokens: int = option(
        16_384, "Number of tokens to compute the bridge on, drawn by the seed", at_least=256
    )
    heal: int = option(
        0,
        "Train the bridge on this many tokens of the text to predict as the base does; 0 leaves it as it was "
        "computed",
        at_least=0,
        metavar="TOKENS",
    )
    bridge_only: bool = option(
        False, "Write only the bridge; a recipe takes the layers from the base in memory"
    )
    seed: int = option(0, "Random seed", at_least=0)
    device: str | None = option(
        None,
        "Device to run the base on: cpu, cuda, cuda:1",
        metavar="NAME",
        none_means="CUDA if available",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None,
        "Dtype of the weights written: float32, bfloat16 or float16",
        metavar="NAME",
        none_means="that of the base's files; float32 for a GGUF file",
    )

    def __post_init__(self) -> None:
        check(self)
        Keep.parse(self.keep)

    @property
    def directory(self) -> Path:
        """The output directory, absolute."""
        return Path(os.path.abspath(os.path.expanduser(self.output)))


@dataclass(frozen=True)
class CutResult:
    """The result of a cut.

    Args:
        directory: The directory written.
        base: The reference of the model that was cut.
        keep: Number of first and of last layers kept.
        num_layers: Number of layers of the cut and of the base.
        num_parameters: Number of parameters of the cut and of the base.
        num_tokens: Number of tokens that the bridge was computed on.
        source: The text's name.
        error: Weighted squared error of the bridge on these tokens, as a share of doing nothing.
        num_test_tokens: Number of held-out tokens that perplexities are measured on.
        perplexity: On them, of `base`, of the `cut` and, after training, of `healed`.
        heal_tokens: Number of tokens that the bridge was trained on.
        token_ms: Milliseconds to decode one token, of `base` and `cut`, medians of alternating runs.
        bridge_s: Seconds to run the base over the text and solve for the bridge.
        heal_s: Seconds of training.
        total_s: Seconds of the whole run, the base's loading included.
        environment: Versions of libraries, device, and number of threads.
    """

    directory: str
    base: str
    keep: tuple[int, int]
    num_layers: tuple[int, int]
    num_parameters: tuple[int, int]
    num_tokens: int
    source: str
    error: float
    num_test_tokens: int
    perplexity: dict[str, float]
    heal_tokens: int
    token_ms: dict[str, float]
    bridge_s: float
    heal_s: float
    total_s: float
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return asdict(self)
