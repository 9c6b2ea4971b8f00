"""The main job on real models, offline: what `proxytune demo` shows.

SmolLM2-135M-Instruct is the base; the experts are the smol family's, shipped with the package. Questions and
texts are held out: no model was trained on them or chosen by them. Every number is measured when shown.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxytune.commands.app import command
from proxytune.commands.console import json_line, print_text, stdout, styled
from proxytune.commands.options import AS_JSON
from proxytune.commands.progress import ProgressBars, waiting
from proxytune.request import Request, SamplingParams, Steering
from proxytune.settings import option

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from proxytune.decode.batch import Event
    from proxytune.model import ProxyTuned
    from proxytune.trace import Trace

RECIPE = "package:proxytune/smol"
TASK = "medical-area"
"""The expert of the task: it names the area of medicine that a question belongs to."""
TASK_PROMPTS = (
    "Question: What are the symptoms of Gallstones?\nArea:",
    "Question: What is (are) Cerebral Atrophy?\nArea:",
)
"""Of the task's test questions."""
TASK_TOKENS = 16
"""Length of the answers shown: an area has at most four tokens."""
TEXT_ALPHA = 1.75
"""Strength of the shown texts: near 1, where perplexity is lowest, a few words tell less of what changed."""


@dataclass(frozen=True, slots=True)
class Domain:
    """One thing the demo steers towards: an expert, and how its text may begin."""

    expert: str
    title: str
    prompt: str


DOMAINS = (
    Domain("tinyshakespeare", "Shakespeare's plays", "Good morrow,"),
    Domain("legal", "the law of the District of Columbia", "The owner of a building shall"),
)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the demo generates, and how it is shown."""

    as_json: bool = option(False, AS_JSON)
    seed: int = option(1, "Random seed of the continuations")
    new_tokens: int = option(48, "Length of each continuation in tokens", at_least=1)


@command("proxytune demo")
def demo(options: DemoOptions) -> None:
    """Steer a real model offline, and show base and steered side by side.

    Shows how many questions of a task base, expert and steered base answer rightly, how well they predict
    held-out text, and what base and steered base write. All numbers are measured now.
    """
    answer = measured(seed=options.seed, new_tokens=options.new_tokens)
    if options.as_json:
        print_text(json_line(answer))
    else:
        show(stdout(), answer)


def measured(*, seed: int = 1, new_tokens: int) -> dict[str, Any]:
    """Return the task's accuracies, each domain's perplexities, the changes with intervals, and all texts."""
    from proxytune.model import ProxyTuned

    sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0.7, seed=seed)
    started = time.perf_counter()
    with waiting("loading models (the first time converts one)"):
        model = ProxyTuned.load(RECIPE)
    with ProgressBars() as bars:
        task = _answered(model, bars)
        results = [_scored(model, domain, bars) for domain in DOMAINS]
        traces = iter(_continued(model, task["alpha"], sampling, bars))
    task["texts"] = [{"prompt": prompt, **_both(traces)} for prompt in TASK_PROMPTS]
    for result in results:
        result |= {"text_alpha": TEXT_ALPHA, **_both(traces)}
    elapsed = round(time.perf_counter() - started, 1)
    return {"task": task, "domains": results, "elapsed_s": elapsed}


def _both(traces: Iterator[Trace]) -> dict[str, str]:
    return {"base_text": next(traces).text, "steered_text": next(traces).text}


def _read(model: ProxyTuned, name: str) -> str:
    assert model.recipe.directory is not None
    return (model.recipe.directory / "heldout" / name).read_text("utf-8")


def _answered(model: ProxyTuned, bars: ProgressBars) -> dict[str, Any]:
    """Return how many of the task's questions each model answers rightly, given the possible answers."""
    from torch import tensor

    from proxytune.logits.steer import Contribution, combine, weighted
    from proxytune.measure.given import first_tokens, option_logits
    from proxytune.tasks.statistics import grouped_interval

    items = [json.loads(line) for line in _read(model, f"{TASK}.jsonl").splitlines()]
    areas = Counter(item["completion"] for item in items)
    options = sorted(areas)
    alpha = model.recipe.strengths(Steering(experts=TASK))[TASK]

    def advance(done: int, total: int) -> None:
        bars.show("asking held-out questions", done, total, "questions")

    ensemble = model.steered_by(TASK)
    token_ids = first_tokens(options, model.tokenizer)
    logits = option_logits(
        ensemble,
        model.completion_passages([(item["prompt"], item["completion"]) for item in items]),
        token_ids,
        on_progress=advance,
    )
    (pair,) = ensemble.pairs
    part = Contribution(logits[pair.expert], logits[pair.anti_expert], alpha)
    bias = None if pair.bias is None else tensor([pair.bias.value_of(i) for i in token_ids])
    part = weighted(part, logits[0], weights=pair.weights, bias=bias)
    steered = combine(logits[0], [part])
    predictors = {"base": logits[0], "expert": logits[pair.expert], "steered": steered}
    hits = {
        name: [
            float(options[place] == item["completion"])
            for place, item in zip(rows.argmax(-1).tolist(), items, strict=True)
        ]
        for name, rows in predictors.items()
    }
    gains = [ours - its for ours, its in zip(hits["steered"], hits["base"], strict=True)]
    interval = grouped_interval(gains, [item["focus"] for item in items])
    return {
        "expert": TASK,
        "alpha": alpha,
        "options": [option.strip() for option in options],
        "num_items": len(items),
        "num_diseases": len({item["focus"] for item in items}),
        "most_frequent": max(areas.values()) / len(items),
        "accuracy": {name: sum(values) / len(items) for name, values in hits.items()},
        "change": sum(gains) / len(items),
        "change_interval": None if interval is None else list(interval),
    }


def _scored(model: ProxyTuned, domain: Domain, bars: ProgressBars) -> dict[str, Any]:
    """Return how well each model predicts a domain's held-out text."""
    text = _read(model, f"{domain.expert}.txt")
    alpha = model.recipe.strengths(Steering(experts=domain.expert))[domain.expert]

    def advance(done: int, total: int) -> None:
        bars.show(f"scoring held-out text: {domain.title}", done, total, "tokens")

    report = model.score(text, [alpha], experts=domain.expert, on_progress=advance)
    steered = report.row("steered", alpha)
    interval = steered.change_interval
    return {
        "expert": domain.expert,
        "title": domain.title,
        "prompt": domain.prompt,
        "alpha": alpha,
        "num_tokens": report.num_tokens,
        "perplexity": {
            "base": report.row("base").perplexity,
            "anti_expert": report.row(f"{domain.expert}.anti_expert").perplexity,
            "expert": report.row(f"{domain.expert}.expert").perplexity,
            "steered": steered.perplexity,
        },
        "change": steered.change,
        "change_interval": None if interval is None else [interval.low, interval.high],
    }


def _continued(
    model: ProxyTuned, task_alpha: float, sampling: SamplingParams, bars: ProgressBars
) -> list[Trace]:
    """Return each prompt continued by base and steered base, in one batch: the task's, then the domains'."""
    greedy = SamplingParams(max_new_tokens=min(TASK_TOKENS, sampling.max_new_tokens))
    requests = [
        Request(prompt, greedy, experts={TASK: alpha})
        for prompt in TASK_PROMPTS
        for alpha in (0.0, task_alpha)
    ]
    requests += [
        Request(domain.prompt, sampling, experts={domain.expert: alpha})
        for domain in DOMAINS
        for alpha in (0.0, TEXT_ALPHA)
    ]

    def advance(_: int, event: Event) -> None:
        if event.step is not None:
            done = event.step.index + 1
            bars.show(
                "generating, base and steered in one batch", done, sampling.max_new_tokens, "tokens"
            )

    return model.generate_batch(requests, batch_size=len(requests), on_event=advance)


# What is shown ----------------------------------------------------------------------------------------------


def show(console: Console, answer: dict[str, Any]) -> None:
    """Print what was measured, as tables with a sentence on how to read them, and texts side by side."""
    task, domains = answer["task"], answer["domains"]
    accuracy = {name: f"{share:.0%}" for name, share in task["accuracy"].items()}
    table = _table("A task: name the area of medicine that a question belongs to (right answers)")
    change = _change(task, "{:+.0f}", "{:+.0f} points", 100)
    table.add_row(f"{task['num_items']} questions", *_cells(accuracy, change, task["alpha"]))
    console.print(table)
    console.print(
        f"The answer is the likeliest of {len(task['options'])} areas; always naming the most frequent "
        f"one is right in {task['most_frequent']:.0%}. The expert was tuned on none of the "
        f"{task['num_diseases']} diseases.\n"
    )
    table = _table("Text: predict what comes next (perplexity, lower is better)")
    for result in domains:
        perplexity = {name: f"{value:.1f}" for name, value in result["perplexity"].items()}
        change = _change(result, "{:+.0f}%", "{:+.0f}%", 100)
        table.add_row(result["title"], *_cells(perplexity, change, result["alpha"]))
    console.print(table)
    console.print(
        "base: SmolLM2-135M-Instruct, weights untouched · experts: 7.6 M parameters · "
        "brackets: 95 % interval"
    )
    console.print(f"{reading(domains[0])}\n")
    for number, text in enumerate(task["texts"]):
        heading = "Questions of the task, answered by" if number == 0 else None
        _print_texts(console, heading, text, task["alpha"])
    for result in domains:
        _print_texts(console, f"{result['title']}, continued by", result, result["text_alpha"])
    console.print(
        f"Measured now, in {answer['elapsed_s']:.0f} s. "
        'Your own prompt: proxytune generate package:proxytune/smol "To be" --expert tinyshakespeare'
    )


def reading(result: dict[str, Any]) -> str:
    """Return how to read a domain's row: why an expert that is worse than the base can help it."""
    numbers = result["perplexity"]
    return (
        f"How to read it: alone, the expert is a far worse model of {result['title']} than the base "
        f"({numbers['expert']:.0f} against {numbers['base']:.0f}). But only the difference, expert - "
        "anti-expert, is added to the base: what tuning changed in the small model "
        f"({numbers['anti_expert']:.0f} before, {numbers['expert']:.0f} after)."
    )


def _table(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", expand=False)
    table.add_column("")
    for name in ("base", "expert alone", "steered", "steered against base", "alpha"):
        table.add_column(name, justify="right")
    return table


def _cells(values: dict[str, str], change: str, alpha: float) -> list[Any]:
    steered = styled(values["steered"], "bold")
    return [values["base"], values["expert"], steered, change, f"{alpha:g}"]


def _change(result: dict[str, Any], bound: str, form: str, scale: float) -> str:
    """Return the change against the base with its interval."""
    change = form.format(scale * result["change"])
    if result["change_interval"] is None:
        return change
    low, high = (bound.format(scale * value) for value in result["change_interval"])
    return f"{change} ({low} to {high})"


def _print_texts(
    console: Console, heading: str | None, texts: dict[str, Any], alpha: float
) -> None:
    """Print one prompt continued by base and steered base, side by side."""
    from rich.columns import Columns
    from rich.panel import Panel

    if heading is not None:
        console.print(heading, style="bold")
    width = max(30, (min(console.width, 120) - 1) // 2)
    panels = []
    steered = f"the base, steered (alpha {alpha:g})"
    for name, key in (("the base", "base_text"), (steered, "steered_text")):
        body = styled(texts["prompt"], "dim") + styled(texts[key])
        panels.append(Panel(body, title=name, title_align="left", width=width))
    console.print(Columns(panels, padding=(0, 0)))
