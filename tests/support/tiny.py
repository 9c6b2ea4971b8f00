"""Tiny models with random weights and a byte-level tokenizer, in the Hugging Face layout.

Every builder is deterministic in its seed. The tokenizer reads any text: its first tokens are the
256 bytes, so a character outside ASCII is several tokens, as in real models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

Architecture = Literal["llama", "qwen2", "gpt2"]

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("e", "r"), ("Ġ", "a")]
"""Merges of the byte-pair encoding; each adds a token."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""End of sequence (and padding), and the two that the chat template uses."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

NUM_TOKENS = 256 + len(MERGES) + len(SPECIAL_TOKENS)
"""Tokens of the plain tokenizer, 266; a model's head is as wide unless it is padded."""


def tiny_tokenizer(
    *,
    merges: Sequence[tuple[str, str]] = MERGES,
    shuffle_seed: int | None = None,
    extra_tokens: Sequence[str] = (),
    chat_template: str | None = CHAT_TEMPLATE,
) -> Any:
    """Return a byte-level BPE tokenizer of `NUM_TOKENS` tokens and the extra ones.

    Args:
        merges: Others than the usual ones make another tokenizer.
        shuffle_seed: Give the same tokens other ids, drawn with this seed.
        extra_tokens: Ordinary added tokens after the others.
        chat_template: None for a tokenizer without one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokens += SPECIAL_TOKENS
    if shuffle_seed is not None:
        generator = torch.Generator().manual_seed(shuffle_seed)
        tokens = [tokens[i] for i in torch.randperm(len(tokens), generator=generator).tolist()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(extra_tokens))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def tiny_config(
    architecture: Architecture = "llama",
    *,
    width: int = NUM_TOKENS,
    max_context: int = 128,
    hidden_size: int = 16,
    num_layers: int = 2,
    eos_token_id: int | None = None,
) -> Any:
    """Return the config of a tiny model; `width` is the number of rows of its output head."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    # Wide initial weights: with the usual 0.02 every next token would be about equally likely.
    shared: dict[str, Any] = {
        "vocab_size": width,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
    }
    if architecture == "gpt2":
        return GPT2Config(
            n_embd=hidden_size, n_layer=num_layers, n_head=2, n_positions=max_context, **shared
        )
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture]
    return kind(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_context,
        tie_word_embeddings=False,
        **shared,
    )


def tiny_model(
    directory: Path,
    architecture: Architecture = "llama",
    *,
    width: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    max_context: int = 128,
    hidden_size: int = 16,
    num_layers: int = 2,
    dtype: str = "float32",
) -> Path:
    """Write a random model with its tokenizer to `directory` and return the directory.

    Args:
        directory: Made if it is not there.
        architecture: Llama and Qwen2 have an untied head, GPT-2 a tied one.
        width: Rows of the output head; None for as many as the tokenizer has tokens.
        seed: Of the weights.
        tokenizer: None for `tiny_tokenizer()`.
        max_context: Positions.
        hidden_size: A multiple of 8.
        num_layers: Decoder layers.
        dtype: Of the stored weights, by its torch name.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    config = tiny_config(
        architecture,
        width=len(tokenizer) if width is None else width,
        max_context=max_context,
        hidden_size=hidden_size,
        num_layers=num_layers,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):  # initialised to zero, which would hide a lost bias
                    parameter.normal_(0, 0.1)
    model.to(getattr(torch, dtype)).eval()
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_adapter(
    model_directory: Path,
    directory: Path,
    *,
    seed: int = 0,
    rank: int = 2,
    alpha: int = 4,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write a random LoRA adapter on the attention of a tiny model and return its directory.

    Both factors are random, so the adapter changes every logit. `more` are other options of PEFT's config.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    is_gpt2 = model.config.model_type == "gpt2"
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=["c_attn"] if is_gpt2 else ["q_proj", "v_proj"],
        fan_in_fan_out=is_gpt2,
        task_type="CAUSAL_LM",
        **more,
    )
    adapted = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.5 * noise if "lora_" in name else parameter + 0.1 * noise)
    adapted.save_pretrained(directory)
    return directory


def tiny_gguf(
    path: Path,
    *,
    seed: int = 0,
    max_context: int = 128,
    pre: str | None = "gpt-2",
    hidden_size: int = 32,
    dtype: str = "F32",
    tensors_per_part: int = 0,
) -> Path:
    """Write a random Llama model as a GGUF file and return its path.

    Its tokenizer has the tokens and ids of `tiny_tokenizer()`, its head as many rows.

    Args:
        path: The file; parts get names of their own, and the first one's path is returned.
        seed: Of the weights.
        max_context: Positions.
        pre: The name of the rule that cuts text; None for a file that names none.
        hidden_size: A multiple of 32.
        dtype: Of the matrices, by GGUF's name.
        tensors_per_part: Number of tensors in each file of a split model; 0 for a single file.
    """
    import gguf
    import numpy as np

    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = {vocabulary[token] for token in SPECIAL_TOKENS}
    num_heads, num_key_value_heads = 4, 2
    head_size, inner_size = hidden_size // num_heads, 2 * hidden_size
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_per_part)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(max_context)
    writer.add_embedding_length(hidden_size)
    writer.add_feed_forward_length(inner_size)
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_key_value_heads)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL
            for index in range(len(tokens))
        ]
    )
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_eos_token_id(vocabulary["<|endoftext|>"])
    writer.add_bos_token_id(vocabulary["<|endoftext|>"])
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1 or dtype == "F32":
            values = np.ones(shape) if len(shape) == 1 else random.normal(0, 0.3, shape)
            writer.add_tensor(name, values.astype(np.float32))
            return
        kind = gguf.GGMLQuantizationType[dtype]
        values = random.normal(0, 0.3, shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), hidden_size)
    for layer in range(2):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", hidden_size)
        add(f"{block}.attn_q.weight", num_heads * head_size, hidden_size)
        add(f"{block}.attn_k.weight", num_key_value_heads * head_size, hidden_size)
        add(f"{block}.attn_v.weight", num_key_value_heads * head_size, hidden_size)
        add(f"{block}.attn_output.weight", hidden_size, num_heads * head_size)
        add(f"{block}.ffn_norm.weight", hidden_size)
        add(f"{block}.ffn_gate.weight", inner_size, hidden_size)
        add(f"{block}.ffn_up.weight", inner_size, hidden_size)
        add(f"{block}.ffn_down.weight", hidden_size, inner_size)
    add("output_norm.weight", hidden_size)
    add("output.weight", len(tokens), hidden_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-*.gguf"))[0] if tensors_per_part else path
