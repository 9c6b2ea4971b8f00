"""A small model with another tokenizer than the base's, answering in the base's tokens.

It reads the text as its own tokenizer cuts it. After each of the base's tokens, the whole new text is cut
again; what has not changed is kept, and the rest is taken back and read again. The answer is logprobs of the
base's tokens. Tokens that the small model has, too, keep its logprobs; all others get `UNMAPPED`. An expert
and an anti-expert with one tokenizer thus differ by log p_expert - log p_anti_expert at shared tokens, and by
exactly 0 elsewhere. Logprobs are used because a difference of 0 means "as likely as before" only for them.

In the middle of a character there is no text to cut, so there every token gets `UNMAPPED`.

Sources: mapping equal strings, without an offset elsewhere, is ThinkLogit's (Zhang et al. 2025,
arXiv:2507.12759). Cutting the text again and keeping the longest common prefix is how universal assisted
generation drafts across tokenizers (Hugging Face and Intel, 2024).
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune.backends.base import (
    Backend,
    Capabilities,
    Prefilled,
    Spelling,
    Translation,
    num_shared_tokens,
)
from proxytune.errors import PromptTooLong, UnsupportedModel
from proxytune.text.prompts import continuation_ids
from proxytune.text.vocab import TokenMap, map_tokens, token_bytes

UNMAPPED = -100.0
"""Logprob of tokens that the small model does not have: hardly any probability, but finite, so that two
models differ by 0 and not by NaN."""

READ_TOKENS = 64
"""Maximum number of tokens read at once: each of them gives a whole row of logits."""


@dataclass(slots=True)
class _TextRow:
    """One row's text, in the tokens of both models.

    Args:
        prompt: In the small model's tokens.
        token_ids: What follows the prompt, in the base's tokens.
        read: What the small model holds, in its own tokens: perhaps of a text that has been taken back since.
    """

    prompt: list[int]
    token_ids: list[int]
    read: list[int]


@dataclass(slots=True)
class _State:
    inner: Any
    rows: list[_TextRow]


class _Reading(NamedTuple):
    """What a row reads next.

    Args:
        num_kept: How many of the tokens that it holds stay.
        token_ids: What comes after them.
        answers: Positions of the base's tokens, each with the index of the one of `token_ids` after which it
            is answered.
        following: The first position that another reading has to answer.
    """

    num_kept: int
    token_ids: list[int]
    answers: list[tuple[int, int]]
    following: int


def token_map(base: Spelling, own: Spelling) -> TokenMap:
    """Map the base's tokens to a small model's; the tokens that begin or end a text map to each other."""

    def ids(of: Spelling) -> tuple[int | None, int | None]:
        bos = of.tokenizer.bos_token
        return of.tokenizer.eos_token_id, None if bos is None else of.tokenizer.get_vocab().get(bos)

    return map_tokens(
        base.vocabulary,
        own.vocabulary,
        base_special_ids=frozenset(base.tokenizer.all_special_ids),
        small_special_ids=frozenset(own.tokenizer.all_special_ids),
        roles=zip(ids(base), ids(own), strict=True),
    )


class RetokenisedBackend(Backend[_State]):
    """A small model behind the base's vocabulary.

    Prompts come in the small model's own tokens, as its format renders them, and are not cut again. All
    tokens after them come in the base's.

    Args:
        inner: The small model.
        own: How it spells text.
        base: How the base spells text.

    Raises:
        UnsupportedModel: The model cannot rewind.
    """

    def __init__(self, inner: Backend[Any], own: Spelling, base: Spelling) -> None:
        if not inner.capabilities.can_rewind:
            raise UnsupportedModel(
                f"{inner.name} cannot take back tokens, and with another tokenizer than the base's the end "
                "of a text is cut again after every token.\n"
                "hint: use small models with attention layers only"
            )
        self.name = inner.name
        self.inner = inner
        self.own = own
        self.token_map = token_map(base, own)
        self.vocab_size = base.vocabulary.width
        self._bytes: Mapping[int, bytes] = token_bytes(base.vocabulary)
        self._special_ids = frozenset(base.tokenizer.all_special_ids)
        self._starts_with = list(own.tokenizer.encode("", add_special_tokens=True))
        self._capabilities = replace(inner.capabilities, reuses_logits=False)
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def capabilities(self) -> Capabilities:
        """What the small model can do; its context counts its own tokens."""
        return self._capabilities

    @property
    def translation(self) -> Translation:
        """The model itself, its spelling and the map of its tokens."""
        return Translation(self.inner, self.own, self.token_map)

    @property
    def num_prompt_ids(self) -> int:
        """Number of token ids that prompts are made of."""
        return self.inner.num_prompt_ids

    def own_ids(self, token_ids: Sequence[int], *, is_start: bool = False) -> list[int]:
        """Return the small model's tokens of a text that is given in the base's.

        An incomplete character at the end becomes a replacement character. At the start, the tokens that the
        small model's tokenizer puts before every text come first.
        """
        found = self._cut(token_ids, is_final=True)
        assert found is not None
        start = self._starts_with if is_start else []
        if found[: len(start)] != start:
            found = [*start, *found]
        if is_start and not found:  # a start token of the base that the small model does not have
            eos = self.own.tokenizer.eos_token_id
            found = [0 if eos is None else eos]
        return found

    def prefill(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None] | None = None
    ) -> Prefilled[_State]:
        """Run whole prompts, in the small model's tokens; see `Backend.prefill`."""
        state, logits = self.inner.prefill(prompts, adapters=adapters)
        rows = [_TextRow(list(prompt), [], list(prompt)) for prompt in prompts]
        return Prefilled(_State(state, rows), self._mapped(logits))

    def extend(self, state: _State, token_ids: Tensor) -> Tensor:
        """Append `[batch, num_tokens]` of the base's tokens; return logprobs `[batch, num_tokens, vocab]`.

        Raises:
            PromptTooLong: The text, in the small model's tokens, exceeds its context.
            BackendError: The model failed.
        """
        wanted: list[list[list[int] | None]] = []
        # An expert and its anti-expert read the same text, so cut each text once.
        rests: dict[tuple[int, ...], list[int] | None] = {}
        for row, given in zip(state.rows, token_ids.tolist(), strict=True):
            cuts: list[list[int] | None] = []
            for token_id in given:
                row.token_ids.append(token_id)
                text = tuple(row.token_ids)
                if text not in rests:
                    rests[text] = self._cut(text)
                rest = rests[text]
                cuts.append(None if rest is None else [*row.prompt, *rest])
            wanted.append(cuts)
        answers: Tensor | None = None
        following = [0] * len(wanted)
        while True:
            readings = [
                _reading(row.read, cuts, first)
                for row, cuts, first in zip(state.rows, wanted, following, strict=True)
            ]
            if not any(reading.answers for reading in readings) and answers is not None:
                return answers
            places, found, following = self._read(state, readings)
            if answers is None:
                shape = (*token_ids.shape, self.vocab_size)
                answers = torch.full(shape, UNMAPPED, device=found.device)
            if places:
                rows, positions = zip(*places, strict=True)
                answers[list(rows), list(positions)] = found

    def _read(
        self, state: _State, readings: Sequence[_Reading]
    ) -> tuple[list[tuple[int, int]], Tensor, list[int]]:
        """Let every row read its tokens.

        Rows that read fewer tokens than others read their last one again, and forget it.

        Returns:
            The rows and positions that are answered, the answers, and each row's first open position.
        """
        rows = state.rows
        limit = self.inner.capabilities.max_context
        kept, tokens = [], []
        for row, reading in zip(rows, readings, strict=True):
            is_idle = not reading.answers
            kept.append(len(row.read) - 1 if is_idle else reading.num_kept)
            tokens.append(row.read[-1:] if is_idle else reading.token_ids)
        width = min(READ_TOKENS, max(map(len, tokens)))
        if limit is not None:
            for own, num_kept in zip(tokens, kept, strict=True):
                if num_kept + len(own) > limit:
                    raise PromptTooLong(
                        f"the text has reached {num_kept + len(own)} tokens of {self.name}, which has a "
                        f"context of {limit}.\nhint: ask for fewer new tokens; this model's tokenizer may "
                        "need more tokens than the base's for the same text"
                    )
            width = min(width, limit - max(kept))  # padding must not exceed it either
        surplus = [len(row.read) - num_kept for row, num_kept in zip(rows, kept, strict=True)]
        if any(surplus):
            self.inner.rewind(state.inner, surplus)
        parts = [own[:width] for own in tokens]
        filled = torch.tensor([part + part[-1:] * (width - len(part)) for part in parts])
        logits = self.inner.extend(state.inner, filled)
        places, offsets, following = [], [], []
        for index, (row, reading, part) in enumerate(zip(rows, readings, parts, strict=True)):
            row.read = [*row.read[: kept[index]], *part]
            done = [answer for answer in reading.answers if answer[1] < len(part)]
            places += [(index, position) for position, _ in done]
            offsets += [(index, offset) for _, offset in done]
            left = reading.answers[len(done) :]
            following.append(left[0][0] if left else reading.following)
        picked = logits[:0, 0]
        if offsets:
            which, where = zip(*offsets, strict=True)
            picked = logits[list(which), list(where)]
        found = self._mapped(picked)
        filling = [width - len(part) for part in parts]
        if any(filling):
            self.inner.rewind(state.inner, filling)
        return places, found, following

    def rewind(self, state: _State, num_tokens: Sequence[int]) -> None:
        """Forget the last of the base's tokens; the small model takes back its own at the next reading."""
        for row, count in zip(state.rows, num_tokens, strict=True):
            assert 0 <= count <= len(row.token_ids)
            del row.token_ids[len(row.token_ids) - count :]

    def select(self, state: _State, rows: Sequence[int]) -> _State:
        """Return a state of the given rows; see `Backend.select`."""
        return _State(self.inner.select(state.inner, rows), _copies(state.rows, rows))

    def copy(self, state: _State, rows: Sequence[int]) -> _State:
        """Return a separate state of the given rows; see `Backend.copy`."""
        return _State(self.inner.copy(state.inner, rows), _copies(state.rows, rows))

    def merge(self, state: _State, other: _State, rows: Sequence[int]) -> _State:
        """Return a state of the rows of two; see `Backend.merge`."""
        inner = self.inner.merge(state.inner, other.inner, rows)
        return _State(inner, _copies([*state.rows, *other.rows], rows))

    def _cut(self, token_ids: Sequence[int], *, is_final: bool = False) -> list[int] | None:
        """Return the small model's tokens of what follows a prompt; None in the middle of a character.

        Special tokens are not text: those that the small model has, too, map to its own; others are left out.
        """
        found: list[int] = []
        text = bytearray()
        for token_id in token_ids:
            if token_id in self._special_ids:
                found += self._tokens(text.decode("utf-8", "replace"))
                text.clear()
                own = self.token_map.small_id(token_id)
                found += [] if own is None else [own]
            else:
                text += self._bytes.get(token_id, b"")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = decoder.decode(bytes(text), final=is_final)
        if decoder.getstate()[0]:
            return None
        return found + self._tokens(last)

    def _tokens(self, text: str) -> list[int]:
        return continuation_ids(text, self.own.tokenizer) if text else []

    def _mapped(self, logits: Tensor) -> Tensor:
        """Return logprobs of the base's tokens, `[..., vocab]` float32, from the small model's logits."""
        device = logits.device
        if device not in self._tables:
            small_ids = self.token_map.small_ids.to(device)
            unmapped = (small_ids < 0).nonzero().flatten()
            padding_ids = self.own.vocabulary.padding_ids.to(device)
            self._tables[device] = small_ids.clamp(min=0), unmapped, padding_ids
        gather, unmapped, padding_ids = self._tables[device]
        logits = logits.float()
        if len(padding_ids):
            logits = logits.index_fill(-1, padding_ids, -torch.inf)
        logprobs = logits.log_softmax(-1).index_select(-1, gather)
        return logprobs.index_fill_(-1, unmapped, UNMAPPED)


def _reading(read: Sequence[int], cuts: Sequence[list[int] | None], first: int) -> _Reading:
    """Plan one run of the small model, which holds `read`: as many positions as one text leads through.

    `cuts` is the text after each position, in its tokens; None in the middle of a character.
    """
    answers: list[tuple[int, int]] = []
    text: list[int] = []
    num_kept = 0
    for position in range(first, len(cuts)):
        cut = cuts[position]
        if cut is None:
            continue
        if not answers:
            # Read at least the last token, because what follows it is asked for.
            num_kept = min(num_shared_tokens(read, cut), len(cut) - 1)
        elif len(cut) <= len(text) or cut[: len(text)] != text:
            return _Reading(num_kept, text[num_kept:], answers, position)
        text = cut
        answers.append((position, len(text) - 1 - num_kept))
    return _Reading(num_kept, text[num_kept:], answers, len(cuts))


def _copies(rows: Sequence[_TextRow], which: Sequence[int]) -> list[_TextRow]:
    chosen = (rows[index] for index in which)
    return [_TextRow(list(row.prompt), list(row.token_ids), list(row.read)) for row in chosen]
