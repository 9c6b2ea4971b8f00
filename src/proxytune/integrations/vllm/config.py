"""A recipe as vLLM's model config: its models found and checked, and what vLLM cannot honour refused.

vLLM asks a config for the shape of one text model. It gets the base's, with the shortest context of all
models and the base's end-of-sequence tokens. The recipe's own content stays unchanged.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proxytune.checkpoints.adapter import AdapterFiles
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.context import rope_kind, rope_scalings
from proxytune.checkpoints.merge import check_storable
from proxytune.decode.ensemble import Pair
from proxytune.errors import UnsupportedModel
from proxytune.grants import NOTHING, Grants
from proxytune.integrations.auto import ProxyTunedConfig, ProxyTunedTokenizer, check_one_prompt
from proxytune.integrations.vllm.request import Menu, Rows, set_menu
from proxytune.loading.members import find_members
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.recipe import ARCHITECTURE, Recipe
from proxytune.recipe.spec import ModelSpec
from proxytune.text.prompts import PromptFormat
from proxytune.text.vocab import Alignment

_log = logging.getLogger(__name__)

LOAD_FORMAT = "proxytune"
"""The name in vLLM of the loader in `weights.py`."""

BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
"""The variable that makes vLLM use kernels whose results do not depend on the batch."""

_OWN_FORMATS = ("auto", "hf", "safetensors", LOAD_FORMAT)
_SETTINGS = ("experts", "allow_pickle", "renders_texts")
"""Settings in vLLM's `additional_config` under `proxytune`: which experts are served; whether pickled weights
may be read; whether texts come to vLLM as the recipe's text format makes them."""
_DRAFTS = ("draft_model", "ngram", "ngram_gpu", "suffix")
"""Drafting methods that need only the model's tokens."""


@dataclass(frozen=True)
class ServedMember:
    """One model of the ensemble.

    Args:
        name: `base`, or `small_0` and so on; vLLM takes numbers between dots for layers.
        title: Its name in messages, such as `legal.expert`.
        checkpoint: Its files.
        adapter: A LoRA adapter to merge into its weights.
        alignment: How its tokens correspond to the base's.
        format: How it reads prompts.
    """

    name: str
    title: str
    checkpoint: Checkpoint
    adapter: AdapterFiles | None
    alignment: Alignment
    format: PromptFormat


@dataclass(frozen=True)
class ServedEnsemble:
    """The models of a recipe, each once."""

    members: tuple[ServedMember, ...]
    pairs: tuple[Pair, ...]

    @property
    def base(self) -> Checkpoint:
        """The base's files."""
        return self.members[0].checkpoint

    @property
    def max_context(self) -> int | None:
        """Maximum number of tokens for every model; None if no model has a limit."""
        limits = [_served_context(member.checkpoint) for member in self.members]
        return min((limit for limit in limits if limit is not None), default=None)


def _served_context(checkpoint: Checkpoint) -> int | None:
    """Return how many tokens a model holds in vLLM; None if there is no limit.

    With longrope it is the length up to which texts have the original angles: if longer ones are allowed,
    vLLM reads short ones with the angles for long ones, too.
    """
    limits = [
        checkpoint.max_context,
        *(
            each.get("original_max_position_embeddings")
            for each in rope_scalings(checkpoint.config.get_text_config(decoder=True))
            if rope_kind(each) == "longrope"
        ),
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def _unscaled(context: int, text: Any) -> float:
    """Return the length that vLLM makes `context` of: it multiplies the length in a config by a factor."""
    factor = 1.0
    if "gemma3" not in text.model_type:
        for each in rope_scalings(text):
            # vLLM's list; it takes the length for these kinds as it is, and the last factor of the others.
            if rope_kind(each) not in ("su", "longrope", "llama3", "yarn"):
                factor = float(each.get("factor") or factor)
    length = context / factor
    return length if int(length * factor) == context else math.nextafter(length, math.inf)


def find_ensemble(recipe: Recipe, grants: Grants = NOTHING) -> ServedEnsemble:
    """Return a recipe's models, found and checked without their weights.

    Raises:
        UnsafeModel: The recipe asks for a right that the caller does not grant.
        UnsupportedModel: The recipe asks for what vLLM cannot do; the message names it.
        UserError: A model is missing, unsafe, corrupt or does not match; see `errors.py`.
    """
    _check_recipe(recipe)
    # vLLM runs all models in one dtype, so a recipe's dtype must not make two members of one.
    recipe = recipe.with_models(lambda spec: replace(spec, dtype=None))
    found, pairs = find_members(RecipeFiles(recipe, grants))
    members: list[ServedMember] = []
    for part, _, checkpoint, adapter, own, alignment in found:
        if adapter is not None:
            check_storable(adapter, checkpoint, "vLLM")
        _check_texts(part, found[0].format, own)
        _check_angles(part, checkpoint)
        name = f"small_{len(members) - 1}" if members else "base"
        assert alignment is not None  # recipes that map vocabularies are refused above
        members.append(ServedMember(name, part, checkpoint, adapter, alignment, own))
    return ServedEnsemble(tuple(members), pairs)


def _check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that asks for what vLLM cannot do."""
    for part, spec in recipe.models.items():
        _check_spec(part, spec)
    hint = "use `proxytune serve` without --engine vllm, which renders a prompt for each model"
    check_one_prompt(recipe, engine="vLLM", hint=hint)
    if recipe.policy.has_positions:
        raise UnsupportedModel(
            "the recipe's steering has a schedule, and vLLM does not tell a model where its prompt ended.\n"
            "hint: leave schedule out, or use `proxytune serve` without --engine vllm"
        )
    _check_dtypes(recipe.models)


def _check_spec(title: str, spec: ModelSpec) -> None:
    """Refuse settings of a model that belong to another engine."""
    if spec.api is not None:
        raise UnsupportedModel(
            "the base is behind an API, and vLLM steers models whose weights it loads.\n"
            "hint: name the base's weights, or use `proxytune serve` without --engine vllm"
        )
    if spec.llama_cpp is not None:
        raise UnsupportedModel(
            f"{title} is to be run by llama.cpp, and vLLM runs it itself.\n"
            "hint: leave llama_cpp out, and vLLM gets the file's weights unpacked"
        )
    if spec.cut_of is not None:
        raise UnsupportedModel(
            f"{title} is cut out of the base in memory, which vLLM does not do.\n"
            "hint: `proxytune make-proxy BASE --output DIR` writes the cut as an ordinary model; name DIR"
        )
    if spec.quantization is not None:
        raise UnsupportedModel(
            f"{title} is to be quantised by transformers, but vLLM has its own ways.\n"
            "hint: name a copy that is stored quantised (AWQ, GPTQ, FP8, compressed-tensors), or leave "
            "quantization out and give vLLM --quantization, which is for the base"
        )
    for key, instead in (
        ("device", "vLLM places models itself; CUDA_VISIBLE_DEVICES says on which devices"),
        ("attn_implementation", "vLLM has its own; --attention-backend chooses one"),
        ("cuda_graphs", "vLLM makes its own unless it is given --enforce-eager"),
    ):
        if getattr(spec, key):
            raise UnsupportedModel(
                f"{title} sets {key} to {getattr(spec, key)!r}, which is for transformers.\n"
                f"hint: leave {key} out; {instead}"
            )


def _check_dtypes(specs: dict[str, ModelSpec]) -> None:
    given = {title: spec.dtype for title, spec in specs.items() if spec.dtype not in (None, "auto")}
    if len(set(given.values())) > 1:
        (one, first), (other, second) = next(
            (a, b) for a in given.items() for b in given.items() if a[1] != b[1]
        )
        raise UnsupportedModel(
            f"{one} is to run in {first} and {other} in {second}, and vLLM runs all models in one dtype.\n"
            "hint: give one dtype to all, or leave it out and give vLLM --dtype"
        )


def _check_texts(title: str, base: PromptFormat, own: PromptFormat) -> None:
    """Refuse a model that reads texts in another way than the base.

    Where models read messages differently, the recipe's tokenizer says so when a chat is rendered.
    """
    if own.text == "chat" and own.template != base.template:
        raise UnsupportedModel(
            f"{title} reads texts through another chat template than the base, so their prompts differ, and "
            "vLLM has one stream of tokens for all models.\n"
            "hint: use `proxytune serve` without --engine vllm, which renders a prompt for each model"
        )


def _check_angles(part: str, checkpoint: Checkpoint) -> None:
    """Refuse a model whose rotary angles vLLM computes in another way than transformers."""
    for scaling in rope_scalings(checkpoint.config.get_text_config(decoder=True)):
        if "dynamic" in rope_kind(scaling):
            raise UnsupportedModel(
                f"the rotary angles of {part} ({checkpoint.name}) depend on a text's length (dynamic NTK), "
                "and vLLM reads every text with the angles for the longest one.\n"
                "hint: use `proxytune serve` without --engine vllm"
            )


def _check_texts_are_rendered(recipe: Recipe, is_promised: bool) -> None:
    """Refuse a recipe with a template for texts, where vLLM would send them without it."""
    if is_promised or recipe.base.prompt == "plain":
        return
    if recipe.base.prompt == "chat":
        # Before recipes could say it apart, this was said of messages, which vLLM renders.
        _log.warning(
            "vLLM sends texts as they are, and the recipe reads them through its chat template; messages are "
            "rendered. `proxytune serve --engine vllm` renders both"
        )
        return
    raise UnsupportedModel(
        "the recipe has a template around every text, and vLLM sends texts as they are.\n"
        "hint: start it with `proxytune serve --engine vllm`; or render the texts yourself, and give vLLM "
        '--additional-config \'{"proxytune": {"renders_texts": true}}\''
    )


class RecipeConfig(ProxyTunedConfig):  # type: ignore[no-untyped-call]
    """The config that vLLM works with: a recipe, and the shape of its base."""

    _TRANSIENT = ("_ensemble", "_rows")
    """What each process makes for itself."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # of its own: transformers writes one for configs that have none

    @property
    def grants(self) -> Grants:
        """What the caller allows, by vLLM's `trust_remote_code` and `additional_config`."""
        return Grants(self._is_trusted, self.__dict__.get("_allows_pickle", False) is True)

    @property
    def served_recipe(self) -> Recipe:
        """The recipe with the experts that are served."""
        name = str(getattr(self, "name_or_path", "") or "")
        directory = Path(name) if os.path.isdir(name) else Recipe.read(name).directory
        return self.recipe(directory.absolute()).only(self.__dict__.get("_served"))

    @property
    def menu(self) -> Menu:
        """What requests choose from."""
        return Menu(self.served_recipe, self.__dict__.get("_is_fixed", ""), self.grants)

    @property
    def ensemble(self) -> ServedEnsemble:
        """The recipe's models."""
        if "_ensemble" not in self.__dict__:
            self.__dict__["_ensemble"] = find_ensemble(self.served_recipe, self.grants)
        found: ServedEnsemble = self.__dict__["_ensemble"]
        return found

    @property
    def _shapes(self) -> ServedEnsemble:
        """The models, as vLLM asks for their shapes before it shows what its caller allows.

        Pickled weights are counted for that, and not read.
        """
        asks = any(spec.allow_pickle for spec in self.served_recipe.models.values())
        if asks and not self.grants.allow_pickle:
            return find_ensemble(self.served_recipe, replace(self.grants, allow_pickle=True))
        return self.ensemble

    @property
    def rows(self) -> Rows:
        """What the model and the logits processor of one worker share."""
        if "_rows" not in self.__dict__:
            self.__dict__["_rows"] = Rows(self.menu.default)
        rows: Rows = self.__dict__["_rows"]
        return rows

    @property
    def text_config(self) -> Any:
        """The base's config, within the limits of all models."""
        if "_text_config" not in self.__dict__:
            ensemble = self._shapes
            text = copy.deepcopy(ensemble.base.config.get_text_config(decoder=True))
            if ensemble.max_context is not None:
                # Not as its positions, from which frequencies may be computed.
                text.model_max_length = _unscaled(ensemble.max_context, text)
            text.eos_token_id = list(ensemble.base.eos_token_ids) or None
            dtype = next((s.dtype for s in self.served_recipe.models.values() if s.dtype), None)
            if dtype not in (None, "auto"):
                text.dtype = dtype
            self.__dict__["_text_config"] = text
        return self.__dict__["_text_config"]

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        """Return the base's config."""
        return self.text_config

    def serve(self, experts: Any, *, is_fixed: str, allow_pickle: bool) -> None:
        """Set which experts are served (None for all), why requests may not choose, and what is allowed."""
        self.__dict__["_allows_pickle"] = Grants(allow_pickle=allow_pickle).allow_pickle
        self.__dict__["_served"] = experts
        self.__dict__["_is_fixed"] = is_fixed
        self.__dict__.pop("_ensemble", None)
        set_menu(self.menu)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json, with what generation needs."""
        return {**super().to_dict(), "eos_token_id": self.text_config.eos_token_id}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in self._TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Checked in another process; requests of this one are checked the same way.
        if "_is_fixed" in state:
            set_menu(self.menu)


def check_engine(vllm_config: Any) -> None:
    """Refuse settings of vLLM that a recipe cannot honour, and make those that it needs.

    Args:
        vllm_config: vLLM's whole config, changed in place.

    Raises:
        UnsupportedModel: A setting cannot be honoured; the message names it.
    """
    model = vllm_config.model_config
    config: RecipeConfig = model.hf_config
    settings = (vllm_config.additional_config or {}).get("proxytune") or {}
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise UnsupportedModel(
            f"additional_config has proxytune.{unknown[0]}, and only "
            f"{', '.join(f'proxytune.{key}' for key in _SETTINGS)} are known.\n"
            'hint: --additional-config \'{"proxytune": {"experts": ["legal"]}}\''
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTS:
        raise UnsupportedModel(
            f"speculative_config has the method {speculative.method!r}, whose drafts come from the "
            "hidden states of one model, and a recipe has several.\n"
            f"hint: the methods that work are {', '.join(_DRAFTS)}; with draft_model, an expert drafts well"
        )
    if vllm_config.lora_config is not None:
        raise UnsupportedModel(
            "vLLM's own adapters (enable_lora) belong to one model, and a recipe has several.\n"
            'hint: make the adapter an expert of the recipe, and choose it per request with "expert"'
        )
    if model.enable_prompt_embeds:
        raise UnsupportedModel(
            "prompt embeddings belong to one model, and a recipe has several.\n"
            "hint: leave enable_prompt_embeds out"
        )
    if vllm_config.parallel_config.prefill_context_parallel_size > 1:
        raise UnsupportedModel(
            "prefill_context_parallel_size is above 1: vLLM then shows a model the rows of one rank, and "
            "takes the logits of all.\nhint: leave it out, or use tensor_parallel_size"
        )
    load_format = str(vllm_config.load_config.load_format)
    if load_format in _OWN_FORMATS:
        vllm_config.load_config.load_format = LOAD_FORMAT
    elif load_format != "dummy":
        raise UnsupportedModel(
            f"load_format is {load_format!r}, which reads the weights of one model, and a recipe has "
            "several.\nhint: leave load_format out"
        )
    config.serve(
        settings.get("experts"),
        allow_pickle=settings.get("allow_pickle", False),
        is_fixed=""
        if speculative is None or vllm_config.use_v2_model_runner
        else "with speculative decoding vLLM's first model runner does not say which row of a batch is "
        "whose.\nhint: leave it out, or start vLLM without speculative_config, or with its second model "
        "runner (VLLM_USE_V2_MODEL_RUNNER=1, which needs Triton and cannot draft with suffix)",
    )
    _check_texts_are_rendered(config.served_recipe, settings.get("renders_texts") is True)
    wanted = {spec.dtype for spec in config.served_recipe.models.values()} - {None, "auto"}
    running = str(model.dtype).removeprefix("torch.")
    if wanted and wanted != {running}:
        raise UnsupportedModel(
            f"the recipe asks for {wanted.pop()}, and vLLM would run in {running}.\n"
            "hint: give vLLM the recipe's dtype with --dtype, or leave dtype out of the recipe"
        )
    limit = config.ensemble.max_context
    if limit is not None and model.max_model_len > limit:
        raise UnsupportedModel(
            f"max_model_len is {model.max_model_len}, and the shortest context of the recipe's models is "
            f"{limit}.\nhint: give vLLM --max-model-len {limit}, or leave it out"
        )


def register_config() -> None:
    """Register recipes with vLLM, and with transformers in this process."""
    from transformers import AutoConfig, AutoTokenizer
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.model_executor.models.registry import ModelRegistry

    class RecipeChecks(VerifyAndUpdateConfig):  # type: ignore[misc]
        """vLLM's hook for a model's requirements on the config."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_engine(vllm_config)

    AutoConfig.register("proxytune", RecipeConfig, exist_ok=True)
    register: Any = AutoTokenizer.register
    register(RecipeConfig, tokenizer_class=ProxyTunedTokenizer, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = RecipeChecks
    ModelRegistry.register_model(ARCHITECTURE, "proxytune.integrations.vllm.model:SteeredModel")


def check_batch_invariance() -> None:
    """Refuse exactness where vLLM would fail in the middle of loading.

    Raises:
        UnsupportedModel: vLLM has no batch-invariant kernels for this device.
    """
    from vllm.platforms import current_platform

    if not (current_platform.is_cuda_alike() or current_platform.is_xpu()):
        raise UnsupportedModel(
            "exact was asked for, and vLLM has batch-invariant kernels for GPUs only, not for "
            f"{current_platform.device_type}.\n"
            "hint: leave --exact out, or leave --engine vllm out, since the engine here has it everywhere"
        )
