"""Reports as pages: one HTML file that needs no network.

The template is in `pages/`, with its style and its script; here the numbers of `explain/moves.py` are put
into it as JSON. A Content-Security-Policy allows exactly that style and that script, by their hashes.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from proxytune.explain.moves import label, moves
from proxytune.explain.report import Report, Run
from proxytune.explain.summary import first_difference, running_share, summarise, token_types
from proxytune.pages.policy import assemble, page_policy
from proxytune.trace import Trace, View

MAX_TYPES = 15
"""Maximum number of rows in the table of token types."""
DIGITS = 5
"""Decimals of the page's numbers: more than it shows, in a third of the bytes of full precision."""


def page(reports: Sequence[Report], *, recipe: str) -> str:
    """Return a page that shows one of several reports at a time.

    Args:
        reports: At least one report.
        recipe: Name of the recipe, as shown on the page.

    Raises:
        InvalidRequest: A trace is not explained.
    """
    template = assemble("report")
    data = {
        "recipe": recipe,
        "made": f"Made by proxytune {version('proxytune')}. Probabilities are before temperature, "
        "filters and penalties; entropies and shifts are in nats.",
        "reports": [
            {"prompt": r.prompt, "runs": [_run_data(run, r.base) for run in r.runs]}
            for r in reports
        ],
    }
    prompt = " ".join(reports[0].prompt.split())
    title = "Steering report" + (f": {prompt[:60]}" if prompt else "")
    policy, escaped = page_policy(template), html.escape(title)
    contents = {"policy": policy, "title": escaped, "data": _script_json(data)}
    # One pass, so that placeholders in the inserted text stay as they are.
    return re.sub("@(policy|title|data)@", lambda mark: contents[mark[1]], template)


def _script_json(data: Any) -> str:
    """Return JSON in which no text can end the HTML element that holds it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _run_data(run: Run, base: Run | None) -> dict[str, Any]:
    trace = run.trace
    token_moves = moves(trace)
    view_names = _view_names(trace)
    named = set(trace.token_ids)
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
        "parts": None if base is None else first_difference(trace, base.trace),
        "summary": summarise(token_moves).to_dict(),
        "runningShare": [_rounded(share) for share in running_share(token_moves)],
        "types": [
            [
                each.label,
                each.tally.num_tokens,
                each.tally.num_changed,
                _rounded(each.tally.mean_prob_change),
                _rounded(each.tally.mean_shift),
                each.context,
                each.num_context,
            ]
            for each in token_types(token_moves)[:MAX_TYPES]
        ],
        "tokens": {i: label(trace.tokens.get(i), i) for i in sorted(named)},
        "views": view_names,
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
                _rounded(move.shift),
                _rounded(move.kl),
                move.base_choice,
                {name: _rounded(offset) for name, offset in move.offsets.items()},
                move.weights and {name: _rounded(weight) for name, weight in move.weights.items()},
                [_view_data((step.views or {}).get(name)) for name in view_names],
                move.terms and {n: [*map(_rounded, each)] for n, each in move.terms.items()},
            ]
            for move, step in zip(token_moves, trace.steps, strict=True)
        ],
    }


def _view_names(trace: Trace) -> list[str]:
    """Return the models' names in the order of the formula: base, experts with anti-experts, steered."""
    names = list(trace.steps[0].views or {}) if trace.steps else []
    ends = [name for name in names if name in ("base", "steered")]
    experts = [name for name in names if name not in ends]
    return [*ends[:1], *experts, *ends[1:]]


def _view_data(view: View | None) -> list[Any]:
    if view is None:
        return [None, None, None, []]
    top = [number for token_id, logprob in view.top for number in (token_id, _rounded(logprob))]
    return [_rounded(view.logprob), view.rank, _rounded(view.entropy), top]


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, DIGITS)
