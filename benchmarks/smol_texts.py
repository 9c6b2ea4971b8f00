"""The texts of measurements on the smol family: windows of held-out text of each domain.

The corpora are in the folder that `PROXYTUNE_DATA` names, or in `shared/data` beside the checkout.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.checkout import commit
from proxytune.machine import summary
from proxytune.measure.score import Passage, passage_of
from proxytune.model import ProxyTuned

ROOT = Path(__file__).parents[1]
DATA_DIR = Path(os.environ.get("PROXYTUNE_DATA", ROOT.parent / "shared" / "data")) / "corpora"
RECIPE = "package:proxytune/smol"
DOMAINS = (
    "tinyshakespeare", "legal_dc_code", "recipes_based_cooking", "python_stdlib", "medical_medquad",
    "english_fiction", "english_digitalgov", "wikitext-2",
)  # fmt: skip
"""The last three domains have no expert of their own."""
OWN_EXPERTS = {
    "tinyshakespeare": "tinyshakespeare",
    "legal_dc_code": "legal",
    "recipes_based_cooking": "recipes",
    "python_stdlib": "python",
    "medical_medquad": "medical",
}
WINDOW = 128


def corpus(domain: str, split: str) -> str:
    """Return the text of a domain's split."""
    for name in (f"{split}.txt", f"{split}.txt.gz", f"{split}.jsonl.gz"):
        path = DATA_DIR / domain / name
        if not path.exists():
            continue
        content = path.read_bytes()
        text = (gzip.decompress(content) if name.endswith(".gz") else content).decode()
        if name.endswith(".jsonl.gz"):
            # Not splitlines(): texts may contain other line separators.
            lines = text.strip("\n").split("\n")
            return "\n\n".join(json.loads(line)["text"] for line in lines)
        return text
    sys.exit(f"{DATA_DIR / domain} holds no {split} text; set PROXYTUNE_DATA to where corpora/ is")


def token_windows(model: ProxyTuned, domain: str, split: str, count: int) -> list[list[int]]:
    """Return windows of `WINDOW` tokens, spread evenly over a split."""
    text = corpus(domain, split)
    found = []
    for number in range(count):
        start = number * (len(text) // count)
        ids = model.tokenizer.encode(text[start : start + 12 * WINDOW], add_special_tokens=False)
        found.append(list(ids[:WINDOW]))
    return found


def passages(model: ProxyTuned, domain: str, split: str, count: int) -> list[Passage]:
    """Return such windows as passages: every token but the first is predicted."""
    return [
        passage_of(model.ensemble, ids[:1], ids[1:])
        for ids in token_windows(model, domain, split, count)
    ]


def write(path: Path, command: str, content: dict[str, Any]) -> None:
    """Write a measurement with its commit and hardware."""
    origin = {
        "command": command,
        "commit": commit(),
        "machine": summary(),
    }
    path.write_text(json.dumps(origin | content, indent=1, allow_nan=False) + "\n")
    print(f"wrote {path}", file=sys.stderr)
