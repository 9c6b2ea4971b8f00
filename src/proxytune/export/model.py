"""A Llama-shaped model with its tokenizer as one GGUF file, optionally with an adapter merged into it.

What the format leaves open: at 4 bits, embedding and output head are stored in Q8_0, because every logit
passes through them and they are most of a small model. `write.py` has the rule for other tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.checkpoints.adapter import AdapterFiles
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.context import max_context
from proxytune.checkpoints.merge import Merger
from proxytune.errors import CorruptModel, UnsupportedModel
from proxytune.export.adapter import check_readable
from proxytune.export.layout import (
    CONVERTER,
    check_model,
    gguf_name,
    head_size,
    rotated_rows,
    weight_places,
    weight_shapes,
)
from proxytune.export.tokenizer import tokenizer_fields
from proxytune.export.write import (
    DTYPES,
    ExportedFile,
    PlannedFile,
    PlannedTensor,
    check_dtype,
    check_output,
    last_part,
    write_file,
)

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from torch import Tensor


def export_model(
    model: Checkpoint,
    output: Path,
    *,
    dtype: str = "F16",
    adapter: AdapterFiles | None = None,
    pre: str | None = None,
    overwrite: bool = False,
) -> ExportedFile:
    """Write a Llama-shaped model with its tokenizer as one GGUF file.

    llama.cpp reads the weights and how RoPE is scaled. transformers' own GGUF reader gives the same weights
    back, but ignores how RoPE is scaled.

    Args:
        model: In the Hugging Face layout.
        output: Path of the file, ending in `.gguf`; its directory is made if needed.
        dtype: One of `DTYPES`.
        adapter: An adapter to merge into the weights; None for none.
        pre: llama.cpp's name for the rule that cuts text into words (`tokenizer.ggml.pre`), used as given;
            None to find it.
        overwrite: Whether to replace another file at `output`.

    Raises:
        UnsupportedModel: llama.cpp would compute or tokenise something else, or GGUF cannot express it.
        AdapterMismatch: The adapter belongs to another model.
        CorruptModel: Weights are missing, misshapen or not finite.
        InvalidRequest: The dtype is unknown, or the output is not called `.gguf`.
        OutputFileError: The output cannot be written, or another file is there.
    """
    check_output(output, overwrite=overwrite)
    plan = plan_model(model, dtype=dtype, adapter=adapter, pre=pre)
    return write_file(plan, output, overwrite=overwrite)


def plan_model(
    model: Checkpoint, *, dtype: str, adapter: AdapterFiles | None = None, pre: str | None = None
) -> PlannedFile:
    """Plan the GGUF file of a model; see `export_model` for arguments and errors."""
    from gguf import GGMLQuantizationType

    check_dtype(dtype, DTYPES, "a model")
    check_model(model)
    merger = None if adapter is None else _merger(adapter, model)
    rotary_factors = _rotary_factors(model)
    tokenizer = tokenizer_fields(model, pre)
    wanted = GGMLQuantizationType[dtype]
    is_small = dtype.startswith("Q4")
    tensors: list[PlannedTensor] = []
    if rotary_factors is not None:
        kind = GGMLQuantizationType.F32
        tensors.append(PlannedTensor.of("rope_freqs.weight", rotary_factors, kind))
    num_unquantized = 0
    places = weight_places(model)
    for hf_name, shape in weight_shapes(model).items():
        name = gguf_name(hf_name, model)
        kind = wanted
        if is_small and name in ("token_embd.weight", "output.weight"):
            kind = GGMLQuantizationType.Q8_0
        kind, is_fallback = _fitting_kind(kind, shape)
        num_unquantized += is_fallback
        read = _reader(places[hf_name], hf_name, model, merger)
        tensors.append(PlannedTensor(name, shape, kind, read))

    def add_fields(writer: GGUFWriter) -> None:
        _add_model_fields(writer, model, dtype)
        tokenizer.add_to(writer)

    return PlannedFile(tensors, add_fields, model.name, num_unquantized)


def _fitting_kind(
    kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> tuple[GGMLQuantizationType, bool]:
    """Return what a tensor is stored in, and whether its rows do not divide into the wanted kind's blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32, False
    if shape[-1] % GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F16, True
    return kind, False


def _merger(adapter: AdapterFiles, model: Checkpoint) -> Merger:
    """Return what merges an adapter into a model's weights."""
    check_readable(adapter)
    merger = Merger(adapter, model, "a GGUF file")
    beyond = sorted(merger.names - set(weight_shapes(model)))
    if beyond:
        raise UnsupportedModel(
            f"the adapter {adapter.name} changes {beyond[0]}, which a Llama does not have, so it cannot be "
            "merged.\nhint: tune an adapter without biases"
        )
    return merger


def _reader(
    file: Path, hf_name: str, model: Checkpoint, merger: Merger | None
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as weights:
                values: Tensor = weights.get_tensor(hf_name).to(torch.float32)
        except (SafetensorError, OSError) as error:
            raise CorruptModel(f"{file} cannot be read: {error}") from error
        if merger is not None:
            values = merger.merged(hf_name, values)
        return rotated_rows(values, hf_name, model.config)

    return read


def _rotary_factors(model: Checkpoint) -> Tensor | None:
    """Return what llama.cpp divides each of RoPE's frequencies by; None if all are scaled alike."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = model.config
    rope = _rope_parameters(config)
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "linear", "llama3"):
        raise UnsupportedModel(
            f"{model.name} scales RoPE by the rule {rope_type!r}, and only default, linear and llama3 can be "
            f"written.\nhint: {CONVERTER}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(
            f"{model.name} rotates only a part of each head (partial_rotary_factor "
            f"{rope['partial_rotary_factor']}), which llama.cpp's Llama does not.\nhint: {CONVERTER}"
        )
    if rope_type != "llama3":
        return None
    head_dim = head_size(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = (1.0 / rope["rope_theta"] ** exponents).to(torch.float32)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors: Tensor = plain / scaled
    return factors


def _rope_parameters(config: Any) -> Mapping[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters if isinstance(parameters, Mapping) else {}


def _add_model_fields(writer: GGUFWriter, model: Checkpoint, dtype: str) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType, RopeScalingType

    config = model.config
    head_dim = head_size(config)
    rope = _rope_parameters(config)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(last_part(model.name))
    writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"])
    if dtype.startswith("Q"):
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(max_context(config) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_vocab_size(model.width)
