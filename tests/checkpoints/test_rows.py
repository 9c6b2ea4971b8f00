"""Which layers get the rows of a batch one by one, found out without weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from proxytune.checkpoints.rows import layout_of, modules_of_rows

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def empty(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def missed(model):
    """Return the ends of the names of linear layers that do not get rows."""
    names = layout_of(model).linear - modules_of_rows(model)
    return {name.partition("layers.")[2].partition(".")[2] or name for name in names}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(**SIZES, intermediate_size=32), set()),
        (transformers.Gemma3TextConfig(**SIZES, intermediate_size=32, head_dim=8), set()),
        (transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=4), set()),
        # Positions are the same for all rows.
        (
            transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2),
            {"transformer.wpe"},
        ),
        (
            transformers.OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16),
            {"fc1", "fc2", "model.decoder.embed_positions"},
        ),
        (
            transformers.Qwen2MoeConfig(
                **SIZES,
                intermediate_size=32,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=8,
                num_experts=4,
                num_experts_per_tok=2,
            ),
            {
                f"mlp.shared_expert{part}"
                for part in (".gate_proj", ".up_proj", ".down_proj", "_gate")
            },
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_linear_layers_get_rows_unless_the_model_flattens_them(config, expected):
    assert missed(empty(config)) == expected


def test_the_model_is_left_as_it_was():
    model = empty(transformers.LlamaConfig(**SIZES, intermediate_size=32))
    assert modules_of_rows(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_of_a_model_that_cannot_be_run_without_values_nothing_is_known():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, device="meta")

        def forward(self, input_ids, use_cache=True):
            return self.layer(torch.ones(input_ids.tolist(), device="meta"))

    assert modules_of_rows(Odd()) == frozenset()
