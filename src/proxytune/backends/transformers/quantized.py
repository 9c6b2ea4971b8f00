"""Models in 8 or 4 bits: what bitsandbytes and torchao make of them, tried before any weight is read.

A quantiser may need a GPU, a package, or layers of certain widths, and says so only while it quantises or
runs a layer. So a layer of each width that a model has is quantised and run once, with random weights. That
shows what fails, and how much memory the weights take.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from proxytune.checkpoints.faults import faults_as, shown
from proxytune.errors import UnsupportedModel, missing_extra

if TYPE_CHECKING:
    from proxytune.checkpoints.checkpoint import Checkpoint

TRIED_ROWS = 256
"""Maximum number of outputs of a layer that is tried; quantisers work row by row."""

_OTHER_CONFIGS = {"PrototypeInt4WeightOnlyConfig": "torchao.prototype.quantization.int4"}
"""Configs that `torchao.quantization` does not have; this one keeps 4 bits on a CPU."""


def quantization_config(quantization: Mapping[str, Any], name: str) -> Any:
    """Return transformers' config for `{"quant_method": …, options}`; `method` means the same.

    `{"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig", …}` names a class of
    `torchao.quantization` and its options. Options that JSON has no values for are written as torchao writes
    them, `{"_type": "PerGroup", "_data": {"group_size": 32}}`. Without a method, `load_in_4bit` and
    `load_in_8bit` mean bitsandbytes.

    Raises:
        MissingExtra: The package is not installed.
        UnsupportedModel: The method or an option is not known.
    """
    options = dict(quantization)
    method = quantization_method(quantization)
    for key in ("quant_method", "method"):
        options.pop(key, None)
    if method == "bitsandbytes":
        _require("bitsandbytes", name)
        return _build(transformers.BitsAndBytesConfig, options, "bitsandbytes", name)
    if method == "torchao":
        torchao = _require("torchao.quantization", name)
        kind = options.pop("quant_type", None)
        known = {key: value for key, value in vars(torchao).items() if key.endswith("Config")}
        for key, module in _OTHER_CONFIGS.items():
            if kind == key:
                known[key] = getattr(_require(module, name), key)
        if kind not in known:
            raise UnsupportedModel(
                f"the quantization of {name} has quant_type {shown(kind)}; torchao knows: "
                f"{', '.join(sorted({*known, *_OTHER_CONFIGS}))}"
            )
        own = {key: options.pop(key) for key in ("modules_to_not_convert",) if key in options}
        options = {key: _value(value, name) for key, value in options.items()}
        quant_type = _build(known[kind], options, f"torchao's {kind}", name)
        return _build(
            transformers.TorchAoConfig, {"quant_type": quant_type, **own}, "torchao", name
        )
    raise UnsupportedModel(
        f"the quantization of {name} has method {method!r}; this backend knows bitsandbytes and torchao"
    )


def quantization_method(quantization: Mapping[str, Any]) -> str | None:
    """Return the quantiser's name as the recipe has it."""
    method = quantization.get("quant_method") or quantization.get("method")
    if method is None and ("load_in_4bit" in quantization or "load_in_8bit" in quantization):
        return "bitsandbytes"
    return method


def _value(value: Any, name: str) -> Any:
    """Return an option's value, read by torchao if it is an object of torchao's."""
    if not isinstance(value, Mapping) or "_type" not in value:
        return value
    from torchao.core.config import config_from_dict

    def error(why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"the quantization of {name} has a value that torchao refuses: {why}"
        )

    with faults_as(error):
        return config_from_dict(dict(value))


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
    except (TypeError, ValueError, AttributeError, AssertionError) as error:
        raise UnsupportedModel(
            f"the quantization of {name} is not one of {what}: {error}"
        ) from error


def _require(module: str, name: str) -> Any:
    package = module.partition(".")[0]
    # torchao reports each GPU library that it cannot load, on machines that have no use for it.
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise missing_extra(
            f"{name} is to be quantised with {package}, which cannot be imported: {error}",
            "quantize",
        ) from error
    finally:
        logger.setLevel(level)
    if package == "bitsandbytes":
        # It repeats at every product that the inputs are rounded to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return found


def try_quantization(
    checkpoint: Checkpoint, quantization: Mapping[str, Any], *, dtype: str, device: str
) -> int:
    """Quantise and run layers of each width that a model has; return the memory of all its weights, in bytes.

    Args:
        checkpoint: The model; its weights are not read.
        quantization: What the recipe asks for.
        dtype: The dtype of what is not quantised.
        device: The device from `running_device`.

    Raises:
        MissingExtra: The package is not installed.
        UnsupportedModel: The quantiser does not run here, not with these layers, or would leave them as they
            are; or the stored weights are quantised already.
    """
    name = checkpoint.name
    stored = stored_quantization(checkpoint)
    if stored is not None:
        raise UnsupportedModel(
            f"{name} is stored in quantised form ({stored}), so it cannot be quantised again.\n"
            "hint: leave its quantization out"
        )
    config = quantization_config(quantization, name)
    where = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )
    kept = tuple(getattr(config, "modules_to_not_convert", None) or ())
    kept += tuple(getattr(config, "llm_int8_skip_modules", None) or ())
    # As transformers does: embeddings and the output head stay as they are.
    layers = {
        layer: shape
        for layer, shape in checkpoint.linear_shapes.items()
        if "embed" not in layer
        and not layer.endswith(("lm_head", "wte", "wpe"))
        and not any(k in layer for k in kept)
    }
    widest: dict[
        int, tuple[int, str]
    ] = {}  # a layer with the most outputs for each number of inputs
    for layer, (num_inputs, num_outputs) in layers.items():
        if num_inputs not in widest or num_outputs > widest[num_inputs][0]:
            widest[num_inputs] = (num_outputs, layer)
    bits: dict[int, float] = {}
    for num_inputs, (num_outputs, layer) in widest.items():
        rows = num_outputs if num_outputs <= TRIED_ROWS else TRIED_ROWS + num_outputs % 32
        bits[num_inputs] = _tried(
            config, (num_inputs, rows), getattr(torch, dtype), where, layer, name
        )
    quantised_bytes, num_quantised = 0.0, 0
    for num_inputs, num_outputs in layers.values():
        quantised_bytes += num_inputs * num_outputs * bits[num_inputs] / 8
        num_quantised += num_inputs * num_outputs
    element = int(getattr(torch, dtype).itemsize)
    return round(quantised_bytes + element * (checkpoint.num_parameters - num_quantised))


def _tried(
    config: Any,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    layer: str,
    name: str,
) -> float:
    """Quantise a layer, run it on one row and on three, and return the bits that it takes per weight."""
    num_inputs, num_outputs = shape
    what = f"{layer} ({num_inputs:,} inputs) of {name}"
    hint = f"hint: choose another quantization, or leave it out and set a dtype; here it runs on {device}"

    def error(why: str) -> UnsupportedModel:
        return UnsupportedModel(f"{what} cannot be quantised as asked: {why}\n{hint}")

    with faults_as(error), torch.inference_mode(), torch.random.fork_rng([]):
        plain = nn.Linear(num_inputs, num_outputs, bias=False, dtype=dtype, device=device)
        quantised = _quantised(config, plain.requires_grad_(False)).eval()
        for num_rows in (1, 3):
            quantised(torch.randn(num_rows, num_inputs, dtype=dtype, device=device))
        weight = quantised.weight
    if type(weight) is nn.Parameter:
        raise UnsupportedModel(
            f"the quantiser leaves {what} as it is: its inputs are no multiple of the group size.\n"
            "hint: set a group_size that divides them, such as 32"
        )
    return 8 * _num_bytes(weight) / (num_inputs * num_outputs)


def _quantised(config: Any, plain: nn.Linear) -> nn.Module:
    if isinstance(config, transformers.TorchAoConfig):
        from torchao.quantization import quantize_

        holder = nn.Sequential(plain)
        quantize_(holder, config.quant_type)
        return holder[0]
    import bitsandbytes

    sizes = plain.in_features, plain.out_features
    layer: Any
    if config.load_in_8bit:
        layer = bitsandbytes.nn.Linear8bitLt(
            *sizes,
            bias=False,
            has_fp16_weights=config.llm_int8_has_fp16_weight,
            threshold=config.llm_int8_threshold,
        )
    else:
        layer = bitsandbytes.nn.Linear4bit(
            *sizes,
            bias=False,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
        )
    layer.load_state_dict(plain.state_dict())
    moved: nn.Module = layer.to(plain.weight.device)
    return moved


def _num_bytes(weight: Any) -> int:
    """Return the memory of a quantised weight with its scales."""
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return sum(_num_bytes(getattr(weight, name)) for name in names)
    num_bytes = int(weight.data.nbytes)
    state = getattr(weight, "quant_state", None)
    while state is not None:
        num_bytes += int(state.absmax.nbytes)
        state = getattr(state, "state2", None)
    scales = getattr(weight, "SCB", None)
    return num_bytes + (int(scales.nbytes) if isinstance(scales, Tensor) else 0)


def joins_rows(quantization: Mapping[str, Any]) -> bool:
    """Whether a row's result depends on its batch: bitsandbytes seeks outliers in all rows together.

    Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.
    """
    threshold = quantization.get("llm_int8_threshold", 6.0)
    return bool(quantization.get("load_in_8bit")) and threshold != 0


def is_quantised(model: nn.Module) -> bool:
    """Whether any weight of a model is in a quantiser's form."""
    return any(type(parameter) is not nn.Parameter for parameter in model.parameters())


# Stored in quantised form ------------------------------------------------------------------------------


def stored_quantization(checkpoint: Checkpoint) -> str | None:
    """Return the name of the method by which a model's stored weights are quantised; None if they are not."""
    settings = _stored_settings(checkpoint)
    if settings is None:
        return None
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(settings.get("quant_method"))


def _stored_settings(checkpoint: Checkpoint) -> dict[str, Any] | None:
    config = checkpoint.config
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def check_stored_quantization(checkpoint: Checkpoint, *, device: str) -> bool:
    """Check that stored quantised weights can be run; return whether they are unpacked to do so.

    Raises:
        UnsupportedModel: They need another device or a package that is not installed, or the method is not
            known to transformers.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

    settings = _stored_settings(checkpoint)
    if settings is None:
        return True
    name, method = checkpoint.name, stored_quantization(checkpoint)
    hint = "\nhint: name a copy of the model that is not quantised, and set quantization for it"
    if method in ("torchao", "bitsandbytes"):
        _require(method, name)
    elif method not in AUTO_QUANTIZER_MAPPING:
        raise UnsupportedModel(
            f"{name} is stored in quantised form ({method}), which the installed transformers does not "
            f"know{hint}"
        )

    def error(why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{name} is stored in quantised form ({method}), and cannot be run here: {why}{hint}"
        )

    with faults_as(error):
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        places = device if device == "auto" else {"": device}
        quantizer.validate_environment(device_map=places, weights_only=True)
    return bool(getattr(quantizer.quantization_config, "dequantize", False))
