"""Models whose rows run one by one, as a base and experts: in the library and in transformers' generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from proxytune.integrations.transformers import ProxyTunedForCausalLM
from proxytune.model import ProxyTuned
from proxytune.request import Request, SamplingParams
from tests.support.tiny import NUM_TOKENS
from tests.support.tiny_recipe import recipe_of_config

CONFIGS: dict[str, dict[str, Any]] = {
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "minimax": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
        "max_position_embeddings": 64,
    },
}
PROMPTS = [list(range(5, 8)), list(range(40, 59)), [200]]
NUM_NEW = 8


@pytest.fixture(scope="module", params=CONFIGS)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(
        request.param,
        vocab_size=NUM_TOKENS,
        initializer_range=0.3,
        **tokens,
        **CONFIGS[request.param],
    )
    return recipe_of_config(directory, config)


@pytest.fixture(scope="module")
def library(recipe: Path) -> ProxyTuned:
    return ProxyTuned.load(recipe)


def texts(library: ProxyTuned, alpha: float) -> list[list[int]]:
    """What each prompt gives by itself."""
    own = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)
    return [list(library.generate(prompt, own, alpha=alpha).token_ids) for prompt in PROMPTS]


def test_alpha_0_is_transformers_own_generate(recipe, library):
    """A cache of a model's own used to be an error at the first token."""
    base = transformers.AutoModelForCausalLM.from_pretrained(recipe / "base").eval()
    for prompt, text in zip(PROMPTS, texts(library, 0.0), strict=True):
        ids = torch.tensor([prompt])
        expected = base.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0
        )  # fmt: skip
        assert text == expected[0, len(prompt) :].tolist()


def test_a_batch_gives_what_each_prompt_gives_alone(library):
    """Rows end after 4, 8 and 8 tokens."""
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=n, ignore_eos=True), alpha=0.5)
        for prompt, n in zip(PROMPTS, (4, 8, 8), strict=True)
    ]
    found = [list(each.token_ids) for each in library.generate_batch(requests)]
    expected = texts(library, 0.5)
    assert found == [expected[0][:4], *expected[1:]]


def test_transformers_generate_gives_the_same(recipe, library):
    model = ProxyTunedForCausalLM.from_pretrained(recipe)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    options: dict[str, Any] = {
        "max_new_tokens": NUM_NEW,
        "do_sample": False,
        "pad_token_id": 0,
        "alpha": 0.5,
    }
    output = model.generate(ids, attention_mask=mask, **options)
    assert output[:, width:].tolist() == texts(library, 0.5)
    beams = model.generate(ids, attention_mask=mask, num_beams=2, **options)
    whole = model.generate(ids, attention_mask=mask, num_beams=2, use_cache=False, **options)
    assert torch.equal(beams, whole)
