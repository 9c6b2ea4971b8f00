"""Prompts as JSON lines: one object per line, checked and turned into requests."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from proxytune.errors import InputFileError, InvalidRequest, UserError, did_you_mean
from proxytune.request import (
    BATCH_SIZES,
    NO_DRAFTS,
    SPECULATIVE,
    ChatOptions,
    EngineName,
    Experts,
    Request,
    SamplingParams,
    Steering,
)
from proxytune.settings import check, option, options_of

if TYPE_CHECKING:  # Importing it loads torch, which a malformed file should not wait for.
    from proxytune.model import ProxyTuned
    from proxytune.recipe.recipe import Recipe

SAMPLING_OPTIONS = options_of(SamplingParams)
_CHAT_OPTIONS = {
    "add_generation_prompt": "add_generation_prompt",
    "continue_final_message": "continue_final_message",
    "chat_template_kwargs": "template_kwargs",
}
"""Fields of `ChatOptions` by their names in a line, which are those of the server's requests."""
LINE_OPTIONS = ("alpha", "expert", "policy", "combine", *_CHAT_OPTIONS, *SAMPLING_OPTIONS)
"""What `options` of a line may hold."""


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How a file is run.

    Args:
        sampling: For lines without options of their own.
        steering: For lines that do not say how they are steered.
        dtype: The models' dtype, where it is not the recipe's. A run is continued only in the same one.
        exact: Whether they are loaded with `exact`. A run is continued only alike.
        batch_size: Results do not depend on it, apart from ties within rounding, so that a run may be
            continued with another one.
        skip_bad_lines: Otherwise a line that cannot be used makes the whole file refused.
        speculative: As in `ProxyTuned.generate`. May change when a run is continued.
        engine: What runs the models. A run is continued only in the same one.

    Raises:
        InvalidRequest: A field is out of range, or the engine cannot honour it.
    """

    sampling: SamplingParams
    steering: Steering = field(default_factory=Steering)
    dtype: str | None = None
    exact: bool = False
    batch_size: int = option(
        BATCH_SIZES["local"], "Number of lines that are generated together", at_least=1
    )
    skip_bad_lines: bool = option(False, "Leave out lines that cannot be used, and report them")
    speculative: bool = option(False, SPECULATIVE)
    engine: EngineName = "local"

    def __post_init__(self) -> None:
        check(self)
        if self.engine == "vllm" and self.speculative:
            raise InvalidRequest(NO_DRAFTS)


class Line(NamedTuple):
    """One input line."""

    number: int  # from 1, counting blank lines
    fields: dict[str, Any]
    request: Request


def read_lines(
    path: Path, *, recipe: Recipe, sampling: SamplingParams, steering: Steering
) -> list[Line]:
    """Return all lines of an input file.

    Raises:
        InputFileError: The file cannot be read, has no prompts, or a line cannot be used.
    """
    with InputFile(path, recipe, BatchOptions(sampling, steering)) as source:
        source.check_lines()
        return list(source.lines())


def line_seed(seed: int | None, number: int) -> int:
    """Return the seed of a sampled line without one: 63 bits of a hash of the run's seed and the number."""
    digest = hashlib.sha256(f"{seed or 0}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def parse_line(raw: bytes, number: int, *, recipe: Recipe, options: BatchOptions) -> Line:
    """Read one input line.

    Raises:
        UserError: The line cannot be used. The message does not name the line.
    """
    try:
        content = json.loads(raw.decode("utf-8"))
        # Refuse what could not be written again: NaN, numbers too large, half of a surrogate pair.
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeDecodeError as error:
        raise InputFileError(f"not UTF-8 text (byte {error.start + 1} of the line)") from error
    except UnicodeEncodeError as error:
        raise InputFileError(
            r"it holds half of a \u surrogate pair, which is no character"
        ) from error
    except json.JSONDecodeError as error:
        raise InputFileError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"JSON that cannot be kept ({error})") from error
    if not isinstance(content, dict):
        raise InputFileError(f'it is a JSON {_kind(content)}, and must be an object with "prompt"')
    given = _without_nulls(content)
    if "prompt" in given and "messages" in given:
        raise InputFileError(
            'it has both "prompt" and "messages", and only one of them can be the prompt'
        )
    if "prompt" not in given and "messages" not in given:
        names = ", ".join(map(repr, given)) or "none"
        raise InputFileError(f'it has neither "prompt" nor "messages" (its fields: {names})')
    if "output" in given:
        raise InputFileError(
            'it has a field "output", which is where the answer goes.\nhint: rename the field'
        )
    prompt = given["messages" if "messages" in given else "prompt"]
    is_list = isinstance(prompt, list)
    if "messages" in given and not (is_list and all(isinstance(m, dict) for m in prompt)):
        raise InputFileError('"messages" must be a list of {"role": text, "content": text}')
    if is_list:
        prompt = tuple(_without_nulls(item) for item in prompt)
    own = given.get("options", {})
    if not isinstance(own, dict):
        raise InputFileError(f'"options" is a JSON {_kind(own)}, and must be an object')
    request = _request(prompt, _without_nulls(own), number, options)
    recipe.strengths(request.steering)
    recipe.policy_for(request.steering)
    return Line(number, content, request)


def _without_nulls(value: Any) -> Any:
    """Return a JSON object without the fields that are null, as if they were left out; others as they are."""
    if not isinstance(value, dict):
        return value
    return {name: each for name, each in value.items() if each is not None}


def _request(prompt: Any, own: Mapping[str, Any], number: int, options: BatchOptions) -> Request:
    """Return the request of a line: the run's options, overridden by the line's own."""
    for name in own:
        if name not in LINE_OPTIONS:
            known = f"known are {', '.join(LINE_OPTIONS)}"
            hint = did_you_mean(name, LINE_OPTIONS, otherwise=known)
            raise InputFileError(f'"options" has {name!r}, which is not an option{hint}')
    changes = {n: SAMPLING_OPTIONS[n].from_json(own[n]) for n in own if n in SAMPLING_OPTIONS}
    sampling = replace(options.sampling, **changes)
    if changes.get("seed") is None and not sampling.is_greedy:
        sampling = replace(sampling, seed=line_seed(options.sampling.seed, number))
    expert = own.get("expert")
    experts = None if expert is None else _experts(expert)
    steering = Steering(own.get("alpha"), experts, own.get("policy"), own.get("combine"))
    chat = ChatOptions(**{field: own[name] for name, field in _CHAT_OPTIONS.items() if name in own})
    return Request(prompt, sampling, **steering.over(options.steering).as_options(), chat=chat)


def _numbered(number: int, raw: bytes) -> bytes:
    """Return a line as the digest of a file takes it."""
    return b"%d:%d:" % (number, len(raw)) + raw


def _experts(value: object) -> Experts:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    if isinstance(value, str | dict):
        return value
    raise InputFileError(
        f"expert is {json.dumps(value)}, and must be a name, a list of names, or an object of names and "
        "alphas"
    )


def _kind(value: object) -> str:
    """Return the JSON name of a value's type."""
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array"}
    return "null" if value is None else names.get(type(value), "object")


class InputFile:
    """The input file, read line by line and more than once: always what it held when it was first read."""

    def __init__(self, path: Path, recipe: Recipe, options: BatchOptions) -> None:
        self._path = path
        self._recipe = recipe
        self._options = options
        self.sha256 = ""
        self.num_lines = 0
        """Number of usable lines."""
        self.bad_lines: set[int] = set()
        self.reasons: list[str] = []
        try:
            if path.exists() and not path.is_file():
                raise InputFileError(
                    f"{path} is not a regular file, and the input has to be read more than once.\n"
                    "hint: write the prompts into a file first"
                )
            self._file: IO[bytes] = path.open("rb")
        except OSError as error:
            raise self._unreadable(error) from error
        self._size: int | None = None  # bytes, as soon as all are read
        self._hashes = array("q")  # of the lines as they were first read

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _unreadable(self, error: OSError) -> InputFileError:
        return InputFileError(
            f"{self._path} cannot be read: {error.strerror}.\nhint: give a file of JSON "
            'lines, such as {"prompt": "Once upon a time"}'
        )

    def _raw_lines(self, file: IO[bytes] | None = None) -> Iterator[tuple[int, bytes]]:
        """Yield the lines that are not blank, of this file or of what is at its path now.

        Raises:
            InputFileError: It cannot be read, or a line is not what it was when it was first read.
        """
        file, size = file or self._file, 0
        try:
            for number in count(1):
                file.seek(size)  # Another pass may have begun meanwhile.
                raw = file.readline()
                if self._size is None:
                    self._hashes.append(hash(raw))
                else:
                    raw = raw[: self._size - size]
                    if hash(raw) != self._hashes[number - 1]:
                        raise self._changed()
                if not raw:
                    break
                size += len(raw)
                if number == 1:
                    # Some editors put a byte order mark there.
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield number, raw
        except OSError as error:
            raise self._unreadable(error) from error
        self._size = size

    def _changed(self) -> InputFileError:
        return InputFileError(
            f"{self._path} has changed while it was being read: what some lines asked is lost.\n"
            "hint: restore the file and run the same command again, or give another output file"
        )

    def check_lines(self) -> tuple[str, ...]:
        """Check every line, and return the experts that the lines use.

        Raises:
            InputFileError: A line cannot be used and may not be skipped, or no usable line is left.
        """
        experts: set[str] = set()
        digest = hashlib.sha256()
        for number, raw in self._raw_lines():
            digest.update(_numbered(number, raw))
            try:
                line = parse_line(raw, number, recipe=self._recipe, options=self._options)
            except UserError as error:
                self._leave_out(number, error)
                continue
            experts |= set(self._recipe.named(line.request.experts))
            self.num_lines += 1
        self.sha256 = digest.hexdigest()
        self._check_some_left()
        return tuple(e.name for e in self._recipe.experts if e.name in experts)

    def begins_with(self, sha256: str) -> bool:
        """Return whether the file with that `sha256` had the first lines of this one."""
        digest = hashlib.sha256()
        for number, raw in self._raw_lines():
            for known in (raw, raw.removesuffix(b"\n")):  # Its last line may have had no end.
                last = digest.copy()
                last.update(_numbered(number, known))
                if last.hexdigest() == sha256:
                    return True
            digest.update(_numbered(number, raw))
        return False

    def change(self) -> str:
        """Return what has become of the file since it was read, as a sentence; empty if nothing has."""
        try:
            with self._path.open("rb") as file:
                for _ in self._raw_lines(file):
                    pass
                file.seek(self._size or 0)
                if not file.read(1):
                    return ""
        except (OSError, InputFileError):
            return f"{self._path} has changed; the answers are those to what it held before"
        return f"{self._path} has grown; the same command answers the lines that were added"

    def check_requests(self, model: ProxyTuned) -> None:
        """Check that every prompt fits the models.

        Raises:
            InputFileError: A prompt does not fit and may not be skipped, or no usable line is left.
        """
        for line in self.lines():
            try:
                model.job(line.request)
            except UserError as error:
                self._leave_out(line.number, error)
                self.num_lines -= 1
        self._check_some_left()

    def lines(self) -> Iterator[Line]:
        """Yield the usable lines."""
        for number, raw in self._raw_lines():
            if number not in self.bad_lines:
                yield parse_line(raw, number, recipe=self._recipe, options=self._options)

    def _leave_out(self, number: int, error: UserError) -> None:
        reason = f"line {number} of {self._path}: {error}"
        if not self._options.skip_bad_lines:
            if "hint:" not in reason:
                reason += "\nhint: correct the line; proxytune generate leaves it out with --skip-bad-lines"
            raise InputFileError(reason) from error
        self.bad_lines.add(number)
        if len(self.reasons) < 3:
            self.reasons.append(reason.split("\nhint:")[0])

    def _check_some_left(self) -> None:
        if self.num_lines == 0:
            raise InputFileError(
                f"{self._path} has no usable line"
                + (f"; the first problem: {self.reasons[0]}" if self.reasons else "")
                + '.\nhint: a line is an object such as {"prompt": "Once upon a time"}'
            )
