"""What a model's tokenizer files may say, checked before transformers and tokenizers read them.

Rust aborts the process if memory runs out, and nothing interrupts its code. So ids and lengths are checked
beforehand, and also what the *rules* (normalizer, pre-tokenizer, post-processor, decoder) can make of a text.
The *growth* of a rule is how many bytes at most it makes of one byte. Rules that follow each other multiply
their growths. Only what a file's author chooses counts, such as a replacement: Unicode's own normal forms are
bounded and settle after one pass.

Oniguruma, which runs the patterns, gives up after ten million steps in one match, with a panic
(`checkpoints/faults.py`). It does not bound the number of matches, so patterns are tried on texts of growing
length (`check_pattern_times`).
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from proxytune.checkpoints.faults import shown
from proxytune.checkpoints.untrusted import (
    LIST_BYTES,
    parse_json,
    read_json_file,
    read_regular,
)
from proxytune.errors import CorruptModel, UnsupportedModel

HINT = "\nhint: copy or download the model again"

MAX_ID = 2**22
"""Above every token id. Tables are as long as the highest; the largest vocabularies have a million tokens."""

MAX_TOKEN_CHARACTERS = 4096
"""Maximum length of a token; the longest of known vocabularies have a few hundred."""

MAX_GROWTH = 1000
"""Maximum growth of a text on its way to tokens; some 260 in the worst real family (XLNet)."""

MAX_DECODED_GROWTH = 64
"""Maximum growth of a token on its way to text; 1 in every real family."""

MAX_ADDED_TOKENS = 1024
"""Maximum number of tokens that post-processing puts around a text; real ones add at most 8."""

MAX_STEPS = 100
"""Maximum number of rules in one list with all lists inside; real ones have at most 20."""

_MAX_NUMBER = 2**20
"""Maximum of numbers in tokenizer_config.json, such as T5's `extra_ids`, of which tokens are made."""

_OTHER_FILES = (
    "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja", "vocab.*", "merges.txt",
    "tekken.json", "spiece.*",
)  # fmt: skip
"""Files that transformers opens beside tokenizer.json, if they are there."""

_CHECKED: dict[str, bool] = {}
"""By the SHA-256 of each tokenizer.json that this process has checked: whether it has patterns. The models of
a recipe often share one, and reading it costs more than its digest."""


def check_tokenizer_files(directory: Path, name: str) -> bool:
    """Check a model's tokenizer files; return whether the tokenizer has patterns that can be tried.

    Args:
        directory: The model's directory.
        name: The model's name in errors.

    Raises:
        CorruptModel: A value is beyond its limit or has the wrong type, or a file is none.
        UnsupportedModel: Its rules could multiply text.
    """
    for pattern in _OTHER_FILES:
        for path in directory.glob(pattern):
            if path.is_file() and path.stat().st_size > LIST_BYTES:
                raise _wrong(name, f"{path.name} has {path.stat().st_size:,} bytes")
    config = directory / "tokenizer_config.json"
    if config.exists():
        _check_tokenizer_config(read_json_file(config, at_most=LIST_BYTES), name)
    for file in ("special_tokens_map.json", "added_tokens.json", "vocab.json"):
        path = directory / file
        if path.exists():
            texts = read_json_file(path, at_most=LIST_BYTES)
            _check_texts(texts, file, name)
            if file != "special_tokens_map.json":
                _check_ids(texts, file, name)
    path = directory / "tokenizer.json"
    if not path.exists():
        return False
    content = read_regular(path, at_most=LIST_BYTES)
    digest = hashlib.sha256(content).hexdigest()
    if digest not in _CHECKED:
        try:
            _CHECKED[digest] = _check_tokenizer_json(parse_json(content, is_strict=False), name)
        except ValueError as error:
            raise CorruptModel(f"{path} is not JSON that can be read: {error}.{HINT}") from error
    return _CHECKED[digest]


# tokenizer_config.json -------------------------------------------------------------------------------


def _check_tokenizer_config(config: Mapping[str, Any], name: str) -> None:
    file = "tokenizer_config.json"
    for key in ("vocab", "merges", "tokenizer_object", "init_inputs", "fast_tokenizer_files"):
        # They would stand in for files that are checked here. Old versions wrote an empty list.
        if config.get(key):
            raise _wrong(name, f"{file} has {key}, which is not read from there")
    length = config.get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, int | float | None) or length != length:
        raise _wrong(name, f"{file} says model_max_length {shown(length)}, which is no number")
    for key in ("tokenizer_class", "padding_side", "truncation_side"):
        if not isinstance(config.get(key), str | None):
            raise _wrong(name, f"{file} says {key} {shown(config[key])}, which is no name")
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise _wrong(name, f"added_tokens_decoder in its {file} is no object")
    _check_ids({token_id: _whole_number(token_id) for token_id in added}, file, name)
    for key, value in config.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not key.endswith("length") and not abs(value) <= _MAX_NUMBER:
            raise _wrong(name, f"{file} says {key} {shown(value)}, above {_MAX_NUMBER}")
        if key.endswith(("_token", "_tokens", "_tokens_decoder")):
            _check_texts(value, file, name)


def _whole_number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _check_texts(value: Any, file: str, name: str) -> None:
    """Check that every text in special and added tokens is at most as long as a token."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and len(value) > MAX_TOKEN_CHARACTERS:
            raise _wrong(
                name,
                f"{file} has a text of {len(value):,} characters, and tokens have at most "
                f"{MAX_TOKEN_CHARACTERS:,}",
            )


def _check_ids(token_to_id: Mapping[str, Any], file: str, name: str) -> None:
    ids = token_to_id.values()
    # By type and extremes: a loop in Python over a vocabulary would take longer than reading it.
    if any(kind is not int for kind in set(map(type, ids))):
        raise _wrong(name, f"{file} has a token whose id is no whole number")
    if ids and not (min(ids) >= 0 and max(ids) < MAX_ID):
        worst = min(ids) if min(ids) < 0 else max(ids)
        raise _wrong(name, f"{file} has the token id {worst}, and ids lie between 0 and {MAX_ID:,}")


# tokenizer.json --------------------------------------------------------------------------------------


def _check_tokenizer_json(content: Any, name: str) -> bool:
    """Check a tokenizer.json; return whether it has patterns."""
    file = "tokenizer.json"
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise _wrong(name, f"{file} has no model")
    _check_vocabulary(model.get("vocab"), name)
    # WordPiece takes a time of the square of it.
    _check_numbers(model.get("max_input_chars_per_word"), f"model in its {file}", name, most=10_000)
    _check_texts([v for k, v in model.items() if k not in ("vocab", "merges")], file, name)
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise _wrong(name, f"added_tokens in its {file} is no list of tokens")
    _check_texts(added, file, name)
    _check_ids({str(place): token.get("id") for place, token in enumerate(added)}, file, name)
    for key in ("padding", "truncation"):
        _check_numbers(content.get(key), f"{key} in its {file}", name)
    _check_added_by_processor(content.get("post_processor"), name)
    rules = [*_steps(content.get("normalizer"), name), *_steps(content.get("pre_tokenizer"), name)]
    decoding = [*_steps(content.get("decoder"), name)]
    _check_growth(rules, MAX_GROWTH, "a text", name)
    _check_growth(decoding, MAX_DECODED_GROWTH, "a token", name)
    return any(_pattern(step) is not None for step in rules)


def _check_vocabulary(vocabulary: Any, name: str) -> None:
    """Check ids and lengths of the tokens, which are an object, or a list (Unigram)."""
    if isinstance(vocabulary, dict):
        _check_ids(vocabulary, "tokenizer.json", name)
        tokens = list(vocabulary)
    elif isinstance(vocabulary, list):
        pairs = [item[0] if isinstance(item, list) and item else item for item in vocabulary]
        tokens = [item for item in pairs if isinstance(item, str)]
        if len(tokens) != len(vocabulary):
            raise _wrong(name, "tokenizer.json has a token that is no text")
    else:
        raise _wrong(name, "tokenizer.json has no vocabulary")
    if len(tokens) > MAX_ID:
        raise _wrong(name, f"tokenizer.json has {len(tokens):,} tokens")
    longest = max(map(len, tokens), default=0)
    if longest > MAX_TOKEN_CHARACTERS:
        raise _wrong(name, f"tokenizer.json has a token of {longest:,} characters")


def _check_numbers(value: Any, where: str, name: str, most: int = _MAX_NUMBER) -> None:
    """Check that no number in some settings is large: texts are padded up to it."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > most:
            raise _wrong(name, f"{where} says {shown(value)}, above {most:,}")


def _steps(rule: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rules of a list of rules and of the lists inside it, in order."""
    waiting, num = [rule], 0
    while waiting:
        step = waiting.pop()
        if step is None:
            continue
        num += 1
        # tokenizers would guess the kind of a rule without one by its other keys.
        if not isinstance(step, dict) or not isinstance(step.get("type"), str):
            raise _wrong(name, f"tokenizer.json has the rule {shown(step)}, which has no type")
        if num > MAX_STEPS:
            raise _too_much(name, f"has more than {MAX_STEPS} rules in a row")
        if step["type"] != "Sequence":
            yield step
            continue
        lists = [item for key, item in step.items() if key != "type"]
        for inner in lists:
            if not isinstance(inner, list):
                raise _wrong(name, "tokenizer.json has a sequence of rules that is no list")
            waiting += reversed(inner)


def _check_growth(steps: list[dict[str, Any]], most: int, what: str, name: str) -> None:
    growth = 1.0
    for step in steps:
        growth *= _growth(step, name)
        if growth > most:
            raise _too_much(
                name,
                f"can make {what} up to {growth:,.0f} times as long, at the rule {step['type']}; "
                f"{most:,} times is the most that is accepted",
            )


def _growth(step: Mapping[str, Any], name: str) -> float:
    """Return how many bytes a rule makes of one byte at most, and of the empty text."""
    kind = step["type"]
    if kind == "Replace":
        content = step.get("content")
        if not isinstance(content, str):
            raise _wrong(name, "tokenizer.json has a replacement that is no text")
        num_bytes = _num_bytes(content)
        pattern = step.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else pattern
        if isinstance(text, str) and text:
            return max(1.0, num_bytes / _num_bytes(text))
        return 1.0 + num_bytes  # a pattern may also match between two characters
    if kind == "Prepend":
        prefix = step.get("prepend")
        return 1.0 + (_num_bytes(prefix) if isinstance(prefix, str) else 0)
    if kind == "Precompiled":
        return _table_growth(step.get("precompiled_charsmap"), name)
    if kind == "ByteLevel":
        # Each byte becomes a character of two, or a prefix of one byte before it does.
        return 4.0 if step.get("add_prefix_space", True) else 2.0
    return 4.0 if kind == "Metaspace" else 1.0  # a space of three bytes, before each word


def _table_growth(table: Any, name: str) -> float:
    """Return the longest text that a table of characters (SentencePiece's) puts in place of a byte.

    Its format is the size of a trie in bytes (32 bits, little-endian), the trie, and the texts, each ended by
    a zero byte.
    """
    if not isinstance(table, str | None):
        raise _wrong(name, "tokenizer.json has a table of characters that is no text")
    try:
        content = base64.b64decode(table or "", validate=True)
    except ValueError as error:
        raise _wrong(name, "tokenizer.json has a table of characters that is no base64") from error
    if not content:
        return 1.0
    start = 4 + int.from_bytes(content[:4], "little")
    if start > len(content):
        raise _wrong(name, "tokenizer.json has a table of characters that is cut off")
    # A character of several bytes is replaced as a whole; those of one byte become at most a few.
    return max(1.0, float(max(map(len, content[start:].split(b"\0")))))


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", errors="surrogatepass"))


def _check_added_by_processor(processor: Any, name: str) -> None:
    """Check the templates that put tokens around a text: how many, and that the text stands in each once."""
    num = 0
    for step in _steps(processor, name):
        if step["type"] != "TemplateProcessing":
            continue
        special = step.get("special_tokens")
        entries = list(special.values()) if isinstance(special, dict) else []
        lengths = [
            len(entry["ids"])
            if isinstance(entry, dict) and isinstance(entry.get("ids"), list)
            else 1
            for entry in entries
        ]
        for key in ("single", "pair"):
            pieces = step.get(key)
            pieces = pieces if isinstance(pieces, list) else str(pieces).split()
            texts = [_sequence_id(piece) for piece in pieces]
            if max(texts.count("A"), texts.count("B")) > 1:
                raise _too_much(name, "repeats the text in what its post-processor makes of it")
            num += len(pieces) * max(lengths, default=1)
    if num > MAX_ADDED_TOKENS:
        raise _too_much(name, f"adds up to {num:,} tokens to each text")


def _sequence_id(piece: Any) -> str | None:
    """Return which text a piece of a template stands for; None for a special token."""
    if isinstance(piece, str):  # "$A", "$B:1", "$1", "[CLS]"
        return ("B" if piece.startswith("$B") else "A") if piece.startswith("$") else None
    sequence = piece.get("Sequence") if isinstance(piece, dict) else None
    return str(sequence.get("id")) if isinstance(sequence, dict) else None


def _pattern(step: Mapping[str, Any]) -> str | None:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return regex if isinstance(regex, str) else None


# Patterns --------------------------------------------------------------------------------------------

PROBES = ((" ", "x"), ("a", "!"), ("1", "x"), (".", "x"), ("\n", "x"), ("a1 .\n", "!"), ("é", "!"))
"""Texts whose repetitions are tried, because prompts have runs of them. Each has an end that a pattern for
the run alone does not match."""

PROBE_LENGTHS = tuple(2**power for power in range(6, 13))
"""In characters."""

MAX_PROBE_SECONDS = 0.3
"""The time for one probe. At 4,096 characters linear patterns take 2 ms, and quadratic ones, which real
tokenizers have for digits (SuperBPE), 50 ms. Cubic ones take 0.9 s at 1,024."""


def check_pattern_times(cut: Callable[[str], object], name: str) -> None:
    """Check that a tokenizer's patterns do not take much longer for longer texts.

    Args:
        cut: Runs all of the rules that have patterns over a text.
        name: The model's name in errors.

    Raises:
        UnsupportedModel: They do.
    """
    for run, end in PROBES:
        # Length by length, so that a pattern whose time grows with the cube of it is stopped early.
        for length in PROBE_LENGTHS:
            text = (run * length)[:length] + end
            start = time.thread_time()
            cut(text)
            seconds = time.thread_time() - start
            if seconds > MAX_PROBE_SECONDS:
                raise _too_much(
                    name,
                    f"takes {seconds:.2f} s to cut {length:,} characters of {run!r} by its patterns, and "
                    "far longer for a longer prompt",
                )


def _wrong(name: str, why: str) -> CorruptModel:
    return CorruptModel(f"the tokenizer of {name} cannot be read: {why}.{HINT}")


def _too_much(name: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the tokenizer of {name} {why}, so it is not used.\n"
        "hint: take the tokenizer of the model that it was tuned from"
    )
