"""Remake the smol family from nothing: train the anti-expert, train the experts, measure, publish.

    python zoo/remake.py

Finished steps are kept under `zoo/build/` and not repeated; delete a folder there to train it again. The
anti-expert's training goes on from its last checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import corpora
from publish import EXPERTS

HERE = Path(__file__).parent
SETTINGS = {
    "anti-expert": ["--sampled-tokens", "10000000", "--full-tokens", "3000000"],
    "tinyshakespeare": [],
    "legal_dc_code": ["--epochs", "2", "--max-windows", "300", "--valid-windows", "8"],
}
"""What `train.py` is told beside its defaults: the settings of the family that is shipped."""


def main() -> None:
    """Run the steps that are not done yet."""

    def run(*command: str) -> None:
        print("zoo:", *command, flush=True)
        subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=True)

    if not (corpora.BUILD_DIR / "anti-expert" / "model.safetensors").exists():
        run("train.py", "anti-expert", *SETTINGS["anti-expert"])
    for expert in EXPERTS:
        if not (corpora.BUILD_DIR / expert.corpus / "adapter_model.safetensors").exists():
            run("train.py", "expert", expert.corpus, *SETTINGS[expert.corpus])
    run("publish.py")


if __name__ == "__main__":
    main()
