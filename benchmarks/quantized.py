"""What quantisers do on this machine: do they run, what do weights take, and do rows depend on their batch.

    python benchmarks/quantized.py

Needs the extra `quantize`. Prints the table of docs/guides/choose-a-pair.md, for a random Llama: twelve rows
of 1 to 20 tokens, read together and each alone.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.backends.transformers.quantized import try_quantization
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.errors import UserError
from proxytune.recipe.spec import ModelSpec

TORCHAO = {"quant_method": "torchao"}
INT4_UNPACKED = {
    "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
    "granularity": {"_type": "PerGroup", "_data": {"group_size": 32}},
}
KINDS = (
    None,
    {**TORCHAO, "quant_type": "Int8WeightOnlyConfig"},
    {**TORCHAO, "quant_type": "PrototypeInt4WeightOnlyConfig", "group_size": 32},
    {**TORCHAO, "quant_type": "IntxWeightOnlyConfig", **INT4_UNPACKED},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    {"load_in_8bit": True},
    {**TORCHAO, "quant_type": "Int8DynamicActivationInt8WeightConfig"},
    {**TORCHAO, "quant_type": "Int4WeightOnlyConfig", "group_size": 32},
)
HIDDEN_SIZE, VOCAB_SIZE = 512, 256


def random_model(directory: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def measured(directory: Path, quantization: dict | None, dtype: str) -> str:
    """Return bits per quantised weight and the largest change of a logit in a batch, or why it is refused."""
    checkpoint = find_checkpoint(str(directory), root=Path("/"))
    spec = ModelSpec(model=str(directory), device="cpu", dtype=dtype, quantization=quantization)
    bits = element = 8 * getattr(torch, dtype).itemsize
    try:
        if quantization is not None:
            num_bytes = try_quantization(checkpoint, quantization, dtype=dtype, device="cpu")
            num_plain = 2 * VOCAB_SIZE * HIDDEN_SIZE + 5 * HIDDEN_SIZE  # embedding, head, norms
            num_quantised = checkpoint.num_parameters - num_plain
            bits = (8 * num_bytes - element * num_plain) / num_quantised
        backend = TransformersBackend.load(checkpoint, spec)
    except UserError as error:
        return f"refused: {str(error).splitlines()[0]}"
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in (1, 5, 9, 20) * 3
    ]
    together = backend.prefill(rows).logits.float()
    alone = torch.cat([backend.prefill([row]).logits.float() for row in rows])
    change = (together - alone).abs().max()
    return f"{bits:.2f} bits, change {change:.0e}, logits up to {alone.abs().max():.0f}"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        random_model(Path(temporary))
        for kind in KINDS:
            print(json.dumps(kind))
            for dtype in ("float32", "bfloat16"):
                print(f"    {dtype:9} {measured(Path(temporary), kind, dtype)}")


if __name__ == "__main__":
    main()
