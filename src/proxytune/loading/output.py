"""Which models of a recipe have the base's output matrix, found in their files.

The loader compares the loaded weights and frees what is equal (`backends/transformers/output.py`). Here the
same question is answered for the check of a recipe: names and shapes first, which need no weights, and then
the values of the one or two matrices in question.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.headers import weight_files_are_there
from proxytune.checkpoints.placement import running_device, running_dtype
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.spec import ModelSpec


class _Place(NamedTuple):
    """Where and how a model's weights run."""

    dtype: str
    device: str


def shared_bytes(files: RecipeFiles) -> dict[str, int]:
    """Return how many bytes are not needed twice, for each part whose output matrix is the base's.

    Args:
        files: Those of a recipe without problems. Parts on one copy of weights count once, the first.
    """
    recipe = files.recipe
    base = recipe.base
    place = _place(files, base)
    found: dict[str, int] = {}
    if place is None:
        return found
    for part, spec in recipe.models.items():
        if spec.same_as is not None or spec.weights == base.weights:
            continue
        owner = files.owner(spec)
        if owner in found:
            found[part] = 0
        elif spec.cut_of is not None:
            if not _is_changed(files, spec):
                found[part] = 0  # it has no matrix of its own
        elif owner == part and _place(files, spec) == place:
            dtype = getattr(torch, place.dtype)
            num_equal = _num_equal(files.checkpoint(base), files.checkpoint(spec), dtype)
            if num_equal:
                found[part] = num_equal * dtype.itemsize
    return found


def _place(files: RecipeFiles, spec: ModelSpec) -> _Place | None:
    """Return how a model runs; None if its output matrix is not a plain one in this process."""
    if spec.api is not None or spec.llama_cpp is not None or spec.quantization is not None:
        return None
    checkpoint = files.checkpoint(spec)
    if checkpoint.is_quantized or not _is_here(checkpoint) or checkpoint.layout.head is None:
        return None
    if _is_changed(files, spec):
        return None
    device = running_device(spec.device)
    dtype = running_dtype(spec.dtype, stored_dtype=checkpoint.stored_dtype, device=device)
    return _Place(dtype, device)


def _is_changed(files: RecipeFiles, spec: ModelSpec) -> bool:
    """Whether an adapter changes the output matrix of a model, or the embedding that may be the same."""
    checkpoint = files.checkpoint(spec)
    ends = {checkpoint.layout.head, checkpoint.layout.embedding}
    sharing = [
        other
        for other in files.recipe.models.values()
        if other.same_as is None and other.weights == spec.weights
    ]
    adapters = [adapter for other in sharing if (adapter := files.adapter(other)) is not None]
    return any(ends & set(adapter.changes(checkpoint)) for adapter in adapters)


def _is_here(checkpoint: Checkpoint) -> bool:
    """Whether weights can be read one by one without fetching them."""
    if checkpoint.kind == "gguf":
        return True
    return bool(checkpoint.tensors) and weight_files_are_there(checkpoint.directory)


def _num_equal(base: Checkpoint, small: Checkpoint, dtype: torch.dtype) -> int:
    """Return how many numbers of the output matrix and of an embedding beside it are the base's.

    0 if those of the output matrix are not.
    """
    layouts = [checkpoint.layout for checkpoint in (base, small)]
    shapes = [layout.parameters[str(layout.head)] for layout in layouts]
    if shapes[0] != shapes[1] or "weight" not in shapes[0] or "bias" in shapes[0]:
        return 0
    files = [checkpoint.weight_files() for checkpoint in (base, small)]
    heads, embeddings = [], []
    for layout, own in zip(layouts, files, strict=True):
        embedding = f"{layout.embedding}.weight"
        heads.append((own, embedding if layout.is_tied else f"{layout.head}.weight"))
        embeddings.append((own, embedding))
    num_equal = _num_same(heads, dtype)
    is_untied = not any(layout.is_tied for layout in layouts)
    return num_equal + (_num_same(embeddings, dtype) if num_equal and is_untied else 0)


def _num_same(places: list[tuple[dict[str, Path], str]], dtype: torch.dtype) -> int:
    """Return the size of two stored weights if they are equal, and 0 if they differ or one is not there."""
    one, other = (_stored(files, name) for files, name in places)
    if one is None or other is None or one.shape != other.shape:
        return 0
    return one.numel() if torch.equal(one.to(dtype), other.to(dtype)) else 0


def _stored(files: dict[str, Path], name: str) -> Tensor | None:
    from safetensors import safe_open

    if name not in files:
        return None
    with safe_open(files[name], framework="pt") as weights:
        value: Tensor = weights.get_tensor(name)
    return value
