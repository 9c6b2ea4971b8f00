"""Model references: what is found, what is read without weights, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
import threading
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.conversion import build_once, cache_directory
from proxytune.checkpoints.headers import read_gguf_header, read_safetensors_header
from proxytune.checkpoints.placement import running_device, running_dtype
from proxytune.checkpoints.references import resolve_package
from proxytune.errors import (
    AdapterMismatch,
    CorruptModel,
    ModelNotFound,
    OutputFileError,
    RecipeError,
    UnsafeModel,
    UnsupportedModel,
    UserError,
)
from tests.support.tiny import NUM_TOKENS, tiny_adapter, tiny_gguf, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with one model of each architecture, an adapter, and a GGUF file."""
    root = tmp_path_factory.mktemp("models")
    for architecture in ("llama", "qwen2", "gpt2"):
        tiny_model(root / architecture, architecture)
    tiny_adapter(root / "llama", root / "adapter")
    tiny_gguf(root / "tiny.gguf")
    return root


@pytest.fixture
def copied(models, tmp_path):
    """Return a function that copies one of the models to a place where it may be damaged."""

    def copy(name):
        source = models / name
        target = tmp_path / name
        if source.is_dir():
            return shutil.copytree(source, target)
        return Path(shutil.copyfile(source, target))

    return copy


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hub, without a network."""
    from huggingface_hub import constants

    place = tmp_path / "hub"
    place.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return place


def put_into_hub_cache(hub, hub_id, source, *, without=()):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns(*without))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Local directories


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_a_directory_tells_its_size_and_kind_without_its_weights_being_read(models, architecture):
    found = find_checkpoint(architecture, root=models)
    weights = load_file(models / architecture / "model.safetensors")
    assert found.num_parameters == sum(tensor.numel() for tensor in weights.values())
    assert found.kind == "directory"
    assert found.stored_dtype == "float32"
    assert found.max_context == 128
    assert found.width == NUM_TOKENS
    assert found.eos_token_ids == (tiny_tokenizer().eos_token_id,)
    assert found.vocabulary.token_to_id == tiny_tokenizer().get_vocab()
    assert found.weights_path() == models / architecture
    assert found.architecture.lower().startswith(architecture)


def test_linear_shapes_have_the_models_order(models):
    names = list(find_checkpoint("llama", root=models).linear_shapes)
    layer = "model.layers.0"
    assert names[:5] == [
        "model.embed_tokens",
        *(f"{layer}.self_attn.{part}_proj" for part in "qkvo"),
    ]
    assert names[-1] == "lm_head"


def test_the_cache_of_one_token_is_keys_and_values_of_every_layer(models):
    # 2 layers, keys and values, 2 key-value heads of 16 / 4 = 4; GPT-2 has all its 2 heads of 16 / 2 = 8.
    assert find_checkpoint("llama", root=models).cache_elements_per_token == 2 * 2 * 2 * 4
    assert find_checkpoint("gpt2", root=models).cache_elements_per_token == 2 * 2 * 2 * 8


def test_the_stored_dtype_is_that_of_most_weights(tmp_path):
    tiny_model(tmp_path / "half", dtype="bfloat16")
    assert find_checkpoint("half", root=tmp_path).stored_dtype == "bfloat16"


def test_a_relative_path_starts_from_the_root_and_a_home_from_the_user(models, monkeypatch):
    monkeypatch.setenv("HOME", str(models))
    assert find_checkpoint("~/llama", root=Path("/")).directory == models / "llama"
    assert find_checkpoint(str(models / "llama"), root=Path("/")).directory == models / "llama"


def test_several_end_of_sequence_tokens_are_gathered_from_all_files(copied):
    directory = copied("llama")
    edit_json(directory / "generation_config.json", eos_token_id=[5, 3])
    edit_json(directory / "config.json", eos_token_id=4)
    eos = tiny_tokenizer().eos_token_id
    assert find_checkpoint("llama", root=directory.parent).eos_token_ids == (3, 4, 5, eos)


def test_a_model_in_several_files_is_read_through_its_index(copied):
    directory = copied("llama")
    weights = load_file(directory / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, group in parts.items():
        save_file({name: weights[name] for name in group}, directory / file, {"format": "pt"})
    weight_map = {name: file for file, group in parts.items() for name in group}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    found = find_checkpoint("llama", root=directory.parent)
    assert found.num_parameters == sum(tensor.numel() for tensor in weights.values())
    (directory / "model-2.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"lacks 1 of the 2 .* model-2\.safetensors"):
        find_checkpoint("llama", root=directory.parent)


def test_a_reference_to_nothing_says_where_it_looked(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no directory at .*/a/b/c"):
        find_checkpoint("a/b/c", root=tmp_path)
    with pytest.raises(ModelNotFound, match="relative paths start from"):
        find_checkpoint("./missing", root=tmp_path)
    with pytest.raises(ModelNotFound, match=r"no file at .*missing\.gguf"):
        find_checkpoint("missing.gguf", root=tmp_path)


def test_a_directory_without_weights_says_what_was_looked_for(copied):
    directory = copied("llama")
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    with pytest.raises(ModelNotFound, match=r"model\.safetensors\.index\.json.*other\.safetensors"):
        find_checkpoint("llama", root=directory.parent)


def test_a_directory_without_config_says_what_it_seems_to_be(models, tmp_path):
    with pytest.raises(ModelNotFound, match="it is an adapter"):
        find_checkpoint("adapter", root=models)
    (tmp_path / "some.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"name the GGUF file itself: .*/some\.gguf"):
        find_checkpoint(str(tmp_path), root=tmp_path)


def test_a_file_that_is_no_gguf_is_refused_by_kind(models):
    with pytest.raises(ModelNotFound, match="is a file"):
        find_checkpoint("llama/config.json", root=models)


def test_a_recipe_is_not_a_model(copied):
    directory = copied("llama")
    edit_json(directory / "config.json", model_type="proxytune")
    with pytest.raises(UnsupportedModel, match="is a recipe"):
        find_checkpoint("llama", root=directory.parent)


def test_a_kind_of_model_that_transformers_does_not_know_is_named(copied):
    directory = copied("llama")
    edit_json(directory / "config.json", model_type="abacus")
    with pytest.raises(UnsupportedModel, match="'abacus'"):
        find_checkpoint("llama", root=directory.parent)


def test_a_model_that_predicts_no_next_token_is_refused(copied):
    directory = copied("llama")
    edit_json(directory / "config.json", model_type="vit")
    with pytest.raises(UnsupportedModel, match="causal language model"):
        find_checkpoint("llama", root=directory.parent)


def test_a_malformed_config_is_corrupt(copied):
    directory = copied("llama")
    (directory / "config.json").write_text("{")
    with pytest.raises(CorruptModel, match="is not JSON"):
        find_checkpoint("llama", root=directory.parent)
    (directory / "config.json").write_text("[]")
    with pytest.raises(CorruptModel, match="no JSON object"):
        find_checkpoint("llama", root=directory.parent)


def test_a_head_of_another_width_than_the_config_says_is_corrupt(copied):
    directory = copied("llama")
    edit_json(directory / "config.json", vocab_size=NUM_TOKENS + 7)
    with pytest.raises(
        CorruptModel, match=rf"(?s)vocab_size {NUM_TOKENS + 7}.*\[{NUM_TOKENS}, 16\]"
    ):
        find_checkpoint("llama", root=directory.parent)


def test_a_model_without_a_tokenizer_is_found_and_its_tokenizer_is_not(copied):
    directory = copied("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    found = find_checkpoint("llama", root=directory.parent)
    with pytest.raises(ModelNotFound, match="has no tokenizer"):
        _ = found.tokenizer


def test_a_malformed_tokenizer_is_corrupt(copied):
    directory = copied("llama")
    (directory / "tokenizer.json").write_text('{"model": 1}')
    found = find_checkpoint("llama", root=directory.parent)
    with pytest.raises(CorruptModel, match="tokenizer of llama"):
        _ = found.tokenizer


# What is unsafe


def test_pickled_weights_are_refused_unless_asked_for(copied):
    directory = copied("llama")
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    with pytest.raises(UnsafeModel, match=r"(?s)pytorch_model\.bin.*allow_pickle"):
        find_checkpoint("llama", root=directory.parent)
    found = find_checkpoint("llama", root=directory.parent, allow_pickle=True)
    assert found.num_parameters == sum(tensor.numel() for tensor in weights.values())


def test_safetensors_are_taken_where_pickled_weights_lie_beside_them(copied):
    directory = copied("llama")
    (directory / "pytorch_model.bin").write_bytes(b"not read")
    assert find_checkpoint("llama", root=directory.parent).tensors


def test_a_model_whose_weights_transformers_would_take_from_elsewhere_is_refused(copied):
    directory = copied("llama")
    edit_json(directory / "config.json", transformers_weights="../other.safetensors")
    with pytest.raises(UnsupportedModel, match="names its weights itself"):
        find_checkpoint("llama", root=directory.parent)
    edit_json(directory / "config.json", transformers_weights=None)
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UnsupportedModel, match="adapter beside the model"):
        find_checkpoint("llama", root=directory.parent)


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_does_not_run(copied):
    directory = copied("llama")
    edit_json(
        directory / "config.json",
        model_type="abacus",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )
    (directory / "code.py").write_text("import pathlib; pathlib.Path(__file__ + '.ran').touch()")
    with pytest.raises(UnsafeModel, match="trust_remote_code"):
        find_checkpoint("llama", root=directory.parent)
    assert not list(directory.glob("*.ran"))


def test_a_model_that_brings_code_that_transformers_has_itself_is_taken(copied):
    directory = copied("llama")
    edit_json(directory / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
    assert find_checkpoint("llama", root=directory.parent).architecture == "LlamaForCausalLM"


# Headers


def test_a_safetensors_header_gives_names_shapes_and_dtypes(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "x")
    header = read_safetensors_header(tmp_path / "x")
    assert (header["a"].shape, header["a"].dtype) == ((2, 3), "float32")
    assert (header["b"].shape, header["b"].dtype, header["b"].num_elements) == ((4,), "bfloat16", 4)


def test_a_safetensors_file_that_is_cut_off_or_too_long_is_corrupt(copied):
    path = copied("llama") / "model.safetensors"
    content = path.read_bytes()
    for damaged, why in (
        (content[:-1], "cut off"),
        (content + b"\0", "longer"),
        (content[:100], "header should take"),
        (content[:4], "it has 4 bytes"),
        (b"", "it has 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (struct.pack("<Q", 5) + b"[1,2]", "does not list tensors"),
        (struct.pack("<Q", 5) + b"\xff{..}", "not JSON"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CorruptModel, match=why):
            find_checkpoint("llama", root=path.parent.parent)


def test_a_tensor_whose_bytes_are_not_its_shape_is_corrupt(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CorruptModel, match=r"8 bytes, which is not \[3\] float32"):
        read_safetensors_header(tmp_path / "x")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_header_is_a_users_error_or_none(models, tmp_path, data):
    """Flipped bytes and cuts in either format never end in a foreign exception."""
    name, read = data.draw(
        st.sampled_from(
            [("llama/model.safetensors", read_safetensors_header), ("tiny.gguf", read_gguf_header)]
        )
    )
    content = bytearray((models / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    path = tmp_path / "damaged"
    path.write_bytes(content[:cut])
    try:
        read(path)
    except UserError as error:
        assert str(path) in str(error)


# GGUF


def test_a_gguf_file_is_checked_without_its_weights_and_converted_once(models, cache, monkeypatch):
    found = find_checkpoint("tiny.gguf", root=models)
    assert found.kind == "gguf"
    assert found.stored_dtype == "float32"
    assert found.max_context == 128
    assert found.width == NUM_TOKENS
    assert found.vocabulary.token_to_id == tiny_tokenizer().get_vocab()
    assert found.eos_token_ids == (tiny_tokenizer().eos_token_id,)
    assert found.tokenizer.chat_template == tiny_tokenizer().chat_template
    text = "then the häus"
    assert found.tokenizer.encode(text) == tiny_tokenizer().encode(text)
    assert not list(cache.rglob("*.safetensors"))

    directory = found.weights_path()
    assert directory.is_relative_to(cache_directory())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())

    def refuse(*_, **__):
        raise AssertionError("converted again")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    again = find_checkpoint("tiny.gguf", root=models)
    assert again.weights_path() == directory
    assert again.directory == found.directory


def test_the_converted_weights_are_those_of_the_file(models, cache):
    import gguf

    directory = find_checkpoint("tiny.gguf", root=models).weights_path()
    converted = load_file(directory / "model.safetensors")
    stored = {t.name: t.data for t in gguf.GGUFReader(models / "tiny.gguf").tensors}
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("lm_head.weight", "output.weight"),
    ):
        assert torch.equal(converted[ours], torch.from_numpy(stored[theirs].copy()))


def test_a_changed_gguf_file_under_the_same_name_is_converted_again(tmp_path, cache):
    path = tiny_gguf(tmp_path / "a.gguf", seed=1)
    first = find_checkpoint("a.gguf", root=tmp_path)
    before = load_file(first.weights_path() / "model.safetensors")
    tiny_gguf(path, seed=2)
    second = find_checkpoint("a.gguf", root=tmp_path)
    after = load_file(second.weights_path() / "model.safetensors")
    assert second.directory == first.directory  # the same config and tokenizer
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_a_copy_of_a_gguf_file_shares_the_conversion(models, tmp_path, cache):
    shutil.copyfile(models / "tiny.gguf", tmp_path / "copy.gguf")
    original = find_checkpoint("tiny.gguf", root=models).weights_path()
    assert find_checkpoint("copy.gguf", root=tmp_path).weights_path() == original


def test_a_damaged_conversion_is_made_again(models, cache):
    found = find_checkpoint("tiny.gguf", root=models)
    weights = found.weights_path() / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    assert (found.weights_path() / "model.safetensors").read_bytes() == content


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(models, cache, monkeypatch):
    from transformers import AutoTokenizer

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            find_checkpoint("tiny.gguf", root=models)
    assert not [path for path in (cache_directory() / "gguf").iterdir() if path.is_dir()]
    (cache_directory() / "gguf").mkdir(exist_ok=True)
    assert find_checkpoint("tiny.gguf", root=models).config.model_type == "llama"


def test_what_a_killed_conversion_left_is_cleared_away(tmp_path):
    target = tmp_path / "copy"
    left_over = tmp_path / "copy.part-dead"
    left_over.mkdir()
    build_once(target, lambda part: (part / "x").touch(), is_whole=lambda: True)
    assert (target / "x").exists()
    assert not left_over.exists()


def test_two_conversions_at_once_do_the_work_once(tmp_path):
    target = tmp_path / "copy"
    runs = []
    started = threading.Barrier(4)

    def build(part):
        runs.append(part)
        (part / "x").write_text("whole")

    def convert():
        started.wait()
        build_once(target, build, is_whole=lambda: (target / "x").exists())

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1
    assert (target / "x").read_text() == "whole"


def test_a_gguf_file_that_is_cut_off_is_corrupt_wherever_it_ends(copied):
    path = copied("tiny.gguf")
    content = path.read_bytes()
    for length in (0, 10, 30, 500, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptModel, match=r"tiny\.gguf cannot be read as GGUF"):
            find_checkpoint("tiny.gguf", root=path.parent)


def test_a_file_of_another_format_is_not_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CorruptModel, match="begins with"):
        find_checkpoint("x.gguf", root=tmp_path)


def test_a_gguf_architecture_that_cannot_be_converted_is_named(copied, cache):
    path = copied("tiny.gguf")
    path.write_bytes(
        path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0abaca", 1)
    )
    with pytest.raises(UnsupportedModel, match="'abaca'"):
        find_checkpoint("tiny.gguf", root=path.parent)


def test_a_cache_that_cannot_be_written_is_named(models, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputFileError, match="XDG_CACHE_HOME"):
        find_checkpoint("tiny.gguf", root=models)


# Packages and other references


def test_a_file_in_a_package_is_found_without_importing_the_package(tmp_path, monkeypatch, models):
    package = tmp_path / "explosive_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copytree(models / "llama", package / "models" / "llama")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_package("package:explosive_package/models") == package / "models"
    found = find_checkpoint("package:explosive_package/models/llama", root=Path("/"))
    assert found.name == "package:explosive_package/models/llama"
    with pytest.raises(ModelNotFound, match="has no weights"):
        resolve_package("package:explosive_package/weights")


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ModelNotFound, match="no_such_package_here, which is not installed"):
        resolve_package("package:no_such_package_here/x.gguf")
    with pytest.raises(ModelNotFound, match="does not name a package"):
        resolve_package("package:../x")


def test_a_model_behind_http_is_refused_as_not_supported(tmp_path):
    with pytest.raises(RecipeError, match="behind HTTP"):
        find_checkpoint("https://api.example.com/v1", root=tmp_path)


def test_a_revision_of_a_local_model_is_refused(models):
    with pytest.raises(RecipeError, match="revision 'v1'"):
        find_checkpoint("llama", root=models, revision="v1")


# The Hub


def test_a_model_in_the_cache_of_the_hub_needs_no_network(hub, models, tmp_path):
    snapshot = put_into_hub_cache(hub, "owner/small", models / "llama")
    found = find_checkpoint("owner/small", root=tmp_path)
    assert found.directory == snapshot
    assert found.weights_path() == snapshot
    assert found.vocabulary.token_to_id == tiny_tokenizer().get_vocab()
    assert find_checkpoint("owner/small", root=tmp_path, revision="main").directory == snapshot


def test_a_local_directory_goes_before_a_hub_id_of_the_same_name(hub, models, tmp_path):
    put_into_hub_cache(hub, "owner/small", models / "llama")
    shutil.copytree(models / "gpt2", tmp_path / "owner" / "small")
    assert find_checkpoint("owner/small", root=tmp_path).config.model_type == "gpt2"


def test_a_hub_model_that_is_not_cached_says_so_when_offline(hub, tmp_path):
    with pytest.raises(
        ModelNotFound, match=r"(?s)owner/small is not a local directory.*hf download"
    ):
        find_checkpoint("owner/small", root=tmp_path)
    with pytest.raises(ModelNotFound, match="at revision v2"):
        find_checkpoint("owner/small", root=tmp_path, revision="v2")


def test_a_hub_model_whose_weights_are_not_cached_says_so_when_offline(hub, models, tmp_path):
    put_into_hub_cache(hub, "owner/small", models / "llama", without=["*.safetensors"])
    with pytest.raises(ModelNotFound, match="its weights are not"):
        find_checkpoint("owner/small", root=tmp_path)


def test_weights_on_the_hub_are_fetched_only_once_needed(hub, models, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    put_into_hub_cache(hub, "owner/small", models / "llama", without=["*.safetensors"])
    local = read_safetensors_header(models / "llama" / "model.safetensors")
    tensors = {
        name: TensorInfo(
            dtype="F32", shape=list(tensor.shape), data_offsets=(0, 4 * tensor.num_elements)
        )
        for name, tensor in local.items()
    }
    file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    metadata = SafetensorsRepoMetadata(
        metadata=None,
        sharded=False,
        weight_map=dict.fromkeys(tensors, "model.safetensors"),
        files_metadata={"model.safetensors": file},
    )
    asked = []

    def download(hub_id, *, revision, allow_patterns):
        asked.append((hub_id, allow_patterns))
        return str(models / "llama")

    monkeypatch.setattr(
        huggingface_hub.HfApi, "get_safetensors_metadata", lambda *_, **__: metadata
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = find_checkpoint("owner/small", root=tmp_path)
    assert found.num_parameters == find_checkpoint("llama", root=models).num_parameters
    assert asked == []
    assert found.weights_path() == models / "llama"
    ((hub_id, patterns),) = asked
    assert hub_id == "owner/small"
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in patterns)


def test_a_hub_model_with_only_pickled_weights_is_refused(hub, models, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    def no_safetensors(*_, **__):
        raise NotASafetensorsRepoError("none")

    put_into_hub_cache(hub, "owner/small", models / "llama", without=["*.safetensors"])
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", no_safetensors)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["pytorch_model.bin"]
    )
    with pytest.raises(UnsafeModel, match="only pickled weights"):
        find_checkpoint("owner/small", root=tmp_path)


def test_an_adapter_in_the_cache_of_the_hub_needs_no_network(hub, models, tmp_path):
    snapshot = put_into_hub_cache(hub, "owner/adapter", models / "adapter")
    assert find_adapter("owner/adapter", root=tmp_path).path == snapshot


# Adapters


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_an_adapter_fits_the_model_it_was_trained_on(models, tmp_path, architecture):
    tiny_adapter(models / architecture, tmp_path / "adapter")
    adapter = find_adapter("adapter", root=tmp_path)
    adapter.check_fits(find_checkpoint(architecture, root=models))
    assert adapter.num_parameters == sum(
        tensor.numel()
        for tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").values()
    )


def test_an_adapter_of_another_architecture_does_not_fit(models):
    with pytest.raises(AdapterMismatch, match=r"q_proj is not there.*and \d+ more"):
        find_adapter("adapter", root=models).check_fits(find_checkpoint("gpt2", root=models))


def test_an_adapter_of_a_wider_model_does_not_fit(models, tmp_path):
    tiny_model(tmp_path / "wide", hidden_size=32)
    with pytest.raises(AdapterMismatch, match="has 32 inputs instead of 16"):
        find_adapter("adapter", root=models).check_fits(find_checkpoint("wide", root=tmp_path))


def test_an_adapter_of_a_deeper_model_does_not_fit(models, tmp_path):
    tiny_model(tmp_path / "shallow", num_layers=1)
    with pytest.raises(AdapterMismatch, match=r"layers\.1\..* is not there"):
        find_adapter("adapter", root=models).check_fits(find_checkpoint("shallow", root=tmp_path))


def test_an_adapter_fits_a_gguf_model_of_its_shape(tmp_path, models, cache):
    small = find_checkpoint("tiny.gguf", root=models)
    tiny_adapter(small.weights_path(), tmp_path / "adapter")
    find_adapter("adapter", root=tmp_path).check_fits(small)


def test_an_adapter_that_is_none_says_what_it_is(models, tmp_path):
    with pytest.raises(ModelNotFound, match="it is a whole model"):
        find_adapter("llama", root=models)
    with pytest.raises(ModelNotFound, match="no directory at"):
        find_adapter("./missing", root=tmp_path)


def test_an_adapter_without_weights_or_with_damaged_ones_is_refused(copied):
    directory = copied("adapter")
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(CorruptModel, match="cut off"):
        find_adapter("adapter", root=directory.parent)
    weights.unlink()
    with pytest.raises(ModelNotFound, match=r"no adapter_model\.safetensors"):
        find_adapter("adapter", root=directory.parent)
    (directory / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsafeModel, match="allow_pickle"):
        find_adapter("adapter", root=directory.parent)


def test_an_adapter_that_is_not_lora_is_refused(copied):
    directory = copied("adapter")
    edit_json(directory / "adapter_config.json", peft_type="PROMPT_TUNING")
    with pytest.raises(UnsupportedModel, match="PROMPT_TUNING"):
        find_adapter("adapter", root=directory.parent)


# Dtype and device


def test_a_model_runs_in_float32_on_the_cpu_and_as_stored_on_an_accelerator():
    assert running_dtype(None, stored_dtype="bfloat16", device="cpu") == "float32"
    assert running_dtype(None, stored_dtype="float16", device="cuda") == "float16"
    assert running_dtype(None, stored_dtype="Q4_1", device="cuda") == "bfloat16"
    assert running_dtype(None, stored_dtype="float64", device="cuda:1") == "float32"


def test_a_dtype_that_is_asked_for_is_taken():
    assert running_dtype("bfloat16", stored_dtype="float32", device="cpu") == "bfloat16"
    assert running_dtype("auto", stored_dtype="float16", device="cpu") == "float16"


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert running_device(None) == "cpu"
    assert running_device("auto") == "auto"
    with pytest.raises(UnsupportedModel, match="0 CUDA devices"):
        running_device("cuda")
    with pytest.raises(UnsupportedModel, match="torch knows"):
        running_device("gpu")


def test_cuda_is_taken_where_there_is_some(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert running_device(None) == "cuda"
    assert running_device("cuda:1") == "cuda:1"
    with pytest.raises(UnsupportedModel, match="2 CUDA devices"):
        running_device("cuda:2")


def test_layers_that_run_several_times_are_stored_once(tmp_path):
    """HRM-Text counts each time in `num_hidden_layers`, and used to be called corrupt."""
    if "hrm_text" not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers does not know HRM-Text")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    config = transformers.AutoConfig.for_model(
        "hrm_text", vocab_size=NUM_TOKENS, num_hidden_layers=2, num_key_value_heads=4, **sizes
    )
    assert config.num_hidden_layers > 2
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert find_checkpoint("model", root=tmp_path).width == NUM_TOKENS
