"""What a cut is: a model's first and last layers, and between them a layer that stands for all others.

A *cut* is a causal language model of the same architecture as the model it is cut from, with fewer layers:
the first `k`, the *bridge*, and the last `m`. Embedding, final norm and head are the large model's. Here are
the rules that need no weights: which models can be cut, the config of a cut, and the names of its weights.
The bridge itself is computed in `cut/bridge.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from proxytune.errors import InvalidRequest, UnsupportedModel

ARCHITECTURES: Mapping[str, str] = {
    "gemma": "GemmaForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Classes of models that can be cut, by model type.

Each of their layers adds attention and then a gated product of two projections to the residual stream,
without a norm behind either, and all layers of a model are of the same kind.
"""

CUT_KEY = "proxytune_cut"
"""The key in a cut's config.json that says how it was made; other programs ignore it."""

_KEEP = re.compile(r"(\d{1,4})\+(\d{1,4})")
_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..+)")


@dataclass(frozen=True, slots=True)
class Keep:
    """How many layers a cut keeps.

    Args:
        first: Number of first layers.
        last: Number of last layers.

    Raises:
        InvalidRequest: One of them is below 1.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if min(self.first, self.last) < 1:
            raise InvalidRequest(
                f"a cut cannot keep {self.first} first and {self.last} last layers: it needs at least one of "
                "each.\nhint: --keep 3+3 keeps the first three and the last three"
            )

    @classmethod
    def parse(cls, text: str) -> Keep:
        """Return what a text such as `3+3` says.

        Raises:
            InvalidRequest: It says nothing of that form.
        """
        match = _KEEP.fullmatch(text.strip())
        if match is None:
            raise InvalidRequest(
                f"keep is {text!r}, and must be two numbers of layers, the first and the last ones.\n"
                "hint: --keep 3+3"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.first}+{self.last}"

    @property
    def num_layers(self) -> int:
        """Number of layers of the cut, the bridge included."""
        return self.first + 1 + self.last

    @property
    def bridge(self) -> int:
        """Index of the bridge among the cut's layers."""
        return self.first

    def is_idle(self, module: str) -> bool:
        """Whether a module of the cut, by its name, belongs to the bridge's attention, which is zero."""
        return module.startswith(f"model.layers.{self.bridge}.self_attn.")

    def source(self, layer: int, num_layers: int) -> int | None:
        """Return which of the large model's `num_layers` a layer of the cut is; None for the bridge."""
        if layer == self.bridge:
            return None
        return layer if layer < self.bridge else num_layers - self.num_layers + layer


def check_can_cut(config: Any, keep: Keep, name: str) -> None:
    """Check that a model can be cut.

    Args:
        config: Its transformers config.
        keep: What is to be kept of it.
        name: What errors call it.

    Raises:
        UnsupportedModel: Its layers are of another kind, or differ from each other.
        InvalidRequest: It does not have that many layers.
    """
    kind = config.model_type
    why = _why_not(config)
    if why is not None:
        raise UnsupportedModel(
            f"{name} is a model of type {kind!r}, and it cannot be cut: {why}.\n"
            f"hint: models of the types {', '.join(sorted(ARCHITECTURES))} can be; otherwise use a smaller "
            "model of the same family as the anti-expert"
        )
    num_layers = config.num_hidden_layers
    if keep.num_layers >= num_layers:
        raise InvalidRequest(
            f"a cut of {keep} layers and the bridge has {keep.num_layers}, and {name} has only {num_layers}, "
            "so it would not be smaller.\nhint: keep fewer layers"
        )


def _why_not(config: Any) -> str | None:
    """Return why a model cannot be cut, to follow a colon; None if it can be."""
    text = config.get_text_config(decoder=True)
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok")
    if any(getattr(text, key, None) for key in experts):
        return "its layers hold a mixture of experts"
    if getattr(text, "kv_lora_rank", None):
        return "it has latent attention"
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    if len(kinds) > 1:
        return f"its layers differ ({', '.join(kinds)}), and those of a cut must be alike"
    if config.model_type not in ARCHITECTURES:
        return "how to write the bridge as one of its layers is not known"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised, and the bridge is computed from the original ones"
    return None


def cut_config(config: Any, keep: Keep, details: Mapping[str, Any] | None = None) -> Any:
    """Return the config of a cut of a model.

    Args:
        config: The large model's, which stays as it is.
        keep: Which layers are kept.
        details: What else the key `CUT_KEY` is to say; None leaves the key out.
    """
    own = copy.deepcopy(config)
    own.num_hidden_layers = keep.num_layers
    kinds = getattr(own, "layer_types", None)
    if kinds:
        own.layer_types = [kinds[0]] * keep.num_layers
    if hasattr(own, "max_window_layers"):
        own.max_window_layers = min(own.max_window_layers, keep.num_layers)
    own.architectures = [ARCHITECTURES[own.model_type]]
    if details is not None:
        setattr(own, CUT_KEY, {"keep": [keep.first, keep.last], **details})
    return own


def base_names(names: Iterable[str], keep: Keep, num_layers: int) -> dict[str, str]:
    """Return the large model's name of each weight of a cut, leaving out those of the bridge.

    Args:
        names: Names of the cut's weights.
        keep: Which layers are kept.
        num_layers: Number of the large model's layers.
    """
    found = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        layer = None if match is None else keep.source(int(match[2]), num_layers)
        if match is None:
            found[name] = name
        elif layer is not None:
            found[name] = f"{match[1]}{layer}{match[3]}"
    return found


def cut_keep(config: Any) -> Keep | None:
    """Return what a cut's config says was kept; None for a model that is no cut."""
    details = getattr(config, CUT_KEY, None)
    kept = details.get("keep") if isinstance(details, Mapping) else None
    if not isinstance(kept, list) or len(kept) != 2 or not all(type(n) is int for n in kept):
        return None
    keep = Keep(*kept) if min(kept) >= 1 else None
    return keep if keep is not None and keep.num_layers == config.num_hidden_layers else None
