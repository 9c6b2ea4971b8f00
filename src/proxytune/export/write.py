"""GGUF files: planned tensor by tensor, then written whole or not at all.

What the format leaves open: vectors stay in float32, and rows that do not divide into a quantised dtype's
blocks are stored in float16.
"""

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
    """A GGUF file that was written, or that was there already with the same content.

    Args:
        path: Its path.
        num_bytes: Its size.
        num_tensors: Number of tensors.
        num_unquantized: Number of tensors in float16 because their rows do not divide into blocks.
    """

    path: Path
    num_bytes: int
    num_tensors: int
    num_unquantized: int = 0


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of a file to write.

    Args:
        name: Its GGUF name.
        shape: Its shape, as in the Hugging Face layout.
        kind: What it is stored in.
        read: Returns its values in float32; called when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, values: Tensor, kind: GGMLQuantizationType) -> PlannedTensor:
        """Return the plan of a tensor whose values are there already."""
        return cls(name, tuple(values.shape), kind, lambda: values)


@dataclass(slots=True)
class PlannedFile:
    """A file that can be written: everything that a user can get wrong has been checked.

    Args:
        tensors: In the order of the file.
        add_fields: Adds the fields of the header.
        source: What errors call the model or adapter.
        num_unquantized: See `ExportedFile`.
    """

    tensors: list[PlannedTensor]
    add_fields: Callable[[GGUFWriter], None]
    source: str
    num_unquantized: int = 0


def check_dtype(dtype: str, known: Sequence[str], what: str) -> None:
    """Raise `InvalidRequest` if a dtype, chosen for `what`, is not one of `known`."""
    if dtype not in known:
        raise InvalidRequest(
            f"the dtype {dtype!r} cannot be written for {what}; choose from {', '.join(known)}"
        )


def last_part(reference: str) -> str:
    """Return the last part of a reference as the stem of a file name, with unsuitable characters replaced."""
    last = re.split(r"[/\\:]", reference.rstrip("/\\"))[-1]
    kept = re.sub(r"[^A-Za-z0-9._-]", "-", re.sub(r"\.gguf$", "", last, flags=re.IGNORECASE))
    return kept.lstrip("._-") or "model"


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that is not called `.gguf` (`InvalidRequest`) or is no file (`OutputFileError`)."""
    if output.suffix.lower() != ".gguf":
        raise InvalidRequest(
            f"the output is called {output.name!r}, and a model's file must end in .gguf to be recognised as "
            f"one.\nhint: {output.name}.gguf"
        )
    if output.is_dir():
        raise OutputFileError(
            f"{output} is a directory, and a file is to be written.\n"
            f"hint: name a file in it, such as {output / 'model.gguf'}"
        )
    if output.exists() and not overwrite and not output.is_file():
        raise OutputFileError(f"{output} is not a file.\nhint: choose another path")


def write_file(plan: PlannedFile, output: Path, *, overwrite: bool) -> ExportedFile:
    """Write a planned file, whole or not at all.

    Raises:
        OutputFileError: It cannot be written, or another file is there and `overwrite` is not set.
        CorruptModel: A value is not finite.
        UnsupportedModel: A value is too large for the dtype.
    """
    with replacing(output) as part:
        _write_gguf(plan, part)
        if output.exists() and not overwrite and not filecmp.cmp(part, output, shallow=False):
            raise OutputFileError(
                f"{output} exists with other content, which would be lost.\n"
                "hint: choose another path, or give --force to replace it"
            )
        num_bytes = part.stat().st_size
    return ExportedFile(output, num_bytes, len(plan.tensors), plan.num_unquantized)


def _write_gguf(plan: PlannedFile, path: Path) -> None:
    """Write a file tensor by tensor, so that only one of them is in memory at a time."""
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
    """Return a tensor's values as numpy stores them in the file."""
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
