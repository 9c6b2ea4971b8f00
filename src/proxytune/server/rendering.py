"""Reads and renders requests in threads, so that one slow prompt holds up nobody.

Parsing a body, rendering its messages and tokenising them take milliseconds as a rule, and seconds for a
prompt that was made for it. Each takes a *desk*, of which there are `NUM_DESKS`. One client never has all
of them, and bodies of more than `LARGE_BYTES` together have half. Of those that wait, the client with the
fewest desks is next, then whoever came first. A thread cannot be stopped: a client whose time is up is
answered, and its desk is free when the thread ends.
"""

from __future__ import annotations

import asyncio
import copy
import queue
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from proxytune.errors import PromptTooLong
from proxytune.model import ProxyTuned
from proxytune.text.prompts import Tokenizer

NUM_DESKS = 4
LARGE_BYTES = 2**16
PIECE_CHARS = 2**14
"""A long text is counted in pieces of this size before it is tokenised whole."""
CUT_TOKENS = 16
"""How many tokens a cut is taken to add at most; a cut through a word adds one or two."""

Result = TypeVar("Result")


class Measured:
    """A tokenizer that refuses a text which is far too long before it has tokenised all of it.

    Two million characters take a tokenizer seconds and hundreds of megabytes, only to be refused. The tokens
    of a text's pieces are nearly those of the whole, since only what is near a cut can differ. A long text
    is refused if even copies of the longest token could not hold it within the limit, or if its pieces have
    more tokens than allowed, not counting `CUT_TOKENS` for each cut. The exact limit is checked afterwards.

    Args:
        tokenizer: The tokenizer.
        max_tokens: Number of tokens that a prompt may have; None for any number.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int | None) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._longest = max(map(len, tokenizer.get_vocab()), default=1)
        # The first text sets what later ones only read.
        tokenizer.encode(next(iter(tokenizer.get_vocab())), add_special_tokens=False)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Raises:
            PromptTooLong: It has far more tokens than allowed.
        """
        if self._max_tokens is not None and len(text) > 4 * max(PIECE_CHARS, self._max_tokens):
            self._measure(text, self._max_tokens)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _measure(self, text: str, max_tokens: int) -> None:
        num_tokens = len(text) // self._longest
        if num_tokens <= max_tokens:
            num_tokens = 0
            for start in range(0, len(text), PIECE_CHARS):
                piece = text[start : start + PIECE_CHARS]
                num_tokens += len(self._tokenizer.encode(piece, add_special_tokens=False))
                num_tokens -= CUT_TOKENS
                if num_tokens > max_tokens:
                    break
        if num_tokens > max_tokens:
            raise PromptTooLong(
                f"the prompt has more than {max_tokens} tokens, which is what this server allows.\n"
                "hint: shorten the prompt"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def prompt_limits(model: ProxyTuned, max_tokens: int | None) -> list[int | None]:
    """Return the number of tokens that a prompt of each member may have; None for any number.

    Args:
        model: The model.
        max_tokens: Number of tokens that the base's prompt may have; None for what the base holds.
    """
    # Members with the same format and tokenizer see the same text; if the base is one of them, its own limit
    # counts for all, as no text goes without the base.
    limits = [each.backend.capabilities.max_context for each in model.ensemble.members]
    if max_tokens is not None:
        limits[0] = max_tokens if limits[0] is None else min(limits[0], max_tokens)
    keys = [(each.text, each.chat, id(each.tokenizer)) for each in model.formats]
    shared: dict[Any, int | None] = {keys[0]: limits[0]}
    for key, limit in zip(keys, limits, strict=True):
        known = shared.setdefault(key, limit)
        if key != keys[0] and known is not None:
            shared[key] = None if limit is None else max(known, limit)
    return [shared[key] for key in keys]


def desk_models(model: ProxyTuned, max_tokens: int | None) -> list[ProxyTuned]:
    """Return models that render in threads of their own, without waiting for each other.

    They share weights and everything else. Tokenizers in Rust can be shared as well: after the first text
    they change no more. Others get a copy for each thread; if one cannot be copied, there is a single desk.

    Args:
        model: The model.
        max_tokens: As in `prompt_limits`.
    """
    limits = prompt_limits(model, max_tokens)
    made: list[ProxyTuned] = []
    for number in range(NUM_DESKS):
        copies: dict[int, Any] = {}
        own: dict[Any, Measured] = {}
        formats = []
        try:
            for each, limit in zip(model.formats, limits, strict=True):
                tokenizer: Any = each.tokenizer
                if number and not hasattr(tokenizer, "backend_tokenizer"):
                    if id(tokenizer) not in copies:
                        copies[id(tokenizer)] = copy.deepcopy(tokenizer)
                    tokenizer = copies[id(tokenizer)]
                key = each.text, each.chat, id(tokenizer)
                if key not in own:
                    own[key] = Measured(tokenizer, limit)
                formats.append(replace(each, tokenizer=own[key]))
        except Exception:  # Foreign code, which may fail in any way.
            if not made:
                raise
            break
        desk = copy.copy(model)
        desk.formats = tuple(formats)
        made.append(desk)
    return made


@dataclass(slots=True, eq=False)
class _Waiting:
    client: str
    is_large: bool
    desk: asyncio.Future[_Desk]


class _Desk:
    """A model that renders, and its thread."""

    def __init__(self, model: ProxyTuned) -> None:
        self.model = model
        self.calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon, so that the process can end while it runs.
        threading.Thread(target=self._work, name="proxytune-rendering", daemon=True).start()

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            call()
            del call  # With it the request, which would be kept until the next one.


class Rendering:
    """The desks, and who waits for one. Use it in one event loop, and close it.

    Args:
        models: A model for each desk; see `desk_models`.
    """

    def __init__(self, models: list[ProxyTuned]) -> None:
        self._desks = [_Desk(model) for model in models]
        self._free = list(self._desks)
        self._num = len(models)
        self._waiting: list[_Waiting] = []
        self._taken: Counter[str] = Counter()
        self._num_large = 0

    async def run(
        self, client: str, num_bytes: int, work: Callable[[ProxyTuned], Result]
    ) -> Result:
        """Return what `work` returns or raises, called in a thread with a desk's model.

        If the caller is cancelled, the work goes on to its end, and keeps its desk until then.

        Args:
            client: As in `turns.py`.
            num_bytes: Size of the body.
            work: What to do.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(client, num_bytes > LARGE_BYTES, loop.create_future())
        self._waiting.append(waiting)
        self._assign()
        try:
            desk = await waiting.desk
        except asyncio.CancelledError:
            if waiting.desk.done() and not waiting.desk.cancelled():
                self._release(waiting)
            else:
                self._waiting.remove(waiting)
            raise
        done: asyncio.Future[Result] = loop.create_future()

        def finish(result: Any, error: BaseException | None) -> None:
            self._release(waiting)
            if done.cancelled():
                return
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        def call() -> None:
            result, error = None, None
            try:
                result = work(desk.model)
            except BaseException as raised:
                error = raised
            with suppress(RuntimeError):  # The server has stopped.
                loop.call_soon_threadsafe(finish, result, error)

        desk.calls.put(call)
        return await done

    def close(self) -> None:
        """End the threads, those that are busy when they are done."""
        for desk in self._desks:
            desk.calls.put(None)

    def _release(self, waiting: _Waiting) -> None:
        self._free.append(waiting.desk.result())
        self._num_large -= waiting.is_large
        self._taken[waiting.client] -= 1
        if not self._taken[waiting.client]:
            del self._taken[waiting.client]
        self._assign()

    def _assign(self) -> None:
        """Give free desks to those whose turn it is."""
        while self._free:
            fitting = [
                each
                for each in self._waiting
                if not each.desk.cancelled()  # its caller has gone, and leaves the line next
                and self._taken[each.client] < max(1, self._num - 1)
                and not (each.is_large and self._num_large >= max(1, self._num // 2))
            ]
            if not fitting:
                return
            first = min(fitting, key=lambda each: self._taken[each.client])
            self._waiting.remove(first)
            self._taken[first.client] += 1
            self._num_large += first.is_large
            first.desk.set_result(self._free.pop())
