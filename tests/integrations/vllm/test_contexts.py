"""The context that vLLM gives a recipe with scaled models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from tests.support.tiny import tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.0],
    "long_factor": [2.0, 2.0],
}


def write(directory: Path, base: dict[str, Any] | None, small: dict[str, Any] | None) -> Path:
    for name, scaling in (("base", base), ("expert", small), ("anti", small)):
        config = tiny_model(directory / name, "qwen2", max_context=128) / "config.json"
        if scaling is not None:
            own = json.loads(config.read_text())
            own["rope_parameters"] = {"rope_theta": 10000.0, **scaling}
            config.write_text(json.dumps(own))
    pair = ExpertSpec("e", ModelSpec(model="expert"), ModelSpec(model="anti"))
    Recipe(ModelSpec(model="base"), (pair,), directory=directory).write(directory)
    return directory


def max_model_len(directory: Path, **options: Any) -> int:
    """Return the context of vLLM's whole config of a recipe; nothing is started."""
    from vllm import EngineArgs

    config = EngineArgs(model=str(directory), dtype="float32", **options).create_engine_config()
    return int(config.model_config.max_model_len)


@pytest.mark.parametrize(
    ("base", "small", "expected"),
    [
        (None, None, 128),
        (YARN, YARN, 512),
        (LINEAR, LINEAR, 256),
        (YARN, LINEAR, 256),
        (LINEAR, None, 128),
        (LONGROPE, None, 64),
    ],
)
def test_the_context_is_the_shortest_of_the_scaled_models(tmp_path, base, small, expected):
    directory = write(tmp_path, base, small)
    assert max_model_len(directory) == expected
    with pytest.raises(Exception, match="max_model_len"):
        max_model_len(directory, max_model_len=expected + 1)


def test_dynamic_ntk_is_refused_by_name(tmp_path):
    with pytest.raises(Exception, match="dynamic NTK"):
        max_model_len(write(tmp_path, DYNAMIC, None))
