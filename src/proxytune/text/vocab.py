"""Whether two models share one set of tokens, and how to translate logits and token ids between them.

Words: a *vocabulary* maps token strings to ids. Its *width* is the number of rows of the model's output head,
which is often rounded up. A *padding id* is an id below the width that no token has. *Added* tokens are those
that a tokenizer keeps beside its model: special tokens, which are not text, and words added later. All other
tokens are *ordinary*. Two vocabularies are *aligned* if each ordinary token of one is a token of the other;
added tokens may differ. The maps are compared, never the sizes: Qwen2.5 has heads of 151,936 and of 152,064
rows for one tokenizer.

Text and models never reach this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, zip_longest
from typing import Literal

import torch
from torch import Tensor

from proxytune.errors import InvalidRequest, VocabularyMismatch
from proxytune.text.prompts import Tokenizer, added_tokens

NUM_EXAMPLES = 5
"""Maximum number of differences that a `VocabularyMismatch` shows."""

_LINE_BREAKS = ("\n", "Ċ", "<0x0A>")
"""How tokenizers write a line break: as text, in byte-level characters, as SentencePiece's byte."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model.

    Args:
        name: The model's name in errors.
        token_to_id: The id of each token, including added tokens.
        width: Number of rows of the output head, above every id.
        added_ids: The ids of added tokens; ids that no token has do not count.
        bos_id: The id of the token that begins a text, if there is one.
        eos_id: The id of the token that ends a text, if there is one.

    Raises:
        ValueError: An id does not lie between 0 and `width`.
    """

    name: str
    token_to_id: Mapping[str, int]
    width: int
    added_ids: frozenset[int] = frozenset()
    bos_id: int | None = None
    eos_id: int | None = None

    def __post_init__(self) -> None:
        ids = self.token_to_id.values()
        if ids and not (min(ids) >= 0 and max(ids) < self.width):
            raise ValueError(
                f"{self.name} has token ids from {min(ids)} to {max(ids)}, and an output head of "
                f"{self.width} rows"
            )

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, *, name: str, width: int) -> Vocabulary:
        """Read the tokens of a tokenizer whose model has `width` output rows.

        Tokens beyond the head, such as a pad token added only to the tokenizer, are left out: the model can
        neither read nor produce them.
        """
        tokens = {token: i for token, i in tokenizer.get_vocab().items() if 0 <= i < width}
        return cls.of_tokens(tokens, tokenizer, name=name, width=width)

    @classmethod
    def of_tokens(
        cls,
        token_to_id: Mapping[str, int],
        tokenizer: Tokenizer,
        *,
        name: str,
        width: int,
        added_ids: Iterable[int] = (),
    ) -> Vocabulary:
        """Return a vocabulary of these tokens; those that the tokenizer has added are added, too."""
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        return cls(
            name,
            token_to_id,
            width,
            frozenset({*added_ids, *added_tokens(tokenizer).values(), *tokenizer.all_special_ids}),
            None if bos is None else token_to_id.get(bos),
            None if eos is None else token_to_id.get(eos),
        )

    @cached_property
    def padding_ids(self) -> Tensor:
        """`[num_padding]`, ids below the width that no token has, ascending, on the CPU. Never sampled."""
        return (~self._has_token).nonzero().flatten()

    @cached_property
    def _has_token(self) -> Tensor:
        has_token = torch.zeros(self.width, dtype=torch.bool)
        has_token[_ids(self.token_to_id.values())] = True
        return has_token

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """Check ids that come from a caller, such as a prompt given as token ids.

        Raises:
            InvalidRequest: An id is out of range or belongs to no token.
        """
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < self.width:
                why = f"the ids of {self.name} end at {self.width - 1}"
            elif not self._has_token[token_id]:
                why = f"no token of {self.name} has this id (it pads the output head)"
            else:
                continue
            raise InvalidRequest(
                f"token id {token_id}, at position {position} of the prompt, cannot be read: {why}.\n"
                f"hint: give token ids of {self.name}'s own tokenizer, or give the prompt as text"
            )


def token_bytes(vocabulary: Vocabulary) -> dict[int, bytes]:
    """Return the bytes that each token stands for, by id.

    Tokens are written in one of three ways: in the characters that byte-level BPE assigns to bytes (a space
    is `Ġ`), in those of SentencePiece (a space is `▁`, a lone byte `<0x0A>`), or as plain text. The
    vocabulary's way of writing a space shows which. A special token stands for its own name.
    """
    tokens = vocabulary.token_to_id
    table = _byte_level_characters()

    def byte_level(token: str) -> bytes:
        return bytes(table[c] for c in token) if table.keys() >= set(token) else token.encode()

    def sentence_piece(token: str) -> bytes:
        is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        return bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()

    content_of: Callable[[str], bytes] = str.encode
    if any(token.startswith("Ġ") for token in tokens):
        content_of = byte_level
    elif any(token.startswith("▁") for token in tokens):
        content_of = sentence_piece
    return {token_id: content_of(token) for token, token_id in tokens.items()}


def _byte_level_characters() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE.

    Printable characters of Latin-1 stand for themselves; the other bytes, in order, for the characters from
    U+0100 on (Radford et al. 2019, the code of GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


@dataclass(frozen=True, eq=False)
class Alignment:
    """How a small model's token ids correspond to the base's. `align` makes one.

    Args:
        kind: `same` (one map, one width), `padded` (one map, another width), `permuted` (the same token
            strings under other ids), or `added` (added tokens that only one of them has).
        base_width: Rows of the base's output head.
        small_width: Rows of the small model's output head.
        num_shared: Without `small_ids`: ids from here on are not shared.
        small_ids: `[base_width]`, the small model's id of each base id, -1 for ids that it has no token for;
            None if all tokens of the base have the same id in the small model.
        stand_ins: For each id of a token that only the base has, the small model's id that is read in its
            place.
        dropped: The small model's ids of tokens that only it has.
    """

    kind: Literal["same", "padded", "permuted", "added"]
    base_width: int
    small_width: int
    num_shared: int
    small_ids: Tensor | None = field(default=None, repr=False)
    stand_ins: Mapping[int, int] = field(default_factory=dict, repr=False)
    dropped: tuple[int, ...] = field(default=(), repr=False)
    _tables: dict[torch.device, _Tables] = field(default_factory=dict, init=False, repr=False)

    def logits_to_base(self, logits: Tensor) -> Tensor:
        """Arrange a small model's logits in the base's order and width.

        Args:
            logits: `[..., small_width]`, any dtype and device.

        Returns:
            `[..., base_width]`; the same tensor for `same`, possibly a view without `small_ids`. Padding ids
            of the base that this method adds are 0, so that expert and anti-expert do not differ there; for
            `same` they keep the model's logits. `decode/batch.py` never samples them. Tokens that only the
            base has are -inf: a pair that lacks them names them (`Contribution.is_unshared`).
        """
        assert logits.shape[-1] == self.small_width, (tuple(logits.shape), self.small_width)
        if self.kind == "same":
            return logits
        if self.small_ids is None:
            shared = logits[..., : self.num_shared]
            num_missing = self.base_width - self.num_shared
            return torch.nn.functional.pad(shared, (0, num_missing)) if num_missing else shared
        tables = self._tables_on(logits.device)
        aligned = logits.index_select(-1, tables.gather)
        if len(tables.padding):
            aligned.index_fill_(-1, tables.padding, 0)
        if len(tables.missing):
            aligned.index_fill_(-1, tables.missing, -torch.inf)
        return aligned

    def ids_to_small(self, token_ids: Tensor) -> Tensor:
        """Translate the base's token ids, a LongTensor of any shape, to the small model's.

        Ids must belong to tokens (`Vocabulary.check_token_ids`). With `small_ids`, a padding id becomes -1,
        so that the model's embedding refuses it instead of reading another token. A token that only the base
        has becomes its stand-in.
        """
        if self.small_ids is None:
            return token_ids
        return self._tables_on(token_ids.device).read_ids[token_ids]

    @property
    def read_ids(self) -> Tensor | None:
        """`[base_width]` on the CPU, `small_ids` with the stand-ins; None if ids stay as they are."""
        if self.small_ids is None:
            return None
        read_ids = self.small_ids.clone()
        read_ids[_ids(self.stand_ins)] = _ids(self.stand_ins.values())
        return read_ids

    def _tables_on(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            read_ids = self.read_ids
            assert self.small_ids is not None and read_ids is not None
            self._tables[device] = _Tables(
                read_ids.to(device),
                self.small_ids.clamp(min=0).to(device),
                (read_ids < 0).nonzero().flatten().to(device),
                _ids(self.stand_ins).to(device),
            )
        return self._tables[device]


@dataclass(frozen=True, slots=True, eq=False)
class _Tables:
    """A map of ids on one device."""

    read_ids: Tensor  # [base_width], -1 for padding ids
    gather: Tensor  # [base_width], `small_ids` with 0 for -1
    padding: Tensor  # [num_padding], base ids that no token has
    missing: Tensor  # [num_missing], base ids of tokens that the small model lacks


def align(base: Vocabulary, small: Vocabulary) -> Alignment:
    """Find how the small model's tokens correspond to the base's.

    Raises:
        VocabularyMismatch: An ordinary token of one is no token of the other, ids do not correspond one to
            one, or less than half of a vocabulary is shared.
    """
    num_shared = max(base.token_to_id.values(), default=-1) + 1
    if base.token_to_id == small.token_to_id:
        kind: Literal["same", "padded"] = "same" if base.width == small.width else "padded"
        return Alignment(kind, base.width, small.width, num_shared)
    shared = [token for token in base.token_to_id if token in small.token_to_id]
    # Where nearly everything was added, such as by a tokenizer of whole words, "added" says nothing.
    if 2 * len(shared) < max(len(base.token_to_id), len(small.token_to_id)):
        raise _mismatch(base, small)
    in_base = _ids(base.token_to_id[token] for token in shared)
    in_small = _ids(small.token_to_id[token] for token in shared)
    small_ids = torch.full((base.width,), -1)
    small_ids[in_base] = in_small
    base_ids = torch.full((small.width,), -1)
    base_ids[in_small] = in_base
    # Two token strings may share an id. That is harmless unless the other model tells them apart.
    if not (torch.equal(small_ids[in_base], in_small) and torch.equal(base_ids[in_small], in_base)):
        raise _mismatch(base, small)
    only_base = {i for token, i in base.token_to_id.items() if token not in small.token_to_id}
    only_small = {i for token, i in small.token_to_id.items() if token not in base.token_to_id}
    if not (only_base <= base.added_ids and only_small <= small.added_ids):
        raise _mismatch(base, small)
    if not only_base and not only_small:
        return Alignment("permuted", base.width, small.width, num_shared, small_ids)
    fallback = _separator(small)
    keeps_ids = torch.equal(in_base, in_small) and min(only_small, default=-1) >= num_shared
    return Alignment(
        "added",
        base.width,
        small.width,
        num_shared,
        small_ids if only_base or not keeps_ids else None,
        {i: _stand_in(i, base, small, fallback) for i in sorted(only_base) if small_ids[i] < 0},
        tuple(i for i in sorted(only_small) if base_ids[i] < 0),
    )


def _stand_in(token_id: int, base: Vocabulary, small: Vocabulary, separator: int) -> int:
    """Return what a small model reads in place of a token that only the base has.

    The tokens that begin and end a text have counterparts. Other added tokens stand between parts of a text,
    as a separator does, and no model has learnt to read its unknown token.
    """
    if token_id == base.eos_id and small.eos_id is not None:
        return small.eos_id
    if token_id == base.bos_id and small.bos_id is not None:
        return small.bos_id
    return separator


def _separator(small: Vocabulary) -> int:
    """Return a model's line break, or what comes nearest to it."""
    for text in _LINE_BREAKS:
        if text in small.token_to_id:
            return small.token_to_id[text]
    return min(small.token_to_id.values()) if small.eos_id is None else small.eos_id


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Which of the base's tokens a small model with another tokenizer has too. `map_tokens` makes one.

    Args:
        small_ids: `[base_width]`, the small model's id of each base id, -1 where it has no such token.
        num_base_tokens: Number of the base's tokens.
    """

    small_ids: Tensor = field(repr=False)
    num_base_tokens: int

    @property
    def num_mapped(self) -> int:
        """Number of the base's tokens that the small model has too."""
        return int((self.small_ids >= 0).sum())

    @property
    def share(self) -> float:
        """Their share of the base's tokens."""
        return self.num_mapped / max(1, self.num_base_tokens)

    @cached_property
    def distinct(self) -> Tensor:
        """`[num]`, base ids with distinct small ids: some tokens of the base mean the same."""
        found = {own: base for base, own in enumerate(self._list) if own >= 0}
        return torch.tensor(sorted(found.values()), dtype=torch.long)

    def small_id(self, token_id: int) -> int | None:
        """Return the small model's id of one of the base's tokens; None if it has none."""
        own = self._list[token_id]
        return own if own >= 0 else None

    @cached_property
    def _list(self) -> list[int]:
        ids: list[int] = self.small_ids.tolist()
        return ids


def map_tokens(
    base: Vocabulary,
    small: Vocabulary,
    *,
    base_special_ids: Collection[int] = (),
    small_special_ids: Collection[int] = (),
    roles: Iterable[tuple[int | None, int | None]] = (),
) -> TokenMap:
    """Find the tokens of two tokenizers that stand for the same bytes.

    Args:
        base: The base's tokens.
        small: The small model's.
        base_special_ids: Tokens that are not text; each is mapped only to one with the same name.
        small_special_ids: The same for the small model.
        roles: Pairs of ids that mean the same whatever their names, such as those that end a text. The first
            pair with a base id counts.
    """
    small_bytes = token_bytes(small)
    ordinary: dict[bytes, int] = {}
    # Of two tokens for the same bytes, tokenizers use the one that is not written as `<0x41>`.
    for _, token_id in sorted(small.token_to_id.items(), key=lambda item: item[0][:3] != "<0x"):
        if token_id not in small_special_ids:
            ordinary[small_bytes[token_id]] = token_id
    special = {t: i for t, i in small.token_to_id.items() if i in small_special_ids}
    small_ids = torch.full((base.width,), -1)
    base_bytes = token_bytes(base)
    for token, token_id in base.token_to_id.items():
        is_special = token_id in base_special_ids
        found = special.get(token) if is_special else ordinary.get(base_bytes[token_id])
        if found is not None:
            small_ids[token_id] = found
    done: set[int] = set()
    for base_id, small_id in roles:
        if base_id is not None and small_id is not None and base_id not in done:
            small_ids[base_id] = small_id
            done.add(base_id)
    return TokenMap(small_ids, len(set(base.token_to_id.values())))


def _ids(ids: Iterable[int]) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.long)


def _mismatch(base: Vocabulary, small: Vocabulary) -> VocabularyMismatch:
    in_base, in_small = base.token_to_id, small.token_to_id
    only_base = sorted((i, token) for token, i in in_base.items() if token not in in_small)
    only_small = sorted((i, token) for token, i in in_small.items() if token not in in_base)
    other_ids = sorted(
        (i, in_small[token], token) for token, i in in_base.items() if in_small.get(token, i) != i
    )
    kinds = (
        [f"{token!r} (id {i}) only in {base.name}" for i, token in only_base[:NUM_EXAMPLES]],
        [f"{token!r} (id {i}) only in {small.name}" for i, token in only_small[:NUM_EXAMPLES]],
        [
            f"{token!r} is id {i} in {base.name} and id {j} in {small.name}"
            for i, j, token in other_ids[:NUM_EXAMPLES]
        ],
    )
    examples = islice((e for row in zip_longest(*kinds) for e in row if e), NUM_EXAMPLES)
    return VocabularyMismatch(
        f"{small.name} and {base.name} do not share one vocabulary, so their logits cannot be added token by "
        f"token: {len(in_base):,} tokens in {base.name} and {len(in_small):,} in {small.name}; "
        f"{len(only_base):,} only in {base.name}, {len(only_small):,} only in {small.name}, "
        f"{len(other_ids):,} under other ids.\n"
        + "".join(f"  {example}\n" for example in examples)
        + f"hint: take expert and anti-expert from small models that use the tokenizer of {base.name}, "
        'usually of the same family and generation; or let a recipe with "vocabulary": "map" steer the '
        "tokens that both have"
    )
