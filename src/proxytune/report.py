"""What steering did, computed from traces: token by token, and summed up.

Words: a token's *shift* is its steered minus its base logprob, nats. A token is *changed* if base and steered
model would each put another token first; the text of a sampled or given token need not be either's choice. An
expert's *offset* is `alpha * (expert - anti_expert)` in logprobs of the token, times the weight of the
recipe's policy if it has one. By the published method the shift is the sum of the offsets less what all
tokens have in common (the steered distribution sums to 1 again). A token's *piece* is what it adds to the
text where each character stands at the token that completes it.

Pure functions of traces: no model, no terminal, no page.
"""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from proxytune.errors import InvalidRequest, MissingExtra
from proxytune.trace import Step, Trace, View

if TYPE_CHECKING:
    import pandas

EARLY_TOKENS = 10
"""How many tokens count as the beginning of a text."""
LEVELS = (math.log(1.25), math.log(2.0), math.log(8.0))
"""Shifts at which the colour changes, nats: a token is 1.25, 2 or 8 times as likely, or as unlikely."""
MIN_LOG_ODDS_MISS = -24 * math.log(2)
"""A probability nearer to 1 than this is 1 in float32, and its odds would be infinite."""
CONTEXT_TOKENS = 4
"""Length of the contexts that token types are shown in, as in the paper's table 6."""


@dataclass(frozen=True, slots=True)
class Move:
    """What steering did to one token. What is not known is None.

    Args:
        index: Position among the new tokens, from 0.
        token_id: In the base's vocabulary.
        label: The token by itself, bytes that are no whole characters as ⟨F0 9F⟩.
        piece: What it adds to the text.
        part_of: The character that it is a part of, if another token completes it.
        is_special: Whether it controls, such as the end of a text, and is no part of it.
        is_given: Whether it was given rather than chosen.
        is_changed: Whether base and steered model put different tokens first.
        base_choice: The token that the base puts first.
        steered_choice: The token that the steered model puts first.
        base_logprob: Nats.
        steered_logprob: Nats.
        base_rank: The token's place for the base, 1 for the likeliest.
        shift: Steered minus base logprob, nats.
        prob_change: Steered minus base probability.
        log_odds_change: Steered minus base log-odds, `log(p / (1 - p))`, nats.
        kl: KL(steered || base), nats.
        base_entropy: Nats.
        steered_entropy: Nats.
        offsets: By expert, nats.
        weights: By expert, what the recipe's policy multiplied its strength with; None without a policy.
        has_conflict: Whether the experts, each alone, would have chosen different tokens.
    """

    index: int
    token_id: int
    label: str
    piece: str
    part_of: str | None
    is_special: bool
    is_given: bool
    is_changed: bool | None
    base_choice: int | None
    steered_choice: int | None
    base_logprob: float | None
    steered_logprob: float | None
    base_rank: int | None
    shift: float | None
    prob_change: float | None
    log_odds_change: float | None
    kl: float | None
    base_entropy: float | None
    steered_entropy: float | None
    offsets: Mapping[str, float]
    weights: Mapping[str, float] | None = None
    has_conflict: bool | None = None

    @property
    def level(self) -> int:
        """How strongly the token is coloured: 1 to 3 for likelier, -1 to -3 for less likely, 0 for none."""
        if self.shift is None:
            return 0
        size = sum(abs(self.shift) >= step for step in LEVELS)
        return size if self.shift > 0 else -size


@dataclass(slots=True)
class Tally:
    """Sums over tokens; means are None where nothing was known.

    Args:
        num_tokens: All.
        num_known: Those of which it is known whether they are changed.
        num_changed: Those that are.
        num_shifts: Those whose shift is known.
    """

    num_tokens: int = 0
    num_known: int = 0
    num_changed: int = 0
    num_shifts: int = 0
    sum_shift: float = 0.0
    sum_prob_change: float = 0.0
    num_kl: int = 0
    sum_kl: float = 0.0

    def add(self, move: Move) -> None:
        """Count a token."""
        self.num_tokens += 1
        if move.is_changed is not None:
            self.num_known += 1
            self.num_changed += move.is_changed
        if move.shift is not None and move.prob_change is not None:
            self.num_shifts += 1
            self.sum_shift += move.shift
            self.sum_prob_change += move.prob_change
        if move.kl is not None:
            self.num_kl += 1
            self.sum_kl += move.kl

    @property
    def share_changed(self) -> float | None:
        """Changed tokens of those known."""
        return self.num_changed / self.num_known if self.num_known else None

    @property
    def mean_shift(self) -> float | None:
        """Nats."""
        return self.sum_shift / self.num_shifts if self.num_shifts else None

    @property
    def mean_prob_change(self) -> float | None:
        """Of the chosen token: the paper's Delta, section 6.1."""
        return self.sum_prob_change / self.num_shifts if self.num_shifts else None

    @property
    def mean_kl(self) -> float | None:
        """KL(steered || base), nats."""
        return self.sum_kl / self.num_kl if self.num_kl else None

    def to_dict(self) -> dict[str, Any]:
        """Return counts and means for JSON."""
        return {
            "num_tokens": self.num_tokens,
            "num_known": self.num_known,
            "num_changed": self.num_changed,
            "share_changed": self.share_changed,
            "mean_prob_change": self.mean_prob_change,
            "mean_shift": self.mean_shift,
            "mean_kl": self.mean_kl,
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """What steering did to a text.

    Args:
        tally: Its tokens, an end-of-sequence token included.
        early_share: How much of the log-odds change, summed without its sign, the first `EARLY_TOKENS` tokens
            bring; None if there is none.
        early_uniform_share: What it would be if every token brought as much.
        expert_shares: How much of all offsets, summed without their signs, each expert brings.
        conflict_rate: Share of tokens on which several experts disagreed; None where that is not known.
    """

    tally: Tally
    early_share: float | None
    early_uniform_share: float | None
    expert_shares: Mapping[str, float]
    conflict_rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {
            **self.tally.to_dict(),
            "early_tokens": EARLY_TOKENS,
            "early_share_of_log_odds_change": self.early_share,
            "early_share_if_uniform": self.early_uniform_share,
            "expert_shares_of_offsets": dict(self.expert_shares),
            "conflict_rate": self.conflict_rate,
        }


@dataclass(frozen=True, slots=True)
class TokenType:
    """All occurrences of one token.

    Args:
        token_id: Of the type.
        label: Its text.
        tally: Its occurrences.
        context: The commonest `CONTEXT_TOKENS` consecutive tokens that hold it, as text.
        num_context: How often these occur.
    """

    token_id: int
    label: str
    tally: Tally
    context: str
    num_context: int

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return {
            "token_id": self.token_id,
            "token": self.label,
            **self.tally.to_dict(),
            "context": self.context,
            "num_context": self.num_context,
        }


@dataclass(frozen=True, slots=True)
class Run:
    """One continuation of a prompt.

    Args:
        name: What it is called, such as `alpha 0.5`.
        trace: Explained.
        is_base: Whether it is the base's own.
        is_forked: Whether it goes on from another token than was chosen, its last given one.
    """

    name: str
    trace: Trace
    is_base: bool = False
    is_forked: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """A prompt and its continuations.

    Args:
        runs: The one that is explained first, then those beside it.
    """

    runs: tuple[Run, ...]

    @property
    def base(self) -> Run | None:
        """The base's own continuation, if there is one."""
        return next((run for run in self.runs if run.is_base), None)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers for JSON."""
        return {
            "prompt": self.runs[0].trace.prompt,
            "runs": [run_dict(run, self.base) for run in self.runs],
        }


# One token ----------------------------------------------------------------------------------------------


def label(token: str | bytes | None, token_id: int) -> str:
    """Return how a token is written by itself, bytes that are no whole characters as ⟨F0 9F⟩."""
    if token is None:
        return f"⟨token {token_id}⟩"
    if isinstance(token, str):
        return token
    text = token.decode("utf-8", "surrogateescape")
    return re.sub(
        "[\udc80-\udcff]+",
        lambda part: "⟨" + " ".join(f"{ord(c) - 0xDC00:02X}" for c in part[0]) + "⟩",
        text,
    )


def pieces(trace: Trace) -> list[tuple[str, str | None]]:
    """Return what each token adds to the text, and the character that it is a part of without completing it.

    Bytes that never become a character are U+FFFD at the token after which that is clear. Special tokens add
    nothing. Tokens that the trace knows no text of add what their step did.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts: list[str] = []
    owners: list[int | None] = [None] * len(trace.steps)
    open_parts: list[int] = []
    for index, step in enumerate(trace.steps):
        token = trace.tokens.get(step.token_id)
        is_last = index == len(trace.steps) - 1
        if step.token_id in trace.special_ids:
            text = decoder.decode(b"", True)  # half a character before it stays half
            decoder.reset()
        elif token is None:
            text = decoder.decode(b"", True) + step.text
            decoder.reset()
        else:
            content = token if isinstance(token, bytes) else token.encode()
            text = decoder.decode(content, is_last)
        if text:
            for part in open_parts:
                owners[part] = index
            open_parts = []
        if decoder.getstate()[0]:
            open_parts.append(index)
        texts.append(text)
    return [
        (text, None if owner is None else texts[owner][:1])
        for text, owner in zip(texts, owners, strict=True)
    ]


def moves(trace: Trace) -> list[Move]:
    """Return what steering did to each token.

    Raises:
        InvalidRequest: The trace is not explained.
    """
    if trace.steps and trace.steps[0].views is None:
        raise InvalidRequest(
            "the trace does not hold what each model gave its tokens.\n"
            "hint: generate with explain=True, or with proxytune explain"
        )
    shown = pieces(trace)
    return [
        _move(trace, step, piece, part_of)
        for step, (piece, part_of) in zip(trace.steps, shown, strict=True)
    ]


def _move(trace: Trace, step: Step, piece: str, part_of: str | None) -> Move:
    views = step.views or {}
    base, steered = views.get("base"), views.get("steered")
    base_logprob = base.logprob if base else None
    steered_logprob = steered.logprob if steered else None
    shift = prob_change = log_odds_change = None
    if base_logprob is not None and steered_logprob is not None:
        shift = steered_logprob - base_logprob
        prob_change = math.exp(steered_logprob) - math.exp(base_logprob)
        log_odds_change = _log_odds(steered_logprob) - _log_odds(base_logprob)
    return Move(
        index=step.index,
        token_id=step.token_id,
        label=label(trace.tokens.get(step.token_id), step.token_id),
        piece=piece,
        part_of=part_of,
        is_special=step.token_id in trace.special_ids,
        is_given=step.index < trace.num_given,
        is_changed=_is_changed(base, steered),
        base_choice=base.top[0][0] if base and base.top else None,
        steered_choice=steered.top[0][0] if steered and steered.top else None,
        base_logprob=base_logprob,
        steered_logprob=steered_logprob,
        base_rank=base.rank if base else None,
        shift=shift,
        prob_change=prob_change,
        log_odds_change=log_odds_change,
        kl=step.kl,
        base_entropy=base.entropy if base else None,
        steered_entropy=steered.entropy if steered else None,
        offsets=offsets(step, trace.alphas),
        weights=step.weights,
        has_conflict=step.has_conflict,
    )


def _is_changed(base: View | None, steered: View | None) -> bool | None:
    if base is None or steered is None:
        return None
    if base.top and steered.top:
        return base.top[0][0] != steered.top[0][0]
    # Without lists the ranks tell, if the token is either's first.
    if base.rank is None or steered.rank is None or (base.rank != 1 and steered.rank != 1):
        return None
    return base.rank != steered.rank


def _log_odds(logprob: float) -> float:
    miss = math.log(-math.expm1(logprob)) if logprob < 0 else -math.inf
    return logprob - max(miss, MIN_LOG_ODDS_MISS)


def offsets(step: Step, alphas: Mapping[str, float]) -> dict[str, float]:
    """Return each expert's `alpha * weight * (expert - anti_expert)` in logprobs, nats, where known."""
    views = step.views or {}
    found = {}
    for name, alpha in alphas.items():
        expert, anti_expert = views.get(f"{name}.expert"), views.get(f"{name}.anti_expert")
        if expert is None or anti_expert is None:
            continue
        if expert.logprob is not None and anti_expert.logprob is not None:
            weight = 1.0 if step.weights is None else step.weights.get(name, 1.0)
            found[name] = alpha * weight * (expert.logprob - anti_expert.logprob)
    return found


# A whole text -------------------------------------------------------------------------------------------


def summarise(told: Sequence[Move]) -> Summary:
    """Return what steering did to a text."""
    tally = Tally()
    early = total = 0.0
    by_expert: Counter[str] = Counter()
    for move in told:
        tally.add(move)
        size = abs(move.log_odds_change or 0.0)
        total += size
        early += size if move.index < EARLY_TOKENS else 0.0
        for name, offset in move.offsets.items():
            by_expert[name] += abs(offset)  # type: ignore[assignment]  # counts may be floats
    all_offsets = sum(by_expert.values())
    conflicts = [move.has_conflict for move in told if move.has_conflict is not None]
    return Summary(
        tally,
        early / total if total else None,
        min(1.0, EARLY_TOKENS / len(told)) if told else None,
        {name: size / all_offsets for name, size in by_expert.items()} if all_offsets else {},
        sum(conflicts) / len(conflicts) if conflicts else None,
    )


def token_types(told: Sequence[Move]) -> list[TokenType]:
    """Return the token types of a text, those first whose probability changed most in all."""
    tallies: dict[int, Tally] = {}
    labels: dict[int, str] = {}
    for move in told:
        tallies.setdefault(move.token_id, Tally()).add(move)
        labels[move.token_id] = move.label
    contexts = common_contexts([[move.token_id for move in told]], tallies)
    places: dict[tuple[int, ...], int] = {}
    for start in range(len(told)):
        for length in range(1, CONTEXT_TOKENS + 1):
            places.setdefault(tuple(m.token_id for m in told[start : start + length]), start)
    rows = []
    for token_id, tally in tallies.items():
        context, count = contexts.get(token_id, ((token_id,), 1))
        start = places[context]
        text = "".join(move.piece for move in told[start : start + len(context)])
        rows.append(TokenType(token_id, labels[token_id], tally, text, count))
    return sorted(rows, key=lambda row: -abs(row.tally.sum_prob_change))


def common_contexts(
    texts: Iterable[Sequence[int]], token_ids: Iterable[int]
) -> dict[int, tuple[tuple[int, ...], int]]:
    """Return, for certain tokens, the commonest `CONTEXT_TOKENS` consecutive tokens that hold them.

    Shorter texts are a context as a whole. Of equally common ones the first counts.

    Args:
        texts: Each as token ids.
        token_ids: Those wanted.

    Returns:
        By token, the context's ids and how often they occur.
    """
    wanted = set(token_ids)
    counts: dict[int, Counter[tuple[int, ...]]] = {token_id: Counter() for token_id in wanted}
    for ids in texts:
        for start in range(max(1, len(ids) - CONTEXT_TOKENS + 1)):
            window = tuple(ids[start : start + CONTEXT_TOKENS])
            for token_id in wanted.intersection(window):
                counts[token_id][window] += 1
    return {token_id: found.most_common(1)[0] for token_id, found in counts.items() if found}


def parting(one: Trace, other: Trace) -> int | None:
    """Return the first position at which two texts have different tokens; None if they are the same."""
    for index, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)):
        if a != b:
            return index
    shorter, longer = sorted((len(one.steps), len(other.steps)))
    return None if shorter == longer else shorter


# As rows ------------------------------------------------------------------------------------------------


def run_dict(run: Run, base: Run | None) -> dict[str, Any]:
    """Return all numbers of a run for JSON.

    Args:
        run: The run.
        base: The base's own continuation, to say where they part.
    """
    trace = run.trace
    told = moves(trace)
    return {
        "name": run.name,
        "is_base": run.is_base,
        "is_forked": run.is_forked,
        "alphas": dict(trace.alphas),
        "text": trace.text,
        "finish_reason": trace.finish_reason,
        "seed": trace.seed,
        "num_given": trace.num_given,
        "parts_from_base_at": None if base is None else parting(trace, base.trace),
        "summary": summarise(told).to_dict(),
        "tokens": [
            _row(move, trace) | {"views": _view_dicts(step, trace)}
            for move, step in zip(told, trace.steps, strict=True)
        ],
    }


def _row(move: Move, trace: Trace) -> dict[str, Any]:
    row = asdict(move)
    row["token"] = row.pop("label")
    for side in ("base_choice", "steered_choice"):
        chosen = row[side]
        text = None if chosen is None else label(trace.tokens.get(chosen), chosen)
        row[f"{side}_token"] = text
    return row


def _view_dicts(step: Step, trace: Trace) -> dict[str, Any]:
    return {
        name: {
            "logprob": view.logprob,
            "prob": None if view.logprob is None else math.exp(view.logprob),
            "rank": view.rank,
            "entropy": view.entropy,
            "top": [
                {"token_id": i, "token": label(trace.tokens.get(i), i), "logprob": logprob}
                for i, logprob in view.top
            ],
        }
        for name, view in (step.views or {}).items()
    }


def frame(trace: Trace) -> pandas.DataFrame:
    """Return one row per token: its figures, and each model's in `NAME.prob`, `NAME.rank` and so on.

    Raises:
        InvalidRequest: The trace is not explained.
        MissingExtra: pandas is not installed.
    """
    told = moves(trace)
    try:
        import pandas
    except ImportError as error:
        raise MissingExtra(
            "a trace becomes a table of pandas, which is not installed.\n"
            "hint: pip install 'proxytune[explain]'"
        ) from error
    rows = []
    for move, step in zip(told, trace.steps, strict=True):
        row = _row(move, trace)
        row |= {f"{name}.offset": value for name, value in row.pop("offsets").items()}
        row |= {f"{name}.weight": value for name, value in (row.pop("weights") or {}).items()}
        for name, view in (step.views or {}).items():
            row[f"{name}.prob"] = None if view.logprob is None else math.exp(view.logprob)
            row[f"{name}.logprob"] = view.logprob
            row[f"{name}.rank"] = view.rank
            row[f"{name}.entropy"] = view.entropy
        rows.append(row)
    table = pandas.DataFrame(rows)
    return table.set_index("index") if rows else table
