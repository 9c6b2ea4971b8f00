"""Models among transformers' causal language models that do not predict a token from the tokens before it."""

from __future__ import annotations

from typing import Any

from proxytune.errors import UnsupportedModel

_OTHERWISE = {
    "cpmant": "reads a whole text in both directions for each token",
    "gemma4_assistant": "drafts from the keys and values of another model",
    "gemma4_unified_assistant": "drafts from the keys and values of another model",
    "reformer": "compares tokens within chunks of a text of fixed length",
    "xlm": "predicts the token in the place of a mask",
    "xlnet": "predicts tokens in the places of masks, in any order",
}
"""What models of a type do instead."""

_ENCODERS = frozenset({
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
})  # fmt: skip
"""Types that are decoders only where their config says so."""


def check_causal(config: Any, name: str) -> None:
    """Check that a model predicts the next token from those before it.

    Raises:
        UnsupportedModel: It does something else.
    """
    kind = config.model_type
    why = _OTHERWISE.get(kind)
    if kind in _ENCODERS and not getattr(config, "is_decoder", False):
        why = "reads a text in both directions (is_decoder is false in its config)"
    if why is not None:
        raise UnsupportedModel(
            f"{name} is a model of type {kind!r}, which {why}, so it does not say what follows a text.\n"
            "hint: name a model that predicts the next token"
        )
