"""Drafts change how fast a text comes, never the text; and what is drafted follows from what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.backends.toy import ToyBackend
from proxytune.decode.batch import Batch, Event
from proxytune.decode.ensemble import Ensemble, Job, Member, Pair
from proxytune.decode.speculative import (
    Costs,
    Drafting,
    PromptLookup,
    Rate,
    Speculator,
    best_plan,
    expected_tokens,
    is_time_to_look,
    is_worth_drafting,
)
from proxytune.errors import InvalidRequest
from tests.decode.test_batch import ANTI, BASE, EOS, EXPERT, MEMORY, OTHER, TOKENS, ensemble, job

DRAFTINGS = [
    Drafting(max_tokens, source, is_adaptive=False)
    for source in ("expert", "base", "lookup")
    for max_tokens in (1, 2, 5)
]


def events_of(models: Ensemble, jobs: list[Job], drafting: Drafting | None) -> list[Event]:
    batch = Batch(models, jobs, speculator=Speculator(drafting) if drafting else None)
    events: list[Event] = []
    while not batch.is_done:
        events += batch.step()
    return events


def by_row(events: list[Event], num_rows: int) -> list[list[tuple[Any, ...]]]:
    """What each row saw, logprobs rounded: a draft changes the shapes of forwards, not of a toy's table."""
    rows: list[list[tuple[Any, ...]]] = [[] for _ in range(num_rows)]
    for event in events:
        step = event.step
        assert step is not None
        rows[event.row].append(
            (step.index, step.token_id, step.text, round(step.logprob, 5), event.finish_reason)
        )
    return rows


def lora_ensemble() -> Ensemble:
    """An expert and its anti-expert as two rows of one backend."""
    models = ensemble()
    identity = models.members[0].alignment
    backend = ToyBackend(ANTI, memory=MEMORY, adapters={"tuned": EXPERT})
    members = (
        models.members[0],
        Member("e.expert", backend, identity, "tuned"),
        Member("e.anti_expert", backend, identity),
    )
    return Ensemble(
        members, (Pair("e", 1, 2),), models.vocabulary, models.eos_token_ids, models.tokenizer
    )


SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.4, "top_k": 4, "seed": 2},
    {"temperature": 0.8, "top_p": 0.8, "seed": 3},
    {"temperature": 1.0, "min_p": 0.1, "seed": 4},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "seed": 5},
    {"presence_penalty": 2.0},
    {"min_new_tokens": 6},
    {"stop": ("cd", "ge", "bb")},
    {"temperature": 1.2, "seed": 6, "stop": ("a ", "h")},
    {"temperature": 1.0, "seed": 7, "ignore_eos": True},
]
MODELS = {
    "two backends": lambda: ensemble((EXPERT, ANTI)),
    "rows of one backend": lora_ensemble,
    "two experts": lambda: ensemble((EXPERT, ANTI), (OTHER, ANTI)),
    "an expert that always disagrees": lambda: ensemble((-BASE, ANTI)),
    "an expert that is the base": lambda: ensemble((BASE, BASE)),
}


# The text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda d: f"{d.source}-{d.max_tokens}")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_drafted_text_is_the_plain_one(which, drafting, sampling):
    models = MODELS[which]()
    jobs = [job(models, "a", max_new_tokens=17, **sampling)]
    plain = by_row(events_of(models, jobs, None), 1)
    assert by_row(events_of(MODELS[which](), jobs, drafting), 1) == plain


@settings(deadline=None, max_examples=60)
@given(
    prompts=st.lists(st.text("abcdefgh ", min_size=1, max_size=9), min_size=1, max_size=5),
    which=st.sampled_from(sorted(MODELS)),
    drafting=st.one_of(
        st.sampled_from(DRAFTINGS),
        st.builds(Drafting, max_tokens=st.integers(0, 9), source=st.just("auto")),
    ),
    data=st.data(),
)
def test_rows_with_their_own_accepted_lengths_keep_apart(prompts, which, drafting, data):
    models = MODELS[which]()
    jobs = []
    for prompt in prompts:
        sampling = data.draw(st.sampled_from(SAMPLINGS))
        alphas = tuple(data.draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in models.pairs)
        num = data.draw(st.integers(1, 14))
        if sampling.get("min_new_tokens", 0) > num:
            sampling = {}
        jobs.append(job(models, prompt, alphas, max_new_tokens=num, **sampling))
    alone = [by_row(events_of(MODELS[which](), [one], None), 1)[0] for one in jobs]
    assert by_row(events_of(models, jobs, drafting), len(jobs)) == alone


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda d: f"{d.source}-{d.max_tokens}")
def test_the_end_of_a_text_may_fall_on_any_place_of_a_block(place, drafting):
    """A chain of tokens that every model agrees on, with the end at a chosen place of it."""
    chain = torch.full((len(TOKENS), len(TOKENS)), -9.0)
    for token in range(len(TOKENS)):
        chain[token, token + 1 if token < place else EOS] = 9.0
    models = ensemble((chain, chain), base=chain)
    steps = [e.step for e in events_of(models, [job(models, "a", max_new_tokens=20)], drafting)]
    assert [step.token_id for step in steps if step] == [*range(1, place + 1), EOS]
    assert steps[-1] is not None and steps[-1].finish_reason == "stop"


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda d: f"{d.source}-{d.max_tokens}")
def test_what_models_gave_each_token_is_that_of_plain_decoding(drafting):
    models = ensemble((EXPERT, ANTI))
    jobs = [
        job(models, "ab", max_new_tokens=9, records_views=True, logprobs=3, temperature=1.0, seed=1)
    ]

    def recorded(drafting: Drafting | None) -> list[Any]:
        steps = [event.step for event in events_of(ensemble((EXPERT, ANTI)), jobs, drafting)]
        return [
            (
                {k: pytest.approx(v.logprob, abs=1e-5) for k, v in step.views.items()},
                {k: (v.rank, [i for i, _ in v.top]) for k, v in step.views.items()},
                pytest.approx(step.kl, abs=1e-5),
                [(i, pytest.approx(p, abs=1e-5)) for i, p in step.top],
            )
            for step in steps
            if step and step.views
        ]

    assert len(recorded(drafting)) == 9 and recorded(drafting) == recorded(None)


def test_sampled_drafts_keep_the_steered_distribution():
    """A chi-square test over the pairs of the second and third new token.

    Unlike the tests above it knows nothing of how plain decoding draws: expected counts are the product of
    the formula's softmax. 4,000 texts; pairs expected less than 5 times are put together. The bound is the
    mean plus 6 standard deviations of the statistic, which a chi-square with so many degrees exceeds with
    odds under one in ten million; the seeds are fixed.
    """
    models = ensemble((EXPERT, ANTI))
    start = TOKENS.index("b")
    temperature = 2.5

    def steered(tokens: list[int]) -> torch.Tensor:
        base, expert, anti = (m.backend.prefill([tokens]).logits[0] for m in models.members)
        return ((base + expert - anti) / temperature).softmax(-1).double()

    num, size = 4_000, len(TOKENS)
    expected = torch.zeros(size, size, dtype=torch.float64)
    for first in range(size):
        chance = steered([start])[first]
        for second in range(size):
            expected[second] += (
                num * chance * steered([start, first])[second] * steered([start, first, second])
            )
    counts = torch.zeros(size, size, dtype=torch.float64)
    drafting = Drafting(2, "expert", is_adaptive=False)
    for begin in range(0, num, 250):
        jobs = [
            job(models, "b", temperature=temperature, max_new_tokens=3, ignore_eos=True, seed=seed)
            for seed in range(begin, begin + 250)
        ]
        texts: list[list[int]] = [[] for _ in jobs]
        for event in events_of(models, jobs, drafting):
            assert event.step is not None
            texts[event.row].append(event.step.token_id)
        for _, second, third in texts:
            counts[second, third] += 1
    frequent = expected >= 5
    seen = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
    wanted = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    degrees = len(seen) - 1
    assert degrees > 30
    assert statistic < degrees + 6 * math.sqrt(2 * degrees)


# How much is run ------------------------------------------------------------------------------------


def counted(models: Ensemble, drafting: Drafting | None, num_tokens: int = 13) -> list[int]:
    """Return how many tokens each member's backend read, the prompt included."""
    events_of(models, [job(models, "a", max_new_tokens=num_tokens, ignore_eos=True)], drafting)
    return [member.backend.num_rows_run for member in models.members]  # type: ignore[attr-defined]


class Counting(ToyBackend):
    """Counts forwards."""

    num_forwards = 0

    def extend(self, state, token_ids):
        self.num_forwards += 1
        return super().extend(state, token_ids)


def test_where_all_guesses_are_right_the_base_reads_a_block_in_one_forward():
    models = ensemble((EXPERT, EXPERT), base=EXPERT)
    members = [Member(m.name, Counting(EXPERT, memory=MEMORY), m.alignment) for m in models.members]
    models = Ensemble(
        tuple(members), models.pairs, models.vocabulary, models.eos_token_ids, models.tokenizer
    )
    # The prompt gives one token, then three blocks of four.
    drafting = Drafting(3, "expert", is_adaptive=False)
    events_of(models, [job(models, "a", max_new_tokens=13, ignore_eos=True)], drafting)
    assert [m.backend.num_forwards for m in members] == [3, 12, 3]


def test_the_drafting_model_reads_no_token_twice():
    # Twelve tokens after the prompt's own, all guessed right: the expert reads each of them once.
    models = ensemble((EXPERT, EXPERT), base=EXPERT)
    assert counted(models, Drafting(3, "expert", is_adaptive=False))[1] == 1 + 12


def test_a_wrong_guess_costs_no_further_forward_of_the_drafting_model():
    wrong = -BASE
    models = ensemble((wrong, wrong))
    # One guess a block: the expert reads the pending token and never its wrong guess.
    assert counted(models, Drafting(1, "expert", is_adaptive=False), 5)[1] == 1 + 4


def test_acceptance_is_counted_by_row():
    models = ensemble((EXPERT, EXPERT), base=EXPERT)
    jobs = [job(models, "a", max_new_tokens=n, ignore_eos=True) for n in (13, 2)]
    batch = Batch(models, jobs, speculator=Speculator(Drafting(3, "expert", is_adaptive=False)))
    while not batch.is_done:
        batch.step()
    assert batch.draft_counts == {0: (9, 9), 1: (1, 1)}


def test_a_backend_that_cannot_forget_decodes_plainly():
    class Forgetful(ToyBackend):
        @property
        def capabilities(self):
            from dataclasses import replace

            return replace(super().capabilities, can_rewind=False)

        def rewind(self, state, num_tokens):
            raise AssertionError("asked to forget")

    models = ensemble((EXPERT, ANTI))
    base = Member("base", Forgetful(BASE, memory=MEMORY), models.members[0].alignment)
    stuck = Ensemble(
        (base, *models.members[1:]),
        models.pairs,
        models.vocabulary,
        models.eos_token_ids,
        models.tokenizer,
    )
    jobs = [job(models, "a", max_new_tokens=9)]
    plain = by_row(events_of(models, jobs, None), 1)
    assert by_row(events_of(stuck, jobs, Drafting(3, "expert", is_adaptive=False)), 1) == plain


def test_a_draft_never_leaves_the_context():
    models = ensemble((EXPERT, EXPERT), base=EXPERT, max_context=10)
    jobs = [job(models, "abcd", max_new_tokens=6, ignore_eos=True)]
    steps = events_of(models, jobs, Drafting(8, "expert", is_adaptive=False))
    assert len(steps) == 6


# Going on from what was read ------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["two backends", "rows of one backend"])
@pytest.mark.parametrize("drafting", [None, Drafting(3, "expert", is_adaptive=False)])
@pytest.mark.parametrize("second", ["a b", "abcde", "ab", "h"])
def test_a_prompt_that_begins_with_an_earlier_text_goes_on_as_if_read_anew(which, drafting, second):
    models = MODELS[which]()
    speculator = Speculator(drafting) if drafting else None
    first = Batch(models, [job(models, "ab", max_new_tokens=5)], speculator=speculator)
    text = []
    while not first.is_done:
        text += [e.step.text for e in first.step() if e.step]
    prompt = "ab" + "".join(text) + second if second != "h" else "h"
    expected = by_row(events_of(MODELS[which](), [job(models, prompt, max_new_tokens=8)], None), 1)
    kept = first.kept()
    assert kept is not None
    before = models.members[0].backend.num_rows_run  # type: ignore[attr-defined]
    again = Batch(models, [job(models, prompt, max_new_tokens=8)], speculator=speculator, kept=kept)
    read = models.members[0].backend.num_rows_run - before  # type: ignore[attr-defined]
    assert read <= len(second) + 1, "the prompt's beginning was read again"
    events: list[Event] = []
    while not again.is_done:
        events += again.step()
    assert by_row(events, 1) == expected


# What pays ------------------------------------------------------------------------------------------


def test_a_block_yields_one_token_more_than_what_is_accepted_of_it():
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.5, 2) == 1.75


def linear(base: float, small: float, widening: float):
    """Costs of a block: base and a pair in one forward each, growing with the width."""

    def seconds(source, length, whole):
        wide = 1 + widening * length
        if source == "expert":
            return base * wide + small * (length + whole)
        if source == "base":
            return base * (length + whole) + small * wide
        return (base + small) * wide

    return seconds


def test_a_cheap_expert_that_is_often_right_drafts_far():
    plan = best_plan({"expert": [0.9], "base": [0.9]}, linear(1.0, 0.05, 0.01), 8)
    assert plan is not None and plan.source == "expert" and plan.length >= 5
    assert plan.seconds_per_token < 0.4


def test_nothing_is_drafted_where_guesses_are_wrong():
    plan = best_plan({"expert": [0.05], "base": [0.05]}, linear(1.0, 0.5, 0.2), 8)
    assert plan is not None and plan.source is None
    assert plan.seconds_per_token == pytest.approx(1.5)


def test_the_base_drafts_where_the_small_models_are_not_small():
    plan = best_plan({"expert": [0.3], "base": [0.9]}, linear(1.0, 1.0, 0.05), 8)
    assert plan is not None and plan.source == "base"


def test_without_measured_costs_there_is_no_plan():
    assert best_plan({"expert": [0.9]}, lambda *_: None, 8) is None


def test_a_token_is_worth_drafting_while_what_it_saves_exceeds_what_it_costs():
    one = {"seconds_per_token": 1.0, "draft_seconds": 0.3, "widening_seconds": 0.1}
    assert is_worth_drafting([0.7], **one)
    assert not is_worth_drafting([0.5], **one)  # saves 0.5 and costs 0.4: too close
    assert is_worth_drafting([0.5, 0.5], **one)  # two rows save twice


def test_drafts_that_do_not_pay_are_looked_for_less_often_the_more_rows_there_are():
    def looks(num_rows: int) -> list[int]:
        return [count for count in range(30) if is_time_to_look(count, num_rows)]

    assert looks(1) == list(range(30))
    assert looks(4) == [0, 1, 2, 3, 4, 8, 12, 16, 20, 24, 28]
    assert looks(100) == [0, 1, 2, 3, 8, 16, 24]


def observed(*forwards: tuple[int, int, float]) -> Costs:
    costs = Costs()
    for lanes, width, seconds in forwards:
        for _ in range(2):
            costs.observe("model", lanes, width, seconds)
    return costs


def test_costs_between_measured_widths_are_interpolated_and_above_them_continued():
    costs = observed((1, 1, 1.0), (1, 5, 3.0))
    assert costs.estimate("model", 1, 3) == pytest.approx(2.0)
    assert costs.estimate("model", 1, 7) == pytest.approx(3.0 * 27 / 25)
    assert costs.estimate("other", 1, 1) is None


def test_one_slow_forward_does_not_bar_a_width():
    costs = Costs()
    for _ in range(3):
        costs.observe("model", 1, 1, 1.0)
    costs.observe("model", 1, 4, 50.0)
    estimate = costs.estimate("model", 1, 4)
    assert estimate is not None and estimate < 1.5


def test_what_a_width_costs_is_known_from_other_numbers_of_rows():
    """A row that ends must not make the engine find out by trial what 31 rows cost that 32 have shown."""
    costs = observed((32, 1, 100.0), (32, 2, 160.0))
    assert costs.estimate("model", 28, 2) == pytest.approx(145.0)
    assert costs.estimate("model", 28, 1) == pytest.approx(100 * 48 / 52)
    costs.observe("model", 28, 1, 90.0)
    costs.observe("model", 28, 1, 90.0)
    assert costs.estimate("model", 28, 2) == pytest.approx(145.0)


def test_before_widths_were_measured_many_rows_do_not_look_cheap_on_a_cpu():
    costs = observed((32, 1, 100.0))
    assert costs.estimate("model", 32, 2) == pytest.approx(100 * 84 / 52)
    assert costs.estimate("model", 32, 2, free_tokens=300) == pytest.approx(100 * 364 / 332)
    few = observed((1, 1, 100.0))
    assert few.estimate("model", 1, 2) == pytest.approx(100 * 22 / 21)


def test_tokens_that_others_have_read_say_what_a_forward_costs():
    costs = observed((1, 1, 25.0), (1, 8, 50.0), (16, 1, 70.0))
    assert costs.estimate("model", 1, 12) == pytest.approx(60.0)
    assert costs.estimate("model", 4, 2) == pytest.approx(50.0)


def test_a_step_at_the_last_measured_size_does_not_bar_larger_ones():
    """Nine rows take another kernel than eight, and eight rows of two tokens hardly more than nine."""
    costs = observed((1, 1, 25.0), (1, 4, 35.0), (8, 1, 50.0), (1, 9, 65.0))
    estimate = costs.estimate("model", 8, 2)
    assert estimate is not None and estimate < 85


def test_own_measurements_count_more_than_those_of_others():
    costs = observed((8, 1, 50.0), (8, 2, 100.0), (4, 1, 30.0), (4, 2, 31.0), (1, 1, 20.0))
    assert costs.estimate("model", 4, 2) == 31.0
    assert costs.estimate("model", 8, 2) == 100.0


def test_a_rate_follows_what_happens():
    rate = Rate(0.6)
    for _ in range(40):
        rate.observe(is_right=False)
    assert rate.value < 0.1
    for _ in range(40):
        rate.observe(is_right=True)
    assert rate.value > 0.9


def test_lookup_guesses_what_followed_the_same_tokens_before():
    lookup = PromptLookup([1, 2, 3, 4, 9, 1, 2, 3])
    assert lookup.propose(2) == [4, 9]
    lookup.push(7)
    assert lookup.propose(2) == []


def test_lookup_goes_round_where_a_text_repeats_itself():
    assert PromptLookup([5, 6, 7, 5, 6, 7]).propose(7) == [5, 6, 7, 5, 6, 7, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": -1}, "0 to 64"),
        ({"max_tokens": 2.5}, "whole number"),
        ({"source": "anti-expert"}, "expert, base, lookup"),
        ({"is_adaptive": False}, "need a source"),
    ],
)
def test_contradictory_settings_are_refused(arguments, message):
    with pytest.raises(InvalidRequest, match=message):
        Drafting(**arguments)
