"""What is said of a request that is not what it has to be: one sentence of ours for each kind of fault.

The validator finds the faults; its own words never reach a client.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from proxytune.server.habits import NotHonoured

MAX_SHOWN = 100
"""Maximum number of characters of a field's name, or of a value, in an error."""

_KINDS = {
    "string_type": "text",
    "string_sub_type": "text",
    "string_unicode": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
"""What a value must be, by the type of the validator's error."""
_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_SEVERAL_KINDS = {
    "prompt": "text, a list of token ids, or a list of either",
    "stop": "text or a list of texts",
    "content": "text or a list of parts",
}
"""What fields with several types must be."""
_TYPE_NAMES = {"str", "int", "float", "bool", "dict", "list", "none"}
"""What the validator adds to a field's place for the types that it tried."""


def explain(error: ValidationError) -> tuple[str, str | None]:
    """Return what is wrong with the first bad field, and the field's name as the client knows it."""
    errors: list[Mapping[str, Any]] = [*error.errors(include_url=False)]
    field = errors[0]["loc"][:1]
    errors = [each for each in errors if each["loc"][:1] == field]
    # A field with several allowed types has an error for each. The one that came furthest belongs to the
    # intended type: a list of too many or too few items, else deepest, then latest.
    first = max(
        errors,
        key=lambda each: (
            each["type"] in ("too_long", "too_short"),
            len(each["loc"]),
            [part for part in each["loc"] if isinstance(part, int)],
        ),
    )
    path = [str(part) for part in first["loc"]]
    name = field_name(path)
    if first["type"] == "extra_forbidden":
        return not_honoured(name or path[-1]), name
    is_of_no_kind = len(errors) > 1 and all(
        each["type"] in _KINDS and field_name([str(part) for part in each["loc"]]) == name
        for each in errors
    )
    last = (name or "").rsplit(".", 1)[-1]
    several = _SEVERAL_KINDS.get(last) if is_of_no_kind else None
    return _sentence(first, name or "the body", several), name


def field_name(path: list[str]) -> str | None:
    """Return a field's name as the client knows it, without the names of the types that were tried."""
    named = [p for p in path if re.fullmatch(r"[a-z_]\w*|\d+", p) and p not in _TYPE_NAMES]
    return ".".join(named)[:MAX_SHOWN] or None


def not_honoured(name: str) -> str:
    """Return what is said of a field that no request has."""
    return f"{name[:MAX_SHOWN]!r} is not a field that can be honoured here"


def _sentence(error: Mapping[str, Any], name: str, several: str | None) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    shown = _shown(error.get("input"))
    if kind == "missing":
        return f"{name} is missing, and a request needs it"
    if isinstance(why := context.get("error"), NotHonoured):
        return f"{name}: {why}" if shown is None else f"{name} is {shown}, and {why}"
    if kind == "value_error":
        return str(context["error"]) if name == "the body" else f"{name}: {context['error']}"
    if kind == "literal_error":
        values = str(context["expected"]).replace(" or ", ", ")
        return _must(name, error, f"one of {values}" if "," in values else values)
    if several is not None:
        return _must(name, error, several)
    if kind in _KINDS:
        return _must(name, error, _KINDS[kind])
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return f"{name} is {shown}, and must be {words} {context[key]:g}"
    if kind == "too_long":
        return f"{name} has more than {context['max_length']} items, which is all that it may have"
    if kind == "too_short":
        return f"{name} has no items, and must have at least {context['min_length']}"
    if kind == "string_too_long":
        return f"{name} has more than {context['max_length']} characters, which is all that it may have"
    if kind == "string_too_short":
        return f"{name} is empty, and must have at least {context['min_length']} character"
    return f"{name} cannot be read"


def _must(name: str, error: Mapping[str, Any], words: str) -> str:
    value = error.get("input")
    what = _shown(value)
    if what is None:
        what = "a list" if isinstance(value, list) else "an object"
    return f"{name} is {what}, and must be {words}"


def _shown(value: Any) -> str | None:
    """Return a value as JSON writes it, shortened; None for a list or an object."""
    if isinstance(value, list | dict):
        return None
    if isinstance(value, str):
        value = value[: MAX_SHOWN + 1]
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
