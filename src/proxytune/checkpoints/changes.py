"""What an adapter changes in its model, module by module, from its config and the names of its tensors.

No values are read here. A module is changed in one or more of these ways:

- a *product* of two factors is added to its weight (LoRA), perhaps with a *magnitude* for each output (DoRA),
  and with a bias of its own;
- *parameters* are replaced: `modules_to_save`, trained biases, resized embeddings;
- some *rows* of an embedding or output head are replaced: trained tokens;
- a product is added to a parameter that is no linear layer's weight (`target_parameters`).

PEFT never sees a pattern from an adapter's config, because such a pattern can take forever to match.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from proxytune.errors import AdapterMismatch, CorruptModel, UnsupportedModel

PATTERN_SECONDS, _USUAL_SECONDS = 1.0, 0.01

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class PatternClock:
    """The processor time left for the patterns of a recipe's adapters, beyond what is usual for each."""

    left: float = PATTERN_SECONDS


@dataclass(frozen=True)
class Layout:
    """What has to be known of a model to read an adapter for it.

    Args:
        parameters: For each module by its name, the shapes of its own parameters.
        linear: Modules whose weight is a matrix that they multiply, or an embedding.
        inputs_first: Those of them whose weight is `[inputs, outputs]`: embeddings, GPT-2's `Conv1D`.
        embedding: The input embedding.
        head: The output head; None if the model has none.
        is_tied: Whether embedding and head are one weight.
        is_stack_transposed: Modules whose stacked matrices are `[inputs, outputs]`.
    """

    parameters: Mapping[str, Shapes]
    linear: frozenset[str] = frozenset()
    inputs_first: frozenset[str] = frozenset()
    embedding: str | None = None
    head: str | None = None
    is_tied: bool = False
    is_stack_transposed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Product:
    """What is added to a weight: `scale * up @ down`, or its transpose if inputs come first.

    Args:
        down: Name of the tensor `[rank, inputs]`, PEFT's A.
        up: Name of the tensor `[outputs, rank]`, PEFT's B.
        rank: The size that both share; for stacked experts, of each expert.
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


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does to one module; tensors by their names in the adapter.

    Args:
        product: What is added to the weight.
        magnitude: DoRA's magnitudes, `[outputs]`.
        product_bias: What is added to the output, times the product's scale, `[outputs]`.
        parameters: What replaces the module's parameters, by their names.
        is_weight_copied: Whether the weight in `parameters` was frozen in training: PEFT saves embeddings
            along that were resized or have a product.
        token_ids: Tokens whose rows of the weight are replaced.
        token_rows: Their rows, `[tokens, hidden]`.
        stacked: What is added to parameters that are stacks of matrices, by their names.
    """

    product: Product | None = None
    magnitude: str | None = None
    product_bias: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    is_weight_copied: bool = False
    token_ids: tuple[int, ...] = ()
    token_rows: str | None = None
    stacked: Mapping[str, Product] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether it is a product and nothing else."""
        return self.product is not None and self == Change(self.product)

    @property
    def without_copy(self) -> Change:
        """The change without a weight that was frozen in training."""
        if not self.is_weight_copied:
            return self
        kept = {name: key for name, key in self.parameters.items() if name != "weight"}
        return Change(
            self.product,
            self.magnitude,
            self.product_bias,
            kept,
            token_ids=self.token_ids,
            token_rows=self.token_rows,
            stacked=self.stacked,
        )


# What cannot be read ---------------------------------------------------------------------------------

_MERGE = "merge it into its model with PEFT's merge_and_unload, and name that model"
_AS_PLAIN = "train the expert as plain LoRA"
_CONVERT = (
    "convert it to plain LoRA with PEFT: model.save_pretrained(DIRECTORY, "
    "path_initial_model_for_weight_conversion=ADAPTER_BEFORE_TRAINING), or merge it where it was trained"
)
_MERGE_THERE = (
    "merge it into the model as it was trained, whose weights LoftQ changed, and name that model"
)

_REFUSED: dict[str, tuple[str, str]] = {
    "alora_invocation_tokens": (
        "is an activated LoRA (aLoRA), which acts only from certain tokens of the text on",
        _AS_PLAIN,
    ),
    "arrow_config": ("chooses among other adapters for each token (Arrow)", _AS_PLAIN),
    "kasa_config": ("removes a part of its model's own weights (KaSA)", _MERGE),
    "layer_replication": ("makes its model deeper by repeating layers", _MERGE),
    "megatron_config": ("was trained on Megatron's layers, which are split over devices", _MERGE),
    "monteclora_config": ("draws its weights at random (MonteCLoRA)", _AS_PLAIN),
    "use_bdlora": ("has factors of diagonal blocks (BD-LoRA)", _MERGE),
    "use_qalora": ("pools its inputs in groups (QA-LoRA)", _MERGE),
}
"""Keys of an adapter's config that ask for another method: what that does, and the hint.

A key that is neither here nor read below does nothing once the adapter is trained.
"""

_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations that leave the weights under the adapter as they are."""


def check_method(name: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than what `Change` describes.

    Raises:
        UnsupportedModel: It is; the message says what it does.
    """
    for key, (what, hint) in _REFUSED.items():
        if config.get(key):
            raise UnsupportedModel(f"the adapter {name} {what}: {key}.\nhint: {hint}")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UnsupportedModel(
            f"the adapter {name} was started with init_lora_weights {start!r:.40}, which changes the weights "
            f"under the adapter, and those changed weights are not in its files.\n"
            f"hint: {_MERGE_THERE if start == 'loftq' else _CONVERT}"
        )


# Names of tensors ------------------------------------------------------------------------------------

_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "product_bias",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "token_rows",
}


_ORIGINAL, _SAVED = ".original_module", ".modules_to_save"
"""Where PEFT keeps what a module of `modules_to_save` was and is."""


class _Place(NamedTuple):
    """What a tensor is for: a part of a module, at a depth if wrappers around it are nested."""

    module: str
    part: str
    depth: int
    is_parameter: bool


def _place_of(key: str) -> _Place | None:
    """Return what a tensor is for; None if PEFT gives no plain LoRA such a name."""
    path = key.removeprefix("base_model.model.")
    for ending, part in _PARTS.items():
        if path.endswith(f".{ending}"):
            module, depth = _unwrapped(path.removesuffix(f".{ending}"))
            return _Place(module, part, depth, is_parameter=False)
    module, _, part = path.rpartition(".")
    module, depth = _unwrapped(module)
    module = module.removesuffix(".token_adapter").removesuffix(_SAVED)
    if not module or "lora_" in path or "token_adapter" in path.replace(".token_adapter.base", ""):
        return None
    return _Place(module, part, depth, is_parameter=True)


def _unwrapped(module: str) -> tuple[str, int]:
    depth = 0
    while module.endswith(".base_layer"):
        module, depth = module.removesuffix(".base_layer"), depth + 1
    return module, depth


# Changes ---------------------------------------------------------------------------------------------


def read_changes(
    name: str,
    config: Mapping[str, Any],
    shapes: Shapes,
    layout: Layout | None = None,
    clock: PatternClock | None = None,
) -> dict[str, Change]:
    """Return what an adapter changes, by module name.

    Args:
        name: Of the adapter, for errors.
        config: The content of `adapter_config.json`, as `find_adapter` checks it.
        shapes: Shapes of its tensors, by PEFT's names.
        layout: The model's; None to leave out what only the model tells: modules that the config names and
            the file lacks, tied weights, `target_parameters`.
        clock: The time for its patterns, if other adapters share it.

    Raises:
        AdapterMismatch: The config names layers of the model for which there are no weights.
        CorruptModel: Config and tensors contradict each other, or a pattern takes too long to match.
        UnsupportedModel: It is another method than LoRA.
    """
    check_method(name, config)
    return _Reader(name, config, shapes, layout or Layout({}), clock or PatternClock()).changes()


class _Reader:
    """Reads one adapter; see `read_changes`."""

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        shapes: Shapes,
        layout: Layout,
        clock: PatternClock,
    ) -> None:
        self._name, self._config, self._shapes, self._layout = name, config, shapes, layout
        self._patterns = _Patterns(name, clock)
        self._targeted: dict[str, list[str]] = {}
        for module, parameter in self._targeted_parameters():
            self._targeted.setdefault(module, []).append(parameter)

    def changes(self) -> dict[str, Change]:
        parts: dict[str, dict[tuple[int, str], str]] = {}
        parameters: dict[str, dict[str, str]] = {}
        for key in self._shapes:
            if f"{_ORIGINAL}." in key or (
                _SAVED in key and key.replace(_SAVED, "") in self._shapes
            ):
                continue  # what PEFT saves twice if embeddings were resized
            place = _place_of(key)
            if place is None:
                raise UnsupportedModel(
                    f"the adapter {self._name} is more than LoRA: it holds {key}, which plain LoRA has not.\n"
                    f"hint: {_MERGE}"
                )
            if place.is_parameter:
                found: dict[Any, str] = parameters.setdefault(place.module, {})
                where: Any = place.part
            else:
                found = parts.setdefault(place.module, {})
                where = (place.depth, place.part)
            if where in found:
                raise CorruptModel(f"the adapter {self._name} has {key} twice: as {found[where]}")
            found[where] = key
        self._check_complete(set(parts), set(parameters))
        if self._config.get("trainable_token_indices") and not any(
            (0, "token_rows") in found for found in parts.values()
        ):
            raise self._lacking("the tokens of trainable_token_indices")
        changes = {
            module: self._change(module, parts.get(module, {}), parameters.get(module, {}))
            for module in dict.fromkeys((*parts, *parameters))
        }
        self._tie(changes)
        return changes

    def _check_complete(self, with_factors: set[str], replaced: set[str]) -> None:
        """Refuse an adapter whose config names modules for which there are no tensors."""
        modules = self._layout.parameters
        for module in (*self._patterns.targets(self._config, modules), *self._targeted):
            if module not in with_factors:
                raise self._lacking(f"the layer {module}")
        if self._config.get("modules_to_save"):
            for module, own in modules.items():
                if own and module not in replaced and self._is_saved(module):
                    raise self._lacking(f"the layer {module}")

    def _lacking(self, what: str) -> AdapterMismatch:
        return AdapterMismatch(
            f"the adapter {self._name} does not fit: its config names {what}, and it lacks weights for that."
            "\nhint: an adapter fits only the model it was trained on"
        )

    def _targeted_parameters(self) -> Iterator[tuple[str, str]]:
        """Yield module and parameter of each of `target_parameters`, in PEFT's order of wrapping."""
        targets = set(self._config.get("target_parameters") or ())
        for module, names in self._layout.parameters.items() if targets else ():
            for name in names:
                path = f"{module}.{name}"
                if path in targets or any(path.endswith(f".{target}") for target in targets):
                    yield module, name

    def _change(
        self, module: str, parts: Mapping[tuple[int, str], str], parameters: Mapping[str, str]
    ) -> Change:
        depths = {depth for depth, _ in parts}
        names = self._targeted.get(module, [])
        if names and module not in self._layout.linear:
            # The parameter that PEFT wraps first lies deepest.
            products = {
                name: self._product(f"{module}.{name}", parts, len(names) - 1 - index)
                for index, name in enumerate(names)
            }
            stacked = {name: found for name, found in products.items() if found is not None}
            return Change(parameters=parameters, stacked=stacked)
        if depths - {0}:
            raise CorruptModel(f"the adapter {self._name} has factors of {module} for no parameter")
        rows = parts.get((0, "token_rows"))
        has_factors = (0, "down") in parts
        for key, part in (("use_dora", "magnitude"), ("lora_bias", "product_bias")):
            if has_factors and bool(self._config.get(key)) != ((0, part) in parts):
                raise CorruptModel(
                    f"the adapter {self._name}: its config has {key} {self._config.get(key)!r}, and its "
                    f"weights of {module} say otherwise.\n"
                    "hint: save the adapter again with PEFT's save_pretrained"
                )
        return Change(
            self._product(module, parts, 0),
            parts.get((0, "magnitude")),
            parts.get((0, "product_bias")),
            parameters,
            is_weight_copied="weight" in parameters and not self._is_saved(module),
            token_ids=() if rows is None else self._token_ids(module, rows),
            token_rows=rows,
        )

    def _is_saved(self, module: str) -> bool:
        """Return whether a module is, or is in, one of `modules_to_save`; PEFT compares the ends of names."""
        saved = self._config.get("modules_to_save") or ()
        while module:
            if any(name and module.endswith(name) for name in saved):
                return True
            module = module.rpartition(".")[0]
        return False

    def _token_ids(self, module: str, rows: str) -> tuple[int, ...]:
        given = self._config.get("trainable_token_indices")
        if isinstance(given, Mapping):
            # A tied head has the tokens of the embedding.
            names = [name for name in given if module.endswith(name)]
            given = given[(names or list(given) or [""])[0]] if given else None
        ids = tuple(given or ())
        if len(ids) != self._shapes[rows][0]:
            raise CorruptModel(
                f"the adapter {self._name}: its config names {len(ids)} tokens of {module}, and it has "
                f"weights for {self._shapes[rows][0]}.\n"
                "hint: save the adapter again with PEFT's save_pretrained"
            )
        return ids

    def _product(
        self, module: str, parts: Mapping[tuple[int, str], str], depth: int
    ) -> Product | None:
        down, up = parts.get((depth, "down")), parts.get((depth, "up"))
        if down is None and up is None:
            if parts.get((depth, "magnitude")) or parts.get((depth, "product_bias")):
                raise CorruptModel(f"the adapter {self._name} has no factors of {module}")
            return None
        if down is None or up is None:
            raise CorruptModel(
                f"the adapter {self._name} has only one of the two factors of {module}"
            )
        for key in (down, up):
            if len(self._shapes[key]) != 2:
                raise UnsupportedModel(
                    f"the adapter {self._name} is more than products of two matrices: {key} has the shape "
                    f"{list(self._shapes[key])}.\nhint: {_MERGE}"
                )
        rank = self._patterns.value(self._config, "rank_pattern", module, self._config.get("r", 8))
        stack = self._stack_size(module)
        if not rank * stack == self._shapes[down][0] == self._shapes[up][1]:
            times = f" for each of {stack} experts" if stack > 1 else ""
            raise CorruptModel(
                f"the adapter {self._name}: its config gives {module} the rank {rank}{times}, and its "
                f"factors have {self._shapes[down][0]} and {self._shapes[up][1]}.\n"
                "hint: save the adapter again with PEFT's save_pretrained"
            )
        alpha = self._patterns.value(
            self._config, "alpha_pattern", module, self._config.get("lora_alpha", 8)
        )
        return Product(down, up, rank, alpha, bool(self._config.get("use_rslora")))

    def _stack_size(self, path: str) -> int:
        """Return how many matrices a parameter stacks; 1 for a module's path."""
        module, _, name = path.rpartition(".")
        shape = self._layout.parameters.get(module, {}).get(name, ())
        return shape[0] if len(shape) == 3 else 1

    def _tie(self, changes: dict[str, Change]) -> None:
        """Let a head that is the embedding follow it in what PEFT changes for both."""
        embedding, head = self._layout.embedding, self._layout.head
        if not self._layout.is_tied or head is None or embedding not in changes:
            return
        first, own = changes[embedding], changes.get(head, Change())
        parameters, is_copied = dict(own.parameters), own.is_weight_copied
        if first.is_weight_copied and "weight" not in parameters:
            parameters["weight"], is_copied = first.parameters["weight"], True
        ids, rows = own.token_ids, own.token_rows
        if first.token_rows is not None and rows is None and "weight" not in own.parameters:
            ids, rows = first.token_ids, first.token_rows
        tied = Change(
            own.product,
            own.magnitude,
            own.product_bias,
            parameters,
            is_copied,
            ids,
            rows,
            own.stacked,
        )
        if tied != Change():
            changes[head] = tied


# Patterns --------------------------------------------------------------------------------------------

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
