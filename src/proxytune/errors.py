"""The error tree: one cause per class.

    ProxytuneError
    ├── UserError                what the caller can fix; the CLI ends with exit code 2
    │   ├── InvalidRequest       an option, alpha or prompt that cannot be honoured
    │   ├── PromptTooLong        the prompt does not fit into a model's context
    │   ├── UnknownExpert        a name the recipe does not have
    │   ├── RecipeError          a recipe that is missing or malformed
    │   ├── ModelNotFound        a model reference that leads to no files
    │   ├── CorruptModel         files that exist but cannot be read
    │   ├── UnsafeModel          pickled weights or remote code that were not allowed
    │   ├── AdapterMismatch      an adapter that belongs to another model
    │   ├── VocabularyMismatch   models whose tokens cannot be matched one to one
    │   ├── PromptFormatError    a prompt format that the model lacks or that fails
    │   ├── NotEnoughMemory      the weights cannot fit
    │   ├── UnsupportedModel     a model that this backend cannot run as asked
    │   ├── InputFileError       an input file that cannot be read, with the line
    │   ├── OutputFileError      an output file that cannot be written or continued
    │   ├── RewardError          a reward that raised, hung or returned no number
    │   └── MissingExtra         an optional dependency that is not installed
    ├── Unavailable              not now; the same request may be honoured later
    │   ├── QueueFull            too many requests are waiting
    │   └── ShuttingDown         the server finishes its work and takes nothing new
    └── BackendError             the work itself failed; the CLI ends with exit code 1
        ├── ApiError             a server that gives no valid answer after all retries
        └── BudgetSpent          one more call would exceed the allowed calls or cost

A message says what happened, with the values; why the work cannot go on; and, after "hint:", what to do.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class ProxytuneError(Exception):
    """Any error this package raises on purpose.

    `traces` holds what was generated so far, for each request that had begun.
    """

    traces: tuple[Any, ...] = ()


class UserError(ProxytuneError):
    """Something the caller gave cannot be used; the message says how to fix it."""


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
    """A model file exists but cannot be read."""


class UnsafeModel(UserError):
    """A model has only pickled weights or needs remote code, and that was not allowed."""


class AdapterMismatch(UserError):
    """An adapter does not fit the small model it is put on."""


class VocabularyMismatch(UserError):
    """Two models do not share one set of tokens, so their logits cannot be added."""


class PromptFormatError(UserError):
    """A prompt cannot be rendered in the format that the recipe asks for."""


class NotEnoughMemory(UserError):
    """The weights of a recipe need more memory than is free."""


class UnsupportedModel(UserError):
    """A model exists, but this backend cannot run it as asked."""


class InputFileError(UserError):
    """An input file cannot be read; the message names the line."""


class OutputFileError(UserError):
    """An output file cannot be written, or was begun with different settings."""


class RewardError(UserError):
    """A reward raised, hung or returned no number; the message names the row and the answer."""


class MissingExtra(UserError):
    """An optional dependency is not installed; the message holds the install line."""


class Unavailable(ProxytuneError):
    """A server cannot take a request now; it may later."""


class QueueFull(Unavailable):
    """Too many requests are waiting; `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShuttingDown(Unavailable):
    """The server finishes its work and takes nothing new."""


class BackendError(ProxytuneError):
    """A model failed while it ran."""


class ApiError(BackendError):
    """A server gave no valid answer after all retries."""


class BudgetSpent(BackendError):
    """One more call would exceed the allowed number of calls or cost."""


# Hints -----------------------------------------------------------------------------------------------


def closest(word: str, known: Iterable[str], *, num: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return up to `num` known words that resemble a misspelt one, the closest first.

    Args:
        word: As typed.
        known: What it may have been meant to be.
        num: Maximum number of words.
        cutoff: How much they must resemble it, from 0 to 1 (`difflib`'s ratio).
    """
    return difflib.get_close_matches(word[:80], list(known), n=num, cutoff=cutoff)


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return the end of a message: a hint with the known word closest to a misspelt one.

    Args:
        word: As typed.
        known: What it may have been meant to be.
        otherwise: The hint if none resembles it; empty for no hint.
    """
    matches = closest(word, known)
    hint = f"did you mean {matches[0]!r}?" if matches else otherwise
    return f".\nhint: {hint}" if hint else ""


def pip_install(arguments: str) -> str:
    """Return the shell line that installs into the environment that runs this process.

    A bare `pip` is that environment's only where it is first on the PATH, and uv makes environments without.

    Args:
        arguments: What follows `install`, quoted for the shell.
    """
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None:
        return f"uv pip install --python {python} {arguments}"
    found = shutil.which("pip")
    is_ours = found is not None and Path(found).parent == Path(sys.executable).parent
    return f"{'pip' if is_ours else f'{python} -m pip'} install {arguments}"


def install_command(extra: str) -> str:
    """Return the command that adds an extra to this installation, from where pip took the package."""
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    origin = _origin()
    url, name = origin.get("url", ""), f"proxytune[{extra}]"
    if "vcs_info" in origin:
        source = origin["vcs_info"]
        commit = f"@{source['commit_id']}" if source.get("commit_id") else ""
        return pip_install(f"'{name} @ {source.get('vcs', 'git')}+{url}{commit}'")
    if url.startswith("file://"):
        path = url2pathname(urlsplit(url).path)
        editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
        return pip_install(f"{editable}'{path}[{extra}]'")
    return pip_install(f"'{name} @ {url}'" if url else f"'{name}'")


def install_elsewhere() -> str:
    """Return the command that installs this package on another machine, for a text that travels.

    A local path means nothing there, and is nobody's business.
    """
    origin = _origin()
    url = origin.get("url", "")
    if url.startswith("file://"):
        return "pip install .    # in a checkout of proxytune"
    if "vcs_info" in origin:
        url = f"{origin['vcs_info'].get('vcs', 'git')}+{url}"
    return f"pip install 'proxytune @ {url}'" if url else "pip install proxytune"


def _origin() -> dict[str, Any]:
    """Return what pip recorded of a checkout, a wheel or a repository it was given (PEP 610).

    It records nothing of an index, so the answer is empty then.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        origin = json.loads(distribution("proxytune").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # run from a checkout that is not installed
        root = Path(__file__).resolve().parents[2]
        return {"url": root.as_uri(), "dir_info": {"editable": True}}
    except ValueError:
        return {}
    return origin if isinstance(origin, dict) else {}


def missing_extra(what: str, extra: str, otherwise: str = "") -> MissingExtra:
    """Return the error for an optional dependency that is not installed.

    Args:
        what: What needs it, as a clause without a full stop.
        extra: The extra that brings it.
        otherwise: What else can be done, such as "or leave --picture out".
    """
    return MissingExtra(
        f"{what}.\nhint: {', '.join(filter(None, (install_command(extra), otherwise)))}"
    )
