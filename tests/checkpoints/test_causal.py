"""Models that do not predict the next token are refused before their weights are read."""

from __future__ import annotations

import pytest
import transformers

from proxytune.checkpoints.causal import check_causal
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.errors import UnsupportedModel
from tests.support.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("kind", "said"),
    [("xlnet", "masks"), ("xlm", "mask"), ("cpmant", "both directions"), ("bert", "is_decoder")],
)
def test_a_model_that_does_something_else_is_refused_by_name(kind, said):
    """XLM and CPM-Ant failed at the first token."""
    with pytest.raises(UnsupportedModel, match=f"{kind}(?s:.*){said}(?s:.*)hint"):
        check_causal(transformers.AutoConfig.for_model(kind), "model")


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "bart", "openai-gpt"])
def test_decoders_are_not(kind):
    check_causal(transformers.AutoConfig.for_model(kind), "model")


def test_an_encoder_is_a_decoder_where_its_config_says_so():
    check_causal(transformers.AutoConfig.for_model("bert", is_decoder=True), "model")


def test_a_checkpoint_is_refused_when_it_is_found(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=266, intermediate_size=16, **sizes)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedModel, match="reads a text in both directions"):
        find_checkpoint("bert", root=tmp_path)
