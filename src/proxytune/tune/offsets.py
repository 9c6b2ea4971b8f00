"""Hidden states of frozen models for a data set: computed once, kept on disk.

Base and anti-expert do not change while an expert is trained through them, so they run once over the
examples; so does the base alone while an anti-expert is calibrated to it. Kept are the hidden states before
their output heads, only at the positions that predict a trained token: a few kilobytes per position, where
logits would take hundreds. `loss.py` computes logits from them.

A directory holds one data set; a model that is left out has width 0:

    hidden.bin      [num_positions, base width + small width], bfloat16 or float32, in the examples' order
    starts.npy      [num_examples + 1] int64, each example's first row
    offsets.json    what the other two contain, and how many examples are done; replaced in one step

The longest examples run first, in batches that depend only on their lengths. So a run that was killed and
continued writes the same bytes as an uninterrupted one. Memory grows with the data set by a few integers per
example.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proxytune.errors import OutputFileError, VocabularyMismatch
from proxytune.files import unwritable, write_json
from proxytune.text.vocab import Alignment
from proxytune.tune.encode import IGNORED, Example
from proxytune.tune.heads import FrozenHeads, FrozenPart, base_ids, head_of, run_body

FORMAT = 1
"""Version of the files. It counts up when they change, so that no version continues another's."""
BATCH_TOKENS = 2048
"""Maximum number of tokens per batch, padding included: one long example, or many short ones."""
FLUSH_S = 5.0
"""Seconds of work that a killed run may lose; `fsync` after every batch would wait for the disk."""
HINT = "free some disk space, or give a writable directory; the same command continues where this one stopped"
HIDDEN_NAME, STARTS_NAME, HEADER_NAME = "hidden.bin", "starts.npy", "offsets.json"


def offsets_key(examples: Sequence[Example], base_name: str, small_name: str, dtype: str) -> str:
    """Return a digest of everything offsets depend on: examples, models and dtype.

    A name stands for a model, with what distinguishes it, such as its adapter; empty for none.
    """
    digest = hashlib.sha256(json.dumps([base_name, small_name, dtype]).encode())
    for example in examples:
        for values in (example.token_ids, example.labels):
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(np.asarray(values, dtype="<i8").tobytes())
    return digest.hexdigest()


def kept_directory(folder: str | Path, name: str, key: str) -> Path:
    """Return where a data set is kept: each key has its own place, so that no run overwrites another's."""
    return Path(folder) / f"{name}-{key[:16]}"


@dataclass(frozen=True, slots=True)
class _Header:
    """The content of `offsets.json`."""

    format: int
    key: str
    base_width: int
    small_width: int
    dtype: str  # bfloat16 or float32
    num_examples: int
    num_positions: int
    num_done: int  # examples, in the order in which they run

    @property
    def row_bytes(self) -> int:
        return (self.base_width + self.small_width) * (2 if self.dtype == "bfloat16" else 4)

    @property
    def is_complete(self) -> bool:
        return self.num_done == self.num_examples

    @classmethod
    def read(cls, directory: Path) -> _Header | None:
        """Return the header; None if it is missing or malformed."""
        try:
            return cls(**json.loads((directory / HEADER_NAME).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, directory: Path) -> None:
        """Replace the file in one step."""
        write_json(directory / HEADER_NAME, asdict(self), hint=HINT)


class Offsets:
    """Hidden states of base, anti-expert or both for a data set, made by `build` or `open`.

    It holds no open file, so it can be passed to another process.

    Args:
        directory: Directory of the complete files.
        header: Their header.
        starts: `[num_examples + 1]`, each example's first row.
    """

    def __init__(self, directory: Path, header: _Header, starts: NDArray[np.int64]) -> None:
        self._directory = directory
        self._header = header
        self._starts = starts

    @property
    def num_positions(self) -> int:
        """Number of trained positions in all examples."""
        return self._header.num_positions

    @property
    def nbytes(self) -> int:
        """Size of the hidden states on disk, in bytes."""
        return self.num_positions * self._header.row_bytes

    @classmethod
    def open(cls, directory: Path, key: str) -> Offsets | None:
        """Return what an earlier `build` of this key left; None unless it is complete."""
        header = _Header.read(directory)
        if header is None or header.format != FORMAT or header.key != key or not header.is_complete:
            return None
        try:
            starts = np.load(directory / STARTS_NAME)
            size = (directory / HIDDEN_NAME).stat().st_size
        except (OSError, ValueError, EOFError):
            return None
        offsets = cls(directory, header, starts)
        fits = len(starts) == header.num_examples + 1 and starts[-1] == header.num_positions
        return offsets if fits and size == offsets.nbytes else None

    @classmethod
    def build(
        cls,
        directory: Path,
        examples: Sequence[Example],
        *,
        base: Any,
        anti_expert: Any,
        alignment: Alignment,
        base_name: str,
        key: str,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Offsets:
        """Run the frozen models over the examples, continuing what an earlier run of this key did.

        Files of another key are deleted first. Memory holds one batch.

        Args:
            directory: Created if it does not exist.
            examples: Examples in the small model's token ids.
            base: A causal language model in evaluation mode; None to leave it out.
            anti_expert: The model that is subtracted, in evaluation mode; None to leave it out.
            alignment: Alignment of the base's vocabulary and the small model's.
            base_name: The base's name in errors.
            key: Identifies data and models; see `offsets_key`.
            on_progress: Called with the number of examples done and the total, at the start and after each
                batch.

        Raises:
            OutputFileError: The disk has too little space, or cannot be written.
            VocabularyMismatch: An example has a token that the base does not have.
        """
        counts = np.array([len(kept_positions(example)) for example in examples], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
        weights = [None if m is None else head_of(m).weight for m in (base, anti_expert)]
        dtype = next(weight.dtype for weight in weights if weight is not None)
        is_half = dtype in (torch.bfloat16, torch.float16)
        base_width, small_width = (0 if w is None else w.shape[1] for w in weights)
        header = _Header(
            format=FORMAT,
            key=key,
            base_width=base_width,
            small_width=small_width,
            dtype="bfloat16" if is_half else "float32",
            num_examples=len(examples),
            num_positions=int(starts[-1]),
            num_done=0,
        )
        try:
            header = _begin(directory, header, starts)
            batches = list(_batches(examples, header.num_done))
            remaining = sum(int(counts[batch].sum()) for batch, _ in batches)
            _check_room(directory, remaining * header.row_bytes, header, base_name)
            if on_progress is not None:
                on_progress(header.num_done, len(examples))
            with (directory / HIDDEN_NAME).open("r+b") as file:
                flushed = time.monotonic()
                for batch, num_done in batches:
                    block = [examples[i] for i in batch]
                    rows = _hidden(block, base, anti_expert, alignment, base_name)
                    for index, values in zip(batch, rows, strict=True):
                        file.seek(int(starts[index]) * header.row_bytes)
                        file.write(_raw(values, header.dtype))
                    header = replace(header, num_done=num_done)
                    if header.is_complete or time.monotonic() - flushed >= FLUSH_S:
                        # The header may count only rows that would survive a crash.
                        file.flush()
                        os.fsync(file.fileno())
                        header.write(directory)
                        flushed = time.monotonic()
                    if on_progress is not None:
                        on_progress(header.num_done, len(examples))
        except OSError as error:
            path = Path(error.filename or directory / HIDDEN_NAME)
            raise unwritable(path, error, HINT) from error
        return cls(directory, header, starts)

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Return the hidden states of some examples, concatenated in the order given.

        Returns:
            `[sum of their positions, base width + small width]`, float32 or bfloat16, on the CPU.
        """
        width = self._header.base_width + self._header.small_width
        is_half = self._header.dtype == "bfloat16"
        kind = np.dtype("<i2" if is_half else "<f4")  # NumPy has no bfloat16, only its bits.
        spans = [(int(self._starts[i]), int(self._starts[i + 1])) for i in indices]
        values = np.empty((sum(end - start for start, end in spans), width), dtype=kind)
        if len(values):
            # Mapped anew each time: the pages of a lasting mapping count as this process's memory.
            shape = (self.num_positions, width)
            stored = np.memmap(self._directory / HIDDEN_NAME, kind, "r", shape=shape)
            first = 0
            for start, end in spans:
                values[first : first + end - start] = stored[start:end]
                first += end - start
        rows = torch.from_numpy(values)
        return rows.view(torch.bfloat16) if is_half else rows

    def frozen(
        self, indices: Sequence[int], heads: FrozenHeads, device: torch.device | str
    ) -> FrozenPart:
        """Return what `loss.cross_entropy` needs at the trained positions of some examples, in order."""
        return FrozenPart(self.rows(indices).to(device), heads)


def kept_positions(example: Example) -> list[int]:
    """Return the positions whose hidden states predict a trained token: each one before it."""
    return [t - 1 for t in range(1, len(example.labels)) if example.labels[t] != IGNORED]


def _begin(directory: Path, header: _Header, starts: NDArray[np.int64]) -> _Header:
    """Return the header to continue from; without files of this key, delete the others and start anew."""
    size = header.num_positions * header.row_bytes
    begun = _Header.read(directory)
    hidden = directory / HIDDEN_NAME
    is_ours = begun is not None and replace(begun, num_done=0) == header
    if begun is not None and is_ours and hidden.exists() and hidden.stat().st_size == size:
        np.save(directory / STARTS_NAME, starts)
        return begun
    directory.mkdir(parents=True, exist_ok=True)
    # The header first: without it the other two mean nothing.
    for name in (HEADER_NAME, HIDDEN_NAME):
        (directory / name).unlink(missing_ok=True)
    np.save(directory / STARTS_NAME, starts)
    with hidden.open("wb") as file:
        file.truncate(size)
    header.write(directory)
    return header


def _check_room(directory: Path, num_bytes: int, header: _Header, base_name: str) -> None:
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise OutputFileError(
            f"the hidden states of the frozen models ({base_name}) at {header.num_positions:,} trained "
            f"tokens need {num_bytes / 1e9:.3g} GB more at {directory} ({header.row_bytes:,} bytes per "
            f"token), and {free / 1e9:.3g} GB are free there.\n"
            "hint: free some disk space, train on fewer rows, or use --method sft --no-calibrate, which "
            "stores nothing"
        )


def _batches(examples: Sequence[Example], num_done: int) -> Iterator[tuple[list[int], int]]:
    """Yield the indices of examples that run together, and how many examples are done after them.

    The first `num_done` examples are left out. The longest come first: if memory does not suffice, the first
    batch fails.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].token_ids))
    first = 0
    while first < len(order):
        longest = max(len(examples[order[first]].token_ids), 1)
        batch = order[first : first + max(BATCH_TOKENS // longest, 1)]
        first += len(batch)
        if first > num_done:
            yield batch, first


@torch.no_grad()
def _hidden(
    examples: Sequence[Example], base: Any, anti_expert: Any, alignment: Alignment, base_name: str
) -> Iterator[Tensor]:
    """Yield `[positions, base width + small width]` on the CPU for each example."""
    kept = [kept_positions(example) for example in examples]
    width = max(len(example.token_ids) for example in examples)
    token_ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros_like(token_ids)
    for row, example in enumerate(examples):
        token_ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        mask[row, : len(example.token_ids)] = 1
    if not any(kept):
        yield from (torch.empty(0, 0) for _ in examples)
        return
    in_base = base_ids(alignment)[token_ids]
    missing = token_ids[(in_base < 0) & (mask == 1)]
    if len(missing):
        raise VocabularyMismatch(
            f"an example has the token id {int(missing[0])}, which is not a token of {base_name}, so the "
            "base cannot read it.\nhint: tokenise the data with the small model's own tokenizer; for a token "
            "that only the small model has, use --method sft --no-calibrate or a prompt format "
            "without it"
        )
    in_base = in_base.clamp(min=0)  # Padding on the right, which no token sees.
    parts = []
    for model, ids in ((base, in_base), (anti_expert, token_ids)):
        if model is None:
            continue
        device = model.get_input_embeddings().weight.device
        parts.append(run_body(model, ids.to(device), mask.to(device)))
    for row, positions in enumerate(kept):
        yield torch.cat([part[row, positions].float().cpu() for part in parts], dim=1)


def _raw(values: Tensor, dtype: str) -> bytes:
    """Return numbers as the file has them: little-endian."""
    if dtype == "bfloat16":
        return values.bfloat16().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    return values.float().numpy().astype("<f4", copy=False).tobytes()
