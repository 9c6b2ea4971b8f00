"""GGUF models in several files, and their tensors as one file that transformers reads.

llama.cpp names the parts of a split model `NAME-00001-of-00003.gguf` and so on, reads them all when it is
given the first, and keeps the metadata in the first alone. transformers reads one file, of the types in
`_READABLE`. For other files, `write_joined` makes one such file.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from proxytune.checkpoints.context import gguf_angles
from proxytune.checkpoints.headers import GgufHeader, StoredTensor, read_gguf_header
from proxytune.errors import CorruptModel, UnsupportedModel, pip_install

_PART = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE
)

_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

_READABLE = frozenset(
    {
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
        "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    }
)  # fmt: skip
"""Types of tensors that transformers 5.19 reads. Others are unpacked to float32 first."""

_SCALED_ELSEWHERE = frozenset({"NVFP4"})
"""Types whose values lack a factor that is a tensor of its own, which only llama.cpp applies."""

ROTARY_FACTORS = "rope_freqs.weight"
"""The tensor by whose elements llama.cpp divides rotary frequencies."""

_CHUNK_ELEMENTS = 1 << 24
"""Maximum number of values that are unpacked at once."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model in one GGUF file, or in several.

    Args:
        parts: The files and the header of each, in order.
        header: The first one's header, with the tensors of all.
    """

    parts: Mapping[Path, GgufHeader]
    header: GgufHeader

    @property
    def path(self) -> Path:
        """The first file."""
        return next(iter(self.parts))

    @property
    def is_readable(self) -> bool:
        """Whether transformers reads the file as it is."""
        return len(self.parts) == 1 and all(
            _type_name(tensor) in _READABLE for tensor in self.header.tensors.values()
        )


def read_gguf_model(path: Path) -> GgufModel:
    """Return a model by its GGUF file, or by any of its files if it is split.

    Raises:
        CorruptModel: A file cannot be read, is missing, or belongs to another model.
        UnsupportedModel: A header is of an unknown kind, or the file's name does not tell the others'.
    """
    header = read_gguf_header(path)
    if header.num_parts <= 1:
        return GgufModel({path: header}, header)
    files = _part_files(path, header.num_parts)
    headers = {file: header if file == path else read_gguf_header(file) for file in files}
    tensors: dict[str, StoredTensor] = {}
    for number, (file, own) in enumerate(headers.items()):
        said = own.metadata.get("split.no"), own.num_parts
        if said != (number, len(files)):
            raise CorruptModel(
                f"{file} is called part {number + 1} of {len(files)}, and its header says split.no "
                f"{said[0]} of {said[1]}.\nhint: copy or download all parts again, with their own names"
            )
        twice = next((name for name in own.tensors if name in tensors), None)
        if twice is not None:
            raise CorruptModel(
                f"{file} has the tensor {twice[:80]}, and so has a part before it.\n"
                "hint: copy or download all parts again"
            )
        tensors |= own.tensors
    first = headers[files[0]]
    num_tensors = first.metadata.get("split.tensors.count", len(tensors))
    if num_tensors != len(tensors):
        raise CorruptModel(
            f"the {len(files)} parts of {files[0]} hold {len(tensors)} tensors, and the first says "
            f"{num_tensors}.\nhint: copy or download all parts again"
        )
    digest = hashlib.sha256(" ".join(own.digest for own in headers.values()).encode()).hexdigest()
    return GgufModel(headers, replace(first, tensors=tensors, digest=digest, places={}))


def rotary_factors(model: GgufModel) -> list[float] | None:
    """Return what a model divides each rotary frequency by; None if it has no such factors.

    Raises:
        CorruptModel: They cannot be read.
    """
    for file, header in model.parts.items():
        tensor = header.tensors.get(ROTARY_FACTORS)
        if tensor is None:
            continue
        first, num_bytes = header.places[ROTARY_FACTORS]
        if tensor.dtype != "float32" or num_bytes != 4 * tensor.num_elements or num_bytes > 1 << 16:
            raise CorruptModel(
                f"{file}: {ROTARY_FACTORS} holds {tensor.num_elements:,} numbers of the type {tensor.dtype}, "
                "and must hold a float32 for each frequency.\nhint: convert the model again"
            )
        try:
            with file.open("rb") as data:
                data.seek(first)
                return list(struct.unpack(f"<{tensor.num_elements}f", data.read(num_bytes)))
        except (OSError, struct.error) as error:
            raise CorruptModel(f"{file} cannot be read: {error}") from error
    return None


def _part_files(path: Path, num_parts: int) -> list[Path]:
    """Return the files of a split model, the first one first; all of them are there."""
    named = _PART.fullmatch(path.name)
    if named is None or int(named["count"]) != num_parts:
        raise UnsupportedModel(
            f"{path} is one of {num_parts} parts of a model, and parts are found by their names.\n"
            f"hint: name them as llama.cpp does, NAME-00001-of-{num_parts:05}.gguf and so on"
        )
    names = [
        f"{named['stem']}-{n:05}-of-{num_parts:05}{named['suffix']}"
        for n in range(1, num_parts + 1)
    ]
    files = [path if name == path.name else path.with_name(name) for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CorruptModel(
            f"{path} is one of {num_parts} parts of a model, and {missing[0]} is not beside it"
            + (f", nor are {len(missing) - 1} more" if len(missing) > 1 else "")
            + ".\nhint: copy or download all parts into one directory"
        )
    return files


def scaled_angles(model: GgufModel) -> dict[str, Any]:
    """Return the rotary parameters that a model scales its angles by; see `gguf_angles`."""
    header = model.header
    factors = rotary_factors(model)
    return gguf_angles(header.metadata, factors, header.tensors, str(model.path))


def check_types(header: GgufHeader, name: str) -> None:
    """Check that transformers can be given every tensor of a GGUF file.

    Raises:
        UnsupportedModel: A tensor's type can only be run by llama.cpp.
    """
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    examples = {_type_name(tensor): key for key, tensor in header.tensors.items()}
    for kind in sorted(examples.keys() - _READABLE - {"F64"}):
        number = GGMLQuantizationType[kind]
        block = np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8)
        is_unpacked = kind not in _SCALED_ELSEWHERE
        try:
            if is_unpacked:
                dequantize(block, number)
        except (NotImplementedError, ValueError):
            is_unpacked = False
        if not is_unpacked:
            raise UnsupportedModel(
                f"{name}: the tensor {examples[kind][:80]} has type {kind}, which the installed gguf package "
                "does not unpack, and transformers runs unpacked weights.\n"
                'hint: run the file with llama.cpp ("llama_cpp": {}), or '
                f"{pip_install('--upgrade gguf')}"
            )


def write_joined(model: GgufModel, target: Path, *, has_values: bool) -> None:
    """Write a model as one GGUF file, of types that transformers reads.

    Args:
        model: What to write. Its metadata are kept byte by byte.
        target: The file to write.
        has_values: Whether to write the tensors' values; otherwise the file has their place as a hole.
    """
    from gguf import GGMLQuantizationType

    metadata = model.header.metadata
    alignment = int(metadata.get("general.alignment", 32))
    table, offset = bytearray(), 0
    for header in model.parts.values():
        for name, tensor in header.tensors.items():
            offset += -offset % alignment
            kind = _type_name(tensor)
            table += struct.pack("<Q", len(encoded := name.encode())) + encoded
            table += struct.pack(
                f"<I{len(tensor.shape)}QIQ",
                len(tensor.shape),
                *reversed(tensor.shape),
                GGMLQuantizationType[kind if kind in _READABLE else "F32"],
                offset,
            )
            offset += _joined_bytes(tensor, header.places[name])
    with model.path.open("rb") as first, target.open("wb") as out:
        start = bytearray(first.read(model.header.values_end))
        start[8:16] = struct.pack("<Q", len(model.header.tensors))
        out.write(start + table)
        end = out.tell() + -out.tell() % alignment + offset
        if has_values:
            for path, header in model.parts.items():
                with path.open("rb") as part:
                    for name, tensor in header.tensors.items():
                        out.write(bytes(-out.tell() % alignment))
                        _copy(tensor, header.places[name], part, out)
        out.truncate(end)


def joined_bytes(model: GgufModel) -> int:
    """Return about how many bytes `write_joined` writes; 0 if transformers reads the file as it is."""
    if model.is_readable:
        return 0
    return sum(
        _joined_bytes(tensor, header.places[name])
        for header in model.parts.values()
        for name, tensor in header.tensors.items()
    )


def _joined_bytes(tensor: StoredTensor, place: tuple[int, int]) -> int:
    return place[1] if _type_name(tensor) in _READABLE else 4 * tensor.num_elements


def _copy(tensor: StoredTensor, place: tuple[int, int], source: BinaryIO, out: BinaryIO) -> None:
    """Copy a tensor's values, unpacked if transformers does not read their type."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    begin, num_bytes = place
    source.seek(begin)
    kind = _type_name(tensor)
    number = GGMLQuantizationType[kind]
    elements, size = GGML_QUANT_SIZES[number]
    step = _CHUNK_ELEMENTS // elements * size
    for done in range(0, num_bytes, step):
        content = source.read(min(step, num_bytes - done))
        if kind == "F64":
            content = np.frombuffer(content, "<f8").astype("<f4").tobytes()
        elif kind not in _READABLE:
            blocks = np.frombuffer(content, np.uint8).reshape(-1, size)
            content = dequantize(blocks, number).astype("<f4").tobytes()
        out.write(content)


def _type_name(tensor: StoredTensor) -> str:
    """Return a tensor's type by GGUF's name."""
    return _FLOATS.get(tensor.dtype, tensor.dtype)
