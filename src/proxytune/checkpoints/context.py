"""How many tokens a model can hold, from its config: rotary embeddings can be scaled to hold more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from proxytune.errors import UnsupportedModel

_STRETCHED = ("linear", "dynamic", "yarn", "longrope", "su")
"""Kinds of scaling whose `factor` is how much longer than before texts may be.

Llama 3's is not among them: it rescales slow frequencies only, and models state the length they hold.
"""


def rope_scalings(config: Any) -> list[Mapping[str, Any]]:
    """Return the rotary parameters of a text config: one object, or one per layer type.

    transformers standardises `rope_scaling`, its old name for them; configs of a model's own code may not.
    """
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(found, Mapping):
        return []
    of_layers = [value for value in found.values() if isinstance(value, Mapping)]
    return of_layers or [found]


def rope_kind(scaling: Mapping[str, Any]) -> str:
    """Return the kind of rotary embeddings, such as `default` or `yarn`."""
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def depends_on_length(kind: Any) -> bool:
    """Return whether angles of this kind depend on how long a sequence is, beside its positions."""
    return kind in ("longrope", "su") or "dynamic" in str(kind)


def check_gguf_angles(metadata: Mapping[str, Any], tensors: Collection[str], name: str) -> None:
    """Check that transformers computes the rotary angles that a GGUF file asks for.

    Raises:
        UnsupportedModel: The file scales them, and transformers leaves that out.
    """
    architecture = metadata.get("general.architecture")
    kind = metadata.get(f"{architecture}.rope.scaling.type") or "none"
    if "rope_freqs.weight" in tensors:
        kind = "llama3"
    if kind != "none" and architecture != "gpt-oss":
        raise UnsupportedModel(
            f"{name} scales its rotary embeddings ({kind}), which transformers does not read from a GGUF "
            "file, so it would compute other angles.\n"
            "hint: run it in llama.cpp (llama_cpp in the recipe), or take the model's safetensors"
        )


def max_context(config: Any) -> int | None:
    """Return the maximum number of tokens of a model with this text config; None if there is no limit.

    A scaled model holds `factor` times its original positions. Some configs give that number as
    `max_position_embeddings`, others leave the original one there, as the instructions for Qwen2.5 do.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    scalings = rope_scalings(config)
    if len(scalings) > 1:
        # Where layers differ, `max_position_embeddings` is what the model was trained for (Gemma 3).
        scalings = [each for each in scalings if rope_kind(each) != "linear"]
    original = getattr(config, "original_max_position_embeddings", None) or positions
    return max([positions, *(_stretched(each, original) for each in scalings)])


def _stretched(scaling: Mapping[str, Any], original: int) -> int:
    """Return how many tokens a scaling makes of the original positions; 0 if it names no factor."""
    factor = scaling.get("factor")
    original = scaling.get("original_max_position_embeddings") or original
    if rope_kind(scaling) not in _STRETCHED or not isinstance(factor, int | float):
        return 0
    return int(original * factor)
