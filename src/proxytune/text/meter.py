"""What rendering one template may cost: seconds, bytes, and the sizes of the values it makes.

A template is a program from a stranger. Python cannot interrupt `"a" * 10**10` or the comparison of two
deeply nested lists, so each operation is made small instead: no value that a template holds is larger than
`MAX_BYTES` or nested deeper than `MAX_DEPTH`, counted as often as it occurs in another. Anything that Python
does with such values ends within a fraction of a second, and between any two the clock is read.

Sizes are estimates from above of what Python keeps: `NODE_BYTES` for each value, plus the text of strings.
Memory that is given back during a rendering still counts towards `MAX_BYTES_MADE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from sys import getsizeof
from time import monotonic
from typing import Any

MAX_SECONDS = 2.0
"""Of the wall clock, for compiling a template and for each rendering."""
MAX_BYTES = 16 * 2**20
"""Of the rendered text, and of any value on the way to it."""
MAX_BYTES_MADE = 8 * MAX_BYTES
"""Of all values that one rendering makes; templates copy a message about ten times."""
MAX_DEPTH = 100
"""Of lists and dicts within each other."""
MAX_INT_BITS = 2**14
"""More digits than Python converts to text (`sys.int_info.default_max_str_digits`)."""
NODE_BYTES = 64
MAX_ITEMS = MAX_BYTES // NODE_BYTES
"""Of one list; follows from the bytes."""
MAX_KEY = 2**61 - 2
"""Integers beyond it can have the hash of another, and a dict of thousands of those takes minutes."""

_MB = 2**20
_CONTAINERS: tuple[type[Any], ...] = (
    list,
    tuple,
    dict,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


class TemplateRefused(Exception):
    """A template asks for more than it may use; the message is a clause about it."""


class Meter:
    """The account of one compilation or rendering."""

    def __init__(self) -> None:
        self._deadline = monotonic() + MAX_SECONDS
        self._made = 0
        # Size and nesting of each list and dict, by identity; kept alive, so that no identity is used twice.
        self._known: dict[int, tuple[Any, int, int]] = {}

    def tick(self) -> None:
        """Raise `TemplateRefused` once the time is over."""
        if monotonic() > self._deadline:
            raise TemplateRefused(f"takes more than {MAX_SECONDS:g} seconds")

    def expect(self, num_bytes: float) -> None:
        """Raise `TemplateRefused` if a value of this size may not be made, before it is."""
        self.tick()
        if num_bytes > MAX_BYTES:
            raise TemplateRefused(f"makes a text or list of more than {MAX_BYTES // _MB} MB")

    def charge(self, num_bytes: int) -> None:
        """Count what was made."""
        self._made += num_bytes
        if self._made > MAX_BYTES_MADE:
            raise TemplateRefused(f"makes more than {MAX_BYTES_MADE // _MB} MB of values in all")

    def size(self, value: Any) -> int:
        """Return the size of a value, what it contains included."""
        return self._measure(value, 0)[0]

    def height(self, value: Any) -> int:
        """Return how deeply lists and dicts are nested in a value; 0 for other values."""
        return self._measure(value, 0)[1]

    def _measure(self, value: Any, depth: int) -> tuple[int, int]:
        if isinstance(value, str):
            return getsizeof(value) + NODE_BYTES, 0
        if not isinstance(value, _CONTAINERS):
            return max(NODE_BYTES, getsizeof(value)) if isinstance(value, int) else NODE_BYTES, 0
        known = self._known.get(id(value))
        if known is not None:
            return known[1:]
        self.tick()
        if depth > MAX_DEPTH:
            raise TemplateRefused(f"nests lists deeper than {MAX_DEPTH} levels")
        size, height = NODE_BYTES, 0
        for child in chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            child_size, child_height = self._measure(child, depth + 1)
            size += child_size
            height = max(height, child_height)
            if size > MAX_BYTES:
                self.expect(size)
        return self._remember(value, size, height + 1)

    def _remember(self, value: Any, size: int, height: int) -> tuple[int, int]:
        if height > MAX_DEPTH:
            raise TemplateRefused(f"nests lists deeper than {MAX_DEPTH} levels")
        self._known[id(value)] = value, size, height
        return size, height

    def made(self, value: Any) -> Any:
        """Return a value that an operation made, after checking and charging it."""
        if isinstance(value, str):
            num_bytes = getsizeof(value)
            if num_bytes > MAX_BYTES:
                self.expect(num_bytes)
            self.charge(num_bytes)
        elif isinstance(value, (list, tuple, dict)):
            if id(value) not in self._known:
                if isinstance(value, dict):
                    check_keys(value)
                self.size(value)
                self.charge(NODE_BYTES * (4 + len(value)))  # what is known of it included
        elif isinstance(value, (set, frozenset)):
            raise TemplateRefused("makes a set")  # by subtracting keys of dicts
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise TemplateRefused("makes an integer of thousands of digits")
        return value

    def joined(self, left: Any, right: Any) -> Any:
        """Return the sum of two lists or two tuples."""
        (size, height), (more, other) = self._measure(left, 0), self._measure(right, 0)
        self.expect(size + more)
        self.charge(NODE_BYTES * (4 + len(left) + len(right)))
        # Many templates build a list item by item; measuring each sum anew would take quadratic time.
        value = left + right
        self._remember(value, size + more, max(height, other))
        return value

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items while there is time, and no more than a list may have."""
        for number, item in enumerate(items, start=1):
            self.tick()
            if number > MAX_ITEMS:
                self.expect(number * NODE_BYTES)
            yield item

    def text(self, value: Any) -> str:
        """Return the text of a value, as `str` does."""
        if isinstance(value, str):
            return value
        self.expect(self.size(value))
        return str(self.made(str(value)))


def check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys whose hashes a template can choose."""
    for key in keys:
        if isinstance(key, str | float | None) or (isinstance(key, int) and abs(key) <= MAX_KEY):
            continue
        raise TemplateRefused("uses a key of a dict that is neither text nor an ordinary number")


_CURRENT: ContextVar[Meter] = ContextVar("meter")
current = _CURRENT.get
"""Return the meter of what is being compiled or rendered."""


@contextmanager
def metered() -> Iterator[Meter]:
    """Give what is compiled or rendered inside a new meter, as `current`."""
    token = _CURRENT.set(Meter())
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)
