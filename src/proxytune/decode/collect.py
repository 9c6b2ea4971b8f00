"""The events of a batch's rows, gathered into traces."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from proxytune.decode.batch import Batch, DraftCount, Event
from proxytune.decode.ensemble import Answer, Ensemble, Job
from proxytune.decode.lanes import Row
from proxytune.decode.speculative import Speculator
from proxytune.errors import InvalidRequest
from proxytune.request import NO_DRAFTS
from proxytune.trace import Step, Trace, Usage


class Collector:
    """Gathers the events of one row into a trace."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._started = self._ended = time.perf_counter()
        self._steps: list[Step] = []
        self._tail = ""
        self._event: Event | None = None
        self.seed: int | None = None
        self.drafts = DraftCount(0, 0)
        self.usage: Usage | None = None

    def add(self, event: Event) -> None:
        """Take the row's next event."""
        if event.step is not None:
            self._steps.append(event.step)
        self._tail = event.tail
        self._event = event
        self._ended = time.perf_counter()

    def trace(self) -> Trace:
        """Return the trace of what was added; without an end to it, something failed."""
        return Trace(
            text="".join(step.text for step in self._steps) + self._tail,
            finish_reason=(self._event and self._event.finish_reason) or "failed",
            steps=tuple(self._steps),
            num_prompt_tokens=len(self.job.prompts[0]),
            alphas=self.job.strengths,
            seed=self.seed,
            latency_s=self._ended - self._started,
            num_drafted=self.drafts.proposed,
            num_accepted=self.drafts.accepted,
            usage=self.usage,
        )


def run(
    ensemble: Ensemble, collectors: Sequence[Collector], speculator: Speculator | None = None
) -> Iterator[Event]:
    """Generate the collectors' jobs in one batch, and yield each event once its collector has it."""
    if ensemble.engine is not None:
        if speculator is not None:
            raise InvalidRequest(NO_DRAFTS)
        yield from _run_in_engine(ensemble, collectors)
        return
    batch = Batch(ensemble, [collector.job for collector in collectors], speculator=speculator)
    for collector, seed in zip(collectors, batch.seeds, strict=True):
        collector.seed = seed
    try:
        while not batch.is_done:
            for event in batch.step():
                collectors[event.row].add(event)
                yield event
    finally:
        for row, collector in enumerate(collectors):
            collector.drafts = batch.draft_counts.get(row, DraftCount(0, 0))
            collector.usage = batch.usage(row)


def _run_in_engine(ensemble: Ensemble, collectors: Sequence[Collector]) -> Iterator[Event]:
    """Let the ensemble's engine answer the jobs; a job's events come together, once it has ended."""
    assert ensemble.engine is not None
    for collector in collectors:
        sampling = collector.job.sampling
        if not sampling.is_greedy:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            collector.job = replace(collector.job, sampling=replace(sampling, seed=seed))
            collector.seed = seed
    for answer in ensemble.engine.answers(ensemble, [each.job for each in collectors]):
        collector = collectors[answer.row]
        for event in _events(ensemble, collector.job, answer):
            collector.add(event)
            yield event


def _events(ensemble: Ensemble, job: Job, answer: Answer) -> Iterator[Event]:
    """Yield what a batch here would have reported of the same tokens.

    A logprob that the job did not ask for is not known, and is NaN.
    """
    row = Row.begin(ensemble, answer.row, job)
    for index, token_id in enumerate(answer.token_ids):
        reason, text = row.push(token_id)
        logprob, top = answer.tops[index] if answer.tops else (math.nan, ())
        step = Step(index, token_id, text, logprob, top, finish_reason=reason)
        yield Event(answer.row, step, reason, "", row.text.stopped_by)
        if reason is not None:
            return
    # It ended before this text did, as at a stop string that the engine spells otherwise.
    yield Event(answer.row, None, "stop", row.text.finish())


def with_token_texts(
    trace: Trace, job: Job, ensemble: Ensemble, contents: Mapping[int, bytes]
) -> Trace:
    """Return a trace with its prompt's text and the text of every token it mentions, if it records views.

    `contents` is what each token of the base's vocabulary writes (`text.vocab.token_bytes`).
    """
    if not job.records_views:
        return trace
    named = {step.token_id for step in trace.steps}
    for step in trace.steps:
        for top in (step.top, *(view.top for view in (step.views or {}).values())):
            named |= {token_id for token_id, _ in top}
    tokens = {i: _text_or_bytes(contents[i]) for i in sorted(named) if i in contents}
    special = {*ensemble.tokenizer.all_special_ids, *ensemble.eos_token_ids}
    prompt = ensemble.tokenizer.decode(
        list(job.prompts[0]), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    special_ids = tuple(i for i in tokens if i in special)
    return replace(trace, prompt=prompt, tokens=tokens, special_ids=special_ids)


def _text_or_bytes(content: bytes) -> str | bytes:
    try:
        return content.decode()
    except UnicodeDecodeError:  # half a character
        return content
