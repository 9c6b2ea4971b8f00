"""Remake the smol family from scratch: train the anti-expert, train the experts, measure, publish.

    python zoo/remake.py
    python zoo/remake.py --experts    train experts alone, on the anti-expert that is shipped

Finished steps are kept in `zoo/build/` and not repeated; delete a folder there to repeat its training. An
interrupted step continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import corpora
from experts import EXPERTS, SEEDS

HERE = Path(__file__).parent
CYCLES = (
    ["--sampled-tokens", "10000000", "--full-tokens", "3000000"],
    [
        "--sampled-tokens", "11000000", "--full-tokens", "2600000", "--lr", "2.5e-3",
        "--matrix-lr", "8e-3", "--seed", "1",
    ],
)  # fmt: skip
"""Arguments of `train.py`: the second cycle starts from the weights of the first with new optimizers."""


def run(*command: str) -> None:
    """Run one of this folder's scripts to its end."""
    print("zoo:", *command, flush=True)
    subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=True)


def train_anti_expert() -> None:
    """Run the cycles that are not done yet."""
    before: list[str] = []
    for number, cycle in enumerate(CYCLES, start=1):
        is_last = number == len(CYCLES)
        output = corpora.BUILD_DIR / ("anti-expert" if is_last else f"anti-expert-{number}")
        if not (output / "model.safetensors").exists():
            run("train.py", "--output", str(output), *before, *cycle)
        before = ["--start-from", str(output)]


def main() -> None:
    """Run the steps that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", action="store_true", help="keep the shipped anti-expert")
    target = corpora.BUILD_DIR / "anti-expert"
    if not parser.parse_args().experts:
        train_anti_expert()
    elif not target.exists():
        shutil.copytree(HERE.parent / "src" / "proxytune" / "smol" / "anti-expert", target)
    for seed in SEEDS:
        for expert in EXPERTS:
            if not (expert.output(seed) / "training" / "result.json").exists():
                run("experts.py", expert.name, "--seed", str(seed))
    run("publish.py")


if __name__ == "__main__":
    main()
