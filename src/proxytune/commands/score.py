"""`proxytune score`: perplexities of a text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command, print_result
from proxytune.commands.console import (
    between,
    change_text,
    file_text,
    plain_table,
    say,
    stdin_text,
    stdout,
)
from proxytune.commands.engines import EngineOptions, VllmOptions
from proxytune.commands.flags import Pick
from proxytune.commands.options import AS_JSON, WINDOW, PolicyOptions, RecipeArgument
from proxytune.commands.progress import progress
from proxytune.evaluate.plan import EXPERTS
from proxytune.settings import declared, option

if TYPE_CHECKING:
    from proxytune.measure.score import ScoreReport


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What is scored, by whom."""

    text_file: str = field(
        metadata=declared("The text: UTF-8, also as .gz; - reads stdin", metavar="FILE")
    )
    alphas: tuple[float, ...] = option(
        (0.0, 0.5, 1.0), "Strengths of the steered base", metavar="A,B,...", separator=","
    )
    experts: tuple[str, ...] = option(
        (), replace(EXPERTS, help="Score this expert; repeat to combine several")
    )
    window: int | None = option(
        None,
        replace(
            WINDOW, help="Tokens per window; each is predicted from those before it in the window"
        ),
    )
    seed: int = option(0, "Random seed of the bootstrap")
    as_json: bool = option(False, AS_JSON)


@command("proxytune score my-recipe --text-file heldout.txt --alphas 0,0.5,1")
def score(
    recipe: RecipeArgument,
    vllm_options: VllmOptions = None,
    *,
    options: ScoreOptions,
    policy: PolicyOptions,
    models: Annotated[EngineOptions, Pick(leave_out=("cuda_graphs",))],
) -> None:
    """Measure how well base, expert and steered base predict a text.

    Each model reads the text once, for all strengths. Every model sees the plain text. With --engine vllm,
    the text is read once for each row of the table.
    """
    models = models.taking(vllm_options)
    text = stdin_text() if options.text_file == "-" else file_text(Path(options.text_file))
    found = policy.applied_to(models.read(recipe))
    experts = options.experts or None
    model = models.load(found, found.named(experts))
    from proxytune.measure.score import scoring_window

    with progress("scoring", "tokens") as advance:
        report = model.score(
            text,
            list(dict.fromkeys(options.alphas)),
            experts=experts,
            window=scoring_window(model.ensemble, options.window),
            seed=options.seed,
            on_progress=advance,
        )
    print_result(report, _show_scores, as_json=options.as_json)


def _show_scores(report: ScoreReport) -> None:
    headings = ("alpha", "nats/token", "perplexity", "95 % interval", "against base")
    table = plain_table("model", numbers=headings)
    for row in report.rows:
        table.add_row(
            row.name,
            "" if row.alpha is None else f"{row.alpha:g}",
            f"{row.nats:.4f}",
            f"{row.perplexity:.2f}",
            between(row.interval, "{:.2f}"),
            "" if row.name == "base" else change_text(row, is_ratio=True),
        )
    stdout().print(table)
    for own in report.mapped:
        say(
            f"{own.name} has {own.share:.0%} of the base's tokens; the base gives them {own.base:.1%} of its "
            f"probability, and {own.name} gives the base's {own.small:.1%} of its own"
        )
    say(
        f"{report.num_tokens:,} tokens in {report.num_windows:,} windows of up to {report.window}; "
        "perplexity compared with the base, intervals by block bootstrap"
    )
