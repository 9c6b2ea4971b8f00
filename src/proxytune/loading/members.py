"""Which models a recipe runs, each once, as files.

A recipe names a model for each of its *parts*: `base`, and `NAME.expert` and `NAME.anti_expert` of every
expert. Parts with the same model, adapter and prompt formats are one *member*. Members that differ only in
adapter or prompt formats share one copy of the *weights*. Nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict
from typing import NamedTuple

import torch

from proxytune.backends.retokenised import UNMAPPED
from proxytune.checkpoints.adapter import AdapterFiles
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.decode.ensemble import Pair
from proxytune.errors import VocabularyMismatch
from proxytune.loading.formats import find_formats
from proxytune.logits.steer import Weights
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.spec import ModelSpec
from proxytune.text.prompts import PromptFormat
from proxytune.text.vocab import Alignment, align


class MemberFiles(NamedTuple):
    """One member.

    Args:
        part: The first part of the recipe that names it.
        spec: As the recipe describes it; `spec.weights` is the key of what is shared.
        checkpoint: The model's files; of a base behind an API, those of the tokenizer that speaks for it.
        adapter: The files of its LoRA adapter.
        format: How it reads prompts.
        alignment: How its tokens correspond to the base's, one object for each model; None if they do not,
            and the recipe maps them.
    """

    part: str
    spec: ModelSpec
    checkpoint: Checkpoint
    adapter: AdapterFiles | None
    format: PromptFormat
    alignment: Alignment | None


def find_members(files: RecipeFiles) -> tuple[tuple[MemberFiles, ...], tuple[Pair, ...]]:
    """Return a recipe's members, the base first, and each expert with its anti-expert as indices of them.

    Raises:
        UnsafeModel: The recipe asks for a right that the caller does not grant.
        VocabularyMismatch: A model has other tokens than the base, and the recipe does not map them, or an
            output bias is for tokens that the base lacks.
        UserError: A model, adapter or output bias is missing, unsafe or corrupt; see `errors.py`.
    """
    files.check_grants()
    recipe = files.recipe
    members: list[MemberFiles] = []
    formats = find_formats(files)
    places: dict[Hashable, int] = {}
    vocabulary = files.checkpoint(recipe.base).vocabulary
    # One for each model: lanes whose members share it are translated at once (`decode/lanes.py`).
    alignments: dict[ModelSpec, Alignment | None] = {}

    def alignment_of(spec: ModelSpec) -> Alignment | None:
        if spec.weights not in alignments:
            try:
                found = align(vocabulary, files.checkpoint(spec).vocabulary)
            except VocabularyMismatch:
                if recipe.vocabulary != "map":
                    raise
                found = None
            alignments[spec.weights] = found
        return alignments[spec.weights]

    def place(part: str, spec: ModelSpec) -> int:
        if spec.same_as is not None:
            return 0
        own = formats[part]
        member = MemberFiles(
            part, spec, files.checkpoint(spec), files.adapter(spec), own, alignment_of(spec)
        )
        adapter = None if member.adapter is None else str(member.adapter.path)
        key = spec.weights, adapter, own.text, own.chat, own.template
        if key not in places:
            places[key] = len(members)
            members.append(member)
        return places[key]

    found = {part: place(part, spec) for part, spec in recipe.models.items()}
    pairs = []
    for expert in recipe.experts:
        sides = found[f"{expert.name}.expert"], found[f"{expert.name}.anti_expert"]
        missing = {i for side in sides if (own := members[side].alignment) for i in own.stand_ins}
        is_unshared = None
        if missing:
            is_unshared = torch.zeros(vocabulary.width, dtype=torch.bool)
            is_unshared[[*missing, *vocabulary.padding_ids.tolist()]] = True
        is_mapped = any(members[side].alignment is None for side in sides)
        pairs.append(
            Pair(
                expert.name,
                *sides,
                is_unshared,
                Weights(**asdict(expert.weights)),
                files.output_bias(expert),
                UNMAPPED if is_mapped else None,
            )
        )
    return tuple(members), tuple(pairs)
