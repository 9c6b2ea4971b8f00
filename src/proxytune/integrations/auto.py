"""Recipes in transformers' `AutoConfig` and `AutoTokenizer`: a config, and the base's tokenizer.

`trust_remote_code` is the caller's word about the code of the recipe's models. The Auto classes hand it on to
a model's class, but keep it from configs and tokenizers that are registered with them. So registration also
makes them note it while they run.

Nothing here loads torch models; `integrations/__init__.py` says why that matters.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig

from proxytune.errors import UnsupportedModel
from proxytune.grants import Grants

if TYPE_CHECKING:
    from proxytune.recipe.recipe import Recipe

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Options of `from_pretrained` about where a recipe comes from."""

GRANT_OPTIONS = ("trust_remote_code", "allow_pickle", "key_env")
"""Options of `from_pretrained` by which its caller grants what a recipe asks for."""

_OTHER_FILES = ("use_fast", "tokenizer_type", "gguf_file", "tokenizer_file")
"""Options about files of a tokenizer that are not read here."""

_MODEL_OPTIONS = (
    "attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "torch_dtype", "use_safetensors",
)  # fmt: skip
"""Options of a model's `from_pretrained`, which a pipeline gives to the tokenizer's as well."""

_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)
"""Whether the caller of the Auto class that is running trusts code that comes with models."""


class ProxyTunedConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A recipe as transformers' config: the content of its config.json, unchanged.

    Attributes that transformers adds while a model runs are not saved. `kwargs` are attributes that it keeps
    in any config.
    """

    model_type = "proxytune"

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        experts: list[dict[str, Any]] | None = None,
        combine: str = "sum",
        steering: dict[str, Any] | None = None,
        default_expert: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.base = base
        self.experts = experts
        self.combine = combine
        self.steering = steering
        self.default_expert = default_expert
        self._is_trusted = _trusted.get()
        kwargs.pop("_is_trusted", None)  # No key of a recipe grants anything.
        super().__init__(**kwargs)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> ProxyTunedConfig:
        """Return the config of a recipe."""
        content = recipe.to_dict()
        del content["model_type"]
        content.pop("$schema", None)  # For editors of the file.
        return cls(**content, name_or_path=str(recipe.directory))

    def recipe(self, directory: Path | None = None) -> Recipe:
        """Return the recipe.

        Args:
            directory: Directory from which relative references start; None for the config's own.

        Raises:
            RecipeError: A value cannot be used; the message names its place.
        """
        from proxytune.recipe.recipe import Recipe

        if directory is None:
            name = str(getattr(self, "name_or_path", "") or "")
            directory = Path(name).absolute() if os.path.isdir(name) else Path.cwd()
        return Recipe.from_dict(self._content(), directory=directory)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: transformers would copy this file beside what is saved, but recipes bring their own."""

    def _content(self) -> dict[str, Any]:
        optional = {"steering": self.steering, "default_expert": self.default_expert}
        return {
            "model_type": self.model_type,
            "architectures": ["ProxyTunedForCausalLM"],
            "base": self.base,
            "experts": self.experts,
            "combine": self.combine,
            **{key: value for key, value in optional.items() if value is not None},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json."""
        import copy

        import transformers

        return copy.deepcopy({**self._content(), "transformers_version": transformers.__version__})

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the content of config.json, which has no defaults to leave out."""
        return self.to_dict()


class ProxyTunedTokenizer:
    """The tokenizer class of a recipe: `from_pretrained` returns the base's own tokenizer.

    Its chat template writes what the library renders for the recipe's models (`text/one_stream.py`).
    """

    SETTINGS = (
        "bos_token", "chat_template", "clean_up_tokenization_spaces", "eos_token", "model_max_length",
        "pad_token", "padding_side", "truncation_side", "unk_token",
    )  # fmt: skip
    """Options of `from_pretrained` that are set on it."""

    @classmethod
    def from_pretrained(cls, reference: str | os.PathLike[str], *_: Any, **options: Any) -> Any:
        """Return the tokenizer of a recipe's base.

        Args:
            reference: The recipe: a directory or a Hub id.
            **options: Those of transformers that concern the Hub, `SETTINGS`, and `GRANT_OPTIONS`.

        Warns if the recipe has a template for texts, which a tokenizer does not apply.

        Raises:
            UnsafeModel: The recipe asks for a right that the caller does not grant.
            RecipeError: The recipe is missing or malformed.
            UnsupportedModel: An option cannot be honoured.
            UserError: A model's tokenizer is missing or unsafe; see `errors.py`.
        """
        from proxytune.loading.formats import find_formats
        from proxytune.recipe.files import RecipeFiles
        from proxytune.text.one_stream import one_template

        hub = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
        settings = {key: options.pop(key) for key in cls.SETTINGS if key in options}
        grants = grants_of(options)
        refuse_options(options, ignored=(*_OTHER_FILES, *_MODEL_OPTIONS))
        recipe = read_recipe(reference, hub)
        files = RecipeFiles(recipe, grants)
        files.check_grants()
        if recipe.base.prompt != "plain":
            warnings.warn(
                "the recipe reads texts through a template, which is not applied here: texts are sent as "
                "they are.\nhint: give a text as the user's message in a chat, which the template renders",
                stacklevel=2,
            )
        tokenizer = files.checkpoint(recipe.base).tokenizer
        if settings.get("chat_template") is None:
            formats = find_formats(files)
            wanted = one_template(formats)
            # One of several templates by name stays what it is, with the others beside it.
            if formats["base"].template != wanted:
                tokenizer.chat_template = wanted
        for key, value in settings.items():
            setattr(tokenizer, key, value)
        _end_nothing(tokenizer)
        return tokenizer


def _end_nothing(tokenizer: Any) -> None:
    """Keep a tokenizer from putting tokens after a text, which a model is to continue.

    The library leaves them out too (`prompt_ids` in `text/prompts.py`).
    """
    from proxytune.text.prompts import prompt_ids

    if prompt_ids("a", tokenizer) == tokenizer.encode("a"):
        return
    rules = getattr(tokenizer, "backend_tokenizer", None)
    if rules is not None:
        content = json.loads(rules.to_str())
        _cut_after_text(content["post_processor"])
        rules.post_processor = type(rules).from_str(json.dumps(content)).post_processor


def _cut_after_text(rule: dict[str, Any]) -> None:
    """Take the tokens after a text out of a rule of the tokenizers library for what stands around a text."""
    for inner in rule.get("processors", ()):
        _cut_after_text(inner)
    pieces = rule.get("single", [])
    texts = [place for place, piece in enumerate(pieces) if "Sequence" in piece]
    if texts:
        del pieces[texts[-1] + 1 :]


def grants_of(options: dict[str, Any]) -> Grants:
    """Return what the options of `from_pretrained` grant, and take them out; what is not said is not granted.

    Raises:
        InvalidRequest: A grant is not true or false.
    """
    given = {key: options.pop(key) for key in GRANT_OPTIONS if key in options}
    given = {key: value for key, value in given.items() if value is not None}
    return Grants(**{"trust_remote_code": _trusted.get(), **given})


def check_one_prompt(recipe: Recipe, *, engine: str, hint: str) -> None:
    """Refuse a recipe whose models need different prompts or tokens, for an engine with one token stream.

    Raises:
        UnsupportedModel: They need different ones.
    """
    if recipe.vocabulary != "same":
        raise UnsupportedModel(
            f'the recipe has "vocabulary": "{recipe.vocabulary}", so its small models may read other '
            f"tokens than the base, and {engine} has one stream of tokens for all.\nhint: {hint}"
        )
    for part, spec in recipe.models.items():
        if spec.same_as is None and spec.prompt != recipe.base.prompt:
            raise UnsupportedModel(
                f"{part} reads texts as {spec.prompt!r} and base as {recipe.base.prompt!r}, and "
                f"{engine} has one stream of tokens for all.\nhint: {hint}"
            )


def read_recipe(reference: str | os.PathLike[str], hub: dict[str, Any]) -> Recipe:
    """Read a recipe from a directory, or from the Hub with transformers' options for it.

    Raises:
        RecipeError: Nothing is there, or it is malformed.
    """
    from proxytune.recipe.recipe import Recipe

    name = os.fspath(reference)
    subfolder = hub.get("subfolder") or ""
    hub = {key: value for key, value in hub.items() if key != "subfolder" and value is not None}
    if hub and not os.path.exists(name) and not name.startswith("package:"):
        from huggingface_hub import snapshot_download

        name = snapshot_download(name, **hub)
    return Recipe.read(os.path.join(name, subfolder) if subfolder else name)


def refuse_options(options: dict[str, Any], *, ignored: Sequence[str] = ()) -> None:
    """Refuse options of `from_pretrained` that would have no effect.

    Options that begin with an underscore are transformers' own, and those without a value ask for nothing.
    """
    for key, value in options.items():
        if value and not key.startswith("_") and key not in ignored:
            raise UnsupportedModel(
                f"{key} was given, and a recipe decides this for each of its models.\n"
                "hint: leave it out, and set the matching key in the recipe's config.json"
            )


def register_config() -> None:
    """Register recipes with `AutoConfig`."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register("proxytune", ProxyTunedConfig, exist_ok=True)
    _note_trust(AutoConfig)


def register_tokenizer() -> None:
    """Register recipes with `AutoTokenizer`."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    register: Any = AutoTokenizer.register
    register(ProxyTunedConfig, tokenizer_class=ProxyTunedTokenizer, exist_ok=True)
    _note_trust(AutoTokenizer)


def _note_trust(auto_class: Any) -> None:
    """Make an Auto class note what its caller says of `trust_remote_code`, for as long as it runs."""
    load = auto_class.from_pretrained.__func__
    if hasattr(load, "__wrapped__") and load.__module__ == __name__:
        return

    @functools.wraps(load, assigned=("__name__", "__qualname__", "__doc__"))
    def from_pretrained(cls: type, *arguments: Any, **options: Any) -> Any:
        token = _trusted.set(options.get("trust_remote_code") is True)
        try:
            return load(cls, *arguments, **options)
        finally:
            _trusted.reset(token)

    auto_class.from_pretrained = classmethod(from_pretrained)
