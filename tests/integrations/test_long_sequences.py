"""Models whose rotary angles depend on a sequence's length, in the library and in transformers' generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from proxytune.decode.batch import Batch
from proxytune.decode.speculative import Drafting
from proxytune.errors import UnsupportedModel
from proxytune.integrations.transformers import ProxyTunedForCausalLM
from proxytune.model import ProxyTuned
from proxytune.request import Request, SamplingParams
from tests.support.tiny import NUM_TOKENS
from tests.support.tiny_recipe import recipe_of_config

SWITCH = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": SWITCH,
    "partial_rotary_factor": 1.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": SWITCH,
            "sliding_window": None,
        }
        | {"rope_parameters": LONGROPE},
    ),
    "dynamic": ("llama", {"max_position_embeddings": SWITCH, "rope_parameters": DYNAMIC}),
}
PROMPTS = [list(range(5, 8)), list(range(40, 90)), list(range(40, 65)), list(range(100, 129))]
NUM_NEW = 12


@pytest.fixture(scope="module", params=CONFIGS)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    kind, settings = CONFIGS[request.param]
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **settings,
    )
    return recipe_of_config(directory, config)


@pytest.fixture(scope="module")
def library(recipe: Path) -> ProxyTuned:
    return ProxyTuned.load(recipe)


def sampling(num_new: int = NUM_NEW) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_new, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(library: ProxyTuned) -> list[list[int]]:
    """What each prompt gives by itself, token by token."""
    found = [library.generate(prompt, sampling(), alpha=0.5) for prompt in PROMPTS]
    return [list(each.token_ids) for each in found]


def test_alpha_0_is_transformers_own_generate(recipe, library):
    for prompt in PROMPTS:
        base = transformers.AutoModelForCausalLM.from_pretrained(recipe / "base").eval()
        ids = torch.tensor([prompt])
        # With longrope, not every version's cached generate reads the text again at the switch.
        keeps = base.config.rope_parameters["rope_type"] == "dynamic"
        expected = base.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False,
            pad_token_id=0, use_cache=keeps,
        )  # fmt: skip
        own = library.generate(prompt, sampling(), alpha=0.0)
        assert list(own.token_ids) == expected[0, len(prompt) :].tolist()


def test_a_batch_gives_what_each_prompt_gives_alone(library, alone):
    requests = [Request(prompt, sampling(), alpha=0.5) for prompt in PROMPTS]
    assert [list(each.token_ids) for each in library.generate_batch(requests)] == alone


@pytest.mark.parametrize("source", ["expert", "lookup"])
def test_drafts_leave_the_text_as_it_is(library, alone, source):
    drafting = Drafting(max_tokens=4, source=source, is_adaptive=False)
    for prompt, expected in zip(PROMPTS, alone, strict=True):
        drafted = library.generate(prompt, sampling(), alpha=0.5, speculative=drafting)
        assert list(drafted.token_ids) == expected


def test_a_prompt_that_begins_like_the_one_before_gives_what_it_gives_alone(library, alone):
    """With dynamic NTK, the keys of a longer prompt have other angles, so they are not used again."""
    kept, found = None, []
    for prompt in (PROMPTS[1] + PROMPTS[1][:30], PROMPTS[1]):
        job = library.job(Request(prompt, sampling(), alpha=0.5))
        batch = Batch(library.ensemble, [job], kept=kept)
        found = []
        while not batch.is_done:
            found += [event.step.token_id for event in batch.step() if event.step is not None]
        kept = batch.kept()
    assert found == alone[1]


def test_exact_is_refused_by_name(recipe):
    """A draft across the switch computes a row's keys again, and they may differ in the last bit."""
    with pytest.raises(UnsupportedModel, match="exact is set, and the rotary angles"):
        ProxyTuned.load(recipe, exact=True)


def padded() -> dict[str, torch.Tensor]:
    width = max(map(len, PROMPTS))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]),
    }


@pytest.mark.parametrize("use_cache", [True, False])
def test_transformers_generate_reads_each_row_of_a_batch_as_it_is_alone(
    recipe, library, alone, use_cache
):
    if not use_cache and "dynamic" in str(recipe):
        pytest.skip("without a cache, all tokens get the angles for the last length")
    model = ProxyTunedForCausalLM.from_pretrained(recipe)
    output = model.generate(
        **padded(), max_new_tokens=NUM_NEW, do_sample=False, alpha=0.5, pad_token_id=0,
        use_cache=use_cache,
    )  # fmt: skip
    assert output[:, -NUM_NEW:].tolist() == alone


def test_transformers_drafts_and_beams_cross_the_switch(recipe, alone):
    model = ProxyTunedForCausalLM.from_pretrained(recipe)
    ids = torch.tensor(PROMPTS[2:3])
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": NUM_NEW, "do_sample": False,
        "alpha": 0.5, "pad_token_id": 0,
    }  # fmt: skip
    drafted = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert drafted[0, -NUM_NEW:].tolist() == alone[2]
    if "longrope" in str(recipe):
        beams = model.generate(ids, num_beams=3, **options)
        assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))
