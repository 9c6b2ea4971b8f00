"""How an option is declared: its help and its limits stand beside its type and its default, once.

    @dataclass(frozen=True)
    class Filters:
        top_p: float = option(1.0, "Sample from the most likely tokens", above=0, at_most=1)

        def __post_init__(self) -> None:
            check(self)

`check` refuses what a field cannot hold. The command line makes flags of the same declarations
(`commands/flags.py`), the server fields of its requests (`server/schema.py`), and a file of prompts the
options of its lines (`data/lines.py`).
"""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from proxytune.errors import InvalidRequest, did_you_mean


@dataclass(frozen=True, slots=True)
class Option:
    """What a type does not say of an option.

    Args:
        help: What it does, for `--help` and the HTTP schema: a phrase without a full stop.
        at_least: The lowest value that is taken; for text, its shortest length.
        above: A lower limit that is not taken itself.
        at_most: The highest value that is taken.
        below: An upper limit that is not taken itself.
        or_zero: Whether 0 is taken too, outside the limits.
        none_means: What None, or no values, stands for, in words; the help gives it as the default.
        flag: The name on the command line; None makes it from the field's name.
        metavar: What stands for the value in the help; None makes it from the type.
        separator: What separates several values in one argument; None for a flag that is repeated.
        choices: The texts that are taken, apart from those that match `pattern`.
        pattern: A regular expression that a text must match, as JSON Schema writes it.
        words: What a value must be, to follow "must be"; None makes them from the type and the limits.
        hint: What to do about another value.
    """

    help: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    or_zero: bool = False
    none_means: str | None = None
    flag: str | None = None
    metavar: str | None = None
    separator: str | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    words: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Declared:
    """An option as a field of a dataclass declares it.

    Args:
        name: Of the field.
        type: Of its value, apart from None: a class, a `Literal` or a `tuple[...]`.
        is_optional: Whether it may be None.
        default: Its value when left out; `dataclasses.MISSING` if it may not be left out.
        option: What else is declared.
    """

    name: str
    type: Any
    is_optional: bool
    default: Any
    option: Option

    @property
    def values(self) -> str:
        """The values it can hold, apart from None, in words that follow "must be"."""
        return self.option.words or _expected(self.type, self.option)

    def check(self, value: object, name: str | None = None) -> None:
        """Check one value.

        Args:
            value: Of the field.
            name: What the caller calls it; None for the field's name.

        Raises:
            InvalidRequest: The field cannot hold it.
        """
        if not self.holds(value):
            # A flag has no value None; it is left out.
            none = ", or None" if self.is_optional and name is None else ""
            expected = self.expected(value, none)
            raise InvalidRequest(f"{name or self.name} is {value!r}, and must be {expected}")

    def holds(self, value: object) -> bool:
        """Whether the field can hold a value."""
        if value is self.default or (value is None and self.is_optional):
            return True
        return _holds(self.type, self.option, value)

    def expected(self, value: object, none: str = "") -> str:
        """Return what the field holds, to follow "must be", and a hint about `value` if there is one."""
        words = self.values + none
        hint = self.option.hint or ""
        if self.option.choices and isinstance(value, str):
            return words + did_you_mean(value, self.option.choices, otherwise=hint)
        return f"{words}.\nhint: {hint}" if hint else words

    def from_json(self, value: Any) -> Any:
        """Return a JSON value as the field holds it: its lists and objects as tuples."""
        return _from_json(self.type, value)


def declared(help: str | Option, **rest: Any) -> dict[str, Option]:
    """Return the metadata of a dataclass's field that is an option.

    Args:
        help: What it does, or the whole option where several dataclasses declare the same one.
        rest: Everything else; see `Option`.
    """
    return {"option": help if isinstance(help, Option) else Option(help, **rest)}


def option(default: Any, help: str | Option, **rest: Any) -> Any:
    """Return a dataclass's field that is an option with this default; see `declared`."""
    return field(default=default, metadata=declared(help, **rest))


@cache
def options_of(settings: type) -> Mapping[str, Declared]:
    """Return the options that a dataclass declares, by name; its other fields are none."""
    found = {}
    for each in fields(settings):
        if "option" not in each.metadata:
            continue
        kind = each.type
        if isinstance(kind, str):
            # As typing.get_type_hints does, which would evaluate the other fields as well.
            kind = eval(kind, vars(sys.modules[settings.__module__]))
        alternatives = [kind]
        if get_origin(kind) in (Union, types.UnionType):
            alternatives = [one for one in get_args(kind) if one is not type(None)]
        found[each.name] = Declared(
            name=each.name,
            type=alternatives[0],
            is_optional=type(None) in get_args(kind),
            default=each.default,
            option=each.metadata["option"],
        )
    return types.MappingProxyType(found)


def check(settings: Any) -> None:
    """Check every option of a dataclass by its declaration.

    Raises:
        InvalidRequest: A field cannot hold its value; the message begins with the field's name.
    """
    for each in options_of(settings.__class__).values():
        each.check(getattr(settings, each.name))


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no bool."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # A whole number beyond every float.
        return False


def _split(annotation: Any) -> tuple[Any, Option]:
    """Return a type and the `Option` it is annotated with."""
    if get_origin(annotation) is Annotated:
        plain, *notes = get_args(annotation)
        return plain, next(note for note in notes if isinstance(note, Option))
    return annotation, Option()


def _items(kind: Any) -> tuple[list[tuple[Any, Option]], bool]:
    """Return what the items of a tuple are, and whether there may be any number of the first."""
    items = get_args(kind)
    return [_split(item) for item in items if item is not ...], ... in items


def _holds(kind: Any, option: Option, value: Any) -> bool:
    if get_origin(kind) is tuple:
        items, is_any_number = _items(kind)
        if not isinstance(value, tuple) or not (is_any_number or len(value) == len(items)):
            return False
        declared = items * len(value) if is_any_number else items
        return all(_holds(*item, part) for item, part in zip(declared, value, strict=True))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is bool:
        return isinstance(value, bool)
    if kind is str and (option.choices or option.pattern):
        return isinstance(value, str) and _is_among(option, value)
    if get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and len(value) >= (option.at_least or 0)
    if kind is str and option.at_least is not None:
        return isinstance(value, str) and len(value) >= option.at_least
    if kind is int:
        return is_number(value) and isinstance(value, int) and _is_within(option, value)
    if kind is float:
        return is_number(value) and _is_within(option, value)
    return True


def _is_among(option: Option, text: str) -> bool:
    if text in option.choices:
        return True
    # In Python `$` would let a line end pass.
    pattern = re.sub(r"\$$", r"\\Z", option.pattern or "")
    return bool(pattern) and re.search(pattern, text) is not None


def _is_within(option: Option, value: float) -> bool:
    return (option.or_zero and value == 0) or (
        (option.at_least is None or value >= option.at_least)
        and (option.above is None or value > option.above)
        and (option.at_most is None or value <= option.at_most)
        and (option.below is None or value < option.below)
    )


def _expected(kind: Any, option: Option) -> str:
    """Return what a field can hold, in words that follow "must be"."""
    if get_origin(kind) is tuple:
        items, is_any_number = _items(kind)
        parts = " and ".join(_expected(*item) for item in items)
        return f"a tuple, each item {parts}" if is_any_number else f"a pair of {parts}"
    if get_origin(kind) is Literal:
        *first, last = get_args(kind)
        return f"{', '.join(first)} or {last}"
    if kind is bool:
        return "true or false"
    if option.choices:
        return f"one of {', '.join(option.choices)}"
    if kind is str and option.at_least is not None:
        return "text that is not empty"
    if kind not in (int, float):
        return "text"
    zero = "0, or " if option.or_zero else ""
    noun = "a whole number" if kind is int else "a finite number"
    low, high = option.at_least, option.at_most
    if low is not None and high is not None:
        return f"{zero}{noun} from {_digits(low)} to {_digits(high)}"
    named = {"of at least": low, "above": option.above, "at most": high, "below": option.below}
    limits = [f"{words} {_digits(limit)}" for words, limit in named.items() if limit is not None]
    return f"{zero}{noun} {' and '.join(limits)}".rstrip()


def _digits(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _from_json(kind: Any, value: Any) -> Any:
    if get_origin(kind) is not tuple:
        return value
    items, is_any_number = _items(kind)
    if is_any_number and isinstance(value, str) and items[0][0] is str:
        return (value,)
    if isinstance(value, Mapping):
        # JSON's keys are text.
        is_number = re.compile(r"-?\d+").fullmatch
        value = [[int(k) if is_number(str(k)) else k, own] for k, own in value.items()]
    if not isinstance(value, list):
        return value
    kinds = items * len(value) if is_any_number else items
    if len(kinds) != len(value):
        return tuple(value)
    return tuple(_from_json(item[0], part) for item, part in zip(kinds, value, strict=True))
