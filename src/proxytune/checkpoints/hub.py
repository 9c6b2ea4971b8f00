"""Files from the Hugging Face Hub, or from its cache."""

from __future__ import annotations

from pathlib import Path

from proxytune.checkpoints.headers import SAFETENSORS_DTYPES, StoredTensor
from proxytune.errors import ModelNotFound

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt")
"""Small files of a Hub model: config, tokenizer, prompt template and index; no weights."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def download_snapshot(hub_id: str, *, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Return the snapshot of a Hub repository with the files that match, downloading what is missing."""
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except hub_errors.GatedRepoError as error:
        raise ModelNotFound(
            f"{hub_id} is gated on the Hub, and this account has no access to it.\n"
            f"hint: accept its terms on its page, then run `hf auth login`"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"there is neither a local directory {hub_id} nor a model of that name on the Hub.\n"
            "hint: check the spelling; for a private model run `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{hub_id} is on the Hub, without a revision {revision!r}.\n"
            "hint: leave the revision out, or name a branch, tag or commit of it"
        ) from error
    except Exception as error:  # connection errors have a class for each transport
        raise ModelNotFound(
            f"{hub_id}{at} is not a local directory, not whole in the cache of the Hub, and the Hub cannot "
            f"be reached ({type(error).__name__}).\n"
            f"hint: go online once and run `hf download {hub_id}`, or name a local directory"
        ) from error


def _cached_snapshot(hub_id: str, file: str, *, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(hub_id, file, revision=revision)
    except (OSError, ValueError):  # a name that the Hub allows for no model, or an unreadable cache
        return None
    return Path(path).parent if isinstance(path, str) else None


def cached_directory(hub_id: str, *, revision: str | None) -> Path | None:
    """Return the snapshot of a model or adapter in the Hub's cache; None if it is not there."""
    for file in ("config.json", "adapter_config.json"):
        cached = _cached_snapshot(hub_id, file, revision=revision)
        if cached is not None:
            return cached
    return None


def hub_directory(hub_id: str, *, revision: str | None) -> Path:
    """Return the snapshot of a Hub model with its small files, from the cache if they are all there."""
    cached = _cached_snapshot(hub_id, "config.json", revision=revision)
    if cached is not None and any((cached / name).is_file() for name in TOKENIZER_FILES):
        return cached
    try:
        return download_snapshot(hub_id, revision=revision, patterns=SMALL_FILES)
    except ModelNotFound:
        if cached is None:
            raise
        return cached


def hub_adapter(hub_id: str, *, revision: str | None, allow_pickle: bool) -> Path:
    """Return the snapshot of an adapter on the Hub, downloading what is missing."""
    cached = _cached_snapshot(hub_id, "adapter_config.json", revision=revision)
    if cached is not None and (cached / "adapter_model.safetensors").is_file():
        return cached
    patterns: tuple[str, ...] = ("adapter_config.json", "adapter_model.safetensors")
    if allow_pickle:
        patterns += ("adapter_model.bin",)
    return download_snapshot(hub_id, revision=revision, patterns=patterns)


def hub_recipe(hub_id: str) -> Path:
    """Return the snapshot of a recipe on the Hub, from the cache if it is there.

    Raises:
        ModelNotFound: It is neither in the cache nor on the Hub.
    """
    patterns = ("README.md", "*.json", "*.safetensors")
    cached = _cached_snapshot(hub_id, "config.json", revision=None)
    return cached or download_snapshot(hub_id, revision=None, patterns=patterns)


def hub_tensors(hub_id: str, *, revision: str | None) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return tensors and pickled files of a Hub model whose weights are not in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    api = HfApi()
    try:
        try:
            metadata = api.get_safetensors_metadata(hub_id, revision=revision)
        except hub_errors.NotASafetensorsRepoError:
            files = api.list_repo_files(hub_id, revision=revision)
            suffixes = tuple(pattern.removeprefix("*") for pattern in PICKLED)
            return {}, [name for name in files if name.endswith(suffixes)]
    except Exception as error:  # connection errors have a class for each transport
        raise ModelNotFound(
            f"the config of {hub_id} is in the cache of the Hub, its weights are not, and the Hub cannot be "
            f"reached ({type(error).__name__}).\nhint: go online once and run `hf download {hub_id}`"
        ) from error
    tensors = {}
    for file in metadata.files_metadata.values():
        for name, tensor in file.tensors.items():
            _, dtype = SAFETENSORS_DTYPES.get(tensor.dtype, (0, str(tensor.dtype).lower()))
            tensors[name] = StoredTensor(tuple(tensor.shape), dtype)
    return tensors, []
