"""Files and directories: there whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file

from proxytune.errors import OutputFileError
from proxytune.files import (
    append,
    building,
    is_disk_error,
    remove_unfinished,
    replacing,
    save_figure,
    write_json,
    write_whole,
    writing,
)


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


def test_lines_are_appended_as_they_come(tmp_path):
    for line in ("one\r\n", "zwölf\n"):
        append(tmp_path / "lines", line)
    assert (tmp_path / "lines").read_bytes() == "one\r\nzwölf\n".encode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named_with_a_hint():
    with pytest.raises(
        OutputFileError, match=r"/dev/full cannot be written: No space.*\nhint: go on"
    ):
        append(Path("/dev/full"), "line\n", hint="go on")


def test_what_a_block_raises_otherwise_is_not_the_disks(tmp_path):
    with pytest.raises(ValueError, match="reason"), writing(tmp_path):
        raise ValueError("reason")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of a file")
def test_libraries_that_write_weights_have_their_disk_errors_known(tmp_path):
    """safetensors and torch raise classes that say nothing of the cause."""
    code = f"""
import resource, torch
from pathlib import Path
from safetensors.torch import save_file
from proxytune.errors import OutputFileError
from proxytune.files import building
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
weights = {{"a": torch.zeros(100_000)}}
for save in (save_file, torch.save):
    try:
        with building(Path({str(tmp_path)!r}) / "new") as part:
            save(weights, part / "weights")
    except OutputFileError as error:
        assert "new cannot be written: " in str(error), error
    else:
        raise AssertionError(save)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_weights_is_no_error_of_writing(tmp_path):
    (tmp_path / "weights").write_bytes(b"damaged")
    with pytest.raises(SafetensorError) as caught:
        load_file(tmp_path / "weights")
    assert not is_disk_error(caught.value)


class _Figure:
    """A figure that the disk is too small for."""

    def savefig(self, part, **options):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")


def test_a_picture_is_written_whole_in_the_format_of_its_name(tmp_path):
    figure = Figure()
    for name, first in (("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")):
        save_figure(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(first)
    with pytest.raises(
        OutputFileError, match=r"a.txt cannot be written: .*txt(.|\n)*hint: .*\.png"
    ):
        save_figure(figure, tmp_path / "a.txt")
    with pytest.raises(OutputFileError, match=r"no/a\.png cannot be written: there is no .*no\.\n"):
        save_figure(figure, tmp_path / "no" / "a.png")
    before = (tmp_path / "a.pdf").read_bytes()
    with pytest.raises(OutputFileError, match=r"a\.pdf cannot be written: No space left"):
        save_figure(_Figure(), tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.SVG", "a.pdf", "a.png"]
