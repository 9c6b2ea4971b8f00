"""The mutator changes what it is given, and the child sees what must not happen."""

from __future__ import annotations

import json
import time
from random import Random

import pytest

from proxytune.errors import CorruptModel
from tests.support.mutations import mutate_bytes, mutate_json, read_mutants

VALID = {"a": [1, 2, {"b": "text"}], "c": {"d": 0.5}}


def test_a_seed_always_gives_the_same_mutant():
    assert mutate_json(VALID, Random(3)) == mutate_json(VALID, Random(3))
    assert mutate_bytes(b"abc" * 9, Random(3)) == mutate_bytes(b"abc" * 9, Random(3))


def test_mutants_differ_from_each_other_and_from_the_valid_file():
    texts = {mutate_json(VALID, Random(seed)) for seed in range(200)}
    assert len(texts) > 150
    assert sum(text == json.dumps(VALID) for text in texts) <= 1
    assert VALID == {"a": [1, 2, {"b": "text"}], "c": {"d": 0.5}}


def test_results_and_errors_of_users_are_counted():
    def read(mutant):
        if mutant:
            raise CorruptModel("no")

    counts = read_mutants(range(10), lambda random: random.random() < 0.5, read)
    assert counts["accepted"] + counts["CorruptModel"] == 10
    assert min(counts.values()) > 0


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (lambda mutant: 1 // 0, "ZeroDivisionError"),
        (lambda mutant: bytearray(3 << 30), "MemoryError"),
        (lambda mutant: mutant.kill(), "killed by signal 9"),
    ],
    ids=["foreign error", "memory", "dead process"],
)
def test_whatever_else_happens_fails_with_the_seed(read, why):
    class Mutant:
        def kill(self):
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError, match=rf"seed 7: .*{why}"):
        read_mutants([7], lambda random: Mutant(), read)


def test_a_mutant_that_takes_too_long_fails_and_the_others_are_read(monkeypatch):
    monkeypatch.setattr("tests.support.mutations.SECONDS", 1)
    with pytest.raises(AssertionError, match="seed 1: more than 1 s") as caught:
        read_mutants([0, 1, 2], lambda random: random, lambda random: _sleep_with(random))
    assert "seed 2" not in str(caught.value)


def _sleep_with(random):
    if random.random() == Random(1).random():
        time.sleep(30)
