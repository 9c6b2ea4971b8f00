"""An expert as vLLM's draft model: one directory, in the base's vocabulary, adapters merged.

vLLM's `draft_model` method takes a whole model whose token ids are the target's. An expert that is a LoRA
adapter, or whose ids or width differ from the base's, is written as such a model once and kept in the cache
directory. Drafts are guesses: whatever an expert drafts, the steered model decides.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from proxytune.checkpoints.conversion import build_once, cache_directory
from proxytune.errors import UnsupportedModel
from proxytune.grants import NOTHING, Grants
from proxytune.integrations.vllm.config import ServedEnsemble, ServedMember, find_ensemble
from proxytune.recipe.recipe import Recipe


def speculative_config(
    recipe: Recipe, expert: str | None = None, *, num_tokens: int = 3, grants: Grants = NOTHING
) -> dict[str, Any]:
    """Return vLLM's `speculative_config` with an expert as the draft model.

    Args:
        recipe: The recipe that vLLM will serve.
        expert: The expert's name; None for the default expert, otherwise the first.
        num_tokens: Number of tokens to draft at a time.
        grants: What the caller allows.

    Raises:
        UnsafeModel: The recipe asks for a right that the caller does not grant.
        UnknownExpert: The recipe has no expert of that name.
        UnsupportedModel: The expert has no weights of its own, or vLLM cannot run the recipe.
    """
    name = expert or recipe.default_expert or recipe.experts[0].name
    recipe.named(name)
    ensemble = find_ensemble(recipe, grants)
    pair = next(pair for pair in ensemble.pairs if pair.name == name)
    if pair.expert == 0:
        raise UnsupportedModel(
            f"expert {name!r} is the base itself, which is too slow to draft for itself.\n"
            "hint: name an expert that is a small model"
        )
    return {
        "method": "draft_model",
        "model": str(draft_model(ensemble, ensemble.members[pair.expert])),
        "num_speculative_tokens": num_tokens,
    }


def draft_model(ensemble: ServedEnsemble, member: ServedMember) -> Path:
    """Return a directory with a member as a model in the base's vocabulary, written on first use.

    Raises:
        OutputFileError: The cache directory cannot be written.
        UserError: Its files cannot be read.
    """
    weights = member.checkpoint.weights_path()
    if member.adapter is None and member.alignment.kind == "same":
        return weights
    files = [*sorted(weights.glob("*.safetensors")), *sorted(weights.glob("*.json"))]
    if member.adapter is not None:
        files += sorted(path for path in member.adapter.path.iterdir() if path.is_file())
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    read_ids = member.alignment.read_ids
    vocabulary = None if read_ids is None else read_ids.tolist()
    alignment = member.alignment
    content = repr(("1", states, alignment.base_width, alignment.num_shared, vocabulary))
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    target = cache_directory() / "drafts" / key
    return build_once(
        target,
        lambda part: _write(ensemble, member, weights, part),
        is_whole=lambda: (target / "config.json").is_file(),
    )


def _write(ensemble: ServedEnsemble, member: ServedMember, weights: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(weights, dtype="auto", local_files_only=True)
    if member.adapter is not None:
        from proxytune.checkpoints.merge import merge_into

        merge_into(model, member.adapter, member.checkpoint)
    alignment = member.alignment
    if alignment.kind != "same":
        read_ids = alignment.read_ids
        if read_ids is not None:
            # Tokens that only the base has are drafted as often as what stands in for them.
            source = read_ids.clamp(min=0)
        else:
            source = torch.arange(alignment.base_width)
            source[alignment.num_shared :] = 0
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = embedding.weight is head.weight
        for layer in [embedding] if is_tied else [embedding, head]:
            layer.weight = torch.nn.Parameter(layer.weight.detach()[source].clone())
        if is_tied:
            head.weight = embedding.weight
        if getattr(head, "bias", None) is not None:
            head.bias = torch.nn.Parameter(head.bias.detach()[source].clone())
        model.config.get_text_config().vocab_size = alignment.base_width
    model.save_pretrained(target)
    ensemble.base.tokenizer.save_pretrained(target)
