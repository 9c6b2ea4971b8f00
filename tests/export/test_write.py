"""A GGUF file is written whole or not at all, and replaces nothing unasked."""

from __future__ import annotations

from typing import Any

import pytest

from proxytune.errors import OutputFileError
from proxytune.export import write
from tests.support.gguf import export, llama


def test_another_file_is_kept_unless_it_is_to_be_replaced(tmp_path):
    small = llama(tmp_path / "small")
    output = tmp_path / "deep" / "out.gguf"
    first = export(small, output, dtype="F32")
    assert export(small, output, dtype="F32") == first
    with pytest.raises(OutputFileError, match=r"(?s)other content.*--force"):
        export(small, output, dtype="F16")
    assert output.stat().st_size == first.num_bytes
    export(small, output, dtype="F16", overwrite=True)
    assert output.stat().st_size < first.num_bytes
    assert [path.name for path in output.parent.iterdir()] == ["out.gguf"]
    with pytest.raises(OutputFileError, match="is a directory"):
        (tmp_path / "folder.gguf").mkdir()
        export(small, tmp_path / "folder.gguf")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_export_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    small = llama(tmp_path / "small")
    output = tmp_path / "out" / "out.gguf"
    export(small, output, dtype="F32")
    content = output.read_bytes()
    stored = write._stored

    def interrupt(tensor: Any, source: str) -> Any:
        if tensor.name == "blk.1.attn_q.weight":
            raise error("no space left")
        return stored(tensor, source)

    monkeypatch.setattr(write, "_stored", interrupt)
    with pytest.raises(OutputFileError if error is OSError else error):
        export(small, output, dtype="F16", overwrite=True)
    assert output.read_bytes() == content
    assert [path.name for path in output.parent.iterdir()] == ["out.gguf"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    small = llama(tmp_path / "small")
    (tmp_path / "file").touch()
    with pytest.raises(OutputFileError, match=r"file/out\.gguf cannot be written"):
        export(small, tmp_path / "file" / "out.gguf")
