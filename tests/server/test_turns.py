"""Whose turn it is and who is turned away: rules on tickets alone, with work as their clock."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from proxytune.server.turns import Ticket, WaitingRoom


def made(client: str = "", user: str = "", *, size: int = 10) -> Ticket:
    """Return a ticket of `size` tokens, of which one is the prompt."""
    sampling = SimpleNamespace(max_new_tokens=size - 1)
    job: Any = SimpleNamespace(prompts=((0,), ()), sampling=sampling)
    ticket = Ticket(job, lambda event: None, client, user=user)
    assert ticket.size == size
    return ticket


def enter(room: WaitingRoom, *tickets: Ticket, work: int = 0) -> Any:
    return room.enter(tickets, work=work)


def run_all(room: WaitingRoom, num_rows: int) -> list[Ticket]:
    """Return the tickets in the order of their turns, where each row ends as the next one begins."""
    running: list[Ticket] = []
    order: list[Ticket] = []
    while (ticket := room.next(running)) is not None:
        room.take_turn(ticket)
        order.append(ticket)
        running = [*running, ticket][-num_rows:]
    return order


def test_clients_take_turns_and_invented_users_do_not_multiply_them():
    room = WaitingRoom(100)
    for number in range(90):
        enter(room, made("greedy", f"user {number}"))
    for _ in range(5):
        enter(room, made("modest"))
    order = [ticket.client for ticket in run_all(room, 1)]
    assert order[:11] == ["greedy", *["modest", "greedy"] * 5]
    assert len(order) == 95


def test_the_client_with_the_fewest_rows_is_next():
    room = WaitingRoom(100)
    busy, idle = made("busy"), made("idle")
    enter(room, busy)
    enter(room, idle)
    assert room.next([]) is busy
    assert room.next([made("busy")]) is idle
    assert room.next([made("busy"), made("idle"), made("idle")]) is busy


def test_users_of_a_client_share_its_turns():
    room = WaitingRoom(100)
    many = [made("key", "many") for _ in range(3)]
    enter(room, *many)
    enter(room, other := made("key", "other"))
    assert room.next([]) is many[0]
    assert room.next([made("key", "many")]) is other


def test_a_small_request_goes_ahead_of_a_large_one_that_has_not_waited_for_a_room_of_its_size():
    for work, small_is_first in ((0, True), (179, True), (181, False)):
        room = WaitingRoom(2)
        enter(room, large := made(size=100))  # a room full of such is 200 tokens
        enter(room, small := made(size=10), work=work)
        assert room.next([]) is (small if small_is_first else large)


def test_requests_of_one_size_take_their_turns_as_they_came():
    room = WaitingRoom(100)
    tickets = [made() for _ in range(5)]
    for number, ticket in enumerate(tickets):
        enter(room, ticket, work=number // 2)
    assert run_all(room, 2) == tickets


@pytest.mark.parametrize("num_users", (1, 90))
def test_a_full_room_has_a_place_for_a_small_request_and_for_another_client(num_users):
    room = WaitingRoom(64)
    tickets = [made("address", f"user {n % num_users}", size=401) for n in range(64)]
    for number, ticket in enumerate(tickets):
        assert enter(room, ticket, work=number) == []
    # The youngest of the large ones gives up its place.
    assert enter(room, made("address", "victim", size=6)) == [tickets[-1]]
    assert enter(room, made("other", size=2000)) == [tickets[-2]]
    # Another large one of the same client would be the last in line itself.
    assert enter(room, made("address", "user 0", size=401), work=64) is None
    assert len(room) == 64


def test_the_client_with_the_most_tickets_gives_up_a_place_down_to_equal_shares():
    room = WaitingRoom(8)
    for _ in range(8):
        enter(room, made("one"))
    turned = [enter(room, made("two")) for _ in range(6)]
    assert [None if each is None else each[0].client for each in turned[:4]] == ["one"] * 4
    assert turned[4:] == [None, None]
    assert Counter(ticket.client for ticket in room) == {"one": 4, "two": 4}


def test_a_request_of_several_texts_is_let_in_or_turned_away_whole():
    room = WaitingRoom(4)
    enter(room, *(several := [made("one", size=50) for _ in range(3)]))
    enter(room, single := made("one"))
    assert enter(room, *[made("one", size=50) for _ in range(2)]) is None
    assert enter(room, made("two")) == several
    assert single in list(room) and len(room) == 2
    assert enter(room, *[made("two") for _ in range(5)]) is None


def test_tickets_that_nobody_waits_for_are_not_in_the_way():
    room = WaitingRoom(1)
    enter(room, gone := made())
    assert enter(room, made()) is None
    gone.cancel()
    assert enter(room, made()) == []


def test_larger_tickets_are_passed_over_if_asked():
    room = WaitingRoom(100)
    enter(room, made("one", size=65))
    enter(room, small := made("two", size=64))
    assert room.next([], max_size=64) is small
    assert room.next([], max_size=63) is None


class Simulated:
    """An engine of rows that generate a token each in every step; work is its only clock."""

    def __init__(self, num_rows: int, num_places: int) -> None:
        self.num_rows = num_rows
        self.room = WaitingRoom(num_places)
        self.left: dict[Ticket, int] = {}
        self.work = 0
        self.refused: list[Ticket] = []

    def submit(self, ticket: Ticket) -> None:
        turned = enter(self.room, ticket, work=self.work)
        self.refused += [ticket] if turned is None else turned

    def step(self) -> list[Ticket]:
        """Return the tickets that began."""
        began = []
        while len(self.left) < self.num_rows and (ticket := self.room.next(self.left)) is not None:
            self.room.take_turn(ticket)
            self.left[ticket] = ticket.size
            began.append(ticket)
        self.work += len(self.left)
        self.left = {ticket: left - 1 for ticket, left in self.left.items() if left > 1}
        return began


def test_a_large_request_among_endless_small_ones_has_a_place_and_its_turn():
    """Whatever users the small ones invent; the same client sends both."""
    rng = random.Random(0)
    engine = Simulated(8, 64)
    waited: list[int] = []
    large, submitted = made("address", "large", size=100), -1
    for number in range(8000):
        for _ in range(2):  # more than the rows can run
            engine.submit(made("address", f"{rng.random()}", size=rng.randint(2, 10)))
        if number % 2000 == 500:
            large, submitted = made("address", "large", size=100), engine.work
            engine.submit(large)
        if large in engine.step():
            waited.append(engine.work - submitted)
    assert len(waited) == 4
    # Then it has waited for a room of its size, and what is ahead of it is a room of ten tokens each.
    assert max(waited) <= 64 * 100 + 64 * 10 + 8


@pytest.mark.parametrize("num_users", (1, 90))
def test_small_requests_among_endless_large_ones_are_never_refused_and_next_in_line(num_users):
    engine = Simulated(8, 64)
    began: Counter[str] = Counter()
    for number in range(6800):
        engine.submit(made("address", f"user {number % num_users}", size=400))
        if number % 500 == 200 and number < 6400:
            engine.submit(made("address", "small", size=6))
        for ticket in engine.step():
            began[ticket.user if ticket.user == "small" else "large"] += 1
    assert began["small"] == 13 and began["large"] > 100
    assert all(ticket.user != "small" for ticket in engine.refused)


def test_the_large_requests_that_are_let_in_run_in_the_end():
    engine = Simulated(4, 16)
    tickets = [made(f"client {n % 3}", f"{n % 7}", size=1 + n * 37 % 400) for n in range(200)]
    ran: list[Ticket] = []
    for ticket in tickets:
        engine.submit(ticket)
        ran += engine.step()
    while engine.left or len(engine.room):
        ran += engine.step()
    assert len(ran) == len(set(ran))
    assert set(ran) | set(engine.refused) == set(tickets) and not set(ran) & set(engine.refused)
