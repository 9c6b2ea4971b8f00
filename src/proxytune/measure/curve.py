"""A sweep drawn: a curve for one expert, a map for two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proxytune.errors import InvalidRequest, missing_extra
from proxytune.files import save_figure
from proxytune.measure.metrics import METRICS
from proxytune.measure.sweep import Grid, SweepReport


def draw(report: SweepReport, grid: Grid, path: Path) -> None:
    """Draw a sweep: a curve with its error band, or a map if the strengths of two experts vary.

    Raises:
        MissingExtra: matplotlib is not installed.
        InvalidRequest: The strengths of more than two experts vary, or none do.
        OutputFileError: The file cannot be written, or its format is unknown.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra(
            "drawing needs matplotlib, which is not installed", "tune", "or leave --picture out"
        ) from error
    varied = grid.varied
    if not 1 <= len(varied) <= 2:
        raise InvalidRequest(
            f"the strengths of {len(varied)} experts vary, and a picture shows one or two.\n"
            "hint: leave out --picture; the table and --json have every point"
        )
    title = METRICS[report.metric].title if report.metric in METRICS else report.metric
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    if len(varied) == 1:
        _draw_curve(axes, report, grid, varied[0], title)
    else:
        _draw_map(figure, axes, report, grid, varied, title)
    save_figure(figure, path, dpi=150)


def _draw_curve(axes: Any, report: SweepReport, grid: Grid, which: int, title: str) -> None:
    order = sorted(range(len(grid.points)), key=lambda n: grid.points[n][which])
    alphas = [grid.points[n][which] for n in order]
    points = [report.points[n] for n in order]
    # Changes against the base are resampled in pairs: units differ more than points do.
    scale = 100.0 if report.metric == "perplexity" else 1.0
    axes.axhline(0, color="0.5", linestyle="--", linewidth=1, label="base")
    changes = [scale * p.change for p in points]
    axes.plot(alphas, changes, "o-", markersize=4, color="C0", label="validation")
    bands = [p.change_interval for p in points if p.change_interval is not None]
    if len(bands) == len(points):
        low, high = [scale * band.low for band in bands], [scale * band.high for band in bands]
        style = {"color": "C0", "alpha": 0.2, "linewidth": 0}
        axes.fill_between(alphas, low, high, **style, label="its 95 % interval")
    chosen = grid.points[report.picked][which]
    best = report.test["picked"]
    error = None
    if best.change_interval is not None:
        below = max(0.0, best.change - best.change_interval.low)
        above = max(0.0, best.change_interval.high - best.change)
        error = [[scale * below], [scale * above]]
    axes.errorbar(
        [chosen], [scale * best.change], yerr=error, fmt="D", color="C3", capsize=3,
        label=f"test, alpha {chosen:g} as picked",
    )  # fmt: skip
    is_alike = len(grid.names) > 1 and all(len(set(point)) == 1 for point in grid.points)
    axes.set_xlabel("alpha of " + (", ".join(grid.names) if is_alike else grid.names[which]))
    unit = " (%)" if report.metric == "perplexity" else ""
    better = ", lower is better" if report.is_lower_better else ""
    axes.set_ylabel(f"{title} against base{unit}{better}")
    axes.legend(fontsize=8)


def _draw_map(
    figure: Any, axes: Any, report: SweepReport, grid: Grid, varied: Sequence[int], title: str
) -> None:
    first, second = varied
    columns = sorted({point[first] for point in grid.points})
    rows = sorted({point[second] for point in grid.points})
    values = np.full((len(rows), len(columns)), np.nan)
    for point, found in zip(grid.points, report.points, strict=True):
        values[rows.index(point[second]), columns.index(point[first])] = found.value
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis")
    for row in range(len(rows)):
        for column in range(len(columns)):
            axes.text(
                column, row, f"{values[row, column]:.3g}", ha="center", va="center", fontsize=8,
                color="white", bbox={"facecolor": "black", "alpha": 0.4, "pad": 1, "linewidth": 0},
            )  # fmt: skip
    best = grid.points[report.picked]
    axes.plot(columns.index(best[first]), rows.index(best[second]), "s", markersize=34,
              markerfacecolor="none", markeredgecolor="C3", markeredgewidth=2)  # fmt: skip
    axes.set_xticks(range(len(columns)), [f"{alpha:g}" for alpha in columns])
    axes.set_yticks(range(len(rows)), [f"{alpha:g}" for alpha in rows])
    axes.set_xlabel(f"alpha ({grid.names[first]})")
    axes.set_ylabel(f"alpha ({grid.names[second]})")
    figure.colorbar(image, label=title)
