"""Which answers are kept, for whom, and which are forgotten first."""

from __future__ import annotations

import pytest

from proxytune.server.stored import OVERHEAD_BYTES, Kept, KeptAnswers


def kept(num_bytes: int = OVERHEAD_BYTES + 10) -> Kept:
    return Kept(b"a" * (num_bytes - OVERHEAD_BYTES - 5), b"b" * 5)


def names(store: KeptAnswers, client: str = "one") -> str:
    return "".join(name for name in "abcdefgh" if name in store._kept.get(client, ()))


def test_a_client_reads_and_removes_its_own_answers_alone():
    store = KeptAnswers()
    store.add("one", "a", kept())
    assert store.get("one", "a") == kept()
    assert store.get("two", "a") is None and store.get("one", "b") is None
    assert not store.remove("two", "a") and store.get("one", "a")
    assert store.remove("one", "a") and not store.remove("one", "a")
    assert store.get("one", "a") is None and store.num_bytes == 0


def test_of_too_many_the_one_that_was_used_least_recently_is_forgotten():
    store = KeptAnswers(max_kept=3)
    for name in "abc":
        store.add("one", name, kept())
    assert store.get("one", "a")
    store.add("one", "d", kept())
    assert names(store) == "acd"


def test_of_too_many_bytes_as_many_are_forgotten_as_are_needed():
    size = OVERHEAD_BYTES + 1000
    store = KeptAnswers(max_kept_bytes=3 * size)
    for name in "abc":
        store.add("one", name, kept(size))
    store.add("one", "d", kept(size + 1))
    assert names(store) == "cd" and store.num_bytes == 2 * size + 1


def test_a_client_with_much_makes_room_for_others_and_others_keep_theirs():
    size = OVERHEAD_BYTES + 1000
    store = KeptAnswers(max_kept_bytes=4 * size, max_total_bytes=5 * size)
    store.add("two", "a", kept(size))
    for name in "bcdef":
        store.add("one", name, kept(size))
    assert names(store) == "cdef" and names(store, "two") == "a"
    store.add("three", "g", kept(size))
    assert names(store) == "def" and names(store, "two") == "a" and names(store, "three") == "g"
    assert store.num_bytes == 5 * size


def test_many_clients_with_one_small_answer_each_are_bounded_too():
    store = KeptAnswers(max_total_bytes=50 * OVERHEAD_BYTES)
    for number in range(500):
        store.add(f"client {number}", "a", Kept(b"", b""))
    assert store.num_bytes <= 50 * OVERHEAD_BYTES and len(store._kept) == 50
    assert store.get("client 499", "a")


@pytest.mark.parametrize("is_small", (True, False))
def test_an_answer_that_is_larger_than_a_clients_share_has_no_room(is_small):
    store = KeptAnswers(max_kept_bytes=5000)
    assert store.has_room(kept(5000 if is_small else 5001)) == is_small
