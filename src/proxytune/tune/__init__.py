"""Training of experts: `tune` turns rows and a small model into a recipe."""

from proxytune.tune.run import Display, Interrupted, tune
from proxytune.tune.settings import TuneResult, TuneSettings

__all__ = ["Display", "Interrupted", "TuneResult", "TuneSettings", "tune"]
