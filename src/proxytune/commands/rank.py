"""`proxytune rank-experts`: which of a recipe's experts will help with a kind of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command, print_result
from proxytune.commands.console import between, plain_table, say, stdout
from proxytune.commands.flags import Pick
from proxytune.commands.options import AS_JSON, DataOptions, ModelOptions, RecipeArgument
from proxytune.commands.progress import progress
from proxytune.errors import InvalidRequest
from proxytune.settings import option

if TYPE_CHECKING:
    from proxytune.measure.rank import Ranking


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Which experts are ranked, at which strengths."""

    experts: tuple[str, ...] = option(
        (),
        "Rank this expert; repeat for several",
        flag="--expert",
        metavar="NAME",
        none_means="all of the recipe's",
    )
    alphas: tuple[float, ...] = option(
        (0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
        "Strengths to try for each expert",
        metavar="A,B,...",
        separator=",",
    )
    seed: int = option(0, "Random seed of the bootstrap")
    as_json: bool = option(False, AS_JSON)


@command("proxytune rank-experts my-recipe --text-file sample.txt", name="rank-experts")
def rank_experts(
    recipe: RecipeArgument,
    *,
    data: DataOptions,
    options: RankOptions,
    models: Annotated[ModelOptions, Pick(leave_out=("cuda_graphs", "max_calls", "max_cost"))],
) -> None:
    """Rank experts by how much each alone would help with a kind of text, without generating.

    Each model reads a sample of that text once; a few thousand tokens are enough. Each expert is judged at
    strengths picked on the other half of the sample.
    """
    if (data.text_file is None) == (data.data is None):
        raise InvalidRequest(
            "--text-file is a plain text and --data are rows, and one of them is needed.\n"
            "hint: proxytune rank-experts DIR --text-file sample.txt"
        )
    found = models.read(recipe)
    chosen = found.named(options.experts or tuple(e.name for e in found.experts))
    model = models.load(found, chosen)
    from proxytune.measure.rank import rank_experts as ranked
    from proxytune.measure.score import scoring_window

    passages = data.passages(model, scoring_window(model.ensemble, data.window))[: data.limit]
    with progress("reading", "tokens") as advance:
        ranking = ranked(
            model.steered_by(chosen),
            passages,
            alphas=tuple(dict.fromkeys(options.alphas)),
            seed=options.seed,
            on_progress=advance,
        )
    print_result(ranking, _show, as_json=options.as_json)


def _show(ranking: Ranking) -> None:
    from proxytune.measure.rank import MEASURED_CORRELATION

    headings = ("alpha", "nats saved", "95 % interval", "perplexity", "first in", "gain", "slope")
    table = plain_table("expert", numbers=headings)
    for each in ranking.candidates:
        table.add_row(
            each.name,
            f"{each.alpha:g}",
            f"{each.benefit:+.4f}",
            between(each.interval, "{:+.4f}"),
            f"{each.change:+.1%}",
            f"{each.chance_best:.0%}",
            f"{each.gain:+.3f}",
            f"{each.slope:+.3f}",
        )
    stdout().print(table)
    say(
        f"{ranking.num_tokens:,} tokens in {ranking.num_passages:,} windows or rows, {ranking.base_nats:.3f} "
        "nats per token under the base; nats saved per token, at strengths picked on the other half"
    )
    say(
        f"on the smol family, such rankings had a rank correlation of {MEASURED_CORRELATION:.2f} with the "
        "benefit on other text of the same kind"
    )
    for note in ranking.notes:
        say(f"note: {note}")
