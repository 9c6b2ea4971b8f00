"""Every test run: no network, quiet libraries, and a fuzzer that a busy machine does not upset."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples each run, so that a red run can be repeated; `--hypothesis-seed` explores others.
settings.register_profile(
    "proxytune", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("proxytune")
