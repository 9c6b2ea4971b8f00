"""Which key goes to which host: a choice of whoever runs a recipe, and never of the recipe.

A recipe names the address of an API, and may name the environment variable whose key it would like to have
sent there. That is a request. What decides is the first of these that applies:

1. the variable that the caller names (`--key-env NAME`, `key_env=`);
2. the variable that the user's own settings file binds to the host;
3. the variable of a well-known provider, for the provider's own host, if it is set;
4. `PROXYTUNE_API_KEY`, if it is set. A server that takes its own clients' key from it removes it first.

A request for another variable than the one that is bound is overruled. Where none is bound it is refused, as
a recipe could otherwise take any secret out of the environment. No key goes over plain HTTP, except to this
machine.

The settings file is JSON: `{"keys": {"api.example.com": "EXAMPLE_API_KEY", "localhost:8000": "LOCAL_KEY"}}`.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from proxytune.checkpoints.untrusted import open_regular
from proxytune.errors import CorruptModel, InputFileError, InvalidRequest, RecipeError
from proxytune.grants import KEY_VARIABLE
from proxytune.recipe.address import parse_address
from proxytune.recipe.checks import as_json, as_object, check_keys, parse_json
from proxytune.recipe.spec import ApiSettings
from proxytune.settings import options_of

PROVIDERS: Mapping[str, str] = {
    "api.anthropic.com": "ANTHROPIC_API_KEY",
    "api.cerebras.ai": "CEREBRAS_API_KEY",
    "api.deepseek.com": "DEEPSEEK_API_KEY",
    "api.fireworks.ai": "FIREWORKS_API_KEY",
    "api.groq.com": "GROQ_API_KEY",
    "api.mistral.ai": "MISTRAL_API_KEY",
    "api.openai.com": "OPENAI_API_KEY",
    "api.sambanova.ai": "SAMBANOVA_API_KEY",
    "api.together.xyz": "TOGETHER_API_KEY",
    "api.x.ai": "XAI_API_KEY",
    "generativelanguage.googleapis.com": "GEMINI_API_KEY",
    "integrate.api.nvidia.com": "NVIDIA_API_KEY",
    "openrouter.ai": "OPENROUTER_API_KEY",
    "router.huggingface.co": "HF_TOKEN",
}
"""Hosts of well-known providers and the variables that their own documentation uses, as of November 2026."""

MAX_SETTINGS_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Key:
    """A key, and where it goes.

    Args:
        host: With the port, if the address names one.
        variable: The environment variable that holds it.
        value: The key itself, which no message shows.
    """

    host: str
    variable: str
    value: str = field(repr=False)


def find_key(url: str, *, asked: str | None = None, key_env: str | None = None) -> Key | None:
    """Return the key that goes to an API; None if none does.

    Args:
        url: Address of the API.
        asked: The variable that a recipe asks for.
        key_env: The variable that the caller names.

    Raises:
        InvalidRequest: A variable that must be set is not, or holds no key; a recipe asks for a key that is
            not bound to the host; the key would go over plain HTTP; or the address cannot be used.
        InputFileError: The settings file cannot be used.
    """
    address = parse_address(url)
    host = address.netloc.decode()
    bound = _bound_variable(address, key_env)
    if bound is None:
        if asked is not None:
            raise _unbound(address, asked)
        return None
    variable, why = bound
    value = os.environ.get(variable, "").strip()
    if not value:
        raise InvalidRequest(
            f"the environment variable {variable} is not set, and {why} takes the key for {host} from it.\n"
            f"hint: export {variable}=…"
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise InvalidRequest(
            f"the environment variable {variable} holds a character that no API key has.\n"
            "hint: check for a line break or a quotation mark that was copied along"
        )
    if address.scheme != "https" and not is_this_machine(address):
        raise InvalidRequest(
            f"the key in {variable} would go to {host} over plain HTTP, where everyone on the way can read "
            "it.\nhint: use https, or a tunnel from this machine (ssh -L); if the server needs no key, "
            f"bind none to it: {variable} is the choice of {why}"
        )
    return Key(host, variable, value)


def is_this_machine(address: httpx2.URL) -> bool:
    """Whether an address leads to this machine itself."""
    host = address.raw_host.decode()
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound_variable(address: httpx2.URL, key_env: str | None) -> tuple[str, str] | None:
    """Return the variable that is bound to a host, and what binds it."""
    if key_env is not None:
        return _checked_variable(key_env, "key_env"), "key_env"
    host = address.raw_host.decode()
    path = settings_path()
    if path is not None:
        hosts = bound_hosts(path)
        port = address.port or (443 if address.scheme == "https" else 80)
        found = hosts.get((host, port)) or hosts.get((host, None))
        if found is not None:
            return found, str(path)
    known = PROVIDERS.get(host)
    if known is not None and address.port is None and os.environ.get(known):
        return known, "the provider"
    if os.environ.get(KEY_VARIABLE):
        return KEY_VARIABLE, "proxytune"
    return None


def _unbound(address: httpx2.URL, asked: str) -> InvalidRequest:
    host = address.netloc.decode()
    if PROVIDERS.get(address.raw_host.decode()) == asked and address.port is None:
        return InvalidRequest(
            f"the environment variable {asked} is not set, and the recipe needs the key for {host} from it.\n"
            f"hint: export {asked}=…"
        )
    return InvalidRequest(
        f"the recipe asks to send the key in {asked} to {host}, but only you can choose which key goes "
        "where, and you have bound none to that host.\n"
        f"hint: if that key is meant for {host}: --key-env {asked} (in Python, key_env={asked!r}), or for "
        f"good {as_json({'keys': {host: asked}})} in "
        f"{settings_path() or '~/.config/proxytune/settings.json'}"
    )


def _checked_variable(name: Any, place: str) -> str:
    # The value is not shown: it may be a key.
    if not isinstance(name, str) or not options_of(ApiSettings)["key_env"].holds(name):
        raise InvalidRequest(
            f"{place} is not the name of an environment variable in capital letters, such as "
            "OPENAI_API_KEY.\nhint: put the key into a variable, and name that"
        )
    return name


# The user's settings file -------------------------------------------------------------------------------


def settings_path() -> Path | None:
    """Return where the user's settings file is looked for; None where the user has no home."""
    root = os.environ.get("XDG_CONFIG_HOME", "")
    # The standard says that relative paths are to be ignored.
    directory = Path(root if os.path.isabs(root) else os.path.expanduser("~/.config"))
    return directory / "proxytune" / "settings.json" if directory.is_absolute() else None


def bound_hosts(path: Path) -> dict[tuple[str, int | None], str]:
    """Return the variables that a settings file binds to hosts and ports, None for every port.

    Raises:
        InputFileError: It is no regular file of the user's own, or its content cannot be used.
    """
    content = _own_file(path)
    if content is None:
        return {}
    hosts: dict[tuple[str, int | None], str] = {}
    try:
        settings = as_object(parse_json(content), "the file")
        check_keys(settings, known=("keys",), place="the file")
        for name, variable in as_object(settings.get("keys", {}), '"keys"').items():
            place = _host_and_port(name)
            if place in hosts:
                raise InvalidRequest(f"{name!r} is bound twice")
            hosts[place] = _checked_variable(variable, f"what is bound to {name!r}")
    except (RecipeError, InvalidRequest) as error:
        raise InputFileError(f"{path} cannot be used: {error}") from error
    return hosts


def _own_file(path: Path) -> bytes | None:
    """Return the content of a regular file of the user or root, which not everyone can change, or None."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        pass  # opening it says why
    try:
        with open_regular(path) as file:
            state = os.fstat(file.fileno())
            content = file.read(MAX_SETTINGS_BYTES + 1)
    except CorruptModel as error:
        raise InputFileError(str(error)) from error
    problem = None
    if hasattr(os, "geteuid") and state.st_uid not in (os.geteuid(), 0):
        problem = "it belongs to another user"
    elif state.st_mode & stat.S_IWOTH:
        problem = "every user can change it"
    elif len(content) > MAX_SETTINGS_BYTES:
        problem = f"it is larger than {MAX_SETTINGS_BYTES:,} bytes"
    if problem is not None:
        raise InputFileError(
            f"{path} is not used, because {problem}; it decides where keys go.\n"
            "hint: make it a file of yours that is not writable for everybody"
        )
    return content


def _host_and_port(name: str) -> tuple[str, int | None]:
    """Return a host as addresses have it, and its port, from `host` or `host:port`."""
    try:
        address = parse_address(f"https://{name}")
        # A scheme without a default port keeps every port, 443 too.
        port = httpx2.URL(f"key://{name}").port
        is_host = address.raw_path == b"/" and not name.endswith("/")
    except InvalidRequest:
        is_host = False
    if not is_host:
        raise InvalidRequest(
            f"{name!r} is not a host.\n"
            "hint: write api.example.com or localhost:8000, without https:// and path"
        )
    return address.raw_host.decode(), port
