"""Steered text on a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from proxytune.commands.console import plain_table, stdout, strengths_text, styled
from proxytune.explain.moves import COLOURS

if TYPE_CHECKING:
    from rich.text import Text

    from proxytune.explain.moves import Move
    from proxytune.explain.report import Report
    from proxytune.trace import Trace
TABLE_ROWS = 10

INK = "#1d1b18"
STYLES = {level: f"{INK} on {colour}" for level, colour in COLOURS.items()}
"""By `Move.level`: the page's colours; dark letters on them can be read on any terminal."""
CHANGED = "\u2039{}\u203a"
"""Angle brackets, which texts seldom have: colour does not carry the meaning alone."""
INVISIBLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\xa0\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)
"""What could move a terminal's cursor, or turn the letters around it."""


def print_moves(report: Report, num_rows: int, *, is_first: bool) -> None:
    """Print what steering did to the tokens of a report's first run."""
    from proxytune.explain.moves import moves
    from proxytune.explain.summary import first_difference

    console = stdout()
    run = report.runs[0]
    moved = moves(run.trace)
    if not is_first:
        console.print()
        console.rule(style="dim")
    title = "given text, " if run.trace.finish_reason == "given" else ""
    console.print(title + strengths_text(run.trace.alphas), style="bold")
    text = styled(safe(run.trace.prompt), "dim")
    text.append_text(coloured(moved))
    console.print(text)
    if num_rows:
        _show_moved(moved, run.trace, num_rows)
    for other in report.runs[1:]:
        console.print()
        place = first_difference(other.trace, run.trace)
        where = "the same text" if place is None else f"parts at position {place}"
        label = "the base by itself" if other.is_base else other.name
        console.print(f"{label}: {where}", style="bold")
        shown = moves(other.trace)
        at = len(shown) if place is None else place
        body = styled(safe("".join(move.piece for move in shown[:at])), "dim")
        body.append(safe("".join(move.piece for move in shown[at:])))
        console.print(body)
    console.print()
    console.print(summary_line(moved))


def coloured(moved: Sequence[Move]) -> Text:
    """Return a text with each token coloured by its shift, changed ones in angle brackets."""
    text = styled("")
    text.end = ""
    for move in moved:
        piece = safe(move.piece)
        if move.is_special:
            piece += f"[{safe(move.label)}]"
        elif not piece:
            piece = "·"
        # The space before a word stays outside, as do line breaks, which a sign stands for.
        body = piece.strip(" \n")
        before, _, after = piece.partition(body) if body else ("", "", "")
        if not body:
            body = "↵" if "\n" in piece else piece
            after = piece if "\n" in piece else ""
        text.append(before)
        if move.is_changed:
            body = CHANGED.format(body)
        text.append(body, style=STYLES.get(move.level, ""))
        text.append(after)
    return text


def _show_moved(moved: Sequence[Move], trace: Trace, num_rows: int) -> None:
    from proxytune.explain.moves import label

    known = [m for m in moved if m.prob_change is not None and m.base_logprob is not None]
    most = sorted(known, key=lambda move: -abs(move.prob_change or 0.0))[:num_rows]
    if not most:
        return
    names = list(trace.alphas) if len(trace.alphas) > 1 else []
    words = ("position", "token", "base would say", "steered would say")
    numbers = ("rank in base", "base", "steered", "shift", "KL", *names)
    table = plain_table(*words, numbers=numbers, title="moved most")
    table.columns[0].justify = "right"
    for move in sorted(most, key=lambda move: move.index):
        base_prob, steered_prob = probs(move)
        firsts = ["", ""]
        if move.is_changed:
            firsts = [
                "" if chosen is None else shown_token(label(trace.tokens.get(chosen), chosen))
                for chosen in (move.base_choice, move.steered_choice)
            ]
        table.add_row(
            str(move.index),
            styled(shown_token(move.label), STYLES.get(move.level, "")),
            *firsts,
            "" if move.base_rank is None else str(move.base_rank),
            f"{base_prob:.1%}",
            f"{steered_prob:.1%}",
            f"{move.shift:+.2f}",
            "" if move.kl is None else f"{move.kl:.2f}",
            *(f"{move.offsets[name]:+.2f}" if name in move.offsets else "" for name in names),
        )
    stdout().print()
    stdout().print(table)


def probs(move: Move) -> tuple[float, float]:
    """Return a token's probability for the base and the steered model; both are known."""
    from math import exp

    assert move.base_logprob is not None and move.steered_logprob is not None
    return exp(move.base_logprob), exp(move.steered_logprob)


def summary_line(moved: Sequence[Move]) -> str:
    """Return what steering did to a text in one line."""
    from proxytune.explain.summary import EARLY_TOKENS, summarise

    summary = summarise(moved)
    tally = summary.tally
    parts = []
    if tally.share_changed is not None:
        parts.append(
            f"{tally.num_changed} of {tally.num_known} first choices changed ({tally.share_changed:.0%})"
        )
    if tally.mean_prob_change is not None and tally.mean_shift is not None:
        parts.append(
            f"on average {100 * tally.mean_prob_change:+.1f} points of probability, "
            f"{tally.mean_shift:+.2f} nats"
        )
    if tally.mean_kl is not None:
        parts.append(f"KL {tally.mean_kl:.2f} nats")
    if summary.early_share is not None and len(moved) > EARLY_TOKENS:
        parts.append(
            f"{summary.early_share:.0%} of the log-odds change in the first {EARLY_TOKENS} tokens"
        )
    if len(summary.expert_shares) > 1:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.expert_shares.items())
        parts.append(f"of the offsets: {shares}")
    return " · ".join(parts) or "no tokens"


def safe(text: str) -> str:
    """Return a text without characters that a terminal obeys or that turn others around."""
    return INVISIBLE.sub(lambda found: "\t" if found[0] == "\t" else f"⟨{ord(found[0]):02X}⟩", text)


def shown_token(text: str) -> str:
    """Return a token as it stands in a table: spaces and line breaks can be seen."""
    return safe(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")) or "(nothing)"
