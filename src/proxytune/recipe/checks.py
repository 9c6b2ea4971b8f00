"""How keys are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.errors import RecipeError, did_you_mean


def refuse_constant(constant: str) -> Any:
    """Refuse NaN and infinities in a JSON file."""
    raise RecipeError(f"it holds {constant}, and every number must be finite")


def finite_float(text: str) -> float:
    """Read a JSON number, refusing one that overflows."""
    value = float(text)
    if not math.isfinite(value):
        raise RecipeError(f"it holds {text[:40]}, and every number must be finite")
    return value


def object_without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a key that is given twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise RecipeError(f"the key {as_json(doubled)} is given twice in one object")
    return content


def as_object(value: Any, place: str) -> dict[str, Any]:
    """Return a value as a dict, refusing what is no JSON object."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RecipeError(f"{place} is {as_json(value)}, and must be an object")
    return dict(value)


def check_keys(
    value: Mapping[str, Any],
    *,
    known: Sequence[str],
    place: str,
    ignored: frozenset[str] = frozenset(),
) -> None:
    """Refuse unknown keys, naming the known one that is closest."""
    for key in value:
        if key not in known and key not in ignored:
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
    """Check that a value is text that can name something: not empty, and no file name's forbidden parts."""
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{key} is {as_json(value)}, and must be text")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise RecipeError(f"{key} is {as_json(value)}, which holds a character that no text has")


def check_settings(value: Any) -> None:
    """Refuse settings that JSON cannot hold."""
    try:
        is_json = json.dumps(dict(value), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        is_json = b""
    if not isinstance(value, Mapping) or not value or not is_json:
        raise RecipeError(
            f"quantization is {as_json(value)}, and must be an object of settings.\n"
            'hint: {"quant_method": "bitsandbytes", "load_in_4bit": true}'
        )


def check_count(key: str, value: Any, *, least: int) -> None:
    """Check that a value is None or a whole number from `least` on."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return
    raise RecipeError(f"{key} is {as_json(value)}, and must be a whole number of at least {least}")


def as_json(value: Any) -> str:
    """Return a value as JSON would write it, cut to what fits into a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}…"
