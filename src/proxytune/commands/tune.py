"""`proxytune tune`: train an expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxytune.commands.app import JsonOption, command, json_line, stderr
from proxytune.commands.progress import bars
from proxytune.errors import (
    MissingExtra,
)

if TYPE_CHECKING:
    pass


@command(
    "proxytune tune --anti-expert small-model --base large-model --data rows.jsonl --output my-recipe"
)
def tune(
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Training rows: JSON lines, JSON or text, also as .gz; a data set saved by datasets; or a "
            "Hub id",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the recipe goes", show_default=False)
    ],
    anti_expert: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The small model to start from; left out, the base itself is tuned",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The large model that the expert shall steer",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="sft: the small model by itself; cpt: through the frozen base and anti-expert; dpo: on "
            "preference pairs",
        ),
    ] = "sft",
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What requests call the expert  [default: the last part of --output]",
            show_default=False,
        ),
    ] = None,
    valid_data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Validation rows  [default: --valid-share of the training rows]",
            show_default=False,
        ),
    ] = None,
    valid_share: Annotated[
        float,
        typer.Option(
            metavar="FLOAT",
            help="Share of the rows kept for validation, at most 500 of them; 0 for none",
        ),
    ] = 0.05,
    test_data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Rows to measure once, at the strength chosen on the validation rows",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="Which split of a data set that has several")
    ] = "train",
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="How the expert sees prompts: plain, chat, or a Jinja template  [default: chat for "
            "messages, else plain]",
            show_default=False,
        ),
    ] = None,
    base_prompt: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="How the base sees prompts  [default: as the expert]",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights instead of a LoRA adapter")
    ] = False,
    lora_rank: Annotated[int, typer.Option(metavar="R", help="Rank of the LoRA adapter")] = 32,
    lora_targets: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Linear layers that get an adapter, by name  [default: all but the head]",
            show_default=False,
        ),
    ] = None,
    lora_dropout: Annotated[
        float, typer.Option(metavar="FLOAT", help="Dropout in the adapter while training")
    ] = 0.05,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="FLOAT",
            help="At its peak  [default: 2e-4 for wide models up to 2e-3 for narrow ones; a tenth for "
            "--full, and for dpo]",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(metavar="N", help="Passes over the rows")] = 3.0,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Train on at most so many tokens, in rows drawn by --seed",
            show_default=False,
        ),
    ] = None,
    max_valid_tokens: Annotated[
        int, typer.Option(metavar="N", help="Evaluate on at most so many tokens, drawn likewise")
    ] = 32_768,
    max_steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Optimizer steps, instead of --epochs", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Rows per forward")] = 8,
    accumulate: Annotated[int, typer.Option(metavar="N", help="Forwards per optimizer step")] = 1,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens per row, longer rows are cut and text is packed to it  [default: 1024, or the "
            "context]",
            show_default=False,
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps between evaluations, each with a checkpoint  [default: a tenth of the run, at most "
            "100]",
            show_default=False,
        ),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(
            metavar="N", help="End after so many evaluations without a lower loss; 0 never does"
        ),
    ] = 3,
    beta: Annotated[
        float, typer.Option(metavar="FLOAT", help="For dpo: what leaving the untuned model costs")
    ] = 0.1,
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="FLOAT",
            help="The recipe's strength, and the one cpt trains at  [default: chosen on the validation rows; "
            "cpt trains at 1]",
            show_default=False,
        ),
    ] = None,
    cpt_form: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="For cpt at an alpha other than 1: steered is base + alpha * (expert - anti-expert), as "
            "decoding adds them; paper is expert + alpha * (base - anti-expert)",
        ),
    ] = "steered",
    offsets_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For cpt: keep what is computed of the frozen models here, for other runs on the same rows",
            show_default=False,
        ),
    ] = None,
    measure_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Measure base, expert and steered base on about so many held-out tokens; 0 measures "
            "nothing and chooses no strength",
        ),
    ] = 15_000,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything drawn")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output")
    ] = False,
    as_json: JsonOption = False,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Train there: cpu, cuda, cuda:1  [default: CUDA where there is some]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="float32 or bfloat16  [default: bfloat16 on a GPU, float32 on the CPU]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train an expert on your rows, and write its recipe.

    Rows are {"text": ...}, {"prompt": ..., "completion": ...}, {"messages": [...]} or {"prompt": ...,
    "chosen": ..., "rejected": ...}, all of a file in one way. Text is packed; of the others only what the
    model shall say is trained on.

    With --base the strength of steering is chosen on the validation rows, and base, expert and steered base
    are measured. Without --anti-expert the base itself is tuned, for comparison; without --base the recipe
    holds the tuned small model alone.

    Ctrl-C saves the state, and --resume goes on.
    """
    try:
        from proxytune.tune.run import Interrupted
        from proxytune.tune.run import tune as run
        from proxytune.tune.settings import TuneSettings
    except ImportError as error:
        raise MissingExtra(
            f"tuning needs libraries that are not installed ({error}).\n"
            "hint: pip install 'proxytune[tune]'"
        ) from error
    settings = TuneSettings(
        output=str(output),
        data=data,
        anti_expert=anti_expert,
        base=base,
        method=method,  # type: ignore[arg-type]  # checked there
        name=name,
        valid_data=valid_data,
        valid_share=valid_share,
        test_data=test_data,
        split=split,
        prompt=prompt,
        base_prompt=base_prompt,
        full=full,
        lora_rank=lora_rank,
        lora_targets=tuple(lora_targets.split(",")) if lora_targets else (),
        lora_dropout=lora_dropout,
        learning_rate=learning_rate,
        epochs=epochs,
        max_tokens=max_tokens,
        max_valid_tokens=max_valid_tokens,
        max_steps=max_steps,
        batch_size=batch_size,
        accumulate=accumulate,
        max_length=max_length,
        eval_every=eval_every,
        patience=patience,
        beta=beta,
        alpha=alpha,
        cpt_form=cpt_form,  # type: ignore[arg-type]  # checked there
        offsets_dir=None if offsets_dir is None else str(offsets_dir),
        measure_tokens=measure_tokens,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    try:
        result = run(settings, resume=resume, display=_tuning_display())
    except Interrupted as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json_line(result.to_dict()))
        return
    typer.echo(
        f"wrote {settings.directory}: expert {result.expert!r}, alpha {result.alpha:g}", err=True
    )
    for title, report in (("validation", result.valid), ("test", result.test)):
        if report is not None:
            best = next(
                row
                for row in report["rows"]
                if row["name"] == "steered" and row["alpha"] == result.alpha
            )
            base_row = report["rows"][0]
            typer.echo(
                f"{title} perplexity: base {base_row['perplexity']:.2f}, steered at alpha "
                f"{result.alpha:g} {best['perplexity']:.2f} ({best['change']:+.1%})",
                err=True,
            )
    typer.echo(f'next: proxytune generate {output} "..."', err=True)


def _tuning_display() -> Any:
    """Return a progress display: a bar for each stage; without a terminal, a line when it ends."""
    from proxytune.tune.run import Display

    console = stderr()

    class Bar(Display):
        def __init__(self) -> None:
            self._bars = bars(
                "{task.completed:,.0f} of {task.total:,.0f}",
                "{task.fields[numbers]}",
                doing="tuning",
                console=console,
            )
            self._bars.start()
            self._tasks: dict[str, Any] = {}

        def say(self, text: str) -> None:
            console.print(text, markup=False, soft_wrap=True)

        def stage(self, name: str, done: float, total: float, **numbers: float | None) -> None:
            shown = ", ".join(
                f"{key.replace('_', ' ')} {value:.4f}"
                for key, value in numbers.items()
                if value is not None
            )
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, numbers="")
            self._bars.update(self._tasks[name], completed=done, total=total, numbers=shown)
            if not console.is_terminal and done >= total:
                self.say(f"{name}: {done:,.0f} of {total:,.0f}" + (f", {shown}" if shown else ""))

        def close(self) -> None:
            self._bars.stop()

    return Bar()
