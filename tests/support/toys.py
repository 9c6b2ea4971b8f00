"""A toy ensemble: tables over 33 short tokens, small enough to check on paper.

A table's row says what follows its token; see `proxytune.backends.toy`. Nothing is read from disk.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from proxytune.backends.toy import ToyBackend, ToyTokenizer
from proxytune.decode.ensemble import Ensemble, Member, Pair
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.text.prompts import PromptFormat
from proxytune.text.vocab import Vocabulary, align

EOS = "<eos>"
TOKENS = (*string.ascii_lowercase, " ", ".", "\n", ":", "U", "A", EOS)
"""Lower-case letters, what a plain conversation needs ("User:", "Assistant:"), and the end of a text."""


def toy_tokenizer() -> ToyTokenizer:
    """Return a tokenizer with one token a character."""
    return ToyTokenizer(TOKENS, eos_token=EOS)


def toy_table(seed: int, *, eos_logit: float | None = None) -> Tensor:
    """Return a `[vocab, vocab]` table of normal logits, twice as wide as a standard one.

    Args:
        seed: Of the numbers.
        eos_logit: Put this everywhere into the column of the end of a text: -100 makes endless texts.
    """
    generator = torch.Generator().manual_seed(seed)
    table = 2 * torch.randn(len(TOKENS), len(TOKENS), generator=generator)
    if eos_logit is not None:
        table[:, -1] = eos_logit
    return table


def toy_recipe(experts: Mapping[str, float] | None = None) -> Recipe:
    """Return the recipe of `toy_model`; its model references lead nowhere.

    Args:
        experts: Names and strengths; None for one named `first` at 1.
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
    """Return a steered toy; each model's table has a seed of its own, an expert's comes from its name.

    Args:
        experts: Names and strengths; None for one named `first` at 1.
        recipe: Takes the place of `experts`; only names, strengths and policy in it count.
        memory: How much tokens before the last one matter; see `ToyBackend`.
        seed: Of the tables.
        eos_logit: As in `toy_table`, for every table, so that steering leaves it alone.
        max_context: Of the base; the small models have none.
    """
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
    pairs = [Pair(name, expert=2 + index, anti_expert=1) for index, name in enumerate(names)]
    ensemble = Ensemble(
        tuple(members), tuple(pairs), vocabulary, (TOKENS.index(EOS),), tokenizer, recipe.policy
    )
    return ProxyTuned(ensemble, [PromptFormat("plain", tokenizer)] * len(members), recipe)


def toy_load(
    recipe: Recipe,
    *,
    device: str | None = None,
    dtype: str | None = None,
    experts: Sequence[str] | None = None,
    budget: None = None,
    cuda_graphs: bool = False,
) -> ProxyTuned:
    """Stand in for `ProxyTuned.load`: endless texts, in which every earlier token matters a little."""
    if experts is not None:
        recipe = replace(
            recipe,
            experts=tuple(e for e in recipe.experts if e.name in experts),
            default_expert=recipe.default_expert if recipe.default_expert in experts else None,
        )
    return toy_model(recipe=recipe, memory=0.5, eos_logit=-100.0, max_context=256)
