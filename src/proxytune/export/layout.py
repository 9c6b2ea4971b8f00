"""A Llama's weights in the Hugging Face layout and in GGUF: names, shapes, order of rows, what is refused.

transformers rotates the first half of a head's rows against the second, llama.cpp each row against its
neighbour. So the rows of queries and keys are interleaved in GGUF, in adapters too.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.errors import CorruptModel, UnsafeModel, UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

CONVERTER = "convert_hf_to_gguf.py, which comes with llama.cpp, knows more kinds of model"
"""The hint for a model that cannot be written here."""


def check_model(model: Checkpoint, *, weights_are_read: bool = True) -> None:
    """Check that llama.cpp computes the same as transformers for this model.

    Args:
        model: In the Hugging Face layout.
        weights_are_read: Whether its weights are needed; for an adapter, its config is enough.

    Raises:
        UnsupportedModel: It is not a Llama, or a Llama that llama.cpp computes differently, or its weights
            are not in their original precision.
        UnsafeModel: It has only pickled weights.
    """
    config = model.config
    if model.architecture != "LlamaForCausalLM" or config.model_type != "llama":
        raise UnsupportedModel(
            f"{model.name} is a {model.architecture}, and only LlamaForCausalLM can be written as GGUF "
            f"here.\nhint: {CONVERTER}"
        )
    if weights_are_read and model.kind == "gguf":
        raise UnsupportedModel(
            f"{model.name} is a GGUF file already.\n"
            "hint: use it as it is; llama-quantize, which comes with llama.cpp, changes its dtype"
        )
    biased = [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]
    if biased:
        raise UnsupportedModel(
            f"{model.name} has biases ({', '.join(biased)}), which readers of GGUF files do not expect in a "
            f"Llama.\nhint: {CONVERTER}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(
            f"{model.name} has the activation {config.hidden_act!r}, and llama.cpp's Llama has silu.\n"
            f"hint: {CONVERTER}"
        )
    if weights_are_read and not model.tensors:
        raise UnsafeModel(
            f"{model.name} has only pickled weights, which are not exported.\n"
            "hint: save it as safetensors with save_pretrained"
        )
    if weights_are_read and getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"{model.name} is stored quantised, and export needs its original weights.\n"
            "hint: name the model it was made from, and choose a quantised dtype here"
        )


def head_size(config: Any) -> int:
    """Return the number of dimensions of one attention head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def weight_shapes(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that the config asks for, by name in the Hugging Face layout."""
    config = model.config
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, head_size(config)
    queries = config.num_attention_heads * head_dim
    keys = config.num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (model.width, hidden)}
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm": (hidden,),
            f"{block}.self_attn.q_proj": (queries, hidden),
            f"{block}.self_attn.k_proj": (keys, hidden),
            f"{block}.self_attn.v_proj": (keys, hidden),
            f"{block}.self_attn.o_proj": (hidden, queries),
            f"{block}.post_attention_layernorm": (hidden,),
            f"{block}.mlp.gate_proj": (inner, hidden),
            f"{block}.mlp.up_proj": (inner, hidden),
            f"{block}.mlp.down_proj": (hidden, inner),
        }
    shapes["model.norm"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (model.width, hidden)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def weight_places(model: Checkpoint) -> dict[str, Path]:
    """Return the file that holds each weight, checked against the config.

    Raises:
        CorruptModel: A weight is missing or has another shape.
        UnsupportedModel: A weight is quantised, or one that a Llama does not have.
    """
    shapes = weight_shapes(model)
    for name, shape in shapes.items():
        stored = model.tensors.get(name)
        if stored is None or stored.shape != shape:
            actual = "is missing" if stored is None else f"has the shape {list(stored.shape)}"
            raise CorruptModel(
                f"{model.name}: by its config, {name} has the shape {list(shape)}, but it {actual}.\n"
                "hint: save the model again with save_pretrained"
            )
        if not stored.dtype.startswith(("float", "bfloat")) or stored.dtype.startswith("float8"):
            raise UnsupportedModel(
                f"{model.name}: {name} is stored in {stored.dtype}, and only weights in float16, bfloat16, "
                "float32 or float64 can be exported.\nhint: name the model it was made from"
            )
    # Old checkpoints also store the frequencies of RoPE, and a tied head beside the embedding.
    known = {*shapes, "lm_head.weight"}
    extra = [n for n in model.tensors if n not in known and not n.endswith(".inv_freq")]
    if extra:
        raise UnsupportedModel(
            f"{model.name} has weights that a Llama does not have, {extra[0]} and {len(extra) - 1} more, and "
            f"without them it would be another model.\nhint: {CONVERTER}"
        )
    return model.weight_files()


def gguf_name(hf_name: str, model: Checkpoint) -> str:
    """Return the GGUF name of a weight, given its name in the Hugging Face layout."""
    names = _tensor_names(model.config.num_hidden_layers)
    name: str | None = names.get_name(hf_name, try_suffixes=(".weight",))
    assert name is not None, hf_name
    return name


@lru_cache(maxsize=1)
def _tensor_names(num_layers: int) -> Any:
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH.LLAMA, num_layers)


def rotated_rows(values: Tensor, hf_name: str, config: Any) -> Tensor:
    """Return the rows of a query or key projection in llama.cpp's order, and other weights unchanged.

    `values` are `[rows, columns]`, a weight or an adapter's `b`, or a vector, which is never a projection.
    """
    if ".self_attn.q_proj" in hf_name:
        num_heads = config.num_attention_heads
    elif ".self_attn.k_proj" in hf_name:
        num_heads = config.num_key_value_heads
    else:
        return values
    halves = values.reshape(num_heads, 2, head_size(config) // 2, values.shape[1])
    return halves.transpose(1, 2).reshape(values.shape)
