"""What the server counts, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from proxytune.server.engine import Ticket

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server; no prompt, name of a user or key is among them.

    Args:
        num_running: Asked when they are read.
        num_waiting: Likewise.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, num_running: Callable[[], int], num_waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "proxytune_requests", "Answered requests.", ["path", "status"], registry=registry
        )
        self._finished = Counter(
            "proxytune_texts", "Texts by how they ended.", ["reason"], registry=registry
        )
        self._prompt_tokens = Counter(
            "proxytune_prompt_tokens", "Tokens of prompts that were read.", registry=registry
        )
        self._reused_tokens = Counter(
            "proxytune_reused_prompt_tokens",
            "Tokens of prompts that were not read again.",
            registry=registry,
        )
        self._new_tokens = Counter(
            "proxytune_generated_tokens", "Tokens that were generated.", registry=registry
        )
        self._drafted = Counter(
            "proxytune_drafted_tokens", "Tokens that were guessed ahead.", registry=registry
        )
        self._accepted = Counter(
            "proxytune_accepted_tokens", "Guessed tokens that proved right.", registry=registry
        )
        self._steps = Histogram(
            "proxytune_step_seconds",
            "Time of one step of a batch.",
            buckets=SECONDS,
            registry=registry,
        )
        self._waits = Histogram(
            "proxytune_queue_seconds",
            "From a request to its start.",
            buckets=SECONDS,
            registry=registry,
        )
        self._firsts = Histogram(
            "proxytune_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self._totals = Histogram(
            "proxytune_text_seconds",
            "From a request to the end of its text.",
            buckets=SECONDS,
            registry=registry,
        )
        running = Gauge("proxytune_running", "Texts that are being generated.", registry=registry)
        running.set_function(num_running)
        waiting = Gauge("proxytune_waiting", "Texts that wait for their turn.", registry=registry)
        waiting.set_function(num_waiting)

    def answered(self, path: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()

    def stepped(self, seconds: float, num_rows: int, num_tokens: int) -> None:
        """Count a step of the engine."""
        self._steps.observe(seconds)
        self._new_tokens.inc(num_tokens)

    def ended(self, ticket: Ticket, reason: str) -> None:
        """Count a text that has ended, for whatever reason."""
        self._finished.labels(reason).inc()
        if ticket.started is not None:
            self._prompt_tokens.inc(len(ticket.job.prompts[0]) - ticket.num_reused)
            self._reused_tokens.inc(ticket.num_reused)
            self._waits.observe(ticket.started - ticket.submitted)
        if ticket.first_token is not None:
            self._firsts.observe(ticket.first_token - ticket.submitted)
        if ticket.ended is not None:
            self._totals.observe(ticket.ended - ticket.submitted)
        self._drafted.inc(ticket.draft_count.proposed)
        self._accepted.inc(ticket.draft_count.accepted)

    def text(self) -> bytes:
        """Return all of it."""
        return generate_latest(self._registry)
