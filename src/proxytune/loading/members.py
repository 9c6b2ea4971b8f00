"""Which models a recipe runs, each once, as files.

A recipe names a model for each of its *parts*: `base`, and `NAME.expert` and `NAME.anti_expert` of every
expert. Parts with the same model, adapter and prompt format are one *member*. Members that differ only in
adapter or prompt format share one copy of the *weights*. Nothing is loaded here.
"""

from __future__ import annotations

from typing import NamedTuple

from proxytune.checkpoints.adapter import AdapterFiles, find_adapter
from proxytune.checkpoints.checkpoint import Checkpoint, find_checkpoint
from proxytune.decode.ensemble import Pair
from proxytune.errors import UserError
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ModelSpec


class MemberFiles(NamedTuple):
    """One member.

    Args:
        part: The first part of the recipe that names it.
        spec: As the recipe describes it; `spec.weights` is the key of what is shared.
        checkpoint: The model's files; of a base behind an API, those of the tokenizer that speaks for it.
        adapter: The files of its LoRA adapter.
    """

    part: str
    spec: ModelSpec
    checkpoint: Checkpoint
    adapter: AdapterFiles | None


class RecipeFiles:
    """The files of a recipe's models, each looked up once.

    Args:
        recipe: Where references start, and which parts there are.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._found: dict[ModelSpec, Checkpoint | UserError] = {}
        self._owners: dict[ModelSpec, str] = {}
        for part, spec in recipe.models.items():
            self._owners.setdefault(spec.weights, part)

    def owner(self, spec: ModelSpec) -> str:
        """Return the first part that has the weights of `spec`."""
        return self._owners[spec.weights]

    def checkpoint(self, spec: ModelSpec) -> Checkpoint:
        """Return the files of a model's weights and tokenizer.

        Raises:
            UserError: They are missing, unsafe or corrupt; the same error each time.
        """
        weights = spec.weights
        if weights not in self._found:
            local = weights if spec.api is None else self.recipe.base_tokenizer
            try:
                self._found[weights] = find_checkpoint(
                    local.model or "",
                    root=self.recipe.directory,
                    revision=local.revision,
                    trust_remote_code=local.trust_remote_code,
                    allow_pickle=local.allow_pickle,
                )
            except UserError as error:
                self._found[weights] = error
        found = self._found[weights]
        if isinstance(found, UserError):
            raise found
        return found

    def adapter(self, spec: ModelSpec) -> AdapterFiles | None:
        """Return the files of a model's adapter; None if it has none.

        Raises:
            UserError: They are missing, unsafe or corrupt.
        """
        if spec.adapter is None:
            return None
        return find_adapter(
            spec.adapter, root=self.recipe.directory, allow_pickle=spec.allow_pickle
        )


def find_members(recipe: Recipe) -> tuple[tuple[MemberFiles, ...], tuple[Pair, ...]]:
    """Return a recipe's members, the base first, and each expert with its anti-expert as indices of them.

    Raises:
        UserError: A model or adapter is missing, unsafe or corrupt; see `errors.py`.
    """
    files = RecipeFiles(recipe)
    members: list[MemberFiles] = []
    places: dict[tuple[ModelSpec, str | None, str], int] = {}

    def place(part: str, spec: ModelSpec) -> int:
        if spec.same_as is not None:
            return 0
        member = MemberFiles(part, spec, files.checkpoint(spec), files.adapter(spec))
        adapter = None if member.adapter is None else str(member.adapter.path)
        key = spec.weights, adapter, spec.prompt
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
