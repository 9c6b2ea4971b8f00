"""Requests of many clients in one running batch: who waits, who joins, who leaves.

One thread runs the models. Between two steps of the batch it admits new rows, and drops those whose client
has gone. HTTP never reaches this file: a *ticket* is a job, with a function to call with each of its events.

`turns.py` has the rules by which tickets wait and take turns, so that one client's hundred requests do not
delay another's first one. If the models cannot add rows to a running batch (`Backend.merge`), several batches
take turns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from proxytune.decode.batch import Batch, DraftCount, Event
from proxytune.decode.lanes import Kept
from proxytune.decode.speculative import Drafting, Speculator
from proxytune.errors import BackendError, QueueFull, ShuttingDown, UserError
from proxytune.measure.prompt import PromptToken, score_prompt
from proxytune.model import ProxyTuned
from proxytune.server.turns import LONG, SHORT, PromptScores, Ticket, WaitingRoom

logger = logging.getLogger(__name__)

MIN_REUSED_TOKENS = 32
"""A prompt that shares fewer tokens with an earlier text is read whole, together with other prompts."""
MAX_ADMITTED_TOKENS = 4096
"""Maximum number of prompt tokens, padding included, that join at once; running rows wait for them."""


@dataclass(slots=True, eq=False)
class _Running:
    """A batch, and the ticket of each of its rows."""

    batch: Batch
    tickets: dict[int, Ticket]
    is_alone: bool = False


@dataclass(slots=True, eq=False)
class _Scoring:
    """A prompt that is being scored, and the tickets that wait for it."""

    scores: PromptScores
    tickets: list[Ticket]
    reading: Generator[list[PromptToken], None, Kept | None]
    is_alone: bool


class Engine:
    """Runs tickets. Use it as a context manager, or call `start` and `close`.

    Args:
        model: The model that runs the jobs.
        max_rows: Maximum number of rows that run at once; beside long ones, one short one more.
        max_waiting: Maximum number of waiting tickets.
        kept_tokens: Number of tokens of finished texts to keep in the models' caches. Later prompts of the
            same client that begin like them reuse them, such as the next turn of a chat.
        speculative: As in `ProxyTuned.generate`.
        on_step: Called after each step with its seconds, its rows, and the number of new tokens.
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
        self._kept: deque[tuple[tuple[str, str], Kept]] = deque()  # (owner, caches), oldest first
        self._condition = threading.Condition()
        self._waiting = WaitingRoom(max_waiting)
        self._work = 0  # number of tokens generated and scored so far
        self._suspects: deque[Ticket] = deque()  # their batch failed, so each runs alone
        self._arriving: list[Ticket] = []  # their prompts are being read
        self._scoring: list[_Scoring] = []
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
        """Whether the thread is running and accepts tickets."""
        return self._thread is not None and self._thread.is_alive() and not self._is_closing

    @property
    def num_waiting(self) -> int:
        """Number of tickets that have not started."""
        return len(self._waiting) + len(self._suspects)

    @property
    def num_running(self) -> int:
        """Number of running rows."""
        busy: list[_Running | _Scoring] = [*self._running, *self._scoring]
        return len(self._arriving) + sum(len(each.tickets) for each in busy)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue the tickets of one request, all of them or none.

        If too many are waiting, a ticket of somebody who is entitled to less may be turned away with
        `QueueFull` for them.

        Raises:
            QueueFull: Too many tickets are waiting.
            ShuttingDown: `close` was called.
        """
        with self._condition:
            if not self.is_alive:
                raise ShuttingDown("the server is shutting down.\nhint: try again when it is back")
            free = max(0, self.max_rows - self.num_running) - len(self._suspects)
            full = self._queue_full()
            turned_away = self._waiting.enter(tickets, work=self._work, num_free=free)
            if turned_away is None:
                raise full
            self._condition.notify()
        for ticket in turned_away:
            ticket.notify(full)

    def _queue_full(self) -> QueueFull:
        waiting = self.num_waiting
        wait_s = waiting / self.max_rows * self._seconds_per_ticket
        retry_after_s = max(1, min(60, round(wait_s)))
        return QueueFull(
            f"{waiting} requests are waiting, and this server allows no more.\n"
            f"hint: try again in {retry_after_s} seconds",
            retry_after_s,
        )

    def close(self, timeout_s: float) -> None:
        """Accept no new tickets, finish the present ones, and cancel what is left after `timeout_s`."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        # The engine's thread cancels them, because only it knows where each ticket is at any time.
        self._is_giving_up = True
        self._thread.join()

    # The engine's thread --------------------------------------------------------------------------------

    def _all_tickets(self) -> list[Ticket]:
        return [*self._busy_tickets(), *self._arriving, *self._suspects, *self._waiting]

    def _busy_tickets(self) -> list[Ticket]:
        """Return the tickets that run, and those whose prompts are being scored."""
        running = [ticket for each in self._running for ticket in each.tickets.values()]
        return running + [ticket for each in self._scoring for ticket in each.tickets]

    def _loop(self) -> None:
        while True:
            with self._condition:
                while not (self._running or self._scoring or self.num_waiting):
                    if self._is_closing:
                        return
                    self._condition.wait()
            try:
                self._turn()
            except Exception as error:
                # A bug. All tickets end with the error, and the next request finds a working server.
                logger.exception("the engine failed")
                with self._condition:
                    tickets = self._all_tickets()
                    self._arriving, self._scoring, self._running = [], [], []
                    self._waiting.clear()
                    self._suspects.clear()
                for ticket in tickets:
                    ticket.notify(error)

    def _turn(self) -> None:
        """Admit waiting tickets, and take one step of each batch."""
        if self._is_giving_up:
            for ticket in self._all_tickets():
                ticket.cancel()
        for running in list(self._running):
            # First, so that waiting tickets can take their places.
            try:
                events = running.batch.drop_cancelled()
            except Exception as error:
                self._running.remove(running)
                self._fail(list(running.tickets.values()), error)
                continue
            self._notify(running, events)
            if not running.tickets:
                self._running.remove(running)
        with self._condition:
            unwanted = self._drop_unwanted()
            self._arriving, is_alone = self._take_arrivals()
        for ticket in unwanted:
            ticket.notify(Event(0, None, "cancelled", ""))
        if self._arriving:
            self._admit(self._arriving, is_alone)
        for scoring in list(self._scoring):
            self._score(scoring)
        for running in list(self._running):
            if self._step(running) and not running.tickets:
                self._running.remove(running)

    def _drop_unwanted(self) -> list[Ticket]:
        """Remove unwanted tickets from the queues, and return them."""
        unwanted = [ticket for ticket in self._waiting if ticket.is_unwanted()]
        for ticket in unwanted:
            self._waiting.remove(ticket)
        failed = [ticket for ticket in self._suspects if ticket.is_unwanted()]
        for ticket in failed:
            self._suspects.remove(ticket)
        return unwanted + failed

    def _take_arrivals(self) -> tuple[list[Ticket], bool]:
        """Return the tickets that may join now, and whether they must run alone."""
        running = self._busy_tickets()
        free = self.max_rows - len(running)
        if free > 0 and self._suspects:
            return [self._suspects.popleft()], True
        max_size = None
        if free == 0 and all(ticket.size >= LONG for ticket in running):
            free, max_size = 1, SHORT
        arrivals: list[Ticket] = []
        longest = 0
        while len(arrivals) < free:
            ticket = self._waiting.next([*running, *arrivals], max_size=max_size)
            if ticket is None:
                break
            longest = max(longest, *map(len, ticket.job.prompts))
            if arrivals and longest * (len(arrivals) + 1) > MAX_ADMITTED_TOKENS:
                break
            self._waiting.take_turn(ticket)
            arrivals.append(ticket)
        return arrivals, False

    def _admit(self, arrivals: list[Ticket], is_alone: bool) -> None:
        """Start tickets: each reads its prompt, chooses its first token, and joins a batch."""
        now = time.monotonic()
        together = []
        for ticket in arrivals:
            ticket.started = ticket.started or now
            if self._waits_for_scores(ticket, is_alone):
                continue
            # A ticket that must run alone may have failed because of reused caches.
            kept = None if is_alone else self._take_kept(ticket)
            if kept is None:
                together.append(ticket)
            else:
                self._begin([ticket], is_alone, kept)
        if together:
            self._begin(together, is_alone, None)

    def _waits_for_scores(self, ticket: Ticket, is_alone: bool) -> bool:
        """Let a ticket whose prompt is to be scored wait for that, and end one that wants no text.

        Returns whether it does not generate now.
        """
        scores = ticket.scores
        if scores is not None and not scores.is_done:
            same = next((each for each in self._scoring if each.scores is scores), None)
            if same is None:
                scores.tokens.clear()  # of an attempt that failed
                reading = score_prompt(self.model.ensemble, ticket.job, num_top=scores.num_top)
                same = _Scoring(scores, [], reading, is_alone)
                self._scoring.append(same)
            same.tickets.append(ticket)
        elif ticket.generates:
            return False
        else:
            self._work += 1  # Otherwise such tickets could go ahead of larger ones without end.
            ticket.notify(Event(0, None, "length", ""))
        self._arriving = [each for each in self._arriving if each is not ticket]
        return True

    def _score(self, scoring: _Scoring) -> None:
        """Score the next tokens of a prompt; after the last one, start the tickets that wait for it."""
        for ticket in [each for each in scoring.tickets if each.is_unwanted()]:
            scoring.tickets.remove(ticket)
            ticket.notify(Event(0, None, "cancelled", ""))
        kept: Kept | None = None
        try:
            if scoring.tickets:
                scored = next(scoring.reading)
                scoring.scores.tokens += scored
                self._work += len(scored)
                return
        except StopIteration as end:
            kept = end.value
        except Exception as error:
            self._scoring.remove(scoring)
            self._fail(scoring.tickets, error)
            return
        self._scoring.remove(scoring)
        scoring.scores.is_done = bool(scoring.tickets)
        self._arriving = [ticket for ticket in scoring.tickets if ticket.generates]
        for ticket in scoring.tickets:
            if not ticket.generates:
                ticket.notify(Event(0, None, "length", ""))
        for tickets, read in ((self._arriving[:1], kept), (self._arriving[1:], None)):
            if tickets:
                self._begin(tickets, scoring.is_alone, read)

    def _take_kept(self, ticket: Ticket) -> Kept | None:
        """Return the kept caches that share most with a ticket's prompt, if they share enough.

        Only those of the same client and user: the time to an answer must not reveal what others have
        asked.
        """
        shared = [
            kept.num_shared(ticket.job.prompts) if owner == (ticket.client, ticket.user) else 0
            for owner, kept in self._kept
        ]
        most = max(shared, default=0)
        if most < MIN_REUSED_TOKENS:
            return None
        index = shared.index(most)
        _, best = self._kept[index]
        del self._kept[index]
        return best

    def _keep(self, ticket: Ticket, kept: Kept) -> None:
        """Keep the caches of a finished text, and drop the oldest ones beyond the limit."""
        self._kept.append(((ticket.client, ticket.user), kept))
        while sum(each.num_tokens for _, each in self._kept) > self._kept_tokens:
            self._kept.popleft()

    def _begin(self, arrivals: list[Ticket], is_alone: bool, kept: Kept | None) -> None:
        """Start a batch, and let it join a running one if possible."""
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
        # A prompt that was scored has been read for this very text.
        arrivals[0].num_reused = 0 if arrivals[0].scores else batch.num_reused
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
        """Take one step of a batch and notify its tickets; return whether it succeeded."""
        started = time.perf_counter()
        num_rows = running.batch.num_rows
        try:
            events = running.batch.step()
        except Exception as error:
            self._running.remove(running)
            self._fail(list(running.tickets.values()), error)
            return False
        self._notify(running, events)
        num_tokens = sum(event.step is not None for event in events)
        self._work += num_tokens
        if self._on_step is not None:
            try:
                self._on_step(time.perf_counter() - started, num_rows, num_tokens)
            except Exception:
                logger.exception("a listener failed")
        return True

    def _notify(self, running: _Running, events: Sequence[Event]) -> None:
        """Pass events to the tickets of their rows, and remove rows that have ended."""
        for event in events:
            ticket = running.tickets[event.row]
            is_repeated = event.step is not None and event.step.index < ticket.num_steps
            if event.finish_reason is not None:
                ticket.draft_count = running.batch.draft_counts.get(event.row, DraftCount(0, 0))
                if event.row in running.batch.left:
                    self._keep(ticket, running.batch.left[event.row])
                running.batch.forget(event.row)
                del running.tickets[event.row]
                seconds = time.monotonic() - (ticket.started or ticket.submitted)
                self._seconds_per_ticket += (seconds - self._seconds_per_ticket) / 16
            if not is_repeated or event.finish_reason is not None:
                ticket.notify(event)

    def _fail(self, tickets: list[Ticket], error: Exception, *, had_kept: bool = False) -> None:
        """End a ticket whose batch failed; if there were several, first run each alone to find the cause.

        Tokens depend on the ticket alone, so each resumes where it was. A ticket that reused caches of an
        earlier text also runs again: they may be the cause, or their memory may be needed.
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
            ticket.notify(error)
