"""Models of the Hugging Face Hub, run by transformers on CPU or GPU; LoRA adapters as rows of one forward.

Token ids only: text never reaches this file. Where a model's files are is known to `checkpoint.py`, what a
recipe asks for to `recipe.py`.

Words: a *slot* is one column of the KV cache. Rows are aligned at the right: the last token of every row sits
in the last slot, and a row with fewer tokens than slots has padding on its left, which no token attends to.
Rewinding rows by different counts moves their keys and values to the right again, so that distances between
slots stay distances between tokens; sliding windows need that.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from proxytune.backends.base import Backend, Capabilities, Prefilled
from proxytune.checkpoint import max_context, running_device, running_dtype
from proxytune.errors import (
    AdapterMismatch,
    BackendError,
    CorruptModel,
    InvalidRequest,
    MissingExtra,
    ModelNotFound,
    NotEnoughMemory,
    PromptTooLong,
    ProxytuneError,
    UnsafeModel,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from proxytune.checkpoint import AdapterFiles, Checkpoint
    from proxytune.recipe import ModelSpec

PLAIN = "__base__"
"""PEFT's name for a row without an adapter."""

_ROW_ADAPTERS: ContextVar[list[str] | None] = ContextVar("row_adapters", default=None)
"""The adapter of each row of the forward that is under way."""


@dataclass(slots=True)
class TransformersState:
    """What a batch has seen: keys and values, and how many tokens each row holds."""

    cache: Any
    num_slots: int
    lengths: list[int]
    adapters: tuple[str | None, ...]

    def attention_mask(self, num_new: int, device: torch.device) -> Tensor | None:
        """Return `[batch, num_slots + num_new]`, 0 at padding; None where there is none."""
        if all(length == self.num_slots for length in self.lengths):
            return None
        padding = torch.tensor([self.num_slots - n for n in self.lengths], device=device)
        slots = torch.arange(self.num_slots + num_new, device=device)
        return (slots >= padding[:, None]).long()

    def position_ids(self, num_new: int, device: torch.device) -> Tensor:
        """Return `[batch, num_new]`: the positions of the next tokens in their own rows."""
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(
            num_new, device=device
        )


class TransformersBackend(Backend[TransformersState]):
    """A causal language model of transformers.

    `prefill`, `extend`, `rewind` and `select` keep the books of a batch. `run` and `new_cache` are the layer
    below, for an engine that keeps its own (`integrations/transformers.py`).

    Args:
        model: A causal language model, or a PEFT model around one. It is put into evaluation mode.
        name: How errors call it.
        adapters: Adapters that rows may be given, by their PEFT names, or a mapping from other names to
            those.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        adapters: Sequence[str] | Mapping[str, str] = (),
    ) -> None:
        self.name = name
        wrapped: Any = model
        self.model: Any = wrapped.get_base_model() if hasattr(wrapped, "peft_config") else wrapped
        self.model.eval()
        self._peft_names = dict(
            adapters if isinstance(adapters, Mapping) else {name: name for name in adapters}
        )
        self._has_lora = _route_rows_to_adapters(self.model)
        config = self.model.config.get_text_config(decoder=True)
        head = self.model.get_output_embeddings()
        self.vocab_size = int(getattr(head, "out_features", None) or config.vocab_size)
        self._num_embeddings = int(
            getattr(self.model.get_input_embeddings(), "num_embeddings", None) or config.vocab_size
        )
        self._options = frozenset(inspect.signature(self.model.forward).parameters)
        self._cache_option = next(
            (option for option in ("past_key_values", "cache_params") if option in self._options),
            None,
        )
        if self._cache_option is None:
            raise UnsupportedModel(
                f"{name} is a {type(self.model).__name__}, which takes no KV cache, so it cannot decode "
                "one token at a time"
            )
        self._is_pure_attention = _is_pure_attention(config)
        self._max_context = max_context(config)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        adapters: Mapping[str, AdapterFiles] | None = None,
    ) -> TransformersBackend:
        """Load a model's weights, and adapters onto the same copy of them.

        Args:
            checkpoint: The model's files.
            spec: What the recipe asks for: dtype, device, quantisation, attention implementation.
            adapters: LoRA adapters by the names that rows will use.

        Raises:
            CorruptModel: The weights cannot be read or do not belong to the config.
            UnsafeModel: There are only pickled weights and `allow_pickle` is not set.
            UnsupportedModel: transformers does not know the model, or an adapter changes more than LoRA
                layers.
            AdapterMismatch: An adapter's weights do not fit the model.
            MissingExtra: A quantisation or attention library is not installed.
            NotEnoughMemory: The weights did not fit.
        """
        with quietly():
            model = _load_model(checkpoint, spec)
            names: dict[str, str] = {}
            if adapters:
                model, names = _add_adapters(model, checkpoint.name, adapters, spec.allow_pickle)
        model.requires_grad_(False)
        return cls(model, name=checkpoint.name, adapters=names)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        weight: Any = getattr(self.model.get_input_embeddings(), "weight", None)
        places: Iterator[Any] = (w for w in (weight, *self.model.parameters()) if w is not None)
        device: torch.device = next(place.device for place in places if place.device.type != "meta")
        return device

    @property
    def capabilities(self) -> Capabilities:
        """Say what this model can do."""
        return Capabilities(
            max_context=self._max_context,
            can_rewind=self._is_pure_attention,
            adapters=tuple(self._peft_names),
        )

    def new_cache(self) -> Any:
        """Return an empty KV cache of this model."""
        if self._is_pure_attention:
            # Without the config every layer keeps all keys, so that any number of tokens can be taken back.
            # A sliding window is then up to the attention mask.
            return transformers.DynamicCache()
        return transformers.DynamicCache(config=self.model.config)

    def run(
        self,
        token_ids: Tensor,
        *,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        adapters: Sequence[str | None] | None = None,
        num_logits: int = 0,
    ) -> Tensor:
        """Run tokens through the model, append them to the cache and return logits.

        Args:
            token_ids: `[batch, num_tokens]`, on this model's device.
            cache: From `new_cache`; None to keep nothing.
            attention_mask: `[batch, slots + num_tokens]`, 0 at padding; None where there is none.
            position_ids: `[batch, num_tokens]`; None for consecutive ones from the first slot on.
            adapters: The adapter of each row, None for the plain weights.
            num_logits: Return logits of the last so many tokens only; 0 for all.

        Returns:
            `[batch, num_logits or num_tokens, vocab]` in the model's dtype.

        Raises:
            InvalidRequest: An adapter has an unknown name.
            BackendError: The model failed. The cache may hold half of a forward: drop it.
        """
        if (
            self._cache_option == "cache_params"
            and attention_mask is not None
            and attention_mask.shape[1] != token_ids.shape[1]
        ):
            attention_mask = (
                None  # a pure state-space model has no slots: its state has left padding out
            )
        options: dict[str, Any] = {
            "input_ids": token_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": cache is not None,
            "logits_to_keep": num_logits,
            self._cache_option or "": cache,
        }
        options = {key: value for key, value in options.items() if key in self._options}
        rows = self._rows(adapters, token_ids.shape[0]) if self._has_lora else None
        token = _ROW_ADAPTERS.set(rows)
        try:
            logits: Tensor = self.model(**options).logits
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{self.name} ran out of memory on {token_ids.shape[0]} rows of {token_ids.shape[1]} tokens\n"
                "hint: use a smaller batch, a shorter prompt, or a smaller dtype"
            ) from error
        except ProxytuneError:
            raise
        except Exception as error:
            raise BackendError(f"{self.name} failed: {type(error).__name__}: {error}") from error
        finally:
            _ROW_ADAPTERS.reset(token)
        return logits[:, -num_logits:]

    def check_length(self, num_tokens: int) -> None:
        """Raise `PromptTooLong` if a row of so many tokens exceeds the model's context."""
        if self._max_context is not None and num_tokens > self._max_context:
            raise PromptTooLong(
                f"{self.name} can hold {self._max_context} tokens, and was asked to hold {num_tokens}.\n"
                "hint: shorten the prompt, or ask for fewer new tokens"
            )

    def check_token_ids(self, token_ids: Tensor) -> None:
        """Raise `InvalidRequest` if the model has no embedding for a token id."""
        lowest, highest = (int(bound) for bound in torch.aminmax(token_ids))
        if lowest < 0 or highest >= self._num_embeddings:
            wrong = lowest if lowest < 0 else highest
            raise InvalidRequest(
                f"{self.name} has no token {wrong}; its token ids go from 0 to {self._num_embeddings - 1}"
            )

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None] | None = None
    ) -> Prefilled[TransformersState]:
        """Run whole prompts, padded on the left, and return the state and the logits after each.

        Raises:
            InvalidRequest: A prompt is empty or has a token id the model does not have, or an adapter has
                an unknown name.
            PromptTooLong: A prompt exceeds the model's context.
            BackendError: The model failed.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or not min(lengths):
            raise InvalidRequest(
                f"{self.name} was given an empty prompt, so there is nothing to continue"
            )
        self.check_length(max(lengths))
        width = max(lengths)
        padded = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        self.check_token_ids(padded)
        rows = tuple(adapters) if adapters is not None else (None,) * len(prompts)
        self._rows(rows, len(prompts))
        state = TransformersState(self.new_cache(), width, lengths, rows)
        device = self.device
        mask = state.attention_mask(0, device)
        positions = torch.arange(width, device=device) - torch.tensor(
            [[width - n] for n in lengths], device=device
        )
        logits = self.run(
            padded.to(device),
            cache=state.cache,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            adapters=rows,
            num_logits=1,
        )
        return Prefilled(state, logits[:, -1])

    @torch.inference_mode()
    def extend(self, state: TransformersState, token_ids: Tensor) -> Tensor:
        """Append `[batch, num_tokens]` token ids and return logits `[batch, num_tokens, vocab]`.

        Raises:
            InvalidRequest: The model does not have a token id, or the rows are not the state's.
            PromptTooLong: A row would exceed the model's context.
            BackendError: The model failed. The state cannot be used again.
        """
        if (
            token_ids.dim() != 2
            or token_ids.shape[0] != len(state.lengths)
            or not token_ids.shape[1]
        ):
            raise InvalidRequest(
                f"{self.name} was given token ids of shape {list(token_ids.shape)}, and needs "
                f"[{len(state.lengths)}, num_tokens] with at least one token"
            )
        num_new = token_ids.shape[1]
        self.check_length(max(state.lengths) + num_new)
        self.check_token_ids(token_ids)
        token_ids = token_ids.to(self.device)
        if self._is_pure_attention:
            return self._append(state, token_ids)
        # Not every state-space model goes on from its state when it is given several tokens at once.
        return torch.cat(
            [self._append(state, token_ids[:, i : i + 1]) for i in range(num_new)], dim=1
        )

    @torch.inference_mode()
    def rewind(self, state: TransformersState, num_tokens: Sequence[int]) -> None:
        """Forget the last `num_tokens[row]` tokens of each row.

        Raises:
            UnsupportedModel: The model has layers that cannot forget.
            InvalidRequest: A row does not hold that many tokens.
        """
        if not self._is_pure_attention:
            raise UnsupportedModel(
                f"{self.name} has layers without a KV cache of their own for each token, so tokens cannot be "
                "taken back"
            )
        if len(num_tokens) != len(state.lengths) or any(
            not 0 <= n <= length for n, length in zip(num_tokens, state.lengths, strict=True)
        ):
            raise InvalidRequest(
                f"{self.name} cannot rewind rows of {state.lengths} tokens by {list(num_tokens)}"
            )
        fewest = min(num_tokens)
        if fewest:
            state.cache.crop(-fewest)
            state.num_slots -= fewest
        for row, surplus in enumerate(n - fewest for n in num_tokens):
            if not surplus:
                continue
            for layer in _filled_layers(state.cache):
                for kept in (layer.keys[row], layer.values[row]):  # views: [heads, slots, size]
                    kept[:, surplus:] = kept[:, : kept.shape[1] - surplus].clone()
        state.lengths = [length - n for length, n in zip(state.lengths, num_tokens, strict=True)]
        self._drop_padding(state)

    @torch.inference_mode()
    def select(self, state: TransformersState, rows: Sequence[int]) -> TransformersState:
        """Return a state of the given rows in the given order; rows may repeat.

        The old state must not be used after.
        """
        # `reorder_cache` is an index_select, and the one selection that every kind of layer has.
        state.cache.reorder_cache(torch.tensor(rows, dtype=torch.long, device=self.device))
        selected = TransformersState(
            state.cache,
            state.num_slots,
            [state.lengths[row] for row in rows],
            tuple(state.adapters[row] for row in rows),
        )
        if self._is_pure_attention and rows:
            self._drop_padding(selected)
        return selected

    def _append(self, state: TransformersState, token_ids: Tensor) -> Tensor:
        num_new = token_ids.shape[1]
        device = token_ids.device
        logits = self.run(
            token_ids,
            cache=state.cache,
            attention_mask=state.attention_mask(num_new, device),
            position_ids=state.position_ids(num_new, device),
            adapters=state.adapters,
        )
        state.num_slots += num_new
        state.lengths = [length + num_new for length in state.lengths]
        return logits

    @staticmethod
    def _drop_padding(state: TransformersState) -> None:
        """Drop the slots that are padding in every row."""
        unused = state.num_slots - max(state.lengths)
        if unused:
            for layer in _filled_layers(state.cache):
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
            state.num_slots -= unused

    def _rows(self, adapters: Sequence[str | None] | None, num_rows: int) -> list[str]:
        """Return PEFT's name for the adapter of each row."""
        if adapters is None:
            return [PLAIN] * num_rows
        if len(adapters) != num_rows:
            raise InvalidRequest(
                f"{self.name} was given {len(adapters)} adapters for {num_rows} rows"
            )
        try:
            return [PLAIN if name is None else self._peft_names[name] for name in adapters]
        except KeyError as error:
            known = ", ".join(self._peft_names) or "none"
            raise InvalidRequest(
                f"{self.name} has no adapter {error.args[0]!r}; it has: {known}"
            ) from None


def _is_pure_attention(config: Any) -> bool:
    """Whether every layer's cache is keys and values of single tokens, so that tokens can be taken back."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = transformers.DynamicCache(config=config).layers
    # By name: transformers 5.19 has no DummyLayer, for layers that use another layer's keys.
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        or type(layer).__name__ == "DummyLayer"
        for layer in layers
    )


def _filled_layers(cache: Any) -> Iterator[Any]:
    """Yield the layers that hold keys and values."""
    return (layer for layer in cache.layers if layer.is_initialized)


def _route_rows_to_adapters(model: nn.Module) -> bool:
    """Make each LoRA layer take its rows' adapters from `_ROW_ADAPTERS`; return whether there is any.

    PEFT's own forward does the same with hooks that it adds and removes at every call, which takes longer
    than a small model's forward of one token.
    """
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return False
    from peft.tuners.lora import LoraLayer

    def add_rows(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        rows = _ROW_ADAPTERS.get()
        return None if rows is None else (args, {**kwargs, "adapter_names": rows})

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if not getattr(layer, "_proxytune_rows", False):
            layer.register_forward_pre_hook(add_rows, with_kwargs=True)
            layer._proxytune_rows = True
    return True


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence progress bars, log lines and warnings of transformers and PEFT, and put all back after."""
    import huggingface_hub.utils
    import transformers.utils.logging

    hub: Any = huggingface_hub.utils
    logging: Any = transformers.utils.logging
    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    had_hub_bars = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
        # transformers switches the hub's bars with its own.
        if had_hub_bars:
            hub.enable_progress_bars()
        else:
            hub.disable_progress_bars()


def _load_model(checkpoint: Checkpoint, spec: ModelSpec) -> Any:
    """Load the weights with transformers and translate what goes wrong."""
    from safetensors import SafetensorError

    name = checkpoint.name
    device = running_device(spec.device)
    options: dict[str, Any] = {
        "dtype": getattr(
            torch, running_dtype(spec.dtype, stored_dtype=checkpoint.stored_dtype, device=device)
        ),
        "use_safetensors": None if spec.allow_pickle else True,
        "trust_remote_code": spec.trust_remote_code,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization is not None:
        options["quantization_config"] = _quantization_config(spec.quantization, name)
    if device != "cpu" or spec.quantization is not None:
        options["device_map"] = device if device == "auto" else {"": device}
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.weights_path(), **options
        )
    except ProxytuneError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NotEnoughMemory(
            f"the weights of {name} do not fit into the memory of {device}: {error}\n"
            'hint: choose a smaller dtype, a quantization, or device "auto" to spread them'
        ) from error
    except ImportError as error:
        raise MissingExtra(
            f"{name} needs a package that is not installed: {error}\n"
            "hint: pip install 'proxytune[quantize]' for quantization; leave attn_implementation out to use "
            "the one that torch brings"
        ) from error
    except (SafetensorError, json.JSONDecodeError, EOFError) as error:
        raise CorruptModel(f"the files of {name} cannot be read: {error}") from error
    except RuntimeError as error:
        raise CorruptModel(f"the weights of {name} do not fit its config: {error}") from error
    except OSError as error:
        raise ModelNotFound(f"the weights of {name} cannot be opened: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"transformers cannot load {name} as asked: {error}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CorruptModel(
            f"the files of {name} lack {len(missing)} weights, which would be random: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )
    return model


def _quantization_config(quantization: Mapping[str, Any], name: str) -> Any:
    """Return transformers' config for `{"quant_method": …, options}`; `method` is the same.

    `{"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig", …}` names a class of
    `torchao.quantization` and its options. Without a method, `load_in_4bit` and `load_in_8bit` are
    bitsandbytes'.
    """
    options = dict(quantization)
    method = options.pop("quant_method", None) or options.pop("method", None)
    if method is None and ("load_in_4bit" in options or "load_in_8bit" in options):
        method = "bitsandbytes"
    if method == "bitsandbytes":
        _require("bitsandbytes", name)
        return _build(transformers.BitsAndBytesConfig, options, "bitsandbytes", name)
    if method == "torchao":
        torchao = _require("torchao.quantization", name)
        kind = options.pop("quant_type", None)
        known = sorted(key for key in vars(torchao) if key.endswith("Config"))
        if kind not in known:
            raise UnsupportedModel(
                f"the quantization of {name} has quant_type {kind!r}; torchao knows: {', '.join(known)}"
            )
        own = {key: options.pop(key) for key in ("modules_to_not_convert",) if key in options}
        quant_type = _build(getattr(torchao, kind), options, f"torchao's {kind}", name)
        return transformers.TorchAoConfig(quant_type, **own)
    raise UnsupportedModel(
        f"the quantization of {name} has method {method!r}; this backend knows bitsandbytes and torchao"
    )


def _build(kind: Any, options: Mapping[str, Any], what: str, name: str) -> Any:
    """Call a config class, refusing options it would ignore."""
    known = inspect.signature(kind).parameters
    unknown = [key for key in options if key not in known or key == "kwargs"]
    if unknown:
        raise UnsupportedModel(
            f"the quantization of {name} has the option {unknown[0]!r}, which {what} does not know; it "
            f"knows: {', '.join(key for key in known if key != 'kwargs')}"
        )
    try:
        return kind(**options)
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModel(
            f"the quantization of {name} is not one of {what}: {error}"
        ) from error


def _require(module: str, name: str) -> Any:
    """Import a quantisation library."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(
            f"{name} is to be quantised with {package}, which cannot be imported: {error}\n"
            "hint: pip install 'proxytune[quantize]'"
        ) from error


_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the weights under an adapter as they are."""


def _add_adapters(
    model: Any, model_name: str, adapters: Mapping[str, AdapterFiles], allow_pickle: bool
) -> tuple[Any, dict[str, str]]:
    """Put LoRA adapters onto a model; return it and PEFT's names for them."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    names = {name: f"adapter_{index}" for index, name in enumerate(adapters)}  # PEFT allows no dots
    wrapped: Any = None
    for name, files in adapters.items():
        try:
            config: Any = PeftConfig.from_pretrained(str(files.directory))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CorruptModel(
                f"the config of adapter {files.name} cannot be read: {error}"
            ) from error
        weights = _adapter_weights(files, allow_pickle)
        _check_adapter_kind(config, weights, files.name)
        config.inference_mode = True
        misfit = f"adapter {files.name} does not fit {model_name}"
        hint = "\nhint: an adapter fits only the model it was trained on"
        try:
            if wrapped is None:
                wrapped = PeftModel(model, config, names[name], autocast_adapter_dtype=False)
            else:
                wrapped.add_adapter(names[name], config, autocast_adapter_dtype=False)
            result: Any = set_peft_model_state_dict(wrapped, weights, names[name])
        except (ValueError, RuntimeError, KeyError) as error:
            raise AdapterMismatch(f"{misfit}: {error}{hint}") from error
        missing = [key for key in result.missing_keys if f".{names[name]}." in key]
        wrong = list(result.unexpected_keys) or missing
        if wrong:
            what = (
                "has weights the model has no place for"
                if result.unexpected_keys
                else "lacks weights"
            )
            raise AdapterMismatch(
                f"{misfit}: it {what}, {wrong[0]} and {len(wrong) - 1} more{hint}"
            )
    return wrapped, names


def _adapter_weights(files: AdapterFiles, allow_pickle: bool) -> dict[str, Tensor]:
    """Read an adapter's weights on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = files.directory / "adapter_model.safetensors"
    pickled = files.directory / "adapter_model.bin"
    try:
        if path.is_file():
            return load_file(path)
        if allow_pickle and pickled.is_file():
            weights: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
            return weights
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise CorruptModel(
            f"the weights of adapter {files.name} cannot be read: {error}"
        ) from error
    if pickled.is_file():
        raise UnsafeModel(
            f"adapter {files.name} has only pickled weights, and unpickling can run code.\n"
            "hint: save it as safetensors, or set allow_pickle if you trust it"
        )
    raise ModelNotFound(
        f"adapter {files.name} has no adapter_model.safetensors in {files.directory}"
    )


def _check_adapter_kind(config: Any, weights: Mapping[str, Tensor], name: str) -> None:
    """Refuse an adapter that cannot share one forward with plain rows."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UnsupportedModel(
            f"adapter {name} is of kind {kind}, and only LORA adapters can share a forward with plain rows\n"
            "hint: merge the adapter into a copy of its model and give that as the expert's model"
        )
    changes = [
        key
        for key in (
            "modules_to_save",
            "trainable_token_indices",
            "target_parameters",
            "layer_replication",
            "use_dora",
            "alora_invocation_tokens",
        )
        if getattr(config, key, None)
    ]
    if getattr(config, "bias", "none") != "none":
        changes.append(f"bias {config.bias!r}")
    if getattr(config, "init_lora_weights", True) not in _INITIALISATIONS:
        changes.append(f"init_lora_weights {config.init_lora_weights!r}")
    changes += [key for key in weights if ".lora_A." not in key and ".lora_B." not in key][:1]
    if changes:
        raise UnsupportedModel(
            f"adapter {name} changes more than what can be switched for each row: {', '.join(changes)}\n"
            "hint: merge the adapter into a copy of its model and give that as the expert's model"
        )
