"""Loading a model's weights with transformers."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers

from proxytune.checkpoints.faults import fault_text, is_fault
from proxytune.checkpoints.placement import running_device, running_dtype
from proxytune.errors import (
    CorruptModel,
    ModelNotFound,
    NotEnoughMemory,
    ProxytuneError,
    UnsupportedModel,
    missing_extra,
)

if TYPE_CHECKING:
    from proxytune.checkpoints.checkpoint import Checkpoint
    from proxytune.recipe.spec import ModelSpec


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence progress bars, log lines and warnings of transformers and PEFT, and restore them afterwards."""
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
        # transformers switches the hub's bars along with its own.
        if had_hub_bars:
            hub.enable_progress_bars()
        else:
            hub.disable_progress_bars()


def load_model(checkpoint: Checkpoint, spec: ModelSpec) -> Any:
    """Return the model with its weights, translating transformers' errors; see `TransformersBackend.load`."""
    from safetensors import SafetensorError

    name = checkpoint.name
    checkpoint.check_buildable()  # transformers allocates what the weights' files lack before it says so
    device = running_device(spec.device)
    options: dict[str, Any] = {
        "dtype": getattr(
            torch, running_dtype(spec.dtype, stored_dtype=checkpoint.stored_dtype, device=device)
        ),
        "use_safetensors": None if checkpoint.allow_pickle else True,
        "trust_remote_code": checkpoint.trust_remote_code,
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
        raise missing_extra(
            f"{name} needs a package that is not installed: {error}",
            "quantize",
            "or leave quantization or attn_implementation out, whichever needs the package",
        ) from error
    except (SafetensorError, json.JSONDecodeError, EOFError) as error:
        raise CorruptModel(f"the files of {name} cannot be read: {error}") from error
    except RuntimeError as error:
        raise CorruptModel(f"the weights of {name} do not fit its config: {error}") from error
    except OSError as error:
        raise ModelNotFound(f"the weights of {name} cannot be opened: {error}") from error
    except BaseException as error:
        if not is_fault(error):
            raise
        why = f"transformers cannot load {name} as asked: {fault_text(error)}"
        raise UnsupportedModel(why) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CorruptModel(
            f"the files of {name} lack {len(missing)} weights, which would be random: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )
    return model


def _quantization_config(quantization: Mapping[str, Any], name: str) -> Any:
    """Return transformers' config for `{"quant_method": …, options}`; `method` means the same.

    `{"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig", …}` names a class of
    `torchao.quantization` and its options. Without a method, `load_in_4bit` and `load_in_8bit` mean
    bitsandbytes.
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
    """Call a config class, refusing options that it would ignore."""
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
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise missing_extra(
            f"{name} is to be quantised with {package}, which cannot be imported: {error}",
            "quantize",
        ) from error
