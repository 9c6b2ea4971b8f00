"""The files of a LoRA adapter: found, and checked against the model they belong to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.checkpoints.checkpoint import OR_GRANT, Checkpoint
from proxytune.checkpoints.headers import (
    StoredTensor,
    read_gguf_header,
    read_json_file,
    read_safetensors_header,
)
from proxytune.checkpoints.hub import hub_adapter
from proxytune.checkpoints.references import unpinned_path
from proxytune.errors import (
    AdapterMismatch,
    CorruptModel,
    ModelNotFound,
    UnsafeModel,
    UnsupportedModel,
)

_LORA_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(embedding_)?[AB]|lora_magnitude_vector)(\.\w+)?"
)


@dataclass(frozen=True)
class AdapterFiles:
    """A LoRA adapter's files, without its values.

    Args:
        name: The reference as the recipe has it.
        path: A directory with `adapter_config.json` and `adapter_model.safetensors`, or a `.gguf` file.
        config: The content of `adapter_config.json`, or the file's metadata.
        tensors: Names and shapes of its weights.
        is_gguf: Whether it is a file for llama.cpp.
        allow_pickle: Whether pickled weights may be read.
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    is_gguf: bool = False
    allow_pickle: bool = False

    @property
    def num_parameters(self) -> int:
        """Number of weights that it adds."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    @property
    def trained_on(self) -> str | None:
        """The model that it was trained on, by its own account."""
        model = self.config.get("base_model_name_or_path")
        return model if isinstance(model, str) and model else None

    def check_fits(self, small: Checkpoint) -> None:
        """Check that every tensor of the adapter has its layer in the small model, with the same size.

        Raises:
            AdapterMismatch: A layer is missing or has another size.
        """
        problems = self._gguf_problems(small) if self.is_gguf else self._problems(small)
        if problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            source = f" (it was trained on {self.trained_on})" if self.trained_on else ""
            raise AdapterMismatch(
                f"the adapter {self.name}{source} does not fit {small.name}, where "
                f"{'; '.join(problems[:3])}{more}.\n"
                "hint: name the small model that the adapter was trained on"
            )

    def _gguf_problems(self, small: Checkpoint) -> list[str]:
        problems: list[str] = []
        for name, tensor in self.tensors.items():
            layer, _, part = name.rpartition(".lora_")
            there = small.tensors.get(layer)
            if there is None or len(tensor.shape) != 2:
                problems.append(f"{layer or name} is not there")
                continue
            outputs, inputs = there.shape[0], there.shape[-1]
            if layer == "token_embd.weight":
                continue  # it is transposed, and llama.cpp checks it
            given, wanted, what = tensor.shape[0], outputs, "outputs"
            if part == "a":
                given, wanted, what = tensor.shape[1], inputs, "inputs"
            if given != wanted:
                problems.append(f"{layer} has {wanted} {what} instead of {given}")
        return problems

    def _problems(self, small: Checkpoint) -> list[str]:
        problems: list[str] = []
        for name, tensor in self.tensors.items():
            path = name.removeprefix("base_model.model.")
            if match := _LORA_PART.fullmatch(path):
                module, part = match["module"], match["part"]
            else:
                module, part = path.rpartition(".")[0].removesuffix(".modules_to_save"), "weight"
            if module not in small.module_names:
                problems.append(f"{module} is not there")
                continue
            if module not in small.linear_shapes or len(tensor.shape) != 2:
                continue
            inputs, outputs = small.linear_shapes[module]
            if part.endswith("_A"):
                given, wanted, what = tensor.shape[1], inputs, "inputs"
            elif part.endswith("_B"):
                given, wanted, what = tensor.shape[0], outputs, "outputs"
            elif part == "weight":
                given, wanted, what = math.prod(tensor.shape), inputs * outputs, "weights"
            else:
                continue
            if given != wanted:
                problems.append(f"{module} has {wanted} {what} instead of {given}")
        return problems


def beyond_factors(config: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Return what an adapter's config sets beyond two factors per layer: `keys`, biases, initialisation."""
    found = [key for key in keys if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']!r}")
    # Other initialisations change the weights under the adapter.
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        found.append(f"init_lora_weights {config['init_lora_weights']!r}")
    return found


def find_adapter(
    reference: str, *, root: Path, revision: str | None = None, allow_pickle: bool = False
) -> AdapterFiles:
    """Return the LoRA adapter that a reference names, checked without reading its values.

    Args:
        reference: A local directory, a `.gguf` file, `package:NAME/PATH`, or a Hub id.
        root: The directory from which relative paths start.
        revision: Branch, tag or commit of a Hub id.
        allow_pickle: Accept pickled weights, which can run any code when they are loaded.

    Raises:
        ModelNotFound: It leads to no adapter.
        CorruptModel: Files exist but cannot be read.
        UnsafeModel: There are only pickled weights, and those are not allowed.
        UnsupportedModel: It is not LoRA.
        RecipeError: This kind of reference cannot be used here.
    """
    directory = unpinned_path(reference, root=root, revision=revision)
    if directory is not None and directory.is_file():
        return _gguf_adapter(reference, directory)
    if directory is None:
        directory = hub_adapter(reference, revision=revision, allow_pickle=allow_pickle)
    if not (directory / "adapter_config.json").is_file():
        hint = "an adapter's directory holds adapter_config.json and adapter_model.safetensors"
        if (directory / "config.json").is_file():
            hint = 'it is a whole model: give it as {"model": …} without an adapter'
        raise ModelNotFound(
            f"{reference} holds no adapter: no adapter_config.json in {directory}.\nhint: {hint}"
        )
    config = read_json_file(directory / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(
            f"the adapter {reference} is of type {config.get('peft_type')!r}, and only LORA can be used.\n"
            "hint: merge it into its model with PEFT's merge_and_unload, and name that model"
        )
    weights = directory / "adapter_model.safetensors"
    if weights.is_file():
        tensors = read_safetensors_header(weights)
        if not tensors:
            raise CorruptModel(f"{weights} holds no tensors.\nhint: save the adapter again")
        return AdapterFiles(reference, directory, config, tensors)
    if not (directory / "adapter_model.bin").is_file():
        raise ModelNotFound(
            f"{reference} has no weights: no adapter_model.safetensors in {directory}.\n"
            "hint: save the adapter with PEFT's save_pretrained"
        )
    if not allow_pickle:
        raise UnsafeModel(
            f"{reference} has only pickled weights (adapter_model.bin), and reading those can run any code.\n"
            "hint: save it as safetensors" + OR_GRANT.format("allow_pickle", "--allow-pickle")
        )
    return AdapterFiles(reference, directory, config, {}, allow_pickle=True)


def _gguf_adapter(reference: str, path: Path) -> AdapterFiles:
    if path.suffix.lower() != ".gguf":
        raise ModelNotFound(
            f"{reference} is a file, and an adapter is a directory or a .gguf file.\n"
            "hint: name the directory that holds adapter_config.json"
        )
    header = read_gguf_header(path)
    kind, adapter_kind = map(header.metadata.get, ("general.type", "adapter.type"))
    if kind != "adapter":
        raise ModelNotFound(
            f"{reference} holds no adapter: its general.type is {kind!r}.\n"
            'hint: if it is a whole model, give it as {"model": …} without an adapter'
        )
    if adapter_kind != "lora":
        raise UnsupportedModel(
            f"the adapter {reference} is of type {adapter_kind!r}, and only lora can be used.\n"
            "hint: merge it into its model, and name that model"
        )
    return AdapterFiles(reference, path, header.metadata, header.tensors, is_gguf=True)
