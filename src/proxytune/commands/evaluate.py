"""`proxytune eval`: predictors side by side on benchmarks."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command, print_result
from proxytune.commands.console import print_text, say, stdout
from proxytune.commands.engines import EngineOptions, VllmOptions
from proxytune.commands.flags import Pick
from proxytune.commands.options import AS_JSON, RecipeArgument
from proxytune.commands.progress import ProgressBars
from proxytune.errors import InvalidRequest, install_command
from proxytune.evaluate.plan import EvalOptions
from proxytune.settings import option

if TYPE_CHECKING:
    from proxytune.evaluate.compare import EvalReport
    from proxytune.evaluate.judges import JudgeSettings
    from proxytune.evaluate.run import EvalProgress
    from proxytune.model import ProxyTuned
    from proxytune.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Which server judges open answers."""

    judge_url: str | None = option(
        None,
        "OpenAI-compatible API whose model judges open answers, /v1 included; without it they stay "
        "unscored",
        metavar="URL",
    )
    judge_model: str | None = option(None, "Name of the judge on that server", metavar="NAME")
    judge_key_env: str | None = option(
        None, "Environment variable with the judge's key", metavar="NAME"
    )
    judge_max_calls: int | None = option(None, "Maximum number of calls to the judge")

    def settings(self) -> JudgeSettings | None:
        """Return the judge, or None if none is named."""
        from proxytune.evaluate.judges import JudgeSettings

        if (self.judge_url is None) != (self.judge_model is None):
            raise InvalidRequest(
                "--judge-url and --judge-model belong together, and one is missing.\nhint: give both"
            )
        if self.judge_url is None or self.judge_model is None:
            return None
        return JudgeSettings(
            self.judge_url, self.judge_model, self.judge_key_env, self.judge_max_calls
        )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where the results go."""

    output: Path = option(
        Path("eval"),
        "Directory for samples and reports; a run that was interrupted continues there",
        metavar="DIR",
    )
    as_json: bool = option(False, AS_JSON)


@command(
    "proxytune eval my-recipe --tasks gsm8k,truthfulqa_mc --data-dir data --limit 100", name="eval"
)
def evaluate(
    recipe: RecipeArgument,
    vllm_options: VllmOptions = None,
    *,
    options: EvalOptions,
    judge: JudgeOptions,
    report: ReportOptions,
    models: Annotated[EngineOptions, Pick(leave_out=("cuda_graphs",))],
) -> None:
    """Compare base, expert, steered base and others on benchmarks.

    All of them answer the same items with the same settings. Prints a table for each benchmark with standard
    errors, paired tests and the gap closed; the output directory gets eval.json, eval.md, eval.png and every
    sample as JSON lines.
    """
    from proxytune.evaluate.run import evaluate as run

    models = models.taking(vllm_options)
    options = replace(
        options,
        judge=judge.settings(),
        dtype=models.dtype,
        device=models.device,
        exact=models.exact,
        engine=models.engine,
    )
    found = models.read(recipe)

    def load(wanted: Recipe, experts: tuple[str, ...] | None) -> ProxyTuned:
        is_api = wanted.base.api is not None
        own = models if is_api else replace(models, max_calls=None, max_cost=None, key_env=None)
        return own.load(wanted, experts)

    def show(state: EvalProgress) -> None:
        bars.show(f"{state.task}, {state.predictor}", state.num_done, state.num_samples)

    with ProgressBars() as bars:
        result = run(
            found, report.output, options, load=load, name=recipe, on_progress=show, say=say
        )
    print_result(result, _show, as_json=report.as_json)
    _write(result, report.output)
    resumed = f", {result.num_resumed:,} were there before" if result.num_resumed else ""
    say(f"{result.num_generated:,} samples generated{resumed}; everything is in {report.output}")


def _write(report: EvalReport, output: Path) -> None:
    from proxytune.evaluate.tables import markdown, picture
    from proxytune.files import write_whole

    content = json.dumps(report.to_dict(), indent=1, ensure_ascii=False)
    write_whole(output / "eval.json", content + "\n")
    # The command as it was typed, without the interpreter's path.
    line = " ".join(["proxytune", *map(shlex.quote, sys.argv[1:])])
    write_whole(output / "eval.md", markdown(report, line))
    if importlib.util.find_spec("matplotlib") is not None:
        picture(report, output / "eval.png")
    else:
        say(f"no picture: {install_command('eval')} brings matplotlib")


def _show(report: EvalReport) -> None:
    from proxytune.evaluate.tables import terminal_table

    console = stdout()
    for task in report.tasks:
        console.print(terminal_table(task))
        for note in task.notes:
            print_text(f"  {note}")
        print_text()
