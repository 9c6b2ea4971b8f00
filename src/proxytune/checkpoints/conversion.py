"""GGUF files converted to the Hugging Face layout, once, in the cache directory.

transformers converts them. It is given a tokenizer's rule by its name (`pre_tokenizers.py`), and one file of
types that it reads (`gguf_parts.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from proxytune.checkpoints.config_limits import check_gguf_metadata
from proxytune.checkpoints.faults import faults_as
from proxytune.checkpoints.gguf_parts import (
    GgufModel,
    check_types,
    joined_bytes,
    scaled_angles,
    write_joined,
)
from proxytune.checkpoints.headers import find_weight_files, read_safetensors_header
from proxytune.checkpoints.pre_tokenizers import BYTE_LEVEL, cut_by, cutting_rule
from proxytune.errors import CorruptModel, ModelNotFound, UnsupportedModel
from proxytune.files import building, remove_unfinished, write_whole, writing

CACHE_HINT = "make room there, or set XDG_CACHE_HOME to a directory that can be written"


def cache_directory() -> Path:
    """Return where converted models are kept: `proxytune` below `$XDG_CACHE_HOME`, or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "proxytune"


def _conversion_key(digest: str) -> str:
    """Return the name of the directory for this transformers' conversion of a file with this digest.

    Another version may convert differently, so it gets its own copy.
    """
    import transformers

    return hashlib.sha256(f"3 {transformers.__version__} {digest}".encode()).hexdigest()[:32]


def build_once(
    target: Path, build: Callable[[Path], None], *, is_whole: Callable[[], bool]
) -> Path:
    """Return the directory `target`, built first if it is not there.

    A lock keeps a second process from repeating the work.

    Raises:
        OutputFileError: It cannot be written.
    """
    from filelock import FileLock

    if target.is_dir() and is_whole():
        return target
    with writing(target, hint=CACHE_HINT):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.is_dir():
                if is_whole():
                    return target
                shutil.rmtree(target)
            remove_unfinished(target)
            with building(target, hint=CACHE_HINT) as part:
                build(part)
    return target


def convert_small_files(model: GgufModel) -> Path:
    """Return a directory with a GGUF model's config and tokenizer, converted on first use.

    Raises:
        CorruptModel: Its header has impossible numbers.
        UnsupportedModel: transformers cannot convert it, or its text is cut by an unknown rule.
        OutputFileError: The cache directory cannot be written.
    """
    path, header = model.path, model.header
    check_gguf_metadata(header.metadata, header.tensors, str(path))
    rule = None
    if header.metadata.get("tokenizer.ggml.model") == BYTE_LEVEL:
        rule = cutting_rule(header.metadata.get("tokenizer.ggml.pre"), str(path))
    angles: dict[str, Any] = {}
    with contextlib.suppress(UnsupportedModel):  # llama.cpp may run it all the same
        angles = scaled_angles(model)

    def build(part: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        def error(why: str) -> UnsupportedModel:
            architecture = header.metadata.get("general.architecture")
            return UnsupportedModel(
                f"{path} is a model of the architecture {architecture!r}, which transformers cannot convert "
                f"from GGUF: {why}\nhint: use the model's original safetensors"
            )

        with _readable(model, part, has_values=False) as file, faults_as(error):
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            if rule is not None:
                cut_by(tokenizer.backend_tokenizer, rule)
        if angles:
            config.rope_parameters = {**config.rope_parameters, **angles}
        config.save_pretrained(part)
        tokenizer.save_pretrained(part)

    key = _conversion_key(" ".join([header.digest, *map(str, angles.values())]))
    target = cache_directory() / "gguf" / key
    return build_once(target, build, is_whole=lambda: (target / "config.json").is_file())


@contextlib.contextmanager
def _readable(model: GgufModel, directory: Path, *, has_values: bool) -> Iterator[Path]:
    """Give one file that transformers reads; for some models, one in `directory` that is gone afterwards."""
    if model.is_readable or (len(model.parts) == 1 and not has_values):
        yield model.path
        return
    file = directory / "joined.gguf"
    write_joined(model, file, has_values=has_values)
    try:
        yield file
    finally:
        file.unlink()


def _content_digest(path: Path, *, memory: Path) -> str:
    """Return the SHA-256 of a file's content, cached in `memory` until its size or time changes."""
    state = path.stat()
    identity = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
    remembered = memory / f"content-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    if remembered.is_file():
        digest = remembered.read_text()
        if len(digest) == 64:
            return digest
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    digest = content.hexdigest()
    write_whole(remembered, digest, hint=CACHE_HINT)
    return digest


def convert_weights(model: GgufModel, *, small_files: Path) -> Path:
    """Return a directory with a GGUF model's weights in float32 and its small files, converted on first use.

    Raises:
        CorruptModel: It cannot be read or converted.
        UnsupportedModel: A tensor's type can only be run by llama.cpp.
        OutputFileError: The cache directory cannot be written.
    """
    path = model.path
    check_types(model.header, str(path))

    def build(part: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        num_bytes = 4 * sum(tensor.num_elements for tensor in model.header.tensors.values())
        num_bytes += joined_bytes(model)
        free = shutil.disk_usage(part).free
        if free < num_bytes:
            raise OSError(f"{num_bytes} bytes are needed and {free} are free")

        def error(why: str) -> CorruptModel:
            return CorruptModel(
                f"the weights of {path} cannot be converted: {why}\n"
                "hint: copy or download it again, or use the model's original safetensors"
            )

        with _readable(model, part, has_values=True) as file, faults_as(error):
            converted = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
        converted.save_pretrained(part)
        for file in small_files.iterdir():
            # The second is one that another process is writing.
            if file.is_file() and not file.name.startswith(("content-", ".content-")):
                shutil.copyfile(file, part / file.name)

    try:
        digests = [_content_digest(file, memory=small_files) for file in model.parts]
    except OSError as error:
        raise CorruptModel(f"{path} cannot be read: {error}") from error
    target = cache_directory() / "gguf" / _conversion_key(f"weights {' '.join(digests)}")

    def is_whole() -> bool:
        try:
            return all(bool(read_safetensors_header(file)) for file in find_weight_files(target))
        except (CorruptModel, ModelNotFound):
            return False

    return build_once(target, build, is_whole=is_whole)
