"""Headers of safetensors and GGUF files: which tensors there are, without their values."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.errors import CorruptModel, ModelNotFound, UnsupportedModel

# Bits per element and the torch name, by the dtype names of safetensors headers.
SAFETENSORS_DTYPES = {
    "F4": (4, "float4_e2m1fn"), "F6_E2M3": (6, "float6_e2m3"), "F6_E3M2": (6, "float6_e3m2"),
    "F8_E5M2": (8, "float8_e5m2"), "F8_E4M3": (8, "float8_e4m3fn"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "BOOL": (8, "bool"), "BF16": (16, "bfloat16"), "C64": (64, "complex64"),
    **{f"F{bits}": (bits, f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": (bits, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": (bits, f"uint{bits}") for bits in (8, 16, 32, 64)},
}  # fmt: skip
_GGUF_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# The GGUF format's value types; the scalars have a fixed size.
_GGUF_TEXT, _GGUF_ARRAY = 8, 9
_GGUF_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

_TOKENS, _TOKEN_KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_UNUSED = 5
_GGUF_PADDING = re.compile(r"\[PAD-?\d+\]")
"""Converters' names for ids that no token has."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a weight file, without its values; `dtype` is torch's name or GGUF's (`Q4_1`)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, checked against the file's size.

    Raises:
        CorruptModel: The header is malformed, or the file is shorter or longer than its header says.
    """

    def corrupt(why: str) -> CorruptModel:
        return CorruptModel(
            f"{path} cannot be read as safetensors: {why}.\nhint: copy or download it again"
        )

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise CorruptModel(
                    f"{path} is a pointer of Git LFS, not the weights themselves.\n"
                    "hint: run `git lfs pull` where it was cloned"
                )
            if len(start) < 8:
                raise corrupt(f"it has {size} bytes")
            length = int.from_bytes(start, "little")
            if length > size - 8:
                raise corrupt(f"its header should take {length} bytes, and {size - 8} are there")
            header = json.loads(file.read(length))
    except OSError as error:
        raise corrupt(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise corrupt("its header is not JSON") from error
    tensors: dict[str, StoredTensor] = {}
    end = 0
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape = tuple(int(length) for length in entry["shape"])
            bits, dtype = SAFETENSORS_DTYPES.get(entry["dtype"], (None, entry["dtype"].lower()))
            begin, stop = (int(offset) for offset in entry["data_offsets"])
            tensors[name] = StoredTensor(shape, dtype)
            if begin < 0 or stop < begin or any(length < 0 for length in shape):
                raise corrupt(f"the place of {name} is impossible")
            if bits is not None and (stop - begin) * 8 != math.prod(shape) * bits:
                raise corrupt(
                    f"{name} has {stop - begin} bytes, which is not {list(shape)} {dtype}"
                )
            end = max(end, stop)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise corrupt("its header does not list tensors") from error
    if end != size - 8 - length:
        state = "cut off" if end > size - 8 - length else "longer than its tensors"
        raise corrupt(
            f"it is {state}: its tensors take {end} bytes, and {size - 8 - length} are there"
        )
    return tensors


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a GGUF file.

    Args:
        metadata: Numbers and strings by key, without arrays except the two below.
        tensors: Tensors by GGUF's names, with shapes in torch's order.
        digest: SHA-256 of the header's bytes, which decide config and tokenizer.
        tokens: The vocabulary, by token id; empty in an adapter.
        token_kinds: llama.cpp's type of each token: 3 is control, 5 unused.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    digest: str
    tokens: Sequence[str] = field(default=(), repr=False)
    token_kinds: Sequence[int] = field(default=(), repr=False)

    def token_to_id(self) -> dict[str, int]:
        """Return the vocabulary without tokens that only pad it to the width of the output head."""
        kinds = self.token_kinds or [1] * len(self.tokens)
        return {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, kinds, strict=True))
            if not (kind == _UNUSED and _GGUF_PADDING.fullmatch(token))
        }


def read_gguf_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file, checked against the file's size.

    Raises:
        CorruptModel: It is not a GGUF file, or is cut off.
        UnsupportedModel: Its version, byte order or a tensor type is unknown, or it is one of several parts.
    """
    try:
        size = path.stat().st_size
        if size < 24:
            raise _not_gguf(path, f"it has {size} bytes")
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _not_gguf(path, str(error)) from error
    with view:
        reader = _GgufReader(path, view, size)
        try:
            metadata, tensors, places = reader.header()
        except (struct.error, RecursionError) as error:
            raise _not_gguf(path, "it is cut off inside its header") from error
        header_bytes = reader.position
        digest = hashlib.sha256(view[:header_bytes]).hexdigest()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _not_gguf(path, f"its alignment is {alignment!r}")
    data = -(-header_bytes // alignment) * alignment
    for name, (offset, num_bytes) in places.items():
        if data + offset + num_bytes > size:
            end = data + offset + num_bytes
            why = f"it is cut off: {name} should end at byte {end}, and the file has {size}"
            raise _not_gguf(path, why)
    if int(metadata.get("split.count") or 0) > 1:
        raise UnsupportedModel(
            f"{path} is one of {metadata['split.count']} parts of a model.\n"
            "hint: join them with `llama-gguf-split --merge FIRST_PART OUT.gguf`"
        )
    tokens, kinds = metadata.pop(_TOKENS, []), metadata.pop(_TOKEN_KINDS, [])
    if kinds and len(kinds) != len(tokens):
        raise _not_gguf(path, f"it has {len(tokens)} tokens and the kinds of {len(kinds)}")
    return GgufHeader(metadata, tensors, digest, tokens, kinds)


def _not_gguf(path: Path, why: str) -> CorruptModel:
    return CorruptModel(f"{path} cannot be read as GGUF: {why}.\nhint: copy or download it again")


class _GgufReader:
    """Reads a GGUF file's header, value by value; every length is checked against the file's size."""

    def __init__(self, path: Path, view: mmap.mmap, size: int) -> None:
        self._path, self._view, self._size = path, view, size
        self.position = 0

    def header(self) -> tuple[dict[str, Any], dict[str, StoredTensor], dict[str, tuple[int, int]]]:
        """Return metadata, tensors, and where each tensor's data are: offset and length in bytes."""
        if self._view[:4] != b"GGUF":
            raise _not_gguf(self._path, f"it begins with {self._view[:4]!r} instead of b'GGUF'")
        self.position = 4
        version = self._take("I")
        if version not in (2, 3):
            raise UnsupportedModel(
                f"{self._path} is GGUF of version {version} or of the other byte order; only versions 2 and "
                "3 in little-endian order can be read.\nhint: convert it again with a current llama.cpp"
            )
        num_tensors, num_values = self._take("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._text()
            value = self._value(self._take("I"), is_kept=key in (_TOKENS, _TOKEN_KINDS))
            if value is not None:
                metadata[key] = value
        tensors: dict[str, StoredTensor] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(num_tensors):
            name = self._text()
            tensors[name], places[name] = self._tensor(name)
        return metadata, tensors, places

    def _take(self, form: str) -> Any:
        values = struct.unpack_from("<" + form, self._view, self.position)
        self.position += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def _text(self) -> str:
        begin = self.position + 8
        self.position = begin + self._length(self._take("Q"))
        return self._view[begin : self.position].decode("utf-8", errors="replace")

    def _length(self, length: int) -> int:
        if length > self._size - self.position:
            raise _not_gguf(self._path, "it is cut off inside its header")
        return length

    def _value(self, kind: int, *, is_kept: bool) -> Any:
        """Return a value; None for an array that is not to be kept."""
        if kind == _GGUF_TEXT:
            return self._text()
        if kind == _GGUF_ARRAY:
            element, count = self._take("IQ")
            self._length(count)
            if is_kept:
                return [self._value(element, is_kept=True) for _ in range(count)]
            if element in _GGUF_SCALARS:
                self.position += count * struct.calcsize("<" + _GGUF_SCALARS[element])
            else:
                for _ in range(count):
                    self._value(element, is_kept=False)
            return None
        if kind not in _GGUF_SCALARS:
            raise _not_gguf(self._path, f"its header has a value of the unknown type {kind}")
        return self._take(_GGUF_SCALARS[kind])

    def _tensor(self, name: str) -> tuple[StoredTensor, tuple[int, int]]:
        """Return a tensor's shape and dtype, and where its data are."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        num_axes = self._take("I")
        if num_axes > 8:
            raise _not_gguf(self._path, f"the tensor {name} has {num_axes} axes")
        shape = tuple(self._take("Q") for _ in range(num_axes))[::-1]
        number, offset = self._take("IQ")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise UnsupportedModel(
                f"{self._path}: the tensor {name} has type {number}, which the installed gguf package does "
                "not know.\nhint: pip install --upgrade gguf"
            ) from error
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(shape) * block_bytes // block_elements
        return StoredTensor(shape, _GGUF_FLOATS.get(kind.name, kind.name)), (offset, num_bytes)


def read_json_file(path: Path) -> dict[str, Any]:
    """Return the object in a model's JSON file.

    Raises:
        CorruptModel: It cannot be read, or holds no object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptModel(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptModel(
            f"{path} is not JSON: {error}.\nhint: copy or download the model again"
        ) from error
    if not isinstance(content, dict):
        raise CorruptModel(f"{path} holds no JSON object.\nhint: copy or download the model again")
    return content


def find_weight_files(directory: Path, *, stem: str = "model") -> list[Path]:
    """Return the safetensors files of a model; none if it has none.

    Raises:
        ModelNotFound: The index names a file that is not there.
        CorruptModel: The index cannot be read.
    """
    single = directory / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    index = directory / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return []
    weight_map = read_json_file(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptModel(f"{index} has no weight_map.\nhint: copy or download the model again")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelNotFound(
            f"{directory} lacks {len(missing)} of the {len(names)} weight files that its index names, the "
            f"first of them {missing[0]}.\nhint: copy or download the model again"
        )
    return [directory / name for name in names]


def weight_files_are_there(directory: Path) -> bool:
    """Whether a directory has weights in any known format."""
    try:
        return bool(find_weight_files(directory)) or any(directory.glob("pytorch_model*.bin"))
    except ModelNotFound:
        return False
