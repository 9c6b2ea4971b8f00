"""Runs what a client can do, one thing after the other, against the server at the address that is given.

The scripts beside this file run in the Python of their client, which has neither pytest nor this project:

    CLIENTS_PYTHON tests/scripts/clients/with_anthropic.py http://127.0.0.1:8000
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import Any

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
"""Where the server is, without /v1."""
MODEL = "smol"
EXPERT = "smol:tinyshakespeare"
TEXT = "Good morrow,"


def run(things: dict[str, Any]) -> None:
    """Run the functions of a script in their order, and print for each whether it worked.

    Args:
        things: The script's `globals()`. Its own functions without a leading underscore are things to do.
    """
    failed = False
    for name, thing in list(things.items()):
        if name.startswith("_") or not inspect.isfunction(thing) or thing.__module__ != "__main__":
            continue
        try:
            done = thing()
            if inspect.isawaitable(done):
                asyncio.run(_wait(done))
        except Exception:
            failed = True
            print(f"failed: {name}\n{traceback.format_exc()}", file=sys.stderr)
        else:
            print(f"works: {name}")
    sys.exit(failed)


async def _wait(done: Any) -> Any:
    return await done


def raised(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """Return the error that a call raises."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")
