"""`proxytune fit`: weights and an output bias for a recipe's expert, without training."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from proxytune.commands.app import command
from proxytune.commands.console import json_line, plain_table, print_text, say, stdout
from proxytune.commands.flags import Pick
from proxytune.commands.options import AS_JSON, DataOptions, ModelOptions, RecipeArgument
from proxytune.commands.progress import ProgressBars
from proxytune.errors import InvalidRequest
from proxytune.settings import check, option
from proxytune.tune.settings import ALPHAS

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned
    from proxytune.tune.fit import Fitted, Gain


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What is fitted, and where it goes."""

    expert: str | None = option(
        None, "The expert whose weights are fitted", metavar="NAME", none_means="the only one"
    )
    bias: bool = option(
        False, "Fit an output bias, too, on --bias-share of the data; it needs --output"
    )
    num_ids: int = option(4000, "Maximum number of tokens with a bias", at_least=1)
    bias_share: float = option(
        0.5,
        "Share of the data that the bias is fitted on; weights are fitted and judged on the rest",
        above=0,
        below=1,
    )
    output: str | None = option(
        None, "Directory to write the recipe to with what wins; otherwise its keys are printed",
        metavar="DIR",
    )  # fmt: skip
    seed: int = option(0, "Random seed", at_least=0)
    as_json: bool = option(False, AS_JSON)

    def __post_init__(self) -> None:
        check(self)
        for name in ("num_ids", "bias_share"):
            # A dataclass has its defaults as attributes.
            if not self.bias and getattr(self, name) != getattr(FitOptions, name):
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)}, and no bias is fitted.\nhint: add --bias"
                )


@command("proxytune fit my-recipe --data rows.jsonl --bias --output fitted-recipe")
def fit(
    recipe: RecipeArgument,
    *,
    data: DataOptions,
    options: FitOptions,
    models: Annotated[ModelOptions, Pick(leave_out=("cuda_graphs", "max_calls", "max_cost"))],
) -> None:
    """Fit weights of base, expert and anti-expert to your rows, and perhaps an output bias, without training.

    Give rows that the expert was not trained on. Weights are kept only where they clearly beat the best
    strength on rows that they were not fitted to; the expert's strength is then 1.
    """
    if (data.text_file is None) == (data.data is None):
        raise InvalidRequest(
            "--text-file is a plain text, --data are rows, and one of them is needed.\n"
            "hint: proxytune fit DIR --data rows.jsonl"
        )
    if options.bias and options.output is None:
        raise InvalidRequest(
            "--bias makes a file beside the recipe, and --output names no recipe to write.\n"
            "hint: add --output DIR"
        )
    found = models.read(recipe)
    if options.output is not None:
        found.check_free(Path(options.output).expanduser().absolute(), overwrite=False)
    names = found.named(None if options.expert is None else (options.expert,))
    if len(names) != 1:
        raise InvalidRequest(
            f"weights are fitted for one expert at a time, and {len(names)} steer: {', '.join(names)}.\n"
            f"hint: --expert {names[0]}"
        )
    model = models.load(found, names)
    fitted = _fit(model, names[0], data, options)
    from proxytune.tune.fitted import fitted_spec, words_of

    if options.output is not None:
        written = found.write(options.output)
        experts = tuple(
            fitted_spec(each, fitted, written.directory) if each.name == names[0] else each
            for each in written.experts
        )
        replace(written, experts=experts).write(options.output, overwrite=True)
    if options.as_json:
        print_text(json_line(fitted.to_dict()))
        return
    _show(fitted)
    say(words_of(fitted))
    if options.output is not None:
        say(f"wrote {options.output}")
    elif fitted.chosen is not None:
        keys = dict(zip(("base", "expert", "anti_expert"), fitted.chosen.weights, strict=True))
        rounded = {name: round(weight, 4) for name, weight in keys.items()}
        say(f'for expert {names[0]!r}: "alpha": 1, "weights": {json.dumps(rounded)}')


def _fit(model: ProxyTuned, name: str, data: DataOptions, options: FitOptions) -> Fitted:
    from proxytune.measure.score import scoring_window
    from proxytune.measure.sweep import split
    from proxytune.tune.fitted import fit_expert

    passages = data.passages(model, scoring_window(model.ensemble, data.window))[: data.limit]
    train = None
    if options.bias:
        in_order = data.text_file is not None
        train, passages = split(
            passages, 1 - options.bias_share, seed=options.seed, in_order=in_order
        )
    with ExitStack() as stack:
        bars = stack.enter_context(ProgressBars(shows_ends=True))
        return fit_expert(
            model,
            name,
            valid=passages,
            train=train,
            alphas=ALPHAS,
            num_ids=options.num_ids,
            seed=options.seed,
            on_progress=lambda stage, done, total: bars.show(stage, done, total, ""),
        )


def _show(fitted: Fitted) -> None:
    headings = ("base", "expert", "anti-expert", "tokens", "nats/token", "gain", "95 % interval")
    table = plain_table("", numbers=headings)

    def add(label: str, weights: Any, num_ids: int, nats: float, gain: Gain | None) -> None:
        between = "" if gain is None or gain.interval is None else (
            f"{gain.interval.low:+.4f} to {gain.interval.high:+.4f}"
        )  # fmt: skip
        table.add_row(
            label,
            *(f"{weight:.3f}" for weight in weights),
            f"{num_ids:,}" if num_ids else "",
            f"{nats:.4f}",
            "" if gain is None else f"{gain.nats:+.4f}",
            between,
        )

    alpha = fitted.alpha
    add("strength, or base alone", (1.0, alpha, alpha), 0, fitted.gain.before, None)
    add("weights", fitted.weights, 0, fitted.gain.after, fitted.gain)
    if fitted.bias is not None and fitted.bias_gain is not None:
        assert fitted.weights_with_bias is not None
        after = fitted.bias_gain.after
        add("weights and bias", fitted.weights_with_bias, len(fitted.bias), after, fitted.bias_gain)
    stdout().print(table)
