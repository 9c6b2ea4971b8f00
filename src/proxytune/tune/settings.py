"""What a tuning run is asked for, and what it answers."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from proxytune.errors import (
    InvalidRequest,
    ProxytuneError,
)
from proxytune.settings import Option, check


class Interrupted(ProxytuneError):
    """The run was asked to stop; its state is in the last checkpoint."""


class Display:
    """What a run tells while it goes on; this one tells nothing."""

    def say(self, text: str) -> None:
        """Say something once."""

    def stage(self, name: str, done: float, total: float, **numbers: float | None) -> None:
        """Show how far a stage has come, with numbers such as the loss."""

    def close(self) -> None:
        """Take the display down."""


def expert_path(settings: TuneSettings) -> str:
    """Return where the tuned expert is saved, relative to the output."""
    return "expert" if settings.full else f"adapters/{settings.expert_name}"


Method = Literal["sft", "dpo", "cpt"]
Form = Literal["steered", "paper"]

_PROMPT = "Prompt format of the {}: plain, chat, or a Jinja template"


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What a run is asked for; what each field does and may hold stands beside it.

    Raises:
        InvalidRequest: A setting cannot be used, or two contradict each other.
    """

    data: Annotated[
        str,
        Option(
            "Training rows: JSON lines, JSON or text, also as .gz; a data set saved by datasets; or a Hub id",
            metavar="FILE",
        ),
    ]
    output: Annotated[str, Option("Directory to write the recipe to", metavar="DIR")]
    anti_expert: Annotated[
        str | None,
        Option(
            "The small model to start from; without it, the base itself is tuned", metavar="MODEL"
        ),
    ] = None
    base: Annotated[
        str | None,
        Option(
            "The large model that the expert is to steer; without it, the recipe holds the small model alone",
            metavar="MODEL",
        ),
    ] = None
    method: Annotated[
        Method,
        Option(
            "sft trains the small model by itself, cpt through the frozen base and anti-expert, dpo on "
            "preference pairs",
            metavar="NAME",
        ),
    ] = "sft"
    name: Annotated[
        str | None,
        Option(
            "Name of the expert in requests", metavar="NAME", default="the last part of --output"
        ),
    ] = None
    valid_data: Annotated[
        str | None,
        Option("Validation rows", metavar="FILE", default="--valid-share of the training rows"),
    ] = None
    valid_share: Annotated[
        float,
        Option(
            "Share of the rows that is held out for validation, at most 500 of them; 0 for none",
            at_least=0,
            below=1,
        ),
    ] = 0.05
    test_data: Annotated[
        str | None,
        Option(
            "Rows to measure once, at the strength chosen on the validation rows", metavar="FILE"
        ),
    ] = None
    split: Annotated[
        str, Option("Split to train on, if the data set has several", metavar="NAME")
    ] = "train"
    prompt: Annotated[
        str | None,
        Option(
            _PROMPT.format("expert"),
            metavar="FORMAT",
            default="chat for messages, otherwise plain",
        ),
    ] = None
    base_prompt: Annotated[
        str | None,
        Option(_PROMPT.format("base"), metavar="FORMAT", default="the expert's"),
    ] = None
    full: Annotated[bool, Option("Train all weights instead of a LoRA adapter")] = False
    lora_rank: Annotated[int, Option("Rank of the LoRA adapter", at_least=1, metavar="R")] = 32
    lora_targets: Annotated[
        tuple[str, ...],
        Option(
            "Names of the linear layers that get an adapter",
            separator=",",
            metavar="A,B,...",
            default="all but the head",
        ),
    ] = ()
    lora_dropout: Annotated[
        float, Option("Dropout of the adapter during training", at_least=0, below=1)
    ] = 0.05
    learning_rate: Annotated[
        float | None,
        Option(
            "Peak learning rate",
            above=0,
            default="2e-4 for wide models up to 2e-3 for narrow ones; a tenth of that with --full, and for "
            "dpo",
        ),
    ] = None
    epochs: Annotated[float, Option("Passes over the rows", above=0, metavar="N")] = 3.0
    max_tokens: Annotated[
        int | None,
        Option(
            "Maximum number of tokens to train on, in rows drawn by the seed",
            at_least=1,
            default="all",
        ),
    ] = None
    max_valid_tokens: Annotated[
        int,
        Option("Maximum number of tokens to evaluate on, in rows drawn by the seed", at_least=1),
    ] = 32_768
    max_steps: Annotated[
        int | None, Option("Number of optimizer steps, instead of --epochs", at_least=1)
    ] = None
    batch_size: Annotated[int, Option("Rows per forward pass", at_least=1)] = 8
    accumulate: Annotated[int, Option("Forward passes per optimizer step", at_least=1)] = 1
    max_length: Annotated[
        int | None,
        Option(
            "Tokens per row: longer rows are cut, and text is packed to this length",
            at_least=2,
            default="1024, or the context if that is shorter",
        ),
    ] = None
    eval_every: Annotated[
        int | None,
        Option(
            "Steps between evaluations, each with a checkpoint",
            at_least=1,
            default="a tenth of the run, at most 100",
        ),
    ] = None
    patience: Annotated[
        int,
        Option("Stop after this many evaluations without a lower loss; 0 never stops", at_least=0),
    ] = 3
    beta: Annotated[
        float,
        Option("For dpo: how strongly training is kept close to the untuned model", above=0),
    ] = 0.1
    alpha: Annotated[
        float | None,
        Option(
            "Strength of the recipe, and the strength that cpt trains at",
            above=0,
            default="chosen on the validation rows; cpt trains at 1",
        ),
    ] = None
    cpt_form: Annotated[
        Form,
        Option(
            "For cpt at an alpha other than 1: steered is base + alpha * (expert - anti-expert), as in "
            "decoding; paper is expert + alpha * (base - anti-expert)",
            metavar="NAME",
        ),
    ] = "steered"
    offsets_dir: Annotated[
        str | None,
        Option(
            "For cpt: directory to keep the frozen models' outputs in, for other runs on the same rows",
            metavar="DIR",
        ),
    ] = None
    measure_tokens: Annotated[
        int,
        Option(
            "Measure base, expert and steered base on about this many held-out tokens; 0 measures nothing "
            "and chooses no strength",
            at_least=0,
        ),
    ] = 15_000
    gradient_checkpointing: Annotated[bool, Option("Use less memory and more time")] = False
    seed: Annotated[int, Option("Random seed", at_least=0)] = 0
    device: Annotated[
        str | None,
        Option(
            "Device to train on: cpu, cuda, cuda:1", metavar="NAME", default="CUDA if available"
        ),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        Option(
            "Dtype to train in: float32 or bfloat16",
            metavar="NAME",
            default="bfloat16 on a GPU, float32 on the CPU",
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)
        if self.anti_expert is None and self.base is None:
            raise InvalidRequest(
                "neither a small model nor a base is given, so there is nothing to tune.\n"
                "hint: --anti-expert names the small model; --base alone tunes the base itself"
            )
        if self.method == "cpt" and (self.anti_expert is None or self.base is None):
            raise InvalidRequest(
                "method cpt trains the expert through base and anti-expert, and one of them is missing.\n"
                "hint: give --anti-expert and --base"
            )
        if self.method == "cpt" and self.base_prompt not in (None, self.prompt):
            raise InvalidRequest(
                "method cpt adds logits over one sequence of tokens, and base and expert have different "
                "prompt formats.\nhint: leave --base-prompt out"
            )

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
    """Return the peak learning rate for a model of this hidden size.

    2e-4 is what LoRA is commonly run at for models of 7 billion parameters; narrower models bear and need
    more (2e-3 served well at a width of 128). Full weights take a tenth of an adapter's rate, and preference
    pairs a tenth of text's.
    """
    rate = min(2e-3, 2e-4 * max(1.0, 2048 / width))
    return rate * (0.1 if full else 1.0) * (0.1 if method == "dpo" else 1.0)


@dataclass(frozen=True)
class TuneResult:
    """What a run leaves.

    Args:
        directory: The recipe.
        expert: The expert's name in it.
        alpha: The recipe's strength.
        num_steps: Optimizer steps that were made.
        num_parameters: Trainable ones.
        train_s: Seconds of training, evaluations included; over all sessions of a resumed run.
        offsets_s: Seconds spent on the frozen models before, for `cpt`.
        peak_memory_bytes: Of the process until training ended; on CUDA, of its tensors.
        valid_loss: The lowest, nats per trained token; None without validation.
        first_valid_loss: That of the untuned model, or of the untuned ensemble for `cpt`.
        data: Counts and digests of rows and tokens.
        valid: What base, expert, anti-expert and steered base measure on validation rows.
        test: The same on test rows, at the chosen strength.
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
