"""Models that bring code of their own, which leaves a mark where it runs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.tiny import tiny_model

CODE = """
import pathlib
(pathlib.Path({mark!r})).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "brings_code"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def model_with_code(directory: Path, mark: Path, *, model_type: str = "brings_code") -> Path:
    """Write a working Llama-shaped model whose config and tokenizer name code beside them."""
    tiny_model(directory)
    (directory / "own_code.py").write_text(CODE.format(mark=str(mark)))
    _edit(
        directory / "config.json",
        model_type=model_type,
        auto_map={"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Model"},
    )
    _edit(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "own_code.Tokenizer"]},
    )
    return directory


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
