"""How the keys of a recipe are declared, and how wrong ones are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from proxytune.checkpoints import untrusted
from proxytune.errors import RecipeError, did_you_mean
from proxytune.settings import option, options_of

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def parse_json(content: bytes | str) -> Any:
    """Return the content of a recipe's JSON file.

    Raises:
        RecipeError: It is not JSON, has a key twice, holds NaN or infinity, or is too large or too deep.
    """
    try:
        return untrusted.parse_json(content, is_strict=True)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def as_object(value: Any, place: str) -> dict[str, Any]:
    """Return a value as a dict, refusing anything but a JSON object."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RecipeError(f"{place} is {as_json(value)}, and must be an object")
    return dict(value)


def check_keys(value: Iterable[str], *, known: Sequence[str], place: str) -> None:
    """Refuse unknown keys, suggesting the closest known one."""
    for key in value:
        if key not in known:
            raise RecipeError(
                f"{place} has the unknown key {as_json(key)}; known are {', '.join(known)}"
                f"{did_you_mean(key, known)}"
            )


def check_required(value: Mapping[str, Any], required: Sequence[str], place: str) -> None:
    """Refuse an object that lacks a required key."""
    for key in required:
        if key not in value:
            raise RecipeError(
                f"{place} lacks the key {key!r}.\n"
                f"hint: the keys it needs are {', '.join(required)}; `proxytune new` writes a whole recipe"
            )


def check_text(value: Any, key: str) -> None:
    """Check that a value is non-empty text without NUL characters or lone surrogates."""
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{key} is {as_json(value)}, and must be text")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise RecipeError(f"{key} is {as_json(value)}, which contains a character that no text has")


def check_json(value: Mapping[str, Any] | None, name: str) -> None:
    """Refuse an object that JSON cannot hold."""
    try:
        content = value if value is None else dict(value)
        # As `Recipe.write` writes it: half a surrogate pair cannot be encoded.
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{name} holds what JSON cannot: {error}") from error


def recipe_key(default: Any = None, **limits: Any) -> Any:
    """Return a dataclass's field that is a key of a recipe, with its limits; see `settings.Option`.

    The class's docstring describes it. The JSON Schema is made from both (`scripts/recipe_schema.py`).
    """
    return option(default, "", **limits)


def check_fields(settings: Any) -> None:
    """Check every key of an object by its declaration.

    Raises:
        RecipeError: A value is of the wrong type or outside its limits.
    """
    kind: type = type(settings)
    for declared in options_of(kind).values():
        value = getattr(settings, declared.name)
        if value is None and declared.is_optional:
            continue
        if declared.type is str:
            check_text(value, declared.name)
            # Messages show it, and a line end would let it write lines of its own into them.
            if declared.name not in ("prompt", "chat") and _CONTROL.search(value):
                raise RecipeError(
                    f"{declared.name} is {as_json(value)}, and must be one line of text"
                )
        if not declared.holds(value):
            raise RecipeError(
                f"{declared.name} is {as_json(value)}, and must be {declared.expected(value)}"
            )


def as_json(value: Any) -> str:
    """Return a value as JSON, shortened to fit into a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}…"
