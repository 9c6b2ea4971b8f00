"""Headers of safetensors and GGUF files: which tensors there are, without their values."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.checkpoints.untrusted import (
    LIST_BYTES,
    check_link,
    named_inside,
    open_regular,
    parse_json,
    read_json_file,
)
from proxytune.errors import CorruptModel, ModelNotFound, UnsupportedModel, pip_install

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
_MERGES = "tokenizer.ggml.merges"
_UNUSED = 5
GGUF_ADDED = frozenset({2, 3, 4, _UNUSED})
"""llama.cpp's types of tokens that are not ordinary: unknown, control, user-defined and unused."""
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


_MAX_LENGTH = 1 << 62
"""Maximum length of an axis, and number of bits of a tensor."""


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, checked against the file's size.

    Raises:
        CorruptModel: The header is malformed, or its tensors are not exactly what the file holds.
    """

    def corrupt(why: str) -> CorruptModel:
        return CorruptModel(
            f"{path} cannot be read as safetensors: {why}.\nhint: copy or download it again"
        )

    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
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
            if length > LIST_BYTES:
                raise corrupt(f"its header takes {length:,} bytes, and may take {LIST_BYTES:,}")
            content = file.read(length)
        except OSError as error:
            raise corrupt(str(error)) from error
    try:
        header = parse_json(content, is_strict=True)
    except ValueError as error:
        raise corrupt(f"its header is not JSON as it must be: {error}") from error
    if not isinstance(header, dict) or not content.startswith(b"{"):
        raise corrupt("its header does not list tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise corrupt("its __metadata__ is not texts by name")
    tensors: dict[str, StoredTensor] = {}
    places: list[tuple[int, int]] = []
    for name, entry in header.items():
        try:
            tensors[name], place = _listed_tensor(entry)
        except (KeyError, TypeError, ValueError) as error:
            why = f": {error}" if isinstance(error, ValueError) else ""
            raise corrupt(
                f"its header does not list tensors, as {name[:80]!r} shows{why}"
            ) from error
        places.append(place)
    end = 0
    for begin, stop in sorted(places):
        if begin != end:
            raise corrupt(f"a tensor begins at byte {begin}, and the one before it ends at {end}")
        end = stop
    if end != size - 8 - length:
        state = "cut off" if end > size - 8 - length else "longer than its tensors"
        raise corrupt(
            f"it is {state}: its tensors take {end} bytes, and {size - 8 - length} are there"
        )
    return tensors


def _listed_tensor(entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    """Return a tensor from its entry in a header, and where its bytes begin and end.

    Raises:
        ValueError: It is impossible; so is what raises KeyError or TypeError.
    """
    shape, (begin, stop) = entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, stop]
    if not isinstance(shape, list) or len(shape) > 64:
        raise ValueError("its shape is not that of a tensor")
    if not all(type(number) is int and 0 <= number < _MAX_LENGTH for number in numbers):
        raise ValueError("its shape and its place must be whole numbers of bytes")
    bits, dtype = SAFETENSORS_DTYPES.get(entry["dtype"], (None, entry["dtype"]))
    if not isinstance(dtype, str):
        raise TypeError("a dtype is text")
    num_bits = math.prod(shape) * (bits or 1)
    if stop < begin or num_bits >= _MAX_LENGTH:
        raise ValueError(f"its place or its shape {shape} is impossible")
    if bits is not None and (stop - begin) * 8 != num_bits:
        raise ValueError(f"it has {stop - begin} bytes, which is not {shape} {dtype}")
    return StoredTensor(tuple(shape), dtype.lower()), (begin, stop)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a GGUF file.

    Args:
        metadata: Numbers and strings by key, without arrays except the two below.
        tensors: Tensors by GGUF's names, with shapes in torch's order.
        digest: SHA-256 of the header's bytes, which decide config and tokenizer.
        tokens: The vocabulary, by token id; empty in an adapter.
        token_kinds: llama.cpp's type of each token: 1 is ordinary, 6 a byte; the others are in `GGUF_ADDED`.
        places: Where each tensor's data are in the file: first byte and number of bytes.
        values_end: The byte after the metadata, which begin at byte 24.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    digest: str
    tokens: Sequence[str] = field(default=(), repr=False)
    token_kinds: Sequence[int] = field(default=(), repr=False)
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    values_end: int = 24

    @property
    def num_parts(self) -> int:
        """Number of files that the model is split into."""
        return int(self.metadata.get("split.count") or 1)

    def token_to_id(self) -> dict[str, int]:
        """Return the vocabulary without tokens that only pad it to the width of the output head."""
        kinds = self.token_kinds or [1] * len(self.tokens)
        return {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, kinds, strict=True))
            if not (kind == _UNUSED and _GGUF_PADDING.fullmatch(token))
        }


_MAX_KEYS, _MAX_TENSORS = 1 << 16, 1 << 18
_MAX_ITEMS = 1 << 21
"""Maximum number of items of all arrays in a GGUF header; the largest vocabularies need 1.3 million."""

_MAX_SPLITS = 3_000_000
"""Maximum number of letters of the tokens of a file without merges; large vocabularies have 2 million."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file, checked against the file's size.

    Raises:
        CorruptModel: It is not a GGUF file, is cut off, or its header says what cannot be.
        UnsupportedModel: Its version, byte order or a tensor type is unknown.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise _not_gguf(path, f"it has {size} bytes")
        try:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _not_gguf(path, str(error)) from error
    with view:
        reader = _GgufReader(path, view, size)
        try:
            metadata, tensors, places = reader.header()
        except struct.error as error:
            raise _not_gguf(path, "it is cut off inside its header") from error
        header_bytes = reader.position
        digest = hashlib.sha256(view[:header_bytes]).hexdigest()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise _not_gguf(path, f"its alignment is {alignment!r}")
    end = data = -(-header_bytes // alignment) * alignment
    for offset, num_bytes, name in sorted((*place, name) for name, place in places.items()):
        if data + offset < end:
            raise _not_gguf(path, f"{name} begins inside the tensor before it")
        end = data + offset + num_bytes
        if end > size:
            why = f"it is cut off: {name} should end at byte {end}, and the file has {size}"
            raise _not_gguf(path, why)
    for key in ("split.count", "split.no", "split.tensors.count"):
        if type(metadata.get(key, 0)) is not int:
            raise _not_gguf(path, f"its {key} is {metadata[key]!r}")
    tokens, kinds = metadata.pop(_TOKENS, []), metadata.pop(_TOKEN_KINDS, [])
    for key, values, kind in ((_TOKENS, tokens, str), (_TOKEN_KINDS, kinds, int)):
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise _not_gguf(path, f"its {key} is no list of {kind.__name__} values")
    if kinds and len(kinds) != len(tokens):
        raise _not_gguf(path, f"it has {len(tokens)} tokens and the kinds of {len(kinds)}")
    places = {name: (data + offset, num_bytes) for name, (offset, num_bytes) in places.items()}
    return GgufHeader(metadata, tensors, digest, tokens, kinds, places, reader.values_end)


def _not_gguf(path: Path, why: str) -> CorruptModel:
    return CorruptModel(f"{path} cannot be read as GGUF: {why}.\nhint: copy or download it again")


class _GgufReader:
    """Reads a GGUF file's header; every length and count is checked before anything is made of it."""

    def __init__(self, path: Path, view: mmap.mmap, size: int) -> None:
        self._path, self._view, self._size = path, view, min(size, LIST_BYTES)
        self.position = self.values_end = 0
        self._num_items = 0

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
        if num_tensors > _MAX_TENSORS or num_values > _MAX_KEYS:
            why = f"it claims {num_tensors:,} tensors and {num_values:,} values in its header"
            raise _not_gguf(self._path, why)
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._new_name(metadata)
            metadata[key] = self._value(is_kept=key in (_TOKENS, _TOKEN_KINDS))
        if _MERGES not in metadata:
            self._check_splits(metadata.get(_TOKENS))
        self.values_end = self.position
        tensors: dict[str, StoredTensor] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(num_tensors):
            name = self._new_name(tensors)
            tensors[name], places[name] = self._tensor(name)
        return {k: v for k, v in metadata.items() if v is not None}, tensors, places

    def _check_splits(self, tokens: Any) -> None:
        """Check that merges can be derived: transformers tries every way to split every token."""
        listed = tokens if isinstance(tokens, list) else []
        lengths = [len(token) for token in listed if isinstance(token, str)]
        if sum(lengths) > _MAX_SPLITS or sum(n * n for n in lengths) > 100 * _MAX_SPLITS:
            why = (
                f"its {len(lengths):,} tokens have {sum(lengths):,} letters and come without merges"
            )
            raise _not_gguf(self._path, why)

    def _take(self, form: str) -> Any:
        values = struct.unpack_from("<" + form, self._view, self.position)
        self.position += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def _text(self) -> str:
        begin = self.position + 8
        self.position = begin + self._length(self._take("Q"))
        return self._view[begin : self.position].decode("utf-8", errors="replace")

    def _new_name(self, known: Mapping[str, Any]) -> str:
        name = self._text()
        if name in known:
            raise _not_gguf(self._path, f"its header has {name[:80]!r} twice")
        return name

    def _length(self, length: int) -> int:
        if length > self._size - self.position:
            why = "it is cut off inside its header"
            if self._size == LIST_BYTES:
                why = f"its header takes more than {LIST_BYTES:,} bytes"
            raise _not_gguf(self._path, why)
        return length

    def _value(self, *, is_kept: bool) -> Any:
        """Return a value; None for an array that is not to be kept."""
        kind = self._take("I")
        if kind == _GGUF_TEXT:
            return self._text()
        if kind == _GGUF_ARRAY:
            return self._array(is_kept=is_kept)
        return self._take(self._scalar(kind))

    def _scalar(self, kind: int) -> str:
        if kind not in _GGUF_SCALARS:
            # Arrays of arrays are in the format's description, and llama.cpp does not read them either.
            why = f"its header has a value of the unknown type {kind}"
            raise _not_gguf(self._path, why)
        return _GGUF_SCALARS[kind]

    def _array(self, *, is_kept: bool) -> list[Any] | None:
        element, count = self._take("IQ")
        self._num_items += count
        if self._num_items > _MAX_ITEMS:
            why = f"the arrays in its header claim {self._num_items:,} items"
            raise _not_gguf(self._path, why)
        if element != _GGUF_TEXT:
            form = f"<{count}{self._scalar(element)}"
            size = self._length(struct.calcsize(form))
            found = struct.unpack_from(form, self._view, self.position) if is_kept else None
            self.position += size
            return None if found is None else list(found)
        if is_kept:
            return [self._text() for _ in range(count)]
        for _ in range(count):
            length = self._take("Q")
            self.position += self._length(length)
        return None

    def _tensor(self, name: str) -> tuple[StoredTensor, tuple[int, int]]:
        """Return a tensor's shape and dtype, and where its data are."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        num_axes = self._take("I")
        if num_axes > 8:
            raise _not_gguf(self._path, f"the tensor {name[:80]} has {num_axes} axes")
        shape = tuple(self._take("Q") for _ in range(num_axes))[::-1]
        number, offset = self._take("IQ")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise UnsupportedModel(
                f"{self._path}: the tensor {name[:80]} has type {number}, which the installed gguf package "
                f"does not know.\nhint: {pip_install('--upgrade gguf')}"
            ) from error
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        num_elements = math.prod(shape)
        is_huge = max((num_elements, *shape)) >= _MAX_LENGTH
        if is_huge or (shape[-1] if shape else 1) % block_elements:
            why = f"the tensor {name[:80]} of type {kind.name} has the shape {list(shape)}"
            raise _not_gguf(self._path, why)
        place = offset, num_elements // block_elements * block_bytes
        return StoredTensor(shape, _GGUF_FLOATS.get(kind.name, kind.name)), place


_MAX_FILES = 10_000


def find_weight_files(directory: Path, *, stem: str = "model") -> list[Path]:
    """Return the safetensors files of a model; none if it has none.

    Raises:
        ModelNotFound: The index names a file that is not there.
        CorruptModel: The index cannot be read, or names a file outside the directory.
    """
    single = directory / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    index = directory / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return []
    weight_map = read_json_file(index, at_most=LIST_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptModel(f"{index} has no weight_map.\nhint: copy or download the model again")
    names = sorted(set(weight_map.values()))
    if len(names) > _MAX_FILES:
        raise CorruptModel(
            f"{index} names {len(names):,} files, and a model may have {_MAX_FILES:,}.\n"
            "hint: copy or download the model again"
        )
    files = [named_inside(directory, name, source=str(index)) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing:
        raise ModelNotFound(
            f"{directory} lacks {len(missing)} of the {len(names)} weight files that its index names, the "
            f"first of them {missing[0]}.\nhint: copy or download the model again"
        )
    for file in files:
        if file.parent != directory:  # `check_links` has seen the others
            check_link(file, directory)
    return files


def weight_files_are_there(directory: Path) -> bool:
    """Whether a directory has weights in any known format."""
    try:
        return bool(find_weight_files(directory)) or any(directory.glob("pytorch_model*.bin"))
    except ModelNotFound:
        return False
