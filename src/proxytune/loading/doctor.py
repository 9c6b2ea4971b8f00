"""Checks a whole recipe before any weight is read: models, vocabularies, prompts, adapters, memory.

`examine` collects everything that is wrong instead of stopping at the first problem, so that a recipe can be
fixed in one go. `load.py` calls it before loading, and the command line shows the result.

Memory is an estimate of what stays allocated: weights in their running dtype, each copy counted once, and the
KV cache by length. Temporary memory of a forward comes on top.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from proxytune.backends.retokenised import token_map
from proxytune.checkpoints.adapter import AdapterFiles
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.cut_checkpoint import CutCheckpoint
from proxytune.checkpoints.merge import why_not_quantised
from proxytune.checkpoints.placement import running_device, running_dtype
from proxytune.errors import (
    AdapterMismatch,
    BackendError,
    NotEnoughMemory,
    UnsupportedModel,
    UserError,
    VocabularyMismatch,
)
from proxytune.grants import Grants
from proxytune.loading.formats import base_format, pair_formats
from proxytune.loading.output import shared_bytes
from proxytune.loading.samples import Sample, notes_on, sample_of
from proxytune.machine import device_memory
from proxytune.recipe.files import AskedRight, RecipeFiles, ungranted_error
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ModelSpec
from proxytune.text.meter import MAX_SECONDS
from proxytune.text.prompts import PromptFormat
from proxytune.text.vocab import NUM_EXAMPLES, Alignment, Vocabulary, align

Read = TypeVar("Read")

SAMPLE_TEXT = (
    "She had not meant to stay so long, but the rain went on, and nobody in the kitchen seemed to mind. "
    "In 1987 the court held that the defendant's appeal (No. 86-1234) was out of time.\n\n"
    "The treatment lowered blood pressure by 12.5 mmHg in 38% of patients; headaches were rare.\n\n"
    "def area(width: float, height: float = 1.0) -> float:\n    return width * height  # square metres\n"
)
"""A text to find out how many of its tokens another tokenizer has too."""

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CACHE_BYTES = {"float32": 4.0, "float16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a recipe cannot run.

    Args:
        where: The part of the recipe, such as `base` or `NAME.expert`.
        error: The error that loading would raise.
    """

    where: str
    error: UserError | BackendError


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What is known about one model of a recipe; None for what a problem leaves unknown.

    Args:
        part: `base`, `NAME.expert` or `NAME.anti_expert`.
        reference: The reference in the recipe; the base's if the part is the base itself.
        adapter: The adapter's reference.
        kind: `directory`, `gguf` or `api`.
        architecture: The model's class.
        num_parameters: Number of the model's parameters, without the adapter.
        num_adapter_parameters: Number of the adapter's parameters.
        stored_dtype: Dtype of the weights on disk.
        running_dtype: Dtype of the weights in memory.
        device: The device it runs on.
        max_context: Maximum number of tokens of prompt and text.
        prompt_format: How it reads texts: `plain`, `chat` or a template.
        chat_format: How it reads messages, in the same three ways.
        text_tokens: A short text as this model sees it, in tokens.
        chat_tokens: A short message as this model sees it, in tokens.
        vocabulary: How it compares with the base's: `same`, `padded`, `permuted`, `added`, `mapped` or
            `differs`; `base` for the base.
        num_tokens: Number of tokens in the vocabulary.
        num_padding: Number of rows of the output head without a token.
        weight_bytes: Memory of weights and adapter; 0 if the weights are shared.
        cache_bytes: Memory of the KV cache per 1,000 tokens of one sequence.
        shares: The part whose weights it shares.
        shares_output: Whether its output matrix is the base's, if that was looked for.
        api: What the API's server shows and accepts (`ApiTraits`), if it was called.
    """

    part: str
    reference: str
    adapter: str | None = None
    kind: str | None = None
    architecture: str | None = None
    num_parameters: int | None = None
    num_adapter_parameters: int | None = None
    stored_dtype: str | None = None
    running_dtype: str | None = None
    device: str | None = None
    max_context: int | None = None
    prompt_format: str | None = None
    chat_format: str | None = None
    text_tokens: tuple[str, ...] | None = None
    chat_tokens: tuple[str, ...] | None = None
    vocabulary: str | None = None
    num_tokens: int | None = None
    num_padding: int | None = None
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    shares: str | None = None
    shares_output: bool = False
    api: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """Memory on one device.

    Args:
        device: Its name in torch.
        name: What it is.
        weight_bytes: Memory of the weights there.
        cache_bytes: Memory of the KV caches per 1,000 tokens of one sequence.
        free_bytes: Free memory.
    """

    device: str
    name: str
    weight_bytes: int
    cache_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of `examine`.

    Args:
        directory: The recipe's directory.
        models: One report for each part, the base first.
        devices: One report for each device that is used.
        problems: Why the recipe cannot run; empty if it can.
        notes: What else is worth knowing.
        asked: The rights that the recipe asks for and that only the caller can grant. Each is a problem too.
    """

    directory: Path
    models: tuple[ModelReport, ...]
    devices: tuple[DeviceReport, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    asked: tuple[AskedRight, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether the recipe can run."""
        return not self.problems

    def raise_first(self) -> None:
        """Raise the first problem if there is one.

        Raises:
            UserError: The exact class of that problem.
        """
        if self.problems:
            raise self.problems[0].error

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "recipe": str(self.directory),
            "is_healthy": self.is_healthy,
            "models": [asdict(model) for model in self.models],
            "devices": [asdict(device) for device in self.devices],
            "problems": [
                {"error": type(p.error).__name__, "where": p.where, "message": str(p.error)}
                for p in self.problems
            ],
            "notes": list(self.notes),
            "asked": [one.to_dict() for one in self.asked],
        }


def examine(
    recipe: Recipe,
    *,
    ask_server: bool = False,
    send_key: bool = False,
    key_env: str | None = None,
    files: RecipeFiles | None = None,
    compares_outputs: bool = False,
) -> Diagnosis:
    """Check a whole recipe without reading weights.

    Unless `files` say what the caller grants, nothing that needs a right is read, no foreign code runs, and
    each right that the recipe asks for is a problem. On first use a GGUF file's config and tokenizer are
    converted, which takes seconds, and the small files of a Hub model are downloaded.

    Args:
        recipe: What to check.
        ask_server: Whether to find out, with a few short calls, what a base behind an API shows and accepts,
            if no key is sent to it.
        send_key: Whether to ask the server also if a key is sent to it.
        key_env: The environment variable whose key the caller sends to the API; see `Grants`.
        files: The recipe's files, with what the caller grants; None to look them up with `key_env` alone.
        compares_outputs: Whether to find out which models have the base's output matrix. Only those with one
            of its size are read for that, and of these only the matrix; a GGUF file's weights are converted.
    """
    asked: tuple[AskedRight, ...] = ()
    if files is None:
        asked = RecipeFiles(recipe).ungranted()
        # Weights are never read here, so pickled ones may be counted.
        files = RecipeFiles(recipe, Grants(allow_pickle=True, key_env=key_env))
    diagnosis = _Examination(recipe, ask_server, send_key, files, asked).run()
    return (
        _with_outputs(diagnosis, files) if compares_outputs and diagnosis.is_healthy else diagnosis
    )


def _with_outputs(diagnosis: Diagnosis, files: RecipeFiles) -> Diagnosis:
    """Name the models that share the base's output matrix, and count that once."""
    saved = shared_bytes(files)
    models = tuple(
        replace(
            model,
            shares_output=True,
            weight_bytes=(model.weight_bytes or 0) - saved[model.part],
        )
        if model.part in saved
        else model
        for model in diagnosis.models
    )
    on_device = {model.part: model.device for model in models}
    devices = tuple(
        replace(
            device,
            weight_bytes=device.weight_bytes
            - sum(num for part, num in saved.items() if on_device[part] == device.device),
        )
        for device in diagnosis.devices
    )
    return replace(diagnosis, models=models, devices=devices)


@dataclass
class _Examination:
    recipe: Recipe
    ask_server: bool
    send_key: bool
    files: RecipeFiles
    asked: tuple[AskedRight, ...]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reports: list[ModelReport] = field(default_factory=list)
    counted: dict[tuple[ModelSpec, str], str] = field(default_factory=dict)
    """Adapters whose memory is counted, by the weights they are on and their path: the part that has them."""

    def run(self) -> Diagnosis:
        for one in self.asked:
            self._fail(one.part, ungranted_error([one]))
        for part, spec in self.recipe.models.items():
            self._examine_model(part, spec)
        self._examine_prompts()
        self._check_sides()
        self._examine_weights()
        if not self.recipe.policy.is_plain:
            self.notes.append(f"it steers by the policy {self.recipe.policy.describe()}")
        return Diagnosis(
            directory=self.recipe.directory,
            models=tuple(self.reports),
            devices=self._examine_memory(),
            problems=tuple(self.problems),
            notes=tuple(dict.fromkeys(self.notes)),
            asked=self.asked,
        )

    def _fail(self, where: str, error: UserError | BackendError) -> None:
        self.problems.append(Problem(where, error))

    def _tried(self, part: str, read: Callable[[], Read], *, is_noted: bool = True) -> Read | None:
        """Return what `read` does; None if it fails, a problem of this part if it is to be noted."""
        try:
            return read()
        except (UserError, BackendError) as error:
            if is_noted:
                self._fail(part, error)
            return None

    def _examine_model(self, part: str, spec: ModelSpec) -> None:
        if spec.same_as is not None:
            self.reports.append(
                replace(self.reports[0], part=part, weight_bytes=0, cache_bytes=0, shares="base")
            )
            return
        # The first part with these weights has them counted and their problems reported.
        owner = self.files.owner(spec)
        is_first = owner == part
        if any(a.part == owner and a.right == "trust_remote_code" for a in self.asked):
            # What the model's code says of it is known only to those who run that code.
            self.reports.append(ModelReport(part=part, reference=spec.model or ""))
            return
        checkpoint = self._tried(part, lambda: self.files.checkpoint(spec), is_noted=is_first)
        values: dict[str, Any] = {
            "reference": spec.model or _called_cut(spec),
            "adapter": spec.adapter,
            "prompt_format": spec.prompt,
            "shares": None if is_first else owner,
        }
        if spec.api is not None:
            values["kind"] = "api"
            may_ask = self._tried(part, lambda: self._examine_key(part, spec))
            if checkpoint is not None:
                values |= self._examine_tokens(part, spec, checkpoint, is_first)
                self.notes.append(
                    f"{part}: text is cut into tokens by the tokenizer of {checkpoint.name}; of a server's "
                    "other tokens none can be chosen."
                )
                if may_ask:
                    values["api"] = self._tried(part, lambda: self._ask_server(spec, checkpoint))
            self.reports.append(ModelReport(part=part, **values))
            return
        adapter = self._tried(part, lambda: self._find_adapter(part, spec, checkpoint))
        if adapter is not None:
            values["num_adapter_parameters"] = adapter.num_parameters
        if checkpoint is not None:
            self.notes += (f"{part}: {note}" for note in checkpoint.notes if is_first)
            values |= {
                "kind": checkpoint.kind,
                "architecture": checkpoint.architecture,
                "stored_dtype": checkpoint.stored_dtype,
                "max_context": checkpoint.max_context,
            }
            values |= self._examine_tokens(part, spec, checkpoint, is_first)
            values |= self._examine_size(part, spec, checkpoint, adapter, is_first)
            if adapter is not None and adapter.why_merged(checkpoint) is not None:
                first = self.counted.get((spec.weights, str(adapter.path)))
                values["shares"] = None if first == part else first
        self.reports.append(ModelReport(part=part, **values))

    def _find_adapter(
        self, part: str, spec: ModelSpec, checkpoint: Checkpoint | None
    ) -> AdapterFiles | None:
        adapter = self.files.adapter(spec)
        if adapter is None or checkpoint is None:
            return adapter
        adapter.check_fits(checkpoint)
        trained_on, given = (
            name.rstrip("/").rpartition("/")[2].lower()
            for name in (adapter.trained_on or "", checkpoint.name)
        )
        if trained_on and trained_on != given:
            self.notes.append(
                f"{part}: the adapter {adapter.name} says it was trained on {adapter.trained_on}, and is "
                f"put on {checkpoint.name}; their layers have the same sizes."
            )
        self._note_adapter(part, spec, adapter, checkpoint)
        return adapter

    def _note_adapter(
        self, part: str, spec: ModelSpec, adapter: AdapterFiles, checkpoint: Checkpoint
    ) -> None:
        """Note what of an adapter is dropped, and why it needs a copy of its model."""
        number = adapter.num_embeddings(checkpoint)
        if number is not None:
            self.notes.append(_resized(part, adapter, checkpoint, number))
        why = adapter.why_merged(checkpoint)
        if why is None:
            return
        if spec.cut_of is not None:
            raise UnsupportedModel(
                f"the adapter {adapter.name} can only be merged into weights, because {why}, and the cut "
                "that it is for shares its weights with the base.\n"
                "hint: `proxytune make-proxy BASE --output DIR` writes the cut as an ordinary model; name DIR"
            )
        if spec.quantization is not None or checkpoint.is_quantized:
            raise UnsupportedModel(why_not_quantised(adapter, checkpoint, why))
        self.notes.append(
            f"{part}: the adapter {adapter.name} is merged into a copy of {checkpoint.name} of its own, "
            f"because {why}."
        )

    def _examine_tokens(
        self, part: str, spec: ModelSpec, checkpoint: Checkpoint, is_first: bool
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        vocabulary = self._tried(part, lambda: checkpoint.vocabulary, is_noted=is_first)
        if vocabulary is None:
            return values
        self._tried(part, lambda: checkpoint.eos_token_ids, is_noted=is_first)
        values["num_tokens"] = len(vocabulary.token_to_id)
        values["num_padding"] = len(vocabulary.padding_ids)
        if part == "base":
            values["vocabulary"] = "base"
        elif self.reports[0].num_tokens is not None:
            base = self.files.checkpoint(self.recipe.base)
            try:
                alignment = align(base.vocabulary, vocabulary)
                values["vocabulary"] = alignment.kind
                self.notes += added_notes(part, base.vocabulary, vocabulary, alignment)
            except VocabularyMismatch as error:
                is_mapped = self.recipe.vocabulary == "map"
                values["vocabulary"] = "mapped" if is_mapped else "differs"
                if is_first and is_mapped:
                    self._examine_map(part, base, checkpoint)
                elif is_first:
                    self._fail(part, error)
        return values

    def _examine_prompts(self) -> None:
        """Show how the models that could be read see a short text and a short message."""
        readable = {report.part for report in self.reports if report.num_tokens is not None}
        if "base" not in readable:
            return
        base = self._tried("base", lambda: base_format(self.files), is_noted=False)
        if base is None:
            return
        formats = {"base": base}
        for pair in self.recipe.experts:
            sides = {"expert": pair.expert, "anti_expert": pair.anti_expert}
            own = {f"{pair.name}.{side}" for side, spec in sides.items() if spec.same_as is None}
            if own <= readable:
                found = partial(pair_formats, pair, self.files, base)
                formats |= self._tried(pair.name, found, is_noted=False) or {}
        samples = self._samples(formats)
        self.notes += notes_on(self.recipe, samples, formats)
        for index, report in enumerate(self.reports):
            part = report.part if report.part in samples else "base"
            if report.part in samples or report.shares == "base":
                sample = samples.get(part)
                chat = None if sample is None or isinstance(sample.chat, UserError) else sample.chat
                self.reports[index] = replace(
                    report,
                    chat_format=formats[part].chat,
                    text_tokens=None if sample is None else sample.text,
                    chat_tokens=chat,
                )

    def _samples(self, formats: Mapping[str, PromptFormat]) -> dict[str, Sample]:
        samples: dict[str, Sample] = {}
        known: dict[Hashable, Sample | None] = {}
        refused_s = 0.0
        for part, own in formats.items():
            key = own.text, own.chat, own.template, id(own.tokenizer)
            if key not in known:
                # A recipe may name a thousand models, and each template may take its whole time.
                if refused_s >= MAX_SECONDS:
                    continue
                start = monotonic()
                name = self.recipe.models[part].model or part
                known[key] = self._tried(part, partial(sample_of, own, name))
                sample = known[key]
                if sample is None or isinstance(sample.chat, UserError):
                    refused_s += monotonic() - start
            if (sample := known[key]) is not None:
                samples[part] = sample
                is_given = self.recipe.models[part].given_chat is not None
                if is_given and isinstance(sample.chat, UserError):
                    self._fail(part, sample.chat)
        return samples

    def _examine_map(self, part: str, base: Checkpoint, small: Checkpoint) -> None:
        """Note how much of the base's vocabulary, and of ordinary text, another tokenizer covers."""
        found = token_map(base, small)
        if not found.num_mapped:
            self._fail(
                part,
                VocabularyMismatch(
                    f"{small.name} has none of the tokens of {base.name}, so it can steer nothing.\n"
                    "hint: take small models whose tokenizer is nearer to the base's"
                ),
            )
            return
        token_ids = base.tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)
        num_mapped = sum(found.small_id(token_id) is not None for token_id in token_ids)
        self.notes.append(
            f"{part}: {small.name} has another tokenizer than the base. It steers {found.num_mapped:,} of "
            f"the base's {found.num_base_tokens:,} tokens ({found.share:.0%}), which are {num_mapped} of the "
            f"{len(token_ids)} tokens of a sample of prose and code ({num_mapped / len(token_ids):.0%}); the "
            "others keep the base's logits. `proxytune score` measures how much probability that is."
        )

    def _check_sides(self) -> None:
        """Refuse a pair if only one side uses the base's tokens."""
        kinds = {report.part: report.vocabulary for report in self.reports}
        for expert in self.recipe.experts:
            sides = expert.expert, expert.anti_expert
            parts = [f"{expert.name}.{side}" for side in ("expert", "anti_expert")]
            mapped = [kinds[part] == "mapped" for part in parts]
            if not any(mapped):
                continue
            # A side that is not mapped is left alone: its vocabulary may be the damaged one.
            found = [self.files.checkpoint(spec) for spec in sides] if all(mapped) else []
            if not found or not _map_alike(self.files.checkpoint(self.recipe.base), *found):
                self._fail(
                    parts[0],
                    VocabularyMismatch(
                        f"expert and anti-expert of {expert.name} have different tokenizers, so their "
                        "predictions cannot be compared.\n"
                        "hint: the anti-expert is the model that the expert was tuned from"
                    ),
                )

    def _examine_weights(self) -> None:
        """Note each expert's weights and output bias, and check that the base has the bias's tokens."""
        has_base = self.reports[0].num_tokens is not None
        for expert in self.recipe.experts:
            if expert.has_weights:
                self.notes.append(f"{expert.name}: its weights are {expert.weights.describe()}")
            if expert.bias is None or not has_base:
                continue
            bias = self._tried(f"{expert.name}.bias", partial(self.files.output_bias, expert))
            if bias is not None:
                largest = bias.values.abs().max()
                self.notes.append(
                    f"{expert.name}: its output bias {expert.bias} changes {len(bias):,} tokens, by up to "
                    f"{float(largest):.2f} nats at strength 1"
                )

    def _examine_size(
        self,
        part: str,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        adapter: AdapterFiles | None,
        is_first: bool,
    ) -> dict[str, Any]:
        num = self._tried(part, lambda: checkpoint.num_parameters, is_noted=is_first)
        if num is None:
            return {}
        values: dict[str, Any] = {"num_parameters": num}
        if spec.llama_cpp is not None:
            return values | self._examine_llama_cpp(part, spec, checkpoint, adapter, is_first)
        if is_first:
            self._tried(part, checkpoint.check_buildable)
        # A cut runs as the base does.
        asked, stored = spec, checkpoint.stored_dtype
        if spec.cut_of is not None:
            asked = self.recipe.base
            stored = self.files.checkpoint(asked).stored_dtype
        device = self._tried(part, lambda: running_device(asked.device), is_noted=is_first)
        if device is None:
            return values
        dtype = running_dtype(asked.dtype, stored_dtype=stored, device=device)
        element = _DTYPE_BYTES[dtype]
        weight_bytes = 0
        if is_first and isinstance(checkpoint, CutCheckpoint):
            weight_bytes = element * checkpoint.num_own_parameters
            self.notes.append(
                f"{part}: layers, embedding and head are those of the base in memory; the bridge is its own."
            )
        elif is_first:
            found = self._tried(part, lambda: _weight_bytes(checkpoint, spec, dtype, device))
            weight_bytes = element * num if found is None else found
            self._note_quantization(part, spec, checkpoint, weight_bytes)
        if adapter is not None:
            # Factors that were trained in float32 run in the model's dtype.
            is_merged = adapter.why_merged(checkpoint) is not None
            added = num if is_merged else adapter.num_kept(checkpoint)
            weight_bytes += self._once(part, spec, adapter, element * added)
        return {
            **values,
            "device": device,
            "running_dtype": dtype,
            "weight_bytes": weight_bytes,
            "cache_bytes": 1000 * element * checkpoint.cache_elements_per_token,
        }

    def _note_quantization(
        self, part: str, spec: ModelSpec, checkpoint: Checkpoint, num_bytes: int
    ) -> None:
        from proxytune.backends.transformers.quantized import joins_rows, stored_quantization

        if spec.quantization is not None and joins_rows(spec.quantization):
            self.notes.append(
                f"{part}: bitsandbytes looks for outliers in all rows of a batch together, so a text depends "
                'on its batch and on drafts. "llm_int8_threshold": 0.0 in its quantization keeps rows apart.'
            )
        method = stored_quantization(checkpoint)
        if method is not None and num_bytes > checkpoint.stored_bytes:
            stored = bytes_text(checkpoint.stored_bytes)
            self.notes.append(
                f"{part}: the weights of {checkpoint.name} are stored in {stored} ({method}), and are "
                "unpacked here, as nothing on this machine multiplies them as they are."
            )

    def _once(self, part: str, spec: ModelSpec, adapter: AdapterFiles, num_bytes: int) -> int:
        """Return the memory of an adapter; 0 if it was counted for another part."""
        key = (spec.weights, str(adapter.path))
        return num_bytes if self.counted.setdefault(key, part) == part else 0

    def _examine_key(self, part: str, spec: ModelSpec) -> bool:
        """Note which key goes to which host, and return whether the server may be asked."""
        from proxytune.backends.api.keys import find_key
        from proxytune.recipe.address import parse_address

        assert spec.model is not None and spec.api is not None
        asked = spec.api.key_env
        grants = self.files.grants
        key = find_key(spec.model, asked=asked, key_env=grants.key_env)
        if key is None:
            host = parse_address(spec.model).netloc.decode()
            self.notes.append(f"{part}: no key is sent to {host}.")
            return self.ask_server
        note = f"{part}: the key in {key.variable} is sent to {key.host} when the recipe runs"
        if asked not in (None, key.variable):
            note += f"; the recipe asks for the one in {asked}, which is not sent"
        if self.ask_server and not self.send_key:
            note += ". The server was not asked anything now, as that would send the key: --ask-server does"
        self.notes.append(f"{note}.")
        return self.ask_server and self.send_key

    def _ask_server(self, spec: ModelSpec, tokens: Checkpoint) -> dict[str, Any]:
        """Return what a server shows and accepts."""
        from proxytune.backends.api.backend import ApiBackend

        grants = self.files.grants
        with closing(ApiBackend.load(spec, tokens, key_env=grants.key_env)) as server:
            return asdict(server.traits)

    def _examine_llama_cpp(
        self,
        part: str,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        adapter: AdapterFiles | None,
        is_first: bool,
    ) -> dict[str, Any]:
        """Return the memory that llama.cpp needs for a file."""
        from proxytune.backends.llama_cpp import library

        assert spec.llama_cpp is not None and checkpoint.gguf is not None
        if is_first:
            self._tried(part, library)
        files = checkpoint.gguf.parts if is_first else ()
        weight_bytes = sum(file.stat().st_size for file in files)
        if adapter is not None:
            weight_bytes += self._once(part, spec, adapter, adapter.path.stat().st_size)
        element = _CACHE_BYTES[spec.llama_cpp.cache_dtype_of(checkpoint.stored_dtype)]
        return {
            # Only llama.cpp knows which GPU it was built for.
            "device": "cpu",
            "running_dtype": checkpoint.stored_dtype,
            "max_context": spec.llama_cpp.context_of(checkpoint.max_context),
            "weight_bytes": weight_bytes,
            "cache_bytes": round(1000 * element * checkpoint.cache_elements_per_token),
        }

    def _examine_memory(self) -> tuple[DeviceReport, ...]:
        devices: list[DeviceReport] = []
        used = dict.fromkeys(r.device for r in self.reports if r.device is not None)
        for device in used:
            here = [report for report in self.reports if report.device == device]
            name, free_bytes = device_memory(device)
            needed = sum(report.weight_bytes or 0 for report in here)
            cache_bytes = sum(report.cache_bytes or 0 for report in here)
            devices.append(DeviceReport(device, name, needed, cache_bytes, free_bytes))
            if needed > free_bytes:
                largest = max(here, key=lambda report: report.weight_bytes or 0)
                self._fail(
                    largest.part,
                    NotEnoughMemory(
                        f"the weights on {device} need {bytes_text(needed)}, and "
                        f"{bytes_text(free_bytes)} are free there; {largest.part} ({largest.reference}, "
                        f"{largest.running_dtype}) alone needs {bytes_text(largest.weight_bytes)}.\n"
                        'hint: set its "dtype" to "bfloat16", quantise it, or name a smaller model'
                    ),
                )
        return tuple(devices)


def _resized(part: str, adapter: AdapterFiles, checkpoint: Checkpoint, number: int) -> str:
    """Return the note on an adapter with other tokens than its model.

    Raises:
        AdapterMismatch: Ordinary tokens differ.
    """
    width, known = checkpoint.width, checkpoint.vocabulary.token_to_id
    ordinary, added = adapter.own_tokens()
    ordinary = {token: i for token, i in ordinary.items() if token not in added and i < width}
    other = next((token for token, i in ordinary.items() if known.get(token) != i), None)
    if other is not None:
        raise AdapterMismatch(
            f"the adapter {adapter.name} was trained with another tokenizer than that of {checkpoint.name}: "
            f"{other!r} is its token {ordinary[other]}.\n"
            "hint: name the small model that the adapter was trained on"
        )
    note = f"{part}: the adapter {adapter.name} has embeddings for {number:,} tokens and {checkpoint.name}"
    note += f" for {width:,}, whose tokenizer is used"
    if number < width:
        return f"{note}; those that it lacks belong to no token."
    names = [token for token, i in added.items() if i >= width][:5]
    return f"{note}; what it learned about added tokens is dropped" + (
        f" ({', '.join(map(repr, names))})." if names else "."
    )


def added_notes(
    part: str, base: Vocabulary, small: Vocabulary, alignment: Alignment
) -> Iterator[str]:
    """Yield which added tokens only one of two models has, and what becomes of them, in words."""
    in_base, in_small = (
        {token_id: token for token, token_id in vocabulary.token_to_id.items()}
        for vocabulary in (base, small)
    )
    if missing := [
        f"{in_base[i]!r} as {in_small[own]!r}" for i, own in alignment.stand_ins.items()
    ]:
        yield (
            f"{part}: {small.name} lacks {_counted(len(missing))} of the base. No offset is added to "
            f"{'it' if len(missing) == 1 else 'them'}, and {small.name} reads {_first(missing)}."
        )
    if dropped := [repr(in_small[own]) for own in alignment.dropped]:
        yield (
            f"{part}: {small.name} has {_counted(len(dropped))} that the base lacks and that "
            f"{'is' if len(dropped) == 1 else 'are'} never chosen: {_first(dropped)}."
        )


def _counted(num: int) -> str:
    return f"{num:,} special or added token{'' if num == 1 else 's'}"


def _first(names: Sequence[str]) -> str:
    """Return some names, and how many more there are."""
    more = len(names) - NUM_EXAMPLES
    return ", ".join(names[:NUM_EXAMPLES]) + (f" and {more:,} more" if more > 0 else "")


def _map_alike(base: Checkpoint, one: Checkpoint, other: Checkpoint) -> bool:
    """Whether the base's tokens are mapped to the same ones of two models."""
    if one.vocabulary.token_to_id == other.vocabulary.token_to_id:
        return True
    try:
        align(one.vocabulary, other.vocabulary)
    except VocabularyMismatch:
        return False
    maps = [token_map(base, small).small_ids >= 0 for small in (one, other)]
    return bool((maps[0] == maps[1]).all())


def _called_cut(spec: ModelSpec) -> str:
    """Return what a cut of the base is called; nothing for what is none."""
    return "" if spec.keep is None else f"the base, cut to {'+'.join(map(str, spec.keep))} layers"


def _weight_bytes(checkpoint: Checkpoint, spec: ModelSpec, dtype: str, device: str) -> int:
    """Return the memory of a model's weights, and check that what quantises them runs here."""
    from proxytune.backends.transformers import quantized
    from proxytune.backends.transformers.weights import quietly

    with quietly():
        if spec.quantization is not None:
            return quantized.try_quantization(
                checkpoint, spec.quantization, dtype=dtype, device=device
            )
        if not quantized.check_stored_quantization(checkpoint, device=device):
            return checkpoint.stored_bytes
    return _DTYPE_BYTES[dtype] * checkpoint.num_parameters


def bytes_text(number: int | None) -> str:
    """Return a number of bytes with one decimal: 1.2 GB; a question mark for None."""
    if number is None:
        return "?"
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
