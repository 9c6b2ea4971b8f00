"""The Hub's side of recipes, on real repositories. Left out of the plain run: it needs the network.

make test ARGS="-m network"
"""

from __future__ import annotations

import pytest

from proxytune.loading.doctor import examine
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import SamplingParams

pytestmark = pytest.mark.network


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    """Look at the Hub in spite of the plain run's setting, with a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def recipe(base: str, expert: str, anti_expert: str) -> Recipe:
    return Recipe(
        ModelSpec(base),
        (ExpertSpec("chat", ModelSpec(expert, prompt="chat"), ModelSpec(anti_expert)),),
    )


def test_doctor_finds_differently_padded_qwen_heads_compatible_without_their_weights(tmp_path):
    diagnosis = examine(
        recipe("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B")
    )
    assert "padded" in str(diagnosis.to_dict())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_smollm2_from_the_hub_is_steered_and_alpha_zero_is_the_base():
    name = "HuggingFaceTB/SmolLM2-135M"
    model = ProxyTuned.load(recipe(name, f"{name}-Instruct", name))
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    prompt = "What is the capital of France?"
    steered, base = (model.generate(prompt, sampling, alpha=a).token_ids for a in (1.0, 0.0))
    assert len(steered) == len(base) == 8
    assert steered != base
