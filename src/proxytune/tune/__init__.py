"""Training of experts: `tune` turns rows and a small model into a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proxytune.tune.settings import Display, Interrupted, TuneResult, TuneSettings

if TYPE_CHECKING:
    from proxytune.tune.run import tune

__all__ = ["Display", "Interrupted", "TuneResult", "TuneSettings", "tune"]


def __getattr__(name: str) -> Any:
    # Settings are cheap to import, and the libraries that train are not.
    if name == "tune":
        from proxytune.tune.run import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
