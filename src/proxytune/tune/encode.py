"""Rows to train on: read, detected, checked, split, tokenised and packed.

A row is an object in one of four formats, and all rows of a source are in the same one:

    {"text": ...}                                   every token is trained on
    {"prompt": ..., "completion": ...}              the completion is trained on
    {"messages": [{"role": ..., "content": ...}]}   every turn of the assistant is trained on
    {"prompt": ..., "chosen": ..., "rejected": ...} a preference

Prompts, completions and answers are text, or lists of messages. Other keys are ignored: data sets carry ids
and sources. An example is what a model reads: a prompt's token ids are those that generation feeds for it,
and what is trained comes after them as tokens of its own. Models never appear here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from proxytune.data.rows import Rows, answers_of
from proxytune.errors import (
    InputFileError,
    InvalidRequest,
    PromptFormatError,
)
from proxytune.request import Message, Prompt
from proxytune.text.prompts import (
    Tokenizer,
    check_syntax,
    continuation_ids,
    render,
    render_text,
)

IGNORED = -100
"""The label of a position that is not trained on."""


@dataclass(frozen=True, slots=True)
class Example:
    """What a model reads, and where it is trained.

    Args:
        token_ids: Ids of the small model's vocabulary.
        labels: As long as `token_ids`: the token id at positions that are trained on, `IGNORED` elsewhere.
            Not shifted: position t is predicted from those before it, so the first never counts.
    """

    token_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt and two answers to it, in token ids of the small model's vocabulary."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Encoded:
    """Rows as a model reads them.

    Args:
        examples: In the order of the rows. A packed example may hold parts of several rows, and a
            conversation may take several examples.
        num_rows: Rows that were given.
        num_truncated: Rows that were cut to the greatest length.
        num_dropped: Rows whose prompt alone fills the greatest length, so that nothing to train on is left.
        num_tokens: Tokens that models read.
        num_trained: Tokens with a loss; of preferences, those of both answers.
    """

    examples: list[Example] | list[PreferenceExample]
    num_rows: int
    num_truncated: int
    num_dropped: int
    num_tokens: int
    num_trained: int


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

    A prompt becomes exactly the token ids that generation feeds for it, and a completion's tokens follow as
    they are by themselves: a token that reached over the boundary would be one that generation, which
    starts after the prompt's tokens, can never produce. The tokenizer's end-of-sequence token closes
    texts and completions; without one they do not end.

    An assistant's turn is closed as its chat template closes it, and by the end-of-sequence token where the
    format writes nothing visible there, as `plain` does. Turns of a conversation share an example as long as
    each one's prompt goes on from the tokens before; a turn for which the format writes the history
    differently (some templates strip earlier reasoning) begins an example of its own. So every turn is
    trained after the tokens that generation would feed for it.

    An empty prompt is the token that begins a sequence, or, without one, the one that ends it.

    Args:
        rows: Of any format.
        tokenizer: The small model's.
        prompt_format: `plain`, `chat` or a Jinja template; texts do without.
        max_length: Greatest number of tokens of an example, at least 2. What exceeds it is cut off the end.
        name: How errors call the model.
        packed: Put texts one after another and cut them into windows of `max_length`. Each window begins with
            the last token of the one before, so that every token but the first is predicted once. Otherwise
            each text is an example.

    Raises:
        InvalidRequest: `max_length` is below 2.
        InputFileError: Nothing to train on is left of a row or of all; names the line.
        PromptFormatError: The model does not have the format, or it fails on a row, which is named.
    """
    if max_length < 2:
        raise InvalidRequest(f"max_length is {max_length}, and must be at least 2")
    encoder = _Encoder(rows, tokenizer, prompt_format, max_length, name)
    if rows.kind == "text":
        return encoder.packed() if packed else encoder.examples(encoder.text)
    if rows.kind == "preference":
        return encoder.preferences()
    is_conversation = rows.kind == "messages" or isinstance(rows.rows[0]["prompt"], list)
    return encoder.examples(encoder.conversation if is_conversation else encoder.completion)


class _Encoder:
    def __init__(
        self, rows: Rows, tokenizer: Tokenizer, prompt_format: str, max_length: int, name: str
    ) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._format: dict[str, Any] = {
            "prompt_format": prompt_format,
            "tokenizer": tokenizer,
            "name": name,
        }
        self._is_chat = rows.kind != "text" and check_syntax(prompt_format, name) == "chat"
        self._max_length = max_length
        eos_id = tokenizer.eos_token_id
        self._end = [] if eos_id is None else [eos_id]

    # What is made of rows

    def packed(self) -> Encoded:
        stream = [i for index in range(len(self._rows)) for i in self._document(index)]
        step = self._max_length - 1
        windows = [
            stream[start : start + self._max_length] for start in range(0, len(stream) - 1, step)
        ]
        if not windows:
            raise InputFileError(
                f"{self._rows.source} has {len(stream)} token(s), and training needs one to start from and "
                "one to predict.\nhint: give more text"
            )
        return self._encoded([Example(w, [IGNORED, *w[1:]]) for w in windows], 0, 0)

    def examples(self, of_row: Callable[[int], list[Example]]) -> Encoded:
        """Return the examples that a function makes of each row, cut to the greatest length."""
        kept: list[Example] = []
        num_truncated = num_dropped = 0
        for index in range(len(self._rows)):
            whole = self._of(index, of_row)
            cut = [
                Example(e.token_ids[: self._max_length], e.labels[: self._max_length])
                for e in whole
            ]
            left = [e for e in cut if any(label != IGNORED for label in e.labels[1:])]
            kept += left
            if not left:
                num_dropped += 1
            elif any(len(e.token_ids) > self._max_length for e in whole):
                num_truncated += 1
        return self._encoded(kept, num_truncated, num_dropped)

    def preferences(self) -> Encoded:
        kept: list[PreferenceExample] = []
        num_truncated = num_dropped = 0
        for index in range(len(self._rows)):
            whole = self._of(index, self._preference)
            room = self._max_length - len(whole.prompt_ids)
            if room <= 0:
                num_dropped += 1
                continue
            num_truncated += max(len(whole.chosen_ids), len(whole.rejected_ids)) > room
            kept.append(
                PreferenceExample(
                    whole.prompt_ids, whole.chosen_ids[:room], whole.rejected_ids[:room]
                )
            )
        return self._encoded(kept, num_truncated, num_dropped)

    def _encoded(
        self,
        examples: list[Example] | list[PreferenceExample],
        num_truncated: int,
        num_dropped: int,
    ) -> Encoded:
        if not examples:
            raise InputFileError(
                f"no row of {self._rows.source} has anything to train on within {self._max_length} tokens: "
                "the prompts alone fill them.\nhint: raise --max-length"
            )
        num_tokens = num_trained = 0
        for example in examples:
            if isinstance(example, Example):
                num_tokens += len(example.token_ids)
                num_trained += sum(label != IGNORED for label in example.labels[1:])
            else:
                num_answer = len(example.chosen_ids) + len(example.rejected_ids)
                num_tokens += 2 * len(example.prompt_ids) + num_answer
                num_trained += num_answer
        return Encoded(
            examples, len(self._rows), num_truncated, num_dropped, num_tokens, num_trained
        )

    # What is made of one row

    def text(self, index: int) -> list[Example]:
        token_ids = self._document(index)
        return [Example(token_ids, [IGNORED, *token_ids[1:]])]

    def completion(self, index: int) -> list[Example]:
        ((prompt, answer),) = answers_of(self._rows.rows[index])
        prompt_ids = self._prompt(prompt, index)
        answer_ids = self._answer(answer, index) + self._end
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
                answers.append(self._answer(answer, index) + self._end)
                continue
            history = row["prompt"] + answer[:-1]
            content = answer[-1]["content"]
            token_ids = self._prompt(history, index) + self._turn(history, content, index)
            if token_ids[: len(prompt_ids)] != prompt_ids:
                raise PromptFormatError(
                    "an answer of several messages changes how the format writes the prompt before it.\n"
                    "hint: give answers of one message"
                )
            answers.append(token_ids[len(prompt_ids) :])
        return PreferenceExample(prompt_ids, *answers)

    def _of(self, index: int, function: Callable[[int], Any]) -> Any:
        try:
            return function(index)
        except PromptFormatError as error:
            if self._is_chat and not self._tokenizer.chat_template:
                raise  # No row is to blame.
            raise PromptFormatError(f"{self._rows.where(index)}: {error}") from error

    # Tokens

    def _document(self, index: int) -> list[int]:
        token_ids = list(
            self._tokenizer.encode(self._rows.rows[index]["text"], add_special_tokens=True)
        )
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

    def _answer(self, text: str, index: int) -> list[int]:
        token_ids = continuation_ids(text, self._tokenizer)
        if not token_ids:
            raise InputFileError(
                f"{self._rows.where(index)}: its answer has no tokens for {self._format['name']}, so there "
                "is nothing to learn.\nhint: leave this row out"
            )
        return token_ids

    def _turn(self, history: Sequence[Any], content: str, index: int) -> list[int]:
        """Return the token ids of an assistant's turn with what ends it."""
        prompt = self._text(history)
        turn: Message = {"role": "assistant", "content": content}
        whole = self._text([*history, turn], add_generation_prompt=False)
        text, is_ended = content, False
        if whole.startswith(prompt):
            text, is_ended = self._written(whole[len(prompt) :], content, prompt)
        return self._answer(text, index) + ([] if is_ended else self._end)

    def _written(self, rest: str, content: str, prompt: str) -> tuple[str, bool]:
        """Return a turn's text as the format wrote it after the prompt, and whether that ends it."""
        shown = content if content in rest else content.strip()  # Many templates trim it.
        start = rest.find(shown)
        if start < 0:  # Reasoning was stripped from it; or the format shows prompts only.
            return (rest, True) if rest.strip() else (content, False)
        before, after = rest[:start], rest[start + len(shown) :]
        if not before.strip() and not self._has_generation_prompt:
            # Some templates begin the next turn of the assistant whether asked to or not.
            while after and prompt.endswith(after[-1]):
                after, prompt = after[:-1], prompt[:-1]
        return (before + shown + after, True) if after.strip() else (before + shown, False)

    @cached_property
    def _has_generation_prompt(self) -> bool:
        """Whether the format begins the assistant's turn only where it is asked to."""
        probe: list[Message] = [{"role": "user", "content": "x"}]
        return self._text(probe) != self._text(probe, add_generation_prompt=False)

    def _text(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        return render_text(
            list(messages), add_generation_prompt=add_generation_prompt, **self._format
        )
