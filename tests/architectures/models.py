"""Tiny models of every architecture, with weights whose texts vary, saved as users' models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.architectures.shrink import KINDS, small_options
from tests.architectures.tables import ALIBI, OVERRIDES, VARIANTS
from tests.support.tiny import NUM_TOKENS, tiny_tokenizer

MAX_PARAMETERS = 4_000_000


def every_model_type() -> list[str]:
    """Return the model types that the installed transformers builds causal language models of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def every_architecture() -> list[str]:
    """Return every model type, and the variants of some (`VARIANTS`)."""
    types = every_model_type()
    return sorted([*types, *(name for name in VARIANTS if type_of(name) in types)])


def type_of(architecture: str) -> str:
    """Return the model type of an architecture, which may be a variant: `llama: YaRN`."""
    return architecture.partition(":")[0]


def tiny_config(architecture: str) -> Any:
    """Return the config of a tiny model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = type_of(architecture)
    kind = CONFIG_MAPPING[model_type]
    own = OVERRIDES.get(model_type, {}) | VARIANTS.get(architecture, {})
    return kind(**small_options(kind, NUM_TOKENS, OVERRIDES | {model_type: own}))


def tiny_network(architecture: str, seed: int) -> Any:
    """Return a tiny model with random weights."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(
            f"{architecture} has {size} parameters: shrink.py does not know a field of its"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        scatter(network)
    return network.eval()


def scatter(network: nn.Module) -> None:
    """Draw the weights anew where an architecture's own initialisation would leave texts constant.

    Matrices get normal numbers of 0.3, whatever initializer_range an architecture reads or ignores. Biases
    begin at zero and get 0.1, so that a lost one is seen. Other vectors (norms, decays) stay as they are.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
            elif name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in network.named_buffers():
            if name.endswith("correction_bias") or name.endswith("expert_bias"):
                buffer.normal_(0, 0.1)


def save(network: Any, directory: Path) -> Path:
    """Save a model with the tests' tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def traits(architecture: str, network: Any) -> list[str]:
    """Return what is special about a model, as far as its config and its weights show it."""
    text = network.config.get_text_config(decoder=True)
    kinds = {str(kind) for name in KINDS for kind in getattr(text, name, None) or ()}
    weights = [name for name, _ in network.named_parameters()]

    def has(*words: str) -> bool:
        return any(word in kind for kind in kinds for word in words)

    def is_set(names: str) -> bool:
        return any(getattr(text, name, None) for name in names.split())

    def is_named(*words: str) -> bool:
        return any(word in name for name in weights for word in words)

    is_recurrent = has("linear", "mamba", "conv", "recurrent", "hybrid") or is_set(
        "state_size chunkwise_kernel mamba_d_state rescale_every"
    )
    is_beside = is_named("q_proj", "qkv", "self_attn")
    windows = (
        "sliding_window sliding_window_size window_size attention_chunk_size local_attention "
        "attention_window_size"
    )
    found = {
        "with `is_decoder` set": is_set("is_decoder") and is_named("encoder.layer."),
        "sliding window": has("sliding", "chunked") or (not kinds and is_set(windows)),
        "sparse attention": has("indexed", "compressed"),
        "latent attention": is_set("kv_lora_rank"),
        "recurrent or convolutional layers beside attention": is_recurrent and is_beside,
        "recurrent layers alone": is_recurrent and not is_beside,
        "experts": is_named("experts"),
        "soft caps": is_set("attn_logit_softcapping final_logit_softcapping logits_soft_cap"),
        "ALiBi": architecture in ALIBI,
    }
    return [name for name, holds in found.items() if holds]
