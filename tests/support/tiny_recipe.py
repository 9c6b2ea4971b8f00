"""A recipe of tiny models that differ in all that vLLM might confuse, and requests for it.

The base is padded, and the small models have other architectures, widths, token ids and added tokens. Three
experts are adapters, and one is the base itself. One has weights and an output bias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from proxytune.checkpoints.output_bias import OutputBias, write_output_bias
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ExpertWeights, ModelSpec
from proxytune.request import Request, SamplingParams
from tests.support.tiny import NUM_TOKENS, tiny_adapter, tiny_model, tiny_tokenizer

MORE: dict[str, dict[str, Any]] = {
    "two": {
        "use_dora": True,
        "modules_to_save": ["norm", "lm_head"],
        "trainable_token_indices": [97, 101],
    },
    "three": {"bias": "lora_only"},
}
"""What adapters of the recipe are beyond LoRA on linear layers, in PEFT's words."""


WEIGHTS = ExpertWeights(base=0.8, expert=0.9, anti_expert=1.2)
BIAS = OutputBias(torch.tensor([97, 3, 105, 50]), torch.tensor([1.5, -2.0, 0.75, 2.5]))


def tiny_recipe(place: Path) -> Path:
    """Write the recipe and its models into a directory, and return it."""
    own = {"tokenizer": tiny_tokenizer(extra_tokens=["<image>"])}
    other = {"tokenizer": tiny_tokenizer(shuffle_seed=5, extra_tokens=["<pad>"])}
    wide = {"hidden_size": 128, "max_context": 256}
    tiny_model(place / "base", width=NUM_TOKENS + 6, seed=1, **wide, **own)
    tiny_model(place / "llama", seed=2, **wide, **own)
    tiny_model(place / "qwen", "qwen2", seed=3, **wide, **other)
    tiny_model(
        place / "gpt", "gpt2", width=NUM_TOKENS + 2, hidden_size=64, seed=4, max_context=192, **own
    )
    for seed, (small, name) in enumerate((("llama", "one"), ("llama", "two"), ("gpt", "three"))):
        tiny_adapter(place / small, place / name, seed=seed, more=MORE.get(name, {}))
    write_output_bias(place / "two.safetensors", BIAS)
    llama, gpt = ModelSpec(model="llama"), ModelSpec(model="gpt")
    experts = (
        ExpertSpec("mixed", gpt, ModelSpec(model="qwen"), 0.3),
        ExpertSpec("one", ModelSpec(adapter="one"), llama, 0.5),
        ExpertSpec("two", ModelSpec(adapter="two"), llama, 0.5, WEIGHTS, "two.safetensors"),
        ExpertSpec("three", ModelSpec(adapter="three"), gpt, 0.5),
        ExpertSpec("contrast", ModelSpec(same_as="base"), llama, 0.5),
    )
    base = ModelSpec(model="base")
    Recipe(base, experts, default_expert="one", directory=place).write(place)
    return place


def recipe_of_config(place: Path, config: Any) -> Path:
    """Write three random models of one transformers config and a recipe of them; return its directory."""
    for seed, name in enumerate(("base", "expert", "anti-expert")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network: Any = transformers.AutoModelForCausalLM.from_config(config)
        network.save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    pair = ExpertSpec("e", ModelSpec(model="expert"), ModelSpec(model="anti-expert"))
    Recipe(ModelSpec(model="base"), (pair,), directory=place).write(place)
    return place


NAMES = ("mixed", "one", "two", "three", "contrast")


def tiny_requests(num: int, length: int) -> tuple[list[dict[str, Any]], list[Request]]:
    """Return requests of different lengths, strengths and experts to vLLM, and the same to the library.

    Args:
        num: Number of requests.
        length: Number of new tokens of the shortest.
    """
    generator = torch.Generator().manual_seed(0)
    asked, same = [], []
    for index in range(num):
        letters = torch.randint(97, 123, (1 + index % 23,), generator=generator).tolist()
        text = bytes(letters).decode()
        names = [NAMES[index % 5]] if index % 3 else [NAMES[index % 5], NAMES[(index + 2) % 5]]
        alpha = (index % 4) / 2
        # Some rows run longer than others, so that rows leave and move up.
        count = length + 7 * (index % 3)
        extra = {"expert": names, "alpha": alpha}
        asked.append({"prompt": text, "max_tokens": count, "logprobs": 2, "extra_args": extra})
        sampling = SamplingParams(max_new_tokens=count, logprobs=2)
        same.append(Request(text, sampling, alpha, tuple(names)))
    return asked, same
