"""One output matrix for several models: held in memory once, and read once for the rows of all of them.

Models cut from the base end in the base's own output matrix, and so may siblings. For a few rows nearly all
of the product's time goes into reading the matrix, so the rows of several models are multiplied with it
together: the small models' forwards stop before it, and the base's forward takes their final states in beside
its own. Every model still gets its own logits. docs/design/0011-shared-output-matrix.md has the measurements.

What a model does to its states before the product, and to its logits after it (scales, soft caps), stays in
the models' own code. What comes after the product runs in the base's code for the rows of all, so it is first
tried whether both models do the same there.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from proxytune.backends.base import Backend
from proxytune.backends.transformers.linear import FewRowsLinear, release_file_pages
from proxytune.backends.transformers.state import TransformersState

LARGEST_LOGIT = 64.0
"""Logits that are tried go up to this, beyond the soft caps in use (30 and 50)."""


@dataclass(slots=True)
class _Exchange:
    """What passes in and out of a model's output layer in one forward.

    Args:
        others: `[others, num_tokens, hidden]`: states whose logits are made, too. None to make no logits.
        tried: The logits to return in place of a product, `[rows, 1, vocab]`; None for the product.
        states: What the layer was given.
        num_calls: How often it was called.
    """

    others: Tensor | None = None
    tried: Tensor | None = None
    states: Tensor | None = None
    num_calls: int = 0


_EXCHANGE: ContextVar[_Exchange | None] = ContextVar("exchange", default=None)


@contextlib.contextmanager
def _exchanging(exchange: _Exchange) -> Iterator[_Exchange]:
    token = _EXCHANGE.set(exchange)
    try:
        yield exchange
    finally:
        _EXCHANGE.reset(token)


def _before(head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
    """Take other models' states in, or keep the own ones and leave the product none."""
    exchange = _EXCHANGE.get()
    if exchange is None or len(args) != 1:  # a layer called in another way makes its own logits
        return None
    (states,) = args
    exchange.num_calls += 1
    exchange.states = states
    if exchange.others is None:
        return (states[:0],)
    return (torch.cat((states, exchange.others)),)


def _after(head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
    exchange = _EXCHANGE.get()
    return None if exchange is None or exchange.tried is None else exchange.tried.clone()


class OutputSharer(Backend[TransformersState]):
    """A model of transformers that may use the base's output matrix, or lend its own."""

    model: Any
    _host: OutputSharer | None = None
    _borrowed: nn.Module | None = None
    """The output layer, if it is the host's."""

    @property
    @abstractmethod
    def _can_share_output(self) -> bool:
        """Whether `extend` is one forward of all rows, launched kernel by kernel, as in no CUDA graph."""

    @abstractmethod
    def _forward(
        self, token_ids: Tensor, cache: Any, options: Mapping[str, Any], rows: Any
    ) -> Tensor:
        """Call the model and return its logits."""

    @property
    def host(self) -> Backend[Any] | None:
        """The backend whose output matrix this one uses; see `Backend.host`."""
        return self._host

    def share_output(self, base: Backend[Any]) -> bool:
        """Use the base's output layer if it is equal; see `Backend.share_output`.

        It is equal if values, dtype and device are. The own matrix is freed, also where it is the embedding,
        too. The base becomes the `host` if both models' code treats logits alike.
        """
        if not isinstance(base, OutputSharer) or base is self:
            return False
        own, theirs = self.model.get_output_embeddings(), base.model.get_output_embeddings()
        if not _are_equal(own, theirs):
            return False
        can_read_together = self._can_share_output and base._can_share_output
        self._host = base if can_read_together and _treat_alike(self, base) else None
        weight = own.weight
        self.model.set_output_embeddings(theirs)
        self._borrowed = theirs
        _replace(self.model, weight, theirs.weight)
        embedding, other = (m.get_input_embeddings() for m in (self.model, base.model))
        if _are_equal(embedding, other, kinds=(nn.Embedding,)):
            _replace(self.model, embedding.weight, other.weight)
        if weight is not theirs.weight:
            release_file_pages(weight)
        return True

    def final_states(self, state: TransformersState, token_ids: Tensor) -> Tensor:
        """Append tokens and return what logits are made of; see `Backend.final_states`."""
        if self._host is None:
            return super().final_states(state, token_ids)
        with _exchanging(_Exchange()) as exchange:
            self.extend(state, token_ids)
        assert exchange.states is not None and exchange.num_calls == 1
        return exchange.states

    def extend_with(
        self, state: TransformersState, token_ids: Tensor, others: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append tokens and make others' logits in the same product; see `Backend.extend_with`."""
        num_rows = len(token_ids)
        with _exchanging(_Exchange(others)):
            logits = self.extend(state, token_ids)
        return logits[:num_rows], logits[num_rows:]


def _are_equal(
    own: Any, theirs: Any, *, kinds: tuple[type, ...] = (nn.Linear, FewRowsLinear)
) -> bool:
    """Return whether two plain layers hold the same weights on the same device.

    A layer with an adapter, a quantised one, and one whose weights are kept elsewhere are of other kinds.
    """
    if type(own) not in kinds or type(own) is not type(theirs) or hasattr(own, "_hf_hook"):
        return False
    weights = [getattr(layer, "weight", None) for layer in (own, theirs)]
    if any(type(weight) is not nn.Parameter or weight.device.type == "meta" for weight in weights):
        return False
    return _same(*weights) and _same(getattr(own, "bias", None), getattr(theirs, "bias", None))


def _same(own: Tensor | None, theirs: Tensor | None) -> bool:
    if own is None or theirs is None or own is theirs:
        return own is theirs
    is_alike = (own.shape, own.dtype, own.device) == (theirs.shape, theirs.dtype, theirs.device)
    return is_alike and torch.equal(own, theirs)


@torch.inference_mode()
def _treat_alike(guest: OutputSharer, host: OutputSharer) -> bool:
    """Return whether two models do the same to logits, each row by itself, in a forward of one token.

    The layers' own outputs are replaced by logits to try: a row of the host's, then one that is the guest's.
    """
    head = host.model.get_output_embeddings()
    tried = torch.linspace(
        -LARGEST_LOGIT, LARGEST_LOGIT, head.out_features, dtype=head.weight.dtype
    ).to(head.weight.device)
    rows = torch.stack((tried.flip(0), tried))[:, None]

    def run(
        backend: OutputSharer, others: Tensor | None, tried: Tensor
    ) -> tuple[Tensor, _Exchange]:
        layer = backend.model.get_output_embeddings()
        _hook(layer)
        ids = torch.zeros((1, 1), dtype=torch.long, device=backend.device)
        options = {"attention_mask": None, "position_ids": ids, "logits_to_keep": 0}
        with _exchanging(_Exchange(others, tried)) as exchange:
            return backend._forward(ids, None, options, None), exchange

    own, exchange = run(guest, None, rows[1:])
    states = exchange.states
    if exchange.num_calls != 1 or states is None or states.shape != (1, 1, head.in_features):
        return False
    both, exchange = run(host, states, rows)
    return exchange.num_calls == 1 and both.shape == rows.shape and torch.equal(both[1:], own)


def _hook(layer: Any) -> None:
    """Let a layer exchange states, from now on."""
    if not hasattr(layer, "_proxytune_exchanges"):
        layer.register_forward_pre_hook(_before)
        layer.register_forward_hook(_after)
        layer._proxytune_exchanges = True


def _replace(model: nn.Module, weight: nn.Parameter, other: nn.Parameter) -> None:
    """Put another parameter wherever a model has this one."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value is weight:
                setattr(module, name, other)
