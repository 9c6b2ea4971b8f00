"""The loop on toy models, whose every logit can be worked out from a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.backends.toy import ToyBackend, ToyTokenizer
from proxytune.decode.batch import Batch, Event
from proxytune.decode.ensemble import Ensemble, Job, Member, Pair
from proxytune.errors import BackendError, InvalidRequest, PromptTooLong
from proxytune.request import SamplingParams
from proxytune.text.vocab import Vocabulary, align
from proxytune.trace import Step

TOKENS = [*"abcdefgh ", "<eos>"]
EOS = TOKENS.index("<eos>")
SIZE = len(TOKENS)
MEMORY = 0.7


def table(seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) * 2


BASE, EXPERT, ANTI, OTHER = (table(seed) for seed in range(4))


def ensemble(
    *pairs: tuple[torch.Tensor, torch.Tensor],
    base: torch.Tensor = BASE,
    eos: tuple[int, ...] = (EOS,),
    max_context: int | None = None,
) -> Ensemble:
    """An ensemble of tables, each a backend of its own."""
    vocabulary = Vocabulary("base", {t: i for i, t in enumerate(TOKENS)}, SIZE)
    identity = align(vocabulary, vocabulary)
    members = [Member("base", ToyBackend(base, memory=MEMORY), identity)]
    built = []
    for number, (expert, anti_expert) in enumerate(pairs):
        for side, logits in (("expert", expert), ("anti_expert", anti_expert)):
            backend = ToyBackend(logits, memory=MEMORY, max_context=max_context)
            members.append(Member(f"e{number}.{side}", backend, identity))
        built.append(Pair(f"e{number}", len(members) - 2, len(members) - 1))
    tokenizer = ToyTokenizer(TOKENS, eos_token="<eos>")
    return Ensemble(tuple(members), tuple(built), vocabulary, eos, tokenizer)


def job(
    models: Ensemble, prompt: str = "a", alphas: tuple[float, ...] | None = None, **options
) -> Job:
    extras = {k: options.pop(k) for k in ("records_views", "num_top", "cancelled") if k in options}
    ids = models.tokenizer.encode(prompt)
    prompts = tuple(ids for _ in models.members)
    given_alphas = (1.0,) * len(models.pairs) if alphas is None else alphas
    return Job(SamplingParams(**options), prompts, given_alphas, **extras)


def decode(models: Ensemble, jobs: list[Job]) -> Iterator[Event]:
    batch = Batch(models, jobs)
    while not batch.is_done:
        yield from batch.step()


def run(models: Ensemble, *jobs: Job) -> list[list[Step]]:
    steps: list[list[Step]] = [[] for _ in jobs]
    for event in decode(models, list(jobs)):
        if event.step is not None:
            steps[event.row].append(event.step)
    return steps


def tokens(models: Ensemble, *jobs: Job) -> list[list[int]]:
    return [[step.token_id for step in row] for row in run(models, *jobs)]


def by_hand(prompt: str, num_new: int, mix) -> list[int]:
    """Decode greedily from the definition, no caches, no batches; `mix` makes logits of a table's logits."""
    ids = [TOKENS.index(c) for c in prompt]

    def logits(matrix: torch.Tensor) -> torch.Tensor:
        return matrix[ids[-1]] + MEMORY * matrix[ids].mean(0)

    new: list[int] = []
    while len(new) < num_new and EOS not in new:
        new.append(int(mix(logits).argmax()))
        ids.append(new[-1])
    return new


def test_greedy_decoding_is_the_formula_applied_token_by_token():
    models = ensemble((EXPERT, ANTI))
    expected = by_hand("abc", 20, lambda f: f(BASE) + 0.6 * (f(EXPERT) - f(ANTI)))
    assert tokens(models, job(models, "abc", (0.6,), max_new_tokens=20)) == [expected]


def test_alpha_zero_is_the_base():
    models = ensemble((EXPERT, ANTI))
    expected = by_hand("ab", 30, lambda f: f(BASE))
    assert tokens(models, job(models, "ab", (0.0,), max_new_tokens=30)) == [expected]


def test_an_expert_equal_to_its_anti_expert_is_the_base():
    models = ensemble((EXPERT, EXPERT))
    expected = by_hand("ab", 30, lambda f: f(BASE))
    assert tokens(models, job(models, "ab", (1.7,), max_new_tokens=30)) == [expected]


def test_a_base_equal_to_the_anti_expert_is_the_expert_at_alpha_one():
    models = ensemble((EXPERT, BASE))
    expected = by_hand("ab", 30, lambda f: f(EXPERT))
    assert tokens(models, job(models, "ab", (1.0,), max_new_tokens=30)) == [expected]


def test_two_experts_add_up():
    models = ensemble((EXPERT, ANTI), (OTHER, ANTI))
    expected = by_hand(
        "ab", 20, lambda f: f(BASE) + 0.5 * (f(EXPERT) - f(ANTI)) - 0.3 * (f(OTHER) - f(ANTI))
    )
    assert tokens(models, job(models, "ab", (0.5, -0.3), max_new_tokens=20)) == [expected]


def test_the_base_itself_may_be_the_anti_expert():
    apart = ensemble((EXPERT, BASE))
    shared = replace(apart, pairs=(Pair("e0", expert=1, anti_expert=0),))
    wanted = tokens(apart, job(apart, "ab", (0.4,), max_new_tokens=20))
    assert tokens(shared, job(shared, "ab", (0.4,), max_new_tokens=20)) == wanted


settings_of_a_row = st.fixed_dictionaries(
    {
        "prompt": st.text("abcdefgh ", min_size=1, max_size=6),
        "alphas": st.tuples(st.sampled_from([0.0, 0.3, 1.0, -0.5])),
        "max_new_tokens": st.integers(1, 12),
    },
    optional={
        "temperature": st.sampled_from([0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "stop": st.sampled_from([(), ("ab",), ("c", "dd")]),
        "seed": st.integers(0, 100),
        "ignore_eos": st.booleans(),
    },
)


@settings(max_examples=60)
@given(st.lists(settings_of_a_row, min_size=1, max_size=5))
def test_a_batch_gives_what_its_rows_give_alone(rows):
    models = ensemble((EXPERT, ANTI))
    jobs = [job(models, **{"seed": 1, **row}) for row in rows]
    together = run(models, *jobs)
    alone = [run(models, one)[0] for one in jobs]
    for left, right in zip(together, alone, strict=True):
        assert [(s.token_id, s.text, s.finish_reason) for s in left] == [
            (s.token_id, s.text, s.finish_reason) for s in right
        ]
        # Sums over a batch and over a row may round differently in the last of 24 bits.
        assert [s.logprob for s in left] == pytest.approx([s.logprob for s in right], abs=1e-5)


def test_two_adapters_on_one_small_model_are_rows_of_one_forward():
    apart = ensemble((EXPERT, ANTI))
    identity = apart.members[0].alignment
    adapters = {"up": EXPERT - OTHER, "down": ANTI - OTHER}
    small = ToyBackend(OTHER, memory=MEMORY, adapters=adapters)
    members = (
        apart.members[0],
        Member("expert", small, identity, "up"),
        Member("anti_expert", small, identity, "down"),
    )
    together = replace(apart, members=members)
    jobs = [("ab", (0.8,)), ("c", (0.2,)), ("dad", (1.0,))]
    expected = tokens(apart, *[job(apart, p, a, max_new_tokens=9) for p, a in jobs])
    assert tokens(together, *[job(together, p, a, max_new_tokens=9) for p, a in jobs]) == expected


def test_small_models_may_see_another_prompt_than_the_base():
    models = ensemble((EXPERT, ANTI))
    own = Job(SamplingParams(max_new_tokens=1), ([0], [3, 4, 5], [1]), (1.0,))

    def logits(matrix: torch.Tensor, ids: list[int]) -> torch.Tensor:
        return matrix[ids[-1]] + MEMORY * matrix[ids].mean(0)

    steered = logits(BASE, [0]) + logits(EXPERT, [3, 4, 5]) - logits(ANTI, [1])
    assert tokens(models, own) == [[int(steered.argmax())]]


def test_a_pair_at_strength_zero_is_not_run():
    models = ensemble((EXPERT, ANTI), (OTHER, ANTI))
    run(models, job(models, "ab", (0.0, 0.5), max_new_tokens=4))
    counts = [member.backend.num_rows_run for member in models.members]
    assert counts[1:3] == [0, 0]
    assert counts[0] == counts[3] == counts[4] > 0


def test_no_model_runs_after_the_last_token():
    models = ensemble((EXPERT, ANTI))
    steps = run(models, job(models, "ab", max_new_tokens=3, ignore_eos=True))[0]
    # The prompt once, then each new token but the last.
    assert len(steps) == 3
    assert models.members[0].backend.num_rows_run == 3


def favour(*path: str) -> torch.Tensor:
    """A table that walks along the path whatever happens."""
    matrix = torch.zeros(SIZE, SIZE)
    for here, there in pairwise(path):
        matrix[TOKENS.index(here), TOKENS.index(there)] = 20.0
    return matrix


def walk(*path: str, eos: tuple[int, ...] = (EOS,), **options) -> tuple[str, str | None, int]:
    """Return text, finish reason and number of tokens of the walk along a path."""
    models = replace(ensemble(base=favour(*path), eos=eos))
    models = replace(
        models, members=(replace(models.members[0], backend=ToyBackend(favour(*path))),)
    )
    steps = run(models, job(models, path[0], (), **options))[0]
    return "".join(s.text for s in steps), steps[-1].finish_reason, len(steps)


def test_an_end_of_sequence_token_ends_the_text_and_is_not_in_it():
    assert walk("a", "b", "c", "<eos>") == ("bc", "stop", 3)


def test_any_of_several_end_of_sequence_tokens_ends_the_text():
    assert walk("a", "b", "c", "d", "<eos>", eos=(EOS, TOKENS.index("c"))) == ("b", "stop", 2)


def test_a_stop_token_id_ends_the_text_and_is_not_in_it():
    assert walk("a", "b", "c", "d", stop_token_ids=(TOKENS.index("d"),)) == ("bc", "stop", 3)


def test_ignoring_the_end_goes_on_to_the_limit():
    text, reason, num = walk("a", "b", "<eos>", "c", "d", ignore_eos=True, max_new_tokens=4)
    assert (text, reason, num) == ("bcd", "length", 4)


def test_a_stop_string_across_token_borders_cuts_the_text_before_it():
    assert walk("a", "b", "c", "d", "e", stop=("cd",)) == ("b", "stop", 3)


def test_text_that_only_began_like_a_stop_string_is_given_out_after_all():
    assert walk("a", "b", "c", "d", "<eos>", stop=("cx",)) == ("bcd", "stop", 4)


def test_nothing_ends_the_text_before_the_minimum():
    text, reason, num = walk("a", "<eos>", min_new_tokens=3, max_new_tokens=5)
    assert num >= 3
    assert "<eos>" not in text
    assert walk("a", "b", "c", "d", "<eos>", stop=("c",), min_new_tokens=3)[0] == "bcd"
    assert reason in ("stop", "length")


def test_the_token_limit_ends_the_text():
    assert walk("a", "b", "c", "d", "e", max_new_tokens=2) == ("bc", "length", 2)


def test_a_cancelled_row_ends_and_its_neighbour_goes_on():
    models = ensemble((EXPERT, ANTI))
    asked = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 2

    first = job(models, "ab", max_new_tokens=8, ignore_eos=True, cancelled=cancelled)
    second = job(models, "ab", max_new_tokens=8, ignore_eos=True)
    events = list(decode(models, [first, second]))
    reasons = {e.row: e.finish_reason for e in events if e.finish_reason}
    assert reasons == {0: "cancelled", 1: "length"}
    assert sum(e.step is not None and e.row == 0 for e in events) == 2
    assert [e.step.token_id for e in events if e.row == 1] == tokens(models, second)[0]


def test_logprobs_list_the_most_likely_tokens_of_the_steered_distribution():
    models = ensemble((EXPERT, ANTI))
    step = run(models, job(models, "a", (0.5,), max_new_tokens=1, logprobs=3))[0][0]
    steered = (BASE + 0.5 * (EXPERT - ANTI))[0] * (1 + MEMORY)
    expected = steered.log_softmax(0).topk(3)
    assert [i for i, _ in step.top] == expected.indices.tolist()
    assert [p for _, p in step.top] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert step.logprob == pytest.approx(step.top[0][1], abs=1e-5)


def test_explained_steps_hold_what_each_model_gave_the_token():
    models = ensemble((EXPERT, ANTI))
    step = run(models, job(models, "a", (0.0,), max_new_tokens=1, records_views=True))[0][0]
    for name, matrix in (("base", BASE), ("e0.expert", EXPERT), ("e0.anti_expert", ANTI)):
        logprobs = (matrix[0] * (1 + MEMORY)).log_softmax(0)
        seen = step.views[name]
        assert seen.logprob == pytest.approx(float(logprobs[step.token_id]), abs=1e-5)
        assert seen.rank == 1 + int((logprobs > logprobs[step.token_id]).sum())
        assert seen.entropy == pytest.approx(-float((logprobs.exp() * logprobs).sum()), abs=1e-5)
        assert [i for i, _ in seen.top] == logprobs.topk(5).indices.tolist()[: len(logprobs)]


def test_explained_steps_tell_how_far_the_steered_distribution_is_from_the_base():
    models = ensemble((EXPERT, ANTI))
    step = run(models, job(models, "a", (0.5,), max_new_tokens=1, records_views=True, num_top=2))[
        0
    ][0]
    p = ((BASE + 0.5 * (EXPERT - ANTI))[0] * (1 + MEMORY)).softmax(0)
    q = (BASE[0] * (1 + MEMORY)).softmax(0)
    assert step.kl == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-5)
    assert step.views["steered"].logprob == pytest.approx(step.logprob, abs=1e-5)
    assert len(step.views["base"].top) == 2


def test_padding_ids_are_never_sampled():
    """The head is two rows wider than the tokens, and the model likes those rows best."""
    models = ensemble()
    wide = torch.zeros(SIZE + 2, SIZE + 2)
    wide[:, SIZE:] = 50.0
    vocabulary = Vocabulary("base", {t: i for i, t in enumerate(TOKENS)}, SIZE + 2)
    member = Member("base", ToyBackend(wide), align(vocabulary, vocabulary))
    padded = replace(models, members=(member,), vocabulary=vocabulary)
    jobs = [
        job(padded, "a", max_new_tokens=20, ignore_eos=True),
        job(padded, "a", max_new_tokens=20, ignore_eos=True, temperature=5.0, seed=0),
    ]
    steps = run(padded, *jobs)
    assert all(step.token_id < SIZE for row in steps for step in row)
    assert steps[0][0].logprob == pytest.approx(math.log(1 / SIZE), abs=1e-5)


def test_small_models_with_a_permuted_vocabulary_steer_the_same():
    plain = ensemble((EXPERT, ANTI))
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(9))
    place = order.argsort()  # base id -> small id
    small = Vocabulary("small", {t: int(place[i]) for i, t in enumerate(TOKENS)}, SIZE)
    alignment = align(plain.vocabulary, small)
    members = [plain.members[0]]
    for name, matrix in (("expert", EXPERT), ("anti_expert", ANTI)):
        backend = ToyBackend(matrix[order][:, order], memory=MEMORY)
        members.append(Member(name, backend, alignment))
    permuted = replace(plain, members=tuple(members))
    ids = plain.tokenizer.encode("abc")
    small_ids = alignment.ids_to_small(torch.tensor(ids)).tolist()
    sampling = SamplingParams(max_new_tokens=15)
    got = tokens(permuted, Job(sampling, (ids, small_ids, small_ids), (0.7,)))
    assert got == tokens(plain, job(plain, "abc", (0.7,), max_new_tokens=15))


def test_a_prompt_longer_than_a_models_context_names_the_model_and_both_lengths():
    models = ensemble((EXPERT, ANTI), max_context=4)
    with pytest.raises(PromptTooLong, match=r"5 tokens.*e0\.expert.*context of 4"):
        Batch(models, [job(models, "abcde", max_new_tokens=1)])
    with pytest.raises(PromptTooLong, match="at most 2 new tokens"):
        Batch(models, [job(models, "ab", max_new_tokens=3)])
    assert len(run(models, job(models, "ab", max_new_tokens=2, ignore_eos=True))[0]) == 2


def test_a_token_id_outside_the_vocabulary_is_refused():
    models = ensemble()
    with pytest.raises(InvalidRequest, match="token id 99"):
        Batch(models, [Job(SamplingParams(), ([99],), ())])
    with pytest.raises(InvalidRequest, match="stop_token_ids holds 99"):
        Batch(models, [job(models, "a", stop_token_ids=(99,))])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_end_the_work_with_a_hint(temperature):
    models = ensemble(base=torch.full((SIZE, SIZE), math.nan))
    with pytest.raises(BackendError, match="NaN"):
        run(models, job(models, "a", temperature=temperature))


def test_equal_seeds_repeat_and_other_seeds_differ():
    models = ensemble((EXPERT, ANTI))

    def sampled(seed: int | None) -> list[int]:
        options = {"temperature": 1.5, "max_new_tokens": 20, "ignore_eos": True, "seed": seed}
        return tokens(models, job(models, "a", **options))[0]

    assert sampled(4) == sampled(4)
    # Two texts in three are one token over and over: all 40 would be with odds of one in ten million.
    assert len({tuple(sampled(seed)) for seed in range(40)}) > 1


def test_the_seed_that_was_drawn_is_reported():
    models = ensemble((EXPERT, ANTI))
    batch = Batch(models, [job(models, "a", temperature=1.0), job(models, "a")])
    assert isinstance(batch.seeds[0], int)
    assert batch.seeds[1] is None


def test_every_model_gets_its_tokens_before_one_runs_and_the_cpu_runs_last():
    """Moving tokens from a device waits for the forward that runs there, and a forward on the CPU blocks."""

    class Device(str):  # the CPU to torch, and something else to the loop
        type = "cuda"

    happened: list[str] = []

    class Noted(ToyBackend):
        where: object = torch.device("cpu")

        @property
        def device(self):
            happened.append("asked") if not happened or happened[-1] != "asked" else None
            return self.where

        def extend(self, state, token_ids):
            happened.append(self.name)
            return super().extend(state, token_ids)

    expected = tokens(ensemble((EXPERT, ANTI)), job(ensemble((EXPERT, ANTI)), max_new_tokens=2))
    models = ensemble((EXPERT, ANTI))
    for member, name in zip(models.members, ("base", "expert", "anti"), strict=True):
        member.backend.__class__ = Noted
        member.backend.name = name
        if name != "base":
            member.backend.where = Device("cpu")
    assert tokens(models, job(models, max_new_tokens=2)) == expected
    assert happened == ["asked", "expert", "anti", "base"]
