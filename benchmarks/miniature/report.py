"""The page: the results in words, tables and a picture.

Every measured number on it comes from `miniature.json`, which `summary.py` makes; this file only compares
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.miniature.data import AREAS
from benchmarks.miniature.plan import TASK
from benchmarks.miniature.summary import STEERED
from proxytune.files import write_whole

TITLES = {
    "tinyshakespeare": "plays of Shakespeare",
    "legal_dc_code": "District of Columbia Code",
    "python_stdlib": "Python's standard library",
    "medical_medquad": "medical answers (MedQuAD)",
    TASK: "body area of a medical question",
}
KIND_TITLES = {"sft": "expert by itself", "cpt": "expert through the ensemble", "direct": "base"}
PREDICTORS = {
    "base": "base",
    "expert": "expert alone",
    "steered_1": "steered, alpha 1",
    "steered": "steered, alpha chosen",
    "cpt": "steered, CPT expert",
    "direct": "base tuned directly",
}
READ_BY_ANTI_EXPERT = ("python_stdlib", "medical_medquad")
"""Whose training splits are part of the anti-expert's own training: `GENERAL_MIX` in `zoo/train.py`."""
PAPER = "91 % (Llama-2-13B) and 88 % (70B)"
"""Mean of the gap closed by instruction tuning with a 7B expert: arXiv:2401.08565v4, section 3."""


# Cells ----------------------------------------------------------------------------------------------


def shown(value: float, measure: str) -> str:
    """Return a perplexity or an accuracy as the tables show it."""
    if measure == "accuracy":
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return a duration in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _percent(value: float) -> str:
    return f"{round(100 * value)} %"  # An integer, because a rounded float can be -0.


def _with_interval(value: str, ends: Iterable[str]) -> str:
    return f"{value} [{', '.join(end.removesuffix(' %') for end in ends)}]"


def _gap_cell(row: Mapping[str, Any]) -> str:
    if row["gap"] is None:
        return "-"
    return _with_interval(_percent(row["gap"]), map(_percent, row["gap_interval"]))


def _value_cell(row: Mapping[str, Any], measure: str) -> str:
    ends = (shown(value, measure) for value in row["interval"])
    text = _with_interval(shown(row["value"], measure), ends)
    return text if row["alpha"] in (None, 1.0) else f"{text}, alpha {row['alpha']:g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _list(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _listed(names: Sequence[str]) -> str:
    *first, last = (TITLES[name] for name in names)
    return f"{', '.join(first)} and {last}" if first else last


# Words ----------------------------------------------------------------------------------------------


def _is_better(part: Mapping[str, Any], predictor: str, than: str) -> bool:
    gain = part["rows"][predictor]["mean"] - part["rows"][than]["mean"]
    return gain > 0 if part["measure"] == "accuracy" else gain < 0


def meaning(results: Mapping[str, Any]) -> list[str]:
    """Return the conclusions from the numbers, a sentence or two each."""
    sets, cost = results["data_sets"], results["cost"]
    said = _gap_sentences(results)
    for predictor, text in (
        (
            "steered_1",
            "At alpha 1, the published strength, with the expert that was tuned by itself, the steered "
            "base was worse than the base",
        ),
        ("cpt", "Steered by the expert trained through the ensemble, it was worse than the base"),
    ):
        worse = [name for name, part in sets.items() if _is_better(part, "base", predictor)]
        if worse:
            said.append(f"{text} on {_listed(worse)}.")
    num_above = sum(
        _is_better(part, "cpt", "base") and _is_better(part, "cpt", "expert")
        for part in sets.values()
    )
    said.append(
        f"On {num_above} of {len(sets)} data sets the base steered by the expert trained through the "
        "ensemble was better than both the base and the expert that was tuned by itself."
    )
    time = {kind: part["train_s"] + part["offsets_s"] for kind, part in cost.items()}
    memory = {kind: part["peak_memory_bytes"] for kind, part in cost.items()}
    said.append(
        f"Tuning the experts by themselves took {_percent(time['sft'] / time['direct'])} of the time of "
        f"tuning the base directly, and {_percent(memory['sft'] / memory['direct'])} of its peak memory. "
        "Through the ensemble it took "
        f"{_percent(time['cpt'] / time['direct'])} and {_percent(memory['cpt'] / memory['direct'])}, "
        "including the forwards of the frozen models. Training through the ensemble needs the base's "
        "weights; an expert tuned by itself never sees the base."
    )
    return said


def _gap_sentences(results: Mapping[str, Any]) -> list[str]:
    names = results["mean_gap"]["data_sets"]
    if not names:
        return [
            "Direct tuning was better than the base on no data set, so there is no gap to close."
        ]
    mean = {name: _percent(row["gap"]) for name, row in results["mean_gap"]["gaps"].items()}
    said = [
        f"Averaged over {len(names)} data sets, an expert trained through the ensemble closed {mean['cpt']} "
        "of the gap between the base and the directly tuned base. An expert tuned by itself closed "
        f"{mean['steered']} with alpha chosen on validation rows, and {mean['steered_1']} at alpha 1. For "
        f"Llama 2 with a 7B expert the paper reports {PAPER}."
    ]
    gaps = {name: results["data_sets"][name]["rows"]["cpt"]["gap"] for name in names}
    if len(gaps) > 1:
        low, *_, high = sorted(gaps, key=lambda name: gaps[name])
        said.append(
            "Steering with the expert trained through the ensemble closed the most of the gap on "
            f"{TITLES[high]} ({_percent(gaps[high])}) and the least on {TITLES[low]} ({_percent(gaps[low])})."
        )
    without = [name for name in results["data_sets"] if name not in names]
    if without:
        said.append(
            f"On {_listed(without)} direct tuning was not significantly better than the base, so there is no "
            "gap to report."
        )
    return said


def _method(results: Mapping[str, Any]) -> list[str]:
    about, part, search = results["about"], results["data_sets"][TASK], results["about"]["search"]
    rates = ", ".join(f"{rate:g} ({KIND_TITLES[kind]})" for kind, rate in about["rates"].items())
    guessed = {name: shown(value, "accuracy") for name, value in about["guesses"].items()}
    said = [
        "**Training.** All trainings on a data set read the same rows, at most "
        f"{about['max_tokens']:,} tokens and {about['epochs']:g} epochs. A training ends after "
        f"{about['patience']} evaluations without a lower validation loss, and the best state is kept. LoRA "
        f"of rank {about['lora_rank']}, {about['dtype']}, learning rates {rates}. There was one seed, so the "
        "intervals do not cover chance in training.",
        "**What the models had read.** The anti-expert's own training included the training splits of "
        f"{_listed(READ_BY_ANTI_EXPERT)}, so an expert has less to learn there. For the task this includes "
        "rows about some of the test items' diseases: MedQuAD's training split has them, and only the task's "
        "own training rows leave them out. What the base had read is not known. No model was trained on test "
        "rows here.",
        "**Choice of alpha.** On validation rows, by likelihood for texts and by accuracy for the task. Test "
        "rows are read once.",
        f"**Texts.** Windows of {about['window']} tokens, evenly spaced over the test split; the first token "
        "of a window is not scored.",
        "**The task.** Given a question of MedQuAD, name the area of the institute that answers it: one of "
        f"{', '.join(label.strip() for label in AREAS.values())}. The prediction is the option whose first "
        f"token has the highest logit. There are {part['num_measured']:,} test items: "
        f"{part['details']['num_questions']:,} different questions about {part['num_blocks']:,} diseases. "
        "None of these diseases is named in a training row, though a related one may be. Always answering "
        f"with the test set's most frequent area is right in {guessed['majority']} of the test items; "
        f"judging by the question's wording without the disease, in {guessed['wording']}.",
        f"**Intervals.** Percentiles of {about['num_resamples']:,} bootstrap resamples of blocks of "
        f"{about['block_tokens']} tokens, or of diseases. Base, steered and direct are resampled together.",
    ]
    if search:
        tried = "; ".join(
            f"{KIND_TITLES[kind]}: "
            + ", ".join(f"{rate} gave {loss:.4f}" for rate, loss in losses.items())
            for kind, losses in search["losses"].items()
        )
        said.append(
            "**Choice of the learning rates.** Lowest validation losses on "
            f"{TITLES[search['domain']]} with {search['max_tokens']:,} training tokens, in nats per token: "
            f"{tried}."
        )
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    said.append(
        f"**Machine.** {about['machine']}. {versions}. Commit {', '.join(about['commits'])}. All stages "
        f"together took {duration(about['total_s'])}."
    )
    return said


# The page -------------------------------------------------------------------------------------------


def _value_table(sets: Mapping[str, Any]) -> str:
    rows = []
    for name, part in sets.items():
        unit = "tokens" if part["measure"] == "perplexity" else "items"
        cells = (_value_cell(part["rows"][p], part["measure"]) for p in PREDICTORS)
        rows.append([TITLES[name], f"{part['num_measured']:,} {unit}", *cells])
    return _table(["data set", "measured on", *PREDICTORS.values()], rows)


def _gap_table(results: Mapping[str, Any]) -> str:
    rows = {TITLES[name]: part["rows"] for name, part in results["data_sets"].items()}
    rows["**mean**"] = results["mean_gap"]["gaps"]
    rows["**mean of the texts**"] = results["mean_gap_of_domains"]["gaps"]
    return _table(
        ["gap closed", *(PREDICTORS[p] for p in STEERED)],
        ([title, *(_gap_cell(row[p]) for p in STEERED)] for title, row in rows.items() if row),
    )


def _cost_table(cost: Mapping[str, Any]) -> str:
    return _table(
        ["what is tuned", "trainable parameters", "steps", "training", "frozen models", "peak memory"],
        (
            [
                KIND_TITLES[kind],
                f"{part['num_parameters']:,}",
                f"{part['num_steps']:,}",
                f"{part['train_s']:,.0f} s",
                f"{part['offsets_s']:,.0f} s" if kind == "cpt" else "none",
                f"{part['peak_memory_bytes'] / 1e9:.2f} GB",
            ]
            for kind, part in cost.items()
        ),
    )  # fmt: skip


QUICK_NOTE = """
**This was a quick run: a few steps on a few rows. It shows that the script runs and measures nothing.**
"""


def markdown(results: Mapping[str, Any]) -> str:
    """Return the page."""
    about = results["about"]
    return f"""\
# The paper in miniature

<!-- Written by benchmarks/miniature from miniature.json; edit its report.py instead. -->

How much of the gain of direct tuning does steering reach? [Liu et al. 2024](https://arxiv.org/abs/2401.08565)
asked this of Llama 2. This page asks it of models that two processor cores can train:
`{about["base"].rpartition("/")[2]}` is the base, and an expert is a LoRA adapter on
`{about["anti_expert"]}`, a model of {about["num_anti_expert_parameters"] / 1e6:.1f} million parameters with
the same vocabulary.
{QUICK_NOTE if about["is_quick"] else ""}
## What it means

{_list(meaning(results))}

![Every predictor on every data set](miniature.png)

## Results

Perplexity per token of the base's vocabulary (lower is better) or accuracy (higher is better), on test rows,
with 95 % intervals in brackets. Alpha is 1 where none is given. The expert was tuned by itself, but for the
column *CPT*, where it was trained through the ensemble (Consistent Proxy Tuning).

{_value_table(results["data_sets"])}

The gap closed is (base - steered) / (base - direct), in nats per token or in accuracy: 0 % is the base, 100 %
the directly tuned base, and below 0 % steering did harm. There is a dash where direct tuning did not help
significantly.

{_gap_table(results)}

## What tuning costs

Totals over the data sets; peak memory is the highest of any. Seconds include evaluations. For training
through the ensemble, the frozen models' forwards, which are computed beforehand, have a column of their own.

{_cost_table(results["cost"])}

## How it was made

```bash
{about["command"]}
```

{_list(_method(results))}
"""


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw a panel per data set: a dot per predictor, with its interval."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sets = results["data_sets"]
    size = (2.3 * len(sets) + 2, 2.9)
    figure, (panels,) = pyplot.subplots(1, len(sets), figsize=size, sharey=True, squeeze=False)
    for axes, (name, part) in zip(panels, sets.items(), strict=True):
        _draw(axes, part)
        axes.set_title(TITLES[name], fontsize=9)
    panels[0].set_yticks(range(len(PREDICTORS)), list(PREDICTORS.values()), fontsize=9)
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _draw(axes: Any, part: Mapping[str, Any]) -> None:
    from matplotlib import ticker

    is_text = part["measure"] == "perplexity"
    scale = 1 if is_text else 100
    colours = {"base": "0.4", "expert": "0.4", "direct": "0.1"}
    ends = []
    for place, predictor in enumerate(PREDICTORS):
        row = part["rows"][predictor]
        interval = [scale * value for value in row["interval"]]
        ends += interval
        colour = colours.get(predictor, "tab:blue")
        axes.plot(interval, [place, place], color=colour, linewidth=1.5)
        # Filled if the base is steered, so that colour is not the only distinction.
        face = colour if predictor in STEERED else "white"
        axes.plot(scale * row["value"], place, "o", color=colour, mfc=face, markersize=6)
    for bound, style in (("base", ":"), ("direct", "--")):
        value = scale * part["rows"][bound]["value"]
        axes.axvline(value, color="0.75", linestyle=style, linewidth=1, zorder=0)
    label = "perplexity (lower is better)" if is_text else "accuracy, % (higher is better)"
    axes.set_xlabel(label, fontsize=8)
    if is_text and max(ends) > 5 * min(ends):
        axes.set_xscale("log")
        # Default labels of a narrow axis, such as 2 x 10^1 and 3 x 10^1, overlap.
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the page, its numbers and its picture, and return the page's path."""
    page = folder / "miniature.md"
    write_whole(folder / "miniature.json", json.dumps(results, indent=1) + "\n")
    plot(results, folder / "miniature.png")
    write_whole(page, markdown(results))
    return page
