"""A planned file, written."""

from __future__ import annotations

import filecmp
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.errors import CorruptModel, InvalidRequest, OutputFileError, UnsupportedModel
from proxytune.files import replacing

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from torch import Tensor

DTYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
"""What a model's weights can be stored in, by GGUF's names."""

ARCHITECTURE = "llama"


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A GGUF file that was written, or was there already with the same content.

    Args:
        path: Where it stands.
        num_bytes: Its size.
        num_tensors: How many tensors it holds.
        num_unquantized: How many of them are in float16 because their rows do not divide into blocks.
    """

    path: Path
    num_bytes: int
    num_tensors: int
    num_unquantized: int = 0


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of a file to write; `read` gives its values in float32 when their turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], Tensor]


@dataclass(slots=True)
class PlannedFile:
    """A file that can be written: all that a user can get wrong has been checked."""

    tensors: list[PlannedTensor]
    add_fields: Callable[[GGUFWriter], None]
    source: str
    num_unquantized: int = 0


def check_dtype(dtype: str, known: Sequence[str], what: str) -> None:
    """Refuse a dtype that is not known, naming those that are."""
    if dtype not in known:
        raise InvalidRequest(
            f"the dtype {dtype!r} cannot be written for {what}; known are {', '.join(known)}"
        )


# Files ---------------------------------------------------------------------------------------------


def last_part(reference: str) -> str:
    """Return the last part of a reference, with what a file's name should not hold left out."""
    last = re.split(r"[/\\:]", reference.rstrip("/\\"))[-1]
    kept = re.sub(r"[^A-Za-z0-9._-]", "-", re.sub(r"\.gguf$", "", last, flags=re.IGNORECASE))
    return kept.lstrip("._-") or "model"


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that is no GGUF file's name, or that exists and may not be replaced."""
    if output.suffix.lower() != ".gguf":
        raise InvalidRequest(
            f"the output is called {output.name!r}, and a model's file must end in .gguf to be known as "
            f"one.\nhint: {output.name}.gguf"
        )
    if output.is_dir():
        raise OutputFileError(f"{output} is a directory, and a file is to be written.")
    if output.exists() and not overwrite and not output.is_file():
        raise OutputFileError(f"{output} is no file.\nhint: name another place")


def write_file(plan: PlannedFile, output: Path, *, overwrite: bool) -> ExportedFile:
    """Write a planned file, whole or not at all."""
    with replacing(output) as part:
        _write_gguf(plan, part)
        if output.exists() and not overwrite and not filecmp.cmp(part, output, shallow=False):
            raise OutputFileError(
                f"{output} is there with another content, which would be lost.\n"
                "hint: name another place, or give --force to replace it"
            )
        num_bytes = part.stat().st_size
    return ExportedFile(output, num_bytes, len(plan.tensors), plan.num_unquantized)


def _write_gguf(plan: PlannedFile, path: Path) -> None:
    """Write a file tensor by tensor, so that one of them at a time is in memory."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        plan.add_fields(writer)
        for tensor in plan.tensors:
            block_elements, block_bytes = GGML_QUANT_SIZES[tensor.kind]
            num_bytes = math.prod(tensor.shape) // block_elements * block_bytes
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=tensor.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.tensors:
            writer.write_tensor_data(_stored(tensor, plan.source))
    finally:
        writer.close()


def _stored(tensor: PlannedTensor, source: str) -> Any:
    """Return a tensor's values as numpy stores them in the file.

    Raises:
        CorruptModel: A value is not finite.
        UnsupportedModel: A value is too large for float16.
    """
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = tensor.read().detach().contiguous().numpy()
    if not np.isfinite(values).all():
        raise CorruptModel(
            f"{source}: {tensor.name} holds values that are not finite.\nhint: copy or download it again"
        )
    if tensor.kind == GGMLQuantizationType.F16 and abs(values).max(initial=0) > 65504:
        raise UnsupportedModel(
            f"{source}: {tensor.name} holds {abs(values).max():g}, which float16 cannot.\n"
            "hint: choose the dtype BF16 or F32"
        )
    return quantize(values, tensor.kind)
