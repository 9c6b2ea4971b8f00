"""How good must the small model be? Anti-experts of several sizes and training lengths, tuned and steered.

    python benchmarks/study.py            after `make miniature`; resumable

Each anti-expert gets an expert per domain, tuned through the ensemble on the miniature's rows with the
miniature's settings, and steers the same base. Results are measured on validation rows, on which alpha was
chosen too; the directly tuned base is the miniature's. Anti-experts are trained with `zoo/train.py`, except
two: the shipped one, and the one of the zoo's first cycle, which is read from
`benchmarks/build/study/anti-experts/128-13M` if it exists (commit 1fdc20e shipped it).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Python puts this script's folder first, from which `miniature` could not import its own package.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.checkout import commit  # noqa: E402
from benchmarks.miniature.data import prepare  # noqa: E402
from benchmarks.miniature.plan import ANTI_EXPERT, BUILD_DIR, FULL, ROOT  # noqa: E402
from benchmarks.miniature.run import tell  # noqa: E402
from benchmarks.miniature.train import Quarters, training_settings  # noqa: E402
from proxytune.files import write_whole  # noqa: E402
from proxytune.tune import TuneSettings, tune  # noqa: E402

BUILD = BUILD_DIR / "study"
DOMAINS = ("tinyshakespeare", "legal_dc_code")
"""Neither domain is in the anti-experts' training text."""


@dataclass(frozen=True)
class Point:
    """One anti-expert: its size, and the arguments of `zoo/train.py`; None if it exists already."""

    name: str
    width: int
    layers: int
    num_tokens: int
    training: tuple[str, ...] | None


POINTS = (
    Point("64-2M", 64, 6, 2_000_000, ("--sampled-tokens", "1500000", "--full-tokens", "500000")),
    Point("128-2M", 128, 6, 2_000_000, ("--sampled-tokens", "1500000", "--full-tokens", "500000")),
    Point(
        "128-13M", 128, 6, 13_000_000, ("--sampled-tokens", "10000000", "--full-tokens", "3000000")
    ),
    Point("128-27M", 128, 6, 26_600_000, None),
)


def anti_expert(point: Point) -> str:
    """Return a point's anti-expert, trained if it does not exist yet."""
    if point.training is None:
        return ANTI_EXPERT
    folder = BUILD / "anti-experts" / point.name
    if not (folder / "model.safetensors").exists():
        size = ("--width", str(point.width), "--layers", str(point.layers))
        command = [sys.executable, str(ROOT / "zoo" / "train.py"), "--output", str(folder)]
        subprocess.run([*command, *size, *point.training], check=True)
    return str(folder)


SETTINGS: dict[str, Any] = {
    "max_valid_tokens": 6_000,
    "measure_tokens": 15_000,
    "alpha": None,
    "epochs": 3,
    "patience": 2,
    "eval_every": 6,
}
"""What differs from the miniature's trainings."""


def trained(stage: str, output: Path, **settings: Any) -> dict[str, Any]:
    """Train as the miniature's stage does but for some settings, or go on; return the result of `tune`."""
    wanted = {**training_settings(FULL, stage), **SETTINGS, "output": str(output), **settings}
    begun = (output / "training" / "settings.json").exists()
    display = Quarters(lambda text: tell(f"    {text}"))
    return tune(TuneSettings(**wanted), resume=begun, display=display).to_dict()


def measure(point: Point, domain: str) -> dict[str, Any]:
    """Return the results of steering with this anti-expert on a domain's validation rows."""
    through = {"method": "cpt", "calibrate": None, "then_cpt": False, "offsets_dir": None}
    result = trained(
        f"{domain}.smol",
        BUILD / "runs" / f"{point.name}.{domain}",
        **through,
        learning_rate=4e-3,
        anti_expert=anti_expert(point),
    )
    tuned = trained(f"{domain}.direct", BUILD / "runs" / f"direct.{domain}")["valid"]["rows"]
    rows = {(row["name"].rpartition(".")[2], row["alpha"]): row for row in result["valid"]["rows"]}
    direct = next(row["nats"] for row in tuned if row["name"] == "direct.expert")
    alpha = result.get("best_alpha") or result["alpha"]
    base, steered = rows["base", None], rows["steered", alpha]
    return {
        "base": base["perplexity"],
        "anti_expert": rows["anti_expert", None]["perplexity"],
        "alpha": alpha,
        "steered": steered["perplexity"],
        "change": steered["change"],
        "change_interval": list(steered["change_interval"].values()),
        "gap": (base["nats"] - steered["nats"]) / (base["nats"] - direct),
        "num_tokens": result["valid"]["num_tokens"],
        "train_s": result["train_s"] + result["offsets_s"],
    }


def main() -> int:
    """Run what is left and print the table; returns the exit code."""
    prepare(FULL)
    rows = []
    for point in POINTS:
        for domain in DOMAINS:
            path = BUILD / "results" / f"{point.name}.{domain}.json"
            if not path.exists():
                tell(f"{point.name}: {domain}")
                result = {"commit": commit(), **measure(point, domain)}
                write_whole(path, json.dumps(result, indent=1) + "\n")
            rows.append(
                {
                    "point": point.name,
                    "width": point.width,
                    "layers": point.layers,
                    "training_tokens": point.num_tokens,
                    "domain": domain,
                    **json.loads(path.read_text("utf-8")),
                }
            )
    write_whole(ROOT / "docs" / "study.json", json.dumps(rows, indent=1) + "\n")
    print("| anti-expert | read | domain | its perplexity | alpha | steered, base | change | gap |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        low, high = (100 * end for end in row["change_interval"])
        print(
            f"| {row['width']} wide, {row['layers']} layers | {row['training_tokens'] / 1e6:.1f} M | "
            f"{row['domain']} | {row['anti_expert']:.0f} | {row['alpha']:g} | {row['steered']:.1f}, "
            f"{row['base']:.1f} | {100 * row['change']:.1f} % ({low:.1f} to {high:.1f}) | "
            f"{100 * row['gap']:.0f} % |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
