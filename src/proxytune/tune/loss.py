"""Losses through output heads: cross-entropy, alone or with frozen models, and divergence from the base.

Words: a model is a *body*, which computes hidden states, and a *head*, which computes logits from them: a
linear map, then perhaps a scale and a soft cap. Consistent Proxy Tuning (He et al. 2024, arXiv:2407.01155)
trains the expert E through the ensemble that decoding will use, with base M and anti-expert A frozen. Its
logits have two *forms*, which agree at alpha = 1:

    steered     M + alpha * (E - A)      what decoding does with strength alpha
    paper       E + alpha * (M - A)      the objective as published

A calibrated anti-expert A' learns from the base's distribution instead of a text, by the divergence
KL(M || A') at the same positions. Where a base shows only its most likely tokens, the others count as one.

A token has 100,000 logits and more, so those of a whole batch never exist. Of the frozen models only hidden
states are kept, a few percent of that size (`offsets.py` stores them). Logits are computed for a few rows at
a time and turned into gradients at once, so that none are computed twice.

All logits here are in the small model's order of tokens. Padding ids of its head are not tokens and have no
probability in the ensemble. Which positions are trained on is decided in `encode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from proxytune.tune.heads import BasePart, FrozenPart, Head, ShownPart, product_dtype

CHUNK_ROWS = 128
"""Rows whose logits exist at once: 128 x 152,064 float32 values are 78 MB. More rows do not fit into a
processor's cache: 2,048 tokens through a head of 49,152 x 128 on two cores took 0.35 to 0.42 s with 64 or 128
rows, 0.56 to 0.78 s with 256, and 0.6 s with 16."""

SMALLEST_REST = 1e-6
"""Lowest probability of all tokens that a base does not show together: float32 sums of probabilities are not
more exact."""


def cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    frozen: FrozenPart | None = None,
    expert_factor: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Return the sum of the targets' negative log-likelihoods, in nats.

    Gradients flow to `hidden`, and to the head's weight and bias if they require them. They are computed in
    the forward pass, chunk by chunk; the backward pass only scales them. At most two float32 tensors of
    `[chunk_rows, vocab]` are alive at a time. Products use autocast's dtype if autocast is on, otherwise that
    of the tensors; everything after them is float32.

    Args:
        hidden: `[positions, width]`, the trained model's hidden states, any float dtype.
        head: The trained model's head.
        targets: `[positions]`, ids in the small model's vocabulary.
        frozen: Base and anti-expert at the same positions; None trains the model by itself.
        expert_factor: Factor on the trained model's logits, from `form_coefficients`.
        chunk_rows: Number of rows whose logits exist at once.

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
    return _loss(hidden, head, _Tokens(targets), frozen, expert_factor, chunk_rows)


def divergence(
    hidden: Tensor, head: Head, base: BasePart | ShownPart, *, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Return the sum over positions of KL(base || trained model), in nats.

    Both distributions are over the tokens that both models have. Of a base that shows a part, the tokens that
    it does not show are one event, whose probability is what the shown ones leave: a lower bound of the
    divergence, equal to it if the two models agree about the proportions within that event.

    Gradients are computed as in `cross_entropy`. At most three float32 tensors of `[chunk_rows, vocab]` are
    alive at a time.

    Args:
        hidden: `[positions, width]`, the trained model's hidden states, any float dtype.
        head: The trained model's head.
        base: The base at the same positions.
        chunk_rows: Number of rows whose logits exist at once.

    Returns:
        A float32 scalar.
    """
    assert hidden.dim() == 2 and len(base) == len(hidden), (hidden.shape, len(base))
    objective = _Base.of(base, head) if isinstance(base, BasePart) else _Shown(base)
    return _loss(hidden, head, objective, None, 1.0, chunk_rows)


def _loss(
    hidden: Tensor,
    head: Head,
    objective: _Objective,
    frozen: FrozenPart | None,
    expert_factor: float,
    chunk_rows: int,
) -> Tensor:
    tensors = (hidden, head.weight, head.bias)
    wanted = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in tensors
    ]
    work = _Work(objective, head.scale, head.softcap, frozen, expert_factor, chunk_rows, wanted)
    if not any(wanted):
        with torch.no_grad():
            return work.run(*tensors)[0]
    loss: Tensor = _Chunked.apply(*tensors, work)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    """Passes the gradients of `_Work` to autograd."""

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
            # A factor of 0 would turn -inf into NaN, and a soft cap would make it finite.
            bias = bias.float().masked_fill(bias.isneginf(), 0)
        weight = head.weight.to(product_dtype(hidden, head.weight))
        return cls(weight, bias, head.scale, head.softcap)

    def add_to(self, total: Tensor, hidden: Tensor, factor: float) -> Tensor | None:
        """Add `factor` times the logits to `total`, `[rows, vocab]` float32, in place.

        Returns:
            For a head with a soft cap, the hyperbolic tangents `[rows, vocab]`, which its derivative needs.
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


class _Objective(Protocol):
    """What logits are compared with."""

    @property
    def padding(self) -> Sequence[Tensor]:
        """`[vocab]` each, true at ids that are not tokens."""
        ...

    def take(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the loss of some rows, and turn their logits into its gradient, in place.

        Args:
            logits: `[rows, vocab]` float32, -inf at padding.
            rows: The positions they belong to.
        """
        ...


class _Tokens(NamedTuple):
    """The cross-entropy against given tokens."""

    targets: Tensor
    padding: Sequence[Tensor] = ()

    def take(self, logits: Tensor, rows: slice) -> Tensor:
        targets = self.targets[rows, None]
        logits.sub_(logits.amax(1, keepdim=True))
        at_target = logits.gather(1, targets)
        sums = logits.exp_().sum(1, keepdim=True)
        gradient = logits.div_(sums)
        # Subtract before rounding: near 1, bfloat16 has steps of 1/256.
        gradient.scatter_add_(1, targets, -torch.ones_like(at_target))
        return (sums.log() - at_target).sum()


class _Base(NamedTuple):
    """The divergence from a base whose hidden states are known."""

    base: _Operand
    hidden: Tensor
    padding: Sequence[Tensor]
    has_padding: bool  # of either model

    @classmethod
    def of(cls, part: BasePart, head: Head) -> _Base:
        bias = part.head.bias
        padding = [] if bias is None else [bias.isneginf()]
        masks = [*padding, *([] if head.bias is None else [head.bias.isneginf()])]
        has_padding = any(bool(mask.any()) for mask in masks)
        return cls(_Operand.of(part.head, part.hidden), part.hidden, padding, has_padding)

    def take(self, logits: Tensor, rows: slice) -> Tensor:
        # Each pass over the vocabulary counts, so that probabilities are never divided out before the end:
        # KL = sum(u * (y - x)) / sum(u) - log sum(u) + log sum(v), for u = exp(y) and v = exp(x).
        base = torch.zeros_like(logits)
        self.base.add_to(base, self.hidden[rows], 1.0)
        is_padding = logits.isneginf() if self.has_padding else None
        if is_padding is not None:
            base.masked_fill_(is_padding, -torch.inf)
        logits.sub_(logits.amax(1, keepdim=True))
        base.sub_(base.amax(1, keepdim=True))
        difference = base - logits
        if is_padding is not None:
            difference.masked_fill_(is_padding, 0.0)
        base.exp_()
        base_sums = base.sum(1, keepdim=True)
        means = difference.mul_(base).sum(1, keepdim=True) / base_sums
        sums = logits.exp_().sum(1, keepdim=True)
        logits.div_(sums).sub_(base.div_(base_sums))
        return (means - base_sums.log() + sums.log()).sum()


class _Shown(NamedTuple):
    """The divergence from a base that shows its most likely tokens."""

    part: ShownPart
    padding: Sequence[Tensor] = ()

    def take(self, logits: Tensor, rows: slice) -> Tensor:
        token_ids, shown = self.part.token_ids[rows], self.part.logprobs[rows].float()
        is_shown = shown > -torch.inf
        probs = shown.exp()
        rest = (1 - probs.sum(1, keepdim=True)).clamp(min=0.0)
        logits.sub_(logits.logsumexp(1, keepdim=True))
        own = logits.gather(1, token_ids)
        divergence = (probs * (shown - own)).masked_fill(~is_shown, 0.0).sum()
        gradient = logits.exp_()
        own_probs = own.exp().masked_fill(~is_shown, 0.0)
        own_rest = (1 - own_probs.sum(1, keepdim=True)).clamp(min=SMALLEST_REST)
        divergence += torch.xlogy(rest, rest / own_rest).sum()
        # What the base does not show is asked for in the trained model's own proportions.
        gradient.mul_(1 - rest / own_rest)
        # A slot without a token points to token 0, and must change nothing there.
        at_shown = own_probs * (rest / own_rest) - probs.masked_fill(~is_shown, 0.0)
        gradient.scatter_add_(1, token_ids, at_shown)
        return divergence


class _Work(NamedTuple):
    """One call of a loss, without the tensors that gradients flow to."""

    objective: _Objective
    scale: float
    softcap: float | None
    frozen: FrozenPart | None
    expert_factor: float
    chunk_rows: int
    wanted: list[bool]  # gradients of hidden, weight and bias

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss and the wanted gradients."""
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
        padding += self.objective.padding
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

        A separate function, so that its tensors are freed before the next chunk's are allocated.
        """
        num_rows = len(hidden[rows])
        logits = torch.zeros(num_rows, len(expert.weight), device=hidden.device)
        tangents = None
        if frozen is not None:
            frozen.add_to(logits, hidden[rows], rows)
        if self.expert_factor != 0 and not (frozen is not None and frozen.has_expert):
            tangents = expert.add_to(logits, hidden[rows], self.expert_factor)
        for mask in padding:
            logits.masked_fill_(mask, -torch.inf)
        loss = self.objective.take(logits, rows)
        if not any(self.wanted) or self.expert_factor == 0:
            return loss
        gradient = logits  # One tensor: the objective has turned it into the gradient.
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
        """Propagate the gradient of a chunk's logits, before factor and scale, through the head."""
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
        """Add the frozen logits of some rows to `total`, and the expert's too if the head is shared."""
        if self.base_factor != 0:
            self.base.add_to(total, self.base_hidden[rows], self.base_factor)
        small_hidden = self.small_hidden[rows]
        if self.has_expert:
            # Subtract in float32, before the product rounds: expert and anti-expert are close.
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
    """Whether two tensors are the same memory."""
    if one is None or other is None:
        return one is other
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
    )
