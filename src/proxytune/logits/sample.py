"""From steered logits to token ids: penalties, temperature, top-k, top-p, min-p, and the draw.

The functions are pure: `[batch, vocab]` logits and per-row settings in, tensors out. Randomness comes in as
noise per row and token, so that a row's result depends on its own seed and on nothing else in the batch.
`BatchSampler` keeps what a batch must remember between steps (settings as tensors, counts of earlier tokens,
one generator per row) and calls these functions.

Order of operations: penalties, biases, forbidden tokens, temperature, top-k, top-p, min-p. transformers
applies them in the same order, so that equal settings give equal distributions.
"""

from __future__ import annotations

import secrets
from collections import deque
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
    """Lower the logits of tokens that already occur in the text.

    Args:
        logits: `[batch, vocab]` float32.
        seen: `[batch, vocab]` bool: whether the token is in the prompt or the output.
        counts: `[batch, vocab]`: how often the token is in the output.
        repetition: `[batch]`: divides positive and multiplies negative logits of seen tokens; 1 is off.
        presence: `[batch]`: subtracted if the count is above 0.
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
        logits: `[batch, vocab]` float32, with at least one finite value per row.
        temperature: `[batch]`, above 0.
        top_k: `[batch]` whole numbers, 0 for off; None if no row uses it.
        top_p: `[batch]` in (0, 1], 1 for off; None if no row uses it. Keeps the smallest set of most likely
            tokens whose probability reaches it (Holtzman et al. 2020, arXiv:1904.09751), computed on what
            top-k left.
        min_p: `[batch]` in [0, 1], 0 for off; None if no row uses it. Keeps tokens that are at least this
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


def gumbel(uniforms: Tensor) -> Tensor:
    """Return Gumbel noise for uniform numbers: `-log(-log(u))`, float32, of the same shape.

    Args:
        uniforms: float64 in [0, 1). In float32 the largest of 100,000 numbers would often be exactly
            1 - 2**-24, and unlikely tokens would be drawn too often.
    """
    return uniforms.log().neg_().log_().neg_().float()


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw one token id per row: the one with the highest sum of logit and Gumbel noise.

    That is a draw from `softmax(logits)`. Given the same noise, two distributions agree on the token with a
    probability of at least `(1 - d) / (1 + d)`, where d is their total variation distance. That is why drafts
    often match what the steered distribution draws (`decode/speculative.py`).

    Args:
        logits: `[batch, vocab]`, warped; -inf is never drawn.
        noise: `[batch, vocab]` from `gumbel`; 0 takes the highest logit.

    Returns:
        `[batch]` int64.

    Source: Gumbel 1954 for the draw; Daliri, Musco and Suresh 2024, "Coupling without Communication and
    Drafter-Invariant Speculative Decoding", arXiv:2408.07978, for the agreement.
    """
    return argmax(logits + noise)


def argmax(logits: Tensor) -> Tensor:
    """Return the index of each row's highest logit, `[batch]` int64; on a CPU, the first of equal ones.

    On a CPU numpy is used: for 49,152 float32 values it takes 4 microseconds, torch 43.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


class Sampled(NamedTuple):
    """The tokens chosen in one step."""

    token_ids: Tensor  # [batch] int64
    logprobs: Tensor  # [batch] float32: steered logprob before penalties and filters, nats

    def as_lists(self) -> tuple[list[int], list[float]]:
        """Return both as numbers; on an accelerator this waits for the device."""
        return self.token_ids.tolist(), self.logprobs.tolist()


class _Noise:
    """The Gumbel noise of one row: a `[vocab]` tensor for each position of its new tokens.

    Noise belongs to a position, not to a draw: a position for which a token was drafted has the same noise
    when the token is chosen.
    """

    def __init__(self, seed: int, vocab_size: int, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._vocab_size = vocab_size
        self._device = device
        self._ahead: deque[Tensor] = deque()

    def at(self, ahead: int) -> Tensor:
        """Return the noise of the position `ahead` tokens after the next one."""
        while len(self._ahead) <= ahead:
            uniforms = torch.rand(self._vocab_size, generator=self._generator, dtype=torch.float64)
            self._ahead.append(gumbel(uniforms).to(self._device))
        return self._ahead[ahead]

    def advance(self) -> None:
        """Go to the next position."""
        self.at(0)
        self._ahead.popleft()


class BatchSampler:
    """Choose tokens for the rows of a batch, each by its own settings, history and seed.

    Args:
        params: One per row.
        prompts: Each row's prompt in the base's token ids, for the repetition penalty.
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
        """The seed of each row, drawn if none was given; None for greedy rows."""
        self._noise = [
            None if seed is None else _Noise(seed, vocab_size, self._device) for seed in self.seeds
        ]
        self._silence = torch.zeros(vocab_size, device=self._device)
        self._counts: Tensor | None = None
        self._seen: Tensor | None = None
        if any(p.has_penalties for p in self._params):
            self._counts = torch.zeros(len(self._params), vocab_size, device=self._device)
            self._seen = torch.zeros_like(self._counts, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, torch.tensor(list(prompt), device=self._device)] = True
        self._build()

    def _build(self) -> None:
        """Turn the rows' settings into tensors, or None for a setting that no row uses."""

        def column(name: str, off: float) -> Tensor | None:
            values = [getattr(p, name) for p in self._params]
            if all(value == off for value in values):
                return None
            # A top_k may exceed a tensor's integers; no vocabulary does.
            return torch.tensor([min(value, 2**31) for value in values], device=self._device)

        self._is_greedy = torch.tensor([p.is_greedy for p in self._params], device=self._device)
        self._any_sampled = not all(p.is_greedy for p in self._params)
        self._temperature = torch.tensor(
            [p.temperature or 1.0 for p in self._params], dtype=torch.float32, device=self._device
        )
        self._top_k = column("top_k", 0)
        self._top_p = column("top_p", 1.0)
        self._min_p = column("min_p", 0.0)
        self._penalties = {}
        for short in ("repetition", "presence", "frequency"):
            values = [float(getattr(p, f"{short}_penalty")) for p in self._params]
            self._penalties[short] = torch.tensor(values, device=self._device)

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order."""
        for name in ("_params", "_ending_ids", "_num_chosen", "seeds", "_noise"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        if self._counts is not None and self._seen is not None:
            index = torch.tensor(list(rows), device=self._device)
            self._counts, self._seen = self._counts[index], self._seen[index]
        self._build()

    def join(self, other: BatchSampler) -> None:
        """Take over the rows of another sampler, after the own ones; the other must not be used after."""
        num_rows, num_others = len(self._params), len(other._params)
        for name in ("_params", "_ending_ids", "_num_chosen", "seeds", "_noise"):
            getattr(self, name).extend(getattr(other, name))
        if self._counts is not None or other._counts is not None:
            vocab_size = len(self._silence)
            for sampler, count in ((self, num_rows), (other, num_others)):
                if sampler._counts is None or sampler._seen is None:
                    # Rows without penalties: what they have seen changes nothing.
                    sampler._counts = torch.zeros(count, vocab_size, device=self._device)
                    sampler._seen = torch.zeros_like(sampler._counts, dtype=torch.bool)
            assert self._counts is not None and other._counts is not None
            assert self._seen is not None and other._seen is not None
            self._counts = torch.cat([self._counts, other._counts])
            self._seen = torch.cat([self._seen, other._seen])
        self._build()

    def adjusted(self, steered_logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return logits with penalties and biases applied and forbidden tokens at -inf, `[rows, vocab]`."""
        rows, index = self._index(rows)
        logits = steered_logits
        if self._counts is not None and self._seen is not None:
            logits = penalise(
                logits,
                seen=self._seen[index],
                counts=self._counts[index],
                **{name: values[index] for name, values in self._penalties.items()},
            )
        for place, row in enumerate(rows):
            biases = [self._params[row].logit_bias]
            if not self._num_chosen[row]:
                biases.append(self._params[row].first_logit_bias)
            is_too_short = self._num_chosen[row] < self._params[row].min_new_tokens
            ending_ids = self._ending_ids[row] if is_too_short else []
            if logits is steered_logits and (any(biases) or ending_ids):
                logits = logits.clone()
            for bias in filter(None, biases):
                token_ids, values = zip(*bias, strict=True)
                logits[place, list(token_ids)] += logits.new_tensor(values)
            if ending_ids:
                logits[place, ending_ids] = -torch.inf
        return logits

    def probs(self, steered_logits: Tensor) -> Tensor:
        """Return the distribution each row draws from, `[batch, vocab]`; one-hot for greedy rows."""
        logits = self.adjusted(steered_logits)
        warped = self._warp(logits, slice(None)).softmax(-1)
        one_hot = torch.zeros_like(warped).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.where(self._is_greedy[:, None], one_hot, warped)

    def sample(self, steered_logits: Tensor, rows: Sequence[int] | None = None) -> Sampled:
        """Choose one token per row and remember it.

        A row's tokens depend only on its settings, its seed, its history and these logits. They depend
        neither on how earlier tokens were found nor on other rows.

        Args:
            steered_logits: `[rows, vocab]` float32, padding ids at -inf. Not changed.
            rows: Which rows of the batch these are, ascending; None for all.
        """
        rows, _ = self._index(rows)
        token_ids = self.peek(steered_logits, rows)
        logprobs = steered_logits.log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
        if self._counts is not None and self._seen is not None:
            places = torch.tensor(rows, device=self._device)
            self._counts[places, token_ids] += 1
            self._seen[places, token_ids] = True
        for row in rows:
            self._num_chosen[row] += 1
            noise = self._noise[row]
            if noise is not None:
                noise.advance()
        return Sampled(token_ids, logprobs)

    def peek(self, steered_logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return the token ids, `[rows]`, that `sample` would choose; nothing is remembered."""
        rows, index = self._index(rows)
        logits = self.adjusted(steered_logits, rows)
        if self._any_sampled:
            return draw(self._warp(logits, index), self._noise_at(0, rows))
        return argmax(logits)

    def propose(self, logits: Tensor, *, ahead: int, rows: Sequence[int] | None = None) -> Tensor:
        """Guess what each row will choose, from the logits of one model alone; nothing is remembered.

        Uses the noise that `sample` will use, but no filters and penalties: these cost more than they would
        improve a guess.

        Args:
            logits: `[rows, vocab]`, padding ids at -inf.
            ahead: 0 to guess the next token, 1 for the one after it, and so on.
            rows: Which rows of the batch these are, ascending; None for all.

        Returns:
            `[rows]` int64.
        """
        if not self._any_sampled:
            return argmax(logits)
        rows, index = self._index(rows)
        return draw(logits / self._temperature[index][:, None], self._noise_at(ahead, rows))

    def _warp(self, logits: Tensor, index: Tensor | slice) -> Tensor:
        filters = {"top_k": self._top_k, "top_p": self._top_p, "min_p": self._min_p}
        used = {name: column[index] for name, column in filters.items() if column is not None}
        return warp(logits, temperature=self._temperature[index], **used)

    def _noise_at(self, ahead: int, rows: Sequence[int]) -> Tensor:
        """Return `[rows, vocab]`, 0 for greedy rows."""
        noise = [self._noise[row] for row in rows]
        return torch.stack([self._silence if n is None else n.at(ahead) for n in noise])

    def _index(self, rows: Sequence[int] | None) -> tuple[Sequence[int], Tensor | slice]:
        """Return rows as numbers and as an index; all rows are a slice, which copies nothing."""
        if rows is None or len(rows) == len(self._params):
            return range(len(self._params)), slice(None)
        return rows, torch.tensor(list(rows), device=self._device)
