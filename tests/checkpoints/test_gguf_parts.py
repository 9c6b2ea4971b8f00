"""GGUF models in several files, and types of tensors that transformers does not read by itself."""

from __future__ import annotations

import struct

import pytest
import torch
from safetensors.torch import load_file

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.errors import CorruptModel, UnsupportedModel
from proxytune.loading.doctor import examine
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from tests.support.tiny import tiny_gguf

PARTS = [f"tiny-{number:05}-of-00004.gguf" for number in (1, 2, 3, 4)]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def split(tmp_path):
    """A tiny model in four files, beside the same one in one file."""
    tiny_gguf(tmp_path / "whole.gguf")
    assert tiny_gguf(tmp_path / "tiny.gguf", tensors_per_part=6).name == PARTS[0]
    return tmp_path


def weights(reference: str, root) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(reference, root=root).weights_path() / "model.safetensors")


@pytest.mark.parametrize("given", PARTS)
def test_any_part_names_the_whole_model(split, given):
    found, whole = (find_checkpoint(name, root=split) for name in (given, "whole.gguf"))
    assert found.gguf_path == split / PARTS[0]
    assert list(found.gguf.parts) == [split / name for name in PARTS]
    assert found.tensors == whole.tensors
    assert found.num_parameters == whole.num_parameters
    assert found.vocabulary.token_to_id == whole.vocabulary.token_to_id
    # The output head is in the last part; without it, the embedding would take its place.
    assert not found.config.tie_word_embeddings


def test_the_weights_of_all_parts_are_those_of_the_whole_file(split):
    joined, whole = weights(PARTS[2], split), weights("whole.gguf", split)
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    directory = find_checkpoint(PARTS[0], root=split).weights_path()
    assert not list(directory.glob("*.gguf"))


def test_doctor_counts_all_parts(split):
    spec = ModelSpec(model=PARTS[1], device="cpu")
    recipe = Recipe(base=spec, experts=(ExpertSpec("one", spec, spec),), directory=split)
    report = examine(recipe)
    assert report.is_healthy
    whole = find_checkpoint("whole.gguf", root=split)
    assert report.models[0].weight_bytes == 4 * whole.num_parameters


@pytest.mark.parametrize("missing", PARTS[:1] + PARTS[2:])
def test_a_missing_part_is_named(split, missing):
    (split / missing).unlink()
    with pytest.raises(CorruptModel, match=rf"one of 4 parts.*{missing} is not beside it"):
        find_checkpoint(PARTS[1], root=split)


def test_a_cut_off_part_is_named(split):
    path = split / PARTS[3]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptModel, match=rf"{PARTS[3]} cannot be read as GGUF: it is cut off"):
        find_checkpoint(PARTS[0], root=split)


def test_a_part_of_another_place_is_refused(split):
    (split / PARTS[2]).write_bytes((split / PARTS[1]).read_bytes())
    with pytest.raises(CorruptModel, match=r"called part 3 of 4, and its header says split\.no 1"):
        find_checkpoint(PARTS[0], root=split)


def test_a_part_of_another_model_is_refused(split):
    import gguf

    writer = gguf.GGUFWriter(split / PARTS[3], "llama")
    writer.add_uint16("split.no", 3)
    writer.add_uint16("split.count", 4)
    writer.add_tensor("token_embd.weight", torch.zeros(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CorruptModel, match=r"has the tensor token_embd\.weight, and so has a part"):
        find_checkpoint(PARTS[0], root=split)


def test_lost_tensors_are_counted(split):
    path = split / PARTS[0]
    content = path.read_bytes()
    key = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    path.write_bytes(content[:key] + struct.pack("<i", 99) + content[key + 4 :])
    with pytest.raises(CorruptModel, match=r"hold 21 tensors, and the first says 99"):
        find_checkpoint(PARTS[0], root=split)


def test_a_part_under_another_name_is_refused_with_the_names_it_needs(split):
    path = (split / PARTS[0]).rename(split / "model.gguf")
    with pytest.raises(UnsupportedModel, match=r"one of 4 parts.*\n.*-00001-of-00004\.gguf"):
        find_checkpoint(path.name, root=split)


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "MXFP4", "TQ1_0", "Q4_0", "Q8_0", "BF16"])
def test_every_type_is_unpacked_to_the_values_that_the_gguf_package_gives(tmp_path, kind):
    """Q5_0 and others used to be refused: transformers does not read them."""
    import gguf

    path = tiny_gguf(tmp_path / "a.gguf", dtype=kind, hidden_size=256)
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    found = find_checkpoint("a.gguf", root=tmp_path)
    found.check_buildable()
    assert found.stored_dtype == {"BF16": "bfloat16"}.get(kind, kind)
    converted = weights("a.gguf", tmp_path)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(converted, expected.float())


def test_a_type_that_nothing_unpacks_is_refused_by_name_and_left_to_llama_cpp(tmp_path):
    import gguf

    path = tiny_gguf(tmp_path / "a.gguf", dtype="Q8_0")
    content = path.read_bytes()
    name = b"blk.1.ffn_down.weight"
    place = content.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", content, place) == (gguf.GGMLQuantizationType.Q8_0,)
    # Blocks of the same size for as many elements.
    one_byte = struct.pack("<I", gguf.GGMLQuantizationType.I8)
    path.write_bytes(content[:place] + one_byte + content[place + 4 :])
    found = find_checkpoint("a.gguf", root=tmp_path)
    with pytest.raises(UnsupportedModel, match=r"blk\.1\.ffn_down\.weight has type I8") as caught:
        found.check_buildable()
    assert '"llama_cpp": {}' in str(caught.value)
