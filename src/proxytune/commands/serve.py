"""`proxytune serve`: an OpenAI-compatible server, here or in vLLM."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from proxytune.commands.app import (
    ContextSizeOption,
    CudaGraphsOption,
    DeviceOption,
    DtypeOption,
    GpuLayersOption,
    LlamaCppOption,
    MaxCallsOption,
    MaxCostOption,
    RecipeArgument,
    SpeculativeOption,
    ThreadsOption,
    command,
    load_models,
    read_recipe,
    stderr,
)
from proxytune.errors import InputFileError, InvalidRequest, MissingExtra
from proxytune.heap import settle

if TYPE_CHECKING:
    from proxytune.server.service import ServerSettings

KEY_VARIABLE = "PROXYTUNE_API_KEY"
VLLM_DRAFT = 4
"""Tokens that the expert drafts at a time in vLLM with --speculative."""
VLLM_OPTIONS = frozenset(
    {"recipe", "engine", "host", "port", "name", "api_key_file", "no_key", "cors_origin"}
    | {"max_rows", "speculative", "dtype", "options"}
)
"""What --engine vllm honours; the rest has names of vLLM's own."""
MIN_KEY_LENGTH = 16
"""Shorter keys can be guessed."""


class Engine(str, Enum):
    """What runs the models."""

    local = "local"
    vllm = "vllm"


@command("proxytune serve my-recipe", is_endless=True)
def serve(
    ctx: typer.Context,
    recipe: RecipeArgument,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OPTIONS",
            help="With --engine vllm, after --: further options of vLLM's server",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="Run the models here, or in vLLM with its own server and options")
    ] = Engine.local,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Where to listen; others than this machine need a key"
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Where to listen; 0 takes a free one")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What clients call the recipe  [default: its directory's name]",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ask for a key: one of this file's lines. Without it, the key that the environment variable "
            f"{KEY_VARIABLE} holds, if it is set",
            show_default=False,
        ),
    ] = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Listen beyond this machine without asking for a key")
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let web pages of this origin call the server, such as https://example.org; may be repeated",
            show_default=False,
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most texts that are generated at once")
    ] = 8,
    max_waiting: Annotated[
        int, typer.Option(metavar="N", min=0, help="Most texts that wait; more are answered 429")
    ] = 64,
    kept_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Remember so many tokens of ended texts, for prompts of the same client that begin alike",
        ),
    ] = 4096,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most new tokens of a text")
    ] = 2048,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Longest prompt  [default: what the models hold]",
            show_default=False,
        ),
    ] = None,
    request_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=1, help="Longest time for a request, waiting included"),
    ] = 600.0,
    shutdown_timeout: Annotated[
        int,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="How long running texts may take when the server is told to stop",
        ),
    ] = 60,
    speculative: SpeculativeOption = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write requests to the log with their prompts")
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    cuda_graphs: CudaGraphsOption = False,
    llama_cpp: LlamaCppOption = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = None,
    context_size: ContextSizeOption = None,
    max_calls: MaxCallsOption = None,
    max_cost: MaxCostOption = None,
) -> None:
    """Serve a recipe over HTTP, as the OpenAI API.

    Clients of that API work unchanged; each request may have a strength and experts of its own, and the
    playground is at the server's address. Requests are batched while they run. With --engine vllm the server
    is vLLM's, on one GPU or many, with requests steered by vllm_xargs instead.
    """
    keys = _keys(api_key_file)
    is_local = _is_loopback(host)
    if not (is_local or keys or no_key):
        raise InvalidRequest(
            f"--host {host} can be reached from other machines, and no key is asked for.\n"
            f"hint: --api-key-file FILE or {KEY_VARIABLE}, or --no-key if the network is trusted"
        )
    if no_key and keys:
        raise InvalidRequest("--no-key is given, and a key as well.\nhint: leave one of them out")
    known = name if name is not None else _name(recipe)
    if not re.fullmatch(r"[^\s:]{1,100}", known):
        raise InvalidRequest(
            f"the name {known!r} has spaces or a colon, or is too long.\nhint: --name my-model"
        )
    if engine is Engine.vllm:
        _refuse_given(ctx, VLLM_OPTIONS)
        _run_vllm(
            recipe,
            host=host,
            port=port,
            name=known,
            keys=keys,
            cors_origins=cors_origin or [],
            max_rows=max_rows if _is_given(ctx, "max_rows") else None,
            dtype=dtype,
            num_drafted=VLLM_DRAFT if speculative else 0,
            options=options or [],
        )
    if options:
        raise InvalidRequest(
            f"{options[0]!r} follows the recipe, and the server here has no options of that kind.\n"
            "hint: options of vLLM's need --engine vllm"
        )
    try:
        from proxytune.server.app import make_app
        from proxytune.server.run import listen, make_server
        from proxytune.server.service import ServerSettings
    except ImportError as error:
        raise MissingExtra(
            f"serving needs {error.name}, which is not installed.\n"
            "hint: pip install 'proxytune[serve]'"
        ) from None
    read = read_recipe(
        recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
    )
    try:
        listening = listen(host, port)
    except (OSError, OverflowError) as error:
        raise InvalidRequest(
            f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}.\n"
            "hint: --port names another one, --port 0 takes a free one"
        ) from None
    settings = ServerSettings(
        name=known,
        api_keys=keys,
        hosts=("localhost", "127.0.0.1", "::1", host.lower()) if is_local else None,
        cors_origins=tuple(cors_origin or ()),
        max_rows=max_rows,
        max_waiting=max_waiting,
        kept_tokens=kept_tokens,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        request_timeout_s=request_timeout,
        speculative=speculative,
        log_prompts=log_prompts,
    )
    model = load_models(
        read,
        None,
        device=device,
        dtype=dtype,
        cuda_graphs=cuda_graphs,
        max_calls=max_calls,
        max_cost=max_cost,
    )
    _log_to_stderr()
    server = make_server(
        make_app(model, settings), host=host, port=port, shutdown_timeout_s=shutdown_timeout
    )
    settle()
    _say_hello(settings, host, listening.getsockname()[1])
    server.run(sockets=[listening])


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option stood on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_given(ctx: typer.Context, honoured: frozenset[str]) -> None:
    """Refuse options of the command line that are not honoured.

    Raises:
        InvalidRequest: One was given.
    """
    for parameter in ctx.command.params:
        if parameter.name not in honoured and _is_given(ctx, parameter.name or ""):
            raise InvalidRequest(
                f"{parameter.opts[0]} is for the server here, and --engine vllm starts vLLM's.\n"
                "hint: vLLM's own options follow --, as in: -- --max-model-len 4096"
            )


def _run_vllm(
    recipe: str,
    *,
    host: str,
    port: int,
    name: str,
    keys: tuple[str, ...],
    cors_origins: list[str],
    max_rows: int | None,
    dtype: str | None,
    num_drafted: int,
    options: list[str],
) -> NoReturn:
    """Become vLLM's server.

    Raises:
        InvalidRequest: Several keys were given, of which vLLM takes one.
        UserError: vLLM is missing, or cannot run the recipe.
    """
    from proxytune.integrations.vllm.server import vllm_server_command

    if len(keys) > 1:
        raise InvalidRequest(
            f"{len(keys)} keys were given, and vLLM takes one.\nhint: a proxy in front can know several"
        )
    # vLLM lets pages of every origin call it unless told otherwise.
    own = ["--allowed-origins", json.dumps(cors_origins)]
    if max_rows is not None:
        own += ["--max-num-seqs", str(max_rows)]
    line = vllm_server_command(
        recipe,
        host=host,
        port=port,
        name=name,
        dtype=dtype,
        num_drafted=num_drafted,
        options=[*own, *options],
    )
    # A key on the command line would show in the list of processes.
    environment = dict(os.environ) | ({"VLLM_API_KEY": keys[0]} if keys else {})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(line[0], line, environment)


def _keys(path: Path | None) -> tuple[str, ...]:
    """Return the keys of a file, or of the environment.

    Raises:
        InputFileError: The file cannot be read, or holds no key.
        InvalidRequest: A key is too short.
    """
    if path is None:
        found = [os.environ.get(KEY_VARIABLE, "").strip()]
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise InputFileError(
                f"{path} cannot be read: {why}.\nhint: --api-key-file takes a file with a key a line"
            ) from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise InputFileError(f"{path} holds no key.\nhint: write one a line")
    keys = tuple(key for key in found if key)
    for key in keys:
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise InvalidRequest(
                f"a key has fewer than {MIN_KEY_LENGTH} characters, or some that HTTP headers do not take."
                "\nhint: python -c 'import secrets; print(secrets.token_urlsafe())' makes a good one"
            )
    return keys


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(reference: str) -> str:
    """Return the last part of a recipe's reference."""
    if "://" not in reference and Path(reference).exists():
        return Path(reference).resolve().name or "recipe"
    return reference.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1] or "recipe"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("proxytune.server")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _say_hello(settings: ServerSettings, host: str, port: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}"
    console = stderr()
    console.print(
        f"{settings.name} is served at {address}/v1 (the playground: {address}/)", soft_wrap=True
    )
    if settings.api_keys:
        console.print(f"clients need a key; {len(settings.api_keys)} are known")
    console.print("Ctrl-C finishes what runs and stops; once more stops at once")
