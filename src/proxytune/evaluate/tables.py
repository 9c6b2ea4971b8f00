"""Evaluations shown: as a table for the terminal, a page in Markdown, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxytune.evaluate.compare import EvalReport, Result, TaskReport
from proxytune.files import save_figure
from proxytune.tasks.statistics import Gap

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "predictor", "metric", "± SE", "n", "change", "p base", "p expert", "gap closed", "tokens/s",
)  # fmt: skip
COLOURS = {
    "base": "#9aa5b1", "expert": "#0f766e", "steered": "#1f6feb", "tuned": "#c2410c", "nudged": "#7c3aed",
}  # fmt: skip


def percent(value: float | None, scale: float) -> str:
    """Return a metric in percent, or `-` for None."""
    return "-" if value is None else f"{value * 100 / scale:.1f}"


def p_text(value: float | None) -> str:
    """Return a probability for a table."""
    if value is None:
        return ""
    return "<0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def gap_text(gap: Gap) -> str:
    """Return the gap closed with its interval, in percent."""
    if gap.share is None:
        return ""
    if gap.interval is None:
        return f"{gap.share:.0%}"
    return f"{gap.share:.0%} ({gap.interval[0]:.0%} to {gap.interval[1]:.0%})"


def cells(task: TaskReport, result: Result) -> list[str]:
    """Return a predictor's row of the table, in the order of `COLUMNS`."""
    scored = sum(score is not None for score in result.grade.scores.values())
    change = result.difference
    return [
        result.predictor.name,
        percent(result.grade.metric, task.scale),
        percent(result.grade.error, task.scale),
        f"{scored:,}",
        "" if change is None else f"{change * 100 / task.scale:+.1f}",
        p_text(result.p_base),
        p_text(result.p_expert),
        gap_text(result.gap),
        "" if result.tokens_per_s is None else f"{result.tokens_per_s:.1f}",
    ]


def terminal_table(task: TaskReport) -> Table:
    """Return a benchmark's table for the terminal."""
    from rich.table import Table

    better = ", lower is better" if task.lower_is_better else ""
    title = f"{task.title}: {task.metric} in %{better}; {task.num_items:,} items"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left")
    for result in task.results:
        table.add_row(*cells(task, result))
    return table


def markdown(report: EvalReport, command: str) -> str:
    """Return the whole evaluation as a page; `command` repeats it."""
    lines = [
        f"# {report.recipe}",
        "",
        f"Written by `{command}`.",
        "",
        ", ".join(f"{key} {value}" for key, value in report.environment.items()) + ".",
        "",
    ]
    for task in report.tasks:
        better = ", lower is better" if task.lower_is_better else ""
        lines += [
            f"## {task.title}",
            "",
            f"{task.metric} in percent{better}, by the rule `{report.options.rule}`; "
            f"{task.num_items:,} items.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "| --- |" + " ---: |" * (len(COLUMNS) - 1),
            *("| " + " | ".join(cells(task, result)) + " |" for result in task.results),
            "",
            *(f"- {note}" for note in task.notes),
            *([""] if task.notes else []),
        ]
    if report.mean_gaps:
        lines += [
            "## Gap closed, mean over the benchmarks",
            "",
            *(f"- {name}: {gap_text(gap)}" for name, gap in report.mean_gaps.items()),
            "",
        ]
    lines += [
        "± SE is one standard error over items. Change is against the base. p is the probability of a "
        "difference this large from the base, or from the expert, if the two were equally good. It is "
        "paired over items: an exact sign test if answers are right or wrong, otherwise by flipping signs. "
        "It is not corrected for the number of comparisons. Gap closed is the share of the tuned model's "
        "gain over the base, with a 95 % interval by resampling items. It is left out if that gain is "
        "uncertain. Tokens/s counts all rows of a batch.",
        "",
    ]
    return "\n".join(lines)


def picture(report: EvalReport, path: Path) -> None:
    """Draw every benchmark's predictors with bars of one standard error, as a PNG.

    Raises:
        OutputFileError: It cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in report.tasks if any(r.grade.metric is not None for r in task.results)]
    count = max(1, len(tasks))
    figure, axes = pyplot.subplots(1, count, figsize=(3.4 * count, 3.4), dpi=120, squeeze=False)
    if not tasks:
        axes[0][0].text(0.5, 0.5, "nothing is scored", ha="center")
        axes[0][0].set_axis_off()
    for axis, task in zip(axes[0], tasks, strict=False):
        _draw(axis, task, task.results)
    figure.tight_layout()
    try:
        save_figure(figure, path)
    finally:
        pyplot.close(figure)


def _draw(axis: Any, task: TaskReport, results: Sequence[Result]) -> None:
    shown = [result for result in results if result.grade.metric is not None]
    values = [(result.grade.metric or 0.0) * 100 / task.scale for result in shown]
    errors = [(result.grade.error or 0.0) * 100 / task.scale for result in shown]
    places = range(len(shown))
    colours = [COLOURS[result.predictor.role] for result in shown]
    names = [result.predictor.name for result in shown]
    axis.bar(places, values, yerr=errors, capsize=3, color=colours, width=0.7)
    axis.set_xticks(list(places), names, rotation=30, ha="right")
    axis.set_title(task.title, fontsize=10)
    better = ", lower is better" if task.lower_is_better else ""
    axis.set_ylabel(f"{task.metric}, %{better}", fontsize=9)
    axis.set_ylim(0, max(1.0, 1.05 * max(v + e for v, e in zip(values, errors, strict=True))))
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
