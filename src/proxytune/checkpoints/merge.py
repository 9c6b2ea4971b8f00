"""What an adapter makes of its model's weights: the arithmetic of LoRA and what PEFT adds to it.

    weight + scale * up @ down                                   LoRA
    m * (weight + scale * up @ down) / |weight + scale * up @ down|    DoRA, with one norm for each output

Everything is computed in float32. Which tensor is which is worked out in `changes.py`.

Sources: Hu et al. 2021, arXiv:2106.09685 (LoRA); Kalajdzievski 2023, arXiv:2312.03732 (rank-stabilised);
Liu et al. 2024, arXiv:2402.09353 (DoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pickle import PickleError
from typing import Any

import torch
from torch import Tensor

from proxytune.checkpoints.adapter import AdapterFiles
from proxytune.checkpoints.changes import Change, Layout, Product
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.headers import StoredTensor
from proxytune.errors import CorruptModel, ModelNotFound, UnsupportedModel


@dataclass(frozen=True)
class LoadedProduct:
    """What is added to a weight: `scale * up @ down`.

    Args:
        down: `[rank, inputs]`, float32.
        up: `[outputs, rank]`, float32.
        scale: The factor.
    """

    down: Tensor
    up: Tensor
    scale: float

    def matrix(self) -> Tensor:
        """Return the product, `[outputs, inputs]`."""
        return self.scale * (self.up @ self.down)

    def stack(self, size: int, *, is_transposed: bool) -> Tensor:
        """Return one product for each of `size` matrices, `[size, outputs, inputs]` or transposed.

        PEFT keeps the first factors of all matrices one after another, and of the second factors the columns
        of one rank for all matrices side by side.
        """
        down = self.down.view(size, -1, self.down.shape[-1])
        up = self.up.view(self.up.shape[0], -1, size).permute(2, 0, 1)
        found = self.scale * torch.bmm(up, down)
        return found.transpose(1, 2) if is_transposed else found


@dataclass(frozen=True)
class ModuleWeights:
    """What an adapter makes of one module; see `Change`.

    Args:
        is_linear: Whether the module multiplies its weight, or looks rows of it up.
        is_inputs_first: Whether the module's weight is `[inputs, outputs]`.
        is_stack_transposed: The same for stacked matrices.
        parameters: What replaces the module's parameters.
        is_weight_copied: Whether the weight among them was frozen in training.
        product: What is added to the weight.
        magnitude: DoRA's magnitudes, `[outputs]`.
        product_bias: What is added to the output, `[outputs]`, scaled.
        token_ids: `[tokens]`, rows of the weight that are replaced.
        token_rows: `[tokens, hidden]`.
        stacked: What is added to parameters that are stacks of matrices.
    """

    is_linear: bool = True
    is_inputs_first: bool = False
    is_stack_transposed: bool = False
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    is_weight_copied: bool = False
    product: LoadedProduct | None = None
    magnitude: Tensor | None = None
    product_bias: Tensor | None = None
    token_ids: Tensor | None = None
    token_rows: Tensor | None = None
    stacked: Mapping[str, LoadedProduct] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The module's parameters that change."""
        found = [*self.parameters, *self.stacked]
        if self.product is not None or self.token_rows is not None:
            found.append("weight")
        if self.product_bias is not None:
            found.append("bias")
        return tuple(dict.fromkeys(found))

    def merged(self, name: str, own: Tensor | None) -> Tensor:
        """Return one of the module's parameters with the adapter, float32, in the shape of the module's own.

        Args:
            name: One of `names`.
            own: The module's parameter; None for a bias that it has not.
        """
        given = self.parameters.get(name)
        value = given.to(torch.float32) if given is not None else None
        if value is None and own is not None:
            value = own.to(device=torch.device("cpu"), dtype=torch.float32)
        if name in self.stacked:
            assert value is not None
            added = self.stacked[name].stack(len(value), is_transposed=self.is_stack_transposed)
            value = value + added
        if name == "weight":
            assert value is not None
            value = self._merged_weight(value)
        if name == "bias" and self.product_bias is not None:
            value = self.product_bias if value is None else value + self.product_bias
        assert value is not None
        return value if own is None else with_rows_of(own, value)

    def _merged_weight(self, weight: Tensor) -> Tensor:
        if self.product is not None:
            weight = self._with_product(weight)
            if self.magnitude is not None:
                gain = self.magnitude / self.norm(weight)
                weight = weight * (gain if self.is_inputs_first else gain[:, None])
        if self.token_ids is not None and self.token_rows is not None:
            weight = weight.index_copy(0, self.token_ids, self.token_rows.to(torch.float32))
        return weight

    def _with_product(self, weight: Tensor) -> Tensor:
        assert self.product is not None
        added = self.product.matrix()
        added = added.t() if self.is_inputs_first else added
        if len(weight) != len(added):  # tokens were added, and their rows are not in the adapter
            weight = with_rows_of(added.new_zeros(added.shape), weight)
        return weight + added

    def norm(self, weight: Tensor) -> Tensor:
        """Return the norm over a weight's inputs for each output."""
        norm: Tensor = torch.linalg.vector_norm(weight, dim=0 if self.is_inputs_first else 1)
        return norm

    def gain(self, weight: Tensor) -> Tensor | None:
        """Return by what DoRA multiplies each output, `[outputs]` float32; None without DoRA.

        Args:
            weight: The module's own, float32.
        """
        if self.magnitude is None:
            return None
        weight = self.parameters.get("weight", weight).to(torch.float32)
        return self.magnitude / self.norm(self._with_product(weight))


def with_rows_of(own: Tensor, value: Tensor) -> Tensor:
    """Return a tensor with as many rows as `own`: the first of `value`, and `own`'s where it has none."""
    if value.shape == own.shape:
        return value
    num_rows = min(len(own), len(value))
    return torch.cat((value[:num_rows], own[num_rows:].to(value)))


def read_adapter(files: AdapterFiles, small: Checkpoint) -> dict[str, ModuleWeights]:
    """Return what an adapter makes of each module that it changes, on the CPU.

    Raises:
        CorruptModel: It cannot be read.
        ModelNotFound: It has no weights.
        UserError: It does not fit the model; see `AdapterFiles.check_fits`.
    """
    tensors = adapter_tensors(files)
    files = _with_shapes(files, tensors)
    files.check_fits(small)
    layout = small.layout
    return {
        module: _loaded(module, change, tensors, layout)
        for module, change in files.changes(small).items()
    }


def _loaded(
    module: str, change: Change, tensors: Mapping[str, Tensor], layout: Layout
) -> ModuleWeights:
    def read(key: str | None) -> Tensor | None:
        return None if key is None else tensors[key].to(torch.float32)

    def product(named: Product | None) -> LoadedProduct | None:
        if named is None:
            return None
        return LoadedProduct(tensors[named.down].float(), tensors[named.up].float(), named.scale)

    bias, rows = read(change.product_bias), read(change.token_rows)
    if bias is not None:
        outputs = layout.parameters[module]["weight"][1 if module in layout.inputs_first else 0]
        bias = with_rows_of(torch.zeros(outputs), bias)
    ids = torch.tensor(change.token_ids, dtype=torch.long)
    if rows is not None:
        # Rows beyond the model's belong to tokens that only the adapter's tokenizer has.
        kept = ids < layout.parameters[module]["weight"][0]
        ids, rows = ids[kept], rows[kept]
    stacked = {name: product(named) for name, named in change.stacked.items()}
    return ModuleWeights(
        is_linear=module in layout.linear,
        is_inputs_first=module in layout.inputs_first,
        is_stack_transposed=module in layout.is_stack_transposed,
        parameters={name: tensors[key] for name, key in change.parameters.items()},
        is_weight_copied=change.is_weight_copied,
        product=product(change.product),
        magnitude=read(change.magnitude),
        product_bias=None
        if bias is None or change.product is None
        else bias * change.product.scale,
        token_ids=None if rows is None else ids,
        token_rows=rows,
        stacked={name: found for name, found in stacked.items() if found is not None},
    )


def adapter_tensors(files: AdapterFiles) -> dict[str, Tensor]:
    """Return an adapter's tensors by PEFT's names, on the CPU.

    Raises:
        CorruptModel: They cannot be read.
        ModelNotFound: There are none.
    """
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


def with_shapes(files: AdapterFiles) -> AdapterFiles:
    """Return an adapter whose tensors are known: pickled ones have to be read for that.

    Raises:
        UserError: They cannot be read; see `adapter_tensors`.
    """
    return files if files.tensors or files.is_gguf else _with_shapes(files, adapter_tensors(files))


def _with_shapes(files: AdapterFiles, tensors: Mapping[str, Tensor]) -> AdapterFiles:
    if files.tensors:
        return files
    known = {
        name: StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }
    return replace(files, tensors=known)


def merge_into(model: Any, files: AdapterFiles, small: Checkpoint) -> None:
    """Merge an adapter into a model of transformers, whose changed weights become new ones.

    Embedding and head that were one weight are two afterwards, if the adapter makes them differ.

    Raises:
        UnsupportedModel: The weights are quantised, or kept elsewhere until they are needed.
        UserError: The adapter cannot be read; see `read_adapter`.
    """
    changed: list[tuple[Any, str, Tensor]] = []
    for name, weights in read_adapter(files, small).items():
        module = model.get_submodule(name)
        for parameter in weights.names:
            own = getattr(module, parameter, None)
            if own is not None and not own.is_floating_point():
                raise UnsupportedModel(why_not_quantised(files, small, f"it changes {name}"))
            like = next(p for p in (own, *module.parameters()) if p is not None)
            if like.is_meta:
                raise UnsupportedModel(
                    f"the adapter {files.name} changes {name} of {small.name}, whose weights do not fit into "
                    "memory, so the adapter cannot be merged into them.\n"
                    'hint: set the device of this model to "cpu"'
                )
            changed.append((module, parameter, weights.merged(parameter, own).to(like)))
    for module, parameter, value in changed:
        setattr(module, parameter, torch.nn.Parameter(value.contiguous(), requires_grad=False))
    if small.layout.is_tied:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not any(module in (embedding, head) for module, _, _ in changed):
            return
        if torch.equal(*(value_of(module, "weight").cpu() for module in (embedding, head))):
            if embedding.weight.device == head.weight.device:
                head.weight = embedding.weight
        else:
            model.config.get_text_config(decoder=True).tie_word_embeddings = False
            model.config.tie_word_embeddings = False


def value_of(module: Any, parameter: str) -> Tensor:
    """Return a module's parameter, also if accelerate keeps it elsewhere until it is needed."""
    value: Tensor = getattr(module, parameter)
    weights = from_hook(module, "weights_map") if value.is_meta else None
    return value if weights is None else weights[parameter]


def from_hook(module: Any, attribute: str) -> Any:
    """Return an attribute of accelerate's hook on a module, which may be one of several; None without one."""
    hook = getattr(module, "_hf_hook", None)
    found = (getattr(each, attribute, None) for each in getattr(hook, "hooks", (hook,)))
    return next((value for value in found if value is not None), None)


def why_not_quantised(files: AdapterFiles, small: Checkpoint, why: str) -> str:
    """Return the message about an adapter that would have to be merged into quantised weights."""
    return (
        f"the adapter {files.name} cannot share the weights of {small.name}, because {why}, and it cannot be "
        "merged into a copy of them, because they are quantised.\n"
        "hint: leave the quantization of the small model out"
    )


# Merging into files ----------------------------------------------------------------------------------


def check_storable(files: AdapterFiles, small: Checkpoint, keeper: str) -> None:
    """Check that an adapter can be merged into a model that is stored parameter by parameter.

    Args:
        files: The adapter.
        small: Its model.
        keeper: What holds the merged weights, for errors.

    Raises:
        UnsupportedModel: It cannot; the message says why.
        UserError: It does not fit; see `AdapterFiles.check_fits`.
    """
    files.check_fits(small)
    changes, layout = files.changes(small) if files.tensors else {}, small.layout
    for module, change in changes.items():
        if change.stacked:
            raise UnsupportedModel(
                f"the adapter {files.name} changes the experts of {module} together, and {keeper} holds each "
                "by itself.\n"
                "hint: merge it into its model with PEFT's merge_and_unload, and name that model"
            )
    if layout.is_tied:
        names = (layout.embedding or "", layout.head or "")
        both = [changes.get(name, Change()) for name in names]
        kinds = [(c.product is None, c.token_ids, "weight" in c.parameters) for c in both]
        if kinds[0] != kinds[1]:
            raise _untied(files, small, keeper)


def _untied(files: AdapterFiles, small: Checkpoint, keeper: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the adapter {files.name} changes the output head and the embedding of {small.name} in different "
        f"ways, and {keeper} holds one weight for both.\n"
        "hint: merge it into a copy of its model with tie_word_embeddings false, and name that copy"
    )


class Merger:
    """Merges an adapter into a model's stored weights, one after the other; see `check_storable`."""

    def __init__(self, files: AdapterFiles, small: Checkpoint, keeper: str) -> None:
        files = with_shapes(files)
        check_storable(files, small, keeper)
        changes, layout = read_adapter(files, small), small.layout
        self._parts = {
            f"{module}.{name}": (own, name) for module, own in changes.items() for name in own.names
        }
        self._error = _untied(files, small, keeper)
        self._embedding, self._head = f"{layout.embedding}.weight", f"{layout.head}.weight"
        self._is_tied = layout.is_tied
        self.names = frozenset(self._parts) - ({self._head} if layout.is_tied else set())
        """The stored parameters that change."""

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a stored parameter with the adapter: float32, or as it was if it does not change.

        Raises:
            UnsupportedModel: It is embedding and head, which would become two.
        """
        found = self._merged(name, weight)
        if self._is_tied and name == self._embedding:
            head = self._merged(self._head, weight)
            if not torch.allclose(found.float(), head.float(), rtol=0, atol=1e-6):
                raise self._error
        return found

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        if name not in self._parts:
            return weight
        own, parameter = self._parts[name]
        return own.merged(parameter, weight)
