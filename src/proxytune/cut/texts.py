"""The text that a bridge is computed on: rows cut into windows, or text that the base writes.

Windows are drawn by a seed, and a part of them is held out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from proxytune.data.rows import Rows, answers_of, read_rows
from proxytune.errors import InputFileError

WINDOW = 512
"""Maximum number of tokens of a window."""

FEWEST_TOKENS = 256
"""Fewer tokens say too little about a residual stream."""

TEST_SHARE = 0.2
"""Tokens held out, beside those that are asked for; at most `MOST_TEST_TOKENS`."""

MOST_TEST_TOKENS = 4_096

SAMPLED_WINDOW = 256
"""Number of tokens of a window that the base writes."""

SAMPLED_ROWS = 32
"""Windows that are written at the same time; the weights are read once for all."""

_CHARACTERS = 2_000
"""Length of the pieces that texts are cut into; about a window of English."""


class Windows(NamedTuple):
    """Token ids of windows of text.

    Args:
        train: To compute and to train on.
        test: Held out.
        source: The text's name.
    """

    train: list[list[int]]
    test: list[list[int]]
    source: str


def read_windows(data: str, tokenizer: Any, *, num_tokens: int, seed: int) -> Windows:
    """Return windows of a text, in an order drawn by the seed.

    Args:
        data: Rows as `read_rows` takes them.
        tokenizer: The base's.
        num_tokens: Number of tokens to compute on; fewer if the text is shorter.
        seed: Of the order.

    Raises:
        InputFileError: The text cannot be read, or is too short.
    """
    pieces, source = _pieces(data)
    random.Random(seed).shuffle(pieces)
    num_test = min(MOST_TEST_TOKENS, int(TEST_SHARE * num_tokens))
    windows: list[list[int]] = []
    total = 0
    for piece in pieces:
        ids = tokenizer(piece)["input_ids"][:WINDOW]
        if len(ids) > 1:
            windows.append(ids)
            total += len(ids)
        if total >= num_tokens + num_test:
            break
    if total < FEWEST_TOKENS:
        raise InputFileError(
            f"{source} has {total:,} tokens, and a bridge needs at least {FEWEST_TOKENS}; 16,384 are usual."
            "\nhint: give more text with --data, or leave it out, and the base writes some"
        )
    if len(windows) == 1:
        stop = int((1 - TEST_SHARE) * total)
        windows = [windows[0][:stop], windows[0][stop:]]
    wanted = min(num_test, int(TEST_SHARE * total))
    test: list[list[int]] = []
    while windows[1:] and sum(map(len, test)) < wanted:
        test.append(windows.pop())
    return Windows(windows, test, source)


@torch.no_grad()
def sample_windows(
    model: Any, *, num_tokens: int, seed: int, say: Callable[[str], None]
) -> Windows:
    """Return windows of text that the base writes by itself, sampled at temperature 1 from an empty prompt.

    Args:
        model: The base, as transformers has it.
        num_tokens: Number of tokens to compute on.
        seed: Random seed of the samples.
        say: Shows how far it is.

    Raises:
        InputFileError: The base has no token that a text begins with.
    """
    config = model.config
    starts = (config.bos_token_id, config.eos_token_id)
    ids = [i[0] if isinstance(i, list | tuple) else i for i in starts if i is not None]
    if not ids:
        raise InputFileError(
            "the base has no token that begins a text, so it cannot write one by itself.\n"
            "hint: give text with --data"
        )
    num_test = min(MOST_TEST_TOKENS, int(TEST_SHARE * num_tokens))
    num_train, num_windows = -(-num_tokens // SAMPLED_WINDOW), -(-num_test // SAMPLED_WINDOW)
    num_windows += num_train
    windows: list[list[int]] = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(windows) < num_windows:
            rows = min(SAMPLED_ROWS, num_windows - len(windows))
            say(
                f"writing text: {len(windows) * SAMPLED_WINDOW:,} of {num_tokens + num_test:,} tokens"
            )
            start = torch.full((rows, 1), ids[0], device=model.device)
            # No token ends a window: after the end of a text the next one begins.
            written = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=SAMPLED_WINDOW - 1,
                min_new_tokens=SAMPLED_WINDOW - 1,
                eos_token_id=-1,
                pad_token_id=0,
            )
            windows += written.tolist()
    return Windows(windows[:num_train], windows[num_train:], "text that the base wrote")


def _pieces(data: str) -> tuple[list[str], str]:
    """Return a text in pieces, and its name."""
    rows = read_rows(data)
    return [p for text in _texts(rows) for p in _cut(text)], rows.source


def _texts(rows: Rows) -> Iterator[str]:
    for row in rows.rows:
        if rows.kind == "text":
            yield row["text"]
            continue
        for prompt, answer in answers_of(row):
            yield f"{_plain(prompt)}\n{answer}"


def _plain(prompt: Any) -> str:
    """Return a prompt as text; of messages their contents."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt)


def _cut(text: str) -> Iterator[str]:
    """Yield pieces of a text that end at a line's end if there is one near."""
    start = 0
    while start < len(text):
        stop = start + _CHARACTERS
        line_end = text.rfind("\n", start + _CHARACTERS // 2, stop)
        if stop < len(text) and line_end > 0:
            stop = line_end + 1
        yield text[start:stop]
        start = stop
