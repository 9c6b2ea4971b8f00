"""A prompt and its continuations."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from proxytune.explain.moves import Move, label, moves
from proxytune.explain.summary import parting, summarise
from proxytune.trace import Step, Trace


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
            move_row(move, trace) | {"views": _view_dicts(step, trace)}
            for move, step in zip(told, trace.steps, strict=True)
        ],
    }


def move_row(move: Move, trace: Trace) -> dict[str, Any]:
    """Return the fields of one token's row in a report's JSON."""
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
