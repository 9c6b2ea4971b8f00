"""Renders the Jinja templates of tokenizers and recipes, as transformers does but within bounds.

Templates come from strangers. They get the language of transformers' chat templates: its extensions, its
whitespace rules, its `tojson`, `strftime_now` and `raise_exception`. Of Jinja's filters, tests, functions and
methods they get those that chat templates use, each with a check of what it would cost (`meter.py`).
There is no loader, so nothing can be included or imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from proxytune.text import library
from proxytune.text.library import ESCAPED, SHORT
from proxytune.text.meter import MAX_BYTES, MAX_INT_BITS, TemplateRefused, current, metered

MAX_SOURCE = 2**18
"""Characters of a template. The longest of 170 published chat templates has 19,600."""
MAX_TOKENS = 10_000
"""Tokens of Jinja's lexer in one template. The longest of those has 2,600."""
MAX_ADDED = MAX_SOURCE
"""Bytes that a template may write of its own; tokenising a megabyte takes seconds."""
MAX_GROWTH = 4
"""Bytes that it may write for each byte of what it sees, on top of that."""
_DICT_NAMES = frozenset(dir(dict))


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
    template = compiled(source, strict=strict)
    with metered() as meter:
        pieces, num_bytes, limit = [], 0, MAX_ADDED
        # Of each piece, and not of the text that they form together.
        overhead = "".__sizeof__()
        for piece in template.root_render_func(template.new_context(dict(variables))):
            num_bytes += piece.__sizeof__() - overhead
            if num_bytes > limit:
                limit = min(MAX_BYTES, MAX_ADDED + MAX_GROWTH * meter.size(dict(variables)))
                if num_bytes > limit:
                    raise TemplateRefused(f"writes more than {limit // 1024:,} kB for this prompt")
            pieces.append(piece)
        return "".join(pieces)


@lru_cache(maxsize=64)
def compiled(source: str, *, strict: bool) -> jinja2.Template:
    """Return a template ready to render; arguments as for `render`.

    Raises:
        TemplateRefused: It is too long.
        Exception: It is malformed, for Jinja or for Python's own parser.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateRefused(f"is longer than {MAX_SOURCE:,} characters")
    with metered():
        return _environment(strict).from_string(source)


@lru_cache(maxsize=64)
def names(source: str, *, strict: bool) -> frozenset[str]:
    """Return the names that a template uses; arguments and errors as for `compiled`."""
    if len(source) > MAX_SOURCE:
        raise TemplateRefused(f"is longer than {MAX_SOURCE:,} characters")
    with metered():
        return frozenset(n.name for n in _environment(strict).parse(source).find_all(nodes.Name))


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

    def fail(self, msg: str, lineno: int) -> NoReturn:
        for kind, known in (("filter", library.FILTERS), ("test", library.TESTS)):
            if msg.startswith(f"No {kind} named"):
                msg = f"{msg} Prompt templates have the {kind}s {', '.join(sorted(known))}"
        super().fail(msg, lineno)

    def _refused(self, node: nodes.Node, frame: Frame) -> NoReturn:
        tag = _REFUSED_TAGS[type(node)]
        raise jinja2.TemplateSyntaxError(f"{{% {tag} %}} is not for prompt templates", node.lineno)

    visit_Extends = visit_Include = visit_Import = visit_FromImport = visit_Block = _refused
    visit_ScopedEvalContextModifier = _refused


_REFUSED_TAGS: dict[type[nodes.Node], str] = {
    nodes.Block: "block",
    nodes.Extends: "extends",
    nodes.FromImport: "from",
    nodes.Import: "import",
    nodes.Include: "include",
    nodes.ScopedEvalContextModifier: "autoescape",
}


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
        self.filters = dict(library.FILTERS)
        self.tests = dict(library.TESTS)
        self.globals = dict(library.FUNCTIONS)
        self._callable = (*library.FUNCTIONS.values(), _Generation._body)

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
        meter = current()
        parts = parts if isinstance(parts, list) else list(parts)
        meter.expect(sum(map(len, parts)))
        return str(meter.made("".join(parts)))

    @staticmethod
    def concatenated(parts: tuple[Any, ...]) -> Any:
        """Return the text of `a ~ b`."""
        meter = current()
        texts = [part if isinstance(part, str) else meter.text(part) for part in parts]
        is_html = any(map(library.is_html, texts))
        meter.expect(sum(map(len, texts)) * (ESCAPED if is_html else 1))
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
            return attr in library.STR_METHODS
        if isinstance(obj, dict):
            return attr in library.DICT_METHODS
        if isinstance(obj, (list, tuple)):
            return attr in library.LIST_METHODS
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
            priced = library.STR_METHODS[name] if isinstance(owner, str) else None
            if isinstance(owner, str) and name == "format":
                return meter.made(library.formatted(__self, owner, *args, **kwargs))
            value = (
                __obj(*args, **kwargs) if priced is None else priced(__obj, owner, *args, **kwargs)
            )
            if isinstance(owner, str) and isinstance(value, (list, tuple)):
                meter.charge(meter.size(value))  # All of its parts are new.
            return meter.made(value)
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
                if len(left) + len(right) > SHORT:
                    meter.expect(len(left) + len(right))
                return meter.made(left + right)
            if isinstance(left, (list, tuple)) and type(left) is type(right):
                return meter.joined(left, right)
            if isinstance(left, str) and isinstance(right, str):
                meter.expect((len(left) + len(right)) * ESCAPED)
        elif operator == "%" and isinstance(left, str):
            library.check_percent(left, right)
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(value, (str, list, tuple)):
                size = len(value) if isinstance(value, str) else meter.size(value)
                meter.expect(size * max(0, times))
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
