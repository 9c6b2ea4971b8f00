"""What a tuning run is asked for, and what it returns."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from proxytune.errors import InvalidRequest, ProxytuneError

LOSS_LOG = "log.jsonl"
"""The name of the file with a run's losses, in `TuneSettings.training`."""


class Interrupted(ProxytuneError):
    """The user stopped the run; its state is in the last checkpoint."""


class Display:
    """Shows a run's progress; this one shows nothing."""

    def say(self, text: str) -> None:
        """Show a message."""

    def stage(self, name: str, done: float, total: float, **numbers: float | None) -> None:
        """Show how far a stage has progressed, with numbers such as the loss."""

    def close(self) -> None:
        """Remove the display."""


def expert_path(settings: TuneSettings) -> str:
    """Return the path of the tuned expert, relative to the output directory."""
    return "expert" if settings.full else f"adapters/{settings.expert_name}"


Method = Literal["sft", "dpo", "cpt"]
Form = Literal["steered", "paper"]


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What a run is asked for.

    Args:
        output: The recipe's directory.
        data: Training rows: a file, a directory of `datasets`, or a Hub id.
        anti_expert: The small model to start from; None tunes the base itself.
        base: The large model that the expert shall steer; None writes a recipe of the small model alone.
        method: `sft`, `dpo`, or `cpt` (through the frozen ensemble).
        name: What requests call the expert; None takes the output directory's name.
        valid_data: Validation rows; None takes `valid_share` of the training rows.
        valid_share: In [0, 1); 0 trains without validation.
        test_data: Rows that are measured once, at the strength chosen on the validation rows.
        split: Of a data set that has several.
        prompt: The expert's prompt format; None is `chat` for messages and `plain` for the rest.
        base_prompt: The base's; None is the expert's.
        full: Train all weights; otherwise a LoRA adapter.
        lora_rank: Of the adapter.
        lora_targets: Names of the linear layers that get an adapter; empty for all but the head.
        lora_dropout: In training only.
        learning_rate: At its peak; None takes `default_learning_rate`.
        epochs: Passes over the rows.
        max_tokens: Train on at most so many tokens, in rows drawn by the seed; None for all.
        max_valid_tokens: Evaluate on at most so many tokens, drawn likewise.
        max_steps: Optimizer steps; None for as many as the epochs have.
        batch_size: Rows per forward.
        accumulate: Forwards per optimizer step.
        max_length: Tokens per row; longer rows are cut. None is 1024 or the context.
        eval_every: Steps between evaluations and checkpoints; None is a tenth of the run, at most 100.
        patience: Evaluations without a lower validation loss before training ends early; 0 never does.
        beta: DPO's: how much leaving the untuned model costs.
        alpha: The recipe's strength; None chooses it on the validation rows where there is a base. For
            `cpt` also the strength that is trained at; None is 1.
        cpt_form: `steered`: base + alpha * (expert - anti_expert); `paper`: expert + alpha * (base -
            anti_expert). They are one at alpha 1.
        offsets_dir: Where `cpt` keeps what it computes of the frozen models, to be used again by another run
            on the same rows; None keeps it for this run only.
        measure_tokens: Base, expert and steered base are measured on at most about so many tokens of the
            validation rows, and of the test rows; 0 measures nothing and chooses no strength.
        gradient_checkpointing: Less memory, more time.
        seed: Of everything drawn.
        device: As torch names it; None is CUDA where there is some.
        dtype: `float32` or `bfloat16`; None is bfloat16 on an accelerator, float32 on the CPU.

    Raises:
        InvalidRequest: A setting cannot be used, or two contradict each other.
    """

    output: str
    data: str
    anti_expert: str | None = None
    base: str | None = None
    method: Method = "sft"
    name: str | None = None
    valid_data: str | None = None
    valid_share: float = 0.05
    test_data: str | None = None
    split: str = "train"
    prompt: str | None = None
    base_prompt: str | None = None
    full: bool = False
    lora_rank: int = 32
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.05
    learning_rate: float | None = None
    epochs: float = 3.0
    max_tokens: int | None = None
    max_valid_tokens: int = 32_768
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    max_length: int | None = None
    eval_every: int | None = None
    patience: int = 3
    beta: float = 0.1
    alpha: float | None = None
    cpt_form: Form = "steered"
    offsets_dir: str | None = None
    measure_tokens: int = 15_000
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.anti_expert is None and self.base is None:
            raise InvalidRequest(
                "neither a small model nor a base is named, so there is nothing to tune.\n"
                "hint: --anti-expert names the small model; --base alone tunes the base itself"
            )
        if self.method not in ("sft", "dpo", "cpt"):
            raise InvalidRequest(f"method is {self.method!r}, and must be sft, dpo or cpt")
        if self.method == "cpt" and (self.anti_expert is None or self.base is None):
            raise InvalidRequest(
                "method cpt trains the expert through base and anti-expert, and one of them is missing.\n"
                "hint: give --anti-expert and --base"
            )
        if self.cpt_form not in ("steered", "paper"):
            raise InvalidRequest(f"cpt_form is {self.cpt_form!r}, and must be steered or paper")
        if self.method == "cpt" and self.base_prompt not in (None, self.prompt):
            raise InvalidRequest(
                "method cpt adds logits over one sequence of tokens, and base and expert have different "
                "prompt formats.\nhint: leave --base-prompt out"
            )
        if self.dtype not in (None, "float32", "bfloat16"):
            raise InvalidRequest(f"dtype is {self.dtype!r}, and must be float32 or bfloat16")
        for key, lowest in (
            ("lora_rank", 1), ("max_tokens", 1), ("max_valid_tokens", 1), ("max_steps", 1),
            ("batch_size", 1), ("accumulate", 1), ("max_length", 2), ("eval_every", 1),
            ("patience", 0), ("measure_tokens", 0), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < lowest:
                raise InvalidRequest(f"{key} is {value}, and must be at least {lowest}")
        for key in ("learning_rate", "epochs", "beta", "alpha"):
            value = getattr(self, key)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidRequest(f"{key} is {value}, and must be a positive number")
        for key in ("valid_share", "lora_dropout"):
            value = getattr(self, key)
            if not 0 <= value < 1:
                raise InvalidRequest(f"{key} is {value}, and must be at least 0 and below 1")

    @property
    def directory(self) -> Path:
        """The output directory, absolute."""
        return Path(os.path.abspath(os.path.expanduser(self.output)))

    @property
    def training(self) -> Path:
        """Where the run keeps its own files."""
        return self.directory / "training"

    @property
    def small(self) -> str:
        """The model that is tuned."""
        model = self.anti_expert or self.base
        assert model is not None
        return model

    @property
    def expert_name(self) -> str:
        """What requests call the expert."""
        name = self.name or "".join(
            c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in self.directory.name
        ).lstrip("._-")
        return name or "expert"


def default_learning_rate(method: Method, *, full: bool, width: int) -> float:
    """Return the default peak learning rate for a model of this hidden size.

    LoRA commonly uses 2e-4 for models of 7 billion parameters. Narrower models tolerate and need more (2e-3
    worked well at a width of 128). Full weights take a tenth of an adapter's rate, and preference pairs a
    tenth of the rate for text.
    """
    rate = min(2e-3, 2e-4 * max(1.0, 2048 / width))
    return rate * (0.1 if full else 1.0) * (0.1 if method == "dpo" else 1.0)


@dataclass(frozen=True)
class TuneResult:
    """The result of a run.

    Args:
        directory: The recipe's directory.
        expert: The expert's name in the recipe.
        alpha: The recipe's strength.
        num_steps: Number of optimizer steps.
        num_parameters: Number of trainable parameters.
        train_s: Seconds of training, evaluations included, over all parts of a resumed run.
        offsets_s: Seconds spent on the frozen models beforehand, for `cpt`.
        peak_memory_bytes: Peak memory of the process until training ended; on CUDA, of its tensors.
        valid_loss: Lowest validation loss, nats per trained token; None without validation.
        first_valid_loss: Validation loss of the untuned model, or of the untuned ensemble for `cpt`.
        data: Counts and digests of rows and tokens, by part.
        learning_rate: Peak learning rate.
        valid: Scores of base, expert, anti-expert and steered base on validation rows; see `ScoreReport`.
        test: The same on test rows, at the chosen strength.
        environment: Versions of libraries, and the number of threads.
    """

    directory: str
    expert: str
    alpha: float
    num_steps: int
    num_parameters: int
    train_s: float
    offsets_s: float
    peak_memory_bytes: int
    valid_loss: float | None
    first_valid_loss: float | None
    data: dict[str, Any]
    learning_rate: float
    valid: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return asdict(self)
