"""GGUF files converted to the Hugging Face layout, once, in the cache directory."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from proxytune.checkpoints.headers import (
    GgufHeader,
    find_weight_files,
    read_gguf_header,
    read_safetensors_header,
)
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

    return hashlib.sha256(f"1 {transformers.__version__} {digest}".encode()).hexdigest()[:32]


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


def convert_small_files(path: Path, header: GgufHeader) -> Path:
    """Return a directory with a GGUF file's config and tokenizer, converted on first use."""

    def build(part: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:
            architecture = header.metadata.get("general.architecture")
            raise UnsupportedModel(
                f"{path} is a model of the architecture {architecture!r}, which transformers cannot convert "
                f"from GGUF: {error}\nhint: use the model's original safetensors"
            ) from error
        config.save_pretrained(part)
        tokenizer.save_pretrained(part)

    target = cache_directory() / "gguf" / _conversion_key(header.digest)
    return build_once(target, build, is_whole=lambda: (target / "config.json").is_file())


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


def convert_weights(path: Path, *, small_files: Path) -> Path:
    """Return a directory with a GGUF file's whole model in float32, converted on first use."""

    def build(part: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        num_bytes = 4 * sum(t.num_elements for t in read_gguf_header(path).tensors.values())
        free = shutil.disk_usage(part).free
        if free < num_bytes:
            raise OSError(f"{num_bytes} bytes are needed and {free} are free")
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
        except Exception as error:
            raise CorruptModel(
                f"the weights of {path} cannot be converted: {error}\n"
                "hint: copy or download it again, or use the model's original safetensors"
            ) from error
        model.save_pretrained(part)
        for file in small_files.iterdir():
            # The second is one that another process is writing.
            if file.is_file() and not file.name.startswith(("content-", ".content-")):
                shutil.copyfile(file, part / file.name)

    try:
        digest = _content_digest(path, memory=small_files)
    except OSError as error:
        raise CorruptModel(f"{path} cannot be read: {error}") from error
    target = cache_directory() / "gguf" / _conversion_key(f"weights {digest}")

    def is_whole() -> bool:
        try:
            return all(bool(read_safetensors_header(file)) for file in find_weight_files(target))
        except (CorruptModel, ModelNotFound):
            return False

    return build_once(target, build, is_whole=is_whole)
