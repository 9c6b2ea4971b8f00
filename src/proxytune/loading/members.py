"""Which models a recipe runs, each once, as files.

A recipe names a model for each of its *parts*: `base`, and `NAME.expert` and `NAME.anti_expert` of every
expert. Parts with the same model, adapter and prompt formats are one *member*. Members that differ only in
adapter or prompt formats share one copy of the *weights*. Nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from proxytune.checkpoints.adapter import AdapterFiles
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.decode.ensemble import Pair
from proxytune.loading.formats import find_formats
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.spec import ModelSpec
from proxytune.text.prompts import PromptFormat


class MemberFiles(NamedTuple):
    """One member.

    Args:
        part: The first part of the recipe that names it.
        spec: As the recipe describes it; `spec.weights` is the key of what is shared.
        checkpoint: The model's files; of a base behind an API, those of the tokenizer that speaks for it.
        adapter: The files of its LoRA adapter.
        format: How it reads prompts.
    """

    part: str
    spec: ModelSpec
    checkpoint: Checkpoint
    adapter: AdapterFiles | None
    format: PromptFormat


def find_members(files: RecipeFiles) -> tuple[tuple[MemberFiles, ...], tuple[Pair, ...]]:
    """Return a recipe's members, the base first, and each expert with its anti-expert as indices of them.

    Raises:
        UnsafeModel: The recipe asks for a right that the caller does not grant.
        UserError: A model or adapter is missing, unsafe or corrupt; see `errors.py`.
    """
    files.check_grants()
    recipe = files.recipe
    members: list[MemberFiles] = []
    formats = find_formats(files)
    places: dict[Hashable, int] = {}

    def place(part: str, spec: ModelSpec) -> int:
        if spec.same_as is not None:
            return 0
        own = formats[part]
        member = MemberFiles(part, spec, files.checkpoint(spec), files.adapter(spec), own)
        adapter = None if member.adapter is None else str(member.adapter.path)
        key = spec.weights, adapter, own.text, own.chat, own.template
        if key not in places:
            places[key] = len(members)
            members.append(member)
        return places[key]

    found = {part: place(part, spec) for part, spec in recipe.models.items()}
    pairs = tuple(
        Pair(e.name, found[f"{e.name}.expert"], found[f"{e.name}.anti_expert"])
        for e in recipe.experts
    )
    return tuple(members), pairs
