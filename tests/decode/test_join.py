"""Rows that join a running batch: what they and the others generate is what each generates alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.backends.toy import ToyBackend
from proxytune.decode.batch import Batch
from proxytune.decode.ensemble import Ensemble, Job, Pair
from proxytune.decode.lanes import Kept
from proxytune.decode.speculative import Drafting, Speculator
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from tests.decode.test_batch import ensemble, table
from tests.support.tiny import tiny_adapter, tiny_model

PAIRS = [(table(2), table(3)), (table(4), table(3)), (table(5), table(6))]


@dataclass
class Arrival:
    """A job, and after how many steps of the running batch it joins."""

    job: Job
    after: int
    leaves_after: int | None = None
    token_ids: list[int] = field(default_factory=list)


def serve(models: Ensemble, arrivals: list[Arrival], speculator: Speculator | None = None) -> None:
    """Run arrivals as a server would, with what ended rows left, and fill in the tokens of each."""
    left: list[Kept] = []
    running: Batch | None = None
    places: dict[int, Arrival] = {}
    waiting = sorted(arrivals, key=lambda arrival: arrival.after)
    for now in range(200):
        due = [arrival for arrival in waiting if arrival.after <= now]
        waiting = waiting[len(due) :]
        if due:
            jobs = [arrival.job for arrival in due]
            kept = left.pop() if left and len(jobs) == 1 else None
            batch = Batch(models, jobs, speculator=speculator, kept=kept, keeps=True)
            for event in batch.step():
                if event.step is not None:
                    due[event.row].token_ids.append(event.step.token_id)
            if running is None:
                running, offset = batch, 0
            else:
                offset = running.join(batch)
            places |= {offset + number: arrival for number, arrival in enumerate(due)}
        if running is not None and not running.is_done:
            for event in running.step():
                if event.step is not None:
                    places[event.row].token_ids.append(event.step.token_id)
        if running is not None:
            left += running.left.values()
            running.left.clear()
        if not waiting and (running is None or running.is_done):
            return
    raise AssertionError("the batch never ended")


def alone(models: Ensemble, job: Job) -> list[int]:
    batch = Batch(models, [job])
    token_ids = []
    while not batch.is_done:
        token_ids += [event.step.token_id for event in batch.step() if event.step is not None]
    return token_ids


def toy_job(
    prompt: list[int], alphas: tuple[float | None, ...], records_views: bool = False, **sampling
) -> Job:
    return Job(SamplingParams(**sampling), (prompt,) * 7, alphas, records_views)


@st.composite
def arrivals(draw) -> list[Arrival]:
    found = []
    for number in range(draw(st.integers(1, 6))):
        alphas = draw(st.tuples(*[st.sampled_from((None, 0.0, 0.5, 1.0))] * 3))
        is_sampled = draw(st.booleans())
        found.append(
            Arrival(
                toy_job(
                    draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)),
                    alphas,
                    records_views=draw(st.booleans()),
                    max_new_tokens=draw(st.integers(1, 12)),
                    temperature=0.8 if is_sampled else 0.0,
                    seed=number if is_sampled else None,
                    presence_penalty=draw(st.sampled_from((0.0, 0.7))),
                ),
                draw(st.integers(0, 12)),
            )
        )
    return found


@settings(max_examples=60, deadline=None)
@given(
    arrivals(),
    st.sampled_from(
        (
            None,
            Drafting(3, "expert", is_adaptive=False),
            Drafting(2, "lookup", is_adaptive=False),
            Drafting(),
        )
    ),
)
def test_rows_that_join_at_any_time_generate_what_each_generates_alone(found, drafting):
    models = ensemble(*PAIRS)
    serve(models, found, None if drafting is None else Speculator(drafting))
    for arrival in found:
        assert arrival.token_ids == alone(ensemble(*PAIRS), arrival.job)


def test_rows_with_different_experts_run_only_their_own():
    models = ensemble(*PAIRS)
    jobs = [
        toy_job(
            [0, 1],
            tuple(1.0 if which == own else None for which in range(3)),
            max_new_tokens=4,
            ignore_eos=True,
        )
        for own in range(3)
    ]
    batch = Batch(models, jobs)
    while not batch.is_done:
        batch.step()
    # Each expert reads one row: its last prompt token, then the tokens before the last one.
    for pair in models.pairs:
        backend = models.members[pair.expert].backend
        assert isinstance(backend, ToyBackend) and backend.num_rows_run == 4
    base = models.members[0].backend
    assert isinstance(base, ToyBackend) and base.num_rows_run == 12


def test_numbers_of_rows_that_joined_go_on_from_those_before():
    models = ensemble(PAIRS[0])
    one, two, three = (
        Batch(models, [toy_job([place], (1.0,), max_new_tokens=9, ignore_eos=True)] * place)
        for place in (1, 2, 3)
    )
    for batch in (one, two, three):
        batch.step()
    assert (one.join(two), one.join(three), one.num_rows) == (1, 3, 6)
    assert sorted(event.row for event in one.step()) == [0, 1, 2, 3, 4, 5]


def test_what_is_known_of_an_ended_row_can_be_forgotten():
    models = ensemble(PAIRS[0])
    batch = Batch(models, [toy_job([1], (1.0,), max_new_tokens=1)])
    batch.step()
    assert list(batch.draft_counts) == [0]
    batch.forget(0)
    assert not batch.draft_counts


def test_a_batch_that_has_ended_can_be_joined():
    models = ensemble(PAIRS[0])
    ended = Batch(models, [toy_job([1], (1.0,), max_new_tokens=1)])
    ended.step()
    job = toy_job([2], (1.0,), max_new_tokens=5, ignore_eos=True)
    joining = Batch(models, [job])
    found = [event.step.token_id for event in joining.step() if event.step]
    offset = ended.join(joining)
    while not ended.is_done:
        events = ended.step()
        assert all(event.row == offset for event in events)
        found += [event.step.token_id for event in events if event.step]
    assert found == alone(models, job)


# Real attention ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=("llama", "gpt2", "qwen2"))
def model(request, folder) -> ProxyTuned:
    """A base with two LoRA experts on one small model and one of full weights beside them."""
    root = folder / request.param
    options = {"hidden_size": 24}
    base = tiny_model(root / "base", request.param, seed=1, **options)
    small = tiny_model(root / "small", request.param, seed=2)
    tuned = tiny_model(root / "tuned", request.param, seed=3)
    one = tiny_adapter(root / "small", root / "one", seed=4)
    two = tiny_adapter(root / "small", root / "two", seed=5)
    anti = ModelSpec(model=str(small))
    specs = {
        "one": ModelSpec(adapter=str(one)),
        "two": ModelSpec(adapter=str(two)),
        "full": ModelSpec(model=str(tuned)),
    }
    experts = tuple(
        ExpertSpec(name=name, expert=expert, anti_expert=anti) for name, expert in specs.items()
    )
    return ProxyTuned.load(Recipe(base=ModelSpec(model=str(base)), experts=experts))


STEERINGS = ({"one": 1.0}, {"two": 0.5}, {"full": 1.0}, {"one": 0.5, "full": 0.7}, {"two": 0.0})
PROMPTS = ("the", "in the end there was", "a", "an otter ran into the rain again", "the otter")


@pytest.mark.parametrize(
    "drafting", (None, Drafting(3, "expert", is_adaptive=False)), ids=("plain", "drafted")
)
@pytest.mark.parametrize("seed", range(4))
def test_a_model_serves_rows_that_come_and_go_like_each_alone(model, seed, drafting):
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    found = []
    for number in range(8):
        sampling = SamplingParams(
            max_new_tokens=1 + draw(12),
            ignore_eos=True,
            temperature=0.9 * draw(2),
            seed=number,
            presence_penalty=0.5 * draw(2),
        )
        request = Request(PROMPTS[draw(5)] * (1 + draw(3)), sampling, experts=STEERINGS[draw(5)])
        found.append(Arrival(model.job(request), draw(10)))
    serve(model.ensemble, found, None if drafting is None else Speculator(drafting))
    num_ties = 0
    for arrival in found:
        expected = alone(model.ensemble, arrival.job)
        num_ties += arrival.token_ids != expected
    # Other batch sizes use other kernels; none of these seeds meets a tie.
    assert num_ties == 0


def test_pairs_that_nobody_asked_for_have_no_lanes(model):
    job = model.job(Request("the", SamplingParams(max_new_tokens=4), experts={"two": 1.0}))
    assert job.alphas == (None, 1.0, None)
    assert isinstance(model.ensemble.pairs[1], Pair)
