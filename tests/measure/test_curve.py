"""Sweeps drawn as pictures."""

from __future__ import annotations

import pytest

from proxytune.errors import OutputFileError
from proxytune.measure.curve import draw
from proxytune.measure.sweep import Grid, sweep_likelihood
from proxytune.testing import toy_model

TWO = {"first": 1.0, "second": 0.7}
TEXT = "the sea is a sea and a ship is a ship. a man at sea is a man. the end of it. " * 6


def passages(model, *texts):
    return [passage for text in texts for passage in model.text_passages(text, window=16)]


@pytest.mark.parametrize(
    "alphas",
    [{"first": [0.0, 1.0], "second": [0.3]}, {"first": [0.0, 1.0], "second": [0.3, 0.6]}],
    ids=["curve", "map"],
)
def test_a_picture_is_drawn_for_one_or_two_varied_experts(alphas, tmp_path):
    pytest.importorskip("matplotlib")
    model = toy_model(experts=TWO, eos_logit=-100.0)
    parts = passages(model, TEXT[:80])
    grid = Grid.of(("first", "second"), alphas)
    report = sweep_likelihood(model.ensemble, grid, valid=parts, test=parts, own=(1.0, 0.7))
    draw(report, grid, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputFileError, match="nowhere"):
        draw(report, grid, tmp_path / "nowhere" / "sweep.png")
    with pytest.raises(OutputFileError, match=r"\.xyz"):
        draw(report, grid, tmp_path / "sweep.xyz")
