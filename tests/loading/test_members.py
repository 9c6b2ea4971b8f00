"""A recipe's models, each once: members, pairs, and whose weights are shared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proxytune.decode.ensemble import Pair
from proxytune.errors import ModelNotFound
from proxytune.loading.members import find_members
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from tests.support.tiny import tiny_adapter, tiny_model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two experts on one small model, one of them an adapter, and the base as an anti-expert."""
    directory = tmp_path_factory.mktemp("members")
    tiny_model(directory / "base", seed=1)
    small = tiny_model(directory / "small", seed=2)
    tiny_adapter(small, directory / "adapter")
    adapted = ModelSpec(model="small", adapter="adapter")
    return Recipe(
        base=ModelSpec(model="base"),
        experts=(
            ExpertSpec("one", adapted, ModelSpec(model="small")),
            ExpertSpec("two", ModelSpec(model="small"), ModelSpec(same_as="base")),
            ExpertSpec("three", replace(adapted, prompt="chat"), ModelSpec(model="small")),
        ),
        directory=directory,
    )


def test_parts_with_one_model_adapter_and_prompt_are_one_member(recipe):
    members, pairs = find_members(RecipeFiles(recipe))
    assert [member.part for member in members] == [
        "base",
        "one.expert",
        "one.anti_expert",
        "three.expert",
    ]
    assert pairs == (Pair("one", 1, 2), Pair("two", 2, 0), Pair("three", 3, 2))
    assert members[1].checkpoint is members[2].checkpoint is members[3].checkpoint
    assert members[1].adapter is not None and members[1].adapter.path == members[3].adapter.path
    assert members[2].adapter is None


def test_the_first_part_that_names_weights_owns_them(recipe):
    files = RecipeFiles(recipe)
    assert files.owner(recipe.models["two.expert"]) == "one.expert"
    assert files.owner(recipe.base) == "base"


def test_a_model_that_is_missing_is_the_same_error_each_time(recipe):
    gone = ModelSpec(model="./gone")
    files = RecipeFiles(replace(recipe, base=gone))
    errors = []
    for _ in range(2):
        with pytest.raises(ModelNotFound, match="gone") as caught:
            files.checkpoint(gone)
        errors.append(caught.value)
    assert errors[0] is errors[1]
