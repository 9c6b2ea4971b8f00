"""The address of an API, read by the parser of the HTTP library, so that both see the same host."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from proxytune.errors import InvalidRequest

if TYPE_CHECKING:  # Most recipes name no address.
    import httpx2

MAX_LENGTH = 2000


def parse_address(url: str) -> httpx2.URL:
    """Return the address of an API in its parts.

    Raises:
        InvalidRequest: It is no `http` or `https` address with a host, or has a user name, a password, a
            query or a fragment.
    """
    import httpx2

    try:
        if len(url) > MAX_LENGTH:
            raise ValueError(f"it has more than {MAX_LENGTH:,} characters")
        address = httpx2.URL(url)
        if address.scheme not in ("http", "https") or not address.raw_host:
            raise ValueError("it does not begin with http:// or https:// and a host")
        if not re.fullmatch(r"[a-z0-9._:-]+", address.raw_host.decode()):
            raise ValueError("its host holds a character that no host has")
        if address.port is not None and not 0 < address.port < 65536:
            raise ValueError(f"{address.port} is not a port")
    except (
        httpx2.InvalidURL,
        ValueError,
    ) as error:  # ValueError: what IDNA does not allow in a name
        raise InvalidRequest(
            f"{url[:80]!r} is not the address of an API: {error}.\n"
            "hint: write it as http://localhost:8000/v1"
        ) from error
    if address.userinfo or "?" in url or "#" in url:
        # The address is not shown: what is in it may be a key.
        raise InvalidRequest(
            f"the address of the API at {address.netloc.decode()} contains a user name, a password, a query "
            "or a fragment, but addresses are shown and shared, so they must hold no secrets.\n"
            "hint: put the key into an environment variable, and name that with --key-env (for a judge "
            "--judge-key-env)"
        )
    return address
