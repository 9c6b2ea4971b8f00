"""The one policy for the device and the dtype in which a model runs."""

from __future__ import annotations

from proxytune.errors import UnsupportedModel

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes in which a model can run."""


def running_device(device: str | None) -> str:
    """Return the device for a model: the one asked for, otherwise CUDA if available, otherwise the CPU.

    `auto` spreads a model over all devices; the loader does that.

    Raises:
        UnsupportedModel: This machine does not have the device.
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
            "hint: leave the device out to use what is available"
        )
    return device


def running_dtype(dtype: str | None, *, stored_dtype: str, device: str) -> str:
    """Return the dtype in which a model's weights run: `float32`, `bfloat16` or `float16`.

    Args:
        dtype: The recipe's dtype. `auto` is the stored one on any device; None is the stored one on an
            accelerator and float32 on the CPU, where half precision is slower and less exact.
        stored_dtype: `Checkpoint.stored_dtype`. Quantised weights are unpacked to bfloat16, whose range
            covers every activation of models trained in it.
        device: The device from `running_device`.
    """
    if dtype in DTYPES:
        return str(dtype)
    if dtype is None and device == "cpu":
        return "float32"
    if stored_dtype == "float64":
        return "float32"
    return stored_dtype if stored_dtype in DTYPES else "bfloat16"
