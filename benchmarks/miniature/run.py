"""The stages: which ones are done, running the others in separate processes, and gathering the results.

Each training has a separate process, so that its peak memory can be measured. Training and measuring
themselves are in other files.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.checkout import commit
from benchmarks.miniature.data import read_prepared
from benchmarks.miniature.measure import WINDOW, measure
from benchmarks.miniature.plan import ANTI_EXPERT, QUICK, Plan, Stale, parts_of
from benchmarks.miniature.report import duration
from benchmarks.miniature.summary import NUM_RESAMPLES, check_same_rows, summarise
from benchmarks.miniature.train import (
    EPOCHS,
    RATES,
    cut_settings,
    make_cut,
    train,
    training_settings,
)
from proxytune.checkpoints.references import resolve_package
from proxytune.files import write_whole
from proxytune.machine import summary
from proxytune.measure.score import BLOCK_TOKENS


def tell(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def fingerprint(plan: Plan, stage: str, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that a stage's result depends on: settings, data and weights."""
    name, kind = parts_of(stage)
    weights = hashlib.sha256(_anti_expert_weights().read_bytes()).hexdigest()
    data = prepared[name]
    if kind == "measure":
        trained = {k: plan.stage_path(f"{name}.{k}") for k in plan.kinds(name)}
        return {
            "anti_expert": weights,
            "num_windows": plan.num_windows,
            "data": data,
            "trained": {
                k: hashlib.sha256(path.read_bytes()).hexdigest()
                for k, path in trained.items()
                if path.exists()
            },
        }
    settings = training_settings(plan, stage) if kind else cut_settings(plan)
    for place in ("output", "data", "valid_data", "offsets_dir"):
        settings.pop(place, None)
    if kind.startswith("cut"):
        del settings["anti_expert"]
    return {
        "anti_expert": weights,
        "settings": settings,
        "data": {split: data[split] for split in ("train", "more", "valid") if split in data},
    }


def _anti_expert_weights() -> Path:
    return resolve_package(ANTI_EXPERT) / "model.safetensors"


def is_done(plan: Plan, stage: str, prepared: Mapping[str, Any]) -> bool:
    """Whether a stage is done already.

    Raises:
        Stale: A training with other settings exists; it is not deleted without being asked.
    """
    path = plan.stage_path(stage)
    if not path.exists():
        return False
    there, now = plan.read_stage(stage)["fingerprint"], fingerprint(plan, stage, prepared)
    if there == now:
        return True
    if stage.endswith(".measure"):
        return False
    changed = ", ".join(_differences(there, now))
    raise Stale(
        f"{stage} is finished, but was made with another {changed}, so its result does not belong to this "
        f"script.\nhint: to make it again, remove {path} and {plan.run_path(stage)}"
    )


def _differences(there: Any, now: Any, place: str = "") -> list[str]:
    if not (isinstance(there, dict) and isinstance(now, dict)):
        return [] if there == now else [place]
    return [
        difference
        for key in sorted({*there, *now})
        for difference in _differences(there.get(key), now.get(key), f"{place}.{key}".strip("."))
    ]


def run_stage(plan: Plan, stage: str) -> None:
    """Run one stage in this process and write its file.

    Raises:
        Stale: A training with other settings exists.
        UserError: The data or a model is missing; see `tune` and `ProxyTuned.load`.
    """
    prepared = read_prepared(plan)
    if is_done(plan, stage, prepared):
        tell(f"    {stage} is done")
        return
    started = time.perf_counter()
    name, kind = parts_of(stage)

    def say(text: str) -> None:
        tell(f"    {text}")

    if not kind:
        result = make_cut(plan, say=say)
    elif kind == "measure":
        result = measure(plan, name, say=say)
    else:
        result = train(plan, stage, say=say)
    content = {
        "stage": stage,
        "fingerprint": fingerprint(plan, stage, prepared),
        "commit": commit(),
        # For a training, including the time before an interruption.
        "seconds": max(
            time.perf_counter() - started, result.get("train_s", 0) + result.get("offsets_s", 0)
        ),
        "result": result,
    }
    write_whole(plan.stage_path(stage), json.dumps(content, indent=1) + "\n")


EXPECTED_S = {
    "task": {"smol": 90, "cpt": 60, "cut": 150, "direct": 130, "direct_short": 80, "measure": 180},
    "text": {
        "smol": 150,
        "cpt": 90,
        "cut": 300,
        "direct": 250,
        "direct_short": 120,
        "measure": 200,
    },
}
"""Seconds of a stage on two cores, its start included; 600 for `cut.more`."""


def expected_s(plan: Plan, stage: str) -> float:
    """Return an estimate of a stage's seconds on two cores; soon only the ratios between stages matter."""
    name, kind = parts_of(stage)
    if not kind:
        return 90
    if kind.endswith(".more"):
        return 600
    return EXPECTED_S[plan.form(name)][kind.partition(".")[0]]


def run_all(
    plan: Plan, stages: Sequence[str], prepared: Mapping[str, Any], options: Sequence[str]
) -> int:
    """Run the stages that are not done, each as this command with `options`; returns an exit code."""
    left = [stage for stage in stages if not is_done(plan, stage, prepared)]
    if len(left) < len(stages):
        tell(f"{len(stages) - len(left)} of {len(stages)} stages are done already")
    weights = [expected_s(plan, stage) for stage in left]
    started = time.perf_counter()
    for count, stage in enumerate(left):
        elapsed = time.perf_counter() - started
        pace = elapsed / sum(weights[:count]) if count else 1.0
        rest = duration(pace * sum(weights[count:]))
        tell(f"[{count + 1}/{len(left)}] {stage}: {duration(elapsed)} so far, about {rest} to go")
        folder = str(Path(__file__).parent)
        code = _wait(subprocess.Popen([sys.executable, folder, "--stage", stage, *options]))
        if code:
            tell(f"{stage} did not finish; the same command goes on from there")
            return 130 if code < 0 else code
    return 0


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a child process, which receives Ctrl-C too and needs time to save its state."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def finished(plan: Plan) -> tuple[str, ...]:
    """Return the data sets whose stages are all finished, in the plan's order."""
    return tuple(
        name
        for name in plan.data_sets
        if all(plan.stage_path(f"{name}.{s}").exists() for s in (*plan.kinds(name), "measure"))
    )


def collect(plan: Plan, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything the report says, from the data sets that are finished.

    Raises:
        Stale: Two trainings of a data set did not read the same rows.
    """
    names = finished(plan)
    stages = {
        stage: plan.read_stage(stage)
        for stage in plan.stages
        if parts_of(stage)[0] in (*names, "proxy")
    }
    trained = {
        name: {kind: stages[f"{name}.{kind}"]["result"] for kind in plan.kinds(name)}
        for name in names
    }
    check_same_rows(trained)
    made = stages[f"{names[0]}.smol"]["fingerprint"]
    versions = dict(trained[names[0]]["smol"]["environment"])
    num_threads = versions.pop("num_threads")
    command = "make miniature"
    if plan is QUICK:
        command += " ARGS=--quick"
    elif plan.is_long:
        command += " ARGS=--long"
    about = {
        "command": command,
        "is_quick": plan is QUICK,
        "is_long": plan.is_long,
        "left_out": [name for name in plan.data_sets if name not in names],
        "anti_expert": ANTI_EXPERT,
        "anti_expert_sha256": made["anti_expert"],
        "num_anti_expert_parameters": _num_parameters(),
        "proxy": stages["proxy"]["result"],
        "base": made["settings"]["base"],
        "max_tokens": plan.max_tokens,
        **{key: made["settings"][key] for key in ("patience", "lora_rank", "dtype", "seed")},
        "rates": RATES,
        "epochs": EPOCHS,
        "window": WINDOW,
        "block_tokens": BLOCK_TOKENS,
        "num_resamples": NUM_RESAMPLES,
        "data": prepared,
        "machine": f"{summary()}, {num_threads} threads",
        "versions": {"python": platform.python_version(), **versions},
        "commits": sorted({part["commit"] for part in stages.values()}),
        "total_s": sum(part["seconds"] for part in stages.values()),
    }
    measured = {name: stages[f"{name}.measure"]["result"] for name in names}
    return summarise(measured, trained, about)


def _num_parameters() -> int:
    """Return the anti-expert's number of weights, from its file's header."""
    with safe_open(_anti_expert_weights(), "np") as weights:
        shapes = (weights.get_slice(key).get_shape() for key in weights.keys())  # noqa: SIM118
        return sum(math.prod(shape) for shape in shapes)
