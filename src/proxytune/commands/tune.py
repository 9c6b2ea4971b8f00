"""`proxytune tune`: train an expert."""

from __future__ import annotations

from dataclasses import dataclass, replace

import typer

from proxytune.commands.app import command
from proxytune.commands.console import json_line, print_text, say
from proxytune.commands.options import AS_JSON
from proxytune.commands.progress import ProgressBars
from proxytune.errors import missing_extra
from proxytune.settings import option
from proxytune.tune.settings import Display, Interrupted, TuneSettings


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the run goes on, and how its result is printed."""

    resume: bool = option(False, "Continue the run in --output")
    as_json: bool = option(False, AS_JSON)


@command(
    "proxytune tune --anti-expert small-model --base large-model --data rows.jsonl --output my-recipe"
)
def tune(settings: TuneSettings, options: RunOptions) -> None:
    """Train an expert on your rows, and write its recipe.

    Rows are {"text": ...}, {"prompt": ..., "completion": ...}, {"messages": [...]} or {"prompt": ...,
    "chosen": ..., "rejected": ...}, all rows of a file in the same form. Text is packed; of the other forms,
    only what the model is to say is trained on. With --reward, rows are {"prompt": ...} and whatever the
    reward reads, such as "answer", and the model learns from its own answers.

    With --base, the expert is trained through the base, and the strength of steering is chosen on the
    validation rows. At the end, base, expert and steered base are compared on rows that nothing was chosen
    on, with a verdict. Without --anti-expert, the base itself is tuned, for comparison; without --base, the
    recipe holds the tuned small model alone.

    Ctrl-C saves the state, and --resume continues.
    """
    # In a shell's quotes a line break is written as two characters.
    typed = {name: getattr(settings, name) for name in ("template", "base_template")}
    settings = replace(settings, **{k: v and v.replace("\\n", "\n") for k, v in typed.items()})
    try:
        from proxytune.tune.run import tune as run
    except ImportError as error:
        raise missing_extra(
            f"tuning needs libraries that are not installed ({error})", "tune"
        ) from error
    try:
        with ProgressBars(shows_ends=True) as bars:
            result = run(settings, resume=options.resume, display=Stages(bars))
    except Interrupted as error:
        say(str(error))
        raise typer.Exit(130) from None
    if options.as_json:
        print_text(json_line(result.to_dict()))
        return
    from proxytune.tune.card import last_word

    for line in last_word(settings, result):
        say(line)
    say(f'next: proxytune generate {settings.output} "..."')


class Stages(Display):
    """Shows the stages of a run as progress bars, with their losses."""

    def __init__(self, bars: ProgressBars) -> None:
        self._bars = bars

    def say(self, text: str) -> None:
        """Show a message."""
        say(text)

    def stage(self, name: str, done: float, total: float, **numbers: float | None) -> None:
        """Show how far a stage has progressed."""
        shown = ", ".join(
            f"{key.replace('_', ' ')} {value:.4f}"
            for key, value in numbers.items()
            if value is not None
        )
        self._bars.show(name, done, total, shown)
