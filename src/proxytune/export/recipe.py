"""A recipe whose small models become GGUF files, each written once however many experts share it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.references import is_gguf
from proxytune.errors import RecipeError, UnsupportedModel
from proxytune.export.adapter import plan_adapter
from proxytune.export.model import plan_model
from proxytune.export.write import ExportedFile, PlannedFile, check_output, last_part, write_file
from proxytune.grants import NOTHING, Grants
from proxytune.recipe.directory import Mover
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import LlamaCppSettings, ModelSpec


@dataclass(frozen=True, slots=True)
class ExportedRecipe:
    """A recipe whose small models are GGUF files: its directory, and the models and adapters in it."""

    directory: Path
    files: tuple[ExportedFile, ...]


def export_recipe(
    recipe: Recipe,
    output: Path,
    *,
    dtype: str = "F16",
    pre: str | None = None,
    overwrite: bool = False,
    grants: Grants = NOTHING,
) -> ExportedRecipe:
    """Write every small model and adapter of a recipe as a GGUF file, and a recipe that names them.

    Models go to `models/`, adapters to `adapters/`; weights that several experts share are written once. The
    base is not converted, and neither are small models that are GGUF files already. Output biases inside the
    recipe's directory are copied. Settings for running
    models in transformers (dtype, device, quantization) are left out of the new recipe.

    Args:
        recipe: As `Recipe.read` returns it.
        output: The new recipe's directory, made if needed.
        dtype: One of `DTYPES`, for the models. Adapters are in F32 if that is F32, otherwise in F16.
        pre: As for `export_model`, for all small models.
        overwrite: Whether to replace another recipe, and other files, in `output`.
        grants: What the caller allows.

    Raises:
        UnsafeModel: The recipe asks for a right that the caller does not grant.
        UserError: As for `export_model` and `export_adapter`, before anything is written.
        RecipeError: `output` holds another recipe, or a model.
    """
    target = Path(os.path.abspath(os.path.expanduser(output)))
    if target == Path(os.path.abspath(recipe.directory)):
        raise RecipeError(
            f"{target} is the recipe that is to be exported.\nhint: choose another directory"
        )
    files = RecipeFiles(recipe, grants)
    files.check_grants()
    plans = _RecipePlans(files, target, dtype, pre)
    experts = tuple(
        replace(own, expert=plans.spec(own.expert), anti_expert=plans.spec(own.anti_expert))
        for own in recipe.experts
    )
    reference = recipe.reference_from(recipe.base.model or "", target)
    base = replace(recipe.base, model=reference)
    if is_gguf(reference):
        base = _in_llama_cpp(recipe.base, reference, None)
    mover = Mover(Path(os.path.abspath(recipe.directory)), target)
    experts = tuple(replace(own, bias=mover.small(own.bias)) for own in experts)
    exported = replace(recipe, base=base, experts=experts, directory=target, schema=None)
    exported.check_free(target, overwrite=overwrite)
    mover.check_free(overwrite=overwrite)
    for path in plans.files:
        check_output(target / path, overwrite=overwrite)
    written = tuple(
        write_file(plan, target / path, overwrite=overwrite) for path, plan in plans.files.items()
    )
    mover.copy()
    exported.write(target, overwrite=overwrite)
    return ExportedRecipe(target, written)


def _in_llama_cpp(spec: ModelSpec, model: str, adapter: str | None) -> ModelSpec:
    """Return the spec of a GGUF file, without the settings for running the model in transformers."""
    settings = spec.llama_cpp or LlamaCppSettings()
    return replace(
        ModelSpec(model=model, adapter=adapter, llama_cpp=settings),
        prompt=spec.prompt,
        chat=spec.chat,
    )


@dataclass(slots=True)
class _RecipePlans:
    """The files of a recipe to export, each planned once however many experts share it."""

    found: RecipeFiles
    target: Path
    dtype: str
    pre: str | None
    files: dict[str, PlannedFile] = field(default_factory=dict)
    _models: dict[Path, str] = field(default_factory=dict)
    _adapters: dict[tuple[Path, Path], str] = field(default_factory=dict)

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """Return how the exported recipe names a small model."""
        if spec.cut_of is not None:
            raise UnsupportedModel(
                "a small model of the recipe is cut out of the base in memory, and llama.cpp runs files.\n"
                "hint: `proxytune make-proxy BASE --output DIR` writes the cut as an ordinary model; name DIR"
            )
        if spec.model is None:
            return spec
        model = self.found.checkpoint(spec)
        if model.kind == "gguf":
            reference = self.found.recipe.reference_from(spec.model, self.target)
        else:
            place = model.directory.resolve()
            if place not in self._models:
                plan = plan_model(model, dtype=self.dtype, pre=self.pre)
                self._models[place] = self._add(plan, "models", spec.model)
            reference = self._models[place]
        return _in_llama_cpp(spec, reference, self._adapter(spec.adapter, model))

    def _adapter(self, reference: str | None, model: Checkpoint) -> str | None:
        if reference is None:
            return None
        if is_gguf(reference):
            return self.found.recipe.reference_from(reference, self.target)
        adapter = find_adapter(reference, root=self.found.recipe.directory)
        key = (adapter.path.resolve(), (model.gguf_path or model.directory).resolve())
        if key not in self._adapters:
            plan = plan_adapter(adapter, model, dtype="F32" if self.dtype == "F32" else "F16")
            self._adapters[key] = self._add(plan, "adapters", reference)
        return self._adapters[key]

    def _add(self, plan: PlannedFile, folder: str, reference: str) -> str:
        stem = f"{folder}/{last_part(reference)}"
        names = (f"{stem}.gguf", *(f"{stem}-{n}.gguf" for n in range(2, len(self.files) + 2)))
        path = next(name for name in names if name not in self.files)
        self.files[path] = plan
        return path
