"""How many tokens a model can hold, from its config: rotary embeddings can be scaled to hold more."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from proxytune.errors import CorruptModel, UnsupportedModel

_STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of scaling whose `factor` is how much longer than before texts may be.

Llama 3's and longrope are not among them: their models state the length they hold. This is vLLM's rule, too.
"""


_YARN = frozenset({"type", "factor", "original_context_length"})
"""What a GGUF file says of YaRN where it leaves the rest as published."""

_GGUF_ARCHITECTURES = frozenset({"llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe"})
"""Those whose layers all have the same angles, and whose scaling llama.cpp and transformers know alike."""


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


def gguf_angles(
    metadata: Mapping[str, Any],
    factors: Sequence[float] | None,
    tensors: Collection[str],
    name: str,
) -> dict[str, Any]:
    """Return the rotary parameters that a GGUF file scales its angles by, which transformers does not read.

    Args:
        metadata: The file's.
        factors: What it divides each frequency by (`rope_freqs.weight`); None for no such tensor.
        tensors: The names of its tensors.
        name: What errors call it.

    Returns:
        Parameters of transformers, without the base of the frequencies; empty if nothing is scaled.

    Raises:
        UnsupportedModel: It scales them in a way that is not known here.
        CorruptModel: A number is none, or is not above 0.
    """
    architecture = metadata.get("general.architecture")
    scaling = f"{architecture}.rope.scaling."
    given = {
        key.removeprefix(scaling): metadata[key] for key in metadata if key.startswith(scaling)
    }
    kind = given.get("type", "none")
    if architecture == "gpt-oss":  # which transformers does read
        return {}
    numbers = {key: each for key, each in given.items() if key in _YARN and key != "type"}
    numbers["freq_base"] = metadata.get(f"{architecture}.rope.freq_base", 1.0)
    for key, each in numbers.items():
        if not isinstance(each, int | float) or not 0 < each < math.inf:
            raise CorruptModel(
                f"{name}: {key} of its rotary embeddings is {each!r:.40}, and must be a number above 0.\n"
                "hint: convert or download the model again"
            )
    is_known = architecture in _GGUF_ARCHITECTURES and (factors is None or kind == "none")
    if factors is not None and kind == "none":
        if is_known and (found := _llama3(metadata, factors)):
            return found
        kind = "factors for single frequencies"
    elif any(tensor.startswith("rope_factors_") for tensor in tensors):
        kind = "longrope"
    elif kind == "none":
        return {}
    elif (
        is_known
        and kind == "linear"
        and _YARN >= given.keys() - {"finetuned"} >= {"type", "factor"}
    ):
        return {"rope_type": "linear", "factor": float(given["factor"])}
    elif is_known and kind == "yarn" and given.keys() - {"finetuned"} == _YARN:
        original = int(given["original_context_length"])
        return {
            "rope_type": "yarn",
            "factor": float(given["factor"]),
            "original_max_position_embeddings": original,
        }
    raise UnsupportedModel(
        f"{name} scales its rotary embeddings ({kind!s:.40}) in a way that transformers does not read from "
        "a GGUF file, so it would compute other angles.\n"
        "hint: run it in llama.cpp (llama_cpp in the recipe), or take the model's safetensors"
    )


def _llama3(metadata: Mapping[str, Any], factors: Sequence[float]) -> dict[str, Any] | None:
    """Return the parameters of Llama 3's rule if it gives these factors; None if it does not.

    Of the rule's four numbers, llama.cpp's files keep only what comes out. All Llama 3 models share three of
    them, and the fourth is the factor of the slowest frequency.
    """
    architecture = metadata.get("general.architecture")
    theta = metadata.get(f"{architecture}.rope.freq_base", 10000.0)
    low, high, original, factor = 1.0, 4.0, 8192, max(factors, default=0.0)
    if not (theta > 0 and 1 <= factor < math.inf):
        return None
    factor = round(factor, 3)  # it was divided in float32
    for index, given in enumerate(factors):
        turns = original * theta ** (-index / len(factors)) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(given, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


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
