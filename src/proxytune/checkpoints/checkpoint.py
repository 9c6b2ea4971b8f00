"""Finds a model's files by reference and reads everything but the weights.

Backends read the weights, and the recipe decides which models belong together. Kinds of reference are in
`references.py`, weight files' headers in `headers.py`, dtype and device in `placement.py`.

A GGUF file is converted to the Hugging Face layout once and kept in the cache directory, in two steps: config
and tokenizer (seconds, enough for every check), and weights in float32 (the only dtype that holds every
dequantised value exactly). Each copy is there whole or not at all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from proxytune.checkpoints.causal import check_causal
from proxytune.checkpoints.config_limits import (
    check_config,
    check_empty_model,
    check_num_layers,
    check_raw_config,
    token_ids,
    values_of,
)
from proxytune.checkpoints.context import max_context
from proxytune.checkpoints.conversion import convert_small_files, convert_weights
from proxytune.checkpoints.faults import fault_text, faults_as, is_fault, is_panic, shown
from proxytune.checkpoints.gguf_parts import (
    GgufModel,
    check_types,
    read_gguf_model,
    scaled_angles,
)
from proxytune.checkpoints.headers import (
    GGUF_ADDED,
    SAFETENSORS_DTYPES,
    GgufHeader,
    StoredTensor,
    find_weight_files,
    read_safetensors_header,
    weight_files_are_there,
)
from proxytune.checkpoints.hub import (
    PICKLED,
    SMALL_FILES,
    TOKENIZER_FILES,
    download_snapshot,
    hub_directory,
    hub_tensors,
)
from proxytune.checkpoints.pre_tokenizers import cuts_by_default
from proxytune.checkpoints.references import local_path, unpinned_path
from proxytune.checkpoints.tokenizer_limits import check_pattern_times, check_tokenizer_files
from proxytune.checkpoints.untrusted import LIST_BYTES, check_links, read_json_file
from proxytune.errors import (
    CorruptModel,
    ModelNotFound,
    ProxytuneError,
    UnsafeModel,
    UnsupportedModel,
    pip_install,
)

if TYPE_CHECKING:
    from proxytune.checkpoints.changes import Layout
    from proxytune.text.vocab import Vocabulary

_NOT_PARAMETERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
"""Constant buffers that old checkpoints store among the weights."""

OR_GRANT = (
    '; or if a recipe names it and you trust whoever made it, set "{0}": true for it in the recipe, and '
    "grant that with {1} "
    "({0}=True in Python)"
)
"""What remains to do about a model that needs a right."""

_HEAD = re.compile(r"output\.weight|(.+\.)?(lm_head|embed_out)\.weight")
_EMBEDDING = re.compile(r"token_embd\.weight|(.+\.)?(embed_tokens|embed_in|wte)\.weight")
"""Names of the output head, and of the embedding that takes its place if there is none."""


@dataclass(eq=False)
class Checkpoint:
    """A model's files, and what can be known without reading the weights.

    `find_checkpoint` makes and checks it. Reading `tokenizer` or `config` of a GGUF file converts
    both on first use; `weights_path` converts or downloads the weights.

    Args:
        name: The reference as the recipe has it.
        kind: Where the weights come from.
        directory: The files in the Hugging Face layout; for a GGUF file its converted config and tokenizer.
        gguf: The GGUF file, or all files of a split model.
        tensors: Names, shapes and dtypes of the stored weights; empty for pickled ones.
        hub_id: Where missing weights can be downloaded from.
        revision: The commit or branch on the Hub.
        trust_remote_code: Whether code that comes with the model may run.
        allow_pickle: Whether pickled weights may be read.
    """

    name: str
    kind: Literal["directory", "gguf"]
    directory: Path
    gguf: GgufModel | None = field(default=None, repr=False)
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)
    hub_id: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def gguf_path(self) -> Path | None:
        """The GGUF file, the first one of a split model."""
        return None if self.gguf is None else self.gguf.path

    @property
    def gguf_header(self) -> GgufHeader | None:
        """The GGUF file's header, with the tensors of all files of a split model."""
        return None if self.gguf is None else self.gguf.header

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the files, though they can be used."""
        header = self.gguf_header
        if header is None or not header.tokens or not cuts_by_default(header.metadata):
            return ()
        return (
            f"{self.name} names no pre-tokenizer of its own, so its text is cut by llama.cpp's default rule, "
            "which may give other tokens than the model was trained with. Convert it again with a current "
            "llama.cpp.",
        )

    @cached_property
    def config(self) -> Any:
        """The transformers config.

        Raises:
            CorruptModel: It cannot be read.
            UnsupportedModel: transformers does not know this kind of model.
        """
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        raw = read_json_file(self.directory / "config.json")
        check_raw_config(raw, self.name)
        kind = raw.get("model_type")

        def error(why: str) -> CorruptModel | UnsupportedModel:
            if isinstance(kind, str) and kind in CONFIG_MAPPING:
                return CorruptModel(f"the config.json of {self.name} cannot be used: {why}")
            return UnsupportedModel(
                f"{self.name} is a model of type {shown(kind)}, which the installed transformers does not "
                f"know.\nhint: {pip_install('--upgrade transformers')}"
            )

        with faults_as(error):
            config = AutoConfig.from_pretrained(
                self.directory, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
            check_config(config, self.name)
        return config

    @property
    def _text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)

    @cached_property
    def architecture(self) -> str:
        """The model's class, such as `LlamaForCausalLM`, or its type if no class is named."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        kind = self.config.model_type
        named = getattr(self.config, "architectures", None)
        return str(named[0] if named else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, kind))

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer.

        Raises:
            ModelNotFound: There is none.
            CorruptModel: It cannot be read.
            UnsafeModel: It needs its own code, which was not allowed.
            UnsupportedModel: Its rules could multiply text, or its patterns take too long.
        """
        from transformers import AutoTokenizer

        has_patterns = check_tokenizer_files(self.directory, self.name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.directory, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
            _check_special_tokens(tokenizer, self.name)
        except ProxytuneError:
            raise
        except BaseException as error:
            if not is_fault(error):
                raise
            if "trust_remote_code" in str(error):
                raise _remote_code_refused(self.name, "tokenizer_config.json") from error
            if not any((self.directory / name).is_file() for name in TOKENIZER_FILES):
                raise ModelNotFound(
                    f"{self.name} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is in "
                    f"{self.directory}.\nhint: save its tokenizer there with save_pretrained"
                ) from error
            raise CorruptModel(
                f"the tokenizer of {self.name} cannot be read: {fault_text(error)}\n"
                "hint: copy or download it again"
            ) from error
        _translate_panics(tokenizer, self.name)
        if has_patterns:
            check_pattern_times(_cutting_rules(tokenizer), self.name)
        return tokenizer

    @cached_property
    def width(self) -> int:
        """Number of rows of the output head, including padding."""
        return int(self._text_config.vocab_size)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Which token each id is; a GGUF file's own list if it has one.

        Raises:
            CorruptModel: The tokenizer's ids differ from the file's.
        """
        from proxytune.text.vocab import Vocabulary

        if self.gguf_header is not None and self.gguf_header.tokens:
            own = self.gguf_header.token_to_id()
            known = self.tokenizer.get_vocab()
            for token, token_id in own.items():
                if known.get(token, token_id) != token_id:
                    raise CorruptModel(
                        f"token {token!r} of {self.name} has id {token_id} in the file and "
                        f"{known[token]} in the tokenizer that transformers makes of it.\n"
                        "hint: use the model's original safetensors, or convert the file again"
                    )
            kinds = enumerate(self.gguf_header.token_kinds)
            return Vocabulary.of_tokens(
                own,
                self.tokenizer,
                name=self.name,
                width=self.width,
                added_ids=[token_id for token_id, kind in kinds if kind in GGUF_ADDED],
            )
        return Vocabulary.from_tokenizer(self.tokenizer, name=self.name, width=self.width)

    @cached_property
    def num_parameters(self) -> int:
        """Number of weights, from the headers; counted in an empty model if they are packed."""
        stored = {n: t for n, t in self.tensors.items() if not _NOT_PARAMETERS.search(n)}
        if stored and not self._is_packed and not self.is_quantized:
            return sum(tensor.num_elements for tensor in stored.values())
        return sum(parameter.numel() for parameter in self._empty_model.parameters())

    @property
    def stored_bytes(self) -> int:
        """Memory of the stored weights as they are, for a directory with safetensors."""
        bits = {name: bits for bits, name in SAFETENSORS_DTYPES.values()}
        return sum(t.num_elements * bits.get(t.dtype, 8) for t in self.tensors.values()) // 8

    @cached_property
    def stored_dtype(self) -> str:
        """The dtype of most weights: torch's name, or GGUF's for quantised blocks (`Q4_1`)."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += tensor.num_elements
        if counts:
            return counts.most_common(1)[0][0]
        return str(getattr(self.config, "dtype", None) or "float32").removeprefix("torch.")

    @property
    def max_context(self) -> int | None:
        """Maximum number of positions; None if the config names no limit."""
        return max_context(self._text_config)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, ascending: from config, generation config, GGUF header and tokenizer."""
        sources: dict[str, Any] = {
            "config.json": getattr(self.config, "eos_token_id", None),
            "text config": getattr(self._text_config, "eos_token_id", None),
            "tokenizer": self.tokenizer.eos_token_id,
        }
        if self.gguf_header is not None:
            sources["header"] = self.gguf_header.metadata.get("tokenizer.ggml.eot_token_id")
        generation = self.directory / "generation_config.json"
        if generation.exists():
            sources[generation.name] = read_json_file(generation).get("eos_token_id")
        ids = {
            token_id
            for where, value in sources.items()
            for token_id in token_ids(value, f"eos_token_id in the {where} of {self.name}")
        }
        # Some models name ids of a larger vocabulary, or -1 for none.
        return tuple(sorted(token_id for token_id in ids if 0 <= token_id < self.width))

    @property
    def cache_elements_per_token(self) -> int:
        """Number of elements that the KV cache holds for one token, over all layers."""
        config = self._text_config
        num_layers = getattr(config, "num_hidden_layers", None) or 0

        def of_layers(name: str) -> list[int]:
            values = [value or 0 for value in values_of(config, name)]
            return values if len(values) > 1 else values * num_layers

        num_elements = 0
        for heads, key_value_heads, head_size, hidden_size in zip(
            of_layers("num_attention_heads"),
            of_layers("num_key_value_heads"),
            of_layers("head_dim"),
            of_layers("hidden_size"),
            strict=False,
        ):
            head_size = head_size or hidden_size // max(heads, 1)
            num_elements += 2 * (key_value_heads or heads) * head_size
        return num_elements

    @cached_property
    def _empty_model(self) -> Any:
        """The model without values, with names and shapes only."""
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        def error(why: str) -> UnsupportedModel:
            return UnsupportedModel(f"{self.name} cannot be built from its config: {why}")

        # Without initial values, which would take most of the time, even where there is nothing to set.
        with faults_as(error), torch.device("meta"), no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                self.config, trust_remote_code=self.trust_remote_code
            )
            check_empty_model(
                model,
                self.tensors,
                self.name,
                is_packed=self._is_packed or self.is_quantized,
            )
        return model

    def check_buildable(self) -> None:
        """Check that transformers can build the model, in memory that its stored tensors account for.

        Raises:
            UnsupportedModel: It cannot be built, or a GGUF file's tensor cannot be unpacked, or its rotary
                angles are scaled in an unknown way.
            CorruptModel: Its config needs far more memory than its tensors.
        """
        if self.gguf is not None:
            scaled_angles(self.gguf)
            check_types(self.gguf.header, self.name)
        _ = self._empty_model

    @property
    def _is_packed(self) -> bool:
        """Whether an element of a stored tensor holds several weights."""
        return self.kind == "directory" and not self.stored_dtype.startswith(("float", "bf"))

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are stored for a quantised model."""
        return getattr(self.config, "quantization_config", None) is not None

    @cached_property
    def layout(self) -> Layout:
        """Names and shapes of its modules, for adapters."""
        from proxytune.checkpoints.rows import layout_of

        return layout_of(self._empty_model)

    @cached_property
    def linear_shapes(self) -> Mapping[str, tuple[int, int]]:
        """`(inputs, outputs)` of every linear layer and embedding by module name, in the model's order."""
        layout = self.layout
        shapes: dict[str, tuple[int, int]] = {}
        for name, parameters in layout.parameters.items():
            if name not in layout.linear:
                continue
            first, last = parameters["weight"]
            shapes[name] = (first, last) if name in layout.inputs_first else (last, first)
        return shapes

    @cached_property
    def gets_rows(self) -> Mapping[str, bool]:
        """Whether a module gets the rows of a batch one by one, by name; see `modules_of_rows`."""
        from proxytune.checkpoints.rows import modules_of_rows

        return modules_of_rows(self._empty_model)

    def weights_path(self) -> Path:
        """Return a directory in the Hugging Face layout with the weights, fetched or converted if needed.

        Raises:
            ModelNotFound: The Hub does not give the weights.
            CorruptModel: The GGUF file cannot be converted.
            OutputFileError: The cache directory cannot be written.
        """
        if self.gguf is not None:
            return convert_weights(self.gguf, small_files=self.directory)
        if self.hub_id is None or weight_files_are_there(self.directory):
            return self.directory
        patterns = ("model*.safetensors", *SMALL_FILES)
        if not self.tensors:
            patterns = ("pytorch_model*.bin", *SMALL_FILES)
        return download_snapshot(self.hub_id, revision=self.revision, patterns=patterns)

    def weight_files(self) -> dict[str, Path]:
        """Return the safetensors file that holds each weight; see `weights_path`."""
        files = find_weight_files(self.weights_path())
        return {name: file for file in files for name in read_safetensors_header(file)}


def find_checkpoint(
    reference: str,
    *,
    root: Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Return the model that a reference names, checked as far as is possible without its weights.

    Args:
        reference: A local directory, a `.gguf` file, `package:NAME/PATH`, or a Hub id.
        root: The directory from which relative paths start.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run code that comes with the model.
        allow_pickle: Accept pickled weights, which can run any code when they are loaded.

    Raises:
        ModelNotFound: It leads to no usable files.
        CorruptModel: Files exist but cannot be read.
        UnsafeModel: It has only pickled weights or needs its own code, and that is not allowed.
        UnsupportedModel: It is not a causal language model that transformers knows.
        RecipeError: This kind of reference cannot be used here.
    """
    path = unpinned_path(reference, root=root, revision=revision)
    if path is not None and path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFound(
                f"{reference} is a file, and a model is a directory or a .gguf file.\n"
                "hint: name the directory that holds config.json and the weights"
            )
        checkpoint = _gguf_checkpoint(reference, path)
    else:
        directory = hub_directory(reference, revision=revision) if path is None else path
        checkpoint = _directory_checkpoint(
            reference,
            directory,
            root=root,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            hub_id=reference if path is None else None,
            revision=directory.name if path is None else None,
        )
    _check_usable(checkpoint)
    return checkpoint


def holds_recipe(reference: str, *, root: Path) -> bool:
    """Whether a reference leads to a recipe, and not to a model, an adapter or a file.

    Raises:
        ModelNotFound: It leads nowhere.
        CorruptModel: Its config.json cannot be read.
    """
    path = local_path(reference, root=root)
    directory = hub_directory(reference, revision=None) if path is None else path
    config = directory / "config.json"
    if not config.is_file():
        return False
    return read_json_file(config, at_most=LIST_BYTES).get("model_type") == "proxytune"


def _directory_checkpoint(
    name: str,
    directory: Path,
    *,
    root: Path,
    trust_remote_code: bool,
    allow_pickle: bool,
    hub_id: str | None,
    revision: str | None,
) -> Checkpoint:
    if directory.is_dir():
        check_links(directory, root=root)
    if not (directory / "config.json").is_file():
        hint = "a model's directory holds config.json, a tokenizer and model.safetensors"
        gguf = sorted(directory.glob("*.gguf"))
        if (directory / "adapter_config.json").is_file():
            hint = 'it is an adapter: give it as {"adapter": …}, beside the model it belongs to'
        elif gguf:
            hint = f"name the GGUF file itself: {name.rstrip('/')}/{gguf[0].name}"
        raise ModelNotFound(f"{name} holds no model: no config.json in {directory}.\nhint: {hint}")
    raw = read_json_file(directory / "config.json")
    _refuse_other_weights(name, directory, raw)
    if raw.get("model_type") == "proxytune":
        raise UnsupportedModel(
            f"{name} is a recipe, and a recipe cannot be a part of another one.\n"
            "hint: name its base or one of its small models"
        )
    _refuse_remote_code(name, raw, trust_remote_code=trust_remote_code)
    tensors: dict[str, StoredTensor] = {}
    if hub_id is None or weight_files_are_there(directory):
        for file in find_weight_files(directory):
            tensors.update(read_safetensors_header(file))
        pickled = [path.name for pattern in PICKLED for path in sorted(directory.glob(pattern))]
    else:
        tensors, pickled = hub_tensors(hub_id, revision=revision)
    if not tensors and pickled and not allow_pickle:
        raise UnsafeModel(
            f"{name} has only pickled weights ({pickled[0]}), and reading those can run any code.\n"
            "hint: save it as safetensors with save_pretrained"
            + OR_GRANT.format("allow_pickle", "--allow-pickle")
        )
    if not tensors and not pickled:
        others = ", ".join(sorted(path.name for path in directory.glob("*.safetensors"))[:3])
        found = f"; {others} is there, under a name that is not read" if others else ""
        raise ModelNotFound(
            f"{name} has no weights: neither model.safetensors nor model.safetensors.index.json is in "
            f"{directory if hub_id is None else 'its Hub repository'}{found}.\n"
            "hint: save the model with save_pretrained, or name another directory"
        )
    return Checkpoint(
        name=name,
        kind="directory",
        directory=directory,
        tensors=tensors,
        hub_id=hub_id,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


def _check_special_tokens(tokenizer: Any, name: str) -> None:
    """Check what a tokenizer says of itself, as far as this package asks."""
    for key in ("bos_token", "eos_token"):
        value = getattr(tokenizer, key)
        if not isinstance(value, str | None):
            raise CorruptModel(f"the tokenizer of {name} has the {key} {shown(value)}, no text")
    token_ids(tokenizer.eos_token_id, f"eos_token_id of the tokenizer of {name}")
    token_ids(list(tokenizer.all_special_ids), f"the special tokens of the tokenizer of {name}")
    template = tokenizer.chat_template
    templates = list(template.values()) if isinstance(template, dict) else [template]
    if not all(isinstance(item, str | None) for item in templates):
        raise CorruptModel(f"the chat template of {name} is {shown(template)}, no text")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise CorruptModel(
            f"the tokenizer of {name} says model_max_length {shown(tokenizer.model_max_length)}, no number"
        )


def _translate_panics(tokenizer: Any, name: str) -> None:
    """Make a tokenizer raise `CorruptModel` where its Rust code panics or refuses its own settings.

    The two methods below all others are replaced in this one object: what uses a tokenizer is spread over
    this package and the libraries it calls.
    """
    for method in ("_encode_plus", "_decode"):
        setattr(tokenizer, method, partial(_translated, getattr(tokenizer, method), name))


def _translated(method: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return method(*args, **kwargs)
    except BaseException as error:
        # Rust's ordinary errors arrive as a bare `Exception`.
        if type(error) is not Exception and not is_panic(error):
            raise
        raise CorruptModel(
            f"the tokenizer of {name} fails on a text: {fault_text(error)}\n"
            "hint: copy or download it again; if it is whole, report it to those who made it"
        ) from error


def _cutting_rules(tokenizer: Any) -> Callable[[str], object]:
    """Return a function that runs the rules of a tokenizer that may have patterns."""
    backend = tokenizer.backend_tokenizer

    def cut(text: str) -> object:
        def error(why: str) -> CorruptModel:
            return CorruptModel(
                f"the rules of the tokenizer of {tokenizer.name_or_path} fail: {why}"
            )

        with faults_as(error):
            if backend.normalizer is not None:
                text = backend.normalizer.normalize_str(text)
            if backend.pre_tokenizer is None:
                return text
            return backend.pre_tokenizer.pre_tokenize_str(text)

    return cut


def _refuse_other_weights(name: str, directory: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a model for which transformers would load other weights than those that are checked here."""
    if (directory / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{name} holds an adapter beside the model (adapter_config.json), which transformers would put "
            "on it unasked.\nhint: move the adapter into a directory of its own, and name it as the adapter"
        )
    if raw.get("transformers_weights") is not None:
        raise UnsupportedModel(
            f"the config.json of {name} names its weights itself (transformers_weights), and only "
            "model.safetensors and its index are read.\nhint: save the model with save_pretrained"
        )


def _refuse_remote_code(name: str, raw: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Refuse a model that needs its own code; many bring code that transformers has had for long."""
    if trust_remote_code or not raw.get("auto_map"):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if raw.get("model_type") not in CONFIG_MAPPING:
        raise _remote_code_refused(name, "config.json")


def _remote_code_refused(name: str, file: str) -> UnsafeModel:
    return UnsafeModel(
        f"{name} needs Python code that comes with it (auto_map in its {file}), and that can do anything.\n"
        "hint: read that code" + OR_GRANT.format("trust_remote_code", "--trust-remote-code")
    )


def _check_usable(checkpoint: Checkpoint) -> None:
    """Check that this is a causal language model whose head has the width in its config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = checkpoint.config
    text = config.get_text_config(decoder=True)
    # A model that runs its layers several times may count each time in `num_hidden_layers` (HRM-Text).
    own = ("num_layers_per_stack", "num_hidden_layers")
    num_layers = next((n for n in (getattr(text, key, None) for key in own) if n is not None), None)
    check_num_layers(num_layers, checkpoint.tensors, checkpoint.name)
    has_own_code = bool(getattr(config, "auto_map", None)) and checkpoint.trust_remote_code
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_own_code:
        raise UnsupportedModel(
            f"{checkpoint.name} is a model of type {config.model_type!r}, which transformers does not run as "
            "a causal language model.\nhint: name a model that predicts the next token"
        )
    check_causal(config, checkpoint.name)
    for pattern in (_HEAD, _EMBEDDING):
        heads = [name for name in checkpoint.tensors if pattern.fullmatch(name)]
        if not heads:
            continue
        name = min(heads, key=len)  # a model with several towers names the text's first or shortest
        tensor = checkpoint.tensors[name]
        is_packed = checkpoint.kind == "directory" and not tensor.dtype.startswith(("float", "bf"))
        if not is_packed and tensor.shape[:1] != (checkpoint.width,):
            raise CorruptModel(
                f"{checkpoint.name}: its config says vocab_size {checkpoint.width}, and {name} has "
                f"the shape {list(tensor.shape)}, so config and weights belong to two models.\n"
                "hint: copy or download the model again"
            )
        break


def _gguf_checkpoint(name: str, path: Path) -> Checkpoint:
    model = read_gguf_model(path)
    tensors = model.header.tensors
    if not tensors:
        raise ModelNotFound(
            f"{name} holds a vocabulary and no weights.\nhint: name a GGUF file of a whole model"
        )
    return Checkpoint(name, "gguf", convert_small_files(model), model, tensors)
