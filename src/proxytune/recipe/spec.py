"""One model and one expert of a recipe: their keys, with limits, and the rules between keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from proxytune.checkpoints.placement import DTYPES
from proxytune.checkpoints.references import is_gguf, is_url
from proxytune.errors import InvalidRequest, RecipeError
from proxytune.recipe.address import parse_address
from proxytune.recipe.checks import (
    as_json,
    as_object,
    check_fields,
    check_json,
    check_keys,
    check_required,
    recipe_key,
)
from proxytune.request import check_alpha
from proxytune.settings import declared, options_of

CACHE_DTYPES = ("float32", "float16", "q8_0")
"""Dtypes in which llama.cpp can keep keys and values."""

DEFAULT_CONTEXT = 4096
"""Maximum number of tokens of a row in llama.cpp, unless the recipe sets one."""

MAX_WEIGHT = 10.0
"""Largest weight of a model in what an expert adds; at 10 the base's temperature is 0.1."""

ENDPOINTS = ("completions", "chat")
"""Endpoints of an OpenAI-compatible API that generate text."""

FOR_TRANSFORMERS: dict[str, Any] = {
    "dtype": None,
    "device": None,
    "quantization": None,
    "attn_implementation": None,
    "cuda_graphs": False,
}
"""Keys that only models run by transformers have, and their defaults."""


_FORMAT: dict[str, Any] = {
    "choices": ("plain", "chat"),
    "pattern": r"\{\{|\{%",
    "words": '"plain", "chat" or a Jinja template',
}
"""What may say how a model reads its prompts."""


@dataclass(frozen=True, slots=True)
class LlamaCppSettings:
    """How llama.cpp runs a `.gguf` file as it is; transformers would unpack it to float32.

    Args:
        threads: Number of processor threads; None for one per core that torch uses.
        gpu_layers: Number of layers on a GPU, if llama.cpp was built for one; -1 for all.
        context_size: Maximum number of tokens of a row; None for the model's own limit, at most
            `DEFAULT_CONTEXT`.
        cache_dtype: Dtype of keys and values: `float32`, `float16` or `q8_0`; None is float32 for a file
            that is not quantised, otherwise float16.

    Raises:
        RecipeError: A value cannot be used.
    """

    threads: int | None = recipe_key(at_least=1, at_most=4096)
    gpu_layers: int = recipe_key(-1, at_least=-1, at_most=1_000_000)
    context_size: int | None = recipe_key(at_least=1, at_most=2**31 - 1)
    cache_dtype: str | None = recipe_key(choices=CACHE_DTYPES)

    def __post_init__(self) -> None:
        check_fields(self)

    def context_of(self, trained: int | None) -> int:
        """Return the maximum number of tokens of a row, for a model trained for `trained`."""
        return self.context_size or min(trained or DEFAULT_CONTEXT, DEFAULT_CONTEXT)

    def cache_dtype_of(self, stored_dtype: str) -> str:
        """Return the dtype of keys and values, for weights stored in `stored_dtype`."""
        return self.cache_dtype or ("float32" if stored_dtype == "float32" else "float16")


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """How to call a base behind an OpenAI-compatible HTTP API.

    Args:
        model: The server's name for the model; None for the only one that it lists.
        tokenizer: A model with the base's tokenizer; None for the first anti-expert.
        key_env: The environment variable whose key the server needs. This is only a request: which key goes
            there is up to whoever runs the recipe. Keys are never stored.
        endpoint: `completions`, or `chat` if the server offers nothing else; None finds out.
        top_logprobs: Number of likeliest tokens to ask for at each position; None for 100, or what the
            server allows.
        lookahead: Maximum number of tokens of the base's own continuation in one call; None adapts, up to 32.
        max_concurrency: Maximum number of calls at the same time.
        timeout_s: Seconds after which a call without a whole answer is repeated.
        max_retries: Maximum number of repetitions of a failed call.
        total_timeout_s: Maximum number of seconds for a call with all its repetitions and pauses; None for
            three times `timeout_s`, and at least 180.
        prompt_price: Price of a million prompt tokens, in any currency.
        completion_price: Price of a million generated tokens, in the same currency.

    Raises:
        RecipeError: A value cannot be used.
    """

    model: str | None = recipe_key()
    tokenizer: str | None = recipe_key()
    # Lower case would let keys pass for names.
    key_env: str | None = recipe_key(pattern="^[A-Z_][A-Z0-9_]{0,63}$")
    endpoint: str | None = recipe_key(choices=ENDPOINTS)
    top_logprobs: int | None = recipe_key(at_least=1, at_most=2**20)
    lookahead: int | None = recipe_key(at_least=1, at_most=1024)
    max_concurrency: int = recipe_key(4, at_least=1, at_most=64)
    timeout_s: float = recipe_key(60.0, above=0, at_most=600)
    max_retries: int = recipe_key(8, at_least=0, at_most=100)
    total_timeout_s: float | None = recipe_key(above=0, at_most=1800)
    prompt_price: float = recipe_key(0.0, at_least=0, at_most=1e9)
    completion_price: float = recipe_key(0.0, at_least=0, at_most=1e9)

    def __post_init__(self) -> None:
        # The value is not shown: it may be a key.
        if not options_of(ApiSettings)["key_env"].holds(self.key_env):
            raise RecipeError(
                "key_env is not the name of an environment variable, and a recipe must never hold the key "
                'itself.\nhint: export OPENAI_API_KEY=…, and write "key_env": "OPENAI_API_KEY"'
            )
        check_fields(self)

    @property
    def longest_call_s(self) -> float:
        """Maximum number of seconds for a call with all its repetitions and pauses."""
        return self.total_timeout_s or max(180.0, 3 * self.timeout_s)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of a recipe.

    Args:
        model: A local directory, a `.gguf` file, `package:NAME/PATH`, or a Hub id; for the base also the
            address of an API.
        adapter: A LoRA adapter on it: a local directory, `package:NAME/PATH`, or a Hub id.
        same_as: `base` reuses the base's logits; no other key may be set.
        cut_of: `base` makes a small model of the base's own layers in memory, with a bridge between them.
        keep: For `cut_of`: numbers of first and last layers, such as `[3, 3]`.
        bridge: For `cut_of`: a `.safetensors` file; `proxytune make-proxy BASE --bridge-only` writes it.
        revision: Branch, tag or commit of the model, if it is a Hub id.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the stored dtype; None is the stored dtype on
            an accelerator and float32 on the CPU.
        device: A device as torch names it, or `auto` to spread the model; None is CUDA if available.
        quantization: The `quantization_config` of transformers, such as `{"load_in_4bit": true}`.
        attn_implementation: The option of that name in transformers, such as `sdpa`.
        cuda_graphs: Launch the kernels of short forwards all at once; the model must be on one CUDA device.
        prompt: How the model reads a text: `plain`, `chat` for the tokenizer's chat template, or a Jinja
            template.
        chat: How the model reads messages, in the same three ways; None for `prompt` where that is not
            `plain`, otherwise the tokenizer's chat template if there is one.
        trust_remote_code: Ask to run code that comes with the model; only the caller can grant it.
        allow_pickle: Ask to read pickled weights, which can run any code when they are loaded; only the
            caller can grant it.
        llama_cpp: Run a `.gguf` file with llama.cpp; None leaves it to transformers.
        api: How to call a base whose `model` is the address of an API, such as `http://localhost:8000/v1`.

    Raises:
        RecipeError: A value has the wrong type, or two keys exclude each other.
    """

    model: str | None = recipe_key()
    adapter: str | None = recipe_key()
    same_as: Literal["base"] | None = recipe_key(
        words='"base"', hint="name a model with model, or leave same_as out"
    )
    cut_of: Literal["base"] | None = recipe_key(
        words='"base"', hint="name a model with model, or leave cut_of out"
    )
    keep: tuple[int, ...] | None = recipe_key(words="two numbers of layers", hint='"keep": [3, 3]')
    bridge: str | None = recipe_key(
        pattern=r"\.safetensors$",
        words="the name of a .safetensors file",
        hint="`proxytune make-proxy BASE --bridge-only` writes it",
    )
    revision: str | None = recipe_key()
    dtype: str | None = recipe_key(choices=(*DTYPES, "auto"))
    device: str | None = recipe_key()
    quantization: Mapping[str, Any] | None = field(
        default=None,
        hash=False,
        metadata=declared(
            "",
            at_least=1,
            words="an object of settings",
            hint='{"quant_method": "bitsandbytes", "load_in_4bit": true}',
        ),
    )
    attn_implementation: str | None = recipe_key()
    cuda_graphs: bool = recipe_key(False)
    prompt: str = recipe_key("plain", **_FORMAT)
    chat: str | None = recipe_key(**_FORMAT)
    trust_remote_code: bool = recipe_key(False)
    allow_pickle: bool = recipe_key(False)
    llama_cpp: LlamaCppSettings | None = None
    api: ApiSettings | None = None

    def __post_init__(self) -> None:
        keep: Any = self.keep
        if isinstance(keep, list):  # as JSON has it
            object.__setattr__(self, "keep", tuple(keep))
        check_fields(self)
        check_json(self.quantization, "quantization")
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise RecipeError(
                f"attn_implementation is {as_json(self.attn_implementation)}, a repository of the Hub, whose "
                'code would run.\nhint: if you trust it, set "trust_remote_code": true beside it'
            )
        if self.cut_of is None and (self.keep is not None or self.bridge is not None):
            raise RecipeError(
                "keep and bridge describe a cut, and cut_of is not given.\n"
                'hint: {"cut_of": "base", "keep": [3, 3], "bridge": "bridge.safetensors"}'
            )
        if self.same_as is not None:
            self._check_same_as()
        elif self.cut_of is not None:
            self._check_cut()
        elif self.model is None and self.adapter is None:
            raise RecipeError(
                "neither model nor same_as is given, so there is nothing to run.\n"
                'hint: {"model": "owner/name"}, or {"same_as": "base"} in an expert'
            )
        if self.model is not None and is_url(self.model):
            self._check_api()
        elif self.api is not None:
            raise RecipeError(
                f"api is given, but model is {as_json(self.model)}, which is not an address.\n"
                'hint: "model": "http://localhost:8000/v1", or leave api out'
            )
        elif self.llama_cpp is not None:
            self._check_llama_cpp()
        elif self.model is not None and self.adapter is not None and is_gguf(self.adapter):
            raise RecipeError(
                f"adapter is {as_json(self.adapter)}, but only llama.cpp reads GGUF adapters.\n"
                'hint: name its model as a .gguf file with "llama_cpp": {}, or the adapter as PEFT saved it'
            )

    def _check_api(self) -> None:
        if self.api is None:
            object.__setattr__(self, "api", ApiSettings())
        kept = {"model", "prompt", "chat", "api"}
        for setting in fields(self):
            if setting.name not in kept and getattr(self, setting.name) != setting.default:
                raise RecipeError(
                    f"model is the address of an API, whose server decides {setting.name}.\n"
                    f"hint: leave {setting.name} out"
                )
        try:
            parse_address(self.model or "")
        except InvalidRequest as error:
            raise RecipeError(str(error)) from error

    def _check_llama_cpp(self) -> None:
        for part, file in (("model", self.model), ("adapter", self.adapter)):
            if file is not None and not is_gguf(file):
                raise RecipeError(
                    f"llama_cpp is given, but {part} is {as_json(file)}, which is not a .gguf file.\n"
                    "hint: name a .gguf file, or make one with `proxytune export-gguf`"
                )
        for key in FOR_TRANSFORMERS:
            if getattr(self, key):
                raise RecipeError(
                    f"llama_cpp and {key} are both given, but {key} is for transformers.\n"
                    f"hint: leave {key} out; llama_cpp has settings of its own: "
                    f"{', '.join(setting.name for setting in fields(LlamaCppSettings))}"
                )

    def _check_same_as(self) -> None:
        for setting in fields(self):
            if setting.name != "same_as" and getattr(self, setting.name) != setting.default:
                raise RecipeError(
                    f"same_as and {setting.name} are both given, but the base's logits are reused as they "
                    f"are.\nhint: leave {setting.name} out, or name the model again with model"
                )

    def _check_cut(self) -> None:
        if self.bridge is None or self.keep is None or len(self.keep) != 2 or min(self.keep) < 1:
            raise RecipeError(
                "cut_of needs keep, two numbers of layers from 1 on, and bridge, a file.\n"
                'hint: {"cut_of": "base", "keep": [3, 3], "bridge": "bridge.safetensors"}'
            )
        kept = {"cut_of", "keep", "bridge", "adapter", "prompt", "chat", "allow_pickle"}
        for setting in fields(self):
            if setting.name not in kept and getattr(self, setting.name) != setting.default:
                raise RecipeError(
                    f"cut_of and {setting.name} are both given, but a cut runs as the base does.\n"
                    f"hint: leave {setting.name} out, or write the cut as a model with `proxytune make-proxy`"
                )

    @property
    def weights(self) -> ModelSpec:
        """The spec without adapter and formats; models with equal ones share one copy of the weights."""
        return replace(self, adapter=None, prompt="plain", chat=None)

    @property
    def given_chat(self) -> str | None:
        """How the recipe says that the model reads messages; None if it does not say."""
        return self.chat if self.chat or self.prompt == "plain" else self.prompt

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of this model, leaving out defaults."""
        return _without_defaults(self)


# What an expert that is only an adapter inherits from the model it sits on.
_SHARED_KEYS = (
    "model", "cut_of", "keep", "bridge", "revision", "dtype", "device", "quantization",
    "attn_implementation", "cuda_graphs", "trust_remote_code", "allow_pickle", "llama_cpp",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """How strongly each model counts in what an expert adds to the base's logits.

    An expert adds `alpha * ((base - 1) * base's logits + expert * expert's logits - anti_expert *
    anti-expert's logits + bias)`.

    Args:
        base: At strength 1 the base's temperature is 1 divided by this.
        expert: Weight of the expert.
        anti_expert: Weight of the anti-expert. With 0 here and in `expert`, the base steers itself, by its
            temperature and the bias alone.

    Raises:
        RecipeError: A value cannot be used.
    """

    base: float = recipe_key(1.0, above=0, at_most=MAX_WEIGHT)
    expert: float = recipe_key(1.0, at_least=0, at_most=MAX_WEIGHT)
    anti_expert: float = recipe_key(1.0, at_least=0, at_most=MAX_WEIGHT)

    def __post_init__(self) -> None:
        check_fields(self)
        for setting in fields(self):
            object.__setattr__(self, setting.name, float(getattr(self, setting.name)))

    def describe(self) -> str:
        """Describe the weights in one line."""
        return f"base {self.base:g}, expert {self.expert:g}, anti-expert {self.anti_expert:g}"


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """One expert with its anti-expert.

    An expert given as an adapter alone sits on the anti-expert's model. It inherits everything about those
    weights; only the prompt formats are its own.

    Args:
        name: Letters, digits, `.`, `_` and `-`.
        expert: The small model after tuning.
        anti_expert: The same small model before tuning, or one tuned to the opposite.
        alpha: Strength of steering; 0 is the base alone, 1 the published method.
        weights: How strongly base, expert and anti-expert count.
        bias: A local `.safetensors` file, or `package:NAME/PATH`, with a number to add to the logits of some
            tokens: `token_ids` (int64, of the base's vocabulary) and `values` (float32).

    Raises:
        RecipeError: A value cannot be used, or two exclude each other.
    """

    name: str = field(
        metadata=declared(
            "",
            pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$",
            words="letters, digits, '.', '_' and '-', beginning with a letter or digit",
        )
    )
    expert: ModelSpec
    anti_expert: ModelSpec
    alpha: float = 1.0
    weights: ExpertWeights = field(default_factory=ExpertWeights)
    bias: str | None = recipe_key(
        pattern=r"\.safetensors$",
        words="the name of a .safetensors file",
        hint="it holds token_ids (int64) and values (float32)",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            object.__setattr__(self, "alpha", check_alpha(self.alpha))
        except InvalidRequest as error:
            raise RecipeError(str(error)) from error
        for part in ("expert", "anti_expert"):
            if getattr(self, part).api is not None:
                raise RecipeError(
                    f"{part} is behind an API, which shows too few logits; only a base may be.\n"
                    "hint: name a small model that runs here"
                )
        if self.expert.same_as and self.anti_expert.same_as:
            raise RecipeError(
                'expert and anti_expert are both {"same_as": "base"}, so their difference is zero.\n'
                "hint: name a model for one of them"
            )
        if not (self.anti_expert.same_as or self.anti_expert.cut_of or self.anti_expert.model):
            raise RecipeError(
                "anti_expert has an adapter but no model to put it on.\n"
                'hint: {"model": "owner/name", "adapter": "adapters/opposite"}'
            )
        if not (self.expert.same_as or self.expert.cut_of or self.expert.model):
            object.__setattr__(self, "expert", self._on_the_anti_experts_model())

    @property
    def has_weights(self) -> bool:
        """Whether a weight differs from 1."""
        return self.weights != ExpertWeights()

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
                    f"({as_json(own[key])}) is not theirs ({as_json(getattr(self.anti_expert, key))}).\n"
                    f"hint: set {key} in anti_expert, or give expert a model of its own"
                )
        return replace(self.expert, **{key: getattr(self.anti_expert, key) for key in _SHARED_KEYS})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of this expert."""
        expert = self.expert.to_dict()
        if self.expert.adapter is not None and self.expert.weights == self.anti_expert.weights:
            expert = {key: value for key, value in expert.items() if key not in _SHARED_KEYS}
        content: dict[str, Any] = {
            "name": self.name,
            "anti_expert": self.anti_expert.to_dict(),
            "expert": expert,
            "alpha": self.alpha,
        }
        if self.has_weights:
            content["weights"] = _without_defaults(self.weights)
        if self.bias is not None:
            content["bias"] = self.bias
        return content


def model_spec(value: Any, place: str) -> ModelSpec:
    """Build a model from its JSON object; `place` names it in errors."""
    value = as_object(value, place)
    known = [setting.name for setting in fields(ModelSpec)]
    check_keys(value, known=known, place=place)
    for key, kind in (("llama_cpp", LlamaCppSettings), ("api", ApiSettings)):
        if value.get(key) is None:
            continue
        settings = as_object(value[key], f"{place}.{key}")
        check_keys(settings, known=[s.name for s in fields(kind)], place=f"{place}.{key}")
        try:
            value[key] = kind(**settings)
        except RecipeError as error:
            raise RecipeError(f"{place}.{key}: {error}") from error
    try:
        return ModelSpec(**value)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error


def expert_spec(value: Any, place: str) -> ExpertSpec:
    """Build an expert from its JSON object; `place` names it in errors."""
    value = as_object(value, place)
    check_keys(value, known=[setting.name for setting in fields(ExpertSpec)], place=place)
    check_required(value, ("name", "expert", "anti_expert"), place)
    expert = model_spec(value["expert"], f"{place}.expert")
    anti_expert = model_spec(value["anti_expert"], f"{place}.anti_expert")
    given = value.get("weights")
    weights = {} if given is None else as_object(given, f"{place}.weights")
    check_keys(weights, known=[s.name for s in fields(ExpertWeights)], place=f"{place}.weights")
    try:
        own = ExpertWeights(**weights)
    except RecipeError as error:
        raise RecipeError(f"{place}.weights: {error}") from error
    alpha, bias = value.get("alpha", 1.0), value.get("bias")
    try:
        return ExpertSpec(value["name"], expert, anti_expert, alpha, own, bias)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error


def _without_defaults(settings: Any) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if value == setting.default:
            continue
        if is_dataclass(value):
            value = _without_defaults(value)
        content[setting.name] = dict(value) if isinstance(value, Mapping) else value
    return content
