"""Turns token ids into text one at a time, with the same result for streams and whole texts.

Words: later tokens cannot change *settled* text. *Unsettled* text ends in U+FFFD, which may be half a
character that is still to be completed. *Held-back* text is settled but may begin a stop string.

The text of new tokens has one definition, and every front end gets it from `TextStream`: what
`decode(prompt_ids + new_ids)` adds to its common beginning with `decode(prompt_ids)`, with special tokens
skipped and spaces not cleaned up. Without a prompt that is `decode(new_ids)`. The prompt matters for
tokenizers that drop the space before a text's first word (SentencePiece): the space is part of the new
text. If the prompt ends within a character, the new text completes that character, which then belongs to it.

There is one exception. If any byte of a run of byte tokens is invalid, decoders with byte fallback show every
byte of the run as U+FFFD, including complete characters before it. Those were returned earlier, and stay. If
such a run is longer than 64 tokens, its number of U+FFFD may differ as well.

The stop string that completes first ends the text, which is cut before it; of several that complete with the
same character the longest counts. A reader who gets the text character by character sees the same, so it does
not depend on how characters are spread over tokens. A stop string that completes within the first
`min_tokens` tokens does not end the text and stays in it.

Models, logits and end-of-sequence tokens never reach this file: `decode/batch.py` decides what to push.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from proxytune.text.prompts import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# How many U+FFFD at the end of a long run of them can still change: half a character is at most 3 bytes, and
# a decoder shows it as one U+FFFD (byte-level BPE) or as one per byte (byte fallback).
_MAX_UNSETTLED = 3

# Tokens of context that are kept when the window is shortened; one visible token would do for a leading
# space.
_CONTEXT = 8

# The window is shortened when it is this long, so that a push decodes 8 to 16 tokens. With a long run of
# U+FFFD it grows to the second length. Then all but the last of them are settled, and it is shortened anyway.
_WINDOW = 16
_MAX_WINDOW = 64


class TextStream:
    """Turns the token ids of one row into text as they arrive.

    The results of all pushes and of `finish`, joined, are the whole text (see the module's docstring). The
    cost of a push does not grow with the text: only a window of the last tokens is decoded, whose beginning
    is context.

    Args:
        tokenizer: The base's tokenizer.
        stop: Strings that end the text.
        prompt_ids: The tokens before the first new one.
        min_tokens: Minimum number of pushes before a stop string may end the text.

    Raises:
        ValueError: A stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        prompt_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        if isinstance(stop, str) or not all(stop):
            why = "must be a sequence of strings that are not empty"
            raise ValueError(f"stop is {stop!r}, and {why}")
        self._tokenizer = tokenizer
        self._skipped: dict[int, bool] = {}
        # The prompt's part of the window's text, until new text has been settled; then nothing.
        self._window, self._prompt_text = self._context_of(prompt_ids)
        self._window_text = self._prompt_text
        # Characters of the window's text that are done with, and ids of the window wholly in them.
        self._num_settled, self._num_settled_ids = len(self._prompt_text), len(self._window)
        self._stops = _StopMatcher(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stops.matched is not None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stops.matched

    @property
    def text(self) -> str:
        """The text returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is now certain, often none.

        After a stop string nothing more is returned.
        """
        if self.stopped:
            return ""
        self._num_tokens += 1
        return self._give(self._stops.push(self._settle(token_id), self._may_stop))

    def finish(self) -> str:
        """Return what was held back, with half a character as the tokenizer's U+FFFD."""
        if self.stopped:
            return ""
        rest = self._window_text[self._num_settled :]
        self._num_settled = len(self._window_text)
        text = self._stops.push(rest, self._may_stop)
        return self._give(text + self._stops.finish())

    @property
    def _may_stop(self) -> bool:
        return self._num_tokens > self._min_tokens

    def _give(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text

    def _settle(self, token_id: int) -> str:
        """Add a token to the window and return the text that it settles."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._window_text and self._is_skipped(token_id):
            self._window.pop()
            return ""
        settled = self._window_text[: self._num_settled]
        if not text.startswith(settled):
            if self._prompt_text and text.startswith(self._prompt_text.rstrip(_REPLACEMENT)):
                # The prompt's last character was incomplete, and is no longer.
                self._num_settled = _common_length(self._prompt_text, text)
            else:
                # Byte fallback takes back characters that were returned: go on with what came after them.
                del self._window[: self._num_settled_ids]
                text = self._decode(self._window)
                self._num_settled = self._num_settled_ids = 0
        self._window_text = text
        num_unsettled = len(text) - len(text.rstrip(_REPLACEMENT))
        if len(self._window) >= _MAX_WINDOW:
            num_unsettled = min(num_unsettled, _MAX_UNSETTLED)
        num_settled = max(len(text) - num_unsettled, self._num_settled)
        new = text[self._num_settled : num_settled]
        self._num_settled = num_settled
        if num_settled == len(text):
            self._num_settled_ids = len(self._window)
        if new:
            self._prompt_text = ""
        if len(self._window) >= _WINDOW:
            self._shorten()
        return new

    def _shorten(self) -> None:
        """Drop the window's oldest ids if its newest text stays the same without them."""
        settled = self._window_text[: self._num_settled]
        num_unsettled = len(self._window_text) - self._num_settled
        # The last settled character must be there again. If it is U+FFFD, four must be: a window that begins
        # within a character begins with up to three that are not in the text.
        num_compared = _MAX_UNSETTLED + 1 if settled.endswith(_REPLACEMENT) else 1
        tail = self._window_text[max(0, self._num_settled - num_compared) :]
        text = self._decode(self._window[-_CONTEXT:])
        is_safe = bool(settled) and text.endswith(tail)
        # If not safe here (a run of byte tokens has to begin at a character), then perhaps a token later.
        if not is_safe and len(self._window) < _MAX_WINDOW:
            return
        num_dropped = len(self._window) - _CONTEXT
        del self._window[:num_dropped]
        self._window_text = text
        self._num_settled = max(0, len(text) - num_unsettled)
        self._num_settled_ids = max(0, self._num_settled_ids - num_dropped)

    def _context_of(self, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
        """Return the last prompt ids that have text, and their text."""
        visible = (int(i) for i in reversed(prompt_ids) if not self._is_skipped(int(i)))
        context = list(islice(visible, _CONTEXT))[::-1]
        return context, self._decode(context)

    def _is_skipped(self, token_id: int) -> bool:
        """Whether this is a special token, which has no text and does not separate its neighbours."""
        if token_id not in self._skipped:
            shown = self._tokenizer.decode(
                [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            self._skipped[token_id] = bool(shown) and not self._decode([token_id])
        return self._skipped[token_id]

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def _common_length(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


class _StopMatcher:
    """Passes on text up to the first stop string, and holds back what may begin one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._max_held = max((len(s) for s in stop), default=1) - 1
        self._held = ""
        self.matched: str | None = None

    def push(self, new: str, may_stop: bool) -> str:
        """Take more text and return what is certain. Stop strings that end in it count if `may_stop`."""
        text = self._held + new
        if may_stop:
            # (end, start). A stop string within held-back text was seen before and did not count.
            matches = []
            for stop in self._stop:
                start = text.find(stop, max(0, len(self._held) - len(stop) + 1))
                if start >= 0:
                    matches.append((start + len(stop), start))
            if matches:
                end, start = min(matches)
                self.matched = text[start:end]
                self._held = ""
                return text[:start]
        num_held = min(self._max_held, len(text))
        while num_held and not any(
            stop.startswith(text[-num_held:]) and len(stop) > num_held for stop in self._stop
        ):
            num_held -= 1
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """Return what was held back, since nothing will complete it."""
        held, self._held = self._held, ""
        return held
