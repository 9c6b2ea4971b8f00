"""Tables of policies and rankings in the docs are those of their JSON files, which say how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POLICIES = ROOT / "docs" / "performance" / "policies.json"
RANKS = ROOT / "docs" / "performance" / "rank_experts.json"
LOAD = ROOT / "docs" / "performance" / "load.json"
VLLM = ROOT / "docs" / "performance" / "vllm.json"
VOCABULARY = ROOT / "docs" / "performance" / "vocabulary.json"


@pytest.mark.parametrize("group", ["one", "five"])
def test_the_table_of_policies_is_that_of_the_measurement(group):
    from benchmarks.policies import table

    page = (ROOT / "docs" / "concepts" / "policies.md").read_text()
    assert table(json.loads(POLICIES.read_text()), group) in page


def test_the_table_of_rankings_is_that_of_the_measurement():
    from benchmarks.rank_experts import table

    page = (ROOT / "docs" / "guides" / "choose-a-pair.md").read_text()
    assert table(json.loads(RANKS.read_text())) in page


def test_the_tables_of_servers_are_those_of_the_measurements():
    from benchmarks import load, speed_vllm

    page = (ROOT / "docs" / "performance.md").read_text()
    assert load.page_table(json.loads(LOAD.read_text())) in page
    assert speed_vllm.table(json.loads(VLLM.read_text())) in page


def test_the_table_of_tokenizers_is_that_of_the_measurement():
    from benchmarks.vocabulary import table

    page = (ROOT / "docs" / "concepts" / "vocabularies.md").read_text()
    assert table(json.loads(VOCABULARY.read_text())) in page


def test_the_command_tells_the_correlation_that_was_measured():
    from proxytune.measure.rank import MEASURED_CORRELATION

    found = json.loads(RANKS.read_text())["by_sample_tokens"]["1016"]["benefit"]["mean"]
    assert round(found, 2) == MEASURED_CORRELATION


@pytest.mark.parametrize("path", [POLICIES, RANKS, VOCABULARY], ids=lambda path: path.name)
def test_a_measurement_says_how_it_was_made(path):
    content = json.loads(path.read_text())
    assert content["command"].startswith("python benchmarks/")
    assert (ROOT / content["command"].split()[1]).exists()
    assert len(content["commit"]) == 12  # no uncommitted change was measured
