"""Loading a model's weights with transformers."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import transformers

from proxytune.backends.transformers.quantized import (
    check_stored_quantization,
    is_quantised,
    quantization_config,
    stored_quantization,
    try_quantization,
)
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
