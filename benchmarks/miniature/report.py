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
from benchmarks.miniature.tasks import TASKS
from proxytune.files import write_whole

TITLES = {
    **{task.name: task.title for task in TASKS},
    TASK: "area of a medical question",
    "tinyshakespeare": "plays of Shakespeare",
    "legal_dc_code": "District of Columbia Code",
    "python_stdlib": "Python's standard library",
    "medical_medquad": "medical answers (MedQuAD)",
}
KINDS = {
    "smol": "smol pair, then CPT",
    "cpt": "smol expert, CPT alone",
    "cut": "cut pair, then CPT",
    "direct": "base",
    "direct_short": "base, equal time",
    "smol.seed1": "smol pair, seed 1",
    "smol.seed2": "smol pair, seed 2",
    "cut.more": "cut, three times the text",
}
PREDICTORS = {
    "base": "base",
    "few_shot": "base, examples in the prompt",
    "no_proxy": "temperature and output bias, no proxy",
    "expert": "expert alone (smol)",
    "nudge": "nudging (smol)",
    "weak_to_strong": "weak-to-strong decoding (smol)",
    "sft": "steered, anti-expert untuned (smol)",
    "cpt": "CPT alone, anti-expert untuned (smol)",
    "cpt_best": "the same, alpha chosen",
    "smol": "**steered, calibrated pair (smol)**",
    "smol_best": "the same, alpha chosen",
    "smol_cpt": "then CPT (smol)",
    "smol_cpt_best": "the same, alpha chosen",
    "cut": "**steered, calibrated pair (cut)**",
    "cut_best": "the same, alpha chosen",
    "cut_cpt": "then CPT (cut)",
    "cut_cpt_best": "the same, alpha chosen",
    "cut.more": "pair with three times the text (cut)",
    "cut.more_cpt": "then CPT with three times the text (cut)",
    "direct_short": "base tuned directly, equal time",
    "direct": "base tuned directly, equal data",
}
"""Rows of the tables, in order; those that no data set has are left out."""
DRAWN = ("base", "few_shot", "no_proxy", "expert", "sft", "cpt", "smol", "cut", "cut_cpt", "direct")
"""Rows of the picture."""
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


def _gap_cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row.get("gap") is None:
        return "-"
    return _with_interval(_percent(row["gap"]), map(_percent, row["gap_interval"]))


def _value_cell(row: Mapping[str, Any] | None, measure: str) -> str:
    if row is None:
        return "-"
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


def _sets(results: Mapping[str, Any], measure: str) -> dict[str, Any]:
    return {n: part for n, part in results["data_sets"].items() if part["measure"] == measure}


def _is_clear(row: Mapping[str, Any], key: str = "gain_interval") -> bool:
    """Whether an interval lies above 0."""
    return row[key][0] > 0


def meaning(results: Mapping[str, Any]) -> list[str]:
    """Return the conclusions from the numbers, a sentence or two each."""
    said = []
    for form, measure in (("tasks", "accuracy"), ("texts", "perplexity")):
        sets = _sets(results, measure)
        if sets:
            said += _about_form(results, form, sets)
    said += _about_time(results["cost"])
    return said


def _about_form(results: Mapping[str, Any], form: str, sets: Mapping[str, Any]) -> list[str]:
    mean = results["mean_gap"][form]
    if not mean["data_sets"]:
        return [
            f"Direct tuning was better than the base on none of the {form}, so no gap is closed."
        ]
    gaps = {name: _percent(row["gap"]) for name, row in mean["gaps"].items()}
    said = [
        f"**{form.capitalize()}.** At alpha 1, a calibrated pair closed {gaps['smol']} of the gap between "
        f"the base and the directly tuned base with the smol proxy, and {gaps['cut']} with a cut of the "
        f"base; trained on through the ensemble, {gaps['smol_cpt']} and {gaps['cut_cpt']}. The same "
        f"expert beside the untuned small model, the published method, closed {gaps['sft']}; an expert that "
        f"was trained through the ensemble from the start, {gaps['cpt']}; temperature and "
        f"output bias without any proxy closed {gaps['no_proxy']}. These are means over "
        f"{len(mean['data_sets'])} {form}."
    ]
    for predictor in ("smol", "cut"):
        rows = {name: part["rows"][predictor] for name, part in sets.items()}
        clear = [name for name in rows if _is_clear(rows[name])]
        said.append(
            f"With the calibrated {predictor} pair at alpha 1, the steered base was better than the base on "
            f"{len(clear)} of {len(sets)} {form}, with intervals that leave out 0, and better than its "
            f"expert alone on {sum(_is_clear(row, 'over_expert_interval') for row in rows.values())}."
            if predictor == "smol"
            else f"With the calibrated {predictor} pair it was better than the base on {len(clear)} of "
            f"{len(sets)} {form}."
        )
    if "cut.more_cpt" in mean["gaps"]:
        said.append(
            f"With three times the text, the cut closed {gaps['cut.more']} with the pair and "
            f"{gaps['cut.more_cpt']} with CPT after it, of the gap to direct tuning with the single amount."
        )
    if form == "tasks":
        said.append(
            f"For Llama 2 with a 7B expert the paper reports {PAPER}, on tasks and instructions."
        )
    return said


def _about_time(cost: Mapping[str, Any]) -> list[str]:
    said = []
    for form, kinds in cost.items():
        if not kinds:
            continue
        time = {kind: part["train_s"] + part["offsets_s"] for kind, part in kinds.items()}
        said.append(
            f"On the {form}, pair and CPT together took {_percent(time['smol'] / time['direct'])} (smol) and "
            f"{_percent(time['cut'] / time['direct'])} (cut) of the time of tuning the base directly, "
            "including the forwards of the frozen models."
        )
    return said


def _method(results: Mapping[str, Any]) -> list[str]:
    about = results["about"]
    sets = results["data_sets"]
    proxy = about["proxy"]
    said = [
        "**Trainings.** The trainings of a data set read the same rows: at most "
        f"{about['max_tokens']['task']:,} tokens of a task, {about['max_tokens']['text']:,} of a text. LoRA "
        f"of rank {about['lora_rank']} on all linear layers, {about['dtype']}; {_settings(about)}. It "
        f"ends after {about['patience']} evaluations without a lower validation loss, and the best state is "
        "kept. A pair is stopped by the loss of the steered base at alpha 1; trained on through the "
        "ensemble, its expert is kept only if that lowers the loss. The expert beside the untuned "
        "anti-expert is that of the pair.",
        "**Equal time.** The base is also tuned directly for as many steps as take the time of the smol "
        "pair with its CPT and the frozen models' forwards.",
        f"**The cut** has the first {proxy['keep'][0]} and last {proxy['keep'][1]} layers of the base and a "
        f"bridge, {proxy['num_parameters'][0] / 1e6:.0f} million parameters with the base's head. Making it "
        f"trains nothing and took {proxy['total_s']:.0f} s.",
        f"**Seeds.** Seed {about['seed']}. Intervals are over test items or text; "
        + (
            "the table of seeds says what chance in training adds; other seeds also draw other rows where "
            "there are more than the limit."
            if about["is_long"]
            else "they do not cover chance in training."
        ),
        "**What the models had read.** The smol anti-expert's own training included the training splits of "
        f"{_listed(READ_BY_ANTI_EXPERT)}, so an expert has less to learn there; for the tasks made of "
        "MedQuAD this includes questions about diseases of test items. What the base had read is not known. "
        "No model was trained on test rows here.",
        "**Choice of strengths, switches and biases.** On validation rows, by likelihood for texts and by "
        "right answers for tasks. Test rows are read once. The tasks were chosen on validation rows, too.",
        "**Without a proxy.** A temperature and an output bias of the base, fitted on the training rows.",
        "**Nudging** (arXiv:2410.09300) takes the expert's token where the base gives none 40 %. "
        "**Weak-to-strong decoding** (arXiv:2506.07434): the expert writes until the base gives its last "
        "three tokens a geometric mean above a threshold; then the base goes on alone. An answer that is "
        "chosen has one token, and scored text no beginning of its own, so there is a dash.",
        "**Intervals.** Percentiles of "
        f"{about['num_resamples']:,} bootstrap resamples of blocks of {about['block_tokens']} tokens, or of "
        "what questions are about (diseases, names, words). Predictors are resampled together.",
    ]
    if any(part["measure"] == "perplexity" for part in sets.values()):
        said.append(
            f"**Texts.** Windows of {about['window']} tokens, evenly spaced over the test split; the first "
            "token of a window is not scored."
        )
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    said.append(
        f"**Machine.** {about['machine']}. {versions}. Commit {', '.join(about['commits'])}. All stages "
        f"together took {duration(about['total_s'])}."
    )
    return said


def _settings(about: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{form}s: "
        + ", ".join(
            f"{kind} {rate:g} for {about['epochs'][form][kind]:g} epochs"
            for kind, rate in rates.items()
        )
        for form, rates in about["rates"].items()
    )


def _tasks(results: Mapping[str, Any]) -> list[str]:
    """Return what each task asks, and what can be guessed."""
    described = {task.name: task.description for task in TASKS}
    described[TASK] = (
        "Given a question of MedQuAD, choose the area of the institute that answers it: one of "
        f"{', '.join(label.strip() for label in AREAS.values())}, by the first token of the options."
    )
    said = []
    for name, part in _sets(results, "accuracy").items():
        guessed = results["about"]["data"][name]["guesses"]
        text = (
            f"**{TITLES[name]}.** {described[name]} {part['training']['rows_read']:,} training rows; "
            f"{part['num_measured']:,} test items about {part['num_blocks']:,} things, none of which is in a "
            f"training row. Always giving the most frequent answer is right in "
            f"{shown(guessed['majority'], 'accuracy')}"
        )
        if "wording" in guessed:
            text += (
                ", judging by the question's wording without the disease in "
                f"{shown(guessed['wording'], 'accuracy')}"
            )
        said.append(f"{text}.")
    return said


# The page -------------------------------------------------------------------------------------------


def _predictors(sets: Mapping[str, Any]) -> list[str]:
    return [p for p in PREDICTORS if any(p in part["rows"] for part in sets.values())]


def _value_table(sets: Mapping[str, Any]) -> str:
    rows = []
    for predictor in _predictors(sets):
        cells = (_value_cell(s["rows"].get(predictor), s["measure"]) for s in sets.values())
        rows.append([PREDICTORS[predictor], *cells])
    return _table(["", *(TITLES[name] for name in sets)], rows)


def _gap_table(results: Mapping[str, Any], form: str, sets: Mapping[str, Any]) -> str:
    mean = results["mean_gap"][form]["gaps"]
    rows = []
    for predictor in _predictors(sets):
        if any("gap" in part["rows"].get(predictor, {}) for part in sets.values()):
            cells = (_gap_cell(part["rows"].get(predictor)) for part in sets.values())
            rows.append([PREDICTORS[predictor], _gap_cell(mean.get(predictor)), *cells])
    return _table(["gap closed", "**mean**", *(TITLES[name] for name in sets)], rows)


def _seed_table(sets: Mapping[str, Any]) -> str:
    rows = []
    for name, part in sets.items():
        seeds = part["seeds"]
        if seeds is None:
            continue
        ends = (shown(value, part["measure"]) for value in seeds["range"])
        value = _with_interval(shown(seeds["value"], part["measure"]), ends)
        gap = "-"
        if seeds["gap"] is not None:
            gap = _with_interval(_percent(seeds["gap"]), map(_percent, seeds["gap_range"]))
        rows.append([TITLES[name], str(seeds["num_seeds"]), value, gap])
    return _table(["", "seeds", "mean [range]", "gap closed [range]"], rows) if rows else ""


def _cost_table(cost: Mapping[str, Any]) -> str:
    return _table(
        ["what is tuned", "on", "trainable parameters", "steps", "training", "frozen models", "peak memory"],
        (
            [
                KINDS[kind],
                form,
                f"{part['num_parameters']:,}",
                f"{part['num_steps']:,}",
                f"{part['train_s']:,.0f} s",
                f"{part['offsets_s']:,.0f} s" if part["offsets_s"] >= 0.5 else "none",
                f"{part['peak_memory_bytes'] / 1e9:.2f} GB",
            ]
            for form, kinds in cost.items()
            for kind, part in kinds.items()
        ),
    )  # fmt: skip


QUICK_NOTE = """
**This was a quick run: a few steps on a few rows. It shows that the script runs and measures nothing.**
"""


def _part(results: Mapping[str, Any], title: str, form: str, measure: str, note: str) -> str:
    sets = _sets(results, measure)
    if not sets:
        return ""
    seeds = _seed_table(sets)
    if seeds:
        seeds = f"\nThe calibrated smol pair at alpha 1 over training seeds:\n\n{seeds}\n"
    return f"""\
## {title}

{note}

{_value_table(sets)}

{_gap_table(results, form, sets)}
{seeds}
"""


def markdown(results: Mapping[str, Any]) -> str:
    """Return the page."""
    about = results["about"]
    left_out = ""
    if about["left_out"]:
        left_out = f"\n**Not finished and left out: {_listed(about['left_out'])}.**\n"
    tasks = _part(
        results,
        "Tasks",
        "tasks",
        "accuracy",
        "Right answers to test items, with 95 % intervals in brackets. Alpha is 1 where none is given. An\n"
        "answer is right if greedy decoding writes exactly it, or, for the area of a question, if its\n"
        "option is the likeliest. The gap closed is (base - predictor) / (base - direct): 0 % is the base,\n"
        "100 % the directly tuned base, and below 0 % is harm. There is a dash where direct tuning did not\n"
        "help significantly, or the method does not apply.",
    )
    texts = _part(
        results,
        "Texts",
        "texts",
        "perplexity",
        "Perplexity per token of the base's vocabulary on test text; lower is better. The gap is in nats per "
        "token.",
    )
    return f"""\
# The paper in miniature

<!-- Written by benchmarks/miniature from miniature.json; edit its report.py instead. -->

How much of the gain of direct tuning does steering reach? [Liu et al. 2024](https://arxiv.org/abs/2401.08565)
asked this of Llama 2. This page asks it of models that two processor cores can train:
`{about["base"].rpartition("/")[2]}` is the base, and an expert is a LoRA adapter on one of two proxies:
*smol*, `{about["anti_expert"]}`, a model of {about["num_anti_expert_parameters"] / 1e6:.1f} million
parameters with the same vocabulary; or a *cut* of the base's own layers.
{QUICK_NOTE if about["is_quick"] else ""}{left_out}
## What it means

{_list(meaning(results))}

![Predictors on every data set](miniature.png)

{tasks}{texts}## What tuning costs

Totals over the data sets; peak memory is the highest of any. Seconds include evaluations. The frozen models'
forwards, which are computed beforehand, have a column of their own.

{_cost_table(results["cost"])}

## The tasks

{_list(_tasks(results))}

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
    columns = min(4, len(sets))
    lines = -(-len(sets) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(2.4 * columns + 3, 2.9 * lines), squeeze=False
    )
    cells = [axes for line in panels for axes in line]
    for place, axes in enumerate(cells):
        if place >= len(sets):
            axes.axis("off")
            continue
        name, part = list(sets.items())[place]
        _draw(axes, part, has_labels=place % columns == 0)
        axes.set_title(TITLES[name], fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _draw(axes: Any, part: Mapping[str, Any], *, has_labels: bool) -> None:
    from matplotlib import ticker

    is_text = part["measure"] == "perplexity"
    scale = 1 if is_text else 100
    colours = {"smol": "tab:blue", "cut": "tab:orange", "cut_cpt": "tab:orange", "direct": "0.1"}
    ends = []
    for place, predictor in enumerate(DRAWN):
        row = part["rows"].get(predictor)
        if row is None:
            continue
        interval = [scale * value for value in row["interval"]]
        ends += interval
        colour = colours.get(predictor, "0.45")
        axes.plot(interval, [place, place], color=colour, linewidth=1.5)
        # Filled if the base is steered, so that colour is not the only distinction.
        face = colour if predictor in ("sft", "cpt", "smol", "cut", "cut_cpt") else "white"
        axes.plot(scale * row["value"], place, "o", color=colour, mfc=face, markersize=6)
    for bound, style in (("base", ":"), ("direct", "--")):
        value = scale * part["rows"][bound]["value"]
        axes.axvline(value, color="0.75", linestyle=style, linewidth=1, zorder=0)
    labels = [PREDICTORS[p].strip("*") for p in DRAWN]
    axes.set_yticks(range(len(DRAWN)), labels if has_labels else [""] * len(DRAWN), fontsize=8)
    axes.set_ylim(len(DRAWN) - 0.5, -0.5)
    label = "perplexity (lower is better)" if is_text else "right answers, %"
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
