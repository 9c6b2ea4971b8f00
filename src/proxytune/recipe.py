"""The recipe: which models make a steered one, as a directory in the Hugging Face layout.

    config.json              base, experts, how they combine and how strongly they steer
    README.md                a model card
    modeling_proxytune.py    where transformers finds this package, with `trust_remote_code=True`
    adapters/…               LoRA adapters, if they travel with the recipe

A recipe is read, checked for itself, and written here; whether its models exist and fit together is
examined in `doctor.py`. Unknown keys are refused at every level, because a misspelt one would change the
result unseen.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from proxytune.checkpoint import DTYPES, HUB_ID, hub_recipe, resolve_package
from proxytune.errors import (
    InvalidRequest,
    ModelNotFound,
    OutputFileError,
    RecipeError,
    UnknownExpert,
)
from proxytune.policy import COMBINATIONS, Policy
from proxytune.request import check_alpha

CACHE_DTYPES = ("float32", "float16", "q8_0")
"""What llama.cpp may keep keys and values in."""

DEFAULT_CONTEXT = 4096
"""Most tokens of a row in llama.cpp, where the recipe does not say."""

ENDPOINTS = ("completions", "chat")
"""Parts of an OpenAI-compatible API that generate text."""

VOCABULARIES = ("same", "map")
"""What may become of small models whose tokenizer is another one than the base's."""

MODEL_TYPE = "proxytune"
ARCHITECTURE = "ProxyTunedForCausalLM"

LOADER_NAME = "modeling_proxytune.py"
LOADER = '''\
"""Leads transformers to the package `proxytune`, which reads this recipe: pip install proxytune."""

from proxytune.integrations.auto import ProxyTunedConfig
from proxytune.integrations.transformers import ProxyTunedForCausalLM

__all__ = ["ProxyTunedConfig", "ProxyTunedForCausalLM"]
'''
"""A file beside config.json that transformers runs with `trust_remote_code=True`, and proxytune never."""

AUTO_MAP = {
    "AutoConfig": "modeling_proxytune.ProxyTunedConfig",
    "AutoModelForCausalLM": "modeling_proxytune.ProxyTunedForCausalLM",
}
"""Where a written config.json sends transformers' Auto classes that do not know recipes."""

_OWN_KEYS = (
    "model_type", "architectures", "base", "experts", "combine", "steering", "default_expert", "vocabulary",
    "$schema",
)  # fmt: skip
METADATA_KEYS = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)
"""Keys that transformers writes into any config.json; they are allowed and mean nothing here."""

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")  # lower case would let keys pass for names
_EXPERT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class LlamaCppSettings:
    """How llama.cpp runs a `.gguf` file, as it is, where transformers would unpack it to float32.

    Args:
        threads: Processor threads; None for one per core that torch uses.
        gpu_layers: Layers that go to a GPU, if llama.cpp was built for one; -1 for all.
        context_size: Most tokens a row can hold; None for what the model was trained for, at most
            `DEFAULT_CONTEXT`.
        cache_dtype: Of keys and values: `float32`, `float16` or `q8_0`; None is float32 for a file that
            is not quantised, and float16 else.

    Raises:
        RecipeError: A value cannot be used.
    """

    threads: int | None = None
    gpu_layers: int = -1
    context_size: int | None = None
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        _check_count("threads", self.threads, least=1)
        _check_count("gpu_layers", self.gpu_layers, least=-1)
        _check_count("context_size", self.context_size, least=1)
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise RecipeError(
                f"cache_dtype is {_show(self.cache_dtype)}, and must be one of {', '.join(CACHE_DTYPES)}"
            )

    def context_of(self, trained: int | None) -> int:
        """Return the most tokens of a row, of a model trained for `trained`."""
        return self.context_size or min(trained or DEFAULT_CONTEXT, DEFAULT_CONTEXT)

    def cache_dtype_of(self, stored_dtype: str) -> str:
        """Return what keys and values are kept in, for weights stored in this dtype."""
        return self.cache_dtype or ("float32" if stored_dtype == "float32" else "float16")


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """How a base behind an OpenAI-compatible HTTP API is asked.

    Args:
        model: What the server calls the model; None for the only one that it lists.
        tokenizer: A model whose tokens are the base's; None for the first anti-expert.
        key_env: The environment variable that holds the API key; None sends none. Keys are never stored.
        endpoint: `completions`, or `chat` where the server offers nothing else; None finds out.
        top_logprobs: Most likely tokens to ask for at each position; None for 100, or what the server allows.
        lookahead: Most tokens of the base's own continuation to ask for in one call; None adapts, up to 32.
        max_concurrency: Calls at the same time.
        timeout_s: Seconds until a call without an answer is given up and repeated.
        max_retries: How often a call that failed is repeated.
        prompt_price: Of a million prompt tokens, in any currency.
        completion_price: Of a million generated tokens, in the same one.

    Raises:
        RecipeError: A value cannot be used.
    """

    model: str | None = None
    tokenizer: str | None = None
    key_env: str | None = None
    endpoint: str | None = None
    top_logprobs: int | None = None
    lookahead: int | None = None
    max_concurrency: int = 4
    timeout_s: float = 60.0
    max_retries: int = 8
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        for key in ("model", "tokenizer", "key_env", "endpoint"):
            if getattr(self, key) is not None:
                _check_text(getattr(self, key), key)
        if self.key_env is not None and not _VARIABLE.fullmatch(self.key_env):
            raise RecipeError(
                "key_env is not the name of an environment variable, and a key itself must never stand in a "
                'recipe.\nhint: export OPENAI_API_KEY=…, and write "key_env": "OPENAI_API_KEY"'
            )
        if self.endpoint not in (None, *ENDPOINTS):
            raise RecipeError(
                f"endpoint is {_show(self.endpoint)}, and must be one of {', '.join(ENDPOINTS)}"
                f"{_close_match(self.endpoint or '', ENDPOINTS)}"
            )
        for key, least in (
            ("top_logprobs", 1),
            ("lookahead", 1),
            ("max_concurrency", 1),
            ("max_retries", 0),
        ):
            _check_count(key, getattr(self, key), least=least)
        for key in ("timeout_s", "prompt_price", "completion_price"):
            value = getattr(self, key)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if (
                not is_number
                or not math.isfinite(value)
                or value < 0
                or (key == "timeout_s" and not value)
            ):
                raise RecipeError(f"{key} is {_show(value)}, and must be a number above 0")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of a recipe.

    Args:
        model: A local directory, a `.gguf` file, `package:NAME/PATH`, or a Hub id; of the base also the
            address of an API.
        adapter: A LoRA adapter on it: a local directory, `package:NAME/PATH`, or a Hub id.
        same_as: `base` reuses the base's logits, and excludes all else.
        revision: Branch, tag or commit of the model, if it is a Hub id.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the stored one; None is the stored one on an
            accelerator and float32 on the CPU.
        device: As torch names it, or `auto` to spread the model; None is CUDA where there is some.
        quantization: What transformers takes as `quantization_config`, such as `{"load_in_4bit": true}`.
        attn_implementation: What transformers takes under that name, such as `sdpa`.
        cuda_graphs: Launch the kernels of short forwards all at once; needs a CUDA device of its own.
        prompt: `plain`, `chat` for the tokenizer's own template, or a Jinja template.
        trust_remote_code: Run code that comes with the model.
        allow_pickle: Accept pickled weights, which can run any code when they are read.
        llama_cpp: Run a `.gguf` file with llama.cpp; None leaves it to transformers.
        api: How to ask a base whose `model` is the address of an API, such as `http://localhost:8000/v1`.

    Raises:
        RecipeError: A value is of the wrong kind, or two exclude each other.
    """

    model: str | None = None
    adapter: str | None = None
    same_as: Literal["base"] | None = None
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)
    attn_implementation: str | None = None
    cuda_graphs: bool = False
    prompt: str = "plain"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    llama_cpp: LlamaCppSettings | None = None
    api: ApiSettings | None = None

    def __post_init__(self) -> None:
        for key in (
            "model", "adapter", "same_as", "revision", "dtype", "device", "attn_implementation", "prompt",
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None or key == "prompt":
                _check_text(value, key)
        for key in ("trust_remote_code", "allow_pickle", "cuda_graphs"):
            if not isinstance(getattr(self, key), bool):
                raise RecipeError(
                    f"{key} is {_show(getattr(self, key))}, and must be true or false"
                )
        if self.same_as is not None:
            self._check_same_as()
        elif self.model is None and self.adapter is None:
            raise RecipeError(
                "neither model nor same_as is given, so there is nothing to run.\n"
                'hint: {"model": "owner/name"}, or {"same_as": "base"} in an expert'
            )
        if self.dtype is not None and self.dtype not in (*DTYPES, "auto"):
            raise RecipeError(
                f"dtype is {_show(self.dtype)}, and must be one of {', '.join((*DTYPES, 'auto'))}"
                f"{_close_match(self.dtype, (*DTYPES, 'auto'))}"
            )
        if self.quantization is not None:
            _check_settings(self.quantization)
        if self.model is not None and is_url(self.model):
            self._check_api()
        elif self.api is not None:
            raise RecipeError(
                f"api is given and model is {_show(self.model)}, which is no address.\n"
                'hint: "model": "http://localhost:8000/v1", or leave api out'
            )
        elif self.llama_cpp is not None:
            self._check_llama_cpp()
        elif self.model is not None and self.adapter is not None and is_gguf(self.adapter):
            raise RecipeError(
                f"adapter is {_show(self.adapter)}, and GGUF adapters are for llama.cpp.\n"
                'hint: name its model as a .gguf file with "llama_cpp": {}, or the adapter as PEFT saved it'
            )
        if self.prompt not in ("plain", "chat") and not (
            "{{" in self.prompt or "{%" in self.prompt
        ):
            raise RecipeError(
                f'prompt is {_show(self.prompt)}, and must be "plain", "chat" or a Jinja template'
                f"{_close_match(self.prompt, ('plain', 'chat'))}"
            )

    def _check_api(self) -> None:
        if self.api is None:
            object.__setattr__(self, "api", ApiSettings())
        kept = {"model", "prompt", "api"}
        for setting in fields(self):
            if setting.name not in kept and getattr(self, setting.name) != setting.default:
                raise RecipeError(
                    f"model is the address of an API and {setting.name} is given, which its server decides.\n"
                    f"hint: leave {setting.name} out"
                )
        address = urlsplit(self.model or "")
        if address.username or address.password or address.query:
            raise RecipeError(
                "the address of the API holds a name, a password or a query, and a recipe holds no secrets.\n"
                'hint: name an environment variable in "api": {"key_env": "OPENAI_API_KEY"}'
            )

    def _check_llama_cpp(self) -> None:
        if self.model is not None and not is_gguf(self.model):
            raise RecipeError(
                f"llama_cpp is given and model is {_show(self.model)}, and llama.cpp runs .gguf files.\n"
                "hint: name a .gguf file, or make one with `proxytune export-gguf`"
            )
        if self.adapter is not None and not is_gguf(self.adapter):
            raise RecipeError(
                f"llama_cpp is given and adapter is {_show(self.adapter)}, and llama.cpp takes .gguf files.\n"
                "hint: make one with `proxytune export-gguf`"
            )
        for key in ("dtype", "device", "quantization", "attn_implementation", "cuda_graphs"):
            if getattr(self, key):
                raise RecipeError(
                    f"llama_cpp and {key} are both given, and {key} is for transformers.\n"
                    f"hint: leave {key} out; llama_cpp has settings of its own: "
                    f"{', '.join(setting.name for setting in fields(LlamaCppSettings))}"
                )

    def _check_same_as(self) -> None:
        if self.same_as != "base":
            raise RecipeError(
                f'same_as is {_show(self.same_as)}, and only "base" is known.\n'
                "hint: name a model with model, or leave same_as out"
            )
        for setting in fields(self):
            if setting.name != "same_as" and getattr(self, setting.name) != setting.default:
                raise RecipeError(
                    f"same_as and {setting.name} are both given, and the base's logits are reused as they "
                    f"are.\nhint: leave {setting.name} out, or name the model again with model"
                )

    @property
    def weights(self) -> ModelSpec:
        """The spec without adapter and prompt: models that have it in common share one copy of weights."""
        return replace(self, adapter=None, prompt="plain")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of this model, without what is at its default."""
        return _without_defaults(self)


# What an expert that is only an adapter takes over from the model it sits on.
_SHARED_KEYS = (
    "model", "revision", "dtype", "device", "quantization", "attn_implementation", "cuda_graphs",
    "trust_remote_code", "allow_pickle", "llama_cpp",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """One expert with its anti-expert.

    An expert given as an adapter alone sits on the anti-expert's model: everything about those weights is
    taken over, and only the prompt format is its own.

    Args:
        name: Letters, digits, `.`, `_` and `-`.
        expert: The small model after tuning.
        anti_expert: The same small model before tuning, or one tuned to the opposite.
        alpha: Strength of steering; 0 is the base alone, 1 the published method.

    Raises:
        RecipeError: A value cannot be used, or two exclude each other.
    """

    name: str
    expert: ModelSpec
    anti_expert: ModelSpec
    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_text(self.name, "name")
        if not _EXPERT_NAME.fullmatch(self.name):
            raise RecipeError(
                f"name is {_show(self.name)}, and must be letters, digits, '.', '_' and '-', beginning with "
                "a letter or digit"
            )
        try:
            object.__setattr__(self, "alpha", check_alpha(self.alpha))
        except (InvalidRequest, OverflowError) as error:
            raise RecipeError(str(error)) from error
        for part in ("expert", "anti_expert"):
            if getattr(self, part).api is not None:
                raise RecipeError(
                    f"{part} is behind an API, which shows too little of what it predicts; only a base can "
                    f"be.\nhint: name a small model that runs here"
                )
        if self.expert.same_as and self.anti_expert.same_as:
            raise RecipeError(
                'expert and anti_expert are both {"same_as": "base"}, so their difference is nothing.\n'
                "hint: name a model for one of them"
            )
        if self.anti_expert.same_as is None and self.anti_expert.model is None:
            raise RecipeError(
                "anti_expert has an adapter and no model to put it on.\n"
                'hint: {"model": "owner/name", "adapter": "adapters/opposite"}'
            )
        if self.expert.same_as is None and self.expert.model is None:
            object.__setattr__(self, "expert", self._on_the_anti_experts_model())

    def _on_the_anti_experts_model(self) -> ModelSpec:
        if self.anti_expert.same_as is not None:
            raise RecipeError(
                'expert is only an adapter, and anti_expert is {"same_as": "base"}, so it is unclear which '
                "model the adapter belongs to.\nhint: give expert a model beside its adapter"
            )
        own = self.expert.to_dict()
        for key in _SHARED_KEYS:
            if key in own and getattr(self.expert, key) != getattr(self.anti_expert, key):
                raise RecipeError(
                    f"expert is an adapter on the anti-expert's weights, and its {key} "
                    f"({_show(own[key])}) is not theirs ({_show(getattr(self.anti_expert, key))}).\n"
                    f"hint: set {key} in anti_expert, or give expert a model of its own"
                )
        return replace(self.expert, **{key: getattr(self.anti_expert, key) for key in _SHARED_KEYS})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of this expert."""
        expert = self.expert.to_dict()
        if self.expert.adapter is not None and self.expert.weights == self.anti_expert.weights:
            expert = {key: value for key, value in expert.items() if key not in _SHARED_KEYS}
        return {
            "name": self.name,
            "anti_expert": self.anti_expert.to_dict(),
            "expert": expert,
            "alpha": self.alpha,
        }


@dataclass(frozen=True, slots=True)
class Recipe:
    """Base and experts of a steered model.

    Args:
        base: The large model.
        experts: One or more, each with its own name.
        policy: How strongly and by which experts to steer at each token; adding offsets up unless said.
        default_expert: The expert that steers when a request names none; None for all of them.
        vocabulary: Whether small models of another tokenizer than the base's are refused (`same`), or steer
            the tokens that both have (`map`).
        directory: Where the recipe stands; relative references start from it.
        schema: Where an editor finds the format as JSON Schema, `$schema` in the file; kept, and not read.

    Raises:
        RecipeError: The parts do not make a recipe.
    """

    base: ModelSpec
    experts: tuple[ExpertSpec, ...]
    policy: Policy = field(default_factory=Policy)
    default_expert: str | None = None
    vocabulary: str = "same"
    directory: Path = field(default_factory=Path.cwd, compare=False)
    schema: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.base.model is None:
            raise RecipeError('base has no model.\nhint: {"model": "owner/name"}')
        if self.base.adapter is not None:
            raise RecipeError(
                "base has an adapter, and a base is left as it is.\n"
                "hint: merge the adapter into it with PEFT's merge_and_unload, and name the result"
            )
        if not self.experts:
            raise RecipeError(
                "experts is empty, so there is nothing that steers.\nhint: give one expert"
            )
        names = [expert.name for expert in self.experts]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise RecipeError(
                f"two experts are called {doubled[0]!r}.\nhint: give each a name of its own"
            )
        if self.vocabulary not in VOCABULARIES:
            raise RecipeError(
                f"vocabulary is {_show(self.vocabulary)}, and must be {' or '.join(VOCABULARIES)}"
                f"{_close_match(self.vocabulary, VOCABULARIES)}"
            )
        if self.base.api is not None:
            for expert in self.experts:
                if expert.expert.same_as or expert.anti_expert.same_as:
                    raise RecipeError(
                        f'the base is behind an API, and expert {expert.name!r} has {{"same_as": "base"}}, '
                        "whose logits are seen in part only.\nhint: name small models for both sides"
                    )
        if self.base.api is not None and self.policy.reads_base:
            raise RecipeError(
                f"the base is behind an API, which shows a part of its distribution, and the policy "
                f"({self.policy.describe()}) needs all of it.\n"
                "hint: leave steering out, or use clip, a schedule, or the combinations "
                f"{', '.join(c for c in COMBINATIONS if not Policy(c).reads_base)}"
            )
        if self.default_expert is not None and self.default_expert not in names:
            raise RecipeError(
                f"default_expert is {_show(self.default_expert)}, and the experts are {', '.join(names)}"
                f"{_close_match(self.default_expert, names)}"
            )

    @classmethod
    def read(cls, reference: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a local directory, `package:NAME/PATH`, or the Hub.

        Raises:
            RecipeError: Nothing is there, or it is malformed.
        """
        directory = _find_recipe(os.fspath(reference))
        path = directory / "config.json"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RecipeError(
                f"no recipe at {directory}: config.json cannot be read ({error.strerror}).\n"
                "hint: write a recipe with `proxytune new`"
            ) from error
        try:
            return cls.from_json(content, directory=directory)
        except RecipeError as error:
            raise RecipeError(f"the recipe {path} cannot be used: {error}") from error

    @classmethod
    def from_json(cls, content: bytes | str, *, directory: Path | None = None) -> Recipe:
        """Build a recipe from the content of its config.json.

        Raises:
            RecipeError: It is no JSON, has a key twice, holds NaN or infinity, or is no recipe.
        """
        try:
            text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
            data = json.loads(
                text,
                parse_constant=_refuse_constant,
                parse_float=_finite_float,
                object_pairs_hook=_object_without_doubles,
            )
        except UnicodeDecodeError as error:
            raise RecipeError(f"it is not UTF-8: {error}") from error
        except json.JSONDecodeError as error:
            raise RecipeError(f"it is not JSON: {error}") from error
        except RecursionError as error:
            raise RecipeError("it is nested too deeply to be a recipe") from error
        except ValueError as error:
            raise RecipeError(f"it holds a number that cannot be read: {error}") from error
        return cls.from_dict(data, directory=directory)

    @classmethod
    def from_dict(cls, data: Any, *, directory: Path | None = None) -> Recipe:
        """Build a recipe from the object of its config.json.

        Args:
            data: As `to_dict` returns it; keys that transformers writes into any config are ignored.
            directory: Where relative references start; None for the working directory.

        Raises:
            RecipeError: A key is unknown or missing, or a value cannot be used; the message names its place.
        """
        data = _object(data, "the recipe")
        if data.get("model_type") != MODEL_TYPE:
            kind = data.get("model_type")
            if isinstance(kind, str):
                raise RecipeError(
                    f"model_type is {_show(kind)}, so this is a model and not a recipe.\n"
                    "hint: write a recipe that names it with `proxytune new DIR --base …`"
                )
            raise RecipeError(
                f'model_type is {_show(kind)}, and must be "{MODEL_TYPE}".\n'
                f'hint: add "model_type": "{MODEL_TYPE}"'
            )
        _check_keys(data, known=_OWN_KEYS, ignored=METADATA_KEYS, place="the recipe")
        _check_required(data, ("base", "experts"), "the recipe")
        experts = data["experts"]
        if not isinstance(experts, list):
            raise RecipeError(f"experts is {_show(experts)}, and must be a list of objects")
        combine = data.get("combine", "sum")
        _check_text(combine, "combine")
        steering = _object(data.get("steering") or {}, "steering")
        try:
            policy = Policy.from_dict(steering, combine=combine)
        except InvalidRequest as error:
            raise RecipeError(f"steering: {error}" if steering else str(error)) from error
        default_expert = data.get("default_expert")
        if default_expert is not None:
            _check_text(default_expert, "default_expert")
        vocabulary = data.get("vocabulary", "same")
        _check_text(vocabulary, "vocabulary")
        schema = data.get("$schema")
        if schema is not None:
            _check_text(schema, "$schema")
        return cls(
            base=_model_spec(data["base"], "base"),
            experts=tuple(
                _expert_spec(expert, f"experts[{index}]") for index, expert in enumerate(experts)
            ),
            policy=policy,
            default_expert=default_expert,
            vocabulary=vocabulary,
            directory=Path.cwd() if directory is None else directory,
            schema=schema,
        )

    @property
    def base_tokenizer(self) -> ModelSpec:
        """The model whose tokenizer speaks for the base: the base, or another where it is behind an API."""
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
        """Return the recipe with these settings in every model of transformers; None leaves each its own."""
        given = {
            "device": device,
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "cuda_graphs": cuda_graphs,
        }
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}

        def changed(spec: ModelSpec) -> ModelSpec:
            is_elsewhere = spec.same_as or spec.llama_cpp or spec.api
            return spec if is_elsewhere else replace(spec, **changes)

        return self._with_models(changed)

    def with_llama_cpp(self, *, only_where_set: bool = False, **settings: int | None) -> Recipe:
        """Return the recipe with every `.gguf` file run by llama.cpp, with these settings.

        Args:
            only_where_set: Leave files to transformers that the recipe leaves to it.
            settings: Of `LlamaCppSettings`; None leaves each model its own.

        Raises:
            RecipeError: The recipe names no `.gguf` file, or a setting cannot be used.
        """
        given: dict[str, Any] = {k: value for k, value in settings.items() if value is not None}
        models = [self.base, *(m for e in self.experts for m in (e.expert, e.anti_expert))]
        if not any(spec.model is not None and is_gguf(spec.model) for spec in models):
            raise RecipeError(
                "the recipe names no .gguf file, so there is nothing that llama.cpp could run.\n"
                "hint: `proxytune export-gguf` makes them"
            )

        def changed(spec: ModelSpec) -> ModelSpec:
            if spec.model is None or not is_gguf(spec.model):
                return spec
            if only_where_set and spec.llama_cpp is None:
                return spec
            own = spec.llama_cpp or LlamaCppSettings()
            kept = replace(
                spec,
                dtype=None,
                device=None,
                quantization=None,
                attn_implementation=None,
                cuda_graphs=False,
            )
            return replace(kept, llama_cpp=replace(own, **given))

        return self._with_models(changed)

    def _with_models(self, changed: Callable[[ModelSpec], ModelSpec]) -> Recipe:
        return replace(
            self,
            base=changed(self.base),
            experts=tuple(
                replace(e, expert=changed(e.expert), anti_expert=changed(e.anti_expert))
                for e in self.experts
            ),
        )

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
        self,
        directory: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        card: str | None = None,
    ) -> Recipe:
        """Write the recipe and return it as it stands there.

        Local paths are written so that they lead to the same files from the new place; adapters inside the
        recipe's own directory are copied along. A model card, and the file that leads transformers here, are
        written where there are none, and replace those that this method wrote and nobody edited.

        Args:
            directory: Made if it is not there.
            overwrite: Replace another recipe that is there.
            card: The model card to write, whatever card is there; None for the recipe's own.

        Raises:
            RecipeError: Another recipe is there, or a model.
            OutputFileError: The place cannot be written.
        """
        target = Path(os.path.abspath(os.path.expanduser(os.fspath(directory))))
        source = Path(os.path.abspath(self.directory))
        inside: dict[str, Path] = {}
        moved = self._moved(source, target, inside) if source != target else self
        moved.check_free(target, overwrite=overwrite)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for reference, adapter in inside.items():
                if not (target / reference).exists():
                    _copy_tree(adapter, target / reference)
            content = json.dumps(
                {**moved.to_dict(), "auto_map": AUTO_MAP},
                indent=2,
                ensure_ascii=False,
                allow_nan=False,
            )
            if _may_write_loader(target):
                _replace_file(target / LOADER_NAME, LOADER)
            if card is not None or _may_write_card(target):
                _replace_file(target / "README.md", card or moved.model_card())
            _replace_file(target / "config.json", content + "\n")
        except OSError as error:
            raise OutputFileError(
                f"the recipe cannot be written to {target}: {error.strerror or error}.\n"
                "hint: name a directory that can be written"
            ) from error
        return replace(moved, directory=target)

    def reference_from(self, reference: str, target: Path) -> str:
        """Return a model's reference, written so that it leads to the same files from `target`."""
        lone = replace(self, base=ModelSpec(model=reference))
        moved = lone._moved(Path(os.path.abspath(self.directory)), target, {})
        return moved.base.model or reference

    def check_free(self, target: Path, *, overwrite: bool) -> None:
        """Check that writing there would replace nothing but the same recipe, or another if that is wanted.

        Raises:
            RecipeError: It would.
        """
        path = target / "config.json"
        if not path.exists():
            return
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            content = None
        kind = content.get("model_type") if isinstance(content, dict) else None
        if kind is not None and kind != MODEL_TYPE:
            raise RecipeError(
                f"{target} holds a model of type {_show(kind)}, which a recipe must not replace.\n"
                "hint: name another directory"
            )
        if overwrite:
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

    def _moved(self, source: Path, target: Path, inside: dict[str, Path]) -> Recipe:
        """Return the recipe with local paths that lead to the same files from `target`.

        Adapters inside `source` keep their reference and are entered into `inside`.
        """

        def move(reference: str | None, *, is_adapter: bool) -> str | None:
            if reference is None or reference.startswith(("package:", "http://", "https://")):
                return reference
            path = Path(os.path.expanduser(reference))
            if path.is_absolute() or not (source / path).exists():
                return reference
            place = Path(os.path.normpath(source / path))
            if is_adapter and place != source and place.is_relative_to(source):
                kept = place.relative_to(source).as_posix()
                inside[kept] = place
                return kept
            return Path(os.path.relpath(place, target)).as_posix()

        def move_spec(spec: ModelSpec) -> ModelSpec:
            api = spec.api
            if api is not None:
                api = replace(api, tokenizer=move(api.tokenizer, is_adapter=False))
            return replace(
                spec,
                model=move(spec.model, is_adapter=False),
                adapter=move(spec.adapter, is_adapter=True),
                api=api,
            )

        return replace(
            self,
            base=move_spec(self.base),
            experts=tuple(
                replace(
                    expert,
                    expert=move_spec(expert.expert),
                    anti_expert=move_spec(expert.anti_expert),
                )
                for expert in self.experts
            ),
        )

    def choose(
        self,
        experts: str | Sequence[str] | Mapping[str, float] | None = None,
        alpha: float | None = None,
    ) -> dict[str, float]:
        """Return the strength of each expert that steers.

        Args:
            experts: A name, names, or names with their strengths; None for the default expert, or all
                where the recipe has no default.
            alpha: Strength of those that do not bring their own here; None for the recipe's.

        Raises:
            UnknownExpert: The recipe has no expert of that name.
            InvalidRequest: A strength is not finite, or no expert is named.
        """
        own = {expert.name: expert.alpha for expert in self.experts}
        if experts is None:
            experts = [self.default_expert] if self.default_expert is not None else list(own)
        if isinstance(experts, str):
            experts = [experts]
        if not experts:
            raise InvalidRequest(
                "no expert is named.\nhint: leave experts out for the recipe's default"
            )
        if alpha is not None:
            check_alpha(alpha)
        chosen: dict[str, float] = {}
        for name in experts:
            if name not in own:
                raise UnknownExpert(
                    f"the recipe has no expert {name!r}; it has {', '.join(own)}"
                    f"{_close_match(name, list(own))}"
                )
            if isinstance(experts, Mapping):
                chosen[name] = check_alpha(experts[name], f"alpha of expert {name!r}")
            else:
                chosen[name] = own[name] if alpha is None else float(alpha)
        return chosen

    def model_card(self) -> str:
        """Return a README.md with the metadata that the Hub reads."""
        specs = [("base", self.base)]
        for expert in self.experts:
            specs += [
                (f"{expert.name}, expert", expert.expert),
                (f"{expert.name}, anti-expert", expert.anti_expert),
            ]
        hub_ids: list[str] = []
        for _, spec in specs:
            for reference in (spec.model, spec.adapter):
                if (
                    reference is not None
                    and self._is_hub_id(reference)
                    and reference not in hub_ids
                ):
                    hub_ids.append(reference)
        lines = ["---", "library_name: proxytune", "pipeline_tag: text-generation"]
        lines += ["tags:", "- proxytune", "- proxy-tuning"]
        if hub_ids:
            lines += ["base_model:", *(f"- {hub_id}" for hub_id in hub_ids)]
        lines += [
            "---",
            "",
            "# A steered model",
            "",
            "A recipe for [proxy-tuning](https://arxiv.org/abs/2401.08565): it names models and holds none "
            "of their weights.",
            "",
            "    steered logits = base + alpha * (expert - anti_expert)",
            "",
            "| part | model | adapter | prompt |",
            "| --- | --- | --- | --- |",
        ]
        for part, spec in specs:
            model = "the base itself" if spec.same_as else f"`{spec.model}`"
            adapter = f"`{spec.adapter}`" if spec.adapter else ""
            prompt = spec.prompt if spec.prompt in ("plain", "chat") else "a template of its own"
            lines.append(f"| {part} | {model} | {adapter} | {prompt} |")
        strengths = ", ".join(f"{expert.name} {expert.alpha:g}" for expert in self.experts)
        lines += [
            "",
            f"Strength of steering (alpha): {strengths}."
            + ("" if self.policy.is_plain else f" Policy: {self.policy.describe()}."),
            "",
            "```bash",
            "pip install proxytune",
            'proxytune generate . "Once upon a time"',
            "```",
            "",
        ]
        if self._runs_in_transformers():
            lines += [
                "```python",
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                'tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)',
                'model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)',
                "```",
                "",
            ]
        return "\n".join(lines)

    def _runs_in_transformers(self) -> bool:
        """Whether the transformers integration takes it: one stream of tokens, models in process."""
        specs = [self.base, *(s for e in self.experts for s in (e.expert, e.anti_expert))]
        return all(
            spec.same_as
            or (spec.prompt == self.base.prompt and not spec.api and not spec.llama_cpp)
            for spec in specs
        )

    def _is_hub_id(self, reference: str) -> bool:
        if not HUB_ID.fullmatch(reference) or is_gguf(reference):
            return False
        return not (self.directory / reference).exists()


def local_reference(given: str, directory: Path) -> str:
    """Return a reference typed somewhere as the recipe in `directory` needs it.

    What is there under the given path counts as local, and is written absolute, or relative to the recipe
    where it lies inside it.

    Raises:
        ModelNotFound: It can only be a path, and nothing is there.
    """
    if given.startswith(("package:", "http://", "https://")) or not given:
        return given
    path = Path(given).expanduser()
    if not path.exists():
        if given.startswith((".", "~", "/")) or path.suffix.lower() == ".gguf":
            raise ModelNotFound(
                f"nothing is at {given}.\nhint: check the spelling; relative paths start at {Path.cwd()}"
            )
        return given
    path = path.absolute().resolve()
    if path.is_relative_to(directory.resolve()):
        return path.relative_to(directory.resolve()).as_posix()
    return str(path)


# Reading -------------------------------------------------------------------------------------------


def _find_recipe(reference: str) -> Path:
    hint = "hint: write a recipe with `proxytune new`, or check the spelling"
    if reference.startswith("package:"):
        try:
            return resolve_package(reference)
        except ModelNotFound as error:
            raise RecipeError(f"no recipe at {reference}: {error}") from error
    path = Path(os.path.expanduser(reference))
    try:
        if path.is_dir():
            return path.absolute()
        if path.is_file():
            if path.name == "config.json":
                return path.absolute().parent
            raise RecipeError(
                f"no recipe at {reference}: it is a file, and a recipe is a directory.\n{hint}"
            )
    except (OSError, ValueError) as error:
        raise RecipeError(f"no recipe at {reference!r}: {error}.\n{hint}") from error
    # A recipe on the Hub always has an owner; a bare word is a directory that is not there.
    if HUB_ID.fullmatch(reference) and "/" in reference and ".." not in reference:
        try:
            return hub_recipe(reference)
        except ModelNotFound as error:
            raise RecipeError(f"no recipe at {reference}: {error}") from error
    raise RecipeError(f"no recipe at {reference}: no such directory.\n{hint}")


def _refuse_constant(constant: str) -> Any:
    raise RecipeError(f"it holds {constant}, and every number must be finite")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RecipeError(f"it holds {text[:40]}, and every number must be finite")
    return value


def _object_without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise RecipeError(f"the key {_show(doubled)} is given twice in one object")
    return content


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RecipeError(f"{place} is {_show(value)}, and must be an object")
    return dict(value)


def _check_keys(
    value: Mapping[str, Any],
    *,
    known: Sequence[str],
    place: str,
    ignored: frozenset[str] = frozenset(),
) -> None:
    for key in value:
        if key not in known and key not in ignored:
            raise RecipeError(
                f"{place} has the unknown key {_show(key)}; known are {', '.join(known)}"
                f"{_close_match(key, known)}"
            )


def _check_required(value: Mapping[str, Any], required: Sequence[str], place: str) -> None:
    for key in required:
        if key not in value:
            raise RecipeError(
                f"{place} lacks the key {key!r}.\n"
                f"hint: the keys it needs are {', '.join(required)}; `proxytune new` writes a whole recipe"
            )


def _check_text(value: Any, key: str) -> None:
    """Check that a value is text that can name something: not empty, and no file name's forbidden parts."""
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{key} is {_show(value)}, and must be text")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise RecipeError(f"{key} is {_show(value)}, which holds a character that no text has")


def _check_settings(value: Any) -> None:
    try:
        is_json = json.dumps(dict(value), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        is_json = b""
    if not isinstance(value, Mapping) or not value or not is_json:
        raise RecipeError(
            f"quantization is {_show(value)}, and must be an object of settings.\n"
            'hint: {"quant_method": "bitsandbytes", "load_in_4bit": true}'
        )


def _model_spec(value: Any, place: str) -> ModelSpec:
    value = _object(value, place)
    known = [setting.name for setting in fields(ModelSpec)]
    _check_keys(value, known=known, place=place)
    for key, kind in (("llama_cpp", LlamaCppSettings), ("api", ApiSettings)):
        if value.get(key) is None:
            continue
        settings = _object(value[key], f"{place}.{key}")
        _check_keys(settings, known=[s.name for s in fields(kind)], place=f"{place}.{key}")
        try:
            value[key] = kind(**settings)
        except RecipeError as error:
            raise RecipeError(f"{place}.{key}: {error}") from error
    try:
        return ModelSpec(**value)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error


def _expert_spec(value: Any, place: str) -> ExpertSpec:
    value = _object(value, place)
    _check_keys(value, known=[setting.name for setting in fields(ExpertSpec)], place=place)
    _check_required(value, ("name", "expert", "anti_expert"), place)
    expert = _model_spec(value["expert"], f"{place}.expert")
    anti_expert = _model_spec(value["anti_expert"], f"{place}.anti_expert")
    try:
        return ExpertSpec(value["name"], expert, anti_expert, value.get("alpha", 1.0))
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error


def is_url(reference: str) -> bool:
    """Whether a reference is the address of an API."""
    return reference.lower().startswith(("http://", "https://"))


def is_gguf(reference: str) -> bool:
    """Whether a reference names a GGUF file."""
    return reference.lower().endswith(".gguf")


def _check_count(key: str, value: Any, *, least: int) -> None:
    """Check that a value is None or a whole number from `least` on."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return
    raise RecipeError(f"{key} is {_show(value)}, and must be a whole number of at least {least}")


def _without_defaults(settings: Any) -> dict[str, Any]:
    """Return the JSON object of a dataclass, without what is at its default."""
    content: dict[str, Any] = {}
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if value == setting.default:
            continue
        if is_dataclass(value):
            value = _without_defaults(value)
        content[setting.name] = dict(value) if isinstance(value, Mapping) else value
    return content


def _show(value: Any) -> str:
    """Return a value as JSON would write it, cut to what fits into a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}…"


def _close_match(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word[:80], known, n=1)
    return f".\nhint: did you mean {matches[0]!r}?" if matches else ""


# Writing -------------------------------------------------------------------------------------------


def _may_write_card(target: Path) -> bool:
    """Whether the directory has no model card, or the one its recipe was written with."""
    try:
        there = (target / "README.md").read_text("utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
    try:
        return there == Recipe.read(target).model_card()
    except RecipeError:
        return False


def _may_write_loader(target: Path) -> bool:
    """Whether the directory has no loader, or one that a version of this package wrote."""
    try:
        there = (target / LOADER_NAME).read_text("utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
    return there.split("\n")[0] == LOADER.split("\n")[0]


def _replace_file(path: Path, content: str) -> None:
    """Write a file so that a reader sees the old one or the new one, whole."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _copy_tree(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        shutil.copytree(source, part, dirs_exist_ok=True)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
