"""Files and directories: there whole, or not at all."""

from __future__ import annotations

import os

import pytest

from proxytune.errors import OutputFileError
from proxytune.files import building, remove_unfinished, replacing, write_json, write_whole


def test_a_file_is_replaced_whole_with_the_mode_of_any_new_file(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_whole(path, "old\r\n")
    umask = os.umask(0o027)
    try:
        write_whole(path, "new, with ÿ\r\n")
    finally:
        os.umask(umask)
    assert path.read_bytes() == "new, with ÿ\r\n".encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_json_is_readable_text(tmp_path):
    write_json(tmp_path / "a.json", {"name": "ÿ"})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n "name": "ÿ"\n}\n'


@pytest.mark.parametrize("way", [replacing, building])
def test_a_block_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, way):
    write_whole(tmp_path / "kept", "old")
    with pytest.raises(KeyError), way(tmp_path / "kept") as part:
        assert part.parent == tmp_path
        raise KeyError("reason")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


@pytest.mark.parametrize("way", [replacing, building])
def test_a_place_that_cannot_be_written_is_named_with_a_hint(tmp_path, way):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputFileError, match=r"file/one cannot be written: .*\nhint: look there"),
        way(tmp_path / "file" / "one", hint="look there"),
    ):
        pass


def test_a_directory_takes_its_name_once_it_is_filled(tmp_path):
    with building(tmp_path / "new") as part:
        (part / "x").touch()
        assert not (tmp_path / "new").exists()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x"]
    (tmp_path / "new.part-dead").mkdir()
    remove_unfinished(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
