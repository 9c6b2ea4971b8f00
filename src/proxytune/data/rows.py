"""Rows of data: read from any source, checked, split, and the answers in them.

A row is an object in one of four formats, and all rows of a source have the same one:

    {"text": ...}                                   every token is trained on
    {"prompt": ..., "completion": ...}              the completion is trained on
    {"messages": [{"role": ..., "content": ...}]}   every reply of the assistant is trained on
    {"prompt": ..., "chosen": ..., "rejected": ...} a preference

Prompts, completions and answers are text, or lists of messages. Other keys are ignored: data sets carry ids
and sources.

Rows for training by reward have a fifth format: {"prompt": ..., and whatever the reward reads}. Any row with
a prompt fits it, so it is never detected, but asked for. Its other keys are kept.

Tokens never reach this file.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import io
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from proxytune.errors import InputFileError, InvalidRequest, missing_extra
from proxytune.request import Message, Prompt

Kind = Literal["text", "completion", "messages", "preference", "prompt"]
Unit = Literal["line", "row"]

REQUIRED: Mapping[Kind, frozenset[str]] = {
    "text": frozenset({"text"}),
    "completion": frozenset({"prompt", "completion"}),
    "messages": frozenset({"messages"}),
    "preference": frozenset({"chosen", "rejected"}),
}
"""The keys that identify each format."""

ROLES = ("system", "user", "assistant", "tool")

_KEYS = ("text", "prompt", "completion", "messages", "chosen", "rejected")
_FORMATS_HINT = (
    'a row is {"text"}, {"prompt", "completion"}, {"messages"} or {"prompt", "chosen", "rejected"}'
)
_PROMPTS_HINT = 'for training by reward, a row is {"prompt": ...} and whatever the reward reads'
_FILE_SUFFIXES = (
    ".jsonl", ".ndjson", ".json", ".txt", ".csv", ".parquet", ".arrow", ".gz", ".md", ".tsv", ".zst", ".zip",
)  # fmt: skip
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class Rows:
    """Rows of one format.

    Args:
        kind: The format.
        rows: The rows, each with the format's own keys only; of the format `prompt`, the prompt and under
            `row` the whole row as it was given.
        source: The source's name in errors and in the model card.
        lines: Line or row number of each row in its source, from 1.
        unit: What `lines` counts.
    """

    kind: Kind
    rows: list[dict[str, Any]]
    source: str
    lines: list[int]
    unit: Unit = "line"

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of format and rows; it does not depend on the kind of file."""
        digest = hashlib.sha256(self.kind.encode())
        for row in self.rows:
            line = json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
            digest.update(b"\n" + line.encode())
        return digest.hexdigest()

    @property
    def is_conversation(self) -> bool:
        """Whether prompts are lists of messages."""
        return self.kind == "messages" or isinstance(self.rows[0].get("prompt"), list)

    @property
    def hold_what_stands_between(self) -> bool:
        """Whether most rows hold what leads from the prompt to the answer, such as `Answer:` or a space.

        A prompt then ends with white space or a colon, or the answer begins with white space.
        """
        pairs = [pair for row in self.rows for pair in answers_of(row)]
        held = sum(
            isinstance(prompt, str)
            and (prompt.endswith(":") or prompt[-1:].isspace() or answer[:1].isspace())
            for prompt, answer in pairs
        )
        return 2 * held > len(pairs)

    def where(self, index: int) -> str:
        """Return the name of a row in errors."""
        return f"{self.unit} {self.lines[index]} of {self.source}"


# Reading -------------------------------------------------------------------------------------------


class _Refused(Exception):
    """Why a row cannot be used; the reader adds its line."""


class _Found(NamedTuple):
    """The content of a source, not yet checked."""

    source: str
    unit: Unit
    items: Iterable[tuple[int, Any]]


def read_rows(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    split: str = "train",
    for_reward: bool = False,
) -> Rows:
    """Return the rows of a source, all checked.

    Args:
        source: A file of JSON lines, JSON, CSV, Parquet, Arrow, or plain text, which is one row; each may be
            compressed with gzip. Or a directory written by `save_to_disk` of `datasets`, the id of a data set
            on the Hugging Face Hub (`owner/name` or `owner/name:config`), or mappings. An existing path is
            never looked up on the Hub. A data set's code is never run.
        split: Which split of a data set to read. A file has none and is read whole.
        for_reward: Read every row as a prompt and whatever a reward reads (the format `prompt`).

    Raises:
        InputFileError: The source is missing or cannot be read, or a row cannot be used; names the line.
        MissingExtra: The library `datasets` is needed and not installed.
    """
    if isinstance(source, (str, Path)):
        return _checked(_find(source, split, for_reward), for_reward)
    if isinstance(source, Mapping):
        raise InputFileError(
            f"the given rows are a mapping (keys {_listed(source)}), and must be a list of rows.\n"
            'hint: if it is a data set with several splits, give one of them, such as dataset["train"]'
        )
    return _checked(_Found("the given rows", "row", enumerate(source, 1)), for_reward)


def _checked(found: _Found, for_reward: bool) -> Rows:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    first: tuple[Kind, str] | None = None
    for number, item in found.items:
        try:
            kind, row = _prompt_row(item) if for_reward else _row(item)
            has_lists = any(isinstance(row[key], list) for key in row if key != "messages")
            form = kind, " (lists of messages)" if has_lists else ""
            first = first or form
            if form != first:
                raise _Refused(
                    f"its format is {''.join(form)}, and that of {found.unit} {lines[0]} is "
                    f"{''.join(first)}; all rows must have the same format.\n"
                    "hint: put the rows of each format into a separate file"
                )
        except _Refused as refused:
            hint = "" if "\nhint:" in str(refused) else ".\nhint: correct this row, or leave it out"
            raise InputFileError(
                f"{found.unit} {number} of {found.source}: {refused}{hint}"
            ) from refused.__cause__
        rows.append(row)
        lines.append(number)
    if first is None:
        raise InputFileError(
            f"{found.source} has no rows, so there is nothing to learn from.\n"
            f"hint: {_PROMPTS_HINT if for_reward else _FORMATS_HINT}"
        )
    return Rows(first[0], rows, found.source, lines, found.unit)


def _find(source: str | Path, split: str, all_columns: bool) -> _Found:
    path = Path(source).expanduser()
    try:
        is_there, is_directory = path.exists() and str(source) != "", path.is_dir()
    except (OSError, ValueError):  # The name is too long, or has a character that no path can have.
        is_there = is_directory = False
    if is_there:
        return _read_directory(path, split, all_columns) if is_directory else _read_file(path)
    hub_id = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    # If the folder exists, the name means a missing file, not a data set of that owner.
    if hub_id and path.suffix.lower() not in _FILE_SUFFIXES and not path.parent.exists():
        return _read_hub(str(source), hub_id["id"], hub_id["config"], split, all_columns)
    raise InputFileError(
        f"{str(source)!r} does not exist, so no rows can be read.\n"
        "hint: give a file of JSON lines or text, or a data set on the Hub as owner/name"
    )


def _read_directory(path: Path, split: str, all_columns: bool) -> _Found:
    is_single = (path / "state.json").exists()
    if not is_single and not (path / "dataset_dict.json").exists():
        raise InputFileError(
            f"{path} is a directory, and not one that `save_to_disk` of datasets wrote.\n"
            "hint: give one of its files, or write the data set with save_to_disk"
        )
    datasets = _imported("datasets", f"the data set in {path}")
    try:
        loaded = datasets.load_from_disk(str(path))
        if is_single or split in loaded:
            dataset = loaded if is_single else loaded[split]
            return _Found(path.name, "row", enumerate(_dataset_rows(dataset, all_columns), 1))
    except Exception as error:  # The library, Arrow and the disk each have exceptions of their own.
        raise InputFileError(
            f"the data set in {path} cannot be read: {_first_line(error)}\n"
            "hint: write it again with save_to_disk"
        ) from error
    raise InputFileError(
        f"the data set in {path} has no split {split!r}; it has {_listed(loaded)}.\n"
        f"hint: --split {next(iter(loaded), 'NAME')}"
    )


def _read_hub(
    source: str, hub_id: str, config: str | None, split: str, all_columns: bool
) -> _Found:
    datasets = _imported("datasets", f"the data set {source}")
    try:
        rows = _dataset_rows(datasets.load_dataset(hub_id, config, split=split), all_columns)
    except Exception as error:  # Network, access, format, settings: each has its own exception.
        raise InputFileError(
            f"there is no file {source!r}, and no data set of this name can be read from the Hugging Face "
            f"Hub (split {split!r}): {_first_line(error)}\n"
            "hint: check the name, --split and the network; owner/name:config selects a configuration"
        ) from error
    return _Found(source, "row", enumerate(rows, 1))


def _dataset_rows(dataset: Any, all_columns: bool) -> list[dict[str, Any]]:
    names = set(dataset.column_names)
    if not all_columns and any(keys <= names for keys in REQUIRED.values()):
        # Other columns may be slow to decode, such as images.
        dataset = dataset.select_columns([key for key in _KEYS if key in names])
    return list(dataset.with_format(None).to_list())


def _imported(library: str, what: str) -> Any:
    """Return a library of the extra `tune`, which reading `what` needs."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        why = f"reading {what} needs the library datasets, which is not installed"
        raise missing_extra(why, "tune") from error


def _read_file(path: Path) -> _Found:
    name = path.name
    suffix = path.suffix.lower()
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        elif suffix == ".gz" and content:
            raise gzip.BadGzipFile("it does not begin like a gzip file")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputFileError(
            f"{path} is a truncated or damaged gzip file: {error}\nhint: copy it again"
        ) from error
    except OSError as error:
        raise InputFileError(
            f"{path} cannot be read: {error.strerror}.\nhint: give a readable file"
        ) from error
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
    if suffix in (".parquet", ".arrow") or content.startswith((b"PAR1", b"ARROW1")):
        return _Found(name, "row", enumerate(_arrow_rows(content, path), 1))
    content = content.removeprefix(b"\xef\xbb\xbf")  # Some editors put a byte order mark there.
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputFileError(
            f"line {line} of {name}: not UTF-8 text (byte {error.start + 1} of the file).\n"
            "hint: save the file as UTF-8"
        ) from error
    if suffix == ".csv":
        return _Found(name, "line", _csv_items(text, name))
    if suffix in (".jsonl", ".ndjson"):
        return _Found(name, "line", _json_lines(text, name))
    if suffix != ".txt" and (suffix == ".json" or text.lstrip().startswith(("{", "["))):
        return _json_items(text, name)
    return _Found(name, "line", [(1, {"text": text})] if text.strip() else [])


def _arrow_rows(content: bytes, path: Path) -> list[dict[str, Any]]:
    pyarrow = _imported("pyarrow", path.name)
    parquet = _imported("pyarrow.parquet", path.name)
    try:
        buffer = pyarrow.BufferReader(content)
        if content.startswith(b"PAR1"):
            table = parquet.read_table(buffer)
        elif content.startswith(b"ARROW1"):
            table = pyarrow.ipc.open_file(buffer).read_all()
        else:
            table = pyarrow.ipc.open_stream(buffer).read_all()
        return list(table.to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputFileError(
            f"{path} cannot be read as Parquet or Arrow: {_first_line(error)}\n"
            "hint: copy it again, or write it again"
        ) from error


def _csv_items(text: str, name: str) -> Iterator[tuple[int, Any]]:
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
        line = reader.line_num + 2
        for row in reader:
            if "" in row and isinstance(row[""], list):
                raise InputFileError(
                    f"line {line} of {name}: it has more cells than the first line has names.\n"
                    "hint: put text that contains commas in double quotes"
                )
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputFileError(
            f"{name} cannot be read as CSV: {error}\nhint: double the quotes inside a quoted cell"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _json_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): JSON text may contain U+2028, which only Python takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputFileError(
                f"line {number} of {name}: not valid JSON ({_json_reason(error)}).\n"
                "hint: each line must be a whole object; name a file of plain text .txt"
            ) from error


def _json_items(text: str, name: str) -> _Found:
    """Return the rows of a JSON document, or of JSON lines, which often have the same suffix."""
    if not text.strip():
        return _Found(name, "row", [])
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        head = text.lstrip().split("\n", 1)[0]
        try:
            is_lines = isinstance(json.loads(head), dict)
        except (ValueError, RecursionError):
            is_lines = False
        if is_lines:
            return _Found(name, "line", _json_lines(text, name))
        line = f"line {error.lineno} of " if isinstance(error, json.JSONDecodeError) else ""
        raise InputFileError(
            f"{line}{name}: not valid JSON ({_json_reason(error)}).\n"
            "hint: give one list of objects, or one object per line; name a file of plain text .txt"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    return _Found(name, "row", enumerate(content if isinstance(content, list) else [content], 1))


def _json_reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


# Checking ------------------------------------------------------------------------------------------


def _row(item: Any) -> tuple[Kind, dict[str, Any]]:
    """Return a row's format, and the row with the format's own keys only."""
    if not isinstance(item, Mapping):
        raise _Refused(f"it is {_called(item)}, and must be an object.\nhint: {_FORMATS_HINT}")
    # Tables have null where a row lacks a column: a null counts as a key only if no format fits otherwise.
    filled = {key for key in item if item[key] is not None}
    kinds = [k for k in REQUIRED if REQUIRED[k] <= filled] or [
        k for k in REQUIRED if REQUIRED[k] <= item.keys()
    ]
    if not kinds:
        raise _Refused(
            f"its keys ({_listed(item)}) fit none of the known formats.\nhint: {_FORMATS_HINT}"
        )
    if len(kinds) > 1:
        raise _Refused(
            f"its keys fit the formats {' and '.join(kinds)}, so it is unclear which one is meant.\n"
            "hint: keep the keys of one format only"
        )
    kind = kinds[0]
    if kind == "text":
        return kind, {"text": _text(item, "text")}
    if kind == "messages":
        messages = _messages(item["messages"], '"messages"')
        if not any(m["role"] == "assistant" for m in messages[1:]):
            raise _Refused(
                "it has no message of the assistant that answers another one, so there is nothing to learn"
            )
        return kind, {"messages": messages}
    answers = ("completion",) if kind == "completion" else ("chosen", "rejected")
    parts = [(key, item[key]) for key in ("prompt", *answers) if item.get(key) is not None]
    if len({isinstance(value, (list, tuple)) for _, value in parts}) > 1:
        raise _Refused(
            " and ".join(f'"{key}" is {_called(value)}' for key, value in parts)
            + "; all must be text, or all must be lists of messages"
        )
    if isinstance(item[answers[0]], (list, tuple)):
        row: dict[str, Any] = _conversation(item, answers)
    else:
        row = {"prompt": _text(item, "prompt", may_be_empty=True)}
        row |= {key: _text(item, key) for key in answers}
    if kind == "preference" and row["chosen"] == row["rejected"]:
        raise _Refused('"chosen" and "rejected" are equal, so neither can be preferred')
    return kind, row


def _prompt_row(item: Any) -> tuple[Kind, dict[str, Any]]:
    """Return the format of rows for training by reward, and a row: its prompt, and all of it."""
    if not isinstance(item, Mapping):
        raise _Refused(f"it is {_called(item)}, and must be an object.\nhint: {_PROMPTS_HINT}")
    if item.get("prompt") is None:
        raise _Refused(
            f'it has no "prompt" (its keys are {_listed(item)}), so there is nothing to answer.\n'
            f"hint: {_PROMPTS_HINT}"
        )
    prompt: Prompt
    if isinstance(item["prompt"], (list, tuple)):
        prompt = _messages(item["prompt"], '"prompt"')
        if prompt[-1]["role"] == "assistant":
            raise _Refused('"prompt" ends with a message of the assistant, which leaves no answer')
    else:
        prompt = _text(item, "prompt", may_be_empty=True)
    for key, value in item.items():
        try:
            json.dumps({key: value}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise _Refused(
                f"{key!r} cannot be written as JSON ({_first_line(error)}), and rewards read rows as JSON.\n"
                "hint: leave this key out, or make it text"
            ) from error
    return "prompt", {"prompt": prompt, "row": dict(item)}


def _conversation(item: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """Return prompt and answers as messages; answers that repeat the prompt lose it."""
    parts = {key: _messages(item[key], f'"{key}"') for key in answers}
    for key, messages in parts.items():
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()  # A message without an answer is not trained on.
        if not messages:
            raise _Refused(f'"{key}" has no message of the assistant')
    if item.get("prompt") is not None:
        prompt = _messages(item["prompt"], '"prompt"')
        for key, messages in parts.items():
            if messages[: len(prompt)] == prompt:
                parts[key] = messages[len(prompt) :]
    else:
        if len(parts) == 1:
            raise _Refused('"prompt" is null, and must be a list of messages')
        prompt = _shared_lead(*parts.values())
        if not prompt:
            raise _Refused(
                'there is no "prompt", and "chosen" and "rejected" do not begin with the same messages'
            )
        parts = {key: messages[len(prompt) :] for key, messages in parts.items()}
    for key, messages in parts.items():
        if not messages or messages[0]["role"] != "assistant":
            raise _Refused(f'"{key}" does not continue the prompt with a message of the assistant')
    return {"prompt": prompt, **parts}


def _shared_lead(first: list[Message], second: list[Message]) -> list[Message]:
    """Return the longest shared beginning that the assistant answers in both."""
    end = 0
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one["role"] == other["role"] == "assistant":
            end = index
        if one != other:
            break
    return first[:end]


def _messages(value: Any, what: str) -> list[Message]:
    if not isinstance(value, (list, tuple)) or not value:
        shown = "an empty list" if isinstance(value, (list, tuple)) else _called(value)
        raise _Refused(f"{what} is {shown}, and must be a list of messages")
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        place = f"message {number} of {what}"
        is_object = isinstance(message, Mapping)
        if not is_object or not {"role", "content"} <= message.keys():
            shown = f"has the keys {_listed(message)}" if is_object else f"is {_called(message)}"
            raise _Refused(f'{place} {shown}, and must be {{"role": ..., "content": ...}}')
        role = message["role"]
        if role not in ROLES:
            raise _Refused(f"{place} has the role {role!r}, which is not one of {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise _Refused(f"{place} has tool calls, which cannot be trained on")
        content = message["content"]
        if not isinstance(content, str):
            raise _Refused(f"the content of {place} is {_called(content)}, and must be text")
        _check_characters(content, f"the content of {place}")
        if role == "assistant" and not content.strip():
            raise _Refused(
                f"{place} is an empty message of the assistant, so there is nothing to learn"
            )
        messages.append({"role": role, "content": content})
    return messages


def _text(item: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        why = f"is {_called(value)}, and must be text" if key in item else "is missing"
        raise _Refused(f'"{key}" {why}')
    _check_characters(value, f'"{key}"')
    if not may_be_empty and not value.strip():
        raise _Refused(f'"{key}" is empty, so there is nothing to learn.\nhint: leave this row out')
    return value


def _check_characters(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        why = r"has half of a \u surrogate pair, which is not a character"
        raise _Refused(f"{what} {why}") from error


def _called(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    for types, called in (
        (str, "text"), ((int, float), "a number"), ((list, tuple), "a list"), (Mapping, "an object"),
    ):  # fmt: skip
        if isinstance(value, types):
            return called
    return f"of the type {type(value).__name__}"


def _listed(keys: Iterable[Any]) -> str:
    return ", ".join(map(repr, keys)) or "none"


# Answers -------------------------------------------------------------------------------------------


def answers_of(row: Mapping[str, Any]) -> list[tuple[Prompt, str]]:
    """Return the answers of a row, each with the prompt that it follows.

    Training takes its loss on these answers, and scores measure the same ones: a completion that is text, or
    each reply of the assistant with all messages before it as its prompt. Of a preference, the chosen side
    counts.

    A row of the format `prompt` has one prompt, and may give no answer, which is then empty here.

    Args:
        row: A checked row of any format but `text`.
    """
    if "row" in row:
        return [(row["prompt"], given_answer(row["row"]) or "")]
    given = row.get("messages", row.get("completion", row.get("chosen")))
    if isinstance(given, str):
        return [(row["prompt"], given)]
    lead = row.get("prompt", [])
    messages = [*lead, *given]
    # A greeting before any other message has no prompt that generation could read.
    return [
        (messages[:turn], messages[turn]["content"])
        for turn in range(max(1, len(lead)), len(messages))
        if messages[turn]["role"] == "assistant"
    ]


def given_answer(row: Mapping[str, Any]) -> str | None:
    """Return the answer that a row for training by reward gives, if it gives one.

    Args:
        row: The whole row. Its answer is text or a number under `answer`, otherwise under `completion`, where
            the last of several messages counts.
    """
    for key in ("answer", "completion"):
        value = row.get(key)
        if isinstance(value, (list, tuple)) and value and isinstance(value[-1], Mapping):
            value = value[-1].get("content")
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    return None


# Splitting -----------------------------------------------------------------------------------------


def split_rows(rows: Rows, valid_share: float, seed: int) -> tuple[Rows, Rows | None]:
    """Set rows aside for validation.

    Which rows depends only on the seed and the number of rows. Both parts keep the order of the source and
    have at least one row. A single text, such as a book, is cut instead, and its end becomes the validation
    text. The cut is at the last blank line that makes that text at most twice as long as asked for,
    otherwise at the last end of a line before the share begins.

    Args:
        rows: The rows to split.
        valid_share: Share of the validation rows, in [0, 1); 0 sets nothing aside.
        seed: Random seed.

    Returns:
        The rows to train on, and the rows to validate on or None.

    Raises:
        InvalidRequest: The share is out of range.
        InputFileError: There is only one row, and it cannot be cut.
    """
    if not 0 <= valid_share < 1:
        raise InvalidRequest(f"valid_share is {valid_share}, and must be at least 0 and below 1")
    if valid_share == 0:
        return rows, None
    if len(rows) == 1:
        return _cut_text(rows, valid_share)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    num_valid = min(max(1, round(valid_share * len(rows))), len(rows) - 1)
    return _pick(rows, sorted(order[num_valid:])), _pick(rows, sorted(order[:num_valid]))


def _pick(rows: Rows, indices: Sequence[int]) -> Rows:
    return replace(
        rows, rows=[rows.rows[i] for i in indices], lines=[rows.lines[i] for i in indices]
    )


def _cut_text(rows: Rows, valid_share: float) -> tuple[Rows, Rows]:
    if rows.kind == "text":
        text = rows.rows[0]["text"]
        latest = int(len(text) * (1 - valid_share))
        earliest = max(0, int(len(text) * (1 - 2 * valid_share)))
        blank_lines = [m.end() for m in re.finditer(r"\n[^\S\n]*\n", text[earliest:latest])]
        cut = earliest + blank_lines[-1] if blank_lines else text.rfind("\n", 0, latest) + 1
        if text[:cut].strip() and text[cut:].strip():
            train, valid = text[:cut], text[cut:]
            return replace(rows, rows=[{"text": train}]), replace(rows, rows=[{"text": valid}])
    raise InputFileError(
        f"{rows.source} has only one row, and no part of it can be set aside for validation.\n"
        "hint: --valid-share 0 trains without validation; --valid-data gives separate rows"
    )
