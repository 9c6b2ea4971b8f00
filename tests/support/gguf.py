"""Small random models and adapters to export as GGUF, and what is in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.export import write
from proxytune.export.model import export_model
from proxytune.recipe.spec import ModelSpec
from tests.support.tiny import tiny_tokenizer

PROMPT = [5, 17, 80, 3, 250, 80, 41]
"""Token ids to compare logits on."""


def llama(directory: Path, *, tokenizer: Any = None, seed: int = 0, **settings: Any) -> Path:
    """Write a random Llama whose heads are wider than hidden size / heads, and share keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 3e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        **settings,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # initialised to one, which would hide norms that change places
                    parameter.normal_(1, 0.2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def logits(reference: Path, adapter: Path | None = None) -> torch.Tensor:
    """Return `[seq, vocab]`, read through this project's backend."""
    found = find_checkpoint(str(reference), root=Path("/"))
    files = None if adapter is None else {"a": find_adapter(str(adapter), root=Path("/"))}
    spec = ModelSpec(model=str(reference), device="cpu", dtype="float32")
    backend = TransformersBackend.load(found, spec, files)
    names = None if adapter is None else ["a"]
    state, first = backend.prefill([PROMPT[:1]], adapters=names)
    rest = backend.extend(state, torch.tensor([PROMPT[1:]]))
    return torch.cat([first[:, None], rest], dim=1)[0].float()


def export(directory: Path, output: Path, **settings: Any) -> write.ExportedFile:
    return export_model(find_checkpoint(str(directory), root=Path("/")), output, **settings)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a GGUF file's fields and tensors, by their names."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def lora(model: Path, directory: Path, **settings: Any) -> Path:
    """Write a random LoRA adapter on all linear layers and return its directory."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **settings}
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **config),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                kept = 0 if "lora_" in name else parameter
                parameter.copy_(kept + 0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return directory
