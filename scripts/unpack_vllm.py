"""Fetch a wheel of vLLM and unpack what is not compiled.

    python scripts/unpack_vllm.py 0.33.0 build/vllm-0.33.0

vLLM's releases are built for GPUs. The tests read their files, and nothing is installed.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PLATFORM = "manylinux_2_28_x86_64"
"""Any platform's files will do; this one has wheels of every release."""


def main(version: str, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        wanted = ["--no-deps", "--only-binary=:all:", "--platform", PLATFORM, f"vllm=={version}"]
        quiet = ["--disable-pip-version-check", "--quiet", "--dest", folder]
        pip = [sys.executable, "-m", "pip"]
        if importlib.util.find_spec("pip") is None:  # as where uv is installed instead
            pip = ["uv", "tool", "run", "pip"]
        subprocess.run([*pip, "download", *quiet, *wanted], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith((".py", ".json", "/METADATA"))]
            archive.extractall(target, names)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
