"""docs/reference/models.md, made from what the sweep of tests/architectures found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.architectures.tables import FAULTS, NOT_BUILT  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "models.md"
RESULTS = ROOT / "tests" / "architectures" / "results.json"

Record = Mapping[str, Any]

HEAD = """\
# Models

<!-- Written by `make format` from tests/architectures/results.json; edit scripts/models_page.py instead. -->

Base, expert and anti-expert are causal language models that transformers can load. Which architecture a model
has is the `model_type` in its `config.json`. This page says what each architecture can do here. It was made
with transformers {version}, which has {num_types} of them.

{summary}

**How this was found.** `make test-architectures` builds three tiny models of each architecture, with random
weights. Whatever is special about it is switched on in small: a sliding window shorter than the texts, soft
caps, experts, latent attention, layers of every kind. Then the
[identities of exactness](../concepts/exactness.md) are checked on a recipe of the three:

- Alpha 0 gives the text of transformers' own `generate`. So does an expert that is its own anti-expert. A
  base that is its own anti-expert gives the expert's text.
- Tokens with KV caches are those of whole forwards, and prompts may be read in pieces.
- A batch of short and long prompts gives what each prompt gives alone, also where rows end early or join
  others.
- Drafts of the expert, of the base and of the text itself change nothing, greedy or with a seed.
- Streamed pieces, joined, are the whole text. A conversation goes on as if it were read anew.

The page is about this package's own engine. Other pages say what [GGUF files](../guides/gguf.md) and
[vLLM](../guides/vllm.md) can do. Models of different architectures can steer each other if their
[vocabularies](../concepts/vocabularies.md) agree.
"""


class Group(NamedTuple):
    """A section of the page."""

    title: str
    expect: str
    text: str
    table: Callable[[Mapping[str, Record]], str]


def _special(found: Mapping[str, Record]) -> str:
    rows = []
    for name, record in found.items():
        notes = [*record.get("traits", ())]
        if record.get("joins") and not record.get("drafts"):
            notes.append("rows can join")
        rows.append((_name(name), f"`{record['class_name']}`", ", ".join(notes)))
    return _table(("`model_type`", "class in transformers", "special"), rows)


def _faults(found: Mapping[str, Record]) -> str:
    rows = ((_name(name), ", ".join(r["faults"]), FAULTS[name][1]) for name, r in found.items())
    return _table(("`model_type`", "what does not hold", "why"), rows)


def _reasons(found: Mapping[str, Record]) -> str:
    return _table(("`model_type`", "why"), ((_name(name), NOT_BUILT[name]) for name in found))


def _errors(found: Mapping[str, Record]) -> str:
    # The errors are about a model that the sweep calls "base".
    whys = {name: r["why"].partition(": base is ")[2].rstrip(".") for name, r in found.items()}
    return _table(
        ("`model_type`", "why"), ((_name(name), f"it is {why}") for name, why in whys.items())
    )


WHOLE = Group(
    "Everything works",
    "every identity holds, and `--speculative` drafts",
    """\
The last column names what is special. A type with several such properties was tried with all of them. "Rows
run one by one" means that a batch is exact and no faster than its rows: padding would change what such a
model says, or its cache holds only one row.""",
    _special,
)
UNDRAFTED = Group(
    "Without drafts",
    "every identity holds; `--speculative` does not draft",
    """\
These models keep something that cannot go back to an earlier token: the state of a recurrence or of a
convolution, or keys that were selected or compressed. A wrong draft could not be taken back. So
`--speculative` is accepted, and changes neither text nor speed. Unless it says "rows can join", the server
runs requests to such a model [one after another](../guides/serve.md).""",
    _special,
)
FAULTY = Group(
    "Known faults",
    "some identities do not hold",
    "Do not rely on these models for what the table names.",
    _faults,
)
REFUSED = Group(
    "Refused",
    "loading ends with an error that says why",
    "Loading and `proxytune doctor` say this before any weights are read.",
    _errors,
)
NOT_TRIED = Group(
    "Not tried",
    "transformers makes no text with a tiny model of this kind",
    "What transformers does not run in small was not tried, so nothing is promised.",
    _reasons,
)


def group_of(record: Record) -> Group:
    """Return the section of an architecture."""
    if record["outcome"] != "runs":
        return REFUSED if record["outcome"] == "refused" else NOT_TRIED
    if record.get("faults"):
        return FAULTY
    return WHOLE if record.get("drafts") else UNDRAFTED


def models_page() -> str:
    """Return docs/reference/models.md as the record of the sweep has it."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    records: dict[str, Record] = results["architectures"]
    groups = {
        group: {name: record for name, record in records.items() if group_of(record) is group}
        for group in (WHOLE, UNDRAFTED, FAULTY, REFUSED, NOT_TRIED)
    }
    groups = {group: found for group, found in groups.items() if found}
    summary = _table(
        ("group", "model types", "what to expect"),
        (
            (f"[{group.title}](#{_anchor(group.title)})", str(num_types(found)), group.expect)
            for group, found in groups.items()
        ),
    )
    head = HEAD.format(
        version=results["transformers"], num_types=num_types(records), summary=summary.strip()
    )
    sections = (
        f"## {group.title}\n\n{group.text}\n\n{group.table(found)}"
        for group, found in groups.items()
    )
    return "\n".join((head, *sections))


def num_types(found: Iterable[str]) -> int:
    """Count model types, leaving out variants of them."""
    return sum(":" not in name for name in found)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _name(architecture: str) -> str:
    model_type, _, variant = architecture.partition(": ")
    return f"`{model_type}`" + (f", {variant}" if variant else "")


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    lines += [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join(lines) + "\n"
