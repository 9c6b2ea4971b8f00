"""The weights of a recipe's models for vLLM, read from each model's own files, with adapters merged.

Each tensor has a name that begins with its member (`small_0.model.layers.0…`). vLLM's own layers take them
from there and cut them for their rank. A GGUF file is read from its converted copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from proxytune.checkpoints.adapter import AdapterFiles
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.merge import Merger
from proxytune.errors import AdapterMismatch
from proxytune.integrations.vllm.config import LOAD_FORMAT, RecipeConfig, ServedMember

Named = tuple[str, Tensor]


def merge(
    weights: Iterable[Named], adapter: AdapterFiles, checkpoint: Checkpoint
) -> Iterator[Named]:
    """Yield a model's weights with an adapter merged into them, in float32; layers round what they take.

    Raises:
        UnsupportedModel: It changes embedding and head, which are one weight, in different ways.
        AdapterMismatch: A parameter that the adapter changes is not in the model's files by itself.
        UserError: The adapter's files are missing, unsafe or corrupt, or do not fit the model.
    """
    merger = Merger(adapter, checkpoint, "vLLM")
    waiting = set(merger.names)
    for name, weight in weights:
        # Checkpoints of a model without its head may leave out the first part of the names.
        place = next((p for p in merger.names if p == name or p.endswith(f".{name}")), name)
        waiting.discard(place)
        yield name, merger.merged(place, weight)
    if waiting:
        raise AdapterMismatch(
            f"the adapter {adapter.name} changes {min(waiting)}, which is not in the files of its model by "
            "itself.\n"
            "hint: merge the adapter into a copy of its model with PEFT, and name that copy"
        )


def register_loader() -> None:
    """Register the loader with vLLM."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class RecipeLoader(DefaultModelLoader):  # type: ignore[misc]
        """vLLM's loader, for several models instead of one."""

        def __init__(self, load_config: Any) -> None:
            load_config = copy.copy(load_config)
            load_config.load_format = "hf"
            super().__init__(load_config)

        def download_model(self, model_config: Any) -> None:
            """Fetch or convert files that are not there yet."""
            if not isinstance(model_config.hf_config, RecipeConfig):
                super().download_model(model_config)
                return
            for member in model_config.hf_config.ensemble.members:
                member.checkpoint.weights_path()

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[Named]:
            """Yield the weights of all members under their names; those of a draft model as they are."""
            if not isinstance(model_config.hf_config, RecipeConfig):
                yield from super().get_all_weights(model_config, model)
                return
            for member in model_config.hf_config.ensemble.members:
                yield from self._member_weights(member)

        def _member_weights(self, member: ServedMember) -> Iterator[Named]:
            pickle, path = member.checkpoint.allow_pickle, str(member.checkpoint.weights_path())
            source = DefaultModelLoader.Source(path, None, fall_back_to_pt=pickle)
            weights: Iterable[Named] = self._get_weights_iterator(source)
            if member.adapter is not None:
                weights = merge(weights, member.adapter, member.checkpoint)
            for name, weight in weights:
                yield f"{member.name}.{name}", weight

    register_model_loader(LOAD_FORMAT)(RecipeLoader)


def share_equal_parameters(models: Iterable[torch.nn.Module]) -> int:
    """Let models of one shape share the parameters that are equal; return the bytes saved.

    Experts made with LoRA on one small model differ from it only in some layers, and embedding and output
    head are most of a small model.
    """
    seen: dict[tuple[Any, ...], list[torch.nn.Parameter]] = {}
    saved = 0
    for model in models:
        owners = {
            name: (module, key)
            for path, module in model.named_modules()
            for key in module._parameters
            for name in [f"{path}.{key}" if path else key]
        }
        for name, (module, key) in owners.items():
            parameter = module._parameters[key]
            if parameter is None:
                continue
            alike = seen.setdefault((type(model), name, parameter.shape, parameter.dtype), [])
            twin = next((p for p in alike if p is parameter or torch.equal(p, parameter)), None)
            if twin is None:
                alike.append(parameter)
            elif twin is not parameter:
                module._parameters[key] = twin
                saved += parameter.numel() * parameter.element_size()
    return saved
