"""Models whose added tokens differ: no offset where only the base has a token, and none of the others chosen.

The reference runs whole forwards of transformers' own models, without cache or batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from proxytune.decode.speculative import Drafting
from proxytune.integrations.transformers import ProxyTunedForCausalLM
from proxytune.loading.doctor import examine
from proxytune.measure.score import passage_of, score_passages
from proxytune.model import ProxyTuned
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from tests.support.tiny import (
    NUM_TOKENS,
    SPECIAL_TOKENS,
    tiny_gguf,
    tiny_model,
    tiny_tokenizer,
)

PROMPTS = ("the", "in the end there was", "Zoë 🙂")
GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True)
DRAFTS = Drafting(max_tokens=3, source="expert", is_adaptive=False)


class Case(NamedTuple):
    """The added tokens of base, expert and anti-expert, and whether the base's ids are others."""

    base: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    anti_expert: tuple[str, ...] = ()
    is_shuffled: bool = False


CASES = {
    "an expert's pad": Case(expert=("<pad>",)),
    "a base's own": Case(base=("<image>",)),
    "of two, one is shared": Case(base=("<a>", "<b>"), expert=("<b>",), anti_expert=("<b>",)),
    "one side's": Case(base=("<think>",), expert=("<think>",)),
    "the anti-expert's": Case(base=("<think>",), anti_expert=("<think>", "<pad>")),
    "other ids": Case(("<tool>", "<x>"), ("<pad>", "<x>"), ("<x>",), is_shuffled=True),
}


def tokenizer_of(added: tuple[str, ...], shuffle_seed: int | None = None) -> Any:
    from transformers import AddedToken

    tokenizer = tiny_tokenizer(shuffle_seed=shuffle_seed)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return tokenizer


def write(folder: Path, case: Case) -> Recipe:
    """Write a case's models; what is added is likely, so that it shows."""
    from transformers import AutoModelForCausalLM

    for seed, part in enumerate(("base", "expert", "anti_expert")):
        added = getattr(case, part)
        shuffled = 3 if case.is_shuffled and part == "base" else None
        path = folder / part
        tiny_model(path, seed=seed + 1, tokenizer=tokenizer_of(added, shuffled), max_context=256)
        network = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            network.get_output_embeddings().weight[NUM_TOKENS:] *= 4
        network.save_pretrained(path)
    sides = (ModelSpec(model=part) for part in ("expert", "anti_expert"))
    return Recipe(ModelSpec(model="base"), (ExpertSpec("e", *sides),), directory=folder)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    root = tmp_path_factory.mktemp("added")
    return {name: write(root / str(i), case) for i, (name, case) in enumerate(CASES.items())}


@pytest.fixture(params=["one side's", "other ids"])
def recipe(request: pytest.FixtureRequest, recipes: dict[str, Recipe]) -> Recipe:
    return recipes[request.param]


def reference(recipe: Recipe, prompt: str, alpha: float = 1.0, num_new: int = 10) -> list[int]:
    """Return what the base says, steered, by the formula and whole forwards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parts = [recipe.directory / part for part in ("base", "expert", "anti_expert")]
    tokenizers = [AutoTokenizer.from_pretrained(part) for part in parts]
    networks = [AutoModelForCausalLM.from_pretrained(part).eval() for part in parts]
    tokens = [tokenizer.get_vocab() for tokenizer in tokenizers]
    shared = [token for token in tokens[0] if token in tokens[1] and token in tokens[2]]
    in_base = [tokens[0][token] for token in shared]
    names = {token_id: token for token, token_id in tokens[0].items()}
    read = [tokenizer(prompt).input_ids for tokenizer in tokenizers]
    new: list[int] = []
    for _ in range(num_new):
        with torch.no_grad():
            base, expert, anti_expert = (
                network(torch.tensor([ids]), use_cache=False).logits[0, -1]
                for network, ids in zip(networks, read, strict=True)
            )
        ratio = [
            logits[[own[token] for token in shared]].log_softmax(-1)
            for logits, own in ((expert, tokens[1]), (anti_expert, tokens[2]))
        ]
        base[in_base] += alpha * (ratio[0] - ratio[1])
        new.append(int(base.argmax()))
        for ids, own in zip(read, tokens, strict=True):
            ids.append(own.get(names[new[-1]], own["Ċ"]))
    return new


def greedy(model: ProxyTuned, **options: Any) -> list[list[int]]:
    requests = [Request(prompt, GREEDY) for prompt in PROMPTS]
    return [list(trace.token_ids) for trace in model.generate_batch(requests, **options)]


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_that_of_the_formula_with_drafts_and_without(recipes, name: str) -> None:
    recipe = recipes[name]
    expected = [reference(recipe, prompt) for prompt in PROMPTS]
    model = ProxyTuned.load(recipe)
    assert greedy(model) == greedy(model, batch_size=2) == expected
    assert greedy(model, speculative=DRAFTS) == expected


def test_transformers_and_the_library_write_the_same(recipe: Recipe, tmp_path: Path) -> None:
    model = ProxyTuned.load(recipe)
    steered = ProxyTunedForCausalLM.from_pretrained(recipe.write(tmp_path / "recipe").directory)
    for prompt, expected in zip(PROMPTS, greedy(model), strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        found = steered.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
        assert found.tolist() == expected[: len(found)]
        assert len(found) == 10 or found[-1] == model.tokenizer.eos_token_id


def test_the_cases_write_tokens_that_only_the_base_has(recipes: dict[str, Recipe]) -> None:
    """Otherwise the tests above would say nothing of what stands in for them."""
    for name, part in (
        ("a base's own", "<image>"),
        ("one side's", "<think>"),
        ("other ids", "<tool>"),
    ):
        model = ProxyTuned.load(recipes[name])
        token_id = model.tokenizer.get_vocab()[part]
        assert any(token_id in ids[:-1] for ids in greedy(model)), name


def test_at_alpha_0_and_with_equal_sides_the_text_is_the_bases(recipe: Recipe) -> None:
    expected = [reference(recipe, prompt, alpha=0.0) for prompt in PROMPTS]
    (pair,) = recipe.experts
    equal = replace(recipe, experts=(replace(pair, anti_expert=pair.expert),))
    unsteered = replace(recipe, experts=(replace(pair, alpha=0.0),))
    assert greedy(ProxyTuned.load(unsteered)) == expected
    assert greedy(ProxyTuned.load(equal)) == expected


def test_rows_of_pairs_that_share_and_that_lack_tokens_are_as_alone(recipes) -> None:
    folder = recipes["one side's"].directory
    part = {name: ModelSpec(model=name) for name in ("base", "expert", "anti_expert")}
    experts = (
        ExpertSpec("lacks", part["expert"], part["anti_expert"]),
        ExpertSpec("has", part["expert"], ModelSpec(same_as="base")),
        ExpertSpec("against", part["anti_expert"], ModelSpec(same_as="base")),
    )
    model = ProxyTuned.load(Recipe(part["base"], experts, directory=folder))
    requests = [
        Request(prompt, GREEDY, alpha=0.5, experts=names)
        for prompt in PROMPTS
        for names in (("lacks",), ("has",), ("has", "lacks"), ("against",))
    ]
    together = [t.token_ids for t in model.generate_batch(requests)]
    alone = [model.generate_batch([request])[0].token_ids for request in requests]
    assert together == alone
    assert len(set(together)) > len(PROMPTS)


def test_doctor_names_the_tokens(recipes: dict[str, Recipe]) -> None:
    diagnosis = examine(recipes["other ids"])
    assert diagnosis.is_healthy
    assert [model.vocabulary for model in diagnosis.models] == ["base", "added", "added"]
    added = [note for note in diagnosis.notes if "added token" in note]
    assert added == [
        "e.expert: expert lacks 1 special or added token of the base. No offset is added to it, and expert "
        "reads '<tool>' as 'Ċ'.",
        "e.expert: expert has 1 special or added token that the base lacks and that is never chosen: "
        "'<pad>'.",
        "e.anti_expert: anti_expert lacks 1 special or added token of the base. No offset is added to it, "
        "and anti_expert reads '<tool>' as 'Ċ'.",
    ]


def test_a_model_by_itself_has_its_own_added_tokens(recipes: dict[str, Recipe]) -> None:
    model = ProxyTuned.load(recipes["an expert's pad"])
    expert = model.alone(model.ensemble.pairs[0].expert)
    pad = expert.tokenizer.get_vocab()["<pad>"]
    assert any(pad in ids for ids in greedy(expert))


def test_a_small_model_without_a_token_of_the_text_has_no_perplexity(recipes) -> None:
    model = ProxyTuned.load(recipes["one side's"])
    prompt, text = (model.tokenizer.encode(t) for t in ("the ", "end <think> of it"))
    passage = passage_of(model.ensemble, prompt, text)
    report = score_passages(model.ensemble, [passage], strengths=[(1.0, (1.0,))])
    assert [row.name for row in report.rows] == ["base", "e.expert", "steered"]
    assert all(row.perplexity < float("inf") for row in report.rows)


def test_what_each_model_said_of_a_token_that_one_lacks_is_recorded(recipes) -> None:
    model = ProxyTuned.load(recipes["one side's"])
    token_id = model.tokenizer.get_vocab()["<think>"]
    (trace,) = model.generate_batch(
        [Request("the", replace(GREEDY, logit_bias=((token_id, 100.0),)), explain=True)]
    )
    views = trace.steps[0].views
    assert trace.steps[0].token_id == token_id
    assert views["e.anti_expert"].logprob is None
    assert views["e.expert"].logprob is not None


def test_a_gguf_files_control_tokens_are_added_tokens(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_gguf(tmp_path / "base.gguf", seed=1)
    tiny_model(tmp_path / "small", seed=2, tokenizer=tokenizer_of(("<pad>",)))
    small = ModelSpec(model="small")
    recipe = Recipe(
        ModelSpec(model="base.gguf"), (ExpertSpec("e", small, small),), directory=tmp_path
    )
    vocabulary = RecipeFiles(recipe).checkpoint(recipe.base).vocabulary
    named = {token for token, i in vocabulary.token_to_id.items() if i in vocabulary.added_ids}
    assert named == set(SPECIAL_TOKENS)
    diagnosis = examine(recipe)
    assert diagnosis.is_healthy
    assert diagnosis.models[1].vocabulary == "added"
