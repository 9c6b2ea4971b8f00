"""Which device, which dtype."""

from __future__ import annotations

from typing import Any

from proxytune.errors import UnsupportedModel

DTYPES = ("float32", "bfloat16", "float16")
"""What a model can run in."""


def running_device(device: str | None) -> str:
    """Return where a model runs: as asked, or on CUDA where there is some, or on the CPU.

    `auto` spreads a model over all devices, and is left to the loader.

    Raises:
        UnsupportedModel: The device is not one of this machine.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "auto":
        return device
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UnsupportedModel(
            f"the device {device!r} is not one that torch knows.\n"
            'hint: "cpu", "cuda", "cuda:0" or "auto", or leave it out'
        ) from error
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    why = None
    if kind.type == "cuda" and (kind.index or 0) >= num_cuda:
        why = f"torch sees {num_cuda} CUDA devices here"
    elif kind.type == "mps" and not torch.backends.mps.is_available():
        why = "torch does not have it here"
    if why is not None:
        raise UnsupportedModel(
            f"the device {device!r} was asked for, and {why}.\n"
            "hint: leave the device out to take what there is"
        )
    return device


def running_dtype(dtype: str | None, *, stored_dtype: str, device: str) -> str:
    """Return the dtype a model's weights run in: `float32`, `bfloat16` or `float16`.

    Args:
        dtype: As the recipe asks. `auto` is the stored one on any device; None is the stored one on an
            accelerator and float32 on the CPU, where half precision is slower and less exact.
        stored_dtype: As `Checkpoint.stored_dtype` says it. Quantised weights are unpacked to bfloat16,
            whose range holds every activation of models trained in it.
        device: As `running_device` returned it.
    """
    if dtype in DTYPES:
        return str(dtype)
    if dtype is None and device == "cpu":
        return "float32"
    if stored_dtype == "float64":
        return "float32"
    return stored_dtype if stored_dtype in DTYPES else "bfloat16"


def max_context(config: Any) -> int | None:
    """Return how many tokens a model of this text config can hold; None where positions do not end."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
