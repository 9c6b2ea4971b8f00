"""A recipe's ensemble, loaded: weights once, adapters on them, vocabularies aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from proxytune.backends.api.client import Budget
from proxytune.backends.base import Backend
from proxytune.backends.exact import ExactBackend
from proxytune.backends.retokenised import RetokenisedBackend
from proxytune.checkpoints.adapter import AdapterFiles
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.cut_checkpoint import CutCheckpoint
from proxytune.checkpoints.merge import with_shapes
from proxytune.decode.ensemble import Ensemble, Member
from proxytune.errors import UnsupportedModel
from proxytune.grants import NOTHING, Grants
from proxytune.loading.doctor import examine
from proxytune.loading.members import MemberFiles, find_members
from proxytune.machine import return_free_memory
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ModelSpec
from proxytune.text.prompts import PromptFormat, Tokenizer, behave_alike
from proxytune.text.vocab import align


def load_ensemble(
    recipe: Recipe,
    budget: Budget | None = None,
    grants: Grants = NOTHING,
    *,
    is_exact: bool = False,
) -> tuple[Ensemble, tuple[PromptFormat, ...]]:
    """Check a recipe whole, then load its models, and say how each member wants its prompts.

    Args:
        recipe: What to load.
        budget: What calls to a base behind an API may cost; None for no limit.
        grants: What the caller allows.
        is_exact: Run every row in forwards of its own; see `ExactBackend`.

    Raises:
        UnsafeModel: The recipe asks for a right that the caller does not grant.
        UnsupportedModel: A model cannot be run exactly.
        UserError: A model is missing, unsafe, corrupt or does not match; see `errors.py`.
        ApiError: The API of the base cannot be reached.
    """
    if is_exact:
        _check_exact(recipe)
    files = RecipeFiles(recipe, grants)
    files.check_grants()  # before anything is imported for the recipe's models
    examine(recipe, files=files).raise_first()
    found, pairs = find_members(files)
    base = found[0].checkpoint
    checkpoints = {member.spec.weights: member.checkpoint for member in found}
    places, adapters = _places(found)
    backends = _load_backends(adapters, checkpoints, recipe.base, budget, grants)
    for backend in backends.values():
        backend.share_output(backends[places[0][0]])
    if is_exact:
        backends = {copy: ExactBackend(backend) for copy, backend in backends.items()}
    alignments = {}
    for member in found:
        weights = member.spec.weights
        if member.alignment is not None:
            alignments[weights] = member.alignment
        elif weights not in alignments:
            alignments[weights] = align(base.vocabulary, base.vocabulary)
            for copy, backend in backends.items():
                if copy.weights == weights:
                    backends[copy] = RetokenisedBackend(backend, member.checkpoint, base)
    tokenizers = _shared_tokenizers(checkpoints)
    members, formats = [], []
    for (part, spec, _, _, prompt_format, _), (copy, adapter) in zip(found, places, strict=True):
        weights = spec.weights
        model = "cut of the base" if weights.cut_of else weights.model
        name = part if model == part else f"{part} ({model})"
        alignment = alignments[weights]
        own = checkpoints[weights] if alignment.kind == "added" else None
        members.append(Member(name, backends[copy], alignment, adapter, own))
        formats.append(replace(prompt_format, tokenizer=tokenizers[weights]))
    ensemble = Ensemble(
        tuple(members),
        pairs,
        base.vocabulary,
        tuple(base.eos_token_ids),
        base.tokenizer,
        recipe.policy,
    )
    return_free_memory()  # of what was only read to check
    return ensemble, tuple(formats)


def _check_exact(recipe: Recipe) -> None:
    """Refuse models whose logits depend on more than the forwards of a row."""
    for part, spec in recipe.models.items():
        why = None
        if spec.api is not None:
            why = "runs behind an API, whose server chooses which requests it computes together"
        elif spec.cuda_graphs:
            why = (
                "is to run as CUDA graphs, whose rounded shapes differ from those of a forward that is not "
                "recorded yet"
            )
        if why is not None:
            raise UnsupportedModel(
                f"exact was asked for, and {part} {why}, so its logits can depend on more than the text.\n"
                f"hint: leave exact out{'' if spec.api is not None else ', or cuda_graphs'}"
            )


class _Copy(NamedTuple):
    """One copy of weights in memory.

    Args:
        weights: Which model, in which dtype and place.
        merged: The directory of the adapter that is merged into them.
    """

    weights: ModelSpec
    merged: Path | None = None


class _Adapters(NamedTuple):
    """The adapters on one copy of weights: what rows may choose from by name, and what is merged into it."""

    by_name: dict[str, AdapterFiles]
    merged: AdapterFiles | None = None


def _load_backends(
    adapters: Mapping[_Copy, _Adapters],
    checkpoints: Mapping[ModelSpec, Checkpoint],
    base: ModelSpec,
    budget: Budget | None,
    grants: Grants,
) -> dict[_Copy, Backend[Any]]:
    """Load each copy of weights, those that are cut out of the base after it."""
    backends: dict[_Copy, Backend[Any]] = {}
    for copy, own in adapters.items():  # the base is the first
        checkpoint = checkpoints[copy.weights]
        if isinstance(checkpoint, CutCheckpoint):
            from proxytune.backends.transformers.backend import TransformersBackend

            whole = backends[_Copy(base.weights)]
            assert isinstance(whole, TransformersBackend)
            backends[copy] = TransformersBackend.cut_out_of(whole, checkpoint, own.by_name)
        else:
            backends[copy] = _load_backend(copy, checkpoint, own, budget, grants)
    return backends


def _load_backend(
    copy: _Copy,
    checkpoint: Checkpoint,
    adapters: _Adapters,
    budget: Budget | None,
    grants: Grants,
) -> Backend[Any]:
    spec = copy.weights
    if spec.api is not None:
        from proxytune.backends.api.backend import ApiBackend

        return ApiBackend.load(spec, checkpoint, budget=budget, key_env=grants.key_env)
    if spec.llama_cpp is not None:
        from proxytune.backends.llama_cpp import LlamaCppBackend

        return LlamaCppBackend.load(checkpoint, spec, adapters.by_name)
    from proxytune.backends.transformers.backend import TransformersBackend

    return TransformersBackend.load(checkpoint, spec, adapters.by_name, adapters.merged)


def _places(
    found: Sequence[MemberFiles],
) -> tuple[list[tuple[_Copy, str | None]], dict[_Copy, _Adapters]]:
    """Return each member's copy of weights and its adapter's name there, and the adapters of each copy."""
    places: list[tuple[_Copy, str | None]] = []
    adapters: dict[_Copy, _Adapters] = {}
    for part, spec, checkpoint, files, _, _ in found:
        copy, name = _Copy(spec.weights), None
        files = None if files is None else with_shapes(files)
        if files is not None and files.why_merged(checkpoint) is not None:
            copy = _Copy(spec.weights, files.path)
            adapters.setdefault(copy, _Adapters({}, files))
        known = adapters.setdefault(copy, _Adapters({})).by_name
        if files is not None and copy.merged is None:
            name = next((name for name, other in known.items() if other.path == files.path), None)
            if name is None:
                # The number keeps experts "a.b" and "a_b" apart: adapters' names hold no dots.
                name = f"{part.replace('.', '_')}_{len(known)}"
                known[name] = files
        places.append((copy, name))
    return places, adapters


def _shared_tokenizers(checkpoints: Mapping[ModelSpec, Checkpoint]) -> dict[ModelSpec, Tokenizer]:
    """Return a tokenizer for each model, the same one for all that cut text alike.

    A prompt is then cut once for all of them, and a tokenizer of 50,000 tokens takes 15 MB.
    """
    shared: dict[ModelSpec, Tokenizer] = {}
    for weights, checkpoint in checkpoints.items():
        own = checkpoint.tokenizer
        shared[weights] = next((t for t in shared.values() if behave_alike(t, own)), own)
    return shared
