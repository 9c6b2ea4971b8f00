"""Every test run: no network, quiet libraries, a patient fuzzer, and quick garbage collections."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples each run, so that a red run can be repeated; `--hypothesis-seed` explores others.
settings.register_profile(
    "proxytune", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("proxytune")


@pytest.fixture(autouse=True, scope="module")
def _freeze_imports() -> Iterator[None]:
    """Keep what is imported out of garbage collections.

    Each walks over all objects there are, and takes half a second over those of the libraries; the
    libraries themselves ask for one after every training.
    """
    gc.collect()
    gc.freeze()
    yield
