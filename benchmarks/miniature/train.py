"""Making the cut, and one training: its settings, and its result kept.

`proxytune.tune` does the training. All kinds of a data set read the same rows (but for `cut.more`), so that
they can be compared. Learning rates and epochs were chosen on validation rows; the base needs fewer epochs
than a small model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.miniature.plan import (
    BASE,
    KEPT_LAYERS,
    MORE_TEXT,
    SEED,
    Plan,
    parts_of,
)
from proxytune.tune import Display, TuneSettings, tune

SHARED: dict[str, Any] = {
    "template": "plain",
    "test_share": 0.0,  # `measure.py` has test rows of its own.
    "max_length": 512,
    "lora_rank": 32,
    "patience": 3,
    "measure_tokens": 0,  # `measure.py` measures.
}
"""The same for every training."""
FORMS: dict[str, dict[str, Any]] = {
    # A row of text has 512 tokens, one of a task 12 to 45.
    "text": {"batch_size": 4, "eval_every": 8, "max_valid_tokens": 5_000},
    "task": {"batch_size": 16, "eval_every": 16, "max_valid_tokens": 4_000},
}
RATES = {
    "text": {"smol": 8e-3, "cpt": 2e-3, "cut": 1e-3, "direct": 7e-4},
    "task": {"smol": 4e-3, "cpt": 2e-3, "cut": 1.5e-3, "direct": 7e-4},
}
EPOCHS = {
    "text": {"smol": 2, "cpt": 3, "cut": 2, "direct": 1.5},
    "task": {"smol": 6, "cpt": 6, "cut": 4, "direct": 2},
}
EPOCHS_OF_MORE = 1.3
DROPOUT = {"smol": 0.05, "cpt": 0.1, "cut": 0.1, "direct": 0.05}


def cpu_dtype() -> str:
    """Return bfloat16 if the processor has instructions for it, otherwise float32, for every training."""
    with suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return "bfloat16"
    return "float32"


def cut_settings(plan: Plan) -> dict[str, Any]:
    """Return arguments of `CutSettings` for the proxy made of the base's layers."""
    return {
        "output": str(plan.cut_path),
        "data": str(plan.rows_path("general", "train")),
        "keep": KEPT_LAYERS,
        "tokens": 16_384 if plan.max_steps is None else 1_024,
        "dtype": "float32",
    }


def training_settings(plan: Plan, stage: str) -> dict[str, Any]:
    """Return arguments of `TuneSettings` for a stage such as `legal_dc_code.cut` or `sum.smol.seed1`."""
    name, kind = parts_of(stage)
    form = plan.form(name)
    method, _, variant = kind.partition(".")
    model = method.removesuffix("_short")
    is_more = variant == "more"
    settings: dict[str, Any] = {
        **SHARED,
        **FORMS[form],
        "output": str(plan.run_path(stage)),
        "name": model,
        "data": str(plan.rows_path(name, "more" if is_more else "train")),
        "valid_data": str(plan.rows_path(name, "valid")),
        "base": BASE,
        "method": "sft",
        "learning_rate": RATES[form][model],
        "lora_dropout": DROPOUT[model],
        "epochs": EPOCHS_OF_MORE if is_more else EPOCHS[form][model],
        "max_steps": plan.max_steps,
        "max_tokens": plan.max_tokens[form] * (MORE_TEXT if is_more else 1),
        "dtype": cpu_dtype(),
        "seed": int(variant.removeprefix("seed")) if variant.startswith("seed") else SEED,
    }
    if model == "direct":
        return settings
    if model == "cut":
        # All of a cut's layers: those behind the bridge alone closed a third less of the texts' gaps.
        settings["lora_layers"] = "all"
    settings |= {
        "anti_expert": plan.small(kind),
        "alpha": 1.0,
        "offsets_dir": str(plan.states_path(name, is_more=is_more)),
    }
    if model == "cpt":
        return {**settings, "method": "cpt"}
    return {**settings, "calibrate": True, "then_cpt": not variant.startswith("seed")}


def equal_steps(plan: Plan, name: str) -> int:
    """Return how many steps of direct tuning take as long as the smol pair took, at least one.

    That includes the frozen models' forwards, and training on through the ensemble.
    """
    smol, direct = (plan.read_stage(f"{name}.{kind}")["result"] for kind in ("smol", "direct"))
    step_s = direct["train_s"] / max(direct["num_steps"], 1)
    return max(1, round((smol["train_s"] + smol["offsets_s"]) / max(step_s, 1e-9)))


def make_cut(plan: Plan, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Cut the proxy out of the base, and return the result of `make-proxy`."""
    from proxytune.cut.run import make_proxy
    from proxytune.cut.settings import CutSettings

    # Left by a process that was stopped: making it again takes a minute.
    shutil.rmtree(plan.cut_path, ignore_errors=True)
    result = asdict(make_proxy(BASE, CutSettings(**cut_settings(plan)), say=say))
    del result["directory"], result["source"]
    return result


def train(plan: Plan, stage: str, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, or continue an interrupted training, and return the result of `tune`.

    Raises:
        UserError: See `tune`.
    """
    asked = training_settings(plan, stage)
    if stage.endswith(".direct_short"):
        asked["max_steps"] = equal_steps(plan, parts_of(stage)[0])
    settings = TuneSettings(**asked)
    begun = (settings.training / "settings.json").exists()
    if not begun:
        # Left by a process that was killed before it wrote its settings.
        shutil.rmtree(settings.directory, ignore_errors=True)
    result = tune(settings, resume=begun, display=Quarters(say)).to_dict()
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
