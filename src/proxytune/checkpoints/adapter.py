"""The files of a LoRA adapter: found, and checked against the model they belong to.

Which layers an adapter changes, with which rank and strength, is worked out here from its tensors and its
config. PEFT is given the answer and never sees a pattern from an adapter's config, because such a pattern can
take forever to match.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.checkpoints.checkpoint import OR_GRANT, Checkpoint
from proxytune.checkpoints.headers import (
    StoredTensor,
    read_gguf_header,
    read_safetensors_header,
)
from proxytune.checkpoints.hub import hub_adapter
from proxytune.checkpoints.references import unpinned_path
from proxytune.checkpoints.untrusted import check_links, read_json_file
from proxytune.errors import (
    AdapterMismatch,
    CorruptModel,
    ModelNotFound,
    UnsafeModel,
    UnsupportedModel,
)

_LORA_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(embedding_)?[AB]|lora_magnitude_vector)(?P<rest>(\.\w+){0,2})"
)


PATTERN_SECONDS, _USUAL_SECONDS = 1.0, 0.01


@dataclass
class PatternClock:
    """The processor time left for the patterns of a recipe's adapters, beyond what is usual for each."""

    left: float = PATTERN_SECONDS


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
            CorruptModel: Config and tensors contradict each other, or a pattern takes too long to match.
        """
        problems = self._gguf_problems(small) if self.is_gguf else self._problems(small)
        if not problems and self.tensors and not self.is_gguf:
            self.layers(small.module_names)
        if problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            source = f" (it was trained on {self.trained_on})" if self.trained_on else ""
            raise AdapterMismatch(
                f"the adapter {self.name}{source} does not fit {small.name}, where "
                f"{'; '.join(problems[:3])}{more}.\n"
                "hint: name the small model that the adapter was trained on"
            )

    def layers(self, module_names: Iterable[str] = ()) -> dict[str, LoraLayer]:
        """Return the layers that it changes; see `lora_layers`."""
        shapes = {key: tensor.shape for key, tensor in self.tensors.items()}
        return lora_layers(self.name, self.config, shapes, module_names, self.clock)

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


# Keys of adapter_config.json that make an adapter more than two factors for each of some layers. A key that
# this list lacks either does nothing once the adapter is trained, or is read below.
_BEYOND_FACTORS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
    "use_dora", "use_qalora",
)  # fmt: skip


def beyond_factors(config: Mapping[str, Any]) -> list[str]:
    """Return what an adapter's config sets beyond two factors per layer: keys, biases, initialisation."""
    found = [key for key in _BEYOND_FACTORS if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']!r:.40}")
    # Other initialisations change the weights under the adapter.
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        found.append(f"init_lora_weights {config['init_lora_weights']!r:.40}")
    return found


# Layers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """What an adapter adds to one layer's weight: `scale * up @ down`.

    Args:
        down: Name of the tensor `[rank, inputs]`, PEFT's A.
        up: Name of the tensor `[outputs, rank]`, PEFT's B.
        rank: The size that both share.
        alpha: The scale is `alpha / rank`, with rank-stabilised LoRA `alpha / sqrt(rank)`.
        is_stabilised: Whether it is rank-stabilised.
    """

    down: str
    up: str
    rank: int
    alpha: float
    is_stabilised: bool

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return self.alpha / (math.sqrt(self.rank) if self.is_stabilised else self.rank)


_MAX_RANK, _MAX_ALPHA = 1 << 20, 1e6
_MAX_PATTERN = 10_000


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
}
"""The keys of an adapter's config that decide what it does: what each may hold, and that in words."""


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    for key, (holds, words) in _CONFIG_KEYS.items():
        if key in config and not holds(config[key]):
            raise CorruptModel(
                f"{path}: {key} is {config[key]!r:.80}, and must be {words}.\n"
                "hint: save the adapter again with PEFT's save_pretrained"
            )


def lora_layers(
    name: str,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    module_names: Iterable[str] = (),
    clock: PatternClock | None = None,
) -> dict[str, LoraLayer]:
    """Return the layers that an adapter changes, by module name.

    Args:
        name: Of the adapter, for errors.
        config: The content of `adapter_config.json`, as `find_adapter` checks it.
        shapes: Shapes of its tensors, by PEFT's names.
        module_names: Names of the model's modules; empty to leave out the check for missing layers.
        clock: The time for its patterns, if other adapters share it.

    Raises:
        AdapterMismatch: The config names layers of the model for which there are no weights.
        CorruptModel: Config and tensors contradict each other, or a pattern takes too long to match.
    """
    factors: dict[str, dict[str, str]] = {}
    present: set[str] = set()
    for key, shape in shapes.items():
        match = _LORA_PART.fullmatch(key.removeprefix("base_model.model."))
        if match is None:
            continue
        present.add(match["module"])
        if match["part"] in ("lora_A", "lora_B") and match["rest"].endswith("weight"):
            if len(shape) < 2:
                raise CorruptModel(f"the adapter {name}: {key} has the shape {list(shape)}")
            factors.setdefault(match["module"], {})[match["part"]] = key
    if not factors:
        raise UnsupportedModel(
            f"the adapter {name} holds no LoRA factors of linear layers.\n"
            "hint: merge it into its model with PEFT's merge_and_unload, and name that model"
        )
    matches = _Patterns(name, clock or PatternClock())
    lacking = next((m for m in matches.targets(config, module_names) if m not in present), None)
    if lacking is not None:
        raise AdapterMismatch(
            f"the adapter {name} does not fit: its config names the layer {lacking}, and it lacks weights "
            "for that layer.\nhint: an adapter fits only the model it was trained on"
        )
    layers: dict[str, LoraLayer] = {}
    for module, found in factors.items():
        if len(found) != 2:
            raise CorruptModel(f"the adapter {name} has only one of the two factors of {module}")
        down, up = found["lora_A"], found["lora_B"]
        rank = matches.value(config, "rank_pattern", module, config.get("r", 8))
        if not rank == shapes[down][0] == shapes[up][1]:
            raise CorruptModel(
                f"the adapter {name}: its config gives {module} the rank {rank}, and its factors have "
                f"{shapes[down][0]} and {shapes[up][1]}.\n"
                "hint: save the adapter again with PEFT's save_pretrained"
            )
        alpha = matches.value(config, "alpha_pattern", module, config.get("lora_alpha", 8))
        layers[module] = LoraLayer(down, up, rank, alpha, bool(config.get("use_rslora")))
    return layers


_FIRST_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
_PLAIN_NAME = re.compile(r"[\w.-]+")

_LARGE_REPEAT = re.compile(r"\{\d*,?\d{4}")


class _Patterns:
    """Matches an adapter's patterns against names of modules, as PEFT would, in bounded time.

    Args:
        name: Of the adapter, for errors.
        clock: The time that is left.
    """

    def __init__(self, name: str, clock: PatternClock) -> None:
        self._name, self._clock = name, clock
        self._free = _USUAL_SECONDS
        self._compiled: dict[str, Any] = {}

    def _match(self, pattern: str, module: str, *, is_whole: bool = True) -> Any:
        import regex

        start = time.thread_time()
        try:
            left = self._clock.left + self._free
            if left <= 0:
                raise TimeoutError
            if pattern not in self._compiled:
                # What `re` does not know, such as recursion, PEFT would refuse as well.
                re.compile(pattern)
                if _LARGE_REPEAT.search(pattern):
                    raise ValueError("it repeats something more than 999 times")
                self._compiled[pattern] = regex.compile(pattern)
            compiled = self._compiled[pattern]
            return (compiled.fullmatch if is_whole else compiled.match)(module, timeout=left)
        except TimeoutError:
            why = f"takes too long to match: more than {PATTERN_SECONDS:g} s with the others"
        except (regex.error, re.error, RecursionError, OverflowError, ValueError) as error:
            why = f"cannot be used: {error!s:.80}"
        finally:
            spent = time.thread_time() - start
            free = min(spent, self._free)
            self._free -= free
            self._clock.left -= spent - free
        raise CorruptModel(
            f"the adapter {self._name}: the pattern {pattern[:80]!r} in its config {why}.\n"
            "hint: list the names of the layers in place of the pattern"
        )

    def value(self, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
        """Return what the first of the patterns that fits the end of a module's name gives it."""
        for pattern, value in (config.get(key) or {}).items():
            if _PLAIN_NAME.fullmatch(pattern):
                fits = module == pattern or module.endswith(f".{pattern}")
            else:
                fits = self._match(rf"(.*\.)?({pattern})", module)
            if fits:
                return value
        return default

    def targets(self, config: Mapping[str, Any], module_names: Iterable[str]) -> Iterator[str]:
        """Yield the modules that a config names."""
        targets = config.get("target_modules")
        if not targets or targets == "all-linear":  # PEFT would choose them by the model's kind
            return
        is_named = self._naming(targets)
        is_excluded = self._naming(config.get("exclude_modules") or [])
        is_pattern = isinstance(targets, str)
        exact = set() if is_pattern else set(targets)
        is_in_layer = self._layers(config)
        for module in module_names:
            if not module or not is_named(module) or is_excluded(module):
                continue
            if is_pattern or module in exact or is_in_layer(module):
                yield module

    def _naming(self, names: str | list[str]) -> Callable[[str], bool]:
        """Return whether a module is named: by a pattern, or by the last parts of its name."""
        if isinstance(names, str):
            return lambda module: bool(self._match(names, module))
        known = set(names)

        def is_named(module: str) -> bool:
            parts = module.split(".")
            return any(".".join(parts[start:]) in known for start in range(len(parts)))

        return is_named

    def _layers(self, config: Mapping[str, Any]) -> Callable[[str], bool]:
        """Return whether a module is in one of the layers that `layers_to_transform` numbers."""
        wanted, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
        if wanted is None or wanted == []:
            return lambda module: True
        numbers = set(wanted if isinstance(wanted, list) else [wanted])

        def is_in_layer(module: str) -> bool:
            match: Any = None if patterns else _FIRST_LAYER.match(module)
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                whole = rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
                match = match or self._match(whole, module, is_whole=False)
            index = match and match["idx"]
            return index is not None and int(index) in numbers

        return is_in_layer


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
