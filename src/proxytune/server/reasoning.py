"""Tells the reasoning of a model that thinks aloud from its answer, while the text arrives piece by piece.

Models that reason write `<think>…</think>` before the answer. Some chat templates open the tag themselves, at
the end of the prompt. Line breaks next to a tag belong to neither part.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxytune.text.prompts import PromptFormat, Tokenizer

OPENING = "<think>"
CLOSING = "</think>"
NUM_LAST_TOKENS = 16
"""Tokens at the end of a prompt in which an opening tag is looked for."""


def has_reasoning(base: PromptFormat) -> bool:
    """Whether a base thinks aloud in chats, as far as its chat template shows."""
    template = base.template if base.chat == "chat" else base.chat
    return CLOSING in (template or "")


def opens_reasoning(prompt_ids: Sequence[int], tokenizer: Tokenizer, *, begun: str = "") -> bool:
    """Whether a text begins within the reasoning.

    Args:
        prompt_ids: The base's prompt, which may end with an opening tag.
        tokenizer: The base's tokenizer.
        begun: The beginning of the answer, if it is given, which may have a tag that is not closed.
    """
    if begun.rfind(OPENING) > begun.rfind(CLOSING):
        return True
    end = tokenizer.decode(list(prompt_ids[-NUM_LAST_TOKENS:]), skip_special_tokens=False)
    return str(end).rstrip().endswith(OPENING)


class ReasoningSplitter:
    """Splits one text.

    Args:
        is_inside: Whether the text begins within the reasoning, because the prompt opened it.
    """

    def __init__(self, is_inside: bool) -> None:
        self._tag: str | None = CLOSING if is_inside else OPENING  # the one that may come next
        self._held = ""
        self._has_text = False
        """Whether the present part has begun, so that line breaks belong to it."""

    @property
    def is_inside(self) -> bool:
        """Whether the text that comes next is still reasoning, as far as is known."""
        return self._tag == CLOSING

    def push(self, piece: str, *, is_last: bool = False) -> tuple[str, str]:
        """Return what a piece of the text adds to the reasoning, and what it adds to the answer.

        What may be the beginning of a tag, or line breaks before one, is held back until more is known.
        """
        self._held += piece
        reasoning = ""
        if self._tag == OPENING:
            start = self._held.lstrip()
            if start.startswith(OPENING):
                self._held = start[len(OPENING) :]
                self._tag = CLOSING
            elif OPENING.startswith(start) and not is_last:
                return "", ""
            else:  # An answer that does not begin with the tag has no reasoning.
                self._tag = None
                self._has_text = True
        if self._tag == CLOSING:
            reasoning = self._reasoning(is_last)
            if self._tag == CLOSING:
                return reasoning, ""
        content = self._begun(self._held)
        self._held = ""
        return reasoning, content

    def _reasoning(self, is_last: bool) -> str:
        """Take what is certain to be reasoning; after the closing tag, the rest is the answer."""
        found, tag, rest = self._held.partition(CLOSING)
        if tag:
            text = self._begun(found.rstrip("\n"))
            self._tag, self._held, self._has_text = None, rest, False
            return text
        num_held = 0
        if not is_last:
            lengths = range(min(len(CLOSING) - 1, len(found)), 0, -1)
            num_held = next((n for n in lengths if found.endswith(CLOSING[:n])), 0)
            before = found[: len(found) - num_held]
            num_held += len(before) - len(before.rstrip("\n"))
        self._held = found[len(found) - num_held :]
        return self._begun(found[: len(found) - num_held])

    def _begun(self, text: str) -> str:
        """Return a piece of the present part, without line breaks before its first character."""
        if not self._has_text:
            text = text.lstrip("\n")
            self._has_text = bool(text)
        return text
