"""Draw the pictures of docs/method.md from what the smol family says of one prompt.

    python scripts/draw_method.py

Each picture is one step of the formula, drawn from the models' own distributions: nothing is made up, and the
numbers are printed as they are drawn. The picture of calibration is a scheme and has no numbers. It writes
docs/method/*.svg and takes about half a minute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from proxytune import ProxyTuned, SamplingParams
from proxytune.request import Request

RECIPE = "package:proxytune/smol"
EXPERT = "tinyshakespeare"
PROMPT = "Good morrow, my"
TOKENS = (
    " dear",
    " friend",
    " friends",
    " brother",
    " young",
    " little",
    " heart",
    " lord",
    " head",
)
"""What may come next: the likeliest for the base, and what the small models think of."""

FOLDER = Path(__file__).parents[1] / "docs" / "method"
BASE, ANTI_EXPERT, EXPERT_COLOUR, STEERED, DOWN = (
    "#5b6b8c",
    "#a9cfca",
    "#00796b",
    "#d9730d",
    "#b3413a",
)


@dataclass(frozen=True)
class Shown:
    """What the models say of the tokens: natural-log probabilities, one list per model."""

    alpha: float
    base: list[float]
    expert: list[float]
    anti_expert: list[float]
    steered: list[float]

    @property
    def offsets(self) -> list[float]:
        """The offset of each token in nats; logprobs are logits less one number per model."""
        pairs = zip(self.expert, self.anti_expert, strict=True)
        return [self.alpha * (expert - anti_expert) for expert, anti_expert in pairs]


def ask(model: ProxyTuned, alpha: float | None = None) -> Shown:
    """Return what the models say of the tokens after the prompt."""
    # A bias makes the token the one that is chosen; what the models say of it is recorded without the bias.
    requests = [
        Request(
            PROMPT,
            SamplingParams(max_new_tokens=1, logit_bias=((only_token(model, text), 100.0),)),
            alpha,
            EXPERT,
            explain=True,
        )
        for text in TOKENS
    ]
    traces = model.generate_batch(requests)

    def said(name: str) -> list[float]:
        views = [(trace.steps[0].views or {})[name] for trace in traces]
        return [-math.inf if view.logprob is None else view.logprob for view in views]

    return Shown(
        traces[0].alphas[EXPERT],
        said("base"),
        said(f"{EXPERT}.expert"),
        said(f"{EXPERT}.anti_expert"),
        said("steered"),
    )


def only_token(model: ProxyTuned, text: str) -> int:
    """Return the token that is this text."""
    (token_id,) = model.tokenizer.encode(text, add_special_tokens=False)
    return int(token_id)


# Drawing ----------------------------------------------------------------------------------------------------


def probs(logprobs: Sequence[float]) -> list[float]:
    """Return probabilities in percent."""
    return [100 * math.exp(logprob) for logprob in logprobs]


def bars(
    axes: Any, series: Mapping[str, tuple[Sequence[float], str]], *, written: str = "{:.1f} %"
) -> None:
    """Draw bars beside the tokens, one group each, with their numbers."""
    height = 0.8 / len(series)
    for place, (label, (values, colour)) in enumerate(series.items()):
        ys = [row + (place - (len(series) - 1) / 2) * height for row in range(len(TOKENS))]
        axes.barh(ys, values, height * 0.9, color=colour, label=label)
        for y, value in zip(ys, values, strict=True):
            axes.annotate(
                written.format(value), (max(value, 0), y), (4, 0), textcoords="offset points",
                va="center", fontsize=9, color="#333333",
            )  # fmt: skip
    axes.set_yticks(range(len(TOKENS)), [f"…{text}" for text in TOKENS])
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.margins(x=0.18)
    if len(series) > 1:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.01), ncols=2)


def picture(title: str, *, height: float = 3.4) -> tuple[Any, Any]:
    """Return a figure with one pair of axes."""
    figure, axes = plt.subplots(figsize=(6.4, height), layout="constrained")
    axes.set_title(title, loc="left")
    return figure, axes


def save(figure: Any, name: str) -> None:
    """Write a figure."""
    FOLDER.mkdir(exist_ok=True)
    # Without a date, the same models give the same file.
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def draw_formula(shown: Shown) -> None:
    """Draw the whole formula: a small chart for each of its terms."""
    figure, all_axes = plt.subplots(1, 4, figsize=(9.6, 2.7), layout="constrained", sharey=True)
    terms = (
        ("base", shown.base, BASE, ""),
        ("expert", shown.expert, EXPERT_COLOUR, f"+ {shown.alpha:g} · ("),
        ("anti-expert", shown.anti_expert, ANTI_EXPERT, "-"),
        ("steered", shown.steered, STEERED, ") ="),
    )
    for axes, (name, logprobs, colour, sign) in zip(all_axes, terms, strict=True):
        values = probs(logprobs)
        axes.barh(range(len(TOKENS)), values, 0.75, color=colour)
        axes.set_title(name, loc="left", color=colour if name != "anti-expert" else "#5a9a92")
        axes.xaxis.set_visible(False)
        axes.spines.bottom.set_visible(False)
        axes.text(-0.05, 1.03, sign, transform=axes.transAxes, ha="right", va="bottom", fontsize=13)
    all_axes[0].set_yticks(range(len(TOKENS)), [f"…{text}" for text in TOKENS])
    all_axes[0].invert_yaxis()
    save(figure, "formula")


def draw_steps(shown: Shown) -> None:
    """Draw a picture for each step."""
    figure, axes = picture(f'1. The base reads "{PROMPT}"')
    bars(axes, {"base": (probs(shown.base), BASE)})
    save(figure, "base")

    figure, axes = picture("2. The small model, before and after it was tuned", height=4.4)
    bars(
        axes,
        {
            "anti-expert (before)": (probs(shown.anti_expert), ANTI_EXPERT),
            "expert (after)": (probs(shown.expert), EXPERT_COLOUR),
        },
    )
    save(figure, "pair")

    figure, axes = picture(f"3. The offset: {shown.alpha:g} · (expert - anti-expert), in nats")
    offsets = shown.offsets
    axes.barh(
        range(len(TOKENS)), offsets, 0.7, color=[EXPERT_COLOUR if o > 0 else DOWN for o in offsets]
    )
    axes.axvline(0, color="#333333", linewidth=0.8)
    for row, value in enumerate(offsets):
        axes.annotate(
            f"{value:+.2f}  (\u00d7 {math.exp(value):.2g})", (value, row),
            (4 if value > 0 else -4, 0), textcoords="offset points", fontsize=9, color="#333333",
            va="center", ha="left" if value > 0 else "right",
        )  # fmt: skip
    axes.set_yticks(range(len(TOKENS)), [f"…{text}" for text in TOKENS])
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.margins(x=0.55)
    save(figure, "offset")

    figure, axes = picture("4. The base, steered", height=4.4)
    bars(axes, {"base": (probs(shown.base), BASE), "steered": (probs(shown.steered), STEERED)})
    save(figure, "steered")


def draw_alphas(model: ProxyTuned) -> None:
    """Draw how the choice moves with the strength."""
    alphas = [step / 10 for step in range(21)]
    all_shown = [ask(model, alpha) for alpha in alphas]
    figure, axes = picture("5. The same prompt at other strengths")
    lines = {
        text: values
        for row, text in enumerate(TOKENS)
        if max(values := [probs(shown.steered)[row] for shown in all_shown]) > 4
    }
    lowest = math.inf
    for text, values in sorted(lines.items(), key=lambda line: -line[1][-1]):
        (line,) = axes.plot(alphas, values, linewidth=2)
        lowest = min(values[-1], lowest - 2.2)  # Names stand apart where lines meet.
        axes.text(alphas[-1] + 0.03, lowest, f"…{text}", va="center", color=line.get_color())
    axes.set_xlabel("alpha (0: the base alone, 1: the published method)")
    axes.set_ylabel("steered probability, %")
    axes.set_ylim(bottom=0)
    save(figure, "alpha")


def draw_calibration() -> None:
    """Draw what is left of an expert's learning, by anti-expert: a scheme, without numbers."""
    lacks, known = ("what the base lacks", STEERED, 1.0), ("what the base knows already", BASE, 1.9)
    rows = (
        ("expert", (lacks, known)),
        ("- untuned anti-expert", ()),
        ("= offset", (lacks, known)),
        ("", ()),
        ("expert", (lacks, known)),
        ("- calibrated anti-expert", (None, known)),
        ("= offset", (lacks,)),
    )
    figure, axes = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
    axes.set_title("What each model learned from the rows", loc="left")
    for row, (_, parts) in enumerate(rows):
        left = 0.0
        for part in parts:
            if part is None:
                left += lacks[2]
                continue
            text, colour, width = part
            axes.barh(row, width, 0.78, left=left, color=colour)
            axes.text(
                left + width / 2, row, text, ha="center", va="center", color="white", fontsize=9
            )
            left += width
        if row == 1:
            axes.text(0.03, row, "nothing", va="center", fontsize=9, color="#666666")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    save(figure, "calibration")


def main() -> None:
    """Draw all pictures."""
    mpl.use("svg")
    mpl.rcParams.update(
        {
            "svg.hashsalt": "proxytune", "font.family": "DejaVu Sans", "font.size": 10,
            "axes.spines.top": False, "axes.spines.right": False,
        }
    )  # fmt: skip
    draw_calibration()
    model = ProxyTuned.load(RECIPE, experts=[EXPERT])
    shown = ask(model)
    print(f"{PROMPT!r}, {EXPERT}, alpha {shown.alpha:g}; in percent, offsets in nats")
    columns = (shown.base, shown.anti_expert, shown.expert, shown.steered)
    for row, text in enumerate(TOKENS):
        numbers = "  ".join(f"{probs(column)[row]:6.2f}" for column in columns)
        print(f"{text:10} {numbers}  {shown.offsets[row]:+.2f}")
    draw_formula(shown)
    draw_steps(shown)
    draw_alphas(model)


if __name__ == "__main__":
    main()
