"""Loading a model's weights with transformers, and LoRA adapters onto them with PEFT."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pickle import PickleError
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from proxytune.backends.transformers.quantized import (
    check_stored_quantization,
    is_quantised,
    quantization_config,
    stored_quantization,
    try_quantization,
)
from proxytune.checkpoints.adapter import AdapterFiles, beyond_factors, lora_layers
from proxytune.checkpoints.faults import fault_text, is_fault
from proxytune.checkpoints.placement import running_device, running_dtype
from proxytune.errors import (
    AdapterMismatch,
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
    dtype = running_dtype(spec.dtype, stored_dtype=checkpoint.stored_dtype, device=device)
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "use_safetensors": None if checkpoint.allow_pickle else True,
        "trust_remote_code": checkpoint.trust_remote_code,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization is not None:
        try_quantization(checkpoint, spec.quantization, dtype=dtype, device=device)
        options["quantization_config"] = quantization_config(spec.quantization, name)
    else:
        check_stored_quantization(checkpoint, device=device)
    is_quantised_here = (spec.quantization or stored_quantization(checkpoint)) is not None
    if device != "cpu" or is_quantised_here:
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
    if spec.quantization is not None and not is_quantised(model):
        raise UnsupportedModel(
            f"{name} is a {type(model).__name__}, and none of its layers is of a kind that the quantiser "
            "knows, so nothing would be quantised.\n"
            "hint: leave its quantization out"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CorruptModel(
            f"the files of {name} lack {len(missing)} weights, which would be random: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )
    return model


def add_adapters(
    model: Any, model_name: str, adapters: Mapping[str, AdapterFiles]
) -> tuple[Any, dict[str, str]]:
    """Add LoRA adapters to a model; return the wrapped model and PEFT's names for the adapters."""
    from peft import PeftModel, set_peft_model_state_dict

    module_names = [name for name, _ in model.named_modules()]
    names = {name: f"adapter_{index}" for index, name in enumerate(adapters)}  # PEFT allows no dots
    wrapped: Any = None
    for name, files in adapters.items():
        weights = read_adapter(files)
        config = _lora_config(files, weights, module_names)
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
                "has weights the model does not have" if result.unexpected_keys else "lacks weights"
            )
            raise AdapterMismatch(
                f"{misfit}: it {what}, {wrong[0]} and {len(wrong) - 1} more{hint}"
            )
    return wrapped, names


def _lora_config(
    files: AdapterFiles, weights: Mapping[str, Tensor], module_names: Sequence[str]
) -> Any:
    """Return PEFT's config of an adapter, with the layers by name and nothing else from the adapter's own."""
    from peft import LoraConfig

    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    layers = lora_layers(files.name, files.config, shapes, module_names, files.clock)
    rank = Counter(own.rank for own in layers.values()).most_common(1)[0][0]
    alpha: Any = Counter(own.alpha for own in layers.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(layers),
        rank_pattern={re.escape(m): own.rank for m, own in layers.items() if own.rank != rank},
        alpha_pattern={re.escape(m): own.alpha for m, own in layers.items() if own.alpha != alpha},
        use_rslora=bool(files.config.get("use_rslora")),
        fan_in_fan_out=bool(files.config.get("fan_in_fan_out")),
        lora_bias=bool(files.config.get("lora_bias")),
        inference_mode=True,
    )


def read_adapter(files: AdapterFiles) -> dict[str, Tensor]:
    """Return a LoRA adapter's weights on the CPU.

    Raises:
        CorruptModel: It cannot be read.
        ModelNotFound: It has no weights.
        UnsupportedModel: It is more than LoRA factors beside linear layers.
    """
    weights = _adapter_weights(files)
    changes = beyond_factors(files.config)
    changes += [key for key in weights if ".lora_A." not in key and ".lora_B." not in key][:1]
    if changes:
        raise UnsupportedModel(
            f"adapter {files.name} changes more than can be switched for each row: {', '.join(changes)}\n"
            "hint: merge the adapter into a copy of its model and give that as the expert's model"
        )
    return weights


def _adapter_weights(files: AdapterFiles) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = files.path / "adapter_model.safetensors"
    pickled = files.path / "adapter_model.bin"
    try:
        if path.is_file():
            return load_file(path)
        if files.allow_pickle and pickled.is_file():
            weights = torch.load(pickled, map_location="cpu", weights_only=True)
            if isinstance(weights, dict) and all(isinstance(w, Tensor) for w in weights.values()):
                return weights
            raise ValueError("it holds other things than tensors by name")
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, PickleError) as error:
        raise CorruptModel(
            f"the weights of adapter {files.name} cannot be read: {error}"
        ) from error
    raise ModelNotFound(f"adapter {files.name} has no adapter_model.safetensors in {files.path}")
