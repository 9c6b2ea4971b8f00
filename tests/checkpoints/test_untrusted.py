"""Files from strangers: which are opened, how much of them is read, and where names and links may lead."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.headers import (
    find_weight_files,
    read_gguf_header,
    read_safetensors_header,
)
from proxytune.checkpoints.references import resolve_package
from proxytune.checkpoints.untrusted import (
    check_links,
    named_inside,
    parse_json,
    read_json_file,
    read_regular,
)
from proxytune.errors import CorruptModel, ModelNotFound, RecipeError
from proxytune.recipe.recipe import Recipe
from tests.support.tiny import tiny_adapter, tiny_model

RECIPE = {
    "model_type": "proxytune",
    "base": {"model": "small"},
    "experts": [
        {"name": "e", "anti_expert": {"model": "small"}, "expert": {"adapter": "adapters/e"}}
    ],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_model(root / "small")
    tiny_adapter(root / "small", root / "adapter")
    return root


@pytest.fixture
def recipe(models, tmp_path):
    """A recipe's directory with its model and adapter inside."""
    directory = tmp_path / "recipe"
    shutil.copytree(models / "small", directory / "small")
    shutil.copytree(models / "adapter", directory / "adapters" / "e")
    (directory / "config.json").write_text(json.dumps(RECIPE))
    return directory


def put_device(path):
    path.symlink_to("/dev/zero")


def put_pipe(path):
    os.mkfifo(path)


def put_socket(path):
    # A socket's address has 108 bytes at most.
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


SPECIAL = pytest.mark.parametrize(
    "put",
    [put_device, put_pipe, put_socket, Path.mkdir],
    ids=["device", "pipe", "socket", "directory"],
)


# Regular files


@SPECIAL
@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_regular(path, at_most=10),
        read_json_file,
        read_safetensors_header,
        read_gguf_header,
    ],
    ids=["bytes", "JSON", "safetensors", "GGUF"],
)
def test_only_regular_files_are_read(tmp_path, put, read):
    put(tmp_path / "file")
    start = time.monotonic()
    with pytest.raises(CorruptModel, match=r"file is not a regular file.*\nhint: "):
        read(tmp_path / "file")
    assert time.monotonic() - start < 1


@SPECIAL
def test_a_recipe_that_is_no_regular_file_is_refused(recipe, put):
    """A config.json that was a link to /dev/zero took all memory; a pipe was waited for without end."""
    (recipe / "config.json").unlink()
    put(recipe / "config.json")
    with pytest.raises(RecipeError, match="no recipe at"):
        Recipe.read(recipe)


@SPECIAL
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_an_adapter_with_anything_but_regular_files_is_refused(recipe, put, name):
    directory = recipe / "adapters" / "e"
    (directory / name).unlink(missing_ok=True)
    put(directory / name)
    if name == "README.md" and put is Path.mkdir:
        assert find_adapter("adapters/e", root=recipe)  # a directory that nothing looks into
        return
    if put is Path.mkdir:
        with pytest.raises(ModelNotFound, match=f"no {name}"):
            find_adapter("adapters/e", root=recipe)
        return
    with pytest.raises(
        CorruptModel, match=rf"{name} is (not a regular file|a link that leads out)"
    ):
        find_adapter("adapters/e", root=recipe)


@pytest.mark.parametrize(
    "put", [put_device, put_pipe, put_socket], ids=["device", "pipe", "socket"]
)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_a_model_with_anything_but_regular_files_is_refused(recipe, put, name):
    (recipe / "small" / name).unlink(missing_ok=True)
    put(recipe / "small" / name)
    with pytest.raises(
        CorruptModel, match=rf"{name} is (not a regular file|a link that leads out)"
    ):
        find_checkpoint("small", root=recipe)


def test_a_file_beyond_the_size_of_its_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b" " * (4 << 20) + b"{}")
    with pytest.raises(CorruptModel, match="more than 4,194,304 bytes"):
        read_json_file(tmp_path / "config.json")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    with pytest.raises(CorruptModel, match="more than 1,000 bytes"):
        read_regular(tmp_path / "sparse", at_most=1000)


# JSON


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" + ",".join(["9" * 4200] * 20_000) + "]", "4200 digits"),
        ("-" + "9" * 400, "number that cannot be read"),
        ("1" + "0" * 400 + ".5", "number that cannot be read"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ("[" * 65 + "]" * 65, "nested too deeply"),
        ('{"a":' * 80 + "1" + "}" * 80, "nested too deeply"),
        ("[" + "[]," * 2_000_000 + "[]]", "4,000,002 values, and may hold 3,000,000"),
        (b"\xff", "not UTF-8"),
        ('"\\ud800', "not JSON"),
    ],
    ids=["huge numbers", "int", "float", "open", "lists", "objects", "values", "bytes", "cut off"],
)
def test_json_that_takes_too_much_is_refused_at_once(text, why):
    start = time.process_time()
    with pytest.raises(ValueError, match=why):
        parse_json(text, is_strict=False)
    assert time.process_time() - start < 1


def test_json_within_the_limits_is_what_python_makes_of_it():
    content = {"a": [1, -2.5, 10**299, float("inf")], "b": {"c": None, "é": "x" * 1000}}
    assert parse_json(json.dumps(content), is_strict=False) == content
    assert parse_json(b"\xef\xbb\xbf[1]", is_strict=True) == [1]
    assert parse_json("[" * 64 + "]" * 64, is_strict=True)
    # All numbers that are let through can be compared with floats.
    assert float(parse_json("9" * 300, is_strict=True)) > 1e299


def test_a_key_that_is_given_twice_is_found_quickly_among_many():
    text = "{" + ",".join(f'"{number}": 0' for number in range(100_000)) + ', "99999": 1}'
    start = time.process_time()
    with pytest.raises(ValueError, match='"99999" is given twice'):
        parse_json(text, is_strict=True)
    assert time.process_time() - start < 2
    assert parse_json(text, is_strict=False)["99999"] == 1


# Names


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "//host/share", "\\\\host\\share",
        "..\\x", "C:\\x", "C:x", "a\0b", "a\nb", "a" * 2000,
    ],
)  # fmt: skip
def test_a_name_in_a_file_leads_nowhere_else(tmp_path, name):
    with pytest.raises(CorruptModel, match=r"index names .*not a file inside.*(?s:.*)hint: "):
        named_inside(tmp_path, name, source="index")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "shards/1.safetensors"])
def test_a_plain_name_is_below_its_directory(tmp_path, name):
    assert named_inside(tmp_path, name, source="index") == tmp_path / name


def test_an_index_that_names_a_file_outside_is_refused(recipe):
    (recipe / "small" / "model.safetensors").rename(recipe / "weights.safetensors")
    index = recipe / "small" / "model.safetensors.index.json"
    for name in ("../weights.safetensors", str(recipe / "weights.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CorruptModel, match="not a file inside"):
            find_checkpoint("small", root=recipe)
    (recipe / "small" / "shards").symlink_to(recipe.parent)
    index.write_text(json.dumps({"weight_map": {"a": "shards/recipe/weights.safetensors"}}))
    with pytest.raises(CorruptModel, match="leads out of"):
        find_checkpoint("small", root=recipe)


def test_an_index_that_names_too_many_files_is_refused_before_they_are_looked_for(tmp_path):
    names = {str(number): f"{number}.safetensors" for number in range(20_000)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CorruptModel, match="names 20,000 files"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("inside", ["../x", "a/../../x", "/etc/passwd", "a\0b"])
def test_a_path_in_a_package_stays_in_it(inside):
    """`package:NAME//etc/passwd` was /etc/passwd."""
    with pytest.raises(ModelNotFound, match="leads out of the package proxytune"):
        resolve_package(f"package:proxytune/{inside}")


def test_a_path_in_a_package_that_no_file_can_have_is_not_there():
    with pytest.raises(ModelNotFound, match="has no "):
        resolve_package("package:proxytune/" + "a" * 5000)


@pytest.mark.parametrize("revision", ["../../../../dev/zero", "/dev/zero", "a\0b", "a" * 300, " "])
def test_a_revision_is_no_path(tmp_path, revision):
    """The Hub's library opens the file of that name in its cache."""
    for find in (find_checkpoint, find_adapter):
        with pytest.raises(RecipeError, match="no branch, tag or commit"):
            find("owner/name", root=tmp_path, revision=revision)


# Links


def outside(recipe, name):
    """Return a file that is not the recipe's, with a copy of one of its files."""
    secret = recipe.parent / "elsewhere"
    secret.mkdir(exist_ok=True)
    return Path(shutil.copyfile(recipe / name, secret / Path(name).name))


@pytest.mark.parametrize(
    "name",
    [
        "small/config.json",
        "small/model.safetensors",
        "small/tokenizer.json",
        "adapters/e/adapter_config.json",
        "adapters/e/adapter_model.safetensors",
    ],
)
def test_a_link_that_leaves_a_model_or_adapter_is_refused(recipe, name):
    target = outside(recipe, name)
    (recipe / name).unlink()
    (recipe / name).symlink_to(target)
    find = find_adapter if name.startswith("adapters") else find_checkpoint
    with pytest.raises(CorruptModel, match=rf"link that leads out of .*{target.name}(?s:.*)hint: "):
        find(str(Path(name).parent), root=recipe)


def test_a_link_that_leaves_a_recipe_is_refused(recipe):
    target = outside(recipe, "config.json")
    (recipe / "config.json").unlink()
    (recipe / "config.json").symlink_to(target)
    with pytest.raises(RecipeError, match="leads out of"):
        Recipe.read(recipe)


def test_a_directory_of_templates_is_not_a_way_out(recipe):
    secret = recipe.parent / "secret"
    secret.mkdir()
    (secret / "key.jinja").write_text("secret")
    templates = recipe / "small" / "additional_chat_templates"
    templates.symlink_to(secret)
    with pytest.raises(CorruptModel, match="leads out of"):
        find_checkpoint("small", root=recipe)
    templates.unlink()
    templates.mkdir()
    (templates / "key.jinja").symlink_to(secret / "key.jinja")
    with pytest.raises(CorruptModel, match="leads out of"):
        find_checkpoint("small", root=recipe)


def test_links_between_the_files_of_a_recipe_work(recipe):
    shared = recipe / "shared.safetensors"
    (recipe / "adapters" / "e" / "adapter_model.safetensors").rename(shared)
    (recipe / "adapters" / "e" / "adapter_model.safetensors").symlink_to("../../shared.safetensors")
    assert find_adapter("adapters/e", root=recipe).tensors


def test_a_recipe_and_a_model_that_are_reached_through_links_work(recipe, tmp_path):
    (tmp_path / "link").symlink_to(recipe)
    read = Recipe.read(tmp_path / "link")
    assert find_adapter("adapters/e", root=read.directory).tensors
    assert find_checkpoint("small", root=read.directory).tensors
    (tmp_path / "model").symlink_to(recipe / "small")
    assert find_checkpoint("model", root=tmp_path).tensors


def test_the_links_inside_the_cache_of_the_hub_work_and_no_others(recipe, tmp_path):
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in (recipe / "adapters" / "e").iterdir():
        file.rename(repository / "blobs" / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    assert find_adapter(str(snapshot), root=tmp_path).tensors
    (snapshot / "README.md").unlink(missing_ok=True)
    (snapshot / "README.md").symlink_to(recipe / "config.json")
    with pytest.raises(CorruptModel, match="leads out of"):
        check_links(snapshot)


def test_blobs_that_are_a_link_themselves_are_no_way_out(recipe, tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (repository / "blobs").symlink_to(recipe)
    (snapshot / "config.json").symlink_to("../../blobs/config.json")
    with pytest.raises(CorruptModel, match="leads out of"):
        check_links(snapshot)


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a.json").symlink_to("b.json")
    (tmp_path / "b.json").symlink_to("a.json")
    with pytest.raises(CorruptModel, match="cannot be read"):
        read_json_file(tmp_path / "a.json")
    check_links(tmp_path)


# Copies of a recipe


def test_writing_a_recipe_elsewhere_takes_no_file_of_others_along(recipe, tmp_path):
    """A recipe with a link in its adapter, saved or pushed again, would have published the file behind it."""
    target = outside(recipe, "adapters/e/adapter_model.safetensors")
    (recipe / "adapters" / "e" / "notes.txt").symlink_to(target)
    with pytest.raises(CorruptModel, match=r"notes\.txt is a link that leads out of"):
        Recipe.read(recipe).write(tmp_path / "copy")
    assert not (tmp_path / "copy" / "adapters" / "e").exists()


def test_writing_a_recipe_elsewhere_does_not_follow_an_adapter_that_is_a_link(recipe, tmp_path):
    (recipe / "adapters" / "e").rename(tmp_path / "private")
    (recipe / "adapters" / "e").symlink_to(tmp_path / "private")
    with pytest.raises(CorruptModel, match="leads out of"):
        Recipe.read(recipe).write(tmp_path / "copy")


@pytest.mark.parametrize(
    "put",
    [put_device, put_pipe, lambda path: path.symlink_to("..")],
    ids=["device", "pipe", "circle"],
)
def test_writing_a_recipe_elsewhere_copies_only_regular_files(recipe, tmp_path, put):
    put(recipe / "adapters" / "e" / "odd")
    start = time.monotonic()
    with pytest.raises(CorruptModel, match="odd"):
        Recipe.read(recipe).write(tmp_path / "copy")
    assert time.monotonic() - start < 1


def test_writing_over_a_recipe_with_a_pipe_for_a_model_card_does_not_wait(recipe):
    os.mkfifo(recipe / "README.md")
    os.mkfifo(recipe / "modeling_proxytune.py")
    Recipe.read(recipe).write(recipe)
    assert (recipe / "README.md").is_fifo()
