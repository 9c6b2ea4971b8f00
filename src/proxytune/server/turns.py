"""Who waits, who is turned away, and whose turn is next. No models, threads or clocks.

Words: a *client* is whoever holds a key, or where no keys are asked for, an address. A *user* is a name that
a client gives its own requests; it can be invented, so it counts only within a client. A ticket's *size* is
the number of tokens of its prompt and of its new text at most. *Work* is the number of tokens that the
engine has generated or scored so far: it serves as a clock, so that the rules are the same for slow and fast
models.

**Turns.** When a row is free, the client with the fewest running rows is next; of several, the one whose
last turn is longest ago. Within the client it is the user with the fewest running rows, and among those
the ticket with the lowest *rank*:

    rank = work when it came + num_places * size

So a small request goes ahead of a large one, but only until the engine has generated as many tokens since
the large one came as a full room of requests of its size asks for. Nobody is overtaken for longer.

**Places.** When the waiting room is full, a newcomer is not simply refused. The client with the most
tickets in the room, newcomers included, gives up a place; within it the user with the most; of several such
users, or of one's tickets, the most frequent class of sizes (from one power of two to the next); of those the
ticket with the highest rank, the youngest of equals. If that is a newcomer it is refused, otherwise the other
is turned away and the newcomer stays. So no client can take all places, invented user names do not change a
client's share, and a small request finds a place among large ones, as a large one does among small ones.

**The short row.** When all rows run long texts (at least `LONG` tokens), one short text (at most `SHORT`) may
run beside them. Without it, small requests would wait for the end of the longest.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from proxytune.decode.batch import DraftCount, Event
from proxytune.decode.ensemble import Job
from proxytune.measure.prompt import PromptToken

logger = logging.getLogger(__name__)

SHORT = 64
"""Maximum size of a ticket that may run in the short row."""
LONG = 256
"""Minimum size of the tickets beside which it may."""


@dataclass(slots=True, eq=False)
class PromptScores:
    """What the steered base gives the tokens of a prompt, from the second on.

    Args:
        num_top: Number of likeliest tokens to list at each position.
    """

    num_top: int
    tokens: list[PromptToken] = field(default_factory=list)
    is_done: bool = False


@dataclass(slots=True, eq=False)
class Ticket:
    """A job on its way through the engine.

    Args:
        job: What to generate. If it samples it has a seed, so that it can be run again.
        on_event: Called with each event, or with the error that ended the job: in the engine's thread, or if
            it is turned away, in that of whoever takes its place.
        client: The client: a key, or an address.
        deadline: Time on the monotonic clock at which the job ends as if cancelled, with `is_late` set.
        user: A name that the client gives its own requests.
        scores: The scores of its prompt, which the engine fills in before the first event; None if nobody
            wants them. Several answers to one prompt share them.
        generates: Whether a text is wanted; otherwise the job ends when its prompt is scored.
    """

    job: Job
    on_event: Callable[[Event | Exception], None]
    client: str = ""
    deadline: float | None = None
    user: str = ""
    scores: PromptScores | None = None
    generates: bool = True
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    rank: int = 0
    request: int = 0
    """Number of its request, which has several tickets if it asks for several texts."""
    num_reused: int = 0
    """Tokens of the base's prompt that were reused from an earlier text."""
    draft_count: DraftCount = field(default_factory=lambda: DraftCount(0, 0))
    is_cancelled: bool = False
    num_steps: int = 0
    """Steps reported so far; a second run reports only those after them."""

    def cancel(self) -> None:
        """End the job within one step."""
        self.is_cancelled = True

    @property
    def size(self) -> int:
        """Number of tokens of its longest prompt, and of its new text at most."""
        return max(map(len, self.job.prompts)) + self.job.sampling.max_new_tokens

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def is_unwanted(self) -> bool:
        """Whether nobody waits for its result any more; the batch calls this at every step."""
        return self.is_cancelled or self.is_late

    def notify(self, event: Event | Exception) -> None:
        """Pass an event to the listener, and record its time."""
        now = time.monotonic()
        if isinstance(event, Exception) or event.finish_reason is not None:
            self.ended = now
        if not isinstance(event, Exception) and event.step is not None:
            self.first_token = self.first_token or now
            self.num_steps = max(self.num_steps, event.step.index + 1)
        try:
            self.on_event(event)
        except Exception:
            # The listener has failed, not the models: the other rows go on.
            logger.exception("a listener failed")
            self.cancel()


class WaitingRoom:
    """The waiting tickets, and the rules above.

    Args:
        num_places: Number of tickets that may wait.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._num_requests = 0
        self._waiting: dict[str, list[Ticket]] = {}  # the client whose turn was last is at the end

    def __len__(self) -> int:
        return sum(map(len, list(self._waiting.values())))

    def __iter__(self) -> Iterator[Ticket]:
        return (ticket for own in list(self._waiting.values()) for ticket in list(own))

    def enter(
        self, newcomers: Sequence[Ticket], *, work: int, num_free: int = 0
    ) -> list[Ticket] | None:
        """Let one request's tickets in, all of them or none.

        Args:
            newcomers: The tickets.
            work: Number of tokens that the engine has generated so far.
            num_free: Number of rows that are free, whose next tickets need no places.

        Returns:
            The tickets that are turned away for them, which have left the room; None if they are refused.
        """
        self._num_requests += 1
        for ticket in newcomers:
            ticket.request = self._num_requests
            ticket.rank = work + self._num_places * ticket.size
        # Those whose clients have gone leave at the engine's next step, and are not in the way until then.
        room = [ticket for ticket in self if not ticket.is_unwanted()] + list(newcomers)
        turned_away: list[Ticket] = []
        while len(room) > self._num_places + num_free:
            request = _least_entitled(room).request
            if request == self._num_requests:
                return None
            turned_away += [ticket for ticket in room if ticket.request == request]
            room = [ticket for ticket in room if ticket.request != request]
        for ticket in turned_away:
            self.remove(ticket)
        for ticket in newcomers:
            self._waiting.setdefault(ticket.client, []).append(ticket)
        return turned_away

    def next(self, running: Iterable[Ticket], *, max_size: int | None = None) -> Ticket | None:
        """Return the ticket whose turn is next, which stays; None if there is none.

        Args:
            running: The tickets that run.
            max_size: Pass over larger ones.
        """
        rows: Counter[str] = Counter()
        own_rows: Counter[tuple[str, str]] = Counter()
        for ticket in running:
            rows[ticket.client] += 1
            own_rows[ticket.client, ticket.user] += 1
        fitting = {
            client: [ticket for ticket in own if max_size is None or ticket.size <= max_size]
            for client, own in self._waiting.items()
        }
        client = min(filter(fitting.get, fitting), key=lambda each: rows[each], default=None)
        if client is None:
            return None
        return min(fitting[client], key=lambda each: (own_rows[client, each.user], each.rank))

    def take_turn(self, ticket: Ticket) -> None:
        """Remove a ticket that runs now; its client's next turn comes after all others'."""
        own = self._waiting.pop(ticket.client)
        own.remove(ticket)
        if own:
            self._waiting[ticket.client] = own

    def remove(self, ticket: Ticket) -> None:
        """Remove a ticket that will not run."""
        own = self._waiting[ticket.client]
        own.remove(ticket)
        if not own:
            del self._waiting[ticket.client]

    def clear(self) -> None:
        """Remove all tickets."""
        self._waiting = {}


def _least_entitled(room: Sequence[Ticket]) -> Ticket:
    """Return the ticket whose place is given up first."""
    for key in (_client, _user, _size_class):
        counts = Counter(map(key, room))
        most = max(counts.values())
        room = [ticket for ticket in room if counts[key(ticket)] == most]
    return max(room, key=lambda each: (each.rank, each.request))


def _client(ticket: Ticket) -> Hashable:
    return ticket.client


def _user(ticket: Ticket) -> Hashable:
    return ticket.client, ticket.user


def _size_class(ticket: Ticket) -> Hashable:
    return ticket.size.bit_length()
