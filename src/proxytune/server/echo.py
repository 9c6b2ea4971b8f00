"""What an answer shows of its prompt: its text, which `echo` asks for, and where its tokens begin there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxytune.text.detokenize import TextStream
from proxytune.text.prompts import Tokenizer


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as an answer shows it.

    Args:
        text: What stands before the new text; empty without `echo`.
        token_ids: The prompt's tokens, if they are scored.
        offsets: Where each of them begins in `text`; empty if that is not asked for.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()


def token_offsets(text: str, token_ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return where each token of a prompt begins in its text.

    A special token takes up room only where the text shows it. Tokens of one character begin together.
    """
    special = {i: str(tokenizer.decode([i])) for i in tokenizer.all_special_ids}
    stream = TextStream(tokenizer)
    offsets, place = [], 0
    for token_id in token_ids:
        offsets.append(min(place, len(text)))
        piece = stream.push(token_id)
        shown = special.get(token_id)
        if shown and text.startswith(shown, place):
            piece += shown
        place += len(piece)
    return tuple(offsets)
