"""Valid files changed at random, and a child process that shows whether a reader survives them.

    counts = read_mutants(range(100), lambda random: mutate_json(valid, random), read)

`read` gets each mutant in turn. It must return, or raise a `UserError`, within `SECONDS` and `MEMORY_BYTES`;
anything else fails with the seed that makes the mutant again. Everything follows from the seeds.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from proxytune.errors import UserError

Mutant = TypeVar("Mutant")

SECONDS = 5
"""The time that a mutant may take."""

MEMORY_BYTES = 1 << 30
"""The memory that it may take, on top of what the process has when it begins."""


# JSON ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """A piece of JSON as text, for what Python's writer would refuse."""

    text: str


@dataclass
class Pairs:
    """An object that may have a key twice."""

    items: list[tuple[str, Any]]


HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**32 + 1, 2**63, 2**64, -(2**63) - 1, 10**9, 10**30,
    Raw("9" * 200), Raw("9" * 5000), 0.5, -0.0, 2.0, 1e-320, 1e308,
    Raw("1e999"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"),
    "", " ", "x", "0", "1e9", "None", "a" * 100_000, "a\0b", "\ud800", "\x1b]0;title\x07", "é" * 300,
    "../../../etc/passwd", "/dev/zero", "/etc/passwd", "..\\x", "a/b", "~", "package:os/x", "http://h/v1",
    "(.+)+x", "(a|b|.)+(c|.)+(.|.)+X", "(", "[", "*", "(?R)", "a{1000000}", "{{ prompt }}", "{% for",
    [], {}, [None], [[]], [0], [-1], [True], ["x"], [10**30], [Raw("1e999")], [{}], {"": 0}, {"a": {}},
    {"(.+)+x": 1}, list(range(2000)), ["x"] * 2000, {str(number): number for number in range(2000)},
    Raw("[" * 50 + "]" * 50), Raw("[" * 5000 + "]" * 5000), Raw('{"a":' * 5000 + "1" + "}" * 5000),
)  # fmt: skip
"""What a value is replaced by: other types, extremes, paths, patterns, templates, depth, length."""


def json_text(value: Any) -> str:
    """Return JSON with `Raw` and `Pairs` in it."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        value = Pairs(list(value.items()))
    if isinstance(value, Pairs):
        items = (f"{json.dumps(key)}: {json_text(item)}" for key, item in value.items)
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value)


def mutate_json(value: Any, random: Random, *, num_changes: int = 3) -> str:
    """Return a JSON text made of a valid value by one to `num_changes` changes.

    Each change goes down from the top to a random place, so that the few keys at the top are changed as often
    as the many items of a long list.
    """
    value = _copy(value)
    for _ in range(random.randint(1, num_changes)):
        value = _changed(value, random)
    text = json_text(value)
    if random.random() < 0.03:
        return text[: random.randrange(len(text))]
    return text


def _copy(value: Any) -> Any:
    """Return a copy whose objects are `Pairs`."""
    if isinstance(value, dict):
        return Pairs([(key, _copy(item)) for key, item in value.items()])
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _hostile(random: Random) -> Any:
    """Return a copy of a hostile value: a later change may go on inside it."""
    return _copy(random.choice(HOSTILE_VALUES))


def _changed(value: Any, random: Random) -> Any:
    """Return a value with one change somewhere in it."""
    items = value.items if isinstance(value, Pairs) else value
    if not isinstance(items, list) or not items:
        return _replacement(value, random)
    place = random.randrange(len(items))
    if random.random() < 0.55:  # go on downwards
        if isinstance(value, Pairs):
            key, item = items[place]
            items[place] = key, _changed(item, random)
        else:
            items[place] = _changed(items[place], random)
        return value
    other = random.randrange(len(items))
    change = random.choice(
        ("replace", "replace", "delete", "repeat", "swap", "insert", "rename", "many")
    )
    if change == "delete":
        del items[place]
    elif change == "repeat":
        items.insert(other, items[place])
    elif change == "many" and len(items) < 100:
        items.extend([items[place]] * random.choice((10, 1000)))
    elif isinstance(value, Pairs):
        _change_pairs(items, change, place, other, random)
    elif change == "swap":
        items[place], items[other] = items[other], items[place]
    elif change == "insert":
        items.insert(place, _hostile(random))
    else:
        items[place] = _replacement(items[place], random)
    return value


def _change_pairs(
    items: list[tuple[str, Any]], change: str, place: int, other: int, random: Random
) -> None:
    key, item = items[place]
    if change == "swap":
        items[place], items[other] = (key, items[other][1]), (items[other][0], item)
    elif change == "insert":
        name = random.choice(("unknown", "", "a" * 1000, "\ud800", key))
        items.insert(other, (name, _hostile(random)))
    elif change == "rename":
        names = (key + "x", key[:-1], key.upper(), "", "../" + key, "/" + key, items[other][0])
        items[place] = random.choice(names), item
    else:
        items[place] = key, _replacement(item, random)


def _replacement(value: Any, random: Random) -> Any:
    """Return a hostile value, or for a number or text often a near one."""
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.4:
        return random.choice(
            (value + 1, value - 1, -value, value * 1000, value * 10**12, value / 3)
        )
    if isinstance(value, str) and value and random.random() < 0.4:
        return random.choice((value[:-1], value * 50, value.upper(), value + "\0", [value], 3))
    return _hostile(random)


# Binary files ----------------------------------------------------------------------------------------

EXTREMES = (0, 1, 2, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
"""Lengths and counts that overflow, run past the end, or claim all memory."""


def mutate_bytes(
    content: bytes, random: Random, *, within: int | None = None, num_changes: int = 3
) -> bytes:
    """Return a file with bytes flipped, cut out, inserted, or overwritten by extreme lengths.

    Args:
        content: A valid file.
        random: Draws the changes.
        within: The part that is changed, from the start; None for all of it.
        num_changes: Maximum number of changes.
    """
    changed = bytearray(content)
    lengths = _places_of_lengths(content[:within])
    for _ in range(random.randint(1, num_changes)):
        end = max(min(within or len(changed), len(changed)), 1)
        place = random.randrange(end)
        kind = random.choice(
            ("flip", "flip", "cut", "remove", "insert", "number", "length", "length")
        )
        if kind == "flip" and changed:
            changed[min(place, len(changed) - 1)] ^= 1 << random.randrange(8)
        elif kind == "cut" and random.random() < 0.3:
            del changed[place:]
        elif kind == "remove":
            del changed[place : place + random.choice((1, 4, 8, 100))]
        elif kind == "insert":
            changed[place:place] = random.randbytes(random.choice((1, 4, 8, 100)))
        else:
            if kind == "length" and lengths:
                place = random.choice(lengths)
            number = random.choice(EXTREMES)
            size = 8 if number >= 2**32 else random.choice((4, 8))
            changed[place : place + size] = number.to_bytes(size, "little")
    return bytes(changed)


def _places_of_lengths(header: bytes) -> list[int]:
    """Return where eight bytes look like a small number, as lengths and counts do."""
    return [
        place
        for place in range(len(header) - 7)
        if header[place] and header[place + 2 : place + 8] == bytes(6)
    ]


def mutate_safetensors(content: bytes, random: Random) -> bytes:
    """Return a safetensors file whose header's JSON is changed, or any of its bytes."""
    length = struct.unpack_from("<Q", content)[0]
    if random.random() < 0.3:
        return mutate_bytes(content, random, within=8 + length)
    text = mutate_json(json.loads(content[8 : 8 + length]), random)
    header = text.encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


_GGUF_VALUES: tuple[bytes, ...] = (
    *(struct.pack("<II", 4, number) for number in (0, 1, 7, 2**15, 2**31, 2**32 - 1)),
    *(struct.pack("<IQ", 10, number) for number in (0, 2**32, 2**63, 2**64 - 1)),
    *(struct.pack("<Ii", 5, number) for number in (-1, -(2**31))),
    *(struct.pack("<If", 6, number) for number in (0.0, -1.0, 1e38, float("nan"), float("inf"))),
    struct.pack("<I?", 7, True),
    struct.pack("<IQ", 8, 0),
    struct.pack("<IQ", 8, 5) + b"llama",
    struct.pack("<IQ", 8, 4) + b"\xff\0\xff{",
    struct.pack("<IQ", 8, 2**63),
    struct.pack("<IIQ", 9, 8, 0),
    struct.pack("<IIQ", 9, 8, 2) + 2 * (struct.pack("<Q", 1) + b"a"),
    struct.pack("<IIQ", 9, 4, 3) + struct.pack("<III", 1, 2, 3),
    struct.pack("<IIQ", 9, 4, 2**40),
    struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 4, 0),
)
"""Values of other types and sizes, as a GGUF header has them: the number of the type first."""


def mutate_gguf(content: bytes, random: Random) -> bytes:
    """Return a GGUF file whose header's values are changed, left out or given twice, or any of its bytes."""
    values = _gguf_values(content)
    if random.random() < 0.4:
        end = values[-1][0] + len(values[-1][1]) + 4096
        return mutate_bytes(content, random, within=end)
    data = values[-1][0] + len(values[-1][1])
    pairs = [(content[begin - length : begin], value) for begin, value, length in values]
    for _ in range(random.randint(1, 3)):
        place = random.randrange(len(pairs))
        key, value = pairs[place]
        change = random.choice(("replace", "replace", "replace", "delete", "repeat", "rename"))
        if change == "delete" and len(pairs) > 1:
            del pairs[place]
        elif change == "repeat":
            pairs.insert(random.randrange(len(pairs)), (key, value))
        elif change == "rename":
            pairs[place] = random.choice(pairs)[0], value
        else:
            pairs[place] = key, random.choice(_GGUF_VALUES)
    body = b"".join(key + value for key, value in pairs)
    counted = content[:16] + struct.pack("<Q", len(pairs))
    # The tensors' data begin at the next multiple of 32 after the header, so the file may have to be longer.
    return counted + body + content[data:] + bytes(32)


def _gguf_values(content: bytes) -> list[tuple[int, bytes, int]]:
    """Return each value of a header: its place, its bytes, and the length of the key before it."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def end_of(kind: int, place: int) -> int:
        if kind == 8:
            return place + 8 + int(struct.unpack_from("<Q", content, place)[0])
        if kind == 9:
            element, count = struct.unpack_from("<IQ", content, place)
            place += 12
            for _ in range(count):
                place = end_of(element, place)
            return place
        return place + sizes[kind]

    place, found = 24, []
    for _ in range(struct.unpack_from("<Q", content, 16)[0]):
        length = 8 + struct.unpack_from("<Q", content, place)[0]
        begin = place + length
        place = end_of(struct.unpack_from("<I", content, begin)[0], begin + 4)
        found.append((begin, content[begin:place], length))
    return found


# Readers ---------------------------------------------------------------------------------------------


def read_mutants(
    seeds: Sequence[int], make: Callable[[Random], Mutant], read: Callable[[Mutant], object]
) -> Counter[str]:
    """Read a mutant of each seed in a child process; return how many were `accepted`, or raised which error.

    Args:
        seeds: One for each mutant.
        make: Returns a mutant.
        read: What must survive it.

    Raises:
        AssertionError: A mutant ended otherwise than with a result or a `UserError`, or took too much time or
            memory. The message names its seed.
    """
    counts: Counter[str] = Counter()
    failures: list[str] = []
    position = 0
    while position < len(seeds) and len(failures) < 5:
        outcomes, ended = _read_in_child(seeds[position:], make, read)
        for seed, outcome in zip(seeds[position:], outcomes, strict=False):
            if outcome.startswith("*"):
                failures.append(f"seed {seed}: {outcome[1:]}")
            counts[outcome] += 1
        position += len(outcomes)
        if position < len(seeds):  # the child did not survive the next one
            failures.append(f"seed {seeds[position]}: {ended}")
            position += 1
    assert not failures, "\n".join(failures[:5])
    return counts


def _read_in_child(
    seeds: Sequence[int], make: Callable[[Random], Mutant], read: Callable[[Mutant], object]
) -> tuple[list[str], str]:
    """Return the outcomes of the mutants that a child survived, and how it ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - nothing is measured here
        os.close(reading)
        status = 1
        try:
            _limit_memory()
            if "torch" in sys.modules:  # The threads of its OpenMP do not survive a fork.
                sys.modules["torch"].set_num_threads(1)
            with os.fdopen(writing, "w", buffering=1) as answers:
                for seed in seeds:
                    mutant = make(Random(seed))
                    signal.alarm(SECONDS)  # it ends the process, also inside C code
                    answers.write(_outcome(read, mutant) + "\n")
                    signal.alarm(0)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answers:
        outcomes = answers.read().splitlines()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        is_late = number == signal.SIGALRM
        return outcomes, f"more than {SECONDS} s" if is_late else f"killed by signal {number}"
    return outcomes, f"exit status {os.WEXITSTATUS(status)}"


def _outcome(read: Callable[[Mutant], object], mutant: Mutant) -> str:
    try:
        read(mutant)
    except UserError as error:
        return type(error).__name__
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = ascii(f"{type(error).__name__}: {error}")[:300]
        return f"*{what} at {last.filename}:{last.lineno}"
    return "accepted"


def _limit_memory() -> None:
    """Let this process take `MEMORY_BYTES` more; where the system does not tell its size, nothing is done."""
    import resource

    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
