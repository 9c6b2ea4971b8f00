"""The server's metrics, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from proxytune.server.turns import Ticket

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server; they contain no prompts, user names or keys.

    `num_running` and `num_waiting` are called when metrics are read, and return numbers of texts.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, num_running: Callable[[], int], num_waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"proxytune_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"proxytune_{name}_seconds", text, buckets=SECONDS, registry=registry)

        self._requests = counter("requests", "Requests answered.", ["path", "status"])
        self._finished = counter("texts", "Texts finished, by the reason.", ["reason"])
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens read by the base.")
        self._reused_tokens = counter(
            "reused_prompt_tokens", "Prompt tokens reused from earlier texts."
        )
        self._new_tokens = counter("generated_tokens", "Tokens generated.")
        self._drafted = counter("drafted_tokens", "Tokens drafted by speculative decoding.")
        self._accepted = counter("accepted_tokens", "Draft tokens accepted.")
        self._steps = seconds("step", "Duration of one decoding step.")
        self._waits = seconds("queue", "Time from a request to the start of its text.")
        self._first_tokens = seconds("first_token", "Time from a request to its first token.")
        self._totals = seconds("text", "Time from a request to the end of its text.")
        running = Gauge("proxytune_running", "Texts being generated.", registry=registry)
        running.set_function(num_running)
        waiting = Gauge("proxytune_waiting", "Texts waiting to be generated.", registry=registry)
        waiting.set_function(num_waiting)

    def count_request(self, path: str, status: int) -> None:
        """Count an answered request."""
        self._requests.labels(path, str(status)).inc()

    def count_step(self, seconds: float, num_rows: int, num_tokens: int) -> None:
        """Count a step of the engine and the tokens it generated."""
        self._steps.observe(seconds)
        self._new_tokens.inc(num_tokens)

    def count_text(self, ticket: Ticket, reason: str) -> None:
        """Count a text that has ended, whatever the reason."""
        self._finished.labels(reason).inc()
        if ticket.started is not None:
            self._prompt_tokens.inc(len(ticket.job.prompts[0]) - ticket.num_reused)
            self._reused_tokens.inc(ticket.num_reused)
            self._waits.observe(ticket.started - ticket.submitted)
        if ticket.first_token is not None:
            self._first_tokens.observe(ticket.first_token - ticket.submitted)
        if ticket.ended is not None:
            self._totals.observe(ticket.ended - ticket.submitted)
        self._drafted.inc(ticket.draft_count.proposed)
        self._accepted.inc(ticket.draft_count.accepted)

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self._registry)
