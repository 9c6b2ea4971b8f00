"""What is found when an architecture is tried: `examine` one, `examining` many.

    python -m tests.architectures.sweep mamba gemma3_text      try these, and print what was found
    python -m tests.architectures.sweep --write                try every one, and write results.json
    python -m tests.architectures.sweep --write mamba          try this one again, and write what was found

`results.json` is the record that docs/reference/models.md is made from. `make test-architectures` fails where
it is not what is found.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).with_name("results.json")

Outcome = Literal["runs", "refused", "not built"]
"""`not built`: transformers itself makes no text with it, so nothing can be compared."""


@dataclass
class Found:
    """What was found about one architecture."""

    name: str
    outcome: Outcome
    class_name: str = ""
    traits: list[str] = field(default_factory=list)
    """What is special about it, as far as it shows in the config."""
    drafts: bool = False
    """Whether drafts are used; if not, the text is made without them."""
    joins: bool = False
    """Whether rows can join a running batch."""
    why: str = ""
    """The error, if it does not run."""
    doctor: str = ""
    """The error that `proxytune doctor` shows."""
    faults: dict[str, str] = field(default_factory=dict)
    """The identities that do not hold, and how."""
    num_ties: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    is_varied: bool = False
    """Whether texts depend on the prompt and on the model, so that the identities say something."""

    def record(self) -> dict[str, Any]:
        """Return what is kept in results.json: what does not depend on the machine."""
        keys = ("class_name", "outcome", "traits", "drafts", "joins", "why", "faults")
        record = {key: value for key, value in asdict(self).items() if key in keys and value}
        if self.faults:
            record["faults"] = sorted(self.faults)
        return record


def examine(architecture: str) -> Found:
    """Build a base, an expert and an anti-expert of one architecture, and check every identity."""
    from proxytune.errors import ProxytuneError
    from proxytune.loading import doctor
    from proxytune.model import ProxyTuned
    from tests.architectures.identities import IDENTITIES, Check, generated, recipe_of
    from tests.architectures.models import save, tiny_network, traits

    roles = ("base", "tuned", "small")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            networks = {role: tiny_network(architecture, seed) for seed, role in enumerate(roles)}
            generated(networks["base"])
        except Exception as error:  # whatever the architecture's code raises
            return Found(architecture, "not built", why=_first_line(error))
        base = networks["base"]
        found = Found(architecture, "runs", type(base).__name__, traits(architecture, base))
        recipe = recipe_of(*(save(networks[role], Path(folder) / role) for role in roles))
        problems = doctor.examine(recipe).problems
        found.doctor = _first_line(problems[0].error).replace(f"{folder}/", "") if problems else ""
        try:
            model = ProxyTuned.load(recipe)
        except ProxytuneError as error:
            found.outcome, found.why = "refused", _first_line(error).replace(f"{folder}/", "")
            return found
        check = Check(model, networks)
        found.drafts, found.joins = check.can_rewind, check.can_join
        for identity in IDENTITIES:
            check.run(identity)
        found.is_varied = bool(check.faults) or check.is_varied()
        if check.rows_at_once == 1:
            found.traits.append("rows run one by one")
        if not check.faults and not check.is_consistent:
            found.traits.append("transformers' own logits differ with and without a cache")
    found.faults, found.num_ties = check.faults, check.num_ties
    found.num_drafted, found.num_accepted = check.num_drafted, check.num_accepted
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@contextmanager
def examining(architectures: Sequence[str]) -> Iterator[dict[str, Future[Found]]]:
    """Examine each, as many at once as there are cores."""
    # Models this small gain nothing from further threads, and processes that share cores lose by them.
    pool = ProcessPoolExecutor(os.cpu_count() or 1, get_context("spawn"), _prepare)
    try:
        yield {name: pool.submit(examine, name) for name in architectures}
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def results_of(found: Sequence[Found]) -> dict[str, Any]:
    """Return the content of results.json."""
    import transformers

    records = {one.name: one.record() for one in found}
    return {
        "transformers": transformers.__version__,
        "architectures": dict(sorted(records.items())),
    }


def write(found: Sequence[Found]) -> None:
    """Write what was found into results.json, beside what was found earlier with the same transformers."""
    results = results_of(found)
    if RESULTS.exists():
        earlier = json.loads(RESULTS.read_text(encoding="utf-8"))
        if earlier["transformers"] == results["transformers"]:
            records = earlier["architectures"] | results["architectures"]
            results["architectures"] = dict(sorted(records.items()))
    text = json.dumps(results, indent=1, ensure_ascii=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")


def shown(found: Found) -> Iterator[str]:
    """Yield lines about what was found."""
    if found.outcome != "runs":
        yield f"{found.name}: {found.outcome}: {found.why}"
        if found.outcome == "refused" and found.doctor != found.why:
            yield f"    doctor: {found.doctor or 'no problem'}"
        return
    yield (
        f"{found.name}: {len(found.faults)} faults, {found.num_ties} ties, "
        f"drafts {found.num_accepted} of {found.num_drafted} accepted"
        f"{'' if found.drafts else ' (runs without)'}"
        f"{'' if found.is_varied else ', texts do not vary'}"
        f"{', doctor: ' if found.doctor else ''}{found.doctor}"
    )
    yield from (f"    {name}: {how}" for name, how in found.faults.items())


def main(arguments: Sequence[str]) -> None:
    """Run the command line that the module's docstring shows."""
    from tests.architectures.models import every_architecture

    names = [word for word in arguments if not word.startswith("-")] or every_architecture()
    with examining(names) as futures:
        for future in as_completed(futures.values()):
            found = future.result()
            print(*shown(found), sep="\n", flush=True)
            if "--write" in arguments:
                write([found])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
