"""What calibrating an anti-expert costs and brings: by itself, shared by two experts, and from a black box.

    python -m benchmarks.calibration OUTPUT

On two texts of the miniature, with its rows and settings, the smol family's small model is trained

    plain     by itself, with the untuned anti-expert, as in the paper
    own       beside an anti-expert calibrated on the same rows
    shared    by itself, with one anti-expert calibrated on the rows of both texts
    shown     as `own`, from the 20 likeliest tokens of the base that an HTTP API shows

and the base is steered by each on the test text. Finished runs are kept in OUTPUT. It writes calibration.json
and prints one line per text and way.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.miniature.data import prepare, read_rows
from benchmarks.miniature.plan import ANTI_EXPERT, BASE, FULL
from benchmarks.miniature.train import training_settings
from proxytune.backends.api import server as api_server
from proxytune.machine import summary
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.tune import TuneSettings, tune

TEXTS = ("tinyshakespeare", "legal_dc_code")
ALPHAS = [0.4, 0.6, 0.8, 1.0, 1.2]
TEST_CHARACTERS = 40_000
TOP_LOGPROBS = 20
START_S = 120


def settings_for(name: str, way: str, output: Path, **changes: Any) -> TuneSettings:
    """Return the settings of a text's training in one of the ways."""
    asked = training_settings(FULL, f"{name}.smol") | {
        "output": str(output / f"{name}.{way}"),
        "then_cpt": False,
        "offsets_dir": str(output / "states"),
    }
    return TuneSettings(**(asked | changes))


def trained(settings: TuneSettings) -> dict[str, Any]:
    """Train, or return what a finished training left."""
    begun = (settings.training / "settings.json").exists()
    result = tune(settings, resume=begun).to_dict()
    return {key: result[key] for key in ("train_s", "offsets_s", "num_steps", "valid_loss")}


@contextmanager
def served_base(output: Path) -> Iterator[str]:
    """Serve the base over HTTP, and yield its address."""
    small = ModelSpec(model=ANTI_EXPERT)
    recipe = Recipe(
        base=ModelSpec(model=BASE), experts=(ExpertSpec("none", small, small, alpha=0.0),)
    )
    recipe.write(output / "served", overwrite=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "proxytune",
        "serve",
        str(output / "served"),
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}/v1"
        for _ in range(START_S):
            try:
                urllib.request.urlopen(f"{address}/models", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


def measured(output: Path, name: str, way: str) -> dict[str, float]:
    """Return the perplexity of the base, the pair, and the steered base by strength, on the test text."""
    adapters = output / f"{name}.{way}" / "adapters"
    anti = ModelSpec(model=ANTI_EXPERT)
    if way == "shared":
        anti = replace(anti, adapter=str(output / "both.own" / "adapters" / "smol-anti-expert"))
    elif way != "plain":
        anti = replace(anti, adapter=str(adapters / "smol-anti-expert"))
    expert = ModelSpec(model=ANTI_EXPERT, adapter=str(adapters / "smol"))
    model = ProxyTuned.load(Recipe(ModelSpec(model=BASE), (ExpertSpec("smol", expert, anti),)))
    text = read_rows(FULL, name, "test")[0]["text"][:TEST_CHARACTERS]
    report = model.score(text, ALPHAS, window=512)
    found = {row: report.row(row).perplexity for row in ("base", "smol.expert", "smol.anti_expert")}
    return found | {f"{a:g}": report.row("steered", a).perplexity for a in ALPHAS}


def main() -> None:
    """Train in every way, measure, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    prepare(FULL)
    # The server shows more; large providers do not.
    api_server.DEFAULT_TOP_LOGPROBS = TOP_LOGPROBS
    both = output / "both.jsonl"
    both.write_text(
        "".join(FULL.rows_path(name, "train").read_text("utf-8") for name in TEXTS), "utf-8"
    )
    tokens = FULL.max_tokens["text"]
    costs: dict[str, Any] = {
        "both.own": trained(
            settings_for(TEXTS[0], "own", output, data=str(both), max_tokens=len(TEXTS) * tokens,
                         output=str(output / "both.own"))
        )
    }  # fmt: skip
    shared = str(output / "both.own" / "adapters" / "smol-anti-expert")
    with served_base(output) as address:
        changes: dict[str, dict[str, Any]] = {
            "plain": {"calibrate": False},
            "own": {},
            "shared": {"calibrate": None, "calibrated": shared},
            "shown": {"base": address},
        }
        for name in TEXTS:
            for way, own in changes.items():
                costs[f"{name}.{way}"] = trained(settings_for(name, way, output, **own))
    rows = {}
    for name in TEXTS:
        for way in changes:
            rows[f"{name}.{way}"] = found = measured(output, name, way)
            shown = ", ".join(f"{key} {value:.2f}" for key, value in found.items())
            print(f"{name}.{way}: {shown}", flush=True)
    about = {
        "machine": summary(),
        "top_logprobs": TOP_LOGPROBS,
        "training": costs,
        "perplexity": rows,
    }
    (output / "calibration.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
