"""Rows as examples to train on: tokenised, with a label for every token that has a loss, and packed.

An example is what a model reads in training. A prompt has exactly the token ids that generation feeds for it,
and the answer follows them as tokens of its own. Which answers a row has is decided in `data/rows.py`. Models
never reach this file.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from proxytune.data.rows import Rows, answers_of
from proxytune.errors import InputFileError, InvalidRequest, PromptFormatError
from proxytune.request import Prompt
from proxytune.text.prompts import Tokenizer, check_syntax, continuation_ids, render
from proxytune.text.turns import Turns

IGNORED = -100
"""The label of a position that is not trained on."""


@dataclass(frozen=True, slots=True)
class Example:
    """What a model reads, and the tokens that have a loss.

    Args:
        token_ids: Ids of the small model's vocabulary.
        labels: As long as `token_ids`: the token id where the token has a loss, `IGNORED` elsewhere. Labels
            are not shifted: position t is predicted from the positions before it, so the first never counts.
    """

    token_ids: list[int]
    labels: list[int]

    @property
    def num_tokens(self) -> int:
        """Number of tokens that models read."""
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """Number of tokens with a loss."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt and two answers to it, in token ids of the small model's vocabulary."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def chosen(self) -> Example:
        """The prompt and the chosen answer, whose tokens have a loss."""
        labels = [IGNORED] * len(self.prompt_ids) + self.chosen_ids
        return Example(self.prompt_ids + self.chosen_ids, labels)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that models read: the prompt once for each answer."""
        return 2 * len(self.prompt_ids) + self.num_trained

    @property
    def num_trained(self) -> int:
        """Number of tokens of both answers."""
        return len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt that training by reward has answered, in token ids of the small model's vocabulary."""

    token_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """0: what is trained on are answers that do not exist yet."""
        return 0


@dataclass(frozen=True)
class Encoded:
    """Rows as a model reads them.

    Args:
        examples: Examples in the order of the rows. A packed example may hold parts of several rows, and a
            conversation may need several examples.
        sources: Indices of the rows that each example comes from.
        truncated: Indices of the rows cut to the maximum length.
        num_rows: Number of rows given.
        num_dropped: Number of rows left out because their prompt alone fills the maximum length.
    """

    examples: list[Example] | list[PreferenceExample] | list[PromptExample]
    sources: list[tuple[int, ...]]
    truncated: frozenset[int]
    num_rows: int
    num_dropped: int

    @cached_property
    def rows_read(self) -> frozenset[int]:
        """Indices of the rows that models read, at least in part."""
        return frozenset(itertools.chain.from_iterable(self.sources))

    @property
    def num_truncated(self) -> int:
        """Number of rows that models read, cut to the maximum length."""
        return len(self.truncated & self.rows_read)

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens that models read."""
        return sum(example.num_tokens for example in self.examples)

    @cached_property
    def num_trained(self) -> int:
        """Number of tokens with a loss; for preferences, of both answers."""
        return sum(example.num_trained for example in self.examples)

    def only(self, kept: Collection[int]) -> Encoded:
        """Return some of the examples, by index, in their order."""
        indices = sorted(kept)
        examples: Any = [self.examples[i] for i in indices]
        return replace(self, examples=examples, sources=[self.sources[i] for i in indices])


def limited(part: Encoded, max_tokens: int | None, seed: int) -> Encoded:
    """Return random examples of at most `max_tokens` tokens together, at least one, in their order."""
    if max_tokens is None or part.num_tokens <= max_tokens:
        return part
    sizes = [example.num_tokens for example in part.examples]
    kept: set[int] = set()
    size = 0
    for index in random.Random(seed).sample(range(len(sizes)), len(sizes)):
        if kept and size + sizes[index] > max_tokens:
            break
        kept.add(index)
        size += sizes[index]
    return part.only(kept)


# Encoding ------------------------------------------------------------------------------------------


def encode(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    prompt_format: str,
    max_length: int,
    name: str,
    packed: bool = True,
) -> Encoded:
    """Return rows as a model reads them.

    A prompt becomes exactly the token ids that generation feeds for it. A completion is tokenised by itself
    and follows them: generation starts after the prompt's tokens, so it could never produce a token that
    spans the boundary. The tokenizer's end-of-sequence token closes texts and completions; a tokenizer
    without one leaves them open.

    The chat template closes an assistant's turn. Where the format writes nothing visible there, as `plain`
    does, the end-of-sequence token closes it. Turns of a conversation share an example as long as each
    turn's prompt continues the tokens so far. Some templates write the history of a later turn differently
    (they strip earlier reasoning); such a turn starts an example of its own. So every turn is trained after
    the tokens that generation would feed for it.

    An empty prompt becomes the token that begins a sequence, or the one that ends it if there is none.

    Args:
        rows: Rows of any format.
        tokenizer: The small model's tokenizer.
        prompt_format: `plain`, `chat` or a Jinja template; plain texts need none.
        max_length: Maximum number of tokens per example, at least 2. Longer examples lose their end; prompts
            without an answer are left out instead.
        name: The model's name in errors.
        packed: Join texts and cut them into windows of `max_length`. Each window begins with the last token
            of the window before, so that every token but the first is predicted once. Otherwise each text
            is an example.

    Raises:
        InvalidRequest: `max_length` is below 2.
        InputFileError: A row, or all of them, leaves nothing to train on; names the line.
        PromptFormatError: The model does not have the format, or it fails on a row; names the line.
    """
    if max_length < 2:
        raise InvalidRequest(f"max_length is {max_length}, and must be at least 2")
    encoder = _Encoder(rows, tokenizer, prompt_format, max_length, name)
    if rows.kind == "text":
        return encoder.packed() if packed else encoder.examples(encoder.text)
    if rows.kind == "preference":
        return encoder.preferences()
    if rows.kind == "prompt":
        return encoder.prompts()
    return encoder.examples(encoder.conversation if rows.is_conversation else encoder.completion)


class _Encoder:
    def __init__(
        self, rows: Rows, tokenizer: Tokenizer, prompt_format: str, max_length: int, name: str
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._format: dict[str, Any] = {"prompt_format": prompt_format, "tokenizer": tokenizer}
        self._format["name"] = name
        self._turns = Turns(prompt_format, tokenizer, name)
        self._is_chat = rows.kind != "text" and check_syntax(prompt_format, name) == "chat"
        self._max_length = max_length
        eos_id = tokenizer.eos_token_id
        self._end = [] if eos_id is None else [eos_id]

    # Examples of all rows

    def packed(self) -> Encoded:
        documents = [self._document(index) for index in range(len(self._rows))]
        stream = list(itertools.chain.from_iterable(documents))
        ends = list(itertools.accumulate(map(len, documents)))
        step = self._max_length - 1
        starts = range(0, len(stream) - 1, step)
        windows = [stream[start : start + self._max_length] for start in starts]
        if not windows:
            raise InputFileError(
                f"{self._rows.source} has {len(stream)} token(s), and training needs at least two: one to "
                "start from and one to predict.\nhint: give more text"
            )
        last = [start + len(window) - 1 for start, window in zip(starts, windows, strict=True)]
        sources = [
            tuple(range(bisect_right(ends, start), bisect_right(ends, end) + 1))
            for start, end in zip(starts, last, strict=True)
        ]
        return self._encoded([Example(w, [IGNORED, *w[1:]]) for w in windows], sources, set(), 0)

    def examples(self, of_row: Callable[[int], list[Example]]) -> Encoded:
        """Return the examples that a function makes of each row, cut to the maximum length."""
        kept: list[Example] = []
        sources: list[tuple[int, ...]] = []
        truncated: set[int] = set()
        num_dropped = 0
        for index in range(len(self._rows)):
            whole = self._of(index, of_row)
            most = self._max_length
            cut = [Example(e.token_ids[:most], e.labels[:most]) for e in whole]
            left = [e for e in cut if e.num_trained]
            kept += left
            sources += [(index,)] * len(left)
            if not left:
                num_dropped += 1
            elif any(len(e.token_ids) > most for e in whole):
                truncated.add(index)
        return self._encoded(kept, sources, truncated, num_dropped)

    def preferences(self) -> Encoded:
        kept: list[PreferenceExample] = []
        sources: list[tuple[int, ...]] = []
        truncated: set[int] = set()
        num_dropped = 0
        for index in range(len(self._rows)):
            whole = self._of(index, self._preference)
            room = self._max_length - len(whole.prompt_ids)
            if room <= 0:
                num_dropped += 1
                continue
            answers = whole.chosen_ids, whole.rejected_ids
            if max(map(len, answers)) > room:
                truncated.add(index)
            kept.append(PreferenceExample(whole.prompt_ids, *(ids[:room] for ids in answers)))
            sources.append((index,))
        return self._encoded(kept, sources, truncated, num_dropped)

    def prompts(self) -> Encoded:
        kept: list[PromptExample] = []
        sources: list[tuple[int, ...]] = []
        for index in range(len(self._rows)):
            token_ids = self._of(index, lambda i: self._prompt(self._rows.rows[i]["prompt"], i))
            if len(token_ids) <= self._max_length:
                kept.append(PromptExample(token_ids))
                sources.append((index,))
        return self._encoded(kept, sources, set(), len(self._rows) - len(kept))

    def _encoded(
        self,
        examples: list[Example] | list[PreferenceExample] | list[PromptExample],
        sources: list[tuple[int, ...]],
        truncated: set[int],
        num_dropped: int,
    ) -> Encoded:
        if not examples:
            raise InputFileError(
                f"no row of {self._rows.source} has anything to train on within {self._max_length} tokens, "
                "because the prompts alone fill them.\nhint: raise --max-length"
            )
        return Encoded(examples, sources, frozenset(truncated), len(self._rows), num_dropped)

    # Examples of one row

    def text(self, index: int) -> list[Example]:
        token_ids = self._document(index)
        return [Example(token_ids, [IGNORED, *token_ids[1:]])]

    def completion(self, index: int) -> list[Example]:
        ((prompt, answer),) = answers_of(self._rows.rows[index])
        prompt_ids = self._prompt(prompt, index)
        answer_ids = self._answer(prompt, answer, index)
        return [Example(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids)]

    def conversation(self, index: int) -> list[Example]:
        examples: list[Example] = []
        for prompt, answer in answers_of(self._rows.rows[index]):
            assert not isinstance(prompt, str)
            prompt_ids = self._prompt(prompt, index)
            answer_ids = self._turn(prompt, answer, index)
            num_shared = len(examples[-1].token_ids) if examples else 0
            if not examples or prompt_ids[:num_shared] != examples[-1].token_ids:
                examples.append(Example([], []))
                num_shared = 0
            current = examples[-1]
            current.token_ids.extend(prompt_ids[num_shared:] + answer_ids)
            current.labels.extend([IGNORED] * (len(prompt_ids) - num_shared) + answer_ids)
        return examples

    def _preference(self, index: int) -> PreferenceExample:
        row = self._rows.rows[index]
        prompt_ids = self._prompt(row["prompt"], index)
        answers = []
        for answer in (row["chosen"], row["rejected"]):
            if isinstance(answer, str):
                answers.append(self._answer(row["prompt"], answer, index))
                continue
            history = row["prompt"] + answer[:-1]
            content = answer[-1]["content"]
            token_ids = self._prompt(history, index) + self._turn(history, content, index)
            if token_ids[: len(prompt_ids)] != prompt_ids:
                raise PromptFormatError(
                    "the format writes the prompt differently before an answer of several messages.\n"
                    "hint: give answers of one message"
                )
            answers.append(token_ids[len(prompt_ids) :])
        return PreferenceExample(prompt_ids, *answers)

    def _of(self, index: int, function: Callable[[int], Any]) -> Any:
        try:
            return function(index)
        except PromptFormatError as error:
            if self._is_chat and not self._tokenizer.chat_template:
                raise  # It is not the row's fault.
            raise PromptFormatError(f"{self._rows.where(index)}: {error}") from error

    # Tokens

    def _document(self, index: int) -> list[int]:
        text = self._rows.rows[index]["text"]
        token_ids = list(self._tokenizer.encode(text, add_special_tokens=True))
        if self._end and token_ids[-1:] == self._end:
            token_ids.pop()  # Some tokenizers add it themselves.
        return token_ids + self._end

    def _prompt(self, prompt: Prompt, index: int) -> list[int]:
        try:
            return render(prompt, **self._format)
        except InvalidRequest as error:
            start_id = self._start_id
            if prompt != "" or start_id is None:
                raise InputFileError(f"{self._rows.where(index)}: {error}") from error
            return [start_id]

    @cached_property
    def _start_id(self) -> int | None:
        token = self._tokenizer.bos_token
        if token is None:
            return self._tokenizer.eos_token_id
        return self._tokenizer.get_vocab().get(token)

    def _answer(self, prompt: Prompt, answer: str, index: int) -> list[int]:
        """Return the token ids of an answer, and the token that ends it."""
        token_ids = self._turns.answer_ids(prompt, answer)
        return token_ids or self._refuse_empty(index)

    def _turn(self, history: Sequence[Any], content: str, index: int) -> list[int]:
        """Return the token ids of an assistant's turn and of all that closes it."""
        turn = self._turns.after(history, content)
        text = turn.text + turn.end
        token_ids = continuation_ids(text, self._tokenizer) or self._refuse_empty(index)
        return token_ids + ([] if turn.is_ended else self._end)

    def _refuse_empty(self, index: int) -> NoReturn:
        raise InputFileError(
            f"{self._rows.where(index)}: {self._format['name']} has no tokens for its answer, so there "
            "is nothing to learn.\nhint: leave this row out"
        )
