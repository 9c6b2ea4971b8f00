"""`proxytune sweep`: which strength is best for a text or for rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command, print_result
from proxytune.commands.console import between, change_text, plain_table, say, stdout
from proxytune.commands.engines import EngineOptions, VllmOptions
from proxytune.commands.flags import Pick, number_of
from proxytune.commands.options import (
    AS_JSON,
    PICTURE,
    DataOptions,
    PolicyOptions,
    RecipeArgument,
)
from proxytune.commands.progress import progress
from proxytune.errors import InvalidRequest
from proxytune.evaluate.plan import DATA_DIR
from proxytune.request import BATCH_SIZES, DEFAULT_BATCH_SIZE, SamplingParams, Steering
from proxytune.settings import option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxytune.decode.ensemble import Ensemble
    from proxytune.measure.metrics import Metric
    from proxytune.measure.sweep import Grid, Point, PromptWithReference, SweepReport
    from proxytune.model import ProxyTuned
    from proxytune.recipe.recipe import Recipe
    from proxytune.tasks.task import Task

DEFAULT_ALPHAS = "0.25,0.5,0.75,1,1.25,1.5"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is swept, and how it is judged."""

    task: str | None = option(
        None,
        "A benchmark of `proxytune eval`, with its own settings: gsm8k, triviaqa, truthfulqa_mc",
        metavar="NAME",
    )
    data_dir: Path | None = option(None, DATA_DIR)
    test_data: str | None = option(
        None,
        "The test part, of the same kind as the data",
        metavar="SOURCE",
        none_means="a share of the data",
    )
    test_share: float = option(
        0.5, "Share of the data for the test part: a text's end, or rows drawn at random"
    )
    metric: str = option(
        "perplexity",
        "perplexity, exact_match, contains, last_number, chrf; all but the first generate text and compare "
        "it with the rows' completions",
        metavar="NAME",
    )
    alphas: tuple[str, ...] = option(
        (),
        "Strengths to try; with a name, for that expert: repeat to try every combination",
        metavar="[NAME=]A,B,...",
        none_means=DEFAULT_ALPHAS,
    )
    experts: tuple[str, ...] = option(
        (),
        "Steer with this expert; repeat for several, all at one strength",
        flag="--expert",
        metavar="NAME",
        none_means="those named in --alphas, or the recipe's",
    )
    max_new_tokens: int | None = option(
        None,
        "Maximum number of new tokens in a generated text",
        none_means="64, or the benchmark's",
    )
    stop: tuple[str, ...] = option((), "End a generated text before this string")
    batch_size: int | None = option(
        None,
        "Number of prompts that are answered together",
        at_least=1,
        none_means=DEFAULT_BATCH_SIZE,
    )
    seed: int = option(0, "Random seed of the split and the bootstrap")
    picture: Path | None = option(
        None, replace(PICTURE, help=f"{PICTURE.help}; needs proxytune[tune]")
    )
    as_json: bool = option(False, AS_JSON)

    def check(self, data: DataOptions) -> None:
        """Refuse options that contradict each other, before anything is read."""
        from proxytune.measure.metrics import METRICS

        if self.metric not in METRICS:
            raise InvalidRequest(
                f"--metric is {self.metric!r}, and must be one of {', '.join(METRICS)}.\n"
                "hint: perplexity needs no generation"
            )
        if sum(source is not None for source in (data.text_file, data.data, self.task)) != 1:
            raise InvalidRequest(
                "--text-file is a plain text, --data are rows, --task is a benchmark, and one of them is "
                "needed.\n"
                "hint: proxytune sweep DIR --text-file heldout.txt"
            )
        if self.task is None and self.data_dir is not None:
            raise InvalidRequest("--data-dir is for --task.\nhint: leave it out")
        if data.text_file is not None and self.metric != "perplexity":
            raise InvalidRequest(
                f"--metric {self.metric} compares generated texts with given answers, and a plain text has "
                "none.\n"
                "hint: give rows of prompts and completions with --data"
            )
        if not 0 < self.test_share < 1:
            raise InvalidRequest(f"--test-share is {self.test_share}, and must be between 0 and 1")
        if data.limit is not None and data.limit < 2:
            raise InvalidRequest(
                f"--limit is {data.limit}, and both parts need a window or row.\nhint: give 2 or more"
            )

    def benchmark(self) -> Task | None:
        """Return the benchmark that is named, if one is."""
        from proxytune.tasks.registry import find_task

        if self.task is None:
            return None
        found = find_task(self.task)
        if self.test_data is not None or self.metric != "perplexity":
            raise InvalidRequest(
                "--task brings its own items and metric.\nhint: leave --metric and --test-data out"
            )
        return found

    def sampling(self, benchmark: Task | None) -> SamplingParams:
        """Return how texts are generated."""
        usual = SamplingParams(max_new_tokens=64) if benchmark is None else benchmark.sampling
        most = usual.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return replace(usual, max_new_tokens=most, stop=self.stop or usual.stop)


@command(
    "proxytune sweep my-recipe --text-file heldout.txt --alphas 0.25,0.5,0.75,1 --picture sweep.png"
)
def sweep(
    recipe: RecipeArgument,
    vllm_options: VllmOptions = None,
    *,
    data: DataOptions,
    options: SweepOptions,
    policy: PolicyOptions,
    models: Annotated[EngineOptions, Pick(leave_out=("cuda_graphs", "max_calls", "max_cost"))],
) -> None:
    """Find the best strength of steering for your data: pick it on one part, and measure it on another.

    For perplexity, each model reads the data once, for all strengths. Generated texts are greedy, and a
    beginning that several strengths share is generated once. With --engine vllm, the data is read, and texts
    are generated, once for each strength.
    """
    from proxytune.measure.curve import draw

    models = models.taking(vllm_options)
    options.check(data)
    benchmark = options.benchmark()
    found = policy.applied_to(models.read(recipe))
    sampling = options.sampling(benchmark)
    grid, chosen = _grid(found, options)
    model = models.load(found, chosen)
    strengths = found.strengths(Steering(experts=chosen))
    usual = [strengths[name] for name in grid.names]
    if options.metric == "perplexity" and benchmark is None:
        report = _sweep_likelihood(model, model.steered_by(chosen), grid, usual, data, options)
    else:
        valid, test, metric = _rows_and_metric(model, benchmark, data, options)
        from proxytune.measure.sweep import sweep_generations

        with progress("sweeping", "prompts") as advance:
            report = sweep_generations(
                model.steered_by(chosen),
                grid,
                metric,
                valid=valid,
                test=test,
                own=usual,
                sampling=sampling,
                batch_size=options.batch_size or BATCH_SIZES[models.engine],
                seed=options.seed,
                on_progress=advance,
            )
    print_result(report, _show, as_json=options.as_json)
    if options.picture is not None:
        draw(report, grid, options.picture)
        say(f"wrote {options.picture}")


def _grid(recipe: Recipe, options: SweepOptions) -> tuple[Grid, tuple[str, ...]]:
    """Return the points to try, and the experts that steer."""
    from proxytune.measure.sweep import Grid

    shared, own = _strengths(options.alphas)
    if own and options.experts:
        raise InvalidRequest(
            "--alphas names experts and --expert is given too.\nhint: leave --expert out"
        )
    chosen = recipe.named(tuple(own or options.experts) or None)
    names = [e.name for e in recipe.experts if e.name in chosen]
    return Grid.of(names, own or shared), chosen


def _sweep_likelihood(
    model: ProxyTuned,
    ensemble: Ensemble,
    grid: Grid,
    usual: Sequence[float],
    data: DataOptions,
    options: SweepOptions,
) -> SweepReport:
    from proxytune.measure.score import scoring_window
    from proxytune.measure.sweep import split, sweep_likelihood

    window = scoring_window(model.ensemble, data.window)
    passages = data.passages(model, window)[: data.limit]
    if options.test_data is None:
        in_order = data.text_file is not None
        valid, test = split(passages, options.test_share, seed=options.seed, in_order=in_order)
    else:
        valid, test = passages, data.of(options.test_data).passages(model, window)
    with progress("sweeping", "tokens") as advance:
        return sweep_likelihood(
            ensemble,
            grid,
            valid=valid,
            test=test,
            own=usual,
            seed=options.seed,
            on_progress=advance,
        )


def _rows_and_metric(
    model: ProxyTuned, benchmark: Task | None, data: DataOptions, options: SweepOptions
) -> tuple[list[PromptWithReference], list[PromptWithReference], Metric]:
    from proxytune.data.passages import task_rows
    from proxytune.measure.metrics import METRICS
    from proxytune.measure.sweep import split

    metric = METRICS[options.metric]
    if benchmark is None:
        rows = _rows(model, data.data or "")[: data.limit]
    else:
        rows, metric = task_rows(model, benchmark, options.data_dir, limit=data.limit)
    if options.test_data is not None:
        return rows, _rows(model, options.test_data), metric
    valid, test = split(rows, options.test_share, seed=options.seed, in_order=False)
    return valid, test, metric


def _strengths(given: Sequence[str] | None) -> tuple[list[float], dict[str, list[float]]]:
    """Return strengths for all experts, or those of each that is named."""
    shared: list[float] = []
    own: dict[str, list[float]] = {}
    for item in given or [DEFAULT_ALPHAS]:
        name, has_name, values = item.rpartition("=")
        numbers = [number_of(part, "--alphas") for part in values.split(",")]
        (own.setdefault(name, []) if has_name else shared).extend(numbers)
    if shared and own:
        raise InvalidRequest(
            "--alphas is given with and without an expert's name, so it is unclear which holds.\n"
            "hint: name an expert in each, or in none"
        )
    unique = {name: list(dict.fromkeys(numbers)) for name, numbers in own.items()}
    return list(dict.fromkeys(shared)), unique


def _rows(model: ProxyTuned, source: str) -> list[PromptWithReference]:
    from proxytune.data.passages import rows_of
    from proxytune.data.rows import read_rows

    return rows_of(model, read_rows(source))


def _show(report: SweepReport) -> None:
    names = list(report.points[0].alphas)
    strengths = ["alpha"] if len(names) == 1 else names
    table = plain_table("", numbers=(*strengths, report.metric, "95 % interval", "against base"))

    is_ratio = report.metric == "perplexity"
    form = "{:.2f}" if is_ratio else "{:.3f}"

    def add(label: str, point: Point) -> None:
        table.add_row(
            label,
            *(f"{alpha:g}" for alpha in point.alphas.values()),
            form.format(point.value),
            between(point.interval, form),
            change_text(point, is_ratio) if any(point.alphas.values()) else "",
        )

    for number, point in enumerate(report.points):
        add("validation, picked" if number == report.picked else "validation", point)
    table.add_section()
    for name, point in report.test.items():
        add(f"test, {name}", point)
    stdout().print(table)
    best = report.test["picked"]
    verdict = ", ".join(f"{name} at alpha {alpha:g}" for name, alpha in best.alphas.items())
    say(
        f"picked {verdict} on {report.num_valid:,} validation windows or rows, and measured it on "
        f"{report.num_test:,}; intervals by bootstrap over them"
    )
    if report.num_read is not None:
        saved = 1 - report.num_read / max(1, report.num_tokens)
        say(
            f"{report.num_tokens:,} tokens in all texts, {report.num_read:,} of them read: shared beginnings "
            f"saved {saved:.0%}"
        )
    for note in report.notes:
        say(f"note: {note}")
