"""The recipe's format as JSON Schema, and as tables of keys, made from the dataclasses that read it.

Keys, types, defaults and limits are the fields of `recipe/spec.py`, `recipe/recipe.py` and
`policy.py`; descriptions are their docstrings. Rules between keys are stated here as well as there,
and tests/scripts/test_docs.py holds both against each other. Rules that JSON Schema cannot state, such as a
default expert that exists, are left to the recipe.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from proxytune.policy import PICKING, USERS, Policy
from proxytune.recipe.recipe import ARCHITECTURE, METADATA_KEYS, MODEL_TYPE, Recipe
from proxytune.recipe.spec import (
    ApiSettings,
    ExpertSpec,
    ExpertWeights,
    LlamaCppSettings,
    ModelSpec,
)
from proxytune.settings import Option, options_of

DRAFT = "https://json-schema.org/draft/2020-12/schema"
ADDRESS = "^[hH][tT][tT][pP][sS]?://"
GGUF = r"\.[gG][gG][uU][fF]$"
NUMBERS: dict[str, Any] = {"type": "number"}


OTHER_WORDS = {
    (
        Policy,
        "combine",
    ): "How several experts steer together: `sum` adds their offsets up. With one expert all are the same.",
    (
        Policy,
        "plausibility",
    ): "Tokens that the base gives less than this times what it gives its likeliest are `implausible`.",
}
"""Descriptions for readers of a recipe, where docstrings lead to code."""

PAIR_OF_COUNTS = {
    "type": ["array", "null"],
    "items": {"type": "integer", "minimum": 1},
    "minItems": 2,
    "maxItems": 2,
}
"""What `keep` holds: numbers of first and last layers."""


def descriptions(kind: type) -> dict[str, str]:
    """Return what the docstring of a class says of each of its fields, on one line."""
    _, _, section = (kind.__doc__ or "").partition("Args:\n")
    section = section.partition("\n\n")[0]
    entries = re.split(r"^ {8}(?=\w+: )", section, flags=re.MULTILINE)[1:]
    pairs = (" ".join(entry.split()).split(": ", 1) for entry in entries)
    return {name: as_json_says(text) for name, text in pairs}


def as_json_says(text: str) -> str:
    """Return a description with Python's values written as JSON's."""
    text = re.sub(r"\bNone\b", "null", text)
    return re.sub(r"`\(\(.*?`", lambda pairs: pairs[0].translate(str.maketrans("()", "[]")), text)


def type_of(annotation: Any) -> dict[str, Any]:
    """Return the schema of a field's annotation."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [type_of(part) for part in get_args(annotation) if part is not type(None)]
        (part,) = parts
        if "$ref" in part or "const" in part:
            return {"anyOf": [part, {"type": "null"}]}
        return {**part, "type": [part["type"], "null"]}
    if get_origin(annotation) is Literal:
        return {"const": get_args(annotation)[0]}
    if is_dataclass(annotation):
        return {"$ref": f"#/$defs/{annotation.__name__}"}
    if (get_origin(annotation) or annotation) is Mapping:
        return {"type": "object"}
    if get_origin(annotation) is Annotated:
        kind, option = get_args(annotation)
        return type_of(kind) | limits(option, is_text=kind is str)
    if get_origin(annotation) is tuple and ... in get_args(annotation):
        return {"type": "array", "items": type_of(get_args(annotation)[0])}
    if get_origin(annotation) is tuple:
        items = [type_of(item) for item in get_args(annotation)]
        num = {"minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "prefixItems": items, **num}
    kinds = {
        str: {"type": "string", "minLength": 1},
        int: {"type": "integer"},
        bool: {"type": "boolean"},
    }
    return dict(kinds.get(annotation, NUMBERS))


def limits(option: Option, *, is_text: bool) -> dict[str, Any]:
    """Return what an option's declaration says beyond its type, without its choices."""
    found = {
        "minLength" if is_text else "minimum": option.at_least,
        "exclusiveMinimum": option.above,
        "maximum": option.at_most,
        "exclusiveMaximum": option.below,
        "pattern": option.pattern,
    }
    return {name: limit for name, limit in found.items() if limit is not None}


def choices(option: Option, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return which texts an option can hold, besides null where its type allows it."""
    if not option.choices:
        return {}
    if option.pattern:
        return {"anyOf": [{"enum": list(option.choices)}, {"pattern": option.pattern}]}
    null = [None] if "null" in schema["type"] else []
    return {"enum": [*option.choices, *null]}


def properties(kind: type, **others: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a class's fields; `others` replaces what annotations do not tell."""
    hints, said = get_type_hints(kind, include_extras=True), descriptions(kind)
    options = options_of(kind)
    found: dict[str, Any] = {}
    for field in fields(kind):
        # Where a recipe stands is not written in it, and its policy is two keys.
        if kind is Recipe and field.name in ("directory", "policy"):
            continue
        schema = dict(others.get(field.name) or type_of(hints[field.name]))
        if field.name in options:
            declared = options[field.name]
            option, is_object = declared.option, declared.type not in (str, int, float, bool)
            found_limits = limits(option, is_text=declared.type is str)
            if is_object and "minimum" in found_limits:
                found_limits["minProperties"] = found_limits.pop("minimum")
            if option.choices:
                found_limits.pop("pattern", None)
            schema |= found_limits | choices(option, schema)
        if isinstance(field.default, str | int | float | bool) or field.default is None:
            schema["default"] = field.default
        name = "$schema" if (kind, field.name) == (Recipe, "schema") else field.name
        meaning = OTHER_WORDS.get((kind, field.name), said[field.name])
        found[name] = {"description": meaning, **schema}
    return found


def _object(**schema: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, **schema}


def _is(name: str, pattern: str) -> dict[str, Any]:
    """Return the schema of an object whose key has text of this pattern."""
    return {"required": [name], "properties": {name: {"type": "string", "pattern": pattern}}}


def _has(name: str, *values: str) -> dict[str, Any]:
    """Return the schema of an object whose key has one of these values."""
    return {"type": "object", "required": [name], "properties": {name: {"enum": list(values)}}}


def _given(name: str) -> dict[str, Any]:
    """Return the schema of an object that has this key, and not null."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe's config.json."""
    model = _object(
        description="One model. A key that is null is as good as left out.",
        properties=properties(ModelSpec, keep=PAIR_OF_COUNTS),
        allOf=[
            {"if": _given("same_as"), "then": {"maxProperties": 1}},
            {
                "if": _given("cut_of"),
                "then": {"allOf": [_given("keep"), _given("bridge"), {"not": _given("model")}]},
            },
            {"if": _given("api"), "then": _is("model", ADDRESS)},
            {"if": _given("llama_cpp"), "then": {"properties": {"model": {"pattern": GGUF}}}},
        ],
    )
    hints = get_type_hints(Policy, include_extras=True)
    # null leaves a policy and a schedule out, too.
    policy = properties(
        Policy,
        schedule=type_of(hints["schedule"]) | {"type": ["array", "null"]},
        name={"type": ["string", "null"]},
    )
    combine, policy = policy.pop("combine"), {"policy": policy.pop("name"), **policy}
    here = {"not": _is("model", ADDRESS)}  # Only a base can be behind an API.
    part = {"$ref": "#/$defs/ModelSpec"}
    return {
        "$schema": DRAFT,
        "title": "A proxytune recipe",
        "description": "Which models make a steered one: steered = base + alpha * (expert - anti_expert).",
        **_object(
            properties={
                "model_type": {
                    "description": "What transformers knows a recipe by.",
                    "const": MODEL_TYPE,
                },
                "architectures": {"description": "The same.", "default": [ARCHITECTURE]},
                **properties(
                    Recipe,
                    base={
                        "allOf": [part, _given("model")],
                        "properties": {
                            "adapter": {"type": "null"},
                            "same_as": {"type": "null"},
                            "cut_of": {"type": "null"},
                        },
                    },
                    experts={
                        "type": "array",
                        "minItems": 1,
                        "items": {"$ref": "#/$defs/ExpertSpec"},
                    },
                ),
                "combine": combine,
                "steering": {
                    "description": "How strongly to steer at each token.",
                    "anyOf": [{"$ref": "#/$defs/Policy"}, {"type": "null"}],
                },
                **{key: True for key in sorted(METADATA_KEYS)},
            },
            required=["model_type", "base", "experts"],
            allOf=[
                {
                    "if": {
                        "required": ["steering"],
                        "properties": {"steering": _has("policy", *PICKING)},
                    },
                    "then": {"properties": {"combine": {"const": "sum"}}},
                }
            ],
        ),
        "$defs": {
            "ExpertSpec": _object(
                description="One expert with its anti-expert.",
                properties=properties(
                    ExpertSpec,
                    expert={
                        "allOf": [part, here],
                        "anyOf": [_given(key) for key in ("model", "adapter", "same_as", "cut_of")],
                    },
                    anti_expert={
                        "allOf": [part, here],
                        "anyOf": [_given("model"), _given("same_as"), _given("cut_of")],
                    },
                    weights={"anyOf": [{"$ref": "#/$defs/ExpertWeights"}, {"type": "null"}]},
                ),
                required=["name", "expert", "anti_expert"],
            ),
            "ExpertWeights": _object(
                description="How strongly each model counts in what an expert adds.",
                properties=properties(ExpertWeights),
            ),
            "ModelSpec": model,
            "Policy": _object(
                description="How strongly to steer at each token.",
                properties=policy,
                allOf=[
                    *(
                        {"if": _given(k), "then": _has("policy", *users)}
                        for k, users in USERS.items()
                    ),
                    {"if": _given("implausible"), "then": _given("plausibility")},
                ],
            ),
            "LlamaCppSettings": _object(
                description="How llama.cpp runs a .gguf file.",
                properties=properties(LlamaCppSettings),
            ),
            "ApiSettings": _object(
                description="How a base behind an API is asked.", properties=properties(ApiSettings)
            ),
        },
    }


def key_table(name: str) -> str:
    """Return the keys of an object of the schema as a Markdown table; `Recipe` names the whole."""
    schema = recipe_schema()
    shown = schema if name == "Recipe" else schema["$defs"][name]
    lines = ["| key | value | if left out | meaning |", "| --- | --- | --- | --- |"]
    for key, value in shown["properties"].items():
        if value is True:
            continue
        default = "" if value.get("default") is None else f"`{_json(value['default'])}`"
        if key in shown.get("required", ()):
            default = "required"
        meaning = value["description"].replace("|", "\\|")
        lines.append(f"| `{key}` | {_kind(value)} | {default} | {meaning} |")
    return "\n".join(lines)


def _kind(schema: Mapping[str, Any]) -> str:
    """Return what a value may be, in words."""
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{_json(value)}`" for value in schema["enum"] if value is not None)
    if "$ref" in schema.get("items", {}):
        return "a list of [experts](#an-expert)"
    if "allOf" in schema:
        return "a [model](#a-model)"
    if "anyOf" in schema and "type" not in schema:
        return _kind(schema["anyOf"][0])
    if "$ref" in schema:
        place = {
            "ExpertWeights": "weights",
            "LlamaCppSettings": "llama_cpp",
            "ApiSettings": "api",
            "Policy": "steering",
        }[schema["$ref"].rsplit("/")[-1]]
        return f"[an object](#{place})"
    if isinstance(schema.get("default"), list):
        return "a list"
    kind = schema["type"] if isinstance(schema["type"], str) else schema["type"][0]
    return {
        "string": "text", "integer": "a whole number", "number": "a number", "boolean": "`true`, `false`",
        "object": "an object", "array": "a list",
    }[kind]  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value)
