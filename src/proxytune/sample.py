"""From steered logits to token ids: penalties, temperature, top-k, top-p, min-p, and the draw.

The functions are pure: `[batch, vocab]` logits and per-row settings in, tensors out; randomness comes in as
one uniform number per row, so that a row's result depends on its own seed and on nothing else in the batch.
`BatchSampler` keeps what a batch has to remember between steps (settings as tensors, counts of earlier
tokens, one generator a row) and calls them.

Order of operations: penalties, forbidden tokens, temperature, top-k, top-p, min-p, the order in which
transformers applies them, so that equal settings give equal distributions.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.request import SamplingParams


def penalise(
    logits: Tensor,
    *,
    seen: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Lower the logits of tokens that stand in the text already.

    Args:
        logits: `[batch, vocab]` float32.
        seen: `[batch, vocab]` bool: the token is in the prompt or the output.
        counts: `[batch, vocab]`: how often the token is in the output.
        repetition: `[batch]`: divides positive and multiplies negative logits of seen tokens; 1 is off.
        presence: `[batch]`: subtracted where the count is above 0.
        frequency: `[batch]`: subtracted once per occurrence in the output.

    Returns:
        `[batch, vocab]` float32, a new tensor.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1 (repetition, in the sign-aware form of
    transformers); the OpenAI API's reference (presence, frequency).
    """
    factor = repetition[:, None]
    logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    return logits - presence[:, None] * (counts > 0) - frequency[:, None] * counts


def warp(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Scale logits by temperature and drop the tokens that top-k, top-p and min-p exclude.

    Args:
        logits: `[batch, vocab]` float32; at least one finite value a row.
        temperature: `[batch]`, above 0.
        top_k: `[batch]` whole numbers, 0 for off; None where no row uses it.
        top_p: `[batch]` in (0, 1], 1 for off; None where no row uses it. Keeps the smallest set of most
            likely tokens that reaches the mass (Holtzman et al. 2020, arXiv:1904.09751), computed on
            what top-k left.
        min_p: `[batch]` in [0, 1], 0 for off; None where no row uses it. Keeps tokens at least this
            fraction as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).

    Returns:
        `[batch, vocab]` float32 with -inf at dropped tokens; the most likely token always stays.
    """
    logits = logits / temperature[:, None]
    keep: Tensor | None = None
    if top_k is not None or top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        keep_ordered = torch.ones_like(ordered, dtype=torch.bool)
        if top_k is not None:
            keep_ordered &= (rank < top_k[:, None]) | (top_k[:, None] == 0)
            ordered = ordered.masked_fill(~keep_ordered, -torch.inf)
        if top_p is not None:
            probs = ordered.softmax(-1)
            mass_before = probs.cumsum(-1) - probs
            keep_ordered &= (mass_before < top_p[:, None]) | (top_p[:, None] >= 1)
        keep_ordered[:, 0] = True
        keep = torch.zeros_like(keep_ordered).scatter_(1, order, keep_ordered)
    if min_p is not None:
        likeliest = logits.amax(-1, keepdim=True)
        enough = logits >= likeliest + min_p[:, None].log()
        keep = enough if keep is None else keep & enough
    return logits if keep is None else logits.masked_fill(~keep, -torch.inf)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token id per row by inverting the cumulative distribution.

    Args:
        probs: `[batch, vocab]`, not negative, each row with a positive sum (need not be 1).
        uniforms: `[batch]` float64 in [0, 1).

    Returns:
        `[batch]` int64. A token of probability 0 is never drawn.
    """
    cumulative = probs.double().cumsum(-1)
    total = cumulative[:, -1]
    # A hair below 1 keeps u * total under total after rounding, so that the search ends at a real token.
    wanted = uniforms.to(total).clamp(max=1 - 1e-12) * total
    token_ids = torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0]
    return token_ids.clamp_(max=probs.shape[1] - 1)  # out of range only when probs are NaN


class Choice(NamedTuple):
    """One step's tokens."""

    token_ids: Tensor  # [batch] int64
    logprobs: Tensor  # [batch] float32: steered logprob before penalties and filters, nats


class BatchSampler:
    """Choose tokens for the rows of a batch, each by its own settings, history and seed.

    Args:
        params: One per row.
        prompts: The base's token ids of each row's prompt (the repetition penalty counts them).
        ending_ids: Per row, ids that must not be chosen before `min_new_tokens`.
        vocab_size: Width of the logits.
        device: Where the logits are.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        ending_ids: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._params = list(params)
        self._ending_ids = [list(ids) for ids in ending_ids]
        self._num_chosen = [0] * len(self._params)
        self._device = torch.device(device)
        self.seeds = [
            None if p.is_greedy else secrets.randbits(63) if p.seed is None else p.seed
            for p in params
        ]
        """The seed of each row, drawn where none was given; None for greedy rows."""
        self._generators = [
            None if seed is None else torch.Generator().manual_seed(seed) for seed in self.seeds
        ]
        self._counts: Tensor | None = None
        self._seen: Tensor | None = None
        if any(p.has_penalties for p in self._params):
            self._counts = torch.zeros(len(self._params), vocab_size, device=self._device)
            self._seen = torch.zeros_like(self._counts, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, torch.tensor(list(prompt), device=self._device)] = True
        self._build()

    def _build(self) -> None:
        """Turn the rows' settings into tensors, None for a setting that no row uses."""

        def column(name: str, off: float) -> Tensor | None:
            values = [getattr(p, name) for p in self._params]
            if all(value == off for value in values):
                return None
            # A top_k may be larger than any tensor's integer; a vocabulary never is.
            return torch.tensor([min(value, 2**31) for value in values], device=self._device)

        self._is_greedy = torch.tensor([p.is_greedy for p in self._params], device=self._device)
        self._any_greedy = any(p.is_greedy for p in self._params)
        self._any_sampled = not all(p.is_greedy for p in self._params)
        self._temperature = torch.tensor(
            [p.temperature or 1.0 for p in self._params], dtype=torch.float32, device=self._device
        )
        self._top_k = column("top_k", 0)
        self._top_p = column("top_p", 1.0)
        self._min_p = column("min_p", 0.0)
        self._penalties = {
            short: torch.tensor(
                [float(getattr(p, f"{short}_penalty")) for p in self._params], device=self._device
            )
            for short in ("repetition", "presence", "frequency")
        }

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order."""
        for name in ("_params", "_ending_ids", "_num_chosen", "seeds", "_generators"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        if self._counts is not None and self._seen is not None:
            index = torch.tensor(list(rows), device=self._device)
            self._counts, self._seen = self._counts[index], self._seen[index]
        self._build()

    def adjusted(self, steered_logits: Tensor) -> Tensor:
        """Return logits with penalties applied and forbidden tokens at -inf, `[batch, vocab]`."""
        logits = steered_logits
        if self._counts is not None and self._seen is not None:
            logits = penalise(logits, seen=self._seen, counts=self._counts, **self._penalties)
        for row, (params, chosen) in enumerate(zip(self._params, self._num_chosen, strict=True)):
            if chosen < params.min_new_tokens and self._ending_ids[row]:
                if logits is steered_logits:
                    logits = logits.clone()
                logits[row, torch.tensor(self._ending_ids[row], device=logits.device)] = -torch.inf
        return logits

    def probs(self, steered_logits: Tensor) -> Tensor:
        """Return the distribution each row draws from, `[batch, vocab]`; one-hot where greedy."""
        logits = self.adjusted(steered_logits)
        warped = warp(
            logits,
            temperature=self._temperature,
            top_k=self._top_k,
            top_p=self._top_p,
            min_p=self._min_p,
        ).softmax(-1)
        if not self._any_greedy:
            return warped
        one_hot = torch.zeros_like(warped).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.where(self._is_greedy[:, None], one_hot, warped)

    def choose(self, steered_logits: Tensor) -> Choice:
        """Choose one token per row and remember it.

        Args:
            steered_logits: `[batch, vocab]` float32, padding ids at -inf. Not changed.
        """
        if self._any_sampled:
            uniforms = torch.tensor(
                [
                    0.0 if g is None else float(torch.rand((), generator=g, dtype=torch.float64))
                    for g in self._generators
                ],
                dtype=torch.float64,
                device=self._device,
            )
            token_ids = draw(self.probs(steered_logits), uniforms)
        else:
            token_ids = self.adjusted(steered_logits).argmax(-1)
        chosen = steered_logits.gather(1, token_ids[:, None])[:, 0]
        logprobs = chosen - steered_logits.logsumexp(-1)
        if self._counts is not None and self._seen is not None:
            self._counts.scatter_add_(1, token_ids[:, None], torch.ones_like(self._counts[:, :1]))
            self._seen.scatter_(1, token_ids[:, None], True)
        self._num_chosen = [n + 1 for n in self._num_chosen]
        return Choice(token_ids, logprobs)
