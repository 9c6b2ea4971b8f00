"""What each model gave a token: logprob, rank, entropy, likeliest tokens; and how far steering went.

Pure functions of logits. Their results are kept in a `Step` (`trace.py`) and shown elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxytune.logits.rules import entropy
from proxytune.trace import View


def view(logits: Tensor, token_id: int, *, num_top: int) -> View:
    """Return what a whole distribution says about a token.

    Args:
        logits: `[vocab]`, any float dtype, not normalised; -inf at ids that cannot be chosen.
        token_id: The chosen token.
        num_top: How many of the likeliest tokens to list.
    """
    logprobs = logits.float().log_softmax(-1)
    own = logprobs[token_id]
    # Equal logits count in the order of their ids, as in the choice.
    rank = int((logprobs > own).sum()) + int((logprobs[:token_id] == own).sum()) + 1
    return View(_finite(float(own)), rank, float(entropy(logprobs)), _top(logprobs, num_top))


def partial_view(logprobs: Tensor, token_id: int, *, ceiling: float, num_top: int) -> View:
    """Return what a part of a distribution says about a token.

    Args:
        logprobs: `[vocab]`, normalised; -inf at tokens that were not shown.
        token_id: The chosen token.
        ceiling: No token that was not shown has a higher logprob.
        num_top: How many of the likeliest tokens to list. Tokens below the ceiling are left out: tokens that
            were not shown may be likelier.
    """
    own = float(logprobs[token_id])
    rank = int((logprobs > own).sum()) + 1 if own >= ceiling and own > -torch.inf else None
    certain = tuple(pair for pair in _top(logprobs, num_top) if pair[1] >= ceiling)
    return View(_finite(own), rank, None, certain)


def kl_divergence(logits: Tensor, reference_logits: Tensor) -> float:
    """Return KL(p || q) in nats, where p and q are the distributions of two rows of logits, `[vocab]` each.

    Tokens with p = 0 count 0, whatever q is; a token with q = 0 alone makes it infinite.
    """
    p, q = logits.float().log_softmax(-1), reference_logits.float().log_softmax(-1)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return max(0.0, float(terms.sum()))  # rounding may leave -1e-9


def _top(logprobs: Tensor, num_top: int) -> tuple[tuple[int, float], ...]:
    best = logprobs.topk(min(num_top, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple((token_id, logprob) for token_id, logprob in pairs if logprob > -torch.inf)


def _finite(logprob: float) -> float | None:
    return logprob if logprob > -torch.inf else None
