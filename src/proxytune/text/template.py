"""Renders the Jinja templates of tokenizers and recipes, as transformers does but within bounds.

Templates come from strangers. They get the language of transformers' chat templates: its extensions, its
whitespace rules, its `tojson`, `strftime_now` and `raise_exception`. Of Jinja's filters, tests, functions and
methods they get those that chat templates use, each with a check of what it would cost (`meter.py`).
No loader is there, so nothing can be included or imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import filters, nodes, tests
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, safe_range
from jinja2.utils import Namespace
from markupsafe import EscapeFormatter, Markup, escape, soft_str

from proxytune.text.meter import (
    MAX_BYTES,
    MAX_INT_BITS,
    MAX_ITEMS,
    NODE_BYTES,
    TemplateRefused,
    check_keys,
    current,
    metered,
)

MAX_SOURCE = 2**20
"""Characters of a template; examples of a few-shot prompt may be long."""
MAX_TOKENS = 20_000
"""Tokens of Jinja's lexer in one template. The longest of 170 published chat templates has 4,100."""
_MAX_STRIPPED = 64
"""Different characters to strip; Python compares each with each character of the text."""
_MAX_DATE = 256


def render(source: str, variables: Mapping[str, Any], *, strict: bool) -> str:
    """Return the text of a template.

    Args:
        source: The template.
        variables: What it sees; lists, dicts, text, numbers and None. They stay as they are.
        strict: The template is a recipe's. An unknown variable is an error where it is written or looped over
            (otherwise it is nothing), and a newline at the template's end stays.

    Raises:
        TemplateRefused: It exceeds a bound.
        Exception: It fails in another way; a template may raise anything.
    """
    template = compiled(source, strict)
    with metered() as meter:
        pieces, num_bytes = [], 0
        overhead = "".__sizeof__()
        for piece in template.root_render_func(template.new_context(dict(variables))):
            num_bytes += piece.__sizeof__() - overhead
            if num_bytes > MAX_BYTES:
                meter.expect(num_bytes)
            pieces.append(piece)
        return "".join(pieces)


@lru_cache(maxsize=64)
def compiled(source: str, strict: bool) -> jinja2.Template:
    """Return a template ready to render; arguments as for `render`.

    Raises:
        TemplateRefused: It is too long.
        Exception: It is malformed, for Jinja or for Python's own parser.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateRefused(f"is longer than {MAX_SOURCE:,} characters")
    with metered():
        return _environment(strict).from_string(source)


@lru_cache(maxsize=2)
def _environment(strict: bool) -> _Environment:
    return _Environment(strict)


# What a template's own tags and operators cost


class _Code(CodeGenerator):
    """Generates Python code that asks the meter wherever the work or the memory depends on a value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loop_bodies: set[int] = set()

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        current().tick()
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        # A loop whose condition lets nothing pass has no turns, so the clock is read before it too.
        self.writeline("environment.tick()")
        self._loop_bodies.add(id(node.body))
        super().visit_For(node, frame)

    def blockvisit(self, body: Iterable[nodes.Node], frame: Frame) -> None:
        if id(body) in self._loop_bodies:
            self.writeline("environment.tick()")
        super().blockvisit(body, frame)

    def _around(
        self, function: str, write: Callable[..., None], node: nodes.Node, frame: Frame
    ) -> None:
        self.write(f"environment.{function}(")
        write(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        if all(isinstance(item, nodes.Const) for item in node.items):
            super().visit_List(node, frame)
        else:
            self._around("made", super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "store" or all(isinstance(item, nodes.Const) for item in node.items):
            super().visit_Tuple(node, frame)
        else:
            self._around("made", super().visit_Tuple, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._around("made", super().visit_Dict, node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        # To compare anything with a number, or whether it is equal to a short text, takes no time.
        ordinary = all(operand.op in ("eq", "ne") for operand in node.ops)
        if len(node.ops) == 1 and any(
            isinstance(operand, nodes.Const) and (ordinary or isinstance(operand.value, int))
            for operand in operands
        ):
            super().visit_Compare(node, frame)
        else:
            self._around("compared", super().visit_Compare, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._around("made", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        if isinstance(node.value, int):
            current().made(node.value)
        super().visit_Const(node, frame)

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        # Jinja would compute `{{ "a"|center(10**9) }}` while it compiles, outside all checks.
        if not isinstance(node, (nodes.TemplateData, nodes.Const)):
            raise nodes.Impossible()
        return super()._output_child_to_const(node, frame, finalize)

    def _refused(self, node: nodes.Node, frame: Frame) -> NoReturn:
        tag = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(node).__name__).lower()
        raise jinja2.TemplateSyntaxError(
            f"a prompt template cannot use {tag!r}: it is one text without others", node.lineno
        )

    visit_Extends = visit_Include = visit_Import = visit_FromImport = visit_Block = _refused
    visit_EvalContextModifier = visit_ScopedEvalContextModifier = visit_OverlayScope = _refused


class _Generation(Extension):
    """The tag `{% generation %}`, which marks an answer for training; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the tag up to its end."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @staticmethod
    def _body(caller: Macro) -> Any:
        return caller()


class _Counted(Extension):
    """Reads no more of a template than it may have."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """Yield the tokens of a template."""
        for number, token in enumerate(stream):
            current().tick()
            if number == MAX_TOKENS:
                raise TemplateRefused(f"has more than {MAX_TOKENS:,} Jinja tokens")
            yield token


class _Namespace(Namespace):
    """A namespace that does not show what it holds: two that hold each other would fill the memory."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        current().charge(NODE_BYTES * (16 + len(values)))
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


class _Unprintable(jinja2.Undefined):
    """An unknown variable: it may be tested, as chat templates do, but not shown or looped over.

    By default Jinja renders it as nothing, and a misspelt `{{ promt }}` would silently leave the prompt out.
    """

    __slots__ = ()
    __str__ = jinja2.Undefined._fail_with_undefined_error
    __iter__ = jinja2.Undefined._fail_with_undefined_error


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, with the meter around what it does."""

    code_generator_class = _Code
    intercepted_binops = frozenset(("+", "-", "*", "//", "**", "%"))

    def __init__(self, strict: bool) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=strict,
            undefined=_Unprintable if strict else jinja2.Undefined,
            extensions=[_Counted, _Generation, "jinja2.ext.loopcontrols"],
            finalize=_finalized,
            optimized=False,  # It would compute constants while compiling, outside all checks.
        )
        self.filters = dict(_FILTERS)
        self.tests = dict(_TESTS)
        self.globals = dict(_FUNCTIONS)
        self._callable = (*_FUNCTIONS.values(), _Generation._body)

    @staticmethod
    def tick() -> None:
        """Read the clock."""
        current().tick()

    @staticmethod
    def made(value: Any) -> Any:
        """Return a value after checking and counting it."""
        return current().made(value)

    @staticmethod
    def compared(value: Any) -> Any:
        """Return the result of a comparison, unless it was one too many."""
        current().tick()
        return value

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Return the text of a macro or block."""
        meter, parts = current(), list(parts)
        meter.expect(sum(map(len, parts)))
        return str(meter.made("".join(parts)))

    @staticmethod
    def concatenated(parts: tuple[Any, ...]) -> Any:
        """Return the text of `a ~ b`."""
        meter = current()
        texts = [part if isinstance(part, str) else meter.text(part) for part in parts]
        is_markup = any(isinstance(text, Markup) for text in texts)
        meter.expect(sum(map(len, texts)) * (_ESCAPED if is_markup else 1))
        return meter.made(jinja2.runtime.str_join(texts))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return `obj.attribute` as Jinja does; most often it is a field of a message."""
        if type(obj) is dict and attribute not in _DICT_NAMES:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return `obj[argument]` as Jinja does."""
        if type(obj) is not dict or type(argument) is not str:
            current().tick()
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may see an attribute: methods of data by name, those of loops and macros."""
        if isinstance(obj, str):
            return attr in _STR_METHODS
        if isinstance(obj, dict):
            return attr in _DICT_METHODS
        if isinstance(obj, (list, tuple)):
            return attr in _LIST_METHODS
        return isinstance(obj, (LoopContext, Macro, Namespace)) and not attr.startswith("_")

    def wrap_str_format(self, value: Any) -> None:
        """Leave the method `format` to `call`."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a macro, a function or a method that templates may call."""
        meter = current()
        meter.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, (BuiltinMethodType, MethodType)) and isinstance(
            owner, (str, dict, list, tuple)
        ):
            for name in ("_loop_vars", "_block_vars"):
                kwargs.pop(name, None)
            name = __obj.__name__
            if not __self.is_safe_attribute(owner, name, __obj):
                raise jinja2.exceptions.SecurityError(f"a prompt template cannot call {name!r}")
            priced = _STR_METHODS[name] if isinstance(owner, str) else None
            if priced is not None:
                return meter.made(priced(__obj, owner, *args, **kwargs))
            return meter.made(__obj(*args, **kwargs))
        if not (
            isinstance(__obj, (Macro, LoopContext, jinja2.Undefined))
            or isinstance(owner, LoopContext)
            or any(__obj is function for function in __self._callable)
        ):
            raise jinja2.exceptions.SecurityError(
                f"a prompt template cannot call {type(__obj).__name__!r}"
            )
        return __context.call(__obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return `left operator right`, if its size is allowed."""
        meter = current()
        if operator == "+":
            if type(left) is str and type(right) is str:
                if len(left) + len(right) > _SHORT:
                    meter.expect(len(left) + len(right))
                return meter.made(left + right)
            if isinstance(left, (list, tuple)) and type(left) is type(right):
                return meter.joined(left, right)
            if isinstance(left, str) and isinstance(right, str):
                meter.expect((len(left) + len(right)) * _ESCAPED)
        elif operator == "%" and isinstance(left, str):
            _check_percent(left, right)
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(value, (str, list, tuple)):
                meter.expect(meter.size(value) * max(0, times))
        elif (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * right > 2 * MAX_INT_BITS
        ):
            raise TemplateRefused("makes an integer of thousands of digits")
        return meter.made(super().call_binop(context, operator, left, right))


def _finalized(value: Any) -> Any:
    return value if type(value) is str else current().text(value)


# Methods of text, lists and dicts


_SHORT = 4096
"""Characters whose handling is not worth reading the clock."""
_ESCAPED = 6
"""Factor by which text can grow where it meets text marked as HTML: `"` becomes `&#34;`."""


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
    grown = len(new) * (_ESCAPED if isinstance(text, Markup) else 1) - len(old)
    current().expect(len(text) + times * max(0, grown))


def _check_percent(text: str, values: object) -> None:
    """Refuse `text % values` if the widths in the text or the values make it too long."""
    meter = current()
    size = meter.size(values) * (text.count("%") if isinstance(values, Mapping) else 1)
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
    meter.expect(size * (_ESCAPED if isinstance(separator, Markup) else 1))
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


class _EscapeFormatter(_Formatter, EscapeFormatter):
    """Formats text marked as HTML."""


def _formatted(method: Callable[..., str], text: str, /, *args: Any, **kwargs: Any) -> str:
    environment = _environment(strict=False)  # for the attributes and items that fields may name
    formatter: _Formatter
    if isinstance(text, Markup):
        formatter = _EscapeFormatter(environment, escape=text.escape)
    else:
        formatter = _Formatter(environment)
    return type(text)(formatter.vformat(text, args, kwargs))


_STR_METHODS: dict[str, Callable[..., Any] | None] = {
    **dict.fromkeys(
        ("count", "endswith", "find", "index", "partition", "removeprefix", "removesuffix")
    ),
    **dict.fromkeys(("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isnumeric")),
    **dict.fromkeys(("islower", "isspace", "istitle", "isupper", "startswith")),
    **dict.fromkeys(("capitalize", "casefold", "lower", "swapcase", "title", "upper"), _cased),
    **dict.fromkeys(("lstrip", "rstrip", "strip"), _stripped),
    **dict.fromkeys(("rfind", "rindex", "rpartition"), _found_backwards),
    **dict.fromkeys(("rsplit", "split"), _split),
    "format": _formatted,
    "join": _joined,
    "replace": _replaced,
    "splitlines": _split_lines,
}
"""What templates may call on text, and what calls it for them where its cost depends on the arguments."""
_DICT_METHODS = frozenset(("copy", "get", "items", "keys", "values"))
_LIST_METHODS = frozenset(("copy", "count", "index"))
_DICT_NAMES = frozenset(dir(dict))


# Functions


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


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


_FUNCTIONS: dict[str, Callable[..., Any]] = {
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
            return map(meter.made, meter.each(result))
        return meter.made(result)

    return counted


def _check_text_case(value: Any) -> None:
    _check_case(current().text(value))


def _check_short(value: Any) -> None:
    current().expect(NODE_BYTES * len(current().text(value)))


def _check_trim(value: Any, chars: Any = None) -> None:
    _check_stripped(chars)


def _check_items(*args: Any, attribute: Any = None, **kwargs: Any) -> None:
    if isinstance(args[0], str):
        current().expect(NODE_BYTES * len(args[0]))
    # An attribute is a path such as `function.name`, looked up in each item.
    for path in (attribute, *args[1:4]):
        if isinstance(path, str) and len(path) > _SHORT and re.search(r"[.,]", path):
            raise TemplateRefused(f"passes a filter a text of more than {_SHORT} characters")


def _check_indent(text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    num = len(width) if isinstance(width, str) else width
    current().expect(
        len(text) + num * (2 + sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")))
    )


def _check_number(value: Any, default: Any = 0, base: Any = 10) -> None:
    if isinstance(value, str) and len(value) > _SHORT:
        raise TemplateRefused(f"reads a number of more than {_SHORT} characters")


def _check_round(value: Any, precision: Any = 0, method: Any = "common") -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"cannot round {type(value).__name__!r}")
    if abs(precision) > 300:
        raise TemplateRefused("rounds to more than 300 digits")


def _check_escape(value: Any) -> None:
    current().expect(current().size(value) * _ESCAPED)


def _check_format(value: Any, *args: Any, **kwargs: Any) -> None:
    _check_percent(current().text(value), kwargs or args)


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


_FILTERS: dict[str, Callable[..., Any]] = {
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
    "e": _metered(escape, _check_escape),
    "escape": _metered(escape, _check_escape),
    "float": _metered(filters.do_float, _check_number),
    "format": _metered(filters.do_format, _check_format),
    "indent": _metered(filters.do_indent, _check_indent),
    "int": _metered(filters.do_int, _check_number),
    "items": _metered(filters.do_items),
    "join": _metered(_join),
    "list": _metered(_list),
    "lower": _metered(filters.do_lower, _check_text_case),
    "map": _metered(filters.do_map, _check_items),
    "reject": _metered(filters.do_reject, _check_items),
    "rejectattr": _metered(filters.do_rejectattr, _check_items),
    "replace": _metered(_replace),
    "reverse": _metered(filters.do_reverse, _check_items),
    "round": _metered(filters.do_round, _check_round),
    "safe": _metered(filters.do_mark_safe),
    "select": _metered(filters.do_select, _check_items),
    "selectattr": _metered(filters.do_selectattr, _check_items),
    "sort": _metered(filters.do_sort, _check_items),
    "string": _metered(soft_str),
    "title": _metered(filters.do_title, _check_short),
    "tojson": _metered(_tojson),
    "trim": _metered(filters.do_trim, _check_trim),
    "unique": _metered(filters.do_unique, _check_items),
    "upper": _metered(filters.do_upper, _check_text_case),
}

_TESTS: dict[str, Callable[..., Any]] = {
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
