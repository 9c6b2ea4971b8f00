"""The files of a LoRA adapter: found, and checked against the model they belong to.

What an adapter changes is read in `changes.py`, and what that makes of the weights is in `merge.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.checkpoints.changes import Change, Layout, PatternClock, read_changes
from proxytune.checkpoints.checkpoint import OR_GRANT, Checkpoint
from proxytune.checkpoints.headers import (
    StoredTensor,
    read_gguf_header,
    read_safetensors_header,
)
from proxytune.checkpoints.hub import hub_adapter
from proxytune.checkpoints.references import unpinned_path
from proxytune.checkpoints.untrusted import LIST_BYTES, check_links, read_json_file
from proxytune.errors import (
    AdapterMismatch,
    CorruptModel,
    ModelNotFound,
    UnsafeModel,
    UnsupportedModel,
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
        clock: The time for its patterns, which it shares with the other adapters of a recipe.
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    is_gguf: bool = False
    allow_pickle: bool = False
    clock: PatternClock = field(default_factory=PatternClock, repr=False, compare=False)
    _changes: dict[Checkpoint, dict[str, Change]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def num_parameters(self) -> int:
        """Number of weights that it adds."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    def num_kept(self, small: Checkpoint) -> int:
        """Number of weights that it adds to memory: not those that were frozen when it was trained."""
        if self.is_gguf or not self.tensors:
            return self.num_parameters
        changes = self.changes(small).values()
        copied = [change.parameters["weight"] for change in changes if change.is_weight_copied]
        return self.num_parameters - sum(self.tensors[key].num_elements for key in set(copied))

    def own_tokens(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the ids of the ordinary and of the added tokens of its own tokenizer, if that can be read.

        They show whether it was trained with the small model's tokens, whose tokenizer is used.
        """
        path = self.path / "tokenizer.json"
        try:
            read = read_json_file(path, at_most=LIST_BYTES) if path.is_file() else {}
        except CorruptModel:
            read = {}
        model, added = read.get("model"), read.get("added_tokens")
        ordinary = model.get("vocab") if isinstance(model, dict) else None
        pairs = [
            (token.get("content"), token.get("id"))
            for token in (added if isinstance(added, list) else [])
            if isinstance(token, dict)
        ]
        return _ids(ordinary.items() if isinstance(ordinary, dict) else ()), _ids(pairs)

    @property
    def trained_on(self) -> str | None:
        """The model that it was trained on, by its own account."""
        model = self.config.get("base_model_name_or_path")
        return model if isinstance(model, str) and model else None

    def changes(self, small: Checkpoint) -> dict[str, Change]:
        """Return what it changes in the small model, by module name; see `read_changes`."""
        if small not in self._changes:
            shapes = {key: tensor.shape for key, tensor in self.tensors.items()}
            found = read_changes(self.name, self.config, shapes, small.layout, self.clock)
            self._changes[small] = found
        return self._changes[small]

    def check_fits(self, small: Checkpoint) -> None:
        """Check that every tensor of the adapter has its layer in the small model, with the same size.

        Embedding and head may have another number of rows, if all tokens of the small model have theirs: a
        tokenizer to which tokens were added. The small model's own tokens count, and rows beyond them are
        dropped.

        Raises:
            AdapterMismatch: A layer is missing or has another size.
            CorruptModel: Config and tensors contradict each other, or a pattern takes too long to match.
            UnsupportedModel: It is another method than LoRA.
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

    def why_merged(self, small: Checkpoint) -> str | None:
        """Return why it needs a copy of the small model to be merged into; None if rows can share the model.

        Rows of one forward can each have their own adapter in every layer that gets the rows of the batch
        as the rows of its input.
        """
        if self.is_gguf or not self.tensors:
            return None
        for module, change in self.changes(small).items():
            if change.stacked:
                name = next(iter(change.stacked))
                return f"it changes {module}.{name}, which is one parameter for all rows of a batch"
            if not small.gets_rows:
                return f"it is unknown which layers of {small.architecture} get a batch's rows one by one"
            if module not in small.gets_rows:
                return f"it changes {module}, and it is unknown whether that gets a batch's rows one by one"
            if not small.gets_rows[module]:
                return f"it changes {module}, which does not get a batch's rows one by one"
        return None

    def num_embeddings(self, small: Checkpoint) -> int | None:
        """Return how many tokens its embedding or head has; None if it has the small model's."""
        if self.is_gguf or not self.tensors:
            return None
        layout = small.layout
        for module in (layout.embedding, layout.head):
            change = None if module is None else self.changes(small).get(module)
            if change is None or module is None:
                continue
            sizes = [self.tensors[key].shape[0] for key in change.parameters.values()]
            if change.product is not None:
                is_first = module in layout.inputs_first
                down, up = (
                    self.tensors[key].shape for key in (change.product.down, change.product.up)
                )
                sizes.append(down[1] if is_first else up[0])
            wanted = layout.parameters[module]["weight"][0]
            sizes += [i + 1 for i in change.token_ids if i >= wanted]
            found = next((size for size in sizes if size != wanted), None)
            if found is not None:
                return found
        return None

    def _gguf_problems(self, small: Checkpoint) -> list[str]:
        problems: list[str] = []
        for name, tensor in self.tensors.items():
            layer, _, part = name.rpartition(".lora_")
            there = small.tensors.get(layer)
            if there is None or not there.shape or len(tensor.shape) != 2:
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
        if not self.tensors:
            return []
        problems: list[str] = []
        for module, change in self.changes(small).items():
            if module not in small.layout.parameters:
                problems.append(f"{module} is not there")
            else:
                problems += _misfits(module, change, self.tensors, small)
        return problems


def _misfits(
    module: str, change: Change, tensors: Mapping[str, StoredTensor], small: Checkpoint
) -> list[str]:
    """Return where the sizes of a module differ from those of an adapter's tensors."""
    layout = small.layout
    own = layout.parameters[module]
    wanted: list[tuple[str, int, int, str]] = []  # tensor, axis, size, what it counts
    for name, key in change.parameters.items():
        shape, given = own.get(name), tensors[key].shape
        if shape is None or len(shape) != len(given):
            return [f"{module} has no parameter {name} of {len(given)} dimensions"]
        wanted += [
            (key, axis, size, "rows" if axis == 0 else "columns") for axis, size in enumerate(shape)
        ]
    if change.token_rows is not None:
        if module not in (layout.embedding, layout.head):
            return [f"{module} is neither embedding nor output head"]
        wanted.append((change.token_rows, 1, own["weight"][1], "columns"))
    if change.product is not None:
        if module not in layout.linear:
            return [f"{module} is not a linear layer"]
        outputs, inputs = own["weight"]
        if module in layout.inputs_first:
            outputs, inputs = inputs, outputs
        wanted += [
            (change.product.down, 1, inputs, "inputs"),
            (change.product.up, 0, outputs, "outputs"),
        ]
        for vector in (change.magnitude, change.product_bias):
            if vector is not None:
                wanted.append((vector, 0, outputs, "outputs"))
    for name, product in change.stacked.items():
        if len(own[name]) != 3:
            return [f"{module}.{name} is not a stack of matrices"]
        outputs, inputs = own[name][1:]
        if module in layout.is_stack_transposed:
            outputs, inputs = inputs, outputs
        wanted += [(product.down, 1, inputs, "inputs"), (product.up, 0, outputs, "outputs")]
    problems = []
    for key, axis, size, what in wanted:
        given = tensors[key].shape
        number = given[axis] if axis < len(given) else 0
        if number != size and not _is_resized(module, number, size, layout, small):
            problems.append(f"{module} has {size} {what} instead of {number}")
    return problems


def _is_resized(module: str, given: int, own: int, layout: Layout, small: Checkpoint) -> bool:
    """Return whether a size is that of a vocabulary that has all tokens of the small model."""
    if (
        module not in (layout.embedding, layout.head)
        or own != layout.parameters[module]["weight"][0]
    ):
        return False
    return given > max(small.vocabulary.token_to_id.values(), default=-1)


_PROMPTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE",
    "ADAPTION_PROMPT",
)  # fmt: skip
"""PEFT's methods that train what is read before the text, which no weights can hold."""

_MAX_RANK, _MAX_ALPHA = 1 << 20, 1e6
_MAX_PATTERN = 10_000
_MAX_TOKEN_ID = 1 << 22


def _is_whole(value: Any, *, at_most: int = _MAX_RANK, at_least: int = 0) -> bool:
    return type(value) is int and at_least <= value <= at_most


def _is_rank(value: Any) -> bool:
    return _is_whole(value, at_least=1)


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_ALPHA  # NaN is not


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_PATTERN


def _is_names(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return value is None or _is_pattern(value)


def _is_layers(value: Any) -> bool:
    return value is None or all(map(_is_whole, value if isinstance(value, list) else [value]))


def _is_list_of_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and _is_names(value))


def _is_tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return value is None or all(
        isinstance(ids, list) and all(_is_whole(i, at_most=_MAX_TOKEN_ID) for i in ids)
        for ids in lists
    )


def _ids(pairs: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    return {
        token: token_id
        for token, token_id in pairs
        if isinstance(token, str) and _is_whole(token_id, at_most=_MAX_TOKEN_ID)
    }


def _by_pattern(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return value is None or (
            isinstance(value, dict)
            and all(_is_pattern(key) and is_value(each) for key, each in value.items())
        )

    return check


_CONFIG_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, f"a whole number from 1 to {_MAX_RANK}"),
    "lora_alpha": (_is_alpha, f"a number between -{_MAX_ALPHA:g} and {_MAX_ALPHA:g}"),
    "target_modules": (_is_names, "a list of names, or a pattern"),
    "exclude_modules": (_is_names, "a list of names, or a pattern"),
    "layers_to_transform": (_is_layers, "the number of a layer, or a list of them"),
    "layers_pattern": (_is_names, "a pattern, or a list of them"),
    "rank_pattern": (_by_pattern(_is_rank), "an object with a rank for each pattern"),
    "alpha_pattern": (_by_pattern(_is_alpha), "an object with a number for each pattern"),
    "use_rslora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "lora_bias": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "modules_to_save": (_is_list_of_names, "a list of names"),
    "target_parameters": (_is_list_of_names, "a list of names"),
    "trainable_token_indices": (
        _is_tokens,
        "a list of token ids, or an object with one for each layer",
    ),
}
"""The keys of an adapter's config that decide what it does: what each may hold, and that in words."""


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    for key, (holds, words) in _CONFIG_KEYS.items():
        if key in config and not holds(config[key]):
            raise CorruptModel(
                f"{path}: {key} is {config[key]!r:.80}, and must be {words}.\n"
                "hint: save the adapter again with PEFT's save_pretrained"
            )


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
    if directory.is_dir():
        check_links(directory, root=root)
    if not (directory / "adapter_config.json").is_file():
        hint = "an adapter's directory holds adapter_config.json and adapter_model.safetensors"
        if (directory / "config.json").is_file():
            hint = 'it is a whole model: give it as {"model": …} without an adapter'
        raise ModelNotFound(
            f"{reference} holds no adapter: no adapter_config.json in {directory}.\nhint: {hint}"
        )
    config = read_json_file(directory / "adapter_config.json")
    kind = config.get("peft_type")
    if kind in _PROMPTS:
        raise UnsupportedModel(
            f"the adapter {reference} is of type {kind!r:.40}, which learns tokens before the text, and only "
            "LORA can be used.\nhint: train the expert as LoRA"
        )
    if kind != "LORA":
        raise UnsupportedModel(
            f"the adapter {reference} is of type {kind!r:.40}, and only LORA can be used.\n"
            "hint: merge it into its model with PEFT's merge_and_unload, and name that model"
        )
    _check_config(config, directory / "adapter_config.json")
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
    if header.num_parts > 1:
        raise UnsupportedModel(
            f"the adapter {reference} is one of {header.num_parts} parts, and an adapter is one file.\n"
            "hint: join them with `llama-gguf-split --merge FIRST_PART OUT.gguf`"
        )
    kind, adapter_kind = map(header.metadata.get, ("general.type", "adapter.type"))
    if kind != "adapter":
        raise ModelNotFound(
            f"{reference} holds no adapter: its general.type is {kind!r:.40}.\n"
            'hint: if it is a whole model, give it as {"model": …} without an adapter'
        )
    if adapter_kind != "lora":
        raise UnsupportedModel(
            f"the adapter {reference} is of type {adapter_kind!r:.40}, and only lora can be used.\n"
            "hint: merge it into its model, and name that model"
        )
    if not _is_alpha(alpha := header.metadata.get("adapter.lora.alpha", 1.0)):
        raise CorruptModel(
            f"{path}: adapter.lora.alpha is {alpha!r:.40}, and must be {_CONFIG_KEYS['lora_alpha'][1]}.\n"
            "hint: convert the adapter again"
        )
    return AdapterFiles(reference, path, header.metadata, header.tensors, is_gguf=True)
