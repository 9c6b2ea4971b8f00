"""The main job on real models, offline: what `proxytune demo` shows.

SmolLM2-135M-Instruct is the base; the experts are the smol family's, shipped with the package. Texts are held
out: no model was trained on them or chosen by them. Every number is measured when it is shown.
"""

from __future__ import annotations

import time
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

    from proxytune.decode.batch import Event
    from proxytune.model import ProxyTuned
    from proxytune.trace import Trace

RECIPE = "package:proxytune/smol"
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

    Shows the perplexity of held-out text under base, expert and steered base, and what base and steered base
    write. All numbers are measured now.
    """
    answer = measured(seed=options.seed, new_tokens=options.new_tokens)
    if options.as_json:
        print_text(json_line(answer))
    else:
        show(stdout(), answer)


def measured(*, seed: int = 1, new_tokens: int) -> dict[str, Any]:
    """Return per domain the perplexities, the change with its interval, and both texts."""
    from proxytune.model import ProxyTuned

    sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0.7, seed=seed)
    started = time.perf_counter()
    with waiting("loading models (the first time converts one)"):
        model = ProxyTuned.load(RECIPE)
    with ProgressBars() as bars:
        results = [_scored(model, domain, bars) for domain in DOMAINS]
        traces = _continued(model, sampling, bars)
    for index, result in enumerate(results):
        result["text_alpha"] = TEXT_ALPHA
        result["base_text"] = traces[2 * index].text
        result["steered_text"] = traces[2 * index + 1].text
    return {"domains": results, "elapsed_s": round(time.perf_counter() - started, 1)}


def _scored(model: ProxyTuned, domain: Domain, bars: ProgressBars) -> dict[str, Any]:
    from proxytune.checkpoints.references import resolve_package

    text = resolve_package(f"{RECIPE}/heldout/{domain.expert}.txt").read_text("utf-8")
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


def _continued(model: ProxyTuned, sampling: SamplingParams, bars: ProgressBars) -> list[Trace]:
    """Return each domain's prompt continued by base and steered base, in one batch."""
    requests = [
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


def show(console: Console, answer: dict[str, Any]) -> None:
    """Print what was measured, as a table and texts side by side."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.table import Table

    table = Table(
        title="Perplexity of held-out text (lower is better)", title_justify="left", expand=False
    )
    table.add_column("text")
    for name in ("base", "expert alone", "steered", "steered against base", "alpha"):
        table.add_column(name, justify="right")
    for result in answer["domains"]:
        perplexity = result["perplexity"]
        change = f"{result['change']:+.0%}"
        if result["change_interval"] is not None:
            low, high = result["change_interval"]
            change += f" ({low:+.0%} to {high:+.0%})"
        table.add_row(
            result["title"],
            f"{perplexity['base']:.1f}",
            f"{perplexity['expert']:.1f}",
            styled(f"{perplexity['steered']:.1f}", "bold"),
            change,
            f"{result['alpha']:g}",
        )
    console.print(table)
    console.print(
        "base: SmolLM2-135M-Instruct, weights untouched · experts: 7.6 M parameters · "
        "brackets: 95 % interval\n"
    )
    for result in answer["domains"]:
        console.print(f"{result['title']}, continued by", style="bold")
        width = max(30, (min(console.width, 120) - 1) // 2)
        panels = []
        steered = f"the base, steered (alpha {result['text_alpha']:g})"
        for name, key in (("the base", "base_text"), (steered, "steered_text")):
            body = styled(result["prompt"], "dim") + styled(result[key])
            panels.append(Panel(body, title=name, title_align="left", width=width))
        console.print(Columns(panels, padding=(0, 0)))
    console.print(
        f"Measured now, in {answer['elapsed_s']:.0f} s. "
        'Your own prompt: proxytune generate package:proxytune/smol "To be" --expert tinyshakespeare'
    )
