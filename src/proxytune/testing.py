"""A steered toy model for tests of programs that use proxytune: no weights, no download, no time.

    from proxytune.testing import toy_model

    model = toy_model(experts={"support": 1.0, "legal": 0.5})
    assert model.generate("hello", alpha=0).text == model.generate("hello", experts="legal", alpha=0).text

Its models are tables over 33 tokens, mostly lower-case letters, small enough to check on paper: a table's
row says what follows its token (`proxytune.backends.toy`). It is a `ProxyTuned` like any other, so it
generates, streams, scores, explains, and answers behind the server.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from proxytune.backends.toy import ToyBackend, ToyTokenizer
from proxytune.checkpoints.output_bias import read_output_bias
from proxytune.decode.ensemble import Ensemble, Member, Pair
from proxytune.errors import InvalidRequest
from proxytune.logits.steer import Weights
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.text.prompts import PromptFormat
from proxytune.text.vocab import Vocabulary, align

EOS = "<eos>"
TOKENS = (*string.ascii_lowercase, " ", ".", "\n", ":", "U", "A", EOS)
"""Lower-case letters, what a plain conversation needs ("User:", "Assistant:"), and an end-of-text token."""


def toy_tokenizer() -> ToyTokenizer:
    """Return a tokenizer with one token per character."""
    return ToyTokenizer(TOKENS, eos_token=EOS)


def toy_table(seed: int, *, eos_logit: float | None = None) -> Tensor:
    """Return a `[vocab, vocab]` table of logits, normally distributed with a standard deviation of 2.

    Args:
        seed: Random seed.
        eos_logit: Logit of the end-of-text token after every token; -100 makes texts endless. Default:
        random.
    """
    generator = torch.Generator().manual_seed(seed)
    table = 2 * torch.randn(len(TOKENS), len(TOKENS), generator=generator)
    if eos_logit is not None:
        table[:, -1] = eos_logit
    return table


def toy_recipe(experts: Mapping[str, float] | None = None) -> Recipe:
    """Return the recipe of `toy_model`, whose model references lead nowhere.

    Args:
        experts: Names and strengths. Default: one expert named `first`, at strength 1.
    """
    return Recipe(
        base=ModelSpec(model="toy/base"),
        experts=tuple(
            ExpertSpec(
                name=name,
                expert=ModelSpec(model=f"toy/{name}"),
                anti_expert=ModelSpec(model="toy/anti-expert"),
                alpha=alpha,
            )
            for name, alpha in (experts or {"first": 1.0}).items()
        ),
        directory=Path("toy"),
    )


def toy_model(
    *,
    experts: Mapping[str, float] | None = None,
    recipe: Recipe | None = None,
    memory: float = 0.0,
    seed: int = 0,
    eos_logit: float | None = None,
    max_context: int | None = None,
) -> ProxyTuned:
    """Return a steered toy model; each member's table has its own seed, an expert's derived from its name.

    Args:
        experts: Names and strengths. Default: one expert named `first`, at strength 1.
        recipe: Given in place of `experts`; only its names, strengths, weights, biases and policy matter.
        memory: How much the tokens before the last one matter; see `ToyBackend`.
        seed: Random seed of the tables.
        eos_logit: As in `toy_table`, the same in every table, so that steering does not change it.
        max_context: Maximum number of tokens the base can hold; the small models have no limit.
    """
    if recipe is not None and experts is not None:
        raise InvalidRequest(
            "experts and recipe are both given.\nhint: name the experts in the recipe"
        )
    recipe = recipe or toy_recipe(experts)
    tokenizer = toy_tokenizer()
    vocabulary = Vocabulary.from_tokenizer(tokenizer, name="toy", width=len(TOKENS))
    alignment = align(vocabulary, vocabulary)

    def member(name: str, offset: int, context: int | None = None) -> Member:
        table = toy_table(seed + offset, eos_logit=eos_logit)
        return Member(
            name, ToyBackend(table, name=name, memory=memory, max_context=context), alignment
        )

    names = [expert.name for expert in recipe.experts]
    members = [member("base", 0, max_context), member("anti-expert", 1)]
    members += [member(name, sum(name.encode())) for name in names]
    biases = [
        expert.bias and read_output_bias(expert.bias, root=recipe.directory)
        for expert in recipe.experts
    ]
    pairs = [
        Pair(e.name, 2 + index, 1, weights=Weights(**asdict(e.weights)), bias=bias or None)
        for index, (e, bias) in enumerate(zip(recipe.experts, biases, strict=True))
    ]
    ensemble = Ensemble(
        tuple(members), tuple(pairs), vocabulary, (TOKENS.index(EOS),), tokenizer, recipe.policy
    )
    return ProxyTuned(
        ensemble, [PromptFormat("plain", "plain", None, tokenizer)] * len(members), recipe
    )
