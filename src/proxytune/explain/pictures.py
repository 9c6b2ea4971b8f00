"""Traces and analyses drawn with matplotlib; the numbers are computed elsewhere."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from proxytune.errors import missing_extra
from proxytune.explain.moves import moves
from proxytune.explain.summary import running_share
from proxytune.files import save_figure
from proxytune.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from proxytune.explain.analysis import Analysis

MORE, LESS, INK = "#d9822b", "#4a90c9", "#444444"
"""More likely, less likely, anything else. The first two are the pages' colours, darker for thin lines."""
LINES = ("#4a90c9", "#d9822b", "#54399d", "#2f7d5b", "#8b867c", "#a3260f")


def draw_trace(trace: Trace, axes: Axes | None = None) -> Axes:
    """Draw each token's shift against its position, and the share of changed first choices around it.

    Args:
        trace: An explained trace.
        axes: Where to draw; None makes a new figure.

    Raises:
        InvalidRequest: The trace is not explained.
        MissingExtra: matplotlib is not installed.
    """
    token_moves = moves(trace)
    if axes is None:
        _, axes = _pyplot().subplots(figsize=(8, 2.8), layout="constrained")
    shifts = [move.shift or 0.0 for move in token_moves]
    places = [move.index for move in token_moves]
    axes.bar(places, shifts, width=1.0, color=[MORE if shift > 0 else LESS for shift in shifts])
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("position")
    axes.set_ylabel("shift, nats")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    shares = running_share(token_moves)
    known = [place for place, share in zip(places, shares, strict=True) if share is not None]
    beside = axes.twinx()
    beside.plot(known, [shares[place] or 0.0 for place in known], color=INK, linewidth=1)
    beside.set_ylim(0, 1.02)
    beside.set_ylabel("first choices changed")
    beside.spines[["top"]].set_visible(False)
    title = "orange: more likely than under the base; blue: less likely"
    axes.set_title(title, fontsize=9, loc="left")
    return axes


def draw_analysis(analysis: Analysis, path: Path) -> None:
    """Draw change against position, the token types that moved most, equations, and change against alpha.

    Args:
        analysis: The numbers; panels without data are left out.
        path: Output file; its suffix selects the format.

    Raises:
        MissingExtra: matplotlib is not installed.
        OutputFileError: The picture cannot be written.
    """
    pyplot = _pyplot()
    groups = analysis.groups
    has_equations = any(group.left.num_tokens and group.right.num_tokens for group in groups)
    with_alphas = [group for group in groups if group.strength is not None]
    panels = [_draw_positions, _draw_types]
    panels += [_draw_equations] if has_equations else []
    panels += [_draw_alphas] if len(with_alphas) > 1 else []
    rows = (len(panels) + 1) // 2
    figure, grid = pyplot.subplots(
        rows, 2, figsize=(11, 4.1 * rows), dpi=100, layout="constrained", squeeze=False
    )
    cells = [cell for row in grid for cell in row]
    for cell, draw in zip(cells, panels, strict=False):
        cell.spines[["top", "right"]].set_visible(False)
        draw(cell, analysis)
    for cell in cells[len(panels) :]:
        cell.set_visible(False)
    try:
        save_figure(figure, path)
    finally:
        pyplot.close(figure)


def _draw_positions(axes: Axes, analysis: Analysis) -> None:
    for group, colour in zip(analysis.groups, cycle(LINES), strict=False):
        points = [point for point in group.position_bins() if point.share_changed is not None]
        middles = [(point.first + point.last) / 2 for point in points]
        shares = [100 * (point.share_changed or 0.0) for point in points]
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.4}
        axes.plot(middles, shares, **style, label=_literal(group.name))
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.set_xlabel("position in the text")
    axes.set_ylabel("first choices changed, %")
    axes.set_title("Change against position", loc="left")
    if len(analysis.groups) > 1:
        axes.legend(frameon=False, fontsize=9)
    ticks = [0, 2, 5, 10, 30, 100, 300, 1000, 3000]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(0, max(10, *(len(group.positions) for group in analysis.groups)))


def _draw_types(axes: Axes, analysis: Analysis) -> None:
    group = max(analysis.groups, key=lambda group: group.tally.num_tokens)
    types = group.types[:14][::-1]
    means = [each.tally.mean_prob_change or 0.0 for each in types]
    names = [_printable(each.label) for each in types]
    axes.barh(range(len(types)), means, color=[MORE if mean > 0 else LESS for mean in means])
    axes.set_yticks(range(len(types)), names, fontsize=9, parse_math=False)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("mean change in probability")
    name = f", {_literal(group.name)}" if len(analysis.groups) > 1 else ""
    axes.set_title(f"Token types that moved most{name}", loc="left")


def _draw_equations(axes: Axes, analysis: Analysis) -> None:
    groups = [g for g in analysis.groups if g.left.num_tokens and g.right.num_tokens]
    width = 0.38
    for offset, side, colour in ((-width / 2, "left", MORE), (width / 2, "right", LESS)):
        tallies = [getattr(group, side) for group in groups]
        axes.bar(
            [place + offset for place in range(len(groups))],
            [tally.mean for tally in tallies],
            width,
            yerr=[1.96 * tally.standard_error for tally in tallies],
            color=colour,
            ecolor=INK,
            capsize=3,
            label=f"{side}-hand side",
        )
    axes.set_xticks(range(len(groups)), [_literal(group.name) for group in groups], fontsize=9)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_ylabel("mean change in probability")
    axes.set_title("Tokens in equations (bars: 95 % intervals)", loc="left")
    axes.legend(frameon=False, fontsize=9)


def _draw_alphas(axes: Axes, analysis: Analysis) -> None:
    groups = sorted(
        (group for group in analysis.groups if group.strength is not None),
        key=lambda group: group.strength or 0.0,
    )
    strengths = [group.strength or 0.0 for group in groups]
    shares = [100 * (group.tally.share_changed or 0.0) for group in groups]
    axes.plot(strengths, shares, color=INK, marker="o", label="first choices changed, %")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("alpha")
    axes.set_ylabel("first choices changed, %")
    beside = axes.twinx()
    means = [group.tally.mean_kl or 0.0 for group in groups]
    beside.plot(strengths, means, color=MORE, marker="s", linestyle="--")
    beside.set_ylim(bottom=0)
    beside.spines[["top"]].set_visible(False)
    beside.set_ylabel("mean KL(steered ‖ base), nats (dashed)", color="#9a5a12")
    axes.set_title("Change against alpha", loc="left")


def _printable(text: str) -> str:
    """Return a token with characters that the fonts can draw."""
    shown = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in shown) or "(nothing)"


def _literal(name: str) -> str:
    """Return a name that matplotlib does not read as mathematics; that of a saved trace may be any text."""
    return _printable(name).replace("$", r"\$")


def _pyplot() -> ModuleType:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        message = "pictures need matplotlib, which is not installed"
        raise missing_extra(message, "explain") from error
    return pyplot
