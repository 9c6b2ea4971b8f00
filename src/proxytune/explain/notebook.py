"""A trace as a table, a picture, coloured text."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

from proxytune.errors import missing_extra
from proxytune.explain.moves import Move, label, moves
from proxytune.explain.report import move_row
from proxytune.explain.summary import summarise
from proxytune.trace import Trace

if TYPE_CHECKING:
    import pandas


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
        raise missing_extra(
            "a trace becomes a table of pandas, which is not installed", "explain"
        ) from error
    rows = []
    for move, step in zip(told, trace.steps, strict=True):
        row = move_row(move, trace)
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


FRAGMENT_COLOURS = {
    -3: "#79b2e2",
    -2: "#b0d2f0",
    -1: "#dfecf8",
    1: "#fdebd0",
    2: "#fbcb8d",
    3: "#f0a24a",
}
"""By `Move.level`: the page's colours by day. Blue and orange stay apart for colour-blind readers."""


def fragment(trace: Trace) -> str | None:
    """Return a trace as HTML without scripts, for notebooks; None if it is not explained."""
    if not trace.steps or trace.steps[0].views is None:
        return None
    told = moves(trace)
    summary = summarise(told)
    parts = []
    for move in told:
        colour = FRAGMENT_COLOURS.get(move.level)
        style = f"background:{colour};color:#1d1b18;" if colour else ""
        if move.is_changed:
            style += "text-decoration:underline 2px;text-underline-offset:4px;"
        text = html.escape(move.piece) or ("⏹" if move.is_special else "·")
        parts.append(
            f'<span style="{style}" title="{html.escape(_hint(trace, move))}">{text}</span>'
        )
    facts = []
    tally = summary.tally
    if tally.share_changed is not None:
        facts.append(f"{tally.share_changed:.0%} of first choices changed (underlined)")
    if tally.mean_prob_change is not None:
        facts.append(f"mean change of probability {tally.mean_prob_change:+.3f}")
    if tally.mean_kl is not None:
        facts.append(f"mean KL(steered ‖ base) {tally.mean_kl:.2f} nats")
    facts.append("orange: likelier than under the base; blue: less likely; hover for figures")
    return (
        '<div><div dir="auto" style="white-space:pre-wrap;line-height:1.8;unicode-bidi:isolate">'
        f'<span style="opacity:.65">{html.escape(trace.prompt)}</span>{"".join(parts)}</div>'
        f'<div style="opacity:.75;font-size:90%">{html.escape(" · ".join(facts))}</div></div>'
    )


def _hint(trace: Trace, move: Move) -> str:
    parts = [move.label]
    if move.base_logprob is not None and move.prob_change is not None and move.shift is not None:
        prob = math.exp(move.base_logprob)
        parts.append(f"{prob:.3g} → {prob + move.prob_change:.3g} ({move.shift:+.2f} nats)")
    if move.is_changed and move.base_choice is not None:
        chosen = label(trace.tokens.get(move.base_choice), move.base_choice)
        parts.append(f"base's first choice: {chosen}")
    return ": ".join(parts[:2]) + "".join(f"; {part}" for part in parts[2:])
