"""A recipe as a transformers model: `ProxyTunedForCausalLM`, for `generate`, pipelines and harnesses.

    model = AutoModelForCausalLM.from_pretrained("my-recipe", trust_remote_code=True)

or, after `import proxytune`, without `trust_remote_code`. The members run through the transformers backend
and the formula is `logits/steer.py`'s; what is here is the shape that transformers expects: a forward with
logits and loss, and a KV cache that holds those of all members. There is one stream of tokens, the base's, so
recipes whose models want different prompts are refused.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune.errors import InvalidRequest, RecipeError, UnsupportedModel
from proxytune.integrations.auto import (
    HUB_OPTIONS,
    ProxyTunedConfig,
    check_one_prompt,
    read_recipe,
    refuse_options,
)
from proxytune.request import Experts, Steering

if TYPE_CHECKING:
    from proxytune.backends.transformers.backend import TransformersBackend
    from proxytune.model import ProxyTuned
    from proxytune.recipe.recipe import Recipe


_NO_EFFECT = (
    "low_cpu_mem_usage",
    "use_safetensors",
    "adapter_kwargs",
    "max_shard_size",
    "safe_serialization",
    "trust_remote_code",
    "code_revision",
)
"""Options about files that are not read here.

A recipe has no weights, and its models are always read from safetensors. `trust_remote_code` is about the few
lines of code that lead transformers here; code of a recipe's models is run where the recipe allows it.
"""

_CACHE_OPTION = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)
"""What this version of transformers calls a cache: `cache` from 5.24 on."""

_LOSS_OPTIONS = ("num_items_in_batch", "shift_labels", "ignore_index")


@dataclass(slots=True)
class _Part:
    """Members on one backend, whose rows lie one member after the other in one cache."""

    backend: TransformersBackend
    members: list[int]
    cache: Any = None

    def rows(self, indices: Tensor, num_rows: int) -> Tensor:
        """Return where the given rows of the batch lie in this part's cache, for every member."""
        return torch.cat([indices + k * num_rows for k in range(len(self.members))])


class ProxyTunedCache(Cache):
    """The KV caches of all members that run, in step with each other.

    Two adapters on one small model are one cache of twice the rows.

    Args:
        parts: Members by backend, each with an empty cache.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        super().__init__(layers=[])
        self.parts = list(parts)
        self.num_slots = 0
        self.num_rows = 0

    @property
    def members(self) -> list[int]:
        """Indices of the members whose keys and values are kept."""
        return sorted(index for part in self.parts for index in part.members)

    def __repr__(self) -> str:
        return f"ProxyTunedCache(members={self.members}, num_slots={self.num_slots})"

    def __len__(self) -> int:
        return sum(len(part.cache) for part in self.parts)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back in every member."""
        return all(part.backend.capabilities.can_rewind for part in self.parts)

    @property
    def is_initialized(self) -> bool:
        """Whether anything is kept."""
        return self.num_slots > 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first forward."""
        return self.num_rows or -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens are kept, padding included; all layers keep the same."""
        return self.num_slots

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the slot of the next token."""
        return self.num_slots

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length and offset of an attention mask."""
        return self.num_slots + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether anything is kept."""
        return self.num_slots > 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: only the members' own layers write, each into its member's cache."""
        raise UnsupportedModel(
            "a ProxyTunedCache belongs to a ProxyTunedForCausalLM, not to a single model"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row; `tokens_to_remove` is negative, as in transformers."""
        for part in self.parts:
            part.cache.crop(tokens_to_remove)
        self.num_slots -= abs(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Have the members keep what `crop` needs."""
        for part in self.parts:
            part.cache.activate_past_recording()

    def reset(self) -> None:
        """Forget everything."""
        for part in self.parts:
            part.cache = part.backend.new_cache()
        self.num_slots = self.num_rows = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows of the batch, in that order; rows may repeat."""
        for part in self.parts:
            part.cache.reorder_cache(part.rows(beam_idx, self.num_rows))
        self.num_rows = len(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.num_rows:
            self.reorder_cache(torch.arange(self.num_rows).repeat_interleave(repeats))


class ProxyTunedForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A base steered by experts, as a causal language model of transformers.

    Logits are float32, and -inf at padding ids of the base's vocabulary. The members are frozen. `alpha` and
    `experts` may be given to `forward` and `generate`, or for all calls with `set_steering`.

    Args:
        config: The recipe.
        proxy_tuned: Its loaded models; None to load them.

    Raises:
        UnsupportedModel: The recipe's models want different prompts.
        UserError: A model is missing, unsafe, corrupt or does not match; see `errors.py`.
    """

    config_class = ProxyTunedConfig
    config: ProxyTunedConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: ProxyTunedConfig, proxy_tuned: ProxyTuned | None = None) -> None:
        # A member has its own attention; transformers checks what stands here against this class.
        config._attn_implementation_internal = None
        super().__init__(config)
        if proxy_tuned is None:
            proxy_tuned = _load(config.recipe(), device=None, dtype=None)
        # Not the recipe that was loaded: a dtype or device given to `from_pretrained` is not saved.
        self.recipe = config.recipe(proxy_tuned.recipe.directory)
        self._ensemble = proxy_tuned.ensemble
        backends: list[Any] = [member.backend for member in self._ensemble.members]
        unique = [b for i, b in enumerate(backends) if b not in backends[:i]]
        self.members = nn.ModuleList([backend.model for backend in unique])
        self.register_buffer(
            "_padding_ids", self._ensemble.vocabulary.padding_ids, persistent=False
        )
        self._is_stateful = not all(backend.capabilities.can_rewind for backend in unique)
        self._describe(unique)
        self._steering = Steering()
        self.train(False)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: transformers would copy this file beside what is saved, and recipes bring their own."""

    def _describe(self, backends: Sequence[TransformersBackend]) -> None:
        """Tell transformers and harnesses what they look up on a model and its config."""
        base = self.members[0]
        self.config.vocab_size = self._ensemble.vocabulary.width
        limits = [b.capabilities.max_context for b in backends]
        self.config.max_position_embeddings = min(
            (n for n in limits if n is not None), default=None
        )
        devices: list[dict[str, Any]] = [getattr(m, "hf_device_map", {}) for m in self.members]
        is_spread = any(len(set(places.values())) > 1 for places in devices)
        if is_spread or any(getattr(member, "is_quantized", False) for member in self.members):
            self.hf_device_map = dict(devices[0]) or {"": base.device}
        settings: Any = copy.deepcopy(base.generation_config)
        settings.cache_implementation = None  # the members choose their own
        eos = list(self._ensemble.eos_token_ids)
        if eos:
            settings.eos_token_id = eos
        if settings.pad_token_id is None:
            pad: Any = getattr(self._ensemble.tokenizer, "pad_token_id", None)
            has_pad = isinstance(pad, int) and pad < self._ensemble.vocabulary.width
            settings.pad_token_id = pad if has_pad else (eos[0] if eos else None)
        self.generation_config = settings

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
            *model_args: None are known.
            config: The recipe, if it was read before; it may have been changed.
            **kwargs: `dtype`, `device_map` (a device, or `auto`) and `attn_implementation`, each for all
                models; transformers' options for the Hub. Others are refused by name.

        Raises:
            UnsupportedModel: An option cannot be honoured, or the models want different prompts.
            RecipeError: The recipe is missing or malformed.
            UserError: A model is missing, unsafe, corrupt or does not match; see `errors.py`.
        """
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        recipe = read_recipe(pretrained_model_name_or_path, hub)
        if model_args:
            raise UnsupportedModel("a recipe takes no positional arguments beside its place")
        if isinstance(config, ProxyTunedConfig):
            recipe = config.recipe(recipe.directory)
        model = cls._from_recipe(recipe, config, kwargs)
        if (recipe.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(recipe.directory)
        return model

    @classmethod
    def _from_config(cls, config: ProxyTunedConfig, **kwargs: Any) -> ProxyTunedForCausalLM:
        """Load a recipe's models: a recipe has no weights of its own that could be random."""
        return cls._from_recipe(config.recipe(), config, kwargs)

    @classmethod
    def _from_recipe(
        cls, recipe: Recipe, config: ProxyTunedConfig | None, options: dict[str, Any]
    ) -> ProxyTunedForCausalLM:
        options = dict(options)
        dtype = options.pop("dtype", None)
        dtype = options.pop("torch_dtype", None) if dtype is None else dtype
        device = _device_name(options.pop("device_map", None))
        attention = options.pop("attn_implementation", None)
        if config is not None and attention is None:
            attention = config._attn_implementation_internal  # where AutoConfig puts the option
        if options.get("use_safetensors") is False:
            raise UnsupportedModel(
                "use_safetensors is False, and a recipe says for each model whether pickled weights may be "
                "read.\nhint: leave it out, and set allow_pickle in the recipe's config.json"
            )
        refuse_options(options, ignored=_NO_EFFECT)
        if attention is not None:
            recipe = recipe.with_settings(attn_implementation=str(attention))
        proxy_tuned = _load(
            recipe,
            device=device,
            dtype=None if dtype in (None, "auto") else str(dtype).removeprefix("torch."),
        )
        return cls(ProxyTunedConfig.from_recipe(recipe) if config is None else config, proxy_tuned)

    def set_steering(self, *, alpha: float | None = None, experts: Experts | None = None) -> None:
        """Set the strength and the experts of all calls that do not bring their own.

        Args:
            alpha: None for the recipe's.
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
        """Return steered logits, and the loss where labels are given.

        Args:
            input_ids: `[batch, num_tokens]`, of the base's vocabulary.
            attention_mask: `[batch, kept + num_tokens]`, 0 at padding.
            position_ids: `[batch, num_tokens]`; None to count from the mask.
            past_key_values: A `ProxyTunedCache` that an earlier forward returned.
            labels: `[batch, num_tokens]`, -100 where nothing is to be predicted; shifted here.
            use_cache: Whether to keep keys and values; None does.
            logits_to_keep: Give logits of the last so many tokens, or of these places; 0 for all.
            alpha: Strength of steering; None for `set_steering`'s.
            experts: As `set_steering` takes them; None for its choice.
            cache: `past_key_values` by the name that transformers gives it from 5.24 on.
            **kwargs: What transformers passes to any model.

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
        for key, value in kwargs.items():
            if value is not None and value is not False:
                raise InvalidRequest(
                    f"{key} was given, and several models run here, so it cannot be honoured.\n"
                    "hint: the forward of a recipe takes input_ids, attention_mask, position_ids and labels"
                )
        if input_ids is None or input_ids.dim() != 2 or not input_ids.shape[1]:
            raise InvalidRequest(
                "input_ids must be given, as [batch, num_tokens] with at least one token"
            )
        pairs = self._steering_pairs(Steering(alpha, experts))
        steering = [index for index, _ in pairs]
        if cache is None:
            cache = past_key_values
        kept = self._cache(cache, steering) if use_cache is not False else None
        parts = self._parts(steering) if kept is None else kept.parts
        num_kept = 0 if kept is None else kept.num_slots
        attention_mask, position_ids = _check_places(
            input_ids, attention_mask, position_ids, num_kept
        )

        num_logits = logits_to_keep if isinstance(logits_to_keep, int) else 0
        logits: dict[int, Tensor] = {}
        for part in parts:
            self._run(part, input_ids, attention_mask, position_ids, num_kept, num_logits, logits)
        if kept is not None:
            kept.num_slots += input_ids.shape[1]
            kept.num_rows = input_ids.shape[0]
        steered = self._steer(logits, pairs)
        if not isinstance(logits_to_keep, int):
            steered = steered[:, logits_to_keep.to(steered.device)]
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=steered, labels=labels, vocab_size=steered.shape[-1], **loss_options
            )
        found: dict[str, Any] = {"loss": loss, "logits": steered, _CACHE_OPTION: kept}
        output = CausalLMOutputWithPast(**found)
        return output.to_tuple() if return_dict is False else output

    def _steering_pairs(self, asked: Steering) -> list[tuple[int, float]]:
        """Return the pairs that steer, by index, with their strengths; a strength of 0 runs no model."""
        strengths = self.recipe.strengths(asked.over(self._steering))
        return [
            (index, strengths[pair.name])
            for index, pair in enumerate(self._ensemble.pairs)
            if strengths.get(pair.name)
        ]

    def _parts(self, pairs: Sequence[int]) -> list[_Part]:
        """Group the members that the pairs need by backend, the base first."""
        needed = {0}
        for index in pairs:
            needed |= {self._ensemble.pairs[index].expert, self._ensemble.pairs[index].anti_expert}
        parts: list[_Part] = []
        for index in sorted(needed):
            backend: Any = self._ensemble.members[index].backend
            part = next((part for part in parts if part.backend is backend), None)
            if part is None:
                parts.append(_Part(backend, [index]))
            else:
                part.members.append(index)
        return parts

    def _cache(self, given: Cache | None, pairs: Sequence[int]) -> ProxyTunedCache:
        """Return the cache to use: the one given, if it holds what the pairs need, or a new one."""
        parts = self._parts(pairs)
        if isinstance(given, ProxyTunedCache) and given.num_slots:
            missing = {index for part in parts for index in part.members} - set(given.members)
            if missing:
                names = ", ".join(self._ensemble.members[index].name for index in sorted(missing))
                raise InvalidRequest(
                    f"the cache was begun without {names}, so what they would say of these tokens is not "
                    "known.\nhint: choose experts and an alpha other than 0 before the first token"
                )
            return given
        if given is not None and given.get_seq_length():
            raise InvalidRequest(
                f"{_CACHE_OPTION} is a {type(given).__name__} that holds one model's tokens, and several "
                "models run here.\nhint: pass what an earlier forward of this model returned"
            )
        for part in parts:
            part.cache = part.backend.new_cache()
        cache = given if isinstance(given, ProxyTunedCache) else ProxyTunedCache([])
        cache.parts = parts
        return cache

    def _run(
        self,
        part: _Part,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        num_kept: int,
        num_logits: int,
        logits: dict[int, Tensor],
    ) -> None:
        """Run the rows of a part's members in one forward and enter their aligned logits."""
        members = [self._ensemble.members[index] for index in part.members]
        device = part.backend.device
        ids = input_ids
        num_new = input_ids.shape[1]
        if attention_mask is not None:
            # Padding may have an id that only the tokenizer knows.
            ids = ids.masked_fill(attention_mask[:, -num_new:] == 0, 0)
        rows = torch.cat([member.alignment.ids_to_small(ids) for member in members])
        if not num_kept:
            part.backend.check_token_ids(rows)  # later ones come from these logits
        limit = part.backend.capabilities.max_context
        if limit is not None and num_kept + num_new > limit:
            part.backend.check_length(int(position_ids.max()) + 1)
        count = len(members)
        mask = None if attention_mask is None else attention_mask.repeat(count, 1).to(device)
        answer = part.backend.run(
            rows.to(device),
            cache=part.cache,
            attention_mask=mask,
            position_ids=position_ids.repeat(count, 1).to(device),
            adapters=[member.adapter for member in members for _ in range(len(ids))],
            num_logits=num_logits,
        )
        for index, member, own in zip(part.members, members, answer.chunk(count), strict=True):
            logits[index] = member.alignment.logits_to_base(own)

    def _steer(self, logits: Mapping[int, Tensor], pairs: Sequence[tuple[int, float]]) -> Tensor:
        from proxytune.logits.rules import apply_policy
        from proxytune.logits.steer import Contribution

        base = logits[0]
        width = base.shape[-1]
        contributions = []
        for index, alpha in pairs:
            pair = self._ensemble.pairs[index]
            expert, anti_expert = logits[pair.expert], logits[pair.anti_expert]
            contributions.append(
                Contribution(
                    expert.to(base.device).reshape(-1, width),
                    anti_expert.to(base.device).reshape(-1, width),
                    alpha,
                )
            )
        padding_ids: Any = self._padding_ids
        found = apply_policy(
            self._ensemble.policy, base.reshape(-1, width), contributions, padding_ids=padding_ids
        )
        steered = found.logits.reshape(base.shape)
        if len(padding_ids):
            steered = steered.index_fill(-1, padding_ids.to(steered.device), -torch.inf)
        return steered

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Give `generate` an empty cache of all members."""
        if generation_config.cache_implementation is not None:
            raise InvalidRequest(
                f"cache_implementation is {generation_config.cache_implementation!r}, and each model of a "
                "recipe has a cache that grows.\nhint: leave cache_implementation out"
            )
        given = model_kwargs.get(_CACHE_OPTION)
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[_CACHE_OPTION] = ProxyTunedCache([])

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's embedding."""
        base: Any = self.members[0]
        embeddings: nn.Module = base.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        """Return the base's head."""
        base: Any = self.members[0]
        head: nn.Module = base.get_output_embeddings()
        return head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the members share one set of tokens.

        Raises:
            UnsupportedModel: Always.
        """
        raise UnsupportedModel("the vocabulary of a recipe is its models', and cannot be resized")

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the recipe, without any model's weights.

        Adapters inside the recipe's directory are copied along; other local paths are written so that they
        lead to the same files from there. Steering set with `set_steering` is not part of the recipe.

        Args:
            save_directory: Made if it is not there.
            is_main_process: Whether to write at all.
            push_to_hub: Upload it too; `repo_id` and the options of `push_to_hub` may follow.
            **kwargs: Options of `push_to_hub`, and transformers' about weight files.

        Raises:
            RecipeError: Another recipe or a model is there.
            OutputFileError: The place cannot be written.
            UnsupportedModel: An option cannot be honoured.
        """
        repo_id = kwargs.pop("repo_id", None)
        hub_keys = (
            "commit_message",
            "commit_description",
            "private",
            "token",
            "revision",
            "create_pr",
        )
        hub = {key: kwargs.pop(key) for key in hub_keys if key in kwargs}
        refuse_options(kwargs, ignored=_NO_EFFECT)
        if not is_main_process:
            return
        target = Path(save_directory)
        card = self.recipe.directory / "README.md"
        is_new = not (target / "README.md").exists()
        self.config.recipe(self.recipe.directory).write(target)
        if is_new and card.is_file() and card.parent.resolve() != target.resolve():
            shutil.copyfile(card, target / "README.md")
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
        """Upload the recipe to the Hub, without any model's weights, and return the commit's address.

        Raises:
            RecipeError: A model is a local path, which nobody else could load.
        """
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as place:
            directory = Path(place) / "recipe"
            self.save_pretrained(directory)
            self._check_portable(directory)
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

    @staticmethod
    def _check_portable(directory: Path) -> None:
        """Refuse a written recipe with paths that lead out of it."""
        from proxytune.checkpoints.references import local_path
        from proxytune.recipe.recipe import Recipe

        for reference in _references(Recipe.read(directory)):
            path = None
            if not reference.startswith("package:"):
                path = local_path(reference, root=directory)
            if path is not None and not path.resolve().is_relative_to(directory.resolve()):
                raise RecipeError(
                    f"the recipe names {reference}, a path of this machine, so nobody else could load it.\n"
                    "hint: upload that model, and name it by its Hub id"
                )


def _load(recipe: Recipe, *, device: str | None, dtype: str | None) -> ProxyTuned:
    """Load a recipe whose models all see one stream of tokens."""
    from proxytune.model import ProxyTuned

    if recipe.policy.has_positions:
        raise UnsupportedModel(
            "the recipe's steering has a schedule, and transformers' generate does not tell a model where "
            "its prompt ended.\nhint: leave schedule out, or use proxytune.ProxyTuned or `proxytune generate`"
        )
    check_one_prompt(
        recipe,
        engine="transformers' generate",
        hint="use proxytune.ProxyTuned or `proxytune generate`, which render a prompt for each model",
    )
    return ProxyTuned.load(recipe, device=device, dtype=dtype)


def _references(recipe: Recipe) -> list[str]:
    return [r for s in recipe.models.values() for r in (s.model, s.adapter) if r is not None]


def _device_name(device_map: Any) -> str | None:
    """Return the one device that a `device_map` names.

    Raises:
        UnsupportedModel: It places parts of a model.
    """
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, Mapping) or device_map in (
        "balanced",
        "balanced_low_0",
        "sequential",
    ):
        raise UnsupportedModel(
            f"device_map is {device_map!r}, and a recipe has several models, whose layers it cannot tell "
            'apart.\nhint: give one device or "auto", or set device for each model in the recipe'
        )
    if device_map is None or isinstance(device_map, str):
        return device_map
    return f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map)


def _check_places(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, num_kept: int
) -> tuple[Tensor | None, Tensor]:
    """Return the mask, if there is one, and the positions of the new tokens, `[batch, num_tokens]`."""
    num_rows, num_new = input_ids.shape
    if attention_mask is not None and (
        not isinstance(attention_mask, Tensor)
        or tuple(attention_mask.shape) != (num_rows, num_kept + num_new)
    ):
        raise InvalidRequest(
            f"attention_mask has shape {list(getattr(attention_mask, 'shape', []))}, and must be "
            f"[{num_rows}, {num_kept + num_new}]: kept and new tokens, 0 at padding"
        )
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
    elif position_ids is None:
        position_ids = torch.arange(num_kept, num_kept + num_new, device=input_ids.device)[None]
    if position_ids.dim() != 2 or position_ids.shape[1] != num_new:
        raise InvalidRequest(
            f"position_ids has shape {list(position_ids.shape)}, and must be [{num_rows}, {num_new}]"
        )
    return attention_mask, position_ids.expand(num_rows, -1)


def register_model() -> None:
    """Tell `AutoModelForCausalLM` of recipes."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    register: Any = AutoModelForCausalLM.register
    register(ProxyTunedConfig, ProxyTunedForCausalLM, exist_ok=True)


if "transformers.models.auto.modeling_auto" in sys.modules:
    register_model()
