"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proxytune.settings import check, declared, option

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
    max_rows: int = option(8, "Maximum number of texts that are generated at once", at_least=1)
    max_waiting: int = option(
        64, "Maximum number of waiting texts; further requests are answered 429", at_least=0
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
        "Maximum time from a request to the end of its text, waiting included",
        above=0,
        flag="--request-timeout",
        metavar="SECONDS",
    )
    speculative: bool | Drafting = False
    log_prompts: bool = option(False, "Write requests to the log with their prompts")

    def __post_init__(self) -> None:
        check(self)
