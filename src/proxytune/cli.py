"""The `proxytune` command: one command per job.

Answers go to stdout, everything else to stderr. A user's mistake ends with its message and exit code 2, a
failure of the work itself with 1, Ctrl-C with 130; a bug keeps its traceback. What a command does is
elsewhere; models and the libraries that run them are imported only by the commands that need them.
"""

from __future__ import annotations

import inspect
import io
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperGroup

from proxytune.errors import (
    BackendError,
    InputFileError,
    InvalidRequest,
    MissingExtra,
    ProxytuneError,
    UserError,
)
from proxytune.request import Request, SamplingParams, check_alpha

if TYPE_CHECKING:
    from rich.console import Console

    from proxytune.bench import Measured
    from proxytune.decode import Event
    from proxytune.export_gguf import ExportedFile
    from proxytune.model import Conversation, ProxyTuned
    from proxytune.recipe import ModelSpec, Recipe
    from proxytune.score import ScoreReport
    from proxytune.trace import Step, Trace

Experts = str | tuple[str, ...] | Mapping[str, float] | None

GREEDY = SamplingParams()
CHAT_TOKENS = 256
SCORE_WINDOW = 512


class _Commands(TyperGroup):
    """Turns this package's errors into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except BackendError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


# Plain help, without boxes: its first line is there to be copied.
app = typer.Typer(
    cls=_Commands,
    help="\b\n  proxytune demo\n\nSteer a large language model with a small tuned one, token by token.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


Function = TypeVar("Function", bound=Callable[..., None])


def _command(example: str, *, name: str | None = None) -> Callable[[Function], Function]:
    """Register a command whose help is a line to paste and then the function's docstring."""

    def register(function: Function) -> Function:
        text = inspect.cleandoc(function.__doc__ or "")
        help_text = f"\b\n  {example}\n\n{text}"
        app.command(name, help=help_text, short_help=text.split("\n")[0])(function)
        return function

    return register


def main() -> NoReturn:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A model writes any character, whatever the terminal's locale has.
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"proxytune {version('proxytune')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and end"
        ),
    ] = False,
) -> None:
    pass


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe's directory, package:NAME/PATH, or its id on the Hugging Face Hub",
        show_default=False,
    ),
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        metavar="FLOAT",
        help="Strength of steering: 0 is the base alone, 1 the published method  [default: the recipe's]",
        show_default=False,
    ),
]
ExpertOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=ALPHA]",
        help="Steer with this expert, at a strength of its own where one is given; repeat to add up several  "
        "[default: the recipe's]",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Run every model there: cpu, cuda, cuda:1, or auto to spread each  [default: the recipe's]",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Run every model in it: float32, bfloat16, float16, or auto for the stored one  "
        "[default: the recipe's]",
        show_default=False,
    ),
]
LlamaCppOption = Annotated[
    bool,
    typer.Option(
        "--llama-cpp",
        help="Run every .gguf file with llama.cpp as it is, whatever the recipe says, where transformers "
        "would unpack it",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Processor threads of llama.cpp  [default: the recipe's]",
        show_default=False,
    ),
]
GpuLayersOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Layers that llama.cpp puts on a GPU, -1 for all  [default: the recipe's]",
        show_default=False,
    ),
]
ContextSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Most tokens of prompt and text in llama.cpp  [default: the recipe's]",
        show_default=False,
    ),
]
MaxCallsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Stop before calls to a base behind an API exceed this  [default: no limit]",
        show_default=False,
    ),
]
MaxCostOption = Annotated[
    float | None,
    typer.Option(
        metavar="FLOAT",
        help="Stop once calls to a base behind an API have cost this, by the recipe's prices  "
        "[default: no limit]",
        show_default=False,
    ),
]
MinNewTokensOption = Annotated[
    int, typer.Option(metavar="N", help="Let nothing end the text before it has so many tokens")
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT",
        help="0 takes the likeliest token; above 0 draws, more evenly the higher it is",
    ),
]
TopKOption = Annotated[
    int, typer.Option(metavar="K", help="Draw from the K likeliest tokens; 0 keeps all")
]
TopPOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT",
        help="Draw from the fewest tokens that together have this probability; 1 keeps all",
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT",
        help="Draw from tokens at least this fraction as likely as the likeliest; 0 keeps all",
    ),
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT", help="Make tokens of the prompt and the text less likely above 1; 1 is off"
    ),
]
PresencePenaltyOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT", help="Take this from the logits of tokens that the new text has; 0 is off"
    ),
]
FrequencyPenaltyOption = Annotated[
    float,
    typer.Option(
        metavar="FLOAT",
        help="Take this from the logits once per occurrence in the new text; 0 is off",
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help="End before this string; may be repeated", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on one line")]
SpeculativeOption = Annotated[
    bool,
    typer.Option(
        "--speculative/--no-speculative",
        help="Guess tokens ahead where that is faster; the text stays the same",
    ),
]


# Writing and checking recipes ----------------------------------------------------------------------


@_command(
    "proxytune new my-recipe --base Qwen/Qwen2.5-7B --expert my-tuned-1.5b "
    "--anti-expert Qwen/Qwen2.5-1.5B"
)
def new(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write the recipe", show_default=False)
    ],
    anti_expert: Annotated[
        str,
        typer.Option(metavar="MODEL", help="The small model before tuning", show_default=False),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The large model, or the address of an API; needed unless --add",
            show_default=False,
        ),
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the API calls the base  [default: the only model it lists]",
            show_default=False,
        ),
    ] = None,
    key_env: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE",
            help="The environment variable that holds the API's key",
            show_default=False,
        ),
    ] = None,
    llama_cpp: Annotated[
        bool,
        typer.Option("--llama-cpp", help="Run every .gguf file with llama.cpp as it is"),
    ] = False,
    expert: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The small model after tuning; left out where --adapter sits on the anti-expert",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="A LoRA adapter that makes the expert", show_default=False
        ),
    ] = None,
    anti_expert_adapter: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A LoRA adapter on the anti-expert, tuned to the opposite",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            metavar="FLOAT",
            help="Strength of steering: 0 is the base alone, 1 the published method",
        ),
    ] = 1.0,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What requests call the expert  [default: the last part of its path]",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="How the base sees prompts: plain, chat, or a Jinja template"
        ),
    ] = "plain",
    expert_prompt: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="How the expert sees prompts: plain, chat, or a Jinja template"
        ),
    ] = "plain",
    anti_expert_prompt: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="How the anti-expert sees prompts: plain, chat, or a Jinja template",
        ),
    ] = "plain",
    add: Annotated[
        bool, typer.Option("--add", help="Add the expert to the recipe that is in DIR")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the recipe that is in DIR")
    ] = False,
) -> None:
    """Write a recipe.

    It is a directory that names the base and an expert with its anti-expert, and holds none of their
    weights.

    A model is a local directory, a .gguf file, package:NAME/PATH, or an id on the Hugging Face Hub; what is
    there under the given path counts as local. The base may also be the address of an OpenAI-compatible API,
    such as http://localhost:8000/v1. The word base, as expert or anti-expert, reuses the base itself.
    """
    from dataclasses import replace

    from proxytune.recipe import (
        ApiSettings,
        ExpertSpec,
        ModelSpec,
        Recipe,
        is_url,
        local_reference,
    )

    if expert is None and adapter is None:
        raise InvalidRequest(
            "neither --expert nor --adapter is given, so there is nothing that steers.\n"
            "hint: --expert takes a whole model, --adapter a LoRA adapter on the anti-expert"
        )
    if add and force:
        raise InvalidRequest(
            "--add keeps the recipe that is there and --force replaces it.\nhint: give one of them"
        )
    if add and (base is not None or prompt != "plain"):
        raise InvalidRequest(
            "--add takes base and its prompt format from the recipe that is there.\n"
            "hint: leave --base and --prompt out"
        )
    if base is None and not add:
        raise InvalidRequest(
            "--base is missing.\nhint: name the large model, or --add an expert to a recipe"
        )
    directory = directory.expanduser().absolute()
    spec = ExpertSpec(
        name=name if name is not None else _expert_name(adapter or expert or ""),
        expert=_small_model(expert, adapter, expert_prompt, directory, llama_cpp),
        anti_expert=_small_model(
            anti_expert, anti_expert_adapter, anti_expert_prompt, directory, llama_cpp
        ),
        alpha=check_alpha(alpha),
    )
    if add:
        there = Recipe.read(directory)
        recipe = replace(there, experts=(*there.experts, spec))
    else:
        api = None
        if is_url(base or ""):
            api = ApiSettings(model=base_name, key_env=key_env)
        elif base_name is not None or key_env is not None:
            raise InvalidRequest(
                f"--base-name and --key-env are for an API, and the base is {base}.\n"
                "hint: leave them out, or give the address of an API as --base"
            )
        recipe = Recipe(
            base=ModelSpec(model=local_reference(base or "", directory), prompt=prompt, api=api),
            experts=(spec,),
            directory=directory,
        )
    if llama_cpp:
        recipe = recipe.with_llama_cpp()
    recipe.write(directory, overwrite=add or force)
    typer.echo(f"wrote {directory / 'config.json'}", err=True)
    typer.echo(f"next: proxytune doctor {directory}", err=True)


def _small_model(
    reference: str | None, adapter: str | None, prompt: str, directory: Path, llama_cpp: bool
) -> ModelSpec:
    from proxytune.recipe import LlamaCppSettings, ModelSpec, is_gguf, local_reference

    if reference == "base":
        if adapter is not None:
            raise InvalidRequest(
                "an adapter cannot sit on the base, whose logits are reused as they are.\n"
                "hint: name the model that the adapter belongs to"
            )
        return ModelSpec(same_as="base", prompt=prompt)
    return ModelSpec(
        model=None if reference is None else local_reference(reference, directory),
        adapter=None if adapter is None else local_reference(adapter, directory),
        prompt=prompt,
        llama_cpp=LlamaCppSettings() if llama_cpp and is_gguf(reference or "") else None,
    )


def _expert_name(reference: str) -> str:
    """Return the last part of a reference, with what a name cannot hold left out."""
    last = reference.rstrip("/\\").replace("\\", "/").rpartition("/")[2].removesuffix(".gguf")
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last)
    return kept.lstrip("._-") or "expert"


@_command("proxytune doctor my-recipe")
def doctor(recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Check a recipe without loading weights.

    Shown are vocabularies, parameters, dtypes, prompt formats, and the memory needed and there. The exit
    code is 2 where something keeps the recipe from running.
    """
    from proxytune.recipe import Recipe

    found = Recipe.read(recipe)
    with _stderr().status("looking at the models"):
        from proxytune.doctor import examine

        diagnosis = examine(found, ask_server=True)
    if as_json:
        typer.echo(_json_line(diagnosis.to_dict()))
    else:
        _stdout().print(diagnosis.render())
    if not diagnosis.is_healthy:
        typer.echo("error: the recipe cannot run as it is", err=True)
        raise typer.Exit(2)


@_command("proxytune export-gguf my-recipe my-recipe-gguf --dtype Q8_0", name="export-gguf")
def export_gguf(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A recipe; or a small model: its directory, package:NAME/PATH, or its id on the Hugging "
            "Face Hub",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            help="Where to write: a directory for a recipe, else a .gguf file",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Store weights in it: F32, F16, BF16, Q8_0, Q4_0 or Q4_1; an adapter takes F32 or F16",
        ),
    ] = "F16",
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Write this LoRA adapter on the model instead of the model",
            show_default=False,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Write the model with the adapter merged into its weights"),
    ] = False,
    pre: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="llama.cpp's name for how the tokenizer cuts text, taken as given  "
            "[default: found by comparing rules]",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is at OUTPUT with another content")
    ] = False,
) -> None:
    """Write models and adapters as GGUF files, which llama.cpp runs.

    Of a recipe, every small model and adapter is written, and a recipe that names them; its base stays the
    file it is. Models are Llama-shaped, with a byte-level tokenizer; others are refused by name.
    """
    from proxytune import export_gguf as export
    from proxytune.checkpoint import find_adapter, find_checkpoint, holds_recipe
    from proxytune.recipe import Recipe

    root, dtype, output = Path.cwd(), dtype.upper(), output.expanduser()
    if merge and adapter is None:
        raise InvalidRequest(
            "--merge is given without --adapter, so there is nothing to merge.\n"
            "hint: name the adapter with --adapter"
        )
    if adapter is not None and not merge and pre is not None:
        raise InvalidRequest(
            "--pre says how text is cut, and the file of an adapter holds no tokenizer.\n"
            "hint: leave --pre out"
        )
    if holds_recipe(source, root=root):
        if adapter is not None:
            raise InvalidRequest(
                f"--adapter is given, and {source} is a recipe, whose adapters are all written.\n"
                "hint: leave --adapter out, or name the small model instead of the recipe"
            )
        with _stderr().status("writing GGUF files"):
            written = export.export_recipe(
                Recipe.read(source), output, dtype=dtype, pre=pre, overwrite=force
            )
        for file in written.files:
            _say_exported(file)
        typer.echo(f"wrote {written.directory / 'config.json'}", err=True)
        typer.echo(written.directory)
        return
    model = find_checkpoint(source, root=root)
    with _stderr().status("writing a GGUF file"):
        if adapter is None:
            file = export.export_model(model, output, dtype=dtype, pre=pre, overwrite=force)
        else:
            files = find_adapter(adapter, root=root)
            if merge:
                file = export.export_model(
                    model, output, dtype=dtype, adapter=files, pre=pre, overwrite=force
                )
            else:
                file = export.export_adapter(files, model, output, dtype=dtype, overwrite=force)
    _say_exported(file)
    typer.echo(file.path)


def _say_exported(file: ExportedFile) -> None:
    line = f"wrote {file.path} ({file.num_bytes / 1e6:.1f} MB, {file.num_tensors} tensors)"
    if file.num_unquantized:
        line += (
            f"; {file.num_unquantized} tensors in F16, because their rows do not divide into blocks"
        )
    typer.echo(line, err=True)


# Generating ----------------------------------------------------------------------------------------


@_command('proxytune generate my-recipe "Once upon a time" --alpha 0.5')
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
            "--batch-size": batch_size is not None,
            "--skip-bad-lines": skip_bad_lines,
            "--stream": stream is True,
            "--json": as_json,
            "--logprobs": logprobs is not None,
        }
    )

    def read() -> Recipe:
        return _recipe(
            recipe,
            llama_cpp,
            threads=threads,
            gpu_layers=gpu_layers,
            context_size=context_size,
        )

    if input_file is not None and output_file is not None:
        found = read()
        own_alpha, experts = _steering(found, expert, alpha)
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
            speculative=speculative,
            as_json=as_json,
            max_calls=max_calls,
            max_cost=max_cost,
        )
        return
    assert prompt is not None
    text = _stdin_text() if prompt == "-" else _argument_text(prompt)
    Request(text, sampling)  # An empty prompt needs no recipe to be refused.
    found = read()
    own_alpha, experts = _steering(found, expert, alpha)
    request = Request(text, sampling, own_alpha, experts)
    model = _load(
        found,
        found.choose(experts, own_alpha),
        device=device,
        dtype=dtype,
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
                typer.echo(_json_line(kept.summary(logprobs=logprobs is not None)))
            else:
                typer.echo("" if is_streamed else kept.text)
        raise
    if as_json:
        summary = trace.summary(logprobs=logprobs is not None)
        if speculative:
            summary |= {"num_drafted": trace.num_drafted, "num_accepted": trace.num_accepted}
        typer.echo(_json_line(summary))
        return
    typer.echo("" if is_streamed else trace.text)
    typer.echo(
        f"{_rate(trace.num_new_tokens, trace.latency_s)} · {trace.finish_reason} · {_strengths(trace.alphas)}"
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
        typer.echo(_json_line(content | {"is_certified": found.is_certified}))
        return
    typer.echo(found.option)
    shares = ", ".join(
        f"{option.strip()} {prob:.3f}" for option, prob in zip(options, found.probs, strict=True)
    )
    proof = {None: "", True: " · certified", False: " · not certified"}[found.is_certified]
    typer.echo(f"{shares} · {_strengths(found.alphas)}{proof}", err=True)


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
    for name in ("--input-file", "--stream", "--logprobs", "--require-certified", "--speculative"):
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
    speculative: bool,
    as_json: bool,
    max_calls: int | None,
    max_cost: float | None,
) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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
    console = _stderr()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=600,  # A block of long texts may take minutes, and ends all at once.
    )
    started = 0.0
    seen: batch_file.Progress | None = None

    def load(names: tuple[str, ...]) -> ProxyTuned:
        return _load(
            recipe, names, device=device, dtype=dtype, max_calls=max_calls, max_cost=max_cost
        )

    def advance(progress: batch_file.Progress) -> None:
        nonlocal started, seen
        if seen is None:
            started = time.perf_counter()
            bar.add_task(
                "generating", total=progress.num_lines, completed=progress.num_done, rate=""
            )
        seen = progress
        rate = progress.num_new_tokens / max(time.perf_counter() - started, 1e-9)
        bar.update(bar.task_ids[0], completed=progress.num_done, rate=f"{rate:,.1f} tokens/s,")

    try:
        with bar:
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
            f"{_rate(report.num_new_tokens, report.latency_s)}",
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
            _json_line(
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


# Talking -------------------------------------------------------------------------------------------


@_command("proxytune chat my-recipe --alpha 0.5")
def chat(
    recipe: RecipeArgument,
    alpha: AlphaOption = None,
    expert: ExpertOption = None,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What the model is told before the first turn", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens of an answer")
    ] = CHAT_TOKENS,
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
            help="Makes drawn answers repeatable  [default: another each time]",
            show_default=False,
        ),
    ] = None,
    stop: StopOption = None,
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
    """Talk with a steered model.

    Strength and expert can be changed while talking: /help says how.
    """
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    found = _recipe(
        recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
    )
    own_alpha, experts = _steering(found, expert, alpha)
    model = _load(found, None, device=device, dtype=dtype, max_calls=max_calls, max_cost=max_cost)
    conversation = model.chat(
        sampling, system=system, alpha=own_alpha, experts=experts, speculative=speculative
    )
    _Chat(conversation, found).run()


class _Chat:
    """A conversation on the terminal, or on any pair of streams."""

    HELP = (
        "/alpha A              strength of steering: 0 is the base alone; default takes the recipe's\n"
        "/expert NAME[=A] ...  steer with these; none takes the base alone, default the recipe's; "
        "alone it lists them\n"
        "/reset                forget the conversation\n"
        "/help                 show this\n"
        "/quit                 end, as Ctrl-D does; Ctrl-C stops an answer"
    )

    def __init__(self, conversation: Conversation, recipe: Recipe) -> None:
        self._conversation = conversation
        self._recipe = recipe
        self._first_messages = list(conversation.messages)

    def run(self) -> None:
        """Talk until the input ends or the user does."""
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # gives input() a history and arrow keys
        self._say(f"{self._recipe.base.model}, {self._steering()}. /help lists the commands.")
        for line in _typed_lines(is_terminal):
            line = line.strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                try:
                    self._command(*line.split())
                except UserError as error:
                    self._say(str(error))
            elif line:
                self._answer(line)

    def _answer(self, text: str) -> None:
        steps: Iterator[Step] | None = None
        try:
            steps = self._conversation.say(text)
            for step in steps:
                typer.echo(step.text, nl=False)
                sys.stdout.flush()
            typer.echo()
        except KeyboardInterrupt:
            typer.echo()
            self._say("stopped")
        except UserError as error:
            self._say(f"{error}\nhint: /reset forgets the conversation so far")
        finally:
            if steps is not None:
                steps.close()  # type: ignore[attr-defined]  # a generator: this ends the turn

    def _command(self, name: str, *values: str) -> None:
        if name == "/alpha":
            self._set_alpha(values)
        elif name == "/expert":
            self._set_experts(values)
        elif name in ("/reset", "/help") and values:
            self._say(f"{name} takes nothing after it")
        elif name == "/reset":
            self._conversation.messages = list(self._first_messages)
            self._say("forgotten")
        elif name == "/help":
            self._say(self.HELP)
        else:
            self._say(f"there is no {name}; there are\n{self.HELP}")

    def _set_alpha(self, values: Sequence[str]) -> None:
        if len(values) > 1:
            raise InvalidRequest(f"/alpha takes one number, and {len(values)} are given")
        if values:
            alpha = None if values[0] == "default" else _number(values[0], "/alpha")
            experts = self._conversation.experts
            if isinstance(experts, Mapping):
                experts = tuple(experts)
            self._recipe.choose(experts, alpha)
            self._conversation.alpha, self._conversation.experts = alpha, experts
        self._say(self._steering())

    def _set_experts(self, values: Sequence[str]) -> None:
        known = [e.name for e in self._recipe.experts]
        if not values:
            self._say(f"experts: {', '.join(known)}; now {self._steering()}")
            return
        if values == ("none",) and "none" not in known:
            self._conversation.alpha, self._conversation.experts = 0.0, None
        elif values == ("default",) and "default" not in known:
            self._conversation.alpha, self._conversation.experts = None, None
        else:
            # A strength of 0 was "none", and would silence the expert that is asked for now.
            alpha = self._conversation.alpha or None
            if all("=" in value for value in values):
                alpha = None
            alpha, experts = _steering(self._recipe, values, alpha)
            self._conversation.alpha, self._conversation.experts = alpha, experts
        self._say(self._steering())

    def _steering(self) -> str:
        chosen = self._recipe.choose(self._conversation.experts, self._conversation.alpha)
        return _strengths(chosen)

    def _say(self, text: str) -> None:
        typer.echo(text, err=True)


def _typed_lines(is_terminal: bool) -> Iterator[str]:
    """Yield what the user types; Ctrl-C drops a line that is being typed, Ctrl-D ends."""
    if not is_terminal:
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D or /quit ends)", err=True)
        except EOFError:
            typer.echo()
            return


# Tuning --------------------------------------------------------------------------------------------


@_command(
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
        typer.echo(_json_line(result.to_dict()))
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
    """Return a progress display: one bar on a terminal, now and then a line elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from proxytune.tune.run import Display

    console = _stderr()

    class Bar(Display):
        def __init__(self) -> None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=console,
                disable=not console.is_terminal,
            )
            self._progress.start()
            self._tasks: dict[str, Any] = {}
            self._shown_at: dict[str, float] = {}

        def say(self, text: str) -> None:
            console.print(text, markup=False, soft_wrap=True)

        def stage(self, name: str, done: float, total: float, **numbers: float | None) -> None:
            shown = ", ".join(
                f"{key.replace('_', ' ')} {value:.4f}"
                for key, value in numbers.items()
                if value is not None
            )
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total, numbers="")
            self._progress.update(self._tasks[name], completed=done, total=total, numbers=shown)
            now = time.monotonic()
            if not console.is_terminal and (
                done >= total or now - self._shown_at.get(name, now - 61) > 60
            ):
                self._shown_at[name] = now
                self.say(f"{name}: {done:,.0f} of {total:,.0f}" + (f", {shown}" if shown else ""))

        def close(self) -> None:
            self._progress.stop()

    return Bar()


# Measuring -----------------------------------------------------------------------------------------


@_command("proxytune score my-recipe --text-file heldout.txt --alphas 0,0.5,1")
def score(
    recipe: RecipeArgument,
    text_file: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="The text: UTF-8, also as .gz; - reads stdin",
            show_default=False,
        ),
    ],
    alphas: Annotated[
        str, typer.Option(metavar="A,B,...", help="Strengths of the steered rows")
    ] = "0,0.5,1",
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Score this expert; repeat to add up several  [default: the recipe's]",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Tokens per window, predicted from those before in it  [default: {SCORE_WINDOW}, or the "
            "smallest context]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the bootstrap")] = 0,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    llama_cpp: LlamaCppOption = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = None,
    context_size: ContextSizeOption = None,
    max_calls: MaxCallsOption = None,
    max_cost: MaxCostOption = None,
) -> None:
    """Measure how well base, expert and steered base predict a text.

    Each model runs once over it, for all strengths. Every model sees the plain text.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    strengths = list(dict.fromkeys(_number(part, "--alphas") for part in alphas.split(",")))
    text = _stdin_text() if text_file == "-" else _file_text(Path(text_file))
    found = _recipe(
        recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
    )
    experts = tuple(expert) if expert else None
    model = _load(
        found,
        found.choose(experts, None),
        device=device,
        dtype=dtype,
        max_calls=max_calls,
        max_cost=max_cost,
    )
    contexts = [m.backend.capabilities.max_context for m in model.ensemble.members]
    if window is None:
        window = min([SCORE_WINDOW, *(c for c in contexts if c is not None)])
    console = _stderr()
    with Progress(
        TextColumn("scoring"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%, {task.completed:,.0f} of {task.total:,.0f} tokens,"),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("scoring", total=1, start=False)

        def advance(done: int, total: int) -> None:
            bar.start_task(task)
            bar.update(task, completed=done, total=total)

        report = model.score(
            text, strengths, experts=experts, window=window, seed=seed, on_progress=advance
        )
    if as_json:
        typer.echo(_json_line(report.to_dict()))
    else:
        _show_scores(report)


def _show_scores(report: ScoreReport) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for heading in ("alpha", "nats/token", "perplexity", "95 % interval", "against base"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        interval = (
            "" if row.interval is None else f"{row.interval.low:.2f} to {row.interval.high:.2f}"
        )
        change = "" if row.name == "base" else f"{row.change:+.1%}"
        if change and row.change_interval is not None:
            change += f" ({row.change_interval.low:+.1%} to {row.change_interval.high:+.1%})"
        alpha = "" if row.alpha is None else f"{row.alpha:g}"
        table.add_row(row.name, alpha, f"{row.nats:.4f}", f"{row.perplexity:.2f}", interval, change)
    _stdout().print(table)
    typer.echo(
        f"{report.num_tokens:,} tokens in {report.num_windows:,} windows of up to {report.window}; "
        "perplexity against base, intervals by block bootstrap",
        err=True,
    )


# Speed ---------------------------------------------------------------------------------------------


@_command("proxytune bench my-recipe --batch-sizes 1,8")
def bench(
    recipe: RecipeArgument,
    alpha: AlphaOption = None,
    expert: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which expert steers  [default: the recipe's]", show_default=False
        ),
    ] = None,
    shapes: Annotated[
        str, typer.Option(metavar="IN:OUT,...", help="Prompt tokens and new tokens of a row")
    ] = "64:64",
    batch_sizes: Annotated[str, typer.Option(metavar="N,...", help="Rows at once")] = "1",
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Counted rounds; one before them warms up")
    ] = 3,
    temperature: TemperatureOption = GREEDY.temperature,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Where prompts are cut from; how often drafts are right depends on it",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare/--no-compare",
            help="Also load the models as transformers does, a second time, and measure the published "
            "procedure and the library's own generation with the base",
        ),
    ] = True,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    llama_cpp: LlamaCppOption = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = None,
    context_size: ContextSizeOption = None,
) -> None:
    """Measure the speed of steering against the base alone.

    Everything alternates in every round; what is shown are medians of ratios within rounds.
    """
    from proxytune import bench as speed

    if rounds < 1:
        raise InvalidRequest(f"--rounds is {rounds}, and must be at least 1")
    sizes = []
    for size in _whole_numbers(batch_sizes, "--batch-sizes", ","):
        for shape in shapes.split(","):
            num_prompt, num_new = _whole_numbers(shape, "--shapes", ":", 2)
            sizes.append(speed.Shape(num_prompt, num_new, size))
    SamplingParams(temperature=temperature)
    found = _recipe(
        recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
    )
    found = found.with_settings(device=device, dtype=dtype)
    chosen = found.choose(expert, alpha)
    if len(chosen) != 1:
        raise InvalidRequest(
            f"the recipe steers with {len(chosen)} experts at once, and one is measured at a time.\n"
            "hint: name it with --expert"
        )
    name = next(iter(chosen))
    model = _load(found, chosen, device=None, dtype=None)
    plain = speed.load_plain_models(found, name) if compare else None
    measured = [
        speed.measure(
            model,
            shape,
            expert=name,
            alpha=alpha,
            text=prompt or speed.PROMPT,
            plain_models=plain,
            temperature=temperature,
            rounds=rounds,
            say=lambda text: typer.echo(text, err=True),
        )
        for shape in sizes
    ]
    if as_json:
        answer = {
            "recipe": recipe,
            "rounds": rounds,
            "machine": speed.machine(),
            "measured": [one.to_dict() for one in measured],
        }
        typer.echo(_json_line(answer))
    else:
        _show_speeds(measured, rounds)


def _show_speeds(measured: Sequence[Measured], rounds: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("speeds")
    for one in measured:
        table.add_column(str(one.shape), justify="right")
    for name in dict.fromkeys(name for one in measured for name in one.ratios):
        cells = [one.ratios.get(name) for one in measured]
        table.add_row(
            name,
            *("" if c is None else f"{c.median:.2f} ({c.low:.2f} to {c.high:.2f})" for c in cells),
        )
    rows: list[tuple[str, list[str]]] = [
        (
            "plain, tokens/s",
            [f"{_speed(one, 'plain'):.1f}" for one in measured],
        ),
        ("speculative, tokens/s", [f"{_speed(one, 'speculative'):.1f}" for one in measured]),
        (
            "drafts accepted",
            [
                "none made" if one.acceptance_rate is None else f"{one.acceptance_rate:.0%}"
                for one in measured
            ],
        ),
        ("tokens per block", [f"{one.tokens_per_step:.2f}" for one in measured]),
        ("first token, ms", [f"{1e3 * one.first_token_s.median:.0f}" for one in measured]),
        ("prompts alone, ms", [f"{1e3 * one.prefill_s.median:.0f}" for one in measured]),
        ("texts that parted", [str(one.num_parted) for one in measured]),
    ]
    for heading, cells_ in rows:
        table.add_row(heading, *cells_)
    _stdout().print(table)
    typer.echo(f"medians of {rounds} rounds, in brackets the lowest and the highest", err=True)


def _speed(one: Measured, name: str) -> float:
    return one.shape.batch_size * one.shape.num_new / one.seconds[name].median


def _whole_numbers(text: str, name: str, separator: str, count: int | None = None) -> list[int]:
    """Return the whole numbers above 0 in a text.

    Raises:
        InvalidRequest: One is not, or there are not `count` of them.
    """
    parts = text.split(separator)
    if all(part.strip().isdecimal() and int(part) > 0 for part in parts) and (
        count is None or len(parts) == count
    ):
        return [int(part) for part in parts]
    example = separator.join(["8"] * (count or 2))
    raise InvalidRequest(
        f"{name} holds {text!r}, and must hold whole numbers above 0, such as {example}"
    )


@_command("proxytune demo")
def demo(
    as_json: JsonOption = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the continuations")] = 1,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Length of each continuation, in tokens")
    ] = 48,
) -> None:
    """Steer a real model offline, and show base and steered side by side.

    What is shown is the perplexity of held-out text under base, expert and steered base, and what base and
    steered base write. All numbers are measured now.
    """
    SamplingParams(max_new_tokens=new_tokens, seed=seed)  # refused before models load
    from proxytune.demo import run

    answer = run(console=_stdout(), json_output=as_json, seed=seed, new_tokens=new_tokens)
    if as_json:
        typer.echo(_json_line(answer))


# What the commands share ---------------------------------------------------------------------------


def _steering(
    recipe: Recipe, names: Sequence[str] | None, alpha: float | None
) -> tuple[float | None, Experts]:
    """Return alpha and experts of a request from `--alpha` and the values of `--expert`.

    Raises:
        UnknownExpert: The recipe has no expert of that name.
        InvalidRequest: A strength is no finite number or said twice, or an expert is named twice.
    """
    if not names:
        recipe.choose(None, alpha)
        return alpha, None
    own: dict[str, float | None] = {}
    for item in names:
        name, has_own, value = item.partition("=")
        if name in own:
            raise InvalidRequest(f"expert {name!r} is named twice.\nhint: name it once")
        own[name] = _number(value, f"the strength of expert {name!r}") if has_own else None
    chosen = recipe.choose(tuple(own), alpha)
    if all(value is None for value in own.values()):
        return alpha, tuple(own)
    if alpha is not None and all(value is not None for value in own.values()):
        raise InvalidRequest(
            "--alpha is given and each expert has a strength of its own, so --alpha would do nothing.\n"
            "hint: leave --alpha out"
        )
    return None, {name: chosen[name] if value is None else value for name, value in own.items()}


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidRequest(
            f"{name} is {text.strip()!r}, and must be a number.\n"
            "hint: 0 is the base alone, 1 the published method"
        ) from None
    return check_alpha(value, name)


def _recipe(
    reference: str,
    llama_cpp: bool,
    *,
    threads: int | None,
    gpu_layers: int | None,
    context_size: int | None,
) -> Recipe:
    """Read a recipe, with what the command line says about llama.cpp."""
    from proxytune.recipe import Recipe

    recipe = Recipe.read(reference)
    settings = {"threads": threads, "gpu_layers": gpu_layers, "context_size": context_size}
    given = [name for name, value in settings.items() if value is not None]
    models = [recipe.base, *(m for e in recipe.experts for m in (e.expert, e.anti_expert))]
    if given and not llama_cpp and all(model.llama_cpp is None for model in models):
        raise InvalidRequest(
            f"--{given[0].replace('_', '-')} is for llama.cpp, and the recipe runs nothing with it.\n"
            "hint: add --llama-cpp to run its .gguf files that way"
        )
    if not llama_cpp and not given:
        return recipe
    return recipe.with_llama_cpp(only_where_set=not llama_cpp, **settings)


def _load(
    recipe: Recipe,
    experts: Collection[str] | None,
    *,
    device: str | None,
    dtype: str | None,
    max_calls: int | None = None,
    max_cost: float | None = None,
) -> ProxyTuned:
    """Load a recipe's models, only these experts', with a sign of life on stderr."""
    limits = {"max_calls": max_calls, "max_cost": max_cost}
    given = [name for name, limit in limits.items() if limit is not None]
    if given and recipe.base.api is None:
        raise InvalidRequest(
            f"--{given[0].replace('_', '-')} is for a base behind an API, and this one runs here.\n"
            "hint: leave it out"
        )
    with _stderr().status("loading models"):
        from proxytune.backends.api_client import Budget
        from proxytune.model import ProxyTuned

        return ProxyTuned.load(
            recipe,
            device=device,
            dtype=dtype,
            experts=None if experts is None else tuple(experts),
            budget=Budget(max_calls, max_cost) if given else None,
        )


def _stdout() -> Console:
    from rich.console import Console

    # A table in a file has no width to keep to.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _json_line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def _rate(num_tokens: int, seconds: float) -> str:
    rate = f" ({num_tokens / seconds:,.1f} tokens/s)" if seconds > 0 else ""
    return f"{num_tokens:,} tokens in {seconds:,.1f} s{rate}"


def _strengths(alphas: Mapping[str, float]) -> str:
    if not any(alphas.values()):
        return "the base alone (alpha 0)"
    return "steered by " + ", ".join(f"{name} at alpha {alpha:g}" for name, alpha in alphas.items())


def _argument_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the prompt is not UTF-8 text (character {error.start + 1}).\nhint: give it in UTF-8"
        ) from error
    return text


def _stdin_text() -> str:
    content = typer.get_binary_stream("stdin").read()
    return _decoded(content, "stdin").removesuffix("\n").removesuffix("\r")


def _file_text(path: Path) -> str:
    """Return the text of a file, unpacked if it is called .gz.

    Raises:
        InputFileError: It cannot be read, or is no UTF-8 text.
    """
    import gzip
    import zlib

    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputFileError(
            f"{path} cannot be read: {why}.\n"
            "hint: --text-file takes a text file, also packed with gzip as .gz"
        ) from error
    return _decoded(content, str(path))


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{name} is not UTF-8 text (byte {error.start + 1}).\nhint: convert it to UTF-8"
        ) from error
