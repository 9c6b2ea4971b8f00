"""What baking is asked for, what it returns, and how that is put into words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.errors import InvalidRequest
from proxytune.settings import check, declared, option

if TYPE_CHECKING:  # Importing it loads torch, which the command's help should not wait for.
    from proxytune.measure.score import Interval


@dataclass(frozen=True, kw_only=True)
class BakeSettings:
    """What a run is asked for.

    Raises:
        InvalidRequest: A setting cannot be used, or two contradict each other.
    """

    output: str = field(metadata=declared("Directory to write the adapter to", metavar="DIR"))
    data: str | None = option(
        None,
        "Rows whose texts or answers are learned from, as `proxytune tune` takes them",
        metavar="SOURCE",
    )
    prompts: Path | None = option(
        None,
        "Prompts that the steered base answers first, as JSON lines, as `proxytune generate` takes them",
        metavar="FILE",
    )
    test_data: str | None = option(
        None,
        "Rows that the result is measured on",
        metavar="SOURCE",
        none_means="a tenth of the data",
    )
    alpha: float | None = option(None, "Strength that is baked in", none_means="the recipe's")
    max_new_tokens: int = option(
        128, "Maximum number of new tokens in an answer to a prompt", at_least=1
    )
    lora_rank: int = option(32, "Rank of the LoRA adapter", at_least=1, metavar="R")
    learning_rate: float | None = option(
        None,
        "Peak learning rate",
        above=0,
        none_means="2e-4 for wide models, up to 2e-3 for narrow ones",
    )
    epochs: float = option(2.0, "Passes over the data", above=0, metavar="N")
    batch_size: int = option(4, "Windows or answers per optimizer step", at_least=1)
    seed: int = option(0, "Random seed", at_least=0)
    device: str | None = option(
        None,
        "Device to train on: cpu, cuda, cuda:1",
        metavar="NAME",
        none_means="CUDA if available",
    )

    def __post_init__(self) -> None:
        check(self)
        if (self.data is None) == (self.prompts is None):
            raise InvalidRequest(
                "data are rows to learn from, prompts are to be answered first, and one of them is needed.\n"
                "hint: proxytune bake RECIPE --data rows.jsonl --output DIR"
            )

    @property
    def directory(self) -> Path:
        """The output directory, absolute."""
        return Path(os.path.abspath(os.path.expanduser(self.output)))

    @property
    def training(self) -> Path:
        """Where the run keeps its own files."""
        return self.directory / "training"


@dataclass(frozen=True)
class BakeResult:
    """The result of a run.

    Args:
        directory: The adapter's directory.
        base: The base's perplexity on the held-out part.
        steered: The steered base's.
        baked: That of the base with the adapter.
        kept: Share of the steered base's gain in log-likelihood that is kept: 0 is the base, 1 all of it;
            None if the steered base has no gain there that its interval tells from 0.
        kept_interval: Its 95 % interval, over blocks of tokens; None with too few.
        divergence: KL(steered || baked) on the validation part, nats per token, the lowest.
        first_divergence: The same before training: KL(steered || base).
        num_tokens: Number of held-out tokens.
        num_trained: Number of tokens that were trained on.
        num_steps: Number of optimizer steps.
        train_s: Seconds of training.
    """

    directory: str
    base: float
    steered: float
    baked: float
    kept: float | None
    kept_interval: Interval | None
    divergence: float | None
    first_divergence: float | None
    num_tokens: int
    num_trained: int
    num_steps: int
    train_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return asdict(self)


PUBLISHED = (
    "The same idea is published as W2S-OPD (arXiv:2607.26246) and Direct-OPD (arXiv:2607.05394), which "
    "distil on text that the student writes. A partial reproduction of it found no gain, so trust the number "
    "measured on your own rows."
)


def summary(result: BakeResult) -> list[str]:
    """Return the result in lines for a terminal."""
    lines = [
        f"perplexity on {result.num_tokens:,} held-out tokens: base {result.base:.2f}, steered "
        f"{result.steered:.2f}, baked {result.baked:.2f}"
    ]
    if result.kept is None:
        lines.append(
            "steering itself has no gain on these rows that its 95 % interval tells from 0, so there is "
            "nothing that could be kept"
        )
    else:
        between = ""
        if result.kept_interval is not None:
            low, high = result.kept_interval.low, result.kept_interval.high
            between = f" (95 % interval {low:.0%} to {high:.0%})"
        lines.append(f"kept {result.kept:.0%} of what steering gains{between}")
    return lines


def card(settings: BakeSettings, result: BakeResult, *, base: str, experts: Sequence[str]) -> str:
    """Return the adapter's card.

    Args:
        settings: The run's settings.
        result: The run's result.
        base: The base's reference.
        experts: Names of the experts that steer.
    """
    source = settings.data or f"answers of the steered base to {settings.prompts}"
    _, last = summary(result)
    divergence = ""
    if result.divergence is not None and result.first_divergence is not None:
        divergence = (
            "- KL(steered || student) on validation rows, nats per token: "
            f"{result.first_divergence:.4f} before training, {result.divergence:.4f} after\n"
        )
    return f"""# Baked steering

A LoRA adapter of `{base}` that was distilled from the same model steered by {", ".join(experts)}. It needs no
small model: PEFT, transformers and vLLM load it as any adapter.

| model | perplexity |
| --- | ---: |
| base | {result.base:.2f} |
| steered | {result.steered:.2f} |
| base with this adapter | {result.baked:.2f} |

{last[:1].upper()}{last[1:]}. Measured on {result.num_tokens:,} tokens that training did not see.

- strength: {"the recipe's" if settings.alpha is None else f"alpha {settings.alpha:g}"}
- trained on `{source}`: {result.num_trained:,} tokens, {result.num_steps:,} steps, {result.train_s:,.0f} s,
  rank {settings.lora_rank}, seed {settings.seed}
{divergence}
{PUBLISHED}
"""
