"""Score the predictions that the paper's authors published, and write the results to docs/reproduction.md.

    python benchmarks/published.py --results proxy-tuning/results

The folder is `results/` of github.com/alisawuffles/proxy-tuning, or a part of it, compressed with gzip or
not. The page compares, for every run, the metrics published beside the predictions, those of `proxytune
grade` by both rules, and those that the paper prints. The predictions themselves are not written.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from proxytune.tasks.registry import TASKS
from proxytune.tasks.rows import read_rows
from proxytune.tasks.task import RULES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
NUMBERS = ROOT / "docs" / "reproduction.json"
BEGIN, END = "<!-- begin of what benchmarks/published.py writes -->", "<!-- end of it -->"
TOLERANCE = 1e-9
"""A sum in another order differs in the last digits; published values of judges' scores have twelve."""


class Layout(NamedTuple):
    """The files of a benchmark in a run's folder, and the task that scores them."""

    folder: str
    task: str
    predictions: str
    metrics: str


LAYOUTS = (
    Layout("gsm", "gsm8k", "predictions.jsonl", "metrics.json"),
    Layout("toxigen", "toxigen", "predictions.jsonl", "metrics.json"),
    Layout("truthfulqa", "truthfulqa_mc", "mc_results.jsonl", "mc_metrics.json"),
    Layout("truthfulqa", "truthfulqa_open", "open_results.jsonl", "open_metrics.json"),
    Layout("alpaca_farm", "alpaca_eval", "annotations.json", "metrics.json"),
    Layout("codex_humaneval", "humaneval", "predictions_results.jsonl", "metrics.json"),
    Layout("ds1000", "ds1000", "predictions.jsonl", "metrics.json"),
)

# What the paper prints, in percent: arXiv:2401.08565v4, tables 2 to 5. A run is printed in more than one
# table.
PRINTED: dict[tuple[str, str, str], dict[str, float]] = {
    ("alpaca_eval", "win_rate", "Table 2"): {
        "llama2-chat-7B": 82.5, "llama2-13B": 2.1, "dexperts-13B": 83.4, "llama2-chat-13B": 87.3,
        "llama2-70B": 3.7, "dexperts-70B": 88.0, "llama2-chat-70B": 90.4,
    },
    ("gsm8k", "exact_match", "Table 2"): {
        "llama2-chat-7B": 23.0, "llama2-13B": 6.6, "dexperts-13B": 26.4, "llama2-chat-13B": 32.4,
        "llama2-70B": 9.6, "dexperts-70B": 32.0, "llama2-chat-70B": 51.8,
    },
    ("toxigen", "overall", "Table 2"): {
        "llama2-chat-7B": 0.0, "llama2-13B": 70.4, "dexperts-13B": 0.1, "llama2-chat-13B": 0.0,
        "llama2-70B": 67.4, "dexperts-70B": 0.0, "llama2-chat-70B": 0.0,
    },
    ("truthfulqa_mc", "acc", "Table 2"): {
        "llama2-chat-7B": 55.9, "llama2-13B": 38.6, "dexperts-13B": 57.4, "llama2-chat-13B": 61.6,
        "llama2-70B": 42.3, "dexperts-70B": 59.2, "llama2-chat-70B": 68.3,
    },
    ("truthfulqa_open", "GPT-true-info acc", "Table 2"): {
        "llama2-chat-7B": 81.3, "llama2-13B": 49.1, "dexperts-13B": 82.0, "llama2-chat-13B": 80.4,
        "llama2-70B": 53.9, "dexperts-70B": 85.1, "llama2-chat-70B": 79.6,
    },
    ("truthfulqa_open", "GPT-info acc", "Table 3"): {
        "llama2-13B": 90.7, "dexperts-13B": 91.4, "llama2-chat-13B": 93.0,
        "llama2-70B": 93.6, "dexperts-70B": 92.8, "llama2-chat-70B": 93.8,
    },
    ("truthfulqa_open", "GPT-true acc", "Table 3"): {
        "llama2-13B": 56.9, "dexperts-13B": 90.5, "llama2-chat-13B": 87.3,
        "llama2-70B": 60.0, "dexperts-70B": 92.3, "llama2-chat-70B": 85.8,
    },
    ("humaneval", "pass@10", "Table 4"): {
        "codellama-7B": 68.9, "llama2-13B": 33.7, "dexperts-13B": 65.7, "codellama-13B": 78.6,
        "llama2-70B": 62.0, "dexperts-70B": 70.7, "codellama-70B": 89.2,
    },
    ("ds1000", "pass@10", "Table 4"): {
        "codellama-7B": 53.6, "llama2-13B": 26.2, "dexperts-13B": 42.8, "codellama-13B": 56.9,
        "llama2-70B": 43.9, "dexperts-70B": 50.6, "codellama-70B": 67.6,
    },
    ("gsm8k", "exact_match", "Table 5"): {
        "llama2-gsm-7B": 40.6, "llama2-13B": 6.6, "dexperts-gsm-13B": 43.9, "llama2-gsm-lora-13B": 32.4,
        "llama2-gsm-13B": 51.0, "llama2-70B": 9.6, "dexperts-gsm-70B": 53.9, "llama2-gsm-lora-70B": 63.0,
        "llama2-gsm-70B": 67.9,
    },
}  # fmt: skip


def short_name(model: str) -> str:
    """Return a run's name without its settings, as the tables have it."""
    return model.removesuffix("-helpful-prompt").removesuffix("-t0.8")


def flat(metrics: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """Return nested metrics under names with slashes, without texts."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            # Later annotators store a table with one row.
            inner = flat(value, f"{before}{name}/")
            found |= inner
        elif isinstance(value, int | float):
            found[before + name] = value
    return found


def found_file(folder: Path, name: str) -> Path | None:
    """Return the path of a file, compressed or not; None if it does not exist."""
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def score_runs(results: Path) -> Iterator[dict[str, Any]]:
    """Yield the published metrics of every run in the folder, and those of both rules."""
    for layout in LAYOUTS:
        task = TASKS[layout.task]
        for folder in sorted(path for path in (results / layout.folder).glob("*") if path.is_dir()):
            metrics = found_file(folder, layout.metrics)
            predictions = found_file(folder, layout.predictions)
            if metrics is None:
                continue
            published = flat(json.loads(metrics.read_text("utf-8")))
            run: dict[str, Any] = {
                "task": task.name,
                "run": folder.name,
                "metric": task.metric,
                "published": published.get(task.metric),
                "all": published,
                "rules": {},
                "differs": {},
                "notes": [],
            }
            if predictions is None:
                run["notes"] = ["the predictions were not available (over 4 MiB)"]
            else:
                rows = read_rows(predictions)
                for rule in RULES:
                    grade = task.grade(rows, rule)
                    run["rules"][rule] = grade.metric
                    if rule == "paper":
                        run["num_items"], run["standard_error"] = grade.num_items, grade.error
                        run["notes"] = list(grade.notes)
                        run["differs"] = {
                            name: [value, grade.metrics[name]]
                            for name, value in published.items()
                            if name in grade.metrics
                            and grade.metrics[name] is not None
                            and not math.isclose(
                                value,
                                grade.metrics[name] or 0.0,
                                rel_tol=TOLERANCE,
                                abs_tol=TOLERANCE,
                            )
                        }
            yield run


def percent(task: str, value: float | None) -> float | None:
    """Return a metric in percent, as the paper prints it."""
    return None if value is None else value * 100 / TASKS[task].scale


def text(value: float | None, digits: int = 2) -> str:
    """Return a number for a table."""
    return "" if value is None else f"{value:.{digits}f}"


def page_part(runs: list[dict[str, Any]]) -> str:
    """Return the part of the page that this program writes."""
    by_name = {(run["task"], short_name(run["run"])): run for run in runs}
    graded = [run for run in runs if run["rules"].get("paper") is not None]
    same = [run for run in graded if not run["differs"]]
    lines = [
        BEGIN,
        "",
        f"{len(graded)} of the {len(runs)} published metrics files have predictions that can be scored. For "
        f"{len(same)} of these, every metric comes out as published, to nine digits.",
        "",
    ]
    for run in graded:
        for name, (was, now) in run["differs"].items():
            lines.append(
                f"- {run['task']}, `{run['run']}`: {name} was published as {was:.12g} and is {now:.12g}."
            )
    lines += [
        "",
        "| benchmark | run | paper | released | `--rule paper` | `--rule numeric` | ± | |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for run in runs:
        task = run["task"]
        printed = {
            table: values[short_name(run["run"])]
            for (name, metric, table), values in PRINTED.items()
            if (name, metric) == (task, run["metric"]) and short_name(run["run"]) in values
        }
        lines.append(
            f"| {task} | `{run['run']}` | {text(next(iter(printed.values()), None), 1)} | "
            f"{text(percent(task, run['published']))} | {text(percent(task, run['rules'].get('paper')))} | "
            f"{text(percent(task, run['rules'].get('numeric')))} | "
            f"{text(percent(task, run.get('standard_error')))} | {'; '.join(run['notes'])} |"
        )
    lines += [
        "",
        "All in percent. *Paper* is the printed table and *released* the published metrics file; ± is one "
        "standard error over items, by the paper's rule.",
        "",
        "### Where the printed tables differ from the released files",
        "",
        "| table | benchmark | run | printed | released |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for (task, metric, table), values in PRINTED.items():
        for model, value in values.items():
            run = by_name.get((task, model))
            if run is None:
                lines.append(f"| {table} | {task} ({metric}) | `{model}` | {value:.1f} | no file |")
                continue
            released = percent(task, run["all"].get(metric))
            if released is not None and abs(released - value) > 0.05 + 1e-9:
                lines.append(
                    f"| {table} | {task} ({metric}) | `{run['run']}` | {value:.1f} | {released:.2f} |"
                )
    lines += ["", *gap_lines(by_name), "", END]
    return "\n".join(lines)


def gap_lines(by_name: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Return the table of the gaps closed, from the printed numbers and from the released predictions."""
    tasks = ("alpaca_eval", "gsm8k", "toxigen", "truthfulqa_mc", "truthfulqa_open")
    sides = {
        "13B": ("llama2-13B", "dexperts-13B", "llama2-chat-13B", 91.1),
        "70B": ("llama2-70B", "dexperts-70B", "llama2-chat-70B", 88.1),
    }
    lines = [
        "### The gap closed, averaged over the five tasks of Table 2",
        "",
        "| size | the paper's text | its printed table | its released metrics | `--rule numeric` |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for size, (*models, said) in sides.items():
        columns: list[float | None] = []
        for kind in ("printed", "released", "numeric"):
            gaps = []
            for task in tasks:
                if kind == "printed":
                    printed = PRINTED[task, TASKS[task].metric, "Table 2"]
                    values: list[float | None] = [printed[model] for model in models]
                else:
                    runs = [by_name.get((task, model), {"rules": {}}) for model in models]
                    values = [run.get("published") for run in runs]
                    if kind == "numeric" and task in ("gsm8k", "truthfulqa_mc"):
                        values = [run["rules"].get("numeric") for run in runs]
                base, steered, tuned = values
                if base is not None and steered is not None and tuned is not None:
                    gaps.append(100 * (steered - base) / (tuned - base))
            columns.append(sum(gaps) / len(gaps) if len(gaps) == len(tasks) else None)
        lines.append(f"| {size} | {said} | " + " | ".join(text(c, 2) for c in columns) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--results", type=Path, required=True, help="the folder of the published runs"
    )
    parser.add_argument("--write", action="store_true", help="write the page and its numbers")
    arguments = parser.parse_args()
    runs = []
    for run in score_runs(arguments.results):
        print(
            f"{run['task']:>16} {run['run']:<32} {run['published']} {run['rules']} {run['differs'] or ''}"
        )
        runs.append(run)
    if arguments.write:
        content = PAGE.read_text("utf-8")
        before, _, rest = content.partition(BEGIN)
        PAGE.write_text(before + page_part(runs) + rest.partition(END)[2], "utf-8")
        NUMBERS.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
