"""Requests of many clients in one running batch: who waits, who joins, who leaves.

One thread runs the models. Between two steps of the batch it lets rows in, and drops those whose client has
gone. HTTP is not known here: a *ticket* is a job, and a function that is told what happens to it.

Order: each client has a queue of its own and they take turns, so that one client's hundred requests do not
keep another's first one waiting. Where the models cannot take rows into a running batch (`Backend.merge`),
several batches run in turns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from proxytune.decode.batch import Batch, DraftCount, Event
from proxytune.decode.ensemble import Job
from proxytune.decode.lanes import Kept
from proxytune.decode.speculative import Drafting, Speculator
from proxytune.errors import BackendError, QueueFull, ShuttingDown, UserError
from proxytune.model import ProxyTuned

logger = logging.getLogger(__name__)

MIN_REUSED_TOKENS = 32
"""A prompt that shares fewer with an earlier text is read whole, together with others."""
ADMITTED_TOKENS = 4096
"""Most prompt tokens, padding included, that join at once: they keep the running rows waiting."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A job on its way through the engine.

    Args:
        job: What to generate. A sampled one has a seed, so that it can be run again.
        on_event: Called in the engine's thread with each event, and with the error that ended it, if one did.
        client: Whose turn it takes.
        deadline: By the monotonic clock; the job ends then as if cancelled, with `is_late` set.
    """

    job: Job
    on_event: Callable[[Event | Exception], None]
    client: str = ""
    deadline: float | None = None
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    num_reused: int = 0
    """Tokens of the base's prompt that were not read again."""
    draft_count: DraftCount = field(default_factory=lambda: DraftCount(0, 0))
    is_cancelled: bool = False
    num_steps: int = 0
    """Steps told so far; those of a second run are told from there on."""

    def cancel(self) -> None:
        """End the job within one step."""
        self.is_cancelled = True

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def is_unwanted(self) -> bool:
        """Whether nobody waits for more; the batch asks once a step."""
        return self.is_cancelled or self.is_late

    def tell(self, event: Event | Exception) -> None:
        """Pass on what happened, and note when."""
        now = time.monotonic()
        if isinstance(event, Exception) or event.finish_reason is not None:
            self.ended = now
        if not isinstance(event, Exception) and event.step is not None:
            self.first_token = self.first_token or now
            self.num_steps = max(self.num_steps, event.step.index + 1)
        try:
            self.on_event(event)
        except Exception:
            # Whoever listens has failed, not the models: the others go on.
            logger.exception("a listener failed")
            self.cancel()


@dataclass(slots=True, eq=False)
class _Running:
    """A batch and the tickets of its rows, by their numbers in it."""

    batch: Batch
    tickets: dict[int, Ticket]
    is_alone: bool = False


class Engine:
    """Runs tickets. Use it as a context manager, or call `start` and `close`.

    Args:
        model: What runs.
        max_rows: Most rows that run at once.
        max_waiting: Most tickets that wait.
        kept_tokens: How many tokens of ended texts the models remember, for prompts of the same client that
            begin like them (the turns of a chat do).
        speculative: As in `ProxyTuned.generate`.
        on_step: Told after each step: its seconds, its rows, and the tokens it brought.
    """

    def __init__(
        self,
        model: ProxyTuned,
        *,
        max_rows: int = 8,
        max_waiting: int = 64,
        kept_tokens: int = 0,
        speculative: bool | Drafting = False,
        on_step: Callable[[float, int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        drafting = Drafting() if speculative is True else speculative
        self._speculator = Speculator(drafting) if isinstance(drafting, Drafting) else None
        self._on_step = on_step
        self._kept_tokens = kept_tokens
        self._kept: deque[tuple[str, Kept]] = deque()  # whose, and what; the latest last
        self._condition = threading.Condition()
        self._waiting: dict[str, deque[Ticket]] = {}
        self._suspects: deque[Ticket] = deque()  # their batch failed: each runs alone
        self._arriving: list[Ticket] = []  # their prompts are being read
        self._running: list[_Running] = []
        self._is_closing = False
        self._is_giving_up = False
        self._seconds_per_ticket = 1.0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close(0)

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._loop, name="proxytune-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it runs and takes tickets."""
        return self._thread is not None and self._thread.is_alive() and not self._is_closing

    @property
    def num_waiting(self) -> int:
        """How many tickets have not begun."""
        return sum(map(len, list(self._waiting.values()))) + len(self._suspects)

    @property
    def num_running(self) -> int:
        """How many rows run."""
        return len(self._arriving) + sum(len(each.tickets) for each in list(self._running))

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue tickets, all of them or none.

        Raises:
            QueueFull: Too many wait.
            ShuttingDown: `close` was called.
        """
        with self._condition:
            if not self.is_alive:
                raise ShuttingDown("the server is shutting down.\nhint: try again when it is back")
            free = self.max_rows - self.num_running
            if self.num_waiting + len(tickets) > self.max_waiting + max(0, free):
                waiting = self.num_waiting
                wait_s = waiting / self.max_rows * self._seconds_per_ticket
                retry_after_s = max(1, min(60, round(wait_s)))
                raise QueueFull(
                    f"{waiting} requests are waiting, which is as many as may.\n"
                    f"hint: try again in {retry_after_s} seconds",
                    retry_after_s,
                )
            for ticket in tickets:
                self._waiting.setdefault(ticket.client, deque()).append(ticket)
            self._condition.notify()

    def close(self, timeout_s: float) -> None:
        """Take nothing new, finish what is there, and cancel what is left after `timeout_s`."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        # The engine's thread cancels them: only there is each ticket in its place at any time.
        self._is_giving_up = True
        self._thread.join()

    # The engine's thread --------------------------------------------------------------------------------

    def _all_tickets(self) -> list[Ticket]:
        running = [t for running in self._running for t in running.tickets.values()]
        return [
            *running,
            *self._arriving,
            *self._suspects,
            *(t for queue in self._waiting.values() for t in queue),
        ]

    def _loop(self) -> None:
        while True:
            with self._condition:
                while not (self._running or self.num_waiting):
                    if self._is_closing:
                        return
                    self._condition.wait()
            try:
                self._turn()
            except Exception as error:
                # A bug. Whoever waits is told, and the next request finds a server that works.
                logger.exception("the engine failed")
                with self._condition:
                    tickets = self._all_tickets()
                    self._arriving, self._running, self._waiting = [], [], {}
                    self._suspects.clear()
                for ticket in tickets:
                    ticket.tell(error)

    def _turn(self) -> None:
        """Let rows in, and take one step of each batch."""
        if self._is_giving_up:
            for ticket in self._all_tickets():
                ticket.cancel()
        for running in list(self._running):
            # First, so that whoever waits can take the place.
            try:
                events = running.batch.drop_cancelled()
            except Exception as error:
                self._running.remove(running)
                self._fail(list(running.tickets.values()), error)
                continue
            self._tell(running, events)
            if not running.tickets:
                self._running.remove(running)
        with self._condition:
            unwanted = self._drop_unwanted()
            self._arriving, is_alone = self._next()
        for ticket in unwanted:
            ticket.tell(Event(0, None, "cancelled", ""))
        if self._arriving:
            self._admit(self._arriving, is_alone)
        for running in list(self._running):
            if self._step(running) and not running.tickets:
                self._running.remove(running)

    def _drop_unwanted(self) -> list[Ticket]:
        """Take tickets that nobody wants any more out of the queues, and return them."""
        unwanted = []
        for queue in (*self._waiting.values(), self._suspects):
            gone = [ticket for ticket in queue if ticket.is_unwanted()]
            for ticket in gone:
                queue.remove(ticket)
            unwanted += gone
        self._waiting = {client: queue for client, queue in self._waiting.items() if queue}
        return unwanted

    def _next(self) -> tuple[list[Ticket], bool]:
        """Take the tickets that may join now, and say whether they must be alone."""
        free = self.max_rows - self.num_running
        if free > 0 and self._suspects:
            return [self._suspects.popleft()], True
        arrivals: list[Ticket] = []
        longest = 0
        while self._waiting and len(arrivals) < free:
            client = next(iter(self._waiting))
            length = max(map(len, self._waiting[client][0].job.prompts))
            longest = max(longest, length)
            if arrivals and longest * (len(arrivals) + 1) > ADMITTED_TOKENS:
                break
            queue = self._waiting.pop(client)
            arrivals.append(queue.popleft())
            if queue:
                self._waiting[client] = queue  # at the end: the others have their turn first
        return arrivals, False

    def _admit(self, arrivals: list[Ticket], is_alone: bool) -> None:
        """Let tickets read their prompts, choose their first tokens, and join."""
        now = time.monotonic()
        together = []
        for ticket in arrivals:
            ticket.started = ticket.started or now
            # A ticket that must be alone may be there because of what was kept.
            kept = None if is_alone else self._take_kept(ticket)
            if kept is None:
                together.append(ticket)
            else:
                self._begin([ticket], is_alone, kept)
        if together:
            self._begin(together, is_alone, None)

    def _take_kept(self, ticket: Ticket) -> Kept | None:
        """Return what an earlier text left that a prompt begins like, if it is worth it.

        Of the same client: how long an answer takes must not tell what others have asked.
        """
        shared = [
            kept.num_shared(ticket.job.prompts) if client == ticket.client else 0
            for client, kept in self._kept
        ]
        most = max(shared, default=0)
        if most < MIN_REUSED_TOKENS:
            return None
        place = shared.index(most)
        _, found = self._kept[place]
        del self._kept[place]
        return found

    def _keep(self, client: str, kept: Kept) -> None:
        """Remember what a text left, and forget the oldest ones."""
        self._kept.append((client, kept))
        while sum(each.num_tokens for _, each in self._kept) > self._kept_tokens:
            self._kept.popleft()

    def _begin(self, arrivals: list[Ticket], is_alone: bool, kept: Kept | None) -> None:
        """Begin one batch and let it join."""
        try:
            batch = Batch(
                self.model.ensemble,
                [ticket.job for ticket in arrivals],
                speculator=self._speculator,
                kept=kept,
                keeps=self._kept_tokens > 0,
            )
        except Exception as error:
            self._arriving = [each for each in self._arriving if each not in arrivals]
            self._fail(arrivals, error, had_kept=kept is not None)
            return
        arrivals[0].num_reused = batch.num_reused
        joining = _Running(batch, dict(enumerate(arrivals)), is_alone)
        self._running.append(joining)
        self._arriving = [each for each in self._arriving if each not in arrivals]
        if not self._step(joining):
            return
        if not joining.tickets:
            self._running.remove(joining)
            return
        host = next((r for r in self._running if r is not joining and not r.is_alone), None)
        if host is None or is_alone or not (batch.can_join and host.batch.can_join):
            return
        try:
            offset = host.batch.join(batch)
        except Exception as error:
            self._running.remove(joining)
            self._running.remove(host)
            self._fail([*host.tickets.values(), *joining.tickets.values()], error)
            return
        host.tickets |= {offset + row: ticket for row, ticket in joining.tickets.items()}
        self._running.remove(joining)

    def _step(self, running: _Running) -> bool:
        """Take one step of a batch and tell its tickets; whether it went well."""
        started = time.perf_counter()
        num_rows = running.batch.num_rows
        try:
            events = running.batch.step()
        except Exception as error:
            self._running.remove(running)
            self._fail(list(running.tickets.values()), error)
            return False
        self._tell(running, events)
        if self._on_step is not None:
            num_tokens = sum(event.step is not None for event in events)
            try:
                self._on_step(time.perf_counter() - started, num_rows, num_tokens)
            except Exception:
                logger.exception("a listener failed")
        return True

    def _tell(self, running: _Running, events: Sequence[Event]) -> None:
        """Tell tickets what happened to their rows, and forget those that have ended."""
        for event in events:
            ticket = running.tickets[event.row]
            is_repeated = event.step is not None and event.step.index < ticket.num_steps
            if event.finish_reason is not None:
                ticket.draft_count = running.batch.draft_counts.get(event.row, DraftCount(0, 0))
                if event.row in running.batch.left:
                    self._keep(ticket.client, running.batch.left[event.row])
                running.batch.forget(event.row)
                del running.tickets[event.row]
                seconds = time.monotonic() - (ticket.started or ticket.submitted)
                self._seconds_per_ticket += (seconds - self._seconds_per_ticket) / 16
            if not is_repeated or event.finish_reason is not None:
                ticket.tell(event)

    def _fail(self, tickets: list[Ticket], error: Exception, *, had_kept: bool = False) -> None:
        """End a ticket whose batch failed; where it had company, find out first whose fault it was.

        Tokens depend on nothing but the ticket, so each runs again by itself and goes on where it was. So
        does one that went on from an earlier text: what was kept may be to blame, and the room may be needed.
        """
        self._kept.clear()
        if not isinstance(error, BackendError | UserError):
            logger.error("a batch failed", exc_info=error)
        if len(tickets) > 1 or had_kept or tickets[0].num_reused:
            for ticket in tickets:
                ticket.num_reused = 0
            self._suspects.extend(tickets)
            return
        for ticket in tickets:
            ticket.tell(error)
