"""Output heads: read from models, checked, frozen, and brought into the small model's order of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from proxytune.errors import UnsupportedModel
from proxytune.text.vocab import Alignment, Vocabulary
from proxytune.tune.settings import Form

NUM_CHECKED_TOKENS = 16
"""Random tokens `check_head` runs: every row of the head is compared at each of them."""


# Heads ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """How a model computes logits from its last hidden states.

        logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)

    Args:
        weight: `[vocab, width]`.
        bias: `[vocab]`; -inf marks a row that is not a token, and its logit is always -inf.
        scale: Factor on the logits (Cohere, Granite, Falcon-H1); 1 for most models.
        softcap: Bound of Gemma 2's soft cap; None for a head without one.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits in float32.

        The product uses autocast's dtype if autocast is on, otherwise that of the tensors.

        Args:
            hidden: `[..., width]`, any float dtype.

        Returns:
            `[..., vocab]` float32.
        """
        dtype = product_dtype(hidden, self.weight)
        logits = nn.functional.linear(hidden.to(dtype), self.weight.to(dtype)).float()
        if self.bias is not None:
            logits = logits + self.bias.float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
            if self.bias is not None:  # tanh has turned -inf into -softcap.
                logits = logits.masked_fill(self.bias.isneginf(), -torch.inf)
        return logits

    def detach(self) -> Head:
        """Return the head without gradients; it shares its tensors' memory."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def copy(self) -> Head:
        """Return a copy of the head without gradients, which training the model does not change."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return replace(self, weight=self.weight.detach().clone(), bias=bias)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Head:
        """Return the head on a device, with its tensors detached; `dtype` None keeps their dtype."""
        bias = None if self.bias is None else self.bias.detach().to(device, dtype)
        return Head(self.weight.detach().to(device, dtype), bias, self.scale, self.softcap)


def head_of(model: Any) -> Head:
    """Return the output head of a causal language model.

    Args:
        model: A model of transformers, or a PEFT model around one.

    Raises:
        UnsupportedModel: The model has no linear head whose weight can be read.
    """
    inner = _unwrapped(model)
    name = type(inner).__name__
    layer = inner.get_output_embeddings()
    if _is_peft_wrapper(layer, "ModulesToSaveWrapper"):
        if layer.disable_adapters or not layer.active_adapters:
            layer = layer.original_module
        else:
            layer = layer.modules_to_save[layer.active_adapters[0]]
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or type(weight) not in (Tensor, nn.Parameter):
        # Heads with adapters, quantised heads and sharded heads end up here.
        found = "none" if layer is None else f"a {type(layer).__name__}"
        if layer is not None and weight is not None:
            found += f" whose weight is a {type(weight).__name__}"
        raise UnsupportedModel(
            f"{name} has no plain linear output head (found: {found}), and training needs that layer's "
            "weight to compute the loss.\n"
            "hint: keep adapters and quantisation off the output layer, or tune another small model"
        )
    if not weight.is_floating_point():
        raise UnsupportedModel(
            f"the output head of {name} is stored as {str(weight.dtype).removeprefix('torch.')}, and "
            "training needs it in a float dtype.\n"
            "hint: load the model without quantisation, or exclude its output layer from it"
        )
    config = inner.config.get_text_config()
    return Head(
        weight, layer.bias, _scale(config), getattr(config, "final_logit_softcapping", None)
    )


def _scale(config: Any) -> float:
    """Return the factor on a model's logits; `check_head` catches models that this does not know."""
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, key, None)
        if isinstance(value, int | float):
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # One key, two meanings: HyperCLOVA X multiplies by it; Granite and MiniCPM3 divide.
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _is_peft_wrapper(layer: object, name: str) -> bool:
    """Whether a layer has a class of PEFT's, without importing PEFT when it is not in use."""
    return any(c.__name__ == name and c.__module__.startswith("peft.") for c in type(layer).__mro__)


def _unwrapped(model: Any) -> Any:
    """Return the transformers model inside a PEFT model; its adapters stay in its layers."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UnsupportedModel(
            f"the adapter is of the kind {model.active_peft_config.peft_type.value}, which puts virtual "
            "tokens before the text; training runs the layers directly and would leave them out.\n"
            "hint: use LoRA"
        )
    return model.get_base_model()


def run_body(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the hidden states that enter the output head, without computing logits.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        input_ids: `[batch, length]`.
        attention_mask: `[batch, length]`, 1 at tokens; None if nothing is padded.

    Returns:
        `[batch, length, width]` in the model's dtype.

    Raises:
        UnsupportedModel: The model is not a body with a head on top.
    """
    inner = _unwrapped(model)
    body = inner.base_model
    if body is inner or inner.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{type(inner).__name__} is not a decoder with an output head on top, so its hidden states "
            "cannot be computed without its logits.\n"
            "hint: tune a decoder-only causal language model"
        )
    output = body(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


@torch.no_grad()
def check_head(model: Any, head: Head) -> None:
    """Compare this file's logits with the model's own on a few random tokens.

    Raises:
        UnsupportedModel: They differ, so between body and logits the model does more than `Head` does.
    """
    inner = _unwrapped(model)
    embedding = inner.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    high = min(embedding.shape[0], head.weight.shape[0])
    token_ids = torch.randint(high, (1, NUM_CHECKED_TOKENS), generator=generator)
    token_ids = token_ids.to(embedding.device)
    training = {module: module.training for module in inner.modules()}
    inner.eval()  # With dropout, any two runs would differ.
    try:
        expected = inner(input_ids=token_ids, use_cache=False, return_dict=True).logits.float()
        logits = head.logits(run_body(model, token_ids).to(head.weight.device))
    finally:
        for module, was_training in training.items():
            module.training = was_training
    expected = expected.to(logits.device)
    # The model rounds to its dtype after every operation, `Head` only after the product.
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 2e-2
    differs = "another number of them"
    if logits.shape == expected.shape:
        difference = float((logits - expected).abs().max())
        largest = float(expected.abs().max())
        if difference <= tolerance * max(largest, 1e-6):
            return
        differs = f"by up to {difference:.3g}, where the largest is {largest:.3g}"
    raise UnsupportedModel(
        f"the logits of {type(inner).__name__} are not what its output layer makes of its hidden states "
        f"(they differ: {differs}), so a loss computed from hidden states would train for another model.\n"
        "hint: use another small model; if it is the base, use --method sft, which does not run it"
    )


# The frozen models ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class FrozenHeads:
    """The heads of base and anti-expert, and how their logits enter the ensemble.

        logits = base_factor * base + expert_factor * expert - anti_expert_factor * anti_expert

    Args:
        base: The base's head, in the small model's order of tokens (`align_base_head`).
        anti_expert: The head of the small model before tuning.
        base_factor: Factor on the base's logits, from `form_coefficients`.
        anti_expert_factor: Factor on the anti-expert's logits, which are subtracted, from
            `form_coefficients`. The expert's factor goes to `cross_entropy`.
    """

    base: Head
    anti_expert: Head
    base_factor: float = 1.0
    anti_expert_factor: float = 1.0

    @classmethod
    def of(
        cls,
        base: Head,
        anti_expert: Head,
        *,
        base_factor: float = 1.0,
        anti_expert_factor: float = 1.0,
    ) -> FrozenHeads:
        """Return heads that keep no model alive and take no gradient; they share the weights' memory.

        If the anti-expert's weights will be trained in place, give `anti_expert.copy()`.
        """
        return cls(base.detach(), anti_expert.detach(), base_factor, anti_expert_factor)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FrozenHeads:
        """Return the heads on a device; `dtype` None keeps their dtype."""
        base, anti_expert = self.base.to(device, dtype), self.anti_expert.to(device, dtype)
        return replace(self, base=base, anti_expert=anti_expert)


@dataclass(frozen=True, slots=True, eq=False)
class FrozenPart:
    """The frozen models at the positions of a batch.

    Args:
        hidden: `[positions, base width + small width]`, any float dtype: the base's hidden states, then the
            anti-expert's.
        heads: The heads that compute logits from them.
    """

    hidden: Tensor
    heads: FrozenHeads


@dataclass(frozen=True, slots=True, eq=False)
class BasePart:
    """The frozen base alone at the positions of a batch.

    Args:
        hidden: `[positions, width]`, its hidden states, any float dtype.
        head: Its head, in the small model's order of tokens (`align_base_head`).
    """

    hidden: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden)


@dataclass(frozen=True, slots=True, eq=False)
class ShownPart:
    """What a base shows of its distribution at the positions of a batch.

    Args:
        token_ids: `[positions, shown]`, ids of the small model's vocabulary, each once per position.
        logprobs: `[positions, shown]`, natural-log probabilities; -inf for a slot without a token.
    """

    token_ids: Tensor
    logprobs: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)


class Coefficients(NamedTuple):
    """Factors in `base * M + expert * E - anti_expert * A`."""

    base: float
    expert: float
    anti_expert: float


def form_coefficients(form: Form, alpha: float) -> Coefficients:
    """Return the factors on base, expert and anti-expert; the anti-expert's is subtracted.

    Args:
        form: `steered` for `M + alpha * (E - A)`, `paper` for `E + alpha * (M - A)`.
        alpha: Strength, no unit.
    """
    if form == "steered":
        return Coefficients(1.0, alpha, alpha)
    return Coefficients(alpha, 1.0, alpha)


def base_ids(alignment: Alignment) -> Tensor:
    """Return the base's id of each of the small model's ids: the inverse of `Alignment`.

    Returns:
        `[small_width]`, on the CPU; -1 for ids that are not a token of the base. If the vocabularies share
        their ids (no `small_ids`), padding ids below the last token stay as they are.
    """
    ids = torch.full((alignment.small_width,), -1)
    if alignment.small_ids is None:
        num_shared = min(alignment.num_shared, alignment.small_width)
        ids[:num_shared] = torch.arange(num_shared)
        return ids
    small_ids = alignment.small_ids.cpu()
    in_base = (small_ids >= 0).nonzero().flatten()
    ids[small_ids[in_base]] = in_base
    return ids


def align_base_head(head: Head, alignment: Alignment, small_vocabulary: Vocabulary) -> Head:
    """Bring the rows of the base's head into the small model's order of tokens.

    Args:
        head: The base's head.
        alignment: Alignment of the two vocabularies.
        small_vocabulary: The small model's vocabulary; its padding ids get a bias of -inf.

    Returns:
        A head of `small_width` rows. If the order is the same and the base has enough rows, its weight shares
        memory with `head`'s, because a copy of a large model's head takes a gigabyte. Rows of padding ids
        then keep the base's values; otherwise they are zero.
    """
    ids = base_ids(alignment)
    padding = ids < 0
    padding[small_vocabulary.padding_ids] = True
    device = head.weight.device
    if alignment.small_ids is None and alignment.small_width <= alignment.base_width:
        weight = head.weight[: alignment.small_width]
        bias = None if head.bias is None else head.bias[: alignment.small_width]
    else:
        gather = ids.clamp(min=0).to(device)
        weight = head.weight.detach().index_select(0, gather)
        weight[padding.to(device)] = 0
        bias = None if head.bias is None else head.bias.detach().index_select(0, gather)
    if padding.any():
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        bias = bias.detach().masked_fill(padding.to(device), -torch.inf)
    return Head(weight, bias, head.scale, head.softcap)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which the hidden states are multiplied by the head's weight."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)
