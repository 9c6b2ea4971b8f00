"""Greedy texts at several strengths at once, which share the beginnings they have in common.

Words: a *point* is a strength for each of an ensemble's pairs. A *branch* is an unfinished text together with
the points that have written it so far. All points of a prompt start as one branch. Where points choose
different tokens the branch splits, and each new branch continues with a copy of what the models have read. So
a token is read once for all points that agree on every token before it. Each point's texts are the ones that
`decode/batch.py` would generate.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune.backends.base import Backend
from proxytune.decode.collect import Collector, run
from proxytune.decode.ensemble import Ensemble, Job, check_job
from proxytune.errors import InvalidRequest
from proxytune.measure.score import by_backend, needed_members, steered_rows
from proxytune.request import SamplingParams
from proxytune.text.detokenize import TextStream


class Texts(NamedTuple):
    """The texts of several points."""

    texts: list[list[str]]
    """For each prompt, the text of each point."""
    token_ids: list[list[tuple[int, ...]]]
    """The token ids of `texts`, end-of-sequence tokens included."""
    num_read: int
    """Number of new tokens that the models read."""
    num_chosen: int
    """Number of new tokens of all texts. Read separately, each text would cost all but its last token."""


@dataclass(slots=True)
class _Branch:
    prompt: int
    points: list[int]
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    text: str = ""


@dataclass(slots=True)
class _Reader:
    """One backend, and its members that read all branches; rows are ordered by member."""

    backend: Backend[Any]
    members: list[int]
    state: Any = None


def branch(
    ensemble: Ensemble,
    prompts: Sequence[Sequence[Sequence[int]]],
    points: Sequence[tuple[float, ...]],
    sampling: SamplingParams,
    *,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Texts:
    """Return the greedy text of each prompt at each point.

    Args:
        ensemble: The models. The base must run here, not behind an API.
        prompts: For each prompt, the token ids of each member.
        points: For each point, the strength of each of the ensemble's pairs.
        sampling: Greedy, without penalties, biases and `min_new_tokens`.
        batch_size: Number of prompts answered together. Each can have as many branches as there are points.
        on_progress: Called with the number of prompts done and the total.

    Raises:
        InvalidRequest: The settings are not as described, or a prompt cannot be run.
        PromptTooLong: Prompt and new tokens exceed a member's context.
    """
    _check(ensemble, sampling)
    for prompt in prompts:
        # Every pair runs, since a point at strength 0 may share a branch with others.
        check_job(ensemble, Job(sampling, tuple(prompt), (1.0,) * len(ensemble.pairs)))
    total = Texts([], [], 0, 0)
    write = _grown if ensemble.engine is None else _answered
    for start in range(0, len(prompts), batch_size):
        part = write(ensemble, prompts[start : start + batch_size], points, sampling)
        total = Texts(*map(operator.add, total, part))
        if on_progress is not None:
            on_progress(len(total.texts), len(prompts))
    return total


def _grown(
    ensemble: Ensemble,
    prompts: Sequence[Sequence[Sequence[int]]],
    points: Sequence[tuple[float, ...]],
    sampling: SamplingParams,
) -> Texts:
    return _Tree(ensemble, prompts, points, sampling).grow()


def _check(ensemble: Ensemble, sampling: SamplingParams) -> None:
    if ensemble.members[0].backend.partial is not None:
        raise InvalidRequest(
            "texts at several strengths share what the models have read, and a base behind an API does not "
            "share it.\nhint: generate at each strength separately"
        )
    is_plain = sampling.is_greedy and not sampling.has_penalties
    is_biased = bool(sampling.logit_bias or sampling.first_logit_bias)
    if not is_plain or is_biased or sampling.min_new_tokens:
        raise InvalidRequest(
            "texts at several strengths can share their beginnings only if they are greedy, without "
            "penalties, biases or min_new_tokens.\nhint: leave these out"
        )


def _answered(
    ensemble: Ensemble,
    prompts: Sequence[Sequence[Sequence[int]]],
    points: Sequence[tuple[float, ...]],
    sampling: SamplingParams,
) -> Texts:
    """Return what the ensemble's engine writes, each point by itself."""
    collectors = [
        Collector(Job(sampling, tuple(prompt), point)) for prompt in prompts for point in points
    ]
    for _ in run(ensemble, collectors):
        pass
    traces = [collector.trace() for collector in collectors]
    rows = [traces[i : i + len(points)] for i in range(0, len(traces), len(points))]
    num_chosen = sum(trace.num_new_tokens for trace in traces)
    return Texts(
        [[trace.text for trace in row] for row in rows],
        [[trace.token_ids for trace in row] for row in rows],
        num_chosen,
        num_chosen,
    )


class _Tree:
    """The branches of a few prompts."""

    def __init__(
        self,
        ensemble: Ensemble,
        prompts: Sequence[Sequence[Sequence[int]]],
        points: Sequence[tuple[float, ...]],
        sampling: SamplingParams,
    ) -> None:
        self._ensemble = ensemble
        self._prompts = prompts
        self._points = points
        self._sampling = sampling
        self._ending_ids = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self._ending_ids |= set(ensemble.eos_token_ids)
        self._branches = [
            _Branch(prompt, list(range(len(points))), self._stream(prompt))
            for prompt in range(len(prompts))
        ]
        self._readers = [
            _Reader(backend, members)
            for backend, members in by_backend(ensemble, needed_members(ensemble.pairs))
        ]
        self._texts = [[""] * len(points) for _ in prompts]
        self._token_ids: list[list[tuple[int, ...]]] = [[()] * len(points) for _ in prompts]
        self._num_read = 0

    def grow(self) -> Texts:
        """Return all texts, finished."""
        kept = self._split(self._prefill())
        while self._branches:
            kept = self._split(self._read(kept))
        num_chosen = sum(len(ids) for row in self._token_ids for ids in row)
        return Texts(self._texts, self._token_ids, self._num_read, num_chosen)

    def _stream(self, prompt: int) -> TextStream:
        return TextStream(
            self._ensemble.tokenizer, stop=self._sampling.stop, prompt_ids=self._prompts[prompt][0]
        )

    def _prefill(self) -> dict[int, Tensor]:
        logits: dict[int, Tensor] = {}
        for reader in self._readers:
            prompts = [prompt[member] for member in reader.members for prompt in self._prompts]
            adapters = [
                self._ensemble.members[member].adapter
                for member in reader.members
                for _ in self._prompts
            ]
            reader.state, answer = reader.backend.prefill(prompts, adapters=adapters)
            self._enter(reader, answer, logits)
        return logits

    def _read(self, kept: Sequence[int]) -> dict[int, Tensor]:
        """Let the models read each branch's last token; `kept` has the old branch that each continues."""
        last = torch.tensor([branch.token_ids[-1] for branch in self._branches])
        self._num_read += len(last)
        logits: dict[int, Tensor] = {}
        for reader in self._readers:
            old = self._num_before
            lanes = [place * old + row for place in range(len(reader.members)) for row in kept]
            reader.state = reader.backend.select(reader.state, lanes)
            tokens = torch.cat(
                [self._ensemble.members[m].alignment.ids_to_small(last) for m in reader.members]
            )
            answer = reader.backend.extend(reader.state, tokens[:, None])[:, 0]
            self._enter(reader, answer, logits)
        return logits

    def _enter(self, reader: _Reader, answer: Tensor, logits: dict[int, Tensor]) -> None:
        for member, part in zip(reader.members, answer.chunk(len(reader.members)), strict=True):
            logits[member] = self._ensemble.members[member].alignment.logits_to_base(part)

    def _split(self, logits: dict[int, Tensor]) -> list[int]:
        """Split the branches by what their points choose; return the old branch that each continues."""
        chosen: list[dict[int, list[int]]] = [{} for _ in self._branches]
        for point in range(len(self._points)):
            rows = [row for row, each in enumerate(self._branches) if point in each.points]
            if not rows:
                continue
            for row, token_id in zip(rows, self._best(logits, point, rows), strict=True):
                chosen[row].setdefault(token_id, []).append(point)
        self._num_before = len(self._branches)
        branches, kept = [], []
        for row, (parent, parts) in enumerate(zip(self._branches, chosen, strict=True)):
            for token_id, points in parts.items():
                child = parent if len(parts) == 1 else self._copy(parent, points)
                if not self._advance(child, token_id):
                    branches.append(child)
                    kept.append(row)
        self._branches = branches
        return kept

    def _best(self, logits: dict[int, Tensor], point: int, rows: Sequence[int]) -> list[int]:
        ensemble = self._ensemble
        if len(rows) > 1 and ensemble.members[0].backend.capabilities.is_exact:
            return [self._best(logits, point, [row])[0] for row in rows]  # as a batch chooses then
        device = logits[0].device
        chosen = {member: part[list(rows)].to(device) for member, part in logits.items()}
        positions = torch.tensor(
            [len(self._branches[row].token_ids) for row in rows], device=device
        )
        padding_ids = ensemble.vocabulary.padding_ids.to(device)
        steered = steered_rows(
            ensemble, chosen, self._points[point], positions=positions, padding_ids=padding_ids
        ).logits
        if len(padding_ids):
            steered = steered.index_fill(-1, padding_ids, -torch.inf)
        best: list[int] = steered.argmax(-1).tolist()
        return best

    def _copy(self, parent: _Branch, points: list[int]) -> _Branch:
        child = _Branch(parent.prompt, points, self._stream(parent.prompt))
        for token_id in parent.token_ids:
            child.text += child.stream.push(token_id)
        child.token_ids = list(parent.token_ids)
        return child

    def _advance(self, each: _Branch, token_id: int) -> bool:
        """Add a token; return whether the branch has ended, and then keep its text for its points."""
        each.token_ids.append(token_id)
        is_last = len(each.token_ids) >= self._sampling.max_new_tokens
        if token_id in self._ending_ids:
            each.text += each.stream.finish()
            is_last = True
        else:
            each.text += each.stream.push(token_id)
            if each.stream.stopped:
                is_last = True
            elif is_last:
                each.text += each.stream.finish()
        if is_last:
            for point in each.points:
                self._texts[each.prompt][point] = each.text
                self._token_ids[each.prompt][point] = tuple(each.token_ids)
        return is_last
