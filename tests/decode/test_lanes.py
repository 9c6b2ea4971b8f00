"""Which lanes steer which row, and what is left when rows go."""

from __future__ import annotations

from typing import Any

import torch

from proxytune.decode.drafting import AdaptiveDrafter, Drafter, FixedDrafter, drafter_of
from proxytune.decode.ensemble import Job
from proxytune.decode.lanes import LaneGroup, Lanes, Row, grouped
from proxytune.decode.reading import Reader, TimedReader, prefill
from proxytune.decode.speculative import Drafting, Speculator
from proxytune.logits.sample import BatchSampler
from proxytune.request import SamplingParams
from tests.decode.test_batch import ANTI, EXPERT, OTHER, SIZE, ensemble


def lanes_of(*alphas: tuple[float | None, ...]) -> Lanes:
    """Return the lanes of rows with these strengths, on one backend for each member."""
    models = ensemble((EXPERT, ANTI), (OTHER, ANTI))
    jobs = [Job(SamplingParams(max_new_tokens=9), ([1],) * 5, own) for own in alphas]
    groups = grouped(models, jobs)
    prefill(models, jobs, groups, None)
    rows = [Row.begin(models, index, job) for index, job in enumerate(jobs)]
    params = [job.sampling for job in jobs]
    sampler = BatchSampler(params, [[1]] * len(jobs), [[]] * len(jobs), vocab_size=SIZE)
    return Lanes(models, rows, groups, sampler, torch.device("cpu"))


def numbered(lanes: Lanes) -> dict[LaneGroup, torch.Tensor]:
    """Return logits that say whose they are: the member before the point, the row after it."""
    return {
        group: torch.tensor([[lane.member + lane.row / 10] * SIZE for lane in group.lanes])
        for group in lanes.groups
    }


def summed_up(lanes: Lanes, places: list[int]) -> list[tuple[Any, ...]]:
    """Return whose logits each contribution has, and its strengths."""
    return [
        tuple(
            [round(float(value), 4) for value in values]
            for values in (
                part.expert_logits[:, 0],
                part.anti_expert_logits[:, 0],
                torch.as_tensor(part.alpha).expand(len(places)),
            )
        )
        for part in lanes.contributions(numbered(lanes), places)
    ]


def test_in_each_contribution_every_row_has_a_pair_of_its_own():
    # Members 1 and 2 are the first pair, 3 and 4 the second.
    lanes = lanes_of((1.0, None), (None, 0.5), (0.2, 0.3))
    first, second = summed_up(lanes, [0, 1, 2])
    assert first == ([1.0, 3.1, 1.2], [2.0, 4.1, 2.2], [1.0, 0.5, 0.2])
    # The first two rows have one pair: any logits will do at strength 0.
    assert (second[0][2], second[1][2], second[2]) == (3.2, 4.2, [0.0, 0.0, 0.3])


def test_some_of_the_rows_get_their_own_contributions():
    lanes = lanes_of((1.0, None), (None, 0.5), (0.2, 0.3))
    first, second = summed_up(lanes, [0, 2])
    assert first == ([1.0, 1.2], [2.0, 2.2], [1.0, 0.2])
    assert (second[0][1], second[1][1], second[2]) == (3.2, 4.2, [0.0, 0.3])


def test_a_strength_that_all_rows_share_is_a_number():
    lanes = lanes_of((0.5, None), (None, 0.5))
    (only,) = lanes.contributions(numbered(lanes), [0, 1])
    assert only.alpha == 0.5 and isinstance(only.alpha, float)


def test_backends_that_read_no_live_row_are_left_out():
    lanes = lanes_of((1.0, None), (None, 0.5))
    assert len(lanes.groups) == 5
    lanes.select([1])
    assert [group.members for group in lanes.groups] == [[0], [3], [4]]
    assert summed_up(lanes, [0]) == [([3.1], [4.1], [0.5])]


def test_who_drafts_follows_from_what_is_allowed():
    def kinds(drafting: Drafting | None) -> tuple[type, type]:
        speculator = None if drafting is None else Speculator(drafting)
        drafter = drafter_of(lanes_of((1.0, None)), speculator)
        return type(drafter.reader), type(drafter)

    assert kinds(None) == (Reader, Drafter)
    assert kinds(Drafting(3, "expert", is_adaptive=False)) == (Reader, FixedDrafter)
    assert kinds(Drafting()) == (TimedReader, AdaptiveDrafter)
