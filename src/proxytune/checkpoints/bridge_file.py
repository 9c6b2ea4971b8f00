"""The weights of a cut's bridge, read from and written to a file; see `cut/bridge.py` for what they mean.

The file is safetensors with three tensors: `gate`, `[1 or rank, hidden]`, the rows of the gate's projection,
one for all units if they are the same; `up`, `[rank, hidden]`, left out if it is the identity; and `down`,
`[hidden, rank]`. Each is float32, bfloat16 or float16. All other weights of the layer are zero, and its norms
divide by the root mean square alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune.checkpoints.headers import read_safetensors_header
from proxytune.checkpoints.placement import DTYPES
from proxytune.checkpoints.references import file_beside
from proxytune.errors import CorruptModel
from proxytune.files import replacing

_HINT = "write it with `proxytune make-proxy BASE --bridge-only`"


class Bridge(NamedTuple):
    """The weights of a bridge that are not zero.

    Args:
        gate: `[1 or rank, hidden]`, the gate of every unit, or of each.
        up: `[rank, hidden]`.
        down: `[hidden, rank]`.
    """

    gate: Tensor
    up: Tensor
    down: Tensor


def write_bridge(bridge: Bridge, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a bridge; see `replacing` for what it raises."""
    from safetensors.torch import save_file

    tensors = bridge._asdict()
    if len(bridge.gate) > 1 and bool((bridge.gate == bridge.gate[:1]).all()):
        tensors["gate"] = bridge.gate[:1]
    rank, width = bridge.up.shape
    if rank == width and torch.equal(bridge.up, torch.eye(rank).to(bridge.up)):
        del tensors["up"]
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(path) as part:
        save_file(tensors, part, dict(metadata))


def find_bridge(reference: str, *, root: Path) -> Path:
    """Return the file of a bridge; see `file_beside` for what it takes and raises."""
    return file_beside(reference, root=root, what="bridge", hint=_HINT)


def check_bridge(path: Path, config: Any) -> None:
    """Check by its header that a bridge fits a model.

    Args:
        path: From `find_bridge`.
        config: The model's transformers config.

    Raises:
        CorruptModel: It is no bridge, or one for a model of another size.
    """
    tensors = read_safetensors_header(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    width, most = config.hidden_size, config.intermediate_size
    down = shapes.get("down", (0, 0))
    rank = down[1] if len(down) == 2 else 0
    expected = {
        "gate": [(1, width), (rank, width)],
        "up": [(rank, width)],
        "down": [(width, rank)],
    }
    shapes.setdefault("up", (width, width))
    fits = set(shapes) == set(expected) and all(shapes[n] in expected[n] for n in expected)
    has_numbers = all(tensor.dtype in DTYPES for tensor in tensors.values())
    if not fits or not has_numbers or not 0 < rank <= most:
        found = ", ".join(f"{n} {t.dtype} {list(t.shape)}" for n, t in tensors.items()) or "nothing"
        raise CorruptModel(
            f"{path} is no bridge for a model of hidden size {width} and intermediate size {most}: it holds "
            f"{found:.300}.\nhint: {_HINT}, from the base that is used here, in {', '.join(DTYPES)}"
        )


def read_bridge(path: Path) -> Bridge:
    """Return a bridge that `check_bridge` has passed.

    Raises:
        CorruptModel: It cannot be read, or holds numbers that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptModel(f"{path} cannot be read: {error}\nhint: {_HINT}") from error
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise CorruptModel(f"{path} holds numbers that are not finite.\nhint: {_HINT}")
    down = tensors["down"]
    up = tensors["up"] if "up" in tensors else torch.eye(len(down), dtype=down.dtype)
    return Bridge(tensors["gate"], up, down)
