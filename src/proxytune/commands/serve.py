"""`proxytune serve`: an OpenAI-compatible server, here or in vLLM."""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from proxytune.commands.app import command
from proxytune.commands.console import stderr
from proxytune.commands.flags import Pick
from proxytune.commands.options import ModelOptions, RecipeArgument, argument
from proxytune.errors import InvalidRequest, missing_extra
from proxytune.grants import KEY_VARIABLE
from proxytune.machine import settle
from proxytune.request import SPECULATIVE
from proxytune.server.settings import ServerSettings, read_keys
from proxytune.settings import option

VLLM_DRAFT = 4
"""Tokens that the expert drafts at a time in vLLM with --speculative."""
VLLM_OPTIONS = frozenset(
    {"recipe", "engine", "host", "port", "name", "api_key_file", "no_key", "cors_origins"}
    | {
        "max_rows",
        "speculative",
        "dtype",
        "exact",
        "trust_remote_code",
        "allow_pickle",
        "vllm_options",
    }
)
"""What --engine vllm honours; the rest has names of vLLM's own."""


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where the server listens, and to whom."""

    engine: Literal["local", "vllm"] = option(
        "local", "Run the models here, or in vLLM with its own server and options"
    )
    host: str = option(
        "127.0.0.1",
        "Address to listen on; requests from other machines need a key",
        metavar="ADDRESS",
    )
    port: int = option(8000, "Port to listen on; 0 picks a free one", at_least=0, at_most=65535)
    api_key_file: Path | None = option(
        None,
        "Require a key: one of this file's lines. Without a file, the key in the environment variable "
        f"{KEY_VARIABLE} is required, if it is set",
    )
    no_key: bool = option(False, "Accept requests from other machines without a key")
    shutdown_timeout: int = option(
        60,
        "Time that running texts get to finish when the server is stopped",
        at_least=0,
        metavar="SECONDS",
    )
    speculative: bool = option(False, SPECULATIVE)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def keys(self) -> tuple[str, ...]:
        """Return the keys of which a request needs one.

        Raises:
            InputFileError: The file cannot be read, or holds no key.
            InvalidRequest: A key is too short, or keys and the address contradict each other.
        """
        keys = read_keys(self.api_key_file)
        if not (self.is_local or keys or self.no_key):
            raise InvalidRequest(
                f"--host {self.host} can be reached from other machines, and no key is required.\n"
                f"hint: --api-key-file FILE or {KEY_VARIABLE}, or --no-key if the network is trusted"
            )
        if self.no_key and keys:
            raise InvalidRequest(
                "--no-key is given, and a key as well.\nhint: leave one of them out"
            )
        return keys


@command("proxytune serve my-recipe", is_endless=True)
def serve(
    ctx: typer.Context,
    recipe: RecipeArgument,
    vllm_options: Annotated[
        list[str] | None,
        argument("OPTIONS", "With --engine vllm, after --: further options of vLLM's server"),
    ] = None,
    *,
    listen: ListenOptions,
    settings: Annotated[ServerSettings, Pick(defaults={"name": ""})],
    models: ModelOptions,
) -> None:
    """Serve a recipe over HTTP, with the OpenAI API.

    Clients of that API work unchanged; each request may set its own strength and experts, and the playground
    is at the server's address. Requests are batched while they run. With --engine vllm, vLLM's server runs
    instead, on one GPU or many, and takes the same fields for steering.
    """
    keys = listen.keys()
    name = settings.name or _name(recipe)
    if not re.fullmatch(r"[^\s:]{1,100}", name):
        raise InvalidRequest(
            f"the name {name!r} has spaces or a colon, or is too long.\nhint: --name my-model"
        )
    if listen.engine == "vllm":
        from proxytune.integrations.vllm.server import become_vllm_server, vllm_server_command

        for parameter in ctx.command.params:
            if parameter.name not in VLLM_OPTIONS and _is_given(ctx, parameter.name or ""):
                raise InvalidRequest(
                    f"{parameter.opts[0]} is an option of the server here, and --engine vllm starts "
                    "vLLM's.\nhint: vLLM's own options follow --, as in: -- --max-model-len 4096"
                )
        own = ["--max-num-seqs", str(settings.max_rows)] if _is_given(ctx, "max_rows") else []
        # vLLM lets pages of every origin call it by default.
        own += ["--allowed-origins", json.dumps(settings.cors_origins)]
        command_line = vllm_server_command(
            recipe,
            host=listen.host,
            port=listen.port,
            name=name,
            dtype=models.dtype,
            num_drafted=VLLM_DRAFT if listen.speculative else 0,
            grants=models.grants(),
            options=[*own, *(vllm_options or ())],
        )
        become_vllm_server(command_line, keys, is_exact=models.exact)
    if vllm_options:
        raise InvalidRequest(
            f"{vllm_options[0]!r} follows the recipe, and the server here has no options of that kind.\n"
            "hint: vLLM's options need --engine vllm"
        )
    hosts = ("localhost", "127.0.0.1", "::1", listen.host.lower()) if listen.is_local else None
    settings = replace(
        settings, name=name, api_keys=keys, hosts=hosts, speculative=listen.speculative
    )
    _run(recipe, listen, settings, models)


def _run(
    recipe: str, listen: ListenOptions, settings: ServerSettings, models: ModelOptions
) -> None:
    try:
        from proxytune.server.app import make_app
        from proxytune.server.run import listen as listening_socket
        from proxytune.server.run import make_server
    except ImportError as error:
        raise missing_extra(
            f"serving needs {error.name}, which is not installed", "serve"
        ) from None
    found = models.read(recipe)
    try:
        listening = listening_socket(listen.host, listen.port)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidRequest(
            f"cannot listen on {listen.host}, port {listen.port}: {why}.\n"
            "hint: --port names another one, --port 0 picks a free one"
        ) from None
    model = models.load(found, None)
    _log_to_stderr()
    server = make_server(
        make_app(model, settings),
        host=listen.host,
        port=listen.port,
        shutdown_timeout_s=listen.shutdown_timeout,
    )
    settle()
    _say_hello(settings, listen.host, listening.getsockname()[1])
    server.run(sockets=[listening])


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _name(reference: str) -> str:
    """Return the last part of a recipe's reference."""
    if "://" not in reference and Path(reference).exists():
        return Path(reference).resolve().name or "recipe"
    return reference.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1] or "recipe"


class _OneLine(logging.Formatter):
    """Keeps a record on one line and indents its traceback, so that no text in it poses as another."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\n", "\\n")

    def formatException(self, ei: Any) -> str:
        return "    " + super().formatException(ei).replace("\n", "\n    ")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("proxytune.server")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _say_hello(settings: ServerSettings, host: str, port: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}"
    console = stderr()
    hello = f"{settings.name} is served at {address}/v1 (the playground: {address}/)"
    console.print(hello, soft_wrap=True)
    if settings.api_keys:
        console.print(f"clients need a key; {len(settings.api_keys)} are known")
    console.print("Ctrl-C finishes running requests and stops; pressed again, it stops at once")
