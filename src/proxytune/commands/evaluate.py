"""`proxytune eval`: predictors side by side on benchmarks."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import (
    ContextSizeOption,
    DataDirOption,
    DeviceOption,
    DtypeOption,
    GpuLayersOption,
    JsonOption,
    LlamaCppOption,
    MaxCallsOption,
    MaxCostOption,
    RecipeArgument,
    SpeculativeOption,
    ThreadsOption,
    command,
    json_line,
    load_models,
    number_of,
    read_recipe,
    stdout,
)
from proxytune.commands.progress import bars
from proxytune.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.progress import TaskID

    from proxytune.evaluate import Progress
    from proxytune.model import ProxyTuned
    from proxytune.recipe import Recipe


@command(
    "proxytune eval my-recipe --tasks gsm8k,truthfulqa_mc --data-dir data --limit 100", name="eval"
)
def evaluate(
    recipe: RecipeArgument,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Benchmarks: gsm8k, truthfulqa_mc, truthfulqa_open, toxigen, alpaca_eval, humaneval, "
            "ds1000, triviaqa, realtimeqa; or any task of lm-eval",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Where samples and reports go; a run that was killed goes on there",
        ),
    ] = Path("eval"),
    data_dir: DataDirOption = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most items of each  [default: all]", show_default=False),
    ] = None,
    alphas: Annotated[
        str, typer.Option(metavar="A,B,...", help="Strengths of the steered base")
    ] = "1",
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Steer with this expert; repeat to add up several  [default: the recipe's]",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Score by paper, as published, or by numeric, what is right; samples have both",
        ),
    ] = "paper",
    tuned: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare with this directly tuned model, and show the gap closed",
            show_default=False,
        ),
    ] = None,
    tuned_adapter: Annotated[
        str | None,
        typer.Option(
            metavar="ADAPTER",
            help="Compare with the base with this LoRA adapter on it",
            show_default=False,
        ),
    ] = None,
    tuned_prompt: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Its prompt format: plain, chat or a Jinja template  [default: the expert's]",
            show_default=False,
        ),
    ] = None,
    nudge_below: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Compare with nudging: the expert chooses tokens where the base's likeliest has less than "
            "this probability; its authors took 0.4",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Answers generated together")] = 8,
    num_samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Answers to an item where a benchmark draws several  [default: as published]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Cut answers here where the published limit is higher; the report says so  "
            "[default: as published]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of drawn answers")] = 0,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Run the programs that models write, each in a process with limits of time, memory, files "
            "and network; without it they stay unscored",
        ),
    ] = False,
    judge_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible API whose model judges open answers, /v1 included; without it they "
            "stay unscored",
            show_default=False,
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What that server calls it", show_default=False),
    ] = None,
    judge_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The environment variable with its key", show_default=False
        ),
    ] = None,
    judge_max_calls: Annotated[
        int | None,
        typer.Option(metavar="N", help="Stop asking it after so many calls", show_default=False),
    ] = None,
    toxicity_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What classifies text as toxic, such as tomh/toxigen_roberta; without it ToxiGen stays "
            "unscored",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    speculative: SpeculativeOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    llama_cpp: LlamaCppOption = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = None,
    context_size: ContextSizeOption = None,
    max_calls: MaxCallsOption = None,
    max_cost: MaxCostOption = None,
) -> None:
    """Compare base, expert, steered base and others on benchmarks.

    Everyone answers the same items with the same settings. Prints a table for each benchmark with standard
    errors, paired tests and the gap closed; DIR gets eval.json, eval.md, eval.png and every sample as JSON
    lines.
    """
    from proxytune.eval_report import markdown, picture, terminal_table
    from proxytune.evaluate import EvalOptions, write_whole
    from proxytune.evaluate import evaluate as run
    from proxytune.tasks.judges import JudgeSettings
    from proxytune.tasks.task import RULES

    chosen_rule = next((name for name in RULES if name == rule), None)
    if chosen_rule is None:
        raise InvalidRequest(f"--rule is {rule!r}, and must be one of {', '.join(RULES)}")
    if (judge_url is None) != (judge_model is None):
        raise InvalidRequest(
            "--judge-url and --judge-model belong together, and one is missing.\nhint: give both"
        )
    judge = None
    if judge_url is not None and judge_model is not None:
        judge = JudgeSettings(judge_url, judge_model, judge_key_env, judge_max_calls)
    found = read_recipe(
        recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
    )
    options = EvalOptions(
        tasks=tuple(part.strip() for part in tasks.split(",") if part.strip()),
        data_dir=data_dir,
        limit=limit,
        alphas=tuple(number_of(part, "--alphas") for part in alphas.split(",") if part.strip()),
        experts=tuple(expert) if expert else None,
        rule=chosen_rule,
        tuned=tuned,
        tuned_adapter=tuned_adapter,
        tuned_prompt=tuned_prompt,
        nudge_below=nudge_below,
        batch_size=batch_size,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        run_code=run_code,
        judge=judge,
        toxicity_model=toxicity_model,
        dtype=dtype,
        device=device,
        speculative=speculative,
    )

    def load(wanted: Recipe, experts: tuple[str, ...] | None) -> ProxyTuned:
        return load_models(
            wanted,
            experts,
            device=device,
            dtype=dtype,
            max_calls=max_calls if wanted.base.api is not None else None,
            max_cost=max_cost if wanted.base.api is not None else None,
        )

    show = _Shown()
    try:
        report = run(
            found,
            output,
            options,
            load=load,
            name=recipe,
            on_progress=show,
            say=lambda text: typer.echo(text, err=True),
        )
    finally:
        show.close()
    content = report.to_dict()
    write_whole(output / "eval.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_whole(output / "eval.md", markdown(report, _command_line()))
    if importlib.util.find_spec("matplotlib") is not None:
        picture(report, output / "eval.png")
    else:
        typer.echo("no picture: pip install 'proxytune[eval]' brings matplotlib", err=True)
    if as_json:
        typer.echo(json_line(content))
    else:
        console = stdout()
        for task in report.tasks:
            console.print(terminal_table(task))
            for note in task.notes:
                typer.echo(f"  {note}")
            typer.echo("")
    resumed = f", {report.num_resumed:,} were there" if report.num_resumed else ""
    typer.echo(
        f"{report.num_generated:,} samples generated{resumed}; everything is in {output}", err=True
    )


def _command_line() -> str:
    """Return the command as it was typed, without the interpreter's path."""
    return " ".join(["proxytune", *map(shlex.quote, sys.argv[1:])])


class _Shown:
    """A bar on stderr for each predictor and benchmark."""

    def __init__(self) -> None:
        self._bars = bars("{task.completed:,.0f} of {task.total:,.0f}", doing="evaluating")
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._bars.start()

    def __call__(self, progress: Progress) -> None:
        key = (progress.task, progress.predictor)
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(", ".join(key), total=progress.num_samples)
        self._bars.update(self._tasks[key], completed=progress.num_done)

    def close(self) -> None:
        self._bars.stop()
