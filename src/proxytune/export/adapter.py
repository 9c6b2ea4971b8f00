"""A LoRA adapter as a GGUF file that llama.cpp applies to its model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proxytune.checkpoints.adapter import AdapterFiles
from proxytune.checkpoints.changes import Change
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.merge import read_adapter
from proxytune.errors import UnsafeModel, UnsupportedModel
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


def lora_factors(adapter: AdapterFiles, model: Checkpoint) -> dict[str, Factors]:
    """Read what an adapter adds to each layer, by module name in the Hugging Face layout.

    Raises:
        UnsupportedModel: It changes more than linear layers, or a head that is the embedding too.
        UnsafeModel: It has only pickled weights.
        AdapterMismatch: It belongs to another model.
        CorruptModel: A factor is missing, or the factors of a layer do not match.
    """
    check_readable(adapter)
    adapter.check_fits(model)
    layout = model.layout
    for module, change in adapter.changes(model).items():
        rest = change.without_copy
        if rest == Change() or (rest.is_plain and module != layout.embedding):
            continue
        raise UnsupportedModel(
            f"the adapter {adapter.name} is more than LoRA's two factors per linear layer: it changes "
            f"{module} by {_kind(rest)}.\n"
            "hint: export its model with the adapter merged into it: "
            "`proxytune export-gguf MODEL OUTPUT --adapter ADAPTER --merge`"
        )
    if layout.head in adapter.changes(model) and layout.is_tied:
        raise UnsupportedModel(
            f"the adapter {adapter.name} changes the output head of {model.name}, which is its embedding, "
            "too, and a GGUF file holds only one of them.\nhint: tune an adapter without lm_head"
        )
    found: dict[str, Factors] = {}
    for module, own in read_adapter(adapter, model).items():
        if own.is_weight_copied:
            _check_copy(module, own.parameters["weight"], adapter, model)
        if own.product is not None:
            # Of a head with added tokens, the model's rows.
            up = own.product.up[: layout.parameters[module]["weight"][0]]
            found[module] = Factors(own.product.down, up, own.product.scale)
    return found


def _check_copy(module: str, copied: Tensor, adapter: AdapterFiles, model: Checkpoint) -> None:
    """Refuse an adapter that was trained on other embeddings than its model's."""
    import torch
    from safetensors import safe_open

    if module == model.layout.head and model.layout.is_tied:
        return  # it is the embedding's
    name = f"{module}.weight"
    with safe_open(model.weight_files()[name], framework="pt") as weights:
        own: Tensor = weights.get_tensor(name)
    num_rows = min(len(own), len(copied))
    if not torch.equal(own[:num_rows].to(copied.dtype), copied[:num_rows]):
        raise UnsupportedModel(
            f"the adapter {adapter.name} brings a {name} of its own, which differs from that of "
            f"{model.name}, and a GGUF adapter cannot hold it.\n"
            "hint: export its model with the adapter merged into it: "
            "`proxytune export-gguf MODEL OUTPUT --adapter ADAPTER --merge`"
        )


def check_readable(adapter: AdapterFiles) -> None:
    """Refuse pickled weights.

    Raises:
        UnsafeModel: There are only pickled weights.
    """
    if not adapter.tensors:
        raise UnsafeModel(
            f"the adapter {adapter.name} has only pickled weights, which are not exported.\n"
            "hint: save it as safetensors with PEFT's save_pretrained"
        )


def _kind(change: Change) -> str:
    """Return what a change is besides two factors, in the words of PEFT's config."""
    if change.stacked:
        return "target_parameters"
    if change.magnitude is not None:
        return "use_dora"
    if change.product_bias is not None:
        return "lora_bias"
    if change.token_rows is not None:
        return "trainable_token_indices"
    if change.parameters:
        return "bias" if set(change.parameters) == {"bias"} else "modules_to_save"
    return "factors of an embedding"
