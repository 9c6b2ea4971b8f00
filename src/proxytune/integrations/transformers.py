"""A recipe as a transformers model: `ProxyTunedForCausalLM`, for `generate`, pipelines and harnesses.

    model = AutoModelForCausalLM.from_pretrained("my-recipe", trust_remote_code=True)

or, after `import proxytune`, without `trust_remote_code`. The members run in the transformers backend, and
the formula is in `logits/steer.py`. This file adds the interface that transformers expects: a forward with
logits and loss, and one KV cache for all members (`ensemble_cache.py`). All models read one stream of tokens,
the base's, so recipes whose models need different prompts are refused.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from proxytune.errors import InvalidRequest, RecipeError, UnsupportedModel
from proxytune.files import writing
from proxytune.grants import NOTHING, Grants
from proxytune.integrations.auto import (
    HUB_OPTIONS,
    ProxyTunedConfig,
    check_one_prompt,
    grants_of,
    read_recipe,
    refuse_options,
)
from proxytune.integrations.ensemble_cache import (
    CACHE_OPTION,
    CachedMembers,
    ProxyTunedCache,
    own_cache,
)
from proxytune.integrations.frozen import FrozenModels
from proxytune.integrations.generation import SteeredGenerationMixin
from proxytune.measure.score import smallest_context
from proxytune.request import Experts, Steering

if TYPE_CHECKING:
    from proxytune.decode.ensemble import Ensemble, Member
    from proxytune.model import ProxyTuned
    from proxytune.recipe.recipe import Recipe

__all__ = ["ProxyTunedCache", "ProxyTunedForCausalLM", "register_model"]

_NO_EFFECT = (
    "low_cpu_mem_usage", "use_safetensors", "adapter_kwargs", "max_shard_size", "safe_serialization",
    "code_revision",
)  # fmt: skip
"""Options that have no effect: they concern files that are not read here.

A recipe has no weights of its own.
"""

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

_PUSH_OPTIONS = (
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
)
_LOSS_OPTIONS = ("num_items_in_batch", "shift_labels", "ignore_index")


class ProxyTunedForCausalLM(FrozenModels, SteeredGenerationMixin, PreTrainedModel):  # type: ignore[no-untyped-call]
    """A base steered by experts, as a causal language model of transformers.

    Logits are float32, and -inf at padding ids of the base's vocabulary. The members are frozen. Pass `alpha`
    and `experts` to `forward` or `generate`, or set them for all calls with `set_steering`.

    Args:
        config: The recipe as a config.
        proxy_tuned: The recipe's loaded models; None to load them.

    Raises:
        UnsupportedModel: The recipe's models need different prompts.
        UserError: A model is missing, unsafe, corrupt or does not match; see `errors.py`.
    """

    config_class = ProxyTunedConfig
    config: ProxyTunedConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: ProxyTunedConfig, proxy_tuned: ProxyTuned | None = None) -> None:
        # Members choose their own attention; transformers would check this value against this class.
        config._attn_implementation_internal = None
        super().__init__(config)
        if proxy_tuned is None:
            proxy_tuned = _load(config.recipe(), NOTHING)
        # Not the recipe as loaded: a dtype or device given to `from_pretrained` is not to be saved.
        self.recipe = config.recipe(proxy_tuned.recipe.directory)
        self._ensemble = proxy_tuned.ensemble
        backends: list[Any] = [member.backend for member in self._ensemble.members]
        unique = [b for i, b in enumerate(backends) if b not in backends[:i]]
        self.members = nn.ModuleList([backend.model for backend in unique])
        padding_ids = self._ensemble.vocabulary.padding_ids
        self.register_buffer("_padding_ids", padding_ids, persistent=False)
        self._is_stateful = not all(backend.capabilities.can_rewind for backend in unique)
        self._set_attributes()
        self._steering = Steering()
        self.train(False)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: transformers would save a copy of this file, and recipes have a module of their own."""

    def _set_attributes(self) -> None:
        """Set what transformers and evaluation harnesses look up on a model and its config."""
        base: Any = self.members[0]
        self.config.vocab_size = self._ensemble.vocabulary.width
        self.config.max_position_embeddings = smallest_context(self._ensemble.members)
        base_config = base.config.get_text_config()
        for key in _SPECIAL_TOKENS:  # Pipelines compare them with an assistant's.
            setattr(self.config, key, getattr(base_config, key, None))
        devices: list[dict[str, Any]] = [getattr(m, "hf_device_map", {}) for m in self.members]
        is_spread = any(len(set(places.values())) > 1 for places in devices)
        if is_spread or any(getattr(member, "is_quantized", False) for member in self.members):
            self.hf_device_map = dict(devices[0]) or {"": base.device}
        self.generation_config = _generation_defaults(self._ensemble, base)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> ProxyTunedForCausalLM:
        """Load a recipe's models.

        Args:
            pretrained_model_name_or_path: The recipe: a directory or a Hub id.
            *model_args: Must be empty.
            config: The recipe as a config, if it was read before; it may have been changed since.
            **kwargs: `dtype`, `device_map` (a device, or `auto`) and `attn_implementation`, each for all
                models; `generation_config`; `trust_remote_code`, `allow_pickle` and `key_env` as in
                `ProxyTuned.load`; and transformers' options for the Hub. Other options are refused by name.

        Raises:
            UnsafeModel: The recipe asks for a right that the caller does not grant.
            UnsupportedModel: An option cannot be honoured, or the models need different prompts.
            RecipeError: The recipe is missing or malformed.
            UserError: A model is missing, unsafe, corrupt or does not match; see `errors.py`.
        """
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        recipe = read_recipe(pretrained_model_name_or_path, hub)
        if model_args:
            raise UnsupportedModel(
                "from_pretrained takes no positional argument other than the recipe's directory or Hub id"
            )
        if isinstance(config, ProxyTunedConfig):
            recipe = config.recipe(recipe.directory)
        generation_config = kwargs.pop("generation_config", None)
        if generation_config is None and (recipe.directory / GENERATION_CONFIG_NAME).is_file():
            generation_config = GenerationConfig.from_pretrained(recipe.directory)
        model = cls._from_recipe(recipe, config, kwargs)
        if generation_config is not None:
            model.generation_config = generation_config
        return model

    @classmethod
    def _from_config(cls, config: ProxyTunedConfig, **kwargs: Any) -> ProxyTunedForCausalLM:
        """Load a recipe's models: a recipe has no weights of its own to initialise at random."""
        return cls._from_recipe(config.recipe(), config, kwargs)

    @classmethod
    def _from_recipe(
        cls, recipe: Recipe, config: ProxyTunedConfig | None, options: dict[str, Any]
    ) -> ProxyTunedForCausalLM:
        for key in (
            "output_attentions",
            "output_hidden_states",
        ):  # AutoConfig puts them into the config
            if getattr(config, key, False):
                raise UnsupportedModel(
                    f"{key} is true, but the output of several models has no place for it.\n"
                    f"hint: leave {key} out"
                )
        attention = options.pop("attn_implementation", None)
        if config is not None and attention is None:
            attention = config._attn_implementation_internal  # where AutoConfig puts the option
        if attention is not None:
            recipe = recipe.with_settings(attn_implementation=str(attention))
        proxy_tuned = _load_with_options(recipe, options)
        return cls(ProxyTunedConfig.from_recipe(recipe) if config is None else config, proxy_tuned)

    def set_steering(self, *, alpha: float | None = None, experts: Experts | None = None) -> None:
        """Set the strength and the experts for all calls that give none.

        Args:
            alpha: Strength of steering; None for the recipe's.
            experts: A name, names, or names with strengths; None for the recipe's default.

        Raises:
            UnknownExpert: The recipe has no expert of that name.
            InvalidRequest: A strength is not finite, or given twice.
        """
        steering = Steering(alpha, experts)
        self.recipe.strengths(steering)
        self._steering = steering

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        alpha: float | None = None,
        experts: Experts | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return steered logits, and the loss if labels are given.

        Args:
            input_ids: `[batch, num_tokens]`, of the base's vocabulary.
            attention_mask: `[batch, kept + num_tokens]`, 0 at padding.
            position_ids: `[batch, num_tokens]`; None to count from the mask.
            past_key_values: A `ProxyTunedCache` that an earlier forward returned.
            labels: `[batch, num_tokens]`, -100 at tokens without a loss; they are shifted here.
            use_cache: Whether to keep keys and values; None keeps them.
            logits_to_keep: Number of last positions, or indices of positions, that get logits; 0 for all.
            alpha: Strength of steering; None for the one set with `set_steering`.
            experts: As in `set_steering`; None for those set there.
            cache: The same as `past_key_values`, by its name in transformers from 5.24 on.
            **kwargs: Options that transformers passes to every model.

        Returns:
            `CausalLMOutputWithPast` with logits `[batch, num_tokens, vocab]` in float32.

        Raises:
            InvalidRequest: An option cannot be honoured, or the model lacks a token id.
            PromptTooLong: A row exceeds a model's context.
            UnknownExpert: The recipe has no expert of that name.
            BackendError: A model failed.
        """
        loss_options = {key: kwargs.pop(key) for key in _LOSS_OPTIONS if key in kwargs}
        return_dict = kwargs.pop("return_dict", None)
        input_ids = _checked_ids(input_ids, kwargs)
        pairs = self._steering_pairs(Steering(alpha, experts))
        steering = [index for index, _ in pairs]
        if cache is None:
            cache = past_key_values
        kept = self._cache(cache, steering) if use_cache is not False else None
        backends = _members_by_backend(self._ensemble, steering) if kept is None else kept.backends
        num_kept = 0 if kept is None else kept.num_slots
        attention_mask, position_ids = _mask_and_positions(
            input_ids, attention_mask, position_ids, num_kept
        )
        num_logits = logits_to_keep if isinstance(logits_to_keep, int) else 0
        logits: dict[int, Tensor] = {}
        for each in backends:
            logits |= each.run(
                input_ids, attention_mask, position_ids, num_kept=num_kept, num_logits=num_logits
            )
        if kept is not None:
            kept.num_slots += input_ids.shape[1]
            kept.num_rows = input_ids.shape[0]
        padding_ids: Any = self._padding_ids
        steered = _steer(self._ensemble, logits, pairs, padding_ids)
        if not isinstance(logits_to_keep, int):
            steered = steered[:, logits_to_keep.to(steered.device)]
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=steered, labels=labels, vocab_size=steered.shape[-1], **loss_options
            )
        fields: dict[str, Any] = {"loss": loss, "logits": steered, CACHE_OPTION: kept}
        output = CausalLMOutputWithPast(**fields)
        return output.to_tuple() if return_dict is False else output

    def _steering_pairs(self, asked: Steering) -> list[tuple[int, float]]:
        """Return the indices and strengths of the pairs that steer; a pair with strength 0 does not run."""
        strengths = self.recipe.strengths(asked.over(self._steering))
        return [
            (index, strengths[pair.name])
            for index, pair in enumerate(self._ensemble.pairs)
            if strengths.get(pair.name)
        ]

    def _cache(self, given: Cache | None, pairs: Sequence[int]) -> ProxyTunedCache:
        """Return the given cache if it holds the members of these pairs, or a new one if it is empty or None.

        Raises:
            InvalidRequest: The given cache lacks a member, or belongs to a single model.
        """
        backends = _members_by_backend(self._ensemble, pairs)
        if isinstance(given, ProxyTunedCache) and given.num_slots:
            missing = {index for each in backends for index in each.members} - set(given.members)
            if missing:
                names = ", ".join(self._ensemble.members[index].name for index in sorted(missing))
                raise InvalidRequest(
                    f"the cache was begun without {names}, so it lacks their keys and values of the earlier "
                    "tokens.\nhint: choose experts and an alpha other than 0 before the first token"
                )
            return given
        cache = own_cache(given)
        for each in backends:
            each.cache = each.backend.new_cache()
        cache.backends = backends
        return cache

    def _members_that_run(self, alpha: float | None, experts: Experts | None) -> list[Member]:
        """Return the members that run with this steering."""
        pairs = [index for index, _ in self._steering_pairs(Steering(alpha, experts))]
        return [
            member
            for each in _members_by_backend(self._ensemble, pairs)
            for member in each.members.values()
        ]

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's embedding."""
        base: Any = self.members[0]
        return cast(nn.Module, base.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        """Return the base's output head."""
        base: Any = self.members[0]
        return cast(nn.Module, base.get_output_embeddings())

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the recipe, without any model's weights.

        Adapters and output biases inside the recipe's directory are copied. Other local paths are rewritten
        so that they lead to the same files from the new directory. Steering set with `set_steering` is not
        part of the recipe.

        Args:
            save_directory: Output directory, created if missing.
            is_main_process: Whether to write anything; transformers passes False in all but one process.
            push_to_hub: Also upload the recipe, with `repo_id` and the options of `push_to_hub`.
            **kwargs: Options of `push_to_hub`, and transformers' options for weight files.

        Raises:
            RecipeError: The directory holds another recipe or a model.
            OutputFileError: The directory cannot be written.
            UnsupportedModel: An option cannot be honoured.
        """
        repo_id = kwargs.pop("repo_id", None)
        hub = {key: kwargs.pop(key) for key in _PUSH_OPTIONS if key in kwargs}
        refuse_options(kwargs, ignored=_NO_EFFECT)
        if not is_main_process:
            return
        target = Path(save_directory)
        card = self.recipe.directory / "README.md"
        is_new = not (target / "README.md").exists()
        self.config.recipe(self.recipe.directory).write(target)
        if is_new and card.is_file() and card.parent.resolve() != target.resolve():
            with writing(target):
                shutil.copyfile(card, target / "README.md")
        saved = target / GENERATION_CONFIG_NAME
        defaults = _generation_defaults(self._ensemble, self.members[0])
        if self.generation_config != defaults or saved.exists():
            with writing(target):
                self.generation_config.save_pretrained(target)
        if push_to_hub:
            self.push_to_hub(repo_id or target.name, **hub)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the recipe to the Hub, without any model's weights, and return the commit's URL.

        Raises:
            RecipeError: A model is a local path, which nobody else could load.
        """
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as place:
            directory = Path(place) / "recipe"
            self.save_pretrained(directory)
            _check_portable(directory)
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message or "Upload recipe",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
            return str(commit)


def _load_with_options(recipe: Recipe, options: dict[str, Any]) -> ProxyTuned:
    """Load a recipe with options of `from_pretrained`, or refuse them."""
    dtype = options.pop("dtype", None)
    dtype = options.pop("torch_dtype", None) if dtype is None else dtype
    device = _device_name(options.pop("device_map", None))
    if options.get("use_safetensors") is False:
        raise UnsupportedModel(
            "use_safetensors is False, but a recipe says for each model whether pickled weights may be "
            "read.\nhint: leave it out, and give allow_pickle=True to grant what the recipe asks for"
        )
    if options.get("exact"):
        raise UnsupportedModel(
            "exact was given, but transformers' generate pads the rows of a batch and runs them together.\n"
            "hint: use proxytune.ProxyTuned.load(..., exact=True) or `proxytune generate --exact`"
        )
    grants = grants_of(options)
    refuse_options(options, ignored=_NO_EFFECT)
    dtype = None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
    return _load(recipe, grants, device=device, dtype=dtype)


def _load(
    recipe: Recipe, grants: Grants, *, device: str | None = None, dtype: str | None = None
) -> ProxyTuned:
    """Load a recipe whose models all read one stream of tokens, without a policy that needs its start."""
    from proxytune.model import ProxyTuned

    for part, spec in recipe.models.items():
        if spec.api is not None or spec.llama_cpp is not None:
            place = "behind an API" if spec.api is not None else "in llama.cpp"
            raise UnsupportedModel(
                f"{part} runs {place}, and transformers' generate needs every model in transformers.\n"
                "hint: use proxytune.ProxyTuned, `proxytune generate` or `proxytune serve`"
            )
    if recipe.policy.has_positions:
        raise UnsupportedModel(
            "the recipe's steering has a schedule, but transformers' generate does not show a model where "
            "its prompt ended.\nhint: leave schedule out, or use proxytune.ProxyTuned or `proxytune generate`"
        )
    hint = "use proxytune.ProxyTuned or `proxytune generate`, which render a prompt for each model"
    check_one_prompt(recipe, engine="transformers' generate", hint=hint)
    return ProxyTuned.load(recipe, device=device, dtype=dtype, **asdict(grants))


def _generation_defaults(ensemble: Ensemble, base: Any) -> Any:
    """Return the base's generation settings, with the ensemble's end-of-sequence and padding tokens."""
    settings: Any = copy.deepcopy(base.generation_config)
    settings.cache_implementation = None  # each member chooses its own
    eos = list(ensemble.eos_token_ids)
    if eos:
        settings.eos_token_id = eos
    if settings.pad_token_id is None:
        pad: Any = getattr(ensemble.tokenizer, "pad_token_id", None)
        has_pad = isinstance(pad, int) and pad < ensemble.vocabulary.width
        settings.pad_token_id = pad if has_pad else (eos[0] if eos else None)
    return settings


def _members_by_backend(ensemble: Ensemble, pairs: Sequence[int]) -> list[CachedMembers]:
    """Group the base and the members of the given pairs by backend, the base's first; without caches."""
    needed = {0}
    for index in pairs:
        needed |= {ensemble.pairs[index].expert, ensemble.pairs[index].anti_expert}
    groups: dict[int, CachedMembers] = {}
    for index in sorted(needed):
        member = ensemble.members[index]
        backend: Any = member.backend
        groups.setdefault(id(backend), CachedMembers(backend, {})).members[index] = member
    return list(groups.values())


def _steer(
    ensemble: Ensemble,
    logits: Mapping[int, Tensor],
    pairs: Sequence[tuple[int, float]],
    padding_ids: Tensor,
) -> Tensor:
    """Return steered logits, -inf at padding ids, from those of each member; all `[batch, tokens, vocab]`."""
    from proxytune.logits.rules import apply_policy

    base = logits[0]
    width = base.shape[-1]

    def flat(member: int) -> Tensor:
        return logits[member].to(base.device).reshape(-1, width)

    steering = [(ensemble.pairs[i], alpha) for i, alpha in pairs]
    contributions = [
        pair.contribution(flat(pair.expert), flat(pair.anti_expert), alpha, base_logits=flat(0))
        for pair, alpha in steering
    ]
    found = apply_policy(ensemble.policy, flat(0), contributions, padding_ids=padding_ids)
    steered = found.logits.reshape(base.shape)
    if len(padding_ids):
        steered = steered.index_fill(-1, padding_ids.to(steered.device), -torch.inf)
    return steered


def _check_portable(directory: Path) -> None:
    """Refuse a written recipe with paths that lead out of its directory."""
    from proxytune.checkpoints.references import local_path
    from proxytune.recipe.recipe import Recipe

    recipe = Recipe.read(directory)
    references = [
        r for spec in recipe.models.values() for r in (spec.model, spec.adapter, spec.bridge)
    ]
    references += [expert.bias for expert in recipe.experts]
    for reference in (r for r in references if r is not None):
        path = None
        if not reference.startswith("package:"):
            path = local_path(reference, root=directory)
        if path is not None and not path.resolve().is_relative_to(directory.resolve()):
            raise RecipeError(
                f"the recipe names {reference}, a path of this machine, so nobody else could load it.\n"
                "hint: upload that model, and name it by its Hub id; put an output bias into the recipe"
            )


def _device_name(device_map: Any) -> str | None:
    """Return the device that a `device_map` names; refuse one that spreads a model over several."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    spreading = ("balanced", "balanced_low_0", "sequential")
    if isinstance(device_map, Mapping) or device_map in spreading:
        raise UnsupportedModel(
            f"device_map is {device_map!r}, but a recipe has several models, and their layers share names.\n"
            'hint: give one device or "auto", or set device for each model in the recipe'
        )
    if device_map is None or isinstance(device_map, str):
        return device_map
    return f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map)


def _checked_ids(input_ids: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    """Return `input_ids`, or refuse them or an option that a forward cannot honour."""
    for key, value in options.items():
        if value is not None and value is not False:
            raise InvalidRequest(
                f"{key} was given, but several models run here, so it cannot be honoured.\n"
                "hint: the forward of a recipe takes input_ids, attention_mask, position_ids and labels"
            )
    if input_ids is None or input_ids.dim() != 2 or not input_ids.shape[1]:
        raise InvalidRequest(
            "input_ids must be given, as [batch, num_tokens] with at least one token"
        )
    if input_ids.is_floating_point():
        raise InvalidRequest(f"input_ids has dtype {input_ids.dtype}, but token ids are integers")
    return input_ids


def _mask_and_positions(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, num_kept: int
) -> tuple[Tensor | None, Tensor]:
    """Return the mask, if any, and the positions of the new tokens, `[batch, num_tokens]`, both checked."""
    num_rows, num_new = input_ids.shape
    if attention_mask is not None and (
        not isinstance(attention_mask, Tensor)
        or tuple(attention_mask.shape) != (num_rows, num_kept + num_new)
    ):
        raise InvalidRequest(
            f"attention_mask has shape {list(getattr(attention_mask, 'shape', []))}, but must have "
            f"[{num_rows}, {num_kept + num_new}]: kept and new tokens, 0 at padding"
        )
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
    elif position_ids is None:
        position_ids = torch.arange(num_kept, num_kept + num_new, device=input_ids.device)[None]
    if position_ids.dim() != 2 or position_ids.shape[1] != num_new:
        raise InvalidRequest(
            f"position_ids has shape {list(position_ids.shape)}, but must have [{num_rows}, {num_new}]"
        )
    return attention_mask, position_ids.expand(num_rows, -1)


def register_model() -> None:
    """Register recipes with `AutoModelForCausalLM`."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    register: Any = AutoModelForCausalLM.register
    register(ProxyTunedConfig, ProxyTunedForCausalLM, exist_ok=True)


if "transformers.models.auto.modeling_auto" in sys.modules:
    register_model()
