"""Every causal language model that transformers builds keeps the identities of docs/concepts/exactness.md.

The plain run tries `QUICK`; `make test-architectures` sets ARCHITECTURES=all and tries every one. `tables.py`
has what is expected of those that do not simply run. So an architecture that is new in transformers fails by
name until it runs, or has its place there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator

import pytest
import transformers

from tests.architectures.models import every_architecture
from tests.architectures.sweep import RESULTS, Found, examine, examining, results_of, shown
from tests.architectures.tables import FAULTS, NOT_BUILT, REFUSED

QUICK = (
    "bloom",  # ALiBi, which computes distances itself
    "deepseek_v3",  # latent attention and experts
    "gemma3_text",  # sliding windows in some layers, soft caps, scaled norms
    "gpt2",  # learned positions
    "gpt_oss",  # attention sinks, windows, experts
    "llama4_text",  # attention in chunks, temperature
    "mamba2",  # state space alone
    "opt",  # positions from the mask
    "qwen3_next",  # linear attention beside full attention
    "recurrent_gemma",  # recurrence and local attention
)
IS_WHOLE = os.environ.get("ARCHITECTURES") == "all"
TYPES = (
    tuple(every_architecture())
    if IS_WHOLE
    else tuple(sorted(set(QUICK) & set(every_architecture())))
)

whole = pytest.mark.skipif(not IS_WHOLE, reason="of the whole sweep: make test-architectures")


@pytest.fixture(scope="module")
def found(request) -> Iterator[Callable[[str], Found]]:
    """Return what tells what was found about an architecture; the whole sweep has a process per core."""
    if not IS_WHOLE:
        yield examine
        return
    users = [item for item in request.session.items if "found" in item.fixturenames]
    picked = [getattr(item, "callspec", None) for item in users]
    names = TYPES if None in picked else [one.params["name"] for one in picked]
    with examining(names) as futures:
        yield lambda name: futures[name].result()


@pytest.mark.parametrize("name", TYPES)
def test_an_architecture_keeps_the_identities_of_exactness(name, found):
    one = found(name)
    print(*shown(one), sep="\n")
    if name in NOT_BUILT:
        assert one.outcome == "not built", "it is built now: take it out of NOT_BUILT"
        return
    assert one.doctor == one.why, "doctor and loading disagree"
    if name in REFUSED:
        assert one.outcome == "refused", "it runs now: take it out of REFUSED"
        assert one.why.startswith("UnsupportedModel") and REFUSED[name] in one.why
        return
    assert one.outcome == "runs", one.why
    assert sorted(one.faults) == sorted(FAULTS.get(name, ((), ""))[0]), one.faults
    assert one.is_varied, "its texts prove nothing: mend its weights or its config"
    assert one.num_ties <= MAX_TIES
    assert not one.drafts or one.faults or 0 < one.num_accepted < one.num_drafted


MAX_TIES = 2
"""Near-ties allowed to one architecture, of about 40 texts that are compared."""


@whole
def test_the_sweep_meets_few_ties(found):
    ties = {name: one.num_ties for name in TYPES if (one := found(name)).num_ties}
    print(f"{sum(ties.values())} near-ties: {ties}")
    assert sum(ties.values()) <= len(TYPES) // 10


@whole
def test_more_than_sixty_architectures_keep_every_identity(found):
    assert sum(found(name).outcome == "runs" and not found(name).faults for name in TYPES) > 60


@whole
def test_the_tables_name_only_architectures_that_there_are():
    if transformers.__version__ != recorded()["transformers"]:
        pytest.skip("other versions of transformers have other architectures")
    assert not {*NOT_BUILT, *REFUSED, *FAULTS} - set(TYPES)


@whole
def test_what_the_docs_say_is_what_was_found(found):
    """docs/reference/models.md is made from results.json; `make check` sees to that."""
    expected = recorded()
    if transformers.__version__ != expected["transformers"]:
        pytest.skip(f"the docs are about transformers {expected['transformers']}")
    now = results_of([found(name) for name in TYPES])
    assert now == expected, "python -m tests.architectures.sweep --write, then make format"


def recorded() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


# The record, without the sweep -----------------------------------------------------------------------------


def test_the_record_has_every_architecture_of_its_version():
    if transformers.__version__ != recorded()["transformers"]:
        pytest.skip("other versions of transformers have other architectures")
    assert sorted(recorded()["architectures"]) == every_architecture()


def test_every_architecture_that_is_not_built_or_refused_has_its_reason():
    for name, record in recorded()["architectures"].items():
        if record["outcome"] != "runs":
            assert (NOT_BUILT | REFUSED)[name]
