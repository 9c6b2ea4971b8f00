"""What a server allows, and the keys that clients need."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from proxytune.errors import InputFileError, InvalidRequest
from proxytune.grants import KEY_VARIABLE
from proxytune.settings import check, declared, option

if TYPE_CHECKING:  # It brings torch, which the command line's help does not need.
    from proxytune.decode.speculative import Drafting

MIN_KEY_LENGTH = 16
"""Shorter keys can be guessed."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server allows.

    Args:
        api_keys: A request to `/v1` must come with one of them; with none, no key is needed.
        hosts: Names under which the server may be called, so that no web page on another name can; None for
            any.
        max_body_bytes: Maximum size of a request's body. All bodies that are in memory together take at most
            sixteen times this.
        body_timeout_s: Maximum time for a request to arrive.
        send_timeout_s: Maximum time for a client to read a piece of its stream.
        speculative: Draft tokens; see `ProxyTuned.generate`.

    Raises:
        InvalidRequest: A field is out of range.
    """

    name: str = field(
        metadata=declared(
            "Name of the recipe in requests", metavar="NAME", none_means="its directory's name"
        )
    )
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    cors_origins: tuple[str, ...] = option(
        (),
        "Allow web pages of this origin, such as https://example.org, to call the server; * allows all",
        flag="--cors-origin",
        metavar="ORIGIN",
    )
    max_rows: int = option(
        8,
        "Maximum number of texts that are generated at once; a short one more may run beside long ones",
        at_least=1,
    )
    max_waiting: int = option(
        64,
        "Maximum number of waiting texts; beyond it, requests of the client with the most are answered 429",
        at_least=0,
    )
    kept_tokens: int = option(
        4096,
        "Keep this many tokens of finished texts in the KV cache, for prompts of the same client that "
        "begin the same way",
        at_least=0,
    )
    max_tokens: int = option(2048, "Maximum number of new tokens in a text", at_least=1)
    max_prompt_tokens: int | None = option(
        None, "Maximum length of a prompt in tokens", at_least=1, none_means="what the models hold"
    )
    max_body_bytes: int = 2 * 2**20
    body_timeout_s: float = 20.0
    send_timeout_s: float = 60.0
    request_timeout_s: float = option(
        600.0,
        "Maximum time from a request's arrival to the end of its text, rendering and waiting included",
        above=0,
        flag="--request-timeout",
        metavar="SECONDS",
    )
    speculative: bool | Drafting = False
    log_prompts: bool = option(False, "Write requests to the log with their prompts")

    def __post_init__(self) -> None:
        check(self)


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys in a file, or without one the key in the environment.

    Raises:
        InputFileError: The file cannot be read, or holds no key.
        InvalidRequest: A key is too short.
    """
    if path is None:
        # Taken out, so that it is never sent to an API on which the recipe's base is.
        found = [os.environ.pop(KEY_VARIABLE, "").strip()]
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise InputFileError(
                f"{path} cannot be read: {why}.\nhint: --api-key-file takes a file with one key per line"
            ) from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise InputFileError(f"{path} holds no key.\nhint: write one per line")
    keys = tuple(key for key in found if key)
    for key in keys:
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise InvalidRequest(
                f"a key has fewer than {MIN_KEY_LENGTH} characters, or some that HTTP headers cannot hold."
                "\nhint: python -c 'import secrets; print(secrets.token_urlsafe())' makes a good one"
            )
    return keys
