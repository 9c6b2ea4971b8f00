"""What all tests of export share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep converted copies of GGUF files where the test's other files are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
