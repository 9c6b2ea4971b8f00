"""The recipe: which models make a steered one, and how they combine. It is read, checked and written here.

`directory.py` has the files beside config.json. Whether the models exist and fit together is examined in
`loading/doctor.py`. Unknown keys are refused at every level, because a misspelt one would silently change the
result.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from proxytune.checkpoints.references import is_gguf
from proxytune.checkpoints.untrusted import CONFIG_BYTES, LIST_BYTES, check_link, read_regular
from proxytune.errors import (
    CorruptModel,
    InvalidRequest,
    RecipeError,
    UnknownExpert,
    did_you_mean,
)
from proxytune.files import write_whole, writing
from proxytune.policy import Policy, needs_all_logits
from proxytune.recipe.card import model_card
from proxytune.recipe.checks import (
    as_json,
    as_object,
    check_fields,
    check_keys,
    check_required,
    check_text,
    parse_json,
    recipe_key,
)
from proxytune.recipe.directory import (
    LOADER,
    LOADER_NAME,
    Mover,
    find_recipe,
    may_write_loader,
    read_config,
    reference_from,
)
from proxytune.recipe.spec import (
    FOR_TRANSFORMERS,
    ExpertSpec,
    LlamaCppSettings,
    ModelSpec,
    expert_spec,
    model_spec,
)
from proxytune.request import Steering

VOCABULARIES = ("same", "map")
"""What happens to small models whose tokenizer differs from the base's."""

MAX_EXPERTS = 20_000
"""Maximum number of experts of a recipe."""

MODEL_TYPE = "proxytune"
ARCHITECTURE = "ProxyTunedForCausalLM"

AUTO_MAP = {
    "AutoConfig": "modeling_proxytune.ProxyTunedConfig",
    "AutoModelForCausalLM": "modeling_proxytune.ProxyTunedForCausalLM",
}
"""Where config.json leads transformers' Auto classes, which do not know recipes."""

_OWN_KEYS = (
    "model_type", "architectures", "base", "experts", "combine", "steering", "default_expert", "vocabulary",
    "$schema",
)  # fmt: skip
METADATA_KEYS = frozenset((
    "_commit_hash", "_name_or_path", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache", "vocab_size",
))  # fmt: skip
"""Keys that transformers writes into any config.json; they are allowed and ignored here."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Base and experts of a steered model.

    Args:
        base: The large model.
        experts: One or more, each with its own name.
        policy: How strongly and by which experts to steer at each token. Default: offsets are added up.
        default_expert: The expert that steers when a request names none; None for all of them.
        vocabulary: Whether small models with another tokenizer than the base's are refused (`same`), or
            steer the tokens that both have (`map`).
        directory: The recipe's directory, from which relative references start.
        schema: Where an editor finds the format as JSON Schema, `$schema` in the file; kept but not read.

    Raises:
        RecipeError: The parts do not form a recipe.
    """

    base: ModelSpec
    experts: tuple[ExpertSpec, ...]
    policy: Policy = field(default_factory=Policy)
    default_expert: str | None = recipe_key()
    vocabulary: str = recipe_key("same", choices=VOCABULARIES)
    directory: Path = field(default_factory=Path.cwd, compare=False)
    schema: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.base.model is None:
            raise RecipeError('base has no model.\nhint: {"model": "owner/name"}')
        if self.base.adapter is not None:
            raise RecipeError(
                "base has an adapter, but a base is never changed.\n"
                "hint: merge the adapter into it with PEFT's merge_and_unload, and name the result"
            )
        if not self.experts:
            raise RecipeError("experts is empty; a recipe needs at least one.\nhint: add an expert")
        names = [expert.name for expert in self.experts]
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise RecipeError(f"two experts are called {name!r}.\nhint: give each its own name")
        check_fields(self)
        self._check_cuts()
        if self.base.api is not None:
            self._check_api()
        if self.default_expert is not None and self.default_expert not in names:
            raise RecipeError(
                f"default_expert is {as_json(self.default_expert)}, but the experts are {_listed(names)}"
                f"{did_you_mean(self.default_expert, names)}"
            )

    def _check_cuts(self) -> None:
        """Refuse cuts of a base whose layers are not here, or not as they are stored."""
        base = self.base
        if base.cut_of is not None:
            raise RecipeError(
                'the base is {"cut_of": "base"}, a cut of itself.\nhint: name its model'
            )
        cut = next((part for part, spec in self.models.items() if spec.cut_of), None)
        if cut is None:
            return
        why = None
        if base.api is not None:
            why = "the base is behind an API"
        elif base.llama_cpp is not None:
            why = "llama.cpp runs the base, and does not lend its layers"
        elif base.quantization is not None:
            why = "the base is quantised when it is loaded"
        elif base.device == "auto":
            why = "the base is spread over devices"
        elif base.cuda_graphs:
            why = "the base runs as CUDA graphs"
        if why is not None:
            raise RecipeError(
                f"{cut} is cut out of the base in memory, and {why}.\n"
                "hint: `proxytune make-proxy BASE --output DIR` writes the cut as an ordinary model; name DIR"
            )

    def _check_api(self) -> None:
        """Refuse what needs all logits of a base that is behind an API."""
        for expert in self.experts:
            if expert.expert.same_as or expert.anti_expert.same_as:
                raise RecipeError(
                    f'the base is behind an API, and expert {expert.name!r} has {{"same_as": "base"}}, but '
                    "an API shows only some logits.\nhint: name small models for both sides"
                )
        if self.policy.reads_base:
            raise RecipeError(needs_all_logits(self.policy))
        weighted = next((e.name for e in self.experts if e.weights.base != 1), None)
        if weighted is not None and not self.policy.is_plain:
            raise RecipeError(
                f"the base is behind an API, and expert {weighted!r} gives it a weight other than 1. Under "
                f"the policy {self.policy.describe()} that needs all logits, and an API shows only some.\n"
                "hint: leave out the policy, or the base's weight"
            )

    @classmethod
    def read(cls, reference: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a local directory, `package:NAME/PATH`, or the Hub.

        Raises:
            RecipeError: Nothing is there, or it is malformed.
        """
        directory = find_recipe(os.fspath(reference))
        path = directory / "config.json"
        if not os.path.lexists(path):
            raise RecipeError(
                f"no recipe at {directory}: config.json cannot be read (no such file).\n"
                "hint: write a recipe with `proxytune new`"
            )
        try:
            check_link(path, directory)
            content = read_regular(path, at_most=LIST_BYTES)
        except CorruptModel as error:
            raise RecipeError(f"no recipe at {directory}: {error}") from error
        try:
            return cls.from_json(content, directory=directory)
        except RecipeError as error:
            raise RecipeError(f"the recipe {path} cannot be used: {error}") from error

    @classmethod
    def from_json(cls, content: bytes | str, *, directory: Path | None = None) -> Recipe:
        """Build a recipe from the content of its config.json.

        Raises:
            RecipeError: It is not JSON, has a key twice, holds NaN or infinity, or is not a recipe.
        """
        return cls.from_dict(parse_json(content), directory=directory)

    @classmethod
    def from_dict(cls, data: Any, *, directory: Path | None = None) -> Recipe:
        """Build a recipe from the object of its config.json.

        Args:
            data: The object as `to_dict` returns it; keys that transformers adds to any config are ignored.
            directory: Directory from which relative references start; None for the working directory.

        Raises:
            RecipeError: A key is unknown or missing, or a value cannot be used; the message names its place.
        """
        data = as_object(data, "the recipe")
        _check_model_type(data.get("model_type"))
        own = [key for key in data if key not in METADATA_KEYS]
        check_keys(own, known=_OWN_KEYS, place="the recipe")
        check_required(data, ("base", "experts"), "the recipe")
        experts = data["experts"]
        if not isinstance(experts, list):
            raise RecipeError(f"experts is {as_json(experts)}, and must be a list of objects")
        if len(experts) > MAX_EXPERTS:
            raise RecipeError(
                f"there are {len(experts):,} experts, and a recipe may have {MAX_EXPERTS:,}.\n"
                "hint: write several recipes"
            )
        combine = data.get("combine", "sum")
        check_text(combine, "combine")
        steering = as_object(data.get("steering") or {}, "steering")
        try:
            policy = Policy.from_dict(steering, combine=combine)
        except InvalidRequest as error:
            raise RecipeError(f"steering: {error}" if steering else str(error)) from error
        schema = data.get("$schema")
        if schema is not None:
            check_text(schema, "$schema")
        return cls(
            base=model_spec(data["base"], "base"),
            experts=tuple(expert_spec(e, f"experts[{i}]") for i, e in enumerate(experts)),
            policy=policy,
            default_expert=data.get("default_expert"),
            vocabulary=data.get("vocabulary", "same"),
            directory=Path.cwd() if directory is None else directory,
            schema=schema,
        )

    @property
    def models(self) -> dict[str, ModelSpec]:
        """Its models by part: `base`, and `NAME.expert` and `NAME.anti_expert` of each expert."""
        found = {"base": self.base}
        for expert in self.experts:
            found[f"{expert.name}.expert"] = expert.expert
            found[f"{expert.name}.anti_expert"] = expert.anti_expert
        return found

    @property
    def base_tokenizer(self) -> ModelSpec:
        """The model that provides the base's tokenizer: the base, or another if it is behind an API."""
        if self.base.api is None:
            return self.base.weights
        if self.base.api.tokenizer is not None:
            return ModelSpec(model=self.base.api.tokenizer)
        return replace(self.experts[0].anti_expert.weights, llama_cpp=None)

    def with_settings(
        self,
        *,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        cuda_graphs: bool | None = None,
    ) -> Recipe:
        """Return the recipe with these settings in all models of transformers; None keeps each its own."""
        given = {
            "device": device,
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "cuda_graphs": cuda_graphs,
        }
        changes: dict[str, Any] = {k: value for k, value in given.items() if value is not None}

        def changed(spec: ModelSpec) -> ModelSpec:
            is_elsewhere = spec.same_as or spec.cut_of or spec.llama_cpp or spec.api
            return spec if is_elsewhere else replace(spec, **changes)

        return self.with_models(changed)

    def with_llama_cpp(self, *, only_where_set: bool = False, **settings: int | None) -> Recipe:
        """Return the recipe with every `.gguf` file run by llama.cpp, with these settings.

        Args:
            only_where_set: Change only models that the recipe runs with llama.cpp already.
            settings: Fields of `LlamaCppSettings`; None keeps each model's own.

        Raises:
            RecipeError: The recipe names no `.gguf` file, or a setting cannot be used.
        """
        given: dict[str, Any] = {k: value for k, value in settings.items() if value is not None}
        if not any(spec.model and is_gguf(spec.model) for spec in self.models.values()):
            raise RecipeError(
                "the recipe names no .gguf file, so llama.cpp has nothing to run.\n"
                "hint: make one with `proxytune export-gguf`"
            )

        def changed(spec: ModelSpec) -> ModelSpec:
            if spec.model is None or not is_gguf(spec.model):
                return spec
            if only_where_set and spec.llama_cpp is None:
                return spec
            own = spec.llama_cpp or LlamaCppSettings()
            return replace(spec, **FOR_TRANSFORMERS, llama_cpp=replace(own, **given))

        return self.with_models(changed)

    def with_models(self, changed: Callable[[ModelSpec], ModelSpec]) -> Recipe:
        """Return the recipe with each of its models changed."""
        experts = tuple(
            replace(e, expert=changed(e.expert), anti_expert=changed(e.anti_expert))
            for e in self.experts
        )
        return replace(self, base=changed(self.base), experts=experts)

    def to_dict(self) -> dict[str, Any]:
        """Return the object of config.json; `from_dict` reads it back."""
        content: dict[str, Any] = {} if self.schema is None else {"$schema": self.schema}
        content |= {
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            "base": self.base.to_dict(),
            "experts": [expert.to_dict() for expert in self.experts],
            "combine": self.policy.combine,
        }
        if steering := self.policy.to_dict():
            content["steering"] = steering
        if self.default_expert is not None:
            content["default_expert"] = self.default_expert
        if self.vocabulary != "same":
            content["vocabulary"] = self.vocabulary
        return content

    def write(
        self, directory: str | os.PathLike[str], *, overwrite: bool = False, card: str | None = None
    ) -> Recipe:
        """Write the recipe into a directory and return it as written there.

        Local paths are rewritten so that they lead to the same files from there, and adapters, bridges and
        output biases inside the recipe's own directory are copied along. A model card, and the file that
        leads transformers to this package, are written if missing; those that this method wrote and nobody
        edited are replaced.

        Args:
            directory: Where to write; made if it is missing.
            overwrite: Whether to replace another recipe that is there.
            card: The model card to write, replacing any that is there; None for the recipe's own.

        Raises:
            RecipeError: Another recipe, or a model, is there, or another file where one is to be copied.
            OutputFileError: The directory cannot be written.
        """
        target = Path(os.path.abspath(os.path.expanduser(os.fspath(directory))))
        source = Path(os.path.abspath(self.directory))
        mover = Mover(source, target)
        moved = self if source == target else self._moved(mover)
        moved.check_free(target, overwrite=overwrite)
        mover.check_free(overwrite=overwrite)
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            mover.copy()
            whole = {**moved.to_dict(), "auto_map": AUTO_MAP}
            content = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
            if may_write_loader(target):
                write_whole(target / LOADER_NAME, LOADER)
            if card is not None or _may_write_card(target):
                write_whole(target / "README.md", card or moved.model_card())
            write_whole(target / "config.json", content + "\n")
        return replace(moved, directory=target)

    def _moved(self, mover: Mover) -> Recipe:
        """Return the recipe as it is written elsewhere."""
        moved = self.with_models(mover.model)
        experts = tuple(replace(each, bias=mover.small(each.bias)) for each in moved.experts)
        return replace(moved, experts=experts)

    def reference_from(self, reference: str, target: Path) -> str:
        """Return a model's reference, rewritten so that it leads to the same files from `target`."""
        return reference_from(Path(os.path.abspath(self.directory)), reference, target)

    def check_free(self, target: Path, *, overwrite: bool) -> None:
        """Check that `target` is free, or holds the same recipe, or another that may be replaced.

        Raises:
            RecipeError: It would.
        """
        content = read_config(target)
        kind = content.get("model_type") if isinstance(content, dict) else None
        if kind is not None and kind != MODEL_TYPE:
            raise RecipeError(
                f"{target} holds a model of type {as_json(kind)}, which a recipe must not replace.\n"
                "hint: name another directory"
            )
        if overwrite or not (target / "config.json").exists():
            return
        try:
            is_same = Recipe.from_dict(content).to_dict() == self.to_dict()
        except RecipeError:
            is_same = False
        if not is_same:
            raise RecipeError(
                f"{target} holds another recipe, which would be lost.\n"
                "hint: name another directory, or delete that recipe first"
            )

    def named(self, names: str | Iterable[str] | None = None) -> tuple[str, ...]:
        """Return the names of the experts that steer, each once: these, or for None the recipe's default.

        Raises:
            UnknownExpert: The recipe has no expert of that name.
            InvalidRequest: No expert is named.
        """
        known = {expert.name: None for expert in self.experts}
        if names is None:
            return tuple(known) if self.default_expert is None else (self.default_expert,)
        wanted = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        if not wanted:
            raise InvalidRequest(
                "no expert is named.\nhint: leave experts out for the recipe's default"
            )
        for name in wanted:
            if name not in known:
                raise UnknownExpert(
                    f"the recipe has no expert {name!r}; it has {_listed(list(known))}"
                    f"{did_you_mean(name, list(known))}"
                )
        return wanted

    def only(self, names: Iterable[str] | None) -> Recipe:
        """Return the recipe with these experts alone; None keeps all.

        Raises:
            UnknownExpert: The recipe has no expert of that name.
            InvalidRequest: No expert is named.
        """
        if names is None:
            return self
        wanted = self.named(names)
        names_kept = set(wanted)
        kept = tuple(expert for expert in self.experts if expert.name in names_kept)
        default = self.default_expert if self.default_expert in wanted else None
        return replace(self, experts=kept, default_expert=default)

    def strengths(self, steering: Steering | None = None) -> dict[str, float]:
        """Return the strength of each expert that steers, by name; None takes the recipe's own.

        Raises:
            UnknownExpert: The recipe has no expert of that name.
        """
        steering = steering or Steering()
        names = self.named(steering.experts)
        if isinstance(steering.experts, Mapping):
            return {name: float(steering.experts[name]) for name in names}
        own = {expert.name: expert.alpha for expert in self.experts}
        alpha = steering.alpha
        return {name: own[name] if alpha is None else float(alpha) for name in names}

    def policy_for(self, steering: Steering) -> Policy:
        """Return the policy by which a request is steered: any that the recipe itself could have.

        Raises:
            InvalidRequest: What is asked for does not go together with the recipe's own settings, or needs
                more than its base shows.
        """
        policy = steering.policy_over(self.policy)
        if policy.reads_base and self.base.api is not None:
            raise InvalidRequest(needs_all_logits(policy))
        return policy

    def mixed(
        self, own: Mapping[str, float | None], alpha: float | None, *, name: str = "alpha"
    ) -> Steering:
        """Return the steering by experts of which some bring a strength and the others, with None, do not.

        Args:
            own: The strength that each expert brings.
            alpha: Strength of the others; None for the recipe's.
            name: How errors call `alpha`.

        Raises:
            UnknownExpert: The recipe has no expert of that name.
            InvalidRequest: A strength is not a finite number, or `alpha` would do nothing.
        """
        chosen = self.strengths(Steering(alpha, tuple(own)))
        if all(strength is None for strength in own.values()):
            return Steering(alpha, tuple(own))
        if alpha is not None and None not in own.values():
            raise InvalidRequest(
                f"{name} is given, and every expert brings its own strength, so {name} would do nothing.\n"
                f"hint: leave {name} out, or give an expert without a strength"
            )
        experts = {n: chosen[n] if alone is None else alone for n, alone in own.items()}
        return Steering(experts=experts)

    def model_card(self) -> str:
        """Return a README.md with the metadata that the Hub reads."""
        return model_card(self.models, self.experts, self.policy, self.directory)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _may_write_card(target: Path) -> bool:
    """Whether the directory has no model card, or the one that its recipe was written with."""
    try:
        there = read_regular(target / "README.md", at_most=CONFIG_BYTES).decode()
        return there == Recipe.read(target).model_card()
    except (CorruptModel, UnicodeDecodeError, RecipeError):
        return not os.path.lexists(target / "README.md")


def _check_model_type(kind: Any) -> None:
    if kind == MODEL_TYPE:
        return
    if isinstance(kind, str):
        raise RecipeError(
            f"model_type is {as_json(kind)}, so this is a model and not a recipe.\n"
            "hint: write a recipe that names it with `proxytune new DIR --base …`"
        )
    raise RecipeError(
        f'model_type is {as_json(kind)}, and must be "{MODEL_TYPE}".\n'
        f'hint: add "model_type": "{MODEL_TYPE}"'
    )
