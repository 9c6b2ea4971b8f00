"""The error tree: one cause per class.

    ProxytuneError
    ├── UserError                what the caller can mend; the CLI ends with exit code 2
    │   ├── InvalidRequest       an option, alpha or prompt that cannot be honoured
    │   ├── PromptTooLong        the prompt does not fit into a model's context
    │   ├── UnknownExpert        a name the recipe does not have
    │   ├── RecipeError          no recipe there, or malformed
    │   ├── ModelNotFound        a model reference that leads nowhere
    │   ├── CorruptModel         files that are there and cannot be read
    │   ├── UnsafeModel          pickled weights or remote code, not asked for
    │   ├── AdapterMismatch      an adapter that belongs to another model
    │   ├── VocabularyMismatch   models whose tokens cannot be matched one to one
    │   ├── PromptFormatError    a prompt format the model does not have or that fails
    │   ├── NotEnoughMemory      the weights cannot fit
    │   ├── UnsupportedModel     a model this backend cannot run as asked
    │   ├── InputFileError       an input file that cannot be read, with the line
    │   ├── OutputFileError      an output file that cannot be written or continued
    │   └── MissingExtra         an optional dependency that is not installed
    ├── Unavailable              not now; the same request may be honoured later
    │   ├── QueueFull            as many requests wait as may
    │   └── ShuttingDown         a server finishes what it has and takes nothing new
    └── BackendError             the work itself failed; the CLI ends with exit code 1
        ├── ApiError             a server that gives no good answer, however often it is asked
        └── BudgetSpent          one more call would exceed the calls or the cost that are allowed

A message says what happened, with the values; why it cannot go on; and, after "hint:", what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


class ProxytuneError(Exception):
    """Any error this package raises on purpose.

    `traces` holds what was generated until then, for each request that had begun.
    """

    traces: tuple[Any, ...] = ()


class UserError(ProxytuneError):
    """Something the caller gave cannot be used; the message says how to mend it."""


class InvalidRequest(UserError):
    """A request asks for something impossible or contradictory."""


class PromptTooLong(UserError):
    """A prompt, or prompt and new tokens together, exceed a model's context."""


class UnknownExpert(UserError):
    """A request names an expert that the recipe does not have."""


class RecipeError(UserError):
    """A recipe is missing, malformed, or has unknown or missing keys."""


class ModelNotFound(UserError):
    """A model reference leads to no usable files."""


class CorruptModel(UserError):
    """A model file exists and its content cannot be read."""


class UnsafeModel(UserError):
    """A model comes only as pickled weights or needs remote code, and neither was asked for."""


class AdapterMismatch(UserError):
    """An adapter does not fit the small model it is put on."""


class VocabularyMismatch(UserError):
    """Two models do not share one set of tokens, so their logits cannot be added."""


class PromptFormatError(UserError):
    """A prompt cannot be rendered in the format the recipe asks for."""


class NotEnoughMemory(UserError):
    """The weights of a recipe need more memory than the machine has free."""


class UnsupportedModel(UserError):
    """A model exists and this backend cannot run it as asked."""


class InputFileError(UserError):
    """An input file cannot be read; names the line."""


class OutputFileError(UserError):
    """An output file cannot be written, or was begun with other settings."""


class MissingExtra(UserError):
    """An optional dependency is not installed; the message holds the install line."""


class Unavailable(ProxytuneError):
    """A server cannot take a request now; it may later."""


class QueueFull(Unavailable):
    """As many requests wait as may. `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShuttingDown(Unavailable):
    """A server finishes what it has and takes nothing new."""


class BackendError(ProxytuneError):
    """A model failed while it ran."""


class ApiError(BackendError):
    """A server gave no good answer, however often it was asked."""


class BudgetSpent(BackendError):
    """One more call would exceed the calls or the cost that are allowed."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return a hint that names the known word closest to a misspelt one, or nothing."""
    matches = difflib.get_close_matches(word[:80], known, n=1)
    return f".\nhint: did you mean {matches[0]!r}?" if matches else ""
