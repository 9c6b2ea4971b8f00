"""Reports as pages: one HTML file that needs no network, and a fragment for notebooks.

The template is in `pages/`, with its style and its script; here the numbers of `report.py` are put into it as
JSON. A Content-Security-Policy allows exactly that style and that script, by their hashes.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from proxytune.pages.policy import assemble, page_policy
from proxytune.report import Move, Report, Run, label, moves, parting, summarise, token_types
from proxytune.trace import Trace, View

MAX_TYPES = 15
"""Rows of the table of token types."""
RUNNING_TOKENS = 11
"""Tokens that a point of the curve of changed choices is the mean of."""
DIGITS = 5
"""Decimals of the page's numbers: more than it shows, and a third of the bytes of all."""

FRAGMENT_COLOURS = {
    -3: "#79b2e2",
    -2: "#b0d2f0",
    -1: "#dfecf8",
    1: "#fdebd0",
    2: "#fbcb8d",
    3: "#f0a24a",
}
"""By `Move.level`: the page's colours by day. Blue and orange stay apart for colour-blind readers."""


def page(reports: Sequence[Report], *, recipe: str) -> str:
    """Return a page that shows reports, one at a time.

    Args:
        reports: At least one.
        recipe: How the page calls what was run.

    Raises:
        InvalidRequest: A trace is not explained.
    """
    template = assemble("report")
    data = {
        "recipe": recipe,
        "made": f"Made by proxytune {version('proxytune')}. Probabilities are those before temperature, "
        "filters and penalties; entropies and shifts are in nats.",
        "reports": [_report_data(report) for report in reports],
    }
    prompt = " ".join(reports[0].runs[0].trace.prompt.split())
    title = "Steering report" + (f": {prompt[:60]}" if prompt else "")
    contents = {
        "policy": page_policy(template),
        "title": html.escape(title),
        "data": _script_json(data),
    }
    # One pass: what is put in is not looked at again.
    return re.sub("@(policy|title|data)@", lambda mark: contents[mark[1]], template)


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


def _script_json(data: Any) -> str:
    """Return JSON that no HTML parser takes for the end of its element, whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _report_data(report: Report) -> dict[str, Any]:
    base = report.base
    return {
        "prompt": report.runs[0].trace.prompt,
        "runs": [_run_data(run, base) for run in report.runs],
    }


def _run_data(run: Run, base: Run | None) -> dict[str, Any]:
    trace = run.trace
    told = moves(trace)
    names = _view_names(trace)
    named = {token_id for step in trace.steps for token_id in (step.token_id,)}
    for step in trace.steps:
        for view in (step.views or {}).values():
            named |= {token_id for token_id, _ in view.top}
    return {
        "name": run.name,
        "isBase": run.is_base,
        "isForked": run.is_forked,
        "alphas": dict(trace.alphas),
        "finish": trace.finish_reason,
        "seed": trace.seed,
        "numGiven": trace.num_given,
        "parts": None if base is None else parting(trace, base.trace),
        "summary": summarise(told).to_dict(),
        "runningShare": [_short(share) for share in running_share(told)],
        "types": [
            [
                kind.label,
                kind.tally.num_tokens,
                kind.tally.num_changed,
                _short(kind.tally.mean_prob_change),
                _short(kind.tally.mean_shift),
                kind.context,
                kind.num_context,
            ]
            for kind in token_types(told)[:MAX_TYPES]
        ],
        "tokens": {i: label(trace.tokens.get(i), i) for i in sorted(named)},
        "views": names,
        "rows": [
            [
                move.token_id,
                move.piece,
                move.part_of,
                move.is_special
                + 2 * move.is_given
                + 4 * (move.is_changed or False)
                + 8 * (move.has_conflict or False),
                move.level,
                _short(move.shift),
                _short(move.kl),
                move.base_choice,
                {name: _short(offset) for name, offset in move.offsets.items()},
                move.weights and {name: _short(weight) for name, weight in move.weights.items()},
                [_view_data((step.views or {}).get(name)) for name in names],
            ]
            for move, step in zip(told, trace.steps, strict=True)
        ],
    }


def _view_names(trace: Trace) -> list[str]:
    """Return the models in the order of the formula: base, experts with anti-experts, steered."""
    names = list(trace.steps[0].views or {}) if trace.steps else []
    ends = [name for name in names if name in ("base", "steered")]
    experts = [name for name in names if name not in ends]
    return [*ends[:1], *experts, *ends[1:]]


def _view_data(view: View | None) -> list[Any]:
    if view is None:
        return [None, None, None, []]
    top = [number for token_id, logprob in view.top for number in (token_id, _short(logprob))]
    return [_short(view.logprob), view.rank, _short(view.entropy), top]


def running_share(told: Sequence[Move]) -> list[float | None]:
    """Return for each token the share of changed ones among the `RUNNING_TOKENS` around it."""
    half = RUNNING_TOKENS // 2
    shares: list[float | None] = []
    for place in range(len(told)):
        around = told[max(0, place - half) : place + half + 1]
        known = [move.is_changed for move in around if move.is_changed is not None]
        shares.append(sum(known) / len(known) if known else None)
    return shares


def _short(number: float | None) -> float | None:
    return None if number is None else round(number, DIGITS)
