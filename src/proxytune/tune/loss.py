"""Cross-entropy through output heads, alone or with a frozen base and anti-expert beside the expert.

Words: a model is a *body*, which makes hidden states, and a *head*, which makes logits of them: a linear
map, then perhaps a scale and a soft cap. Consistent Proxy Tuning (He et al. 2024, arXiv:2407.01155) trains
the expert E through the ensemble that decoding will use, with base M and anti-expert A frozen. Its logits
have two *forms*, which are the same at alpha = 1:

    steered     M + alpha * (E - A)      what decoding does with strength alpha
    paper       E + alpha * (M - A)      the objective as published

Logits of a whole batch never exist: a token has 100,000 of them and more. What is kept of the frozen models
is their hidden states, a few percent of that (`offsets.py` stores them); logits are made anew for a few rows
at a time, and turned into gradients at once, so that none are made twice.

All logits here are in the small model's order of tokens. Padding ids of its head are no token and have no
probability in the ensemble. Which positions are trained on is decided in `data.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from proxytune.errors import UnsupportedModel
from proxytune.vocab import Alignment, Vocabulary

Form = Literal["steered", "paper"]

CHUNK_ROWS = 128
"""Rows whose logits exist at once: 128 x 152,064 float32 values are 78 MB. More leave a processor's cache:
2,048 tokens through a head of 49,152 x 128 on two cores took 0.35 to 0.42 s with 64 or 128 rows, 0.56 to 0.78
with 256, and 0.6 with 16."""
NUM_CHECKED_TOKENS = 16
"""Random tokens `check_head` runs: every row of the head is compared at each of them."""


# Heads ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """What a model does to the last hidden states.

        logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)

    Args:
        weight: `[vocab, width]`.
        bias: `[vocab]`; -inf marks a row that is no token, whose logit is -inf whatever else is said here.
        scale: Multiplies the logits (Cohere, Granite, Falcon-H1); 1 for most models.
        softcap: The bound of Gemma 2's soft cap; None for a head without one.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits in float32.

        The product runs in autocast's dtype where autocast is on, otherwise in that of the tensors.

        Args:
            hidden: `[..., width]`, any float dtype.

        Returns:
            `[..., vocab]` float32.
        """
        dtype = _product_dtype(hidden, self.weight)
        logits = nn.functional.linear(hidden.to(dtype), self.weight.to(dtype)).float()
        if self.bias is not None:
            logits = logits + self.bias.float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
            if self.bias is not None:  # tanh would bring -inf back to -softcap
                logits = logits.masked_fill(self.bias.isneginf(), -torch.inf)
        return logits

    def detach(self) -> Head:
        """Return the head without gradients; it shares its tensors' memory."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def copy(self) -> Head:
        """Return the head without gradients, in memory of its own: training the model leaves it as it is."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return replace(self, weight=self.weight.detach().clone(), bias=bias)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Head:
        """Return the head on a device, its tensors detached; `dtype` None keeps theirs."""
        bias = None if self.bias is None else self.bias.detach().to(device, dtype)
        return Head(self.weight.detach().to(device, dtype), bias, self.scale, self.softcap)


def head_of(model: Any) -> Head:
    """Return the output head of a causal language model.

    Args:
        model: From transformers, or a PEFT model around one.

    Raises:
        UnsupportedModel: It has no linear head whose weight can be read.
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
        # Adapters on the head, quantised heads and sharded ones land here.
        found = "none" if layer is None else f"a {type(layer).__name__}"
        if layer is not None and weight is not None:
            found += f" whose weight is a {type(weight).__name__}"
        raise UnsupportedModel(
            f"{name} has no plain linear output head (found: {found}), and training computes its loss from "
            "that layer's weight.\n"
            "hint: keep adapters and quantisation off the output layer, or tune another small model"
        )
    if not weight.is_floating_point():
        raise UnsupportedModel(
            f"the output head of {name} is stored as {str(weight.dtype).removeprefix('torch.')}, and "
            "training needs it in a float dtype.\n"
            "hint: load the model without quantisation, or leave its output layer out of it"
        )
    config = inner.config.get_text_config()
    return Head(
        weight, layer.bias, _scale(config), getattr(config, "final_logit_softcapping", None)
    )


def _scale(config: Any) -> float:
    """Return what a model of this config multiplies its logits by; `check_head` catches what is not here."""
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
    """Whether a layer is of a class of PEFT's, without importing PEFT where it is not in use."""
    return any(c.__name__ == name and c.__module__.startswith("peft.") for c in type(layer).__mro__)


def _unwrapped(model: Any) -> Any:
    """Return the transformers model inside a PEFT model; adapters live in its layers and stay in place."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UnsupportedModel(
            f"the adapter is of the kind {model.active_peft_config.peft_type.value}, which puts virtual "
            "tokens before the text; the loss here runs the layers directly and would leave them out.\n"
            "hint: use LoRA"
        )
    return model.get_base_model()


def run_body(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the hidden states that enter the output head, without computing logits.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        input_ids: `[batch, length]`.
        attention_mask: `[batch, length]`, 1 at tokens; None where nothing is padded.

    Returns:
        `[batch, length, width]` in the model's dtype.

    Raises:
        UnsupportedModel: The model has no body apart from its head.
    """
    inner = _unwrapped(model)
    body = inner.base_model
    if body is inner or inner.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{type(inner).__name__} is not a decoder with an output head on top, so its hidden states "
            "cannot be had without its logits.\n"
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
        UnsupportedModel: They differ: between body and logits the model does what `Head` cannot say.
    """
    inner = _unwrapped(model)
    embedding = inner.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    high = min(embedding.shape[0], head.weight.shape[0])
    token_ids = torch.randint(high, (1, NUM_CHECKED_TOKENS), generator=generator)
    token_ids = token_ids.to(embedding.device)
    training = {module: module.training for module in inner.modules()}
    inner.eval()  # dropout would make any two runs differ
    try:
        expected = inner(input_ids=token_ids, use_cache=False, return_dict=True).logits.float()
        logits = head.logits(run_body(model, token_ids).to(head.weight.device))
    finally:
        for module, was_training in training.items():
            module.training = was_training
    expected = expected.to(logits.device)
    # The model rounds to its own dtype after every operation, this file only after the product.
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
        "hint: use another small model, or for a base that differs --method sft, which does not run it"
    )


# The frozen models ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class FrozenHeads:
    """The heads of base and anti-expert, and how their logits enter the ensemble.

        logits = base_factor * base + expert_factor * expert - anti_expert_factor * anti_expert

    Args:
        base: In the small model's order of tokens (`align_base_head`).
        anti_expert: Of the small model before tuning.
        base_factor: From `form_coefficients`, as is the next; the expert's goes to `cross_entropy`.
        anti_expert_factor: Counted positive where logits are subtracted.
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

        Where the anti-expert's own weights will be trained in place, give `anti_expert.copy()`.
        """
        return cls(base.detach(), anti_expert.detach(), base_factor, anti_expert_factor)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FrozenHeads:
        """Return the heads on a device; `dtype` None keeps theirs."""
        return FrozenHeads(
            self.base.to(device, dtype),
            self.anti_expert.to(device, dtype),
            self.base_factor,
            self.anti_expert_factor,
        )


@dataclass(frozen=True, slots=True, eq=False)
class FrozenPart:
    """The frozen models at the positions of a batch.

    Args:
        hidden: `[positions, base width + small width]`, any float dtype: the base's hidden states, then the
            anti-expert's.
        heads: What makes logits of them.
    """

    hidden: Tensor
    heads: FrozenHeads


class Coefficients(NamedTuple):
    """Factors of a form: `base * M + expert * E - anti_expert * A`."""

    base: float
    expert: float
    anti_expert: float


def form_coefficients(form: Form, alpha: float) -> Coefficients:
    """Return the factors on base, expert and anti-expert, the last one counted positive.

    Args:
        form: `steered` for `M + alpha * (E - A)`, `paper` for `E + alpha * (M - A)`.
        alpha: Strength, no unit.
    """
    if form == "steered":
        return Coefficients(1.0, alpha, alpha)
    return Coefficients(alpha, 1.0, alpha)


def base_ids(alignment: Alignment) -> Tensor:
    """Return the base's id of each of the small model's ids: the other way round than `Alignment`.

    Returns:
        `[small_width]`, on the CPU; -1 for ids that are no token of the base. Where one map is shared
        (`same`, `padded`) ids of padding below the last token stay as they are.
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
        head: The base's.
        alignment: Of the two vocabularies.
        small_vocabulary: Names the padding ids, which get a bias of -inf.

    Returns:
        A head of `small_width` rows. Its weight shares the memory of `head`'s where the order is the same and
        rows suffice: a second copy of a large model's head is a gigabyte. Rows of padding ids are then
        whatever the base has there, and zero otherwise.
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


# The loss ------------------------------------------------------------------------------------------


def cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    frozen: FrozenPart | None = None,
    expert_factor: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Return the sum of negative log-likelihoods of the targets, in nats.

    Gradients flow to `hidden`, and to the head's weight and bias where they require them; they are computed
    in the forward pass, chunk by chunk, and the backward pass only scales them. At most two float32 tensors
    of `[chunk_rows, vocab]` are alive at a time. Products run in autocast's dtype where autocast is on,
    otherwise in that of the tensors; everything after them in float32.

    Args:
        hidden: `[positions, width]`, the trained model's hidden states, any float dtype.
        head: The trained model's.
        targets: `[positions]`, ids in the small model's vocabulary.
        frozen: Base and anti-expert at the same positions; None trains the model by itself.
        expert_factor: The factor on the trained model's logits, from `form_coefficients`.
        chunk_rows: Rows whose logits exist at once.

    Returns:
        A float32 scalar.
    """
    assert hidden.dim() == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    if frozen is not None:
        widths = frozen.heads.base.weight.shape[1] + frozen.heads.anti_expert.weight.shape[1]
        assert frozen.hidden.shape == (len(hidden), widths), (frozen.hidden.shape, widths)
        trained = head.weight.requires_grad and _is_same(
            head.weight, frozen.heads.anti_expert.weight
        )
        assert not trained, (
            "training this head would change the anti-expert; give Head.copy() of it"
        )
    tensors = (hidden, head.weight, head.bias)
    wanted = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in tensors
    ]
    work = _Work(targets, head.scale, head.softcap, frozen, expert_factor, chunk_rows, wanted)
    if not any(wanted):
        with torch.no_grad():
            return work.run(*tensors)[0]
    loss: Tensor = _CrossEntropy.apply(*tensors, work)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Hands the gradients of `_Work` to autograd."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work
    ) -> Tensor:
        loss, gradients = work.run(hidden, weight, bias)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        upstream = grad_outputs[0]
        scaled = (None if g is None else (g * upstream).to(g.dtype) for g in gradients)
        return (*scaled, None)


class _Operand(NamedTuple):
    """A head, ready for products."""

    weight: Tensor  # [vocab, width] in the dtype of the product
    bias: Tensor | None  # finite: padding is masked once, in the sum
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, head: Head, hidden: Tensor) -> _Operand:
        bias = head.bias
        if bias is not None:
            # -inf times a factor of 0 would be NaN, and a soft cap would make it finite.
            bias = bias.float().masked_fill(bias.isneginf(), 0)
        weight = head.weight.to(_product_dtype(hidden, head.weight))
        return cls(weight, bias, head.scale, head.softcap)

    def add_to(self, total: Tensor, hidden: Tensor, factor: float) -> Tensor | None:
        """Add `factor` times the logits to `total`, `[rows, vocab]` float32, in place.

        Returns:
            For a head with a soft cap the hyperbolic tangents, `[rows, vocab]`: their derivative needs them.
        """
        hidden = hidden.to(self.weight.dtype)
        if self.softcap is None:
            factor *= self.scale
            if hidden.dtype == torch.float32:
                total.addmm_(hidden, self.weight.t(), alpha=factor)
            else:
                total.add_(hidden @ self.weight.t(), alpha=factor)
            if self.bias is not None:
                total.add_(self.bias, alpha=factor)
            return None
        tangents = (hidden @ self.weight.t()).float()
        if self.bias is not None:
            tangents.add_(self.bias)
        tangents.mul_(self.scale / self.softcap).tanh_()
        total.add_(tangents, alpha=factor * self.softcap)
        return tangents


class _Work(NamedTuple):
    """One call of `cross_entropy`, apart from the tensors that gradients flow to."""

    targets: Tensor
    scale: float
    softcap: float | None
    frozen: FrozenPart | None
    expert_factor: float
    chunk_rows: int
    wanted: list[bool]  # gradients of hidden, weight and bias

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss, and the gradients that are wanted."""
        head = Head(weight, bias, self.scale, self.softcap)
        expert = _Operand.of(head, hidden)
        frozen = None if self.frozen is None else _Frozen.of(self.frozen, head, self.expert_factor)
        grads: list[Tensor | None] = [
            torch.zeros_like(hidden) if self.wanted[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if self.wanted[1] else None,
            torch.zeros_like(weight[:, 0], dtype=torch.float32) if self.wanted[2] else None,
        ]
        biases = [bias, None if self.frozen is None else self.frozen.heads.base.bias]
        padding = [b.isneginf() for b in biases if b is not None]
        loss = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), self.chunk_rows):
            rows = slice(start, start + self.chunk_rows)
            loss += self._chunk(expert, frozen, padding, hidden, rows, grads)
        for index, like in enumerate((hidden, weight, bias)):
            grad = grads[index]
            if grad is not None and like is not None:
                grads[index] = grad.to(like.dtype)
        return loss, grads

    def _chunk(
        self,
        expert: _Operand,
        frozen: _Frozen | None,
        padding: Sequence[Tensor],
        hidden: Tensor,
        rows: slice,
        grads: list[Tensor | None],
    ) -> Tensor:
        """Return the loss of some rows, and add to the gradients.

        A function of its own, so that its tensors are gone before the next chunk's are made.
        """
        targets = self.targets[rows, None]
        logits = torch.zeros(len(targets), len(expert.weight), device=hidden.device)
        tangents = None
        if frozen is not None:
            frozen.add_to(logits, hidden[rows], rows)
        if self.expert_factor != 0 and not (frozen is not None and frozen.has_expert):
            tangents = expert.add_to(logits, hidden[rows], self.expert_factor)
        for mask in padding:
            logits.masked_fill_(mask, -torch.inf)
        # In place, to keep one tensor: logits become probabilities, then the loss's gradient.
        logits.sub_(logits.amax(1, keepdim=True))
        at_target = logits.gather(1, targets)
        sums = logits.exp_().sum(1, keepdim=True)
        loss = (sums.log() - at_target).sum()
        if not any(self.wanted) or self.expert_factor == 0:
            return loss
        gradient = logits.div_(sums)
        # Subtracted before any rounding: near 1 bfloat16 has steps of 1/256.
        gradient.scatter_add_(1, targets, -torch.ones_like(at_target))
        if tangents is not None:
            gradient.mul_(tangents.square_().neg_().add_(1))
        self._add_gradients(grads, gradient, hidden[rows], expert.weight, rows)
        return loss

    def _add_gradients(
        self,
        grads: list[Tensor | None],
        gradient: Tensor,
        hidden: Tensor,
        weight: Tensor,
        rows: slice,
    ) -> None:
        """Carry the gradient of a chunk's logits, before factor and scale, through the head."""
        factor = self.expert_factor * self.scale
        of_hidden, of_weight, of_bias = grads
        if of_bias is not None:
            of_bias.add_(gradient.sum(0), alpha=factor)
        gradient = gradient.to(weight.dtype)
        if of_hidden is not None:
            of_hidden[rows] = (gradient @ weight).mul_(factor)
        if of_weight is not None:
            hidden = hidden.to(weight.dtype)
            if weight.dtype == torch.float32:
                of_weight.addmm_(gradient.t(), hidden, alpha=factor)
            else:
                of_weight.add_(gradient.t() @ hidden, alpha=factor)


class _Frozen(NamedTuple):
    """The frozen models, ready for products."""

    base_hidden: Tensor
    small_hidden: Tensor
    base: _Operand
    anti_expert: _Operand
    base_factor: float
    expert_factor: float
    anti_expert_factor: float
    has_expert: bool  # expert and anti-expert share a head, and their logits come from one product

    @classmethod
    def of(cls, part: FrozenPart, expert: Head, expert_factor: float) -> _Frozen:
        heads = part.heads
        anti_expert = heads.anti_expert
        width = heads.base.weight.shape[1]
        base_hidden, small_hidden = part.hidden[:, :width], part.hidden[:, width:]
        is_shared = (
            expert.softcap is None
            and anti_expert.softcap is None
            and expert.scale == anti_expert.scale
            and _is_same(expert.weight, anti_expert.weight)
            and _is_same(expert.bias, anti_expert.bias)
        )
        return cls(
            base_hidden,
            small_hidden,
            _Operand.of(heads.base, base_hidden),
            _Operand.of(anti_expert, small_hidden),
            heads.base_factor,
            expert_factor,
            heads.anti_expert_factor,
            is_shared and expert_factor != 0,
        )

    def add_to(self, total: Tensor, expert_hidden: Tensor, rows: slice) -> None:
        """Add the frozen logits of some rows to `total`, and the expert's where the head is shared."""
        if self.base_factor != 0:
            self.base.add_to(total, self.base_hidden[rows], self.base_factor)
        small_hidden = self.small_hidden[rows]
        if self.has_expert:
            # Subtracted in float32, before the product rounds: expert and anti-expert are close.
            offset = expert_hidden.float() * self.expert_factor
            offset.sub_(small_hidden.float(), alpha=self.anti_expert_factor)
            unbiased = self.anti_expert._replace(bias=None)
            unbiased.add_to(total, offset, 1.0)
            if self.anti_expert.bias is not None:
                factor = (self.expert_factor - self.anti_expert_factor) * self.anti_expert.scale
                total.add_(self.anti_expert.bias, alpha=factor)
        elif self.anti_expert_factor != 0:
            self.anti_expert.add_to(total, small_hidden, -self.anti_expert_factor)


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are one and the same memory."""
    if one is None or other is None:
        return one is other
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
    )


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)
