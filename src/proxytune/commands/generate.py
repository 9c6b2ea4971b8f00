"""`proxytune generate`: one prompt, or a file of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import (
    GREEDY,
    AlphaOption,
    CombineOption,
    ContextSizeOption,
    CudaGraphsOption,
    DeviceOption,
    DtypeOption,
    ExpertOption,
    Experts,
    FrequencyPenaltyOption,
    GpuLayersOption,
    JsonOption,
    LlamaCppOption,
    MaxCallsOption,
    MaxCostOption,
    MinNewTokensOption,
    MinPOption,
    PolicyOption,
    PresencePenaltyOption,
    RecipeArgument,
    RepetitionPenaltyOption,
    SpeculativeOption,
    StopOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    argument_text,
    command,
    json_line,
    load_models,
    rate_text,
    read_recipe,
    stdin_text,
    steering_of,
    strengths_text,
    with_policy,
)
from proxytune.commands.progress import bars
from proxytune.errors import (
    InvalidRequest,
    OutputFileError,
    ProxytuneError,
)
from proxytune.request import Request, SamplingParams

if TYPE_CHECKING:
    from proxytune.decode import Event
    from proxytune.model import ProxyTuned
    from proxytune.recipe import Recipe
    from proxytune.trace import Trace


@command('proxytune generate my-recipe "Once upon a time" --alpha 0.5')
def generate(
    recipe: RecipeArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue; - reads it from stdin, without its last line break",
            show_default=False,
        ),
    ] = None,
    alpha: AlphaOption = None,
    expert: ExpertOption = None,
    policy: PolicyOption = None,
    combine: CombineOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens to generate")
    ] = GREEDY.max_new_tokens,
    min_new_tokens: MinNewTokensOption = GREEDY.min_new_tokens,
    temperature: TemperatureOption = GREEDY.temperature,
    top_k: TopKOption = GREEDY.top_k,
    top_p: TopPOption = GREEDY.top_p,
    min_p: MinPOption = GREEDY.min_p,
    repetition_penalty: RepetitionPenaltyOption = GREEDY.repetition_penalty,
    presence_penalty: PresencePenaltyOption = GREEDY.presence_penalty,
    frequency_penalty: FrequencyPenaltyOption = GREEDY.frequency_penalty,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Makes drawn text repeatable; with --input-file each line gets a seed from it and the "
            "line's number  [default: another each time; 0 with --input-file]",
            show_default=False,
        ),
    ] = None,
    stop: StopOption = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence tokens")
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="List each token's logprob and the N likeliest tokens; with --json or --input-file",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print text as it is made, or all at the end  [default: --stream on a terminal]",
            show_default=False,
        ),
    ] = None,
    speculative: SpeculativeOption = False,
    require_certified: Annotated[
        bool,
        typer.Option(
            "--require-certified",
            help="End the text before a token that is not proved to be what all logits of a base behind an "
            "API would give",
        ),
    ] = False,
    choice: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Answer with the likeliest of these, told apart by their first tokens; give two or more",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    cuda_graphs: CudaGraphsOption = False,
    llama_cpp: LlamaCppOption = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = None,
    context_size: ContextSizeOption = None,
    max_calls: MaxCallsOption = None,
    max_cost: MaxCostOption = None,
    input_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts as JSON lines", show_default=False),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the answers go; FILE.progress.json beside it holds the settings",
            show_default=False,
        ),
    ] = None,
    trace_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write what each model gave each token there, for proxytune explain --trace and analyze",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Lines generated together  [default: 8]", show_default=False
        ),
    ] = None,
    skip_bad_lines: Annotated[
        bool,
        typer.Option("--skip-bad-lines", help="Leave out lines that cannot be used, and say which"),
    ] = False,
) -> None:
    """Generate text from a prompt, or from a file of prompts.

    A file has one JSON object a line, with prompt (text, messages or token ids) or messages, and perhaps
    options that hold for this line alone; the output has the same objects with output added. A run that was
    interrupted continues when the same command is given again, and leaves the file that an uninterrupted run
    writes.
    """
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        require_certified=require_certified,
    )
    _refuse_contradictions(
        {
            "--choice": bool(choice),
            "--require-certified": require_certified,
            "--speculative": speculative,
            "PROMPT": prompt is not None,
            "--input-file": input_file is not None,
            "--output-file": output_file is not None,
            "--trace-file": trace_file is not None,
            "--batch-size": batch_size is not None,
            "--skip-bad-lines": skip_bad_lines,
            "--stream": stream is True,
            "--json": as_json,
            "--logprobs": logprobs is not None,
        }
    )

    def read() -> Recipe:
        found = read_recipe(
            recipe,
            llama_cpp,
            threads=threads,
            gpu_layers=gpu_layers,
            context_size=context_size,
        )
        return with_policy(found, policy, combine)

    if input_file is not None and output_file is not None:
        found = read()
        own_alpha, experts = steering_of(found, expert, alpha)
        _generate_file(
            found,
            input_file,
            output_file,
            sampling=sampling,
            alpha=own_alpha,
            experts=experts,
            batch_size=8 if batch_size is None else batch_size,
            skip_bad_lines=skip_bad_lines,
            device=device,
            dtype=dtype,
            cuda_graphs=cuda_graphs,
            speculative=speculative,
            as_json=as_json,
            max_calls=max_calls,
            max_cost=max_cost,
        )
        return
    assert prompt is not None
    text = stdin_text() if prompt == "-" else argument_text(prompt)
    Request(text, sampling)  # An empty prompt needs no recipe to be refused.
    found = read()
    own_alpha, experts = steering_of(found, expert, alpha)
    request = Request(text, sampling, own_alpha, experts, explain=trace_file is not None)
    model = load_models(
        found,
        found.choose(experts, own_alpha),
        device=device,
        dtype=dtype,
        cuda_graphs=cuda_graphs,
        max_calls=max_calls,
        max_cost=max_cost,
    )
    if choice:
        _show_choice(model, text, choice, own_alpha, experts, as_json=as_json)
        return
    is_streamed = sys.stdout.isatty() and not as_json if stream is None else stream

    def show(_: int, event: Event) -> None:
        typer.echo((event.step.text if event.step else "") + event.tail, nl=False)
        sys.stdout.flush()

    try:
        trace = model.generate_batch(
            [request], on_event=show if is_streamed else None, speculative=speculative
        )[0]
    except KeyboardInterrupt:
        if is_streamed:
            typer.echo()
        raise
    except ProxytuneError as error:
        for kept in error.traces:  # what was generated until then
            if as_json:
                typer.echo(json_line(kept.summary(logprobs=logprobs is not None)))
            else:
                typer.echo("" if is_streamed else kept.text)
        raise
    if trace_file is not None:
        try:
            trace_file.write_text(trace.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputFileError(
                f"{trace_file} cannot be written: {error.strerror}.\n"
                "hint: give a file in a directory that is there, where you may write"
            ) from error
    if as_json:
        summary = trace.summary(logprobs=logprobs is not None)
        if speculative:
            summary |= {"num_drafted": trace.num_drafted, "num_accepted": trace.num_accepted}
        typer.echo(json_line(summary))
        return
    typer.echo("" if is_streamed else trace.text)
    typer.echo(
        f"{rate_text(trace.num_new_tokens, trace.latency_s)} · {trace.finish_reason} · "
        + strengths_text(trace.alphas)
        + (f" · seed {trace.seed}" if trace.seed is not None else "")
        + (f" · {trace.num_accepted} of {trace.num_drafted} drafted" if speculative else "")
        + _calls(trace),
        err=True,
    )


def _calls(trace: Trace) -> str:
    """Return what a text has cost at a base behind an API, and how much of it is certified."""
    usage = trace.usage
    if usage is None:
        return ""
    share = (trace.num_certified or 0) / max(1, trace.num_new_tokens)
    unmatched = usage.unmatched_prob / max(1, usage.num_positions)
    return (
        f" · {usage.num_calls} calls"
        + (f" ({usage.num_retries} retries)" if usage.num_retries else "")
        + (f" · cost {usage.cost:.4g}" if usage.cost else "")
        + f" · {100 * share:.0f} % certified"
        + (f" · {usage.num_recut} calls cut anew" if usage.num_recut else "")
        + (f" · {100 * unmatched:.1f} % unmatched" if unmatched >= 0.001 else "")
    )


def _show_choice(
    model: ProxyTuned,
    prompt: str,
    options: Sequence[str],
    alpha: float | None,
    experts: Experts,
    *,
    as_json: bool,
) -> None:
    """Print which of a few answers the steered base prefers."""
    found = model.choose(prompt, options, alpha=alpha, experts=experts)
    if as_json:
        probs = dict(zip(options, found.probs, strict=True))
        content = {"choice": found.option, "index": found.index, "probs": probs}
        typer.echo(json_line(content | {"is_certified": found.is_certified}))
        return
    typer.echo(found.option)
    shares = ", ".join(
        f"{option.strip()} {prob:.3f}" for option, prob in zip(options, found.probs, strict=True)
    )
    proof = {None: "", True: " · certified", False: " · not certified"}[found.is_certified]
    typer.echo(f"{shares} · {strengths_text(found.alphas)}{proof}", err=True)


def _refuse_contradictions(given: Mapping[str, bool]) -> None:
    """Refuse options that exclude each other or do nothing without another."""
    if given["PROMPT"] and given["--input-file"]:
        raise InvalidRequest(
            "PROMPT and --input-file are both given.\nhint: put the prompt into the file, or leave one out"
        )
    if not given["PROMPT"] and not given["--input-file"]:
        raise InvalidRequest(
            "there is no prompt.\nhint: give it as text, - for stdin, or --input-file prompts.jsonl"
        )
    if given["--input-file"] and not given["--output-file"]:
        raise InvalidRequest(
            "--input-file is given and --output-file is not, so a run could not be continued.\n"
            "hint: --output-file answers.jsonl"
        )
    if given["--input-file"] and given["--trace-file"]:
        raise InvalidRequest(
            "--trace-file holds one prompt's tokens, and --input-file gives many prompts.\n"
            "hint: proxytune analyze RECIPE --prompts FILE --trace-file FILE traces them all"
        )
    if given["--input-file"] and given["--stream"]:
        raise InvalidRequest(
            "--stream prints text as it is made, and --input-file writes its answers to a file.\n"
            "hint: leave --stream out"
        )
    if given["--json"] and given["--stream"]:
        raise InvalidRequest(
            "--json prints one object at the end, and --stream prints text as it is made.\n"
            "hint: leave one of them out"
        )
    for name in (
        "--input-file",
        "--stream",
        "--logprobs",
        "--require-certified",
        "--speculative",
        "--trace-file",
    ):
        if given["--choice"] and given[name]:
            raise InvalidRequest(
                f"--choice picks one of a few answers to one prompt, and {name} is given beside it.\n"
                f"hint: leave {name} out"
            )
    if not given["--input-file"]:
        for name in ("--output-file", "--batch-size", "--skip-bad-lines"):
            if given[name]:
                raise InvalidRequest(
                    f"{name} belongs to --input-file, which is not given.\nhint: leave {name} out"
                )
        if given["--logprobs"] and not given["--json"]:
            raise InvalidRequest("--logprobs has nowhere to go in plain text.\nhint: add --json")


def _generate_file(
    recipe: Recipe,
    input_file: Path,
    output_file: Path,
    *,
    sampling: SamplingParams,
    alpha: float | None,
    experts: Experts,
    batch_size: int,
    skip_bad_lines: bool,
    device: str | None,
    dtype: str | None,
    cuda_graphs: bool,
    speculative: bool,
    as_json: bool,
    max_calls: int | None,
    max_cost: float | None,
) -> None:
    from proxytune import batch_file

    options = batch_file.BatchOptions(
        sampling=sampling,
        alpha=alpha,
        experts=experts,
        dtype=dtype,
        batch_size=batch_size,
        skip_bad_lines=skip_bad_lines,
        speculative=speculative,
    )
    shown = bars(
        "{task.completed:,.0f} of {task.total:,.0f}",
        "{task.fields[rate]}",
        doing="generating",
        speed_estimate_period=600,  # A block of long texts may take minutes, and ends all at once.
    )
    started = 0.0
    seen: batch_file.Progress | None = None

    def load(names: tuple[str, ...]) -> ProxyTuned:
        return load_models(
            recipe,
            names,
            device=device,
            dtype=dtype,
            cuda_graphs=cuda_graphs,
            max_calls=max_calls,
            max_cost=max_cost,
        )

    def advance(progress: batch_file.Progress) -> None:
        nonlocal started, seen
        if seen is None:
            started = time.perf_counter()
            shown.add_task(
                "generating", total=progress.num_lines, completed=progress.num_done, rate=""
            )
        seen = progress
        rate = progress.num_new_tokens / max(time.perf_counter() - started, 1e-9)
        shown.update(shown.task_ids[0], completed=progress.num_done, rate=f"{rate:,.1f} tokens/s")

    try:
        with shown:
            report = batch_file.run_batch(
                input_file,
                output_file,
                recipe=recipe,
                load=load,
                options=options,
                on_progress=advance,
            )
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; what {output_file} holds stays, and the same command continues it",
            err=True,
        )
        raise
    if report.was_complete:
        typer.echo(f"already complete: {output_file} has {report.num_lines:,} lines", err=True)
    else:
        resumed = (
            f" ({report.num_resumed:,} of them by an earlier run)" if report.num_resumed else ""
        )
        typer.echo(
            f"{output_file}: {report.num_lines:,} lines{resumed}; "
            f"{rate_text(report.num_new_tokens, report.latency_s)}",
            err=True,
        )
    if report.bad_lines:
        typer.echo(
            f"left out {len(report.bad_lines):,} bad line(s): {batch_file.number_list(report.bad_lines)}",
            err=True,
        )
        for reason in report.reasons:
            typer.echo(f"  {reason}", err=True)
    if as_json:
        typer.echo(
            json_line(
                {
                    "output_file": str(output_file),
                    "num_lines": report.num_lines,
                    "num_resumed": report.num_resumed,
                    "num_new_tokens": report.num_new_tokens,
                    "bad_lines": list(report.bad_lines),
                    "latency_s": round(report.latency_s, 4),
                }
            )
        )
