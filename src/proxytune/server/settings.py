"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from proxytune.settings import Option, check

if TYPE_CHECKING:  # It brings torch, which the command line's help does not need.
    from proxytune.decode.speculative import Drafting


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server allows.

    Args:
        api_keys: A request to `/v1` must come with one of them; with none, no key is needed.
        hosts: Names under which the server may be called, so that no web page on another name can; None for
            any.
        max_body_bytes: Maximum size of a request's body.
        body_timeout_s: Maximum time for a request to arrive.
        send_timeout_s: Maximum time for a client to read a piece of its stream.
        speculative: Draft tokens; see `ProxyTuned.generate`.

    Raises:
        InvalidRequest: A field is out of range.
    """

    name: Annotated[
        str,
        Option("Name of the recipe in requests", metavar="NAME", default="its directory's name"),
    ]
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    cors_origins: Annotated[
        tuple[str, ...],
        Option(
            "Allow web pages of this origin, such as https://example.org, to call the server; * allows all",
            flag="--cors-origin",
            metavar="ORIGIN",
        ),
    ] = ()
    max_rows: Annotated[
        int, Option("Maximum number of texts that are generated at once", at_least=1)
    ] = 8
    max_waiting: Annotated[
        int,
        Option("Maximum number of waiting texts; further requests are answered 429", at_least=0),
    ] = 64
    kept_tokens: Annotated[
        int,
        Option(
            "Keep this many tokens of finished texts in the KV cache, for prompts of the same client that "
            "begin the same way",
            at_least=0,
        ),
    ] = 4096
    max_tokens: Annotated[int, Option("Maximum number of new tokens in a text", at_least=1)] = 2048
    max_prompt_tokens: Annotated[
        int | None,
        Option("Maximum length of a prompt in tokens", at_least=1, default="what the models hold"),
    ] = None
    max_body_bytes: int = 2 * 2**20
    body_timeout_s: float = 20.0
    send_timeout_s: float = 60.0
    request_timeout_s: Annotated[
        float,
        Option(
            "Maximum time from a request to the end of its text, waiting included",
            above=0,
            flag="--request-timeout",
            metavar="SECONDS",
        ),
    ] = 600.0
    speculative: bool | Drafting = False
    log_prompts: Annotated[bool, Option("Write requests to the log with their prompts")] = False

    def __post_init__(self) -> None:
        check(self)
