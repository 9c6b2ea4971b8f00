"""Tiny configs of transformers' models: the default config of each, with the sizes in it made small.

The rules go by a field's name and not by the model, so that they are likely to cover a model that is new in
transformers. `tables.py` has what the rules cannot know.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

HIDDEN, HEADS, KEY_HEADS, HEAD_SIZE, INNER, LAYERS = 32, 4, 2, 8, 48, 3
WINDOW = 8
"""Tokens of sliding windows, of chunks, and that sparse attention picks: fewer than a test's text has."""
CONTEXT = 128

_SIZES: tuple[tuple[int, str], ...] = (
    (
        HIDDEN,
        """hidden_size d_model n_embd emb_dim embedding_dim attention_hidden_size lru_width embedding_size
        input_embedding_size output_embedding_size word_embed_proj_dim pronunciation_embed_dim shape_embed_dim
        router_hidden_size hidden_size_per_layer_input out_hidden_size""",
    ),
    (
        LAYERS,
        """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks
        num_encoder_layers num_decoder_layers""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        linear_num_heads mamba_num_heads mamba_n_heads linear_num_value_heads num_experts
        n_routed_experts num_local_experts moe_num_experts""",
    ),
    (
        KEY_HEADS,
        """num_key_value_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok moe_topk
        moe_k top_k_experts""",
    ),
    (
        HEAD_SIZE,
        """head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim swa_head_dim linear_head_dim
        index_head_dim linear_key_head_dim linear_value_head_dim d_head kv_channels rotary_dim
        attention_head_size attention_head_dim mamba_head_dim global_head_dim swa_v_head_dim d_rel q_lora_rank
        kv_lora_rank o_lora_rank laurel_rank adapter_rank loop_gate_rank hc_lowrank mamba_d_state state_size
        ssm_state_size mamba_chunk_size chunk_size block_size""",
    ),
    (
        INNER,
        """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner n_inner ffn_hidden_size
        feed_forward_size dim_ff dff intermediate_size_mlp dense_intermediate_size moe_intermediate_size
        shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size
        shared_intermediate_size shared_experts_intermediate_size""",
    ),
    (
        1,
        """n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace
        num_dense_layers mamba_n_groups n_groups mamba_ngroups""",
    ),
    (
        WINDOW,
        """sliding_window_size window_size local_attention attention_window_size attention_chunk_size
        index_topk""",
    ),
    (
        CONTEXT,
        """max_position_embeddings n_positions max_seq_len context_length max_source_positions
        max_target_positions""",
    ),
    (CONTEXT // 4, "original_max_position_embeddings"),
    (4, "time_step_rank mamba_dt_rank"),
    (2, "type_vocab_size"),
    (16, "rel_extent index_n_heads"),
)
SIZES = {name: size for size, names in _SIZES for name in names.split()}
"""Sizes by field, for configs whose default is not None."""

SWITCHES: dict[str, Any] = {
    "is_decoder": True,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 1,
    "head_dim": HEAD_SIZE,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
    "qk_layernorm": True,
    "use_qk_norm": True,
    "attention_bias": True,
    "mlp_bias": True,
    "clip_qkv": 2.0,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}
"""Fields set whatever their default: what can go wrong is on, and what generation does not use is off."""

SPECIAL_IDS: dict[str, int | None] = {
    "bos_token_id": 264,
    "sep_token_id": 264,
    "decoder_start_token_id": 264,
    "eos_token_id": 263,
    "pad_token_id": 265,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
"""Token ids inside the tests' vocabulary."""

VOCABULARIES = (
    "vocab_size",
    "vocab_size_per_layer_input",
    "audio_vocab_size",
    "unpadded_vocab_size",
)

KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types")
"""Fields that name the kind of each layer."""


def fields_of(kind: type) -> dict[str, Any]:
    """Return the fields of a config class with their defaults."""
    parameters = inspect.signature(kind).parameters
    return {
        name: p.default
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def small_options(
    kind: Any, vocab_size: int, overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what to give to a config class so that its model is tiny.

    Args:
        kind: The config class.
        vocab_size: Rows of the embeddings.
        overrides: Further options by model type, which also count for a config inside another.
    """
    fields = fields_of(kind)
    options: dict[str, Any] = {
        name: SIZES[name]
        for name, default in fields.items()
        if name in SIZES and default is not None
    }
    options |= {name: value for name, value in SWITCHES.items() if name in fields}
    options |= {name: vocab_size for name in VOCABULARIES if name in fields}
    options |= {name: value for name, value in SPECIAL_IDS.items() if name in fields}
    if "tie_word_embeddings" in fields:
        options["tie_word_embeddings"] = False
    if "kv_lora_rank" in fields and "num_key_value_heads" in options:
        options["num_key_value_heads"] = HEADS  # latent attention has keys for every head
    own = overrides.get(kind.model_type, {})
    options |= _one_layer_of_each_kind(kind, options, own)
    for name, inner in _inner_configs(kind, fields).items():
        options[name] = small_options(inner, vocab_size, overrides)
        if inner.model_type:
            options[name]["model_type"] = inner.model_type
    for name, value in own.items():
        if isinstance(value, Mapping) and isinstance(options.get(name), dict):
            options[name] |= value
        else:
            options[name] = value
    return options


def _inner_configs(kind: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes of the configs inside a config, by field."""
    names = [name for name in getattr(kind, "sub_configs", {}) if name in fields]
    if not names:
        return {}
    default = kind()
    found = {name: type(getattr(default, name, None)) for name in names}
    return {name: inner for name, inner in found.items() if hasattr(inner, "sub_configs")}


def _one_layer_of_each_kind(
    kind: Any, options: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the kinds of the layers, by field: each kind of the default once, and one more."""
    fields = fields_of(kind)
    names = [name for name in KINDS if name in fields]
    if not names:
        return {}
    default = kind(**{name: True for name in ("use_sliding_window",) if name in fields})
    kinds = {name: list(dict.fromkeys(getattr(default, name, None) or [])) for name in names}
    given = [len(own[name]) for name in names if name in own]
    num_layers = max(given or [LAYERS, *(len(types) + 1 for types in kinds.values())])
    found: dict[str, Any] = {}
    for name, types in kinds.items():
        if types and name not in own:
            # Dense layers come before those with experts; other kinds take turns.
            last = len(types) - 1
            found[name] = [
                types[min(i, last)] if name == "mlp_layer_types" else types[i % len(types)]
                for i in range(num_layers)
            ]
    if found or given:
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if name in options:
                found[name] = num_layers
    return found
