"""Rotary angles that depend on how long a sequence is, chosen per row.

Two ways of stretching a context do that. *longrope* (Ding et al. 2024, arXiv:2402.13753) has one set of
frequencies for sequences up to the length of the pretraining, the *switch*, and another for longer ones.
*Dynamic NTK* computes new frequencies for each length beyond the switch. transformers takes the length from
the largest position of a forward, and so for all its rows alike: a long row changes its neighbours. Here
`RowRotary` stands in front of the model's rotary module and calls it once per length that occurs, with one
more position that makes it choose that length. Each row takes its own angles from the results.

Which length a row has in a forward is decided in `lengthwise.py`.
docs/design/0007-angles-that-depend-on-length.md says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from proxytune.checkpoints.context import depends_on_length, rope_kind, rope_scalings
from proxytune.errors import UnsupportedModel

ROW_LENGTHS: ContextVar[Sequence[Sequence[int]] | None] = ContextVar("row_lengths", default=None)
"""The sequence length that each new token's angles are chosen for, `[batch][1 or num_new]`.

None leaves the choice to transformers.
"""


@dataclass(frozen=True, slots=True)
class AngleRule:
    """How a model's angles depend on a sequence's length.

    Args:
        switch: The largest length with the model's original frequencies.
        is_stepped: Whether every longer length has frequencies of its own (dynamic NTK), rather than all
            the same (longrope).
    """

    switch: int
    is_stepped: bool

    def is_long(self, length: int) -> bool:
        """Return whether a sequence of this length has other than the original frequencies."""
        return length > self.switch

    def representative(self, length: int) -> int:
        """Return the shortest length that has the same angles."""
        return max(length, self.switch) if self.is_stepped else self.switch + self.is_long(length)


class RowRotary(nn.Module):
    """A rotary module that takes each row's length from `ROW_LENGTHS`.

    Args:
        inner: The model's own rotary module.
        rule: How its angles depend on lengths.
    """

    def __init__(self, inner: nn.Module, rule: AngleRule) -> None:
        super().__init__()
        self.inner = inner
        self.rule = rule

    def __getattr__(self, name: str) -> Any:
        """Return the inner module's attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(
        self, x: Tensor, position_ids: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what the inner module returns for `[batch, num_new]` positions, each by its row's length."""
        lengths = ROW_LENGTHS.get()
        if lengths is None or position_ids is None:
            return self.inner(x, position_ids, *args, **kwargs)
        classes = [[self.rule.representative(length) for length in row] for row in lengths]
        angles: tuple[Tensor, ...] = ()
        is_tuple = True
        for length in sorted({length for row in classes for length in row}):
            own = self._angles(length, x, position_ids, args, kwargs)
            is_tuple = not isinstance(own, Tensor)
            parts = tuple(own) if is_tuple else (own,)
            if angles:
                rows = [[each == length for each in row] for row in classes]
                is_own = torch.tensor(rows, device=parts[0].device)[..., None]
                parts = tuple(
                    torch.where(is_own, mine, others)
                    for mine, others in zip(parts, angles, strict=True)
                )
            angles = parts
        return angles if is_tuple else angles[0]

    def _angles(
        self,
        length: int,
        x: Tensor,
        position_ids: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return all rows' angles for one length."""
        if self.rule.is_stepped or not self.rule.is_long(length):
            # Rows of other lengths do not use these angles, and must not make the module choose theirs.
            position_ids = position_ids.clamp(max=length - 1)
        self._forget_lengths(x.device)
        last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
        angles = self.inner(x, torch.cat((position_ids, last), dim=-1), *args, **kwargs)
        if isinstance(angles, Tensor):
            return angles[..., :-1, :]
        return tuple(part[..., :-1, :] for part in angles)

    def _forget_lengths(self, device: torch.device) -> None:
        """Make the inner module forget the forward before, which it would go by."""
        inner: Any = self.inner
        if not self.rule.is_stepped:
            # transformers 5.19 fails where it finds a layer type's long frequencies.
            for name in [name for name in vars(inner) if name.endswith("_long_inv_freq")]:
                delattr(inner, name)
            return
        # transformers keeps the frequencies of a long sequence for shorter ones beyond the switch.
        for name, buffer in list(inner.named_buffers(recurse=False)):
            prefix, found, _ = name.partition("original_inv_freq")
            if found:
                inner.register_buffer(f"{prefix}inv_freq", buffer.to(device), persistent=False)
                if f"{prefix}max_seq_len_cached" in vars(inner):
                    setattr(inner, f"{prefix}max_seq_len_cached", self.rule.switch)


def run_rows_through_lengths(model: nn.Module, name: str) -> AngleRule | None:
    """Make rotary modules take their rows' lengths from `ROW_LENGTHS`.

    Args:
        model: The model; its modules are replaced, and do what they did while `ROW_LENGTHS` is None.
        name: What errors call it.

    Returns:
        How its angles depend on lengths; None if they do not.

    Raises:
        UnsupportedModel: Its layers follow different rules, or its own code has a rotary module that is not
            known here.
    """
    wrapped: dict[str, AngleRule] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, RowRotary):
            wrapped[path] = module.rule
        elif not path.endswith(".inner") and (rules := _rules(module)):
            rule = _only_rule(rules, name)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, RowRotary(module, rule))
            wrapped[path] = rule
    if wrapped:
        return _only_rule(set(wrapped.values()), name)
    config: Any = model.config
    kinds = [rope_kind(each) for each in rope_scalings(config.get_text_config(decoder=True))]
    kinds = [kind for kind in kinds if depends_on_length(kind)]
    if kinds:
        raise UnsupportedModel(
            f"{name} is a {type(model).__name__} with {kinds[0]} rotary embeddings, whose angles depend on a "
            "sequence's length, but it computes them in code that is not transformers' own, so rows of one "
            "batch would change each other.\nhint: load it without trust_remote_code, if transformers knows "
            "the model"
        )
    return None


def _rules(module: nn.Module) -> set[AngleRule]:
    """Return the rules of a rotary module, of one per layer type; none for other modules."""
    kinds: Any = getattr(module, "rope_type", None)
    config: Any = getattr(module, "config", None)
    rules = set()
    for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
        if not depends_on_length(kind):
            continue
        if kind == "longrope":
            parameters = config.rope_parameters
            parameters = parameters if layer_type is None else parameters[layer_type]
            rules.add(AngleRule(int(parameters["original_max_position_embeddings"]), False))
        else:
            own: Any = module
            rules.add(AngleRule(int(own.original_max_seq_len), True))
    return rules


def _only_rule(rules: set[AngleRule], name: str) -> AngleRule:
    if len(rules) > 1:
        switches = ", ".join(str(rule.switch) for rule in sorted(rules, key=lambda r: r.switch))
        raise UnsupportedModel(
            f"the rotary angles of {name} depend on a sequence's length in {len(rules)} ways (from "
            f"{switches} tokens on), and only one is supported"
        )
    return next(iter(rules))
