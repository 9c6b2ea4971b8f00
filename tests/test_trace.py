"""What a generation leaves behind can be written down and read back."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path

import pytest

from proxytune.errors import OutputFileError
from proxytune.trace import Step, Trace, View, read_traces, trace_writer

STEPS = (
    Step(
        0,
        5,
        "Ça",
        -0.5,
        top=((5, -0.5), (1, -1.5)),
        views={"base": View(-2.0, 3, 1.5, ((1, -0.5),)), "a.expert": View(None, None, None)},
        kl=0.25,
    ),
    Step(1, 2, "", -0.25, finish_reason="stop"),
)
TRACE = Trace("Ça", "stop", STEPS, 3, alphas={"a": 0.5}, seed=7, latency_s=1.25)


def test_a_trace_read_back_equals_the_one_written():
    line = TRACE.to_json()
    assert "\n" not in line
    assert Trace.from_json(line) == TRACE


def test_the_summary_has_the_fields_of_the_command_line():
    summary = TRACE.summary()
    assert list(summary) == [
        "text",
        "token_ids",
        "finish_reason",
        "num_prompt_tokens",
        "num_new_tokens",
        "alpha",
        "expert",
        "latency_s",
    ]
    assert (summary["alpha"], summary["expert"]) == (0.5, "a")
    assert summary["token_ids"] == [5, 2]
    json.dumps(summary)


def test_several_experts_are_listed_with_their_strengths():
    several = Trace("", "length", (), 1, alphas={"a": 0.5, "b": 1.0})
    assert several.summary()["expert"] == ["a", "b"]
    assert several.summary()["alpha"] == {"a": 0.5, "b": 1.0}


def test_traces_are_written_one_a_line_as_they_come(tmp_path):
    path = tmp_path / "traces.jsonl"
    with trace_writer(path) as write:
        write([TRACE])
        assert list(read_traces(path)) == [TRACE]
        write([TRACE, TRACE])
    assert list(read_traces(path)) == [TRACE] * 3
    with trace_writer(None) as write:
        write([TRACE])


def test_a_trace_file_is_blamed_for_its_own_failures_only(tmp_path):
    with (
        pytest.raises(OutputFileError, match="cannot be written"),
        trace_writer(tmp_path / "no" / "traces.jsonl"),
    ):
        pass
    with pytest.raises(OSError, match="elsewhere"), trace_writer(tmp_path / "t.jsonl"):
        raise OSError("elsewhere")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named_though_closing_the_file_fails_as_well():
    """Closing writes again what a failed write has left; its error used to hide the other one."""
    full = Path("/dev/full")
    with (
        pytest.raises(OutputFileError, match="/dev/full cannot be written: No space left"),
        trace_writer(full) as write,
    ):
        write([TRACE])
    with pytest.raises(KeyError), trace_writer(full) as write:
        with suppress(OutputFileError):
            write([TRACE])
        raise KeyError("the block's own error comes first")


def test_a_file_that_fails_only_when_it_is_closed_is_named(tmp_path, monkeypatch):
    """Some network file systems report a full disk no earlier."""

    class Late(io.StringIO):
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda *_, **__: Late())
    with (
        pytest.raises(OutputFileError, match=r"traces\.jsonl cannot be written: No space left"),
        trace_writer(tmp_path / "traces.jsonl") as write,
    ):
        write([TRACE])
