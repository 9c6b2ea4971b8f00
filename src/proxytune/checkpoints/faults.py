"""What the libraries that read a model's files raise, as errors of this project.

transformers, torch and tokenizers meet malformed files with any class of exception, `KeyError` and
`RecursionError` included. The Rust code of tokenizers also panics, and pyo3's `PanicException` derives from
`BaseException`, like `KeyboardInterrupt`: no `except Exception` sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from proxytune.errors import ProxytuneError

_MAX_TEXT = 1000
"""Maximum length of a foreign message: some quote the whole file."""


def is_fault(error: BaseException) -> bool:
    """Whether an exception may come from data: no request to stop, such as `KeyboardInterrupt`."""
    return isinstance(error, Exception) or is_panic(error)


def is_panic(error: BaseException) -> bool:
    """Whether Rust code has panicked. Each extension module has a `PanicException` class of its own."""
    return type(error).__name__ == "PanicException"


def fault_text(error: BaseException) -> str:
    """Return an exception as the end of a sentence. A bare `KeyError` says nothing without its class."""
    text = str(error)
    if not isinstance(error, ValueError | OSError | RuntimeError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} …"


def shown(value: Any) -> str:
    """Return a value from a file as it is quoted in a message: at most 100 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits
        text = f"a {type(value).__name__} beyond all bounds"
    return text if len(text) <= 100 else f"{text[:100]} …"


@contextlib.contextmanager
def faults_as(make: Callable[[str], ProxytuneError]) -> Iterator[None]:
    """Turn what a library raises inside the block into an error of this project.

    Args:
        make: Returns the error, given the library's own words.
    """
    try:
        yield
    except ProxytuneError:
        raise
    except BaseException as error:
        if not is_fault(error):
            raise
        raise make(fault_text(error)) from error
