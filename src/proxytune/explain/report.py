"""A report: a prompt and its continuations, as numbers for JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from proxytune.explain.moves import Move, label, moves
from proxytune.explain.summary import first_difference, summarise
from proxytune.trace import Step, Trace


@dataclass(frozen=True, slots=True)
class Run:
    """One continuation of a prompt.

    Args:
        name: Its name in the report, such as `alpha 0.5`.
        trace: The explained trace.
        is_base: Whether this is the base's own continuation.
        is_forked: Whether it continues from a token that was not chosen: the last of the given ones.
    """

    name: str
    trace: Trace
    is_base: bool = False
    is_forked: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """A prompt and its continuations: first the one that is explained, then those it is compared with."""

    runs: tuple[Run, ...]

    @property
    def prompt(self) -> str:
        """The prompt."""
        return self.runs[0].trace.prompt

    @property
    def base(self) -> Run | None:
        """The base's own continuation, if there is one."""
        return next((run for run in self.runs if run.is_base), None)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers for JSON."""
        return {"prompt": self.prompt, "runs": [_run_dict(run, self.base) for run in self.runs]}


def _run_dict(run: Run, base: Run | None) -> dict[str, Any]:
    trace = run.trace
    token_moves = moves(trace)
    return {
        "name": run.name,
        "is_base": run.is_base,
        "is_forked": run.is_forked,
        "alphas": dict(trace.alphas),
        "text": trace.text,
        "finish_reason": trace.finish_reason,
        "seed": trace.seed,
        "num_given": trace.num_given,
        "parts_from_base_at": None if base is None else first_difference(trace, base.trace),
        "summary": summarise(token_moves).to_dict(),
        "tokens": [
            move_row(move, trace) | {"views": _view_dicts(step, trace)}
            for move, step in zip(token_moves, trace.steps, strict=True)
        ],
    }


def move_row(move: Move, trace: Trace) -> dict[str, Any]:
    """Return the fields of one token's row in a report's JSON."""
    row = asdict(move)
    row["terms"] = move.terms and {name: each._asdict() for name, each in move.terms.items()}
    row["token"] = row.pop("label")
    for side in ("base_choice", "steered_choice"):
        i = row[side]
        row[f"{side}_token"] = None if i is None else label(trace.tokens.get(i), i)
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
