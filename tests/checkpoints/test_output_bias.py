"""Files of output biases: read as written, and refused by name otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from proxytune.checkpoints.output_bias import (
    MAX_TOKENS,
    OutputBias,
    find_output_bias,
    read_output_bias,
    write_output_bias,
)
from proxytune.errors import CorruptModel, InvalidRequest, ModelNotFound, VocabularyMismatch
from proxytune.text.vocab import Vocabulary

IDS, VALUES = torch.tensor([7, 2, 5]), torch.tensor([0.5, -1.25, 3.0])
NAME = "bias.safetensors"


def test_a_bias_is_read_as_it_was_written(tmp_path):
    write_output_bias(tmp_path / NAME, OutputBias(IDS, VALUES))
    found = read_output_bias(NAME, root=tmp_path)
    assert len(found) == 3 and found.name == NAME
    assert found.dense(9, torch.device("cpu")).tolist() == [0, 0, -1.25, 0, 0, 3.0, 0, 0.5, 0]
    assert [found.value_of(token_id) for token_id in (2, 3, 7)] == [-1.25, 0.0, 0.5]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"token_ids": IDS}, r"has the tensors token_ids \(int64\), and an output bias has"),
        ({"token_ids": IDS, "values": VALUES, "more": VALUES.clone()}, "has the tensors more"),
        ({"token_ids": IDS.int(), "values": VALUES}, r"token_ids \(int32\)"),
        ({"token_ids": IDS, "values": VALUES.half()}, r"values \(float16\)"),
        ({"token_ids": IDS, "values": VALUES[:2]}, r"the shape \[3\] and values \[2\]"),
        ({"token_ids": IDS[None], "values": VALUES[None]}, r"both must be \[n\]"),
        ({"token_ids": IDS[:0], "values": VALUES[:0]}, "values for 0 tokens"),
        ({"token_ids": torch.tensor([1, -4, 2]), "values": VALUES}, "begin at -4"),
        ({"token_ids": torch.tensor([4, 1, 4]), "values": VALUES}, "two values for token id 4"),
        ({"token_ids": IDS, "values": VALUES * torch.nan}, "token id 7 is nan"),
        ({"token_ids": IDS, "values": VALUES / 0}, "token id 7 is inf"),
        ({"token_ids": IDS, "values": VALUES * 1e5}, "token id 7 is 50000.0"),
    ],
)
def test_what_is_wrong_with_a_bias_is_said_with_its_file(tmp_path, tensors, message):
    save_file(tensors, tmp_path / NAME)
    with pytest.raises(CorruptModel, match=message) as caught:
        read_output_bias(NAME, root=tmp_path)
    assert str(tmp_path / NAME) in str(caught.value) and "hint:" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\xff" * 99, b"{}" * 9])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(CorruptModel, match=NAME):
        read_output_bias(NAME, root=tmp_path)


def test_a_cut_off_file_is_refused(tmp_path):
    content = save({"token_ids": IDS, "values": VALUES})
    (tmp_path / NAME).write_bytes(content[:-1])
    with pytest.raises(CorruptModel, match="cut off"):
        read_output_bias(NAME, root=tmp_path)


def test_a_file_for_more_tokens_than_any_vocabulary_has_is_refused(tmp_path):
    number = MAX_TOKENS + 1
    save_file({"token_ids": torch.arange(number), "values": torch.zeros(number)}, tmp_path / NAME)
    with pytest.raises(CorruptModel, match="1,048,577 tokens"):
        read_output_bias(NAME, root=tmp_path)


def test_a_bias_made_in_python_is_checked_too():
    with pytest.raises(InvalidRequest, match="two values"):
        OutputBias(torch.tensor([1, 1]), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    "reference", [NAME, "owner/bias.safetensors", "https://x.org/b.safetensors"]
)
def test_a_missing_file_is_named_and_never_looked_for_elsewhere(tmp_path, reference):
    with pytest.raises(ModelNotFound, match="a local file"):
        read_output_bias(reference, root=tmp_path)


def test_a_link_that_leads_out_of_the_recipe_is_not_followed(tmp_path):
    outside, recipe = tmp_path / NAME, tmp_path / "recipe"
    write_output_bias(outside, OutputBias(IDS, VALUES))
    recipe.mkdir()
    (recipe / NAME).symlink_to(outside)
    with pytest.raises(CorruptModel, match="a link that leads out"):
        read_output_bias(NAME, root=recipe)
    assert (
        find_output_bias(str(outside), root=recipe) == outside
    )  # named, it is the caller's choice


def test_a_bias_of_a_recipe_in_the_hubs_cache_is_a_link_to_a_blob(tmp_path):
    repository = tmp_path / "models--owner--recipe"
    snapshot = repository / "snapshots" / "0a1b"
    (snapshot / "biases").mkdir(parents=True)
    write_output_bias(repository / "blobs" / "c2d3", OutputBias(IDS, VALUES))
    (snapshot / "biases" / NAME).symlink_to("../../../blobs/c2d3")
    assert len(read_output_bias(f"biases/{NAME}", root=snapshot)) == 3


def test_a_device_is_not_read(tmp_path):
    (tmp_path / NAME).symlink_to(Path("/dev/zero"))
    with pytest.raises(CorruptModel):
        read_output_bias(NAME, root=tmp_path)


def test_ids_that_no_token_of_the_base_has_are_refused():
    tokens = {letter: index for index, letter in enumerate("abcdef")}
    OutputBias(torch.tensor([5, 2]), torch.ones(2)).check_tokens(Vocabulary("large", tokens, 8))
    for wrong in (IDS, torch.tensor([2, 6, 1])):  # 7 and 6 only pad the head
        with pytest.raises(VocabularyMismatch, match=r"large has no token for: [67]\."):
            OutputBias(wrong, VALUES).check_tokens(Vocabulary("large", tokens, 8))
    with pytest.raises(VocabularyMismatch, match="no token for: 7, 5"):
        OutputBias(IDS, VALUES).check_tokens(Vocabulary("large", {"a": 0, "b": 1, "c": 2}, 3))
