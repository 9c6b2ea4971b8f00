"""The files of a recipe's models, each looked up once, and the rights that the recipe asks for.

A recipe asks for a right; only the caller grants it (`grants.py`). What it asks for is found by looking,
before anything is imported or loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from proxytune.checkpoints.adapter import AdapterFiles, find_adapter
from proxytune.checkpoints.bridge_file import find_bridge
from proxytune.checkpoints.changes import PatternClock
from proxytune.checkpoints.checkpoint import Checkpoint, find_checkpoint
from proxytune.checkpoints.cut import Keep
from proxytune.checkpoints.cut_checkpoint import CutCheckpoint
from proxytune.checkpoints.hub import PICKLED, cached_directory
from proxytune.checkpoints.output_bias import OutputBias, read_output_bias
from proxytune.checkpoints.references import unpinned_path
from proxytune.errors import UnsafeModel, UserError
from proxytune.grants import NOTHING, Grants
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec

_MEANINGS = {
    "trust_remote_code": ("to run Python code that comes with its models", ("*.py",)),
    "allow_pickle": ("to read pickled weights, which can run any code", PICKLED),
}
"""What each right allows, and the names of the files that it is about."""

_MAX_SHOWN = 20
"""Maximum number of files that a message names for one model."""


@dataclass(frozen=True, slots=True)
class AskedRight:
    """A right that a recipe asks for.

    Args:
        part: The first part of the recipe whose model needs it.
        right: The name of the right in `Grants`, and of the key in the recipe.
        references: The model, and its adapter if there is one.
        files: The files concerned that are on this machine.
    """

    part: str
    right: str
    references: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def flag(self) -> str:
        """The command line's flag that grants it."""
        return f"--{self.right.replace('_', '-')}"

    def describe(self) -> str:
        """Return the model and its files in one phrase."""
        named = " + ".join(self.references)
        # Whoever made the model chose their names, and how many there are.
        shown = [name if name.isprintable() else ascii(name) for name in self.files[:_MAX_SHOWN]]
        if len(self.files) > _MAX_SHOWN:
            shown.append(f"and {len(self.files) - _MAX_SHOWN} more")
        return f"{self.part} ({named}: {', '.join(shown) or 'files not on this machine yet'})"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


class RecipeFiles:
    """The files of a recipe's models, each looked up once.

    Args:
        recipe: Where references start, and which parts there are.
        grants: What the caller allows.
    """

    def __init__(self, recipe: Recipe, grants: Grants = NOTHING) -> None:
        self.recipe = recipe
        self.grants = grants
        self._found: dict[ModelSpec, Checkpoint | UserError] = {}
        self._owners: dict[ModelSpec, str] = {}
        self._clock = PatternClock()
        for part, spec in recipe.models.items():
            self._owners.setdefault(spec.weights, part)

    def owner(self, spec: ModelSpec) -> str:
        """Return the first part that has the weights of `spec`."""
        return self._owners[spec.weights]

    def ungranted(self) -> tuple[AskedRight, ...]:
        """Return the rights that the recipe asks for and the caller does not grant."""
        found = []
        for part, spec in self.recipe.models.items():
            is_first = self.owner(spec) == part
            for right, (_, patterns) in _MEANINGS.items():
                is_asked = getattr(spec, right) and not getattr(self.grants, right)
                if is_asked and (is_first or spec.adapter is not None):
                    named = tuple(r for r in (spec.model, spec.adapter) if r is not None)
                    places = ((spec.model, spec.revision), (spec.adapter, None))
                    files = self._matching(places, patterns)
                    found.append(AskedRight(part, right, named, files))
        return tuple(found)

    def check_grants(self) -> None:
        """Check that the caller grants every right that the recipe asks for.

        Raises:
            UnsafeModel: A right is missing; the message names the models and files concerned.
        """
        asked = self.ungranted()
        if asked:
            raise ungranted_error(asked)

    def checkpoint(self, spec: ModelSpec) -> Checkpoint:
        """Return the files of a model's weights and tokenizer.

        Raises:
            UserError: They are missing, unsafe or corrupt; the same error each time.
        """
        weights = spec.weights
        if spec.cut_of is not None and weights not in self._found:
            try:
                self._found[weights] = self._cut(spec)
            except UserError as error:
                self._found[weights] = error
        if weights not in self._found:
            local = weights if spec.api is None else self.recipe.base_tokenizer
            try:
                self._found[weights] = find_checkpoint(
                    local.model or "",
                    root=self.recipe.directory,
                    revision=local.revision,
                    trust_remote_code=local.trust_remote_code and self.grants.trust_remote_code,
                    allow_pickle=local.allow_pickle and self.grants.allow_pickle,
                )
            except UserError as error:
                self._found[weights] = error
        found = self._found[weights]
        if isinstance(found, UserError):
            raise found
        return found

    def _cut(self, spec: ModelSpec) -> Checkpoint:
        assert spec.keep is not None and spec.bridge is not None
        bridge = find_bridge(spec.bridge, root=self.recipe.directory)
        return CutCheckpoint.of(self.checkpoint(self.recipe.base), Keep(*spec.keep), bridge)

    def adapter(self, spec: ModelSpec) -> AdapterFiles | None:
        """Return the files of a model's adapter; None if it has none.

        Raises:
            UserError: They are missing, unsafe or corrupt.
        """
        if spec.adapter is None:
            return None
        found = find_adapter(
            spec.adapter,
            root=self.recipe.directory,
            allow_pickle=spec.allow_pickle and self.grants.allow_pickle,
        )
        return replace(found, clock=self._clock)

    def output_bias(self, expert: ExpertSpec) -> OutputBias | None:
        """Return an expert's output bias; None if it has none.

        Raises:
            VocabularyMismatch: It is for tokens that the base lacks.
            UserError: Its file is missing or corrupt.
        """
        if expert.bias is None:
            return None
        found = read_output_bias(expert.bias, root=self.recipe.directory)
        found.check_tokens(self.checkpoint(self.recipe.base).vocabulary)
        return found

    def _matching(
        self, places: Iterable[tuple[str | None, str | None]], patterns: Iterable[str]
    ) -> tuple[str, ...]:
        """Return the names of files that match, in the directories that are on this machine."""
        names: list[str] = []
        for reference, revision in places:
            if reference is None:
                continue
            try:
                place = unpinned_path(reference, root=self.recipe.directory, revision=revision)
            except UserError:
                continue
            if place is None:
                place = cached_directory(reference, revision=revision)
            if place is not None and place.is_dir():
                names += (f.name for pattern in patterns for f in sorted(place.glob(pattern)))
        return tuple(dict.fromkeys(names))


def ungranted_error(asked: Iterable[AskedRight]) -> UnsafeModel:
    """Return the error for rights that a recipe asks for and the caller has not granted."""
    asked = tuple(asked)
    wants = []
    for right, (meaning, _) in _MEANINGS.items():
        models = [one.describe() for one in asked if one.right == right]
        if models:
            wants.append(f"{meaning} ({right}): {'; '.join(models)}")
    flags = list(dict.fromkeys(one.flag for one in asked))
    arguments = list(dict.fromkeys(f"{one.right}=True" for one in asked))
    return UnsafeModel(
        f"the recipe asks {', and '.join(wants)}. Only you can allow that.\n"
        f"hint: read these files, and if you trust whoever made them add {' '.join(flags)}, or "
        f"{', '.join(arguments)} in Python"
    )
