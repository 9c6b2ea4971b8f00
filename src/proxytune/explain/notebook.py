"""A trace in a notebook: as a table, as a picture, as coloured text.

from proxytune.explain.notebook import frame, plot, show

show(trace)
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxytune.errors import missing_extra
from proxytune.explain.moves import COLOURS, Move, label, moves
from proxytune.explain.pictures import draw_trace as plot
from proxytune.explain.report import move_row
from proxytune.explain.summary import summarise
from proxytune.trace import Trace

if TYPE_CHECKING:
    import pandas

__all__ = ["frame", "plot", "show"]


def frame(trace: Trace) -> pandas.DataFrame:
    """Return a table with a row per token and columns `NAME.prob`, `NAME.rank` and so on for each model.

    Raises:
        InvalidRequest: The trace is not explained.
        MissingExtra: pandas is not installed.
    """
    token_moves = moves(trace)
    try:
        import pandas
    except ImportError as error:
        message = "tables of traces need pandas, which is not installed"
        raise missing_extra(message, "explain") from error
    rows = []
    for move, step in zip(token_moves, trace.steps, strict=True):
        row = move_row(move, trace)
        row |= {f"{name}.offset": value for name, value in row.pop("offsets").items()}
        for name, terms in (row.pop("terms") or {}).items():
            row |= {f"{name}.offset.{part}": value for part, value in terms.items()}
        row |= {f"{name}.weight": value for name, value in (row.pop("weights") or {}).items()}
        for name, view in (step.views or {}).items():
            row[f"{name}.prob"] = None if view.logprob is None else math.exp(view.logprob)
            row[f"{name}.logprob"] = view.logprob
            row[f"{name}.rank"] = view.rank
            row[f"{name}.entropy"] = view.entropy
        rows.append(row)
    table = pandas.DataFrame(rows)
    return table.set_index("index") if rows else table


@dataclass(frozen=True, slots=True)
class ShownTrace:
    """A trace that a notebook displays with each token coloured by what steering did to it."""

    trace: Trace

    def __repr__(self) -> str:
        return self.trace.text

    def _repr_html_(self) -> str | None:
        return fragment(self.trace)


def show(trace: Trace) -> ShownTrace:
    """Return a trace for display by the last line of a notebook cell.

    The tokens of an explained trace are coloured by what steering did to them. Otherwise the plain text is
    shown.
    """
    return ShownTrace(trace)


def fragment(trace: Trace) -> str | None:
    """Return an explained trace as HTML without scripts, for notebooks; None if it is not explained."""
    if not trace.steps or trace.steps[0].views is None:
        return None
    token_moves = moves(trace)
    tally = summarise(token_moves).tally
    parts = []
    for move in token_moves:
        colour = COLOURS.get(move.level)
        style = f"background:{colour};color:#1d1b18;" if colour else ""
        if move.is_changed:
            style += "text-decoration:underline 2px;text-underline-offset:4px;"
        text = html.escape(move.piece) or ("⏹" if move.is_special else "·")
        hint = html.escape(_hint(trace, move))
        parts.append(f'<span style="{style}" title="{hint}">{text}</span>')
    facts = []
    if tally.share_changed is not None:
        facts.append(f"{tally.share_changed:.0%} of first choices changed (underlined)")
    if tally.mean_prob_change is not None:
        facts.append(f"mean change in probability {tally.mean_prob_change:+.3f}")
    if tally.mean_kl is not None:
        facts.append(f"mean KL(steered ‖ base) {tally.mean_kl:.2f} nats")
    facts.append("orange: more likely than under the base; blue: less likely; hover for details")
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
