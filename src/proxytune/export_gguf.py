"""Models, adapters and recipes as GGUF files, which llama.cpp runs: how they are laid out, what is refused.

A Llama-shaped model in the Hugging Face layout becomes one file of the architecture `llama`; a LoRA
adapter becomes a file that llama.cpp puts onto it; a recipe becomes a directory with both and a recipe that
names them.

The two layouts differ in three points:

- transformers rotates the first half of a head's rows against the second, llama.cpp each row against its
  neighbour; so the rows of queries and keys are interleaved, in adapters too.
- How text is cut into words before tokens are merged is a rule in `tokenizer.json`, and in GGUF the name of
  a rule built into llama.cpp. The name is found by comparing rules; a rule without a name is refused.
- Every row of the embedding has a token in GGUF; rows that no token has are called `[PAD7]`, by their id.

What the format leaves open: vectors stay in float32. Rows that do not divide into a quantised type's blocks
are stored in float16. At 4 bits, embedding and output head are stored in Q8_0, because every logit passes
through them and they are what a small model is mostly made of.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.checkpoint import AdapterFiles, Checkpoint, find_adapter, find_checkpoint
from proxytune.errors import (
    CorruptModel,
    InvalidRequest,
    OutputFileError,
    RecipeError,
    UnsafeModel,
    UnsupportedModel,
)
from proxytune.recipe import ExpertSpec, LlamaCppSettings, ModelSpec, Recipe, is_gguf

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from torch import Tensor

DTYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
"""What a model's weights can be stored in, by GGUF's names."""

ADAPTER_DTYPES = ("F32", "F16")
"""What an adapter's weights can be stored in."""

ARCHITECTURE = "llama"

_CONVERTER = "convert_hf_to_gguf.py, which comes with llama.cpp, knows more kinds of model"

# Where llama.cpp cuts text before it merges tokens, by its name for the rule. `words` is GPT-2's rule,
# `bytes` spells bytes and cuts nothing; other rules are regular expressions.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class _TextRule:
    """How a tokenizer prepares text; llama.cpp's names stand for these.

    Args:
        steps: What cuts text, in order.
        ignore_merges: Whether a word that is a token is taken whole, whatever the merges say.
    """

    steps: tuple[tuple[str, ...], ...]
    ignore_merges: bool = False


_PRE_TOKENIZERS = {
    _TextRule((("words",),)): "gpt-2",
    _TextRule((("digits",), ("words",))): "smollm",
    _TextRule((("split", _LLAMA_3), ("bytes",)), ignore_merges=True): "llama-bpe",
    _TextRule((("split", _LLAMA_3), ("bytes",))): "smaug-bpe",
    _TextRule((("split", _QWEN_2), ("bytes",))): "qwen2",
}


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
class _PlannedTensor:
    """One tensor of a file to write; `read` gives its values in float32 when their turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], Tensor]


@dataclass(slots=True)
class _PlannedFile:
    """A file that can be written: all that a user can get wrong has been checked."""

    tensors: list[_PlannedTensor]
    add_fields: Callable[[GGUFWriter], None]
    source: str
    num_unquantized: int = 0


# Models --------------------------------------------------------------------------------------------


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

    transformers' own GGUF reader gives the same weights back, and does not read how RoPE is scaled; llama.cpp
    reads both.

    Args:
        model: In the Hugging Face layout.
        output: The file, whose name ends in `.gguf`; its directory is made if it is not there.
        dtype: One of `DTYPES`.
        adapter: Merged into the weights.
        pre: llama.cpp's name for the rule that cuts text into words (`tokenizer.ggml.pre`), taken as given;
            None finds it.
        overwrite: Replace another file that is there.

    Raises:
        UnsupportedModel: llama.cpp would compute or tokenise something else, or the file cannot say it.
        AdapterMismatch: The adapter belongs to another model.
        CorruptModel: Weights are missing, misshapen or not finite.
        InvalidRequest: The dtype is unknown, or the output is not called `.gguf`.
        OutputFileError: The output cannot be written, or another file is there.
    """
    _check_output(output, overwrite=overwrite)
    plan = _plan_model(model, dtype=dtype, adapter=adapter, pre=pre)
    return _write_file(plan, output, overwrite=overwrite)


def _plan_model(
    model: Checkpoint, *, dtype: str, adapter: AdapterFiles | None = None, pre: str | None = None
) -> _PlannedFile:
    from gguf import GGMLQuantizationType

    _check_dtype(dtype, DTYPES, "a model")
    _check_model(model)
    factors = {} if adapter is None else _lora_factors(adapter, model)
    rotary_factors = _rotary_factors(model)
    tokenizer = _tokenizer_fields(model, pre)
    wanted = GGMLQuantizationType[dtype]
    is_small = dtype.startswith("Q4")
    tensors: list[_PlannedTensor] = []
    num_unquantized = 0
    places = _weight_places(model)
    for hf_name, shape in _weight_shapes(model).items():
        name = _gguf_name(hf_name, model)
        kind = wanted
        if is_small and name in ("token_embd.weight", "output.weight"):
            kind = GGMLQuantizationType.Q8_0
        kind, is_fallback = _fitting_kind(kind, shape)
        num_unquantized += is_fallback
        module = hf_name.removesuffix(".weight")
        read = _reader(places[hf_name], hf_name, model, factors.get(module))
        tensors.append(_PlannedTensor(name, shape, kind, read))
    if rotary_factors is not None:
        vector = rotary_factors
        tensors.insert(
            0,
            _PlannedTensor(
                "rope_freqs.weight",
                tuple(vector.shape),
                GGMLQuantizationType.F32,
                lambda: vector,
            ),
        )

    def add_fields(writer: GGUFWriter) -> None:
        _add_model_fields(writer, model, dtype)
        tokenizer.add_to(writer)

    return _PlannedFile(tensors, add_fields, model.name, num_unquantized)


def _check_dtype(dtype: str, known: Sequence[str], what: str) -> None:
    if dtype not in known:
        raise InvalidRequest(
            f"the dtype {dtype!r} cannot be written for {what}; known are {', '.join(known)}"
        )


def _check_model(model: Checkpoint, *, weights_are_read: bool = True) -> None:
    """Check that llama.cpp computes this model as transformers does."""
    config = model.config
    if model.architecture != "LlamaForCausalLM" or config.model_type != "llama":
        raise UnsupportedModel(
            f"{model.name} is a {model.architecture}, and only LlamaForCausalLM can be written as GGUF "
            f"here.\nhint: {_CONVERTER}"
        )
    if weights_are_read and model.kind == "gguf":
        raise UnsupportedModel(
            f"{model.name} is a GGUF file already.\n"
            "hint: use it as it is; llama-quantize, which comes with llama.cpp, changes its type"
        )
    biased = [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]
    if biased:
        raise UnsupportedModel(
            f"{model.name} has biases ({', '.join(biased)}), which readers of GGUF files do not expect in a "
            f"Llama.\nhint: {_CONVERTER}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(
            f"{model.name} has the activation {config.hidden_act!r}, and llama.cpp's Llama has silu.\n"
            f"hint: {_CONVERTER}"
        )
    if weights_are_read and not model.tensors:
        raise UnsafeModel(
            f"{model.name} has only pickled weights, which are not exported.\n"
            "hint: save it as safetensors with save_pretrained"
        )
    packed = getattr(config, "quantization_config", None)
    if weights_are_read and packed is not None:
        raise UnsupportedModel(
            f"{model.name} is stored quantised, and its weights as they were trained are needed.\n"
            "hint: name the model it was made from, and choose a quantised dtype here"
        )


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _weight_shapes(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the weights that the config asks for, by their names in the Hugging Face layout."""
    config = model.config
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, _head_dim(config)
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


def _weight_places(model: Checkpoint) -> dict[str, Path]:
    """Return the file that holds each weight, checked against the config.

    Raises:
        CorruptModel: A weight is missing or has another shape.
        UnsupportedModel: There are weights that a Llama does not have.
    """
    shapes = _weight_shapes(model)
    for name, shape in shapes.items():
        stored = model.tensors.get(name)
        if stored is None or stored.shape != shape:
            there = "missing" if stored is None else f"of the shape {list(stored.shape)}"
            raise CorruptModel(
                f"{model.name}: by its config {name} has the shape {list(shape)}, and it is {there}.\n"
                "hint: save the model again with save_pretrained"
            )
        if not stored.dtype.startswith(("float", "bfloat")) or stored.dtype.startswith("float8"):
            raise UnsupportedModel(
                f"{model.name}: {name} is stored in {stored.dtype}, and only weights in float16, bfloat16, "
                "float32 or float64 are exported.\nhint: name the model it was made from"
            )
    # Old checkpoints store the frequencies of RoPE, and a tied head beside the embedding.
    extra = [
        name
        for name in model.tensors
        if name not in shapes and not name.endswith(".inv_freq") and name != "lm_head.weight"
    ]
    if extra:
        raise UnsupportedModel(
            f"{model.name} has weights that a Llama does not have, {extra[0]} and {len(extra) - 1} more, and "
            f"without them it would be another model.\nhint: {_CONVERTER}"
        )
    return model.weight_files()


def _gguf_name(hf_name: str, model: Checkpoint) -> str:
    name: str | None = _tensor_names(model.config.num_hidden_layers).get_name(
        hf_name, try_suffixes=(".weight",)
    )
    assert name is not None, hf_name
    return name


@lru_cache(maxsize=1)
def _tensor_names(num_layers: int) -> Any:
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH.LLAMA, num_layers)


def _fitting_kind(
    kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> tuple[GGMLQuantizationType, bool]:
    """Return what a tensor is stored in, and whether its rows were too short for the wanted type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32, False
    if shape[-1] % GGML_QUANT_SIZES[kind][0]:
        return GGMLQuantizationType.F16, True
    return kind, False


def _reader(
    file: Path, hf_name: str, model: Checkpoint, factors: _Factors | None
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as weights:
                values: Tensor = weights.get_tensor(hf_name).to(torch.float32)
        except (SafetensorError, OSError) as error:
            raise CorruptModel(f"{file} cannot be read: {error}") from error
        if factors is not None:
            values = values + factors.scale * (factors.b @ factors.a)
        return _rotated_rows(values, hf_name, model.config)

    return read


def _rotated_rows(values: Tensor, hf_name: str, config: Any) -> Tensor:
    """Return the rows of queries or keys in llama.cpp's order, others as they are."""
    if ".self_attn.q_proj" in hf_name:
        num_heads = config.num_attention_heads
    elif ".self_attn.k_proj" in hf_name:
        num_heads = config.num_key_value_heads
    else:
        return values
    halves = values.reshape(num_heads, 2, _head_dim(config) // 2, values.shape[1])
    return halves.transpose(1, 2).reshape(values.shape)


def _rotary_factors(model: Checkpoint) -> Tensor | None:
    """Return what llama.cpp divides each of RoPE's frequencies by, None where they are not scaled apart.

    Raises:
        UnsupportedModel: RoPE is scaled in a way that is not known here.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = model.config
    rope = _rope_parameters(config)
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "linear", "llama3"):
        raise UnsupportedModel(
            f"{model.name} scales RoPE by the rule {rope_type!r}, and default, linear and llama3 can be "
            f"written.\nhint: {_CONVERTER}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(
            f"{model.name} rotates only a part of each head (partial_rotary_factor "
            f"{rope['partial_rotary_factor']}), which llama.cpp's Llama does not.\nhint: {_CONVERTER}"
        )
    if rope_type != "llama3":
        return None
    head_dim = _head_dim(config)
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
    head_dim = _head_dim(config)
    rope = _rope_parameters(config)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(_last_part(model.name))
    writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"])
    if dtype.startswith("Q"):
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
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


# The tokenizer -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _TokenizerFields:
    """What a GGUF file says of a tokenizer."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special_ids: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | list[dict[str, str]] | None

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")  # byte-level BPE, whatever rule cuts the text
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, token_id in self.special_ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def _tokenizer_fields(model: Checkpoint, pre: str | None) -> _TokenizerFields:
    from gguf import TokenType

    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(
            f"{model.name} has a tokenizer without tokenizer.json, whose rules are code.\nhint: {_CONVERTER}"
        )
    rules: dict[str, Any] = json.loads(backend.to_str())
    bpe = rules["model"]
    kind = bpe.get("type")
    affixes = [k for k in ("continuing_subword_prefix", "end_of_word_suffix") if bpe.get(k)]
    if kind != "BPE" or bpe.get("byte_fallback") or affixes or not _is_byte_level(rules):
        style = "in the manner of SentencePiece" if bpe.get("byte_fallback") else "not byte-level"
        raise UnsupportedModel(
            f"{model.name} has a tokenizer of the kind {kind}, {style}, and only byte-level BPE can be "
            f"written as GGUF here.\nhint: {_CONVERTER}"
        )
    added = tokenizer.added_tokens_decoder
    pre = pre or _pre_tokenizer(model.name, rules, added.values())
    vocabulary = tokenizer.get_vocab()
    beyond = sorted(token for token, token_id in vocabulary.items() if token_id >= model.width)
    if beyond:
        raise UnsupportedModel(
            f"{model.name} has {len(beyond)} tokens beyond the {model.width} rows of its embedding, "
            f"{beyond[0]!r} among them, and a GGUF file has one token for each row.\n"
            "hint: call resize_token_embeddings(len(tokenizer)), and save the model again"
        )
    tokens = [f"[PAD{token_id}]" for token_id in range(model.width)]
    types = [int(TokenType.UNUSED)] * model.width
    for token, token_id in vocabulary.items():
        tokens[token_id] = token
        types[token_id] = int(TokenType.NORMAL)
    for token_id, token in added.items():
        types[token_id] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    merges = [
        merge if isinstance(merge, str) else f"{merge[0]} {merge[1]}" for merge in bpe["merges"]
    ]
    adds_bos, adds_eos = _added_around(model)
    return _TokenizerFields(
        pre,
        tokens,
        types,
        merges,
        _special_ids(model),
        adds_bos,
        adds_eos,
        _chat_template(tokenizer.chat_template),
    )


def _flat_steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [
            step for part in pre_tokenizer.get("pretokenizers", ()) for step in _flat_steps(part)
        ]
    return [pre_tokenizer]


def _is_byte_level(rules: Mapping[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _flat_steps(rules.get("pre_tokenizer")))


def _step(step: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a step in the words of `_PRE_TOKENIZERS`, or its JSON where they have none for it."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return ("words",) if step.get("use_regex", True) else ("bytes",)
    if kind == "Digits" and step.get("individual_digits"):
        return ("digits",)
    pattern = step.get("pattern")
    if (
        kind == "Split"
        and step.get("behavior") == "Isolated"
        and not step.get("invert")
        and isinstance(pattern, Mapping)
        and "Regex" in pattern
    ):
        return ("split", str(pattern["Regex"]))
    return (json.dumps(step, sort_keys=True),)


def _pre_tokenizer(name: str, rules: Mapping[str, Any], added: Any) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text.

    Raises:
        UnsupportedModel: It has none, so llama.cpp would make other tokens of some texts.
    """
    steps = tuple(_step(step) for step in _flat_steps(rules.get("pre_tokenizer")))
    rule = _TextRule(steps, bool(rules["model"].get("ignore_merges")))
    found = _PRE_TOKENIZERS.get(rule)
    normalizer = (rules.get("normalizer") or {}).get("type")
    # Qwen composes characters (NFC) first. llama.cpp leaves that out for all Qwen models, and text is rarely
    # written with loose accents.
    is_prepared = normalizer is not None and not (normalizer == "NFC" and found == "qwen2")
    stripping = [t.content for t in added if t.lstrip or t.rstrip or t.single_word]
    if found is not None and not is_prepared and not stripping:
        return found
    if found is None:
        shown = " + ".join(" ".join(step) for step in rule.steps) or "nothing"
        more = ", words that are tokens taken whole" if rule.ignore_merges else ""
        why = f"cuts text by a rule that has no name in llama.cpp as far as is known here ({shown}{more})"
    elif stripping:
        why = f"swallows what is around the token {stripping[0]!r}"
    else:
        why = f"changes text before it cuts it ({normalizer})"
    raise UnsupportedModel(
        f"the tokenizer of {name} {why}, so llama.cpp would make other tokens of the same text.\n"
        "hint: if llama.cpp knows its rule under a name, give that name with --pre; known here are "
        f"{', '.join(sorted(_PRE_TOKENIZERS.values()))}"
    )


def _added_around(model: Checkpoint) -> tuple[bool, bool]:
    """Return whether the tokenizer puts its begin-of-sequence token before a text, and its end one after.

    Raises:
        UnsupportedModel: It adds something else.
    """
    tokenizer = model.tokenizer
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for adds_bos, adds_eos in ((False, False), (True, False), (False, True), (True, True)):
        if whole == [bos] * adds_bos + bare + [eos] * adds_eos:
            return adds_bos, adds_eos
    raise UnsupportedModel(
        f"the tokenizer of {model.name} makes {whole} of a text whose tokens are {bare}, and a GGUF file can "
        "only say that the begin- or end-of-sequence token is added.\n"
        "hint: save a tokenizer without that post-processor"
    )


def _special_ids(model: Checkpoint) -> dict[str, int]:
    """Return ids of special tokens by GGUF's names; what else ends a text is called eot, then eom."""
    tokenizer = model.tokenizer
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    ends = list(model.eos_token_ids)
    if ids["eos"] is None and ends:
        ids["eos"] = ends[0]
    others = [token_id for token_id in ends if token_id != ids["eos"]]
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    return {name: int(token_id) for name, token_id in ids.items() if token_id is not None}


def _chat_template(template: Any) -> str | list[dict[str, str]] | None:
    if isinstance(template, Mapping):
        return [{"name": str(name), "template": str(text)} for name, text in template.items()]
    return str(template) if template else None


# Adapters ------------------------------------------------------------------------------------------


def export_adapter(
    adapter: AdapterFiles,
    model: Checkpoint,
    output: Path,
    *,
    dtype: str = "F16",
    overwrite: bool = False,
) -> ExportedFile:
    """Write a LoRA adapter as the GGUF file that llama.cpp puts onto its model.

    llama.cpp adds `alpha / rank * b @ a` to a weight, with one alpha for the file; where the adapter has
    several, what they differ by is multiplied into `b`.

    Args:
        adapter: As PEFT saves it.
        model: The small model that the adapter belongs to; its weights are not read.
        output: The file, whose name ends in `.gguf`; its directory is made if it is not there.
        dtype: One of `ADAPTER_DTYPES`.
        overwrite: Replace another file that is there.

    Raises:
        UnsupportedModel: It changes more than linear layers, or the model cannot be written as GGUF.
        AdapterMismatch: It belongs to another model.
        CorruptModel: Weights are missing or not finite.
        InvalidRequest: The dtype is unknown, or the output is not called `.gguf`.
        OutputFileError: The output cannot be written, or another file is there.
    """
    _check_output(output, overwrite=overwrite)
    plan = _plan_adapter(adapter, model, dtype=dtype)
    return _write_file(plan, output, overwrite=overwrite)


@dataclass(frozen=True, slots=True)
class _Factors:
    """One layer's adapter: `a` is `[rank, inputs]`, `b` is `[outputs, rank]`, both float32."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def alpha(self) -> float:
        """What llama.cpp has to divide by the rank to get the scale."""
        return self.scale * self.a.shape[0]


def _plan_adapter(adapter: AdapterFiles, model: Checkpoint, *, dtype: str) -> _PlannedFile:
    from gguf import GGMLQuantizationType, GGUFType

    _check_dtype(dtype, ADAPTER_DTYPES, "an adapter")
    _check_model(model, weights_are_read=False)
    factors = _lora_factors(adapter, model)
    # llama.cpp takes an alpha of 0 for "not said" and a scale of 1.
    alphas = Counter(layer.alpha for layer in factors.values() if layer.alpha)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    kind = GGMLQuantizationType[dtype]
    tensors: list[_PlannedTensor] = []
    for module, layer in factors.items():
        name = _gguf_name(f"{module}.weight", model)
        b = _rotated_rows(layer.b, module, model.config) * (layer.alpha / alpha)
        for suffix, values in (("lora_a", layer.a), ("lora_b", b)):
            tensors.append(
                _PlannedTensor(f"{name}.{suffix}", tuple(values.shape), kind, _constant(values))
            )

    def add_fields(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(_last_part(adapter.name))
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)

    return _PlannedFile(tensors, add_fields, adapter.name)


def _constant(values: Tensor) -> Callable[[], Tensor]:
    return lambda: values


# What makes an adapter more than two factors for each of some layers, by its name in adapter_config.json.
_BEYOND_LORA = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
    "use_dora", "use_qalora",
)  # fmt: skip


def _lora_factors(adapter: AdapterFiles, model: Checkpoint) -> dict[str, _Factors]:
    """Return what an adapter adds to each layer, by module name in the Hugging Face layout.

    Raises:
        UnsupportedModel: It changes more than linear layers.
        AdapterMismatch: It belongs to another model.
        CorruptModel: A factor is missing.
    """
    import torch
    from peft.utils.other import get_pattern_key
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = adapter.config
    beyond = [key for key in _BEYOND_LORA if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append(f"bias {config['bias']!r}")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        beyond.append(f"init_lora_weights {config['init_lora_weights']!r}")
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
            f"the adapter {adapter.name} changes more than LoRA's two factors of linear layers: "
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
            f"the adapter {adapter.name} changes the output head of {model.name}, which is its embedding "
            "too, and a GGUF file holds one of them.\nhint: tune an adapter without lm_head"
        )
    path = adapter.path / "adapter_model.safetensors"
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptModel(f"{path} cannot be read: {error}") from error
    alpha_pattern = config.get("alpha_pattern") or {}
    patterns = list(alpha_pattern)
    factors: dict[str, _Factors] = {}
    for module, names in layers.items():
        if len(names) != 2:
            raise CorruptModel(
                f"{path} has one of the two factors of {module}, and lacks the other"
            )
        a, b = (weights[names[side]].to(torch.float32) for side in "AB")
        if a.shape[0] != b.shape[1]:
            raise CorruptModel(
                f"{path}: the factors of {module} have the ranks {a.shape[0]} and {b.shape[1]}"
            )
        alpha = alpha_pattern.get(get_pattern_key(patterns, module), config.get("lora_alpha", 8))
        rank = a.shape[0]
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factors[module] = _Factors(a, b, scale)
    return factors


# Recipes -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExportedRecipe:
    """A recipe whose small models are GGUF files.

    Args:
        directory: Where the recipe stands.
        files: The small models and adapters below it.
    """

    directory: Path
    files: tuple[ExportedFile, ...]


def export_recipe(
    recipe: Recipe,
    output: Path,
    *,
    dtype: str = "F16",
    pre: str | None = None,
    overwrite: bool = False,
) -> ExportedRecipe:
    """Write every small model and adapter of a recipe as a GGUF file, and a recipe that names them.

    Models stand in `models/`, adapters in `adapters/`; weights that several experts share are written once.
    The base stays the file it is, and so do small models that are GGUF files already. How the models ran in
    transformers (dtype, device, quantization) is left behind.

    Args:
        recipe: As `Recipe.read` gives it.
        output: The new recipe's directory, made if it is not there.
        dtype: One of `DTYPES`, for the models; adapters are in F32 beside F32, else in F16.
        pre: As for `export_model`, for all small models.
        overwrite: Replace another recipe, and other files, that are there.

    Raises:
        UserError: As for `export_model` and `export_adapter`, before anything is written.
        RecipeError: Another recipe is there, or a model.
    """
    target = Path(os.path.abspath(os.path.expanduser(output)))
    if target == Path(os.path.abspath(recipe.directory)):
        raise RecipeError(
            f"{target} is the recipe that is to be exported.\nhint: name another directory"
        )
    plans = _RecipePlans(recipe, target, dtype, pre)
    experts = tuple(
        ExpertSpec(
            expert.name,
            expert=plans.spec(expert.expert),
            anti_expert=plans.spec(expert.anti_expert),
            alpha=expert.alpha,
        )
        for expert in recipe.experts
    )
    reference = recipe.reference_from(recipe.base.model or "", target)
    base = replace(recipe.base, model=reference)
    if is_gguf(reference):
        base = _in_llama_cpp(recipe.base, reference, None)
    exported = replace(recipe, base=base, experts=experts, directory=target, schema=None)
    exported.check_free(target, overwrite=overwrite)
    for path in plans.files:
        _check_output(target / path, overwrite=overwrite)
    files = tuple(
        _write_file(plan, target / path, overwrite=overwrite) for path, plan in plans.files.items()
    )
    exported.write(target, overwrite=overwrite)
    return ExportedRecipe(target, files)


def _in_llama_cpp(spec: ModelSpec, model: str, adapter: str | None) -> ModelSpec:
    """Return a GGUF file's place in a recipe, without what the model's settings in transformers were."""
    settings = spec.llama_cpp or LlamaCppSettings()
    return ModelSpec(model=model, adapter=adapter, prompt=spec.prompt, llama_cpp=settings)


@dataclass(slots=True)
class _RecipePlans:
    """The files of a recipe to export, each planned once however many experts share it."""

    recipe: Recipe
    target: Path
    dtype: str
    pre: str | None
    files: dict[str, _PlannedFile] = field(default_factory=dict)
    _models: dict[Path, str] = field(default_factory=dict)
    _adapters: dict[tuple[Path, Path], str] = field(default_factory=dict)

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """Return how the exported recipe names a small model."""
        if spec.model is None:
            return spec
        root = self.recipe.directory
        model = find_checkpoint(
            spec.model,
            root=root,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            allow_pickle=spec.allow_pickle,
        )
        if model.kind == "gguf":
            reference = self.recipe.reference_from(spec.model, self.target)
        else:
            place = model.directory.resolve()
            if place not in self._models:
                plan = _plan_model(model, dtype=self.dtype, pre=self.pre)
                self._models[place] = self._add(plan, "models", spec.model)
            reference = self._models[place]
        return _in_llama_cpp(spec, reference, self._adapter(spec.adapter, model))

    def _adapter(self, reference: str | None, model: Checkpoint) -> str | None:
        if reference is None:
            return None
        if is_gguf(reference):
            return self.recipe.reference_from(reference, self.target)
        adapter = find_adapter(reference, root=self.recipe.directory)
        key = (adapter.path.resolve(), (model.gguf_path or model.directory).resolve())
        if key not in self._adapters:
            plan = _plan_adapter(adapter, model, dtype="F32" if self.dtype == "F32" else "F16")
            self._adapters[key] = self._add(plan, "adapters", reference)
        return self._adapters[key]

    def _add(self, plan: _PlannedFile, folder: str, reference: str) -> str:
        stem = _last_part(reference)
        path, count = f"{folder}/{stem}.gguf", 1
        while path in self.files:
            count += 1
            path = f"{folder}/{stem}-{count}.gguf"
        self.files[path] = plan
        return path


# Files ---------------------------------------------------------------------------------------------


def _last_part(reference: str) -> str:
    """Return the last part of a reference, with what a file's name should not hold left out."""
    last = re.split(r"[/\\:]", reference.rstrip("/\\"))[-1]
    kept = re.sub(r"[^A-Za-z0-9._-]", "-", re.sub(r"\.gguf$", "", last, flags=re.IGNORECASE))
    return kept.lstrip("._-") or "model"


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.suffix.lower() != ".gguf":
        raise InvalidRequest(
            f"the output is called {output.name!r}, and a model's file must end in .gguf to be known as "
            f"one.\nhint: {output.name}.gguf"
        )
    if output.is_dir():
        raise OutputFileError(f"{output} is a directory, and a file is to be written.")
    if output.exists() and not overwrite and not output.is_file():
        raise OutputFileError(f"{output} is no file.\nhint: name another place")


@contextlib.contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Give a file to write beside the output, which takes its place once it is whole.

    Raises:
        OutputFileError: It cannot be written.
    """
    part: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
        os.close(descriptor)
        part = Path(name)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(output)
    except OSError as error:
        raise OutputFileError(
            f"{output} cannot be written: {error.strerror or error}.\n"
            "hint: make room there, or name another place"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _write_file(plan: _PlannedFile, output: Path, *, overwrite: bool) -> ExportedFile:
    with _replacing(output) as part:
        _write_gguf(plan, part)
        if output.exists() and not overwrite and not filecmp.cmp(part, output, shallow=False):
            raise OutputFileError(
                f"{output} is there with another content, which would be lost.\n"
                "hint: name another place, or give --force to replace it"
            )
        num_bytes = part.stat().st_size
    return ExportedFile(output, num_bytes, len(plan.tensors), plan.num_unquantized)


def _write_gguf(plan: _PlannedFile, path: Path) -> None:
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


def _stored(tensor: _PlannedTensor, source: str) -> Any:
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
