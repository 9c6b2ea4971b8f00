"""What templates may call: filters, tests, functions and methods, each with a check of what it would cost.

A survey of 170 published chat templates decided what is here. All else of Jinja and Python is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import filters, tests
from jinja2.sandbox import (
    SandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
    safe_range,
)
from jinja2.utils import Namespace

from proxytune.text.meter import (
    MAX_BYTES,
    MAX_ITEMS,
    NODE_BYTES,
    TemplateRefused,
    check_keys,
    current,
)

_MAX_STRIPPED = 64
"""Different characters to strip; Python compares each with each character of the text."""
_MAX_DATE = 256
_MAX_PATH = 1000

# Methods of text, lists and dicts


SHORT = 4096
"""Characters whose handling is not worth reading the clock."""
ESCAPED = 6
"""Factor by which text can grow where it meets text marked as HTML: `"` becomes `&#34;`."""


def is_html(text: str) -> bool:
    """Whether a text is marked as HTML, so that what is added to it is escaped."""
    return hasattr(text, "__html__")


def _check_case(text: str) -> None:
    # One character may become three, and Python works with four bytes for each until it is done.
    current().expect(len(text) if text.isascii() else 3 * len(text))


def _check_stripped(chars: object) -> None:
    if isinstance(chars, str) and len(chars) > _MAX_STRIPPED:
        raise TemplateRefused(f"strips more than {_MAX_STRIPPED} different characters")


def _check_backwards(text: str, part: object) -> None:
    # Python searches forwards in linear time, but backwards it compares every place.
    if isinstance(part, str) and len(part) * len(text) > 2**28:
        raise TemplateRefused("searches backwards for a long text in a long text")


def _check_replace(text: str, old: str, new: str, count: int | None = None) -> None:
    times = text.count(old) if old else len(text) + 1
    if isinstance(count, int) and count >= 0:
        times = min(times, count)
    grown = len(new) * (ESCAPED if is_html(text) else 1) - len(old)
    current().expect(len(text) + times * max(0, grown))


def check_percent(text: str, values: object) -> None:
    """Refuse `text % values` if the widths in the text or the values make it too long."""
    meter = current()
    size = meter.size(values) * (text.count("%") if isinstance(values, Mapping) else 1)
    if is_html(text):
        size *= ESCAPED
    # Any number may be a width or a precision, also one among the values where there is a `*`.
    for match in re.finditer(r"\d+", text):
        meter.tick()
        size += int(match[0]) if len(match[0]) < 10 else MAX_BYTES
    if "*" in text and isinstance(values, tuple):
        size += sum(abs(value) for value in values if isinstance(value, int))
    meter.expect(len(text) + size)


def _cased(method: Callable[[], str], text: str) -> str:
    _check_case(text)
    return method()


def _stripped(method: Callable[..., str], text: str, chars: str | None = None, /) -> str:
    _check_stripped(chars)
    return method(chars)


def _found_backwards(method: Callable[..., Any], text: str, part: str, /, *ends: int) -> Any:
    _check_backwards(text, part)
    return method(part, *ends)


def _replaced(method: Callable[..., str], text: str, old: str, new: str, count: int = -1) -> str:
    if isinstance(old, str) and isinstance(new, str):
        _check_replace(text, old, new, count)
    return method(old, new, count)


def _split(
    method: Callable[..., list[str]], text: str, sep: str | None = None, maxsplit: int = -1
) -> list[str]:
    if len(text) < MAX_ITEMS:
        return method(sep, maxsplit)
    if method.__name__ == "rsplit":
        _check_backwards(text, sep)
    parts = method(sep, maxsplit if 0 <= maxsplit < MAX_ITEMS else MAX_ITEMS)
    current().expect(NODE_BYTES * len(parts))
    return parts


def _split_lines(method: Callable[..., list[str]], text: str, keepends: bool = False) -> list[str]:
    if len(text) >= MAX_ITEMS:
        current().expect(NODE_BYTES * sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")))
    return method(keepends)


def _joined(method: Callable[..., str], separator: str, items: Iterable[Any], /) -> str:
    meter = current()
    parts = list(meter.each(items))
    size = sum(map(meter.size, parts)) + len(parts) * len(separator)
    meter.expect(size * (ESCAPED if is_html(separator) else 1))
    return method(parts)


class _Formatter(SandboxedFormatter):
    """Formats as `str.format` does, counting what each field adds."""

    _num_bytes = 0

    def convert_field(self, value: Any, conversion: Any) -> Any:
        current().size(value)
        return current().made(super().convert_field(value, conversion))

    def format_field(self, value: Any, format_spec: str) -> Any:
        meter = current()
        if re.search(r"\d{5}", format_spec):
            raise TemplateRefused("formats a field wider than 9999 characters")
        meter.size(value)
        text = super().format_field(value, format_spec)
        self._num_bytes += len(text)
        meter.expect(self._num_bytes)
        return text


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """Formats text marked as HTML."""


def formatted(environment: SandboxedEnvironment, text: str, /, *args: Any, **kwargs: Any) -> str:
    """Return `text.format(...)`; its fields see what a template may see."""
    current().expect(NODE_BYTES * len(text))  # It is read character by character.
    plain: Any = text
    formatter: _Formatter = (
        _EscapeFormatter(environment, escape=plain.escape)
        if is_html(text)
        else _Formatter(environment)
    )
    return type(text)(formatter.vformat(text, args, kwargs))


STR_METHODS: dict[str, Callable[..., Any] | None] = {
    **dict.fromkeys(
        ("count", "endswith", "find", "index", "partition", "removeprefix", "removesuffix")
    ),
    **dict.fromkeys(("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isnumeric")),
    **dict.fromkeys(("islower", "isspace", "istitle", "isupper", "startswith")),
    **dict.fromkeys(("capitalize", "casefold", "lower", "swapcase", "title", "upper"), _cased),
    **dict.fromkeys(("lstrip", "rstrip", "strip"), _stripped),
    **dict.fromkeys(("rfind", "rindex", "rpartition"), _found_backwards),
    **dict.fromkeys(("rsplit", "split"), _split),
    "format": None,  # `formatted`, which needs the environment
    "join": _joined,
    "replace": _replaced,
    "splitlines": _split_lines,
}
"""What templates may call on text, and what calls it for them where its cost depends on the arguments."""
DICT_METHODS = frozenset(("copy", "get", "items", "keys", "values"))
LIST_METHODS = frozenset(("copy", "count", "index"))


# Functions


class _Namespace(Namespace):
    """A namespace that does not show what it holds: two that hold each other would fill the memory."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], _dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        current().charge(16 * NODE_BYTES)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace cannot have {name!r}, whose name begins with an underscore"
        )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(current().text(message))


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_DATE:
        raise TemplateRefused(f"formats a date by more than {_MAX_DATE} characters")
    return datetime.now().strftime(format)


def _dict(*args: Any, **kwargs: Any) -> Any:
    meter = current()
    if args and not isinstance(args[0], dict):
        pairs = list(meter.each(args[0]))
        check_keys(pair[0] for pair in pairs)
        args = (pairs, *args[1:])
    return meter.made(dict(*args, **kwargs))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dict": _dict,
    "namespace": _Namespace,
    "raise_exception": _raise_exception,
    "range": safe_range,
    "strftime_now": _strftime_now,
}


# Filters and tests


_JINJA_TESTS: dict[str, Callable[..., Any]] = dict(tests.TESTS)  # type: ignore[arg-type]


def _metered(
    function: Callable[..., Any], check: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """Return a filter or test whose arguments are checked before, and whose result is counted."""
    num_passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        meter = current()
        meter.tick()
        if check is not None:
            check(*args[num_passed:], **kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _Items(result)
        return meter.made(result)

    return counted


class _Items:
    """What a filter yields, item by item as it is asked for."""

    def __init__(self, items: Iterator[Any]) -> None:
        current().charge(16 * NODE_BYTES)  # a generator has a frame
        self._items = current().each(items)

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> Any:
        return current().made(next(self._items))


def _check_text_case(value: Any) -> None:
    _check_case(current().text(value))


def _check_short(value: Any) -> None:
    current().expect(NODE_BYTES * len(current().text(value)))


def _check_trim(value: Any, chars: Any = None) -> None:
    _check_stripped(chars)


def _check_items(*args: Any, attribute: Any = None, **kwargs: Any) -> None:
    if isinstance(args[0], str):
        current().expect(NODE_BYTES * len(args[0]))
    # An attribute is a path such as `function.name`, looked up in each item. It comes before other texts.
    path = next((arg for arg in (attribute, *args[1:]) if isinstance(arg, str)), "")
    if len(path) > _MAX_PATH:
        raise TemplateRefused(f"looks up an attribute of more than {_MAX_PATH} characters")


def _check_indent(text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    num = len(width) if isinstance(width, str) else width
    current().expect(
        len(text) + num * (2 + sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")))
    )


def _check_number(value: Any, default: Any = 0, base: Any = 10) -> None:
    if isinstance(value, str) and len(value) > SHORT:
        raise TemplateRefused(f"reads a number of more than {SHORT} characters")


def _check_round(value: Any, precision: Any = 0, method: Any = "common") -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"cannot round {type(value).__name__!r}")
    if abs(precision) > 300:
        raise TemplateRefused("rounds to more than 300 digits")


def _check_escape(value: Any) -> None:
    current().expect(current().size(value) * ESCAPED)


def _check_format(value: Any, *args: Any, **kwargs: Any) -> None:
    check_percent(current().text(value), kwargs or args)


def _check_arithmetic(value: Any, *args: Any) -> None:
    if isinstance(value, str):  # `%` would format it.
        raise TypeError("a text is neither even nor odd")


def _list(value: Any) -> list[Any]:
    return list(current().each(value))


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
    meter = current()
    if attribute is not None:
        _check_items(value, attribute=attribute)
        value = map(filters.make_attrgetter(context.environment, attribute), value)
    parts = list(meter.each(value))
    meter.expect(sum(map(meter.size, parts)) + len(parts) * meter.size(d))
    return filters.do_join(context, parts, d)


@jinja2.pass_eval_context
def _replace(context: Any, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = map(current().text, (s, old, new))
    _check_replace(str(text), old, new, count)
    return str(filters.do_replace(context, text, old, new, count))


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    meter = current()
    size, height = meter.size(x), meter.height(x)
    per_item = sum(map(len, separators)) if separators else 0
    if indent is not None:
        per_item += (len(indent) if isinstance(indent, str) else max(0, indent)) * (height + 1)
    # A control character becomes six.
    meter.expect(1.5 * size + per_item * (size / NODE_BYTES))
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


FILTERS: dict[str, Callable[..., Any]] = {
    # These return an item, a length or what they are given.
    "count": len,
    "d": filters.do_default,
    "default": filters.do_default,
    "first": filters.do_first,
    "last": filters.do_last,
    "length": len,
    "abs": _metered(abs),
    "capitalize": _metered(filters.do_capitalize, _check_text_case),
    "dictsort": _metered(filters.do_dictsort),
    "e": _metered(filters.FILTERS["escape"], _check_escape),
    "escape": _metered(filters.FILTERS["escape"], _check_escape),
    "float": _metered(filters.do_float, _check_number),
    "format": _metered(filters.do_format, _check_format),
    "indent": _metered(filters.do_indent, _check_indent),
    "int": _metered(filters.do_int, _check_number),
    "items": _metered(filters.do_items),
    "join": _metered(_join),
    "list": _metered(_list),
    "lower": _metered(filters.do_lower, _check_text_case),
    "map": _metered(filters.do_map, _check_items),
    "max": _metered(filters.do_max, _check_items),
    "min": _metered(filters.do_min, _check_items),
    "reject": _metered(filters.do_reject, _check_items),
    "rejectattr": _metered(filters.do_rejectattr, _check_items),
    "replace": _metered(_replace),
    "reverse": _metered(filters.do_reverse, _check_items),
    "round": _metered(filters.do_round, _check_round),
    "safe": _metered(filters.do_mark_safe),
    "select": _metered(filters.do_select, _check_items),
    "selectattr": _metered(filters.do_selectattr, _check_items),
    "sort": _metered(filters.do_sort, _check_items),
    "string": _metered(filters.FILTERS["string"]),
    "title": _metered(filters.do_title, _check_short),
    "tojson": _metered(_tojson),
    "trim": _metered(filters.do_trim, _check_trim),
    "unique": _metered(filters.do_unique, _check_items),
    "upper": _metered(filters.do_upper, _check_text_case),
}

TESTS: dict[str, Callable[..., Any]] = {
    **{
        name: _JINJA_TESTS[name]
        for name in (
            *("boolean", "defined", "false", "float", "integer", "iterable", "mapping", "none"),
            *("number", "sequence", "string", "true", "undefined"),
        )
    },
    **{
        name: _metered(_JINJA_TESTS[name])
        for name in (
            *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt"),
            *("in", "le", "lessthan", "lt", "ne", "sameas"),
        )
    },
    **{
        name: _metered(_JINJA_TESTS[name], _check_arithmetic)
        for name in ("divisibleby", "even", "odd")
    },
}
