"""A LoRA adapter as a GGUF file that llama.cpp applies to its model."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proxytune.checkpoints.adapter import AdapterFiles, beyond_factors
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.errors import CorruptModel, UnsafeModel, UnsupportedModel
from proxytune.export.layout import check_model, gguf_name, rotated_rows
from proxytune.export.write import (
    ExportedFile,
    PlannedFile,
    PlannedTensor,
    check_dtype,
    check_output,
    last_part,
    write_file,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

ADAPTER_DTYPES = ("F32", "F16")
"""Dtypes that an adapter's weights can be stored in, by GGUF's names."""


def export_adapter(
    adapter: AdapterFiles,
    model: Checkpoint,
    output: Path,
    *,
    dtype: str = "F16",
    overwrite: bool = False,
) -> ExportedFile:
    """Write a LoRA adapter as a GGUF file that llama.cpp applies to its model.

    llama.cpp adds `alpha / rank * b @ a` to a weight, with one alpha per file. If the adapter has several
    alphas, the ratio is multiplied into `b`.

    Args:
        adapter: As PEFT saves it.
        model: The small model that the adapter belongs to; its weights are not read.
        output: Path of the file, ending in `.gguf`; its directory is made if needed.
        dtype: One of `ADAPTER_DTYPES`.
        overwrite: Whether to replace another file at `output`.

    Raises:
        UnsupportedModel: It changes more than linear layers, or the model cannot be written as GGUF.
        AdapterMismatch: It belongs to another model.
        CorruptModel: Weights are missing or not finite.
        InvalidRequest: The dtype is unknown, or the output is not called `.gguf`.
        OutputFileError: The output cannot be written, or another file is there.
    """
    check_output(output, overwrite=overwrite)
    plan = plan_adapter(adapter, model, dtype=dtype)
    return write_file(plan, output, overwrite=overwrite)


@dataclass(frozen=True, slots=True)
class Factors:
    """One layer's adapter, which adds `scale * b @ a` to its weight."""

    a: Tensor  # [rank, inputs], float32
    b: Tensor  # [outputs, rank], float32
    scale: float

    @property
    def alpha(self) -> float:
        """The number that llama.cpp divides by the rank to get the scale."""
        return self.scale * self.a.shape[0]


def plan_adapter(adapter: AdapterFiles, model: Checkpoint, *, dtype: str) -> PlannedFile:
    """Plan the GGUF file of an adapter; see `export_adapter` for arguments and errors."""
    from gguf import GGMLQuantizationType, GGUFType

    check_dtype(dtype, ADAPTER_DTYPES, "an adapter")
    check_model(model, weights_are_read=False)
    factors = lora_factors(adapter, model)
    # llama.cpp reads an alpha of 0 as "not given", and uses a scale of 1.
    alphas = Counter(layer.alpha for layer in factors.values() if layer.alpha)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    kind = GGMLQuantizationType[dtype]
    tensors: list[PlannedTensor] = []
    for module, layer in factors.items():
        name = gguf_name(f"{module}.weight", model)
        b = rotated_rows(layer.b, module, model.config) * (layer.alpha / alpha)
        for suffix, values in (("lora_a", layer.a), ("lora_b", b)):
            planned = PlannedTensor.of(f"{name}.{suffix}", values, kind)
            tensors.append(planned)

    def add_fields(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(last_part(adapter.name))
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)

    return PlannedFile(tensors, add_fields, adapter.name)


# Keys of adapter_config.json that make an adapter more than two factors for each of some layers.
_BEYOND_LORA = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
    "use_dora", "use_qalora",
)  # fmt: skip


def lora_factors(adapter: AdapterFiles, model: Checkpoint) -> dict[str, Factors]:
    """Read what an adapter adds to each layer, by module name in the Hugging Face layout.

    Raises:
        UnsupportedModel: It changes more than linear layers, or a head that is the embedding too.
        UnsafeModel: It has only pickled weights.
        AdapterMismatch: It belongs to another model.
        CorruptModel: A factor is missing, or the factors of a layer do not match.
    """
    import torch
    from peft.utils.other import get_pattern_key
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = adapter.config
    beyond = beyond_factors(config, _BEYOND_LORA)
    layers: dict[str, dict[str, str]] = {}
    for name in adapter.tensors:
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight", name
        )
        if match is None:
            beyond.append(name)
        else:
            layers.setdefault(match["module"], {})[match["side"]] = name
    if beyond:
        raise UnsupportedModel(
            f"the adapter {adapter.name} is more than LoRA's two factors per linear layer: "
            f"{', '.join(beyond[:3])}.\n"
            "hint: merge it into its model with PEFT's merge_and_unload, and export that model"
        )
    if not adapter.tensors:
        raise UnsafeModel(
            f"the adapter {adapter.name} has only pickled weights, which are not exported.\n"
            "hint: save it as safetensors with PEFT's save_pretrained"
        )
    adapter.check_fits(model)
    if "lm_head" in layers and model.config.tie_word_embeddings:
        raise UnsupportedModel(
            f"the adapter {adapter.name} changes the output head of {model.name}, which is its embedding, "
            "too, and a GGUF file holds only one of them.\nhint: tune an adapter without lm_head"
        )
    path = adapter.path / "adapter_model.safetensors"
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptModel(f"{path} cannot be read: {error}") from error
    alpha_pattern = config.get("alpha_pattern") or {}
    patterns = list(alpha_pattern)
    factors: dict[str, Factors] = {}
    for module, names in layers.items():
        if len(names) != 2:
            raise CorruptModel(f"{path} has only one of the two factors of {module}")
        a, b = (weights[names[side]].to(torch.float32) for side in "AB")
        if a.shape[0] != b.shape[1]:
            raise CorruptModel(
                f"{path}: the factors of {module} have the ranks {a.shape[0]} and {b.shape[1]}"
            )
        alpha = alpha_pattern.get(get_pattern_key(patterns, module), config.get("lora_alpha", 8))
        rank = a.shape[0]
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factors[module] = Factors(a, b, scale)
    return factors
