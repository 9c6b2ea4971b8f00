"""Small models of another tokenizer: against texts cut anew from nothing, and with real tokenizers."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxytune.backends.base import Backend, Capabilities
from proxytune.backends.retokenised import UNMAPPED, RetokenisedBackend, token_map
from proxytune.backends.toy import ToyBackend, ToyTokenizer
from proxytune.decode.batch import Batch
from proxytune.decode.ensemble import Ensemble, Member, Pair
from proxytune.decode.speculative import Drafting
from proxytune.errors import PromptTooLong, RecipeError, UnsupportedModel, VocabularyMismatch
from proxytune.loading.doctor import examine
from proxytune.logits.steer import steer
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.testing import EOS, TOKENS, toy_recipe
from proxytune.text.prompts import PromptFormat
from proxytune.text.vocab import Vocabulary, align, map_tokens
from tests.support.tiny import MERGES, tiny_adapter, tiny_model, tiny_tokenizer

# Both read all letters. Each has tokens that the other has not, and "an" is a token of both.
BASE_TOKENS = (*TOKENS, "an", "xy", "er ", "ab")
SMALL_TOKENS = (*reversed(TOKENS), "an", "the", "and", "bc", "abc", "xyz", "r a")
NUM_BASE, NUM_SMALL = len(BASE_TOKENS), len(SMALL_TOKENS)


def table(seed: int, size: int) -> Tensor:
    return 2 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def speech(tokens: tuple[str, ...]) -> SimpleNamespace:
    tokenizer = ToyTokenizer(tokens, eos_token=EOS)
    return SimpleNamespace(
        tokenizer=tokenizer,
        vocabulary=Vocabulary.from_tokenizer(tokenizer, name="toy", width=len(tokens)),
        eos_token_ids=(tokenizer.eos_token_id,),
    )


BASE, SMALL = speech(BASE_TOKENS), speech(SMALL_TOKENS)


def small_backend(seed: int = 1, **settings: object) -> RetokenisedBackend:
    adapters = {"tuned": 0.7 * table(seed + 50, NUM_SMALL)}
    inner = ToyBackend(table(seed, NUM_SMALL), memory=0.5, adapters=adapters, **settings)
    return RetokenisedBackend(inner, SMALL, BASE)


def mapped_model(*, max_context: int | None = None) -> ProxyTuned:
    """Return a toy steered by an expert of another tokenizer, which is an adapter on the anti-expert."""
    alignment = align(BASE.vocabulary, BASE.vocabulary)
    base = ToyBackend(table(0, NUM_BASE), name="base", memory=0.5)
    small = small_backend(max_context=max_context)
    members = (
        Member("base", base, alignment),
        Member("expert", small, alignment, "tuned"),
        Member("anti-expert", small, alignment),
    )
    ensemble = Ensemble(
        members, (Pair("first", 1, 2),), BASE.vocabulary, BASE.eos_token_ids, BASE.tokenizer
    )
    formats = [PromptFormat("plain", "plain", None, s.tokenizer) for s in (BASE, SMALL, SMALL)]
    return ProxyTuned(ensemble, formats, toy_recipe({"first": 1.0}))


def from_nothing(prompt: str, token_ids: list[int], adapter: str | None) -> Tensor:
    """Return what the small model says of the next of the base's tokens, its whole text read anew."""
    inner = small_backend().inner
    text = "".join(BASE_TOKENS[i] for i in token_ids)
    own = [*SMALL.tokenizer.encode(prompt), *(SMALL.tokenizer.encode(text) if text else [])]
    logprobs = inner.prefill([own], adapters=[adapter]).logits[0].log_softmax(-1)
    answers = torch.full((NUM_BASE,), UNMAPPED)
    for index, token in enumerate(BASE_TOKENS):
        if token in SMALL_TOKENS:
            answers[index] = logprobs[SMALL_TOKENS.index(token)]
    return answers


def greedy_from_nothing(prompt: str, num_new: int, alpha: float) -> list[int]:
    base = ToyBackend(table(0, NUM_BASE), memory=0.5)
    found: list[int] = []
    for _ in range(num_new):
        logits = base.prefill([[*BASE.tokenizer.encode(prompt), *found]]).logits
        sides = [from_nothing(prompt, found, adapter)[None] for adapter in ("tuned", None)]
        steered = steer(logits, expert_logits=sides[0], anti_expert_logits=sides[1], alpha=alpha)
        found.append(int(steered.argmax()))
    return found


PROMPTS = ("the cat and ", "abcabc", "xyz", "a")
LONG = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
def test_a_batch_gives_what_texts_cut_anew_from_nothing_give(alpha):
    traces = mapped_model().generate_batch([Request(p, LONG, alpha) for p in PROMPTS])
    compared = 0
    for prompt, trace in zip(PROMPTS, traces, strict=True):
        # The end of a text is left out of what is cut, so it is left out here.
        ids = [step.token_id for step in trace.steps]
        expected = greedy_from_nothing(prompt, 40, alpha)
        until = expected.index(BASE.eos_token_ids[0]) if BASE.eos_token_ids[0] in expected else 40
        assert ids[:until] == expected[:until]
        compared += until
    assert compared > 40


@pytest.mark.parametrize("source", ["expert", "base", "lookup", "auto"])
def test_drafts_change_nothing(source):
    model = mapped_model()
    requests = [Request(p, LONG, 1.0) for p in PROMPTS]
    drafting = Drafting() if source == "auto" else Drafting(source=source, is_adaptive=False)
    plain = model.generate_batch(requests)
    drafted = model.generate_batch(requests, speculative=drafting)
    assert [t.text for t in drafted] == [t.text for t in plain]
    assert source == "auto" or sum(t.num_drafted for t in drafted) > 0


def test_rows_that_join_and_leave_are_what_they_are_alone():
    model = mapped_model()
    alone = [model.generate(p, LONG).text for p in PROMPTS]
    batch = Batch(model.ensemble, [model.job(Request(PROMPTS[0], LONG))])
    texts, found = {0: ""}, {0: PROMPTS[0]}
    for prompt in PROMPTS[1:]:
        for _ in range(3):
            for event in batch.step():
                texts[event.row] += event.step.text if event.step else event.tail
        other = Batch(model.ensemble, [model.job(Request(prompt, LONG))])
        first = other.step()
        index = batch.join(other)
        found[index] = prompt
        texts[index] = "".join(event.step.text for event in first if event.step)
    while not batch.is_done:
        for event in batch.step():
            texts[event.row] += event.step.text if event.step else event.tail
    assert {found[row]: text for row, text in texts.items()} == dict(
        zip(PROMPTS, alone, strict=True)
    )


@given(
    rows=st.lists(
        st.lists(st.integers(0, NUM_BASE - 1), min_size=4, max_size=12), min_size=1, max_size=3
    ),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_pieces_and_any_way_back_give_the_same(rows, data):
    backend = small_backend(max_context=64)
    width = min(map(len, rows))
    rows = [row[:width] for row in rows]
    adapters = ["tuned" if index % 2 else None for index in range(len(rows))]
    prompt = "the "
    state, first = backend.prefill([SMALL.tokenizer.encode(prompt)] * len(rows), adapters=adapters)
    for row, adapter in enumerate(adapters):
        torch.testing.assert_close(first[row], from_nothing(prompt, [], adapter))
    at = 0
    while at < width:
        size = data.draw(st.integers(1, width - at))
        answers = backend.extend(state, torch.tensor(rows)[:, at : at + size])
        for (row, adapter), place in itertools.product(enumerate(adapters), range(size)):
            ids = [i for i in rows[row][: at + place + 1] if i not in BASE.eos_token_ids]
            if (
                len(ids) == at + place + 1
            ):  # the end of a text stands for itself; it is tested apart
                torch.testing.assert_close(answers[row, place], from_nothing(prompt, ids, adapter))
        back = data.draw(st.integers(0, size - 1))
        if back:
            backend.rewind(state, [back] * len(rows))
        at += size - back


def test_a_second_turn_is_what_it_is_when_read_from_nothing():
    """What the base read is used again; what a small model read is in other tokens than its prompt."""
    model = mapped_model()
    conversation = model.chat(SamplingParams(max_new_tokens=12, ignore_eos=True))
    "".join(step.text for step in conversation.say("abc and the"))
    heard = list(conversation.messages)
    answer = "".join(step.text for step in conversation.say("xyz"))
    heard.append({"role": "user", "content": "xyz"})
    assert len(heard) == 3
    assert model.generate(heard, conversation.sampling).text.startswith(answer)
    assert len(answer) > 8


def test_an_expert_and_its_anti_expert_cut_a_text_once(monkeypatch):
    cut = []
    whole = RetokenisedBackend._cut
    monkeypatch.setattr(
        RetokenisedBackend,
        "_cut",
        lambda self, ids, **more: cut.append(ids) or whole(self, ids, **more),
    )
    mapped_model().generate("abc", SamplingParams(max_new_tokens=9, ignore_eos=True))
    assert len(cut) == 8


def test_tokens_that_only_the_base_has_keep_its_logits_to_the_bit():
    model = mapped_model()
    backend = model.ensemble.members[1].backend
    _, logits = backend.prefill([[3, 4], [3, 4]], adapters=["tuned", None])
    base = table(7, NUM_BASE)[:1]
    steered = steer(base, expert_logits=logits[:1], anti_expert_logits=logits[1:], alpha=1.3)
    for index, token in enumerate(BASE_TOKENS):
        assert (steered[0, index] == base[0, index]) == (token not in SMALL_TOKENS), token


def test_the_offset_is_the_log_ratio_of_whole_distributions():
    """A tokenizer's own tokens take their share of probability, shared or not."""
    backend = small_backend()
    prompt = SMALL.tokenizer.encode("the ")
    inner = backend.inner.prefill([prompt, prompt], adapters=["tuned", None]).logits.log_softmax(-1)
    mapped = backend.prefill([prompt, prompt], adapters=["tuned", None]).logits
    own, theirs = SMALL_TOKENS.index("an"), BASE_TOKENS.index("an")
    torch.testing.assert_close(mapped[:, theirs], inner[:, own])


def test_with_one_tokenizer_on_both_sides_nothing_is_lost():
    """Letters are cut in one way only: then a map of all tokens steers as a shared vocabulary does."""
    whole = speech(TOKENS)
    tables = [table(seed, len(TOKENS)) for seed in range(3)]
    backends: list[Backend] = [ToyBackend(t, memory=0.5) for t in tables]
    alignment = align(whole.vocabulary, whole.vocabulary)

    def text(backends: list[Backend]) -> str:
        members = tuple(Member(str(i), b, alignment) for i, b in enumerate(backends))
        ensemble = Ensemble(
            members, (Pair("first", 1, 2),), whole.vocabulary, whole.eos_token_ids, whole.tokenizer
        )
        formats = [PromptFormat("plain", "plain", None, whole.tokenizer)] * 3
        model = ProxyTuned(ensemble, formats, toy_recipe({"first": 1.0}))
        return model.generate("the cat ", SamplingParams(max_new_tokens=60)).text

    mapped = [backends[0], *(RetokenisedBackend(b, whole, whole) for b in backends[1:])]
    assert text(mapped) == text(backends)


def test_the_end_of_a_text_is_one_token_whatever_it_is_called():
    own = ToyTokenizer((*TOKENS[:-1], "</s>"), eos_token="</s>")
    named = SimpleNamespace(
        tokenizer=own, vocabulary=Vocabulary.from_tokenizer(own, name="own", width=len(TOKENS)),
        eos_token_ids=(own.eos_token_id,),
    )  # fmt: skip
    assert token_map(BASE, named).small_id(BASE.eos_token_ids[0]) == own.eos_token_id


def test_special_tokens_never_stand_for_text():
    base = Vocabulary("base", {"a": 0, "<s>": 1, "b": 2}, 4)
    small = Vocabulary("small", {"<s>": 0, "a": 1, "c": 2}, 3)
    assert map_tokens(base, small).small_ids.tolist() == [1, 0, -1, -1]
    found = map_tokens(base, small, base_special_ids={1})
    assert found.small_ids.tolist() == [1, -1, -1, -1]
    assert (found.num_mapped, found.num_base_tokens) == (1, 3)
    both = map_tokens(base, small, base_special_ids={1}, small_special_ids={0})
    assert both.small_ids.tolist() == [1, 0, -1, -1]


def test_tokens_are_compared_by_their_bytes():
    base = Vocabulary("byte level", {"Ġthe": 0, "A": 1, "Ã": 2, "x": 3}, 4)
    small = Vocabulary("sentencepiece", {"▁the": 0, "<0x41>": 1, "A": 2, "<0xC3>": 3}, 4)
    assert map_tokens(base, small).small_ids.tolist() == [0, 2, 3, -1]


def test_a_text_that_outgrows_the_small_model_is_refused():
    model = mapped_model(max_context=40)
    # One token of the base, "er ", is three of the small model.
    ids = [BASE_TOKENS.index("er ")] * 20
    backend = model.ensemble.members[1].backend
    state, _ = backend.prefill([[3]])
    with pytest.raises(PromptTooLong, match="context of 40"):
        backend.extend(state, torch.tensor([ids]))


def test_a_neighbour_near_the_end_of_its_context_does_not_stop_a_row():
    backend = small_backend(max_context=10)
    long, short = SMALL.tokenizer.encode("a b c d "), SMALL.tokenizer.encode("a")
    state, _ = backend.prefill([long, short])
    token_ids = torch.tensor([[BASE.tokenizer.encode("e")[0]], [BASE_TOKENS.index("er ")]])
    answers = backend.extend(state, token_ids)
    torch.testing.assert_close(answers[1, 0], from_nothing("a", token_ids[1].tolist(), None))


def test_a_model_that_cannot_take_back_is_refused():
    inner = small_backend().inner
    inner._capabilities = Capabilities(max_context=None, can_rewind=False)
    with pytest.raises(UnsupportedModel, match="take back"):
        RetokenisedBackend(inner, SMALL, BASE)


# Real tokenizers ------------------------------------------------------------------------------------------

OTHER_MERGES = [
    ("i", "n"),
    ("in", "g"),
    ("a", "t"),
    ("t", "h"),
    ("th", "at"),
    ("Ġ", "t"),
    ("Ġt", "h"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    tiny_model(place / "base", seed=1)
    other = tiny_tokenizer(merges=OTHER_MERGES, shuffle_seed=3)
    tiny_model(place / "small", seed=2, tokenizer=other, max_context=256)
    tiny_model(place / "third", seed=4, tokenizer=tiny_tokenizer(merges=MERGES[:3]))
    tiny_adapter(place / "small", place / "tuned", seed=3)
    return place


def mapped_recipe(models: Path, **changes: object) -> Recipe:
    expert = ExpertSpec(
        name="tuned",
        expert=ModelSpec(adapter=str(models / "tuned")),
        anti_expert=ModelSpec(model=str(models / "small")),
    )
    recipe = Recipe(
        base=ModelSpec(model=str(models / "base")),
        experts=(expert,),
        vocabulary="map",
        directory=models,
    )
    return replace(recipe, **changes)


def test_a_recipe_maps_tokens_only_if_it_asks_for_it(models):
    with pytest.raises(VocabularyMismatch, match='"vocabulary": "map"'):
        ProxyTuned.load(mapped_recipe(models, vocabulary="same"))
    assert ProxyTuned.load(mapped_recipe(models)).generate("that thing", LONG).text


def test_the_recipe_keeps_it(models, tmp_path):
    written = mapped_recipe(models).write(tmp_path / "recipe")
    assert json.loads((tmp_path / "recipe" / "config.json").read_text())["vocabulary"] == "map"
    assert Recipe.read(tmp_path / "recipe") == written
    with pytest.raises(RecipeError, match=r'vocabulary is "mapp".*one of same, map'):
        mapped_recipe(models, vocabulary="mapp")


@pytest.mark.parametrize("prompt", ["that the thing is", "naïve 日本 😀 in", [20, 30, 263, 40]])
def test_real_tokenizers_give_one_row_what_a_batch_and_a_stream_give(models, prompt):
    model = ProxyTuned.load(mapped_recipe(models))
    sampling = SamplingParams(
        max_new_tokens=24, temperature=1.0, seed=5, top_p=0.95, ignore_eos=True
    )
    alone = model.generate(prompt, sampling, explain=True)
    beside = model.generate_batch([Request(prompt, sampling), Request("in the", LONG)])
    assert beside[0].text == alone.text == "".join(s.text for s in model.stream(prompt, sampling))
    drafted = model.generate(prompt, sampling, speculative=True)
    assert drafted.text == alone.text


def test_in_the_middle_of_a_character_nothing_is_steered(models):
    model = ProxyTuned.load(mapped_recipe(models))
    euro = model.tokenizer.encode("€", add_special_tokens=False)
    assert len(euro) == 3
    trace = model.explain("in ", [*euro, *model.tokenizer.encode("the", add_special_tokens=False)])
    changes = [step.kl for step in trace.steps]
    assert changes[1] == changes[2] == pytest.approx(0, abs=1e-6)  # after one byte, and after two
    assert changes[0] > 1e-4
    assert changes[3] > 1e-4


def test_an_expert_alone_writes_in_its_own_tokens(models):
    model = ProxyTuned.load(mapped_recipe(models))
    alone = model.alone(1)
    assert alone.tokenizer.get_vocab() != model.tokenizer.get_vocab()
    trace = alone.generate("that ", SamplingParams(max_new_tokens=8, ignore_eos=True))
    ids = [step.token_id for step in trace.steps]
    assert len(trace.text) >= 4
    assert alone.tokenizer.decode(ids, skip_special_tokens=True).startswith(trace.text[:4])


def test_scores_of_a_mapped_expert(models):
    report = ProxyTuned.load(mapped_recipe(models)).score(
        "that thing in the thing at that" * 4, window=32
    )
    assert [row.name for row in report.rows] == ["base", "steered", "steered", "steered"]
    assert report.row("steered", 0.0).nats == report.row("base").nats
    assert report.row("steered", 1.0).nats != report.row("base").nats
    expert, anti_expert = report.mapped
    assert 0 < expert.share < 1
    assert 0 < expert.base < 1
    assert 0 < expert.small < 1
    assert expert.base == anti_expert.base
    assert json.dumps(report.to_dict())


def test_a_score_is_what_generation_says(models):
    """Scored in one piece, the small models read runs of tokens; generated, one token at a time."""
    model = ProxyTuned.load(mapped_recipe(models))
    trace = model.generate(
        "that ", SamplingParams(max_new_tokens=24, ignore_eos=True), explain=True
    )
    given_ids = [step.token_id for step in trace.steps]
    explained = model.explain("that ", given_ids)
    for step, again in zip(trace.steps, explained.steps, strict=True):
        assert step.logprob == pytest.approx(again.logprob, abs=1e-4)


def test_doctor_says_what_is_shared(models):
    diagnosis = examine(mapped_recipe(models))
    assert diagnosis.is_healthy
    assert [m.vocabulary for m in diagnosis.models] == ["base", "mapped", "mapped"]
    (note,) = (note for note in diagnosis.notes if "another tokenizer" in note)
    assert "261 of the base's 266 tokens (98%)" in note


def test_sides_of_different_tokenizers_are_refused(models):
    expert = ExpertSpec(
        name="odd",
        expert=ModelSpec(model=str(models / "third")),
        anti_expert=ModelSpec(model=str(models / "small")),
    )
    with pytest.raises(VocabularyMismatch, match="different tokenizers"):
        ProxyTuned.load(mapped_recipe(models, experts=(expert,)))
    with pytest.raises(VocabularyMismatch, match="different tokenizers"):
        sides = replace(expert, expert=ModelSpec(same_as="base"))
        ProxyTuned.load(mapped_recipe(models, experts=(sides,)))


def test_sides_that_differ_in_an_added_token_share_a_tokenizer(models, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "small")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    padded = tiny_model(tmp_path / "padded", tokenizer=tokenizer)
    sides = ModelSpec(model=str(padded)), ModelSpec(model=str(models / "small"))
    recipe = mapped_recipe(models, experts=(ExpertSpec("padded", *sides),))
    assert examine(recipe).is_healthy


def test_a_damaged_side_is_reported_as_a_problem(models, tmp_path):
    damaged = shutil.copytree(models / "small", tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{")
    expert = ExpertSpec(
        name="odd",
        expert=ModelSpec(model=str(damaged)),
        anti_expert=ModelSpec(model=str(models / "small")),
    )
    diagnosis = examine(mapped_recipe(models, experts=(expert,)))
    assert "odd.expert" in [problem.where for problem in diagnosis.problems]


def test_engines_with_one_stream_of_tokens_refuse(models, tmp_path):
    from proxytune.integrations.transformers import ProxyTunedForCausalLM

    mapped_recipe(models).write(tmp_path / "recipe")
    with pytest.raises(UnsupportedModel, match='"vocabulary": "map"'):
        ProxyTunedForCausalLM.from_pretrained(str(tmp_path / "recipe"))
