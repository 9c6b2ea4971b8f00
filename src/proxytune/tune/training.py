"""Training itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxytune.recipe.spec import ModelSpec


def load_frozen(reference: str, *, device: str | None, dtype: str) -> Any:
    """Return a model in evaluation mode, its weights frozen."""
    from proxytune.backends.transformers.backend import TransformersBackend
    from proxytune.checkpoints.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(reference, root=Path.cwd())
    spec = ModelSpec(model=reference, device=device, dtype=dtype)
    return TransformersBackend.load(checkpoint, spec).model
