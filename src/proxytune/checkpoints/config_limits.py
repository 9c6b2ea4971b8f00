"""What a model's config.json may say, checked before anything is built from it.

transformers' config classes make lists with an item per layer, its models a module per layer and expert, and
torch allocates what the sizes multiply to. So each number has a limit, far above that of any model known
today, and must also agree with the stored tensors. What the limits let through is cheap to build without
values, and the result shows what the weights would need (`check_empty_model`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from proxytune.checkpoints.faults import shown
from proxytune.checkpoints.headers import StoredTensor
from proxytune.errors import CorruptModel, UnsafeModel, UnsupportedModel

HINT = "\nhint: copy or download the model again"


class _Limit(NamedTuple):
    """Between which numbers the values of some keys lie; -1 stands for "none" in many configs."""

    keys: re.Pattern[str]
    lowest: int
    highest: int


# The first row whose pattern matches the whole key counts; a number in a list belongs to the list's key.
_LIMITS = tuple(
    _Limit(re.compile(keys), lowest, highest)
    for keys, lowest, highest in (
        # Negative ids stand for images and for "none". 32 bits hold every id that torch or Rust takes.
        (r"(\w+_)?(ids?|index|indices|indexes)", -(2**31), 2**31 - 1),
        # The deepest models have some 200 layers. Some keys name one, from the end if negative.
        (r"(\w+_)?layers?|depth|block_count", -10_000, 10_000),
        # Some 1,000 experts today.
        (r"\w*experts?\w*", -1, 2**16),
        # A million tokens (XLM-V) is the largest vocabulary today, 20 million n-grams the largest table.
        (r"\w*vocab\w*|num_embeddings|n_words", -1, 2**27),
        # Some 10,000,000 positions today. A table over positions counts as a buffer (`check_empty_model`).
        (r"\w*(position\w*|length|_len|window\w*|context\w*|ctx)", -1, 2**30),
        # The widest layers have some 200,000 outputs.
        (
            r"\w*(_size|_dims?|_rank|_channels|_?heads?|head_count\w*|embd|d_model|d_ff|inner|d_state)",
            -1,
            2**24,
        ),
        # Labels, codebooks, groups, stages, repetitions.
        (r"(num|n)_(?!params|parameters)\w+", -1, 2**16),
    )
)
_HIGHEST_OF_ANY = 2**63 - 1
"""The largest whole number that torch takes, for all other keys."""

_MAX_DEPTH = 32
"""Nesting; a config in a config in a config has six levels."""

_NOT_NUMBERS = ("id2label", "label2id", "task_specific_params")
"""Keys of free text and tables of labels, from which no model takes its size."""

# The lowest value of what is read from a text model's config, by transformers' common names.
_NEEDED = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 0,
    "num_key_value_heads": 0,
    "intermediate_size": 0,
    "head_dim": 0,
    "max_position_embeddings": -1,
    "sliding_window": -1,
}
_KERNEL_KEYS = frozenset({"attn_implementation", "_attn_implementation"})
_TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")

_TABLES_IN_PYTHON = ("distilbert", "flaubert", "marian", "pegasus", "roformer", "xlm")
"""Kinds of model whose position tables transformers computes number by number, in Python."""

_TABLE_POSITIONS = 2**14


def check_raw_config(raw: Mapping[str, Any], name: str) -> None:
    """Check the object in a config.json before transformers sees it.

    Args:
        raw: The object.
        name: The model's name in errors.

    Raises:
        CorruptModel: A number is beyond its limit, or a value has the wrong type.
        UnsafeModel: It would load code from the Hub.
    """
    architectures = raw.get("architectures")
    if architectures is not None and not _is_list_of(architectures, str):
        raise _corrupt(name, "architectures", architectures, "a list of names")
    for key in ("dtype", "torch_dtype", "model_type"):
        if not isinstance(raw.get(key), str | dict | None):
            raise _corrupt(name, key, raw[key], "a name")
    for key in ("quantization_config", "rope_scaling", "rope_parameters", "text_config"):
        if not isinstance(raw.get(key), dict | None):
            raise _corrupt(name, key, raw[key], "an object")
    if raw.get("configuration_files"):
        # transformers would read another file in place of the one that is checked here.
        raise _corrupt(name, "configuration_files", raw["configuration_files"], "left out")
    for path, key, value in _leaves(raw, name):
        # transformers also takes an object, with a kernel for each part of the model.
        if not _KERNEL_KEYS.isdisjoint(path.split(".")) and "/" in str(value):
            raise UnsafeModel(
                f"the config.json of {name} asks for the attention kernel {value!r}, which is code from the "
                "Hub.\nhint: take the line out of its config.json"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        limit = _limit_of(key)
        if limit is not None and not limit.lowest <= value <= limit.highest:
            lowest = max(limit.lowest, _NEEDED.get(key, limit.lowest))
            raise _corrupt(name, path, value, f"between {lowest} and {limit.highest}")
        if isinstance(value, int) and abs(value) > _HIGHEST_OF_ANY:
            raise _corrupt(name, path, value, "a number of 64 bits")
    kind = raw.get("model_type")
    positions = raw.get("max_position_embeddings", raw.get("n_positions"))
    if kind in _TABLES_IN_PYTHON and isinstance(positions, int) and positions > _TABLE_POSITIONS:
        raise _corrupt(name, "max_position_embeddings", positions, f"at most {_TABLE_POSITIONS}")


def _limit_of(key: str) -> _Limit | None:
    return next((limit for limit in _LIMITS if limit.keys.fullmatch(key)), None)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str, Any]]:
    """Yield each text, number, truth value and null with its path and the key that it belongs to."""
    waiting: list[tuple[str, str, Any, int]] = [("", "", value, 0)]
    while waiting:
        path, key, value, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise CorruptModel(
                f"the config.json of {name} is nested more than {_MAX_DEPTH} levels deep, at "
                f"{path[:80]!r}.{HINT}"
            )
        if isinstance(value, Mapping):
            waiting += [
                (f"{path}.{inner}" if path else inner, inner, item, depth + 1)
                for inner, item in value.items()
                if inner not in _NOT_NUMBERS
            ]
        elif isinstance(value, list):
            waiting += [(path, key, item, depth + 1) for item in value]
        else:
            yield path, key, value


def check_config(config: Any, name: str) -> None:
    """Check the types of what this package reads from a transformers config.

    Raises:
        CorruptModel: A value has the wrong type or sign.
    """
    text = config.get_text_config(decoder=True)
    for key, lowest in _NEEDED.items():
        for value in values_of(text, key):
            if value is not None and not (_is_int(value) and value >= lowest):
                raise _corrupt(name, key, value, f"a whole number from {lowest} on")
    if not _is_int(getattr(text, "vocab_size", None)):
        raise CorruptModel(f"the config.json of {name} has no vocab_size.{HINT}")
    for key in _TOKEN_IDS:
        for owner in (config, text):
            token_ids(getattr(owner, key, None), f"{key} in the config.json of {name}")


def values_of(config: Any, key: str) -> list[Any]:
    """Return what a transformers config says for a key: one value, or one per layer if layers differ."""
    try:
        value = getattr(config, key, None)
    except RuntimeError:  # transformers does not give out the general value then
        value = [getattr(layer, key, None) for layer in config.per_layer_config]
    return list(value) if isinstance(value, list | tuple) else [value]


def token_ids(value: Any, what: str) -> list[int]:
    """Return the ids in a value that is one token id, a list of them, or None.

    Args:
        value: As it is in a file.
        what: What it is, in errors.

    Raises:
        CorruptModel: It is something else.
    """
    values = value if isinstance(value, list | tuple) else [value]
    found = [item for item in values if item is not None]
    # The sizes hold for what comes from a GGUF file or a tokenizer, too.
    if not all(_is_int(item) and abs(item) < 2**31 for item in found):
        raise CorruptModel(f"{what} is {shown(value)}, which is no token id.{HINT}")
    return found


def check_num_layers(
    num_layers: Any, tensors: Mapping[str, StoredTensor], name: str, *, where: str = "config.json"
) -> None:
    """Check that the stored tensors belong to as many layers as the config says.

    More stored layers than that are fine: some models keep layers that only predict further ahead.

    Raises:
        CorruptModel: There are fewer.
    """
    indices = [int(part) for key in tensors for part in re.findall(r"\.(\d{1,9})\.", key)]
    if indices and _is_int(num_layers) and num_layers > max(indices) + 1:
        raise CorruptModel(
            f"the {where} of {name} says {num_layers} layers, and its tensors belong to "
            f"{max(indices) + 1}, so config and weights belong to two models.{HINT}"
        )


def check_gguf_metadata(
    metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor], name: str
) -> None:
    """Check the numbers in a GGUF header from which transformers makes a config.

    Raises:
        CorruptModel: A number is beyond its limit, or disagrees with the tensors.
        UnsupportedModel: The architecture has no name.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise UnsupportedModel(f"{name} names no architecture in its header.{HINT}")
    for key, value in metadata.items():
        limit = _limit_of(key.rpartition(".")[2])
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if limit is not None and is_number and not limit.lowest <= value <= limit.highest:
            raise _corrupt(
                name, key, value, f"between {limit.lowest} and {limit.highest}", "header"
            )
    num_layers = metadata.get(f"{architecture}.block_count")
    check_num_layers(num_layers, tensors, name, where="header")


_FREE_ELEMENTS = 2**26
"""Number of elements that a model may have beyond its stored ones: causal masks, tables of positions."""


def check_empty_model(
    model: Any, tensors: Mapping[str, StoredTensor], name: str, *, is_packed: bool
) -> None:
    """Check that a model, built without values, needs no more memory than its stored tensors account for.

    Args:
        model: On the meta device.
        tensors: The stored tensors; nothing is checked if they are not known.
        name: The model's name in errors.
        is_packed: Whether an element of a stored tensor may hold several weights.

    Raises:
        CorruptModel: It needs far more, or its embedding has another shape.
    """
    if not tensors:
        return
    stored = sum(tensor.num_elements for tensor in tensors.values())
    built = sum(part.numel() for parts in (model.parameters(), model.buffers()) for part in parts)
    # A tied head counts once when it is built and may be stored twice or never.
    if built > (16 if is_packed else 2) * stored + _FREE_ELEMENTS:
        raise CorruptModel(
            f"the config.json of {name} describes a model of {built:,} numbers, and {stored:,} are stored, "
            f"so config and weights belong to two models.{HINT}"
        )
    embedding: Any = getattr(model.get_input_embeddings(), "weight", None)
    for key, parameter in model.named_parameters():
        if parameter is not embedding or key not in tensors or is_packed:
            continue
        if tensors[key].shape != tuple(embedding.shape):
            raise CorruptModel(
                f"the config.json of {name} describes an embedding of {list(embedding.shape)}, and {key} has "
                f"the shape {list(tensors[key].shape)}, so config and weights belong to two models.{HINT}"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _corrupt(
    name: str, key: str, value: Any, expected: str, where: str = "config.json"
) -> CorruptModel:
    return CorruptModel(
        f"the {where} of {name} says {key[:100]} {shown(value)}, which should be {expected}.{HINT}"
    )
