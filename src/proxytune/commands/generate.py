"""`proxytune generate`: one prompt, or a file of them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command
from proxytune.commands.console import (
    EMPTY_ANSWER,
    argument_text,
    json_line,
    print_text,
    rate_text,
    say,
    stdin_text,
    strengths_text,
    write_text,
)
from proxytune.commands.engines import EngineOptions, VllmOptions
from proxytune.commands.flags import Pick, given_flags
from proxytune.commands.options import (
    AS_JSON,
    PolicyOptions,
    PromptArgument,
    RecipeArgument,
    SteeringOptions,
)
from proxytune.commands.progress import ProgressBars
from proxytune.data.lines import BatchOptions
from proxytune.errors import InvalidRequest, ProxytuneError
from proxytune.request import (
    BATCH_SIZES,
    DEFAULT_BATCH_SIZE,
    SPECULATIVE,
    Request,
    SamplingParams,
)
from proxytune.settings import option, options_of

if TYPE_CHECKING:
    from proxytune.data.batch import BatchProgress, BatchReport
    from proxytune.decode.batch import Event
    from proxytune.model import ProxyTuned
    from proxytune.recipe.recipe import Recipe
    from proxytune.trace import Trace

_LINES = options_of(BatchOptions)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Where prompts come from, and how answers are given."""

    stream: bool | None = option(
        None,
        "Print text as it is generated, or all of it at the end",
        flag="--stream/--no-stream",
        none_means="--stream on a terminal",
    )
    speculative: bool = option(False, SPECULATIVE)
    choice: tuple[str, ...] = option(
        (),
        "Answer with the most likely of these texts, told apart by their first tokens; repeat for each "
        "of two or more",
    )
    as_json: bool = option(False, AS_JSON)
    input_file: Path | None = option(None, "Prompts as JSON lines")
    output_file: Path | None = option(
        None, "Where to write the answers; FILE.progress.json beside it holds the settings"
    )
    trace_file: Path | None = option(
        None,
        "Write what each model gave each token to this file, for proxytune explain --trace and analyze",
    )
    batch_size: int | None = option(
        None, replace(_LINES["batch_size"].option, none_means=DEFAULT_BATCH_SIZE)
    )
    skip_bad_lines: bool = option(False, _LINES["skip_bad_lines"].option)


SAMPLING = Pick(
    none_means={"seed": "a new one each time; 0 with --input-file"},
    help={
        "seed": "Random seed: makes sampled text repeatable; with --input-file, each line gets its own seed, "
        "made from this one and the line's number",
        "logprobs": "List each token's logprob and the N most likely tokens; with --json or --input-file",
    },
)


@command('proxytune generate my-recipe "Once upon a time" --alpha 0.5')
def generate(
    recipe: RecipeArgument,
    prompt: PromptArgument = None,
    vllm_options: VllmOptions = None,
    *,
    options: GenerateOptions,
    steering: SteeringOptions,
    policy: PolicyOptions,
    sampling: Annotated[SamplingParams, SAMPLING],
    models: EngineOptions,
) -> None:
    """Generate text from a prompt, or from a file of prompts.

    The models continue the prompt as a text; `proxytune chat` answers messages.

    A file holds one JSON object per line, with prompt (text, messages or token ids) or messages, and
    optionally options for this line alone; the output file holds the same objects with output added. After an
    interruption, the same command continues the run, and the file becomes the same as without one; it also
    answers lines that were added to the input since. With --engine vllm, vLLM answers the file.
    """
    if models.engine == "vllm" and options.input_file is not None and prompt is not None:
        # A file needs no prompt, so what follows -- begins here.
        vllm_options, prompt = [prompt, *(vllm_options or ())], None
    models = models.taking(vllm_options)
    _refuse_contradictions(
        given_flags(PROMPT=prompt, options=options, sampling=sampling, models=models)
    )
    if options.input_file is not None and options.output_file is not None:
        found = policy.applied_to(models.read(recipe))
        asked = BatchOptions(
            sampling=sampling,
            steering=steering.of(found),
            dtype=models.dtype,
            exact=models.exact,
            batch_size=options.batch_size or BATCH_SIZES[models.engine],
            engine=models.engine,
            skip_bad_lines=options.skip_bad_lines,
            speculative=options.speculative,
        )
        report = _answer_file(found, options.input_file, options.output_file, asked, models)
        _show_file(report, options.output_file, as_json=options.as_json)
        return
    assert prompt is not None
    text = stdin_text() if prompt == "-" else argument_text(prompt)
    Request(text, sampling)  # An empty prompt needs no recipe to be refused.
    found = policy.applied_to(models.read(recipe))
    wanted = steering.of(found)
    is_traced = options.trace_file is not None
    request = Request(text, sampling, wanted.alpha, wanted.experts, explain=is_traced)
    model = models.load(found, found.named(wanted.experts))
    if options.choice:
        _show_choice(model, request, options)
        return
    trace = _generated(model, request, options)
    _show(trace, options, logprobs=sampling.logprobs is not None)
    if options.trace_file is not None:
        write_text(options.trace_file, trace.to_json() + "\n")


def _is_streamed(options: GenerateOptions) -> bool:
    if options.stream is None:
        return sys.stdout.isatty() and not options.as_json
    return options.stream


def _generated(model: ProxyTuned, request: Request, options: GenerateOptions) -> Trace:
    is_streamed = _is_streamed(options)

    def show(_: int, event: Event) -> None:
        print_text((event.step.text if event.step else "") + event.tail, end="")

    try:
        return model.generate_batch(
            [request], on_event=show if is_streamed else None, speculative=options.speculative
        )[0]
    except KeyboardInterrupt:
        if is_streamed:
            print_text()
        raise
    except ProxytuneError as error:
        for kept in error.traces:  # what was generated until then
            if options.as_json:
                has_logprobs = request.sampling.logprobs is not None
                print_text(json_line(kept.summary(logprobs=has_logprobs)))
            else:
                print_text("" if is_streamed else kept.text)
        raise


def _show(trace: Trace, options: GenerateOptions, *, logprobs: bool) -> None:
    if options.as_json:
        summary = trace.summary(logprobs=logprobs)
        if options.speculative:
            summary |= {"num_drafted": trace.num_drafted, "num_accepted": trace.num_accepted}
        print_text(json_line(summary))
        return
    print_text("" if _is_streamed(options) else trace.text)
    drafted = f" · {trace.num_accepted} of {trace.num_drafted} drafted"
    say(
        f"{rate_text(trace.num_new_tokens, trace.latency_s)} · {trace.finish_reason} · "
        + strengths_text(trace.alphas)
        + (f" · seed {trace.seed}" if trace.seed is not None else "")
        + (drafted if options.speculative else "")
        + _calls(trace)
    )
    if not trace.text.strip() and trace.finish_reason == "stop":
        say(EMPTY_ANSWER)


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


def _show_choice(model: ProxyTuned, request: Request, options: GenerateOptions) -> None:
    assert isinstance(request.prompt, str)
    answers = options.choice
    found = model.choose(request.prompt, answers, alpha=request.alpha, experts=request.experts)
    probs = dict(zip(answers, found.probs, strict=True))
    if options.as_json:
        content = {"choice": found.option, "index": found.index, "probs": probs}
        print_text(json_line(content | {"is_certified": found.is_certified}))
        return
    print_text(found.option)
    shares = ", ".join(f"{answer.strip()} {prob:.3f}" for answer, prob in probs.items())
    proof = {None: "", True: " · certified", False: " · not certified"}[found.is_certified]
    say(f"{shares} · {strengths_text(found.alphas)}{proof}")


def _refuse_contradictions(given: set[str]) -> None:
    for one, other, hint in (
        ("PROMPT", "--input-file", "put the prompt into the file, or leave one out"),
        ("--input-file", "--trace-file", "proxytune analyze RECIPE --prompts FILE --trace-file FILE traces "
         "many prompts"),
        ("--input-file", "--stream", "leave --stream out: the answers go to a file"),
        ("--json", "--stream", "leave one of them out: --json prints one object at the end"),
    ):  # fmt: skip
        if {one, other} <= given:
            raise InvalidRequest(f"{one} and {other} are both given.\nhint: {hint}")
    if not given & {"PROMPT", "--input-file"}:
        raise InvalidRequest(
            "there is no prompt.\nhint: give it as text, - for stdin, or --input-file prompts.jsonl"
        )
    if "--input-file" in given and "--output-file" not in given:
        raise InvalidRequest(
            "--input-file is given and --output-file is not, so a run could not be continued.\n"
            "hint: --output-file answers.jsonl"
        )
    single = (
        "--input-file", "--stream", "--logprobs", "--require-certified", "--speculative", "--trace-file",
    )  # fmt: skip
    for name in single:
        if {"--choice", name} <= given:
            raise InvalidRequest(
                f"--choice picks one of a few answers to one prompt, so {name} cannot be given as well.\n"
                f"hint: leave {name} out"
            )
    if "--input-file" in given:
        return
    if "--engine" in given:
        raise InvalidRequest(
            "--engine vllm answers files of prompts, and there is no --input-file.\n"
            "hint: --input-file prompts.jsonl --output-file answers.jsonl, or leave --engine vllm out"
        )
    for name in ("--output-file", "--batch-size", "--skip-bad-lines"):
        if name in given:
            raise InvalidRequest(
                f"{name} belongs to --input-file, which is not given.\nhint: leave {name} out"
            )
    if "--logprobs" in given and "--json" not in given:
        raise InvalidRequest("plain text has no place for --logprobs.\nhint: add --json")


def _answer_file(
    recipe: Recipe,
    input_file: Path,
    output_file: Path,
    options: BatchOptions,
    models: EngineOptions,
) -> BatchReport:
    from proxytune.data.batch import run_batch

    started: float | None = None

    def advance(progress: BatchProgress) -> None:
        nonlocal started
        started = started or time.perf_counter()
        rate = progress.num_new_tokens / max(time.perf_counter() - started, 1e-9)
        unit = f"lines, {rate:,.1f} tokens/s"
        bars.show("generating", progress.num_done, progress.num_lines, unit)

    try:
        with ProgressBars() as bars:
            return run_batch(
                input_file,
                output_file,
                recipe=recipe,
                load=lambda names: models.load(recipe, names),
                options=options,
                on_progress=advance,
            )
    except KeyboardInterrupt:
        say(f"interrupted; {output_file} keeps what is done, and the same command continues it")
        raise


def _show_file(report: BatchReport, output_file: Path, *, as_json: bool) -> None:
    from proxytune.data.resumable import number_list

    if report.was_complete:
        say(f"already complete: {output_file} has {report.num_lines:,} lines")
    else:
        resumed = f" ({report.num_resumed:,} of them by an earlier run)"
        say(
            f"{output_file}: {report.num_lines:,} lines{resumed if report.num_resumed else ''}; "
            f"{rate_text(report.num_new_tokens, report.latency_s)}"
        )
    if report.input_change:
        say(f"note: {report.input_change}")
    if report.bad_lines:
        say(f"left out {len(report.bad_lines):,} bad line(s): {number_list(report.bad_lines)}")
        for reason in report.reasons:
            say(f"  {reason}")
    if as_json:
        content = {
            "output_file": str(output_file),
            "num_lines": report.num_lines,
            "num_resumed": report.num_resumed,
            "num_new_tokens": report.num_new_tokens,
            "bad_lines": list(report.bad_lines),
            "latency_s": round(report.latency_s, 4),
            "input_change": report.input_change or None,
        }
        print_text(json_line(content))
