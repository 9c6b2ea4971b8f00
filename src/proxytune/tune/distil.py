"""Distillation of a steered base into an adapter of the base: the loss, and TRL's trainer with it.

At every position the loss is KL(steered || student), over the whole vocabulary. The divergence is taken in
this direction because it asks the student for everything that the steered base may say; the other one may be
met by one of several good answers, and what is baked would sample otherwise than what was steered. On text
that the steered base wrote, its mean over positions is the divergence of whole answers, divided by their
length. (Hinton et al. 2015, arXiv:1503.02531; Kim and Rush 2016, arXiv:1606.07947, for sequences.)

The steered base runs beside the student, so that any recipe can be baked: any number of experts, rules,
weights, prompts of its own for each model. Its logits are never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from proxytune.decode.ensemble import Ensemble
from proxytune.measure.score import Passage, needed_members, passage_logits, steered_rows
from proxytune.tune.encode import IGNORED, Example
from proxytune.tune.heads import Head, head_of, run_body
from proxytune.tune.trainer import ExpertTrainer

CHUNK_ROWS = 64
"""Positions whose logits exist at once; the loss and its gradient hold about five tensors of them."""

Teacher = Callable[[Passage], Iterator[Tensor]]
"""Yields the steered base's logits `[positions, vocab]` for a passage, in order."""


def teacher_of(ensemble: Ensemble, alphas: Sequence[float]) -> Teacher:
    """Return the steered base as a teacher.

    Args:
        ensemble: The models, whose base shows all its logits.
        alphas: The strength of each pair.
    """
    needed = needed_members(ensemble.pairs)

    @torch.no_grad()
    def read(passage: Passage) -> Iterator[Tensor]:
        for where, logits in passage_logits(ensemble, passage, needed):
            padding_ids = ensemble.vocabulary.padding_ids.to(logits[0].device)
            for first in range(0, len(logits[0]), CHUNK_ROWS):
                part = {i: each[first : first + CHUNK_ROWS] for i, each in logits.items()}
                positions = torch.arange(where + first, where + first + len(part[0]))
                steered = steered_rows(
                    ensemble, part, alphas, positions=positions, padding_ids=padding_ids
                ).logits
                yield steered.index_fill(-1, padding_ids, -torch.inf)

    return read


def example_of(passage: Passage) -> Example:
    """Return a passage as the student reads it: the base's prompt, then the tokens to predict."""
    prompt, token_ids = passage.prompts[0], passage.token_ids
    return Example([*prompt, *token_ids], [IGNORED] * len(prompt) + list(token_ids))


def kl_divergence(teacher: Iterator[Tensor], hidden: Tensor, head: Head) -> Tensor:
    """Return the sum over positions of KL(teacher || student), nats.

    Gradients flow to `hidden`. They are computed in the forward pass, chunk by chunk, as in `loss.py`.

    Args:
        teacher: Logits `[positions, vocab]`, chunk by chunk; -inf where there is no token.
        hidden: `[positions, width]`, the student's hidden states at the same positions.
        head: The student's head, which takes no gradient.
    """
    wants = torch.is_grad_enabled() and hidden.requires_grad
    total = torch.zeros((), device=hidden.device)
    gradient = torch.zeros_like(hidden)
    first = 0
    for logits in teacher:
        rows = slice(first, first + len(logits))
        first += len(logits)
        with torch.enable_grad() if wants else torch.no_grad():
            own = hidden[rows].detach().requires_grad_(wants)
            target = logits.to(hidden.device).log_softmax(-1)
            student = head.logits(own)[:, : target.shape[-1]].log_softmax(-1)
            missing = target.isneginf()
            difference = (target - student).masked_fill(missing, 0.0)
            loss = (target.exp() * difference).sum()
            if wants:
                (gradient[rows],) = torch.autograd.grad(loss, own)
        total += loss.detach()
    assert first == len(hidden), (first, len(hidden))
    if not wants:
        return total
    carried = (hidden * gradient).sum()
    return total + carried - carried.detach()


class Distillation(ExpertTrainer):
    """Trains an adapter of the base towards a teacher, with the checkpoints and logs of `trainer.py`.

    Args:
        teacher: The steered base.
        passages: The training passages and the validation passages, in the order of the examples.
        kwargs: As `ExpertTrainer` takes them.
    """

    def __init__(
        self,
        *,
        teacher: Teacher,
        passages: tuple[Sequence[Passage], Sequence[Passage]],
        **kwargs: Any,
    ) -> None:
        super().__init__(ensemble=None, **kwargs)
        self._teacher = teacher
        self._passages = passages

    def _nats(self, model: Any, inputs: Mapping[str, Any], *, training: bool) -> tuple[Tensor, int]:
        passages = self._passages[0 if training else 1]
        kind = inputs["input_ids"].device.type
        with torch.autocast(kind, self._autocast, enabled=self._autocast is not None):
            hidden = run_body(model, inputs["input_ids"], inputs["attention_mask"])
            head = head_of(model).detach()
            total = torch.zeros((), device=hidden.device)
            count = 0
            for row, index in enumerate(inputs["row"].tolist()):
                passage = passages[index]
                first = len(passage.prompts[0]) - 1
                own = hidden[row, first : first + len(passage.token_ids)]
                total = total + kl_divergence(self._teacher(passage), own, head)
                count += len(passage.token_ids)
        return total, count
