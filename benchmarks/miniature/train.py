"""One training: its settings, and its result kept.

`proxytune.tune` does the training. Every kind gets the same rows and the same rule for stopping, so that
kinds can be compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.miniature.plan import (
    ANTI_EXPERT,
    BASE,
    RATES,
    SEARCH_TOKENS,
    SEED,
    TASK,
    Plan,
    parts_of,
)
from proxytune.errors import OutputFileError
from proxytune.tune import Display, TuneSettings, tune

SHARED: dict[str, Any] = {
    "template": "plain",
    "test_share": 0.0,  # `measure.py` has test rows of its own.
    "max_valid_tokens": 6_000,
    "max_length": 512,
    "lora_rank": 32,
    "patience": 2,
    "seed": SEED,
}
"""The same for every training, as are its rows, `max_tokens` and epochs."""
BATCH_SIZES = {"text": 4, "task": 16}
"""A row of text has 512 tokens, a row of the task about 19."""


def cpu_dtype() -> str:
    """Return bfloat16 if the processor has instructions for it, otherwise float32, for every training."""
    with suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return "bfloat16"
    return "float32"


def training_settings(plan: Plan, stage: str) -> dict[str, Any]:
    """Return arguments of `TuneSettings` for a stage such as `legal_dc_code.cpt` or `search.sft.0.002`."""
    name, kind, rate = parts_of(stage)
    form = "task" if name == TASK else "text"
    settings: dict[str, Any] = {
        **SHARED,
        "output": str(plan.run_path(stage)),
        "name": kind,
        "data": str(plan.rows_path(name, "train")),
        "valid_data": str(plan.rows_path(name, "valid")),
        "base": BASE,
        "method": "cpt" if kind == "cpt" else "sft",
        "calibrate": False,  # "sft" is the published method, with the untuned anti-expert.
        "learning_rate": rate or RATES[kind],
        "epochs": plan.epochs,
        "max_steps": plan.max_steps,
        "max_tokens": SEARCH_TOKENS if rate else plan.max_tokens,
        "batch_size": BATCH_SIZES[form],
        "eval_every": plan.eval_every[form],
        "dtype": cpu_dtype(),
    }
    return settings if kind == "direct" else {**settings, "anti_expert": ANTI_EXPERT}


def train(plan: Plan, stage: str, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, or continue an interrupted training, and return the result of `tune`.

    Raises:
        OutputFileError: It was trained but not measured.
        UserError: See `tune`.
    """
    settings = TuneSettings(**training_settings(plan, stage))
    begun = (settings.training / "settings.json").exists()
    if not begun:
        # Left by a process that was killed before it wrote its settings.
        shutil.rmtree(settings.directory, ignore_errors=True)
    result = tune(settings, resume=begun, display=Quarters(say)).to_dict()
    if result["valid"] is None:
        raise OutputFileError(
            f"{stage} was trained and not measured on its validation rows, so no alpha could be chosen.\n"
            f"hint: see above for why, remove {settings.output}, and run again"
        )
    # Local paths do not matter to the result, and the report is read elsewhere.
    del result["directory"]
    for part in result["data"].values():
        part["source"] = Path(part["source"]).name
    return result


class Quarters(Display):
    """Prints a line after each quarter of a stage."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._shown: dict[str, int] = {}

    def say(self, text: str) -> None:
        self._say(text)

    def stage(self, name: str, done: float, total: float, **numbers: float | None) -> None:
        quarter = int(4 * done / max(total, 1))
        if self._shown.get(name) != quarter:
            self._shown[name] = quarter
            text = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items() if v is not None)
            self._say(f"{name}: {done:,.0f} of {total:,.0f} {text}".rstrip())
