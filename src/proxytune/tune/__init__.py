"""Training of experts: `tune` turns rows and a small model into a recipe."""

from proxytune.tune.run import tune
from proxytune.tune.settings import Display, Interrupted, TuneResult, TuneSettings

__all__ = ["Display", "Interrupted", "TuneResult", "TuneSettings", "tune"]
