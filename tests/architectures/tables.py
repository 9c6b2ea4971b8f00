"""What the rules of `shrink.py` cannot know, and what is expected of architectures that do not simply run."""

from __future__ import annotations

from typing import Any

# Configs ----------------------------------------------------------------------------------------------------

FROM_PADDING = {"pad_token_id": 1}
"""For models that count positions from the id of their padding token on, which must be small."""
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONVOLVED = {"layer_types": ["conv", "full_attention", "conv"]}
ROPE_OF_THREE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "camembert": FROM_PADDING,
    "cohere_compass_text": MIXED
    | {
        "rope_parameters": {
            "full_attention": ROPE_OF_THREE,
            "sliding_attention": ROPE_OF_THREE,
        }
    },
    "data2vec-text": FROM_PADDING,
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2, "hidden_size": 32, "ffn_hidden_size": 48},
    },
    "cpmant": {"dim_head": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_key_value_heads": 1,
        "o_groups": 2,
    },
    "doge": {"keep_window_size": 8},
    "dory": MIXED | {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 1},
    "dots1": MIXED | {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {
        "head_dim": 16,
        "swa_head_dim": 16,
        "swa_kv_lora_rank": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_bias": False},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["local", "global"], 1], [["local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "rope",
        "shared_intermediate_size": 48,
    },
    "inkling2_loop_text": {
        "log_scaling_n_floor": 4,
        "loop_layer_index_end": 2,
        "loop_layer_index_start": 1,
        "n_layers_per_attn_res_block": 1,
    },
    "inkling2_text": {"log_scaling_n_floor": 4},
    "inkling_text": {"log_scaling_n_floor": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "laguna": MIXED,
    "lfm2": CONVOLVED,
    "lfm2_moe": CONVOLVED,
    "llama4_text": {"attn_scale": 0.5, "floor_scale": 4, "no_rope_layer_interval": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mellum": MIXED,
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_buckets": 8, "pad_token_id": 0, "relative_max_distance": 8},
    "qwen4_exp_text": {
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "indexer_head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
    },
    "reformer": {
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "hash_seed": 0,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "roberta": FROM_PADDING,
    "roberta-prelayernorm": FROM_PADDING,
    "smollm3": MIXED | {"no_rope_layer_interval": 2},
    "xglm": FROM_PADDING,
    "xlm-roberta": FROM_PADDING,
    "xlm-roberta-xl": FROM_PADDING,
    "xlstm": {"hidden_size": 128},
    "xmod": FROM_PADDING | {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""Options of configs by model type, over those of `shrink.py`; also for a config inside another."""

VARIANTS: dict[str, dict[str, Any]] = {
    "falcon: ALiBi": {"alibi": True},
    "falcon: new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma4_text: experts": {
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_kv_shared_layers": 1,
        "top_k_experts": 2,
    },
    "gpt_bigcode: keys for every head": {"multi_query": False},
    "llama: dynamic RoPE": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama: linear RoPE": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    },
    "llama: llama3 RoPE": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "llama: YaRN": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral: no window": {"sliding_window": None},
    "opt: norm after": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "phi3: longrope": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 1.0,
        },
        "sliding_window": None,
    },
    "qwen2: no window": {"layer_types": ["full_attention"] * 3, "use_sliding_window": False},
}
"""Further options that change how an architecture computes, after its model type."""

ALIBI = frozenset({"bloom", "falcon: ALiBi", "mpt"})
"""Models with ALiBi, which their configs do not mention."""

# What is expected -------------------------------------------------------------------------------------------

DRAFTS_ONLY = "it drafts for a Gemma 4 from that model's hidden states, and reads no text by itself"
SOUND = "it predicts codes of sound, several at a time, and no text"

NOT_BUILT: dict[str, str] = {
    "blt": "transformers' own `generate` fails: its config has no number of layers",
    "gemma3n": "its image tower needs timm; its text model, `gemma3n_text`, is tried",
    "gemma4_assistant": DRAFTS_ONLY,
    "gemma4_unified_assistant": DRAFTS_ONLY,
    "musicgen": SOUND,
    "musicgen_melody": SOUND,
}
"""Architectures that transformers makes no text with, and why."""

NO_CLASS = "does not run as a causal language model"
NOT_CAUSAL = "does not say what follows a text"

REFUSED: dict[str, str] = {
    "cpmant": NOT_CAUSAL,
    "emu3": NO_CLASS,
    "mllama": NO_CLASS,
    "reformer": NOT_CAUSAL,
    "xlm": NOT_CAUSAL,
    "xlnet": NOT_CAUSAL,
}
"""Architectures that are refused by loading and by `proxytune doctor`, and words of the error."""

FAULTS: dict[str, tuple[tuple[str, ...], str]] = {}
"""Architectures with identities that do not hold: which, and why."""
